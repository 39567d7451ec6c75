"""The tables of eval.first_contact: the README's rows first, from what first_contact.json holds."""

import math

from eval.common.contact_plan import KILLED, PACKED, QLORA, Predicted, Result
from eval.fit import describe_range


def compare_peak(figures: dict, predicted: Predicted | None) -> str:
    """Return "3.41 (3.36 predicted, +1.5%)"."""
    peak = figures["peak_gib"]
    if predicted is None:
        return f"{peak:.2f}"
    return f"{peak:.2f} ({predicted.peak_gib:.2f} predicted, {peak / predicted.peak_gib - 1:+.1%})"


def compare_speed(figures: dict, predicted: Predicted | None) -> str:
    """Return "1,930 (1,100 to 2,100 predicted, within)"; predictions with two digits, as eval.fit shows them."""
    speed = figures["tokens_per_second"]
    text = f"{speed:,.0f}"
    if predicted is None or predicted.tokens_per_second is None:
        return text
    slow, fast = predicted.tokens_per_second
    verdict = "within"
    if speed < slow:
        verdict = f"{1 - speed / slow:.0%} below"
    elif speed > fast:
        verdict = f"{speed / fast - 1:.0%} above"
    return f"{text} ({describe_range(slow, fast)} predicted, {verdict})"


def describe_card(report: dict) -> str:
    """Return "RTX 4080 (15.6 GiB)"."""
    card = report["card"]
    if card["name"] is None:
        return "CPU"
    name = card["name"].removeprefix("NVIDIA ").removeprefix("GeForce ")
    return f"{name} ({card['gib']:.1f} GiB)"


def escape(text: str) -> str:
    return text.replace("|", "/")


def format_table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for row in rows:
        lines.append(f"| {' | '.join(escape(cell) for cell in row)} |")
    return lines


def readme_rows(report: dict) -> list[str]:
    """Return the table of the README: a line a run that is done, of a first_contact.json."""
    header = ["GPU", "run", "peak GiB", "reserved GiB", "tokens/s", "MFU"]
    rows = []
    for result in read_results(report):
        if result.kind != "run" or result.state != "done":
            continue
        figures = result.figures
        reserved = figures["reserved_gib"]
        share = figures["mfu"]
        row = [describe_card(report), result.name, compare_peak(figures, result.predicted)]
        row.append("–" if reserved is None else f"{reserved:.1f}")
        row.append(compare_speed(figures, result.predicted))
        row.append("–" if share is None else f"{share:.1%}")
        rows.append(row)
    return format_table(header, rows)


def read_results(report: dict) -> list[Result]:
    """Return the results of a first_contact.json."""
    results = []
    for entry in report["parts"]:
        predicted = entry["predicted"]
        if predicted is not None:
            predicted = Predicted(**predicted)
        results.append(Result(**{**entry, "predicted": predicted}))
    return results


def loss_rows(results: list[Result]) -> list[str]:
    """Return a line for each variation of the first recipe with its losses, speed and memory against it."""
    runs = [result for result in results if result.kind == "run" and result.state == "done"]
    if not runs or runs[0].name != QLORA.name:
        return []
    base = runs[0]
    rows = []
    for result in runs:
        if result.recipe != base.recipe or is_other_size(result):
            continue
        figures = result.figures
        gap = largest_difference(base.figures["losses"], figures["losses"])
        speed = figures["tokens_per_second"] / base.figures["tokens_per_second"]
        memory = figures["peak_gib"] - base.figures["peak_gib"]
        last = figures["losses"][-1]
        rows.append(
            [
                result.name,
                "–" if last is None else f"{last:.4f}",
                format_difference(gap),
                f"x {speed:.2f}",
                f"{memory:+.2f} GiB",
            ]
        )
    header = ["run", "last loss", "largest difference of a loss", "tokens/s", "peak"]
    return format_table(header, rows)


def is_other_size(result: Result) -> bool:
    """Return whether a run's losses are those of another model or other packs than its recipe's."""
    return "--max_length 8192" in result.name or "8B" in result.name


def largest_difference(left: list[float], right: list[float]) -> float | None:
    """Return the largest difference of losses of the same steps; None where a loss is no number or has no partner."""
    if len(left) != len(right):
        return None
    largest = 0.0
    for one, other in zip(left, right, strict=True):
        if one is None or other is None or not math.isfinite(one - other):
            return None
        largest = max(largest, abs(one - other))
    return largest


def format_difference(gap: float | None) -> str:
    return "–" if gap is None else f"{gap:.2g}"


def packing_rows(results: list[Result]) -> list[str]:
    rows = []
    for result in results:
        if result.kind != "packed":
            continue
        attention = result.name.removeprefix(f"{PACKED}: ")
        figures = result.figures
        if result.state != "done":
            rows.append([attention, "–", "–", "–", f"{result.state}: {result.why}"])
            continue
        states = f"{figures['gap']:.2g} ({figures['joined_gap']:.2g})"
        gradients = f"{figures['gradient_gap']:.2g} ({figures['gradient_joined_gap']:.2g})"
        verdict = "the same" if figures["is_same"] else "NOT the same"
        rows.append([attention, figures["dtype"], states, gradients, verdict])
    return format_table(["attention", "dtype", "hidden states (no separation)", "gradient", "packed and alone"], rows)


def resume_rows(results: list[Result]) -> list[str]:
    rows = []
    for result in results:
        if result.kind != "resume":
            continue
        verdict = f"{result.state}: {result.why}"
        gap = "–"
        if result.state == "done":
            verdict = "the same bits" if result.figures["is_same"] else "other bits"
            gap = format_difference(result.figures["loss_difference"])
        rows.append([result.name.removeprefix(f"{KILLED}: "), verdict, gap])
    return format_table(["run", "weights, resumed and not interrupted", "largest difference of a loss"], rows)


def describe_result(result: Result) -> str:
    """Return one line on a part."""
    text = f"{result.name}: {result.state}"
    if result.why:
        return f"{text}: {result.why}"
    figures = result.figures
    if result.kind == "run":
        text = f"{result.name}: {compare_peak(figures, result.predicted)} GiB, "
        text += f"{compare_speed(figures, result.predicted)} tokens/s"
    elif result.kind == "resume":
        text += ", the same bits" if figures["is_same"] else ", other bits"
    elif result.kind == "packed":
        text += ", packed as alone" if figures["is_same"] else ", packed is NOT as alone"
    return f"{text}, {result.seconds:.0f} s"


def make_markdown(report: dict) -> str:
    """Return the tables of a first_contact.json, the README's rows first."""
    results = read_results(report)
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version != "none")
    driver = report["card"]["driver"]
    title = [describe_card(report)]
    if driver:
        title.append(f"driver {driver}")
    title.append(report["date"])
    lines = [f"# First contact: {', '.join(title)}", "", versions, ""]
    lines += [f"Attention of the recipes: {report['attention']}. Random weights, rows of random digits.", ""]
    lines += [*readme_rows(report), ""]
    for heading, table in (
        ("The same run otherwise", loss_rows(results)),
        ("Packed rows against each alone", packing_rows(results)),
        ("Killed and resumed", resume_rows(results)),
    ):
        if len(table) > 2:
            lines += [f"## {heading}", "", *table, ""]
    others = [[result.name, result.state, result.why] for result in results if result.state != "done"]
    if others:
        lines += ["## Not done", "", *format_table(["part", "state", "why"], others), ""]
    return "\n".join(lines)
