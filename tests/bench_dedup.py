"""How fast data_prep/dedup.py removes near duplicates, and how much memory that takes:

    python tests/bench_dedup.py --rows 100000

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
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"


def conversations():
    """[[question, answer]] of the real files, Chinese and English, none so long that it outweighs others."""
    out = []
    for line in (DATA / "gsm8k" / "train.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        out.append([row["question"], row["answer"]])
    for name in ("ARC-Easy_train", "ARC-Challenge_train"):
        for line in (DATA / "arc" / f"{name}.jsonl").open(encoding="utf-8"):
            row = json.loads(line)
            out.append([row["question"], " ".join(row["choices"]["text"])])
    for line in (DATA / "chat" / "sharegpt_zh_1K_format.jsonl").open(encoding="utf-8"):
        said = [turn["value"] for turn in json.loads(line)["conversations"]]
        out.append(said[:2])
    for row in json.loads((DATA / "preference" / "dpo_zh_demo.json").read_text(encoding="utf-8")):
        out.append([row["conversations"][0]["value"], row["chosen"]["value"]])
    return [said for said in out if len(said) == 2 and all(said) and sum(map(len, said)) < 1500]


def make(path, count, seed=0):
    """Write rows; (near, equal) duplicates among them."""
    rng, sources, before, near, equal = random.Random(seed), conversations(), [], 0, 0
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            kind = rng.random() if len(before) > 100 else 1
            if kind < 0.07:
                said = list(rng.choice(before))
                if kind < 0.05:
                    said[-1] += f" {number}"
                near, equal = near + (kind < 0.05), equal + (kind >= 0.05)
            else:
                said = [text for one in rng.sample(sources, rng.choice((2, 2, 3))) for text in one]
                before = [*before[-999:], said]
            turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]
            file.write(json.dumps({"id": f"r{number}", "messages": turns}, ensure_ascii=False) + "\n")
    return near, equal


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--num_proc", default="2")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows, out = Path(folder, "rows.jsonl"), Path(folder, "out")
        near, equal = make(rows, args.rows)
        megabytes = rows.stat().st_size / 1e6
        command = [sys.executable, "-m", "data_prep.dedup", rows, "--out", out, "--num_proc", args.num_proc]
        start = time.perf_counter()
        subprocess.run(command, cwd=ROOT, check=True)
        seconds = time.perf_counter() - start
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        refused = json.loads((out / "report.json").read_text())["refused"]
    print(f"{args.rows:,} rows, {megabytes:.0f} MB of JSON lines, {args.num_proc} processes: {seconds:.1f} s, "
          f"{args.rows / seconds:,.0f} rows a second, {usage.ru_utime + usage.ru_stime:.1f} s of processor time, "
          f"{usage.ru_maxrss / 1024:,.0f} MiB in the largest process")  # fmt: skip
    print(f"made {equal:,} equal and {near:,} near duplicates; found {refused}")


if __name__ == "__main__":
    main()
