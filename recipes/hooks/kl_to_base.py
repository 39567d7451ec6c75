"""A KL term that holds a model near the one that it starts from: `--kl_weight 0.1`.

Fine-tuning on one task costs abilities and languages that its rows do not show; how far the model moves from its base
on those rows tells how much (Shenfeld et al. 2025, RL's Razor). The loss of a trained token becomes

    -log p(token) + kl_weight x KL(base || model)

over the whole vocabulary, as in learning without forgetting (Li and Hoiem 2016). With adapters the base is the same
model without them; with full fine-tuning it is a frozen copy, whose weights take memory once more. Each pass runs the
base's layers once more, without gradients. `loss` is what is trained; `nll` and `kl`, means over the trained tokens,
are logged apart, and eval_loss stays the plain one, so that its perplexity is the model's.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel, Trainer

from .messages import UsageError

CHUNK = 128  # trained tokens whose logits of the whole vocabulary are held at a time
IGNORED = -100
SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")  # of configs, as TRL's fused head reads them


@dataclass
class LogitForm:
    """What a model makes of its head's output: times scale, then softly capped at cap (None: not)."""

    scale: float
    cap: float | None

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits


def read_logit_form(config: PreTrainedConfig) -> LogitForm:
    """Return what a model makes of its head's output, by its config: Cohere, Granite, Gemma 2 and others."""
    config = config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    for name in SCALES:
        scale = getattr(config, name, None)
        if scale is not None:
            return LogitForm(scale, cap)
    divisor = getattr(config, "logits_scaling", None)
    return LogitForm(1.0 if divisor is None else 1 / divisor, cap)


def sum_of_chunk(
    hidden: torch.Tensor,
    base_hidden: torch.Tensor,
    targets: torch.Tensor,
    heads: list[tuple[torch.Tensor, torch.Tensor | None]],
    form: LogitForm,
) -> torch.Tensor:
    """Return (KL, NLL), summed over the tokens of a chunk, in fp32.

    hidden, base_hidden: (tokens, width). heads: weight and bias of the model's head and of the base's.
    """
    log_probs = []
    for states, (weight, bias) in zip((hidden, base_hidden), heads, strict=True):
        logits = form.apply(F.linear(states.to(weight.dtype), weight, bias).float())
        log_probs.append(F.log_softmax(logits, -1))
    own, base = log_probs
    divergence = F.kl_div(own, base, reduction="sum", log_target=True)
    nll = F.nll_loss(own.detach(), targets, reduction="sum")
    return torch.stack((divergence, nll))


class KLToBase:
    """Adds weight x KL(base || model) to the loss of a trainer, and counts both parts."""

    def __init__(self, trainer: Trainer, weight: float) -> None:
        """Raise UsageError for runs in which a process does not hold the whole model."""
        refuse_engines(trainer)
        self.trainer = trainer
        self.weight = weight
        self.model: PreTrainedModel | PeftModel = trainer.model
        self.form = read_logit_form(self.model.config)
        self.base = None  # a frozen copy; None where the base is the model without its adapters
        if not isinstance(self.model, PeftModel):
            self.base = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.seen: dict[str, object] = {}  # of the backbone's last pass: its arguments and what came of it
        self.sums = {mode: torch.zeros(3, device=trainer.args.device) for mode in ("train", "eval")}  # KL, NLL, tokens

    def causal_model(self) -> PreTrainedModel:
        """Return the model with a head, within its adapters."""
        if isinstance(self.model, PeftModel):
            return self.model.get_base_model()
        return self.model

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Keep what goes into the backbone and what comes out of it."""

        def keep(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
            self.seen = {"args": args, "kwargs": kwargs, "hidden": output.last_hidden_state}

        handle = self.causal_model().base_model.register_forward_hook(keep, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def base_states(self) -> torch.Tensor:
        """Return the base's last hidden states for what the model has just seen, (rows, tokens, width)."""
        model = self.causal_model() if self.base is None else self.base
        modules = list(model.modules())
        modes = [module.training for module in modules]
        without_adapters = self.model.disable_adapter() if self.base is None else nullcontext()
        with without_adapters:
            model.eval()
            try:
                output = model.base_model(*self.seen["args"], **self.seen["kwargs"])
            finally:
                for module, mode in zip(modules, modes, strict=True):
                    module.training = mode
        return output.last_hidden_state

    def add(
        self, loss: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        """Return the loss of a micro-batch with the KL term, weighed as TRL weighs the loss; in an evaluation the
        loss as it is."""
        base_hidden = self.base_states()[:, :-1]
        hidden = self.seen["hidden"][:, :-1]
        self.seen = {}
        targets = labels[:, 1:].to(hidden.device)
        is_trained = targets != IGNORED
        found = self.sum_over(hidden[is_trained], base_hidden[is_trained], targets[is_trained])
        mode = "train" if self.model.training else "eval"
        self.sums[mode] += torch.cat((found.detach(), is_trained.sum()[None]))
        if mode == "eval":
            return loss
        tokens = is_trained.sum() if num_items_in_batch is None else num_items_in_batch
        term = self.weight * found[0] / torch.as_tensor(tokens).clamp(min=1)
        if self.trainer.args.average_tokens_across_devices and num_items_in_batch is not None:
            term = term * self.trainer.accelerator.num_processes  # DDP averages the gradients
        return loss + term

    def sum_over(self, hidden: torch.Tensor, base_hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return (KL, NLL), summed over tokens; logits of a chunk at a time, made again in the backward pass."""
        head = self.causal_model().get_output_embeddings()
        base_head = head if self.base is None else self.base.get_output_embeddings()
        heads = [(head.weight, head.bias), (base_head.weight.detach(), base_head.bias)]
        total = hidden.sum() * torch.zeros(2, device=hidden.device)  # connected, where nothing is trained too
        for start in range(0, len(hidden), CHUNK):
            chunk = slice(start, start + CHUNK)
            total = total + checkpoint(
                sum_of_chunk,
                hidden[chunk],
                base_hidden[chunk],
                targets[chunk],
                heads,
                self.form,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        return total

    def figures(self, mode: str) -> dict[str, float]:
        """Return nll and kl a trained token since the last call, over all processes; all processes call it."""
        sums = self.trainer.accelerator.reduce(self.sums[mode], "sum")
        self.sums[mode].zero_()
        divergence, nll, tokens = sums.tolist()
        if not tokens:
            return {}
        prefix = "eval_" if mode == "eval" else ""
        return {f"{prefix}nll": nll / tokens, f"{prefix}kl": divergence / tokens}


def refuse_engines(trainer: Trainer) -> None:
    """Raise UsageError where the KL to the base is not computed: sharded weights, rows over several processes, a head
    with an adapter of its own."""
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    parallel = max(trainer.get_sp_size(), trainer.get_cp_size(), trainer.get_tp_size()) > 1
    if sharded or parallel:
        raise UsageError(
            "--kl_weight: each process needs the whole model and whole rows: take an accelerate config of one GPU, or "
            "of DDP (accelerate_configs/ddp_8gpu.yaml)"
        )
    model = trainer.model
    if not isinstance(model, PeftModel):
        return
    names = set(model.active_peft_config.modules_to_save or [])
    if "lm_head" in names:
        raise UsageError(
            "--kl_weight: lm_head is in modules_to_save, so that the base has no head of its own: leave it out there"
        )
