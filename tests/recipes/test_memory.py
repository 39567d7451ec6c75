"""When memory runs out: every kind of such an error is known, and the suggestions carry this run's own numbers.

Breaks tried, each seen red: a saving of another rung; a prediction that fails and takes the ladder with it; offloading
offered on a CPU.
"""

import json
import re
import sys

import pytest
import torch
from hooks import memory, resume_rules
from hooks.checks.fit import Gpu
from hooks.memory import explain, ran_out_of_memory, suggestions
from hooks.refusals import Refusals

from data_prep.common.gpu_configs import load_config
from data_prep.common.gpu_memory import GIB
from eval import fit
from tests.helpers.runs import REPO, parse

RAISES = """
import torch
from transformers import TrainerCallback
class Probe(TrainerCallback):
    def __init__(self, trainer):
        pass
    def on_step_end(self, args, state, control, **_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB")
"""
TRAINING = ["main", "train", "training_step"]
EVALUATION = ["main", "train", "evaluate", "prediction_step"]
LOADING = ["main", "__init__", "from_pretrained"]


@pytest.fixture
def suggest(tmp_path):
    """suggest(recipe, *flags) returns what is suggested to such a run, with these functions on the stack."""

    def suggest(recipe, *flags, frames=TRAINING):
        arguments = parse(recipe, "--output_dir", str(tmp_path / "none"), *flags)
        return suggestions(*arguments, frames)

    return suggest


def test_the_tutorials_order_with_this_runs_numbers(suggest):
    flags = ["--per_device_train_batch_size", "4", "--global_batch_size", "32", "--lora_r", "64", "--lora_alpha", "128"]
    found = suggest("qwen3_qlora", *flags, "--per_device_eval_batch_size", "8")
    assert [(suggestion.flags, suggestion.value_now) for suggestion in found] == [
        ("--max_length 1024", "2048"),
        ("--per_device_train_batch_size 1", "4"),
        ("--lora_r 16 --lora_alpha 32", "64, 128"),
        ("--per_device_eval_batch_size 1", "8"),
    ]
    assert "accumulation becomes 32 (now 8)" in found[1].reason and "stays 32" in found[1].reason


def flags_of(found):
    return [suggestion.flags for suggestion in found]


def test_only_suggestions_that_are_left(suggest):
    flags = ["--max_length", "256", "--lora_r", "8", "--eval_strategy", "no"]
    assert suggest("qwen3_qlora", *flags) == []
    assert flags_of(suggest("qwen3_qlora", *flags[:4])) == ["--eval_steps 40"]
    full = suggest("qwen3_full", *flags[:2], "--eval_strategy", "no", "--optim", "adamw_torch")
    assert flags_of(full) == ["--optim paged_adamw_8bit", "recipes/qwen3_lora.py"]
    first = suggest("qwen3_qlora", "--activation_checkpointing", "false")[0]
    assert first.flags == "--activation_checkpointing true"


def test_dropout_after_shorter_rows(suggest):
    found = suggest("qwen3_qlora", "--lora_dropout", "0.05", "--per_device_train_batch_size", "2")
    assert flags_of(found)[:3] == ["--max_length 1024", "--lora_dropout 0", "--per_device_train_batch_size 1"]
    assert found[1].value_now == "0.05" and "a mask and an input" in found[1].reason
    assert "--lora_dropout 0" not in flags_of(suggest("qwen3_qlora", "--lora_dropout", "0"))
    assert "--lora_dropout 0" not in flags_of(suggest("qwen3_full", "--lora_dropout", "0.05"))  # has no adapters
    for frames in (EVALUATION, LOADING):  # it does not act there
        assert "--lora_dropout 0" not in flags_of(suggest("qwen3_qlora", "--lora_dropout", "0.05", frames=frames))


def test_an_evaluation_that_does_not_fit(suggest):
    found = suggest("qwen3_qlora", "--per_device_eval_batch_size", "4", frames=EVALUATION)
    assert found[0].flags == "--per_device_eval_batch_size 1"
    assert suggest("qwen3_qlora", frames=EVALUATION)[0].flags == "--eval_strategy no"


def test_weights_that_do_not_fit(suggest):
    assert flags_of(suggest("qwen3_qlora", frames=LOADING)) == ["--model_name_or_path SMALLER"]
    found = suggest("qwen3_full", "--dtype", "float32", frames=LOADING)
    assert flags_of(found) == ["--dtype bfloat16", "recipes/qwen3_qlora.py", "--model_name_or_path SMALLER"]
    found = suggest("qwen3_lora", frames=LOADING)
    assert flags_of(found) == ["--load_in_4bit true", "--model_name_or_path SMALLER"]


def test_every_flag_is_one_that_the_recipe_takes(suggest):
    long = ["--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "4", "--lora_r", "64"]
    for recipe, extra in (
        ("qwen3_qlora", ["--activation_checkpointing", "false", "--lora_dropout", "0.05"]),
        ("qwen3_full", []),
    ):
        found = flags_of(suggest(recipe, *long, *extra))
        words = [word for flags in found for word in flags.split() if not flags.startswith("recipes/")]
        assert len(words) > 6
        left = set(flags_of(suggest(recipe, *long, *extra, *words)))
        assert left & set(found) <= {"recipes/qwen3_lora.py"}  # one that is taken is not offered again


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
def test_what_counts_as_memory(error, memory):
    assert ran_out_of_memory(error) is memory
    wrapped = ValueError("batch 3")
    wrapped.__cause__ = error
    assert ran_out_of_memory(wrapped) is memory


def test_a_cpu_that_really_cannot():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert ran_out_of_memory(caught.value)


def test_lines_of_a_run_that_can_save(tmp_path, monkeypatch):
    flags = ["--eval_strategy", "no", "--lora_r", "8", "--output_dir", str(tmp_path)]
    arguments = parse("qwen3_qlora", *flags)
    short = parse("qwen3_qlora", *flags, "--max_length", "256")
    (tmp_path / "checkpoint-3").mkdir()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert explain(*arguments, TRAINING) == [
        "rank 1: memory ran out. In this order, one more at a time:",
        "  1. --max_length 1024  now 2048: fewer activations; longer rows are truncated",
        "Each makes another run, which starts afresh: pass another --output_dir.",
    ]
    event = explain(*short, TRAINING)[0]
    assert event.startswith("rank 1: memory ran out, and no setting that saves some is left: ")


@pytest.fixture
def on_gpu(monkeypatch):
    """The ladder of a run on a GPU; the model's shapes are known, as its config.json is read before it is trained."""
    monkeypatch.setattr(memory, "find_gpu", lambda _: Gpu("NVIDIA L4", 22.0))
    monkeypatch.setattr(memory, "load_config", lambda _, model_args: load_config(model_args.model_name_or_path).config)


def test_on_a_gpu_each_rung_says_what_eval_fit_predicts(on_gpu, tmp_path, capsys):
    """The oracle is the command, with the flags of the rung."""
    model = ["--model_name_or_path", "Qwen/Qwen3-0.6B"]
    attention = ["--attn_implementation", "flash_attention_2"]
    arguments = parse("qwen3_qlora", *model, *attention, "--lora_r", "32", "--output_dir", str(tmp_path))
    arguments[1].use_liger_kernel = True  # parsed on a CPU
    lines = explain(*arguments, TRAINING)

    def peak(*flags):
        words = [str(REPO / "recipes" / "qwen3_qlora.py"), "--gpu", "rtx4090", "--json", *model, *attention]
        assert fit.main([*words, "--lora_r", "32", *flags]) == 0
        return json.loads(capsys.readouterr().out)["peak_bytes"] / GIB

    before = peak()
    rungs = {line.split(". ")[1].split("  ")[0]: line for line in lines if "saves" in line}
    assert list(rungs) == ["--max_length 1024", "--lora_r 16 --lora_alpha 16", "--activation_offloading true"]
    for flags, line in rungs.items():
        saved, total = map(float, re.search(r"saves (\S+) of (\S+) GiB, predicted", line).groups())
        assert total == pytest.approx(before, abs=0.006)
        assert saved == pytest.approx(before - peak(*flags.split()), abs=0.006), line
    assert "--eval_steps 40" in lines[-2] and "saves" not in lines[-2]


def test_a_ladder_without_a_prediction(on_gpu, tmp_path):
    """As of a compiled set, whose length is open."""
    compiled = ["--config", str(REPO / "recipes" / "configs" / "compiled.yaml")]
    lines = explain(*parse("qwen3_qlora", *compiled, "--output_dir", str(tmp_path)), TRAINING)
    assert len(lines) > 3 and "saves" not in " ".join(lines)


def test_which_suggestions_a_checkpoint_goes_on_with(tmp_path):
    """Numbers of those that a resume takes; the tables of resume_rules.py agree."""
    flags = ["--per_device_train_batch_size", "2", "--lora_dropout", "0.1", "--output_dir", str(tmp_path)]
    arguments = parse("qwen3_qlora", *flags, "--activation_checkpointing", "false")
    *lines, last = explain(*arguments, TRAINING)
    assert last.startswith(f"{tmp_path} holds this try and no checkpoint: ")
    (tmp_path / "checkpoint-3").mkdir()
    *lines, last = explain(*arguments, TRAINING)
    assert [line.split()[1] for line in lines[1:]] == [
        "--activation_checkpointing",
        "--max_length",
        "--lora_dropout",
        "--per_device_train_batch_size",
        "--lora_r",
        "--eval_steps",
    ]
    assert last == (
        "--resume_from_checkpoint true goes on from the newest checkpoint with 1, 3 (with --allow lora_dropout), 4, 6; "
        "the others make another run, which starts afresh: pass another --output_dir."
    )
    loadable = resume_rules.FREE | resume_rules.ROUNDING
    for suggestion in suggestions(*arguments, TRAINING):
        name = suggestion.flags.split()[0].removeprefix("--")
        assert (suggestion.flags_on_resume == "") == (name in loadable), name


def test_printed_once_after_the_traceback(run_recipe, hook, capsys):
    with pytest.raises(torch.OutOfMemoryError) as caught:
        run_recipe("qwen3_qlora", "--max_length", 2048, *hook(RAISES))
    sys.excepthook(caught.type, caught.value, caught.tb)  # as the interpreter would
    after = capsys.readouterr().err.split("OutOfMemoryError: CUDA out of memory. Tried 2 GiB\n", 1)[1]
    assert after.startswith("memory ran out. In this order, one more at a time:\n")
    assert "  1. --max_length 1024 " in after and "now 2048: " in after and after.count("memory ran out") == 1
    assert "/run holds this try and no checkpoint: with --resume_from_checkpoint true" in after


def test_silent_for_other_errors(tmp_path, capsys):
    refusals = Refusals(*parse("qwen3_qlora", "--output_dir", str(tmp_path)))
    for error, lines in ((RuntimeError("a bug"), 0), (MemoryError(), 1)):
        refusals.show(type(error), error, None)
        assert capsys.readouterr().err.count("memory ran out") == lines
