"""Stand-ins for what runs only on CUDA, each with the allocations, FLOPs and bytes of what it stands for.

Fake CUDA tensors abort a CPU build of torch, so a model is traced with fake CPU tensors, and these are put in the place
of the kernels that a CPU does not take. Each tells the meter its work, because empty tensors cost nothing.
"""

import contextlib
import inspect
import math
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch.autograd.function import FunctionCtx
from transformers import AttentionInterface, PreTrainedModel
from trl.kernels import chunked_logprob

if TYPE_CHECKING:
    from .gpu_meter import Meter

ATTENTION = "traced_attention"
LIGER_PROGRAMS = 128  # of its norm's backward, each with a gradient of its own: the multiprocessors of a large card
SDPA = "sdpa"
FLASH = ("flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2", "kernels-community/flash-attn3")
BACKWARD_WORK = 2.5  # five matrix products in the backward of flash attention, two in its forward


# -- layers of few bits -----------------------------------------------------------------------------------------------
class FourBitProduct(torch.autograd.Function):
    """bitsandbytes.autograd.MatMul4Bit on CUDA for more than 1,536 tokens: weights are made whole in each direction.

    For fewer tokens one kernel does it without, so this is an upper bound there.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, layer: "TracedLinear4bit") -> torch.Tensor:
        ctx.layer = layer
        whole = layer.dequantise(x.dtype)
        return F.linear(x, whole)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        whole = ctx.layer.dequantise(grad.dtype)
        return torch.matmul(grad, whole), None


class TracedLinear4bit(Linear4bit):
    """A layer of 4 bits a weight, 8 (nested) or 32 for each 64 of them, nested 32 more for each 64 x 256."""

    def __init__(self, linear: torch.nn.Linear, dtype: torch.dtype, is_nested: bool, meter: "Meter") -> None:
        torch.nn.Module.__init__(self)
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.compute_dtype = dtype
        self.meter = meter
        size = linear.weight.numel()
        packed = torch.empty((size // 2, 1), dtype=torch.uint8)
        self.weight = torch.nn.Parameter(packed, requires_grad=False)
        self.weight.compress_statistics = is_nested
        self.weight.quant_type = "nf4"
        self.bias = linear.bias
        blocks = math.ceil(size / 64)
        self.absmax = torch.empty(blocks, dtype=torch.uint8 if is_nested else torch.float32)
        self.nested_absmax = torch.empty(math.ceil(blocks / 256)) if is_nested else None
        self.codes = torch.empty(16 + 256 * is_nested)

    def dequantise(self, dtype: torch.dtype) -> torch.Tensor:
        constants = self.absmax
        if self.nested_absmax is not None:
            constants = torch.empty(self.absmax.numel()) + 0.0  # as fp32, and once more with the offset
        whole = torch.empty((self.out_features, self.in_features), dtype=dtype)
        self.meter.add_work(moved=self.weight.nbytes + constants.nbytes, dequantised=True)
        self.meter.add_work(moved=whole.nbytes, dequantised=True, kernels=1)
        return whole

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return FourBitProduct.apply(x.to(self.compute_dtype), self).to(x.dtype)


class EightBitProduct(torch.autograd.Function):
    """bitsandbytes.autograd.MatMul8bitLt: int8 inputs and an int32 product, the weight made whole for the backward."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, layer: "TracedLinear8bit") -> torch.Tensor:
        ctx.layer = layer
        ctx.kept = x  # as bitsandbytes does, though it needs it for outliers alone
        half = x.to(torch.float16)
        quantised = torch.empty(x.shape, dtype=torch.int8)
        del half
        product = torch.empty((*x.shape[:-1], layer.out_features), dtype=torch.int32)
        layer.meter.add_work(
            flops=2 * x.numel() * layer.out_features, moved=quantised.nbytes + product.nbytes, kernels=2
        )
        return torch.empty(product.shape, dtype=torch.float16).to(x.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        layer = ctx.layer
        whole = torch.empty((layer.out_features, layer.in_features), dtype=grad.dtype)
        layer.meter.add_work(moved=3 * whole.nbytes, dequantised=True, kernels=2)
        return torch.matmul(grad, whole), None


class TracedLinear8bit(Linear8bitLt):
    """A layer of 8 bits a weight and 32 for each row."""

    def __init__(self, linear: torch.nn.Linear, dtype: torch.dtype, meter: "Meter") -> None:
        torch.nn.Module.__init__(self)
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.meter = meter
        self.state = types.SimpleNamespace(has_fp16_weights=False, threshold=0.0)
        self.index = None
        weight = torch.empty(linear.weight.shape, dtype=torch.int8)
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.bias = linear.bias
        self.scales = torch.empty(self.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = x.dtype
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
        return EightBitProduct.apply(x.to(dtype), self)


# -- attention --------------------------------------------------------------------------------------------------------
@dataclass
class AttentionShape:
    """How attention is computed. context: tokens that a token attends to, the masked half of a causal one included."""

    kind: str
    context: float
    meter: "Meter"
    mask: torch.Tensor | None = field(default=None)  # dense, of sdpa over packs or padded rows


class Attention(torch.autograd.Function):
    """FlashAttention, flex or sdpa's efficient kernel: q, k, v, output and log-sum-exp are kept.

    FlashAttention accumulates dq in fp32 and expands dk and dv over the query heads (flash_api.cpp, mha_varlen_bwd);
    sdpa with a dense mask expands k and v before, and makes its mask a bias of the input's dtype.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, shape: AttentionShape
    ) -> torch.Tensor:
        output = torch.empty_like(query)
        log_sum_exp = torch.empty(query.shape[:3])
        saved = [query, key, value, output, log_sum_exp]
        if shape.mask is not None:
            saved.append(torch.empty(shape.mask.shape, dtype=query.dtype))
        ctx.save_for_backward(*saved)
        ctx.shape = shape
        shape.meter.add_work(flops=2 * query.numel() * shape.context, moved=3 * query.nbytes, kernels=1)
        return output

    @staticmethod
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value, _, log_sum_exp, *_ = ctx.saved_tensors
        delta = torch.empty_like(log_sum_exp)
        grads = [torch.empty_like(tensor) for tensor in (query, key, value)]
        if ctx.shape.kind in FLASH:
            accumulated = torch.empty(query.shape, dtype=torch.float32)
            expanded = [torch.empty_like(query), torch.empty_like(query)]
            del accumulated, expanded
        flops = 2 * BACKWARD_WORK * query.numel() * ctx.shape.context
        ctx.shape.meter.add_work(flops=flops, moved=6 * query.nbytes + delta.nbytes, kernels=2)
        return *grads, None


def register_attention(shape: AttentionShape) -> None:
    """Make ATTENTION the name of an attention of this shape, for models that are built with it."""

    def attend(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, None]:
        dtype = query.dtype
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
        if shape.kind == SDPA:  # enable_gqa is not for masks: repeat_kv copies
            repeats = query.shape[1] // key.shape[1]
            key = key.repeat_interleave(repeats, dim=1)
            value = value.repeat_interleave(repeats, dim=1)
        query, key, value = (tensor.transpose(1, 2).to(dtype).contiguous() for tensor in (query, key, value))
        return Attention.apply(query, key, value, shape), None

    AttentionInterface.register(ATTENTION, attend)


# -- Liger ------------------------------------------------------------------------------------------------------------
class LigerNorm(torch.autograd.Function):
    """liger_kernel.ops.rms_norm: keeps its input and a float a row, writes the gradient over the incoming one."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, weight: torch.Tensor, meter: "Meter") -> torch.Tensor:
        ctx.save_for_backward(x, weight, torch.empty(x.shape[:-1]))
        ctx.meter = meter
        meter.add_work(moved=2 * x.nbytes, kernels=1)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        _, weight, _ = ctx.saved_tensors
        partial = torch.empty(LIGER_PROGRAMS, weight.numel())
        ctx.meter.add_work(moved=3 * grad.nbytes, kernels=1)
        grad_weight = partial.sum(0).to(weight.dtype)
        if not weight.requires_grad:
            grad_weight = None
        return grad, grad_weight, None


class LigerGatedUnit(torch.autograd.Function):
    """liger_kernel.ops.swiglu: keeps gate and up, writes their gradients over them."""

    @staticmethod
    def forward(ctx: FunctionCtx, gate: torch.Tensor, up: torch.Tensor, meter: "Meter") -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.meter = meter
        meter.add_work(moved=3 * gate.nbytes, kernels=1)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        ctx.meter.add_work(moved=5 * gate.nbytes, kernels=1)
        return gate, up, None


class LigerRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, query: torch.Tensor, key: torch.Tensor, meter: "Meter"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.meter = meter
        meter.add_work(moved=2 * (query.nbytes + key.nbytes), kernels=1)
        return torch.empty_like(query).contiguous(), torch.empty_like(key).contiguous()

    @staticmethod
    def backward(
        ctx: FunctionCtx, grad_query: torch.Tensor, grad_key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        ctx.meter.add_work(moved=2 * (grad_query.nbytes + grad_key.nbytes), kernels=1)
        return grad_query, grad_key, None


def put_liger_in(model: PreTrainedModel, meter: "Meter") -> None:
    """Give a model's norms and gated units the allocations of Liger's."""

    def norm(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return LigerNorm.apply(x, module.weight, meter)

    def gated_unit(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return module.down_proj(LigerGatedUnit.apply(module.gate_proj(x), module.up_proj(x), meter))

    for module in model.modules():
        name = type(module).__name__
        if name.endswith("RMSNorm") and getattr(module, "weight", None) is not None:
            module.forward = types.MethodType(norm, module)
        elif name.endswith("MLP") and all(hasattr(module, part) for part in ("gate_proj", "up_proj", "down_proj")):
            module.forward = types.MethodType(gated_unit, module)


# -- what is another function on CUDA ---------------------------------------------------------------------------------
def skip_tile(*_: object, **__: object) -> None:
    """Stand for TRL's Triton kernels, which read and write the tile of logits in place."""


def counted_product(meter: "Meter") -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]:
    """Return a stand-in of TRL's product with an fp32 sum: on CUDA it allocates nothing."""

    def add_product(_sum: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        meter.add_work(flops=2 * a.shape[0] * a.shape[1] * b.shape[1], kernels=1)

    return add_product


def turns_queries_and_keys(modeling: types.ModuleType) -> bool:
    """Return whether a family's rotary function is the one that Liger replaces: Gemma 4's turns one tensor."""
    function = getattr(modeling, "apply_rotary_pos_emb", None)
    if function is None:
        return False
    return list(inspect.signature(function).parameters)[:2] == ["q", "k"]


@contextlib.contextmanager
def cuda_functions(model_class: type, uses_liger: bool, meter: "Meter") -> Iterator[None]:
    """Put in place what is another function on CUDA than on a CPU, for the time of a trace."""
    is_autocast_enabled = torch.is_autocast_enabled

    def asks_the_cpu(_device: str = "cpu") -> bool:
        return is_autocast_enabled("cpu")  # PEFT asks without a device, which means CUDA

    def rope(query: torch.Tensor, key: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor, ...]:
        return LigerRope.apply(query, key, meter)

    replaced = [
        (chunked_logprob, "_forward_tile", skip_tile),
        (chunked_logprob, "_backward_tile", skip_tile),
        (chunked_logprob, "_addmm_fp32", counted_product(meter)),
        (torch, "is_autocast_enabled", asks_the_cpu),
    ]
    modeling = sys.modules[model_class.__module__]
    if uses_liger and turns_queries_and_keys(modeling):
        replaced.append((modeling, "apply_rotary_pos_emb", rope))
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    for owner, name, replacement in replaced:
        setattr(owner, name, replacement)
    try:
        yield
    finally:
        for owner, name, value in kept:
            setattr(owner, name, value)
