"""Read CSV and TSV: a row a record, cells as text."""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path

from .errors import InvalidRow, UsageError

DELIMITERS = (",", ";", "\t", "|")


def read_table(pieces: Iterator[str], path: Path) -> Iterator[object]:
    """Yield the records of a table as {column: text}, empty cells left out; a record of another width is an InvalidRow.

    The first record names the columns; the delimiter is the one that it holds most often. Raises UsageError.
    """
    csv.field_size_limit(sys.maxsize)
    lines = split_lines(pieces)
    header = next(lines, "")
    delimiter = "\t" if ".tsv" in path.suffixes else max(DELIMITERS, key=header.count)
    names = next(csv.reader([header], delimiter=delimiter), [])
    if not names:
        return
    if not all(names) or len(set(names)) != len(names):
        raise UsageError(f"{path}: its first line names no columns ({', '.join(names)}): write one name a column there")
    try:
        for cells in csv.reader(lines, delimiter=delimiter):
            if not cells:
                continue  # a blank line
            if len(cells) != len(names):
                yield InvalidRow("row of another width", f"{len(cells)} cells, {len(names)} columns")
            else:
                yield {name: cell for name, cell in zip(names, cells, strict=True) if cell != ""}
    except csv.Error as error:
        raise UsageError(f"{path}: not a table ({error}): mend it or pass JSON lines") from None


def split_lines(pieces: Iterator[str]) -> Iterator[str]:
    """Yield lines with their ends."""
    rest = ""
    for piece in pieces:
        *lines, rest = (rest + piece).split("\n")
        for line in lines:
            yield line + "\n"
    if rest:
        yield rest
