"""Predict tokens a second by counting: products at a share of the GPU's peak, and the bytes that all else moves.

What a traced pass does (gpu_meter.Work) is divided by what a card can do (gpu_cards.Card). The result is a range: how
near to its peak a product comes, and how much of what eager operations move is still in a cache, cannot be counted.
Never is it faster than kernels can be launched. EAGER and COMPILED are calibrated on published figures
(eval/README.md); nothing here was measured. Communication between GPUs and waiting for data are not counted.
"""

from dataclasses import dataclass

from .gpu_cards import Card
from .gpu_memory import Prediction
from .gpu_meter import Work

OPTIMIZER_TRAFFIC = 7 * 4  # bytes a trained weight: weight, gradient and two states read, all but the gradient written


@dataclass(frozen=True)
class Efficiency:
    """Share of the peak that products reach, and of the traffic of other operations that goes to memory."""

    products: float
    moved: float
    launch: float  # seconds a kernel, by Python and torch's dispatcher


EAGER = (Efficiency(0.6, 1.2, 8e-6), Efficiency(0.8, 0.35, 4e-6))  # slow, fast; 1.2: 85% of the bandwidth is reached
COMPILED = (Efficiency(0.65, 0.35, 2e-6), Efficiency(0.9, 0.0, 1e-6))


@dataclass(frozen=True)
class Speed:
    """Tokens a second over all GPUs that take rows of their own, from and to."""

    slow: float
    fast: float

    def seconds(self, tokens: float) -> tuple[float, float]:
        """Return how long so many tokens take: the shortest and the longest."""
        return tokens / self.fast, tokens / self.slow


def predict_speed(prediction: Prediction, card: Card) -> Speed:
    """Return the predicted tokens a second of a run on cards of a kind, padding counted as tokens."""
    settings = prediction.settings
    slow, fast = (pass_seconds(prediction, card, efficiency) for efficiency in bounds_of(prediction))
    tokens = settings.tokens * prediction.engine.data_parallel_size
    return Speed(slow=tokens / slow, fast=tokens / fast)


def bounds_of(prediction: Prediction) -> tuple[Efficiency, Efficiency]:
    """Return the slow and the fast bound."""
    return COMPILED if prediction.settings.torch_compile else EAGER


def pass_seconds(prediction: Prediction, card: Card, efficiency: Efficiency) -> float:
    """Return the seconds of a pass of one GPU, with its share of an optimizer step."""
    accumulation = prediction.settings.gradient_accumulation_steps
    step = prediction.counts.trained * OPTIMIZER_TRAFFIC / accumulation / prediction.engine.shards
    seconds = work_seconds(prediction.work, card, efficiency, step)
    if prediction.settings.pairs:
        seconds += work_seconds(prediction.forward, card, efficiency)  # of the reference
    return seconds


def forward_seconds(prediction: Prediction, card: Card, tokens: float) -> tuple[float, float]:
    """Return how long an evaluation of so many tokens takes on all GPUs: the shortest and the longest."""
    passes = tokens / prediction.settings.tokens / prediction.engine.data_parallel_size
    slow, fast = (work_seconds(prediction.forward, card, efficiency) for efficiency in bounds_of(prediction))
    return passes * fast, passes * slow


def work_seconds(work: Work, card: Card, efficiency: Efficiency, moved: float = 0) -> float:
    """Return the seconds of counted work on one GPU. moved: bytes more that go to memory."""
    bandwidth = card.gigabytes * 1e9
    products = work.flops / (efficiency.products * card.teraflops * 1e12)
    traffic = (work.dequantised + moved + efficiency.moved * work.moved) / bandwidth
    launches = work.kernels * efficiency.launch
    return max(products + traffic, launches)
