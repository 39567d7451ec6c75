"""Hook: when a run ends, loss.png and a few lines: where everything is and the next commands, with this run's paths."""

import json
import re
import shlex
from contextlib import suppress
from pathlib import Path

RUN = {}  # what prepare() was given; script.rows is filled in by the recipe later
REPO = Path(__file__).resolve().parents[2]


# -- the next two are eval/compare.py's, word for word (tests/test_end.py): both draw the same picture
def read_log(run):
    """{"loss" | "eval_loss" | "learning_rate": {step: value}} of a run folder's log.jsonl, else of its newest
    checkpoint; {} with neither. A step logged again after a resume counts as it was logged last."""
    states = run.glob("checkpoint-*/trainer_state.json")
    newest = max(states, key=lambda path: int(re.sub(r"\D", "", path.parent.name) or 0), default=None)
    entries, series = [], {}
    if (run / "log.jsonl").is_file():
        for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):  # the line that a killed run was writing
                entries.append(json.loads(line))
    elif newest:
        entries = json.loads(newest.read_text(encoding="utf-8"))["log_history"]
    for key in ("loss", "eval_loss", "learning_rate"):
        values = {entry["step"]: entry[key] for entry in entries if "step" in entry and entry.get(key) is not None}
        if values:
            series[key] = dict(sorted(values.items()))
    return series


def plot(series, path):
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    top, bottom = figure.subplots(2, sharex=True, height_ratios=[3, 1])
    for axis, key, label, colour in (
        (top, "loss", "training loss", "#1f77b4"),
        (top, "eval_loss", "validation loss", "#d1495b"),
        (bottom, "learning_rate", "learning rate", "#555555"),
    ):
        if key in series:
            steps, values = list(series[key]), list(series[key].values())
            marker = "o" if len(steps) < 30 else None  # a line through few points hides where they are
            axis.plot(steps, values, label=label, color=colour, linewidth=1.5, marker=marker, markersize=4)
    top.set_ylabel("loss (nats per token)")
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
    figure.savefig(path, format="png")


def draw(run):
    """Draws loss.png; returns why not, or None. A run is not to fail over its picture."""
    global Figure, MaxNLocator  # a second of imports that only the end needs
    part = run / ".loss.png.part"
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        if series := read_log(run):
            plot(series, part)
            part.replace(run / "loss.png")
        return None if series else "nothing was logged"
    except (ImportError, OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def near(path):
    """A path as one would type it here."""
    path, here = Path(path), Path.cwd()
    return str(path.relative_to(here)) if path.is_absolute() and path.is_relative_to(here) else str(path)


def quoted(path):
    return shlex.quote(near(path))


def commands(out):
    """{what for: the command} for this run; measuring and merging are eval/'s."""
    script, found, room = RUN["script"], {}, REPO / "eval"
    data, adapter = Path(script.dataset_name), (out / "adapter_config.json").is_file()
    chats = "messages" in (getattr(script.rows, "column_names", None) or ())
    split = next((name for name in ("test", script.dataset_test_split) if (data / name).is_dir()), None)
    held_out = f"--data {quoted(data)} --split {split}" if split else "--data HELD_OUT.jsonl"
    if chats and (room / "compare.py").is_file():
        base = quoted(RUN["model"].model_name_or_path)
        found["measure"] = f"python {quoted(room / 'compare.py')} --base {base} --tuned {quoted(out)} {held_out}"
    if adapter and (room / "merge.py").is_file():
        merged = quoted(out / "merged")
        found["merge"] = f"python {quoted(room / 'merge.py')} {quoted(out)} --out {merged}"
        found["merge"] += f" {held_out}" if chats and split else ""
        found["serve"] = f"transformers serve {merged}"
    elif not adapter:
        found["serve"] = f"transformers serve {quoted(out)}"
    return found


def lines(trainer, no_plot):
    """The lines to print; `no_plot`: why there is no loss.png, or None."""
    state, out, last = trainer.state, Path(trainer.args.output_dir), {}
    for entry in state.log_history:
        last |= entry
    steps, whole = f"{state.global_step:,}", state.global_step >= state.max_steps
    done = [f"{steps} steps" if whole else f"stopped after {steps} of {state.max_steps:,} steps"]
    named = {"loss": "loss", "eval_loss": "validation loss"}
    done += [f"{words} {last[key]:.4g}" for key, words in named.items() if key in last]
    done += [f"{last['memory_gib']:.1f} GiB at most"] if "memory_gib" in last else []
    kind = "adapter" if (out / "adapter_config.json").is_file() else "model"
    checkpoints = sorted(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[-1]))
    files = [name for name in ("log.jsonl", "loss.png", "config.yaml", "versions.json") if (out / name).is_file()]
    files = ", ".join([*files, *(path.name for path in checkpoints)]) + (f"; no loss.png: {no_plot}" if no_plot else "")
    table = {"done": ", ".join(done), kind: f"{near(out)}, with its tokenizer and serving template", "files": files}
    if not whole:
        table["go on"] = "the same command with --resume_from_checkpoint true"
    return [f"  {key:<10} {value}" for key, value in (table | commands(out)).items()]


def prepare(script, args, model):
    RUN.update(script=script, args=args, model=model)


def after(trainer):
    if trainer.is_world_process_zero():
        print(*lines(trainer, draw(Path(trainer.args.output_dir))), sep="\n", flush=True)
