"""A question and its answer as messages, and the columns beside them that several sources share."""

from ..errors import InvalidRow
from ..json_text import check_numbers, dump_json
from ..parsing import clean_text, parse_json, parse_message, parse_turns

# columns of ours, by their own and other names, read where a source keeps the row's
KEPT = "tools functions available_tools enable_thinking chat_template_kwargs source lang tags"
SYSTEM_KEYS = ("system", "system_prompt", "system_message")
SYSTEM = " ".join(SYSTEM_KEYS)
THOUGHTS = "reasoning_content reasoning thinking"  # reasoning of the one answer of a row


def exchange(question: object, answer: object, system: str | None = None, reasoning: object = None) -> list[dict]:
    """Return the messages of one question, text or turns already, and its answer, which may be a number."""
    if isinstance(question, list):
        turns = parse_turns(question, "question")
    else:
        turns = [{"role": "user", "content": clean_text(question, "question")}]
    if isinstance(answer, list) and answer and isinstance(answer[0], str):
        raise InvalidRow("several answers", f"a list of {len(answer)} texts: keep one of them")
    answer = {"role": "assistant", "content": scalar_text(answer), "reasoning_content": reasoning}
    turns.append(parse_message(answer, len(turns)))
    return with_system(turns, system)


def with_system(turns: list[dict], system: str | None) -> list[dict]:
    """Return messages that begin with a system prompt, where there is one. Raises InvalidRow for two that differ."""
    if not system:
        return turns
    if turns and turns[0]["role"] == "system":
        if turns[0]["content"] != system:
            raise InvalidRow("two system prompts", "one in the row and another in its first message")
        return turns
    return [{"role": "system", "content": system}, *turns]


def read_system(row: dict) -> str | None:
    """Return the system prompt that stands in a column of its own."""
    for key in SYSTEM_KEYS:
        if row.get(key):
            return clean_text(row[key], key)
    return None


def read_history(row: dict) -> list[dict]:
    """Return the messages of [[question, answer], …] in the column history, which may be JSON text."""
    turns = []
    for question, answer in parse_json(row.get("history"), "history that is not JSON") or []:
        turns += exchange(question, answer)
    return turns


def scalar_text(value: object) -> object:
    """Return a number, true or false as the text that JSON writes for it; any other value as it is."""
    if not isinstance(value, (bool, int, float)):
        return value
    check_numbers(value)
    return dump_json(value).decode()


def plain_number(value: object) -> str:
    """Return "12" for "12.0" and 12.0; every other number keeps the digits of its source. Raises InvalidRow."""
    try:
        number = float(value)
        int(number)  # inf and nan are floats too
    except (TypeError, ValueError, OverflowError):
        raise InvalidRow("number that is not a number", repr(value)[:80]) from None
    if number.is_integer():
        return str(int(number))
    return str(value)
