"""Refuse a bad model: exit 0 if what was measured of a run meets every rule, 1 with the findings if it does not.

    python -m eval.gate runs/qwen3_qlora
    python -m eval.gate runs/qwen3_qlora --rules my_gate.yaml --base runs/qwen3_4b
    python -m eval.gate runs/a_and_b --model b

Reads report.json and answers.jsonl (compare.py) and eval/*.json with *.jsonl (the benchmarks) of the run folder, and
of --base the eval/ folder of the model that training started from. The rules (default: gate.yaml beside this file) are
a list; the metrics of a rule without `benchmark` are compare.py's:

    - metric: stop_rate       its name in the report
      benchmark: mmlu         optional: of eval/mmlu.json
      by: source              optional: holds for each group of this kind; with `group: gsm8k` for that one
      min: 0.95               at least; also max
      max_drop: 0.02          below the base by more is a failure where that is shown; also max_rise
      max_ratio: 1.05         at most so many times the base, where more is shown
      required: false         may be missing from the report; without this, what is missing fails

min and max look at the value itself: what was asked is what is compared. A drop, a rise or a ratio fails only where
chance does not explain it: the 95% interval of the change lies wholly beyond the margin. Both models answered the same
rows, so the change is taken by pairs: of compare.py's metrics it stands in report.json, and colours its tables; of the
benchmarks it is taken from their rows (intervals.paired_difference). McNemar's exact test answers the same question for
a margin of 0 only. Without pairs (a --base measured on other rows) the interval is the unpaired one. Each failure comes
with its three worst rows: those that the base got right first, then the longest. The findings also go to gate.json in
the run folder.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.text import Text

from data_prep.common.errors import UsageError
from data_prep.common.terminal import STYLES, colour, make_console
from eval.common.gate_rules import Rule, read_rules
from eval.common.intervals import Figure, Interval, rate_change, unpaired_difference
from eval.common.metrics import RATES, is_ratio
from eval.common.scores import command, parser_of, write_files

BASE = "base"  # the name of the model before training, in report.json and answers.jsonl
WORST = 3
SHOWN = 160  # characters of an answer
SHOWN_PROMPT = 80
MARKS = {"passed": "ok  ", "failed": "FAIL", "not measured": "–   "}

Metrics = dict[str, dict]  # {metric: {value, low, high, …}}


# -- what was measured -------------------------------------------------------------------------------------------------
@dataclass
class Pair:
    """The metrics of both models over a group of rows, {} where there are none."""

    tuned: Metrics = field(default_factory=dict)
    base: Metrics = field(default_factory=dict)


@dataclass
class Row:
    """A row that was answered: what it is, and the flags and answer of each model; base: None where it has none."""

    line: dict
    tuned: dict
    base: dict | None = None

    def is_of(self, kind: str, group: str) -> bool:
        if kind == "overall" or self.line.get(kind) == group:
            return True
        return group in self.line.get(f"{kind}s", ())


@dataclass
class Measurement:
    """What compare.py or a benchmark measured, by kind and group of rows."""

    groups: dict[str, dict[str, Pair]]
    rows: list[Row]


@dataclass
class Report:
    """The report of a benchmark (scores.py), and its rows."""

    groups: dict[str, dict[str, Metrics]]
    lines: list[dict]


def read_json(path: Path) -> dict | None:
    """Return a JSON file; None where there is none. Raises UsageError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}): measure again") from None


def read_lines(path: Path) -> list[dict]:
    """Return the objects of a .jsonl file; [] where there is none. Raises UsageError."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}): measure again") from None


def choose_model(path: Path, report: dict | None, model: str | None) -> str:
    """Return the model that is judged: the only one of a report, or the one asked for. Raises UsageError."""
    if report is None:
        if model:
            raise UsageError(f"--model {model}: there is no {path}, leave it out or run python -m eval.compare first")
        return "tuned"
    names = [name for name in report["results"]["overall"]["all"] if name != BASE]
    if model in names:
        return model
    if model:
        raise UsageError(f"--model {model}: {path} holds {', '.join(names)}, pass one of them")
    if len(names) > 1:
        raise UsageError(f"{path} holds {len(names)} models: pass --model with one of {', '.join(names)}")
    return names[0]


def read_measurements(run: Path, base: Path | None, report: dict | None, model: str) -> dict[str, Measurement]:
    """Return what was measured of a run folder by benchmark; "" is compare.py, whose report is given."""
    measurements = {}
    if report is not None:
        measurements[""] = read_comparison(run, report, model)
    for path in sorted((run / "eval").glob("*.json")):
        before = None
        if base is not None:
            before = read_benchmark(base / "eval" / path.name)
        measurements[path.stem] = join_reports(read_benchmark(path), before)
    return measurements


def read_comparison(run: Path, report: dict, model: str) -> Measurement:
    """Return compare.py's report and rows of one of its models."""
    groups = {}
    for kind, models_by_group in report["results"].items():
        groups[kind] = {}
        for group, models in models_by_group.items():
            groups[kind][group] = Pair(models[model], models[BASE])
    rows = [Row(line, line[model], line[BASE]) for line in read_lines(run / "answers.jsonl")]
    return Measurement(groups, rows)


def read_benchmark(path: Path) -> Report | None:
    """Return the report of a benchmark, None where there is none. Raises UsageError."""
    report = read_json(path)
    if report is None:
        return None
    groups = {"overall": {"all": report["metrics"]}, **report["groups"]}
    return Report(groups, read_lines(path.with_suffix(".jsonl")))


def join_reports(tuned: Report, base: Report | None) -> Measurement:
    """Return the reports of two models on one benchmark together; rows by their question."""
    base = base or Report({}, [])
    groups = {}
    for kind, metrics_by_group in tuned.groups.items():
        before = base.groups.get(kind, {})
        groups[kind] = {}
        for group, metrics in metrics_by_group.items():
            groups[kind][group] = Pair(metrics, before.get(group, {}))
    lines = {question_of(line): line for line in base.lines}
    rows = [Row(line, line, lines.get(question_of(line))) for line in tuned.lines]
    return Measurement(groups, rows)


def question_of(line: dict) -> tuple:
    """Return what tells a question of a benchmark from its others."""
    return tuple([line.get(key) for key in ("task", "id", "turn", "mode")])


# -- judgement ---------------------------------------------------------------------------------------------------------
@dataclass
class Change:
    """What a metric changed by, a ratio of perplexities, a difference of the rest; None where no interval is known."""

    value: float
    interval: Interval | None = None
    paired: bool = False
    is_ratio: bool = False

    def to_difference(self, base: float) -> Interval:
        """Return the ends of the change as a difference, those of a ratio from the base as it stands.

        Without an interval both are the value.
        """
        low, high = self.interval or (self.value, self.value)
        if not self.is_ratio:
            return Interval(low, high)
        return Interval((low - 1) * base, (high - 1) * base)

    def to_json(self) -> dict:
        values = {"value": self.value}
        if self.interval is not None:
            values |= {"low": self.interval.low, "high": self.interval.high}
        return values | {"paired": self.paired, "is_ratio": self.is_ratio}


@dataclass
class Finding:
    """What a rule says of one group. tuned, base: the figures; worst: the rows that speak against the model."""

    rule: str
    group: str
    status: str = "passed"
    reasons: list[str] = field(default_factory=list)
    tuned: dict | None = None
    base: dict | None = None
    change: Change | None = None
    worst: list[dict] = field(default_factory=list)

    def to_json(self) -> dict:
        values = {"rule": self.rule, "group": self.group, "status": self.status, "reasons": self.reasons}
        if self.tuned is not None:
            values["tuned"] = self.tuned
        if self.base is not None:
            values["base"] = self.base
        if self.change is not None:
            values["change"] = self.change.to_json()
        if self.worst:
            values["worst"] = self.worst
        return values


@dataclass
class Flagged:
    """The name of a flag, and the rows that have it."""

    flag: str
    rows: list[Row]


def find_flag(metric: str, rows: Sequence[Row]) -> Flagged:
    """Return the flag of a metric: its own name or that in metrics.RATES; "" where the rows tell nothing of it.

    Of a metric that is a task of several in one file it is `correct` in the rows of that task.
    """
    flag = RATES.get(metric, metric)
    own = [row for row in rows if row.tuned.get(flag) is not None]
    if own:
        return Flagged(flag, own)
    of_task = [row for row in rows if row.line.get("task") == metric]
    own = [row for row in of_task if row.tuned.get("correct") is not None]
    if own:
        return Flagged("correct", own)
    return Flagged("", [])


def compute_change(metric: str, tuned: dict, base: dict, rows: Sequence[Row]) -> Change:
    """Return what a metric changed by from base to tuned. Raises UsageError where the rows are not the report's."""
    flagged = find_flag(metric, rows)
    after = []
    before = []
    for row in flagged.rows:
        if row.base is not None and row.base.get(flagged.flag) is not None:
            after.append(bool(row.tuned[flagged.flag]))
            before.append(bool(row.base[flagged.flag]))
    is_paired = bool(after) and len(after) == tuned.get("total") == base.get("total")
    if is_paired and (sum(after), sum(before)) != (tuned["count"], base["count"]):
        raise UsageError(f"the {metric} of the report is not that of its rows: measure again, both must be of one run")
    if "change" in tuned:
        changed = tuned["change"]
        return Change(changed["value"], read_interval(changed), True, is_ratio(metric))
    if is_paired:
        changed = rate_change(after, before)
        return Change(changed["value"], read_interval(changed), True)
    difference = tuned["value"] - base["value"]
    if "low" not in tuned or "low" not in base:
        return Change(difference)
    figures = [Figure(figure["value"], figure["low"], figure["high"]) for figure in (tuned, base)]
    return Change(difference, unpaired_difference(*figures))


def read_interval(figure: dict) -> Interval | None:
    if "low" not in figure:
        return None
    return Interval(figure["low"], figure["high"])


def judge_rule(rule: Rule, group: str, pair: Pair, rows: Sequence[Row]) -> Finding:
    """Return the finding of a rule on one group."""
    finding = Finding(str(rule), group)
    tuned = pair.tuned.get(rule.metric)
    base = pair.base.get(rule.metric)
    missing = describe_missing(rule.metric, tuned, "")
    if missing:
        finding.reasons.append(missing)
        finding.status = "failed" if rule.required or tuned else "not measured"
        return finding
    finding.tuned = tuned
    if tuned["value"] < rule.limits.get("min", -math.inf):
        finding.reasons.append(f"below {rule.limits['min']:g}")
    if tuned["value"] > rule.limits.get("max", math.inf):
        finding.reasons.append(f"above {rule.limits['max']:g}")
    if rule.looks_at_base:
        missing = describe_missing(rule.metric, base, " of the base")
        if not missing:
            finding.base = base
            finding.change = compute_change(rule.metric, tuned, base, rows)
            finding.reasons += judge_change(rule, finding.change, tuned, base)
        elif rule.required:
            finding.reasons.append(missing)
    if finding.reasons:
        finding.status = "failed"
        finding.worst = find_worst(rule.metric, rows, rule.limits_harm)
    elif missing:
        finding.reasons.append(missing)
        if not rule.looks_at_value:
            finding.status = "not measured"
    return finding


def describe_missing(metric: str, figure: dict | None, whose: str) -> str:
    """Return why a figure cannot be judged, "" where it can."""
    if not figure or not isinstance(figure.get("value"), (int, float)):
        return f"{metric} was not measured{whose}"
    if not math.isfinite(figure["value"]):
        return f"{metric}{whose} is {figure['value']}"
    return ""


def judge_change(rule: Rule, change: Change, tuned: dict, base: dict) -> Iterator[str]:
    """Yield why a change is too large: its interval lies wholly beyond the limit, or its value where it has none.

    A change by pairs that has no interval is of too few rows to show anything.
    """
    if change.paired and change.interval is None:
        return
    low, high = change.to_difference(base["value"])
    if high < -rule.limits.get("max_drop", math.inf):
        yield f"below the base by more than {rule.limits['max_drop']:g}"
    if low > rule.limits.get("max_rise", math.inf):
        yield f"above the base by more than {rule.limits['max_rise']:g}"
    if "max_ratio" not in rule.limits:
        return
    limit = rule.limits["max_ratio"]
    if change.is_ratio:
        is_above = change.interval.low > limit
    else:  # no ratio's interval is known: those of the figures must not meet
        highest = base.get("high", base["value"])
        is_above = tuned.get("low", tuned["value"]) > highest * limit
    if is_above:
        yield f"above {limit:g} times the base"


def find_worst(metric: str, rows: Sequence[Row], harmful: bool) -> list[dict]:
    """Return the WORST rows of a metric: bad ones that the base got right first, then the longest.

    harmful: the flag is true of a bad row. Without a flag (perplexity) by exact match, else by length.
    """
    flagged = find_flag(metric, rows)
    if not flagged.rows:
        flagged = find_flag("exact_match", rows)
        harmful = False
    bad = [row for row in flagged.rows if bool(row.tuned[flagged.flag]) is harmful]
    if not bad:
        bad = list(rows)

    def badness(row: Row) -> tuple[bool, int]:
        flag = None
        if row.base is not None:
            flag = row.base.get(flagged.flag)
        was_good = flag is not None and bool(flag) is not harmful
        return was_good, len(str(row.tuned.get("answer")))

    worst = []
    for row in sorted(bad, key=badness, reverse=True)[:WORST]:
        shown = {"id": row.line["id"], "prompt_tail": row.line.get("prompt_tail", "")}
        shown["answer"] = row.tuned.get("answer", "")
        if row.base is not None:
            shown["base"] = row.base.get("answer", "")
        worst.append(shown)
    return worst


def judge_rules(rules: Sequence[Rule], measurements: dict[str, Measurement]) -> Iterator[Finding]:
    """Yield a finding for every rule and group."""
    for rule in rules:
        measurement = measurements.get(rule.benchmark, Measurement({}, []))
        kind = rule.by or "overall"
        groups = measurement.groups.get(kind, {})
        if rule.group:
            groups = {group: pair for group, pair in groups.items() if group == rule.group}
        if not groups:
            yield make_missing(rule, measurements)
        for group, pair in groups.items():
            yield judge_rule(rule, group, pair, [row for row in measurement.rows if row.is_of(kind, group)])


def make_missing(rule: Rule, measurements: dict[str, Measurement]) -> Finding:
    """Return the finding of a rule whose report, kind or group is not there."""
    finding = Finding(str(rule), rule.group or "all")
    finding.status = "failed" if rule.required else "not measured"
    groups = {}
    if rule.benchmark in measurements:
        groups = measurements[rule.benchmark].groups.get(rule.by, {})
    if rule.benchmark not in measurements:
        name = f"eval/{rule.benchmark}.json" if rule.benchmark else "report.json"
        reason = f"there is no {name}: {rule.metric} was not measured"
    elif not groups:
        reason = f"no row has a {rule.by}: {rule.metric} was not measured by it"
    else:
        reason = f"no row has this {rule.by}: there are {', '.join(groups)}"
    finding.reasons.append(reason)
    return finding


# -- the terminal ------------------------------------------------------------------------------------------------------
def show_figure(figure: dict) -> str:
    """Return 0.412 (0.352–0.473), 105 of 255."""
    text = f"{figure['value']:.4g}"
    if "low" in figure:
        text += f" ({figure['low']:.4g}–{figure['high']:.4g})"
    if "count" in figure:
        text += f", {figure['count']:,} of {figure['total']:,}"
    elif "rows" in figure:
        text += f", {figure['rows']:,} rows"
    if figure.get("not_measured"):
        text += f", {figure['not_measured']:,} not measured"
    return text


def show_change(change: Change) -> str:
    """Return × 1.04 (1.01 to 1.07, by pairs), or +0.02 (…)."""
    sign = ""
    form = "+.4g"
    if change.is_ratio:
        sign = "× "
        form = ".4g"
    text = f"{sign}{change.value:{form}}"
    if change.interval is None:
        return text
    low, high = change.interval
    kind = "by pairs" if change.paired else "unpaired"
    return f"{text} ({low:{form}} to {high:{form}}, {kind})"


def shorten(text: str, size: int = SHOWN) -> str:
    """Return a text on one line: its beginning and end where it is long."""
    line = json.dumps(text, ensure_ascii=False)
    if len(line) <= size:
        return line
    return f"{line[: size // 2]} … {line[-size // 2 :]}"


def list_lines(finding: Finding) -> Iterator[str]:
    """Yield what is printed of a finding behind its mark: a line, below a failure the base and the worst rows."""
    text = f"{finding.rule} [{finding.group}]"
    if finding.tuned is not None:
        text += f" is {show_figure(finding.tuned)}"
    if finding.reasons:
        text += f": {', '.join(finding.reasons)}"
    yield text
    if finding.status == "failed" and finding.base is not None:
        yield f"       base {show_figure(finding.base)}; change {show_change(finding.change)}"
    for row in finding.worst:
        prompt = ""
        if row["prompt_tail"]:
            prompt = f"{shorten(row['prompt_tail'][-SHOWN_PROMPT:])} → "
        yield f"       {row['id']}: {prompt}{shorten(row['answer'])}"


def print_findings(findings: Sequence[Finding]) -> None:
    """Print the findings, coloured as compare.py's tables are."""
    console = make_console()
    for finding in findings:
        first, *others = list_lines(finding)
        console.print(Text.assemble((MARKS[finding.status], STYLES[finding.status]), f" {first}"), soft_wrap=True)
        for line in others:
            console.print(Text(line), soft_wrap=True)


# -- the command -------------------------------------------------------------------------------------------------------
def gate(args: argparse.Namespace) -> int:
    for folder in (args.run, args.base):
        if folder is not None and not folder.is_dir():
            raise UsageError(f"{folder} does not exist: pass a run folder")
    rules = read_rules(args.rules)
    report = read_json(args.run / "report.json")
    model = choose_model(args.run / "report.json", report, args.model)
    measurements = read_measurements(args.run, args.base, report, model)
    if not measurements:
        raise UsageError(f"{args.run} has neither report.json nor eval/*.json: run python -m eval.compare on it first")
    findings = list(judge_rules(rules, measurements))
    counts = dict.fromkeys(MARKS, 0)
    for finding in findings:
        counts[finding.status] += 1
    has_passed = counts["failed"] == 0
    verdict = {"passed": has_passed, "model": model, "findings": [finding.to_json() for finding in findings]}
    write_files(args.run, {"gate.json": json.dumps(verdict, indent=1, ensure_ascii=False) + "\n"})
    print_findings(findings)
    tally = f"{counts['passed']} met, {counts['failed']} failed, {counts['not measured']} not measured"
    if has_passed:
        print(f"{model}: {colour('passed', 'passed')}: {tally}")
        return 0
    print(f"{model}: {colour('failed', 'failed')}: {tally}")
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("run", type=Path, help="run folder that compare.py and the benchmarks have measured")
    parser.add_argument("--rules", type=Path, default=Path(__file__).with_name("gate.yaml"), help="YAML list of rules")
    parser.add_argument("--base", type=Path, help="folder whose eval/ has the benchmarks of the model before training")
    parser.add_argument("--model", help="which one, where report.json holds several")
    return command("gate.py", gate, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
