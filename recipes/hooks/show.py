"""Hook: what a run is, when it starts; how it goes, while it runs.

Start: a block of plain lines on stdout, read off the objects that train, not off the configuration.
While it runs: on a terminal one progress bar, elsewhere (or with --disable_tqdm true) a line per logged step on stdout;
both instead of transformers' own. What they show also goes to log.jsonl, trackio and W&B: `trained_tokens` (since the
start, over resumes) and `padding_share` are the same in every run of one seed, `tokens_per_second`,
`trained_tokens_per_second`, `memory_gib` (peak) and `mfu` are measured. engine.txt in the run folder says what trained.
"""

import math
import os
import re
import sys
import time
from contextlib import suppress
from pathlib import Path

import pyarrow.compute as pc
import torch
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers.trainer_callback import PrinterCallback, ProgressCallback

RUN = {}  # what prepare() was given; script.rows is filled in by the recipe later
PEAKS = {  # dense bf16 TFLOP/s with fp32 accumulation, by the name that torch gives the GPU
    r"GeForce RTX 3090": 71.2,  # NVIDIA, Ampere GA102 whitepaper, table of the RTX 3090
    r"GeForce RTX 4080": 97.5,  # NVIDIA, Ada whitepaper, appendix A
    r"GeForce RTX 4090": 165.2,  # the same
    r"GeForce RTX 5090": 209.5,  # NVIDIA, RTX Blackwell whitepaper, appendix A
    r"A100-(SXM4|PCIE)-[48]0GB|A100 80GB PCIe": 312.0,  # NVIDIA, A100 datasheet
    r"L40S": 362.05,  # NVIDIA, L40S datasheet
    r"H100 80GB HBM3": 989.4,  # SXM; NVIDIA, H100 whitepaper
    r"H100 PCIe": 756.0,  # the same
    r"H200": 989.4,  # NVIDIA, H200 datasheet, half of what it gives with sparsity
    r"B200": 2250.0,  # NVIDIA, HGX B200 datasheet, an eighth of its 18 PFLOP/s
}


def peak_flops(name):
    """Dense bf16 FLOP/s of a GPU by its name, or None if it is not in PEAKS (a Ti, a laptop's or a slice is not)."""
    name = name.removeprefix("NVIDIA ")
    return next((peak * 1e12 for pattern, peak in PEAKS.items() if re.fullmatch(pattern, name)), None)


def numel(weight):
    """Parameters in a weight for the model: whole where ZeRO-3 holds a part, unpacked where 4 bits are stored."""
    state = getattr(weight, "quant_state", None)
    return math.prod(state.shape) if state is not None else getattr(weight, "ds_numel", None) or weight.numel()


def count_parameters(model):
    """(all, trained) parameters of a model; tied weights count once."""
    sizes = [(numel(weight), weight.requires_grad) for weight in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


def flops_per_token(model, context):
    """(FLOPs a token in the layers, FLOPs a trained token in the head) of one training step, forward and backward.

    PaLM (Chowdhery et al. 2022), appendix B: 6 N + 12 L H Q T a token, for N parameters, L layers, H heads of size Q
    and T tokens that a token attends to, masked half included. Of the 6, 2 are forward, 2 the activations' gradient and
    2 the weight's, which a frozen weight does without: 4 for what LoRA freezes, 6 for the adapters. Attention has no
    weights, so its 12 stay. The input embedding is looked up, not multiplied. The head counts for trained tokens only,
    as TRL computes it. Recomputed activations do not count (MFU, not hardware use). Of the experts of a mixture, those
    that a token is sent to. Layers with a sliding window count as if they had none.

    `context`: T, in tokens; for packs, the mean over tokens of the length of their document.
    """
    config = model.config.get_text_config()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    experts = next((n for key in ("num_experts", "num_local_experts", "n_routed_experts")
                    if (n := getattr(config, key, None))), None)  # fmt: skip
    layers = 0
    for name, weight in model.named_parameters():
        if weight is embedding.weight or weight is head.weight or "original_module." in name:
            continue
        used = getattr(config, "num_experts_per_tok", 1) / experts if experts and ".experts." in name else 1
        layers += numel(weight) * used * (6 if weight.requires_grad else 4)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers += 12 * config.num_hidden_layers * config.num_attention_heads * size * context
    return layers, numel(head.weight) * (6 if head.weight.requires_grad else 4)


def measure(dataset):
    """Counts a tokenised set as the collator will see it: {"rows", "tokens", "trained", "context"}.

    A document's first token is never a target; `context` is the mean over tokens of their document's length.
    """
    columns = {"input_ids", "labels", "seq_lengths"} & {*dataset.column_names}
    tokens = trained = squares = 0
    for table in dataset.select_columns(sorted(columns)).with_format("arrow").iter(batch_size=1000):
        lengths = pc.list_value_length(table["input_ids"]).to_numpy()
        if "seq_lengths" in columns:
            lengths = pc.list_flatten(table["seq_lengths"]).to_numpy()
        lengths = lengths[lengths > 0].astype("int64")
        labels = pc.list_flatten(table["labels" if "labels" in columns else "input_ids"]).to_numpy()
        tokens += int(lengths.sum())
        squares += int((lengths**2).sum())
        trained += int((labels != -100).sum() - (labels[lengths.cumsum() - lengths] != -100).sum())
    return {"rows": len(dataset), "tokens": tokens, "trained": trained, "context": squares / max(tokens, 1)}


def engine(trainer):
    """What trains, in words, from the object that wraps the model and from torch.distributed."""
    wrapped, dist = trainer.model_wrapped, torch.distributed
    world = dist.get_world_size() if dist.is_initialized() else 1
    device = trainer.args.device
    where = "the CPU"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        where = f"{properties.name} ({properties.total_memory / 2**30:.1f} GiB)"
    name = type(wrapped).__name__
    sharded = [weight for weight in wrapped.parameters() if isinstance(weight, DTensor)]
    if name == "DeepSpeedEngine":
        name = f"DeepSpeed ZeRO-{wrapped.zero_optimization_stage()}"
        if wrapped.zero_optimization_stage() == 3:
            parts = [not weight.ds_persist for weight in wrapped.parameters()]  # small ones stay whole on each rank
            name += f" ({sum(parts)} of {len(parts)} weights sharded)"
        off = [what for what in ("optimizer", "param") if _offloads(wrapped, what)]
        name += f", offloads {' and '.join(off)}" if off else ""
    elif sharded:
        name = f"FSDP2 ({len(sharded)} of {sum(1 for _ in wrapped.parameters())} weights sharded)"
    elif name == "DistributedDataParallel":
        name = "DDP"
    elif wrapped is trainer.model:
        name = "not distributed"
    splits = {"tensor": trainer.get_tp_size(), "context": trainer.get_cp_size(), "sequence": trainer.get_sp_size()}
    name += "".join(f", {kind} parallel {size}" for kind, size in splits.items() if size > 1)
    if world == 1:
        return f"{name}, 1 process on {where}"
    machines = world // int(os.environ.get("LOCAL_WORLD_SIZE", world))
    machines = f"{machines} machine{'s' * (machines > 1)}"
    return f"{name}, {world} processes on {machines} over {dist.get_backend()}, each on {where}"


def _offloads(wrapped, what):
    config = getattr(wrapped, f"zero_offload_{what}", lambda: None)()
    return bool(config) and str(getattr(config, "device", "none")).split(".")[-1] != "none"


def dtypes(model):
    """What the weights are held in: '3.6B 4-bit nf4 computing in bfloat16, 389M bfloat16, 33M float32 trained'."""
    held, kinds = {}, {}
    for layer in model.modules():
        if hasattr(layer, "compute_dtype") and getattr(layer.weight, "quant_state", None) is not None:
            computing = str(layer.compute_dtype).split(".")[-1]
            kinds[id(layer.weight)] = f"4-bit {layer.weight.quant_type} computing in {computing}"
    for weight in model.parameters():
        kind = kinds.get(id(weight), str(weight.dtype).split(".")[-1]) + " trained" * weight.requires_grad
        held[kind] = held.get(kind, 0) + numel(weight)
    return ", ".join(f"{amount(held[kind])} {kind}" for kind in sorted(held, key=held.get, reverse=True))


def amount(number):
    """1234 -> '1,234', 12345 -> '12.3K', 4.02e9 -> '4.02B'."""
    if number < 1e4:
        return f"{number:,.0f}"
    power = next(i for i in (4, 3, 2, 1) if number >= 10 ** (3 * i) or i == 1)
    return f"{number / 10 ** (3 * power):.3g}" + " KMBT"[power]


def duration(seconds):
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def near(path):
    """A path as one would type it here."""
    path, here = Path(path), Path.cwd()
    return str(path.relative_to(here)) if path.is_absolute() and path.is_relative_to(here) else str(path)


def memory_gib():
    """Peak memory of this process in GiB: what torch allocated on the GPU, else resident on the CPU."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    with suppress(OSError):  # getrusage counts the memory of the launcher that forked us too
        if found := re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()):
            return int(found[1]) / 2**20
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


class Show(ProgressCallback):
    """Counts what goes by (get_batch_samples), adds the figures (log) and shows them; one device sync a logged step."""

    def __init__(self, trainer):
        super().__init__()
        self.trainer, self.trained, self.flops = trainer, 0, None
        self.counts, self.positions = torch.zeros(2, dtype=torch.int64, device=trainer.args.device), 0
        self.seconds, self.since = 0.0, time.perf_counter()
        self.get_batch_samples, self.log = trainer.get_batch_samples, trainer.log
        trainer.get_batch_samples, trainer.log = self.counted, self.logged

    def counted(self, *args, **kwargs):
        """trainer.get_batch_samples: counts targets and tokens of this process, on its device."""
        self.since = time.perf_counter()  # an evaluation or a save before is left out
        batches, items = self.get_batch_samples(*args, **kwargs)
        for batch in batches:
            labels = batch["shift_labels"] if "shift_labels" in batch else batch["labels"][..., 1:]
            ids = batch["input_ids"]
            tokens = ids.numel()
            if "attention_mask" in batch:
                tokens = batch["attention_mask"].sum()
            elif self.trainer.args.pad_to_multiple_of:  # padding behind packs has position 0 throughout
                places = torch.arange(1, ids.shape[-1] + 1, device=ids.device)
                tokens = ((batch["position_ids"] != 0) * places).amax(-1).sum()
            self.counts[0] += labels.ne(-100).sum()
            self.counts[1] += tokens
            self.positions += ids.numel()
        return batches, items

    def logged(self, logs, *args, **kwargs):
        """trainer.log: adds the figures to a training step's line, on every process at once (as its loss was)."""
        if "loss" in logs and "learning_rate" in logs:
            logs.update(self.figures())
        return self.log(logs, *args, **kwargs)

    def figures(self):
        trainer, dist, world = self.trainer, torch.distributed, 1
        counts = torch.cat([self.counts, self.counts.new_tensor([self.positions])])
        if dist.is_initialized():
            world = dist.get_world_size()
            dist.all_reduce(counts)
            counts //= trainer.get_tp_size() * trainer.get_cp_size()  # these ranks have the same batch
        trained, tokens, positions = counts.tolist()
        self.seconds += time.perf_counter() - self.since
        self.trained += trained
        figures = {
            "trained_tokens": self.trained,
            "padding_share": round(1 - tokens / max(positions, 1), 4),
            "tokens_per_second": round(tokens / self.seconds, 1),
            "trained_tokens_per_second": round(trained / self.seconds, 1),
            "memory_gib": round(memory_gib(), 3),
        }
        if self.flops:
            done = self.flops[0] * tokens + self.flops[1] * trained
            figures["mfu"] = round(done / self.seconds / (world * self.flops[2]), 4)
        self.counts.zero_()
        self.positions, self.seconds, self.since = 0, 0.0, time.perf_counter()
        return figures

    # -- callbacks
    def on_train_begin(self, args, state, control, **_):
        self.trained = max((line.get("trained_tokens", 0) for line in state.log_history), default=0)
        self.began, self.first, self.current_step = time.perf_counter(), state.global_step, state.global_step
        data = measure(self.trainer.train_dataset) if hasattr(self.trainer.train_dataset, "with_format") else None
        peak = peak_flops(torch.cuda.get_device_name(args.device)) if args.device.type == "cuda" else None
        if peak and args.bf16 and data:
            self.flops = (*flops_per_token(self.trainer.model, data["context"]), peak)
        if state.is_world_process_zero:
            print(*start(self.trainer, state, data), sep="\n", flush=True)
            note_engine(Path(args.output_dir, "engine.txt"), engine(self.trainer), state.global_step)
            if sys.stderr.isatty() and not args.disable_tqdm:
                bar = "{percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"
                self.training_bar = tqdm(
                    total=state.max_steps, initial=state.global_step, smoothing=0, dynamic_ncols=True, bar_format=bar
                )

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        self.seconds, self.since = self.seconds + now - self.since, now
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_prediction_step(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **_):
        if not state.is_world_process_zero or "train_runtime" in logs:
            return
        text = line(logs)
        if self.training_bar is not None and "tokens_per_second" in logs:
            self.training_bar.set_postfix_str(text)
        elif self.training_bar is not None:
            self.training_bar.write(f"{state.global_step}/{state.max_steps}  {text}")
        else:
            done = state.global_step - self.first
            left = (time.perf_counter() - self.began) / max(done, 1) * (state.max_steps - state.global_step)
            text += f", {duration(left)} left" if "tokens_per_second" in logs else ""
            print(f"{state.global_step}/{state.max_steps}  {text}", flush=True)

    def on_train_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)


def line(logs):
    """One logged line in words; names that are unknown here are shown as they are."""
    if "tokens_per_second" in logs:
        words = f"loss {logs['loss']:.4g}, lr {logs['learning_rate']:.2e}"
        speed, trained = logs["tokens_per_second"], logs["trained_tokens_per_second"]
        words += f", {amount(speed)} tokens/s ({amount(trained)} trained), {logs['padding_share']:.1%} padding"
        words += f", {logs['memory_gib']:.1f} GiB"
        return words + (f", MFU {logs['mfu']:.1%}" if "mfu" in logs else "")
    if "eval_loss" in logs:
        loss = logs["eval_loss"]
        words = f"validation loss {loss:.4g} (perplexity {math.exp(min(loss, 700)):.4g})"
        return words + (f" in {logs['eval_runtime']:.1f} s" if "eval_runtime" in logs else "")
    return ", ".join(f"{key} {f'{value:.4g}' if isinstance(value, float) else value}" for key, value in logs.items())


def note_engine(path, said, resumed):
    """Write what trains to the run folder, for eval/card.py: a line for each engine that a run was resumed on."""
    before = path.read_text(encoding="utf-8").splitlines() if resumed and path.is_file() else []
    path.write_text("".join(line + "\n" for line in dict.fromkeys([*before, said])), encoding="utf-8")


def start(trainer, state, data):
    """The lines of the start block; `data`: measure() of the training set, or None if it is streamed."""
    args, model, script = trainer.args, trainer.model, RUN["script"]
    everything, trained = count_parameters(model)
    name = near(RUN["model"].model_name_or_path)
    unit, batch = "packs" if args.packing else "rows", trainer.get_total_train_batch_size(args)
    autocast = "bfloat16" if args.bf16 else "float16" if args.fp16 else "off"
    kept = "checkpointed" if args.activation_checkpointing else "kept"
    liger = "on" if args.use_liger_kernel else "off"
    trains = "assistant turns" if args.assistant_only_loss else "every token"
    lines = {
        "model": f"{name}, {amount(everything)} parameters, {amount(trained)} trained ({trained / everything:.2%})",
        "weights": f"{dtypes(model)}; autocast {autocast}",
        "attention": f"{model.config._attn_implementation}, Liger kernels {liger}, activations {kept}",
        "template": f"{near(args.chat_template_path)}, trains {trains}",
    }
    run = f"{state.max_steps:,} steps"
    if data:
        rows = f"{data['rows']:,} {unit}"
        if args.packing:
            rows = f"{len(script.rows):,} rows in {rows}"
            rows += f", {data['tokens'] / (data['rows'] * args.max_length):.1%} of {args.max_length:,} tokens full"
        held_out = trainer.eval_dataset
        rows += f"; validation {len(held_out):,} {unit}" if hasattr(held_out, "__len__") else "; no validation"
        lines["data"] = f"{near(script.dataset_name)}: {rows}"
        tokens, share = batch * data["tokens"] / data["rows"], data["trained"] / data["tokens"]
        lines["step"] = f"{batch:,} {unit}, {amount(tokens)} tokens on average, {share:.1%} of them trained"
        epochs = state.max_steps * batch / data["rows"]
        run += f", {epochs:.2f} epochs"
    origin = "the start"
    if state.global_step:
        origin = f"{near(trainer.args.resume_from_checkpoint)}, after step {state.global_step:,}"
    lines["run"] = f"{run}, from {origin}"
    lines["engine"] = engine(trainer)
    lines["output"] = near(args.output_dir)
    return [f"  {key:<10} {value}" for key, value in lines.items()]


def prepare(script, args, model):
    RUN.update(script=script, args=args, model=model)
    args.run_name = args.run_name or Path(args.output_dir).name  # in trackio and W&B: not a random one


def callback(trainer):
    for theirs in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(theirs)
    return Show(trainer)
