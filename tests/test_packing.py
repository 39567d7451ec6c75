"""Packed equals unpacked: the same documents give the same loss and gradients, packed (bfd) or one to a row.

The oracle is the unpacked run, in which no document can see another. `wrapped` packing lets documents see each other
and must fail the same comparison, else the comparison sees nothing.
"""

import json

import pytest
import torch
from conftest import EXACT

GRADIENTS = """
from pathlib import Path
import torch
from transformers import TrainerCallback
class Probe(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        torch.save(grads, args.output_dir + "/gradients.pt")
def callback(trainer):
    Path(trainer.args.output_dir, "rows").write_text(str(len(trainer.train_dataset)))
    return Probe()
"""


def first_step(run_recipe, hook, recipe, out, rows, *flags):
    """(loss, all gradients as one vector, rows or packs) of one optimizer step over all `rows`, not clipped."""
    fixed = ["--dataset_name", rows, "--eval_rows", "0", "--max_steps", "1", "--max_grad_norm", "1e9"]
    folder = run_recipe(recipe, *EXACT, *hook(GRADIENTS), *fixed, *flags, out=out)
    loss = json.loads((folder / "log.jsonl").read_text().splitlines()[0])["loss"]
    gradients = torch.load(folder / "gradients.pt")
    gradient = torch.cat([gradients[name].flatten().double() for name in sorted(gradients)])
    return loss, gradient, int((folder / "rows").read_text())


@pytest.fixture
def sixteen(demo, tmp_path):
    """Sixteen documents short enough that packing them into 1,024 tokens cuts none."""
    from datasets import load_from_disk
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo / "init")
    rows = [row for row in load_from_disk(demo / "rows" / "chat")["train"] if not row.get("tools")]
    rows = [row for row in rows if len(tokenizer(str(row["messages"]))["input_ids"]) < 300][:16]
    assert len(rows) == 16
    path = tmp_path / "sixteen.jsonl"
    path.write_text("".join(json.dumps({"messages": row["messages"]}) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("recipe", ["qwen3_full", "qwen3_qlora"])
def test_packed_equals_unpacked(run_recipe, hook, sixteen, recipe):
    unpacked = ["--packing", "false", "--global_batch_size", 16, "--per_device_train_batch_size", 4]
    loss, gradient, count = first_step(run_recipe, hook, recipe, "rows", sixteen, *unpacked)

    def difference(out, strategy, packs):
        packed = ["--packing_strategy", strategy, "--max_length", 1024, "--global_batch_size", packs]
        other = first_step(run_recipe, hook, recipe, out, sixteen, *packed)
        assert other[2] < 16, "nothing was packed"
        return abs(other[0] - loss), ((other[1] - gradient).norm() / gradient.norm()).item()

    assert count == 16 and gradient.norm() > 1e-3
    packs = 16  # more than there are: one step takes them all
    loss_gap, gradient_gap = difference("bfd", "bfd", packs)
    assert loss_gap <= 1e-5 and gradient_gap <= 1e-5
    loss_gap, gradient_gap = difference("wrapped", "wrapped", packs)
    assert gradient_gap > 1e-3, "wrapped packing leaks between documents, and this test did not see it"
