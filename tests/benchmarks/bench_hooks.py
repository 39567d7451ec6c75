"""Time the two trainings of `make demo` with the recipes' hooks against copies of the recipes that find none, whole
processes in turn, and print the ratio of each pair.

    make demo && .venv/bin/python -m tests.benchmarks.bench_hooks [--pairs 5]

A benchmark, not a test: run it on an idle machine (40 minutes on 2 cores) and quote the median ratio. The weights'
hashes are printed to show that both train the same.
"""

import argparse
import hashlib
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
ENV = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "2"}


def demo(recipes, out):
    """(seconds, CPU seconds, hash of the weights) of both runs."""
    shutil.rmtree(out, ignore_errors=True)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu.yaml"]
    begin, used = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    for recipe, config, *flags in (
        ("qwen3_full.py", "demo_base.yaml", "--output_dir", out / "base"),
        ("qwen3_qlora.py", "demo_qlora.yaml", "--output_dir", out / "qlora", "--model_name_or_path", out / "base"),
    ):
        command = [*launch, recipes / recipe, "--config", REPO / "recipes" / "configs" / config, *flags]
        done = subprocess.run(command, cwd=REPO, env=os.environ | ENV, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
    weights = (out / "base" / "model.safetensors", out / "qlora" / "adapter_model.safetensors")
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()[:8]
    took, now = time.monotonic() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    return took, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime, digest


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    given, ratios = parser.parse_args(), []
    with tempfile.TemporaryDirectory() as folder:
        alone = Path(folder, "alone")
        alone.mkdir()
        for name in ("qwen3_full.py", "qwen3_qlora.py"):
            shutil.copy(REPO / "recipes" / name, alone)
        for number in range(given.pairs):
            arms = [("hooks", REPO / "recipes"), ("copy", alone)]
            found = {name: demo(path, Path(folder, name)) for name, path in (arms[::-1] if number % 2 else arms)}
            ratios.append([found["hooks"][n] / found["copy"][n] for n in range(2)])
            said = ", ".join(
                f"{name} {took:.1f} s ({cpu:.0f} s CPU, weights {digest})"
                for name, (took, cpu, digest) in sorted(found.items())
            )
            print(f"pair {number + 1}: {said}, ratio {ratios[-1][0]:.3f}, CPU {ratios[-1][1]:.3f}", flush=True)
    for name, values in zip(("wall", "CPU"), zip(*ratios, strict=True), strict=True):
        print(f"{name}: median {statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})")


if __name__ == "__main__":
    main()
