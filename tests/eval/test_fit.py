"""eval.fit predicts memory and speed: against torch's CPU allocator, bitsandbytes, torch's FLOP counter and papers.

Tried by hand and seen red: weights not tied; one optimizer state instead of two; the head's second product not counted;
a period of one for layers that alternate; gradients that ZeRO-2 leaves whole; constants of 4-bit weights each 128;
gradients counted as activations; the first pass of an accumulation left out; no adapters on experts; a rotary stand-in
of two tensors for Gemma 4's of one; one row for a pair; an evaluation with its backward; a save without its states.
"""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from data_prep.common.errors import UsageError
from data_prep.common.gpu_advice import is_half_empty, list_savings, list_spendings, longest_length, predict_change
from data_prep.common.gpu_cards import CARDS, find_card, find_device_card
from data_prep.common.gpu_configs import LayerPlan, load_config, plan_layers
from data_prep.common.gpu_costs import Schedule, compare_optimizers, cost_of_evaluations, cost_of_saves
from data_prep.common.gpu_engines import Engine, read_engine
from data_prep.common.gpu_memory import GIB, optimizer_bytes, predict
from data_prep.common.gpu_meter import Meter
from data_prep.common.gpu_settings import RunSettings
from data_prep.common.gpu_speed import predict_speed
from data_prep.common.gpu_standins import TracedLinear4bit
from data_prep.common.gpu_trace import Counts, trace, trace_layers
from eval import fit
from tests.helpers.runs import REPO

RECIPES = REPO / "recipes"
SETTINGS = (REPO / "docs" / "settings.md").read_text().splitlines()
CONFIGS = REPO / "accelerate_configs"
STORED = {"qwen3_qlora": 3.3635, "qwen3_lora": 16.9867, "qwen3_full": 67.7577}  # GiB at the recipes' defaults
COSTS = {  # GiB of AdamW's states in fp32 and in 8 bits, GB of a checkpoint: docs/settings.md
    "qwen3_qlora": (0.25, 0.06, 0.2),
    "qwen3_lora": (0.33, 0.08, 0.5),
    "qwen3_full": (30.0, 7.6, 48),
}
LLAMA = "meta-llama/Llama-3.1-8B-Instruct"
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


FAMILIES = {  # what their own shapes have beside the common ones
    "gemma4_text": dict(vocab_size_per_layer_input=64, hidden_size_per_layer_input=16, num_kv_shared_layers=18)
}


def make_config(family="qwen3", **changes):
    shape = dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    shape |= dict(num_key_value_heads=2, head_dim=16, tie_word_embeddings=True)
    shape |= dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)
    return AutoConfig.for_model(family, **{**shape, **FAMILIES.get(family, {}), **changes})


MEDIUM = dict(vocab_size=8192, hidden_size=512, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=8)
LARGE = dict(vocab_size=16384, hidden_size=768, intermediate_size=2304, num_hidden_layers=14, num_attention_heads=12)
SHAPES = {
    "0.1M": make_config(),
    "36M": make_config(**MEDIUM, num_key_value_heads=4, head_dim=64),
    "110M": make_config(**LARGE, num_key_value_heads=4, head_dim=64),
}


def make_settings(method, **changes):
    kinds = {
        "full": dict(dtype="float32"),
        "lora": dict(dtype="bfloat16", use_peft=True),
        "qlora": dict(dtype="bfloat16", use_peft=True, load_in_4bit=True, use_bnb_nested_quant=True),
    }
    return RunSettings("a model", **{**kinds[method], "max_length": 128, **changes})


# -- against torch's CPU allocator ------------------------------------------------------------------------------------
def allocated(config, settings, folder):
    """Peak of what torch's allocator handed out in the same two steps on real tensors, with a real AdamW."""
    torch.manual_seed(0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trace(config, settings, on_cuda=False, is_fake=False, optimizer=True)
    path = folder / "trace.json"
    profiler.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return peak


def predicted(config, settings):
    """The same of fake tensors, with the optimizer's states by arithmetic, as predict() puts them together."""
    traced = trace(config, settings, on_cuda=False)
    states = optimizer_bytes(settings, traced.counts).resident
    passes = max(segment.peak for name, segment in traced.segments.items() if name.startswith("first"))
    gradients = max(segment.parts["gradients"] for segment in traced.segments.values())
    step = traced.resident["weights"] + traced.resident["adapters"] + gradients
    return max(passes, step) + states


def error_of(size, method, changes, folder):
    settings = make_settings(method, **changes)
    return predicted(SHAPES[size], settings), allocated(SHAPES[size], settings, folder)


KEPT = dict(activation_checkpointing=False)
PLAIN = dict(bf16=False)


@pytest.mark.parametrize(
    ("method", "changes", "bound"), [("full", PLAIN, 0.005), ("lora", {}, 0.005), ("full", {**KEPT, **PLAIN}, 0.025)]
)
def test_a_trace_needs_what_the_allocator_hands_out(method, changes, bound, tmp_path):
    guess, real = error_of("0.1M", method, changes, tmp_path)
    assert guess == pytest.approx(real, rel=bound)


def test_adapters_of_experts_need_what_the_allocator_hands_out(tmp_path):
    """By PEFT's own wrapper, which adds the adapters of a layer's experts to all their weights."""
    config = make_config("qwen3_moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64)
    settings = make_settings("lora", lora_target_modules=("q_proj", "v_proj"), lora_target_parameters=EXPERTS)
    assert predicted(config, settings) == pytest.approx(allocated(config, settings, tmp_path), rel=0.005)


TEN = [
    ("0.1M", "full", {**PLAIN}),
    ("0.1M", "lora", {}),
    ("0.1M", "qlora", {**KEPT}),
    ("36M", "full", {**PLAIN, "max_length": 256}),
    ("36M", "full", {"max_length": 256}),
    ("36M", "full", {**KEPT, **PLAIN, "max_length": 256}),
    ("36M", "lora", {"max_length": 256, "lora_dropout": 0.05}),
    ("36M", "qlora", {"max_length": 256}),
    ("110M", "full", {**PLAIN, "max_length": 256}),
    ("110M", "lora", {**KEPT, "max_length": 512}),
]


@pytest.mark.long
def test_ten_cases_against_the_allocator(tmp_path, capsys):
    lines = ["| model | method | tokens | activations | autocast | predicted MiB | allocator MiB | error |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for size, method, changes in TEN:
        guess, real = error_of(size, method, changes, tmp_path)
        kept = not changes.get("activation_checkpointing", True)
        words = [size, method, changes.get("max_length", 128), "kept" if kept else "checkpointed"]
        words += ["bf16" if changes.get("bf16", True) else "off"]
        words += [f"{guess / 2**20:.1f}", f"{real / 2**20:.1f}", f"{guess / real - 1:+.2%}"]
        lines.append(f"| {' | '.join(map(str, words))} |")
        assert guess == pytest.approx(real, rel=0.035 if kept else 0.005), lines[-1]
    with capsys.disabled():
        print("\n" + "\n".join(lines))


# -- bytes by hand and by others --------------------------------------------------------------------------------------
def test_four_bit_layers_take_what_bitsandbytes_stores():
    weight = torch.randn(512, 1024)
    packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    linear = torch.nn.Linear(1024, 512, bias=False)
    traced = TracedLinear4bit(linear, torch.bfloat16, is_nested=True, meter=Meter())
    assert traced.weight.nbytes == packed.nbytes
    assert traced.absmax.nbytes == state.absmax.nbytes
    assert traced.nested_absmax.nbytes == state.state2.absmax.nbytes
    assert traced.codes.nbytes == state.code.nbytes + state.state2.code.nbytes


@pytest.mark.parametrize(
    ("method", "dtype", "bytes_each"), [("full", "float32", 4), ("full", "bfloat16", 2), ("lora", "bfloat16", 2)]
)
def test_weights_take_their_dtype(method, dtype, bytes_each):
    config = make_config(num_hidden_layers=3)
    result = predict(make_settings(method, dtype=dtype), config)
    model = AutoModelForCausalLM.from_config(config)
    parameters = sum(weight.numel() for weight in model.parameters())
    buffers = 2 * 8 * 4  # the rotary embedding's frequencies, twice
    rounded = 512 * len([*model.parameters(), *model.buffers()])
    assert result.parts["weights"] == pytest.approx(parameters * bytes_each + buffers, abs=rounded)


def test_optimizer_states_are_those_that_torch_makes():
    model = torch.nn.Linear(100, 100)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 100)).sum().backward()
    optimizer.step()
    moments = sum(state[name].nbytes for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
    counts = Counts(trained=10_100, small_trained=100)
    assert optimizer_bytes(make_settings("full"), counts).resident == moments
    assert optimizer_bytes(make_settings("full"), counts, width=2).resident == moments / 2
    paged = optimizer_bytes(make_settings("lora", optim="paged_adamw_8bit"), counts)
    assert paged.resident == 0
    assert paged.paged == 2 * 10_000 * (1 + 4 / 256) + 8 * 100  # a byte a state, a float each 256; small ones in fp32


@pytest.mark.parametrize(("stage", "gigabytes"), [(1, 31.4), (2, 16.6), (3, 1.9)])
def test_zero_cuts_what_its_paper_says(stage, gigabytes):
    """Rajbhandari et al. 2020, figure 1: 7.5 billion parameters, 64 GPUs, 12 bytes of optimizer states each."""
    size = 7_500_000_000
    engine = Engine("zero", 64, stage=stage, shards=64)
    resident = engine.resident(2 * size, 0, size, states=8 * size, layer=0, embedding=0)
    total = resident.weights + resident.gradients + resident.optimizer
    assert total / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_fsdp2_leaves_a_shard_of_fp32_and_gathers_two_layers():
    engine = Engine("fsdp2", 8, shards=8)
    resident = engine.resident(weights=2000, adapters=0, trained=1000, states=8000, layer=10, embedding=100)
    assert resident.weights == 4 * 1000 / 8
    assert resident.gradients == 4 * 1000 / 8
    assert resident.optimizer == 8 * 1000 / 8
    assert resident.buffers == 2 * (100 + 20) + 6 * 10 + 2 * 100
    adapters = engine.resident(weights=2000, adapters=80, trained=80, states=640, layer=10, embedding=100)
    assert (adapters.weights, adapters.adapters, adapters.gradients) == (250, 40, 40)


def test_accelerate_configs_are_read():
    assert read_engine(None) == Engine()
    assert read_engine(CONFIGS / "ddp_8gpu.yaml") == Engine("ddp", 8)
    assert read_engine(CONFIGS / "ddp_8gpu.yaml", 4) == Engine("ddp", 4)
    assert read_engine(CONFIGS / "zero2.yaml") == Engine("zero", 8, stage=2, shards=8)
    assert read_engine(CONFIGS / "fsdp2_8gpu.yaml") == Engine("fsdp2", 8, shards=8)
    assert read_engine(CONFIGS / "fsdp2_8nodes.yaml") == Engine("fsdp2", 64, shards=8)
    offload = read_engine(CONFIGS / "zero3_offload.yaml")
    assert (offload.offloads_optimizer, offload.offloads_weights) == (True, True)
    rows_shared = read_engine(CONFIGS / "sequence_parallel.yaml")
    assert (rows_shared.sequence_parallel_size, rows_shared.data_parallel_size) == (8, 1)
    with pytest.raises(UsageError, match="no such file"):
        read_engine("accelerate_configs/nothing.yaml")


def test_ddp_and_engines_change_what_they_should():
    config = make_config(num_hidden_layers=3)
    settings = make_settings("full")
    alone = predict(settings, config)
    ddp = predict(settings, config, Engine("ddp", 2))
    assert ddp.peak - alone.peak == 4 * alone.counts.trained  # the reducer's buckets
    shards = [predict(settings, config, Engine("zero", 8, stage=stage, shards=8)).peak for stage in (1, 2, 3)]
    assert shards[0] > shards[1]
    rows = replace(settings, packing=False, max_length=1024)
    shared = predict(rows, config, Engine("zero", 8, stage=3, shards=8, sequence_parallel_size=8))
    whole = predict(replace(rows, max_length=128), config, Engine("zero", 8, stage=3, shards=8))
    assert shared.parts["activations"] == whole.parts["activations"]


def test_gradients_of_earlier_passes_count_with_accumulation():
    config = make_config()
    settings = make_settings("full")
    alone = predict(settings, config)
    accumulated = predict(replace(settings, gradient_accumulation_steps=2), config)
    rounded = 512 * len([*AutoModelForCausalLM.from_config(config).parameters()])
    assert accumulated.parts["gradients"] == pytest.approx(4 * alone.counts.trained, abs=rounded)
    assert alone.parts["gradients"] == 0
    assert alone.at == accumulated.at.replace("later", "first")


# -- layers -----------------------------------------------------------------------------------------------------------
def test_plans_of_layers():
    assert plan_layers(["a"] * 36) == LayerPlan(2, 3, 1)
    assert plan_layers(["a"] * 36, every_n_layers=2) == LayerPlan(4, 6, 2)
    assert plan_layers(["dense", *["sparse"] * 20]) == LayerPlan(2, 3, 1)
    assert plan_layers(["a", "a", "b"] * 10) == LayerPlan(6, 9, 3)
    assert plan_layers([*["a", "a", "b"] * 10, "a"]) == LayerPlan(7, 10, 3)
    assert plan_layers(list("abcdefg")) == LayerPlan(7, 7, 1)


@pytest.mark.parametrize(
    ("family", "layers", "method", "changes"),
    [
        ("qwen3", 5, "qlora", {}),
        pytest.param("gemma2", 8, "full", {}, marks=pytest.mark.long),  # sliding and full attention in turn
        pytest.param("smollm3", 16, "lora", {}, marks=pytest.mark.long),  # every fourth layer without positions
        pytest.param("llama", 7, "full", {"every_n_layers": 2}, marks=pytest.mark.long),
        pytest.param("mistral", 6, "full", {"activation_checkpointing": False}, marks=pytest.mark.long),
        pytest.param("gemma3_text", 20, "full", {}, marks=pytest.mark.long),  # five sliding, one full
        pytest.param("qwen3_moe", 5, "lora", {}, marks=pytest.mark.long),
        pytest.param("gpt_oss", 8, "lora", {"lora_target_parameters": EXPERTS}, marks=pytest.mark.long),
        pytest.param("gemma4_text", 36, "lora", {"attn_implementation": "sdpa"}, marks=pytest.mark.long),
    ],
)
def test_extrapolated_is_whole(family, layers, method, changes):
    config = make_config(family, num_hidden_layers=layers, vocab_size=64)
    settings = make_settings(method, max_length=512, gradient_accumulation_steps=2, **changes)
    result = trace_layers(config, settings)
    whole = trace(config, settings)
    assert max(segment.peak for segment in result.segments.values()) == max(
        segment.peak for segment in whole.segments.values()
    )
    assert result.counts == whole.counts
    assert result.work.flops == pytest.approx(whole.work.flops, rel=1e-9)


# -- FLOPs ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("checkpointing", [True, False])
def test_flops_are_those_that_torch_counts(checkpointing):
    tokens = 128
    config = make_config(num_hidden_layers=3, attn_implementation="eager")
    settings = make_settings("full", activation_checkpointing=checkpointing, use_liger_kernel=False, bf16=False)
    result = trace(config, settings)
    traced = result.work.flops

    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()
    if checkpointing:
        model.activation_checkpointing_enable()
    with FlopCounterMode(display=False) as counter:
        hidden = model.base_model(input_ids=torch.zeros((1, tokens), dtype=torch.long), use_cache=False)
        hidden.last_hidden_state.sum().backward()

    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model.base_model(input_ids=torch.zeros((1, tokens), dtype=torch.long), use_cache=False)

    recomputed = 1 if checkpointing else 0
    width = config.num_attention_heads * config.head_dim
    dense = config.num_hidden_layers * 4 * tokens * tokens * width * (3 + recomputed)  # two products forward, four back
    causal = config.num_hidden_layers * 2 * tokens * tokens * width * (1 + 2.5 + recomputed)
    head = (tokens - 1) * config.vocab_size * config.hidden_size * 8  # forward, again, gradients of both sides
    assert traced - causal - head == counter.get_total_flops() - dense
    square = config.num_hidden_layers * tokens * tokens * width
    alone = result.forward.flops - 2 * square - (tokens - 1) * config.vocab_size * config.hidden_size * 2
    assert alone == forward.get_total_flops() - 4 * square  # what an evaluation does


def test_flops_of_a_large_model_are_eight_a_weight():
    """Two each forward, again, and for both gradients; the last product of a layer is not made again."""
    config = load_config(LLAMA).config
    settings = RunSettings(LLAMA, use_peft=False, max_length=2048, tokens_per_row=1)
    result = predict(settings, config)
    down = 32 * 4096 * 14336
    weights = 32 * (4096 * 4096 * 2 + 4096 * 1024 * 2) + 3 * down + 128256 * 4096
    assert result.counts.parameters == 8_030_261_248  # as its card says
    assert result.work.flops / settings.tokens == pytest.approx(8 * weights - 2 * down, rel=1e-3)


# -- experts, pairs, families -----------------------------------------------------------------------------------------
def test_adapters_of_experts_are_those_that_peft_makes():
    """gpt-oss at its true shapes, rank 8: 8 numbers for each input and each output of each expert."""
    settings = RunSettings(
        "gpt-oss-20b",
        dtype="bfloat16",
        use_peft=True,
        lora_r=8,
        lora_target_parameters=EXPERTS,
        attn_implementation="eager",
        max_length=256,
    )
    result = predict(settings, load_config("openai/gpt-oss-20b").config)
    heads, key_heads, width = 64 * 64, 8 * 64, 2880
    attention = (width + heads) + 2 * (width + key_heads) + (heads + width)
    experts = 32 * ((width + 2 * width) + (width + width))
    assert result.counts.trained == 24 * 8 * (attention + experts)
    assert result.parts["adapters"] == pytest.approx(4 * result.counts.trained, rel=0.001)
    assert result.parts["optimizer"] == 8 * result.counts.trained


def test_gemma_4_is_traced_with_its_shared_keys():
    config = make_config("gemma4_text", vocab_size=64, num_hidden_layers=12, num_kv_shared_layers=6)
    result = predict(make_settings("full", attn_implementation="sdpa"), config)
    model = AutoModelForCausalLM.from_config(config)
    assert result.counts.parameters == sum(weight.numel() for weight in model.parameters())


def test_a_pair_is_two_rows_and_a_forward_of_the_reference():
    config = make_config()
    settings = make_settings("lora", packing=False, attn_implementation="sdpa")
    pair = predict(replace(settings, pairs=True), config)
    rows = predict(replace(settings, per_device_train_batch_size=2), config)
    assert pair.peak == rows.peak
    card = replace(CARDS["h100"], gigabytes=1e9, teraflops=1e-6)  # its products alone
    share = pair.forward.flops / pair.work.flops
    assert predict_speed(pair, card).fast == pytest.approx(predict_speed(rows, card).fast / (1 + share))


PARAMETERS = {  # of the checkpoints' pages: known_configs/README.md
    "LiquidAI/LFM2.5-1.2B-Instruct": 1_170_340_608,
    "google/gemma-3-4b-it": 4_300_079_472 - 416_866_032 - 2_950_272,  # less tower and projector
    "microsoft/phi-4": 14_659_507_200,
    "microsoft/Phi-4-mini-instruct": 3_836_021_760,
    "nanochat-students/base-d20": 560_988_160,
    "openai/gpt-oss-20b": 20_914_757_184,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "Qwen/Qwen3-4B-Instruct-2507": 4_022_468_096,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
}
ROUNDED = {  # whose page says billions alone
    "google/gemma-4-E4B-it": (8.0 - 0.15 - 0.3, 0.1),  # less the towers for images and sound
    "mistralai/Ministral-3-8B-Instruct-2512-BF16": (8.4, 0.1),
    "Qwen/Qwen3.5-4B": (4.2, 0.05),
}


def count_parameters(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(name).config)
    model.tie_weights()
    return sum(weight.numel() for weight in model.parameters())


def test_known_shapes_have_the_parameters_that_are_published():
    for name, published in PARAMETERS.items():
        assert count_parameters(name) == published, name
    for name, (billions, error) in ROUNDED.items():
        assert count_parameters(name) / 1e9 == pytest.approx(billions, abs=error), name


def test_every_recipe_has_a_row_of_the_table():
    """With shapes that are known without a hub."""
    recipes = {f"recipes/{path.name}" for path in RECIPES.glob("*.py")}
    assert {recipe for recipe, _, _ in fit.TABLE_RUNS} == recipes
    shelf = {path.name for path in (RECIPES / "configs").glob("*_*lora.yaml")} - {"demo_qlora.yaml"}
    assert {name for name in shelf if not any(name in " ".join(flags) for _, flags, _ in fit.TABLE_RUNS)} == set()


@pytest.mark.long
def test_the_readmes_table_is_what_the_command_prints(capsys, monkeypatch):
    monkeypatch.chdir(REPO)
    assert fit.main(["--table"]) == 0
    readme = (REPO / "eval" / "README.md").read_text().splitlines()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [row for row in rows if row not in readme] == []


# -- what else a run costs --------------------------------------------------------------------------------------------
def test_what_evaluations_and_saves_cost():
    """A save is as large as what torch would write; an evaluation takes the forward's share of a step's products."""
    config = make_config()
    settings = make_settings("full", gradient_accumulation_steps=4, attn_implementation="eager")
    result = predict(settings, config)
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.zeros((1, 4), dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    states = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    card = replace(CARDS["h100"], gigabytes=1e12, teraflops=1e-6)  # its products alone
    schedule = Schedule(eval_steps=20, save_steps=10, tokens=2 * settings.tokens)
    save = cost_of_saves(result, card, schedule)
    assert save.size == sum(tensor.nbytes for tensor in [*model.parameters(), *states])
    evaluation = cost_of_evaluations(result, card, schedule)
    expected = 2 * result.forward.flops / (20 * 4 * result.work.flops)
    assert evaluation.share == pytest.approx((expected, expected))
    assert cost_of_saves(result, card, replace(schedule, save_steps=None)) is None
    assert cost_of_evaluations(result, card, replace(schedule, tokens=0)) is None


def test_optimizers_are_compared_on_the_same_weights():
    result = predict(make_settings("qlora", optim="paged_adamw_8bit"), make_config())
    costs = {cost.optim: cost for cost in compare_optimizers(result)}
    assert costs["adamw_torch_fused"].total == 8 * result.counts.trained
    assert costs["paged_adamw_8bit"].total == costs["adamw_8bit"].total == costs["adamw_8bit"].resident
    assert costs["paged_adamw_8bit"].resident == 0


FIGURES = re.compile(r"([\d,]+) to ([\d,]+) tokens/s[, ]+([\d.]+)\s+GiB; with Liger ([\d,]+) to ([\d,]+) and (\d+\.\d)")


def test_the_config_beside_a_published_anchor(capsys, monkeypatch):
    """prime-rl's figure lies in the predicted range, and the config's first lines say what is predicted."""
    monkeypatch.chdir(REPO)
    text = (RECIPES / "configs" / "qwen3_full_16k.yaml").read_text()
    launch, flags = re.search(
        r"^#   accelerate launch --config_file (\S+) recipes/qwen3_full.py (.*)$", text, re.M
    ).groups()
    assert flags == "--config recipes/configs/qwen3_full_16k.yaml"
    said = [float(word.replace(",", "")) for word in FIGURES.search(text.replace("\n# ", " ")).groups()]
    found = []
    for liger in ("false", "true"):
        words = ["recipes/qwen3_full.py", "--gpu", "h100", "--config_file", launch, "--tokens_per_row", "16384"]
        assert fit.main([*words, "--json", *flags.split(), "--use_liger_kernel", liger]) == 0
        result = json.loads(capsys.readouterr().out)
        speed = result["tokens_per_second"]
        found += [fit.round_figure(speed["slow"]), fit.round_figure(speed["fast"]), result["peak_bytes"] / GIB]
        assert result["settings"]["gradient_accumulation_steps"] == 2
    assert found == pytest.approx(said, rel=0.005)
    assert said[0] < 49_700 < said[1]
    assert math.isclose(result["save"]["size"], 48e9, rel_tol=0.01)


# -- stored and published ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("recipe", STORED)
def test_defaults_need_what_they_needed(recipe, capsys):
    """A change of a recipe's defaults or of a library shows here, and then belongs into the README's tables."""
    fit.main([str(RECIPES / f"{recipe}.py"), "--gpu", "h100", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["peak_bytes"] / GIB == pytest.approx(STORED[recipe], rel=0.005)
    assert result["peak_bytes"] == pytest.approx(sum(result["parts_bytes"].values()), abs=len(result["parts_bytes"]))
    whole, eight_bits, save = COSTS[recipe]
    states = {optim: size / GIB for optim, size in result["optimizer_bytes"].items()}
    assert states == pytest.approx(
        {"adamw_torch_fused": whole, "adamw_8bit": eight_bits, "paged_adamw_8bit": eight_bits}, rel=0.06
    )
    assert result["save"]["size"] / 1e9 == pytest.approx(save, rel=0.05)
    quoted = f"| {whole}, {eight_bits} GiB |"
    assert [line for line in SETTINGS if f"`{recipe}.py`" in line and quoted in line and f"| {save} GB |" in line]


@pytest.mark.parametrize(
    ("bits", "gib", "error", "speed"), [({"load_in_4bit": True}, 7.4, 0.03, 2413), ({}, 16.2, 0.08, 3083)]
)
def test_torchtunes_published_figures(bits, gib, error, speed):
    """torchtune's README: Llama-3.1-8B on an RTX 4090, 2 x 2,048 packed, compiled; rank 8 as in its configs."""
    settings = RunSettings(
        LLAMA,
        dtype="bfloat16",
        use_peft=True,
        lora_r=8,
        use_bnb_nested_quant=True,
        max_length=2048,
        per_device_train_batch_size=2,
        tokens_per_row=2048,
        torch_compile=True,
        **bits,
    )
    result = predict(settings, load_config(LLAMA).config)
    assert result.peak / GIB == pytest.approx(gib, rel=error)
    rate = predict_speed(result, find_card("rtx4090"))
    assert rate.slow < speed < 1.01 * rate.fast


# -- advice -----------------------------------------------------------------------------------------------------------
@pytest.mark.long
def test_the_longest_length_fits_and_more_does_not():
    config = load_config("Qwen/Qwen3-8B").config
    settings = RunSettings("Qwen/Qwen3-8B", dtype="bfloat16", use_peft=True, max_length=2048)
    card = CARDS["rtx4090"]
    length = longest_length(settings, config, Engine(), card)
    assert predict(replace(settings, max_length=length), config).fits(card.gib)
    assert not predict(replace(settings, max_length=length + 1024), config).fits(card.gib)
    assert longest_length(settings, config, Engine(), CARDS["rtx4080"]) is None


def test_the_ladder_says_what_each_rung_saves():
    config = make_config(vocab_size=64)
    settings = make_settings("lora", max_length=1024, per_device_train_batch_size=2, lora_dropout=0.05)
    before = predict(settings, config)
    changes = {change.flags: change for change in list_savings(settings)}
    assert list(changes)[:4] == [
        "--attn_implementation sdpa",
        "--max_length 512",
        "--lora_dropout 0",
        "--per_device_train_batch_size 1",
    ]
    for flags, is_saving in (("--attn_implementation sdpa", False), ("--max_length 512", True)):
        rung = predict_change(changes[flags], config, Engine(), CARDS["rtx4080"])
        assert (rung.saved(before) > 0) == is_saving  # sdpa: its dense mask


def test_a_half_empty_card_is_told_what_to_spend_it_on():
    settings = make_settings("qlora", gradient_accumulation_steps=4, optim="paged_adamw_8bit")
    flags = [[change.flags for change in changes] for changes in list_spendings(settings)]
    assert flags[0] == [
        "--activation_checkpointing false",
        """--activation_checkpointing_kwargs '{"every_n_layers": 2}'""",
    ]
    assert flags[1] == ["--per_device_train_batch_size 4", "--per_device_train_batch_size 2"]
    assert flags[2] == ["--max_length 1024", "--max_length 512", "--max_length 256"]
    assert flags[-2:] == [
        ["--load_in_4bit false", "--load_in_4bit false --load_in_8bit true"],
        ["--optim adamw_torch_fused"],
    ]
    result = predict(settings, make_config())
    assert is_half_empty(result, CARDS["rtx4080"])
    assert not is_half_empty(result, replace(CARDS["rtx4080"], gib=1.0))


# -- cards and the command --------------------------------------------------------------------------------------------
def test_cards_are_those_of_the_training_log():
    names = {"NVIDIA GeForce RTX 4080": "rtx4080", "NVIDIA H100 80GB HBM3": "h100", "NVIDIA A100-SXM4-80GB": "a100"}
    names |= {"NVIDIA L40S": "l40s", "NVIDIA GeForce RTX 4090": "rtx4090", "NVIDIA H200": "h200"}
    for device, name in names.items():
        assert find_device_card(device) is CARDS[name]
    assert find_device_card("NVIDIA GeForce RTX 4080 Laptop GPU") is None
    assert find_card("RTX 4080") is find_card("rtx4080")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["recipes/qwen3_qlora.py", "--gpu", "rtx4008"], "the nearest is rtx4080"),
        (["recipes/nothing.py", "--gpu", "h100"], "no such recipe"),
        (["recipes/qwen3_qlora.py"], "no card: pass --gpu"),
        (["--gpu", "h100"], "no recipe"),
        (["recipes/qwen3_qlora.py", "--gpu", "h100", "--max_lenght", "4"], "--max_length"),
        (["recipes/qwen3_qlora.py", "--gpu", "h100", "--model_name_or_path", "nobody/nothing"], "config.json"),
        (["recipes/step35_sft.py", "--gpu", "h100"], "pass --max_length"),
        (["recipes/qwen3_qlora.py", "--gpu", "h100", "--config_file", "none.yaml"], "--config_file none.yaml"),
    ],
)
def test_bad_input_is_one_sentence(words, sentence, capsys, monkeypatch):
    monkeypatch.chdir(REPO)
    assert fit.main(words) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("fit.py: ")
    assert sentence in message


def test_the_command_prints_parts_verdict_and_ladder(capsys, monkeypatch, tmp_path):
    make_config(num_hidden_layers=3).save_pretrained(tmp_path)
    monkeypatch.chdir(REPO)
    model = ["--model_name_or_path", str(tmp_path)]
    assert fit.main(["recipes/qwen3_lora.py", "--gpu", "rtx4080", *model, "--no_advice"]) == 0
    text = capsys.readouterr().out
    assert "its own config.json" in text
    assert "fits: " in text
    assert "tokens/s on RTX 4080" in text
    assert fit.main(["recipes/qwen3_full.py", "--gpu", "rtx4080", "--no_advice"]) == 1
    assert "does not fit: 67.7" in capsys.readouterr().out
    assert fit.main(["--table", "recipes/qwen3_lora.py", *model]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert [line.count("|") for line in table] == [8, 8, 8]
