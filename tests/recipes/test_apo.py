"""recipes/qwen3_apo.py: its loss is apo_zero by hand in float64, its reference is what it begins from, its validation
holds the prompts that SFT held out.

Breaks tried, each seen red: the reference without the SFT adapter; another beta; answers swapped; the policy's adapter
left as TRL rounds it beside 4-bit weights; pairs of held-out prompts left in train.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from hooks.messages import UsageError
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.data_prep.test_filter import filtered, judged
from tests.helpers.runs import EXACT, REPO, TINY, load_recipe, parse
from tests.recipes.test_same_weights import hash_tensors
from tests.recipes.test_start_adapter import WEIGHTS, make_adapter

RECIPE = REPO / "recipes" / "qwen3_apo.py"
TEMPLATE = REPO / "chat_templates" / "qwen3.jinja"
BETA = 0.05


@pytest.fixture(scope="module")
def adapter(demo, tmp_path_factory):
    """An SFT run's adapter, with its tokenizer beside it."""
    folder = make_adapter(demo, tmp_path_factory.mktemp("sft") / "adapter")
    AutoTokenizer.from_pretrained(demo / "init").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Four pairs as data_prep.filter exports them."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = []
    for number in range(4):
        row = judged(f"p{number}", "AB"[number % 2])
        row["messages"][0]["content"] = f"How many are {number} and {number}?"
        rows.append(row)
    kept, _ = filtered(folder, rows, "--agreement", "--export", "preference")
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(kept[row["id"]]) + "\n" for row in rows))
    return path


def flags_of(demo, pairs, out):
    """Every step takes all four pairs, without dropout."""
    flags = [*TINY, *EXACT, "--max_steps", 2, "--eval_rows", 0, "--output_dir", out, "--warmup_steps", 0]
    return [*flags, "--model_name_or_path", demo / "init", "--dataset_name", pairs, "--chat_template_path", TEMPLATE]


# -- the loss ---------------------------------------------------------------------------------------------------------
def answer_log_prob(model, tokenizer, prompt, answer):
    """The log-probability of an answer behind its prompt, by whole logits in float64."""
    asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template(prompt + answer)["input_ids"]
    assert whole[: len(asked)] == asked
    with torch.no_grad():
        logits = model.double()(torch.tensor([whole])).logits[0, :-1]
    log_probs = logits.log_softmax(-1).gather(1, torch.tensor(whole[1:])[:, None])[:, 0]
    return log_probs[len(asked) - 1 :].sum()


def apo_zero(policy, reference, tokenizer, pairs):
    """Equation 7 of D'Oosterlinck et al. 2024 (arXiv 2408.06266), the mean over pairs."""
    losses = []
    for line in pairs.read_text().splitlines():
        pair = json.loads(line)
        ratios = {}
        for name in ("chosen", "rejected"):
            scores = [answer_log_prob(model, tokenizer, pair["prompt"], pair[name]) for model in (policy, reference)]
            ratios[name] = BETA * (scores[0] - scores[1])
        losses.append((1 - torch.sigmoid(ratios["chosen"])) + torch.sigmoid(ratios["rejected"]))
    return torch.stack(losses).mean().item()


@pytest.mark.parametrize("start", ["an adapter", "a model"])
def test_the_loss_is_apo_zero(start, demo, adapter, pairs, run_recipe, tmp_path):
    """At the second step, where the policy has moved; the reference is the SFT adapter, or the model as it is."""
    given = [*flags_of(demo, pairs, tmp_path / "run"), "--save_strategy", "steps", "--save_steps", 1]
    given += ["--adapter", adapter] if start == "an adapter" else []
    run_recipe("qwen3_apo", *given, defaults=False)
    steps = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [step["loss"] for step in steps if "loss" in step]
    assert losses[0] == pytest.approx(1, abs=1e-6)  # it begins as the reference

    def base():
        return AutoModelForCausalLM.from_pretrained(demo / "init", dtype=torch.float32)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    policy = PeftModel.from_pretrained(base(), tmp_path / "run" / "checkpoint-1")
    reference = PeftModel.from_pretrained(base(), adapter) if start == "an adapter" else base()
    expected = apo_zero(policy, reference, tokenizer, pairs)
    assert losses[1] == pytest.approx(expected, rel=1e-5) and abs(expected - 1) > 1e-3
    assert (AutoTokenizer.from_pretrained(tmp_path / "run").chat_template).count("generation %}") == 0


def test_beside_4_bit_weights_it_begins_as_the_reference(demo, adapter, pairs, run_recipe, tmp_path):
    """TRL rounds the policy's adapter to bf16 there, and not the reference's."""
    given = [*flags_of(demo, pairs, tmp_path / "run"), "--adapter", adapter, "--load_in_4bit", "true"]
    run_recipe("qwen3_apo", *given, "--max_steps", 1, "--learning_rate", 0, defaults=False)
    own = load_file(tmp_path / "run" / WEIGHTS)
    assert hash_tensors(own) == hash_tensors(load_file(adapter / WEIGHTS))


def test_a_lone_copy_trains_the_same(demo, adapter, pairs, run_recipe, tmp_path, monkeypatch, capsys):
    (tmp_path / "alone").mkdir()
    copy = Path(shutil.copy(RECIPE, tmp_path / "alone"))
    shutil.copy(TEMPLATE, tmp_path / "alone")
    monkeypatch.chdir(tmp_path / "alone")
    found = []
    for name, recipe in (("with", RECIPE), ("without", copy)):
        run_recipe(recipe, *flags_of(demo, pairs, tmp_path / name), "--adapter", adapter, defaults=False)
        found.append(hash_tensors(load_file(tmp_path / name / WEIGHTS)))
        said = capsys.readouterr().out
        assert said.count("recipes/hooks is not beside it") == (name == "without")
        assert said.count("are of SFT alone and left out") == (name == "with")
    assert found[0] == found[1] != hash_tensors(load_file(adapter / WEIGHTS))
    assert (tmp_path / "with" / "config.yaml").is_file() and not (tmp_path / "without" / "config.yaml").exists()


def test_a_resume_trains_what_one_run_does(demo, adapter, pairs, run_recipe, tmp_path):
    """The reference is in the checkpoint too."""
    given = ["--adapter", adapter, "--max_steps", 3, "--save_strategy", "steps", "--save_steps", 2]
    run_recipe("qwen3_apo", *flags_of(demo, pairs, tmp_path / "whole"), *given, defaults=False)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "half" / "checkpoint-2")
    given += ["--resume_from_checkpoint", "true"]
    run_recipe("qwen3_apo", *flags_of(demo, pairs, tmp_path / "half"), *given, defaults=False)
    found = [hash_tensors(load_file(tmp_path / name / WEIGHTS)) for name in ("whole", "half")]
    assert found[0] == found[1] != hash_tensors(load_file(adapter / WEIGHTS))


# -- its rows ---------------------------------------------------------------------------------------------------------
def turns(question, answer=None):
    said = [{"role": "user", "content": question}]
    if answer is not None:
        said.append({"role": "assistant", "content": answer})
    return said


def prompts(rows):
    return [row["prompt"][0]["content"] for row in rows]


def test_prompts_that_sft_held_out_stay_validation(tmp_path):
    """By its validation split, and where it has none by what its recipe drew: qwen3_lora's own split of the set."""
    sft = Dataset.from_list([{"messages": turns(f"question {number}", "a")} for number in range(60)])
    said = [f"question {number % 60}" + " /no_think" * (number % 2) for number in range(90)]
    rows = [{"prompt": turns(one), "chosen": turns("", "b")[1:], "rejected": turns("", "c")[1:]} for one in said]
    rows += [{"prompt": turns("another"), "chosen": turns("", "b")[1:], "rejected": turns("", "c")[1:]}]
    Dataset.from_list(rows).to_json(tmp_path / "pairs.jsonl")
    sft.to_json(tmp_path / "sft.jsonl")
    splits = {"train": sft.select(range(50)), "validation": sft.select(range(50, 60))}
    DatasetDict(splits).save_to_disk(tmp_path / "sft")
    recipe = load_recipe(RECIPE)
    for name in ("sft", "sft.jsonl"):
        flags = ["--dataset_name", tmp_path / name, "--eval_rows", 10]
        script_args, training_args, _ = parse("qwen3_lora", *flags)
        _, held_out = load_recipe("qwen3_lora")["load_splits"](script_args, training_args.seed)
        held_out = {row["messages"][0]["content"] for row in held_out}
        flags = ["--dataset_name", tmp_path / "pairs.jsonl", "--sft_dataset_name", tmp_path / name, "--eval_rows", 10]
        script_args, training_args, _ = parse(RECIPE, *flags)
        train, validation = recipe["load_splits"](script_args, training_args.seed)
        sides = [{one.removesuffix(" /no_think") for one in prompts(side)} for side in (train, validation)]
        assert sides[1] == held_out and len(held_out) == 10 and sides[0].isdisjoint(held_out)
        assert len(train) + len(validation) == 91


def test_whole_conversations_are_read_as_pairs(tmp_path):
    """As UltraFeedback's: both answers hold the prompt; such rows are split by it too."""
    rows = [{"chosen": turns(f"q{n // 2}", "good"), "rejected": turns(f"q{n // 2}", "bad")} for n in range(12)]
    Dataset.from_list(rows).to_json(tmp_path / "pairs.jsonl")
    script_args, training_args, _ = parse(RECIPE, "--dataset_name", tmp_path / "pairs.jsonl", "--eval_rows", 4)
    train, validation = load_recipe(RECIPE)["load_splits"](script_args, training_args.seed)
    assert len(validation) == 4 and set(prompts(train)).isdisjoint(prompts(validation))
    assert train[0]["chosen"] == turns("", "good")[1:] and train[0]["rejected"] == turns("", "bad")[1:]


# -- what is refused --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--kl_weight", 1], "--kl_weight: the loss has its own hold on the reference"),
        (["--chat_template_path", "no.jinja"], "--chat_template_path no.jinja: no such file"),
        (["--adapter", "no/such"], "--adapter no/such: no adapter_config.json there"),
    ],
)
def test_what_it_cannot_do_is_refused(flags, words, demo, pairs, run_recipe, tmp_path):
    with pytest.raises(UsageError, match=words):
        run_recipe("qwen3_apo", *flags_of(demo, pairs, tmp_path / "run"), *flags, defaults=False)


def test_rows_of_sft_are_refused(demo, run_recipe, tmp_path):
    Dataset.from_list([{"messages": turns("q", "a")}] * 9).to_json(tmp_path / "sft.jsonl")
    with pytest.raises(ValueError, match="are no pairs: they need chosen and rejected"):
        run_recipe("qwen3_apo", *flags_of(demo, tmp_path / "sft.jsonl", tmp_path / "run"), defaults=False)


def test_published_values():
    """SmolLM3's dpo/apo.yaml (alignment-handbook)."""
    script_args, training_args, _ = parse(RECIPE)
    assert (training_args.loss_type, training_args.beta, training_args.learning_rate) == (["apo_zero"], 0.05, 1e-6)
    assert (script_args.global_batch_size, training_args.warmup_steps, training_args.num_train_epochs) == (32, 0.1, 1)
