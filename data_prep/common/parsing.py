"""Read messages, tool calls and tools of any usual shape as those of transformers' chat API."""

import json
import re

from .errors import InvalidRow
from .json_text import refuse_constant


def clean_text(value, where):
    """The string without blanks at its ends, CRLF as LF; raises InvalidRow, which names `where`."""
    if not isinstance(value, str):
        raise InvalidRow("text that is not a string", f"{where} is {type(value).__name__}")
    return value.replace("\r\n", "\n").strip()


def require_objects(value, where):
    """The value where it is a list of objects; raises InvalidRow."""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise InvalidRow("field of another type", f"{where} must be a list of objects")
    return value


def parse_json(value, reason):
    """A value that may be JSON text; raises InvalidRow with this reason where it is text and not JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidRow(reason, str(error)) from None


PARTS = ("reasoning", "text", "tool_call")  # in the order in which a message is rendered


def join_parts(turn):
    """A message whose content is a list of parts {"type": one of PARTS, "value" (or "text"): str}, as LLaMA-Factory and
    StepTron write it, with one string instead: texts and reasoning joined as they stand, calls (JSON) in tool_calls.
    Raises InvalidRow for other parts, and for an order or a field beside them that one message cannot keep."""
    found, role = {kind: [] for kind in PARTS}, turn["role"]
    for part in require_objects(turn["content"], "content"):
        kind, value = part.get("type"), part.get("value", part.get("text"))
        if kind not in PARTS or kind != "text" and role != "assistant":
            raise InvalidRow("content part of another kind", f"{kind} in a {role} message")
        if any(found[later] for later in PARTS[PARTS.index(kind) + 1 :]):
            raise InvalidRow("content parts out of order", f"{kind} behind what follows it in a message")
        if kind != "tool_call" and not isinstance(value, str):
            raise InvalidRow("text that is not a string", f"{kind} part of a {role} message is {type(value).__name__}")
        found[kind].append(parse_json(value, "tool call that is not JSON") if kind == "tool_call" else value)
    more = {"reasoning_content": "".join(found["reasoning"]), "tool_calls": found["tool_call"]}
    if told := [name for name, value in more.items() if value and turn.get(name)]:
        raise InvalidRow("content parts out of order", f"{told[0]} in the parts and beside them")
    return {**turn, "content": "".join(found["text"]), **{name: value for name, value in more.items() if value}}


def parse_message(turn):
    """One message in the shape of transformers' chat API; a leading <think> block becomes reasoning_content. Raises
    InvalidRow."""
    turn = join_parts(turn) if isinstance(turn.get("content"), list) else turn
    role, content = turn["role"], turn.get("content")
    if content is None and turn.get("tool_calls"):
        content = ""
    out = {"role": role, "content": clean_text(content, f"content of a {role} message")}
    if len(turn) == 2 and "content" in turn and not out["content"].startswith("<think>"):
        return out  # as most messages are
    if turn.get("reasoning_content"):
        out["reasoning_content"] = clean_text(turn["reasoning_content"], "reasoning_content")
    elif role == "assistant" and out["content"].startswith("<think>"):
        block = re.match(r"<think>(.*?)</think>", out["content"], re.DOTALL)
        if block:
            out["content"] = out["content"][block.end() :].strip()
            if block[1].strip():
                out["reasoning_content"] = block[1].strip()
    if turn.get("tool_calls"):
        out["tool_calls"] = [parse_tool_call(call) for call in require_objects(turn["tool_calls"], "tool_calls")]
    for key in ("tool_call_id", "name", "loss_mask"):
        if turn.get(key) is not None:
            out[key] = turn[key]
    return out


def parse_tool_call(call):
    """{"type": "function", "function": {"name": str, "arguments": object}}, from any of the usual shapes. Raises
    InvalidRow."""
    function = call.get("function", call) if isinstance(call, dict) else {}
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or "arguments" not in function:
        raise InvalidRow("tool call without a name or arguments")
    arguments = parse_json(function["arguments"], "tool arguments that are not JSON")
    if not isinstance(arguments, dict):
        raise InvalidRow("tool arguments that are not an object", type(arguments).__name__)
    out = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": call["id"], **out} if call.get("id") else out


def parse_tools(tools):
    """A list, or its JSON text, as the list of {"type": "function", "function": {"name": ...}} that transformers'
    templates read; raises InvalidRow."""
    if not tools:
        return []
    tools = parse_json(tools, "tools that are not JSON")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InvalidRow("tools that are not a list of objects")
    tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    if not all(isinstance(tool["function"], dict) and tool["function"].get("name") for tool in tools):
        raise InvalidRow("tool without a name")
    return tools
