"""See what a run would train on, before you pay for it: coloured tokens, figures, and an exit code.

    python -m data_prep.preview data/chats --recipe recipes/qwen3_qlora.py --html preview.html
    python -m data_prep.preview rows.jsonl --recipe recipes/qwen3_qlora.py --max_length 1024 --rows 5

DATA is what recipes take: a .jsonl, .json or .parquet file or a save_to_disk folder, of chats or compiled rows. Model,
template, length, packing, batch and epochs are the recipe's: DEFAULTS < --config run.yaml < flags. Compiled rows are
shown as they are, with --config recipes/configs/compiled.yaml, which a run on them needs, or without. Every row is
rendered, tokenised, masked, cut and packed as TRL would; the first --rows are shown, in the HTML page also the first
row of every finding. Trained text stands in brackets, and is green and underlined where there is colour. Where loading
changes a value of the file, it says so.

Exit 0: fine. 1: a run on this would go wrong: a template of another family than the tokenizer's, nothing trained, stop
token untrained, answers cut in more than --max_cut of the rows, persona lost, control tokens in text, a value changed
by loading. 2: bad input, one sentence.
"""

import argparse
import json
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from data_prep.common.command_line import make_parser, run_command
from data_prep.common.errors import UsageError
from data_prep.common.loader_changes import JSON_FILES, Loader, can_be_loaded, may_change
from data_prep.common.preview_rows import (
    FAULTS,
    OTHER_FAMILY,
    Finding,
    Packing,
    Plan,
    RowChecks,
    RowFigures,
    Totals,
    Verdict,
    add_up,
    count_whole_steps,
    judge,
    judge_changes,
    plan_run,
    read_json,
)
from data_prep.common.preview_text import Line, Preview, ShownRow, make_page, print_preview, show_row
from data_prep.common.readers import read_chunks
from data_prep.common.recipe_rows import load_rows
from data_prep.common.recipe_settings import FLAGS, Settings, add_recipe_flags, read_settings, require_named_mask
from data_prep.common.rendering import Renderer, Span, load_renderer
from data_prep.common.rows import get_turns
from data_prep.common.step_counts import advise_steps
from data_prep.common.terminal import make_console
from data_prep.common.tokens import iter_documents
from data_prep.common.writer import write_text

if TYPE_CHECKING:
    from datasets import Dataset


# -- the table --------------------------------------------------------------------------------------------------------
def make_table(totals: Totals, plan: Plan, settings: Settings, packing: Packing) -> list[Line]:
    """Return the lines of the table, for terminal and page."""
    percentiles = (("min", "p0"), ("median", "p50"), ("p90", "p90"), ("p99", "p99"), ("max", "p100"))
    lengths = ", ".join([f"{title} {totals.lengths[name]:,}" for title, name in percentiles])
    all_trained = plan.training_rows == totals.rows
    cut = len(totals.faults["cut"])
    newline = len(totals.faults["newline"])
    return [
        Line("rows", f"{totals.rows:,}", "" if all_trained else f"{plan.training_rows:,} of them trained"),
        Line("tokens", f"{totals.tokens:,}"),
        Line("tokens a row", f"{totals.tokens / totals.rows:,.0f}", lengths),
        Line("trained tokens", format_share(totals.trained, totals.tokens)),
        Line("truncated rows", format_share(totals.truncated, totals.rows), describe_limit(settings, packing)),
        Line(
            "answers that break off", format_share(cut, totals.rows), "a trained token lies behind the cut" * bool(cut)
        ),
        Line("rows without a trained token", format_share(totals.empty, totals.rows), describe_empty(totals)),
        Line("answers that begin with a newline", format_share(newline, totals.rows)),
        *make_pack_lines(plan, settings, packing),
        Line("optimizer steps", f"{plan.steps:,}", describe_steps(plan, settings)),
        Line("tokens a step", f"{plan.tokens_per_step:,.0f}", f"{plan.trained_per_step:,.0f} of them trained"),
    ]


def format_share(part: int, whole: int) -> str:
    """Return "3 (1.5%)", or "0"."""
    if not part:
        return "0"
    return f"{part:,} ({part / whole:.1%})"


def describe_limit(settings: Settings, packing: Packing) -> str:
    if packing.is_compiled:
        return "none is cut: compiled"
    if settings.max_length is None:
        return "no max_length"
    return f"over {settings.max_length:,} tokens"


def describe_empty(totals: Totals) -> str:
    if not totals.empty:
        return ""
    untrained = len(totals.faults["untrained"])
    return f"{untrained:,} have no trained token, {totals.empty - untrained:,} lose theirs to the cut"


PACKING_NAMES = {"bfd": "best-fit packing", "bfd_split": "best-fit packing of cut rows", "wrapped": "rows end to end"}


def make_pack_lines(plan: Plan, settings: Settings, packing: Packing) -> list[Line]:
    if plan.packs is None:
        return [Line("packs", "none", f"no packing: {plan.units:,} rows one by one")]
    kind = "as compiled" if packing.is_compiled else PACKING_NAMES[settings.packing_strategy]
    if packing.length is not None:
        kind += f", {packing.length:,} tokens"
    if settings.one_stream and not packing.is_compiled:
        kind += ", of all rows in one stream"
    return [
        Line("packs", f"{plan.packs:,}", kind),
        Line("fill rate", "-" if plan.fill is None else f"{plan.fill:.1%}"),
        Line("packs without a trained token", format_share(plan.masked_packs, plan.units)),
    ]


def describe_steps(plan: Plan, settings: Settings) -> str:
    if settings.max_steps > 0:
        text = "max_steps"
    else:
        noun = "epoch" if settings.num_train_epochs == 1 else "epochs"
        text = f"{plan.steps_per_epoch:,} an epoch, {settings.num_train_epochs:g} {noun}"
        advice = advise_steps(plan.steps, settings.global_batch_size)
        if advice:
            text = f"{advice}; {text}"
    if plan.left_out:
        text += f", {plan.left_out:,} that fill no step left out"
    units = "rows" if plan.packs is None else "packs"
    return f"{text}, {settings.global_batch_size} {units} a step"


RECIPE_FLAGS = [name for name in FLAGS if name != "dataset_test_split"]  # the train split alone is shown


# -- the command ------------------------------------------------------------------------------------------------------
def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("data", metavar="DATA", help=".jsonl, .json or .parquet file, or a save_to_disk folder")
    add_recipe_flags(parser, RECIPE_FLAGS)
    parser.add_argument("--rows", type=int, default=3, help="rows to show (3)")
    parser.add_argument("--html", type=Path, help="write the page here")
    parser.add_argument("--report", type=Path, help="write the figures here, all rows too, as JSON")
    parser.add_argument("--max_cut", type=float, default=0.01, help="share of rows whose answer may be cut off (0.01)")
    return run_command(parser, run)


def run(args: argparse.Namespace) -> int:
    """Return the exit code. Raises UsageError."""
    if args.rows < 0:
        raise UsageError(f"--rows {args.rows}: must be 0 or more")
    if not 0 <= args.max_cut <= 1:
        raise UsageError(f"--max_cut {args.max_cut}: must be a share between 0 and 1")
    settings = read_settings(args.recipe, args.config, {name: getattr(args, name) for name in RECIPE_FLAGS})
    loaded = load_rows(args.data, settings)
    order = loaded.order
    if settings.whole_steps:  # as nanochat_sft.py
        order = order[: count_whole_steps(len(order), settings) or len(order)]
    renderer = load_renderer(settings)
    packing = Packing(settings.packing, False, settings.max_length)
    if "input_ids" in loaded.rows.column_names:
        length = read_json(Path(args.data) / "report.json").get("max_length") or settings.max_length
        packing = Packing(is_packed=True, is_compiled=True, length=length)
        settings = replace(settings, max_length=None, packing=False)
    else:
        require_named_mask(settings, args.assistant_only_loss)
    measured = measure_rows(loaded.rows, renderer, settings, args.rows, with_faulty=args.html is not None)
    totals = add_up(measured.rows, settings.max_length)
    plan = plan_run(measured.rows, measured.spans, order, settings, packing)
    is_chat = bool(get_turns(loaded.rows[0])) and not packing.is_compiled
    verdict = judge(measured.rows, totals, plan, settings, args.max_cut, is_chat, renderer)
    if is_chat and renderer.mismatch is not None:
        verdict.findings.insert(0, Finding(OTHER_FAMILY, renderer.mismatch, []))
    changes = find_changes(Path(args.data), loaded.rows, settings.dataset_train_split)
    judge_changes(verdict, changes, args.data)
    template = Path(settings.chat_template_path or "the model's own template").name
    preview = Preview(
        head=f"{args.data} · {args.recipe} · {settings.model_name_or_path} · {template}",
        note=loaded.note,
        table=make_table(totals, plan, settings, packing),
        histogram=totals.histogram,
        max_length=settings.max_length,
        verdict=verdict,
        rows=measured.shown,
        faulty=measured.faulty,
    )
    if args.html:
        write_text(args.html, make_page(preview))
    if args.report:
        report = make_report(totals, plan, settings, measured.rows, verdict, loaded.note)
        write_text(args.report, json.dumps(report, ensure_ascii=False, default=str) + "\n")
    try:
        print_preview(make_console(), preview)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1 if verdict.findings else 0


@dataclass
class MeasuredRows:
    rows: list[RowFigures] = field(default_factory=list)
    spans: list[list[Span]] = field(default_factory=list)  # trained tokens of each
    shown: list[ShownRow] = field(default_factory=list)  # the first ones
    faulty: list[ShownRow] = field(default_factory=list)  # the first row with each fault, where it is not among those


def measure_rows(
    rows: "Dataset", renderer: Renderer, settings: Settings, shown: int, with_faulty: bool
) -> MeasuredRows:
    """Return the figures of all rows, and what the first `shown` look like. Raises UsageError."""
    checks = RowChecks(renderer, settings)
    measured = MeasuredRows()
    seen = set()
    with tqdm(total=len(rows), unit=" rows", disable=not sys.stderr.isatty()) as progress:
        for document in iter_documents(rows, renderer, settings, progress.update):
            figures = checks.measure(document)
            measured.rows.append(figures)
            measured.spans.append(document.spans)
            faults = {name for name in FAULTS if getattr(figures, name)}
            if figures.row < shown:
                measured.shown.append(show_row(document, figures, renderer.tokenizer))
            elif with_faulty and faults - seen:
                measured.faulty.append(show_row(document, figures, renderer.tokenizer))
            seen |= faults
    return measured


def find_changes(path: Path, rows: "Dataset", split: str) -> dict[int, str]:
    """Return {row: where} of the rows of a split in which the recipe gets another value than stands in the file.

    Raises UsageError.
    """
    if not can_be_loaded(path):
        return {}
    is_json = path.suffix in JSON_FILES
    loader = Loader(path)
    loader.sets = {split: rows}
    changes = {}
    position = 0
    for chunk in read_chunks([path]):
        if path.is_dir() and chunk.split != split:
            continue
        for _, row in chunk.rows():
            if may_change(row, is_json):
                change = loader.find_change(split, position, row)
                if change:
                    changes[position] = change
            position += 1
    if loader.failure:
        raise UsageError(loader.failure)
    return changes


def make_report(
    totals: Totals, plan: Plan, settings: Settings, rows: list[RowFigures], verdict: Verdict, note: str
) -> dict:
    figures = vars(totals) | {name: len(numbers) for name, numbers in totals.faults.items()} | vars(plan)
    del figures["faults"]
    return {"totals": figures, **vars(verdict), "note": note, "settings": vars(settings), "rows": list(map(vars, rows))}


if __name__ == "__main__":
    sys.exit(main())
