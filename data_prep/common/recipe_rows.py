"""Load rows as recipes load them."""

import sys
from collections import Counter
from pathlib import Path

from .errors import InvalidRow, UsageError
from .json_text import refuse_half_pairs
from .readers import read_rows
from .row_keys import SWITCH


def load_sets(path, split="train"):
    """What datasets makes of a save_to_disk folder (a Dataset, or {split: Dataset}) or of a file ({split: Dataset}), as
    recipes load it. Raises UsageError."""
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
    try:
        if path.is_dir():
            sets = datasets.load_from_disk(str(path))
        else:
            sets = datasets.load_dataset(kind, data_files={split: str(path)})
        for one in sets.values() if isinstance(sets, dict) else [sets]:
            for column in one.data.columns:
                column.validate(full=True)  # Arrow takes bytes that are no UTF-8 and stumbles when a row is read
    except Exception as error:  # datasets wraps what pyarrow, fsspec and its own readers raise
        raise unreadable_error(path, error) from None
    return sets


def no_rows_error(path):
    return UsageError(f"{path}: no rows: pass rows of messages (python -m data_prep.normalize makes them)")


def unreadable_error(path, error):
    """A UsageError that says where a file is broken, as exactly as can be told."""
    cause = " ".join(str(error.__cause__ or error).split())[:200].rstrip(".")
    fault = f": cannot be read ({type(error).__name__}: {cause})"
    for number, row in read_rows(path) if path.is_file() and path.suffix != ".parquet" else ():
        try:
            if isinstance(row, InvalidRow):
                raise row
            refuse_half_pairs(row)
        except InvalidRow as refusal:
            fault = f":{number}: {refusal}"
            break
    return UsageError(f"{path}{fault}: mend it or make it anew (python -m data_prep.normalize, save_to_disk)")


def read_prompt(row):
    """The recipes' read_prompt."""
    turns = row.get("messages") or row.get("prompt")
    if not isinstance(turns, list):
        return str(turns or row.get("text") or row.get("input_ids"))
    asked = " ".join(str(turn.get("content")) for turn in turns if turn.get("role") != "assistant")
    return " ".join(SWITCH.sub("", asked).split())


def split_by_prompt(rows, eval_rows, seed):
    """(train, validation): the positions of the rows that the recipes' split_by_prompt draws (tests/test_preview.py
    holds both equal); nothing held out where it would stop."""
    import numpy as np

    prompts = [hash(read_prompt(row)) for row in rows]
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    held_out = set()
    rows_left = eval_rows
    for prompt, size in Counter(prompts[number] for number in order).items():
        if size <= rows_left:
            held_out.add(prompt)
            rows_left -= size
    train = [number for number in order if prompts[number] not in held_out]
    validation = [number for number in order if prompts[number] in held_out]
    return (train, validation) if train else (order, [])


def load_rows(data, settings):
    """(rows, order, note): the train split as recipes load it, the rows that are trained in the order in which they
    reach the packing, and one sentence where that is not all of them. The row itself is what datasets gives back, with
    the nulls that Arrow fills in, because that is what a template gets to see. Raises UsageError."""
    import numpy as np

    split, settings.data = settings.dataset_train_split, f"{data}: "
    sets = load_sets(Path(data), split)
    if not isinstance(sets, dict):
        raise UsageError(f"{data}: one set without splits: save a DatasetDict with a {split} split")
    if split not in sets:
        raise UsageError(f"{data}: no split {split}, only {', '.join(sets)}: pass one of them as --dataset_train_split")
    rows = sets[split]
    if not len(rows):
        raise no_rows_error(data)
    if not {"messages", "prompt", "text", "input_ids"} & {*rows.column_names}:
        raise UsageError(
            f"{data}: rows of {', '.join(rows.column_names)} are no messages: python -m data_prep.normalize makes them"
        )
    if "messages" in rows.column_names and not isinstance(rows[0]["messages"], list):
        # also what datasets makes of a file that Arrow cannot read: every message a row
        raise unreadable_error(Path(data), TypeError("messages are no list"))
    order, note = [*range(len(rows))], ""
    if settings.dataset_test_split not in sets and settings.eval_rows:
        trained, validation = split_by_prompt(rows, settings.eval_rows, settings.seed)
        if not validation:
            note = f"the recipe holds out {settings.eval_rows} rows for validation, more than the set can spare: it "
            note += "would stop; counted without that (--eval_rows 0)"
        else:
            order = trained
            note = f"{len(validation):,} rows are held out for validation (eval_rows): packs and steps are those of "
            note += f"the other {len(order):,}"
    if settings.shuffle_dataset and "input_ids" not in rows.column_names:
        order = [order[i] for i in np.random.default_rng(settings.seed).permutation(len(order)).tolist()]
    return rows, order, note
