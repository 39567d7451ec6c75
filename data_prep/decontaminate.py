"""Remove the rows that repeat the text of an evaluation set, and show both texts of every hit.

    python -m data_prep.decontaminate data/gsm8k --against raw/gsm8k/test.jsonl --out data/clean
    python -m data_prep.decontaminate data/chats --against eval/*.jsonl --fields question prompt --out data/clean

EVAL is a file of any shape (.jsonl, .json, .parquet; .gz, .zst) or a dataset folder: every string in its rows is a text
of its own, or those under the names that --fields lists; of messages all but the system's. A row is refused where one
of its messages (reasoning too, the system's not) and an eval text share one of
  13 words in a row                      GPT-3's rule (--ngram_sizes 13)
  8-grams that cover half of the text    Tulu 3's: 8-grams, over 50% of the eval text's words (--match_threshold 0.5)
  all words                              where the eval text has fewer than these: a whole message of a user is equal
Words are in lower case, without punctuation, single characters in Chinese, Japanese and Korean. N-grams and short texts
that stand in over 10 of a file's texts (--common) are its form, not its questions, and are left out, as GPT-3 left out
what is frequent. In short texts arithmetic signs count as words, and one or two words count only in a field that names
a question (question, prompt, query, problem, instruction, input): "yes" and "42" are answers, and no leak.

OUT is a dataset folder or a .jsonl file. rejected.jsonl lists the hits of each refused row: eval file and line, both
texts, the words shared at length, the share of the eval text that is covered. A folder holds hits.md for reading, too.
report.json counts by eval file: rows, texts, texts shorter than the n-grams, those of them that a prompt is equal to,
eval rows hit, rows refused. Only the eval texts are kept in memory.

Exit 0: done. 1: no row is left. 2: bad input, one sentence.
"""

import pickle
import re
import sys
import unicodedata
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.common.chunks import Chunk
from data_prep.common.command_line import add_num_proc, make_parser, run_command
from data_prep.common.errors import InvalidRow, UsageError
from data_prep.common.ngrams import hash_ngrams, hash_words, split_words
from data_prep.common.parallel import parallel_map
from data_prep.common.readers import find_inputs, read_chunks, relative_names
from data_prep.common.rows import Row
from data_prep.common.writer import ChunkResult, DatasetWriter, encode_rows

SHORT, LONG = 8, 13  # words of an n-gram: Tulu 3's, GPT-3's
QUESTION_FIELDS = ("question", "prompt", "query", "problem", "instruction", "input")
FEWEST_WORDS = 3  # of a short text in another field
SIGN = re.compile(r"[+*/=<>^%×÷−]|-(?=\s*\d)")  # 2+2 and 2*2 are two questions
LISTED_HITS = 5  # of a row, in rejected.jsonl
LISTED_ROWS = 200  # in hits.md


# -- eval texts -------------------------------------------------------------------------------------------------------
class EvalText(NamedTuple):
    """A text of an eval file. field: its keys, with dots between."""

    file: str
    line: int
    field: str
    text: str


def iter_texts(value: object, names: tuple[str, ...] = (), place: str = "") -> Iterator[tuple[str, str]]:
    """Yield (keys, text) of every string in a row of an eval file, or of those under these names."""
    if isinstance(value, str):
        if value.strip():
            yield place, value
    elif isinstance(value, list):
        for item in value:
            yield from iter_texts(item, place=place)
    elif isinstance(value, dict) and value.get("role") != "system":
        for key in names or value:
            inner_place = f"{place}.{key}" if place else str(key)
            yield from iter_texts(value.get(key), place=inner_place)


def read_eval_file(path: Path | str, name: str, names: tuple[str, ...], input_hashes: dict[str, str]) -> list[EvalText]:
    """Return the texts of an eval file; raise UsageError where one might go unseen.

    name: of the file in reports; names: of the fields whose texts are read, all where there are none.
    """
    texts = []
    missing = set(names)
    hashes = {}
    for chunk in read_chunks([path], hashes):
        for line, row in chunk.rows():
            if isinstance(row, InvalidRow):
                raise UsageError(f"{path}:{line}: {row}: mend the eval file, no part of it may go unseen")
            if isinstance(row, dict):
                missing -= row.keys()
            for keys, text in iter_texts(row, names):
                texts.append(EvalText(name, line, keys, text))
    if missing:
        raise UsageError(f"{path}: no row has the field {min(missing)}: pass --fields that every eval file has")
    if not texts:
        raise UsageError(f"{path}: no text: pass an eval file with strings in its rows")
    for part, digest in hashes.items():
        place = f"against {name}"
        if len(hashes) > 1:
            place = f"against {name}/{part}"
        input_hashes[place] = digest
    return texts


@dataclass
class NgramTable:
    """The n-grams of the eval texts, sorted by their hash: arrays of (n-grams,)."""

    hashes: np.ndarray
    texts: np.ndarray  # the number of the text that each stands in
    places: np.ndarray  # the number of its first word in that text

    def find_shared(self, ngrams: np.ndarray) -> dict[int, list[int]]:
        """Return {text: places in it} of the n-grams that stand in both."""
        ngrams = np.unique(ngrams)
        starts = np.searchsorted(self.hashes, ngrams, "left")
        ends = np.searchsorted(self.hashes, ngrams, "right")
        shared = {}
        for number in np.flatnonzero(starts < ends):
            part = slice(starts[number], ends[number])
            for text, place in zip(self.texts[part].tolist(), self.places[part].tolist(), strict=True):
                shared.setdefault(text, []).append(place)
        return shared


class Index:
    """The eval texts, and where their n-grams stand. common: texts of a file that an n-gram may stand in."""

    def __init__(self, texts: list[EvalText], sizes: list[int], common: int) -> None:
        self.texts = texts
        self.common = common
        self.shortest = min(sizes)
        self.left_out = 0  # n-grams that are too common
        names = {name: number for number, name in enumerate(dict.fromkeys(text.file for text in texts))}
        self.files = np.array([names[text.file] for text in texts])  # (texts,) the number of its file
        words = [split_words(text.text) for text in texts]
        self.lengths = [len(text_words) for text_words in words]
        hashes = [hash_words(text_words) for text_words in words]
        self.tables = {size: self.make_table(hashes, size) for size in sizes}
        self.short_texts = self.find_short_texts(words)

    def make_table(self, hashes: list[np.ndarray], size: int) -> NgramTable:
        """Return the n-grams of hashed words, without those that are common in a file."""
        ngrams = [hash_ngrams(text_hashes, size) for text_hashes in hashes]
        counts = [len(text_ngrams) for text_ngrams in ngrams]
        flat = np.concatenate(ngrams)
        texts = np.repeat(np.arange(len(counts)), counts)
        places = np.concatenate([np.arange(count) for count in counts])
        order = np.argsort(flat, kind="stable")
        table = NgramTable(flat[order], texts[order], places[order])
        common = self.find_common(table)
        self.left_out += len(common)
        kept = ~np.isin(table.hashes, common)
        return NgramTable(table.hashes[kept], table.texts[kept], table.places[kept])

    def find_common(self, table: NgramTable) -> np.ndarray:
        """Return the n-grams that stand in more than `common` texts of a file, once for each such file."""
        once = is_first(table.hashes, table.texts)  # an n-gram counts once a text
        hashes = table.hashes[once]
        files = self.files[table.texts[once]]
        starts = np.flatnonzero(is_first(hashes, files))
        counts = np.diff(np.r_[starts, len(hashes)])
        return hashes[starts[counts > self.common]]

    def find_short_texts(self, words: list[list[str]]) -> dict[str, list[int]]:
        """Return {key: texts} of the texts shorter than the n-grams that an equal prompt would leak."""
        texts = {}
        for number, text in enumerate(self.texts):
            is_question = text.field.rpartition(".")[2].lower() in QUESTION_FIELDS
            fewest = 1 if is_question else FEWEST_WORDS
            if fewest <= self.lengths[number] < self.shortest:
                key = short_key(text.text, words[number])
                texts.setdefault(key, []).append(number)
        kept = {}
        for key, numbers in texts.items():
            counts = Counter(self.texts[number].file for number in numbers)
            numbers = [number for number in numbers if counts[self.texts[number].file] <= self.common]
            if numbers:
                kept[key] = numbers
        return kept


def is_first(*columns: np.ndarray) -> np.ndarray:
    """Return which entries of sorted columns differ from the one before."""
    changes = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return np.r_[True, changes][: len(columns[0])]


def short_key(text: str, words: list[str]) -> str:
    """Return what equal short texts share: words and arithmetic signs."""
    signs = SIGN.findall(unicodedata.normalize("NFKC", text))
    return " ".join([*words, *signs])


@cache
def load_index(path: str) -> Index:
    with open(path, "rb") as file:
        return pickle.load(file)


# -- rows -------------------------------------------------------------------------------------------------------------
class Hit(NamedTuple):
    """An eval text that a message repeats. words: shared in a row; share: of the eval text's words that are covered."""

    against: str
    line: int
    field: str
    words: int
    share: float
    text: str
    row_text: str


@dataclass
class RowHits:
    """The hits of a row: of n-grams, and of short texts that a prompt is equal to."""

    ngrams: list[Hit] = field(default_factory=list)
    equal: list[Hit] = field(default_factory=list)

    def worst_first(self) -> list[Hit]:
        hits = [*self.ngrams, *self.equal]
        return sorted(hits, key=lambda hit: (-hit.share, -hit.words, hit.against, hit.line, hit.field))

    def rejected(self) -> dict:
        """Return what rejected.jsonl says of the row."""
        hits = self.worst_first()
        detail = f"{hits[0].words} words of {hits[0].against}:{hits[0].line}"
        if len(hits) > 1:
            detail += f" and {len(hits) - 1} more"
        reason = "eval text" if self.ngrams else "short eval text"
        return {"reason": reason, "detail": detail, "hits": [hit._asdict() for hit in hits[:LISTED_HITS]]}


def count_covered(places: list[int], n: int) -> int:
    """Return how many words the n-grams at these places cover."""
    covered = 0
    end = 0
    for start in sorted(places):
        covered += min(n, start + n - end)
        end = start + n
    return covered


def longest_run(places: list[int], n: int) -> int:
    """Return the words of the longest run of n-grams at neighbouring places."""
    longest = run = 0
    previous = None
    for start in sorted(places):
        run = run + 1 if start - 1 == previous else n
        longest = max(longest, run)
        previous = start
    return longest


def find_hits(row: Row, index: Index, threshold: float) -> RowHits:
    """Return the eval texts that a row repeats. threshold: share of one that 8-grams may cover."""
    found = RowHits()
    for turn in row["messages"]:
        if turn["role"] == "system":
            continue
        for name in ("reasoning_content", "content"):
            text = turn.get(name) or ""
            words = split_words(text)
            found.ngrams += find_ngram_hits(text, words, index, threshold)
            if turn["role"] == "user" and name == "content" and len(words) < index.shortest:
                equal = index.short_texts.get(short_key(text, words), [])
                found.equal += [make_hit(index, number, len(words), 1.0, text) for number in equal]
    return found


def find_ngram_hits(text: str, words: list[str], index: Index, threshold: float) -> Iterator[Hit]:
    """Yield the eval texts that share 13 words in a row with a text, or 8-grams that cover more than the threshold."""
    hashes = hash_words(words)
    shared = {}
    for size, table in index.tables.items():
        shared[size] = table.find_shared(hash_ngrams(hashes, size))
    in_long = shared.get(LONG, {})
    for number in shared.get(SHORT, {}).keys() | in_long.keys():
        size = min(size for size in shared if number in shared[size])
        places = shared[size][number]
        share = count_covered(places, size) / index.lengths[number]
        if number in in_long or share > threshold:
            yield make_hit(index, number, longest_run(places, size), round(share, 4), text)


def make_hit(index: Index, number: int, words: int, share: float, row_text: str) -> Hit:
    file, line, name, text = index.texts[number]
    return Hit(file, line, name, words, share, text, row_text)


def clean_chunk(chunk: Chunk, index_path: str, threshold: float, is_jsonl: bool) -> ChunkResult:
    """Return the rows of a chunk that repeat no eval text; payload: the RowHits of the others."""
    index = load_index(index_path)
    result = ChunkResult(payload=[])
    clean = []
    for location, row in result.usable_rows(chunk, Path(chunk.file).stem):
        found = find_hits(row, index, threshold)
        if found.ngrams or found.equal:
            result.rejected.append(location | found.rejected())
            result.payload.append(found)
        else:
            clean.append(row)
    result.encoded = {chunk.split: encode_rows(clean, is_jsonl)}
    return result


# -- what is counted --------------------------------------------------------------------------------------------------
@dataclass
class FileCounts:
    """What report.json counts of an eval file."""

    rows: int = 0
    texts: int = 0
    too_short: int = 0  # texts of fewer words than an n-gram
    equal_short_texts: int = 0  # those of them that a prompt is equal to
    rows_hit: int = 0
    refused: int = 0  # rows that repeat one of its texts


class Summary:
    """What was hit, by eval file, and the refused rows that hits.md shows."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.total = 0  # refused rows
        self.refused: Counter[str] = Counter()
        self.lines_hit: set[tuple[str, int]] = set()
        self.equal_texts: set[tuple[str, int, str, str]] = set()
        self.shown: list[dict] = []  # entries of rejected.jsonl

    def add(self, result: ChunkResult) -> None:
        for found in result.payload:
            hits = found.worst_first()
            self.total += 1
            self.refused.update({hit.against for hit in hits})
            self.lines_hit.update([(hit.against, hit.line) for hit in hits])
            self.equal_texts.update([(hit.against, hit.line, hit.field, hit.text) for hit in found.equal])
        entries = [entry for entry in result.rejected if "hits" in entry]
        self.shown += entries[: LISTED_ROWS - len(self.shown)]

    def by_file(self) -> dict[str, FileCounts]:
        counts = {text.file: FileCounts() for text in self.index.texts}
        for text, length in zip(self.index.texts, self.index.lengths, strict=True):
            counts[text.file].texts += 1
            counts[text.file].too_short += length < self.index.shortest
        for file, _ in {(text.file, text.line) for text in self.index.texts}:
            counts[file].rows += 1
        for file, *_ in self.equal_texts:
            counts[file].equal_short_texts += 1
        for file, _ in self.lines_hit:
            counts[file].rows_hit += 1
        for file, refused in self.refused.items():
            counts[file].refused = refused
        return counts

    def print_table(self) -> None:
        counts = self.by_file()
        width = max(map(len, ["eval file", *counts]))
        names = [column.name for column in fields(FileCounts)]
        titles = [f"{name.replace('_', ' '):>8}" for name in names]
        print("  ".join([f"{'eval file':{width}}", *titles]))
        for file, count in counts.items():
            cells = []
            for name, title in zip(names, titles, strict=True):
                cells.append(f"{getattr(count, name):>{len(title)},}")
            print("  ".join([f"{file:{width}}", *cells]))

    def make_page(self, name: str) -> str:
        """Return hits.md: a table by eval file, then the first hits with both texts. name: of OUT."""
        lines = [f"# Eval texts in {name}", "", "| eval file | rows | rows hit | rows refused |", "|---|---|---|---|"]
        for file, count in self.by_file().items():
            lines.append(f"| {file} | {count.rows:,} | {count.rows_hit:,} | {count.refused:,} |")
        lines.append("")
        lines.append(f"The first {len(self.shown):,} of {self.total:,} refused rows; rejected.jsonl lists all.")
        for entry in self.shown:
            lines += ["", *describe_hit(entry)]
        return "\n".join([*lines, ""])


def describe_hit(entry: dict) -> list[str]:
    """Return the lines of hits.md about an entry of rejected.jsonl: its worst hit, with both texts."""
    hit = entry["hits"][0]
    place = f"{entry['file']}:{entry['line']} ({entry['id']})"
    eval_place = f"{hit['against']}:{hit['line']}"
    lines = [f"## {place} and {eval_place}: {hit['words']} words in a row, {hit['share']:.0%} of the eval text"]
    for title, text in (("eval", hit["text"]), ("row", hit["row_text"])):
        lines += ["", f"**{title}**", ""]
        lines += [f"> {line}" for line in text.splitlines()]
    return lines


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("path", metavar="PATH", help="rows: a dataset folder, or a file")
    parser.add_argument("--against", nargs="+", required=True, metavar="EVAL", help="files, folders, quoted globs")
    parser.add_argument("--fields", nargs="+", default=(), help="names of the texts in eval rows, default every string")
    parser.add_argument("--out", type=Path, required=True, help="NAME.jsonl, or a folder that does not exist yet")
    sizes_help = "which rules: 8 (Tulu 3), 13 (GPT-3); default both"
    parser.add_argument(
        "--ngram_sizes", nargs="+", type=int, choices=(SHORT, LONG), default=(SHORT, LONG), help=sizes_help
    )
    threshold_help = "share of an eval text that 8-grams may cover, default 0.5"
    parser.add_argument("--match_threshold", type=float, help=threshold_help)
    common_help = "texts of an eval file that an n-gram may stand in, default 10"
    parser.add_argument("--common", type=int, default=10, help=common_help)
    add_num_proc(parser)
    return run_command(parser, run)


def run(args: Namespace) -> int:
    """Return the exit code; raise UsageError."""
    threshold = 0.5 if args.match_threshold is None else args.match_threshold
    sizes = sorted(set(args.ngram_sizes))
    if not 0 <= threshold <= 1:
        raise UsageError(f"--match_threshold {threshold}: pass a share from 0 to 1")
    if args.match_threshold is not None and SHORT not in sizes:
        raise UsageError("--match_threshold: it is of the rule of 8-grams: pass 8 among --ngram_sizes, or leave it out")
    if args.common < 1:
        raise UsageError(f"--common {args.common}: pass a number of texts of at least 1")
    with DatasetWriter(args.out, "decontaminate.py") as writer:
        eval_paths = find_inputs(args.against)
        texts = []
        for path, name in relative_names(eval_paths).items():
            texts += read_eval_file(path, name, tuple(args.fields), writer.input_hashes)
        index = Index(texts, sizes, args.common)
        summary = Summary(index)
        index_path = writer.staging / "index"
        index_path.write_bytes(pickle.dumps(index))
        job = partial(clean_chunk, index_path=str(index_path), threshold=threshold, is_jsonl=writer.is_jsonl)
        for result in parallel_map(job, read_chunks(find_inputs([args.path]), writer.input_hashes), args.num_proc):
            summary.add(result)
            writer.add(result)
        index_path.unlink()
        summary.print_table()
        rules = {"ngram_sizes": sizes, "match_threshold": threshold, "common": args.common}
        against = {file: asdict(count) for file, count in summary.by_file().items()}
        found = {"common_left_out": index.left_out, "against": against}
        return writer.finish(args.path, {**rules, **found}, {"hits.md": summary.make_page(args.out.name)})


if __name__ == "__main__":
    sys.exit(main())
