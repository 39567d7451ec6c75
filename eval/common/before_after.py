"""What compare.py shows: the figures of every model by groups of rows, what changed, and which of it chance explains.

A model's figure has a `change` against the base's, with its interval over the pairs of rows (metrics.change). What lies
wholly on one side of no change is better or worse; gate.py reads the same interval.
"""

import json
from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from eval.common.metrics import Metrics, Record, change, is_measured, is_ratio, summarize

if TYPE_CHECKING:
    from eval.common.measure import PreparedRow

BASE = "base"
FEW_ROWS = 10  # a group of fewer is folded

Results = dict[str, dict[str, dict[str, Metrics]]]  # by kind, group and model


@dataclass(frozen=True)
class Column:
    """How a metric is shown.

    sign: 1 where more is better, -1 where less is, 0 neither. is_rare: only where it happens. is_of_set: of all rows
    alone.
    """

    label: str
    sign: int = 0
    form: str = ".3f"
    is_rare: bool = False
    is_of_set: bool = False


METRICS = {
    "assistant_perplexity": Column("assistant perplexity", -1, ".4g"),
    "all_token_perplexity": Column("all-token perplexity", -1, ".4g"),
    "exact_match": Column("exact match", 1),
    "usability": Column("usability", 1),
    "stop_rate": Column("stop rate", 1),
    "cut_rate": Column("cut answers", -1),
    "loop_rate": Column("loop rate", -1),
    "abrupt_end_rate": Column("abrupt ends", -1),
    "control_token_rate": Column("control tokens", -1, is_rare=True),
    "empty": Column("empty answers", -1, is_rare=True),
    "failed": Column("failed answers", -1, is_rare=True),
    "prompt_copies": Column("copies of the question", -1, is_rare=True),
    "replacement_rate": Column("replacement characters", -1, is_rare=True),
    "run_on_rate": Column("goes on as the user", -1, is_rare=True),
    "distinct_answers": Column("distinct answers, of references", is_of_set=True),
    "most_common_answer": Column("most common answer, above reference", is_of_set=True),
    "language_retention": Column("language retention", 1),
    "json_valid": Column("JSON validity", 1),
    "json_schema_valid": Column("JSON schema validity", 1),
    "json_field_match": Column("JSON fields equal", 1),
    "json_exact_match": Column("JSON all fields equal", 1),
    "json_negative": Column("JSON negative examples", 1),
    "answer_tokens": Column("answer length (tokens)", 0, ".1f"),
    "reference_tokens": Column("reference length (tokens)", 0, ".1f"),
}
SHORT = {"assistant_perplexity", "exact_match", "usability", "json_valid"}  # of each group on the terminal


# -- figures ----------------------------------------------------------------------------------------------------------
def group_rows(rows: "Sequence[PreparedRow]") -> dict[str, dict[str, list[int]]]:
    """Return the numbers of the rows by kind and group; persona is whether a system message stands there."""
    has_system = []
    for prepared in rows:
        has_system.append(any([message["role"] == "system" for message in prepared.row["messages"]]))
    kinds: dict[str, dict[str, list[int]]] = {"source": {}, "mode": {}, "tag": {}, "persona": {}}
    for number, prepared in enumerate(rows):
        names = {
            "source": [prepared.row["source"]],
            "mode": [],
            "tag": sorted(set(prepared.row["tags"])),
            "persona": [],
        }
        if prepared.row["mode"]:
            names["mode"] = [prepared.row["mode"]]
        if any(has_system):
            names["persona"] = ["persona" if has_system[number] else "no persona"]
        for kind, groups in names.items():
            for group in groups:
                kinds[kind].setdefault(group, []).append(number)
    sorted_kinds = {kind: dict(sorted(groups.items())) for kind, groups in kinds.items()}
    return {"overall": {"all": list(range(len(rows)))}, **sorted_kinds}


def number_questions(rows: "Sequence[PreparedRow]") -> list[Hashable]:
    """Return what tells the question of each row from those of the others.

    Rows that differ in the thinking mode alone share it: a question asked in two modes is one. Rows that are the same
    in the mode too stay apart, each with that of its own in the other mode. A thought before the last answer is left
    out, for a row without thinking has none.
    """
    questions = []
    seen: Counter[Hashable] = Counter()
    for prepared in rows:
        row = prepared.row
        turns = []
        for message in row["messages"][:-1]:
            turns.append({key: value for key, value in message.items() if key != "reasoning_content"})
        kwargs = {key: value for key, value in row["kwargs"].items() if key != "enable_thinking"}
        question = json.dumps([row["source"], turns, row["tools"], kwargs], sort_keys=True, default=str)
        questions.append((question, seen[question, row["mode"]]))
        seen[question, row["mode"]] += 1
    return questions


def compute_results(rows: "Sequence[PreparedRow]", records: dict[str, list[Record]], seed: int) -> Results:
    """Return the metrics of every model by kind and group of rows. records: by model, the base first.

    A figure over rows of which some ask one question in two modes has `questions` too, how many there are.
    """
    questions = number_questions(rows)
    results: Results = {}
    for kind, groups in group_rows(rows).items():
        results[kind] = {}
        for group, numbers in groups.items():
            chosen = {name: [own[number] for number in numbers] for name, own in records.items()}
            results[kind][group] = summarize_models(chosen, seed)
            asked = [questions[number] for number in numbers]
            for name, own in chosen.items():
                add_questions(results[kind][group][name], own, asked)
    return results


def add_questions(metrics: Metrics, records: Sequence[Record], questions: Sequence[Hashable]) -> None:
    """Add to each figure how many questions it is over, where they are fewer than its rows."""
    for metric, figure in metrics.items():
        own = []
        for record, question in zip(records, questions, strict=True):
            if is_measured(metric, record):
                own.append(question)
        if len(set(own)) < len(own):
            figure["questions"] = len(set(own))


def summarize_models(records: dict[str, list[Record]], seed: int) -> dict[str, Metrics]:
    """Return the metrics of every model over the same rows, of all but the first with their change against it."""
    base, *others = records
    summaries = {name: summarize(own, seed) for name, own in records.items()}
    for name in others:
        for metric, figure in summaries[name].items():
            changed = change(metric, records[name], records[base], seed)
            if changed is not None:
                figure["change"] = changed
    return summaries


# -- tables -----------------------------------------------------------------------------------------------------------
@dataclass
class Cell:
    """A figure as text, the ends of its interval, and its verdict: better, worse or ""."""

    text: str
    interval: str = ""
    verdict: str = ""

    def __str__(self) -> str:
        if not self.interval:
            return self.text
        return f"{self.text} ({self.interval})"


@dataclass
class Line:
    """A metric: its figure of each model, behind every one but the base's its change, and how many rows it is over."""

    label: str
    cells: list[Cell]
    n: str


@dataclass
class Group:
    """The lines of a group of rows. size: how many rows."""

    kind: str
    name: str
    size: int
    lines: list[Line] = field(default_factory=list)

    @property
    def title(self) -> str:
        if self.kind == "overall":
            return self.name
        return f"{self.kind}: {self.name}"

    @property
    def is_few(self) -> bool:
        return self.kind != "overall" and self.size < FEW_ROWS


def list_columns(names: Sequence[str]) -> list[str]:
    """Return the names of a table's columns behind the group: the first model is the base."""
    columns = ["metric", f"{names[0]} (95%)"]
    for name in names[1:]:
        columns += [f"{name} (95%)", "change (95%)"]
    return [*columns, "n"]


def list_groups(results: Results, chosen: Collection[str] = tuple(METRICS)) -> Iterator[Group]:
    """Yield the groups of a report that have lines. chosen: the metrics of all groups but the overall one.

    A group of the same rows as one before (the tag of a source) is left out.
    """
    seen = []
    for kind, groups in results.items():
        for name, models in groups.items():
            if models in seen:
                continue
            seen.append(models)
            base = next(iter(models.values()))
            group = Group(kind, name, max([count_rows(figure) for figure in base.values()], default=0))
            for metric, column in METRICS.items():
                if kind != "overall" and (metric not in chosen or column.is_of_set):
                    continue
                line = make_line(metric, column, list(models.values()))
                if line is not None:
                    group.lines.append(line)
            yield group


def make_line(metric: str, column: Column, models: Sequence[Metrics]) -> Line | None:
    """Return the line of a metric, the base's figure first; None where nothing was measured or nothing happened."""
    figures = [metrics.get(metric) for metrics in models]
    base = figures[0]
    if base is None:
        return None
    if column.is_rare and not any([figure["count"] for figure in figures if figure]):
        return None
    cells = [make_cell(base, column)]
    for figure in figures[1:]:
        cell = make_cell(figure, column)
        changed = make_change(metric, figure, base, column)
        cell.verdict = changed.verdict
        cells += [cell, changed]
    return Line(column.label, cells, show_rows([count_rows(figure) for figure in figures if figure]))


def count_rows(figure: dict) -> int:
    """Return how many rows a figure is over, those that ask one question in two modes as one."""
    rows = figure.get("total", figure.get("rows", 0))
    return figure.get("questions", rows)


def show_rows(counts: Sequence[int]) -> str:
    """Return how many rows each model's figure is over, one number where they are as many."""
    if len(set(counts)) == 1:
        counts = counts[:1]
    return ", ".join([f"{count:,}" for count in counts])


def make_cell(figure: dict | None, column: Column) -> Cell:
    if figure is None:
        return Cell("none")
    text = f"{figure['value']:{column.form}}"
    if "low" not in figure:
        return Cell(text)
    dash = "–" if figure["low"] >= 0 else " to "
    return Cell(text, f"{figure['low']:{column.form}}{dash}{figure['high']:{column.form}}")


def make_change(metric: str, figure: dict | None, base: dict, column: Column) -> Cell:
    """Return the change of a figure: a ratio of perplexities, a difference of anything else."""
    if figure is None:
        return Cell("")
    changed = figure.get("change")
    if changed is None:
        return Cell(f"{figure['value'] - base['value']:+{column.form}}")
    by_ratio = is_ratio(metric)
    if by_ratio:
        text = f"× {changed['value']:.3g}"
    else:
        text = f"{changed['value']:+{column.form}}"
    if "low" not in changed:
        return Cell(text)
    verdict = judge_change(changed, column.sign, 1.0 if by_ratio else 0.0)
    if by_ratio:
        return Cell(text, f"{changed['low']:.3g}–{changed['high']:.3g}", verdict)
    return Cell(text, f"{changed['low']:+{column.form}} to {changed['high']:+{column.form}}", verdict)


def judge_change(changed: dict, sign: int, none: float) -> str:
    """Return better or worse where the whole interval of a change lies on one side of none, else ""."""
    if not sign or changed["low"] <= none <= changed["high"]:
        return ""
    return "better" if (changed["low"] > none) == (sign > 0) else "worse"
