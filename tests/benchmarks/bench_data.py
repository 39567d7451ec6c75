"""Time normalize, check, exact dedup, split and mix against the way of most tutorials: `datasets` map and filter and a
Python MD5 set. Prints rows/s, the ratio and the resident memory, and plots the cost over the number of rows.

    python -m tests.benchmarks.bench_data --raw ../shared/data --rows 10000 100000 1000000 --plot cost.png

--raw is a folder with gsm8k/train.jsonl, cmath/cmath_dev.jsonl and chat/sharegpt_zh_1K_format.jsonl: rows are theirs,
each made different by a number, one in twenty twice. A benchmark, not a test: run it on an idle machine. Memory is the
sum of the proportional set sizes (PSS) of all processes, sampled ten times a second.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
MIX = """
strategy: interleave
stop: first_exhausted
sources:
  - {path: a, weight: 0.6}
  - {path: b, weight: 0.4}
"""


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_raw_rows(folder: Path, count: int, out: Path) -> None:
    """Write count rows to out/a.jsonl and out/b.jsonl, three to two."""
    pairs = [(row["question"], row["answer"]) for row in read_lines(folder / "gsm8k" / "train.jsonl")]
    pairs += [(row["input"], row["golden"]) for row in read_lines(folder / "cmath" / "cmath_dev.jsonl")]
    for row in read_lines(folder / "chat" / "sharegpt_zh_1K_format.jsonl"):
        texts = [turn["value"][:600] for turn in row["conversations"][:2]]
        if len(texts) == 2 and all(text.strip() for text in texts):
            pairs.append(tuple(texts))
    with open(out / "a.jsonl", "w", encoding="utf-8") as a, open(out / "b.jsonl", "w", encoding="utf-8") as b:
        for number in range(count):
            label = number - 1 if number % 20 == 19 else number
            question, answer = pairs[label % len(pairs)]
            turns = [{"role": "user", "content": f"({label}) {question}"}, {"role": "assistant", "content": answer}]
            file = a if number % 100 < 60 else b
            file.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")


def run_ours(folder: Path, num_proc: int) -> None:
    def run(name: str, *flags: str) -> None:
        command = [sys.executable, "-m", f"data_prep.{name}", *flags]
        if num_proc:
            command += ["--num_proc", str(num_proc)]
        environment = {**os.environ, "PYTHONPATH": str(REPO)}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)

    (folder / "mix.yaml").write_text(MIX)
    for name in ("a", "b"):
        run("normalize", "messages", f"{name}.jsonl", "--out", f"pools/{name}")
        run("check", f"pools/{name}")
    run("mix", "mix.yaml", "--pools", "pools", "--out", "mixed")


def run_tutorial(folder: Path, num_proc: int) -> None:
    """Do the 4080 tutorial's steps in a process of their own."""
    command = [sys.executable, __file__, "--tutorial", folder, "--num_proc", str(num_proc)]
    subprocess.run(command, check=True, capture_output=True)


def tutorial(folder: Path, num_proc: int | None) -> None:
    """Clean and keep in map and filter, MD5 of json.dumps(messages) per set and again after mixing, shuffle,
    interleave, split, save_to_disk and JSON lines."""
    import hashlib
    import re

    from datasets import Dataset, interleave_datasets, load_dataset

    control = re.compile(r"</?think>|<\|im_start\|>|<\|im_end\|>|<\|assistant\|>|<\|user\|>")

    def clean(row: dict) -> dict:
        turns = []
        for turn in row["messages"]:
            turns.append({**turn, "content": control.sub("", turn["content"].replace("\r", "")).strip()})
        return {"messages": turns}

    def is_sound(row: dict) -> bool:
        roles = [turn["role"] for turn in row["messages"]]
        return roles == ["user", "assistant"] * (len(roles) // 2) and all(turn["content"] for turn in row["messages"])

    def deduplicate(rows: Dataset) -> Dataset:
        seen = set()

        def is_new(row: dict) -> bool:
            digest = hashlib.md5(json.dumps(row["messages"], ensure_ascii=False).encode()).hexdigest()
            if digest in seen:
                return False
            seen.add(digest)
            return True

        return rows.filter(is_new)

    parts = []
    for name in ("a", "b"):
        cache = str(folder / "cache")
        rows = load_dataset("json", data_files=str(folder / f"{name}.jsonl"), split="train", cache_dir=cache)
        rows = rows.map(clean, num_proc=num_proc).filter(is_sound, num_proc=num_proc)
        parts.append(deduplicate(rows).shuffle(seed=42))
    mixed = interleave_datasets(parts, probabilities=[0.6, 0.4], seed=42, stopping_strategy="first_exhausted")
    sets = deduplicate(mixed).train_test_split(0.02, seed=42)
    sets.save_to_disk(str(folder / "theirs"))
    for split, rows in sets.items():
        rows.to_json(str(folder / "theirs" / f"{split}.jsonl"), force_ascii=False)


class Memory(threading.Thread):
    """The peak PSS (bytes) of this process' children and theirs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.1):
            self.peak = max(self.peak, sum(map(read_pss, find_children(os.getpid()))))


def find_children(pid: int) -> list[int]:
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            for child in map(int, path.read_text().split()):
                found += [child, *find_children(child)]
        except OSError:  # it has ended
            continue
    return found


def read_pss(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    except OSError:  # it has ended
        pass
    return 0


@dataclass
class Measured:
    seconds: float
    peak: int  # bytes


def measure(run: Callable[[Path, int], None], folder: Path, num_proc: int) -> Measured:
    memory = Memory()
    memory.start()
    start = time.monotonic()
    run(folder, num_proc)
    seconds = time.monotonic() - start
    memory.over.set()
    return Measured(seconds, memory.peak)


def plot(file: Path, counts: list[int], ours: list[float], theirs: list[float]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    axis.loglog(counts, theirs, "o-", label="datasets map/filter + MD5 set")
    axis.loglog(counts, ours, "o-", label="normalize + check + mix")
    axis.loglog(counts, [ours[-1] * count / counts[-1] for count in counts], ":", color="grey", label="linear")
    axis.set(xlabel="rows", ylabel="seconds", title="normalize, check, exact dedup, split, mix")
    axis.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--raw", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--num_proc", type=int, default=0, help="0: as the commands choose it")
    parser.add_argument("--their_num_proc", type=int, default=1, help="of their map and filter; the MD5 set has one")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--tutorial", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tutorial:
        tutorial(args.tutorial, args.num_proc if args.num_proc > 1 else None)
        return
    ours = []
    theirs = []
    for count in args.rows:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_raw_rows(args.raw, count, folder)
            size = sum((folder / f"{part}.jsonl").stat().st_size for part in "ab")
            our = measure(run_ours, folder, args.num_proc)
            their = measure(run_tutorial, folder, args.their_num_proc)
            report = json.loads((folder / "mixed" / "report.json").read_text())
        ours.append(our.seconds)
        theirs.append(their.seconds)
        line = f"{count:>9,} rows, {size / 1e6:,.0f} MB: {our.seconds:.1f} s ({count / our.seconds:,.0f} rows/s, "
        line += f"{our.peak / 2**30:.2f} GiB), tutorial {their.seconds:.1f} s ({their.peak / 2**30:.2f} GiB), ratio "
        line += f"{their.seconds / our.seconds:.1f}; out {report['out']}, refused {report['refused']}"
        print(line, flush=True)
    if args.plot:
        plot(args.plot, args.rows, ours, theirs)


if __name__ == "__main__":
    main()
