"""Run a recipe on a Ray cluster: a worker a GPU, DDP between them, restarted from the newest checkpoint when one dies.

    python accelerate_configs/cluster/ray_train.py --workers 16 --max_failures 3 recipes/qwen3_lora.py --seed 1

Needs `pip install "ray[train]"` (2.60), and the repository at the same path on every node, as the image of Dockerfile
has it; --output_dir must be storage that every node sees. First the flags of this file, then the recipe and its own.
A recipe's main() runs in a thread there: no signal saves it, a stop costs what came after the newest checkpoint.
"""

import argparse
import os
import runpy
import sys
from pathlib import Path

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def run_recipe(job: dict[str, object]) -> None:
    """Run main() of a recipe in a worker, whose process group Ray has made. Raises RuntimeError where it is refused."""
    recipe = str(job["recipe"])
    if not job["use_gpu"]:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    os.chdir(str(job["folder"]))  # Ray's workers have a folder of their own
    sys.argv = [recipe, *job["flags"]]
    sys.path.insert(0, str(Path(recipe).parent))
    try:
        runpy.run_path(recipe)["main"]()
    except SystemExit as stop:  # Ray would take it for the end of a good run
        if stop.code not in (None, 0):
            raise RuntimeError(f"{Path(recipe).name} ended with {stop.code}: its last line says why") from None


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1, help="processes over all nodes")
    parser.add_argument("--cpu", action="store_true", help="workers without a GPU")
    parser.add_argument("--cpus_per_worker", type=int, default=1)
    parser.add_argument("--max_failures", type=int, default=0, help="restarts before the run is given up")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="of the recipe")
    args = parser.parse_args()
    if not args.recipe.is_file():
        parser.error(f"{args.recipe}: no such recipe")
    return args


def main() -> None:
    args = parse_args()
    job = {
        "recipe": str(args.recipe.resolve()),
        "folder": str(Path.cwd()),
        # first, so that one of yours wins
        "flags": ["--resume_from_checkpoint", "true", *args.flags],
        "use_gpu": not args.cpu,
    }
    ray.init()  # RAY_ADDRESS names a cluster; without it, one on this machine
    trainer = TorchTrainer(
        run_recipe,
        train_loop_config=job,
        scaling_config=ScalingConfig(
            num_workers=args.workers,
            use_gpu=not args.cpu,
            resources_per_worker={"CPU": args.cpus_per_worker},
        ),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=args.max_failures)),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
