"""Read messages, tool calls and tools of any usual shape as those of transformers' chat API."""

import json
from collections.abc import Callable, Iterable, Sequence

from .errors import InvalidRow
from .json_text import refuse_constant
from .media import MEDIA, PART_MEDIA, refuse_media

ROLES = {  # as other trainers name them: ours
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function": "tool",
    "ipython": "tool",
    "function_call": "call",
    "tool_call": "call",
}
CALL = "call"  # of a turn whose text is a call, or a list of them, as JSON: it is the assistant's
ROLE_KEYS = ("role", "from")
CONTENT_KEYS = ("content", "value", "text")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking", "tool_plan")  # tool_plan: Cohere's
REASONING_BLOCKS = {"thinking_blocks": "thinking", "reasoning_details": "text"}  # Anthropic's and OpenRouter's lists
CALL_KEYS = ("tool_calls", "function_call")
LOSS_FLAGS = (
    "loss_mask",
    "weight",  # OpenAI, Mistral
    "loss",  # ms-swift, XTuner, ChatGLM3
    "train",  # axolotl
    "training",
    "trainable",  # tinker
    "loss_weight",  # LLaMA-Factory
    "loss_scale",  # ms-swift
    "step_loss_mask",  # slime
    "output_with_loss",  # XTuner's, of a pair
    "masked",  # torchtune's, the other way round
)
LOSS_DETAILS = ("train_detail", "training_detail", "reasoning_training_detail")  # axolotl: of single characters
STATES = {  # what else a message may say of itself, and what it must say to be trained like any other
    "ipython": False,  # torchtune: its text is a call
    "prefix": False,  # Mistral, DeepSeek: an answer that has only begun
    "partial": False,  # Kimi: the same
    "eot": True,  # torchtune: whether its end is one to learn; templates end every message
    "end_turn": True,  # OpenAI's harmony
}
TOOL_COLUMNS = ("tools", "functions", "available_tools")
TOOL_KEYS = ("tools", "tool_schemas")  # of a first message
ANSWER_KEYS = (  # that say more of an answer, in its message or beside it
    *REASONING_KEYS,
    *REASONING_BLOCKS,
    *CALL_KEYS,
    *LOSS_FLAGS,
    *LOSS_DETAILS,
    *MEDIA,
    "refusal",
    "deleted",
)
MESSAGE_KEYS = frozenset([*ROLE_KEYS, *CONTENT_KEYS, *ANSWER_KEYS, *TOOL_KEYS, "tool_call_id", "name"])
# read, or refused by name; every other key of a message is counted as not kept
EXTRA_KEYS = (MESSAGE_KEYS | STATES.keys()) - {*ROLE_KEYS, *CONTENT_KEYS}  # that most messages have none of
PART_KEYS = (*CONTENT_KEYS, *REASONING_KEYS, *REASONING_BLOCKS)  # that may hold parts or blocks
PLAIN_KEYS = {"role", "content"}
CALLED_KEYS = ("name", "arguments")  # of a call, where it has no function
RESULT_KEYS = ("result", "results", "output", "response", "observation")  # that some put into the call itself


# -- values -----------------------------------------------------------------------------------------------------------
def clean_text(value: object, where: str) -> str:
    """Return a string without blanks at its ends, CRLF as LF; raise InvalidRow, which names `where`."""
    if not isinstance(value, str):
        raise InvalidRow("text that is not a string", f"{where} is {type(value).__name__}")
    return value.replace("\r\n", "\n").strip()


def require_objects(value: object, where: str) -> list[dict]:
    """Return a value that is a list of objects; raise InvalidRow for any other."""
    if not isinstance(value, list) or not all([isinstance(item, dict) for item in value]):
        raise InvalidRow("field of another type", f"{where} must be a list of objects")
    return value


def parse_json(value: object, reason: str) -> object:
    """Return a value that may be JSON text; raise InvalidRow with this reason where it is text and not JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidRow(reason, str(error)) from None


def parse_list(value: object, where: str) -> object:
    """Return a value that may be the JSON text of a list."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        return parse_json(value, f"{where} that is not JSON")
    return value


def is_empty(value: object) -> bool:
    """Return whether a value says nothing: null, blank text, an empty list or object."""
    if isinstance(value, str):
        return not value or value.isspace()
    return value is None or value == [] or value == {}


def read_flag(value: object) -> float | None:
    """Return the number of a flag or weight: 1 for true and "true", 0.5 for "0.5"; None for what is neither."""
    if isinstance(value, str):
        text = value.strip().lower()
        if text in ("true", "false"):
            return float(text == "true")
        try:
            return float(text)
        except ValueError:
            return None
    return value if isinstance(value, (bool, int, float)) else None


def is_deleted(row: dict) -> bool:
    """Return whether a row or a message says that it was deleted, by a flag or a date."""
    return not is_empty(row.get("deleted")) and read_flag(row["deleted"]) != 0


def first_present(row: dict, keys: Iterable[str]) -> object:
    """Return the value of the first key that a row has with another value than null; None where it has none.

    It tells what kind of row it is; what is trained is read by read_one.
    """
    for key in keys:
        value = row.get(key)
        if value is not None:
            return value
    return None


def strip_text(value: object) -> object:
    return clean_text(value, "") if isinstance(value, str) else value


def read_one(
    row: dict, keys: Sequence[str], what: str, parse: Callable[[object], object] = strip_text, required: bool = False
) -> object:
    """Return what a row holds under the names of one thing; None where it has none of them.

    An empty value gives way to another, and equal ones are one. parse: brings values into the shape in which they are
    compared. Raises InvalidRow for two that differ; KeyError where it is required and missing.
    """
    chosen = None
    chosen_key = ""
    for key in keys:
        value = row.get(key)
        if value is None:
            continue
        if chosen is None or is_empty(chosen):
            chosen = value
            chosen_key = key
        elif not is_empty(value) and not is_same(chosen, value, parse):
            detail = f"{chosen_key} {str(chosen)[:40]!r}, {key} {str(value)[:40]!r}"
            raise InvalidRow(f"{what} under two names", detail)
    if required and not chosen_key:
        raise KeyError(keys[0])
    return chosen


def is_same(first: object, second: object, parse: Callable[[object], object]) -> bool:
    """Return whether two values are equal, or parsed ones."""
    if first == second:
        return True
    try:
        return parse(first) == parse(second)
    except InvalidRow:
        return False


def read_id(value: object, what: str) -> str | None:
    """Return an id as text, as templates compare and write it; None where there is none. Raises InvalidRow."""
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise InvalidRow(f"{what} that is not text", str(value)[:80])
    return str(value)


# -- messages ---------------------------------------------------------------------------------------------------------
def parse_turns(value: object, where: str = "messages") -> list[dict]:
    """Return the messages of a list of turns, or of its JSON text, in the shape of transformers' chat API.

    A turn that is a call joins the assistant's message before it; an empty system turn goes. Raises InvalidRow.
    """
    turns = []
    for number, turn in enumerate(require_objects(parse_list(value, where), where)):
        role = read_role(turn, number)
        if role == CALL:
            add_calls(turns, turn, number)
            continue
        message = parse_message(turn, number, role)
        if role != "system" or message["content"]:
            turns.append(message)
    return turns


def parse_message(turn: dict, number: int = 0, role: str | None = None) -> dict:
    """Return message `number` of a conversation in the shape of transformers' chat API.

    Reads role/content and from/value, content in parts, reasoning by any of its usual names or in a <think> block,
    function_call as tool_calls, and weight, loss, train and the like as loss_mask. Raises InvalidRow.
    role: read_role of the turn, where it is known.
    """
    if role is None:
        role = read_role(turn, number)
    content = read_content(turn, number)
    if isinstance(content, list):
        turn, content = join_parts(turn, content, role)
    extra = not EXTRA_KEYS.isdisjoint(turn)
    calls = None
    reasoning = None
    if extra:
        refuse_media(turn, f"message {number}")
        if number and first_present(turn, TOOL_KEYS):
            raise InvalidRow("tools in a later message", f"message {number}: tools of a row stand in its first message")
        calls = read_tool_calls(turn)
        refuse_states(turn, number, bool(calls))
        reasoning = read_reasoning(turn)
        if reasoning and role != "assistant":
            raise InvalidRow("reasoning of a message that is not the assistant's", f"message {number} of the {role}")
        if content is None and calls:
            content = ""
    text = clean_text(content, f"content of a {role} message")
    if role == "assistant" and reasoning is None:
        reasoning, text = split_thinking(text)
    message = {"role": role, "content": text}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    if extra:
        add_extras(message, turn, number)
    return message


def add_extras(message: dict, turn: dict, number: int) -> None:
    """Add the ids and the flag that most messages have none of. Raises InvalidRow."""
    call_id = read_id(turn.get("tool_call_id"), "tool call id")
    if call_id is not None:
        message["tool_call_id"] = call_id
    name = turn.get("name")
    if name is not None and not isinstance(name, str):
        raise InvalidRow("name that is not text", f"message {number}: {name!r}"[:80])
    if name:
        message["name"] = name
    loss_mask = read_loss_mask(turn, message["role"], number)
    if loss_mask is not None:
        message["loss_mask"] = loss_mask


def known_role(speaker: object) -> str | None:
    """Return our name of a role; None for one that is unknown."""
    if not isinstance(speaker, str):
        return None
    return ROLES.get(speaker) or ROLES.get(speaker.lower())


def read_role(turn: dict, number: int) -> str:
    """Return the role of a turn under our name, or CALL. Raises InvalidRow."""
    if "role" in turn and "from" in turn:
        speaker = read_one(turn, ROLE_KEYS, "role", known_role)
    else:
        speaker = turn.get("role", turn.get("from"))
    if speaker is None:
        raise missing_key("role", turn, number)
    role = known_role(speaker)
    if role is None:
        raise InvalidRow("unknown role", f"message {number}: {speaker!r}"[:80])
    return role


def read_content(turn: dict, number: int) -> object:
    """Return what stands as the content of a turn; None where nothing does and it may hold calls instead."""
    content = read_one(turn, CONTENT_KEYS, "content")
    if content is None and not any([key in turn for key in (*CONTENT_KEYS, *CALL_KEYS)]):
        raise missing_key("content", turn, number)
    return content


def replace_content(turn: dict, content: object) -> dict:
    """Return a turn with another content, under whichever name it had one."""
    kept = {key: value for key, value in turn.items() if key not in CONTENT_KEYS}
    return {**kept, "content": content}


def missing_key(key: str, turn: dict, number: int) -> InvalidRow:
    has = ", ".join(map(str, turn)) or "nothing"
    return InvalidRow("missing field", f"{key} of message {number}, which has {has}")


def refuse_states(turn: dict, number: int, has_calls: bool) -> None:
    """Raise InvalidRow where a message says of itself that it is not a whole one to be trained."""
    for key in STATES:
        if key not in turn:
            continue
        sound = STATES[key]
        flag = read_flag(turn[key])
        if flag is None or flag == sound:
            continue
        if sound and has_calls:  # templates end a call in a way of its own
            continue
        raise InvalidRow(f"{key} {str(not sound).lower()} of a message", f"message {number}: {turn[key]!r}"[:80])
    if is_deleted(turn):
        raise InvalidRow("deleted message", f"message {number}: deleted {turn['deleted']}"[:80])
    if not is_empty(turn.get("refusal")):
        raise InvalidRow("refusal of a message", f"message {number}: {str(turn['refusal'])[:60]}: make it its content")


PARTS = ("reasoning", "text", "tool_call")  # in the order in which a message is rendered
PART_KINDS = {"reasoning": "reasoning", "thinking": "reasoning", "text": "text", "tool_call": "tool_call"}


def join_parts(turn: dict, content: list, role: str) -> tuple[dict, str]:
    """Return (turn, content) of a message whose content is in parts {"type": one of PARTS, "value" (or "text"): str}.

    As LLaMA-Factory, StepTron and OpenAI write it: texts and reasoning are joined as they stand, calls (JSON) stand in
    tool_calls. Raises InvalidRow for other parts, and for an order or a field beside them that one message cannot keep.
    """
    joined = {kind: [] for kind in PARTS}
    for part in require_objects(content, "content"):
        name = part.get("type")
        kind = PART_KINDS.get(name) if isinstance(name, str) else None
        refuse_part_flags(part)
        if kind is None or (kind != "text" and role != "assistant"):
            raise InvalidRow("content part of another kind", f"{name} in a {role} message")
        refuse_media(part, f"{kind} part of a {role} message", PART_MEDIA)
        later = PARTS[PARTS.index(kind) + 1 :]
        if any([joined[other] for other in later]):
            raise InvalidRow("content parts out of order", f"{kind} behind what follows it in a message")
        joined[kind].append(read_part(part, kind, role))
    beside = {"reasoning_content": "".join(joined["reasoning"]), "tool_calls": joined["tool_call"]}
    turn = dict(turn)
    for key, value in beside.items():
        if value and turn.get(key):
            raise InvalidRow("content parts out of order", f"{key} in the parts and beside them")
        if value:
            turn[key] = value
    return turn, "".join(joined["text"])


def refuse_part_flags(part: dict) -> None:
    """Raise InvalidRow where a part says by itself whether it is trained."""
    for key in LOSS_FLAGS:
        if part.get(key) is not None:
            raise InvalidRow(f"{key} of a content part", "a message is trained whole or not at all")


def read_part(part: dict, kind: str, role: str) -> object:
    """Return the text of a part, or its call."""
    value = read_one(part, ("value", "text", part["type"]), f"{kind} part")
    if kind == "tool_call":
        return parse_json(value, "tool call that is not JSON")
    if kind == "reasoning" and part["type"] == "thinking" and isinstance(value, list):  # Mistral's
        value = "".join([clean_text(item.get("text"), "thinking") for item in require_objects(value, "thinking")])
    if not isinstance(value, str):
        raise InvalidRow("text that is not a string", f"{kind} part of a {role} message is {type(value).__name__}")
    return value


# -- reasoning --------------------------------------------------------------------------------------------------------
def read_reasoning(turn: dict) -> str | None:
    """Return the reasoning beside a text, under whichever name it stands. Raises InvalidRow where two disagree."""
    texts = {}
    for key in REASONING_KEYS:
        value = turn.get(key)
        if isinstance(value, list):  # axolotl's parts
            texts[key] = read_blocks(value, key, "text")
        elif value:
            texts[key] = clean_text(value, key)
    for key, field in REASONING_BLOCKS.items():
        if turn.get(key):
            texts[key] = read_blocks(turn[key], key, field)
    return read_one(texts, tuple(texts), "reasoning") or None


def read_blocks(blocks: object, key: str, field: str) -> str:
    """Return the text of a list of reasoning blocks. Raises InvalidRow for one without it (encrypted, redacted)."""
    texts = []
    for block in require_objects(blocks, key):
        refuse_part_flags(block)
        if not isinstance(block.get(field), str):
            raise InvalidRow(f"{key} without text", f"a block of type {block.get('type')}")
        texts.append(block[field])
    return clean_text("".join(texts), key)


def split_thinking(text: str) -> tuple[str | None, str]:
    """Return (reasoning or None, answer) of an answer that a <think> block begins.

    A closing tag alone splits it too, as templates do: some servers open the block in the prompt.
    """
    if "</think>" not in text:
        return None, text
    is_open = text.startswith("<think>")
    if not is_open and "<think>" in text:
        return None, text
    reasoning, _, answer = text.removeprefix("<think>").partition("</think>")
    return reasoning.strip() or None, answer.strip()


# -- which messages are trained ---------------------------------------------------------------------------------------
def read_loss_mask(turn: dict, role: str, number: int) -> int | None:
    """Return 0 or 1 where a message is flagged as trained or not, None where it is not flagged.

    Flags: those of LOSS_FLAGS; masked is the other way round.
    Messages without a flag are trained where they are the assistant's, by these trainers and by our templates.
    Raises InvalidRow for a weight between, and for what would train a message that is not the assistant's.
    """
    masks = {}
    for key in LOSS_FLAGS:
        value = turn.get(key)
        if value is None:
            continue
        if isinstance(value, str) or value not in (0, 1):
            raise InvalidRow(f"{key} that is not 0 or 1", f"message {number}: {value!r}"[:80])
        masks[key] = int(not value) if key == "masked" else int(value)
    for key in LOSS_DETAILS:
        if turn.get(key):
            raise InvalidRow(f"{key} of a message", f"message {number}: a message is trained whole or not at all")
    if len(set(masks.values())) > 1:
        raise InvalidRow("loss flags that disagree", f"message {number}: {', '.join(masks)}")
    if role == "assistant" or "loss_mask" in masks:  # StepTron's stands on every message and counts on answers alone
        return next(iter(masks.values()), None)
    if 1 in masks.values():
        flags = ", ".join(masks)
        raise InvalidRow("loss on a message that is not the assistant's", f"message {number} of the {role}: {flags}")
    return None


# -- tool calls and tools ---------------------------------------------------------------------------------------------
def add_calls(turns: list[dict], turn: dict, number: int) -> None:
    """Add a turn that is a call to the assistant's message before it, or as a message of its own."""
    read_content(turn, number)  # a call beside its other names
    calls = read_one(turn, (*CONTENT_KEYS, *CALL_KEYS), "tool_calls", called_functions)
    kept = {key: value for key, value in turn.items() if key not in (*ROLE_KEYS, *CALL_KEYS)}
    called = {**replace_content(kept, ""), "role": "assistant", "tool_calls": parse_calls(calls)}
    message = parse_message(called, number)
    if not turns or turns[-1]["role"] != "assistant":
        turns.append(message)
        return
    last = turns[-1]
    if last.get("loss_mask", 1) != message.get("loss_mask", 1):  # without a flag it is trained
        raise InvalidRow("loss flags that disagree", f"message {number} and the text before it are one message")
    for key in ("reasoning_content", "name", "tool_call_id"):
        if key in message and last.setdefault(key, message[key]) != message[key]:
            raise InvalidRow(f"{key} under two names", f"message {number} and the text before it are one message")
    last["tool_calls"] = last.get("tool_calls", []) + message["tool_calls"]


def read_tool_calls(turn: dict) -> list[dict]:
    """Return the calls of a turn: its tool_calls, or OpenAI's older function_call."""
    calls = read_one(turn, CALL_KEYS, "tool_calls", called_functions)
    return parse_calls(calls) if calls else []


def called_functions(calls: object) -> list[dict]:
    """Return names and arguments of calls, without ids."""
    return [call["function"] for call in parse_calls(calls)]


def parse_calls(calls: object) -> list[dict]:
    """Return a call, a list of calls, or the JSON text of either, as tool_calls. Raises InvalidRow."""
    calls = parse_json(calls, "tool call that is not JSON")
    if isinstance(calls, dict):
        calls = [calls]
    return [read_call(call) for call in require_objects(calls, "tool_calls")]


def read_call(call: dict) -> dict:
    """Return a call whose arguments may be empty text, or JSON text within JSON text.

    Raises InvalidRow, also for a result within it: it belongs into a tool message behind it.
    """
    function = call.get("function", call)
    if isinstance(function, dict):
        for key in RESULT_KEYS:
            if not is_empty(call.get(key)) or not is_empty(function.get(key)):
                raise InvalidRow(f"{key} within a tool call", "a result stands in a tool message behind the call")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = parse_json(arguments, "tool arguments that are not JSON") if arguments.strip() else {}
            function = {**function, "arguments": arguments}
            call = {**call, "function": function} if "function" in call else function
    return parse_tool_call(call)


def parse_tool_call(call: object) -> dict:
    """Return {"type": "function", "function": {"name": str, "arguments": object}}, from any of the usual shapes.

    Arguments may be JSON text. Raises InvalidRow.
    """
    function = call.get("function", call) if isinstance(call, dict) else {}
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or "arguments" not in function:
        raise InvalidRow("tool call without a name or arguments")
    arguments = parse_json(function["arguments"], "tool arguments that are not JSON")
    if not isinstance(arguments, dict):
        raise InvalidRow("tool arguments that are not an object", type(arguments).__name__)
    parsed = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    call_id = read_id(call.get("id"), "tool call id")
    if call_id is not None:
        return {"id": call_id, **parsed}
    return parsed


def parse_tools(tools: object) -> list[dict]:
    """Return a list of tools, or its JSON text, as {"type": "function", "function": {"name": ...}}, which transformers'
    templates read; raise InvalidRow."""
    if not tools:
        return []
    tools = parse_json(tools, "tools that are not JSON")
    if not isinstance(tools, list) or not all([isinstance(tool, dict) for tool in tools]):
        raise InvalidRow("tools that are not a list of objects")
    parsed = []
    for tool in tools:
        if "function" not in tool:
            tool = {"type": "function", "function": tool}
        function = tool["function"]
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise InvalidRow("tool without a name")
        if not isinstance(function.get("parameters") or {}, dict):
            raise InvalidRow("tool parameters that are not an object", str(function["parameters"])[:80])
        parsed.append(tool)
    return parsed


def read_tools(row: dict, first: object = None) -> object:
    """Return the tools of a row, which may stand in its first message. Raises InvalidRow for two that differ."""
    named = {name: row[name] for name in TOOL_COLUMNS if name in row}
    if isinstance(first, dict):
        for key in TOOL_KEYS:
            if key in first:
                named[f"{key} of the first message"] = first[key]
    if not named:
        return None
    return read_one(named, tuple(named), "tools", parse_tools)


# -- what is not kept -------------------------------------------------------------------------------------------------
def unread_keys(value: dict, read: Iterable[str], name: str) -> list[str]:
    """Return "NAME.KEY" for each other key that holds something."""
    return [f"{name}.{key}" for key, item in value.items() if key not in read and not is_empty(item)]


def is_plain(turn: dict) -> bool:
    """Return whether a turn is role and text alone, as most are, and no call."""
    if turn.keys() != PLAIN_KEYS or not isinstance(turn["content"], str):
        return False
    return ROLES.get(turn["role"], CALL) != CALL if isinstance(turn["role"], str) else False


def unread_message_keys(turns: list, read: Iterable[str] = (), replaced: Iterable[str] = ()) -> list[str]:
    """Return "messages.KEY" for each key of turns, their parts and calls that is neither read nor refused.

    read: keys that their source reads as well. replaced: keys of MESSAGE_KEYS that it does not read, since others
    stand for them. Lists of other objects than turns have none.
    """
    unread = []
    marks = (*ROLE_KEYS, *read)
    for turn in turns:
        if not isinstance(turn, dict) or turn.keys().isdisjoint(marks) or "replies" in turn:  # replies: of a tree
            continue
        if is_plain(turn) and not replaced:
            continue
        if replaced or not turn.keys() <= MESSAGE_KEYS:
            unread += unread_keys(turn, (MESSAGE_KEYS - set(replaced)).union(read), "messages")
        for key, value in turn.items():
            if key in CALL_KEYS and value:
                unread += unread_call_keys(value)
            elif isinstance(value, list) and key in PART_KEYS:
                unread += unread_part_keys(value, f"messages.{key}")
        if known_role(turn.get("role", turn.get("from"))) == CALL:
            unread += unread_call_keys(read_one(turn, CONTENT_KEYS, "content"))
    return unread


def unread_part_keys(parts: list, name: str) -> list[str]:
    """Return "NAME.KEY" for each key of content parts, or of blocks of reasoning, that is not kept."""
    unread = []
    for part in parts:
        if isinstance(part, dict):
            unread += unread_keys(part, ("type", "value", "text", "thinking", part.get("type")), name)
            if part.get("type") == "tool_call":
                unread += unread_call_keys(part.get("value"))
    return unread


def unread_call_keys(calls: object) -> list[str]:
    """Return "messages.tool_calls.KEY" for each key of calls, or of their JSON text, that is not kept."""
    calls = parse_json(calls, "tool call that is not JSON")
    unread = []
    for call in calls if isinstance(calls, list) else [calls]:
        if not isinstance(call, dict):
            continue
        function = call.get("function")
        if isinstance(function, dict):
            unread += unread_keys(call, ("id", "type", "function"), "messages.tool_calls")
            unread += unread_keys(function, CALLED_KEYS, "messages.tool_calls.function")
        else:
            unread += unread_keys(call, ("id", "type", *CALLED_KEYS), "messages.tool_calls")
    return unread
