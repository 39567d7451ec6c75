"""A run that is told to stop saves first.

Ctrl-C and SIGTERM, on any rank: all ranks finish the step, save, verify, say how to go on, and exit with 130 or 143.
The second Ctrl-C quits at once. `accelerate launch` with one process ends at once and gives the prompt back, while the
run saves: it says under which process id, by which it can still be reached, and run_lock.py has a second run in the
folder wait for it. With several processes it kills them after 30 s: TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300 in its
environment gives a large model time.

transformers' own `enable_jit_checkpoint` takes SIGTERM alone and waits 3 s; it saves on the rank that got the signal,
while the others go on and wait for it in a collective, and the run then exits with 0, so that a restart loop or Slurm
takes it for finished.
"""

import contextlib
import ctypes
import os
import shlex
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .messages import recipe_name, say
from .run_lock import note_stopping

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def write_stderr(line: str) -> None:
    """Write a line; by os.write, because a signal can come in the middle of a print."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())


def is_launched() -> bool:
    """Return whether `accelerate launch` or torchrun started this process."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


def command_to_go_on() -> str:
    """Return the line that was typed, launcher included, with --resume_from_checkpoint true."""
    words = sys.orig_argv
    with contextlib.suppress(OSError):
        parent = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode().split("\0")[:-1]
        if sys.argv[0] in parent:  # accelerate launch, torchrun
            words = parent
    if "--resume_from_checkpoint" in words:
        place = words.index("--resume_from_checkpoint")
        words = words[:place] + words[place + 2 :]
    return shlex.join([*words, "--resume_from_checkpoint", "true"])


class SaveOnSignal(TrainerCallback):
    """Has all ranks save after the step in which any of them got a signal."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.asked = 0  # number of the signal that this rank got
        self.asked_at = 0.0
        self.asked_anywhere = 0  # number of the signal that any rank got, gathered by StepWatch
        self.launcher = os.getppid()
        self.command = command_to_go_on()  # now: a launcher dies of the signal before its run has ended
        self.previous_handlers: dict[int, object] = {}

    def listen(self) -> None:
        """Take over SIGINT and SIGTERM, unless they are ignored: a shell does that for what runs in the background."""
        if threading.current_thread() is not threading.main_thread():
            say("runs in a thread, where Python takes no signals: no signal saves it, a restart takes a checkpoint")
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                self.previous_handlers[number] = signal.signal(number, self.on_signal)
        if is_launched() and sys.platform == "linux":  # the launcher dies of a SIGTERM: this hands it on
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.asked:
            self.asked = int(number)
            self.asked_at = time.monotonic()
            note_stopping(self.trainer.args.output_dir)
            if self.trainer.args.local_process_index == 0:
                again = "Ctrl-C again" if number == signal.SIGINT else f"kill -INT {os.getpid()}"
                write_stderr(
                    f"{recipe_name()}: {signal.Signals(number).name}: process {os.getpid()} finishes this step, then "
                    f"saves; {again} quits at once"
                )
        elif number == signal.SIGINT and time.monotonic() - self.asked_at > 2:  # launchers send the first one twice
            write_stderr(f"{recipe_name()}: quits at once, nothing is saved")
            os._exit(130)
        elif number == signal.SIGTERM and os.getppid() != self.launcher and self.trainer.args.world_size == 1:
            write_stderr(
                f"{recipe_name()}: the launcher has ended, process {os.getpid()} goes on in the background until it "
                f"has saved: kill -INT {os.getpid()} quits at once"
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self.asked_anywhere:
            note_stopping(args.output_dir)
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.restore()

    def restore(self) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)

    def end_if_asked(self) -> None:
        """End the run after a checkpoint, where any rank was told to stop."""
        if not self.asked_anywhere:
            return
        if self.trainer.is_world_process_zero():
            step = self.trainer.state.global_step
            write_stderr(
                f"{recipe_name()}: stopped after step {step}, checkpoint-{step} is saved and verified; to go on:\n"
                f"{self.command}"
            )
        self.trainer.accelerator.wait_for_everyone()
        self.restore()
        sys.exit(128 + self.asked_anywhere)
