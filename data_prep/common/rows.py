"""One row, the shape that every step reads and writes, and what makes a row unusable."""

import json
import re

from .errors import InvalidRow
from .json_text import dump_json, refuse_half_pairs
from .language import conversation_text, detect_language
from .parsing import parse_json, parse_tool_call, parse_tools, require_objects

COLUMNS = ("id", "messages", "tools", "chat_template_kwargs", "source", "tags", "lang")  # what a folder keeps


def iter_strings(value):
    """Every string in a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value:
            yield from iter_strings(item)
            if isinstance(value, dict):
                yield from iter_strings(value[item])


CONTROL = re.compile(  # what some tokenizer turns into a control token when it stands in text
    r"<\|[\w ]{1,40}\|>|<｜[^｜<>]{1,40}｜>|</?(?:think|tool_call|tool_response)>|<(?:start|end)_of_turn>"
)


MARKS = ("<|", "<｜", "think>", "tool_call>", "tool_response>", "_of_turn>")  # each of those holds one; fast to find


def find_control_token(value):
    """The first control token in a string or any JSON value, or None."""
    if isinstance(value, str):
        hit = CONTROL.search(value) if "<" in value and any(mark in value for mark in MARKS) else None
        return hit and hit[0]
    return next(filter(None, map(find_control_token, iter_strings(value))), None)


def is_empty_turn(turn):
    """Whether a message holds neither text, where blanks are none, nor tool calls. A tool may answer nothing."""
    return turn["role"] != "tool" and not turn.get("tool_calls") and not (turn.get("content") or "").strip()


FOLLOWS = {  # what a message of a role may stand behind
    "system": ("start",),
    "user": ("start", "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("call", "tool"),
}


def check_messages(turns):
    """Refuse a conversation that a template would render wrongly or a trainer could not learn from."""
    if not any(turn["role"] == "assistant" for turn in turns):
        raise InvalidRow("no assistant turn")
    after = "start"
    for number, turn in enumerate(turns):
        role = turn["role"]
        if not isinstance(role, str) or role not in FOLLOWS:
            raise InvalidRow("unknown role", str(role))
        calls = turn.get("tool_calls")
        if is_empty_turn(turn):
            raise InvalidRow("empty text", f"message {number} of the {role}")
        if calls and role != "assistant":
            raise InvalidRow("roles that do not alternate", f"message {number}: tool calls of the {role}")
        if after not in FOLLOWS[role]:
            raise InvalidRow("roles that do not alternate", f"message {number}: {role} after {after}")
        after = "call" if calls else role
    if turns[-1]["role"] != "assistant":
        raise InvalidRow("last message is not the assistant's")


def read_columns(row):
    """(tools, chat_template_kwargs, tags) of a row, empty where it has none; raises InvalidRow."""
    tools, kwargs, tags = parse_tools(row.get("tools")), row.get("chat_template_kwargs") or {}, row.get("tags") or []
    if not isinstance(kwargs, dict):
        raise InvalidRow("field of another type", "chat_template_kwargs must be an object")
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise InvalidRow("field of another type", "tags must be a list of strings")
    return tools, kwargs, tags


def get_turns(row):
    """The messages of a row, of a prompt and completion too, or [] where it has none."""
    found = row.get("messages")
    for name in () if found else ("prompt", "completion"):
        found = (found or []) + (row[name] if isinstance(row.get(name), list) else [])
    return [turn for turn in found or [] if isinstance(turn, dict)]


def get_tools(row):
    """The tools of a row as the trainer reads them, from JSON text too."""
    tools = row.get("tools")
    return json.loads(tools) if isinstance(tools, str) else tools


def check_shape(row):
    """Refuse what no check and no template could read; the row itself where it is one."""
    if isinstance(row, InvalidRow):
        raise row
    if not isinstance(row, dict):
        raise InvalidRow("row that is not an object", type(row).__name__)
    if not row.get("messages"):
        raise InvalidRow("row without messages", f"it has {', '.join(map(str, row)) or 'nothing'}: see normalize.py")
    for number, turn in enumerate(require_objects(row["messages"], "messages")):
        if not isinstance(turn.get("role"), str):
            raise InvalidRow("unknown role", f"message {number}: {turn.get('role')!r}")
        for name in ("content", "reasoning_content"):
            if not isinstance(turn.get(name), (str, type(None))):
                what = f"{name} is {type(turn[name]).__name__}"
                raise InvalidRow("text that is not a string", f"message {number}: {what}, see normalize.py")
        if turn.get("tool_calls"):
            for call in require_objects(turn["tool_calls"], f"tool_calls of message {number}"):
                parse_tool_call(call)
    read_columns(row)
    parse_json(row.get("tools"), "tools that are not JSON")  # empty text: the trainer stops at it
    refuse_half_pairs(row)
    return row


def complete_row(row, name, line):
    """The house's row: what is missing is filled in, what is there stays as it is and where it is."""
    row = {key: value for key, value in row.items() if value is not None}
    # what is empty may be of any type
    row |= {key: kind() for key, kind in (("tags", list), ("chat_template_kwargs", dict)) if not row.get(key, True)}
    if not row.get("tools", True):
        row["tools"] = []
    filled = {"id": f"{name}-{line}", "chat_template_kwargs": {}, "source": name, "tags": []}
    if "lang" not in row:
        filled["lang"] = detect_language(conversation_text(row["messages"]))
    row |= {key: value for key, value in filled.items() if key not in row}
    row |= {"tools": get_tools(row)} if isinstance(row.get("tools"), str) else {}
    return row | {key: str(row[key]) for key in ("id", "source", "lang")}


def kept_by_arrow(row):
    """Whether datasets gives the row back equal: it reads its JSON columns by a parser that holds 64-bit integers and
    the digits of most floats."""
    parts = [value for turn in row["messages"] for value in turn.values() if not isinstance(value, str)]
    parts += filter(None, (row.get("tools"), row["chat_template_kwargs"]))
    if not any(map(numbered, parts)):
        return True  # text alone is always kept
    from datasets.utils.json import ujson_loads

    try:
        return all(ujson_loads(dump_json(part)) == part for part in parts)
    except (OverflowError, ValueError):
        return False


def numbered(value):
    """Whether a number that a parser may change stands in a JSON value: one with a point, or of over 64 bits."""
    if isinstance(value, (dict, list)):
        return any(map(numbered, value.values() if isinstance(value, dict) else value))
    return isinstance(value, float) or isinstance(value, int) and not -(2**63) <= value < 2**63


def refuse_unkept(row, out=None):
    """Refuse a row that a dataset folder would not give back equal; a .jsonl file keeps any."""
    if (out is None or out.suffix != ".jsonl") and not kept_by_arrow(row):
        raise InvalidRow("number that Arrow cannot keep", "over ten decimals or 64 bits; write it as a string")
