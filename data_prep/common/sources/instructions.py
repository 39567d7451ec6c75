"""One question and one answer a row, in columns of their own."""

import re

from ..errors import InvalidRow
from ..parsing import clean_text, is_empty, read_one, read_tools
from .chats import messages
from .exchange import THOUGHT_KEYS, exchange, read_history, read_system, with_system


def alpaca(row: dict) -> dict:
    """Alpaca (tatsu-lab/alpaca, LLaMA-Factory): instruction, input (may be empty; stands on a line of its own behind
    the instruction), output, optional system and history [[question, answer], …]."""
    return instruct(row, "input", row["output"])


def dolly(row: dict) -> dict:
    """databricks/databricks-dolly-15k: instruction, context (may be missing; stands as Alpaca's input does), response;
    optional system and history."""
    return instruct(row, "context", row["response"])


def instruct(row: dict, input_key: str, answer: object) -> dict:
    """Return a row whose question is an instruction and what it is about."""
    question = clean_text(row["instruction"], "instruction")
    if row.get(input_key):
        question = f"{question}\n{clean_text(row[input_key], input_key)}".strip()
    return answered(row, question, answer)


def answered(row: dict, question: object, answer: object) -> dict:
    """Return a row of one question and answer, behind its history and system prompt."""
    thoughts = {key: row[key] for key in THOUGHT_KEYS if key in row}
    turns = [*read_history(row), *exchange(question, answer, beside=thoughts)]
    tools = read_tools(row, question[0] if isinstance(question, list) and question else None)
    return {**row, "messages": with_system(turns, read_system(row)), "tools": tools}


def query_response(row: dict) -> dict:
    """ms-swift: query, response, optional system and history [[question, answer], …]; OpenOrca: system_prompt,
    question, response."""
    return answered(row, read_one(row, ("query", "question"), "question", required=True), row["response"])


def prompt_completion(row: dict) -> dict:
    """TRL's prompt-completion rows: prompt and completion, each text or messages; a completion may be a number."""
    return answered(row, row["prompt"], row["completion"])


SWITCH = re.compile(r"detailed thinking (on|off)")


def nemotron(row: dict) -> dict:
    """nvidia/Llama-Nemotron-Post-Training-Dataset: input (messages or text), output, reasoning (on or off), generator,
    category, system_prompt. Answers of DeepSeek-R1 only. `reasoning` becomes enable_thinking, and so does the system
    prompt "detailed thinking on" or off, which is that model's switch and no persona."""
    if row["generator"] != "DeepSeek-R1":
        raise InvalidRow("answer not of DeepSeek-R1", str(row["generator"])[:80])
    turns = exchange(row["input"], row["output"])
    systems = {"system_prompt": read_system(row)}
    if turns[0]["role"] == "system":
        systems["input"] = turns.pop(0)["content"]
    switches = {"reasoning": row["reasoning"]}
    for name, text in systems.items():
        match = SWITCH.fullmatch(text or "")
        if match:
            switches[name] = match[1]
        else:
            turns = with_system(turns, text)
    thinking = read_one(switches, tuple(switches), "reasoning")
    if thinking not in ("on", "off"):
        raise InvalidRow("reasoning that is not on or off", str(thinking)[:80])
    if thinking == "on" and "reasoning_content" not in turns[-1]:
        raise InvalidRow("no reasoning where the row says on")
    tags = [row["category"]] if row.get("category") else []
    return {
        "messages": turns,
        "chat_template_kwargs": {"enable_thinking": thinking == "on"},
        "tags": tags,
        "id": row.get("id"),
    }


S1K = {  # answer: its reasoning, in the order of preference
    "deepseek_attempt": "deepseek_thinking_trajectory",
    "gemini_attempt": "gemini_thinking_trajectory",
    "attempt": "thinking_trajectories",
}


def s1k(row: dict) -> dict:
    """simplescaling/s1K-1.1: question, deepseek_thinking_trajectory and deepseek_attempt, and the same of gemini; s1K:
    question, thinking_trajectories (a list), attempt. DeepSeek's answer comes before Gemini's."""
    answers = [name for name in S1K if not is_empty(row.get(name))]
    if not answers:
        raise KeyError("deepseek_attempt")
    answer = answers[0]
    thought = row[S1K[answer]]
    not_kept = [name for pair in S1K.items() for name in pair if answer not in pair and not is_empty(row.get(name))]
    if isinstance(thought, list) and thought:
        not_kept += ["thinking_trajectories behind the first"] * (len(thought) - 1)
        thought = thought[0]
    turns = exchange(row["question"], row[answer], beside={"reasoning_content": thought})
    return {"messages": turns, "not_kept": not_kept}


PLACEHOLDER = re.compile(r"\{\{\s*(\w+)\s*\}\}")


def identity(row: dict, *, fill: dict[str, str] | None = None) -> dict:
    """Who the model is: messages (nanochat's identity_conversations.jsonl, a list a line) or Alpaca's columns
    (LLaMA-Factory's identity.json), with {{name}} and {{author}} to be filled in: --fill name=Ada author="our lab"."""
    if "instruction" in row and not is_empty(row.get("messages")):
        raise InvalidRow("messages under two names", "messages and instruction")
    found = alpaca(row) if "instruction" in row else messages(row)
    values = fill or {}

    def fill_in(match: re.Match) -> str:
        if match[1] not in values:
            raise InvalidRow("placeholder not filled in", f"{match[0]}: pass --fill {match[1]}=…")
        return values[match[1]]

    for turn in found["messages"]:
        turn["content"] = PLACEHOLDER.sub(fill_in, turn["content"])
    return found


def holds_placeholder(row: dict) -> bool:
    return PLACEHOLDER.search(str(row.get("output"))) is not None
