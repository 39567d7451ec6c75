"""Small data and a small model, built once per session by our own scripts, and the recipes run on them."""

import runpy
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.helpers.runs import MODULES, REPO, TINY, release_folders


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
            given = [
                *TINY,
                "--model_name_or_path",
                str(demo / "init"),
                "--dataset_name",
                str(demo / "rows" / "chat"),
                "--chat_template_path",
                str(template),
                "--output_dir",
                str(tmp_path / out),
                *given,
            ]
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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say in at most five lines how many tests were skipped, by kind: what stands before the reason's colon."""
    kinds = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        kinds[reason.partition(": ")[0]] += 1
    lines = [f"{count:,} skipped: {kind}" for kind, count in kinds.most_common()]
    if len(lines) > 5:
        rest = sum(kinds.values()) - sum(count for _, count in kinds.most_common(4))
        lines[4:] = [f"{rest:,} skipped for {len(lines) - 4} other reasons: pytest -rs names each"]
    for line in lines:
        terminalreporter.write_line(line)
