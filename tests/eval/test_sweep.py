"""sweep.py: one launch an arm, none twice, diverged ones left behind, a killed one resumed; the table and the plot.

The quick tests sweep a recipe of 40 lines that keeps the contract (DEFAULTS, make_parser, parse_args, log.jsonl,
checkpoints, the words of recipes/hooks) and counts its launches itself; the long one sweeps qwen3_full on the demo's
model, with a SIGTERM.

Broken once, and seen red: final states launched again; --resume_from_checkpoint left out; the hash without the
recipe's file; divergence read from the exit code; the arm's folder not checked; the sweep ended at the first failure.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from eval import sweep
from tests.helpers.runs import EXACT, REPO, TINY

RECIPE = '''"""A recipe by contract, without a model: the loss falls by a tenth of the rate a step."""

import argparse
import json
import os
import sys
import time
from pathlib import Path

DEFAULTS = dict(learning_rate=1e-5, steps=4)


def make_parser():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name, kind, value in (("learning_rate", float, 1e-5), ("steps", int, 4), ("rank", int, 8), ("mode", str, "a"),
                              ("hang", float, 0.0), ("output_dir", str, "runs/x"),
                              ("resume_from_checkpoint", str, None)):
        parser.add_argument(f"--{name}", type=kind, default=value)
    return parser


def parse_args(parser):
    parser.set_defaults(**DEFAULTS)
    args = parser.parse_args()
    if args.rank > 1000:
        parser.error("--rank must be at most 1000")
    return None, args, None


def main():
    _, args, _ = parse_args(make_parser())
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    first = max((int(path.name) for path in out.glob("done/*")), default=0) if args.resume_from_checkpoint else 0
    with open(out.parent / "launches.txt", "a") as file:
        file.write(f"{out.name} from {first}\\n")
    (out / "done").mkdir(exist_ok=True)
    for step in range(first + 1, args.steps + 1):
        loss = 3 - args.learning_rate * step * 100
        if args.learning_rate > 0.1 and step == 2:
            print(f"recipe.py: step {step}, rank 0: the loss is nan; rows [3]; stopped before the weights changed")
            sys.exit(1)
        with open(out / "log.jsonl", "a") as file:
            file.write(json.dumps({"step": step, "loss": loss}) + "\\n")
        (out / "done" / str(step)).touch()
        if args.learning_rate == args.hang and step == 2 and not first:
            (out / "pid").write_text(str(os.getpid()))
            time.sleep(300)
    with open(out / "log.jsonl", "a") as file:
        file.write(json.dumps({"step": args.steps, "eval_loss": loss + 0.1 / args.rank}) + "\\n")


if __name__ == "__main__":
    main()
'''


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def swept(tmp_path, recipe, capsys, monkeypatch):
    """swept(*flags) runs the sweep here and returns its exit code, report, launches so far, stdout and stderr. Its
    launcher takes --config_file as accelerate's does and runs the recipe, without the seconds of its imports."""
    launcher = tmp_path / "launcher.py"
    launcher.write_text("""
import runpy, sys
assert sys.argv[1] == "--config_file" and sys.argv[2].endswith("accelerate_configs/cpu.yaml")
sys.argv = sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
""")
    assert sweep.LAUNCHER[1:] == ["-m", "accelerate.commands.launch"]
    monkeypatch.setattr(sweep, "LAUNCHER", [sys.executable, str(launcher)])

    def run(*flags, out="sweep"):
        config = ["--config_file", str(REPO / "accelerate_configs" / "cpu.yaml"), "--out", str(tmp_path / out)]
        code = sweep.main([str(recipe), *map(str, flags), *config])
        told, report = capsys.readouterr(), tmp_path / out / "report.json"
        launches = tmp_path / out / "launches.txt"
        launches = launches.read_text().splitlines() if launches.is_file() else []
        return code, json.loads(report.read_text()) if report.is_file() else None, launches, told.out, told.err

    return run


def kill_when_it_hangs(folder):
    """A process that kills an arm with SIGKILL once it has written its pid."""
    code = f"""
import os, time
from pathlib import Path
path = Path({str(folder / "pid")!r})
while not path.is_file() or not path.read_text():
    time.sleep(0.1)
os.kill(int(path.read_text()), 9)
"""
    return subprocess.Popen([sys.executable, "-c", code])


def test_three_arms_one_diverges_one_is_killed_and_resumed(swept, tmp_path, recipe):
    flags = ["--values", "1e-3", "0.5", "1e-2", "--hang", "1e-3"]
    killer = kill_when_it_hangs(tmp_path / "sweep" / "learning_rate-1e-3")
    code, report, launches, out, _ = swept(*flags)
    killer.wait()
    assert code == 1 and launches == [f"learning_rate-{rate} from 0" for rate in ("1e-3", "0.5", "1e-2")]
    assert [arm["state"] for arm in report["arms"]] == ["failed", "diverged", "finished"]
    assert report["arms"][1]["why"] == "step 2, rank 0: the loss is nan" and "exit code" in report["arms"][0]["why"]
    assert report["best"] == "learning_rate-1e-2"

    code, report, launches, out, _ = swept(*flags)  # the killed one alone, from its second step
    assert code == 0 and launches[3:] == ["learning_rate-1e-3 from 2"]
    assert [arm["state"] for arm in report["arms"]] == ["finished", "diverged", "finished"]
    assert [arm["launches"] for arm in report["arms"]] == [2, 1, 1]
    # worked by hand: 3 - 100 rate steps, and a tenth of an eighth more for validation
    assert [arm["eval_loss"] for arm in report["arms"]] == pytest.approx([2.6125, None, -0.9875])
    assert [arm["train_loss"] for arm in report["arms"]] == pytest.approx([2.6, -47.0, -1.0])
    assert [arm["steps"] for arm in report["arms"]] == [4, 1, 4]
    assert re.search(r"1e-2 +. +-0.9875 +. +-1 .*finished, best", out)
    table = (tmp_path / "sweep" / "report.md").read_text()
    assert "| 0.5 | – | -47 | 1 |" in table and "diverged: step 2, rank 0: the loss is nan |" in table
    assert (tmp_path / "sweep" / "sweep.png").read_bytes().startswith(b"\x89PNG")

    code, again, launches, *_ = swept("--values", "0.001", "0.5", "1e-2", out="other")
    assert len(launches) == 3, "another folder is another sweep"
    code, again, launches, *_ = swept(*flags)  # nothing is left to do
    assert code == 0 and len(launches) == 4 and again == report


def test_an_arm_is_known_by_its_arguments(swept, recipe, tmp_path):
    code, _, launches, *_ = swept("--values", "1e-3", "--steps", 1)
    assert code == 0 and len(launches) == 1
    code, _, launches, _, err = swept("--values", "1e-3", "--steps", 2)  # other arguments
    assert code == 2 and len(launches) == 1 and "is of other arguments or another recipe: pass another --out" in err
    code, _, launches, *_ = swept("--steps", 1, "--rank", 8, "--values", "1e-3")  # the same, said in another way
    assert code == 0 and len(launches) == 1
    recipe.write_text(RECIPE.replace("3 - args", "2 - args"))
    code, _, launches, _, err = swept("--values", "1e-3", "--steps", 1)
    assert code == 2 and len(launches) == 1 and err.count("\n") == 1


def test_a_grid_of_two_options(swept):
    code, report, launches, out, _ = swept(
        "--option", "mode", "--values", "a", "b/c", "--option", "rank", "--values", "1", "4", "0", "--steps", "1"
    )
    names = [f"mode-{mode}_rank-{rank}" for mode in ("a", "b.c") for rank in (1, 4, 0)]
    assert code == 1 and [line.split()[0] for line in launches] == names
    assert [arm["state"] for arm in report["arms"]] == ["finished", "finished", "failed"] * 2
    assert "exit code 1" in report["arms"][2]["why"] and "ZeroDivisionError" in report["arms"][2]["why"]
    assert report["options"] == ["mode", "rank"] and report["best"] == "mode-a_rank-4"
    assert [arm["values"] for arm in report["arms"]][3] == {"mode": "b/c", "rank": "1"}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--values", "1e-3", "--ranc", "3"], "refuses its flags: recipe.py: error: unrecognized arguments: --ranc"),
        (["--option", "rank", "--values", "8", "2000"], "--rank must be at most 1000"),
        (["--option", "nothing", "--values", "1"], "unrecognized arguments: --nothing"),
        (["--values", "1e-3", "--learning_rate", "1e-4"], "--learning_rate is swept"),
        (["--values", "1e-3", "0.001"], "names a value twice"),
        (["--option", "rank"], "go in pairs"),
        (["--output_dir", "x"], "names the folders of its arms"),
    ],
)
def test_bad_input_is_one_sentence_before_any_launch(swept, tmp_path, flags, words):
    code, report, launches, out, err = swept(*flags)
    assert code == 2 and words in err and err.count("\n") == 1 and not launches and not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("batches", [1, 4])
@pytest.mark.parametrize(
    ("fault", "moment"),
    [("the gradient norm is nan", "before"), ("the gradient norm is 2e+05, 0.9 before", "after"), ("loss", "before")],
)
def test_a_divergence_is_read_as_the_hooks_write_it(tmp_path, monkeypatch, capfd, ranks, batches, fault, moment):
    """By the hook itself: of a norm it knows the rows where there was one micro-batch, and names no rank."""
    from hooks.step_watch import StepWatch

    settings = SimpleNamespace(world_size=ranks, process_index=0, output_dir=str(tmp_path))
    accelerator = SimpleNamespace(wait_for_everyone=lambda: None)
    watch = StepWatch.__new__(StepWatch)
    watch.trainer = SimpleNamespace(args=settings, state=SimpleNamespace(global_step=1), accelerator=accelerator)
    watch.batches = [{}] * batches
    watch.losses = [torch.tensor(float("nan"))] * batches
    monkeypatch.setattr(StepWatch, "name_rows", lambda self, batches: "[3]; or others")
    with pytest.raises(SystemExit):
        if fault == "loss":
            fault = "the loss is nan"
            watch.end_by_loss(fault, [0])
        else:
            watch.end_by_norm(fault, moment)
    folder = tmp_path / "arm"
    folder.mkdir()
    (tmp_path / "arm.log").write_text(f"before\n{capfd.readouterr().err}\nTraceback of the launcher\n")
    arm = sweep.Arm("arm", {"learning_rate": "1"}, [], "hash", folder)
    sweep.set_state(arm, sweep.Launch(1, False))
    rank = ", rank 0" if fault == "the loss is nan" else ""
    assert (arm.state, arm.why) == ("diverged", f"step 2{rank}: {fault}")


def test_a_recipe_that_is_not_there(tmp_path, capsys):
    assert sweep.main([str(tmp_path / "none.py")]) == 2
    assert "no such recipe" in capsys.readouterr().err


@pytest.mark.long
def test_a_real_recipe_is_stopped_resumed_and_diverges(demo, tmp_path):
    """SIGTERM to the sweep: its arm saves and is resumed from there; a huge rate is ended by recipes/hooks."""
    out = tmp_path / "sweep"
    command = [sys.executable, "-m", "eval.sweep", REPO / "recipes" / "qwen3_full.py", *TINY, *EXACT]
    at = command.index("--learning_rate")
    del command[at : at + 2]
    command += ["--model_name_or_path", demo / "init", "--dataset_name", demo / "rows" / "chat", "--max_steps", 30]
    command += ["--chat_template_path", REPO / "chat_templates" / "qwen3.jinja", "--eval_strategy", "epoch"]
    command += ["--activation_checkpointing", "false", "--lr_scheduler_type", "constant", "--values", "1e-2", "1e4"]
    command += ["1e-3", "--config_file", REPO / "accelerate_configs" / "cpu.yaml", "--out", out]
    command = [*map(str, command)]
    process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log = out / "learning_rate-1e-2" / "log.jsonl"
    while not log.is_file() or len(log.read_text().splitlines()) < 3:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 1 and "learning_rate-1e-2: stopped" in said, said
    saved = [path.name for path in (out / "learning_rate-1e-2").glob("checkpoint-*")]
    assert len(saved) == 1 and int(saved[0].split("-")[1]) < 30
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((out / "report.json").read_text())
    assert [arm["state"] for arm in report["arms"]] == ["finished", "diverged", "finished"]
    assert [arm["launches"] for arm in report["arms"]] == [2, 1, 1]
    assert f"{saved[0]}" in (out / "learning_rate-1e-2.log").read_text()  # it went on from there
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines() if '"loss"' in line]
    assert steps == [*range(1, 31)]
    lowest = {}
    for arm in ("learning_rate-1e-2", "learning_rate-1e-3"):
        logged = map(json.loads, (out / arm / "log.jsonl").read_text().splitlines())
        lowest[arm] = [line["eval_loss"] for line in logged if "eval_loss" in line][-1]
    assert report["best"] == min(lowest, key=lowest.get)
    if where := os.environ.get("SWEEP_PNG"):
        shutil.copy(out / "sweep.png", where)
