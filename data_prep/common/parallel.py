"""Spread work over processes, results in the order of the work."""

import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import chain, islice
from typing import TypeVar

from tqdm import tqdm

from .errors import UsageError

Item = TypeVar("Item")
Result = TypeVar("Result")

FEW = 8  # chunks that are worked on here: processes would take longer to start
GC_THRESHOLDS = (50_000, 20, 100)  # of gc.set_threshold, whose own are (700, 10, 10)


def count_cores() -> int:
    """Return the number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back in the block: a process that starts there never sees it, not even while it imports."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextmanager
def few_collections() -> Iterator[None]:
    """Look for reference cycles rarely in the block: rows hold none, and the search took a sixth of the time."""
    thresholds = gc.get_threshold()
    gc.set_threshold(*GC_THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)


def start_worker() -> None:
    """Leave Ctrl-C to the command, and end with it."""
    gc.set_threshold(*GC_THRESHOLDS)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """End this process when the command is killed: it would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def parallel_map(
    function: Callable[[Item], Result], items: Iterable[Item], num_proc: int | None = None, name: str = "rows"
) -> Iterator[Result]:
    """Yield function(item) for every item, in order, over num_proc processes (None: as many as there are processors).

    function must be importable, as a partial of one at the top of its file is. Raises UsageError where a process dies.
    """
    items = iter(items)
    first = list(islice(items, FEW))
    items = chain(first, items)
    num_proc = num_proc or count_cores()
    with few_collections(), tqdm(desc=name, unit=" chunks", disable=not sys.stderr.isatty()) as progress:
        if num_proc == 1 or len(first) < FEW:
            results = map(function, items)
        else:
            results = map_over_processes(function, items, num_proc)
        for result in results:
            yield result
            progress.update()


def map_over_processes(function: Callable[[Item], Result], items: Iterator[Item], num_proc: int) -> Iterator[Result]:
    # spawned: a fork would copy the locks that Arrow's threads hold
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(num_proc, context, start_worker)
    pending = deque()
    is_done = False
    try:
        for item in items:
            with interrupts_held():
                pending.append(executor.submit(function, item))
            if len(pending) == 2 * num_proc:  # no more: memory does not grow with the input
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
        is_done = True
    except BrokenProcessPool:
        raise UsageError("a process died, most likely out of memory: pass a smaller --num_proc") from None
    finally:
        # processes that are still ending when Python does print a fault of theirs; those that work are not waited for
        executor.shutdown(wait=is_done, cancel_futures=True)
