"""End the other processes within a minute when one dies, hangs or is cut off.

From the first step, a thread of every rank writes a number to the launcher's store (MASTER_ADDR:MASTER_PORT, over its
own connection) every 2 s and reads those of the others; one that has not changed for 20 s is lost. Threads go on while
the main thread saves, evaluates, compiles or waits in a collective, so none of these counts as silence. What hangs in
the main thread alone is ended by the collectives' own time limit (--ddp_timeout). SFT_HEARTBEAT_S sets the 20 s.
torchrun kills a frozen rank 30 s later.
"""

import os
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta

from torch.distributed import TCPStore
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .messages import recipe_name

SILENCE_LIMIT = float(os.environ.get("SFT_HEARTBEAT_S", 20))  # seconds
WRITE_EVERY = min(2, SILENCE_LIMIT / 5)
CHECK_EVERY = min(1, SILENCE_LIMIT / 10)
STOOD_STILL = SILENCE_LIMIT / 3  # this process was frozen if a check comes so late
DONE = b"done"


def connect() -> TCPStore:
    """Open a connection of this process to the launcher's store."""
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=SILENCE_LIMIT),
    )


class Heartbeat(TrainerCallback):
    """Write the beat of this rank and watch those of the others, each in a thread; nothing with one process."""

    def __init__(self, trainer: Trainer) -> None:
        self.rank = trainer.args.process_index
        self.other_ranks = [rank for rank in range(trainer.args.world_size) if rank != self.rank]
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        self.prefix = f"sft-heartbeat-{restart}-"
        self.store: TCPStore | None = None
        self.values: dict[int, bytes] = {}  # the newest beat of each rank
        self.times: dict[int, float] = {}  # when it came
        self.finished = threading.Event()
        self.writer: threading.Thread | None = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if not self.other_ranks or self.writer:
            return
        self.writer = threading.Thread(target=self.write_and_read, daemon=True)
        self.writer.start()
        watcher = threading.Thread(target=self.watch, daemon=True)
        watcher.start()

    def key(self, rank: int) -> str:
        return f"{self.prefix}{rank}"

    def is_alive(self) -> bool:
        return not self.finished.is_set() and threading.main_thread().is_alive()  # it is not while Python exits

    def write_and_read(self) -> None:
        """Write and read until the run ends. May hang in the store for good where the link is cut: watch() does not."""
        count = 0
        while self.is_alive():
            with suppress(Exception):  # the store is gone, or slow: watch() says so if that lasts
                if self.store is None:
                    self.store = connect()
                self.store.set(self.key(self.rank), str(count))
                self.read_beats(self.store)
            count += 1
            self.finished.wait(WRITE_EVERY)

    def read_beats(self, store: TCPStore) -> None:
        """Note the time of every beat that has changed; a rank counts from its own first step."""
        ready = []
        for rank in self.other_ranks:
            if rank in self.values or store.check([self.key(rank)]):
                ready.append(rank)
        if not ready:
            return
        beats = store.multi_get([self.key(rank) for rank in ready])
        for rank, value in zip(ready, beats, strict=True):
            if value != self.values.get(rank):
                self.times[rank] = time.monotonic()  # before the value, which watch() looks for
                self.values[rank] = value

    def watch(self) -> None:
        """End this process when a rank is lost."""
        last_check = time.monotonic()
        while self.is_alive():
            time.sleep(CHECK_EVERY)
            now = time.monotonic()
            if now - last_check > STOOD_STILL:  # the silence may be this process's own: all ranks start anew
                for rank in self.other_ranks:
                    self.times[rank] = now
            last_check = now
            lost = self.lost_ranks(now)
            if lost and self.is_alive():
                self.end_process(lost)

    def lost_ranks(self, now: float) -> list[int]:
        """Return the ranks that have begun, are not done, and were silent for too long."""
        lost = []
        for rank in self.other_ranks:
            is_running = rank in self.values and self.values[rank] != DONE
            if is_running and now - self.times[rank] > SILENCE_LIMIT:
                lost.append(rank)
        return lost

    def end_process(self, lost: list[int]) -> None:
        names = "rank " + ", ".join(str(rank) for rank in lost)
        if len(lost) > 1 and lost == self.other_ranks:
            names = "the other ranks"
        message = (
            f"rank {self.rank} ends: nothing heard of {names} for {SILENCE_LIMIT:.0f} s (dead, hung or cut off); the "
            "same command with --resume_from_checkpoint true goes on from the newest whole checkpoint"
        )
        print(f"{recipe_name()}: {message}", file=sys.stderr, flush=True)
        os._exit(1)  # the main thread may hang in a collective

    def done(self) -> None:
        """Say that this rank needs the others no more, and that they are not to wait for it."""
        if self.writer is None:
            return
        self.finished.set()
        self.writer.join(1)  # it writes no more; or it hangs in the store, and its connection with it
        with suppress(Exception):  # no store: nobody is left who could ask
            connect().set(self.key(self.rank), DONE)
