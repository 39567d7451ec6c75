"""PyTorch in the place of what only CUDA runs: flash-attn's functions, flex attention's kernel, Dynamo's compiler.

Each `use_…` patches a library through pytest's monkeypatch, so that a recipe takes the path that it takes on a GPU.
"""

import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch
import transformers.masking_utils
import transformers.modeling_flash_attention_utils as flash_utils
import transformers.modeling_utils
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch.nn.attention import flex_attention as torch_flex
from transformers.integrations import flex_attention as transformers_flex

HALF = (torch.float16, torch.bfloat16)
LOADED_BY_TRANSFORMERS = (  # what transformers keeps of a flash attention that it has imported
    "_loaded_implementation",
    "_flash_fn",
    "_flash_varlen_fn",
    "_flash_with_kvcache_fn",
    "_pad_fn",
    "_unpad_fn",
    "_process_flash_kwargs_fn",
    "_process_with_kvcache_kwargs_fn",
)


# -- flash-attn -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class VarlenCall:
    """What one call of flash_attn_varlen_func got."""

    boundaries: list[int]  # cu_seqlens_q
    longest: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class FlashAttention:
    """flash-attn 2's two functions by their documented contract, in PyTorch; keeps what it was called with.

    `only_half`: refuse float32, as the kernels do.
    """

    def __init__(self, only_half: bool) -> None:
        self.only_half = only_half
        self.varlen_calls: list[VarlenCall] = []
        self.dense_calls = 0

    def check(self, q: torch.Tensor, dropout_p: float, softcap: float) -> None:
        if self.only_half and q.dtype not in HALF:
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        assert dropout_p == 0 and softcap == 0

    def flash_attn_func(
        self,
        q,
        k,
        v,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        deterministic=False,
    ):
        """q: (batch, tokens, heads, head_dim); k and v with key heads."""
        self.check(q, dropout_p, softcap)
        self.dense_calls += 1
        rows = [attend(*parts, softmax_scale, causal, window_size) for parts in zip(q, k, v, strict=True)]
        return torch.stack(rows)

    def flash_attn_varlen_func(
        self,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        deterministic=False,
    ):
        """q: (tokens of all documents, heads, head_dim); cu_seqlens: int32, where each document starts, then the end.

        The kernels read what lies between the boundaries and check none of this.
        """
        self.check(q, dropout_p, softcap)
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert isinstance(max_seqlen_q, int) and max_seqlen_q == max_seqlen_k
        boundaries = cu_seqlens_q.tolist()
        assert boundaries == cu_seqlens_k.tolist()
        assert boundaries[0] == 0 and boundaries[-1] == len(q)
        assert max_seqlen_q == int(cu_seqlens_q.diff().max())
        self.varlen_calls.append(VarlenCall(boundaries, max_seqlen_q, tuple(q.shape), q.dtype))
        documents = []
        for start, end in zip(boundaries, boundaries[1:], strict=False):
            documents.append(attend(q[start:end], k[start:end], v[start:end], softmax_scale, causal, window_size))
        return torch.cat(documents)


def attend(q, k, v, scale, causal, window_size) -> torch.Tensor:
    """Return plain attention of one document, (tokens, heads, head_dim)."""
    places = torch.arange(len(q))
    distance = places[:, None] - places[None, :]
    visible = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        visible &= distance >= 0
    if window_size[0] >= 0:
        visible &= distance <= window_size[0]
    heads_per_key = q.shape[1] // k.shape[1]
    keys = k.repeat_interleave(heads_per_key, 1)
    values = v.repeat_interleave(heads_per_key, 1)
    scores = torch.einsum("qhd,khd->hqk", q, keys) * (scale or q.shape[-1] ** -0.5)
    weights = scores.float().masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights.to(v.dtype), values)


def use_flash_attention(monkeypatch, only_half=True) -> FlashAttention:
    """Put a FlashAttention where transformers imports flash-attn 2 from."""
    reference = FlashAttention(only_half)
    package = ModuleType("flash_attn")
    package.__spec__ = ModuleSpec("flash_attn", None, origin="tests")
    package.flash_attn_func = reference.flash_attn_func
    package.flash_attn_varlen_func = reference.flash_attn_varlen_func
    package.flash_attn_with_kvcache = None
    padding = ModuleType("flash_attn.bert_padding")
    padding.pad_input = flash_utils._pad_input
    padding.unpad_input = flash_utils._unpad_input
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    monkeypatch.setattr(flash_utils, "is_flash_attn_2_available", lambda **_: True)
    for name in LOADED_BY_TRANSFORMERS:
        monkeypatch.setattr(flash_utils, name, None)
    model_class = transformers.modeling_utils.PreTrainedModel
    monkeypatch.setattr(model_class, "_flash_attn_can_dispatch", lambda *_, **__: True)  # else it looks for a GPU
    return reference


# -- flex attention ---------------------------------------------------------------------------------------------------
def use_dense_flex_attention(monkeypatch) -> None:
    """Run flex attention's dense form, which has a backward pass on a CPU, and compile nothing."""

    def attend_dense(query, key, value, training=False, **kwargs):
        return torch_flex.flex_attention(query, key, value, **kwargs)

    make_mask = torch_flex.create_block_mask

    def create_block_mask(*args, **kwargs):
        return make_mask(*args, **{**kwargs, "_compile": False})

    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)  # refuses gradients on a CPU
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(transformers_flex, "compile_friendly_flex_attention", attend_dense)
    monkeypatch.setattr(transformers.masking_utils, "create_block_mask", create_block_mask)


def use_eager_compiler(monkeypatch) -> None:
    """Have Dynamo trace and guard what is compiled, as on a GPU, and run the traces as they are: no code is made."""
    compile_with = torch.compile

    def compile_eagerly(function, **_):
        return compile_with(function, backend="eager")

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(transformers_flex.WrappedFlexAttention, "_instance", None)  # holds what is compiled


def count_compiled() -> int:
    """Return the larger of how often flex attention and its mask were compiled since Dynamo's last reset."""
    functions = (torch_flex.flex_attention, torch_flex.create_block_mask)
    return max(len(_debug_get_cache_entry_list(function)) for function in functions)


def hit_the_limit() -> bool:
    """Return whether Dynamo gave up on a function that it had compiled too often."""
    reasons = torch._dynamo.utils.counters["unimplemented"]
    return any("recompile limit" in reason for reason in reasons)


# -- GPUs -------------------------------------------------------------------------------------------------------------
def pretend_gpus(monkeypatch, count: int) -> None:
    """Have torch and accelerate see so many GPUs; nothing can be put on them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
