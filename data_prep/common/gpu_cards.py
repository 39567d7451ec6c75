"""GPUs by name: memory, peak and bandwidth as their makers publish them."""

import difflib
import re
from dataclasses import dataclass

from .errors import UsageError


@dataclass(frozen=True)
class Card:
    """A GPU. gib: memory that torch reports; teraflops: dense bf16 with fp32 accumulation; gigabytes: a second."""

    name: str
    pattern: str  # of the name that torch gives it, without NVIDIA
    gib: float
    teraflops: float
    gigabytes: float
    source: str


CARDS = {
    "rtx3090": Card("RTX 3090", r"GeForce RTX 3090", 23.6, 71.2, 936, "NVIDIA, Ampere GA102 whitepaper"),
    "rtx4080": Card("RTX 4080", r"GeForce RTX 4080", 15.6, 97.5, 717, "NVIDIA, Ada whitepaper, appendix A"),
    "rtx4090": Card("RTX 4090", r"GeForce RTX 4090", 23.5, 165.2, 1008, "NVIDIA, Ada whitepaper, appendix A"),
    "rtx5090": Card("RTX 5090", r"GeForce RTX 5090", 31.4, 209.5, 1792, "NVIDIA, RTX Blackwell whitepaper"),
    "a6000": Card("RTX A6000", r"RTX A6000", 47.4, 154.8, 768, "NVIDIA, RTX A6000 datasheet, half of sparse"),
    "l40s": Card("L40S", r"L40S", 44.4, 362.05, 864, "NVIDIA, L40S datasheet; 48 GB less its ECC"),
    "a100-40": Card("A100 40 GB", r"A100-(SXM4|PCIE)-40GB", 39.4, 312.0, 1555, "NVIDIA, A100 datasheet"),
    "a100": Card("A100 80 GB", r"A100-SXM4-80GB|A100 80GB PCIe", 79.2, 312.0, 2039, "NVIDIA, A100 datasheet"),
    "h100-pcie": Card("H100 PCIe", r"H100 PCIe", 79.2, 756.0, 2000, "NVIDIA, H100 whitepaper"),
    "h100": Card("H100 SXM", r"H100 80GB HBM3", 79.2, 989.4, 3350, "NVIDIA, H100 whitepaper"),
    "h200": Card("H200", r"H200", 139.8, 989.4, 4800, "NVIDIA, H200 datasheet, half of sparse"),
    "b200": Card("B200", r"B200", 178.4, 2250.0, 8000, "NVIDIA, HGX B200 datasheet, an eighth of eight"),
}
TABLE = ("rtx4080", "rtx4090", "l40s", "h100", "h200")  # 16, 24, 48, 80 and 141 GB


def short_name(name: str) -> str:
    """Return a name as the keys of CARDS are written: lower case, without spaces, vendor and the memory's size."""
    text = re.sub(r"nvidia|geforce|sxm\d?|[\s_]", "", name.lower())
    return re.sub(r"-?80g[bi]*$", "", text)


def likeness(name: str, known: str) -> tuple[float, bool]:
    """Return how alike two names are; of equals, one with the same letters in another order is the likelier."""
    ratio = difflib.SequenceMatcher(None, name, known).ratio()
    return ratio, sorted(name) == sorted(known)


def find_card(name: str) -> Card:
    """Return the card of a name such as rtx4080 or "RTX 4080". Raises UsageError, which names the nearest."""
    short = short_name(name)
    if short in CARDS:
        return CARDS[short]
    nearest = max(CARDS, key=lambda known: likeness(short, known))
    raise UsageError(f"--gpu {name}: no card of that name, the nearest is {nearest} (of {', '.join(CARDS)})")


def find_device_card(device_name: str) -> Card | None:
    """Return the card of the name that torch gives a GPU, None for one that is not in CARDS (a Ti, a laptop's)."""
    device_name = device_name.removeprefix("NVIDIA ")
    for card in CARDS.values():
        if re.fullmatch(card.pattern, device_name):
            return card
    return None
