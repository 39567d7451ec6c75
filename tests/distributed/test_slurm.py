"""Slurm for real: the shipped script on a one-host Slurm, preempted, requeued, resumed, the curve of one process."""

import os
import shutil
import socket
import subprocess
import time

import pytest

from tests.helpers.engines import PROBE, curve, gap, ranks
from tests.helpers.runs import EXACT, REPO, TINY

pytestmark = pytest.mark.long
NEEDED = "slurmctld", "slurmd", "munged", "sbatch", "runuser"
CONF = """
ClusterName=sft
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs=2
PartitionName=low Nodes={host} PriorityTier=1 PreemptMode=REQUEUE Default=YES
PartitionName=high Nodes={host} PriorityTier=10 PreemptMode=OFF
"""


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.fixture
def slurm(tmp_path_factory):
    """A function that runs Slurm's commands on a cluster of this one machine; its three daemons end with the test."""
    missing = [name for name in NEEDED if not shutil.which(name)]
    if missing or os.geteuid():
        pytest.skip(f"needs root and Debian's slurm-wlm and munge; missing: {missing or 'root'}")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    for parent in (folder, *folder.parents):  # munged walks here as its own user
        if str(parent).startswith("/tmp/"):
            parent.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    for path in (key, folder):
        shutil.chown(path, "munge")
    conf = folder / "slurm.conf"
    host = socket.gethostname().split(".")[0]
    conf.write_text(CONF.format(host=host, folder=folder, ports=[free_port(), free_port()]))
    environment = os.environ | {"SLURM_CONF": str(conf), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    log = (folder / "daemons.log").open("w")
    munge = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket"]
    munge += [f"--pid-file={folder}/munge.pid", f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"]
    daemons = []

    def daemon(*command):
        daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))

    def call(*command):
        done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, cwd=REPO)
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout.strip()

    try:
        daemon("runuser", "-u", "munge", "--", *munge)
        time.sleep(2)
        daemon("slurmctld", "-D")
        time.sleep(2)
        daemon("slurmd", "-D", "-N", host)
        until = time.monotonic() + 30
        while "idle" not in call("sinfo", "-h", "-o", "%T"):
            assert time.monotonic() < until, log.name
            time.sleep(1)
        yield call
    finally:
        subprocess.run(["scancel", "--user", "root"], env=environment, capture_output=True)
        time.sleep(2)
        for process in reversed(daemons):
            process.terminate()
            process.wait(30)


def wait(check, seconds, what):
    until = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < until, what()
        time.sleep(1)


def test_preempted_requeued_resumed(slurm, demo, tmp_path, run_recipe):
    """What would fool it: a job that was not preempted, or began anew. Slurm's own count and the rows seen tell."""
    steps = ["--max_steps", 12, "--save_strategy", "steps", "--save_steps", 3]
    one = run_recipe("qwen3_full", *EXACT, *steps, out="one")
    (tmp_path / "probe.py").write_text(PROBE)
    out, printed = tmp_path / "job", tmp_path / "slurm.out"
    flags = ["--model_name_or_path", demo / "init", "--dataset_name", demo / "rows" / "chat", "--output_dir", out]
    flags += ["--chat_template_path", REPO / "chat_templates" / "qwen3.jinja", "--hooks", tmp_path / "probe.py"]
    job = slurm(
        "sbatch",
        "--parsable",
        "--partition=low",
        "--nodes=1",
        "--ntasks=2",
        "--ntasks-per-node=2",
        f"--output={printed}",
        f"--chdir={REPO}",
        REPO / "accelerate_configs" / "cluster" / "train.sbatch",
        "ddp_8gpu",
        "recipes/qwen3_full.py",
        *TINY,
        *EXACT,
        *steps,
        *flags,
    )
    logs = REPO / f"slurm-{job}-logs"

    def said():
        return slurm("scontrol", "show", "job", job) + (printed.read_text()[-3000:] if printed.is_file() else "")

    def state():
        return slurm("squeue", "-h", "-j", job, "-t", "all", "-o", "%T")

    try:
        wait(lambda: any(out.glob("checkpoint-*/trainer_state.json")) or state() == "FAILED", 600, said)
        slurm("sbatch", "--parsable", "--partition=high", "--ntasks=2", "--wrap=sleep 3", "--output=/dev/null")
        wait(lambda: "Restarts=1" in said(), 120, said)
        assert len(curve(out, "loss")) < 12, "it was over before it was preempted"
        wait(lambda: "high" not in slurm("squeue", "-h", "-o", "%P"), 120, said)
        slurm("scontrol", "update", f"jobid={job}", "starttime=now")  # else it waits two minutes
        wait(lambda: state() in ("COMPLETED", "FAILED", "CANCELLED"), 900, said)
        assert state() == "COMPLETED", said()
        assert "start 0: 2 x 1 ranks" in printed.read_text() and "start 1: 2 x 1 ranks" in printed.read_text()
        found = ranks(out)
        assert [rank["world"] for rank in found] == [2, 2] and found[0]["engine"] == "DistributedDataParallel"
        assert 0 < len(found[0]["seen"]) < 24, "the second start began anew"
        assert len(curve(out, "loss")) == 12 and gap(one, out, "loss") <= 1e-5
        assert curve(one, "num_tokens") == curve(out, "num_tokens")
        for start in (0, 1):  # a file a rank and start
            assert len(list(logs.glob(f"start{start}/node*/*/attempt_0/0/stderr.log"))) == 2
    finally:
        shutil.rmtree(logs, ignore_errors=True)
