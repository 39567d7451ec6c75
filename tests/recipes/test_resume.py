"""Resumed equals uninterrupted, bitwise: losses, weights and optimizer, with dropout, for full, LoRA and QLoRA."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

CASES = {
    "full": ("qwen3_full", []),
    "lora": ("qwen3_qlora", ["--load_in_4bit", "false", "--optim", "adamw_torch", "--lora_dropout", "0.1"]),
    "qlora-adamw": ("qwen3_qlora", ["--optim", "adamw_torch", "--lora_dropout", "0.1"]),
    "qlora-paged-8bit": ("qwen3_qlora", ["--optim", "paged_adamw_8bit", "--lora_dropout", "0.1"]),
}
EVERY = ["--max_steps", 6, "--save_strategy", "steps", "--save_steps", 3, "--eval_strategy", "steps", "--eval_steps", 2]


def losses(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["num_tokens"]) for line in lines if "loss" in line]


def weights(folder):
    return load_file(next(folder.glob("*model.safetensors")))


@pytest.mark.parametrize(
    "case", ["full", "lora", pytest.param("qlora-adamw", marks=pytest.mark.long), "qlora-paged-8bit"]
)
def test_resume_is_bitwise(run_recipe, tmp_path, capsys, case):
    recipe, flags = CASES[case]
    whole = run_recipe(recipe, *flags, *EVERY, out="whole")
    cut = tmp_path / "cut"  # what a run leaves that was killed while it saved step 6
    shutil.copytree(whole, cut)
    for path in cut.iterdir():
        if path.suffix == ".safetensors":
            path.unlink()
    state = cut / "checkpoint-6" / "trainer_state.json"
    state.write_text(state.read_text()[:-20])
    capsys.readouterr()
    run_recipe(recipe, *flags, *EVERY, "--resume_from_checkpoint", "true", out="cut")
    assert "checkpoint-3" in capsys.readouterr().out  # the newest complete one, and it says so
    assert len(losses(whole)) == 6 and losses(cut) == losses(whole)
    before, after = weights(whole), weights(cut)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    start = weights(whole / "checkpoint-3")
    assert any(not torch.equal(start[name], before[name]) for name in before), "nothing was trained after the resume"
    trained = [tensor.dtype for name, tensor in before.items() if "lora" in name or case == "full"]
    assert set(trained) == {torch.float32}
    optimizers = [torch.load(folder / "checkpoint-6" / "optimizer.pt", weights_only=False) for folder in (whole, cut)]
    torch.testing.assert_close(optimizers[0]["state"], optimizers[1]["state"], rtol=0, atol=0)


def test_resume_true_starts_afresh_and_says_so(run_recipe, capsys):
    run_recipe("qwen3_full", "--resume_from_checkpoint", "true", "--max_steps", 1)
    assert re.search(r"^  run .*, from the start$", capsys.readouterr().out, re.M)
