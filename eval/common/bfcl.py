"""The files of the Berkeley Function Calling Leaderboard, version 4, and what both commands on them share.

Answers stand in possible_answer/ beside a file, the functions of classes in multi_turn_func_doc/. A function is BFCL's
own {name, description, parameters}, whose types have other words than JSON schema.
"""

import argparse
import hashlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from data_prep.common.answer_formats import PYTHON_ERRORS, Tools
from data_prep.common.errors import UsageError
from data_prep.common.parsing import parse_tools
from eval.common.arguments import add_model_arguments, first_line, positive
from eval.common.measure import read_rows
from eval.common.models import choose_mode
from eval.common.scores import grouped, parser_of, rates, show, write_scores

Task = TypeVar("Task")

CLASS_FILES = {  # of the functions of a class that a conversation involves
    "GorillaFileSystem": "gorilla_file_system",
    "MathAPI": "math_api",
    "MessageAPI": "message_api",
    "TwitterAPI": "posting_api",
    "TicketAPI": "ticket_api",
    "TradingBot": "trading_bot",
    "TravelAPI": "travel_booking",
    "VehicleControlAPI": "vehicle_control",
}
JSON_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string", None: "string"}
PYTHON_NOTE = " Note that the provided function is in Python 3 syntax."
FLOAT_NOTE = " This is a float type value."


# -- functions --------------------------------------------------------------------------------------------------------
def tool_of(function: dict) -> dict:
    """Return a function of BFCL as a tool of the chat API, its words and types as BFCL itself shows them to models."""
    shown = function | {
        "description": function.get("description", "") + PYTHON_NOTE,
        "parameters": convert_schema(function["parameters"]),
    }
    return {"type": "function", "function": shown}


def convert_schema(schema: dict) -> dict:
    """Return the JSON schema of a schema in BFCL's words."""
    kind = schema.get("type")
    converted = schema | {"type": JSON_TYPES.get(kind, kind)}
    if "properties" in schema:
        properties = {}
        for name, inner in schema["properties"].items():
            properties[name] = convert_schema(inner)
            if inner.get("type") == "float":
                properties[name] |= {"format": "float", "description": inner.get("description", "") + FLOAT_NOTE}
        converted["properties"] = properties
    if "items" in schema:
        converted["items"] = convert_schema(schema["items"])
    return converted


def list_tools(functions: Sequence[dict]) -> list[dict]:
    """Return functions as tools. Raises InvalidRow for one that is none."""
    return parse_tools([tool_of(function) for function in functions])


def list_properties(functions: Sequence[dict]) -> Tools:
    """Return the parameters of each function and their schemas, for python_calls."""
    return {function["name"]: function["parameters"]["properties"] for function in functions}


# -- rows -------------------------------------------------------------------------------------------------------------
class BfclFiles:
    """BFCL's files. Each that is read goes into the digest."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self.functions: dict[Path, list[dict]] = {}  # of the files of classes, which are read once

    def read(self, path: Path) -> list[dict]:
        """Return the rows of a file. Raises UsageError."""
        if path.is_dir():
            raise UsageError(f"{path} is a folder: pass BFCL's files")
        rows = read_rows(path, "test")
        self.digest.update(path.read_bytes())
        return rows

    def read_answers(self, paths: Sequence[Path]) -> dict[str, list]:
        """Return the ground truth of each row by its id. Raises UsageError."""
        answers = {}
        for path in paths:
            for row in self.read(path):
                try:
                    answers[row["id"]] = row["ground_truth"]
                except (KeyError, TypeError):
                    raise UsageError(
                        "the answers are not rows of id and ground_truth: pass BFCL's files of possible_answer"
                    ) from None
        return answers

    def read_functions(self, path: Path) -> list[dict]:
        """Return the functions of a class's file. Raises UsageError."""
        if path not in self.functions:
            self.functions[path] = self.read(path)
        return self.functions[path]


@dataclass
class BfclRow:
    """A row of BFCL's. place: its file and number, for messages; truth: its answer, None where there is none; folder:
    of its file."""

    row: dict
    place: str
    truth: list | None
    folder: Path
    files: BfclFiles

    @property
    def category(self) -> str:
        return re.sub(r"_\d.*", "", self.row["id"])

    def list_functions(self) -> list[dict]:
        """Return the functions of the classes that the row involves. Raises UsageError."""
        functions = []
        for name in self.row["involved_classes"]:
            if name not in CLASS_FILES:
                raise UsageError(f"{self.place} involves {name}, whose functions are not known here: leave the row out")
            path = self.folder / "multi_turn_func_doc" / f"{CLASS_FILES[name]}.json"
            functions.extend(self.files.read_functions(path))
        return functions

    def require_truth(self) -> list:
        """Return the answer. Raises UsageError where there is none."""
        if self.truth is None:
            raise UsageError(
                f"{self.place} ({self.row['id']}) has no answer: pass the file of its answers with --answers"
            )
        return self.truth


def read_tasks(args: argparse.Namespace, files: BfclFiles, list_tasks: Callable[[BfclRow], list[Task]]) -> list[Task]:
    """Return the tasks of the data in the order of its files.

    list_tasks: those of a row; it raises UsageError, and any error of python where the row is not as BFCL writes it.
    Raises UsageError.
    """
    if args.answers:
        answer_files = args.answers
    else:
        beside = [path.parent / "possible_answer" / path.name for path in args.data]
        answer_files = [path for path in beside if path.is_file()]
    answers = files.read_answers(answer_files)
    tasks = []
    for path in args.data:
        rows = list(enumerate(files.read(path), 1))
        if args.rows and args.rows < len(rows):
            drawn = random.Random(args.seed).sample(range(len(rows)), args.rows)
            rows = [rows[index] for index in sorted(drawn)]
        for number, row in rows:
            place = f"{path}, row {number}"
            try:
                tasks.extend(list_tasks(BfclRow(row, place, answers.get(row["id"]), path.parent, files)))
            except (*PYTHON_ERRORS, LookupError, AttributeError) as error:
                raise UsageError(
                    f"{place} is not as BFCL 4 writes it ({first_line(error)}): pass its own files"
                ) from None
    if not tasks:
        raise UsageError("the data holds no rows: pass files of BFCL")
    return tasks


# -- the commands -----------------------------------------------------------------------------------------------------
def list_modes(tokenizer: PreTrainedTokenizerBase, wanted: Sequence[str] | None, run: Path) -> list[str | None]:
    """Return the modes to ask in: the wanted ones, by default both; [None] for a template without two modes.

    run: what a message names. Raises UsageError for a mode that the template does not have.
    """
    if wanted:
        return [choose_mode(tokenizer, mode, run) for mode in dict.fromkeys(wanted)]
    if choose_mode(tokenizer, None, run) is None:
        return [None]
    return ["think", "no_think"]


def bfcl_parser(doc: str) -> argparse.ArgumentParser:
    """Return the arguments of a command on BFCL's files."""
    parser = parser_of(doc)
    parser.add_argument("run", type=Path, help="run folder: a model with its tokenizer, or an adapter")
    parser.add_argument("--base", help="of an adapter (default: the one that it names)")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="BFCL_v4_*.json")
    parser.add_argument("--answers", type=Path, nargs="+", help="their answers (default: possible_answer/ beside them)")
    parser.add_argument("--mode", choices=["think", "no_think"], nargs="+", help="of hybrid models (default: both)")
    parser.add_argument("--rows", type=positive, help="so many rows of each file, drawn by --seed (default: all)")
    parser.add_argument("--seed", type=int, default=42, help="of --rows")
    parser.add_argument("--out", type=Path, help="folder of the scores (default: eval/ in the run)")
    add_model_arguments(parser, max_new_tokens=512)
    return parser


def report(
    args: argparse.Namespace,
    name: str,
    metrics: dict[str, str],
    family: str,
    lines: list[dict],
    files: BfclFiles,
    **more: str,
) -> None:
    """Write and show the scores of a command, by category and mode.

    metrics: {metric: its flag in the lines}. more: settings besides.
    """
    settings = {
        "model": args.run.resolve().name,
        "data": [path.name for path in args.data],
        "family": family,
        "rows": args.rows,
        "seed": args.seed,
        "max_new_tokens": args.max_new_tokens,
        "batch_size": args.batch_size,
        "load_in_4bit": args.load_in_4bit,
        **more,
    }
    groups = grouped(lines, metrics, "category", "mode")
    out = args.out or args.run / "eval"
    show(write_scores(out, name, settings, rates(lines, metrics), groups, lines, files.digest.hexdigest()))
