"""Read messages, tool calls and tools of any usual shape as those of transformers' chat API."""

import json
from collections.abc import Iterable

from .errors import InvalidRow
from .json_text import refuse_constant

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
LOSS_FLAGS = ("loss_mask", "weight", "loss", "train", "training", "trainable", "loss_weight", "loss_scale", "masked")
LOSS_DETAILS = ("train_detail", "training_detail", "reasoning_training_detail")  # axolotl: of single characters
TOOL_KEYS = ("tools", "tool_schemas")  # of a first message
MEDIA = ("images", "videos", "audios", "image", "video", "audio")
MESSAGE_KEYS = frozenset(
    [
        *ROLE_KEYS,
        *CONTENT_KEYS,
        *REASONING_KEYS,
        *REASONING_BLOCKS,
        *CALL_KEYS,
        *LOSS_FLAGS,
        *LOSS_DETAILS,
        *MEDIA,
        *TOOL_KEYS,
        "tool_call_id",
        "name",
    ]
)  # read, or refused by name; every other key of a message is counted as not kept
EXTRA_KEYS = MESSAGE_KEYS - {*ROLE_KEYS, *CONTENT_KEYS}  # that most messages have none of


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


def first_present(row: dict, keys: Iterable[str]) -> object:
    """Return the value of the first key that a row has with another value than null; None where it has none."""
    for key in keys:
        value = row.get(key)
        if value is not None:
            return value
    return None


# -- messages ---------------------------------------------------------------------------------------------------------
def parse_turns(value: object, where: str = "messages") -> list[dict]:
    """Return the messages of a list of turns, or of its JSON text, in the shape of transformers' chat API.

    A turn that is a call joins the assistant's message before it; an empty system turn goes. Raises InvalidRow.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parse_json(value, f"{where} that is not JSON")
    turns = []
    for number, turn in enumerate(require_objects(value, where)):
        role = read_role(turn, number)
        if role == CALL:
            add_calls(turns, turn, number)
            continue
        message = parse_message(turn, number)
        if role != "system" or message["content"]:
            turns.append(message)
    return turns


def parse_message(turn: dict, number: int = 0) -> dict:
    """Return message `number` of a conversation in the shape of transformers' chat API.

    Reads role/content and from/value, content in parts, reasoning by any of its usual names or in a <think> block,
    function_call as tool_calls, and weight, loss, train and the like as loss_mask. Raises InvalidRow.
    """
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
        reasoning = read_reasoning(turn)
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
        for key in ("tool_call_id", "name"):
            if turn.get(key) is not None:
                message[key] = turn[key]
        loss_mask = read_loss_mask(turn, role, number)
        if loss_mask is not None:
            message["loss_mask"] = loss_mask
    return message


def read_role(turn: dict, number: int) -> str:
    """Return the role of a turn under our name, or CALL. Raises InvalidRow."""
    speaker = turn.get("role")
    if speaker is None:
        speaker = turn.get("from")
    if speaker is None:
        raise missing_key("role", turn, number)
    role = None
    if isinstance(speaker, str):
        role = ROLES.get(speaker) or ROLES.get(speaker.lower())
    if role is None:
        raise InvalidRow("unknown role", f"message {number}: {speaker!r}"[:80])
    return role


def read_content(turn: dict, number: int) -> object:
    """Return what stands as the content of a turn; None where nothing does and it may hold calls instead."""
    content = first_present(turn, CONTENT_KEYS)
    if content is None and not any([key in turn for key in (*CONTENT_KEYS, *CALL_KEYS)]):
        raise missing_key("content", turn, number)
    return content


def missing_key(key: str, turn: dict, number: int) -> InvalidRow:
    has = ", ".join(map(str, turn)) or "nothing"
    return InvalidRow("missing field", f"{key} of message {number}, which has {has}")


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
    value = first_present(part, ("value", "text", part["type"]))
    if kind == "tool_call":
        return parse_json(value, "tool call that is not JSON")
    if kind == "reasoning" and part["type"] == "thinking" and isinstance(value, list):  # Mistral's
        value = "".join([clean_text(item.get("text"), "thinking") for item in require_objects(value, "thinking")])
    if not isinstance(value, str):
        raise InvalidRow("text that is not a string", f"{kind} part of a {role} message is {type(value).__name__}")
    return value


def refuse_media(row: dict, where: str) -> None:
    """Raise InvalidRow for pictures, sound or film beside the text, which no template here has a place for."""
    for key in MEDIA:
        if row.get(key):
            raise InvalidRow(f"row with {key}", f"{where}: {str(row[key])[:80]}: text alone is trained here")


# -- reasoning --------------------------------------------------------------------------------------------------------
def read_reasoning(turn: dict) -> str | None:
    """Return the reasoning beside a text, under whichever name it stands. Raises InvalidRow where two disagree."""
    texts = []
    for key in REASONING_KEYS:
        if isinstance(turn.get(key), list):  # axolotl's parts
            texts.append(read_blocks(turn[key], key, "text"))
        elif turn.get(key):
            texts.append(clean_text(turn[key], key))
    for key, field in REASONING_BLOCKS.items():
        if turn.get(key):
            texts.append(read_blocks(turn[key], key, field))
    if len(set(texts)) > 1:
        raise InvalidRow("reasoning under two names", f"{texts[0][:40]!r} and {texts[-1][:40]!r}")
    return texts[0] if texts else None


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

    Flags: loss_mask; weight (OpenAI, Mistral), loss (ms-swift, XTuner), train and training (axolotl), trainable
    (tinker), loss_weight (LLaMA-Factory), loss_scale (ms-swift); masked, which is the other way round (torchtune).
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
    if role == "assistant" or "loss_mask" in masks:
        return next(iter(masks.values()), None)
    if 1 in masks.values():
        flags = ", ".join(masks)
        raise InvalidRow("loss on a message that is not the assistant's", f"message {number} of the {role}: {flags}")
    return None


# -- tool calls and tools ---------------------------------------------------------------------------------------------
def add_calls(turns: list[dict], turn: dict, number: int) -> None:
    """Add a turn that is a call to the assistant's message before it, or as a message of its own."""
    refuse_media(turn, f"message {number}")
    calls = parse_calls(read_content(turn, number))
    message = {"role": "assistant", "content": ""}
    reasoning = read_reasoning(turn)
    if reasoning:
        message["reasoning_content"] = reasoning
    message["tool_calls"] = calls
    loss_mask = read_loss_mask(turn, "assistant", number)
    if loss_mask is not None:
        message["loss_mask"] = loss_mask
    if not turns or turns[-1]["role"] != "assistant":
        turns.append(message)
        return
    if reasoning and turns[-1].get("reasoning_content"):
        raise InvalidRow("reasoning under two names", f"message {number} and the text before it are one message")
    if reasoning:
        turns[-1]["reasoning_content"] = reasoning
    if turns[-1].get("loss_mask") != loss_mask:
        raise InvalidRow("loss flags that disagree", f"message {number} and the text before it are one message")
    turns[-1]["tool_calls"] = turns[-1].get("tool_calls", []) + calls


def read_tool_calls(turn: dict) -> list[dict]:
    """Return the calls of a turn: its tool_calls, or OpenAI's older function_call."""
    calls = turn.get("tool_calls") or turn.get("function_call")
    return parse_calls(calls) if calls else []


def parse_calls(calls: object) -> list[dict]:
    """Return a call, a list of calls, or the JSON text of either, as tool_calls. Raises InvalidRow."""
    calls = parse_json(calls, "tool call that is not JSON")
    if isinstance(calls, dict):
        calls = [calls]
    return [read_call(call) for call in require_objects(calls, "tool_calls")]


def read_call(call: dict) -> dict:
    """Return a call whose arguments may be empty text, or JSON text within JSON text. Raises InvalidRow."""
    call = parse_json(call, "tool call that is not JSON")
    function = call.get("function", call) if isinstance(call, dict) else None
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        arguments = function["arguments"]
        if not arguments.strip():
            arguments = {}
        else:
            arguments = parse_json(arguments, "tool arguments that are not JSON")
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
    if call.get("id") and not isinstance(call["id"], (str, int)):
        raise InvalidRow("tool call id that is not text", str(call["id"])[:80])
    if call.get("id"):
        return {"id": call["id"], **parsed}
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
