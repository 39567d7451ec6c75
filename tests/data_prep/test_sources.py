"""What a row means survives data_prep.normalize: keys that say what is trained, shapes of other trainers, auto, --map.

Each expected row is worked by hand; what is trained is seen in the tokens, by transformers' own mask.

Each of these turns the suite red (tried, over 150): a flag that is not read, is read the wrong way round, is of a
part, of a user turn or between 0 and 1; train_turns not set, or set over the row's own; system, functions,
function_call, reasoning by another name, tools of the first message, tags as text, history or only_last left out;
two names that disagree; an empty system turn kept; a call that takes the text before it, or an earlier call, away;
empty arguments, JSON within JSON, Python's notation; a closing </think> alone; pictures, labels and weights of a
row or a message; a key of a row or of a message that is not counted, half a surrogate pair in it; a deleted, spam
or unranked reply taken, an open question kept; 7.0 of GSM8K, True for true; types and optional parameters of xLAM;
a column that no row has, bad templates, paths into lists, calls in a mapped answer; auto's share, its maps and its
first chunk; --rows and --eval_rows ignored; of two names that differ the first taken, two that are equal refused, an
empty one taken; what a pair, a reply or a row says of its answer left out, each by itself; a token of media in code or
in talk of HTML refused, one that stands alone kept; a result within a call, a key of a part, an id that is a number;
turns of MOSS in the order of their names, its None kept, types of Gemini's schemas, a loss flag of ChatGLM3 left out;
a last utterance without a reply kept, blanks between Chinese words kept, options of CORECODE left out, utterances of
MuTual in one line, domain left out of the tags.
"""

import io
import json
import sys
from collections import Counter
from functools import partial
from unittest import mock

import pytest
from datasets import load_from_disk
from transformers import AutoTokenizer

from data_prep import normalize
from data_prep.common.errors import InvalidRow, UsageError
from data_prep.common.exact_numbers import read_json_exactly
from data_prep.common.sources import SOURCES
from data_prep.common.sources.detect import detect_source, normalize_arguments
from tests.data_prep.test_normalize import CHAT, TOOL, WHOLE, answered, lines, normalized, plain, turn, write
from tests.helpers.runs import REPO, run_script

run = partial(run_script, normalize)
USER, TOOL_TURN = CHAT[0], turn("tool", "pong")


def call(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def only_row(tmp_path, source, raw, *flags):
    rows, rejected = normalized(tmp_path, source, [raw], *flags)
    assert not rejected
    return rows[0]


# -- files of other shapes, by auto and by name -----------------------------------------------------------------------
HERMES_SYSTEM = (
    'You call functions. <tools>[{"type": "function", "function": {"name": "tide", "parameters": {"type": "object", '
    '"properties": {"port": {"type": "string"}}}}}]</tools>'
)
TIDE = {
    "type": "function",
    "function": {"name": "tide", "parameters": {"type": "object", "properties": {"port": {"type": "string"}}}},
}
CONVERT = [
    {
        "name": "convert",
        "description": "Convert units",
        "parameters": {"value": {"type": "float"}, "to": {"type": "str"}, "digits": {"type": "int, optional"}},
    }
]
FILES = [  # (name, text, source, --map, messages of its last row)
    (
        "body.json",
        '[\n {\n  "ID": "q-1",\n  "Body": "A shelf holds 12 books. 5 are lent.",\n  "Question": "How many remain?",\n'
        '  "Answer": 7.0\n }\n]',
        "svamp",
        [],
        plain("A shelf holds 12 books. 5 are lent. How many remain?", "7"),
    ),
    (
        "columns.json",
        '{"prompt": ["Ping?", "Tick?"], "answer": ["Pong.", "Tock."]}',
        "fields",
        ["prompt=prompt", "answer=answer"],
        plain("Tick?", "Tock."),
    ),
    (
        "pairs.jsonl",
        json.dumps({"conversation": [{"human": "Run?", "assistant": "Yes."}, {"human": "Long?", "assistant": "No."}]}),
        "conversation_pairs",
        [],
        [*plain("Run?", "Yes."), *plain("Long?", "No.")],
    ),
    (
        "hermes.jsonl",
        json.dumps(
            {
                "conversations": [
                    {"from": "system", "value": HERMES_SYSTEM},
                    {"from": "human", "value": "High tide?"},
                    {
                        "from": "gpt",
                        "value": "I look. <tool_call>\n{'name': 'tide', 'arguments': {'port': 'Brest'}}\n</tool_call>",
                    },
                    {"from": "tool", "value": '<tool_response>\n{"high": "06:12"}\n</tool_response>'},
                    {"from": "gpt", "value": "06:12."},
                ]
            }
        ),
        "hermes",
        [],
        [
            turn("system", "You call functions."),
            turn("user", "High tide?"),
            turn("assistant", "I look.", tool_calls=[call("tide", {"port": "Brest"})]),
            turn("tool", '{"high": "06:12"}'),
            turn("assistant", "06:12."),
        ],
    ),
    (
        "context.jsonl",
        json.dumps({"instruction": "Which river?", "context": "It lies on the Aare.", "response": "The Aare."}),
        "dolly",
        [],
        plain("Which river?\nIt lies on the Aare.", "The Aare."),
    ),
    ("strings.jsonl", json.dumps({"conversations": ["How?", "So."]}), "list_of_strings", [], plain("How?", "So.")),
    (
        "history.jsonl",
        json.dumps({"system": "Short.", "history": [["Jam?", "Fruit."]], "query": "Jelly?", "response": "Same."}),
        "query_response",
        [],
        [turn("system", "Short."), *plain("Jam?", "Fruit."), *plain("Jelly?", "Same.")],
    ),
    (
        "table.csv",
        '\ufeffticket,subject,question,answer\r\n1,A,"I cannot log in,\nit says ""expired"".",42\r\n',
        "fields",
        ["prompt=question", "answer=answer"],
        plain('I cannot log in,\nit says "expired".', "42"),
    ),
    (
        "table.tsv",
        "question\tanswer\nWho?\tI, 7.0\n",
        "fields",
        ["prompt=question", "answer=answer"],
        plain("Who?", "I, 7.0"),
    ),
    (
        "wrapped.json",
        json.dumps({"version": 1, "data": [{"messages": plain("Ping?", "Pong.")}]}, indent=2),
        "messages",
        [],
        plain("Ping?", "Pong."),
    ),
    (
        "xlam.jsonl",
        json.dumps(
            {
                "id": 0,
                "query": "10 miles?",
                "tools": json.dumps(CONVERT),
                "answers": '[{"name": "convert", "arguments": {"value": 0.3, "to": "km"}}]',
            }
        ),
        "xlam",
        [],
        [turn("user", "10 miles?"), turn("assistant", "", tool_calls=[call("convert", {"value": 0.3, "to": "km"})])],
    ),
    (
        "moss.json",
        json.dumps(
            {
                "conversation_id": 1,
                "meta_instruction": "You are an AI assistant whose name is MOSS.\n",
                "num_turns": 2,
                "chat": {
                    "turn_1": {
                        "Human": "<|Human|>: Two sides are 16 and 12, the third?<eoh>\n",
                        "Inner Thoughts": "<|Inner Thoughts|>: Pythagoras.<eot>\n",
                        "Commands": "<|Commands|>: None<eoc>\n",
                        "Tool Responses": "<|Results|>:\nNone\n<eor>\n",
                        "MOSS": "<|MOSS|>: 20.<eom>\n",
                    },
                    "turn_2": {
                        "Human": "<|Human|>: None<eoh>\n",
                        "Inner Thoughts": "<|Inner Thoughts|>: None<eot>\n",
                        "Commands": "<|Commands|>: None<eoc>\n",
                        "Tool Responses": "<|Results|>: None<eor>\n",
                        "MOSS": "<|MOSS|>: Then no more.<eom>\n",
                    },
                },
                "category": "tool",
            },
            indent=4,
        ),
        "moss",
        [],
        [
            turn("system", "You are an AI assistant whose name is MOSS."),
            turn("user", "Two sides are 16 and 12, the third?"),
            turn("assistant", "20.", reasoning_content="Pythagoras."),
            *plain("None", "Then no more."),
        ],
    ),
    (
        "gemini.jsonl",
        json.dumps(
            {
                "systemInstruction": {"role": "system", "parts": [{"text": "You sell phones."}]},
                "contents": [
                    {"role": "user", "parts": [{"text": "In "}, {"text": "stock?"}]},
                    {
                        "role": "model",
                        "parts": [
                            {"text": "Ask.", "thought": True},
                            {"functionCall": {"name": "get_sku", "args": {"product": "8 Pro"}}},
                        ],
                    },
                    {
                        "role": "user",
                        "parts": [{"functionResponse": {"name": "get_sku", "response": {"sku": "GA0"}}}],
                    },
                    {"role": "model", "parts": [{"text": "Yes."}]},
                ],
                "tools": [
                    {
                        "functionDeclarations": [
                            {
                                "name": "get_sku",
                                "parameters": {"type": "OBJECT", "properties": {"product": {"type": "STRING"}}},
                            }
                        ]
                    }
                ],
            }
        ),
        "gemini",
        [],
        [
            turn("system", "You sell phones."),
            turn("user", "In stock?"),
            turn("assistant", "", reasoning_content="Ask.", tool_calls=[call("get_sku", {"product": "8 Pro"})]),
            turn("tool", '{"sku":"GA0"}', name="get_sku"),
            turn("assistant", "Yes."),
        ],
    ),
    (
        "chatglm3.json",
        json.dumps(
            [
                {
                    "tools": [{"name": "track", "parameters": {"type": "object", "properties": {}}}],
                    "conversations": [
                        {"role": "system", "content": "Be brief."},
                        {"role": "user", "content": "The price?"},
                        {"role": "assistant", "content": "I look it up."},
                        {
                            "role": "tool",
                            "name": "track",
                            "parameters": {"symbol": "10111"},
                            "observation": {"price": 12412},
                        },
                        {"role": "assistant", "content": "12412.", "loss": False},
                    ],
                }
            ],
            indent=2,
        ),
        "chatglm3",
        [],
        [
            turn("system", "Be brief."),
            turn("user", "The price?"),
            turn("assistant", "I look it up.", tool_calls=[call("track", {"symbol": "10111"})]),
            turn("tool", '{"price":12412}', name="track"),
            turn("assistant", "12412.", loss_mask=0),
        ],
    ),
    (
        "hh.jsonl",
        json.dumps({"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "x"}),
        "preference",
        [],
        plain("Hi", "Hello"),
    ),
    (
        "openai.jsonl",
        json.dumps({"input": {"messages": [USER]}, "preferred_output": [CHAT[1]], "non_preferred_output": [USER]}),
        "preference",
        [],
        CHAT,
    ),
]


@pytest.mark.parametrize(("name", "text", "source", "mapped", "messages"), FILES, ids=[file[0] for file in FILES])
def test_a_file_of_another_shape_is_read_by_auto_and_by_its_source(tmp_path, name, text, source, mapped, messages):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8", newline="")
    done = run("auto", path, "--out", tmp_path / "auto.jsonl", "--num_proc", 1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"auto: taken for {source}: ")
    flags = ["--map", *mapped] if mapped else []
    assert all(pair in done.stdout for pair in mapped)
    assert run(source, path, "--out", tmp_path / "named.jsonl", "--num_proc", 1, *flags).returncode == 0
    for ending in ("jsonl", "report.json", "rejected.jsonl"):
        assert (tmp_path / f"auto.{ending}").read_bytes() == (tmp_path / f"named.{ending}").read_bytes()
    assert lines(tmp_path / "auto.jsonl")[-1]["messages"] == messages


def test_the_tools_of_other_shapes(tmp_path):
    (path,) = [text for name, text, *_ in FILES if name == "hermes.jsonl"]
    assert only_row(tmp_path, "hermes", json.loads(path))["tools"] == [TIDE]
    (path,) = [text for name, text, *_ in FILES if name == "xlam.jsonl"]
    (tool,) = only_row(tmp_path, "xlam", json.loads(path))["tools"]
    assert tool["function"]["parameters"] == {
        "type": "object",
        "properties": {"value": {"type": "number"}, "to": {"type": "string"}, "digits": {"type": "integer"}},
        "required": ["value", "to"],
    }
    (path,) = [text for name, text, *_ in FILES if name == "gemini.jsonl"]
    (tool,) = only_row(tmp_path, "gemini", json.loads(path))["tools"]
    assert tool["function"] == {
        "name": "get_sku",
        "parameters": {"type": "object", "properties": {"product": {"type": "string"}}},
    }


def test_a_system_text_on_hermes_tags_goes_and_is_counted(tmp_path):
    system = f"{HERMES_SYSTEM} Write <tool_call></tool_call>."
    raw = {
        "conversations": [
            {"from": "system", "value": system},
            *[{"from": "human", "value": "a"}],
            {"from": "gpt", "value": "b"},
        ]
    }
    row = only_row(tmp_path, "hermes", raw)
    assert (row["messages"], row["tools"]) == (plain("a", "b"), [TIDE])
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert report["keys_not_kept"] == {"system text on the tags of calls": 1}


@pytest.mark.parametrize("source", sorted(WHOLE))
def test_auto_knows_each_shape(source):
    """By a row of it; what is read alike by two goes to the plainer one."""
    alike = {
        "smoltalk": "messages",
        "emoji_preference": "preference",
        "fields": None,
        "gsm8k": "fields",
        "identity": "identity",
        "message_tree": "message_tree",
    }
    expected = alike.get(source, source)
    if expected is None:
        with pytest.raises(UsageError, match="their columns are q, r, s"):
            detect_source([WHOLE[source]], "a.jsonl")
    else:
        assert detect_source([WHOLE[source]] * 3).source == expected
    assert detect_source([{"question": "a", "answer": "2+3=5\n#### 5"}]).source == "gsm8k"


def test_auto_looks_past_the_first_row_for_what_extends_a_shape():
    call_row = WHOLE["hermes"]
    chats = [WHOLE["sharegpt"]] * 9
    assert detect_source(chats).source == "sharegpt"
    assert detect_source([*chats, call_row]).source == "hermes"
    assert detect_source([*chats * 2, call_row]).source == "sharegpt"  # under a tenth: rather refused than guessed


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"ticket": 1, "customer": "a"}], ["raw.jsonl", "ticket, customer", "fields --map prompt=COLUMN"]),
        ([{"text": "a"}], ["raw.jsonl", "plain text has no turns"]),
        ([{"role": "user", "content": "a"}], ["a row is one message"]),
        ([{"messages": [{"who": "a", "said": "b"}]}], ["who, said", "--map messages=messages role=KEY content=KEY"]),
        ([{"question": "a", "answer": "b", "image": "c.png"}], ["question, answer, image"]),
        ([{}, {}], ["raw.jsonl", "they are empty"]),
        (
            [{"message_id": "m", "parent_id": None, "text": "a", "role": "prompter"}],
            ["joined by parent_id", "NAME.trees.jsonl.gz"],
        ),
    ],
)
def test_auto_says_what_to_do_where_no_shape_fits(tmp_path, rows, words):
    done = run("auto", write(tmp_path / "raw.jsonl", rows), "--out", tmp_path / "o", "--num_proc", 1)
    assert (done.returncode, done.stdout) == (2, "") and not (tmp_path / "o").exists()
    assert len(done.stderr.splitlines()) == 1
    assert all(word in done.stderr for word in words), done.stderr


def test_auto_reads_stdin_and_several_files(tmp_path):
    row = json.dumps({"messages": CHAT}).encode() + b"\n"
    stdin = mock.Mock(buffer=io.BytesIO(row * 3), spec=["buffer"])
    with mock.patch.object(sys, "stdin", stdin):
        done = run("auto", "-", "--out", tmp_path / "o.jsonl", "--num_proc", 1)
    assert done.returncode == 0 and len(lines(tmp_path / "o.jsonl")) == 3
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_bytes(row)
    done = run("auto", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--out", tmp_path / "p.jsonl", "--num_proc", 1)
    assert [row["id"] for row in lines(tmp_path / "p.jsonl")] == ["a-1", "b-1"]


def test_auto_finds_placeholders_that_are_to_be_filled(tmp_path):
    raw = write(tmp_path / "raw.jsonl", [WHOLE["identity"]] * 2)
    done = run("auto", raw, "--out", tmp_path / "o.jsonl", "--fill", "name=Ada", "--num_proc", 1)
    assert done.returncode == 0 and "taken for identity" in done.stdout
    assert lines(tmp_path / "o.jsonl")[0]["messages"] == plain("a", "I am Ada")


@pytest.mark.parametrize(
    ("columns", "command"),
    [
        (["prompt", "completion"], "prompt_completion raw.jsonl"),
        (["instruction", "output", "input"], "alpaca raw.jsonl"),
        (["conversations"], "auto raw.jsonl"),
        (["topic"], "fields raw.jsonl --map prompt=COLUMN answer=COLUMN"),
    ],
)
def test_the_command_for_columns_alone(columns, command):
    assert normalize_arguments(columns, "raw.jsonl") == command


# -- keys that say what is trained ------------------------------------------------------------------------------------
def trained_text(demo, row, template):
    """What transformers' own mask trains of a row."""
    tokenizer = AutoTokenizer.from_pretrained(demo / "init")
    encoded = tokenizer.apply_chat_template(
        row["messages"],
        tools=row.get("tools"),
        chat_template=(REPO / "chat_templates" / f"{template}.jinja").read_text(encoding="utf-8"),
        return_dict=True,
        return_assistant_tokens_mask=True,
        **row["chat_template_kwargs"],
    )
    ids = [token for token, trained in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if trained]
    return tokenizer.decode(ids)


def flagged(first, second):
    """Two questions, whose answers have these keys as well."""
    return {
        "messages": [
            turn("user", "One?"),
            turn("assistant", "Context only.", **first),
            turn("user", "And two?"),
            turn("assistant", "Two is even.", **second),
        ]
    }


FLAGS = [
    ({"weight": 0}, {"weight": 1}),
    ({"weight": 0.0}, {"weight": None}),
    ({"loss": False}, {}),
    ({"train": False}, {"train": True}),
    ({"training": False}, {}),
    ({"trainable": False}, {"trainable": True}),
    ({"loss_weight": 0.0}, {"loss_weight": 1.0}),
    ({"loss_scale": 0}, {}),
    ({"masked": True}, {"masked": False}),
    ({"loss_mask": 0}, {}),
]


@pytest.mark.parametrize("template", ["qwen3", "chatml", "step3_qwen3"])
@pytest.mark.parametrize("flags", FLAGS, ids=[next(iter(first)) for first, _ in FLAGS])
def test_an_answer_that_is_marked_is_not_trained(tmp_path, demo, flags, template):
    for source, shape in (("messages", dict), ("sharegpt", as_sharegpt)):
        row = only_row(tmp_path, source, shape(flagged(*flags)))
        trained = trained_text(demo, row, template)
        assert "Two is even." in trained and "Context" not in trained
        assert all(type(message["loss_mask"]) is int for message in row["messages"] if "loss_mask" in message)
        row = only_row(tmp_path, source, shape(flagged({}, {})))
        assert "train_turns" not in row["chat_template_kwargs"]
        assert "Context" in trained_text(demo, row, "chatml")


def as_sharegpt(raw):
    speakers = {"user": "human", "assistant": "gpt"}
    turns = []
    for message in raw["messages"]:
        flags = {key: value for key, value in message.items() if key not in ("role", "content")}
        turns.append({"from": speakers[message["role"]], "value": message["content"], **flags})
    return {"conversations": turns}


def test_template_arguments_that_a_row_has_win(tmp_path):
    raw = flagged({"weight": 0}, {}) | {"chat_template_kwargs": {"train_turns": "last"}}
    assert only_row(tmp_path, "messages", raw)["chat_template_kwargs"] == {"train_turns": "last"}
    raw = flagged({}, {}) | {"only_last": True, "enable_thinking": False}
    assert only_row(tmp_path, "messages", raw)["chat_template_kwargs"] == {
        "train_turns": "last",
        "enable_thinking": False,
    }


def test_a_pair_without_loss(tmp_path, demo):
    raw = {
        "conversation": [
            {"system": "s", "input": "One?", "output": "Context only.", "output_with_loss": False},
            {"input": "And two?", "output": "Two is even.", "note": 3},
        ]
    }
    row = only_row(tmp_path, "conversation_pairs", raw)
    assert row["messages"][0] == turn("system", "s")
    assert "Context" not in trained_text(demo, row, "chatml")
    assert json.loads((tmp_path / "out.report.json").read_text())["keys_not_kept"] == {"pairs.note": 1}


# -- keys by other names ----------------------------------------------------------------------------------------------
THOUGHT = [USER, {**CHAT[1], "reasoning_content": "So."}]
READ = [  # (source, raw row, what of it is there)
    ("messages", {"system": "s", "messages": CHAT}, {"messages": [turn("system", "s"), *CHAT]}),
    ("messages", {"system_prompt": " s ", "messages": CHAT}, {"messages": [turn("system", "s"), *CHAT]}),
    ("messages", {"system": "s", "messages": [turn("system", "s"), *CHAT]}, {"messages": [turn("system", "s"), *CHAT]}),
    ("messages", {"system": "", "messages": [turn("system", " "), *CHAT]}, {"messages": CHAT}),
    ("messages", {"messages": [turn("developer", "s"), *CHAT]}, {"messages": [turn("system", "s"), *CHAT]}),
    ("messages", {"messages": json.dumps(CHAT), "tags": "x"}, {"messages": CHAT, "tags": ["x"]}),
    (
        "messages",
        {"interactions": [{"role": "User", "text": "Hi"}, {"role": "Assistant", "text": "Hello"}]},
        {"messages": CHAT},
    ),
    ("messages", answered(reasoning=" So.\r\n"), {"messages": THOUGHT}),
    ("messages", answered(thinking="So."), {"messages": THOUGHT}),
    ("messages", answered(tool_plan="So."), {"messages": THOUGHT}),
    (
        "messages",
        answered(thinking_blocks=[{"type": "thinking", "thinking": "So.", "signature": "x"}]),
        {"messages": THOUGHT},
    ),
    (
        "messages",
        answered(reasoning="So.", reasoning_details=[{"type": "reasoning.text", "text": "So."}]),
        {"messages": THOUGHT},
    ),
    (
        "messages",
        {
            "messages": [
                USER,
                turn("assistant", [{"type": "thinking", "thinking": "So."}, {"type": "text", "text": "Hello"}]),
            ]
        },
        {"messages": THOUGHT},
    ),
    ("messages", {"messages": plain("Hi", "So.</think>\n\nHello")}, {"messages": THOUGHT}),
    ("messages", {"messages": plain("Hi", "</think>Hello")}, {"messages": CHAT}),
    ("alpaca", {"instruction": "Hi", "output": "Hello", "thinking": "So."}, {"messages": THOUGHT}),
    (
        "messages",
        {
            "messages": [
                USER,
                turn("assistant", None, function_call={"name": "f", "arguments": '{"x": 1}'}),
                turn("function", "pong", name="f"),
                CHAT[1],
            ],
            "functions": [{"name": "f"}],
        },
        {
            "messages": [
                USER,
                turn("assistant", "", tool_calls=[call("f", {"x": 1})]),
                {**TOOL_TURN, "name": "f"},
                CHAT[1],
            ],
            "tools": [{"type": "function", "function": {"name": "f"}}],
        },
    ),
    (
        "messages",
        {"messages": [{**USER, "tools": [{"name": "f"}]}, CHAT[1]]},
        {"messages": CHAT, "tools": [{"type": "function", "function": {"name": "f"}}]},
    ),
    (
        "messages",
        {"messages": [USER, turn("assistant", "", tool_calls=[{"name": "f", "arguments": ""}])]},
        {"messages": [USER, turn("assistant", "", tool_calls=[call("f", {})])]},
    ),
    (
        "messages",
        {"messages": [USER, turn("assistant", "", tool_calls=[{"name": "f", "arguments": json.dumps('{"x": 1}')}])]},
        {"messages": [USER, turn("assistant", "", tool_calls=[call("f", {"x": 1})])]},
    ),
    (
        "messages",
        {
            "messages": [
                USER,
                turn("assistant", "I look."),
                turn("tool_call", '{"name": "f", "arguments": {}}'),
                turn("tool_call", '{"name": "g", "arguments": {}}'),
                TOOL_TURN,
                CHAT[1],
            ]
        },
        {
            "messages": [
                USER,
                turn("assistant", "I look.", tool_calls=[call("f", {}), call("g", {})]),
                TOOL_TURN,
                CHAT[1],
            ]
        },
    ),
    ("prompt_completion", {"prompt": "Hi", "completion": 0.5}, {"messages": plain("Hi", "0.5")}),
    ("alpaca", {"instruction": "Hi", "output": True}, {"messages": plain("Hi", "true")}),
    ("gsm8k", {"question": "Hi", "answer": 7.0}, {"messages": plain("Hi", "7")}),
    ("svamp", {"body": "a", "question": "b", "answer": "9 (apples)"}, {"messages": plain("a b", "9 (apples)")}),
    (
        "mawps",
        {"Question": "number0 less number1 ?", "Numbers": "18 10", "Equation": "- number0 number1", "Answer": "8.0"},
        {"messages": plain("18 less 10 ?", "8")},
    ),
    (
        "query_response",
        {"system_prompt": "s", "question": "Hi", "response": "Hello"},
        {"messages": [turn("system", "s"), *CHAT]},
    ),
    ("preference", {"chosen_messages": CHAT, "rejected_messages": CHAT}, {"messages": CHAT}),
    (
        "preference",
        {"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "Hello"}},
        {"messages": CHAT},
    ),
    ("messages", {"messages": CHAT, "label": True, "weight": 1, "images": []}, {"messages": CHAT}),
]


@pytest.mark.parametrize(("source", "raw", "holds"), READ)
def test_keys_by_other_names_are_read(tmp_path, source, raw, holds):
    row = only_row(tmp_path, source, raw)
    assert {key: row.get(key) for key in holds} == holds


def test_what_is_not_kept_is_counted(tmp_path):
    raw = [
        {"messages": CHAT, "score": 0.5, "meta": {"a": 1}, "empty": "", "null": None, "label": True},
        {"messages": [{**USER, "channel": "x", "end_turn": None}, CHAT[1]], "score": 0},
        {"messages": [USER], "score": 1},  # refused: in no count
    ]
    raw.append({"messages": CHAT, "s\ud800": 1, "nan": float("nan")})
    path = write(tmp_path / "raw.jsonl", raw)
    counts = {"label": 1, "messages.channel": 1, "meta": 1, "nan": 1, "s\\ud800": 1, "score": 2}
    for out, report in (("o", "o/report.json"), ("o.jsonl", "o.report.json")):
        done = run("messages", path, "--out", tmp_path / out, "--num_proc", 1)
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path / report).read_text())["keys_not_kept"] == counts
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("keys not kept: ")]
        assert line.startswith("keys not kept: score 2, ") and "messages.channel 1" in line
    other = write(tmp_path / "other.jsonl", [{"messages": CHAT, "conversation": "c-12"}])  # no turns: an id
    assert "keys not kept: conversation 1" in run("messages", other, "--out", tmp_path / "other").stdout
    many = write(tmp_path / "many.jsonl", [{"messages": CHAT, **{f"k{n}": 1 for n in range(30)}}])
    assert "and 10 others, see report.json" in run("messages", many, "--out", tmp_path / "p").stdout


def test_the_best_reply_of_a_tree(tmp_path):
    """By rank at each level, none deleted or taken for spam; without ranks the first; a question unanswered goes."""

    def node(text, *replies, role="assistant", **more):
        return {"text": text, "role": role, "replies": [*replies], **more}

    answer = node("b", node("d", role="prompter"), rank=1)
    raw = {
        "message_tree_id": "t",
        "prompt": node(
            "a",
            node("x", rank=0, deleted=True),
            node("y", rank=0, review_result=False),
            node("z"),
            answer,
            node("w", rank=2),
            role="prompter",
            lang="en",
        ),
    }
    row = only_row(tmp_path, "message_tree", raw)
    assert (row["id"], row["lang"], row["messages"]) == ("t", "en", plain("a", "b"))
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert report["keys_not_kept"] == {"a last question without an answer": 1, "replies that are not the best": 4}
    unranked = node("a", node("b"), node("c"), role="prompter", message_id="m")
    assert only_row(tmp_path, "message_tree", unranked)["messages"] == plain("a", "b")


# -- numbers ----------------------------------------------------------------------------------------------------------
NUMBERS = [0.7, 0.3, 0.95, 1e-12, 0.1234567890123456, 2**53 + 1, 5e-324, 1.7976931348623157e308, -0.0]


def test_numbers_in_tool_arguments_stay_as_they_stand(tmp_path):
    read_json_exactly()
    raw = []
    for number in NUMBERS:
        arguments = {"level": number, "deep": [{"to": number}]}
        raw.append({"messages": [USER, turn("assistant", "", tool_calls=[call("f", arguments)])]})
    raw.append({"messages": [USER, turn("assistant", "", tool_calls=[call("f", {"level": "low"})])]})
    path = write(tmp_path / "raw.jsonl", raw)
    assert run("messages", path, "--out", tmp_path / "o", "--num_proc", 1).returncode == 0
    assert run("messages", path, "--out", tmp_path / "o.jsonl", "--num_proc", 1).returncode == 0
    for rows in (lines(tmp_path / "o.jsonl"), load_from_disk(str(tmp_path / "o"))["train"].to_list()):
        found = [row["messages"][1]["tool_calls"][0]["function"]["arguments"] for row in rows]
        expected = [one["messages"][1]["tool_calls"][0]["function"]["arguments"] for one in raw]
        assert json.dumps(found) == json.dumps(expected)


# -- fields -----------------------------------------------------------------------------------------------------------
def test_columns_are_joined_by_a_text(tmp_path):
    raw = {"subject": "Login", "customer": {"said": [" It fails. "]}, "n": 3, "agent": "Reset {it}."}
    flags = ("--map", "prompt={subject} #{n}: {customer.said.0} {{x}}", "answer=agent", "id=n", "system=n")
    row = only_row(tmp_path, "fields", raw, *flags)
    assert row["messages"] == [turn("system", "3"), *plain("Login #3: It fails. {x}", "Reset {it}.")]
    assert row["id"] == "3" and "keys_not_kept" not in json.loads((tmp_path / "out.report.json").read_text())


@pytest.mark.parametrize("template", ["prompt={subject", "prompt={}", "prompt={a!r}", "prompt={a:>3}", "prompt=a}"])
def test_a_text_that_joins_nothing_is_refused(tmp_path, template):
    raw = write(tmp_path / "raw.jsonl", [{"a": "b", "c": "d"}])
    done = run("fields", raw, "--map", template, "answer=c", "--out", tmp_path / "o", "--num_proc", 1)
    if template == "prompt=a}":
        assert done.returncode == 1  # a column's name
    else:
        assert (done.returncode, template.removeprefix("prompt=") in done.stderr) == (2, True), done.stderr
        assert "write columns as {NAME}" in done.stderr


def test_a_column_that_a_row_may_lack(tmp_path):
    raw = [{"q": "One?", "r": "1", "sys": "Be brief."}, {"q": "Two?", "r": 2}]
    rows, _ = normalized(tmp_path, "fields", raw, "--map", "prompt=q", "answer=r", "system=sys")
    assert [row["messages"] for row in rows] == [[turn("system", "Be brief."), *plain("One?", "1")], plain("Two?", "2")]
    flags = ("--map", "prompt=q", "answer=r", "system=sytem", "--out", tmp_path / "o", "--num_proc", 1)
    done = run("fields", tmp_path / "raw.jsonl", *flags)
    assert (done.returncode, "--map system=sytem: no row has it" in done.stderr) == (2, True)
    assert not (tmp_path / "o").exists()


def test_calls_in_a_mapped_answer_are_no_text(tmp_path):
    (text,) = [text for name, text, *_ in FILES if name == "xlam.jsonl"]
    flags = ("--map", "prompt=query", "answer=answers", "tools=tools")
    row = only_row(tmp_path, "fields", json.loads(text), *flags)
    assert row["messages"][1] == turn("assistant", "", tool_calls=[call("convert", {"value": 0.3, "to": "km"})])
    assert row["tools"][0]["function"]["name"] == "convert"
    row = only_row(tmp_path, "fields", json.loads(text), "--map", "prompt=query", "answer=answers")
    assert row["messages"][1]["content"].startswith("[{")  # without tools it may be any JSON


def test_a_speaker_without_a_role_names_the_flag(tmp_path):
    raw = write(tmp_path / "raw.jsonl", [{"talk": [{"from": "klient", "value": "a"}, {"from": "gpt", "value": "b"}]}])
    flags = ("fields", raw, "--map", "messages=talk", "--num_proc", 1)
    done = run(*flags, "--out", tmp_path / "o.jsonl")
    assert done.returncode == 1 and "pass --roles klient=user" in done.stderr
    done = run(*flags, "--out", tmp_path / "p.jsonl", "--roles", "klient=user")
    assert lines(tmp_path / "p.jsonl")[0]["messages"] == plain("a", "b")


# -- splits and help --------------------------------------------------------------------------------------------------
def test_prompts_of_validation_are_in_no_training_row(tmp_path):
    raw = [{"messages": plain(f"Name a fact about {n // 3}.", f"Answer {n}.")} for n in range(120)]
    done = run("messages", write(tmp_path / "raw.jsonl", raw), "--out", tmp_path / "o", "--eval_rows", 30)
    assert done.returncode == 0, done.stderr
    rows = load_from_disk(str(tmp_path / "o"))
    prompts = {split: {row["messages"][0]["content"] for row in rows[split]} for split in rows}
    assert not prompts["train"] & prompts["validation"]
    counts = {split: len(rows[split]) for split in rows}
    assert sum(counts.values()) == 120 and 27 <= counts["validation"] <= 33
    assert f"splits: train {counts['train']}, validation {counts['validation']}" in done.stdout


def test_every_source_says_what_it_reads():
    text = run("--help").stdout
    for name, source in SOURCES.items():
        assert f"  {name:20}" in text
        assert source.needed or name == "fields" or source.is_made


# -- a call turn, a pair and a tool that are not what they seem -------------------------------------------------------
def refused(source, row, *words):
    with pytest.raises(InvalidRow) as error:
        normalize.to_row(row, source, "1")
    assert all(word in str(error.value) for word in words), error.value


def test_a_call_turn_keeps_its_reasoning_and_shows_no_picture():
    call = {"role": "function_call", "content": '{"name": "f", "arguments": {}}', "reasoning_content": "I look."}
    turns = [
        {"role": "user", "content": "a"},
        call,
        {"role": "tool", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]
    row = normalize.to_row({"messages": turns}, "messages", "1")
    assert row["messages"][1]["reasoning_content"] == "I look." and row["messages"][1]["tool_calls"]
    turns[1] = call | {"images": ["a.png"]}
    refused("messages", {"messages": turns}, "row with images", "message 1")


def test_names_of_tools_and_ids_of_calls_are_text():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for tool in ({"name": {"x": 1}}, {"name": 5}, {"name": ""}):
        refused("messages", {"messages": turns, "tools": [tool]}, "tool without a name")
    refused("messages", {"messages": turns, "tools": [{"name": "f", "parameters": 5}]}, "tool parameters")
    call = {"id": ["x"], "type": "function", "function": {"name": "f", "arguments": {}}}
    turns[1] = {"role": "assistant", "content": "", "tool_calls": [call]}
    refused("messages", {"messages": turns}, "tool call id that is not text")


def test_lists_of_turns_are_lists_and_masks_are_masks():
    refused("turn_lists", {"input": "q1", "output": "a1"}, "must be lists of strings")
    pair = {"input": "a", "output": "b", "output_with_loss": 2}
    refused("conversation_pairs", {"conversation": [pair]}, "output_with_loss that is not 0 or 1")


# -- one thing under two names ----------------------------------------------------------------------------------------
F, G = {"name": "f"}, {"name": "g"}
WRAPPED = {"type": "function", "function": F}
CALLED = {"messages": [USER, turn("assistant", "", tool_calls=[call("f", {"x": 1})]), TOOL_TURN, CHAT[1]]}
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
THINKING = {"messages": CHAT, "chat_template_kwargs": {"enable_thinking": True}}
PAIR = {"human": "a", "assistant": "b"}
CHOICE = {"question": "a", "choices": ["b", "c", "d", "e"], "answer": 2}
TWO_NAMES = [  # (source, row, path of a second name, another value, the same value)
    ("messages", answered(), ("messages", 1, "text"), "Bye", " Hello\r\n"),
    ("messages", answered(), ("messages", 1, "value"), [{"type": "text", "text": "Bye"}], "Hello"),
    ("messages", answered(), ("messages", 1, "from"), "human", "gpt"),
    ("messages", CALLED, ("messages", 1, "function_call"), {**G, "arguments": ""}, {**F, "arguments": '{"x": 1}'}),
    ("messages", {"messages": CHAT, "tools": [F]}, ("functions",), [G], [WRAPPED]),
    ("messages", {"messages": CHAT, "tools": [F]}, ("available_tools",), json.dumps([G]), json.dumps([F])),
    ("messages", {"messages": CHAT, "tools": [F]}, ("messages", 0, "tools"), [G], [F]),
    ("messages", {"messages": CHAT, "functions": [F]}, ("messages", 0, "tool_schemas"), [G], [F]),
    ("alpaca", {"instruction": "a", "output": "b", "functions": [F]}, ("tools",), [G], [F]),
    ("messages", {"messages": CHAT, "system": "s"}, ("system_prompt",), "t", "s "),
    ("messages", {"messages": CHAT, "system_prompt": "s"}, ("system_message",), "t", "s"),
    ("messages", {"messages": CHAT}, ("conversations",), [*SHAREGPT, *SHAREGPT], SHAREGPT),
    ("sharegpt", {"conversations": SHAREGPT}, ("messages",), plain("Hi", "Bye"), CHAT),
    ("messages", THINKING, ("enable_thinking",), False, True),
    ("messages", {"messages": CHAT, "only_last": True}, ("chat_template_kwargs",), {"train_turns": "all"}, {}),
    (
        "messages",
        {"messages": [USER, turn("assistant", [{"type": "text", "text": "a"}])]},
        ("messages", 1, "content", 0, "value"),
        "b",
        "a",
    ),
    ("alpaca", {"instruction": "a", "output": "b", "thinking": "c"}, ("reasoning",), "d", "c"),
    ("query_response", {"query": "a", "response": "b"}, ("question",), "c", "a"),
    ("cmath", {"question": "a", "golden": "1"}, ("input",), "b", "a"),
    ("svamp", {"Body": "a", "Question": "b", "Answer": 1}, ("body",), "c", "a"),
    ("svamp", {"Body": "a", "Question": "b", "Answer": 1, "ID": "x"}, ("idx",), "y", "x"),
    ("preference", {"prompt": "Hi", "chosen": "Hello"}, ("question",), "Ho", "Hi"),
    (
        "preference",
        {"prompt": "Hi", "chosen": "Hello"},
        ("conversations",),
        [{**SHAREGPT[0], "value": "Ho"}],
        SHAREGPT[:1],
    ),
    ("preference", {"prompt": "Hi", "chosen": "Hello"}, ("input",), "Ho", "Hi"),
    ("preference", {"prompt": "Hi", "chosen": "Hello"}, ("chosen_response",), "Bye", "Hello"),
    ("preference", {"chosen": CHAT}, ("prompt",), "Ho", "Hi"),  # the whole conversation
    ("preference", {"chosen": CHAT, "prompt": "Hi"}, ("messages",), plain("Hi", "Bye"), CHAT),
    ("preference", {"chosen": CHAT}, ("history",), [["Hi", "Bye"]], [["Hi", "Hello"]]),
    ("preference", {"chosen": "Human: Hi\n\nAssistant: Hello"}, ("history",), [["Hi", "Bye"]], [["Hi", "Hello"]]),
    ("preference", {"input": {"messages": [USER], "tools": [F]}, "preferred_output": [CHAT[1]]}, ("tools",), [G], [F]),
    ("emoji_preference", {"prompt": "Hi", "chosen": "Hello"}, ("question",), "Ho", "Hi"),
    ("emoji_preference", {"prompt": "Hi", "answer_zh": "Hello"}, ("chosen",), plain("Ho", "Hello")[:1], [USER]),
    ("conversation_pairs", {"conversation": [PAIR]}, ("conversation", 0, "input"), "c", "a"),
    ("conversation_pairs", {"conversation": [PAIR]}, ("conversation", 0, "answer"), "c", "b"),
    ("hermes", WHOLE["hermes"], ("tools",), [G], json.dumps([TOOL])),  # and in the system text
    ("moss", WHOLE["moss"], ("system",), "t", "s"),
    ("gemini", WHOLE["gemini"], ("system_instruction",), "t", WHOLE["gemini"]["systemInstruction"]),
    ("nemotron", WHOLE["nemotron"], ("system_prompt",), "detailed thinking off", "detailed thinking on"),
    ("bfcl", WHOLE["bfcl"], ("ground_truth",), [{"f": {"x": [3]}}], WHOLE["bfcl"]["ground_truth"]),
]


def put(row, path, value):
    """The row with a value at a path."""
    row = json.loads(json.dumps(row))
    holder = row
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    return row


def names(case):
    return "-".join(map(str, (case[0], *case[2])))


@pytest.mark.parametrize("case", TWO_NAMES, ids=map(names, TWO_NAMES))
def test_one_thing_under_two_names_is_one_or_refused(case):
    """Equal values, in whichever shape, are one; an empty one is none; two that differ are refused by their names."""
    source, row, path, other, same = case
    flags = {"answers": {"1": WHOLE["bfcl"]["ground_truth"]}} if source == "bfcl" else {}
    if source == "bfcl":
        row = {**row, "id": "1"}
    once = normalize.to_row(row, source, "1", **flags)
    lost = Counter()
    assert normalize.to_row(put(row, path, same), source, "1", "keep", lost, **flags) == once
    assert path[-1] not in lost
    if source != "nemotron":  # its system prompt is read where it stands
        for empty in (None, "", []):
            assert normalize.to_row(put(row, path, empty), source, "1", **flags) == once
    with pytest.raises(InvalidRow) as error:
        normalize.to_row(put(row, path, other), source, "1", **flags)
    assert "under two names" in error.value.reason, error.value


def test_an_empty_value_gives_way_to_another():
    for empty in (None, "", " ", []):
        found = normalize.to_row({"messages": [USER, {**CHAT[1], "content": empty, "value": "Hello"}]}, "messages", "1")
        assert found["messages"] == CHAT
    row = {"messages": [], "conversations": CHAT, "tools": [], "functions": [F], "system": "", "system_prompt": "s"}
    found = normalize.to_row(row, "messages", "1")
    assert (found["messages"], found["tools"]) == ([turn("system", "s"), *CHAT], [WRAPPED])


def test_names_that_are_mapped_are_the_ones_that_count(tmp_path):
    """--map names the key: another usual name of the same thing is counted as not kept, however deep the turns lie."""
    talk = [{"who": "user", "said": "Hi", "text": "<p>Hi</p>"}, {"who": "assistant", "said": "Hello", "mood": "glad"}]
    flags = ("--map", "messages=d.talk", "role=who", "content=said")
    assert only_row(tmp_path, "fields", {"d": {"talk": talk}}, *flags)["messages"] == CHAT
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert report["keys_not_kept"] == {"messages.mood": 1, "messages.text": 1}


def test_a_preference_row_of_alpaca_keeps_its_input():
    row = {"instruction": "Translate.", "input": "Haus", "chosen": "house", "rejected": "mouse"}
    assert normalize.to_row(row, "preference", "1")["messages"] == plain("Translate.\nHaus", "house")


def test_a_row_of_two_exercises_is_refused():
    refused("mmlu", {"train": CHOICE, "question": "z"}, "question under two names")
    refused("message_tree", {"prompt": {"text": "a", "role": "prompter"}, "replies": [F]}, "prompt under two names")
    refused("identity", {"instruction": "a", "output": "b", "messages": CHAT}, "messages under two names")


# -- what a pair, a node or a row says of its answer -------------------------------------------------------------------
def test_what_a_pair_says_of_its_answer_is_read(demo):
    pairs = [
        {"human": "One?", "assistant": "Context only.", "weight": 0, "reasoning": "So.", "system": "s", "tools": [F]},
        {"human": "And two?", "assistant": "Two is even.", "system": "s"},
    ]
    row = normalize.to_row({"conversation": pairs}, "conversation_pairs", "1")
    assert row["messages"] == [
        turn("system", "s"),
        turn("user", "One?"),
        turn("assistant", "Context only.", reasoning_content="So.", loss_mask=0),
        *plain("And two?", "Two is even."),
    ]
    assert row["tools"] == [WRAPPED]
    trained = trained_text(demo, row, "qwen3")
    assert "Two is even." in trained and "Context" not in trained


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        ({"images": ["a.png"]}, {}, "row with images"),
        ({}, {"audio": "a.wav"}, "row with audio"),
        ({}, {"system": "t"}, "two system prompts"),
        ({"system": "s"}, {"system": "t"}, "two system prompts"),
        ({}, {"tools": [F]}, "tools in a later message"),
        ({"loss": 0.5}, {}, "loss that is not 0 or 1"),
        ({"deleted": True}, {}, "deleted message"),
    ],
)
def test_what_no_pair_can_mean_is_refused(first, second, reason):
    row = {"conversation": [{**PAIR, **first}, {**PAIR, **second}]}
    refused("conversation_pairs", row, reason)
    if first:
        refused("alpaca", {"instruction": "c", "output": "d", "history": [{**PAIR, **first}]}, "")


def node(text, role, *replies, **more):
    return {"text": text, "role": role, "replies": [*replies], **more}


def test_what_a_reply_says_of_itself_is_read():
    best = node("b", "assistant", rank="2", weight=0, reasoning="So.", message_id="m")
    tree = node("a", "prompter", node("c", "assistant", rank="10"), best, lang="en")
    lost = Counter()
    row = normalize.to_row({"prompt": tree}, "message_tree", "1", "keep", lost)
    assert row["messages"] == [turn("user", "a"), turn("assistant", "b", reasoning_content="So.", loss_mask=0)]
    assert row["chat_template_kwargs"] == {"train_turns": "flagged"}
    assert lost == {"replies that are not the best": 1, "replies.message_id": 1}
    refused("message_tree", {"prompt": node("a", "prompter", {**best, "images": ["x"]})}, "row with images")
    refused("message_tree", {"prompt": node("a", "prompter", {**best, "rank": "x"})}, "number that is not a number")
    for flag in ({"deleted": True}, {"deleted": "true"}, {"review_result": False}):
        refused("message_tree", {"prompt": {**tree, **flag}}, "deleted message, or one taken for spam")
        refused("message_tree", {**tree, **flag}, "deleted")


CHATTED = {"messages": CHAT}
ASKED = {"instruction": "Hi", "output": "Hello"}
ROW_FLAGS = [  # (source, row, reason)
    *[("messages", {**CHATTED, "label": label}, "label false") for label in (0, 0.0, "0", False, "false", "False")],
    *[("messages", {**CHATTED, "weight": weight}, "weight of a row that is not 1") for weight in ("0.5", "0", 2, [0])],
    ("messages", {**CHATTED, "loss_mask": [0, 1]}, "loss_mask of a row that is not 1"),
    ("messages", {**CHATTED, "deleted": True}, "deleted row"),
    ("messages", {**CHATTED, "history": [["a", "b"]]}, "history that would be lost"),
    ("alpaca", {**ASKED, "train": False}, "train of a row that is not 1"),
    ("alpaca", {**ASKED, "loss_mask": 0}, "loss_mask of a row that is not 1"),
    ("dolly", {"instruction": "a", "response": "b", "masked": True}, "masked of a row that is not 0"),
    ("query_response", {"query": "a", "response": "b", "loss": False}, "loss of a row that is not 1"),
    ("gsm8k", {"question": "a", "answer": "b", "system": "s"}, "system that would be lost"),
    ("gsm8k", {"question": "a", "answer": "b", "tools": [F]}, "tools that would be lost"),
    ("fields", {"q": "a", "r": "b", "label": "False"}, "label false"),
    ("messages", answered(deleted=1), "deleted message"),
    ("messages", answered(deleted="2023-04-12"), "deleted message"),
    ("messages", answered(eot=False), "eot false of a message"),
    ("messages", answered(end_turn=False), "end_turn false of a message"),
    ("messages", answered(prefix=True), "prefix true of a message"),
    ("messages", answered(partial=True), "partial true of a message"),
    ("messages", answered(ipython=True), "ipython true of a message"),
    ("messages", answered(refusal="No."), "refusal of a message"),
    ("messages", answered(step_loss_mask=2), "step_loss_mask that is not 0 or 1"),
    ("messages", {"messages": [{**USER, "reasoning": "a"}, CHAT[1]]}, "reasoning of a message that is not the assist"),
    ("messages", {**CHATTED, "enable_thinking": "often"}, "enable_thinking that is not true or false"),
    ("messages", {**CHATTED, "only_last": 2}, "only_last that is not true or false"),
    ("messages", {**CHATTED, "chat_template_kwargs": '{"a"'}, "chat_template_kwargs that are not JSON"),
    ("nemotron", {**WHOLE["nemotron"], "reasoning": "maybe", "system_prompt": ""}, "reasoning that is not on or off"),
]


@pytest.mark.parametrize(("source", "row", "reason"), ROW_FLAGS)
def test_a_row_that_is_not_to_be_trained_like_any_other_is_refused(source, row, reason):
    with pytest.raises(InvalidRow) as error:
        normalize.to_row(row, source, "1", **({"map": {"prompt": "q", "answer": "r"}} if source == "fields" else {}))
    assert error.value.reason.startswith(reason), error.value


@pytest.mark.parametrize(
    "more",
    [
        {"label": 1},
        {"label": "True"},
        {"label": "sport"},
        {"weight": "1"},
        {"weight": "heavy"},
        {"train": True, "loss_mask": 1},
        {"masked": False},
        {"loss": 1.37},  # measured by somebody
        {"loss": "0.6"},
        {"train": {"split": 3}},
        {"deleted": False},
    ],
)
def test_a_row_whose_flags_say_nothing_else_is_kept_and_they_are_counted(more):
    lost = Counter()
    row = normalize.to_row({**ASKED, **more}, "alpaca", "1", "keep", lost)
    assert (row["messages"], row["chat_template_kwargs"]) == (CHAT, {})
    assert lost == dict.fromkeys(more, 1)
    mapped = {"prompt": "instruction", "answer": "output"}
    for label in (0, "0"):  # a table's class
        assert normalize.to_row({**ASKED, "label": label}, "fields", "1", map=mapped)["messages"] == CHAT


def test_an_end_that_a_call_has_is_no_flag():
    turns = [USER, {**CALLED["messages"][1], "eot": False, "step_loss_mask": 0}, TOOL_TURN, {**CHAT[1], "eot": True}]
    row = normalize.to_row({"messages": turns}, "messages", "1")
    assert [message.get("loss_mask") for message in row["messages"]] == [None, 0, None, None]


def test_template_arguments_in_text_and_switches_in_words():
    row = {**CHATTED, "chat_template_kwargs": '{"reasoning_effort": "high", "x": null}', "enable_thinking": "false"}
    found = normalize.to_row(row, "messages", "1")
    assert found["chat_template_kwargs"] == {"reasoning_effort": "high", "enable_thinking": False}


# -- tokens that stand for media --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text",
    [
        "<image>Who are they?",
        "<image>\nWho are they?",
        "<image> Who are they?",
        "<image> 这是谁？",
        "Who are they?\n<image>",
        "Who are they? <image>",
        "Describe: <image>",
        "Look:\n<image>\nand say.",
        "<image><image>Which is older?",
        "<image_1>\nWhat?",
        "<video>Why is it funny?",
        "<audio>What's that sound?",
        "What is said?\r\n<audio>\r\n",
        "```\ncode\n```\n<image>",
    ],
)
def test_a_token_that_stands_for_media_is_refused(text):
    for turns in (plain(text, "b"), plain("a", text)):
        refused("messages", {"messages": turns}, "token of media in text", "text alone is trained here")


@pytest.mark.parametrize(
    "text",
    [
        "How do I use the <video> tag?",
        "<video> does not play in Safari.",
        "<video>: what is it for?",
        "<video>\n  <source src='a.mp4'>\n</video>",
        "```html\n<video>\n```",
        "~~~\n<image>\n~~~",
        "Is `<image>` an element of SVG?",
        "My vector<image>",
        "I compare <audio> and <video>",
        "Should I take <audio>, or\n<video>, or both?",
        "Is <image> drawn like <image>?",
        "a < image > b",
    ],
)
def test_talk_of_html_and_code_is_kept(text):
    assert normalize.to_row({"messages": plain(text, "b")}, "messages", "1")["messages"] == plain(text, "b")


def test_an_empty_column_of_media_makes_a_token_suspicious():
    turns = plain("Is <image> drawn like <image>?", "b")
    for column in ("image", "images"):
        refused("messages", {"messages": turns, column: []}, "token of media in text")
    assert normalize.to_row({"messages": turns, "videos": []}, "messages", "1")["messages"] == turns


# -- what stands in a call or in a part -------------------------------------------------------------------------------
def called_with(outer=None, inner=None):
    one = call("f", {"x": 1})
    one["function"].update(inner or {})
    return [{**one, **(outer or {})}]


def test_what_a_call_has_beside_its_arguments_is_counted_or_refused():
    for key in ("result", "output", "response", "observation"):
        for calls in (
            called_with({key: "pong"}),
            called_with(None, {key: {"a": 1}}),
            [{**F, "arguments": {}, key: "x"}],
        ):
            turns = [USER, turn("assistant", "", tool_calls=calls), TOOL_TURN, CHAT[1]]
            refused("messages", {"messages": turns}, f"{key} within a tool call", "a tool message")
            text = {"from": "function_call", "value": json.dumps(calls)}
            turns = [SHAREGPT[0], text, {"from": "observation", "value": "pong"}, SHAREGPT[1]]
            refused("sharegpt", {"conversations": turns}, f"{key} within a tool call")
    calls = called_with({"index": 1, "result": None}, {"strict": True})
    text = {"role": "tool_call", "content": json.dumps([{**F, "arguments": {}, "index": 2}])}
    tagged = turn("assistant", '<tool_call>{"name": "f", "arguments": {}, "index": 3}</tool_call>')
    counts = {
        ("messages", json.dumps(turn("assistant", "", tool_calls=calls))): {
            "messages.tool_calls.index": 1,
            "messages.tool_calls.function.strict": 1,
        },
        ("messages", json.dumps(text)): {"messages.tool_calls.index": 1},
        ("hermes", json.dumps(tagged)): {"messages.tool_calls.index": 1},
        ("smoltalk2", json.dumps(tagged)): {"messages.tool_calls.index": 1},
    }
    for (source, line), expected in counts.items():
        lost = Counter()
        turns = [USER, json.loads(line), TOOL_TURN, CHAT[1]]
        normalize.to_row({"messages": turns}, source, "1", "keep", lost)
        assert lost == expected


def test_what_a_part_has_beside_its_text_is_counted_or_refused():
    part = {"type": "text", "text": "Hello", "cache_control": {"type": "ephemeral"}, "annotations": []}
    lost = Counter()
    row = normalize.to_row({"messages": [USER, turn("assistant", [part])]}, "messages", "1", "keep", lost)
    assert row["messages"] == CHAT and lost == {"messages.content.cache_control": 1}
    lost.clear()
    called = {"type": "tool_call", "value": {**F, "arguments": {}, "index": 1}}
    thought = [{"type": "thinking", "thinking": "So.", "signature": "x"}]
    said = {"from": "gpt", "value": [{"type": "text", "text": "a", "id": 1}, called], "thinking_blocks": thought}
    normalize.to_row({"conversations": [SHAREGPT[0], said]}, "sharegpt", "1", "keep", lost)
    assert lost == {
        "messages.value.id": 1,
        "messages.tool_calls.index": 1,
        "messages.thinking_blocks.signature": 1,
    }
    for key in ("image_url", "input_audio", "image", "file"):
        pictured = {"messages": [turn("user", [{"type": "text", "text": "Hi", key: {"url": "a"}}]), CHAT[1]]}
        refused("messages", pictured, f"row with {key}")


def test_keys_of_turns_in_json_text_are_counted():
    lost = Counter()
    text = json.dumps([{**USER, "channel": "x", "tools": [F]}, CHAT[1]])
    row = normalize.to_row({"messages": text}, "messages", "1", "keep", lost)
    assert row["tools"] == [WRAPPED] and lost == {"messages.channel": 1}


def test_a_call_turn_keeps_what_else_it_says():
    said = {"role": "function_call", "content": '{"name": "f", "arguments": {}}'}
    turns = [USER, turn("assistant", "I look."), {**said, "name": "f"}, TOOL_TURN, CHAT[1]]
    row = normalize.to_row({"messages": turns}, "messages", "1")
    assert row["messages"][1] == turn("assistant", "I look.", tool_calls=[call("f", {})], name="f")
    turns[2] = {**said, "tool_calls": [{"name": "g", "arguments": {}}]}
    refused("messages", {"messages": turns}, "tool_calls under two names")
    turns[2] = {**said, "weight": 0}
    refused("messages", {"messages": turns}, "loss flags that disagree")
    turns[2] = {**said, "weight": 1}  # as the text before it, which says nothing
    assert "loss_mask" not in normalize.to_row({"messages": turns}, "messages", "1")["messages"][1]


def test_ids_become_text_and_names_are_text():
    for number in (7, 0, 10**30):
        turns = [USER, turn("assistant", "", tool_calls=[{**F, "arguments": {}, "id": number}])]
        turns += [{**TOOL_TURN, "tool_call_id": number}, CHAT[1]]
        row = normalize.to_row({"messages": turns}, "messages", "1")
        assert row["messages"][1]["tool_calls"][0]["id"] == row["messages"][2]["tool_call_id"] == str(number)
    for bad in (["x"], True, 1.5, {"x": 1}):
        turns[2] = {**TOOL_TURN, "tool_call_id": bad}
        refused("messages", {"messages": turns}, "tool call id that is not text")
    for bad in (10**30, 0, ["x"], False):
        refused("messages", answered(name=bad), "name that is not text")
    assert normalize.to_row(answered(name=""), "messages", "1")["messages"] == CHAT


# -- shapes that differ a little --------------------------------------------------------------------------------------
def test_histories_of_every_shape():
    for history in (
        [["a", "b"]],
        '[["a", "b"]]',
        [PAIR],
        [{"query": "a", "response": "b"}],
        plain("a", "b"),
        [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
    ):
        row = normalize.to_row({**ASKED, "history": history}, "alpaca", "1")
        assert row["messages"] == [*plain("a", "b"), *CHAT], history
    for history in ([["q"]], ["ab"], [{"a": "x", "b": "y"}], {"a": "b"}, [["a", "b", "c"]], [None]):
        refused("alpaca", {**ASKED, "history": history}, "history must be a list of [question, answer]")
    refused("alpaca", {**ASKED, "history": [{**PAIR, "note": 1}]}, "history.note")


def test_conversations_as_prompt_and_completion(tmp_path):
    named = {"from": "human", "value": "Hi", "name": "ann", "tools": [F]}
    shapes = [([USER], [CHAT[1]]), ([USER], "Hello"), ("Hi", [CHAT[1]]), ("Hi", CHAT[1]), ([USER], SHAREGPT[1])]
    for prompt, completion in shapes:
        row = {"prompt": prompt, "completion": completion}
        assert detect_source([row]).source == "prompt_completion" or not isinstance(prompt, list)
        assert normalize.to_row(row, "prompt_completion", "1")["messages"] == CHAT
        mapped = {"prompt": "prompt", "answer": "completion"}
        assert normalize.to_row(row, "fields", "1", map=mapped)["messages"] == CHAT
    row = normalize.to_row({"prompt": [named], "completion": [CHAT[1]]}, "prompt_completion", "1")
    assert (row["messages"], row["tools"]) == ([{**USER, "name": "ann"}, CHAT[1]], [WRAPPED])
    row = normalize.to_row(
        {"prompt": [USER], "completion": [CHAT[1]], "history": [["a", "b"]]}, "prompt_completion", "1"
    )
    assert row["messages"] == [*plain("a", "b"), *CHAT]


def test_an_empty_row_says_so():
    refused("messages", {}, "missing field: messages: the row is empty")
    assert detect_source([{}, {"messages": CHAT}]).source == "messages"
    assert (
        detect_source([{"messages": CHAT, "conversations": [*SHAREGPT, *SHAREGPT]}]).source == "messages"
    )  # then refused


def test_a_call_with_its_result_is_trained_unless_it_says_otherwise(tmp_path, demo):
    (text,) = [text for name, text, *_ in FILES if name == "chatglm3.json"]
    (raw,) = json.loads(text)
    row = only_row(tmp_path, "chatglm3", raw)
    trained = trained_text(demo, row, "qwen2_5")
    assert "10111" in trained and "12412." not in trained and "price" not in trained
    raw["conversations"][2]["loss"] = raw["conversations"][3]["loss"] = False
    masked = normalize.to_row(raw, "chatglm3", "1")
    assert [message.get("loss_mask") for message in masked["messages"]] == [None, None, 0, None, 0]


def test_turns_of_moss_are_read_by_their_number():
    said = {str(n): {"Human": f"<|Human|>: q{n}<eoh>\n", "MOSS": f"<|MOSS|>: a{n}<eom>\n"} for n in range(1, 12)}
    chat = {f"turn_{number}": said[number] for number in sorted(said)}  # 1, 10, 11, 2 …
    row = normalize.to_row({"chat": chat}, "moss", "1")
    assert [message["content"] for message in row["messages"][::2]] == [f"q{n}" for n in range(1, 12)]


def test_other_spellings_of_gemini():
    snake = {
        "system_instruction": "s",
        "contents": [
            {"role": "user", "parts": [{"text": "Hi"}]},
            {"role": "model", "parts": [{"function_call": {"name": "f", "args": None, "why": "y"}}]},
            {"role": "function", "parts": [{"function_response": {"name": "f", "response": "pong"}}]},
            {"role": "model", "parts": [{"text": "Hello", "thoughtSignature": "x"}]},
        ],
        "tools": [{"function_declarations": [F]}, {"function_declarations": [G]}],
    }
    lost = Counter()
    counts = {"parts.thoughtSignature": 1, "parts.functionCall.why": 1}
    row = normalize.to_row(snake, "gemini", "1", "keep", lost)
    tool = {**TOOL_TURN, "name": "f"}
    assert row["messages"] == [
        turn("system", "s"),
        USER,
        turn("assistant", "", tool_calls=[call("f", {})]),
        tool,
        CHAT[1],
    ]
    assert [one["function"] for one in row["tools"]] == [F, G] and lost == counts
    refused("gemini", {**snake, "tools": [{"googleSearch": {}}]}, "tool without a name")


# -- dialogs, each row worked by hand from the shape that its repository publishes ------------------------------------
KDCONV = {
    "name": "旅行的歌",
    "messages": [
        {"message": "听过这首歌吗？"},
        {"message": "听过，是2014年的。", "attrs": [{"name": "旅行的歌", "attrname": "时间", "attrvalue": "2014年"}]},
        {"message": "谁唱的？"},
        {"message": "一位台湾歌手。"},
        {"message": "好，再见！"},
    ],
}
CORECODE = {
    "id": 0,
    "dialogue": ["A: 我很少看[MASK]。", "B: 我也是很少看太空的电影。"],
    "question": "请从a、b选项中选择[MASK]处应填入的选项。",
    "(a)": "科幻片",
    "(b)": "恐怖片",
    "answer": ["(a)", "科幻片"],
}
MUTUAL = {
    "answers": "C",
    "options": ["f : two .", "f : i do n't .", "f : at six .", "f : no ."],
    "article": "f : hello . m : when do you leave ? i have to go .",
    "id": "train_7",
}
LINES_OF_CHOICES = "- f : two .=A\n- f : i do n't .=B\n- f : at six .=C\n- f : no .=D\n"
DIALOGS = [  # (source, raw row, messages, keys not kept)
    (
        "kdconv",
        KDCONV,
        [*plain("听过这首歌吗？", "听过，是2014年的。"), *plain("谁唱的？", "一位台湾歌手。")],
        {"name": 1, "messages.attrs": 1, "a last question without an answer": 1},
    ),
    (
        "lccc",
        [["火锅 我 吃 了 七八 顿", "哈哈 ！ 看 NBA 2021 吗 ？", "不 看"]],  # the file is an array of dialogs
        plain("火锅我吃了七八顿", "哈哈！看NBA 2021吗？"),
        {"a last question without an answer": 1},
    ),
    ("lccc", {"dialog": ["你 好", "你 好 。"]}, plain("你好", "你好。"), {}),
    (
        "corecode",
        CORECODE,
        plain(
            "A: 我很少看[MASK]。\nB: 我也是很少看太空的电影。\n\n请从a、b选项中选择[MASK]处应填入的选项。\n(a) 科幻片\n"
            "(b) 恐怖片",
            "(a) 科幻片",
        ),
        {},
    ),
    (
        "corecode",
        {"id": 9, "dialogue": ["A: 你好！", "B: 嗨！"], "question": "后续事件是什么？", "answer": "找地块"},
        plain("A: 你好！\nB: 嗨！\n\n后续事件是什么？", "找地块"),
        {},
    ),
    (
        "mutual",
        MUTUAL,
        plain(
            "Multiple Choice question: f : hello .\nm : when do you leave ? i have to go .\n"
            f"{LINES_OF_CHOICES}\nRespond only with the letter of the correct answer.",
            "C",
        ),
        {},
    ),
]


@pytest.mark.parametrize(("source", "raw", "messages", "not_kept"), DIALOGS, ids=[case[0] for case in DIALOGS])
def test_dialogs_by_hand(tmp_path, source, raw, messages, not_kept):
    row = only_row(tmp_path, source, raw)
    assert row["messages"] == messages
    assert row["lang"] == ("en" if source == "mutual" else "zh")
    assert row["id"] == str(raw.get("id", "raw-1") if isinstance(raw, dict) else "raw-1")
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert report.get("keys_not_kept", {}) == not_kept


@pytest.mark.parametrize("source", [name for name, source in SOURCES.items() if "domain" in source.columns])
def test_domain_and_difficulty_become_tags(source):
    """Of every source that keeps a row's own tags, whatever their type; null and blank are none."""
    raw = {"messages": WHOLE[source]} if isinstance(WHOLE[source], list) else WHOLE[source]
    flags = {"fill": {"name": "Ada"}} if source == "identity" else {}
    before = normalize.to_row(raw, source, "1", **flags)["tags"]
    labelled = {**raw, "domain": ["math", "physics"], "difficulty": 3}
    row = normalize.to_row(labelled, source, "1", **flags)
    assert row["tags"] == [*before, "domain: math", "domain: physics", "difficulty: 3"]
    assert normalize.to_row({**raw, "domain": " ", "difficulty": None}, source, "1", **flags)["tags"] == before
    with pytest.raises(InvalidRow, match="difficulty must be text or a number"):
        normalize.to_row({**raw, "difficulty": {"of": 3}}, source, "1", **flags)


def test_domain_and_difficulty_of_mapped_columns(tmp_path):
    raw = {"q": "a", "r": "b", "field": "law", "level": "hard"}
    mapped = ["--map", "prompt=q", "answer=r", "domain=field", "difficulty=level"]
    assert only_row(tmp_path, "fields", raw, *mapped)["tags"] == ["domain: law", "difficulty: hard"]
