"""Hook: early stopping on the validation loss, by one flag; the best checkpoint is what the run ends with.

    accelerate launch recipes/qwen3_qlora.py --hooks recipes/hooks/early_stopping.py

Stops after PATIENCE evaluations without a lower eval_loss; over a resume the count goes on.
"""

from transformers import EarlyStoppingCallback

PATIENCE = 3  # evaluations


def prepare(script, args, model):
    """Sets what early stopping needs. Raises ValueError where the run has no evaluation."""
    if args.eval_strategy == "no":
        raise ValueError("early stopping needs an evaluation: --eval_strategy steps --eval_steps 20, or epoch")
    args.load_best_model_at_end, args.metric_for_best_model, args.greater_is_better = True, "eval_loss", False
    args.save_strategy, args.save_steps = args.eval_strategy, args.eval_steps or args.save_steps  # the best is saved


class Early(EarlyStoppingCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        """Counts once more what was evaluated before the resume: transformers starts from 0."""
        super().on_train_begin(args, state, control, **kwargs)
        best, self.early_stopping_patience_counter = float("inf"), 0
        for loss in (line["eval_loss"] for line in state.log_history if "eval_loss" in line):
            self.early_stopping_patience_counter = 0 if loss < best else self.early_stopping_patience_counter + 1
            best = min(best, loss)


def callback(trainer):
    return Early(PATIENCE)
