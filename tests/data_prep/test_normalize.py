"""data_prep/normalize.py: every source on small rows of our own with values worked by hand, every refusal with its
reason and place, fuzzed rows, the Arrow round trip, and the real files of shared/ where they are.

Each of these turns the suite red (tried): parts joined with a newline, calls left as text; parts taken from any role,
in any order, beside the field they fill, or of any type; files written in place; words of spelling dealt to any split;
BFCL's optional arguments given; a null that the schema knows dropped in parquet, or tool schemas with theirs; a null
of JSON dropped; blossom's id without its source; custom_instructions dropped; enable_thinking left when reasoning goes;
a blank before the letter of a choice; loss_mask dropped; rows that no file can hold not listed; sums 3% off taken as
rounding; answer_en before answer_zh, Gemini's answer before DeepSeek's; a control token that the quick look misses;
--rows not counted down over chunks; nesting that Python's stack does not hold.
"""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from functools import partial
from unittest import mock

import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from data_prep import normalize
from data_prep.common import chunks, parsing, sources
from data_prep.common.exact_numbers import read_json_exactly
from data_prep.common.recipe_rows import load_sets
from tests.helpers.runs import MODULES, REPO, SHARED, run_script

real = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="../shared is absent: small fixtures prove the same")


run = partial(run_script, normalize)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def normalized(tmp_path, source, rows, *flags):
    """(rows out, rejected entries) of rows given as JSON lines."""
    out = tmp_path / "out.jsonl"
    out.unlink(missing_ok=True)
    done = run(source, write(tmp_path / "raw.jsonl", rows), "--out", out, "--num_proc", 1, *flags)
    assert done.returncode == 0, done.stderr
    return lines(out), lines(tmp_path / "out.rejected.jsonl")


def plain(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


CHAT, SAID = plain("Hi", "Hello"), plain("a", "b")
CALL = {"name": "weather", "arguments": {"city": "Oslo", "days": 2}}
TOOL = {"name": "weather", "description": "Weather", "parameters": {"type": "object", "properties": {}}}


def test_gsm8k_keeps_working_and_answer(tmp_path):
    rows, _ = normalized(tmp_path, "gsm8k", [{"question": " 2 and 3?\r\n", "answer": "2+3=<<2+3=5>>5\n#### 5"}])
    assert rows == [
        {
            "id": "raw-1",
            "messages": plain("2 and 3?", "2+3=<<2+3=5>>5\n#### 5"),
            "chat_template_kwargs": {},
            "source": "gsm8k",
            "tags": [],
            "lang": "en",
        }
    ]


def test_cmath_takes_both_spellings(tmp_path):
    raw = [{"input": "三加四?", "golden": "7"}, {"question": "三加五?", "golden": "8"}]
    rows, _ = normalized(tmp_path, "cmath", raw)
    assert [row["messages"] for row in rows] == [plain("三加四?", "7"), plain("三加五?", "8")]
    assert {row["lang"] for row in rows} == {"zh"}


def test_mawps_puts_numbers_back(tmp_path):
    eleven = " ".join(f"{n}.0" for n in range(100, 111))
    raw = [
        {"Question": "N_00 cups , N_01 more ?", "Numbers": "12.0 2.5", "Answer": 14.5},
        {"Question": "N_10 less N_01 ?", "Numbers": eleven, "Answer": 9.0},  # N_10 is not N_1 and a 0
        {"Question": "N_01 by N_00 ?", "Numbers": "-3.0 1200.0", "Answer": -400.0},
    ]
    rows, _ = normalized(tmp_path, "mawps", raw)
    assert [row["messages"] for row in rows] == [
        plain("12 cups , 2.5 more ?", "14.5"),
        plain("110 less 101 ?", "9"),
        plain("1200 by -3 ?", "-400"),
    ]


def test_messages_shapes(tmp_path):
    raw = [
        {
            "id": "a",
            "messages": plain("Hi", "<think>\ngreet\n</think>\n\nHello"),
            "tags": ["x"],
            "lang": "fr",
            "source": "s",
        },
        {
            "id": "a",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Weather?"},
                {
                    "role": "assistant",
                    "content": None,
                    "reasoning_content": "ask",
                    "tool_calls": [
                        {
                            "id": "c1",
                            "type": "function",
                            "function": {"name": "weather", "arguments": json.dumps(CALL["arguments"])},
                        }
                    ],
                },
                {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "rain"},
                {"role": "assistant", "content": "Rain.", "loss_mask": 0},
            ],
            "tools": [{"type": "function", "function": TOOL}],
            "chat_template_kwargs": {"enable_thinking": True},
        },
    ]
    rows, _ = normalized(tmp_path, "messages", raw)
    assert [row["id"] for row in rows] == ["a", "a-2"]
    first, second = rows
    assert first["messages"][1] == {"role": "assistant", "content": "Hello", "reasoning_content": "greet"}
    assert (first["tags"], first["lang"], first["source"]) == (["x"], "fr", "s")
    assert "tools" not in first
    call = second["messages"][2]
    assert call == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "ask",
        "tool_calls": [{"id": "c1", "type": "function", "function": CALL}],
    }
    assert second["messages"][3] == {"role": "tool", "content": "rain", "tool_call_id": "c1", "name": "weather"}
    assert second["messages"][4]["loss_mask"] == 0
    assert second["tools"] == [{"type": "function", "function": TOOL}]
    assert second["chat_template_kwargs"] == {"enable_thinking": True, "train_turns": "flagged"}


def test_content_in_parts_becomes_one_string(tmp_path):
    """As LLaMA-Factory and StepTron write messages (value), and as OpenAI does (text): joined as they stand."""
    called, again = [{"type": "tool_call", "value": value} for value in (json.dumps(CALL), CALL)]
    said = [{"type": "reasoning", "value": " It "}, {"type": "reasoning", "value": "rains.\n"}]
    said += [{"type": "text", "value": "\nLet me "}, {"type": "text", "text": " look. "}]
    raw = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
            {"role": "assistant", "content": [*said, called, again], "loss_mask": 0},
            {"role": "tool", "content": [{"type": "text", "value": "rain"}]},
            {"role": "assistant", "content": [{"type": "text", "value": "<think>\nSo\n</think>\n\nRain."}]},
        ],
        "tools": json.dumps([TOOL]),
    }
    (row,), _ = normalized(tmp_path, "messages", [raw])
    assert row["messages"] == [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "Let me  look.",
            "reasoning_content": "It rains.",
            "tool_calls": [{"type": "function", "function": CALL}] * 2,
            "loss_mask": 0,
        },
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "Rain.", "reasoning_content": "So"},
    ]


def test_sharegpt_tools_become_triples(tmp_path):
    turns = [("human", "Weather?"), ("function_call", json.dumps(CALL)), ("observation", "rain"), ("gpt", "Rain.")]
    raw = {
        "system": "Be brief.",
        "tools": json.dumps([TOOL]),
        "conversations": [{"from": f, "value": v} for f, v in turns],
    }
    (row,), _ = normalized(tmp_path, "sharegpt", [raw])
    assert row["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "Rain."},
    ]
    assert row["tools"] == [{"type": "function", "function": TOOL}]


@pytest.mark.parametrize(
    ("text", "lang"),
    [
        ("Hello there", "en"),
        ("你好，OK", "zh"),
        ("これは本です", "ja"),
        ("안녕하세요", "ko"),
        ("Привет", "und"),
        ("42", "und"),
    ],
)
def test_language_by_script(tmp_path, text, lang):
    (row,), _ = normalized(tmp_path, "messages", [{"messages": plain(text, text)}])
    assert row["lang"] == lang


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def calls(arguments):
    return [{"type": "function", "function": {"name": "f", "arguments": arguments}}]


def shared(*turns):
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in turns]}


def called(arguments):
    return {"messages": [turn("user", "a"), turn("assistant", "", tool_calls=calls(arguments))]}


def parts(role, *content, **more):
    """A chat in which a message of this role comes in parts."""
    said = turn(role, [{"type": kind, "value": value} for kind, value in content], **more)
    return {"messages": [said, CHAT[1]] if role == "user" else [CHAT[0], said]}


def answered(**keys):
    """A chat whose answer has these keys as well."""
    return {"messages": [CHAT[0], {**CHAT[1], **keys}]}


def plain_text(answer):
    return {"messages": plain("a", answer)}


REPLY = turn("assistant", "c")
ORDER = "roles that do not alternate"
MISFIT = "equation disagrees with answer"
OPTIONS = {"dialogue": ["A: a"], "question": "c", "(a)": "e", "(b)": "f"}
BAD = [  # (source, raw line, reason it is counted under)
    ("gsm8k", '{"question": "a"', "not JSON"),
    ("gsm8k", '{"question": "a", "answer": NaN}', "number that is not JSON"),
    ("gsm8k", b'{"question": "\xff", "answer": "b"}', "not UTF-8"),
    ("gsm8k", '"text"', "row that is not an object"),
    ("gsm8k", {"question": "a"}, "missing field"),
    ("gsm8k", {"question": " \n", "answer": "b"}, "empty text"),
    ("gsm8k", {"question": "a", "answer": ""}, "empty text"),
    ("gsm8k", {"question": 3, "answer": "b"}, "text that is not a string"),
    ("gsm8k", {"question": "a", "answer": "b \ud83d"}, "text that is not Unicode"),
    ("cmath", {"input": "a"}, "missing field"),
    ("kdconv", {"messages": [{"message": "a"}]}, "no assistant turn"),
    ("kdconv", {"messages": [{"attrs": []}, {"message": "b"}]}, "missing field"),
    ("kdconv", {"messages": {"message": ["a", "b"]}}, "field of another type"),
    ("lccc", {"dialog": ["a"]}, "no assistant turn"),
    ("lccc", {"dialog": ["a", 3]}, "text that is not a string"),
    ("corecode", {"dialogue": "A: a", "question": "c", "answer": "d"}, "field of another type"),
    ("corecode", {**OPTIONS, "answer": ["(a)", "f"]}, "answer that is no choice"),
    ("corecode", {**OPTIONS, "answer": ["(c)", "f"]}, "answer that is no choice"),
    ("corecode", {**OPTIONS, "answer": "e"}, "answer that is no choice"),
    ("mutual", {"article": "m : a", "options": list("cdef")}, "missing field"),
    ("mutual", {"article": "m : a", "options": list("cde"), "answers": "A"}, "field of another type"),
    ("mutual", {"article": "m : a", "options": list("cdef"), "answers": "E"}, "answer that is no choice"),
    ("mawps", {"Question": "N_00 and N_02", "Numbers": "1.0 2.0", "Answer": 3.0}, "number index without a number"),
    ("mawps", {"Question": "N_00", "Numbers": "one", "Answer": 3.0}, "number that is not a number"),
    ("mawps", {"Question": "N_00", "Numbers": "1.0"}, "missing field"),
    ("mawps", '{"Question": "N_00", "Numbers": "1.0", "Answer": 1e999}', "number that is not a number"),
    ("mawps", {"Question": 7, "Numbers": "1.0", "Answer": 1.0}, "field of another type"),
    ("messages", {"text": "a"}, "missing field"),
    ("messages", {"messages": "a"}, "field of another type"),
    ("messages", {"messages": []}, "no assistant turn"),
    ("messages", {"messages": [turn("user", "a")]}, "no assistant turn"),
    ("messages", {"messages": [*CHAT, turn("user", "a")]}, "last message is not the assistant's"),
    ("messages", {"messages": [turn("user", "a"), turn("user", "b"), REPLY]}, ORDER),
    ("messages", {"messages": [REPLY]}, ORDER),
    ("messages", {"messages": [*CHAT, REPLY]}, ORDER),
    ("messages", {"messages": [turn("user", "a"), turn("system", "b"), REPLY]}, ORDER),
    ("messages", {"messages": [*CHAT, turn("tool", "b"), REPLY]}, ORDER),
    ("messages", {"messages": [turn("user", "a"), turn("critic", "b"), REPLY]}, "unknown role"),
    ("messages", parts("user", ("image", "a.png")), "content part of another kind"),
    ("messages", parts("assistant", ("text", "a"), (None, "b")), "content part of another kind"),
    ("messages", parts("user", ("reasoning", "a")), "content part of another kind"),
    ("messages", parts("tool", ("tool_call", "{}")), "content part of another kind"),
    ("messages", parts("assistant", ("text", "a"), ("reasoning", "b")), "content parts out of order"),
    ("messages", parts("assistant", ("tool_call", json.dumps(CALL)), ("text", "a")), "content parts out of order"),
    ("messages", parts("assistant", ("reasoning", "a"), reasoning_content="b"), "content parts out of order"),
    ("messages", parts("assistant", ("tool_call", json.dumps(CALL)), tool_calls=[CALL]), "content parts out of order"),
    ("messages", parts("assistant", ("text", None)), "text that is not a string"),
    ("messages", parts("assistant", ("reasoning", ["a"])), "text that is not a string"),
    ("messages", parts("assistant", ("tool_call", "f(x)")), "tool call that is not JSON"),
    ("messages", parts("assistant", ("tool_call", '{"name": "f"}')), "tool call without a name or arguments"),
    ("messages", parts("assistant", ("reasoning", "a")), "empty text"),
    ("messages", {"messages": [turn("user", ["a"]), CHAT[1]]}, "field of another type"),
    ("messages", {"messages": [turn("user", "a"), turn("assistant", "<think>\nb\n</think>\n\n")]}, "empty text"),
    ("messages", called("{bad"), "tool arguments that are not JSON"),
    ("messages", called("[1]"), "tool arguments that are not an object"),
    ("sharegpt", shared(("human", "a"), ("function_call", '{"name": "f"}')), "tool call without a name or arguments"),
    ("messages", json.dumps(called({"x": 0})).replace("0}", "NaN}"), "number that is not JSON"),
    ("messages", json.dumps(called({"x": 0})).replace("0}", "1e999}"), "number that is not JSON"),
    ("messages", called({"x": "<|im_end|>"}), "control token in text"),
    ("messages", {"messages": CHAT, "tools": "[{"}, "tools that are not JSON"),
    ("messages", {"messages": CHAT, "tools": {"name": "f"}}, "tools that are not a list of objects"),
    ("messages", {"messages": CHAT, "tools": [{"description": "f"}]}, "tool without a name"),
    ("messages", {"messages": CHAT, "tags": [1]}, "field of another type"),
    ("messages", {"messages": CHAT, "chat_template_kwargs": [1]}, "field of another type"),
    (
        "messages",
        json.dumps({"messages": CHAT, "tools": [{"name": "f", "parameters": 0}]}).replace(
            "0}]", '{"a":' * 900 + "1" + "}" * 900 + "}]"
        ),
        "row nested too deep",
    ),
    ("mawps", {"Question": "N_00", "Numbers": "7.0 2.0", "Equation": "/ N_00 N_01", "Answer": 3.0}, MISFIT),
    ("mawps", {"Question": "N_00", "Numbers": "7.0 0.0", "Equation": "/ N_00 N_01", "Answer": 3.0}, MISFIT),
    ("mawps", {"Question": "N_00", "Numbers": "7.0", "Equation": "+ N_00", "Answer": 7.0}, MISFIT),
    ("smoltalk", {"messages": [SAID[0]]}, "no assistant turn"),
    ("alpaca", {"instruction": "a"}, "missing field"),
    ("alpaca", {"instruction": "a", "output": ""}, "empty text"),
    ("alpaca", {"instruction": "a", "output": "b", "history": [["c"]]}, "field of another type"),
    ("prompt_completion", {"prompt": {"text": "a"}, "completion": [SAID[1]]}, "text that is not a string"),
    ("prompt_completion", {"prompt": "a", "completion": [SAID[1]], "reasoning": "c"}, "keys beside an answer in turns"),
    ("prompt_completion", {"prompt": [SAID[0]], "completion": [SAID[0]]}, "no assistant turn"),
    ("fields", {"q": "a", "s": "b"}, "missing field"),
    ("step35", {"conversations": SAID[:1]}, "last message is not the assistant's"),
    ("step35", {"conversations": []}, "last message is not the assistant's"),
    (
        "step35",
        {"conversations": [SAID[0], {**SAID[1], "content": "", "reasoning_content": "c"}]},
        "assistant with neither content nor tool_calls",
    ),
    ("step35", {"conversations": [SAID[1]]}, "no user turn"),
    ("step35", {"conversations": [SAID[0], {**SAID[1], "loss_mask": 2}]}, "loss_mask that is not 0 or 1"),
    ("blossom", {"id": "1", "messages": SAID}, "missing field"),
    ("smoltalk2", {"messages": SAID, "chat_template_kwargs": "x"}, "field of another type"),
    ("smoltalk2", {"messages": plain("a", "<tool_call>{}</tool_call> b")}, "text behind a tool call"),
    ("smoltalk2", {"messages": plain("a", "b <tool_call>\nf(x)\n</tool_call>")}, "tool call that is not JSON"),
    ("smoltalk2", {"messages": plain("a <tool_call>{}</tool_call>", "b")}, "control token in text"),
    ("nemotron", {"input": "a", "output": "b", "generator": "Qwen", "reasoning": "on"}, "answer not of DeepSeek-R1"),
    (
        "nemotron",
        {"input": "a", "output": "b", "generator": "DeepSeek-R1", "reasoning": "on"},
        "no reasoning where the row says on",
    ),
    ("openthoughts", shared(("user", "a"), ("assistant", "<|begin_of_thought|>b")), "control token in text"),
    ("s1k", {"question": "a", "attempt": ""}, "missing field"),
    ("identity", {"instruction": "a", "output": "by {{author}}"}, "placeholder not filled in"),
    ("emoji_preference", {"prompt": "a"}, "empty text"),
    (
        "arc",
        {"question": "a", "choices": {"text": ["b"], "label": ["A"]}, "answerKey": "B"},
        "answer that is no choice",
    ),
    (
        "arc",
        {"question": "a", "choices": {"text": ["b"], "label": ["A", "B"]}, "answerKey": "B"},
        "field of another type",
    ),
    ("mmlu", {"question": "a", "choices": ["b", "c", "d", "e"], "answer": 4}, "answer that is no choice"),
    ("mmlu", {"question": "a", "choices": ["b", "c", "d", "e"], "answer": True}, "answer that is no choice"),
    ("mmlu", {"question": "a", "choices": ["b", "c", "d"], "answer": 0}, "field of another type"),
    ("bfcl", {"id": "1", "question": [SAID[:1]], "function": []}, "no reference answer"),
    ("bfcl", {"id": "1", "question": [SAID[:1]] * 2, "function": []}, "several user turns without the tools' replies"),
    (
        "bfcl",
        {"question": [SAID[:1]], "function": [], "ground_truth": [{"f": {}}]},
        "call of a tool that is not offered",
    ),
    ("sharegpt", shared(("human", "a"), ("bot", "b")), "unknown role"),
    ("sharegpt", {"conversations": [{"from": "human"}]}, "missing field"),
    ("sharegpt", shared(("human", "a"), ("function_call", "f(x)")), "tool call that is not JSON"),
    ("messages", {"messages": CHAT, "images": ["a.png"]}, "row with images"),
    ("messages", {"messages": [{**CHAT[0], "audio": {"id": "a"}}, CHAT[1]]}, "row with audio"),
    ("messages", {"messages": CHAT, "label": False}, "label false"),
    ("messages", {"messages": CHAT, "kto_tag": "False"}, "kto_tag false"),
    ("messages", {"messages": CHAT, "weight": -1}, "weight of a row that is not 1"),
    ("messages", {"messages": CHAT, "mask": "Assistant"}, "mask of the assistant"),
    ("messages", {"messages": CHAT, "system": "s", "tools": [TOOL, {}]}, "tool without a name"),
    ("messages", {"messages": [turn("system", "t"), *CHAT], "system": "s"}, "two system prompts"),
    ("messages", answered(weight=0.5), "weight that is not 0 or 1"),
    ("messages", answered(loss="0"), "loss that is not 0 or 1"),
    ("messages", answered(loss_mask=2), "loss_mask that is not 0 or 1"),
    ("messages", answered(weight=0, train=True), "loss flags that disagree"),
    ("messages", {"messages": [{**CHAT[0], "train": True}, CHAT[1]]}, "loss on a message that is not the assistant's"),
    ("messages", answered(train_detail=[{"begin_offset": 0}]), "train_detail of a message"),
    ("messages", answered(reasoning="a", thinking="b"), "reasoning under two names"),
    (
        "messages",
        answered(reasoning_details=[{"type": "reasoning.encrypted", "data": "x"}]),
        "reasoning_details without text",
    ),
    ("messages", answered(thinking=["a"]), "field of another type"),
    ("messages", answered(thinking=3), "text that is not a string"),
    (
        "messages",
        {"messages": [CHAT[0], turn("assistant", [{"type": "text", "text": "a", "train": False}])]},
        "train of a content part",
    ),
    ("messages", {"messages": [CHAT[0], {**CHAT[1], "tools": [TOOL]}]}, "tools in a later message"),
    ("messages", plain_text("a </think> b </think> c"), "control token in text"),
    ("hermes", shared(("human", "a"), ("gpt", "<tool_call>f(x)</tool_call>")), "tool call that is not JSON"),
    (
        "hermes",
        shared(("human", "a"), ("tool", "<tool_response>a</tool_response> b"), ("gpt", "c")),
        "text beside a tool response",
    ),
    ("conversation_pairs", {"conversation": [{"human": "a", "bot": "b"}]}, "missing field"),
    ("conversation_pairs", {"conversation": [{"human": "a", "assistant": ""}]}, "empty text"),
    ("list_of_strings", {"conversations": ["a"]}, "no assistant turn"),
    ("list_of_strings", {"conversations": ["a", 3]}, "text that is not a string"),
    ("turn_lists", {"input": ["a", "b"], "output": ["c"]}, "field of another type"),
    ("message_tree", {"prompt": {"text": "a", "role": "prompter", "replies": []}}, "no assistant turn"),
    ("message_tree", {"prompt": {"role": "prompter"}}, "missing field"),
    (
        "message_tree",
        {"message_id": "m", "parent_id": None, "text": "a", "role": "prompter"},
        "message without its tree",
    ),
    ("dolly", {"instruction": "a", "context": "b"}, "missing field"),
    ("query_response", {"query": "a", "response": ["b", "c"]}, "several answers"),
    (
        "moss",
        {
            "chat": {
                "turn_1": {
                    "Human": "<|Human|>: a<eoh>",
                    "Commands": '<|Commands|>: Search("a")<eoc>',
                    "MOSS": "<|MOSS|>: b<eom>",
                }
            }
        },
        "command of a plugin",
    ),
    ("moss", {"chat": {"turn_1": {"Human": "<|Human|>: a<eoh>"}}}, "empty text"),
    ("moss", {"chat": ["a"]}, "field of another type"),
    (
        "gemini",
        {"contents": [{"role": "user", "parts": [{"fileData": {"fileUri": "a.png"}}]}]},
        "content part of another kind",
    ),
    ("gemini", {"contents": [{"role": "user", "parts": [{"text": "a"}]}]}, "no assistant turn"),
    (
        "gemini",
        {"contents": [{"role": "user", "parts": [{"text": "a"}, {"functionResponse": {"name": "f", "response": {}}}]}]},
        "content parts out of order",
    ),
    ("gemini", {"contents": [{"role": "user"}]}, "missing field"),
    (
        "chatglm3",
        {"conversations": [SAID[0], {"role": "tool", "name": "f", "observation": "c"}, SAID[1]]},
        "missing field",
    ),
    (
        "chatglm3",
        {"conversations": [SAID[0], {"role": "tool", "name": "f", "parameters": "{", "observation": "c"}, SAID[1]]},
        "tool arguments that are not JSON",
    ),
    ("preference", {"prompt": "a", "rejected": "b"}, "missing field"),
    ("preference", {"chosen": "no dialogue"}, "missing field"),
    ("svamp", {"Body": "a", "Question": "b"}, "missing field"),
    ("xlam", {"query": "a", "tools": "[{", "answers": "[]"}, "tools that are not JSON"),
    ("xlam", {"query": "a", "tools": "[]", "answers": '[{"name": "f"}]'}, "tool call without a name or arguments"),
]
for token in (
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_response>",
    "<｜User｜>",
    "<start_of_turn>",
    "<extra_id_1>",
):
    BAD.append(("messages", {"messages": plain(f"say {token} now", "b")}, "control token in text"))


def test_every_refusal_is_counted_by_reason_with_file_and_line(tmp_path):
    for source, fine in WHOLE.items():
        cases = [(line, reason) for name, line, reason in BAD if name == source]
        raw = tmp_path / f"{source}.jsonl"
        encoded = [
            line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
            for line, _ in cases
        ]
        # a blank line is no row but keeps the count of lines
        raw.write_bytes(b"\n".join([json.dumps(fine).encode(), b"", *encoded]) + b"\n")
        done = run(source, raw, "--out", tmp_path / f"{source}-out.jsonl", "--num_proc", 1, *FLAGS.get(source, []))
        assert done.returncode == 0, done.stderr
        assert cases, f"no refusal of {source} is tried"
        assert f"1 rows kept, {len(cases)} refused" in done.stdout
        rejected = lines(tmp_path / f"{source}-out.rejected.jsonl")
        assert [(entry["line"], entry["reason"]) for entry in rejected] == [
            (n, reason) for n, (_, reason) in enumerate(cases, 3)
        ]
        assert {entry["file"] for entry in rejected} == {raw.name}
        named = cases[0][0].get("id") if isinstance(cases[0][0], dict) else None
        assert rejected[0]["id"] == (named or f"{source}-3")
        report = json.loads((tmp_path / f"{source}-out.report.json").read_text())
        assert report["refused"] == dict(sorted(Counter(reason for _, reason in cases).items()))
        assert (report["in"], report["out"]) == (len(cases) + 1, {"train": 1})
        for reason, count in report["refused"].items():
            assert f"{count} {reason}" in done.stdout


PIECES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "a", "user", "tool", "<think>", "\ud800", "1e999", "[1]", *parsing.PARTS]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["name", "arguments", "role", "type", "value"]), inner)
        | st.lists(st.fixed_dictionaries({"type": st.sampled_from(parsing.PARTS), "value": inner}), max_size=3)
    ),
    max_leaves=4,
)
WHOLE = {
    "gsm8k": {"question": "a", "answer": "b"},
    "cmath": {"input": "a", "golden": "1"},
    "mawps": {"Question": "N_00 ?", "Numbers": "1.0", "Equation": "+ N_00 0", "Answer": 1.0},
    "messages": {"messages": CHAT, "tools": [TOOL], "tags": ["x"], "chat_template_kwargs": {}},
    "smoltalk": {"messages": CHAT, "source": "s"},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
    "alpaca": {"instruction": "a", "input": "b", "output": "c", "system": "s", "history": [["d", "e"]]},
    "prompt_completion": {"prompt": [SAID[0]], "completion": [SAID[1]]},
    "fields": {"q": "a", "r": "b", "s": "c"},
    "step35": {
        "conversations": [
            {**SAID[0], "loss_mask": 0, "name": "", "meta": {}, "tools": [TOOL]},
            {**SAID[1], "loss_mask": 1, "name": "", "meta": None, "reasoning_content": "c"},
        ]
    },
    "blossom": {"id": "1", "type": "chat", "metadata": {"source": "s"}, "messages": SAID},
    "smoltalk2": {
        "messages": SAID,
        "source": "s",
        "chat_template_kwargs": {
            "custom_instructions": "p",
            "enable_thinking": True,
            "python_tools": [],
            "xml_tools": ["{}"],
        },
    },
    "kdconv": {"messages": [{"message": "a"}, {"message": "b", "attrs": []}], "name": "c"},
    "lccc": {"dialog": ["好 吗 ？", "很 好"]},
    "corecode": {"dialogue": ["A: a", "B: b"], "question": "c", "answer": "d"},
    "mutual": {"article": "m : a f : b", "options": list("cdef"), "answers": "B"},
    "nemotron": {
        "input": [SAID[0]],
        "output": "<think>\nc\n</think>\n\nb",
        "category": "math",
        "reasoning": "on",
        "generator": "DeepSeek-R1",
        "system_prompt": "detailed thinking on",
    },
    "openthoughts": {
        "system": "s",
        "conversations": [
            {"from": "user", "value": "a"},
            {
                "from": "assistant",
                "value": "<|begin_of_thought|>c<|end_of_thought|><|begin_of_solution|>b<|end_of_solution|>",
            },
        ],
    },
    "s1k": {"question": "a", "deepseek_thinking_trajectory": "c", "deepseek_attempt": "b"},
    "identity": {"instruction": "a", "input": "", "output": "I am {{name}}"},
    "emoji_preference": {"prompt": "a", "chosen": [*SAID], "answer_zh": "c", "answer_en": "d"},
    "hermes": shared(
        ("system", "s <tools>[" + json.dumps(TOOL) + "]</tools>"),
        ("human", "a"),
        ("gpt", '<tool_call>{"name": "weather", "arguments": {}}</tool_call>'),
        ("tool", "<tool_response>d</tool_response>"),
        ("gpt", "b"),
    ),
    "conversation_pairs": {"conversation": [{"human": "a", "assistant": "b"}, {"human": "d", "assistant": "e"}]},
    "list_of_strings": {"conversations": ["a", "b"]},
    "turn_lists": {"input": ["a", "d"], "output": ["b", "e"]},
    "message_tree": {
        "message_tree_id": "t",
        "prompt": {
            "text": "a",
            "role": "prompter",
            "lang": "en",
            "replies": [{"text": "c", "role": "assistant", "rank": 1}, {"text": "b", "role": "assistant", "rank": 0}],
        },
    },
    "moss": {
        "meta_instruction": "s\n",
        "chat": {
            "turn_1": {
                "Human": "<|Human|>: a<eoh>\n",
                "Inner Thoughts": "<|Inner Thoughts|>: c<eot>\n",
                "Commands": "<|Commands|>: None<eoc>\n",
                "Tool Responses": "<|Results|>:\nNone\n<eor>\n",
                "MOSS": "<|MOSS|>: b<eom>\n",
            }
        },
    },
    "gemini": {
        "systemInstruction": {"role": "system", "parts": [{"text": "s"}]},
        "contents": [{"role": "user", "parts": [{"text": "a"}]}, {"role": "model", "parts": [{"text": "b"}]}],
    },
    "chatglm3": {
        "tools": [TOOL],
        "conversations": [
            SAID[0],
            {"role": "assistant", "content": "c"},
            {"role": "tool", "name": "weather", "parameters": {"days": 2}, "observation": {"sky": "d"}},
            SAID[1],
        ],
    },
    "dolly": {"instruction": "a", "context": "b", "response": "c", "category": "x"},
    "query_response": {"query": "a", "response": "b", "system": "s", "history": [["d", "e"]]},
    "preference": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "svamp": {"ID": "q-1", "Body": "a.", "Question": "b?", "Answer": 7.0},
    "xlam": {
        "query": "a",
        "tools": json.dumps(
            [{"name": "f", "description": "d", "parameters": {"x": {"type": "float"}, "y": {"type": "str, optional"}}}]
        ),
        "answers": '[{"name": "f", "arguments": {"x": 0.7}}]',
    },
    "arc": {"question": "a", "choices": {"text": ["b", "c"], "label": ["A", "B"]}, "answerKey": "B"},
    "mmlu": {"question": "a", "subject": "s", "choices": ["b", "c", "d", "e"], "answer": 2},
    "bfcl": {
        "question": [[SAID[0]]],
        "function": [
            {
                "name": "f",
                "description": "d",
                "parameters": {"type": "dict", "properties": {"x": {"type": "float"}}, "required": ["x"]},
            }
        ],
        "ground_truth": [{"f": {"x": [1, 2]}}],
    },
}
FLAGS = {"fields": ["--map", "prompt=q", "answer=r", "system=s"], "identity": ["--fill", "name=Ada"]}
GIVEN = {"fields": {"map": {"prompt": "q", "answer": "r", "system": "s"}}, "identity": {"fill": {"name": "Ada"}}}


def test_every_source_is_tried():
    assert {*WHOLE} == {*sources.SOURCES} - {*sources.MADE}


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_value_crashes_it(data):
    """A row with any JSON at any place is a row that comes back equal from Arrow, or refused: never a traceback."""
    read_json_exactly()
    source = data.draw(st.sampled_from(sorted(WHOLE)))
    raw = json.loads(json.dumps(WHOLE[source]))
    field = data.draw(st.sampled_from(sorted(raw)))
    if isinstance(raw[field], list) and isinstance(raw[field][0], dict) and data.draw(st.booleans()):
        inner = raw[field][data.draw(st.integers(0, len(raw[field]) - 1))]
        inner[data.draw(st.sampled_from([*inner, "tool_calls", "reasoning_content", "name"]))] = data.draw(PIECES)
    else:
        raw[field] = data.draw(PIECES)
    chunk = chunks.Chunk("a.jsonl", "train", 1, [raw])
    done = normalize.normalize_chunk(chunk, source, flags=GIVEN.get(source, {}))
    batch = done.encoded["train"].batch
    assert len(batch) + len(done.rejected) == done.rows_in == 1
    if done.rejected:
        return
    row = normalize.to_row(raw, source, "a-1", **GIVEN.get(source, {}))
    (stored,) = Dataset(pa.Table.from_batches([batch])).to_list()
    assert {key: value for key, value in stored.items() if value is not None} == row


ARGUMENTS = [
    {"x": 1},
    {"y": "q", "z": [1, {"k": None}]},
    {"x": 1.5, "y": [], "day": "2024-01-01"},
    {"b": 1, "a": {"x": "1"}},
    {},
]


def test_arrow_gives_rows_back_equal(tmp_path):
    """Rows with and without tools, arguments of differing names and types, one argument order: all as they went in."""
    raw = [
        {"messages": CHAT},
        {"messages": plain("é 你好 \u2028 😀", "b"), "chat_template_kwargs": {"enable_thinking": False}},
    ]
    for arguments in ARGUMENTS:
        tool = {
            "name": "f",
            "parameters": {"type": "object", "properties": {key: {"enum": [1, "a"]} for key in arguments}},
        }
        turns = [
            turn("user", "a"),
            turn("assistant", "", tool_calls=calls(arguments)),
            turn("tool", "7"),
            turn("assistant", "b"),
        ]
        raw.append({"messages": turns, "tools": [tool]})
    path = write(tmp_path / "raw.jsonl", raw)
    assert run("messages", path, "--out", tmp_path / "folder").returncode == 0
    assert run("messages", path, "--out", tmp_path / "flat.jsonl").returncode == 0
    stored = load_from_disk(str(tmp_path / "folder"))["train"].to_list()
    flat = lines(tmp_path / "flat.jsonl")
    assert len(flat) == len(raw)
    for row, expected in zip(stored, flat, strict=True):
        assert {key: value for key, value in row.items() if not (key == "tools" and value is None)} == expected
        assert "null" not in json.dumps(expected["messages"]).replace('"k": null', "")
    got = [row["messages"][1]["tool_calls"][0]["function"]["arguments"] for row in stored[2:]]
    assert [json.dumps(value) for value in got] == [
        json.dumps(value) for value in ARGUMENTS
    ]  # order of keys, 1 not 1.0
    # one hash for both forms: sha256 of the sha256 of each row as JSON without its id
    hashes = [
        json.loads((tmp_path / name).read_text())["output"]["train"]
        for name in ("folder/report.json", "flat.report.json")
    ]
    digests = b""
    for row in flat:
        said = json.dumps(
            {key: value for key, value in row.items() if key != "id"}, ensure_ascii=False, separators=(",", ":")
        ).replace("\u2028", "\\u2028")
        digests += hashlib.sha256(said.encode()).digest()
    assert hashes == [hashlib.sha256(digests).hexdigest()] * 2


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_same_bytes_twice_and_no_trace_of_the_machine(tmp_path):
    rows = [{"question": f"q{n}", "answer": f"a{n}"} for n in range(40)]
    trees = []
    for name in ("one", "two"):
        (tmp_path / name / "in").mkdir(parents=True)
        write(tmp_path / name / "in" / "b.jsonl", [*rows[20:], {}])
        (tmp_path / name / "in" / "a.json").write_text(json.dumps(rows[:20]))
        done = run("gsm8k", tmp_path / name / "in" / "*.json*", "--out", tmp_path / name / "out", "--eval_rows", 5)
        assert done.returncode == 0, done.stderr
        trees.append(tree(tmp_path / name / "out"))
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["in", "out"]
    assert trees[0] == trees[1]
    assert {"report.json", "rejected.jsonl", "card.md", "dataset_dict.json"} <= set(trees[0])
    assert not any(str(tmp_path).encode() in content for content in trees[0].values())
    out = load_from_disk(str(tmp_path / "one" / "out"))
    ids = {split: [row["id"] for row in out[split]] for split in out}
    assert len(ids["validation"]) == 5
    assert sorted(ids["train"] + ids["validation"]) == sorted(
        [f"a-{n}" for n in range(1, 21)] + [f"b-{n}" for n in range(1, 21)]
    )
    done = run("gsm8k", tmp_path / "one/in/*.json*", "--out", tmp_path / "three", "--eval_rows", 5, "--seed", 7)
    assert [row["id"] for row in load_from_disk(str(tmp_path / "three"))["validation"]] != ids["validation"]


def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path):
    good = write(tmp_path / "good.jsonl", [{"question": "a", "answer": "b"}])
    (tmp_path / "used").mkdir()
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "broken.json").write_text('[\n{"question": "a"},\n{]')
    before = sorted(tmp_path.rglob("*"))
    cases = [
        (("gsm8k", tmp_path / "none*.jsonl", "--out", tmp_path / "o"), 2, "none*.jsonl: no such file"),
        (("gsm8k", good, "--out", tmp_path / "used"), 2, "used: exists already"),
        (("gsm8k", good, "--out", good), 2, "good.jsonl: exists already"),
        (("gsm8k", tmp_path / "empty.jsonl", "--out", tmp_path / "o"), 2, "empty.jsonl: no rows"),
        (("gsm8k", tmp_path / "broken.json", "--out", tmp_path / "o"), 2, "broken.json:3: not JSON"),
        (("gsm8k", good, "--out", tmp_path / "o", "--eval_rows", 1), 2, "--eval_rows 1: only 1 rows"),
        (("gsm8k", good, "--out", tmp_path / "o.jsonl", "--eval_rows", 1), 2, "--eval_rows: needs"),
    ]
    for args, code, words in cases:
        done = run(*args)
        assert (done.returncode, words in done.stderr, done.stdout) == (code, True, ""), (args, done.stderr)
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert sorted(tmp_path.rglob("*")) == before
    for args in (("gsm8k", good, "--ou", tmp_path / "o"), ("squad", good, "--out", tmp_path / "o")):
        assert run(*args).returncode == 2


def test_as_a_command(tmp_path):
    """As a command of its own, from another folder."""
    raw = write(tmp_path / "raw.jsonl", [{"question": "a", "answer": "b"}, {}])
    command = [sys.executable, "-m", "data_prep.normalize"]
    assert "python -m data_prep.normalize gsm8k" in subprocess.check_output(
        [*command, "--help"], text=True, cwd=tmp_path, env=MODULES
    )
    given = [*command, "gsm8k", raw.name, "--out", "o"]
    done = subprocess.run(given, capture_output=True, text=True, cwd=tmp_path, env=MODULES)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "o: 1 rows kept, 1 refused (1 missing field)",
        "refused rows: o/rejected.jsonl",
        "next: python -m data_prep.check o",
    ]


@pytest.mark.parametrize("out", ["o", "o.jsonl"])
def test_rows_that_are_all_refused_are_listed(tmp_path, out):
    """The sentence names the field, what the row has and the source that reads it; nothing but the list is written."""
    write(tmp_path / "raw.jsonl", [{"instruction": "Say hi.", "response": "Hi."}] * 2 + [{"text": "a"}])
    done = run("alpaca", tmp_path / "raw.jsonl", "--out", tmp_path / out, "--num_proc", 1)
    rejected = tmp_path / ("o/rejected.jsonl" if out == "o" else "o.rejected.jsonl")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"all 3 rows refused (3 missing field), listed in {rejected}; the first, raw.jsonl:1: missing field: output: "
        "the row has instruction, response, which the source dolly reads\n"
    )
    entries = lines(rejected)
    assert [(entry["line"], entry["reason"]) for entry in entries] == [(n, "missing field") for n in (1, 2, 3)]
    assert entries[2]["detail"] == (
        "missing field: output: the row has text; map its columns by fields --map prompt=COLUMN answer=COLUMN"
    )
    report = json.loads((tmp_path / ("o/report.json" if out == "o" else "o.report.json")).read_text())
    assert (report["in"], report["refused"]) == (3, {"missing field": 3})
    assert not (tmp_path / "o.jsonl").exists() and not (tmp_path / "o" / "train").exists()


@real
@pytest.mark.parametrize(
    ("source", "pattern", "kept", "refused"),
    [
        ("gsm8k", "gsm8k/train.jsonl", 7473, {}),
        ("gsm8k", "gsm8k/test.jsonl", 1319, {}),
        ("cmath", "cmath/cmath_dev.jsonl", 600, {}),
        ("mawps", "mawps/mawps_N00.jsonl", 1914, {MISFIT: 6}),
        ("messages", "chat/tinker_conversations.jsonl", 128, {}),
        ("messages", "tools/reason_tool_use_demo_50.jsonl", 48, {"control token in text": 2}),  # a stray </think>
        ("sharegpt", "chat/fastchat_dummy_conversation.json", 500, {}),
        ("sharegpt", "tools/glaive_toolcall_en_demo.json", 300, {}),
        ("sharegpt", "tools/glaive_toolcall_zh_demo.json", 298, {"roles that do not alternate": 2}),
        (
            "sharegpt",
            "chat/sharegpt_zh_1K_format.jsonl",
            991,
            {
                "control token in text": 1,
                "empty text": 1,
                "last message is not the assistant's": 6,
                "no assistant turn": 1,
            },
        ),
    ],
)
def test_real_files(tmp_path, source, pattern, kept, refused):
    path = SHARED / "data" / pattern
    done = run(source, path, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["out"], report["refused"]) == ({"train": kept}, refused)
    stored = load_from_disk(str(tmp_path / "out"))["train"].to_list()
    assert len(stored) == kept == report["in"] - sum(refused.values())
    raw = json.loads(path.read_text()) if path.suffix == ".json" else lines(path)
    rejected = {entry["line"] for entry in lines(tmp_path / "out" / "rejected.jsonl")}
    raw = [row for number, row in enumerate(raw, 1) if number not in rejected]
    for before, after in zip(raw, stored, strict=True):
        assert not re.search(r"\bN_\d", after["messages"][0]["content"])
        if source == "sharegpt":
            speakers = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
            assert [m["role"] for m in after["messages"]] == [speakers[m["from"]] for m in before["conversations"]]
            said = [
                m["value"].replace("\r\n", "\n").strip()
                for m in before["conversations"]
                if m["from"] != "function_call"
            ]
            assert [m["content"] for m in after["messages"] if not m.get("tool_calls")] == said
            asked = [json.loads(m["value"]) for m in before["conversations"] if m["from"] == "function_call"]
            assert [m["tool_calls"][0]["function"] for m in after["messages"] if m.get("tool_calls")] == asked
        elif source == "mawps":  # an oracle of its own: token by token instead of a pattern
            numbers = [float(number) for number in before["Numbers"].split()]
            words, got = before["Question"].split(), after["messages"][0]["content"].split()
            for word, value in zip(words, got, strict=True):
                assert float(value) == numbers[int(word[2:4])] if word.startswith("N_") else value == word
                assert not value.endswith(".0")
            assert float(after["messages"][1]["content"]) == before["Answer"]
        elif source != "messages":
            keys = ("question", "answer") if source == "gsm8k" else ("input", "golden")
            assert after["messages"] == plain(*(before[key].strip() for key in keys))
        else:
            said = [m["content"] for m in before["messages"]]
            said = [one if isinstance(one, list) else [{"type": "text", "value": one}] for one in said]
            told = [{part["type"]: part["value"].strip() for part in one} for one in said]  # one text, one reasoning
            assert [(m["role"], m["content"], m.get("reasoning_content")) for m in after["messages"]] == [
                (m["role"], one.get("text", ""), one.get("reasoning"))
                for m, one in zip(before["messages"], told, strict=True)
            ]
            asked = [json.loads(part["value"]) for one in said for part in one if part["type"] == "tool_call"]
            calls = [call["function"] for m in after["messages"] for call in m.get("tool_calls", [])]
            assert calls == asked


@real
def test_the_oracles_see_something():
    """The real files hold what the checks above are about: fractions, tool calls, several turns."""
    mawps = lines(SHARED / "data/mawps/mawps_N00.jsonl")
    assert sum(not float(row["Answer"]).is_integer() for row in mawps) > 100
    reasoned = (SHARED / "data/tools/reason_tool_use_demo_50.jsonl").read_text()
    assert reasoned.count('"type": "reasoning"') > 100 and reasoned.count('"type": "tool_call"') > 60
    glaive = json.loads((SHARED / "data/tools/glaive_toolcall_en_demo.json").read_text())
    assert sum(turn["from"] == "function_call" for row in glaive for turn in row["conversations"]) > 200


# -- each published shape on a row of our own: what comes out is worked by hand ----------------------------------------
def thought(question, answer, reasoning):
    return [plain(question, answer)[0], {**plain(question, answer)[1], "reasoning_content": reasoning}]


SYSTEM = {"role": "system", "content": "s"}
BIRD = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "d",
        "parameters": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]},
    },
}
SHAPES = [  # (source, raw row, what the row must hold)
    ("alpaca", WHOLE["alpaca"], {"messages": [SYSTEM, *plain("d", "e"), *plain("a\nb", "c")]}),
    ("alpaca", {"instruction": "a", "input": "", "output": "b"}, {"messages": SAID}),
    ("prompt_completion", {"prompt": "a", "completion": "b"}, {"messages": SAID}),
    ("prompt_completion", WHOLE["prompt_completion"], {"messages": SAID}),
    ("fields", WHOLE["fields"], {"messages": [{**SYSTEM, "content": "c"}, *SAID]}),
    (
        "step35",
        {
            "conversations": [
                {
                    "role": "system",
                    "content": "s",
                    "tool_schemas": [TOOL],
                    "loss_mask": 0,
                    "name": "",
                    "meta": {"k": 1},
                },
                {"role": "user", "content": "a", "loss_mask": 0, "name": "ann", "meta": None},
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"function": CALL}],
                    "loss_mask": 1,
                    "reasoning_content": "c",
                },
                {"role": "tool_response", "content": "d", "loss_mask": 0},
                {"role": "assistant", "content": [{"type": "text", "value": "b"}], "loss_mask": 1},
            ]
        },
        {
            "tools": [{"type": "function", "function": TOOL}],
            "messages": [
                {**SYSTEM, "loss_mask": 0},
                {"role": "user", "content": "a", "name": "ann", "loss_mask": 0},
                {
                    "role": "assistant",
                    "content": "",
                    "reasoning_content": "c",
                    "loss_mask": 1,
                    "tool_calls": [{"type": "function", "function": CALL}],
                },
                {"role": "tool", "content": "d", "loss_mask": 0},
                {"role": "assistant", "content": "b", "loss_mask": 1},
            ],
        },
    ),
    (
        "blossom",
        {"id": 7, "type": "chat", "metadata": {"source": "wiki"}, "messages": SAID},
        {"id": "wiki/7", "source": "wiki", "messages": SAID},
    ),
    ("smoltalk", WHOLE["smoltalk"], {"messages": CHAT, "source": "s"}),
    (
        "smoltalk2",
        {
            "messages": plain("a", "<think>\nc\n</think>\n\nb"),
            "source": "t_think",
            "chat_template_kwargs": {
                "custom_instructions": "You are Ada.",
                "enable_thinking": True,
                "python_tools": None,
                "xml_tools": [],
            },
        },
        {
            "messages": thought("a", "b", "c"),
            "source": "t_think",
            "chat_template_kwargs": {"custom_instructions": "You are Ada.", "enable_thinking": True, "xml_tools": []},
        },
    ),
    (
        "smoltalk2",
        {"messages": plain("a", "<think>\n\n</think>\n\nb"), "chat_template_kwargs": {"enable_thinking": False}},
        {"messages": SAID, "chat_template_kwargs": {"enable_thinking": False}},
    ),
    (
        "smoltalk2",
        {
            "messages": plain(
                "a",
                '<think>\nc\n</think>\nb\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n'
                '</tool_call>\n<tool_call>{"arguments": "{}", "name": "g"}</tool_call>',
            )
        },
        {
            "messages": [
                SAID[0],
                {
                    "role": "assistant",
                    "content": "b",
                    "reasoning_content": "c",
                    "tool_calls": [
                        {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}},
                        {"type": "function", "function": {"name": "g", "arguments": {}}},
                    ],
                },
            ]
        },
    ),
    (
        "nemotron",
        WHOLE["nemotron"],
        {"messages": thought("a", "b", "c"), "tags": ["math"], "chat_template_kwargs": {"enable_thinking": True}},
    ),
    (
        "nemotron",
        {"input": "a", "output": "b", "generator": "DeepSeek-R1", "reasoning": "off", "system_prompt": "s"},
        {"messages": [SYSTEM, *SAID], "chat_template_kwargs": {"enable_thinking": False}},
    ),
    ("openthoughts", WHOLE["openthoughts"], {"messages": [SYSTEM, *thought("a", "b", "c")]}),
    (
        "openthoughts",
        {"system": "Use <|begin_of_thought|>.", **shared(("human", "a"), ("gpt", "<think>c</think>b"))},
        {"messages": thought("a", "b", "c")},
    ),
    (
        "s1k",
        {**WHOLE["s1k"], "gemini_thinking_trajectory": "d", "gemini_attempt": "e"},
        {"messages": thought("a", "b", "c")},
    ),
    (
        "s1k",
        {"question": "a", "deepseek_attempt": None, "gemini_thinking_trajectory": "c", "gemini_attempt": "b"},
        {"messages": thought("a", "b", "c")},
    ),
    (
        "s1k",
        {"question": "a", "thinking_trajectories": ["c", "d"], "attempt": "b"},
        {"messages": thought("a", "b", "c")},
    ),
    ("identity", WHOLE["identity"], {"messages": plain("a", "I am Ada")}),
    ("identity", SAID, {"messages": SAID}),  # a list a line
    ("emoji_preference", WHOLE["emoji_preference"], {"messages": SAID}),
    (
        "emoji_preference",
        {"prompt": "a", "chosen": [], "answer_zh": "", "answer_en": "d"},
        {"messages": plain("a", "d")},
    ),
    (
        "emoji_preference",
        {"question": "a", "chosen": None, "answer_zh": "c", "answer_en": "d"},
        {"messages": plain("a", "c")},
    ),
    ("emoji_preference", {**shared(("human", "a")), "chosen": {"from": "gpt", "value": "b"}}, {"messages": SAID}),
    ("emoji_preference", {"prompt": "a", "chosen": "b" * 3001}, {"messages": plain("a", "b" * 3000), "tags": ["cut"]}),
    (
        "arc",
        {"question": "Which is hot?", "choices": {"text": ["ice", "fire"], "label": ["1", "2"]}, "answerKey": "2"},
        {
            "messages": plain(
                "Multiple Choice question: Which is hot?\n- ice=1\n- fire=2\n\n"
                "Respond only with the letter of the correct answer.",
                "2",
            )
        },
    ),
    (
        "mmlu",
        {"train": WHOLE["mmlu"]},
        {
            "messages": plain(
                "Multiple Choice question: a\n- b=A\n- c=B\n- d=C\n- e=D\n\n"
                "Respond only with the letter of the correct answer.",
                "C",
            ),
            "tags": ["s"],
        },
    ),
    (
        "bfcl",
        WHOLE["bfcl"],
        {"messages": [SAID[0], {"role": "assistant", "content": "", "tool_calls": calls({"x": 1})}], "tools": [BIRD]},
    ),
    (
        "hermes",
        WHOLE["hermes"],
        {
            "messages": [
                SYSTEM,
                SAID[0],
                turn(
                    "assistant", "", tool_calls=[{"type": "function", "function": {"name": "weather", "arguments": {}}}]
                ),
                turn("tool", "d"),
                SAID[1],
            ],
            "tools": [{"type": "function", "function": TOOL}],
        },
    ),
    ("conversation_pairs", WHOLE["conversation_pairs"], {"messages": [*SAID, *plain("d", "e")]}),
    ("list_of_strings", WHOLE["list_of_strings"], {"messages": SAID}),
    ("turn_lists", WHOLE["turn_lists"], {"messages": [*SAID, *plain("d", "e")]}),
    ("message_tree", WHOLE["message_tree"], {"messages": SAID, "id": "t", "lang": "en"}),
    ("moss", WHOLE["moss"], {"messages": [SYSTEM, *thought("a", "b", "c")]}),
    ("gemini", WHOLE["gemini"], {"messages": [SYSTEM, *SAID]}),
    (
        "chatglm3",
        WHOLE["chatglm3"],
        {
            "messages": [
                SAID[0],
                turn(
                    "assistant",
                    "c",
                    tool_calls=[{"type": "function", "function": {"name": "weather", "arguments": {"days": 2}}}],
                ),
                turn("tool", '{"sky":"d"}', name="weather"),
                SAID[1],
            ],
            "tools": [{"type": "function", "function": TOOL}],
        },
    ),
    ("dolly", WHOLE["dolly"], {"messages": plain("a\nb", "c")}),
    ("kdconv", WHOLE["kdconv"], {"messages": SAID, "lang": "zh"}),
    ("lccc", WHOLE["lccc"], {"messages": plain("好吗？", "很好"), "lang": "zh"}),
    ("corecode", WHOLE["corecode"], {"messages": plain("A: a\nB: b\n\nc", "d"), "lang": "zh"}),
    (
        "mutual",
        WHOLE["mutual"],
        {
            "messages": plain(
                "Multiple Choice question: m : a\nf : b\n- c=A\n- d=B\n- e=C\n- f=D\n\n"
                "Respond only with the letter of the correct answer.",
                "B",
            )
        },
    ),
    ("query_response", WHOLE["query_response"], {"messages": [SYSTEM, *plain("d", "e"), *SAID]}),
    ("preference", WHOLE["preference"], {"messages": SAID}),
    ("svamp", WHOLE["svamp"], {"messages": plain("a. b?", "7"), "id": "q-1"}),
    (
        "xlam",
        WHOLE["xlam"],
        {
            "messages": [SAID[0], turn("assistant", "", tool_calls=calls({"x": 0.7}))],
            "tools": [
                {
                    "type": "function",
                    "function": {
                        "name": "f",
                        "description": "d",
                        "parameters": {
                            "type": "object",
                            "properties": {"x": {"type": "number"}, "y": {"type": "string"}},
                            "required": ["x"],
                        },
                    },
                }
            ],
        },
    ),
]


@pytest.mark.parametrize(("source", "raw", "holds"), SHAPES)
def test_published_shapes(source, raw, holds):
    row = normalize.to_row(raw, source, "n-1", **GIVEN.get(source, {}))
    assert {key: row[key] for key in holds} == holds
    assert row["source"] == holds.get("source", source)


def test_every_shape_has_a_row_worked_by_hand():
    elsewhere = {"gsm8k", "cmath", "mawps", "messages", "sharegpt"}  # above
    assert {source for source, _, _ in SHAPES} | elsewhere == {*WHOLE}


def test_fields_of_any_name(tmp_path):
    raw = {
        "d": {"turns": [{"who": "bot_user", "said": "a"}, {"who": "bot", "said": "b", "why": "c"}]},
        "key": 4,
        "t": json.dumps([TOOL]),
    }
    named = ["messages=d.turns", "role=who", "content=said", "reasoning=why", "id=key", "tools=t"]
    flags = ["--map", *named, "--roles", "bot_user=user", "bot=assistant"]
    (row,), _ = normalized(tmp_path, "fields", [raw], *flags)
    assert (row["id"], row["messages"]) == ("4", thought("a", "b", "c"))
    assert row["tools"] == [{"type": "function", "function": TOOL}]
    (row,), _ = normalized(
        tmp_path, "fields", [{"a.b": "a", "r": "b", "why": "c"}], "--map", "prompt=a.b", "answer=r", "reasoning=why"
    )
    assert row["messages"] == thought("a", "b", "c")


def test_reasoning_kept_dropped_or_in_line(tmp_path):
    raw = [{"messages": thought("a", "b", "c"), "chat_template_kwargs": {"enable_thinking": True}}]
    kept = [normalized(tmp_path, "smoltalk2", raw, "--reasoning", how)[0][0] for how in ("keep", "drop", "inline")]
    assert [row["messages"] for row in kept] == [thought("a", "b", "c"), SAID, plain("a", "c\n\nb")]
    assert [row["chat_template_kwargs"]["enable_thinking"] for row in kept] == [True, False, False]
    assert not any("<think>" in json.dumps(row) for row in kept)


def test_mawps_keeps_what_disagrees_when_told_to(tmp_path):
    raw = {"Question": "N_00 , N_01", "Numbers": "7.0 2.0", "Equation": "/ N_00 N_01", "Answer": 3.0}
    near = {"Question": "N_00 , N_01", "Numbers": "3.0 10.0", "Equation": "/ N_01 N_00", "Answer": 3.33333}
    rows, rejected = normalized(tmp_path, "mawps", [raw, near])
    assert (len(rows), rows[0]["tags"], [entry["line"] for entry in rejected]) == (1, [], [1])
    rows, rejected = normalized(tmp_path, "mawps", [raw, near], "--keep_disagreeing")
    assert ([row["tags"] for row in rows], rejected) == ([["equation disagrees"], []], [])


@pytest.mark.parametrize("source", sources.MADE)
def test_spelling_is_right_and_its_splits_never_meet(tmp_path, source):
    """Spelled and counted anew from the question; words of train and validation share none, under any seeds."""
    words = {"train": set(), "validation": set()}
    for seed in (1, 2):
        out = tmp_path / str(seed)
        done = run(source, "--rows", 300, "--eval_rows", 300, "--seed", seed, "--out", out, "--num_proc", 1)
        assert done.returncode == 0, done.stderr
        assert "keys not kept" not in done.stdout
        for split, rows_of in load_from_disk(str(out)).items():
            assert len(rows_of) == 300
            for row in rows_of.to_list():
                asked, answer = (turn["content"] for turn in row["messages"])
                word, letters = re.search(r"(?m)^(\w+):(\w(?:,\w)*)$", answer).groups()
                assert letters == ",".join(word) and word in asked
                words[split].add(word)
                if not asked.startswith("Spell the word"):
                    letter = re.search(r"letter '(\w)'", answer)[1]
                    assert answer.endswith(f"#### {Counter(word)[letter]}")
                    assert eval(re.search(r"<<(.*)=", answer)[1]) == Counter(word)[letter]
    assert not words["train"] & words["validation"]
    assert min(map(len, words.values())) > 250  # seeds do not repeat each other
    assert tree(tmp_path / "1" / "train") != tree(tmp_path / "2" / "train")


def test_spelling_takes_a_list_of_words(tmp_path):
    (tmp_path / "words.txt").write_text("\n".join("a" * n for n in range(1, 60)))
    flags = ("--rows", 40, "--eval_rows", 4, "--words", tmp_path / "words.txt", "--num_proc", 1)
    assert run("simple_spelling", *flags, "--out", tmp_path / "o").returncode == 0
    out = load_from_disk(str(tmp_path / "o"))
    seen = {split: {len(row["messages"][0]["content"].split()[-1]) for row in out[split]} for split in out}
    assert seen["train"] | seen["validation"] <= {*range(1, 60)} and not seen["train"] & seen["validation"]
    assert json.loads((tmp_path / "o" / "report.json").read_text())["input"]["words.txt"]
    (tmp_path / "few.txt").write_text("a")
    done = run("spelling", "--rows", 4, "--words", tmp_path / "few.txt", "--out", tmp_path / "p")
    assert (done.returncode, "few.txt: too few words" in done.stderr) == (2, True)


NULLED = {
    "type": "function",
    "function": {
        "name": "f",
        "description": None,
        "parameters": {
            "type": "object",
            "required": None,
            "properties": {
                "city": {"type": "string", "enum": None},
                "when": {"type": ["string", "null"], "enum": None},
                "x": None,
            },
        },
    },
}
OTHER = {
    "type": "function",
    "function": {
        "name": "g",
        "description": "d",
        "parameters": {
            "type": "object",
            "required": ["x"],
            "properties": {"city": None, "when": None, "x": {"type": "string", "enum": ["1"]}},
        },
    },
}


def null_filled():
    """A row as Arrow hands it back where rows of differing tools share a column, and what it was before."""
    turns = [
        turn("user", "a", tool_calls=None),
        turn(
            "assistant",
            "",
            tool_calls=[
                {"type": "function", "function": {"name": "f", "arguments": {"city": "Oslo", "when": None, "x": None}}},
                {"type": "function", "function": {"name": "g", "arguments": {"city": None, "when": None, "x": "1"}}},
            ],
        ),
    ]
    schema = {"type": "object", "properties": {"city": {"type": "string"}, "when": {"type": ["string", "null"]}}}
    return {"messages": turns, "tools": [NULLED, OTHER]}, schema


def test_nulls_that_arrow_filled_in_go_and_those_of_the_schema_stay(tmp_path):
    raw, schema = null_filled()
    path = tmp_path / "raw.parquet"
    # a column has one kind
    raw = json.loads(json.dumps(raw).replace('"type": "string"', '"type": ["string"]'))
    pq.write_table(pa.Table.from_pylist([raw]), path)
    assert run("messages", path, "--out", tmp_path / "o.jsonl", "--num_proc", 1).returncode == 0
    (row,) = lines(tmp_path / "o.jsonl")
    first, second = (call["function"]["arguments"] for call in row["messages"][1]["tool_calls"])
    assert (first, second) == ({"city": "Oslo", "when": None}, {"x": "1"})
    tools = json.dumps(row["tools"])
    assert tools.replace('["string", "null"]', "").count("null") == 0
    assert row["tools"][0]["function"]["parameters"]["properties"].keys() == schema["properties"].keys()
    (kept,) = row["tools"][1]["function"]["parameters"]["properties"].items()
    assert kept == ("x", {"type": ["string"], "enum": ["1"]})


def test_nulls_of_a_parquet_file_go_by_tools_in_json_text(tmp_path):
    """The schema that knows a null may stand in text beside arguments that are typed."""
    raw, _ = null_filled()
    raw["tools"] = json.dumps([NULLED, OTHER])
    pq.write_table(pa.Table.from_pylist([raw]), tmp_path / "raw.parquet")
    assert run("messages", tmp_path / "raw.parquet", "--out", tmp_path / "o.jsonl", "--num_proc", 1).returncode == 0
    (row,) = lines(tmp_path / "o.jsonl")
    first, second = (call["function"]["arguments"] for call in row["messages"][1]["tool_calls"])
    assert first == {"city": "Oslo", "when": None, "x": None} and second == {"city": None, "when": None, "x": "1"}
    assert row["tools"] == [NULLED, OTHER]  # JSON text, into which Arrow fills nothing


DEFAULTS = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "d",
        "parameters": {
            "type": "object",
            "properties": {"x": {"type": ["string", "null"], "enum": ["a", None], "default": None}},
        },
    },
}


@pytest.mark.parametrize("ending", ["jsonl", "json"])
@pytest.mark.parametrize("out", ["o", "o.jsonl"])
def test_nulls_of_json_reach_the_template(tmp_path, ending, out):
    """In JSON a null stands where somebody wrote it: a default, an argument. It stays in a folder and in a file, and
    recipes load it and render it; a template argument that is null is none."""
    turns = [turn("user", "a"), turn("assistant", "", tool_calls=calls({"x": None, "y": [{"z": None}]}))]
    raw = [
        {"messages": turns, "tools": [DEFAULTS], "chat_template_kwargs": {"enable_thinking": None}},
        {"messages": CHAT, "images": None},
    ]
    path = write(tmp_path / "raw.jsonl", raw)
    if ending == "json":
        path = tmp_path / "raw.json"
        path.write_text(json.dumps(raw))
    assert run("messages", path, "--out", tmp_path / out, "--num_proc", 1).returncode == 0
    row = load_sets(tmp_path / out)["train"][0]
    assert (row["messages"], row["tools"], row["chat_template_kwargs"]) == (turns, [DEFAULTS], {})
    template = (REPO / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")
    (text,), _ = render_jinja_template([row["messages"]], tools=row["tools"], chat_template=template)
    assert '"enum": ["a", null], "default": null' in text
    assert '"arguments": {"x": null, "y": [{"z": null}]}' in text


def test_the_last_of_two_equal_keys_counts(tmp_path):
    (tmp_path / "raw.jsonl").write_text('{"question": "a", "question": "b", "answer": "c"}\n')
    assert run("gsm8k", tmp_path / "raw.jsonl", "--out", tmp_path / "o.jsonl").returncode == 0
    assert lines(tmp_path / "o.jsonl")[0]["messages"] == plain("b", "c")


def test_first_rows_only(tmp_path):
    rows_in = [{"question": f"q{n}", "answer": "a"} for n in range(9)]
    path = write(tmp_path / "raw.jsonl", rows_in)
    (tmp_path / "raw.json").write_text(json.dumps(rows_in))
    whole = run("gsm8k", path, "--out", tmp_path / "all.jsonl", "--num_proc", 1)
    assert whole.returncode == 0
    with mock.patch("data_prep.common.text_files.BLOCK", 100), mock.patch("data_prep.common.text_files.HEAD", 100):
        for number, name in enumerate(("raw.jsonl", "raw.json")):
            out = tmp_path / f"o{number}.jsonl"
            assert run("gsm8k", tmp_path / name, "--rows", 4, "--out", out, "--num_proc", 1).returncode == 0
            assert [row["messages"][0]["content"] for row in lines(out)] == ["q0", "q1", "q2", "q3"]
    reports = [json.loads((tmp_path / f"{name}.report.json").read_text()) for name in ("all", "o0")]
    assert reports[0]["input"] == reports[1]["input"]  # of the whole file


def test_splits_of_a_folder_stay_apart(tmp_path):
    raw = write(tmp_path / "raw.jsonl", [{"question": f"q{n}", "answer": "a"} for n in range(9)])
    assert run("gsm8k", raw, "--out", tmp_path / "a", "--eval_rows", 2, "--num_proc", 1).returncode == 0
    assert run("messages", tmp_path / "a", "--out", tmp_path / "b", "--num_proc", 1).returncode == 0
    a, b = (load_from_disk(str(tmp_path / name)) for name in "ab")
    assert {split: a[split]["id"] for split in a} == {split: b[split]["id"] for split in b}
    assert {split: len(a[split]) for split in a} == {"train": 7, "validation": 2}
    for flags, words in (((), "a file has no splits"), (("--eval_rows", 1), "the input has splits already")):
        done = run("messages", tmp_path / "a", "--out", tmp_path / ("c" if flags else "c.jsonl"), *flags)
        assert (done.returncode, words in done.stderr) == (2, True), done.stderr


def test_flags_that_do_not_fit_are_refused(tmp_path):
    good = write(tmp_path / "good.jsonl", [{"question": "a", "answer": "b"}])
    for args, words in (
        (("gsm8k", good, "--fill", "a=b"), "--fill: gsm8k has no use for it"),
        (("gsm8k", good, "--words", good), "--words: gsm8k has no use for it"),
        (("fields", good), "fields: pass --map prompt=COLUMN"),
        (("fields", good, "--map", "question=a"), "--map question=a: pass NAME=VALUE with one of prompt"),
        (("fields", good, "--map", "prompt"), "--map prompt: pass NAME=VALUE"),
        (("spelling", good, "--rows", 3), "spelling makes its rows"),
        (("spelling",), "spelling makes its rows"),
        (("gsm8k",), "gsm8k needs an INPUT"),
        (("gsm8k", good, "--rows", 0), "--rows 0: pass a number above 0"),
        (("bfcl", good, "--answers", good), "good.jsonl:1: no id and ground_truth"),
        (("bfcl", good, "--answers", tmp_path / "none"), "none: no such file"),
    ):
        done = run(*args, "--out", tmp_path / "o", "--num_proc", 1)
        assert (done.returncode, words in done.stderr) == (2, True), done.stderr
        assert len(done.stderr.splitlines()) == 1 and [*tmp_path.iterdir()] == [good]


# -- fuzzed rows ------------------------------------------------------------------------------------------------------
def leaves(value, path=()):
    """Paths to every value in a JSON value."""
    yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from leaves(item, (*path, key))


def fuzz_line(source, rng):
    """One line of bytes: a sound row with one thing wrong, or none."""
    raw = json.loads(json.dumps(WHOLE[source]))
    odd = [
        None,
        3,
        -0.5,
        True,
        [],
        {},
        "",
        " ",
        [[]],
        "\ud800",
        "a\u0000b",
        "\ufeffa",
        10**30,
        "<|im_end|>",
        "[" * 99,
        [None],
        [{}],
        {"role": []},
        "x" * 10_000,
        float("nan"),
        float("inf"),
    ]
    path = rng.choice([*leaves(raw)][1:])
    holder = raw
    for key in path[:-1]:
        holder = holder[key]
    kind = rng.randrange(10)
    if kind < 4:
        holder[path[-1]] = rng.choice(odd)
    elif kind == 4 and isinstance(holder, dict):
        del holder[path[-1]]
    line = json.dumps(raw, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if kind == 5:
        return line[: rng.randrange(len(line))]
    if kind == 6:
        cut = rng.randrange(len(line))
        odd = [b"\x00", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\\u12", b"\r"]
        return line[:cut] + rng.choice(odd) + line[cut:]
    if kind == 7:
        return json.dumps(raw).encode(rng.choice(["utf-16", "utf-16-le", "utf-32", "cp037"]))
    if kind == 8:
        depth = rng.choice([10, 300, 1100, 20_000])
        return b'{"messages":' + b"[" * depth + b"]" * depth + b"}"
    if kind == 9:
        first = json.dumps(next(iter(raw))).encode()
        return b"{" + first + b": 1, " + line[1:]
    return line


def fuzz(path, source, count, big=0):
    rng, whole = random.Random(source), json.dumps(WHOLE[source]).encode()
    out = [whole, *(fuzz_line(source, rng) for _ in range(count - 1 - big))]
    out += [b'{"question": "' + b"x" * 10_000_000 + b'", "messages": "a", "answer": "b"}'] * big
    path.write_bytes(b"\n".join(out) + b"\n")
    return {n for n, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip(b" \t\r\n\x0b\x0c")}


def accounted_for(tmp_path, source, count, big=0, num_proc=(1,)):
    path = tmp_path / "raw.jsonl"
    numbers = fuzz(path, source, count, big)
    trees = []
    for number in num_proc:
        out = tmp_path / str(number) / source
        done = run(source, path, "--out", out, "--num_proc", number, *FLAGS.get(source, []))
        assert done.returncode == 0, done.stderr
        report = json.loads((out / "report.json").read_text())
        rejected = lines(out / "rejected.jsonl")
        kept = load_from_disk(str(out))["train"]
        assert report["in"] == len(numbers) == len(kept) + len(rejected)
        assert report["refused"] == dict(sorted(Counter(entry["reason"] for entry in rejected).items()))
        assert all(entry["file"] == "raw.jsonl" and entry["reason"] and entry["detail"] for entry in rejected)
        refused = [entry["line"] for entry in rejected]
        assert refused == sorted({*refused}) and {*refused} < numbers
        ids = [row_id for row_id in kept["id"] if row_id.startswith("raw-")]
        named = {int(row_id.split("-")[1]) for row_id in ids if row_id.count("-") == 1}
        assert not named & {*refused} and (
            len(named) == len(kept) or source in ("blossom", "messages", "message_tree", "svamp")
        )
        assert len(rejected) > len(numbers) / 10 and len(kept) > len(numbers) / 10  # the fuzz is no constant
        trees.append(tree(out))
    assert all(one == trees[0] for one in trees)


@pytest.mark.parametrize("source", sorted(WHOLE))
def test_fuzzed_rows_are_accounted_for(tmp_path, source):
    accounted_for(tmp_path, source, 200, big=source == "gsm8k")


def test_fuzzed_rows_are_the_same_on_two_processes(tmp_path):
    with mock.patch("data_prep.common.text_files.BLOCK", 20_000):
        accounted_for(tmp_path, "step35", 300, num_proc=(1, 2))


@pytest.mark.long
@pytest.mark.parametrize("source", sorted(WHOLE))
def test_10_000_fuzzed_rows(tmp_path, source):
    with mock.patch("data_prep.common.text_files.BLOCK", 1 << 20):
        accounted_for(tmp_path, source, int(os.environ.get("FUZZ_ROWS", 10_000)), big=2, num_proc=(1, 2))


# -- raw shards in the exact schema of sets that cannot be had here, made of real chats -------------------------------
def real_chats():
    for name in ("tools/glaive_toolcall_en_demo.json", "tools/glaive_toolcall_zh_demo.json"):
        yield from json.loads((SHARED / "data" / name).read_text())
    yield from lines(SHARED / "data/chat/sharegpt_zh_1K_format.jsonl")


@real
def test_step35_shards_of_real_chats(tmp_path):
    """StepTron's refusals counted by a reading of their own; kept rows equal what sharegpt makes of the same chats."""
    chats, shard = [*real_chats()], []
    roles = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool_response"}
    for row in chats:
        turns = []
        for number, said in enumerate(row["conversations"]):
            calls_said = [json.loads(said["value"])] if said["from"] == "function_call" else None
            role, value = roles[said["from"]], None if calls_said else said["value"]
            turns.append(
                {
                    "role": role,
                    "content": value,
                    "name": "",
                    "meta": {"n": number},
                    "tool_calls": calls_said,
                    "loss_mask": int(role == "assistant" and number % 3 > 0),
                }
            )
        turns[0]["tools"] = row.get("tools")
        shard.append({"conversations": turns})
    for name, part in (("chunk_0.json", shard[:800]), ("chunk_1.json", shard[800:])):
        (tmp_path / name).write_text(json.dumps(part, ensure_ascii=False, indent=1))
    write(tmp_path / "chats.jsonl", chats)
    assert run("step35", tmp_path / "chunk_*.json", "--out", tmp_path / "a", "--num_proc", 1).returncode == 0
    assert run("sharegpt", tmp_path / "chats.jsonl", "--out", tmp_path / "b", "--num_proc", 1).returncode == 0
    step, other = (load_from_disk(str(tmp_path / name))["train"].to_list() for name in "ab")
    assert len(step) == len(other) > 1500
    flags = 0
    for ours, theirs in zip(step, other, strict=True):
        flags += sum(turn.pop("loss_mask") for turn in ours["messages"])
        assert (ours["messages"], ours["tools"]) == (theirs["messages"], theirs["tools"])
    assert flags > 500
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    last = sum(chat["conversations"][-1]["from"] not in ("gpt", "function_call") for chat in chats)
    assert report["refused"]["last message is not the assistant's"] == last > 0


@real
def test_bfcl_calls_fit_the_schemas_and_the_references(tmp_path):
    read_json_exactly()
    done = run("bfcl", SHARED / "data/tools/bfcl", "--out", tmp_path / "o", "--num_proc", 1)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    assert report["in"] == 240 + 200 + 200 + 400 == report["out"]["train"] + sum(report["refused"].values())
    assert report["refused"] == {
        "missing field": 3,
        "no reference answer": 240,
        "several user turns without the tools' replies": 197,
    }
    truth = {}
    for path in (SHARED / "data/tools/bfcl/possible_answer").glob("*e*.json"):
        truth |= {row["id"]: row["ground_truth"] for row in lines(path)}
    checked = 0
    for row in load_from_disk(str(tmp_path / "o"))["train"].to_list():
        schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in row["tools"]}
        for call, right in zip(row["messages"][-1]["tool_calls"], truth[row["id"]], strict=True):
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            jsonschema.Draft202012Validator.check_schema(schemas[name])
            jsonschema.validate(arguments, schemas[name])
            for key, value in arguments.items():
                assert value in right[name][key] or isinstance(value, (dict, list)), (row["id"], key)
            assert all("" in values for key, values in right[name].items() if key not in arguments)
            checked += len(arguments)
    assert checked > 1000


@real
@pytest.mark.parametrize(
    ("source", "pattern", "kept", "refused", "flags"),
    [
        ("arc", "arc/*.jsonl", 6918, {}, []),
        ("identity", "chat/identity.json", 91, {}, ["--fill", "name=Ada", "author=us"]),
        ("identity", "chat/identity.json", 6, {"placeholder not filled in": 85}, []),
        ("emoji_preference", "preference/dpo_zh_demo.json", 300, {}, []),
        ("fields", "cmath/distractor.jsonl", 360, {}, ["--map", "prompt=input", "answer=golden"]),
    ],
)
def test_more_real_files(tmp_path, source, pattern, kept, refused, flags):
    done = run(source, SHARED / "data" / pattern, "--out", tmp_path / "out", "--num_proc", 1, *flags)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["out"], report["refused"]) == ({"train": kept}, refused)
    stored = load_from_disk(str(tmp_path / "out"))["train"].to_list()
    if source == "arc":
        raw = [row for path in sorted((SHARED / "data/arc").iterdir()) for row in lines(path)]
        for before, after in zip(raw, stored, strict=True):
            asked, answer = (turn["content"] for turn in after["messages"])
            right = dict(zip(before["choices"]["label"], before["choices"]["text"], strict=True))[before["answerKey"]]
            assert f"- {right}={answer}\n" in asked and asked.count("\n- ") == len(before["choices"]["text"])
    if source == "emoji_preference":
        raw = json.loads((SHARED / "data" / pattern).read_text())
        cut = [row for row, after in zip(raw, stored, strict=True) if "cut" in after["tags"]]
        assert all(max(len(turn["content"]) for turn in row["messages"]) <= 3000 for row in stored)
        assert all(len(row["chosen"]["value"]) > 3000 or len(row["conversations"][0]["value"]) > 3000 for row in cut)
