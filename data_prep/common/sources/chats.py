"""Conversations: lists of turns in the shapes in which they are published."""

import re
from collections.abc import Callable

from ..errors import InvalidRow
from ..parsing import (
    ANSWER_KEYS,
    CALL_KEYS,
    STATES,
    called_functions,
    first_present,
    is_deleted,
    is_empty,
    parse_calls,
    parse_json,
    parse_list,
    parse_message,
    parse_turns,
    read_flag,
    read_one,
    read_tools,
    replace_content,
    require_objects,
    unread_call_keys,
    unread_keys,
)
from .exchange import PAIR_KEYS, exchange, holds_exchange, pair_turns, plain_number, read_system, with_system

TURN_COLUMNS = ("messages", "conversations", "conversation", "dialog", "interactions")
TURNS = "|".join(TURN_COLUMNS)


def read_turns(row: dict) -> object:
    """Return the list of turns of a row. Raises KeyError, and InvalidRow for two lists that differ."""
    names = [name for name in TURN_COLUMNS if name in row]
    if len(names) != 1:
        names = [name for name in names if holds_list(row[name])] or TURN_COLUMNS
    return parse_list(read_one(row, names, "messages", parse_turns, required=True), "messages")


def holds_list(value: object) -> bool:
    """Return whether a value is a list, or the text of one."""
    return isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("["))


def with_turns(row: dict, turns: list[dict]) -> dict:
    """Return a row with these turns in the place of its own."""
    kept = {name: value for name, value in row.items() if name not in TURN_COLUMNS}
    return {**kept, "messages": turns}


def messages(row: dict) -> dict:
    """Chats already: messages (or conversations) of role/content or from/value, an optional system text, tools (or
    functions) as a list, as JSON text or in the first message; content as a string or in parts (LLaMA-Factory's
    reason_tool_use_demo_50); function_call turns. Reasoning is read under its usual names (reasoning, thinking,
    tool_plan, thinking_blocks, reasoning_details). Messages flagged 0 or 1 by weight, loss, train and the like get a
    loss_mask, and the row train_turns: flagged; mistral-finetune's only_last gives train_turns: last."""
    turns = read_turns(row)
    found = {**row, "messages": with_system(parse_turns(turns), read_system(row))}
    found["tools"] = read_tools(row, turns[0] if turns else None)
    return found


def sharegpt(row: dict) -> dict:
    """ShareGPT (FastChat, LLaMA-Factory): conversations of from/value with human, gpt, system, function_call (JSON) and
    observation turns, an optional `system` text and `tools`, JSON text. Neighbouring function_call turns, and the gpt
    turn before them, are one message."""
    require_objects(row["conversations"], "conversations")
    return messages(row)


def step35(row: dict) -> dict:
    """stepfun-ai/Step-3.5-Flash-SFT: JSON arrays of {"conversations": [{role, content, loss_mask, name, meta,
    reasoning_content?, tool_calls?}]}, tools in the first message as tools or tool_schemas; content may come in parts.
    meta is left out. StepTron refuses: a last message that is not the assistant's, an assistant with neither content
    nor tool_calls, a row without a user turn (stepchat_dataset.py)."""
    raw = require_objects(row["conversations"], "conversations")
    if not raw or raw[-1]["role"] != "assistant":
        raise InvalidRow("last message is not the assistant's")
    for number, turn in enumerate(raw):
        if turn["role"] == "assistant" and not turn.get("content") and not turn.get("tool_calls"):
            raise InvalidRow("assistant with neither content nor tool_calls", f"message {number}")
    if not any([turn["role"] == "user" for turn in raw]):
        raise InvalidRow("no user turn")
    return messages(row)


def blossom(row: dict) -> dict:
    """Azure99/blossom-v6.3-sft-stage1 and its like: id, type, metadata {source}, messages. An id is unique only
    together with the source, so both make ours."""
    source = row["metadata"]["source"]
    not_kept = unread_keys(row["metadata"], ("source",), "metadata")
    return messages(row) | {"source": source, "id": f"{source}/{row['id']}", "not_kept": not_kept}


def smoltalk(row: dict) -> dict:
    """HuggingFaceTB/smoltalk and smol-smoltalk: messages, source."""
    return messages(row)


def smoltalk2(row: dict) -> dict:
    """HuggingFaceTB/smoltalk2: messages, source, chat_template_kwargs {custom_instructions, enable_thinking,
    python_tools, xml_tools}, which all stay: custom_instructions is the persona, and null would bring the template's
    own. <tool_call> blocks that end an answer become tool_calls. The think and no_think rows of a prompt share it;
    mix.py keeps them together by it."""
    not_kept = []
    turns = [split_calls(turn, not_kept) for turn in require_objects(row["messages"], "messages")]
    return messages(with_turns(row, turns)) | {"not_kept": not_kept}


CALL = re.compile(r"\s*<tool_call>(.*?)</tool_call>", re.S)


def parse_call_text(text: str) -> object:
    return parse_json(text, "tool call that is not JSON")


def split_calls(turn: dict, not_kept: list[str], parse_call: Callable[[str], object] = parse_call_text) -> dict:
    """Return a message whose text ends in <tool_call> blocks of JSON with tool_calls instead. Raises InvalidRow.

    not_kept: what of the calls has no place is added there.
    """
    content = turn.get("content")
    if turn.get("role") != "assistant" or not isinstance(content, str) or "<tool_call>" not in content:
        return turn
    text, _, _ = content.partition("<tool_call>")
    blocks = content[len(text) :]
    behind = CALL.sub("", blocks).strip()
    if behind:
        raise InvalidRow("text behind a tool call", behind[:80])
    calls = []
    for block in CALL.findall(blocks):
        call = parse_call(block)
        calls += parse_calls(call)
        not_kept += unread_call_keys(call)
    read_one({**turn, "content": calls}, ("content", *CALL_KEYS), "tool_calls", called_functions)
    return {**replace_content(turn, text), "tool_calls": calls}


THOUGHT = re.compile(
    r"\s*<\|begin_of_thought\|>(.*?)<\|end_of_thought\|>\s*<\|begin_of_solution\|>(.*?)<\|end_of_solution\|>\s*", re.S
)


def openthoughts(row: dict) -> dict:
    """open-thoughts/OpenThoughts-114k, Bespoke-Stratos-17k: system, conversations of from/value (user, assistant) whose
    answers hold <|begin_of_thought|> … <|begin_of_solution|> …; OpenThoughts2/3: <think> blocks. A system text that
    only explains these marks goes with them."""
    turns = []
    for turn in require_objects(row["conversations"], "conversations"):
        match = THOUGHT.fullmatch(turn["value"])
        if match:
            thought = read_one({**turn, "value": match[1]}, ("value", "reasoning_content"), "reasoning")
            turn = {**replace_content(turn, match[2]), "reasoning_content": thought}
        turns.append(turn)
    row = with_turns(row, turns)
    if "<|begin_of_thought|>" in (row.get("system") or ""):
        del row["system"]
        return messages(row) | {"not_kept": ["system text on the marks of thoughts"]}
    return messages(row)


# -- turns that are no objects of a role ------------------------------------------------------------------------------
def conversation_pairs(row: dict) -> dict:
    """Conversations of pairs [{"human": …, "assistant": …}] (Firefly, ms-swift), {"input", "output"} with an optional
    system in the first and output_with_loss (XTuner), user/assistant, question/answer, query/response or
    prompt/response. What else a pair says of its answer (reasoning, weight, loss, …) is read as in a message."""
    turns = []
    not_kept = []
    system = read_system(row)
    pairs = require_objects(read_turns(row), "conversation")
    for number, pair in enumerate(pairs):
        turns += pair_turns(pair, number)
        pair_system = read_system(pair)
        if number == 0 and system is None:
            system = pair_system
        elif pair_system not in (None, system):
            raise InvalidRow("two system prompts", f"pair {number} has another one than the row or its first pair")
        not_kept += unread_keys(pair, PAIR_KEYS, "pairs")
    tools = read_tools(row, pairs[0] if pairs else None)
    return {**row, "messages": with_system(turns, system), "tools": tools, "not_kept": not_kept}


def turn_lists(row: dict) -> dict:
    """Conversations in two lists of strings, input (the user's) and output (the assistant's): Chinese-Vicuna."""
    if not isinstance(row["input"], list) or not isinstance(row["output"], list):
        raise InvalidRow("field of another type", "input and output must be lists of strings")
    turns = []
    for question, answer in zip(row["input"], row["output"], strict=True):
        turns += exchange(question, answer)
    return {**row, "messages": with_system(turns, read_system(row))}


def list_of_strings(row: dict) -> dict:
    """Conversations that are lists of strings (LIMA): the user's, the assistant's, the user's and so on."""
    turns = []
    for number, text in enumerate(read_turns(row)):
        role = "assistant" if number % 2 else "user"
        turns.append(parse_message({"role": role, "content": text}, number))
    return {**row, "messages": with_system(turns, read_system(row))}


# -- trees ------------------------------------------------------------------------------------------------------------
NODE_KEYS = ("text", "role", "lang", "replies", "rank", "review_result", *ANSWER_KEYS)
FLAT = "rows are single messages, joined by parent_id: pass the trees of that set instead (NAME.trees.jsonl.gz)"


def message_tree(row: dict) -> dict:
    """Open-Assistant's trees: a prompt (or the row itself) with text, role (prompter, assistant), rank and replies. At
    each level the best-ranked reply is taken, the first where none is ranked, and none that is deleted or that
    reviewers took for spam; a last question that nobody answered goes. Replies that are not taken are counted as not
    kept. Its flat files (message_id, parent_id) are refused: a conversation's rows lie anywhere in them."""
    node = row
    if isinstance(row.get("prompt"), dict):
        node = row["prompt"]
        beside = [name for name in ("text", "replies") if not is_empty(row.get(name))]
        if beside:
            raise InvalidRow("prompt under two names", f"{beside[0]} stands beside it")
    elif row.get("replies") is None and "message_id" in row:
        raise InvalidRow("message without its tree", FLAT)
    lang = node.get("lang")
    turns = []
    not_kept = []
    while node:
        if is_removed(node):
            raise InvalidRow("deleted message, or one taken for spam", "the first of the tree")
        more = {key: value for key, value in node.items() if key in ANSWER_KEYS or key in STATES}
        turns.append(parse_message({**more, "role": node["role"], "content": node["text"]}, len(turns)))
        if node is not row:
            not_kept += unread_keys(node, NODE_KEYS, "replies")
        replies = require_objects(node.get("replies") or [], "replies")
        sound = [reply for reply in replies if not is_removed(reply)]
        node = min(sound, key=rank_of, default=None)
        not_kept += ["replies that are not the best"] * (len(replies) - bool(node))
    if turns[-1]["role"] == "user":
        turns.pop()
        not_kept.append("a last question without an answer")
    return {"messages": turns, "lang": lang, "id": row.get("message_tree_id"), "not_kept": not_kept}


def is_removed(node: dict) -> bool:
    """Return whether a message was deleted or taken for spam by its reviewers."""
    return is_deleted(node) or read_flag(node.get("review_result")) == 0


def rank_of(reply: dict) -> float:
    """Return the rank of a reply, behind all others where it has none. Raises InvalidRow."""
    if is_empty(reply.get("rank")):
        return float("inf")
    return float(plain_number(reply["rank"]))


# -- by what a row is known -------------------------------------------------------------------------------------------
def first_turn(row: dict) -> object:
    turns = first_present(row, TURN_COLUMNS)
    if isinstance(turns, list) and turns:
        return turns[0]
    return turns


def holds_pairs(row: dict) -> bool:
    return holds_exchange(first_turn(row))


def holds_strings(row: dict) -> bool:
    return isinstance(first_present(row, TURN_COLUMNS), list) and isinstance(first_turn(row), str)


def holds_lists(row: dict) -> bool:
    return all([isinstance(row[name], list) and isinstance(row[name][0], str) for name in ("input", "output")])


def holds_turns(row: dict) -> bool:
    """Return whether the turns are objects with a speaker, or JSON text."""
    turn = first_turn(row)
    if isinstance(turn, dict):
        return not {"role", "from"}.isdisjoint(turn)
    return isinstance(first_present(row, TURN_COLUMNS), str)


def holds_speakers(row: dict) -> bool:
    turn = first_turn(row)
    return isinstance(turn, dict) and "from" in turn


def holds_tree(row: dict) -> bool:
    node = row["prompt"] if isinstance(row.get("prompt"), dict) else row
    return "text" in node and "role" in node and isinstance(node.get("replies"), list)


def holds_loss_masks(row: dict) -> bool:
    turn = first_turn(row)
    return isinstance(turn, dict) and {"loss_mask", "meta", "role"} <= turn.keys()


def holds_thoughts(row: dict) -> bool:
    return any("<|begin_of_thought|>" in str(turn) for turn in row["conversations"])


def holds_persona(row: dict) -> bool:
    kwargs = row["chat_template_kwargs"]
    return isinstance(kwargs, dict) and "custom_instructions" in kwargs


def holds_metadata(row: dict) -> bool:
    return isinstance(row["metadata"], dict) and "source" in row["metadata"]
