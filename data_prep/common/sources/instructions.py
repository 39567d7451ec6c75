"""One question and one answer a row, in columns of their own."""

import re

from ..errors import InvalidRow
from ..parsing import clean_text, parse_message, parse_turns, read_reasoning, require_objects
from .chats import messages
from .exchange import exchange, read_history, read_system, with_system


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
    turns = [*read_history(row), *exchange(question, answer, reasoning=read_reasoning(row))]
    return {**row, "messages": with_system(turns, read_system(row))}


def query_response(row: dict) -> dict:
    """ms-swift: query, response, optional system and history [[question, answer], …]; OpenOrca: system_prompt,
    question, response."""
    return answered(row, row["query"] if "query" in row else row["question"], row["response"])


def prompt_completion(row: dict) -> dict:
    """TRL's prompt-completion rows: prompt and completion, both text or both messages; a completion may be a number."""
    prompt = row["prompt"]
    completion = row["completion"]
    if isinstance(prompt, str) and not isinstance(completion, (list, dict)):
        return answered(row, prompt, completion)
    turns = [*require_objects(prompt, "prompt"), *require_objects(completion, "completion")]
    return {**row, "messages": with_system(parse_turns(turns), read_system(row))}


def nemotron(row: dict) -> dict:
    """nvidia/Llama-Nemotron-Post-Training-Dataset: input (messages or text), output, reasoning (on or off), generator,
    category, system_prompt. Answers of DeepSeek-R1 only. `reasoning` becomes enable_thinking, and so does the system
    prompt "detailed thinking on" or off, which is that model's switch and no persona."""
    if row["generator"] != "DeepSeek-R1":
        raise InvalidRow("answer not of DeepSeek-R1", str(row["generator"])[:80])
    question = row["input"]
    if not isinstance(question, list):
        question = [{"role": "user", "content": question}]
    turns = parse_turns(question, "input")
    if row.get("system_prompt") and not (turns and turns[0]["role"] == "system"):
        turns.insert(0, {"role": "system", "content": clean_text(row["system_prompt"], "system_prompt")})
    if turns and turns[0]["role"] == "system" and re.fullmatch(r"detailed thinking (on|off)", turns[0]["content"]):
        del turns[0]
    answer = parse_message({"role": "assistant", "content": row["output"]})
    thinks = row["reasoning"] == "on"
    if thinks and "reasoning_content" not in answer:
        raise InvalidRow("no reasoning where the row says on")
    tags = [row["category"]] if row.get("category") else []
    return {
        "messages": [*turns, answer],
        "chat_template_kwargs": {"enable_thinking": thinks},
        "tags": tags,
        "id": row.get("id"),
    }


def s1k(row: dict) -> dict:
    """simplescaling/s1K-1.1: question, deepseek_thinking_trajectory and deepseek_attempt, and the same of gemini; s1K:
    question, thinking_trajectories (a list), attempt. DeepSeek's answer comes before Gemini's."""
    for model in ("deepseek_", "gemini_", ""):
        if row.get(f"{model}attempt"):
            thought = row[f"{model}thinking_trajectory" if model else "thinking_trajectories"]
            if isinstance(thought, list) and thought:
                thought = thought[0]
            return {"messages": exchange(row["question"], row[f"{model}attempt"], reasoning=thought)}
    raise KeyError("deepseek_attempt")


PLACEHOLDER = re.compile(r"\{\{\s*(\w+)\s*\}\}")


def identity(row: dict, *, fill: dict[str, str] | None = None) -> dict:
    """Who the model is: messages (nanochat's identity_conversations.jsonl, a list a line) or Alpaca's columns
    (LLaMA-Factory's identity.json), with {{name}} and {{author}} to be filled in: --fill name=Ada author="our lab"."""
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
