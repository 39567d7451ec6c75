"""Conversations in the shapes of single vendors' models: MOSS, Gemini, ChatGLM3."""

import re

from ..errors import InvalidRow
from ..json_text import dump_json
from ..parsing import (
    LOSS_FLAGS,
    clean_text,
    first_present,
    is_empty,
    parse_turns,
    read_one,
    require_objects,
    unread_keys,
)
from .chats import TURN_COLUMNS, messages, read_turns, with_turns
from .exchange import SYSTEM_KEYS, exchange, read_system, with_system
from .tools import json_schema

# -- MOSS -------------------------------------------------------------------------------------------------------------
MOSS_MARKS = re.compile(r"^<\|[\w ]+\|>:|<eo[a-z]>$")
MOSS_KEYS = ("Human", "Inner Thoughts", "Commands", "Tool Responses", "MOSS")


def moss(row: dict) -> dict:
    """fnlp/moss-003-sft-data: chat {turn_1: {Human, Inner Thoughts, Commands, Tool Responses, MOSS}, turn_2: …}, whose
    marks (<|Human|>: … <eoh>) go, and meta_instruction as the system prompt. Inner thoughts are reasoning; None is
    none. Turns with commands are refused: they call plugins that no schema describes."""
    turns = []
    not_kept = []
    chat = row["chat"]
    for name in sorted(chat, key=lambda name: int(name.removeprefix("turn_"))):
        turn = chat[name]
        for key in ("Commands", "Tool Responses"):
            if moss_text(turn, key):
                raise InvalidRow("command of a plugin", f"{name}: {turn[key]}"[:80])
        thoughts = moss_text(turn, "Inner Thoughts")
        turns += exchange(moss_text(turn, "Human"), moss_text(turn, "MOSS"), beside={"reasoning_content": thoughts})
        not_kept += unread_keys(turn, MOSS_KEYS, "chat")
    system = read_one(row, ("meta_instruction", *SYSTEM_KEYS), "system prompt")
    if not is_empty(system):
        turns = with_system(turns, clean_text(system, "meta_instruction"))
    return {**row, "messages": turns, "not_kept": not_kept}


def moss_text(turn: dict, key: str) -> str:
    """Return a text of a turn without its marks; "" for None, unless somebody says it."""
    if turn.get(key) is None:
        return ""
    text = MOSS_MARKS.sub("", clean_text(turn[key], key)).strip()
    if text == "None" and key not in ("Human", "MOSS"):
        return ""
    return text


# -- Gemini -----------------------------------------------------------------------------------------------------------
GEMINI_SYSTEM = ("systemInstruction", "system_instruction")
GEMINI_CALL = ("functionCall", "function_call")
GEMINI_RESPONSE = ("functionResponse", "function_response")
GEMINI_DECLARATIONS = ("functionDeclarations", "function_declarations")


def gemini(row: dict) -> dict:
    """Gemini and Vertex AI: contents of role (user, model) and parts (text, thought, functionCall, functionResponse),
    systemInstruction, tools of functionDeclarations, whose types become those of JSON schema. Parts with files are
    refused."""
    contents = row["contents"]
    if isinstance(contents, dict):
        contents = [contents]
    turns = []
    not_kept = []
    for number, content in enumerate(require_objects(contents, "contents")):
        turns += gemini_turns(content, number, not_kept)
    system = read_one(row, GEMINI_SYSTEM, "system prompt")
    if isinstance(system, dict):
        turns = gemini_turns({"role": "system", "parts": system["parts"]}, 0, not_kept) + turns
    elif not is_empty(system):
        turns.insert(0, {"role": "system", "content": system})
    found = {**row, "messages": with_system(parse_turns(turns), read_system(row)), "not_kept": not_kept}
    found["tools"] = gemini_tools(row.get("tools") or [])
    return found


def gemini_turns(content: dict, number: int, not_kept: list[str]) -> list[dict]:
    """Return the turns of a content, a tool's for each response. Raises InvalidRow.

    not_kept: the keys of its parts that have no place are added there.
    """
    parts = []
    responses = []
    for part in require_objects(content["parts"], "parts"):
        call = read_one(part, GEMINI_CALL, "functionCall")
        response = read_one(part, GEMINI_RESPONSE, "functionResponse")
        if call is not None:
            called = {"id": call.get("id"), "name": call["name"], "arguments": call.get("args") or {}}
            not_kept += unread_keys(call, ("id", "name", "args"), "parts.functionCall")
            parts.append({"type": "tool_call", "value": called})
        elif response is not None:
            not_kept += unread_keys(response, ("id", "name", "response"), "parts.functionResponse")
            responses.append(gemini_response(response))
        elif isinstance(part.get("text"), str):
            parts.append({"type": "reasoning" if part.get("thought") else "text", "value": part["text"]})
        else:
            raise InvalidRow("content part of another kind", f"{', '.join(part)} in message {number}")
        not_kept += unread_keys(part, ("text", "thought", *GEMINI_CALL, *GEMINI_RESPONSE), "parts")
    if responses and parts:
        raise InvalidRow("content parts out of order", f"text or a call beside a functionResponse in message {number}")
    if responses:
        return responses
    return [{**content, "content": parts}]


def gemini_response(response: dict) -> dict:
    """Return the turn of a tool that says what a functionResponse holds, an object as JSON."""
    said = response["response"]
    if not isinstance(said, str):
        said = dump_json(said).decode()
    return {"role": "tool", "content": said, "name": response.get("name"), "tool_call_id": response.get("id")}


def gemini_tools(tools: object) -> list[dict]:
    """Return the functions that tools declare, and the tools that declare none as they are."""
    functions = []
    for tool in require_objects(tools, "tools"):
        declared = read_one(tool, GEMINI_DECLARATIONS, "tools")
        if declared is None:
            functions.append(tool)
            continue
        for function in require_objects(declared, "functionDeclarations"):
            if function.get("parameters"):
                function = {**function, "parameters": json_schema(function["parameters"])}
            functions.append(function)
    return functions


# -- ChatGLM3 ---------------------------------------------------------------------------------------------------------
GLM_KEYS = ("parameters", "observation")


def chatglm3(row: dict) -> dict:
    """ChatGLM3: conversations as of messages, in which a tool turn is a call and its result, name, parameters and
    observation; the call joins the assistant's text before it. loss flags the call."""
    turns = []
    for turn in require_objects(read_turns(row), "conversations"):
        if "observation" not in turn:
            turns.append(turn)
            continue
        call = {"name": turn["name"], "arguments": turn["parameters"]}
        flags = {key: turn[key] for key in LOSS_FLAGS if key in turn}
        turns.append({**flags, "role": "tool_call", "content": call})
        said = turn["observation"]
        if not isinstance(said, str):
            said = dump_json(said).decode()
        others = {key: value for key, value in turn.items() if key not in (*GLM_KEYS, *LOSS_FLAGS)}
        turns.append({"content": said, **others})
    return messages(with_turns(row, turns))


# -- by what a row is known -------------------------------------------------------------------------------------------
def holds_observation(row: dict) -> bool:
    """Return whether a turn is a call and its result."""
    turns = first_present(row, TURN_COLUMNS)
    return isinstance(turns, list) and any([isinstance(turn, dict) and turn.keys() >= set(GLM_KEYS) for turn in turns])


def holds_moss(row: dict) -> bool:
    return isinstance(row["chat"]["turn_1"], dict)


def holds_contents(row: dict) -> bool:
    contents = row["contents"]
    first = contents[0] if isinstance(contents, list) else contents
    return "parts" in first
