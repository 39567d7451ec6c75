"""Undo the nulls that Arrow fills into rows: a key that some other row has is null in this one, at any depth.

Such tool schemas reached a chat template elsewhere (ms-swift PR 10125). In JSON text nobody filled nulls in: there one
is a value, as the default of a parameter is.
"""

import json


def drop_nulls(value: object) -> object:
    """Return a JSON value without the keys that are null."""
    if isinstance(value, dict):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [drop_nulls(item) for item in value]
    return value


def tool_schemas(tools: object) -> dict[str, object]:
    """Return {name: JSON schema of the parameters} of a list of tools, or of its JSON text; {} where it is none."""
    schemas = {}
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            return schemas
    if not isinstance(tools, list):
        return schemas
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            schemas[function["name"]] = function.get("parameters")
    return schemas


def drop_filled_nulls(arguments: object, schema: object) -> object:
    """Return a tool call's arguments without the nulls that Arrow filled in: those of names that the schema lacks.

    A null of a name that it knows stays. Where the schema lists no properties, all nulls go.
    """
    if not isinstance(schema, dict):
        schema = {}
    if isinstance(arguments, list):
        return [drop_filled_nulls(item, schema.get("items")) for item in arguments]
    properties = schema.get("properties")
    if not isinstance(arguments, dict) or not isinstance(properties, dict):
        return drop_nulls(arguments)
    kept = {}
    for name, value in arguments.items():
        if value is not None or name in properties:
            kept[name] = drop_filled_nulls(value, properties.get(name))
    return kept


def drop_nulls_of_row(row: dict) -> dict:
    """Return a row as Arrow gives it without nulls, but for those of tool calls whose tool knows the argument."""
    row = {key: value for key, value in row.items() if value is not None}
    if "tools" in row:
        row["tools"] = drop_nulls(row["tools"])
    schemas = tool_schemas(row.get("tools"))
    return {key: drop_nulls_but_known(value, schemas) for key, value in row.items()}


def drop_nulls_but_known(value: object, schemas: dict[str, object]) -> object:
    """Return a value without nulls, but for those in arguments that the schema of the called tool knows."""
    if isinstance(value, list):
        return [drop_nulls_but_known(item, schemas) for item in value]
    if not isinstance(value, dict):
        return value
    schema = None
    if isinstance(value.get("name"), str) and isinstance(value.get("arguments"), dict):
        schema = schemas.get(value["name"])
    kept = {}
    for key, item in value.items():
        if item is None:
            continue
        if schema and key == "arguments":
            kept[key] = drop_filled_nulls(item, schema)
        else:
            kept[key] = drop_nulls_but_known(item, schemas)
    return kept
