"""Say what a run is when it starts: a block of lines, read off the objects that train, not off the configuration.

engine.txt in the run folder keeps what trained.
"""

import os
from pathlib import Path

import torch
from datasets import Dataset
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainerState
from trl import ModelConfig, ScriptArguments, SFTConfig

from .checks.attention import describe_alternative
from .messages import relative_path
from .throughput import DatasetSize, count_parameters, numel
from .trainer import SFTTrainer

AUTOCAST = {"bf16": "bfloat16", "fp16": "float16", "fp8": "fp8", "no": "off"}  # of accelerate's mixed_precision


def amount(number: float) -> str:
    """Return a number as one reads it: 1234 -> '1,234', 12345 -> '12.3K', 4.02e9 -> '4.02B'."""
    if number < 10_000:
        return f"{number:,.0f}"
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number / 1e3:.3g}K"


def describe_device(device: torch.device) -> str:
    if device.type != "cuda":
        return "the CPU"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} ({properties.total_memory / 2**30:.1f} GiB)"


def is_offloaded(engine: torch.nn.Module, part: str) -> bool:
    """Return whether a DeepSpeed engine keeps its "optimizer" or "param" on the CPU or on a disk."""
    read_config = getattr(engine, f"zero_offload_{part}", None)
    config = read_config() if read_config else None
    if not config:
        return False
    device = str(getattr(config, "device", "none"))
    return device.split(".")[-1] != "none"


def describe_deepspeed(engine: torch.nn.Module) -> str:
    """Return a DeepSpeed engine's stage, what it shards and what it offloads."""
    stage = engine.zero_optimization_stage()
    text = f"DeepSpeed ZeRO-{stage}"
    if stage == 3:
        is_sharded = [not weight.ds_persist for weight in engine.parameters()]  # small ones stay whole on each rank
        text += f" ({sum(is_sharded)} of {len(is_sharded)} weights sharded)"
    offloaded = [part for part in ("optimizer", "param") if is_offloaded(engine, part)]
    if offloaded:
        text += f", offloads {' and '.join(offloaded)}"
    return text


def describe_wrapper(trainer: SFTTrainer) -> str:
    """Return what wraps the model, and over how many ranks a row or a layer is split."""
    wrapped = trainer.model_wrapped
    name = type(wrapped).__name__
    weights = list(wrapped.parameters())
    sharded = [weight for weight in weights if isinstance(weight, DTensor)]
    if name == "DeepSpeedEngine":
        text = describe_deepspeed(wrapped)
    elif sharded:
        text = f"FSDP2 ({len(sharded)} of {len(weights)} weights sharded)"
    elif name == "DistributedDataParallel":
        text = "DDP"
    elif wrapped is trainer.model:
        text = "not distributed"
    else:
        text = name

    sizes = {"tensor": trainer.get_tp_size(), "context": trainer.get_cp_size(), "sequence": trainer.get_sp_size()}
    for kind, size in sizes.items():
        if size > 1:
            text += f", {kind} parallel {size}"
    return text


def describe_engine(trainer: SFTTrainer) -> str:
    """Return what trains, in words, from the object that wraps the model and from torch.distributed."""
    wrapper = describe_wrapper(trainer)
    device = describe_device(trainer.args.device)
    processes = 1
    if torch.distributed.is_initialized():
        processes = torch.distributed.get_world_size()
    if processes == 1:
        return f"{wrapper}, 1 process on {device}"

    machines = processes // int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    machine_word = "machine" if machines == 1 else "machines"
    backend = torch.distributed.get_backend()
    return f"{wrapper}, {processes} processes on {machines} {machine_word} over {backend}, each on {device}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe_dtypes(model: PreTrainedModel) -> str:
    """Return what the weights are held in: '3.6B 4-bit nf4 computing in bfloat16, 33M float32 trained'."""
    four_bit = {}
    for layer in model.modules():
        if hasattr(layer, "compute_dtype") and getattr(layer.weight, "quant_state", None) is not None:
            kind = f"4-bit {layer.weight.quant_type} computing in {dtype_name(layer.compute_dtype)}"
            four_bit[id(layer.weight)] = kind

    parameters = {}
    for weight in model.parameters():
        kind = four_bit.get(id(weight), dtype_name(weight.dtype))
        if weight.requires_grad:
            kind += " trained"
        parameters[kind] = parameters.get(kind, 0) + numel(weight)
    kinds = sorted(parameters, key=parameters.get, reverse=True)
    return ", ".join(f"{amount(parameters[kind])} {kind}" for kind in kinds)


def describe_model(model: PreTrainedModel, model_args: ModelConfig) -> str:
    name = relative_path(model_args.model_name_or_path)
    if model_args.model_revision not in (None, "main"):
        name += f" at revision {model_args.model_revision}"
    count = count_parameters(model)
    share = count.trained / count.total
    return f"{name}, {amount(count.total)} parameters, {amount(count.trained)} trained ({share:.2%})"


def describe_weights(trainer: SFTTrainer) -> str:
    autocast = AUTOCAST[trainer.accelerator.mixed_precision]
    return f"{describe_dtypes(trainer.model)}; autocast {autocast}"


def describe_attention(model: PreTrainedModel, training_args: SFTConfig) -> str:
    liger = "on" if training_args.use_liger_kernel else "off"
    activations = "checkpointed" if training_args.activation_checkpointing else "kept"
    attention = model.config._attn_implementation
    alternative = describe_alternative(attention, training_args.device)
    return f"{attention}{alternative}, Liger kernels {liger}, activations {activations}"


def describe_targets(trainer: SFTTrainer) -> str:
    """Return which tokens are trained."""
    columns = trainer.train_rows.column_names or []
    if "input_ids" in columns:
        return "labels of the compiled set"
    if trainer.args.assistant_only_loss:
        return "assistant turns"
    if trainer.completion_only_loss:
        return "completions"
    return "every token"


def describe_template(trainer: SFTTrainer) -> str:
    template = "the tokenizer's own"
    if trainer.args.chat_template_path:
        template = relative_path(trainer.args.chat_template_path)
    return f"{template}, trains {describe_targets(trainer)}"


def row_unit(training_args: SFTConfig) -> str:
    return "packs" if training_args.packing else "rows"


def describe_data(trainer: SFTTrainer, size: DatasetSize, script_args: ScriptArguments) -> str:
    """Return the set's name and its rows, for packs with the share of their positions that holds a token."""
    args = trainer.args
    unit = row_unit(args)
    rows = f"{size.rows:,} {unit}"
    if args.packing:
        full = size.tokens / (size.rows * args.max_length)
        rows = f"{len(trainer.train_rows):,} rows in {rows}, {full:.1%} of {args.max_length:,} tokens full"
    validation = "no validation"
    if isinstance(trainer.eval_dataset, Dataset):
        validation = f"validation {len(trainer.eval_dataset):,} {unit}"
    return f"{relative_path(script_args.dataset_name)}: {rows}; {validation}"


def describe_step(trainer: SFTTrainer, size: DatasetSize) -> str:
    """Return what one optimizer step trains on."""
    batch = trainer.get_total_train_batch_size(trainer.args)
    tokens = batch * size.tokens / size.rows
    trained = size.trained / size.tokens
    return f"{batch:,} {row_unit(trainer.args)}, {amount(tokens)} tokens on average, {trained:.1%} of them trained"


def describe_run(trainer: SFTTrainer, state: TrainerState, size: DatasetSize | None) -> str:
    """Return how long the run is and from where it starts."""
    text = f"{state.max_steps:,} steps"
    if size:
        epochs = state.max_steps * trainer.get_total_train_batch_size(trainer.args) / size.rows
        text += f", {epochs:.2f} epochs"
    if state.global_step:
        checkpoint = relative_path(trainer.args.resume_from_checkpoint)
        return f"{text}, from {checkpoint}, after step {state.global_step:,}"
    return f"{text}, from the start"


def start_block(
    trainer: SFTTrainer,
    state: TrainerState,
    size: DatasetSize | None,
    script_args: ScriptArguments,
    model_args: ModelConfig,
) -> list[str]:
    """Return the lines to print when training begins; `size`: of the training set, None if it is streamed."""
    args = trainer.args
    block = {
        "model": describe_model(trainer.model, model_args),
        "weights": describe_weights(trainer),
        "attention": describe_attention(trainer.model, args),
        "template": describe_template(trainer),
    }
    if size:
        block["data"] = describe_data(trainer, size, script_args)
        if trainer.context_turns is not None:
            block["context"] = trainer.context_turns.describe()
        block["step"] = describe_step(trainer, size)
    block["run"] = describe_run(trainer, state, size)
    block["engine"] = describe_engine(trainer)
    block["output"] = relative_path(args.output_dir)
    return [f"  {name:<10} {value}" for name, value in block.items()]


def note_engine(path: Path, engine: str, resumed_step: int) -> None:
    """Write what trains to the run folder, for eval/card.py: a line for each engine that the run was resumed on."""
    engines = []
    if resumed_step and path.is_file():
        engines = path.read_text(encoding="utf-8").splitlines()
    if engine not in engines:
        engines.append(engine)
    path.write_text("".join(f"{line}\n" for line in engines), encoding="utf-8")
