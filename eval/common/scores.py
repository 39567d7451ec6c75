"""What a benchmark leaves behind: NAME.json and NAME.jsonl in the folder eval/ of a run.

NAME.json: {benchmark, settings, versions, data_sha256, metrics, groups}; metrics is {metric: {value, low,
high, count, total}} with 95% intervals, groups {kind: {group: metrics}}, a kind is mode (think, no_think), source, …
NAME.jsonl: a line a prompt with its id, answer, why it failed and the flags that the metrics count. gate.py and card.py
read both of any benchmark. A benchmark whose data is missing raises UsageError, exits 2 and leaves nothing.

Nothing here imports torch or transformers: what only reads reports starts at once.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from rich.table import Table

from data_prep.common.command_line import INTERRUPTED, CommandParser, print_error
from data_prep.common.errors import UsageError
from data_prep.common.next_step import print_end
from data_prep.common.quiet import hide_progress_bars
from data_prep.common.terminal import make_console
from eval.common.intervals import rate

PIPE_WIDTH = 130  # columns of a table in a file or a pipe, which has no width: rich would cut it to 80

Figure = dict[str, float]  # value, low, high, count, total, as far as they apply
Metrics = dict[str, Figure]
Groups = dict[str, dict[str, Metrics]]  # by kind and group


# -- lines to figures -------------------------------------------------------------------------------------------------
def rates(lines: Sequence[dict], names: dict[str, str]) -> Metrics:
    """Return the rate of each metric over lines; one that applies to no line is left out.

    lines: dicts of flags. names: {metric: its flag}.
    """
    metrics = {}
    for metric, flag in names.items():
        figure = rate([line.get(flag) for line in lines])
        if figure is not None:
            metrics[metric] = figure
    return metrics


def grouped(lines: Sequence[dict], names: dict[str, str], *kinds: str) -> Groups:
    """Return rates() by the value that the lines have under each kind; a kind that no line has is left out."""
    groups = {}
    for kind in kinds:
        values = sorted({line[kind] for line in lines if line.get(kind)})
        if values:
            groups[kind] = {}
        for value in values:
            groups[kind][value] = rates([line for line in lines if line.get(kind) == value], names)
    return groups


# -- files ------------------------------------------------------------------------------------------------------------
def write_scores(
    folder: str | Path,
    name: str,
    settings: dict,
    metrics: Metrics,
    groups: Groups | None = None,
    lines: Iterable[dict] = (),
    data_sha256: str = "",
) -> dict:
    """Write NAME.json and NAME.jsonl to a folder, aside first, and return the report. Raises UsageError."""
    report = {
        "benchmark": name,
        "settings": settings,
        "versions": {package: version(package) for package in ("torch", "transformers", "tokenizers")},
        "data_sha256": data_sha256,
        "metrics": metrics,
        "groups": groups or {},
    }
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_files(Path(folder), {f"{name}.jsonl": text, f"{name}.json": json.dumps(report, indent=1, ensure_ascii=False)})
    return report


def write_files(folder: Path, files: dict[str, str | bytes]) -> None:
    """Write {name: content} to a folder: all beside their places first, then renamed. Raises UsageError."""
    aside = {name: folder / f".{name}.part" for name in files}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            aside[name].write_bytes(content if isinstance(content, bytes) else content.encode())
        for name, part in aside.items():
            part.replace(folder / name)
    except OSError as error:
        sentence = f"cannot write to {folder} ({error.strerror}): make room or pass another --out"
        raise UsageError(sentence) from None
    finally:
        for part in aside.values():
            with suppress(OSError):
                part.unlink()


# -- the terminal -----------------------------------------------------------------------------------------------------
def show(report: dict) -> None:
    """Print the table of a report: a line a metric, then those of its groups."""
    table = Table("group", "metric", "value (95%)", "n", title=report["benchmark"])
    add_rows(table, "all", report["metrics"])
    for kind, groups in report["groups"].items():
        for group, metrics in groups.items():
            add_rows(table, f"{kind}: {group}", metrics)
    make_console(PIPE_WIDTH).print(table)


def add_rows(table: Table, group: str, metrics: Metrics) -> None:
    """Add a line a metric of a group; the first one names it, the last one closes it."""
    for number, (metric, figure) in enumerate(metrics.items()):
        value = f"{figure['value']:.3f}"
        if "low" in figure:
            value += f" ({figure['low']:.3f}–{figure['high']:.3f})"
        total = f"{figure['total']:,}" if "total" in figure else ""
        is_last = number == len(metrics) - 1
        table.add_row("" if number else group, metric, value, total, end_section=is_last)


def parser_of(doc: str) -> CommandParser:
    """Return an argument parser as every command has it: its docstring as help, no abbreviations."""
    return CommandParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)


def command(name: str, run: Callable[[argparse.Namespace], int | None], args: argparse.Namespace) -> int:
    """Return the exit code of a command: run(args)'s, 2 with UsageError's sentence on stderr, 130 after Ctrl-C."""
    hide_progress_bars()
    try:
        code = run(args) or 0
        print_end(name, args, code)
        return code
    except UsageError as error:
        return print_error(f"{name}: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
