"""Test only: `zero_shim.py RECIPE FLAGS` runs a recipe whose weights ZeRO-3 cuts whatever their size.

DeepSpeed keeps weights below 100,000 numbers whole on every rank, and a tiny model has no others. The threshold must
stand in its config before the model is built, which is before a recipe makes any callback.
"""

import runpy
import sys

from accelerate.utils import DeepSpeedPlugin

make_config = DeepSpeedPlugin.__post_init__


def make_config_without_threshold(plugin: DeepSpeedPlugin) -> None:
    make_config(plugin)
    plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0


DeepSpeedPlugin.__post_init__ = make_config_without_threshold

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
