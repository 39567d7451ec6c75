"""Packed equals unpacked: the same documents give the same loss and gradients, packed (bfd) or one to a row.

The oracle is the unpacked run, in which no document can see another. `wrapped` packing lets documents see each other
and must fail the same comparison, else the comparison sees nothing.
"""

import json

import pytest
import torch

from tests.helpers.engines import ENGINES, run
from tests.helpers.runs import EXACT, REPO, TINY

GRADIENTS = """
from pathlib import Path
import torch
from transformers import TrainerCallback


class Probe(TrainerCallback):
    def __init__(self, trainer):
        Path(trainer.args.output_dir, "rows").write_text(str(len(trainer.train_dataset)))

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        gradients = {}
        for name, weight in model.named_parameters():
            if weight.grad is not None:
                whole = weight.grad.full_tensor() if hasattr(weight.grad, "full_tensor") else weight.grad.clone()
                gradients[name.removeprefix("module.")] = whole
        if args.process_index == 0:
            torch.save(gradients, f"{args.output_dir}/gradients.pt")
            Path(args.output_dir, "world").write_text(str(args.world_size))
"""


FIXED = ["--eval_rows", "0", "--max_steps", "1", "--max_grad_norm", "1e9"]


def read(folder):
    """(loss, all gradients as one vector, rows or packs) of the one optimizer step of a run, not clipped."""
    loss = json.loads((folder / "log.jsonl").read_text().splitlines()[0])["loss"]
    gradients = torch.load(folder / "gradients.pt")
    gradient = torch.cat([gradients[name].flatten().double() for name in sorted(gradients)])
    return loss, gradient, int((folder / "rows").read_text())


def difference(one, other):
    return abs(other[0] - one[0]), ((other[1] - one[1]).norm() / one[1].norm()).item()


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


@pytest.fixture
def first_step(run_recipe, hook, sixteen, demo, tmp_path):
    """first_step(recipe, out, *flags, engine=None): one optimizer step over all sixteen documents, here or launched."""

    def step(recipe, out, *flags, engine=None):
        flags = [*EXACT, *hook(GRADIENTS), "--dataset_name", sixteen, *FIXED, *flags]
        if engine is None:
            return read(run_recipe(recipe, *flags, out=out))
        template = REPO / "chat_templates" / "qwen3.jinja"
        data = ["--model_name_or_path", demo / "init", "--chat_template_path", template]
        run(ENGINES[engine].command(recipe, *TINY, *data, *flags, "--output_dir", tmp_path / out))
        assert (tmp_path / out / "world").read_text() == str(ENGINES[engine].processes)
        return read(tmp_path / out)

    return step


UNPACKED = ["--packing", "false", "--global_batch_size", 16, "--per_device_train_batch_size"]
PACKED = ["--packing_strategy", "bfd", "--max_length", 1024, "--global_batch_size", 16]  # more than there are packs


@pytest.mark.parametrize("recipe", ["qwen3_full", "qwen3_qlora"])
def test_packed_equals_unpacked_in_any_accumulation(first_step, recipe):
    """Rows in four passes against sixteen passes, one pass, and packs in as many passes as packs."""
    rows = first_step(recipe, "rows", *UNPACKED, 4)
    assert rows[2] == 16 and rows[1].norm() > 1e-3
    for passes in (1, 16):
        gaps = difference(rows, first_step(recipe, f"rows{passes}", *UNPACKED, 16 // passes))
        assert max(gaps) <= 1e-5, (passes, gaps)
    packs = first_step(recipe, "packs", *PACKED)
    assert packs[2] < 16, "nothing was packed"
    assert max(difference(rows, packs)) <= 1e-5
    smaller = [*PACKED, "--max_length", 300, "--per_device_train_batch_size"]
    count = first_step(recipe, "smaller", *smaller, 1)[2]
    assert count > 2
    for size, flags in ((15, UNPACKED), (count - 1, smaller)):  # a full pass, and a last one of a single row or pack
        short = first_step(recipe, f"short{size}", *flags, size, "--global_batch_size", 2 * size)
        assert max(difference(rows, short)) <= 1e-5, (size, flags)
    leaking = first_step(recipe, "wrapped", *PACKED, "--packing_strategy", "wrapped")
    assert leaking[2] < 16
    assert difference(rows, leaking)[1] > 1e-3, "wrapped packing leaks between documents, and this test did not see it"


WORLDS = [("qwen3_full", "ddp", PACKED)]
LONG = [("qwen3_full", "ddp", [*UNPACKED, 2]), ("qwen3_full", "ddp8", [*UNPACKED, 1]), ("qwen3_full", "fsdp2", PACKED)]
LONG += [("qwen3_lora", "ddp", PACKED), ("qwen3_qlora", "ddp", PACKED), ("qwen3_lora", "fsdp2", PACKED)]


@pytest.mark.parametrize(
    ("recipe", "engine", "flags"),
    WORLDS + [pytest.param(*case, marks=pytest.mark.long) for case in LONG],
    ids=lambda part: part if isinstance(part, str) else ("packed" if part is PACKED else "rows"),
)
def test_in_any_number_of_processes(first_step, recipe, engine, flags):
    """Where the passes are uneven, a row that is filled in twice shows; wrapped packing must show too.

    ZeRO keeps no gradients until this point: its gradient norms are compared in test_engines.py.
    """
    rows = first_step(recipe, "rows", *UNPACKED, 4)
    gaps = difference(rows, first_step(recipe, "many", *flags, engine=engine))
    assert max(gaps) <= 1e-5, gaps
    if flags is PACKED and (recipe, engine) == ("qwen3_full", "ddp"):
        leaking = first_step(recipe, "wrapped", *flags, "--packing_strategy", "wrapped", engine=engine)
        assert difference(rows, leaking)[1] > 1e-3
