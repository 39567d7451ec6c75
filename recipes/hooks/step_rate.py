"""Say so when steps become slower and stay so, with the GPU's clock and what throttles it where NVML is there.

NVML comes with the driver, its Python module with `pip install nvidia-ml-py`. A GPU that overheats or reaches its power
limit trains on at a lower clock, without an error. On several processes each looks at its own GPU.

The rate is positions a second, padding included; evaluations and saves are left out. Compared are medians of 20 steps:
the last ones with the fastest ones so far. An alarm needs a lower rate and longer steps: longer rows alone give longer
steps, and shorter rows alone a lower rate, where a step has costs of its own.
"""

import statistics
import sys
from collections import deque
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .messages import recipe_name
from .trainer import SFTTrainer

WINDOW = 20  # steps
FALLEN = 0.8  # of the fastest rate, in steps 1 / 0.8 as long: an alarm
RECOVERED = 0.9  # of the fastest rate: the next fall is a new one
REPEAT_AFTER = 500  # steps
IDLE = 0x1  # of the reasons below; no cause
REASONS = {  # nvmlClocksEventReasons in NVIDIA's nvml.h
    0x2: "the clocks that were set (nvidia-smi -ac)",
    0x4: "the power limit",
    0x8: "the hardware",
    0x10: "sync boost",
    0x20: "temperature",
    0x40: "temperature",
    0x80: "the power brake",
    0x100: "the display's clocks",
}


@dataclass
class GpuClock:
    """The state of a GPU: its number for nvidia-smi, clocks in MHz, degrees Celsius, and what throttles it."""

    index: int
    clock: int
    highest_clock: int
    temperature: int
    reasons: list[str]


@dataclass
class Pace:
    """Medians over a window of steps: positions a second, and seconds a step."""

    rate: float
    seconds: float


def name_reasons(mask: int, temperature: int) -> list[str]:
    """Return what throttles a GPU, by NVML's bit mask, each cause once."""
    names = []
    for bit, name in REASONS.items():
        if mask & bit and name not in names:
            names.append(name)
    unknown = mask & ~IDLE & ~sum(REASONS)
    if unknown:
        names.append(f"reason {unknown:#x}")
    return [name.replace("temperature", f"temperature ({temperature} C)") for name in names]


def read_gpu(device: torch.device) -> GpuClock | None:
    """Return the clock of a GPU, or None where NVML is missing or does not tell (as of a slice of a GPU)."""
    if device.type != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        return None

    # by its UUID: CUDA_VISIBLE_DEVICES gives CUDA other numbers than NVML has
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    try:
        pynvml.nvmlInit()
        gpu = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        temperature = pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU)
        mask = pynvml.nvmlDeviceGetCurrentClocksEventReasons(gpu)
        return GpuClock(
            index=pynvml.nvmlDeviceGetIndex(gpu),
            clock=pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM),
            highest_clock=pynvml.nvmlDeviceGetMaxClockInfo(gpu, pynvml.NVML_CLOCK_SM),
            temperature=temperature,
            reasons=name_reasons(mask, temperature),
        )
    except (pynvml.NVMLError, AttributeError):  # no driver, no such GPU, or an NVML without these calls
        return None


def describe_gpu(gpu: GpuClock) -> str:
    clock = f"GPU {gpu.index} runs at {gpu.clock:,} of {gpu.highest_clock:,} MHz"
    if gpu.reasons:
        return f"{clock}, throttled by {' and '.join(gpu.reasons)}"
    return f"{clock}, not throttled: look at what else runs on this machine"


def where_to_look(device: torch.device) -> str:
    """Return what to do where nothing is known of the GPU."""
    if device.type == "cuda":
        return "look at nvidia-smi -q -d PERFORMANCE, or at what else runs on this machine"
    return "look at what else runs on this machine"


class StepRate(TrainerCallback):
    """Watch the seconds that `trainer.throughput` counts."""

    def __init__(self, trainer: SFTTrainer) -> None:
        self.trainer = trainer
        self.seconds = 0.0  # of the throughput, at the last step
        self.positions = 0
        self.steps = 0
        self.step_rates: deque[float] = deque(maxlen=WINDOW)
        self.step_seconds: deque[float] = deque(maxlen=WINDOW)
        self.fastest = Pace(rate=0, seconds=0)
        self.alarm_step: int | None = None  # of the last alarm, None if the rate has recovered

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.record_step()
        if len(self.step_rates) < WINDOW:
            return
        # of an even number the faster middle: a window that is half slow is not slow yet
        rate = statistics.median_high(self.step_rates)
        seconds = statistics.median_low(self.step_seconds)
        pace = Pace(rate=rate, seconds=seconds)
        if pace.rate > self.fastest.rate:
            self.fastest = pace
        if pace.rate > RECOVERED * self.fastest.rate:
            self.alarm_step = None
        if self.is_alarm(pace):
            self.alarm_step = self.steps
            self.print_alarm(pace, args, state)

    def record_step(self) -> None:
        """Keep the rate of the step that ends. The device's work that the last log waited for counts as part of it."""
        throughput = self.trainer.throughput
        throughput.end_step()
        seconds = throughput.total_seconds - self.seconds
        positions = throughput.total_positions - self.positions
        self.seconds = throughput.total_seconds
        self.positions = throughput.total_positions
        self.steps += 1
        self.step_rates.append(positions / seconds)
        self.step_seconds.append(seconds)

    def is_alarm(self, pace: Pace) -> bool:
        """Return whether the last steps are slow, without an alarm for the same fall in the last 500 steps."""
        if self.steps <= 2 * WINDOW:
            return False
        if self.alarm_step is not None and self.steps - self.alarm_step < REPEAT_AFTER:
            return False
        has_longer_steps = FALLEN * pace.seconds > self.fastest.seconds
        has_lower_rate = pace.rate < FALLEN * self.fastest.rate
        return has_longer_steps and has_lower_rate

    def print_alarm(self, pace: Pace, args: TrainingArguments, state: TrainerState) -> None:
        """Print one line on the main process, and one of every rank whose GPU is throttled."""
        gpu = read_gpu(args.device)
        is_throttled = gpu is not None and len(gpu.reasons) > 0
        if not state.is_world_process_zero and not is_throttled:
            return
        cause = where_to_look(args.device)
        if gpu is not None:
            cause = describe_gpu(gpu)
        rank = ""
        if args.world_size > 1:
            rank = f"rank {args.process_index}: "
        fall = 1 - pace.rate / self.fastest.rate
        speed = f"steps take {pace.seconds:.3g} s, {self.fastest.seconds:.3g} s before (tokens/s fell by {fall:.0%})"
        tqdm.write(f"{recipe_name()}: {rank}{speed}: {cause}")  # above the bar, where there is one
        sys.stdout.flush()
