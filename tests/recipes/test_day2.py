"""The 4080 tutorial's QLoRA: its values against a table, and its way from raw rows to a trained tiny Qwen3.

Raw CMATH, MAWPS and emoji rows in their published shapes -> normalize -> mix -> qwen3_qlora.py with the shipped config,
answers measured as it trains. Each of these turns the suite red (tried): a value of either config changed; train_turns
left out of the mix; another weight in it; eval/in_training.py left out of the config.
"""

import json
import re

import pytest
import yaml
from datasets import load_from_disk
from transformers import AutoConfig, AutoTokenizer
from trl import get_peft_config, get_quantization_config

from data_prep import mix, normalize
from tests.helpers.runs import REPO, SHARED, parse, run_script

CONFIGS, MIX = ("day2_4080", "day2_4080_winner"), REPO / "data_prep" / "mixes" / "day2_4080.yaml"
BOTH = {
    "model": "Qwen/Qwen3-4B-Instruct-2507",
    "bits": ("nf4", "torch.bfloat16"),
    "rank": 16,
    "alpha": 32,
    "projections": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
    "batch": 16,
    "rate": 2e-4,
    "schedule": "cosine",
    "decay": 0.01,
    "clip": 1.0,
    "epochs": 2,
    "packing": True,
    "bf16": True,
    "checkpointing": True,
    "seed": 42,
}
PUBLISHED = {  # what differs: the tutorial's text, and its config.py where a later dict overrides an earlier one
    "day2_4080": BOTH | {"micro": 1, "warmup": 0.03, "length": 1024, "dropout": 0.05, "optim": "paged_adamw_8bit"},
    "day2_4080_winner": BOTH
    | {"micro": 4, "warmup": 0.1, "length": 2048, "dropout": 0.01, "optim": "adamw_8bit", "eval": 100, "save": 500},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_published_values(name, monkeypatch):
    """What the trainer would get, from the launch line at the config's head."""
    text = (REPO / "recipes" / "configs" / f"{name}.yaml").read_text()
    recipe, flags = re.search(r"^#   accelerate launch (\S+) (.*)$", text, re.M).groups()
    assert flags == f"--config recipes/configs/{name}.yaml" and recipe == "recipes/qwen3_qlora.py"
    monkeypatch.chdir(REPO)
    script, args, model = parse(REPO / recipe, *flags.split())
    bits, lora = get_quantization_config(model), get_peft_config(model)
    found = {
        "model": model.model_name_or_path,
        "bits": (bits.bnb_4bit_quant_type, str(bits.bnb_4bit_compute_dtype)),
        "rank": lora.r,
        "alpha": lora.lora_alpha,
        "dropout": lora.lora_dropout,
        "projections": sorted(lora.target_modules),
        "batch": script.global_batch_size,
        "micro": args.per_device_train_batch_size,
        "rate": args.learning_rate,
        "warmup": args.warmup_steps,
        "schedule": args.lr_scheduler_type.value,
        "decay": args.weight_decay,
        "clip": args.max_grad_norm,
        "epochs": args.num_train_epochs,
        "packing": args.packing,
        "length": args.max_length,
        "optim": args.optim,
        "bf16": args.bf16,
        "checkpointing": args.activation_checkpointing,
        "seed": args.seed,
        "eval": args.eval_steps,
        "save": args.save_steps,
    }
    assert {key: found[key] for key in PUBLISHED[name]} == PUBLISHED[name]
    assert args.eval_strategy == "steps" and "eval/in_training.py" in script.hooks
    assert (REPO / "eval" / "in_training.py").is_file() and script.dataset_name == "data/day2_4080"


# -- raw rows ---------------------------------------------------------------------------------------------------------
def real_rows():
    def lines(*path):
        return [json.loads(line) for line in SHARED.joinpath("data", *path).read_text().splitlines()]

    cmath = [{"question": row["input"], "golden": row["golden"]} for row in lines("cmath", "cmath_dev.jsonl")]
    mawps = [
        {key: row[key] for key in ("Question", "Numbers", "Equation", "Answer")}
        for row in lines("mawps", "mawps_N00.jsonl")[:600]
    ]
    return cmath[:300], mawps


def small_rows():
    cmath = [{"question": f"小明有{n}本书，又买{n % 7}本，共几本？", "golden": str(n + n % 7)} for n in range(300)]
    mawps = [
        {
            "Question": f"Ann has N_00 pens and buys N_01 more on day {n} . How many ?",
            "Numbers": f"{n}.0 {n % 9}.0",
            "Equation": "+ N_00 N_01",
            "Answer": float(n + n % 9),
        }
        for n in range(600)
    ]
    return cmath, mawps


def emoji_rows():
    """As shareAI/DPO-zh-en-emoji has them (question, answer_zh, answer_en), and as preference rows, of three turns."""
    rows = [
        {"question": f"第{n}天，天气好吗？", "answer_zh": f"很好☀️，第{n}天。", "answer_en": "Fine."} for n in range(500)
    ]
    for n in range(100):
        turns = [
            {"role": "user", "content": f"Tell me {n}."},
            {"role": "assistant", "content": "FIRST 🙂"},
            {"role": "user", "content": "And?"},
        ]
        rows.append(
            {
                "prompt": turns,
                "chosen": [{"role": "assistant", "content": f"LAST 🎉 {n}"}],
                "rejected": [{"role": "assistant", "content": "no"}],
            }
        )
    return rows


@pytest.fixture(scope="module", params=[pytest.param("real", marks=pytest.mark.long), "small"])
def data(request, tmp_path_factory):
    """The mixed set, and rows a pool."""
    if request.param == "real" and not (SHARED / "data" / "cmath").is_dir():
        pytest.skip("../shared is absent: the small rows prove the same path")
    folder, (cmath, mawps) = tmp_path_factory.mktemp("day2"), real_rows() if request.param == "real" else small_rows()
    pools = {"cmath": ("cmath", cmath), "emoji": ("emoji_preference", emoji_rows()), "mawps": ("mawps", mawps)}
    for name, (source, rows) in pools.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        done = run_script(normalize, source, folder / f"{name}.jsonl", "--out", folder / name)
        assert done.returncode == 0, done.stderr
    done = run_script(mix, MIX, "--pools", folder, "--out", folder / "day2_4080")
    assert done.returncode == 0, done.stderr
    return folder / "day2_4080"


def test_the_mix(data):
    """Shares are .2/.5/.3 of the rows; CMATH runs out first; every row says that its last answer alone is trained."""
    report = json.loads((data / "report.json").read_text())
    told = {one["name"]: one for one in report["sources"]}
    rows = sum(one["train"] for one in told.values())
    shares = [told[name]["train"] / rows for name in ("cmath", "emoji", "mawps")]
    assert shares == pytest.approx([0.2, 0.5, 0.3], abs=0.002) and not any(one["repeats"] for one in told.values())
    sets = load_from_disk(data)
    assert len(sets["validation"]) == 100
    for split in sets.values():
        assert all(row["chat_template_kwargs"]["train_turns"] == "last" for row in split)


PROBE = """
import json
from pathlib import Path
from transformers import TrainerCallback


class Probe(TrainerCallback):
    def __init__(self, trainer):
        texts = []
        for row in trainer.train_dataset:
            trained = [token for token, label in zip(row["input_ids"], row["labels"]) if label != -100]
            texts.append(trainer.processing_class.decode(trained))
        Path(trainer.args.output_dir, "trained.json").write_text(json.dumps(texts))
"""


FEWER = """
import sys
sys.path.insert(0, ".")
from eval.in_training import InTraining


class Fewer(InTraining):
    rows = 8
    max_new_tokens = 16
"""


def test_from_raw_rows_to_an_adapter(data, demo, run_recipe, hook, monkeypatch, tmp_path):
    """The shipped config on a tiny Qwen3: last answers only, the held-out loss falls, answers are measured."""
    monkeypatch.chdir(REPO)  # the config names a hook of the repository
    out, fewer, probe = tmp_path / "run", hook(FEWER, "fewer.py")[1], hook(PROBE)[1]
    config = (REPO / "recipes" / "configs" / "day2_4080.yaml").read_text().replace("eval/in_training.py", fewer)
    (tmp_path / "day2.yaml").write_text(config)
    run_recipe(
        "qwen3_qlora",
        "--config",
        tmp_path / "day2.yaml",
        "--model_name_or_path",
        demo / "init",
        "--dataset_name",
        data,
        "--output_dir",
        out,
        "--use_cpu",
        "true",
        "--bf16",
        "false",
        "--dtype",
        "float32",
        "--max_steps",
        10,
        "--global_batch_size",
        2,
        "--max_length",
        256,
        "--eval_steps",
        10,
        "--learning_rate",
        "2e-2",
        "--eval_on_start",
        "true",
        "--save_strategy",
        "no",
        "--disable_tqdm",
        "true",
        "--activation_checkpointing",
        "false",
        "--hooks",
        fewer,
        probe,
        defaults=False,
    )
    trained = "".join(json.loads((out / "trained.json").read_text()))
    assert "LAST 🎉" in trained and "☀️" in trained and "FIRST" not in trained
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses = [line["eval_loss"] for line in log if "eval_loss" in line]
    assert len(losses) >= 2 and losses[-1] < losses[0] - 0.1, losses
    measured = [line for line in log if "eval_assistant_perplexity" in line]
    assert len(measured) >= 2 and measured[-1]["eval_assistant_perplexity"] < measured[0]["eval_assistant_perplexity"]
    assert all(0 <= line["eval_usability"] <= 1 for line in measured)
    base, adapter = AutoConfig.from_pretrained(demo / "init"), json.loads((out / "adapter_config.json").read_text())
    assert base.architectures == ["Qwen3ForCausalLM"] and len(adapter["target_modules"]) == 7
    saved = yaml.safe_load((out / "config.yaml").read_text())
    assert (saved["lora_r"], saved["warmup_steps"], saved["lora_dropout"]) == (16, 0.03, 0.05)
    assert not re.search(r"{%-? *generation", AutoTokenizer.from_pretrained(out).chat_template)
