"""Sums and multiple choice."""

import operator
import re
from fractions import Fraction

from ..errors import InvalidRow
from ..parsing import clean_text, is_empty, read_one
from .exchange import exchange, plain_number


# -- sums -------------------------------------------------------------------------------------------------------------
def gsm8k(row: dict) -> dict:
    """openai/gsm8k: question, answer (working with <<a*b=c>> notes and a last line `#### n`), kept as it stands."""
    return {"messages": exchange(row["question"], integral_text(row["answer"]))}


def cmath(row: dict) -> dict:
    """XiaoMi/cmath: `input` in the repository, `question` on the hub; golden is the bare number."""
    question = read_one(row, ("input", "question"), "question", required=True)
    return {"messages": exchange(question, integral_text(row["golden"]))}


def svamp(row: dict) -> dict:
    """SVAMP and ASDiv: Body and Question make the question, Answer is the number (7.0 is 7); in small letters too."""
    body = read_one(row, ("Body", "body"), "Body", required=True)
    asked = read_one(row, ("Question", "question"), "Question", required=True)
    answer = read_one(row, ("Answer", "answer"), "Answer", required=True)
    question = f"{clean_text(body, 'Body')} {clean_text(asked, 'Question')}"
    return {"messages": exchange(question, number_text(answer)), "id": read_one(row, ("ID", "idx"), "ID")}


def number_text(value: object) -> object:
    """Return a number, or text that is one, as text: "7" for 7.0; any other value as it is."""
    if isinstance(value, bool):
        return value
    try:
        return plain_number(value)
    except InvalidRow:
        return value


def integral_text(value: object) -> object:
    """Return a number as text, "7" for 7.0; text stays as it stands."""
    return value if isinstance(value, str) else number_text(value)


PLACE = re.compile(r"\b(?:N_|number)(\d{1,9})")  # of a number that is taken out of the text


def mawps(row: dict, *, keep_disagreeing: bool = False) -> dict:
    """MAWPS as in SVAMP's cv_mawps: N_00 (or number0) in Question stands for the first of Numbers ("56.0 9.0"),
    Equation ("* N_00 N_01") for the way to Answer. Rows whose Equation gives another number by over 1% (less is
    rounding: 3.33333) are refused; --keep_disagreeing keeps them, with their Answer, under the tag `equation
    disagrees`."""
    numbers = [plain_number(number) for number in str(row["Numbers"]).split()]

    def put_back(match: re.Match) -> str:
        index = int(match[1])
        if index >= len(numbers):
            raise InvalidRow("number index without a number", f"{match[0]} with {len(numbers)} numbers")
        return numbers[index]

    question = PLACE.sub(put_back, row["Question"])
    answer = plain_number(row["Answer"])
    tags = []
    if row.get("Equation"):
        value = evaluate_prefix(PLACE.sub(put_back, row["Equation"]).split())
        if value is None or abs(value - float(answer)) > 0.01 * abs(value):
            if not keep_disagreeing:
                raise InvalidRow("equation disagrees with answer", f"{row['Equation']}, Answer {answer}"[:80])
            tags = ["equation disagrees"]
    return {"messages": exchange(question, answer), "tags": tags}


OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def evaluate_prefix(words: list[str]) -> float | None:
    """Return the value of an equation in prefix form, or None where it has none."""
    stack = []
    try:
        for word in reversed(words):
            if word in OPERATORS:
                left = stack.pop()
                right = stack.pop()
                stack.append(OPERATORS[word](left, right))
            else:
                stack.append(Fraction(word))
        (value,) = stack
        return float(value)
    except (ValueError, ZeroDivisionError, IndexError, OverflowError):
        return None


# -- multiple choice --------------------------------------------------------------------------------------------------
def multiple_choice(question: str, letters: list[str], choices: list[str]) -> str:
    """Return a question in nanochat's form (tasks/common.py): the letter behind its choice, bound to it by = without a
    blank, so that it is the very token of the answer."""
    lines = "".join([f"- {choice}={letter}\n" for letter, choice in zip(letters, choices, strict=True)])
    return f"Multiple Choice question: {question}\n{lines}\nRespond only with the letter of the correct answer."


def arc(row: dict) -> dict:
    """allenai/ai2_arc: question, choices {text, label}, answerKey; in nanochat's form, answered by the letter."""
    letters = row["choices"]["label"]
    choices = row["choices"]["text"]
    return {"messages": choose(row["question"], letters, choices, row["answerKey"])}


def mmlu(row: dict) -> dict:
    """cais/mmlu: question, subject, choices (four), answer (0 to 3); auxiliary_train wraps them in `train`."""
    if isinstance(row.get("train"), dict):
        beside = [name for name in ("question", "choices", "answer") if not is_empty(row.get(name))]
        if beside:
            raise InvalidRow(f"{beside[0]} under two names", f"train.{beside[0]} and {beside[0]}")
        row = row["train"]
    answer = row["answer"]
    if type(answer) is not int or not 0 <= answer < 4:
        raise InvalidRow("answer that is no choice", str(answer)[:80])
    return {
        "messages": choose(row["question"], list("ABCD"), row["choices"], "ABCD"[answer]),
        "tags": [row["subject"]] if row.get("subject") else [],
    }


def choose(question: str, letters: list[str], choices: list[str], answer: str) -> list[dict]:
    """Return the messages of a choice and its letter. Raises InvalidRow."""
    strings = [question, answer, *letters, *choices]
    if not all([isinstance(value, str) for value in strings]) or len(letters) != len(choices):
        raise InvalidRow("field of another type", "question, labels and choices must be strings, a label a choice")
    if answer not in letters:
        raise InvalidRow("answer that is no choice", f"{answer} of {', '.join(letters)}"[:80])
    if not question.strip() or not all([choice.strip() for choice in choices]):
        raise InvalidRow("empty text", "question or choice")
    return exchange(multiple_choice(question, letters, choices), answer)


# -- by what a row is known -------------------------------------------------------------------------------------------
def holds_working(row: dict) -> bool:
    return "\n####" in str(row["answer"])


def holds_places(row: dict) -> bool:
    return PLACE.search(str(row["Question"])) is not None


def holds_choices(row: dict) -> bool:
    return isinstance(row["choices"], dict) and "label" in row["choices"]


def holds_index(row: dict) -> bool:
    if isinstance(row.get("train"), dict):
        row = row["train"]
    return isinstance(row.get("choices"), list) and isinstance(row.get("answer"), int)


def holds_body(row: dict) -> bool:
    if "Numbers" in row:  # mawps
        return False
    return {"Body", "Question", "Answer"} <= row.keys() or {"body", "question", "answer"} <= row.keys()
