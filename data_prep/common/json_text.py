"""Read and write JSON text without changing a value."""

import json
import re

import numpy as np
import orjson

from .errors import InvalidRow


def refuse_constant(constant):
    raise ValueError(f"{constant} is not JSON")


LINE_ENDS = ((b"\xc2\x85", b"\\u0085"), (b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"))


LONG_NUMBER = re.compile(rb"\d{19}")  # orjson makes a float of a whole number over 64 bits, json keeps it


def dump_json(value):
    """A value as JSON bytes in UTF-8, readable as it is; only what str.splitlines takes for a line end is escaped.
    Raises InvalidRow where no file in UTF-8 can hold it."""
    try:
        data = orjson.dumps(value)
    except TypeError:  # half a surrogate pair, a number over 64 bits, nested over 254 deep, a key that is no string
        try:
            data = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
        except UnicodeEncodeError:
            raise InvalidRow("text that is not Unicode", "half a surrogate pair") from None
    if not data.isascii():
        for end, escaped in LINE_ENDS:
            if end in data:
                data = data.replace(end, escaped)
    return data


def json_line(row):
    """One line of JSON, as text."""
    return dump_json(row).decode() + "\n"


def load_json(line, long_numbers=True):
    """The value of a line of JSON (bytes). long_numbers: whether one may stand in it. Raises InvalidRow."""
    try:
        if not (long_numbers and LONG_NUMBER.search(line)):
            return orjson.loads(line)
    except ValueError:
        pass
    try:  # what orjson does not take or would change: slower, and its errors name the column
        return json.loads(line, parse_constant=refuse_constant)
    except UnicodeDecodeError:
        raise InvalidRow("not JSON", "not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise InvalidRow("not JSON", str(error)) from None


def refuse_half_pairs(row):
    """Refuse a row that no file in UTF-8 can hold."""
    dump_json(row)


def holds_long_number(data):
    """Whether 19 digits follow each other. Four neighbours of every fourth byte are digits then: the others need no
    pattern, which would take longer than the parser."""
    digits = np.frombuffer(data, np.uint8)[::4] - np.uint8(ord("0")) < 10
    places = 4 * np.flatnonzero(digits[:-3] & digits[1:-2] & digits[2:-1] & digits[3:])
    return any(LONG_NUMBER.search(data, max(0, place - 4), place + 24) for place in places.tolist())


def dump_json_lenient(entry):
    """An entry of rejected.jsonl as JSON bytes: a refused row may hold what no file in UTF-8 can."""
    try:
        return dump_json(entry)
    except InvalidRow:
        return json.dumps(entry).encode()
