"""Which private names of other packages we use: each stands in a table, and is still there.

After an upgrade the first test says in a sentence which of them are gone; the second finds uses that are in no table.
"""

import ast
import importlib
import inspect

import pytest
import transformers
import trl
from hooks.private_names import PRIVATE_NAMES

from data_prep.common import fast_tokens
from tests.helpers.runs import REPO

HOOKS = sorted((REPO / "recipes").rglob("*.py"))


def resolve(path):
    """The object of a dotted path: the longest importable module, then attributes."""
    parts = path.split(".")
    for size in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:size]))
        except ImportError:
            continue
        for name in parts[size:]:
            value = getattr(value, name)
        return value
    raise AttributeError(path)


@pytest.mark.parametrize("path", PRIVATE_NAMES)
def test_every_private_name_is_still_there(path):
    try:
        resolve(path)
    except AttributeError:
        versions = f"transformers {transformers.__version__}, TRL {trl.__version__}"
        pytest.fail(f"{path} is gone in {versions}; it was {PRIVATE_NAMES[path]}", pytrace=False)


def test_the_fast_path_finds_what_it_needs():
    """Where a name is gone, tokens and mask take the plain path, which is right and slower."""
    missing = fast_tokens.missing_name()
    if missing is not None:
        pytest.fail(f"tokens and mask are slow with transformers {transformers.__version__}: {missing}", pytrace=False)


def test_overridden_methods_are_called_as_before():
    """The signatures that the subclass relies on."""
    for name, parameters in {
        "get_batch_samples": ["self", "epoch_iterator", "num_batches", "device"],
        "_get_num_items_in_batch": ["self", "batch_samples", "device"],
        "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
        "_get_grad_norm": ["self", "model", "grad_norm"],
        "log": ["self", "logs", "start_time"],
        "_save_checkpoint": ["self", "model", "trial"],
        "_push_from_checkpoint": ["self", "checkpoint_folder"],
    }.items():
        assert list(inspect.signature(getattr(trl.SFTTrainer, name)).parameters) == parameters, name


def test_no_private_name_is_used_that_stands_in_no_table():
    known = {path.rpartition(".")[2] for path in PRIVATE_NAMES}
    unknown = []
    for path in HOOKS:
        tree = ast.parse(path.read_text())
        own = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        own |= {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and getattr(node.value, "id", "") == "self"
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "os":
                continue  # os._exit is documented
            if isinstance(node, ast.Attribute):
                name = node.attr
            elif isinstance(node, ast.alias):
                name = node.name.rpartition(".")[2]
            elif isinstance(node, ast.FunctionDef):
                name = node.name  # an override
            else:
                continue
            private = name.startswith("_") and not name.startswith("__")
            if private and name not in known and (name not in own or isinstance(node, ast.FunctionDef)):
                unknown.append(f"{path.relative_to(REPO)}:{node.lineno}: {name}")
    assert not unknown, "\n".join(unknown)
