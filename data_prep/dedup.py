"""Keep one of the rows that say the same: equal ones, and near ones by MinHash, in one pool and across pools.

    python -m data_prep.dedup data/gsm8k data/chats --out data/unique
    python -m data_prep.dedup data/chats --by prompt --threshold 0.7 --out data/prompts.jsonl

Pools (dataset folders or files of rows) are read in the order given and the first of equal rows stays, so name the pool
to keep first; a folder's train split comes before its validation split.
  exact   the same turns but for blanks, tools and template arguments (what mix.py removes too)
  near    Jaccard similarity of the sets of --ngram_size neighbouring words (ngrams.py: single characters in Chinese,
          Japanese, Korean), at least --threshold, among rows of the same tools and template arguments. MinHash (rensa)
          finds the pairs to look at, all but one in a hundred at the threshold itself; their similarity is then
          computed from the sets. What is alike in a chain is one cluster, whose first row stays. Not with --exact.
--by prompt compares the turns that are not the assistant's, without /think and /no_think: twins of a prompt become one.
Rows that differ in a number or a name only are near ones where they are long: read some of rejected.jsonl before use.

OUT is a dataset folder or a .jsonl file. rejected.jsonl names for each duplicate the row it repeats (file, line, id)
and their similarity, which in a chain may lie below the threshold. Rows are read twice, so stdin will not do; of each
row some 300 bytes stay in memory, its n-grams lie beside OUT until the end.

Exit 0: done. 1: no row is usable. 2: bad input, one sentence.
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from rensa import RMinHash

from data_prep.common.command_line import add_num_proc, format_counts, make_parser, run_command
from data_prep.common.errors import InvalidRow, UsageError
from data_prep.common.json_text import dump_json
from data_prep.common.ngrams import hashed, mixed, ngrams, words
from data_prep.common.parallel import parallel_map
from data_prep.common.readers import find_inputs, read_chunks, relative_names
from data_prep.common.row_keys import SWITCH, prompt_key, row_key
from data_prep.common.rows import check_shape, complete_row, iter_strings, refuse_unkept
from data_prep.common.writer import ChunkResult, DatasetWriter, encode_rows, row_location

SLOTS = 128  # hashes of a MinHash signature
CAUGHT = 0.99  # of the pairs at the threshold, that share a band
HEADS = 500  # rows of one bucket that a row is compared with, the last ones: unlike rows in it cost no square


@dataclass
class Look:
    """How rows are compared."""

    by: str
    exact: bool
    threshold: float
    ngram_size: int
    bands: int  # of a signature
    rows: int  # hashes in a band


# -- what is known of each row ----------------------------------------------------------------------------------------
def pool_blocks(paths, inputs):
    """Yield (number of its pool, Block) of all pools in order, a folder's named POOL/SPLIT."""
    names = relative_names(paths)
    for number, path in enumerate(paths):
        found, saved = {}, isinstance(path, Path) and path.is_dir()
        for block in read_chunks([path], found):
            yield number, replace(block, file=f"{names[path]}/{block.split}" if saved else names[path])
        inputs |= {f"{names[path]}/{name}" if saved else names[path]: digest for name, digest in found.items()}


def usable(row, block, line, out):
    """The house's row; raises InvalidRow."""
    row = complete_row(check_shape(row), Path(block.file).stem, line)
    refuse_unkept(row, out)
    return row


def said(row, by):
    """What is compared of a row, as words."""
    found = []
    for turn in row["messages"]:
        if by == "whole":
            for text in (turn.get("reasoning_content"), turn.get("content"), *iter_strings(turn.get("tool_calls"))):
                found += words(text or "")
        elif turn["role"] != "assistant":
            found += words(SWITCH.sub("", turn.get("content") or ""))
    return found


def shingles(row, look):
    """The n-grams of a row as a sorted set of 64-bit hashes; all its words as one where they are fewer than n."""
    found = hashed(said(row, look.by))
    out = np.unique(ngrams(found, min(look.ngram_size, len(found)) or 1))
    if look.by == "whole" and (row.get("tools") or row["chat_template_kwargs"]):
        apart = hashed([dump_json([row.get("tools"), row["chat_template_kwargs"]]).decode()])
        out = np.sort(mixed(out ^ apart))
    return out


def known(block, look, out):
    """Result of a Block; more: (key of each row, empty where it is refused, n-grams of all, their counts, bands)."""
    keys, sets, total = [], [], 0
    for line, row in block.rows():
        total += 1
        try:
            row = usable(row, block, line, out)
            keys.append(row_key(row) if look.by == "whole" else prompt_key(row).to_bytes(16, "little"))
            sets.append(np.zeros(0, "u8") if look.exact else shingles(row, look))
        except InvalidRow:  # told in the second reading
            keys.append(b"")
            sets.append(np.zeros(0, "u8"))
    flat, counts = np.concatenate([np.zeros(0, "u8"), *sets]), np.array([*map(len, sets)], int)
    return ChunkResult(rows_in=total, payload=(keys, flat, counts, bands_of(flat, counts, look)))


def bands_of(flat, counts, look):
    """A 64-bit hash of every band of the MinHash signature of every set."""
    if look.exact:
        return np.zeros((len(counts), 0), "u8")
    starts = np.concatenate([[0], np.cumsum(counts)]).astype("u8")
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(flat, starts, SLOTS, 0)
    slots = np.array(matrix.to_rows(), "u8").reshape(len(counts), SLOTS)[:, : look.bands * look.rows]
    slots = slots.reshape(len(counts) * look.bands, look.rows)
    out = slots[:, 0].copy()
    for number in range(1, look.rows):
        out = mixed(out * np.uint64(0x9E3779B97F4A7C15) + slots[:, number])
    return out.reshape(len(counts), look.bands)


def banding(threshold):
    """(bands, hashes in a band): the longest bands that catch CAUGHT of the pairs at the threshold."""
    rows = max(r for r in range(1, SLOTS + 1) if r == 1 or 1 - (1 - threshold**r) ** (SLOTS // r) >= CAUGHT)
    return SLOTS // rows, rows


# -- which rows repeat which ------------------------------------------------------------------------------------------
class Sets:
    """The n-grams of all rows, in a file."""

    def __init__(self, path, counts):
        self.ends = np.cumsum(counts)
        self.counts = counts
        self.data = np.memmap(path, "u8", "r") if self.ends[-1:].sum() else np.zeros(0, "u8")

    def similarity(self, one, other, least=0.0):
        """Jaccard similarity of two rows; 0 where their sizes alone show that it is below `least`."""
        small, large = sorted((self.counts[one], self.counts[other]))
        if small < least * large or not small:
            return 0.0
        a, b = (self.data[self.ends[row] - self.counts[row] : self.ends[row]] for row in (one, other))
        both = np.intersect1d(a, b, assume_unique=True).size
        return both / (len(a) + len(b) - both)


def repeated(keys, sets, bands, look):
    """For every row: the first row that is equal, the first row of its cluster (itself where there is none), and its
    similarity to that."""
    _, places, back = np.unique(keys, return_index=True, return_inverse=True)
    first = places[back]
    same, similar = first.copy(), np.ones(len(keys))
    if not look.exact:
        rows = np.flatnonzero((first == np.arange(len(keys))) & (sets.counts > 0))
        for row, head in clusters(bands, sets, rows, look.threshold).items():
            same[row], similar[row] = head, sets.similarity(row, head)
    return first, same[first], similar[first]


def clusters(bands, sets, rows, threshold):
    """{row: first row of its cluster} of the rows (indices, ascending) that are alike."""
    parent = {}

    def root(row):
        while (up := parent.get(row, row)) != row:
            parent[row] = row = parent.get(up, up)
        return row

    for band in range(bands.shape[1]):
        column = bands[rows, band]
        order = np.argsort(column, kind="stable")
        ordered = column[order]
        edges = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1], True])
        for start in np.flatnonzero(np.diff(edges) > 1):
            heads = []
            for row in rows[order[edges[start] : edges[start + 1]]].tolist():
                mine = root(row)
                near = heads[-HEADS:]
                if any(root(other) == mine for other in near):
                    continue
                for other in near:
                    if sets.similarity(row, other, threshold) >= threshold:
                        low, high = sorted((root(other), mine))
                        parent[high] = mine = low
                        break
                else:
                    heads.append(row)
    return {row: root(row) for row in parent if root(row) != row}


# -- rows out ---------------------------------------------------------------------------------------------------------
def sifted(block, out):
    """Result of a Block whose data is (Block, number of the row that each row repeats or -1, similarity to it, whether
    a row is repeated by others); more: [(place in the block, how rejected.jsonl names it)] of the last."""
    inner, repeats, similar, named = block.data
    result, rows, names = ChunkResult(), [], []
    for number, (line, row) in enumerate(inner.rows()):
        result.rows_in += 1
        where = row_location(inner.file, line, row)
        try:
            row = usable(row, inner, line, out)
        except InvalidRow as refusal:
            result.rejected.append(where | {"reason": refusal.reason, "detail": refusal.detail})
            continue
        if repeats[number] < 0:
            rows.append(row)
            if named[number]:
                names.append((number, where | {"id": row["id"]}))
        else:
            told = {"repeats": int(repeats[number]), "similarity": round(float(similar[number]), 4), "place": number}
            result.rejected.append(where | {"id": row["id"]} | told)
    result.encoded, result.payload = {inner.split: encode_rows(rows, out.suffix == ".jsonl")}, names
    return result


def main():
    parser = make_parser(__doc__)
    parser.add_argument("pools", nargs="+", metavar="POOL", help="dataset folder, or file of rows")
    parser.add_argument("--out", type=Path, required=True, help="NAME.jsonl, or a folder that does not exist yet")
    parser.add_argument("--by", choices=("whole", "prompt"), default="whole", help="what of a row is compared")
    parser.add_argument("--exact", action="store_true", help="equal rows only")
    parser.add_argument("--threshold", type=float, default=0.8, help="least similarity of near duplicates, default 0.8")
    parser.add_argument("--ngram_size", type=int, default=5, help="words of an n-gram, default 5")
    add_num_proc(parser)
    return run_command(parser, run)


def run(args):
    """The exit code; raises UsageError."""
    if not 0 < args.threshold <= 1:
        raise UsageError(f"--threshold {args.threshold}: pass a similarity above 0, at most 1")
    if args.ngram_size < 1:
        raise UsageError(f"--ngram_size {args.ngram_size}: pass a number of words of at least 1")
    paths = find_inputs(args.pools)
    if Path("-") in paths:
        raise UsageError("-: rows are read twice: write stdin to a file first")
    look = Look(args.by, args.exact, args.threshold, args.ngram_size, *banding(args.threshold))
    with DatasetWriter(args.out, "dedup.py") as writer:
        return dedup(args, paths, look, writer)


def dedup(args, paths, look, writer):
    owners, sizes, keys, counts, bands = [], [], [], [], []

    def blocks():
        for owner, block in pool_blocks(paths, writer.input_hashes):
            owners.append(owner)
            yield block

    with open(writer.staging / "ngrams", "wb") as file:
        for result in parallel_map(partial(known, look=look, out=args.out), blocks(), args.num_proc, "read"):
            some_keys, flat, some_counts, some_bands = result.payload
            sizes.append(result.rows_in)
            keys.append(np.array(some_keys, "S16"))
            counts.append(some_counts)
            bands.append(some_bands)
            file.write(flat)
    if not sum(sizes):
        raise UsageError(
            f"{', '.join(map(str, paths))}: no rows: pass pools of messages rows (python -m data_prep.normalize)"
        )
    keys, counts, bands = map(np.concatenate, (keys, counts, bands))
    sets = Sets(writer.staging / "ngrams", counts)
    first, same, similar = repeated(keys, sets, bands, look)
    (writer.staging / "ngrams").unlink()
    owner, starts = np.repeat(owners, sizes), np.cumsum([0, *sizes])
    named = np.isin(np.arange(len(same)), same[same != np.arange(len(same))])

    def marked():
        """The blocks once more, with what each of their rows repeats."""
        for number, (_, block) in enumerate(pool_blocks(paths, {})):
            part = slice(starts[number], starts[number + 1])
            rows = np.arange(part.start, part.stop)
            data = block, np.where(same[part] == rows, -1, same[part]), similar[part], named[part]
            yield replace(block, data=data)

    kept = {}  # row: what rejected.jsonl says of it
    for number, result in enumerate(parallel_map(partial(sifted, out=args.out), marked(), args.num_proc, "write")):
        kept |= {starts[number] + place: told for place, told in result.payload}
        for entry in result.rejected:
            if "repeats" in entry:
                row, head = starts[number] + entry.pop("place"), entry["repeats"]
                kind = "duplicate" if first[row] == head else "near duplicate"
                where = "in its pool" if owner[row] == owner[head] else "of another pool"
                entry |= {"reason": f"{kind} {where}", "repeats": kept[head]}
        writer.add(result)
    if not sum(writer.rows_out.values()):
        print(f"all {writer.rows_in} rows refused ({format_counts(writer.refused)})", file=sys.stderr)
        return 1
    compared = {"by": look.by, "exact": look.exact}
    compared |= {} if look.exact else {"threshold": look.threshold, "ngram_size": look.ngram_size}
    writer.close({"compared": compared})
    left = writer.refused.total()
    told = f" ({format_counts(writer.refused)})" if left else ""
    print(f"{args.out}: {sum(writer.rows_out.values()):,} rows kept of {writer.rows_in:,}, {left:,} left out{told}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
