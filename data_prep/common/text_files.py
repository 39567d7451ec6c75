"""Open files of text: compressed or not, in UTF-8, UTF-16 or UTF-32, as pieces of bytes in UTF-8."""

import codecs
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import pyarrow as pa

from .errors import UsageError

HEAD = 1 << 20  # bytes that show what a file holds
BLOCK = 256 << 10  # bytes of the other pieces: what a step makes of them stays in a core's cache
BYTE_ORDER_MARKS = {  # the longer ones first: UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
WIDE_ENCODINGS = ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE")  # the longer ones first here, too
SIGNS = set('[{",;\t|')  # one of them stands early in JSON and in tables


class Compression(NamedTuple):
    """A compression of whole files."""

    name: str
    magic: bytes  # the file begins with it
    command: str  # writes the text to stdout
    suffix: str = ""  # of the files that are read, "" where none are


COMPRESSIONS = (
    Compression("gzip", b"\x1f\x8b", "zcat", ".gz"),
    Compression("zstd", b"\x28\xb5\x2f\xfd", "zstdcat", ".zst"),
    Compression("bzip2", b"BZh", "bzcat"),
    Compression("xz", b"\xfd7zXZ", "xzcat"),
)
BINARY = {  # how other files begin that are no text, and what to do with them
    b"PAR1": "is a parquet file: pass it as a file named .parquet",
    b"PK\x03\x04": "is a zip file or a sheet: unpack it, or save the sheet as .csv",
    b"ARROW1": "is an Arrow file: pass the folder that save_to_disk wrote",
}


class Digest(Protocol):
    """A hash of hashlib."""

    def update(self, data: bytes, /) -> None: ...


def open_bytes(path: Path) -> BinaryIO | pa.NativeFile:
    """Open a file, or stdin for -, and decompress it by its name. Raises UsageError for a name that is wrong."""
    if str(path) == "-":
        return sys.stdin.buffer
    for compression in COMPRESSIONS:
        if path.suffix and path.suffix == compression.suffix:
            check_is_compressed(path, compression)
            return pa.input_stream(str(path), compression=compression.name)
    return pa.input_stream(str(path), compression=None)


def check_is_compressed(path: Path, compression: Compression) -> None:
    with open(path, "rb") as file:
        head = file.read(len(compression.magic))
    if head and head != compression.magic:
        raise UsageError(f"{path}: is not compressed by {compression.name}: name it {path.stem}, or download it again")


def read_pieces(path: Path, digest: Digest) -> Iterator[bytes]:
    """Yield the pieces of a file in UTF-8 without a byte order mark: HEAD bytes, then BLOCK bytes each.

    Bytes that are no UTF-8 reach the row that holds them. digest is updated with the bytes of the file. Raises
    UsageError for a file that is no text, UnicodeDecodeError for broken UTF-16 and UTF-32.
    """
    with open_bytes(path) as file:
        piece = file.read(HEAD)
        check_is_text(piece, path)
        decoder = None
        for mark, encoding in BYTE_ORDER_MARKS.items():
            if decoder is None and piece.startswith(mark):
                decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
        start = len(codecs.BOM_UTF8) if piece.startswith(codecs.BOM_UTF8) else 0
        while piece:
            digest.update(piece)
            if decoder is None:
                text = piece[start:]
            else:
                text = decoder.decode(piece).encode("utf-8", "surrogatepass")
            if text:
                yield text
            start = 0
            piece = file.read(BLOCK)
        if decoder is not None:
            decoder.decode(b"", final=True)  # raises where the last character is cut


def check_is_text(head: bytes, path: Path) -> None:
    """Raise UsageError where a file, or stdin for -, begins as no text does that can be read."""
    is_stdin = str(path) == "-"
    name = "stdin" if is_stdin else str(path)
    for compression in COMPRESSIONS:
        if not head.startswith(compression.magic):
            continue
        advice = f"unpack it, as with {compression.command} {path} > rows.jsonl"
        if is_stdin:
            advice = f"unpack it on the way, as with {compression.command} FILE | python -m data_prep…"
        elif compression.suffix not in ("", path.suffix):
            advice = f"name it {compression.suffix}, as with mv {path} {path}{compression.suffix}"
        raise UsageError(f"{name}: is compressed by {compression.name}: {advice}")
    for magic, advice in BINARY.items():
        if head.startswith(magic):
            raise UsageError(f"{name}: {advice}")
    encoding = find_wide_encoding(head)
    if encoding:
        raise UsageError(
            f"{name}: is {encoding} without a byte order mark: save it as UTF-8, as with iconv -f {encoding} -t UTF-8"
        )


def find_wide_encoding(head: bytes) -> str:
    """Return UTF-16LE or the like where a text without a byte order mark is in it, else "": there alone has one of
    SIGNS zero bytes beside it."""
    if head.startswith(tuple(BYTE_ORDER_MARKS)):
        return ""
    if b"\0" not in head[:256].partition(b"\n")[0]:
        return ""  # a line further down may hold anything
    for encoding in WIDE_ENCODINGS:
        if not SIGNS.isdisjoint(head[:256].decode(encoding, "ignore")):
            return encoding
    return ""


def decode_pieces(pieces: Iterator[bytes], errors: str = "strict") -> Iterator[str]:
    """Yield pieces of text. errors: surrogateescape keeps what is no UTF-8, strict raises UnicodeDecodeError."""
    return codecs.iterdecode(pieces, "utf-8", errors)
