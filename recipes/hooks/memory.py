"""Hook: when memory runs out, what saves some, in order, with this run's numbers.

The order is the Day-2 QLoRA tutorial's: shorter rows, smaller passes, smaller adapters, fewer or smaller evaluations.
Before it comes what the tutorial takes for granted (activation checkpointing), after it what makes another run of it
(4 bits, adapters). Loaded after guard.py, whose sentence or traceback is printed first.
"""

import os
import sys
import traceback
from pathlib import Path

import torch

SAID = (  # by torch's allocators and by libraries that do not raise OutOfMemoryError or MemoryError
    "out of memory",  # CUDA, NCCL
    "not enough memory",  # torch on a CPU
    "can't allocate memory",  # the same on other systems
    "Cannot allocate memory",  # errno ENOMEM
    "ALLOC_FAILED",  # cuBLAS, cuDNN
)
RUN = {}  # what prepare() was given


def ran_out(error):
    """Whether an exception, or one that it came from, says that memory (not the disk) ran out."""
    while error is not None:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            return True
        if isinstance(error, (RuntimeError, OSError)) and any(words in str(error) for words in SAID):
            return True
        error = error.__cause__ or error.__context__
    return False


def rungs(script, args, model, frames):
    """Returns [(flags, value now, why)] in order, what this run can still do; `frames`: the functions on the stack."""
    lora, evaluating = model.use_peft, "evaluate" in frames
    four_bits = ("--load_in_4bit true", "16 bits", "frozen weights take about 0.6 bytes a parameter, not 2")
    if "train" not in frames:  # the weights alone are too many
        return [
            *[("--dtype bfloat16", model.dtype, "2 bytes a parameter")] * (model.dtype == "float32"),
            *[four_bits] * (lora and not model.load_in_4bit),
            *[("recipes/qwen3_qlora.py", "full fine-tuning", "weights in 4 bits, adapters on top")] * (not lora),
            ("--model_name_or_path SMALLER", model.model_name_or_path, "fewer parameters"),
        ]
    found, rows, passes = [], args.per_device_train_batch_size, args.gradient_accumulation_steps
    eval_rows, evaluations = args.per_device_eval_batch_size, []
    if args.eval_strategy != "no" and eval_rows > 1:
        evaluations.append(("--per_device_eval_batch_size 1", eval_rows, "the same figures"))
    elif args.eval_strategy == "steps" and args.eval_steps >= 1 and not evaluating:
        evaluations.append((f"--eval_steps {args.eval_steps * 2:g}", args.eval_steps, "each cuts up the free memory"))
    elif evaluating:
        evaluations.append(("--eval_strategy no", args.eval_strategy.value, "eval/compare.py measures afterwards"))
    if evaluating:  # it is an evaluation that did not fit
        found += evaluations
    if not args.activation_checkpointing:
        found.append(("--activation_checkpointing true", "false", "one layer's activations at a time, computed twice"))
    if args.max_length and args.max_length > 256:
        shorter = 1024 if args.max_length > 1024 else args.max_length // 2
        found.append((f"--max_length {shorter}", args.max_length, "fewer activations; longer rows are cut"))
    if rows > 1:
        why = f"accumulation becomes {passes * rows} (now {passes}), the global batch stays {script.global_batch_size}"
        found.append(("--per_device_train_batch_size 1", rows, why))
    if lora and model.lora_r > 8:
        r = 16 if model.lora_r > 16 else 8
        flags = f"--lora_r {r} --lora_alpha {model.lora_alpha * r / model.lora_r:g}"
        found.append((flags, f"{model.lora_r}, {model.lora_alpha:g}", "smaller adapters, gradients and AdamW state"))
    if not evaluating:
        found += evaluations
    if "8bit" not in args.optim and "adamw" in args.optim:
        found.append(("--optim paged_adamw_8bit", args.optim.value, "2 bytes of state a trained parameter, not 8"))
    if lora and not model.load_in_4bit:
        found.append(four_bits)
    if not lora:
        found.append(("recipes/qwen3_lora.py", "full fine-tuning", "gradients and AdamW state for adapters only"))
    return found


def ladder(frames):
    """Returns the lines to print."""
    script, args, model = RUN["script"], RUN["args"], RUN["model"]
    used = ""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        most, whole = torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties().total_memory
        used = f", at most {most / 2**30:.1f} of {whole / 2**30:.1f} GiB were in use"
    rank = f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    found = rungs(script, args, model, frames)
    width = max(len(flags) for flags, _, _ in found)
    lines = [f"{rank}memory ran out{used}. In this order, one more at a time:"]
    lines += [f"  {i}. {flags:{width}}  now {now}: {why}" for i, (flags, now, why) in enumerate(found, 1)]
    again = "with --resume_from_checkpoint true the same command starts over in the same folder"
    if any(Path(args.output_dir).glob("checkpoint-*")):
        again = "--resume_from_checkpoint true goes on from the newest checkpoint, but not with another length or rank"
    return [*lines, f"{args.output_dir} holds this try: {again}; or pass another --output_dir."]


def told(kind, error, trace, before=sys.excepthook):
    before(kind, error, trace)
    if RUN and ran_out(error):
        print(*ladder([frame.f_code.co_name for frame, _ in traceback.walk_tb(trace)]), sep="\n", file=sys.stderr)


sys.excepthook = told


def prepare(script, args, model):
    RUN.update(script=script, args=args, model=model)
