"""data_prep/expand_turns.py: over the rows that come out, every answer is trained once, whole, under the prompt that a
server would send. The oracle writes Qwen3's request and output by hand and never sees a template or a marker.

Each of these turns the suite red (tried): a shorter row that trains what a longer one trains; no marks, or only where
this template needs them; the marks of the wrong turns; coverage without the text before it, or by the text alone; only
the longest row kept; refused answers not counted; ids of the wrong message, or not one of a kind; train_turns last
ignored; the cost of the input counted as that of the output; trained tokens off by one; empty blocks counted;
spans of the request taken for the answer's.
"""

import io
import json
import subprocess
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import pytest
from datasets import load_from_disk
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from data_prep import expand_turns, normalize
from data_prep.common import json_text, readers, rendering, row_keys, writer
from data_prep.common.errors import InvalidRow
from tests.helpers.runs import REPO, SHARED
from tests.helpers.template_oracle import ALL_FAMILIES
from tests.helpers.template_oracle import Refused as OracleRefused

TEMPLATES = REPO / "chat_templates"
real = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="../shared is absent: own rows prove the same")


# -- running it -------------------------------------------------------------------------------------------------------
def run(*args, script=expand_turns):
    """The script's main() as a command: exit code, stdout and stderr. In this process, which saves its start-up."""
    out, err = io.StringIO(), io.StringIO()
    with mock.patch("sys.argv", ["x.py", *map(str, args)]), redirect_stdout(out), redirect_stderr(err):
        try:
            code = script.main()
        except SystemExit as error:
            code = error.code
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def source(template):
    return template.read_text() if isinstance(template, Path) else template


def unmarked(messages):
    return [{k: v for k, v in turn.items() if k != "loss_mask"} for turn in messages]


def expand(row, template):
    """(rows, refused answers) of one row, in memory."""
    expansion = expand_turns.expand(row, rendering.Renderer(source(template)))
    return expansion.rows, expansion.refused


def trained(rows, template):
    """Counter of (prompt, trained text) over rows, as transformers renders them."""
    found = Counter()
    for row in rows:
        texts, spans = render_jinja_template(
            [row["messages"]],
            tools=row.get("tools"),
            chat_template=source(template),
            return_assistant_tokens_mask=True,
            **row.get("chat_template_kwargs", {}),
        )
        found.update((texts[0][:start], texts[0][start:end]) for start, end in spans[0] if start < end)
    return found


# -- the oracle: Qwen3's format by hand -------------------------------------------------------------------------------
def im(role, text):
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def dump(value):
    return json.dumps(value, ensure_ascii=False)


def listing(tool):
    return "\n" + dump(tool)


TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function "
    "signatures within <tools></tools> XML tags:\n<tools>{}\n</tools>\n\nFor each function call, return a json object "
    "with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{{"name": <function-name>, "arguments": <args-json-object>}}\n</tool_call>'
)


def calls_of(turn):
    out = "\n" if turn["content"] and turn.get("tool_calls") else ""
    functions = [call["function"] for call in turn.get("tool_calls", [])]
    return out + "\n".join(
        f'<tool_call>\n{{"name": "{f["name"]}", "arguments": {dump(f["arguments"])}}}\n</tool_call>' for f in functions
    )


def think(turn):
    return f"<think>\n{turn.get('reasoning_content', '')}\n</think>\n\n"


def request(messages, tools, enable_thinking=None, preserve_thinking=False):
    """What a server sends before the model speaks; messages end with the user or a tool, or are none."""
    system = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
    text = ""
    if tools:
        text = im(
            "system", (system + "\n\n" if system is not None else "") + TOOLS.format("".join(map(listing, tools)))
        )
    elif system is not None:
        text = im("system", system)
    question = max((i for i, turn in enumerate(messages) if turn["role"] == "user"), default=len(messages))
    for i, turn in enumerate(messages):
        if turn["role"] == "user":
            text += im("user", turn["content"])
        elif turn["role"] == "tool":
            text += "" if messages[i - 1]["role"] == "tool" else "<|im_start|>user"
            text += f"\n<tool_response>\n{turn['content']}\n</tool_response>"
            text += "" if messages[i + 1 : i + 2] and messages[i + 1]["role"] == "tool" else "<|im_end|>\n"
        elif turn["role"] == "assistant":
            shown = preserve_thinking or (i > question and turn.get("reasoning_content"))
            text += im("assistant", (think(turn) if shown else "") + turn["content"] + calls_of(turn))
    return text + "<|im_start|>assistant\n" + ("<think>\n\n</think>\n\n" if enable_thinking is False else "")


def output(messages, k, enable_thinking=None, preserve_thinking=False):
    """What the model must say as message k; None where the prompt leaves no room for its reasoning."""
    turn = messages[k]
    asked = any(one["role"] == "user" for one in messages[:k])
    if turn.get("reasoning_content") and (enable_thinking is False or not asked and not preserve_thinking):
        return None
    block = think(turn) if enable_thinking is not False and (asked or preserve_thinking) else ""
    return block + turn["content"] + calls_of(turn) + "<|im_end|>"


def expected(row):
    """(Counter of every answer's (prompt, output), number of answers that no prompt leaves room for)"""
    messages, kwargs = row["messages"], row.get("chat_template_kwargs", {})
    answers = [k for k, turn in enumerate(messages) if turn["role"] == "assistant"]
    outputs = {k: output(messages, k, **kwargs) for k in answers}
    pairs = [(request(messages[:k], row.get("tools"), **kwargs), said) for k, said in outputs.items() if said]
    return Counter(pairs), sum(said is None for said in outputs.values())


# -- rows -------------------------------------------------------------------------------------------------------------
CALL = {"type": "function", "function": {"name": "prime", "arguments": {"n": 97}}}
TOOL = {"type": "function", "function": {"name": "prime", "description": "é?", "parameters": {"type": "object"}}}


def user(text="Hi?"):
    return {"role": "user", "content": text}


def answer(text="Yes.", reasoning=None, calls=0):
    turn = {"role": "assistant", "content": text}
    turn |= {"reasoning_content": reasoning} if reasoning else {}
    return turn | ({"tool_calls": [CALL] * calls} if calls else {})


REPLY = {"role": "tool", "content": "true"}


def row_of(*messages, tools=None, **kwargs):
    row = {"id": "a", "messages": list(messages)} | ({"tools": tools} if tools else {})
    return row | {"chat_template_kwargs": kwargs, "source": "own", "tags": ["x"], "lang": "en"}


TWO = row_of(user("Hi"), answer("Yo"), user("Hm"), answer("So"))
CHAINS = row_of(
    user("Is 97 prime?"),
    answer("I ask.", "A tool.", 1),
    REPLY,
    answer("Yes.", "It says so."),
    user("Sure?"),
    answer("", "Again.", 2),
    REPLY,
    REPLY,
    answer("Sure."),
    tools=[TOOL],
)
GREETING = row_of(answer("Welcome."), *CHAINS["messages"])
texts = st.sampled_from(["13", "Да.", "用一句话 😀", "a\n\nb", '{"x": 1}', "cafe\u0301 x", "  indented", "ends \n"])


@st.composite
def conversations(draw):
    tools = [TOOL] if draw(st.booleans()) else None
    messages = [{"role": "system", "content": draw(texts)}] if draw(st.booleans()) else []
    if not tools and draw(st.integers(0, 4)) == 0:
        messages += [answer(draw(texts), draw(st.none() | st.just("r")))]
    maybe = st.none() | st.sampled_from(["I think.", "a\nb"])
    for _ in range(draw(st.integers(1, 4))):
        messages.append(user(draw(texts)))
        for _ in range(draw(st.integers(0, 2)) if tools else 0):
            calls = draw(st.integers(1, 2))
            messages += [answer(draw(st.just("") | texts), draw(maybe), calls), *[REPLY] * calls]
        messages.append(answer(draw(texts), draw(maybe)))
    kwargs = draw(st.sampled_from([{}, {}, {"enable_thinking": False}, {"preserve_thinking": True}]))
    return row_of(*messages, tools=tools, **kwargs)


# -- every answer once, under its true prompt -------------------------------------------------------------------------
@settings(max_examples=300, deadline=None)
@given(conversations())
@example(TWO)
@example(CHAINS)
@example(GREETING)
def test_qwen3_trains_every_answer_once_under_its_prompt(row):
    pairs, no_room = expected(row)
    try:
        rows, refused = expand(row, TEMPLATES / "qwen3.jinja")
    except InvalidRow:
        assert not pairs
        return
    assert trained(rows, TEMPLATES / "qwen3.jinja") == pairs
    assert len(refused) == no_room and all("no room for reasoning" in str(why) for _, why in refused)
    # carried over: everything but the messages' end, and the marks
    for one in rows:
        assert {k: v for k, v in one.items() if k not in ("messages", "chat_template_kwargs")} == {
            k: v for k, v in row.items() if k not in ("messages", "chat_template_kwargs")
        }
        plain = unmarked(one["messages"])
        assert plain == row["messages"][: len(plain)]
        assert {k: v for k, v in one["chat_template_kwargs"].items() if k != "train_turns"} == row[
            "chat_template_kwargs"
        ]
    # once expanded, each row is left alone
    assert [again for one in rows for again in expand(one, TEMPLATES / "qwen3.jinja")[0]] == rows
    # only where the template needs it
    if not no_room and trained([row], TEMPLATES / "qwen3.jinja") == pairs:
        assert rows == [row]


@settings(max_examples=150, deadline=None)
@given(conversations(), st.sampled_from(["chatml", "qwen3_instruct_2507"]))
def test_what_the_template_trains_whole_stays_one_row(row, name):
    turns = [{k: v for k, v in turn.items() if k != "reasoning_content"} for turn in row["messages"]]
    row = {**row, "messages": turns, "chat_template_kwargs": {}}
    rows, refused = expand(row, TEMPLATES / f"{name}.jinja")
    assert rows == [row] and not refused
    answers = sum(turn["role"] == "assistant" for turn in turns)
    assert trained(rows, TEMPLATES / f"{name}.jinja").total() == answers


@settings(max_examples=100, deadline=None)
@given(conversations())
def test_another_template_trains_each_answer_once_too(row):
    """Rows expanded for qwen3.jinja and trained with chatml.jinja, which trains every answer that it is not told to
    leave: the marks tell it."""
    row = row | {"messages": [{k: v for k, v in t.items() if k != "reasoning_content"} for t in row["messages"]]}
    rows, refused = expand(row, TEMPLATES / "qwen3.jinja")
    assert not refused
    assert trained(rows, TEMPLATES / "chatml.jinja") == trained([row], TEMPLATES / "chatml.jinja")


# -- every family, by its own oracle -----------------------------------------------------------------------------------
def linked(messages):
    """Each call with an id of its own and each reply with the id and name of its call: Mistral and Command A print or
    count them, Gemma 4 names the reply by them."""
    out, open_calls = [], []
    for turn in messages:
        calls = [call | {"id": f"call{len(out):02}{n:03}"} for n, call in enumerate(turn.get("tool_calls", []))]
        open_calls += calls
        turn = turn | ({"tool_calls": calls} if calls else {})
        if turn["role"] == "tool":
            call = open_calls.pop(0)
            turn = turn | {"tool_call_id": call["id"], "name": call["function"]["name"]}
        out.append(turn)
    return out


def shapes(family):
    """Conversations that a family may hold; its own oracle says which it refuses."""
    call, thought, brief = answer("", None, 1), answer("", "r", 1), {"role": "system", "content": "Be brief."}
    yield [user(), answer(), user("And?"), answer("So."), user("Well?"), answer("13")], None
    yield [brief, user(), answer(), user("And?"), answer("So.")], None
    yield [user(), answer("Yes.", "r"), user("And?"), answer("So."), user("Well?"), answer("13", "s")], None
    if family.tools:
        tools = [TOOL] if family.tool_list else None
        chain = [user(), call, REPLY, answer(), user("And?"), call, REPLY, call, REPLY, answer("So.")]
        yield linked(chain), tools
        yield linked([brief, *chain]), tools
        chain = [user(), thought, REPLY, answer("Yes.", "s"), user("And?"), thought, REPLY, answer("So.", "t")]
        yield linked(chain), tools
        if family.parallel:
            yield linked([user(), answer("", None, 2), REPLY, REPLY, answer(), user("And?"), answer("So.")]), tools


def oracle(family, messages, tools, **arguments):
    """({k: (prompt, what is trained of answer k)}, number of answers that the family has no place for)"""
    found, no_room = {}, 0
    for k in [k for k, turn in enumerate(messages) if turn["role"] == "assistant"]:
        try:
            parts = family.output(messages[: k + 1], **arguments)
            prompt = family.history(messages[:k], tools, **arguments) + family.prompt(messages[:k], **arguments)
        except OracleRefused:
            no_room += 1
            continue
        # StepTron's published mask trains the newline after the stop too
        found[k] = prompt, "".join(part for part, _ in parts) + (family.after if family.published else "")
    return found, no_room


def proven(family, messages, tools, **arguments):
    """(rows, Counter of what it cost), with everything asserted that holds in every family; None where none is left."""
    template = TEMPLATES / f"{family.name}.jinja"
    row = row_of(*messages, tools=tools, bos_token=family.bos, eos_token=family.eos, **arguments)
    pairs, no_room = oracle(family, messages, tools, **arguments)
    try:
        expansion = expand_turns.expand(row, rendering.Renderer(source(template)))
    except InvalidRow:
        assert not pairs
        return None
    rows = expansion.rows
    counts = expansion.counts
    wanted = Counter(pairs.values())
    assert trained(rows, template) == wanted and len(expansion.refused) == no_room
    assert counts["answers_after"] == len(pairs) and counts["answers"] == len(pairs) + no_room
    assert counts["trained_after"] == sum(len(said) for _, said in pairs.values())
    if not no_room:  # only where the template needs it, and told so
        as_it_stands = trained([row], template)
        assert (rows == [row]) == (as_it_stands == wanted)
        assert counts["answers_before"] == (as_it_stands & wanted).total()
        assert (counts["total_after"] > counts["total_before"]) == (len(rows) > 1)
    return rows, counts


@pytest.mark.parametrize("family", ALL_FAMILIES, ids=lambda family: family.name)
def test_every_family(family):
    """Every answer once, under its true prompt; a family is found here once it is in the oracle's list."""
    done = [proven(family, messages, tools) for messages, tools in shapes(family)]
    assert sum(one is not None for one in done) >= 1 + family.system + 2 * family.tools


def fitted(row, family):
    """(messages, tools) of a random row without what the family has no place for."""
    without = ["system"] * (not family.system) + ["tool"] * (not family.tools)
    asked = next(k for k, turn in enumerate(row["messages"]) if turn["role"] == "user")
    system = [turn for turn in row["messages"][:asked] if turn["role"] == "system"]  # no answer without a question
    turns = system + row["messages"][asked:]
    turns = [t for t in turns if t["role"] not in without and (family.tools or not t.get("tool_calls"))]
    if not family.reasoning:
        turns = [{k: v for k, v in turn.items() if k != "reasoning_content"} for turn in turns]
    if not family.parallel:
        turns = [turn | ({"tool_calls": [CALL]} if turn.get("tool_calls") else {}) for turn in turns]
        turns = [turn for n, turn in enumerate(turns) if turn["role"] != "tool" or turns[n - 1]["role"] != "tool"]
    if not family.text_before_calls:
        turns = [turn | ({"content": ""} if turn.get("tool_calls") else {}) for turn in turns]
    return linked(turns), row.get("tools") if family.tools and family.tool_list else None


@pytest.mark.parametrize("family", ALL_FAMILIES, ids=lambda family: family.name)
def test_every_family_on_random_conversations(family):
    names = ("enable_thinking", "preserve_thinking", "keep_thinking")
    switches = [name for name in names if name in family.arguments]
    compared = Counter()

    @settings(max_examples=25, deadline=None, derandomize=True, database=None)
    @given(conversations(), st.data())
    def run(row, data):
        arguments = {name: data.draw(st.sampled_from(family.arguments[name])) for name in switches}
        messages, tools = fitted(row, family)
        if proven(family, messages, tools, **arguments):
            compared.update(rows=1, longer=len(messages) > 3, calls=any(t.get("tool_calls") for t in messages))

    run()
    assert compared["rows"] >= 15 and compared["longer"] >= 8 and compared["calls"] >= 4 * family.tools, compared


def test_steptron_trains_less_than_its_expanded_rows():
    """Published: one row a conversation, of which the answers after the last user turn are trained whose own loss_mask
    is 1, a call without reasoning without its think block. Expanded, every answer that its own flag does not forbid."""
    family, template = next(f for f in ALL_FAMILIES if f.name == "step3_qwen3"), TEMPLATES / "step3_qwen3.jinja"
    messages = linked(
        [user(), answer("Yes.", "r"), user("And?"), answer("", None, 1), REPLY, answer("", "s", 1), REPLY, answer("So")]
    )
    messages[5]["loss_mask"] = 0
    row = row_of(*messages, tools=[TOOL])
    pairs = oracle(family, messages, [TOOL])[0]
    published = {said.removeprefix("<think>\n\n</think>\n\n") for k, (_, said) in pairs.items() if k == 3}
    published |= {said for k, (_, said) in pairs.items() if k == 7}
    assert {said for _, said in trained([row], template)} == published and len(published) == 2
    rows, refused = expand(row, template)
    assert trained(rows, template) == Counter(pair for k, pair in pairs.items() if k in (1, 3, 7)) and not refused


def test_rows_of_the_main_cases_by_hand():
    """Which rows come out, which messages they end with, and how they are marked."""

    def shape(row):
        rows, _ = expand(row, TEMPLATES / "qwen3.jinja")
        flags = [[turn.get("loss_mask") for turn in one["messages"] if turn["role"] == "assistant"] for one in rows]
        return [
            (len(one["messages"]) - 1, one["chat_template_kwargs"].get("train_turns"), marks)
            for one, marks in zip(rows, flags, strict=True)
        ]

    assert shape(TWO) == [(1, None, [None]), (3, "last", [None, None])]
    # a chain whose turns show their reasoning is one row, and so is each chain: two rows for four answers
    assert shape(CHAINS) == [(3, None, [None] * 2), (8, "flagged", [0, 0, 1, 1])]
    # the greeting is trained by the longest row; the shorter one must leave it alone
    assert shape(GREETING) == [(4, "flagged", [0, 1, 1]), (9, "flagged", [1, 0, 0, 1, 1])]
    short = row_of(answer("Welcome."), *TWO["messages"])
    assert shape(short) == [(2, "last", [None] * 2), (4, "flagged", [1, 0, 1])]
    # call turns without reasoning lose their empty think block once they are history
    bare = row_of(user(), answer("", None, 1), REPLY, answer("Yes."), tools=[TOOL])
    assert shape(bare) == [(1, None, [None]), (3, "last", [None] * 2)]


# -- what the row asks for --------------------------------------------------------------------------------------------
def test_flags_of_the_row_are_kept():
    """train_turns last and loss_mask 0 under flagged leave answers out, before and after."""
    last = TWO | {"chat_template_kwargs": {"train_turns": "last"}}
    assert expand(last, TEMPLATES / "qwen3.jinja")[0] == [last]
    turns = [dict(turn) for turn in CHAINS["messages"]]
    for k in (1, 8):
        turns[k]["loss_mask"] = 0
    flagged = CHAINS | {"messages": turns, "chat_template_kwargs": {"train_turns": "flagged"}}
    rows, _ = expand(flagged, TEMPLATES / "qwen3.jinja")
    pairs, _ = expected(CHAINS)
    wanted = Counter(pair for n, pair in enumerate(pairs) if n in (1, 2))  # messages 3 and 5
    assert trained(rows, TEMPLATES / "qwen3.jinja") == wanted
    whole = flagged | {"messages": [t | {"loss_mask": 0} if t["role"] == "assistant" else t for t in turns]}
    with pytest.raises(InvalidRow, match="no answer that its flags let train"):
        expand(whole, TEMPLATES / "qwen3.jinja")


@pytest.mark.parametrize("name", ["train_thinking", "train_tool_calls"])
def test_masked_parts_stay_masked(name):
    """A masked part is context in every row; the rest of each answer is trained once."""
    row = CHAINS | {"chat_template_kwargs": {name: "masked"}}
    rows, refused = expand(row, TEMPLATES / "qwen3.jinja")
    assert len(rows) == 2 and not refused
    said = Counter()
    for (_, text), count in trained(rows, TEMPLATES / "qwen3.jinja").items():
        said[text] += count
    if name == "train_thinking":
        cut = Counter(text.split("</think>\n\n")[1] for _, text in expected(row | {"chat_template_kwargs": {}})[0])
        assert said == cut
    else:
        assert said["<|im_end|>"] == 2 and sum("Sure." in text for text in said) == 1
        assert not any("<tool_call>" in text for text in said)


CLOSES = (  # as gpt-oss: an answer closes with <r>, as history with <e>; only the last one is trained
    "{% for m in messages %}{% if m.role == 'assistant' %}<a>"
    "{% if loop.last %}{% generation %}{{ m.content }}<r>{% endgeneration %}{% else %}{{ m.content }}<e>{% endif %}"
    "{% else %}<u>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
TRAINS_HISTORY = CLOSES.replace("{{ m.content }}<e>", "{% generation %}{{ m.content }}<e>{% endgeneration %}")


@pytest.mark.parametrize("close", ["<e>", "<r>"])
def test_history_that_is_not_trained(close):
    """Closed in another way, or the same text and still no span, as StepTron masks what precedes the last question."""
    row = row_of(user("1"), answer("one"), user("2"), answer("two"), user("3"), answer("three"))
    template = CLOSES.replace("<e>", close)
    rows, _ = expand(row, template)
    assert trained(rows, template) == Counter(
        {
            ("<u>1<a>", "one<r>"): 1,
            (f"<u>1<a>one{close}<u>2<a>", "two<r>"): 1,
            (f"<u>1<a>one{close}<u>2<a>two{close}<u>3<a>", "three<r>"): 1,
        }
    )


def test_an_empty_block_trains_nothing():
    empty = "{% generation %}{% endgeneration %}"
    template = CLOSES.replace("<u>{{ m.content }}", f"<u>{empty}{{{{ m.content }}}}").replace("<r>", f"<r>{empty}")
    assert template.count(empty) == 2 and expand(TWO, template) == expand(TWO, CLOSES)


@pytest.mark.parametrize("argument", ["train_turns", "loss_mask"])
def test_either_mark_will_do(argument):
    """A template that trains history in a form that nobody sends: marked with what it honours."""
    honours = {"train_turns": "train_turns == 'last'", "loss_mask": "m.loss_mask == 0"}[argument]
    tag = "{% generation %}{{ m.content }}<e>{% endgeneration %}"
    template = TRAINS_HISTORY.replace(tag, f"{{% if {honours} %}}{{{{ m.content }}}}<e>{{% else %}}{tag}{{% endif %}}")
    rows, _ = expand(TWO, template)
    found = trained(rows, template)
    assert found == Counter({("<u>Hi<a>", "Yo<r>"): 1, ("<u>Hi<a>Yo<e><u>Hm<a>", "So<r>"): 1})
    assert ("train_turns" in rows[1]["chat_template_kwargs"], "loss_mask" in rows[1]["messages"][1]) == {
        "train_turns": (True, False),
        "loss_mask": (True, True),
    }[argument]


# -- the command ------------------------------------------------------------------------------------------------------
def test_template_that_honours_no_mark_stops_it(tmp_path):
    (tmp_path / "t.jinja").write_text(TRAINS_HISTORY)
    rows = write(tmp_path / "rows.jsonl", [TWO])
    done = run(rows, "--chat_template_path", tmp_path / "t.jinja", "--out", tmp_path / "out.jsonl")
    assert done.returncode == 2 and "honours neither train_turns nor loss_mask" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "out.jsonl").exists()


def test_chatml_rows_byte_for_byte(demo, tmp_path):
    """The demo's rows and own ones: the file out is the file in, and the folder out has the hash of the folder in."""
    rows = [TWO, CHAINS | {"id": "b"}, GREETING | {"id": "c"}, *lines(demo / "rows" / "chat" / "test.jsonl")]
    for row in rows:
        row["messages"] = [{k: v for k, v in t.items() if k != "reasoning_content"} for t in row["messages"]]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(map(json_text.json_line, rows)), encoding="utf-8")
    report = writer.write_rows(tmp_path / "rows", "own", {"train": rows})
    for name in ("rows.jsonl", "rows"):
        out = tmp_path / f"out_{name}"
        done = run(tmp_path / name, "--chat_template_path", TEMPLATES / "chatml.jinja", "--out", out)
        assert done.returncode == 0 and "  0 rows were expanded" in done.stdout and len(rows) > 30
    assert (tmp_path / "out_rows.jsonl").read_bytes() == path.read_bytes()
    assert json.loads((tmp_path / "out_rows" / "report.json").read_text())["hash"] == report["hash"]


# 12 and 10 characters: <|im_start|>, <|im_end|>; 19: an empty think block; every text has 2
ONE = 12 + 5 + 2 + 10 + 1 + 12 + 10 + 19 + 2 + 10 + 1
LONG = ONE + (12 + 5 + 2 + 10 + 1) + (12 + 10 + 2 + 10 + 1)  # and a turn before it, without its think block
THINKS = 12 + 5 + 2 + 10 + 1 + 12 + 10 + (19 + 2) + 2 + 10 + 1


def test_cost_by_hand(tmp_path):
    rows = [
        row_of(user("Hi"), answer("Yo")),
        TWO | {"id": "b"},
        row_of(user("Hi"), answer("Yo", "ab")) | {"id": "c"},
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    done = run(path, "--chat_template_path", TEMPLATES / "qwen3.jinja", "--out", tmp_path / "out.jsonl")
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert (done.returncode, [row["id"] for row in lines(tmp_path / "out.jsonl")]) == (0, ["a", "b#1", "b#3", "c"])
    empty, full = 19 + 2 + 10, 19 + 2 + 2 + 10
    assert report["characters"] == {
        "total_before": ONE + LONG + THINKS,
        "total_after": ONE + ONE + LONG + THINKS,
        "trained_before": 2 * empty + full,
        "trained_after": 3 * empty + full,
    }
    assert report["answers"] == {"in": 4, "before": 3, "after": 4}
    assert (report["in"], report["out"], report["added"], report["rows_expanded"]) == (3, {"train": 4}, 1, 1)
    assert "4 rows kept of 3, 0 left out\n  1 rows were expanded\n" in done.stdout
    assert ["trained", "95", "126", "x1.33"] in [line.split() for line in done.stdout.splitlines()]


@pytest.mark.parametrize("name", ["qwen3", "gpt_oss", "mistral_nemo", "mistral_small_3_2", "step3_qwen3", "gemma4"])
def test_cost_in_tokens_is_what_the_trainer_counts(demo, tmp_path, name):
    rows = [TWO, CHAINS | {"id": "b"}, GREETING | {"id": "c"}]
    if name != "qwen3":
        family = next(family for family in ALL_FAMILIES if family.name == name)
        held = [shape for shape in shapes(family) if proven(family, *shape)]
        rows = [row_of(*turns, tools=tools, bos_token=family.bos, eos_token=family.eos) for turns, tools in held]
        rows = [row | {"id": str(number)} for number, row in enumerate(rows)]
    out, template = tmp_path / "out.jsonl", TEMPLATES / f"{name}.jinja"
    flags = ["--model_name_or_path", demo / "init", "--chat_template_path", template]
    assert run(write(tmp_path / "rows.jsonl", rows), *flags, "--out", out).returncode == 0
    report = json.loads((tmp_path / "out.report.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(demo / "init")

    def count(rows):
        done = [
            tokenizer.apply_chat_template(
                row["messages"],
                tools=row.get("tools"),
                chat_template=template.read_text(),
                return_dict=True,
                return_assistant_tokens_mask=True,
                **row["chat_template_kwargs"],
            )
            for row in rows
        ]
        return sum(len(one["input_ids"]) for one in done), sum(sum(one["assistant_masks"]) for one in done)

    counted = {"before": count(rows), "after": count(lines(out))}
    for n, name in enumerate(("total", "trained")):
        assert report["tokens"][f"{name}_before"] == counted["before"][n]
        assert report["tokens"][f"{name}_after"] == counted["after"][n]
    assert len(rows) > 2 and counted["before"][0] < counted["after"][0]


def test_a_token_across_the_edge_counts_as_trained():
    def tokenizer(text, **_):
        return {"offset_mapping": [(0, 2), (2, 5), (5, 6), (6, 8)]}

    for span, tokens in (((3, 5), 1), ((2, 5), 1), ((5, 7), 2), ((1, 3), 2)):
        rendered = rendering.Rendered("abcdefgh", [rendering.Span(*span)])
        assert expand_turns.measure(rendered, tokenizer) == (4, tokens)


def test_nothing_is_dropped_without_a_count(tmp_path):
    """in + added = out + refused rows, answers that no prompt has room for are named, ids are one of a kind."""
    no_room = row_of(user(), answer("Yes.", "r"), user(), answer(), enable_thinking=False)
    refused_last = row_of(user(), answer(), user(), answer("Yes.", "r"), enable_thinking=False)
    raw = [
        TWO,
        TWO,
        no_room | {"id": "n"},
        refused_last | {"id": "l"},
        row_of(user(), answer("Yes.", "r"), enable_thinking=False) | {"id": "none"},
        row_of(user()) | {"id": "silent"},
        row_of({"role": "usher", "content": "?"}, answer()) | {"id": "usher"},
        {"id": "text", "text": "plain"},
        {"messages": [user(), answer()], "extra": 7},
    ]
    path = write(tmp_path / "rows.jsonl", raw)
    path.write_text(path.read_text() + "{cut\n")
    for out in (tmp_path / "out.jsonl", tmp_path / "out"):
        done = run(path, "--chat_template_path", TEMPLATES / "qwen3.jinja", "--out", out)
        assert done.returncode == 0
        folder = out.is_dir()
        report = json.loads((out / "report.json" if folder else tmp_path / "out.report.json").read_text())
        rejected = lines(out / "rejected.jsonl" if folder else tmp_path / "out.rejected.jsonl")
        rows = load_from_disk(out)["train"].to_list() if folder else lines(out)
        assert report["in"] + report["added"] == sum(report["out"].values()) + sum(report["refused"].values())
        assert [(entry["line"], entry["id"], entry["reason"]) for entry in rejected] == [
            (3, "n#1", "template refuses the row"),
            (4, "l#3", "template refuses the row"),
            (5, "none", "template refuses the row"),
            (6, "silent", "no assistant turn"),
            (7, "usher", "template refuses the row"),
            (8, "text", "row without messages"),
            (10, "", "not JSON"),
        ]
        assert report["refused"] == dict(sorted(Counter(entry["reason"] for entry in rejected).items()))
        assert [row["id"] for row in rows] == ["a#1", "a#3", "a#1-2", "a#3-2", "n", "l#1", "rows-9"]
        assert trained(rows, TEMPLATES / "qwen3.jinja").total() == 7
        assert (report.get("keys_not_kept") == {"extra": 1}) == folder
        assert report["hash"] == row_keys.hash_of({"train": row_keys.content_hash(rows)})


def test_every_split_and_the_same_bytes(tmp_path):
    splits = {"train": [TWO, CHAINS | {"id": "b"}], "validation": [TWO | {"id": "v"}]}
    writer.write_rows(tmp_path / "in", "own", splits)
    flags = [tmp_path / "in", "--chat_template_path", TEMPLATES / "qwen3.jinja", "--out"]
    for name in ("one", "two"):
        assert run(*flags, tmp_path / name).returncode == 0
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    differ = [f for f in files if (tmp_path / "one" / f).read_bytes() != (tmp_path / "two" / f).read_bytes()]
    assert len(files) > 6 and [str(file) for file in differ] == ["card.md"]  # which names its folder
    saved = load_from_disk(tmp_path / "one")
    assert {name: saved[name]["id"] for name in saved} == {
        "train": ["a#1", "a#3", "b#3", "b#8"],
        "validation": ["v#1", "v#3"],
    }
    done = run(*flags, tmp_path / "one.jsonl")
    assert done.returncode == 2 and "validation" in done.stderr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"path": "none.jsonl"}, ["none.jsonl"]),
        ({"--chat_template_path": "none.jinja"}, ["none.jinja"]),
        ({"--chat_template_path": "plain.jinja"}, ["plain.jinja", "{% generation %}"]),
        ({"--chat_template_path": "broken.jinja"}, ["broken.jinja", "not a template"]),
        ({"--model_name_or_path": "no/such"}, ["no/such"]),
        ({"--out": "there"}, ["there", "exists already"]),
        ({"path": "empty.jsonl"}, ["empty.jsonl", "no rows"]),
        ({"path": "there"}, ["there", "save_to_disk"]),
        ({"--out": "rows.jsonl/out"}, ["rows.jsonl/out", "not written"]),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, change, words):
    monkeypatch.chdir(tmp_path)
    write(Path("rows.jsonl"), [TWO])
    Path("empty.jsonl").touch()
    Path("there").mkdir()
    Path("plain.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    Path("broken.jinja").write_text("{% for %}{% generation %}")
    flags = {"--chat_template_path": TEMPLATES / "qwen3.jinja", "--out": "out.jsonl"} | change
    path = flags.pop("path", "rows.jsonl")
    before = sorted(Path(".").rglob("*"))
    done = run(path, *[word for pair in flags.items() for word in pair])
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert sorted(Path(".").rglob("*")) == before


@pytest.mark.parametrize("out", ["out", "out.jsonl"])
def test_no_row_left_lists_the_refused(tmp_path, out):
    path = write(tmp_path / "rows.jsonl", [row_of(user()), row_of(user(), answer("Yes.", "r"), enable_thinking=False)])
    done = run(path, "--chat_template_path", TEMPLATES / "qwen3.jinja", "--out", tmp_path / out)
    assert done.returncode == 1 and "1 no assistant turn" in done.stderr and len(done.stderr.splitlines()) == 1
    rejected = tmp_path / "out" / "rejected.jsonl" if out == "out" else tmp_path / "out.rejected.jsonl"
    assert str(rejected) in done.stderr
    assert [(entry["line"], entry["reason"]) for entry in lines(rejected)] == [
        (1, "no assistant turn"),
        (2, "template refuses the row"),
    ]
    assert not (tmp_path / "out.jsonl").exists() and not (tmp_path / "out" / "train").exists()


# -- real data --------------------------------------------------------------------------------------------------------
@real
@pytest.mark.parametrize(
    ("file", "count"), [("chat/sharegpt_zh_1K_format.jsonl", 40), ("tools/glaive_toolcall_en_demo.json", 60)]
)
def test_shared_rows(tmp_path, file, count):
    raw = [row for _, row in readers.read_rows(SHARED / "data" / file) if len(row["conversations"]) < 20][:count]
    chats = tmp_path / "chats.jsonl"
    assert run("sharegpt", write(tmp_path / "raw.jsonl", raw), "--out", chats, script=normalize).returncode == 0
    tokenizer = SHARED / "tokenizers" / "qwen3"
    for name in ("qwen3", "chatml"):
        out = tmp_path / f"{name}.jsonl"
        flags = ["--chat_template_path", TEMPLATES / f"{name}.jinja", "--model_name_or_path", tokenizer, "--out", out]
        assert run(chats, *flags).returncode == 0
        report = json.loads(out.with_suffix(".report.json").read_text())
        answers = sum(turn["role"] == "assistant" for row in lines(chats) for turn in row["messages"])
        assert report["answers"]["in"] == report["answers"]["after"] == answers and not report["refused"]
        assert trained(lines(out), TEMPLATES / f"{name}.jinja").total() == answers
        if name == "chatml":
            assert out.read_bytes() == chats.read_bytes()
        else:
            assert report["tokens"]["total_after"] > report["tokens"]["total_before"]
            assert report["answers"]["before"] < answers
            every = sum((expected(row)[0] for row in lines(chats)), Counter())
            assert trained(lines(out), TEMPLATES / "qwen3.jinja") == every
