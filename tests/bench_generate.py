"""Time 1,000 answers of the demo's model on a CPU, as compare.py generates them.

    python tests/bench_generate.py [--model runs/demo/base --adapter runs/demo/qlora] [--answers 1000]

A benchmark, not a test. Prompts are the demo's test rows, begun again where they are too few. Without --model it is the
demo's untrained one, made here: it never stops, so that every answer costs the whole budget (256 tokens, compare.py's
default), the worst case. Prints the seconds of generate() alone, by the clock and of this process; the target is 180.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "eval"))

import torch  # noqa: E402
from measure import clean_row, prepare, read_rows  # noqa: E402
from models import add_adapter, fill_of, generate, load_model, load_tokenizer  # noqa: E402


def made(folder):
    """The demo's rows and its untrained model."""
    for script, *flags in (
        ("demo_rows", "--out", folder / "rows"),
        ("demo_model", "--rows", folder / "rows", "--out", folder / "init"),
    ):
        subprocess.run(
            [sys.executable, "-m", f"data_prep.{script}", *flags], cwd=REPO, check=True, stdout=subprocess.DEVNULL
        )
    # the recipe would put it there
    shutil.copy(REPO / "chat_templates" / "qwen3.jinja", folder / "init" / "chat_template.jinja")
    return folder / "init", folder / "rows" / "chat"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a model")
    parser.add_argument("--adapter", type=Path, help="folder of an adapter on it")
    parser.add_argument("--answers", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_new_tokens", type=int, default=256)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, data = made(Path(folder))
        model = args.model or model
        tokenizer, stops = load_tokenizer(args.adapter or model)
        rows = [clean_row(row, n) for n, row in enumerate(read_rows(data, "test"))]
        for row in rows:
            prepare(row, tokenizer, stops, sys.maxsize, lambda *_: None)
        prompts = [*islice(cycle([row["prompt"] for row in rows if row["prompt"]]), args.answers)]
        model = load_model(str(model), tokenizer, torch.float32, "cpu")
        model = add_adapter(model, args.adapter) if args.adapter else model
        clock, process = time.perf_counter(), time.process_time()
        outputs = generate(model, prompts, stops, args.batch_size, fill_of(tokenizer, stops), args.max_new_tokens)
        clock, process = time.perf_counter() - clock, time.process_time() - process
    tokens, stopped = sum(len(output.tokens) for output in outputs), sum(output.stopped for output in outputs)
    print(
        f"{len(outputs):,} answers, {tokens:,} tokens, {stopped:,} stopped by themselves, batches of "
        f"{args.batch_size}: {clock:.1f} s by the clock, {process:.1f} s of CPU, {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
