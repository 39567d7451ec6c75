"""A checkpoint is used only if it is whole.

Every save is sealed: once all ranks have written, `manifest.json` holds size and xxh3_128 of every file, and only then
is an older checkpoint deleted or the new one pushed. A resume reads them all again before anything is loaded; a folder
that fails is renamed `broken-checkpoint-40`, and the one before it is taken. All ranks must see the same output folder.
"""

import contextlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import xxhash
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from trl import SFTConfig

from .messages import UsageError, say

MANIFEST = "manifest.json"
RUN = "run.json"  # written by identity.py: this package was there when the folder began
Value = TypeVar("Value")


def on_main_process(function: Callable[[], Value]) -> Value:
    """Return what a function returns on rank 0, on every rank; what it raises there is raised everywhere."""
    state = PartialState()
    if state.num_processes == 1:
        return function()
    result = [None, None]
    if state.is_main_process:
        try:
            result[0] = function()
        except UsageError as error:
            result[1] = str(error)
        except Exception as error:  # else the other ranks would wait for it
            result[1] = f"{type(error).__name__}: {error}"
            broadcast_object_list(result)
            raise
    broadcast_object_list(result)
    if result[1] is not None:
        raise UsageError(result[1])
    return result[0]


# -- writing --
def checksum(path: Path, sync: bool = False) -> tuple[int, str]:
    """Return (bytes, xxh3_128) of a file. sync: it is on the disk first, else it is read from there again."""
    size = 0
    state = xxhash.xxh3_128()
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        elif hasattr(os, "posix_fadvise"):  # not what the page cache still remembers of it
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        block = file.read(1 << 24)
        while block:
            size += len(block)
            state.update(block)
            block = file.read(1 << 24)
    return size, state.hexdigest()


def write_json(path: Path, value: object) -> None:
    """Write aside and rename: after a power cut the file is there whole, or not at all."""
    aside = path.with_name(path.name + ".part")
    with open(aside, "w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    with contextlib.suppress(OSError):  # some network file systems cannot
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def seal(folder: Path) -> None:
    """Write the manifest of a checkpoint that all ranks have written."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(MANIFEST)]
    checksums = {str(path.relative_to(folder)): checksum(path, sync=True) for path in files}
    for parent in {path.parent for path in files}:
        sync_folder(parent)
    write_json(folder / MANIFEST, {"files": checksums})


# -- reading --
def read_run(checkpoint: str | None) -> dict:
    """Return run.json as it was when a checkpoint was saved, empty where none can be read."""
    if not checkpoint:
        return {}
    folder = Path(checkpoint)
    for path in (folder / RUN, folder.parent / RUN):
        if path.is_file():
            with contextlib.suppress(ValueError):
                run = json.loads(path.read_text(encoding="utf-8"))
                if isinstance(run, dict) and {"engine", "settings", "contents"} <= set(run):
                    return run
    return {}


def find_fault(folder: Path) -> str | None:
    """Return what is wrong with a sealed checkpoint, or None."""
    try:
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
        for name, (size, digest) in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} bytes, {size:,} were written"
            if checksum(path)[1] != digest:
                return f"{name} is not what was written (checksum)"
    except FileNotFoundError:
        return f"it has no {MANIFEST}: its save was cut short"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    except OSError as error:
        return f"it cannot be read ({error})"
    return None


def is_unsealed(folder: Path) -> bool:
    """Return whether a run without this package wrote the checkpoint, and wrote it to its end."""
    run_folder = folder.parent
    sealed_here = (run_folder / RUN).is_file() or any(run_folder.glob(f"*/{MANIFEST}"))
    state = folder / "trainer_state.json"  # written last
    return not sealed_here and state.is_file() and state.read_bytes().endswith(b"\n}\n")


def verify(folder: Path) -> str | None:
    """Return None for a checkpoint that can be used, else what is wrong with it."""
    if is_unsealed(folder):
        say(f"{folder.name} was saved without checksums: taken unverified, checked from now on")
        seal(folder)
        return None
    return find_fault(folder)


def set_aside(folder: Path) -> Path:
    """Rename a broken checkpoint, and return its new path."""
    aside = folder.with_name(f"broken-{folder.name}")
    number = 2
    while aside.exists():
        aside = folder.with_name(f"broken-{folder.name}-{number}")
        number += 1
    folder.rename(aside)
    return aside


def newest_whole(output_dir: Path) -> str | None:
    """Return the newest checkpoint of a run folder that is whole, or None; set the broken ones before it aside."""
    folders = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    folders.sort(key=lambda path: int(path.name.split("-")[1]), reverse=True)
    for folder in folders:
        fault = verify(folder)
        if fault is None:
            return str(folder)
        aside = set_aside(folder)
        say(f"{folder.name} is broken, {fault}: moved to {aside}")
    if folders:
        say(f"no checkpoint in {output_dir} is whole: starts afresh")
    return None


def choose_checkpoint(training_args: SFTConfig) -> str | None:
    """Return the verified checkpoint to resume from, or None, before anything is loaded.

    `--resume_from_checkpoint true` takes the newest whole one. Raises UsageError for a broken one that is named.
    """
    PartialState().wait_for_everyone()  # nobody still looks for a checkpoint while rank 0 moves one
    choice = training_args.resume_from_checkpoint
    if str(choice).lower() in ("none", "false"):
        return None
    if str(choice).lower() == "true":
        return on_main_process(lambda: newest_whole(Path(training_args.output_dir)))
    folder = Path(choice)
    if not (folder / "trainer_state.json").is_file() and not (folder / MANIFEST).is_file():
        raise UsageError(f"{choice} is no checkpoint: --resume_from_checkpoint true takes the newest of output_dir")
    fault = on_main_process(lambda: verify(folder))
    if fault is not None:
        raise UsageError(
            f"checkpoint {folder} is broken, {fault}: --resume_from_checkpoint true takes the newest whole one"
        )
    return str(folder)
