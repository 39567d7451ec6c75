"""Hook: with several processes, one that dies, hangs or is cut off ends the others within a minute.

From the first step, a thread of every rank writes a number to the launcher's store (MASTER_ADDR:MASTER_PORT, over its
own connection) every 2 s and reads those of the others; one that has not changed for 20 s is lost. Threads go on while
the main thread saves, evaluates, compiles or waits in a collective, so none of these counts as silence. What hangs in
the main thread alone is ended by the collectives' own time limit (--ddp_timeout). SFT_HEARTBEAT_S sets the 20 s.
torchrun kills a frozen rank 30 s later.
"""

import contextlib
import itertools
import os
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore
from transformers import TrainerCallback

LIMIT = float(os.environ.get("SFT_HEARTBEAT_S", 20))
DONE = b"done"


class Heartbeat(TrainerCallback):
    def __init__(self, rank, world):
        self.rank, self.others = rank, [other for other in range(world) if other != rank]
        self.key = f"sft-heartbeat-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}-"
        self.heard, self.seen, self.finished, self.started = {}, {}, threading.Event(), []

    def on_step_begin(self, args, state, control, **_):
        if self.others and not self.started:
            self.started = [threading.Thread(target=work, daemon=True) for work in (self.beat, self.watch)]
            [thread.start() for thread in self.started]

    def connect(self):
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=LIMIT))

    def alive(self):
        return not self.finished.is_set() and threading.main_thread().is_alive()  # it is not while Python exits

    def beat(self):
        """Writes and reads. May hang in the store for good where the link is cut: watch() needs no store."""
        store = None
        for count in itertools.count():
            with contextlib.suppress(Exception):  # the store is gone, or slow: watch() says so if that lasts
                store = store or self.connect()
                store.set(f"{self.key}{self.rank}", str(count))
                new = [other for other in self.others if other not in self.seen]
                ready = [other for other in new if store.check([f"{self.key}{other}"])]  # from its first step
                ready += [other for other in self.others if other in self.seen]
                values = store.multi_get([f"{self.key}{other}" for other in ready]) if ready else []
                for other, value in zip(ready, values, strict=True):
                    if value != self.seen.get(other):
                        self.heard[other] = time.monotonic()
                        self.seen[other] = value
            self.finished.wait(min(2, LIMIT / 5))
            if not self.alive():
                return

    def watch(self):
        woke = time.monotonic()
        while self.alive():
            time.sleep(min(1, LIMIT / 10))
            now = time.monotonic()
            if now - woke > LIMIT / 3:  # it is this process that stood still: everybody gets a new start
                self.heard = dict.fromkeys(self.heard, now)
            woke = now
            running = [other for other in self.others if self.seen.get(other) not in (None, DONE)]
            lost = [other for other in running if now - self.heard[other] > LIMIT]
            if lost and self.alive():
                self.end(lost)

    def end(self, lost):
        who = "the other ranks" if len(lost) == len(self.others) > 1 else "rank " + ", ".join(map(str, lost))
        print(
            f"{Path(sys.argv[0]).name}: rank {self.rank} ends: nothing heard of {who} for {LIMIT:.0f} s (dead, hung or "
            "cut off); the same command with --resume_from_checkpoint true goes on from the newest whole checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    def done(self):
        """This rank needs the others no more, and they are not to wait for it."""
        if self.started:
            self.finished.set()
            self.started[0].join(1)  # it writes no more; or it hangs in the store, and its connection with it
            with contextlib.suppress(Exception):  # no store: nobody is left who could ask
                self.connect().set(f"{self.key}{self.rank}", DONE)


BEATS = []


def callback(trainer):
    BEATS.append(Heartbeat(trainer.args.process_index, trainer.args.world_size))
    return BEATS[-1]


def after(trainer):
    for beat in BEATS:
        beat.done()
