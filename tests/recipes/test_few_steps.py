"""A run of a few optimizer steps is named, with the batch that would make more of them. Values are worked by hand.

Turns red where the batch is not halved, or below what all processes take at a time (tried).
"""

from types import SimpleNamespace

import pytest
from datasets import Dataset
from hooks.checks.steps import say_few_steps

from data_prep.common.step_counts import advise_steps


@pytest.mark.parametrize(
    ("steps", "batch", "smallest", "advice"),
    [
        (30, 16, 1, ""),
        (20, 16, 1, "few: --global_batch_size 8 makes about 40 of them"),
        (8, 16, 1, "few: --global_batch_size 4 makes about 32 of them"),
        (8, 16, 8, "few: --global_batch_size 8 makes about 16 of them"),
        (2, 16, 1, "few: --global_batch_size 1 makes about 32 of them"),
        (2, 16, 16, "few: train more rows or --num_train_epochs"),
        (29, 3, 1, "few: train more rows or --num_train_epochs"),
    ],
)
def test_the_advice(steps, batch, smallest, advice):
    assert advise_steps(steps, batch, smallest) == advice


def say(capsys, max_steps, rows, epochs=2):
    args = SimpleNamespace(
        max_steps=max_steps,
        num_train_epochs=epochs,
        world_size=2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
        dataloader_drop_last=False,
    )
    trainer = SimpleNamespace(args=args, train_dataset=Dataset.from_dict({"x": range(rows)}))
    say_few_steps(trainer, SimpleNamespace(global_batch_size=16))
    return capsys.readouterr().out


def test_what_a_run_says(capsys):
    # 40 packs on two processes are 20 passes each, 3 steps of 8 an epoch, 6 in two
    assert "6 optimizer steps are few: --global_batch_size 2 makes about 48 of them (docs/settings.md)" in say(
        capsys, -1, 40
    )
    assert say(capsys, 6, 40) == ""  # the number that was asked for
    assert say(capsys, -1, 240) == ""
