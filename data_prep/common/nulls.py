"""Undo the nulls that Arrow fills into rows."""

import orjson
import pyarrow as pa


def drop_nulls(value):
    """A JSON value without the keys that are null."""
    if isinstance(value, dict):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None}
    return [drop_nulls(item) for item in value] if isinstance(value, list) else value


def tool_schemas(tools):
    """{name: parameters} of a list of tools, nothing where it is none."""
    functions = [tool.get("function", tool) for tool in tools if isinstance(tool, dict)] if tools else []
    return {f["name"]: f.get("parameters") for f in functions if isinstance(f, dict) and isinstance(f.get("name"), str)}


def drop_filled_nulls(arguments, schema, otherwise=lambda value: value):
    """A tool call's arguments without the nulls that Arrow filled in: those of names that the tool's schema does not
    know. A null that it knows stays. What a schema without properties cannot tell goes to `otherwise`."""
    schema = schema if isinstance(schema, dict) else {}
    if isinstance(arguments, list):
        return [drop_filled_nulls(item, schema.get("items"), otherwise) for item in arguments]
    known = schema.get("properties")
    if not isinstance(arguments, dict) or not isinstance(known, dict):
        return otherwise(arguments)
    return {key: drop_filled_nulls(value, known.get(key), otherwise) for key, value in arguments.items()
            if value is not None or key in known}  # fmt: skip


def rows_without_nulls(batch):
    """The rows of a RecordBatch without what Arrow filled in: a key that some other row has is null here, in structs
    of any depth (ms-swift PR 10125: such tool schemas reached a template). JSON columns are parsed."""
    names = {"messages", "tools", "chat_template_kwargs"} & {*batch.schema.names}
    as_json = {n for n in names if holds_json(batch.schema.field(n).type)}
    for row in batch.to_pylist():
        row = {
            key: json_values(value) if key in as_json else drop_nulls(value) if key == "tools" else value
            for key, value in row.items()
            if value is not None
        }
        tools = tool_schemas(row["tools"]) if isinstance(row.get("tools"), list) else {}
        yield {key: value if key in as_json else value_without_nulls(value, tools) for key, value in row.items()}


def value_without_nulls(value, tools):
    """A value without nulls, but for those of tool calls whose tool knows the argument. tools: {name: schema}."""
    if isinstance(value, list):
        return [value_without_nulls(item, tools) for item in value]
    if not isinstance(value, dict):
        return value
    known = tools.get(value.get("name")) if isinstance(value.get("arguments"), dict) else None
    return {
        key: drop_filled_nulls(item, known, drop_nulls)
        if known and key == "arguments"
        else value_without_nulls(item, tools)
        for key, item in value.items()
        if item is not None
    }


def holds_json(kind):
    return isinstance(kind.value_type if pa.types.is_list(kind) else kind, pa.JsonType)


def json_values(value):
    return [orjson.loads(item) for item in value] if isinstance(value, list) else orjson.loads(value)
