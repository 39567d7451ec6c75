"""Open files of text: compressed or not, in UTF-8, UTF-16 or UTF-32, as pieces of bytes in UTF-8."""

import codecs
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

import pyarrow as pa

from .errors import UsageError

HEAD = 1 << 20  # bytes that show what a file holds
BLOCK = 256 << 10  # bytes of the other pieces: what a step makes of them stays in a core's cache
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
BYTE_ORDER_MARKS = {  # the longer ones first: UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
BINARY = {  # how files begin that are no text, and what to do with them
    b"\x1f\x8b": "is compressed by gzip: name it .gz, as rows.jsonl.gz",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd: name it .zst, as rows.jsonl.zst",
    b"PAR1": "is a parquet file: name it .parquet",
    b"PK\x03\x04": "is a zip file or a sheet: unpack it, or save the sheet as .csv",
    b"BZh": "is compressed by bzip2: unpack it",
    b"\xfd7zXZ": "is compressed by xz: unpack it",
    b"ARROW1": "is an Arrow file: pass the folder that save_to_disk wrote",
}


class Digest(Protocol):
    """A hash of hashlib."""

    def update(self, data: bytes, /) -> None: ...


def open_bytes(path: Path) -> BinaryIO | pa.NativeFile:
    """Open a file, or stdin for -, and decompress it by its name."""
    if str(path) == "-":
        return sys.stdin.buffer
    return pa.input_stream(str(path), compression=COMPRESSIONS.get(path.suffix))


def read_pieces(path: Path, digest: Digest) -> Iterator[bytes]:
    """Yield the pieces of a file in UTF-8 without a byte order mark: HEAD bytes, then BLOCK bytes each.

    Bytes that are no UTF-8 reach the row that holds them. digest is updated with the bytes of the file. Raises
    UsageError for a file that is no text, UnicodeDecodeError for broken UTF-16 and UTF-32.
    """
    with open_bytes(path) as file:
        piece = file.read(HEAD)
        for magic, advice in BINARY.items():
            if piece.startswith(magic):
                raise UsageError(f"{path}: {advice}")
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


def decode_pieces(pieces: Iterator[bytes], errors: str = "strict") -> Iterator[str]:
    """Yield pieces of text. errors: surrogateescape keeps what is no UTF-8, strict raises UnicodeDecodeError."""
    return codecs.iterdecode(pieces, "utf-8", errors)
