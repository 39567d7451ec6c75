"""Blossom's two stages: raw rows in its schema -> normalize -> filter -> mix -> stage 1 -> stage 2 from its folder.

Counted against numbers worked out here: what the filters leave, Chinese to English one to one, the replay of stage 1,
epochs, and that stage 2 begins with the weights that stage 1 saved. Each of these turns the suite red (tried): stage 2
from the base model; its replay weight 0.2; the filters' flags left out; the stop token of the base model; one epoch in
stage 2.
"""

import json

import pytest
import yaml
from datasets import load_from_disk
from transformers import AutoConfig, AutoTokenizer

from data_prep import filter as filters
from data_prep import mix, normalize
from tests.helpers.runs import REPO, load_recipe, run_script

MIXES, RECIPES = REPO / "data_prep" / "mixes", REPO / "recipes"
VALUES = {  # what v4 and v5.1 had, and the model that v6.1's card names; the rest is ours
    "blossom_stage1": {"model_name_or_path": "Qwen/Qwen3-8B-Base", "num_train_epochs": 1},
    "blossom_stage2": {"model_name_or_path": "runs/blossom_stage1", "num_train_epochs": 3},
}
SHARED_VALUES = {"eos_token": "<|im_end|>", "packing": True, "assistant_only_loss": True, "dtype": "float32"}


def raw(stage, number, question, answer):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": str(number), "type": "chat", "metadata": {"source": f"stage{stage}"}, "messages": turns}


def raw_rows(stage, count):
    """Rows in both languages by turns, sums in stage 1 and products in stage 2, and six that a filter takes."""
    rows = []
    for n in range(count):
        a, b = n % 10, n // 10
        if stage == 1:
            question, answer = (f"{a}加{b}？", f"等于{a + b}。") if n % 2 else (f"{a} plus {b}?", f"It is {a + b}.")
        else:
            question, answer = (f"{a}乘{b}？", f"乘积是{a * b}。") if n % 2 else (f"{a} by {b}?", f"{a * b}, no doubt.")
        rows.append(raw(stage, n, question, answer))
    for n in range(3):
        rows.append(raw(stage, f"loop{n}", f"Say it {n}.", "again and again and again " * 60))
        rows.append(raw(stage, f"refusal{n}", f"再说一遍{n}。", "很抱歉，作为一个人工智能，我无法回答这个问题。"))
    return rows


@pytest.mark.parametrize("name", VALUES)
def test_values(name):
    found = load_recipe(name)["DEFAULTS"]
    wanted = VALUES[name] | SHARED_VALUES | {"dataset_name": f"data/blossom{name[-1]}"}
    assert {key: found[key] for key in wanted} == wanted
    assert found.get("packing_strategy", "bfd") == "bfd" and found["chat_template_path"].endswith("chatml.jinja")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A folder with blossom1 and blossom2, made as the heads of the two mixes say."""
    folder = tmp_path_factory.mktemp("blossom")
    for stage, count in ((1, 500), (2, 200)):
        path = folder / f"stage{stage}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in raw_rows(stage, count)))
        done = run_script(normalize, "blossom", path, "--out", folder / "raw" / f"blossom_stage{stage}")
        assert done.returncode == 0, done.stderr
        done = run_script(
            filters,
            folder / "raw" / f"blossom_stage{stage}",
            "--repetition",
            "--refusals",
            "--out",
            folder / f"blossom_stage{stage}",
        )
        assert done.returncode == 0, done.stderr
    for stage in (1, 2):
        done = run_script(
            mix, MIXES / f"blossom_stage{stage}.yaml", "--pools", folder, "--out", folder / f"blossom{stage}"
        )
        assert done.returncode == 0, done.stderr
    return folder


def test_the_commands_are_those_of_the_mixes():
    for stage in (1, 2):
        head = (MIXES / f"blossom_stage{stage}.yaml").read_text()
        command = f"filter raw/blossom_stage{stage} --repetition --refusals --out data/blossom_stage{stage}"
        assert f"python -m data_prep.{command}\n" in head


def test_filters_languages_and_replay(sets):
    for stage, count in ((1, 500), (2, 200)):
        report = json.loads((sets / f"blossom_stage{stage}" / "report.json").read_text())
        assert report["in"] == count + 6 and sum(report["out"].values()) == count
        assert sum(report["refused"].values()) == 6 and len(report["refused"]) == 2
    # stage 1: 500 rows, 100 held out, each language gives 200; the card tells them
    first = load_from_disk(sets / "blossom1")
    assert (len(first["train"]), len(first["validation"])) == (400, 100)
    assert [first["train"]["lang"].count(lang) for lang in ("zh", "en")] == [200, 200]
    card = (sets / "blossom1" / "card.md").read_text()
    assert "| zh | 200 | 50.0% |" in card and "| en | 200 | 50.0% |" in card
    # stage 2: 700 rows, 100 held out, 29 of stage 2 and 71 of stage 1 (200/700 and 500/700 of them);
    # all 171 left of stage 2 and 2% of 429: int(8.58) of stage 1
    second = load_from_disk(sets / "blossom2")
    assert [second["train"]["source"].count(f"stage{stage}") for stage in (2, 1)] == [171, 8]
    assert [second["validation"]["source"].count(f"stage{stage}") for stage in (2, 1)] == [29, 71]


def test_ten_percent_replay(sets, tmp_path):
    """v4's share, by the one number that the mix's head names."""
    text = (MIXES / "blossom_stage2.yaml").read_text()
    assert text.count("weight: 0.02") == 1 and "weight 0.1" in text
    (tmp_path / "v4.yaml").write_text(text.replace("weight: 0.02", "weight: 0.1"))
    done = run_script(mix, tmp_path / "v4.yaml", "--pools", sets, "--out", tmp_path / "set")
    assert done.returncode == 0, done.stderr
    assert load_from_disk(tmp_path / "set")["train"]["source"].count("stage1") == 42  # int(0.1 x 429)


PROBE = """
import hashlib
import json
from pathlib import Path
from transformers import TrainerCallback


def hash_weights(model):
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(weight.detach().float().numpy().tobytes())
    return digest.hexdigest()


class Probe(TrainerCallback):
    def __init__(self, trainer):
        self.report = {"epochs": trainer.args.num_train_epochs}

    def on_train_begin(self, args, state, control, model, **_):
        self.report["first"] = hash_weights(model)
        self.report["steps"] = state.max_steps

    def on_train_end(self, args, state, control, model, **_):
        self.report["last"] = hash_weights(model)
        Path(args.output_dir, "probe.json").write_text(json.dumps(self.report))
"""


def test_two_chained_stages(sets, demo, run_recipe, hook, tmp_path):
    """Stage 2 starts from stage 1's folder; both lower their own held-out loss, by a nat and by a tenth (three in four
    of stage 2's held-out rows are stage 1's)."""
    model, found = demo / "init", {}
    for stage in (1, 2):
        out = tmp_path / f"stage{stage}"
        run_recipe(
            f"blossom_stage{stage}",
            "--use_cpu",
            "true",
            "--bf16",
            "false",
            "--disable_tqdm",
            "true",
            "--model_name_or_path",
            model,
            "--dataset_name",
            sets / f"blossom{stage}",
            "--output_dir",
            out,
            "--max_length",
            256,
            "--global_batch_size",
            2,
            "--learning_rate",
            0.005 / stage,
            "--eval_on_start",
            "true",
            "--eval_strategy",
            "epoch",
            "--save_strategy",
            "no",
            "--activation_checkpointing",
            "false",
            *hook(PROBE),
            defaults=False,
        )
        found[stage] = json.loads((out / "probe.json").read_text())
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        losses = [line["eval_loss"] for line in log if "eval_loss" in line]
        assert losses[-1] < losses[0] - {1: 1, 2: 0.1}[stage], losses
        model = out
    assert found[2]["first"] == found[1]["last"] != found[1]["first"]
    assert (found[1]["epochs"], found[2]["epochs"]) == (1, 3)
    config, tokenizer = AutoConfig.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    assert config.architectures == ["Qwen3ForCausalLM"] and tokenizer.eos_token == "<|im_end|>"
    assert "{% generation" not in tokenizer.chat_template
    # what it was told stands in its folder, for the next to take back
    assert yaml.safe_load((model / "config.yaml").read_text())["model_name_or_path"] == str(tmp_path / "stage1")
