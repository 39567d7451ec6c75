"""Spread work over processes, results in order."""

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice

import pyarrow as pa
from tqdm import tqdm

from .errors import UsageError

WORTH = 0.3  # seconds of work after which the start of other processes pays


def cores():
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def starter():
    """How processes are started: forked from one that has imported what takes long and runs no threads. A fork of this
    one would copy locks that Arrow's threads hold."""
    # Windows has none, and its socket lies in the folder for temporary files, whose path may be too long for one
    if "forkserver" not in multiprocessing.get_all_start_methods() or len(tempfile.gettempdir()) > 60:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["numpy", "orjson", "pyarrow.compute", "tqdm", "xxhash", "yaml"])
    return context


def begin_work():
    """What a new process does first."""
    # Ctrl-C reaches it too: cut while it hands a result over, it would leave the script waiting for the rest
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    without_pandas()
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    """Where the script is killed, nothing would tell its processes: they would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def without_pandas():
    """Keep pyarrow from importing pandas, which it does at its first conversion and which takes 0.3 s a process: no
    step reads or makes pandas' objects. What a step imports later may import it."""

    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name == "pandas":
                raise ImportError(name)

    absent = Absent()
    sys.meta_path.insert(0, absent)
    try:
        pa.array([0])
    finally:
        sys.meta_path.remove(absent)


def parallel_map(work, blocks, num_proc=None, name="rows"):
    """Yield work(block) for every block, in order, on num_proc processes. Not given: on all processors, which start
    once a second of work has shown that there is more of it, and until they have started the work goes on here. Raises
    UsageError where a process dies."""
    blocks, begin = iter(blocks), time.monotonic()
    bar = tqdm(desc=name, unit=" blocks", disable=not sys.stderr.isatty())

    def here(until=lambda: False):
        for block in blocks:
            yield work(block)
            bar.update()
            if until():
                return

    with bar:
        if num_proc == 1:
            yield from here()
        if not num_proc:
            yield from here(lambda: time.monotonic() - begin > WORTH)
        ahead = [*islice(blocks, 2)]
        many = num_proc or cores()
        if many == 1 or len(ahead) < 2:
            blocks = chain(ahead, blocks)
            yield from here()
            return
        blocks = chain(ahead, blocks)
        with ProcessPoolExecutor(many, starter(), begin_work) as pool:
            try:
                if not num_proc:
                    started = [pool.submit(os.getpid) for _ in range(many)]
                    yield from here(lambda: all(one.done() for one in started))
                waiting = deque()
                while True:
                    while len(waiting) < 2 * many and (block := next(blocks, None)) is not None:
                        waiting.append(pool.submit(work, block))
                    if not waiting:
                        return
                    yield waiting.popleft().result()
                    bar.update()
            except BrokenProcessPool:
                raise UsageError("a process died, most likely out of memory: pass a smaller --num_proc") from None
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
