"""Keep one of the rows that say the same: equal ones, and near ones by MinHash, in one set and across sets.

    python -m data_prep.dedup data/gsm8k data/chats --out data/unique
    python -m data_prep.dedup data/chats --by prompt --threshold 0.7 --out data/prompts.jsonl

Sets (dataset folders or files of rows) are read in the order of the command line and the first of equal rows stays, so
name the set to keep first; a folder's train split comes before its validation split.
  exact   the same turns but for blanks, tools and template arguments (what mix removes too)
  near    Jaccard similarity of the sets of --ngram_size neighbouring words (single characters in Chinese, Japanese,
          Korean), at least --threshold, among rows of the same tools and template arguments. MinHash (rensa) finds the
          pairs to look at, all but one in a hundred at the threshold itself; their similarity is then computed from the
          n-grams. What is alike in a chain is one cluster, whose first row stays. Not with --exact.
--by prompt compares the turns that are not the assistant's, without /think and /no_think: twins of a prompt become one.
Rows that differ in a number or a name only are near ones where they are long: read some of rejected.jsonl before use.

OUT is a dataset folder or a .jsonl file. rejected.jsonl names for each duplicate the row it repeats (file, line, id)
and their similarity, which in a chain may lie below the threshold. Rows are read twice, so stdin will not do; of each
row some 300 bytes stay in memory, its n-grams lie beside OUT until the end.

Exit 0: done. 1: no row is usable. 2: bad input, one sentence.
"""

import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from rensa import RMinHash

from data_prep.common.chunks import Chunk
from data_prep.common.command_line import add_num_proc, make_parser, run_command
from data_prep.common.errors import InvalidRow, UsageError
from data_prep.common.json_text import dump_json
from data_prep.common.ngrams import GOLDEN_RATIO, hash_ngrams, hash_words, scramble, split_words
from data_prep.common.parallel import parallel_map
from data_prep.common.readers import find_inputs, read_chunks, relative_names
from data_prep.common.row_keys import SWITCH, prompt_key, row_key
from data_prep.common.rows import Row, check_shape, complete_row, iter_strings
from data_prep.common.writer import ChunkResult, DatasetWriter, encode_rows

SIGNATURE = 128  # hashes of a MinHash signature
RECALL = 0.99  # of the pairs at the threshold, that share a band
CANDIDATES = 500  # rows of one bucket that a row is compared with, the last ones: unlike rows in it cost no square
NO_NGRAMS = np.zeros(0, "u8")


@dataclass
class DedupOptions:
    """How rows are compared."""

    by: str  # whole or prompt
    exact: bool
    threshold: float
    ngram_size: int  # words
    bands: int  # of a signature
    band_size: int  # hashes in a band

    def describe(self) -> dict:
        """Return what report.json says of it."""
        described = {"by": self.by, "exact": self.exact}
        if not self.exact:
            described |= {"threshold": self.threshold, "ngram_size": self.ngram_size}
        return described


@dataclass
class SetChunk:
    """A chunk of one of the sets, with what its rows repeat once that is known."""

    number: int  # of its set, from 0
    chunk: Chunk  # its file as reports name it: a folder's split is SET/SPLIT
    start: int = 0  # number of its first row among all rows
    heads: np.ndarray | None = None  # (rows,) the row that each repeats, its own number where it stays
    similarity: np.ndarray | None = None  # (rows,) to that row
    is_head: np.ndarray | None = None  # (rows,) whether others repeat it


@dataclass
class Fingerprints:
    """What is known of the rows of a chunk."""

    keys: np.ndarray  # (rows,) of 16 bytes that equal rows share, empty where the row is refused
    ngrams: np.ndarray  # of all rows behind each other, each a sorted set of hashes
    counts: np.ndarray  # (rows,) n-grams of each
    bands: np.ndarray  # (rows, bands) hashes of each band of each signature


@dataclass
class Duplicates:
    """What each row repeats: arrays of (rows,)."""

    equal: np.ndarray  # the first row that is equal to it, itself where there is none before
    heads: np.ndarray  # the first row of its cluster, itself where it stays
    similarity: np.ndarray  # to that row


# -- reading ----------------------------------------------------------------------------------------------------------
def read_sets(paths: list, input_hashes: dict[str, str]) -> Iterator[SetChunk]:
    """Yield the chunks of all sets in order; input_hashes is filled with {file: sha256}."""
    names = relative_names(paths)
    for number, path in enumerate(paths):
        is_folder = isinstance(path, Path) and path.is_dir()
        hashes = {}
        for chunk in read_chunks([path], hashes):
            chunk.file = f"{names[path]}/{chunk.split}" if is_folder else names[path]
            yield SetChunk(number, chunk)
        for name, digest in hashes.items():
            file = f"{names[path]}/{name}" if is_folder else names[path]
            input_hashes[file] = digest


# -- what is compared -------------------------------------------------------------------------------------------------
def compared_words(row: Row, by: str) -> list[str]:
    """Return the words of a row that are compared."""
    words = []
    for turn in row["messages"]:
        if by == "whole":
            words += split_words(turn.get("reasoning_content") or "")
            words += split_words(turn.get("content") or "")
            for text in iter_strings(turn.get("tool_calls")):
                words += split_words(text)
        elif turn["role"] != "assistant":
            words += split_words(SWITCH.sub("", turn.get("content") or ""))
    return words


def row_ngrams(row: Row, options: DedupOptions) -> np.ndarray:
    """Return the n-grams of a row as a sorted set of hashes; fewer than n words are one n-gram."""
    words = hash_words(compared_words(row, options.by))
    size = max(min(options.ngram_size, len(words)), 1)
    ngrams = np.unique(hash_ngrams(words, size))
    if options.by == "whole" and (row.get("tools") or row["chat_template_kwargs"]):
        # other tools, other n-grams: such rows are never near
        context = dump_json([row.get("tools"), row["chat_template_kwargs"]]).decode()
        ngrams = np.sort(scramble(ngrams ^ hash_words([context])))
    return ngrams


def row_identity(row: Row, options: DedupOptions) -> bytes:
    """Return 16 bytes that equal rows share."""
    if options.by == "whole":
        return row_key(row)
    return prompt_key(row).to_bytes(16, "little")


def fingerprint_chunk(item: SetChunk, options: DedupOptions) -> ChunkResult:
    """Return the number of rows and, as payload, their Fingerprints."""
    keys = []
    sets = []
    for line, row in item.chunk.rows():
        ngrams = NO_NGRAMS
        try:
            row = complete_row(check_shape(row), Path(item.chunk.file).stem, line)
            key = row_identity(row, options)
            if not options.exact:
                ngrams = row_ngrams(row, options)
        except InvalidRow:
            key = b""  # it is refused when the rows are written
        keys.append(key)
        sets.append(ngrams)
    counts = np.array([len(ngrams) for ngrams in sets], int)
    flat = np.concatenate([NO_NGRAMS, *sets])
    bands = hash_bands(flat, counts, options)
    return ChunkResult(rows_in=len(keys), payload=Fingerprints(np.array(keys, "S16"), flat, counts, bands))


# -- MinHash ----------------------------------------------------------------------------------------------------------
def choose_bands(threshold: float) -> tuple[int, int]:
    """Return (bands, hashes in a band): the longest bands that catch RECALL of the pairs at the threshold."""
    best = 1
    for size in range(1, SIGNATURE + 1):
        if 1 - (1 - threshold**size) ** (SIGNATURE // size) >= RECALL:
            best = size
    return SIGNATURE // best, best


def hash_bands(ngrams: np.ndarray, counts: np.ndarray, options: DedupOptions) -> np.ndarray:
    """Return a 64-bit hash of every band of the MinHash signature of every row, (rows, bands).

    ngrams: those of all rows behind each other; counts: (rows,).
    """
    if options.exact:
        return np.zeros((len(counts), 0), "u8")
    starts = np.concatenate([[0], np.cumsum(counts)]).astype("u8")
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(ngrams, starts, SIGNATURE, 0)
    signatures = np.array(matrix.to_rows(), "u8").reshape(len(counts), SIGNATURE)
    signatures = signatures[:, : options.bands * options.band_size]
    bands = signatures.reshape(len(counts) * options.bands, options.band_size)
    hashes = bands[:, 0].copy()
    for column in range(1, options.band_size):
        hashes = scramble(hashes * GOLDEN_RATIO + bands[:, column])
    return hashes.reshape(len(counts), options.bands)


class NgramFile:
    """The n-grams of all rows, in a file."""

    def __init__(self, path: Path, counts: np.ndarray) -> None:
        self.counts = counts
        self.ends = np.cumsum(counts)
        self.ngrams = NO_NGRAMS
        if counts.sum():
            self.ngrams = np.memmap(path, "u8", "r")

    def read_row(self, row: int) -> np.ndarray:
        return self.ngrams[self.ends[row] - self.counts[row] : self.ends[row]]

    def similarity(self, row: int, other: int, least: float = 0.0) -> float:
        """Return the Jaccard similarity of two rows; 0 where their sizes alone show that it is below `least`."""
        small, large = sorted((self.counts[row], self.counts[other]))
        if small < least * large or not small:
            return 0.0
        shared = np.intersect1d(self.read_row(row), self.read_row(other), assume_unique=True).size
        return shared / (small + large - shared)


# -- which rows repeat which ------------------------------------------------------------------------------------------
class Clusters:
    """Rows that are alike, in a chain or directly: a union-find whose roots are the first rows."""

    def __init__(self) -> None:
        self.parents: dict[int, int] = {}

    def find_root(self, row: int) -> int:
        parent = self.parents.get(row, row)
        while parent != row:
            grandparent = self.parents.get(parent, parent)
            self.parents[row] = grandparent
            row = grandparent
            parent = self.parents.get(row, row)
        return row

    def merge(self, row: int, other: int) -> None:
        low, high = sorted((self.find_root(row), self.find_root(other)))
        if low != high:
            self.parents[high] = low


def find_duplicates(keys: np.ndarray, ngrams: NgramFile, bands: np.ndarray, options: DedupOptions) -> Duplicates:
    """Return what each row repeats. keys: (rows,); bands: (rows, bands)."""
    numbers = np.arange(len(keys))
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    equal = first[inverse]
    heads = numbers.copy()
    similarity = np.ones(len(keys))
    if not options.exact:
        distinct = np.flatnonzero((equal == numbers) & (ngrams.counts > 0))
        clusters = find_clusters(bands, ngrams, distinct, options.threshold)
        for row in list(clusters.parents):
            heads[row] = clusters.find_root(row)
            similarity[row] = ngrams.similarity(row, heads[row])
    return Duplicates(equal, heads[equal], similarity[equal])


def find_clusters(bands: np.ndarray, ngrams: NgramFile, rows: np.ndarray, threshold: float) -> Clusters:
    """Return the clusters of the rows (numbers, ascending) that are alike."""
    clusters = Clusters()
    for band in bands.T:
        for bucket in find_buckets(band, rows):
            merge_bucket(clusters, bucket, ngrams, threshold)
    return clusters


def find_buckets(band: np.ndarray, rows: np.ndarray) -> Iterator[list[int]]:
    """Yield the rows that share the hash of a band, where they are two or more, in their order."""
    hashes = band[rows]
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    edges = np.flatnonzero(np.r_[True, hashes[1:] != hashes[:-1], True])
    for place in np.flatnonzero(np.diff(edges) > 1):
        yield rows[order[edges[place] : edges[place + 1]]].tolist()


def merge_bucket(clusters: Clusters, bucket: list[int], ngrams: NgramFile, threshold: float) -> None:
    """Merge each row of a bucket with the first of its candidates that is near it."""
    candidates = []
    for row in bucket:
        recent = candidates[-CANDIDATES:]
        root = clusters.find_root(row)
        if any([clusters.find_root(other) == root for other in recent]):
            continue
        for other in recent:
            if ngrams.similarity(row, other, threshold) >= threshold:
                clusters.merge(row, other)
                break
        else:
            candidates.append(row)


# -- rows out ---------------------------------------------------------------------------------------------------------
def keep_first_rows(item: SetChunk, is_jsonl: bool) -> ChunkResult:
    """Return the rows of a chunk that stay; payload: {row: how rejected.jsonl names it} of those that others repeat.

    A rejected entry holds `row` and `repeats`, numbers among all rows, in the place of what they stand for.
    """
    result = ChunkResult(payload={})
    kept = []
    for location, row in result.usable_rows(item.chunk, Path(item.chunk.file).stem):
        location["id"] = row["id"]
        place = result.rows_in - 1
        number = item.start + place
        if item.is_head[place]:
            result.payload[number] = location
        if item.heads[place] == number:
            kept.append(row)
            continue
        similarity = round(float(item.similarity[place]), 4)
        result.rejected.append(location | {"repeats": int(item.heads[place]), "similarity": similarity, "row": number})
    result.encoded = {item.chunk.split: encode_rows(kept, is_jsonl)}
    return result


class Dedup:
    """Both readings of the sets: what each row holds, then which of them stay."""

    def __init__(self, paths: list, options: DedupOptions, num_proc: int | None, writer: DatasetWriter) -> None:
        self.paths = paths
        self.options = options
        self.num_proc = num_proc
        self.writer = writer
        self.set_numbers: list[int] = []  # of each chunk
        self.sizes: list[int] = []  # rows of each chunk

    def read_chunks_once(self) -> Iterator[SetChunk]:
        for item in read_sets(self.paths, self.writer.input_hashes):
            self.set_numbers.append(item.number)
            yield item

    def find_duplicates(self) -> Duplicates:
        """Return what each row repeats. Raises UsageError where there is no row."""
        chunks = []
        path = self.writer.staging / "ngrams"
        job = partial(fingerprint_chunk, options=self.options)
        with open(path, "wb") as file:
            for result in parallel_map(job, self.read_chunks_once(), self.num_proc, "read"):
                self.sizes.append(result.rows_in)
                file.write(result.payload.ngrams)
                result.payload.ngrams = NO_NGRAMS
                chunks.append(result.payload)
        if not chunks:
            names = ", ".join(map(str, self.paths))
            raise UsageError(f"{names}: no rows: pass sets of messages rows (python -m data_prep.normalize)")
        ngrams = NgramFile(path, np.concatenate([chunk.counts for chunk in chunks]))
        keys = np.concatenate([chunk.keys for chunk in chunks])
        bands = np.concatenate([chunk.bands for chunk in chunks])
        duplicates = find_duplicates(keys, ngrams, bands, self.options)
        path.unlink()
        return duplicates

    def read_chunks_again(self, duplicates: Duplicates) -> Iterator[SetChunk]:
        """Yield the chunks once more, with what each of their rows repeats."""
        heads = duplicates.heads
        is_head = np.zeros(len(heads), bool)
        is_head[heads[heads != np.arange(len(heads))]] = True
        start = 0
        for size, item in zip(self.sizes, read_sets(self.paths, {}), strict=True):
            part = slice(start, start + size)
            item.start = start
            item.heads = heads[part]
            item.similarity = duplicates.similarity[part]
            item.is_head = is_head[part]
            start += size
            yield item

    def write_rows(self, duplicates: Duplicates) -> None:
        """Write the rows that stay, and name for each of the others the row it repeats."""
        set_of_row = np.repeat(self.set_numbers, self.sizes)
        names = {}
        job = partial(keep_first_rows, is_jsonl=self.writer.is_jsonl)
        for result in parallel_map(job, self.read_chunks_again(duplicates), self.num_proc, "write"):
            names |= result.payload
            for entry in result.rejected:
                if "repeats" not in entry:
                    continue
                row = entry.pop("row")
                head = entry["repeats"]
                kind = "duplicate" if duplicates.equal[row] == head else "near duplicate"
                place = "in its pool" if set_of_row[row] == set_of_row[head] else "of another pool"
                entry["reason"] = f"{kind} {place}"
                entry["repeats"] = names[head]
            self.writer.add(result)


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("sets", nargs="+", metavar="SET", help="dataset folder, or file of rows")
    parser.add_argument("--out", type=Path, required=True, help="NAME.jsonl, or a folder that does not exist yet")
    parser.add_argument("--by", choices=("whole", "prompt"), default="whole", help="what of a row is compared")
    parser.add_argument("--exact", action="store_true", help="equal rows only")
    parser.add_argument("--threshold", type=float, help="least similarity of near duplicates, default 0.8")
    parser.add_argument("--ngram_size", type=int, help="words of an n-gram, default 5")
    add_num_proc(parser)
    return run_command(parser, run)


def read_options(args: Namespace) -> DedupOptions:
    """Return how rows are compared. Raises UsageError."""
    for name in ("threshold", "ngram_size"):
        if args.exact and getattr(args, name) is not None:
            raise UsageError(f"--{name}: --exact looks for equal rows only: leave one of the two out")
    threshold = 0.8 if args.threshold is None else args.threshold
    ngram_size = 5 if args.ngram_size is None else args.ngram_size
    if not 0 < threshold <= 1:
        raise UsageError(f"--threshold {threshold}: pass a similarity above 0, at most 1")
    if ngram_size < 1:
        raise UsageError(f"--ngram_size {ngram_size}: pass a number of words of at least 1")
    return DedupOptions(args.by, args.exact, threshold, ngram_size, *choose_bands(threshold))


def run(args: Namespace) -> int:
    """Return the exit code; raise UsageError."""
    options = read_options(args)
    paths = find_inputs(args.sets)
    if Path("-") in paths:
        raise UsageError("-: rows are read twice: write stdin to a file first")
    with DatasetWriter(args.out, "dedup.py") as writer:
        dedup = Dedup(paths, options, args.num_proc, writer)
        dedup.write_rows(dedup.find_duplicates())
        return writer.finish(", ".join(args.sets), {"compared": options.describe()})


if __name__ == "__main__":
    sys.exit(main())
