"""What a row holds: turns of a conversation, text, tokens, or columns that nobody reads."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Json, Value
from trl import ScriptArguments, SFTConfig

from ..messages import UsageError
from .compiled import check_compiled_settings, check_settings_of_other_rows, is_compiled
from .ranks import refuse_on_all_ranks

HEAD_BYTES = 16 << 20  # of a JSON file: its first row stands in them, or the loader is left to it
SHOWN_ROWS = 9
TRL_COLUMNS = {"messages", "completion", "text", "input_ids"}  # without any of them a recipe's to_messages reads a row
UNREADABLE = (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError)  # heads of files
READ_COLUMNS = ("messages", "prompt", "conversations")  # that TRL reads, beside dataset_text_field


@dataclass(frozen=True)
class NormalizeSource:
    """A source of data_prep/normalize.py, and the columns by which its rows are known."""

    columns: frozenset[str]
    arguments: str  # {rows}: the input


SOURCES = (
    NormalizeSource(frozenset({"prompt", "completion"}), "prompt_completion {rows}"),
    NormalizeSource(frozenset({"conversations"}), "sharegpt {rows}"),
    NormalizeSource(frozenset({"instruction", "output"}), "alpaca {rows}"),
    NormalizeSource(frozenset({"messages"}), "messages {rows}"),
)
ANY_SOURCE = "fields {rows} --map prompt=COLUMN answer=COLUMN"


def check_rows(
    script_args: ScriptArguments, training_args: SFTConfig, train_rows: Dataset, validation_rows: Dataset | None
) -> None:
    """Raise UsageError for loaded rows that TRL cannot train as the settings say; before the trainer is built."""
    splits = {script_args.dataset_train_split: train_rows}
    if validation_rows is not None:
        splits["validation"] = validation_rows
    with refuse_on_all_ranks(training_args):
        for split, rows in splits.items():
            if not len(rows):
                raise UsageError(f"dataset {script_args.dataset_name}: {split} has no rows: pass a set that has some")
            check_columns(rows.features, script_args, training_args)
            if training_args.assistant_only_loss:
                check_assistant_turns(rows, split, script_args, training_args)


def check_local_rows(script_args: ScriptArguments, training_args: SFTConfig) -> None:
    """Raise UsageError for a local file or folder whose columns or first row cannot be trained; before it is loaded.

    Rows of other columns than TRL's pass: the recipe's to_messages reads them.
    """
    path = Path(script_args.dataset_name)
    if path.is_file() and not path.stat().st_size:
        raise UsageError(f"dataset {script_args.dataset_name} has no rows: the file is empty")
    features = read_features(path, script_args.dataset_train_split)
    if features is None or not TRL_COLUMNS & set(features):
        return
    check_columns(features, script_args, training_args)


# -- columns ----------------------------------------------------------------------------------------------------------
def check_columns(features: Features, script_args: ScriptArguments, training_args: SFTConfig) -> None:
    """Raise UsageError unless rows of these columns hold what the settings train."""
    if is_compiled(features):
        check_compiled_settings(script_args.dataset_name, training_args)
        return
    check_settings_of_other_rows(script_args.dataset_name, training_args)
    columns = ", ".join(features)
    if "prompt" in features and "completion" not in features:
        raise UsageError(
            f"dataset {script_args.dataset_name}: its rows (columns {columns}) have a prompt and no completion, and "
            f"TRL reads no other column then: {suggest_normalize(features, script_args)}"
        )
    if holds_conversations(features):
        return
    if training_args.assistant_only_loss:
        raise UsageError(
            f"dataset {script_args.dataset_name}: its rows (columns {columns}) are no conversations of messages, and "
            f"this run trains the assistant's turns: {suggest_messages(features, script_args, training_args)}"
        )
    readable = {*READ_COLUMNS, training_args.dataset_text_field}
    if not readable & set(features):
        raise UsageError(
            f"dataset {script_args.dataset_name}: its rows (columns {columns}) have neither messages nor "
            f"{training_args.dataset_text_field}: {suggest_normalize(features, script_args)}"
        )


def holds_conversations(features: Features) -> bool:
    """Return whether TRL takes such rows for conversational: messages, or prompt and completion, are lists of turns."""
    if "messages" in features:
        return holds_turns(features["messages"])
    if "prompt" in features and "completion" in features:
        return holds_turns(features["prompt"]) and holds_turns(features["completion"])
    return False


def holds_turns(feature: object) -> bool:
    """Return whether a column is a list of objects with a role; True where its type leaves that open."""
    if isinstance(feature, Json):
        return True
    item = getattr(feature, "feature", None)  # of a List
    if isinstance(item, dict):
        return "role" in item
    if isinstance(item, Value):
        return item.dtype == "null"  # of empty lists
    return isinstance(item, Json)


def suggest_messages(features: Features, script_args: ScriptArguments, training_args: SFTConfig) -> str:
    """Return what to do with rows that are no conversations."""
    if set(features) == {training_args.dataset_text_field}:
        return "plain text has no turns, --assistant_only_loss false trains every token of it"
    return suggest_normalize(features, script_args)


def suggest_normalize(features: Features, script_args: ScriptArguments) -> str:
    """Return the command that makes rows of messages of rows with these columns."""
    name = script_args.dataset_name
    rows = name
    if script_args.dataset_config and not Path(name).exists():
        rows = f"{name}:{script_args.dataset_config}"
    arguments = choose_source(features)
    out = Path("data") / Path(name).stem
    if out.exists():
        out = out.with_name(f"{out.name}-messages")
    command = arguments.format(rows=shlex.quote(rows))
    return f"python data_prep/normalize.py {command} --out {shlex.quote(str(out))} makes messages of them"


def explain_missing_column(script_args: ScriptArguments, column: str) -> str:
    """Return the sentence for rows without a column that the recipe's to_messages reads."""
    name = script_args.dataset_name
    features = read_features(Path(name), script_args.dataset_train_split) or Features()
    columns = ""
    if features:
        columns = f" (its columns: {', '.join(features)})"
    return (
        f"dataset {name} has no column {column}, which this recipe's to_messages reads{columns}: "
        f"{suggest_normalize(features, script_args)}, or edit to_messages"
    )


def choose_source(features: Features) -> str:
    """Return the first arguments of normalize.py for rows with these columns."""
    if "conversations" in features and holds_turns(features["conversations"]):
        return "messages {rows}"
    for source in SOURCES:
        if source.columns <= set(features):
            return source.arguments
    return ANY_SOURCE


# -- turns ------------------------------------------------------------------------------------------------------------
def check_assistant_turns(rows: Dataset, split: str, script_args: ScriptArguments, training_args: SFTConfig) -> None:
    """Raise UsageError for rows in which the assistant says nothing; TRL stops at the first without naming it."""
    without = find_rows_without_assistant(rows, training_args)
    if not without:
        return
    name = script_args.dataset_name
    shown = ", ".join(str(number) for number in without[:SHOWN_ROWS])
    if len(without) > SHOWN_ROWS:
        shown += ", …"
    command = f"data_prep/normalize.py messages {shlex.quote(name)} --out OUT"
    if Path(name).exists():
        command = f"data_prep/check.py {shlex.quote(name)} --fix --out OUT"
    raise UsageError(
        f"dataset {name}: {len(without):,} of {len(rows):,} rows of {split} have no assistant turn (rows {shown} from "
        f"0): python {command} writes a set without them"
    )


def find_rows_without_assistant(rows: Dataset, training_args: SFTConfig) -> list[int]:
    """Return the positions of the rows with nothing to train: no assistant turn in what the loss is taken over."""
    columns = ["messages"]
    if "messages" not in rows.column_names:
        columns = ["prompt", "completion"]
        if training_args.completion_only_loss is not False:  # TRL's default for such rows
            columns = ["completion"]
    without = []
    for number, row in enumerate(rows.select_columns(columns)):
        turns = [turn for column in columns for turn in row[column] or []]
        if not any(turn.get("role") == "assistant" for turn in turns):
            without.append(number)
    return without


# -- the columns of a file or folder ----------------------------------------------------------------------------------
def read_features(path: Path, split: str) -> Features | None:
    """Return the columns of a local set, read from its head alone; None where they cannot be told."""
    try:
        if path.is_dir():
            return read_folder_features(path, split)
        if path.suffix == ".parquet":
            return Features.from_arrow_schema(pq.read_schema(path))
        if path.suffix in (".jsonl", ".json"):
            return read_json_features(path)
    except UNREADABLE:  # what is wrong with a set is said where it is loaded
        return None
    return None


def read_folder_features(folder: Path, split: str) -> Features | None:
    """Return the columns of a split of a save_to_disk folder, or of a folder that is one split."""
    for info_path in (folder / split / "dataset_info.json", folder / "dataset_info.json"):
        if info_path.is_file():
            info = json.loads(info_path.read_text(encoding="utf-8"))
            return Features.from_dict(info["features"])
    return None


def read_json_features(path: Path) -> Features | None:
    """Return the columns of the first row of JSON lines, or of one JSON array."""
    with path.open(encoding="utf-8") as file:
        head = file.read(HEAD_BYTES).lstrip().removeprefix("[").lstrip()
    row, _ = json.JSONDecoder().raw_decode(head)
    if not isinstance(row, dict):
        return None
    return Features.from_arrow_schema(pa.Table.from_pylist([row]).schema)
