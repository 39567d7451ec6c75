"""nanochat's optimizer (November 2025, nanochat/gpt.py setup_optimizers): Muon and AdamW, three learning rates.

A recipe names this file as `optimizer`. learning_rate multiplies the three rates, as nanochat's init_lr_frac does;
--optim_args momentum_warmup_steps=300 moves Muon's momentum from 0.85 to 0.95 over so many steps. Muon is torch's: with
adjust_lr_fn="original" an update is scaled by sqrt(max(1, rows / columns)), as in nanochat/muon.py; the two differ by
how bf16 rounds. Under FSDP2 its products are of DTensors, which gather what they need: the same update as of whole
matrices.
"""

from collections.abc import Callable

import torch
from transformers import TrainingArguments

MATRIX_LR = 0.02
EMBEDDING_LR = 0.2  # for a width of 768, times (d / 768) ** -0.5
UNEMBEDDING_LR = 0.004  # the same
FIRST_MOMENTUM = 0.85
MOMENTUM = 0.95


class MuonAdamW(torch.optim.Optimizer):
    """One optimizer object over the groups of both: one state, which a checkpoint holds and a resume gives back."""

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW) -> None:
        self.muon = muon
        self.adamw = adamw
        for group in muon.param_groups:
            group["steps"] = 0  # where the momentum is in its warm-up: a checkpoint has it too
        super().__init__([*muon.param_groups, *adamw.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all weights by the optimizer that has them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        muon_groups = [group for group in self.param_groups if "steps" in group]
        adamw_groups = [group for group in self.param_groups if "steps" not in group]
        for group in muon_groups:
            self.warm_up_momentum(group)
        self.step_part(self.muon, muon_groups)
        self.step_part(self.adamw, adamw_groups)
        return loss

    def warm_up_momentum(self, group: dict) -> None:
        share = 1.0
        if group["momentum_warmup_steps"]:
            share = min(group["steps"] / group["momentum_warmup_steps"], 1)
        group["momentum"] = (1 - share) * FIRST_MOMENTUM + share * MOMENTUM
        group["steps"] += 1

    def step_part(self, optimizer: torch.optim.Optimizer, groups: list[dict]) -> None:
        optimizer.state = self.state  # a loaded checkpoint replaced both
        optimizer.param_groups = groups
        optimizer.step()


def read_momentum_warmup_steps(training_args: TrainingArguments) -> int:
    """Return the number in --optim_args. Raises ValueError."""
    name, _, steps = (training_args.optim_args or "momentum_warmup_steps=0").partition("=")
    if name != "momentum_warmup_steps" or not steps.isdecimal():
        raise ValueError(
            f"--optim_args {training_args.optim_args}: nanochat.py knows momentum_warmup_steps=NUMBER only"
        )
    return int(steps)


def check(training_args: TrainingArguments) -> None:
    """Refuse, before anything is loaded, what would go wrong later. Raises ValueError."""
    read_momentum_warmup_steps(training_args)
    if training_args.deepspeed_plugin is not None:
        raise ValueError(
            "nanochat.py: DeepSpeed's ZeRO cuts weights into flat pieces, and Muon needs whole matrices: launch with "
            "accelerate_configs/ddp_8gpu.yaml or fsdp2_8gpu.yaml"
        )


class Factory:
    """Builds the optimizer of a model's trained weights; transformers makes it without arguments and calls it."""

    def __call__(self, model: torch.nn.Module, training_args: TrainingArguments) -> MuonAdamW:
        """Give matrices to Muon, embedding and unembedding to AdamW.

        Norms and biases, which NanoChat has none of, go to AdamW at the unembedding's rate.
        """
        embedding = model.get_input_embeddings().weight
        unembedding = model.get_output_embeddings().weight  # may be the embedding, tied
        matrices = []
        embeddings = []
        others = []
        for weight in model.parameters():
            if not weight.requires_grad:
                continue
            if weight is embedding:
                embeddings.append(weight)
            elif weight.dim() == 2 and weight is not unembedding:
                matrices.append(weight)
            else:
                others.append(weight)
        scale = (model.config.get_text_config().hidden_size / 768) ** -0.5
        muon = torch.optim.Muon(
            [{"params": matrices, "lr": MATRIX_LR * training_args.learning_rate}],
            weight_decay=training_args.weight_decay,
            momentum=MOMENTUM,
            adjust_lr_fn="original",
        )
        muon.param_groups[0]["momentum_warmup_steps"] = read_momentum_warmup_steps(training_args)
        groups = []
        for weights, rate in ((others, UNEMBEDDING_LR), (embeddings, EMBEDDING_LR)):
            if weights:
                groups.append({"params": weights, "lr": rate * scale * training_args.learning_rate})
        adamw = torch.optim.AdamW(
            groups, betas=(0.8, 0.95), eps=1e-10, weight_decay=training_args.weight_decay, fused=True
        )
        return MuonAdamW(muon, adamw)
