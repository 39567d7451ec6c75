"""The method, the engine that runs it, the model's class, and what precision the optimizer updates."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import transformers
from accelerate import ParallelismConfig
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig
from trl import ModelConfig, SFTConfig

from ..messages import UsageError
from .allowed import ALLOWED

if TYPE_CHECKING:
    from ..trainer import SFTTrainer


@dataclass(frozen=True)
class Conflict:
    """Why a method does not work on an engine, and the name in ALLOWED that runs it all the same."""

    allow_name: str
    reason: str


CONFLICTS = {  # (method, engine)
    ("QLoRA", "FSDP2"): Conflict("qlora_fsdp2", "4-bit weights stay whole on every GPU or fail (accelerate#3874)"),
}
NO_CLASS = {  # model types that transformers knows as a config only: what else is missing
    "step3p5": "upstream trained it with pipeline, context and expert parallelism, which TRL has not; its optimizer "
    "and schedule run on Qwen3 (recipes/step35_sft.py without this config)",
}
LOW_PRECISION = (torch.bfloat16, torch.float16)


def name_method(model_args: ModelConfig) -> str:
    if model_args.load_in_4bit or model_args.load_in_8bit:
        return "QLoRA"
    if model_args.use_peft:
        return "LoRA"
    return "full fine-tuning"


def name_engine(training_args: SFTConfig) -> str:
    """Return what accelerate makes of the launcher's settings: ZeRO-0 to ZeRO-3, FSDP1, FSDP2, DDP or one process."""
    if training_args.deepspeed_plugin is not None:
        return f"ZeRO-{training_args.deepspeed_plugin.zero_stage}"
    if is_fsdp(training_args):
        own_settings = training_args.fsdp_plugin_args
        if own_settings:
            return f"FSDP{own_settings['fsdp_version']}"
        return f"FSDP{os.environ.get('FSDP_VERSION', '1')}"
    if training_args.world_size > 1:
        return "DDP"
    return "one process"


def is_fsdp(training_args: SFTConfig) -> bool:
    """Return whether FSDP was asked for, and runs: on CPUs accelerate leaves it out without a word."""
    by_launcher = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if training_args.fsdp_plugin_args is None and not by_launcher:
        return False
    processes = training_args.distributed_state.distributed_type.value
    return processes.startswith("MULTI_") and processes != "MULTI_CPU"


def check_method_and_engine(training_args: SFTConfig, model_args: ModelConfig, allow: list[str]) -> None:
    """Raise UsageError for a method that does not work on this engine."""
    method = name_method(model_args)
    engine = name_engine(training_args)
    conflict = CONFLICTS.get((method, engine))
    if conflict is None or conflict.allow_name in allow:
        return
    raise UsageError(
        f"{method} with {engine} does not work: {conflict.reason}: launch with another --config_file, or "
        f"--allow {conflict.allow_name} ({ALLOWED[conflict.allow_name]})"
    )


def check_sequence_parallelism(training_args: SFTConfig) -> None:
    """Raise UsageError for packs under sequence parallelism."""
    if training_args.packing and ParallelismConfig().sp_size > 1:
        raise UsageError("sequence parallelism trains unpacked rows (DeepSpeed 0.19.8 stops at packs): --packing false")


def load_config(training_args: SFTConfig, model_args: ModelConfig) -> PreTrainedConfig:
    return AutoConfig.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
    )


def check_model_class(config: PreTrainedConfig, training_args: SFTConfig, model_args: ModelConfig) -> None:
    """Raise UsageError for a model without a class; TRL would say so after reading the data."""
    if find_model_class(config) is not None:
        return
    if training_args.trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {}):
        return
    missing = ""
    if config.model_type in NO_CLASS:
        missing = f", and {NO_CLASS[config.model_type]}"
    raise UsageError(
        f"{model_args.model_name_or_path} cannot be trained here: transformers {transformers.__version__} has a config "
        f"for {config.model_type} but no causal-LM class{missing}: another --model_name_or_path"
    )


def find_model_class(config: PreTrainedConfig) -> type | None:
    """Return transformers' class for a config: the one that it names, else the causal-LM class of its type."""
    if config.architectures:
        named = getattr(transformers, config.architectures[0], None)
        if named is not None:
            return named
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return None


def check_master_weights(trainer: "SFTTrainer", model_args: ModelConfig, allow: list[str]) -> None:
    """Raise UsageError for full fine-tuning of bf16 or fp16 weights, whose small updates are lost to rounding.

    DeepSpeed's ZeRO keeps fp32 copies of its own; everything else updates the weights as they are.
    """
    plugin = trainer.args.deepspeed_plugin
    if plugin is not None and plugin.zero_stage > 0:
        return
    if model_args.use_peft or "bf16_weights" in allow:
        return
    for weight in trainer.model.parameters():
        if weight.requires_grad and weight.dtype in LOW_PRECISION:
            dtype = str(weight.dtype).removeprefix("torch.")
            raise UsageError(
                f"full fine-tuning of {dtype} weights drops small updates: --dtype float32 keeps fp32 master weights "
                "and computes in bf16 as before, --allow bf16_weights trains them as they are"
            )
