"""Preference rows, of which the preferred answer is kept."""

import re

from ..errors import InvalidRow
from ..parsing import (
    TOOL_COLUMNS,
    clean_text,
    is_empty,
    parse_message,
    parse_turns,
    read_one,
    read_tools,
    require_objects,
    unread_keys,
)
from .exchange import SYSTEM_KEYS, read_history, read_system, with_system

CHOSEN = ("chosen", "chosen_messages", "chosen_response", "preferred_output", "response_j")
PROMPTS = ("prompt", "question", "query", "instruction", "conversations", "messages")
HH_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def preference(row: dict) -> dict:
    """Preference rows (TRL, LLaMA-Factory, ms-swift, NeMo, hh-rlhf): the prompt (prompt, question, query, instruction
    with input, conversations or messages; text or turns), answered by chosen, which may be text, a turn, turns, or the
    whole conversation; hh-rlhf's is one text of `Human:` and `Assistant:`. OpenAI: input {messages, tools} and
    preferred_output. The rejected answer is left out. What a second name of the prompt says must stand in the
    conversation."""
    not_kept = []
    if isinstance(row.get("input"), dict):
        not_kept = unread_keys(row["input"], ("messages", *TOOL_COLUMNS, *SYSTEM_KEYS), "input")
        row = unwrap_input(row)
    chosen = read_one(row, CHOSEN, "chosen", required=True)
    prompts = read_prompts(row)
    history = read_history(row)
    if isinstance(chosen, str) and not prompts:
        turns = split_dialogue(chosen)
    else:
        turns = parse_turns(chosen if isinstance(chosen, list) else [as_turn(chosen)], "chosen")
    is_whole = turns and turns[0]["role"] != "assistant"
    if not is_whole:
        if not prompts:
            raise KeyError("prompt")
        turns = [*history, *max(prompts.values(), key=len), *turns]
    for name, asked in {**prompts, "history": history}.items():
        if not all([turn in turns for turn in asked]):
            raise InvalidRow("prompt under two names", f"{name} says what does not stand in the conversation")
    first = next((row[name][0] for name in PROMPTS if isinstance(row.get(name), list) and row[name]), None)
    found = {**row, "messages": with_system(turns, read_system(row)), "not_kept": not_kept}
    found["tools"] = read_tools(row, first)
    return found


def as_turn(answer: object) -> object:
    """Return the turn of an answer that is text, any other as it is."""
    if isinstance(answer, str):
        return {"role": "assistant", "content": answer}
    return answer


def unwrap_input(row: dict) -> dict:
    """Return a row of OpenAI's with the keys of its input as columns. Raises InvalidRow for two that differ."""
    unwrapped = {name: value for name, value in row.items() if name != "input"}
    for key, value in row["input"].items():
        unwrapped[key] = read_one({key: row.get(key), f"input.{key}": value}, (key, f"input.{key}"), key)
    return unwrapped


def read_prompts(row: dict) -> dict[str, list[dict]]:
    """Return {column: messages} of the columns of a row that hold its prompt, as text or as turns."""
    prompts = {}
    for name in PROMPTS:
        prompt = row.get(name)
        if is_empty(prompt):
            continue
        if isinstance(prompt, list):
            prompts[name] = parse_turns(prompt, name)
        else:
            prompts[name] = [{"role": "user", "content": clean_text(prompt, name)}]
    if not is_empty(row.get("input")):
        about = clean_text(row["input"], "input")
        if "instruction" in prompts:  # Alpaca's
            about = f"{prompts.pop('instruction')[0]['content']}\n{about}"
        prompts["input"] = [{"role": "user", "content": about}]
    return prompts


def split_dialogue(text: str) -> list[dict]:
    """Return the messages of one text in hh-rlhf's form. Raises InvalidRow for another."""
    before, *pieces = HH_TURN.split(text)
    if before.strip() or not pieces:
        raise InvalidRow("missing field", "prompt, and chosen is no text of Human: and Assistant: turns")
    turns = []
    for speaker, content in zip(pieces[::2], pieces[1::2], strict=True):
        turns.append(parse_message({"role": HH_SPEAKERS[speaker], "content": content}, len(turns)))
    return turns


EMOJI_CHARS = 3000


def emoji_preference(row: dict) -> dict:
    """Preference rows as shareAI/DPO-zh-en-emoji and LLaMA-Factory's dpo_zh_demo: the prompt (prompt, question or
    conversations), answered by the first assistant turn of chosen, else answer_zh, else answer_en. As in the tutorial
    each text is cut at 3,000 characters; such a row has the tag `cut`, since its answer ends too early."""
    prompt = read_one(row, ("prompt", "question", "conversations"), "prompt", required=True)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    turns = parse_turns(require_objects(prompt, "prompt"), "prompt")
    answers = []
    for turn in read_chosen(row.get("chosen")):
        if turn["role"] == "assistant":
            answers.append(turn["content"])
        elif turn not in turns:
            raise InvalidRow("prompt under two names", "chosen says what does not stand in the prompt")
    answers += [row.get("answer_zh"), row.get("answer_en")]
    answers = [answer for answer in answers if answer]
    turns.append(parse_message({"role": "assistant", "content": answers[0] if answers else ""}))
    is_cut = False
    for turn in turns:
        is_cut = is_cut or len(turn["content"]) > EMOJI_CHARS
        turn["content"] = turn["content"][:EMOJI_CHARS].strip()
    not_kept = ["answers behind the first"] * (len(answers) - 1)
    return {"messages": turns, "tags": ["cut"] if is_cut else [], "id": row.get("id"), "not_kept": not_kept}


def read_chosen(chosen: object) -> list[dict]:
    """Return the messages of a chosen answer: text, a turn, or a list of either."""
    turns = []
    for turn in chosen if isinstance(chosen, list) else [chosen]:
        if turn:
            turns.append(as_turn(turn))
    return parse_turns(turns, "chosen")
