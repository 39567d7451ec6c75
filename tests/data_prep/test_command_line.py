"""A misspelt flag or choice is refused with the nearest one, in every command of data_prep and eval.

Each of these turns the file red (tried): a missing flag told before the misspelt one; no suggestion of choices.
"""

import importlib
import re
import sys

import pytest

from data_prep.common.command_line import make_parser
from tests.helpers.runs import REPO

PASSES_ON = ("fit", "sweep")  # what they do not know is the recipe's


def list_commands():
    for folder in ("data_prep", "eval"):
        for path in sorted((REPO / folder).glob("*.py")):
            if "__main__" in path.read_text(encoding="utf-8"):
                yield f"{folder}.{path.stem}"


@pytest.fixture
def parser():
    parser = make_parser("Print.")
    parser.add_argument("source", choices=["messages", "sharegpt"])
    parser.add_argument("--num_proc", type=int)
    parser.add_argument("--out", required=True)
    return parser


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--nun_proc", "3"], "unrecognized arguments: --nun_proc: the nearest is --num_proc"),
        (["messages", "--ot=x"], "unrecognized arguments: --ot: the nearest is --out"),
        (["messages", "--out", "x", "--zzzz"], "unrecognized arguments: --zzzz"),
        (["shargpt", "--out", "x"], "the nearest is sharegpt"),
        (["qq", "--out", "x"], "(choose from messages, sharegpt)"),
        (["messages"], "the following arguments are required: --out"),
    ],
)
def test_a_refusal_names_the_nearest(parser, capsys, words, sentence):
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(words)
    said = capsys.readouterr().err.strip()
    assert stopped.value.code == 2
    assert said.replace("'", "").endswith(sentence)


def test_words_behind_two_dashes_are_no_flags(parser):
    assert parser.parse_args(["--out", "x", "--", "messages"]).source == "messages"


@pytest.mark.parametrize("name", list_commands())
def test_every_command_names_the_nearest_flag(name, capsys, monkeypatch):
    """A letter of one of its own flags is left out, and nothing else is passed."""
    if name.split(".")[1] in PASSES_ON:
        pytest.skip("what it does not know goes to the recipe")
    command = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit):
        command.main()
    flags = [flag for flag in re.findall(r"^  (--\w+)", capsys.readouterr().out, re.MULTILINE) if len(flag) > 5]
    wrong = flags[0][:4] + flags[0][5:]
    monkeypatch.setattr(sys, "argv", [name, wrong, "1"])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and f"unrecognized arguments: {wrong}: the nearest is --" in said
