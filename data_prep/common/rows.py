"""One row, the shape that every step reads and writes, and what makes a row unusable.

    {"id": str, "messages": [...], "tools"?: [...], "chat_template_kwargs": {...}, "source": str, "tags": [str],
     "lang": str}

Messages have the shapes of transformers' chat API, so that any row also works outside this project.
"""

import json
import re
from collections.abc import Iterator
from typing import NotRequired, TypedDict

from .errors import InvalidRow
from .json_text import check_numbers, dump_json
from .language import conversation_text, detect_language
from .parsing import parse_json, parse_tool_call, parse_tools, require_objects

MAX_DEPTH = 250  # of values that are rendered: jinja's tojson fails at some hundreds
COLUMNS = ("id", "messages", "tools", "chat_template_kwargs", "source", "tags", "lang")  # what a dataset folder keeps


class FunctionCall(TypedDict):
    name: str
    arguments: dict[str, object]


class ToolCall(TypedDict):
    id: NotRequired[str]
    type: str
    function: FunctionCall


class Message(TypedDict):
    role: str  # system, user, assistant or tool
    content: str
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]
    loss_mask: NotRequired[int]  # 0 or 1, read by templates under train_turns: flagged


class Row(TypedDict):
    id: str
    messages: list[Message]
    tools: NotRequired[list[dict]]
    chat_template_kwargs: dict[str, object]
    source: str
    tags: list[str]
    lang: str


def iter_strings(value: object) -> Iterator[str]:
    """Yield every string in a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from iter_strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from iter_strings(item)


# -- control tokens in text -------------------------------------------------------------------------------------------
CONTROL = re.compile(  # what some tokenizer turns into a control token when it stands in text
    r"<\|[\w ]{1,40}\|>|<｜[^｜<>]{1,40}｜>|</?(?:think|tool_call|tool_response)>|<(?:start|end)_of_turn>"
    r"|<extra_id_\d{1,3}>"  # NeMo's and T5's
)
MARKS = (
    "<|",
    "<｜",
    "think>",
    "tool_call>",
    "tool_response>",
    "_of_turn>",
    "<extra_id_",
)  # one stands in each of those; fast to find


def find_control_token(value: object) -> str | None:
    """Return the first control token in a string or any JSON value, or None."""
    if isinstance(value, str):
        if "<" not in value or not any([mark in value for mark in MARKS]):
            return None
        match = CONTROL.search(value)
        return match[0] if match else None
    for text in iter_strings(value):
        token = find_control_token(text)
        if token:
            return token
    return None


# -- a conversation ---------------------------------------------------------------------------------------------------
FOLLOWS = {  # what a message of a role may stand behind
    "system": ("start",),
    "user": ("start", "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("call", "tool"),
}


def is_empty_turn(turn: Message) -> bool:
    """Return whether a message holds neither text, where blanks are none, nor tool calls. A tool may answer nothing."""
    if turn["role"] == "tool" or turn.get("tool_calls"):
        return False
    return not (turn.get("content") or "").strip()


def check_messages(turns: list[Message]) -> None:
    """Raise InvalidRow for a conversation that a template renders wrongly or a trainer cannot learn from."""
    if not any([turn["role"] == "assistant" for turn in turns]):
        raise InvalidRow("no assistant turn")
    previous = "start"
    for number, turn in enumerate(turns):
        role = turn["role"]
        if not isinstance(role, str) or role not in FOLLOWS:
            raise InvalidRow("unknown role", str(role))
        calls = turn.get("tool_calls")
        if is_empty_turn(turn):
            raise InvalidRow("empty text", f"message {number} of the {role}")
        if calls and role != "assistant":
            raise InvalidRow("roles that do not alternate", f"message {number}: tool calls of the {role}")
        if previous not in FOLLOWS[role]:
            raise InvalidRow("roles that do not alternate", f"message {number}: {role} after {previous}")
        previous = "call" if calls else role
    if turns[-1]["role"] != "assistant":
        raise InvalidRow("last message is not the assistant's")


def get_turns(row: dict) -> list[Message]:
    """Return the messages of a row, or of its prompt and completion; [] where it has none."""
    turns = row.get("messages")
    if not turns:
        turns = []
        for name in ("prompt", "completion"):
            if isinstance(row.get(name), list):
                turns = turns + row[name]
    return [turn for turn in turns if isinstance(turn, dict)]


def get_tools(row: dict) -> list[dict] | None:
    """Return the tools of a row as the trainer reads them, from JSON text too."""
    tools = row.get("tools")
    return json.loads(tools) if isinstance(tools, str) else tools


# -- a whole row ------------------------------------------------------------------------------------------------------
def read_columns(row: dict) -> tuple[list[dict], dict, list[str]]:
    """Return (tools, chat_template_kwargs, tags) of a row, each empty where it has none. Raises InvalidRow."""
    tools = parse_tools(row.get("tools"))
    kwargs = row.get("chat_template_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise InvalidRow("field of another type", "chat_template_kwargs must be an object")
    tags = row.get("tags") or []
    if not isinstance(tags, list) or not all([isinstance(tag, str) for tag in tags]):
        raise InvalidRow("field of another type", "tags must be a list of strings")
    return tools, kwargs, tags


def check_shape(row: object) -> dict:
    """Return a row of messages; raise InvalidRow for what no check and no template can read."""
    if isinstance(row, InvalidRow):
        raise row
    if not isinstance(row, dict):
        raise InvalidRow("row that is not an object", type(row).__name__)
    if not row.get("messages"):
        columns = ", ".join(map(str, row)) or "nothing"
        raise InvalidRow("row without messages", f"it has {columns}: see python -m data_prep.normalize auto")
    for number, turn in enumerate(require_objects(row["messages"], "messages")):
        check_turn_shape(number, turn)
    read_columns(row)
    parse_json(row.get("tools"), "tools that are not JSON")  # empty text: the trainer stops at it
    check_encodable({name: row[name] for name in COLUMNS if name in row})  # other columns may be of any type
    return row


def check_turn_shape(number: int, turn: dict) -> None:
    """Raise InvalidRow where a message is of another shape than Message."""
    if not isinstance(turn.get("role"), str):
        raise InvalidRow("unknown role", f"message {number}: {turn.get('role')!r}")
    for name in ("content", "reasoning_content"):
        text = turn.get(name)
        if text is not None and not isinstance(text, str):
            detail = f"message {number}: {name} is {type(text).__name__}, see python -m data_prep.normalize"
            raise InvalidRow("text that is not a string", detail)
    if turn.get("tool_calls"):
        for call in require_objects(turn["tool_calls"], f"tool_calls of message {number}"):
            parse_tool_call(call)


def check_values(row: dict) -> None:
    """Raise InvalidRow where NaN or Infinity stands in what is rendered of a row, or values too deep for a template."""
    values = [turn["tool_calls"] for turn in row["messages"] if "tool_calls" in turn]
    for value in (*values, row.get("tools"), row.get("chat_template_kwargs")):
        if value:
            check_depth(value, MAX_DEPTH)
            check_numbers(value)


def check_depth(value: object, levels: int) -> None:
    """Raise InvalidRow where lists and objects stand in each other over more levels than these."""
    if not isinstance(value, (dict, list)):
        return
    if levels == 0:
        raise InvalidRow("row nested too deep")
    for item in value.values() if isinstance(value, dict) else value:
        check_depth(item, levels - 1)


def check_encodable(row: dict) -> None:
    """Raise InvalidRow for a row that no file can hold."""
    check_values(row)
    try:
        dump_json(row)
    except RecursionError:
        raise InvalidRow("row nested too deep") from None
    except TypeError as error:
        raise InvalidRow("value that is not JSON", str(error)) from None


def complete_row(row: dict, name: str, line: int) -> Row:
    """Return a row of messages with what it lacks filled in; what it has stays as it is and where it is.

    name, line: of its file, by which a row without an id and a source is called.
    """
    row = {key: value for key, value in row.items() if value is not None}
    for key, empty in (("tags", []), ("chat_template_kwargs", {}), ("tools", [])):
        if key in row and not row[key]:  # what is empty may be of any type
            row[key] = empty
    if isinstance(row.get("tools"), str):
        row["tools"] = get_tools(row)
    row.setdefault("id", f"{name}-{line}")
    row.setdefault("chat_template_kwargs", {})
    row.setdefault("source", name)
    row.setdefault("tags", [])
    if "lang" not in row:
        row["lang"] = detect_language(conversation_text(row["messages"]))
    for key in ("id", "source", "lang"):
        row[key] = str(row[key])
    return row
