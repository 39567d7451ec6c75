"""Real input end to end: GSM8K as published -> normalize -> QLoRA with the real Qwen3 tokenizer -> compare.

Without the shared data the same path runs on rows of GSM8K's shape made here and the demo's tokenizer.
"""

import json
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from tests.helpers.runs import MODULES, REPO, SHARED, TINY


def run(*command, cwd):
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env=MODULES, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(params=["real", "small"])
def raw(request, demo, tmp_path):
    """(train file, rows in it, test file, model folder)"""
    if request.param == "real":
        if not (SHARED / "data" / "gsm8k").is_dir():
            pytest.skip("../shared is absent: the small fixture proves the same path")
        tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "qwen3")
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": len(tokenizer)}
        config = Qwen3Config(**sizes, tie_word_embeddings=True, eos_token_id=151645, pad_token_id=151643)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        folder = SHARED / "data" / "gsm8k"
        return folder / "train.jsonl", 7473, folder / "test.jsonl", tmp_path / "model"
    shutil.copytree(demo / "init", tmp_path / "model")
    for name, start in (("train", 2), ("test", 1000)):
        rows = []
        for n in range(start, start + 300):
            answer = f"{n} + {n % 7} = <<{n}+{n % 7}={n + n % 7}>>{n + n % 7}\n#### {n + n % 7}"
            rows.append({"question": f"Mia has {n} pens and gets {n % 7} more. How many has she?", "answer": answer})
        (tmp_path / f"raw_{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "raw_train.jsonl", 300, tmp_path / "raw_test.jsonl", tmp_path / "model"


@pytest.mark.long
def test_gsm8k_from_raw_rows_to_report(raw, tmp_path):
    train, count, test, model = raw
    run("-m", "data_prep.normalize", "gsm8k", train, "--out", "train_set", cwd=tmp_path)
    run("-m", "data_prep.normalize", "gsm8k", test, "--out", "test.jsonl", cwd=tmp_path)
    report = json.loads((tmp_path / "train_set" / "report.json").read_text())
    assert report["out"] == {"train": count} and not sum(report["refused"].values())
    template = REPO / "chat_templates" / "qwen3_instruct_2507.jinja"
    flags = ["--model_name_or_path", model, "--dataset_name", "train_set", "--output_dir", "tuned"]
    flags += ["--global_batch_size", 2, "--max_length", 384, "--allow", "cut_answers", "--chat_template_path", template]
    run(REPO / "recipes" / "qwen3_qlora.py", *TINY, *flags, cwd=tmp_path)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "tuned" / "log.jsonl").read_text().splitlines()[:4]]
    assert len(losses) == 4 and losses[-1] < losses[0]
    flags = ["--base", model, "--tuned", "tuned", "--data", "test.jsonl", "--rows", 6, "--max_new_tokens", 6]
    run(REPO / "eval" / "compare.py", *flags, "--dtype", "float32", cwd=tmp_path)
    found = json.loads((tmp_path / "tuned" / "report.json").read_text())["results"]["overall"]["all"]
    assert found["tuned"]["assistant_perplexity"]["value"] < found["base"]["assistant_perplexity"]["value"]
    assert found["tuned"]["exact_match"]["total"] == 6 and (tmp_path / "tuned" / "loss.png").stat().st_size > 5000
    answers = [json.loads(line) for line in (tmp_path / "tuned" / "answers.jsonl").read_text().splitlines()]
    published = Counter(json.loads(line)["answer"] for line in test.read_text().splitlines())
    assert len(answers) == 6 and all(published[row["reference"]] for row in answers)
