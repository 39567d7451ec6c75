"""Results that outlive a run: losses and answers in a file of their own, a line a batch, named by what gave them."""

import base64
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import xxhash

from data_prep.common.errors import UsageError
from eval.common.models import Output

BLOCK = 1 << 20  # bytes read at a time
Value = TypeVar("Value")


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn an error of the disk into a UsageError."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot write to {folder} ({error.strerror}): make room or pass another --out") from None


class Kept(dict[int, Value], Generic[Value]):
    """{index: result} in a file too, a line for every batch. What a run left that was killed is read again.

    pack, unpack: a result as JSON, and back. lasts: whether a result goes to the file; the next run tries the others
    again.
    """

    def __init__(
        self,
        path: Path,
        pack: Callable[[Value], Any],
        unpack: Callable[[Any], Value],
        lasts: Callable[[Value], bool],
    ) -> None:
        super().__init__()
        self.path = path
        self.pack = pack
        self.lasts = lasts
        data = path.read_bytes() if path.is_file() else b""
        whole = data[: data.rfind(b"\n") + 1]  # a killed run was writing the rest
        try:
            for line in whole.splitlines():
                for index, value in json.loads(line):
                    self[index] = unpack(value)
        except (ValueError, TypeError):  # damaged: measured again
            self.clear()
            whole = b""
        if whole != data:
            path.write_bytes(whole)

    def update(self, results: dict[int, Value] | Iterable[tuple[int, Value]]) -> None:
        """Keep the results of a batch."""
        batch = dict(results)
        super().update(batch)
        lasting = [[index, self.pack(value)] for index, value in batch.items() if self.lasts(value)]
        with writing(self.path.parent.parent), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(lasting) + "\n")


def pack_losses(losses: np.ndarray) -> str:
    return base64.b64encode(losses.astype("<f4").tobytes()).decode()  # float32, as computed


def unpack_losses(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4").astype(float)


def always(losses: np.ndarray) -> bool:
    return True


def unpack_answer(values: list) -> Output:
    return Output(*values)


def has_not_failed(output: Output) -> bool:
    return not output.failed


def kept_losses(path: Path) -> Kept[np.ndarray]:
    """Return the losses in a file, for models.token_losses."""
    return Kept(path, pack_losses, unpack_losses, always)


def kept_answers(path: Path) -> Kept[Output]:
    """Return the answers in a file, for models.generate."""
    return Kept(path, list, unpack_answer, has_not_failed)


def hash_model(name: str | Path) -> str:
    """Return what a folder's model is: a hash of its configuration and weights; a hub id is what it is."""
    if not Path(name).is_dir():
        return str(name)
    digest = xxhash.xxh3_128()
    for path in sorted(Path(name).glob("*")):
        if path.suffix != ".safetensors" and path.name not in ("config.json", "adapter_config.json"):
            continue
        digest.update(path.name.encode())
        with path.open("rb") as file:
            block = file.read(BLOCK)
            while block:
                digest.update(block)
                block = file.read(BLOCK)
    return digest.hexdigest()
