"""Find the values that `datasets` changes when a recipe loads a file: none, as long as recipes load as they do.

Left to itself it guesses a type for every key: 1 beside 0.5 becomes 1.0, a date that every row has a timestamp, the
text "7" beside an object the number 7, 0.7 becomes 0.7000000000000001. In Arrow files, whose types are written, only
JSON text is read anew.
"""

import re
from pathlib import Path

from .errors import UsageError
from .nulls import drop_nulls
from .readers import is_dataset_folder
from .recipe_rows import load_sets
from .rows import get_tools

JSON_FILES = (".jsonl", ".json")
COLUMNS = ("messages", "tools", "chat_template_kwargs")
DATE = re.compile(r"\d{4}-\d\d-\d\d")
DATE_LENGTH = 40  # no timestamp is longer
READS_AS_JSON = re.compile(r'\s*(?:[-\d"\[{]|true|false|null|NaN|Infinity)')
INT64 = range(-(2**63), 2**63)
ABSENT = object()


def can_be_loaded(path: Path | str) -> bool:
    """Return whether recipes load a path as it is: not what is packed, not stdin and not the hub's."""
    return isinstance(path, Path) and (path.suffix in (*JSON_FILES, ".parquet") or is_dataset_folder(path))


def may_change(row: object, is_json: bool) -> bool:
    """Return whether a value of a row may change, so that it is worth loading the file. is_json: the file is JSON.

    Text is kept but for dates and, in calls, tools and template arguments, for what reads as JSON.
    """
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
        return False
    for turn in row["messages"]:
        if not isinstance(turn, dict):
            return False
        for value in turn.values():
            if isinstance(value, str):
                if is_json and len(value) < DATE_LENGTH and DATE.match(value):
                    return True
            elif value is not None and is_fragile(value, is_json):
                return True
    tools = row.get("tools")
    if isinstance(tools, str):  # the same list, whether it is read as text or as JSON
        tools = None
    return is_fragile(tools, is_json) or is_fragile(row.get("chat_template_kwargs"), is_json)


def is_fragile(value: object, is_json: bool) -> bool:
    if isinstance(value, dict):
        return any([is_fragile(item, is_json) for item in value.values()])
    if isinstance(value, list):
        return any([is_fragile(item, is_json) for item in value])
    if isinstance(value, str):
        return is_json and READS_AS_JSON.match(value) is not None
    if isinstance(value, bool) or value is None:
        return False
    if isinstance(value, int):
        return is_json or value not in INT64
    return True


class Loader:
    """The rows of a file or folder as recipes load them; they are loaded when the first is asked for.

    failure: one sentence where they cannot be, else "".
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_json = path.suffix in JSON_FILES
        self.sets = None
        self.failure = ""

    def find_change(self, split: str, position: int, row: dict) -> str:
        """Return where the loader changes the row at a position of a split, with both values; "" where it does not."""
        if self.failure:
            return ""
        try:
            if self.sets is None:
                self.sets = load_sets(self.path)
            rows = self.sets[split] if isinstance(self.sets, dict) else self.sets
            loaded = rows[position]
        except UsageError as error:
            self.failure = str(error)
            return ""
        except (KeyError, IndexError):
            self.failure = f"{self.path}: datasets reads fewer rows than stand there: pass JSON lines"
            return ""
        for name in COLUMNS:
            change = compare(self.read_column(row, name), self.read_column(loaded, name), name)
            if change:
                return change
        return ""

    def read_column(self, row: dict, name: str) -> object:
        """Return a column without the nulls that mean nothing: in Arrow all, in JSON those that no template sees."""
        value = get_tools(row) if name == "tools" else row.get(name)
        if not value:
            return None  # an empty list or object is as good as none
        if not self.is_json:
            return drop_nulls(value)
        if name == "messages":
            return [{key: item for key, item in turn.items() if item is not None} for turn in value]
        return value


def compare(value: object, loaded: object, place: str) -> str:
    """Return where a loaded value differs from that of the file, with both; "" where it does not. 1 and 1.0 differ."""
    if isinstance(value, dict) and isinstance(loaded, dict):
        for key in {**value, **loaded}:
            change = compare(value.get(key, ABSENT), loaded.get(key, ABSENT), f"{place}.{key}")
            if change:
                return change
        return ""
    if isinstance(value, list) and isinstance(loaded, list) and len(value) == len(loaded):
        for number, (item, loaded_item) in enumerate(zip(value, loaded, strict=True)):
            change = compare(item, loaded_item, f"{place}.{number}")
            if change:
                return change
        return ""
    if type(value) is type(loaded) and value == loaded:
        return ""
    return f"{place}: {show(value)} in the file, {show(loaded)} as it is loaded"


def show(value: object) -> str:
    if value is ABSENT:
        return "nothing"
    return repr(value)[:80]
