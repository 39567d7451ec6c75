"""When memory runs out, say what saves some, in order, with this run's numbers.

The order is the Day-2 QLoRA tutorial's: shorter rows, smaller micro-batches, smaller adapters, fewer or smaller
evaluations. Before it comes what the tutorial takes for granted (activation checkpointing), after it what makes another
run of it (4 bits, adapters).
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from trl import ModelConfig, ScriptArguments, SFTConfig

PHRASES = (  # of torch's allocators and of libraries that do not raise OutOfMemoryError or MemoryError
    "out of memory",  # CUDA, NCCL
    "not enough memory",  # torch on a CPU
    "can't allocate memory",  # the same on other systems
    "Cannot allocate memory",  # errno ENOMEM
    "ALLOC_FAILED",  # cuBLAS, cuDNN
)


@dataclass
class Suggestion:
    """Flags that save memory, the value that they replace, and why they save it."""

    flags: str
    value_now: str
    reason: str
    flags_on_resume: str | None = None  # beside them, to go on from a checkpoint; None: they make another run


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
    return Suggestion("--load_in_4bit true", "16 bits", "frozen weights take about 0.6 bytes a parameter, not 2")


def suggest_smaller_weights(model_args: ModelConfig) -> list[Suggestion]:
    """Return what helps where the weights alone are too many."""
    chosen = []
    if model_args.dtype == "float32":
        chosen.append(Suggestion("--dtype bfloat16", model_args.dtype, "2 bytes a parameter"))
    if not model_args.use_peft:
        reason = "weights in 4 bits, adapters on top"
        chosen.append(Suggestion("recipes/qwen3_qlora.py", "full fine-tuning", reason))
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
        chosen.append(Suggestion("--activation_checkpointing true", "false", reason, ""))

    length = training_args.max_length
    if length and length > 256:
        shorter = 1024 if length > 1024 else length // 2
        reason = "fewer activations; longer rows are truncated"
        chosen.append(Suggestion(f"--max_length {shorter}", str(length), reason))

    if model_args.use_peft and model_args.lora_dropout > 0 and not is_evaluating:
        # computed for a layer of Qwen3-4B in bf16: dropout keeps a mask and an input of its own for every adapter
        reason = "a layer of Qwen3-4B keeps 175 KiB of activations a token, not 279"
        chosen.append(Suggestion("--lora_dropout 0", f"{model_args.lora_dropout:g}", reason, "--allow lora_dropout"))

    rows = training_args.per_device_train_batch_size
    if rows > 1:
        now = training_args.gradient_accumulation_steps
        batch = script_args.global_batch_size
        reason = f"accumulation becomes {now * rows} (now {now}), the global batch stays {batch}"
        flags_on_resume = None if getattr(script_args, "micro_batch_mean", False) else ""
        chosen.append(Suggestion("--per_device_train_batch_size 1", str(rows), reason, flags_on_resume))
    return chosen


def suggest_smaller_adapters(model_args: ModelConfig) -> list[Suggestion]:
    """Return a smaller rank with the same alpha / r, if there is one."""
    rank = model_args.lora_r
    alpha = model_args.lora_alpha
    if not model_args.use_peft or rank <= 8:
        return []
    smaller = 16 if rank > 16 else 8
    flags = f"--lora_r {smaller} --lora_alpha {alpha * smaller / rank:g}"
    return [Suggestion(flags, f"{rank}, {alpha:g}", "smaller adapters, gradients and AdamW state")]


def suggest_another_run(training_args: SFTConfig, model_args: ModelConfig) -> list[Suggestion]:
    """Return what makes another run of this one: the optimizer's state, 4 bits, adapters."""
    chosen = []
    optimizer = training_args.optim.value
    if "adamw" in optimizer and "8bit" not in optimizer:
        reason = "2 bytes of state a trained parameter, not 8"
        chosen.append(Suggestion("--optim paged_adamw_8bit", optimizer, reason))
    if not model_args.use_peft:
        reason = "gradients and AdamW state for adapters only"
        chosen.append(Suggestion("recipes/qwen3_lora.py", "full fine-tuning", reason))
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
    ]
    other_runs = suggest_another_run(training_args, model_args)
    if is_evaluating:  # it is an evaluation that did not fit
        return evaluations + training + other_runs
    return training + evaluations + other_runs


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
    for number, suggestion in enumerate(chosen, start=1):
        flags = suggestion.flags.ljust(width)
        lines.append(f"  {number}. {flags}  now {suggestion.value_now}: {suggestion.reason}")
    return [*lines, next_try]
