"""Hook: a run that goes wrong stops before it does harm, and one that is told to stop saves first.

Before every optimizer step, loss and gradient norm of all ranks are looked at (one small gather, one device sync). It
is over, with step, rank and rows of the batch, and before the weights are touched (DeepSpeed tells a gradient norm only
after its step: there they are lost, the checkpoint is not), if

- a loss is nan or inf; or the gradient norm is (under fp16 the loss scaler deals with that);
- the loss of the step is above 3 times the median of the last 64 steps and above 2 ln V, or for the third step in a row
  above ln V: a uniform guess over V tokens has ln V, and a step of a healthy run averages below it;
- the gradient norm is above 1,000 and above 1,000 times the median of the last 64 steps, of which there are 8.

Ctrl-C and SIGTERM, on any rank: all ranks finish the step, save, verify, say how to go on, and exit with 130 or 143.
The second Ctrl-C quits at once. `accelerate launch` itself ends at once with one process, and the run a little later;
with several it kills them after 30 s: TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300 in its environment gives a large model time.
"""

import contextlib
import copy
import ctypes
import math
import os
import shlex
import signal
import sys
import threading
import time
from collections import deque
from pathlib import Path
from statistics import median

import numpy as np
import torch
from transformers import TrainerCallback

SCRIPT = {}  # what prepare() was given


def tell(text):
    """Writes a line to stderr; os.write, because a signal can come in the middle of a print."""
    with contextlib.suppress(OSError):
        os.write(2, f"{Path(sys.argv[0]).name}: {text}\n".encode())


def prepare(script, args, model):
    SCRIPT.update(script=script)


def command():
    """Returns the line that was typed, launcher included, with --resume_from_checkpoint true."""
    words = sys.orig_argv
    with contextlib.suppress(OSError):
        parent = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode().split("\0")[:-1]
        if sys.argv[0] in parent:  # accelerate launch, torchrun
            words = parent
    if "--resume_from_checkpoint" in words:
        at = words.index("--resume_from_checkpoint")
        words = words[:at] + words[at + 2 :]
    return shlex.join([*words, "--resume_from_checkpoint", "true"])


class Explosion:
    """Keeps the last 64 losses and gradient norms; told(loss, norm) returns what is wrong with the next, or None."""

    def __init__(self, vocabulary):
        self.guess, self.losses, self.norms, self.above = math.log(vocabulary), deque(maxlen=64), deque(maxlen=64), 0

    def told(self, loss, norm):
        high = bool(self.losses) and loss > max(self.guess, 3 * median(self.losses))
        self.above = self.above + 1 if high else 0
        if self.above == 3 or (high and loss > 2 * self.guess):
            return f"the loss is {loss:.4g}, {median(self.losses):.4g} before, {self.guess:.4g} for a uniform guess"
        if len(self.norms) >= 8 and norm > 1000 * max(1, median(self.norms)):
            return f"the gradient norm is {norm:.4g}, {median(self.norms):.4g} before"
        self.losses.append(loss)
        self.norms.append(norm)
        return None


class Stop(TrainerCallback):
    def __init__(self, trainer):
        self.trainer, self.asked, self.when, self.number = trainer, 0, 0.0, 0  # signal here, its time, signal anywhere
        self.again = command()  # now: a launcher dies of the signal before its run has ended
        self.explosion = Explosion(trainer.model.config.get_text_config().vocab_size)
        self.batches, self.losses, self.norm = [], [], 0.0
        self.deepspeed = trainer.is_deepspeed_enabled
        samples, backward, norm = trainer.get_batch_samples, trainer.accelerator.backward, trainer._get_grad_norm

        def get_batch_samples(*args, **kwargs):
            found = samples(*args, **kwargs)
            self.batches, self.losses, self.norm = found[0], [], 0.0
            return found

        def backward_and_keep(loss, **kwargs):
            self.losses.append(loss.detach())
            if self.deepspeed and trainer.accelerator.sync_gradients:  # its backward steps the optimizer
                self.look()
            backward(loss, **kwargs)

        def get_grad_norm(*args, **kwargs):
            self.norm = norm(*args, **kwargs)
            return self.norm

        trainer.get_batch_samples, trainer._get_grad_norm = get_batch_samples, get_grad_norm
        trainer.accelerator.backward = backward_and_keep
        save = trainer._save_checkpoint

        def save_and_stop(model, trial):
            save(model, trial)
            self.gather([])  # a signal during an evaluation or the save counts here
            if self.number:
                self.end()

        trainer._save_checkpoint = save_and_stop

    def gather(self, numbers):
        """Returns the numbers of every rank, and notes whether any rank was told to stop. The one device sync."""
        device = self.trainer.args.device
        mine = [torch.as_tensor(number, device=device, dtype=torch.float32).detach() for number in numbers]
        mine.append(torch.tensor(float(self.asked), device=device))
        every = self.trainer.accelerator.gather(torch.stack(mine)[None]).tolist()
        self.number = int(max(row.pop() for row in every))
        return every

    def look(self):
        norm = self.norm.full_tensor() if hasattr(self.norm, "full_tensor") else self.norm
        every = self.gather([torch.stack(self.losses).float().sum(), 0.0 if norm is None else norm])
        losses, norm = [row[0] for row in every], every[0][1]
        wrong = guilty = None
        if bad := [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]:
            wrong, guilty = f"the loss is {losses[bad[0]]}", bad
        elif not math.isfinite(norm):
            if not self.trainer.args.fp16:
                wrong, guilty = f"the gradient norm is {norm}", range(len(every))
        elif wrong := self.explosion.told(sum(losses) / len(losses), norm):
            guilty = [losses.index(max(losses))]
        if wrong:
            self.refuse(wrong, guilty)

    def on_pre_optimizer_step(self, args, state, control, **_):
        if not self.deepspeed:
            self.look()
        elif self.norm is not None and not math.isfinite(self.norm) and not args.fp16:  # known after its step only
            self.refuse(f"the gradient norm is {self.norm}", range(args.world_size), "after")

    def refuse(self, wrong, guilty, when="before"):
        trainer, rank = self.trainer, self.trainer.args.process_index
        pairs = [*zip(self.batches, self.losses, strict=False)]
        lost = [batch for batch, loss in pairs if not loss.isfinite()]
        if not lost and len(guilty) == 1:  # the highest loss by trained token
            lost = [max(pairs, key=lambda pair: float(pair[1]) / max(1, int((pair[0]["labels"] != -100).sum())))[0]]
        try:
            rows = find_rows(trainer, lost or self.batches)  # on every rank: it has barriers
        except Exception as error:
            rows = f"unknown ({error})"
        if rank in guilty:
            saved = sorted(Path(trainer.args.output_dir).glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
            tell(
                f"step {trainer.state.global_step + 1}, rank {rank}: {wrong}; rows {rows}; stopped {when} the weights "
                f"changed, last checkpoint: {saved[-1] if saved else 'none'}. Look at these rows, or lower "
                "--learning_rate"
            )
        trainer.accelerator.wait_for_everyone()  # a launcher kills the other ranks as soon as one has ended
        sys.exit(1)

    # -- told to stop --------------------------------------------------------------------------------------------------
    def listen(self):
        if threading.current_thread() is not threading.main_thread():
            return
        numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
        self.before = {number: signal.signal(number, self.on_signal) for number in numbers}
        launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
        if launched and sys.platform == "linux":  # the launcher dies of a SIGTERM: PR_SET_PDEATHSIG hands it on
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)

    def on_signal(self, number, frame):
        if not self.asked:
            self.asked, self.when = int(number), time.monotonic()
            if self.trainer.args.local_process_index == 0:
                tell(f"{signal.Signals(number).name}: finishes this step, then saves; Ctrl-C again quits at once")
        elif number == signal.SIGINT and time.monotonic() - self.when > 2:  # launchers send the first one twice
            tell("quits at once, nothing is saved")
            os._exit(130)

    def on_step_end(self, args, state, control, **_):
        if self.number:
            control.should_save = control.should_training_stop = True

    def end(self):
        if self.trainer.is_world_process_zero():
            step = self.trainer.state.global_step
            tell(f"stopped after step {step}, checkpoint-{step} is saved and verified; to go on:\n{self.again}")
        self.trainer.accelerator.wait_for_everyone()
        self.on_train_end()
        sys.exit(128 + self.number)

    def on_train_end(self, *_, **__):
        for number, handler in getattr(self, "before", {}).items():
            signal.signal(number, handler)


# -- which rows --------------------------------------------------------------------------------------------------------
def documents(batch):
    """Returns the token ids of every document of a batch, as bytes."""
    ids = batch["input_ids"].cpu().numpy()
    if "position_ids" in batch:  # packed: a document starts at position 0
        starts = np.flatnonzero(batch["position_ids"][0].cpu().numpy() == 0)
        parts = np.split(ids[0], starts[1:])
    else:
        parts = [line[mask == 1] for line, mask in zip(ids, batch["attention_mask"].cpu().numpy(), strict=True)]
    return [part.astype(np.int64).tobytes() for part in parts]


def find_rows(trainer, batches):
    """Returns the ids (without an id column: the positions from 0) of the training rows in these batches.

    Tokenises the rows once more as TRL did and compares; several ranks must call it together.
    """
    rows = SCRIPT["script"].rows
    args = copy.copy(trainer.args)
    args.assistant_only_loss = False
    compiled, strategy = "input_ids" in rows.column_names, args.packing and args.packing_strategy
    args.max_length = None if strategy in ("bfd_split", "wrapped") else args.max_length
    made = rows.select_columns([name for name in rows.column_names if name != "id"])
    made = made.add_column("_row", [*range(len(rows))])
    if not compiled:
        made = trainer._prepare_dataset(made, trainer.processing_class, args, False, None, "train")
    whole = {document for batch in batches for document in documents(batch)}
    lines = [line.cpu().numpy().astype(np.int64).tobytes() for batch in batches for line in batch["input_ids"]]
    found = []
    for row in made.select_columns(["_row", "input_ids"]).with_format("numpy"):
        ids = row["input_ids"].astype(np.int64)
        if compiled or strategy == "wrapped":  # no documents, or cut anywhere
            here = any(ids.tobytes() in line for line in lines)
        else:
            size = max(1, trainer.args.max_length or len(ids))
            here = any(ids[at : at + size].tobytes() in whole for at in range(0, len(ids), size))
        if here:
            found.append(int(row["_row"]))
    return [rows[at]["id"] if "id" in rows.column_names else at for at in found]


def callback(trainer):
    stop = Stop(trainer)
    stop.listen()
    return stop
