"""Measure a model before and after fine-tuning with the same numbers: perplexity, usability, exact match, JSON, length.

    python -m eval.compare --base Qwen/Qwen3-4B-Instruct-2507 --tuned runs/qwen3_qlora --data my_set --split test
    python -m eval.compare --base base --tuned runs/a runs/b --data my_set --out runs/a_and_b

All models get the tuned folder's tokenizer and chat template, hence the same tokens. Every assistant turn k is
measured as it would be served: its prompt is the template on messages[:k] with the generation prompt, its output what
the template on messages[:k + 1] adds, up to and including the stop token. Perplexity takes all turns; text is
generated greedily for the last answer of each row. metrics.py defines the numbers, each over all rows and by source,
mode, tag and persona (whether a system message stands there). What cannot be scored is counted by reason; an answer
that fails (out of memory, over --timeout) counts against every rate.

JSON: a row with the tag json, or a schema: in its column json_schema or in a <schema> block of its messages. Without a
schema only validity and fields are measured. Where its reference is no JSON it is a negative example.

Writes report.json, report.md, report.html, answers.jsonl and loss.png to --out. What was measured is kept in OUT/.cache
by the hash of weights, tokens, settings and versions: run again with one more --tuned, or after a stop, and only what
is missing is measured; answers that failed are tried again, with their batch (a larger --timeout may help). The same
input gives the same bytes on one machine. In float32 the batch size moves perplexities by rounding only (about 1e-6);
in bfloat16 it can move their third digit and, where two tokens tie, a greedy answer: compare bfloat16 reports of one
--batch_size only.
"""

import base64
import gc
import hashlib
import io
import json
import os
import random
import re
import sys
from collections import Counter
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import xxhash
from rich.console import Console
from rich.table import Table

from data_prep.common.errors import UsageError
from data_prep.common.run_folder import plot_log, read_log
from eval.common import models
from eval.common.measure import clean_row, measure, prepare, read_rows
from eval.common.metrics import RATES, summarize
from eval.common.models import add_adapter, add_model_arguments, check_vocabulary, load_model, load_tokenizer, positive
from eval.common.page import page
from eval.common.scores import command, parser_of, write_files

# fmt: off
METRICS = {  # metric: (its name in the table, its unit of count, 1 where more is better, -1 less, 0 neither)
    "assistant_perplexity": ("assistant perplexity", "tokens", -1),
    "all_token_perplexity": ("all-token perplexity", "tokens", -1),
    "exact_match": ("exact match", "total", 1),
    "usability": ("usability", "total", 1),
    "stop_rate": ("stop rate", "total", 1),
    "loop_rate": ("loop rate", "total", -1),
    "abrupt_end_rate": ("abrupt ends", "total", -1),
    "control_token_rate": ("control tokens", "total", -1),
    "empty": ("empty answers", "total", -1),
    "failed": ("failed answers", "total", -1),
    "language_retention": ("language retention", "total", 1),
    "json_valid": ("JSON validity", "total", 1),
    "json_schema_valid": ("JSON schema validity", "total", 1),
    "json_field_match": ("JSON fields equal", "fields", 1),
    "json_exact_match": ("JSON all fields equal", "total", 1),
    "json_negative": ("JSON negative examples", "total", 1),
    "answer_tokens": ("answer length (tokens)", "rows", 0),
    "reference_tokens": ("reference length (tokens)", "rows", 0),
}
# fmt: on
RARE = {"control_token_rate", "empty", "failed"}  # worth a line only where they happen
SHORT = {"assistant_perplexity", "exact_match", "usability", "json_valid"}  # of each group on the terminal
FIGURES = {"tokens": ".4g", "rows": ".1f"}
FLAGS = ("answer", "answer_tokens", *RATES.values(), "json_equal", "json_fields")  # of each row in answers.jsonl


def results(rows, records, seed):
    """{"overall": {"all": summaries}, "source": {name: summaries}, "mode", "tag", "persona": …}; summaries: {model:
    metrics}."""

    def summaries(chosen):
        return {name: summarize([record[i] for i in chosen], seed) for name, record in records.items()}

    system = [any(message["role"] == "system" for message in row["messages"]) for row in rows]
    groups = {
        "source": [[row["source"]] for row in rows],
        "mode": [[row["mode"]] if row["mode"] else [] for row in rows],
        "tag": [row["tags"] for row in rows],
        "persona": [["persona" if one else "no persona"] if any(system) else [] for one in system],
    }
    out = {"overall": {"all": summaries(range(len(rows)))}}
    for kind, of in groups.items():
        names = sorted({name for own in of for name in own})
        out[kind] = {name: summaries([i for i, own in enumerate(of) if name in own]) for name in names}
    return out


def header(names):
    """The columns of a table: the first model is the base; each other with its change against that."""
    return [
        "group",
        "metric",
        f"{names[0]} (95%)",
        *[cell for name in names[1:] for cell in (f"{name} (95%)", "change")],
        "n",
    ]


def table_groups(measured, chosen=METRICS):
    """(title, [(cells, verdicts)]) of every group: cells as header() has them, without the group; verdicts: of each
    model but the base, "better" or "worse" where the intervals do not meet. A group of the same rows as one before (the
    tag of a source) is left out."""
    seen = []
    for kind, groups in measured.items():
        for group, found in groups.items():
            if found in seen:
                continue
            seen.append(found)
            base, *tuned = found.values()
            lines = []
            for metric, (label, unit, sign) in METRICS.items():
                if metric not in base or (kind != "overall" and metric not in chosen):
                    continue
                if metric in RARE and not sum(one[metric]["count"] for one in found.values()):
                    continue
                cells, verdicts = [label, shown(base[metric], unit)], []
                for one in tuned:
                    cells += [shown(one.get(metric), unit), change(base[metric], one.get(metric), unit)]
                    verdicts.append(verdict(base[metric], one.get(metric), sign))
                cells.append(f"{base[metric][unit]:,}{f' {unit}' * (unit in ('tokens', 'fields'))}")
                lines.append((cells, verdicts))
            yield group if kind == "overall" else f"{kind}: {group}", lines


def verdict(base, tuned, sign):
    if not tuned or not sign or (tuned["low"] <= base["high"] and base["low"] <= tuned["high"]):
        return ""
    return "better" if (tuned["value"] > base["value"]) == (sign > 0) else "worse"


def shown(found, unit):
    figures = FIGURES.get(unit, ".3f")
    return f"{found['value']:{figures}} ({found['low']:{figures}}–{found['high']:{figures}})" if found else "none"


def change(base, tuned, unit):
    """A ratio of perplexities, a difference of anything else."""
    if not tuned:
        return ""
    if unit == "tokens":
        return f"× {tuned['value'] / base['value']:.3g}"
    return f"{tuned['value'] - base['value']:+{FIGURES.get(unit, '.3f')}}"


def told(report):
    """A report's counts of what was not scored, one sentence each."""
    for reason, found in report["not_scored"].items():
        yield f"not scored: {found['count']} × {reason} (first: {found['first']})"
    for name, reasons in report["failed"].items():
        for reason, found in reasons.items():
            yield f"{name}: {found['count']} answers failed: {reason} (first: {found['first']})"


def said(report):
    """What was measured, in a sentence."""
    settings = report["settings"]
    return (
        f"{report['rows']['measured']} rows of {settings['data']} (sha256 {report['data_sha256'][:16]}), greedy, "
        f"at most {settings['max_new_tokens']} tokens, {settings['dtype']} on {settings['device']}."
    )


NOTES = (
    "Intervals (95%): Wilson for rates, bootstrap over rows for perplexities, lengths and fields.",
    "Change: a ratio for perplexities, a difference for the rest.",
)


def markdown(report, plotted):
    columns = header([*report["results"]["overall"]["all"]])
    lines = [f"# {report['settings']['tuned']} against {report['settings']['base']}", "", said(report), ""]
    lines += ["| " + " | ".join(columns) + " |", "|---|---|" + "---:|" * (len(columns) - 2)]
    escape = str.maketrans({"|": "\\|", "\n": " "})
    for group, found in table_groups(report["results"]):
        for number, (cells, _) in enumerate(found):
            line = ["" if number else group, *cells]
            lines.append("| " + " | ".join(cell.translate(escape) for cell in line) + " |")
    lines += [
        "",
        *NOTES,
        "Each row's answers are in answers.jsonl; those that changed most, side by side, in report.html.",
        "",
    ]
    lines += [f"- {line}".translate(escape) for line in told(report)]
    lines += ["", "![loss](loss.png)"] if plotted else []
    return "\n".join(lines) + "\n"


def html(report, lines, series, tokenizer):
    names, groups = [*report["results"]["overall"]["all"]], list(table_groups(report["results"]))
    chips = [token.content for token in tokenizer.added_tokens_decoder.values()]
    title = f"{report['settings']['tuned']} against {report['settings']['base']}"
    return page(title, [said(report), *NOTES], [*told(report)], header(names), groups, lines, names, series, chips)


def print_table(report):
    columns = header([*report["results"]["overall"]["all"]])
    table = Table(*columns, title=f"{report['settings']['tuned']} against {report['settings']['base']}")
    for group, found in table_groups(report["results"], SHORT):
        for number, (cells, _) in enumerate(found):
            table.add_row("" if number else group, *cells, end_section=number == len(found) - 1)
    # a pipe has no width, and rich would cut the table to 80 columns; a group's name is text, not markup
    width = None if sys.stdout.isatty() else 90 + 20 * len(columns)
    Console(width=width, markup=False, emoji=False, highlight=False).print(table)


def dumps(value, **options):
    return json.dumps(value, ensure_ascii=False, allow_nan=False, **options)


# -- what is kept -----------------------------------------------------------------------------------------------------
@contextmanager
def writing(folder):
    """An error of the disk as UsageError."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot write to {folder} ({error.strerror}): make room or pass another --out") from None


class Kept(dict):
    """{index: result} in a file too, a line for every batch. What a run left that was killed is read again.

    lasts: whether a result goes to the file; the next run tries the others again."""

    def __init__(self, path, pack, unpack, lasts=lambda value: True):
        super().__init__()
        self.path, self.pack, self.lasts = path, pack, lasts
        data = path.read_bytes() if path.is_file() else b""
        whole = data[: data.rfind(b"\n") + 1]  # a killed run was writing the rest
        try:
            for line in whole.splitlines():
                super().update((index, unpack(value)) for index, value in json.loads(line))
        except (ValueError, TypeError):  # damaged: measured again
            self.clear()
            whole = b""
        if whole != data:
            path.write_bytes(whole)

    def update(self, found):
        found = dict(found)
        super().update(found)
        lasting = [[index, self.pack(value)] for index, value in found.items() if self.lasts(value)]
        with writing(self.path.parent.parent), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(lasting) + "\n")


def kept_losses(path):
    return Kept(
        path,
        lambda losses: base64.b64encode(losses.astype("<f4").tobytes()).decode(),  # as computed
        lambda text: np.frombuffer(base64.b64decode(text), "<f4").astype(float),
    )


def kept_answers(path):
    return Kept(path, list, lambda found: models.Output(*found), lambda output: not output.failed)


def content(name):
    """What a folder's model is: a hash of its configuration and weights; a hub id is what it is."""
    if not Path(name).is_dir():
        return str(name)
    digest = xxhash.xxh3_128()
    for path in sorted(Path(name).glob("*")):
        if path.suffix == ".safetensors" or path.name in ("config.json", "adapter_config.json"):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


# -- the command ------------------------------------------------------------------------------------------------------
def parse_args(argv):
    parser = parser_of(__doc__)
    parser.add_argument("--base", required=True, help="folder or hub id of the model that training started from")
    parser.add_argument(
        "--tuned", required=True, type=Path, nargs="+", help="run folders: adapters (put on --base) or models"
    )
    parser.add_argument("--data", required=True, type=Path, help=".jsonl, .json or .parquet file, or dataset folder")
    parser.add_argument("--split", default="test", help="split of a dataset folder that has several")
    parser.add_argument("--out", type=Path, help="where the report goes (default: the tuned folder, if it is one)")
    parser.add_argument("--rows", type=positive, help="measure so many rows, drawn by --seed (default: all)")
    parser.add_argument("--seed", type=int, default=42, help="of --rows and of the bootstrap")
    add_model_arguments(parser)
    parser.add_argument("--max_length", type=positive, help="tokens; what is longer is not scored (default: model's)")
    return parser.parse_args(argv)


def names_of(folders):
    """The name of each tuned folder: "tuned" if it is the only one, else as much of its path's end as tells it."""
    if len(folders) == 1:
        return ["tuned"]
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise UsageError("--tuned names a folder twice: pass each once")
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len({"base", *names}) > len(names):
            return names


def check_folders(args):
    """Refuse what cannot work before anything is loaded; whether each of --tuned is an adapter."""
    weights = {"adapter_config.json": "adapter_model.safetensors", "config.json": "model*.safetensors"}
    adapters = []
    for tuned in args.tuned:
        if not tuned.is_dir():
            raise UsageError(f"the tuned folder {tuned} does not exist: pass --tuned with a run folder")
        config = next((name for name in weights if (tuned / name).is_file()), None)
        if not config:
            raise UsageError(f"{tuned} is not a model: it has neither adapter_config.json nor config.json")
        if not any(tuned.glob(weights[config])):
            raise UsageError(f"{tuned} has no {weights[config]}: save the weights as safetensors")
        adapters.append(config == "adapter_config.json")
    if Path(args.base).is_dir():
        if not Path(args.base, "config.json").is_file():
            raise UsageError(f"{args.base} is not a model: it has no config.json")
    elif not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", args.base):  # not the shape of a hub id
        raise UsageError(f"the base folder {args.base} does not exist: pass --base with a folder or a hub id")
    if len(args.tuned) > 1 and not args.out:
        raise UsageError("--out is missing: say where the report of several models goes")
    if args.out and args.out.exists() and not args.out.is_dir():
        raise UsageError(f"--out {args.out} is a file: pass a folder")
    return adapters


def select(args):
    """The rows to measure in the order of the data, and how many the data has."""
    rows = read_rows(args.data, args.split)
    if not rows:
        raise UsageError(f"{args.data} holds no rows: pass a set with at least one conversation")
    chosen = range(len(rows))
    if args.rows and args.rows < len(rows):
        chosen = sorted(random.Random(args.seed).sample(chosen, args.rows))
    return [clean_row(rows[i], i + 1) for i in chosen], len(rows)


def prepare_all(rows, tokenizer, stops, limit):
    """Copies of the rows that have an answer, prepared, and {reason: {count, first place}} of what cannot be scored."""
    count, first = Counter(), {}

    def skip(reason, place):
        count[reason] += 1
        first.setdefault(reason, place)

    answered = []
    for row in map(dict, rows):
        if prepare(row, tokenizer, stops, limit, skip):
            answered.append(row)
        else:
            skip("row without an assistant turn", row["id"])
    not_scored = {reason: {"count": count[reason], "first": first[reason]} for reason in sorted(count)}
    if not any(row["spans"] for row in answered):
        lines = [f"{found['count']} x {reason} (first: {found['first']})" for reason, found in not_scored.items()]
        raise UsageError(f"no answer of the data can be scored ({'; '.join(lines)}): check the data and the template")
    return answered, not_scored


def to_run(rows, stops):
    """What a model is given of prepared rows, as a hash: equal where two tokenizers and templates do not differ."""
    parts = [[row["sequences"], row["spans"], row["prompt"]] for row in rows]
    return hashlib.sha256(json.dumps([parts, sorted(stops)]).encode()).hexdigest()


def failures(rows, records):
    """{model: {reason: {count, first row}}} of the answers that failed."""
    out = {name: {} for name in records}
    for name, found in records.items():
        for row, record in zip(rows, found, strict=True):
            if record["failed"]:
                out[name].setdefault(record["failed"], {"count": 0, "first": row["id"]})["count"] += 1
    return out


def answer_lines(rows, records):
    """The lines of answers.jsonl, as dicts."""
    for i, row in enumerate(rows):
        if row["prompt"]:
            line = {key: row[key] for key in ("id", "source", "mode", "tags", "prompt_tail", "reference")}
            yield line | {name: {key: found[i][key] for key in FLAGS} for name, found in records.items()}


def records_of(args, names, adapters, model, loading, rows, tokenizer, stops, out):
    """{model: its records}; what OUT/.cache holds is not measured again. model: the base, loaded."""
    settings = [*map(str, loading), args.batch_size, args.max_new_tokens, to_run(rows, stops), content(args.base)]
    settings += [version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")]
    settings += [
        torch.cuda.get_device_name() if loading[1] == "cuda" else "",
        getattr(model.config, "_commit_hash", ""),
    ]
    settings += [Path(models.__file__).read_text(encoding="utf-8")]  # another way to run is another result
    total = sum(len(row["sequences"]) for row in rows), sum(bool(row["prompt"]) for row in rows)
    records, cache = {}, out / ".cache"
    for name, folder, adapter in zip(["base", *names], [None, *args.tuned], [False, *adapters], strict=True):
        key = hashlib.sha256(dumps([*settings, folder and content(folder)]).encode()).hexdigest()[:32]
        with writing(out):
            (out / ".cache").mkdir(parents=True, exist_ok=True)
            losses, answers = (
                kept_losses(out / ".cache" / f"{key}.losses"),
                kept_answers(out / ".cache" / f"{key}.answers"),
            )
        running = None
        if (len(losses), len(answers)) == total:
            print(f"{name}: measured before, read from {cache}")
        elif not folder:
            running = model
        else:
            if not adapter or not model:
                model = None  # one model in memory at a time
                gc.collect()
                torch.cuda.empty_cache()
                running = load_model(args.base if adapter else str(folder), tokenizer, *loading)
            if adapter:
                running, model = add_adapter(running or model, folder), None
        steps = {
            "losses": partial(models.token_losses, kept=losses),
            "answers": partial(models.generate, timeout=args.timeout, kept=answers),
        }
        records[name] = measure(running, rows, tokenizer, stops, args.batch_size, args.max_new_tokens, name, **steps)
    return records


def compare(args):
    adapters, device = check_folders(args), "cuda" if torch.cuda.is_available() else "cpu"
    names, out = names_of(args.tuned), args.out or args.tuned[0]
    dtype = {"auto": "bfloat16" if device == "cuda" else "float32"}.get(args.dtype, args.dtype)
    loading = (getattr(torch, dtype), device, args.load_in_4bit)
    if device == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)

    data, total = select(args)
    digest = hashlib.sha256("\n".join(json.dumps(row, sort_keys=True, default=str) for row in data).encode())
    series = {name: read_log(folder) for name, folder in zip(names, args.tuned, strict=True)}
    tokenizer, stops = load_tokenizer(args.tuned[0])
    model = load_model(args.base, tokenizer, *loading)
    check_vocabulary(args.base, tokenizer)
    limit = args.max_length or getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    rows, not_scored = prepare_all(data, tokenizer, stops, limit)
    for folder in args.tuned[1:]:
        other, its_stops = load_tokenizer(folder)
        if to_run(prepare_all(data, other, its_stops, limit)[0], its_stops) != to_run(rows, stops):
            raise UsageError(
                f"{folder} has another tokenizer, template or stop token than {args.tuned[0]}: the base would be "
                "measured on other tokens, so compare it in a run of its own"
            )
    records = records_of(args, names, adapters, model, loading, rows, tokenizer, stops, out)

    folders = [folder.resolve().name for folder in args.tuned] if len(names) == 1 else names
    report = {
        "settings": {  # names, not paths: the report is the same wherever the folders lie
            "base": Path(args.base).resolve().name if Path(args.base).is_dir() else args.base,
            "tuned": ", ".join(folders),
            "adapter": adapters[0] if len(names) == 1 else dict(zip(names, adapters, strict=True)),
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
        "failed": failures(rows, records),
        "results": results(rows, records, args.seed),
    }
    lines = list(answer_lines(rows, records))
    one = series[names[0]] if len(names) == 1 else {}
    files = {
        "report.json": dumps(report, indent=1) + "\n",
        "report.md": markdown(report, bool(one)),
        "report.html": html(report, lines, series, tokenizer),
        "answers.jsonl": "".join(dumps(line) + "\n" for line in lines),
    }
    if one:
        picture = io.BytesIO()
        plot_log(one, picture)
        files["loss.png"] = picture.getvalue()
    write_files(out, files)
    print_table(report)
    for line in told(report):
        print(line)
    for name, folder in zip(names, args.tuned, strict=True):
        if not series[name]:
            print(f"no loss curve: {folder} has neither log.jsonl nor a checkpoint with trainer_state.json")
    print(f"wrote {', '.join(files)} to {out}")


def main(argv=None):
    return command("compare.py", compare, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
