"""Optimizer: Muon for matrices, AdamW for embeddings, norms and biases; as Step-3.5-Flash was fine-tuned.

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

import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.adamw import adamw

# p(x) = a x + b x³ + c x⁵ of each step: Amsel, Persson, Musco, Gower 2025, "The Polar Express" (arXiv:2505.16932),
# implementation 1: optimal for singular values from 1e-3 of the norm on, with a safety factor for low precision
SAFETY = 1.01
POLAR_EXPRESS = [
    (a / SAFETY, b / SAFETY**3, c / SAFETY**5)
    for a, b, c in (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
        (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    )
]
OPTIONS = {"dtype": ("float16", "bfloat16", "float32"), "experts": ("muon", "adamw")}  # the first is the default
FUSED = re.compile(r"qkv|query_key_value|c_attn|in_proj")


def polar(matrix, dtype):
    """The orthogonal factor of a matrix, or of each in a stack, nearly: its singular values become about 1."""
    x = matrix.mT if matrix.size(-2) > matrix.size(-1) else matrix  # the products below are of the short side
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) * SAFETY + 1e-7)).to(dtype)
    for a, b, c in POLAR_EXPRESS:
        square = x @ x.mT
        x = a * x + (b * square + c * (square @ square)) @ x
    return x.mT if matrix.size(-2) > matrix.size(-1) else x


class MuonAdamW(torch.optim.Optimizer):
    """Groups say by muon which half is theirs, and by parts into how many matrices the rows of each weight fall."""

    def __init__(self, groups, lr, weight_decay, betas, eps, dtype):
        super().__init__(
            groups, dict(lr=lr, weight_decay=weight_decay, betas=betas, eps=eps, momentum=0.95, dtype=dtype)
        )

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure and closure()
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            for weight in weights if group["muon"] else ():
                self.step_matrix(weight, group)
            if weights and not group["muon"]:
                self.step_others(weights, group)
        return loss

    def step_matrix(self, weight, group):
        if weight.dim() < 2:
            raise ValueError(
                "muon.py: this engine hands the optimizer flat pieces of weights, and Muon needs whole matrices: "
                "launch with accelerate_configs/ddp_8gpu.yaml or fsdp2_8gpu.yaml"
            )
        gradient, state = weight.grad, self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
        update = gradient.add(state["momentum"].mul_(group["momentum"]).add_(gradient), alpha=group["momentum"])
        whole = update.full_tensor() if isinstance(update, DTensor) else update
        parts = [
            polar(part, getattr(torch, group["dtype"])).to(weight.dtype) * (0.2 * math.sqrt(max(part.shape[-2:])))
            for part in whole.chunk(group["parts"], dim=-2)
        ]
        whole = torch.cat(parts, dim=-2)
        if isinstance(update, DTensor):  # every rank has the whole and keeps its own rows: nothing is sent
            whole = distribute_tensor(whole, update.device_mesh, update.placements, src_data_rank=None)
        weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(whole * group["lr"])

    def step_others(self, weights, group):
        for weight in weights:
            if not self.state[weight]:
                averages = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
                self.state[weight].update(averages, step=torch.zeros(()))
        states = [[self.state[weight][name] for weight in weights] for name in ("exp_avg", "exp_avg_sq", "step")]
        adamw(
            weights, [weight.grad for weight in weights], *states[:2], [], states[2], amsgrad=False,
            beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"],
            eps=group["eps"], maximize=False,
        )  # fmt: skip


def options_of(args):
    """{name: value} of --optim_args name=value,name=value. Raises ValueError."""
    given = dict(pair.partition("=")[::2] for pair in (args.optim_args or "").split(",") if pair)
    if wrong := [name for name, value in given.items() if value not in OPTIONS.get(name, ())]:
        known = " and ".join(f"{name}={'|'.join(values)}" for name, values in OPTIONS.items())
        raise ValueError(f"--optim_args {args.optim_args}: muon.py cannot use {' '.join(wrong)}, it knows {known}")
    return {name: values[0] for name, values in OPTIONS.items()} | given


def prepare(script, args, model):
    """Refuses, before anything is loaded, what Muon would do wrong."""
    options_of(args)
    if args.deepspeed_plugin is not None:
        raise ValueError(
            "muon.py: DeepSpeed's ZeRO cuts weights into flat pieces, and Muon needs whole matrices: launch with "
            "accelerate_configs/ddp_8gpu.yaml or, where the model does not fit, fsdp2_8gpu.yaml"
        )


def build(model, args):
    """The optimizer of a model's trained weights. Raises ValueError where a weight holds matrices it cannot part."""
    options, groups = options_of(args), defaultdict(list)
    embeddings = {module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        module = model.get_submodule(name.rpartition(".")[0])
        stacked = weight.dim() == 3 and hasattr(module, "is_transposed") and options["experts"] == "muon"
        muon = (weight.dim() == 2 or stacked) and weight not in embeddings  # a tied lm_head is the embedding
        joined = "gate_up" in name
        odd = joined and (getattr(module, "is_transposed", False) or not getattr(module, "is_concatenated", True))
        if muon and (odd or FUSED.search(name)):
            raise ValueError(f"muon.py: {name} holds several matrices in an order that it does not know: add it there")
        groups[muon, 2 if muon and joined else 1, name.endswith("bias")].append(weight)
    counts = {half: sum(w.numel() for key in groups if key[0] == half for w in groups[key]) for half in (True, False)}
    if args.process_index == 0:
        print(f"muon.py: {counts[True]:,} parameters by Muon ({options['dtype']}), {counts[False]:,} by AdamW")
    groups = [
        {"params": weights, "muon": muon, "parts": parts} | ({"weight_decay": 0.0} if bias else {})
        for (muon, parts, bias), weights in groups.items()
    ]
    betas = args.adam_beta1, args.adam_beta2
    return MuonAdamW(groups, args.learning_rate, args.weight_decay, betas, args.adam_epsilon, options["dtype"])
