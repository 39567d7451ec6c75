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
from pathlib import Path
from typing import Any
from unittest import mock

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

from data_prep.common.errors import UsageError
from eval.common.scores import command, parser_of, write_files
from eval.compare import read_log

RATES = ["1e-6", "3e-6", "1e-5", "3e-5", "1e-4"]
LAUNCHER = [sys.executable, "-m", "accelerate.commands.launch"]
OURS = "--output_dir", "--resume_from_checkpoint"  # flags that the sweep passes itself
NO_FOLDER = "runs/no-such-folder-of-a-sweep"
DIVERGED = re.compile(r"step \d+, rank \d+: the (?:loss|gradient norm) is .*?; rows")  # what recipes/hooks says
FINAL = "finished", "diverged"
TAIL = 400  # characters of a log that are shown


# -- arms -------------------------------------------------------------------------------------------------------------
def arms_of(args, flags):
    """[{name, values, folder, flags, hash}] of a grid, in its order. Raises UsageError."""
    options = args.option or ["learning_rate"]
    values = args.values or [RATES] * (options == ["learning_rate"])
    if len(options) != len(values) or len({*options}) < len(options):
        raise UsageError("--option and --values go in pairs, an option once: --option lora_r --values 8 32")
    if wrong := [flag for flag in flags if flag.split("=")[0] in OURS]:
        raise UsageError(
            f"{wrong[0]}: the sweep names the folders of its arms and resumes them: pass --out, or nothing"
        )
    if swept := [option for option in options if any(flag.split("=")[0] == f"--{option}" for flag in flags)]:
        raise UsageError(f"--{swept[0]} is swept: pass its --values, or the flag, not both")
    source, arms = Path(args.recipe).read_bytes(), []
    module = runpy.run_path(args.recipe)
    for chosen in itertools.product(*values):
        named = dict(zip(options, chosen, strict=True))
        name = "_".join(f"{option}-{re.sub(r'[^A-Za-z0-9.+-]', '.', value)}" for option, value in named.items())
        own = [*flags, *(word for option, value in named.items() for word in (f"--{option}", value))]
        settings = resolve_settings(module, args.recipe, own)
        text = json.dumps(settings, sort_keys=True, default=str).encode()
        digest = hashlib.sha256(source + text).hexdigest()[:16]
        arms.append({"name": name, "values": named, "flags": own, "hash": digest, "folder": args.out / name})
    if len({arm["hash"] for arm in arms}) < len(arms) or len({arm["name"] for arm in arms}) < len(arms):
        raise UsageError("--values names a value twice: pass each once")
    return arms


def resolve_settings(module: dict[str, Any], recipe: str, flags: list[str]) -> dict[str, Any]:
    """Return what DEFAULTS, --config and flags say, as plain values, without where a run writes: the names of DEFAULTS,
    and those that differ from TRL's own defaults. module: what runpy made of the recipe. Raises UsageError."""
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
        if named and f"--{name}" not in OURS:
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
def running(folder):
    """Processes that have this folder on their command line; none where there is no /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def launch(args, arm):
    """The exit code of one `accelerate launch`, and whether this sweep was told to stop meanwhile."""
    words = [*LAUNCHER, *(["--config_file", args.config_file] if args.config_file else [])]
    words += [args.recipe, *arm["flags"], "--output_dir", arm["folder"], "--resume_from_checkpoint", "true"]
    told = []

    def stop(number, frame):
        told.append(number)
        if number == signal.SIGTERM or not sys.stdin.isatty():  # Ctrl-C on a terminal reaches the arm by itself
            process.send_signal(number)

    with open(arm["folder"].with_name(f"{arm['name']}.log"), "ab") as log:
        process = subprocess.Popen([*map(str, words)], stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            code = process.wait()
            while told and running(arm["folder"]):  # the launcher dies of a signal before its run has saved
                time.sleep(0.2)
        finally:
            [signal.signal(*pair) for pair in before.items()]
    return code, bool(told)


def state_of(arm, code, told):
    """(state, why) of an arm whose launch has ended."""
    text = arm["folder"].with_name(f"{arm['name']}.log").read_text(errors="replace")
    last = [*read_log(arm["folder"]).get("loss", {0: 0.0}).values()][-1]
    if found := DIVERGED.findall(text):
        return "diverged", found[-1].removesuffix("; rows")
    if not math.isfinite(last):
        return "diverged", f"the last loss is {last}"
    if code == 0:
        return "finished", ""
    if told:
        return "stopped", "told to stop"
    return "failed", f"exit code {code}: {' '.join(text[-TAIL:].split())}"


def measured(arm):
    """What an arm's log says of it: losses by step and the figures of the table."""
    series = read_log(arm["folder"]) if arm["folder"].is_dir() else {}
    losses, evaluated = [*series.get("loss", {}).values()], [*series.get("eval_loss", {}).values()]
    tail = losses[-max(1, len(losses) // 10) :]
    figures = {"steps": max(series.get("loss", {0: 0})), "train_loss": sum(tail) / len(tail) if tail else None}
    return series, figures | {"eval_loss": evaluated[-1] if evaluated else None}


# -- the report ------------------------------------------------------------------------------------------------------
def number(value):
    try:
        return float(value)
    except ValueError:
        return None


def shown(value, digits=4):
    return "–" if value is None else f"{value:.{digits}g}"


def plot(arms, series, options):
    """PNG (bytes): losses over the steps, and the final loss over the first option, a line for each of the others."""
    figure = Figure(figsize=(11, 4.5), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = [f"C{index % 10}" for index in range(len(arms))]
    for arm, colour in zip(arms, colours, strict=True):
        label = ", ".join(arm["values"].values()) + ("" if arm["state"] == "finished" else f" ({arm['state']})")
        found = series[arm["name"]]
        for key, width in (("loss", 1), ("eval_loss", 2)):
            if key in found:
                given = {"color": colour, "linewidth": width, "alpha": 0.5 if key == "loss" else 1.0}
                if key == "eval_loss" or len(found[key]) == 1:  # a line through one point cannot be seen
                    given |= {"marker": "o", "markersize": 4}
                given |= {"label": label} if key == ("loss" if "loss" in found else "eval_loss") else {}
                left.plot([*found[key]], [*found[key].values()], **given)
    ends = [value for arm in arms if arm["state"] == "finished" for key in ("loss", "eval_loss")
            for value in series[arm["name"]].get(key, {}).values() if math.isfinite(value)]  # fmt: skip
    if ends and max(ends) > min(ends):  # a diverged arm leaves the picture, it does not flatten the others
        margin = 0.05 * (max(ends) - min(ends))
        left.set_ylim(min(ends) - margin, max(ends) + margin)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set_xlabel("optimizer step")
    left.set_ylabel("loss (nats per token); dots: validation")
    first, others = options[0], options[1:]
    finished = [arm for arm in arms if arm["state"] == "finished"]
    key = "eval_loss" if any(arm["eval_loss"] is not None for arm in finished) else "train_loss"
    names = list(dict.fromkeys(arm["values"][first] for arm in arms))
    numbers = [number(name) for name in names]
    real = None not in numbers
    places = dict(zip(names, numbers if real else range(len(names)), strict=True))
    for rest in dict.fromkeys(tuple(arm["values"][name] for name in others) for arm in arms):
        line = [arm for arm in finished if tuple(arm["values"][name] for name in others) == rest]
        line = sorted((arm for arm in line if arm[key] is not None), key=lambda arm: places[arm["values"][first]])
        label = ", ".join(f"{name} {value}" for name, value in zip(others, rest, strict=True))
        xs = [places[arm["values"][first]] for arm in line]
        right.plot(xs, [arm[key] for arm in line], "o-", label=label or None)
    for arm in arms:
        if arm["state"] == "diverged":
            right.axvline(places[arm["values"][first]], color="#d1495b", linestyle=":", linewidth=1)
            right.text(places[arm["values"][first]], 0.98, "diverged", rotation=90, color="#d1495b", fontsize=8,
                       transform=right.get_xaxis_transform(), ha="right", va="top")  # fmt: skip
    if real and min(numbers) > 0 and max(numbers) / min(numbers) >= 10:
        right.set_xscale("log")
    if not real:
        right.set_xticks([*places.values()], [*places])
    right.set_xlabel(first)
    right.set_ylabel("final validation loss" if key == "eval_loss" else "final training loss")
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(frameon=False, fontsize=8)
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()


def write_report(args, arms, options):
    """Reads what the arms logged and writes the three files; (heads, rows) of the table."""
    series = {}
    for arm in arms:
        series[arm["name"]], figures = measured(arm)
        arm |= figures
    finished = [arm for arm in arms if arm["state"] == "finished" and arm["eval_loss"] is not None]
    best = min(finished, key=lambda arm: arm["eval_loss"])["name"] if finished else None
    kept = ("name", "values", "state", "why", "eval_loss", "train_loss", "steps", "seconds", "launches", "hash")
    told = [{key: None if isinstance(arm[key], float) and not math.isfinite(arm[key]) else arm[key] for key in kept}
            for arm in arms]  # fmt: skip
    report = {"recipe": Path(args.recipe).name, "options": options, "best": best, "arms": told}
    heads = [*options, "eval loss", "train loss", "steps", "time", "state"]
    rows = []
    for arm in arms:
        time_of = "–" if arm["seconds"] is None else f"{arm['seconds'] / 60:.1f} min"
        state = arm["state"] + (", best" if arm["name"] == best else "") + (f": {arm['why']}" if arm["why"] else "")
        figures = [shown(arm["eval_loss"]), shown(arm["train_loss"]), f"{arm['steps']:,}", time_of, state]
        rows.append([*arm["values"].values(), *figures])
    lines = [f"# Sweep of {Path(args.recipe).name}", "", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    lines += ["", "![losses](sweep.png)", ""]
    picture = plot(arms, series, options)
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    write_files(args.out, {"sweep.png": picture, "report.md": "\n".join(lines), "report.json": text + "\n"})
    return heads, rows


def run(args, flags):
    recipe = Path(args.recipe)
    if not recipe.is_file():
        raise UsageError(f"{recipe}: no such recipe: pass a file like recipes/qwen3_qlora.py")
    if args.config_file and not Path(args.config_file).is_file():
        raise UsageError(f"{args.config_file}: no such file: pass one of accelerate_configs/")
    args.out = args.out or Path("runs", f"sweep_{recipe.stem}")
    arms = arms_of(args, flags)
    record = args.out / "arms.json"
    known = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    for arm in arms:
        arm |= {"state": "waiting", "why": "", "seconds": None, "launches": 0}
        before = known.get(arm["name"])
        if before and before["hash"] != arm["hash"] or not before and arm["folder"].exists():
            raise UsageError(
                f"{arm['folder']} is of other arguments or another recipe: pass another --out, or remove it"
            )
        if pids := running(arm["folder"]):
            raise UsageError(f"{arm['name']} still runs (process {pids[0]}): wait for it, or end it")
        arm |= before or {}
    options = [*arms[0]["values"]]
    for position, arm in enumerate(arms, 1):
        if arm["state"] in FINAL:
            print(f"{position}/{len(arms)} {arm['name']}: {arm['state']} before", flush=True)
            continue
        keep(record, known, arm, state="stopped", why="", launches=arm["launches"] + 1)  # true if this process dies
        print(f"{position}/{len(arms)} {arm['name']}: launched, {arm['folder']}.log", flush=True)
        start = time.monotonic()
        code, told = launch(args, arm)
        state, why = state_of(arm, code, told)
        seconds = round((arm["seconds"] or 0) + time.monotonic() - start, 1)
        keep(record, known, arm, state=state, why=why, seconds=seconds)
        print(f"{position}/{len(arms)} {arm['name']}: {state}" + (f", {why}" if why else ""), flush=True)
        if told:
            break
    heads, rows = write_report(args, arms, options)
    table = Table(*heads, title=f"sweep of {recipe.name}")
    [table.add_row(*row) for row in rows]
    Console(width=None if sys.stdout.isatty() else 130, markup=False, emoji=False, highlight=False).print(table)
    print(f"{args.out}: report.md, report.json, sweep.png")
    return int(any(arm["state"] not in FINAL for arm in arms))


def keep(record, known, arm, **news):
    """Notes in arms.json what became of an arm."""
    arm |= news
    known[arm["name"]] = {key: arm[key] for key in ("hash", "state", "why", "seconds", "launches")}
    write_files(record.parent, {record.name: json.dumps(known, indent=1)})


def main(argv=None):
    parser = parser_of(__doc__)
    parser.add_argument("recipe", help="the file; flags that are not the sweep's follow it")
    parser.add_argument("--option", action="append", help="name of a recipe's flag, once for each option of a grid")
    parser.add_argument("--values", action="append", nargs="+", help="of the option before it")
    parser.add_argument("--config_file", help="for accelerate launch")
    parser.add_argument("--out", type=Path, help="default: runs/sweep_RECIPE")
    args, flags = parser.parse_known_args(argv)
    return command("sweep.py", lambda args: run(args, flags), args)


if __name__ == "__main__":
    sys.exit(main())
