"""Runs a recipe under a shipped accelerate config on CPUs, and says from inside what the engine really was.

Used by test_engines, test_packing, test_two_nodes and test_slurm. accelerate and its engines fall back to one process
or to DDP without a word, so nothing outside the run is believed: PROBE looks at the wrapped model on every rank.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field

from tests.helpers.runs import REPO

PROBE = """
import json
from pathlib import Path
import torch
from transformers import TrainerCallback


def sizes(weight):  # numbers of a weight on this rank, and in all
    if hasattr(weight, "ds_id"):
        own = weight.ds_tensor if weight.numel() == 0 else weight
        return own.numel(), weight.ds_numel
    own = weight.to_local() if hasattr(weight, "to_local") else weight
    return own.numel(), weight.numel()


def weight_sizes(model):  # [(module's class, numbers on this rank, numbers in all)], a tied weight once
    found = {}
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            found[id(weight)] = (type(module).__name__, *sizes(weight))
    return list(found.values())


def state_size(optimizer):  # numbers of the first moment on this rank
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    total = 0
    for state in optimizer.state.values():
        moment = state.get("exp_avg", state.get("state1"))
        if moment is not None:
            total += (moment.to_local() if hasattr(moment, "to_local") else moment).numel()
    return total


def describe(trainer):
    engine, model = trainer.model_wrapped, trainer.model
    weights = weight_sizes(model)
    four_bit = [weight for weight in weights if weight[0] == "Linear4bit"]
    trained = sum(sizes(weight)[1] for weight in model.parameters() if weight.requires_grad)
    return {
        "engine": type(engine).__name__,
        "stage": engine.zero_optimization_stage() if hasattr(engine, "zero_optimization_stage") else None,
        "weights": [sum(weight[1] for weight in weights), sum(weight[2] for weight in weights)],
        "four_bit": [sum(weight[1] for weight in four_bit), sum(weight[2] for weight in four_bit)],
        "states": [state_size(trainer.optimizer), trained],
    }


def logits(trainer):  # of one fixed row
    trainer.model.eval()
    with torch.no_grad(), trainer.compute_loss_context_manager():
        return trainer.model_wrapped(input_ids=torch.arange(5, 69)[None]).logits.float()


class Probe(TrainerCallback):
    def __init__(self, trainer):
        self.trainer = trainer
        self.seen = []
        self.training_step = trainer.training_step
        trainer.training_step = self.watch_step

    def watch_step(self, model, inputs, *rest, **kwargs):
        self.seen.append(inputs["input_ids"].flatten().tolist())
        return self.training_step(model, inputs, *rest, **kwargs)

    def on_step_end(self, args, state, control, **_):  # in training: an evaluation leaves small weights whole (ZeRO-3)
        backend = torch.distributed.get_backend() if torch.distributed.is_initialized() else None
        self.report = {"world": args.world_size, "backend": backend, "seen": self.seen, **describe(self.trainer)}

    def on_train_end(self, args, state, control, **_):
        Path(args.output_dir, f"rank{args.process_index}.json").write_text(json.dumps(self.report))
        torch.save(logits(self.trainer), f"{args.output_dir}/logits{args.process_index}.pt")
"""


@dataclass
class Engine:
    config: str
    processes: int = 2
    engine: str = "DeepSpeedEngine"
    stage: int | None = None
    sharded: bool = False  # the weights; the optimizer states are under all but DDP
    launch: list = field(default_factory=list)  # flags of accelerate launch, as a user would pass them
    flags: list = field(default_factory=list)  # flags of the recipe

    def command(self, recipe, *flags, launch=()):
        """`accelerate launch` with the shipped config; only the number of processes and the CPU are ours."""
        fsdp = self.config.startswith("fsdp")
        shim = []
        if fsdp:
            shim.append(REPO / "tests" / "helpers" / "fsdp_cpu_shim.py")
        elif self.stage:
            shim.append(REPO / "tests" / "helpers" / "zero_shim.py")
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
        command += [REPO / "accelerate_configs" / f"{self.config}.yaml", "--num_processes", self.processes]
        command += [*(launch or ["--main_process_port", 0]), *self.launch, *shim, REPO / "recipes" / f"{recipe}.py"]
        return [*map(str, [*command, *flags, *self.flags, "--use_cpu", "false" if fsdp else "true"])]


SP = ["--packing", "false", "--pad_to_multiple_of", "512"]  # gloo wants rows of one length on all ranks
ENGINES = {
    "one": Engine("cpu", 1, engine=""),
    "ddp": Engine("ddp_8gpu", engine="DistributedDataParallel"),
    "zero1": Engine("zero1", stage=1),
    "zero2": Engine("zero2", stage=2),
    "zero3": Engine("zero3", stage=3, sharded=True),
    "offload": Engine("zero3_offload", stage=3, sharded=True),
    "fsdp2": Engine("fsdp2_8gpu", engine="FSDP", sharded=True),
    "hsdp": Engine(
        "fsdp2_8nodes",
        4,
        engine="FSDP",
        sharded=True,
        launch=[
            "--num_machines",
            "1",
            "--parallelism_config_dp_replicate_size",
            "2",
            "--parallelism_config_dp_shard_size",
            "2",
        ],
    ),
    "sp": Engine("sequence_parallel", stage=3, sharded=True, flags=SP, launch=["--parallelism_config_sp_size", "2"]),
    "ddp8": Engine("ddp_8gpu", 8, engine="DistributedDataParallel"),
}


def run(command, **kwargs):
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=environment, **kwargs)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def ranks(folder):
    return [json.loads((folder / f"rank{i}.json").read_text()) for i in range(len(list(folder.glob("rank*.json"))))]


def curve(folder, name):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def gap(one, other, name):
    """Largest difference of two curves: absolute, for gradient norms relative."""
    pairs = list(zip(curve(one, name), curve(other, name), strict=True))
    assert pairs
    return max(abs(a - b) / (a if name == "grad_norm" else 1) for a, b in pairs)
