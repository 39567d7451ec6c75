"""How much of a model its adapters reach, how much of what is frozen is in 4 bits, and what to pass for more.

Both are counted over the matrices of the decoder, embeddings and head apart, on the model that will be trained.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedConfig
from trl import ModelConfig, SFTConfig, get_peft_config

from ..messages import UsageError, say
from .allowed import ALLOWED, MIN_SHARE
from .packing import choose_constructor

if TYPE_CHECKING:
    from ..trainer import SFTTrainer

LISTED_KINDS = 4  # of weights without an adapter, or not in 4 bits
ALL_LINEAR = "all-linear"

# PEFT refuses these layers of these model types, and with them all-linear: the fused kernel of a Mamba layer takes
# out_proj's weight as it is, without the adapter.
MAMBA_TYPES = ("nemotron_h",)
REFUSED_OF_MAMBA = ("out_proj", "conv1d")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


# -- what there is ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Matrix:
    """A matrix of the decoder, or a stack of them as experts are."""

    kind: str  # its name without the layer's number: "mlp.experts.down_proj"
    size: int  # weights that it stands for
    stored_bytes: int
    reached: bool  # it has an adapter, or is trained as a whole
    frozen: bool
    in_4bit: bool


@dataclass
class Coverage:
    """The matrices of a decoder, and shares of their weights."""

    matrices: list[Matrix] = field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(matrix.size for matrix in self.matrices)

    @property
    def reached(self) -> int:
        return sum(matrix.size for matrix in self.matrices if matrix.reached)

    @property
    def frozen(self) -> int:
        return sum(matrix.size for matrix in self.matrices if matrix.frozen)

    @property
    def in_4bit(self) -> int:
        return sum(matrix.size for matrix in self.matrices if matrix.frozen and matrix.in_4bit)

    @property
    def reached_share(self) -> float:
        return share(self.reached, self.total)

    @property
    def share_in_4bit(self) -> float:
        """The share of the frozen weights that are in 4 bits."""
        return share(self.in_4bit, self.frozen)

    def not_reached(self) -> list[Matrix]:
        return [matrix for matrix in self.matrices if not matrix.reached]

    def not_in_4bit(self) -> list[Matrix]:
        return [matrix for matrix in self.matrices if matrix.frozen and not matrix.in_4bit]

    def describe(self) -> str:
        """Return the shares in a line, and which weights have no adapter."""
        line = f"adapters on {self.reached_share:.1%} of the decoder's weights"
        if self.in_4bit:
            line += f", {self.share_in_4bit:.1%} of the frozen ones in 4 bits"
        if self.not_reached():
            line += f"; without an adapter: {list_kinds(self.not_reached(), self.total)}"
        return line


def share(part: int, whole: int) -> float:
    """Return part / whole; the whole of nothing is reached."""
    if whole == 0:
        return 1.0
    return part / whole


def list_kinds(matrices: list[Matrix], total: int) -> str:
    """Return the kinds of matrices with their shares of `total` weights, the largest first."""
    sizes: dict[str, int] = {}
    for matrix in matrices:
        sizes[matrix.kind] = sizes.get(matrix.kind, 0) + matrix.size
    kinds = sorted(sizes, key=lambda kind: -sizes[kind])
    names = ", ".join(f"{kind} ({sizes[kind] / total:.1%})" for kind in kinds[:LISTED_KINDS])
    if len(kinds) > LISTED_KINDS:
        names += ", …"
    return names


def adapter_coverage(model: nn.Module) -> Coverage:
    """Return the coverage of a model, with adapters or without."""
    decoder = model.get_decoder()
    adapted_ids = {id(weight) for weight in adapted_weights(decoder)}
    left_out_ids = {id(weight) for weight in [*adapter_parameters(decoder), *embedding_weights(model)]}
    left_out_ids |= {id(weight) for weight in replaced_weights(decoder)}
    coverage = Coverage()
    for name, weight in decoder.named_parameters():
        shape = unpacked_shape(weight)
        if id(weight) in left_out_ids or len(shape) < 2 or name.endswith("bias"):  # of experts, a row an expert
            continue
        matrix = Matrix(
            kind=short_name(name),
            size=prod(shape),
            stored_bytes=prod(shape) * weight.element_size(),
            reached=id(weight) in adapted_ids or weight.requires_grad,
            frozen=not weight.requires_grad,
            in_4bit=is_4bit(weight),
        )
        coverage.matrices.append(matrix)
    return coverage


def adapter_layers(decoder: nn.Module) -> Iterator[BaseTunerLayer]:
    for module in decoder.modules():
        if isinstance(module, BaseTunerLayer):
            yield module


def adapted_weights(decoder: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the weights that have an adapter: of layers, or single parameters as those of experts."""
    for layer in adapter_layers(decoder):
        if hasattr(layer, "get_param"):  # PEFT's ParamWrapper
            yield layer.get_param()
        else:
            yield layer.get_base_layer().weight


def adapter_parameters(decoder: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters of the adapters themselves."""
    for layer in adapter_layers(decoder):
        for name in layer.adapter_layer_names:
            part = getattr(layer, name)
            yield from part.parameters()


def replaced_weights(decoder: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the weights that stand aside while copies of them are trained as a whole (modules_to_save)."""
    for module in decoder.modules():
        if isinstance(module, ModulesToSaveWrapper):
            yield from module.original_module.parameters()


def embedding_weights(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the weights of all embeddings, those that a layer has of its own too, and of the head."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            yield from module.parameters()
    head = model.get_output_embeddings()
    if head is not None:
        yield from head.parameters()


def unpacked_shape(weight: nn.Parameter) -> tuple[int, ...]:
    """Return the shape that a weight stands for: bitsandbytes packs two 4-bit weights in a byte, ZeRO-3 shards."""
    quant_state = getattr(weight, "quant_state", None)
    if quant_state is not None:
        return tuple(quant_state.shape)
    return tuple(getattr(weight, "ds_shape", weight.shape))


def is_4bit(weight: nn.Parameter) -> bool:
    return type(weight).__name__ == "Params4bit"


def short_name(name: str) -> str:
    """Return a weight's name without its layer's number and without what PEFT puts between."""
    left_out = ("base_layer", "modules_to_save", "default", "layers", "weight")
    parts = [part for part in name.split(".") if part not in left_out]
    return ".".join(part for part in parts if not part.isdigit())


# -- what would reach more --------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Suggestion:
    """Flags for adapters on as much as PEFT takes, and the share of the decoder's weights that they reach."""

    flags: str
    reached_share: float

    def describe(self) -> str:
        """Return what to pass where that is on less than MIN_SHARE."""
        return (
            f"{self.flags}, which is on {self.reached_share:.1%} of the decoder's weights, with --allow low_coverage "
            f"({ALLOWED['low_coverage']})"
        )


def suggest_adapters(
    make_model: Callable[[PreTrainedConfig], nn.Module], config: PreTrainedConfig, model_args: ModelConfig
) -> Suggestion | None:
    """Try the widest adapters on an empty model of this config; return None where PEFT does not take them.

    The model has shapes and no weights (meta device), so that it costs seconds for any size.
    """
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PEFT, about its own settings for experts
            model = make_model(copy.deepcopy(config))
            modules = ALL_LINEAR
            if config.model_type in MAMBA_TYPES:
                modules = names_beside_mamba(model.get_decoder())
            parameters = expert_parameters(model.get_decoder())
            adapters = LoraConfig(
                r=1, target_modules=modules, target_parameters=parameters or None, task_type=model_args.lora_task_type
            )
            coverage = adapter_coverage(get_peft_model(model, adapters))
    except Exception:  # a model's own code may raise anything
        return None
    return Suggestion(describe_flags(modules, parameters, model_args), coverage.reached_share)


def names_beside_mamba(decoder: nn.Module) -> list[str]:
    """Return the names of all linear layers that PEFT takes where all-linear would include those that it refuses."""
    names = []
    for module_name, module in decoder.named_modules():
        name = module_name.split(".")[-1]
        if isinstance(module, nn.Linear) and name not in REFUSED_OF_MAMBA:
            names.append(name)
    return list(dict.fromkeys(names))


def describe_flags(modules: str | list[str], parameters: list[str], model_args: ModelConfig) -> str:
    if isinstance(modules, list):
        modules = " ".join(modules)
    flags = f"--lora_target_modules {modules}"
    if parameters:
        flags += f" --lora_target_parameters {' '.join(parameters)} --lora_dropout 0"
        if model_args.use_dora:
            flags += " --use_dora false"
    return flags


def expert_parameters(decoder: nn.Module) -> list[str]:
    """Return the names that PEFT's target_parameters takes for the stacked weights of experts."""
    names = []
    for module_name, module in decoder.named_modules():
        if isinstance(module, CONVOLUTIONS):
            continue
        for name, weight in module.named_parameters(recurse=False):
            if weight.dim() == 3:
                names.append(name_in_layer(f"{module_name}.{name}"))
    return list(dict.fromkeys(names))


def name_in_layer(name: str) -> str:
    """Return what a parameter is called within its layer: what stands behind the last number."""
    parts: list[str] = []
    for part in name.split("."):
        parts.append(part)
        if part.isdigit():
            parts.clear()
    return ".".join(parts)


# -- before the model is loaded ---------------------------------------------------------------------------------------
def check_adapter_settings(config: PreTrainedConfig, training_args: SFTConfig, model_args: ModelConfig) -> None:
    """Raise UsageError for adapters that PEFT refuses; it would say so once the model is loaded."""
    if not model_args.use_peft:
        return
    check_mamba_layers(config, training_args, model_args)
    check_adapters_on_experts(config, model_args)


def check_mamba_layers(config: PreTrainedConfig, training_args: SFTConfig, model_args: ModelConfig) -> None:
    if config.model_type not in MAMBA_TYPES or not model_args.lora_target_modules:
        return
    targets = model_args.lora_target_modules
    if isinstance(targets, str):
        targets = [targets]
    refused = []
    for target in targets:
        if target.lower() == ALL_LINEAR or target.split(".")[-1] in REFUSED_OF_MAMBA:
            refused.append(target)
    if not refused:
        return
    make_model = choose_constructor(config, training_args.trust_remote_code)
    suggestion = suggest_adapters(make_model, config, model_args)
    remedy = "the names of its other linear layers"
    if suggestion is not None:
        remedy = suggestion.flags
        if suggestion.reached_share < MIN_SHARE:
            remedy = suggestion.describe()
    raise UsageError(
        f"--lora_target_modules {' '.join(refused)}: PEFT puts no adapter on {' and '.join(REFUSED_OF_MAMBA)} of "
        f"{config.model_type}: pass {remedy}"
    )


def check_adapters_on_experts(config: PreTrainedConfig, model_args: ModelConfig) -> None:
    """Raise UsageError for dropout or DoRA on single parameters, which PEFT has not.

    Names of experts' layers as transformers 4 had them (gate_proj) are names of such parameters too.
    """
    adapters = get_peft_config(model_args)
    stand_in = nn.Module()  # PEFT reads its config, and the names of its layers, which make no difference here
    stand_in.config = config
    try:
        convert_peft_config_for_transformers(adapters, stand_in, None)
    except ValueError as error:
        raise UsageError(f"--lora_target_modules: {str(error).rstrip('.')}") from None
    if not adapters.target_parameters:
        return
    remedies = []
    if model_args.lora_dropout:
        remedies.append("--lora_dropout 0")
    if model_args.use_dora:
        remedies.append("--use_dora false")
    if remedies:
        parameters = ", ".join(sorted(adapters.target_parameters))
        raise UsageError(
            f"adapters on the experts of {config.model_type} ({parameters}) have neither dropout nor DoRA in PEFT: "
            f"pass {' '.join(remedies)}"
        )


# -- before the first step --------------------------------------------------------------------------------------------
def check_adapter_coverage(trainer: "SFTTrainer", model_args: ModelConfig, allow: list[str]) -> None:
    """Say how much the adapters reach; raise UsageError where that, or what is in 4 bits, is less than MIN_SHARE."""
    if not isinstance(trainer.model, PeftModel):
        return
    coverage = adapter_coverage(trainer.model)
    faults = []
    if coverage.reached_share < MIN_SHARE and "low_coverage" not in allow:
        faults.append(explain_low_coverage(coverage, trainer.model.get_base_model(), model_args))
    not_quantized = model_args.load_in_4bit and coverage.share_in_4bit < MIN_SHARE
    if not_quantized and "unquantized_weights" not in allow:
        faults.append(explain_unquantized_weights(coverage))
    if faults:
        raise UsageError("; ".join(faults))
    say(coverage.describe())


def explain_low_coverage(coverage: Coverage, base_model: nn.Module, model_args: ModelConfig) -> str:
    missing = list_kinds(coverage.not_reached(), coverage.total)
    fault = f"adapters on only {coverage.reached_share:.1%} of the decoder's weights, none on {missing}"
    allowed = f"--allow low_coverage ({ALLOWED['low_coverage']})"
    suggestion = suggest_adapters(type(base_model), base_model.config, model_args)
    if suggestion is None:
        return f"{fault}: pass other --lora_target_modules or --lora_target_parameters, or {allowed}"
    if suggestion.reached_share <= coverage.reached_share:
        return f"{fault}: PEFT takes no more of this model: {allowed}"
    if suggestion.reached_share < MIN_SHARE:
        return f"{fault}: the widest that PEFT takes here is {suggestion.describe()}"
    return f"{fault}: {suggestion.flags} puts them on {suggestion.reached_share:.1%}, or {allowed}"


def explain_unquantized_weights(coverage: Coverage) -> str:
    matrices = coverage.not_in_4bit()
    gigabytes = sum(matrix.stored_bytes for matrix in matrices) / 1e9
    return (
        f"--load_in_4bit true leaves {gigabytes:.3g} GB as they are, and only {coverage.share_in_4bit:.1%} of the "
        f"frozen weights are in 4 bits, without {list_kinds(matrices, coverage.frozen)}: bitsandbytes packs linear "
        "layers and no experts (bitsandbytes#1849): --load_in_4bit false where that fits, a dense model as "
        f"--model_name_or_path, or --allow unquantized_weights ({ALLOWED['unquantized_weights']})"
    )
