"""Hook: what is trained is the same in any accelerate config: every row once, every token alike, fp32 master weights.

Three things break that, measured with accelerate 1.15, transformers 5.23 and DeepSpeed 0.19.8 against one process.
Where the rows of an epoch do not divide by the processes, accelerate fills its last pass with rows from the start,
which are trained twice (loss of that step 0.17 off; where it is a mean of passes, those that only fill it lower it
to 3/4 and less). Under sequence parallelism the loss of a step is the mean of the
rows' means, so that short answers weigh more (0.42 off). And with bf16, ZeRO and FSDP2 turn whole models into bf16,
also what autocast keeps in fp32: norms, embeddings, the residual stream (7e-2 and 1.4e-2 off; so 1.3e-3 and 1e-3).
"""

import math

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import TrainerCallback
from transformers.integrations import deepspeed as transformers_deepspeed


def prepare(script, args, model):
    """ZeRO builds the model in this precision; frozen bf16 weights of LoRA stay bf16."""
    if args.deepspeed_plugin is not None and args.bf16 and model.dtype == "float32":
        for config in (args.deepspeed_plugin.deepspeed_config, transformers_deepspeed.deepspeed_config()):
            config.pop("bf16", None)


def autocast_only(trainer):
    """bf16 by autocast on fp32 weights, as in one process. Linear weights still travel in bf16 under ZeRO."""
    state = trainer.accelerator.state
    if getattr(state, "fsdp_plugin", None) is not None:
        state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    elif getattr(state, "deepspeed_plugin", None) is not None and trainer.model.dtype == torch.float32:
        config = state.deepspeed_plugin.deepspeed_config
        config.pop("bf16", None)
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}


def mask_repeats(trainer, batches):
    """Takes the labels from rows that only fill the last pass; their gradient is then zero. Returns which share of the
    passes of the step, over all processes, has rows of its own."""
    state, args = trainer.accelerator.gradient_state, trainer.args
    if args.world_size == 1 or not batches or not state.end_of_dataloader or state.remainder <= 0:
        return 1  # one process has a short pass, and fills none
    rows = args.per_device_train_batch_size
    mine = min(max(state.remainder - args.process_index * rows, 0), rows)  # rows of the last pass that are new
    share = 1 - (args.world_size - math.ceil(state.remainder / rows)) / (args.world_size * len(batches))
    if mine == rows:
        return share
    batch = batches[-1]
    if rows > 1 and len(batch["input_ids"]) == 1 and mine:  # packs of one pass lie in one row
        raise ValueError(f"--per_device_train_batch_size {rows}: packing on several processes needs 1")
    for name in ("labels", "shift_labels"):
        if name in batch:
            batch[name] = batch[name].clone()
            batch[name][mine:] = -100
    return share


def weigh_passes(trainer, step):
    """Where the loss of a step is the mean of its passes' means (micro_batch_mean): of those with rows of their own."""
    plain_loss = trainer.compute_loss

    def compute_loss(model, *rest, **kwargs):
        loss = plain_loss(model, *rest, **kwargs)
        return loss / step["share"] if trainer.model.training else loss

    trainer.compute_loss = compute_loss


def weigh_tokens(trainer):
    """Under sequence parallelism: a row's mean loss counts by its share of the tokens of the step."""
    from deepspeed.utils import groups

    size, step = trainer.accelerator.parallelism_config.sp_size, {}
    plain_loss, world = trainer.compute_loss, trainer.args.world_size

    def count(batches, device):
        tokens = sum((batch["shift_labels"] != -100).sum() for batch in batches)
        step["tokens"] = trainer.accelerator.gather(torch.as_tensor(tokens, device=device)).sum()

    def compute_loss(model, inputs, *rest, **kwargs):
        loss = plain_loss(model, inputs, *rest, **kwargs)
        if not trainer.model.training:
            return loss
        tokens = (inputs["shift_labels"] != -100).sum()
        torch.distributed.all_reduce(tokens, group=groups._get_sequence_parallel_group())
        return loss * tokens * trainer.current_gradient_accumulation_steps * (world // size) / step["tokens"].clamp(1)

    trainer._get_num_items_in_batch, trainer.compute_loss = count, compute_loss


class Parity(TrainerCallback):
    """Does nothing: the work is in the trainer's counting of tokens."""


def callback(trainer):
    config = getattr(trainer.accelerator, "parallelism_config", None)
    parallel = config is not None and config.sp_size > 1
    if parallel:
        weigh_tokens(trainer)
    if trainer.args.bf16:
        autocast_only(trainer)
    plain_count, step = trainer._get_num_items_in_batch, {"share": 1}
    if not trainer.model_accepts_loss_kwargs and not parallel:
        weigh_passes(trainer, step)

    def count(batches, device):
        if not parallel:
            step["share"] = mask_repeats(trainer, batches)
        return plain_count(batches, device)

    trainer._get_num_items_in_batch = count
    return Parity()
