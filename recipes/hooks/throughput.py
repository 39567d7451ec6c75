"""Count what every optimizer step trains on: targets, tokens, padding, seconds, memory and model FLOPs utilization.

`trained_tokens` (since the start, over resumes) and `padding_share` are the same in every run of one seed.
`tokens_per_second`, `trained_tokens_per_second`, `memory_gib` (peak) and `mfu` are measured.
"""

import math
import re
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc
import torch
from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainerState

from data_prep.common.gpu_cards import find_device_card

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")  # one name a family


@dataclass
class DatasetSize:
    """A tokenized set as the collator sees it: `context` is the mean over tokens of their document's length."""

    rows: int
    tokens: int
    trained: int
    context: float


@dataclass
class ParameterCount:
    total: int
    trained: int


@dataclass
class TokenFlops:
    """FLOPs of one training step, forward and backward: a token in the layers, a trained token in the head."""

    layers: float
    head: float


def peak_flops(gpu: str) -> float | None:
    """Return the dense bf16 FLOP/s of a GPU by its name; None for one that is not known (a Ti, a laptop's, a slice)."""
    card = find_device_card(gpu)
    return None if card is None else card.teraflops * 1e12


def numel(weight: torch.Tensor) -> int:
    """Return a weight's parameters: whole where ZeRO-3 holds a part, unpacked where 4 bits are stored."""
    quant_state = getattr(weight, "quant_state", None)
    if quant_state is not None:
        return math.prod(quant_state.shape)
    return getattr(weight, "ds_numel", None) or weight.numel()


def count_parameters(model: PreTrainedModel) -> ParameterCount:
    """Return all and trained parameters of a model; tied weights count once."""
    count = ParameterCount(total=0, trained=0)
    for weight in model.parameters():
        count.total += numel(weight)
        if weight.requires_grad:
            count.trained += numel(weight)
    return count


def active_expert_share(config: PreTrainedConfig) -> float:
    """Return the share of a mixture's experts that one token is sent to, 1 for a model without experts."""
    for name in EXPERT_COUNTS:
        experts = getattr(config, name, None)
        if experts:
            return getattr(config, "num_experts_per_tok", 1) / experts
    return 1


def flops_per_parameter(weight: torch.Tensor) -> int:
    """Return the FLOPs a token: 2 forward, 2 for the activations' gradient, 2 for the weight's if it is trained."""
    return 6 if weight.requires_grad else 4


def flops_per_token(model: PreTrainedModel, context: float) -> TokenFlops:
    """Return the FLOPs of a token in one training step; `context`: tokens that a token attends to.

    PaLM (Chowdhery et al. 2022), appendix B: 6 N + 12 L H Q T a token, for N parameters, L layers, H heads of size Q
    and T tokens that a token attends to, masked half included. What LoRA freezes counts 4, not 6. Attention has no
    weights, so its 12 stay. The input embedding is looked up, not multiplied. The head counts for trained tokens only,
    as TRL computes it. Recomputed activations do not count (MFU, not hardware use). Of the experts of a mixture, those
    that a token is sent to. Layers with a sliding window count as if they had none. For packs, T is the mean over
    tokens of the length of their document.
    """
    config = model.config.get_text_config()
    head = model.get_output_embeddings().weight
    embedding = model.get_input_embeddings().weight
    expert_share = active_expert_share(config)

    layers = 0
    for name, weight in model.named_parameters():
        if weight is embedding or weight is head or "original_module." in name:
            continue
        share = expert_share if ".experts." in name else 1
        layers += numel(weight) * share * flops_per_parameter(weight)

    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers += 12 * config.num_hidden_layers * config.num_attention_heads * head_size * context
    return TokenFlops(layers=layers, head=numel(head) * flops_per_parameter(head))


def measure(dataset: Dataset) -> DatasetSize:
    """Count a tokenized set as the collator will see it; a document's first token is never a target.

    Columns: input_ids; labels, if not every token is a target; seq_lengths, if a row is a pack of documents.
    """
    columns = []
    for name in ("input_ids", "labels", "seq_lengths"):
        if name in dataset.column_names:
            columns.append(name)
    length_column = "seq_lengths" if "seq_lengths" in columns else None
    label_column = "labels" if "labels" in columns else "input_ids"

    tokens = 0
    trained = 0
    squares = 0
    for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        if length_column:
            lengths = pc.list_flatten(table[length_column]).to_numpy()
        else:
            lengths = pc.list_value_length(table["input_ids"]).to_numpy()
        lengths = lengths[lengths > 0].astype("int64")
        first_tokens = lengths.cumsum() - lengths
        is_target = pc.list_flatten(table[label_column]).to_numpy() != -100
        tokens += int(lengths.sum())
        squares += int((lengths**2).sum())
        trained += int(is_target.sum() - is_target[first_tokens].sum())
    return DatasetSize(rows=len(dataset), tokens=tokens, trained=trained, context=squares / max(tokens, 1))


def resident_memory_gib() -> float:
    """Return the peak resident memory of this process; nan where the system does not say it (Windows)."""
    with suppress(OSError):  # getrusage counts the memory of the launcher that forked this process too
        status = Path("/proc/self/status").read_text()
        match = re.search(r"VmHWM:\s+(\d+) kB", status)
        if match:
            return int(match[1]) / 2**20
    try:
        import resource
    except ModuleNotFoundError:
        return math.nan

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bytes_per_unit = 1 if sys.platform == "darwin" else 1024
    return peak * bytes_per_unit / 2**30


def memory_gib() -> float:
    """Return the peak memory of this process: what torch allocated on the GPU, else resident on the CPU."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    return resident_memory_gib()


def describe_other_memory(optimizer: torch.optim.Optimizer | None) -> str:
    """Return what memory_gib does not count, "" where there is none: what torch has reserved on the GPU, and pages of
    optimizer states, which bitsandbytes keeps where there is room."""
    parts = []
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        parts.append(f"{torch.cuda.max_memory_reserved() / 2**30:.1f} reserved")
    pages = 0
    for state in optimizer.state.values() if optimizer is not None else ():
        for value in state.values():
            if getattr(value, "is_paged", False):
                pages += value.nbytes
    if pages:
        parts.append(f"{pages / 2**30:.2f} more of paged optimizer states")
    return ", ".join(parts)


class Throughput:
    """Count the batches of a trainer, its seconds without evaluations and saves; one device sync a logged step."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.size: DatasetSize | None = None  # None where the set is streamed
        self.token_flops: TokenFlops | None = None  # None where the GPU's peak is not known
        self.gpu_peak: float | None = None  # FLOP/s
        self.trained_tokens = 0  # of all ranks, since the start of the run

        # of this rank, over the whole process
        self.total_seconds = 0.0
        self.total_positions = 0

        # of this rank, since the last figures
        self.targets_and_tokens = torch.zeros(2, dtype=torch.int64, device=trainer.args.device)
        self.positions = 0
        self.seconds = 0.0
        self.clock = time.perf_counter()

    def prepare(self, state: TrainerState) -> None:
        """Read what earlier parts of the run trained on, and measure the set: to be called when training begins."""
        for line in state.log_history:
            self.trained_tokens = max(self.trained_tokens, line.get("trained_tokens", 0))
        if isinstance(self.trainer.train_dataset, Dataset):
            self.size = measure(self.trainer.train_dataset)

        args = self.trainer.args
        if self.size and args.device.type == "cuda" and args.bf16:
            self.gpu_peak = peak_flops(torch.cuda.get_device_name(args.device))
        if self.gpu_peak:
            self.token_flops = flops_per_token(self.trainer.model, self.size.context)

    def start_step(self) -> None:
        """Start the clock of a step: what came before it, as an evaluation or a save, is left out."""
        self.clock = time.perf_counter()

    def end_step(self) -> None:
        """Add the seconds since the clock was started or read; a second call adds what has passed since the first."""
        now = time.perf_counter()
        self.seconds += now - self.clock
        self.total_seconds += now - self.clock
        self.clock = now

    def count(self, batches: list[dict[str, torch.Tensor]]) -> None:
        """Count targets, tokens and positions of a step's micro-batches, on their device."""
        for batch in batches:
            if "shift_labels" in batch:
                labels = batch["shift_labels"]
            else:
                labels = batch["labels"][..., 1:]
            self.targets_and_tokens[0] += labels.ne(-100).sum()
            self.targets_and_tokens[1] += self.count_tokens(batch)
            self.positions += batch["input_ids"].numel()
            self.total_positions += batch["input_ids"].numel()

    def count_tokens(self, batch: dict[str, torch.Tensor]) -> torch.Tensor | int:
        """Return the tokens of a batch without its padding."""
        input_ids = batch["input_ids"]
        if "attention_mask" in batch:
            return batch["attention_mask"].sum()
        if self.trainer.args.pad_to_multiple_of:  # padding behind packs has position 0 throughout
            numbers = torch.arange(1, input_ids.shape[-1] + 1, device=input_ids.device)
            last_numbers = torch.where(batch["position_ids"] != 0, numbers, 0).amax(-1)
            return last_numbers.sum()
        return input_ids.numel()

    def figures(self) -> dict[str, float]:
        """Return the figures since the last call, over all ranks: every rank has to call it at once."""
        counts = torch.cat([self.targets_and_tokens, self.targets_and_tokens.new_tensor([self.positions])])
        world_size = 1
        if torch.distributed.is_initialized():
            world_size = torch.distributed.get_world_size()
            torch.distributed.all_reduce(counts)
            counts //= self.trainer.get_tp_size() * self.trainer.get_cp_size()  # these ranks have the same batch
        trained, tokens, positions = counts.tolist()  # waits for the device, so that the seconds are whole
        self.end_step()
        self.trained_tokens += trained

        figures = {
            "trained_tokens": self.trained_tokens,
            "padding_share": round(1 - tokens / max(positions, 1), 4),
            "tokens_per_second": round(tokens / self.seconds, 1),
            "trained_tokens_per_second": round(trained / self.seconds, 1),
            "memory_gib": round(memory_gib(), 3),
        }
        if self.token_flops:
            flops = self.token_flops.layers * tokens + self.token_flops.head * trained
            figures["mfu"] = round(flops / self.seconds / (world_size * self.gpu_peak), 4)
        self.targets_and_tokens.zero_()
        self.positions = 0
        self.seconds = 0.0
        return figures
