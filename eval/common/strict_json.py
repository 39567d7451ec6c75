"""Answers as JSON: strictly, by a schema, and field by field."""

import json
import re
from dataclasses import dataclass

from jsonschema import Draft202012Validator
from jsonschema.protocols import Validator
from jsonschema.validators import validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable


@dataclass
class JsonText:
    """What a text is as JSON. value: None too where it is none."""

    is_valid: bool
    value: object = None


def refuse_constant(name: str) -> None:
    raise ValueError(name)


def refuse_doubles(pairs: list[tuple[str, object]]) -> dict:
    """Return an object; raise ValueError where a key stands in it twice."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key twice")
    return value


def parse_strict_json(text: str) -> JsonText:
    """Return the value of a text that is one JSON value as RFC 8259 has it.

    No NaN or Infinity (which Python's parser takes), no key twice in an object, nothing around it.
    """
    try:
        value = json.loads(text, parse_constant=refuse_constant, object_pairs_hook=refuse_doubles)
    except (ValueError, RecursionError):
        return JsonText(False)
    return JsonText(True, value)


def strict_json(text: str) -> bool:
    """Return whether a text is one JSON value, see parse_strict_json."""
    return parse_strict_json(text).is_valid


def validator(schema: object) -> Validator:
    """Return a validator of a JSON schema, of the draft that it names (default 2020-12), which fetches nothing.

    Raises jsonschema's SchemaError.
    """
    kind = validator_for(schema, default=Draft202012Validator)
    kind.check_schema(schema)
    return kind(schema, registry=Registry())


def schema_valid(schema: object, text: str) -> bool:
    """Return whether a text is strict JSON and meets a JSON schema."""
    parsed = parse_strict_json(text)
    if not parsed.is_valid:
        return False
    try:
        return validator(schema).is_valid(parsed.value)
    except (Unresolvable, RecursionError):  # a $ref to nowhere or to itself: nothing meets it
        return False


def leaves(value: object) -> dict[tuple[str | int, ...], object]:
    """Return {path: value} of every field of a JSON value that holds no other: the paths of keys and places."""
    scalars = {}
    waiting: list[tuple[tuple[str | int, ...], object]] = [((), value)]
    while waiting:
        path, item = waiting.pop()
        if isinstance(item, dict):
            parts = list(item.items())
        elif isinstance(item, list):
            parts = list(enumerate(item))
        else:
            parts = []
        if not parts:
            scalars[path] = item
        for key, part in parts:
            waiting.append(((*path, key), part))
    return scalars


@dataclass
class FieldCounts:
    """Fields of a reference that an answer has with an equal value, fields of the reference, fields of the answer."""

    equal: int
    wanted: int
    given: int


def json_fields(reference: str, answer: str) -> FieldCounts:
    """Return the counts of two texts; an answer that is no strict JSON has no fields.

    1 equals 1.0, but not true or "1".
    """
    wanted = leaves(parse_strict_json(reference).value)
    parsed = parse_strict_json(answer)
    given = leaves(parsed.value) if parsed.is_valid else {}
    equal = 0
    for path, value in wanted.items():
        if path in given and given[path] == value and isinstance(given[path], bool) is isinstance(value, bool):
            equal += 1
    return FieldCounts(equal, len(wanted), len(given))


def offers_json(text: str) -> bool:
    """Return whether a text is a JSON object or list, alone or in a ``` fence; an object also where it is not valid."""
    parts = [text.strip()]
    fence = re.search(r"```\w*\n(.*?)(?:```|\Z)", text, re.DOTALL)
    if fence is not None:
        parts.append(fence[1].strip())
    return any([part.startswith("{") or isinstance(parse_strict_json(part).value, list) for part in parts])
