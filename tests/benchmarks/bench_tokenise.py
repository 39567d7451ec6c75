"""Time tokens and mask, on both paths of data_prep/common/tokens.py, against TRL's own preparation.

    python -m data_prep.normalize gsm8k gsm8k.jsonl --out data/gsm8k
    python -m tests.benchmarks.bench_tokenise data/gsm8k data/chat data/tools --model_name_or_path TOKENIZER

A benchmark, not a test. Each input is what recipes take; one with fewer rows than asked for is begun again. On one
thread, in turns, and CPU time of that thread, because machines are shared; medians of the rounds. TRL's is
SFTTrainer._prepare_dataset without packing or limit, on a Dataset in memory; the tokenizer alone is encode_batch_fast
over the rendered texts, ids taken out. Ids and labels of every row are compared first: a difference ends it with exit
code 1. Wanted: at least 2 times TRL.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import datasets
from trl import SFTConfig, SFTTrainer

from data_prep.common import recipe_settings, rendering, tokens
from data_prep.common.recipe_rows import load_rows

REPO = Path(__file__).resolve().parents[2]
WANTED = 2.0  # times TRL


def prepare_by_trl(rows: datasets.Dataset, renderer: rendering.Renderer, folder: str) -> datasets.Dataset:
    """Return rows with input_ids and labels as SFTTrainer prepares them."""
    args = SFTConfig(folder, max_length=None, assistant_only_loss=True, use_cpu=True, bf16=False)
    # a template of its own: the fast path changes the one that transformers keeps compiled
    template = "{##}" + renderer.template
    trainer = SimpleNamespace(chat_template=template, completion_only_loss=False, _tokenizer=renderer.tokenizer)
    return SFTTrainer._prepare_dataset(trainer, rows, renderer.tokenizer, args, False, None, "train")


def measure(function: Callable[[], object]) -> float:
    """Return the CPU seconds of this thread that a call takes."""
    start = time.thread_time()
    function()
    return time.thread_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("inputs", nargs="+", help="rows of messages: files or dataset folders")
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--chat_template_path")
    parser.add_argument("--recipe", default=str(REPO / "recipes" / "qwen3_qlora.py"))
    parser.add_argument("--rows", type=int, default=3000, help="rows of each input that are compared")
    parser.add_argument("--timed_rows", type=int, default=1000, help="rows of each input that are timed")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    datasets.disable_caching()
    datasets.disable_progress_bars()
    flags = {"model_name_or_path": args.model_name_or_path, "chat_template_path": args.chat_template_path}
    settings = recipe_settings.read_settings(args.recipe, flags=flags | {"eval_rows": 0})
    renderer = rendering.load_renderer(settings)
    for path in args.inputs:
        loaded = load_rows(path, settings).rows
        rows = loaded.select([number % len(loaded) for number in range(args.rows)])
        compare(path, rows, renderer, settings)
        profile(rows.select(range(min(len(rows), args.timed_rows))), renderer, settings, args.rounds)


def compare(
    path: str, rows: datasets.Dataset, renderer: rendering.Renderer, settings: recipe_settings.Settings
) -> None:
    """Exit where ids or labels of a row are not TRL's."""
    with tempfile.TemporaryDirectory() as folder:
        theirs = prepare_by_trl(rows, renderer, folder)
    ours = tokens.iter_documents(rows, renderer, settings, encodings=False)
    for document, row in zip(ours, theirs, strict=True):
        if document.ids != row["input_ids"] or document.labels().tolist() != row["labels"]:
            sys.exit(f"{path}: row {document.number} differs from TRL's")
    print(f"{path}: ids and labels of {len(rows):,} rows are TRL's", flush=True)


def profile(
    rows: datasets.Dataset, renderer: rendering.Renderer, settings: recipe_settings.Settings, rounds: int
) -> None:
    """Print the table."""
    listed = list(rows)
    backend = renderer.tokenizer.backend_tokenizer
    texts = [renderer.render(row, row["messages"]).text for row in listed]
    numbered = [tokens.NumberedRow(number, row) for number, row in enumerate(listed)]

    def plain() -> None:
        for number, row in numbered:
            rendered = tokens.render_row(number, row, renderer, settings, True)
            tokens.tokenize_plainly(rendered, renderer, settings, True)

    with tempfile.TemporaryDirectory() as folder:
        parts = {
            "TRL": lambda: prepare_by_trl(rows, renderer, folder),
            "ours": lambda: tokens.tokenize_rows(numbered, renderer, settings, True, [], encodings=False),
            "ours, plain": plain,
            "tokenizer alone": lambda: [
                encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)
            ],
        }
        seconds = {name: [] for name in parts}
        for _ in range(rounds):
            for name, function in parts.items():
                backend.model._clear_cache()  # what a tokenizer remembers of the words of the last round
                seconds[name].append(measure(function))
    total = sum(len(ids) for ids in renderer.tokenizer(texts, add_special_tokens=False)["input_ids"])
    for name, times in seconds.items():
        took = statistics.median(times)
        ratios = sorted(trl / ours for trl, ours in zip(seconds["TRL"], times, strict=True))
        print(
            f"  {name:16} {took / len(rows) * 1e6:8.1f} us a row  {total / took / 1e6:5.2f} M tokens/s  "
            f"{statistics.median(ratios):5.2f} times TRL (from {ratios[0]:.2f} to {ratios[-1]:.2f}; wanted {WANTED})"
        )


if __name__ == "__main__":
    main()
