"""recipes/optimizers: one step is the published algorithm's, every matrix is a matrix of its own, and engines agree.

The oracles are not ours: Polar Express as numbers on singular values of a float64 SVD, with coefficients computed here
by the paper's offline algorithm; torch.optim.Muon, AdamW and Adam; upstream's rules for who is decayed. Breaks tried,
each seen red: gate and up orthogonalised as one, a coefficient of the third step off by 1e-4, no safety factor, no
momentum but the buffer's, 0.2 √min, decay scaled as the update is, an expert's slice divided by the norm of the stack,
the tied embedding given to Muon, norms not decayed, biases decayed, a momentum forgotten at every step, Adam's norms
decayed, AdamW for Adam, flat pieces let through, and, by itself, shapes of weights that ZeRO-3 had emptied.
"""

import copy
import math
import runpy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.helpers.engines import ENGINES, PROBE, curve, gap, ranks, run
from tests.helpers.runs import EXACT, REPO

FILES = REPO / "recipes" / "optimizers"
MUON = runpy.run_path(str(FILES / "muon.py"))
ADAM = runpy.run_path(str(FILES / "adam_l2.py"))
build_muon = MUON["Factory"]()
build_adam = ADAM["Factory"]()
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def given(**changes):
    values = {
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-8,
        "optim_args": None,
        "process_index": 0,
        "deepspeed_plugin": None,
    }
    return SimpleNamespace(**values | changes)


def dense(**changes):
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES | {"tie_word_embeddings": True} | changes))


def mixture(**changes):
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES | EXPERTS | {"tie_word_embeddings": False} | changes))


def size(weights):
    return sum(weight.numel() for weight in weights)


def fill(model, seed):
    """Gradients of every weight, of its own size and of any spectrum a training has: a few large directions."""
    torch.manual_seed(seed)
    for weight in model.parameters():
        weight.grad = torch.randn_like(weight)
        if weight.dim() > 1:
            weight.grad += 4 * torch.randn(*weight.shape[:-1], 1) @ torch.randn(*weight.shape[:-2], 1, weight.shape[-1])
        weight.grad *= 10.0 ** torch.randint(-4, 2, ()).item()


# -- the published algorithm, in float64 ------------------------------------------------------------------------------
def polar_express(steps, smallest=1e-3, cushion=0.02407327424182761):
    """Coefficients of "The Polar Express", implementation 2 (Remez for odd quintics), with its safety factor."""

    def quintic(low, high):
        inner, old, error = [(3 * low + high) / 4, (low + 3 * high) / 4], None, math.inf
        while old is None or abs(old - error) > 1e-15:
            old, points = error, [low, *inner, high]
            system = [[x, x**3, x**5, (-1) ** n] for n, x in enumerate(points)]
            a, b, c, error = np.linalg.solve(system, np.ones(4))
            inner = np.sqrt((-3 * b + np.array([-1, 1]) * math.sqrt(9 * b**2 - 20 * a * c)) / (10 * c))
        return np.array([a, b, c])

    found, low, high = [], smallest, 1.0
    for _ in range(steps):
        coefficients, powers = quintic(max(low, cushion * high), high), lambda x: np.array([x, x**3, x**5])
        coefficients *= 2 / (coefficients @ powers(low) + coefficients @ powers(high))
        found.append(coefficients / [1.01, 1.01**3, 1.01**5])
        low = coefficients @ powers(low)
        high = 2 - low
    return found


def polar(matrix):
    """Each singular value through six polynomials, after the division by the norm."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    values = values / (1.01 * math.sqrt((values**2).sum()) + 1e-7)
    for a, b, c in polar_express(6):
        values = a * values + b * values**3 + c * values**5
    return left * values @ right


class Reference:
    """StepTron's step in float64, from its description; by_muon(name) and parts(name) say what is a matrix."""

    def __init__(self, model, by_muon, parts, args=None):
        self.args, self.by_muon, self.parts, self.count = args or given(), by_muon, parts, 0
        self.weights = {name: weight.detach().double().numpy().copy() for name, weight in model.named_parameters()}
        self.state = {name: [np.zeros_like(weight), np.zeros_like(weight)] for name, weight in self.weights.items()}

    def step(self, model):
        rate, self.count = self.args.learning_rate, self.count + 1
        for name, tensor in model.named_parameters():
            weight, gradient, state = self.weights[name], tensor.grad.double().numpy(), self.state[name]
            if self.by_muon(name):
                state[0] = 0.95 * state[0] + gradient
                pieces = np.split(gradient + 0.95 * state[0], self.parts(name), axis=-2)
                update = np.concatenate([self.scaled(piece) for piece in pieces], axis=-2)
            else:
                state[0] = 0.9 * state[0] + 0.1 * gradient
                state[1] = 0.95 * state[1] + 0.05 * gradient**2
                moments = state[0] / (1 - 0.9**self.count), state[1] / (1 - 0.95**self.count)
                update = moments[0] / (np.sqrt(moments[1]) + 1e-8)
            weight *= 1 - rate * self.args.weight_decay * (not name.endswith("bias"))
            weight -= rate * update

    def scaled(self, matrix):
        if matrix.ndim == 3:
            return np.stack([self.scaled(one) for one in matrix])
        return 0.2 * math.sqrt(max(matrix.shape)) * polar(matrix)


def apart(model, before, reference):
    """{name: relative distance of what the weight moved by from what the reference's moved by}."""
    moved = {name: weight.detach().double().numpy() - before[name] for name, weight in model.named_parameters()}
    wanted = {name: weight - before[name] for name, weight in reference.weights.items()}
    return {name: np.linalg.norm(moved[name] - wanted[name]) / np.linalg.norm(wanted[name]) for name in wanted}


def matrices(name):
    return "proj" in name or "mlp.gate.weight" in name or "lm_head" in name


@pytest.mark.parametrize(("make", "tied"), [(dense, True), (dense, False), (mixture, False)])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("float16", 2e-2), ("bfloat16", 5e-2)])
def test_steps_are_those_of_the_reference(make, tied, dtype, bound):
    """Three steps, so that momentum and bias correction count. float16 is what ships."""
    model = make(tie_word_embeddings=tied, attention_bias=True)
    args = given(optim_args=f"dtype={dtype}", learning_rate=0.05)  # far above what rounds a norm's weight of 1
    optimizer = build_muon(model, args)
    reference = Reference(
        model,
        lambda name: name.endswith(("weight", "proj")) and matrices(name) and "norm" not in name,
        lambda name: 2 if "gate_up" in name else 1,
        args,
    )
    for seed in range(3):
        before = {name: weight.detach().double().numpy().copy() for name, weight in model.named_parameters()}
        reference.weights = {name: weight.copy() for name, weight in before.items()}
        fill(model, seed)
        reference.step(model)
        optimizer.step()
        distances = apart(model, before, reference)
        assert not {name: one for name, one in distances.items() if not one <= bound}
    assert len(distances) > 20


def test_the_coefficients_are_the_papers():
    assert np.abs(np.array(MUON["POLAR_EXPRESS"]) - polar_express(6)).max() < 1e-11


@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (5, 24, 40)])
def test_the_update_is_nearly_orthogonal(shape):
    """Against the SVD itself: within 1% where a singular value is above 1e-3 of the norm, as the paper promises."""
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    assert (MUON["polar"](matrix, torch.float32) - left @ right).norm() <= 0.01 * (left @ right).norm()


def test_torchs_muon_agrees_but_for_the_polynomials(monkeypatch):
    """Momentum, Nesterov, scale and decay are those of torch (match_rms_adamw), given our polynomials."""
    torch.manual_seed(0)

    def ours_for_theirs(matrix, *_):
        return MUON["polar"](matrix, torch.float32)

    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", ours_for_theirs)
    ours, theirs = (torch.nn.Linear(24, 40, bias=False) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    optimizer = build_muon(ours, given(optim_args="dtype=float32"))
    other = torch.optim.Muon(theirs.parameters(), lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for seed in range(4):
        start = ours.weight.detach().clone()
        fill(ours, seed)
        theirs.weight.grad = 20 * ours.weight.grad  # of which torch's momentum takes 1 - 0.95
        optimizer.step(), other.step()
        assert (ours.weight - theirs.weight).norm() <= 1e-5 * (ours.weight - start).norm()


# -- who is what ------------------------------------------------------------------------------------------------------
def test_groups_of_a_mixture_by_parameter_count():
    """Worked by hand: hidden 32, 2 layers, 4 + 2 + 2 heads of 8, 4 experts of 24, vocabulary 96."""
    model = mixture()
    assert type(model.config) is Qwen3MoeConfig and model.model.layers[0].mlp.experts.gate_up_proj.shape == (4, 48, 32)
    optimizer = build_muon(model, given())
    counts = {(group["muon"], group["parts"]): size(group["params"]) for group in optimizer.param_groups}
    attention, router = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32), 2 * 4 * 32
    gate_up, down = 2 * 4 * 48 * 32, 2 * 4 * 32 * 24
    head, embedding, norms = 96 * 32, 96 * 32, 2 * (2 * 32 + 2 * 8) + 32
    assert counts == {(True, 1): attention + router + down + head, (True, 2): gate_up, (False, 1): embedding + norms}
    assert sum(counts.values()) == sum(weight.numel() for weight in model.parameters())
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1}, "norms are decayed"
    to_adamw = build_muon(model, given(optim_args="experts=adamw")).param_groups
    assert sum(size(group["params"]) for group in to_adamw if group["muon"]) == attention + router + head


def test_a_tied_head_is_the_embedding_and_a_bias_is_not_decayed():
    optimizer = build_muon(dense(attention_bias=True), given())
    others = [group for group in optimizer.param_groups if not group["muon"]]
    decays = {group["weight_decay"]: {tuple(w.shape) for w in group["params"]} for group in others}
    assert (96, 32) in decays[0.1] and decays[0.0] == {(32,), (16,)}


def test_adam_is_torchs_with_coupled_decay():
    """Against the formula by hand: the decay goes through the moments. Norms and biases have none, as upstream."""
    model = dense(attention_bias=True)
    optimizer = build_adam(model, given(weight_decay=0.5))
    assert type(optimizer) is torch.optim.Adam
    start = {name: weight.detach().double().clone() for name, weight in model.named_parameters()}
    fill(model, 0)
    optimizer.step()
    for name, weight in model.named_parameters():
        decay = 0.0 if "norm" in name or "bias" in name else 0.5
        gradient = weight.grad.double() + decay * start[name]
        wanted = start[name] - 1e-2 * gradient / (gradient.abs() + 1e-8)  # the first step of Adam, bias-corrected
        assert (weight - wanted).abs().max() <= 1e-6, name
    sizes = {group["weight_decay"]: size(group["params"]) for group in optimizer.param_groups}
    assert sizes[0.5] == sum(w.numel() for w in model.parameters() if w.dim() > 1)


@pytest.mark.parametrize(
    ("words", "said"),
    [("dtype=float8", "dtype"), ("steps=5", "steps"), ("experts=muon,dtype", "dtype"), ("dtype=float32,x=1", "x")],
)
def test_unknown_options_are_refused(words, said):
    with pytest.raises(ValueError, match=rf"--optim_args .*cannot use {said}, it knows dtype=float16\|bfloat16"):
        MUON["check"](given(optim_args=words))


def test_matrices_that_it_cannot_part_are_refused():
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv_proj = torch.nn.Linear(8, 24)

    with pytest.raises(ValueError, match="qkv_proj.weight holds several matrices"):
        build_muon(Attention(), given())
    config = AutoConfig.for_model("gpt_oss", **SIZES | {"num_local_experts": 2, "num_experts_per_tok": 1})
    with pytest.raises(ValueError, match="gate_up_proj holds several matrices"):  # interleaved and transposed there
        build_muon(AutoModelForCausalLM.from_config(config), given())


# -- it resumes, and any engine gives the same ------------------------------------------------------------------------
@pytest.mark.parametrize("build", [build_muon, build_adam], ids=["muon", "adam_l2"])
def test_state_dict_resumes_bitwise(build, tmp_path):
    whole, cut = mixture(), mixture()
    optimizers = [build(model, given()) for model in (whole, cut)]
    schedules = [torch.optim.lr_scheduler.LambdaLR(one, lambda step: 1 / (1 + step)) for one in optimizers]
    for step in range(6):
        if step == 3:
            torch.save((cut.state_dict(), optimizers[1].state_dict(), schedules[1].state_dict()), tmp_path / "x.pt")
            cut = mixture()
            optimizers[1] = build(cut, given())
            schedules[1] = torch.optim.lr_scheduler.LambdaLR(optimizers[1], lambda step: 1 / (1 + step))
            for one, state in zip((cut, optimizers[1], schedules[1]), torch.load(tmp_path / "x.pt"), strict=True):
                one.load_state_dict(copy.deepcopy(state))
        for model, optimizer, schedule in zip((whole, cut), optimizers, schedules, strict=True):
            fill(model, step)
            optimizer.step(), schedule.step()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters(), strict=True))


@pytest.fixture(scope="session")
def moe_init(demo, tmp_path_factory):
    """A tiny Qwen3-MoE with the demo's tokenizer."""
    from transformers import AutoTokenizer

    folder, tokenizer = tmp_path_factory.mktemp("moe") / "init", AutoTokenizer.from_pretrained(demo / "init")
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 64, "head_dim": 16, "max_position_embeddings": 2048}
    mixture(
        **sizes,
        initializer_range=0.08,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def train(demo, moe_init, tmp_path_factory):
    """train(optimizer, engine, *flags) returns the run folder; the same call is run once a session."""
    folder, done = tmp_path_factory.mktemp("optimizers"), {}
    (folder / "probe.py").write_text(PROBE.replace('state.get("state1")', 'state.get("momentum")'))

    def start(optimizer, engine, *flags):
        key = (optimizer, engine, *map(str, flags))
        if key not in done:
            out = folder / f"run{len(done)}-{optimizer}-{engine}"
            given = ["--model_name_or_path", moe_init, "--dataset_name", demo / "rows" / "chat", "--output_dir", out]
            given += ["--chat_template_path", REPO / "chat_templates" / "qwen3.jinja", "--max_length", 512, *EXACT]
            given += ["--optimizer", FILES / f"{optimizer}.py", "--global_batch_size", 4, "--warmup_steps", 2]
            given += ["--hooks", folder / "probe.py", "--max_steps", 8, "--learning_rate", "2e-3"]
            given += ["--lr_scheduler_type", "constant_with_warmup", "--lr_scheduler_kwargs", "{}"]
            given += ["--disable_tqdm", "true", "--save_strategy", "no"]
            given += ["--assistant_only_loss", "true", "--padding_free", "false"]  # rows, not packs
            given += ["--optim_args", "dtype=float32"] if optimizer == "muon" else []
            run(ENGINES[engine].command("step35_sft", *given, *flags))
            done[key] = out
        return done[key]

    return start


ENGINE_CASES = [("muon", engine) for engine in ("fsdp2", "ddp", "hsdp")]
ENGINE_CASES += [("adam_l2", engine) for engine in ("ddp", "fsdp2", "zero1", "zero2", "zero3")]


@pytest.mark.long
@pytest.mark.parametrize(("optimizer", "engine"), ENGINE_CASES)
def test_engines_give_what_one_process_gives(train, optimizer, engine):
    """A mixture, 8 steps, fp32: losses to 1e-5 and the trained model's logits to 1e-4 of their size."""
    one, other = train(optimizer, "one"), train(optimizer, engine)
    found, wanted = ranks(other), ENGINES[engine]
    assert [rank["world"] for rank in found] == [wanted.processes] * wanted.processes
    assert all(wanted.engine in rank["engine"] and rank["stage"] == wanted.stage for rank in found)
    here, whole = [rank["states"][0] for rank in found], found[0]["states"][1]
    divided = wanted.sharded or wanted.stage is not None
    assert max(here) < 0.6 * whole if divided else here == [whole] * wanted.processes
    assert curve(one, "loss")[0] - curve(one, "loss")[-1] > 0.3
    assert gap(one, other, "loss") <= 1e-5 and gap(one, other, "grad_norm") <= 3e-4
    single, several = (torch.load(folder / "logits0.pt") for folder in (one, other))
    assert (single - several).abs().max() <= 1e-4 * single.abs().max()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_is_refused_before_anything_loads(stage):
    plugin = SimpleNamespace(zero_stage=stage)
    with pytest.raises(ValueError, match="DeepSpeed's ZeRO cuts weights into flat pieces.*ddp_8gpu.yaml"):
        MUON["check"](given(deepspeed_plugin=plugin))


def test_flat_pieces_are_refused():
    """What ZeRO-1 hands an optimizer, had it got that far: one flat tensor of all weights of a group."""
    optimizer = build_muon(dense(), given())
    group = next(group for group in optimizer.param_groups if group["muon"])
    flat = torch.nn.Parameter(torch.cat([weight.detach().flatten() for weight in group["params"]]))
    flat.grad, group["params"] = torch.ones_like(flat), [flat]
    with pytest.raises(ValueError, match="flat pieces of weights, and Muon needs whole matrices"):
        optimizer.step()


@pytest.mark.long
def test_zero_is_refused_where_it_is_launched(train):
    """And it is wrong where it is not: DeepSpeed's flat pieces reach the optimizer."""
    for engine in ("zero1", "zero2"):
        with pytest.raises(AssertionError, match="DeepSpeed's ZeRO cuts weights into flat pieces"):
            train("muon", engine)
