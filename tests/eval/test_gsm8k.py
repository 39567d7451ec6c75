"""eval/common/gsm8k.py against an extractor of another kind, on the published test set and on what models write.

Breaks tried, each seen red: the last mark for the first, a mark without its blank, commas kept, numbers compared as
numbers, text without a mark taken for its last number.
"""

import json
import re

import pytest

from eval.common import gsm8k
from tests.helpers.runs import SHARED


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so\n#### 1,200", "1200"),
        ("#### -2", "-2"),
        ("#### 3.5 apples", "3.5"),
        ("#### 7\n#### 8", "7"),
        ("#### 7.", "7."),
        ("##### 7", "7"),
        ("####7", None),
        ("####  7", None),
        ("#### $7", None),
        ("#### seven", None),
        ("#### seven\n#### 7", "7"),
        ("#### --7", None),
        ("#### ٧", None),
        ("7", None),
        ("", None),
    ],
)
def test_the_number_is_behind_the_first_mark(text, number):
    assert gsm8k.official_answer(text) == number


def by_hand(text):
    """The official rule without a regular expression: behind each mark, what may stand in a number."""
    for part in text.split("#### ")[1:]:
        end = 1 if part.startswith("-") else 0
        start = end
        while end < len(part) and part[end] in "0123456789.,":
            end += 1
        if end > start:
            return part[:end].replace(",", "")
    return None


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared is absent: small fixtures prove the same")
def test_the_published_answers_and_what_becomes_of_them():
    text = (SHARED / "data" / "gsm8k" / "test.jsonl").read_text(encoding="utf-8")
    answers = [json.loads(line)["answer"] for line in text.strip().split("\n")]
    assert len(answers) == 1319
    numbers = [gsm8k.official_answer(answer) for answer in answers]
    assert numbers == [by_hand(answer) for answer in answers]
    assert all(re.fullmatch(r"-?\d+(\.\d+)?", number) for number in numbers)
    for change in (
        lambda answer: answer.replace("#### ", "####"),
        lambda answer: answer + "\n#### 5",
        lambda answer: "#### 5\n" + answer,
        lambda answer: answer + ".",
        lambda answer: answer.replace("#### ", "#### $"),
        lambda answer: answer.replace("#### ", "#### -"),
        lambda answer: answer + ",000",
        lambda answer: answer.rpartition("#### ")[2],
    ):
        changed = [change(answer) for answer in answers]
        assert [gsm8k.official_answer(answer) for answer in changed] == [by_hand(answer) for answer in changed]


def test_an_answer_is_right_where_the_texts_of_the_numbers_are_equal():
    reference = "600 + 600 = 1200\n#### 1,200"
    assert gsm8k.is_correct("#### 1200", reference) and gsm8k.is_correct("it is #### 1,200 dollars", reference)
    assert not any(gsm8k.is_correct(answer, reference) for answer in ("#### 1200.", "#### 1200.0", "1200", "", "####"))
    with pytest.raises(ValueError, match="the reference has no"):
        gsm8k.is_correct("#### 7", "7")


def test_the_task_of_lm_eval_asks_the_same_rule():
    row = {"question": "?", "answer": "so #### 7\n#### 8"}
    assert gsm8k.process_results(row, ["#### 7"]) == {"exact_match": 1.0}
    assert gsm8k.process_results(row, ["#### 8"]) == {"exact_match": 0.0}
