"""nanochat's optimizer (November 2025, nanochat/gpt.py setup_optimizers): Muon and AdamW, three learning rates.

A recipe names this file as `optimizer`. learning_rate multiplies the three rates, as nanochat's init_lr_frac does;
--optim_args momentum_warmup_steps=300 moves Muon's momentum from 0.85 to 0.95 over so many steps; num_decay_steps of
warmup_stable_decay may be a share, 0.2 is the last fifth of the steps. Muon is torch's: with adjust_lr_fn="original" an
update is scaled by sqrt(max(1, rows / columns)), as in nanochat/muon.py; the two differ by how bf16 rounds. Under FSDP2
its products are of DTensors, which gather what they need: the same update as of whole matrices.
"""

import torch
from transformers import TrainerCallback

MATRIX_LR, EMBEDDING_LR, UNEMBEDDING_LR = 0.02, 0.2, 0.004  # the last two for a width of 768, times (d / 768) ** -0.5
MOMENTUM, FIRST_MOMENTUM = 0.95, 0.85


class MuonAdamW(torch.optim.Optimizer):
    """One optimizer object over the groups of both: one state, which a checkpoint holds and a resume gives back."""

    def __init__(self, muon, adamw):
        self.parts = muon, adamw
        for group in muon.param_groups:
            group["steps"] = 0  # where the momentum is in its warm-up: a checkpoint has it too
        super().__init__([*muon.param_groups, *adamw.param_groups], {})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        groups = [[group for group in self.param_groups if ("steps" in group) == is_muon] for is_muon in (True, False)]
        for group in groups[0]:
            share = min(group["steps"] / group["momentum_warmup_steps"], 1) if group["momentum_warmup_steps"] else 1
            group["momentum"] = (1 - share) * FIRST_MOMENTUM + share * MOMENTUM
            group["steps"] += 1
        for part, own in zip(self.parts, groups, strict=True):  # a loaded checkpoint replaced both
            part.state, part.param_groups = self.state, own
            part.step()
        return loss


def momentum_warmup_steps(args):
    """The number in --optim_args. Raises ValueError."""
    name, _, steps = (args.optim_args or "momentum_warmup_steps=0").partition("=")
    if name != "momentum_warmup_steps" or not steps.isdecimal():
        raise ValueError(f"--optim_args {args.optim_args}: nanochat.py knows momentum_warmup_steps=NUMBER only")
    return int(steps)


def prepare(script, args, model):
    """Refuses, before anything is loaded, what would go wrong later."""
    momentum_warmup_steps(args)
    if args.deepspeed_plugin is not None:
        raise ValueError(
            "nanochat.py: DeepSpeed's ZeRO cuts weights into flat pieces, and Muon needs whole matrices: launch with "
            "accelerate_configs/ddp_8gpu.yaml or fsdp2_8gpu.yaml"
        )


class Schedule(TrainerCallback):
    """Does nothing: the work is around trainer.create_scheduler, which is told the number of steps."""


def callback(trainer):
    """num_decay_steps below 1 is a share of the steps, which nobody knows before the rows are packed."""
    plain, given = trainer.create_scheduler, trainer.args.lr_scheduler_kwargs or {}

    def create_scheduler(num_training_steps, optimizer=None):
        if given.get("num_decay_steps", 1) < 1:
            decay = given["num_decay_steps"] * num_training_steps
            trainer.args.lr_scheduler_kwargs = given | {"num_decay_steps": decay}
        return plain(num_training_steps, optimizer)

    trainer.create_scheduler = create_scheduler
    return Schedule()


def build(model, args):
    """Matrices to Muon; embedding and unembedding to AdamW. Norms and biases, which NanoChat has none of: AdamW at the
    unembedding's rate."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    first, last = model.get_input_embeddings().weight, model.get_output_embeddings().weight  # may be one, tied
    matrices = [weight for weight in trained if weight.dim() == 2 and weight is not first and weight is not last]
    embedding = [weight for weight in trained if weight is first]
    others = [weight for weight in trained if weight is not first and (weight.dim() != 2 or weight is last)]
    scale = (model.config.get_text_config().hidden_size / 768) ** -0.5
    rates = (matrices, MATRIX_LR), (others, UNEMBEDDING_LR * scale), (embedding, EMBEDDING_LR * scale)
    matrix, *rest = [{"params": weights, "lr": rate * args.learning_rate} for weights, rate in rates if weights]
    muon = torch.optim.Muon([matrix], weight_decay=args.weight_decay, momentum=MOMENTUM, adjust_lr_fn="original")
    muon.param_groups[0]["momentum_warmup_steps"] = momentum_warmup_steps(args)
    adamw = torch.optim.AdamW(rest, betas=(0.8, 0.95), eps=1e-10, weight_decay=args.weight_decay, fused=True)
    return MuonAdamW(muon, adamw)
