"""eval/card.py: the hub's own reader takes the card, it names what was not measured, and it goes stale with its parts.

Breaks tried, each of which turned a test red: folders' names, or those of moved folders, for hub ids; results on data
that is not on the hub in the metadata; the length of the references for a metric; no n; the run's name for its path,
one that a shell takes apart; docstrings or the source as it is in the hash; the recipe, its copy, the template, its
copy, the data or the benchmarks left out; a part that matches in one place only; new measurements unseen; paths of
other folders and in dicts shown; words or hashes of the README's rows not looked at.
"""

import json
import os
import re
import shlex
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard

from eval import card
from eval.common import scores
from tests.helpers.runs import REPO

WILSON = {"value": 0.75, "low": 0.3, "high": 0.95, "count": 3, "total": 4}
TABLE = "| group | metric | base (95%) | tuned (95%) | change | n |"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A repository of one recipe, one template and one data set, and a run of it: the folders that card.py knows."""
    monkeypatch.setattr(card, "REPO", tmp_path)
    monkeypatch.chdir(tmp_path)
    run, data = tmp_path / "runs" / "tuned", tmp_path / "data" / "chats"
    for folder in (run / "eval", data, tmp_path / "recipes", tmp_path / "chat_templates"):
        folder.mkdir(parents=True)
    recipe = (REPO / "recipes" / "qwen3_qlora.py").read_text()
    template = (REPO / "chat_templates" / "qwen3.jinja").read_text()
    (tmp_path / "recipes" / "qwen3_qlora.py").write_text(recipe)
    (run / "qwen3_qlora.py").write_text(recipe)
    (tmp_path / "chat_templates" / "qwen3.jinja").write_text(template)
    (run / "chat_template.jinja").write_text(card.serving_template(template))
    alice = "/home/alice"
    settings = {
        "model_name_or_path": f"{alice}/models/Qwen3-4B",
        "dataset_name": "data/chats",
        "learning_rate": 3e-3,
        "chat_template_path": f"{alice}/chat_templates/qwen3.jinja",
        "hooks": [f"{alice}/mine.py", "eval/in_training.py"],
        "max_length": 2048,
        "model_init_kwargs": {"cache": f"{alice}/cache"},
        "output_dir": "../alice/run",
    }
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    (run / "versions.json").write_text(json.dumps({"torch": "2.13.0", "trl": "1.16.0"}))
    (run / "adapter_config.json").write_text("{}")
    counts = {
        "script": "mix.py",
        "in": 90,
        "out": {"train": 80, "validation": 4},
        "refused": {"empty": 6},
        "hash": "a1",
    }
    (data / "report.json").write_text(json.dumps(counts))
    (data / "card.md").write_text("# chats\n\n| split | source | rows |\n|---|---|---|\n| train | sums | 80 |\n")
    return tmp_path


def measured(run):
    metrics = {"exact_match": WILSON, "assistant_perplexity": {"value": 1.25, "low": 1.1, "high": 1.4, "tokens": 9}}
    metrics["reference_tokens"] = {"value": 12.5, "rows": 4}
    settings = {"data": "chats", "split": "test", "max_new_tokens": 64, "dtype": "float32", "device": "cpu"}
    report = {"settings": settings, "rows": {"measured": 4}, "results": {"overall": {"all": {"tuned": metrics}}}}
    (run / "report.json").write_text(json.dumps(report))
    (run / "report.md").write_text(
        f"# t\n\n{TABLE}\n|---|---|---|---|---|---|\n| all | exact match | 0 | 0.75 | +0.75 | 4 |\n"
        "|  | reference length (tokens) | 12.5 | 12.5 |  | 4 |\n"
    )
    scores.write_scores(run / "eval", "quiz", {}, {"right": WILSON, "bits": {"value": 1.5, "tokens": 1234}})
    scores.write_scores(run / "eval", "gsm8k_chat_think", {}, {"exact_match": WILSON})
    scores.write_scores(run / "eval", "chat_eval", {}, {"arc_easy": WILSON, "chatcore": WILSON})
    lines = [
        {"step": 1, "loss": 2.0, "tokens_per_second": 100.0, "memory_gib": 1.5, "trained_tokens": 50},
        {"step": 2, "loss": 1.0, "tokens_per_second": 300.0, "memory_gib": 2.5, "trained_tokens": 1090},
        {"step": 2, "eval_loss": 1.5, "epoch": 1.0},
        {"step": 2, "train_runtime": 12.0},
    ]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo')
    (run / "loss.png").write_bytes(b"")
    (run / "engine.txt").write_text("not distributed, 1 process on the CPU\nDDP, 2 processes\n")
    (run / "gate.json").write_text('{"passed": true, "findings": []}')


def run_card(capsys, *command):
    """(exit code, stdout, stderr)"""
    capsys.readouterr()
    return card.main([str(word) for word in command]), *capsys.readouterr()


# -- what it says ------------------------------------------------------------------------------------------------------
def test_the_hub_reads_the_metadata(home, capsys):
    run = home / "runs" / "tuned"
    measured(run)
    (run / "README.md").write_text("TRL's own")
    assert run_card(capsys, run, "--license", "apache-2.0", "--hardware", "1 x RTX 4080")[0] == 0
    data = ModelCard.load(run / "README.md").data
    assert (data.library_name, data.license, data.pipeline_tag) == ("peft", "apache-2.0", "text-generation")
    assert data.model_name == "tuned" and data.tags == ["trl", "sft", "lora"]
    found = {(one.dataset_type, one.dataset_name, one.metric_type): one.metric_value for one in data.eval_results}
    assert found == {  # chats and quiz are not on the hub, chatcore is of no one set
        ("openai/gsm8k", "gsm8k_chat_think", "exact_match"): 0.75,
        ("allenai/ai2_arc", "chat_eval", "arc_easy"): 0.75,
    }
    assert [one.metric_args for one in data.eval_results] == [{"n": 4}, {"n": 4}]
    text = (run / "README.md").read_text()
    assert "\n| hardware | 1 x RTX 4080 |" in text
    assert "TRL's own" not in text and yaml.safe_load(text.split("---\n")[1])["model-index"][0]["name"] == "tuned"


@pytest.mark.parametrize(
    ("base", "data", "expected"),
    [
        ("/home/alice/models/Qwen3-4B", "data/chats", (None, None)),
        ("runs/base", "data/gone", (None, None)),  # folders that were here
        ("init", "chats.jsonl", (None, None)),
        ("Qwen/Qwen3-4B", "openai/gsm8k", ("Qwen/Qwen3-4B", ["openai/gsm8k"])),
        ("Qwen/Qwen3-4B", "openai/gsm8k:main@train", ("Qwen/Qwen3-4B", ["openai/gsm8k"])),
        ("Qwen/Qwen3-4B", "None", ("Qwen/Qwen3-4B", None)),
    ],
)
def test_the_metadata_name_hub_ids_alone(home, capsys, base, data, expected):
    run = home / "runs" / "tuned"
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings |= {"model_name_or_path": base, "dataset_name": data}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    assert run_card(capsys, run)[0] == 0
    found = ModelCard.load(run / "README.md").data
    assert (found.base_model, found.datasets) == expected
    named = "openai/gsm8k" if expected[1] else data.rpartition("/")[2]
    assert f"trained from `{expected[0] or base.rpartition('/')[2]}` on `{named}`" in (run / "README.md").read_text()


def commands_of(text):
    """Every command of a card, as a shell takes it apart."""
    lines = re.findall(r"^(?:PYTHONPATH|python|transformers).*", text, re.M)
    lines += re.findall(r"`((?:PYTHONPATH|python).*?)`", text) + re.findall(r"^not measured: (.*)", text, re.M)
    return [shlex.split(line) for line in lines]


@pytest.mark.parametrize("folder", ["runs/tuned", "runs/two words & more", "../elsewhere/tuned"])
def test_the_commands_can_be_pasted(home, capsys, folder, monkeypatch):
    """They name the run as it is reached from the working folder, and a shell takes them apart as they are meant."""
    run = home / folder
    if folder != "runs/tuned":
        shutil.copytree(home / "runs" / "tuned", run)
    (home / "data" / "chats" / "validation").mkdir()
    for place in (home, home / "data"):
        monkeypatch.chdir(place)
        assert run_card(capsys, run)[0] == 0
        commands = commands_of((run / "README.md").read_text())
        path = os.path.relpath(run)
        start = ["python", "-m"] if place == home else ["PYTHONPATH=..", "python", "-m"]
        data = os.path.relpath(home / "data" / "chats")
        compare = ["eval.compare", "--base", "BASE", "--tuned", path, "--data", data, "--split", "validation"]
        assert commands == [
            [*start, "eval.merge", path, "--out", f"{path}/merged"],
            ["transformers", "serve", f"{path}/merged"],
            [*start, "eval.gate", path],
            [*start, "eval.card", path, "--check"],
            [*start, *compare],
        ]
        assert run_card(capsys, *commands[3][len(start) + 1 :])[:2] == (0, "up to date\n")


@pytest.mark.parametrize(
    ("torch", "machine", "cuda"),
    [
        ("2.13.0+cu128", {}, "12.8"),
        ("2.13.0+cu130", {}, "13.0"),
        ("2.13.0+cpu", {}, "none"),
        ("2.13.0", {}, "not recorded"),
        ("2.13.0", {"cuda": "12.6", "ram_gib": 62.79}, "12.6"),
        ("2.13.0+cu128", {"cuda": None, "ram_gib": 62.79}, "none"),
    ],
)
def test_memory_and_cuda_of_the_machine(home, capsys, torch, machine, cuda):
    run = home / "runs" / "tuned"
    (run / "versions.json").write_text(json.dumps({"torch": torch}))
    if machine:
        (run / "machine.json").write_text(json.dumps(machine))
    run_card(capsys, run)
    text = (run / "README.md").read_text()
    assert f"\n| CUDA | {cuda} |" in text
    found = re.search(r"^\| RAM \| (.*?) \|", text, re.M)[1]
    with open("/proc/meminfo") as file:
        here = int(file.readline().split()[1]) / 2**20
    elsewhere = re.fullmatch(r"not recorded; ([\d.]+) GiB where this card was made", found)
    assert found == "62.8 GiB" if machine else abs(float(elsewhere[1]) - here) < 0.1


def test_it_tells_what_is_known(home, capsys):
    run = home / "runs" / "tuned"
    measured(run)
    run_card(capsys, run)
    text = (run / "README.md").read_text()
    for line in (
        TABLE,
        "| all | exact match | 0 | 0.75 | +0.75 | 4 |",
        "| right | 0.75 (0.3–0.95) | 4 |",
        "| bits | 1.5 | 1,234 |",
        "Gate (`python -m eval.gate runs/tuned`): passed.",
        "| hardware | not distributed, 1 process on the CPU; then DDP, 2 processes |  |",
        "| optimizer steps | 2 | 1 |",
        "| training loss, last logged | 1.0000 | 1 |",
        "| validation loss, last | 1.5000 | 1 |",
        "| trained tokens | 1,090 | 2 |",
        "| tokens/s, median | 200 | 2 |",
        "| peak memory | 2.5 GiB | 2 |",
        "| training time | 12 s | 1 |",
        "![loss](loss.png)",
        "| learning_rate | 0.0002 | 0.003 |",
        "| dataset_name | openai/gsm8k | data/chats |",
        "| hooks |  | ['mine.py', 'eval/in_training.py'] |",
        "| model_name_or_path | Qwen/Qwen3-4B-Instruct-2507 | Qwen3-4B |",
        "`chats`, made by mix.py from 90 rows: train 80, validation 4; refused: empty 6.",
        "| train | sums | 80 |",
        "python -m eval.merge runs/tuned --out runs/tuned/merged",
    ):
        assert f"\n{line}" in text, line
    assert "torch 2.13.0, transformers not recorded, trl 1.16.0" in text
    assert "| max_length |" not in text  # as in DEFAULTS
    assert "reference" not in text  # a property of the data
    assert not any(word in text for word in ("alice", "/home", str(home), str(REPO)))


def test_what_was_not_measured_says_so(home, capsys):
    run = home / "runs" / "tuned"
    (home / "data" / "chats" / "report.json").unlink()
    assert run_card(capsys, run)[0] == 0
    text = (run / "README.md").read_text()
    compare = "python -m eval.compare --base BASE --tuned runs/tuned --data VALIDATION.jsonl"
    for line in (
        f"not measured: {compare}\n",
        "## Benchmarks\n\nnot measured.",
        "`): not measured.",
        "| hardware | not recorded |",
        "| tokens/s, median | not recorded |",
        "| peak memory | not recorded |",
        "Its counts are not recorded",
        "licence not recorded",
        "| data | not recorded |",
    ):
        assert line in text, line
    assert "model-index" not in text and "license" not in text.split("---")[1]
    code, out, _ = run_card(capsys, run, "--check")
    assert code == 0 and "up to date" in out


# -- stale -------------------------------------------------------------------------------------------------------------
def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


PARTS = {  # what is edited: (file, from, to, what the check must say)
    "recipe": ("recipes/qwen3_qlora.py", "learning_rate=2e-4", "learning_rate=2e-5", "recipe"),
    "code of the recipe": ("recipes/qwen3_qlora.py", "trainer.train(", "trainer.evaluate(", "recipe"),
    "copy of the recipe": ("runs/tuned/qwen3_qlora.py", "learning_rate=2e-4", "learning_rate=2e-5", "recipe"),
    "template": ("chat_templates/qwen3.jinja", "<|im_start|>", "<|im_begin|>", "chat template"),
    "saved template": ("runs/tuned/chat_template.jinja", "<|im_start|>", "<|im_begin|>", "chat template"),
    "data": ("data/chats/report.json", '"a1"', '"a2"', "training data"),
    "config": ("runs/tuned/config.yaml", "0.003", "0.004", "config.yaml"),
    "report": ("runs/tuned/report.json", "1.25", "1.26", "measurements (report.json, eval/*.json)"),
    "benchmark": ("runs/tuned/eval/quiz.json", "0.95", "0.96", "measurements (report.json, eval/*.json)"),
}


@pytest.mark.parametrize("part", PARTS)
def test_each_part_makes_it_stale(home, capsys, part):
    run = home / "runs" / "tuned"
    measured(run)
    run_card(capsys, run)
    assert run_card(capsys, run, "--check")[:2] == (0, "up to date\n")
    file, old, new, told = PARTS[part]
    edit(home / file, old, new)
    assert run_card(capsys, run, "--check")[:2] == (1, f"stale: the {told} is not that of the card\n")
    edit(home / file, new, old)
    assert run_card(capsys, run, "--check")[0] == 0


def test_comments_docstrings_and_layout_do_not(home, capsys):
    run, recipe = home / "runs" / "tuned", home / "recipes" / "qwen3_qlora.py"
    run_card(capsys, run)
    edit(recipe, '"""', '"""Another first line. ')
    edit(recipe, "# model", "# the model and")
    edit(recipe, "def main() -> None:\n", 'def main() -> None:\n    """Begins."""\n\n')
    edit(recipe, "learning_rate=2e-4,", "learning_rate = 0.0002 ,")
    edit(run / "config.yaml", "learning_rate: 0.003", "learning_rate: 3.0e-3  # tried")
    assert run_card(capsys, run, "--check")[:2] == (0, "up to date\n")
    assert card.code_hash("def f():\n    'a'\n    return 1") == card.code_hash("def f():\n\n    return 1  # one")
    assert card.code_hash("x = 'a'") != card.code_hash("x = 'b'") != card.code_hash("'b'")


def test_new_measurements_and_parts_that_are_not_here(home, capsys):
    run = home / "runs" / "tuned"
    run_card(capsys, run)
    measured(run)
    code, out, _ = run_card(capsys, run, "--check")
    assert (code, out) == (1, "stale: the card was made without the measurements (report.json, eval/*.json)\n")
    run_card(capsys, run)
    shutil.rmtree(home / "recipes")  # of a run that was moved to another machine, its folder alone is held to the card
    shutil.rmtree(home / "data")
    code, out, _ = run_card(capsys, run, "--check")
    assert (code, out) == (0, "not checked: the training data is not found here\nup to date\n")


def test_what_it_cannot_use_is_one_sentence(home, capsys):
    run = home / "runs" / "tuned"
    (run / "README.md").write_text("---\nlibrary_name: peft\n---\n# TRL's own\n")
    for command, told in (
        ([run, "--check"], "has no card of ours"),
        ([home / "gone"], "gone is not there"),
        ([home / "recipes"], "has no config.yaml"),
        (["--check_readme", home / "gone.md"], "gone.md does not exist"),
    ):
        code, _, err = run_card(capsys, *command)
        assert code == 2 and told in err and len(err.splitlines()) == 1
    shutil.copy(run / "qwen3_qlora.py", run / "other.py")
    code, _, err = run_card(capsys, run)
    assert code == 2 and "holds 2 recipes" in err


def test_a_real_run_is_up_to_date_and_keeps_no_path(run_recipe, capsys, tmp_path):
    run = run_recipe("qwen3_qlora", "--max_steps", "1", "--save_strategy", "steps", "--save_steps", "1")
    assert "TRL" in (run / "README.md").read_text()
    assert run_card(capsys, run)[0] == 0
    text = (run / "README.md").read_text()
    assert "Quick start" not in text and str(REPO) not in text.replace(os.path.relpath(REPO), "")
    assert str(tmp_path) not in text.replace(os.path.relpath(tmp_path), "")  # but for where the run is
    assert "| peak memory | " in text and "| peak memory | not" not in text
    assert "base_model" not in text and "trained from `init` on `chat`" in text
    assert run_card(capsys, run, "--check")[:2] == (0, "up to date\n")


# -- the README --------------------------------------------------------------------------------------------------------
def test_the_readme_says_what_was_measured(capsys):
    code, out, _ = run_card(capsys, "--check_readme", REPO / "docs" / "measured.md")
    assert code == 0, out
    for row in json.loads(card.MEASURED.read_text()):  # the README has the main one too
        assert row["name"] != "demo" or all(words in (REPO / "README.md").read_text() for words in row["readme"])
    assert len(json.loads(card.MEASURED.read_text())) >= 1


def test_a_row_goes_red_until_it_is_measured_again(home, capsys, monkeypatch):
    monkeypatch.setattr(card, "MEASURED", home / "measured.json")
    recipe, template = "recipes/qwen3_qlora.py", "chat_templates/qwen3.jinja"
    rows = [{"name": "demo", "readme": ["| all | 0.571 |"], "inputs": {recipe: None, template: None}}]
    card.MEASURED.write_text(json.dumps(rows))
    readme = home / "README.md"
    readme.write_text("# Measured\n\n| all | 0.571 |\n")
    code, out, _ = run_card(capsys, "--check_readme", readme)
    assert code == 0 and "demo: measured before its inputs were recorded" in out
    assert run_card(capsys, "--check_readme", readme, "--record", "demo")[:2] == (0, "up to date\n")
    edit(home / recipe, "# model", "# the model and")
    assert run_card(capsys, "--check_readme", readme)[0] == 0
    edit(home / recipe, "learning_rate=2e-4", "learning_rate=2e-5")
    code, out, _ = run_card(capsys, "--check_readme", readme)
    assert code == 1 and out == f"demo was measured with another {recipe}: measure again, then --record 'demo'\n"
    edit(home / template, "<|im_start|>", "<|im_begin|>")
    assert run_card(capsys, "--check_readme", readme)[1].count("demo was measured with another") == 2
    assert run_card(capsys, "--check_readme", readme, "--record", "demo")[0] == 0
    readme.write_text("# Measured\n\n| all | 0.671 |\n")
    code, out, _ = run_card(capsys, "--check_readme", readme)
    assert (code, out) == (1, "demo: README.md does not say what was measured: | all | 0.571 |\n")
    code, _, err = run_card(capsys, "--check_readme", readme, "--record", "other")
    assert code == 2 and "has no row 'other': pass one of demo" in err
