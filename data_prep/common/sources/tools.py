"""Function calls: reference calls beside a question, and calls written into the text."""

import ast
import re

from ..errors import InvalidRow
from ..parsing import (
    ROLE_KEYS,
    first_present,
    parse_calls,
    parse_json,
    parse_tools,
    parse_turns,
    read_content,
    read_one,
    read_role,
    replace_content,
    require_objects,
    unread_call_keys,
)
from ..rows import find_control_token
from .chats import TURN_COLUMNS, messages, read_turns, split_calls, with_turns
from .exchange import exchange, read_system

JSON_TYPES = {  # names of types in BFCL and xLAM, Python's and Java's, and in Gemini's declarations, in JSON schema
    "OBJECT": "object",
    "ARRAY": "array",
    "NUMBER": "number",
    "INTEGER": "integer",
    "BOOLEAN": "boolean",
    "STRING": "string",
    "dict": "object",
    "Dict": "object",
    "HashMap": "object",
    "Hashtable": "object",
    "tuple": "array",
    "Tuple": "array",
    "list": "array",
    "List": "array",
    "set": "array",
    "Set": "array",
    "Array": "array",
    "ArrayList": "array",
    "Queue": "array",
    "Stack": "array",
    "float": "number",
    "double": "number",
    "bool": "boolean",
    "str": "string",
    "String": "string",
    "char": "string",
    "int": "integer",
    "byte": "integer",
    "short": "integer",
    "long": "integer",
    "Bigint": "integer",
}
SCHEMA_TYPES = ("object", "array", "number", "integer", "boolean", "string", "null")


def json_schema(schema: dict) -> dict:
    """Return a schema in BFCL's types as JSON schema; `any` is no constraint."""
    converted = {key: value for key, value in schema.items() if key != "type"}
    kind = schema.get("type")
    if isinstance(kind, str):
        kind = JSON_TYPES.get(kind, kind)
    if kind not in (None, "any", "Any"):
        converted = {"type": kind, **converted}
    if isinstance(schema.get("properties"), dict):
        converted["properties"] = {name: json_schema(value) for name, value in schema["properties"].items()}
    if isinstance(schema.get("items"), dict):
        converted["items"] = json_schema(schema["items"])
    return converted


# -- BFCL -------------------------------------------------------------------------------------------------------------
def bfcl(row: dict, *, answers: dict[str, list] | None = None) -> dict:
    """BFCL v4 (ShishirPatil/gorilla): question [[turn, …]], function [{name, description, parameters}], whose reference
    stands in a file of its own, {id, ground_truth: [{name: {argument: [what is right, …]}}]}: --answers FILE, without
    it possible_answer/NAME beside the input. The last turn is the assistant's call with the first right value of each
    argument, without those that may be left out. Rows without reference calls (irrelevance) and of several user turns
    (their replies need the tools run) are refused. It is an evaluation set: train on it to test a pipeline only."""
    turns = parse_turns(row["question"][0], "question")
    listed = answers.get(row.get("id")) if answers else None
    reference = read_one({**row, "--answers": listed}, ("ground_truth", "--answers"), "ground_truth")
    if len(row["question"]) != 1:
        raise InvalidRow("several user turns without the tools' replies")
    if not reference:
        raise InvalidRow("no reference answer", str(row["id"])[:80] if answers else "pass --answers FILE")
    tools = parse_tools([{**tool, "parameters": json_schema(tool["parameters"])} for tool in row["function"]])
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    calls = []
    for call in require_objects(reference, "ground_truth"):
        ((name, arguments),) = call.items()
        if name not in schemas:
            raise InvalidRow("call of a tool that is not offered", name)
        calls.append({"name": name, "arguments": right_values(arguments, schemas[name])})
    turns.append({"role": "assistant", "content": "", "tool_calls": parse_calls(calls)})
    return {"messages": turns, "tools": tools}


def right_values(arguments: dict[str, list], schema: dict) -> dict:
    """Return {argument: its first right value}; "" among the right ones says that the argument may be left out."""
    properties = schema.get("properties") or {}
    required = schema.get("required") or []
    values = {}
    for name, candidates in arguments.items():
        if "" in candidates and name not in required:
            continue
        value = next((candidate for candidate in candidates if candidate != ""), "")
        values[name] = nested_value(value, properties.get(name) or {})
    return values


def nested_value(value: object, schema: dict) -> object:
    """Return a right value, whose objects hold lists of right values again."""
    if isinstance(value, dict):
        candidates = {}
        for name, item in value.items():
            candidates[name] = item if isinstance(item, list) else [item]
        return right_values(candidates, schema)
    if isinstance(value, list):
        return [nested_value(item, schema.get("items") or {}) for item in value]
    return value


# -- xLAM -------------------------------------------------------------------------------------------------------------
def xlam(row: dict) -> dict:
    """Salesforce/xlam-function-calling-60k: query, tools and answers (the calls) as JSON text; parameters are
    {name: {type, description, default}} with Python's types ("str, optional"), which become a JSON schema."""
    tools = parse_json(row["tools"], "tools that are not JSON")
    converted = []
    for tool in require_objects(tools, "tools"):
        parameters = tool.get("parameters") or {}
        if not isinstance(parameters.get("properties"), dict):
            parameters = schema_of_parameters(parameters)
        converted.append({**tool, "parameters": json_schema(parameters)})
    turns = exchange(row["query"], "", read_system(row))[:-1]
    turns.append({"role": "assistant", "content": "", "tool_calls": parse_calls(row["answers"])})
    return {"messages": turns, "tools": converted, "not_kept": unread_call_keys(row["answers"])}


def schema_of_parameters(parameters: dict) -> dict:
    """Return the JSON schema of {name: {type, description, default}}: optional by its type, or by a default."""
    properties = {}
    required = []
    for name, parameter in parameters.items():
        kind, _, more = str(parameter.get("type", "")).partition(",")
        properties[name] = {key: value for key, value in parameter.items() if key != "type"}
        base = re.sub(r"\[.*", "", kind.strip())
        base = JSON_TYPES.get(base, base)
        if base in SCHEMA_TYPES and (base in ("array", "object") or "[" not in kind):
            properties[name] = {"type": base, **properties[name]}
        is_optional = "optional" in more or base == "Optional" or "default" in parameter
        if not is_optional:
            required.append(name)
    schema = {"type": "object", "properties": properties}
    if required:
        schema["required"] = required
    return schema


# -- Hermes -----------------------------------------------------------------------------------------------------------
TOOLS = re.compile(r"<tools>\s*([\[{].*?[\]}])\s*</tools>", re.S)
RESPONSE = re.compile(r"\s*<tool_response>(.*?)</tool_response>\s*", re.S)


def hermes(row: dict) -> dict:
    """NousResearch/hermes-function-calling-v1 and its like: calls as <tool_call> blocks at the end of an answer (JSON,
    or Python's notation), replies as <tool_response> blocks in tool (or user) turns, the tools in the system prompt
    within <tools>. What else the system prompt says of these tags goes with them: templates write it anew."""
    listed = None
    turns = []
    not_kept = []
    for number, turn in enumerate(require_objects(read_turns(row), "conversations")):
        role = read_role(turn, number)
        content = read_content(turn, number)
        if not isinstance(content, str):
            turns.append(turn)
            continue
        match = TOOLS.search(content)
        if role in ("tool", "user") and "<tool_response>" in content:
            turns += split_responses(turn, content)
        elif role == "system" and match:
            listed = parse_literals(match[1])
            content = TOOLS.sub("", content).strip()
            if "<tools>" in content or find_control_token(content):
                content = ""
                not_kept.append("system text on the tags of calls")
            turns.append(replace_content(turn, content))
        elif role == "assistant":
            turns.append(split_calls(replace_content({**turn, "role": role}, content), not_kept, parse_literal))
        else:
            turns.append(turn)
    found = messages(with_turns(row, turns))
    tools = read_one({"tools": found["tools"], "system text": listed}, ("tools", "system text"), "tools", parse_tools)
    return found | {"tools": tools, "not_kept": not_kept}


def split_responses(turn: dict, content: str) -> list[dict]:
    """Return a tool turn for each <tool_response> block of a turn. Raises InvalidRow for text beside them."""
    beside = RESPONSE.sub("", content)
    if beside:
        raise InvalidRow("text beside a tool response", beside[:80])
    kept = {key: value for key, value in turn.items() if key not in ROLE_KEYS}
    return [{**replace_content(kept, text), "role": "tool"} for text in RESPONSE.findall(content)]


def parse_literals(text: str) -> list:
    """Return the tools of a text: a list, or one object a line."""
    if text.startswith("["):
        return parse_literal(text)
    return [parse_literal(line) for line in text.splitlines() if line.strip()]


def parse_literal(text: str) -> object:
    """Return the value of JSON text, or of a literal in Python's notation. Raises InvalidRow."""
    try:
        return parse_json(text, "tool call that is not JSON")
    except InvalidRow:
        try:
            return ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise InvalidRow("tool call that is not JSON", text.strip()[:80]) from None


def holds_tags(row: dict) -> bool:
    """Return whether calls or tools stand in the text of a conversation."""
    text = str(first_present(row, TURN_COLUMNS))
    return "<tool_call>" in text or TOOLS.search(text) is not None
