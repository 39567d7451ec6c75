"""normalize.py and exact deduplication over many files on many machines, by datatrove's executors.

    python -m data_prep.shards sharegpt "raw/*.jsonl.zst" --out data/big --tasks 64 --workers 8
    python -m data_prep.shards sharegpt "raw/*.jsonl.zst" --out data/big --tasks 64 --executor slurm --partition cpu

Three stages, each of --tasks tasks; task K takes every file whose place in the sorted list is K modulo --tasks:
  1 normalize   its files to OUT/.parts/K, by normalize.py itself, and the key of every row, dealt by key
  2 keys        of the keys dealt to it, which rows repeat an earlier one (by file order, then line)
  3 keep        the rows of K that repeat none, to the dataset folder OUT/K
The folders of all tasks together hold the rows that `normalize.py` and `dedup.py --exact` keep on one machine, and
mix.py takes them as sources. A task that fails is run again alone by the same command: datatrove knows which are done
(OUT/logs). For one machine normalize.py itself is enough: it reads a chunk at a time. `pip install datatrove==0.10.1`
first.

Exit 0: done. 1: a task failed, or every row is refused. 2: bad input, one sentence.
"""

import json
import os
import shutil
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.common.chunks import Chunk
from data_prep.common.command_line import format_counts, make_parser, run_command
from data_prep.common.errors import UsageError
from data_prep.common.readers import STDIN, find_inputs, is_dataset_folder, read_chunks, relative_names
from data_prep.common.row_keys import row_key
from data_prep.common.sources import MADE, SOURCES
from data_prep.common.writer import ChunkResult, DatasetWriter, encode_rows, row_location

PLACE = [("file", "u4"), ("line", "u8")]  # of a row; file: its number in the sorted list
KEYED = [("key", "S16"), *PLACE]
REPEATED = [*PLACE, ("first_file", "u4"), ("first_line", "u8")]
HIDDEN = (".parts", ".keys", ".repeated")  # folders between the stages


class Place(NamedTuple):
    """Where a row comes from."""

    file: int
    line: int


# -- stage 1 ----------------------------------------------------------------------------------------------------------
# The stages have the form of datatrove's pipeline steps; data is what the step before yields, here nothing.
def normalize_part(data: object, rank: int, world_size: int, source: str, files: list[Path], out: Path) -> None:
    """Write OUT/.parts/RANK, and OUT/.keys/RANK/K.npy, the keys that task K compares."""
    part = out / ".parts" / str(rank)
    keys = out / ".keys" / str(rank)
    for folder in (part, keys):
        shutil.rmtree(folder, ignore_errors=True)  # of a task that did not end
    numbers = range(rank, len(files), world_size)
    if not numbers:
        return
    places = write_part(part, source, files, numbers)
    row_keys = b"".join([row_key(row) for _, row in read_part(part)])
    table = np.zeros(len(places), KEYED)
    table["key"] = np.frombuffer(row_keys, "S16")
    table["file"] = places["file"]
    table["line"] = places["line"]
    np.save(part / "places.npy", places)
    task = np.frombuffer(row_keys, "u8")[::2] % world_size  # by the first half of each key
    keys.mkdir(parents=True)
    for other in range(world_size):
        np.save(keys / f"{other}.npy", table[task == other])


def write_part(part: Path, source: str, files: list[Path], numbers: range) -> np.ndarray:
    """Write the normalized rows of some of the files; return the PLACE of each row that is kept."""
    from data_prep.normalize import normalize_chunk

    names = relative_names(files)
    places = [np.zeros(0, PLACE)]
    with DatasetWriter(part, f"shards.py {source}") as writer:
        for number in numbers:
            name = names[files[number]]
            hashes = {}
            for chunk in read_chunks([files[number]], hashes):
                chunk.file = name
                result = normalize_chunk(chunk, source)
                writer.add(result)
                places.append(kept_places(chunk, result, number))
            writer.input_hashes[name] = next(iter(hashes.values()))
        close_writer(writer)
    return np.concatenate(places)


def kept_places(chunk: Chunk, result: ChunkResult, number: int) -> np.ndarray:
    """Return the PLACE of each row of a chunk of file `number` that is not refused."""
    refused = {entry["line"] for entry in result.rejected}
    lines = [line for line, _ in chunk.rows() if line not in refused]
    places = np.zeros(len(lines), PLACE)
    places["file"] = number
    places["line"] = lines
    return places


def read_part(part: Path) -> Iterator[tuple[int, dict]]:
    """Yield (number from 0, row) of the rows of a part, which has none where all were refused."""
    if is_dataset_folder(part):
        for chunk in read_chunks([part]):
            for line, row in chunk.rows():
                yield line - 1, row


def close_writer(writer: DatasetWriter) -> None:
    if writer.rows_out:
        writer.close()
    else:
        writer.close_rejected()


# -- stage 2 ----------------------------------------------------------------------------------------------------------
def compare_keys(data: object, rank: int, world_size: int, out: Path) -> None:
    """Write OUT/.repeated/RANK/K.npy, the rows of task K that repeat an earlier one."""
    tables = [np.load(path) for path in sorted((out / ".keys").glob(f"*/{rank}.npy"))]
    repeated = find_repeated(np.concatenate([np.zeros(0, KEYED), *tables]))
    folder = out / ".repeated" / str(rank)
    folder.mkdir(parents=True, exist_ok=True)
    for other in range(world_size):
        np.save(folder / f"{other}.npy", repeated[repeated["file"] % world_size == other])


def find_repeated(table: np.ndarray) -> np.ndarray:
    """Return the REPEATED rows of a KEYED table: each but the first of a key, and that first one."""
    table = table[np.lexsort((table["line"], table["file"], table["key"]))]
    is_new = np.ones(len(table), bool)
    is_new[1:] = table["key"][1:] != table["key"][:-1]
    first = table[is_new][np.cumsum(is_new) - 1]  # of each row, the first with its key
    repeated = np.zeros(np.count_nonzero(~is_new), REPEATED)
    repeated["file"] = table["file"][~is_new]
    repeated["line"] = table["line"][~is_new]
    repeated["first_file"] = first["file"][~is_new]
    repeated["first_line"] = first["line"][~is_new]
    return repeated


# -- stage 3 ----------------------------------------------------------------------------------------------------------
def keep_part(data: object, rank: int, world_size: int, source: str, files: list[Path], out: Path) -> None:
    """Write the dataset folder OUT/RANK; its rejected.jsonl lists what stages 1 and 2 left out."""
    part = out / ".parts" / str(rank)
    folder = out / str(rank)
    if not part.is_dir():
        return  # fewer files than tasks
    shutil.rmtree(folder, ignore_errors=True)
    first_places = read_repeated(out, rank)
    file_names = relative_names(files)
    names = [file_names[path] for path in files]
    report = read_report(part)
    rejected = [json.loads(line) for line in (part / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]
    with DatasetWriter(folder, f"shards.py {source}") as writer:
        writer.input_hashes |= report["input"]
        writer.keys_not_kept.update(report.get("keys_not_kept", {}))
        writer.add(ChunkResult(rejected=rejected, rows_in=len(rejected)))
        if is_dataset_folder(part):
            places = np.load(part / "places.npy")
            for chunk in read_chunks([part]):
                writer.add(drop_repeated(chunk, places, first_places, names))
        close_writer(writer)


def read_report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def read_repeated(out: Path, rank: int) -> dict[Place, Place]:
    """Return {row of a task that repeats one: the row that it repeats}."""
    first_places = {}
    for path in sorted((out / ".repeated").glob(f"*/{rank}.npy")):
        for file, line, first_file, first_line in np.load(path).tolist():
            first_places[Place(file, line)] = Place(first_file, first_line)
    return first_places


def drop_repeated(chunk: Chunk, places: np.ndarray, first_places: dict[Place, Place], names: list[str]) -> ChunkResult:
    """Return the result of a chunk of a part; places: PLACE of each row of the part; names: of the files."""
    rows = []
    rejected = []
    for line, row in chunk.rows():
        place = Place(*places[line - 1].item())
        if place not in first_places:
            rows.append(row)
            continue
        first = first_places[place]
        entry = row_location(names[place.file], place.line, row)
        entry["reason"] = "duplicate"
        entry["detail"] = f"repeats {names[first.file]}:{first.line}"
        rejected.append(entry)
    encoded = {"train": encode_rows(rows)} if rows else {}
    return ChunkResult(encoded, rejected, len(rows) + len(rejected))


# -- the command ------------------------------------------------------------------------------------------------------
def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("source", help="as normalize.py has them")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files, folders or quoted globs")
    parser.add_argument("--out", type=Path, required=True, help="folder of the tasks' dataset folders")
    parser.add_argument("--tasks", type=int, required=True, help="parts; the same number to go on after a stop")
    parser.add_argument("--workers", type=int, default=-1, help="tasks at a time, all of them by default")
    parser.add_argument("--executor", choices=["local", "slurm"], default="local")
    parser.add_argument("--partition", help="of Slurm")
    parser.add_argument("--time", help="of Slurm, for a task, default 04:00:00")
    return run_command(parser, run)


def check_arguments(args: Namespace) -> None:
    """Raise UsageError for arguments that cannot be meant."""
    sources = [name for name in SOURCES if name not in MADE and name != "fields"]
    if args.source in MADE:
        raise UsageError(f"{args.source}: it makes its rows and reads no files: use python -m data_prep.normalize")
    if args.source == "fields":
        raise UsageError("fields: its --map is none of the options here: use python -m data_prep.normalize")
    if args.source not in sources:
        raise UsageError(f"{args.source}: unknown source: pass one of {', '.join(sources)}")
    if args.tasks < 1:
        raise UsageError(f"--tasks {args.tasks}: pass a number of at least 1")
    if args.workers < 1 and args.workers != -1:
        raise UsageError(f"--workers {args.workers}: pass a number of at least 1, or leave it out")
    if args.executor == "slurm" and not args.partition:
        raise UsageError("--executor slurm: needs --partition")
    if args.executor == "local":
        for name in ("partition", "time"):
            if getattr(args, name):
                raise UsageError(f"--{name}: only --executor slurm reads it: leave it out")


def run(args: Namespace) -> int:
    """Return the exit code. Raises UsageError."""
    check_arguments(args)
    if find_spec("datatrove") is None:
        raise UsageError("datatrove is not installed: pip install datatrove==0.10.1")
    files = find_inputs(args.inputs)
    for path in files:
        if not isinstance(path, Path) or path == STDIN or path.is_dir():
            raise UsageError(f"{path}: shards are files: pass .jsonl, .json, .csv or .parquet files")
    check_plan(args, files)
    out = args.out.resolve()
    try:
        run_stages(args, [path.resolve() for path in files], out)
    except Exception as error:  # whatever a task raised
        message = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        print(
            f"{args.out}: a task failed ({message}): logs in {out / 'logs'}; the same command goes on", file=sys.stderr
        )
        return 1
    return finish(out) if args.executor == "local" else 0


def check_plan(args: Namespace, files: list[Path]) -> None:
    """Raise UsageError where OUT was begun with other files or tasks: parts would not fit together."""
    plan = {"source": args.source, "files": [str(path) for path in files], "tasks": args.tasks}
    path = args.out / "plan.json"
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != plan:
        raise UsageError(f"{args.out}: begun with other files, source or tasks (plan.json): pass another --out")
    args.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plan, indent=2), encoding="utf-8")


def run_stages(args: Namespace, files: list[Path], out: Path) -> None:
    """Run the stages here, or hand them to Slurm, each after the one before it."""
    from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor

    from data_prep import shards  # by name, so that tasks elsewhere find the functions

    paths = [str(Path(__file__).resolve().parents[1])]
    if os.environ.get("PYTHONPATH"):
        paths.append(os.environ["PYTHONPATH"])
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    stages = {
        "normalize": partial(shards.normalize_part, source=args.source, files=files, out=out),
        "keys": partial(shards.compare_keys, out=out),
        "keep": partial(shards.keep_part, source=args.source, files=files, out=out),
    }
    executor = None
    for name, step in stages.items():
        options = {"tasks": args.tasks, "workers": args.workers, "logging_dir": str(out / "logs" / name)}
        if args.executor == "local":
            executor = LocalPipelineExecutor([step], depends=executor, **options)
        else:
            executor = SlurmPipelineExecutor(
                [step],
                depends=executor,
                time=args.time or "04:00:00",
                partition=args.partition,
                job_name=f"shards-{name}",
                env_command=f"export PYTHONPATH={os.environ['PYTHONPATH']}",
                **options,
            )
    executor.run()


def finish(out: Path) -> int:
    """Print what came of it, take away what lay between the stages and return the exit code."""
    kept = 0
    rows_in = 0
    folders = 0
    keys_not_kept = Counter()
    for path in sorted(out.glob("*/report.json")):
        report = read_report(path.parent)
        kept += report["out"].get("train", 0)
        rows_in += report["in"]
        folders += bool(report["out"])
        keys_not_kept.update(report.get("keys_not_kept", {}))
    print(f"{out.name}: {kept:,} rows in {folders} dataset folders of {rows_in:,} rows")
    if keys_not_kept:
        print(f"  keys not kept: {format_counts(keys_not_kept)}")
    for name in HIDDEN:
        shutil.rmtree(out / name, ignore_errors=True)
    if kept:
        return 0
    print(f"{out.name}: every row is refused: see {out / '*' / 'rejected.jsonl'}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
