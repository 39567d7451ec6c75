"""Two nodes for real: two network namespaces with an address each, gloo between them over a virtual cable."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers.engines import PROBE, curve, gap, ranks
from tests.helpers.runs import EXACT, REPO, TINY

pytestmark = pytest.mark.long
ADDRESSES = "10.77.0.1", "10.77.0.2"


def sh(command, check=True):
    return subprocess.run(command, shell=True, check=check, capture_output=True, text=True)


@pytest.fixture
def nodes():
    """Names of two namespaces, joined by a cable whose ends bear the same names; gone afterwards."""
    names = [f"sft{os.getpid()}{end}" for end in "ab"]
    tried = subprocess.run(["ip", "netns", "add", names[0]], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"`ip netns add` is refused here: {tried.stderr.strip()}")
    try:
        sh(f"ip netns add {names[1]} && ip link add {names[0]} type veth peer name {names[1]}")
        for name, address in zip(names, ADDRESSES, strict=True):
            sh(f"ip link set {name} netns {name} && ip -n {name} addr add {address}/24 dev {name}")
            sh(f"ip -n {name} link set {name} up && ip -n {name} link set lo up")
        yield names
    finally:
        for name in names:
            sh(f"ip netns del {name}", check=False)


def start(nodes, config, out, folder, demo, *flags):
    """The shipped config on both nodes as its header says, one process a node; returns the two launchers."""
    (folder / "probe.py").write_text(PROBE)
    flags = ["--model_name_or_path", demo / "init", "--dataset_name", demo / "rows" / "chat", *EXACT, *flags]
    flags += ["--chat_template_path", REPO / "chat_templates" / "qwen3.jinja", "--hooks", folder / "probe.py"]
    started = []
    for rank, name in enumerate(nodes):
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
        command += [REPO / "accelerate_configs" / f"{config}.yaml", "--num_machines", 2, "--num_processes", 2]
        command += ["--machine_rank", rank, "--main_process_ip", ADDRESSES[0], REPO / "recipes" / "qwen3_full.py"]
        command = [*map(str, [*command, *TINY, "--output_dir", out, *flags])]
        environment = os.environ | {"GLOO_SOCKET_IFNAME": name, "TOKENIZERS_PARALLELISM": "false"}
        log = (folder / f"node{rank}.log").open("w")
        started.append(
            subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        )
    return started


@pytest.mark.parametrize(("config", "stage"), [("zero3_2nodes", 3), ("ddp_8gpu", None)])
def test_two_nodes_equal_one_process(nodes, demo, tmp_path, run_recipe, config, stage):
    """What would fool it: both nodes training alone, which gives the same curve; so world and rows are asserted."""
    one = run_recipe("qwen3_full", *EXACT, "--max_steps", 12, out="one")
    out = tmp_path / config
    started = start(nodes, config, out, tmp_path, demo, "--max_steps", 12)
    codes = [process.wait(900) for process in started]
    assert codes == [0, 0], (tmp_path / "node0.log").read_text()[-3000:] + (tmp_path / "node1.log").read_text()[-3000:]
    found = ranks(out)
    assert [rank["world"] for rank in found] == [2, 2] and [rank["stage"] for rank in found] == [stage, stage]
    assert len(found[0]["seen"]) == 24 and not {*map(str, found[0]["seen"])} & {*map(str, found[1]["seen"])}
    assert len(curve(one, "loss")) == 12 and gap(one, out, "loss") <= 1e-5
    assert curve(one, "num_tokens") == curve(out, "num_tokens")


def test_a_cut_link_ends_both_nodes(nodes, demo, tmp_path):
    """The cable is pulled in mid-run: both ends stop within a minute, not with 0, and say why.

    What would fool it: a run that was over, or had not begun. The cut comes after a logged step of a run far from done.
    """
    out = tmp_path / "cut"
    started = start(nodes, "ddp_8gpu", out, tmp_path, demo, "--max_steps", 5000)
    try:
        until = time.monotonic() + 300
        while not (out / "log.jsonl").is_file() or len((out / "log.jsonl").read_text().splitlines()) < 3:
            assert time.monotonic() < until and all(process.poll() is None for process in started)
            time.sleep(0.5)
        time.sleep(5)  # a few beats
        sh(f"ip -n {nodes[0]} link set {nodes[0]} down")
        cut = time.monotonic()
        while any(process.poll() is None for process in started) and time.monotonic() < cut + 90:
            time.sleep(0.5)
        took = time.monotonic() - cut
        assert all(process.returncode not in (None, 0) for process in started), [p.returncode for p in started]
        assert took <= 60
        logs = [(tmp_path / f"node{rank}.log").read_text() for rank in (0, 1)]
        assert any("nothing heard of rank" in log and "--resume_from_checkpoint true" in log for log in logs)
        assert len(curve(out, "loss")) < 5000
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
