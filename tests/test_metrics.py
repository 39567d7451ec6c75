"""eval/common/metrics.py against other implementations (data_prep's n-grams and languages, jsonschema's equality, Unicode's
properties), hand-worked values, and answers of planted bad models.

Each of these turns the suite red (tried): n-grams of 9 words; 10 for single characters; code fences not cut, or left
open at an end; loops by n-grams alone, or by the endless tail alone; a tail of 63 characters; brackets that end
nothing, or emoji; a language clear at half, or of one word; kana outnumbered by Han; a translation, an unclear answer
or the reasoning counted as lost language; think tags of the block as control tokens; special tokens not looked for; the
data's own control tokens held against a model; usable without a stop, with an open think block, a loop, a control
token; abrupt ends where the reference has none; true equal to 1; fields too many; a $ref fetched; every schema read as
2020-12; JSON in a fence, or nothing, right for a negative example; failed answers judged as empty ones, or their
lengths counted; the interval of a mean as its range.
"""

import json
import math
import random
import string
import urllib.request

import pytest
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from data_prep import filter as filtering
from data_prep.common import language, ngrams
from eval.common import metrics

GOOD = "The cat sat on the mat. It was warm there, and it slept until the evening came."
CHINESE = "北京是中国的首都。"


def flags(answer, reference=GOOD, stopped=True, **more):
    return metrics.judge(reference, answer, stopped, **more)


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


def test_repetition_is_the_rule_of_the_data_filter():
    found = []
    for text in texts():
        assert metrics.words(text) == ngrams.split_words(text)
        found.append(metrics.repeated(text))
        assert found[-1] == filtering.repeated_share(filtering.FENCED.sub("", text)), text
    assert sum(share == 0 for share in found) > 10 and sum(0 < share < 1 for share in found) > 10


def test_repetition_by_hand():
    """12 words, 3 n-grams of 10: with period 1 all equal; with one word changed at the end the last is another."""
    assert metrics.repeated("a " * 12) == 1
    assert metrics.repeated("a " * 11 + "b") == 2 / 3
    assert metrics.repeated("one two three four five six seven eight nine ten eleven") == 0
    assert metrics.repeated("a " * 9) == 0  # no n-gram at all


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
    assert metrics.loops(text) is loop


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the shared data is not on this machine")
def test_published_answers_neither_loop_nor_hold_control_tokens():
    path = next((SHARED / "data").rglob("gsm8k*/*test*.jsonl"), None) or next((SHARED / "data").rglob("*gsm8k*.jsonl"))
    answers = [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").splitlines()[:500]]
    assert len(answers) == 500
    assert sum(map(metrics.loops, answers)) <= 2 and not any(map(metrics.controls, answers))


# -- ends -------------------------------------------------------------------------------------------------------------
# fmt: off
@pytest.mark.parametrize("text", [
    "It is.", "Is it?", "Go!", "And so…", 'He said "no."', "He said “no”", "(see above)", "**Done.**", "Great! 😊",
    "完成了。", "真的吗？", "好！", "他说「好」", "他说：“好。”", "（见上）", "《红楼梦》",
    "おわり。😀️", "끝났다.", "यह है।", "هل؟", "Yes.\n\n",
    '{"a": 1}', "[1, 2]", "```py\nx\n```", "<tool_call>\n{}\n</tool_call>", "| 1 | 2 |", "$$x$$", "`x`",
])
# fmt: on
def test_finished(text):
    assert metrics.ended(text)


# fmt: off
@pytest.mark.parametrize("text", [
    "It is", "It is,", "It is:", "because the", "and -", "7", "", "  ", "😊", "It is;", "1. First. 2. Second", "# Head",
    "因为", "所以，", "比如：", "第一、", "これは", "그래서",
    "```py\nx = f(1)", "```py\nprint()\n```\nand then ```x.", '{"a": 1', "see (above",
])
# fmt: on
def test_broken_off(text):
    assert not metrics.ended(text)


def test_sentence_ends_are_unicodes():
    """Each mark has the property Sentence_Terminal, but for the ellipsis; those of Latin, CJK and Hindi are there."""
    regex = pytest.importorskip("regex")
    marks = [char for char in metrics.TERMINAL if char != "…"]
    assert all(regex.fullmatch(r"\p{Sentence_Terminal}", char) for char in marks)
    assert set(marks) >= set(".!?。！？।॥؟")


# -- languages --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD, "Latin"),
        ("Größe überall", "Latin"),
        ("Việt Nam là một quốc gia", "Latin"),
        (CHINESE, "zh"),
        ("請用Python寫一個quicksort的函數", "zh"),
        ("東京は日本の首都です。", "ja"),
        ("カタカナ", "ja"),
        ("서울은 한국의 수도입니다", "ko"),
        ("Ｆｕｌｌ ｗｉｄｔｈ", "Latin"),
        ("你好 my dear friend", None),  # two to three
        ("OK", None),  # one word says nothing
        ("42, 43 und", None),
        ("Привет как дела", None),
        ("```py\nprint('a b c d e f')\n```\n这是一个例子。", "zh"),
        ("", None),
    ],
)
def test_language(text, expected):
    assert metrics.language(text) == expected


def test_languages_are_those_of_the_data():
    """What is clear here is what data_prep says, on texts of one script with a few words of another."""
    rng, seen = random.Random(2), set()
    pools = {
        "zh": "天地人你我他大小中国北京",
        "ja": "あいうえおかきくけこ日本",
        "ko": "가나다라마바사아자차",
        "en": ["the", "cat", "sat", "over", "größere", "mats"],
    }
    for _ in range(500):
        main, other = rng.choices(list(pools), k=2)
        text = " ".join([*rng.choices(pools[main], k=40), *rng.choices(pools[other], k=4)])
        found = metrics.language(text)
        if found:
            seen.add(found)
            told = language.detect_language(text)
            assert found == {"en": "Latin"}.get(told, told), text
    assert seen == {"zh", "ja", "ko", "Latin"}


@pytest.mark.parametrize(
    ("question", "reference", "answer", "kept"),
    [
        ("中国的首都是哪里？", CHINESE, "首都是北京。", True),
        ("中国的首都是哪里？", CHINESE, "The capital is Beijing.", False),  # forgets Chinese
        ("中国的首都是哪里？", CHINESE, "首都 is a good question", False),
        ("中国的首都是哪里？", CHINESE, "42", None),
        ("中国的首都是哪里？", CHINESE, "<think>\nThe user asks in Chinese\n</think>\n\n首都是北京。", True),
        ("请翻译成英文：你好，朋友", "Hello, my friend.", "Hello, friend.", None),  # a translation is no loss
        ("用JSON回答：首都？", '{"capital": "Beijing"}', '{"capital": "Beijing"}', None),
        ("What is the capital?", "It is Paris.", "首都是巴黎。", False),
        ("What is 2 + 2?", "4", "4", None),
    ],
)
def test_language_retention(question, reference, answer, kept):
    assert flags(answer, reference, question=question)["same_language"] is kept


# -- control tokens and usability -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "special", "found"),
    [
        ("fine <b>text</b> a<b and <|x y|>", (), set()),
        ("so<|im_start|>user\nhi", (), {"<|im_start|>"}),
        ("so<|eot_id|><|eot_id|>", (), {"<|eot_id|>"}),
        ("so</s>[INST]", ("</s>", "[INST]"), {"</s>", "[INST]"}),
        ("<think>\nhm\n</think>\n\nyes", ("<think>", "</think>"), set()),
        ("<think>\nhm\n</think>\n\nyes</think>no", (), {"</think>"}),
        ("<think>\n<|im_end|>\n</think>\n\nyes", (), {"<|im_end|>"}),
        ("yes <think> no", (), {"<think>"}),
    ],
)
def test_control_tokens(text, special, found):
    assert metrics.controls(text, special) == found


@pytest.mark.parametrize(
    ("answer", "stopped", "wrong"),
    [
        (GOOD, True, set()),
        ("", True, {"empty"}),
        (" \n", True, {"empty"}),
        ("<think>\nhm", True, set()),  # unusable without another flag: it never came to an answer
        ("<think>\nhm\n</think>\n\n", True, set()),
        (GOOD, False, set()),  # never stops
        ("It is so. " * 30, True, {"loops"}),
        (GOOD + "<|im_start|>", True, {"control"}),
    ],
)
def test_usability(answer, stopped, wrong):
    found = flags(answer, stopped=stopped)
    assert {name for name in ("empty", "loops", "control") if found[name]} == wrong
    assert found["usable"] is (answer == GOOD and stopped) and found["stopped"] is stopped


def test_what_the_data_itself_holds_is_no_control_token():
    call = "<|tool_call>f()<tool_call|>"
    assert flags(call, call, special=("<|tool_call>",))["control"]
    found = flags(call, call, special=("<|tool_call>",), allowed={"<|tool_call>"})
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
    equal, fields, found = metrics.json_fields(json.dumps(reference), json.dumps(answer))
    assert (equal == fields == found) is Draft202012Validator({"const": reference}).is_valid(answer)
    assert 0 <= equal <= min(fields, found)


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
    assert metrics.json_fields(json.dumps(reference), "<think>\n{}\n</think>\n" + json.dumps(answer)) == counts
    assert metrics.json_fields(json.dumps(reference), "no JSON")[0] == 0
    deep = "[" * 900 + "]" * 900
    assert metrics.json_fields(deep, deep) == (1, 1, 1)


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
        (PERSON, '<think>\n7\n</think>\n{"age": 7}', True),
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
    assert metrics.schema_valid(schema, answer) is valid


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
    found = flags(answer, reference, wants_json=True, schema=PERSON)
    names = ("json_valid", "json_negative", "json_exact", "json_schema_valid")
    assert tuple(found[name] for name in names) == (valid, negative, exact, schema)
    assert {flags(answer, reference)[name] for name in names} == {None}
    assert flags(answer, reference, wants_json=True)["json_schema_valid"] is None


# -- failed answers, sums ---------------------------------------------------------------------------------------------
def test_a_failed_answer_counts_against_every_rate_that_applies():
    row = {"question": "How are you?", "wants_json": True}
    found = flags("", '{"mood": "very well indeed"}', False, failed="timeout", schema=True, **row)
    assert {name for name, flag in found.items() if flag is True} == metrics.HARM
    applies = {"exact", "usable", "stopped", "same_language", "json_valid", "json_schema_valid", "json_exact"}
    assert {name for name, flag in found.items() if flag is False} == applies
    assert found["failed"] == "timeout" and found["json_negative"] is None and found["json_fields"] == 1
    assert flags("", "7", False, failed="timeout")["abrupt"] is None


def record(**more):
    empty = dict.fromkeys((*metrics.RATES.values(), "answer_tokens", "reference_tokens", "json_equal", "json_fields"))
    return empty | {"nll": 0.0, "tokens": 0, "turns": 0, "all_nll": 0.0, "all_tokens": 0, "texts": 0} | more


def answered(tokens, failed="", **more):
    return record(answer_tokens=tokens, reference_tokens=4, failed=failed, stopped=not failed, **more)


def test_sums():
    found = metrics.summarize([answered(2), answered(6), answered(0, "timeout"), record()], 0)
    assert set(found) == {"stop_rate", "failed", "answer_tokens", "reference_tokens"}
    assert (found["stop_rate"]["count"], found["stop_rate"]["total"]) == (2, 3)
    assert (found["failed"]["count"], found["failed"]["total"]) == (1, 3)
    # the length of an answer that failed is not known
    assert (found["answer_tokens"]["value"], found["answer_tokens"]["rows"]) == (4, 2)
    rows = [answered(1, json_equal=1, json_fields=1), answered(1, json_equal=0, json_fields=3)]
    share = metrics.summarize(rows, 0)["json_field_match"]
    assert (share["value"], share["equal"], share["fields"], share["rows"]) == (1 / 4, 1, 4, 2)
    assert (share["low"], share["high"]) == (0, 1)  # 1 row of 2, drawn twice: 0/6, 1/4 or 2/2


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
        found = metrics.judge(text, text, True, question=text, wants_json=True, schema=True)
        assert found["exact"] is bool(metrics.final_text(text)) and found["json_exact"] in (None, True)
