"""What a run's optimizer, evaluations and saves cost by prediction, so that defaults can be judged by figures.

An evaluation is the traced forward pass over the validation rows; a save is what the trainer writes: the trained
weights and the optimizer's states.
"""

from dataclasses import dataclass, replace

from .gpu_cards import Card
from .gpu_memory import Prediction, optimizer_bytes, state_width
from .gpu_speed import Speed, forward_seconds, predict_speed

OPTIMIZERS = ("adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit")
DISK = 1e9  # bytes a second that a save is written with: an assumption, of a plain SSD


@dataclass(frozen=True)
class OptimizerCost:
    """Bytes of an optimizer's states; paged: those that torch does not count and that may move to main memory."""

    optim: str
    resident: float
    paged: float

    @property
    def total(self) -> float:
        return self.resident + self.paged


@dataclass(frozen=True)
class Schedule:
    """How often a run evaluates and saves, in steps; None: not by steps. tokens: of its validation rows."""

    eval_steps: int | None
    save_steps: int | None
    tokens: int


@dataclass(frozen=True)
class Interruption:
    """What happens every so many steps.

    seconds: of one, from and to, by the faster and the slower bound of speed. share: of the time of the steps between.
    """

    steps: int
    seconds: tuple[float, float]
    share: tuple[float, float]
    size: float = 0.0  # bytes written


def compare_optimizers(prediction: Prediction) -> list[OptimizerCost]:
    """Return what each of OPTIMIZERS would keep for the weights that a run trains, all of them on one GPU."""
    settings = prediction.settings
    width = state_width(settings, prediction.engine)
    costs = []
    for optim in OPTIMIZERS:
        states = optimizer_bytes(replace(settings, optim=optim, optimizer=None), prediction.counts, width)
        costs.append(OptimizerCost(optim, states.resident, states.paged))
    return costs


def step_seconds(prediction: Prediction, speed: Speed) -> tuple[float, float]:
    """Return the seconds of an optimizer step: the shortest and the longest."""
    settings = prediction.settings
    tokens = settings.tokens * settings.gradient_accumulation_steps * prediction.engine.data_parallel_size
    return speed.seconds(tokens)


def checkpoint_bytes(prediction: Prediction) -> float:
    """Return the bytes of a checkpoint: the trained weights as they are held, and the optimizer's states."""
    width = state_width(prediction.settings, prediction.engine)
    states = optimizer_bytes(prediction.settings, prediction.counts, width)
    return width * prediction.counts.trained + states.resident + states.paged


def cost_of_evaluations(prediction: Prediction, card: Card, schedule: Schedule) -> Interruption | None:
    """Return what evaluations cost; None for a run without any, or with no rows for them."""
    if not schedule.eval_steps or not schedule.tokens:
        return None
    seconds = forward_seconds(prediction, card, schedule.tokens)
    between = step_seconds(prediction, predict_speed(prediction, card))
    fast = seconds[0] / (schedule.eval_steps * between[0])
    slow = seconds[1] / (schedule.eval_steps * between[1])
    return Interruption(schedule.eval_steps, seconds, (min(fast, slow), max(fast, slow)))


def cost_of_saves(prediction: Prediction, card: Card, schedule: Schedule) -> Interruption | None:
    """Return what saves cost at DISK, written once and read once for their checksums; None for a run without any."""
    if not schedule.save_steps:
        return None
    size = checkpoint_bytes(prediction)
    seconds = 2 * size / DISK
    between = step_seconds(prediction, predict_speed(prediction, card))
    shares = [seconds / (schedule.save_steps * step) for step in between]
    return Interruption(schedule.save_steps, (seconds, seconds), (min(shares), max(shares)), size)
