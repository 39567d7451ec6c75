"""Write dataset folders and files of rows, with the report that accounts for every row.

with DatasetWriter(args.out, "filter.py", args.seed) as writer:
    for result in parallel_map(process_chunk, read_chunks(paths, writer.input_hashes), args.num_proc):
        writer.add(result)
    report = writer.close()

in + added = out + refused    rows, in every report.json; a step whose counts do not add up is stopped
"""

import json
import os
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from .arrow_rows import SCHEMA, batch_to_rows, rows_to_batch
from .chunks import ROWS, Chunk
from .command_line import format_counts
from .errors import InvalidRow, UsageError
from .json_text import dump_json, dump_json_lenient
from .row_keys import hash_of, prompt_key, row_digest
from .rows import COLUMNS, Row, check_shape, complete_row
from .splitting import choose_validation


# -- what a step makes of a chunk -------------------------------------------------------------------------------------
class Kind(NamedTuple):
    """What card.md counts rows by."""

    source: str
    lang: str
    mode: str  # think where a message shows reasoning, else no_think


@dataclass
class EncodedRows:
    """Rows as they go to disk: one of batch and lines."""

    ids: list[str]
    digests: bytes  # row_digest of each
    kinds: Counter[Kind]
    batch: pa.RecordBatch | None = None  # in SCHEMA, for a folder
    lines: list[bytes] = field(default_factory=list)  # JSON, for a .jsonl file
    keys_not_kept: Counter[str] = field(default_factory=Counter)  # columns that a folder does not keep


@dataclass
class ChunkResult:
    """What a step made of one chunk: rows by split, and where the others went."""

    encoded: dict[str, EncodedRows] = field(default_factory=dict)
    rejected: list[dict] = field(default_factory=list)  # entries of rejected.jsonl
    rows_in: int = 0
    rows_added: int = 0  # rows out that were not in: an expanded row counts for each beyond the first
    counts: Counter = field(default_factory=Counter)  # what else the step counts
    payload: object = None  # what else the step hands back

    def reject(self, location: dict, error: InvalidRow) -> None:
        """List a refused row of messages."""
        self.rejected.append(location | {"reason": error.reason, "detail": error.detail})

    def usable_rows(self, chunk: Chunk, name: str) -> Iterator[tuple[dict, Row]]:
        """Yield (location, complete row) of a chunk of messages rows; count all, and list those that are refused.

        name: of the file, by which rows without an id and a source are called.
        """
        for line, row in chunk.rows():
            self.rows_in += 1
            location = row_location(chunk.file, line, row)
            try:
                row = complete_row(check_shape(row), name, line)
            except InvalidRow as error:
                self.reject(location, error)
            except RecursionError:
                self.reject(location, InvalidRow("row nested too deep"))
            else:
                yield location, row


def encode_rows(rows: list[Row], jsonl: bool = False) -> EncodedRows:
    """Encode complete rows for a folder, or as JSON lines, which keep every key (dates and the like as text).

    Raises InvalidRow, TypeError, RecursionError where JSON cannot hold one.
    """
    ids = [row["id"] for row in rows]
    kinds = Counter([kind_of(row) for row in rows])
    keys_not_kept = Counter()
    if jsonl:
        digests = b"".join([row_digest(row) for row in rows])
        return EncodedRows(ids, digests, kinds, lines=[dump_json_lenient(row) for row in rows])
    kept_rows = []
    for row in rows:
        kept_rows.append({name: row[name] for name in COLUMNS if row.get(name) is not None})
        if len(kept_rows[-1]) < len(row):
            keys_not_kept.update(key for key, value in row.items() if key not in COLUMNS and value is not None)
    digests = b"".join([row_digest(row) for row in kept_rows])
    return EncodedRows(ids, digests, kinds, rows_to_batch(kept_rows), keys_not_kept=keys_not_kept)


def kind_of(row: Row) -> Kind:
    thinks = any(["reasoning_content" in turn for turn in row["messages"]])
    return Kind(row["source"], row["lang"], "think" if thinks else "no_think")


def row_location(file: str, line: int, row: object) -> dict:
    """Return where a row comes from, as findings and rejected.jsonl name it."""
    row_id = row.get("id", "") if isinstance(row, dict) else ""
    return {"file": file, "line": line, "id": str(row_id)}


# -- all of it --------------------------------------------------------------------------------------------------------
def check_output_path(out: Path, splits: Iterable[str] = ()) -> None:
    """Raise UsageError where OUT cannot be what these splits are written to, before the work is done."""
    splits = list(splits)
    if out.exists():
        raise UsageError(f"{out}: exists already: remove it or pass another --out")
    if out.suffix == ".jsonl" and len(splits) > 1:
        raise UsageError(f"{out}: a file has no splits, the data has {', '.join(splits)}: pass a folder as --out")


@contextmanager
def explain_os_errors(out: Path) -> Iterator[None]:
    """Turn what the file system raises into a UsageError about a path."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{out}: not written ({error}): make room or pass another --out") from None


@contextmanager
def made_parents(path: Path) -> Iterator[None]:
    """Make the folders that a path lies in; those that are still empty behind the block go again."""
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()


class DatasetWriter:
    """Writes OUT: a dataset folder (for load_from_disk, with report.json, rejected.jsonl and card.md), or a .jsonl file
    with NAME.report.json and NAME.rejected.jsonl beside it.

    All of it is written aside and renamed by close(); without close() nothing is left. Raises UsageError where it
    cannot be written.
    """

    def __init__(self, out: Path, script: str, seed: int | None = None) -> None:
        check_output_path(out)
        self.out = out
        self.script = script
        self.seed = seed
        self.is_jsonl = out.suffix == ".jsonl"
        self.staging = out.with_name(f".{out.name}.{os.getpid()}.part")
        self.input_hashes: dict[str, str] = {}
        self.rows_in = 0
        self.rows_added = 0
        self.rows_out: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.counts: Counter = Counter()
        self.keys_not_kept: Counter[str] = Counter()
        self.splits: dict[str, SplitFile] = {}
        self.ids: set[str] = set()
        self.last_numbers: dict[str, int] = {}  # of ids that came again

    def __enter__(self) -> "DatasetWriter":
        with explain_os_errors(self.out), ExitStack() as parents:
            parents.enter_context(made_parents(self.out))
            self.staging.mkdir()
            self.rejected = open(self.staging / "rejected.jsonl", "wb")
            self.parents = parents.pop_all()  # until __exit__
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self.rejected, *self.splits.values()):
            with suppress(OSError, pa.ArrowInvalid):
                file.close()
        shutil.rmtree(self.staging, ignore_errors=True)
        self.parents.close()

    def add(self, result: ChunkResult) -> None:
        """Write a result. An id that is taken becomes ID-2, ID-3 …"""
        with explain_os_errors(self.out):
            self.rows_in += result.rows_in
            self.rows_added += result.rows_added
            self.counts += result.counts
            for split, rows in result.encoded.items():
                if rows.ids:
                    self.write(split, rows)
            for entry in result.rejected:
                self.reject(entry)

    def reject(self, entry: dict) -> None:
        """Count and list a refused row: file, line, id, reason, detail."""
        self.refused[entry["reason"]] += 1
        self.rejected.write(dump_json_lenient(entry) + b"\n")

    def write(self, split: str, rows: EncodedRows) -> None:
        if split not in self.splits:
            if self.is_jsonl and self.splits:
                check_output_path(self.out, [*self.splits, split])
            make_file = LinesFile if self.is_jsonl else ArrowFile
            self.splits[split] = make_file(self.staging / f"{split}.rows")
        ids = self.unique_ids(rows.ids)
        self.splits[split].write(rows, ids)
        rows.ids = ids  # as they were written
        self.rows_out[split] += len(rows.ids)
        self.keys_not_kept += rows.keys_not_kept

    def unique_ids(self, ids: list[str]) -> list[str]:
        unique = []
        for row_id in ids:
            name = row_id
            number = self.last_numbers.get(row_id, 1)
            while name in self.ids:
                number += 1
                name = f"{row_id}-{number}"
            if number > 1:
                self.last_numbers[row_id] = number
            self.ids.add(name)
            unique.append(name)
        return unique

    def hold_out(self, count: int, split: str = "train", validation: str = "validation") -> int:
        """Move at least `count` rows of a split, drawn by seed, to another: whole prompts, so that none stands in both.

        Returns the number of rows moved. Only in a folder.
        """
        with explain_os_errors(self.out):
            whole = self.splits.pop(split)
            whole.close()
            whole.path = whole.path.rename(self.staging / "undivided")  # its name is that of a part
            self.ids -= set(whole.ids())
            del self.rows_out[split]
            prompts = np.fromiter((prompt_key(row) for row in whole.rows()), np.uint64)
            is_validation = choose_validation(prompts, count, self.seed)
            if is_validation.all():
                different = len(np.unique(prompts))
                raise UsageError(
                    f"--eval_rows {count}: {len(prompts):,} rows of {different:,} prompts, which stay whole, leave "
                    "none to train on: pass a smaller number"
                )
            keys_not_kept = self.keys_not_kept
            start = 0
            for batch in whole.batches():
                mask = is_validation[start : start + len(batch)]
                for name, part in ((split, batch.filter(pa.array(~mask))), (validation, batch.filter(pa.array(mask)))):
                    if len(part):
                        self.write(name, encode_rows(list(batch_to_rows(part))))
                start += len(batch)
            self.keys_not_kept = keys_not_kept
            whole.path.unlink()
        return int(is_validation.sum())

    def close(self, more: dict | None = None, extra: dict[str, str] | None = None) -> dict:
        """Finish, rename and return the report. more: what the step adds to it; extra: {file: text} of a folder."""
        if self.rows_in + self.rows_added != self.rows_out.total() + self.refused.total():
            raise AssertionError(
                f"{self.script}: {self.rows_in} rows in + {self.rows_added} added are not {self.rows_out.total()} out "
                f"+ {self.refused.total()} refused"
            )
        report = self.make_report(more or {})
        with explain_os_errors(self.out):
            self.rejected.close()
            for file in self.splits.values():
                file.close()
            if self.is_jsonl:
                paths = [file.path for file in self.splits.values()]
                self.publish_beside(report, paths[0] if paths else None)
            else:
                self.publish_folder(report, extra or {})
        return report

    def finish(self, inputs: object, more: dict | None = None, extra: dict[str, str] | None = None) -> int:
        """Publish what a step on messages rows kept, print the counts, return the exit code: 1 where no row is left.

        inputs: what was read, as the command line names it. Raises UsageError where there was no row at all.
        """
        if not self.rows_in:
            raise UsageError(f"{inputs}: no rows: pass rows of messages (python -m data_prep.normalize makes them)")
        counts = f" ({format_counts(self.refused)})" if self.refused else ""
        if not self.rows_out:
            print(f"all {self.rows_in:,} rows refused{counts}: see {self.close_rejected()}", file=sys.stderr)
            return 1
        self.close(more, extra)
        kept = self.rows_out.total()
        print(f"{self.out}: {kept:,} rows kept of {self.rows_in:,}, {self.refused.total():,} left out{counts}")
        return 0

    def close_rejected(self) -> Path:
        """Write rejected.jsonl and the report of a step that left no row; return where the refused rows are listed."""
        report = self.make_report({})
        with explain_os_errors(self.out):
            self.rejected.close()
            if self.is_jsonl:
                self.publish_beside(report, None)
                return self.out.with_suffix(".rejected.jsonl")
            write_utf8(self.staging / "report.json", format_json(report))
            self.staging.rename(self.out)
            return self.out / "rejected.jsonl"

    def make_report(self, more: dict) -> dict:
        hashes = {split: file.digest.hexdigest() for split, file in self.splits.items()}
        report = make_report(
            self.script, self.rows_in, dict(self.rows_out), self.refused, self.seed, self.input_hashes, hashes
        )
        if self.rows_added:
            report["added"] = self.rows_added
        report |= more
        if self.keys_not_kept:
            report["keys_not_kept"] = dict(sorted(self.keys_not_kept.items()))
        return report

    def publish_beside(self, report: dict, rows: Path | None) -> None:
        """Rename what belongs to a .jsonl file, the report last: it vouches for the others."""
        write_utf8(self.staging / "report.json", format_json(report))
        (self.staging / "rejected.jsonl").replace(self.out.with_suffix(".rejected.jsonl"))
        if rows is not None:
            rows.replace(self.out)
        (self.staging / "report.json").replace(self.out.with_suffix(".report.json"))

    def publish_folder(self, report: dict, extra: dict[str, str]) -> None:
        folder = self.staging / "folder"
        save_splits(folder, {split: file.path for split, file in self.splits.items()}, report["output"])
        for file in self.staging.iterdir():
            if file.suffix in (".jsonl", ".md"):
                file.rename(folder / file.name)
        kinds = {split: file.kinds for split, file in self.splits.items()}
        texts = {"card.md": make_card(self.out.name, kinds), **extra, "report.json": format_json(report)}
        for name, text in texts.items():
            write_utf8(folder / name, text)
        folder.rename(self.out)


class SplitFile:
    """The rows of one split in the making."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.digest = sha256()  # of the rows' digests
        self.kinds: Counter[Kind] = Counter()

    def count(self, rows: EncodedRows) -> None:
        self.digest.update(rows.digests)
        self.kinds += rows.kinds


class LinesFile(SplitFile):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.file = pa.OSFile(str(path), "wb")

    def write(self, rows: EncodedRows, ids: list[str]) -> None:
        self.count(rows)
        for line, row_id, own_id in zip(rows.lines, ids, rows.ids, strict=True):
            if row_id != own_id:
                line = dump_json(json.loads(line) | {"id": row_id})
            self.file.write(line + b"\n")

    def close(self) -> None:
        self.file.close()


class ArrowFile(SplitFile):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.file = pa.OSFile(str(path), "wb")
        self.stream = pa.ipc.new_stream(self.file, SCHEMA)

    def write(self, rows: EncodedRows, ids: list[str]) -> None:
        self.count(rows)
        batch = rows.batch
        if ids != rows.ids:
            batch = batch.set_column(0, SCHEMA.field(0), pa.array(ids, pa.string()))
        self.stream.write_batch(batch)

    def close(self) -> None:
        self.stream.close()
        self.file.close()

    def batches(self) -> Iterator[pa.RecordBatch]:
        with pa.memory_map(str(self.path)) as source:
            yield from pa.ipc.open_stream(source)

    def rows(self) -> Iterator[Row]:
        for batch in self.batches():
            yield from batch_to_rows(batch)

    def ids(self) -> Iterator[str]:
        for batch in self.batches():
            yield from batch.column(0).to_pylist()


def save_splits(folder: Path, files: dict[str, Path], hashes: dict[str, str]) -> None:
    """Save {split: Arrow stream file} as a folder for load_from_disk; the files go.

    hashes: {split: hash of its content}, which becomes the fingerprint that datasets would draw at random.
    """
    import datasets

    splits = datasets.DatasetDict()
    for split, path in files.items():
        table = datasets.table.MemoryMappedTable.from_file(str(path))
        info = datasets.DatasetInfo(features=datasets.Features.from_arrow_schema(table.schema))
        splits[split] = datasets.Dataset(table, info, split, fingerprint=hashes[split][:16])
    with quiet_progress():
        splits.save_to_disk(str(folder))
    del splits
    for path in files.values():
        path.unlink()


@contextmanager
def quiet_progress() -> Iterator[None]:
    """Keep the bars of `datasets` away: the step shows its own."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def make_report(
    script: str,
    rows_in: int,
    rows_out: dict[str, int],
    refused: Counter[str],
    seed: int | None,
    input_hashes: dict[str, str],
    output_hashes: dict[str, str],
) -> dict:
    """Return what report.json holds; its `hash` is what later steps and the checks of a resume compare."""
    return {
        "script": script,
        "in": rows_in,
        "out": rows_out,
        "refused": dict(sorted(refused.items())),
        "seed": seed,
        "versions": {"python": platform.python_version(), "pyarrow": version("pyarrow")},
        "input": input_hashes,
        "output": output_hashes,
        "hash": hash_of(output_hashes),
    }


def make_card(name: str, kinds: dict[str, Counter[Kind]]) -> str:
    """Return Markdown: rows by split, source, language and mode."""
    lines = [f"# {name}", "", "| split | source | language | mode | rows |", "|---|---|---|---|---|"]
    for split in sorted(kinds):
        for kind, count in sorted(kinds[split].items()):
            lines.append(f"| {split} | {kind.source} | {kind.lang} | {kind.mode} | {count:,} |")
    return "\n".join(lines) + "\n"


def write_rows(
    out: Path,
    script: str,
    splits: dict[str, list[Row]],
    rejected: Iterable[dict] = (),
    input_hashes: dict[str, str] | None = None,
    more: dict | None = None,
    seed: int | None = None,
    extra: dict[str, str] | None = None,
) -> dict:
    """Write {split: rows} that are in memory; return the report."""
    rejected = list(rejected)
    with DatasetWriter(out, script, seed) as writer:
        writer.input_hashes |= input_hashes or {}
        if writer.is_jsonl:
            check_output_path(out, splits)
        for split, rows in splits.items():
            for start in range(0, len(rows), ROWS):
                part = rows[start : start + ROWS]
                writer.add(ChunkResult({split: encode_rows(part, writer.is_jsonl)}, rows_in=len(part)))
        writer.add(ChunkResult(rejected=rejected, rows_in=len(rejected)))
        return writer.close(more, extra)


# -- single files and folders -----------------------------------------------------------------------------------------
def format_json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_utf8(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def write_files(files: dict[Path, str]) -> None:
    """Write {path: text} aside and rename all when all are written, the last one last: it vouches for the others."""
    staged = {path: path.with_name(f".{path.name}.{os.getpid()}.part") for path in files}
    with ExitStack() as parents:
        for path in files:
            parents.enter_context(made_parents(path))
        try:
            for path, text in files.items():
                write_utf8(staged[path], text)
            for path in files:
                staged[path].replace(path)
        finally:
            for path in staged.values():
                with suppress(OSError):
                    path.unlink(missing_ok=True)


@contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """Yield a folder that is renamed to OUT when the block is through; without that nothing is left.

    Raises UsageError where it cannot be written.
    """
    check_output_path(out)
    staging = out.with_name(f".{out.name}.{os.getpid()}.part")
    with explain_os_errors(out), made_parents(out):
        try:
            staging.mkdir()
            yield staging
            staging.rename(out)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file that a flag names. Raises UsageError."""
    try:
        write_files({path: text})
    except OSError as error:
        raise UsageError(f"{path}: not written ({error}): make room or pass another file") from None
