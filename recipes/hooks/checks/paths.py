"""Names of models and datasets that look like a folder or a file: there must be one."""

import shlex
from difflib import get_close_matches
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from trl import ModelConfig, ScriptArguments

from ..messages import UsageError

ROW_SUFFIXES = (".jsonl", ".json", ".parquet", ".ndjson")  # of files that a recipe loads
TABLE_SUFFIXES = (".csv", ".tsv", ".txt", ".xlsx", ".yaml", ".yml")  # of files that it does not load
FILE_SUFFIXES = (*ROW_SUFFIXES, *TABLE_SUFFIXES, ".gz", ".zst", ".arrow", ".safetensors")


def check_model_and_dataset_names(script_args: ScriptArguments, model_args: ModelConfig) -> None:
    """Raise UsageError for a name that looks like a folder or file and is none, and for files that nobody loads."""
    check_exists("model", "--model_name_or_path", model_args.model_name_or_path)
    check_model_is_folder(Path(model_args.model_name_or_path))
    check_exists("dataset", "--dataset_name", script_args.dataset_name)
    check_rows_can_be_read(Path(script_args.dataset_name))


def looks_like_path(name: str) -> bool:
    """Return whether a name can only be a path: a hub id is "owner/name", or "name" of the oldest ones."""
    path = Path(name)
    if path.is_absolute() or name.startswith((".", "~")):
        return True
    if name.count("/") > 1 or name.endswith("/"):
        return True
    return path.suffix.lower() in FILE_SUFFIXES


def lies_in_folder(name: str) -> bool:
    """Return whether a name of the form "owner/name" begins with a folder that is here, as runs/x."""
    return Path(Path(name).parts[0]).is_dir()


def check_exists(kind: str, flag: str, name: str | None) -> None:
    """Raise UsageError for a path of nothing. `kind`: "model" or "dataset", as the hub has it.

    Beside a folder of its owner's name, a hub id is one that was downloaded before.
    """
    if not name:
        raise UsageError(f"{flag}: none is set, pass a local path or a hub id")
    path = Path(name)
    if path.exists():
        return
    missing = "no such folder"
    if path.suffix.lower() in FILE_SUFFIXES:
        missing = "no such file"
    suggestion = suggest_path(path)
    if looks_like_path(name):
        raise UsageError(f"{flag} {name}: {missing}{suggestion}")
    if lies_in_folder(name) and not was_downloaded(kind, name):
        hint = suggestion or f"; if it is a hub id: hf download --repo-type {kind} {name}"
        raise UsageError(f"{flag} {name}: {missing}{hint}")


def was_downloaded(kind: str, name: str) -> bool:
    """Return whether the hub's cache has a repository."""
    folder = repo_folder_name(repo_id=name, repo_type=kind)
    return Path(constants.HF_HUB_CACHE, folder).is_dir()


def suggest_path(path: Path) -> str:
    """Return ", did you mean X?" with an existing neighbor of the first part of the path that is missing, or ""."""
    if path.expanduser().exists():
        return f": write {path.expanduser()}, since ~ stands for itself here"
    missing = path
    while not missing.parent.exists():
        missing = missing.parent
    if not missing.parent.is_dir():
        return f": {missing.parent} is a file"
    neighbors = [entry.name for entry in missing.parent.iterdir()]
    nearest = get_close_matches(missing.name, neighbors, n=1)
    if not nearest:
        return ""
    neighbor = missing.parent / nearest[0]
    completed = neighbor / path.relative_to(missing)
    if completed.exists():
        neighbor = completed
    return f", did you mean {neighbor}?"


def check_model_is_folder(path: Path) -> None:
    if path.is_file():
        raise UsageError(f"--model_name_or_path {path}: a file, and a model is a folder: pass the one that it lies in")


def check_rows_can_be_read(path: Path) -> None:
    """Raise UsageError for an existing table or text file, with the commands that make rows of it."""
    suffix = path.suffix.lower()
    if not path.is_file() or suffix not in TABLE_SUFFIXES:
        return
    if suffix in (".csv", ".tsv"):
        raise UsageError(f"--dataset_name {path}: a table, not rows of messages; {explain_table(path)}")
    raise UsageError(
        f"--dataset_name {path}: rows are read from .jsonl, .json and .parquet files and save_to_disk folders: save it "
        "as one of them (a sheet first as .csv); python -m data_prep.normalize then makes messages of the rows"
    )


def explain_table(path: Path) -> str:
    """Return the command that makes a set of a .csv or .tsv file."""
    return (
        f"python -m data_prep.normalize fields {shlex.quote(str(path))} --map prompt=COLUMN answer=COLUMN "
        f"--out data/{shlex.quote(path.stem)} makes them"
    )
