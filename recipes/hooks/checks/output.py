"""The output folder, and the checkpoint to resume from."""

from pathlib import Path

from trl import SFTConfig

from ..messages import UsageError, relative_path


def check_output_folder(training_args: SFTConfig) -> None:
    """Raise UsageError for a folder in use without --resume_from_checkpoint, and for a path that is no checkpoint.

    `training_args.resume_from_checkpoint` is what the user typed (None, "true", "false" or a path), or the path that
    "true" stands for.
    """
    choice = str(training_args.resume_from_checkpoint).lower()
    if choice == "true":
        return
    if choice not in ("none", "false"):
        check_checkpoint(Path(training_args.resume_from_checkpoint))
        return
    folder = Path(training_args.output_dir)
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(
            f"--output_dir {relative_path(folder)} is in use: --resume_from_checkpoint true goes on there, another "
            "--output_dir starts afresh"
        )


def check_checkpoint(folder: Path) -> None:
    """Raise UsageError for a folder that holds no trainer_state.json, which the trainer writes last."""
    if not (folder / "trainer_state.json").is_file():
        raise UsageError(
            f"--resume_from_checkpoint {relative_path(folder)} is no checkpoint: --resume_from_checkpoint true takes "
            "the newest of output_dir"
        )
