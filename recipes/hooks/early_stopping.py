"""Early stopping on the validation loss, by one flag; the best checkpoint is what the run ends with.

    accelerate launch recipes/qwen3_qlora.py --hooks recipes/hooks/early_stopping.py

Stops after `patience` evaluations without a lower eval_loss; over a resume the count goes on. Another patience is a
file of your own, passed to --hooks:

    from hooks.early_stopping import EarlyStopping

    class Patient(EarlyStopping):
        patience = 10
"""

from typing import Any

from transformers import EarlyStoppingCallback, Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy


class EarlyStopping(EarlyStoppingCallback):
    """Stop a run whose validation loss no longer falls, and load its best checkpoint.

    The trainer reads all that is set here when train() begins or later, so that it holds for a trainer that is built.
    """

    patience: int = 3  # evaluations

    def __init__(self, trainer: Trainer | None) -> None:
        """Set what early stopping needs; without a trainer transformers restores the callback of a checkpoint.

        Raises:
            ValueError: the run has no evaluation, or its sharded checkpoints could not be loaded again.
        """
        super().__init__(early_stopping_patience=self.patience)
        if trainer is not None:
            keep_the_best(trainer)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count once more what was evaluated before a resume: transformers starts from 0.

        Its restore_callback_states_from_checkpoint knows the count of checkpoints alone that were saved with this
        callback; the log knows every evaluation.
        """
        super().on_train_begin(args, state, control, **kwargs)
        self.early_stopping_patience_counter = 0
        best = float("inf")
        for entry in state.log_history:
            loss = entry.get("eval_loss")
            if loss is None:
                continue
            if loss < best:
                best = loss
                self.early_stopping_patience_counter = 0
            else:
                self.early_stopping_patience_counter += 1

    def state(self) -> dict[str, dict]:
        """Return what a checkpoint keeps of this callback: nothing, since on_train_begin counts anew."""
        return {"args": {"trainer": None}, "attributes": {}}


def keep_the_best(trainer: Trainer) -> None:
    """Save with each evaluation, and load the checkpoint with the lowest eval_loss at the end."""
    args = trainer.args
    if args.eval_strategy == "no":
        raise ValueError("early stopping needs an evaluation: --eval_strategy steps --eval_steps 20, or epoch")
    if args.save_only_model and (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        raise ValueError("early stopping under DeepSpeed or FSDP needs whole checkpoints: --save_only_model false")

    args.load_best_model_at_end = True
    args.metric_for_best_model = "eval_loss"
    args.greater_is_better = False
    args.save_strategy = SaveStrategy(args.eval_strategy.value)
    if args.eval_steps:
        args.save_steps = args.eval_steps
