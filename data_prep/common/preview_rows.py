"""What preview says about rows: figures of each and of all, the packs and steps of a run, what would go wrong."""

import json
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .packing import Piece, count_steps, pack_lengths
from .personas import find_lost_personas
from .recipe_settings import LENGTH_REMEDY, Settings
from .rendering import (
    Rendered,
    Renderer,
    Span,
    find_control_tokens,
    find_empty_thoughts,
    find_stop_ids,
)
from .rows import get_turns
from .tokens import Document, count_within

SHOWN_ROWS = 9  # of a finding
BINS = 24  # of the histogram, at most
OTHER_FAMILY = "template of another family"  # the name of a finding
FAULTS = ("untrained", "cut", "no_stop", "persona", "control", "thought", "newline", "straddle")  # of a row


# -- one row ----------------------------------------------------------------------------------------------------------
@dataclass
class RowFigures:
    """What there is to say about a row."""

    row: int  # from 0
    id: object
    tokens: int
    trained: int
    truncated: bool
    cut: bool  # a trained token is truncated
    untrained: bool  # no token is trained
    empty: bool  # no token that is left is trained
    no_stop: bool  # the last trained span ends without a stop token
    persona: str | None  # that the template leaves out
    control: str | None  # a control token in the row's own text
    thought: bool  # an answer closes, empty, the think block that its prompt opens
    newline: bool  # an answer begins with one, of the others
    straddle: bool  # a token lies across an edge of the trained text
    kept: Span  # the tokens that are not truncated


class RowChecks:
    """What is looked at in a row, and what that needs to know of the tokenizer and the template."""

    def __init__(self, renderer: Renderer, settings: Settings) -> None:
        self.renderer = renderer
        self.settings = settings
        self.eos_token = renderer.tokenizer.eos_token or ""
        config = read_json(Path(settings.model_name_or_path) / "generation_config.json")
        self.stops = find_stop_ids(renderer.tokenizer, settings.eos_token, config.get("eos_token_id"))
        self.is_blank = cache(lambda token: not renderer.tokenizer.decode([token]).strip())

    def stop_is_trained(self, document: Document) -> bool:
        """Return whether the last trained span ends with a stop token; blanks may follow, as in a published mask."""
        start, end = document.spans[-1]
        while end > start and self.is_blank(document.ids[end - 1]):
            end -= 1
        return end > start and document.ids[end - 1] in self.stops

    def find_control_token(self, document: Document) -> str | None:
        """Return the first control token that stands in the row's own text."""
        if get_turns(document.row):
            for _, token in find_control_tokens(document.row, self.renderer):
                return token
            return None
        return self.renderer.control_in(document.text.removesuffix(self.eos_token))  # which TRL adds

    def find_lost_persona(self, document: Document) -> str | None:
        """Return the first text that says who speaks and that the template leaves out."""
        if get_turns(document.row):
            for _, text in find_lost_personas(document.row, self.renderer):
                return text
        return None

    def measure(self, document: Document) -> RowFigures:
        trained = document.trained()
        kept = find_kept(len(document.ids), self.settings)
        trained_kept = document.trained(*kept)
        has_text = document.text is not None  # a compiled row has none
        thoughts = find_empty_thoughts(Rendered(document.text, document.chars)) if has_text else []
        other_spans = [span for span in document.chars if span[0] not in thoughts]
        answers = [document.text[start:end] for start, end in other_spans]
        return RowFigures(
            row=document.number,
            id=document.row.get("id"),
            tokens=len(document.ids),
            trained=trained,
            truncated=kept.end - kept.start < len(document.ids),
            cut=trained_kept < trained,
            untrained=trained == 0,
            empty=trained_kept == 0,
            no_stop=trained > 0 and not self.stop_is_trained(document),
            persona=self.find_lost_persona(document) if has_text else None,
            control=self.find_control_token(document) if has_text else None,
            thought=bool(thoughts),
            newline=any([re.match(r"[^\S\n]*\n", answer) for answer in answers]),
            straddle=has_straddling_token(document, other_spans),
            kept=kept,
        )


def has_straddling_token(document: Document, spans: list[Span]) -> bool:
    """Return whether a token lies across an edge of these spans of trained text."""
    for start, end in spans:
        first = document.encoding.char_to_token(start)
        last = document.encoding.char_to_token(end - 1)
        if first is not None and document.encoding.token_to_chars(first)[0] < start:
            return True
        if last is not None and document.encoding.token_to_chars(last)[1] > end:
            return True
    return False


def find_kept(tokens: int, settings: Settings) -> Span:
    """Return the tokens of a row that are not truncated; bfd_split and wrapped packing truncate none."""
    limit = settings.max_length
    splits = settings.packing and settings.packing_strategy != "bfd"
    if limit is None or tokens <= limit or splits:
        return Span(0, tokens)
    if settings.truncation_mode == "keep_end" and not settings.packing:
        return Span(tokens - limit, tokens)
    return Span(0, limit)


def read_json(path: Path) -> dict:
    """Return the JSON object of a file that need not be there, nor be JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


# -- all rows ---------------------------------------------------------------------------------------------------------
class Bin(NamedTuple):
    """Rows of [start, end) tokens, and how many of them are longer than max_length."""

    start: int
    end: int
    rows: int
    longer: int


@dataclass
class Totals:
    """Of all rows of the split."""

    rows: int
    tokens: int
    trained: int
    truncated: int
    empty: int
    faults: dict[str, list[int]]  # the rows with each of FAULTS
    lengths: dict[str, int]  # p50: the shortest length that half of the rows do not exceed
    histogram: list[Bin]


class Packing(NamedTuple):
    """How rows come to be packs."""

    is_packed: bool
    is_compiled: bool  # the rows of the set are packs
    length: int | None  # tokens of a full pack, where known


@dataclass
class Plan:
    """What a run makes of the rows that it trains. A unit is a pack or, without packing, a row."""

    training_rows: int
    packs: int | None
    left_out: int  # units that fill no optimizer step
    fill: float | None  # share of the packs' places that hold a token
    masked_packs: int  # units without a trained token
    units: int
    kept_tokens: int
    kept_trained: int
    steps_per_epoch: int
    steps: int
    tokens_per_step: float
    trained_per_step: float


def add_up(rows: list[RowFigures], max_length: int | None) -> Totals:
    lengths = sorted([row.tokens for row in rows])
    percentiles = {}
    for percent in (0, 50, 90, 95, 99, 100):
        rank = -(-percent * len(rows) // 100)  # rounded up
        percentiles[f"p{percent}"] = lengths[max(0, rank - 1)]
    return Totals(
        rows=len(rows),
        tokens=sum(lengths),
        trained=sum([row.trained for row in rows]),
        truncated=sum([row.truncated for row in rows]),
        empty=sum([row.empty for row in rows]),
        faults={name: [row.row for row in rows if getattr(row, name)] for name in FAULTS},
        lengths=percentiles,
        histogram=make_histogram(lengths, max_length),
    )


def make_histogram(lengths: list[int], max_length: int | None) -> list[Bin]:
    """Return bins that are even on a log axis, so that one long row leaves the short ones apart."""
    longest = max(1, *lengths)
    shortest = max(1, min(lengths))
    edges = sorted({round(edge) for edge in np.geomspace(shortest, longest + 1, BINS + 1)})
    edges[0] = min(lengths)  # a row may be empty
    rows, _ = np.histogram(lengths, edges)
    too_long = [length for length in lengths if max_length is not None and length > max_length]
    longer, _ = np.histogram(too_long, edges)
    bins = []
    for index, start in enumerate(edges[:-1]):
        bins.append(Bin(start, edges[index + 1], int(rows[index]), int(longer[index])))
    return bins


def plan_run(
    rows: list[RowFigures], spans: list[list[Span]], order: list[int], settings: Settings, packing: Packing
) -> Plan:
    """Return what a run does with the rows in `order`. spans: the trained tokens of each row."""
    units = make_units(rows, order, settings)
    made = len(units)
    if settings.one_stream:  # as nanochat_midtrain.py: the last pack, which may be short, never
        units = units[: count_whole_steps(made - 1, settings) or made]
    sizes = [sum([piece.end - piece.start for piece in unit]) for unit in units]
    trained = [sum([count_within(spans[piece.row], piece.start, piece.end) for piece in unit]) for unit in units]
    full_length = packing.length or max([row.tokens for row in rows])
    steps_per_epoch, steps = count_steps(len(units), settings)
    return Plan(
        training_rows=len(order),
        packs=len(units) if packing.is_packed else None,
        left_out=made - len(units),
        fill=sum(sizes) / (len(units) * full_length) if units and packing.is_packed else None,
        masked_packs=trained.count(0),
        units=len(units),
        kept_tokens=sum(sizes),
        kept_trained=sum(trained),
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        tokens_per_step=sum(sizes) / steps_per_epoch,
        trained_per_step=sum(trained) / steps_per_epoch,
    )


def make_units(rows: list[RowFigures], order: list[int], settings: Settings) -> list[list[Piece]]:
    """Return the packs, or rows, that are trained."""
    if settings.packing:
        lengths = [rows[number].tokens for number in order]
        packs = pack_lengths(
            lengths, settings.max_length, settings.packing_strategy, settings.dataset_num_proc, settings.one_stream
        )
        return [[Piece(order[piece.row], piece.start, piece.end) for piece in pack] for pack in packs]
    if settings.max_length is not None:  # TRL drops rows that the cut leaves without a trained token
        order = [number for number in order if not rows[number].empty]
    return [[Piece(number, *rows[number].kept)] for number in order]


def count_whole_steps(units: int, settings: Settings) -> int:
    """Return how many of the units fill optimizer steps."""
    return units // settings.global_batch_size * settings.global_batch_size


# -- findings ---------------------------------------------------------------------------------------------------------
class Finding(NamedTuple):
    name: str
    sentence: str
    rows: list[int]  # the first of them


@dataclass
class Verdict:
    """What would make a run go wrong, and what is only worth a note."""

    findings: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)

    def fail(self, name: str, sentence: str, rows: list[int]) -> None:
        self.findings.append(Finding(name, sentence + format_rows(rows), rows[:SHOWN_ROWS]))

    def warn(self, name: str, sentence: str, rows: list[int]) -> None:
        self.warnings.append(Finding(name, sentence + format_rows(rows), rows[:SHOWN_ROWS]))


def format_rows(rows: list[int]) -> str:
    """Return " (row 3)", " (rows 3, 5, …)" or nothing."""
    if not rows:
        return ""
    numbers = [str(number) for number in rows[:SHOWN_ROWS]]
    if len(rows) > SHOWN_ROWS:
        numbers.append("…")
    noun = "row" if len(rows) == 1 else "rows"
    return f" ({noun} {', '.join(numbers)})"


def count_rows(rows: list[int]) -> str:
    return f"{len(rows):,} row" if len(rows) == 1 else f"{len(rows):,} rows"


def judge(
    rows: list[RowFigures],
    totals: Totals,
    plan: Plan,
    settings: Settings,
    max_cut: float,
    is_chat: bool,
    renderer: Renderer,
) -> Verdict:
    """Return what is wrong with the rows. max_cut: the share of them whose answers may be truncated."""
    verdict = Verdict()
    faults = totals.faults
    judge_untrained(verdict, totals, plan, is_chat and settings.assistant_only_loss)
    judge_stops(verdict, faults["no_stop"], is_chat or len(faults["no_stop"]) == totals.rows)
    judge_cuts(verdict, faults["cut"], totals.rows, max_cut)
    if faults["persona"]:
        persona = rows[faults["persona"][0]].persona
        text = f"{count_rows(faults['persona'])} whose system text the template does not render: {persona[:60]!r}"
        verdict.fail("persona lost", text, faults["persona"])
    if faults["control"]:
        tokens = sorted({rows[number].control for number in faults["control"]})
        text = f"{count_rows(faults['control'])} with {', '.join(tokens[:5])} in the text"
        verdict.fail("control tokens in text", f"{text}, which becomes a real control token", faults["control"])
    if faults["thought"]:
        text = f"{count_rows(faults['thought'])}: {renderer.empty_thought_remedy}"
        verdict.warn("no reasoning behind an opened thought", text, faults["thought"])
    if faults["newline"]:
        text = f"{count_rows(faults['newline'])} with an answer that begins with a newline"
        verdict.warn("leading newline", f"{text}, which merges with the header's: strip it", faults["newline"])
    straddling = [number for number in faults["straddle"] if not rows[number].newline]
    if straddling:
        text = f"{count_rows(straddling)} with a token across the edge of the trained text"
        verdict.warn("edge", text, straddling)
    if plan.masked_packs and plan.kept_trained:
        units = "rows" if plan.packs is None else "packs"
        text = f"{plan.masked_packs:,} of {plan.units:,} {units} without a trained token"
        verdict.warn("masked packs", f"{text}: they cost time and teach nothing", [])
    return verdict


def judge_untrained(verdict: Verdict, totals: Totals, plan: Plan, trl_stops: bool) -> None:
    """trl_stops: whether TRL stops at a row without a trained token."""
    rows = totals.faults["untrained"]
    if plan.kept_trained == 0 and totals.trained:
        verdict.fail("nothing trained", "nothing is trained: what is trained lies behind the cut", [])
    elif plan.kept_trained == 0:
        verdict.fail("nothing trained", "nothing is trained: the mask is empty in every row", [])
    elif rows and trl_stops:
        text = f"{count_rows(rows)} without a trained token: TRL stops at the first, leave them out"
        verdict.fail("nothing trained", text, rows)
    elif rows:
        verdict.warn("nothing to train", f"{count_rows(rows)} without a trained token", rows)


def judge_stops(verdict: Verdict, rows: list[int], is_failure: bool) -> None:
    if rows and is_failure:
        text = f"{count_rows(rows)} whose last answer ends without a trained stop token: the model would not stop"
        verdict.fail("stop token untrained", text, rows)
    elif rows:
        verdict.warn("no stop at the end", f"{count_rows(rows)} without a trained stop token at the end", rows)


def judge_cuts(verdict: Verdict, rows: list[int], total: int, max_cut: float) -> None:
    share = len(rows) / total
    text = f"{count_rows(rows)} of {total:,} ({share:.1%}) with an answer cut off"
    if share > max_cut:
        text += (
            f", --max_cut allows {max_cut:.1%}: python -m data_prep.stats shows what each length cuts, {LENGTH_REMEDY}"
        )
        verdict.fail("answers cut", text, rows)
    elif rows:
        verdict.warn("answers cut", f"{text}, within --max_cut {max_cut:.1%}", rows)


def judge_changes(verdict: Verdict, changes: dict[int, str], data: str) -> None:
    """changes: {row: where} of the rows that a recipe loads with another value than stands in the file."""
    if not changes:
        return
    rows = sorted(changes)
    text = f"{count_rows(rows)} with a value that loading changes, the first {changes[rows[0]]}"
    check = f"python -m data_prep.check {data} names each"
    mend = f"python -m data_prep.normalize messages {data} --out data/NAME writes a folder that keeps every value"
    verdict.fail("value changed", f"{text}: {check}, {mend}", rows)
