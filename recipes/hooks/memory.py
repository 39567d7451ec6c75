"""When memory runs out, say what saves some, in order, with this run's numbers.

The order is the Day-2 QLoRA tutorial's: shorter rows, smaller micro-batches, smaller adapters, fewer or smaller
evaluations. Before it comes what the tutorial takes for granted (activation checkpointing), after it what makes another
run of it (4 bits, adapters). On a GPU each says what it saves by eval.fit's prediction, by itself.
"""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from trl import ModelConfig, ScriptArguments, SFTConfig

from data_prep.common import errors
from data_prep.common.gpu_memory import GIB, predict
from data_prep.common.gpu_settings import read_run_settings

from .checks.engine import load_config
from .checks.fit import find_gpu, read_engine_of_run

PHRASES = (  # of torch's allocators and of libraries that do not raise OutOfMemoryError or MemoryError
    "out of memory",  # CUDA, NCCL
    "not enough memory",  # torch on a CPU
    "can't allocate memory",  # the same on other systems
    "Cannot allocate memory",  # errno ENOMEM
    "ALLOC_FAILED",  # cuBLAS, cuDNN
)


@dataclass
class Suggestion:
    """Flags that save memory, the value that they replace, and why they save it.

    change: what they are in eval.fit's settings (RunSettings); empty where it does not count what they save.
    """

    flags: str
    value_now: str
    reason: str
    flags_on_resume: str | None = None  # beside them, to go on from a checkpoint; None: they make another run
    change: dict[str, object] = field(default_factory=dict)


def ran_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an exception, or one that it came from, says that memory (not the disk) ran out."""
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, RuntimeError | OSError):
            text = str(error)
            if any(phrase in text for phrase in PHRASES):
                return True
        error = error.__cause__ or error.__context__
    return False


def suggest_four_bits() -> Suggestion:
    reason = "frozen weights in 4 bits, not 16"
    return Suggestion("--load_in_4bit true", "16 bits", reason, change={"load_in_4bit": True})


def suggest_smaller_weights(model_args: ModelConfig) -> list[Suggestion]:
    """Return what helps where the weights alone are too many."""
    chosen = []
    if model_args.dtype == "float32":
        change = {"dtype": "bfloat16"}
        chosen.append(Suggestion("--dtype bfloat16", model_args.dtype, "2 bytes a parameter", change=change))
    if not model_args.use_peft:
        reason = "weights in 4 bits, adapters on top"
        change = {"use_peft": True, "dtype": "bfloat16", "load_in_4bit": True}
        chosen.append(Suggestion("recipes/qwen3_qlora.py", "full fine-tuning", reason, change=change))
    elif not model_args.load_in_4bit:
        chosen.append(suggest_four_bits())
    name = model_args.model_name_or_path
    chosen.append(Suggestion("--model_name_or_path SMALLER", name, "fewer parameters"))
    return chosen


def suggest_smaller_evaluations(training_args: SFTConfig, is_evaluating: bool) -> list[Suggestion]:
    """Return the smallest change to evaluations that is left, if any."""
    strategy = training_args.eval_strategy.value
    batch_size = training_args.per_device_eval_batch_size
    if strategy == "no":
        return []
    if batch_size > 1:
        return [Suggestion("--per_device_eval_batch_size 1", str(batch_size), "the same figures", "")]
    if is_evaluating:
        return [Suggestion("--eval_strategy no", strategy, "python -m eval.compare measures afterwards", "")]
    steps = training_args.eval_steps
    if strategy == "steps" and steps >= 1:
        return [Suggestion(f"--eval_steps {steps * 2:g}", f"{steps:g}", "each fragments the free memory", "")]
    return []


def suggest_smaller_activations(
    script_args: ScriptArguments, training_args: SFTConfig, model_args: ModelConfig, is_evaluating: bool
) -> list[Suggestion]:
    """Return checkpointed activations, then shorter rows, then smaller micro-batches."""
    chosen = []
    if not training_args.activation_checkpointing:
        reason = "one layer's activations at a time, computed twice"
        change = {"activation_checkpointing": True}
        chosen.append(Suggestion("--activation_checkpointing true", "false", reason, "", change))

    length = training_args.max_length
    if length and length > 256:
        shorter = 1024 if length > 1024 else length // 2
        reason = "fewer activations; longer rows are truncated"
        change = {"max_length": shorter}
        chosen.append(Suggestion(f"--max_length {shorter}", str(length), reason, change=change))

    if model_args.use_peft and model_args.lora_dropout > 0 and not is_evaluating:
        reason = "dropout keeps a mask and an input of its own for every adapter"
        value = f"{model_args.lora_dropout:g}"
        change = {"lora_dropout": 0.0}
        chosen.append(Suggestion("--lora_dropout 0", value, reason, "--allow lora_dropout", change))

    rows = training_args.per_device_train_batch_size
    if rows > 1:
        now = training_args.gradient_accumulation_steps
        batch = script_args.global_batch_size
        reason = f"accumulation becomes {now * rows} (now {now}), the global batch stays {batch}"
        flags_on_resume = None if getattr(script_args, "micro_batch_mean", False) else ""
        change = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": now * rows}
        chosen.append(Suggestion("--per_device_train_batch_size 1", str(rows), reason, flags_on_resume, change))
    return chosen


def suggest_offloading(training_args: SFTConfig, is_evaluating: bool) -> list[Suggestion]:
    """Return activations in main memory, for a run that trains on a GPU."""
    if is_evaluating or training_args.activation_offloading or find_gpu(training_args) is None:
        return []
    reason = "activations wait in main memory for the backward; slower"
    return [Suggestion("--activation_offloading true", "false", reason, "", {"activation_offloading": True})]


def suggest_smaller_adapters(model_args: ModelConfig) -> list[Suggestion]:
    """Return a smaller rank with the same alpha / r, if there is one."""
    rank = model_args.lora_r
    alpha = model_args.lora_alpha
    if not model_args.use_peft or rank <= 8:
        return []
    smaller = 16 if rank > 16 else 8
    flags = f"--lora_r {smaller} --lora_alpha {alpha * smaller / rank:g}"
    change = {"lora_r": smaller, "lora_alpha": alpha * smaller / rank}
    return [Suggestion(flags, f"{rank}, {alpha:g}", "smaller adapters, gradients and AdamW state", change=change)]


def suggest_another_run(training_args: SFTConfig, model_args: ModelConfig) -> list[Suggestion]:
    """Return what makes another run of this one: the optimizer's state, 4 bits, adapters."""
    chosen = []
    optimizer = training_args.optim.value
    if "adamw" in optimizer and "8bit" not in optimizer:
        reason = "2 bytes of state a trained parameter, not 8"
        change = {"optim": "paged_adamw_8bit"}
        chosen.append(Suggestion("--optim paged_adamw_8bit", optimizer, reason, change=change))
    if not model_args.use_peft:
        reason = "gradients and AdamW state for adapters only"
        change = {"use_peft": True, "dtype": "bfloat16"}
        chosen.append(Suggestion("recipes/qwen3_lora.py", "full fine-tuning", reason, change=change))
    elif not model_args.load_in_4bit:
        chosen.append(suggest_four_bits())
    return chosen


def suggestions(
    script_args: ScriptArguments, training_args: SFTConfig, model_args: ModelConfig, frames: list[str]
) -> list[Suggestion]:
    """Return what this run can still do, in order; `frames`: names of the functions on the stack."""
    if "train" not in frames:
        return suggest_smaller_weights(model_args)
    is_evaluating = "evaluate" in frames
    evaluations = suggest_smaller_evaluations(training_args, is_evaluating)
    training = [
        *suggest_smaller_activations(script_args, training_args, model_args, is_evaluating),
        *suggest_smaller_adapters(model_args),
        *suggest_offloading(training_args, is_evaluating),
    ]
    other_runs = suggest_another_run(training_args, model_args)
    if is_evaluating:  # it is an evaluation that did not fit
        return evaluations + training + other_runs
    return training + evaluations + other_runs


def predict_savings(
    script_args: ScriptArguments, training_args: SFTConfig, model_args: ModelConfig, chosen: list[Suggestion]
) -> list[str]:
    """Return what each suggestion saves on a GPU by prediction, in words; "" where that cannot be told."""
    unknown = [""] * len(chosen)
    if find_gpu(training_args) is None:
        return unknown
    try:
        config = load_config(training_args, model_args).get_text_config()
        engine = read_engine_of_run(training_args)
        attention = training_args.model_init_kwargs["attn_implementation"]
        settings = read_run_settings(script_args, training_args, model_args, attention, engine)
        before = predict(settings, config, engine).peak
        savings = []
        for suggestion in chosen:
            saving = ""
            if suggestion.change:
                saved = before - predict(replace(settings, **suggestion.change), config, engine).peak
                saving = f"; saves {saved / GIB:.2f} of {before / GIB:.2f} GiB, predicted"
            savings.append(saving)
    except (errors.UsageError, OSError, RuntimeError, ValueError, KeyError, MemoryError):
        return unknown
    return savings


def describe_usage() -> str:
    """Return how much of the GPU's memory was in use, "" without a GPU."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return ""
    peak = torch.cuda.max_memory_allocated() / 2**30
    total = torch.cuda.get_device_properties().total_memory / 2**30
    return f", at most {peak:.1f} of {total:.1f} GiB were in use"


def describe_next_try(output_dir: str, chosen: list[Suggestion]) -> str:
    """Return which of the suggestions can go on from a checkpoint, and which start afresh."""
    if not any(Path(output_dir).glob("checkpoint-*")):
        return (
            f"{output_dir} holds this try and no checkpoint: with --resume_from_checkpoint true the same command "
            "starts over there; or pass another --output_dir."
        )
    going_on = []
    for number, suggestion in enumerate(chosen, start=1):
        if suggestion.flags_on_resume:
            going_on.append(f"{number} (with {suggestion.flags_on_resume})")
        elif suggestion.flags_on_resume is not None:
            going_on.append(str(number))
    if not going_on:
        return "Each makes another run, which starts afresh: pass another --output_dir."
    text = f"--resume_from_checkpoint true goes on from the newest checkpoint with {', '.join(going_on)}"
    if len(going_on) < len(chosen):
        text += "; the others make another run, which starts afresh: pass another --output_dir"
    return f"{text}."


def explain(
    script_args: ScriptArguments, training_args: SFTConfig, model_args: ModelConfig, frames: list[str]
) -> list[str]:
    """Return the lines to print after an error by which memory ran out; `frames`: as for suggestions()."""
    rank = ""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        rank = f"rank {os.environ['RANK']}: "
    event = f"{rank}memory ran out{describe_usage()}"
    chosen = suggestions(script_args, training_args, model_args, frames)
    next_try = describe_next_try(training_args.output_dir, chosen)
    if not chosen:
        return [f"{event}, and no setting that saves some is left: take a smaller model or a larger GPU.", next_try]

    lines = [f"{event}. In this order, one more at a time:"]
    width = max(len(suggestion.flags) for suggestion in chosen)
    savings = predict_savings(script_args, training_args, model_args, chosen)
    for number, (suggestion, saving) in enumerate(zip(chosen, savings, strict=True), start=1):
        flags = suggestion.flags.ljust(width)
        lines.append(f"  {number}. {flags}  now {suggestion.value_now}: {suggestion.reason}{saving}")
    return [*lines, next_try]
