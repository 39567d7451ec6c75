"""What differs between two descriptions of a run, and which of it may be."""

from collections.abc import Mapping
from dataclasses import dataclass

from .messages import UsageError, relative_path

CONTENTS = {  # key of run.json's contents, also for --allow: what it is in a sentence
    "recipe": "another recipe, or other code in it",
    "template": "another chat template",
    "tokenizer": "another tokenizer",
    "data": "other training tokens (rows, split or --eval_rows)",
    "base_config": "another config of the base model",
    "base_weights": "other weights of the base model",
    "start_adapter": "another adapter to start from (--adapter)",
}


@dataclass(frozen=True)
class Difference:
    """A value that a resume has and its checkpoint's run had not."""

    name: str  # for --allow
    before: object
    now: object
    note: str = ""  # what it means

    def describe(self) -> str:
        if self.name in CONTENTS:
            text = CONTENTS[self.name]
        else:
            text = f"{self.name} {show_value(self.before)}, now {show_value(self.now)}"
        return f"{text} ({self.note})" if self.note else text


def show_value(value: object) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def find_differences(
    before: Mapping[str, object], now: Mapping[str, object], names: Mapping[str, str] | None = None
) -> list[Difference]:
    """Return what differs of what both hold. `names`: of a key, where --allow has another."""
    found = []
    for key, value in now.items():
        if key in before and before[key] != value:
            name = (names or {}).get(key, key)
            found.append(Difference(name, before[key], value))
    return found


def refuse_differences(
    checkpoint: str, found: list[Difference], not_loadable: Mapping[str, str], allow: list[str]
) -> list[Difference]:
    """Return what is allowed. Raises UsageError for the rest, each with both values.

    `not_loadable`: {name: why the checkpoint cannot be loaded so}.
    """
    impossible = [difference for difference in found if difference.name in not_loadable]
    possible = [difference for difference in found if difference.name not in not_loadable]
    refused = [difference for difference in possible if difference.name not in allow]
    if not impossible and not refused:
        return possible

    told = [f"{difference.describe()} ({not_loadable[difference.name]})" for difference in impossible]
    told += [difference.describe() for difference in refused]
    remedy = "take the old values to go on"
    if refused:
        names = " ".join(difference.name for difference in refused)
        remedy += f", or --allow {names} goes on with the new ones" if not impossible else ""
    raise UsageError(
        f"{relative_path(checkpoint)} belongs to a run with other values: {'; '.join(told)}: {remedy}; another "
        "--output_dir starts afresh"
    )
