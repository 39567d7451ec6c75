"""Tell by its first rows of which published shape a file is."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..errors import UsageError
from ..media import MEDIA
from . import SOURCES, Source
from .chats import FLAT, TURN_COLUMNS, first_turn

PROMPT_NAMES = ("prompt", "question", "query", "instruction", "input", "problem", "user", "human")
ANSWER_NAMES = ("answer", "response", "output", "completion", "reply", "solution", "assistant", "bot")
SYSTEM_NAMES = ("system", "system_prompt")
REASONING_NAMES = ("reasoning", "thinking", "reasoning_content")
MAP_FLAGS = "--map prompt=COLUMN answer=COLUMN"
MAP_ANYTHING = f"fields {MAP_FLAGS}"
FIRST_ROWS = 50  # that are looked at
SHARE = 0.1  # of them that must be of a shape which extends another


@dataclass(frozen=True)
class Detected:
    """What rows were taken for, and why."""

    source: str
    reason: str
    map: dict[str, str] = field(default_factory=dict)  # of the source fields


def as_object(raw: object) -> object:
    """Return a row as the sources read it: a line that is a list holds messages."""
    if isinstance(raw, list):
        return {"messages": raw}
    return raw


def present_columns(row: dict) -> list[str]:
    return [str(key) for key, value in row.items() if value is not None]


def fits_row(source: Source, row: dict) -> bool:
    """Return whether a row has a source's columns and looks like one of its rows."""
    if not source.is_guessed or not source.has_columns(set(present_columns(row))):
        return False
    try:
        return source.fits is None or source.fits(row)
    except (KeyError, TypeError, AttributeError, IndexError):
        return False


def detect_source(rows: list[object], file: str = "") -> Detected:
    """Return the source that the most of these rows fit, the later one of two in the table. Raises UsageError."""
    objects = [row for row in map(as_object, rows) if isinstance(row, dict) and row]
    fitting = Counter()
    for row in objects:
        for name, source in SOURCES.items():
            if fits_row(source, row):
                fitting[name] += 1
    if fitting:
        name = choose_source(fitting, len(objects))
        return Detected(name, f"{fitting[name]} of the first {len(objects)} rows have {describe_shape(name, objects)}")
    mapped = guess_map(objects)
    if mapped:
        pairs = " ".join([f"{ours}={theirs}" for ours, theirs in mapped.items()])
        return Detected("fields", f"no published shape, but columns of known names: --map {pairs}", mapped)
    raise UsageError(f"{file}: no source reads such rows: {explain_unknown(objects)}")


def choose_source(fitting: Counter[str], count: int) -> str:
    """Return the source that the most rows fit, or one that reads those as well and more of what is in some of them."""
    best = max(fitting.values())
    name = [name for name in SOURCES if fitting[name] == best][-1]
    for other, source in SOURCES.items():
        if name in source.extends.split() and fitting[other] >= SHARE * count:
            return other
    return name


def describe_shape(name: str, rows: list[dict]) -> str:
    """Return the columns by which a source is known, as the first row that fits has them."""
    source = SOURCES[name]
    row = next(row for row in rows if fits_row(source, row))
    columns = [column for column in present_columns(row) if any([column in need for need in source.needed])]
    shape = " and ".join(columns)
    turn = first_turn(row)
    if isinstance(turn, dict) and not set(columns).isdisjoint(TURN_COLUMNS):
        shape += f" with turns of {', '.join(map(str, turn))}"
    if source.sign:
        shape += f", {source.sign}"
    return shape


def guess_map(rows: list[dict]) -> dict[str, str] | None:
    """Return the --map of rows with one column for the question and one for the answer, by their names."""
    if not rows:
        return None
    row = rows[0]
    if any([row.get(name) for name in MEDIA]):
        return None
    mapped = {}
    for ours, names in (("prompt", PROMPT_NAMES), ("answer", ANSWER_NAMES)):
        columns = [key for key in present_columns(row) if key.lower() in names]
        if len(columns) != 1 or isinstance(row[columns[0]], (dict, list)):
            return None
        mapped[ours] = columns[0]
    for ours, names in (("system", SYSTEM_NAMES), ("reasoning", REASONING_NAMES)):
        columns = sorted({key for row in rows for key in present_columns(row) if key.lower() in names})
        if len(columns) == 1:
            mapped[ours] = columns[0]
    return mapped


def explain_unknown(rows: list[dict]) -> str:
    """Return what to do with rows that no source reads."""
    if not rows:
        return "they are empty, or no objects: pass JSON objects, one a line"
    if set(rows[0]) == {"text"}:
        return "plain text has no turns: a recipe trains it as it is, with --assistant_only_loss false"
    present = {}  # in the order of the file; a column may be empty in the first row
    for row in rows:
        present |= dict.fromkeys(present_columns(row))
    columns = ", ".join(present)[:300]
    if {"message_id", "parent_id", "text", "role"} <= rows[0].keys():
        return FLAT
    if not {"role", "from"}.isdisjoint(rows[0]):
        return f"a row is one message ({columns}), not a conversation: join those of one into a list, a list a line"
    turn = first_turn(rows[0])
    if isinstance(turn, dict):
        name = next(name for name in TURN_COLUMNS if rows[0].get(name) is not None)
        keys = ", ".join(map(str, turn))
        return (
            f"the turns of {name} have {keys}: pass fields --map messages={name} role=KEY content=KEY, and --roles for "
            "their speakers"
        )
    return (
        f"their columns are {columns}: pass {MAP_ANYTHING}, with a column of these or several joined by a text, "
        '"prompt={COLUMN}: {COLUMN}"'
    )


def suggest_source(row: dict) -> str | None:
    """Return the source that reads a row, with the flags that it needs; None where none does."""
    try:
        detected = detect_source([row])
    except UsageError:
        return None
    flags = [f"{ours}={theirs}" for ours, theirs in detected.map.items()]
    if flags:
        return f"{detected.source} --map {' '.join(flags)}"
    return detected.source


def normalize_arguments(columns: Iterable[str], rows: str) -> str:
    """Return the first arguments of normalize for rows with these columns, whose values are not known."""
    columns = set(columns)
    by_columns = []
    needs_values = False
    for name, source in SOURCES.items():
        if source.is_guessed and source.has_columns(columns):
            if source.fits is None:
                by_columns.append(name)
            else:
                needs_values = True
    if by_columns:
        name = max(by_columns, key=lambda name: len(SOURCES[name].needed))
        return f"{name} {rows}"
    if needs_values:
        return f"auto {rows}"
    return f"fields {rows} {MAP_FLAGS}"
