"""Muon for matrices, AdamW for embeddings, norms and biases; as Step-3.5-Flash was fine-tuned.

    accelerate launch recipes/step35_sft.py --optimizer recipes/optimizers/muon.py --optim_args dtype=bfloat16

After stepfun-ai/SteptronOss: steptronoss/optimizer/{muon,_helpers}.py, exp/optimizer.py and, for the values,
playground/sft/step3/muon_optimizer.py. Of every matrix of a linear layer (q, k, v, o, gate, up, down, the router, an
lm_head of its own; of experts that transformers stacks in 3-D each one's, gate and up apart):

    momentum = 0.95 momentum + gradient
    update   = polar(gradient + 0.95 momentum)          Nesterov; U Vᵀ of its SVD U S Vᵀ, nearly
    weight   = (1 - lr decay) weight - lr 0.2 √max(rows, columns) update

torch.optim.Muon(adjust_lr_fn="match_rms_adamw") does the same with five Newton-Schulz steps of one polynomial, in
bf16, on 2-D weights; StepTron takes six steps of Polar Express. The rest is torch's AdamW with betas --adam_beta1 and
--adam_beta2. One rate and one decay for both, norms decayed too, biases not, as upstream.

--optim_args: dtype=float16 (upstream's, and the default), bfloat16 or float32: of the matrix products alone.
experts=muon (the default) or adamw: the stored upstream code marks 2-D weights only, which leaves stacked experts to
AdamW, though its helper cuts experts into gate and up for Muon.

FSDP2 and DDP: whole matrices, gathered one at a time, and every rank orthogonalises all of them (for Qwen3-30B-A3B
about 1e15 operations a step, 1% of the step). DeepSpeed's ZeRO cuts weights into flat pieces: refused.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.adamw import adamw
from transformers import TrainingArguments

# p(x) = a x + b x³ + c x⁵ of each step: Amsel, Persson, Musco, Gower 2025, "The Polar Express" (arXiv:2505.16932),
# implementation 1: optimal for singular values from 1e-3 of the norm on, with a safety factor for low precision
SAFETY = 1.01
POLYNOMIALS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
)
POLAR_EXPRESS = [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in POLYNOMIALS]
OPTIONS = {"dtype": ("float16", "bfloat16", "float32"), "experts": ("muon", "adamw")}  # the first is the default
JOINED_MATRICES = re.compile(r"qkv|query_key_value|c_attn|in_proj")
MOMENTUM = 0.95
RMS = 0.2  # root mean square of an AdamW update, which Muon's are scaled to


def polar(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the orthogonal factor of a matrix, or of each in a stack, nearly: its singular values become about 1."""
    tall = matrix.size(-2) > matrix.size(-1)
    x = matrix.mT if tall else matrix  # the products below are of the short side
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) * SAFETY + 1e-7)).to(dtype)
    for a, b, c in POLAR_EXPRESS:
        square = x @ x.mT
        x = a * x + (b * square + c * (square @ square)) @ x
    return x.mT if tall else x


class MuonAdamW(torch.optim.Optimizer):
    """Muon and AdamW in one; a group's `muon` says whose it is, its `parts` how many matrices each weight holds."""

    def __init__(
        self,
        groups: list[dict],
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        dtype: str,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "betas": betas,
            "eps": eps,
            "momentum": MOMENTUM,
            "dtype": dtype,
        }
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all weights that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if group["muon"]:
                for weight in weights:
                    self.step_matrix(weight, group)
            elif weights:
                self.step_others(weights, group)
        return loss

    def step_matrix(self, weight: torch.Tensor, group: dict) -> None:
        """Update a weight by Muon. Raises ValueError for a flat piece of one."""
        if weight.dim() < 2:
            raise ValueError(
                "muon.py: this engine hands the optimizer flat pieces of weights, and Muon needs whole matrices: "
                "launch with accelerate_configs/ddp_8gpu.yaml or fsdp2_8gpu.yaml"
            )
        gradient = weight.grad
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
        momentum = state["momentum"].mul_(group["momentum"]).add_(gradient)
        update = gradient.add(momentum, alpha=group["momentum"])  # Nesterov
        whole = update.full_tensor() if isinstance(update, DTensor) else update
        updates = []
        for part in whole.chunk(group["parts"], dim=-2):
            scale = RMS * math.sqrt(max(part.shape[-2:]))
            updates.append(polar(part, getattr(torch, group["dtype"])).to(weight.dtype) * scale)
        whole = torch.cat(updates, dim=-2)
        if isinstance(update, DTensor):  # every rank has the whole and keeps its own rows: nothing is sent
            whole = distribute_tensor(whole, update.device_mesh, update.placements, src_data_rank=None)
        weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(whole * group["lr"])

    def step_others(self, weights: list[torch.Tensor], group: dict) -> None:
        """Update weights by torch's AdamW."""
        for weight in weights:
            state = self.state[weight]
            if not state:
                state["exp_avg"] = torch.zeros_like(weight)
                state["exp_avg_sq"] = torch.zeros_like(weight)
                state["step"] = torch.zeros(())
        beta1, beta2 = group["betas"]
        adamw(
            weights,
            [weight.grad for weight in weights],
            [self.state[weight]["exp_avg"] for weight in weights],
            [self.state[weight]["exp_avg_sq"] for weight in weights],
            [],
            [self.state[weight]["step"] for weight in weights],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def read_options(training_args: TrainingArguments) -> dict[str, str]:
    """Return {name: value} of --optim_args name=value,name=value. Raises ValueError."""
    options = {name: values[0] for name, values in OPTIONS.items()}
    wrong = []
    for pair in filter(None, (training_args.optim_args or "").split(",")):
        name, _, value = pair.partition("=")
        if value in OPTIONS.get(name, ()):
            options[name] = value
        else:
            wrong.append(name)
    if wrong:
        known = " and ".join(f"{name}={'|'.join(values)}" for name, values in OPTIONS.items())
        raise ValueError(
            f"--optim_args {training_args.optim_args}: muon.py cannot use {' '.join(wrong)}, it knows {known}"
        )
    return options


def check(training_args: TrainingArguments) -> None:
    """Refuse, before anything is loaded, what Muon would do wrong. Raises ValueError."""
    read_options(training_args)
    if training_args.deepspeed_plugin is not None:
        raise ValueError(
            "muon.py: DeepSpeed's ZeRO cuts weights into flat pieces, and Muon needs whole matrices: launch with "
            "accelerate_configs/ddp_8gpu.yaml or, where the model does not fit, fsdp2_8gpu.yaml"
        )


@dataclass(frozen=True)
class Kind:
    """What decides the group of a weight."""

    muon: bool
    parts: int  # matrices that its rows fall into
    bias: bool


def kind_of(name: str, weight: torch.Tensor, model: torch.nn.Module, embeddings: set, stacked_experts: bool) -> Kind:
    """Return whether Muon takes a weight. Raises ValueError where it holds matrices that cannot be parted."""
    module = model.get_submodule(name.rpartition(".")[0])
    stacked = weight.dim() == 3 and hasattr(module, "is_transposed") and stacked_experts
    muon = (weight.dim() == 2 or stacked) and weight not in embeddings  # a tied lm_head is the embedding
    joined = "gate_up" in name
    transposed = getattr(module, "is_transposed", False)
    interleaved = not getattr(module, "is_concatenated", True)
    odd = joined and (transposed or interleaved)
    if muon and (odd or JOINED_MATRICES.search(name)):
        raise ValueError(f"muon.py: {name} holds several matrices in an order that it does not know: add it there")
    parts = 2 if muon and joined else 1
    return Kind(muon, parts, name.endswith("bias"))


class Factory:
    """Builds the optimizer of a model's trained weights; transformers makes it without arguments and calls it."""

    def __call__(self, model: torch.nn.Module, training_args: TrainingArguments) -> MuonAdamW:
        """Return the optimizer. Raises ValueError where a weight holds matrices that cannot be parted."""
        options = read_options(training_args)
        embeddings = {module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)}
        weights_by_kind = defaultdict(list)
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                kind = kind_of(name, weight, model, embeddings, options["experts"] == "muon")
                weights_by_kind[kind].append(weight)
        self.describe(weights_by_kind, options["dtype"], training_args)
        groups = []
        for kind, weights in weights_by_kind.items():
            group = {"params": weights, "muon": kind.muon, "parts": kind.parts}
            if kind.bias:
                group["weight_decay"] = 0.0
            groups.append(group)
        return MuonAdamW(
            groups,
            lr=training_args.learning_rate,
            weight_decay=training_args.weight_decay,
            betas=(training_args.adam_beta1, training_args.adam_beta2),
            eps=training_args.adam_epsilon,
            dtype=options["dtype"],
        )

    def describe(
        self, weights_by_kind: dict[Kind, list[torch.Tensor]], dtype: str, training_args: TrainingArguments
    ) -> None:
        """Print, once a run, how many parameters are whose."""
        counts = {True: 0, False: 0}
        for kind, weights in weights_by_kind.items():
            counts[kind.muon] += sum(weight.numel() for weight in weights)
        if training_args.process_index == 0:
            print(f"muon.py: {counts[True]:,} parameters by Muon ({dtype}), {counts[False]:,} by AdamW")
