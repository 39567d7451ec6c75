"""data_prep/batches.py against the functions for one row, on random rows that hold what JSON escapes, every blank of
Unicode, composed and decomposed letters, control tokens and mojibake.

Broken once, seen red: a blank left out of WIDE; blanks not made one; no NFC; no stand-in for the escaped backslash;
other escapes allowed in PLAIN; switches not looked for; a system message allowed anywhere; ODD without the letters, or
without a mark; turns counted over all messages; tools, other arguments, or a last turn of the user's let pass; a batch
that begins within its file; modes by the wrong comparison; no null for tools, no comma between turns
or no bracket before them in what is hashed; each of template, tokenizer, languages and --fix left out of what looks at
every row; sound rows not counted.
"""

import sys
from pathlib import Path
from unittest import mock

import numpy as np
import orjson
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_prep import check
from data_prep.common import arrow_rows, batches, chunks, writer
from data_prep.common.errors import InvalidRow
from data_prep.common.row_keys import prompt_key, row_key
from data_prep.common.writer import encode_rows

REPO = Path(__file__).resolve().parents[1]

BLANKS = [c for c in map(chr, range(sys.maxunicode + 1)) if c.isspace()]
BITS = [*BLANKS, " ", "\n", "\\", '"', "/", "n", "t", "u0041", "\\n", "\x00", "\x01", "\x1f", "\x7f", "a", "é",
        "e\u0301", "\u0338", "<", "=", "ﬁ", "中", "ö", "Ã¶", "\ufffd", "<|im_end|>", "</think>", "<think>", "think>",
        "/think", "/no_think", "/no_thinking", "{", "}", "[", ",", ":", '","', '"}',
        "<start_of_turn>", "😀"]  # fmt: skip
texts = st.lists(st.sampled_from(BITS), min_size=0, max_size=6).map("".join)
SOUND = ["a", "b c", "\n", " ", "中", '"', "\\", "é", "/think", "<|x|>"]
sound_texts = st.lists(st.sampled_from(SOUND), min_size=1, max_size=6).map("".join)


@st.composite
def rows(draw):
    said = draw(st.sampled_from([texts, sound_texts]))
    count = draw(st.integers(1, 5))
    roles = ["system"] * draw(st.integers(0, 1)) + ["user", "assistant"] * 3
    roles = draw(
        st.sampled_from([roles[:count], roles[: 2 + 2 * (count // 2)], ["assistant", "user", "system"][:count]])
    )
    turns = [{"role": role, "content": draw(said)} for role in roles]
    if draw(st.integers(0, 9)) == 0:
        turns[-1] |= draw(st.sampled_from([{"reasoning_content": "so"}, {"loss_mask": 0}, {"name": 'x"}'}]))
    row = {"id": "1", "messages": turns}
    if draw(st.integers(0, 9)) == 0:
        row["tools"] = draw(st.sampled_from([[], [{"type": "function", "function": {"name": "f"}}]]))
    kwargs = draw(st.sampled_from([{}, {}, {"enable_thinking": True}, {"a": 1.0, "b": "é"}]))
    return row | {"chat_template_kwargs": kwargs, "source": "s", "tags": [], "lang": "en"}


def row_of(*contents):
    roles = ("user", "assistant") * 3
    turns = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    return {"id": "1", "messages": turns, "chat_template_kwargs": {}, "source": "s", "tags": [], "lang": "en"}


def test_the_blanks_are_those_of_python():
    wide = [c for c in BLANKS if ord(c) > 32]
    assert [c for c in map(chr, range(33, sys.maxunicode + 1)) if np.any([c in part for part in expanded()])] == wide


def expanded():
    start, _, end = batches.WIDE.partition("-")
    return [start, end, *map(chr, range(ord(start[-1]), ord(end[0]) + 1))]


@settings(max_examples=400, deadline=None)
@given(st.lists(rows(), min_size=1, max_size=8))
@example([row_of("a\n\u0338b", "c"), row_of("a \u0338b", "c")])  # n + U+0338 has no letter of its own, = has
@example([row_of("\\n", "c"), row_of("\n.", "c"), row_of("\\", '"'), row_of("=\u0338", "≠")])
@example([row_of("n\u0303", "a\n\u0303b"), row_of("ñ", "a \u0303b")])
@example([row_of("a", "b") | {"messages": [{"role": role, "content": "a"} for role in ("user", "system")]}])
@example([row_of("a /think", "b"), row_of("a", "b /think"), row_of("a /no_think b", "b")])
def test_as_row_by_row(made):
    """Slices too: a batch of a pool begins anywhere in its file."""
    batch = encode_rows([*made, *made]).data.slice(len(made) // 2, len(made))
    made = [*made, *made][len(made) // 2 :][: len(made)]
    mask, keys, prompts, turns = batches.keys(batch)
    chosen = [row for row, plain in zip(made, mask, strict=True) if plain]
    assert keys == [row_key(row) for row in chosen]
    assert prompts == [prompt_key(row) for row in chosen]
    assert [*turns] == [sum(turn["role"] in ("user", "assistant") for turn in row["messages"]) for row in chosen]
    assert not any("reasoning_content" in turn or "tools" in row for row in chosen for turn in row["messages"])
    against = check.against_of(None, None, None, None, (), told=False)
    for row, sound in zip(made, batches.sound(batch), strict=True):
        assert not sound or check.faults(row, against) == []


@pytest.mark.parametrize(
    ("contents", "plain"),
    [
        (("a", "b"), True),
        (('say "x" \\ y\tz', "1\n2", "ö", "中"), True),
        ((" a", "b"), False),  # its end may be stripped by nobody
        (("a\x00", "b"), False),
    ],
)
def test_which_rows_are_plain(contents, plain):
    """A mask that is always false would pass above."""
    batch = encode_rows([row_of(*contents)]).data
    assert batches.keys(batch)[0].tolist() == [plain]
    assert batches.sound(batch).tolist() == [plain and "ö" not in contents]


@settings(max_examples=150, deadline=None)
@given(st.lists(rows(), min_size=1, max_size=8))
@example([row_of("a", "b") | {"tools": [{"type": "function", "function": {"name": name}} for name in "fg"]}])
@example([row_of("a", "b"), row_of("a", "b") | {"messages": [{"role": "assistant", "content": "a",
                                                              "reasoning_content": "b"}]}])  # fmt: skip
def test_json_digests_and_counts_of_a_batch_are_those_of_its_rows(made):
    """orjson on each row, and what packed() says of rows, of a slice that begins within its batch."""
    made = [row | {"id": f"{number}\n"} for number, row in enumerate(made)]
    batch = encode_rows([*made, *made]).data.slice(len(made))
    keys = ("messages", "tools", "chat_template_kwargs", "source", "tags", "lang")
    whole = [{"id": row["id"]} | {key: row[key] for key in keys if key in row} for row in made]
    bodies = [orjson.loads(b"{" + body) for body in arrow_rows.row_bodies(batch)]
    assert bodies == [{key: value for key, value in row.items() if key != "id"} for row in whole]
    lines = arrow_rows.json_lines(batch).split(b"\n")
    assert lines.pop() == b"" and [orjson.loads(line) for line in lines] == whole
    assert arrow_rows.counts_of(batch) == encode_rows(made).counts
    assert writer.packed_batch(batch).digests == encode_rows(made).digests


@pytest.mark.parametrize("mark", ["<|x|>", "<｜x｜>", "<think>", "</tool_call>", "<tool_response>", "<end_of_turn>"])
def test_every_mark_is_left_to_the_check(mark):
    assert batches.sound(encode_rows([row_of("a", f"b {mark} c"), row_of("a", "b")]).data).tolist() == [False, True]


@pytest.mark.parametrize("given", ["template", "tokenizer", "lang"])
def test_what_needs_each_row_looks_at_each(given):
    """A batch of rows that are sound by themselves, checked against something that refuses every row."""

    class Against(check.against_of(None, None, None, None, (), told=False).__class__):
        def control_in(self, value):
            return "b" if self.tokenizer else None

        def render(self, row, messages, prompt=False):
            raise InvalidRow("template refuses the row")

    against = Against()
    setattr(against, given, ("zh",) if given == "lang" else "any")
    block = chunks.Chunk("train", "train", 1, encode_rows([row_of("a a", "b b")] * 3).data)
    with mock.patch("data_prep.check.against_of", lambda *_, **__: against):
        result = check.work(block, (), "x")
    assert result.total == 3 and len(result.rejected) == 3


def test_rows_that_nobody_looks_at_count_and_stay():
    """Sound rows are told by their batch alone; --fix writes them all the same."""
    block = chunks.Chunk(
        "train", "train", 1, encode_rows([row_of("a", "b"), row_of("a", "b <|x|>"), row_of("c", "d")]).data
    )
    for fix in (False, True):
        result = check.work(block, (None, None, None, None, ()), "x", fix, Path("out"))
        assert result.total == 3 and [entry["line"] for entry in result.rejected] == [2]
        assert {split: len(rows.ids) for split, rows in result.packed.items()} == ({"train": 2} if fix else {})


def test_arguments_that_another_writer_wrote():
    """The same JSON with a blank: only what dumps() wrote has the same key as text."""
    row = row_of("a", "b") | {"chat_template_kwargs": {"enable_thinking": True}}
    batch = encode_rows([row]).data
    told = pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"enable_thinking": true}'], pa.string()))
    assert batches.keys(batch)[0].tolist() == [True]
    assert batches.keys(batch.set_column(3, batch.schema.field(3), told))[0].tolist() == [False]


def test_equal_but_for_blanks_and_composition():
    """Hand-made pairs: the same key for the first two, another for the third."""
    same = [
        row_of("caf\u00e9 au  lait", "a\n\nb"),
        row_of("cafe\u0301\u3000au lait", "a b"),
        row_of("cafe au lait", "a b"),
    ]
    _, keys, prompts, _ = batches.keys(encode_rows(same).data)
    assert keys[0] == keys[1] != keys[2] and prompts[0] == prompts[1] != prompts[2]
