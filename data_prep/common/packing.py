"""Packs, by TRL's own pack_dataset. Importing TRL takes seconds, so nothing is imported before something is packed."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from .recipe_settings import Settings

MAP_BATCH = 1000  # datasets' default batch of map(): TRL packs within it, never across


class Piece(NamedTuple):
    """The tokens [start, end) of a row, in a pack."""

    row: int
    start: int
    end: int


def stretches(rows: int, num_proc: int | None) -> list[range]:
    """Return the stretch of rows that each process of datasets' map() gets, as Dataset.shard(contiguous=True) cuts."""
    shares = min(num_proc or 1, rows) or 1
    size, rest = divmod(rows, shares)
    starts = [share * size + min(share, rest) for share in range(shares + 1)]
    return [range(start, end) for start, end in zip(starts[:-1], starts[1:], strict=True)]


def batches(rows: int, num_proc: int | None = None) -> Iterator[range]:
    """Yield the rows that TRL packs together, one batch of map() after the other."""
    for stretch in stretches(rows, num_proc):
        for start in range(0, len(stretch), MAP_BATCH):
            yield stretch[start : start + MAP_BATCH]


def pack_columns(columns: dict[str, pa.ListArray], max_length: int, strategy: str) -> pa.Table:
    """Return the packs that TRL makes of one batch. columns: lists of one value a token, a row each.

    The table has the same columns, a pack a row, and seq_lengths where the strategy keeps documents apart.
    """
    from datasets import Dataset, disable_progress_bars
    from trl.data_utils import pack_dataset

    disable_progress_bars()
    rows = Dataset(pa.table(columns))
    packs = pack_dataset(rows, max_length, strategy, {"batch_size": None})
    return packs.data.table.combine_chunks()


def pack_lengths(
    lengths: Sequence[int],
    max_length: int,
    strategy: str = "bfd",
    num_proc: int | None = None,
    one_stream: bool = False,
) -> list[list[Piece]]:
    """Return the packs that TRL makes of rows of these lengths, in tokens.

    TRL packs within the batches of 1,000 rows that map() hands it, each process its own stretch of rows: the packs of a
    set are those of its batches, one after the other. one_stream: all rows are one batch.
    """
    packs = []
    for batch in [range(len(lengths))] if one_stream else batches(len(lengths), num_proc):
        sizes = np.array([lengths[row] for row in batch], np.int64)
        if not sizes.sum():
            continue
        ends = np.cumsum(sizes)
        rows = np.repeat(np.arange(batch.start, batch.stop), sizes)
        positions = np.arange(ends[-1]) - np.repeat(ends - sizes, sizes)
        columns = {"row": nest(sizes, pa.array(rows)), "position": nest(sizes, pa.array(positions))}
        packed = pack_columns(columns, max_length, strategy)
        packs += [read_pieces(*pack) for pack in zip(*(packed[name].to_numpy() for name in columns), strict=True)]
    return packs


def read_pieces(rows: np.ndarray, positions: np.ndarray) -> list[Piece]:
    """Return the pieces of a pack, of the row and the position that each of its tokens has."""
    starts = np.flatnonzero(np.diff(rows, prepend=-1))  # two pieces of a row never share a pack: the first one fills it
    sizes = np.diff(starts, append=len(rows))
    return [
        Piece(row, start, start + size)
        for row, start, size in zip(rows[starts].tolist(), positions[starts].tolist(), sizes.tolist(), strict=True)
    ]


def nest(sizes: Sequence[int] | np.ndarray, values: pa.Array) -> pa.ListArray:
    """Return values as lists of these sizes."""
    offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def count_steps(units: int, settings: Settings) -> tuple[int, int]:
    """Return (optimizer steps of an epoch, of the run) over `units` packs or rows, on any number of processes.

    As the Trainer of transformers counts them: a last micro-batch and a last accumulation that are not full are steps
    too.
    """
    micro_batches = math.ceil(units / settings.per_device_train_batch_size)
    accumulation = settings.global_batch_size // settings.per_device_train_batch_size
    epoch = max(1, math.ceil(micro_batches / accumulation))
    if settings.max_steps > 0:
        return epoch, settings.max_steps
    return epoch, math.ceil(settings.num_train_epochs * epoch)
