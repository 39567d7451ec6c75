"""A user's own file, named by --hooks: the TrainerCallbacks that it defines, made with the trainer."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from transformers import Trainer, TrainerCallback

from .messages import UsageError


def check_hook_files(paths: list[str]) -> None:
    """Refuse a file that is not there. Raises UsageError."""
    for path in paths:
        if not Path(path).is_file():
            raise UsageError(f"--hooks {path}: no such file")


def import_file(path: str) -> ModuleType:
    """Import a file under its own name, with what lies beside it within its reach."""
    name = f"user_hook_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look there
    spec.loader.exec_module(module)
    return module


def defined_callbacks(path: str) -> list[type[TrainerCallback]]:
    """Return the callback classes that a file itself defines, in their order. Raises UsageError where it has none."""
    module = import_file(path)
    classes = []
    for name, value in vars(module).items():
        is_callback = isinstance(value, type) and issubclass(value, TrainerCallback)
        if is_callback and value.__module__ == module.__name__ and not name.startswith("_"):
            classes.append(value)
    if not classes:
        raise UsageError(f"--hooks {path}: defines no TrainerCallback (a class that is made with the trainer)")
    return classes


def make_callbacks(paths: list[str], trainer: Trainer) -> list[TrainerCallback]:
    """Return the callbacks of all files, made with the trainer, or with nothing where they have no __init__."""
    callbacks = []
    for path in paths:
        for callback_class in defined_callbacks(path):
            if callback_class.__init__ is object.__init__:
                callbacks.append(callback_class())
            else:
                callbacks.append(callback_class(trainer))
    return callbacks
