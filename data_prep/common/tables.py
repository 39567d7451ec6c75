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
    try:
        names = next(csv.reader([header], delimiter=delimiter, skipinitialspace=True), [])
    except csv.Error as error:
        raise not_a_table(path, 1, error) from None
    names = [name.strip() for name in names]
    if not names:
        return
    if len(names) > 1 and not names[0]:
        names[0] = "index"  # as pandas writes its own
    if not all(names) or len(set(names)) != len(names):
        raise UsageError(f"{path}: its first line names no columns ({', '.join(names)}): write one name a column there")
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        for cells in reader:
            if not cells:
                continue  # a blank line
            if len(cells) != len(names):
                yield InvalidRow("row of another width", f"{len(cells)} cells, {len(names)} columns")
            else:
                yield {name: cell for name, cell in zip(names, cells, strict=True) if cell != ""}
    except csv.Error as error:
        raise not_a_table(path, reader.line_num + 1, error) from None


def not_a_table(path: Path, line: int, error: csv.Error) -> UsageError:
    return UsageError(f"{path}:{line}: not a table ({error}): mend its quotes and line ends, or pass JSON lines")


def split_lines(pieces: Iterator[str]) -> Iterator[str]:
    """Yield lines with their ends."""
    rest = ""
    for piece in pieces:
        *lines, rest = (rest + piece).split("\n")
        for line in lines:
            yield line + "\n"
    if rest:
        yield rest
