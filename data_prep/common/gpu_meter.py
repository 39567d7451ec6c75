"""Count what a traced computation allocates, multiplies and moves, operation by operation."""

import weakref
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

CUDA_BLOCK = 512  # bytes that torch's CUDA allocator rounds up to
WITHOUT_TRAFFIC = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view"}


@dataclass
class Work:
    """What was done: products in FLOPs, bytes that other operations read and write, bytes of dequantised weights."""

    flops: float = 0.0
    moved: float = 0.0
    dequantised: float = 0.0
    kernels: int = 0


@dataclass
class Storage:
    size: int
    part: str


@dataclass
class Segment:
    """The peak of a stretch of a step, and what was alive at it, bytes by part."""

    peak: int = 0
    parts: Counter = field(default_factory=Counter)


class Meter(TorchDispatchMode):
    """Bytes of all live storages by part, with the peak of each segment; FLOPs, traffic and kernels.

    What is allocated belongs to the current `part` until retag() says otherwise.
    """

    def __init__(self, rounding: int = CUDA_BLOCK) -> None:
        super().__init__()
        self.rounding = rounding
        self.part = "weights"
        self.parts = Counter()
        self.now = 0
        self.storages = WeakIdKeyDictionary()
        self.segments: dict[str, Segment] = {}
        self.segment = Segment()
        self.work = Work()

    def start(self, name: str, part: str | None = None) -> None:
        """Start a segment, or go on with one of that name. part: what is allocated from here on, None for no change."""
        if part is not None:
            self.part = part
        self.segment = self.segments.setdefault(name, Segment())
        self.update_peak()

    def update_peak(self) -> None:
        if self.now > self.segment.peak:
            self.segment.peak = self.now
            self.segment.parts = self.parts.copy()

    def add(self, tensor: torch.Tensor) -> None:
        store = tensor.untyped_storage()
        if store in self.storages:
            return
        size = -(-store.nbytes() // self.rounding) * self.rounding
        storage = Storage(size, self.part)
        self.storages[store] = storage
        weakref.finalize(store, self.free, storage)
        self.now += size
        self.parts[self.part] += size
        self.update_peak()

    def free(self, storage: Storage) -> None:
        self.now -= storage.size
        self.parts[storage.part] -= storage.size

    def retag(self, tensor: torch.Tensor, part: str) -> None:
        """Count a tensor's bytes under another part."""
        storage = self.storages.get(tensor.untyped_storage())
        if storage is None:
            return
        self.parts[storage.part] -= storage.size
        self.parts[part] += storage.size
        storage.part = part

    def add_work(self, flops: float = 0, moved: float = 0, kernels: int = 0, dequantised: bool = False) -> None:
        """Count what a stand-in stands for."""
        self.work.flops += flops
        self.work.kernels += kernels
        if dequantised:
            self.work.dequantised += moved
        else:
            self.work.moved += moved

    def count(self, func: torch._ops.OpOverload, args: tuple, kwargs: dict, output: object) -> None:
        packet = func._overloadpacket
        if packet in flop_registry:
            self.add_work(flops=flop_registry[packet](*args, **kwargs, out_val=output), kernels=1)
            return
        if func.is_view or packet.__name__ in WITHOUT_TRAFFIC:
            return
        tensors = [leaf for leaf in tree_leaves((args, kwargs, output)) if isinstance(leaf, torch.Tensor)]
        moved = sum(tensor.nbytes for tensor in tensors)
        self.add_work(moved=moved, kernels=1)

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        self.count(func, args, kwargs, output)
        return output
