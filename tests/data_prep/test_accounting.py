"""in + added = out + refused for every step of data_prep, read from the files that it wrote, on fuzzed rows; and an
interrupted step leaves nothing. The rows that came in are counted here, the rows that came out by datasets.

Each of these turns the suite red (tried): a refused row not listed; a row listed twice; a step that drops a row
silently; files written in place.
"""

import io
import json
import random
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from unittest import mock

import pytest
from datasets import load_from_disk

from data_prep.common import writer
from data_prep.common.exact_numbers import read_json_exactly
from tests.helpers.runs import REPO

TEMPLATE = REPO / "chat_templates" / "qwen3.jinja"


def run(script, *args):
    """The script's main() here: exit code and what it printed."""
    out, main = io.StringIO(), import_module(f"data_prep.{script}").main
    with mock.patch("sys.argv", [f"{script}.py", *map(str, args)]), redirect_stdout(out), redirect_stderr(out):
        try:
            code = main()
        except SystemExit as error:
            code = error.code
    return code, out.getvalue()


WORDS = ["one", "two", "three", "four", "five", "sorry", "cannot", "你好", "世界", "<b>", "7", "8"]


def chat(rng, number):
    turns = []
    for turn in range(rng.choice([1, 1, 2, 3])):
        words = rng.choices(WORDS, k=rng.randrange(1, 60))
        turns.append({"role": "user", "content": f"Question {number % 90} {turn}?"})
        turns.append(
            {"role": "assistant", "content": rng.choice(["", "\n"] * (rng.random() < 0.1) + [" "]) + " ".join(words)}
        )
        if rng.random() < 0.2:
            turns[-1]["reasoning_content"] = rng.choice(["so", "\n\nwell", "</think>", ""])
    return {"messages": turns} | ({"id": f"r{number % 97}"} if rng.random() < 0.5 else {})


VALUES = [None, 0, 1.5, True, "", "x", "\ud800", "\x00", "<|im_end|>", [], [None], {}, {"a": None}, "a" * 3000, 10**30]


def fuzzed(rng, number):
    """A line of JSON that is sound in half of the cases, and in the others broken somewhere."""
    row = chat(rng, number)
    broken = rng.random()
    if broken < 0.15:
        rng.choice(row["messages"])[rng.choice(["role", "content", "tool_calls", "name", "loss_mask"])] = rng.choice(
            VALUES
        )
    elif broken < 0.25:
        row[rng.choice(["messages", "tools", "tags", "chat_template_kwargs", "source", "lang"])] = rng.choice(VALUES)
    line = json.dumps(row, ensure_ascii=rng.random() < 0.9 or "\\ud800" in json.dumps(row))
    if 0.25 < broken < 0.32:
        line = line[: rng.randrange(len(line))].strip() or "{"
    return line


read_json_exactly()  # datasets alone reads no number of over 64 bits


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """(folder with raw.jsonl and pool/, rows in raw.jsonl)"""
    folder, rng = tmp_path_factory.mktemp("raw"), random.Random(7)
    lines = [fuzzed(rng, number) for number in range(400)]
    (folder / "raw.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogatepass")
    code, said = run("normalize", "messages", folder / "raw.jsonl", "--out", folder / "pool", "--num_proc", 1)
    assert code == 0, said
    writer.write_rows(
        folder / "eval", "own", {"train": [row for _, row in zip(range(3), rows_of(folder / "pool"), strict=False)]}
    )
    (folder / "mix.yaml").write_text(
        "validation: {min: 20}\nsources: [{path: pool}, {path: eval, weight: 0.2, epochs: 9}]"
    )
    return folder, len(lines)


def rows_of(folder):
    return [
        {k: v for k, v in row.items() if v is not None} for split in load_from_disk(folder).values() for row in split
    ]


def accounts(out, total):
    """Holds OUT's report, rows and rejected.jsonl against each other and against the rows that came in."""
    if out.suffix == ".jsonl":
        report, rejected = (out.with_suffix(f".{name}") for name in ("report.json", "rejected.jsonl"))
        rows = len(out.read_text(encoding="utf-8").splitlines())
    else:
        report, rejected = out / "report.json", out / "rejected.jsonl"
        rows = sum(len(split) for split in load_from_disk(out).values())
    report = json.loads(report.read_text())
    entries = [json.loads(line) for line in rejected.read_text(encoding="utf-8").splitlines()]
    assert report["in"] == total and sum(report["out"].values()) == rows > 0
    assert Counter(entry["reason"] for entry in entries) == report["refused"]
    assert total + report.get("added", 0) == rows + len(entries)
    assert all({"file", "line", "id", "reason"} <= entry.keys() for entry in entries)
    places = [(entry["file"], entry["line"], entry["id"]) for entry in entries]
    assert len({*places}) == len(places)
    return report


def test_normalize(raw):
    folder, total = raw
    report = accounts(folder / "pool", total)
    assert len(report["refused"]) > 6 and report["out"]["train"] > total / 2
    code, _ = run("normalize", "messages", folder / "raw.jsonl", "--out", folder / "rows.jsonl", "--num_proc", 1)
    assert code == 0 and accounts(folder / "rows.jsonl", total)["hash"] == report["hash"]


STEPS = {  # name: (flags, rows in: those of the raw file or of the pool)
    "check": (["{raw}", "--fix", "--chat_template_path", TEMPLATE], "raw"),
    "filter": (["{raw}", "--repetition", "--refusals", "--min_chars", 12, "--lang", "en"], "raw"),
    "dedup": (["{raw}", "--threshold", 0.5, "--by", "prompt"], "raw"),
    "decontaminate": (["{raw}", "--against", "{eval}"], "raw"),
    "expand_turns": (["{raw}", "--chat_template_path", TEMPLATE], "raw"),
    "compile": (
        [
            "{pool}",
            "--recipe",
            REPO / "recipes" / "qwen3_qlora.py",
            "--chat_template_path",
            TEMPLATE,
            "--model_name_or_path",
            "{model}",
            "--eval_rows",
            30,
            "--max_length",
            256,
            "--packing",
            "false",
        ],
        "pool",
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_step(raw, demo, tmp_path, name):
    folder, total = raw
    flags, source = STEPS[name]
    paths = {"raw": folder / "raw.jsonl", "pool": folder / "pool", "eval": folder / "eval", "model": demo / "init"}
    flags = [str(flag).format(**paths) for flag in flags]
    code, said = run(name, *flags, "--out", tmp_path / "out", "--num_proc", 1)
    assert code in (0, 1), said
    report = accounts(tmp_path / "out", total if source == "raw" else len(rows_of(folder / "pool")))
    assert report["refused"]


def test_mix(raw, tmp_path):
    folder, _ = raw
    code, said = run("mix", folder / "mix.yaml", "--pools", folder, "--out", tmp_path / "out", "--num_proc", 1)
    assert code == 0, said
    report = accounts(tmp_path / "out", len(rows_of(folder / "pool")) + 3)
    assert report["refused"]["duplicate of another pool"] == 3


@pytest.mark.parametrize("name", STEPS)
def test_an_interrupted_step_leaves_nothing(raw, demo, tmp_path, name):
    folder, _ = raw
    paths = {"raw": folder / "raw.jsonl", "pool": folder / "pool", "eval": folder / "eval", "model": demo / "init"}
    flags = [str(flag).format(**paths) for flag in STEPS[name][0]]
    script = import_module(f"data_prep.{name}")
    with mock.patch.object(script, "parallel_map", side_effect=KeyboardInterrupt):
        code, said = run(name, *flags, "--out", tmp_path / "out", "--num_proc", 1)
    assert code == 130 and said.strip() == "interrupted: nothing was written"
    assert not [*tmp_path.iterdir()]
