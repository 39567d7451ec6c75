"""Load rows as recipes load them."""

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .errors import InvalidRow, UsageError
from .exact_numbers import read_json_exactly
from .json_text import dump_json
from .readers import read_rows
from .recipe_settings import Settings
from .row_keys import SWITCH

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

ROW_COLUMNS = {"messages", "prompt", "text", "input_ids"}  # a recipe trains rows with one of these as they are


class LoadedRows(NamedTuple):
    """The train split as a recipe loads it."""

    rows: "Dataset"
    order: list[int]  # the rows that are trained, in the order in which they reach the packing
    note: str  # one sentence where that is not all of them


def load_sets(path: Path, split: str = "train") -> "Dataset | DatasetDict":
    """Load a save_to_disk folder (a Dataset, or splits of it) or a file ({split: Dataset}), as recipes load it.

    Raises UsageError.
    """
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it would log is in the one sentence below
    kind = path.suffix[1:].replace("jsonl", "json")
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder: pass .jsonl, .json, .parquet or a save_to_disk folder")
    if path.is_file() and kind not in ("json", "parquet"):
        raise UsageError(f"{path}: unknown kind of file: pass .jsonl, .json, .parquet or a save_to_disk folder")
    if path.is_file() and path.stat().st_size < 1000 and not path.read_bytes().strip():
        raise no_rows_error(path)
    read_json_exactly()
    try:
        if path.is_dir():
            sets = datasets.load_from_disk(str(path))
        elif kind == "parquet":
            sets = datasets.load_dataset(kind, data_files={split: str(path)})
        else:
            sets = load_json(path, split)
        for rows in sets.values() if isinstance(sets, dict) else [sets]:
            for column in rows.data.columns:
                column.validate(full=True)  # Arrow takes bytes that are no UTF-8 and stumbles when a row is read
    except Exception as error:  # datasets wraps what pyarrow, fsspec and its own readers raise
        raise unreadable_error(path, error) from None
    return sets


def load_json(path: Path, split: str) -> "DatasetDict":
    """Load what is rendered of a .jsonl or .json file as JSON, as the recipes' load_json.

    With types, 1 beside 0.5 becomes 1.0, a date in every row a timestamp, and the text "7" beside an object the number.
    """
    from datasets import Json, List, load_dataset

    files = {split: str(path)}
    features = load_dataset("json", data_files=files)[split].features
    for name in ("messages", "prompt", "completion", "tools"):
        if isinstance(features.get(name), List):
            features[name] = List(Json())
    if "chat_template_kwargs" in features:
        features["chat_template_kwargs"] = Json()
    return load_dataset("json", data_files=files, features=features)


def no_rows_error(path: str | Path) -> UsageError:
    return UsageError(f"{path}: no rows: pass rows of messages (python -m data_prep.normalize makes them)")


def unreadable_error(path: Path, error: Exception) -> UsageError:
    """Return a UsageError that says where a file is broken: the line, where one is to blame."""
    cause = " ".join(str(error.__cause__ or error).split())[:200].rstrip(".")
    fault = f": cannot be read ({type(error).__name__}: {cause})"
    if path.is_file() and path.suffix != ".parquet":
        for number, row in read_rows(path):
            try:
                if isinstance(row, InvalidRow):
                    raise row
                dump_json(row)  # raises for half a surrogate pair
            except InvalidRow as refusal:
                fault = f":{number}: {refusal}"
                break
    return UsageError(f"{path}{fault}: mend it or make it anew (python -m data_prep.normalize, save_to_disk)")


# -- validation rows --------------------------------------------------------------------------------------------------
def read_prompt(row: dict) -> str:
    """Return what a row asks, as the recipes' read_prompt."""
    turns = row.get("messages") or row.get("prompt")
    if not isinstance(turns, list):
        return str(turns or row.get("text") or row.get("input_ids"))
    asked = " ".join(str(turn.get("content")) for turn in turns if turn.get("role") != "assistant")
    return " ".join(SWITCH.sub("", asked).split())


def split_by_prompt(rows: "Dataset", eval_rows: int, seed: int) -> tuple[list[int], list[int]]:
    """Return (train, validation): the positions of the rows that the recipes' split_by_prompt draws, which
    tests/data_prep/test_tokens.py holds equal; no validation where it would stop."""
    prompts = [hash(read_prompt(row)) for row in rows]
    order = shuffle(list(range(len(rows))), seed)
    held_out = set()
    rows_left = eval_rows
    for prompt, size in Counter(prompts[number] for number in order).items():
        if size <= rows_left:
            held_out.add(prompt)
            rows_left -= size
    train = [number for number in order if prompts[number] not in held_out]
    validation = [number for number in order if prompts[number] in held_out]
    if not train:
        return order, []
    return train, validation


def shuffle(order: list[int], seed: int) -> list[int]:
    """Return the rows in the order of Dataset.shuffle."""
    return [order[position] for position in np.random.default_rng(seed).permutation(len(order)).tolist()]


def load_rows(data: str | Path, settings: Settings) -> LoadedRows:
    """Load the train split as a recipe does, and leave out the rows that it keeps for validation. Raises UsageError.

    A row is what datasets gives back, with the nulls that Arrow fills in, because that is what a template gets to see.
    """
    settings.data = f"{data}: "
    sets = load_sets(Path(data), settings.dataset_train_split)
    rows = find_train_rows(Path(data), sets, settings.dataset_train_split)
    order = list(range(len(rows)))
    note = ""
    if settings.eval_rows and settings.dataset_test_split not in sets:
        train, validation = split_by_prompt(rows, settings.eval_rows, settings.seed)
        if validation:
            order = train
            note = (
                f"{len(validation):,} rows are held out for validation (eval_rows): packs and steps are those of the "
                f"other {len(order):,}"
            )
        else:
            note = (
                f"the recipe holds out {settings.eval_rows} rows for validation, more than the set can spare: it would "
                "stop; counted without that (--eval_rows 0)"
            )
    if settings.shuffle_dataset and "input_ids" not in rows.column_names:
        order = shuffle(order, settings.seed)
    return LoadedRows(rows, order, note)


def find_train_rows(data: Path, sets: "Dataset | DatasetDict", split: str) -> "Dataset":
    """Return the train split of what load_sets gave. Raises UsageError where a recipe could train none."""
    if not isinstance(sets, dict):
        raise UsageError(f"{data}: one set without splits: save a DatasetDict with a {split} split")
    if split not in sets:
        raise UsageError(f"{data}: no split {split}, only {', '.join(sets)}: pass one of them as --dataset_train_split")
    rows = sets[split]
    if not len(rows):
        raise no_rows_error(data)
    if not ROW_COLUMNS & set(rows.column_names):
        raise UsageError(
            f"{data}: rows of {', '.join(rows.column_names)} are no messages: python -m data_prep.normalize makes them"
        )
    if "messages" in rows.column_names and not isinstance(rows[0]["messages"], list):
        # also what datasets makes of a file that Arrow cannot read: every message a row
        raise unreadable_error(data, TypeError("messages are no list"))
    return rows
