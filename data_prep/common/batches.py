"""What check.py and mix.py ask of a row, asked of a whole RecordBatch by Arrow's kernels. For plain rows: text of
system, user and assistant and nothing else, as in most sets. Three to four times as fast as a row at a time, with the
same answers (tests/test_batches.py); what is not plain is left to the functions for one row.

No script.
"""

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from .json_text import dump_json
from .rows import MARKS

WIDE = "\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # blanks of str.split that JSON writes as they are
EDGE = rf'(?:[^"\\ {WIDE}]|\\["\\])'  # what a text may begin and end with
PLAIN = rf'^\{{"role":"(?:system|user|assistant)","content":"{EDGE}(?:(?:[^"\\]|\\["\\nrt])*{EDGE})?"\}}$'
BLANKS = rf" *(?:\\[nrt]|[{WIDE}])(?:\\[nrt]|[ {WIDE}])*|  +"  # more than one blank, or another one
ODD = "|".join([*(mark.replace("|", r"\|") for mark in MARKS), "[\x80-\u05ff\ufffd]"])  # may be a finding of check.py
SWITCHES = "/think|/no_think"


class Plain:
    """The plain rows of a RecordBatch in pool.SCHEMA. rows: a mask (rows,); texts: all messages as JSON, in order;
    starts, ends: (rows,) where those of a row lie in it; system, user, assistant: masks (messages,)."""

    def __init__(self, batch):
        messages = batch.column(1)
        offsets = np.asarray(messages.offsets)
        self.texts = messages.flatten().storage
        self.starts, self.ends = offsets[:-1] - offsets[0], offsets[1:] - offsets[0]
        self.system, self.user, self.assistant = (
            matched(pc.starts_with(self.texts, f'{{"role":"{role}"')) for role in ("system", "user", "assistant")
        )
        plain = matched(pc.match_substring_regex(self.texts, PLAIN))
        self.rows = self.none(~plain) & (self.ends > self.starts) & ~np.asarray(batch.column(2).is_valid())

    def none(self, mask):
        """(rows,): whether no message of a row is in a mask (messages,)."""
        seen = np.concatenate([[0], np.cumsum(mask)])
        return seen[self.ends] == seen[self.starts]

    def join(self, texts, mask=None):
        """(rows,) binary: the texts (of the messages in the mask) of a row with commas between."""
        ends = np.concatenate([[0], np.cumsum(np.ones(len(texts), int) if mask is None else mask)])
        texts = texts if mask is None else texts.filter(pa.array(mask))
        offsets = np.concatenate([ends[self.starts], ends[self.ends[-1:]]]).astype("i4")
        return pc.binary_join(pa.ListArray.from_arrays(pa.array(offsets), texts.cast(pa.binary())), b",")


def matched(array):
    return np.asarray(array.fill_null(False))


def sound(batch):
    """(rows,): which rows check.py finds nothing in, for certain, where it has neither template nor tokenizer nor
    languages to check against."""
    plain = Plain(batch)
    odd = matched(pc.match_substring_regex(plain.texts, ODD))
    first = np.zeros(len(odd), bool)
    first[plain.starts[plain.starts < len(first)]] = True
    count = plain.ends - plain.starts
    begins = plain.starts + (plain.system & first)[np.minimum(plain.starts, len(first) - 1)]  # behind a system message
    place = np.arange(len(odd)) - np.repeat(begins, count)
    turns = np.where(place < 0, plain.system, np.where(place % 2, plain.assistant, plain.user))
    even = (plain.ends - begins) % 2 == 0
    return plain.rows & plain.none(odd | ~turns) & even & (plain.ends > begins)


def keys(batch):
    """(mask (rows,), keys, prompts, turns): rows.key_of, rows.prompt_of and the number of user and assistant messages
    of the rows in the mask."""
    plain = Plain(batch)
    kwargs = batch.column(3).storage.dictionary_encode()
    usual = np.array(
        [dump_json(orjson.loads(value)).decode() == value for value in kwargs.dictionary.to_pylist()], bool
    )
    switched = matched(pc.match_substring_regex(plain.texts, SWITCHES)) & ~plain.assistant
    mask = plain.rows & plain.none(switched) & usual[np.asarray(kwargs.indices)]
    texts = pc.replace_substring(plain.texts, "\\\\", "\x01")  # a character that JSON escapes: no text holds it
    texts = pc.replace_substring_regex(texts, BLANKS, " ")
    if not pc.all(pc.string_is_ascii(texts)).as_py():
        texts = pc.utf8_normalize(texts, "NFC")
    texts = pc.replace_substring(texts, "\x01", "\\\\")
    said, told = plain.join(texts), kwargs.dictionary.cast(pa.binary()).take(kwargs.indices)
    whole = pc.binary_join_element_wise(b"[[", said, b"],null,", told, b"]", b"").filter(pa.array(mask))
    asked = pc.binary_join_element_wise(b"[", plain.join(texts, ~plain.assistant), b"]", b"").filter(pa.array(mask))
    turns = np.concatenate([[0], np.cumsum(plain.user | plain.assistant)])
    return (
        mask,
        [xxhash.xxh3_128_digest(one) for one in whole.to_pylist()],
        [xxhash.xxh3_64_intdigest(one) for one in asked.to_pylist()],
        (turns[plain.ends] - turns[plain.starts])[mask],
    )
