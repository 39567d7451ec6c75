"""The paths that only CUDA takes, on a CPU.

flash-attn, flex attention, Triton's kernels and PEFT's branch under CUDA's autocast run here through references in
PyTorch, Triton's interpreter and patches (cuda_references.py, triton_kernels.py). The oracles are documents trained one
at a time with sdpa, lengths that the tokenizer counts, and plain PyTorch.

Breaks tried, each seen red: TRL's collator without a pack's first boundary, and with positions that run on over it (the
probe refuses both; without the probe the gradients are 0.27 and 0.30 off); checkpointing that is not switched on; a
probe whose limit is ten times a leak; a recompile limit that is not raised; flex attention compiled for each length;
PEFT's CPU branch with its input 10% larger; no device map, and no check of visible GPUs; Liger's norm and TRL's logits
0.1% larger; a model without Liger's layers; a block that is no power of two; FlashAttention 3 on every card; a
`kernels` of any version; an attention that was named replaced; heads of any width; Liger's own loss
in the place of TRL's head.
"""

import importlib
import json
import os
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState
from hooks import checks
from hooks.checks import attention as choices
from hooks.checks import devices, packing
from hooks.messages import UsageError
from hooks.start_block import describe_attention
from safetensors.torch import load_file
from transformers import AutoTokenizer, BitsAndBytesConfig, Qwen3Config, Qwen3ForCausalLM
from transformers.integrations import accelerate as device_maps
from transformers.modeling_flash_attention_utils import FLASH_ATTN_KERNEL_VERSIONS
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import import_utils
from trl import ModelConfig, SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import create_model_from_path

from data_prep.common.gpu_standins import FLASH
from tests.helpers.cuda_references import (
    FlashAttention,
    count_compiled,
    hit_the_limit,
    pretend_gpus,
    use_dense_flex_attention,
    use_eager_compiler,
    use_flash_attention,
)
from tests.helpers.runs import EXACT, REPO
from tests.recipes.test_packing import FIXED, GRADIENTS, difference, read

CPU = torch.device("cpu")
TEMPLATE = REPO / "chat_templates" / "qwen3.jinja"
ANSWER_WORDS = (3, 40, 1, 25, 60, 9, 14, 33, 2, 50)  # of ten documents
ALONE = ["--packing", "false", "--per_device_train_batch_size", 1, "--global_batch_size", len(ANSWER_WORDS)]
PACKED = ["--packing", "true", "--max_length", 256, "--global_batch_size", len(ANSWER_WORDS)]  # more than packs
HEADS = 4  # of the demo's model, and its layers
PRECISIONS = {"fp32": EXACT, "bf16": ["--lora_dropout", 0]}
LIMITS = {"fp32": 1e-5, "bf16": 2e-2}  # of a loss, and of gradients relative to their norm


def small_qwen3(attention, layers=2):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    config._attn_implementation = attention
    return Qwen3ForCausalLM(config)


# -- packed equals alone ----------------------------------------------------------------------------------------------
def test_boundaries_of_a_pack(monkeypatch):
    """Of lengths that one can add up by hand, with a document of one token."""
    flash = use_flash_attention(monkeypatch, only_half=False)
    pack = {"input_ids": list(range(128)), "seq_lengths": [30, 1, 45, 52]}
    inputs = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([pack])
    small_qwen3("flash_attention_2")(**inputs)
    assert len(flash.varlen_calls) == 2 and flash.dense_calls == 0  # two layers
    for call in flash.varlen_calls:
        assert call.boundaries == [0, 30, 31, 76, 128] and call.longest == 52
        assert call.shape == (128, 4, 16)


def write_documents(path, answer_words):
    lines = []
    for number, words in enumerate(answer_words):
        question = {"role": "user", "content": f"Count to {words}, {number}."}
        answer = {"role": "assistant", "content": " ".join(str(word) for word in range(words))}
        lines.append(json.dumps({"messages": [question, answer]}) + "\n")
    path.write_text("".join(lines))
    return path


@pytest.fixture
def documents(tmp_path):
    """A file of ten conversations, from a few tokens to a hundred."""
    return write_documents(tmp_path / "ten.jsonl", ANSWER_WORDS)


def count_tokens(path, tokenizer_folder):
    """The tokens of each conversation of a file, by transformers."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    template = TEMPLATE.read_text()
    lengths = []
    for line in path.read_text().splitlines():
        messages = json.loads(line)["messages"]
        text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        lengths.append(len(tokenizer(text)["input_ids"]))
    return lengths


@pytest.fixture
def first_step(run_recipe, hook, documents):
    """first_step(recipe, out, *flags): loss and gradients of one optimizer step over the ten documents."""

    def step(recipe, out, *flags):
        return read(run_recipe(recipe, *hook(GRADIENTS), "--dataset_name", documents, *FIXED, *flags, out=out))

    return step


STEPS_ALONE = {}  # by recipe and precision


@pytest.fixture
def alone(first_step):
    """alone(recipe, precision): the step with each document in a row of its own, by sdpa, activations kept."""

    def step(recipe, precision):
        key = (recipe, precision)
        if key not in STEPS_ALONE:
            flags = [*ALONE, *PRECISIONS[precision], "--activation_checkpointing", "false"]
            STEPS_ALONE[key] = first_step(recipe, "alone", *flags)
        return STEPS_ALONE[key]

    return step


CASES = [("qwen3_full", "fp32"), ("qwen3_qlora", "bf16")]
CASES += [
    pytest.param("qwen3_full", "bf16", marks=pytest.mark.long),
    pytest.param("qwen3_qlora", "fp32", marks=pytest.mark.long),
]


@pytest.mark.parametrize("checkpointing", ["true", "false"])
@pytest.mark.parametrize(("recipe", "precision"), CASES)
def test_flash_attention_keeps_packs_apart(
    first_step, alone, demo, documents, monkeypatch, recipe, precision, checkpointing
):
    """In a run of the recipe: the boundaries are the documents', loss and gradients those of each alone."""
    oracle = alone(recipe, precision)
    flash = use_flash_attention(monkeypatch, only_half=precision == "bf16")
    flags = [*PACKED, *PRECISIONS[precision], "--attn_implementation", "flash_attention_2"]
    packed = first_step(recipe, "packed", *flags, "--activation_checkpointing", checkpointing)
    gaps = difference(oracle, packed)
    assert packed[2] < len(ANSWER_WORDS), "nothing was packed"
    assert oracle[1].norm() > 1 and max(gaps) < LIMITS[precision], gaps

    calls = [call for call in flash.varlen_calls if call.shape[1] == HEADS]  # not the probe's, of fewer heads
    times = 2 if checkpointing == "true" else 1  # a layer is run again for its gradients
    assert len(calls) == packed[2] * HEADS * times and flash.dense_calls > 0  # the probe's documents alone
    lengths = Counter()
    for call in calls:
        for start, end in zip(call.boundaries, call.boundaries[1:], strict=False):
            lengths[end - start] += 1
    expected = Counter(count_tokens(documents, demo / "init"))
    assert {length: count / (HEADS * times) for length, count in lengths.items()} == expected
    if precision == "bf16":
        assert {call.dtype for call in calls} == {torch.bfloat16}


@pytest.mark.parametrize("checkpointing", ["true", pytest.param("false", marks=pytest.mark.long)])
@pytest.mark.parametrize(("recipe", "precision"), CASES)
def test_flex_attention_keeps_packs_apart(first_step, alone, monkeypatch, recipe, precision, checkpointing):
    """Its dense form, forward and backward."""
    oracle = alone(recipe, precision)
    use_dense_flex_attention(monkeypatch)
    flags = [*PACKED, *PRECISIONS[precision], "--attn_implementation", "flex_attention"]
    packed = first_step(recipe, "packed", *flags, "--activation_checkpointing", checkpointing)
    gaps = difference(oracle, packed)
    assert packed[2] < len(ANSWER_WORDS), "nothing was packed"
    assert oracle[1].norm() > 1 and max(gaps) < LIMITS[precision], gaps


# -- the probe, with each attention -----------------------------------------------------------------------------------
def qwen3_config():
    return Qwen3Config(architectures=["Qwen3ForCausalLM"])


ATTENTIONS = ["eager", "sdpa", "flex_attention", "flash_attention_2"]


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_probe_sees_what_each_attention_does(attention, monkeypatch):
    """flash-attn takes no float32, so that its probe runs in bfloat16."""
    flash = use_flash_attention(monkeypatch)
    use_dense_flex_attention(monkeypatch)
    probe = packing.probe_packing(qwen3_config(), attention, CPU)
    assert not probe.leaks and probe.gap < probe.limit / 2
    if attention == "flash_attention_2":
        assert {tuple(call.boundaries) for call in flash.varlen_calls} == {(0, 20, 40)}

    run_documents = packing.run_documents

    def run_without_boundaries(model, device, input_ids, **_):
        return run_documents(model, device, input_ids=input_ids)

    monkeypatch.setattr(packing, "run_documents", run_without_boundaries)
    leak = packing.probe_packing(qwen3_config(), attention, CPU)
    assert leak.leaks and leak.gap == leak.joined_gap


def test_the_probe_sees_flash_attention_over_boundaries(monkeypatch):
    """A kernel that takes a pack for one document."""

    def attend_over(self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **kwargs):
        return self.flash_attn_func(q[None], k[None], v[None], **kwargs)[0]

    monkeypatch.setattr(FlashAttention, "flash_attn_varlen_func", attend_over)
    use_flash_attention(monkeypatch)
    assert packing.probe_packing(qwen3_config(), "flash_attention_2", CPU).leaks


@pytest.mark.long
def test_the_probe_with_compiled_flex_attention():
    """By Inductor, which makes C++ of it here; head_dim 128, since torch 2.13's is wrong at 16 on a CPU."""
    config = qwen3_config()
    config.head_dim = 128
    probe = packing.probe_packing(config, "flex_attention", CPU)
    assert not probe.leaks and probe.gap < probe.limit / 2


# -- how often flex attention is compiled -----------------------------------------------------------------------------
DYNAMO_LIMIT = 8  # its own


@pytest.fixture
def dynamo(monkeypatch):
    """Dynamo without a compiler behind it, with nothing compiled yet and its own limit."""
    use_eager_compiler(monkeypatch)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    with torch.compiler.config.patch(recompile_limit=DYNAMO_LIMIT):
        yield
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()


def test_packs_of_changing_length_are_compiled_a_few_times(dynamo):
    """For the first length, for any length, for one document, and for these again within one block of 128 tokens."""
    model = small_qwen3("flex_attention", layers=1).base_model
    counts = []
    for lengths in ([200, 300], [150, 280], [300, 211, 20], [511], [60, 30], [77], [128, 128], [256]):
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        model(input_ids=torch.zeros_like(positions), position_ids=positions, use_cache=False)
        counts.append(count_compiled())
    assert counts[0] == 1 and counts[-1] <= 6 and not hit_the_limit(), counts


GENERATE = """
import torch
from tests.helpers.cuda_references import count_compiled
from pathlib import Path
from transformers import TrainerCallback


class Generate(TrainerCallback):
    def __init__(self, trainer):
        self.path = Path(trainer.args.output_dir, "compiled")

    def note(self, name):
        with self.path.open("a") as file:
            file.write(f"{name} {count_compiled()}\\n")

    def on_step_end(self, args, state, control, **_):
        self.note("step")

    def on_evaluate(self, args, state, control, model=None, **_):
        self.note("evaluation")
        if state.global_step == 2:
            return
        model.eval()
        for length in (5, 40, 130):
            for rows in (1, 2):
                ids = torch.full((rows, length), 7)
                mask = torch.ones_like(ids)
                mask[0, : rows - 1] = 0
                model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        model.train()
        self.note("generation")
"""


@pytest.mark.long
def test_a_run_with_flex_attention_stays_below_the_limit(dynamo, run_recipe, hook, tmp_path):
    """Training and evaluation stay within Dynamo's own limit of 8; generation between them goes beyond it."""
    rows = write_documents(tmp_path / "rows.jsonl", [number * number * 7 % 60 + 1 for number in range(30)])
    flags = ["--dataset_name", rows, "--eval_rows", 8, "--max_length", 256, "--global_batch_size", 2]
    flags += ["--max_steps", 6, "--eval_strategy", "steps", "--eval_steps", 2]
    folder = run_recipe("qwen3_full", *hook(GENERATE), *flags, "--attn_implementation", "flex_attention")
    counts = {}
    for line in (folder / "compiled").read_text().splitlines():
        name, count = line.split()
        counts.setdefault(name, []).append(int(count))
    print(counts)
    assert len(counts["evaluation"]) == 3 and counts["evaluation"][1] <= DYNAMO_LIMIT
    assert DYNAMO_LIMIT < counts["generation"][-1] <= devices.RECOMPILE_LIMIT / 2
    assert torch.compiler.config.recompile_limit == devices.RECOMPILE_LIMIT and not hit_the_limit()


def test_the_limit_is_raised_for_flex_attention_alone():
    raised = devices.RECOMPILE_LIMIT
    for before, attention, after in ((8, "sdpa", 8), (8, "flex_attention", raised), (99, "flex_attention", 99)):
        training_args = SFTConfig(use_cpu=True, model_init_kwargs={"attn_implementation": attention})
        with torch.compiler.config.patch(recompile_limit=before):
            devices.prepare_gpu(training_args)
            assert torch.compiler.config.recompile_limit == after
        assert training_args.model_init_kwargs == {"attn_implementation": attention}


# -- PEFT's 4-bit layer under CUDA's autocast -------------------------------------------------------------------------
def test_adapters_on_4_bit_layers_under_autocast(run_recipe, documents, monkeypatch):
    """PEFT asks torch.is_autocast_enabled(), CUDA's, and casts by itself where that is off, as on a CPU.

    Asked for the CPU's, it takes the branch that it takes on a GPU: the same adapters, bit for bit.
    """
    flags = [*PACKED, "--lora_dropout", 0, "--dataset_name", documents, "--eval_rows", 0, "--max_steps", 3]
    adapters = [load_file(run_recipe("qwen3_qlora", *flags, out="cast") / "adapter_model.safetensors")]
    is_enabled = torch.is_autocast_enabled
    answers = []

    def ask_the_cpu(*device_type):
        if device_type:
            return is_enabled(*device_type)
        answers.append(is_enabled("cpu"))
        return answers[-1]

    monkeypatch.setattr(torch, "is_autocast_enabled", ask_the_cpu)
    adapters.append(load_file(run_recipe("qwen3_qlora", *flags, out="autocast") / "adapter_model.safetensors"))
    assert len(answers) > 100 and all(answers)
    for name, weight in adapters[0].items():
        assert weight.abs().sum() > 0 and torch.equal(weight, adapters[1][name]), name


# -- one process, one GPU ---------------------------------------------------------------------------------------------
@pytest.fixture
def gpus(monkeypatch):
    """gpus(count, **settings): an SFTConfig in one process that sees so many GPUs."""
    AcceleratorState._reset_state(True)

    def make(count, **settings):
        pretend_gpus(monkeypatch, count)
        settings.setdefault("model_init_kwargs", {"attn_implementation": "sdpa"})
        return SFTConfig(bf16=False, **settings)

    yield make
    AcceleratorState._reset_state(True)


def loaded_with(model_init_kwargs):
    """The device_map that TRL loads a model with."""
    architecture = mock.Mock()
    create_model_from_path("owner/model", architecture, **model_init_kwargs)
    return architecture.from_pretrained.call_args.kwargs["device_map"]


def test_one_process_loads_on_its_one_gpu(gpus):
    training_args = gpus(1)
    assert training_args.device == torch.device("cuda:0")
    assert loaded_with(training_args.model_init_kwargs) == "auto"  # TRL's own choice
    devices.check_visible_gpus(training_args)
    devices.prepare_gpu(training_args)
    assert loaded_with(training_args.model_init_kwargs) == {"": 0}


def test_two_gpus_and_one_process_are_refused(gpus):
    training_args = gpus(2)
    with pytest.raises(UsageError) as error:
        devices.check_visible_gpus(training_args)
    sentence = str(error.value)
    assert sentence.startswith("2 GPUs are visible to one process: ")
    for remedy in ("accelerate_configs/ddp_8gpu.yaml --num_processes 2", "CUDA_VISIBLE_DEVICES=0 before"):
        assert remedy in sentence
    assert (REPO / "accelerate_configs" / "ddp_8gpu.yaml").is_file()


def test_layers_are_spread_by_choice(gpus):
    choice = {"attn_implementation": "sdpa", "device_map": "auto"}
    training_args = gpus(2, model_init_kwargs=dict(choice))
    devices.check_visible_gpus(training_args)
    devices.prepare_gpu(training_args)
    assert training_args.model_init_kwargs == choice


def test_a_run_that_sees_two_gpus_ends_before_anything_is_loaded(gpus, run_recipe):
    gpus(2)
    with pytest.raises(UsageError, match="2 GPUs are visible to one process"):
        run_recipe("qwen3_full", "--use_cpu", "false", "--bf16", "false", "--model_name_or_path", "no/such")


def test_what_the_automatic_map_would_do(monkeypatch):
    """The reason for both: transformers spreads over two GPUs, and from a GPU in use to main memory."""
    model = small_qwen3("sdpa", layers=8).to("meta")
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())

    def place(free_memory, quantizer=None):
        """The devices that get layers."""
        monkeypatch.setattr(device_maps, "get_max_memory", lambda given=None: dict(given or free_memory))
        placed = device_maps._get_device_map(model, "auto", None, quantizer)
        return set(placed.values())

    assert place({0: 10 * size, 1: 10 * size, "cpu": 10 * size}) == {0, 1}
    assert place({0: 10 * size, "cpu": 10 * size}) == {0}
    in_use = {0: size // 2, "cpu": 10 * size}
    assert "cpu" in place(in_use)
    quantizer = AutoHfQuantizer.from_config(BitsAndBytesConfig(load_in_4bit=True))
    with pytest.raises(ValueError, match="Some modules are dispatched on the CPU"):
        place(in_use, quantizer)


# -- the choice of attention ------------------------------------------------------------------------------------------
ADA = (8, 9)
TURING = (7, 5)
HOPPER = (9, 0)
QWEN3_FLAGS = {"dtype": "bfloat16"}


def clear_answers():
    """Make transformers look for packages anew."""
    for name in ("is_flash_attn_2_available", "is_flash_attn_3_available", "is_kernels_available"):
        getattr(choices, name).cache_clear()


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """installed(name=version): packages that can be imported, as transformers finds them; their kernels are empty."""
    versions = {"flash_attn": "flash-attn", "flash_attn_interface": "flash-attn-3", "kernels": "kernels"}
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(import_utils, "is_torch_cuda_available", lambda: True)
    asked = []

    def install(**packages):
        for module, version in packages.items():
            (tmp_path / module).mkdir()
            (tmp_path / module / "__init__.py").write_text("")
            name = versions[module]
            folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
            folder.mkdir()
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            (folder / "top_level.txt").write_text(module)
            (folder / "RECORD").write_text(f"{module}/__init__.py,,\n")
        importlib.invalidate_caches()
        import_utils._package_distribution_mapping.cache_clear()
        clear_answers()
        if "kernels" in packages:
            monkeypatch.setattr(importlib.import_module("kernels"), "get_kernel", get_kernel, raising=False)

    def get_kernel(name, version):
        asked.append((name, version))
        if name not in install.hub:
            raise FileNotFoundError(name)

    install.hub = {choices.FLASH_2_KERNEL, choices.FLASH_3_KERNEL}
    install.asked = asked
    yield install
    for module in versions:
        sys.modules.pop(module, None)
    monkeypatch.undo()
    import_utils._package_distribution_mapping.cache_clear()
    clear_answers()


def choose(monkeypatch, capability, recipes_choice="flex_attention", config=None, **model_settings):
    """The attention of a run on such a GPU, and what the start block says of it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    training_args = SimpleNamespace(
        device=torch.device("cuda:0"), bf16=True, fp16=False, model_init_kwargs={"attn_implementation": recipes_choice}
    )
    model_args = ModelConfig(**QWEN3_FLAGS | model_settings)
    choices.choose_attention(config or qwen3_config(), training_args, model_args)
    chosen = training_args.model_init_kwargs["attn_implementation"]
    return chosen, choices.describe_alternative(chosen, training_args.device).strip(" ()")


def test_flash_attention_where_it_is_installed_and_3_on_hopper(installed, monkeypatch):
    installed(flash_attn="2.8.3")
    assert choose(monkeypatch, ADA) == ("flash_attention_2", "alternative: flex_attention")
    missing = "faster: flash_attention_3, whose package flash-attn-3 is not installed"
    assert choose(monkeypatch, HOPPER) == ("flash_attention_2", missing)
    installed(flash_attn_interface="3.0.0")
    assert choose(monkeypatch, HOPPER) == ("flash_attention_3", "alternative: flash_attention_2")
    assert choose(monkeypatch, ADA)[0] == "flash_attention_2"


@pytest.mark.parametrize(("version", "is_taken"), [("0.17.2", False), ("0.18.2", True), ("0.19.0", False)])
def test_the_hubs_kernel_in_the_versions_that_transformers_takes(installed, monkeypatch, version, is_taken):
    installed(kernels=version)
    missing = "faster: flash_attention_2, whose package flash-attn is not installed"
    expected = "kernels-community/flash-attn2" if is_taken else "flex_attention"
    assert choose(monkeypatch, ADA) == (expected, missing)
    assert choose(monkeypatch, TURING) == ("flex_attention", "")
    if is_taken:
        assert choose(monkeypatch, HOPPER)[0] == "kernels-community/flash-attn3"
        assert ("kernels-community/flash-attn2", 4) in installed.asked  # the version for torch 2.10 and newer
        installed.hub.clear()  # no hub, and nothing in its cache
        assert choose(monkeypatch, ADA)[0] == "flex_attention"


def test_a_choice_that_was_made_stays(installed, monkeypatch):
    installed(flash_attn="2.8.3")
    named = choose(monkeypatch, ADA, attn_implementation="flex_attention")
    assert named[0] == "flex_attention"
    assert choose(monkeypatch, ADA, recipes_choice="sdpa") == ("sdpa", "")
    wide = qwen3_config()
    wide.head_dim = 512
    assert choose(monkeypatch, ADA, config=wide)[0] == "flex_attention"
    assert choices.describe_alternative("sdpa", CPU) == ""


def test_the_start_block_names_the_choice_and_the_alternative(installed, monkeypatch):
    installed()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: ADA)
    model = SimpleNamespace(config=SimpleNamespace(_attn_implementation="flex_attention"))
    training_args = SimpleNamespace(use_liger_kernel=True, activation_checkpointing=True, device=torch.device("cuda:0"))
    assert describe_attention(model, training_args) == (
        "flex_attention (faster: flash_attention_2, whose package flash-attn is not installed), Liger kernels on, "
        "activations checkpointed"
    )


def test_a_run_chooses_before_it_predicts_and_probes(run_recipe, monkeypatch):
    def choose_and_stop(config, training_args, model_args):
        raise UsageError(f"{config.model_type}, {training_args.model_init_kwargs['attn_implementation']}")

    monkeypatch.setattr(checks, "choose_attention", choose_and_stop)
    monkeypatch.setattr(checks, "check_fits", lambda *_: pytest.fail("memory was predicted before"))
    with pytest.raises(UsageError, match="qwen3, sdpa"):
        run_recipe("qwen3_full")


def test_every_candidate_is_one_that_the_prediction_knows():
    for name in choices.list_candidates(HOPPER):
        assert name in FLASH or name == "flex_attention"
        assert ("/" in name) == (name in FLASH_ATTN_KERNEL_VERSIONS)  # by transformers' own names


# -- Triton -----------------------------------------------------------------------------------------------------------
SHARED_MEMORY = {"89": 101_376, "90": 232_448, "120": 101_376}  # bytes a block may take (CUDA C++ programming guide)
TRL_KERNELS = {"_forward_kernel", "_backward_kernel"}
LIGER_KERNELS = {"_rms_norm_forward_kernel", "_rms_norm_backward_kernel", "_triton_rope", "_triton_rope backward"}
LIGER_KERNELS |= {"_swiglu_forward_kernel", "_swiglu_backward_kernel"}
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None,
    reason="Triton is absent: torch's CUDA wheel brings it, on a CPU pip install liger-kernel (1 GB with Triton)",
)


def run_kernels(mode, **environment):
    command = [sys.executable, REPO / "tests" / "helpers" / "triton_kernels.py", mode]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@needs_triton
def test_triton_kernels_compute_what_torch_does():
    """TRL's head against full logits, and Qwen3 with Liger's layers against transformers' own, in fp32."""
    result = run_kernels("interpret", TRITON_INTERPRET="1")
    assert max(result["head"].values()) < 1e-5, result
    if find_spec("liger_kernel") is None:
        pytest.skip("liger-kernel is absent (requirements-gpu.txt): its layers were not run, TRL's head was")
    liger = result["liger"]
    assert liger["layers"]["Qwen3RMSNorm"] == "LigerRMSNorm.forward"
    assert liger["layers"]["Qwen3MLP"] == "LigerSwiGLUMLP.forward"
    assert max(liger["loss"], liger["gradient"]) < 1e-5


@needs_triton
def test_triton_kernels_compile_for_each_card(tmp_path):
    """At Qwen3-4B's widths, for an RTX 40, an H100 and an RTX 50; a block's shared memory fits each."""
    result = run_kernels("compile", TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    expected = set(TRL_KERNELS)
    if find_spec("liger_kernel") is not None:
        expected |= LIGER_KERNELS
    assert result.keys() == expected
    for name, shared in result.items():
        assert shared.keys() == SHARED_MEMORY.keys()
        for architecture, size in shared.items():
            assert size <= SHARED_MEMORY[architecture], (name, architecture)


def forwards(model):
    """The function that each module runs."""
    return {name: module.forward.__func__.__qualname__ for name, module in model.named_modules()}


@needs_triton
@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="liger-kernel is absent (requirements-gpu.txt)")
def test_the_flag_and_ligers_own_function_put_the_same_layers_in(monkeypatch):
    """--use_liger_kernel goes in TRL 2.0; what takes its place then is a call of Liger's own function on the model."""
    from liger_kernel.transformers import apply_liger_kernel_to_qwen3
    from transformers.integrations.liger import apply_liger_kernel
    from transformers.models.qwen3 import modeling_qwen3

    for name in ("apply_rotary_pos_emb", "Qwen3RMSNorm", "Qwen3MLP"):
        monkeypatch.setattr(modeling_qwen3, name, getattr(modeling_qwen3, name))  # put back after Liger
    by_flag = small_qwen3("sdpa")
    by_function = small_qwen3("sdpa")  # before Liger replaces the classes of the module too
    before = forwards(by_flag)
    apply_liger_kernel(by_flag, {"fused_linear_cross_entropy": False})  # TRL's kwargs, the trainer's call
    apply_liger_kernel_to_qwen3(model=by_function, fused_linear_cross_entropy=False)
    assert forwards(by_flag) == forwards(by_function) != before
    assert forwards(by_flag)[""] == before[""]  # the model's own forward, and with it TRL's head
