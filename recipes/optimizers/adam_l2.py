"""Optimizer: torch.optim.Adam, whose weight decay is added to the gradient (coupled L2, not AdamW's).

    accelerate launch recipes/step35_sft.py --optimizer recipes/optimizers/adam_l2.py

What StepTron's Qwen3 runs use (stepfun-ai/SteptronOss, steptronoss/exp/optimizer.py: AdamConfig), and what none of the
trainer's `optim` names is. As there, biases and norms are not decayed. It works number by number, so any engine's
pieces of weights will do.
"""

import torch


def build(model, args):
    """The optimizer of a model's trained weights."""
    decayed, plain = [], []
    for name, weight in model.named_parameters():
        shape = getattr(weight, "ds_shape", weight.shape)  # ZeRO-3 leaves an empty vector in a weight's place
        if weight.requires_grad:
            (plain if name.endswith("bias") or len(shape) == 1 else decayed).append(weight)
    groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    betas = args.adam_beta1, args.adam_beta2
    return torch.optim.Adam(groups, args.learning_rate, betas, args.adam_epsilon, args.weight_decay)
