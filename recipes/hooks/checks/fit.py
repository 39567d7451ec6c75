"""Whether a run fits the GPU that it stands on, told before its weights are downloaded."""

import os
from dataclasses import dataclass

import torch
from accelerate import ParallelismConfig
from transformers import PreTrainedConfig
from trl import ModelConfig, ScriptArguments, SFTConfig

from data_prep.common import errors
from data_prep.common.gpu_cards import CARDS, find_device_card
from data_prep.common.gpu_engines import Engine
from data_prep.common.gpu_memory import GIB, Prediction, predict
from data_prep.common.gpu_settings import read_run_settings

from ..messages import UsageError, recipe_name, say


@dataclass
class Gpu:
    """The GPU of a process. gib: all of its memory."""

    name: str
    gib: float


def find_gpu(training_args: SFTConfig) -> Gpu | None:
    """Return the GPU that this process trains on; None on a CPU."""
    if training_args.device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(training_args.device)
    return Gpu(properties.name, properties.total_memory / GIB)


def read_engine_of_run(training_args: SFTConfig) -> Engine:
    """Return what `accelerate launch` has set up, as the prediction counts it."""
    processes = training_args.world_size
    parallelism = ParallelismConfig()  # from accelerate's environment
    plugin = training_args.deepspeed_plugin
    if plugin is not None:
        zero = plugin.deepspeed_config.get("zero_optimization", {})
        return Engine(
            "zero",
            processes,
            stage=plugin.zero_stage,
            shards=processes,
            offloads_optimizer=is_offloaded(zero, "offload_optimizer"),
            offloads_weights=is_offloaded(zero, "offload_param"),
            sequence_parallel_size=parallelism.sp_size,
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        shards = parallelism.dp_shard_size if parallelism.dp_shard_size > 1 else processes
        offloads = os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true"
        return Engine("fsdp2", processes, shards=shards, offloads_optimizer=offloads, offloads_weights=offloads)
    return Engine("ddp" if processes > 1 else "single", processes)


def is_offloaded(zero: dict, name: str) -> bool:
    return (zero.get(name) or {}).get("device", "none") != "none"


def predict_run(
    config: PreTrainedConfig,
    script_args: ScriptArguments,
    training_args: SFTConfig,
    model_args: ModelConfig,
    engine: Engine,
) -> Prediction:
    """Return the predicted memory of a run's text model. Raises data_prep's UsageError where it cannot be told."""
    attention = training_args.model_init_kwargs["attn_implementation"]
    settings = read_run_settings(script_args, training_args, model_args, attention, engine)
    return predict(settings, config.get_text_config(), engine)


def check_fits(
    config: PreTrainedConfig, script_args: ScriptArguments, training_args: SFTConfig, model_args: ModelConfig
) -> None:
    """Raise UsageError for a run that the GPU cannot hold; say once where it leaves half of it idle.

    What engines cut is an estimate: there it is said, not refused.
    """
    gpu = find_gpu(training_args)
    if gpu is None:
        return
    engine = read_engine_of_run(training_args)
    try:
        prediction = predict_run(config, script_args, training_args, model_args, engine)
    except errors.UsageError as error:
        say(f"memory is not predicted: {error}")
        return
    needed = f"{prediction.peak / GIB:.1f} GiB predicted, {gpu.name} has {gpu.gib:.1f}"
    if prediction.may_fit(gpu.gib):
        if prediction.needed[1] < gpu.gib * GIB / 2:
            say(f"{needed}: more than half of it stays idle: {suggest_fit(gpu)} says what to spend it on")
        return
    sentence = f"this run does not fit: {needed}: {suggest_fit(gpu)} says what saves how much"
    if engine.is_sharded or "too_large" in script_args.allow:
        say(sentence)
        return
    raise UsageError(f"{sentence}; --allow too_large tries it all the same")


def suggest_fit(gpu: Gpu) -> str:
    """Return the command that says more, with the name of the card where it has one."""
    card = find_device_card(gpu.name)
    names = [name for name, known in CARDS.items() if known is card]
    return f"python -m eval.fit recipes/{recipe_name()} --gpu {names[0] if names else 'NAME'}"
