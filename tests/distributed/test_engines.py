"""Only the accelerate config changes: same rows in the same order, same tokens, same losses, a model that loads.

Each run is compared with one process, whose loop has no distributed code in it. Engine, world size and what of the
weights a rank really holds are asserted from inside (engines.py), because three of these engines fall back to one
process or to DDP without a word, and then every other assertion here holds.
"""

import shutil

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.helpers.engines import ENGINES, PROBE, curve, gap, ranks, run
from tests.helpers.runs import EXACT, REPO

TORCH_ADAM = ["--optim", "adamw_torch"]  # not 8 bits, whose rounding turns 1e-7 into 4e-5; on DTensors they stop
SHARDABLE = ["--allow", "qlora_fsdp2", "--bnb_4bit_quant_storage", "float32"]  # 4-bit weights that FSDP2 can cut
STEPS = ["--max_steps", 12, "--global_batch_size", 4, "--max_length", 512, "--learning_rate", "1e-2"]
STEPS += ["--save_strategy", "no", "--disable_tqdm", "true", "--eval_strategy", "steps", "--eval_steps", 6]
NO_EVAL = ["--eval_strategy", "no"]


@pytest.fixture(scope="session")
def train(demo, tmp_path_factory):
    """train(recipe, engine, *flags) returns the run folder; the same call is run once a session."""
    folder, done = tmp_path_factory.mktemp("engines"), {}
    (folder / "probe.py").write_text(PROBE)
    data = ["--model_name_or_path", demo / "init", "--dataset_name", demo / "rows" / "chat"]
    data += ["--chat_template_path", REPO / "chat_templates" / "qwen3.jinja", "--hooks", folder / "probe.py"]

    def start(recipe, engine, *flags):
        key = (recipe, engine, *map(str, flags))
        if key not in done:
            out = folder / f"run{len(done)}-{recipe}-{engine}"
            run(ENGINES[engine].command(recipe, *data, *STEPS, "--output_dir", out, *flags))
            done[key] = out
        return done[key]

    return start


def is_really(engine, folder):
    """What the ranks of a run saw of it is what the config promises."""
    found, wanted = ranks(folder), ENGINES[engine]
    assert [rank["world"] for rank in found] == [wanted.processes] * wanted.processes
    for rank in found:
        assert rank["backend"] == (None if wanted.processes == 1 else "gloo")
        assert wanted.engine in rank["engine"] and rank["stage"] == wanted.stage
    cut = 2 if engine == "hsdp" else wanted.processes
    for name, divided in ("weights", wanted.sharded), ("states", wanted.sharded or wanted.stage is not None):
        whole = found[0][name][1]
        assert whole > 100_000 if name == "weights" else whole > 10_000
        here = [rank[name][0] for rank in found]
        if divided:
            assert max(here) < 1.1 * whole / cut and sum(here) >= whole
        else:
            assert here == [whole] * wanted.processes
    return found


def rows(engine, found):
    """All rows in the order of the optimizer steps. Under sequence parallelism each rank sees its part of every row."""
    passes = list(zip(*[rank["seen"] for rank in found], strict=True))
    return [sum(parts, []) for parts in passes] if engine == "sp" else [row for ranks in passes for row in ranks]


def same_as_one_process(train, recipe, engine, flags, tolerance):
    flags = [*flags, *ENGINES[engine].flags]
    one, other = train(recipe, "one", *flags), train(recipe, engine, *flags)
    single, found = is_really("one", one), is_really(engine, other)
    assert rows(engine, found) == single[0]["seen"]
    assert len(single[0]["seen"]) == len({str(row) for row in single[0]["seen"]}) > 40
    assert curve(one, "num_tokens") == curve(other, "num_tokens")
    assert len(curve(one, "loss")) == 12 and curve(one, "loss")[0] - min(curve(one, "loss")) > 0.1
    assert gap(one, other, "loss") <= tolerance, (curve(one, "loss"), curve(other, "loss"))
    assert gap(one, other, "grad_norm") <= 30 * tolerance, (curve(one, "grad_norm"), curve(other, "grad_norm"))
    assert gap(one, other, "eval_loss") <= tolerance
    return one, other


def loads_in_transformers(demo, folder, dtype=torch.float32):
    """The saved run in plain transformers (and PEFT) gives the logits of the trained model in memory."""
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    trained, ids = torch.load(folder / "logits0.pt"), torch.arange(5, 69)[None]
    adapter, bits = (folder / "adapter_config.json").is_file(), None
    if settings.get("load_in_4bit"):
        bits = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    base = AutoModelForCausalLM.from_pretrained(demo / "init", dtype=dtype, quantization_config=bits)
    # bitsandbytes 0.50.2 repacks 4-bit weights for evaluation on some CPUs, to bf16 arithmetic: 1.6% off
    [vars(layer).update(support_avx512bf16_for_cpu=False) for layer in base.modules()]
    before = base(ids).logits.float()
    model = PeftModel.from_pretrained(base, folder) if adapter else AutoModelForCausalLM.from_pretrained(folder)
    if not adapter:
        assert model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        after = model(ids).logits.float()
    assert (trained - before).abs().max() > 0.1, "nothing was trained"
    assert (trained - after).abs().max() <= 1e-4 * trained.abs().max()


FULL, LORA, QLORA = "qwen3_full", "qwen3_lora", "qwen3_qlora"
SHIPPED, SLOW = ["--lora_dropout", "0"], ["--learning_rate", "1e-4"]
QUICK = [(FULL, "zero3", EXACT, 1e-5), (FULL, "fsdp2", EXACT, 1e-5)]  # DDP: test_packing.py
LONG = [(FULL, engine, EXACT, 1e-5) for engine in ("ddp", "sp", "zero1", "zero2", "offload", "hsdp")]
LONG += [(QLORA, "ddp", SHIPPED, 1e-3)]  # evaluation in the middle: bitsandbytes once cut the gradients after one
LONG += [(LORA, engine, EXACT, 1e-5) for engine in ("ddp", "zero1", "zero2", "zero3", "fsdp2", "sp")]
LONG += [(LORA, "offload", EXACT, 2e-4)]  # DeepSpeed's own Adam: where gradients are near 0, as B's at first, rounding
LONG += [(QLORA, engine, EXACT + TORCH_ADAM, 1e-5) for engine in ("ddp", "zero1", "zero2", "zero3")]
LONG += [(QLORA, "fsdp2", EXACT + TORCH_ADAM + SHARDABLE, 1e-5)]
# bf16 rounds differently in each engine: at the 1e-2 of the others that grows to 2e-2 within 12 steps, DDP to 1e-3
LONG += [(FULL, "ddp", [*SHIPPED, *SLOW], 1e-3), (FULL, "sp", [*SHIPPED, *SLOW], 1e-2)]
LONG += [(FULL, engine, [*SHIPPED, *SLOW], 2e-3) for engine in ("zero1", "zero2", "zero3", "fsdp2")]
LONG += [(LORA, "ddp", [*SHIPPED, "--learning_rate", "1e-3"], 1e-3)]
LONG += [(LORA, engine, [*SHIPPED, "--learning_rate", "1e-3"], 3e-3) for engine in ("zero3", "fsdp2")]
SHARDABLE_BF16 = ["--allow", "qlora_fsdp2", "--bnb_4bit_quant_storage", "bfloat16"]
LONG += [(QLORA, engine, [*SHIPPED, *SLOW, *TORCH_ADAM, *SHARDABLE_BF16], 2e-3) for engine in ("zero3", "fsdp2")]


def named(case):
    recipe, engine, flags, tolerance = case
    return f"{recipe.split('_')[1]}-{engine}-{'fp32' if 'float32' in flags else 'shipped'}"


MATRIX = QUICK + [pytest.param(case, marks=pytest.mark.long, id=named(case)) for case in LONG]


@pytest.mark.parametrize("case", MATRIX, ids=named)
def test_same_curve_and_it_loads(demo, train, case):
    """What would fool it: a fallback to DDP or to one process, and weights too small for ZeRO-3 to cut."""
    recipe, engine, flags, tolerance = case
    one, other = same_as_one_process(train, recipe, engine, flags, tolerance)
    if "float32" in flags:
        loads_in_transformers(demo, one)
        loads_in_transformers(demo, other)


@pytest.mark.long
def test_eight_ranks_packed_with_an_uneven_last_pass(train):
    """A whole epoch, so that the last pass lacks rows: accelerate fills it with rows from the start, trained twice."""
    flags = [*EXACT, "--global_batch_size", 8, "--max_steps", -1, "--num_train_epochs", 1, *NO_EVAL]
    one, eight = train(FULL, "one", *flags), train(FULL, "ddp8", *flags)
    single, found = is_really("one", one)[0]["seen"], is_really("ddp8", eight)
    assert len(single) % 8, "the last pass is even: choose other rows"
    assert rows("ddp8", found)[: len(single)] == single and len(curve(one, "loss")) == -(-len(single) // 8)
    assert gap(one, eight, "loss") <= 1e-5 and gap(one, eight, "grad_norm") <= 3e-4
    assert curve(one, "num_tokens") == curve(eight, "num_tokens")


@pytest.mark.long
@pytest.mark.parametrize(("recipe", "engine"), [(FULL, "zero3"), (FULL, "fsdp2"), (LORA, "zero3"), (LORA, "fsdp2")])
def test_resumed_equals_uninterrupted(train, demo, tmp_path, recipe, engine):
    """Weights, losses and tokens, bitwise. Steps 4 to 8 are run again, from a folder without what they left."""
    flags = ["--max_steps", 8, "--save_strategy", "steps", "--save_steps", 4, *EXACT, "--lora_dropout", "0.1"]
    whole = train(recipe, engine, *flags)
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoint-8")
    for path in cut.glob("*model.safetensors"):
        path.unlink()
    again = train(recipe, engine, *flags, "--output_dir", cut, "--resume_from_checkpoint", "true")
    assert again != whole
    assert len(curve(whole, "loss")) == 8 and len(ranks(cut)[0]["seen"]) == len(ranks(whole)[0]["seen"]) / 2
    assert curve(cut, "loss") == curve(whole, "loss") and curve(cut, "num_tokens") == curve(whole, "num_tokens")
    one, other = (load_file(next(folder.glob("*model.safetensors"))) for folder in (whole, cut))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
