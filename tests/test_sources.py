"""What a row means survives data_prep.normalize: keys that say what is trained, shapes of other trainers, auto, --map.

Each expected row is worked by hand; what is trained is seen in the tokens, by transformers' own mask.

Each of these turns the suite red (tried, 64 in all): a flag that is not read, is read the wrong way round, is of a
part, of a user turn or between 0 and 1; train_turns not set, or set over the row's own; system, functions,
function_call, reasoning by another name, tools of the first message, tags as text, history or only_last left out;
two names that disagree; an empty system turn kept; a call that takes the text before it, or an earlier call, away;
empty arguments, JSON within JSON, Python's notation; a closing </think> alone; pictures, labels and weights of a
row or a message; a key of a row or of a message that is not counted, half a surrogate pair in it; a deleted, spam
or unranked reply taken, an open question kept; 7.0 of GSM8K, True for true; types and optional parameters of xLAM;
a column that no row has, bad templates, paths into lists, calls in a mapped answer; auto's share, its maps and its
first chunk; --rows and --eval_rows ignored.
"""

import io
import json
import sys
from functools import partial
from unittest import mock

import pytest
from conftest import REPO, run_script
from datasets import load_from_disk
from test_normalize import CHAT, WHOLE, answered, lines, normalized, plain, turn, write
from transformers import AutoTokenizer

from data_prep import normalize
from data_prep.common.errors import InvalidRow, UsageError
from data_prep.common.exact_numbers import read_json_exactly
from data_prep.common.sources import SOURCES
from data_prep.common.sources.detect import detect_source, normalize_arguments

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
    both = write(tmp_path / "both.jsonl", [{"messages": CHAT, "conversations": CHAT}])  # the first of two is read
    assert "keys not kept: conversations 1" in run("messages", both, "--out", tmp_path / "both").stdout
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
    assert report["keys_not_kept"] == {"replies that are not the best": 4}
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
