"""Remove the rows that repeat the text of an evaluation set, and show both texts of every hit.

    python -m data_prep.decontaminate data/gsm8k --against raw/gsm8k/test.jsonl --out data/clean
    python -m data_prep.decontaminate data/chats --against eval/*.jsonl --fields question prompt --out data/clean

EVAL is a file of any shape (.jsonl, .json, .parquet; .gz, .zst), a dataset folder or a pool: every string in its rows
is a text of its own, or those under the names that --fields lists; of messages all but the system's. A row is refused
where one of its messages (reasoning too, the system's not) and an eval text share
  13 words in a row                      GPT-3's rule (--ngram_sizes 13)
  8-grams that cover half of the text    Tulu 3's: 8-grams, over 50% of the eval text's words (--match_threshold 0.5)
either of them. Words are ngrams.py's: lower case, no punctuation, single characters in Chinese, Japanese and Korean. A
text of fewer than 8 words matches nothing; report.json counts them. N-grams that stand in over 10 of a file's texts
(--common) are its form, not its questions, and are left out, as GPT-3 left out what is frequent.

OUT is a dataset folder or a .jsonl file. rejected.jsonl lists the hits of each refused row: eval file and line, both
texts, the words shared at length, the share of the eval text that is covered. A folder holds hits.md for reading, too.
report.json counts by eval file: rows, texts, texts too short, eval rows hit, rows refused. Only the eval texts are
kept in memory.

Exit 0: done. 1: no row is left. 2: bad input, one sentence.
"""

import pickle
import sys
from functools import cache, partial
from pathlib import Path

import numpy as np

from data_prep.common.command_line import add_num_proc, format_counts, make_parser, run_command
from data_prep.common.errors import InvalidRow, UsageError
from data_prep.common.ngrams import hashed, ngrams, words
from data_prep.common.parallel import parallel_map
from data_prep.common.readers import find_inputs, read_chunks, relative_names
from data_prep.common.rows import check_shape, complete_row, refuse_unkept
from data_prep.common.writer import ChunkResult, DatasetWriter, encode_rows, row_location

SHORT, LONG = 8, 13  # words of an n-gram: Tulu 3's, GPT-3's
SHOWN = 5  # hits of a row that are listed
IN_MARKDOWN = 200  # hits that hits.md shows


# -- eval texts -------------------------------------------------------------------------------------------------------
def texts_of(value, fields=(), name=""):
    """Yield (name, text) of every string in a row of an eval file."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, list):
        for item in value:
            yield from texts_of(item, (), name)
    elif isinstance(value, dict) and value.get("role") != "system":
        for key in fields or value:
            yield from texts_of(value.get(key), (), f"{name}.{key}" if name else str(key))


def read_evals(paths, fields, inputs):
    """{file: [(line, name, text)]}; raises UsageError where a file has no text or a field is in none of its rows."""
    names, out = relative_names(paths), {}
    for path in paths:
        texts, missing, found = [], {*fields}, {}
        for block in read_chunks([path], found):
            for line, row in block.rows():
                if isinstance(row, InvalidRow):
                    raise UsageError(f"{path}:{line}: {row}: mend the eval file, no part of it may go unseen")
                missing -= {*row} if isinstance(row, dict) else set()
                texts += [(line, name, text) for name, text in texts_of(row, fields) if text.strip()]
        if missing:
            raise UsageError(f"{path}: no row has the field {min(missing)}: pass --fields that every eval file has")
        if not texts:
            raise UsageError(f"{path}: no text: pass an eval file with strings in its rows")
        out[names[path]] = texts
        inputs |= {f"against {names[path]}" + (f"/{part}" if len(found) > 1 else ""): h for part, h in found.items()}
    return out


class Index:
    """The n-grams of the eval texts as sorted arrays: in which texts each stands, and where."""

    def __init__(self, evals, sizes, common):
        self.texts = [(file, *text) for file, texts in evals.items() for text in texts]
        self.files = np.repeat(np.arange(len(evals)), [*map(len, evals.values())])
        hashes = [hashed(words(text)) for *_, text in self.texts]
        self.lengths = [*map(len, hashes)]
        self.left_out = 0
        self.grams = {n: self.of_size(hashes, n, common) for n in sizes}

    def of_size(self, hashes, n, common):
        """(n-grams, sorted; text of each; place of each in its text), without those that are common in a file."""
        grams = [ngrams(one, n) for one in hashes]
        owners = np.repeat(np.arange(len(grams)), [*map(len, grams)])
        flat, places = np.concatenate(grams), np.concatenate([np.arange(len(one)) for one in grams])
        order = np.argsort(flat, kind="stable")
        flat, owners, places = flat[order], owners[order], places[order]
        once = first_of(flat, owners)  # an n-gram counts once a text
        found, files = flat[once], self.files[owners[once]]
        starts = np.flatnonzero(first_of(found, files))
        often = np.diff(np.r_[starts, len(found)]) > common
        self.left_out += int(often.sum())
        keep = ~np.isin(flat, found[starts[often]])
        return flat[keep], owners[keep], places[keep]

    def shared(self, hashes, n):
        """{text: places in it of the n-grams that it shares with hashed words}"""
        flat, owners, places = self.grams[n]
        mine = np.unique(ngrams(hashes, n))
        left, right = np.searchsorted(flat, mine, "left"), np.searchsorted(flat, mine, "right")
        out = {}
        for gram in np.flatnonzero(left < right):
            part = slice(left[gram], right[gram])
            for text, where in zip(owners[part].tolist(), places[part].tolist(), strict=True):
                out.setdefault(text, []).append(where)
        return out


def first_of(*columns):
    """Mask of the entries that differ from the one before, in sorted columns."""
    return np.r_[True, np.any([column[1:] != column[:-1] for column in columns], axis=0)][: len(columns[0])]


@cache
def index_at(path):
    with open(path, "rb") as file:
        index = Index.__new__(Index)
        index.__dict__ = pickle.load(file)
        return index


# -- rows -------------------------------------------------------------------------------------------------------------
def covered(places, n):
    """How many words n-grams at these places cover."""
    ends = 0, 0  # words covered, the end of the last n-gram
    for start in sorted(places):
        ends = ends[0] + min(n, start + n - ends[1]), start + n
    return ends[0]


def longest(places, n):
    """The words of the longest run of n-grams at neighbouring places."""
    best = run = 0
    before = None
    for start in sorted(places):
        run = run + 1 if before is not None and start == before + 1 else n
        best, before = max(best, run), start
    return best


def hits_of(row, index, threshold):
    """The hits of a row as rejected.jsonl lists them, worst first."""
    found = []
    for turn in row["messages"]:
        for said in (turn.get("reasoning_content"), turn.get("content")) if turn["role"] != "system" else ():
            hashes = hashed(words(said or ""))
            shared = {n: index.shared(hashes, n) for n in index.grams}
            for text in {*shared.get(SHORT, ()), *shared.get(LONG, ())}:
                size = min(n for n in shared if text in shared[n])
                places = shared[size][text]
                share = covered(places, size) / index.lengths[text]
                if text in shared.get(LONG, ()) or share > threshold:
                    file, line, field, eval_text = index.texts[text]
                    found.append({"against": file, "line": line, "field": field, "words": longest(places, size),
                                  "share": round(share, 4), "text": eval_text, "row_text": said})  # fmt: skip
    return sorted(found, key=lambda hit: (-hit["share"], -hit["words"], hit["against"], hit["line"], hit["field"]))


def work(block, index, threshold, out):
    """Result of a Block; more: (eval file, line) of all hits of each refused row."""
    index, result, rows = index_at(index), ChunkResult(payload=[]), []
    for line, row in block.rows():
        result.rows_in += 1
        where = row_location(block.file, line, row)
        try:
            row = complete_row(check_shape(row), Path(block.file).stem, line)
            refuse_unkept(row, out)
        except InvalidRow as refusal:
            result.rejected.append(where | {"reason": refusal.reason, "detail": refusal.detail})
            continue
        if hits := hits_of(row, index, threshold):
            told = f"{hits[0]['words']} words of {hits[0]['against']}:{hits[0]['line']}"
            told += f" and {len(hits) - 1} more" if len(hits) > 1 else ""
            result.rejected.append(where | {"reason": "eval text", "detail": told, "hits": hits[:SHOWN]})
            result.payload.append({(hit["against"], hit["line"]) for hit in hits})
        else:
            rows.append(row)
    result.encoded = {block.split: encode_rows(rows, out.suffix == ".jsonl")}
    return result


def markdown(name, counts, shown, total):
    """hits.md: a table by eval file, then the first hits with both texts."""
    lines = [f"# Eval texts in {name}", "", "| eval file | rows | rows hit | rows refused |", "|---|---|---|---|"]
    lines += [
        f"| {file} | {one['rows']:,} | {one['rows_hit']:,} | {one['refused']:,} |" for file, one in counts.items()
    ]
    lines += ["", f"The first {len(shown):,} of {total:,} refused rows; rejected.jsonl lists all.", ""]
    for entry in shown:
        hit = entry["hits"][0]
        told = f"{hit['words']} words in a row, {hit['share']:.0%} of the eval text"
        lines += [f"## {entry['file']}:{entry['line']} ({entry['id']}) and {hit['against']}:{hit['line']}: {told}", ""]
        for who, text in (("eval", hit["text"]), ("row", hit["row_text"])):
            lines += [f"**{who}**", "", *("> " + line for line in text.splitlines()), ""]
    return "\n".join(lines)


def main():
    parser = make_parser(__doc__)
    parser.add_argument("pool", metavar="POOL", help="dataset folder, or file of rows")
    parser.add_argument("--against", nargs="+", required=True, metavar="EVAL", help="files, folders, quoted globs")
    parser.add_argument("--fields", nargs="+", default=(), help="names of the texts in eval rows, default every string")
    parser.add_argument("--out", type=Path, required=True, help="NAME.jsonl, or a folder that does not exist yet")
    parser.add_argument("--ngram_sizes", nargs="+", type=int, choices=(SHORT, LONG), default=(SHORT, LONG),
                        help="which rules: 8 (Tulu 3), 13 (GPT-3); default both")  # fmt: skip
    parser.add_argument("--match_threshold", type=float, default=0.5,
                        help="share of an eval text that 8-grams may cover, default 0.5")  # fmt: skip
    parser.add_argument("--common", type=int, default=10,
                        help="texts of an eval file that an n-gram may stand in, default 10")  # fmt: skip
    add_num_proc(parser)
    return run_command(parser, run)


def run(args):
    """The exit code; raises UsageError."""
    if not 0 <= args.match_threshold <= 1:
        raise UsageError(f"--match_threshold {args.match_threshold}: pass a share from 0 to 1")
    if args.common < 1:
        raise UsageError(f"--common {args.common}: pass a number of texts of at least 1")
    with DatasetWriter(args.out, "decontaminate.py") as writer:
        evals = read_evals(find_inputs(args.against), args.fields, writer.input_hashes)
        index = Index(evals, sorted({*args.ngram_sizes}), args.common)
        with open(writer.staging / "index", "wb") as file:
            pickle.dump(index.__dict__, file)
        counts, shown = counts_of(evals, index, min(args.ngram_sizes)), []
        hit = {file: set() for file in evals}
        blocks = read_chunks(find_inputs([args.pool]), writer.input_hashes)
        job = partial(work, index=str(writer.staging / "index"), threshold=args.match_threshold, out=args.out)
        for result in parallel_map(job, blocks, args.num_proc):
            for places in result.payload:
                for file in {file for file, _ in places}:
                    counts[file]["refused"] += 1
                for file, line in places:
                    hit[file].add(line)
            shown += [entry for entry in result.rejected if "hits" in entry][: IN_MARKDOWN - len(shown)]
            writer.add(result)
        (writer.staging / "index").unlink()
        if not writer.rows_in:
            raise UsageError(f"{args.pool}: no rows: pass rows of messages (python -m data_prep.normalize makes them)")
        for file, lines in hit.items():
            counts[file]["rows_hit"] = len(lines)
        show(counts)
        kept, refused = sum(writer.rows_out.values()), format_counts(writer.refused)
        if not kept:
            print(f"all {writer.rows_in} rows refused ({refused})", file=sys.stderr)
            return 1
        rules = {"ngram_sizes": sorted({*args.ngram_sizes}), "match_threshold": args.match_threshold}
        more = {**rules, "common": args.common, "common_left_out": index.left_out, "against": counts}
        writer.close(more, {"hits.md": markdown(args.out.name, counts, shown, writer.refused["eval text"])})
    left = writer.refused.total()
    print(f"{args.out}: {kept:,} rows kept, {left:,} left out" + (f" ({refused})" if left else ""))
    return 0


def counts_of(evals, index, shortest):
    """{eval file: what report.json counts of it}"""
    lengths, out = iter(index.lengths), {}
    for file, texts in evals.items():
        short = sum(next(lengths) < shortest for _ in texts)
        rows = len({line for line, *_ in texts})
        out[file] = {"rows": rows, "texts": len(texts), "too_short": short, "rows_hit": 0, "refused": 0}
    return out


def show(counts):
    width = max(map(len, ["eval file", *counts]))
    print(f"{'eval file':{width}}  {'rows':>8}  {'texts':>8}  {'too short':>9}  {'rows hit':>8}  {'refused':>8}")
    for file, one in counts.items():
        print(f"{file:{width}}  {one['rows']:>8,}  {one['texts']:>8,}  {one['too_short']:>9,}  {one['rows_hit']:>8,}  "
              f"{one['refused']:>8,}")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
