"""Prepare data for training, a command a step: python -m data_prep.NAME."""

import os
import signal
import sys

INTERRUPTED = 130  # exit code
INTERRUPT_MESSAGE = "interrupted: nothing was written"


def end_at_interrupt(*_: object) -> None:
    """Say that the command was interrupted, and end it."""
    os.write(2, f"{INTERRUPT_MESSAGE}\n".encode())
    os._exit(INTERRUPTED)  # no exception: a library that is being imported might take it for its own


def is_run_by_name() -> bool:
    """Return whether Python imports this package for python -m data_prep.NAME: only then is argv this one meanwhile."""
    names = [word.removeprefix("-m") for word in sys.orig_argv]
    return sys.argv[:1] == ["-m"] and any(name.startswith("data_prep.") for name in names)


# the imports of a command take a second, in which Ctrl-C would end it with a traceback; then run_command takes over
if is_run_by_name() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end_at_interrupt)
