"""restart.sh restarts as often as it says and no more; the scripts are clean shell; the flags they pass exist."""

import re
import shutil
import subprocess
import sys

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from conftest import REPO

CLUSTER = REPO / "accelerate_configs" / "cluster"
COMMAND = """
import os, sys
calls, failures, *flags = sys.argv[1:]
with open(calls, "a+") as file:
    print(*flags, file=file)
    file.seek(0)
    sys.exit(0 if len(file.readlines()) > int(failures) else int(os.environ.get("CODE", 3)))
"""


@pytest.fixture
def restart(tmp_path):
    """restart(failures, *flags) of a command that fails so often: (exit code, flags of each start, what it said)."""
    (tmp_path / "command.py").write_text(COMMAND)

    def run(failures, *flags, **environment):
        command = [CLUSTER / "restart.sh", sys.executable, tmp_path / "command.py", tmp_path / "calls", failures]
        environment = {"PATH": "/usr/bin:/bin", "PAUSE": "0", **environment}
        command = [*map(str, [*command, *flags])]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        return done.returncode, (tmp_path / "calls").read_text().splitlines(), done.stderr

    return run


def test_restarts_until_it_ends_well(restart):
    code, calls, said = restart(2, "--seed", "1")
    assert code == 0 and calls == ["--seed 1 --resume_from_checkpoint true"] * 3
    assert "exit code 3: restart 2 of 5" in said


def test_gives_up(restart):
    code, calls, said = restart(99, RESTARTS="2")
    assert code == 3 and len(calls) == 3 and "given up" in said


@pytest.mark.parametrize("code", [130, 143])
def test_asked_to_stop_it_stops(restart, code):
    """Ctrl-C and a kill come back as these codes; a loop that starts again cannot be stopped."""
    assert restart(99, CODE=str(code))[:2] == (code, ["--resume_from_checkpoint true"])


def test_pauses_double(restart, tmp_path):
    """A sleep of ours, found first, notes how long it was asked to wait."""
    (tmp_path / "sleep").write_text(f"#!/bin/sh\necho $1 >> {tmp_path}/pauses\n")
    (tmp_path / "sleep").chmod(0o755)
    restart(3, PAUSE="7", PATH=f"{tmp_path}:/usr/bin:/bin")
    assert (tmp_path / "pauses").read_text().split() == ["7", "14", "28"]


def test_scripts_are_clean_and_pass_flags_that_exist():
    """What would fool it: a renamed flag of accelerate, which only a cluster would show."""
    flags = {word for action in launch_command_parser()._actions for word in action.option_strings}
    scripts = CLUSTER / "train.sbatch", CLUSTER / "skypilot.yaml"
    for script in scripts:
        passed = re.findall(r"(?<= )(--\w+)(?= )", script.read_text().split("accelerate launch")[-1])
        ours = {"--resume_from_checkpoint", "--output_dir"}
        assert len(passed) > 6 and set(passed) - ours <= flags
    job = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())
    assert {"resources", "num_nodes", "setup", "run", "file_mounts"} <= job.keys()
    shells = [CLUSTER / "train.sbatch", CLUSTER / "restart.sh"]
    for shell in shells:
        subprocess.run(["bash", "-n", shell], check=True)
        assert not shutil.which("shellcheck") or subprocess.run(["shellcheck", shell]).returncode == 0
