"""Trace a training step with fake tensors: what it allocates, multiplies and moves.

Two small numbers of layers are traced and the rest is extrapolated, segment by segment: layers of a kind add the same.
"""

import contextlib
import copy
import gc
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import PeftConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from trl import ModelConfig, get_peft_config
from trl.kernels import chunked_logprob
from trl.trainer.utils import add_fused_lm_head

from .errors import UsageError
from .gpu_configs import find_layers, layer_kinds, plan_layers, quiet, shorten
from .gpu_meter import CUDA_BLOCK, Meter, Segment, Work
from .gpu_settings import RunSettings
from .gpu_standins import (
    ATTENTION,
    SDPA,
    AttentionShape,
    TracedLinear4bit,
    TracedLinear8bit,
    cuda_functions,
    put_liger_in,
    register_attention,
)

PARTS = ("weights", "adapters", "gradients", "optimizer", "activations", "head", "buffers")
OUTPUTS = ("log_probs", "entropy", "is_top1")  # what TRL's SFT trainer asks of its head
TRACES: dict[tuple[str, RunSettings], "Trace"] = {}  # of this process, by a config and what decides a trace
VOCABULARY_TILE = 32768  # trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE
SMALL_8BIT = 4096  # bitsandbytes keeps the states of smaller weights in fp32


# -- parameters and results -------------------------------------------------------------------------------------------
@dataclass
class Counts:
    """Parameters, and the bytes that they take as they are held."""

    parameters: int = 0
    trained: int = 0
    small_trained: int = 0  # of tensors below SMALL_8BIT
    layer_trained: int = 0  # in the decoder layers
    embedding: int = 0  # parameters of the input embedding and the head, once if tied


@dataclass
class Trace:
    """What one traced step allocated and did: bytes by segment and part, the work of a pass, parameters.

    forward: the work of its forward alone.
    """

    segments: dict[str, Segment]
    work: Work
    forward: Work
    counts: Counts
    resident: Counter = field(default_factory=Counter)  # bytes by part between passes


@contextlib.contextmanager
def unmoved_modules() -> Iterator[None]:
    """Let PEFT leave modules on their device: fake weights cannot be swapped."""
    move = torch.nn.Module.to
    torch.nn.Module.to = lambda module, *_, **__: module
    try:
        yield
    finally:
        torch.nn.Module.to = move


def quantise(model: PreTrainedModel, settings: RunSettings, meter: Meter) -> None:
    """Put layers of few bits in the place of a model's linear layers, but for its head."""
    head = model.get_output_embeddings()
    dtype = getattr(torch, settings.dtype)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is not torch.nn.Linear or child is head:
                continue
            if settings.load_in_4bit:
                layer = TracedLinear4bit(child, dtype, settings.use_bnb_nested_quant, meter)
            else:
                layer = TracedLinear8bit(child, dtype, meter)
            setattr(module, name, layer)
    model.is_loaded_in_4bit = settings.load_in_4bit
    model.is_loaded_in_8bit = settings.load_in_8bit


def make_peft_config(settings: RunSettings) -> PeftConfig:
    targets = settings.lora_target_modules
    if isinstance(targets, tuple):
        targets = list(targets)
    model_args = ModelConfig(
        use_peft=True,
        lora_r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        lora_target_modules=targets,
        lora_target_parameters=list(settings.lora_target_parameters) or None,
        use_dora=settings.use_dora,
    )
    return get_peft_config(model_args)


def build_model(config: PreTrainedConfig, settings: RunSettings, meter: Meter, on_cuda: bool) -> torch.nn.Module:
    """Return the model as a recipe trains it. Its adapters are fp32, as the recipes' prepare_weights makes them."""
    attention = settings.attn_implementation
    if on_cuda and attention != "eager":
        attention = ATTENTION
    elif not on_cuda:
        attention = SDPA
    dtype = getattr(torch, settings.dtype)
    config = copy.deepcopy(config)
    config.use_cache = False
    with quiet(), no_init_weights() if on_cuda else contextlib.nullcontext():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    model.tie_weights()
    model.train()
    if settings.load_in_4bit or settings.load_in_8bit:
        quantise(model, settings, meter)
    if on_cuda and settings.use_liger_kernel:
        put_liger_in(model, meter)
    add_fused_lm_head(model, outputs=OUTPUTS)
    if settings.use_peft:
        with unmoved_modules(), quiet():
            model = get_peft_model(model, make_peft_config(settings))
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()
                meter.retag(weight, "adapters")
    if settings.activation_checkpointing:
        if settings.use_peft:
            model.enable_input_require_grads()
        checkpointing = {"use_reentrant": False, "preserve_rng_state": False}
        with quiet():
            model.activation_checkpointing_enable(
                activation_checkpointing_kwargs=checkpointing, every_n_layers=settings.every_n_layers
            )
    gc.collect()
    return model


def count_weights(model: torch.nn.Module, layers: list[torch.nn.Module]) -> Counts:
    counts = Counts()
    packed = {}
    for module in model.modules():
        if isinstance(module, Linear4bit | Linear8bitLt):
            packed[id(module.weight)] = module.in_features * module.out_features
    for weight in model.parameters():
        size = packed.get(id(weight), weight.numel())
        counts.parameters += size
        if weight.requires_grad:
            counts.trained += size
            if size < SMALL_8BIT:
                counts.small_trained += size
    for layer in layers:
        counts.layer_trained += sum(weight.numel() for weight in layer.parameters() if weight.requires_grad)
    outside = {id(module.weight): module.weight.numel() for module in embeddings(model)}
    counts.embedding = sum(outside.values())
    return counts


def embeddings(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [model.get_input_embeddings(), model.get_output_embeddings()]


def mark_layers(layers: list[torch.nn.Module], period: int, meter: Meter, phase: list[str]) -> None:
    """Start a segment where the forward, and where the backward, of a layer begins.

    Segments of a first and a last period are named by their place in it; those between lie between them.
    """
    count = len(layers)
    for number, layer in enumerate(layers):
        name = "between"
        if number < period:
            name = str(number)
        elif number >= count - period:
            name = str(number - count)

        def before(_module: torch.nn.Module, _args: tuple, name: str = name) -> None:
            if phase[0].endswith("forward"):
                meter.start(f"{phase[0]} {name}")

        def after(_module: torch.nn.Module, _args: tuple, output: object, name: str = name) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if phase[0].endswith("forward") and tensor.requires_grad:
                backward = phase[0].replace("forward", "backward")
                tensor.register_hook(lambda _grad: meter.start(f"{backward} {name}", part="activations"))

        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(after)


def loss_on_cuda(model: torch.nn.Module, ids: torch.Tensor, trained: int, meter: Meter, mark: str) -> torch.Tensor:
    """Return TRL's loss. On CUDA only trained positions reach the head, and boolean indexing has no fake shape."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = base.base_model(input_ids=ids, position_ids=torch.empty_like(ids), use_cache=False).last_hidden_state
    meter.part = "head"
    meter.start(f"{mark} head")
    positions = torch.empty(trained, dtype=torch.long)
    chosen = hidden[:, :-1].reshape(-1, hidden.shape[-1])[positions]
    head = base.get_output_embeddings()
    outputs = chunked_logprob.ChunkedLogProbFunction.apply(
        chosen, head.weight, head.bias, positions, 1.0, VOCABULARY_TILE, None, 1.0, OUTPUTS
    )
    return -outputs[0].sum() / trained


def loss_on_cpu(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    outputs = model(input_ids=ids, labels=ids.clone(), fused_lm_head=True)
    return -outputs.log_probs.sum() / ids.numel()


def trace(
    config: PreTrainedConfig,
    settings: RunSettings,
    period: int = 1,
    on_cuda: bool = True,
    is_fake: bool = True,
    optimizer: bool = False,
) -> Trace:
    """Return what one step allocates: a first pass without gradients, a later one with them.

    on_cuda: with the stand-ins; else as a CPU runs it, which can be measured (is_fake=False: on real tensors, with
    optimizer=True stepping a real AdamW between the passes).
    """
    meter = Meter(CUDA_BLOCK if on_cuda else 1)
    mode = FakeTensorMode(allow_non_fake_inputs=True) if is_fake else contextlib.nullcontext()
    functions = contextlib.nullcontext()
    if on_cuda:
        functions = cuda_functions(model_class(config), settings.use_liger_kernel, meter)
    with quiet(), functions, mode, meter:
        if on_cuda:
            shape = AttentionShape(settings.attn_implementation, settings.context, meter)
            register_attention(shape)
        model = build_model(config, settings, meter, on_cuda)
        layers = find_layers(model, config.num_hidden_layers)
        phase = [""]
        mark_layers(layers, period, meter, phase)
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        for weight in weights:
            weight.register_post_accumulate_grad_hook(lambda weight: meter.retag(weight.grad, "gradients"))
        adamw = None
        if optimizer:
            adamw = torch.optim.AdamW(weights, lr=0.0, fused=True)
        rows = (settings.rows, settings.max_length)
        if on_cuda and settings.packing:
            rows = (1, settings.tokens)
        ids = torch.zeros(rows, dtype=torch.long)
        if on_cuda and settings.attn_implementation == SDPA:
            shape.mask = torch.empty((rows[0], 1, rows[1], rows[1]), dtype=torch.bool)
            shape.context = 2 * rows[1]  # a dense mask leaves no half out
        trained = max(1, int((settings.tokens - settings.rows) * settings.trained_share))
        resident = meter.parts.copy()
        for name in ("first", "later"):
            meter.work = Work()
            meter.part = "activations"
            phase[0] = f"{name} forward"
            meter.start(phase[0])
            with torch.autocast("cpu", torch.bfloat16, enabled=settings.bf16):
                if on_cuda:
                    loss = loss_on_cuda(model, ids, trained, meter, phase[0])
                else:
                    loss = loss_on_cpu(model, ids)
            forward = replace(meter.work)
            phase[0] = f"{name} backward"
            meter.part = "head"
            meter.start(f"{phase[0]} head")
            loss.backward()
            del loss
            if adamw is not None:
                adamw.step()
                adamw.zero_grad()
        counts = count_weights(model, layers)
    return Trace(meter.segments, meter.work, forward, counts, resident)


def model_class(config: PreTrainedConfig) -> type:
    """Return the class that AutoModelForCausalLM takes for a config. Raises UsageError."""
    mapping = AutoModelForCausalLM._model_mapping
    if type(config) not in mapping:
        raise UsageError(f"{config.model_type}: transformers has no causal language model for this config")
    return mapping[type(config)]


# -- extrapolation ----------------------------------------------------------------------------------------------------
def extend(few: float, many: float, steps: float) -> float:
    """Return the value `steps` periods behind `few`, on the line through both."""
    return few + (many - few) * steps


def extend_work(few: Work, many: Work, steps: float) -> Work:
    return Work(*(extend(getattr(few, f.name), getattr(many, f.name), steps) for f in fields(Work)))


def extrapolate(few: Trace, many: Trace, steps: float, offloads: bool) -> Trace:
    """Return the trace of a model with `steps` more periods than `few` has.

    offloads: activations that wait for the backward lie in main memory, so that more layers add none.
    """
    segments = {}
    for name, segment in few.segments.items():
        if name not in many.segments:
            continue
        parts = Counter()
        for part in PARTS:
            part_steps = 0 if offloads and part == "activations" else steps
            parts[part] = extend(segment.parts[part], many.segments[name].parts[part], part_steps)
        segments[name] = Segment(sum(parts.values()), parts)
    work = extend_work(few.work, many.work, steps)
    forward = extend_work(few.forward, many.forward, steps)
    counts = Counts(
        *(round(extend(getattr(few.counts, f.name), getattr(many.counts, f.name), steps)) for f in fields(Counts))
    )
    resident = Counter({part: extend(few.resident[part], many.resident[part], steps) for part in PARTS})
    return Trace(segments, work, forward, counts, resident)


def trace_model(config: PreTrainedConfig, settings: RunSettings) -> Trace:
    """Return the trace of a whole model, extrapolated where its layers repeat; the same again is not traced anew.

    Raises UsageError.
    """
    alike = replace(settings, optim="", optimizer=None, gradient_accumulation_steps=1, model_name_or_path="")
    key = (config.to_json_string(), alike)
    if key not in TRACES:
        TRACES[key] = trace_layers(config, alike)
    return TRACES[key]


def trace_layers(config: PreTrainedConfig, settings: RunSettings) -> Trace:
    every = settings.every_n_layers if settings.activation_checkpointing else 1
    try:
        plan = plan_layers(layer_kinds(config), every)
        few = trace(shorten(config, plan.few), settings, plan.period)
        if plan.few == plan.many:
            return few
        many = trace(shorten(config, plan.many), settings, plan.period)
    except (RuntimeError, NotImplementedError, AttributeError, TypeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{config.model_type}: this model cannot be traced ({type(error).__name__}: {reason})"
        ) from error
    steps = (config.num_hidden_layers - plan.few) / plan.period
    return extrapolate(few, many, steps, settings.activation_offloading)
