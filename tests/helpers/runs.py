"""Where things lie, the flags of a tiny run, and ways to run a recipe or a command; fixtures stand in conftest.py."""

import io
import os
import runpy
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

# Set here, before any import of a library that reads them: conftest.py imports this file first.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # `make test &` in a script: runs that are interrupted inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPO = Path(__file__).resolve().parents[2]
SHARED = REPO.parent / "shared"  # real data and tokenizers, where the machine has them
TINY = ["--use_cpu", "true", "--global_batch_size", "4", "--max_length", "512", "--max_steps", "4"]
TINY += ["--eval_strategy", "no", "--save_strategy", "no", "--disable_tqdm", "true", "--learning_rate", "1e-2"]
MODULES = {**os.environ, "PYTHONPATH": str(REPO)}  # runs `python -m data_prep.X` in any folder
EXACT = ["--dtype", "float32", "--bf16", "false", "--lora_dropout", "0"]  # fp32 without dropout


def release_folders():
    """Do what the end of a process does: let go of the output folders that it holds."""
    run_lock = sys.modules.get("hooks.run_lock")
    if run_lock is not None:
        for folder in list(run_lock.held):
            run_lock.release_folder(str(folder))


def load_recipe(recipe):
    """Return the globals of a recipe: a name in recipes/, or a Path."""
    path = recipe if isinstance(recipe, Path) else REPO / "recipes" / f"{recipe}.py"
    return runpy.run_path(str(path))


def parse(recipe, *flags):
    """Return (script_args, training_args, model_args) as a recipe reads these flags; on a CPU, in a fresh folder."""
    module = load_recipe(recipe)
    given = ["--use_cpu", "true", "--output_dir", "runs/no_such_folder", *map(str, flags)]
    with mock.patch("sys.argv", [f"{recipe}.py", *given]):
        return module["parse_args"](module["make_parser"]())


def run_script(script, *args):
    """A data_prep script's main() (its module) as a command, in this process, which saves its start-up."""
    out, err, name = io.StringIO(), io.StringIO(), f"{script.__name__}.py"
    with mock.patch("sys.argv", [name, *map(str, args)]), redirect_stdout(out), redirect_stderr(err):
        try:
            code = script.main()
        except SystemExit as error:
            code = error.code
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


def launch(recipe, *flags, config="cpu", cwd=REPO, **kwargs):
    """Runs `accelerate launch` as a user would; returns the completed process with text output."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"]
    command += [str(REPO / "accelerate_configs" / f"{config}.yaml"), str(recipe), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600, **kwargs)
