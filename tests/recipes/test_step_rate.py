"""Steps that become slower and stay so: one line, with the clock that a stand-in for NVML gives, and none otherwise.

Steps take 0.98 s and then 1.32 s, as long as tokens/s fall by 1 - 0.98 / 1.32 = 26%. Of the last 20 steps 11 have to be
slow before their median is, so that a fall after step 60 is an alarm at step 71.
"""

import random
import re
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hooks.step_rate import StepRate, name_reasons, read_gpu
from hooks.throughput import Throughput

FAST = 0.98
SLOW = 1.32
UUID = "6a2fcd34-1b5e-4a58-9c9d-0d5c1f0e7a11"
SPEED = "steps take 1.32 s, 0.98 s before (tokens/s fell by 26%)"


class Run:
    """Steps of a trainer on a clock of its own; `printed` holds (step, line)."""

    def __init__(self, monkeypatch, capsys, device="cuda:0", rank=0, world_size=1):
        self.now = 0.0
        monkeypatch.setattr("hooks.throughput.time.perf_counter", lambda: self.now)
        monkeypatch.setattr(sys, "argv", ["recipes/x.py"])
        args = SimpleNamespace(device=torch.device("cpu"), pad_to_multiple_of=None)
        self.trainer = SimpleNamespace(args=args, train_dataset=None)
        self.trainer.throughput = Throughput(self.trainer)
        self.args = SimpleNamespace(device=torch.device(device), process_index=rank, world_size=world_size)
        self.state = SimpleNamespace(is_world_process_zero=rank == 0)
        self.callback = StepRate(self.trainer)
        self.capsys = capsys
        self.steps = 0
        self.printed = []

    def step(self, seconds, positions=1000, pause=50.0, log_wait=0.0):
        """One step; before it an evaluation of `pause` seconds, after it a log that waits for the device."""
        self.now += pause
        self.trainer.throughput.start_step()
        ids = torch.zeros(1, positions, dtype=torch.int64)
        self.trainer.throughput.count([{"input_ids": ids, "labels": ids}])
        self.now += seconds
        self.callback.on_step_end(self.args, self.state, None)
        self.steps += 1
        self.printed += [(self.steps, line) for line in self.capsys.readouterr().out.splitlines()]
        if log_wait:
            self.now += log_wait
            self.trainer.throughput.figures()

    def run(self, *parts):
        """(number of steps, seconds of each) one after the other."""
        for number, seconds in parts:
            for _ in range(number):
                self.step(seconds)
        return self.printed


@pytest.fixture
def start(monkeypatch, capsys):
    return lambda **kwargs: Run(monkeypatch, capsys, **kwargs)


@pytest.fixture
def nvml(monkeypatch):
    """A stand-in for pynvml with one GPU, whose state is `nvml.gpu`; CUDA knows its UUID."""
    module = ModuleType("pynvml")
    module.gpu = {"index": 0, "clock": 1230, "highest": 2520, "temperature": 87, "reasons": 0x40 | 0x8}
    module.NVMLError = type("NVMLError", (Exception,), {})
    module.NVML_CLOCK_SM = 1
    module.NVML_TEMPERATURE_GPU = 0
    module.nvmlInit = lambda: None

    def handle(uuid):
        if uuid != f"GPU-{UUID}":
            raise module.NVMLError(uuid)
        return "handle"

    def of(name, *selector):
        def read(*arguments):
            assert arguments == ("handle", *selector)
            return module.gpu[name]

        return read

    module.nvmlDeviceGetHandleByUUID = handle
    module.nvmlDeviceGetIndex = of("index")
    module.nvmlDeviceGetClockInfo = of("clock", 1)
    module.nvmlDeviceGetMaxClockInfo = of("highest", 1)
    module.nvmlDeviceGetTemperature = of("temperature", 0)
    module.nvmlDeviceGetCurrentClocksEventReasons = of("reasons")
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=UUID))
    return module


@pytest.fixture
def no_nvml(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)


def test_throttled(start, nvml):
    nvml.gpu["reasons"] = 0x40
    cause = "GPU 0 runs at 1,230 of 2,520 MHz, throttled by temperature (87 C)"
    assert start().run((60, FAST), (300, SLOW)) == [(71, f"x.py: {SPEED}: {cause}")]


def test_not_throttled(start, nvml):
    nvml.gpu |= {"index": 5, "clock": 2505, "reasons": 0x1}  # idle is no cause
    cause = "GPU 5 runs at 2,505 of 2,520 MHz, not throttled: look at what else runs on this machine"
    assert start().run((60, FAST), (40, SLOW)) == [(71, f"x.py: {SPEED}: {cause}")]


@pytest.mark.parametrize("device", ["cuda:0", "cpu"])
def test_without_nvml(start, no_nvml, device):
    cause = "look at nvidia-smi -q -d PERFORMANCE, or at what else runs on this machine"
    if device == "cpu":
        cause = "look at what else runs on this machine"
    assert start(device=device).run((60, FAST), (40, SLOW)) == [(71, f"x.py: {SPEED}: {cause}")]


def test_nvml_that_does_not_know_the_gpu(nvml, monkeypatch):
    device = torch.device("cuda:0")
    assert read_gpu(device).clock == 1230
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="a slice"))
    assert read_gpu(device) is None
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=UUID))
    monkeypatch.delattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons")  # of an old NVML
    assert read_gpu(device) is None
    assert read_gpu(torch.device("cpu")) is None


def test_every_rank_looks_at_its_own_gpu(start, nvml):
    """Rank 3 speaks only of a throttled GPU, and names itself; rank 0 speaks anyway."""
    nvml.gpu |= {"index": 3, "reasons": 0x4}
    cause = "GPU 3 runs at 1,230 of 2,520 MHz, throttled by the power limit"
    printed = start(rank=3, world_size=4).run((60, FAST), (40, SLOW))
    assert printed == [(71, f"x.py: rank 3: {SPEED}: {cause}")]
    nvml.gpu["reasons"] = 0x1
    assert start(rank=3, world_size=4).run((60, FAST), (40, SLOW)) == []
    assert start(rank=0, world_size=4).run((60, FAST), (40, SLOW))[0][1].startswith(f"x.py: rank 0: {SPEED}: GPU 3 ")


def test_silent_ranks_without_nvml(start, no_nvml):
    assert start(rank=1, world_size=2).run((60, FAST), (40, SLOW)) == []


def test_again_after_a_recovery(start, no_nvml):
    """Back to the old rate and slow again: a new alarm, at the 11th of its steps."""
    assert [step for step, _ in start().run((60, FAST), (30, SLOW), (30, FAST), (30, SLOW))] == [71, 131]


def test_a_little_better_is_no_recovery(start, no_nvml):
    """85% of the old rate is no alarm by itself; the fall after it is the first one's."""
    assert [step for step, _ in start().run((60, FAST), (30, SLOW), (30, FAST / 0.85), (30, SLOW))] == [71]
    assert start().run((60, FAST), (300, FAST / 0.85)) == []


def test_again_after_500_steps(start, no_nvml):
    assert [step for step, _ in start().run((60, FAST), (1100, SLOW))] == [71, 571, 1071]


def test_the_first_steps(start, no_nvml):
    """No alarm before the last 20 steps have 20 before them; slow first steps, as of a compiler, are no measure."""
    assert [step for step, _ in start().run((20, FAST), (21, SLOW))] == [41]
    assert start().run((15, 9.0), (100, FAST)) == []


def test_the_reference_is_the_fastest_window(start, no_nvml):
    """Slow, fast, slow: the last is compared with the second, not with the first."""
    assert [step for step, _ in start().run((60, SLOW), (60, FAST), (40, SLOW))] == [131]


def test_longer_and_shorter_rows(start, no_nvml):
    """Twice the tokens in twice the time are no alarm, nor are few tokens in the time that every step costs."""
    run = start()
    for seconds, positions in ((1.0, 1000), (2.0, 2000), (0.9, 300), (1.0, 1000)):
        for _ in range(60):
            run.step(seconds, positions)
    assert run.printed == []


def test_one_slow_step_is_none(start, no_nvml):
    """A step in ten takes five times as long: it saves, compiles, or finds the disk busy."""
    assert start().run(*[(9, FAST), (1, 5 * FAST)] * 30) == []


def test_what_the_log_waits_for_counts(start, no_nvml):
    """The device finishes a step while the log waits: 0.2 s of each, and of slow ones 0.54 s more."""
    run = start()
    for _ in range(60):
        run.step(FAST - 0.2, log_wait=0.2)
    for _ in range(40):
        run.step(FAST - 0.2, log_wait=SLOW - FAST + 0.2)
    assert [line for _, line in run.printed] == [
        f"x.py: {SPEED}: look at nvidia-smi -q -d PERFORMANCE, or at what else runs on this machine"
    ]


@pytest.mark.parametrize("fixed", [0, 0.5, 1])
@pytest.mark.parametrize("seed", range(3))
def test_noise_is_no_alarm(start, no_nvml, seed, fixed):
    """2,000 healthy steps: rows vary by 25%, times by 10%; `fixed`: the share of a step that no row makes longer."""
    rng = random.Random(seed)
    run = start()
    for _ in range(2000):
        positions = max(100, round(rng.gauss(1000, 250)))
        seconds = fixed + (1 - fixed) * positions / 1000
        run.step(seconds * rng.lognormvariate(0, 0.1), positions)
    assert run.printed == []


@pytest.mark.parametrize("fixed", [0, 0.5, 1])
def test_a_fall_in_noise_is_one(start, no_nvml, fixed):
    """The same rows, with times that vary by 5% and are 1.35 times as long from step 201 on."""
    rng = random.Random(0)
    run = start()
    for step in range(1, 301):
        positions = max(100, round(rng.gauss(1000, 250)))
        seconds = (fixed + (1 - fixed) * positions / 1000) * rng.lognormvariate(0, 0.05)
        run.step(seconds * 1.35 if step > 200 else seconds, positions)
    assert len(run.printed) == 1 and 205 < run.printed[0][0] < 250


def test_in_a_run(run_recipe, hook, capsys):
    """From step 31 on the steps of a real run take twice as long."""
    slow = """
import time
from transformers import TrainerCallback
class Slow(TrainerCallback):
    def __init__(self, trainer):
        self.throughput = trainer.throughput
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 30:
            self.seconds = self.throughput.total_seconds / 30
        if state.global_step >= 30:
            time.sleep(self.seconds)
"""
    run_recipe("qwen3_full", "--max_steps", 46, "--global_batch_size", 1, "--logging_steps", 10, *hook(slow))
    lines = re.findall(r"^qwen3_full.py: steps take (.*) s, (.*) s before \(.*\): (.*)$", capsys.readouterr().out, re.M)
    assert lines and float(lines[0][0]) > float(lines[0][1])
    assert lines[0][2] == "look at what else runs on this machine"


def test_reasons():
    assert name_reasons(0, 50) == name_reasons(0x1, 50) == []
    assert name_reasons(0x1 | 0x4 | 0x20 | 0x40, 91) == ["the power limit", "temperature (91 C)"]
    assert name_reasons(0x200 | 0x80, 50) == ["the power brake", "reason 0x200"]
