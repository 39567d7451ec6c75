"""Preference rows, of which the preferred answer is kept."""

import re

from ..errors import InvalidRow
from ..parsing import clean_text, first_present, parse_message, parse_turns, require_objects
from .exchange import read_history, read_system, with_system

CHOSEN = ("chosen", "chosen_messages", "chosen_response", "preferred_output", "response_j")
PROMPTS = ("prompt", "question", "query", "instruction", "conversations", "messages")
HH_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def preference(row: dict) -> dict:
    """Preference rows (TRL, LLaMA-Factory, ms-swift, NeMo, hh-rlhf): the prompt (prompt, question, query, instruction,
    conversations or messages; text or turns), answered by chosen, which may be text, a turn, turns, or the whole
    conversation; hh-rlhf's is one text of `Human:` and `Assistant:`. OpenAI: input {messages, tools} and
    preferred_output. The rejected answer is left out."""
    if isinstance(row.get("input"), dict):
        row = {**row, **row["input"]}
    chosen = first_present(row, CHOSEN)
    if chosen is None:
        raise KeyError("chosen")
    prompt = first_present(row, PROMPTS)
    if isinstance(chosen, str) and prompt is None:
        return {**row, "messages": with_system(split_dialogue(chosen), read_system(row))}
    if isinstance(chosen, str):
        chosen = {"role": "assistant", "content": chosen}
    if isinstance(chosen, dict):
        chosen = [chosen]
    answers = parse_turns(chosen, "chosen")
    if answers and answers[0]["role"] != "assistant":
        turns = answers  # the whole conversation
    elif isinstance(prompt, list):
        turns = [*parse_turns(prompt, "prompt"), *answers]
    elif prompt is None:
        raise KeyError("prompt")
    else:
        turns = [*read_history(row), {"role": "user", "content": clean_text(prompt, "prompt")}, *answers]
    return {**row, "messages": with_system(turns, read_system(row))}


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
    prompt = row.get("prompt") or row.get("question") or row["conversations"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    turns = parse_turns(require_objects(prompt, "prompt"), "prompt")
    turns.append(parse_message({"role": "assistant", "content": choose_emoji_answer(row)}))
    is_cut = False
    for turn in turns:
        is_cut = is_cut or len(turn["content"]) > EMOJI_CHARS
        turn["content"] = turn["content"][:EMOJI_CHARS].strip()
    return {"messages": turns, "tags": ["cut"] if is_cut else [], "id": row.get("id")}


def choose_emoji_answer(row: dict) -> str:
    """Return the first answer of a row that has text; "" where none has."""
    chosen = row.get("chosen")
    if not isinstance(chosen, list):
        chosen = [chosen]
    turns = []
    for turn in chosen:
        if isinstance(turn, str):
            turn = {"role": "assistant", "content": turn}
        if turn:
            turns.append(turn)
    answers = [turn["content"] for turn in parse_turns(turns, "chosen") if turn["role"] == "assistant"]
    answers += [row.get("answer_zh"), row.get("answer_en")]
    for answer in answers:
        if answer:
            return answer
    return ""
