"""What to change where a run does not fit a GPU, or leaves half of it empty: each with its own prediction."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from transformers import PreTrainedConfig

from .errors import UsageError
from .gpu_cards import Card
from .gpu_engines import Engine
from .gpu_memory import GIB, Prediction, predict
from .gpu_settings import RunSettings
from .gpu_speed import Speed, predict_speed
from .gpu_standins import FLASH, SDPA

FLEX = "flex_attention"
HALF = 0.5  # of a card: a run that needs less leaves it half empty
LENGTH_STEP = 256  # tokens, of the longest --max_length
BACK_OFF = (1.0, 0.98, 0.95, 0.9, 0.75, 0.5)  # of an estimate that did not fit


@dataclass(frozen=True)
class Change:
    """Flags, the settings that they make, and what else they do."""

    flags: str
    settings: RunSettings
    note: str


@dataclass(frozen=True)
class Advice:
    """A change with its predicted peak in bytes, and its tokens a second; peak is None where it cannot be traced."""

    change: Change
    prediction: Prediction | None
    speed: Speed | None

    def saved(self, before: Prediction) -> float:
        """Return the bytes that the change saves, below 0 where it costs some."""
        return before.peak - self.prediction.peak

    def gain(self, before: Speed) -> float:
        """Return how many times as many tokens a second it makes, by the mean of both bounds."""
        return (self.speed.slow + self.speed.fast) / (before.slow + before.fast)


# -- too large --------------------------------------------------------------------------------------------------------
def list_savings(settings: RunSettings) -> Iterator[Change]:
    """Give the ladder of the Day-2 QLoRA tutorial in its order, FlashAttention off first, then what else saves."""
    if settings.attn_implementation in (*FLASH, FLEX):
        sdpa = replace(settings, attn_implementation=SDPA)
        note = "no kernel to install or to fail, but a dense mask over packs, and nothing of it is skipped"
        yield Change("--attn_implementation sdpa", sdpa, note)
    if not settings.activation_checkpointing:
        kept = replace(settings, activation_checkpointing=True)
        yield Change("--activation_checkpointing true", kept, "one layer's activations at a time, computed twice")
    elif settings.every_n_layers > 1:
        every = replace(settings, every_n_layers=1)
        flags = """--activation_checkpointing_kwargs '{"every_n_layers": 1}'"""
        yield Change(flags, every, "every layer's activations are computed twice")
    if settings.max_length > 256:
        shorter = 1024 if settings.max_length > 1024 else settings.max_length // 2
        note = "longer rows are truncated"
        yield Change(f"--max_length {shorter}", replace(settings, max_length=shorter), note)
    if settings.use_peft and settings.lora_dropout > 0:
        yield Change("--lora_dropout 0", replace(settings, lora_dropout=0.0), "no masks, no inputs of each adapter")
    rows = settings.per_device_train_batch_size
    if rows > 1:
        steps = settings.gradient_accumulation_steps * rows
        one = replace(settings, per_device_train_batch_size=1, gradient_accumulation_steps=steps)
        yield Change("--per_device_train_batch_size 1", one, f"{steps} passes a step, the global batch stays")
    if settings.use_peft and settings.lora_r > 8:
        alpha = settings.lora_alpha * 8 / settings.lora_r
        smaller = replace(settings, lora_r=8, lora_alpha=alpha)
        yield Change(f"--lora_r 8 --lora_alpha {alpha:g}", smaller, "smaller adapters, gradients and states")
    if not settings.activation_offloading:
        offloaded = replace(settings, activation_offloading=True)
        yield Change("--activation_offloading true", offloaded, "activations wait in main memory; slower, not counted")
    if settings.optim.startswith("adamw") and not settings.optimizer:
        paged = replace(settings, optim="paged_adamw_8bit")
        yield Change("--optim paged_adamw_8bit", paged, "2 bytes of state a trained weight, in pages")
    yield from list_smaller_weights(settings)


def list_smaller_weights(settings: RunSettings) -> Iterator[Change]:
    if not settings.use_peft:
        lora = replace(settings, use_peft=True, dtype="bfloat16")
        yield Change("recipes/qwen3_lora.py", lora, "adapters only are trained: another recipe")
        return
    if settings.load_in_4bit:
        return
    if not settings.load_in_8bit:
        eight = replace(settings, load_in_8bit=True)
        yield Change("--load_in_8bit true", eight, "1 byte a frozen weight; products in int8")
    four = replace(settings, load_in_4bit=True, load_in_8bit=False, use_bnb_nested_quant=True)
    flags = "--load_in_4bit true --use_bnb_nested_quant true"
    if settings.load_in_8bit:
        flags = f"--load_in_8bit false {flags}"
    yield Change(flags, four, "about 0.52 bytes a frozen weight")


# -- half empty -------------------------------------------------------------------------------------------------------
def list_spendings(settings: RunSettings) -> Iterator[list[Change]]:
    """Give what more memory can be spent on, in order; of each list the largest that fits is taken, largest first."""
    yield list(list_fewer_recomputations(settings))
    yield list(list_larger_passes(settings))
    longer = []
    for factor in (8, 4, 2):
        length = settings.max_length * factor
        note = "fewer rows are truncated; with packing a step has that many times as many tokens"
        longer.append(Change(f"--max_length {length}", replace(settings, max_length=length), note))
    yield longer
    if not settings.packing and not settings.pairs:
        packed = replace(settings, packing=True)
        yield [Change("--packing true", packed, "no padding: tokens a second count padding where rows are not packed")]
    if settings.use_peft:
        yield list(list_larger_adapters(settings))
        yield list(list_larger_weights(settings))
    if "8bit" in settings.optim:
        fused = replace(settings, optim="adamw_torch_fused")
        yield [Change("--optim adamw_torch_fused", fused, "states in fp32, no rounding")]


def list_fewer_recomputations(settings: RunSettings) -> Iterator[Change]:
    if not settings.activation_checkpointing:
        return
    kept = replace(settings, activation_checkpointing=False)
    yield Change("--activation_checkpointing false", kept, "no activation is computed twice")
    if settings.every_n_layers == 1:
        every = replace(settings, every_n_layers=2)
        flags = """--activation_checkpointing_kwargs '{"every_n_layers": 2}'"""
        yield Change(flags, every, "half of the recomputation")


def list_larger_passes(settings: RunSettings) -> Iterator[Change]:
    rows = settings.per_device_train_batch_size
    for factor in (16, 8, 4, 2):
        steps, rest = divmod(settings.gradient_accumulation_steps, factor)
        if steps and not rest:
            larger = replace(settings, per_device_train_batch_size=rows * factor, gradient_accumulation_steps=steps)
            passes = "1 pass" if steps == 1 else f"{steps} passes"
            note = f"{passes} a step instead of {settings.gradient_accumulation_steps}, the same global batch"
            yield Change(f"--per_device_train_batch_size {rows * factor}", larger, note)


def list_larger_adapters(settings: RunSettings) -> Iterator[Change]:
    for factor in (4, 2):
        rank = settings.lora_r * factor
        alpha = settings.lora_alpha * factor
        larger = replace(settings, lora_r=rank, lora_alpha=alpha, lora_target_modules="all-linear")
        flags = f"--lora_r {rank} --lora_alpha {alpha:g}"
        if settings.lora_target_modules != "all-linear":
            flags += " --lora_target_modules all-linear"
        yield Change(flags, larger, "more capacity")


def list_larger_weights(settings: RunSettings) -> Iterator[Change]:
    if not settings.load_in_4bit and not settings.load_in_8bit:
        return
    whole = replace(settings, load_in_4bit=False, load_in_8bit=False)
    quantised = "--load_in_4bit false" if settings.load_in_4bit else "--load_in_8bit false"
    yield Change(quantised, whole, f"weights in {settings.dtype}: no quantisation error, nothing to dequantise")
    if settings.load_in_4bit:
        eight = replace(settings, load_in_4bit=False, load_in_8bit=True)
        yield Change("--load_in_4bit false --load_in_8bit true", eight, "a smaller quantisation error")


# -- predictions of changes -------------------------------------------------------------------------------------------
def predict_change(change: Change, config: PreTrainedConfig, engine: Engine, card: Card) -> Advice:
    """Return a change's prediction, without one where it cannot be traced."""
    try:
        prediction = predict(change.settings, config, engine)
    except UsageError:
        return Advice(change, None, None)
    return Advice(change, prediction, predict_speed(prediction, card))


def savings(settings: RunSettings, config: PreTrainedConfig, engine: Engine, card: Card) -> list[Advice]:
    """Return the ladder for these settings, each rung by itself."""
    rungs = [predict_change(change, config, engine, card) for change in list_savings(settings)]
    return [rung for rung in rungs if rung.prediction is not None]


def spendings(settings: RunSettings, config: PreTrainedConfig, engine: Engine, card: Card) -> list[Advice]:
    """Return what the card's free memory can be spent on, each by itself and at its largest that fits."""
    chosen = []
    for changes in list_spendings(settings):
        for change in changes:
            advice = predict_change(change, config, engine, card)
            if advice.prediction is not None and advice.prediction.fits(card.gib):
                chosen.append(advice)
                break
    return chosen


def is_half_empty(prediction: Prediction, card: Card) -> bool:
    return prediction.needed[1] < HALF * card.gib * GIB


def longest_length(settings: RunSettings, config: PreTrainedConfig, engine: Engine, card: Card) -> int | None:
    """Return the longest max_length that the card surely holds, up to the model's own; None where no length does.

    Memory is nearly linear in the length: the line through two lengths says where the card is full, twice, and the
    result is predicted by itself.
    """
    limit = getattr(config, "max_position_embeddings", None) or 2**20
    room = card.gib * GIB

    def needed(length: int) -> float:
        return predict(replace(settings, max_length=length), config, engine).needed[1]

    first = settings.max_length
    second = 2 * first
    for _ in range(2):
        slope = (needed(second) - needed(first)) / (second - first)
        estimate = round_down(min(limit, first + (room - needed(first)) / slope))
        if estimate < LENGTH_STEP or estimate in (first, second):
            break
        first = second
        second = estimate
    for share in BACK_OFF:
        length = round_down(estimate * share)
        if length >= LENGTH_STEP and needed(length) <= room:
            return length
    return None


def round_down(length: float) -> int:
    return int(length // LENGTH_STEP * LENGTH_STEP)
