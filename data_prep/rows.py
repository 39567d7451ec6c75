"""One row, the shape that every step of this room reads and writes, and what makes a row unusable.

    {"id": str, "messages": [...], "tools"?: [...], "chat_template_kwargs"?: {...}, "source": str, "tags": [str],
     "lang": str}

A message is {"role", "content", "reasoning_content"?, "tool_calls"?, "tool_call_id"?, "name"?, "loss_mask"?}: the
shapes of transformers' chat API. No script: normalize.py brings raw rows here, pool.py reads and writes many of them.
"""

import json
import re
import unicodedata
from functools import cache

import numpy as np
import orjson
import xxhash

COLUMNS = ("id", "messages", "tools", "chat_template_kwargs", "source", "tags", "lang")  # what a folder keeps


class BadInput(Exception):
    """What cannot be worked on at all: one sentence that says what, where and what to do. Exit code 2."""


class Refused(ValueError):
    """A row that cannot be used. reason: the words it is counted under; detail: what was seen."""

    def __init__(self, reason, detail=""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail

    def __reduce__(self):  # processes hand it to each other
        return Refused, (self.reason, self.detail)


# -- values that may be of any type -----------------------------------------------------------------------------------
def text(value, where):
    """The string without blanks at its ends, CRLF as LF; raises Refused, which names `where`."""
    if not isinstance(value, str):
        raise Refused("text that is not a string", f"{where} is {type(value).__name__}")
    return value.replace("\r\n", "\n").strip()


def listed(value, where):
    """The value where it is a list of objects; raises Refused."""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise Refused("field of another type", f"{where} must be a list of objects")
    return value


def parsed(value, reason):
    """A value that may be JSON text; raises Refused with this reason where it is text and not JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, parse_constant=not_json)
    except (ValueError, RecursionError) as error:
        raise Refused(reason, str(error)) from None


def not_json(constant):
    raise ValueError(f"{constant} is not JSON")


def strings(value):
    """Every string in a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value:
            yield from strings(item)
            if isinstance(value, dict):
                yield from strings(value[item])


# -- messages and tools -----------------------------------------------------------------------------------------------
PARTS = ("reasoning", "text", "tool_call")  # in the order in which a message is rendered


def joined(turn):
    """A message whose content is a list of parts {"type": one of PARTS, "value" (or "text"): str}, as LLaMA-Factory and
    StepTron write it, with one string instead: texts and reasoning joined as they stand, calls (JSON) in tool_calls.
    Raises Refused for other parts, and for an order or a field beside them that one message cannot keep."""
    found, role = {kind: [] for kind in PARTS}, turn["role"]
    for part in listed(turn["content"], "content"):
        kind, value = part.get("type"), part.get("value", part.get("text"))
        if kind not in PARTS or kind != "text" and role != "assistant":
            raise Refused("content part of another kind", f"{kind} in a {role} message")
        if any(found[later] for later in PARTS[PARTS.index(kind) + 1 :]):
            raise Refused("content parts out of order", f"{kind} behind what follows it in a message")
        if kind != "tool_call" and not isinstance(value, str):
            raise Refused("text that is not a string", f"{kind} part of a {role} message is {type(value).__name__}")
        found[kind].append(parsed(value, "tool call that is not JSON") if kind == "tool_call" else value)
    more = {"reasoning_content": "".join(found["reasoning"]), "tool_calls": found["tool_call"]}
    if told := [name for name, value in more.items() if value and turn.get(name)]:
        raise Refused("content parts out of order", f"{told[0]} in the parts and beside them")
    return {**turn, "content": "".join(found["text"]), **{name: value for name, value in more.items() if value}}


def message(turn):
    """One message in the shape of transformers' chat API; a leading <think> block becomes reasoning_content. Raises
    Refused."""
    turn = joined(turn) if isinstance(turn.get("content"), list) else turn
    role, content = turn["role"], turn.get("content")
    if content is None and turn.get("tool_calls"):
        content = ""
    out = {"role": role, "content": text(content, f"content of a {role} message")}
    if len(turn) == 2 and "content" in turn and not out["content"].startswith("<think>"):
        return out  # as most messages are
    if turn.get("reasoning_content"):
        out["reasoning_content"] = text(turn["reasoning_content"], "reasoning_content")
    elif role == "assistant" and out["content"].startswith("<think>"):
        block = re.match(r"<think>(.*?)</think>", out["content"], re.DOTALL)
        if block:
            out["content"] = out["content"][block.end() :].strip()
            if block[1].strip():
                out["reasoning_content"] = block[1].strip()
    if turn.get("tool_calls"):
        out["tool_calls"] = [tool_call(call) for call in listed(turn["tool_calls"], "tool_calls")]
    for key in ("tool_call_id", "name", "loss_mask"):
        if turn.get(key) is not None:
            out[key] = turn[key]
    return out


def tool_call(call):
    """{"type": "function", "function": {"name": str, "arguments": object}}, from any of the usual shapes. Raises
    Refused."""
    function = call.get("function", call) if isinstance(call, dict) else {}
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or "arguments" not in function:
        raise Refused("tool call without a name or arguments")
    arguments = parsed(function["arguments"], "tool arguments that are not JSON")
    if not isinstance(arguments, dict):
        raise Refused("tool arguments that are not an object", type(arguments).__name__)
    out = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": call["id"], **out} if call.get("id") else out


def tool_list(tools):
    """A list, or its JSON text, as the list of {"type": "function", "function": {"name": ...}} that transformers'
    templates read; raises Refused."""
    if not tools:
        return []
    tools = parsed(tools, "tools that are not JSON")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Refused("tools that are not a list of objects")
    tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    if not all(isinstance(tool["function"], dict) and tool["function"].get("name") for tool in tools):
        raise Refused("tool without a name")
    return tools


def without_nulls(value):
    """A JSON value without the keys that are null."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def schemas_of(tools):
    """{name: parameters} of a list of tools, nothing where it is none."""
    functions = [tool.get("function", tool) for tool in tools if isinstance(tool, dict)] if tools else []
    return {f["name"]: f.get("parameters") for f in functions if isinstance(f, dict) and isinstance(f.get("name"), str)}


def unfilled(arguments, schema, otherwise=lambda value: value):
    """A tool call's arguments without the nulls that Arrow filled in: those of names that the tool's schema does not
    know. A null that it knows stays. What a schema without properties cannot tell goes to `otherwise`."""
    schema = schema if isinstance(schema, dict) else {}
    if isinstance(arguments, list):
        return [unfilled(item, schema.get("items"), otherwise) for item in arguments]
    known = schema.get("properties")
    if not isinstance(arguments, dict) or not isinstance(known, dict):
        return otherwise(arguments)
    return {key: unfilled(value, known.get(key), otherwise) for key, value in arguments.items()
            if value is not None or key in known}  # fmt: skip


CONTROL = re.compile(  # what some tokenizer turns into a control token when it stands in text
    r"<\|[\w ]{1,40}\|>|<｜[^｜<>]{1,40}｜>|</?(?:think|tool_call|tool_response)>|<(?:start|end)_of_turn>"
)

MARKS = ("<|", "<｜", "think>", "tool_call>", "tool_response>", "_of_turn>")  # each of those holds one; fast to find


def control_token(value):
    """The first control token in a string or any JSON value, or None."""
    if isinstance(value, str):
        hit = CONTROL.search(value) if "<" in value and any(mark in value for mark in MARKS) else None
        return hit and hit[0]
    return next(filter(None, map(control_token, strings(value))), None)


def says_nothing(turn):
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
        raise Refused("no assistant turn")
    after = "start"
    for number, turn in enumerate(turns):
        role = turn["role"]
        if not isinstance(role, str) or role not in FOLLOWS:
            raise Refused("unknown role", str(role))
        calls = turn.get("tool_calls")
        if says_nothing(turn):
            raise Refused("empty text", f"message {number} of the {role}")
        if calls and role != "assistant":
            raise Refused("roles that do not alternate", f"message {number}: tool calls of the {role}")
        if after not in FOLLOWS[role]:
            raise Refused("roles that do not alternate", f"message {number}: {role} after {after}")
        after = "call" if calls else role
    if turns[-1]["role"] != "assistant":
        raise Refused("last message is not the assistant's")


SCRIPTS = {
    "zh": re.compile("[\u4e00-\u9fff]+"),
    "en": re.compile("[A-Za-z\u00aa\u00b5\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f]+"),
    "ja": re.compile("[\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff]+"),
    "ko": re.compile("[\uac00-\ud7a3]+"),
}


def spoken_text(turns):
    """What user, assistant and tools say, by which a row's language is told."""
    return "".join([turn.get("content") or "" for turn in turns if turn["role"] != "system"])


@cache
def scripts():
    """(65536,): the place in SCRIPTS, from 1, of every character below U+10000; 5 for other letters, else 0."""
    chars = "".join(map(chr, range(1 << 16)))
    found = np.array([len(SCRIPTS) + 1 if char.isalpha() else 0 for char in chars], np.uint8)
    for number, pattern in enumerate(SCRIPTS.values(), 1):
        for run in pattern.finditer(chars):
            found[run.start() : run.end()] = number
    return found


def language(value):
    """zh, ja or ko by script, en for text in Latin letters (a guess: no language is told apart there), else und."""
    if value.isascii():
        return "en" if re.search(r"[A-Za-z]", value) else "und"
    codes = np.frombuffer(value.encode("utf-32-le", "surrogatepass"), "<u4")
    counts = np.bincount(scripts()[np.minimum(codes, 0xFFFF)], minlength=len(SCRIPTS) + 2).tolist()
    letters = dict(zip([*SCRIPTS, "und"], counts[1:], strict=True))
    letters["und"] += sum(chr(code).isalpha() for code in codes[codes > 0xFFFF].tolist())
    if letters["ja"] > letters["zh"] / 10:
        letters["ja"] += letters.pop("zh")
    return max(letters, key=letters.get) if any(letters.values()) else "und"


def columns(row):
    """(tools, chat_template_kwargs, tags) of a row, empty where it has none; raises Refused."""
    tools, kwargs, tags = tool_list(row.get("tools")), row.get("chat_template_kwargs") or {}, row.get("tags") or []
    if not isinstance(kwargs, dict):
        raise Refused("field of another type", "chat_template_kwargs must be an object")
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise Refused("field of another type", "tags must be a list of strings")
    return tools, kwargs, tags


# -- a row that is one already ----------------------------------------------------------------------------------------
def turns_of(row):
    """The messages of a row, of a prompt and completion too, or [] where it has none."""
    found = row.get("messages")
    for name in () if found else ("prompt", "completion"):
        found = (found or []) + (row[name] if isinstance(row.get(name), list) else [])
    return [turn for turn in found or [] if isinstance(turn, dict)]


def tools_of(row):
    """The tools of a row as the trainer reads them, from JSON text too."""
    tools = row.get("tools")
    return json.loads(tools) if isinstance(tools, str) else tools


def well_formed(row):
    """Refuse what no check and no template could read; the row itself where it is one."""
    if isinstance(row, Refused):
        raise row
    if not isinstance(row, dict):
        raise Refused("row that is not an object", type(row).__name__)
    if not row.get("messages"):
        raise Refused("row without messages", f"it has {', '.join(map(str, row)) or 'nothing'}: see normalize.py")
    for number, turn in enumerate(listed(row["messages"], "messages")):
        if not isinstance(turn.get("role"), str):
            raise Refused("unknown role", f"message {number}: {turn.get('role')!r}")
        for name in ("content", "reasoning_content"):
            if not isinstance(turn.get(name), (str, type(None))):
                what = f"{name} is {type(turn[name]).__name__}"
                raise Refused("text that is not a string", f"message {number}: {what}, see normalize.py")
        if turn.get("tool_calls"):
            for call in listed(turn["tool_calls"], f"tool_calls of message {number}"):
                tool_call(call)
    columns(row)
    parsed(row.get("tools"), "tools that are not JSON")  # empty text: the trainer stops at it
    refuse_half_pairs(row)
    return row


def completed(row, name, line):
    """The house's row: what is missing is filled in, what is there stays as it is and where it is."""
    row = {key: value for key, value in row.items() if value is not None}
    # what is empty may be of any type
    row |= {key: kind() for key, kind in (("tags", list), ("chat_template_kwargs", dict)) if not row.get(key, True)}
    if not row.get("tools", True):
        row["tools"] = []
    filled = {"id": f"{name}-{line}", "chat_template_kwargs": {}, "source": name, "tags": []}
    if "lang" not in row:
        filled["lang"] = language(spoken_text(row["messages"]))
    row |= {key: value for key, value in filled.items() if key not in row}
    row |= {"tools": tools_of(row)} if isinstance(row.get("tools"), str) else {}
    return row | {key: str(row[key]) for key in ("id", "source", "lang")}


# -- which rows are the same ------------------------------------------------------------------------------------------
SWITCH = re.compile(r"\s*/(?:no_think|think)\b")


def plain(value):
    """Text as duplicates are told by: Unicode NFC, every run of blanks one blank."""
    return " ".join((value if value.isascii() else unicodedata.normalize("NFC", value)).split())


def key_of(row):
    """16 bytes that two rows share where they would train the same: turns but for blanks, tools, template arguments."""
    said = [{"role": turn["role"]} | {name: plain(value) if isinstance(value, str) else value
                                      for name, value in turn.items() if name not in ("role", "tool_call_id", "name")}
            for turn in row["messages"]]  # fmt: skip
    return xxhash.xxh3_128_digest(dumped([said, row.get("tools"), row["chat_template_kwargs"]]))


def prompt_of(row):
    """64 bits that rows share where their prompts do, whatever the answers: turns that are not the assistant's, without
    the switches /think and /no_think."""
    said = [{"role": turn["role"], "content": SWITCH.sub("", plain(turn["content"]))}
            for turn in row["messages"] if turn["role"] != "assistant"]  # fmt: skip
    # a system message that was a switch only says nothing
    return xxhash.xxh3_64_intdigest(dumped([turn for turn in said if turn["content"]]))


# -- as JSON and in Arrow ---------------------------------------------------------------------------------------------
LINE_ENDS = ((b"\xc2\x85", b"\\u0085"), (b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"))
LONG_NUMBER = re.compile(rb"\d{19}")  # orjson makes a float of a whole number over 64 bits, json keeps it


def dumped(value):
    """A value as JSON bytes in UTF-8, readable as it is; only what str.splitlines takes for a line end is escaped.
    Raises Refused where no file in UTF-8 can hold it."""
    try:
        data = orjson.dumps(value)
    except TypeError:  # half a surrogate pair, a number over 64 bits, nested over 254 deep, a key that is no string
        try:
            data = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
        except UnicodeEncodeError:
            raise Refused("text that is not Unicode", "half a surrogate pair") from None
    if not data.isascii():
        for end, escaped in LINE_ENDS:
            if end in data:
                data = data.replace(end, escaped)
    return data


def json_line(row):
    """One line of JSON, as text."""
    return dumped(row).decode() + "\n"


def loaded(line, long_numbers=True):
    """The value of a line of JSON (bytes). long_numbers: whether one may stand in it. Raises Refused."""
    try:
        if not (long_numbers and LONG_NUMBER.search(line)):
            return orjson.loads(line)
    except ValueError:
        pass
    try:  # what orjson does not take or would change: slower, and its errors name the column
        return json.loads(line, parse_constant=not_json)
    except UnicodeDecodeError:
        raise Refused("not JSON", "not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise Refused("not JSON", str(error)) from None


def refuse_half_pairs(row):
    """Refuse a row that no file in UTF-8 can hold."""
    dumped(row)


def kept_by_arrow(row):
    """Whether datasets gives the row back equal: it reads its JSON columns by a parser that holds 64-bit integers and
    the digits of most floats."""
    parts = [value for turn in row["messages"] for value in turn.values() if not isinstance(value, str)]
    parts += filter(None, (row.get("tools"), row["chat_template_kwargs"]))
    if not any(map(numbered, parts)):
        return True  # text alone is always kept
    from datasets.utils.json import ujson_loads

    try:
        return all(ujson_loads(dumped(part)) == part for part in parts)
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
        raise Refused("number that Arrow cannot keep", "over ten decimals or 64 bits; write it as a string")
