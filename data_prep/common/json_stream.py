"""Read JSON values one after the other from a file that holds them in an array, an object or without line ends."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from .errors import InvalidRow, UsageError

BLANKS = re.compile(r"[ \t\r\n]*")
TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"|["\[\]{},]', re.DOTALL)  # whole strings, and what stands outside of them
WRAPPERS = ("data", "rows", "examples", "instances", "items", "samples", "records", "dataset", "entries")
WRAPPERS += ("train", "validation", "valid", "dev", "test", "eval")
TURN_KEYS = {"messages", "conversations", "conversation"}  # of a row
LINES_SUFFIXES = {".jsonl", ".ndjson"}


class ValueReader:
    """Reads JSON values from pieces of text, in which bytes that are no UTF-8 stand as surrogates."""

    def __init__(self, pieces: Iterator[str], path: Path) -> None:
        self.pieces = pieces
        self.path = path
        self.decoder = json.JSONDecoder()
        self.text = ""
        self.position = 0
        self.lines_before = 0  # line ends in the text that was dropped

    def read_more(self) -> bool:
        """Read at least as much again as is left, so that a long value is not parsed too often; False at the end."""
        self.lines_before += self.text.count("\n", 0, self.position)
        left = self.text[self.position :]
        new = []
        size = 0
        for piece in self.pieces:
            new.append(piece)
            size += len(piece)
            if size >= len(left):
                break
        self.text = left + "".join(new)
        self.position = 0
        return bool(new)

    def next_char(self) -> str:
        """Return the next character that is no blank, "" at the end."""
        while True:
            self.position = BLANKS.match(self.text, self.position).end()
            if self.position < len(self.text):
                return self.text[self.position]
            if not self.read_more():
                return ""

    def read_value(self) -> object:
        """Return the value that begins at the next character, an InvalidRow where it is whole and no JSON.

        Raises UsageError where the file ends within it.
        """
        self.next_char()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.position)
                message = ""
            except (ValueError, RecursionError) as error:  # also a number of too many digits
                message = getattr(error, "msg", str(error))
                value = InvalidRow("not JSON", message)
                end = self.find_end()
            whole = end is not None and end < len(self.text)  # a number may go on in the next piece
            if whole or not self.read_more():
                break
        if end is None:
            raise self.fault(message or "it ends too early", len(self.text.rstrip()))
        if end == self.position:
            raise self.fault(f"{self.text[end]} where a value is expected", end)
        text = self.text[self.position : end]
        self.position = end
        if not text.isascii() and not is_unicode(text):
            return InvalidRow("not UTF-8", "save the file as UTF-8, as with iconv -f ENCODING -t UTF-8")
        return value

    def find_end(self) -> int | None:
        """Return where a value that cannot be parsed ends by its brackets; None where that is not in the text."""
        depth = 0
        for match in TOKENS.finditer(self.text, self.position):
            token = match[0]
            if token in ("[", "{"):
                depth += 1
            elif token in ("]", "}", ",") and depth == 0:
                return match.start()
            elif token in ("]", "}"):
                depth -= 1
                if depth == 0:
                    return match.end()
            elif token == '"':
                return None  # a string that does not end
        return None

    def fault(self, message: str, position: int) -> UsageError:
        line = self.lines_before + self.text.count("\n", 0, position) + 1
        return UsageError(f"{self.path}:{line}: not JSON ({message}): mend it or pass JSON lines")


def is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_array(pieces: Iterator[str], path: Path) -> Iterator[object]:
    """Yield the elements of one JSON array. Raises UsageError."""
    reader = ValueReader(pieces, path)
    reader.next_char()
    reader.position += 1
    if reader.next_char() == "]":
        reader.position += 1
    else:
        separator = ","
        while separator == ",":
            yield reader.read_value()
            separator = reader.next_char()
            if separator not in (",", "]"):
                raise reader.fault("a comma or ] is missing behind an element", reader.position)
            reader.position += 1
    if reader.next_char():
        raise reader.fault("text behind the array", reader.position)


def read_documents(pieces: Iterator[str], path: Path) -> Iterator[object]:
    """Yield JSON objects that follow each other; of an object that stands alone the rows that it holds."""
    reader = ValueReader(pieces, path)
    first = reader.read_value()
    if not reader.next_char():
        if LINES_SUFFIXES.isdisjoint(path.suffixes):
            yield from unwrap(first, path)
        else:
            yield first  # a line of its own
        return
    yield first
    while reader.next_char():
        yield reader.read_value()


def unwrap(value: object, path: Path) -> Iterator[object]:
    """Yield the rows of an object: a list in it that is named like one, its columns, or the object itself.

    Raises UsageError where it holds several such lists.
    """
    if not isinstance(value, dict) or not TURN_KEYS.isdisjoint(value):
        yield value
        return
    lists = [name for name, rows in value.items() if name in WRAPPERS and holds_objects(rows)]
    if len(lists) > 1:
        raise UsageError(f"{path}: several lists of rows ({', '.join(lists)}): save each as a file of its own")
    if lists:
        for row in value[lists[0]]:
            inner = row.get("row")  # the hub's viewer wraps each once more
            yield inner if isinstance(inner, dict) else row
        return
    if holds_columns(value):
        for cells in zip(*value.values(), strict=True):
            yield dict(zip(value, cells, strict=True))
        return
    yield value


def holds_objects(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def holds_columns(value: dict) -> bool:
    """Return whether an object holds a row a place: lists of one length, none of them a conversation."""
    columns = list(value.values())
    if len(columns) < 2 or not all(isinstance(column, list) for column in columns):
        return False
    if len({len(column) for column in columns}) != 1:
        return False
    return not any(
        isinstance(cell, dict) and ("role" in cell or "from" in cell) for column in columns for cell in column
    )
