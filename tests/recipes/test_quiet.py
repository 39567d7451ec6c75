"""Library messages: those named in quiet.py are left out, everything else still shows, and files get no bars."""

import warnings
from pathlib import Path

import pytest
import transformers
from hooks.quiet import LOGGED, WARNINGS, silence

from tests.helpers.engines import ENGINES
from tests.helpers.engines import run as start
from tests.helpers.runs import REPO, TINY, launch

NEW = """
import logging
import warnings
from transformers import TrainerCallback


class Probe(TrainerCallback):
    def __init__(self, trainer):
        pass

    def on_train_begin(self, args, state, control, **_):
        warnings.warn("something nobody has seen before")
        warnings.warn("`is_gradient_checkpointing_too` is deprecated", FutureWarning)
        logging.getLogger("transformers.trainer_utils").warning("a checkpoint is gone")
        logging.getLogger("DeepSpeed").warning("no accelerator")
"""
RECIPES = sorted(path.stem for path in (REPO / "recipes").glob("*.py") if path.stem != "qwen3_apo")  # it trains pairs
PACKS_OFF = ["--assistant_only_loss", "true", "--padding_free", "false"]  # step35_sft.py on rows of messages


def unexpected(stderr):
    return [line for line in stderr.splitlines() if line.strip()]


def run(demo, folder, recipe, *flags, config="cpu"):
    given = ["--model_name_or_path", demo / "init", "--dataset_name", demo / "rows" / "chat", "--output_dir", folder]
    given += ["--chat_template_path", REPO / "chat_templates" / "qwen3.jinja", *TINY]
    done = launch(REPO / "recipes" / f"{recipe}.py", *given, *flags, config=config)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_a_log_file_holds_no_library_messages_but_new_ones(demo, hook, tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONWARNINGS", raising=False)  # the Makefile's would hide every warning
    saves = ["--save_strategy", "steps", "--save_steps", 1, "--save_total_limit", 1, "--max_steps", 3]
    done = run(demo, tmp_path / "run", "qwen3_qlora", *saves, *hook(NEW))
    lines = [line for line in unexpected(done.stderr) if not line.startswith("  ")]  # the source line of a warning
    new = ["something nobody has seen before", "`is_gradient_checkpointing_too` is deprecated", "a checkpoint is gone"]
    assert len(lines) == len(new), done.stderr
    assert all(words in line for words, line in zip(new, lines, strict=True))
    assert "[WARNING]" in done.stdout and "no accelerator" in done.stdout and "Setting acc" not in done.stdout
    assert "\r" not in done.stderr and "it/s" not in done.stdout


@pytest.mark.long
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("engine", ["one", "ddp", "zero3"])
def test_every_recipe(demo, tmp_path, recipe, engine):
    flags = ["--model_name_or_path", demo / "init", "--dataset_name", demo / "rows" / "chat", "--output_dir", tmp_path]
    flags += ["--chat_template_path", REPO / "chat_templates" / "qwen3.jinja", *TINY]
    flags += ["--eos_token", "<|im_end|>", "--per_device_train_batch_size", 1]
    flags += PACKS_OFF if recipe == "step35_sft" else []
    if (recipe, engine) == ("qwen3_qlora", "zero3"):
        pytest.skip("refused: 4-bit weights under ZeRO-3")
    if engine == "zero3" and "optimizer=" in (REPO / "recipes" / f"{recipe}.py").read_text():
        pytest.skip("refused: Muon under ZeRO")
    done = start(ENGINES[engine].command(recipe, *flags))
    # torch says that DDP looks for unused weights, to no avail: --ddp_find_unused_parameters false would end it
    lines = [line for line in unexpected(done.stderr) if "find_unused_parameters=True was specified" not in line]
    assert lines == []
    assert done.stdout.count("Setting accelerator to CPU") == (engine == "zero3")  # accelerate's launcher, once


SOURCES = {
    "`is_gradient_checkpointing` is deprecated": "transformers/modeling_utils.py",
    "Paged optimizers are not supported on CPU": "bitsandbytes/optim/optimizer.py",
    "`torch.distributed.all_gather_into_tensor` is deprecated": "torch/distributed/distributed_c10d.py",
    "`torch.distributed.reduce_scatter_tensor` is deprecated": "torch/distributed/distributed_c10d.py",
    "`use_liger_kernel=True` is deprecated": "trl/trainer/sft_trainer.py",
    "Gradient accumulation steps mismatch: GradientAccumulationPlugin has 1,": "accelerate/accelerator.py",
    "Setting accelerator to CPU.": "deepspeed/accelerator/real_accelerator.py",
    "`pad_token` is deprecated": "trl/trainer/sft_config.py",
    "Failed to load CPU gemm_4bit_forward": "bitsandbytes/backends/cpu/ops.py",
    "You are using a per_device_train_batch_size of 1 with padding-free training.": "trl/trainer/sft_trainer.py",
    "mtime may not be reliable on this filesystem": "transformers/trainer_utils.py",
}


def test_every_name_is_one_that_the_pinned_libraries_use():
    """An update that drops a message drops its name here."""
    libraries = Path(transformers.__file__).parents[1]
    logged = {beginning for beginnings in LOGGED.values() for beginning in beginnings}
    assert SOURCES.keys() == {*WARNINGS, *logged}
    for words, path in SOURCES.items():
        assert words.removesuffix("1,") in (libraries / path).read_text(), words


def test_only_the_beginning_of_a_message_counts():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        silence()
        warnings.warn("Paged optimizers are not supported on CPU. Falling back to", UserWarning, stacklevel=1)
        warnings.warn("I say: Paged optimizers are not supported on CPU", UserWarning, stacklevel=1)
        warnings.warn("Paged optimizers are not supported", UserWarning, stacklevel=1)
    assert [str(warning.message)[:5] for warning in caught] == ["I say", "Paged"]
