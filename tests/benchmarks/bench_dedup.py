"""How fast data_prep/dedup.py removes near duplicates, and how much memory that takes:

    python -m tests.benchmarks.bench_dedup --rows 100000

Rows are made from the real files of ../shared/data: each is two or three conversations of theirs behind each other, one
row in twenty repeats an earlier one with a word changed, one in fifty repeats it as it is. Both kinds are counted, so
that the printed share of them that was found is a check of the result. Needs the shared folder.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
DATA = REPO.parent / "shared" / "data"


def read_conversations() -> list[list[str]]:
    """Return [question, answer] of the real files, Chinese and English, none so long that it outweighs others."""
    pairs = []
    for line in (DATA / "gsm8k" / "train.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        pairs.append([row["question"], row["answer"]])
    for name in ("ARC-Easy_train", "ARC-Challenge_train"):
        for line in (DATA / "arc" / f"{name}.jsonl").open(encoding="utf-8"):
            row = json.loads(line)
            pairs.append([row["question"], " ".join(row["choices"]["text"])])
    for line in (DATA / "chat" / "sharegpt_zh_1K_format.jsonl").open(encoding="utf-8"):
        turns = json.loads(line)["conversations"]
        pairs.append([turn["value"] for turn in turns[:2]])
    for row in json.loads((DATA / "preference" / "dpo_zh_demo.json").read_text(encoding="utf-8")):
        pairs.append([row["conversations"][0]["value"], row["chosen"]["value"]])
    return [pair for pair in pairs if len(pair) == 2 and all(pair) and sum(map(len, pair)) < 1500]


def write_rows(path: Path, count: int, seed: int = 0) -> Counter:
    """Write rows; return how many near and equal duplicates are among them."""
    rng = random.Random(seed)
    pairs = read_conversations()
    recent = []
    made = Counter()
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            draw = rng.random() if len(recent) > 100 else 1
            if draw < 0.05:
                texts = list(rng.choice(recent))
                texts[-1] += f" {number}"
                made["near"] += 1
            elif draw < 0.07:
                texts = rng.choice(recent)
                made["equal"] += 1
            else:
                texts = [text for pair in rng.sample(pairs, rng.choice((2, 2, 3))) for text in pair]
                recent = [*recent[-999:], texts]
            turns = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]
            file.write(json.dumps({"id": f"r{number}", "messages": turns}, ensure_ascii=False) + "\n")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--num_proc", default="2")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows.jsonl")
        out = Path(folder, "out")
        made = write_rows(rows, args.rows)
        megabytes = rows.stat().st_size / 1e6
        command = [sys.executable, "-m", "data_prep.dedup", rows, "--out", out, "--num_proc", args.num_proc]
        start = time.perf_counter()
        subprocess.run(command, cwd=REPO, check=True)
        seconds = time.perf_counter() - start
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        refused = json.loads((out / "report.json").read_text())["refused"]
    print(f"{args.rows:,} rows, {megabytes:.0f} MB of JSON lines, {args.num_proc} processes: {seconds:.1f} s")
    print(f"{args.rows / seconds:,.0f} rows a second, {usage.ru_utime + usage.ru_stime:.1f} s of processor time")
    print(f"{usage.ru_maxrss / 1024:,.0f} MiB in the largest process")
    print(f"made {made['equal']:,} equal and {made['near']:,} near duplicates; found {refused}")


if __name__ == "__main__":
    main()
