"""What must stand before the imports that take seconds: the first line, the path for `data_prep`, fewer messages."""

import os
import sys
from pathlib import Path

RECIPES = Path(__file__).resolve().parents[1]
REPOSITORY = RECIPES.parent
MAIN_SCRIPT = Path(sys.argv[0] or ".").resolve()


def begin() -> None:
    """Say that a recipe loads (half a minute on a slow disk), and put the repository on the path.

    The repository stands behind the folder of the recipes, which the recipe itself put first: `data_prep` is found
    from any working directory and under PYTHONSAFEPATH=1, and before an installed package of that name.
    """
    if MAIN_SCRIPT.parent == RECIPES and os.environ.get("RANK", "0") == "0":
        print(f"{MAIN_SCRIPT.name}: loading torch, transformers and TRL", flush=True)
    if str(REPOSITORY) not in sys.path:
        sys.path.insert(1, str(REPOSITORY))
    from .quiet import silence  # of data_prep, which is found now

    silence()


begin()
