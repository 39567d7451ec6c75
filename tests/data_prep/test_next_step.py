"""Every step ends with the command of the next: each is typed as it was printed, from raw rows to the recipe's launch.

Tried, and red: the rejected rows of a .jsonl looked for in a folder; the next step of check without its --out.
"""

import json
import shlex
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from data_prep.common.next_step import describe_end
from tests.helpers.runs import MODULES

RECIPE = "recipes/qwen3_qlora.py"


def type_command(command: str, folder: Path) -> list[str]:
    """Run a printed command and return the lines that it prints."""
    words = shlex.split(command)
    assert words[:2] == ["python", "-m"]
    done = subprocess.run(
        [sys.executable, *words[1:], "--num_proc", "1"], env=MODULES, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode in (0, 1), done.stderr
    return done.stdout.splitlines()


def read_next(lines: list[str]) -> str:
    assert lines[-1].startswith("next: ")
    return lines[-1].removeprefix("next: ")


def test_raw_rows_reach_stats_by_what_is_printed(tmp_path):
    """Three rows, of which one is refused."""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    other = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    rows = [{"messages": turns}, {"messages": other}, {"messages": []}]
    (tmp_path / "raw.jsonl").write_text("".join([json.dumps(row) + "\n" for row in rows]))
    lines = type_command("python -m data_prep.normalize messages raw.jsonl --out rows.jsonl", tmp_path)
    assert lines[-2:] == ["refused rows: rows.rejected.jsonl", "next: python -m data_prep.check rows.jsonl"]
    assert len((tmp_path / "rows.rejected.jsonl").read_text().splitlines()) == 1
    lines = type_command(read_next(lines), tmp_path)
    assert read_next(lines) == "python -m data_prep.dedup rows.jsonl --out rows-dedup.jsonl"
    lines = type_command(read_next(lines), tmp_path)
    assert read_next(lines) == f"python -m data_prep.stats rows-dedup.jsonl --recipe {RECIPE}"


@pytest.mark.parametrize(
    ("name", "code", "given", "line"),
    [
        ("check", 1, {"path": "a b.jsonl"}, "python -m data_prep.check 'a b.jsonl' --fix --out 'a b-checked.jsonl'"),
        ("check", 0, {"path": "rows.parquet"}, "python -m data_prep.dedup rows.parquet --out rows-dedup"),
        ("check", 1, {"path": "a", "fix": True, "out": "b"}, "python -m data_prep.dedup b --out b-dedup"),
        ("mix", 0, {"out": "m", "recipe": "recipes/r.py"}, "python -m data_prep.stats m --recipe recipes/r.py"),
        ("stats", 0, {"data": "m", "recipe": "r.py"}, "python -m data_prep.preview m --recipe r.py"),
        (
            "preview",
            0,
            {"data": "m", "recipe": "r.py", "config": "c.yaml"},
            "accelerate launch r.py --config c.yaml --dataset_name m",
        ),
        (
            "preview",
            0,
            {"data": "m", "recipe": "r.py", "model_name_or_path": "a model", "packing": False, "max_length": 512},
            "accelerate launch r.py --model_name_or_path 'a model' --max_length 512 --packing false --dataset_name m",
        ),
        (
            "stats",
            0,
            {"data": "m", "recipe": "r.py", "max_length": 512},
            "python -m data_prep.preview m --recipe r.py --max_length 512",
        ),
        (
            "compile",
            0,
            {"out": "c", "recipe": "r.py"},
            "accelerate launch r.py --config recipes/configs/compiled.yaml --dataset_name c",
        ),
        ("compare", 0, {"tuned": [Path("runs/a")]}, "python -m eval.gate runs/a"),
        ("gate", 0, {"run": Path("runs/a")}, "python -m eval.card runs/a"),
        ("merge", 0, {"out": Path("runs/m")}, "transformers serve runs/m"),
    ],
)
def test_the_next_command_has_the_paths_of_this_one(name, code, given, line):
    args = Namespace(**{"out": None, "recipe": None, "config": None, "fix": False, "rows_left": 1} | given)
    assert list(describe_end(name, args, code)) == [f"next: {line}"]


@pytest.mark.parametrize(
    ("name", "code"), [("preview", 1), ("gate", 1), ("check", 1), ("normalize", 1), ("dedup", 2), ("fit", 0)]
)
def test_what_failed_has_no_next_command(name, code):
    args = Namespace(out=None, recipe="r.py", config=None, fix=False, rows_left=0, run=Path("a"), data="d")
    assert list(describe_end(name, args, code)) == []


def test_splits_and_refused_rows_of_a_folder(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps({"out": {"train": 1200, "validation": 30}}))
    (tmp_path / "rejected.jsonl").write_text("{}\n")
    args = Namespace(out=tmp_path, recipe=None, config=None)
    assert list(describe_end("filter", args, 0)) == [
        "splits: train 1,200, validation 30",
        f"refused rows: {tmp_path / 'rejected.jsonl'}",
        f"next: python -m data_prep.check {tmp_path}",
    ]
