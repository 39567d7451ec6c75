"""One run an output folder: rank 0 holds a lock on a file in it, which the kernel releases however the process ends.

The lock belongs to the process (POSIX record locks): workers that it forks do not hold it on, and over NFS it holds
between machines. The file says who holds it.
"""

import atexit
import contextlib
import errno
import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder are not told apart there
    fcntl = None

from .messages import UsageError, recipe_name, relative_path, say

LOCK = "_lock"  # the recipe overlooks it, and so does a push to the hub, as all names that begin with _
POLL_SECONDS = 0.5
HOLDER_BYTES = 4096  # more than a Holder takes


@dataclass
class Holder:
    """Who trains in a folder."""

    pid: int
    host: str
    recipe: str
    since: str
    stopping: bool = False  # was told to stop, and saves its last checkpoint


held: dict[Path, int] = {}  # folder: descriptor of its lock; a lock is of the process, as the kernel has it
made: set[Path] = set()  # folders that were not there before


def lock_folder(output_dir: str) -> None:
    """Hold a folder until this process ends; wait for a run that saves its last checkpoint there.

    Raises UsageError where another run holds it, or where it cannot be made.
    """
    folder = Path(output_dir).resolve()
    if fcntl is None or folder in held:
        return
    make_folder(folder, output_dir)
    waiting = False
    while not try_lock(folder):
        holder = read_holder(folder)
        if holder is not None and not holder.stopping:
            raise UsageError(describe_holder(output_dir, holder))
        if holder is not None and not waiting:
            say(f"process {holder.pid} still saves its last checkpoint in {relative_path(output_dir)}: waits for it")
            waiting = True
        time.sleep(POLL_SECONDS)  # where nobody stands in it, it has just begun or ended
    if folder not in held:
        return
    write_holder(folder, Holder(os.getpid(), socket.gethostname(), recipe_name(), time.strftime("%F %T")))
    atexit.register(release_folder, output_dir)


def make_folder(folder: Path, output_dir: str) -> None:
    if folder.is_dir():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output_dir {output_dir} cannot be made ({error.strerror}): pass another") from None
    made.add(folder)


def describe_holder(output_dir: str, holder: Holder) -> str:
    """Return who holds a folder, and how it is stopped or avoided."""
    stop = f"kill -INT {holder.pid} has it save and end"
    if holder.host != socket.gethostname():
        stop = f"kill -INT {holder.pid} on {holder.host} has it save and end"
    return (
        f"{relative_path(output_dir)} is in use: {holder.recipe} has trained there since {holder.since}, process "
        f"{holder.pid} on {holder.host}: {stop}, another --output_dir runs beside it"
    )


def try_lock(folder: Path) -> bool:
    """Lock the file of a folder, and keep its descriptor; return whether it was free.

    Where the file system has no locks, it counts as free, and nothing is kept: that is said.
    """
    path = folder / LOCK
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except FileNotFoundError:  # a run that ended has just removed the empty folder
        folder.mkdir(parents=True, exist_ok=True)
        return False
    except PermissionError as error:
        raise UsageError(
            f"{relative_path(path)} cannot be written ({error.strerror}): pass another --output_dir"
        ) from None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        say(f"{relative_path(folder)}: no locks there ({error.strerror}): two runs in this folder are not told apart")
        return True
    if not is_current(path, descriptor):
        os.close(descriptor)
        return False
    held[folder] = descriptor
    return True


def is_current(path: Path, descriptor: int) -> bool:
    """Return whether a file is still the one that was opened: a run removes its own as it ends."""
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False


def write_holder(folder: Path, holder: Holder) -> None:
    # through the descriptor that holds the lock: closing another one of the same file would release it
    text = json.dumps(asdict(holder)).encode()
    os.ftruncate(held[folder], 0)
    os.pwrite(held[folder], text, 0)


def read_holder(folder: Path) -> Holder | None:
    """Return who holds a folder; None while that is being written, or where nobody does any more."""
    try:
        return Holder(**json.loads((folder / LOCK).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def note_stopping(output_dir: str) -> None:
    """Tell whoever wants the folder that this run saves and ends; where it is held here. May be called by a signal."""
    folder = Path(output_dir).resolve()
    if folder not in held:
        return
    with contextlib.suppress(OSError, ValueError):  # the run must not fail over it
        holder = Holder(**json.loads(os.pread(held[folder], HOLDER_BYTES, 0)))
        holder.stopping = True
        write_holder(folder, holder)


def release_folder(output_dir: str) -> None:
    """Let the folder go; remove it where it was made for this run and nothing was written in it."""
    folder = Path(output_dir).resolve()
    descriptor = held.pop(folder, None)
    if descriptor is None:
        return
    with contextlib.suppress(OSError):
        (folder / LOCK).unlink()
    if folder in made:
        made.discard(folder)
        with contextlib.suppress(OSError):  # a run has begun in it
            folder.rmdir()
    os.close(descriptor)
