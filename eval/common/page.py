"""report.html of compare.py: one page that needs no network and no script, with curves, table and changed answers."""

import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from rapidfuzz.distance import Levenshtein

from data_prep.common.preview_text import reveal
from eval.common.before_after import FEW_ROWS, Group

PAGE = Path(__file__).with_name("report_page.html")
CHANGED = 24  # answers side by side
COLOURS = ("#2f6fb3", "#c2571a", "#2e8b57", "#8a4fbf", "#b8352f", "#6b7280")
WRONG = {  # flag of an answer: what is wrong with it
    "empty": "empty",
    "loops": "loops",
    "control": "control token",
    "copied": "copies the question",
    "garbled": "replacement characters",
    "runs_on": "goes on as the user",
}
FEW_POINTS = 30  # a line through fewer points hides where they are, so they get dots
LEFT, RIGHT, TOP, BOTTOM = 44, 474, 12, 192  # of the picture's area, in its own units
KINDS_OF_CURVES = {  # title: keys of the log, how each is called, whether it is dashed
    "loss (nats per token) by optimizer step": (("loss", "training", False), ("eval_loss", "validation", True)),
    "learning rate by optimizer step": (("learning_rate", "", False),),
}


# -- answers that changed ---------------------------------------------------------------------------------------------
def list_changed(lines: Sequence[dict], names: Sequence[str]) -> list[dict]:
    """Return the lines of answers.jsonl whose answers changed most against the first model's, at most CHANGED.

    First by flips (of exact and of usable, the most of any model), where something was lost before where it was gained;
    then by the largest edit distance (Levenshtein), divided by the length of the longer answer. Equal answers are none.
    """
    base = names[0]
    ranked = []
    for number, line in enumerate(lines):
        flips = 0
        is_lost = False
        distance = 0.0
        for other in names[1:]:
            differing = [flag for flag in ("exact", "usable") if line[other][flag] != line[base][flag]]
            flips = max(flips, len(differing))
            is_lost = is_lost or any([line[base][flag] for flag in differing])
            own = Levenshtein.normalized_distance(line[base]["answer"], line[other]["answer"])
            distance = max(distance, own)
        if flips or distance:
            ranked.append((-flips, not is_lost, -distance, number))
    return [lines[number] for *_, number in sorted(ranked)[:CHANGED]]


@dataclass
class Flag:
    """A word about an answer. kind: yes or no."""

    kind: str
    text: str


@dataclass
class Side:
    """A text beside others."""

    title: str
    text: str
    flags: list[Flag] = field(default_factory=list)


@dataclass
class Article:
    """The reference of a row and every model's answer to it."""

    id: str
    about: str
    prompt_tail: str
    sides: list[Side]


def make_article(line: dict, names: Sequence[str]) -> Article:
    """Return the article of a line of answers.jsonl."""
    parts = [line["source"], line["mode"], *line["tags"]]
    about = " · ".join(dict.fromkeys([part for part in parts if part]))
    sides = [Side("reference", line["reference"])]
    for name in names:
        answer = line[name]
        title = f"{name} · {answer['answer_tokens']:,} tokens"
        sides.append(Side(title, answer["answer"], list_flags(answer, line["reference"], line["compared"])))
    return Article(line["id"], about, line["prompt_tail"], sides)


def list_flags(answer: dict, reference: str, compared: str) -> list[Flag]:
    """Return what is right and wrong about an answer. compared: what `exact` means of it, where the texts differ."""
    flags = []
    if answer["exact"] and answer["answer"] == reference:
        flags.append(Flag("yes", "exact"))
    elif answer["exact"]:
        flags.append(Flag("yes", f"same {compared}"))
    if answer["failed"]:
        return [*flags, Flag("no", f"failed: {answer['failed']}")]
    wrong = [word for flag, word in WRONG.items() if answer[flag]]
    if not answer["stopped"]:
        wrong.append("did not stop")
    elif answer["cut"]:
        wrong.append("breaks off")
    return flags + [Flag("no", word) for word in wrong]


# -- curves -----------------------------------------------------------------------------------------------------------
@dataclass
class Dot:
    """A place in the picture, as text."""

    x: str
    y: str


@dataclass
class Tick:
    """A number at an axis and its place there."""

    place: str
    label: str


@dataclass
class DrawnLine:
    """A line of a curve. dots: of its points, where a line through few would hide them."""

    label: str
    path: str
    dots: list[Dot]
    is_dashed: bool
    colour: str


@dataclass
class Curve:
    """A picture of lines over optimizer steps."""

    title: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[DrawnLine]


@dataclass
class Values:
    """The points of one line, {step: value}."""

    label: str
    points: dict[int, float]
    is_dashed: bool
    colour: str


Series = dict[str, dict[str, dict[int, float]]]  # what run_folder.read_log returns, by model


def make_curves(series: Series) -> list[Curve]:
    """Return the losses and the learning rates of every run that has a log."""
    curves = []
    for title, kinds in KINDS_OF_CURVES.items():
        lines = []
        for number, (name, log) in enumerate(series.items()):
            for key, label, is_dashed in kinds:
                points = {step: value for step, value in log.get(key, {}).items() if math.isfinite(value)}
                if points:
                    colour = COLOURS[number % len(COLOURS)]
                    lines.append(Values(f"{name} {label}".strip(), points, is_dashed, colour))
        if lines:
            curves.append(draw_curve(title, lines))
    return curves


@dataclass
class Scale:
    """An axis from low to high, between two places of the picture."""

    low: float
    high: float
    start: float
    end: float

    def place(self, value: float) -> str:
        share = (value - self.low) / (self.high - self.low)
        return f"{self.start + (self.end - self.start) * share:.1f}"


def draw_curve(title: str, lines: Sequence[Values]) -> Curve:
    """Return a picture of lines; its axis of values starts at 0 where that costs little."""
    steps = [step for line in lines for step in line.points]
    values = [value for line in lines for value in line.points.values()]
    low = min(values)
    high = max(values)
    if 0 < low < high / 2:
        low = 0
    if high <= low:
        low -= 1
        high += 1
    x_axis = Scale(min(steps), max(max(steps), min(steps) + 1), LEFT, RIGHT)
    y_axis = Scale(low, high, BOTTOM, TOP)
    x_ticks = []
    for step in ticks(x_axis.low, x_axis.high):
        if step % 1 == 0:
            x_ticks.append(Tick(x_axis.place(step), f"{step:g}"))
    y_ticks = [Tick(y_axis.place(value), f"{value:g}") for value in ticks(low, high)]
    return Curve(title, x_ticks, y_ticks, [draw_line(line, x_axis, y_axis) for line in lines])


def draw_line(line: Values, x_axis: Scale, y_axis: Scale) -> DrawnLine:
    dots = [Dot(x_axis.place(step), y_axis.place(value)) for step, value in line.points.items()]
    path = "M" + " ".join([f"{dot.x},{dot.y}" for dot in dots])
    if len(dots) >= FEW_POINTS:
        dots = []
    return DrawnLine(line.label, path, dots, line.is_dashed, line.colour)


def ticks(low: float, high: float) -> list[float]:
    """Return about four round numbers between two."""
    power = 10 ** math.floor(math.log10(high - low))
    steps = [power * part for part in (0.1, 0.2, 0.25, 0.5, 1, 2)]
    step = next(step for step in steps if (high - low) / step <= 5)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


# -- the page ---------------------------------------------------------------------------------------------------------
@dataclass
class Part:
    """A piece of a text that is a special token, or that stands between two."""

    text: str
    is_chip: bool


@dataclass
class PageContent:
    """What the page shows. lines: of answers.jsonl; names: of the models, the base first; chips: special tokens."""

    title: str
    notes: Sequence[str]
    findings: Sequence[str]
    columns: Sequence[str]
    groups: Sequence[Group]
    lines: Sequence[dict]
    names: Sequence[str]
    series: Series
    chips: Collection[str] = ()


def render_page(content: PageContent) -> str:
    """Return the page as HTML."""
    base = content.names[0]
    differing = 0
    for line in content.lines:
        if any([line[name]["answer"] != line[base]["answer"] for name in content.names[1:]]):
            differing += 1
    by_group = [group for group in content.groups[1:] if not group.is_few]
    environment = Environment(autoescape=True, finalize=reveal, undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["split_chips"] = make_splitter(content.chips)
    return environment.from_string(PAGE.read_text(encoding="utf-8")).render(
        title=content.title,
        notes=content.notes,
        findings=content.findings,
        columns=content.columns,
        overall=content.groups[:1],
        by_group=by_group,
        kinds=", ".join(dict.fromkeys([group.kind for group in by_group])),
        few=[group for group in content.groups if group.is_few],
        few_rows=FEW_ROWS,
        curves=make_curves(content.series),
        articles=[make_article(line, content.names) for line in list_changed(content.lines, content.names)],
        different=f"{differing:,}",
        total=f"{len(content.lines):,}",
    )


def make_splitter(chips: Collection[str]) -> Callable[[str], list[Part]]:
    """Return a function that splits a text at its special tokens."""
    longest_first = sorted(chips, key=len, reverse=True)
    pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def split(text: str) -> list[Part]:
        if not chips:
            return [Part(text, False)]
        return [Part(part, number % 2 == 1) for number, part in enumerate(pattern.split(text)) if part]

    return split
