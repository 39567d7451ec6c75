"""normalize.py and exact deduplication over many files on many machines, by datatrove's executors.

    python -m data_prep.shards sharegpt "raw/*.jsonl.zst" --out data/big --tasks 64 --workers 8
    python -m data_prep.shards sharegpt "raw/*.jsonl.zst" --out data/big --tasks 64 --executor slurm --partition cpu

Three stages, each of --tasks tasks; task K takes every file whose place in the sorted list is K modulo --tasks:
  1 normalize   its files to OUT/.parts/K, by normalize.py itself, and the key of every row, dealt by key
  2 keys        of the keys dealt to it, which rows repeat an earlier one (by file order, then line)
  3 keep        the rows of K that repeat none, to the pool OUT/K
The pools of all tasks together hold the rows that `normalize.py` and `dedup.py` keep on one machine, and mix.py takes
them as sources. A task that fails is run again alone by the same command: datatrove knows which are done (OUT/logs).
For one machine normalize.py itself is enough: it reads a block at a time. `pip install datatrove==0.10.1` first.

Exit 0: done. 1: a task failed. 2: bad input, one sentence.
"""

import json
import os
import shutil
import sys
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_prep.common.arrow_rows import batch_rows
from data_prep.common.command_line import make_parser, run_command
from data_prep.common.errors import UsageError
from data_prep.common.readers import find_inputs, list_splits, read_chunks, relative_names
from data_prep.common.row_keys import row_key
from data_prep.common.writer import ChunkResult, DatasetWriter, packed_batch

KEY = [("key", "S16"), ("file", "u4"), ("line", "u8")]  # of a kept row; file: its place in the sorted list
AGAIN = [("file", "u4"), ("line", "u8"), ("first_file", "u4"), ("first_line", "u8")]


# -- the stages, in the form of datatrove's pipeline steps: data is what stands before them, here nothing -------------
def normalize_part(data, rank, world_size, source, files, out):
    """Stage 1: OUT/.parts/RANK, and OUT/.keys/RANK/P.npy, the keys that task P compares."""
    from data_prep.normalize import work

    part, keys = out / ".parts" / str(rank), out / ".keys" / str(rank)
    for folder in (part, keys):
        shutil.rmtree(folder, ignore_errors=True)  # of a task that did not end
    found, names, mine = [], relative_names(files), range(rank, len(files), world_size)
    if not mine:
        return
    with DatasetWriter(part, f"shards.py {source}") as writer:
        for number in mine:
            inputs = {}
            for block in read_chunks([files[number]], inputs):
                block.file = names[files[number]]
                result = work(block, source)
                writer.add(result)
                refused = {entry["line"] for entry in result.rejected}
                lines = (line for line in lines_of(block) if line not in refused)
                kept = (row for one in result.encoded.values() for row in batch_rows(one.data))
                found += [(row_key(row), number, line) for row, line in zip(kept, lines, strict=True)]
            writer.input_hashes[names[files[number]]] = next(iter(inputs.values()))
        if writer.rows_out:
            writer.close()
        else:
            part.mkdir()  # its rows were all refused
            (writer.staging / "rejected.jsonl").replace(part / "rejected.jsonl")
    table, dealt = np.array(found, KEY), np.array([key[0] % world_size for key, *_ in found], int)
    keys.mkdir(parents=True)
    np.save(part / "places.npy", table[["file", "line"]])
    for other in range(world_size):
        np.save(keys / f"{other}.npy", table[dealt == other])


def lines_of(block):
    """The lines of a Block's rows, as Block.rows counts them."""
    if isinstance(block.data, bytes):
        lines = enumerate(block.data.split(b"\n"), block.first_line)
        return [number for number, line in lines if line and not line.isspace()]
    return range(block.first_line, block.first_line + len(block.data))


def compare_keys(data, rank, world_size, out):
    """Stage 2: OUT/.again/RANK/P.npy, the rows of task P that repeat an earlier one."""
    parts = [np.load(path) for path in sorted((out / ".keys").glob(f"*/{rank}.npy"))]
    table = np.concatenate(parts) if parts else np.zeros(0, KEY)
    table = table[np.lexsort((table["line"], table["file"], table["key"]))]
    new = np.r_[True, table["key"][1:] != table["key"][:-1]] if len(table) else np.zeros(0, bool)
    first = table[np.flatnonzero(new)[np.cumsum(new) - 1]] if len(table) else table
    again = np.zeros((~new).sum(), AGAIN)
    again["file"], again["line"] = table["file"][~new], table["line"][~new]
    again["first_file"], again["first_line"] = first["file"][~new], first["line"][~new]
    folder = out / ".again" / str(rank)
    folder.mkdir(parents=True, exist_ok=True)
    for other in range(world_size):
        np.save(folder / f"{other}.npy", again[again["file"] % world_size == other])


def keep_part(data, rank, world_size, source, files, out):
    """Stage 3: the pool OUT/RANK, with what stages 1 and 2 left out in its rejected.jsonl."""
    part, pool, names = out / ".parts" / str(rank), out / str(rank), relative_names(files)
    if not part.is_dir():
        return  # fewer files than tasks
    shutil.rmtree(pool, ignore_errors=True)
    parts = [np.load(path) for path in sorted((out / ".again").glob(f"*/{rank}.npy"))]
    again = {(int(a["file"]), int(a["line"])): a for a in np.concatenate(parts)} if parts else {}
    with DatasetWriter(pool, f"shards.py {source}") as writer:
        rejected = [json.loads(line) for line in (part / "rejected.jsonl").read_text().splitlines()]
        writer.add(ChunkResult(rejected=rejected, rows_in=len(rejected)))
        saved = (part / "report.json").is_file()
        writer.input_hashes |= json.loads((part / "report.json").read_text())["input"] if saved else {}
        places = ((int(place["file"]), int(place["line"])) for place in np.load(part / "places.npy"))
        for file in list_splits(part)["train"] if saved else ():
            with pa.memory_map(str(file)) as opened:
                for batch in pa.ipc.open_stream(opened):
                    writer.add(without(batch, places, again, names, files))
        if writer.rows_out:
            writer.close()
        else:
            pool.mkdir()
            (writer.staging / "rejected.jsonl").replace(pool / "rejected.jsonl")


def without(batch, places, again, names, files):
    """Result of a batch, whose rows are the next of places (file, row)."""
    mine = [*islice(places, len(batch))]
    ids, rejected = batch.column(0).to_pylist(), []
    for place, row_id in zip(mine, ids, strict=True):
        if place in again:
            first = again[place]
            told = f"repeats {names[files[first['first_file']]]}:{first['first_line']}"
            entry = {"file": names[files[place[0]]], "line": place[1], "id": row_id, "reason": "duplicate"}
            rejected.append(entry | {"detail": told})
    kept = batch.filter(pa.array([place not in again for place in mine]))
    return ChunkResult({"train": packed_batch(kept)} if len(kept) else {}, rejected, len(batch))


def main():
    parser = make_parser(__doc__)
    parser.add_argument("source", help="as normalize.py has them")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files, folders or quoted globs")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pools")
    parser.add_argument("--tasks", type=int, required=True, help="parts; the same number to go on after a stop")
    parser.add_argument("--workers", type=int, default=-1, help="tasks at a time, all of them by default")
    parser.add_argument("--executor", choices=["local", "slurm"], default="local")
    parser.add_argument("--partition", help="of Slurm")
    parser.add_argument("--time", default="04:00:00", help="of Slurm, for a task")
    return run_command(parser, run)


def run(args):
    """The exit code; raises UsageError."""
    from data_prep.common.sources import SOURCES

    if args.source not in SOURCES:
        raise UsageError(f"{args.source}: unknown source: pass one of {', '.join(SOURCES)}")
    if args.tasks < 1:
        raise UsageError(f"--tasks {args.tasks}: pass a number of at least 1")
    if args.executor == "slurm" and not args.partition:
        raise UsageError("--executor slurm: needs --partition")
    try:
        from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
    except ImportError:
        raise UsageError("datatrove is not installed: pip install datatrove==0.10.1") from None
    files = find_inputs(args.inputs)
    if other := [str(path) for path in files if not isinstance(path, Path) or str(path) == "-" or path.is_dir()]:
        raise UsageError(f"{other[0]}: shards are files: pass .jsonl, .json or .parquet files")
    check_plan(args, files)
    from data_prep import shards  # by name, so that tasks elsewhere find the functions

    here = str(Path(__file__).resolve().parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    files, out = [path.resolve() for path in files], args.out.resolve()
    told = {"source": args.source, "files": files, "out": out}
    stages = {
        "normalize": partial(shards.normalize_part, **told),
        "keys": partial(shards.compare_keys, out=out),
        "keep": partial(shards.keep_part, **told),
    }
    last = None
    for name, step in stages.items():
        common = {"pipeline": [step], "tasks": args.tasks, "workers": args.workers, "depends": last}
        common["logging_dir"] = str(out / "logs" / name)
        if args.executor == "local":
            last = LocalPipelineExecutor(**common)
        else:
            more = {"time": args.time, "partition": args.partition, "job_name": f"shards-{name}"}
            last = SlurmPipelineExecutor(**common, **more, env_command=f"export PYTHONPATH={os.environ['PYTHONPATH']}")
    try:
        last.run()
    except Exception as error:  # whatever a task raised
        said = " ".join(str(error).split())[:300]
        print(f"{args.out}: a task failed ({type(error).__name__}: {said}): logs in {out / 'logs'}; the same command "
              "goes on", file=sys.stderr)  # fmt: skip
        return 1
    if args.executor == "local":
        tell(out)
    return 0


def check_plan(args, files):
    """Raises UsageError where OUT was begun with other files or tasks: parts would not fit together."""
    plan = {"source": args.source, "files": [str(path) for path in files], "tasks": args.tasks}
    path = args.out / "plan.json"
    if path.is_file() and json.loads(path.read_text()) != plan:
        raise UsageError(f"{args.out}: begun with other files, source or tasks (plan.json): pass another --out")
    args.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plan, indent=2))


def tell(out):
    """Print what came of it and take away what lay between the stages."""
    reports = [json.loads(path.read_text()) for path in sorted(out.glob("*/report.json"))]
    kept = sum(report["out"].get("train", 0) for report in reports)
    print(f"{out.name}: {kept:,} rows in {len(reports)} pools of {sum(report['in'] for report in reports):,} rows")
    for folder in (".parts", ".keys", ".again"):
        shutil.rmtree(out / folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
