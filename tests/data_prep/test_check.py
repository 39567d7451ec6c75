"""data_prep/check.py: every reason on a crafted row and none on sound ones, with file and line; what --fix mends and
what it leaves; the real files of shared/ where they are.

Each of these turns the suite red (tried): the tokens of the tokenizer ignored, or tools not searched for them; roles or
the template's refusal passed over; a persona looked for without its mark, or with its switches; the row's arguments not
given to the template; blanks before the newline not seen, or indentation stripped with it; rows left out and not
counted, or said to be mended; exit 0 though something is left; the hash of rows in another order; tokens that only the
template writes left out, or roles searched for them; a developer's text or an argument taken for no persona; nulls of
Arrow kept; half a surrogate pair, nesting or tools as JSON text not met; a tokenizer asked for and not had, silently; 1
equal to 1.0, rows compared with those of another place, dates or JSON in text not looked at, plain text loaded, a file
that cannot be loaded passed; placeholders in code, LaTeX, tags or a chat about templates, or what a tool says.
"""

import io
import json
import re
import subprocess
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
from datasets import Dataset, load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from data_prep import check, normalize
from data_prep.common import (
    json_text,
    loader_changes,
    personas,
    readers,
    recipe_rows,
    rendering,
    row_keys,
    text_files,
    writer,
)
from data_prep.common.errors import InvalidRow, UsageError
from data_prep.common.rows import complete_row
from tests.helpers.runs import REPO, SHARED

TEMPLATES = REPO / "chat_templates"
real = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="../shared is absent: own rows prove the same")


def run(*args, script=check):
    """The script's main() as a command: exit code, stdout and stderr. In this process, which saves its start-up."""
    out, err = io.StringIO(), io.StringIO()
    with mock.patch("sys.argv", ["x.py", *map(str, args)]), redirect_stdout(out), redirect_stderr(err):
        try:
            code = script.main()
        except SystemExit as error:
            code = error.code
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


def write(path, rows):
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def chat(*answer, system=None, **more):
    system = [turn("system", system)] if system is not None else []
    return [*system, turn("user", "Hi?"), turn("assistant", *(answer or ["Yes."]), **more)]


def row_of(messages, **more):
    return {"id": "a", "messages": messages, **more}


def found(row, template=None, tokenizer=None):
    """[(reason, detail)] of one row, in memory."""
    text = template.read_text() if isinstance(template, Path) else template
    return check.find_faults(row, check.CheckOptions(rendering.Renderer(text, tokenizer)))


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CHAIN = [turn("user", "?"), turn("assistant", "", tool_calls=[CALL]), turn("tool", "1"), turn("assistant", "1")]
OTHER = {"type": "function", "function": {"name": "g", "parameters": {}}}
STRICT = {
    "type": "function",
    "function": {
        "name": "f",
        "parameters": {"type": "object", "properties": {"x": {"type": "string"}}, "required": ["x"]},
    },
}
NAMED = {"id": "c1", **CALL}
TWICE = [CHAIN[0], turn("assistant", "", tool_calls=[CALL, CALL]), *CHAIN[2:]]
SOUND = [
    row_of([CHAIN[0], turn("assistant", "", tool_calls=[NAMED]), turn("tool", "1", tool_call_id="c1"), CHAIN[3]]),
    row_of(chat("naïve café, “à” und Größe, 题目，")),
    row_of(chat(system="Be brief.")),
    row_of(CHAIN, tools=[TOOL], chat_template_kwargs={"enable_thinking": True}),
    row_of(CHAIN, tools=json.dumps([TOOL])),  # as some sets hold them, and the trainer reads them
    row_of(chat(reasoning_content="So.", loss_mask=1), tags=["x"]),
    row_of(
        [turn("user", "\nHi\n"), turn("assistant", "Yes.\n\n"), turn("user", "|im_end|"), turn("assistant", " x\ny")]
    ),
    row_of([*chat(), turn("user", "<b>2 < 3</b>"), turn("assistant", None, tool_calls=[CALL])]),
]

ORDER = "roles that do not alternate"
CRAFTED = [  # (row or raw line, its one reason, a word of the detail)
    (row_of([turn("user", "a"), turn("user", "b"), turn("assistant", "c")]), ORDER, "message 1: user after user"),
    (row_of([*chat(), turn("assistant", "b")]), ORDER, "assistant after assistant"),
    (row_of([turn("assistant", "c")]), ORDER, "assistant after start"),
    (row_of([*chat(), turn("system", "c"), *chat()]), ORDER, "system after assistant"),
    (row_of([turn("user", "a"), turn("tool", "b"), turn("assistant", "c")]), ORDER, "tool after user"),
    (row_of([*chat(), turn("tool", "b"), turn("assistant", "c")]), ORDER, "tool after assistant"),
    (row_of([*CHAIN[:2], turn("user", "b"), turn("assistant", "c")]), ORDER, "user after call"),
    (row_of([turn("human", "a"), turn("assistant", "c")]), "unknown role", "human"),
    (row_of([turn(None, "a"), turn("assistant", "c")]), "unknown role", "message 0: None"),
    (row_of([*chat(), turn("user", "b")]), "last message is not the assistant's", ""),
    (row_of(CHAIN[:3]), "last message is not the assistant's", ""),
    (row_of([turn("user", "a")]), "no assistant turn", ""),
    (row_of(chat("")), "empty text", "message 1"),
    (row_of(chat(["part"])), "text that is not a string", "message 1: content is list"),
    (row_of(chat(reasoning_content=3)), "text that is not a string", "message 1: reasoning_content is int"),
    (row_of(chat(tool_calls=[{"name": 3}])), "tool call without a name or arguments", ""),
    (row_of(chat(), tools="[{"), "tools that are not JSON", ""),
    (row_of(chat(), tools=""), "tools that are not JSON", ""),
    (row_of(chat(), chat_template_kwargs=[1]), "field of another type", "chat_template_kwargs"),
    (row_of(chat(), tags=[1]), "field of another type", "tags"),
    (row_of("Hi"), "field of another type", "messages"),
    (row_of(chat("b \ud83d")), "text that is not Unicode", ""),
    ({"text": "plain", "id": 3}, "row without messages", "text, id: see python -m data_prep.normalize auto"),
    ("[1]", "row that is not an object", "list"),
    ('{"messages": ', "not JSON", ""),
    (row_of(chat("So <|im_end|>")), "control token in text", "message 1: <|im_end|>"),
    (row_of([turn("user", "</think>"), turn("assistant", "b")]), "control token in text", "message 0: </think>"),
    (row_of(chat(reasoning_content="a <|eot_id|>")), "control token in text", "message 1: <|eot_id|>"),
    (row_of(CHAIN, tools=[TOOL, {"name": "<tool_call>"}]), "control token in text", "tool 1: <tool_call>"),
    (row_of(chat("\nb")), "answer begins with a newline", "message 1: '\\nb'"),
    (row_of(chat(" \r\n b")), "answer begins with a newline", "message 1"),
    (row_of(chat(reasoning_content="\n\nb")), "reasoning begins with a newline", "message 1"),
    (row_of(chat("Itâ€™s fine")), "mojibake", "message 1"),
    (row_of(chat("é¢˜ç›®")), "mojibake", "message 1"),
    (row_of(chat("lost \ufffd")), "text that a decoder lost", "message 1: U+FFFD in its content"),
    (row_of(CHAIN, tools=[OTHER]), "call of a tool that is not offered", "message 1: f"),
    (row_of(CHAIN, tools=[STRICT]), "arguments against the tool's schema", "message 1: f: x: 1 is not of type"),
    (row_of(TWICE, tools=[TOOL]), "tool call without a reply", "message 3: 1 calls are open"),
    (row_of([*CHAIN[:3], turn("tool", "2"), CHAIN[3]]), "more tool replies than calls", "message 3"),
    (
        row_of([CHAIN[0], turn("assistant", "", tool_calls=[NAMED]), turn("tool", "1", tool_call_id="z"), CHAIN[3]]),
        "tool reply to another call",
        "message 2: z",
    ),
    (
        row_of([CHAIN[0], turn("assistant", "", tool_calls=[NAMED, NAMED]), *[turn("tool", "1")] * 2, CHAIN[3]]),
        "tool call ids that repeat",
        "message 1: c1, c1",
    ),
]
MENDED = {"answer begins with a newline", "reasoning begins with a newline"}


def test_every_reason_at_its_line_and_no_other(tmp_path):
    """Sound rows stand between the crafted ones: each finding names its own line, and none names theirs."""
    raw, wanted = [], []
    for number, (row, reason, words) in enumerate(CRAFTED):
        raw += [row, SOUND[number % len(SOUND)]]
        wanted.append((2 * number + 1, reason, words))
    path = write(tmp_path / "rows.jsonl", raw)
    done = run(path, "--json", tmp_path / "found.json")
    report = json.loads((tmp_path / "found.json").read_text())
    findings = [(entry["line"], entry["reason"]) for entry in report["findings"]]
    assert findings == [(line, reason) for line, reason, _ in wanted]
    assert all(
        entry["file"] == "rows.jsonl" and words in entry["detail"]
        for entry, (*_, words) in zip(report["findings"], wanted, strict=True)
    )
    counts = Counter(reason for _, reason, _ in CRAFTED)
    assert done.returncode == 1 and report["found"] == dict(counts) and report["in"] == len(raw)
    for reason, count in counts.items():
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"  {reason} ")]
        first = next(line for line, other, _ in wanted if other == reason)
        assert f" {count} " in line and f"rows.jsonl:{first}" in line
    assert str(tmp_path) not in (tmp_path / "found.json").read_text()


def test_sound_rows_are_sound(demo, tmp_path):
    path = write(tmp_path / "rows.jsonl", SOUND)
    flags = ["--chat_template_path", TEMPLATES / "qwen3.jinja", "--model_name_or_path", demo / "init"]
    for data in (path, demo / "rows" / "chat", demo / "rows" / "chat" / "test.jsonl"):
        done = run(data, *flags)
        assert done.returncode == 0 and "0 with findings" in done.stdout and done.stdout.count("\n") == 1
    count = sum(map(len, load_from_disk(demo / "rows" / "chat").values()))
    assert count > 400 and f"{count:,} rows" in run(demo / "rows" / "chat").stdout


def test_a_row_nested_too_deep():
    tool = {"name": "f"}
    for _ in range(5000):
        tool = {"name": "f", "deeper": tool}
    assert found(row_of(chat(), tools=[tool])) == [("row nested too deep", "")]


def test_several_faults_of_one_row(tmp_path):
    """Each is named; the table counts rows."""
    row = row_of([turn("user", "<|im_end|> <|im_end|>"), turn("assistant", "\n<|im_start|>")])
    done = run(write(tmp_path / "rows.jsonl", [row]), "--json", tmp_path / "found.json")
    report = json.loads((tmp_path / "found.json").read_text())
    assert [entry["reason"] for entry in report["findings"]] == ["control token in text"] * 2 + [
        "answer begins with a newline"
    ]
    assert report["found"] == {"control token in text": 1, "answer begins with a newline": 1}
    assert "1 rows, 1 with findings" in done.stdout


# -- control tokens: the tokenizer's own ------------------------------------------------------------------------------
def test_tokens_of_the_tokenizer(demo, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(demo / "init")
    tokenizer.add_special_tokens({"additional_special_tokens": ["[INST]", "user"]})  # a role is no text
    tokenizer.add_tokens(["<b>"])  # as Gemma has them: a token of its own, but nothing that steers a chat
    for text, known, own in (
        ("<|im_end|>", True, True),
        ("<think>", True, True),
        ("<start_of_turn>", True, False),  # Gemma's: mere text to this tokenizer
        ("[INST]", False, True),
        ("<b>", False, False),
        ("|im_end|", False, False),
    ):
        row = row_of(chat(f"So {text}."))
        assert bool(found(row)) is known and bool(found(row, tokenizer=tokenizer)) is own, text
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert (len(ids) == 1) >= own  # what is refused is a token
    writes = "{% for m in messages %}<b>{{ m.content }}</b>{% endfor %}"  # then it does steer a chat
    assert found(row_of(chat("So <b>.")), writes, tokenizer) == [("control token in text", "message 1: <b>")]


# -- persona ----------------------------------------------------------------------------------------------------------
DEFAULT = "You are a helpful AI assistant named Small, trained by nobody."
BODY = "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}"
LOSES = (  # custom_instructions=None falls to the default persona, silently: the bug that no score showed
    "{% if custom_instructions is not defined and messages[0].role == 'system' %}"
    "{% set custom_instructions = messages[0].content | replace('/no_think', '') | trim %}{% endif %}"
    f"{{{{ custom_instructions or '{DEFAULT}' }}}}" + BODY
)
KEEPS = LOSES.replace("custom_instructions is not defined and ", "")


@pytest.mark.parametrize(
    "text",
    ["You are a pirate.", "You are a helpful AI assistant", "Yes.", "  Be\n\nbrief. ", "/no_think Be brief."],
    ids=["own", "in the default", "in the answer", "blanks", "switch"],
)
def test_persona(text):
    row = row_of(chat(system=text))
    assert not found(row, LOSES) and not found(row, KEEPS)
    bug = row | {"chat_template_kwargs": {"custom_instructions": None}}
    assert [(reason, "message 0" in detail) for reason, detail in found(bug, LOSES)] == [("persona lost", True)]
    assert not found(bug, KEEPS)


def test_persona_as_an_argument():
    row = row_of(chat(), chat_template_kwargs={"custom_instructions": "You are a pirate."})
    assert not found(row, LOSES)
    assert [reason for reason, _ in found(row, BODY)] == ["persona lost"]
    assert not found(row | {"chat_template_kwargs": {"custom_instructions": None}}, LOSES)  # none given, none lost


def test_every_place_of_a_persona():
    """A developer's message and the names that gpt-oss and other templates have for it."""
    body = "{% for m in messages if m.role in ('user', 'assistant') %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    told = {name: f"You are {name}." for name in ("custom_instructions", "system_prompt", "model_identity")}
    row = row_of([turn("developer", "Be brief."), *chat()], chat_template_kwargs=told)
    lost = told | {"message 0": "Be brief."}
    assert dict(personas.find_lost_personas(row, rendering.Renderer(body))) == lost
    for name in told:
        said = dict(personas.find_lost_personas(row, rendering.Renderer(body + f"{{{{ {name} }}}}")))
        assert said == {place: text for place, text in lost.items() if place != name}


def test_persona_lost_names_the_row(tmp_path):
    (tmp_path / "t.jinja").write_text(LOSES)
    bug = row_of(chat(system="You are a pirate."), chat_template_kwargs={"custom_instructions": None})
    path = write(tmp_path / "rows.jsonl", [*SOUND[:1], bug | {"id": "pirate-7"}])
    done = run(path, "--chat_template_path", tmp_path / "t.jinja")
    assert done.returncode == 1 and "persona lost" in done.stdout and "rows.jsonl:2 (pirate-7)" in done.stdout
    assert "You are a pirate." in done.stdout
    assert run(path).returncode == 0  # nothing to see without the template


@pytest.mark.parametrize("path", sorted(TEMPLATES.glob("*.jinja")), ids=lambda path: path.stem)
def test_our_templates_keep_the_persona(path):
    """Rendered, or refused in words where the format has no system prompt."""
    for text in ("Talk like a pirate.", "You are a helpful assistant. /no_think", "用一句话。"):
        reasons = {reason for reason, _ in found(row_of(chat(system=text)), path)}
        assert reasons <= {"template refuses the row", "answer without reasoning behind an opened thought"}


def test_an_answer_without_reasoning_behind_an_opened_thought():
    """What helps is the template's argument; where the row has it, nothing is found."""
    path = TEMPLATES / "qwen3_8.jinja"
    ((reason, detail),) = found(row_of(chat()), path)
    assert reason == "answer without reasoning behind an opened thought"
    assert "pass enable_thinking=false in chat_template_kwargs for these rows, or give them reasoning" in detail
    assert not found(row_of(chat()) | {"chat_template_kwargs": {"enable_thinking": False}}, path)


# -- the template's own words -----------------------------------------------------------------------------------------
def test_template_refuses(tmp_path):
    rows = [SOUND[0], row_of(chat(reasoning_content="So."))]
    done = run(write(tmp_path / "rows.jsonl", rows), "--chat_template_path", TEMPLATES / "chatml.jinja")
    assert done.returncode == 1 and "template refuses the row" in done.stdout and "rows.jsonl:2" in done.stdout
    assert "message 1: this template has no place for reasoning_content" in done.stdout
    misspelt = row_of(chat(), chat_template_kwargs={"train_turns": "lats"})
    ((reason, detail),) = found(misspelt, TEMPLATES / "chatml.jinja")
    assert reason == "template refuses the row" and "train_turns is lats" in detail
    ((reason, detail),) = found(SOUND[0], "{{ messages[0].content + 3 }}")  # fails without raise_exception
    assert reason == "template refuses the row" and detail


@pytest.mark.parametrize("key", ["tools", "chat_template", "messages", "conversations"])
def test_reserved_arguments_do_not_crash(key):
    row = row_of(chat(), chat_template_kwargs={key: 1})
    assert {reason for reason, _ in found(row, TEMPLATES / "chatml.jinja")} <= {"template refuses the row"}


# -- what is trained --------------------------------------------------------------------------------------------------
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' and m.loss_mask != 0 %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("mask", "kwargs", "template", "untrained"),
    [
        ([0, 0], {"train_turns": "flagged"}, TEMPLATES / "chatml.jinja", True),
        ([0, 1], {"train_turns": "flagged"}, TEMPLATES / "chatml.jinja", False),
        ([1, 0], {"train_turns": "last"}, TEMPLATES / "chatml.jinja", False),  # which does not read loss_mask
        ([0, 0], {}, TEMPLATES / "chatml.jinja", False),
        ([0, 0], {}, MARKED, True),
        ([0, 1], {}, MARKED, False),
        ([0, 0], {}, MARKED.replace(" generation ", " if 1 ").replace(" endgeneration ", " endif "), False),
        ([0, 0], {}, None, False),
    ],
)
def test_rows_without_a_trained_token(mask, kwargs, template, untrained):
    """By which answers the template marks; without marks, or a template, nobody can tell."""
    turns = [*chat(loss_mask=mask[0]), *chat(loss_mask=mask[1])]
    reasons = [reason for reason, _ in found(row_of(turns, chat_template_kwargs=kwargs), template)]
    assert reasons == [check.UNTRAINED] * untrained


def test_rows_without_a_trained_token_are_named_where_answers_alone_are_trained(demo, tmp_path):
    masked = row_of(chat(loss_mask=0), chat_template_kwargs={"train_turns": "flagged"})
    path = write(tmp_path / "rows.jsonl", [row_of(chat()), masked])
    flags = ["--model_name_or_path", demo / "init", "--chat_template_path", TEMPLATES / "chatml.jinja"]
    done = run(path, *flags)
    assert done.returncode == 1 and re.search(r"no trained token +1 +0 +rows.jsonl:2", done.stdout)
    assert "change its loss_mask or train_turns" in done.stdout
    for recipe, code in (("qwen3_full", 1), ("smollm3_midtrain", 0)):  # the second one trains every token
        done = run(path, *flags, "--recipe", REPO / "recipes" / f"{recipe}.py")
        assert (done.returncode, "no trained token" in done.stdout) == (code, bool(code)), recipe
    assert run(path, *flags, "--fix", "--out", tmp_path / "out.jsonl").returncode == 1
    assert len(lines(tmp_path / "out.jsonl")) == 1


# -- a template of another family -------------------------------------------------------------------------------------
def test_a_template_of_another_family_is_said_once(demo, tmp_path):
    """Though every row is sound, and in the file for machines, too; its own words stand in rendering's tests."""
    path = write(tmp_path / "rows.jsonl", [row_of(chat())] * 3)
    flags = ["--model_name_or_path", demo / "init", "--json", tmp_path / "found.json"]
    done = run(path, *flags, "--chat_template_path", TEMPLATES / "llama3.jinja")
    report = json.loads((tmp_path / "found.json").read_text())
    mismatch = report["template_mismatch"]
    assert done.returncode == 1 and done.stdout.count(mismatch) == 1 and "3 rows, 0 with findings" in done.stdout
    assert "llama3.jinja writes <|start_header_id|>, " in mismatch and "another family" in mismatch
    assert report["found"] == {} and report["findings"] == []
    done = run(path, *flags, "--chat_template_path", TEMPLATES / "chatml.jinja")
    assert done.returncode == 0 and "does not fit" not in done.stdout
    assert "template_mismatch" not in json.loads((tmp_path / "found.json").read_text())


# -- newlines ---------------------------------------------------------------------------------------------------------
blanks = st.text(st.sampled_from(" \n\r\t\u00a0\u3000\u2028"), max_size=4)


@settings(max_examples=300, deadline=None)
@given(blanks, st.sampled_from(["", "b", "  b\n", "\u00e9", "{}"]), blanks)
def test_what_merges_is_found_and_mended(text, rest, reasoning):
    """The oracle is the tokenizer: where header + answer does not begin with the header's tokens, the row is found;
    after mending, none merges, and nothing but the blanks up to the newline is gone."""
    row = row_of(chat(text + rest, reasoning_content=reasoning + rest))
    reasons = {reason for reason, _ in found(row) if "newline" in reason}
    fixed = check.mend_row(row)
    for field, name in (("content", "answer"), ("reasoning_content", "reasoning")):
        before, after = row["messages"][1][field], fixed["messages"][1][field]
        if merges(before):
            assert f"{name} begins with a newline" in reasons
        assert not merges(after)
        assert before.endswith(after) and not before.removesuffix(after).strip()
        assert before == after or before.removesuffix(after)[-1] in "\r\n"
        assert (f"{name} begins with a newline" in reasons) == (before != after)
    assert check.mend_row(fixed) == fixed and not {r for r, _ in found(fixed) if "newline" in r}
    assert fixed["messages"][0] == row["messages"][0] and {**fixed, "messages": 0} == {**row, "messages": 0}


@cache
def tokenizers():
    """Small byte-level BPE that splits as Qwen does and merges newlines, and the real one where it is."""
    small = Tokenizer(models.BPE())
    pattern = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\p{L}+|\p{N}|\s*[\r\n]+|\s+(?!\S)|\s+"
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    small.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    small.train_from_iterator(["assistant\n\n\n b\n\n \n  \n\r\n\r\n\t\n"] * 9, trainer)
    small.add_special_tokens(["<|im_start|>", "<think>"])
    folder = SHARED / "tokenizers" / "qwen3"
    return [small, *([AutoTokenizer.from_pretrained(folder).backend_tokenizer] if folder.is_dir() else [])]


def merges(text):
    """Whether a token reaches from the header into the answer, by what the tokenizers make of both."""
    for tokenizer in tokenizers():
        for header in ("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n"):
            ids, both = (tokenizer.encode(part, add_special_tokens=False).ids for part in (header, header + text))
            if both[: len(ids)] != ids:
                return True
    return False


def test_the_oracle_bites():
    assert merges("\nb") and merges(" \n b") and not merges("b\n") and not merges("  b")


# -- fix --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("suffix", [".jsonl", ""])
def test_fix_mends_leaves_and_counts(tmp_path, suffix):
    both = row_of(chat("\nb <|im_end|>"))
    whole = {"chat_template_kwargs": {}, "source": "own", "tags": [], "lang": "en"}
    clean = [row_of(chat(), **whole) | {"id": f"clean-{n}"} for n in range(2)]
    raw = [clean[0], row_of(chat("\n\n  b")), both, row_of(chat("\n")), clean[1], {"messages": chat(), "extra": 1}]
    path, out = write(tmp_path / "rows.jsonl", raw), tmp_path / f"out{suffix}"
    done = run(path, "--fix", "--out", out, "--json", tmp_path / "found.json")
    rows = (
        lines(out) if suffix else [{k: v for k, v in r.items() if v is not None} for r in load_from_disk(out)["train"]]
    )
    report = json.loads((out / "report.json" if not suffix else tmp_path / "out.report.json").read_text())
    rejected = lines(out / "rejected.jsonl" if not suffix else tmp_path / "out.rejected.jsonl")
    assert done.returncode == 1 and "4 rows, 2 left out" in done.stdout
    assert [row["id"] for row in rows] == ["clean-0", "a", "clean-1", "rows-6"] and [rows[0], rows[2]] == clean
    assert rows[1]["messages"] == chat("  b") and rows[1]["source"] == "rows" and rows[1]["lang"] == "en"
    assert [(entry["line"], entry["reason"]) for entry in rejected] == [
        (3, "control token in text"),
        (4, "empty text"),  # nothing but newlines
    ]
    assert report["in"] == report["out"]["train"] + sum(report["refused"].values()) == 6
    assert report["refused"] == {"control token in text": 1, "empty text": 1}
    assert report["mended"] == {"answer begins with a newline": 1}  # in the row that went out
    assert report["hash"] == row_keys.hash_of({"train": row_keys.content_hash(rows)})
    assert report.get("keys_not_kept") == (None if suffix else {"extra": 1}) and ("extra" in rows[3]) is bool(suffix)
    told = json.loads((tmp_path / "found.json").read_text())
    assert told["found"] == {"answer begins with a newline": 3, "control token in text": 1, "empty text": 1}
    assert told["mended"] == report["mended"]
    # what came out is sound, and a second pass changes nothing
    again = tmp_path / f"again{suffix}"
    done = run(out, "--fix", "--out", again)
    assert done.returncode == 0 and "0 with findings" in done.stdout
    second = json.loads((again / "report.json" if not suffix else tmp_path / "again.report.json").read_text())
    assert second["output"] == report["output"] and (not suffix or again.read_bytes() == out.read_bytes())


@pytest.mark.parametrize("suffix", [".jsonl", ""])
def test_fix_writes_the_values_of_the_file(tmp_path, own_cache, typed_loader, suffix):
    """Whatever `datasets` would make of them: they are compared with what Python's json reads in the file."""
    values = [*EXACT, 2**53 + 1, "2024-01-02", "7", {"to": "a"}, [1, 0.1 + 0.2], True]
    path = write(tmp_path / "rows.jsonl", [calling(value, every_key=True) for value in values])
    out = tmp_path / f"out{suffix}"
    assert run(path, "--fix", "--out", out).returncode == 0
    rows = lines(out) if suffix else [row for _, row in readers.read_rows(out)]
    written = [row["messages"][1]["tool_calls"][0]["function"]["arguments"]["x"] for row in rows]
    in_file = [row["messages"][1]["tool_calls"][0]["function"]["arguments"]["x"] for row in lines(path)]
    assert list(map(repr, written)) == list(map(repr, in_file)) == list(map(repr, values))


def test_all_mended_is_exit_0(tmp_path):
    path = write(tmp_path / "rows.jsonl", [row_of(chat("\nb")), row_of(chat(reasoning_content="\nb"))])
    assert run(path).returncode == 1
    done = run(path, "--fix", "--out", tmp_path / "out")
    assert done.returncode == 0 and "2 with findings" in done.stdout and (tmp_path / "out" / "card.md").is_file()


def test_no_sound_row_writes_nothing(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"text": "a"}])
    done = run(path, "--fix", "--out", tmp_path / "out")
    assert done.returncode == 1 and "rows.jsonl is sound: see " in done.stderr
    assert [entry["reason"] for entry in lines(tmp_path / "out" / "rejected.jsonl")] == ["row without messages"]
    assert not (tmp_path / "out" / "train").exists()


def test_language_and_length(demo, tmp_path):
    """Lengths against the tokenizer's own on the text that its template renders."""
    from transformers import AutoTokenizer

    answers = ("你好，世界", "Yes " * 20, "はい、そうです", "7")
    rows = [row_of(chat(answer), **({"lang": "zh"} if answer[0] == "は" else {})) for answer in answers]
    path, tokenizer = write(tmp_path / "rows.jsonl", rows), AutoTokenizer.from_pretrained(demo / "init")
    template = TEMPLATES / "chatml.jinja"
    lengths = [
        len(tokenizer.apply_chat_template(row["messages"], chat_template=template.read_text())["input_ids"])
        for row in rows
    ]
    flags = ["--model_name_or_path", demo / "init", "--chat_template_path", template, "--json", tmp_path / "found.json"]
    run(path, *flags, "--lang", "en", "--max_length", sorted(lengths)[2])
    found = json.loads((tmp_path / "found.json").read_text())["findings"]
    longest = lengths.index(max(lengths)) + 1
    assert sorted((f["line"], f["reason"]) for f in found) == sorted(
        [(1, "another language"), (3, "another language"), (longest, "too long")]
    )
    assert f"{max(lengths)} tokens, max_length {sorted(lengths)[2]}" in [f["detail"] for f in found]
    run(path, *flags, "--lang", "zh", "en", "--max_length", max(lengths))
    found = json.loads((tmp_path / "found.json").read_text())["findings"]
    assert [(f["line"], f["reason"], f["detail"]) for f in found] == [(3, "another language", "the answers: ja")]


def test_what_helps_stands_below_the_reason(demo, tmp_path):
    raw = [row_of(chat("Yes " * 90)), {"conversations": [{"from": "human", "value": "Hi"}]}]
    raw += [row_of([turn("dev", "a"), CHAIN[3]])]
    raw += [{"instruction": "a", "output": "b"}, {"prompt": "a", "completion": "b"}, {"conversations": chat()}]
    flags = ["--model_name_or_path", demo / "init", "--chat_template_path", TEMPLATES / "chatml.jinja"]
    done = run(write(tmp_path / "rows.jsonl", raw), *flags, "--max_length", 50, "--json", tmp_path / "found.json")
    for words in ("python -m data_prep.filter --max_length", "data_prep.expand_turns", "normalize auto", "(--roles)"):
        assert words in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())["findings"]
    sources = {one["line"]: one["detail"].split()[-1] for one in found if one["reason"] == "row without messages"}
    assert sources == {2: "sharegpt", 4: "alpaca", 5: "prompt_completion", 6: "messages"}


# -- placeholders -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", ["I am {{name}}.", "我是{{ author }}开发的", "Dear {{first_name}},", "- {{user}}: hi"])
def test_placeholders(text):
    for row in (row_of(chat(text)), row_of(chat(system=text)), row_of([turn("user", text), turn("assistant", "b")])):
        assert [reason for reason, _ in found(row)] == ["placeholder that is not filled in"]
    assert not found(row_of([*CHAIN[:2], turn("tool", text), CHAIN[3]]))  # what a tool says is not ours


@pytest.mark.parametrize(
    "text",
    [
        "{name}",
        "{{ }}",
        "{{{name}}}",
        r"$\frac{{a}}{{bc}}$ and x^{{ab}}, \text{{name}}",
        "{{ user.name }} {{ x | upper }}",
        "Write `{{name}}` there.",
        "```\nHello {{name}}\n```",
        "{% if x %}{{name}}{% endif %}",
        "{{#each items}}{{name}}{{/each}}",
        "<p>{{name}}</p>",
        "f'{{not_a_field}}' prints braces: `{{not_a_field}}`",
        "A placeholder like {{name}} is replaced.",
        "把模板里的 {{name}} 换成名字",
        "Use {{name}} in Jinja",
        "{{2}} and {{1, 2}}",
    ],
)
def test_no_placeholders(text):
    assert not found(row_of(chat(text)))


@real
@pytest.mark.parametrize(
    ("file", "columns", "count"),
    [
        ("chat/identity.json", ("instruction", "output"), 85),
        ("chat/sharegpt_zh_1K_format.jsonl", (), 0),
        ("chat/fastchat_dummy_conversation.json", (), 0),
    ],
)
def test_placeholders_of_real_files(file, columns, count):
    """85 of the 91 rows of identity.json hold {{name}} or {{author}}; code for Flask and Django elsewhere is none."""
    hits = 0
    for _, raw in readers.read_rows(SHARED / "data" / file):
        texts = [raw[name] for name in columns] or [one["value"] for one in raw["conversations"]]
        row = row_of([turn("user", texts[0]), *[turn("assistant", text) for text in texts[1:]]])
        hits += any(reason == "placeholder that is not filled in" for reason, _ in found(row))
    assert hits == count


# -- what the loader makes of the file --------------------------------------------------------------------------------
@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def without_the_patch(own_cache, monkeypatch):
    """Numbers are read as `datasets` reads them by itself."""
    import pandas

    monkeypatch.setattr(recipe_rows, "read_json_exactly", lambda: None)
    for name in ("ujson_loads", "ujson_dumps"):
        monkeypatch.setattr(pandas.io.json, name, getattr(pandas.io.json._json, name))


def calling(value, every_key=False):
    """A row with a call of f(x=value). every_key: its messages have the same keys: Arrow makes columns of them."""
    call = {"function": {"name": "f", "arguments": {"x": value}}}
    turns = [turn("user", "?"), turn("assistant", "", tool_calls=[call])]
    if every_key:
        turns = [{"tool_calls": None, **one} for one in turns]
    return {"messages": turns}


def changes(tmp_path, rows, name="rows.jsonl"):
    """[(line, detail)] of the rows that the loader changes."""
    path = tmp_path / name
    if not path.exists():
        write(path, rows)
    run(path, "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())["findings"]
    return [(entry["line"], entry["detail"]) for entry in found if entry["reason"] == check.CHANGED]


BENT = [0.7, 3.141592653589793, 1e-12]
EXACT = [*BENT, 12345678901234567890123, 1, 0.5, "low", {"to": 0.95}]


def test_numbers_of_rows_with_other_keys_are_loaded_as_they_stand(tmp_path, own_cache):
    assert changes(tmp_path, [calling(value) for value in EXACT]) == []
    assert changes(tmp_path, [calling(0.7, every_key=True)] * 2, "uniform.jsonl") == []


def test_without_the_patch_each_bent_number_is_found(tmp_path, without_the_patch):
    """The values are those that datasets was seen to make by itself."""
    found = changes(tmp_path, [calling(value) for value in (*BENT, 1, 0.5, "low", {"to": 0.95})])
    place = "messages.1.tool_calls.0.function.arguments.x"
    assert found == [
        (1, f"{place}: 0.7 in the file, 0.7000000000000001 as it is loaded"),
        (2, f"{place}: 3.141592653589793 in the file, 3.1415926536 as it is loaded"),
        (3, f"{place}: 1e-12 in the file, 0.0 as it is loaded"),
        (7, f"{place}.to: 0.95 in the file, 0.9500000000000001 as it is loaded"),
    ]
    done = run(tmp_path / "rows.jsonl")
    assert done.returncode == 1 and "python -m data_prep.normalize messages FILE --out data/NAME" in done.stdout
    done = run(write(tmp_path / "long.jsonl", [calling(value) for value in EXACT]))  # a number of over 64 bits
    assert done.returncode == 2 and "a recipe cannot load the rows, though each is sound" in done.stderr


@real
def test_the_shared_file(tmp_path, own_cache):
    done = run(SHARED / "faults" / "data" / "float_arguments.jsonl")
    assert done.returncode == 0 and "0 with findings" in done.stdout


@real
def test_the_shared_file_without_the_patch(tmp_path, without_the_patch):
    done = run(SHARED / "faults" / "data" / "float_arguments.jsonl")
    assert done.returncode == 1 and "0.7 in the file, 0.7000000000000001 as it is loaded" in done.stdout


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([1, 0.5], {1: "1 in the file, 1.0 as it is loaded"}),
        ([2**53 + 1, 0.5], {1: "9007199254740993 in the file, 9007199254740992.0 as it is loaded"}),
        ([12345678901234567890123], {1: "1.2345678901234568e+22 as it is loaded"}),
        (["2024-01-02", "2024-01-03"], {n: "datetime.datetime(2024, 1, " for n in (1, 2)}),
        (["2024-01-02", "soon"], {}),
        (["7", {"to": "a"}], {1: "'7' in the file, 7 as it is loaded"}),
        (["true", ["a"]], {1: "'true' in the file, True as it is loaded"}),
        (["a", "b"], {}),
        ([0.7, 0.1 + 0.2], {}),
    ],
    ids=str,
)
def test_types_that_the_loader_guesses(tmp_path, own_cache, typed_loader, values, found):
    """Rows whose messages have the same keys: a column of each key, whatever its rows mean."""
    details = dict(changes(tmp_path, [calling(value, every_key=True) for value in values]))
    assert details.keys() == found.keys()
    for line, words in found.items():
        assert "arguments.x: " in details[line] and words in details[line]


def test_the_recipes_loader_changes_nothing(tmp_path, own_cache):
    for values in ([1, 0.5], ["2024-01-02", "2024-01-03"], ["7", {"to": "a"}], [12345678901234567890123]):
        assert not changes(tmp_path, [calling(value, every_key=True) for value in values])


def test_dates_in_text(tmp_path, own_cache, typed_loader):
    dates = [{"messages": [turn("user", "2024-01-02"), turn("assistant", "2024-01-03 10:00:00")]}]
    ((line, detail),) = changes(tmp_path, dates)
    assert line == 1 and "messages.0.content: '2024-01-02' in the file, datetime" in detail


def test_every_place_is_compared(tmp_path, own_cache, typed_loader):
    """Blank lines, many chunks: a row is compared with itself. Of 40 rows each third holds a whole number."""
    rows = [calling(0.5 if number % 3 else number, every_key=True) for number in range(40)]
    lines = "\n\n".join(json.dumps(row) for row in rows)
    (tmp_path / "rows.jsonl").write_text(lines)
    with mock.patch.object(text_files, "HEAD", 500), mock.patch.object(text_files, "BLOCK", 500):
        found = changes(tmp_path, [])
    assert [line for line, _ in found] == [2 * number + 1 for number in range(0, 40, 3)]
    assert all(f": {(line - 1) // 2} in the file" in detail for line, detail in found)


def test_our_folders_and_files_are_exact(tmp_path, own_cache, monkeypatch):
    raw = write(tmp_path / "raw.jsonl", [calling(value, every_key=True) for value in EXACT])
    assert run("messages", raw, "--out", tmp_path / "own", script=normalize).returncode == 0
    done = run(tmp_path / "own")
    assert done.returncode == 0 and f"{len(EXACT)} rows, 0 with findings" in done.stdout
    loaded = recipe_rows.load_sets(tmp_path / "own")["train"]
    assert [row["messages"][1]["tool_calls"][0]["function"]["arguments"]["x"] for row in loaded] == EXACT
    monkeypatch.setattr(recipe_rows, "read_json_exactly", lambda: None)
    monkeypatch.setattr("data_prep.common.loader_changes.load_sets", bend)
    assert [line for line, _ in changes(tmp_path, [], "own")] == [1]


def bend(path):
    """A loader that adds a digit to 0.7, as that of pandas does."""

    def bent(value):
        if isinstance(value, dict):
            return {key: bent(item) for key, item in value.items()}
        if isinstance(value, list):
            return [bent(item) for item in value]
        return 0.7000000000000001 if value == 0.7 else value

    return {split: [bent(row) for row in rows] for split, rows in recipe_rows.load_sets(path).items()}


def test_nulls_that_the_loader_fills_in():
    """Those of messages reach no template, others do; of Arrow's nothing tells which stood in the file."""
    row = {"messages": [turn("assistant", "", tool_calls=[{"function": {"name": "f", "arguments": {"x": 0.5}}}])]}
    in_messages = {"messages": [{**row["messages"][0], "name": None}], "tools": None}
    in_call = {"messages": [turn("assistant", "", tool_calls=[{"id": None, **row["messages"][0]["tool_calls"][0]}])]}
    for path, loaded, words in (
        ("rows.jsonl", in_messages, ""),
        ("rows.jsonl", in_call, "messages.0.tool_calls.0.id: nothing in the file, None as it is loaded"),
        ("rows.parquet", in_messages, ""),
        ("rows.parquet", in_call, ""),
    ):
        loader = loader_changes.Loader(Path(path))
        loader.sets = {"train": [loaded]}
        assert loader.find_change("train", 0, row) == words


HALF = "\\ud83d"
PLAIN = '"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]'


@pytest.mark.parametrize(
    "row",
    [
        f"{{{PLAIN.replace('Hi?', 'Hi ' + HALF)}}}",
        f'{{{PLAIN}, "id": "{HALF}"}}',
        f'{{{PLAIN}, "note": "{HALF}"}}',
        f'{{{PLAIN}, "{HALF}": 1}}',
    ],
    ids=["text", "id", "other column", "name of a column"],
)
@pytest.mark.parametrize("count", [1, 2])
def test_half_a_surrogate_pair_that_no_recipe_loads(tmp_path, own_cache, row, count):
    """Of one row a recipe's loader makes rows of messages, without a word; of more it loads none."""
    path = write(tmp_path / "rows.jsonl", [f"{{{PLAIN}}}"] * (count - 1) + [row])
    if count == 1:
        assert len(recipe_rows.load_sets(path)["train"]) == 2
    else:
        with pytest.raises(UsageError, match="half a surrogate pair"):
            recipe_rows.load_sets(path)
    done = run(path, "--json", tmp_path / "found.json")
    (finding,) = json.loads((tmp_path / "found.json").read_text())["findings"]
    assert done.returncode == 1 and (finding["line"], finding["reason"]) == (count, "text that is not Unicode")
    assert run(path, "--fix", "--out", tmp_path / "out.jsonl").returncode == 1
    assert not (tmp_path / "out.jsonl").exists() or len(lines(tmp_path / "out.jsonl")) == count - 1


def test_plain_text_is_not_loaded(tmp_path, monkeypatch):
    """It would take seconds: text is text to the loader, too."""
    loads = []
    monkeypatch.setattr(loader_changes, "load_sets", lambda path: loads.append(path) or {"train": []})
    run(write(tmp_path / "rows.jsonl", [row_of(chat(f"{n}. is true", reasoning_content="7")) for n in range(9)]))
    run(write(tmp_path / "flags.jsonl", [row_of(chat(), chat_template_kwargs={"enable_thinking": True})]))
    assert loads == []
    done = run(write(tmp_path / "call.jsonl", [calling(1)]))
    assert loads == [tmp_path / "call.jsonl"]
    assert done.returncode == 2 and "a recipe cannot load the rows" in done.stderr and "fewer rows" in done.stderr


# -- forms of input ---------------------------------------------------------------------------------------------------
def test_every_form_gives_the_same_findings(tmp_path):
    nameless = {"messages": [turn("user", "a"), turn("user", "b"), turn("assistant", "c")]}  # its id is null in Arrow
    raw = [row_of(chat()), row_of(chat("\nb")), nameless]
    write(tmp_path / "rows.jsonl", raw)
    (tmp_path / "rows.json").write_text(json.dumps(raw, indent=1))
    Dataset.from_list(raw).to_parquet(tmp_path / "rows.parquet")
    Dataset.from_list(raw).save_to_disk(tmp_path / "rows")
    for name in ("rows.jsonl", "rows.json", "rows.parquet", "rows"):
        assert run(tmp_path / name, "--json", tmp_path / "found.json").returncode == 1
        findings = json.loads((tmp_path / "found.json").read_text())["findings"]
        assert [(entry["line"], entry["id"], entry["reason"]) for entry in findings] == [
            (2, "a", "answer begins with a newline"),
            (3, "", ORDER),
        ]
        assert {entry["file"] for entry in findings} == {"train" if name == "rows" else name}
    splits = {"train": [row_of(chat(), source="s")], "validation": [row_of(chat("\nb"), source="s") | {"id": "b"}]}
    whole = {split: [complete_row(row, "x", 1) for row in rows] for split, rows in splits.items()}
    writer.write_rows(tmp_path / "pool", "own", whole)
    done = run(tmp_path / "pool", "--fix", "--out", tmp_path / "fixed")
    assert "validation:1 (b)" in done.stdout and done.returncode == 0
    assert {split: len(rows) for split, rows in load_from_disk(tmp_path / "fixed").items()} == {
        "train": 1,
        "validation": 1,
    }


def test_same_input_same_bytes(tmp_path):
    path = write(tmp_path / "rows.jsonl", [row for row, *_ in CRAFTED] + SOUND)
    for name in ("one", "two"):
        run(path, "--fix", "--out", tmp_path / name / "out", "--json", tmp_path / name / "found.json")
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert len(files) > 6
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


pieces = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["", "a", "user", "tool", "<think>", "\ud800", "\n"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["role", "content", "name", "arguments", "function"]), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(SOUND), st.data())
def test_no_value_crashes_it(row, data):
    row = json.loads(json.dumps(row))
    if data.draw(st.booleans()):
        inner = row["messages"][data.draw(st.integers(0, len(row["messages"]) - 1))]
        inner[data.draw(st.sampled_from([*inner, "tool_calls", "reasoning_content"]))] = data.draw(pieces)
    else:
        row[data.draw(st.sampled_from([*row, "tools", "tags", "chat_template_kwargs", "source"]))] = data.draw(pieces)
    options = check.CheckOptions(rendering.Renderer((TEMPLATES / "qwen3.jinja").read_text()))
    if not check.find_faults(row, options):
        whole = complete_row(row, "x", 1)
        assert not check.find_faults(whole, options) and json_text.json_line(whole).encode()
        assert complete_row(whole, "y", 2) == whole


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["none.jsonl"], ["none.jsonl", ".parquet"]),
        (["rows.txt"], ["rows.txt", ".jsonl"]),
        (["folder"], ["folder", "save_to_disk"]),
        (["empty.jsonl"], ["empty.jsonl", "no rows"]),
        (["cut.json"], ["cut.json:1", "not JSON"]),
        (["cut.parquet"], ["cut.parquet", "cannot be read", "Parquet"]),
        (["rows.jsonl", "--fix"], ["--fix and --out"]),
        (["rows.jsonl", "--out", "out"], ["--fix and --out"]),
        (["rows.jsonl", "--fix", "--out", "folder"], ["folder", "exists already"]),
        (["rows.jsonl", "--fix", "--out", "rows.txt/out"], ["rows.txt/out", "not written"]),
        (["rows.jsonl", "--json", "rows.txt/out"], ["rows.txt/out", "not written"]),
        (["rows.jsonl", "--chat_template_path", "none.jinja"], ["none.jinja", "chat_templates/"]),
        (["rows.jsonl", "--chat_template_path", "cut.jinja"], ["cut.jinja", "not a template"]),
        (["rows.jsonl", "--model_name_or_path", "no/such"], ["no/such", "HF_ENDPOINT"]),
        (["rows.jsonl", "--recipe", "none.py"], ["none.py", "recipes/"]),
        (["rows.jsonl", "--recipe", "rows.txt"], ["rows.txt", "DEFAULTS"]),
        (["rows.jsonl", "--mdoel", "x"], ["--mdoel"]),
        (["rows.jsonl", "--max_length", "9"], ["--max_length", "tokenizer"]),
        (["rows.jsonl", "--max_length", "9", "--recipe", "far.py"], ["no/such", "HF_ENDPOINT"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith(("rows", "none", "cut", "empty", "folder")) else "",
)
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    write(Path("rows.jsonl"), [row_of(chat())])
    Path("empty.jsonl").touch()
    Path("rows.txt").touch()
    Path("folder").mkdir()
    Path("cut.json").write_text('[{"messages": ')
    Path("cut.parquet").write_text("PAR1")
    Path("cut.jinja").write_text("{% for %}")
    Path("far.py").write_text("DEFAULTS = dict(model_name_or_path='no/such')")
    before = sorted(Path(".").rglob("*"))
    done = run(*flags)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if not line.startswith(("usage:", " "))]
    assert len(said) == 1 and all(word in said[0] for word in words), done.stderr
    assert sorted(Path(".").rglob("*")) == before


def test_recipe_gives_template_and_tokenizer(demo, tmp_path):
    """DEFAULTS of a real recipe, whose model is not at hand; a copy whose model is; flags win."""
    path = write(tmp_path / "rows.jsonl", [row_of(chat(reasoning_content="So.")), row_of(chat("<start_of_turn>"))])
    recipe = REPO / "recipes" / "qwen3_qlora.py"
    done = run(path, "--recipe", recipe)
    assert "no place for reasoning_content" in done.stdout and "control token in text" in done.stdout
    assert "known control tokens" in done.stderr and "Traceback" not in done.stderr
    source = f"DEFAULTS = dict(model_name_or_path={str(demo / 'init')!r}, chat_template_path={{!r}})\n"
    (tmp_path / "mine.py").write_text(source.format(str(TEMPLATES / "chatml.jinja")))
    done = run(path, "--recipe", tmp_path / "mine.py")
    assert "no place for reasoning_content" in done.stdout and "control token" not in done.stdout + done.stderr
    done = run(path, "--recipe", tmp_path / "mine.py", "--chat_template_path", TEMPLATES / "qwen3.jinja")
    assert done.returncode == 0


# -- real data --------------------------------------------------------------------------------------------------------
@real
def test_shared_files_with_counts_by_reason(tmp_path):
    """Raw files of other shapes are counted, not crashed on; what normalize.py makes of them is sound."""
    data = SHARED / "data"
    for file, count, reason in (
        ("chat/sharegpt_zh_1K_format.jsonl", 1000, "row without messages"),
        ("tools/glaive_toolcall_en_demo.json", 300, "row without messages"),
        ("tools/reason_tool_use_demo_50.jsonl", 50, "text that is not a string"),
        ("tools/bfcl/BFCL_v4_multiple.json", 200, "row without messages"),
        ("chat/tinker_conversations.jsonl", 128, None),
    ):
        done = run(data / file, "--json", tmp_path / "found.json", "--chat_template_path", TEMPLATES / "qwen3.jinja")
        report = json.loads((tmp_path / "found.json").read_text())
        assert report["in"] == count and report["found"] == ({reason: count} if reason else {})
        assert done.returncode == (1 if reason else 0)
    flags = ["--chat_template_path", TEMPLATES / "qwen3.jinja"]
    flags += ["--model_name_or_path", SHARED / "tokenizers" / "qwen3"]
    for file in ("chat/sharegpt_zh_1K_format.jsonl", "tools/glaive_toolcall_en_demo.json"):
        out = tmp_path / f"{Path(file).stem}.jsonl"
        raw = [row for _, row in readers.read_rows(data / file) if len(row["conversations"]) < 50]
        assert run("sharegpt", write(tmp_path / "raw.jsonl", raw), "--out", out, script=normalize).returncode == 0
        done = run(out, *flags, "--json", tmp_path / "found.json")
        # one row of glaive passes a list where its tool's schema says number
        wrong = {"arguments against the tool's schema": 1} if "glaive" in file else {}
        assert json.loads((tmp_path / "found.json").read_text())["found"] == wrong and done.returncode == len(wrong)
        assert int(re.search(r"([\d,]+) rows", done.stdout)[1].replace(",", "")) == len(lines(out)) > 250


@real
def test_shared_sharegpt_as_messages_without_normalize(tmp_path):
    """Renamed only: the faults that normalize.py refuses are found here too."""
    roles = {"human": "user", "gpt": "assistant"}
    raw = [row for _, row in readers.read_rows(SHARED / "data" / "chat" / "sharegpt_zh_1K_format.jsonl")]
    rows = [
        row_of([turn(roles.get(t["from"], t["from"]), t["value"].strip()) for t in row["conversations"]]) for row in raw
    ]
    done = run(write(tmp_path / "rows.jsonl", rows), "--json", tmp_path / "found.json")
    report = json.loads((tmp_path / "found.json").read_text())
    assert done.returncode == 1 and report["found"] == {
        "control token in text": 1,
        "empty text": 1,
        "last message is not the assistant's": 6,
        "no assistant turn": 1,
    }


@pytest.mark.parametrize("name", sorted(path.stem for path in TEMPLATES.glob("*.jinja")))
def test_a_call_without_function_is_rendered_or_named(name):
    """{"name", "arguments"} may stand alone in a call, as half of the published templates read it; in the others the
    row is refused by a sentence, not by what Python says of a missing key."""
    whole = {"id": "call00001", "type": "function", "function": {"name": "prime", "arguments": {"number": 7}}}
    bare = {"id": "call00001", "name": "prime", "arguments": {"number": 7}}
    function = {"name": "prime", "description": "d", "parameters": {"type": "object", "properties": {}}}
    texts = []
    for call in (whole, bare):
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        renderer = rendering.Renderer((TEMPLATES / f"{name}.jinja").read_text())
        renderer.special_tokens = {"bos_token": "<s>", "eos_token": "</s>"}
        try:
            texts.append(renderer.render({"tools": [{"type": "function", "function": function}]}, turns).text)
        except InvalidRow as refusal:
            texts.append(refusal.detail)
    if "has no place for" in texts[0]:
        return
    assert "prime" in texts[0]
    assert texts[1] == texts[0] or texts[1].startswith("message 1: a tool call without function, which this template ")
