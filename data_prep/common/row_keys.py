"""Tell which rows are the same: by content, by prompt, by hash."""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable

import xxhash

from .json_text import dump_json, dump_json_lenient
from .rows import Row

SWITCH = re.compile(r"\s*/(?:no_think|think)\b")
NOT_COMPARED = ("role", "tool_call_id", "name")  # of a message: role is compared apart, the others train no other token


def normalize_text(text: str) -> str:
    """Return text as duplicates are recognised by: Unicode NFC, every run of blanks one blank."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return " ".join(text.split())


def compared_turns(row: Row) -> list[dict]:
    """Return the messages of a row as duplicates are recognised by."""
    turns = []
    for turn in row["messages"]:
        compared = {"role": turn["role"]}
        for name, value in turn.items():
            if name not in NOT_COMPARED:
                compared[name] = normalize_text(value) if isinstance(value, str) else value
        turns.append(compared)
    return turns


def row_key(row: Row, turns: list[dict] | None = None) -> bytes:
    """Return 16 bytes that rows share where they train the same: turns but for blanks, tools, template arguments.

    turns: compared_turns of the row, where they are known.
    """
    if turns is None:
        turns = compared_turns(row)
    return xxhash.xxh3_128_digest(dump_json([turns, row.get("tools"), row["chat_template_kwargs"]]))


def prompt_key(row: Row, turns: list[dict] | None = None) -> int:
    """Return 64 bits that rows share where they ask the same, whatever the answers: turns but the assistant's, without
    the switches /think and /no_think.

    turns: compared_turns of the row, where they are known.
    """
    if turns is None:
        turns = compared_turns(row)
    asked = []
    for turn in turns:
        if turn["role"] == "assistant":
            continue
        content = turn["content"]
        if "/" in content:
            content = SWITCH.sub("", content)
        if content:  # a system message that was a switch alone asks nothing
            asked.append({"role": turn["role"], "content": content})
    return xxhash.xxh3_64_intdigest(dump_json(asked))


def row_digest(row: Row) -> bytes:
    """Return the sha256 of a row without its id: its content, whatever it is called and wherever it lies."""
    content = {key: value for key, value in row.items() if key != "id" and value is not None}
    return hashlib.sha256(dump_json_lenient(content)).digest()


def content_hash(rows: Iterable[Row]) -> str:
    """Return the sha256 of the rows' digests, in order: it depends on no path, version, time or number of files."""
    return hashlib.sha256(b"".join(row_digest(row) for row in rows)).hexdigest()


def hash_of(hashes: dict[str, str]) -> str:
    """Return the `hash` of report.json, from {split: content_hash}."""
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
