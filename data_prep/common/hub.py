"""Read rows of the Hugging Face hub."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from .chunks import ROWS, Chunk
from .errors import UsageError
from .exact_numbers import read_json_exactly

HUB_PATH = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?/(.+?)/*")


def download_files(pattern: str) -> Path:
    """Return the folder or file hf://datasets/owner/name@revision/path as it lies in the repository.

    For sets whose own files are to be read, not what datasets makes of them. What will be downloaded is said first.
    Raises UsageError.
    """
    from huggingface_hub import HfApi, snapshot_download

    match = HUB_PATH.fullmatch(pattern)
    if not match:
        raise UsageError(
            f"{pattern}: write hf://datasets/owner/name/path, path being a folder or file of the repository"
        )
    repository, revision, path = match.groups()
    try:
        info = HfApi().dataset_info(repository, revision=revision, files_metadata=True)
        names = []
        size = 0
        for file in info.siblings:
            if file.rfilename == path or file.rfilename.startswith(f"{path}/"):
                names.append(file.rfilename)
                size += file.size or 0
        say_download(repository, f"{len(names)} files, {size / 1e9:.2f} GB", info.sha)
        folder = ""
        if names:
            folder = snapshot_download(repository, repo_type="dataset", revision=info.sha, allow_patterns=names)
    except Exception as error:  # what hub clients raise: all mean the same here
        raise hub_error(pattern, error, "pass a local folder, or set HF_ENDPOINT to a mirror") from None
    if not names:
        raise UsageError(f"{pattern}: {repository} has no such file or folder: see its page on the hub")
    return Path(folder, path)


def read_hub(name: str, input_hashes: dict[str, str]) -> Iterator[Chunk]:
    """Yield the chunks of a set on the hub, owner/name:config@split (split train). Raises UsageError."""
    import datasets
    from huggingface_hub import HfApi

    repository, _, split = name.partition("@")
    repository, _, config = repository.partition(":")
    read_json_exactly()
    try:
        info = HfApi().dataset_info(repository, files_metadata=True)
        size = sum(file.size or 0 for file in info.siblings)
        say_download(repository, f"up to {size / 1e9:.2f} GB to download", info.sha)
        rows = datasets.load_dataset(repository, config or None, split=split or "train", revision=info.sha)
    except Exception as error:  # what hub clients raise: all mean the same here
        advice = "pass a file, set HF_ENDPOINT to a mirror, or name config and split as owner/name:config@split"
        raise hub_error(name, error, advice) from None
    input_hashes[name] = info.sha
    first_line = 1
    for batch in rows.data.table.to_batches(ROWS):
        yield Chunk(name, "train", first_line, batch)
        first_line += len(batch)


def say_download(repository: str, size: str, revision: str) -> None:
    print(f"{repository}: {size} ({revision[:8]}), kept in the cache", file=sys.stderr)


def hub_error(name: str, error: Exception, advice: str) -> UsageError:
    """Return the UsageError of what the hub did not give."""
    message = " ".join(str(error).split())[:200].rstrip(".")
    return UsageError(f"{name}: could not be loaded from the hub ({type(error).__name__}: {message}): {advice}")
