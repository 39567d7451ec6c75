"""Packing: whether the documents of a pack see each other, tried on a small random model of the same config.

Two documents in a pack are run against each alone, before the model is loaded.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..messages import UsageError, say
from .engine import find_model_class

DOCUMENT_LENGTH = 20  # tokens
VOCABULARY = 64  # ids
MAX_PARAMETERS = 5e8
FIRST_ID = 3  # the ids below are special in many families

# Share of what two documents joined to one would do, above which packing leaks. On a CPU, over every architecture that
# transformers 5.23 builds from its default config: noise at most 6e-6 in fp32 and 0.044 in bf16, leaks from 0.045 on.
LEAK_SHARE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
MIN_JOINED_GAP = 0.01  # below it the tokens of the random model do not see each other at all

# Every expert is chosen, so that rounding cannot choose another; a window shorter than a document matters.
SMALL_VALUES = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "sliding_window": 8,
    "attention_chunk_size": 8,
    "num_local_experts": 2,
    "num_experts": 2,
    "n_routed_experts": 2,
    "moe_num_experts": 2,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
LAYER_LISTS = ("layer_types", "layers_block_type")  # one entry a layer; properties of some configs, not attributes
TOWER_DEPTHS = ("num_hidden_layers", "depth")  # of the parts of a model that see images or hear sound


class NotProbed(Exception):
    """No small model could be built, or it says nothing; with the reason."""


class PackedRowsFail(Exception):
    """Packed rows fail where the same rows alone do not; with the model's own words."""


@dataclass(frozen=True)
class PackingProbe:
    """Largest differences of a hidden state, which is about 1 in size."""

    gap: float  # between two packed documents and each alone
    joined_gap: float  # between the two joined to one document and each alone: no separation at all
    limit: float  # the gap above which it is a leak

    @property
    def leaks(self) -> bool:
        return not self.gap <= self.limit  # a gap that is no number is a leak too


@dataclass(frozen=True)
class ProbeModel:
    """A small model that ran, and its hidden states, each (2, DOCUMENT_LENGTH, hidden size)."""

    model: nn.Module
    dtype: torch.dtype
    alone: Tensor  # of two documents in a batch
    joined: Tensor  # of the two as one document


def is_padding_free(training_args: SFTConfig) -> bool:
    """Return whether TRL's collator flattens a batch into one row of documents, as SFTTrainer decides it."""
    packs_whole_documents = training_args.packing and training_args.packing_strategy != "wrapped"
    return training_args.padding_free or packs_whole_documents


def check_packing(config: PreTrainedConfig, training_args: SFTConfig, allow: list[str]) -> None:
    """Raise UsageError where packed documents see each other, or may; say so where that is by choice."""
    if training_args.packing and training_args.packing_strategy == "wrapped":
        say("wrapped packing: documents see those before them in their pack, as asked for")
    if not is_padding_free(training_args):
        return
    attention = training_args.model_init_kwargs["attn_implementation"]
    subject = f"{config.model_type} with {attention} attention"
    remedy = "--packing false, or another --attn_implementation"
    try:
        probe = probe_packing(config, attention, training_args.device, training_args.trust_remote_code)
    except NotProbed as error:
        if "unprobed_packing" not in allow:
            raise UsageError(
                f"packing: whether {subject} lets documents in one pack see each other is unknown, no small copy of it "
                f"runs ({error}): {remedy}, or --allow unprobed_packing"
            ) from None
        say(f"packing of {subject} not probed: {error}")
        return
    except PackedRowsFail as error:
        raise UsageError(f"packing: {subject} cannot take packed rows ({error}): {remedy}") from None
    if probe.leaks:
        raise UsageError(
            f"packing: {subject} lets documents in one pack see each other: hidden states are off by {probe.gap:.2g}, "
            f"and by {probe.joined_gap:.2g} with nothing between them: {remedy}; --packing_strategy wrapped mixes "
            "documents by choice"
        )


@torch.no_grad()
def probe_packing(
    config: PreTrainedConfig, attention: str, device: torch.device, trust_remote_code: bool = False
) -> PackingProbe:
    """Return how far a pack's hidden states are from those of its documents alone.

    Raises NotProbed and PackedRowsFail. The run's random numbers stay as they are.
    """
    cuda_devices = []
    if device.type == "cuda":
        cuda_devices.append(device)
    with torch.random.fork_rng(cuda_devices):
        torch.manual_seed(0)
        documents = torch.randint(FIRST_ID, VOCABULARY, (2, DOCUMENT_LENGTH))
        probe = find_probe_model(config, attention, device, trust_remote_code, documents)
        joined_gap = largest_difference(probe.joined, probe.alone)
        if not joined_gap > MIN_JOINED_GAP:
            raise NotProbed("tokens of a random model of it do not see each other")
        try:
            packed = run_documents(probe.model, device, **pack_documents(documents))
        except Exception as error:
            raise PackedRowsFail(one_line(error).rstrip(".")) from error
        finally:
            if attention == "flex_attention":
                torch.compiler.reset()  # shapes compiled here would count towards the limit of the run
        gap = largest_difference(packed, probe.alone)
    return PackingProbe(gap, joined_gap, LEAK_SHARE[probe.dtype] * joined_gap)


def find_probe_model(
    config: PreTrainedConfig, attention: str, device: torch.device, trust_remote_code: bool, documents: Tensor
) -> ProbeModel:
    """Return the first small model that runs unpacked documents; raise NotProbed with the first reason otherwise.

    bfloat16 is for flash attention, which takes no float32; full widths are for models whose widths hang together in
    other ways than the usual ones.
    """
    reasons = []
    for narrow, dtype in product((True, False), LEAK_SHARE):
        try:
            small_config = shrink_config(config, narrow)
            model = build_probe_model(small_config, attention, device, dtype, trust_remote_code)
            alone = run_documents(model, device, input_ids=documents)
            joined = run_documents(model, device, input_ids=documents.view(1, -1))
        except Exception as error:  # a model's code may raise anything
            reasons.append(f"{type(error).__name__}: {one_line(error)}"[:200])
            continue
        return ProbeModel(model, dtype, alone, joined)
    raise NotProbed(reasons[0])


def pack_documents(documents: Tensor) -> dict[str, Tensor | int]:
    """Return the model's inputs for a pack of the documents, as TRL's collator makes them."""
    pack = {"input_ids": documents.flatten().tolist(), "seq_lengths": [DOCUMENT_LENGTH] * len(documents)}
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    inputs = collator([pack])
    del inputs["labels"]
    return inputs


def run_documents(model: nn.Module, device: torch.device, **inputs: Tensor | int) -> Tensor:
    """Return the last hidden states of two documents, (2, DOCUMENT_LENGTH, hidden size), in float32."""
    for name, value in inputs.items():
        if torch.is_tensor(value):
            inputs[name] = value.to(device)
    hidden_states = model(**inputs, use_cache=False).last_hidden_state
    return hidden_states.float().view(2, DOCUMENT_LENGTH, -1)


def largest_difference(left: Tensor, right: Tensor) -> float:
    return (left - right).abs().max().item()


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


# -- the small model --------------------------------------------------------------------------------------------------
def shrink_config(config: PreTrainedConfig, narrow: bool) -> PreTrainedConfig:
    """Return a copy of the config that costs next to nothing and takes the same paths through the model's code.

    Kept are as many first layers as show every kind of layer, at least two; head_dim; query heads to a key head; with
    narrow=False also the widths of the attention.
    """
    config = copy.deepcopy(config)
    text_config = config.get_text_config()
    changes = shorten_layers(text_config)
    for name, value in SMALL_VALUES.items():
        if read_field(text_config, name):
            changes[name] = value
    if read_field(text_config, "pad_token_id") is not None:
        changes["pad_token_id"] = 0
    if narrow:
        changes |= narrow_attention(text_config)
    for name, value in changes.items():
        setattr(text_config, name, value)
    shrink_towers(config, text_config)
    return config


def read_field(config: PreTrainedConfig, name: str) -> object:
    try:
        return getattr(config, name, None)
    except Exception:  # some configs refuse to name what differs between layers
        return None


def shorten_layers(text_config: PreTrainedConfig) -> dict[str, object]:
    """Return num_hidden_layers and the lists with an entry a layer, cut to the layers that show every kind."""
    depth = text_config.num_hidden_layers
    layer_lists = {}
    for name in [*vars(text_config), *LAYER_LISTS]:
        value = read_field(text_config, name)
        if isinstance(value, list | tuple) and len(value) == depth:
            layer_lists[name] = value
    kinds = []
    for layer in range(depth):
        kinds.append(str([values[layer] for values in layer_lists.values()]))
    last_new_kind = max(kinds.index(kind) for kind in kinds)
    layers = min(depth, max(2, last_new_kind + 1))
    changes: dict[str, object] = {"num_hidden_layers": layers}
    for name, values in layer_lists.items():
        if name in vars(text_config):
            changes[name] = values[:layers]
    return changes


def narrow_attention(text_config: PreTrainedConfig) -> dict[str, object]:
    """Return the widths of an attention with one key head and the query heads that share it."""
    heads = read_field(text_config, "num_attention_heads")
    if not heads:
        return {}
    key_heads = read_field(text_config, "num_key_value_heads")
    heads_per_key = heads // (key_heads or heads)
    changes = {
        "num_attention_heads": heads_per_key,
        "hidden_size": text_config.hidden_size * heads_per_key // heads,
    }
    if key_heads:
        changes["num_key_value_heads"] = 1
    return changes


def shrink_towers(config: PreTrainedConfig, text_config: PreTrainedConfig) -> None:
    """Leave one layer to each part of the model that is not its text model."""
    for part_name in config.sub_configs:
        part = getattr(config, part_name, None)
        if part is None or part is text_config:
            continue
        for name in TOWER_DEPTHS:
            if name in vars(part):
                setattr(part, name, 1)


def build_probe_model(
    config: PreTrainedConfig, attention: str, device: torch.device, dtype: torch.dtype, trust_remote_code: bool
) -> nn.Module:
    """Return the model without its head (TRL's fused loss runs just that), with weights in which a leak shows.

    Raises ValueError where even this model is large.
    """
    config._attn_implementation = attention
    make_model = choose_constructor(config, trust_remote_code)
    with torch.device("meta"):
        parameters = sum(weight.numel() for weight in make_model(config).parameters())
    if parameters > MAX_PARAMETERS:
        size = parameters / 1e9
        raise ValueError(f"even the smallest model that shows its kinds of layers has {size:.1f}B parameters")
    model = make_model(config).to(device, dtype).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)  # 1 / sqrt(inputs)
    return model.base_model


def choose_constructor(config: PreTrainedConfig, trust_remote_code: bool) -> Callable[[PreTrainedConfig], nn.Module]:
    """Return the model's class, where there is one: AutoModel's from_config would shard it under ZeRO-3."""
    model_class = find_model_class(config)
    if model_class is not None:
        return model_class
    return partial(AutoModelForCausalLM.from_config, trust_remote_code=trust_remote_code)
