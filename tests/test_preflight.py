"""The preflight hook: its verdict on packing equals an oracle's for each architecture, and it counts what is there.

The oracle is a small whole model of the architecture with its logits: documents alone against the same documents
packed, position ids written by hand. The probe gets the architecture's own default config, of full size.
"""

import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import REPO
from datasets import Dataset, DatasetDict
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

HOOK = REPO / "recipes" / "hooks" / "preflight.py"
CPU = torch.device("cpu")

# -- packing: the probe's verdict and the oracle's --------------------------------------------------------------------
SMALL = {
    "vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
EXPERTS |= {"moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LATENT = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
LATENT |= {"num_key_value_heads": 4, "head_dim": 8}
ORACLES = {  # what a small model of it needs beyond SMALL
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": EXPERTS,
    "gemma2": {"sliding_window": 6},
    "gemma3_text": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "mistral": {"sliding_window": 6},
    "phi3": {},
    "gpt_oss": EXPERTS | {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "smollm3": {},
    "deepseek_v3": EXPERTS | LATENT,
    "cohere2": {"sliding_window": 6},
    "glm4_moe": EXPERTS,
    "nanochat": {},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "head_dim": None},
    "jamba": EXPERTS | {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "afmoe": EXPERTS | {"sliding_window": 6, "num_dense_layers": 1},
}
QUICK = ("qwen3", "gemma3_text", "qwen3_moe", "gpt_oss", "smollm3")
UNSUPPORTED = ("gemma2", "gpt_oss")  # with sdpa, by transformers itself


def oracle(kind, attention):
    """(largest difference of a logit between documents packed and alone, the same for documents joined to one)."""
    config = CONFIG_MAPPING[kind](**{name: x for name, x in (SMALL | ORACLES[kind]).items() if x is not None})
    torch.manual_seed(1)
    model = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])._from_config(
        config, attn_implementation=attention, dtype=torch.float32
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8 if weight.dim() > 1 else 1)
        texts = [torch.randint(3, 99, (1, length)) for length in (9, 17, 5)]
        row, places = torch.cat(texts, 1), torch.cat([torch.arange(text.shape[1]) for text in texts])[None]
        model.eval()
        alone = torch.cat([model(input_ids=text, use_cache=False).logits for text in texts], 1)
        packed = model(input_ids=row, position_ids=places, use_cache=False).logits
        joined = model(input_ids=row, use_cache=False).logits
    return (packed - alone).abs().max().item(), (joined - alone).abs().max().item()


@pytest.fixture(scope="module")
def preflight():
    return runpy.run_path(str(HOOK))


def default_config(kind):
    config = CONFIG_MAPPING[kind]()
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]]
    return config


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in QUICK else pytest.mark.long) for kind in ORACLES]
)
def test_verdict_equals_the_oracle(preflight, kind, attention):
    if kind in UNSUPPORTED and attention == "sdpa":
        with pytest.raises(ValueError, match="does not support an attention implementation"):
            oracle(kind, attention)
        with pytest.raises(ValueError, match="does not support an attention implementation"):
            preflight["leak"](default_config(kind), attention, CPU)
        return
    gap, joined = oracle(kind, attention)
    assert joined > 0.1, "the oracle would not see a leak"
    leaks = gap > 1e-4
    assert leaks or gap < 1e-5, gap  # nothing in between
    assert leaks == (kind in ("gpt_oss", "falcon", "jamba", "afmoe"))  # transformers 5.23; both verdicts occur
    gap, joined, limit = preflight["leak"](default_config(kind), attention, CPU)
    print(f"{kind} {attention}: probe {gap:.1e} of {joined:.1f}")
    assert (gap > limit) == leaks
    assert gap > 100 * limit or gap < limit / 100, "the verdict hangs by a thread"


@pytest.fixture
def checked(preflight, tmp_path, capsys):
    """checked(config, attention) is what check_packing does with such a model's folder: its sentence, or its line."""

    def check(config, attention="sdpa"):
        config.save_pretrained(tmp_path / "config")
        args = SimpleNamespace(
            model_init_kwargs={"attn_implementation": attention}, device=CPU, trust_remote_code=False, process_index=0
        )
        capsys.readouterr()
        try:
            preflight["check_packing"](
                args, SimpleNamespace(model_name_or_path=tmp_path / "config", model_revision=None)
            )
        except ValueError as error:
            return str(error)
        return capsys.readouterr().out

    return check


def test_a_model_that_ignores_position_ids_is_refused(checked, monkeypatch):
    assert checked(default_config("qwen3")) == ""
    forward = transformers.Qwen3Model.forward

    def deaf(self, input_ids=None, position_ids=None, **kwargs):
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(transformers.Qwen3Model, "forward", deaf)
    said = checked(default_config("qwen3"))
    assert "qwen3 with sdpa attention lets documents in one pack see each other" in said and "--packing false" in said


def test_a_leak_in_one_kind_of_layer_is_refused(checked, monkeypatch):
    """Gemma 3's sixth layer is its first with full attention."""
    from transformers.models.gemma3 import modeling_gemma3

    assert checked(default_config("gemma3_text")) == ""
    make = modeling_gemma3.create_causal_mask
    monkeypatch.setattr(
        modeling_gemma3, "create_causal_mask", lambda *args, position_ids=None, **kwargs: make(*args, **kwargs)
    )
    assert "see each other" in checked(default_config("gemma3_text"))


def test_packed_rows_that_fail_are_refused(checked):
    """Hybrids whose convolution needs a package that is not there: refused now, not at the first step."""
    said = checked(default_config("qwen3_5_text"))
    assert "qwen3_5_text with sdpa attention cannot take packed rows" in said and "causal_conv1d" in said


def test_what_cannot_be_probed_is_told_and_runs_on(checked):
    said = checked(default_config("blt"))
    assert re.fullmatch(r"preflight: packing of blt with sdpa attention not probed: .+\n", said), said


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_the_probe_of_a_large_model_is_small(preflight, kind):
    """Llama 70B's shape and Qwen3 8B's."""
    shapes = {
        "llama": dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64),
        "qwen3": dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32),
    }
    config = CONFIG_MAPPING[kind](**shapes[kind], num_key_value_heads=8, head_dim=128, vocab_size=151936)
    small = preflight["shrunk"](config, True)
    assert small.num_hidden_layers == 2 and small.head_dim == 128
    weights = sum(w.numel() for w in preflight["build"](small, "sdpa", CPU, torch.float32, False).parameters())
    start = time.process_time()
    gap, joined, limit = preflight["leak"](config, "sdpa", CPU)
    print(f"{kind}: {weights / 1e6:.1f}M weights, {time.process_time() - start:.2f} s")
    assert weights < 10e6 and time.process_time() - start < 2 and gap < limit


def test_random_numbers_stay_as_they_are(preflight):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    preflight["leak"](default_config("llama"), "sdpa", CPU)
    assert torch.equal(before, torch.get_rng_state())


def test_zero3_does_not_shard_the_probe(preflight):
    from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

    zero3 = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_batch_size": 1})
    assert zero3 and is_deepspeed_zero3_enabled()
    model = preflight["build"](preflight["shrunk"](default_config("qwen3"), True), "sdpa", CPU, torch.float32, False)
    assert all(weight.numel() and not hasattr(weight, "ds_id") for weight in model.parameters())
    gap, joined, limit = preflight["leak"](default_config("qwen3"), "sdpa", CPU)
    assert gap < limit


# -- in a run ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def told(run_recipe, capsys, monkeypatch):
    """told(*flags) runs a recipe with the hook and returns its sentence (starts with the recipe) or its lines."""

    def run(*flags, recipe="qwen3_full", out="run"):
        capsys.readouterr()
        try:
            run_recipe(recipe, "--hooks", HOOK, "--max_steps", 1, *flags, out=out)
        except ValueError as error:
            monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
            return "refused: " + str(error)
        return "\n".join(line for line in capsys.readouterr().out.splitlines() if line.startswith("preflight: "))

    return run


def test_seeded_run_is_bitwise_the_same(run_recipe, capsys, tmp_path):
    from safetensors.torch import load_file

    alone = tmp_path / "qwen3_qlora.py"  # a copy finds none of its own hooks
    alone.write_text((REPO / "recipes" / "qwen3_qlora.py").read_text())
    weights = []
    for out, hooks in (("without", ["log.py"]), ("with", ["log.py", "preflight.py"])):
        template = ["--chat_template_path", REPO / "chat_templates" / "qwen3.jinja"]
        hooks = [str(HOOK.parent / name) for name in hooks]
        folder = run_recipe(alone, "--max_steps", 2, *template, "--hooks", *hooks, out=out)
        assert ("preflight: " in capsys.readouterr().out) == (out == "with")
        log = (folder / "log.jsonl").read_text().splitlines()
        losses = [json.loads(line).get("loss") for line in log]
        weights.append((losses, load_file(folder / "adapter_model.safetensors")))
    (losses, one), (other_losses, other) = weights
    assert losses == other_losses and one.keys() == other.keys() and len(one) > 10
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_unknown_allow(told):
    said = told("--allow", "cut_answers", "bf16_wieghts")
    assert said.startswith("refused: --allow bf16_wieghts: no such name") and "masked_packs" in said


def test_leaking_model_is_refused_before_data_are_loaded(told, tmp_path, demo):
    config = default_config("gpt_oss")
    config.save_pretrained(tmp_path / "oss")
    flags = ["--model_name_or_path", tmp_path / "oss", "--dataset_name", "no/such.jsonl"]
    said = told(*flags, "--attn_implementation", "eager")
    assert said.startswith("refused: packing: gpt_oss with eager attention") and not (tmp_path / "run").exists()
    said = told(*flags, "--attn_implementation", "eager", "--packing", "false")  # goes on to what is missing here
    assert "refused" in said and "packing" not in said, said


def test_wrapped_says_so(told):
    said = told("--packing_strategy", "wrapped", "--allow", "masked_packs")
    assert said.startswith("preflight: wrapped packing: documents see those before them")


def test_low_precision_weights(preflight):
    def trainer(dtype, zero=None):
        plugin = None if zero is None else SimpleNamespace(zero_stage=zero)
        model = torch.nn.Linear(2, 2).to(dtype)
        return SimpleNamespace(model=model, args=SimpleNamespace(deepspeed_plugin=plugin))

    full, lora, check = SimpleNamespace(use_peft=False), SimpleNamespace(use_peft=True), preflight["check_weights"]
    for dtype in (torch.bfloat16, torch.float16):
        for zero in (None, 0):
            with pytest.raises(ValueError, match=str(dtype)[6:] + " weights .*--allow bf16_weights"):
                check(trainer(dtype, zero), full, [])
        check(trainer(dtype), full, ["bf16_weights"])
        check(trainer(dtype), lora, [])
        for zero in (1, 2, 3):
            check(trainer(dtype, zero), full, [])
    check(trainer(torch.float32), full, [])


def test_low_precision_weights_in_a_run(told, tmp_path):
    """A refusal leaves the folder as it was, so that the mended command runs; what was asked for is what is trained."""
    from safetensors.torch import load_file

    assert told("--dtype", "bfloat16").startswith("refused: full fine-tuning of bfloat16 weights")
    assert not any((tmp_path / "run").glob("*"))
    assert "tokens trained" in told("--dtype", "bfloat16", "--allow", "bf16_weights")
    assert {w.dtype for w in load_file(tmp_path / "run" / "model.safetensors").values()} == {torch.bfloat16}


def counted(line):
    """(trained, tokens, cut, rows, masked, units, shared validation rows) of the hook's line."""
    found = re.fullmatch(
        r"preflight: ([\d,]+) of ([\d,]+) tokens trained \(.+?%\), ([\d,]+) of ([\d,]+) rows cut by max_length within "
        r"what is trained, ([\d,]+) of ([\d,]+) (?:packs|rows) with nothing to train"
        r"(?:, ([\d,]+) validation rows stand in train too)?",
        line,
    )
    assert found, line
    return tuple(int((number or "0").replace(",", "")) for number in found.groups())


@pytest.fixture
def preview(demo, tmp_path):
    """preview(rows, *flags) are the totals that data_prep/preview.py counts in the same rows with the same settings."""

    def run(rows, *flags):
        command = [sys.executable, REPO / "data_prep" / "preview.py", rows, "--recipe", REPO / "recipes/qwen3_full.py"]
        command += ["--model_name_or_path", demo / "init", "--report", tmp_path / "report.json", "--rows", 0]
        command += ["--chat_template_path", REPO / "chat_templates" / "qwen3.jinja", *flags]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True)
        assert done.returncode in (0, 1), done.stderr
        return json.loads((tmp_path / "report.json").read_text())["totals"]

    return run


ALL = ["--allow", "masked_packs", "cut_answers"]


@pytest.mark.parametrize(
    ("length", "strategy"),
    [(96, "bfd"), *(pytest.param(*way, marks=pytest.mark.long)
                    for way in ((96, "unpacked"), (160, "bfd_split"), (512, "bfd"), (512, "unpacked")))],
)  # fmt: skip
def test_counts_equal_preview(told, preview, demo, tmp_path, length, strategy):
    flags = ["--max_length", length, "--packing", str(strategy != "unpacked").lower(), "--eval_rows", 0]
    if strategy != "unpacked":
        (tmp_path / "way.yaml").write_text(f"packing_strategy: {strategy}\n")
        flags += ["--config", tmp_path / "way.yaml"]
    trained, tokens, cut, rows, masked, units, _ = counted(told(*flags, *ALL))
    totals = preview(demo / "rows" / "chat", *flags)
    assert (cut, rows, units) == (totals["cut"], totals["rows"], totals["units"])
    assert tokens == totals["kept_tokens"]
    if strategy == "bfd_split":  # cuts nothing; TRL does not train the first token of a later piece, preview counts it
        assert cut == 0 and totals["kept_trained"] - 99 < trained < totals["kept_trained"]
        assert masked >= totals["masked_packs"] > 0
    else:
        assert (trained, masked) == (totals["kept_trained"], totals["masked_packs"])
        assert length == 512 or cut > 9 and (masked > 9) == (strategy == "bfd")


def test_cut_answers_to_the_token(told, demo, tmp_path):
    """One row is exactly as long as the limit, one loses only the untrained newline, one loses a trained token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo / "init")
    template = (REPO / "chat_templates" / "qwen3.jinja").read_text()

    def row(size):
        asked, answered = {"role": "user", "content": "say"}, {"role": "assistant", "content": "a " * size}
        return {"messages": [asked, answered]}

    def mask(size):
        return tokenizer.apply_chat_template(
            row(size)["messages"], chat_template=template, return_dict=True, return_assistant_tokens_mask=True
        )["assistant_masks"]

    base = len(mask(40)) - 40
    sizes = [5, 6, 7, 40, 41, 42, 43, 8]
    assert [len(mask(size)) - base for size in sizes] == sizes
    limit = base + 40
    expected = sum(any(mask(size)[limit:]) for size in sizes)
    assert expected == 2 and sum(len(mask(size)) > limit for size in sizes) == 3
    path = tmp_path / "rows.jsonl"
    # where the hook looks first there are two of the long rows and ninety short ones with a long note
    rows = [row(size) | {"source": "x" * (1000 if size in (40, 41) else 0)} for size in sizes]
    rows += [row(5) | {"source": "x" * 500}] * 90
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--dataset_name", path, "--eval_rows", 0, "--max_length", limit]
    said = told(*flags)
    assert said == (
        "refused: 2 of 98 rows cut by max_length within what is trained: "
        f"--max_length {base + 43} keeps them whole, --allow cut_answers trains them cut"
    )
    assert counted(told(*flags, "--allow", "cut_answers", out="asked"))[2:4] == (2, 98)
    assert counted(told(*flags, "--packing", "false", "--max_length", limit + 3, out="fits"))[2:6] == (0, 98, 0, 98)


def test_rows_that_came_packed(told, demo, tmp_path, monkeypatch):
    """By hand: a document's first label is nobody's target; the second pack trains nothing; nothing can be cut."""
    rows = {
        "input_ids": [[5, 6, 7, 8, 9], [5, 6, 7], [9, 9]],
        "labels": [[5, 6, -100, 8, 9], [5, -100, 7], [-100, 9]],
        "seq_lengths": [[3, 2], [2, 1], [2]],
    }
    DatasetDict(train=Dataset.from_dict(rows), test=Dataset.from_dict(rows).select([2])).save_to_disk(tmp_path / "set")
    flags = ["--dataset_name", tmp_path / "set", "--dataset_test_split", "test", "--global_batch_size", 3]
    assert told(*flags).startswith("refused: 1 of 3 packs with nothing to train")
    said = told(*flags, "--allow", "masked_packs", out="asked")
    # of 6, 9 in the first pack only 6 and 9 are left, for 8 begins its document
    assert counted(said) == (3, 10, 0, 3, 1, 3, 1)
    # such rows are always trained packed, whatever --packing says: the probe must have its say
    forward = transformers.Qwen3Model.forward
    monkeypatch.setattr(
        transformers.Qwen3Model, "forward", lambda self, input_ids=None, position_ids=None, **kwargs:
        forward(self, input_ids, **kwargs))  # fmt: skip
    said = told(*flags, "--packing", "false", "--allow", "masked_packs", out="deaf")
    assert said.startswith("refused: packing: qwen3 with sdpa attention lets documents")


def test_counting_ten_million_tokens_takes_a_second(preflight):
    import numpy as np
    import pyarrow as pa

    packs, size, document = 5000, 2048, 256
    ids = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(packs * size) % 997), size).cast(pa.list_(pa.int64()))
    lengths = pa.FixedSizeListArray.from_arrays(pa.array([document] * (packs * size // document)), size // document)
    table = pa.table({"input_ids": ids, "labels": ids, "seq_lengths": lengths.cast(pa.list_(pa.int64()))})
    data = Dataset(table)
    args = SimpleNamespace(max_length=size)
    trainer = SimpleNamespace(train_dataset=data, eval_dataset=data.select(range(100)), args=args)
    start = time.process_time()
    found, shared = preflight["count"](trainer), preflight["overlap"](trainer)
    spent = time.process_time() - start
    print(f"{spent:.2f} s")
    assert found["tokens"] == 10_240_000 and found["trained"] == 10_240_000 - 40_000 and shared == 800
    assert spent < 4  # 1 s on a quiet machine


# -- launched ---------------------------------------------------------------------------------------------------------
SHIM = """
import runpy, sys
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
def set_device(self):
    self.device = torch.device("cpu") if self.device is None else self.device
if {shim}:  # makes accelerate take gloo on CPUs for GPUs, so that its FSDP branch can be reached
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = set_device
sys.argv[0] = {recipe!r}
runpy.run_path({recipe!r}, run_name="__main__")
"""
TELL = """
import runpy
import shutil
def prepare(script, args, model):
    print("engine:", runpy.run_path({hook!r})["engine"](args))
    raise SystemExit(0)
"""


def launched(tmp_path, yaml, *flags, recipe=REPO / "recipes" / "qwen3_qlora.py", shim=False):
    """The finished process of `accelerate launch` with this YAML text, and a model that does not exist."""
    (tmp_path / "launch.yaml").write_text(yaml)
    (tmp_path / "start.py").write_text(SHIM.format(shim=shim, recipe=str(recipe)))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", tmp_path / "launch.yaml"]
    command += [tmp_path / "start.py", "--model_name_or_path", "no/such", "--output_dir", tmp_path / "run"]
    command += ["--use_cpu", str(not shim).lower(), "--bf16", "false", *flags]
    with socket.socket() as free:  # a new one each time: the last launch may not have let go of its own
        free.bind(("127.0.0.1", 0))
        port = {"MASTER_PORT": str(free.getsockname()[1])}
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600, env=os.environ | port)


FSDP = "distributed_type: FSDP\nnum_processes: 2\nuse_cpu: {}\nfsdp_config: {{fsdp_version: {}}}\n"
ZERO = "distributed_type: DEEPSPEED\nnum_processes: 2\nuse_cpu: true\ndeepspeed_config: {{zero_stage: {}}}\n"


def test_qlora_with_fsdp2_is_refused_before_the_model_is_opened(tmp_path):
    done = launched(tmp_path, FSDP.format("false", 2), "--hooks", HOOK, shim=True)
    said = [line for line in done.stderr.splitlines() if "qwen3_qlora.py: " in line]
    assert done.returncode and len(said) == 1, done.stderr[-2000:]
    assert "QLoRA with FSDP2 does not work" in said[0] and "accelerate#3874" in said[0] and "no/such" not in done.stderr


@pytest.mark.long
@pytest.mark.parametrize(
    ("yaml", "shim", "engine"),
    [
        (FSDP.format("false", 2), True, "FSDP2"),
        (FSDP.format("false", 1), True, "FSDP1"),
        (FSDP.format("true", 2), False, "DDP"),  # what accelerate does without a word
        *((ZERO.format(stage), False, f"ZeRO-{stage}") for stage in (1, 2, 3)),
        ("distributed_type: MULTI_GPU\nnum_processes: 2\nuse_cpu: true\n", False, "DDP"),
        ('distributed_type: "NO"\nnum_processes: 1\nuse_cpu: true\n', False, "one process"),
    ],
)
def test_engine_is_what_accelerate_was_told(tmp_path, yaml, shim, engine):
    (tmp_path / "tell.py").write_text(TELL.format(hook=str(HOOK)))
    # without hooks of its own, which would look for the model
    alone = shutil.copy(REPO / "recipes" / "qwen3_qlora.py", tmp_path)
    template = REPO / "chat_templates" / "qwen3.jinja"
    flags = ["--chat_template_path", template, "--hooks", tmp_path / "tell.py"]
    done = launched(tmp_path, yaml, *flags, recipe=alone, shim=shim)
    assert f"engine: {engine}\n" in done.stdout, done.stderr[-2000:]


def test_pairs_table(preflight, monkeypatch):
    """Other pairs pass; a row more refuses one more."""
    plugin = SimpleNamespace(zero_stage=3)
    args = SimpleNamespace(deepspeed_plugin=plugin, packing=True)
    model = SimpleNamespace(load_in_4bit=True, load_in_8bit=False, use_peft=True)
    preflight["check_pair"](args, model, [])
    preflight["PAIRS"]["QLoRA", "ZeRO-3"] = ("qlora_fsdp2", "a reason")
    with pytest.raises(ValueError, match="QLoRA with ZeRO-3 does not work: a reason.*--allow qlora_fsdp2"):
        preflight["check_pair"](args, model, [])
    preflight["check_pair"](args, model, ["qlora_fsdp2"])
    preflight["check_pair"](args, SimpleNamespace(load_in_4bit=False, load_in_8bit=False, use_peft=True), [])
    del preflight["PAIRS"]["QLoRA", "ZeRO-3"]
    monkeypatch.setenv("PARALLELISM_CONFIG_SP_SIZE", "2")  # as accelerate launch sets it
    with pytest.raises(ValueError, match="--packing false"):
        preflight["check_pair"](args, model, [])
    args.packing = False
    preflight["check_pair"](args, model, [])


def test_downloads_are_told_with_their_size(preflight, monkeypatch, tmp_path, capsys):
    """Of a model what from_pretrained takes, of its own revision; what the cache has is not counted, nor a file whose
    size the hub does not tell; a local path, a rank above 0 and what is all there say nothing; a hub that does not
    answer is left to the loader. Each condition was left out once, and so was the call in prepare()."""
    files = {"model-1.safetensors": 7e9, "model-2.safetensors": 1e9, "config.json": 1e3, "pytorch_model.bin": 8e9,
             "onnx/model.safetensors": 8e9}  # fmt: skip
    known = {"owner/model": files, "owner/rows": {"a.parquet": 2.5e9, "README.md": None}}
    known["owner/model-2"], asked = {"model-2.safetensors": 1e9}, []

    class Hub:
        def repo_info(self, name, repo_type, revision, files_metadata):
            asked.append(name)
            assert files_metadata and repo_type == ("model" if "model" in name else "dataset")
            assert revision == ("v2" if repo_type == "model" else None)
            siblings = [SimpleNamespace(rfilename=file, size=size) for file, size in known[name].items()]
            return SimpleNamespace(sha="a1", siblings=siblings)

    def cached(name, filename, repo_type, revision):
        return "/cache" if (repo_type, filename, revision) == ("model", "model-2.safetensors", "a1") else None

    say = preflight["say_downloads"]
    monkeypatch.setitem(say.__globals__, "HfApi", Hub)
    monkeypatch.setitem(say.__globals__, "try_to_load_from_cache", cached)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def told(model, rows, rank=0):
        model = SimpleNamespace(model_name_or_path=model, model_revision="v2")
        say(SimpleNamespace(dataset_name=rows), SimpleNamespace(process_index=rank), model)
        return capsys.readouterr().out.splitlines()

    assert told("owner/model", "owner/rows") == [
        "preflight: model owner/model: 7.00 GB to download",
        "preflight: dataset owner/rows: up to 2.50 GB to download",
    ]
    assert told(str(tmp_path), "no/such") == [] == told("owner/model", "owner/rows", rank=1)
    assert told("owner/model-2", None) == []
    assert asked == ["owner/model", "owner/rows", "no/such", "owner/model-2"]  # the hub is not asked for the others

    def stop(*_):
        raise ValueError("here")

    monkeypatch.setitem(say.__globals__, "check_pair", lambda *_: None)
    monkeypatch.setitem(say.__globals__, "check_class", stop)
    state = SimpleNamespace(wait_for_everyone=lambda: None)
    model = SimpleNamespace(model_name_or_path=str(tmp_path), model_revision="v2")
    with pytest.raises(ValueError, match="here"):
        script = SimpleNamespace(allow=[], dataset_name="owner/rows")
        preflight["prepare"](script, SimpleNamespace(process_index=0, distributed_state=state), model)
    assert capsys.readouterr().out == "preflight: dataset owner/rows: up to 2.50 GB to download\n"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert told("owner/model", "owner/rows") == []
