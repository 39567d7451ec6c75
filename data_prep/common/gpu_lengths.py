"""The longest max_length that a recipe's card holds, by eval.fit's prediction.

Imports torch, transformers and TRL: several seconds. Import it where a length is about to be recommended.
"""

import ast
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path

from trl import ModelConfig, SFTConfig

from .gpu_advice import longest_length
from .gpu_cards import CARDS, TABLE, Card
from .gpu_configs import load_config
from .gpu_engines import Engine
from .gpu_memory import predict
from .gpu_settings import ATTENTION, RunSettings
from .recipe_settings import Settings, read_defaults, read_yaml

SIZE = re.compile(r"one (\d+) (?:to \d+ )?GB GPU")  # in the first line of a recipe


def find_recipe_card(recipe: str | Path) -> Card | None:
    """Return the card of the memory that a recipe's first line names, None where it names none."""
    tree = ast.parse(Path(recipe).read_text(encoding="utf-8"))
    size = SIZE.search(ast.get_docstring(tree) or "")
    if size is None:
        return None
    cards = [CARDS[name] for name in TABLE if CARDS[name].gib <= int(size.group(1))]
    return max(cards, key=lambda card: card.gib, default=None)


def read_trl_defaults() -> dict[str, object]:
    """Return what TRL takes where a recipe is silent."""
    defaults = {}
    for dataclass in (SFTConfig, ModelConfig):
        for field in fields(dataclass):
            if field.default is not MISSING:
                defaults[field.name] = field.default
    return defaults


def make_run_settings(values: Mapping[str, object], settings: Settings) -> RunSettings:
    """Return what a GPU runs for a recipe's values and the settings that flags have made of them."""
    values = read_trl_defaults() | values
    own = {field.name for field in fields(RunSettings)}
    chosen = {name: value for name, value in values.items() if name in own and value is not None}
    chosen.setdefault("attn_implementation", ATTENTION)
    checkpointing = values.get("activation_checkpointing_kwargs") or {}
    targets = values.get("lora_target_modules")
    if isinstance(targets, list):
        targets = targets[0] if targets == ["all-linear"] else tuple(targets)
    parameters = tuple(values.get("lora_target_parameters") or ())
    rows = settings.per_device_train_batch_size
    return RunSettings(
        **chosen
        | {
            "model_name_or_path": settings.model_name_or_path,
            "lora_target_modules": targets,
            "lora_target_parameters": parameters,
            "every_n_layers": checkpointing.get("every_n_layers", 1),
            "max_length": settings.max_length or Settings.max_length,
            "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": settings.global_batch_size // rows,
            "packing": settings.packing or settings.padding_free,
        }
    )


def find_longest_length(recipe: str, config: str | None, settings: Settings, wanted: int, card: Card) -> int:
    """Return the wanted length where one GPU of the card holds it, else the longest that it does, 0 where none.

    Raises UsageError where the model cannot be read or traced.
    """
    values = read_defaults(recipe)
    if config:
        values = values | read_yaml(config)
    run = make_run_settings(values, settings)
    shapes = load_config(run.model_name_or_path, settings.model_revision).config
    engine = Engine()
    if predict(replace(run, max_length=wanted), shapes, engine).fits(card.gib):
        return wanted
    return longest_length(run, shapes, engine, card) or 0
