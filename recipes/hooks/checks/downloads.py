"""What will be downloaded, with its size, before it starts."""

import re
from contextlib import suppress
from pathlib import Path

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.hf_api import RepoSibling
from trl import ModelConfig, ScriptArguments

from ..messages import is_main_process, say

LOADED = re.compile(r"[^/]+\.(safetensors|json|jinja|txt|model)")  # the files of a model that from_pretrained takes


def say_downloads(script_args: ScriptArguments, model_args: ModelConfig) -> None:
    """Say what each hub id takes to download: one line for a model, one for a dataset."""
    say_download("model", model_args.model_name_or_path, model_args.model_revision)
    say_download("dataset", script_args.dataset_name, None)


def say_download(kind: str, name: str | None, revision: str | None) -> None:
    if not is_main_process() or constants.HF_HUB_OFFLINE or not name or Path(name).exists():
        return
    size = 0
    with suppress(Exception):  # what is wrong with a name is said where it is loaded
        size = count_missing_bytes(kind, name, revision)
    if not size:
        return
    bound = ""
    if kind == "dataset":  # not every file of a dataset is loaded
        bound = "up to "
    say(f"{kind} {name}: {bound}{size / 1e9:.2f} GB to download")


def count_missing_bytes(kind: str, name: str, revision: str | None) -> int:
    """Return the bytes of a hub repository's files that would be loaded and are not in the cache."""
    info = HfApi().repo_info(name, repo_type=kind, revision=revision, files_metadata=True)
    total = 0
    for file in info.siblings:
        if kind == "model" and not LOADED.fullmatch(file.rfilename):
            continue
        if not is_cached(file, kind, name, info.sha):
            total += file.size or 0
    return total


def is_cached(file: RepoSibling, kind: str, name: str, commit: str) -> bool:
    path = try_to_load_from_cache(name, file.rfilename, repo_type=kind, revision=commit)
    return isinstance(path, str)
