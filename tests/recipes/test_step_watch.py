"""The end of a step that would do harm: who speaks, which rows are accused and which not, and what to do next.

Breaks tried, each seen red: rows named with several micro-batches, or ranks; an exploding norm taken for a loss;
every rank speaking; healthy micro-batches accused; means divided by tokens once more; the advice without looking for a
checkpoint.
"""

import json
import math
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from datasets import load_from_disk
from hooks import step_watch
from hooks.step_watch import StepWatch
from transformers import AutoTokenizer

from tests.helpers.runs import REPO

VOCABULARY = 1000
GO_ON = "go on from the checkpoint with --resume_from_checkpoint true --learning_rate LOWER --allow learning_rate"


@pytest.fixture
def watch_step(tmp_path, monkeypatch, capfd):
    """watch_step(losses, norm, ...) watches one step of this rank, whose micro-batch n holds row n.

    Returns (the sentence, the micro-batches that were searched for rows), or None where the step passes.
    """
    monkeypatch.setattr(sys, "argv", ["recipe.py"])
    searched = []

    def find_rows(trainer, batches):
        searched.extend(batch["number"] for batch in batches)
        return [f"row-{batch['number']}" for batch in batches]

    monkeypatch.setattr(step_watch, "find_rows", find_rows)

    def start(losses, norm, before=(), others=(), rank=0, tokens=None, deepspeed=False, means=False):
        """`others`: (summed loss, norm) of the other ranks, which come after this one, or before it for rank 1."""
        searched.clear()

        def gather(own):
            rows = [own]
            for values in others:
                other = torch.tensor([[*values, 0.0]])
                rows = [*rows, other] if rank == 0 else [other, *rows]
            return torch.cat(rows) if own.shape[1] == 3 else own

        config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=VOCABULARY))
        trainer = SimpleNamespace(
            model=SimpleNamespace(config=config),
            args=SimpleNamespace(
                world_size=1 + len(others),
                process_index=rank,
                output_dir=str(tmp_path),
                device="cpu",
                fp16=False,
            ),
            state=SimpleNamespace(global_step=6),
            accelerator=SimpleNamespace(gather=gather, wait_for_everyone=lambda: None, sync_gradients=False),
            is_deepspeed_enabled=deepspeed,
            model_accepts_loss_kwargs=not means,
            parity=SimpleNamespace(sequence_parallel=False),
        )
        watch = StepWatch(trainer)
        for loss, healthy_norm in before:
            assert watch.explosion.check(loss, healthy_norm) is None
        lengths = tokens or [4] * len(losses)
        watch.start_step([{"number": n, "labels": torch.ones(1, length)} for n, length in enumerate(lengths)])
        for loss in losses:
            watch.add_loss(torch.tensor(float(loss)))
        capfd.readouterr()
        try:
            watch.add_norm(norm)
        except SystemExit as stop:
            assert stop.code == 1
            return capfd.readouterr().err.strip(), list(searched)
        return None

    return start


HEALTHY = [(1.0, 1.0)] * 8


def test_a_healthy_step_passes(watch_step):
    assert watch_step([1.0, 2.0], 3.0, HEALTHY) is None


@pytest.mark.parametrize(
    ("norm", "words"), [(math.inf, "the gradient norm is inf"), (5e4, "the gradient norm is 5e+04, 1 before")]
)
def test_a_gradient_norm_accuses_rows_only_where_that_is_known(watch_step, norm, words):
    sentence, searched = watch_step([1.0], norm, HEALTHY)
    assert sentence.startswith(f"recipe.py: step 7: {words}; rows ['row-0']; stopped before the weights changed, ")
    assert searched == [0] and "Look at these rows" in sentence
    for losses, others, counts in (
        ([1.0, 2.0, 1.0, 1.0], [], "ranks: 1, micro-batches of each: 4"),
        ([1.0], [(1.0, norm)], "ranks: 2, micro-batches of each: 1"),
        ([1.0, 1.0], [(1.0, norm)] * 3, "ranks: 4, micro-batches of each: 2"),
    ):
        sentence, searched = watch_step(losses, norm, HEALTHY, others)
        assert sentence.startswith(f"recipe.py: step 7: {words}; which rows is not known ({counts}); stopped before")
        assert searched == [] and "row-" not in sentence and "these rows" not in sentence
        if others:  # the other ranks end too, silently, without a search that would wait for all
            assert watch_step(losses, norm, HEALTHY, others, rank=1) == ("", [])


def test_deepspeed_tells_the_norm_after_its_step(watch_step):
    sentence, searched = watch_step([1.0, 1.0], math.nan, deepspeed=True)
    assert "step 7: the gradient norm is nan; which rows is not known (ranks: 1, micro-batches of each: 2)" in sentence
    assert "stopped after the weights changed" in sentence and searched == []


def test_a_loss_accuses_the_rows_of_its_micro_batch(watch_step):
    sentence, searched = watch_step([1.0, math.nan, 2.0, math.inf], 1.0)
    assert "step 7, rank 0: the loss is nan; rows ['row-1', 'row-3']; stopped before" in sentence
    assert searched == [1, 3]
    # on the other rank: it alone speaks, and every rank searches, since that has barriers
    assert watch_step([1.0, 1.0], 1.0, others=[(math.nan, 1.0)])[0] == ""
    assert watch_step([1.0, 1.0], 1.0, others=[(math.nan, 1.0)])[1] != []
    sentence, _ = watch_step([1.0, math.nan], 1.0, others=[(2.0, 1.0)], rank=1)
    assert "step 7, rank 1: the loss is nan; rows ['row-1']" in sentence


def test_a_high_loss_names_the_micro_batch_with_the_highest_mean(watch_step):
    """Losses are parts of the step's: 20 of 2 tokens is more a token than 30 of 6. Means are compared as they are."""
    losses = [30.0, 20.0, 1.0]
    sentence, searched = watch_step(losses, 1.0, HEALTHY, tokens=[6, 2, 4])
    assert "step 7, rank 0: the loss is 51, 1 before" in sentence and searched == [1]
    assert "; the highest loss of this rank is that of rows ['row-1']; " in sentence
    assert watch_step(losses, 1.0, HEALTHY, tokens=[6, 2, 4], means=True)[1] == [0]


def test_what_to_do_depends_on_a_checkpoint(watch_step, tmp_path):
    known, _ = watch_step([math.nan], 1.0)
    unknown, _ = watch_step([1.0, 1.0], math.nan)
    look = "Look at these rows (a set without them is another run: another --output_dir), or"
    assert known.endswith(f"last checkpoint: none. {look} lower --learning_rate in another --output_dir")
    assert unknown.endswith("last checkpoint: none. Lower --learning_rate in another --output_dir")
    (tmp_path / "checkpoint-4").mkdir()
    known, _ = watch_step([math.nan], 1.0)
    unknown, _ = watch_step([1.0, 1.0], math.nan)
    assert known.endswith(f"last checkpoint: {tmp_path}/checkpoint-4. {look} {GO_ON}")
    assert unknown.endswith(f"last checkpoint: {tmp_path}/checkpoint-4. G{GO_ON[1:]}")


BAD_GRADIENT = """
import json
from pathlib import Path
from transformers import TrainerCallback
class BadGradient(TrainerCallback):
    def __init__(self, trainer):
        plain = trainer.training_step
        def training_step(model, inputs, *rest, **kwargs):
            ids, places = inputs["input_ids"][0].tolist(), inputs["position_ids"][0].tolist()
            starts = [i for i, place in enumerate(places) if place == 0] + [len(ids)]
            texts = [trainer.processing_class.decode(ids[a:b]) for a, b in zip(starts, starts[1:])]
            Path(trainer.args.output_dir, "texts.json").write_text(json.dumps(texts))
            loss = plain(model, inputs, *rest, **kwargs)
            if trainer.state.global_step == 1:
                next(weight for weight in model.parameters() if weight.grad is not None).grad.fill_(float("nan"))
            return loss
        trainer.training_step = training_step
"""


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_bad_gradient_ends_a_run(run_recipe, hook, demo, tmp_path, capfd, micro_batches):
    """The second step's gradient is nan and its losses are not."""
    flags = ["--global_batch_size", micro_batches, "--per_device_train_batch_size", 1, *hook(BAD_GRADIENT)]
    with pytest.raises(SystemExit) as stop:
        run_recipe("qwen3_full", *flags)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "stopped before the weights" in line]
    assert stop.value.code == 1 and "step 2: the gradient norm is nan; " in line
    named = re.findall(r"train-[\w-]+", line)
    if micro_batches == 2:
        assert "which rows is not known (ranks: 1, micro-batches of each: 2)" in line and not named
    else:  # against the rendered text of every row
        tokenizer = AutoTokenizer.from_pretrained(demo / "init")
        tokenizer.chat_template = (REPO / "chat_templates" / "qwen3.jinja").read_text()
        texts = json.loads((tmp_path / "run" / "texts.json").read_text())
        wanted = []
        for row in load_from_disk(demo / "rows" / "chat")["train"]:
            given = {"tools": row["tools"], "tokenize": False, **row["chat_template_kwargs"]}
            if tokenizer.apply_chat_template(row["messages"], **given) in texts:
                wanted.append(row["id"])
        assert named == wanted and len(wanted) == len(texts)
