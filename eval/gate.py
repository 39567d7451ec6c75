"""Refuse a bad model: exit 0 if what was measured of a run meets every rule, 1 with the findings if it does not.

    python -m eval.gate runs/qwen3_qlora
    python -m eval.gate runs/qwen3_qlora --rules my_gate.yaml --base runs/qwen3_4b

Reads report.json and answers.jsonl (compare.py) and eval/*.json with *.jsonl (the benchmarks) of the run folder, and
of --base the eval/ folder of the model that training started from. The rules (default: gate.yaml beside this file) are
a list; the metrics of a rule without `benchmark` are compare.py's:

    - metric: stop_rate       its name in the report
      benchmark: mmlu         optional: of eval/mmlu.json
      by: source              optional: holds for each group of this kind; with `group: gsm8k` for that one
      min: 0.95               at least; also max
      max_drop: 0.02          below the base by more is a failure where that is shown; also max_rise
      max_ratio: 1.05         at most so many times the base
      required: false         may be missing from the report; without this, what is missing fails

min, max and max_ratio look at the value itself: what was asked is what is compared. A drop or rise fails only where
chance does not explain it: the 95% interval of the change lies wholly beyond the margin. Both models answered the same
rows, so the change is taken by pairs (difference()): the rows that both get right or wrong, most of them, say nothing
about it, and an unpaired interval would be far wider. McNemar's exact test answers the same question for a margin of 0
only; a bootstrap has no width where the two never differ. Without pairs (a --base measured on other rows) the interval
is the unpaired one. Each failure comes with its three worst rows: those that the base got right first, then the
longest. The findings also go to gate.json in the run folder.
"""

import json
import math
import sys
from pathlib import Path

import yaml

from data_prep.common.errors import UsageError
from eval.common.metrics import RATES, wilson
from eval.common.scores import command, parser_of, write_files

TUNED, BASE = "tuned", "base"  # names of the two models in report.json and answers.jsonl
LIMITS = ("min", "max", "max_drop", "max_rise", "max_ratio")
KEYS = {"metric": str, "benchmark": str, "by": str, "group": str, "required": bool, **dict.fromkeys(LIMITS, float)}
WORST = 3


# -- rules -------------------------------------------------------------------------------------------------------------
def read_rules(path):
    """The rules of a YAML file as dicts. Raises UsageError with the line of what is wrong."""
    try:
        tree = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    except OSError as error:
        raise UsageError(f"the rules {path} cannot be read ({error.strerror}): pass --rules with a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}," if where else ""
        raise UsageError(f"{path}{line} is not YAML ({getattr(error, 'problem', error)}): repair it") from None
    if not isinstance(tree, yaml.SequenceNode) or not tree.value:
        raise UsageError(f"{path} holds no list of rules: begin each with `- metric: NAME`")
    return [read_rule(path, node) for node in tree.value]


def read_rule(path, node):
    def wrong(place, sentence):
        raise UsageError(f"{path}, line {place.start_mark.line + 1}: {sentence}")

    if not isinstance(node, yaml.MappingNode):
        wrong(node, "a rule is `- metric: NAME` with a limit below it")
    rule = {}
    for key, value in node.value:
        name, given = key.value, yaml.SafeLoader("").construct_object(value)
        if name not in KEYS:
            wrong(key, f"unknown key {name!r}: a rule has {', '.join(KEYS)}")
        if name in rule:
            wrong(key, f"{name} stands twice in this rule: remove one")
        number = isinstance(given, (int, float)) and not isinstance(given, bool) and math.isfinite(given)
        if not (number if KEYS[name] is float else isinstance(given, KEYS[name])):
            kind = {str: "a name", bool: "true or false", float: "a number"}[KEYS[name]]
            wrong(value, f"{name} is {given!r}: give {kind}")
        rule[name] = given
    if "metric" not in rule:
        wrong(node, "a rule without a metric: add `metric: NAME`")
    if not any(limit in rule for limit in LIMITS):
        wrong(node, f"{rule['metric']} has no limit: give one of {', '.join(LIMITS)}")
    if "group" in rule and "by" not in rule:
        wrong(node, f"the group {rule['group']!r} needs its kind: add `by: source`, or mode, …")
    return rule


def named(rule):
    """A rule as one would say it: mmlu accuracy, by source: min 0.5, max_drop 0.02."""
    scope = f", {rule['by']} {rule.get('group', '(each)')}" if "by" in rule else ""
    limits = ", ".join(f"{limit} {rule[limit]:g}" for limit in LIMITS if limit in rule)
    return f"{rule['benchmark'] + ' ' if 'benchmark' in rule else ''}{rule['metric']}{scope}: {limits}"


# -- what was measured -------------------------------------------------------------------------------------------------
def read(path, lines=False):
    """A JSON file, or the objects of a .jsonl; None where there is none. Raises UsageError."""
    try:
        text = path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.split("\n") if line] if lines else json.loads(text)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}): measure again") from None


def measured(run, base):
    """{benchmark, "" is compare.py: ({kind: {group: {model: metrics}}}, rows)} of a run folder.

    A row is {kinds…, prompt_tail, model: {flags, answer…}}, as in answers.jsonl."""
    found, report = {}, read(run / "report.json")
    if report:
        found[""] = (report["results"], read(run / "answers.jsonl", lines=True) or [])
    for path in sorted((run / "eval").glob("*.json")):
        ours, before = benchmark(path), benchmark(base / "eval" / path.name) if base else None
        groups = {kind: {group: {TUNED: m} for group, m in of.items()} for kind, of in ours[0].items()}
        rows = [row | {TUNED: row} for row in ours[1]]
        if before:
            for kind, of in before[0].items():
                for group, metrics in of.items():
                    groups.get(kind, {}).get(group, {})[BASE] = metrics
            same = {asked(row): row for row in before[1]}
            rows = [row | ({BASE: same[asked(row)]} if asked(row) in same else {}) for row in rows]
        found[path.stem] = (groups, rows)
    return found


def asked(row):
    """What tells a question of a benchmark from its others."""
    return tuple(row.get(key) for key in ("task", "id", "turn", "mode"))


def benchmark(path):
    """({kind: {group: metrics}}, rows) of a benchmark's report (scores.py), None where there is none."""
    report = read(path)
    if report is None:
        return None
    rows = read(path.with_suffix(".jsonl"), lines=True) or []
    return {"overall": {"all": report["metrics"]}} | report["groups"], rows


# -- judgement ---------------------------------------------------------------------------------------------------------
def difference(both, first, second, neither):
    """95% interval (low, high) of p1 - p2, two rates of the same rows: both count, only the first, the second, neither.

    Source: method 10 of R. G. Newcombe, Improved confidence intervals for the difference between binomial proportions
    based on paired data, Statistics in Medicine 17 (1998) 2635-2650: the Wilson intervals of the two rates, joined by
    the correlation phi of the pairs with its continuity correction.
    """
    n = both + first + second + neither
    product, phi = both * neither - first * second, 0.0
    margins = (both + first) * (second + neither) * (both + second) * (first + neither)
    if margins:
        phi = (max(product - n / 2, 0) if product > 0 else product) / math.sqrt(margins)
    return joined(*((count / n, *wilson(count, n)) for count in (both + first, both + second)), phi)


def joined(one, other, phi=0.0):
    """95% interval of the difference of two figures (value, low, high) that correlate by phi. With phi 0 that of rates
    over rows that are not paired: method 10 of Newcombe's other paper, Statistics in Medicine 17 (1998) 873-890."""
    (p1, l1, u1), (p2, l2, u2) = one, other
    down, up = (p1 - l1, u2 - p2), (u1 - p1, p2 - l2)
    reach = [math.sqrt(max(a * a - 2 * phi * a * b + b * b, 0)) for a, b in (down, up)]
    return p1 - p2 - reach[0], p1 - p2 + reach[1]


def flagged(metric, rows):
    """(flag, rows that have it) of a metric: its own name or that in metrics.RATES; of a metric that is a task of
    several in one file, `correct` in the rows of that task; ("", []) where the rows tell nothing of it."""
    flag = RATES.get(metric, metric)
    own = [row for row in rows if row[TUNED].get(flag) is not None]
    if own:
        return flag, own
    own = [row for row in rows if row.get("task") == metric and row[TUNED].get("correct") is not None]
    return ("correct", own) if own else ("", [])


def change(metric, tuned, base, rows):
    """{value, low, high, paired} of tuned minus base; without an interval where theirs are not known."""
    found = {"value": tuned["value"] - base["value"]}
    flag, own = flagged(metric, rows)
    pairs = [(bool(row[TUNED][flag]), bool(row[BASE][flag])) for row in own if row.get(BASE, {}).get(flag) is not None]
    if pairs and len(pairs) == tuned.get("total") == base.get("total"):
        cells = [pairs.count(cell) for cell in ((True, True), (True, False), (False, True), (False, False))]
        if (cells[0] + cells[1], cells[0] + cells[2]) != (tuned["count"], base["count"]):
            raise UsageError(
                f"the {metric} of the report is not that of its rows: measure again, both must be of one run"
            )
        low, high = difference(*cells)
        return found | {"low": low, "high": high, "paired": True}
    if "low" not in tuned or "low" not in base:
        return found
    low, high = joined(*((one["value"], one["low"], one["high"]) for one in (tuned, base)))
    return found | {"low": low, "high": high, "paired": False}


def judge(rule, group, models, rows):
    """The finding of a rule on one group: {rule, group, status, reasons, tuned, base, change, worst}."""
    metric, finding = rule["metric"], {"rule": named(rule), "group": group, "status": "passed", "reasons": []}
    tuned, base = models.get(TUNED, {}).get(metric), models.get(BASE, {}).get(metric)
    compares = [limit for limit in ("max_drop", "max_rise", "max_ratio") if limit in rule]
    if not usable(tuned) or compares and not usable(base):
        required = rule.get("required", True)
        missing = f"{metric} was not measured" + (" of the base" if usable(tuned) else "")
        return finding | {"status": "failed" if required else "not measured", "reasons": [missing]}
    finding["tuned"], value, reasons = tuned, tuned["value"], finding["reasons"]
    if value < rule.get("min", -math.inf):
        reasons.append(f"below {rule['min']:g}")
    if value > rule.get("max", math.inf):
        reasons.append(f"above {rule['max']:g}")
    if compares:
        finding |= {"base": base, "change": (found := change(metric, tuned, base, rows))}
        if found.get("high", found["value"]) < -rule.get("max_drop", math.inf):
            reasons.append(f"below the base by more than {rule['max_drop']:g}")
        if found.get("low", found["value"]) > rule.get("max_rise", math.inf):
            reasons.append(f"above the base by more than {rule['max_rise']:g}")
        if value > base["value"] * rule.get("max_ratio", math.inf):
            reasons.append(f"above {rule['max_ratio']:g} times the base")
    if reasons:
        harmful = bool({"max", "max_rise", "max_ratio"} & rule.keys())
        finding |= {"status": "failed", "worst": worst(metric, rows, harmful)}
    return finding


def usable(metrics):
    return bool(metrics) and isinstance(metrics["value"], (int, float)) and math.isfinite(metrics["value"])


def worst(metric, rows, harmful):
    """[{id, prompt_tail, answer, base}] of the WORST rows of a metric: bad ones that the base got right first, then the
    longest. harmful: the flag is true of a bad row. Without a flag (perplexity) by exact match, else by length."""
    flag, own = flagged(metric, rows)
    if not own:
        (flag, own), harmful = flagged("exact_match", rows), False
    bad = [row for row in own if bool(row[TUNED][flag]) is harmful] or rows

    def badness(row):
        lost = row.get(BASE, {}).get(flag) is not None and bool(row[BASE][flag]) is not harmful
        return lost, len(str(row[TUNED].get("answer")))

    return [
        {"id": row["id"], "prompt_tail": row.get("prompt_tail", ""), "answer": row[TUNED].get("answer", "")}
        | ({"base": row[BASE].get("answer", "")} if BASE in row else {})
        for row in sorted(bad, key=badness, reverse=True)[:WORST]
    ]


def judged(rules, found):
    """A finding for every rule and group."""
    for rule in rules:
        name = rule.get("benchmark", "")
        groups, rows = found.get(name, ({}, []))
        kind = rule.get("by", "overall")
        chosen = groups.get(kind, {})
        if "group" in rule:
            chosen = {group: models for group, models in chosen.items() if group == rule["group"]}
        if not chosen:
            chosen = {rule.get("group", "no such group" if "by" in rule else "all"): {}}
        for group, models in chosen.items():
            mine = [
                row for row in rows if kind == "overall" or row.get(kind) == group or group in row.get(f"{kind}s", ())
            ]
            yield judge(rule, group, models, mine)


# -- told --------------------------------------------------------------------------------------------------------------
def figures(metrics):
    """0.412 (0.352–0.473), 105 of 255"""
    text = f"{metrics['value']:.4g}"
    text += f" ({metrics['low']:.4g}–{metrics['high']:.4g})" if "low" in metrics else ""
    return text + (f", {metrics['count']:,} of {metrics['total']:,}" if "count" in metrics else "")


def short(text, size=160):
    """The text on one line: its beginning and end where it is long."""
    text = json.dumps(text, ensure_ascii=False)
    return text if len(text) <= size else f"{text[: size // 2]} … {text[-size // 2 :]}"


def lines(finding):
    """What is printed of a finding: a line, below a failure the base and the worst rows."""
    mark = {"passed": "ok  ", "failed": "FAIL", "not measured": "–   "}[finding["status"]]
    text = f"{mark} {finding['rule']} [{finding['group']}]"
    text += f" is {figures(finding['tuned'])}" if "tuned" in finding else ""
    yield text + (f": {', '.join(finding['reasons'])}" if finding["reasons"] else "")
    if finding["status"] == "failed" and "base" in finding:
        moved = finding["change"]
        kind = "by pairs" if moved.get("paired") else "unpaired"
        span = f" ({moved['low']:+.4g} to {moved['high']:+.4g}, {kind})" if "low" in moved else ""
        yield f"       base {figures(finding['base'])}; change {moved['value']:+.4g}{span}"
    for row in finding.get("worst", []):
        asked_for = f"{short(row['prompt_tail'][-80:])} → " if row["prompt_tail"] else ""
        yield f"       {row['id']}: {asked_for}{short(row['answer'])}"


def gate(args):
    for folder in filter(None, (args.run, args.base)):
        if not folder.is_dir():
            raise UsageError(f"{folder} does not exist: pass a run folder")
    rules = read_rules(args.rules)
    found = measured(args.run, args.base)
    if not found:
        raise UsageError(f"{args.run} has neither report.json nor eval/*.json: run python -m eval.compare on it first")
    findings = list(judged(rules, found))
    failed = [finding for finding in findings if finding["status"] == "failed"]
    text = json.dumps({"passed": not failed, "findings": findings}, indent=1, ensure_ascii=False) + "\n"
    write_files(args.run, {"gate.json": text})
    print(*(line for finding in findings for line in lines(finding)), sep="\n")
    open_ones = sum(finding["status"] == "not measured" for finding in findings)
    print(f"{len(findings) - len(failed) - open_ones} met, {len(failed)} failed, {open_ones} not measured")
    return 1 if failed else 0


def main(argv=None):
    parser = parser_of(__doc__)
    parser.add_argument("run", type=Path, help="run folder that compare.py and the benchmarks have measured")
    parser.add_argument("--rules", type=Path, default=Path(__file__).with_name("gate.yaml"), help="YAML list of rules")
    parser.add_argument("--base", type=Path, help="folder whose eval/ has the benchmarks of the model before training")
    return command("gate.py", gate, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
