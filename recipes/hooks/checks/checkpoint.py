"""The checkpoint to resume from: by which engine it was saved, and whether it holds the optimizer's state."""

from collections.abc import Mapping
from pathlib import Path

from trl import SFTConfig

from ..checkpoints import RUN
from ..messages import UsageError, relative_path, say
from ..run_lock import LOCK
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


def describe_engine(engine: str, processes: int) -> str:
    if engine == "one process":
        return engine
    return f"{engine} with {processes} processes"


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
    now = describe_engine(name_engine(training_args), training_args.world_size)
    before = engine
    if run:
        before = describe_engine(run["engine"], run["settings"]["processes"])
    if before == now or (not run and engine == engine_of_run(training_args)):
        return
    raise UsageError(
        f"{relative_path(checkpoint)} was saved by {before}, this run is {now}, and such files cannot be loaded "
        "exactly: launch with the --config_file and the processes of before, or with another --output_dir to start "
        "afresh"
    )


def say_unknown_run(checkpoint: str | None, run: Mapping[str, object]) -> None:
    """Say that a checkpoint has no run.json, or one that cannot be read."""
    if checkpoint and not run:
        say(f"{relative_path(checkpoint)} has no {RUN} that can be read: whether it is of the same run is not checked")


def check_optimizer_state(training_args: SFTConfig, allow: list[str]) -> None:
    """Raise UsageError for a checkpoint of --save_only_model true, whose optimizer and schedule would start over."""
    checkpoint = training_args.resume_from_checkpoint
    if not checkpoint or holds_optimizer_state(Path(checkpoint)):
        return
    fault = f"{relative_path(checkpoint)} holds no optimizer state (--save_only_model true)"
    if "save_only_model" in allow:
        say(f"{fault}: goes on with a new optimizer and a schedule from its start")
        return
    raise UsageError(
        f"{fault}: optimizer and schedule would start over in the middle of the run: another --output_dir starts "
        f"afresh, --allow save_only_model goes on ({ALLOWED['save_only_model']})"
    )


def holds_optimizer_state(folder: Path) -> bool:
    if engine_of_checkpoint(folder) == "DeepSpeed":
        return True
    return any(path.name in ("optimizer.pt", "optimizer.bin") for path in folder.iterdir()) or any(
        folder.glob("optimizer_*")
    )


def check_output_dir(training_args: SFTConfig) -> None:
    """Raise UsageError where a run that starts here, or comes from elsewhere, would write into the files of another.

    The recipe has looked too, before the folder was held.
    """
    output_dir = Path(training_args.output_dir)
    is_used = output_dir.is_dir() and any(path.name != LOCK for path in output_dir.iterdir())
    choice = str(training_args.resume_from_checkpoint).lower()
    if not is_used or choice == "true":
        return
    if choice in ("none", "false"):
        raise UsageError(
            f"{relative_path(output_dir)} is in use: --resume_from_checkpoint true goes on there, another --output_dir "
            "is new"
        )
    run_folder = Path(training_args.resume_from_checkpoint).parent
    if run_folder.resolve() != output_dir.resolve():
        raise UsageError(
            f"{relative_path(output_dir)} holds another run than {relative_path(run_folder)}, whose checkpoint is to "
            f"be resumed: --output_dir {relative_path(run_folder)} goes on there, a new --output_dir beside it"
        )
