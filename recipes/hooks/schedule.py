"""How many steps a run has, and what another number of them does to the learning rate."""

import json
import math
from pathlib import Path

import torch
from accelerate import ParallelismConfig
from datasets import Dataset
from transformers import get_scheduler
from trl import SFTConfig

from .trainer import SFTTrainer


def count_steps(trainer: SFTTrainer) -> int:
    """Return the number of optimizer steps of the whole run, as the trainer counts them."""
    args = trainer.args
    if args.max_steps > 0 or not isinstance(trainer.train_dataset, Dataset):
        return args.max_steps
    rows = len(trainer.train_dataset)
    processes = args.world_size // ParallelismConfig().non_data_parallel_size
    batches = math.ceil(rows / args.per_device_train_batch_size)
    if args.dataloader_drop_last:
        batches = rows // args.per_device_train_batch_size
    batches_of_a_process = math.ceil(batches / processes)
    steps = max(math.ceil(batches_of_a_process / args.gradient_accumulation_steps), 1)
    return math.ceil(args.num_train_epochs * steps)


def share_of_peak(training_args: SFTConfig, step: int, steps: int) -> float | None:
    """Return the schedule's factor after a step, None where it does not depend on the step alone."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(
        training_args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=training_args.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=training_args.lr_scheduler_kwargs,
    )
    if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        return None
    return scheduler.lr_lambdas[0](step)


def share_of_peak_of(checkpoint: Path) -> float | None:
    """Return the same factor of a checkpoint's schedule, None where it does not say."""
    path = checkpoint / "scheduler.pt"
    if not path.is_file():
        return None
    state = torch.load(path, weights_only=True)
    peaks = state.get("base_lrs")
    return state["_last_lr"][0] / peaks[0] if peaks and peaks[0] else None


def describe_schedule(trainer: SFTTrainer, checkpoint: str, steps: int) -> str:
    """Return what the schedule does from a checkpoint on, now that the run has another number of steps."""
    args = trainer.args
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
    step = state["global_step"]
    if steps <= step:
        return f"the checkpoint stands at step {step:,}: nothing is left to train"
    before = share_of_peak_of(Path(checkpoint))
    now = share_of_peak(args, step, steps)
    text = f"the {args.lr_scheduler_type.value} schedule now ends at step {steps:,}"
    if before is None or now is None:
        return text
    if math.isclose(before, now, rel_tol=1e-6):
        return f"{text}; at step {step:,} the rate stays at {now:.0%} of its peak"
    return f"{text}, so at step {step:,} the rate jumps from {before:.0%} to {now:.0%} of its peak"
