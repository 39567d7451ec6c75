"""Measure a model before and after fine-tuning with the same numbers: perplexity, usability, exact match, JSON, length.

    python -m eval.compare --base Qwen/Qwen3-4B-Instruct-2507 --tuned runs/qwen3_qlora --data my_set --split test
    python -m eval.compare --base base --tuned runs/a runs/b --data my_set --out runs/a_and_b

All models get the tuned folder's tokenizer and chat template, hence the same tokens. Every assistant turn k is
measured as it would be served: its prompt is the template on messages[:k] with the generation prompt, its output what
the template on messages[:k + 1] adds, up to and including the stop token. Perplexity takes all turns; text is
generated greedily for the last answer of each row. Answers are taken apart as the template's family writes them: a
thought that never ends is an empty answer. metrics.py defines the numbers, each over all rows and by source, mode, tag
and persona (whether a system message stands there). What cannot be scored is counted by reason; an answer that fails
(out of memory, over --timeout) counts against every rate.

JSON: a row with the tag json, json-only or strict, or with a schema: in its column json_schema or in a <schema> block
of its messages. Without a schema only validity and fields are measured. The tag json_negative marks rows whose right
answer is no JSON. A row whose own answer contradicts its tag or does not parse is an error of the data, and counted.

A figure is coloured where the 95% interval of its change, over the pairs of rows, leaves no change out. The reports
write n, the rows behind a figure (a question asked with and without thinking is one), and fold groups of fewer than
ten.

Writes report.json, report.md, report.html, answers.jsonl and loss.png to --out. What was measured is kept in OUT/.cache
by the hash of weights, tokens, settings and versions: run again with one more --tuned, or after a stop, and only what
is missing is measured; answers that failed are tried again, with their batch (a larger --timeout may help). The same
input gives the same bytes on one machine. In float32 the batch size moves perplexities by rounding only (about 1e-6);
in bfloat16 it can move their third digit and, where two tokens tie, a greedy answer: compare bfloat16 reports of one
--batch_size only.
"""

import argparse
import gc
import hashlib
import io
import json
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_prep.common.answer_formats import GENERIC
from data_prep.common.answers import find_family
from data_prep.common.errors import UsageError
from data_prep.common.run_folder import plot_log, read_log
from data_prep.common.terminal import STYLES, make_console
from eval.common import models
from eval.common.arguments import add_model_arguments, positive
from eval.common.before_after import (
    BASE,
    FEW_ROWS,
    SHORT,
    Cell,
    Group,
    compute_results,
    list_columns,
    list_groups,
)
from eval.common.kept import Kept, hash_model, kept_answers, kept_losses, writing
from eval.common.measure import PreparedRow, clean_row, measure, prepare, read_rows
from eval.common.metrics import RATES, Record
from eval.common.models import add_adapter, check_vocabulary, load_model, load_tokenizer
from eval.common.page import PageContent, render_page
from eval.common.scores import command, parser_of, write_files

FLAGS = ("answer", "answer_tokens", *RATES.values(), "json_equal", "json_fields")  # of each row in answers.jsonl
WEIGHTS = {"adapter_config.json": "adapter_model.safetensors", "config.json": "model*.safetensors"}
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
PIPE_WIDTH = 90  # columns of a table in a file or a pipe, which has no width: rich would cut it to 80
PIPE_WIDTH_OF_COLUMN = 20
NOTES = (
    "Intervals (95%): Wilson for rates, bootstrap (BCa) over rows for perplexities, lengths and fields; none for fewer "
    "than six rows.",
    "Change: a ratio for perplexities, a difference for the rest, over the pairs of rows; coloured where its interval "
    "leaves no change out.",
    "n: rows behind the figure, of the base and of each model where they differ; rows that ask one question with and "
    "without thinking count once. Intervals are over rows.",
    "Exact match: texts equal behind the thought and the same calls; where the reference ends in `#### x`, the number "
    "by GSM8K's rule. Cut answers: not stopped in budget, or within a thought or call.",
)


# -- the report as text -----------------------------------------------------------------------------------------------
def describe_losses(report: dict) -> Iterator[str]:
    """Yield a report's counts of what was not scored, one sentence each."""
    for reason, places in report["not_scored"].items():
        yield f"not scored: {places['count']} × {reason} (first: {places['first']})"
    for name, reasons in report["failed"].items():
        for reason, places in reasons.items():
            yield f"{name}: {places['count']} answers failed: {reason} (first: {places['first']})"
    if report["settings"]["family"] == GENERIC:
        yield "the template's family is not known: thoughts are read in <think>, calls as JSON between <tool_call> tags"
    figures = report["results"]["overall"]["all"][BASE]
    answers = figures.get("failed", {}).get("total", 0)
    unmeasured = answers - figures.get("language_retention", {}).get("total", 0)
    if unmeasured:
        yield (
            f"language retention: {unmeasured:,} rows not measured, whose question and reference are not both clearly "
            "in one language"
        )


def describe_run(report: dict) -> str:
    """Return what was measured, in a sentence."""
    settings = report["settings"]
    return (
        f"{report['rows']['measured']} rows of {settings['data']} (sha256 {report['data_sha256'][:16]}), greedy, "
        f"at most {settings['max_new_tokens']} tokens, {settings['dtype']} on {settings['device']}."
    )


def describe_few(groups: Sequence[Group]) -> str:
    """Return which groups are left out of a table, "" where none is."""
    few = [f"{group.title} ({group.size})" for group in groups if group.is_few]
    if not few:
        return ""
    return f"Groups of fewer than {FEW_ROWS} rows, in report.json and report.html: {', '.join(few)}."


def name_report(report: dict) -> str:
    return f"{report['settings']['tuned']} against {report['settings']['base']}"


def list_models(report: dict) -> list[str]:
    """Return the names of a report's models, the base first."""
    return list(report["results"]["overall"]["all"])


def table_line(cells: Iterable[object]) -> str:
    """Return a line of a markdown table."""
    escape = str.maketrans({"|": "\\|", "\n": " "})
    return "| " + " | ".join([str(cell).translate(escape) for cell in cells]) + " |"


def make_markdown(report: dict, has_picture: bool) -> str:
    """Return report.md."""
    columns = ["group", *list_columns(list_models(report))]
    groups = list(list_groups(report["results"]))
    lines = [f"# {name_report(report)}", "", describe_run(report), ""]
    lines += [table_line(columns), "|---|---|" + "---:|" * (len(columns) - 2)]
    for group in groups:
        if group.is_few:
            continue
        for number, line in enumerate(group.lines):
            title = "" if number else group.title
            lines.append(table_line([title, line.label, *line.cells, line.n]))
    lines += ["", *NOTES]
    if describe_few(groups):
        lines.append(describe_few(groups).replace("|", "\\|"))
    lines += ["Each row's answers are in answers.jsonl; those that changed most, side by side, in report.html.", ""]
    for sentence in describe_losses(report):
        lines.append(f"- {sentence}".replace("|", "\\|").replace("\n", " "))
    if has_picture:
        lines += ["", "![loss](loss.png)"]
    return "\n".join(lines) + "\n"


def make_page(report: dict, lines: list[dict], series: dict, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return report.html. lines: of answers.jsonl; series: read_log's, by model."""
    names = list_models(report)
    content = PageContent(
        title=name_report(report),
        notes=[describe_run(report), *NOTES],
        findings=list(describe_losses(report)),
        columns=list_columns(names),
        groups=list(list_groups(report["results"])),
        lines=lines,
        names=names,
        series=series,
        chips=[token.content for token in tokenizer.added_tokens_decoder.values()],
    )
    return render_page(content)


def print_table(report: dict) -> None:
    """Print the table, coloured as the page is."""
    columns = ["group", *list_columns(list_models(report))]
    table = Table(*columns, title=Text(name_report(report)))
    groups = list(list_groups(report["results"], SHORT))
    for group in groups:
        if group.is_few:
            continue
        for number, line in enumerate(group.lines):
            title = "" if number else group.title
            cells = [colour_cell(cell) for cell in line.cells]
            table.add_row(title, line.label, *cells, line.n, end_section=number == len(group.lines) - 1)
    console = make_console(PIPE_WIDTH + PIPE_WIDTH_OF_COLUMN * len(columns))
    console.print(table)
    if describe_few(groups):
        console.print(describe_few(groups), soft_wrap=True)


def colour_cell(cell: Cell) -> Text:
    return Text(str(cell), STYLES[cell.verdict])


def dump_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)


# -- arguments and input ----------------------------------------------------------------------------------------------
def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
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


def names_of(folders: Sequence[Path]) -> list[str]:
    """Return the name of each tuned folder: "tuned" if it is the only one, else as much of its path's end as tells it.

    Raises UsageError.
    """
    if len(folders) == 1:
        return ["tuned"]
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise UsageError("--tuned names a folder twice: pass each once")
    names: list[str] = []
    depth = 0
    while len({BASE, *names}) <= len(paths):
        depth += 1
        names = ["/".join(path.parts[-depth:]) for path in paths]
    return names


def check_folders(args: argparse.Namespace) -> list[bool]:
    """Refuse what cannot work before anything is loaded; return whether each of --tuned is an adapter."""
    adapters = []
    for tuned in args.tuned:
        if not tuned.is_dir():
            raise UsageError(f"the tuned folder {tuned} does not exist: pass --tuned with a run folder")
        configs = [name for name in WEIGHTS if (tuned / name).is_file()]
        if not configs:
            raise UsageError(f"{tuned} is not a model: it has neither adapter_config.json nor config.json")
        if not any(tuned.glob(WEIGHTS[configs[0]])):
            raise UsageError(f"{tuned} has no {WEIGHTS[configs[0]]}: save the weights as safetensors")
        adapters.append(configs[0] == "adapter_config.json")
    if Path(args.base).is_dir():
        if not Path(args.base, "config.json").is_file():
            raise UsageError(f"{args.base} is not a model: it has no config.json")
    elif not HUB_ID.fullmatch(args.base):
        raise UsageError(f"the base folder {args.base} does not exist: pass --base with a folder or a hub id")
    if len(args.tuned) > 1 and not args.out:
        raise UsageError("--out is missing: say where the report of several models goes")
    if args.out and args.out.exists() and not args.out.is_dir():
        raise UsageError(f"--out {args.out} is a file: pass a folder")
    return adapters


@dataclass
class Selection:
    """The rows to measure in the order of the data, and how many the data has."""

    rows: list[dict]
    total: int

    def hash(self) -> str:
        lines = [json.dumps(row, sort_keys=True, default=str) for row in self.rows]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def select(args: argparse.Namespace) -> Selection:
    """Return the rows to measure: all, or --rows of them drawn by --seed."""
    rows = read_rows(args.data, args.split)
    if not rows:
        raise UsageError(f"{args.data} holds no rows: pass a set with at least one conversation")
    numbers: Sequence[int] = range(len(rows))
    if args.rows and args.rows < len(rows):
        numbers = sorted(random.Random(args.seed).sample(numbers, args.rows))
    return Selection([clean_row(rows[number], number + 1) for number in numbers], len(rows))


class Skipped:
    """What cannot be scored, by reason: how often, and the first place."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def skip(self, reason: str, place: str) -> None:
        self.counts[reason] += 1
        self.first.setdefault(reason, place)

    def to_json(self) -> dict[str, dict]:
        return {reason: {"count": self.counts[reason], "first": self.first[reason]} for reason in sorted(self.counts)}


@dataclass
class PreparedData:
    """The rows that have an answer, rendered, and what of them cannot be scored."""

    rows: list[PreparedRow]
    stops: set[int]
    skipped: Skipped

    def hash(self) -> str:
        """Return a hash of what a model is given: equal where two tokenizers and templates do not differ."""
        parts = []
        for row in self.rows:
            spans = [[span.sequence, span.start, span.end] for span in row.spans]
            parts.append([row.sequences, spans, row.asked.prompt_ids if row.asked else None])
        return hashlib.sha256(json.dumps([parts, sorted(self.stops)]).encode()).hexdigest()


def prepare_all(rows: Sequence[dict], tokenizer: PreTrainedTokenizerBase, stops: set[int], limit: int) -> PreparedData:
    """Return rows of clean_row prepared under a tokenizer. Raises UsageError where no answer can be scored."""
    data = PreparedData([], stops, Skipped())
    for row in rows:
        prepared = prepare(row, tokenizer, stops, limit, data.skipped.skip)
        if prepared is None:
            data.skipped.skip("row without an assistant turn", row["id"])
        else:
            data.rows.append(prepared)
    if not any([row.spans for row in data.rows]):
        reasons = []
        for reason, places in data.skipped.to_json().items():
            reasons.append(f"{places['count']} x {reason} (first: {places['first']})")
        raise UsageError(f"no answer of the data can be scored ({'; '.join(reasons)}): check the data and the template")
    return data


# -- models and records -----------------------------------------------------------------------------------------------
@dataclass
class Loading:
    """How models are loaded. dtype: the name of a torch dtype."""

    dtype: str
    device: str
    load_in_4bit: bool


def choose_loading(args: argparse.Namespace) -> Loading:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = args.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    return Loading(dtype, device, args.load_in_4bit)


@dataclass
class Candidate:
    """A model that is measured. folder: None is the base."""

    name: str
    folder: Path | None = None
    is_adapter: bool = False


class Loader:
    """Loads candidates, one model in memory at a time; an adapter is put on a base that no other has changed."""

    def __init__(self, base: str, tokenizer: PreTrainedTokenizerBase, loading: Loading) -> None:
        self.base = base
        self.tokenizer = tokenizer
        self.loading = loading
        self.clean_base: PreTrainedModel | None = self.load(base)
        self.context = getattr(self.clean_base.config.get_text_config(), "max_position_embeddings", None)
        self.commit = getattr(self.clean_base.config, "_commit_hash", "")

    def load(self, name: str) -> PreTrainedModel:
        dtype = getattr(torch, self.loading.dtype)
        return load_model(name, self.tokenizer, dtype, self.loading.device, self.loading.load_in_4bit)

    def open(self, candidate: Candidate) -> PreTrainedModel:
        """Return the model of a candidate. Raises UsageError."""
        if candidate.folder is None:
            return self.clean_base
        if candidate.is_adapter and self.clean_base is not None:
            base = self.clean_base
            self.clean_base = None
            return add_adapter(base, candidate.folder)
        self.clean_base = None
        gc.collect()
        torch.cuda.empty_cache()
        if candidate.is_adapter:
            return add_adapter(self.load(self.base), candidate.folder)
        return self.load(str(candidate.folder))


def measure_all(
    args: argparse.Namespace, candidates: Sequence[Candidate], loader: Loader, data: PreparedData, out: Path
) -> dict[str, list[Record]]:
    """Return the records of every candidate; what OUT/.cache holds is not measured again."""
    settings = cache_settings(args, loader, data)
    sequences = sum([len(row.sequences) for row in data.rows])
    prompts = len([row for row in data.rows if row.asked])
    records = {}
    for candidate in candidates:
        weights = hash_model(candidate.folder) if candidate.folder else None
        key = hashlib.sha256(dump_json([*settings, weights]).encode()).hexdigest()[:32]
        with writing(out):
            (out / ".cache").mkdir(parents=True, exist_ok=True)
            losses: Kept = kept_losses(out / ".cache" / f"{key}.losses")
            answers: Kept = kept_answers(out / ".cache" / f"{key}.answers")
        model = None
        if len(losses) == sequences and len(answers) == prompts:
            print(f"{candidate.name}: measured before, read from {out / '.cache'}")
        else:
            model = loader.open(candidate)
        records[candidate.name] = measure(
            model,
            data.rows,
            loader.tokenizer,
            data.stops,
            args.batch_size,
            args.max_new_tokens,
            candidate.name,
            losses=partial(models.token_losses, kept=losses),
            answers=partial(models.generate, timeout=args.timeout, kept=answers),
        )
    return records


def cache_settings(args: argparse.Namespace, loader: Loader, data: PreparedData) -> list[object]:
    """Return all that a result depends on besides the weights of the tuned model."""
    loading = loader.loading
    settings: list[object] = [loading.dtype, loading.device, loading.load_in_4bit, args.batch_size]
    settings += [args.max_new_tokens, data.hash(), hash_model(args.base), loader.commit]
    settings += [version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")]
    if loading.device == "cuda":
        settings.append(torch.cuda.get_device_name())
    # another way to run is another result
    settings.append(Path(models.__file__).read_text(encoding="utf-8"))
    return settings


def list_failures(rows: Sequence[PreparedRow], records: dict[str, list[Record]]) -> dict[str, dict[str, dict]]:
    """Return {model: {reason: {count, first row}}} of the answers that failed."""
    failures = {}
    for name, own in records.items():
        skipped = Skipped()
        for prepared, record in zip(rows, own, strict=True):
            if record["failed"]:
                skipped.skip(record["failed"], prepared.row["id"])
        failures[name] = skipped.to_json()
    return failures


def answer_lines(rows: Sequence[PreparedRow], records: dict[str, list[Record]]) -> Iterator[dict]:
    """Yield the lines of answers.jsonl."""
    for number, prepared in enumerate(rows):
        if prepared.asked is None:
            continue
        line = {key: prepared.row[key] for key in ("id", "source", "mode", "tags")}
        line["prompt_tail"] = prepared.asked.prompt_tail
        line["reference"] = prepared.asked.reference
        for name, own in records.items():
            line["compared"] = own[number]["compared"]
            line[name] = {key: own[number][key] for key in FLAGS}
        yield line


# -- the command ------------------------------------------------------------------------------------------------------
def compare(args: argparse.Namespace) -> None:
    adapters = check_folders(args)
    names = names_of(args.tuned)
    out = args.out or args.tuned[0]
    loading = choose_loading(args)
    if loading.device == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)

    selection = select(args)
    series = {name: read_log(folder) for name, folder in zip(names, args.tuned, strict=True)}
    tokenizer, stops = load_tokenizer(args.tuned[0])
    loader = Loader(args.base, tokenizer, loading)
    check_vocabulary(args.base, tokenizer)
    limit = args.max_length or loader.context or sys.maxsize
    data = prepare_all(selection.rows, tokenizer, stops, limit)
    for folder in args.tuned[1:]:
        other, its_stops = load_tokenizer(folder)
        if prepare_all(selection.rows, other, its_stops, limit).hash() != data.hash():
            raise UsageError(
                f"{folder} has another tokenizer, template or stop token than {args.tuned[0]}: the base would be "
                "measured on other tokens, so compare it in a run of its own"
            )
    candidates = [Candidate(BASE)]
    for name, folder, is_adapter in zip(names, args.tuned, adapters, strict=True):
        candidates.append(Candidate(name, folder, is_adapter))
    records = measure_all(args, candidates, loader, data, out)

    folders = [folder.resolve().name for folder in args.tuned] if len(names) == 1 else names
    report = {
        "settings": {  # names, not paths: the report is the same wherever the folders lie
            "base": Path(args.base).resolve().name if Path(args.base).is_dir() else args.base,
            "tuned": ", ".join(folders),
            "adapter": adapters[0] if len(names) == 1 else dict(zip(names, adapters, strict=True)),
            "data": args.data.resolve().name,
            "split": args.split,
            "seed": args.seed,
            "max_new_tokens": args.max_new_tokens,
            "batch_size": args.batch_size,
            "load_in_4bit": args.load_in_4bit,
            "dtype": loading.dtype,
            "device": loading.device,
            "max_length": limit,
            "family": find_family(tokenizer.chat_template),  # by which answers are read
            "stop_tokens": tokenizer.convert_ids_to_tokens(sorted(stops)),
        },
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "tokenizers")},
        "data_sha256": selection.hash(),
        "rows": {"read": selection.total, "measured": len(data.rows)},
        "not_scored": data.skipped.to_json(),
        "failed": list_failures(data.rows, records),
        "results": compute_results(data.rows, records, args.seed),
    }
    files = make_files(report, list(answer_lines(data.rows, records)), series, tokenizer)
    write_files(out, files)
    print_table(report)
    for sentence in describe_losses(report):
        print(sentence)
    for name, folder in zip(names, args.tuned, strict=True):
        if not series[name]:
            print(f"no loss curve: {folder} has neither log.jsonl nor a checkpoint with trainer_state.json")
    print(f"wrote {', '.join(files)} to {out}")


def make_files(
    report: dict, lines: list[dict], series: dict, tokenizer: PreTrainedTokenizerBase
) -> dict[str, str | bytes]:
    """Return {name: content} of what goes to --out; loss.png where there is one tuned model with a log."""
    logs = list(series.values())
    has_picture = len(logs) == 1 and bool(logs[0])
    files: dict[str, str | bytes] = {
        "report.json": dump_json(report, indent=1) + "\n",
        "report.md": make_markdown(report, has_picture),
        "report.html": make_page(report, lines, series, tokenizer),
        "answers.jsonl": "".join([dump_json(line) + "\n" for line in lines]),
    }
    if has_picture:
        picture = io.BytesIO()
        plot_log(logs[0], picture)
        files["loss.png"] = picture.getvalue()
    return files


def main(argv: Sequence[str] | None = None) -> int:
    return command("compare.py", compare, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
