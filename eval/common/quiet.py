"""Library messages that nobody who runs a command can act on are left out, each by its own words.

What is not named here still shows. recipes/hooks/quiet.py has those of training.
"""

import logging
import re
import sys
import warnings

WARNINGS = {  # how the message of a Python warning begins: why there is nothing to do about it
    "`is_gradient_checkpointing` is deprecated": "PEFT reads the old name, which transformers still serves",
}
LOGGED = {  # logger: how its message begins
    # a kernel for 4-bit layers on a CPU, which needs a version of `kernels` that does not exist yet
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
}


def is_wanted(record: logging.LogRecord) -> bool:
    """Return whether a message of one of LOGGED's loggers is another than the one that LOGGED names."""
    return not record.getMessage().startswith(LOGGED[record.name])


def silence() -> None:
    """Leave out what WARNINGS and LOGGED name."""
    for beginning in WARNINGS:
        warnings.filterwarnings("ignore", message=re.escape(beginning))
    for name in LOGGED:
        logging.getLogger(name).addFilter(is_wanted)


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
