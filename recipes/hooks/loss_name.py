"""What the loss of a run is, by TRL's own settings: only a plain negative log-likelihood has a perplexity."""

from .trainer import SFTTrainer

PLAIN_LOSS = "nll"  # TRL's name


def name_loss(trainer: SFTTrainer) -> str:
    """Return the name of what `loss` and `eval_loss` are; PLAIN_LOSS for a plain negative log-likelihood.

    As TRL 1.16's compute_loss chooses it, in training and in an evaluation alike. There each batch gives the mean over
    its tokens, whatever a recipe makes of the micro-batches of a step.
    """
    args = trainer.args
    if trainer.compute_loss_func is not None:
        return "of a compute_loss_func"
    if args.loss_type == PLAIN_LOSS and args.label_smoothing_factor:
        return f"{PLAIN_LOSS} with label smoothing {args.label_smoothing_factor:g}"
    if trainer.aux_loss_enabled:
        return f"{args.loss_type} + {trainer.router_aux_loss_coef:g} x router loss"
    return args.loss_type


def describe_validation_loss(loss: float, loss_name: str) -> str:
    """Return a validation loss in words, with its name where it is not the plain one."""
    if loss_name == PLAIN_LOSS:
        return f"validation loss {loss:.4g}"
    return f"validation loss {loss:.4g} ({loss_name})"
