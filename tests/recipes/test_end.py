"""The end of a run: what it logged as numbers and as a picture, and commands that work as they are printed."""

import io
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hooks.end_block import draw_loss, next_commands
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_prep.common.run_folder import plot_log, read_log
from eval import compare
from tests.helpers.runs import EXACT, REPO


def said(text):
    return dict(re.findall(r"^  (\w[\w ]*?) {2,}(.*)$", text, re.M))


def test_what_a_run_logged(tmp_path):
    """log.jsonl before checkpoints, the newest of these by its number, a step as it was logged last, no half a line."""
    assert read_log(tmp_path) == {}
    for step in (9, 10):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": step, "loss": 1.0}]}))
    assert read_log(tmp_path) == {"loss": {10: 1.0}}
    entries = [{"step": 2, "loss": 9.0}, {"step": 1, "loss": 3.0, "learning_rate": 0.1}, {"step": 2, "loss": 2.0}]
    entries += [{"step": 2, "eval_loss": 2.5, "loss": None}, {"train_loss": 4.0}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries) + '{"step": 3, "lo')
    series = read_log(tmp_path)
    assert series == {"loss": {1: 3.0, 2: 2.0}, "eval_loss": {2: 2.5}, "learning_rate": {1: 0.1}}
    assert list(series["loss"]) == [1, 2]


def test_one_picture(tmp_path):
    """The end of a run and eval/compare.py draw with the same function; the same numbers give the same bytes."""
    pictures = []
    for losses in ([3.0, 2.0], [3.0, 2.0], [3.0, 2.5]):
        lines = [json.dumps({"step": step, "loss": loss}) for step, loss in enumerate(losses)]
        (tmp_path / "log.jsonl").write_text("\n".join(lines))
        assert draw_loss(tmp_path) is None
        pictures.append((tmp_path / "loss.png").read_bytes())
        compared = io.BytesIO()
        plot_log(read_log(tmp_path), compared)
        assert compared.getvalue() == pictures[-1]
    assert pictures[0] == pictures[1] != pictures[2]
    source = (REPO / "eval" / "compare.py").read_text()
    assert "from data_prep.common.run_folder import plot_log, read_log" in source and "matplotlib" not in source


def test_a_run_does_not_fail_over_its_picture(tmp_path, monkeypatch):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    for name, reason in (("matplotlib.figure", "ImportError"), ("matplotlib.ticker", "ImportError")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            assert draw_loss(tmp_path).startswith(("ModuleNotFoundError", reason))
    (tmp_path / ".loss.png.part").mkdir()
    assert "IsADirectoryError" in draw_loss(tmp_path) and not (tmp_path / "loss.png").exists()


def test_adapter(run_recipe, demo, capsys, monkeypatch):
    """The block names files that are there, and its merge command gives the adapter's logits."""
    evaluated = ["--eval_strategy", "steps", "--eval_steps", 2, "--save_strategy", "steps", "--save_steps", 2]
    monkeypatch.chdir(REPO)
    folder = run_recipe("qwen3_qlora", *evaluated, *EXACT, "--load_in_4bit", "false", out="a run")
    found = said(capsys.readouterr().out)
    assert found["done"].startswith("4 steps, loss ") and "validation loss" in found["done"]
    assert found["files"] == "log.jsonl, loss.png, config.yaml, versions.json, checkpoint-2, checkpoint-4"
    assert (folder / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and not list(folder.glob(".*part"))
    assert "go on" not in found and found["adapter"] == f"{folder}, with its tokenizer and serving template"

    command = found["merge"].replace("python ", f"{sys.executable} ", 1)
    assert f"--data {demo / 'rows' / 'chat'} --split test" in command
    command += " --prompts 2 --no_serve"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert found["serve"] == f"transformers serve '{folder}/merged'"
    ids = torch.arange(5, 69)[None]
    base = AutoModelForCausalLM.from_pretrained(demo / "init", dtype="float32")
    with torch.no_grad():
        plain = base(ids).logits
        tuned = PeftModel.from_pretrained(base, folder)(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype="float32")(ids).logits
    assert (plain - tuned).abs().max() > 1e-2
    torch.testing.assert_close(merged, tuned, atol=1e-4, rtol=1e-4)
    template = AutoTokenizer.from_pretrained(folder / "merged").chat_template
    assert template == AutoTokenizer.from_pretrained(folder).chat_template


def test_measure_command_parses_and_names_this_run(run_recipe, demo, capsys, monkeypatch):
    monkeypatch.chdir(REPO)
    folder = run_recipe("qwen3_full", "--max_steps", 1)
    found = said(capsys.readouterr().out)
    assert "merge" not in found and found["model"].startswith(str(folder))
    words = found["measure"].split()
    assert words[:3] == ["python", "-m", "eval.compare"]
    args = compare.parse_args(words[3:])
    assert (args.base, args.tuned, args.data) == (str(demo / "init"), [folder], demo / "rows" / "chat")
    assert (demo / "rows" / "chat" / args.split).is_dir()


def test_stopped_early_and_nothing_to_draw(run_recipe, hook, capsys):
    """A run that is stopped says so; one that logged nothing draws nothing and does not fail."""
    stop = """
from transformers import TrainerCallback
class Stop(TrainerCallback):
    def __init__(self, trainer):
        pass
    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == 2
"""
    folder = run_recipe("qwen3_full", *hook(stop), "--logging_strategy", "no")
    found = said(capsys.readouterr().out)
    assert found["done"].startswith("stopped after 2 of 4 steps")
    assert found["go on"] == "the same command with --resume_from_checkpoint true"
    assert found["files"].endswith("no loss.png: nothing was logged") and not (folder / "loss.png").exists()


@pytest.mark.parametrize("path", ["runs/x", "a b/$HOME `x`", "it's"])
def test_commands_survive_the_shell(path, tmp_path, monkeypatch):
    """What the shell hands on is the path, whatever stands in it."""
    monkeypatch.chdir(tmp_path)
    out = tmp_path / path
    out.mkdir(parents=True)
    (out / "adapter_config.json").touch()
    script_args = SimpleNamespace(dataset_name="rows.jsonl", dataset_test_split="validation")
    model_args = SimpleNamespace(model_name_or_path="base")
    command = next_commands(out, [], script_args, model_args)["merge"].replace("python ", "printf '%s\\n' ", 1)
    words = subprocess.run(command, shell=True, capture_output=True, text=True).stdout.splitlines()
    assert words[2:] == [path, "--out", f"{path}/merged"]
