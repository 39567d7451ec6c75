"""Read and write JSON text without changing a value."""

import json
import math
from collections.abc import Callable

import orjson

from .errors import InvalidRow

LINE_ENDS = ((b"\xc2\x85", b"\\u0085"), (b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"))


def load_json(text: bytes | str) -> object:
    """Return the value of a JSON text; whole numbers of any size keep their digits, NaN and Infinity become floats.

    Raises InvalidRow where the text is no JSON.
    """
    try:
        return json.loads(text)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise InvalidRow("not UTF-8", f"byte 0x{byte:02x} at {error.start}: save the file as UTF-8") from None
    except RecursionError:
        raise InvalidRow("row nested too deep") from None
    except ValueError as error:
        raise InvalidRow("not JSON", str(error)) from None


def dump_json(value: object, default: Callable[[object], object] | None = None) -> bytes:
    """Return a value as JSON in UTF-8; of its text only what str.splitlines takes for a line end is escaped.

    default: what is written for a value that is no JSON.

    Raises InvalidRow where no file in UTF-8 can hold the value, TypeError where it is no JSON.
    """
    try:
        data = orjson.dumps(value, default)
    except TypeError:  # half a surrogate pair, a number over 64 bits, nested over 254 deep, a key that is no string
        try:
            data = json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=default).encode()
        except UnicodeEncodeError:
            raise InvalidRow("text that is not Unicode", "half a surrogate pair") from None
    if not data.isascii():
        for line_end, escaped in LINE_ENDS:
            data = data.replace(line_end, escaped)
    return data


def dump_json_lenient(value: object) -> bytes:
    """Return a value as JSON, in ASCII where it holds what no file in UTF-8 can; dates and the like become text."""
    try:
        return dump_json(value, default=str)
    except InvalidRow:
        return json.dumps(value, default=str).encode()


def json_line(row: object) -> str:
    """Return a value as one line of JSON."""
    return dump_json(row).decode() + "\n"


def check_numbers(value: object) -> None:
    """Raise InvalidRow where NaN or Infinity stands in a value: JSON has no such numbers, float64 no larger ones."""
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidRow("number that is not JSON", str(value))
    if isinstance(value, list):
        for item in value:
            check_numbers(item)
    elif isinstance(value, dict):
        for item in value.values():
            check_numbers(item)


def refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
