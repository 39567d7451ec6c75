"""What every command of data_prep does alike: arguments, exit codes, one sentence for bad input."""

import argparse
import signal
import sys
from collections import Counter
from collections.abc import Callable

from .. import INTERRUPT_MESSAGE, INTERRUPTED, end_at_interrupt
from .errors import UsageError
from .quiet import silence

TERMINATED = 143


def make_parser(description: str) -> argparse.ArgumentParser:
    """Return an argument parser that shows a docstring as it stands and takes no abbreviated flags."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )


def add_num_proc(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num_proc", type=int, help="processes, default all processors; the result is the same")


def run_command(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int]) -> int:
    """Return the exit code of a command: run(arguments)'s, 2 with UsageError's sentence, or 130 after Ctrl-C."""
    args = parser.parse_args()
    silence()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a row may hold what no terminal can show
    try:
        if is_command():
            signal.signal(signal.SIGTERM, stop_at_signal)
        if signal.getsignal(signal.SIGINT) is end_at_interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if getattr(args, "num_proc", None) is not None and args.num_proc < 1:
            raise UsageError(f"--num_proc {args.num_proc}: pass a number of at least 1")
        return run(args)
    except UsageError as error:
        return print_error(str(error))
    except KeyboardInterrupt:
        print(INTERRUPT_MESSAGE, file=sys.stderr)
        return INTERRUPTED


def is_command() -> bool:
    """Return whether this process runs a command of data_prep, not a test or a program that imports one."""
    spec = sys.modules["__main__"].__spec__
    return spec is not None and spec.name.startswith("data_prep.")


def stop_at_signal(*_: object) -> None:
    sys.exit(TERMINATED)  # as an exception, which removes what was written aside


def print_error(sentence: str) -> int:
    """Print one sentence and return 2, the exit code for bad input."""
    print(sentence, file=sys.stderr)
    return 2


def format_counts(counts: Counter) -> str:
    """Return "3 empty text, 1 not JSON"."""
    return ", ".join(f"{count:,} {name}" for name, count in counts.most_common())
