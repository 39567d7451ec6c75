"""Train a recipe once for each value of an option, and compare the runs: a table and a plot.

    python -m eval.sweep recipes/qwen3_qlora.py --dataset_name data/chats --eval_rows 200
    python -m eval.sweep recipes/smollm3_sft.py --config recipes/configs/smollm3_hybrid.yaml --values 1e-5 3e-5
    python -m eval.sweep recipes/qwen3_lora.py --option learning_rate --values 1e-4 3e-4 --option lora_r --values 8 32

Without --option it is the learning rate, without --values 1e-6 3e-6 1e-5 3e-5 1e-4 (the SmolLM3 playbook's); several
options are a grid. What follows the recipe and is not one of the flags below goes to it as it stands. An arm is one
`accelerate launch` into OUT/OPTION-VALUE, its output in OUT/OPTION-VALUE.log, one after the other. What a recipe
refuses is told before the first is launched.

The same command again goes on: an arm that has ended is not launched again, one that was stopped goes on from its
newest checkpoint. An arm is known by the hash of its resolved arguments and its recipe's file; a folder of other
arguments is refused. Ctrl-C and SIGTERM let the running arm save.

States: finished; diverged (recipes/hooks ended it, or its last loss is no number): final too, the next arm is launched;
failed (any other exit, the end of its log is shown): launched again next time; stopped.

Writes report.json, report.md and sweep.png to OUT. Evaluation loss: the last one logged, where the run evaluates (at
its end, for one that does not depend on where evaluations fall: --eval_strategy epoch). Train loss: the mean of the
last tenth of what was logged. Exit 0: every arm finished or diverged. 1: one failed or was stopped. 2: bad input.
"""

import argparse
import contextlib
import hashlib
import io
import itertools
import json
import math
import re
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING
from unittest import mock

from rich.table import Table

from data_prep.common.errors import UsageError
from data_prep.common.run_folder import read_log
from data_prep.common.terminal import make_console
from eval.common.scores import PIPE_WIDTH, command, parser_of, write_files

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEARNING_RATES = ["1e-6", "3e-6", "1e-5", "3e-5", "1e-4"]
LAUNCHER = [sys.executable, "-m", "accelerate.commands.launch"]
OWN_FLAGS = ("--output_dir", "--resume_from_checkpoint")  # the sweep passes them itself
NO_FOLDER = "runs/no-such-folder-of-a-sweep"
DIVERGED = re.compile(  # what recipes/hooks says
    r"(step \d+(?:, rank \d+)?: the (?:loss|gradient norm) is [^;]*); .*; stopped (?:before|after) the weights changed"
)
FINAL = ("finished", "diverged")
LOG_END = 400  # characters of a log that are shown
RECORDED = ("hash", "state", "why", "seconds", "launches")  # of each arm in arms.json
DIVERGED_COLOUR = "#d1495b"

Series = dict[str, dict[int, float]]  # as read_log has it


@dataclass
class Arm:
    """One run of a sweep: its values by option, its flags, the hash of its arguments and recipe, what became of it."""

    name: str
    values: dict[str, str]
    flags: list[str]
    hash: str
    folder: Path
    state: str = "waiting"
    why: str = ""
    seconds: float | None = None
    launches: int = 0
    series: Series = field(default_factory=dict)
    steps: int = 0
    train_loss: float | None = None
    eval_loss: float | None = None

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.name}.log")

    @property
    def is_final(self) -> bool:
        return self.state in FINAL


# -- arms -------------------------------------------------------------------------------------------------------------
def list_arms(args: argparse.Namespace, flags: list[str]) -> list[Arm]:
    """Return the arms of a grid, in its order. flags: the recipe's. Raises UsageError."""
    options = args.option or ["learning_rate"]
    values = args.values or []
    if not values and options == ["learning_rate"]:
        values = [LEARNING_RATES]
    check_options(options, values, flags)
    source = Path(args.recipe).read_bytes()
    module = runpy.run_path(args.recipe)
    arms = []
    for combination in itertools.product(*values):
        named = dict(zip(options, combination, strict=True))
        parts = []
        own = list(flags)
        for option, value in named.items():
            parts.append(f"{option}-{re.sub(r'[^A-Za-z0-9.+-]', '.', value)}")
            own += [f"--{option}", value]
        settings = resolve_settings(module, args.recipe, own)
        text = json.dumps(settings, sort_keys=True, default=str).encode()
        digest = hashlib.sha256(source + text).hexdigest()[:16]
        name = "_".join(parts)
        arms.append(Arm(name, named, own, digest, args.out / name))
    hashes = {arm.hash for arm in arms}
    names = {arm.name for arm in arms}
    if len(hashes) < len(arms) or len(names) < len(arms):
        raise UsageError("--values names a value twice: pass each once")
    return arms


def check_options(options: list[str], values: list[list[str]], flags: list[str]) -> None:
    """Raise UsageError for options without values, and for flags that the sweep passes itself."""
    if len(options) != len(values) or len(set(options)) < len(options):
        raise UsageError("--option and --values go in pairs, an option once: --option lora_r --values 8 32")
    names = [flag.split("=")[0] for flag in flags]
    for flag, name in zip(flags, names, strict=True):
        if name in OWN_FLAGS:
            raise UsageError(
                f"{flag}: the sweep names the folders of its arms and resumes them: pass --out, or nothing"
            )
    for option in options:
        if f"--{option}" in names:
            raise UsageError(f"--{option} is swept: pass its --values, or the flag, not both")


def resolve_settings(module: dict, recipe: str, flags: list[str]) -> dict:
    """Return what DEFAULTS, --config and flags say, as plain values, without where a run writes.

    They are the names of DEFAULTS, and those that differ from TRL's own defaults. module: what runpy made of the
    recipe. Raises UsageError.
    """
    words = [*flags, "--output_dir", NO_FOLDER]
    message = io.StringIO()
    with mock.patch("sys.argv", [recipe, *words]), contextlib.redirect_stderr(message):
        try:
            parser = module["make_parser"]()
            trl_values = vars(parser.parse_args([]))
            module["parse_args"](parser)  # DEFAULTS and YAML are the parser's defaults from here on
            values = vars(parser.parse_args(without_config(words)))
        except SystemExit:
            last_line = message.getvalue().strip().splitlines()[-1]
            raise UsageError(f"{recipe} refuses its flags: {last_line}") from None
        except (ValueError, TypeError, OSError) as error:
            raise UsageError(f"{recipe} refuses its flags: {' '.join(str(error).split())}") from None

    settings = {}
    for name, value in values.items():
        named = name in module["DEFAULTS"] or value != trl_values.get(name)
        if named and f"--{name}" not in OWN_FLAGS:
            settings[name] = value
    return settings


def without_config(words: list[str]) -> list[str]:
    """Return the words of a command line without --config and its file."""
    for position, word in enumerate(words):
        if word == "--config":
            return words[:position] + words[position + 2 :]
        if word.startswith("--config="):
            return words[:position] + words[position + 1 :]
    return words


# -- one arm ----------------------------------------------------------------------------------------------------------
def list_processes(folder: Path) -> list[int]:
    """Return the processes that have this folder on their command line; none where there is no /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


@dataclass
class Launch:
    """How one `accelerate launch` ended, and whether the sweep was asked to stop meanwhile."""

    code: int
    was_stopped: bool


def launch(args: argparse.Namespace, arm: Arm) -> Launch:
    """Run an arm to its end; SIGINT and SIGTERM are handed to it, so that it saves."""
    words = list(LAUNCHER)
    if args.config_file:
        words += ["--config_file", args.config_file]
    words += [args.recipe, *arm.flags, "--output_dir", str(arm.folder), "--resume_from_checkpoint", "true"]
    signals = []

    def stop(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        if number == signal.SIGTERM or not sys.stdin.isatty():  # Ctrl-C on a terminal reaches the arm by itself
            process.send_signal(number)

    with open(arm.log, "ab") as log:
        process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            code = process.wait()
            while signals and list_processes(arm.folder):  # the launcher dies of a signal before its run has saved
                time.sleep(0.2)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return Launch(code, bool(signals))


def set_state(arm: Arm, ending: Launch) -> None:
    """Set the state of an arm whose launch has ended, and why it is that."""
    text = arm.log.read_text(errors="replace")
    losses = list(read_log(arm.folder).get("loss", {}).values())
    messages = DIVERGED.findall(text)
    arm.why = ""
    if messages:
        arm.state = "diverged"
        arm.why = messages[-1]
    elif losses and not math.isfinite(losses[-1]):
        arm.state = "diverged"
        arm.why = f"the last loss is {losses[-1]}"
    elif ending.code == 0:
        arm.state = "finished"
    elif ending.was_stopped:
        arm.state = "stopped"
        arm.why = "told to stop"
    else:
        arm.state = "failed"
        end = " ".join(text[-LOG_END:].split())
        arm.why = f"exit code {ending.code}: {end}"


def read_figures(arm: Arm) -> None:
    """Set what an arm's log says of it: losses by step and the figures of the table."""
    if arm.folder.is_dir():
        arm.series = read_log(arm.folder)
    losses = arm.series.get("loss", {})
    if losses:
        arm.steps = max(losses)
        count = max(1, len(losses) // 10)
        arm.train_loss = sum(list(losses.values())[-count:]) / count
    evaluated = list(arm.series.get("eval_loss", {}).values())
    if evaluated:
        arm.eval_loss = evaluated[-1]


# -- the report -------------------------------------------------------------------------------------------------------
def plot(arms: list[Arm], options: list[str]) -> bytes:
    """Return a PNG: losses over the steps, and the final loss over the first option."""
    from matplotlib.figure import Figure  # a second of imports that only a picture needs

    figure = Figure(figsize=(11, 4.5), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    plot_curves(left, arms)
    plot_final_losses(right, arms, options)
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(frameon=False, fontsize=8)
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()


def plot_curves(axis: "Axes", arms: list[Arm]) -> None:
    """Draw the training losses of each arm thin, its validation losses with dots."""
    from matplotlib.ticker import MaxNLocator

    for index, arm in enumerate(arms):
        color = f"C{index % 10}"
        label = ", ".join(arm.values.values())
        if arm.state != "finished":
            label += f" ({arm.state})"
        training = arm.series.get("loss", {})
        evaluated = arm.series.get("eval_loss", {})
        if training:
            marker = "o" if len(training) == 1 else None  # a line through one point cannot be seen
            # the legend shows the stronger of the two lines
            shown = None if evaluated else label
            draw_losses(axis, training, color=color, linewidth=1, alpha=0.5, marker=marker, label=shown)
        if evaluated:
            draw_losses(axis, evaluated, color=color, linewidth=2, marker="o", label=label)
    limit_losses(axis, arms)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("loss (nats per token); dots: validation")


def draw_losses(axis: "Axes", losses: dict[int, float], **style: object) -> None:
    axis.plot(list(losses.keys()), list(losses.values()), markersize=4, **style)


def limit_losses(axis: "Axes", arms: list[Arm]) -> None:
    """Fit the axis to the arms that finished: a diverged one leaves the picture, it does not flatten the others."""
    losses = []
    for arm in arms:
        for name in ("loss", "eval_loss"):
            if arm.state == "finished":
                losses += [loss for loss in arm.series.get(name, {}).values() if math.isfinite(loss)]
    if losses and max(losses) > min(losses):
        margin = 0.05 * (max(losses) - min(losses))
        axis.set_ylim(min(losses) - margin, max(losses) + margin)


def plot_final_losses(axis: "Axes", arms: list[Arm], options: list[str]) -> None:
    """Draw the final loss over the first option, a line for each combination of the others."""
    first = options[0]
    others = options[1:]
    finished = [arm for arm in arms if arm.state == "finished"]
    has_validation = any(arm.eval_loss is not None for arm in finished)
    names = list(dict.fromkeys(arm.values[first] for arm in arms))
    numbers = [to_number(name) for name in names]
    is_numeric = None not in numbers
    places = dict(zip(names, numbers if is_numeric else range(len(names)), strict=True))
    lines: dict[str, list[tuple[float, float]]] = {}
    for arm in arms:
        label = ", ".join(f"{option} {arm.values[option]}" for option in others)
        line = lines.setdefault(label, [])
        loss = arm.eval_loss if has_validation else arm.train_loss
        if arm.state == "finished" and loss is not None:
            line.append((places[arm.values[first]], loss))
    for label, line in lines.items():
        line.sort(key=lambda point: point[0])
        axis.plot([place for place, _ in line], [loss for _, loss in line], "o-", label=label or None)
    for arm in arms:
        if arm.state == "diverged":
            mark_diverged(axis, places[arm.values[first]])
    if is_numeric and min(numbers) > 0 and max(numbers) / min(numbers) >= 10:
        axis.set_xscale("log")
    if not is_numeric:
        axis.set_xticks(list(places.values()), list(places))
    axis.set_xlabel(first)
    axis.set_ylabel("final validation loss" if has_validation else "final training loss")


def mark_diverged(axis: "Axes", place: float) -> None:
    axis.axvline(place, color=DIVERGED_COLOUR, linestyle=":", linewidth=1)
    axis.text(
        place,
        0.98,
        "diverged",
        rotation=90,
        color=DIVERGED_COLOUR,
        fontsize=8,
        transform=axis.get_xaxis_transform(),
        ha="right",
        va="top",
    )


def to_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def format_loss(loss: float | None) -> str:
    return "–" if loss is None else f"{loss:.4g}"


def drop_nan(value: float | None) -> float | None:
    """Return a figure as JSON has it: None where it is no number."""
    if value is None or not math.isfinite(value):
        return None
    return value


def make_row(arm: Arm, best: str | None) -> list[str]:
    """Return the cells of an arm in the table; best: the name of the best arm."""
    minutes = "–"
    if arm.seconds is not None:
        minutes = f"{arm.seconds / 60:.1f} min"
    state = arm.state
    if arm.name == best:
        state += ", best"
    if arm.why:
        state += f": {arm.why}"
    losses = [format_loss(arm.eval_loss), format_loss(arm.train_loss)]
    return [*arm.values.values(), *losses, f"{arm.steps:,}", minutes, state]


def find_best(arms: list[Arm]) -> str | None:
    """Return the name of the finished arm with the least validation loss, None where none has one."""
    compared = [arm for arm in arms if arm.state == "finished" and arm.eval_loss is not None]
    if not compared:
        return None
    return min(compared, key=lambda arm: arm.eval_loss).name


@dataclass
class Cells:
    """A table: its columns and rows."""

    columns: list[str]
    rows: list[list[str]]


def write_report(args: argparse.Namespace, arms: list[Arm], options: list[str]) -> Cells:
    """Write the three files of what the arms logged; return the table."""
    for arm in arms:
        read_figures(arm)
    best = find_best(arms)
    listed = []
    for arm in arms:
        listed.append(
            {
                "name": arm.name,
                "values": arm.values,
                "state": arm.state,
                "why": arm.why,
                "eval_loss": drop_nan(arm.eval_loss),
                "train_loss": drop_nan(arm.train_loss),
                "steps": arm.steps,
                "seconds": arm.seconds,
                "launches": arm.launches,
                "hash": arm.hash,
            }
        )
    recipe = Path(args.recipe).name
    columns = [*options, "eval loss", "train loss", "steps", "time", "state"]
    rows = [make_row(arm, best) for arm in arms]
    lines = [f"# Sweep of {recipe}", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = [cell.replace("|", "\\|") for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "![losses](sweep.png)", ""]
    report = {"recipe": recipe, "options": options, "best": best, "arms": listed}
    files = {
        "sweep.png": plot(arms, options),
        "report.md": "\n".join(lines),
        "report.json": json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
    }
    write_files(args.out, files)
    return Cells(columns, rows)


# -- the command ------------------------------------------------------------------------------------------------------
class Record:
    """arms.json: what became of each arm, so that the same command goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.arms = {}
        if path.is_file():
            self.arms = json.loads(path.read_text(encoding="utf-8"))

    def restore(self, arm: Arm) -> None:
        """Set what became of an arm before. Raises UsageError for one of other arguments, or one that still runs."""
        known = self.arms.get(arm.name)
        is_other = known["hash"] != arm.hash if known else arm.folder.exists()
        if is_other:
            raise UsageError(f"{arm.folder} is of other arguments or another recipe: pass another --out, or remove it")
        processes = list_processes(arm.folder)
        if processes:
            raise UsageError(f"{arm.name} still runs (process {processes[0]}): wait for it, or end it")
        for name, value in (known or {}).items():
            setattr(arm, name, value)

    def keep(self, arm: Arm) -> None:
        self.arms[arm.name] = {name: getattr(arm, name) for name in RECORDED}
        write_files(self.path.parent, {self.path.name: json.dumps(self.arms, indent=1)})


def run_arm(args: argparse.Namespace, arm: Arm, record: Record, position: str) -> bool:
    """Launch an arm and record what became of it; return whether the sweep was asked to stop. position: "1/5"."""
    arm.state = "stopped"  # true if this process dies
    arm.why = ""
    arm.launches += 1
    record.keep(arm)
    print(f"{position} {arm.name}: launched, {arm.log}", flush=True)
    start = time.monotonic()
    ending = launch(args, arm)
    set_state(arm, ending)
    arm.seconds = round((arm.seconds or 0) + time.monotonic() - start, 1)
    record.keep(arm)
    reason = f", {arm.why}" if arm.why else ""
    print(f"{position} {arm.name}: {arm.state}{reason}", flush=True)
    return ending.was_stopped


def run_sweep(args: argparse.Namespace, flags: list[str]) -> int:
    """Run the arms that are not final yet and write the report. flags: the recipe's. Raises UsageError."""
    recipe = Path(args.recipe)
    if not recipe.is_file():
        raise UsageError(f"{recipe}: no such recipe: pass a file like recipes/qwen3_qlora.py")
    if args.config_file and not Path(args.config_file).is_file():
        raise UsageError(f"{args.config_file}: no such file: pass one of accelerate_configs/")
    args.out = args.out or Path("runs", f"sweep_{recipe.stem}")
    arms = list_arms(args, flags)
    record = Record(args.out / "arms.json")
    for arm in arms:
        record.restore(arm)
    for number, arm in enumerate(arms, 1):
        position = f"{number}/{len(arms)}"
        if arm.is_final:
            print(f"{position} {arm.name}: {arm.state} before", flush=True)
        elif run_arm(args, arm, record, position):
            break
    table = write_report(args, arms, list(arms[0].values))
    print_table(table, f"sweep of {recipe.name}")
    print(f"{args.out}: report.md, report.json, sweep.png")
    return int(not all(arm.is_final for arm in arms))


def print_table(cells: Cells, title: str) -> None:
    table = Table(*cells.columns, title=title)
    for row in cells.rows:
        table.add_row(*row)
    make_console(PIPE_WIDTH).print(table)


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("recipe", help="the file; flags that are not the sweep's follow it")
    parser.add_argument("--option", action="append", help="name of a recipe's flag, once for each option of a grid")
    parser.add_argument("--values", action="append", nargs="+", help="of the option before it")
    parser.add_argument("--config_file", help="for accelerate launch")
    parser.add_argument("--out", type=Path, help="default: runs/sweep_RECIPE")
    args, flags = parser.parse_known_args(argv)

    def run(args: argparse.Namespace) -> int:
        return run_sweep(args, flags)

    return command("sweep.py", run, args)


if __name__ == "__main__":
    sys.exit(main())
