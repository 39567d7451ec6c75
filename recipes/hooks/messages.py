"""What the hooks say: a line from one process, with the recipe's name before it."""

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import NoReturn


class UsageError(ValueError):
    """What the user can mend, in one sentence: what, where and what to do. Shown without a traceback."""


def recipe_name() -> str:
    """Return the file name of the recipe that runs."""
    return Path(sys.argv[0]).name


def is_main_process() -> bool:
    """Return whether this is rank 0, by the launcher's environment: true before torch.distributed is initialized."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print a line once a run, not once a rank."""
    if is_main_process():
        print(f"{recipe_name()}: {text}", flush=True)


def relative_path(path: str | Path) -> str:
    """Return a path as one would type it from here."""
    path = Path(path)
    here = Path.cwd()
    if path.is_absolute() and path.is_relative_to(here):
        return str(path.relative_to(here))
    return str(path)


def print_refusal(message: str) -> None:
    """Print one sentence, once a run: the last line that the recipe itself prints.

    torchrun, which `accelerate launch` uses for several processes, shows what lies in the file that it names in
    TORCHELASTIC_ERROR_FILE at the end of its own report. Other ranks wait a moment: as soon as one ends, the launcher
    kills the rest, and rank 0 has to speak first.
    """
    sentence = f"{recipe_name()}: {message}"
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file:
        report = {"message": {"message": sentence, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with contextlib.suppress(OSError):
            Path(error_file).write_text(json.dumps(report))
    if is_main_process():
        print(sentence, file=sys.stderr, flush=True)
    else:
        time.sleep(3)


def refuse(message: str, exit_code: int) -> NoReturn:
    """Print one sentence, once a run, and end it."""
    print_refusal(message)
    sys.exit(exit_code)
