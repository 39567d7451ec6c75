"""Adapters: what they reach of each family, what is in 4 bits, and tied embeddings that stay tied.

The oracle counts layers and parameters of the plain model by name, before PEFT: it knows nothing of adapters.
"""

import re
import shlex
from dataclasses import dataclass, field
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from datasets import Dataset
from hooks.checks.adapter_coverage import adapter_coverage, check_adapter_coverage, check_adapter_settings
from hooks.checks.allowed import MIN_SHARE
from hooks.checks.tied_embeddings import check_tied_embeddings
from hooks.messages import UsageError
from safetensors.torch import load_file
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config

from tests.helpers.runs import REPO, parse

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
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
EXPERTS = {"num_experts": 16, "num_local_experts": 16, "n_routed_experts": 16, "num_experts_per_tok": 2}
EXPERTS |= {"moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}
LATENT = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
LATENT |= {"num_key_value_heads": 4, "head_dim": 8}
LINEAR = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
MAMBA = {"num_hidden_layers": None, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2}
MAMBA |= {"moe_shared_expert_intermediate_size": 32}
MAMBA_2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16}
MAMBA_2 |= {"shared_intermediate_size": 32, "layer_types": ["mamba", "attention"] * 2}
CONV = ["conv", "full_attention"] * 2
EACH_KIND_OF_LAYER = ["linear_attention", "moe", "full_attention", "mlp"]
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 99}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}

# Names of experts' layers as they were in transformers 4, which PEFT takes for their stacked parameters here. It takes
# them from dense layers and shared experts of the same model, then.
OLD_NAMES = {"gate_proj", "up_proj", "down_proj"}
GATED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@dataclass
class Family:
    """A small config of a model type, and what it takes for adapters on nearly all."""

    values: dict = field(default_factory=dict)
    experts: list[str] = field(default_factory=list)  # their stacked parameters
    old_names: bool = False
    router: bool = False  # all-linear means its weight too, though it is no linear layer


FAMILIES = {
    "qwen2": Family(),
    "qwen3": Family(),
    "qwen3_moe": Family(EXPERTS, GATED, old_names=True),
    "qwen3_5_text": Family(LINEAR),
    "qwen3_5_moe_text": Family(EXPERTS | LINEAR | {"shared_expert_intermediate_size": 32}, GATED),
    "llama": Family(),
    "smollm3": Family(),
    "gemma": Family(),
    "gemma2": Family(),
    "gemma3_text": Family(),
    "gemma4_text": Family(PER_LAYER),
    "deepseek_v3": Family(EXPERTS | LATENT, GATED, old_names=True),
    "phi3": Family(),
    "glm4_moe": Family(EXPERTS, GATED, old_names=True),
    "mistral": Family(),
    "ministral3": Family(),
    "gpt_oss": Family(EXPERTS | {"intermediate_size": 32}, GATED),
    "cohere2": Family(),
    "lfm2": Family({"head_dim": None, "layer_types": CONV, "block_auto_adjust_ff_dim": False}),
    "lfm2_moe": Family(
        EXPERTS | {"head_dim": None, "num_dense_layers": 1, "layer_types": CONV},
        ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"],
    ),
    "nemotron_h": Family(
        EXPERTS | MAMBA | {"layers_block_type": EACH_KIND_OF_LAYER},
        ["mixer.experts.up_proj", "mixer.experts.down_proj"],
    ),
    "nanochat": Family(),
    "cohere": Family(),
    "granite": Family(),
    "granitemoehybrid": Family(
        EXPERTS | MAMBA_2, ["block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"]
    ),
    "olmo3": Family(),
    "llama4_text": Family(
        EXPERTS | {"num_experts_per_tok": 1, "intermediate_size_mlp": 64, "moe_layers": [1, 3]},
        ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"],
    ),
    "minimax_m2": Family(EXPERTS, GATED, router=True),
    "glm4_moe_lite": Family(EXPERTS | LATENT, GATED, old_names=True),
    "glm_moe_dsa": Family(EXPERTS | LATENT, GATED, old_names=True),
    "qwen3_next": Family(EXPERTS | LINEAR | {"shared_expert_intermediate_size": 32}, GATED, old_names=True),
}
WITH_EXPERTS = [kind for kind, family in FAMILIES.items() if family.experts]
LLAMA3 = ["llama"]
QWEN3 = ["qwen3", "qwen3_moe"]
QWEN3_5 = ["qwen3_5_text", "qwen3_5_moe_text"]
FAMILIES_OF_TEMPLATES = {
    "chatml": ["llama"],  # of any base model
    "command_a_reasoning": ["cohere2"],
    "deepseek_r1": ["deepseek_v3"],
    "deepseek_r1_distill": ["qwen2", "llama"],
    "deepseek_v3": ["deepseek_v3"],
    "gemma2": ["gemma", "gemma2"],
    "gemma3": ["gemma3_text"],
    "gemma4": ["gemma4_text"],
    "glm4_6": ["glm4_moe"],
    "gpt_oss": ["gpt_oss"],
    "lfm2_5": ["lfm2", "lfm2_moe"],
    "llama3": LLAMA3,
    "llama3_1": LLAMA3,
    "llama3_2": LLAMA3,
    "mistral_nemo": ["mistral"],
    "mistral_small_3_2": ["mistral", "ministral3"],
    "nanochat": ["nanochat"],
    "nemotron_3": ["nemotron_h"],
    "phi4": ["phi3"],
    "qwen2_5": ["qwen2"],
    "qwen3": QWEN3,
    "qwen3_5": QWEN3_5,
    "qwen3_6": QWEN3_5,
    "qwen3_8": QWEN3_5,
    "qwen3_instruct_2507": QWEN3,
    "qwen3_thinking_2507": QWEN3,
    "qwq": ["qwen2"],
    "smollm3": ["smollm3"],
    "step3_5": [],  # transformers has no class for it
    "step3_qwen3": ["qwen3"],
    "command_a": ["cohere2"],
    "deepseek_v3_1": ["deepseek_v3"],
    "glm4_7": ["glm4_moe", "glm4_moe_lite", "glm_moe_dsa"],
    "granite_4": ["granite", "granitemoehybrid"],
    "granite_4_1": ["granite", "granitemoehybrid"],
    "kimi_k2": ["deepseek_v3"],  # Kimi's own class is that of DeepSeek-V3
    "kimi_k2_thinking": ["deepseek_v3"],
    "llama4": ["llama4_text"],
    "minimax_m2": ["minimax_m2"],
    "ministral_3": ["ministral3"],
    "ministral_3_reasoning": ["ministral3"],
    "mistral_7b_v0_3": ["mistral"],
    "nemotron_3_5": ["nemotron_h"],
    "olmo_3": ["olmo3"],
    "olmo_3_think": ["olmo3"],
    "phi4_mini": ["phi3"],
    "qwen3_coder": ["qwen3_moe"],
    "qwen3_coder_next": ["qwen3_next"],
    "tiny_aya": ["cohere", "cohere2"],
}


def small_config(kind, **values):
    values = SMALL | FAMILIES[kind].values | values
    return CONFIG_MAPPING[kind](**{name: value for name, value in values.items() if value is not None})


def build_model(config, device="meta"):
    model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type])
    torch.manual_seed(1)
    with torch.device(device):
        return model_class(config)


def add_adapters(model, targets, **values):
    with torch.device(next(model.parameters()).device):
        return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, **values))


def refusal(function, *arguments):
    try:
        function(*arguments)
    except UsageError as error:
        sentence = str(error)
        assert "\n" not in sentence and not sentence.endswith("."), sentence
        return sentence
    return None


def check(model, allow=(), **values):
    """What the check says of a model with adapters, in a run with these settings."""
    return refusal(check_adapter_coverage, SimpleNamespace(model=model), ModelConfig(use_peft=True, **values), allow)


# -- the oracle -------------------------------------------------------------------------------------------------------
def matrices(model):
    """{name: (module, size)} of the decoder's matrices, embeddings and biases apart."""
    found = {}
    for module_name, module in model.get_decoder().named_modules():
        if isinstance(module, nn.Embedding) or module is model.get_output_embeddings():  # Llama 4's is the whole model
            continue
        for name, weight in module.named_parameters(recurse=False):
            if weight.dim() >= 2 and "bias" not in name:
                found[f"{module_name}.{name}"] = (module, weight.numel())
    return found


def oracle_share(kind, model, modules, parameters=()):
    """The share of the weights that lie in linear layers of these names, or in parameters of these."""
    everything = modules == "all-linear"
    left_to_experts = set()
    suffixes = [f".{parameter}" for parameter in parameters]
    if FAMILIES[kind].old_names and (everything or set(modules) >= OLD_NAMES):
        left_to_experts = OLD_NAMES
        suffixes += [".experts.gate_up_proj", ".experts.down_proj"]
    if everything and (FAMILIES[kind].old_names or FAMILIES[kind].router):
        suffixes.append(".gate.weight")
    total = reached = 0
    for name, (module, size) in matrices(model).items():
        total += size
        layer = name.split(".")[-2]
        if isinstance(module, nn.Linear):
            reached += size * ((everything or layer in modules) and layer not in left_to_experts)
        else:
            reached += size * name.endswith(tuple(suffixes))
    return reached / total


def test_every_template_has_its_families():
    templates = {path.stem for path in (REPO / "chat_templates").glob("*.jinja")}
    assert templates == set(FAMILIES_OF_TEMPLATES)
    assert {kind for kinds in FAMILIES_OF_TEMPLATES.values() for kind in kinds} == set(FAMILIES)


# -- families ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", FAMILIES)
def test_coverage_of_a_family(kind):
    """The seven usual names reach what the oracle counts; what the refusal says to pass, typed, reaches nearly all."""
    family = FAMILIES[kind]
    plain = build_model(small_config(kind))
    model = add_adapters(build_model(small_config(kind)), SEVEN)
    reached = adapter_coverage(model).reached_share
    assert reached == pytest.approx(oracle_share(kind, plain, SEVEN))
    sentence = check(model)
    assert (sentence is None) == (reached >= MIN_SHARE)
    flags = "--lora_target_modules all-linear"
    if sentence is not None:
        assert sentence.startswith(f"adapters on only {reached:.1%} of the decoder's weights, none on ")
        assert "or --allow low_coverage (" in sentence and check(model, ["low_coverage"]) is None
        flags, promise = re.search(r": (--lora_target_modules .*) puts them on ([\d.]+%), or", sentence).groups()

    _, _, model_args = parse("qwen3_lora", *shlex.split(flags))
    adapters = get_peft_config(model_args)
    share = oracle_share(kind, plain, adapters.target_modules, adapters.target_parameters or ())
    assert share >= MIN_SHARE and (sentence is None or promise == f"{share:.1%}")
    assert set(adapters.target_parameters or ()) in (set(), set(family.experts))
    with torch.device("meta"):
        model = peft.get_peft_model(build_model(small_config(kind)), adapters)
    assert adapter_coverage(model).reached_share == pytest.approx(share)
    assert check(model) is None


@pytest.mark.parametrize("kind", WITH_EXPERTS)
def test_experts_left_out_are_named(kind):
    """Adapters on the attention alone: what to pass names the experts' parameters, and no dropout."""
    sentence = check(
        add_adapters(build_model(small_config(kind)), ["q_proj", "k_proj", "v_proj", "in_proj", "q_a_proj"])
    )
    (flags,) = re.findall(r": (--lora_target_modules .*) puts them on", sentence)
    assert flags.endswith(f" --lora_target_parameters {' '.join(FAMILIES[kind].experts)} --lora_dropout 0")


@pytest.mark.parametrize("kind", WITH_EXPERTS)
def test_adapters_on_experts_are_trained(kind):
    """What the sentence says to pass is no bystander: each adapter has a gradient."""
    model = build_model(small_config(kind), "cpu")
    stacks = [name for name, weight in model.named_parameters() if ".experts." in name and weight.dim() == 3]
    model = add_adapters(model, ["v_proj", "q_b_proj"], target_parameters=FAMILIES[kind].experts)
    tokens = torch.randint(3, 99, (2, 16))
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if ".lora_B." in name}
    assert len([name for name in gradients if ".experts." in name]) == len(stacks)
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())


@pytest.mark.parametrize(
    ("kind", "percent"), [("qwen3_5_text", 77), ("phi3", 31), ("nemotron_h", 31), ("lfm2", 12), ("gpt_oss", 1)]
)
def test_measured_shares_of_the_seven_names(kind, percent):
    """On default configs of full size, as they were measured by another count."""
    model = add_adapters(build_model(CONFIG_MAPPING[kind]()), SEVEN)
    assert f"{adapter_coverage(model).reached_share:.0%}" == f"{percent}%"


def test_what_no_names_reach_is_not_promised():
    """A Mamba layer's out_proj takes no adapter: where it holds a tenth of the weights, the sentence says how far."""
    config = small_config("nemotron_h", layers_block_type=["linear_attention", "full_attention"], mamba_head_dim=64)
    mamba_in, mamba_out, attention = 64 * (2 * 256 + 2 * 2 * 16 + 4), 256 * 64, 2 * 64 * 64 + 2 * 32 * 64
    convolution = 4 * (256 + 2 * 2 * 16)
    total = mamba_in + mamba_out + attention + convolution
    sentence = check(add_adapters(build_model(config), ["q_proj"]))
    assert f"adapters on only {64 * 64 / total:.1%} " in sentence and "puts them on" not in sentence
    pattern = r"(--lora_target_modules .*), which is on ([\d.]+%) of the decoder's weights, with --allow low_coverage "
    flags, most = re.search(f": the widest that PEFT takes here is {pattern}", sentence).groups()
    assert most == f"{(mamba_in + attention) / total:.1%}" and float(most[:-1]) < 90
    assert "lora_target_parameters" not in flags and "out_proj" not in flags
    assert re.search(f": pass {pattern}", check_settings(config)).groups() == (flags, most)
    _, _, model_args = parse("qwen3_lora", *shlex.split(flags))
    with torch.device("meta"):
        widest = peft.get_peft_model(build_model(config), get_peft_config(model_args))
    assert ": PEFT takes no more of this model: --allow low_coverage (" in check(widest)
    assert check(widest, ["low_coverage"]) is None


def test_a_model_that_cannot_be_tried():
    """A class that takes no config alone: nothing is promised."""
    base = build_model(small_config("phi3"))

    class OwnModel(type(base)):
        def __init__(self, config, more):
            super().__init__(config)

    base.__class__ = OwnModel
    sentence = check(add_adapters(base, SEVEN))
    assert ": pass other --lora_target_modules or --lora_target_parameters, or --allow low_coverage (" in sentence


def test_the_text_model_of_a_model_with_images():
    """Vision layers do not count: by hand as for the text model alone."""
    text = small_config("gemma3_text")
    config = CONFIG_MAPPING["gemma3"](text_config=text.to_dict(), vision_config=VISION, mm_tokens_per_image=4)
    with torch.device("meta"):
        plain = transformers.Gemma3ForConditionalGeneration(config)
        model = add_adapters(transformers.Gemma3ForConditionalGeneration(config), ["q_proj"])
    coverage = adapter_coverage(model)
    assert (
        coverage.total == adapter_coverage(build_model(text)).total == sum(size for _, size in matrices(plain).values())
    )
    assert coverage.reached == 4 * 64 * 64
    assert "--lora_target_modules all-linear puts them on 100.0%" in check(model)


# -- what counts ------------------------------------------------------------------------------------------------------
def test_coverage_of_a_dense_model():
    """By hand, a layer of the small Qwen3 in weights: q and o 64 x 64 each, k and v 32 x 64, three of 96 x 64."""
    layer = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64
    config = small_config("qwen3")
    whole = adapter_coverage(add_adapters(build_model(config), "all-linear"))
    assert (whole.total, whole.reached, whole.frozen, whole.in_4bit) == (4 * layer, 4 * layer, 4 * layer, 0)
    assert whole.describe() == "adapters on 100.0% of the decoder's weights"
    part = adapter_coverage(add_adapters(build_model(config), ["q_proj", "v_proj"]))
    assert part.reached_share == pytest.approx((64 * 64 + 32 * 64) / layer)
    gate, output = f"{96 * 64 / layer:.1%}", f"{64 * 64 / layer:.1%}"
    assert part.describe().endswith(
        f"; without an adapter: mlp.gate_proj ({gate}), mlp.up_proj ({gate}), mlp.down_proj ({gate}), "
        f"self_attn.o_proj ({output}), …"
    )
    none = adapter_coverage(build_model(config).requires_grad_(False))
    assert (none.total, none.reached, none.frozen) == (4 * layer, 0, 4 * layer)


def test_what_is_trained_as_a_whole_is_reached():
    """By hand: adapters on q, copies of down_proj trained as a whole; the matrices that they stand for count once."""
    layer = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64
    model = add_adapters(build_model(small_config("qwen3")), ["q_proj"], modules_to_save=["down_proj", "embed_tokens"])
    coverage = adapter_coverage(model)
    assert coverage.total == 4 * layer
    assert coverage.reached == 4 * (64 * 64 + 96 * 64)
    assert coverage.frozen == 4 * (layer - 96 * 64)
    assert "down_proj" not in coverage.describe() and "modules_to_save" not in coverage.describe()


def test_coverage_of_experts():
    """gpt-oss: all-linear leaves the experts out, 2 x 32 and 32 by 64 of each of 16; by name they have adapters."""
    attention = 2 * 64 * 64 + 2 * 32 * 64
    router = 16 * 64
    experts = 16 * (64 * 64 + 32 * 64)
    config = small_config("gpt_oss")
    coverage = adapter_coverage(add_adapters(build_model(config), "all-linear"))
    assert (coverage.total, coverage.reached) == (4 * (attention + router + experts), 4 * attention)
    assert f"mlp.experts.gate_up_proj ({16 * 64 * 64 / (attention + router + experts):.1%})" in coverage.describe()
    coverage = adapter_coverage(add_adapters(build_model(config), "all-linear", target_parameters=GATED))
    assert coverage.reached == 4 * (attention + experts)


# -- in 4 bits --------------------------------------------------------------------------------------------------------
def load_in_4_bits(kind, folder):
    build_model(small_config(kind), "cpu").save_pretrained(folder)
    quantization = transformers.BitsAndBytesConfig(load_in_4bit=True)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization)


def test_coverage_in_4_bits(tmp_path):
    """What is packed two in a byte counts as the weights it stands for."""
    model = add_adapters(load_in_4_bits("qwen3", tmp_path), ["q_proj"])
    coverage = adapter_coverage(model)
    plain = adapter_coverage(add_adapters(build_model(small_config("qwen3")), ["q_proj"]))
    assert (coverage.total, coverage.reached) == (plain.total, plain.reached)
    assert (
        coverage.share_in_4bit == 1.0 and "weights, 100.0% of the frozen ones in 4 bits; without" in coverage.describe()
    )
    assert check(model, ["low_coverage"], load_in_4bit=True) is None


def test_experts_are_not_in_4_bits(tmp_path):
    """By hand, a layer of the small Qwen3 MoE: attention in 4 bits; router and experts as they were, in fp32."""
    attention = 2 * 64 * 64 + 2 * 32 * 64
    others = 16 * 64 + 16 * (64 * 64 + 32 * 64)
    model = add_adapters(load_in_4_bits("qwen3_moe", tmp_path), "all-linear")
    sentence = check(model, load_in_4bit=True)
    share = f"{attention / (attention + others):.1%}"
    gigabytes = f"{4 * others * 4 / 1e9:.3g} GB"
    assert sentence.startswith(f"--load_in_4bit true leaves {gigabytes} as they are, and only {share} of the frozen ")
    up = f"mlp.experts.gate_up_proj ({16 * 64 * 64 / (attention + others):.1%})"
    assert f"without {up}, mlp.experts.down_proj (" in sentence and "bitsandbytes#1849" in sentence
    assert "--load_in_4bit false" in sentence and "or --allow unquantized_weights (" in sentence
    assert check(model, ["unquantized_weights"], load_in_4bit=True) is None
    assert check(model) is None  # 4 bits were not asked for


def test_both_faults_are_one_sentence(tmp_path):
    model = add_adapters(load_in_4_bits("qwen3_moe", tmp_path), ["q_proj"])
    sentence = check(model, load_in_4bit=True)
    assert sentence.startswith("adapters on only ") and "; --load_in_4bit true leaves " in sentence
    assert check(model, ["unquantized_weights"], load_in_4bit=True).endswith("of the decoder's weights)")
    assert check(model, ["low_coverage"], load_in_4bit=True).startswith("--load_in_4bit true leaves ")


# -- before the model is loaded ---------------------------------------------------------------------------------------
def check_settings(config, *flags):
    _, training_args, model_args = parse("qwen3_lora", *flags)
    return refusal(check_adapter_settings, config, training_args, model_args)


@pytest.mark.parametrize("targets", [["all-linear"], ["q_proj", "out_proj"], ["q_proj", "mixer.conv1d"]])
def test_layers_that_peft_refuses_are_named_before_the_load(targets):
    """PEFT raises indeed; what the sentence says to pass it takes."""
    config = small_config("nemotron_h")
    with pytest.raises(ValueError, match="incompatible with Mamba"):
        add_adapters(build_model(config), targets if len(targets) > 1 else targets[0])
    sentence = check_settings(config, "--lora_target_modules", *targets)
    assert sentence.startswith(f"--lora_target_modules {targets[-1]}: PEFT puts no adapter on out_proj and conv1d of ")
    flags = shlex.split(sentence.rpartition(": pass ")[2])
    assert check_settings(config, *flags) is None
    _, _, model_args = parse("qwen3_lora", *flags)
    with torch.device("meta"):
        model = peft.get_peft_model(build_model(config), get_peft_config(model_args))
    assert check(model) is None


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("qwen3_moe", ["--lora_target_modules", "all-linear"]),
        ("qwen3_moe", ["--lora_target_modules", *SEVEN]),
        ("glm4_moe", ["--lora_target_modules", "all-linear"]),
        ("gpt_oss", ["--lora_target_parameters", *GATED]),
    ],
)
def test_dropout_on_experts_is_refused_before_the_load(kind, flags):
    """PEFT raises indeed; without dropout it does not."""
    config = small_config(kind)
    for flag, value, remedy in (("--lora_dropout", 0.05, "0"), ("--use_dora", "true", "false")):
        _, _, model_args = parse("qwen3_lora", *flags, flag, value)
        with pytest.raises(ValueError, match="lora.ParamWrapper does not work with"), torch.device("meta"):
            peft.get_peft_model(build_model(config), get_peft_config(model_args))
        sentence = check_settings(config, *flags, flag, value)
        assert sentence.startswith(f"adapters on the experts of {kind} (")
        assert sentence.endswith(f" have neither dropout nor DoRA in PEFT: pass {flag} {remedy}")
        assert check_settings(config, *flags, flag, remedy) is None


def test_settings_that_pass():
    """No adapters, adapters beside the experts, dense models."""
    dropout = ["--lora_dropout", "0.05"]
    assert check_settings(small_config("nemotron_h"), "--use_peft", "false") is None
    assert check_settings(small_config("gpt_oss"), "--lora_target_modules", "all-linear", *dropout) is None
    assert check_settings(small_config("qwen3_moe"), "--lora_target_modules", "q_proj", "v_proj", *dropout) is None
    for kind in ("qwen3", "phi3", "lfm2", "gemma4_text"):
        assert check_settings(small_config(kind), *dropout) is None
    sentence = check_settings(small_config("qwen3_moe"), "--lora_target_modules", "q_proj", "gate_proj")
    assert sentence.startswith("--lora_target_modules: Cannot convert PEFT target(s) gate_proj without also targeting")


# -- in a run ---------------------------------------------------------------------------------------------------------
def test_coverage_in_a_run(run_recipe, capsys):
    """The demo's model with the adapters of a tutorial; and the command as the sentence says."""
    with pytest.raises(UsageError, match=r"^adapters on only .*: --lora_target_modules all-linear puts them on 100.0%"):
        run_recipe("qwen3_lora", "--lora_target_modules", "q_proj", "v_proj", "--max_steps", 1)
    capsys.readouterr()
    run_recipe("qwen3_lora", "--lora_target_modules", "all-linear", "--max_steps", 1, out="again")
    assert "qwen3_lora.py: adapters on 100.0% of the decoder's weights\n" in capsys.readouterr().out


def test_refused_layers_in_a_run(run_recipe, tmp_path):
    """Before model and data are looked for."""
    small_config("nemotron_h").save_pretrained(tmp_path / "model")
    with pytest.raises(UsageError, match="^--lora_target_modules all-linear: PEFT puts no adapter on out_proj"):
        run_recipe("qwen3_lora", "--model_name_or_path", tmp_path / "model", "--dataset_name", "no/such")


# -- tied embeddings --------------------------------------------------------------------------------------------------
@pytest.fixture
def tied_trainer(demo, tmp_path):
    """tied_trainer(names, tie): TRL's trainer of the demo's model, which ties, with these modules_to_save."""

    def build(names, tie):
        adapters = get_peft_config(ModelConfig(use_peft=True, lora_target_modules=["q_proj", "v_proj"]))
        adapters.modules_to_save = list(names)
        adapters.ensure_weight_tying = tie
        args = SFTConfig(
            str(tmp_path / "run"),
            use_cpu=True,
            bf16=False,
            max_steps=2,
            learning_rate=1e-2,
            report_to="none",
            save_strategy="steps",
            save_steps=1,
            per_device_train_batch_size=2,
            max_length=16,
            disable_tqdm=True,
        )
        rows = Dataset.from_list([{"text": "one two three four five six seven"}] * 4)
        return SFTTrainer(str(demo / "init"), args, train_dataset=rows, peft_config=adapters)

    return build


def embeddings_and_head(model):
    """The two weights that the model computes with."""
    return model.get_input_embeddings().weight, model.get_output_embeddings().weight


MODULES_TO_SAVE = pytest.mark.parametrize("names", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])


@MODULES_TO_SAVE
def test_copies_of_tied_embeddings_are_refused(tied_trainer, names):
    """What is refused would have parted them indeed."""
    trainer = tied_trainer(names, tie=False)
    before = embeddings_and_head(trainer.model)
    assert torch.equal(*before)
    sentence = refusal(check_tied_embeddings, trainer)
    assert f"a copy of {' and one of '.join(names)} is trained: leave {' and '.join(names)} out of " in sentence
    trainer.train()
    assert not torch.equal(*embeddings_and_head(trainer.model))


@MODULES_TO_SAVE
def test_tied_copies_stay_tied(tied_trainer, names, demo, tmp_path):
    """With ensure_weight_tying: one parameter, trained as one, saved so, loaded so, and resumed so."""
    trainer = tied_trainer(names, tie=True)
    start = embeddings_and_head(trainer.model)[0].detach().clone()
    assert refusal(check_tied_embeddings, trainer) is None
    trainer.train()
    embeddings, head = embeddings_and_head(trainer.model)
    assert embeddings is head and not torch.equal(embeddings, start)
    trainer.save_model(str(tmp_path / "adapter"))

    base = transformers.AutoModelForCausalLM.from_pretrained(demo / "init", dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(embeddings_and_head(loaded)[0], embeddings)
    assert torch.equal(embeddings_and_head(loaded)[1], embeddings)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, weight in saved.items():
        if "embed_tokens" in name or "lm_head" in name:
            assert torch.equal(weight, embeddings), name

    resumed = tied_trainer(names, tie=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert embeddings_and_head(resumed.model)[0] is embeddings_and_head(resumed.model)[1]
    assert torch.equal(embeddings_and_head(resumed.model)[0], embeddings)


@pytest.mark.parametrize(
    ("tied", "names"), [(True, ["norm"]), (True, None), (False, ["embed_tokens"]), (False, ["embed_tokens", "lm_head"])]
)
def test_what_is_not_tied_or_not_copied_passes(tied, names):
    model = build_model(small_config("qwen3", tie_word_embeddings=tied))
    trainer = SimpleNamespace(model=add_adapters(model, ["q_proj"], modules_to_save=names))
    assert refusal(check_tied_embeddings, trainer) is None


def test_full_fine_tuning_is_tied_as_it_is():
    trainer = SimpleNamespace(model=build_model(small_config("qwen3", tie_word_embeddings=True)))
    assert refusal(check_tied_embeddings, trainer) is None
    assert refusal(check_adapter_coverage, trainer, ModelConfig(), []) is None


def test_tied_embeddings_in_a_run(run_recipe):
    with pytest.raises(
        UsageError, match="^qwen3 ties its embeddings and its head, and training would part them: a copy"
    ):
        run_recipe("qwen3_lora", "--lora_modules_to_save", "embed_tokens", "--max_steps", 1)
