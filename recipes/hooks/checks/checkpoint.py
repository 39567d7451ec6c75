"""The checkpoint to resume from: by which engine it was saved, and whether it holds the optimizer's state."""

from collections.abc import Mapping
from pathlib import Path

from trl import SFTConfig

from ..messages import UsageError, relative_path
from .allowed import ALLOWED
from .engine import name_engine

UNSHARDED = "one process or DDP"


def engine_of_checkpoint(folder: Path) -> str:
    """Return what saved a checkpoint, by its files: DeepSpeed, FSDP or UNSHARDED."""
    if (folder / "latest").is_file():
        return "DeepSpeed"
    for path in folder.iterdir():
        if path.name == "optimizer.bin" or path.name.startswith(("pytorch_model_fsdp", "optimizer_")):
            return "FSDP"
    return UNSHARDED


def engine_of_run(training_args: SFTConfig) -> str:
    """Return the same of this run."""
    name = name_engine(training_args)
    if name.startswith("ZeRO"):
        return "DeepSpeed"
    return "FSDP" if name.startswith("FSDP") else UNSHARDED


def check_engine_of_checkpoint(run: Mapping[str, object], training_args: SFTConfig) -> None:
    """Raise UsageError for a checkpoint of another engine, or of one that saves a piece for each of other processes.

    `run`: run.json. Without it, the stage of ZeRO and the number of processes are not known.
    """
    checkpoint = training_args.resume_from_checkpoint
    if not checkpoint:
        return
    engine = engine_of_checkpoint(Path(checkpoint))
    if engine == engine_of_run(training_args) == UNSHARDED:
        return
    now = f"{name_engine(training_args)} with {training_args.world_size} processes"
    before = engine
    if run:
        before = f"{run['engine']} with {run['settings']['processes']} processes"
    if before == now or (not run and engine == engine_of_run(training_args)):
        return
    raise UsageError(
        f"{relative_path(checkpoint)} was saved by {before}, this run is {now}, and such files cannot be loaded "
        "exactly: launch with the --config_file and the processes of before, or with another --output_dir to start "
        "afresh"
    )


def check_optimizer_state(training_args: SFTConfig, allow: list[str]) -> None:
    """Raise UsageError for a checkpoint of --save_only_model true, whose optimizer and schedule would start over."""
    checkpoint = training_args.resume_from_checkpoint
    if not checkpoint or "save_only_model" in allow:
        return
    folder = Path(checkpoint)
    if (folder / "optimizer.pt").is_file() or engine_of_checkpoint(folder) != UNSHARDED:
        return
    raise UsageError(
        f"{relative_path(checkpoint)} holds no optimizer state (--save_only_model true): optimizer and schedule would "
        f"start over in the middle of the run: another --output_dir starts afresh, --allow save_only_model goes on "
        f"({ALLOWED['save_only_model']})"
    )
