"""How much of a model its adapters reach, and how much of what is frozen is in 4 bits."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

LISTED_NAMES = 4  # of weights without an adapter


@dataclass
class Coverage:
    """Numbers of weights in the matrices of the decoder, embeddings and head apart."""

    total: int = 0
    adapted: int = 0
    frozen: int = 0
    frozen_4bit: int = 0
    # without the layer's number: "mlp.experts.down_proj"
    names_without_adapter: list[str] = field(default_factory=list)

    @property
    def adapted_share(self) -> float:
        return self.adapted / max(1, self.total)

    @property
    def frozen_4bit_share(self) -> float:
        return self.frozen_4bit / max(1, self.frozen)

    def describe(self) -> str:
        """Return both shares in a line, and which weights have no adapter."""
        line = (
            f"adapters on {self.adapted_share:.1%} of the decoder's weights, {self.frozen_4bit_share:.1%} of the "
            "frozen ones in 4 bits"
        )
        if not self.names_without_adapter:
            return line
        names = ", ".join(self.names_without_adapter[:LISTED_NAMES])
        if len(self.names_without_adapter) > LISTED_NAMES:
            names += ", …"
        return f"{line}; without an adapter: {names}"


def adapter_coverage(model: nn.Module) -> Coverage:
    """Return the coverage of a model, with adapters or without."""
    decoder = model.get_decoder()
    adapted_ids = {id(weight) for weight in adapted_weights(decoder)}
    left_out_ids = {id(weight) for weight in [*adapter_parameters(decoder), *embedding_weights(model)]}
    coverage = Coverage()
    for name, weight in decoder.named_parameters():
        shape = unpacked_shape(weight)
        if id(weight) in left_out_ids or len(shape) < 2:
            continue
        size = prod(shape)
        coverage.total += size
        if id(weight) in adapted_ids:
            coverage.adapted += size
        elif short_name(name) not in coverage.names_without_adapter:
            coverage.names_without_adapter.append(short_name(name))
        if not weight.requires_grad:
            coverage.frozen += size
            coverage.frozen_4bit += size * is_4bit(weight)
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


def embedding_weights(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the weights of the embeddings and of the head."""
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None:
            yield from module.parameters()


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
    parts = [part for part in name.split(".") if part not in ("base_layer", "layers", "weight")]
    return ".".join(part for part in parts if not part.isdigit())
