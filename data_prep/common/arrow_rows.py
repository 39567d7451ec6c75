"""Rows in Arrow: messages, tools and template arguments as JSON text, so that no row is filled with another's keys."""

import json
from collections.abc import Iterator

import pyarrow as pa

from .json_text import dump_json
from .nulls import drop_nulls_of_row
from .rows import Row

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("messages", pa.list_(pa.json_())),
        ("tools", pa.list_(pa.json_())),
        ("chat_template_kwargs", pa.json_()),
        ("source", pa.string()),
        ("tags", pa.list_(pa.string())),
        ("lang", pa.string()),
    ]
)


def rows_to_batch(rows: list[Row]) -> pa.RecordBatch:
    """Return rows as a RecordBatch in SCHEMA. Raises InvalidRow, TypeError, RecursionError where one is no JSON."""
    columns = {
        "id": [row["id"] for row in rows],
        "messages": [[dump_json(turn) for turn in row["messages"]] for row in rows],
        "tools": [dump_tools(row.get("tools")) for row in rows],
        "chat_template_kwargs": [dump_json(row["chat_template_kwargs"]) for row in rows],
        "source": [row["source"] for row in rows],
        "tags": [row["tags"] for row in rows],
        "lang": [row["lang"] for row in rows],
    }
    arrays = []
    for field in SCHEMA:
        arrays.append(pa.array(columns[field.name], storage_type(field.type)).cast(field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


def dump_tools(tools: list[dict] | None) -> list[bytes] | None:
    if tools is None:
        return None
    return [dump_json(tool) for tool in tools]


def storage_type(kind: pa.DataType) -> pa.DataType:
    """Return the type under which Arrow stores one: text for JSON, in lists too."""
    if pa.types.is_list(kind):
        return pa.list_(storage_type(kind.value_type))
    if isinstance(kind, pa.JsonType):
        return pa.string()
    return kind


def is_json(kind: pa.DataType) -> bool:
    """Return whether an Arrow type is JSON, or lists of it."""
    return isinstance(kind.value_type if pa.types.is_list(kind) else kind, pa.JsonType)


def batch_to_rows(batch: pa.RecordBatch) -> Iterator[dict]:
    """Yield the rows of a RecordBatch of any schema: JSON columns parsed, what Arrow filled into the others undone."""
    names = batch.schema.names
    columns = [column_values(column) for column in batch.columns]
    all_json = batch.schema.equals(SCHEMA)
    for values in zip(*columns, strict=True):
        row = dict(zip(names, values, strict=True))
        if all_json:
            if row["tools"] is None:
                del row["tools"]
            yield row
        else:
            yield undo_nulls(row, batch.schema)


def undo_nulls(row: dict, schema: pa.Schema) -> dict:
    """Return a row without the nulls that Arrow filled in; JSON columns hold none."""
    as_json = {}
    for name, value in row.items():
        if value is not None and is_json(schema.field(name).type):
            as_json[name] = value
    undone = drop_nulls_of_row(row)
    return {name: as_json.get(name, value) for name, value in undone.items()}


def column_values(column: pa.Array) -> list:
    """Return the values of a column, JSON parsed."""
    if not is_json(column.type):
        return column.to_pylist()
    texts = column.cast(storage_type(column.type)).to_pylist()
    if pa.types.is_list(column.type):
        # one call of the parser a list: three times as fast as one a message
        return [None if items is None else json.loads(f"[{','.join(items)}]") for items in texts]
    return [parse_value(text) for text in texts]


def parse_value(text: str | None) -> object:
    """Return the value of a JSON text; None where Arrow has none."""
    if text is None:
        return None
    if text == "{}":  # of most rows: a seventh of the reading
        return {}
    return json.loads(text)
