"""eval/common/metrics.py and what it is made of (repetition, strict_json, languages, intervals) against other
implementations (n-grams counted by their words, jsonschema's equality, Unicode's properties), published and
hand-worked values, simulated coverage, and answers of planted bad models.

Tried, and each turned a test red: percentiles in the place of BCa; Student's level; a share without width at its bound;
pairs of a ratio drawn apart; counters not made equal; tables, JSON or rows of numbers taken for loops; a language
without a margin, or of fewer words; a reference that repeats itself not looked at; cut answers not counted; half a
letter at a cut end as garbled; an answer without a language kept; a translation counted as lost language.
"""

import json
import math
import random
import string
import urllib.request
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from scipy import stats

from data_prep.common import ngrams
from data_prep.common.answers import parse_answer
from eval.common import intervals, languages, metrics, repetition, strict_json
from tests.helpers.runs import SHARED

GOOD = "The cat sat on the mat. It was warm there, and it slept until the evening came."
CHINESE = "北京是中国的首都。"


def parsed(text, family="generic", prompt=""):
    return parse_answer(text, family, prompt)


def flags(answer, reference=GOOD, stopped=True, failed="", family="generic", prompt="", schema=None, **more):
    """The flags of an answer of a family's template, without its stop token."""
    question = metrics.Question(parsed(reference, family, prompt), reference, **more)
    question.schema, question.has_schema = schema, schema is not None
    return metrics.judge(question, parsed(answer, family, prompt), answer, stopped, failed)


# -- loops ------------------------------------------------------------------------------------------------------------
def texts():
    """Texts that repeat themselves to every degree, in two scripts, with code and punctuation."""
    rng = random.Random(1)
    latin = ["cat", "mat", "Sat", "the", "it's", "x1", "Größe", "—", "\n", "```py\nfor i in i:\n```", "7,5"]
    han = list("我们今天去北京看朋友。，") + ["OK"]
    for pool in (latin, han):
        for size in (3, 15, 25, 40, 60, 400, 4000):
            for kinds in (1, 2, 3, 5, len(pool)):
                yield " ".join(rng.choice(pool[:kinds]) for _ in range(size))
                yield "".join(rng.choice(pool[-kinds:]) for _ in range(size))


def test_repetition_by_counting_words():
    found = []
    for text in texts():
        found.append(ngrams.repeated_share(text))
        words = ngrams.split_words(ngrams.FENCED.sub("", text))
        size = ngrams.ngram_size(words)
        counts = Counter(zip(*[words[shift:] for shift in range(size)], strict=False))  # the words, not their hashes
        repeated = sum(count for count in counts.values() if count > 1)
        assert found[-1] == (repeated / counts.total() if counts else 0), text
    assert sum(share == 0 for share in found) > 10 and sum(0 < share < 1 for share in found) > 10


def test_repetition_by_hand():
    """12 words, 3 n-grams of 10: with period 1 all equal; with one word changed at the end the last is another."""
    assert ngrams.repeated_share("a " * 12) == 1
    assert ngrams.repeated_share("a " * 11 + "b") == 2 / 3
    assert ngrams.repeated_share("one two three four five six seven eight nine ten eleven") == 0
    assert ngrams.repeated_share("a " * 9) == 0  # no n-gram at all


@pytest.mark.parametrize(
    ("text", "loop"),
    [
        (GOOD, False),
        ("I am here. " * 20, True),
        ("I do not know what you mean by that and so on. " * 4 + "Bye!", True),  # too few times for endless()
        ("我不知道怎么回答这个问题。" * 9, True),
        ("!" * 64, True),
        ("!" * 63, False),
        ("abcdefgh" * 8, True),
        ("abcdefgh" * 7 + "abcdefg", False),  # 63 characters
        ("Well: " + "no-" * 100, True),
        ("Well: " + "no" * 100 + "yes", False),  # it left the loop, and has no ten words
        ("<think>\n" + "wait, " * 60, True),
        ("x" * 40 + "\n" * 60, False),
        ("| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |", False),
        ("```\n" + "x = 0\n" * 30 + "```", False),  # code repeats itself, and ends
        ("```\n" + "x = 0\n" * 30, True),
        ("0.333333333333333333333333333333", False),
        ("", False),
    ],
)
def test_loops(text, loop):
    assert repetition.loops(text) is loop


WEEK = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
VERSES = "\n\n".join(
    f"The {thing} is {colour} tonight, and I am {mood} again,\nso come with me and see the {place} by the {water}."
    for thing, colour, mood, place, water in (
        ("moon", "yellow", "lonely", "harbour", "sea"),
        ("street", "silver", "hungry", "market", "river"),
        ("garden", "purple", "tired", "castle", "lake"),
    )
)
CHORUS = "\n\nOh, come and sing it out loud with me,\nthe night is young and we are still free,\n"
CHORUS += "so take my hand, we dance by the sea,\nand no one can tell us what we shall be,\noh, sing it with me.\n\n"
DAY = "start with a glass of water and a short walk, then run for half an hour in the park, stretch your legs and your "
DAY += "back for ten minutes, eat a light lunch, and go to bed before eleven so that you sleep well."
NO_LOOPS = {
    "zero grid": "The grid:\n" + ("0 0 0 0 0 0 0 0\n" * 8),
    "zero grid with brackets": "[" + ",\n ".join(["[0, 0, 0, 0, 0, 0]"] * 12) + "]",
    "equal JSON objects": json.dumps([{"name": "spoon", "colour": "silver", "price": 1}] * 20),
    "equal JSON objects by line": "Here they are:\n" + '{"name": "spoon", "colour": "silver", "price": 1}\n' * 20,
    "fenced rows": "```\n" + "insert into t values (0, 'a');\n" * 30 + "```",
    "wide table": "| " + " | ".join(["day"] * 40) + " |\n|" + "---|" * 40 + "\n| " + " | ".join(["rest"] * 40) + " |",
    "multiplication": "\n".join(f"7 x {n} = {7 * n}" for n in range(1, 101)),
    "week plan": "\n".join(f"{day}: {DAY}" for day in WEEK),
    "plan for twelve days": "\n".join(f"Day {n}: {DAY}" for n in range(12)),
    "song": VERSES.replace("\n\n", CHORUS) + CHORUS,
}


@pytest.mark.parametrize("name", NO_LOOPS)
def test_what_repeats_itself_and_ends_is_no_loop(name):
    assert not repetition.loops(NO_LOOPS[name])


LOOPS = {  # that ran to the limit
    "counter": "\n".join(f"{n}. I am sorry, I can not help you with that." for n in range(1, 12)),
    "counter in words": " ".join(f"Step {n}: check the cable again, then go on." for n in range(1, 30)),
    "zero grid": "0 0 0 0 0 0 0 0\n" * 40,
    "JSON objects": '{"name": "spoon", "colour": "silver"},\n' * 30,
    "table": "| a | b |\n" * 40,
    "fence": "```py\n" + "x = 0\n" * 40,
}


@pytest.mark.parametrize("name", LOOPS)
def test_what_repeats_itself_without_end_is_a_loop(name):
    text = LOOPS[name]
    assert repetition.loops(text, stopped=False)
    assert flags(text, stopped=False)["loops"] and not flags(text, text, stopped=False)["loops"]  # the reference too


@pytest.mark.parametrize("times", [19, 40])
def test_a_counter_that_ends_is_a_loop_from_twenty_on(times):
    text = " ".join(f"{n}. I am sorry, I can not help you with that." for n in range(times))
    assert repetition.loops(text) is (times >= repetition.COUNTED_TIMES)


def test_texts_that_end_are_no_loops_by_chance():
    """A list of a hundred different lines, and random words of few kinds."""
    rng = random.Random(3)
    nouns = [f"{one}{other}" for one in "abcdefghij" for other in ("ox", "ilk", "arn")]
    for _ in range(50):
        lines = [f"{n}. the {rng.choice(nouns)} and the {rng.choice(nouns)}" for n in range(100)]
        assert not repetition.loops("\n".join(lines)) and not repetition.loops("\n".join(lines), stopped=False)


@pytest.mark.parametrize("text", ["[" * 20_000, "0 " * 20_000 + "x", "{" * 300 + "a " * 5000, "12, " * 10_000])
def test_odd_texts_take_no_time(text):
    repetition.loops(text[:40_000]), repetition.loops(text[:40_000], stopped=False)


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="../shared is absent: small fixtures prove the same")
def test_published_answers_neither_loop_nor_hold_control_tokens():
    path = next((SHARED / "data").rglob("gsm8k*/*test*.jsonl"), None) or next((SHARED / "data").rglob("*gsm8k*.jsonl"))
    answers = [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").splitlines()[:500]]
    assert len(answers) == 500
    assert sum(map(repetition.loops, answers)) <= 2 and not any(map(metrics.controls, answers))


# -- ends -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text",
    [
        "It is.",
        "Is it?",
        "Go!",
        "And so…",
        'He said "no."',
        "He said “no”",
        "(see above)",
        "**Done.**",
        "Great! 😊",
        "完成了。",
        "真的吗？",
        "好！",
        "他说「好」",
        "他说：“好。”",
        "（见上）",
        "《红楼梦》",
        "おわり。😀️",
        "끝났다.",
        "यह है।",
        "هل؟",
        "Yes.\n\n",
        '{"a": 1}',
        "[1, 2]",
        "```py\nx\n```",
        "<tool_call>\n{}\n</tool_call>",
        "| 1 | 2 |",
        "$$x$$",
        "`x`",
    ],
)
def test_finished(text):
    assert metrics.ended(text)


@pytest.mark.parametrize(
    "text",
    [
        "It is",
        "It is,",
        "It is:",
        "because the",
        "and -",
        "7",
        "",
        "  ",
        "😊",
        "It is;",
        "1. First. 2. Second",
        "# Head",
        "因为",
        "所以，",
        "比如：",
        "第一、",
        "これは",
        "그래서",
        "```py\nx = f(1)",
        "```py\nprint()\n```\nand then ```x.",
        '{"a": 1',
        "see (above",
    ],
)
def test_broken_off(text):
    assert not metrics.ended(text)


def test_sentence_ends_are_unicodes():
    """Each mark has the property Sentence_Terminal, but for the ellipsis; those of Latin, CJK and Hindi are there."""
    regex = pytest.importorskip("regex")
    marks = [char for char in metrics.TERMINAL if char != "…"]
    assert all(regex.fullmatch(r"\p{Sentence_Terminal}", char) for char in marks)
    assert set(marks) >= set(".!?。！？।॥؟")


# -- languages --------------------------------------------------------------------------------------------------------
SENTENCES = {
    "en": (GOOD, "How much is three plus four?", "The capital of this country is Bern."),
    "de": ("Das Wetter ist heute schön.", "Wie viel ist drei plus vier?", "Die Hauptstadt des Landes ist Bern."),
    "fr": ("Quelle est la capitale de la France ?", "Il fait beau, nous allons au parc."),
    "es": ("¿Cuál es la capital de Francia?", "Hace buen tiempo, vamos al parque."),
    "pt": ("Quanto é três mais quatro?", "O tempo está bom, vamos ao parque."),
    "it": ("Quanto fa tre più quattro?", "Il tempo è bello, andiamo al parco."),
    "vi": ("Việt Nam là một quốc gia", "Thời tiết đẹp, chúng ta đi công viên."),
    "ru": ("Какая столица Франции?", "Погода хорошая, мы идём в парк."),
    "uk": ("Яка столиця Франції?", "Скільки буде три плюс чотири?"),
    "ar": ("ما هي عاصمة فرنسا؟", "الطقس جميل، نذهب إلى الحديقة."),
    "fa": ("پایتخت فرانسه کجاست؟",),
    "th": ("เมืองหลวงของฝรั่งเศสคืออะไร", "อากาศดี เราไปสวนสาธารณะกัน"),
    "hi": ("मौसम अच्छा है, हम पार्क जाते हैं।",),
    "zh": (CHINESE, "請用Python寫一個quicksort的函數", "```py\nprint('a b c d e f')\n```\n这是一个例子。"),
    "ja": ("東京は日本の首都です。", "カタカナ"),
    "ko": ("서울은 한국의 수도입니다",),
}
IN_NONE = ("OK", "42, 43 und", "3 + 4 = 7.\n#### 7", '{"k": 1}', "x = f(1)", "", "```\nall of this is code\n```", "<b>")


@pytest.mark.parametrize("code", SENTENCES)
def test_languages(code):
    for text in SENTENCES[code]:
        assert languages.identify_language(text) == code
        others = [other for other in SENTENCES if languages.is_in_language(text, other)]
        assert others == [code]


@pytest.mark.parametrize("text", IN_NONE)
def test_texts_in_no_language(text):
    assert languages.identify_language(text) == ""
    assert not languages.is_in_language(text, "en")


def test_an_unclear_text_may_be_in_each_of_its_languages():
    assert languages.identify_language("It is Bern.") == ""
    assert languages.is_in_language("It is Bern.", "en") and not languages.is_in_language("It is Bern.", "ru")


@pytest.mark.parametrize(
    ("question", "reference", "answer", "kept"),
    [
        ("中国的首都是哪里？", CHINESE, "首都是北京。", True),
        ("中国的首都是哪里？", CHINESE, "The capital is Beijing.", False),  # forgets Chinese
        ("中国的首都是哪里？", CHINESE, "首都 is a good question", False),
        ("中国的首都是哪里？", CHINESE, "42", False),  # in no language
        ("中国的首都是哪里？", CHINESE, "<think>\nThe user asks in Chinese\n</think>\n\n首都是北京。", True),
        ("中国的首都是哪里？", CHINESE, "<think>\n用户用中文提问，首都是北京。", False),  # nothing was answered
        ("请翻译成英文：你好，朋友", "Hello, my friend.", "Hello, friend.", None),  # a translation is no loss
        ("用JSON回答：首都？", '{"capital": "Beijing"}', '{"capital": "Beijing"}', None),
        ("How much is three plus four?", "Three plus four is seven, of course.", "是七。", False),
        ("Was ist die Hauptstadt des Landes?", "Die Hauptstadt ist Paris.", "It is a city called Paris.", False),
        ("Was ist die Hauptstadt des Landes?", "Die Hauptstadt ist Paris.", "Es ist die Stadt Paris.", True),
        ("What is 2 + 2?", "4", "4", None),
    ],
)
def test_language_retention(question, reference, answer, kept):
    assert flags(answer, reference, question=question)["same_language"] is kept


# -- control tokens and usability -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "special", "control"),
    [
        ("fine <b>text</b> a<b and <|x y|>", (), False),
        ("so<|im_start|>user\nhi", (), True),
        ("so<|eot_id|><|eot_id|> there", (), True),
        ("so</s>[INST] there", ("</s>", "[INST]"), True),
        ("so</s>[INST] there", ("[INST]",), True),
        ("so[INST] there", (), False),
        ("<think>\nhm\n</think>\n\nyes", ("<think>", "</think>"), False),
        ("<think>\nhm\n</think>\n\nyes</think>no", (), True),
        ("<think>\n<|im_sep|>\n</think>\n\nyes", (), True),
    ],
)
def test_control_tokens(text, special, control):
    assert flags(text, special=special)["control"] is control


HARMONY = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>It is so."


@pytest.mark.parametrize(
    ("family", "answer", "prompt"),
    [
        ("gpt_oss", HARMONY, ""),
        ("gemma4", "<|channel>thought\nhm<channel|>It is so.", ""),
        ("command_a_reasoning", "<|START_THINKING|>hm<|END_THINKING|><|START_RESPONSE|>It is so.<|END_RESPONSE|>", ""),
        ("qwen3", "<think>\nhm\n</think>\n\nIt is so.", ""),
        ("deepseek_r1", "hm\n</think>\n\nIt is so.", "<｜Assistant｜><think>\n"),
    ],
)
def test_every_family_is_read_by_its_own_words(family, answer, prompt):
    """The thought's marks are no control tokens, the text behind it is what is compared; a thought alone is none."""
    found = flags(answer, answer, family=family, prompt=prompt, special=("<think>",))
    assert found["exact"] and found["usable"] and not found["control"] and not found["cut"]
    assert (found["said"], found["compared"]) == ("It is so.", "text behind the thought")
    thought = answer[: answer.index("hm") + 2]
    found = flags(thought, answer, family=family, prompt=prompt)
    assert found["empty"] and found["cut"] and not found["exact"] and not found["usable"]
    cut = json.dumps({"k": 1})[:-1]
    json_answer = answer.replace("It is so.", '{"k": 1}')
    assert flags(json_answer, json_answer, family=family, prompt=prompt, json=True)["json_valid"]
    for bad in (thought, answer, answer.replace("It is so.", cut)):
        assert flags(bad, json_answer, family=family, prompt=prompt, json=True)["json_valid"] is False


@pytest.mark.parametrize(
    ("answer", "stopped", "wrong"),
    [
        (GOOD, True, set()),
        ("", True, {"empty"}),
        (" \n", True, {"empty"}),
        ("<think>\nhm", True, {"empty", "cut"}),  # a thought that does not end, whatever stands in it
        ("<think>\nhm, so it is 18.\n#### 18", False, {"empty", "cut"}),
        ("It is so. <think> But is it?", True, {"empty", "cut"}),
        ("<think>\nhm\n</think>\n\n", True, {"empty"}),
        (GOOD, False, {"cut"}),  # never stops
        ("It is so. " * 30, True, {"loops"}),
        (GOOD + "<|im_start|>", True, {"control"}),
    ],
)
def test_usability(answer, stopped, wrong):
    found = flags(answer, stopped=stopped)
    assert {name for name in ("empty", "loops", "control", "cut") if found[name]} == wrong
    assert found["usable"] is (answer == GOOD and stopped) and found["stopped"] is stopped


def test_a_number_in_a_thought_that_does_not_end_is_no_answer():
    assert not flags("<think> maybe\n#### 18", "so\n#### 18")["exact"]
    assert flags("<think> maybe </think>\n#### 18", "so\n#### 18")["exact"]


@pytest.mark.parametrize(
    ("text", "question", "copy"),
    [
        ("What is the capital of France?", "What is the capital of France?", True),
        ("what is the capital of France", "What is the capital of France?", True),
        ("You ask: what is the capital city of France?", "What is the capital of France?", False),
        ("What is the capital of France? " * 3, "What is the capital of France?", True),
        ("The capital of France is Paris.", "What is the capital of France?", False),
        ("Hi", "Hi", False),  # one word
        ("", "What is the capital of France?", False),
        ("中国的首都是哪里？", "中国的首都是哪里？", True),
        ("a b c d e f g h i j k l", "a b c d e f g h i j k l m n o p q r s t u v w x y z", True),  # cut
        ("a b c", "a b c d e f g h i j k l m n o p q r s t u v w x y z", False),
    ],
)
def test_copies_of_the_question(text, question, copy):
    assert metrics.copies(text, question) is copy
    assert flags(text, GOOD, question=question)["copied"] is copy
    if copy:
        assert flags(text, question, question=question)["copied"] is None  # the data does so too


@pytest.mark.parametrize(
    ("text", "runs"),
    [
        ("It is Paris.\nUser: And of Spain?\nAssistant: Madrid.", True),
        ("It is Paris.\n\n### User:\nAnd of Spain?", True),
        ("It is Paris.\n**User:** And of Spain?", True),
        ("It is Paris. user: And of Spain? assistant: Madrid.", True),
        ("It is Paris.\nuser\nAnd of Spain?\nassistant\nMadrid.", True),
        ("是巴黎。\n用户：西班牙呢？\n助手：马德里。", True),
        ("Human: hello\nAI: hello", True),
        ("The user: anyone who logs in.", False),
        ("Ask the user\nfor the name.", False),
        ("```yaml\nuser: root\n```", False),
        ("Users: 7", False),
        (GOOD, False),
    ],
)
def test_answers_that_go_on_as_the_user(text, runs):
    assert metrics.runs_on(text) is runs
    assert flags(text)["runs_on"] is runs and not flags(text, text)["runs_on"]


def test_replacement_characters():
    assert flags("It is \ufffd\ufffd.")["garbled"] and not flags(GOOD)["garbled"]
    assert flags("Smile \ufffd")["garbled"]
    assert not flags("Smile \ufffd", stopped=False)["garbled"]  # cut within a letter
    assert flags("A \ufffd a \ufffd", stopped=False)["garbled"]
    assert not flags("It is \ufffd.", "U+FFFD is \ufffd.")["garbled"]


@pytest.mark.parametrize(
    ("reference", "compared"),
    [
        ("It is 7.", "text"),
        ("3 + 4\n#### 7", "number behind ####"),
        ("<think>\nhm\n</think>\n\nIt is 7.", "text behind the thought"),
        ('<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', "calls"),
        ('So:\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', "text and calls"),
    ],
)
def test_what_exact_compares_is_named(reference, compared):
    found = flags(reference, reference)
    assert found["exact"] and found["compared"] == compared


@pytest.mark.parametrize(
    ("reference", "answer", "same"),
    [
        ("It is 1200.\n#### 1,200", "thus\n#### 1200", True),
        ("#### 1200", "#### 1200.0", False),  # GSM8K's own rule compares texts
        ("#### 7", "#### 3, no:\n#### 7 ", False),  # and takes the first
        ("#### 7", "7", False),
        ("#### 7", "<think>so #### 7", False),
        ("#### 7", "#### 7 apples", True),
        ("#### -3", "#### 3", False),
        ("#### Paris", "so: #### Paris", False),  # no number: the whole text
        ("7", "7.0", False),
        ("## A\n#### Part\nText", "#### Part\nText", False),  # a heading is no mark
        ("<think>\nx\n</think>\n\nyes", "<think>\nother\n</think>\n\n yes\n", True),
        ("yes", "<think>yes", False),  # never came to an answer
        ("yes", "Yes", False),
        ("", "", False),
        ('<tool_call>\n{"name": "f"}\n</tool_call>', '<tool_call>\n{"name": "g"}\n</tool_call>', False),
        ('<tool_call>\n{"name": "f"}\n</tool_call>', '<tool_call>{"name": "f", "arguments": {}}</tool_call>', True),
        ('<tool_call>\n{"name": "f"}\n</tool_call>', '<tool_call>\n{"name": "f"', False),
    ],
)
def test_exact_match(reference, answer, same):
    assert flags(answer, reference)["exact"] is same


def test_what_the_data_itself_holds_is_no_control_token():
    text = "The token <|sep|> parts them."
    assert flags(text, text)["control"]
    found = flags(text, text, allowed={"<|sep|>"})
    assert not found["control"] and found["usable"]


def test_abrupt_ends_are_counted_only_where_the_reference_ends():
    assert flags("It was cut off because", GOOD)["abrupt"] is True
    assert flags("Done.", GOOD)["abrupt"] is False
    assert flags("Bern", "Bern")["abrupt"] is None
    assert flags("", GOOD)["abrupt"] is True


# -- JSON -------------------------------------------------------------------------------------------------------------
SCALARS = (
    st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from([0.0, 1.0, 0.5]) | st.sampled_from(["", "1", "x"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab01"), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None)
@given(VALUES, VALUES, st.booleans())
def test_all_fields_equal_is_json_equality(reference, answer, again):
    """jsonschema's const is another implementation of equality in JSON (1 is 1.0, but neither true nor "1")."""
    answer = reference if again else answer
    counts = strict_json.json_fields(json.dumps(reference), json.dumps(answer))
    is_equal = counts.equal == counts.wanted == counts.given
    assert is_equal is Draft202012Validator({"const": reference}).is_valid(answer)
    assert 0 <= counts.equal <= min(counts.wanted, counts.given)


@pytest.mark.parametrize(
    ("reference", "answer", "counts"),
    [
        ({"a": 1, "b": None}, {"b": None, "a": 1.0}, (2, 2, 2)),
        ({"a": 1, "b": None}, {"a": 1}, (1, 2, 1)),
        ({"a": 1}, {"a": 1, "b": 2}, (1, 1, 2)),
        ({"a": 1}, {"a": True}, (0, 1, 1)),
        ({"a": {"b": [1, 2]}, "c": []}, {"a": {"b": [1, 3]}, "c": []}, (2, 3, 3)),
        ([1, 2], [2, 1], (0, 2, 2)),
        (7, 7, (1, 1, 1)),
    ],
)
def test_fields_by_hand(reference, answer, counts):
    assert strict_json.json_fields(json.dumps(reference), json.dumps(answer)) == strict_json.FieldCounts(*counts)
    assert strict_json.json_fields(json.dumps(reference), "no JSON").equal == 0
    deep = "[" * 900 + "]" * 900
    assert strict_json.json_fields(deep, deep) == strict_json.FieldCounts(1, 1, 1)


@pytest.mark.parametrize("text", ['{"a": [1, null, "x"]}', " 3 ", '"s"', "null", "[]"])
def test_strict_json_takes(text):
    assert strict_json.strict_json(text)


@pytest.mark.parametrize(
    "text",
    [
        *("", "NaN", "[Infinity]", '{"a": -Infinity}', '{"a": 1, "a": 2}', '[{"b": {"a": 1, "a": 1}}]', "{'a': 1}"),
        *('{"a": 1}.', '```json\n{"a": 1}\n```', '{"a": 1,}', "[" * 100_000, '<think>{"a": 1}', "// c\n1"),
    ],
)
def test_strict_json_refuses(text):
    assert not strict_json.strict_json(text)


PERSON = {
    "type": "object",
    "properties": {"age": {"type": "integer"}},
    "required": ["age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("schema", "answer", "valid"),
    [
        (PERSON, '{"age": 7}', True),
        (PERSON, '{"age": "7"}', False),
        (PERSON, '{"age": 7, "name": "x"}', False),
        (PERSON, "{}", False),
        (PERSON, '{"age": 7', False),
        (PERSON, '```json\n{"age": 7}\n```', False),  # strict
        (True, "[]", True),
        (False, "[]", False),
        ({"$schema": "http://json-schema.org/draft-04/schema#", "maximum": 3, "exclusiveMaximum": True}, "3", False),
        ({"$ref": "#/$defs/x", "$defs": {"x": {"const": 1}}}, "1", True),
        ({"$ref": "https://example.org/none.json"}, "1", False),
        ({"$ref": "#"}, "1", False),  # to itself
    ],
)
def test_schema(monkeypatch, schema, answer, valid):
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: pytest.fail("a schema was fetched"))
    assert strict_json.schema_valid(schema, answer) is valid


@pytest.mark.parametrize(
    ("reference", "answer", "valid", "negative", "exact", "schema"),
    [
        ('{"age": 7}', '{"age": 7}', True, None, True, True),
        ('{"age": 7}', '{"age": 8}', True, None, False, True),
        ('{"age": 7}', '{"age": "7"}', True, None, False, False),
        ('{"age": 7}', '{"age": 7, "of": "x"}', True, None, False, False),  # a field too many
        ('{"age": 7}', "{'age': 7}", False, None, False, False),  # invalid JSON
        ('{"age": 7}', "", False, None, False, False),
        ("There is no age.", "No age is given.", True, True, None, None),
        ("There is no age.", '{"age": null}', False, False, None, None),  # always answers JSON
        ("There is no age.", '```json\n{"age": null}\n```', False, False, None, None),
        ("There is no age.", "{'age': 7}", False, False, None, None),
        ("There is no age.", "[]", False, False, None, None),
        ("There is no age.", "[sic] none", True, True, None, None),
        ("There is no age.", "", False, False, None, None),
        ("There is no age.", "<think>\nno age", False, False, None, None),
    ],
)
def test_json_rows(reference, answer, valid, negative, exact, schema):
    wanted = reference.startswith("{")
    found = flags(answer, reference, json=wanted, schema=PERSON)
    names = ("json_valid", "json_negative", "json_exact", "json_schema_valid")
    assert tuple(found[name] for name in names) == (valid, negative, exact, schema)
    assert {flags(answer, reference)[name] for name in names} == {None}
    assert flags(answer, reference, json=wanted)["json_schema_valid"] is None


# -- failed answers, sums ---------------------------------------------------------------------------------------------
def test_a_failed_answer_counts_against_every_rate_that_applies():
    question = "How are you feeling about the weather today?"
    reference = '{"mood": "I am feeling very well about the weather today"}'
    found = flags("", reference, False, failed="timeout", schema=True, question=question, json=True)
    assert {name for name, flag in found.items() if flag is True} == metrics.HARM
    applies = {"exact", "usable", "stopped", "same_language", "json_valid", "json_schema_valid", "json_exact"}
    assert {name for name, flag in found.items() if flag is False} == applies
    assert found["failed"] == "timeout" and found["json_negative"] is None and found["json_fields"] == 1
    assert flags("", "7", False, failed="timeout")["abrupt"] is None


def record(**more):
    empty = dict.fromkeys((*metrics.RATES.values(), "answer_tokens", "reference_tokens", "json_equal", "json_fields"))
    empty |= dict.fromkeys(("said", "wanted", "compared"))
    return empty | {"nll": 0.0, "tokens": 0, "turns": 0, "all_nll": 0.0, "all_tokens": 0, "texts": 0} | more


def answered(tokens, failed="", **more):
    return record(answer_tokens=tokens, reference_tokens=4, failed=failed, stopped=not failed, **more)


def test_sums():
    found = metrics.summarize([answered(2), answered(6), answered(0, "timeout"), record()], 0)
    assert set(found) == {"stop_rate", "failed", "answer_tokens", "reference_tokens"}
    assert (found["stop_rate"]["count"], found["stop_rate"]["total"]) == (2, 3)
    assert (found["failed"]["count"], found["failed"]["total"]) == (1, 3)
    # the length of an answer that failed is not known; two rows have no interval
    assert found["answer_tokens"] == {"value": 4, "rows": 2}
    rows = [answered(1, json_equal=1, json_fields=1), answered(1, json_equal=0, json_fields=3)]
    share = metrics.summarize(rows, 0)["json_field_match"]
    assert share == {"value": 1 / 4, "equal": 1, "fields": 4, "rows": 2}
    losses = [record(nll=2.0, tokens=4, turns=2, all_nll=3.0, all_tokens=5, texts=1)] * 2
    found = metrics.summarize(losses, 0)
    assert found["assistant_perplexity"] == {"value": math.exp(0.5), "nll": 4, "tokens": 8, "turns": 4, "rows": 2}
    assert found["all_token_perplexity"] == {"value": math.exp(0.6), "nll": 6, "tokens": 10, "texts": 2, "rows": 2}


def test_shares_of_distinct_and_of_equal_answers():
    """Six rows: two answers for three references; the one is given four times, the other reference twice at most."""
    rows = [answered(1, said=said, wanted=wanted) for said, wanted in zip("aaaabb", "aabbcc", strict=True)]
    found = metrics.summarize(rows, 0)
    assert found["distinct_answers"] == {"value": 2 / 3, "distinct": 2, "references": 3, "rows": 6}
    assert found["most_common_answer"]["value"] == pytest.approx(4 / 6 - 2 / 6)
    assert "distinct_answers" not in metrics.summarize(rows[:5], 0)  # too few
    assert "distinct_answers" not in metrics.summarize([row | {"wanted": "a"} for row in rows], 0)


def test_the_interval_of_a_mean_length():
    """1,000 lengths from 1 to 1,000: the mean has standard error sqrt((n² - 1) / 12 / n), and a normal interval."""
    rows = [answered(length) for length in range(1, 1001)]
    found = metrics.summarize(rows, 3)["answer_tokens"]
    half = metrics.Z95 * math.sqrt((1000**2 - 1) / 12 / 1000)
    assert found["value"] == 500.5
    assert (found["low"], found["high"]) == pytest.approx((500.5 - half, 500.5 + half), abs=2.5)


def test_the_definitions_take_any_text():
    rng = random.Random(4)
    alphabet = string.printable + "你好。「」😀\u200b\u0301\ud800 <think></think>```{}[]"
    for _ in range(300):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randrange(60)))
        found = flags(text, text, question=text, json=strict_json.strict_json(text), schema=True)
        assert found["exact"] is bool(found["said"]) and found["json_exact"] in (None, True)


# -- intervals --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    # R. G. Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_has_the_published_values(count, total, low, high):
    assert intervals.wilson(count, total) == pytest.approx((low, high), abs=5e-5)
    mirror = intervals.wilson(total - count, total)
    assert mirror == pytest.approx((1 - high, 1 - low), abs=5e-5) and mirror[1] <= 1


def test_bootstrap_resamples_rows():
    """500 rows of one token, nll 0 or 1: the mean nll has standard error sqrt(1/4 / 500), hence the interval."""
    nll = [0.0, 1.0] * 250
    low, high = intervals.bootstrap_ratio(nll, [1] * 500, 42)
    half = intervals.Z95 * math.sqrt(0.25 / 500)
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.005)
    # the same tokens in 10 long rows of one kind each: rows are what is drawn, so the interval is far wider
    wide = intervals.bootstrap_ratio([0.0, 50.0] * 5, [50] * 10, 42)
    assert wide.high - wide.low > 3 * (high - low)
    assert intervals.bootstrap_ratio(nll, [1] * 500, 42) == (low, high)
    assert intervals.bootstrap_ratio(nll, [1] * 500, 43) != (low, high)


def test_too_few_rows_and_rows_that_agree_have_no_interval():
    assert intervals.bootstrap_ratio([1.0, 2.0, 4.0, 1.0, 2.0], [1] * 5, 0) is None
    assert intervals.bootstrap_ratio([3.0] * 20, [1] * 20, 0) is None
    assert intervals.bootstrap_ratio([1.0, 2.0, 4.0] * 4, [2, 4, 8] * 4, 0) is None


def test_a_share_at_its_bound_has_a_width():
    """All fields of 20 rows equal: as if 20 rows were 20 trials."""
    assert intervals.bootstrap_share([3] * 20, [3] * 20, 0) == intervals.wilson(20, 20)
    assert intervals.bootstrap_share([0] * 20, [3, 1] * 10, 0) == intervals.wilson(0, 20)
    low, high = intervals.bootstrap_share([3] * 19 + [2], [3] * 20, 0)
    assert 0.8 < low < 59 / 60 < high <= 1


def test_the_interval_is_scipys_at_students_level():
    """The mean of 12 numbers: scipy's own call for one sample, at the level that Hesterberg gives for n = 12."""
    values = np.array([1.0, 2, 2, 3, 5, 8, 8, 9, 12, 14, 20, 41])
    level = 2 * stats.norm.cdf(math.sqrt(12 / 11) * stats.t.ppf(0.975, 11)) - 1
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, confidence_level=level, method="BCa", rng=np.random.default_rng(1)
    ).confidence_interval
    found = intervals.bootstrap_ratio(values, [1] * 12, 3)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=0.06)
    assert level == pytest.approx(0.9784, abs=1e-3)


SKEWED = {  # a sample of n rows (top, bottom), and the true ratio
    "perplexity": (lambda rng, n: (rng.gamma(4, 0.3, n), np.ceil(rng.lognormal(4, 0.8, n))), 1.2),
    "length": (lambda rng, n: (rng.lognormal(4, 0.7, n), np.ones(n)), math.exp(4 + 0.7**2 / 2)),
    "fields": (lambda rng, n: (rng.beta(9, 1, n), rng.integers(1, 6, n)), 0.9),
}


@pytest.mark.parametrize("name", SKEWED)
@pytest.mark.parametrize("rows", [20, 50])
def test_coverage_by_simulation(name, rows):
    """Of 200 samples at least 90% have the truth in their interval; plain percentiles had 86 to 89% of lengths."""
    draw, truth = SKEWED[name]
    rng = np.random.default_rng(7)
    hits = 0
    for number in range(200):
        tops, bottoms = draw(rng, rows)
        if name == "fields":
            low, high = intervals.bootstrap_share(rng.binomial(bottoms, tops), bottoms, number)
        else:
            low, high = intervals.bootstrap_ratio(tops * bottoms, bottoms, number)
        hits += low <= truth <= high
    assert 0.9 <= hits / 200 <= 0.995


# -- changes ----------------------------------------------------------------------------------------------------------
def losses(values, tokens):
    return [record(nll=value * count, tokens=count) for value, count in zip(values, tokens, strict=True)]


def test_a_change_of_perplexity_is_taken_by_pairs():
    """Rows differ by far more than the models do: 2% in every row, give or take 1%."""
    rng = np.random.default_rng(2)
    tokens = rng.integers(5, 200, 60).tolist()
    before = rng.gamma(4, 0.3, 60)
    after = before + 0.02 + rng.normal(0, 0.01, 60)
    changed = metrics.change("assistant_perplexity", losses(after, tokens), losses(before, tokens), 0)
    assert 1 < changed["low"] < changed["value"] < changed["high"] < 1.03 and changed["pairs"] == 60
    nll = np.array(after) * tokens, np.array(before) * tokens
    assert changed["value"] == pytest.approx(math.exp((nll[0].sum() - nll[1].sum()) / sum(tokens)))
    turned = metrics.change("assistant_perplexity", losses(before, tokens), losses(after, tokens), 0)
    assert turned["value"] == pytest.approx(1 / changed["value"]) and turned["high"] < 1
    alone = metrics.summarize(losses(after, tokens), 0)["assistant_perplexity"]
    assert alone["high"] / alone["low"] > 1.2  # unpaired, nobody could tell


def test_changes_of_rates_lengths_and_fields():
    tuned = [answered(3, exact=n < 15, json_equal=2, json_fields=2) for n in range(20)]
    before = [answered(5 + n % 3, exact=n < 5, json_equal=n % 2, json_fields=2) for n in range(20)]
    exact = metrics.change("exact_match", tuned, before, 0)
    assert exact["value"] == 0.5 and (exact["low"], exact["high"]) == intervals.paired_difference(5, 10, 0, 5)
    length = metrics.change("answer_tokens", tuned, before, 0)
    assert length["value"] == pytest.approx(3 - 5.95) and -3.5 < length["low"] < length["high"] < -2.4
    fields = metrics.change("json_field_match", tuned, before, 0)
    assert fields["value"] == pytest.approx(0.75) and 0.5 < fields["low"] < fields["high"] < 1
    assert metrics.change("json_valid", tuned, before, 0) is None  # applies to no row
    assert metrics.change("reference_tokens", tuned, before, 0) is None


def test_a_change_that_all_pairs_share():
    tokens = [10] * 8
    same = metrics.change("assistant_perplexity", losses([1.0] * 8, tokens), losses([1.0] * 8, tokens), 0)
    assert same == {"value": 1.0, "pairs": 8}  # nothing is shown
    above = metrics.change("assistant_perplexity", losses([1.1] * 8, tokens), losses([1.0] * 8, tokens), 0)
    assert above["low"] == above["high"] == above["value"] == pytest.approx(math.exp(0.1))
    few = metrics.change("assistant_perplexity", losses([1.1] * 3, tokens[:3]), losses([1.0] * 3, tokens[:3]), 0)
    assert few == {"value": pytest.approx(math.exp(0.1)), "pairs": 3}
