"""One sentence instead of a traceback for what a user can mend; SFT_TRACEBACK=1 shows the tracebacks.

Before `train`, a ValueError and its like are about the input; from there on they are bugs, and bugs keep their
traceback. Where memory ran out, what saves some is listed too, with this run's numbers (memory.py).
"""

import errno
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from jinja2 import TemplateError
from trl import ModelConfig, ScriptArguments, SFTConfig

from . import memory
from .checks.rows import explain_missing_column
from .messages import UsageError, is_main_process, print_refusal, recipe_name

HUB = (
    "where the hub cannot be reached, pass a local folder as --model_name_or_path and a local .jsonl, .json, .parquet "
    "file or save_to_disk folder as --dataset_name, or set HF_ENDPOINT to a mirror"
)
LOST = "another rank has ended or cannot be reached"
LOST_WORDS = ("closed by peer", "reset by peer", "ncclRemoteError", "remote process exited")
DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EROFS: "the disk is read-only",
    errno.EDQUOT: "the quota is used",
    errno.EFBIG: "a file is larger than allowed (ulimit -f)",
}
FULL_WORDS = ("No space left", "iostream error", "unexpected pos ")  # torch.save says it in the last two ways
REMOTE_CODE_WORDS = ("contains custom code", "execute custom code")  # of models and tokenizers with Python files


@dataclass
class Refusals:
    """Turns exceptions of a run into sentences."""

    script_args: ScriptArguments
    training_args: SFTConfig
    model_args: ModelConfig

    def install(self) -> None:
        """Become what Python calls for an exception that nobody caught."""
        sys.excepthook = self.show

    def show(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Print the sentence for an exception, or its traceback where only that helps."""
        frames = [frame.f_code.co_name for frame, _ in traceback.walk_tb(trace)]
        sentence = None
        if not os.environ.get("SFT_TRACEBACK"):
            sentence = self.explain(error, frames)
        if sentence is None:
            sys.__excepthook__(kind, error, trace)
        if memory.ran_out_of_memory(error):
            lines = memory.explain(self.script_args, self.training_args, self.model_args, frames)
            print(*lines, sep="\n", file=sys.stderr, flush=True)
        if sentence is None:
            return
        of_this_rank = sentence.startswith(LOST) or "train" in frames[1:]  # before, all ranks refuse alike
        if is_main_process() or not of_this_rank:
            print_refusal(sentence)
        else:
            print(f"{recipe_name()}: rank {os.environ.get('RANK')}: {sentence}", file=sys.stderr, flush=True)

    def explain(self, error: BaseException, frames: list[str]) -> str | None:
        """Return what to tell the user about an exception, or None where only a traceback helps.

        `frames`: the names of the functions on the stack, outermost first.
        """
        message = " ".join(str(error).split())
        if isinstance(error, KeyboardInterrupt):
            return "interrupted; --resume_from_checkpoint true goes on from the newest checkpoint, where there is one"
        if any(words in message for words in LOST_WORDS):
            return f"{LOST}: --resume_from_checkpoint true goes on from the newest whole checkpoint ({message})"
        training = "train" in frames[1:]
        fault = self.explain_disk(error, message, training)
        if fault:
            return fault
        if isinstance(error, UsageError):
            return message
        if training:
            return None
        if "load_splits" in frames:
            return self.explain_dataset(error, message, frames)
        return self.explain_model(error, message, frames)

    def explain_disk(self, error: BaseException, message: str, training: bool) -> str | None:
        reason = None
        for number, words in DISK.items():
            if getattr(error, "errno", None) == number or f"(os error {number})" in message:
                reason = words
        not_permitted = getattr(error, "errno", None) == errno.EACCES or "(os error 13)" in message
        if not_permitted and training:
            reason = "writing there is not permitted"
        if reason is None and any(words in message for words in FULL_WORDS):
            reason = DISK[errno.ENOSPC]
        if reason is None:
            return None
        folder = self.training_args.output_dir
        return (
            f"{reason} ({message}): complete checkpoints in {folder} are whole; make room, then the same command with "
            "--resume_from_checkpoint true goes on from the newest"
        )

    def explain_dataset(self, error: BaseException, message: str, frames: list[str]) -> str | None:
        name = self.script_args.dataset_name
        if is_hub_error(error):
            return f"dataset {name}: {message.rstrip('.')}; {HUB}"
        if isinstance(error, StopIteration):
            return f"dataset {name} has no rows"
        if isinstance(error, KeyError) and "to_messages" in frames:
            return explain_missing_column(self.script_args, message)
        if isinstance(error, ValueError) and "to_messages" in frames:
            return f"dataset {name}: {message}"
        if isinstance(error, KeyError):
            return f"dataset {name} has no split {message}: pass another --dataset_train_split"
        if isinstance(error, ValueError) and frames[-1] == "split_by_prompt":
            return message
        cause = ""
        if error.__cause__:
            cause = f" ({' '.join(str(error.__cause__).split())})"
        sentence = f"dataset {name} cannot be read: {type(error).__name__}: {message}{cause}"
        if "load_dataset" in frames and not Path(name).exists():
            return f"{sentence}; {HUB}"
        return sentence

    def explain_model(self, error: BaseException, message: str, frames: list[str]) -> str | None:
        name = self.model_args.model_name_or_path
        if any(words in message for words in REMOTE_CODE_WORDS):
            return (
                f"model {name} runs Python code of its own, which can do anything on this machine: read its .py files, "
                "then --trust_remote_code true"
            )
        if isinstance(error, OSError) and "no file named model.safetensors" in message:
            load = f"AutoModelForCausalLM.from_pretrained('{name}', dtype='auto')"
            return (
                f"model {name} has no model.safetensors, and pytorch_model.bin can run code when it is loaded; where "
                "you trust it, convert it once and copy the tokenizer files beside it: "
                f"python -c \"from transformers import *; {load}.save_pretrained('converted')\""
            )
        if is_hub_error(error) or (isinstance(error, OSError) and "from_pretrained" in frames):
            return f"model {name}: {message.rstrip('.')}; {HUB}"
        if isinstance(error, ImportError):
            return f"a package is missing: {message.rstrip('.')}"
        if isinstance(error, ValueError):
            return message
        if isinstance(error, OSError | TypeError | KeyError | RuntimeError | TemplateError):
            return f"{type(error).__name__}: {message}"
        return None


def is_hub_error(error: BaseException) -> bool:
    modules = {parent.__module__.split(".")[0] for parent in type(error).__mro__}
    return (
        isinstance(error, ConnectionError) or "huggingface_hub" in modules or "DatasetNotFound" in type(error).__name__
    )
