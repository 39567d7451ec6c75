"""The end of a run: one drawing style with eval/compare.py, and commands that work as they are printed."""

import ast
import re
import runpy
import subprocess
import sys

import pytest
import torch
from conftest import EXACT, REPO
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

HOOK = REPO / "recipes" / "hooks" / "end.py"


def said(text):
    return dict(re.findall(r"^  (\w[\w ]*?) {2,}(.*)$", text, re.M))


def test_one_drawing_style():
    """read_log and plot are compare.py's: the same code, docstrings included."""
    parts = []
    for path in (REPO / "eval" / "compare.py", HOOK):
        tree = ast.parse(path.read_text())
        functions = {node.name: ast.dump(node) for node in tree.body if isinstance(node, ast.FunctionDef)}
        parts.append((functions["read_log"], functions["plot"]))
    assert parts[0] == parts[1] and "eval_loss" in parts[0][1]


def test_adapter(run_recipe, demo, capsys, monkeypatch):
    """The block names files that are there, and its merge command gives the adapter's logits."""
    evaluated = ["--eval_strategy", "steps", "--eval_steps", 2, "--save_strategy", "steps", "--save_steps", 2]
    monkeypatch.chdir(REPO)
    folder = run_recipe("qwen3_qlora", "--hooks", HOOK, *evaluated, *EXACT, "--load_in_4bit", "false", out="a run")
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
    folder = run_recipe("qwen3_full", "--hooks", HOOK, "--max_steps", 1)
    found = said(capsys.readouterr().out)
    assert "merge" not in found and found["model"].startswith(str(folder))
    words = found["measure"].split()
    assert words[:2] == ["python", "eval/compare.py"]
    monkeypatch.syspath_prepend(REPO / "eval")
    args = runpy.run_path(str(REPO / "eval" / "compare.py"))["parse_args"](words[2:])
    assert (args.base, args.tuned, args.data) == (str(demo / "init"), [folder], demo / "rows" / "chat")
    assert (demo / "rows" / "chat" / args.split).is_dir()


def test_stopped_early_and_nothing_to_draw(run_recipe, hook, capsys):
    """A run that is stopped says so; one that logged nothing draws nothing and does not fail."""
    stop = """
from transformers import TrainerCallback
class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == 2
def callback(trainer):
    return Stop()
"""
    flags = [hook(stop)[1], HOOK]
    folder = run_recipe("qwen3_full", "--hooks", *flags, "--logging_strategy", "no")
    found = said(capsys.readouterr().out)
    assert found["done"].startswith("stopped after 2 of 4 steps")
    assert found["go on"] == "the same command with --resume_from_checkpoint true"
    assert found["files"].endswith("no loss.png: nothing was logged") and not (folder / "loss.png").exists()


@pytest.mark.parametrize("path", ["runs/x", "a b/$HOME `x`", "it's"])
def test_commands_survive_the_shell(path, tmp_path, monkeypatch):
    """What the shell hands on is the path, whatever stands in it."""
    module = runpy.run_path(str(HOOK))
    monkeypatch.chdir(tmp_path)
    out = tmp_path / path
    out.mkdir(parents=True)
    (out / "adapter_config.json").touch()

    class Given:
        dataset_name, dataset_test_split, rows, model_name_or_path = "rows.jsonl", "validation", None, "base"

    module["prepare"](Given, None, Given)
    command = module["commands"](out)["merge"].replace("python ", "printf '%s\\n' ", 1)
    words = subprocess.run(command, shell=True, capture_output=True, text=True).stdout.splitlines()
    assert words[1:] == [path, "--out", f"{path}/merged"]
