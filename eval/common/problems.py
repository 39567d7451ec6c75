"""The questions of nanochat's six benchmarks: rows of a file to problems. Nothing here imports torch by itself.

Rows are those of the hub (ARC: question, choices, answerKey; MMLU: question, choices, answer; GSM8K: question, answer;
HumanEval: task_id, prompt, test, entry_point) or, but for HumanEval, the `messages` rows that data_prep makes of them.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_prep.common.errors import UsageError
from eval.common.gsm8k import official_answer

LISTED_LETTER = re.compile(r"=([A-Z0-9])$", re.MULTILINE)  # behind a choice, in a question that is written already


@dataclass
class LetterProblem:
    """A question with choices. letters: those of the choices; answer: the right one."""

    id: str
    task: str
    prompt: list[dict]
    letters: list[str]
    answer: str


@dataclass
class NumberProblem:
    """A question whose answer ends in `#### n`. answer: n."""

    id: str
    task: str
    prompt: list[dict]
    answer: str


@dataclass
class CodeProblem:
    """A function to write. test: the program that defines check(); entry_point: the function's name."""

    id: str
    task: str
    prompt: list[dict]
    test: str
    entry_point: str


Problem = LetterProblem | NumberProblem | CodeProblem


def multiple_choice(question: str, letters: list[str] | str, choices: list[str]) -> str:
    """Return nanochat's form (tasks/common.py, render_mc): the letter behind its choice, bound to it by = without a
    blank."""
    lines = "".join(f"- {choice}={letter}\n" for letter, choice in zip(letters, choices, strict=True))
    return f"Multiple Choice question: {question}\n{lines}\nRespond only with the letter of the correct answer."


def message_text(content: str | list[dict]) -> str:
    """Return the text of a message's content, a string or nanochat's list of parts."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content)


def user_turn(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def letter_problem(row: dict, name: str, task: str) -> LetterProblem:
    """Return the problem of a row with choices.

    Raises KeyError, TypeError, ValueError, IndexError or AttributeError for a row of another benchmark.
    """
    if "messages" in row:
        prompt = row["messages"][:-1]
        answer = message_text(row["messages"][-1]["content"]).strip()
        choices = prompt[-1]["content"].partition("\n- ")[2]
        letters = LISTED_LETTER.findall(choices)
    elif isinstance(row["choices"], dict):
        letters = list(row["choices"]["label"])
        answer = row["answerKey"]
        prompt = user_turn(multiple_choice(row["question"], letters, row["choices"]["text"]))
    else:
        letters = list("ABCD"[: len(row["choices"])])
        answer = letters[row["answer"]]
        prompt = user_turn(multiple_choice(row["question"], letters, row["choices"]))
    if answer not in letters:
        raise ValueError(f"the answer {answer!r} is none of its letters")
    return LetterProblem(name, task, prompt, letters, answer)


def number_problem(row: dict, name: str, task: str) -> NumberProblem:
    """Return the problem of a row whose answer is a number. Raises as letter_problem."""
    if "messages" in row:
        prompt = row["messages"][:-1]
        reference = message_text(row["messages"][-1]["content"])
    else:
        prompt = user_turn(row["question"])
        reference = row["answer"]
    answer = official_answer(reference)
    if answer is None:
        raise ValueError("the reference has no `#### n`")
    return NumberProblem(name, task, prompt, answer)


def code_problem(row: dict, name: str, task: str) -> CodeProblem:
    """Return the problem of a row of HumanEval. Raises KeyError for another row."""
    return CodeProblem(name, task, user_turn(row["prompt"]), row["test"], row["entry_point"])


@dataclass(frozen=True)
class Task:
    """A benchmark. chance: what guessing gets, as nanochat's ChatCORE takes it; read: a row to its problem."""

    title: str
    chance: float
    read: Callable[[dict, str, str], Problem]


TASKS = {
    "arc_easy": Task("ARC-Easy", 0.25, letter_problem),
    "arc_challenge": Task("ARC-Challenge", 0.25, letter_problem),
    "mmlu": Task("MMLU", 0.25, letter_problem),
    "gsm8k": Task("GSM8K", 0.0, number_problem),
    "humaneval": Task("HumanEval", 0.0, code_problem),
    "spelling_bee": Task("SpellingBee", 0.0, number_problem),
}


def read_problems(task: str, path: str | Path, split: str, limit: int | None, seed: int) -> list[Problem]:
    """Return the problems of a task's file. Raises UsageError.

    task: a name of TASKS. split: of a save_to_disk folder. limit: as many, drawn by seed, in their order.
    """
    from eval.common.measure import read_rows  # here, since it imports torch

    problems = []
    for number, row in enumerate(read_rows(Path(path), split), 1):
        try:
            problems.append(TASKS[task].read(row, row_name(row, number), task))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            reason = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise UsageError(
                f"{task}: row {number} of {path} is not a row of this benchmark ({reason}): pass its published rows, "
                "or messages rows that data_prep made of them"
            ) from None
    if not problems:
        raise UsageError(f"{task}: {path} holds no rows: pass the benchmark's test rows")
    if limit and limit < len(problems):
        drawn = random.Random(seed).sample(range(len(problems)), limit)
        problems = [problems[number] for number in sorted(drawn)]
    return problems


def row_name(row: dict, number: int) -> str:
    """Return what a row is called: its own id, or its number."""
    for key in ("id", "task_id"):
        if row.get(key) is not None:
            return str(row[key])
    return str(number)
