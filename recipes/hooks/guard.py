"""Hook: one sentence instead of a traceback for what a user can mend, and no false alarm about the stop token.

Loaded by path from a recipe's DEFAULTS; a recipe without it trains the same. SFT_TRACEBACK=1 shows the tracebacks.
"""

import errno
import logging
import os
import sys
import traceback
from dataclasses import fields

import transformers.dynamic_module_utils
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

HUB = (
    "where the hub cannot be reached, pass a local folder as --model_name_or_path and a local .jsonl, .json, .parquet "
    "file or save_to_disk folder as --dataset_name, or set HF_ENDPOINT to a mirror"
)
LOST = "another rank has ended or cannot be reached"  # each rank that sees it says so
REMOTE = "contains custom code"  # transformers, on models and tokenizers that bring Python files
RUN = {}  # what prepare() was given, for the sentences


def sentence(error, frames):
    """Returns what to tell the user about an exception, or None where only a traceback helps.

    `frames` are the names of the functions on the stack, outermost first: before `train`, a ValueError and its like are
    about the input; from there on they are bugs.
    """
    text = " ".join(str(error).split())
    name, modules = type(error).__name__, {cls.__module__.split(".")[0] for cls in type(error).__mro__}
    script, args, model = (RUN.get(key) for key in ("script", "args", "model"))
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; --resume_from_checkpoint true goes on from the newest checkpoint, where there is one"
    if any(words in text for words in ("closed by peer", "reset by peer", "ncclRemoteError", "remote process exited")):
        return f"{LOST}: --resume_from_checkpoint true goes on from the newest whole checkpoint ({text})"
    disk = {errno.ENOSPC: "the disk is full", errno.EROFS: "the disk is read-only", errno.EDQUOT: "the quota is used"}
    disk |= {errno.EFBIG: "a file is larger than allowed (ulimit -f)"}
    disk |= {errno.EACCES: "writing there is not permitted"} if "train" in frames[1:] else {}
    number = next((n for n in disk if getattr(error, "errno", None) == n or f"(os error {n})" in text), None)
    if number is None and any(words in text for words in ("No space left", "iostream error", "unexpected pos ")):
        number = errno.ENOSPC  # torch.save says it this way
    if number:
        return (
            f"{disk[number]} ({text}): complete checkpoints in {args.output_dir if args else 'the output folder'} are "
            "whole; make room, then the same command with --resume_from_checkpoint true goes on from the newest"
        )
    if "train" in frames[1:]:
        return None
    if name == "DatasetNotFoundError" or isinstance(error, ConnectionError) or "huggingface_hub" in modules:
        return f"dataset {script.dataset_name}: {text.rstrip('.')}; {HUB}" if script else f"{text}; {HUB}"
    if "load_dataset" in frames or "load_from_disk" in frames:
        cause = f" ({' '.join(str(error.__cause__).split())})" if error.__cause__ else ""
        return f"dataset {script.dataset_name} cannot be read: {name}: {text}{cause}; {HUB}"
    if name == "StopIteration":
        return f"dataset {script.dataset_name} has no rows"
    if isinstance(error, KeyError) and "load_data" in frames:
        return (
            f"dataset {script.dataset_name} lacks {text}: rows need `messages` (data_prep/normalize.py makes them), or "
            "the columns that to_messages reads, or another --dataset_train_split"
        )
    if REMOTE in text or "execute custom code" in text:
        return (
            f"model {model.model_name_or_path} runs Python code of its own, which can do anything on this machine: "
            "read its .py files, then --trust_remote_code true"
        )
    if isinstance(error, OSError) and "no file named model.safetensors" in text:
        load = f"AutoModelForCausalLM.from_pretrained('{model.model_name_or_path}', dtype='auto')"
        return (
            f"model {model.model_name_or_path} has no model.safetensors, and pytorch_model.bin can run code when it is "
            "loaded; where you trust it, convert it once and copy the tokenizer files beside it: "
            f"python -c \"from transformers import *; {load}.save_pretrained('converted')\""
        )
    if isinstance(error, OSError) and "from_pretrained" in frames:
        return f"model {model.model_name_or_path}: {text.rstrip('.')}; {HUB}"
    if isinstance(error, (OSError, ValueError, TypeError, KeyError, RuntimeError, TemplateError)) or "yaml" in modules:
        if "bf16/gpu" in text:
            text = "no GPU found: --use_cpu true trains on the CPU, slowly (`make demo` shows how)"
        return text if isinstance(error, ValueError) else f"{name}: {text}"
    return None


def one_sentence(kind, error, trace):
    frames = [frame.f_code.co_name for frame, _ in traceback.walk_tb(trace)]
    told = None if os.environ.get("SFT_TRACEBACK") else sentence(error, frames)
    if told is None:
        sys.__excepthook__(kind, error, trace)
    elif os.environ.get("LOCAL_RANK", "0") == "0" or told.startswith(LOST):
        print(f"{os.path.basename(sys.argv[0])}: {told}", file=sys.stderr)


sys.excepthook = one_sentence


def prepare(script, args, model):
    """Checks what argparse leaves unchecked in YAML; silences TRL's stop-token warning where its probe is wrong.

    Weights load from safetensors only, and Python code that comes with a model runs with --trust_remote_code true only.

    The probe is user, assistant, user: a template that trains only a final answer (Qwen3 hybrid) is then accused of
    never training its stop token. Here the probe ends with the answer, and the warning stays if that span lacks it.
    """
    RUN.update(script=script, args=args, model=model)
    transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # code from elsewhere is refused, not asked about
    args.model_init_kwargs = {"use_safetensors": True} | (args.model_init_kwargs or {})
    for part in (script, args, model):
        for field in fields(part):
            value, choices = getattr(part, field.name), field.metadata.get("choices")
            if choices and value is not None and value not in choices:
                raise ValueError(f"{field.name} {value}: choose one of {', '.join(choices)}")
    checkpoint = args.resume_from_checkpoint
    if checkpoint and not os.path.isfile(os.path.join(checkpoint, "trainer_state.json")):
        raise ValueError(f"{checkpoint} is no checkpoint: --resume_from_checkpoint true takes the newest of output_dir")
    with open(args.chat_template_path) as file:
        template = file.read()
    probe = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    try:
        text, spans = render_jinja_template([probe], chat_template=template, return_assistant_tokens_mask=True)
    except TemplateError:
        return
    if spans[0] and not text[0][slice(*spans[0][-1])].rstrip().endswith("answer"):
        false_alarm = "The chat template does not include the assistant turn's end-of-turn token"
        logger = logging.getLogger("trl.trainer.sft_trainer")
        logger.addFilter(lambda record: false_alarm not in record.getMessage())
