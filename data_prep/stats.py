"""Measure the lengths of a set as a recipe tokenises it, and say which max_length fits: a table, a histogram and a CDF.

    python -m data_prep.stats data/chats --recipe recipes/qwen3_qlora.py
    python -m data_prep.stats data/chats --recipe recipes/qwen3_qlora.py --out runs/chats-stats
    python -m data_prep.stats data/chats --recipe recipes/qwen3_qlora.py --json stats.json

DATA is what the recipe would load; its DEFAULTS, --config and these flags say how. For each max_length, of the rows
that are trained: rows and tokens that it cuts off, answer tokens lost, the packs that TRL makes (bfd) and how full they
are. `context` are tokens that are not trained, `response` those that are. OUT becomes a folder with lengths.png,
report.json (what the table says, and lengths by power of two), rejected.jsonl (rows that cannot be rendered).

The recommended max_length is the smallest that leaves at least --keep of all answer tokens and cuts the answers of at
most 1% of the rows (--max_cut), which is what recipes/hooks lets pass.

Exit 0: done. 1: no row can be measured. 2: bad input, one sentence.
"""

import json
import os
import shutil
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from data_prep.common.command_line import add_num_proc, make_parser, run_command
from data_prep.common.errors import UsageError
from data_prep.common.json_text import dump_json_lenient
from data_prep.common.packing import pack_lengths
from data_prep.common.parallel import parallel_map
from data_prep.common.recipe_rows import load_rows
from data_prep.common.recipe_settings import read_settings, require_named_mask
from data_prep.common.tokens import check_chat, tokenize_rows
from data_prep.common.writer import (
    ChunkResult,
    check_output_path,
    explain_os_errors,
    make_report,
    write_text,
    write_utf8,
)
from data_prep.compile import FLAGS, blocks_of, hashes_of, prepared, rejected

LIMITS = [1 << power for power in range(9, 18)]  # 512 to 131,072


# -- one block --------------------------------------------------------------------------------------------------------
def work(block, given, chat):
    """Result of a Block of (number, row); more: its figures, a Counter {(name, max_length or bin): count}."""
    settings, against = prepared(given)
    failed, found = [], Counter()
    docs = tokenize_rows(block.data, against, settings, chat, failed, encodings=False)
    refused = [rejected(block.split, number, row, "template refuses the row", reason) for number, row, reason in failed]
    lengths = np.array([len(doc.ids) for doc in docs], np.int64)
    trained = np.array([doc.trained() for doc in docs], np.int64)
    found["rows", 0], found["tokens", 0], found["trained", 0] = len(docs), int(lengths.sum()), int(trained.sum())
    for name, values in (("length", lengths), ("context", lengths - trained), ("response", trained)):
        for value, count in zip(*np.unique(values, return_counts=True), strict=True):
            found[name, int(value)] += int(count)
    for limit in LIMITS:
        kept = np.array([doc.trained(0, limit) for doc in docs], np.int64)
        packs = pack_lengths(lengths.tolist(), limit, "bfd") if len(docs) else []
        found["cut_rows", limit] += int((lengths > limit).sum())
        found["cut_answers", limit] += int((kept < trained).sum())
        found["cut_tokens", limit] += int((lengths - limit).clip(0).sum())
        found["cut_trained", limit] += int((trained - kept).sum())
        found["packs", limit] += len(packs)
    return ChunkResult(rejected=refused, rows_in=len(block.data), counts=found)


# -- all of them ------------------------------------------------------------------------------------------------------
def measured(found):
    """The figures of a set, of its blocks' Counter."""
    rows, tokens, trained = (found[name, 0] for name in ("rows", "tokens", "trained"))
    table = []
    for limit in LIMITS:
        kept = tokens - found["cut_tokens", limit]
        table.append({
            "max_length": limit,
            "rows_cut": found["cut_rows", limit],
            "answers_cut": found["cut_answers", limit],
            "tokens_cut": found["cut_tokens", limit],
            "response_tokens_cut": found["cut_trained", limit],
            "packs": found["packs", limit],
            "filled": round(kept / (found["packs", limit] * limit), 4),
        })  # fmt: skip
    spreads = {name: quantiles(found, name) for name in ("length", "context", "response")}
    return {"rows": rows, "tokens": tokens, "response_tokens": trained, "context_tokens": tokens - trained,
            "spread": spreads, "histogram": histogram(found), "max_lengths": table}  # fmt: skip


def values_of(found, name):
    """(values, their counts) in order."""
    pairs = sorted((value, count) for (key, value), count in found.items() if key == name)
    return np.array([value for value, _ in pairs]), np.array([count for _, count in pairs])


def quantiles(found, name):
    """Smallest, largest, mean, and the smallest value that at least so many per cent of the rows do not exceed."""
    values, counts = values_of(found, name)
    shares = np.cumsum(counts)
    of = {f"p{p}": int(values[np.searchsorted(shares, p / 100 * shares[-1])]) for p in (50, 90, 95, 99)}
    mean = round(float((values * counts).sum() / shares[-1]), 1)
    return {"min": int(values[0]), "mean": mean, **of, "max": int(values[-1])}


def histogram(found):
    """{from: rows} of lengths by power of two."""
    out = Counter()
    for value, count in zip(*values_of(found, "length"), strict=True):
        out[1 << max(0, int(value).bit_length() - 1)] += int(count)
    return {str(start): out[start] for start in sorted(out)}


def recommended(figures, keep, max_cut):
    """(max_length, sentence): the smallest that fits."""
    rows, trained = figures["rows"], max(1, figures["response_tokens"])
    fits = [one for one in figures["max_lengths"]
            if one["response_tokens_cut"] <= (1 - keep) * trained and one["answers_cut"] <= max_cut * rows]  # fmt: skip
    one = (fits or figures["max_lengths"][-1:])[0]
    limit, why = one["max_length"], "the smallest" if fits else "too short, but the largest looked at: none"
    left, cut = 1 - one["response_tokens_cut"] / trained, one["answers_cut"]
    return limit, (
        f"max_length {limit:,}: {why} that keeps {keep:.0%} of the answer tokens ({left:.2%}) and cuts the answers of "
        f"at most {max_cut:.0%} of the rows ({cut:,} of {rows:,}); packs of it are {one['filled']:.0%} full"
    )


def lines_of(figures):
    """The table for the terminal."""
    rows, tokens, trained = figures["rows"], figures["tokens"], max(1, figures["response_tokens"])
    share = figures["response_tokens"] / max(1, tokens)
    yield f"{rows:,} rows, {tokens:,} tokens: {share:.1%} response, {1 - share:.1%} context"
    names = ["min", "mean", "p50", "p90", "p95", "p99", "max"]
    yield f"{'tokens a row':>12} " + " ".join(f"{name:>9}" for name in names)
    for name, spread_of in figures["spread"].items():
        yield f"{name:>12} " + " ".join(f"{spread_of[key]:>9,}" for key in names)
    heads = "rows cut", "tokens cut", "answers lost", "packs", "full"
    yield f"{'max_length':>12} " + " ".join(f"{head:>13}" for head in heads)
    for one in figures["max_lengths"]:
        cells = f"{one['rows_cut'] / rows:.2%}", f"{one['tokens_cut'] / max(1, tokens):.2%}"
        cells += f"{one['response_tokens_cut'] / trained:.2%}", f"{one['packs']:,}", f"{one['filled']:.1%}"
        yield f"{one['max_length']:>12,} " + " ".join(f"{cell:>13}" for cell in cells)


def draw(found, limit, path):
    """A histogram of row lengths and, below it, what share of rows and of tokens no longer row holds."""
    from matplotlib.figure import Figure

    values, counts = values_of(found, "length")
    figure = Figure(figsize=(8, 7), layout="constrained")
    top, below = figure.subplots(2, 1, sharex=True)
    least = max(1, values_of(found, "response")[0][0])  # an answer is shorter than its row
    edges = np.geomspace(least, max(2, values[-1] + 1), 60)
    for name, colour in (("length", "#4c78a8"), ("response", "#f58518")):
        at, rows = values_of(found, name)
        top.hist(at, edges, weights=rows, histtype="step", linewidth=1.5, color=colour,
                 label={"length": "whole row", "response": "response tokens"}[name])  # fmt: skip
    top.set(ylabel="rows", title="Tokens a row")
    below.step(values, np.cumsum(counts) / counts.sum(), where="post", color="#4c78a8", label="rows")
    shares = np.cumsum(values * counts) / max(1, (values * counts).sum())
    below.step(values, shares, where="post", color="#54a24b", linestyle="--", label="tokens")
    below.set(xlabel="tokens", ylabel="share of rows, and of tokens in them", xscale="log", ylim=(0, 1.02))
    ticks = [1 << power for power in range(18) if least / 2 <= 1 << power <= max(values[-1], limit) * 1.5]
    below.set_xticks(ticks, labels=[f"{tick:,}" for tick in ticks], rotation=45)
    below.minorticks_off()
    for part in (top, below):
        part.axvline(limit, color="#e45756", linewidth=1, label=f"max_length {limit:,}")
        part.legend(frameon=False)
        part.grid(alpha=0.3)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def main():
    parser = make_parser(__doc__)
    parser.add_argument("data", metavar="DATA", help=".jsonl, .json or .parquet file, or a save_to_disk folder")
    parser.add_argument("--recipe", required=True, help="a recipes/NAME.py, whose DEFAULTS hold")
    parser.add_argument("--config", help="YAML file of a recipe's names: DEFAULTS < YAML < flags")
    parser.add_argument("--out", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--json", type=Path, help="file for the figures; written anew")
    parser.add_argument("--keep", type=float, default=0.95, help="share of the answer tokens that must be left (0.95)")
    parser.add_argument("--max_cut", type=float, default=0.01, help="share of rows whose answer may be cut (0.01)")
    for name, kind in FLAGS.items():
        parser.add_argument(f"--{name}", type=kind, help="as in the recipe")
    add_num_proc(parser)
    return run_command(parser, stats)


def stats(args):
    """The exit code; raises UsageError."""
    if not (0 <= args.keep <= 1 and 0 <= args.max_cut <= 1):
        raise UsageError("--keep and --max_cut: must be shares between 0 and 1")
    if args.out:
        check_output_path(args.out)
    settings = read_settings(args.recipe, args.config, {name: getattr(args, name) for name in FLAGS})
    require_named_mask(settings, args.assistant_only_loss)
    rows, order, note = load_rows(args.data, settings)
    if "input_ids" in rows.column_names:
        raise UsageError(f"{args.data}: its rows are tokens already: pass the rows of messages that they were made of")
    given = json.dumps(vars(settings))
    chat, split = check_chat(rows[order[0]], prepared(given)[1], settings), settings.dataset_train_split
    found, refused, total = Counter(), [], 0
    blocks = blocks_of({split: (rows, order)}, SimpleNamespace(dataset_num_proc=settings.dataset_num_proc))
    for result in parallel_map(partial(work, given=given, chat=chat), blocks, args.num_proc):
        found.update(result.counts)
        refused += result.rejected
        total += result.rows_in
    if not found["rows", 0]:
        print(f"{args.data}: no row can be rendered: {refused[0]['detail']}", file=sys.stderr)
        return 1
    figures = measured(found)
    limit, sentence = recommended(figures, args.keep, args.max_cut)
    figures |= {"recommended_max_length": limit, "reason": sentence} | ({"note": note} if note else {})
    reasons = Counter(entry["reason"] for entry in refused)
    report = make_report("stats.py", total, {split: figures["rows"]}, reasons, settings.seed, hashes_of(args.data), {})
    report = {name: value for name, value in report.items() if name not in ("output", "hash")} | figures
    if args.json:
        write_text(args.json, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    if args.out:
        save(args.out, report, refused, found, limit)
    print("\n".join([*lines_of(figures), sentence, *([note] if note else [])]))
    if refused:
        print(f"{len(refused):,} rows cannot be rendered, the first: {refused[0]['detail']}", file=sys.stderr)
    return 0


def save(out, report, refused, found, limit):
    """Write the folder aside and rename it."""
    aside = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        with explain_os_errors(out):
            aside.mkdir(parents=True)
            draw(found, limit, aside / "lengths.png")
            (aside / "rejected.jsonl").write_bytes(b"".join(dump_json_lenient(entry) + b"\n" for entry in refused))
            write_utf8(aside / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
            aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
