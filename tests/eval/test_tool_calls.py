"""eval/tool_calls.py: calls read as each family's template writes them, scored as BFCL scores them.

The oracles: the templates (a call that one renders is read back), BFCL's own answers (rendered as calls they are all
right, each changed in one way they are wrong), BFCL's own checker (the long tests, on PyPI's bfcl-eval) and cases
worked by hand. Models that always call, never call or answer by heart are scripted behind the real generation.

Breaks tried, each seen here. Of the comparison: case or ^ kept; extra calls pass; a call answers twice; required,
unknown and answer-only parameters unchecked; a whole number is no float; types in lists unchecked; variables
standardised; the order of lists ignored; keys of objects unchecked. Of the reading: the answer parsed without its
tools, or without its prompt, which may open a thought; malformed calls unseen. Of the templates: Kimi's calls under
nine digits, Mistral's under three; replies without ids; a template taken whose calls are not read back, or that lists
no tools. Of the command: irrelevance right where the answer failed; relevance always; the first call against all;
excluded functions shown; a history without calls or without answers; one mode only; defaults that may not be said;
types left in BFCL's words; ground truth or functions that do not parse taken for the model's fault.
"""

import importlib
import itertools
import json
import os
import random
import re
import subprocess
import sys
import types
import zipfile
from collections import Counter

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from data_prep.common.answer_formats import FORMATS, python_calls
from data_prep.common.answers import parse_answer
from data_prep.common.errors import UsageError
from eval import tool_calls
from eval.common import bfcl, models, tool_messages
from eval.common.call_match import mismatch
from tests.helpers.runs import SHARED
from tests.helpers.template_oracle import ALL_FAMILIES
from tests.templates.test_chat_templates import serving, small_tokenizer, template

BFCL = SHARED / "data" / "tools" / "bfcl"
CATEGORIES = ("simple_python", "multiple", "irrelevance", "multi_turn_base")
FILES = [BFCL / f"BFCL_v4_{name}.json" for name in CATEGORIES]
real = pytest.mark.skipif(not BFCL.is_dir(), reason="../shared is absent: BFCL's files")
long = pytest.mark.long
callers = [family for family in ALL_FAMILIES if family.tools and family.name != "nanochat"]
BY_NAME = {family.name: family for family in ALL_FAMILIES}

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
NO_CALLS = ("It rains, get(it) now {1}.", "", 'JSON: {"city": "Oslo"}', "Use [brackets], then f(x).")


def rendered(tokenizer, messages):
    """(prompt, answer) as the template writes them, the stop token and what follows it too."""
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    shared = os.path.commonprefix([prompt, text])
    return shared, text[len(shared) :]


def said(calls, name=""):
    """A question and calls that answer it, with the ids that the models of that name are trained on."""
    ids = [f"{number:09d}" for number in range(len(calls))]
    if name.startswith("kimi"):
        ids = [f"functions.{one['name']}:{number}" for number, one in enumerate(calls)]
    calls = [{"id": one, "type": "function", "function": function} for one, function in zip(ids, calls, strict=True)]
    return [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": calls}]


def without_stop(family, text):
    """What generation leaves of an answer: all before its stop token."""
    return text[: max(text.rfind(token) for token in (*family.special, family.eos) if token)]


def read(name, prompt, text, functions):
    """(calls, whether they are malformed) of an answer, as the command takes them."""
    tools = bfcl.list_tools(functions)
    task = tool_calls.Task("a", "irrelevance", 1, [], functions, None)
    asked = tool_calls.AskedTask(task, None, tools, models.Prompt(prompt, []))
    answer = parse_answer(text, name, prompt, tools)
    line = tool_calls.judge(asked, models.Answer(text, 1, True), answer)
    return line["calls"], line["malformed"]


@pytest.mark.parametrize("family", callers, ids=lambda family: family.name)
def test_a_call_is_read_as_the_template_writes_it(family):
    tokenizer, functions = tokenizer_of(family.name), [WEATHER, CLOCK]
    rich = call(**RICH["arguments"])
    rich["arguments"]["city"] += "\n2"
    turns = [[rich], [call("clock")], [call(city="Oslo")]]
    turns += [[rich, call("clock"), call(city="Oslo")]] if family.parallel else []
    for calls in turns:
        prompt, text = rendered(tokenizer, said(calls, family.name))
        assert without_stop(family, text) != text
        for answer in (text, without_stop(family, text)):
            assert read(family.name, prompt, answer, functions) == (calls, False), answer
    plain = tokenizer.apply_chat_template(said([rich])[:1], add_generation_prompt=True, tokenize=False)
    for text in NO_CALLS:
        assert read(family.name, plain, text, functions) == ([], False)


def test_every_family_with_tools_is_asked_and_no_other():
    for family in ALL_FAMILIES:
        tokenizer = tokenizer_of(family.name)
        if family in callers:
            assert tool_messages.find_calling_family(tokenizer) == family.name
        else:
            with pytest.raises(UsageError, match="renders no tool call|in no known form"):
                tool_messages.find_calling_family(tokenizer)
    assert len(ALL_FAMILIES) == 49 and len(callers) == 40
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace("<tool_call>", "<call>")
    with pytest.raises(UsageError, match="no known form"):
        tool_messages.find_calling_family(tokenizer)


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
        *(("qwen3", "", HERMES.replace("{}", value), 0, True) for value in ("[1]", "[]", '""', "null")),
        ("qwen3", "", "<tool_call>\n[1]\n</tool_call>", 0, True),
        ("qwen3", "", '<tool_call>\n{"name": 3, "arguments": {}}\n</tool_call>', 0, True),
        ("qwen3", "", '<tool_call>\n{"name": "clock"}\n</tool_call>', 1, False),  # as TRL reads it
        ("qwen3", "", "Sure.\n" + HERMES, 1, False),
        ("qwen3_5", "<think>\n", f"</think>{XML}", 1, False),
        ("qwen3_5", "<think>\n", XML, 0, False),
        ("qwen3_5", "<think>\n", f"</think>{HERMES}", 0, True),  # begins a call, in another family's form
        ("llama3_1", "", '{"name": "clock", "parameters": {}}', 1, False),
        ("llama3_1", "", '{"name": "clock", "parameters": {}} as you see', 0, True),
        (
            "gpt_oss",
            "",
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary "
            "to=functions.clock <|constrain|>json<|message|>{}",
            1,
            False,
        ),
        ("gpt_oss", "", "<|channel|>final<|message|>to=functions.clock", 0, False),
        ("mistral_nemo", "", '[TOOL_CALLS][{"name": "clock", "arguments": {}}', 0, True),
        ("lfm2_5", "", "<|tool_call_start|>[clock(), clock()]<|tool_call_end|>", 2, False),
        ("lfm2_5", "", "<|tool_call_start|>[clock(now())]<|tool_call_end|>", 0, True),
        ("lfm2_5", "", "<|tool_call_start|>clock<|tool_call_end|>", 0, True),
        ("lfm2_5", "", "<|tool_call_start|>[clock(x={1, 2})]<|tool_call_end|>", 0, True),  # a set is no JSON
        ("qwen3", "", HERMES.replace("{}", '{"x": "\\ud800"}'), 0, True),  # half a character, which no file can hold
    ],
)
def test_what_is_a_call_and_what_is_none(name, opened, text, calls, malformed):
    tokenizer = tokenizer_of(name)
    prompt = tokenizer.apply_chat_template(said([])[:1], add_generation_prompt=True, tokenize=False)
    assert prompt.endswith(opened)
    assert read(name, prompt, text, [CLOCK]) == ([call("clock")] * calls, malformed)


@pytest.mark.parametrize("family", callers, ids=lambda family: family.name)
def test_no_answer_stops_a_run(family):
    """Calls with pieces cut out, doubled or replaced: read or malformed, never an error; most are no longer right."""
    tokenizer, rng, same = tokenizer_of(family.name), random.Random(0), 0
    prompt, text = rendered(tokenizer, said([RICH], family.name))
    for _ in range(150):
        start, end = sorted(rng.sample(range(len(text)), 2))
        piece = rng.choice(["", text[start:end] * 2, "[", "}", '"', "\x00", "null", "[" * 5000, text])
        calls, malformed = read(family.name, prompt, text[:start] + piece + text[end:], [WEATHER])
        assert isinstance(malformed, bool) and not (malformed and calls)
        assert all(isinstance(one["name"], str) and isinstance(one["arguments"], dict) for one in calls)
        same += calls == [RICH]
    assert same < 50


@pytest.mark.parametrize("family", [one for one in callers if one.tool_list], ids=lambda family: family.name)
def test_calls_of_the_history_are_not_read_again(family):
    """The prompt ends with the reply to a call; the answer is words, which are read without what marks them."""
    tokenizer, history = tokenizer_of(family.name), said([call("clock")], family.name)
    number = history[1]["tool_calls"][0]["id"]
    history += [{"role": "tool", "tool_call_id": number, "name": "clock", "content": "12"}]
    prompt, text = rendered(tokenizer, [*history, {"role": "assistant", "content": "It [rains], {now}."}])
    found = parse_answer(without_stop(family, text), family.name, prompt)
    assert found.content.strip() == "It [rains], {now}." and found.is_complete
    assert (found.reasoning, found.tool_calls, found.error) == (None, [], "")


def test_ids_are_those_of_each_family():
    """By hand: Mistral's nine digits, Kimi's functions.NAME:N; a reply has the id of its call."""
    calls = [call("a"), call("b")]
    replies = [{"role": "tool", "name": one["name"], "content": "1"} for one in calls]
    messages = [said(calls)[0], tool_messages.call_message(calls), *replies, tool_messages.call_message([call("a")])]
    for name, expected in (
        ("mistral_nemo", ["000000000", "000000001", "000000002"]),
        ("kimi_k2", ["functions.a:0", "functions.b:1", "functions.a:2"]),
    ):
        numbered = tool_messages.add_call_ids(messages, name)
        assert [one["id"] for message in numbered for one in message.get("tool_calls", [])] == expected
        assert [one.get("tool_call_id") for one in numbered] == [None, None, *expected[:2], None]
    assert "id" not in messages[1]["tool_calls"][0]  # those that were given are as before


def test_untyped_forms_take_the_types_of_the_schema_and_json_keeps_its_own():
    text = "<parameter=city>\n7\n</parameter>\n<parameter=days>\n7\n</parameter>"
    answers = {
        "qwen3_5": f"<tool_call>\n<function=weather.get>\n{text}\n</function>\n</tool_call>",
        "qwen3": '<tool_call>\n{"name": "weather.get", "arguments": {"city": 7, "days": "7"}}\n</tool_call>',
    }
    found = {name: read(name, "", answer, [WEATHER]) for name, answer in answers.items()}
    typed, kept = call(city="7", days=7), call(city=7, days="7")
    assert found == {"qwen3_5": ([typed], False), "qwen3": ([kept], False)}


def test_python_calls_take_names_from_the_function():
    function = {"name": "sort", "parameters": {"properties": {"file": {}, "up": {}}}}
    properties = bfcl.list_properties([function])
    assert python_calls("sort('a b', up=true)", properties) == [call("sort", file="a b", up=True)]
    assert python_calls("[a.b(x=[1, null]), c()]", {}) == [call("a.b", x=[1, None]), call("c")]
    for wrong in ("sort('a', True, 3)", "f(1)", "f(x=y)", "f(", "3"):
        with pytest.raises((ValueError, SyntaxError)):
            python_calls(wrong, properties)


# -- right or wrong ------------------------------------------------------------------------------------


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def truth_of(category):
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
    for functions, answers in truth_of(category):
        assert mismatch(right_calls(answers), functions, answers) == ""
        assert mismatch(right_calls(answers, functions), functions, answers) == ""
        for kind, calls in mutants(right_calls(answers), functions, answers):
            found = mismatch(calls, functions, answers)
            assert found, (kind, calls)
            seen[kind] = seen.get(kind, 0) + 1
            if kind in ("no call", "wrong function", "unknown parameter", "missing parameter"):
                assert found == kind
    assert set(seen) == {
        "no call",
        "extra call",
        "same call twice",
        "wrong function",
        "unknown parameter",
        "missing parameter",
        "wrong value",
        "wrong type",
    }
    assert min(seen.values()) >= 200, seen


def verdict(allowed, **arguments):
    return mismatch([call(**arguments)], [WEATHER, CLOCK], [{"weather.get": allowed}])


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
        ({"city": ["Oslo"], "ratio": [3.0]}, {"city": "Oslo", "ratio": 3}, ""),  # a whole number is a float
        ({"city": ["Oslo"], "ratio": [3]}, {"city": "Oslo", "ratio": 3.0}, ""),
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
        assert mismatch(order, [WEATHER, CLOCK], answers) == ""
    for wrong in (calls[:2], [*calls, call("clock")], [calls[0], calls[0], calls[1]], [calls[1], *calls[1:]]):
        assert mismatch(wrong, [WEATHER, CLOCK], answers)
    twice = [{"clock": {}}, {"clock": {}}]  # no call stands for two answers
    assert mismatch([call("clock")] * 2, [WEATHER, CLOCK], twice) == ""
    assert mismatch([call("clock"), calls[0]], [WEATHER, CLOCK], twice) == "wrong function"


# -- the command ---------------------------------------------------------------------------------------


class Scripted:
    """A model that answers the text of a prompt with a text, behind the real generation."""

    device = "cpu"

    def __init__(self, tokenizer, say, context=100_000):
        self.tokenizer, self.say, self.config = tokenizer, say, Qwen3Config(max_position_embeddings=context)

    def generate(self, input_ids, attention_mask):
        config, rows = self.generation_config, []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            text = self.say(self.tokenizer.decode(ids[mask.bool()]))
            said = self.tokenizer(text, add_special_tokens=False)["input_ids"] + config.eos_token_id
            rows.append(said[: config.max_new_tokens])
        width = max(map(len, rows))
        rows = [row + [config.pad_token_id] * (width - len(row)) for row in rows]
        return torch.cat([input_ids, torch.tensor(rows)], dim=1)


def scripted(monkeypatch, module, name, say, **more):
    """Make a command of this room open a scripted model with the template of that name."""
    tokenizer = tokenizer_of(name)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    opened = models.OpenedModel(Scripted(tokenizer, say, **more), tokenizer, {stop})
    monkeypatch.setattr(module, "open_model", lambda *_: opened)
    return tokenizer


def write_rows(path, rows):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


LS = {
    "name": "ls",
    "description": "List.",
    "parameters": {
        "type": "dict",
        "properties": {
            "path": {"type": "string", "description": "x"},
            "all": {"type": "boolean", "description": "x", "default": False},
        },
        "required": ["path"],
    },
    "response": {},
}
DOCS = [LS, {**CLOCK, "name": "rm", "response": {}}, {**CLOCK, "name": "pwd", "response": {}}]


def ask_row(name, text, functions=(WEATHER, CLOCK)):
    return {"id": name, "question": [[{"role": "user", "content": text}]], "function": list(functions)}


ASKED = {  # file: its rows, their answers, what is right to say to each prompt by its last message
    "simple_python": (
        [ask_row("simple_python_0", "A?", [WEATHER]), ask_row("simple_python_1", "B?", [WEATHER])],
        [[{"weather.get": {"city": ["Oslo"]}}], [{"weather.get": {"city": ["Rom"], "days": [2, ""]}}]],
        {"A?": [call(city="Oslo")], "B?": [call(city="Rom", days=2)]},
    ),
    "multiple": ([ask_row("multiple_0", "C?")], [[{"clock": {}}]], {"C?": [call("clock")]}),
    "parallel": (
        [ask_row("parallel_0", "D?")],
        [[{"clock": {}}, {"weather.get": {"city": ["Oslo"]}}]],
        {"D?": [call(city="Oslo"), call("clock")]},
    ),
    "irrelevance": ([ask_row("irrelevance_0", "E?"), ask_row("irrelevance_1", "F?")], None, {"E?": [], "F?": []}),
    "live_relevance": ([ask_row("live_relevance_0-0-0", "G?")], None, {"G?": [call("clock", x=1)]}),
    "multi_turn_base": (
        [
            {
                "id": "multi_turn_base_0",
                "involved_classes": ["GorillaFileSystem"],
                "excluded_function": ["rm"],
                "question": [[{"role": "user", "content": text}] for text in ("H?", "I?", "J?")],
            }
        ],
        [[["ls('a')", "pwd()"], [], ["ls(path='b', all=True)"]]],
        {"H?": [call("ls", path="a"), call("pwd")], "I?": [], "J?": [call("ls", path="b", all=True)]},
    ),
}
RIGHT = {text: calls for _, _, right in ASKED.values() for text, calls in right.items()}


@pytest.fixture
def data(tmp_path):
    """Six files in BFCL's shape with their answers and the functions of the conversation."""
    files = [write_rows(tmp_path / f"BFCL_v4_{name}.json", rows) for name, (rows, _, _) in ASKED.items()]
    for file, (rows, truth, _) in zip(files, ASKED.values(), strict=True):
        if truth:
            found = [{"id": row["id"], "ground_truth": answers} for row, answers in zip(rows, truth, strict=True)]
            write_rows(tmp_path / "possible_answer" / file.name, found)
    write_rows(tmp_path / "multi_turn_func_doc" / "gorilla_file_system.json", DOCS)
    return files


def spoken(calls):
    return "\n".join(f"<tool_call>\n{json.dumps(one)}\n</tool_call>" for one in calls) or "No."


def last_message(prompt):
    return prompt.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]


def run(tmp_path, files, *more):
    """(report, lines) of a run that must succeed."""
    command = [tmp_path, "--data", *files, "--out", tmp_path / "out", *more]
    assert tool_calls.main([str(word) for word in command]) == 0
    lines = rows_of(tmp_path / "out" / "tool_calls.jsonl")
    return json.loads((tmp_path / "out" / "tool_calls.json").read_text()), lines


def counts(metrics):
    return {name: (found["count"], found["total"]) for name, found in metrics.items()}


ALL = {
    "ast": 4,
    "irrelevance": 2,
    "relevance": 1,
    "multi_turn_ast": 3,
    "multi_turn_first_call": 3,
    "malformed": 10,
    "stop_rate": 10,
}
PLANTED = {  # a model: what it says to a last message, how often each metric holds
    "by heart": (lambda text: spoken(RIGHT[text]), ALL | {"malformed": 0}),
    "always calls": (
        lambda text: spoken([call(city="Oslo")]),
        dict.fromkeys(ALL, 0) | {"ast": 1, "relevance": 1, "stop_rate": 10},
    ),
    "never calls": (
        lambda text: "It is sunny.",
        dict.fromkeys(ALL, 0) | {"irrelevance": 2, "multi_turn_ast": 1, "multi_turn_first_call": 1, "stop_rate": 10},
    ),
    "broken json": (
        lambda text: spoken([call()])[:-20],
        dict.fromkeys(ALL, 0)
        | {"irrelevance": 2, "multi_turn_ast": 1, "multi_turn_first_call": 1, "malformed": 10, "stop_rate": 10},
    ),
    "one call at most": (
        lambda text: spoken(RIGHT[text][:1]),
        ALL | {"ast": 3, "multi_turn_ast": 2, "malformed": 0},
    ),
    "knows no types": (
        lambda text: spoken([call(one["name"], **dict.fromkeys(one["arguments"], "2")) for one in RIGHT[text]]),
        ALL | {"ast": 1, "multi_turn_ast": 1, "multi_turn_first_call": 1, "malformed": 0},
    ),
    "never stops": (lambda text: spoken(RIGHT[text]) + " and" * 500, ALL | {"malformed": 0, "stop_rate": 0}),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_planted_models(tmp_path, data, monkeypatch, planted):
    say, expected = PLANTED[planted]
    scripted(monkeypatch, tool_calls, "qwen3_instruct_2507", lambda prompt: say(last_message(prompt)))
    report, lines = run(tmp_path, data)
    assert counts(report["metrics"]) == {name: (count, ALL[name]) for name, count in expected.items()}
    assert set(report["groups"]) == {"category"} and set(report["groups"]["category"]) == set(ASKED)
    assert [line["id"] for line in lines[:2]] == ["simple_python_0", "simple_python_1"] and len(lines) == 10
    assert [line["turn"] for line in lines[-3:]] == [1, 2, 3]


@pytest.mark.parametrize("family", [one for one in callers if one.tool_list], ids=lambda family: family.name)
def test_every_family_by_heart_through_the_whole_command(tmp_path, data, monkeypatch, family):
    """Each template writes the ground truth, behind its own prompt in every mode: all of it is right."""
    tokenizer = tokenizer_of(family.name)
    asked = {"A?": [RICH], "C?": [call("clock")], "D?": [call(city="Oslo"), call("clock")], "E?": []}
    answers = {}
    for text, calls in asked.items():
        if len(calls) > 1 and not family.parallel:
            continue
        answer = {"role": "assistant", "content": "No."}
        if calls:
            answer = said(calls, family.name)[1]
        _, written = rendered(tokenizer, [said([])[0], answer])
        answers[text] = re.sub(r"^\s*(<think>\s*)?</think>\s*", "", without_stop(family, written))

    def say(prompt):
        [text] = [text for text in asked if text in prompt]
        opened = re.search(r"<think>\s*$", prompt) is not None
        return "hm\n</think>\n\n" * opened + answers[text]

    rows = [ask_row(f"simple_python_{number}", text) for number, text in enumerate(answers) if asked[text]]
    truth = []
    for row in rows:
        calls = asked[row["question"][0][0]["content"]]
        truth.append([{one["name"]: {key: [wrapped(item)] for key, item in one["arguments"].items()}} for one in calls])
    none = write_rows(tmp_path / "BFCL_v4_irrelevance.json", [ask_row("irrelevance_0", "E?")])
    file = write_rows(tmp_path / "BFCL_v4_simple_python.json", rows)
    found = [{"id": row["id"], "ground_truth": answer} for row, answer in zip(rows, truth, strict=True)]
    write_rows(tmp_path / "possible_answer" / file.name, found)
    stop = next(token for token in FORMATS[family.name].stops if token in tokenizer.get_vocab())
    opened = models.OpenedModel(Scripted(tokenizer, say), tokenizer, {tokenizer.convert_tokens_to_ids(stop)})
    monkeypatch.setattr(tool_calls, "open_model", lambda *_: opened)
    report, lines = run(tmp_path, [file, none], "--max_new_tokens", 2000)
    modes = 2 if lines[0]["mode"] else 1
    assert counts(report["metrics"]) == {
        "ast": (len(rows) * modes, len(rows) * modes),
        "irrelevance": (modes, modes),
        "malformed": (0, len(lines)),
        "stop_rate": (len(lines), len(lines)),
    }
    assert report["settings"]["family"] == family.name


def wrapped(value):
    """A value as an answer of BFCL allows it."""
    return {key: [item] for key, item in value.items()} if isinstance(value, dict) else value


def test_modes_are_told_apart(tmp_path, data, monkeypatch):
    """A model that calls only where the prompt leaves it to think; both modes are asked by default."""

    def say(prompt):
        return (
            "No."
            if prompt.endswith("</think>\n\n")
            else f"<think>\nhm\n</think>\n\n{spoken(RIGHT[last_message(prompt)])}"
        )

    scripted(monkeypatch, tool_calls, "qwen3", say)
    report, lines = run(tmp_path, data[:1])
    assert {mode: counts(found)["ast"] for mode, found in report["groups"]["mode"].items()} == {
        "think": (2, 2),
        "no_think": (0, 2),
    }
    assert len(lines) == 4 and counts(report["metrics"])["ast"] == (2, 4)
    report, lines = run(tmp_path, data[:1], "--mode", "no_think")
    assert len(lines) == 2 and counts(report["metrics"])["ast"] == (0, 2)


def row_of(row, truth, folder, place=""):
    return bfcl.BfclRow(row, place, truth, folder, bfcl.BfclFiles())


def test_a_call_in_a_thought_that_the_prompt_opens_and_nothing_ends_is_none(tmp_path, data, monkeypatch):
    scripted(monkeypatch, tool_calls, "qwen3_thinking_2507", lambda prompt: spoken(RIGHT[last_message(prompt)]))
    report, _ = run(tmp_path, data[:1])
    assert counts(report["metrics"]) == {"ast": (0, 2), "malformed": (0, 2), "stop_rate": (2, 2)}


def test_the_history_is_the_ground_truth(tmp_path, data):
    """By hand: what stands before the last turn, one call a message, as templates with one call a turn need it."""
    [row], [truth] = rows_of(data[-1]), ASKED["multi_turn_base"][1]
    tasks = tool_calls.list_tasks(row_of(row, truth, tmp_path))
    assert [len(task.messages) for task in tasks] == [1, 7, 9]
    assert [one["name"] for one in tasks[0].functions] == ["ls", "pwd"]
    tools = bfcl.list_tools(tasks[0].functions)
    for family in callers:
        if family.tool_list:
            words = (tokenizer_of(family.name), family.name, "x", tasks[-1].messages, tools, None)
            assert "ls" in tool_messages.render_prompt(*words).text
    words = (tokenizer_of("chatml"), "chatml", "x", tasks[1].messages, tools, None)
    assert tool_messages.render_prompt(*words).text.partition("user\n")[2] == (
        'H?<|im_end|>\n<|im_start|>assistant\n<tool_call>\n{"name": "ls", "arguments": {"path": "a"}}\n</tool_call>'
        "<|im_end|>\n<|im_start|>tool\nnull<|im_end|>\n<|im_start|>assistant\n"
        '<tool_call>\n{"name": "pwd", "arguments": {}}\n</tool_call><|im_end|>\n<|im_start|>tool\nnull<|im_end|>\n'
        "<|im_start|>assistant\nDone.<|im_end|>\n<|im_start|>user\nI?<|im_end|>\n<|im_start|>assistant\n"
    )
    given = {"default said": {"all": False}, "default left out": {}, "another": {"all": True}}
    found = {
        kind: mismatch([call("ls", path="a", **more), call("pwd")], DOCS, tasks[0].answers)
        for kind, more in given.items()
    }
    assert found == {"default said": "", "default left out": "", "another": "wrong value"}


def test_a_prompt_beyond_the_context_is_wrong_everywhere(tmp_path, data, monkeypatch):
    scripted(monkeypatch, tool_calls, "qwen3_instruct_2507", lambda prompt: "No.", context=40)
    report, lines = run(tmp_path, data)
    assert counts(report["metrics"]) == {name: (0, total) for name, total in ALL.items()}
    assert {line["failed"] for line in lines} == {"longer than the context"}


def test_only_what_fits_the_context_is_asked():
    """Each prompt gets its own answer, those beyond the context fail without having been asked."""
    asked, tokenizer = [], tokenizer_of("qwen3")
    model = Scripted(tokenizer, lambda prompt: asked.append(prompt) or prompt.upper(), context=3)
    prompts = [tokenizer(text)["input_ids"] for text in ("qz", "q" * 50, "zq", "qqq")]
    assert [len(prompt) for prompt in prompts] == [2, 50, 2, 3]
    answers = models.ask(model, tokenizer, {tokenizer.convert_tokens_to_ids("<|im_end|>")}, prompts, 2, 9)
    assert [answer.text for answer in answers] == ["QZ", "", "ZQ", ""] and sorted(asked) == ["qz", "zq"]
    assert [answer.failed for answer in answers] == ["", "longer than the context"] * 2


def test_rows_are_drawn_by_seed_and_the_same_run_gives_the_same_bytes(tmp_path, data, monkeypatch):
    scripted(monkeypatch, tool_calls, "qwen3_instruct_2507", lambda prompt: spoken(RIGHT[last_message(prompt)]))
    drawn = [[line["id"] for line in run(tmp_path, data[:1], "--rows", 1, "--seed", seed)[1]] for seed in range(9)]
    assert {name for [name] in drawn} == {"simple_python_0", "simple_python_1"}
    saved = []
    for _ in range(2):
        run(tmp_path, data, "--rows", 1)
        saved.append([(tmp_path / "out" / f"tool_calls.{end}").read_bytes() for end in ("json", "jsonl")])
    assert saved[0] == saved[1]


def turns_of_bfcl():
    """(task, its ground-truth calls) of every turn of multi_turn_base."""
    answers = {row["id"]: row["ground_truth"] for row in rows_of(BFCL / "possible_answer" / FILES[3].name)}
    for row in rows_of(FILES[3]):
        for task in tool_calls.list_tasks(row_of(row, answers[row["id"]], BFCL)):
            texts = answers[row["id"]][task.turn - 1]
            properties = bfcl.list_properties(task.functions)
            yield task, [one for text in texts for one in python_calls(text, properties)]


@real
def test_bfcls_own_turns_are_right_and_every_change_is_wrong():
    turns = list(turns_of_bfcl())
    assert len(turns) == 734 and sum(not calls for _, calls in turns) == 3
    for task, calls in turns:
        assert mismatch(calls, task.functions, task.answers) == ""
        for kind, wrong in mutants(calls, task.functions, task.answers) if calls else ():
            assert mismatch(wrong, task.functions, task.answers), (kind, wrong)


def bfcl_by_heart(monkeypatch):
    """A model that knows BFCL's own answers by the last message and the functions that it is shown; by one of the two
    would not do, as three questions stand in both files with other answers."""
    right = {}

    def key(message, functions):
        return message, *(one["name"] for one in functions)

    for category in ("simple_python", "multiple"):
        rows = rows_of(BFCL / f"BFCL_v4_{category}.json")
        for row, (functions, answers) in zip(rows, truth_of(category), strict=True):
            right[key(row["question"][0][-1]["content"], functions)] = right_calls(answers)
    for task, calls in turns_of_bfcl():
        right[key(task.messages[-1]["content"], task.functions)] = calls
    shown = re.compile(r'"function": \{"name": "([^"]+)"')
    scripted(
        monkeypatch,
        tool_calls,
        "qwen3_instruct_2507",
        lambda prompt: spoken(right.get((last_message(prompt), *shown.findall(prompt)), [])),
    )


@real
@pytest.mark.parametrize("rows", [10, pytest.param(1000, marks=long)])
def test_bfcls_own_answers_score_one_through_the_whole_command(tmp_path, monkeypatch, rows):
    bfcl_by_heart(monkeypatch)
    report, _ = run(tmp_path, FILES, "--rows", rows, "--max_new_tokens", 4000)
    found = {kind: counts(metrics) for kind, metrics in report["groups"]["category"].items()}
    for category, size in (("simple_python", 400), ("multiple", 200)):
        assert found[category]["ast"] == (min(rows, size),) * 2
    assert found["irrelevance"]["irrelevance"] == (min(rows, 240),) * 2
    right, total = found["multi_turn_base"]["multi_turn_ast"]
    assert right == total and total >= (734 if rows == 1000 else rows)
    assert found["multi_turn_base"]["multi_turn_first_call"] == (total, total)


def test_a_model_of_random_weights_from_a_folder(tmp_path, data):
    """Without a script: the folder is opened, nothing that it says is a call, and the terminal gets one table."""
    torch.manual_seed(0)
    tokenizer = tokenizer_of("qwen3_instruct_2507")
    tokenizer.eos_token = "<|im_end|>"
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
    )
    for part in (Qwen3ForCausalLM(config), tokenizer):
        part.save_pretrained(tmp_path / "run")
    assert tool_calls.main([str(word) for word in (tmp_path / "run", "--data", *data, "--max_new_tokens", 4)]) == 0
    report = json.loads((tmp_path / "run" / "eval" / "tool_calls.json").read_text())
    assert counts(report["metrics"])["ast"] == (0, 4) and counts(report["metrics"])["irrelevance"] == (2, 2)
    assert report["settings"]["model"] == "run" and report["settings"]["family"] == "qwen3_instruct_2507"


def test_bad_input_is_one_sentence_and_writes_nothing(tmp_path, data, monkeypatch, capsys):
    def broken(name, **change):
        rows = rows_of(next(file for file in data if file.name == f"BFCL_v4_{name}.json"))
        rows[0] |= change
        return write_rows(tmp_path / f"broken {next(number)}" / f"BFCL_v4_{name}.json", rows)

    def unread(text):
        """Answers with a text that is no call: an error of the data, whatever the model says."""
        row = {"id": "multi_turn_base_0", "ground_truth": [[text], [], []]}
        return write_rows(tmp_path / f"unread {next(number)}.json", [row])

    number, truth = itertools.count(), tmp_path / "possible_answer" / "BFCL_v4_multi_turn_base.json"
    odd = {**WEATHER, "parameters": {"type": "dict", "properties": {"a": {"type": "HashMap"}}, "required": []}}
    (tmp_path / "text.json").write_text('{"id": "simple_python_0"}\n{"id')
    cases = [
        ("qwen3", [tmp_path / "gone.json"], "gone.json does not exist"),
        ("qwen3", [tmp_path], "is a folder: pass BFCL's files"),
        ("qwen3", [tmp_path / "text.json"], "text.json, line 2 is not JSON"),
        ("qwen3", [broken("simple_python", id=None)], "BFCL_v4_simple_python.json, row 1 is not as BFCL 4 writes it"),
        ("qwen3", [broken("irrelevance", function=None)], "row 1 is not as BFCL 4 writes it"),
        ("qwen3", [broken("irrelevance", question=[])], "row 1 is not as BFCL 4 writes it"),
        (
            "qwen3",
            [broken("multiple", function=[LS]), "--answers", truth.with_name("BFCL_v4_multiple.json")],
            "row 1 is not as BFCL 4 writes it .no function clock.",
        ),
        ("qwen3", [broken("irrelevance", function=[])], "row 1 is not as BFCL 4 writes it .no functions."),
        ("qwen3", [broken("irrelevance", function=[{**CLOCK, "name": 3}])], "row 1 is not as BFCL 4 writes it"),
        ("qwen3", [data[5], "--answers", unread("ls(")], "row 1 is not as BFCL 4 writes it"),
        ("qwen3", [data[5], "--answers", unread("no words")], "row 1 is not as BFCL 4 writes it"),
        ("qwen3", [data[0], "--answers", data[0]], "the answers are not rows of id and ground_truth"),
        ("qwen3", [broken("irrelevance", function=[odd])], "a of weather.get is of type HashMap"),
        ("qwen3", [broken("simple_python", id="simple_java_0")], "row 1 is of simple_java, which is not measured"),
        ("qwen3", [broken("simple_python", id="multi_turn_miss_func_0")], "is of multi_turn_miss_func, which is not"),
        ("qwen3", [broken("multiple")], "row 1 .multiple_0. has no answer: pass .* --answers"),
        ("qwen3", [broken("multi_turn_base")], "row 1 .multi_turn_base_0. has no answer"),
        ("qwen3", [broken("multi_turn_base"), "--answers", truth], "gorilla_file_system.json does not exist"),
        ("qwen3", [write_rows(tmp_path / "empty.json", [])], "holds no rows"),
        ("gemma3", data[:1], "renders no tool call .*measure one that does"),
        ("deepseek_v3", data[:1], "the model's template .*tool"),
        ("chatml", [data[0], "--mode", "think"], "has no two modes: leave out --mode"),
    ]
    for name, words, expected in cases:
        scripted(monkeypatch, tool_calls, name, lambda prompt: "No.")
        capsys.readouterr()
        assert tool_calls.main([str(word) for word in (tmp_path, "--data", *words, "--out", tmp_path / "never")]) == 2
        [line] = capsys.readouterr().err.strip().splitlines()
        assert re.search(expected, line), (expected, line)
        assert not (tmp_path / "never").exists()
    with pytest.raises(SystemExit, match="2"):
        tool_calls.main([str(tmp_path)])


def test_a_template_that_drops_the_list_of_tools_is_refused(tmp_path, data, monkeypatch, capsys):
    tokenizer = scripted(monkeypatch, tool_calls, "chatml", lambda prompt: "No.")
    source = tokenizer.chat_template
    tokenizer.chat_template = source.replace("{%- if tools %}", "{%- if false %}")
    assert tokenizer.chat_template != source
    assert tool_calls.main([str(tmp_path), "--data", str(data[0])]) == 2
    assert "shows no list of tools" in capsys.readouterr().err


# -- BFCL's own code as an oracle ----------------------------------------------------------------------


class Stub(types.ModuleType):
    """A module of which anything can be imported."""

    __all__ = ()

    def __getattr__(self, name):
        return lambda *_, **__: None


class AnyModel(dict):
    def __missing__(self, _):
        return types.SimpleNamespace(underscore_to_dot=False)


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    """BFCL's check and its conversion of functions, from PyPI's bfcl-eval 2026.3.23: unpacked and not installed, as it
    pins other versions, with stubs for modules of other languages and of every vendor's client."""
    folder = tmp_path_factory.mktemp("bfcl_eval")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, "bfcl-eval==2026.3.23"]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("PyPI does not give bfcl-eval 2026.3.23 now")
    zipfile.ZipFile(next(folder.glob("*.whl"))).extractall(folder)
    parsers = [f"model_handler.parser.{name}_parser" for name in ("java", "js", "json", "xml")]
    converters = [f"eval_checker.ast_eval.type_convertor.{name}_type_converter" for name in ("java", "js")]
    stubs = [f"bfcl_eval.{name}" for name in ("constants.model_config", "utils", *parsers, *converters)]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        for name in [*stubs, "tenacity"]:
            patch.setitem(sys.modules, name, Stub(name))
        sys.modules["bfcl_eval.constants.model_config"].MODEL_CONFIG_MAPPING = AnyModel()
        checker = importlib.import_module("bfcl_eval.eval_checker.ast_eval.ast_checker")
        utils = importlib.import_module("bfcl_eval.model_handler.utils")
        enums = importlib.import_module("bfcl_eval.constants.enums")

        def check(functions, calls, answers, category):
            given = [{one["name"]: one["arguments"]} for one in calls]
            return checker.ast_checker(functions, given, answers, enums.Language.PYTHON, category, "m")["valid"]

        def convert(function):  # FIREWORK_AI: the chat API's shape, dots in names kept
            return utils.convert_to_tool([function], utils.GORILLA_TO_OPENAPI, enums.ModelStyle.FIREWORK_AI)[0]

        yield types.SimpleNamespace(check=check, convert=convert)


ODD = [
    "",
    "x",
    "X.",
    "0",
    0,
    1,
    -1,
    2.5,
    3.0,
    10**9,
    True,
    False,
    None,
    [],
    ["a"],
    [1],
    [1.5],
    [[1]],
    [True],
    [None],
    {},
    {"a": 1},
    {"zip": ""},
    [{}],
    [{"a": 1}],
]


def noise(calls, answers, rng):
    """Calls with one value changed at random: an odd one, another allowed one, or the same in other words."""
    [(name, allowed)] = answers[0].items()
    arguments = json.loads(json.dumps(calls[0]["arguments"]))
    if not arguments:
        return calls
    key = rng.choice(sorted(arguments))
    value = arguments[key]
    choices = [lambda: rng.choice(ODD), lambda: rng.choice(allowed[key])]
    if isinstance(value, str):
        choices += [value.upper, lambda: value.replace(" ", rng.choice(["", "_", "-", ", ", ";"])), lambda: value + "'"]
    if isinstance(value, (int, float)):
        choices += [lambda: float(value), lambda: int(value), lambda: str(value), lambda: bool(value)]
    if isinstance(value, list) and value:
        choices += [lambda: value[::-1], lambda: value[:-1], lambda: [*value[:-1], rng.choice(ODD)], lambda: [value]]
        choices += [lambda: [one.upper() if isinstance(one, str) else one for one in value]]
    if isinstance(value, dict) and value:
        inner = rng.choice(sorted(value))
        choices += [lambda: value | {inner: rng.choice(ODD)}, lambda: value | {"zz": 1}]
        choices += [lambda: {one: kept for one, kept in value.items() if one != inner}]
        choices += [lambda: value | {inner: value[inner].upper() if isinstance(value[inner], str) else value[inner]}]
    return [call(name, **arguments | {key: rng.choice(choices)()}), *calls[1:]]


@long
@real
def test_bfcls_own_check_gives_the_same_verdicts(upstream):
    """On its answers, on each change of them, and on 40 random ones a row."""
    seen, rng = Counter(), random.Random(0)
    for category in ("simple_python", "multiple"):
        for functions, answers in truth_of(category):
            calls = right_calls(answers)
            tried = [calls, *(one for _, one in mutants(calls, functions, answers))]
            for one in tried + [noise(calls, answers, rng) for _ in range(40)]:
                theirs = upstream.check(functions, one, answers, category)
                assert (not mismatch(one, functions, answers)) == theirs, (one, answers)
                seen[theirs] += 1
    assert seen[True] > 10_000 and seen[False] > 20_000, seen


@long
@real
def test_bfcls_own_check_gives_the_same_verdicts_on_several_calls(upstream):
    """Rows of `multiple` put together: two or three calls in one answer, mixed, repeated, one of them changed."""
    rows, seen, rng = truth_of("multiple"), Counter(), random.Random(0)
    for _ in range(2000):
        picked = rng.sample(rows, rng.choice([2, 3]))
        functions = [one for functions, _ in picked for one in functions]
        answers = [answer for _, answers in picked for answer in answers]
        if len({one["name"] for one in functions}) < len(functions):
            continue
        calls = right_calls(answers)
        odd = [noise(calls, answers, rng), calls[:-1], [*calls, calls[0]], [calls[0], *calls[:-1]]]
        given = rng.choice([calls, *odd])
        given = rng.sample(given, len(given))
        theirs = upstream.check(functions, given, answers, "parallel")
        assert (not mismatch(given, functions, answers)) == theirs, (given, answers)
        seen[theirs] += 1
    assert min(seen.values()) > 500, seen


@long
@real
def test_functions_are_shown_as_bfcl_shows_them(upstream):
    functions = [one for path in FILES[:3] for row in rows_of(path) for one in row["function"]]
    functions += [one for path in sorted((BFCL / "multi_turn_func_doc").iterdir()) for one in rows_of(path)]
    assert len(functions) > 1300
    for one in functions:
        ours, theirs = bfcl.tool_of(one)["function"], upstream.convert(one)["function"]
        assert ours.pop("description").startswith(theirs.pop("description").split(" The response")[0])
        ours.pop("response", None)  # which that style moves into the description
        assert ours == theirs
