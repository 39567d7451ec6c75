"""Read rows of files, dataset folders, standard input and the hub, a chunk at a time.

Files: JSON lines, a JSON array, one JSON object that wraps rows or holds columns, CSV, TSV, parquet; all but parquet
also as .gz and .zst.
"""

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pyarrow as pa

from .chunks import ROWS, Chunk
from .errors import UsageError
from .hub import download_files, read_hub
from .json_stream import read_array, read_documents
from .tables import read_table
from .text_files import decode_pieces, read_pieces

KINDS = (".jsonl", ".json", ".ndjson", ".csv", ".tsv")
SUFFIXES = (*KINDS, *[kind + packed for kind in KINDS for packed in (".gz", ".zst")], ".parquet")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?(@[\w.-]+)?")  # owner/name:config@split
STDIN = Path("-")
LONG_LINE = 64 << 20  # bytes: a longer one is taken for a file without line ends


# -- which files ------------------------------------------------------------------------------------------------------
def find_inputs(patterns: Iterable[str | Path]) -> list[Path | str]:
    """Return the paths of files, folders, globs and - (stdin), in the order given, a folder's in the order of names.

    A save_to_disk folder is one path. A hub id (owner/name:config@split) comes back as a string;
    hf://datasets/owner/name/path is downloaded. Raises UsageError.
    """
    paths = []
    for pattern in patterns:
        for path in find_input(str(pattern)):
            if path not in paths:
                paths.append(path)
    return paths


def find_input(pattern: str) -> list[Path | str]:
    path = Path(pattern)
    if pattern.startswith("hf://"):
        path = download_files(pattern)
    if path == STDIN or is_dataset_folder(path):
        return [path]
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise UsageError(
                f"{pattern}: unknown kind of file: pass .jsonl, .json, .csv, .tsv (.gz, .zst) or .parquet; save a "
                "sheet as .csv first"
            )
        return [path]
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.is_file() and file.name.endswith(SUFFIXES)]
        if not found:
            raise UsageError(
                f"{pattern}: a folder without rows: pass one of save_to_disk, or one of .jsonl, .csv or .parquet files"
            )
        return sorted(found, key=natural_order)
    found = [
        file for file in map(Path, glob.glob(pattern, recursive=True)) if file.is_file() or is_dataset_folder(file)
    ]
    if found:
        return sorted(found, key=natural_order)
    if is_hub_id(pattern):
        return [pattern]
    raise UsageError(
        f"{pattern}: no such file: pass .jsonl, .json, .csv, .tsv (.gz, .zst), .parquet, a folder of them, a quoted "
        "glob, - for stdin, or a hub id owner/name"
    )


def is_hub_id(pattern: str) -> bool:
    """Return whether a name that is no file may be a hub id: a file that is missing, or lies beside others, is none."""
    if not HUB_ID.fullmatch(pattern) or pattern.endswith(SUFFIXES):
        return False
    return not Path(pattern).parent.is_dir()


def natural_order(path: Path) -> list[tuple[int, str]]:
    """Return a sort key that puts chunk_2 before chunk_10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def is_dataset_folder(path: Path) -> bool:
    """Return whether save_to_disk, or a command of data_prep, wrote the folder."""
    return (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file()


def relative_names(paths: Iterable[Path | str]) -> dict[Path | str, str]:
    """Return {path: name without the machine's folders}: the same input gives the same bytes wherever it lies."""
    local = [path for path in paths if isinstance(path, Path) and path != STDIN]
    top = ""
    if local:
        # links are not followed: the hub's cache has the files' names only as links
        top = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in local])
    names = {}
    for path in paths:
        if path == STDIN:
            names[path] = "stdin"
        elif isinstance(path, Path):
            names[path] = os.path.relpath(path, top)
        else:
            names[path] = path
    return names


# -- their rows -------------------------------------------------------------------------------------------------------
def read_chunks(
    paths: Path | str | Iterable[Path | str], input_hashes: dict[str, str] | None = None
) -> Iterator[Chunk]:
    """Yield the chunks of files, save_to_disk folders, stdin and hub ids, in order. Raises UsageError.

    input_hashes: filled with {name: sha256 of the file}.
    """
    if isinstance(paths, (str, Path)):
        paths = [paths]
    if input_hashes is None:
        input_hashes = {}
    names = relative_names(paths)
    for path in paths:
        if isinstance(path, str):
            yield from read_hub(path, input_hashes)
        elif path.is_dir():
            yield from read_folder(path, input_hashes)
        elif path.suffix == ".parquet":
            yield from read_parquet(path, names[path], input_hashes)
        else:
            yield from read_text(path, names[path], input_hashes)


def read_rows(path: Path | str) -> Iterator[tuple[int, object]]:
    """Yield (line, row) of a file or folder; row is an InvalidRow where a line is not JSON. Raises UsageError."""
    for chunk in read_chunks(path):
        yield from chunk.rows()


def read_text(path: Path, name: str, input_hashes: dict[str, str]) -> Iterator[Chunk]:
    """Yield the chunks of a file of text, whose kind its first lines show."""
    place = Path("stdin") if path == STDIN else path
    digest = hashlib.sha256()
    try:
        pieces = read_pieces(path, digest)
        head = read_head(pieces)
        pieces = chain([head], pieces)
        if path.name.removesuffix(".gz").removesuffix(".zst").endswith((".csv", ".tsv")):
            yield from chunk_values(read_table(decode_pieces(pieces), place), name)
        elif is_array(head):
            yield from chunk_values(read_array(decode_pieces(pieces, "surrogateescape"), place), name)
        elif is_document(head):
            yield from chunk_values(read_documents(decode_pieces(pieces, "surrogateescape"), place), name)
        else:
            yield from chunk_lines(pieces, name)
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{place}: not {error.encoding} (byte 0x{error.object[error.start]:02x}): save it as UTF-8, as with "
            "iconv -f ENCODING -t UTF-8"
        ) from None
    except (OSError, EOFError, pa.ArrowInvalid) as error:
        raise unreadable(place, error) from None
    input_hashes[name] = digest.hexdigest()


def unreadable(path: Path | str, error: Exception) -> UsageError:
    message = " ".join(str(error).split())
    return UsageError(f"{path}: cannot be read ({message}): download or make it again")


def read_head(pieces: Iterator[bytes]) -> bytes:
    """Return the first pieces of a text, with its first line whole and something of the next."""
    head = b""
    for piece in pieces:
        head += piece
        _, _, rest = head.lstrip().partition(b"\n")
        if rest.strip() or len(head) > LONG_LINE:
            break
    return head


def is_array(head: bytes) -> bool:
    """Return whether a text begins one JSON array, and not a list a line."""
    head = head.lstrip()
    if not head.startswith(b"["):
        return False
    line, _, rest = head.partition(b"\n")
    return not (line.rstrip().endswith(b"]") and rest.lstrip()[:1] in (b"[", b"{"))


def is_document(head: bytes) -> bool:
    """Return whether a text holds JSON objects that are no lines: one object alone, or pretty-printed ones."""
    head = head.strip()
    if not head.startswith(b"{"):
        return False
    first, *others = head.split(b"\n")
    if is_json(first):
        return not others
    if re.match(rb'\{\s*\n\s*["}]', head):  # a brace alone, and a key below it
        return True
    if not any(is_json(line) for line in others[:100] if line.startswith(b"{")):
        return True
    # a broken first line is a row of its own, unless the whole lines below it are parts of the value that it begins
    return len(others) > 1 and begins_value(head)


def begins_value(text: bytes) -> bool:
    """Return whether a text is a JSON value, or could be the beginning of one: its last line may be cut."""
    whole, _, last = text.rpartition(b"\n")
    bracket = last.lstrip()[:1].strip(b'"-0123456789ntf')
    text = (whole + bracket).decode("utf-8", "replace").rstrip()
    try:
        json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError as error:
        return error.pos >= len(text)
    except (ValueError, RecursionError):
        return False
    return True


def is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def chunk_lines(pieces: Iterator[bytes], name: str) -> Iterator[Chunk]:
    """Yield chunks of whole lines, some of each piece."""
    first_line = 1
    rest = []
    for piece in pieces:
        end = piece.rfind(b"\n") + 1
        if not end:
            rest.append(piece)
            continue
        data = b"".join([*rest, piece[:end]])
        rest = [piece[end:]] if piece[end:] else []
        yield Chunk(name, "train", first_line, data)
        first_line += data.count(b"\n")
    if rest:
        yield Chunk(name, "train", first_line, b"".join(rest))


def chunk_values(values: Iterator[object], name: str) -> Iterator[Chunk]:
    """Yield chunks of ROWS values."""
    first_line = 1
    held = []
    for value in values:
        held.append(value)
        if len(held) == ROWS:
            yield Chunk(name, "train", first_line, held)
            first_line += len(held)
            held = []
    if held:
        yield Chunk(name, "train", first_line, held)


def chunk_table(table: pa.Table, name: str, split: str) -> Iterator[Chunk]:
    """Yield chunks of ROWS rows of an Arrow table, which may lie in a mapped file."""
    for start in range(0, len(table), ROWS):
        batches = table.slice(start, ROWS).combine_chunks().to_batches()
        yield Chunk(name, split, start + 1, batches[0])


def read_parquet(path: Path, name: str, input_hashes: dict[str, str]) -> Iterator[Chunk]:
    import pyarrow.parquet as pq

    try:
        first_line = 1
        for batch in pq.ParquetFile(path).iter_batches(ROWS):
            yield Chunk(name, "train", first_line, batch)
            first_line += len(batch)
        with open(path, "rb") as file:
            input_hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, pa.ArrowInvalid) as error:
        raise unreadable(path, error) from None


# -- dataset folders --------------------------------------------------------------------------------------------------
@dataclass
class Split:
    """One split of a dataset folder."""

    table: pa.Table  # memory-mapped
    files: list[str]  # the Arrow files that it lies in

    def hash(self) -> str:
        """Return the sha256 of the hashes of the files."""
        digest = hashlib.sha256()
        for path in self.files:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


def open_splits(path: Path) -> dict[str, Split]:
    """Return {name: Split} of a save_to_disk folder; a set without splits is train. Raises UsageError."""
    from datasets import load_from_disk

    try:
        loaded = load_from_disk(str(path))
    except IndexError:
        raise UsageError(
            f"{path}: holds no rows, or a split of it none, which datasets cannot load: leave it out"
        ) from None
    except Exception as error:  # what datasets, fsspec and Arrow raise: all mean the same here
        message = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UsageError(f"{path}: cannot be read ({message}): make it again (python -m data_prep.normalize)") from None
    if not isinstance(loaded, dict):
        loaded = {"train": loaded}
    splits = {}
    for name, rows in loaded.items():
        splits[str(name)] = Split(rows.data.table, [entry["filename"] for entry in rows.cache_files])
    return splits


def open_split(path: Path, name: str) -> Split:
    """Return one split of a save_to_disk folder. Raises UsageError."""
    splits = open_splits(path)
    if name not in splits:
        raise UsageError(f"{path}: no split {name}, only {', '.join(splits)}: name one of them")
    return splits[name]


def read_folder(path: Path, input_hashes: dict[str, str]) -> Iterator[Chunk]:
    """Yield the chunks of a save_to_disk folder, its splits in their order. Raises UsageError."""
    for name, split in open_splits(path).items():
        yield from chunk_table(split.table, name, name)
        input_hashes[name] = split.hash()
