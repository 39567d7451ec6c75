"""What is trained is the same in any accelerate config: every row once, every token alike, fp32 master weights.

Three things break that, measured with accelerate 1.15, transformers 5.23 and DeepSpeed 0.19.8 against one process.
Where the rows of an epoch do not divide by the processes, accelerate fills its last micro-batches with rows from the
start, which are trained twice (loss of that step 0.17 off; where it is a mean of micro-batches, those that only fill
lower it to 3/4 and less). Under sequence parallelism the loss of a step is the mean of the rows' means, so that short
answers weigh more (0.42 off). And with bf16, ZeRO and FSDP2 turn whole models into bf16, also what autocast keeps in
fp32: norms, embeddings, the residual stream (7e-2 and 1.4e-2 off; so 1.3e-3 and 1e-3).
"""

import math

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Trainer
from transformers.integrations import deepspeed as transformers_deepspeed
from trl import ModelConfig, SFTConfig


def keep_fp32_under_zero(training_args: SFTConfig, model_args: ModelConfig) -> None:
    """Have ZeRO build an fp32 model in fp32; call it before the model is loaded. Frozen bf16 weights stay bf16."""
    if training_args.deepspeed_plugin is None or not training_args.bf16 or model_args.dtype != "float32":
        return
    training_args.deepspeed_plugin.deepspeed_config.pop("bf16", None)
    transformers_deepspeed.deepspeed_config().pop("bf16", None)


def use_autocast(trainer: Trainer) -> None:
    """Compute in bf16 by autocast on fp32 weights, as in one process. ZeRO still sends linear weights in bf16."""
    state = trainer.accelerator.state
    if getattr(state, "fsdp_plugin", None) is not None:
        state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    elif getattr(state, "deepspeed_plugin", None) is not None and trainer.model.dtype == torch.float32:
        config = state.deepspeed_plugin.deepspeed_config
        config.pop("bf16", None)
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}


class Parity:
    """Keeps rows that only fill the last micro-batches out of the loss, and weighs tokens and micro-batches alike."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        config = getattr(trainer.accelerator, "parallelism_config", None)
        self.sequence_parallel = config is not None and config.sp_size > 1
        self.sequence_parallel_size = config.sp_size if self.sequence_parallel else 1
        self.tokens_in_step: torch.Tensor | None = None  # trained tokens of the step, over all processes
        self.own_share = 1.0  # share of the step's micro-batches, over all processes, that have rows of their own

    def count_tokens(self, batches: list[dict], device: torch.device) -> None:
        """Count the trained tokens of a step under sequence parallelism."""
        tokens = sum((batch["shift_labels"] != -100).sum() for batch in batches)
        self.tokens_in_step = self.trainer.accelerator.gather(torch.as_tensor(tokens, device=device)).sum()

    def mask_repeated_rows(self, batches: list[dict]) -> None:
        """Take the labels from rows that only fill the last micro-batch: their gradient is then zero.

        Raises ValueError where packs of one micro-batch lie in one row, which cannot be told apart.
        """
        args = self.trainer.args
        state = self.trainer.accelerator.gradient_state
        self.own_share = 1.0
        if args.world_size == 1 or not batches or not state.end_of_dataloader or state.remainder <= 0:
            return  # one process has a short last micro-batch, and fills none
        size = args.per_device_train_batch_size
        filling = args.world_size - math.ceil(state.remainder / size)  # processes whose last micro-batch only fills
        self.own_share = 1 - filling / (args.world_size * len(batches))
        own_rows = min(max(state.remainder - args.process_index * size, 0), size)  # of the last micro-batch
        if own_rows == size:
            return
        batch = batches[-1]
        if size > 1 and len(batch["input_ids"]) == 1 and own_rows:
            raise ValueError(f"--per_device_train_batch_size {size}: packing on several processes needs 1")
        for name in ("labels", "shift_labels"):
            if name in batch:
                batch[name] = batch[name].clone()
                batch[name][own_rows:] = -100

    def weigh(self, loss: torch.Tensor, inputs: dict) -> torch.Tensor:
        """Return the loss of a micro-batch with its right weight in the step."""
        if self.sequence_parallel:
            return self.weigh_by_tokens(loss, inputs)
        if not self.trainer.model_accepts_loss_kwargs:  # the step's loss is the mean of its micro-batches' means
            return loss / self.own_share
        return loss

    def weigh_by_tokens(self, loss: torch.Tensor, inputs: dict) -> torch.Tensor:
        """Return a row's mean loss by its share of the step's tokens: under sequence parallelism."""
        from deepspeed.utils import groups

        trainer = self.trainer
        tokens = (inputs["shift_labels"] != -100).sum()
        torch.distributed.all_reduce(tokens, group=groups._get_sequence_parallel_group())
        rows_at_a_time = trainer.args.world_size // self.sequence_parallel_size
        weight = trainer.current_gradient_accumulation_steps * rows_at_a_time / self.tokens_in_step.clamp(1)
        return loss * tokens * weight
