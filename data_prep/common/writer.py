"""Write dataset folders and files of rows, with their report."""

import hashlib
import json
import os
import platform
import random
import shutil
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version

import numpy as np
import pyarrow as pa

from .arrow_rows import FEATURES, KEPT, SCHEMA, body_of, counts_of, record_batch, row_bodies, tail_of, told_lines
from .chunks import ROWS
from .errors import UsageError
from .json_text import dump_json, dump_json_lenient, load_json
from .row_keys import hash_of, row_digest

BATCH = 4 << 20  # bytes of Arrow data that are written at once


SHARD = 256 << 20  # bytes of Arrow data in a file of a folder


@dataclass
class ChunkResult:
    """What a step made of one Block: packed rows by split, and where the others went."""

    encoded: dict = field(default_factory=dict)  # {split: Packed}
    rejected: list = field(default_factory=list)  # entries of rejected.jsonl
    rows_in: int = 0  # rows in
    rows_added: int = 0  # rows out that were not in: an expanded row counts for each beyond the first
    counts: Counter = field(default_factory=Counter)  # what else the step counts
    payload: object = None  # what else the step hands back


@dataclass
class EncodedRows:
    """Rows as they go to disk: a RecordBatch, or bytes of JSON lines."""

    data: object
    ids: list
    digests: bytes  # sha256 of every row without its id, 32 bytes a row
    counts: Counter  # rows by (source, lang, mode)
    left_out: Counter  # columns that a folder does not keep


def encode_rows(rows, lines=False):
    """Packed rows. lines: as JSON lines, which keep every column."""
    if not lines:
        left_out = Counter(name for row in rows if not row.keys() <= KEPT for name in row.keys() - KEPT)
        return bundled([encoded(row) for row in rows], left_out=left_out)
    data, digests = (b"".join(parts) for parts in ([dump_json(row) + b"\n" for row in rows], map(row_digest, rows)))
    counts = Counter((row["source"], row["lang"], "think" if thinks(row) else "no_think") for row in rows)
    return EncodedRows(data, [row["id"] for row in rows], digests, counts, Counter())


def thinks(row):
    return any(["reasoning_content" in turn for turn in row["messages"]])


def encoded(row):
    """(id, messages, tools or None, kwargs, source, tags, lang, whether it thinks) of a row, JSON as bytes, without the
    columns that a folder does not keep. Raises InvalidRow, TypeError, RecursionError where no file can hold it."""
    messages = [dump_json(turn) for turn in row["messages"]]
    tools = None if row.get("tools") is None else [dump_json(tool) for tool in row["tools"]]
    kwargs = dump_json(row["chat_template_kwargs"]) if row["chat_template_kwargs"] else b"{}"
    if not row["id"].isascii():
        dump_json(row["id"])
    tail_of(row["source"], tuple(row["tags"]), row["lang"])
    return row["id"], messages, tools, kwargs, row["source"], row["tags"], row["lang"], thinks(row)


def bundled(rows, lines=False, left_out=()):
    """Packed of encoded() rows."""
    told = [body_of(*row[1:-1]) for row in rows]
    digests = b"".join([hashlib.sha256(b"{" + body).digest() for body in told])
    ids, messages, tools, kwargs, sources, tags, langs, think = zip(*rows, strict=True) if rows else [()] * 8
    counts = Counter(zip(sources, langs, ["think" if one else "no_think" for one in think], strict=True))
    data = record_batch(ids, messages, tools, kwargs, sources, tags, langs) if not lines else told_lines(ids, told)
    return EncodedRows(data, [*ids], digests, counts, Counter(left_out))


def packed_batch(batch, digests=None):
    """Packed rows of a RecordBatch in SCHEMA."""
    digests = digests or b"".join([hashlib.sha256(b"{" + body).digest() for body in row_bodies(batch)])
    return EncodedRows(batch, batch.column(0).to_pylist(), digests, counts_of(batch), Counter())


def row_location(file, line, row):
    """Where a row comes from, as findings and rejected.jsonl name it."""
    return {"file": file, "line": line, "id": str(row.get("id", "")) if isinstance(row, dict) else ""}


def check_output_path(out, splits=()):
    """Raises UsageError where OUT cannot be what these splits are written to, before the work is done."""
    if out.exists():
        raise UsageError(f"{out}: exists already: remove it or pass another --out")
    if out.suffix == ".jsonl" and len(splits) > 1:
        raise UsageError(f"{out}: a file has no splits, the data has {', '.join(splits)}: pass a folder as --out")


class DatasetWriter:
    """Writes OUT: a .jsonl file with NAME.report.json and NAME.rejected.jsonl beside it, or a dataset folder (for
    load_from_disk, with report.json, rejected.jsonl, card.md). All of it is written aside and renamed in close();
    without close() nothing is left. Raises UsageError where it cannot be written."""

    def __init__(self, out, script, seed=None):
        check_output_path(out)
        self.out, self.script, self.seed, self.is_jsonl = out, script, seed, out.suffix == ".jsonl"
        self.staging = out.with_name(f".{out.name}.{os.getpid()}.part")
        self.input_hashes, self.refused, self.left_out, self.card = {}, Counter(), Counter(), Counter()
        self.rows_in = self.rows_added = 0
        self.rows_out, self.digests, self.counts = Counter(), {}, Counter()
        self.seen, self.files, self.names, self.sizes = set(), {}, {}, {}

    def __enter__(self):
        with explain_os_errors(self.out):
            self.staging.mkdir(parents=True)
            self.rejected = open(self.staging / "rejected.jsonl", "wb")
        return self

    def __exit__(self, *_):
        for file in (self.rejected, *self.files.values()):
            with suppress(OSError, pa.ArrowInvalid):
                file.close()
        shutil.rmtree(self.staging, ignore_errors=True)

    def add(self, result):
        """Write a Result. An id that is taken becomes ID-2, ID-3 …"""
        with explain_os_errors(self.out):
            self.rows_in, self.rows_added = self.rows_in + result.rows_in, self.rows_added + result.rows_added
            self.counts += result.counts
            for split, rows in result.encoded.items():
                if rows.ids:
                    self.write(split, rows)
            for entry in result.rejected:
                self.reject(entry)

    def reject(self, entry):
        """Count and list a refused row: file, line, id, reason, detail."""
        self.refused[entry["reason"]] += 1
        self.rejected.write(dump_json_lenient(entry) + b"\n")

    def write(self, split, rows):
        data = self.with_own_ids(rows)
        self.rows_out[split] += len(rows.ids)
        self.digests.setdefault(split, []).append(rows.digests)
        self.left_out += rows.left_out
        for key, count in rows.counts.items():
            self.card[(split, *key)] += count
        if self.is_jsonl:
            if split not in self.files:
                if self.files:
                    check_output_path(self.out, [*self.files, split])
                self.files[split] = open(self.staging / "rows.jsonl", "wb")  # noqa: SIM115 (closed in close())
            self.files[split].write(data)
            return
        if split not in self.files or self.sizes[split] >= SHARD:
            self.next_shard(split)
        self.files[split].write_batch(data)
        self.sizes[split] += data.nbytes

    def next_shard(self, split):
        if split in self.files:
            self.files[split].close()
        folder, names = self.staging / split, self.names.setdefault(split, [])
        folder.mkdir(exist_ok=True)
        names.append(f"{len(names):05d}.arrow")
        self.files[split], self.sizes[split] = Stream(folder / names[-1]), 0

    def hold_out(self, count, split="train", to="validation"):
        """Move `count` rows of a split, drawn by seed, to another. Only in a folder."""
        total, parts = self.rows_out[split], b"".join(self.digests.pop(split))
        drawn = {*random.Random(self.seed).sample(range(total), count)}
        with explain_os_errors(self.out):
            self.files.pop(split).close()
            before, start = (self.staging / split).rename(self.staging / "undivided"), 0
            for name in self.names.pop(split):
                with pa.memory_map(str(before / name)) as source:
                    for batch in pa.ipc.open_stream(source):
                        for key, rows in counts_of(batch).items():
                            self.card[(split, *key)] -= rows
                        held = np.array([number in drawn for number in range(start, start + len(batch))])
                        for name_of_part, mask in ((split, ~held), (to, held)):
                            part = batch.filter(pa.array(mask))
                            self.rows_out[split] -= len(part)
                            self.seen -= {*part.column(0).to_pylist()}
                            digests = b"".join(parts[32 * n : 32 * n + 32] for n in start + np.flatnonzero(mask))
                            if len(part):
                                self.write(name_of_part, packed_batch(part, digests))
                        start += len(batch)
            shutil.rmtree(before)
        self.card = +self.card

    def with_own_ids(self, rows):
        ids = [self.unique(row_id) for row_id in rows.ids]
        if ids == rows.ids:
            return rows.data
        if self.is_jsonl:
            pairs = zip(rows.data.splitlines(), ids, strict=True)
            return b"".join(dump_json(load_json(line) | {"id": row_id}) + b"\n" for line, row_id in pairs)
        return rows.data.set_column(0, SCHEMA.field(0), pa.array(ids, pa.string()))

    def unique(self, row_id):
        name, number = row_id, 1
        while name in self.seen:
            number += 1
            name = f"{row_id}-{number}"
        self.seen.add(name)
        return name

    def close(self, more=None, extra=()):
        """Finish and rename; the report. more: what the step adds to it; extra: (file name, text) of a folder."""
        if self.rows_in + self.rows_added != sum(self.rows_out.values()) + self.refused.total():
            raise AssertionError(f"{self.script}: {self.rows_in} rows in + {self.rows_added} added are not "
                                 f"{sum(self.rows_out.values())} out + {self.refused.total()} refused")  # fmt: skip
        hashes = {split: hashlib.sha256(b"".join(parts)).hexdigest() for split, parts in self.digests.items()}
        report = make_report(
            self.script, self.rows_in, dict(self.rows_out), self.refused, self.seed, self.input_hashes, hashes
        )
        report |= {"added": self.rows_added} if self.rows_added else {}
        report |= more or {}
        report |= {"columns_left_out": dict(sorted(self.left_out.items()))} if self.left_out else {}
        with explain_os_errors(self.out):
            for file in (self.rejected, *self.files.values()):
                file.close()
            text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
            if self.is_jsonl:
                out = self.out
                write_utf8(self.staging / "report.json", text)
                # the report last: it vouches for the others
                for name, path in (("rejected.jsonl", out.with_suffix(".rejected.jsonl")), ("rows.jsonl", out),
                                   ("report.json", out.with_suffix(".report.json"))):  # fmt: skip
                    if (self.staging / name).exists():
                        (self.staging / name).replace(path)
                return report
            for split, names in self.names.items():
                self.finish(split, names, hashes[split])
            write_utf8(self.staging / "dataset_dict.json", json.dumps({"splits": list(self.names)}))
            files = {"report.json": text, "card.md": make_card(self.out.name, self.card)} | dict(extra)
            for name, content in files.items():
                write_utf8(self.staging / name, content)
            self.staging.rename(self.out)
        return report

    def finish(self, split, names, digest):
        """What save_to_disk writes beside the Arrow files, with the content's hash as its fingerprint, which datasets
        draws at random."""
        folder = self.staging / split
        final = [f"data-{number:05d}-of-{len(names):05d}.arrow" for number in range(len(names))]
        for name, last in zip(names, final, strict=True):
            (folder / name).rename(folder / last)
        state = {"_data_files": [{"filename": name} for name in final], "_fingerprint": digest[:16]}
        state |= {"_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False}
        info = {"citation": "", "description": "", "features": FEATURES, "homepage": "", "license": ""}
        write_utf8(folder / "state.json", json.dumps(state | {"_split": split}, indent=2, sort_keys=True))
        write_utf8(folder / "dataset_info.json", json.dumps(info, indent=2))


class Stream:
    """An Arrow file in the making."""

    def __init__(self, path):
        self.file = pa.OSFile(str(path), "wb")
        self.stream, self.waiting, self.size = pa.ipc.new_stream(self.file, SCHEMA), [], 0

    def write_batch(self, batch):
        self.waiting.append(batch)
        self.size += batch.nbytes
        if self.size >= BATCH:
            self.flush()

    def flush(self):
        if self.waiting:
            self.stream.write_batch(pa.concat_batches(self.waiting))
        self.waiting, self.size = [], 0

    def close(self):
        self.flush()
        self.stream.close()
        self.file.close()


class explain_os_errors:
    """Turns what the file system raises into UsageError about a path."""

    def __init__(self, out):
        self.out = out

    def __enter__(self):
        pass

    def __exit__(self, kind, error, _):
        if kind and issubclass(kind, OSError):
            raise UsageError(f"{self.out}: not written ({error}): make room or pass another --out") from None


def write_utf8(path, text):
    path.write_text(text, encoding="utf-8", newline="\n")


def make_report(script, total, out, refused, seed, inputs, hashes):
    """What report.json holds. inputs: {file: sha256}; `hash` is what later steps and resume checks compare."""
    return {
        "script": script,
        "in": total,
        "out": out,
        "refused": dict(sorted(refused.items())),
        "seed": seed,
        "versions": {"python": platform.python_version(), "pyarrow": version("pyarrow")},
        "input": inputs,
        "output": hashes,
        "hash": hash_of(hashes),
    }


def make_card(name, counts):
    """Markdown: rows by split, source, language and mode (think where a message shows reasoning)."""
    lines = [f"# {name}", "", "| split | source | language | mode | rows |", "|---|---|---|---|---|"]
    lines += ["| " + " | ".join(map(str, (*key, f"{count:,}"))) + " |" for key, count in sorted(counts.items())]
    return "\n".join(lines) + "\n"


def write_rows(out, script, splits, rejected=(), inputs=None, more=None, seed=None, extra=()):
    """Write {split: rows} that are in memory; the report."""
    with DatasetWriter(out, script, seed) as writer:
        writer.input_hashes |= inputs or {}
        if out.suffix == ".jsonl":
            check_output_path(out, splits)
        for split, rows in splits.items():
            for start in range(0, len(rows), ROWS):
                part = rows[start : start + ROWS]
                writer.add(ChunkResult({split: encode_rows(part, writer.is_jsonl)}, rows_in=len(part)))
        writer.add(ChunkResult(rejected=rejected, rows_in=len(rejected)))
        return writer.close(more, extra)


def write_files(files):
    """Write {path: text} aside and rename all when all are written, the last one last: it vouches for the others."""
    asides = {path: path.with_name(f".{path.name}.{os.getpid()}.part") for path in files}
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_utf8(asides[path], content)
        for path in files:
            asides[path].replace(path)
    finally:
        for aside in asides.values():
            with suppress(OSError):
                aside.unlink(missing_ok=True)


def write_text(path, text):
    """Write a file that a flag names. Raises UsageError."""
    try:
        write_files({path: text})
    except OSError as error:
        raise UsageError(f"{path}: not written ({error}): make room or pass another file") from None
