"""What every command of data_prep does alike."""

import argparse
import signal
import sys

from .errors import UsageError


def make_parser(doc, **kwargs):
    """An argument parser as every script of this room has it: its docstring as help, no abbreviations."""
    form = argparse.RawTextHelpFormatter
    return argparse.ArgumentParser(description=doc, formatter_class=form, allow_abbrev=False, **kwargs)


def add_num_proc(parser):
    parser.add_argument("--num_proc", type=int, default=None, help="processes, default all processors; no other result")


def run_command(parser, run):
    """The exit code of a script: that of run(arguments), 2 with UsageError's sentence, or 130 after Ctrl-C."""
    args = parser.parse_args()
    if sys.modules["__main__"].__spec__ is not None and sys.modules["__main__"].__spec__.name.startswith("data_prep."):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was written aside is removed
    try:
        if (getattr(args, "num_proc", None) or 1) < 1:
            raise UsageError(f"--num_proc {args.num_proc}: pass a number of at least 1")
        return run(args)
    except UsageError as error:
        return print_error(str(error))
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130


def print_error(sentence):
    """Print one sentence and return 2, the exit code for bad input."""
    print(sentence, file=sys.stderr)
    return 2


def format_counts(refused):
    """ "3 empty text, 1 not JSON" """
    return ", ".join(f"{count:,} {reason}" for reason, count in refused.most_common())
