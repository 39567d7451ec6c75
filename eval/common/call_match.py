"""BFCL's abstract-syntax check (ast_checker.py of bfcl-eval): are calls those of an answer?

A call is {name, arguments}; a function is BFCL's own {name, description, parameters}; an answer is {function:
{parameter: [allowed values]}}, and "" among the values says that the parameter may be left out.
"""

import re
from collections.abc import Sequence

TYPES = {
    "string": str,
    "integer": int,
    "float": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
    "any": str,
}


def mismatch(calls: Sequence[dict], functions: Sequence[dict], answers: Sequence[dict]) -> str:
    """Return why calls are none of the answers, one call an answer and in any order; "" where they are.

    A call is right if its function is the answer's, every required parameter and every one that may not be left out is
    there, none is there that function or answer does not know, and each value has the schema's type (a whole number is
    a float too; never the reverse) or else that of the allowed values, and is one of them. Strings are compared without
    case, blanks and the signs , . / - _ * ^, with ' as "; so are those directly in a list or in an object, whose keys
    hold lists of allowed values of their own; the order of a list counts.
    """
    if not calls and answers:
        return "no call"
    if len(calls) != len(answers):
        return "wrong number of calls"
    rest = list(calls)
    for answer in answers:
        [(name, allowed)] = answer.items()
        function = find_function(name, functions)
        reasons = [call_mismatch(call, function, allowed) for call in rest]
        if "" not in reasons:
            return reasons[0]
        del rest[reasons.index("")]
    return ""


def find_function(name: str, functions: Sequence[dict]) -> dict:
    """Return the first function of a name. Raises ValueError."""
    for function in functions:
        if function["name"] == name:
            return function
    raise ValueError(f"no function {name}")


def call_mismatch(call: dict, function: dict, allowed: dict[str, list]) -> str:
    """Return why a call is not the one of an answer, "" where it is."""
    given = call["arguments"]
    schema = function["parameters"]
    if call["name"] != function["name"]:
        return "wrong function"
    if set(schema.get("required", [])) - set(given):
        return "missing parameter"
    for name, value in given.items():
        if name not in schema["properties"] or name not in allowed:
            return "unknown parameter"
        reason = value_mismatch(value, schema["properties"][name], allowed[name])
        if reason:
            return reason
    if not may_be_left_out(allowed, given):
        return "missing parameter"
    return ""


def may_be_left_out(allowed: dict[str, list], given: dict) -> bool:
    """Return whether what is not given of an answer's parameters, or of an object's keys, need not be there."""
    return all(["" in values for name, values in allowed.items() if name not in given])


def value_mismatch(value: object, schema: dict, allowed: Sequence[object]) -> str:
    """Return why a value is none of the allowed ones, "" where it is. Raises KeyError for an unknown type."""
    kind = TYPES[schema["type"]]
    allowed_kind = type_of(allowed)
    if schema["type"] == "float" and type(value) is int:
        value = float(value)
    if type(value) not in (kind, allowed_kind):
        return "wrong type"
    if type(value) is not kind or allowed_kind not in (kind, None):
        # such as a variable's name where the schema wants a number: compared as it stands
        is_right = value in allowed
    elif kind is list:
        inner = TYPES[schema["items"]["type"]]
        if not has_items_of(inner, value, allowed):
            return "wrong type"
        is_right = is_list_of(inner, value, allowed)
    elif kind is dict:
        is_right = any([is_same_object(value, option) for option in allowed])
    else:
        is_right = standard(value) in standard_all(allowed)
    return "" if is_right else "wrong value"


def type_of(allowed: Sequence[object]) -> type | None:
    """Return the type of the allowed values, None where they only say that there need be none."""
    for option in allowed:
        if option != "":
            return type(option)
    return None


def has_items_of(inner: type, value: list, allowed: Sequence[object]) -> bool:
    """Return whether the items of a list have the type of the schema, or that of an allowed list's first items."""
    for option in allowed:
        if not isinstance(option, list):
            return True
        if all([type(item) in (inner, type_of(option)) for item in value]):
            return True
    return False


def is_list_of(inner: type, value: list, allowed: Sequence[object]) -> bool:
    """Return whether a list is one of the allowed ones, item by item."""
    if inner is not dict:
        return standard_all(value) in [standard_all(option) for option in allowed]
    for option in allowed:
        is_same = [is_same_object(*items) for items in zip(value, option, strict=False)]
        if len(value) == len(option) and all(is_same):
            return True
    return False


def is_same_object(value: dict, option: object) -> bool:
    """Return whether an object has the keys of another one, whose values are lists of allowed ones."""
    if not isinstance(option, dict) or set(value) - set(option):
        return False
    for key, item in value.items():
        if standard(item) not in standard_all(option[key]):
            return False
    return may_be_left_out(option, value)


def standard_all(values: Sequence[object]) -> list[object]:
    return [standard(value) for value in values]


def standard(value: object) -> object:
    """Return a string without what the comparison ignores, anything else as it is."""
    if not isinstance(value, str):
        return value
    return re.sub(r"[ ,./\-_*^]", "", value).lower().replace("'", '"')
