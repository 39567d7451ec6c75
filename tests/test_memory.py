"""When memory runs out: every kind of such an error is known, and the ladder carries this run's own numbers."""

import runpy
import sys

import pytest
import torch
from conftest import REPO

HOOK = REPO / "recipes" / "hooks" / "memory.py"
RAISES = """
import torch
from transformers import TrainerCallback
class Probe(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB")
def callback(trainer):
    return Probe()
"""


@pytest.fixture
def parsed(monkeypatch, tmp_path):
    """parsed(recipe, *flags) returns the rungs of such a run for given functions on the stack."""

    def parse(recipe, *flags, frames=("main", "train", "training_step"), run=True):
        monkeypatch.setattr(sys, "argv", ["x", "--use_cpu", "true", "--output_dir", str(tmp_path / "none"), *flags])
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        module = runpy.run_path(str(HOOK))
        script, args, model = runpy.run_path(str(REPO / "recipes" / f"{recipe}.py"))["parse_args"]()
        return module["rungs"](script, args, model, frames) if run else (script, args, model)

    return parse


def test_the_tutorials_order_with_this_runs_numbers(parsed):
    flags = ["--per_device_train_batch_size", "4", "--global_batch_size", "32", "--lora_r", "64", "--lora_alpha", "128"]
    found = parsed("qwen3_qlora", *flags, "--per_device_eval_batch_size", "8")
    assert [(flags, str(now)) for flags, now, _ in found] == [
        ("--max_length 1024", "2048"),
        ("--per_device_train_batch_size 1", "4"),
        ("--lora_r 16 --lora_alpha 32", "64, 128"),
        ("--per_device_eval_batch_size 1", "8"),
    ]
    assert "accumulation becomes 32 (now 8)" in found[1][2] and "stays 32" in found[1][2]


def test_only_rungs_that_are_left(parsed):
    flags = ["--max_length", "256", "--lora_r", "8", "--eval_strategy", "no"]
    assert parsed("qwen3_qlora", *flags) == []
    assert [rung[0] for rung in parsed("qwen3_qlora", *flags[:4])] == ["--eval_steps 40"]
    full = [rung[0] for rung in parsed("qwen3_full", *flags[:2], "--eval_strategy", "no", "--optim", "adamw_torch")]
    assert full == ["--optim paged_adamw_8bit", "recipes/qwen3_lora.py"]
    assert parsed("qwen3_qlora", "--activation_checkpointing", "false")[0][0] == "--activation_checkpointing true"


def test_an_evaluation_that_does_not_fit(parsed):
    frames = ("main", "train", "evaluate", "prediction_step")
    assert parsed("qwen3_qlora", "--per_device_eval_batch_size", "4", frames=frames)[0][0].endswith("eval_batch_size 1")
    assert parsed("qwen3_qlora", frames=frames)[0][0] == "--eval_strategy no"


def test_weights_that_do_not_fit(parsed):
    frames = ("main", "__init__", "from_pretrained")
    assert [rung[0] for rung in parsed("qwen3_qlora", frames=frames)] == ["--model_name_or_path SMALLER"]
    found = [rung[0] for rung in parsed("qwen3_full", "--dtype", "float32", frames=frames)]
    assert found == ["--dtype bfloat16", "recipes/qwen3_qlora.py", "--model_name_or_path SMALLER"]


def test_every_flag_is_one_that_the_recipe_takes(parsed):
    long = ["--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "4", "--lora_r", "64"]
    for recipe, more in (("qwen3_qlora", ["--activation_checkpointing", "false"]), ("qwen3_full", [])):
        found = parsed(recipe, *long, *more)
        flags = [word for rung in found for word in rung[0].split() if not rung[0].startswith("recipes/")]
        assert len(flags) > 6
        now = [(rung[0], rung[1]) for rung in parsed(recipe, *long, *more, *flags)]
        again = {flag for flag, _ in now} & {rung[0] for rung in found}  # a rung that is taken is not offered again
        assert again <= {"recipes/qwen3_lora.py"}, again


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: not enough memory: "), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (OSError(28, "No space left on device"), False),
        (RuntimeError("shape '[2, 3]' is invalid for input of size 5"), False),
        (KeyError("out of memory"), False),  # a name in someone's data
    ],
)
def test_what_counts_as_memory(error, memory, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    ran_out = runpy.run_path(str(HOOK))["ran_out"]
    assert ran_out(error) is memory
    wrapped = ValueError("batch 3")
    wrapped.__cause__ = error
    assert ran_out(wrapped) is memory


def test_a_cpu_that_really_cannot(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert runpy.run_path(str(HOOK))["ran_out"](caught.value)


def test_printed_once_after_the_traceback(run_recipe, hook, capsys):
    flags = ["--max_length", 2048, "--hooks", HOOK, *hook(RAISES)[1:]]
    with pytest.raises(torch.OutOfMemoryError) as caught:
        run_recipe("qwen3_qlora", *flags)
    sys.excepthook(caught.type, caught.value, caught.tb)  # as the interpreter would
    after = capsys.readouterr().err.split("OutOfMemoryError: CUDA out of memory. Tried 2 GiB\n", 1)[1]
    assert after.startswith("memory ran out. In this order, one more at a time:\n")
    assert "  1. --max_length 1024 " in after and "now 2048: " in after and after.count("memory ran out") == 1
    assert "/run holds this try: with --resume_from_checkpoint true" in after


def test_silent_for_other_errors(parsed, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(sys, "excepthook", lambda *error: seen.append(error))
    module = runpy.run_path(str(HOOK))
    assert sys.excepthook is module["told"]
    script, args, model = parsed("qwen3_qlora", run=False)
    module["prepare"](script, args, model)
    for error, lines in ((RuntimeError("a bug"), 0), (MemoryError(), 1)):
        module["told"](type(error), error, None)
        assert seen.pop()[1] is error and not seen
        assert capsys.readouterr().err.count("memory ran out") == lines
