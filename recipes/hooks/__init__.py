"""What a recipe imports where this folder lies beside it: it refuses what would waste a run, survives faults, shows.

A recipe takes `SFTTrainer` and `TrlParser` from here, which are TRL's own with more in them, and makes four calls, in
this order: `before_load`, `check_rows`, `before_train`, `after_train`. On one process it trains the same weights with
this package as without, byte for byte (tests/recipes/test_recipes.py). On several, `parity.py` keeps what one process
trains: a copy without the package trains a few rows twice where they do not divide, and more in bf16 under ZeRO and
FSDP2.
"""

from . import startup
from .arguments import TrlParser
from .run import after_train, before_load, before_train, check_rows
from .trainer import SFTTrainer

__all__ = ["SFTTrainer", "TrlParser", "after_train", "before_load", "before_train", "check_rows", "startup"]
