"""Rows in Arrow."""

import json
from collections import Counter
from functools import lru_cache

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from .json_text import dump_json
from .rows import COLUMNS


def batch_rows(batch):
    """The rows of a RecordBatch in SCHEMA: three times as fast as Arrow's to_pylist, and nothing is filled in there."""
    for row_id, messages, tools, kwargs, source, tags, lang in zip(*plain_columns(batch), strict=True):
        row = {"id": row_id, "messages": orjson.loads(f"[{','.join(messages)}]")}
        if tools is not None:
            row["tools"] = orjson.loads(f"[{','.join(tools)}]")
        row["chat_template_kwargs"] = {} if kwargs == "{}" else orjson.loads(kwargs)
        yield row | {"source": source, "tags": tags, "lang": lang}


def plain_columns(batch):
    """The columns of a RecordBatch in SCHEMA as lists, JSON as text."""
    return [(c.storage if isinstance(c, pa.ExtensionArray) else c).to_pylist() for c in batch.columns]


def told_lines(ids, told):
    """JSON lines (bytes) of rows' ids and bodies."""
    return b"".join(
        [b'{"id":' + dump_json(row_id) + b"," + body + b"\n" for row_id, body in zip(ids, told, strict=True)]
    )


KEPT, TOLD = {*COLUMNS}, ("source", "tags", "lang")


def body_of(messages, tools, kwargs, source, tags, lang):
    """A row as dumped() writes it without its id and first brace, of messages, tools and kwargs that are JSON."""
    said = b"" if tools is None else b'"tools":[' + b",".join(tools) + b"],"
    head = b'"messages":[' + b",".join(messages) + b"]," + said + b'"chat_template_kwargs":' + kwargs + b","
    return head + tail_of(source, tuple(tags), lang)


@lru_cache(maxsize=1000)
def tail_of(source, tags, lang):
    """The end of a row as dumped() writes it: few sets have many."""
    return dump_json({"source": source, "tags": tags, "lang": lang})[1:]


FEATURES = {  # as datasets writes Features: messages, tools and template arguments are JSON to Arrow, so no row is
    # filled with the null columns of another
    "id": {"dtype": "string", "_type": "Value"},
    "messages": {"feature": {"_type": "Json"}, "_type": "List"},
    "tools": {"feature": {"_type": "Json"}, "_type": "List"},
    "chat_template_kwargs": {"_type": "Json"},
    "source": {"dtype": "string", "_type": "Value"},
    "tags": {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"},
    "lang": {"dtype": "string", "_type": "Value"},
}


def schema_of(features):
    """The Arrow schema that datasets gives these features; datasets itself takes two seconds to import."""

    def kind(feature):
        if feature["_type"] == "List":
            return pa.list_(kind(feature["feature"]))
        return pa.json_() if feature["_type"] == "Json" else getattr(pa, feature["dtype"])()

    told = json.dumps({"info": {"features": features}})
    return pa.schema([(name, kind(feature)) for name, feature in features.items()], {"huggingface": told})


SCHEMA = schema_of(FEATURES)


def record_batch(ids, messages, tools, kwargs, sources, tags, langs):
    """A RecordBatch of columns whose JSON is bytes already."""
    columns = [
        pa.array(ids, pa.string()),
        pa.ListArray.from_arrays(offsets(messages), json_array([turn for turns in messages for turn in turns])),
        pa.ListArray.from_arrays(
            offsets([one or () for one in tools], [one is None for one in tools]),
            json_array([tool for one in tools for tool in one or ()]),
        ),
        json_array(kwargs),
        pa.array(sources, pa.string()),
        pa.array(tags, pa.list_(pa.string())),
        pa.array(langs, pa.string()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def json_array(values):
    """JSON (bytes) as Arrow's column: joined, which takes a tenth of the time of pa.array."""
    ends = np.cumsum([0, *map(len, values)], dtype=np.int32)
    text = pa.StringArray.from_buffers(len(values), pa.py_buffer(ends), pa.py_buffer(b"".join(values)))
    return pa.ExtensionArray.from_storage(pa.json_(), text)


def offsets(lists, null=None):
    """Where lists begin and end in their chain, for ListArray; null where the list is."""
    ends, end = [0], 0
    for one in lists:
        end += len(one)
        ends.append(end)
    if null:
        ends[:-1] = [None if missing else start for start, missing in zip(ends, null, strict=False)]
    return pa.array(ends, pa.int32())


def row_bodies(batch):
    """The JSON of every row of a RecordBatch in SCHEMA without its id and first brace, in bytes: `"messages":[…],…}`,
    joined from what is JSON there already."""
    messages, tools = (join_lists(batch.column(name)) for name in ("messages", "tools"))
    said = pc.binary_join_element_wise(b'"tools":[', tools, b"],", b"").fill_null(b"")
    kwargs = batch.column("chat_template_kwargs").storage.cast(pa.binary())
    columns = zip(*(batch.column(name).to_pylist() for name in ("source", "tags", "lang")), strict=True)
    ends = pa.array([tail_of(source, tuple(tags), lang) for source, tags, lang in columns], pa.binary())
    parts = b'"messages":[', messages, b"],", said, b'"chat_template_kwargs":', kwargs, b",", ends
    return pc.binary_join_element_wise(*parts, b"").to_pylist()


def join_lists(column):
    """(rows,) binary: the JSON texts of each list with commas between, null where there is no list."""
    texts, offsets = column.flatten().storage.cast(pa.binary()), np.asarray(column.offsets)
    lists = pa.ListArray.from_arrays(pa.array(offsets - offsets[0]), texts)
    return pc.if_else(column.is_valid(), pc.binary_join(lists, b","), None)


def json_lines(batch, told=None):
    """JSON lines (bytes) of a RecordBatch in SCHEMA. told: its bodies, where they are at hand."""
    return told_lines(batch.column(0).to_pylist(), told or row_bodies(batch))


def counts_of(batch):
    """Rows of a RecordBatch by (source, lang, mode)."""
    column = batch.column("messages")
    found, offsets = pc.match_substring(column.flatten().storage, '"reasoning_content"'), np.asarray(column.offsets)
    seen = np.concatenate([[0], np.cumsum(np.asarray(found))])[offsets - offsets[0]]
    modes = ["think" if think else "no_think" for think in seen[1:] > seen[:-1]]
    return Counter(zip(batch.column("source").to_pylist(), batch.column("lang").to_pylist(), modes, strict=True))
