"""Conversations: lists of turns in the shapes in which they are published."""

import re
from collections.abc import Callable, Iterable
from itertools import chain

from ..errors import InvalidRow
from ..parsing import (
    MESSAGE_KEYS,
    ROLE_KEYS,
    TOOL_KEYS,
    clean_text,
    first_present,
    parse_calls,
    parse_json,
    parse_message,
    parse_turns,
    require_objects,
)
from .exchange import SYSTEM_KEYS, exchange, read_system, with_system

TURN_COLUMNS = ("messages", "conversations", "conversation", "dialog", "interactions")
TURNS = "|".join(TURN_COLUMNS)


def read_turns(row: dict) -> object:
    """Return the list of turns of a row. Raises KeyError."""
    turns = first_present(row, TURN_COLUMNS)
    if turns is None:
        raise KeyError("messages")
    return turns


def messages(row: dict) -> dict:
    """Chats already: messages (or conversations) of role/content or from/value, an optional system text, tools (or
    functions) as a list, as JSON text or in the first message; content as a string or in parts (LLaMA-Factory's
    reason_tool_use_demo_50); function_call turns. Reasoning is read under its usual names (reasoning, thinking,
    tool_plan, thinking_blocks, reasoning_details). Messages flagged 0 or 1 by weight, loss, train and the like get a
    loss_mask, and the row train_turns: flagged; mistral-finetune's only_last gives train_turns: last."""
    turns = read_turns(row)
    found = {**row, "messages": with_system(parse_turns(turns), read_system(row))}
    if row.get("only_last") in (True, 1):
        found["chat_template_kwargs"] = {"train_turns": "last", **(row.get("chat_template_kwargs") or {})}
    if isinstance(turns, list) and turns and not found.get("tools"):
        found["tools"] = first_present(turns[0], TOOL_KEYS)
    return found


def sharegpt(row: dict) -> dict:
    """ShareGPT (FastChat, LLaMA-Factory): conversations of from/value with human, gpt, system, function_call (JSON) and
    observation turns, an optional `system` text and `tools`, JSON text. Neighbouring function_call turns, and the gpt
    turn before them, are one message."""
    require_objects(row["conversations"], "conversations")
    return messages({**row, "messages": row["conversations"]})


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
    turns = parse_turns(raw, "conversations")
    for turn in turns:
        if not turn.get("name", True):
            del turn["name"]
    return {**row, "messages": turns, "tools": first_present(raw[0], TOOL_KEYS)}


def blossom(row: dict) -> dict:
    """Azure99/blossom-v6.3-sft-stage1 and its like: id, type, metadata {source}, messages. An id is unique only
    together with the source, so both make ours."""
    source = row["metadata"]["source"]
    return {"messages": parse_turns(row["messages"]), "source": source, "id": f"{source}/{row['id']}"}


def smoltalk(row: dict) -> dict:
    """HuggingFaceTB/smoltalk and smol-smoltalk: messages, source."""
    return messages(row)


def smoltalk2(row: dict) -> dict:
    """HuggingFaceTB/smoltalk2: messages, source, chat_template_kwargs {custom_instructions, enable_thinking,
    python_tools, xml_tools}, which all stay: custom_instructions is the persona, and null would bring the template's
    own. <tool_call> blocks that end an answer become tool_calls. The think and no_think rows of a prompt share it;
    mix.py keeps them together by it."""
    turns = [split_calls(turn) for turn in require_objects(row["messages"], "messages")]
    return messages({**row, "messages": turns})


CALL = re.compile(r"\s*<tool_call>(.*?)</tool_call>", re.S)


def parse_call_text(text: str) -> object:
    return parse_json(text, "tool call that is not JSON")


def split_calls(turn: dict, parse_call: Callable[[str], object] = parse_call_text) -> dict:
    """Return a message whose text ends in <tool_call> blocks of JSON with tool_calls instead. Raises InvalidRow."""
    content = turn.get("content")
    if turn.get("role") != "assistant" or not isinstance(content, str) or "<tool_call>" not in content:
        return turn
    text, _, _ = content.partition("<tool_call>")
    blocks = content[len(text) :]
    behind = CALL.sub("", blocks).strip()
    if behind:
        raise InvalidRow("text behind a tool call", behind[:80])
    calls = [parse_calls(parse_call(block)) for block in CALL.findall(blocks)]
    return {**turn, "content": text, "tool_calls": list(chain.from_iterable(calls))}


THOUGHT = re.compile(
    r"\s*<\|begin_of_thought\|>(.*?)<\|end_of_thought\|>\s*<\|begin_of_solution\|>(.*?)<\|end_of_solution\|>\s*", re.S
)


def openthoughts(row: dict) -> dict:
    """open-thoughts/OpenThoughts-114k, Bespoke-Stratos-17k: system, conversations of from/value (user, assistant) whose
    answers hold <|begin_of_thought|> … <|begin_of_solution|> …; OpenThoughts2/3: <think> blocks. A system text that
    only explains these marks goes with them."""
    turns = []
    for number, turn in enumerate(require_objects(row["conversations"], "conversations")):
        match = THOUGHT.fullmatch(turn["value"])
        if match:
            turn = {**turn, "value": match[2], "reasoning_content": match[1]}
        turns.append(parse_message(turn, number))
    system = row.get("system")
    if system and "<|begin_of_thought|>" not in system:
        turns = with_system(turns, clean_text(system, "system"))
    return {**row, "messages": turns}


# -- turns that are no objects of a role ------------------------------------------------------------------------------
PAIR_KEYS = (  # (question, answer) as a pair of turns names them
    ("human", "assistant"),
    ("user", "assistant"),
    ("input", "output"),
    ("question", "answer"),
    ("query", "response"),
    ("prompt", "response"),
)


def find_pair_keys(turn: object) -> tuple[str, str] | None:
    """Return the names under which a pair holds its question and its answer."""
    if not isinstance(turn, dict):
        return None
    for keys in PAIR_KEYS:
        if turn.keys() >= set(keys):
            return keys
    return None


def conversation_pairs(row: dict) -> dict:
    """Conversations of pairs [{"human": …, "assistant": …}] (Firefly, ms-swift), {"input", "output"} with an optional
    system in the first and output_with_loss (XTuner), user/assistant, question/answer, query/response or
    prompt/response."""
    turns = []
    not_kept = []
    system = read_system(row)
    for number, pair in enumerate(require_objects(read_turns(row), "conversation")):
        keys = find_pair_keys(pair)
        if keys is None:
            raise InvalidRow("missing field", f"a question and an answer in pair {number}, which has {', '.join(pair)}")
        if number == 0:
            system = system or read_system(pair)
        turns += exchange(pair[keys[0]], pair[keys[1]])
        if pair.get("output_with_loss") is not None:
            if pair["output_with_loss"] not in (0, 1):
                raise InvalidRow(
                    "output_with_loss that is not 0 or 1", f"pair {number}: {pair['output_with_loss']!r}"[:80]
                )
            turns[-1]["loss_mask"] = int(pair["output_with_loss"])
        not_kept += [f"pairs.{key}" for key in pair if key not in (*keys, *SYSTEM_KEYS, "output_with_loss")]
    return {**row, "messages": with_system(turns, system), "not_kept": not_kept}


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


def message_tree(row: dict) -> dict:
    """Open-Assistant's trees: a prompt (or the row itself) with text, role (prompter, assistant), rank and replies. At
    each level the best-ranked reply is taken, the first where none is ranked, and none that is deleted or that
    reviewers took for spam; a last question that nobody answered goes. Replies that are not taken are counted as not
    kept."""
    node = row["prompt"] if isinstance(row.get("prompt"), dict) else row
    lang = node.get("lang")
    turns = []
    not_kept = []
    while node:
        turns.append(parse_message({"role": node["role"], "content": node["text"]}, len(turns)))
        replies = node.get("replies") or []
        sound = [reply for reply in replies if not reply.get("deleted") and reply.get("review_result") is not False]
        node = min(sound, key=rank_of, default=None)
        not_kept += ["replies that are not the best"] * (len(replies) - bool(node))
    if turns[-1]["role"] == "user":
        turns.pop()
    return {"messages": turns, "lang": lang, "id": row.get("message_tree_id"), "not_kept": not_kept}


def rank_of(reply: dict) -> float:
    rank = reply.get("rank")
    return float("inf") if rank is None else rank


# -- by what a row is known -------------------------------------------------------------------------------------------
def first_turn(row: dict) -> object:
    turns = first_present(row, TURN_COLUMNS)
    if isinstance(turns, list) and turns:
        return turns[0]
    return turns


def holds_pairs(row: dict) -> bool:
    return find_pair_keys(first_turn(row)) is not None


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


def unread_message_keys(turns: object, mapped: Iterable[str] = ()) -> list[str]:
    """Return "messages.KEY" for each key of turns that holds something and is neither read nor refused.

    mapped: the names that are read there as well; without any, lists of other objects than turns have none.
    """
    unread = []
    if not isinstance(turns, list):
        return unread
    for turn in turns:
        if not isinstance(turn, dict) or turn.keys() <= MESSAGE_KEYS:
            continue
        if not mapped and turn.keys().isdisjoint(ROLE_KEYS):
            continue
        if "replies" in turn:  # of a tree
            continue
        for key, value in turn.items():
            if key not in MESSAGE_KEYS and key not in mapped and value not in (None, "", [], {}):
                unread.append(f"messages.{key}")
    return unread
