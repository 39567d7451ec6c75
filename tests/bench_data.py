"""Time normalise + check + exact dedup + split + mix against the way of most tutorials: `datasets` map and filter and a
Python MD5 set. Prints rows/s, the ratio and the resident memory, and plots the cost over the number of rows.

    python tests/bench_data.py --raw ../shared/data --rows 10000 100000 1000000 --plot cost.png

--raw is a folder with gsm8k/train.jsonl, cmath/cmath_dev.jsonl and chat/sharegpt_zh_1K_format.jsonl: rows are theirs,
each told apart by a number, one in twenty twice. A benchmark, not a test: run it on an idle machine. Memory is the sum
of the proportional set sizes (PSS) of all processes, sampled ten times a second.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
MIX = """
strategy: interleave
stop: first_exhausted
sources:
  - {path: a, weight: 0.6}
  - {path: b, weight: 0.4}
"""


def raw_rows(folder, count, out):
    """Write count rows to out/a.jsonl and out/b.jsonl, three to two."""
    seeds = []
    for line in (folder / "gsm8k" / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        seeds.append([row["question"], row["answer"]])
    for line in (folder / "cmath" / "cmath_dev.jsonl").read_text().splitlines():
        row = json.loads(line)
        seeds.append([row["input"], row["golden"]])
    for line in (folder / "chat" / "sharegpt_zh_1K_format.jsonl").read_text().splitlines():
        texts = [turn["value"][:600] for turn in json.loads(line)["conversations"][:2]]
        seeds += [texts] * (len(texts) == 2 and all(map(str.strip, texts)))
    with open(out / "a.jsonl", "w", encoding="utf-8") as a, open(out / "b.jsonl", "w", encoding="utf-8") as b:
        for number in range(count):
            told = number - 1 if number % 20 == 19 else number
            question, answer = seeds[told % len(seeds)]
            turns = [{"role": "user", "content": f"({told}) {question}"}, {"role": "assistant", "content": answer}]
            (a if number % 100 < 60 else b).write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")


def ours(folder, num_proc):
    def script(name, *flags):
        many = ["--num_proc", str(num_proc)] if num_proc else []
        command = [sys.executable, "-m", f"data_prep.{name}", *flags, *many]
        done = subprocess.run(
            command, cwd=folder, env={**os.environ, "PYTHONPATH": str(REPO)}, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(done.stdout + done.stderr)

    (folder / "mix.yaml").write_text(MIX)
    for name in "ab":
        script("normalize", "messages", f"{name}.jsonl", "--out", f"pools/{name}")
        script("check", f"pools/{name}")
    script("mix", "mix.yaml", "--pools", "pools", "--out", "mixed")


def theirs(folder, num_proc):
    """The 4080 tutorial's steps: clean and keep in map and filter, MD5 of json.dumps(messages) per pool and again after
    mixing, shuffle, interleave, split, save_to_disk and JSON lines."""
    command = [sys.executable, __file__, "--tutorial", folder, "--num_proc", str(num_proc)]
    subprocess.run(command, check=True, capture_output=True)


def tutorial(folder, num_proc):
    import hashlib
    import re

    from datasets import interleave_datasets, load_dataset

    control = re.compile(r"</?think>|<\|im_start\|>|<\|im_end\|>|<\|assistant\|>|<\|user\|>")

    def clean(row):
        texts = [control.sub("", turn["content"].replace("\r", "")).strip() for turn in row["messages"]]
        return {"messages": [t | {"content": text} for t, text in zip(row["messages"], texts, strict=True)]}

    def sound(row):
        roles = [turn["role"] for turn in row["messages"]]
        return roles == ["user", "assistant"] * (len(roles) // 2) and all(turn["content"] for turn in row["messages"])

    def deduplicated(rows):
        seen = set()

        def new(row):
            digest = hashlib.md5(json.dumps(row["messages"], ensure_ascii=False).encode()).hexdigest()
            return not (digest in seen or seen.add(digest))

        return rows.filter(new)

    parts = []
    for name in "ab":
        rows = load_dataset(
            "json", data_files=str(folder / f"{name}.jsonl"), split="train", cache_dir=str(folder / "cache")
        )
        parts.append(deduplicated(rows.map(clean, num_proc=num_proc).filter(sound, num_proc=num_proc)).shuffle(seed=42))
    chances = {"probabilities": [0.6, 0.4], "seed": 42, "stopping_strategy": "first_exhausted"}
    sets = deduplicated(interleave_datasets(parts, **chances)).train_test_split(0.02, seed=42)
    sets.save_to_disk(str(folder / "theirs"))
    for split, rows in sets.items():
        rows.to_json(str(folder / "theirs" / f"{split}.jsonl"), force_ascii=False)


def floor(folder, num_proc):
    """What is left without a check, a report or a digest: parse and dump by orjson, Arrow to disk; a hash a row, the
    first of equal ones drawn in random order; Arrow and JSON lines to disk. Two processes, each its own half."""
    subprocess.run([sys.executable, __file__, "--floor_of", folder], check=True)


def floor_of(folder):
    from concurrent.futures import ProcessPoolExecutor
    from itertools import chain

    import numpy as np

    files = [(folder / f"{name}.jsonl", half) for name in "ab" for half in range(2)]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        keys = np.concatenate([*pool.map(parsed, *zip(*files, strict=True))])
        _, first = np.unique(keys, return_index=True)
        order = np.random.default_rng(42).permutation(first)
        parts = np.array_split(order, 2)
        [*chain(pool.map(drawn, [folder] * 2, range(2), parts))]


def parsed(path, half):
    """The keys of half a file's rows, which go to PATH.HALF.arrow."""
    import numpy as np
    import orjson
    import pyarrow as pa
    import xxhash

    size, keys, out = path.stat().st_size, [], None
    with open(path, "rb") as file, pa.OSFile(f"{path}.{half}.arrow", "wb") as to:
        file.seek(half * size // 2)
        half and file.readline()
        while file.tell() <= (half + 1) * size // 2 and (lines := file.readlines(1 << 18)):
            rows = [[orjson.dumps(turn) for turn in orjson.loads(line)["messages"]] for line in lines]
            texts = [b",".join(row) for row in rows]
            keys += [xxhash.xxh3_64_intdigest(text) for text in texts]
            batch = pa.record_batch({"messages": pa.array(texts, pa.binary())})
            out = out or pa.ipc.new_stream(to, batch.schema)
            out.write_batch(batch)
        out.close()
    return np.array(keys, "u8")


def drawn(folder, half, rows):
    import pyarrow as pa

    files = sorted(folder.glob("[ab].jsonl.*.arrow"))
    table = pa.concat_tables([pa.ipc.open_stream(pa.memory_map(str(file))).read_all() for file in files])
    with pa.OSFile(str(folder / f"out.{half}.arrow"), "wb") as to, open(folder / f"out.{half}.jsonl", "wb") as text:
        out = pa.ipc.new_stream(to, table.schema)
        for start in range(0, len(rows), 5000):
            part = table.take(pa.array(rows[start : start + 5000])).combine_chunks()
            out.write_table(part)
            text.write(b"".join([b'{"messages":[%b]}\n' % row for row in part.column(0).to_pylist()]))
        out.close()


class Memory(threading.Thread):
    """The peak PSS (bytes) of this process' children and theirs."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.over = 0, threading.Event()

    def run(self):
        while not self.over.wait(0.1):
            self.peak = max(self.peak, sum(map(pss, children(multiprocessing.current_process().pid))))


def children(pid):
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            for child in map(int, path.read_text().split()):
                found += [child, *children(child)]
        except OSError:
            pass
    return found


def pss(pid):
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) << 10
    except (OSError, StopIteration):
        return 0


def timed(work, folder, num_proc):
    """(seconds, peak bytes)"""
    memory, start = Memory(), time.monotonic()
    memory.start()
    work(folder, num_proc)
    memory.over.set()
    return time.monotonic() - start, memory.peak


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--raw", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--num_proc", type=int, default=0, help="as the scripts choose it, where not given")
    parser.add_argument(
        "--their_num_proc", type=int, default=1, help="for their map and filter; the MD5 set is one process"
    )
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--floor", action="store_true", help="time too what no check of ours could make faster")
    parser.add_argument("--tutorial", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--floor_of", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tutorial:
        return tutorial(args.tutorial, args.num_proc if args.num_proc > 1 else None)
    if args.floor_of:
        return floor_of(args.floor_of)
    table = []
    for count in args.rows:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            raw_rows(args.raw, count, folder)
            size = sum((folder / f"{part}.jsonl").stat().st_size for part in "ab")
            (took, memory), (other, their_memory) = (
                timed(ours, folder, args.num_proc),
                timed(theirs, folder, args.their_num_proc),
            )
            least = f", floor {timed(floor, folder, 2)[0]:.1f} s" if args.floor else ""
            report = json.loads((folder / "mixed" / "report.json").read_text())
        table.append((count, took, other))
        print(f"{count:>9,} rows, {size / 1e6:,.0f} MB: {took:.1f} s ({count / took:,.0f} rows/s, "
              f"{memory / 2**30:.2f} GiB), tutorial {other:.1f} s ({their_memory / 2**30:.2f} GiB), "
              f"ratio {other / took:.1f}{least}; out {report['out']}, refused {report['refused']}",
              flush=True)  # fmt: skip
    if args.plot:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        counts, took, other = zip(*table, strict=True)
        figure, axis = plt.subplots(figsize=(6, 4))
        axis.loglog(counts, other, "o-", label="datasets map/filter + MD5 set")
        axis.loglog(counts, took, "o-", label="normalize + check + mix")
        axis.loglog(counts, [took[-1] * count / counts[-1] for count in counts], ":", color="grey", label="linear")
        axis.set(xlabel="rows", ylabel="seconds", title="normalise, check, exact dedup, split, mix")
        axis.legend()
        figure.savefig(args.plot, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
