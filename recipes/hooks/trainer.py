"""TRL's SFTTrainer; what needs a trainer's inside is a method here, overridden once.

Every private name that is overridden or called stands in private_names.py with its reason.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import trl
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from .checkpoints import RUN, find_fault, seal
from .kl_to_base import KLToBase
from .parity import Parity, use_autocast
from .resume_rules import CARRIED
from .signals import SaveOnSignal
from .start_adapter import StartAdapter
from .step_watch import StepWatch
from .throughput import Throughput

if TYPE_CHECKING:
    from .checks.trained_ends import ContextTurns


class OwnIntervals(TrainerCallback):
    """Has a resume log, evaluate and save as its own settings say: a checkpoint brings those of before."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        state.compute_steps(args, state.max_steps)


class SFTTrainer(trl.SFTTrainer):
    """Trains what TRL's trainer trains, byte for byte on one process; counts, watches and seals.

    `train_rows` and `validation_rows` are the sets as the recipe loaded them, before TRL tokenizes them.
    """

    def __init__(
        self, *args: object, train_dataset: Dataset, eval_dataset: Dataset | None = None, **kwargs: object
    ) -> None:
        self.train_rows = train_dataset
        self.validation_rows = eval_dataset
        super().__init__(*args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        self.parity = Parity(self)
        self.watch = StepWatch(self)
        self.throughput = Throughput(self)
        self.signals = SaveOnSignal(self)
        self.watch.signals = self.signals
        self.kl: KLToBase | None = None  # by --kl_weight
        self.start_adapter: StartAdapter | None = None  # by --adapter
        self.add_callback(self.signals)
        self.add_callback(OwnIntervals)
        self.changed_settings: list[str] = []  # by a resume, as --allow has it
        self.context_turns: ContextTurns | None = None  # check_trained_ends counts them
        self.checkpoint_to_push: str | None = None  # written, not yet sealed
        self.saving_checkpoint = False
        if self.args.bf16:
            use_autocast(self)

    # -- a step: its batches, the tokens in them, the losses, the gradient norm --
    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict], torch.Tensor | int | None]:
        """Fetch the micro-batches of a step, and count what is in them."""
        self.throughput.start_step()
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.throughput.count(batches)
        self.watch.start_step(batches)
        return batches, num_items_in_batch

    def _get_num_items_in_batch(self, batch_samples: list[dict], device: torch.device) -> torch.Tensor | int | None:
        """Count the trained tokens of a step over all processes, without rows that accelerate repeats."""
        if self.parity.sequence_parallel:
            self.parity.count_tokens(batch_samples, device)
            return None
        self.parity.mask_repeated_rows(batch_samples)
        return super()._get_num_items_in_batch(batch_samples, device)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, object]:
        """Compute TRL's loss, with the KL to the base where it is asked for; in training, weigh it and look at it
        before it goes into the backward pass."""
        if self.kl is None or return_outputs:  # outputs are for metrics of logits
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        else:
            with self.kl.watch():
                loss = super().compute_loss(model, inputs, False, num_items_in_batch)
            loss = self.kl.add(loss, inputs["labels"], num_items_in_batch)
        if not self.model.training:
            return loss
        loss = self.parity.weigh(loss, inputs)
        part_of_step = loss
        if num_items_in_batch is None:  # the trainer divides such a loss afterwards
            part_of_step = loss / self.current_gradient_accumulation_steps
        self.watch.add_loss(part_of_step)
        return loss

    def _get_grad_norm(
        self, model: torch.nn.Module, grad_norm: float | torch.Tensor | None = None
    ) -> float | torch.Tensor:
        """Compute the gradient norm, and end the run where it or the loss shows that the step would do harm."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.watch.add_norm(norm)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a step with tokens, speed and memory, on every process at once (as its loss was)."""
        if "loss" in logs and "learning_rate" in logs:
            logs.update(self.throughput.figures())
        if self.kl is not None and ("loss" in logs or "eval_loss" in logs):
            logs.update(self.kl.figures("train" if "loss" in logs else "eval"))
        super().log(logs, start_time)

    # -- epochs --
    def _run_epoch(self, *args: object, **kwargs: object) -> None:
        """Train an epoch; nothing where a finished run is resumed (transformers 5.23 trains one step more)."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    # -- a resume --
    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the state of a checkpoint; give the optimizer the values that `--allow` lets a resume change.

        They stand in the state: transformers goes on with the old learning rate, whatever --learning_rate says
        (transformers#9099).
        """
        own_groups = [dict(group) for group in self.optimizer.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        for setting in self.changed_settings:
            for name in CARRIED.get(setting, ()):
                for group, own_group in zip(self.optimizer.param_groups, own_groups, strict=True):
                    if name in own_group:
                        group[name] = own_group[name]
        if self.changed_settings:
            self.set_scheduled_rates()

    def set_scheduled_rates(self) -> None:
        """Take the rates of this run's schedule at the step where it stands: a checkpoint holds those of its own."""
        scheduler = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)  # accelerate may have wrapped it
        if not isinstance(scheduler, LambdaLR):
            return
        groups = self.optimizer.param_groups
        scheduler.base_lrs = [group["initial_lr"] for group in groups]
        rates = scheduler.get_lr()
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        scheduler.load_state_dict({**scheduler.state_dict(), "_last_lr": rates})  # what is logged

    # -- a checkpoint: written, sealed, then pushed, and only then an older one deleted --
    def _save_checkpoint(self, model: torch.nn.Module, trial: object) -> None:
        """Save a checkpoint, and end the run after it where a signal asked for that."""
        save_total_limit = self.args.save_total_limit
        self.saving_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = save_total_limit
            self.saving_checkpoint = False
        self.seal_checkpoint()
        if self.checkpoint_to_push is not None:
            super()._push_from_checkpoint(self.checkpoint_to_push)
            self.checkpoint_to_push = None
        if self.args.should_save:
            rotate_checkpoints(
                self.args.output_dir,
                save_total_limit=save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.watch.gather([])  # a signal during an evaluation or the save counts here
        self.signals.end_if_asked()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; within a checkpoint, have the trainer delete no older one by itself.

        The limit is taken away once the model and training_args.bin, which holds it, are written.
        """
        super().save_model(output_dir, _internal_call)
        if self.saving_checkpoint:
            self.args.save_total_limit = None

    def seal_checkpoint(self) -> None:
        """Write the checksums once every rank has written its files; the last one of a run is read back.

        Raises OSError where it does not read back as it was written.
        """
        folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        self.accelerator.wait_for_everyone()
        if not self.is_world_process_zero():
            return
        run = Path(self.args.output_dir, RUN)
        if run.is_file():  # what a resume is compared with
            shutil.copy(run, folder / RUN)
        seal(folder)
        if self.control.should_training_stop:
            fault = find_fault(folder)
            if fault is not None:
                raise OSError(f"{folder} does not read back as it was written: {fault}")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a checkpoint; one that is being saved, once it is sealed."""
        if self.saving_checkpoint:
            self.checkpoint_to_push = checkpoint_folder
        else:
            super()._push_from_checkpoint(checkpoint_folder)
