"""Small data and a small model, built once per session by our own scripts, and ways to run a recipe."""

import io
import os
import runpy
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # `make test &` in a script: runs that are interrupted inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPO = Path(__file__).resolve().parents[1]
SHARED = REPO.parent / "shared"  # real data and tokenizers, where the machine has them
TINY = ["--use_cpu", "true", "--global_batch_size", "4", "--max_length", "512", "--max_steps", "4"]
TINY += ["--eval_strategy", "no", "--save_strategy", "no", "--disable_tqdm", "true", "--learning_rate", "1e-2"]
MODULES = {**os.environ, "PYTHONPATH": str(REPO)}  # runs `python -m data_prep.X` in any folder
EXACT = ["--dtype", "float32", "--bf16", "false", "--lora_dropout", "0"]  # fp32 without dropout


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A folder with rows/ (pretrain.jsonl, chat/) and init/ (tiny random Qwen3 and its tokenizer)."""
    folder = tmp_path_factory.mktemp("demo")
    for script, *flags in (
        ("demo_rows", "--out", "rows", "--rows", "400"),
        ("demo_model", "--rows", "rows", "--out", "init"),
    ):
        command = [sys.executable, "-m", f"data_prep.{script}", *flags]
        subprocess.run(command, cwd=folder, env=MODULES, check=True, capture_output=True)
    return folder


@pytest.fixture
def run_recipe(demo, monkeypatch, tmp_path):
    """run_recipe("qwen3_qlora", *flags) runs main() here, on the demo's rows and model, and returns its output folder.

    A string recipe is a name in recipes/; a Path is any other file. Flags given come last, so they win.
    """

    def run(recipe, *flags, out="run", defaults=True):
        path = recipe if isinstance(recipe, Path) else REPO / "recipes" / f"{recipe}.py"
        given = [str(flag) for flag in flags]
        if defaults:
            template = REPO / "chat_templates" / "qwen3.jinja"
            given = [*TINY, "--model_name_or_path", str(demo / "init"), "--dataset_name", str(demo / "rows" / "chat"),
                     "--chat_template_path", str(template), "--output_dir", str(tmp_path / out), *given]  # fmt: skip
        monkeypatch.setattr(sys, "argv", [str(path), *given])
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        monkeypatch.setattr(sys, "path", list(sys.path))
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            runpy.run_path(str(path))["main"]()
        finally:  # a run that is refused ends its process and leaves them
            for number, handler in handlers.items():
                signal.signal(number, handler)
            release_folders()
        return tmp_path / out

    return run


def release_folders():
    """Do what the end of a process does: let go of the output folders that it holds."""
    run_lock = sys.modules.get("hooks.run_lock")
    if run_lock is not None:
        for folder in list(run_lock.held):
            run_lock.release_folder(str(folder))


@pytest.fixture
def typed_loader(monkeypatch):
    """Files of JSON are loaded as datasets does by itself, with a type for every key, which changes some values."""
    from datasets import load_dataset

    from data_prep.common import recipe_rows

    def load_json(path, split):
        return load_dataset("json", data_files={split: str(path)})

    monkeypatch.setattr(recipe_rows, "load_json", load_json)


@pytest.fixture
def hook(tmp_path):
    """hook(source) writes a hook file and returns the flags that load it."""

    def write(source, name="probe.py"):
        path = tmp_path / name
        path.write_text(source)
        return ["--hooks", str(path)]

    return write


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
