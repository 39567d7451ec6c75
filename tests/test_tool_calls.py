"""eval/tool_calls.py: calls read as each family's template writes them, scored as BFCL scores them.

The oracles: the templates (a call that one renders is read back), BFCL's own answers (rendered as calls they are all
right, each changed in one way they are wrong), BFCL's own checker (the long test, on PyPI's bfcl-eval), and cases worked
by hand. Models that always call, never call or answer by heart are scripted behind the real generation.
"""

import importlib
import itertools
import json
import os
import subprocess
import sys
import types
import zipfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: the hub is never asked

import pytest
import torch
from conftest import SHARED
from template_oracle import FAMILIES
from test_chat_templates import serving, small_tokenizer, template
from transformers import Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "eval"))
import tool_calls  # noqa: E402

BFCL = SHARED / "data" / "tools" / "bfcl"
CATEGORIES = ("simple_python", "multiple", "irrelevance", "multi_turn_base")
FILES = [BFCL / f"BFCL_v4_{name}.json" for name in CATEGORIES]
real = pytest.mark.skipif(not BFCL.is_dir(), reason="no ../shared/data/tools/bfcl: BFCL's files not at hand")
long = pytest.mark.long
callers = [family for family in FAMILIES if family.tools and family.name != "nanochat"]
BY_NAME = {family.name: family for family in FAMILIES}

WEATHER = {
    "name": "weather.get",
    "description": "The weather.",
    "parameters": {
        "type": "dict",
        "properties": {
            "city": {"type": "string", "description": "Where."},
            "days": {"type": "integer", "description": "How many."},
            "ratio": {"type": "float", "description": "Of rain."},
            "exact": {"type": "boolean", "description": "Or not."},
            "units": {"type": "array", "items": {"type": "string"}, "description": "Which."},
            "place": {"type": "dict", "description": "Where.", "properties": {"zip": {"type": "string"}}},
            "spans": {"type": "array", "items": {"type": "dict"}, "description": "When."},
            "point": {"type": "tuple", "items": {"type": "float"}, "description": "Where."},
        },
        "required": ["city"],
    },
}
CLOCK = {"name": "clock", "description": "The time.", "parameters": {"type": "dict", "properties": {}, "required": []}}


def tokenizer_of(name):
    family = BY_NAME[name]
    tokenizer = small_tokenizer(family.special, family.plain, family.bos, family.eos)
    tokenizer.chat_template = serving(template(name))
    return tokenizer


def call(name="weather.get", /, **arguments):
    return {"name": name, "arguments": arguments}


# -- calls in the text of an answer --------------------------------------------------------------------


RICH = call(city='Sankt "Pölten", 北京', days=3, ratio=0.5, exact=True, units=["mm", "m"], place={"zip": "0010"})


def rendered(tokenizer, messages):
    """(prompt, answer) as the template writes them, the stop token and what follows it too."""
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    shared = os.path.commonprefix([prompt, text])
    return shared, text[len(shared) :]


def said(calls):
    ids = [{"id": f"{number:09d}", "type": "function", "function": one} for number, one in enumerate(calls)]
    return [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": ids}]


def without_stop(family, text):
    """What generation leaves of an answer: all before its stop token."""
    return text[: max(text.rfind(token) for token in (*family.special, family.eos) if token)]


@pytest.mark.parametrize("family", callers, ids=lambda family: family.name)
def test_a_call_is_read_as_the_template_writes_it(family):
    tokenizer, tools = tokenizer_of(family.name), [tool_calls.tool_of(one) for one in (WEATHER, CLOCK)]
    kind = tool_calls.form_of(tokenizer)
    rich = call(**RICH["arguments"])
    if family.name != "lfm2_5":  # its template writes strings between quotes as they are: a newline is no python
        rich["arguments"]["city"] += "\n2"
    turns = [[rich], [call("clock")], [call(city="Oslo")]]
    turns += [[rich, call("clock"), call(city="Oslo")]] if family.parallel else []
    for calls in turns:
        prompt, text = rendered(tokenizer, said(calls))
        assert without_stop(family, text) != text
        for answer in (text, without_stop(family, text)):
            assert tool_calls.read_calls(tokenizer, kind, prompt, answer, tools) == (calls, False), answer
    plain = tokenizer.apply_chat_template(said([rich])[:1], add_generation_prompt=True, tokenize=False)
    for text in ("It rains, get(it) now {1}.", "", 'JSON: {"city": "Oslo"}', "Use [brackets], then f(x)."):
        assert tool_calls.read_calls(tokenizer, kind, plain, text, tools) == ([], False)


def test_every_family_with_tools_has_a_form_and_every_form_a_family():
    assert {tool_calls.form_of(tokenizer_of(family.name)) for family in callers} == set(tool_calls.FORMS)
    for name in ("gemma3", "phi4", "nanochat"):
        with pytest.raises(tool_calls.BadInput, match="renders no tool call"):
            tool_calls.form_of(tokenizer_of(name))
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace("<tool_call>", "<call>")
    with pytest.raises(tool_calls.BadInput, match="no known form"):
        tool_calls.form_of(tokenizer)


HERMES = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
XML = "<tool_call>\n<function=clock>\n</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("name", "opened", "text", "calls", "malformed"),
    [
        ("qwen3", "", f"<think>\nI could {HERMES}\n</think>\n\nNo.", 0, False),  # thought of, not called
        ("qwen3", "", f"<think>\nhm\n</think>\n\n{HERMES}", 1, False),
        ("qwen3", "", f"<think>\nhm {HERMES}", 0, False),  # never came to an answer
        ("qwen3_thinking_2507", "<think>\n", f"hm {HERMES}</think>\n\n{HERMES}", 1, False),
        ("qwen3", "", HERMES.replace("{}}", "{}"), 0, True),
        ("qwen3", "", HERMES + "\n" + HERMES.replace("{}}", "{}"), 0, True),  # one of two is none of two
        ("qwen3", "", HERMES[:20], 0, True),  # cut off by the budget
        ("qwen3", "", HERMES.removesuffix("</tool_call>"), 1, False),
        ("qwen3", "", HERMES.replace("{}", '"{}"'), 0, True),  # arguments as text
        ("qwen3", "", HERMES.replace("{}", "[1]"), 0, True),
        ("qwen3", "", "<tool_call>\n[1]\n</tool_call>", 0, True),
        ("qwen3", "", '<tool_call>\n{"name": 3, "arguments": {}}\n</tool_call>', 0, True),
        ("qwen3", "", '<tool_call>\n{"name": "clock"}\n</tool_call>', 1, False),  # as TRL reads it
        ("qwen3", "", "Sure.\n" + HERMES, 1, False),
        ("qwen3_5", "<think>\n", f"</think>{XML}", 1, False),
        ("qwen3_5", "<think>\n", XML, 0, False),
        ("qwen3_5", "<think>\n", f"</think>{HERMES}", 0, False),  # another family's form is text here
        ("llama3_1", "", '{"name": "clock", "parameters": {}}', 1, False),
        ("llama3_1", "", '{"name": "clock", "parameters": {}} as you see', 0, True),
        ("gpt_oss", "", "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary "
                        "to=functions.clock <|constrain|>json<|message|>{}", 1, False),
        ("gpt_oss", "", "<|channel|>final<|message|>to=functions.clock", 0, False),
        ("mistral_nemo", "", '[TOOL_CALLS][{"name": "clock", "arguments": {}}', 0, True),
        ("lfm2_5", "", "<|tool_call_start|>[clock(), clock()]<|tool_call_end|>", 2, False),
        ("lfm2_5", "", "<|tool_call_start|>[clock(now())]<|tool_call_end|>", 0, True),
        ("lfm2_5", "", "<|tool_call_start|>clock<|tool_call_end|>", 0, True),
    ],
)  # fmt: skip
def test_what_is_a_call_and_what_is_none(name, opened, text, calls, malformed):
    tokenizer = tokenizer_of(name)
    prompt = tokenizer.apply_chat_template(said([])[:1], add_generation_prompt=True, tokenize=False)
    assert prompt.endswith(opened)
    found = tool_calls.read_calls(tokenizer, tool_calls.form_of(tokenizer), prompt, text, [tool_calls.tool_of(CLOCK)])
    assert found == ([call("clock")] * calls, malformed)


def test_untyped_forms_take_the_types_of_the_schema_and_json_keeps_its_own():
    tools, text = [tool_calls.tool_of(WEATHER)], "<parameter=city>\n7\n</parameter>\n<parameter=days>\n7\n</parameter>"
    answers = {
        "qwen3_5": f"<tool_call>\n<function=weather.get>\n{text}\n</function>\n</tool_call>",
        "qwen3": '<tool_call>\n{"name": "weather.get", "arguments": {"city": 7, "days": "7"}}\n</tool_call>',
    }
    found = {}
    for name, answer in answers.items():
        tokenizer = tokenizer_of(name)
        form = tool_calls.form_of(tokenizer)
        [[found[name]], _] = tool_calls.read_calls(tokenizer, form, "", answer, tools)
    assert found == {"qwen3_5": call(city="7", days=7), "qwen3": call(city=7, days="7")}


def test_python_calls_take_names_from_the_function():
    function = {"name": "sort", "parameters": {"properties": {"file": {}, "up": {}}}}
    assert tool_calls.python_calls("sort('a b', up=true)", [function]) == [call("sort", file="a b", up=True)]
    assert tool_calls.python_calls("[a.b(x=[1, null]), c()]") == [call("a.b", x=[1, None]), call("c")]
    for wrong in ("sort('a', True, 3)", "f(1)", "f(x=y)", "f(", "3"):
        with pytest.raises((ValueError, SyntaxError)):
            tool_calls.python_calls(wrong, [function])


# -- right or wrong ------------------------------------------------------------------------------------


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def bfcl(category):
    """[(functions, answers)] of a category of single turns."""
    rows = rows_of(BFCL / f"BFCL_v4_{category}.json")
    truth = {row["id"]: row["ground_truth"] for row in rows_of(BFCL / "possible_answer" / f"BFCL_v4_{category}.json")}
    return [(row["function"], truth[row["id"]]) for row in rows]


def allowed_one(values):
    """The first value that an answer allows, None where it only allows to leave it out."""
    value = next((value for value in values if value != ""), None)
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [{key: allowed_one(one) for key, one in item.items() if allowed_one(one) is not None} for item in value]
    if isinstance(value, dict):
        return {key: allowed_one(one) for key, one in value.items() if allowed_one(one) is not None}
    return value


def right_calls(answers, functions=None):
    """The calls that answers name, without what may be left out where functions are given."""
    calls = []
    for answer in answers:
        [(name, allowed)] = answer.items()
        needed = [key for one in functions or [] if one["name"] == name for key in one["parameters"]["required"]]
        kept = {key for key, values in allowed.items() if not functions or key in needed or "" not in values}
        kept = {key: allowed_one(allowed[key]) for key in allowed if key in kept}
        calls.append(call(name, **{key: value for key, value in kept.items() if value is not None}))
    return calls


def changed(value):
    """Another value of the same type, and one of another type."""
    if isinstance(value, bool):
        return not value, "maybe"
    if isinstance(value, (int, float)):
        return value + 987654, f"{value} zz"
    if isinstance(value, str):
        return value + " zz", {"zz": 1}
    if isinstance(value, list):
        return value + value[:1] or ["zz"], "zz"
    return {**value, "zz": 1}, "zz"


def mutants(calls, functions, answers):
    """(kind, calls) of calls that are wrong in one way each."""
    [(name, allowed)] = answers[0].items()
    [schema] = [one["parameters"] for one in functions if one["name"] == name]
    first, rest = calls[0], calls[1:]
    yield "no call", []
    yield "extra call", [*calls, call("zz")]
    yield "same call twice", [*calls, first]
    yield "wrong function", [call(first["name"] + "_zz", **first["arguments"]), *rest]
    yield "unknown parameter", [call(name, **first["arguments"], zz=1), *rest]
    for key, value in first["arguments"].items():
        if key in schema["required"] or "" not in allowed[key]:
            less = {other: kept for other, kept in first["arguments"].items() if other != key}
            yield "missing parameter", [call(name, **less), *rest]
        other, odd = changed(value)
        if other not in allowed[key]:
            yield "wrong value", [call(name, **first["arguments"] | {key: other}), *rest]
        yield "wrong type", [call(name, **first["arguments"] | {key: odd}), *rest]


@real
@pytest.mark.parametrize("category", ["simple_python", "multiple"])
def test_bfcls_own_answers_are_right_and_every_change_is_wrong(category):
    seen = dict.fromkeys(("no call", "extra call", "same call twice", "wrong function"), 0)
    for functions, answers in bfcl(category):
        assert tool_calls.mismatch(right_calls(answers), functions, answers) == ""
        assert tool_calls.mismatch(right_calls(answers, functions), functions, answers) == ""
        for kind, calls in mutants(right_calls(answers), functions, answers):
            found = tool_calls.mismatch(calls, functions, answers)
            assert found, (kind, calls)
            seen[kind] = seen.get(kind, 0) + 1
            if kind in ("no call", "wrong function", "unknown parameter", "missing parameter"):
                assert found == kind
    assert set(seen) == {"no call", "extra call", "same call twice", "wrong function", "unknown parameter",
                         "missing parameter", "wrong value", "wrong type"}  # fmt: skip
    assert min(seen.values()) >= 200, seen


def verdict(allowed, **arguments):
    return tool_calls.mismatch([call(**arguments)], [WEATHER, CLOCK], [{"weather.get": allowed}])


@pytest.mark.parametrize(
    ("allowed", "arguments", "reason"),
    [
        ({"city": ["New York, NY"]}, {"city": "new york ny"}, ""),
        ({"city": ["it's_a-b.c/d*e^f"]}, {"city": 'IT"SABCDEF'}, ""),
        ({"city": ["a;b"]}, {"city": "ab"}, "wrong value"),
        ({"city": ["Oslo"], "days": [3, ""]}, {"city": "Oslo"}, ""),
        ({"city": ["Oslo"], "days": [3]}, {"city": "Oslo"}, "missing parameter"),
        ({"city": [""]}, {}, "missing parameter"),  # the schema requires it
        ({"city": ["Oslo"]}, {"city": "Oslo", "days": 3}, "unknown parameter"),  # the schema knows it, the answer not
        ({"city": ["Oslo"], "zz": [3]}, {"city": "Oslo", "zz": 3}, "unknown parameter"),
        ({"city": ["Oslo"], "days": [3]}, {"city": "Oslo", "days": 3.0}, "wrong type"),
        ({"city": ["Oslo"], "days": [1]}, {"city": "Oslo", "days": True}, "wrong type"),
        ({"city": ["Oslo"], "days": [3]}, {"city": "Oslo", "days": None}, "wrong type"),
        ({"city": ["Oslo"], "ratio": [3]}, {"city": "Oslo", "ratio": 3}, ""),  # a whole number is a float
        ({"city": ["Oslo"], "ratio": [0.5]}, {"city": "Oslo", "ratio": 0.5}, ""),
        ({"city": ["Oslo"], "days": ["n"]}, {"city": "Oslo", "days": "n"}, ""),  # a variable
        ({"city": ["Oslo"], "days": ["n"]}, {"city": "Oslo", "days": "N"}, "wrong value"),  # compared as it stands
        ({"city": ["Oslo"], "units": [["mm", "m"]]}, {"city": "Oslo", "units": ["MM", "m."]}, ""),
        ({"city": ["Oslo"], "units": [["mm", "m"]]}, {"city": "Oslo", "units": ["m", "mm"]}, "wrong value"),
        ({"city": ["Oslo"], "units": [["mm"]]}, {"city": "Oslo", "units": [1]}, "wrong type"),
        ({"city": ["Oslo"], "point": [[1.0, 2.0]]}, {"city": "Oslo", "point": [1, 2]}, "wrong type"),
        ({"city": ["Oslo"], "point": [[1, 2]]}, {"city": "Oslo", "point": [1, 2]}, ""),
        ({"city": ["Oslo"], "place": [{"zip": ["0010"]}]}, {"city": "Oslo", "place": {"zip": "00-10"}}, ""),
        ({"city": ["Oslo"], "place": [{"zip": ["1", ""]}]}, {"city": "Oslo", "place": {}}, ""),
        ({"city": ["Oslo"], "place": [{"zip": ["1"]}]}, {"city": "Oslo", "place": {}}, "wrong value"),
        ({"city": ["Oslo"], "place": [{"zip": ["1"]}]}, {"city": "Oslo", "place": {"zip": "1", "x": 1}}, "wrong value"),
        ({"city": ["Oslo"], "place": [{"zip": [["A"]]}]}, {"city": "Oslo", "place": {"zip": ["a"]}}, "wrong value"),
        ({"city": ["Oslo"], "place": ["", {"zip": ["1"]}]}, {"city": "Oslo", "place": {}}, "wrong value"),
        ({"city": ["Oslo"], "spans": [[{"a": ["X"]}]]}, {"city": "Oslo", "spans": [{"a": "x"}]}, ""),
        ({"city": ["Oslo"], "spans": [[{"a": [1]}]]}, {"city": "Oslo", "spans": [{"a": 1}, {"a": 1}]}, "wrong value"),
    ],
)
def test_values_by_hand(allowed, arguments, reason):
    assert verdict(allowed, **arguments) == reason


def test_several_calls_in_any_order():
    answers = [{"weather.get": {"city": ["Oslo"]}}, {"clock": {}}, {"weather.get": {"city": ["Rom"]}}]
    calls = [call(city="Oslo"), call("clock"), call(city="Rom")]
    for order in itertools.permutations(calls):
        assert tool_calls.mismatch(order, [WEATHER, CLOCK], answers) == ""
    for wrong in (calls[:2], [*calls, call("clock")], [calls[0], calls[0], calls[1]], [calls[1], *calls[1:]]):
        assert tool_calls.mismatch(wrong, [WEATHER, CLOCK], answers)


@pytest.mark.parametrize(
    ("reference", "calls", "same"),
    [
        ([call(days=1)], [call(days=1.0)], True),
        ([call(days=1)], [call(days=True)], False),
        ([call(days=1)], [call(days="1")], False),
        ([call(city="Oslo")], [call(city="oslo")], False),
        ([call(place={"a": 1, "b": [2.0]})], [call(place={"b": [2], "a": 1})], True),
        ([call(units=[1, 2])], [call(units=[2, 1])], False),
        ([call("clock"), call(days=1)], [call(days=1), call("clock")], True),
        ([call("clock")], [call("clock")] * 2, False),
        ([{"name": "weather.get", "arguments": '{"days": 1}'}], [call(days=1)], True),
        ([call(days=None)], [call()], False),
        ([], [], True),
        ([], [call()], False),
        ([call()], [], False),
    ],
)
def test_calls_of_our_rows_are_compared_as_json(reference, calls, same):
    message = said([])[1] | {"tool_calls": [{"type": "function", "function": one} for one in reference]}
    assert tool_calls.same_calls(message, calls) is same
    if not reference:
        assert tool_calls.same_calls({"role": "assistant", "content": "Hi"}, calls) is same
