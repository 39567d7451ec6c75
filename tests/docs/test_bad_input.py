"""Bad input: one sentence that says what, where and what to do; not exit code 0; nothing written."""

import errno
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hooks.refusals import Refusals

from tests.helpers.runs import REPO, TINY, launch, parse, release_folders


@pytest.fixture
def refuse(demo, tmp_path, monkeypatch, capsys):
    """refuse(*flags) runs qwen3_qlora here, expects it to stop, and returns what it printed on stderr."""

    def run(*flags, recipe="qwen3_qlora", written=False):
        path = REPO / "recipes" / f"{recipe}.py"
        given = [*TINY, "--model_name_or_path", str(demo / "init"), "--dataset_name", str(demo / "rows" / "chat")]
        given += ["--chat_template_path", str(REPO / "chat_templates" / "qwen3.jinja")]
        given += ["--output_dir", str(tmp_path / "run")]
        monkeypatch.setattr(sys, "argv", [str(path), *given, *map(str, flags)])
        monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
        code, _ = None, capsys.readouterr()
        try:
            runpy.run_path(str(path))["main"]()
        except SystemExit as stop:
            code = stop.code
            if isinstance(code, str):  # as Python itself does on exit
                print(code, file=sys.stderr)
        except Exception:
            code = 1  # what Python exits with after its excepthook, which the hooks have replaced
            sys.excepthook(*sys.exc_info())
        release_folders()
        said = capsys.readouterr().err
        assert code, "it did not stop"
        assert "Traceback" not in said, said
        if not written:
            assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())
        lines = [line for line in said.splitlines() if line.startswith("qwen3_qlora.py: ")]
        assert len(lines) == 1, said
        return lines[0]

    return run


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
SILENT = {"messages": [{"role": "user", "content": "a"}]}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--learning_rat", "3"], ["learning_rat", "nearest is --learning_rate"]),
        (["--learning-rat", "3"], ["learning-rat", "nearest is --learning_rate"]),
        (["--xyzzy", "3"], ["--xyzzy", "--help"]),
        (["run.yaml"], ["run.yaml: write --config run.yaml"]),
        (["stray"], ["stray", "belongs to no flag"]),
        (["--no_packing"], ["--packing false"]),
        (["--warmup_ratio", "0.1"], ["--warmup_ratio", "--warmup_steps"]),
        (["--overwrite_output_dir", "true"], ["--overwrite_output_dir", "--resume_from_checkpoint true"]),
        (["--max_seq_length", "512"], ["--max_length"]),
        (["--skip_bad_rows", "true"], ["python -m data_prep.check"]),
        (["--learning_rate", "fast"], ["learning_rate", "fast"]),
        (["--packing_strategy", "bdf"], ["packing_strategy", "bdf", "wrapped"]),
        (["--lr_scheduler_type", "cosin"], ["lr_scheduler_type", "cosin", "cosine"]),
        (["--dtype", "bfloat61"], ["dtype", "bfloat61"]),
        (["--packing", "perhaps"], ["perhaps"]),
        (["--chat_template_path", "no/such.jinja"], ["no/such.jinja", "--chat_template_path"]),
        (["--global_batch_size", "3", "--per_device_train_batch_size", "2"], ["--global_batch_size", "multiple of 2"]),
        (["--global_batch_size", "1", "--per_device_train_batch_size", "2"], ["--global_batch_size", "multiple of 2"]),
        (["--gradient_accumulation_steps", "1"], ["gradient_accumulation_steps", "--global_batch_size"]),
        (["--use_cpu", "false"], ["no GPU", "--use_cpu true"]),
        (["--dataset_name", "no/such.jsonl"], ["--dataset_name no/such.jsonl: no such file"]),
        (["--dataset_name", "./rows"], ["--dataset_name ./rows: no such folder"]),
        (["--model_name_or_path", "/no/such/model"], ["--model_name_or_path /no/such/model: no such folder"]),
        (["--dataset_name", "no/such"], ["no/such", "--dataset_name", "HF_ENDPOINT"]),
        (["--model_name_or_path", "no/such"], ["no/such", "--model_name_or_path", "HF_ENDPOINT"]),
        (["--optim", "adamw_torch_4bit"], ["adamw_torch_4bit", "torchao", "pip install"]),
        (["--dataset_train_split", "trian"], ["trian"]),
        (["--eos_token", "<|im_fin|>"], ["<|im_fin|>", "--eos_token <|im_end|>"]),
        (["--eos_token", "<|eot_id|>"], ["<|eot_id|>", "--eos_token <|im_end|>"]),
        (["--attn_implementation", "flash"], ["flash"]),
        (["--config", "no/such.yaml"], ["no/such.yaml"]),
        (["--config=no/such.yaml"], ["no/such.yaml"]),
        (["--config"], ["--config", "YAML"]),
        (["--resume_from_checkpoint", "no/such"], ["no/such"]),
    ],
    ids=lambda value: value[0].strip("-") if isinstance(value, list) and value[0].startswith("--") else None,
)
def test_flags(refuse, flags, words):
    said = refuse(*flags)
    assert all(word in said for word in words), said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rat: 3\n", ["run.yaml: learning_rat", "nearest is learning_rate"]),
        ("warmup_ratio: 0.1\n", ["run.yaml: warmup_ratio", "--warmup_steps"]),
        ("weight_decay: heavy\n", ["weight_decay", "heavy"]),
        ("lr_scheduler_type: cosin\n", ["cosin"]),
        ("dtype: bfloat61\n", ["bfloat61"]),
        ("packing: perhaps\n", ["perhaps"]),
        ("gradient_accumulation_steps: 2\n", ["--global_batch_size"]),
        ("- a list\n", ["mapping"]),
        ("a: [\n", ["run.yaml"]),
        ("lora_r: 8\nseed: 1\nlora_r: 64\n", ["run.yaml:3: lora_r stands twice"]),
    ],
)
def test_yaml(refuse, tmp_path, text, words):
    (tmp_path / "run.yaml").write_text(text)
    said = refuse("--config", tmp_path / "run.yaml")
    assert all(word in said for word in words), said


def test_template_without_markers(refuse, tmp_path):
    (tmp_path / "plain.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    said = refuse("--chat_template_path", tmp_path / "plain.jinja")
    assert "plain.jinja" in said and "{% generation %}" in said


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], ["rows.jsonl"]),
        ([{"a": 1}], ["rows.jsonl", "messages"]),
        ([{"text": "plain"}], ["plain text has no turns", "--assistant_only_loss false"]),
        ([{"prompt": "a", "completion": "b"}], ["no conversations", "data_prep.normalize prompt_completion"]),
        ([CHAT, SILENT, CHAT, SILENT], ["2 of 4 rows", "rows.jsonl", "1, 3", "python -m data_prep.check", "--fix"]),
        ([{"messages": [{"role": "usher", "content": "a"}, CHAT["messages"][1]]}], ["usher", "message 0"]),
    ],
    ids=["empty", "columns", "text", "prompt", "silent", "role"],
)
def test_rows(refuse, tmp_path, rows, words):
    said = refuse("--dataset_name", write(tmp_path / "rows.jsonl", *rows), "--eval_rows", "0")
    assert all(word in said for word in words), said
    assert "You set" not in said  # a setting that the user did not make


def test_more_validation_rows_than_there_are(refuse, tmp_path):
    said = refuse("--dataset_name", write(tmp_path / "rows.jsonl", *[CHAT] * 9), "--eval_rows", "200")
    assert "--eval_rows 200" in said and "rows.jsonl" in said and "HF_ENDPOINT" not in said


def test_a_table_says_which_command_makes_rows_of_it(refuse, tmp_path):
    (tmp_path / "rows.csv").write_text("q,a\n1,2\n")
    said = refuse("--dataset_name", tmp_path / "rows.csv")
    for words in ("rows.csv", "data_prep.normalize fields", "--map prompt=COLUMN answer=COLUMN"):
        assert words in said


def test_folder_in_use(refuse, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old").touch()
    said = refuse(written=True)
    assert "in use" in said and "--resume_from_checkpoint true" in said
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["old"]


def test_unknown_name_in_defaults(tmp_path):
    source = (REPO / "recipes" / "qwen3_qlora.py").read_text().replace("lora_r=16", "lora_rank=16")
    (tmp_path / "my_copy.py").write_text(source)
    command = [sys.executable, tmp_path / "my_copy.py", "--use_cpu", "true"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and "lora_rank" in done.stderr and "Traceback" not in done.stderr


def test_two_processes_say_it_once(demo, tmp_path):
    """Through the launcher: its own report follows, but our sentence stands there once, and the exit code is not 0."""
    flags = ["--dataset_name", "no/such.jsonl", "--model_name_or_path", demo / "init", "--output_dir", tmp_path / "run"]
    done = launch(REPO / "recipes" / "qwen3_qlora.py", *TINY, *flags, config="cpu_2proc")
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if "no such file" in line]
    assert said[0] == "qwen3_qlora.py: --dataset_name no/such.jsonl: no such file"
    assert len(said) <= 3 and all(line.startswith("  traceback : ") for line in said[1:])  # of torchrun's own report
    assert done.stderr.rindex(said[-1]) > len(done.stderr) - 300, "its last lines"


def test_accelerate_launch_quiet_ends_with_the_refusal(tmp_path):
    """Without --quiet, its CalledProcessError follows with one process: nothing that a recipe can change."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file"]
    command += [REPO / "accelerate_configs" / "cpu.yaml", REPO / "recipes" / "qwen3_qlora.py", "--learning_rat", "1"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=tmp_path)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode != 0 and last.startswith("qwen3_qlora.py: ") and "--learning_rate" in last


@pytest.mark.parametrize("name", ["optimizer.pt", pytest.param("trainer_state.json", marks=pytest.mark.long)])
def test_disk_full_while_saving(demo, tmp_path, name):
    """/dev/full stands where step 4 saves `name`: the run stops with a sentence, and step 2's checkpoint goes on."""
    (tmp_path / "full.py").write_text(f"""
import os
from transformers import TrainerCallback
class Full(TrainerCallback):
    def __init__(self, trainer):
        pass
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 4 and not os.path.exists({str(tmp_path / "freed")!r}):
            os.makedirs(args.output_dir + "/checkpoint-4")
            os.symlink("/dev/full", args.output_dir + "/checkpoint-4/{name}")
""")
    flags = [*TINY, "--max_steps", 6, "--save_strategy", "steps", "--save_steps", 2, "--save_total_limit", 1]
    flags += ["--model_name_or_path", demo / "init", "--dataset_name", demo / "rows" / "chat"]
    flags += ["--output_dir", tmp_path / "run", "--hooks", tmp_path / "full.py"]
    recipe = REPO / "recipes" / "qwen3_qlora.py"
    flags += ["--chat_template_path", REPO / "chat_templates" / "qwen3.jinja"]
    done = subprocess.run([sys.executable, recipe, *map(str, flags)], capture_output=True, text=True)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr and "disk is full" in done.stderr.splitlines()[-1], done.stderr[-2000:]
    assert json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())["global_step"] == 2
    (tmp_path / "freed").touch()
    (tmp_path / "run" / "checkpoint-4" / name).unlink(missing_ok=True)
    flags += ["--resume_from_checkpoint", "true"]
    done = subprocess.run([sys.executable, recipe, *map(str, flags)], capture_output=True, text=True)
    assert done.returncode == 0 and "/checkpoint-2" in done.stdout, done.stderr[-2000:]


def test_sentences_of_other_disk_trouble():
    refusals = Refusals(*parse("qwen3_qlora"))
    for number, words in ((errno.EROFS, "read-only"), (errno.EDQUOT, "quota"), (errno.ENOSPC, "full")):
        assert words in refusals.explain(OSError(number, os.strerror(number)), ["main", "train", "save"])
    error = RuntimeError("I/O error: Permission denied (os error 13)")  # as safetensors says it
    assert "not permitted" in refusals.explain(error, ["main", "train", "save"])
    assert refusals.explain(ValueError("a bug in a step"), ["main", "train", "step"]) is None


def test_make_refuses_an_old_python_and_one_without_venv(tmp_path):
    real = sys.executable
    old, bare = tmp_path / "old", tmp_path / "bare"
    fake = 'import sys; sys.version_info = (3, 9, 1); sys.version = "3.9.1 x"; exec(sys.argv[1])'
    old.write_text(f"#!/bin/sh\nexec {real} -c '{fake}' \"$2\"\n")
    bare.write_text(f'#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; esac\nexec {real} "$@"\n')
    for path in (old, bare):
        path.chmod(0o755)
    for path in (REPO / "Makefile", *REPO.glob("requirements*.txt")):
        shutil.copy(path, tmp_path)
    for python, words in ((old, "3.11 or newer"), (bare, "python3-venv"), (Path("no_such_python"), "no_such_python")):
        done = subprocess.run(["make", "test", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode != 0 and words in done.stderr, done.stderr
        assert not (tmp_path / ".venv").exists()
