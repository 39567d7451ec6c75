"""What is coloured, and where: a child on a pseudo-terminal, in a pipe, and with NO_COLOR.

Each of these turns the file red (tried): a console that always takes itself for a terminal; NO_COLOR not looked
at in colour(); check's findings in the style of what passed.
"""

import os
import subprocess
import sys
from functools import partial

import pytest

from data_prep import check
from data_prep.common import terminal
from tests.helpers.runs import MODULES

PRINT_A_VERDICT = "from data_prep.common.terminal import colour; print(colour('3 with findings', 'failed'))"
PLAIN = "3 with findings"


def print_on(stream: int, **environment: str) -> None:
    """Print a verdict in a child whose stdout is a file descriptor."""
    names = dict(MODULES) | {"TERM": "xterm"} | environment
    for name in ("NO_COLOR", "FORCE_COLOR"):
        if name not in environment:
            names.pop(name, None)
    subprocess.run([sys.executable, "-c", PRINT_A_VERDICT], env=names, stdout=stream, check=True)


@pytest.mark.parametrize(
    ("is_terminal", "environment", "is_coloured"),
    [
        (True, {}, True),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"TERM": "dumb"}, False),
        (False, {}, False),
    ],
)
def test_colour_is_for_a_terminal_that_wants_it(is_terminal, environment, is_coloured):
    reader, writer = os.openpty() if is_terminal else os.pipe()
    print_on(writer, **environment)
    text = os.read(reader, 1000).decode().strip()
    os.close(writer)
    os.close(reader)
    assert text == ("\x1b[1;31m3 with findings\x1b[0m" if is_coloured else PLAIN)


def test_check_shows_findings_in_red_and_none_in_green(tmp_path, capsys, monkeypatch):
    coloured = partial(terminal.Console, force_terminal=True, color_system="standard", no_color=False)
    monkeypatch.setattr(terminal, "Console", coloured)
    summary = check.Summary(keep=False)
    summary.add(2, [])
    summary.print_table(tmp_path)
    assert capsys.readouterr().out == f"{tmp_path}: 2 rows, \x1b[32m0 with findings\x1b[0m\n"
    summary.add(1, [check.Finding("rows.jsonl", 1, "a", "empty text", "")])
    summary.print_table(tmp_path)
    out = capsys.readouterr().out
    assert f"{tmp_path}: 3 rows, \x1b[1;31m1 with findings\x1b[0m\n" in out
    assert "\x1b[1;31mempty text\x1b[0m" in out
