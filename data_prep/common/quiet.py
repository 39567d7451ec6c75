"""Library messages that nobody who runs a command can act on are left out, each by its own words.

What is not named here still shows; recipes/hooks/quiet.py has more, of training. This file imports the standard library
alone, so that it stands before the libraries do.
"""

import logging
import re
import sys
import warnings
from collections.abc import Iterable, Mapping

WARNINGS = {  # how the message of a Python warning begins: why there is nothing to do about it
    "`is_gradient_checkpointing` is deprecated": "TRL and PEFT read the old name, which transformers still serves",
}
LOGGED = {  # logger: how its messages begin, but for accelerate's [RANK 0]
    # a kernel for 4-bit layers on a CPU, which needs a version of `kernels` that does not exist yet
    "bitsandbytes.backends.cpu.ops": ["Failed to load CPU gemm_4bit_forward"],
    "DeepSpeed": ["Setting accelerator to CPU."],  # whoever has no GPU knows
}


class OtherMessages(logging.Filter):
    """Lets a logger's messages pass but for those that begin as one of these."""

    def __init__(self, beginnings: Iterable[str]) -> None:
        super().__init__()
        self.beginnings = tuple(beginnings)

    def filter(self, record: logging.LogRecord) -> bool:
        message = re.sub(r"^\[RANK \d+\] ", "", record.getMessage())
        return not message.startswith(self.beginnings)


def silence(warned: Iterable[str] = WARNINGS, logged: Mapping[str, Iterable[str]] = LOGGED) -> None:
    """Leave out these warnings, and these messages of loggers."""
    for beginning in warned:
        warnings.filterwarnings("ignore", message=re.escape(beginning))
    for name, beginnings in logged.items():
        logging.getLogger(name).addFilter(OtherMessages(beginnings))


def hide_progress_bars() -> None:
    """Leave the progress bars of what is imported already to a terminal; in a file they would be one long line."""
    if sys.stderr.isatty():
        return
    if "transformers" in sys.modules:
        import transformers

        transformers.logging.disable_progress_bar()
    if "datasets" in sys.modules:
        import datasets

        datasets.disable_progress_bars()
