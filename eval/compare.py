"""Measure a model before and after fine-tuning with the same numbers: perplexity, exact match, JSON, stopping.

    python eval/compare.py --base Qwen/Qwen3-4B-Instruct-2507 --tuned runs/qwen3_qlora --data my_set --split test

Both models get the tuned folder's tokenizer and chat template, hence the same tokens. Every assistant turn k is
measured as it would be served: its prompt is the template on messages[:k] with the generation prompt, its output what
the template on messages[:k + 1] adds, up to and including the stop token. Perplexity takes all turns; text is
generated greedily for the last answer of each row. metrics.py defines the numbers. Turns that cannot be scored are
counted by reason in the report.

Writes report.json, report.md, answers.jsonl and loss.png to --out. The same input gives the same bytes on one machine.
In float32 the batch size moves perplexities by rounding only (about 1e-6); in bfloat16 it can move their third digit
and, where two tokens tie, a greedy answer: compare bfloat16 reports of one --batch_size only.
"""

import gc
import hashlib
import io
import json
import os
import random
import re
import sys
from collections import Counter
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from measure import clean_row, measure, prepare, read_rows
from metrics import summarize
from models import BadInput, add_adapter, add_model_arguments, check_vocabulary, load_model, load_tokenizer, positive
from rich.console import Console
from rich.table import Table
from scores import command, parser_of, write_files

METRICS = {  # metric: (its name in the table, its unit of count)
    "assistant_perplexity": ("assistant perplexity", "tokens"),
    "all_token_perplexity": ("all-token perplexity", "tokens"),
    "exact_match": ("exact match", "total"),
    "json_valid": ("JSON validity", "total"),
    "stop_rate": ("stop rate", "total"),
    "empty": ("empty answers", "total"),
}
FLAGS = ("answer", "answer_tokens", "stopped", "empty", "exact", "json_valid")  # of each row in answers.jsonl
HEADER = ["group", "metric", "base (95%)", "tuned (95%)", "change", "n"]


def results(rows, records, seed):
    """{"overall": {"all": summaries}, "source": {name: summaries}, "mode": {...}}; summaries: {model: metrics}."""

    def summaries(chosen):
        return {name: summarize([record[i] for i in chosen], seed) for name, record in records.items()}

    out = {"overall": {"all": summaries(range(len(rows)))}}
    for key in ("source", "mode"):
        names = sorted({row[key] for row in rows if row[key]})
        out[key] = {name: summaries([i for i, row in enumerate(rows) if row[key] == name]) for name in names}
    return out


def table_lines(found):
    """Cells (group, metric, base, tuned, change, n) of the printed table: a list of lines for every group."""
    for kind, groups in found.items():
        for group, models in groups.items():
            lines = []
            for metric, (label, unit) in METRICS.items():
                if metric not in models["base"]:
                    continue
                base, tuned = models["base"][metric], models["tuned"][metric]
                if metric == "empty" and not base["count"] + tuned["count"]:
                    continue  # worth a line only where it happens
                figures = ".4g" if unit == "tokens" else ".3f"
                cells = [f"{m['value']:{figures}} ({m['low']:{figures}}–{m['high']:{figures}})" for m in (base, tuned)]
                ratio, difference = tuned["value"] / (base["value"] or 1), tuned["value"] - base["value"]
                change = f"× {ratio:.3g}" if unit == "tokens" else f"{difference:+.3f}"
                first = "" if lines else group if kind == "overall" else f"{kind}: {group}"
                lines.append([first, label, *cells, change, f"{base[unit]:,}{' tokens' * (unit == 'tokens')}"])
            yield lines


def markdown(report, plotted):
    settings = report["settings"]
    lines = [f"# {settings['tuned']} against {settings['base']}", ""]
    lines += [f"{report['rows']['measured']} rows of {settings['data']} (sha256 {report['data_sha256'][:16]}), "]
    lines[-1] += f"greedy, at most {settings['max_new_tokens']} tokens, {settings['dtype']} on {settings['device']}."
    lines += ["", "| " + " | ".join(HEADER) + " |", "|---|---|---:|---:|---:|---:|"]
    escape = str.maketrans({"|": "\\|", "\n": " "})
    for group in table_lines(report["results"]):
        lines += ["| " + " | ".join(cell.translate(escape) for cell in cells) + " |" for cells in group]
    lines += ["", "Intervals: Wilson for rates, bootstrap over rows for perplexities."]
    lines += ["Change: a ratio for perplexities, a difference for rates. Each row's answers are in answers.jsonl.", ""]
    for reason, found in report["not_scored"].items():
        lines.append(f"- not scored: {found['count']} × {reason} (first: {found['first']})".translate(escape))
    lines += ["", "![loss](loss.png)"] if plotted else []
    return "\n".join(lines) + "\n"


def print_table(report):
    table = Table(*HEADER, title=f"{report['settings']['tuned']} against {report['settings']['base']}")
    for group in table_lines(report["results"]):
        for cells in group:
            table.add_row(*cells, end_section=cells is group[-1])
    # a pipe has no width, and rich would cut the table to 80 columns; a group's name is text, not markup
    Console(width=None if sys.stdout.isatty() else 130, markup=False, emoji=False, highlight=False).print(table)


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


def plot(series):
    """PNG (bytes) of a run's losses and learning rate."""
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
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()


def dumps(value, **options):
    return json.dumps(value, ensure_ascii=False, allow_nan=False, **options)


def parse_args(argv):
    parser = parser_of(__doc__)
    parser.add_argument("--base", required=True, help="folder or hub id of the model that training started from")
    parser.add_argument("--tuned", required=True, type=Path, help="run folder: an adapter (put on --base) or a model")
    parser.add_argument("--data", required=True, type=Path, help=".jsonl, .json or .parquet file, or dataset folder")
    parser.add_argument("--split", default="test", help="split of a dataset folder that has several")
    parser.add_argument("--out", type=Path, help="where the report goes (default: the tuned folder)")
    parser.add_argument("--rows", type=positive, help="measure so many rows, drawn by --seed (default: all)")
    parser.add_argument("--seed", type=int, default=42, help="of --rows and of the bootstrap")
    add_model_arguments(parser)
    parser.add_argument("--max_length", type=positive, help="tokens; what is longer is not scored (default: model's)")
    return parser.parse_args(argv)


def check_folders(args):
    """Refuse what cannot work before anything is loaded; True if --tuned is an adapter."""
    if not args.tuned.is_dir():
        raise BadInput(f"the tuned folder {args.tuned} does not exist: pass --tuned with a run folder")
    weights = {"adapter_config.json": "adapter_model.safetensors", "config.json": "model*.safetensors"}
    config = next((name for name in weights if (args.tuned / name).is_file()), None)
    if not config:
        raise BadInput(f"{args.tuned} is not a model: it has neither adapter_config.json nor config.json")
    if not any(args.tuned.glob(weights[config])):
        raise BadInput(f"{args.tuned} has no {weights[config]}: save the weights as safetensors")
    if Path(args.base).is_dir():
        if not Path(args.base, "config.json").is_file():
            raise BadInput(f"{args.base} is not a model: it has no config.json")
    elif not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", args.base):  # not the shape of a hub id
        raise BadInput(f"the base folder {args.base} does not exist: pass --base with a folder or a hub id")
    if args.out and args.out.exists() and not args.out.is_dir():
        raise BadInput(f"--out {args.out} is a file: pass a folder")
    return config == "adapter_config.json"


def select(args):
    """The rows to measure in the order of the data, and how many the data has."""
    rows = read_rows(args.data, args.split)
    if not rows:
        raise BadInput(f"{args.data} holds no rows: pass a set with at least one conversation")
    chosen = range(len(rows))
    if args.rows and args.rows < len(rows):
        chosen = sorted(random.Random(args.seed).sample(chosen, args.rows))
    return [clean_row(rows[i], i + 1) for i in chosen], len(rows)


def prepare_all(rows, tokenizer, stops, limit):
    """The rows that have an answer, prepared, and {reason: {count, first place}} of whatever cannot be scored."""
    count, first = Counter(), {}

    def skip(reason, place):
        count[reason] += 1
        first.setdefault(reason, place)

    answered = []
    for row in rows:
        if prepare(row, tokenizer, stops, limit, skip):
            answered.append(row)
        else:
            skip("row without an assistant turn", row["id"])
    not_scored = {reason: {"count": count[reason], "first": first[reason]} for reason in sorted(count)}
    lines = [f"{found['count']} x {reason} (first: {found['first']})" for reason, found in not_scored.items()]
    if not any(row["spans"] for row in answered):
        raise BadInput(f"no answer of the data can be scored ({'; '.join(lines)}): check the data and the template")
    for line in lines:
        print(f"not scored: {line}")
    return answered, not_scored


def answer_lines(rows, records):
    for i, row in enumerate(rows):
        if row["prompt"]:
            line = {key: row[key] for key in ("id", "source", "mode", "tags", "prompt_tail", "reference")}
            yield dumps(line | {name: {key: found[i][key] for key in FLAGS} for name, found in records.items()}) + "\n"


def compare(args):
    adapter, device = check_folders(args), "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"auto": "bfloat16" if device == "cuda" else "float32"}.get(args.dtype, args.dtype)
    loading = (getattr(torch, dtype), device, args.load_in_4bit)
    if device == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)

    rows, total = select(args)
    digest = hashlib.sha256("\n".join(json.dumps(row, sort_keys=True, default=str) for row in rows).encode())
    series = read_log(args.tuned)
    tokenizer, stops = load_tokenizer(args.tuned)
    model = load_model(args.base, tokenizer, *loading)
    check_vocabulary(args.base, tokenizer)
    limit = args.max_length or getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    rows, not_scored = prepare_all(rows, tokenizer, stops, limit)

    common = (rows, tokenizer, stops, args.batch_size, args.max_new_tokens)
    records = {"base": measure(model, *common, "base")}
    if adapter:
        model = add_adapter(model, args.tuned)
    else:
        del model  # one model in memory at a time
        gc.collect()
        torch.cuda.empty_cache()
        model = load_model(str(args.tuned), tokenizer, *loading)
    records["tuned"] = measure(model, *common, "tuned")

    report = {
        "settings": {  # names, not paths: the report is the same wherever the folders lie
            "base": Path(args.base).resolve().name if Path(args.base).is_dir() else args.base,
            "tuned": args.tuned.resolve().name,
            "adapter": adapter,
            "data": args.data.resolve().name,
            **{key: getattr(args, key) for key in ("split", "seed", "max_new_tokens", "batch_size", "load_in_4bit")},
            "dtype": dtype,
            "device": device,
            "max_length": limit,
            "stop_tokens": tokenizer.convert_ids_to_tokens(sorted(stops)),
        },
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "tokenizers")},
        "data_sha256": digest.hexdigest(),
        "rows": {"read": total, "measured": len(rows)},
        "not_scored": not_scored,
        "results": results(rows, records, args.seed),
    }
    files = {
        "report.json": dumps(report, indent=1) + "\n",
        "report.md": markdown(report, bool(series)),
        "answers.jsonl": "".join(answer_lines(rows, records)),
    }
    out = args.out or args.tuned
    if series:
        files["loss.png"] = plot(series)
    write_files(out, files)
    print_table(report)
    if not series:
        print(f"no loss.png: {args.tuned} has neither log.jsonl nor a checkpoint with trainer_state.json")
    print(f"wrote {', '.join(files)} to {out}")


def main(argv=None):
    return command("compare.py", compare, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
