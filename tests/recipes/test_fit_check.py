"""A run that its GPU cannot hold is refused before the download; one that leaves half of it idle is told once.

There is no GPU here: its name and memory are put in place, all else is the check as recipes call it. Breaks tried, each
seen red: the larger allowance refuses; --allow not looked at; a sharded run refused.
"""

from types import SimpleNamespace

import pytest
import torch
from hooks.checks import fit
from hooks.messages import UsageError

from data_prep.common.gpu_configs import load_config
from data_prep.common.gpu_engines import Engine
from data_prep.common.gpu_memory import GIB
from tests.helpers.runs import REPO, parse


@pytest.fixture
def on_gpu(monkeypatch, capsys):
    """on_gpu(recipe, flags, gib, engine) returns the refusal, or what is said."""
    monkeypatch.setattr("sys.argv", ["my_recipe.py"])

    def run(recipe, flags=(), gib=15.6, engine=None, name="NVIDIA GeForce RTX 4080"):
        script_args, training_args, model_args = parse(recipe, *flags)
        training_args.model_init_kwargs["attn_implementation"] = "flash_attention_2"
        monkeypatch.setattr(fit, "find_gpu", lambda _: None if gib is None else fit.Gpu(name, gib))
        monkeypatch.setattr(fit, "read_engine_of_run", lambda _: engine or Engine())
        capsys.readouterr()
        try:
            fit.check_fits(load_config(model_args.model_name_or_path).config, script_args, training_args, model_args)
        except UsageError as error:
            return f"refused: {error}"
        return capsys.readouterr().out.strip()

    return run


def test_too_large_is_refused_with_both_figures_and_what_helps(on_gpu):
    sentence = on_gpu("qwen3_lora")  # 8B in bf16 on 16 GB
    assert sentence.startswith("refused: this run does not fit: ") and "\n" not in sentence
    assert " GiB predicted, NVIDIA GeForce RTX 4080 has 15.6: " in sentence
    assert "python -m eval.fit recipes/my_recipe.py --gpu rtx4080 says what saves how much" in sentence
    said = on_gpu("qwen3_lora", ["--allow", "too_large"])
    assert said == f"my_recipe.py: {sentence.removeprefix('refused: ').removesuffix(fit_end(sentence))}"
    assert on_gpu("qwen3_lora", gib=None) == ""


def fit_end(sentence):
    return sentence[sentence.index("; --allow too_large") :]


def test_the_edge_is_the_smaller_allowance(on_gpu):
    script_args, training_args, model_args = parse("qwen3_qlora")
    training_args.model_init_kwargs["attn_implementation"] = "flash_attention_2"
    config = load_config(model_args.model_name_or_path).config
    prediction = fit.predict_run(config, script_args, training_args, model_args, Engine())
    edge = prediction.needed[0] / GIB
    assert on_gpu("qwen3_qlora", gib=edge + 0.01) == "" and on_gpu("qwen3_qlora", gib=edge - 0.01).startswith("refused")


def test_half_of_a_card_idle_is_said_once(on_gpu):
    said = on_gpu("qwen3_qlora")
    assert said.count("\n") == 0 and "more than half of it stays idle: python -m eval.fit recipes/my_recipe.py" in said
    assert on_gpu("qwen3_qlora", name="NVIDIA L4").count("--gpu NAME says") == 1  # a card without a row


def test_what_engines_cut_is_an_estimate_and_said(on_gpu):
    sharded = Engine("fsdp2", 2, shards=2)
    said = on_gpu("qwen3_full", engine=sharded)
    assert said.startswith("my_recipe.py: this run does not fit: ") and "--allow" not in said


def test_a_model_that_cannot_be_traced_runs_on(on_gpu):
    said = on_gpu("qwen3_qlora", ["--config", REPO / "recipes" / "configs" / "compiled.yaml"])
    assert said.startswith("my_recipe.py: memory is not predicted: max_length is open")


def test_the_run_draws_what_it_would_have_drawn(on_gpu):
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    on_gpu("qwen3_qlora")
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Engine("ddp", 8)),
        ({"ACCELERATE_USE_FSDP": "true"}, Engine("fsdp2", 8, shards=8)),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"},
            Engine("fsdp2", 8, shards=8, offloads_optimizer=True, offloads_weights=True),
        ),
    ],
)
def test_the_engine_is_read_off_the_launch(monkeypatch, environment, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert fit.read_engine_of_run(SimpleNamespace(world_size=8, deepspeed_plugin=None)) == expected


def test_zero_is_read_off_its_plugin():
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "none"}}
    plugin = SimpleNamespace(zero_stage=3, deepspeed_config={"zero_optimization": zero})
    found = fit.read_engine_of_run(SimpleNamespace(world_size=4, deepspeed_plugin=plugin))
    assert found == Engine("zero", 4, stage=3, shards=4, offloads_optimizer=True)
