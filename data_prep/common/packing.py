"""Packs, as TRL's pack_dataset makes them."""

import bisect
import math
from collections import defaultdict, deque

MAP_BATCH = 1000  # datasets' default batch of map(): TRL packs within it, never across


def pack_lengths(lengths, max_length, strategy="bfd", num_proc=None, one_stream=False):
    """The packs that TRL's pack_dataset makes of rows of these lengths (in tokens): a list of packs, each a list of
    pieces (row, start, end), [start, end) the tokens of the row.

    TRL packs within the batches of 1,000 rows that datasets' map hands it, each process its own stretch of rows, so the
    packs of a set are those of its batches, one after the other. one_stream: all rows are one batch."""
    shares = 1 if one_stream else min(num_proc or 1, len(lengths)) or 1
    size, rest = divmod(len(lengths), shares)
    batch_size = (one_stream and len(lengths)) or MAP_BATCH
    packs, start = [], 0
    for share in range(shares):
        stop = start + size + (share < rest)
        for first in range(start, stop, batch_size):
            batch = range(first, min(first + batch_size, stop))
            packs += (wrapped if strategy == "wrapped" else best_fit)(lengths, batch, max_length, strategy)
        start = stop
    return packs


def best_fit(lengths, batch, max_length, strategy):
    """Best fit decreasing: the longest piece first, into the fullest pack that still has room for it, and of equally
    full ones into the one that has been so for longest; else into a new pack. Longer rows are cut (bfd) or split."""
    import pyarrow as pa

    pieces = []
    for row in batch:
        ends = [min(lengths[row], max_length)] if strategy == "bfd" else [*range(max_length, lengths[row], max_length)]
        ends += [lengths[row]] if strategy != "bfd" else []
        starts = [0, *ends[:-1]]
        pieces += [(row, start, end) for start, end in zip(starts, ends, strict=True) if end > start]
    sizes = pa.array([end - start for _, start, end in pieces], pa.int32())
    # by Arrow, as TRL sorts: pieces of one length must come in the same order too
    ordered = pa.StructArray.from_arrays([sizes, pa.array(range(len(pieces)))], ["0", "1"]).sort("descending", by="0")
    packs, rooms, by_room = [], [], defaultdict(deque)  # rooms: the sorted rooms that packs with space have
    for size, index in zip(ordered.field(0).to_pylist(), ordered.field(1).to_pylist(), strict=True):
        place = bisect.bisect_left(rooms, size)
        if place < len(rooms):
            room = rooms[place]
            chosen = by_room[room].popleft()
            if not by_room[room]:
                rooms.pop(place)
        else:
            room, chosen = max_length, []
            packs.append(chosen)
        chosen.append(pieces[index])
        if room > size:
            if not by_room[room - size]:
                bisect.insort(rooms, room - size)
            by_room[room - size].append(chosen)
    return packs


def wrapped(lengths, batch, max_length, strategy):
    """One stream of the batch's tokens, cut every max_length tokens."""
    packs, room = [], 0
    for row in batch:
        start = 0
        while start < lengths[row]:
            if not room:
                packs.append([])
                room = max_length
            end = min(lengths[row], start + room)
            packs[-1].append((row, start, end))
            room, start = room - (end - start), end
    return packs


def count_steps(units, settings):
    """(optimizer steps of an epoch, of the run) over `units` packs or rows, on any number of processes, as the Trainer
    of transformers counts them: a last batch and a last accumulation that are not full are steps too."""
    passes = math.ceil(units / settings.per_device_train_batch_size)
    accumulation = settings.global_batch_size // settings.per_device_train_batch_size
    epoch = max(1, math.ceil(passes / accumulation))
    return epoch, settings.max_steps if settings.max_steps > 0 else math.ceil(settings.num_train_epochs * epoch)
