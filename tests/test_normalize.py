"""data_prep/normalize.py: every source on small rows of our own with values worked by hand, every refusal with its
reason and place, the Arrow round trip, and the real files of shared/ where they are.

Each of these turns the suite red (tried): parts joined with a newline, calls left as text; parts taken from any role,
in any order, beside the field they fill, or of any type; files written in place.
"""

import hashlib
import io
import json
import re
import subprocess
import sys
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import pytest
from datasets import load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "data_prep"))
import normalize  # noqa: E402

SHARED = Path(__file__).resolve().parents[2] / "shared"
real = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the shared folder with the real data is not here")


def run(*args):
    """The script's main() as a command: exit code, stdout and stderr. In this process, which saves its start-up."""
    out, err = io.StringIO(), io.StringIO()
    with mock.patch("sys.argv", ["normalize.py", *map(str, args)]), redirect_stdout(out), redirect_stderr(err):
        try:
            code = normalize.main()
        except SystemExit as error:
            code = error.code
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def normalized(tmp_path, source, rows):
    """(rows out, rejected entries) of rows given as JSON lines."""
    out = tmp_path / "out.jsonl"
    done = run(source, write(tmp_path / "raw.jsonl", rows), "--out", out)
    assert done.returncode == 0, done.stderr
    return lines(out), lines(tmp_path / "out.rejected.jsonl")


def plain(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


CHAT = plain("Hi", "Hello")
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
        {"id": "a", "messages": plain("Hi", "<think>\ngreet\n</think>\n\nHello"), "tags": ["x"], "lang": "fr",
         "source": "s"},
        {
            "id": "a",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Weather?"},
                {"role": "assistant", "content": None, "reasoning_content": "ask",
                 "tool_calls": [{"id": "c1", "type": "function",
                                 "function": {"name": "weather", "arguments": json.dumps(CALL["arguments"])}}]},
                {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "rain"},
                {"role": "assistant", "content": "Rain.", "loss_mask": 0},
            ],
            "tools": [{"type": "function", "function": TOOL}],
            "chat_template_kwargs": {"enable_thinking": True},
        },
    ]  # fmt: skip
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
    assert second["chat_template_kwargs"] == {"enable_thinking": True}


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


REPLY = turn("assistant", "c")
ORDER = "roles that do not alternate"
BAD = [  # (source, raw line, reason it is counted under)
    ("gsm8k", '{"question": "a"', "not JSON"),
    ("gsm8k", '{"question": "a", "answer": NaN}', "not JSON"),
    ("gsm8k", b'{"question": "\xff", "answer": "b"}', "not JSON"),
    ("gsm8k", '"text"', "row that is not an object"),
    ("gsm8k", {"question": "a"}, "missing field"),
    ("gsm8k", {"question": " \n", "answer": "b"}, "empty text"),
    ("gsm8k", {"question": "a", "answer": ""}, "empty text"),
    ("gsm8k", {"question": 3, "answer": "b"}, "text that is not a string"),
    ("gsm8k", {"question": "a", "answer": "b \ud83d"}, "text that is not Unicode"),
    ("cmath", {"input": "a"}, "missing field"),
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
    ("messages", called({"x": 0.12345678901234}), "number that Arrow cannot keep"),
    ("messages", called({"x": 2**70}), "number that Arrow cannot keep"),
    ("messages", called({"x": "<|im_end|>"}), "control token in text"),
    ("messages", {"messages": CHAT, "tools": "[{"}, "tools that are not JSON"),
    ("messages", {"messages": CHAT, "tools": {"name": "f"}}, "tools that are not a list of objects"),
    ("messages", {"messages": CHAT, "tools": [{"description": "f"}]}, "tool without a name"),
    ("messages", {"messages": CHAT, "tags": "x"}, "field of another type"),
    ("sharegpt", shared(("human", "a"), ("bot", "b")), "unknown role"),
    ("sharegpt", {"conversations": [{"from": "human"}]}, "missing field"),
    ("sharegpt", shared(("human", "a"), ("function_call", "f(x)")), "tool call that is not JSON"),
]  # fmt: skip
for token in (
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_response>",
    "<｜User｜>",
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
        done = run(source, raw, "--out", tmp_path / f"{source}-out.jsonl")
        assert done.returncode == 0, done.stderr
        assert f"1 rows kept, {len(cases)} refused" in done.stdout
        rejected = lines(tmp_path / f"{source}-out.rejected.jsonl")
        assert [(entry["line"], entry["reason"]) for entry in rejected] == [
            (n, reason) for n, (_, reason) in enumerate(cases, 3)
        ]
        assert {entry["file"] for entry in rejected} == {raw.name}
        assert rejected[0]["id"] == f"{source}-3"
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
    | st.sampled_from(["", "a", "user", "tool", "<think>", "\ud800", "1e999", "[1]", *normalize.PARTS]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["name", "arguments", "role", "type", "value"]), inner)
        | st.lists(st.fixed_dictionaries({"type": st.sampled_from(normalize.PARTS), "value": inner}), max_size=3)
    ),
    max_leaves=4,
)
WHOLE = {
    "gsm8k": {"question": "a", "answer": "b"},
    "cmath": {"input": "a", "golden": "1"},
    "mawps": {"Question": "N_00 ?", "Numbers": "1.0", "Answer": 1.0},
    "messages": {"messages": CHAT, "tools": [TOOL], "tags": ["x"], "chat_template_kwargs": {}, "id": "a"},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
}


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_value_crashes_it(data):
    """A row with any JSON at any place is a row that comes back equal from Arrow, or refused: never a traceback."""
    source = data.draw(st.sampled_from(sorted(WHOLE)))
    raw = json.loads(json.dumps(WHOLE[source]))
    field = data.draw(st.sampled_from(sorted(raw)))
    if isinstance(raw[field], list) and isinstance(raw[field][0], dict) and data.draw(st.booleans()):
        inner = raw[field][data.draw(st.integers(0, len(raw[field]) - 1))]
        inner[data.draw(st.sampled_from([*inner, "tool_calls", "reasoning_content", "name"]))] = data.draw(PIECES)
    else:
        raw[field] = data.draw(PIECES)
    try:
        row = normalize.to_row(raw, source, "a")
    except normalize.Refused:
        return
    if normalize.kept_by_arrow(row):
        (stored,) = normalize.as_dataset([row]).to_list()
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
    # one hash for both forms, and the .jsonl file's own
    hashes = [
        json.loads((tmp_path / name).read_text())["output"]["train"]
        for name in ("folder/report.json", "flat.report.json")
    ]
    assert hashes == [hashlib.sha256((tmp_path / "flat.jsonl").read_bytes()).hexdigest()] * 2


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
    write(tmp_path / "refused.jsonl", [{"question": "a"}, {}])
    before = sorted(tmp_path.rglob("*"))
    cases = [
        (("gsm8k", tmp_path / "none*.jsonl", "--out", tmp_path / "o"), 2, "none*.jsonl: no such file"),
        (("gsm8k", good, "--out", tmp_path / "used"), 2, "used: exists already"),
        (("gsm8k", good, "--out", good), 2, "good.jsonl: exists already"),
        (("gsm8k", tmp_path / "empty.jsonl", "--out", tmp_path / "o"), 2, "empty.jsonl: no rows"),
        (("gsm8k", tmp_path / "broken.json", "--out", tmp_path / "o"), 2, "broken.json:3: not JSON"),
        (("gsm8k", good, "--out", tmp_path / "o", "--eval_rows", 1), 2, "--eval_rows 1: only 1 rows"),
        (("gsm8k", good, "--out", tmp_path / "o.jsonl", "--eval_rows", 1), 2, "--eval_rows: needs"),
        (("gsm8k", tmp_path / "refused.jsonl", "--out", tmp_path / "o"), 1, "(2 missing field), the first at refused"),
    ]  # fmt: skip
    for args, code, words in cases:
        done = run(*args)
        assert (done.returncode, words in done.stderr, done.stdout) == (code, True, ""), (args, done.stderr)
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert sorted(tmp_path.rglob("*")) == before
    for args in (("gsm8k", good, "--ou", tmp_path / "o"), ("squad", good, "--out", tmp_path / "o")):
        assert run(*args).returncode == 2


def test_a_failed_write_leaves_nothing(tmp_path):
    """A full disk or a read-only place while saving: no half folder under either name."""
    row = {"id": "a", "messages": CHAT, "chat_template_kwargs": {}, "source": "s", "tags": [], "lang": "en"}
    with pytest.raises(TypeError):
        normalize.write_folder(tmp_path / "o", {"train": [row]}, {"report": object()})
    with pytest.raises(TypeError):
        normalize.write_jsonl(tmp_path / "o.jsonl", [row], {"report": object()}, [])
    assert not list(tmp_path.iterdir())


def test_as_a_command(tmp_path):
    """As a command of its own, from another folder."""
    raw = write(tmp_path / "raw.jsonl", [{"question": "a", "answer": "b"}, {}])
    command = [sys.executable, str(ROOT / "data_prep" / "normalize.py")]
    assert "python data_prep/normalize.py gsm8k" in subprocess.check_output(
        [*command, "--help"], text=True, cwd=tmp_path
    )
    done = subprocess.run([*command, "gsm8k", raw.name, "--out", "o"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "o: 1 rows kept, 1 refused (1 missing field)\n"


@real
@pytest.mark.parametrize(
    ("source", "pattern", "kept", "refused"),
    [
        ("gsm8k", "gsm8k/train.jsonl", 7473, {}),
        ("gsm8k", "gsm8k/test.jsonl", 1319, {}),
        ("cmath", "cmath/cmath_dev.jsonl", 600, {}),
        ("mawps", "mawps/mawps_N00.jsonl", 1920, {}),
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
