"""Many rows: files of any usual kind in, dataset folders out, in blocks, so that a step's memory does not grow with
its input and its work spreads over processes.

    with Writer(args.out, "filter.py", args.seed) as writer:
        for result in spread(partial(work, words=words), read_blocks(args.path, writer.inputs), args.num_proc):
            writer.add(result)
        report = writer.close()

No script: the steps of this room are written with it. `work` is a function of one Block that returns a Result; it runs
in another process, so it must stand at the top of its file. Blocks, shards and their order depend on the input alone,
never on the number of processes: the same input and seed give the same bytes.

    in + added = out + refused    rows, in every report.json; a Writer stops a step whose counts do not add up
"""

import argparse
import codecs
import glob
import hashlib
import json
import multiprocessing
import os
import platform
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
from rows import COLUMNS, LONG_NUMBER, BadInput, Refused, dumped, loaded, schemas_of, unfilled, without_nulls
from tqdm import tqdm

BLOCK = 256 << 10  # bytes of text that one call of `work` gets: what it makes of them stays in a core's cache
HEAD = 1 << 20  # bytes that tell what a file holds
ROWS = 400  # and rows, where the input has no lines
WORTH = 0.3  # seconds of work after which the start of other processes pays
BATCH = 4 << 20  # bytes of Arrow data that are written at once
SHARD = 256 << 20  # bytes of Arrow data in a file of a folder
SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst")


# -- blocks in --------------------------------------------------------------------------------------------------------
@dataclass
class Block:
    """Neighbouring rows of one file. data: bytes of JSON lines, a list of values, or an Arrow RecordBatch."""

    file: str  # as reports name it; a split's name in a folder
    split: str  # train, where the file says none
    first: int  # line of its first row, from 1
    data: object
    place: tuple = None  # (Arrow file, number of the batch, row in it): other processes map it instead of getting it

    def __getstate__(self):
        return vars(self) | ({"data": len(self.data)} if self.place else {})

    def __setstate__(self, state):
        vars(self).update(state)
        if self.place:
            file, number, start = self.place
            self.data = batches_of(file)[number].slice(start, self.data)

    def own(self):
        """Whether the rows are a RecordBatch in SCHEMA."""
        return isinstance(self.data, pa.RecordBatch) and self.data.schema.equals(SCHEMA)

    def rows(self, only=None):
        """Yield (line, row); row is a Refused where a line is not JSON. Lines count from 1, in arrays, folders and
        parquet files they are rows. only: a mask (rows,) of those to yield, of a RecordBatch in SCHEMA."""
        if isinstance(self.data, bytes):
            long_numbers = holds_long_number(self.data)
            for number, line in enumerate(self.data.split(b"\n"), self.first):
                if line and not line.isspace():
                    try:
                        yield number, loaded(line, long_numbers)
                    except Refused as refusal:
                        yield number, refusal
        elif only is not None:
            numbers = (self.first + np.flatnonzero(only)).tolist()
            yield from zip(numbers, own_rows(self.data.filter(pa.array(only))), strict=True)
        else:
            values = self.data
            if not isinstance(values, list):
                values = own_rows(values) if self.own() else unfilled_rows(values)
            yield from enumerate(values, self.first)


def holds_long_number(data):
    """Whether 19 digits follow each other. Four neighbours of every fourth byte are digits then: the others need no
    pattern, which would take longer than the parser."""
    digits = np.frombuffer(data, np.uint8)[::4] - np.uint8(ord("0")) < 10
    places = 4 * np.flatnonzero(digits[:-3] & digits[1:-2] & digits[2:-1] & digits[3:])
    return any(LONG_NUMBER.search(data, max(0, place - 4), place + 24) for place in places.tolist())


def own_rows(batch):
    """The rows of a RecordBatch in SCHEMA: three times as fast as Arrow's to_pylist, and nothing is filled in there."""
    for row_id, messages, tools, kwargs, source, tags, lang in zip(*plain_columns(batch), strict=True):
        row = {"id": row_id, "messages": orjson.loads(f"[{','.join(messages)}]")}
        if tools is not None:
            row["tools"] = orjson.loads(f"[{','.join(tools)}]")
        row["chat_template_kwargs"] = {} if kwargs == "{}" else orjson.loads(kwargs)
        yield row | {"source": source, "tags": tags, "lang": lang}


def plain_columns(batch):
    """The columns of a RecordBatch in SCHEMA as lists, JSON as text."""
    return [(c.storage if isinstance(c, pa.ExtensionArray) else c).to_pylist() for c in batch.columns]


def unfilled_rows(batch):
    """The rows of a RecordBatch without what Arrow filled in: a key that some other row has is null here, in structs
    of any depth (ms-swift PR 10125: such tool schemas reached a template). JSON columns are parsed."""
    names = {"messages", "tools", "chat_template_kwargs"} & {*batch.schema.names}
    as_json = {n for n in names if holds_json(batch.schema.field(n).type)}
    for row in batch.to_pylist():
        row = {
            key: json_values(value) if key in as_json else without_nulls(value) if key == "tools" else value
            for key, value in row.items()
            if value is not None
        }
        tools = schemas_of(row["tools"]) if isinstance(row.get("tools"), list) else {}
        yield {key: value if key in as_json else unfilled_value(value, tools) for key, value in row.items()}


def unfilled_value(value, tools):
    """A value without nulls, but for those of tool calls whose tool knows the argument. tools: {name: schema}."""
    if isinstance(value, list):
        return [unfilled_value(item, tools) for item in value]
    if not isinstance(value, dict):
        return value
    known = tools.get(value.get("name")) if isinstance(value.get("arguments"), dict) else None
    return {
        key: unfilled(item, known, without_nulls) if known and key == "arguments" else unfilled_value(item, tools)
        for key, item in value.items()
        if item is not None
    }


def holds_json(kind):
    return isinstance(kind.value_type if pa.types.is_list(kind) else kind, pa.JsonType)


def json_values(value):
    return [orjson.loads(item) for item in value] if isinstance(value, list) else orjson.loads(value)


def find_inputs(patterns):
    """Paths of files, folders, globs and - (stdin), in the order given, a folder's in the order of their names. A
    save_to_disk folder is one path. A name like owner/name that is no file is a hub id and comes back as it is;
    hf://datasets/owner/name/path is downloaded. Raises BadInput."""
    paths = []
    for pattern in map(str, patterns):
        path = Path(pattern)
        if pattern.startswith("hf://"):
            path = hub_files(pattern)
        if pattern == "-" or path.is_file() or is_saved(path):
            found = [path]
        elif path.is_dir():
            found = sorted((p for p in path.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES)), key=counted_up)
        else:
            found = sorted(map(Path, glob.glob(pattern, recursive=True)), key=counted_up)
            found = [p for p in found if p.is_file() or is_saved(p)]
            if not found and re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?(@[\w.-]+)?", pattern):
                found = [pattern]  # owner/name:config@split
        if [path] == found and path.is_file() and not path.name.endswith(SUFFIXES):
            raise BadInput(f"{pattern}: unknown kind of file: pass .jsonl, .json or .parquet (.gz, .zst)")
        if not found and path.is_dir():
            raise BadInput(f"{pattern}: a folder without rows: pass one of save_to_disk, of .jsonl or .parquet files")
        if not found:
            raise BadInput(
                f"{pattern}: no such file: pass .jsonl, .json, .parquet (.gz, .zst), a folder of them, a quoted glob, "
                "- for stdin, or a hub id owner/name"
            )
        paths += [path for path in found if path not in paths]
    return paths


def counted_up(path):
    """Sorts chunk_2 before chunk_10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def is_saved(path):
    """Whether the path is a folder that save_to_disk, or a step of this room, wrote."""
    return (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file()


def names_of(paths):
    """{path: name without the machine's folders}: the same input gives the same bytes wherever it lies."""
    local = [path for path in paths if isinstance(path, Path) and str(path) != "-"]
    # links are not followed: the hub's cache has the files' names only as links
    top = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in local]) if local else ""
    names = {path: os.path.relpath(path, top) for path in local}
    return {path: names.get(path, "stdin" if str(path) == "-" else str(path)) for path in paths}


def read_blocks(paths, inputs=None):
    """Yield the Blocks of files, save_to_disk folders, stdin and hub ids, in order. inputs: a dict that is filled with
    {name: sha256 of the file}. Raises BadInput."""
    paths = [paths] if isinstance(paths, (str, Path)) else paths
    inputs = {} if inputs is None else inputs
    names = names_of(paths)
    for path in paths:
        name = names[path]
        if isinstance(path, str):
            yield from hub_blocks(path, inputs)
        elif path.is_dir():
            yield from folder_blocks(path, inputs)
        elif path.suffix == ".parquet":
            yield from parquet_blocks(path, name, inputs)
        else:
            yield from text_blocks(path, name, inputs)


def read_rows(path):
    """Yield (line, row) of a file or folder; row is a Refused where a line is not JSON. Raises BadInput."""
    for block in read_blocks(path):
        yield from block.rows()


def text_blocks(path, name, inputs):
    digest, first, rest = hashlib.sha256(), 1, []
    try:
        pieces = text_pieces(path, digest)
        head = next(pieces, b"")
        pieces = chain([head], pieces)
        for piece in array_lines(pieces, path) if is_array(head) else pieces:
            cut = piece.rfind(b"\n") + 1
            if not cut:
                rest.append(piece)
                continue
            data = b"".join([*rest, piece[:cut]])
            rest = [piece[cut:]] if piece[cut:] else []
            yield Block(name, "train", first, data)
            first += data.count(b"\n")
        if rest:
            yield Block(name, "train", first, b"".join(rest))
    except (OSError, EOFError, pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read ({' '.join(str(error).split())}): get or make it anew") from None
    inputs[name] = digest.hexdigest()


BOMS = {  # the longer ones first: UTF-32's begins with UTF-16's
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def text_pieces(path, digest):
    """Pieces of a file in UTF-8 without a byte order mark; UTF-16 and UTF-32 are told by theirs. What is no text
    reaches the row that holds it."""
    with open_text(path) as file:
        piece = file.read(HEAD)
        kind = next((kind for bom, kind in BOMS.items() if piece.startswith(bom)), None)
        decoder = codecs.getincrementaldecoder(kind)("surrogatepass") if kind not in (None, "utf-8-sig") else None
        for number, data in enumerate(chain([piece], iter(lambda: file.read(BLOCK), b""))):
            digest.update(data)
            if decoder:
                data = decoder.decode(data).encode("utf-8", "surrogatepass")
            elif not number:
                data = data.removeprefix(codecs.BOM_UTF8)
            if data:
                yield data
        if decoder:
            decoder.decode(b"", final=True)  # raises where the last character is cut


def open_text(path):
    if str(path) == "-":
        return pa.PythonFile(sys.stdin.buffer, "r") if not hasattr(sys.stdin.buffer, "fileno") else sys.stdin.buffer
    return pa.input_stream(str(path), compression={".gz": "gzip", ".zst": "zstd"}.get(path.suffix))


def is_array(head):
    """Whether a text begins one JSON array. Where its first line is a whole list and more follow, they are rows."""
    if head.lstrip()[:1] != b"[":
        return False
    line, _, more = head.lstrip().partition(b"\n")
    return not (line.rstrip().endswith(b"]") and more.lstrip()[:1] in (b"[", b"{"))


STEPS = np.zeros(256, np.int8)  # what a byte outside a string adds to the depth of nesting
STEPS[[*b"[{"]], STEPS[[*b"]}"]] = 1, -1


def array_lines(pieces, path):
    """The elements of one JSON array as lines, so that it streams: line breaks between values become blanks, those
    within strings, which JSON forbids, another character that it forbids. Raises BadInput where the array does not
    end."""
    rest, tried, line, opened, closed = b"", 0, 1, False, False
    for piece in chain(pieces, [b""]):  # the empty one: what is left is looked at
        rest += piece
        if not opened:
            rest, opened = rest.lstrip()[1:], True  # without its [
        if not closed and (not piece or len(rest) >= 2 * tried):  # in one long element: look when it has doubled
            data, end, closed = elements(rest)
            line += rest.count(b"\n", 0, end)
            rest = rest[end + closed :]
            tried = 0 if data else len(rest)
            if data:
                yield data
        if closed and rest.strip():
            break
    if rest.strip() or not closed:
        said = "text behind the array" if closed else "the array does not end"
        line += rest.count(b"\n", 0, len(rest.rstrip()))
        raise BadInput(f"{path}:{line}: not JSON ({said}): mend the array or pass JSON lines")


def elements(data):
    """(whole elements of an array as lines, where they end, whether the array ends there) of text that begins between
    two of them."""
    plain = data.replace(b"\\\\", b"..").replace(b'\\"', b"..")  # of the same length
    chars = np.frombuffer(plain, np.uint8)
    inside = np.logical_xor.accumulate(chars == ord('"'))
    steps = STEPS[chars]
    steps[inside] = 0
    brackets = np.flatnonzero(steps)
    depth = np.cumsum(steps[brackets], dtype=np.int32)
    ends = brackets[depth < 0]
    stop = ends[0] if len(ends) else len(data)
    commas = np.flatnonzero((chars[:stop] == ord(",")) & ~inside[:stop])
    commas = commas[np.append(depth, 0)[np.searchsorted(brackets, commas) - 1] == 0]
    end = int(stop if len(ends) else commas[-1] + 1 if len(commas) else 0)
    out = np.frombuffer(data, np.uint8)[:end].copy()
    breaks = out == ord("\n")
    out[breaks] = np.where(inside[:end][breaks], 11, ord(" "))
    out[commas] = ord("\n")
    return out.tobytes(), end, bool(len(ends))


def parquet_blocks(path, name, inputs):
    import pyarrow.parquet as pq

    try:
        first = 1
        for batch in pq.ParquetFile(path).iter_batches(ROWS):
            yield Block(name, "train", first, batch)
            first += len(batch)
        with open(path, "rb") as file:
            inputs[name] = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, pa.ArrowInvalid) as error:
        raise BadInput(f"{path}: cannot be read ({' '.join(str(error).split())}): get or make it anew") from None


def shards_of(path):
    """{split: [Arrow files]} of a save_to_disk folder, one set being the split train. Raises BadInput."""
    try:
        splits = {"train": path}
        if (path / "dataset_dict.json").is_file():
            splits = {s: path / s for s in json.loads((path / "dataset_dict.json").read_text())["splits"]}
        return {
            split: [folder / one["filename"] for one in json.loads((folder / "state.json").read_text())["_data_files"]]
            for split, folder in splits.items()
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = f"{type(error).__name__}: {error}"
        raise BadInput(f"{path}: cannot be read ({said}): make it anew (normalize.py, save_to_disk)") from None


def folder_blocks(path, inputs):
    for split, files in shards_of(path).items():
        digest = hashlib.sha256()
        yield from arrow_blocks(files, split, split, digest)
        inputs[split] = digest.hexdigest()


def arrow_blocks(files, name, split, digest):
    """Blocks of Arrow files, which go into digest. Raises BadInput."""
    first = 1
    for file in files:
        try:
            with pa.memory_map(str(file)) as source:
                for number, batch in enumerate(pa.ipc.open_stream(source)):
                    for start in range(0, len(batch), ROWS):
                        part = batch.slice(start, ROWS)
                        yield Block(name, split, first, part, (str(file), number, start))
                        first += len(part)
            with open(file, "rb") as source:
                digest.update(hashlib.file_digest(source, "sha256").digest())
        except (OSError, pa.ArrowInvalid) as error:
            said = " ".join(str(error).split())
            raise BadInput(f"{file}: cannot be read ({said}): make it anew (data_prep/normalize.py)") from None


@lru_cache(maxsize=4)
def batches_of(file):
    """The RecordBatches of an Arrow file, memory-mapped."""
    return [*pa.ipc.open_stream(pa.memory_map(file))]


def hub_files(pattern):
    """The folder (or file) hf://datasets/owner/name@revision/path as it lies in the repository, for sets whose own
    files are to be read and not what datasets makes of them. What will be downloaded is said first. Raises BadInput."""
    from huggingface_hub import HfApi, snapshot_download

    found = re.fullmatch(r"hf://datasets/([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?/(.+?)/*", pattern)
    if not found:
        raise BadInput(f"{pattern}: write hf://datasets/owner/name/path, path being a folder or file of the repository")
    repo, revision, path = found.groups()
    try:
        info = HfApi().dataset_info(repo, revision=revision, files_metadata=True)
        files = [one for one in info.siblings if one.rfilename == path or one.rfilename.startswith(f"{path}/")]
        size = sum(file.size or 0 for file in files) / 1e9
        print(f"{repo}: {len(files)} files, {size:.2f} GB ({info.sha[:8]}), kept in the cache", file=sys.stderr)
        names = [one.rfilename for one in files]
        folder = snapshot_download(repo, repo_type="dataset", revision=info.sha, allow_patterns=names) if names else ""
    except Exception as error:  # what hub clients raise: all mean the same here
        raise not_loaded(pattern, error, "pass a local folder, or set HF_ENDPOINT to a mirror") from None
    if not names:
        raise BadInput(f"{pattern}: {repo} has no such file or folder: see its page on the hub")
    return Path(folder, path)


def not_loaded(name, error, more):
    """BadInput about what the hub did not give."""
    said = " ".join(str(error).split())[:200].rstrip(".")
    return BadInput(f"{name}: could not be loaded from the hub ({type(error).__name__}: {said}): {more}")


def hub_blocks(name, inputs):
    """Blocks of a set on the hub, owner/name:config@split (split train). What will be downloaded is said first."""
    import datasets
    from huggingface_hub import HfApi

    repo, _, split = name.partition("@")
    repo, _, config = repo.partition(":")
    split = split or "train"
    try:
        info = HfApi().dataset_info(repo, files_metadata=True)
        size = sum(file.size or 0 for file in info.siblings) / 1e9
        print(f"{repo}: up to {size:.2f} GB to download ({info.sha[:8]}), kept in the cache", file=sys.stderr)
        rows = datasets.load_dataset(repo, config or None, split=split, revision=info.sha)
    except Exception as error:
        more = "pass a file, set HF_ENDPOINT to a mirror, or name config and split as owner/name:config@split"
        raise not_loaded(name, error, more) from None
    inputs[name] = info.sha
    first = 1
    for batch in rows.data.table.to_batches(ROWS):
        yield Block(name, "train", first, batch)
        first += len(batch)


# -- work over processes ----------------------------------------------------------------------------------------------
def cores():
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def starter():
    """How processes are started: forked from one that has imported what takes long and runs no threads. A fork of this
    one would copy locks that Arrow's threads hold."""
    # Windows has none, and its socket lies in the folder for temporary files, whose path may be too long for one
    if "forkserver" not in multiprocessing.get_all_start_methods() or len(tempfile.gettempdir()) > 60:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["numpy", "orjson", "pyarrow.compute", "tqdm", "xxhash", "yaml"])
    return context


def begin_work():
    """What a new process does first."""
    # Ctrl-C reaches it too: cut while it hands a result over, it would leave the script waiting for the rest
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    without_pandas()
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    """Where the script is killed, nothing would tell its processes: they would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def without_pandas():
    """Keep pyarrow from importing pandas, which it does at its first conversion and which takes 0.3 s a process: no
    step reads or makes pandas' objects. What a step imports later may import it."""

    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name == "pandas":
                raise ImportError(name)

    absent = Absent()
    sys.meta_path.insert(0, absent)
    try:
        pa.array([0])
    finally:
        sys.meta_path.remove(absent)


def spread(work, blocks, num_proc=None, name="rows"):
    """Yield work(block) for every block, in order, on num_proc processes. Not given: on all processors, which start
    once a second of work has shown that there is more of it, and until they have started the work goes on here. Raises
    BadInput where a process dies."""
    blocks, begin = iter(blocks), time.monotonic()
    bar = tqdm(desc=name, unit=" blocks", disable=not sys.stderr.isatty())

    def here(until=lambda: False):
        for block in blocks:
            yield work(block)
            bar.update()
            if until():
                return

    with bar:
        if num_proc == 1:
            yield from here()
        if not num_proc:
            yield from here(lambda: time.monotonic() - begin > WORTH)
        ahead = [*islice(blocks, 2)]
        many = num_proc or cores()
        if many == 1 or len(ahead) < 2:
            blocks = chain(ahead, blocks)
            yield from here()
            return
        blocks = chain(ahead, blocks)
        with ProcessPoolExecutor(many, starter(), begin_work) as pool:
            try:
                if not num_proc:
                    started = [pool.submit(os.getpid) for _ in range(many)]
                    yield from here(lambda: all(one.done() for one in started))
                waiting = deque()
                while True:
                    while len(waiting) < 2 * many and (block := next(blocks, None)) is not None:
                        waiting.append(pool.submit(work, block))
                    if not waiting:
                        return
                    yield waiting.popleft().result()
                    bar.update()
            except BrokenProcessPool:
                raise BadInput("a process died, most likely out of memory: pass a smaller --num_proc") from None
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


@dataclass
class Result:
    """What a step made of one Block: packed rows by split, and where the others went."""

    packed: dict = field(default_factory=dict)  # {split: Packed}
    rejected: list = field(default_factory=list)  # entries of rejected.jsonl
    total: int = 0  # rows in
    added: int = 0  # rows out that were not in: an expanded row counts for each beyond the first
    counts: Counter = field(default_factory=Counter)  # what else the step counts
    more: object = None  # what else the step hands back


@dataclass
class Packed:
    """Rows as they go to disk: a RecordBatch, or bytes of JSON lines."""

    data: object
    ids: list
    digests: bytes  # sha256 of every row without its id, 32 bytes a row
    counts: Counter  # rows by (source, lang, mode)
    left_out: Counter  # columns that a folder does not keep


def packed(rows, lines=False):
    """Packed rows. lines: as JSON lines, which keep every column."""
    if not lines:
        left_out = Counter(name for row in rows if not row.keys() <= KEPT for name in row.keys() - KEPT)
        return bundled([encoded(row) for row in rows], left_out=left_out)
    data, digests = (b"".join(parts) for parts in ([dumped(row) + b"\n" for row in rows], map(row_digest, rows)))
    counts = Counter((row["source"], row["lang"], "think" if thinks(row) else "no_think") for row in rows)
    return Packed(data, [row["id"] for row in rows], digests, counts, Counter())


def thinks(row):
    return any(["reasoning_content" in turn for turn in row["messages"]])


def encoded(row):
    """(id, messages, tools or None, kwargs, source, tags, lang, whether it thinks) of a row, JSON as bytes, without the
    columns that a folder does not keep. Raises Refused, TypeError, RecursionError where no file can hold it."""
    messages = [dumped(turn) for turn in row["messages"]]
    tools = None if row.get("tools") is None else [dumped(tool) for tool in row["tools"]]
    kwargs = dumped(row["chat_template_kwargs"]) if row["chat_template_kwargs"] else b"{}"
    if not row["id"].isascii():
        dumped(row["id"])
    tail_of(row["source"], tuple(row["tags"]), row["lang"])
    return row["id"], messages, tools, kwargs, row["source"], row["tags"], row["lang"], thinks(row)


def bundled(rows, lines=False, left_out=()):
    """Packed of encoded() rows."""
    told = [body_of(*row[1:-1]) for row in rows]
    digests = b"".join([hashlib.sha256(b"{" + body).digest() for body in told])
    ids, messages, tools, kwargs, sources, tags, langs, think = zip(*rows, strict=True) if rows else [()] * 8
    counts = Counter(zip(sources, langs, ["think" if one else "no_think" for one in think], strict=True))
    data = record_batch(ids, messages, tools, kwargs, sources, tags, langs) if not lines else told_lines(ids, told)
    return Packed(data, [*ids], digests, counts, Counter(left_out))


def told_lines(ids, told):
    """JSON lines (bytes) of rows' ids and bodies."""
    return b"".join([b'{"id":' + dumped(row_id) + b"," + body + b"\n" for row_id, body in zip(ids, told, strict=True)])


KEPT, TOLD = {*COLUMNS}, ("source", "tags", "lang")


def body_of(messages, tools, kwargs, source, tags, lang):
    """A row as dumped() writes it without its id and first brace, of messages, tools and kwargs that are JSON."""
    said = b"" if tools is None else b'"tools":[' + b",".join(tools) + b"],"
    head = b'"messages":[' + b",".join(messages) + b"]," + said + b'"chat_template_kwargs":' + kwargs + b","
    return head + tail_of(source, tuple(tags), lang)


@lru_cache(maxsize=1000)
def tail_of(source, tags, lang):
    """The end of a row as dumped() writes it: few sets have many."""
    return dumped({"source": source, "tags": tags, "lang": lang})[1:]


def row_digest(row):
    """sha256 of a row without its id: its content, whatever it is called and wherever it lies."""
    content = {key: value for key, value in row.items() if key != "id" and value is not None}
    return hashlib.sha256(dumped(content)).digest()


def content_hash(rows):
    """sha256 of the rows' digests, in their order. It does not depend on paths, versions, time or shards."""
    return hashlib.sha256(b"".join(row_digest(row) for row in rows)).hexdigest()


def hash_of(hashes):
    """The `hash` of report.json, from {split: content_hash}."""
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


# -- Arrow ------------------------------------------------------------------------------------------------------------
FEATURES = {  # as datasets writes Features: messages, tools and template arguments are JSON to Arrow, so no row is
    # filled with the null columns of another
    "id": {"dtype": "string", "_type": "Value"},
    "messages": {"feature": {"_type": "Json"}, "_type": "List"},
    "tools": {"feature": {"_type": "Json"}, "_type": "List"},
    "chat_template_kwargs": {"_type": "Json"},
    "source": {"dtype": "string", "_type": "Value"},
    "tags": {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"},
    "lang": {"dtype": "string", "_type": "Value"},
}


def schema_of(features):
    """The Arrow schema that datasets gives these features; datasets itself takes two seconds to import."""

    def kind(feature):
        if feature["_type"] == "List":
            return pa.list_(kind(feature["feature"]))
        return pa.json_() if feature["_type"] == "Json" else getattr(pa, feature["dtype"])()

    told = json.dumps({"info": {"features": features}})
    return pa.schema([(name, kind(feature)) for name, feature in features.items()], {"huggingface": told})


SCHEMA = schema_of(FEATURES)


def record_batch(ids, messages, tools, kwargs, sources, tags, langs):
    """A RecordBatch of columns whose JSON is bytes already."""
    columns = [
        pa.array(ids, pa.string()),
        pa.ListArray.from_arrays(offsets(messages), json_array([turn for turns in messages for turn in turns])),
        pa.ListArray.from_arrays(
            offsets([one or () for one in tools], [one is None for one in tools]),
            json_array([tool for one in tools for tool in one or ()]),
        ),
        json_array(kwargs),
        pa.array(sources, pa.string()),
        pa.array(tags, pa.list_(pa.string())),
        pa.array(langs, pa.string()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def json_array(values):
    """JSON (bytes) as Arrow's column: joined, which takes a tenth of the time of pa.array."""
    ends = np.cumsum([0, *map(len, values)], dtype=np.int32)
    text = pa.StringArray.from_buffers(len(values), pa.py_buffer(ends), pa.py_buffer(b"".join(values)))
    return pa.ExtensionArray.from_storage(pa.json_(), text)


def offsets(lists, null=None):
    """Where lists begin and end in their chain, for ListArray; null where the list is."""
    ends, end = [0], 0
    for one in lists:
        end += len(one)
        ends.append(end)
    if null:
        ends[:-1] = [None if missing else start for start, missing in zip(ends, null, strict=False)]
    return pa.array(ends, pa.int32())


def bodies(batch):
    """The JSON of every row of a RecordBatch in SCHEMA without its id and first brace, in bytes: `"messages":[…],…}`,
    joined from what is JSON there already."""
    messages, tools = (joined(batch.column(name)) for name in ("messages", "tools"))
    said = pc.binary_join_element_wise(b'"tools":[', tools, b"],", b"").fill_null(b"")
    kwargs = batch.column("chat_template_kwargs").storage.cast(pa.binary())
    columns = zip(*(batch.column(name).to_pylist() for name in ("source", "tags", "lang")), strict=True)
    ends = pa.array([tail_of(source, tuple(tags), lang) for source, tags, lang in columns], pa.binary())
    parts = b'"messages":[', messages, b"],", said, b'"chat_template_kwargs":', kwargs, b",", ends
    return pc.binary_join_element_wise(*parts, b"").to_pylist()


def joined(column):
    """(rows,) binary: the JSON texts of each list with commas between, null where there is no list."""
    texts, offsets = column.flatten().storage.cast(pa.binary()), np.asarray(column.offsets)
    lists = pa.ListArray.from_arrays(pa.array(offsets - offsets[0]), texts)
    return pc.if_else(column.is_valid(), pc.binary_join(lists, b","), None)


def json_lines(batch, told=None):
    """JSON lines (bytes) of a RecordBatch in SCHEMA. told: its bodies, where they are at hand."""
    return told_lines(batch.column(0).to_pylist(), told or bodies(batch))


def packed_batch(batch, digests=None):
    """Packed rows of a RecordBatch in SCHEMA."""
    digests = digests or b"".join([hashlib.sha256(b"{" + body).digest() for body in bodies(batch)])
    return Packed(batch, batch.column(0).to_pylist(), digests, counts_of(batch), Counter())


def counts_of(batch):
    """Rows of a RecordBatch by (source, lang, mode)."""
    column = batch.column("messages")
    found, offsets = pc.match_substring(column.flatten().storage, '"reasoning_content"'), np.asarray(column.offsets)
    seen = np.concatenate([[0], np.cumsum(np.asarray(found))])[offsets - offsets[0]]
    modes = ["think" if think else "no_think" for think in seen[1:] > seen[:-1]]
    return Counter(zip(batch.column("source").to_pylist(), batch.column("lang").to_pylist(), modes, strict=True))


# -- folders and files out --------------------------------------------------------------------------------------------
def place(file, line, row):
    """Where a row comes from, as findings and rejected.jsonl name it."""
    return {"file": file, "line": line, "id": str(row.get("id", "")) if isinstance(row, dict) else ""}


def check_out(out, splits=()):
    """Raises BadInput where OUT cannot be what these splits are written to, before the work is done."""
    if out.exists():
        raise BadInput(f"{out}: exists already: remove it or pass another --out")
    if out.suffix == ".jsonl" and len(splits) > 1:
        raise BadInput(f"{out}: a file has no splits, the data has {', '.join(splits)}: pass a folder as --out")


class Writer:
    """Writes OUT: a .jsonl file with NAME.report.json and NAME.rejected.jsonl beside it, or a dataset folder (for
    load_from_disk, with report.json, rejected.jsonl, card.md). All of it is written aside and renamed in close();
    without close() nothing is left. Raises BadInput where it cannot be written."""

    def __init__(self, out, script, seed=None):
        check_out(out)
        self.out, self.script, self.seed, self.lines = out, script, seed, out.suffix == ".jsonl"
        self.aside = out.with_name(f".{out.name}.{os.getpid()}.part")
        self.inputs, self.refused, self.left_out, self.card = {}, Counter(), Counter(), Counter()
        self.total = self.added = 0
        self.rows, self.digests, self.counts = Counter(), {}, Counter()
        self.seen, self.files, self.names, self.sizes = set(), {}, {}, {}

    def __enter__(self):
        with told(self.out):
            self.aside.mkdir(parents=True)
            self.rejected = open(self.aside / "rejected.jsonl", "wb")
        return self

    def __exit__(self, *_):
        for file in (self.rejected, *self.files.values()):
            with suppress(OSError, pa.ArrowInvalid):
                file.close()
        shutil.rmtree(self.aside, ignore_errors=True)

    def add(self, result):
        """Write a Result. An id that is taken becomes ID-2, ID-3 …"""
        with told(self.out):
            self.total, self.added = self.total + result.total, self.added + result.added
            self.counts += result.counts
            for split, rows in result.packed.items():
                if rows.ids:
                    self.write(split, rows)
            for entry in result.rejected:
                self.reject(entry)

    def reject(self, entry):
        """Count and list a refused row: file, line, id, reason, detail."""
        self.refused[entry["reason"]] += 1
        self.rejected.write(dumped_anyhow(entry) + b"\n")

    def write(self, split, rows):
        data = self.with_own_ids(rows)
        self.rows[split] += len(rows.ids)
        self.digests.setdefault(split, []).append(rows.digests)
        self.left_out += rows.left_out
        for key, count in rows.counts.items():
            self.card[(split, *key)] += count
        if self.lines:
            if split not in self.files:
                if self.files:
                    check_out(self.out, [*self.files, split])
                self.files[split] = open(self.aside / "rows.jsonl", "wb")  # noqa: SIM115 (closed in close())
            self.files[split].write(data)
            return
        if split not in self.files or self.sizes[split] >= SHARD:
            self.next_shard(split)
        self.files[split].write_batch(data)
        self.sizes[split] += data.nbytes

    def next_shard(self, split):
        if split in self.files:
            self.files[split].close()
        folder, names = self.aside / split, self.names.setdefault(split, [])
        folder.mkdir(exist_ok=True)
        names.append(f"{len(names):05d}.arrow")
        self.files[split], self.sizes[split] = Stream(folder / names[-1]), 0

    def hold_out(self, count, split="train", to="validation"):
        """Move `count` rows of a split, drawn by seed, to another. Only in a folder."""
        total, parts = self.rows[split], b"".join(self.digests.pop(split))
        drawn = {*random.Random(self.seed).sample(range(total), count)}
        with told(self.out):
            self.files.pop(split).close()
            before, start = (self.aside / split).rename(self.aside / "undivided"), 0
            for name in self.names.pop(split):
                with pa.memory_map(str(before / name)) as source:
                    for batch in pa.ipc.open_stream(source):
                        for key, rows in counts_of(batch).items():
                            self.card[(split, *key)] -= rows
                        held = np.array([number in drawn for number in range(start, start + len(batch))])
                        for name_of_part, mask in ((split, ~held), (to, held)):
                            part = batch.filter(pa.array(mask))
                            self.rows[split] -= len(part)
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
        if self.lines:
            pairs = zip(rows.data.splitlines(), ids, strict=True)
            return b"".join(dumped(loaded(line) | {"id": row_id}) + b"\n" for line, row_id in pairs)
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
        if self.total + self.added != sum(self.rows.values()) + self.refused.total():
            raise AssertionError(f"{self.script}: {self.total} rows in + {self.added} added are not "
                                 f"{sum(self.rows.values())} out + {self.refused.total()} refused")  # fmt: skip
        hashes = {split: hashlib.sha256(b"".join(parts)).hexdigest() for split, parts in self.digests.items()}
        report = report_of(self.script, self.total, dict(self.rows), self.refused, self.seed, self.inputs, hashes)
        report |= {"added": self.added} if self.added else {}
        report |= more or {}
        report |= {"columns_left_out": dict(sorted(self.left_out.items()))} if self.left_out else {}
        with told(self.out):
            for file in (self.rejected, *self.files.values()):
                file.close()
            text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
            if self.lines:
                out = self.out
                write(self.aside / "report.json", text)
                # the report last: it vouches for the others
                for name, path in (("rejected.jsonl", out.with_suffix(".rejected.jsonl")), ("rows.jsonl", out),
                                   ("report.json", out.with_suffix(".report.json"))):  # fmt: skip
                    if (self.aside / name).exists():
                        (self.aside / name).replace(path)
                return report
            for split, names in self.names.items():
                self.finish(split, names, hashes[split])
            write(self.aside / "dataset_dict.json", json.dumps({"splits": list(self.names)}))
            files = {"report.json": text, "card.md": card(self.out.name, self.card)} | dict(extra)
            for name, content in files.items():
                write(self.aside / name, content)
            self.aside.rename(self.out)
        return report

    def finish(self, split, names, digest):
        """What save_to_disk writes beside the Arrow files, with the content's hash as its fingerprint, which datasets
        draws at random."""
        folder = self.aside / split
        final = [f"data-{number:05d}-of-{len(names):05d}.arrow" for number in range(len(names))]
        for name, last in zip(names, final, strict=True):
            (folder / name).rename(folder / last)
        state = {"_data_files": [{"filename": name} for name in final], "_fingerprint": digest[:16]}
        state |= {"_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False}
        info = {"citation": "", "description": "", "features": FEATURES, "homepage": "", "license": ""}
        write(folder / "state.json", json.dumps(state | {"_split": split}, indent=2, sort_keys=True))
        write(folder / "dataset_info.json", json.dumps(info, indent=2))


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


class told:
    """Turns what the file system raises into BadInput about a path."""

    def __init__(self, out):
        self.out = out

    def __enter__(self):
        pass

    def __exit__(self, kind, error, _):
        if kind and issubclass(kind, OSError):
            raise BadInput(f"{self.out}: not written ({error}): make room or pass another --out") from None


def dumped_anyhow(entry):
    """An entry of rejected.jsonl as JSON bytes: a refused row may hold what no file in UTF-8 can."""
    try:
        return dumped(entry)
    except Refused:
        return json.dumps(entry).encode()


def write(path, text):
    path.write_text(text, encoding="utf-8", newline="\n")


def report_of(script, total, out, refused, seed, inputs, hashes):
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


def card(name, counts):
    """Markdown: rows by split, source, language and mode (think where a message shows reasoning)."""
    lines = [f"# {name}", "", "| split | source | language | mode | rows |", "|---|---|---|---|---|"]
    lines += ["| " + " | ".join(map(str, (*key, f"{count:,}"))) + " |" for key, count in sorted(counts.items())]
    return "\n".join(lines) + "\n"


def write_rows(out, script, splits, rejected=(), inputs=None, more=None, seed=None, extra=()):
    """Write {split: rows} that are in memory; the report."""
    with Writer(out, script, seed) as writer:
        writer.inputs |= inputs or {}
        if out.suffix == ".jsonl":
            check_out(out, splits)
        for split, rows in splits.items():
            for start in range(0, len(rows), ROWS):
                part = rows[start : start + ROWS]
                writer.add(Result({split: packed(part, writer.lines)}, total=len(part)))
        writer.add(Result(rejected=rejected, total=len(rejected)))
        return writer.close(more, extra)


def write_files(files):
    """Write {path: text} aside and rename all when all are written, the last one last: it vouches for the others."""
    asides = {path: path.with_name(f".{path.name}.{os.getpid()}.part") for path in files}
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write(asides[path], content)
        for path in files:
            asides[path].replace(path)
    finally:
        for aside in asides.values():
            with suppress(OSError):
                aside.unlink(missing_ok=True)


def write_text(path, text):
    """Write a file that a flag names. Raises BadInput."""
    try:
        write_files({path: text})
    except OSError as error:
        raise BadInput(f"{path}: not written ({error}): make room or pass another file") from None


# -- scripts ----------------------------------------------------------------------------------------------------------
def parser_of(doc, **kwargs):
    """An argument parser as every script of this room has it: its docstring as help, no abbreviations."""
    form = argparse.RawTextHelpFormatter
    return argparse.ArgumentParser(description=doc, formatter_class=form, allow_abbrev=False, **kwargs)


def add_num_proc(parser):
    parser.add_argument("--num_proc", type=int, default=None, help="processes, default all processors; no other result")


def command(parser, run):
    """The exit code of a script: that of run(arguments), 2 with BadInput's sentence, or 130 after Ctrl-C."""
    args = parser.parse_args()
    if Path(getattr(sys.modules["__main__"], "__file__", "")).parent == Path(__file__).parent:  # no test's process
        without_pandas()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was written aside is removed
    try:
        if (getattr(args, "num_proc", None) or 1) < 1:
            raise BadInput(f"--num_proc {args.num_proc}: pass a number of at least 1")
        return run(args)
    except BadInput as error:
        return stop(str(error))
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130


def stop(sentence):
    """Print one sentence and return 2, the exit code for bad input."""
    print(sentence, file=sys.stderr)
    return 2


def summary(refused):
    """ "3 empty text, 1 not JSON" """
    return ", ".join(f"{count:,} {reason}" for reason, count in refused.most_common())
