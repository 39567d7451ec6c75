"""eval/picture.py: tokens in lines, what is trained marked, and a picture of a run.

Breaks tried, each seen red: a newline that ends no line, a token that runs over the edge, no ellipsis.
"""

import json

from data_prep.common.preview_text import ShownToken
from eval import picture


def token(text, trained=False, special=False):
    return ShownToken(text, [1], trained, special, False)


def test_tokens_in_lines():
    """By hand: a newline is shown and ends its line; a token over the edge goes on in the next one."""
    tokens = [token("<s>", special=True), token("ab\n"), token("x" * (picture.COLUMNS - 1)), token("yz", trained=True)]
    pieces = [(one.line, one.column, one.text, one.is_trained) for one in picture.lay_out(tokens)]
    assert pieces == [
        (0, 0, "<s>", False),
        (0, 3, "ab⏎", False),
        (1, 0, "x" * (picture.COLUMNS - 1), False),
        (1, picture.COLUMNS - 1, "y", True),
        (2, 0, "z", True),
    ]


def test_what_does_not_fit_is_an_ellipsis():
    *_, last = picture.lay_out([token("word\n")] * 40)
    assert (last.line, last.text) == (picture.LINES - 1, "…")
    assert len(list(picture.lay_out([token("word\n")] * 40))) == picture.LINES


def test_a_run_is_drawn_and_the_same_twice(run_recipe, demo, tmp_path, capsys):
    run = run_recipe("qwen3_full")
    rows = demo / "rows" / "chat"
    files = [tmp_path / "one.png", tmp_path / "two.png"]
    for file in files:
        assert picture.main([str(run), "--data", str(rows), "--row", "3", "--out", str(file)]) == 0
    assert files[0].read_bytes() == files[1].read_bytes() and files[0].read_bytes()[1:4] == b"PNG"
    capsys.readouterr()
    assert picture.main([str(run), "--data", str(rows), "--row", "99999", "--out", str(files[0])]) == 2
    assert "rows, from 0" in capsys.readouterr().err
    assert picture.main([str(tmp_path), "--data", str(rows), "--out", str(files[0])]) == 2
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n")
    assert picture.main([str(tmp_path), "--data", str(rows), "--out", str(files[0])]) == 2
    assert "is no run folder" in capsys.readouterr().err
