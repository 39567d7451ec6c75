"""A run that goes wrong stops before it does harm.

Before every optimizer step, loss and gradient norm of all ranks are looked at (one small gather, one device sync). It
is over, with step, rank and rows of the batch, and before the weights are touched (DeepSpeed gives a gradient norm only
after its step: there they are lost, the checkpoint is not), if

- a loss is nan or inf; or the gradient norm is (under fp16 the loss scaler deals with that);
- the loss of the step is above 3 times the median of the last 64 steps and above 2 ln V, or for the third step in a row
  above ln V: a uniform guess over V tokens has ln V, and a step of a healthy run averages below it;
- the gradient norm is above 1,000 and above 1,000 times the median of the last 64 steps, of which there are 8.
"""

import math
import sys
from collections import deque
from collections.abc import Sequence
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


class Explosion:
    """Remembers losses and gradient norms, and tells what is wrong with the next ones."""

    def __init__(self, vocabulary_size: int) -> None:
        self.uniform_guess = math.log(vocabulary_size)
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.norms: deque[float] = deque(maxlen=WINDOW)
        self.high_steps = 0  # in a row

    def check(self, loss: float, norm: float) -> str | None:
        """Return what is wrong with a step, or None; healthy steps are remembered."""
        high = bool(self.losses) and loss > max(self.uniform_guess, 3 * median(self.losses))
        if high:
            self.high_steps += 1
        else:
            self.high_steps = 0
        if self.high_steps == 3 or (high and loss > 2 * self.uniform_guess):
            before = median(self.losses)
            return f"the loss is {loss:.4g}, {before:.4g} before, {self.uniform_guess:.4g} for a uniform guess"
        if len(self.norms) >= FEWEST_NORMS and norm > 1000 * max(1, median(self.norms)):
            return f"the gradient norm is {norm:.4g}, {median(self.norms):.4g} before"
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
            self.end(f"the gradient norm is {norm}", range(self.trainer.args.world_size), "after")

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
            self.end(f"the loss is {losses[bad_ranks[0]]}", bad_ranks)
        if not math.isfinite(norm):
            if not self.trainer.args.fp16:
                self.end(f"the gradient norm is {norm}", range(len(rows)))
            return
        fault = self.explosion.check(sum(losses) / len(losses), norm)
        if fault:
            self.end(fault, [losses.index(max(losses))])

    def suspects(self, guilty_ranks: Sequence[int]) -> list[dict]:
        """Return the batches to look at: those without a finite loss, else the worst of a single guilty rank."""
        pairs = list(zip(self.batches, self.losses, strict=False))
        infinite = [batch for batch, loss in pairs if not loss.isfinite()]
        if infinite:
            return infinite
        if len(guilty_ranks) > 1 or not pairs:
            return self.batches

        def loss_by_token(pair: tuple[dict, torch.Tensor]) -> float:
            batch, loss = pair
            return float(loss) / max(1, int((batch["labels"] != -100).sum()))

        return [max(pairs, key=loss_by_token)[0]]

    def end(self, fault: str, guilty_ranks: Sequence[int], moment: str = "before") -> NoReturn:
        """End the run on all ranks; the guilty ones say step, rank and rows."""
        trainer = self.trainer
        try:
            rows = find_rows(trainer, self.suspects(guilty_ranks))  # on every rank: it has barriers
        except Exception as error:  # the fault itself is to be told in any case
            rows = f"unknown ({error})"
        rank = trainer.args.process_index
        if rank in guilty_ranks:
            saved = sorted(Path(trainer.args.output_dir).glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
            checkpoint = saved[-1] if saved else "none"
            write_stderr(
                f"{recipe_name()}: step {trainer.state.global_step + 1}, rank {rank}: {fault}; rows {rows}; stopped "
                f"{moment} the weights changed, last checkpoint: {checkpoint}. Look at these rows, or lower "
                "--learning_rate"
            )
        trainer.accelerator.wait_for_everyone()  # a launcher kills the other ranks as soon as one has ended
        sys.exit(1)
