"""What a run says of itself, against figures made in other ways: hand counts, the model's shapes, GPU data sheets."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, load_from_disk
from hooks.log_file import LogFile
from hooks.loss_name import name_loss
from hooks.progress import Progress, duration, format_logs
from hooks.start_block import amount, describe_targets, note_engine
from hooks.throughput import DatasetSize, Throughput, TokenFlops, flops_per_token, measure, peak_flops
from hooks.trainer import SFTTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3MoeConfig
from trl import SFTConfig

from data_prep.common.gpu_cards import CARDS
from tests.helpers.engines import ENGINES, run
from tests.helpers.runs import EXACT, REPO, TINY, launch

BATCHES = """
import json
from pathlib import Path
from transformers import TrainerCallback
class Batches(TrainerCallback):
    def __init__(self, trainer):
        plain, seen = trainer.training_step, []
        def training_step(model, inputs, *rest, **kwargs):
            labels, ids = inputs["labels"].tolist(), inputs["input_ids"].tolist()
            real = inputs["attention_mask"].sum().item() if "attention_mask" in inputs else None
            seen.append([trainer.state.global_step + 1, labels, real, sum(map(len, ids))])
            name = f"batches-{trainer.args.process_index}.json"
            Path(trainer.args.output_dir, name).write_text(json.dumps(seen))
            return plain(model, inputs, *rest, **kwargs)
        trainer.training_step = training_step
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
    folder = run_recipe("qwen3_full", *flags, *hook(BATCHES))
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
    def __init__(self, trainer):
        pass
    def on_step_begin(self, args, state, control, **_):
        time.sleep(0.2)
    def on_evaluate(self, args, state, control, **_):
        time.sleep(1)
"""
    flags = ["--max_steps", 6, "--logging_steps", 2, "--eval_strategy", "steps", "--eval_steps", 2]
    folder = run_recipe("qwen3_full", *flags, *hook(slow))
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
    folder = run_recipe("qwen3_qlora", "--max_steps", 1, "--lora_r", 4, "--lora_alpha", 8)
    said = block(capsys.readouterr().out)
    config = Qwen3Config.from_pretrained(demo / "init")
    h, m, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    q, layers = config.num_attention_heads * config.head_dim, config.num_hidden_layers
    linear = h * q * 2 + h * kv * 2 + h * m * 3
    norms = 2 * h + 2 * config.head_dim
    base = config.vocab_size * h + layers * (linear + norms) + h
    adapters = layers * 4 * ((h + q) * 2 + (h + kv) * 2 + (h + m) * 3)
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
    assert measure(Dataset.from_list(rows)) == DatasetSize(rows=2, tokens=9, trained=2 + 2, context=(9 + 4 + 16) / 9)
    plain = Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows])
    assert measure(plain) == DatasetSize(rows=2, tokens=9, trained=4 + 3, context=(25 + 16) / 9)
    assert measure(plain.select([1])).tokens == 4


def test_set_agrees_with_an_epoch(run_recipe, hook, capsys, demo):
    """One whole epoch of packs: the block's averages are what goes by."""
    load_from_disk(demo / "rows" / "chat")["train"].select(range(90)).to_json(demo / "few.jsonl")
    flags = ["--max_steps", -1, "--num_train_epochs", 1, "--dataset_name", demo / "few.jsonl", "--max_length", 1024]
    flags += ["--eval_rows", 0]
    folder = run_recipe("qwen3_full", *flags, *hook(BATCHES))
    said = block(capsys.readouterr().out)
    packs, full = re.search(r"rows in ([\d,]+) packs, ([\d.]+)% of 1,024", said["data"]).groups()
    share = float(re.search(r"([\d.]+)% of them trained", said["step"])[1])
    found = by_hand(folder, logged(folder)[-1]["step"])
    tokens = sum(tokens for _, tokens, _ in found)
    assert share == pytest.approx(100 * found[-1][0] / tokens, abs=0.051)
    assert float(full) == pytest.approx(100 * tokens / (int(packs) * 1024), abs=0.051)


@pytest.mark.long
def test_two_processes(demo, hook, tmp_path):
    """Counts are those of both processes, and the engine is the one that runs."""
    template, few = REPO / "chat_templates" / "qwen3.jinja", ["--packing", "false"]
    flags = ["--use_cpu", "true", "--model_name_or_path", demo / "init", "--dataset_name", demo / "rows" / "chat"]
    flags += ["--chat_template_path", template, "--global_batch_size", 4, "--max_steps", 2, "--save_strategy", "no"]
    flags += ["--output_dir", tmp_path / "run", "--eval_steps", 2, *few, "--per_device_train_batch_size", 2]
    recipe = REPO / "recipes" / "qwen3_full.py"
    done = launch(recipe, *flags, *EXACT, *hook(BATCHES), config="cpu_2proc")
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
    flags = ["--packing", "false", "--save_strategy", "steps", "--save_steps", 2]
    whole = run_recipe("qwen3_full", *flags, out="whole")
    run_recipe("qwen3_full", *flags, "--max_steps", 2, out="cut")
    capsys.readouterr()
    cut = run_recipe("qwen3_full", *flags, "--resume_from_checkpoint", "true", "--allow", "max_steps", out="cut")
    said = capsys.readouterr().out
    assert block(said)["run"].endswith("checkpoint-2, after step 2")
    assert re.findall(r"^(\d)/4  ", said, re.M) == ["3", "4"]
    same = ("step", "trained_tokens", "padding_share", "num_tokens")
    counts = [[[line[name] for name in same] for line in logged(folder)] for folder in (whole, cut)]
    assert counts[0] == counts[1] and len(counts[0]) == 4


@pytest.mark.parametrize("tied", [True, False])
def test_flops_of_a_dense_model(tied):
    """6 N + 12 L H Q T with every matrix written out, and 4 for what is frozen."""
    config = Qwen3Config(
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        head_dim=16,
        num_key_value_heads=2,
        vocab_size=100,
        tie_word_embeddings=tied,
    )
    model = AutoModelForCausalLM.from_config(config)
    matrices = 3 * (32 * 64 + 2 * 32 * 32 + 64 * 32 + 3 * 32 * 80)
    norms = 3 * (2 * 32 + 2 * 16) + 32
    attention = 12 * 3 * 4 * 16 * 500
    assert flops_per_token(model, 500) == TokenFlops(6 * (matrices + norms) + attention, 6 * 3200)
    for weight in model.parameters():
        weight.requires_grad = False
    assert flops_per_token(model, 500) == TokenFlops(4 * (matrices + norms) + attention, 4 * 3200)


def test_flops_of_a_mixture():
    config = Qwen3MoeConfig(
        hidden_size=32,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=8,
        num_key_value_heads=4,
        vocab_size=100,
        num_experts=8,
        num_experts_per_tok=2,
        tie_word_embeddings=False,
    )
    flops = flops_per_token(AutoModelForCausalLM.from_config(config), 0)
    router, norms = 32 * 8, 2 * 32 + 2 * 8
    assert flops.layers == 6 * (2 * (4 * 32 * 32 + router + norms + 2 * 3 * 32 * 24) + 32)
    assert flops.head == 6 * 3200


# multiprocessors, dense bf16 fused multiply-adds a clock of each with fp32 accumulation, boost clock in GHz
CHIPS = {
    "NVIDIA GeForce RTX 3090": (82, 256, 1.695),
    "NVIDIA GeForce RTX 4080": (76, 256, 2.505),
    "NVIDIA GeForce RTX 4090": (128, 256, 2.520),
    "NVIDIA GeForce RTX 5090": (170, 256, 2.407),
    "NVIDIA RTX A6000": (84, 512, 1.800),
    "NVIDIA A100-SXM4-80GB": (108, 1024, 1.410),
    "NVIDIA A100-SXM4-40GB": (108, 1024, 1.410),
    "NVIDIA L40S": (142, 512, 2.490),
    "NVIDIA H100 80GB HBM3": (132, 2048, 1.830),
    "NVIDIA H100 PCIe": (114, 2048, 1.620),
    "NVIDIA H200": (132, 2048, 1.830),
}


def test_peaks_are_what_the_chips_can_do():
    for name, (processors, fmas, clock) in CHIPS.items():
        assert peak_flops(name) == pytest.approx(processors * fmas * 2 * clock * 1e9, rel=2e-3), name
    assert len(CHIPS) == len(CARDS) - 1 and peak_flops("NVIDIA B200") == 2.25e15
    for name in (
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4080 SUPER",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA H100 NVL",
        "Tesla T4",
    ):
        assert peak_flops(name) is None


@pytest.fixture
def clock(monkeypatch):
    """The seconds of time.perf_counter, as clock["now"]."""
    now = {"now": 100.0}
    monkeypatch.setattr("hooks.throughput.time.perf_counter", lambda: now["now"])
    return now


def fake_trainer(**names):
    args = SimpleNamespace(device=torch.device("cpu"), bf16=False, pad_to_multiple_of=None, process_index=0)
    return SimpleNamespace(args=args, train_dataset=None, **names)


def test_figures_of_two_steps(clock):
    """Steps of 3 s and 2 s with an evaluation of 7 s between them, and 1 s in which the log waits for the device."""
    throughput = Throughput(fake_trainer())
    throughput.prepare(SimpleNamespace(log_history=[{"trained_tokens": 40}, {"trained_tokens": 50}, {"eval_loss": 1}]))
    assert throughput.size is None
    labels = torch.tensor([[9, 9, -100, 9], [9, -100, -100, 9]])  # the first of each row is no target: 2 and 1
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    throughput.start_step()
    throughput.count([{"input_ids": labels, "labels": labels, "attention_mask": mask}])
    clock["now"] += 3
    throughput.end_step()
    throughput.end_step()  # whoever asks second adds nothing
    clock["now"] += 7
    throughput.start_step()
    ids = torch.zeros(1, 12, dtype=torch.int64)
    throughput.count([{"input_ids": ids, "shift_labels": torch.tensor([[9, 9, -100]]), "labels": ids}])  # 2, not 11
    clock["now"] += 2
    throughput.end_step()
    clock["now"] += 1
    figures = throughput.figures()
    assert figures.pop("memory_gib") > 0
    assert figures == {
        "trained_tokens": 50 + 3 + 2,
        "padding_share": 0.05,  # 1 of 8 + 12
        "tokens_per_second": round(19 / 6, 1),
        "trained_tokens_per_second": round(5 / 6, 1),
    }
    assert (throughput.total_seconds, throughput.total_positions) == (6, 20)
    throughput.start_step()
    throughput.count([{"input_ids": ids, "labels": ids}])
    clock["now"] += 4
    again = throughput.figures()
    assert (again["trained_tokens"], again["tokens_per_second"]) == (55 + 11, 3)
    assert (throughput.total_seconds, throughput.total_positions) == (10, 32)


def test_progress_counts_the_seconds(clock):
    trainer = fake_trainer()
    trainer.throughput = Throughput(trainer)
    trainer.throughput.start_step()
    clock["now"] += 3
    Progress(trainer, None, None).on_step_end(trainer.args, None, None)
    clock["now"] += 7
    assert trainer.throughput.total_seconds == 3


def test_padding_behind_packs():
    """Documents of 3 and 2 tokens and 3 positions of padding; a full row beside them."""
    trainer = fake_trainer()
    trainer.args.pad_to_multiple_of = 8
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 0], [0, 1, 2, 3, 4, 5, 6, 7]])
    batch = {"input_ids": positions, "labels": positions, "position_ids": positions}
    assert Throughput(trainer).count_tokens(batch) == 5 + 8


def test_what_is_trained():
    def words(columns, assistant_only_loss=False, completion_only_loss=False):
        trainer = fake_trainer(train_rows=SimpleNamespace(column_names=columns))
        trainer.args.assistant_only_loss = assistant_only_loss
        trainer.completion_only_loss = completion_only_loss
        return describe_targets(trainer)

    assert words(["messages"], assistant_only_loss=True) == "assistant turns"
    assert words(["text"]) == "every token"
    assert words(["prompt", "completion"], completion_only_loss=True) == "completions"
    assert words(["input_ids", "labels", "seq_lengths"]) == "labels of the compiled set"


def test_log_of_a_resumed_run(tmp_path):
    """What was logged after the checkpoint goes, as does the line that a killed run was writing; tokens count on."""
    path = tmp_path / "log.jsonl"
    lines = ['{"step": 0, "eval_num_tokens": 0}', '{"step": 1, "num_tokens": 10}', '{"step": 2, "num_tokens": 25}']
    path.write_text("\n".join([*lines, '{"step": 3, "num_tokens": 30}', '{"st']))
    trainer = fake_trainer()
    trainer.args.output_dir = tmp_path
    log = LogFile(trainer)
    state = SimpleNamespace(is_world_process_zero=True, global_step=2)
    log.on_train_begin(trainer.args, state, None)
    state.global_step = 3
    log.on_log(trainer.args, state, None, logs={"loss": 0.5, "num_tokens": 4})
    log.on_log(trainer.args, SimpleNamespace(is_world_process_zero=False, global_step=3), None, logs={"loss": 9.0})
    before, *lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert before == {"step": 0, "eval_num_tokens": 0} and [line["num_tokens"] for line in lines] == [10, 25, 29]
    assert lines[2] == {"step": 3, "loss": 0.5, "num_tokens": 29}
    state.global_step = 0
    LogFile(trainer).on_train_begin(trainer.args, state, None)
    assert path.read_text() == ""


def test_one_bar_on_a_terminal(run_recipe, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run_recipe("qwen3_full", "--disable_tqdm", "false")
    shown = capsys.readouterr()
    assert re.search(r"100%\|█+\| 4/4, 00:00 left, loss [\d.]+, lr ", shown.err)
    assert "/4  loss" not in shown.out and block(shown.out)["run"].startswith("4 steps")


def test_mfu(run_recipe, hook):
    """On a GPU of 1 TFLOP/s: the line's share times its seconds is the FLOPs of its tokens."""
    probe = """
from hooks.throughput import TokenFlops
from transformers import TrainerCallback
class Peak(TrainerCallback):
    def __init__(self, trainer):
        self.trainer = trainer
    def on_step_begin(self, args, state, control, **_):
        self.trainer.throughput.token_flops = TokenFlops(layers=7e6, head=3e5)
        self.trainer.throughput.gpu_peak = 1e12
"""
    for line in logged(run_recipe("qwen3_full", *hook(probe))):
        done = line["tokens_per_second"] * 7e6 + line["trained_tokens_per_second"] * 3e5
        assert line["mfu"] == pytest.approx(done / 1e12, abs=1e-4) and line["mfu"] > 0


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "0"), (9999, "9,999"), (10_000, "10K"), (151_234, "151K"), (4.02e9, "4.02B"), (33_030_144, "33M")],
)
def test_amounts(number, words):
    assert amount(number) == words


def test_durations():
    assert [duration(seconds) for seconds in (5, 65, 3600, 7384)] == ["0:05", "1:05", "1:00:00", "2:03:04"]


def test_a_logged_step_in_words():
    logs = {"loss": 1.23456, "learning_rate": 2e-4, "tokens_per_second": 12_345.6, "trained_tokens_per_second": 999.4}
    logs |= {"padding_share": 0.0123, "memory_gib": 3.46}
    text = "loss 1.235, lr 2.00e-04, 12.3K tokens/s (999 trained), 1.2% padding, 3.5 GiB"
    assert format_logs(logs, "nll") == text
    assert format_logs(logs | {"mfu": 0.4567}, "nll") == f"{text}, MFU 45.7%"


def test_lines_that_others_log():
    validation = {"eval_loss": 0.0, "eval_runtime": 2}
    assert format_logs(validation, "nll") == "validation loss 0 (perplexity 1) in 2.0 s"
    assert format_logs(validation, "dft") == "validation loss 0 (dft) in 2.0 s"
    assert format_logs({"probe": 1.23456789, "name": "x"}, "nll") == "probe 1.235, name x"


LOSSES = [  # settings, architecture, name
    ({}, "dense", "nll"),
    ({"micro_batch_mean": True}, "dense", "nll"),
    ({"loss_type": "dft"}, "dense", "dft"),
    ({"label_smoothing_factor": 0.1}, "dense", "nll with label smoothing 0.1"),
    ({"compute_loss_func": lambda outputs, *_, **__: outputs.logits.mean()}, "dense", "of a compute_loss_func"),
    ({"router_aux_loss_coef": 0.5}, "mixture", "nll + 0.5 x router loss"),
    ({"router_aux_loss_coef": 0.0}, "mixture", "nll"),
    ({}, "mixture", "nll + 0.001 x router loss"),  # the model's own
    ({"loss_type": "dft", "router_aux_loss_coef": 0.5}, "mixture", "dft + 0.5 x router loss"),
]


@pytest.mark.parametrize(("settings", "architecture", "name"), LOSSES)
def test_only_a_plain_loss_is_called_so(settings, architecture, name, demo, tmp_path):
    """Plain is what equals the negative log-likelihood of the model's own logits: its exponential is the perplexity."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64, "initializer_range": 0.5}
    config = Qwen3Config(**shape)
    if architecture == "mixture":
        config = Qwen3MoeConfig(**shape, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    settings = dict(settings)
    compute_loss_func = settings.pop("compute_loss_func", None)
    micro_batch_mean = settings.pop("micro_batch_mean", False)
    args = SFTConfig(str(tmp_path / "run"), use_cpu=True, bf16=False, per_device_eval_batch_size=1, **settings)
    rows = [{"input_ids": torch.randint(0, 64, (12,)).tolist()} for _ in range(3)]
    rows = Dataset.from_list([row | {"labels": row["input_ids"]} for row in rows])
    trainer = SFTTrainer(
        model,
        args,
        train_dataset=rows,
        eval_dataset=rows,
        compute_loss_func=compute_loss_func,
        processing_class=AutoTokenizer.from_pretrained(demo / "init"),
    )
    if micro_batch_mean:  # as the recipes of such a flag set it
        trainer.model_accepts_loss_kwargs = False
    loss = trainer.evaluate()["eval_loss"]
    by_hand = []
    for row in rows:
        ids = torch.tensor(row["input_ids"])
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1].double()
        by_hand.append(torch.nn.functional.cross_entropy(logits, ids[1:]))
    is_plain = abs(loss - torch.stack(by_hand).mean().item()) < 1e-4
    assert name_loss(trainer).startswith(name) and is_plain == (name == "nll")
    assert ("perplexity" in format_logs({"eval_loss": loss}, name_loss(trainer))) == is_plain


def test_a_run_with_another_loss_shows_no_perplexity(run_recipe, capsys):
    flags = ["--loss_type", "dft", "--max_steps", 2, "--eval_strategy", "steps", "--eval_steps", 2]
    folder = run_recipe("qwen3_full", *flags)
    said = capsys.readouterr().out
    loss = next(line for line in map(json.loads, (folder / "log.jsonl").open()) if "eval_loss" in line)["eval_loss"]
    assert loss < 0.37  # p ln p is 1/e at most, which is no perplexity
    assert said.count(f"validation loss {loss:.4g} (dft)") == 2 and "perplexity" not in said  # and in the end block


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
    more = [*EXACT, "--max_steps", 2, *ENGINES["sp"].flags, "--per_device_train_batch_size", 1]
    one = logged(run_recipe("qwen3_full", *more, out="one"))
    flags = ["--model_name_or_path", demo / "init", "--dataset_name", demo / "rows" / "chat", "--output_dir"]
    flags += [tmp_path / engine, "--chat_template_path", REPO / "chat_templates" / "qwen3.jinja", *TINY, *more]
    command = ENGINES[engine].command("qwen3_full", *flags)
    done = run([word for word in command if not word.endswith("zero_shim.py")])  # as the shipped config has it
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
    path = tmp_path / "engine.txt"
    for said, resumed, lines in (("a", 0, "a\n"), ("a", 3, "a\n"), ("b", 5, "a\nb\n"), ("c", 0, "c\n")):
        note_engine(path, said, resumed)
        assert path.read_text() == lines
