"""Time 1,000 answers of the demo's model on a CPU, as compare.py generates them.

    python -m tests.benchmarks.bench_generate [--model runs/demo/base --adapter runs/demo/qlora] [--answers 1000]

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

REPO = Path(__file__).resolve().parents[2]


def make_demo(folder: Path) -> None:
    """Write the demo's rows (rows/) and its untrained model (init/)."""
    rows = folder / "rows"
    model = folder / "init"
    for script, *flags in (("demo_rows", "--out", rows), ("demo_model", "--rows", rows, "--out", model)):
        command = [sys.executable, "-m", f"data_prep.{script}", *map(str, flags)]
        subprocess.run(command, cwd=REPO, check=True, stdout=subprocess.DEVNULL)
    # the recipe would put it there
    shutil.copy(REPO / "chat_templates" / "qwen3.jinja", model / "chat_template.jinja")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a model")
    parser.add_argument("--adapter", type=Path, help="folder of an adapter on it")
    parser.add_argument("--answers", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_new_tokens", type=int, default=256)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_demo(Path(folder))
        time_answers(args, Path(folder))


def time_answers(args: argparse.Namespace, demo: Path) -> None:
    """Generate the answers and print how long it took."""
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}  # before transformers is imported
    import torch

    from eval.common.measure import clean_row, prepare, read_rows
    from eval.common.models import add_adapter, fill_of, generate, load_model, load_tokenizer

    name = args.model or demo / "init"
    tokenizer, stops = load_tokenizer(args.adapter or name)
    prompts = []
    for number, row in enumerate(read_rows(demo / "rows" / "chat", "test")):
        prepared = prepare(clean_row(row, number), tokenizer, stops, sys.maxsize, lambda *_: None)
        if prepared and prepared.asked:
            prompts.append(prepared.asked.prompt_ids)
    prompts = list(islice(cycle(prompts), args.answers))
    model = load_model(str(name), tokenizer, torch.float32, "cpu")
    if args.adapter:
        model = add_adapter(model, args.adapter)
    started = time.perf_counter()
    cpu_started = time.process_time()
    outputs = generate(model, prompts, stops, args.batch_size, fill_of(tokenizer, stops), args.max_new_tokens)
    seconds = time.perf_counter() - started
    cpu_seconds = time.process_time() - cpu_started
    tokens = sum([len(output.tokens) for output in outputs])
    stopped = sum([output.stopped for output in outputs])
    print(
        f"{len(outputs):,} answers, {tokens:,} tokens, {stopped:,} stopped by themselves, batches of "
        f"{args.batch_size}: {seconds:.1f} s by the clock, {cpu_seconds:.1f} s of CPU, "
        f"{torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
