"""data_prep/shards.py on datatrove's local executor: the pools of its tasks against normalize.py and dedup.py in one
process, and the accounting of every row.

Each of these turns the suite red (tried): keys dealt by file instead of by key; the last of equal rows kept; files of
more than one task left out; the lines of refused rows counted as kept ones.
"""

import json
import subprocess
import sys
from collections import Counter

import pytest
from conftest import MODULES
from datasets import load_from_disk

pytest.importorskip("datatrove")


def script(name, *flags, cwd, code=0):
    command = [sys.executable, "-m", f"data_prep.{name}", *map(str, flags)]
    done = subprocess.run(command, cwd=cwd, env=MODULES, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def chat(question, answer="yes"):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_shards_keep_what_one_machine_keeps(tmp_path):
    """Five files, two tasks; rows repeat within a file, across files of a task and across tasks; some are refused."""
    for number in (1, 2, 3, 4, 10):
        rows = [chat(f"Question {n * number % 50}?", f"answer {n % 7}") for n in range(120)]
        lines = [json.dumps(row) for row in rows]
        lines[3:3] = ['{"messages": 3}', "", "{cut", json.dumps(chat(""))]
        (tmp_path / f"chunk_{number}.jsonl").write_text("\n".join(lines) + "\n")
    files = [f"chunk_{number}.jsonl" for number in (1, 2, 3, 4, 10)]
    script("normalize", "messages", "chunk_*.jsonl", "--out", "pool", "--num_proc", 1, cwd=tmp_path)
    script("dedup", "pool", "--exact", "--out", "one", "--num_proc", 1, cwd=tmp_path)
    said = script("shards", "messages", "chunk_*.jsonl", "--out", "big", "--tasks", 2, "--workers", 1, cwd=tmp_path)
    one = load_from_disk(tmp_path / "one")["train"]
    pools = [load_from_disk(tmp_path / "big" / str(task))["train"] for task in range(2)]
    found = [row for pool in pools for row in pool]
    assert Counter(row["id"] for row in found) == Counter(one["id"])
    assert {row["id"]: row["messages"] for row in found} == {row["id"]: row["messages"] for row in one}
    assert f"{len(one):,} rows in 2 pools of 615 rows" in said
    for task, mine in enumerate((files[::2], files[1::2])):
        report = json.loads((tmp_path / "big" / str(task) / "report.json").read_text())
        rejected = [json.loads(line) for line in (tmp_path / "big" / str(task) / "rejected.jsonl").open()]
        assert report["in"] == 123 * len(mine) == report["out"]["train"] + len(rejected)
        assert {*report["input"]} == {entry["file"] for entry in rejected} == {*mine}
        for entry in rejected:  # the line is that of the file
            line = (tmp_path / entry["file"]).read_text().split("\n")[entry["line"] - 1]
            if entry["reason"] == "duplicate":
                file, number = entry["detail"].removeprefix("repeats ").split(":")
                first = (tmp_path / file).read_text().split("\n")[int(number) - 1]
                assert json.loads(first) == json.loads(line)
                assert (files.index(file), int(number)) < (files.index(entry["file"]), entry["line"])
            else:
                assert line in ('{"messages": 3}', "{cut", json.dumps(chat("")))
    assert [path.name for path in (tmp_path / "big").iterdir() if path.name.startswith(".")] == []
    # a second start finds all tasks done; another plan is refused
    before = {path: path.read_bytes() for path in (tmp_path / "big").glob("?/**/*") if path.is_file()}
    again = ["shards", "messages", "chunk_*.jsonl", "--out", "big", "--workers", 1, "--tasks"]
    script(*again, 2, cwd=tmp_path)
    assert before == {path: path.read_bytes() for path in before}
    said = script(*again, 3, cwd=tmp_path, code=2)
    assert "begun with other files" in said and said.count("\n") == 1
