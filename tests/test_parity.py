"""One process equals two: only the accelerate config changes, and rows, their order, tokens and losses stay.

The two-process run is compared with the one-process run, whose loop has no distributed code in it. World size and
gloo are asserted from inside, because accelerate falls back to one process without a word.
"""

import json

import pytest
from conftest import EXACT, REPO, TINY, launch

PROBE = """
import hashlib, json
from pathlib import Path
import torch
from transformers import TrainerCallback
def callback(trainer):
    rank, world = trainer.args.process_index, trainer.args.world_size
    backend = torch.distributed.get_backend() if torch.distributed.is_initialized() else None
    seen, plain = [], trainer.training_step
    def training_step(model, inputs, *rest, **kwargs):  # which documents, in which order, on this rank
        seen.append(hashlib.sha1(inputs["input_ids"].numpy().tobytes()).hexdigest()[:8])
        return plain(model, inputs, *rest, **kwargs)
    trainer.training_step = training_step
    class Probe(TrainerCallback):
        def on_train_end(self, *_, **__):
            found = {"world": world, "backend": backend, "seen": seen, "model": type(trainer.model_wrapped).__name__}
            Path(trainer.args.output_dir, f"rank{rank}.json").write_text(json.dumps(found))
    return Probe()
"""


def curve(folder, name):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


@pytest.mark.parametrize(
    ("recipe", "flags", "tolerance"),
    [
        ("qwen3_full", EXACT, 1e-5),
        ("qwen3_qlora", EXACT, 1e-5),  # evaluation in the middle: bitsandbytes once cut the gradients after one
        ("qwen3_qlora", ["--lora_dropout", "0"], 1e-3),
    ],
    ids=["full-fp32", "qlora-fp32", "qlora-shipped"],
)
def test_two_processes_equal_one(demo, tmp_path, recipe, flags, tolerance):
    (tmp_path / "probe.py").write_text(PROBE)
    for config in ("cpu", "cpu_2proc"):
        data = ["--model_name_or_path", demo / "init", "--dataset_name", demo / "rows" / "chat"]
        data += ["--chat_template_path", REPO / "chat_templates" / "qwen3.jinja", "--output_dir", tmp_path / config]
        steps = ["--max_steps", 6, "--eval_strategy", "steps", "--eval_steps", 2, "--hooks", tmp_path / "probe.py"]
        done = launch(REPO / "recipes" / f"{recipe}.py", *TINY, *flags, *data, *steps, config=config)
        assert done.returncode == 0, done.stderr[-3000:]
    one = json.loads((tmp_path / "cpu" / "rank0.json").read_text())
    two = [json.loads((tmp_path / "cpu_2proc" / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert one["world"] == 1 and [rank["world"] for rank in two] == [2, 2]
    assert [rank["backend"] for rank in two] == ["gloo", "gloo"] and two[0]["model"] == "DistributedDataParallel"
    assert one["seen"] == [row for pair in zip(two[0]["seen"], two[1]["seen"], strict=True) for row in pair]
    assert len(one["seen"]) == 24 and len(set(one["seen"])) == 24
    assert curve(tmp_path / "cpu", "num_tokens") == curve(tmp_path / "cpu_2proc", "num_tokens")
    for name in ("loss", "grad_norm"):
        pairs = list(zip(curve(tmp_path / "cpu", name), curve(tmp_path / "cpu_2proc", name), strict=True))
        assert len(pairs) == 6
        gap = max(abs(a - b) / (1 if name == "loss" else a) for a, b in pairs)
        assert gap <= (tolerance if name == "loss" else 10 * tolerance), (name, pairs)
