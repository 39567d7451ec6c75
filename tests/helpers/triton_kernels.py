"""Liger's layers and TRL's Triton head without a GPU: run by Triton's interpreter, or compiled as they are launched.

    TRITON_INTERPRET=1 python tests/helpers/triton_kernels.py interpret
    python tests/helpers/triton_kernels.py compile

Each prints one JSON object. A process of its own, since Triton decides at its import whether it interprets.
"""

import json
import sys
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import interpreter
from trl.kernels import chunked_logprob

try:
    import liger_kernel.ops.rms_norm
except ImportError:
    liger_kernel = None

from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.integrations.liger import apply_liger_kernel

ARCHITECTURES = (89, 90, 120)  # RTX 40, H100 and H200, RTX 50
POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64", torch.int32: "*i32"}
VOCABULARY = 2500  # of the head: two blocks and a rest


# -- what is run ------------------------------------------------------------------------------------------------------
def build_qwen3(dtype: torch.dtype, **sizes: int) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=96, **sizes)
    return Qwen3ForCausalLM(config).to(dtype).train()


def train_step(model: Qwen3ForCausalLM) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return loss and gradients of a pack of two documents."""
    torch.manual_seed(1)
    ids = torch.randint(0, 96, (1, 24))
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    loss = model(input_ids=ids, position_ids=positions, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: weight.grad for name, weight in model.named_parameters()}


def use_liger(model: Qwen3ForCausalLM) -> None:
    """Put Liger's layers into a model as the trainer does for --use_liger_kernel, the head left to TRL."""
    apply_liger_kernel(model, {"fused_linear_cross_entropy": False, "cross_entropy": False})


def run_head(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return outputs and gradients of TRL's head, with the branch that it takes on a GPU."""
    torch.manual_seed(0)
    hidden = torch.randn(7, 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCABULARY, 16, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, VOCABULARY, (7,))
    outputs = ("log_probs", "entropy", "is_top1")
    chunked_logprob._use_triton = lambda device: True
    head = chunked_logprob.ChunkedLogProbFunction
    log_probs, entropy, _, _, is_top1 = head.apply(hidden, weight, None, targets, 1.0, 1024, None, 1.0, outputs)
    log_probs.sum().backward()
    return {
        "hidden": hidden,
        "weight": weight,
        "targets": targets,
        "log_probs": log_probs,
        "entropy": entropy,
        "is_top1": is_top1,
    }


def relative_gap(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


# -- interpreted ------------------------------------------------------------------------------------------------------
def pass_floats_as_fp32() -> None:
    """Hand a kernel its Python floats as fp32 scalars, as compiled kernels get them; Liger calls .to() on them."""
    convert = interpreter._implicit_cvt

    def convert_argument(argument: object) -> object:
        if isinstance(argument, float):
            return tl.tensor(interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)
        return convert(argument)

    interpreter._implicit_cvt = convert_argument


def compare_liger() -> dict[str, object]:
    liger_kernel.ops.rms_norm.rsqrt = lambda x: 1.0 / tl.sqrt(x)  # libdevice has no body on a CPU
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, head_dim=16)
    sizes["num_key_value_heads"] = 2
    loss, gradients = train_step(build_qwen3(torch.float32, **sizes))
    model = build_qwen3(torch.float32, **sizes)
    use_liger(model)
    liger_loss, liger_gradients = train_step(model)
    layers = {type(module).__name__: module.forward.__qualname__ for module in model.modules()}
    return {
        "layers": layers,
        "loss": abs(liger_loss - loss).item(),
        "gradient": max(relative_gap(liger_gradients[name], gradients[name]) for name in gradients),
    }


def compare_head() -> dict[str, float]:
    """Return how far TRL's head is from full logits."""
    head = run_head(torch.float32)
    hidden = head["hidden"].detach().requires_grad_()
    weight = head["weight"].detach().requires_grad_()
    rows = torch.arange(len(hidden))
    full = torch.log_softmax(hidden @ weight.T, -1)
    log_probs = full[rows, head["targets"]]
    log_probs.sum().backward()
    entropy = -(full.exp() * full).sum(-1)
    return {
        "log_probs": (head["log_probs"] - log_probs).abs().max().item(),
        "entropy": (head["entropy"] - entropy).abs().max().item(),
        "is_top1": float((head["is_top1"] != (full.argmax(-1) == head["targets"])).sum()),
        "hidden_gradient": relative_gap(head["hidden"].grad, hidden.grad),
        "weight_gradient": relative_gap(head["weight"].grad, weight.grad),
    }


def interpret() -> dict[str, object]:
    pass_floats_as_fp32()
    result = {"head": compare_head()}
    if liger_kernel is not None:
        result["liger"] = compare_liger()
    return result


# -- compiled ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Launch:
    """A kernel with what it was launched with."""

    kernel: triton.JITFunction
    arguments: dict[str, object]
    num_warps: int


def record_launches() -> dict[str, Launch]:
    """Return the kernels that a step of Qwen3-4B's widths launches, by name; none of them runs."""
    launches = {}

    def record(kernel: triton.JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> None:
        arguments = dict(zip(kernel.arg_names, args, strict=False))
        for parameter in kernel.params:
            if parameter.name in kwargs:
                arguments[parameter.name] = kwargs[parameter.name]
            elif parameter.name not in arguments:
                arguments[parameter.name] = parameter.default
        name = kernel.__name__
        if arguments.get("BACKWARD_PASS"):
            name += " backward"
        launches[name] = Launch(kernel, arguments, kwargs.get("num_warps", 4))

    triton.JITFunction.run = record
    run_head(torch.bfloat16)
    if liger_kernel is not None:
        model = build_qwen3(
            torch.bfloat16,
            hidden_size=2560,
            intermediate_size=9728,
            num_hidden_layers=1,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
        )
        use_liger(model)
        train_step(model)
    return launches


def describe_argument(value: object) -> str:
    """Return an argument's type in Triton's words."""
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32"


def compile_launch(launch: Launch, architecture: int) -> triton.compiler.CompiledKernel:
    signature = {}
    constants = {}
    for parameter in launch.kernel.params:
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        else:
            signature[parameter.name] = describe_argument(value)
    source = ASTSource(launch.kernel, signature, constants)
    return triton.compile(source, GPUTarget("cuda", architecture, 32), {"num_warps": launch.num_warps})


def compile_all() -> dict[str, dict[str, int]]:
    """Return the bytes of shared memory of each kernel, by architecture."""
    shared = {}
    for name, launch in record_launches().items():
        shared[name] = {}
        for architecture in ARCHITECTURES:
            compiled = compile_launch(launch, architecture)
            assert compiled.asm["cubin"]
            shared[name][str(architecture)] = compiled.metadata.shared
    return shared


if __name__ == "__main__":
    torch.set_num_threads(1)
    modes = {"interpret": interpret, "compile": compile_all}
    print(json.dumps(modes[sys.argv[1]]()))
