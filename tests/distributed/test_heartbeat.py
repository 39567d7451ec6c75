"""Two processes with nothing but heartbeats, on a store as torchrun's: a silent one ends the other, a slow one not."""

import os
import signal
import subprocess
import sys
import time

import pytest
from torch.distributed import TCPStore

from tests.helpers.runs import REPO

RANK = """
import sys, time
from types import SimpleNamespace
from hooks.heartbeat import Heartbeat
rank, seconds = int(sys.argv[1]), float(sys.argv[2])
heartbeat = Heartbeat(SimpleNamespace(args=SimpleNamespace(process_index=rank, world_size=2)))
heartbeat.on_step_begin(None, None, None)
heartbeat.on_step_begin(None, None, None)
print("started", flush=True)
time.sleep(seconds)  # as a save or a collective: the main thread does nothing
heartbeat.done()
print("done", flush=True)
time.sleep(float(sys.argv[3]))
"""
LIMIT = 2  # seconds


@pytest.fixture
def begin():
    """begin(rank, seconds, seconds after done()) starts a rank; all are killed at the end."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = []

    def begin(rank, seconds, after=0):
        path = os.pathsep.join([str(REPO / "recipes"), str(REPO)])
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "SFT_HEARTBEAT_S": str(LIMIT)}
        command = [sys.executable, "-c", RANK, str(rank), str(seconds), str(after)]
        process = subprocess.Popen(
            command,
            env=os.environ | environment | {"PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield begin
    for process in processes:
        process.kill()
        process.wait()


def wait_for(process, line):
    for text in process.stdout:
        if text.strip() == line:
            return
    raise AssertionError(process.stderr.read())


def test_a_frozen_rank_ends_the_other(begin):
    first, second = begin(0, 300), begin(1, 300)
    wait_for(first, "started")
    wait_for(second, "started")
    time.sleep(2 * LIMIT)  # both beat for longer than the limit
    assert first.poll() is None and second.poll() is None
    second.send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    assert first.wait(30) == 1
    assert LIMIT / 2 < time.monotonic() - stopped < 10
    said = first.stderr.read().strip().splitlines()[-1]
    assert f"rank 0 ends: nothing heard of rank 1 for {LIMIT} s" in said and "--resume_from_checkpoint true" in said


@pytest.mark.long
def test_done_is_not_lost(begin):
    """Rank 1 is done and ends while rank 0 goes on for three times the limit."""
    first, second = begin(0, 4 * LIMIT), begin(1, LIMIT)
    wait_for(second, "done")
    assert second.wait(30) == 0
    wait_for(first, "done")
    assert first.wait(30) == 0


@pytest.mark.long
def test_a_rank_that_stood_still_itself_ends_nobody(begin):
    """Rank 1 is frozen for less than the limit, and rank 0, which was frozen for longer, begins to count anew."""
    first, second = begin(0, 6 * LIMIT), begin(1, 6 * LIMIT)
    wait_for(first, "started")
    wait_for(second, "started")
    time.sleep(LIMIT)
    first.send_signal(signal.SIGSTOP)
    second.send_signal(signal.SIGSTOP)
    time.sleep(2 * LIMIT)
    first.send_signal(signal.SIGCONT)
    second.send_signal(signal.SIGCONT)
    wait_for(first, "done")
    wait_for(second, "done")


def test_one_process_needs_no_heartbeat():
    from types import SimpleNamespace

    from hooks.heartbeat import Heartbeat

    heartbeat = Heartbeat(SimpleNamespace(args=SimpleNamespace(process_index=0, world_size=1)))
    heartbeat.on_step_begin(None, None, None)
    assert heartbeat.writer is None
    heartbeat.done()
