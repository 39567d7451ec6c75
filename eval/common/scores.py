"""What a benchmark of this room leaves behind: NAME.json and NAME.jsonl in the folder eval/ of a run.

NAME.json: {benchmark, settings, versions, data_sha256, metrics, groups}; metrics is {metric: {value, low,
high, count, total}} with 95% intervals, groups {kind: {group: metrics}}, a kind is mode (think, no_think), source, …
NAME.jsonl: a line a prompt with its id, answer, why it failed and the flags that the metrics count. gate.py and card.py
read both of any benchmark. A benchmark whose data is missing raises UsageError, exits 2 and leaves nothing.
"""

import argparse
import json
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data_prep.common.errors import UsageError
from eval.common.metrics import rate


def rates(lines, names):
    """{metric: rate} over lines (dicts of flags); names: {metric: its flag}. One without data is left out."""
    found = {metric: rate([line.get(flag) for line in lines]) for metric, flag in names.items()}
    return {metric: value for metric, value in found.items() if value}


def grouped(lines, names, *kinds):
    """{kind: {group: {metric: rate}}}: rates() by the value that the lines have under each kind."""
    values = {kind: sorted({line[kind] for line in lines if line.get(kind)}) for kind in kinds}
    return {
        kind: {value: rates([line for line in lines if line.get(kind) == value], names) for value in values[kind]}
        for kind in kinds
        if values[kind]
    }


def write_scores(folder, name, settings, metrics, groups=None, lines=(), data_sha256=""):
    """Write NAME.json and NAME.jsonl to a folder, aside first; the report. Raises UsageError."""
    report = {"benchmark": name, "settings": settings}
    report |= {"versions": {one: version(one) for one in ("torch", "transformers", "tokenizers")}}
    report |= {"data_sha256": data_sha256, "metrics": metrics, "groups": groups or {}}
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_files(Path(folder), {f"{name}.jsonl": text, f"{name}.json": json.dumps(report, indent=1, ensure_ascii=False)})
    return report


def write_files(folder, files):
    """Write {name: text or bytes} to a folder: all beside their places first, then renamed. Raises UsageError."""
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


def show(report):
    """Print the table of a report: a line a metric, then those of its groups."""
    table = Table("group", "metric", "value (95%)", "n", title=report["benchmark"])
    named = [(f"{kind}: {group}", m) for kind, groups in report["groups"].items() for group, m in groups.items()]
    for group, metrics in [("all", report["metrics"]), *named]:
        for number, (metric, found) in enumerate(metrics.items()):
            span = f" ({found['low']:.3f}–{found['high']:.3f})" if "low" in found else ""
            total = f"{found['total']:,}" if "total" in found else ""
            end = number == len(metrics) - 1
            table.add_row("" if number else group, metric, f"{found['value']:.3f}{span}", total, end_section=end)
    # a pipe has no width, and rich would cut the table to 80 columns; a group's name is text, not markup
    Console(width=None if sys.stdout.isatty() else 130, markup=False, emoji=False, highlight=False).print(table)


def parser_of(doc, **more):
    """An argument parser as every command of this room has it: its docstring as help, no abbreviations."""
    form = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=doc, formatter_class=form, allow_abbrev=False, **more)


def command(name, run, args):
    """The exit code of a command: that of run(args), or 2 with UsageError's sentence on stderr."""
    import transformers

    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    try:
        return run(args) or 0
    except UsageError as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
