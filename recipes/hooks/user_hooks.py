"""A user's own file, named by --hooks: the TrainerCallbacks that it defines, made with the trainer."""

import importlib.util
import re
import sys
from pathlib import Path

from transformers import Trainer, TrainerCallback

from .messages import UsageError


def import_hook_files(paths: list[str]) -> None:
    """Import the files before anything is loaded. Raises UsageError for one that is missing or defines no callback."""
    for path in paths:
        if not Path(path).is_file():
            raise UsageError(f"--hooks {path}: no such file")
        import_file(path)
        if not defined_callbacks(path):
            raise UsageError(f"--hooks {path}: defines no TrainerCallback (a class that is made with the trainer)")


def module_name(path: str) -> str:
    """Return a name that no other file has."""
    return "user_hook_" + re.sub(r"\W", "_", str(Path(path).resolve()))


def import_file(path: str) -> None:
    name = module_name(path)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look there
    spec.loader.exec_module(module)


def defined_callbacks(path: str) -> list[type[TrainerCallback]]:
    """Return the callback classes that an imported file itself defines, in their order."""
    module = sys.modules[module_name(path)]
    classes = []
    for name, value in vars(module).items():
        is_callback = isinstance(value, type) and issubclass(value, TrainerCallback)
        if is_callback and value.__module__ == module.__name__ and not name.startswith("_"):
            classes.append(value)
    return classes


def make_callbacks(paths: list[str], trainer: Trainer) -> list[TrainerCallback]:
    """Return the callbacks of the files, made with the trainer, or with nothing where they have no __init__."""
    callbacks = []
    for path in paths:
        for callback_class in defined_callbacks(path):
            if callback_class.__init__ is object.__init__:
                callbacks.append(callback_class())
            else:
                callbacks.append(callback_class(trainer))
    return callbacks
