"""Read a recipe's settings without starting it: DEFAULTS < YAML < flags."""

import argparse
import ast
import difflib
import math
import runpy
import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from .errors import UsageError
from .yaml_text import load_yaml


@dataclass
class Settings:
    """What decides which tokens are trained, by TRL's names and with the values that TRL and RecipeArguments give them
    where a recipe is silent."""

    model_name_or_path: str | None = None
    model_revision: str = "main"
    chat_template_path: str | None = None
    eos_token: str | None = None
    assistant_only_loss: bool = False
    completion_only_loss: bool | None = None
    dataset_text_field: str = "text"
    packing: bool = False
    packing_strategy: str = "bfd"
    padding_free: bool = False
    max_length: int | None = 1024
    truncation_mode: str = "keep_start"
    shuffle_dataset: bool = False
    dataset_num_proc: int | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str = "test"
    eval_rows: int = 0
    seed: int = 42
    global_batch_size: int = 16
    per_device_train_batch_size: int = 8
    num_train_epochs: float = 3.0
    max_steps: int = -1
    one_stream: bool = False  # of the nanochat recipes alone
    whole_steps: bool = False  # of the nanochat recipes alone
    data: str = ""  # how messages about rows begin: load_rows sets it, no recipe does


DEFAULTS = {field.name: field.default for field in fields(Settings) if field.name != "data"}
CHOICES = {"packing_strategy": ("bfd", "bfd_split", "wrapped"), "truncation_mode": ("keep_start", "keep_end")}
AT_LEAST = {"max_length": 1, "global_batch_size": 1, "per_device_train_batch_size": 1, "eval_rows": 0, "seed": 0}
LENGTH_REMEDY = (
    "python -m data_prep.filter --max_length drops longer rows, python -m data_prep.expand_turns makes rows of their "
    "earlier answers, and a recipe for a larger card holds longer ones"
)


# -- flags of commands ------------------------------------------------------------------------------------------------
def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text} is neither true nor false")
    return text.lower() == "true"


FLAGS = {  # a recipe's names that commands take as flags, and their types
    "model_name_or_path": str,
    "chat_template_path": str,
    "assistant_only_loss": boolean,
    "dataset_train_split": str,
    "dataset_test_split": str,
    "max_length": int,
    "packing": boolean,
    "packing_strategy": str,
    "global_batch_size": int,
    "per_device_train_batch_size": int,
    "num_train_epochs": float,
    "max_steps": int,
    "eval_rows": int,
    "seed": int,
}


def add_recipe_flags(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Add --recipe, --config, and a flag for each of the names."""
    parser.add_argument("--recipe", required=True, help="a recipes/NAME.py, whose DEFAULTS hold")
    parser.add_argument("--config", help="YAML file of a recipe's names: DEFAULTS < YAML < flags")
    for name in names:
        parser.add_argument(f"--{name}", type=FLAGS[name], help="as in the recipe")


# -- a recipe file ----------------------------------------------------------------------------------------------------
def read_defaults(recipe: str | Path) -> dict[str, object]:
    """Return the DEFAULTS of a recipe file. Raises UsageError.

    Running the whole file takes 5 s of imports: only where what stands above DEFAULTS needs more than the standard
    library is all of it run.
    """
    path = Path(recipe)
    if not path.is_file():
        raise UsageError(f"{recipe}: no such recipe: pass a file like recipes/qwen3_qlora.py as --recipe")
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError) as error:
        raise UsageError(f"{recipe}: not a Python file ({error}): pass a recipe as --recipe") from None
    defaults_at = find_defaults(tree)
    if defaults_at is None:
        raise UsageError(f"{recipe}: has no DEFAULTS: pass a recipe like recipes/qwen3_qlora.py")
    head = [node for node in tree.body[: defaults_at + 1] if is_light(node)]
    scope = {"__file__": str(path), "__name__": path.stem}
    try:
        exec(compile(ast.Module(head, []), str(path), "exec"), scope)
    except Exception:
        try:
            scope = runpy.run_path(str(path))
        except Exception as error:
            raise UsageError(f"{recipe}: DEFAULTS cannot be read ({type(error).__name__}: {error}): mend it") from None
    if not isinstance(scope["DEFAULTS"], dict):
        raise UsageError(f"{recipe}: DEFAULTS is no dict: write DEFAULTS = dict(name=value, ...)")
    return scope["DEFAULTS"]


def find_defaults(tree: ast.Module) -> int | None:
    """Return the position of the statement that assigns DEFAULTS, or None."""
    for position, node in enumerate(tree.body):
        if isinstance(node, ast.Assign) and any(getattr(name, "id", "") == "DEFAULTS" for name in node.targets):
            return position
    return None


def is_light(node: ast.stmt) -> bool:
    """Return whether a statement is an assignment, a function, or an import of the standard library."""
    if isinstance(node, ast.Import):
        modules = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        modules = [node.module or ""]
    else:
        return isinstance(node, (ast.Assign, ast.AnnAssign, ast.FunctionDef))
    return all(module.split(".")[0] in sys.stdlib_module_names for module in modules)


def read_yaml(path: str | Path) -> dict[str, object]:
    """Return the names and values of a YAML file, as --config takes it. Raises UsageError."""
    try:
        values = load_yaml(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}): pass a YAML file as --config") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not YAML ({' '.join(str(error).split())}): mend it") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path}: holds no names: write lines of `name: value`")
    return values


# -- the settings -----------------------------------------------------------------------------------------------------
def read_settings(
    recipe: str | Path | None = None, config: str | Path | None = None, flags: dict[str, object] | None = None
) -> Settings:
    """Return the settings of a recipe, changed by a YAML file and then by flags, None where one was not passed.

    Raises UsageError for a value of another type, and for a name that is nearly one of ours.
    """
    sources = []
    if recipe:
        sources.append((recipe, read_defaults(recipe)))
    if config:
        sources.append((config, read_yaml(config)))
    passed = {name: value for name, value in (flags or {}).items() if value is not None}
    sources.append(("the command line", passed))
    settings = Settings()
    source_of = {}
    for source, values in sources:
        check_spelling(source, values)
        for name in values.keys() & DEFAULTS.keys():
            setattr(settings, name, values[name])
            source_of[name] = source
    for name in DEFAULTS:
        if name in source_of:
            setattr(settings, name, check_type(name, getattr(settings, name), source_of[name]))
    if settings.global_batch_size % settings.per_device_train_batch_size:
        raise UsageError(
            f"global_batch_size {settings.global_batch_size}: must be a multiple of per_device_train_batch_size "
            f"{settings.per_device_train_batch_size}, change one of them"
        )
    if settings.packing and settings.max_length is None:
        raise UsageError("max_length: packing needs one, pass --max_length or --packing false")
    return settings


def check_spelling(source: str | Path, names: dict[str, object]) -> None:
    """Raise UsageError for a name that is nearly one of ours; a recipe has many others."""
    for name in names:
        if name in DEFAULTS:
            continue
        near = difflib.get_close_matches(str(name), DEFAULTS, n=1, cutoff=0.9)
        if near:
            raise UsageError(f"{source}: {name} is no name that a recipe knows: write {near[0]}")


def check_type(name: str, value: object, source: str | Path) -> object:
    """Return a value that has the type of its name: YAML and recipes may hold any other. Raises UsageError."""
    default = DEFAULTS[name]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is None and (default is None or name == "max_length"):
        return None
    if isinstance(default, bool) or name == "completion_only_loss":
        fits = isinstance(value, bool)
        wanted = "true or false"
    elif name in CHOICES:
        fits = value in CHOICES[name]
        wanted = "one of " + ", ".join(CHOICES[name])
    elif isinstance(default, float):
        fits = is_number and 0 < value < math.inf
        wanted = "a number above 0"
    elif isinstance(default, int) or name == "dataset_num_proc":
        fits = is_number and isinstance(value, int) and value >= AT_LEAST.get(name, -1)
        wanted = "a whole number"
        if name in AT_LEAST:
            wanted += f" of at least {AT_LEAST[name]}"
    else:
        fits = isinstance(value, str)
        wanted = "text"
    if not fits:
        raise UsageError(f"{source}: {name} is {value!r}, it must be {wanted}")
    return value


def require_named_mask(settings: Settings, assistant_only_loss: bool | None) -> None:
    """Raise UsageError where settings for compiled sets, which have their labels, are to say what is trained of rows of
    messages. assistant_only_loss: the flag, None where it was not passed."""
    if settings.padding_free and not settings.assistant_only_loss and assistant_only_loss is None:
        raise UsageError(
            "assistant_only_loss: these settings are for compiled sets and name no mask: pass --assistant_only_loss "
            "true, or false to train every token"
        )
