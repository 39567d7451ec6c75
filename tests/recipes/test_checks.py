"""The checks: packing's verdict equals an oracle's for each architecture, counts are counted by hand, the rest refuses.

The oracle is a small whole model of the architecture with its logits: documents alone against the same documents
packed, position ids written by hand. The probe gets the architecture's own default config, of full size.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from datasets import Dataset, DatasetDict, load_from_disk
from hooks import checks
from hooks.checks import (
    allowed,
    compiled,
    counts,
    downloads,
    engine,
    packing,
    paths,
    personas,
    ranks,
    rows,
    settings,
    stop_token,
    template,
)
from hooks.messages import UsageError
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.training_args import OptimizerNames
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer

from data_prep.common import personas as data_personas
from data_prep.common.recipe_settings import LENGTH_REMEDY
from tests.helpers.runs import MODULES, REPO

CPU = torch.device("cpu")
TEMPLATES = REPO / "chat_templates"
QWEN3 = str(TEMPLATES / "qwen3.jinja")
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
SILENT = {"messages": [{"role": "user", "content": "a"}]}


@dataclass
class RecipeArguments(ScriptArguments):
    """What the checks read of a recipe's own."""

    allow: list[str] = field(default_factory=list)


@pytest.fixture
def training_args(tmp_path):
    """training_args(**settings): an SFTConfig as a recipe hands it to the checks."""

    def make(**values):
        attention = values.pop("attention", "sdpa")
        values = {"output_dir": str(tmp_path / "run"), "use_cpu": True, "chat_template_path": QWEN3} | values
        return SFTConfig(model_init_kwargs={"attn_implementation": attention}, **values)

    return make


def script_args(dataset_name="owner/rows", **values):
    return RecipeArguments(dataset_name=str(dataset_name), **values)


def model_args(name="owner/model", **values):
    return ModelConfig(model_name_or_path=name and str(name), **values)


def refusal(function, *arguments, **named):
    """The sentence that a check refuses with, or None where it passes."""
    try:
        function(*arguments, **named)
    except UsageError as error:
        sentence = str(error)
        assert "\n" not in sentence and not sentence.endswith("."), sentence
        return sentence
    return None


def write_rows(path, *values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


# -- packing: the probe's verdict and the oracle's --------------------------------------------------------------------
SMALL = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
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


def small_model(kind, attention="eager", **values):
    """A small whole model of an architecture, float32."""
    settings_of_kind = {name: value for name, value in (SMALL | ORACLES[kind] | values).items() if value is not None}
    config = CONFIG_MAPPING[kind](**settings_of_kind)
    torch.manual_seed(1)
    model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])
    return model_class._from_config(config, attn_implementation=attention, dtype=torch.float32)


def oracle(kind, attention):
    """(largest difference of a logit between documents packed and alone, the same for documents joined to one)."""
    model = small_model(kind, attention).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(8)
        texts = [torch.randint(3, 99, (1, length)) for length in (9, 17, 5)]
        row = torch.cat(texts, 1)
        positions = torch.cat([torch.arange(text.shape[1]) for text in texts])[None]
        alone = torch.cat([model(input_ids=text, use_cache=False).logits for text in texts], 1)
        packed = model(input_ids=row, position_ids=positions, use_cache=False).logits
        joined = model(input_ids=row, use_cache=False).logits
    return (packed - alone).abs().max().item(), (joined - alone).abs().max().item()


def default_config(kind):
    config = CONFIG_MAPPING[kind]()
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]]
    return config


def oracle_kinds():
    return [pytest.param(kind, marks=[] if kind in QUICK else pytest.mark.long) for kind in ORACLES]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", oracle_kinds())
def test_verdict_equals_the_oracle(kind, attention):
    if kind in UNSUPPORTED and attention == "sdpa":
        with pytest.raises(ValueError, match="does not support an attention implementation"):
            oracle(kind, attention)
        with pytest.raises(packing.NotProbed, match="does not support an attention implementation"):
            packing.probe_packing(default_config(kind), attention, CPU)
        return
    gap, joined = oracle(kind, attention)
    assert joined > 0.1, "the oracle would not see a leak"
    leaks = gap > 1e-4
    assert leaks or gap < 1e-5, gap  # nothing in between
    assert leaks == (kind in ("gpt_oss", "falcon", "jamba", "afmoe"))  # transformers 5.23; both verdicts occur
    probe = packing.probe_packing(default_config(kind), attention, CPU)
    print(f"{kind} {attention}: probe {probe.gap:.1e} of {probe.joined_gap:.1f}")
    assert probe.leaks == leaks
    assert probe.gap > 100 * probe.limit or probe.gap < probe.limit / 100, "the verdict hangs by a thread"


@pytest.fixture
def packing_verdict(training_args, capsys):
    """packing_verdict(config, **settings): what check_packing refuses with, else what it says."""

    def check(config, allow=(), **values):
        capsys.readouterr()
        args = training_args(**{"packing": True} | values)
        return refusal(packing.check_packing, config, args, list(allow)) or capsys.readouterr().out

    return check


def test_a_model_that_ignores_position_ids_is_refused(packing_verdict, monkeypatch):
    assert packing_verdict(default_config("qwen3")) == ""
    forward = transformers.Qwen3Model.forward

    def deaf(self, input_ids=None, position_ids=None, **kwargs):
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(transformers.Qwen3Model, "forward", deaf)
    verdict = packing_verdict(default_config("qwen3"))
    assert "qwen3 with sdpa attention lets documents in one pack see each other" in verdict
    assert "--packing false" in verdict
    came_packed = {"packing": False, "padding_free": True, "max_length": None}
    assert packing_verdict(default_config("qwen3"), **came_packed).startswith("packing: ")
    assert packing_verdict(default_config("qwen3"), packing=False) == ""


def test_which_settings_are_probed(packing_verdict, monkeypatch):
    """Packs and padding-free rows are; padded rows are not, and wrapped packs say that they mix documents."""
    probed = []
    monkeypatch.setattr(packing, "probe_packing", lambda *_: probed.append(1) or packing.PackingProbe(0, 1, 0.1))
    config = default_config("qwen3")
    for values in ({}, {"packing_strategy": "bfd_split"}, {"packing_strategy": "wrapped", "padding_free": True}):
        packing_verdict(config, **values)
        assert probed.pop() and not probed
    verdict = packing_verdict(config, packing_strategy="wrapped")
    assert "wrapped packing: documents see those before them" in verdict and not probed
    assert not packing.is_padding_free(SFTConfig(use_cpu=True))
    assert packing.is_padding_free(SFTConfig(use_cpu=True, padding_free=True, max_length=None))


def test_a_leak_in_one_kind_of_layer_is_refused(packing_verdict, monkeypatch):
    """Gemma 3's sixth layer is its first with full attention."""
    from transformers.models.gemma3 import modeling_gemma3

    assert packing_verdict(default_config("gemma3_text")) == ""
    make_mask = modeling_gemma3.create_causal_mask

    def deaf(*args, position_ids=None, **kwargs):
        return make_mask(*args, **kwargs)

    monkeypatch.setattr(modeling_gemma3, "create_causal_mask", deaf)
    assert "see each other" in packing_verdict(default_config("gemma3_text"))


def test_a_gap_that_is_no_number_is_a_leak():
    assert packing.PackingProbe(float("nan"), 1.0, 0.1).leaks and not packing.PackingProbe(0.0, 1.0, 0.1).leaks


def test_packed_rows_that_fail_are_refused(packing_verdict):
    """Hybrids whose convolution needs a package that is not there: refused now, not at the first step."""
    verdict = packing_verdict(default_config("qwen3_5_text"))
    assert "qwen3_5_text with sdpa attention cannot take packed rows" in verdict and "causal_conv1d" in verdict


def test_what_cannot_be_probed_is_refused_unless_allowed(packing_verdict):
    verdict = packing_verdict(default_config("blt"))
    assert verdict.startswith("packing: whether blt with sdpa attention lets documents in one pack see each other is ")
    assert verdict.endswith(": --packing false, or another --attn_implementation, or --allow unprobed_packing")
    verdict = packing_verdict(default_config("blt"), allow=["unprobed_packing"])
    assert re.fullmatch(r"\S+: packing of blt with sdpa attention not probed: .+\n", verdict), verdict


def test_the_small_model_takes_the_same_paths():
    """Every kind of layer, windows shorter than a document, and every expert chosen, so that rounding chooses none."""
    small = packing.shrink_config(default_config("gemma3_text"), narrow=True)
    assert small.layer_types == ["sliding_attention"] * 5 + ["full_attention"] and small.num_hidden_layers == 6
    assert small.sliding_window < packing.DOCUMENT_LENGTH
    small = packing.shrink_config(default_config("qwen3_moe"), narrow=True)
    assert small.num_experts == small.num_experts_per_tok > 1
    wide = packing.shrink_config(default_config("qwen3"), narrow=False)
    assert wide.hidden_size == default_config("qwen3").hidden_size and wide.num_hidden_layers == 2


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_the_probe_of_a_large_model_is_small(kind):
    """Llama 70B's shape and Qwen3 8B's."""
    shapes = {
        "llama": dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64),
        "qwen3": dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32),
    }
    config = CONFIG_MAPPING[kind](**shapes[kind], num_key_value_heads=8, head_dim=128, vocab_size=151936)
    small = packing.shrink_config(config, narrow=True)
    assert small.num_hidden_layers == 2 and small.head_dim == 128
    model = packing.build_probe_model(small, "sdpa", CPU, torch.float32, False)
    weights = sum(weight.numel() for weight in model.parameters())
    start = time.process_time()
    probe = packing.probe_packing(config, "sdpa", CPU)
    spent = time.process_time() - start
    print(f"{kind}: {weights / 1e6:.1f}M weights, {spent:.2f} s")
    assert weights < 10e6 and spent < 2 and not probe.leaks


def test_random_numbers_stay_as_they_are():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    packing.probe_packing(default_config("llama"), "sdpa", CPU)
    assert torch.equal(before, torch.get_rng_state())


def test_zero3_does_not_shard_the_probe():
    from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

    zero3 = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_batch_size": 1})
    assert zero3 and is_deepspeed_zero3_enabled()
    config = packing.shrink_config(default_config("qwen3"), narrow=True)
    model = packing.build_probe_model(config, "sdpa", CPU, torch.float32, False)
    assert all(weight.numel() and not hasattr(weight, "ds_id") for weight in model.parameters())
    assert not packing.probe_packing(default_config("qwen3"), "sdpa", CPU).leaks


# -- names to allow ---------------------------------------------------------------------------------------------------
def test_unknown_allow():
    sentence = refusal(allowed.check_allowed_names, ["cut_answers", "bf16_wieghts"])
    assert sentence.startswith("--allow bf16_wieghts: no such name, the nearest is bf16_weights: there are ")
    assert all(name in sentence for name in allowed.ALLOWED)
    assert refusal(allowed.check_allowed_names, list(allowed.ALLOWED)) is None


# -- settings ---------------------------------------------------------------------------------------------------------
def test_choices_of_yaml(training_args):
    """argparse looks at the command line alone."""
    args = training_args()
    assert refusal(settings.check_choices, script_args(), args, model_args()) is None
    args.packing_strategy = "bdf"
    sentence = refusal(settings.check_choices, script_args(), args, model_args())
    assert sentence == (
        "packing_strategy bdf: no such value, the nearest is bfd: choose one of bfd, bfd_split, wrapped"
    )
    sentence = refusal(settings.check_choices, script_args(), training_args(), model_args(dtype="bfloat61"))
    assert sentence.startswith("dtype bfloat61: no such value, the nearest is bfloat16: choose one of auto, ")


def test_every_optimizer_has_its_package():
    """As transformers/trainer_optimizer.py asks for it; what the table does not know comes with torch."""
    with_torch = {optimizer.value for optimizer in OptimizerNames if not settings.find_optimizer_module(optimizer)}
    assert with_torch == {"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"}
    source = Path(find_spec("transformers.trainer_optimizer").origin).read_text()
    groups = dict(re.findall(r"^_(\w+)_OPTIMIZERS = \[(.+?)\]", source, re.MULTILINE | re.DOTALL))
    modules = {
        "BITSANDBYTES": "bitsandbytes",
        "GALORE": "galore_torch",
        "APOLLO": "apollo_torch",
        "TORCHAO": "torchao",
        "SCHEDULE_FREE": "schedulefree",
    }
    assert groups.keys() == modules.keys()
    for group, names in groups.items():
        for name in re.findall(r"OptimizerNames\.(\w+)", names):
            assert settings.find_optimizer_module(OptimizerNames[name].value) == modules[group], name


@pytest.mark.parametrize(
    ("values", "module", "sentence"),
    [
        ({"optim": "adamw_torch_4bit"}, "torchao", "--optim adamw_torch_4bit needs the package torchao: pip "),
        ({"optim": "paged_adamw_8bit"}, "bitsandbytes", "--optim paged_adamw_8bit needs the package bitsandbytes: "),
        ({"optim": "stable_adamw"}, "optimi", "--optim stable_adamw needs the package optimi: pip install torch-"),
        ({"report_to": "wandb"}, "wandb", "--report_to wandb needs the package wandb: pip install wandb"),
        ({"report_to": ["none", "trackio"]}, "", "--report_to none: no such tracker"),
        ({"report_to": "wandbb"}, "", "--report_to wandbb: no such tracker, the nearest is wandb: choose "),
        ({"report_to": "tensorboard"}, "tensorboard", "--report_to tensorboard needs the package tensorboard: pip "),
        ({"use_liger_kernel": True}, "liger_kernel", "--use_liger_kernel true needs the package liger_kernel: pip "),
        ({"attention": "flash_attention_2"}, "flash_attn", "--attn_implementation flash_attention_2 needs the "),
        ({"attention": "flash"}, "", "--attn_implementation flash: no such attention"),
    ],
)
def test_a_missing_package_is_a_sentence(training_args, monkeypatch, values, module, sentence):
    """Nothing is installed, then all of it."""
    args = training_args(**values)
    monkeypatch.setattr(settings, "is_installed", lambda name: False)
    assert refusal(settings.check_packages, args, model_args()).startswith(sentence)
    if module:
        monkeypatch.setattr(settings, "is_installed", lambda name: name == module)
        assert refusal(settings.check_packages, args, model_args()) is None


def test_packages_of_quantized_models_and_hub_kernels(training_args, monkeypatch):
    monkeypatch.setattr(settings, "is_installed", lambda name: name == "kernels")
    assert "bitsandbytes" in refusal(settings.check_packages, training_args(), model_args(load_in_4bit=True))
    assert "bitsandbytes" in refusal(settings.check_packages, training_args(), model_args(load_in_8bit=True))
    for attention in ("flash_attention_2", "kernels-community/flash-attn3"):
        assert refusal(settings.check_packages, training_args(attention=attention), model_args()) is None


def test_installed_is_what_can_be_imported(tmp_path, monkeypatch):
    (tmp_path / "wandbox").mkdir()  # as wandb leaves its folder behind
    (tmp_path / "module_here.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert settings.is_installed("module_here") and settings.is_installed("torch.nn")
    for name in ("wandbox", "no_such_module", "no_such.module"):
        assert not settings.is_installed(name)


def test_every_tracker_of_transformers_is_known():
    from transformers.integrations import integration_utils

    assert settings.TRACKER_MODULES.keys() == integration_utils.INTEGRATION_TO_CALLBACK.keys()


def test_what_save_only_model_costs_is_said(training_args, capsys):
    settings.say_save_only_model(training_args(save_only_model=True))
    assert capsys.readouterr().out.endswith(
        "--save_only_model true: checkpoints hold no optimizer state: a resume cannot go on exactly\n"
    )
    settings.say_save_only_model(training_args())
    assert capsys.readouterr().out == ""


# -- paths ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def work_folder(tmp_path, monkeypatch):
    """An empty working directory with data/chat, runs/demo/base and rows.jsonl."""
    folder = tmp_path / "work"
    (folder / "data" / "chat").mkdir(parents=True)
    (folder / "runs" / "demo" / "base").mkdir(parents=True)
    write_rows(folder / "rows.jsonl", CHAT)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(
    ("model", "dataset", "sentence"),
    [
        ("runs/demo/bass", "o/n", "--model_name_or_path runs/demo/bass: no such folder, did you mean runs/demo/base?"),
        ("runs/dem/base", "o/n", "--model_name_or_path runs/dem/base: no such folder, did you mean runs/demo/base?"),
        (
            "runs/xyz",
            "o/n",
            "--model_name_or_path runs/xyz: no such folder; if it is a hub id: hf download --repo-type model runs/xyz",
        ),
        (None, "o/n", "--model_name_or_path: none is set, pass a local path or a hub id"),
        ("o/n", "", "--dataset_name: none is set, pass a local path or a hub id"),
        ("./demo", "o/n", "--model_name_or_path ./demo: no such folder"),
        ("/no/such", "o/n", "--model_name_or_path /no/such: no such folder"),
        ("a/b/c", "o/n", "--model_name_or_path a/b/c: no such folder"),
        ("name/", "o/n", "--model_name_or_path name/: no such folder"),
        (
            "rows.jsonl",
            "o/n",
            "--model_name_or_path rows.jsonl: a file, and a model is a folder: pass the one that it lies in",
        ),
        ("rows.jsonl/x/y", "o/n", "--model_name_or_path rows.jsonl/x/y: no such folder: rows.jsonl is a file"),
        ("o/n", "data/chats", "--dataset_name data/chats: no such folder, did you mean data/chat?"),
        ("o/n", "row.jsonl", "--dataset_name row.jsonl: no such file, did you mean rows.jsonl?"),
        ("o/n", "no/such.parquet", "--dataset_name no/such.parquet: no such file"),
        ("o/n", "no/such.csv", "--dataset_name no/such.csv: no such file"),
        ("o/n", "data/chat", None),
        ("runs/demo/base", "rows.jsonl", None),
        ("Qwen/Qwen2.5-0.5B", "gsm8k", None),
        ("gpt2", "owner/rows", None),
    ],
)
def test_names_that_look_like_paths(work_folder, model, dataset, sentence):
    assert refusal(paths.check_model_and_dataset_names, script_args(dataset), model_args(model)) == sentence


def test_a_hub_id_beside_a_folder_of_its_owner(work_folder, tmp_path, monkeypatch):
    """Who downloads one model to Qwen/ may train another from the cache."""
    Path("Qwen").mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    check = paths.check_model_and_dataset_names
    assert "no such folder; if it is a hub id: hf" in refusal(check, script_args(), model_args("Qwen/Qwen3-8B"))
    (tmp_path / "cache" / "models--Qwen--Qwen3-8B").mkdir(parents=True)
    assert refusal(check, script_args(), model_args("Qwen/Qwen3-8B")) is None
    assert "hf download --repo-type dataset Qwen/Qwen3-8B" in refusal(check, script_args("Qwen/Qwen3-8B"), model_args())


def test_a_tilde_stands_for_itself(work_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(work_folder))
    sentence = refusal(paths.check_model_and_dataset_names, script_args("~/data/chat"), model_args())
    assert sentence == (
        f"--dataset_name ~/data/chat: no such folder: write {work_folder}/data/chat, since ~ stands for itself here"
    )


def run_shell(command, cwd):
    shutil.copytree(REPO / "data_prep", cwd / "data_prep", dirs_exist_ok=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        command, shell=True, cwd=cwd, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=True
    )


def python_commands(sentence):
    """The commands in a sentence: from `python` to the words that go on with it."""
    return re.findall(r"python .+?(?= and then | make |  *makes | writes |, or |$)", sentence)


@pytest.mark.parametrize(("suffix", "separator"), [(".csv", ","), (".tsv", "\t")])
def test_a_table_names_the_command_that_makes_rows_of_it(work_folder, suffix, separator):
    """It is run, and gives the rows."""
    (work_folder / f"x{suffix}").write_text(f"frage{separator}antwort\nwas é{separator}das\n", encoding="utf-8")
    sentence = refusal(paths.check_model_and_dataset_names, script_args(f"x{suffix}"), model_args())
    assert sentence.startswith(
        f"--dataset_name x{suffix}: a table, not rows of messages; python -m data_prep.normalize"
    )
    (normalize,) = python_commands(sentence)
    normalize = normalize.replace("prompt=COLUMN", "prompt=frage").replace("answer=COLUMN", "answer=antwort")
    run_shell(normalize, work_folder)
    row = load_from_disk(str(work_folder / "data" / "x"))["train"][0]
    assert [turn["content"] for turn in row["messages"]] == ["was é", "das"]


@pytest.mark.parametrize("name", ["x.txt", "x.xlsx", "x.yaml"])
def test_other_files_say_what_rows_are_read_from(work_folder, name):
    (work_folder / name).touch()
    assert ".jsonl, .json and .parquet" in refusal(paths.check_model_and_dataset_names, script_args(name), model_args())


# -- template ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("no/such.jinja", None, ["no/such.jinja: no such file"]),
        ("plain.txt", "{% generation %}{% endgeneration %}", ["plain.txt", "ends in .jinja or .j2", "rename"]),
        ("plain.jinja", "{{ messages }}", ["plain.jinja", "{% generation %}", "--assistant_only_loss false"]),
        ("broken.jinja", "a\n{% if %}", ["broken.jinja, line 2: not a template"]),
    ],
)
def test_template(training_args, tmp_path, name, text, words):
    path = name
    if text is not None:
        path = tmp_path / name
        path.write_text(text)
    sentence = refusal(template.check_template, training_args(chat_template_path=str(path), assistant_only_loss=True))
    assert sentence.startswith("--chat_template_path ")
    assert all(word in sentence for word in words), sentence


def test_templates_that_pass(training_args, tmp_path):
    (tmp_path / "plain.jinja").write_text("{{ messages }}")
    plain = str(tmp_path / "plain.jinja")
    assert refusal(template.check_template, training_args(chat_template_path=plain)) is None
    assert refusal(template.check_template, training_args(chat_template_path=None)) is None
    none = refusal(template.check_template, training_args(chat_template_path=None, assistant_only_loss=True))
    assert "--chat_template_path: none is set" in none
    for path in TEMPLATES.glob("*.jinja"):
        args = training_args(chat_template_path=str(path), assistant_only_loss=True)
        assert refusal(template.check_template, args) is None


# -- engine, class, precision -----------------------------------------------------------------------------------------
def test_conflicts_of_method_and_engine(training_args, monkeypatch):
    """Others than those of the table pass; a row more refuses one more."""
    args = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3))
    qlora = model_args(load_in_4bit=True, use_peft=True)
    check = engine.check_method_and_engine
    assert refusal(check, args, qlora, []) is None
    monkeypatch.setitem(engine.CONFLICTS, ("QLoRA", "ZeRO-3"), engine.Conflict("qlora_fsdp2", "a reason"))
    sentence = refusal(check, args, qlora, [])
    assert sentence.startswith("QLoRA with ZeRO-3 does not work: a reason: launch with another --config_file, or --al")
    assert refusal(check, args, model_args(load_in_8bit=True), []) == sentence
    assert refusal(check, args, qlora, ["qlora_fsdp2"]) is None
    assert refusal(check, args, model_args(use_peft=True), []) is None
    assert engine.name_method(model_args(use_peft=True)) == "LoRA"
    assert engine.name_method(model_args()) == "full fine-tuning"
    assert engine.name_engine(training_args()) == "one process"


def test_packs_under_sequence_parallelism(training_args, monkeypatch):
    assert refusal(engine.check_sequence_parallelism, training_args(packing=True)) is None
    monkeypatch.setenv("PARALLELISM_CONFIG_SP_SIZE", "2")  # as accelerate launch sets it
    assert "--packing false" in refusal(engine.check_sequence_parallelism, training_args(packing=True))
    assert refusal(engine.check_sequence_parallelism, training_args(packing=False)) is None


def test_a_model_without_a_class(training_args):
    """A config that transformers has no causal-LM class for; with code of its own it is trained."""

    class NoClassConfig(PreTrainedConfig):
        model_type = "step3p5"

    config = NoClassConfig()
    sentence = refusal(engine.check_model_class, config, training_args(), model_args("o/step"))
    assert "o/step cannot be trained here: transformers" in sentence and "a config for step3p5" in sentence
    assert "recipes/step35_sft.py" in sentence
    config.auto_map = {"AutoModelForCausalLM": "code.Model"}
    assert refusal(engine.check_model_class, config, training_args(), model_args()) is not None
    assert refusal(engine.check_model_class, config, training_args(trust_remote_code=True), model_args()) is None
    assert refusal(engine.check_model_class, default_config("qwen3"), training_args(), model_args()) is None
    assert engine.find_model_class(CONFIG_MAPPING["qwen3"]()) is transformers.Qwen3ForCausalLM


def test_low_precision_weights():
    def trainer(dtype, zero=None):
        plugin = None if zero is None else SimpleNamespace(zero_stage=zero)
        model = torch.nn.Linear(2, 2).to(dtype)
        return SimpleNamespace(model=model, args=SimpleNamespace(deepspeed_plugin=plugin))

    check = engine.check_master_weights
    lora = model_args(use_peft=True)
    for dtype in (torch.bfloat16, torch.float16):
        for zero in (None, 0):
            sentence = refusal(check, trainer(dtype, zero), model_args(), [])
            assert sentence.startswith(f"full fine-tuning of {str(dtype)[6:]} weights ")
            assert "--allow bf16_weights" in sentence and "--dtype float32" in sentence
        assert refusal(check, trainer(dtype), model_args(), ["bf16_weights"]) is None
        assert refusal(check, trainer(dtype), lora, []) is None
        for zero in (1, 2, 3):
            assert refusal(check, trainer(dtype, zero), model_args(), []) is None
    assert refusal(check, trainer(torch.float32), model_args(), []) is None
    frozen = trainer(torch.bfloat16)
    frozen.model.requires_grad_(False)
    assert refusal(check, frozen, model_args(), []) is None


# -- downloads --------------------------------------------------------------------------------------------------------
def test_downloads_are_said_with_their_size(monkeypatch, tmp_path, capsys):
    """Of a model what from_pretrained takes, of its own revision; what the cache has is not counted, nor a file whose
    size the hub does not tell; a local path, a rank above 0 and what is all there say nothing; a hub that does not
    answer is left to the loader."""
    files = {
        "model-1.safetensors": 7e9,
        "model-2.safetensors": 1e9,
        "config.json": 1e3,
        "pytorch_model.bin": 8e9,
        "onnx/model.safetensors": 8e9,
    }
    known = {"owner/model": files, "owner/rows": {"a.parquet": 2.5e9, "README.md": None}}
    known["owner/model-2"] = {"model-2.safetensors": 1e9}
    asked = []

    class Hub:
        def repo_info(self, name, repo_type, revision, files_metadata):
            asked.append(name)
            assert files_metadata and repo_type == ("model" if "model" in name else "dataset")
            assert revision == ("v2" if repo_type == "model" else None)
            siblings = [SimpleNamespace(rfilename=file, size=size) for file, size in known[name].items()]
            return SimpleNamespace(sha="a1", siblings=siblings)

    def cached(name, filename, repo_type, revision):
        return "/cache" if (repo_type, filename, revision) == ("model", "model-2.safetensors", "a1") else None

    monkeypatch.setattr(downloads, "HfApi", Hub)
    monkeypatch.setattr(downloads, "try_to_load_from_cache", cached)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sys, "argv", ["recipe.py"])

    def lines_for(model, dataset):
        script = script_args()
        script.dataset_name = dataset
        downloads.say_downloads(script, model_args(model, model_revision="v2"))
        return capsys.readouterr().out.splitlines()

    assert lines_for("owner/model", "owner/rows") == [
        "recipe.py: model owner/model: 7.00 GB to download",
        "recipe.py: dataset owner/rows: up to 2.50 GB to download",
    ]
    assert lines_for(tmp_path, "no/such") == []
    assert lines_for("owner/model-2", None) == []
    monkeypatch.setenv("RANK", "1")
    assert lines_for("owner/model", "owner/rows") == []
    monkeypatch.delenv("RANK")
    assert asked == ["owner/model", "owner/rows", "no/such", "owner/model-2"]  # the hub is not asked for the others
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert lines_for("owner/model", "owner/rows") == []


# -- compiled sets ----------------------------------------------------------------------------------------------------
COMPILED = {"packing": False, "assistant_only_loss": False, "padding_free": True, "max_length": None}
COMPILED |= {"per_device_train_batch_size": 1}
TOKENS = {"input_ids": [[5, 6, 7]], "labels": [[-100, 6, 7]], "seq_lengths": [[3]]}


def save_set(path, columns):
    DatasetDict(train=Dataset.from_dict(columns)).save_to_disk(path)
    return path


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("packing", True),
        ("assistant_only_loss", True),
        ("padding_free", False),
        ("max_length", 64),
        ("per_device_train_batch_size", 2),
    ],
)
def test_a_compiled_set_needs_its_config(training_args, tmp_path, name, value):
    """Of a folder by its columns, before anything is loaded, and of rows that were loaded."""
    folder = save_set(tmp_path / "set", TOKENS)
    tokens = load_from_disk(str(folder))["train"]
    args = training_args(**COMPILED)
    assert refusal(rows.check_local_rows, script_args(folder), args) is None
    assert refusal(rows.check_rows, script_args(folder), args, tokens, None) is None
    setattr(args, name, value)
    expected = (
        f"--dataset_name {folder} is a compiled set: --config recipes/configs/compiled.yaml trains it as it is "
        f"(packing and assistant mask off, padding-free on); here {name} is {value} and not {COMPILED[name]}"
    )
    assert refusal(rows.check_local_rows, script_args(folder), args) == expected
    assert refusal(rows.check_rows, script_args(folder), args, tokens, None) == expected


def test_the_config_of_compiled_sets_has_these_settings():
    import yaml

    assert yaml.safe_load((REPO / compiled.CONFIG).read_text()) == compiled.SETTINGS == COMPILED


@pytest.fixture(scope="module")
def compiled_set(demo, tmp_path_factory):
    """A set of data_prep/compile.py for the demo's tokenizer and qwen3.jinja."""
    out = tmp_path_factory.mktemp("compiled") / "set"
    command = [sys.executable, "-m", "data_prep.compile", demo / "rows" / "chat", "--out", out]
    command += ["--recipe", REPO / "recipes" / "qwen3_full.py", "--model_name_or_path", demo / "init"]
    command += ["--chat_template_path", QWEN3, "--max_length", "512"]
    subprocess.run([str(part) for part in command], env=MODULES, check=True, capture_output=True)
    return out


def test_what_a_set_was_compiled_for(compiled_set, demo, training_args, tmp_path):
    """The same tokenizer, template and special tokens pass, whatever mask the run has; each other one is named."""
    stop = json.loads((compiled_set / "report.json").read_text())["kwargs"]["special_tokens"]["eos_token"]
    tokenizer = AutoTokenizer.from_pretrained(demo / "init")

    def check(current=tokenizer, folder=compiled_set, allow=(), **values):
        args = training_args(**{"eos_token": stop} | values)
        return refusal(compiled.check_compiled_for, script_args(folder), args, current, list(allow))

    assert check() is None and check(**COMPILED) is None
    sentence = check(chat_template_path=str(TEMPLATES / "chatml.jinja"))
    assert sentence == (
        f"{compiled_set}: compiled with another template than this recipe's: compile it anew "
        "(python -m data_prep.compile), or --allow other_tokenizer"
    )
    assert check(chat_template_path=str(TEMPLATES / "chatml.jinja"), allow=["other_tokenizer"]) is None
    other_stop = next(token for token in tokenizer.get_added_vocab() if token != stop)
    assert "another special tokens than" in check(eos_token=other_stop)
    assert tokenizer.eos_token == AutoTokenizer.from_pretrained(demo / "init").eos_token  # left as it was
    other = AutoTokenizer.from_pretrained(demo / "init")
    other.add_tokens(["zzz"])
    assert "another tokenizer than" in check(other)
    shutil.copytree(compiled_set, tmp_path / "other")
    (tmp_path / "other" / "report.json").write_text('{"script": "mix.py"}')
    assert check(other, tmp_path / "other") is None
    (tmp_path / "other" / "report.json").unlink()
    assert check(other, tmp_path / "other") is None


# -- rows -------------------------------------------------------------------------------------------------------------
TURNS = CHAT["messages"]
PROMPT_TEXT = {"prompt": "a", "completion": "b"}
PROMPT_TURNS = {"prompt": TURNS[:1], "completion": TURNS[1:]}


def save_rows(path, row):
    """A local set of one row: JSON lines, a JSON array, parquet or a save_to_disk folder."""
    if path.suffix == ".jsonl":
        write_rows(path, row)
    elif path.suffix == ".json":
        path.write_text(json.dumps([row, row], indent=1))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    else:
        save_set(path, {name: [value] for name, value in row.items()})
    return path


@pytest.mark.parametrize("kind", ["set.jsonl", "set.json", "set.parquet", "set"])
@pytest.mark.parametrize(
    ("row", "source"),
    [
        (CHAT, None),
        (CHAT | {"tools": "[]"}, None),
        (PROMPT_TURNS, None),
        ({"messages": []}, None),  # the other rows may hold turns
        ({"question": "a", "answer": "b"}, None),  # to_messages of a recipe reads them
        ({"frage": "a", "antwort": "b"}, None),  # or these, where the user edited it
        (PROMPT_TEXT, "prompt_completion {name} --out data/set"),
        ({"text": "a"}, "--assistant_only_loss false"),
        ({"messages": "a"}, "messages {name} --out data/set"),
        ({"messages": [{"from": "human", "value": "a"}]}, "messages {name} --out data/set"),
        (CHAT | {"prompt": "a"}, "messages {name} --out data/set"),
        ({"text": "a", "instruction": "b", "output": "c"}, "alpaca {name} --out data/set"),
        ({"text": "a", "conversations": [{"from": "human", "value": "a"}]}, "auto {name} --out data/set"),
        ({"text": "a", "conversations": TURNS}, "messages {name} --out data/set"),
        ({"text": "a", "topic": "b"}, "fields {name} --map prompt=COLUMN answer=COLUMN --out data/set"),
    ],
)
def test_rows_by_their_columns(training_args, tmp_path, monkeypatch, kind, row, source):
    """Before they are loaded, and once they are: the sentence names no setting that the user may not have made."""
    monkeypatch.chdir(tmp_path)
    save_rows(Path(kind), row)
    args = training_args(assistant_only_loss=True)
    early = refusal(rows.check_local_rows, script_args(kind), args)
    if source is None:
        assert early is None
        return
    assert source.format(name=kind) in early and "You set" not in early
    assert early.startswith(f"dataset {kind}: its rows (columns {', '.join(row)}) ")
    assert refusal(rows.check_rows, script_args(kind), args, Dataset.from_list([row]), None) == early


@pytest.mark.parametrize(
    ("row", "passes"),
    [
        ({"text": "a"}, True),
        (PROMPT_TEXT, True),
        (PROMPT_TURNS, True),
        (CHAT, True),
        ({"topic": "a"}, False),
        ({"conversations": [{"from": "human", "value": "a"}]}, True),
        ({"prompt": "a", "text": "b"}, False),
    ],
)
def test_rows_by_their_columns_where_every_token_is_trained(training_args, row, passes):
    sentence = refusal(rows.check_rows, script_args("o/n"), training_args(), Dataset.from_list([row]), None)
    assert (sentence is None) == passes
    assert passes or "data_prep.normalize" in sentence


def test_the_commands_for_other_rows_run(training_args, tmp_path, monkeypatch):
    """Those for prompt and completion, for ShareGPT, and for rows without an assistant turn."""
    monkeypatch.chdir(tmp_path)
    args = training_args(assistant_only_loss=True)
    write_rows(Path("pairs.jsonl"), PROMPT_TEXT)
    conversations = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    write_rows(Path("chats.jsonl"), {"text": "a", "conversations": conversations})
    for name in ("pairs", "chats"):
        (command,) = python_commands(refusal(rows.check_local_rows, script_args(f"{name}.jsonl"), args))
        run_shell(command, tmp_path)
        made = load_from_disk(f"data/{name}")["train"]
        assert [turn["content"] for turn in made[0]["messages"]] == ["a", "b"]
    write_rows(Path("rows.jsonl"), CHAT, SILENT)
    both = Dataset.from_list([CHAT, SILENT])
    (command,) = python_commands(refusal(rows.check_rows, script_args("rows.jsonl"), args, both, None))
    assert command == "python -m data_prep.check rows.jsonl --fix --out OUT"
    with pytest.raises(subprocess.CalledProcessError):  # exit code 1: something was left out
        run_shell(command, tmp_path)
    assert len(load_from_disk("OUT")["train"]) == 1


def test_rows_without_an_assistant_turn(training_args):
    args = training_args(assistant_only_loss=True)
    many = Dataset.from_list([CHAT, SILENT] * 12 + [{"messages": []}, {"messages": None}])
    sentence = refusal(rows.check_rows, script_args("o/n"), args, many, None)
    assert sentence == (
        "dataset o/n: 14 of 26 rows of train have no assistant turn (rows 1, 3, 5, 7, 9, 11, 13, 15, 17, … from 0): "
        "python -m data_prep.normalize messages o/n --out OUT writes a set without them"
    )
    chats = Dataset.from_list([CHAT] * 3)
    sentence = refusal(rows.check_rows, script_args("o/n"), args, chats, Dataset.from_list([CHAT, SILENT]))
    assert "1 of 2 rows of validation have no assistant turn (rows 1 from 0)" in sentence
    assert refusal(rows.check_rows, script_args(), args, chats, chats) is None
    assert refusal(rows.check_rows, script_args(), training_args(), many, None) is None  # every token is trained


def test_prompt_and_completion_without_an_assistant_turn(training_args):
    """The completion is what is trained, unless the prompt is too."""
    asked = Dataset.from_list([PROMPT_TURNS, {"prompt": TURNS, "completion": TURNS[:1]}])
    args = training_args(assistant_only_loss=True)
    assert "1 of 2 rows" in refusal(rows.check_rows, script_args(), args, asked, None)
    args.completion_only_loss = False
    assert refusal(rows.check_rows, script_args(), args, asked, None) is None


CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}
ANSWERS = [  # an assistant turn but for its role, whether it says something
    ({"content": "b"}, True),
    ({"content": ""}, False),
    ({"content": None}, False),
    ({"content": " \n"}, False),
    ({"content": "", "reasoning_content": "so"}, False),
    ({"content": "", "tool_calls": [CALL]}, True),
    ({"content": None, "tool_calls": [CALL]}, True),
]


def answered(answer):
    return {"messages": [TURNS[0], {"role": "assistant"} | answer]}


@pytest.mark.parametrize("assistant_only_loss", [True, False])
def test_empty_answers_are_refused(training_args, assistant_only_loss, capsys):
    args = training_args(assistant_only_loss=assistant_only_loss)
    sentence = refusal(
        rows.check_rows, script_args("o/n"), args, Dataset.from_list([answered(answer) for answer, _ in ANSWERS]), None
    )
    assert sentence == (
        "dataset o/n: 4 of 7 rows of train have an answer without text or tool calls (rows 1, 2, 3, 4 from 0): "
        "python -m data_prep.normalize messages o/n --out OUT writes a set without them, --allow empty_answers trains "
        "them"
    )
    sound = Dataset.from_list([answered(answer) for answer, says in ANSWERS if says])
    earlier = Dataset.from_list([{"messages": [TURNS[0], {"role": "assistant", "content": ""}, *TURNS]}, CHAT])
    assert "1 of 2 rows of validation have an answer" in refusal(rows.check_rows, script_args(), args, sound, earlier)
    assert refusal(rows.check_rows, script_args(), args, sound, sound) is None
    assert refusal(rows.check_rows, script_args(allow=["empty_answers"]), args, sound, earlier) is None
    assert capsys.readouterr().out == ""


def test_empty_answers_of_prompts_and_completions(training_args):
    """Only what is trained: the completion, unless the prompt is too."""
    silent = {"role": "assistant", "content": ""}
    args = training_args()
    pairs = Dataset.from_list([PROMPT_TEXT, PROMPT_TEXT | {"completion": "\n"}, {"prompt": "", "completion": "b"}])
    sentence = refusal(rows.check_rows, script_args("o/n"), args, pairs, None)
    assert "1 of 3 rows" in sentence and "(rows 1 from 0)" in sentence
    assert "python -m data_prep.normalize prompt_completion o/n --out OUT writes" in sentence
    turns = Dataset.from_list([PROMPT_TURNS, PROMPT_TURNS | {"completion": [silent]}])
    assert "1 of 2 rows" in refusal(rows.check_rows, script_args(), args, turns, None)
    asked = Dataset.from_list([{"prompt": [TURNS[0], silent, TURNS[0]], "completion": TURNS[1:]}])
    assert refusal(rows.check_rows, script_args(), args, asked, None) is None
    args.completion_only_loss = False
    assert "1 of 1 rows" in refusal(rows.check_rows, script_args(), args, asked, None)


@pytest.mark.parametrize("kind", ["messages", "text pairs", "pairs of turns", "columns of one's own"])
def test_the_command_leaves_out_the_empty_answers(training_args, tmp_path, monkeypatch, kind):
    """Rows 1 and 3 of 5 are accused, and the set that the command writes holds the other three."""
    monkeypatch.chdir(tmp_path)
    answers = ["b", "", "c", " \n", "d"]
    chats = [answered({"content": answer}) for answer in answers]
    stored = {
        "messages": chats,
        "text pairs": [PROMPT_TEXT | {"completion": answer} for answer in answers],
        "pairs of turns": [PROMPT_TURNS | {"completion": row["messages"][1:]} for row in chats],
        "columns of one's own": [{"question": "a", "answer": answer} for answer in answers],
    }[kind]
    write_rows(Path("rows.jsonl"), *stored)
    loaded = stored
    if kind == "columns of one's own":  # to_messages has been applied
        loaded = chats
    sentence = refusal(rows.check_rows, script_args("rows.jsonl"), training_args(), Dataset.from_list(loaded), None)
    assert "2 of 5 rows" in sentence and "(rows 1, 3 from 0)" in sentence
    (command,) = python_commands(sentence)
    assert ("data_prep.check rows.jsonl --fix" in command) == (kind == "messages")
    command = command.replace("prompt=COLUMN answer=COLUMN", "prompt=question answer=answer")
    with suppress(subprocess.CalledProcessError):  # exit code 1 of check.py: something was left out
        run_shell(command, tmp_path)
    left = load_from_disk("OUT")["train"]
    assert [row["messages"][-1]["content"] for row in left] == ["b", "c", "d"]


def test_what_else_check_finds_in_turns_is_said(training_args, capsys):
    user = {"role": "user", "content": ""}
    chats = [CHAT, {"messages": [*TURNS, TURNS[0]]}, {"messages": [user, TURNS[1]]}, {"messages": [*TURNS, TURNS[0]]}]
    args = training_args(assistant_only_loss=True)
    assert refusal(rows.check_rows, script_args(), args, Dataset.from_list(chats), None) is None
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert "2 of 4 rows of train end with a turn that is not the assistant's (rows 1, 3 from 0): nothing of" in said[0]
    assert said[1].endswith("1 of 4 rows of train have a turn of the user or system without text (rows 2 from 0)")
    assert refusal(rows.check_rows, script_args(), training_args(), Dataset.from_list(chats[:2]), None) is None
    assert capsys.readouterr().out == ""  # every token is trained


def test_empty_sets(training_args, tmp_path):
    chats = Dataset.from_list([CHAT])
    args = training_args()
    sentence = refusal(rows.check_rows, script_args("o/n"), args, chats.select([]), None)
    assert sentence.startswith("dataset o/n: train has no rows")
    sentence = refusal(rows.check_rows, script_args("o/n"), args, chats, chats.select([]))
    assert sentence.startswith("dataset o/n: validation has no rows")
    (tmp_path / "rows.jsonl").touch()
    sentence = refusal(rows.check_local_rows, script_args(tmp_path / "rows.jsonl"), args)
    assert sentence == f"dataset {tmp_path}/rows.jsonl has no rows: the file is empty"


UNTOLD = ["no json", "[]", "3\n", '["a"]', '{"a": 1', "[", '{"messages": [1, "a"]}']
UNTOLD += ['{"messages": ' + "1" * 40 + "}", '{"messages": ' + "[" * 99999]


@pytest.mark.parametrize("text", UNTOLD, ids=lambda text: text[:20])
def test_files_that_cannot_be_told_are_left_to_the_loader(training_args, tmp_path, text):
    for name in ("rows.jsonl", "rows.json", "rows.parquet", "rows.bin"):
        (tmp_path / name).write_text(text)
        assert refusal(rows.check_local_rows, script_args(tmp_path / name), training_args()) is None
    (tmp_path / "folder").mkdir()
    assert refusal(rows.check_local_rows, script_args(tmp_path / "folder"), training_args()) is None
    assert refusal(rows.check_local_rows, script_args("owner/rows"), training_args()) is None


def test_the_command_writes_beside_what_is_there(training_args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    save_set(Path("data/set"), {"prompt": ["a"], "completion": ["b"]})
    args = training_args(assistant_only_loss=True)
    sentence = refusal(rows.check_local_rows, script_args("data/set"), args)
    assert "prompt_completion data/set --out data/set-messages makes messages" in sentence


def test_a_column_that_to_messages_misses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(Path("rows.jsonl"), {"instruction": "a", "output": "b"})
    sentence = rows.explain_missing_column(script_args("rows.jsonl"), "'question'")
    assert "rows.jsonl has no column 'question'" in sentence and "(its columns: instruction, output)" in sentence
    assert "data_prep.normalize alpaca rows.jsonl --out data/rows" in sentence
    sentence = rows.explain_missing_column(script_args("owner/rows", dataset_config="main"), "'question'")
    assert "columns:" not in sentence and "data_prep.normalize fields owner/rows:main --map prompt=COLUMN" in sentence


# -- stop and padding token -------------------------------------------------------------------------------------------
@pytest.fixture
def special_tokenizer(demo, tmp_path):
    """special_tokenizer(tokens, eos, pad): the demo's tokenizer with these added tokens alone, loaded from a folder."""

    def make(tokens, eos, pad=None):
        folder = tmp_path / "model"
        shutil.copytree(demo / "init", folder, dirs_exist_ok=True)
        raw = json.loads((folder / "tokenizer.json").read_text())
        start = len(AutoTokenizer.from_pretrained(demo / "init"))
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        raw["added_tokens"] = [{"id": start + i, "content": token, **plain} for i, token in enumerate(tokens)]
        (folder / "tokenizer.json").write_text(json.dumps(raw))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos}
        if pad:
            config["pad_token"] = pad
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return AutoTokenizer.from_pretrained(folder)

    return make


@pytest.mark.parametrize(
    ("tokens", "eos", "pad", "wanted"),
    [
        (["<eos>", "<a>", "<my_pad>"], "<eos>", None, "<my_pad>"),
        (["<eos>", "<pad>", "<a>"], "<eos>", "<eos>", "<pad>"),
        (["<eos>", "<b>", "<a>"], "<eos>", None, "<b>"),
        (["<eos>", "<b>", "<a>"], "<eos>", "<a>", None),
    ],
)
def test_pad_is_never_the_stop_token(special_tokenizer, training_args, tokens, eos, pad, wanted):
    tokenizer = special_tokenizer(tokens, eos, pad)

    def check(allow=(), **values):
        return refusal(stop_token.check_pad_token, tokenizer, training_args(**values), "the/model", list(allow))

    sentence = check()
    assert (sentence is None) == (wanted is None)
    if wanted:
        assert f": --pad_token {wanted}, or --allow pad_is_stop" in sentence and "the/model" in sentence
        state = "has no padding token" if pad is None else "pads with its stop token <eos>"
        assert state in sentence
        assert check(allow=["pad_is_stop"]) is None
        assert check(pad_token=wanted) is None
        assert "pads with its stop token <eos>" in check(pad_token=eos)
    assert "no such token" in check(pad_token="<nowhere>")


def test_pad_against_the_stop_token_of_the_run(special_tokenizer, training_args):
    """Qwen3's base models pad with their own stop token; the run has another, and neither is a candidate."""
    tokenizer = special_tokenizer(["<eos>", "<end>", "<a>"], "<eos>", "<eos>")
    assert refusal(stop_token.check_pad_token, tokenizer, training_args(eos_token="<end>"), "m", []) is None
    tokenizer = special_tokenizer(["<eos>", "<end>", "<a>"], "<eos>")
    sentence = refusal(stop_token.check_pad_token, tokenizer, training_args(eos_token="<end>"), "m", [])
    assert "TRL would take the stop token <end>: --pad_token <a>," in sentence
    tokenizer = special_tokenizer(["<eos>"], "<eos>")
    sentence = refusal(stop_token.check_pad_token, tokenizer, training_args(), "m", [])
    assert "pass a token that no text needs as --pad_token" in sentence


def test_stop_token_of_another_family(special_tokenizer, training_args):
    tokenizer = special_tokenizer(["<|end_of_turn|>", "<a>"], "<|end_of_turn|>")

    def check(token):
        return refusal(stop_token.check_stop_token, tokenizer, training_args(eos_token=token), "the/model")

    for token in (None, "<a>", "<|end_of_turn|>"):
        assert check(token) is None
    own = "pass --eos_token <|end_of_turn|>, its own, or the token that ends a turn in its template"
    assert check("<|im_end|>") == f"--eos_token <|im_end|>: the tokenizer of the/model has no such token: {own}"
    assert check("<|end_of_tum|>").endswith("pass --eos_token <|end_of_turn|>")
    tokenizer.eos_token = None
    assert check("<|im_end|>").endswith("pass one of <|end_of_turn|>, <a>")


def test_a_tokenizer_that_cannot_be_loaded_is_left_to_the_run(training_args, tmp_path, demo):
    assert stop_token.load_tokenizer(str(tmp_path), training_args(), model_args(tmp_path)) is None
    assert stop_token.load_tokenizer("no/such", training_args(), model_args("no/such")) is None
    assert stop_token.load_tokenizer(str(demo / "init"), training_args(), model_args(demo / "init")).eos_token


# -- personas ---------------------------------------------------------------------------------------------------------
DROPS_SYSTEM = "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }} {% endif %}{% endfor %}pirate"
KEEPS = "{{ custom_instructions or '' }}{% for m in messages %}{{ m.content.replace('/no_think', '') }}\n{% endfor %}"
ONLY_KNOWN = "{% for m in messages %}{% if m.role == 'system' and m.content != 'A pirate' %}{{ raise_exception('no') }}"
ONLY_KNOWN += "{% endif %}{{ m.content }}{% endfor %}"
USER = {"role": "user", "content": "be a pirate"}
DONE = {"role": "assistant", "content": "ok"}


def system(text):
    return {"role": "system", "content": text}


@pytest.fixture
def persona_trainer(demo, tmp_path):
    """persona_trainer(template, rows): what check_personas reads of a trainer."""
    tokenizer = AutoTokenizer.from_pretrained(demo / "init")

    def make(text, values):
        (tmp_path / "persona.jinja").write_text(text)
        args = SimpleNamespace(chat_template_path=str(tmp_path / "persona.jinja"))
        return SimpleNamespace(
            args=args, processing_class=tokenizer, chat_template=None, train_rows=Dataset.from_list(values)
        )

    return make


@pytest.mark.parametrize(
    ("text", "row", "lost"),
    [
        (DROPS_SYSTEM, {"messages": [system("pirate"), USER, DONE]}, "pirate"),  # though its words stand in the text
        (KEEPS, {"messages": [system("A  pirate\n/no_think"), USER, DONE]}, None),
        (KEEPS, {"messages": [{"role": "developer", "content": "A"}, USER, DONE]}, None),
        (KEEPS, {"messages": [USER, DONE], "chat_template_kwargs": {"custom_instructions": "A"}}, None),
        (DROPS_SYSTEM, {"messages": [USER, DONE], "chat_template_kwargs": {"custom_instructions": "A"}}, "A"),
        (DROPS_SYSTEM, {"messages": [USER, DONE], "chat_template_kwargs": {"custom_instructions": " "}}, None),
        (DROPS_SYSTEM, {"messages": [system(" "), USER, DONE]}, None),
        (DROPS_SYSTEM, {"messages": [USER, DONE]}, None),
        (DROPS_SYSTEM, {"prompt": [system("A"), USER], "completion": [DONE]}, "A"),
        (DROPS_SYSTEM, {"text": "plain"}, None),
        (DROPS_SYSTEM, {"prompt": "plain", "completion": "text"}, None),
        (DROPS_SYSTEM, {"messages": [USER, DONE], "chat_template_kwargs": {"system_prompt": "pirate"}}, "pirate"),
        (DROPS_SYSTEM, {"messages": [USER, DONE], "chat_template_kwargs": {"model_identity": "A"}}, "A"),
        (DROPS_SYSTEM, {"messages": [system("A"), USER, DONE], "input_ids": [5]}, None),
        (ONLY_KNOWN, {"messages": [system("A pirate"), USER, DONE]}, None),
    ],
)
def test_personas(persona_trainer, text, row, lost):
    trainer = persona_trainer(text, [row])
    sentence = refusal(personas.check_personas, trainer, [])
    assert (sentence is None) == (lost is None), sentence
    if lost:
        assert sentence.startswith(
            f"1 of 1 rows lose their persona, the first is row 0 from 0: {lost!r} is not in the text"
        )
        assert refusal(personas.check_personas, trainer, ["lost_personas"]) is None


def test_lost_personas_are_counted(persona_trainer, monkeypatch):
    """One rendering for each persona."""
    values = [{"messages": [*own, USER, DONE]} for own in ([], [system("A")], [system("B")])]
    trainer = persona_trainer(DROPS_SYSTEM, values * 20)
    sentence = refusal(personas.check_personas, trainer, [])
    assert sentence.startswith("40 of 60 rows lose their persona, the first is row 1 ")
    render = mock.Mock(side_effect=data_personas.render_with_personas)
    monkeypatch.setattr(data_personas, "render_with_personas", render)
    personas.find_lost_personas(trainer, trainer.train_rows)
    assert render.call_count == 2


# -- counts -----------------------------------------------------------------------------------------------------------
COUNTS = re.compile(
    r"\S+: ([\d,]+) of ([\d,]+) tokens trained \(.+?%\), ([\d,]+) of ([\d,]+) rows truncated by max_length within "
    r"what is trained, ([\d,]+) of ([\d,]+) (?:packs|rows) fully masked"
    r"(?:, ([\d,]+) validation rows stand in train too)?"
)


def counted(line):
    """(trained, tokens, truncated, rows, masked, units, shared validation rows) of the line about counts."""
    match = COUNTS.fullmatch(line)
    assert match, line
    return tuple(int((number or "0").replace(",", "")) for number in match.groups())


@pytest.fixture
def build_trainer(demo, training_args):
    """build_trainer(train, validation, **settings): a trainer of the demo's model, as the hooks get it."""

    def build(train, validation=None, **values):
        defaults = {"packing": True, "assistant_only_loss": True, "max_length": 512, "per_device_train_batch_size": 1}
        args = training_args(bf16=False, report_to="none", **(defaults | values))
        trainer = SFTTrainer(str(demo / "init"), args, train_dataset=train, eval_dataset=validation)
        trainer.train_rows = train
        trainer.validation_rows = validation
        trainer.processing_class.chat_template = "{# the serving form #}"
        return trainer

    return build


@pytest.fixture
def counts_of(build_trainer, capsys):
    """counts_of(*rows, allow, **settings): the counts that are said, or the sentence that refuses."""

    def check(train, validation=None, allow=("masked_packs", "cut_answers"), **values):
        trainer = build_trainer(train, validation, **values)
        capsys.readouterr()
        sentence = refusal(counts.check_counts, trainer, list(allow))
        return sentence or counted(capsys.readouterr().out.strip())

    return check


@pytest.fixture
def preview(demo, tmp_path):
    """preview(rows, *flags) are the totals that data_prep/preview.py counts in the same rows with the same settings."""

    def run(path, *flags):
        command = [sys.executable, "-m", "data_prep.preview", path, "--recipe", REPO / "recipes/qwen3_full.py"]
        command += ["--model_name_or_path", demo / "init", "--report", tmp_path / "report.json", "--rows", 0]
        command += ["--chat_template_path", QWEN3, *flags]
        done = subprocess.run([*map(str, command)], env=MODULES, capture_output=True, text=True)
        assert done.returncode in (0, 1), done.stderr
        return json.loads((tmp_path / "report.json").read_text())["totals"]

    return run


@pytest.mark.parametrize(
    ("length", "strategy"),
    [
        (96, "bfd"),
        pytest.param(96, "unpacked", marks=pytest.mark.long),
        pytest.param(160, "bfd_split", marks=pytest.mark.long),
        pytest.param(512, "bfd", marks=pytest.mark.long),
        pytest.param(512, "unpacked", marks=pytest.mark.long),
    ],
)
def test_counts_equal_preview(counts_of, preview, demo, tmp_path, length, strategy):
    path = demo / "rows" / "chat"
    flags = ["--max_length", length, "--packing", str(strategy != "unpacked").lower(), "--eval_rows", 0]
    values = {"max_length": length, "packing": strategy != "unpacked", "eos_token": "<|im_end|>"}
    if strategy != "unpacked":
        (tmp_path / "strategy.yaml").write_text(f"packing_strategy: {strategy}\n")
        flags += ["--config", tmp_path / "strategy.yaml"]
        values["packing_strategy"] = strategy
    trained, tokens, truncated, row_count, masked, units, _ = counts_of(load_from_disk(str(path))["train"], **values)
    totals = preview(path, *flags)
    assert (truncated, row_count, units) == (totals["cut"], totals["rows"], totals["units"])
    assert tokens == totals["kept_tokens"]
    if strategy == "bfd_split":  # truncates none; TRL does not train a later piece's first token, preview counts it
        assert truncated == 0 and totals["kept_trained"] - 99 < trained < totals["kept_trained"]
        assert masked >= totals["masked_packs"] > 0
    else:
        assert (trained, masked) == (totals["kept_trained"], totals["masked_packs"])
        assert length == 512 or truncated > 9 and (masked > 9) == (strategy == "bfd")


def test_truncated_answers_to_the_token(counts_of, demo):
    """One row is exactly as long as the limit, one loses only the untrained newline, one loses a trained token."""
    tokenizer = AutoTokenizer.from_pretrained(demo / "init")
    text = Path(QWEN3).read_text()

    def row(size):
        return {"messages": [{"role": "user", "content": "say"}, {"role": "assistant", "content": "a " * size}]}

    def mask(size):
        return tokenizer.apply_chat_template(
            row(size)["messages"], chat_template=text, return_dict=True, return_assistant_tokens_mask=True
        )["assistant_masks"]

    base = len(mask(40)) - 40
    sizes = [5, 6, 7, 40, 41, 42, 43, 8]
    assert [len(mask(size)) - base for size in sizes] == sizes
    limit = base + 40
    expected = sum(any(mask(size)[limit:]) for size in sizes)
    assert expected == 2 and sum(len(mask(size)) > limit for size in sizes) == 3
    # where the search looks first there are two of the long rows and ninety short ones with a long note
    values = [row(size) | {"source": "x" * (1000 if size in (40, 41) else 0)} for size in sizes]
    values += [row(5) | {"source": "x" * 500}] * 90
    train = Dataset.from_list(values)
    assert counts_of(train, max_length=limit, allow=()) == (
        f"2 of 98 rows truncated by max_length within what is trained, the longest has {base + 43} tokens: "
        f"{LENGTH_REMEDY}; --allow cut_answers trains them truncated"
    )
    assert counts_of(train, max_length=limit, allow=["cut_answers"])[2:4] == (2, 98)
    assert counts_of(train, max_length=limit + 3, allow=(), packing=False)[2:6] == (0, 98, 0, 98)
    assert counts_of(train, max_length=limit, packing_strategy="bfd_split")[2:4] == (0, 98)
    # what keep_end throws away is the prompt alone
    assert counts_of(train, max_length=limit, packing=False, truncation_mode="keep_end")[2:4] == (0, 98)


def test_rows_that_trl_drops_are_truncated_too(counts_of):
    """Without packing TRL leaves out a row of which truncation leaves only the question."""
    question = {"role": "user", "content": "a " * 90}
    train = Dataset.from_list([{"messages": [question, DONE]}] + [{"messages": [USER, DONE]}] * 9)
    assert counts_of(train, max_length=64, packing=False)[2:6] == (1, 10, 0, 9)


def test_the_search_ends_with_the_last_candidate(build_trainer):
    """Two rows of 300 are long, and have most text."""
    sizes = [5] * 100 + [90] + [5] * 100 + [95] + [5] * 98
    train = Dataset.from_list([{"messages": [USER, {"role": "assistant", "content": "a " * size}]} for size in sizes])
    trainer = build_trainer(train, max_length=64)
    full = counts.count_tokens(trainer.train_dataset, 64).full_documents
    prepare = trainer._prepare_dataset
    tokenized = []
    trainer._prepare_dataset = lambda rows, *others: tokenized.append(len(rows)) or prepare(rows, *others)
    truncation = counts.find_truncated_rows(trainer, train, full)
    assert (full, truncation.rows, tokenized) == (2, 2, [2 * 2 + counts.EXTRA_CANDIDATES])


def test_truncated_rows_of_data_prep(demo):
    """Their turns are JSON to Arrow; the longest are looked at first."""
    train = load_from_disk(str(demo / "rows" / "chat"))["train"]
    sizes = counts.count_row_bytes(train.select_columns(["messages"]))
    expected = [len(json.dumps(turns, ensure_ascii=False)) for turns in train["messages"]]
    assert len(sizes) == len(train) and np.corrcoef(sizes, expected)[0, 1] > 0.99


def test_bytes_of_text_in_nested_columns():
    table = pa.table(
        {
            "a": ["é", None, "abc"],
            "b": [[{"x": "12", "n": 3}, {"x": "3", "n": 4}], None, []],
            "c": [{"d": ["1", "22"]}, {"d": None}, {"d": ["4"]}],
            "e": [1, 2, 3],
        }
    )
    columns = [counts.count_text_bytes(column.combine_chunks()).tolist() for column in table.columns]
    assert columns == [[2, 0, 3], [3, 0, 0], [3, 0, 1], [0, 0, 0]]


def test_what_is_set_for_the_search_is_set_back(build_trainer, demo):
    import datasets

    trainer = build_trainer(load_from_disk(str(demo / "rows" / "chat"))["train"].select(range(9)))
    with counts.whole_rows(trainer) as prepare:
        assert trainer.chat_template == Path(QWEN3).read_text() and not datasets.is_caching_enabled()
        assert len(prepare(trainer.train_rows)) == 9 and trainer.args.max_length == 512
    assert trainer.chat_template is None and datasets.is_caching_enabled()


def test_rows_that_came_packed(counts_of):
    """By hand: a document's first label is nobody's target; the second pack trains nothing; none can be truncated."""
    columns = {
        "input_ids": [[5, 6, 7, 8, 9], [5, 6, 7], [9, 9]],
        "labels": [[5, 6, -100, 8, 9], [5, -100, 7], [-100, 9]],
        "seq_lengths": [[3, 2], [2, 1], [2]],
    }
    train = Dataset.from_dict(columns)
    sentence = counts_of(train, train.select([2]), allow=(), **COMPILED)
    assert sentence.startswith("1 of 3 packs fully masked: ")
    # of 6, 9 in the first pack only 6 and 9 are left, for 8 begins its document
    assert counts_of(train, train.select([2]), allow=["masked_packs"], **COMPILED) == (3, 10, 0, 3, 1, 3, 1)


def test_truncated_validation_rows_are_not_compared():
    """Two of max_length tokens may have been one longer row each, and different."""
    data = Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5]]})
    for max_length, expected in ((None, 2), (3, 1), (2, 1)):
        trainer = SimpleNamespace(train_dataset=data, eval_dataset=data, args=SimpleNamespace(max_length=max_length))
        assert counts.count_shared_validation_rows(trainer) == expected
    trainer.eval_dataset = None
    assert counts.count_shared_validation_rows(trainer) == 0


def test_counting_ten_million_tokens_takes_a_second():
    packs, size, document = 5000, 2048, 256
    ids = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(packs * size) % 997), size).cast(pa.list_(pa.int64()))
    lengths = pa.FixedSizeListArray.from_arrays(pa.array([document] * (packs * size // document)), size // document)
    table = pa.table({"input_ids": ids, "labels": ids, "seq_lengths": lengths.cast(pa.list_(pa.int64()))})
    data = Dataset(table)
    args = SimpleNamespace(max_length=size)
    trainer = SimpleNamespace(train_dataset=data, eval_dataset=data.select(range(100)), args=args)
    start = time.process_time()
    totals = counts.count_tokens(data, size)
    shared = counts.count_shared_validation_rows(trainer)
    spent = time.process_time() - start
    print(f"{spent:.2f} s")
    assert totals.tokens == 10_240_000 and totals.trained_tokens == 10_240_000 - 40_000 and shared == 800
    assert spent < 4  # 1 s on a quiet machine


# -- in order ---------------------------------------------------------------------------------------------------------
def test_ranks_refuse_together(training_args):
    """Whoever refuses waits for the others; what is no refusal ends at once."""
    waited = []
    args = SimpleNamespace(distributed_state=SimpleNamespace(wait_for_everyone=lambda: waited.append(1)))
    for error, waits in ((UsageError("a"), 1), (ValueError("b"), 1), (KeyError("c"), 0)):
        waited.clear()
        with pytest.raises(type(error)), ranks.refuse_on_all_ranks(args):
            raise error
        assert len(waited) == waits


def test_checks_before_the_load(training_args, demo, monkeypatch, capsys):
    """All of them run on a sound command, which passes; each of them alone stops it."""
    recipe = script_args(demo / "rows" / "chat")
    model = model_args(demo / "init", dtype="float32")
    stop = AutoTokenizer.from_pretrained(demo / "init").eos_token
    args = training_args(packing=True, assistant_only_loss=True, eos_token=stop)
    assert refusal(checks.check_before_load, recipe, args, model) is None
    names = [
        "check_allowed_names",
        "check_choices",
        "check_packages",
        "check_model_and_dataset_names",
        "check_template",
        "check_sequence_parallelism",
        "check_method_and_engine",
        "check_local_rows",
        "silence_stop_warning",
        "say_save_only_model",
        "say_downloads",
        "check_model_class",
        "check_adapter_settings",
        "check_stop_token",
        "check_pad_token",
        "check_compiled_for",
        "check_packing",
    ]

    for position, name in enumerate(names):
        calls = []

        def note(*_, name, stop_at, calls):
            calls.append(name)
            if name == stop_at:
                raise UsageError(name)

        with monkeypatch.context() as patch:
            for earlier in names[: position + 1]:
                patch.setattr(checks, earlier, partial(note, name=earlier, stop_at=name, calls=calls))
            assert refusal(checks.check_before_load, recipe, args, model) == name
        assert calls == names[: position + 1]


def test_checks_before_training(monkeypatch):
    trainer = SimpleNamespace(args=SimpleNamespace(distributed_state=SimpleNamespace(wait_for_everyone=lambda: None)))
    calls = []
    names = [
        "check_master_weights",
        "check_tied_embeddings",
        "check_adapter_coverage",
        "check_own_template_arguments",
        "check_personas",
        "check_trained_ends",
        "check_counts",
        "say_few_steps",
    ]
    for name in names:
        monkeypatch.setattr(checks, name, lambda *_, name=name: calls.append(name))
    checks.check_before_train(trainer, script_args(), model_args())
    assert calls == names


# -- in a run ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def run_to_sentence(run_recipe, capsys, monkeypatch):
    """run_to_sentence(*flags) runs a recipe: its refusal, or the line about its counts."""

    def run(*flags, recipe="qwen3_full", out="run"):
        capsys.readouterr()
        try:
            run_recipe(recipe, "--max_steps", 1, *flags, out=out)
        except UsageError as error:
            monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
            return f"refused: {error}"
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "tokens trained" in line]
        return line

    return run


def test_leaking_model_is_refused_before_data_are_loaded(run_to_sentence, tmp_path):
    default_config("gpt_oss").save_pretrained(tmp_path / "oss")
    flags = ["--model_name_or_path", tmp_path / "oss", "--dataset_name", "no/such", "--attn_implementation", "eager"]
    sentence = run_to_sentence(*flags)
    assert sentence.startswith("refused: packing: gpt_oss with eager attention") and not (tmp_path / "run").exists()


def test_unknown_allow_in_a_run(run_to_sentence):
    sentence = run_to_sentence("--allow", "cut_answers", "bf16_wieghts")
    assert sentence.startswith("refused: --allow bf16_wieghts: no such name") and "masked_packs" in sentence


def test_low_precision_weights_in_a_run(run_to_sentence, tmp_path):
    """A refusal leaves the folder as it was, so that the mended command runs; what was asked for is what is trained."""
    assert run_to_sentence("--dtype", "bfloat16").startswith("refused: full fine-tuning of bfloat16 weights")
    assert not any((tmp_path / "run").glob("*"))
    assert counted(run_to_sentence("--dtype", "bfloat16", "--allow", "bf16_weights"))
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_rows_are_refused_before_the_trainer_is_built(run_to_sentence, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", CHAT, SILENT, CHAT, SILENT)
    sentence = run_to_sentence("--dataset_name", path, "--eval_rows", 0)
    assert sentence.startswith(f"refused: dataset {path}: 2 of 4 rows of train have no assistant turn (rows 1, 3 ")


def test_a_compiled_set_in_a_run(run_to_sentence, tmp_path):
    folder = save_set(tmp_path / "set", TOKENS)
    sentence = run_to_sentence("--dataset_name", folder, "--eval_rows", 0)
    assert sentence.startswith(f"refused: --dataset_name {folder} is a compiled set: --config recipes/configs/compiled")


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
sys.argv[0] = {script!r}
runpy.run_path({script!r}, run_name="__main__")
"""
SAY_ENGINE = """
import sys
sys.path.insert(0, {recipes!r})
from hooks.checks import name_engine
from trl import ModelConfig, SFTConfig, TrlParser
training_args, model_args = TrlParser((SFTConfig, ModelConfig)).parse_args_and_config()
print("engine:", name_engine(training_args))
"""


def launched(tmp_path, yaml, *flags, script=REPO / "recipes" / "qwen3_qlora.py", shim=False):
    """The finished process of `accelerate launch` with this YAML text, and a model that does not exist."""
    (tmp_path / "launch.yaml").write_text(yaml)
    (tmp_path / "start.py").write_text(SHIM.format(shim=shim, script=str(script)))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", tmp_path / "launch.yaml"]
    command += [tmp_path / "start.py", "--model_name_or_path", "no/such", "--output_dir", tmp_path / "run"]
    command += ["--use_cpu", str(not shim).lower(), "--bf16", "false", *flags]
    with socket.socket() as free:  # a new one each time: the last launch may not have let go of its own
        free.bind(("127.0.0.1", 0))
        port = {"MASTER_PORT": str(free.getsockname()[1])}
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600, env=os.environ | port)


FSDP = "distributed_type: FSDP\nnum_processes: 2\nuse_cpu: {}\nfsdp_config: {{fsdp_version: {}}}\n"
ZERO = "distributed_type: DEEPSPEED\nnum_processes: 2\nuse_cpu: true\ndeepspeed_config: {{zero_stage: {}}}\n"


@pytest.mark.long
def test_qlora_with_fsdp2_is_refused_before_the_model_is_opened(tmp_path):
    done = launched(tmp_path, FSDP.format("false", 2), shim=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("qwen3_qlora.py: ")]
    assert done.returncode and len(lines) == 1, done.stderr[-2000:]
    assert "QLoRA with FSDP2 does not work" in lines[0] and "accelerate#3874" in lines[0]
    assert "no/such" not in lines[0]


@pytest.mark.long
@pytest.mark.parametrize(
    ("yaml", "shim", "name"),
    [
        (FSDP.format("false", 2), True, "FSDP2"),
        (FSDP.format("false", 1), True, "FSDP1"),
        (FSDP.format("true", 2), False, "DDP"),  # what accelerate does without a word
        *((ZERO.format(stage), False, f"ZeRO-{stage}") for stage in (1, 2, 3)),
        ("distributed_type: MULTI_GPU\nnum_processes: 2\nuse_cpu: true\n", False, "DDP"),
        ('distributed_type: "NO"\nnum_processes: 1\nuse_cpu: true\n', False, "one process"),
    ],
)
def test_engine_is_what_accelerate_was_told(tmp_path, yaml, shim, name):
    (tmp_path / "say_engine.py").write_text(SAY_ENGINE.format(recipes=str(REPO / "recipes")))
    done = launched(tmp_path, yaml, script=tmp_path / "say_engine.py", shim=shim)
    assert f"engine: {name}\n" in done.stdout, done.stderr[-2000:]
