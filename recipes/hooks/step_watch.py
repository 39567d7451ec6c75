"""A run that goes wrong stops before it does harm.

Before every optimizer step, loss and gradient norm of all ranks are looked at (one small gather, one device sync). It
is over, with step, rank and rows of the batch, and before the weights are touched (DeepSpeed gives a gradient norm only
after its step: there they are lost, the checkpoint is not), if

- a loss is nan or inf; or the gradient norm is (under fp16 the loss scaler deals with that);
- the loss of the step is above 3 times the median of the last 64 steps and above 2 ln V, or for the third step in a row
  above ln V: a uniform guess over V tokens has ln V, and a step of a healthy run averages below it;
- the gradient norm is above 1,000 and above 1,000 times the median of the last 64 steps, of which there are 8.

A loss is that of a micro-batch, whose rows are named. The gradient norm is that of the whole step: its rows are named
where it had one micro-batch, and nobody is accused where there were more.
"""

import math
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NoReturn

import torch
from transformers import Trainer

from .messages import recipe_name
from .row_search import find_rows
from .signals import SaveOnSignal, write_stderr

WINDOW = 64  # steps that are remembered
FEWEST_NORMS = 8  # gradient norms before one of them can be called an explosion


@dataclass(frozen=True)
class Fault:
    """What is wrong with a step."""

    text: str
    in_loss: bool  # else in the gradient norm


class Explosion:
    """Remembers losses and gradient norms, and tells what is wrong with the next ones."""

    def __init__(self, vocabulary_size: int) -> None:
        self.uniform_guess = math.log(vocabulary_size)
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.norms: deque[float] = deque(maxlen=WINDOW)
        self.high_steps = 0  # in a row

    def check(self, loss: float, norm: float) -> Fault | None:
        """Return what is wrong with a step, or None; healthy steps are remembered."""
        high = bool(self.losses) and loss > max(self.uniform_guess, 3 * median(self.losses))
        if high:
            self.high_steps += 1
        else:
            self.high_steps = 0
        if self.high_steps == 3 or (high and loss > 2 * self.uniform_guess):
            before = median(self.losses)
            text = f"the loss is {loss:.4g}, {before:.4g} before, {self.uniform_guess:.4g} for a uniform guess"
            return Fault(text, in_loss=True)
        if len(self.norms) >= FEWEST_NORMS and norm > 1000 * max(1, median(self.norms)):
            text = f"the gradient norm is {norm:.4g}, {median(self.norms):.4g} before"
            return Fault(text, in_loss=False)
        self.losses.append(loss)
        self.norms.append(norm)
        return None


class StepWatch:
    """Looks at every step before the weights change. The trainer hands it batches, losses and gradient norm."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.explosion = Explosion(trainer.model.config.get_text_config().vocab_size)
        self.signals: SaveOnSignal | None = None  # what any rank was told is gathered with the losses
        self.batches: list[dict] = []
        self.losses: list[torch.Tensor] = []  # of the micro-batches of this step
        self.norm: float | torch.Tensor = 0.0

    def start_step(self, batches: list[dict]) -> None:
        self.batches = batches
        self.losses = []
        self.norm = 0.0

    def add_loss(self, loss: torch.Tensor) -> None:
        """Take the loss of a micro-batch as it goes into the backward pass, which under DeepSpeed steps the weights."""
        self.losses.append(loss.detach().mean())  # under DataParallel there is one for each GPU
        if self.trainer.is_deepspeed_enabled and self.trainer.accelerator.sync_gradients:
            self.check()

    def add_norm(self, norm: float | torch.Tensor | None) -> None:
        """Take the gradient norm: before the weights change, but for DeepSpeed, where they have changed."""
        self.norm = norm
        if not self.trainer.is_deepspeed_enabled:
            self.check()
        elif norm is not None and not math.isfinite(norm) and not self.trainer.args.fp16:
            self.end_by_norm(f"the gradient norm is {norm}", "after")

    def gather(self, numbers: list[float | torch.Tensor]) -> list[list[float]]:
        """Return the numbers of every rank, and pass on whether any rank was told to stop. The one device sync."""
        device = self.trainer.args.device
        own = [torch.as_tensor(number, device=device, dtype=torch.float32).detach() for number in numbers]
        asked = self.signals.asked if self.signals else 0
        own.append(torch.tensor(float(asked), device=device))
        rows = self.trainer.accelerator.gather(torch.stack(own)[None]).tolist()
        asked_anywhere = int(max(row.pop() for row in rows))
        if self.signals:
            self.signals.asked_anywhere = asked_anywhere
        return rows

    def check(self) -> None:
        norm = self.norm
        if norm is None:
            norm = 0.0
        elif hasattr(norm, "full_tensor"):
            norm = norm.full_tensor()
        rows = self.gather([torch.stack(self.losses).float().sum(), norm])
        losses = [row[0] for row in rows]
        norm = rows[0][1]
        bad_ranks = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
        if bad_ranks:
            self.end_by_loss(f"the loss is {losses[bad_ranks[0]]}", bad_ranks)
        if not math.isfinite(norm):
            if not self.trainer.args.fp16:
                self.end_by_norm(f"the gradient norm is {norm}")
            return
        fault = self.explosion.check(sum(losses) / len(losses), norm)
        if fault is None:
            return
        if fault.in_loss:
            self.end_by_loss(fault.text, [losses.index(max(losses))])
        else:
            self.end_by_norm(fault.text)

    # -- the end of a run --
    def end_by_loss(self, fault: str, guilty_ranks: Sequence[int]) -> NoReturn:
        """End the run on all ranks; each guilty one names the rows of its worst micro-batches."""
        infinite = [batch for batch, loss in self.micro_batches() if not loss.isfinite()]
        if infinite:
            rows = f"rows {self.name_rows(infinite)}"
        else:
            rows = f"the highest loss of this rank is that of rows {self.name_rows([self.worst_batch()])}"
        rank = self.trainer.args.process_index
        self.end(f"step {self.step_number()}, rank {rank}: {fault}; {rows}", rank in guilty_ranks, True, "before")

    def end_by_norm(self, fault: str, moment: str = "before") -> NoReturn:
        """End the run on all ranks; rank 0 speaks, and names rows where the step had one micro-batch in all."""
        micro_batches = len(self.batches)
        ranks = self.trainer.args.world_size
        rows_are_known = micro_batches == 1 and ranks == 1
        if rows_are_known:
            rows = f"rows {self.name_rows(self.batches)}"
        else:
            rows = f"which rows is not known (ranks: {ranks}, micro-batches of each: {micro_batches})"
        speaks = self.trainer.args.process_index == 0
        self.end(f"step {self.step_number()}: {fault}; {rows}", speaks, rows_are_known, moment)

    def step_number(self) -> int:
        return self.trainer.state.global_step + 1

    def micro_batches(self) -> list[tuple[dict, torch.Tensor]]:
        return list(zip(self.batches, self.losses, strict=False))

    def worst_batch(self) -> dict:
        """Return the micro-batch with the highest mean loss."""
        by_tokens = self.trainer.model_accepts_loss_kwargs or self.trainer.parity.sequence_parallel

        def mean_loss(micro_batch: tuple[dict, torch.Tensor]) -> float:
            batch, loss = micro_batch
            if not by_tokens:  # a mean already
                return float(loss)
            return float(loss) / max(1, int((batch["labels"] != -100).sum()))

        batch, _ = max(self.micro_batches(), key=mean_loss)
        return batch

    def name_rows(self, batches: list[dict]) -> str:
        """Return the rows of these micro-batches in words; all ranks must call it together: it has barriers."""
        try:
            return str(find_rows(self.trainer, batches))
        except Exception as error:  # the fault itself is to be told in any case
            return f"unknown ({error})"

    def end(self, fault: str, speaks: bool, rows_are_known: bool, moment: str) -> NoReturn:
        """End the run on all ranks, with what to do from those that speak.

        `moment`: "before" or "after" the weights changed.
        """
        if speaks:
            folders = Path(self.trainer.args.output_dir).glob("checkpoint-*")
            checkpoints = sorted(folders, key=lambda path: path.stat().st_mtime)
            checkpoint = checkpoints[-1] if checkpoints else None
            write_stderr(
                f"{recipe_name()}: {fault}; stopped {moment} the weights changed, last checkpoint: "
                f"{checkpoint or 'none'}. {advise(rows_are_known, checkpoint is not None)}"
            )
        self.trainer.accelerator.wait_for_everyone()  # a launcher kills the other ranks as soon as one has ended
        sys.exit(1)


def advise(rows_are_known: bool, has_checkpoint: bool) -> str:
    """Return what to do after a step that would do harm."""
    go_on = "lower --learning_rate in another --output_dir"
    if has_checkpoint:
        go_on = (
            "go on from the checkpoint with --resume_from_checkpoint true --learning_rate LOWER --allow learning_rate"
        )
    if rows_are_known:
        return f"Look at these rows (a set without them is another run: another --output_dir), or {go_on}"
    return go_on[0].upper() + go_on[1:]
