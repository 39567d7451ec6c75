"""Neighbouring rows of one file: what one call of a step works on, in whichever process."""

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from .arrow_rows import batch_to_rows
from .errors import InvalidRow
from .json_text import load_json

ROWS = 1000  # in a chunk, where the input is no lines of text


@dataclass
class Chunk:
    """Neighbouring rows of one file."""

    file: str  # as reports name it; in a dataset folder the name of the split
    split: str  # train, where the file says none
    first_line: int  # from 1; in arrays, tables and folders a line is a row
    data: bytes | list | pa.RecordBatch  # JSON lines, values, or Arrow

    def rows(self) -> Iterator[tuple[int, object]]:
        """Yield (line, row); row is an InvalidRow where a line is not JSON."""
        if isinstance(self.data, bytes):
            yield from self.parse_lines()
        elif isinstance(self.data, list):
            yield from enumerate(self.data, self.first_line)
        else:
            yield from enumerate(batch_to_rows(self.data), self.first_line)

    def parse_lines(self) -> Iterator[tuple[int, object]]:
        for line, text in enumerate(self.data.split(b"\n"), self.first_line):
            if not text or text.isspace():
                continue
            try:
                row = load_json(text)
            except InvalidRow as error:
                row = error
            yield line, row
