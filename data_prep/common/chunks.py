"""Neighbouring rows of one file: what one call of a step works on."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa

from .arrow_rows import SCHEMA, batch_rows
from .errors import InvalidRow
from .json_text import holds_long_number, load_json
from .nulls import rows_without_nulls

ROWS = 400  # and rows, where the input has no lines


@dataclass
class Chunk:
    """Neighbouring rows of one file. data: bytes of JSON lines, a list of values, or an Arrow RecordBatch."""

    file: str  # as reports name it; a split's name in a folder
    split: str  # train, where the file says none
    first_line: int  # line of its first row, from 1
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
        """Yield (line, row); row is a InvalidRow where a line is not JSON. Lines count from 1, in arrays, folders and
        parquet files they are rows. only: a mask (rows,) of those to yield, of a RecordBatch in SCHEMA."""
        if isinstance(self.data, bytes):
            long_numbers = holds_long_number(self.data)
            for number, line in enumerate(self.data.split(b"\n"), self.first_line):
                if line and not line.isspace():
                    try:
                        yield number, load_json(line, long_numbers)
                    except InvalidRow as refusal:
                        yield number, refusal
        elif only is not None:
            numbers = (self.first_line + np.flatnonzero(only)).tolist()
            yield from zip(numbers, batch_rows(self.data.filter(pa.array(only))), strict=True)
        else:
            values = self.data
            if not isinstance(values, list):
                values = batch_rows(values) if self.own() else rows_without_nulls(values)
            yield from enumerate(values, self.first_line)


@lru_cache(maxsize=4)
def batches_of(file):
    """The RecordBatches of an Arrow file, memory-mapped."""
    return [*pa.ipc.open_stream(pa.memory_map(file))]
