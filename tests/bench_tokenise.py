"""Time tokens and mask of render.documents() against TRL's own preparation and against the tokenizer alone.

    python tests/bench_tokenise.py gsm8k.jsonl sharegpt.jsonl tools.jsonl --model_name_or_path TOKENIZER [--rows 10000]

A benchmark, not a test. Each file holds raw rows of a source that normalize.py knows, given as SOURCE=FILE; sources
share the rows evenly, a file with fewer is begun again. On one thread, in turns, and CPU time of that thread, because
machines are shared; medians of the rounds. TRL's is SFTTrainer._prepare_dataset without packing or limit, on a Dataset
in memory; the tokenizer alone is encode_batch_fast over the rendered texts, ids taken out. Ids and labels of every row
are compared first: a difference ends it with exit code 1.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path
from types import SimpleNamespace

from data_prep import normalize
from data_prep.common import recipe_settings, rendering, tokens
from data_prep.common.errors import InvalidRow
from data_prep.common.readers import read_rows
from data_prep.common.writer import write_rows

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
REPO = Path(__file__).resolve().parents[1]

import datasets  # noqa: E402
import numpy as np  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402


def rows_of(source, path, count):
    """`count` normalised rows of a file, from its start again where it has fewer."""
    found = []
    for line, raw in read_rows(Path(path)):
        try:
            found.append(normalize.to_row(raw, source, str(line)))
        except InvalidRow:
            continue
    return [*islice(cycle(found), count)]


def by_trl(rows, against, folder):
    """{input_ids, labels} as SFTTrainer prepares them."""
    args = SFTConfig(folder, max_length=None, assistant_only_loss=True, use_cpu=True, bf16=False)
    trainer = SimpleNamespace(chat_template=against.template, completion_only_loss=False, _tokenizer=against.tokenizer)
    write_rows(Path(folder), "bench_tokenise.py", {"train": rows})
    data = datasets.load_from_disk(folder)["train"]
    return lambda: SFTTrainer._prepare_dataset(trainer, data, against.tokenizer, args, False, None, "train")


def timed(work):
    start = time.thread_time()
    work()
    return time.thread_time() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="SOURCE=FILE")
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--recipe", default=str(REPO / "recipes" / "qwen3_qlora.py"))
    parser.add_argument("--rows", type=int, default=10000, help="rows that are compared, of all sources together")
    parser.add_argument("--timed_rows", type=int, default=1000, help="rows of each source that are timed")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    settings = recipe_settings.read_settings(given.recipe, flags={"model_name_or_path": given.model_name_or_path})
    against, plain = rendering.load_renderer(settings), rendering.load_renderer(settings)
    datasets.disable_caching()
    datasets.disable_progress_bars()
    for source in given.inputs:
        name, _, path = source.partition("=")
        rows = rows_of(name, path, -(-given.rows // len(given.inputs)))
        with tempfile.TemporaryDirectory() as folder:
            theirs = by_trl(rows, plain, f"{folder}/rows")().select_columns(["input_ids", "labels"])[:]
        for doc, row in zip(
            tokens.iter_documents(rows, against, settings, encodings=False),
            (dict(zip(theirs, pair, strict=True)) for pair in zip(*theirs.values(), strict=True)),
            strict=True,
        ):
            ids = np.array(doc.ids)
            if doc.ids != row["input_ids"] or np.where(doc.mask(), ids, -100).tolist() != row["labels"]:
                sys.exit(f"{source}: row {doc.number} differs from TRL's")
        print(f"{source}: ids and labels of {len(rows):,} rows are TRL's", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            profile(rows[: given.timed_rows], against, plain, settings, given.rounds, f"{folder}/rows")


def profile(rows, against, plain, settings, rounds, folder):
    """Print the table. plain: another copy of the tokenizer, which our code has not touched."""
    backend, trl = plain.tokenizer.backend_tokenizer, by_trl(rows, plain, folder)
    rendered = [against.render(row, row["messages"]) for row in rows]
    texts = [text for text, _ in rendered]
    ids = against.encode(texts, True)

    def mask():
        for (text, chars), one in zip(rendered, ids, strict=True):
            tokens.token_spans(against.char_to_token(text, one, chars), chars, len(one))

    parts = {
        "TRL, all": trl,
        "ours, all": lambda: [*tokens.iter_documents(rows, against, settings, encodings=False)],
        "tokenizer alone": lambda: [one.ids for one in backend.encode_batch_fast(texts, add_special_tokens=False)],
        "  render": lambda: [against.render(row, row["messages"]) for row in rows],
        "  tokenise": lambda: against.encode(texts, True),
        "  mask": mask,
    }
    took = {name: [] for name in parts}
    for _ in range(rounds):
        for name, work in parts.items():
            for one in (against, plain):  # what a tokenizer remembers of the words of the last round
                one.tokenizer.backend_tokenizer.model._clear_cache()
            took[name].append(timed(work))
    tokens = sum(map(len, ids))
    median = {name: statistics.median(times) for name, times in took.items()}
    median["  rest"] = median["ours, all"] - sum(median[name] for name in ("  render", "  tokenise", "  mask"))
    for name, seconds in median.items():
        line = f"  {name:16} {seconds / len(rows) * 1e6:8.1f} us a row  {tokens / seconds / 1e6:6.2f} M tokens/s"
        print(line if seconds > 0 else f"  {name:16} {seconds / len(rows) * 1e6:8.1f} us a row")
    for name, other, wanted in (("TRL, all", "ours, all", 1.5), ("tokenizer alone", "ours, all", 0.8)):
        ratios = sorted(a / b for a, b in zip(took[name], took[other], strict=True))
        ratio = statistics.median(ratios)
        print(f"  throughput against {name.split(',')[0]}: {ratio:.2f} (from {ratios[0]:.2f} to {ratios[-1]:.2f}, "
              f"{len(ratios)} rounds), wanted {wanted}")  # fmt: skip


if __name__ == "__main__":
    main()
