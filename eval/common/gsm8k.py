"""GSM8K's rule for an answer (Cobbe et al. 2021, grade-school-math/dataset.py): compare, chat_eval and lm-eval's task.

The number stands behind the first `#### `: digits, points and commas, perhaps a minus before them. Commas go; two
answers are equal where their texts are, so that 7. and 7.0 are not 7.
"""

import re

NUMBER = re.compile(r"#### (-?[0-9.,]+)")


def official_answer(text: str) -> str | None:
    """Return the number behind the first `#### ` of a text, without commas; None where there is none."""
    match = NUMBER.search(text)
    if match is None:
        return None
    return match[1].replace(",", "")


def is_correct(answer: str, reference: str) -> bool:
    """Return whether an answer gives the number of the reference. Raises ValueError for a reference without one."""
    expected = official_answer(reference)
    if expected is None:
        raise ValueError("the reference has no `#### n`")
    return official_answer(answer) == expected


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """Return the metric of one row for lm-eval, which calls this by name from eval/tasks/gsm8k_chat.yaml."""
    return {"exact_match": float(is_correct(results[0], doc["answer"]))}
