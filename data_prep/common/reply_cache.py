"""Keep an endpoint's replies in one SQLite file, by the hash of their request."""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UsageError
from .json_text import dump_json

SETUP = (
    "PRAGMA locking_mode = EXCLUSIVE",  # of two runs that share a file, the second stops
    "PRAGMA journal_mode = WAL",
    "PRAGMA synchronous = NORMAL",
    "CREATE TABLE IF NOT EXISTS replies (request BLOB PRIMARY KEY, reply BLOB) WITHOUT ROWID",
    "BEGIN IMMEDIATE",
    "COMMIT",
)


class ReplyCache:
    """Replies, as JSON objects; each is on disk when put() returns. Raises UsageError where the file cannot be used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self.explain_errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            self.database = sqlite3.connect(path, isolation_level=None, timeout=1)
            for statement in SETUP:
                self.database.execute(statement)

    def __enter__(self) -> "ReplyCache":
        return self

    def __exit__(self, *_: object) -> None:
        self.database.close()

    @contextmanager
    def explain_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise UsageError(
                f"{self.path}: the cache cannot be used ({error}): wait for the run that has it, free disk space or "
                "pass another --cache"
            ) from None

    def get(self, key: bytes) -> dict | None:
        with self.explain_errors():
            match = self.database.execute("SELECT reply FROM replies WHERE request = ?", (key,)).fetchone()
        return json.loads(match[0]) if match else None

    def put(self, key: bytes, reply: dict) -> None:
        with self.explain_errors():
            self.database.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (key, dump_json(reply)))
