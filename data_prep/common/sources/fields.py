"""Rows of any columns, by --map OURS=THEIRS."""

import string
from dataclasses import dataclass

from ..errors import InvalidRow, UsageError
from ..parsing import CONTENT_KEYS, ROLE_KEYS, ROLES, clean_text, parse_calls, parse_turns, require_objects
from .exchange import LABEL_COLUMNS, THOUGHT_KEYS, exchange, scalar_text, with_system

KEPT_COLUMNS = ("tools", "chat_template_kwargs", "id", "source", "lang", "tags", *LABEL_COLUMNS)
MAPPED = ("prompt", "answer", "system", "reasoning", "messages", "role", "content", *KEPT_COLUMNS)
OPTIONAL = ("system", "reasoning", *KEPT_COLUMNS)  # a row may lack them


@dataclass(frozen=True)
class Part:
    """A piece of a template string: text as it stands, and the column behind it."""

    text: str
    column: str | None


def fields(row: dict, *, map: dict[str, str] | None = None, roles: dict[str, str] | None = None) -> dict:
    """Any other rows, by --map OURS=THEIRS …: prompt and answer, or messages with the keys role and content of a turn;
    system, reasoning, tools, chat_template_kwargs, id, source, lang, tags, domain and difficulty as well, which a row
    may lack. THEIRS is a column, a path like data.0.question, or columns joined by a text, "{subject}: {customer}". An
    answer beside tools that is the JSON of calls becomes them. --roles THEIRS=OURS … names the speakers."""
    mapped = map or {}
    found = {}
    for name in OPTIONAL:
        if name in mapped and not (name == "reasoning" and "messages" in mapped):
            found[name] = read_mapped(row, mapped[name], optional=True)
    system = found.pop("system", None)
    reasoning = found.pop("reasoning", None)
    if system is not None:
        system = clean_text(scalar_text(system), "system")
    if "messages" not in mapped:
        prompt = read_mapped(row, mapped["prompt"])
        answer = read_mapped(row, mapped["answer"])
        found["messages"] = exchange(scalar_text(prompt), answer, system, {"reasoning_content": reasoning})
        if found.get("tools"):
            read_answered_calls(found["messages"][-1])
        return found
    turns = []
    for turn in require_objects(read_mapped(row, mapped["messages"]), mapped["messages"]):
        turns.append(rename_turn(turn, mapped, roles or {}))
    found["messages"] = with_system(parse_turns(turns), system)
    return found


def read_answered_calls(message: dict) -> None:
    """Make tool_calls of an answer that is nothing but the JSON of calls. Raises InvalidRow."""
    text = message["content"]
    if text.startswith(("[", "{")) and '"arguments"' in text:
        message["tool_calls"] = parse_calls(text)
        message["content"] = ""


def rename_turn(turn: dict, mapped: dict[str, str], roles: dict[str, str]) -> dict:
    """Return a turn under our names of its keys and its speaker, without the keys that a mapped one stands for."""
    role_key = mapped.get("role", "role")
    if role_key not in turn and "role" not in mapped:
        role_key = "from"
    speaker = turn[role_key]
    if isinstance(speaker, str):
        speaker = roles.get(speaker, speaker)
        if speaker.lower() not in ROLES:
            raise InvalidRow("unknown role", f"{speaker[:60]}: pass --roles {speaker[:60]}=user (or assistant, tool …)")
    replaced = {role_key, *replaced_keys(mapped)}
    renamed = {key: value for key, value in turn.items() if key not in replaced}
    renamed["role"] = speaker
    if "content" in mapped:
        renamed["content"] = turn.get(mapped["content"])
    if "reasoning" in mapped:
        renamed["reasoning_content"] = turn.get(mapped["reasoning"])
    return renamed


def replaced_keys(mapped: dict[str, str]) -> list[str]:
    """Return the usual names of a turn's keys that a --map does not read, since it names others."""
    replaced = []
    for ours, keys in (("role", ROLE_KEYS), ("content", CONTENT_KEYS), ("reasoning", THOUGHT_KEYS)):
        if ours in mapped:
            replaced += keys
    return replaced


def read_mapped(row: dict, path: str, optional: bool = False) -> object:
    """Return what stands at a column or path, or the columns that a template string joins.

    Raises KeyError where nothing does; optional: None is returned then.
    """
    try:
        if "{" not in path or path in row:
            return read_path(row, path)
        pieces = []
        for part in split_template(path):
            pieces.append(part.text)
            if part.column is not None:
                pieces.append(clean_text(scalar_text(read_path(row, part.column)), part.column))
        return "".join(pieces)
    except KeyError:
        if optional:
            return None
        raise


def read_path(row: object, path: str) -> object:
    """Return what stands at a column, or at a path of names and numbers joined by dots. Raises KeyError."""
    if isinstance(row, dict) and path in row:
        return row[path]
    value = row
    for name in path.split("."):
        if isinstance(value, dict) and name in value:
            value = value[name]
        elif isinstance(value, list) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        else:
            raise KeyError(path)
    return value


def split_template(template: str) -> list[Part]:
    """Return the pieces of "{subject}: {customer}"; {{ and }} stand for braces. Raises UsageError."""
    try:
        parts = []
        for text, column, spec, conversion in string.Formatter().parse(template):
            if column == "" or spec or conversion:
                raise ValueError(f"{{{column}}} is no column")
            parts.append(Part(text, column))
        return parts
    except ValueError as error:
        raise UsageError(f"--map {template}: no template ({error}): write columns as {{NAME}}") from None


def mapped_columns(mapped: dict[str, str]) -> list[str]:
    """Return the columns that a --map reads of a row."""
    columns = []
    for name, path in mapped.items():
        if name in ("role", "content") or (name == "reasoning" and "messages" in mapped):
            continue  # keys of a turn
        if "{" in path:
            columns += [part.column for part in split_template(path) if part.column is not None]
        else:
            columns.append(path)
    return columns


def lacking_columns(row: dict, mapped: dict[str, str]) -> list[str]:
    """Return OURS=THEIRS of the optional columns that a row lacks."""
    lacking = []
    for name in OPTIONAL:
        in_turns = name == "reasoning" and "messages" in mapped
        if name in mapped and not in_turns and read_mapped(row, mapped[name], optional=True) is None:
            lacking.append(f"{name}={mapped[name]}")
    return lacking
