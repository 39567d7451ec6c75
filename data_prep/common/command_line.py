"""What every command of data_prep does alike: arguments, exit codes, one sentence for bad input."""

import argparse
import difflib
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from .. import INTERRUPT_MESSAGE, INTERRUPTED, end_at_interrupt
from .errors import UsageError
from .next_step import print_end
from .quiet import silence

TERMINATED = 143


class CommandParser(argparse.ArgumentParser):
    """argparse's parser, whose refusal of a misspelt flag or choice names the nearest one.

    An unknown flag is refused before a missing one: it may be what is missing.
    """

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        words = sys.argv[1:] if args is None else [str(word) for word in args]
        unknown = self.find_unknown(words)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self.suggest_flags(unknown)}")
        return super().parse_args(words, namespace)

    def find_unknown(self, words: Sequence[str]) -> list[str]:
        """Return the words before a `--` that look like flags and are none."""
        unknown = []
        for word in words:
            if word == "--":
                break
            if word.startswith("--") and word.split("=")[0] not in self._option_string_actions:
                unknown.append(word.split("=")[0])
        return unknown

    def suggest_flags(self, unknown: Iterable[str]) -> str:
        """Return the nearest flag of each, where one is near, as the end of a sentence."""
        nearest = []
        for word in unknown:
            nearest += difflib.get_close_matches(word, self._option_string_actions, n=1)
        if not nearest:
            return ""
        return f": the nearest is {', '.join(nearest)}"

    def error(self, message: str) -> NoReturn:
        super().error(message + suggest_choice(message))


def suggest_choice(message: str) -> str:
    """Return the choice nearest to the one that argparse refuses, as the end of its sentence; "" for others."""
    refused = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)$", message)
    if refused is None:
        return ""
    choices = [choice.strip("' ") for choice in refused.group(2).split(",")]
    nearest = difflib.get_close_matches(refused.group(1), choices, n=1)
    if not nearest:
        return ""
    return f": the nearest is {nearest[0]}"


def make_parser(description: str) -> CommandParser:
    """Return an argument parser that shows a docstring as it stands and takes no abbreviated flags."""
    return CommandParser(description=description, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False)


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
        code = run(args)
        print_end(parser.prog, args, code)
        return code
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
