"""restart.sh restarts as often as it says and no more; the scripts are clean shell; the flags they pass exist.

trainjob.yaml has fields of Kubeflow Trainer's API alone, and its command trains; ray_train.py on a local cluster gives
the losses of accelerate (where ray is installed).

Breaks tried, each seen red: podTemplateOverrides, as Trainer had it before 2.2; a volume that no container mounts.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

from tests.helpers.runs import EXACT, REPO, TINY, launch

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


# -- Kubernetes -------------------------------------------------------------------------------------------------------
# Fields of trainer.kubeflow.org/v1alpha1 in Kubeflow Trainer v2.3 (pkg/apis/trainer/v1alpha1/trainjob_types.go), as far
# down as they are Trainer's own. The whole file was checked once against the schema of its CRD, unknown names refused.
POD = {
    *("serviceAccountName", "volumes", "initContainers", "containers", "imagePullSecrets", "securityContext"),
    *("nodeSelector", "affinity", "tolerations", "schedulingGates", "terminationGracePeriodSeconds"),
}
CONTAINER = {"name", "env", "volumeMounts", "securityContext"}
TRAINER = {"image", "command", "args", "env", "numNodes", "resourcesPerNode", "numProcPerNode"}
SPEC = {
    *("runtimeRef", "initializer", "trainer", "runtimePatches", "suspend", "activeDeadlineSeconds", "managedBy"),
}


@pytest.fixture(scope="module")
def trainjob():
    return yaml.safe_load((CLUSTER / "trainjob.yaml").read_text())


def descend(value, *names):
    """What lies under a chain of names, each of which is the only one there, beside a name."""
    for name in names:
        assert set(value) <= {name, "name", "manager"}, (name, set(value))
        value = value[name]
    return value


def test_the_trainjob_has_fields_of_its_api(trainjob):
    assert (trainjob["apiVersion"], trainjob["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    spec = trainjob["spec"]
    assert set(spec) <= SPEC and set(spec["trainer"]) <= TRAINER and set(spec["runtimeRef"]) <= {"name", "kind"}
    assert all(isinstance(variable["value"], str) for variable in spec["trainer"]["env"])
    (patch,) = spec["runtimePatches"]
    (job,) = descend(patch, "trainingRuntimeSpec", "template", "spec", "replicatedJobs")
    pod = descend(job, "template", "spec", "template", "spec")
    (container,) = pod["containers"]
    assert set(pod) <= POD and set(container) <= CONTAINER
    assert job["name"] == container["name"] == "node"  # as the runtime torch-distributed names them
    assert {volume["name"] for volume in pod["volumes"]} == {mount["name"] for mount in container["volumeMounts"]}
    gpus = spec["trainer"]["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    assert gpus == spec["trainer"]["numProcPerNode"]
    config = {variable["name"]: variable["value"] for variable in spec["trainer"]["env"]}
    processes = yaml.safe_load((REPO / "accelerate_configs" / f"{config['CONFIG']}.yaml").read_text())["num_processes"]
    assert processes == gpus * spec["trainer"]["numNodes"] and (REPO / config["RECIPE"]).is_file()


def data_flags(demo):
    flags = [*TINY, *EXACT, "--model_name_or_path", demo / "init", "--dataset_name", demo / "rows" / "chat"]
    return [*map(str, flags), "--chat_template_path", str(REPO / "chat_templates" / "qwen3.jinja")]


def losses(folder):
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]


@pytest.fixture(scope="module")
def by_accelerate(demo, tmp_path_factory):
    """The losses of two processes by `accelerate launch`."""
    folder = tmp_path_factory.mktemp("accelerate") / "run"
    flags = [*data_flags(demo), "--output_dir", str(folder)]
    done = launch(REPO / "recipes" / "qwen3_lora.py", *flags, config="cpu_2proc")
    assert done.returncode == 0, done.stderr[-2000:]
    return losses(folder)


@pytest.mark.long
def test_the_trainjob_s_command_trains(trainjob, demo, by_accelerate, tmp_path):
    """With the variables that Trainer's torch plugin sets (pkg/runtime/framework/plugins/torch), on one node."""
    *shell, script = trainjob["spec"]["trainer"]["command"]
    variables = {"NNODES": 1, "NPROC_PER_NODE": 2, "NODE_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29517}
    environment = {f"PET_{name}": str(value) for name, value in variables.items()}
    environment |= {"CONFIG": "cpu_2proc", "RECIPE": "recipes/qwen3_lora.py", "FLAGS": " ".join(data_flags(demo))}
    environment["PATH"] = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    command = [*shell, script.replace("/runs/sft", str(tmp_path / "run"))]
    done = subprocess.run(command, cwd=REPO, env=os.environ | environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(tmp_path / "run") == pytest.approx(by_accelerate, rel=1e-6)


def test_the_image_holds_what_a_run_needs():
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    copied = [line.split()[1] for line in lines if line.startswith("COPY ")]
    assert all((REPO / name).exists() for name in copied)
    assert {"recipes", "data_prep", "eval", "chat_templates", "accelerate_configs", "requirements.txt"} == set(copied)
    pins = (REPO / "requirements-gpu.txt").read_text()
    assert re.search(r"liger-kernel==\S+", "\n".join(lines))[0] in pins


# -- Ray --------------------------------------------------------------------------------------------------------------
@pytest.mark.long
@pytest.mark.skipif(not find_spec("ray"), reason='ray is not installed: pip install "ray[train]"')
def test_ray_gives_the_losses_of_accelerate(demo, by_accelerate, tmp_path):
    """On a cluster of this machine, two workers over gloo; a refusal ends it with an exit code of its own."""
    command = [sys.executable, CLUSTER / "ray_train.py", "--workers", 2, "--cpu", REPO / "recipes" / "qwen3_lora.py"]
    command = [*map(str, command), *data_flags(demo)]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"RAY_DISABLE_DASHBOARD": "1", "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0"}
    runs = []
    for flags in (
        ["--output_dir", str(tmp_path / "run")],
        ["--output_dir", str(tmp_path / "other"), "--lora_rank", "3"],
    ):
        done = subprocess.run([*command, *flags], cwd=tmp_path, env=environment, capture_output=True, text=True)
        runs.append(done)
    assert runs[0].returncode == 0, runs[0].stderr[-3000:]
    assert losses(tmp_path / "run") == pytest.approx(by_accelerate, rel=1e-6)
    assert "no signal saves it" in runs[0].stdout + runs[0].stderr
    assert runs[1].returncode != 0 and "pass --lora_r" in runs[1].stdout + runs[1].stderr
