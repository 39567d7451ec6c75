"""Time a recipe against `trl sft` with the same settings, whole processes in turn, and print the ratio of each pair.

    python -m tests.benchmarks.bench_trl_sft [--pairs 5] [--steps 60]
    python -m tests.benchmarks.bench_trl_sft --against copy    # a copy of the recipe without hooks: their cost

A benchmark, not a test: run it on an idle machine and quote the median ratio. Both train the demo's tiny Qwen3 by QLoRA
on the demo's rows, packed, assistant-only, with the same seed; the last losses are printed to show that it is one run.
"""

import argparse
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--against", choices=["trl", "copy"], default="trl")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for script, *flags in (
            ("demo_rows", "--out", "rows", "--rows", "2000"),
            ("demo_model", "--rows", "rows", "--out", "init"),
        ):
            command = [sys.executable, "-m", f"data_prep.{script}", *flags]
            subprocess.run(
                command, cwd=folder, env={**os.environ, "PYTHONPATH": str(REPO)}, check=True, capture_output=True
            )
        set_up = "from datasets import load_from_disk; load_from_disk('rows/chat')['train'].to_json('set/train.jsonl')"
        Path(folder, "set").mkdir()
        subprocess.run([sys.executable, "-c", set_up], cwd=folder, check=True, capture_output=True)
        same = {
            "model_name_or_path": "init",
            "dtype": "float32",
            "bf16": False,
            "load_in_4bit": True,
            "use_bnb_nested_quant": True,
            "use_peft": True,
            "lora_r": 16,
            "lora_alpha": 32,
            "lora_dropout": 0.05,
            "packing": True,
            "max_length": 512,
            "assistant_only_loss": True,
            "max_steps": given.steps,
            "seed": 42,
            "chat_template_path": REPO / "chat_templates" / "qwen3.jinja",
            "per_device_train_batch_size": 1,
            "learning_rate": 2e-3,
            "lr_scheduler_type": "cosine",
            "optim": "paged_adamw_8bit",
            "weight_decay": 0.01,
            "logging_steps": 1,
            "eval_strategy": "no",
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            "activation_checkpointing": False,
        }
        flags = [str(part) for name, value in same.items() for part in (f"--{name}", value)]
        flags += ["--lora_target_modules", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        launch = [sys.executable, "-m", "accelerate.commands.launch"]
        launch += ["--config_file", str(REPO / "accelerate_configs" / "cpu.yaml")]
        ours = [*launch, str(REPO / "recipes" / "qwen3_qlora.py"), *flags, "--dataset_name", "set/train.jsonl"]
        ours += ["--global_batch_size", "4", "--eval_rows", "0"]
        if given.against == "trl":
            theirs = [*launch, "-m", "trl.scripts.sft", *flags, "--dataset_name", "set", "--warmup_steps", "0.03"]
            theirs += ["--gradient_accumulation_steps", "4"]
        else:
            copy = shutil.copy(REPO / "recipes" / "qwen3_qlora.py", folder)
            theirs = [str(copy) if word.endswith("qwen3_qlora.py") else word for word in ours]
        ratios, work = [], []
        for pair in range(given.pairs + 1):
            took, losses, used = [], [], []
            for name, command in (("ours", ours), ("theirs", theirs)):
                start, before = time.monotonic(), cpu_seconds()
                command = [*command, "--output_dir", f"{name}{pair}"]
                done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
                took.append(time.monotonic() - start)
                used.append(cpu_seconds() - before)
                if done.returncode:
                    sys.exit(done.stderr[-3000:])
                losses.append(re.findall(r"\bloss'?:? '?([\d.e-]+)", done.stdout + done.stderr)[-1])
            other = f"{given.against} {took[1]:.1f} s ({took[0] - took[1]:+.1f} s)"
            print(f"recipe {took[0]:.1f} s, {other}, last losses {losses}", "" if pair else "(warm-up)", flush=True)
            ratios += [took[0] / took[1]] if pair else []
            work += [used[0] / used[1]] if pair else []
    for what, found in (("wall", ratios), ("CPU", work)):
        spread = f"from {min(found):.3f} to {max(found):.3f}, {len(found)} pairs"
        print(f"median ratio of {what} time {statistics.median(found):.3f}, {spread}")


def cpu_seconds():
    """Of all processes that were started and have ended: less hurt by what else the machine does than wall time."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
