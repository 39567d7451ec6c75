"""Read a recipe's settings without starting it: DEFAULTS < YAML < flags."""

import ast
import difflib
import math
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

from .errors import UsageError

# the names that decide what is trained, with the values that TRL and RecipeArguments give them where a recipe is silent
READ = {
    "model_name_or_path": None, "model_revision": "main", "chat_template_path": None, "eos_token": None,
    "assistant_only_loss": False, "completion_only_loss": None, "dataset_text_field": "text",
    "packing": False, "packing_strategy": "bfd", "padding_free": False, "max_length": 1024,
    "truncation_mode": "keep_start",
    "shuffle_dataset": False, "dataset_num_proc": None, "dataset_train_split": "train", "dataset_test_split": "test",
    "eval_rows": 0, "seed": 42,
    "global_batch_size": 16, "per_device_train_batch_size": 8, "num_train_epochs": 3.0, "max_steps": -1,
    "one_stream": False, "whole_steps": False,  # of the nanochat recipes alone
}  # fmt: skip


CHOICES = {"packing_strategy": ("bfd", "bfd_split", "wrapped"), "truncation_mode": ("keep_start", "keep_end")}


AT_LEAST = {"max_length": 1, "global_batch_size": 1, "per_device_train_batch_size": 1, "eval_rows": 0, "seed": 0}


def read_defaults(recipe):
    """DEFAULTS of a recipe file. Running the whole file takes 5 s of imports, so first only what stands above it and
    needs the standard library; where that is not enough, the whole file. Raises UsageError."""
    path = Path(recipe)
    if not path.is_file():
        raise UsageError(f"{recipe}: no such recipe: pass a file like recipes/qwen3_qlora.py as --recipe")
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError) as error:
        raise UsageError(f"{recipe}: not a Python file ({error}): pass a recipe as --recipe") from None
    keep = []
    for node in tree.body:
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.FunctionDef)) or (
            modules and all(module.split(".")[0] in sys.stdlib_module_names for module in modules)
        ):
            keep.append(node)
        if isinstance(node, ast.Assign) and any(getattr(name, "id", "") == "DEFAULTS" for name in node.targets):
            break
    else:
        raise UsageError(f"{recipe}: has no DEFAULTS: pass a recipe like recipes/qwen3_qlora.py")
    scope = {"__file__": str(path), "__name__": path.stem}
    try:
        exec(compile(ast.Module(keep, []), str(path), "exec"), scope)
    except Exception:
        try:
            scope = runpy.run_path(str(path))
        except Exception as error:
            raise UsageError(f"{recipe}: DEFAULTS cannot be read ({type(error).__name__}: {error}): mend it") from None
    if not isinstance(scope["DEFAULTS"], dict):
        raise UsageError(f"{recipe}: DEFAULTS is no dict: write DEFAULTS = dict(name=value, ...)")
    return scope["DEFAULTS"]


def read_settings(recipe=None, config=None, flags=None):
    """A namespace of READ's names. flags: {name: value}, None where a flag was not given. Raises UsageError."""
    given = [(recipe, read_defaults(recipe) if recipe else {}), (config, read_yaml(config) if config else {})]
    given.append(("the command line", {name: value for name, value in (flags or {}).items() if value is not None}))
    settings, source = dict(READ), {}
    for where, values in given:
        for name in values:
            if near := name not in READ and difflib.get_close_matches(str(name), READ, 1, 0.9):
                raise UsageError(f"{where}: {name} is no name that a recipe knows: write {near[0]}")
        settings |= {name: values[name] for name in READ if name in values}
        source |= {name: where for name in READ if name in values}
    for name, value in settings.items():
        settings[name] = check_type(name, value, source.get(name))
    settings = SimpleNamespace(**settings, data="")  # load_rows says which
    if settings.global_batch_size % settings.per_device_train_batch_size:
        raise UsageError(
            f"global_batch_size {settings.global_batch_size}: must be a multiple of per_device_train_batch_size "
            f"{settings.per_device_train_batch_size}, change one of them"
        )
    if settings.packing and settings.max_length is None:
        raise UsageError("max_length: packing needs one, pass --max_length or --packing false")
    return settings


def require_named_mask(settings: SimpleNamespace, assistant_only_loss: bool | None) -> None:
    """Raise UsageError where a recipe or config for compiled sets, which have their labels, is to say what is trained of
    rows of messages. assistant_only_loss: the flag, None where it was not passed."""
    if settings.padding_free and not settings.assistant_only_loss and assistant_only_loss is None:
        raise UsageError(
            "assistant_only_loss: these settings are for compiled sets and name no mask: pass --assistant_only_loss "
            "true, or false to train every token"
        )


def read_yaml(path):
    """{name: value} of a YAML file, as --config takes it. Raises UsageError."""
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}): pass a YAML file as --config") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not YAML ({' '.join(str(error).split())}): mend it") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path}: holds no names: write lines of `name: value`")
    return values


def check_type(name, value, where):
    """The value where it has the name's type; YAML and a careless recipe may give any other. Raises UsageError."""
    default, number = READ[name], isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is None and (default is None or name == "max_length"):
        return None
    if isinstance(default, bool) or name == "completion_only_loss":
        fine, wanted = isinstance(value, bool), "true or false"
    elif name in CHOICES:
        fine, wanted = value in CHOICES[name], "one of " + ", ".join(CHOICES[name])
    elif isinstance(default, float):
        fine, wanted = number and 0 < value < math.inf, "a number above 0"
    elif isinstance(default, int) or name == "dataset_num_proc":
        fine = number and isinstance(value, int) and value >= AT_LEAST.get(name, -1)
        wanted = "a whole number" + (f" of at least {AT_LEAST[name]}" if name in AT_LEAST else "")
    else:
        fine, wanted = isinstance(value, str), "text"
    if not fine:
        raise UsageError(f"{where}: {name} is {value!r}, it must be {wanted}")
    return value
