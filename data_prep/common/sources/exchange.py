"""A question and its answer as messages, and the columns beside them that several sources share."""

from ..errors import InvalidRow
from ..json_text import check_numbers, dump_json
from ..parsing import (
    ANSWER_KEYS,
    REASONING_BLOCKS,
    REASONING_KEYS,
    ROLE_KEYS,
    STATES,
    TOOL_COLUMNS,
    TOOL_KEYS,
    clean_text,
    first_present,
    is_empty,
    parse_json,
    parse_message,
    parse_turns,
    read_one,
    unread_keys,
)

# columns of ours, by their own and other names, read where a source keeps the row's
LABEL_COLUMNS = ("domain", "difficulty")  # that become tags
KEPT = " ".join([*TOOL_COLUMNS, "enable_thinking only_last chat_template_kwargs source lang tags", *LABEL_COLUMNS])
SYSTEM_KEYS = ("system", "system_prompt", "system_message")
SYSTEM = " ".join(SYSTEM_KEYS)
THOUGHT_KEYS = (*REASONING_KEYS, *REASONING_BLOCKS)  # reasoning of the one answer of a row
THOUGHTS = " ".join(THOUGHT_KEYS)
QUESTION_KEYS = ("human", "user", "input", "question", "query", "prompt")  # of a pair
REPLY_KEYS = ("assistant", "output", "answer", "response")
PAIR_KEYS = frozenset([*QUESTION_KEYS, *REPLY_KEYS, *ANSWER_KEYS, *SYSTEM_KEYS, *TOOL_KEYS])  # read, or refused by name


def exchange(question: object, answer: object, system: str | None = None, beside: dict | None = None) -> list[dict]:
    """Return the messages of one question and its answer, each text or turns already; an answer may be a number.

    beside: other keys of the answer's message. Raises InvalidRow.
    """
    if isinstance(question, list):
        turns = parse_turns(question, "question")
    else:
        turns = [{"role": "user", "content": clean_text(question, "question")}]
    if isinstance(answer, list) and answer and isinstance(answer[0], str):
        raise InvalidRow("several answers", f"a list of {len(answer)} texts: keep one of them")
    if holds_speaker(answer):
        answer = [answer]
    if isinstance(answer, list) and answer and holds_speaker(answer[0]):
        if any([not is_empty(value) for value in (beside or {}).values()]):
            raise InvalidRow("keys beside an answer in turns", f"{', '.join(beside)}: put them into its message")
        turns += parse_turns(answer, "answer")
    else:
        turns.append(parse_message({**(beside or {}), "role": "assistant", "content": scalar_text(answer)}, len(turns)))
    return with_system(turns, system)


def holds_speaker(value: object) -> bool:
    return isinstance(value, dict) and not value.keys().isdisjoint(ROLE_KEYS)


def holds_exchange(pair: object) -> bool:
    """Return whether an object holds a question and its answer, and is no turn."""
    if not isinstance(pair, dict) or holds_speaker(pair):
        return False
    return not pair.keys().isdisjoint(QUESTION_KEYS) and not pair.keys().isdisjoint(REPLY_KEYS)


def pair_turns(pair: dict, number: int) -> list[dict]:
    """Return the messages of pair `number` of a conversation. Raises InvalidRow."""
    question = read_one(pair, QUESTION_KEYS, "question")
    answer = read_one(pair, REPLY_KEYS, "answer")
    if question is None or answer is None:
        raise InvalidRow("missing field", f"a question and an answer in pair {number}, which has {', '.join(pair)}")
    if number and first_present(pair, TOOL_KEYS):
        raise InvalidRow("tools in a later message", f"pair {number}: tools of a row stand in its first message")
    beside = {key: value for key, value in pair.items() if key in ANSWER_KEYS or key in STATES}
    return exchange(question, answer, beside=beside)


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
    """Return the system prompt that stands in a column of its own. Raises InvalidRow for two that differ."""
    system = read_one(row, SYSTEM_KEYS, "system prompt")
    if is_empty(system):
        return None
    return clean_text(system, "system prompt")


def read_history(row: dict) -> list[dict]:
    """Return the messages of [[question, answer], …] in the column history, of pairs by name or of turns.

    It may be JSON text. Raises InvalidRow.
    """
    history = row.get("history")
    if is_empty(history):
        return []
    history = parse_json(history, "history that is not JSON")
    if isinstance(history, list) and history and holds_speaker(history[0]):
        return parse_turns(history, "history")
    turns = []
    for number, pair in enumerate(history if isinstance(history, list) else [history]):
        if holds_exchange(pair):
            unread = unread_keys(pair, PAIR_KEYS - {*SYSTEM_KEYS, *TOOL_KEYS}, "history")
            if unread:
                raise InvalidRow("history of more than questions and answers", ", ".join(unread))
            turns += pair_turns(pair, number)
        elif isinstance(pair, list) and len(pair) == 2:
            turns += exchange(pair[0], pair[1])
        else:
            raise InvalidRow("field of another type", f"history must be a list of [question, answer]: {str(pair)[:60]}")
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
