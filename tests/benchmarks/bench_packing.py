"""Time packing against padding on a CPU, on GSM8K, ShareGPT in Chinese and their mix, side by side in one run.

    python -m tests.benchmarks.bench_packing --raw ../shared/data [--rows 128] [--rounds 5]

--raw is a folder with gsm8k/train.jsonl and chat/sharegpt_zh_1K_format.jsonl. A benchmark, not a test: run it on an
idle machine. A Qwen3 of about 1M parameters is trained in fp32 on rows that TRL prepares, with TRL's collator and loss:
as rows padded to the longest of a batch, as packs under sdpa with its dense mask, and as packs whose documents attend
by themselves, which is what flash-attention does. Rounds in turn, a pass over the same rows each, an optimizer step
every --tokens_per_step real tokens; medians over the rounds of tokens/s without padding and of the ratio in a round.

The bound is 1 / fill, fill the mean length over the padded length (of batches as they are drawn): packing computes real
tokens only. A share above 1 means that padding costs more than its positions, as in attention. Loss and gradient over
all rows, from the same weights, show that the three train the same. The last table is what TRL loses by packing within
the 1,000 rows that map() hands it. Exit 1: loss or gradient differ.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
from transformers import AttentionInterface, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers import logging as transformers_logging
from trl import SFTConfig, SFTTrainer

from data_prep.common.packing import pack_lengths
from data_prep.demo_model import SHAPE, train_tokenizer

REPO = Path(__file__).resolve().parents[2]
SOURCES = {
    "GSM8K": ("gsm8k", "gsm8k/train.jsonl"),
    "ShareGPT zh": ("sharegpt", "chat/sharegpt_zh_1K_format.jsonl"),
}
VOCABULARY = 2000
TOKENIZER_ROWS = 1000  # of each source
PARTS = ("data", "forward", "backward", "optimizer")
PER_DOCUMENT = "per_document"
LIMIT = 1e-4  # relative, of loss and gradient in fp32


def attend_per_document(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    position_ids: torch.Tensor | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Return causal attention of each document of a pack by itself, (1, tokens, heads, head_dim), and no weights."""
    starts = (position_ids[0] == 0).nonzero().flatten().tolist()
    outputs = []
    for start, end in zip(starts, [*starts[1:], query.shape[2]], strict=True):
        parts = [tensor[:, :, start:end] for tensor in (query, key, value)]
        outputs.append(
            torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True, scale=scaling, enable_gqa=True)
        )
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


@dataclass
class Arm:
    """A way to train, its rows as TRL prepared them, and what each round took."""

    name: str
    trainer: SFTTrainer
    optimizer: torch.optim.Optimizer
    speeds: list[float] = field(default_factory=list)
    seconds: Counter = field(default_factory=Counter)
    loss: float = 0.0
    gradient: torch.Tensor | None = None
    fill: float = 1.0


# -- rows -------------------------------------------------------------------------------------------------------------
def read_sources(raw: Path) -> dict[str, list[dict]]:
    """Return the rows of messages of each source and of their mix, in a drawn order."""
    sets = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (kind, path) in SOURCES.items():
            out = Path(folder) / f"{kind}.jsonl"
            words = [sys.executable, "-m", "data_prep.normalize", kind, str(raw.resolve() / path), "--out", str(out)]
            done = subprocess.run(words, env=os.environ | {"PYTHONPATH": str(REPO)}, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stdout + done.stderr)
            lines = out.read_text(encoding="utf-8").splitlines()
            sets[name] = [{"messages": json.loads(line)["messages"]} for line in lines]
    sets["mix"] = [row for rows in list(sets.values()) for row in rows]
    for rows in sets.values():
        random.Random(0).shuffle(rows)
    return sets


def make_tokenizer(sets: dict[str, list[dict]]) -> PreTrainedTokenizerFast:
    """Return a tokenizer trained on the sources, with the template of the recipes."""
    texts = []
    for name in SOURCES:
        for row in sets[name][:TOKENIZER_ROWS]:
            texts += [turn["content"] for turn in row["messages"]]
    tokenizer = train_tokenizer(texts, VOCABULARY)
    tokenizer.chat_template = (REPO / "chat_templates" / "qwen3_instruct_2507.jinja").read_text(encoding="utf-8")
    return tokenizer


# -- arms -------------------------------------------------------------------------------------------------------------
def make_arm(
    name: str, attention: str, packing: bool, rows: list[dict], tokenizer: PreTrainedTokenizerFast, args, folder: str
) -> Arm:
    """Return an arm from the same weights as every other."""
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=len(tokenizer), **SHAPE)
    model = Qwen3ForCausalLM._from_config(config, attn_implementation=attention, dtype=torch.float32)
    settings = SFTConfig(
        folder,
        packing=packing,
        max_length=args.max_length,
        per_device_train_batch_size=1 if packing else args.batch_size,
        assistant_only_loss=True,
        activation_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
    )
    data = datasets.Dataset.from_list(rows)
    trainer = SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer)
    return Arm(name, trainer, torch.optim.AdamW(trainer.model.parameters(), lr=1e-4))


def count_tokens(batch: dict) -> int:
    """Return the tokens of a batch that are no padding."""
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    return batch["input_ids"].numel()


def count_targets(batch: dict) -> int:
    targets = batch["labels"][..., 1:] != -100
    if "position_ids" in batch:
        targets &= batch["position_ids"][..., 1:] != 0
    return int(targets.sum())


def measure_loss(arm: Arm) -> None:
    """Set the arm's loss and gradient over all rows, and the fill of its batches; no step is made."""
    total = 0.0
    targets = 0
    tokens = 0
    positions = 0
    for batch in arm.trainer.get_train_dataloader():
        count = count_targets(batch)
        tokens += count_tokens(batch)
        positions += batch["input_ids"].numel()
        if not count:
            continue
        loss = arm.trainer.compute_loss(arm.trainer.model, batch) * count
        loss.backward()
        total += loss.item()
        targets += count
    gradients = [weight.grad.flatten() for weight in arm.trainer.model.parameters()]
    arm.loss = total / targets
    arm.gradient = torch.cat(gradients) / targets
    arm.fill = tokens / positions
    arm.optimizer.zero_grad()


def run_round(arm: Arm, tokens_per_step: int) -> None:
    """Train a pass over the arm's rows, and keep its tokens/s and where the time went."""
    model = arm.trainer.model
    model.train()
    seconds = Counter()
    tokens = 0
    pending = 0
    batches = iter(arm.trainer.get_train_dataloader())
    clock = time.perf_counter()

    def lap(part: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        seconds[part] += now - clock
        clock = now

    while True:
        batch = next(batches, None)
        lap("data")
        if batch is not None:
            loss = arm.trainer.compute_loss(model, batch)
            lap("forward")
            loss.backward()
            pending += count_tokens(batch)
            lap("backward")
        if pending >= tokens_per_step or (batch is None and pending):
            arm.optimizer.step()
            arm.optimizer.zero_grad()
            tokens += pending
            pending = 0
            lap("optimizer")
        if batch is None:
            break
    arm.speeds.append(tokens / seconds.total())
    arm.seconds.update(seconds)


# -- tables -----------------------------------------------------------------------------------------------------------
def print_speeds(name: str, arms: list[Arm]) -> None:
    padded = arms[0]
    bound = 1 / padded.fill
    for arm in arms:
        ratios = [fast / slow for fast, slow in zip(arm.speeds, padded.speeds, strict=True)]
        ratio = statistics.median(ratios)
        share = "–" if arm is padded else f"{ratio / bound:.0%}"
        print(
            f"| {name} | {arm.name} | {statistics.median(arm.speeds):,.0f} | {ratio:.2f} ({min(ratios):.2f} to "
            f"{max(ratios):.2f}) | {bound:.2f} | {share} | {arm.loss:.6f} | {gradient_gap(arm, padded):.1e} |",
            flush=True,
        )


def gradient_gap(arm: Arm, other: Arm) -> float:
    return ((arm.gradient - other.gradient).norm() / other.gradient.norm()).item()


def print_parts(results: dict[str, list[Arm]]) -> None:
    print(f"\n| set | rows as | {' | '.join(PARTS)} |\n|---|---|" + "---|" * len(PARTS))
    for name, arms in results.items():
        for arm in arms:
            shares = [f"{arm.seconds[part] / arm.seconds.total():.1%}" for part in PARTS]
            print(f"| {name} | {arm.name} | {' | '.join(shares)} |")


def print_fills(sets: dict[str, list[dict]], tokenizer: PreTrainedTokenizerFast, max_length: int) -> None:
    """Print the fill of packs that TRL makes of a set within its batches of 1,000 rows, and of all rows at once."""
    print(
        "\n| set | rows | packs by 1,000 rows | fill | packs of all rows | fill | lost |\n|---|---|---|---|---|---|---|"
    )
    for name, rows in sets.items():
        texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
        lengths = [min(len(ids), max_length) for ids in encoded]
        cells = []
        counts = []
        for one_stream in (False, True):
            packs = len(pack_lengths(lengths, max_length, one_stream=one_stream))
            counts.append(packs)
            cells += [f"{packs:,}", f"{sum(lengths) / packs / max_length:.2%}"]
        print(f"| {name} | {len(rows):,} | {' | '.join(cells)} | {1 - counts[1] / counts[0]:.2%} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--raw", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=128, help="of each set that are trained")
    parser.add_argument("--rounds", type=int, default=5, help="after one for warming up")
    parser.add_argument("--max_length", type=int, default=2048, help="tokens of a pack; longer rows are truncated")
    parser.add_argument("--batch_size", type=int, default=8, help="rows of a padded batch")
    parser.add_argument("--tokens_per_step", type=int, default=8192)
    args = parser.parse_args()
    datasets.disable_progress_bars()
    datasets.disable_caching()
    transformers_logging.set_verbosity_error()
    AttentionInterface.register(PER_DOCUMENT, attend_per_document)
    sets = read_sources(args.raw)
    tokenizer = make_tokenizer(sets)
    load = os.getloadavg()[0]
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, load {load:.1f}; {args.rows} rows a set, "
        f"packs of {args.max_length:,} tokens, {args.batch_size} rows in a padded batch, {args.rounds} rounds"
    )
    print("\n| set | rows as | tokens/s | times padded (rounds) | bound 1/fill | share of it | loss | gradient off |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    results = {}
    is_same = True
    with tempfile.TemporaryDirectory() as folder:
        for name, rows in sets.items():
            chosen = rows[: args.rows]
            arms = [
                make_arm("padded", "sdpa", False, chosen, tokenizer, args, folder),
                make_arm("packs, dense mask", "sdpa", True, chosen, tokenizer, args, folder),
                make_arm("packs, per document", PER_DOCUMENT, True, chosen, tokenizer, args, folder),
            ]
            for arm in arms:
                measure_loss(arm)
                is_same &= abs(arm.loss / arms[0].loss - 1) < LIMIT and gradient_gap(arm, arms[0]) < LIMIT
            for number in range(args.rounds + 1):
                for arm in arms:
                    run_round(arm, args.tokens_per_step)
                    if number == 0:
                        arm.speeds.clear()
                        arm.seconds.clear()
            print_speeds(name, arms)
            results[name] = arms
    print_parts(results)
    print_fills(sets, tokenizer, args.max_length)
    if not is_same:
        sys.exit(f"loss or gradient of packs differ by more than {LIMIT:g} from the padded rows'")


if __name__ == "__main__":
    main()
