"""What an engine leaves on each GPU of weights, adapters, gradients and optimizer states: arithmetic.

Sources: Rajbhandari et al. 2020, ZeRO (arXiv:1910.02054), section 5; DeepSpeed 0.19's zero/config.py for its buckets;
torch's FSDP2 (torch/distributed/fsdp), whose units are the decoder layers and the rest.
"""

from dataclasses import dataclass
from pathlib import Path

from .errors import UsageError
from .recipe_settings import read_yaml

REDUCE_BUCKET = 5e8  # elements, DeepSpeed's default
PERSISTED = 1e5  # elements below which ZeRO-3 leaves a weight whole; not counted
BF16 = 2
FP32 = 4


@dataclass(frozen=True)
class Resident:
    """Bytes on a GPU over a whole step; buffers: what the engine gathers and reduces in."""

    weights: float
    adapters: float
    gradients: float
    optimizer: float
    buffers: float


@dataclass(frozen=True)
class Engine:
    """How a run is spread. kind: single, ddp, zero or fsdp2; stage: of ZeRO; shards: GPUs that share one copy."""

    kind: str = "single"
    processes: int = 1
    stage: int = 0
    shards: int = 1
    offloads_optimizer: bool = False
    offloads_weights: bool = False
    reshards_after_forward: bool = True
    sequence_parallel_size: int = 1

    @property
    def is_sharded(self) -> bool:
        return self.kind in ("zero", "fsdp2")

    @property
    def data_parallel_size(self) -> int:
        """Return how many GPUs take rows of their own."""
        return self.processes // self.sequence_parallel_size

    def describe(self) -> str:
        name = {"single": "one GPU", "ddp": "DDP", "fsdp2": "FSDP2", "zero": f"ZeRO-{self.stage}"}[self.kind]
        if self.processes > 1:
            name += f", {self.processes} GPUs"
        if self.is_sharded and self.shards != self.processes:
            name += f", {self.shards} of them share a copy"
        if self.sequence_parallel_size > 1:
            name += f", {self.sequence_parallel_size} of them share a row"
        offloaded = []
        if self.offloads_optimizer:
            offloaded.append("optimizer")
        if self.offloads_weights:
            offloaded.append("weights")
        if offloaded:
            name += f", {' and '.join(offloaded)} in main memory"
        return name

    def resident(
        self, weights: float, adapters: int, trained: int, states: float, layer: float, embedding: int
    ) -> Resident:
        """Return what lies on a GPU for the whole step.

        weights: bytes of all but the adapters as the engine computes with them (bf16 or 4 bits); adapters, trained:
        parameters, trained including adapters; states: bytes of the optimizer's; layer: parameters of a decoder layer;
        embedding: parameters of embedding and head.
        """
        if self.kind == "fsdp2":
            return self.resident_fsdp2(weights, adapters, trained, states, layer, embedding)
        return self.resident_zero(weights, adapters, trained, states, layer, embedding)

    def resident_zero(
        self, weights: float, adapters: int, trained: int, states: float, layer: float, embedding: int
    ) -> Resident:
        """Return what ZeRO leaves: it trains bf16 weights, with fp32 ones as a state of the optimizer."""
        kept_states = (states + FP32 * trained) / self.shards
        kept_gradients = BF16 * trained
        if self.stage >= 2:
            kept_gradients /= self.shards
        step_gradients = FP32 * trained / self.shards  # as fp32, when the optimizer steps
        kept_weights = weights
        kept_adapters = BF16 * adapters
        buckets = BF16 * min(REDUCE_BUCKET, trained)
        if self.stage == 3:
            kept_weights /= self.shards
            kept_adapters /= self.shards
            buckets += BF16 * (embedding + 2 * layer)  # gathered: embedding and head, a layer and the next
        if self.offloads_optimizer:
            kept_states = 0.0
            step_gradients = 0.0
            if self.stage >= 2:
                kept_gradients = 0.0
        if self.offloads_weights:
            kept_weights = 0.0
            kept_adapters = 0.0
        return Resident(kept_weights, kept_adapters, kept_gradients, kept_states, buckets + step_gradients)

    def resident_fsdp2(
        self, weights: float, adapters: int, trained: int, states: float, layer: float, embedding: int
    ) -> Resident:
        """Return what FSDP2 leaves: fp32 shards of what is trained, one unit and the next gathered in bf16."""
        whole = trained - adapters
        kept_weights = weights + (FP32 - BF16) * whole  # `weights` counts them as bf16
        gathered = BF16 * (embedding + 2 * layer)
        if not self.reshards_after_forward:
            gathered = weights
        reduced = 0.0
        if whole:
            reduced = (BF16 + FP32) * layer + BF16 * embedding
        kept = [kept_weights, FP32 * adapters, FP32 * trained, states]
        if self.offloads_weights:
            kept = [0.0, 0.0, 0.0, 0.0]
        shares = [size / self.shards for size in kept]
        return Resident(*shares, gathered + reduced)


# -- accelerate's YAML ------------------------------------------------------------------------------------------------
def read_engine(path: str | Path | None, num_processes: int | None = None) -> Engine:
    """Return the engine of an accelerate config, one GPU without one. Raises UsageError."""
    if path is None:
        processes = num_processes or 1
        return Engine("ddp" if processes > 1 else "single", processes)
    if not Path(path).is_file():
        raise UsageError(f"--config_file {path}: no such file: pass one of accelerate_configs/*.yaml")
    values = read_yaml(path)
    kind = str(values.get("distributed_type", "NO")).upper()
    processes = num_processes or int(values.get("num_processes", 1))
    parallelism = values.get("parallelism_config") or {}
    rows_shared_by = int(parallelism.get("parallelism_config_sp_size", 1))
    if processes % rows_shared_by:
        raise UsageError(f"{path}: {processes} processes cannot share rows by {rows_shared_by}: change one of them")
    if kind == "DEEPSPEED":
        return read_zero(values.get("deepspeed_config") or {}, processes, rows_shared_by, path)
    if kind == "FSDP":
        shards = int(parallelism.get("parallelism_config_dp_shard_size", processes))
        options = values.get("fsdp_config") or {}
        return Engine(
            "fsdp2",
            processes,
            shards=min(shards, processes),
            offloads_weights=bool(options.get("fsdp_offload_params", False)),
            offloads_optimizer=bool(options.get("fsdp_offload_params", False)),
            reshards_after_forward=bool(options.get("fsdp_reshard_after_forward", True)),
        )
    if kind in ("NO", "MULTI_GPU"):
        return Engine("ddp" if processes > 1 else "single", processes)
    raise UsageError(f"{path}: distributed_type {kind} is not known here: NO, MULTI_GPU, DEEPSPEED and FSDP are")


def read_zero(options: dict, processes: int, rows_shared_by: int, path: str | Path) -> Engine:
    if "zero_stage" not in options:
        raise UsageError(f"{path}: deepspeed_config has no zero_stage: write one of 1, 2, 3")
    return Engine(
        "zero",
        processes,
        stage=int(options["zero_stage"]),
        shards=processes,
        offloads_optimizer=options.get("offload_optimizer_device", "none") != "none",
        offloads_weights=options.get("offload_param_device", "none") != "none",
        sequence_parallel_size=rows_shared_by,
    )
