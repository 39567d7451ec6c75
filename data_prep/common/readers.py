"""Read rows of files, folders and standard input, in chunks."""

import codecs
import glob
import hashlib
import json
import os
import re
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa

from .chunks import ROWS, Chunk
from .errors import UsageError
from .hub import download_files, hub_chunks

BLOCK = 256 << 10  # bytes of text that one call of `work` gets: what it makes of them stays in a core's cache


HEAD = 1 << 20  # bytes that tell what a file holds


SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst")


def find_inputs(patterns):
    """Paths of files, folders, globs and - (stdin), in the order given, a folder's in the order of their names. A
    save_to_disk folder is one path. A name like owner/name that is no file is a hub id and comes back as it is;
    hf://datasets/owner/name/path is downloaded. Raises UsageError."""
    paths = []
    for pattern in map(str, patterns):
        path = Path(pattern)
        if pattern.startswith("hf://"):
            path = download_files(pattern)
        if pattern == "-" or path.is_file() or is_dataset_folder(path):
            found = [path]
        elif path.is_dir():
            found = sorted((p for p in path.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES)), key=natural_order)
        else:
            found = sorted(map(Path, glob.glob(pattern, recursive=True)), key=natural_order)
            found = [p for p in found if p.is_file() or is_dataset_folder(p)]
            if not found and re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?(@[\w.-]+)?", pattern):
                found = [pattern]  # owner/name:config@split
        if [path] == found and path.is_file() and not path.name.endswith(SUFFIXES):
            raise UsageError(f"{pattern}: unknown kind of file: pass .jsonl, .json or .parquet (.gz, .zst)")
        if not found and path.is_dir():
            raise UsageError(f"{pattern}: a folder without rows: pass one of save_to_disk, of .jsonl or .parquet files")
        if not found:
            raise UsageError(
                f"{pattern}: no such file: pass .jsonl, .json, .parquet (.gz, .zst), a folder of them, a quoted glob, "
                "- for stdin, or a hub id owner/name"
            )
        paths += [path for path in found if path not in paths]
    return paths


def natural_order(path):
    """Sorts chunk_2 before chunk_10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def is_dataset_folder(path):
    """Whether the path is a folder that save_to_disk, or a step of this room, wrote."""
    return (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file()


def relative_names(paths):
    """{path: name without the machine's folders}: the same input gives the same bytes wherever it lies."""
    local = [path for path in paths if isinstance(path, Path) and str(path) != "-"]
    # links are not followed: the hub's cache has the files' names only as links
    top = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in local]) if local else ""
    names = {path: os.path.relpath(path, top) for path in local}
    return {path: names.get(path, "stdin" if str(path) == "-" else str(path)) for path in paths}


def read_chunks(paths, inputs=None):
    """Yield the Blocks of files, save_to_disk folders, stdin and hub ids, in order. inputs: a dict that is filled with
    {name: sha256 of the file}. Raises UsageError."""
    paths = [paths] if isinstance(paths, (str, Path)) else paths
    inputs = {} if inputs is None else inputs
    names = relative_names(paths)
    for path in paths:
        name = names[path]
        if isinstance(path, str):
            yield from hub_chunks(path, inputs)
        elif path.is_dir():
            yield from folder_chunks(path, inputs)
        elif path.suffix == ".parquet":
            yield from parquet_chunks(path, name, inputs)
        else:
            yield from text_chunks(path, name, inputs)


def read_rows(path):
    """Yield (line, row) of a file or folder; row is a InvalidRow where a line is not JSON. Raises UsageError."""
    for block in read_chunks(path):
        yield from block.rows()


def text_chunks(path, name, inputs):
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
            yield Chunk(name, "train", first, data)
            first += data.count(b"\n")
        if rest:
            yield Chunk(name, "train", first, b"".join(rest))
    except (OSError, EOFError, pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({' '.join(str(error).split())}): get or make it anew") from None
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
    within strings, which JSON forbids, another character that it forbids. Raises UsageError where the array does not
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
        raise UsageError(f"{path}:{line}: not JSON ({said}): mend the array or pass JSON lines")


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


def parquet_chunks(path, name, inputs):
    import pyarrow.parquet as pq

    try:
        first = 1
        for batch in pq.ParquetFile(path).iter_batches(ROWS):
            yield Chunk(name, "train", first, batch)
            first += len(batch)
        with open(path, "rb") as file:
            inputs[name] = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, pa.ArrowInvalid) as error:
        raise UsageError(f"{path}: cannot be read ({' '.join(str(error).split())}): get or make it anew") from None


def list_splits(path):
    """{split: [Arrow files]} of a save_to_disk folder, one set being the split train. Raises UsageError."""
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
        raise UsageError(f"{path}: cannot be read ({said}): make it anew (normalize.py, save_to_disk)") from None


def folder_chunks(path, inputs):
    for split, files in list_splits(path).items():
        digest = hashlib.sha256()
        yield from arrow_chunks(files, split, split, digest)
        inputs[split] = digest.hexdigest()


def arrow_chunks(files, name, split, digest):
    """Blocks of Arrow files, which go into digest. Raises UsageError."""
    first = 1
    for file in files:
        try:
            with pa.memory_map(str(file)) as source:
                for number, batch in enumerate(pa.ipc.open_stream(source)):
                    for start in range(0, len(batch), ROWS):
                        part = batch.slice(start, ROWS)
                        yield Chunk(name, split, first, part, (str(file), number, start))
                        first += len(part)
            with open(file, "rb") as source:
                digest.update(hashlib.file_digest(source, "sha256").digest())
        except (OSError, pa.ArrowInvalid) as error:
            said = " ".join(str(error).split())
            raise UsageError(f"{file}: cannot be read ({said}): make it anew (python -m data_prep.normalize)") from None
