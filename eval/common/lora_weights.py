"""Merge the weights of a LoRA adapter into those of its base, one at a time. eval/merge.py says what is followed.

Names of weights are those of the base's safetensors; a module is such a name without ".weight". Where a base ties its
embeddings, a *copy* is the second name of one weight, as `lm_head.weight` is of `model.embed_tokens.weight`.
"""

import json
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

from data_prep.common.errors import UsageError
from eval.common.arguments import first_line

FOLLOWED = {  # fields of adapter_config.json whose every value is followed, or changes no weight
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
}
FOLLOWED_VALUES = {  # fields of which these values are followed: they leave the base's own weights untouched
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
PARTS = {  # how the keys of an adapter's file end: the part of a module's change
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "size",
    "lora_magnitude_vector.weight": "size",
    "weight": "whole",
    "base_layer.weight": "whole",
}
LAYER_TYPES = (torch.nn.Linear, Conv1D, torch.nn.Embedding)
TRANSPOSED_TYPES = (Conv1D, torch.nn.Embedding)  # stored as (in, out)
USE_PEFT = "which cannot be merged here: use PEFT's merge_and_unload"


class StoredTensor(NamedTuple):
    file: Path
    key: str

    def read(self) -> torch.Tensor:
        # opened for each, or all pages read so far would stay in memory
        with safe_open(self.file, "pt") as opened:
            return opened.get_tensor(self.key)


@dataclass
class Adapter:
    """A LoRA adapter. modules: of each that it changes the parts of its change (the values of PARTS)."""

    folder: Path
    config: dict
    modules: dict[str, dict[str, StoredTensor]]

    @property
    def keeps_ties(self) -> bool:
        """Whether what the base ties was trained as one weight."""
        return bool(self.config.get("ensure_weight_tying"))


@dataclass
class Base:
    """A base's safetensors.

    files: the file of each weight; model: without weights; layers: the type of each module; quantized: the modules that
    loading in 4 bits quantises; ties: the original of each copy; parted: the copies that its config ties, but whose
    stored weights differ: transformers loads them untied.
    """

    name: str
    folder: Path
    files: dict[str, Path]
    model: PreTrainedModel
    layers: dict[str, type]
    quantized: set[str]
    ties: dict[str, str]
    parted: list[str]

    def stored(self, weight: str) -> StoredTensor:
        """Return where a weight is stored, of a tied one under either name."""
        names = [weight, self.ties.get(weight)]
        names += [copy for copy, original in self.ties.items() if original == weight]
        for name in names:
            if name in self.files:
                return StoredTensor(self.files[name], name)
        raise KeyError(weight)


@dataclass
class Written:
    """How many modules were merged, replaced as a whole, taken through 4 bits.

    untied: the copies that stand apart from now on; the base's parted ones among them.
    """

    merged: int
    replaced: int
    dequantized: int
    untied: list[str] = field(default_factory=list)


# -- what is read -----------------------------------------------------------------------------------------------------
def read_adapter(folder: Path) -> Adapter:
    """Return the LoRA adapter of a folder. Raises UsageError where it has what is not followed here."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if config.get("peft_type") != "LORA":
        raise UsageError(f"{folder} is a {config.get('peft_type')} adapter: only LoRA can be merged here")
    for name, value in config.items():
        if value and name not in FOLLOWED and value not in FOLLOWED_VALUES.get(name, ()):
            raise UsageError(f"{folder} was trained with {name}={value!r}, {USE_PEFT}")
    path = folder / "adapter_model.safetensors"
    try:
        with safe_open(path, "pt") as file:
            keys = list(file.keys())
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} is not readable ({first_line(error)}): save the adapter again") from None
    modules = {}
    for key in keys:
        name = key.removeprefix("base_model.model.")
        end = find_ending(name)
        if end is None:
            raise UsageError(f"{path} holds {key}, {USE_PEFT}")
        module = name.removesuffix("." + end)
        modules.setdefault(module, {})[PARTS[end]] = StoredTensor(path, key)
    for module, parts in modules.items():
        if ("A" in parts) != ("B" in parts):
            raise UsageError(f"{path} lacks half of {module}: save the adapter whole")
    return Adapter(folder, config, modules)


def find_ending(name: str) -> str | None:
    """Return the longest of PARTS that a key ends with."""
    for end in sorted(PARTS, key=len, reverse=True):
        if name.endswith("." + end):
            return end
    return None


def read_base(name: str, four_bit: bool) -> Base:
    """Return the safetensors of a base, a folder or hub id; four_bit: name what loading in 4 bits quantises.

    Raises UsageError.
    """
    folder = find_base_folder(name)
    files = find_weight_files(name, folder)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    except (OSError, ValueError, KeyError) as error:
        sentence = f"{folder} is no causal language model of transformers ({first_line(error)}): pass --base"
        raise UsageError(sentence) from None
    layers = {module_name: type(module) for module_name, module in model.named_modules()}
    ties = {}
    parted = []
    for copy, original in model.all_tied_weights_keys.items():
        if stored_apart(files, copy, original):
            parted.append(copy)
        else:
            ties[copy] = original
    quantized = set()
    if four_bit:
        quantized = list_quantized(model)
    return Base(name, folder, files, model, layers, quantized, ties, parted)


def find_base_folder(name: str) -> Path:
    """Return the folder of a base, downloaded where it is none here. Raises UsageError."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # a name that is none, no hub, no such model: one type each
        sentence = f"the base {name} is neither a folder here nor a model that the hub gives now ({first_line(error)})"
        raise UsageError(f"{sentence}: pass --base with a local folder") from None


def find_weight_files(name: str, folder: Path) -> dict[str, Path]:
    """Return the file of each weight of a base. Raises UsageError where one is missing or quantised."""
    index = folder / "model.safetensors.index.json"
    named = {}
    files = {}
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if index.is_file():
            named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        paths = {folder / file_name for file_name in named.values()} or {folder / "model.safetensors"}
        for path in sorted(paths):
            with safe_open(path, "pt") as file:
                files.update(dict.fromkeys(file.keys(), path))
    except (OSError, SafetensorError, ValueError) as error:
        sentence = f"the base {name} has no whole set of safetensors ({first_line(error)})"
        raise UsageError(f"{sentence}: pass --base with another folder, or save it again") from None
    if config.get("quantization_config"):
        raise UsageError(f"the base {name} is stored quantised: pass --base with the model it was made from")
    missing = sorted(named.keys() - files.keys())
    if missing:
        raise UsageError(f"{name} lacks {len(missing)} weights, the first is {missing[0]}: save the model whole")
    return files


def stored_apart(files: dict[str, Path], copy: str, original: str) -> bool:
    """Return whether both names of a tied weight are stored, with different values."""
    if copy not in files or original not in files:
        return False
    return not torch.equal(StoredTensor(files[copy], copy).read(), StoredTensor(files[original], original).read())


def list_quantized(model: PreTrainedModel) -> set[str]:
    """Return the modules that loading in 4 bits quantises; the model's are replaced."""
    from bitsandbytes.nn import Linear4bit  # here, since it prints a line wherever it lacks a kernel

    quantizer = AutoHfQuantizer.from_config(BitsAndBytesConfig(load_in_4bit=True), pre_quantized=False)
    quantizer.preprocess_model(model, device_map=None)
    return {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def check_modules(adapter: Adapter, base: Base) -> None:
    """Raise UsageError for an adapter of another base, and for a base with missing weights."""
    for module, parts in adapter.modules.items():
        layer = base.layers.get(module)
        is_whole = parts.keys() == {"whole"}
        if layer is None or not (is_whole or issubclass(layer, LAYER_TYPES)):
            raise UsageError(f"the adapter changes {module}, which {base.name} has not: pass the base of its training")
        if "size" in parts and not issubclass(layer, torch.nn.Linear):
            raise UsageError(f"DoRA on {module}, which is not linear, {USE_PEFT}")
    known = set(base.files)
    for copy, original in base.ties.items():
        if copy in known or original in known:
            known |= {copy, original}
    wanted = {name for name, _ in base.model.named_parameters()}
    missing = sorted(wanted - known)
    if missing and not get_model_conversion_mapping(base.model, add_legacy=False):
        raise UsageError(f"{base.name} lacks {len(missing)} weights, the first is {missing[0]}: pass a whole model")
    renamed = sorted({f"{module}.weight" for module in adapter.modules} - known)
    if renamed:
        raise UsageError(f"{base.name} stores {renamed[0]} under another name, {USE_PEFT}")


# -- one weight -------------------------------------------------------------------------------------------------------
def scaling_of(config: dict, module: str, rank: int) -> float:
    """Return alpha / r, or alpha / sqrt(r) of rsLoRA (Kalajdzievski 2023), with PEFT's patterns."""
    from peft.utils.other import get_pattern_key  # here, since peft imports bitsandbytes

    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(patterns, module), config["lora_alpha"])
    if config.get("use_rslora"):
        return alpha / math.sqrt(rank)
    return alpha / rank


def through_4bit(weight: torch.Tensor, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Return what loading in 4 bits, as models.load_model does it, leaves of a weight."""
    import bitsandbytes as bnb

    packed = bnb.nn.Params4bit(weight.to(dtype), requires_grad=False, quant_type="nf4", compress_statistics=True)
    packed = packed.to(device)
    return bnb.functional.dequantize_4bit(packed.data, packed.quant_state)


@dataclass
class WeightMerger:
    """Makes the merged weight of a module. dequantize: start from what 4 bits leave, loaded with the compute dtype."""

    adapter: Adapter
    base: Base
    dequantize: bool
    dtype: torch.dtype
    device: str

    @torch.inference_mode()
    def merge(self, module: str, parts: dict[str, StoredTensor]) -> torch.Tensor:
        """Return a module's merged weight, in the type and on the device of the base's. Raises UsageError."""
        old = self.base.stored(f"{module}.weight").read()
        tensors = {part: place.read().to(self.device).float() for part, place in parts.items()}
        weight = tensors.get("whole", old).to(self.device)
        if weight.shape != old.shape:
            sentence = f"the adapter's {module} is {tuple(weight.shape)}, the base's {tuple(old.shape)}: pass its base"
            raise UsageError(sentence)
        is_transposed = issubclass(self.base.layers[module], TRANSPOSED_TYPES)
        if is_transposed:
            weight = weight.T
        if self.dequantize and module in self.base.quantized and "whole" not in tensors:
            weight = through_4bit(weight, self.dtype, self.device)
        weight = weight.float()
        if "A" in tensors:
            weight = self.add_change(module, weight, tensors)
        if is_transposed:
            weight = weight.T
        weight = weight.to(old.dtype).contiguous().to(old.device)
        if not torch.isfinite(weight).all():
            raise UsageError(f"the merged {module} is not finite in {old.dtype}: the adapter or its base is damaged")
        return weight

    def add_change(self, module: str, weight: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return a float32 weight (out, in) with its low-rank change. Raises UsageError where the shapes do not fit."""
        down = tensors["A"]
        up = tensors["B"]
        if (up.shape[0], down.shape[1]) != weight.shape or down.shape[0] != up.shape[1]:
            change = f"{tuple(up.shape)} x {tuple(down.shape)}"
            raise UsageError(
                f"the adapter's {module} is {change}, the base's weight {tuple(weight.shape)}: pass the base that it "
                "was trained on"
            )
        weight = weight + scaling_of(self.adapter.config, module, down.shape[0]) * (up @ down)
        if "size" in tensors:  # DoRA (Liu et al. 2024), equation 5: a length for each output
            lengths = torch.linalg.vector_norm(weight, dim=1)
            weight *= (tensors["size"].reshape(-1) / lengths)[:, None]
        return weight


def overwrite(path: Path, name: str, weight: torch.Tensor) -> None:
    """Put a weight over the one of that name, type and shape in a safetensors file."""
    with path.open("r+b") as file:
        header_size = int.from_bytes(file.read(8), "little")  # the format: 8 bytes of length, a JSON header, the data
        start, end = json.loads(file.read(header_size))[name]["data_offsets"]
        data = weight.reshape(-1).view(torch.uint8).numpy()
        assert len(data) == end - start, name
        file.seek(8 + header_size + start)
        file.write(data)


# -- all of them ------------------------------------------------------------------------------------------------------
def write_weights(merger: WeightMerger, out: Path) -> Written:
    """Write the base's shards to a folder, with the merged weights in their places, untied copies in one more."""
    adapter = merger.adapter
    base = merger.base
    changes = dict(adapter.modules)
    originals = {}  # the weight that a copy is, where they stay one
    if adapter.keeps_ties:
        originals = base.ties
        for copy, original in base.ties.items():
            change = changes.pop(copy.removesuffix(".weight"), None)
            if change is not None:
                changes.setdefault(original.removesuffix(".weight"), change)
    touched = {f"{module}.weight" for module in changes}
    untied = list(base.parted)
    extra = []
    for copy, original in base.ties.items():
        if copy not in originals and touched & {copy, original}:
            untied.append(copy)
            extra += [name for name in (copy, original) if name not in base.files]
    dequantized = set()
    if merger.dequantize:
        dequantized = base.quantized
        touched |= {f"{module}.weight" for module in dequantized}

    def merge(weight: str) -> torch.Tensor:
        module = weight.removesuffix(".weight")
        return merger.merge(module, changes.get(module, {}))

    shards = sorted(set(base.files.values()))
    names = name_shards(len(shards) + bool(extra))
    places = {}
    for shard, name in zip(shards, names, strict=False):
        shutil.copyfile(shard, out / name)
        for weight, file in base.files.items():
            if file != shard:
                continue
            places[weight] = name
            original = originals.get(weight, weight)
            if original in touched:
                overwrite(out / name, weight, merge(original))
    if extra:
        save_file({weight: merge(weight) for weight in extra}, out / names[-1], metadata={"format": "pt"})
        places.update(dict.fromkeys(extra, names[-1]))
    if len(names) > 1:
        write_index(out, names, places)
    merged = [module for module, parts in changes.items() if "A" in parts]
    return Written(len(merged), len(changes) - len(merged), len(dequantized), untied)


def name_shards(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def write_index(out: Path, names: list[str], places: dict[str, str]) -> None:
    """Write the index of several shards; places: the shard of each weight."""
    size = sum((out / name).stat().st_size for name in names)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
