"""Read what a run folder logged, and draw its loss curves.

recipes/hooks draws loss.png when a run ends, and eval/compare.py draws it again beside its report.
"""

import json
import re
from contextlib import suppress
from io import BytesIO
from pathlib import Path

SERIES = ("loss", "eval_loss", "learning_rate")
FEW_POINTS = 30  # a line through fewer points hides where they are, so they get markers


def checkpoint_step(folder: Path) -> int:
    """Return the step in a checkpoint folder's name, 0 without one."""
    digits = re.sub(r"\D", "", folder.name)
    return int(digits or 0)


def read_entries(run: Path) -> list[dict]:
    """Return what a run logged, from log.jsonl, else from its newest checkpoint; [] with neither."""
    log = run / "log.jsonl"
    if log.is_file():
        entries = []
        for line in log.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):  # the line that a killed run was writing
                entries.append(json.loads(line))
        return entries

    states = list(run.glob("checkpoint-*/trainer_state.json"))
    if not states:
        return []
    newest = max(states, key=lambda path: checkpoint_step(path.parent))
    return json.loads(newest.read_text(encoding="utf-8"))["log_history"]


def read_log(run: Path) -> dict[str, dict[int, float]]:
    """Return {"loss", "eval_loss" or "learning_rate": {step: value}}, steps in order, without the ones never logged.

    A step that was logged again after a resume counts as it was logged last.
    """
    entries = read_entries(run)
    series = {}
    for name in SERIES:
        values = {}
        for entry in entries:
            if "step" in entry and entry.get(name) is not None:
                values[entry["step"]] = entry[name]
        if values:
            series[name] = dict(sorted(values.items()))
    return series


def plot_log(series: dict[str, dict[int, float]], file: Path | BytesIO) -> None:
    """Draw read_log's losses above its learning rate, as PNG."""
    from matplotlib.figure import Figure  # a second of imports that only a picture needs
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    top, bottom = figure.subplots(2, sharex=True, height_ratios=[3, 1])
    for axis, name, label, color in (
        (top, "loss", "training loss", "#1f77b4"),
        (top, "eval_loss", "validation loss", "#d1495b"),
        (bottom, "learning_rate", "learning rate", "#555555"),
    ):
        if name not in series:
            continue
        steps = list(series[name].keys())
        values = list(series[name].values())
        marker = "o" if len(steps) < FEW_POINTS else None
        axis.plot(steps, values, label=label, color=color, linewidth=1.5, marker=marker, markersize=4)

    top.set_ylabel("loss")  # nats per token where it is the plain negative log-likelihood
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("optimizer step")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    bottom.set_ylim(bottom=0)
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    if top.lines:
        top.legend(frameon=False)
    for axis in (top, bottom):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels()
    figure.savefig(file, format="png")
