"""A run of a few optimizer steps is named: it ends before it has learned anything."""

from typing import TYPE_CHECKING

from trl import ScriptArguments

from data_prep.common.step_counts import advise_steps

from ..messages import say
from ..schedule import count_steps

if TYPE_CHECKING:
    from ..trainer import SFTTrainer


def say_few_steps(trainer: "SFTTrainer", script_args: ScriptArguments) -> None:
    """Say what to pass where the rows make few steps; --max_steps is a user's own number."""
    args = trainer.args
    steps = count_steps(trainer)
    if args.max_steps > 0 or steps <= 0:
        return
    smallest = args.world_size * args.per_device_train_batch_size
    advice = advise_steps(steps, script_args.global_batch_size, smallest)
    if advice:
        noun = "step" if steps == 1 else "steps"
        say(f"{steps} optimizer {noun} are {advice} (docs/settings.md)")
