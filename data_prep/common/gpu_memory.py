"""Predict the peak GPU memory of a training step, without a GPU, weights or data.

The step is traced with fake tensors over transformers' own model class at its true shapes, with PEFT's adapters, TRL's
fused head, checkpointing and autocast; gpu_standins.py has what only CUDA runs. Two small numbers of layers are traced
and extrapolated, segment by segment: each layer of a kind adds the same. What several GPUs cut is arithmetic.

    settings = read_run_settings(script_args, training_args, model_args, attn_implementation)
    prediction = predict(settings, load_config(settings.model_name_or_path).config)
    prediction.peak, prediction.parts  # bytes a GPU

Left out: the CUDA context and what the allocator's free memory is broken into (ALLOWANCE, an estimate), NCCL's buffers,
and pages of paged optimizer states, which torch does not count (Prediction.paged).
"""

from collections import Counter
from dataclasses import dataclass, field, replace

from transformers import PreTrainedConfig

from .gpu_engines import Engine
from .gpu_meter import Segment, Work
from .gpu_settings import RunSettings, check_settings
from .gpu_trace import PARTS, Counts, Trace, trace_model

GIB = 2**30
ALLOWANCE = (0.3 * GIB, 0.8 * GIB)  # CUDA's context and fragments: an estimate, not measured


# -- the optimizer ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class OptimizerBytes:
    """States of the trained weights: in torch's memory, or in pages that torch does not count; work of a step."""

    resident: float
    paged: float = 0
    temporary: float = 0


def optimizer_bytes(settings: RunSettings, counts: Counts, width: int = 4) -> OptimizerBytes:
    """Return the bytes of an optimizer's states and of its step: two states a weight for AdamW, one for SGD.

    width: bytes of a number of the states, which are of the trained weights' dtype.
    """
    trained = counts.trained
    name = settings.optim
    if settings.optimizer:  # Muon keeps one state a matrix of the layers, AdamW two of the rest
        return OptimizerBytes(width * counts.layer_trained + 2 * width * (trained - counts.layer_trained))
    if "8bit" in name:
        states = 1 if "lion" in name else 2
        large = trained - counts.small_trained
        size = states * (large * (1 + 4 / 256) + 4 * counts.small_trained)
    elif "lion" in name:
        size = width * trained
    elif "sgd" in name:
        size = 0
    elif "adafactor" in name:
        size = 0.01 * trained  # a row and a column of each matrix
    else:
        size = 2 * width * trained
    if "paged" in name:
        return OptimizerBytes(0, paged=size)
    temporary = 0
    if name == "adamw_torch":
        temporary = width * trained  # the foreach form makes denominators of all weights at once
    return OptimizerBytes(size, temporary=temporary)


def state_width(settings: RunSettings, engine: Engine) -> int:
    """Return the bytes of a number of the trained weights: of the fp32 that engines keep, and of adapters, 4."""
    if not engine.is_sharded and not settings.use_peft and settings.dtype != "float32":
        return 2
    return 4


# -- the prediction ---------------------------------------------------------------------------------------------------
@dataclass
class Prediction:
    """Bytes a GPU at the peak of an optimizer step, by part, and what the pass did.

    at: the segment that has the peak. paged: optimizer states that torch does not count, on the GPU where room is.
    """

    settings: RunSettings
    engine: Engine
    peak: float
    parts: dict[str, float]
    at: str
    paged: float
    counts: Counts
    work: Work
    forward: Work = field(default_factory=Work)  # of its forward alone, as an evaluation does it

    @property
    def needed(self) -> tuple[float, float]:
        """Return the memory that a card must have, from and to: with the allowance for context and fragments."""
        return self.peak + ALLOWANCE[0], self.peak + ALLOWANCE[1]

    def fits(self, gib: float) -> bool:
        """Return whether a card of that much memory surely holds it."""
        return self.needed[1] <= gib * GIB

    def may_fit(self, gib: float) -> bool:
        """Return whether a card of that much memory holds it at the smaller allowance."""
        return self.needed[0] <= gib * GIB


def predict(settings: RunSettings, config: PreTrainedConfig, engine: Engine | None = None) -> Prediction:
    """Return the predicted peak memory of an optimizer step on each GPU. Raises UsageError."""
    engine = engine or Engine()
    check_settings(settings)
    if engine.sequence_parallel_size > 1:
        length = -(-settings.max_length // engine.sequence_parallel_size)
        settings_traced = replace(settings, max_length=length, packing=False)
    else:
        settings_traced = settings
    if engine.is_sharded:
        settings_traced = replace(settings_traced, dtype="bfloat16", bf16=True)
    traced = trace_model(config, settings_traced)
    width = state_width(settings, engine)
    states = optimizer_bytes(settings, traced.counts, width)
    if engine.is_sharded:
        return predict_sharded(settings, engine, traced, states, config.num_hidden_layers)

    buckets = 0.0
    if engine.kind == "ddp":
        buckets = 4.0 * traced.counts.trained  # torch's reducer copies the gradients into its own
    candidates = {}
    for name, segment in traced.segments.items():
        if name.startswith("later") and settings.gradient_accumulation_steps == 1:
            continue
        parts = Counter(segment.parts)
        parts["optimizer"] = states.resident
        parts["buffers"] = buckets
        candidates[name] = parts
    gradients = max(segment.parts["gradients"] for segment in traced.segments.values())
    step = Counter(traced.resident)
    step["activations"] = 0
    step["gradients"] = gradients
    step["optimizer"] = states.resident + states.temporary
    step["buffers"] = buckets
    candidates["optimizer step"] = step
    at = max(candidates, key=lambda name: sum(candidates[name].values()))
    parts = {part: candidates[at][part] for part in PARTS}
    return Prediction(
        settings, engine, sum(parts.values()), parts, at, states.paged, traced.counts, traced.work, traced.forward
    )


def predict_sharded(
    settings: RunSettings, engine: Engine, traced: Trace, states: OptimizerBytes, layers: int
) -> Prediction:
    """Return the prediction where an engine cuts weights, gradients or states: arithmetic, with traced activations."""
    counts = traced.counts
    outside = counts.embedding
    resident = engine.resident(
        weights=traced.resident["weights"],
        adapters=counts.trained if settings.use_peft else 0,
        trained=counts.trained,
        states=states.resident + states.paged,
        layer=(counts.parameters - outside) / layers,
        embedding=outside,
    )
    best = max(traced.segments, key=lambda name: working_bytes(traced.segments[name]))
    segment = traced.segments[best]
    parts = {part: getattr(resident, part, 0.0) for part in PARTS}
    parts["activations"] = segment.parts["activations"]
    parts["head"] = segment.parts["head"]
    return Prediction(settings, engine, sum(parts.values()), parts, best, 0.0, counts, traced.work, traced.forward)


def working_bytes(segment: Segment) -> float:
    return segment.parts["activations"] + segment.parts["head"]
