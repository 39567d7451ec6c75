"""Tell which rows are the same: by content, by prompt, by hash."""

import hashlib
import json
import re
import unicodedata

import xxhash

from .json_text import dump_json

SWITCH = re.compile(r"\s*/(?:no_think|think)\b")


def normalize_text(value):
    """Text as duplicates are told by: Unicode NFC, every run of blanks one blank."""
    return " ".join((value if value.isascii() else unicodedata.normalize("NFC", value)).split())


def row_key(row):
    """16 bytes that two rows share where they would train the same: turns but for blanks, tools, template arguments."""
    said = [{"role": turn["role"]} | {name: normalize_text(value) if isinstance(value, str) else value
                                      for name, value in turn.items() if name not in ("role", "tool_call_id", "name")}
            for turn in row["messages"]]  # fmt: skip
    return xxhash.xxh3_128_digest(dump_json([said, row.get("tools"), row["chat_template_kwargs"]]))


def prompt_key(row):
    """64 bits that rows share where their prompts do, whatever the answers: turns that are not the assistant's, without
    the switches /think and /no_think."""
    said = [{"role": turn["role"], "content": SWITCH.sub("", normalize_text(turn["content"]))}
            for turn in row["messages"] if turn["role"] != "assistant"]  # fmt: skip
    # a system message that was a switch only says nothing
    return xxhash.xxh3_64_intdigest(dump_json([turn for turn in said if turn["content"]]))


def row_digest(row):
    """sha256 of a row without its id: its content, whatever it is called and wherever it lies."""
    content = {key: value for key, value in row.items() if key != "id" and value is not None}
    return hashlib.sha256(dump_json(content)).digest()


def content_hash(rows):
    """sha256 of the rows' digests, in their order. It does not depend on paths, versions, time or shards."""
    return hashlib.sha256(b"".join(row_digest(row) for row in rows)).hexdigest()


def hash_of(hashes):
    """The `hash` of report.json, from {split: content_hash}."""
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
