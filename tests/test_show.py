"""What a run says of itself, against figures made in other ways: hand counts, the model's shapes, GPU data sheets."""

import json
import re
import runpy

import pytest
import torch
from conftest import EXACT, REPO, TINY, launch
from datasets import Dataset, load_from_disk
from engines import ENGINES, run
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

HOOK = REPO / "recipes" / "hooks" / "show.py"
show = runpy.run_path(str(HOOK))
BATCHES = """
import json
from pathlib import Path
from transformers import TrainerCallback
def callback(trainer):
    plain, seen = trainer.training_step, []
    def training_step(model, inputs, *rest, **kwargs):
        labels, ids = inputs["labels"].tolist(), inputs["input_ids"].tolist()
        real = inputs["attention_mask"].sum().item() if "attention_mask" in inputs else None
        seen.append([trainer.state.global_step + 1, labels, real, sum(map(len, ids))])
        name = f"batches-{trainer.args.process_index}.json"
        Path(trainer.args.output_dir, name).write_text(json.dumps(seen))
        return plain(model, inputs, *rest, **kwargs)
    trainer.training_step = training_step
    return TrainerCallback()
"""


def block(text):
    """{name: value} of the start block."""
    return dict(re.findall(r"^  (\w+) {2,}(.*)$", text, re.M))


def logged(folder):
    return [line for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "loss" in line]


def by_hand(folder, steps):
    """[(targets so far, tokens or None, places)] a step, from the batches that every process trained on."""
    batches = [batch for path in folder.glob("batches-*.json") for batch in json.loads(path.read_text())]
    found, targets = [], 0
    for step in range(1, steps + 1):
        mine = [batch for batch in batches if batch[0] == step]
        targets += sum(label != -100 for _, rows, _, _ in mine for row in rows for label in row[1:])
        tokens = [real if real is not None else places for _, _, real, places in mine]
        found.append((targets, sum(tokens), sum(places for *_, places in mine)))
    return found


@pytest.mark.parametrize("packing", ["true", "false"])
def test_counts_of_every_step(run_recipe, hook, packing, capsys):
    flags = ["--packing", packing, "--per_device_train_batch_size", 2]
    folder = run_recipe("qwen3_full", *flags, "--hooks", HOOK, *hook(BATCHES)[1:])
    found, lines = by_hand(folder, 4), logged(folder)
    assert len(lines) == 4 and len({targets for targets, _, _ in found}) == 4
    for line, (targets, tokens, places) in zip(lines, found, strict=True):
        assert line["trained_tokens"] == targets
        assert line["padding_share"] == pytest.approx(1 - tokens / places, abs=5e-5)
    assert (lines[0]["padding_share"] > 0.01) is (packing == "false")
    assert found[-1][1] <= found[-1][2] and lines[-1]["num_tokens"] == sum(tokens for _, tokens, _ in found)
    said = capsys.readouterr().out
    assert len(re.findall(r"^\d/4  loss ", said, re.M)) == 4 and "'loss'" not in said


def test_speed_memory_and_an_evaluation_left_out(run_recipe, hook, capsys):
    slow = """
import time
from transformers import TrainerCallback
class Slow(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        time.sleep(0.2)
    def on_evaluate(self, args, state, control, **_):
        time.sleep(1)
def callback(trainer):
    return Slow()
"""
    flags = ["--max_steps", 6, "--logging_steps", 2, "--eval_strategy", "steps", "--eval_steps", 2]
    folder = run_recipe("qwen3_full", *flags, "--hooks", HOOK, *hook(slow)[1:])
    before, lines = 0, [json.loads(line) for line in (folder / "log.jsonl").open()]
    seconds = 0
    for line in logged(folder):
        tokens, before = line["num_tokens"] - before, line["num_tokens"]
        seconds += tokens / line["tokens_per_second"]
        assert tokens / line["tokens_per_second"] > 0.4  # two steps asleep
        assert line["tokens_per_second"] > line["trained_tokens_per_second"] > 0
        assert 0.1 < line["memory_gib"] < 20 and "mfu" not in line
    assert seconds < lines[-1]["train_runtime"] - 3 * 1  # all but the evaluations
    said = capsys.readouterr().out
    loss = next(line for line in map(json.loads, (folder / "log.jsonl").open()) if "eval_loss" in line)["eval_loss"]
    assert f"2/6  validation loss {loss:.4g} (perplexity {torch.tensor(loss).exp():.4g})" in said


def test_start_block(run_recipe, demo, capsys):
    folder = run_recipe("qwen3_qlora", "--hooks", HOOK, "--max_steps", 1, "--lora_r", 4, "--lora_alpha", 8)
    said = block(capsys.readouterr().out)
    config = Qwen3Config.from_pretrained(demo / "init")
    h, m, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    q, layers = config.num_attention_heads * config.head_dim, config.num_hidden_layers
    linear = h * q * 2 + h * kv * 2 + h * m * 3
    norms = 2 * h + 2 * config.head_dim
    base = config.vocab_size * h + layers * (linear + norms) + h
    adapters = layers * 4 * ((h + q) * 2 + (h + kv) * 2 + (h + m) * 3)
    amount = show["amount"]
    assert config.tie_word_embeddings
    assert f"{amount(base + adapters)} parameters, {amount(adapters)} trained" in said["model"]
    assert f"({adapters / (base + adapters):.2%})" in said["model"]
    assert said["weights"].startswith(f"{amount(layers * linear)} 4-bit nf4 computing in bfloat16, ")
    assert f"{amount(adapters)} float32 trained" in said["weights"] and "autocast bfloat16" in said["weights"]
    assert said["attention"] == "sdpa, Liger kernels off, activations checkpointed"
    assert said["template"].endswith("qwen3.jinja, trains assistant turns")
    assert said["run"].startswith("1 steps, ") and said["run"].endswith("from the start")
    assert said["engine"] == "not distributed, 1 process on the CPU"
    assert said["output"] == str(folder)


def test_set_is_measured_as_the_collator_sees_it():
    """Two packs: documents of 3 and 2 tokens, and one of 4; what starts a document is no target."""
    rows = [
        {"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, -100, 8, 9], "seq_lengths": [3, 2]},
        {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8], "seq_lengths": [4]},
    ]
    found = show["measure"](Dataset.from_list(rows))
    assert found == {"rows": 2, "tokens": 9, "trained": 2 + 2, "context": (9 + 4 + 16) / 9}
    plain = Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows])
    assert show["measure"](plain) == {"rows": 2, "tokens": 9, "trained": 4 + 3, "context": (25 + 16) / 9}
    assert show["measure"](plain.select([1]))["tokens"] == 4


def test_set_agrees_with_an_epoch(run_recipe, hook, capsys, demo):
    """One whole epoch of packs: the block's averages are what goes by."""
    load_from_disk(demo / "rows" / "chat")["train"].select(range(90)).to_json(demo / "few.jsonl")
    flags = ["--max_steps", -1, "--num_train_epochs", 1, "--dataset_name", demo / "few.jsonl", "--max_length", 1024]
    flags += ["--eval_rows", 0]
    folder = run_recipe("qwen3_full", *flags, "--hooks", HOOK, *hook(BATCHES)[1:])
    said = block(capsys.readouterr().out)
    packs, full = re.search(r"rows in ([\d,]+) packs, ([\d.]+)% of 1,024", said["data"]).groups()
    share = float(re.search(r"([\d.]+)% of them trained", said["step"])[1])
    found = by_hand(folder, logged(folder)[-1]["step"])
    tokens = sum(tokens for _, tokens, _ in found)
    assert share == pytest.approx(100 * found[-1][0] / tokens, abs=0.051)
    assert float(full) == pytest.approx(100 * tokens / (int(packs) * 1024), abs=0.051)


def test_two_processes(demo, hook, tmp_path):
    """Counts are those of both processes, and the engine is the one that runs."""
    template, few = REPO / "chat_templates" / "qwen3.jinja", ["--packing", "false"]
    flags = ["--use_cpu", "true", "--model_name_or_path", demo / "init", "--dataset_name", demo / "rows" / "chat"]
    flags += ["--chat_template_path", template, "--global_batch_size", 4, "--max_steps", 2, "--save_strategy", "no"]
    flags += ["--output_dir", tmp_path / "run", "--eval_steps", 2, *few, "--per_device_train_batch_size", 2]
    recipe = REPO / "recipes" / "qwen3_full.py"
    done = launch(recipe, *flags, *EXACT, "--hooks", HOOK, *hook(BATCHES)[1:], config="cpu_2proc")
    assert done.returncode == 0, done.stderr[-2000:]
    assert block(done.stdout)["engine"] == "DDP, 2 processes on 1 machine over gloo, each on the CPU"
    assert (tmp_path / "run" / "engine.txt").read_text() == block(done.stdout)["engine"] + "\n"
    assert done.stdout.count("  engine ") == 1 and len(re.findall(r"^\d/2  loss", done.stdout, re.M)) == 2
    found = by_hand(tmp_path / "run", 2)
    assert len(list((tmp_path / "run").glob("batches-*.json"))) == 2
    for line, (targets, tokens, places) in zip(logged(tmp_path / "run"), found, strict=True):
        assert line["trained_tokens"] == targets
        assert line["padding_share"] == pytest.approx(1 - tokens / places, abs=5e-5) and tokens < places


def test_resumed_counts_are_the_uninterrupted_ones(run_recipe, capsys):
    flags = ["--hooks", HOOK, "--packing", "false", "--save_strategy", "steps", "--save_steps", 2]
    whole = run_recipe("qwen3_full", *flags, out="whole")
    run_recipe("qwen3_full", *flags, "--max_steps", 2, "--lr_scheduler_type", "constant", out="cut")
    capsys.readouterr()
    cut = run_recipe("qwen3_full", *flags, "--resume_from_checkpoint", "true", out="cut")
    said = capsys.readouterr().out
    assert block(said)["run"].endswith("checkpoint-2, after step 2")
    assert re.findall(r"^(\d)/4  ", said, re.M) == ["3", "4"]
    same = ("step", "trained_tokens", "padding_share", "num_tokens")
    counts = [[[line[name] for name in same] for line in logged(folder)] for folder in (whole, cut)]
    assert counts[0] == counts[1] and len(counts[0]) == 4


@pytest.mark.parametrize("tied", [True, False])
def test_flops_of_a_dense_model(tied):
    """6 N + 12 L H Q T with every matrix written out, and 4 for what is frozen."""
    config = Qwen3Config(hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, head_dim=16,
                         num_key_value_heads=2, vocab_size=100, tie_word_embeddings=tied)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    matrices = 3 * (32 * 64 + 2 * 32 * 32 + 64 * 32 + 3 * 32 * 80)
    norms = 3 * (2 * 32 + 2 * 16) + 32
    attention = 12 * 3 * 4 * 16 * 500
    assert show["flops_per_token"](model, 500) == (6 * (matrices + norms) + attention, 6 * 3200)
    for weight in model.parameters():
        weight.requires_grad = False
    assert show["flops_per_token"](model, 500) == (4 * (matrices + norms) + attention, 4 * 3200)


def test_flops_of_a_mixture():
    config = Qwen3MoeConfig(hidden_size=32, moe_intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                            head_dim=8, num_key_value_heads=4, vocab_size=100, num_experts=8, num_experts_per_tok=2,
                            tie_word_embeddings=False)  # fmt: skip
    layers, head = show["flops_per_token"](AutoModelForCausalLM.from_config(config), 0)
    router, norms = 32 * 8, 2 * 32 + 2 * 8
    assert layers == 6 * (2 * (4 * 32 * 32 + router + norms + 2 * 3 * 32 * 24) + 32) and head == 6 * 3200


# multiprocessors, dense bf16 fused multiply-adds a clock of each with fp32 accumulation, boost clock in GHz
CHIPS = {
    "NVIDIA GeForce RTX 3090": (82, 256, 1.695),
    "NVIDIA GeForce RTX 4080": (76, 256, 2.505),
    "NVIDIA GeForce RTX 4090": (128, 256, 2.520),
    "NVIDIA GeForce RTX 5090": (170, 256, 2.407),
    "NVIDIA A100-SXM4-80GB": (108, 1024, 1.410),
    "NVIDIA L40S": (142, 512, 2.490),
    "NVIDIA H100 80GB HBM3": (132, 2048, 1.830),
    "NVIDIA H100 PCIe": (114, 2048, 1.620),
    "NVIDIA H200": (132, 2048, 1.830),
}


def test_peaks_are_what_the_chips_can_do():
    for name, (processors, fmas, clock) in CHIPS.items():
        assert show["peak_flops"](name) == pytest.approx(processors * fmas * 2 * clock * 1e9, rel=2e-3), name
    assert len(CHIPS) == len(show["PEAKS"]) - 1 and show["peak_flops"]("NVIDIA B200") == 2.25e15
    for name in ("NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4080 SUPER",
                 "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA H100 NVL", "Tesla T4"):  # fmt: skip
        assert show["peak_flops"](name) is None


def test_mfu(run_recipe, hook):
    """On a GPU of 1 TFLOP/s: the line's share times its seconds is the FLOPs of its tokens."""
    probe = """
from transformers import TrainerCallback
class Peak(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        self.show.flops = (7e6, 3e5, 1e12)
def callback(trainer):
    peak = Peak()
    peak.show = next(found for found in trainer.callback_handler.callbacks if type(found).__name__ == "Show")
    return peak
"""
    for line in logged(run_recipe("qwen3_full", "--hooks", HOOK, *hook(probe)[1:])):
        done = line["tokens_per_second"] * 7e6 + line["trained_tokens_per_second"] * 3e5
        assert line["mfu"] == pytest.approx(done / 1e12, abs=1e-4) and line["mfu"] > 0


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "0"), (9999, "9,999"), (10_000, "10K"), (151_234, "151K"), (4.02e9, "4.02B"), (33_030_144, "33M")],
)
def test_amounts(number, words):
    assert show["amount"](number) == words


def test_durations():
    assert [show["duration"](seconds) for seconds in (5, 65, 3600, 7384)] == ["0:05", "1:05", "1:00:00", "2:03:04"]


def test_lines_that_others_log():
    assert show["line"]({"eval_loss": 0.0, "eval_runtime": 2}) == "validation loss 0 (perplexity 1) in 2.0 s"
    assert show["line"]({"probe": 1.23456789, "name": "x"}) == "probe 1.235, name x"


SAYS = {
    "ddp": "DDP, 2 processes on 1 machine over gloo",
    "zero1": "DeepSpeed ZeRO-1, 2 processes on 1 machine over gloo",
    "zero3": r"DeepSpeed ZeRO-3 \((\d+) of (\d+) weights sharded\), 2 processes on 1 machine over gloo",
    "offload": r"DeepSpeed ZeRO-3 \((\d+) of (\d+) weights sharded\), offloads optimizer and param, 2 processes",
    "fsdp2": r"FSDP2 \((\d+) of (\d+) weights sharded\), 2 processes on 1 machine over gloo",
    "sp": r"DeepSpeed ZeRO-3 \((\d+) of (\d+) weights sharded\), sequence parallel 2, 2 processes on 1 machine",
}


@pytest.mark.long
@pytest.mark.parametrize("engine", SAYS)
def test_engines_and_their_counts(run_recipe, demo, tmp_path, engine):
    """The block names the engine that runs, and every engine counts the tokens that one process counts."""
    more = [*EXACT, "--hooks", HOOK, "--max_steps", 2, *ENGINES["sp"].flags, "--per_device_train_batch_size", 1]
    one = logged(run_recipe("qwen3_full", *more, out="one"))
    flags = ["--model_name_or_path", demo / "init", "--dataset_name", demo / "rows" / "chat", "--output_dir"]
    flags += [tmp_path / engine, "--chat_template_path", REPO / "chat_templates" / "qwen3.jinja", *TINY, *more]
    done = run(ENGINES[engine].command("qwen3_full", *flags))
    said = block(done.stdout)["engine"]
    assert (match := re.match(SAYS[engine], said)), said
    if match.groups():
        sizes = [weight.numel() for weight in AutoModelForCausalLM.from_pretrained(demo / "init").parameters()]
        threshold = 0 if engine == "fsdp2" else 100_000  # ZeRO-3 leaves smaller weights whole
        assert match.groups() == (str(sum(size > threshold for size in sizes)), str(len(sizes)))
    same = ("step", "trained_tokens", "padding_share")
    assert [[line[name] for name in same] for line in logged(tmp_path / engine)] == [
        [line[name] for name in same] for line in one
    ]
    assert one[-1]["padding_share"] > 0.5


def test_the_engines_of_a_run_are_noted(tmp_path):
    """A line each, the newest last; a new run in the same folder begins anew."""
    note = runpy.run_path(str(HOOK))["note_engine"]
    path = tmp_path / "engine.txt"
    for said, resumed, lines in (("a", 0, "a\n"), ("a", 3, "a\n"), ("b", 5, "a\nb\n"), ("c", 0, "c\n")):
        note(path, said, resumed)
        assert path.read_text() == lines
