"""The YAML of a mix: its options, their types, and which of them a strategy reads."""

import difflib
import math
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

from .errors import InvalidRow, UsageError
from .readers import is_dataset_folder
from .template_arguments import check_without_template
from .yaml_text import load_yaml

Options = TypeVar("Options")


@dataclass
class ValidationSize:
    """How many rows go to validation: max(min, share of all rows)."""

    share: float = 0.0
    min: int = 0

    def count(self, rows: int) -> int:
        return max(self.min, int(self.share * rows))


@dataclass
class Source:
    """One entry of `sources`."""

    path: str
    name: str = ""  # the path, where the YAML is silent
    weight: float = 1.0
    epochs: float = 1.0
    rows: int | None = None  # the first ones
    shuffle: int | None = None  # seed of the order in which they are the first
    where: dict = field(default_factory=dict)
    split: str = "train"


@dataclass
class Mix:
    """The options of a mix."""

    sources: list = field(default_factory=list)
    strategy: Literal["interleave", "resample", "subsample", "concatenate"] = "interleave"
    by: Literal["rows", "tokens"] = "rows"
    seed: int = 42
    size: int | None = None
    stop: Literal["first_exhausted", "all_exhausted", "each_exhausted"] | None = None
    shuffle: Literal["numpy", "python", "none"] | None = None
    literal: bool = False
    dedup: bool = True
    validation: ValidationSize = field(default_factory=lambda: ValidationSize(0.02, 100))
    pool_validation: Literal["use", "leave"] | None = None
    chat_template_kwargs: dict = field(default_factory=dict)

    def has_validation(self) -> bool:
        return self.validation.share > 0 or self.validation.min > 0

    def uses_pool_validation(self) -> bool:
        if self.pool_validation is None:
            return self.has_validation() and not self.literal
        return self.pool_validation == "use"


# -- read and compare with the types ----------------------------------------------------------------------------------
LEAST = {"seed": 0, "size": 1, "rows": 1, "shuffle": 0, "share": 0, "min": 0}
MOST = {"share": 1}
TYPE_NAMES = {
    str: "text, in quotes",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "a mapping",
    list: "a list of - {path: …, weight: …}",
    ValidationSize: "{share: …, min: …} or 0",
}
WHERE = ("source", "tags", "lang", "mode")
MODES = ("think", "no_think")


def read_mix(path: str, pools: str | None, seed: int | None) -> Mix:
    """Return the mix that a YAML file holds. Raises UsageError.

    pools: folder that the paths of its sources are under; seed: instead of its own.
    """
    options = read_yaml(path)
    if seed is not None:
        options["seed"] = seed
    if isinstance(options.get("validation"), dict):
        options["validation"] = read_options(ValidationSize, options["validation"], f"{path}: validation")
    elif "validation" in options and options["validation"] in (0, None, False):
        options["validation"] = ValidationSize()
    sources = options.pop("sources", None)
    mix = read_options(Mix, options, path)
    if mix.literal and (mix.strategy not in ("interleave", "resample") or mix.by != "rows"):
        raise UsageError(f"{path}: literal mixes by rows with interleave or resample, as the tutorial does")
    refuse_unread(unread_options(mix), options, path, mix)
    check_json(mix.chat_template_kwargs, f"{path}: chat_template_kwargs")
    try:
        check_without_template(mix.chat_template_kwargs)
    except InvalidRow as error:
        raise UsageError(f"{path}: chat_template_kwargs: {error.detail}") from None
    if not isinstance(sources, list) or not sources:
        raise UsageError(f"{path}: names no sources: write `sources:` and lines of `- {{path: …, weight: …}}`")
    for number, entry in enumerate(sources, 1):
        mix.sources.append(read_source(entry, mix, Path(pools or "."), f"{path}: source {number}"))
    if not any([source.weight for source in mix.sources]):
        for source in mix.sources:
            source.weight = 1.0
    for name, count in Counter([source.name for source in mix.sources]).items():
        if count > 1:
            raise UsageError(f"{path}: two sources are called {name}: give them a `name` each")
    return mix


def read_yaml(path: str) -> dict:
    """Return the options of a YAML file, without those left empty. Raises UsageError."""
    try:
        options = load_yaml(path)
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be read ({error.strerror}): pass a mix like those of data_prep/mixes"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not YAML ({' '.join(str(error).split())}): mend it") from None
    except RecursionError:
        raise UsageError(f"{path}: nested too deep: write a mix like those of data_prep/mixes") from None
    if not isinstance(options, dict):
        raise UsageError(f"{path}: names no sources: pass a mix like those of data_prep/mixes")
    return {name: value for name, value in options.items() if value is not None or name == "validation"}


def check_json(value: object, location: str) -> None:
    """Raise UsageError for a value that YAML knows and JSON does not. location: what the sentence begins with."""
    if isinstance(value, dict):
        for name, item in value.items():
            if not isinstance(name, str):
                raise UsageError(f"{location}: {name} is no text: put it in quotes")
            check_json(item, f"{location}: {name}")
    elif isinstance(value, list):
        for item in value:
            check_json(item, location)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{location} is {value}, JSON has no such number: write another value")
    elif not isinstance(value, (str, int, float, NoneType)):  # a date, say
        raise UsageError(f"{location} is {value}, which is no text to YAML: put it in quotes")


def read_source(entry: object, mix: Mix, pools: Path, location: str) -> Source:
    """Return one source; a negative weight becomes 0 with a warning. Raises UsageError."""
    if not isinstance(entry, dict) or "path" not in entry:
        raise UsageError(f"{location} has no path: write - {{path: data/chats, weight: 1}}")
    source = read_options(Source, entry, location)
    source.name = source.name or source.path
    if source.epochs <= 0:
        raise UsageError(f"{location}: epochs is {source.epochs}, it must be above 0")
    if mix.strategy == "subsample" and source.weight > 1:
        raise UsageError(f"{location}: weight is {source.weight}, under subsample it is a share, at most 1: use epochs")
    check_where(source.where, location)
    refuse_unread(unread_source_options(mix, source), entry, location, mix)
    if source.weight < 0:
        print(f"{location}: the weight of {source.name} is {source.weight}, counted as 0", file=sys.stderr)
        source.weight = 0.0
    folder = pools / source.path
    if not is_dataset_folder(folder):
        raise UsageError(
            f"{folder}: no dataset folder: make it (python -m data_prep.normalize), or pass its parent as --pools"
        )
    return source


def check_where(where: dict, location: str) -> None:
    """Raise UsageError for a condition that no row could meet."""
    for name, value in where.items():
        if name not in WHERE:
            raise UsageError(f"{location}: where knows {', '.join(WHERE)}, not {name}{describe_nearest(name, WHERE)}")
        if value == []:
            raise UsageError(f"{location}: where {name} names no value: write one, or leave {name} out")
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, bool) or not isinstance(item, (str, int, float)):  # YAML reads no and on as booleans
                raise UsageError(f"{location}: where {name} is {item!r}, it must be text: put it in quotes")
            if name == "mode" and item not in MODES:
                nearest = describe_nearest(item, MODES)
                raise UsageError(f"{location}: where mode is {item}, it must be one of {', '.join(MODES)}{nearest}")


def read_options(kind: type[Options], options: dict, location: str) -> Options:
    """Return a dataclass of options whose types are those of its fields. Raises UsageError."""
    hints = get_type_hints(kind)
    for name, value in options.items():
        if name not in hints:
            nearest = describe_nearest(name, hints)
            raise UsageError(f"{location}: {name} is no option: write one of {', '.join(hints)}{nearest}")
        hint = hints[name]
        if not has_type(value, hint):
            nearest = describe_nearest(value, list_choices(hint))
            raise UsageError(f"{location}: {name} is {value!r}, it must be {describe_type(hint)}{nearest}")
        is_number = isinstance(value, (int, float))
        if is_number and value < LEAST.get(name, -math.inf):
            raise UsageError(f"{location}: {name} is {value}, it must be at least {LEAST[name]}")
        if is_number and value > MOST.get(name, math.inf):
            raise UsageError(f"{location}: {name} is {value}, it must be at most {MOST[name]}")
    return kind(**options)


def describe_nearest(word: object, known: Iterable[str]) -> str:
    """Return ", the nearest is WORD" for a misspelt word, "" where none is near."""
    near = difflib.get_close_matches(str(word), known, n=1)
    return f", the nearest is {near[0]}" if near else ""


def has_type(value: object, hint: object) -> bool:
    """Return whether a value is what a field's hint says; a whole number is a number, too."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_args(hint):  # KIND | None
        return any([has_type(value, kind) for kind in get_args(hint)])
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, (int, float)) and math.isfinite(value)
    return isinstance(value, hint)


def describe_type(hint: object) -> str:
    choices = list_choices(hint)
    if choices:
        return "one of " + ", ".join(choices)
    for kind in get_args(hint):
        if kind is not NoneType:
            return TYPE_NAMES[kind]
    return TYPE_NAMES[hint]


def list_choices(hint: object) -> tuple[str, ...]:
    """Return the words that a hint, or a part of it, allows; none where it is no Literal."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    choices = ()
    for kind in get_args(hint):
        choices += list_choices(kind)
    return choices


# -- options that a strategy does not read ----------------------------------------------------------------------------
UNREAD = {  # {strategy: {option: why, and what does instead}}
    "interleave": {},
    "resample": {
        "stop": "it draws until size is reached",
        "epochs": "it draws with replacement, write a larger size instead",
    },
    "subsample": {
        "size": "a weight is the share of its source that is kept, change the weights instead",
        "stop": "a weight is the share of its source that is kept, change the weights instead",
    },
    "concatenate": {
        "stop": "every source is taken to its end, write size instead",
        "weight": "every source is taken whole, write rows or epochs instead",
    },
}


def unread_options(mix: Mix) -> dict[str, str]:
    """Return {option: reason} of what this mix would not read."""
    unread = dict(UNREAD[mix.strategy])
    if mix.strategy == "interleave" and mix.stop == "each_exhausted":
        unread["size"] = "stop: each_exhausted takes every source to its end, write rows of a source instead"
        if mix.literal:
            unread["stop"] = "the tutorial's script stops by datasets' own rules, first_exhausted or all_exhausted"
    if mix.literal:
        unread["size"] = "the tutorial's script takes all, write rows of a source instead"
        unread["shuffle"] = "the tutorial's script shuffles by numpy"
        if not mix.dedup:
            unread["dedup"] = "the tutorial's script removes duplicates"
        if mix.pool_validation == "use":
            unread["pool_validation"] = "the tutorial's script splits validation off at the end"
    if mix.strategy == "concatenate":
        if mix.by == "tokens" and mix.size is None:
            unread["by"] = "tokens are what size counts there, write size (for the card --recipe counts them)"
        if mix.shuffle in (None, "none") and not mix.has_validation():
            unread["seed"] = "nothing is drawn, write shuffle or validation"
    return unread


def unread_source_options(mix: Mix, source: Source) -> dict[str, str]:
    """Return {option: reason} of what this mix would not read of a source."""
    unread = dict(UNREAD[mix.strategy])
    if mix.literal:
        unread["epochs"] = "the tutorial's script knows none, write rows instead"
    elif mix.strategy == "interleave" and mix.stop == "all_exhausted" and mix.size is not None:
        unread["epochs"] = "sources repeat until size is reached, write stop: first_exhausted"
    if source.rows is None and mix.strategy != "concatenate" and not mix.literal:
        unread["shuffle"] = "it says which rows are the first ones, write rows"
    return unread


def refuse_unread(unread: dict[str, str], written: dict, location: str, mix: Mix) -> None:
    """Raise UsageError for an option that was written and would not be read."""
    strategy = "literal " * mix.literal + mix.strategy
    for option, reason in unread.items():
        if option in written:
            raise UsageError(f"{location}: {option} is not read by {strategy}: {reason}; or leave {option} out")
