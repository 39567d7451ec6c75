"""Read rows of the Hugging Face hub."""

import re
import sys
from pathlib import Path

from .chunks import ROWS, Chunk
from .errors import UsageError


def download_files(pattern):
    """The folder (or file) hf://datasets/owner/name@revision/path as it lies in the repository, for sets whose own
    files are to be read and not what datasets makes of them. What will be downloaded is said first. Raises
    UsageError."""
    from huggingface_hub import HfApi, snapshot_download

    found = re.fullmatch(r"hf://datasets/([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?/(.+?)/*", pattern)
    if not found:
        raise UsageError(
            f"{pattern}: write hf://datasets/owner/name/path, path being a folder or file of the repository"
        )
    repo, revision, path = found.groups()
    try:
        info = HfApi().dataset_info(repo, revision=revision, files_metadata=True)
        files = [one for one in info.siblings if one.rfilename == path or one.rfilename.startswith(f"{path}/")]
        size = sum(file.size or 0 for file in files) / 1e9
        print(f"{repo}: {len(files)} files, {size:.2f} GB ({info.sha[:8]}), kept in the cache", file=sys.stderr)
        names = [one.rfilename for one in files]
        folder = snapshot_download(repo, repo_type="dataset", revision=info.sha, allow_patterns=names) if names else ""
    except Exception as error:  # what hub clients raise: all mean the same here
        raise hub_error(pattern, error, "pass a local folder, or set HF_ENDPOINT to a mirror") from None
    if not names:
        raise UsageError(f"{pattern}: {repo} has no such file or folder: see its page on the hub")
    return Path(folder, path)


def hub_error(name, error, more):
    """UsageError about what the hub did not give."""
    said = " ".join(str(error).split())[:200].rstrip(".")
    return UsageError(f"{name}: could not be loaded from the hub ({type(error).__name__}: {said}): {more}")


def hub_chunks(name, inputs):
    """Blocks of a set on the hub, owner/name:config@split (split train). What will be downloaded is said first."""
    import datasets
    from huggingface_hub import HfApi

    repo, _, split = name.partition("@")
    repo, _, config = repo.partition(":")
    split = split or "train"
    try:
        info = HfApi().dataset_info(repo, files_metadata=True)
        size = sum(file.size or 0 for file in info.siblings) / 1e9
        print(f"{repo}: up to {size:.2f} GB to download ({info.sha[:8]}), kept in the cache", file=sys.stderr)
        rows = datasets.load_dataset(repo, config or None, split=split, revision=info.sha)
    except Exception as error:
        more = "pass a file, set HF_ENDPOINT to a mirror, or name config and split as owner/name:config@split"
        raise hub_error(name, error, more) from None
    inputs[name] = info.sha
    first = 1
    for batch in rows.data.table.to_batches(ROWS):
        yield Chunk(name, "train", first, batch)
        first += len(batch)
