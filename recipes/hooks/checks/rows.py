"""What a row holds: turns of a conversation, text, tokens, or columns that nobody reads."""

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Json, Value
from trl import ScriptArguments, SFTConfig

from data_prep.common.errors import InvalidRow
from data_prep.common.rows import is_empty_turn
from data_prep.common.sources.detect import normalize_arguments
from data_prep.common.template_arguments import TemplateArguments, read_arguments

from ..messages import UsageError, relative_path, say
from .compiled import check_compiled_settings, check_settings_of_other_rows, is_compiled
from .ranks import refuse_on_all_ranks

if TYPE_CHECKING:
    from ..trainer import SFTTrainer

HEAD_BYTES = 16 << 20  # of a JSON file: its first row stands in them, or the loader is left to it
SHOWN_ROWS = 9
BATCH_ROWS = 1000  # read at a time
TRL_COLUMNS = {"messages", "completion", "text", "input_ids"}  # without any of them a recipe's to_messages reads a row
UNREADABLE = (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError)  # heads of files
KWARGS = "chat_template_kwargs"
READ_COLUMNS = ("messages", "prompt", "conversations")  # that TRL reads, beside dataset_text_field


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
            check_turns(rows, split, script_args, training_args)
            path = training_args.chat_template_path
            if path is not None:
                arguments = read_arguments(Path(path).read_text(encoding="utf-8"), relative_path(path))
                check_template_arguments(rows, split, script_args.dataset_name, arguments)


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
    out = Path("data") / Path(script_args.dataset_name).stem
    if out.exists():
        out = out.with_name(f"{out.name}-messages")
    arguments = choose_arguments(features, script_args)
    return f"python -m data_prep.normalize {arguments} --out {shlex.quote(str(out))} makes messages of them"


def choose_arguments(features: Features, script_args: ScriptArguments) -> str:
    """Return the first arguments of normalize.py for the set, whose rows have these columns."""
    name = script_args.dataset_name
    rows = name
    if script_args.dataset_config and not Path(name).exists():
        rows = f"{name}:{script_args.dataset_config}"
    rows = shlex.quote(rows)
    if "prompt" in features and "completion" in features:
        return f"prompt_completion {rows}"
    if "messages" in features or holds_turns(features.get("conversations")):
        return f"messages {rows}"
    return normalize_arguments(features, rows)


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


# -- turns ------------------------------------------------------------------------------------------------------------
@dataclass
class RowFaults:
    """Positions of rows, from 0, by what is wrong with their turns."""

    without_assistant: list[int] = field(default_factory=list)  # in what the loss is taken over
    empty_answers: list[int] = field(default_factory=list)  # an assistant turn has neither text nor tool calls
    unanswered: list[int] = field(default_factory=list)  # the last turn is not the assistant's
    empty_questions: list[int] = field(default_factory=list)  # a turn of the user or the system has no text


def check_turns(rows: Dataset, split: str, script_args: ScriptArguments, training_args: SFTConfig) -> None:
    """Raise UsageError for rows in which the assistant says nothing, where TRL stops at one or trains them in silence.

    What else data_prep/check.py finds in turns, and what leaves something to train, is said.
    """
    columns = trained_columns(rows, training_args)
    if not columns:
        return
    faults = find_faults(rows, columns)
    name = script_args.dataset_name
    if faults.without_assistant and training_args.assistant_only_loss:
        state = describe_rows(faults.without_assistant, rows, split, "have no assistant turn")
        raise UsageError(f"dataset {name}: {state}: {suggest_set_without(rows, script_args)}")
    if faults.empty_answers and "empty_answers" not in script_args.allow:
        state = describe_rows(faults.empty_answers, rows, split, "have an answer without text or tool calls")
        raise UsageError(
            f"dataset {name}: {state}: {suggest_set_without(rows, script_args)}, --allow empty_answers trains them"
        )
    if faults.unanswered and training_args.assistant_only_loss:
        state = describe_rows(faults.unanswered, rows, split, "end with a turn that is not the assistant's")
        say(f"{state}: nothing of that turn is trained")
    if faults.empty_questions:
        say(describe_rows(faults.empty_questions, rows, split, "have a turn of the user or system without text"))


def trained_columns(rows: Dataset, training_args: SFTConfig) -> list[str]:
    """Return the columns of conversations, or of prompt and completion as text, that the loss is taken over."""
    features = rows.features
    if not holds_conversations(features) and not holds_text_pairs(features):
        return []
    if "messages" in features:
        return ["messages"]
    if training_args.completion_only_loss is not False:  # TRL's default for such rows
        return ["completion"]
    return ["prompt", "completion"]


def holds_text_pairs(features: Features) -> bool:
    """Return whether rows are a prompt and a completion in plain text."""
    if "messages" in features or not {"prompt", "completion"} <= set(features):
        return False
    dtypes = {getattr(features[name], "dtype", None) for name in ("prompt", "completion")}
    return dtypes <= {"string", "large_string"}


def find_faults(rows: Dataset, columns: list[str]) -> RowFaults:
    """Return which rows have which fault in the turns of these columns."""
    faults = RowFaults()
    number = 0
    for batch in rows.select_columns(columns).iter(BATCH_ROWS):
        for values in zip(*(batch[column] for column in columns), strict=True):
            turns = []
            for column, value in zip(columns, values, strict=True):
                turns += read_turns(column, value)
            note_faults(faults, number, turns)
            number += 1
    return faults


def read_turns(column: str, value: list | str | None) -> list[dict]:
    """Return the turns of a column of a row; text is one turn."""
    if isinstance(value, str):
        role = "user" if column == "prompt" else "assistant"
        return [{"role": role, "content": value}]
    return [turn for turn in value or [] if isinstance(turn, dict)]


def note_faults(faults: RowFaults, number: int, turns: list[dict]) -> None:
    """Add a row's number to the faults that its turns have."""
    roles = [turn.get("role") for turn in turns]
    empty_roles = {turn.get("role") for turn in turns if is_empty(turn)}
    if "assistant" not in roles:
        faults.without_assistant.append(number)
    elif roles[-1] != "assistant":
        faults.unanswered.append(number)
    if "assistant" in empty_roles:
        faults.empty_answers.append(number)
    if not empty_roles.isdisjoint(("user", "system")):
        faults.empty_questions.append(number)


def is_empty(turn: dict) -> bool:
    """Return whether a turn is empty by the rule of data_prep/check.py; content in parts is left to the template."""
    content = turn.get("content")
    if "role" not in turn or not isinstance(content, str | None):
        return False
    return is_empty_turn(turn)


def check_own_template_arguments(trainer: "SFTTrainer", script_args: ScriptArguments) -> None:
    """Raise UsageError for rows whose chat_template_kwargs the tokenizer's own template does not read or take.

    It is known once the trainer is built; a template file is checked by check_rows, before the model is loaded.
    """
    template = trainer.processing_class.chat_template
    if trainer.args.chat_template_path is not None or not isinstance(template, str):
        return
    arguments = read_arguments(template, "the tokenizer's own template")
    splits = {script_args.dataset_train_split: trainer.train_rows}
    if trainer.validation_rows is not None:
        splits["validation"] = trainer.validation_rows
    for split, rows in splits.items():
        check_template_arguments(rows, split, script_args.dataset_name, arguments)


def check_template_arguments(rows: Dataset, split: str, name: str, arguments: TemplateArguments) -> None:
    """Raise UsageError for rows whose chat_template_kwargs hold what a template does not read or take.

    name: of the dataset.
    """
    if KWARGS not in rows.column_names:
        return
    numbers = []
    details = []
    number = 0
    for batch in rows.select_columns([KWARGS]).iter(BATCH_ROWS):
        for template_kwargs in batch[KWARGS]:
            try:
                arguments.check(template_kwargs or {})
            except InvalidRow as error:
                numbers.append(number)
                details.append(error.detail)
            number += 1
    if numbers:
        state = describe_rows(numbers, rows, split, f"have {KWARGS} that do not fit the template")
        raise UsageError(f"dataset {name}: {state}: {details[0]}")


def describe_rows(numbers: list[int], rows: Dataset, split: str, fault: str) -> str:
    """Return how many rows of a split have a fault, and the first of them."""
    shown = ", ".join(str(number) for number in numbers[:SHOWN_ROWS])
    if len(numbers) > SHOWN_ROWS:
        shown += ", …"
    return f"{len(numbers):,} of {len(rows):,} rows of {split} {fault} (rows {shown} from 0)"


def suggest_set_without(rows: Dataset, script_args: ScriptArguments) -> str:
    """Return the command that writes the set without rows in which the assistant says nothing."""
    name = script_args.dataset_name
    features = rows.features
    if Path(name).exists():
        features = read_features(Path(name), script_args.dataset_train_split) or features  # before to_messages
    if Path(name).exists() and "messages" in features:
        command = f"-m data_prep.check {shlex.quote(name)} --fix"
    else:
        command = f"-m data_prep.normalize {choose_arguments(features, script_args)}"
    return f"python {command} --out OUT writes a set without them"


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
