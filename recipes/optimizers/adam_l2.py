"""torch.optim.Adam, whose weight decay is added to the gradient (coupled L2, not AdamW's).

    accelerate launch recipes/step35_sft.py --optimizer recipes/optimizers/adam_l2.py

What StepTron's Qwen3 runs use (stepfun-ai/SteptronOss, steptronoss/exp/optimizer.py: AdamConfig), and what none of the
trainer's `optim` names is. As there, biases and norms are not decayed. It works number by number, so any engine's
pieces of weights will do.
"""

import torch
from transformers import TrainingArguments


def check(training_args: TrainingArguments) -> None:
    """Refuse nothing: every engine and option will do."""


class Factory:
    """Builds the optimizer of a model's trained weights; transformers makes it without arguments and calls it."""

    def __call__(self, model: torch.nn.Module, training_args: TrainingArguments) -> torch.optim.Adam:
        decayed = []
        undecayed = []
        for name, weight in model.named_parameters():
            if not weight.requires_grad:
                continue
            shape = getattr(weight, "ds_shape", weight.shape)  # ZeRO-3 leaves an empty vector in a weight's place
            if name.endswith("bias") or len(shape) == 1:
                undecayed.append(weight)
            else:
                decayed.append(weight)
        return torch.optim.Adam(
            [{"params": decayed}, {"params": undecayed, "weight_decay": 0.0}],
            lr=training_args.learning_rate,
            betas=(training_args.adam_beta1, training_args.adam_beta2),
            eps=training_args.adam_epsilon,
            weight_decay=training_args.weight_decay,
        )
