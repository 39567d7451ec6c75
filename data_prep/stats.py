"""Measure the lengths of a set as a recipe tokenises it, and say which max_length fits: a table, a histogram and a CDF.

    python -m data_prep.stats data/chats --recipe recipes/qwen3_qlora.py
    python -m data_prep.stats data/chats --recipe recipes/qwen3_qlora.py --out runs/chats-stats
    python -m data_prep.stats data/chats --recipe recipes/qwen3_qlora.py --json stats.json

DATA is what the recipe would load; its DEFAULTS, --config and these flags say how. For each max_length, of the rows
that are trained: rows and tokens that it cuts off, answer tokens lost, the packs that TRL makes (bfd) and how full they
are. `context` are tokens that are not trained, `response` those that are. OUT becomes a folder with lengths.png,
report.json (what the table says, and lengths by power of two), rejected.jsonl (rows that cannot be rendered).

The recommended max_length is the smallest that leaves at least --keep of all answer tokens and cuts the answers of at
most 1% of the rows (--max_cut), which is what recipes/hooks lets pass. Where it is longer than the recipe's own, the
longest that the recipe's card holds by prediction (python -m eval.fit; the card of its first line, or --gpu) bounds it.

Exit 0: done. 1: no row can be measured. 2: bad input, one sentence.
"""

import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from data_prep.common.chunks import Chunk
from data_prep.common.command_line import add_num_proc, make_parser, run_command
from data_prep.common.errors import UsageError
from data_prep.common.gpu_cards import find_card
from data_prep.common.json_text import dump_json_lenient
from data_prep.common.packing import pack_lengths
from data_prep.common.parallel import parallel_map
from data_prep.common.recipe_rows import load_rows
from data_prep.common.recipe_settings import (
    LENGTH_REMEDY,
    Settings,
    add_recipe_flags,
    read_settings,
    require_named_mask,
)
from data_prep.common.tokens import FailedRow, check_chat, tokenize_rows
from data_prep.common.writer import (
    check_output_path,
    format_json,
    make_report,
    staged_folder,
    write_text,
    write_utf8,
)
from data_prep.compile import (
    FLAGS,
    NOT_RENDERED,
    OrderedRows,
    check_not_compiled,
    dump_settings,
    hash_inputs,
    open_renderer,
    print_notes,
    read_blocks,
    rejected_entry,
)

LIMITS = [1 << power for power in range(9, 18)]  # 512 to 131,072
MOST_TICKS = 8  # labels of the picture, which would overlap
PARTS = ("length", "context", "response")  # of a row: whole, what is not trained, what is


# -- one block --------------------------------------------------------------------------------------------------------
@dataclass
class Lengths:
    """The lengths of rows in tokens."""

    rows: dict[str, Counter[int]] = field(default_factory=lambda: {part: Counter() for part in PARTS})  # by length
    # what each max_length does: rows that lose tokens, rows that lose answers, tokens and trained ones lost; packs
    cuts: dict[int, Counter[str]] = field(default_factory=lambda: {limit: Counter() for limit in LIMITS})
    rejected: list[dict] = field(default_factory=list)
    rows_in: int = 0

    def add(self, other: "Lengths") -> None:
        for part in PARTS:
            self.rows[part].update(other.rows[part])
        for limit in LIMITS:
            self.cuts[limit].update(other.cuts[limit])
        self.rejected += other.rejected
        self.rows_in += other.rows_in

    def values(self, part: str) -> tuple[np.ndarray, np.ndarray]:
        """Return (lengths in order, how many rows have each): both (different lengths,) int64."""
        pairs = sorted(self.rows[part].items())
        return np.array([length for length, _ in pairs]), np.array([count for _, count in pairs])

    def total(self, part: str) -> int:
        return sum(length * count for length, count in self.rows[part].items())


def measure_block(block: Chunk, settings: Settings, chat: bool) -> Lengths:
    """Return the lengths of a block of NumberedRow."""
    failed: list[FailedRow] = []
    renderer = open_renderer(dump_settings(settings))
    documents = tokenize_rows(block.data, renderer, settings, chat, failed, encodings=False)
    found = Lengths(rows_in=len(block.data))
    for number, row, reason in failed:
        found.rejected.append(rejected_entry(block.split, number, row, NOT_RENDERED, reason))
    lengths = np.array([len(document.ids) for document in documents], np.int64)
    trained = np.array([document.trained() for document in documents], np.int64)
    for part, values in zip(PARTS, (lengths, lengths - trained, trained), strict=True):
        found.rows[part].update(values.tolist())
    for limit in LIMITS:
        kept = np.array([document.trained(0, limit) for document in documents], np.int64)
        found.cuts[limit] = Counter(
            rows=int((lengths > limit).sum()),
            answers=int((kept < trained).sum()),
            tokens=int((lengths - limit).clip(0).sum()),
            trained=int((trained - kept).sum()),
            packs=len(pack_lengths(lengths.tolist(), limit, "bfd")),
        )
    return found


# -- all of them ------------------------------------------------------------------------------------------------------
def summarize(found: Lengths) -> dict:
    """Return the figures of a set."""
    tokens = found.total("length")
    table = []
    for limit, cut in found.cuts.items():
        table.append(
            {
                "max_length": limit,
                "rows_cut": cut["rows"],
                "answers_cut": cut["answers"],
                "tokens_cut": cut["tokens"],
                "response_tokens_cut": cut["trained"],
                "packs": cut["packs"],
                "filled": round((tokens - cut["tokens"]) / (cut["packs"] * limit), 4),
            }
        )
    return {
        "rows": found.rows["length"].total(),
        "tokens": tokens,
        "response_tokens": found.total("response"),
        "context_tokens": found.total("context"),
        "spread": {part: quantiles(found, part) for part in PARTS},
        "histogram": histogram(found),
        "max_lengths": table,
    }


def quantiles(found: Lengths, part: str) -> dict[str, float]:
    """Return min, mean, max, and the smallest value that at least so many per cent of the rows do not exceed."""
    values, counts = found.values(part)
    shares = np.cumsum(counts)
    spread = {"min": int(values[0]), "mean": round(float((values * counts).sum() / shares[-1]), 1)}
    for percent in (50, 90, 95, 99):
        spread[f"p{percent}"] = int(values[np.searchsorted(shares, percent / 100 * shares[-1])])
    spread["max"] = int(values[-1])
    return spread


def histogram(found: Lengths) -> dict[str, int]:
    """Return {from: rows} of lengths by power of two."""
    bins = Counter()
    for length, count in found.rows["length"].items():
        bins[1 << max(0, length.bit_length() - 1)] += count
    return {str(start): bins[start] for start in sorted(bins)}


def recommend(figures: dict, keep: float, max_cut: float) -> tuple[int, str]:
    """Return (max_length, sentence): the smallest that fits."""
    rows = figures["rows"]
    trained = max(1, figures["response_tokens"])
    chosen = figures["max_lengths"][-1]
    why = "too short, but the largest looked at: none"
    for cut in figures["max_lengths"]:
        if cut["response_tokens_cut"] <= (1 - keep) * trained and cut["answers_cut"] <= max_cut * rows:
            chosen = cut
            why = "the smallest"
            break
    limit = chosen["max_length"]
    left = 1 - chosen["response_tokens_cut"] / trained
    return limit, (
        f"max_length {limit:,}: {why} that keeps {keep:.0%} of the answer tokens ({left:.2%}) and cuts the answers of "
        f"at most {max_cut:.0%} of the rows ({chosen['answers_cut']:,} of {rows:,}); packs of it are "
        f"{chosen['filled']:.0%} full"
    )


@dataclass
class Bound:
    """The longest max_length that a card holds, None where nothing says so, and what to print of it."""

    length: int | None
    sentence: str


def find_bound(args: Namespace, settings: Settings, limit: int) -> Bound | None:
    """Return the bound of a length that is longer than the recipe's own; None where it is not. Raises UsageError."""
    own = read_settings(args.recipe, args.config).max_length
    if args.gpu is None and own is not None and limit <= own:
        return None
    fit = f"python -m eval.fit {args.recipe} --gpu NAME"

    from data_prep.common.gpu_lengths import find_longest_length, find_recipe_card  # torch, TRL: 5 s

    card = find_card(args.gpu) if args.gpu else find_recipe_card(args.recipe)
    if card is None:
        return Bound(None, f"{Path(args.recipe).name} names no single card: {fit} says what length one holds")
    try:
        longest = find_longest_length(args.recipe, args.config, settings, limit, card)
    except UsageError as error:
        return Bound(None, f"whether a {card.name} holds {limit:,} tokens cannot be predicted: {error}")
    if longest >= limit:
        return Bound(longest, f"a {card.name} holds packs of {limit:,} tokens, by prediction")
    return Bound(longest, f"a {card.name} holds at most {longest:,} tokens, by prediction ({fit} for others)")


def recommend_within(figures: dict, wanted: int, bound: Bound) -> tuple[int | None, str]:
    """Return (max_length, sentence): the longest of the table within a bound below the wanted one, None for none."""
    fitting = [cut for cut in figures["max_lengths"] if cut["max_length"] <= bound.length]
    if not fitting:
        return None, f"max_length {wanted:,} would fit the rows, but {bound.sentence}"
    cut = fitting[-1]
    trained = max(1, figures["response_tokens"])
    left = 1 - cut["response_tokens_cut"] / trained
    return cut["max_length"], (
        f"max_length {cut['max_length']:,}: {wanted:,} would fit the rows, but {bound.sentence}; it keeps "
        f"{left:.2%} of the answer tokens and cuts the answers of {cut['answers_cut']:,} of {figures['rows']:,} rows"
    )


def format_table(figures: dict) -> Iterator[str]:
    """Yield the lines of the table for the terminal."""
    rows = figures["rows"]
    tokens = max(1, figures["tokens"])
    trained = max(1, figures["response_tokens"])
    share = figures["response_tokens"] / tokens
    yield f"{rows:,} rows, {figures['tokens']:,} tokens: {share:.1%} response, {1 - share:.1%} context"
    names = ["min", "mean", "p50", "p90", "p95", "p99", "max"]
    yield f"{'tokens a row':>12} " + " ".join(f"{name:>9}" for name in names)
    for part, spread in figures["spread"].items():
        yield f"{part:>12} " + " ".join(f"{spread[name]:>9,}" for name in names)
    heads = ("rows cut", "tokens cut", "answers lost", "packs", "full")
    yield f"{'max_length':>12} " + " ".join(f"{head:>13}" for head in heads)
    for cut in figures["max_lengths"]:
        cells = [
            f"{cut['rows_cut'] / rows:.2%}",
            f"{cut['tokens_cut'] / tokens:.2%}",
            f"{cut['response_tokens_cut'] / trained:.2%}",
            f"{cut['packs']:,}",
            f"{cut['filled']:.1%}",
        ]
        yield f"{cut['max_length']:>12,} " + " ".join(f"{cell:>13}" for cell in cells)


def draw(found: Lengths, limit: int, path: Path) -> None:
    """Draw a histogram of row lengths and, below it, what share of rows and of tokens no longer row holds.

    4.5 inches wide: where 400 pixels show it, the labels are still twelve pixels high.
    """
    from matplotlib.figure import Figure

    lengths, rows = found.values("length")
    answer_lengths, answers = found.values("response")
    figure = Figure(figsize=(4.5, 5), layout="constrained")
    top, below = figure.subplots(2, 1, sharex=True)
    shortest = max(1, answer_lengths[0])  # an answer is shorter than its row
    edges = np.geomspace(shortest, max(2, lengths[-1] + 1), 60)
    line = {"histtype": "step", "linewidth": 1.5}
    top.hist(lengths, edges, weights=rows, color="#4c78a8", label="whole row", **line)
    top.hist(answer_lengths, edges, weights=answers, color="#f58518", label="response tokens", **line)
    top.set(ylabel="rows", title="Tokens a row")
    below.step(lengths, np.cumsum(rows) / rows.sum(), where="post", color="#4c78a8", label="rows")
    shares = np.cumsum(lengths * rows) / max(1, (lengths * rows).sum())
    below.step(lengths, shares, where="post", color="#54a24b", linestyle="--", label="tokens")
    below.set(xlabel="tokens", ylabel="share no longer", xscale="log", ylim=(0, 1.02))
    longest = max(lengths[-1], limit)
    powers = [1 << power for power in range(18)]
    ticks = [tick for tick in powers if shortest / 2 <= tick <= longest * 1.5]
    ticks = ticks[:: -(-len(ticks) // MOST_TICKS)]
    below.set_xticks(ticks, labels=[f"{tick:,}" for tick in ticks], rotation=45)
    below.minorticks_off()
    for axes in (top, below):
        axes.axvline(limit, color="#e45756", linewidth=1, label=f"max_length {limit:,}")
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=200, metadata={"Software": None})


# -- the command ------------------------------------------------------------------------------------------------------
def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("data", metavar="DATA", type=Path, help=".jsonl, .json or .parquet, or a save_to_disk folder")
    parser.add_argument("--out", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--json", type=Path, help="file for the figures; written anew")
    parser.add_argument("--keep", type=float, default=0.95, help="share of the answer tokens that must be left (0.95)")
    parser.add_argument("--max_cut", type=float, default=0.01, help="share of rows whose answer may be cut (0.01)")
    parser.add_argument("--gpu", help="the card that must hold the length, as for eval.fit (default: the recipe's)")
    add_recipe_flags(parser, FLAGS)
    add_num_proc(parser)
    return run_command(parser, stats)


def stats(args: Namespace) -> int:
    """Measure DATA and return the exit code. Raises UsageError."""
    if not (0 <= args.keep <= 1 and 0 <= args.max_cut <= 1):
        raise UsageError("--keep and --max_cut: must be shares between 0 and 1")
    if args.out:
        check_output_path(args.out)
    settings = read_settings(args.recipe, args.config, {name: getattr(args, name) for name in FLAGS})
    require_named_mask(settings, args.assistant_only_loss)
    rows, order, note = load_rows(args.data, settings)
    check_not_compiled(args.data, rows)
    renderer = open_renderer(dump_settings(settings))
    process_block = partial(measure_block, settings=settings, chat=check_chat(rows[order[0]], renderer, settings))
    split = settings.dataset_train_split
    blocks = read_blocks(split, OrderedRows(rows, order), settings.dataset_num_proc)
    found = Lengths()
    for lengths in parallel_map(process_block, blocks, args.num_proc):
        found.add(lengths)
    print_notes(renderer)
    if not found.rows["length"]:
        print(f"{args.data}: no row can be rendered: {found.rejected[0]['detail']}", file=sys.stderr)
        return 1
    figures = summarize(found)
    limit, reason = recommend(figures, args.keep, args.max_cut)
    bound = find_bound(args, settings, limit)
    wanted = limit
    if bound is not None and bound.length is not None and bound.length < limit:
        limit, reason = recommend_within(figures, limit, bound)
    elif bound is not None:
        reason += f"; {bound.sentence}"
    figures |= {"recommended_max_length": limit, "reason": reason}
    if note:
        figures["note"] = note
    refused = Counter(entry["reason"] for entry in found.rejected)
    report = make_report(
        "stats.py", found.rows_in, {split: figures["rows"]}, refused, settings.seed, hash_inputs(args.data), {}
    )
    del report["output"], report["hash"]
    report |= figures
    if args.json:
        write_text(args.json, format_json(report))
    if args.out:
        save(args.out, report, found, limit or wanted)
    print(*format_table(figures), reason, sep="\n")
    if note:
        print(note)
    if settings.max_length and wanted > settings.max_length:
        print(f"{args.recipe} trains at max_length {settings.max_length:,}: {LENGTH_REMEDY}")
    if found.rejected:
        count = len(found.rejected)
        print(f"{count:,} rows cannot be rendered, the first: {found.rejected[0]['detail']}", file=sys.stderr)
    return 0


def save(out: Path, report: dict, found: Lengths, limit: int) -> None:
    """Write the folder aside and rename it. Raises UsageError."""
    with staged_folder(out) as folder:
        draw(found, limit, folder / "lengths.png")
        rejected = b"".join([dump_json_lenient(entry) + b"\n" for entry in found.rejected])
        (folder / "rejected.jsonl").write_bytes(rejected)
        write_utf8(folder / "report.json", format_json(report))


if __name__ == "__main__":
    sys.exit(main())
