"""The terminal: the one place that decides whether a command prints in colour, and how wide a table is.

Colour says what is good and what is bad, on a terminal alone: not in a pipe or a file, not where NO_COLOR is set
(https://no-color.org) or TERM is dumb. FORCE_COLOR asks for it in a pipe. All of that is rich's own rule.
"""

import sys

from rich.console import Console
from rich.text import Text

STYLES = {  # of verdicts, in every command
    "passed": "green",
    "better": "green",
    "failed": "bold red",
    "worse": "red",
    "note": "yellow",
    "not measured": "dim",
    "": "",
}


def make_console(pipe_width: int | None = None) -> Console:
    """Return a console on stdout that prints text as it stands: what looks like markup or an emoji's name is none.

    pipe_width: columns in a pipe or a file, which have no width: rich would take 80 and cut a table to it.
    """
    width = None if sys.stdout.isatty() else pipe_width
    return Console(width=width, markup=False, emoji=False, highlight=False)


def colour(text: str, verdict: str) -> str:
    """Return a text in the style of a verdict for print(), as it stands where nothing is coloured."""
    console = make_console()
    if console.no_color:  # rich would leave it bold
        return text
    with console.capture() as capture:
        console.print(Text(text, STYLES[verdict]), end="", soft_wrap=True)
    return capture.get()
