"""data_prep/shards.py on datatrove's local executor: the dataset folders of its tasks beside those of normalize.py and
dedup.py in one process, the accounting of every row, and options that would have no effect.

Each of these turns the suite red (tried): keys dealt by file instead of by key; the last of equal rows kept; files of
more than one task left out; the lines of refused rows counted as kept ones; a task without a row left out of the count;
keys that are not kept lost between the stages; exit 0 where no row is left; --partition or --time ignored, there or
here.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from datasets import load_from_disk

from tests.helpers.runs import MODULES

pytest.importorskip("datatrove")


def script(name: str, *flags: object, cwd: Path, code: int = 0, env: dict[str, str] = MODULES) -> str:
    """Return what a command of data_prep prints."""
    command = [sys.executable, "-m", f"data_prep.{name}", *map(str, flags)]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def chat(question: str, answer: str = "yes") -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_shards_keep_what_one_machine_keeps(tmp_path: Path) -> None:
    """Five files, two tasks; rows repeat within a file, across files of a task and across tasks; some are refused."""
    for number in (1, 2, 3, 4, 10):
        rows = [chat(f"Question {n * number % 50}?", f"answer {n % 7}") for n in range(120)]
        lines = [json.dumps(row) for row in rows]
        lines[3:3] = ['{"messages": 3}', "", "{cut", json.dumps(chat(""))]
        (tmp_path / f"chunk_{number}.jsonl").write_text("\n".join(lines) + "\n")
    files = [f"chunk_{number}.jsonl" for number in (1, 2, 3, 4, 10)]
    script("normalize", "messages", "chunk_*.jsonl", "--out", "pool", "--num_proc", 1, cwd=tmp_path)
    script("dedup", "pool", "--exact", "--out", "one", "--num_proc", 1, cwd=tmp_path)
    printed = script("shards", "messages", "chunk_*.jsonl", "--out", "big", "--tasks", 2, "--workers", 1, cwd=tmp_path)
    one = load_from_disk(tmp_path / "one")["train"]
    folders = [load_from_disk(tmp_path / "big" / str(task))["train"] for task in range(2)]
    rows = [row for folder in folders for row in folder]
    assert Counter(row["id"] for row in rows) == Counter(one["id"])
    assert {row["id"]: row["messages"] for row in rows} == {row["id"]: row["messages"] for row in one}
    assert f"{len(one):,} rows in 2 dataset folders of 615 rows" in printed
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
    printed = script(*again, 3, cwd=tmp_path, code=2)
    assert "begun with other files" in printed and printed.count("\n") == 1


def test_a_task_without_a_row_and_keys_that_are_not_kept_are_counted(tmp_path: Path) -> None:
    rows = [chat("one") | {"note": "x"}, chat("two") | {"note": "x", "mark": 1}, chat("three")]
    (tmp_path / "chunk_1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "chunk_2.jsonl").write_text('{"messages": 3}\n{cut\n')
    flags = ["messages", "chunk_*.jsonl", "--out", "big", "--tasks", 3, "--workers", 1]  # a task more than files
    printed = script("shards", *flags, cwd=tmp_path)
    assert "3 rows in 1 dataset folders of 5 rows" in printed and "keys not kept: 2 note, 1 mark" in printed
    reports = [json.loads((tmp_path / "big" / str(task) / "report.json").read_text()) for task in range(2)]
    assert reports[0]["keys_not_kept"] == {"mark": 1, "note": 2} and reports[0]["out"] == {"train": 3}
    assert reports[1]["in"] == 2 == sum(reports[1]["refused"].values()) and reports[1]["out"] == {}
    assert len((tmp_path / "big" / "1" / "rejected.jsonl").read_text().splitlines()) == 2
    assert not (tmp_path / "big" / "2").exists()
    (tmp_path / "chunk_1.jsonl").unlink()
    flags[3] = "none"
    printed = script("shards", *flags, cwd=tmp_path, code=1)
    assert "every row is refused" in printed and (tmp_path / "none" / "0" / "rejected.jsonl").is_file()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["messages", "--partition", "cpu"], "--partition"),
        (["messages", "--time", "1:00:00"], "--time"),
        (["messages", "--executor", "slurm"], "--partition"),
        (["messages", "--tasks", 0], "--tasks"),
        (["messages", "--workers", 0], "--workers"),
        (["fields"], "--map"),
        (["spelling"], "makes its rows"),
        (["nothing"], "unknown source"),
    ],
)
def test_options_without_an_effect_are_refused(tmp_path: Path, flags: list, words: str) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(chat("one")) + "\n")
    source, *more = flags
    printed = script("shards", source, "rows.jsonl", "--out", "big", "--tasks", 1, *more, cwd=tmp_path, code=2)
    assert words in printed and printed.count("\n") == 1 and not (tmp_path / "big").exists()


def test_slurm_is_passed_its_options(tmp_path: Path) -> None:
    """By an sbatch that does nothing: what stands in the scripts that Slurm would run."""
    (tmp_path / "rows.jsonl").write_text(json.dumps(chat("one")) + "\n")
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho Submitted batch job 17\n")
    (tmp_path / "sbatch").chmod(0o755)
    env = MODULES | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    flags = ["messages", "rows.jsonl", "--out", "big", "--tasks", 6, "--workers", 4, "--executor", "slurm"]
    script("shards", *flags, "--partition", "cpu", "--time", "01:02:03", cwd=tmp_path, env=env)
    for stage in ("normalize", "keys", "keep"):
        lines = (tmp_path / "big" / "logs" / stage / "launch_script.slurm").read_text().splitlines()
        assert {"#SBATCH --partition=cpu", "#SBATCH --time=01:02:03", "#SBATCH --array=0-5%4"} <= {*lines}
