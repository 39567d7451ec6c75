"""Which attention a run on a GPU takes where nobody has named one: the fastest that can be imported.

A recipe alone takes flash-attn where it is installed, else flex attention. Here FlashAttention 3 on Hopper and the
hub's prebuilt kernels come in between. All of them compute the same function; what differs is rounding.
"""

import torch
from transformers import PreTrainedConfig
from transformers.integrations.hub_kernels import get_attn_kernel_version
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_kernels_available
from trl import ModelConfig, SFTConfig

from .engine import find_model_class

FLASH_2 = "flash_attention_2"
FLASH_3 = "flash_attention_3"
FLASH_2_KERNEL = "kernels-community/flash-attn2"
FLASH_3_KERNEL = "kernels-community/flash-attn3"  # transformers' own stand-in for FLASH_3 is vLLM's, for inference
FLEX = "flex_attention"
BY_RECIPES = (FLASH_2, FLEX)  # what choose_attention of a recipe returns on a GPU
AMPERE = 8  # compute capability, of FlashAttention-2
HOPPER = 9  # and of FlashAttention 3
WIDEST_HEAD = 256  # of FlashAttention
HALF = ("bfloat16", "float16")
PACKAGES = {FLASH_3: "flash-attn-3", FLASH_2: "flash-attn"}


def has_kernel(name: str) -> bool:
    """Return whether the `kernels` package is of the versions that transformers takes and hands out this kernel.

    The kernel comes from the hub, or from its cache.
    """
    if not is_kernels_available():
        return False
    try:
        from kernels import get_kernel

        get_kernel(name, version=get_attn_kernel_version(name))
    except (ImportError, OSError, RuntimeError, ValueError):
        return False
    return True


def list_candidates(capability: tuple[int, int]) -> list[str]:
    """Return what a GPU of a compute capability can take for rows that are packed, the fastest first."""
    candidates = []
    if capability[0] == HOPPER:
        candidates += [FLASH_3, FLASH_3_KERNEL]
    if capability[0] >= AMPERE:
        candidates += [FLASH_2, FLASH_2_KERNEL]
    return [*candidates, FLEX]


def is_installed(attention: str) -> bool:
    """Return whether a candidate can be imported here; a kernel of the hub is fetched for it."""
    if attention == FLASH_3:
        return is_flash_attn_3_available()
    if attention == FLASH_2:
        return is_flash_attn_2_available()
    return attention == FLEX or has_kernel(attention)


def can_flash(config: PreTrainedConfig, training_args: SFTConfig, model_args: ModelConfig) -> bool:
    """Return whether FlashAttention takes a model's class, heads and precision."""
    model_class = find_model_class(config)
    if not getattr(model_class, "_supports_flash_attn", False):
        return False
    text = config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    is_half = training_args.bf16 or training_args.fp16 or model_args.dtype in HALF
    return width <= WIDEST_HEAD and is_half


def choose_attention(config: PreTrainedConfig, training_args: SFTConfig, model_args: ModelConfig) -> None:
    """Put the fastest attention that can be imported in the place of the recipe's own choice."""
    device = training_args.device
    chosen = training_args.model_init_kwargs["attn_implementation"]
    if device.type != "cuda" or model_args.attn_implementation is not None or chosen not in BY_RECIPES:
        return
    if not can_flash(config, training_args, model_args):
        return
    for candidate in list_candidates(torch.cuda.get_device_capability(device)):
        if is_installed(candidate):
            training_args.model_init_kwargs["attn_implementation"] = candidate
            return


def describe_alternative(attention: str, device: torch.device) -> str:
    """Return what a GPU could take instead, in words: a faster one that is not installed, or the next that is.

    "" on a CPU and for an attention that is no candidate, as sdpa that a recipe has chosen for its model.
    """
    if device.type != "cuda":
        return ""
    candidates = list_candidates(torch.cuda.get_device_capability(device))
    if attention not in candidates:
        return ""
    place = candidates.index(attention)
    for faster in candidates[:place]:
        if faster in PACKAGES and not is_installed(faster):
            return f" (faster: {faster}, whose package {PACKAGES[faster]} is not installed)"
    for slower in candidates[place + 1 :]:
        if is_installed(slower):
            return f" (alternative: {slower})"
    return ""
