"""A resume belongs to its run: what differs is named with both values and refused, allowed, or changes no byte."""

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
import yaml
from datasets import Dataset
from hooks import checkpoints, fingerprints, identity, provenance, resume_rules, run_lock, schedule
from hooks.checks import allowed, checkpoint
from hooks.messages import UsageError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.runs import EXACT, REPO, TINY, parse

SAVES = ["--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2", "--optim", "adamw_torch"]
ON = ["--resume_from_checkpoint", "true"]
ADAPTER = "adapter_model.safetensors"


def recipe_flags(demo, folder):
    template = REPO / "chat_templates" / "qwen3.jinja"
    return [
        *TINY,
        *EXACT,
        *SAVES,
        "--model_name_or_path",
        demo / "init",
        "--dataset_name",
        demo / "rows" / "chat",
        "--chat_template_path",
        template,
        "--output_dir",
        folder,
    ]


@pytest.fixture(scope="session")
def whole(demo, tmp_path_factory):
    """The uninterrupted run of four steps, a checkpoint every two."""
    folder = tmp_path_factory.mktemp("identity") / "whole"
    command = [sys.executable, REPO / "recipes" / "qwen3_qlora.py", *recipe_flags(demo, folder)]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture
def half(whole, tmp_path):
    """The same run as a kill after step 2 leaves it."""
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.rmtree(folder / "checkpoint-4")
    for path in folder.glob("*.safetensors"):
        path.unlink()
    return folder


@pytest.fixture
def go_on(run_recipe, demo, half, capfd):
    """go_on(*flags) resumes the half run: "" and its output, or the sentence by which it is refused."""

    def start(*flags, recipe="qwen3_qlora"):
        capfd.readouterr()
        given = [str(flag) for flag in [*recipe_flags(demo, half), *ON, *flags]]
        try:
            run_recipe(recipe, *given, defaults=False)
        except UsageError as error:
            return str(error), ""
        return "", "".join(capfd.readouterr())

    return start


def weights(folder):
    return load_file(folder / ADAPTER)


# -- the matrix -------------------------------------------------------------------------------------------------------
def arguments_of(demo, folder, *flags):
    script_args, training_args, model_args = parse("qwen3_qlora", *recipe_flags(demo, folder), *ON, *flags)
    training_args.resume_from_checkpoint = str(folder / "checkpoint-2")
    return script_args, training_args, model_args


def test_every_setting_is_refused_by_name_or_changes_nothing(demo, half):
    """Over all fields of the three dataclasses: what stands in no table of resume_rules.py makes another run."""
    arguments = arguments_of(demo, half)
    names = {field.name for argument in arguments for field in fields(argument) if field.init}
    assert resume_rules.FREE | resume_rules.ROUNDING - {"processes"} <= names | {"ignore_bias_buffers"}
    (half / "checkpoint-2" / "run.json").unlink()
    run = json.loads((half / "run.json").read_text())
    assert set(run["settings"]) == names - resume_rules.FREE | {"processes"}
    assert identity.check_settings(*arguments) == run["settings"]

    for name in run["settings"]:
        changed = {**run, "settings": {**run["settings"], name: "another"}}
        (half / "run.json").write_text(json.dumps(changed))
        if name in resume_rules.ROUNDING:
            identity.check_settings(*arguments)
            continue
        with pytest.raises(UsageError) as refusal:
            identity.check_settings(*arguments)
        sentence = str(refusal.value)
        assert f": {name} another, now " in sentence and sentence.count(" now ") == 1, sentence
        arguments[0].allow = [name]
        allowed.check_allowed_names([name], *arguments)
        if name in resume_rules.NOT_LOADABLE:
            assert "--allow" not in sentence
            with pytest.raises(UsageError, match=f"{name} another"):
                identity.check_settings(*arguments)
        else:
            assert f"--allow {name} goes on" in sentence
            identity.check_settings(*arguments)
        arguments[0].allow = []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lora_alpha", "64"], ["lora_alpha 32, now 64", "--allow lora_alpha"]),
        (["--load_in_4bit", "false"], ["load_in_4bit true, now false"]),
        (["--global_batch_size", "8"], ["global_batch_size 4, now 8"]),
        (["--learning_rate", "1e-4", "--seed", "7"], ["learning_rate 0.01, now 0.0001", "seed 42, now 7", "seed goes"]),
        (["--lora_r", "8"], ["lora_r 16, now 8", "another shape", "take the old values"]),
        (["--optim", "adafactor"], ["optim adamw_torch, now adafactor", "another optimizer's state"]),
        (["--use_peft", "false", "--load_in_4bit", "false", "--dtype", "float32"], ["use_peft true, now false"]),
        (
            ["--lora_target_modules", "q_proj", "v_proj", "--allow", "low_coverage"],
            ["now q_proj v_proj", "other layers"],
        ),
        (["--max_length", "480", "--allow", "cut_answers"], ["max_length 512, now 480"]),
        (
            ["--max_steps", "8"],
            [
                "max_steps 4, now 8",
                "the cosine schedule now ends at step 8, so at step 2 the rate jumps from",
                "--allow max_steps",
            ],
        ),
        (["--dataset_train_split", "validation", "--eval_strategy", "no"], ["other training tokens"]),
        (["--eos_token", "<|endoftext|>", "--allow", "pad_is_stop"], ["another tokenizer"]),
    ],
)
def test_a_changed_run_is_refused(go_on, half, flags, words):
    before = (half / "run.json").read_bytes()
    sentence, _ = go_on(*flags)
    assert all(word in sentence for word in [*words, "another --output_dir starts afresh"]), sentence
    assert (half / "run.json").read_bytes() == before and not (half / ADAPTER).exists()


def test_another_base_is_refused(go_on, demo, tmp_path):
    """The same shapes, other weights; the same weights in another folder are the same base."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(demo / "init")
    model.save_pretrained(tmp_path / "moved")
    AutoTokenizer.from_pretrained(demo / "init").save_pretrained(tmp_path / "moved")
    sentence, _ = go_on("--model_name_or_path", tmp_path / "moved")
    assert not sentence, sentence
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    model.save_pretrained(tmp_path / "moved")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    sentence, _ = go_on("--model_name_or_path", tmp_path / "moved")
    assert "with other values: other weights of the base model: take the old values" in sentence, sentence
    sentence, output = go_on("--model_name_or_path", tmp_path / "moved", "--allow", "base_weights")
    assert not sentence and "goes on with" in output
    assert json.loads((tmp_path / "run" / "run.json").read_text())["changes"][0]["name"] == "base_weights"


def test_what_changes_nothing_changes_no_byte(go_on, half, whole):
    """All at once: logging, saving, validation, workers."""
    flags = ["--logging_steps", 2, "--save_steps", 3, "--save_total_limit", 5, "--eval_strategy", "steps"]
    flags += ["--eval_steps", 1, "--per_device_eval_batch_size", 2, "--dataloader_num_workers", 1]
    flags += ["--dataset_num_proc", 2, "--logging_first_step", "true", "--run_name", "other", "--eval_rows", 7]
    flags += ["--eval_on_start", "true", "--num_train_epochs", 9, "--save_only_model", "true"]
    sentence, output = go_on(*flags)
    assert not sentence and "goes on with" not in output
    before = weights(whole)
    after = weights(half)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_other_rounding_trains_the_same_rows(go_on, half, whole):
    flags = [
        "--per_device_train_batch_size",
        2,
        "--attn_implementation",
        "eager",
        "--activation_checkpointing",
        "false",
    ]
    sentence, output = go_on(*flags)
    assert not sentence
    for name in ("per_device_train_batch_size 1, now 2", "attn_implementation sdpa, now eager"):
        assert output.count(f"goes on with {name}: the same rows a step, other rounding") == 1
    before = weights(whole)
    after = weights(half)
    start = weights(whole / "checkpoint-2")
    moved = max(float((before[name] - start[name]).abs().max()) for name in before)
    apart = max(float((before[name] - after[name]).abs().max()) for name in before)
    assert apart < moved / 100, (apart, moved)


# -- new values, where they are allowed -------------------------------------------------------------------------------
def test_an_allowed_learning_rate_is_taken(go_on, half, whole):
    """At 0 nothing moves: the weights stay those of the checkpoint."""
    sentence, output = go_on("--learning_rate", 0, "--allow", "learning_rate")
    assert not sentence and "goes on with learning_rate 0.01, now 0\n" in output
    start = weights(whole / "checkpoint-2")
    after = weights(half)
    assert all(torch.equal(start[name], after[name]) for name in start)
    changes = json.loads((half / "run.json").read_text())["changes"]
    assert [(change["checkpoint"], change["name"], change["now"]) for change in changes] == [
        ("checkpoint-2", "learning_rate", 0.0)
    ]


def test_what_was_allowed_once_is_allowed_again(go_on, half, whole):
    """Killed before its first save, the run is still the checkpoint's: the same line does the same."""
    flags = ["--learning_rate", 0, "--allow", "learning_rate"]
    for _ in range(2):
        shutil.rmtree(half / "checkpoint-4", ignore_errors=True)
        sentence, output = go_on(*flags)
        assert not sentence and "goes on with learning_rate 0.01, now 0\n" in output
        start = weights(whole / "checkpoint-2")
        after = weights(half)
        assert all(torch.equal(start[name], after[name]) for name in start)
    shutil.rmtree(half / "checkpoint-4")
    sentence, output = go_on()  # back to what the checkpoint was trained with
    assert not sentence and "goes on with" not in output
    assert rates(half) == rates(whole)


def rates(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["learning_rate"] for line in lines if "learning_rate" in line]


def test_the_schedule_goes_on_from_the_new_rate(go_on, half, whole):
    """Half the rate: half of what the uninterrupted run had at each step."""
    go_on("--learning_rate", 5e-3, "--allow", "learning_rate")
    assert rates(half)[2:] == pytest.approx([rate / 2 for rate in rates(whole)[2:]]) and len(rates(half)) == 4


def test_more_steps_where_they_are_allowed(go_on, half):
    """From the first step on, the rates are those of the longer schedule: cosine after a warm-up of one step."""
    sentence, output = go_on("--max_steps", 6, "--allow", "max_steps")
    assert not sentence and "goes on with max_steps 4, now 6 (the cosine schedule now ends at step 6" in output
    wanted = [1e-2 * (1 + math.cos(math.pi * (step - 1) / 5)) / 2 for step in (2, 3, 4, 5)]
    assert rates(half)[2:] == pytest.approx(wanted)
    assert (half / "checkpoint-6").is_dir()


@pytest.mark.parametrize(("name", "value"), [("weight_decay", 0.5), ("adam_beta1", 0.5), ("adam_beta2", 0.5)])
def test_other_values_of_the_optimizer(go_on, half, name, value):
    """The state that is saved in the end has them."""
    sentence, _ = go_on(f"--{name}", value, "--allow", name)
    assert not sentence
    groups = torch.load(half / "checkpoint-4" / "optimizer.pt", weights_only=True)["param_groups"]
    held = {"weight_decay": {group["weight_decay"] for group in groups if group["weight_decay"]}}
    held["adam_beta1"] = {group["betas"][0] for group in groups}
    held["adam_beta2"] = {group["betas"][1] for group in groups}
    assert held[name] == {value}


def test_intervals_are_the_resumes_own(go_on, half):
    """transformers goes on with the intervals of the checkpoint."""
    go_on("--save_steps", 1, "--max_steps", 4)
    assert {path.name for path in half.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-4"}


def test_what_the_schedule_does(half):
    """Cosine without warm-up by hand: half of it is 0.5; at 2 of 8 steps it is (1 + cos(pi / 4)) / 2."""
    _, args, _ = parse("qwen3_qlora", "--warmup_steps", "0")
    assert schedule.share_of_peak(args, 2, 4) == pytest.approx(0.5)
    assert schedule.share_of_peak(args, 2, 8) == pytest.approx(0.8535534)
    trainer = SimpleNamespace(args=args)
    told = schedule.describe_schedule(trainer, str(half / "checkpoint-2"), 8)
    # the checkpoint's run had a step of warm-up: a third of its cosine is (1 + cos(pi / 3)) / 2
    assert told == "the cosine schedule now ends at step 8, so at step 2 the rate jumps from 75% to 85% of its peak"
    args.lr_scheduler_type = transformers.SchedulerType.CONSTANT
    (half / "checkpoint-2" / "scheduler.pt").unlink()
    told = schedule.describe_schedule(trainer, str(half / "checkpoint-2"), 8)
    assert told == "the constant schedule now ends at step 8"
    assert "nothing is left" in schedule.describe_schedule(trainer, str(half / "checkpoint-2"), 2)


def test_rules_that_hold_for_some_runs_alone():
    """A mean over micro-batches, a router's loss and a sampler by length make more of a micro-batch than rounding."""
    names = {"per_device_train_batch_size", "processes"}
    plain = {"train_sampling_strategy": "random"}
    assert names <= resume_rules.rounding_names(plain, False)
    assert not names & resume_rules.rounding_names(plain, True)
    assert not names & resume_rules.rounding_names({**plain, "micro_batch_mean": True}, False)
    assert not names & resume_rules.rounding_names({"train_sampling_strategy": "group_by_length"}, False)
    assert "attn_implementation" in resume_rules.rounding_names(plain, True)


def test_what_the_checkpoints_state_forbids():
    plateau = identity.Difference("lr_scheduler_type", "cosine", "reduce_lr_on_plateau")
    other_file = identity.Difference("optimizer", "muon.py 1", "adam_l2.py 2")
    other_text = identity.Difference("optimizer", "muon.py 1", "muon.py 2")
    args = SimpleNamespace(deepspeed_plugin=None, lr_scheduler_type=transformers.SchedulerType.COSINE)
    assert "lr_scheduler_type" in identity.find_not_loadable([plateau], args)
    assert "optimizer" in identity.find_not_loadable([other_file], args)
    assert "optimizer" not in identity.find_not_loadable([other_text], args)
    assert "learning_rate" not in identity.find_not_loadable([], args)
    args.deepspeed_plugin = object()
    assert "learning_rate" in identity.find_not_loadable([], args)
    args = SimpleNamespace(deepspeed_plugin=None, lr_scheduler_type=transformers.SchedulerType.REDUCE_ON_PLATEAU)
    assert "learning_rate" in identity.find_not_loadable([], args)
    fused = identity.Difference("optim", "adamw_torch", "adamw_torch_fused")
    other = identity.Difference("optim", "adamw_torch", "adafactor")
    assert identity.leave_out_rounding([fused, other], {"train_sampling_strategy": "random"}, False) == [other]


@pytest.mark.parametrize("drop_last", [False, True])
def test_steps_are_counted_as_the_trainer_counts_them(tmp_path, drop_last):
    """By transformers' own trainer, in epochs and parts of them."""
    for rows, batch, accumulation, epochs in [
        (7, 2, 2, 1),
        (100, 3, 4, 1.3),
        (8, 4, 2, 2),
        (5, 8, 1, 3),
        (9, 4, 1, 2),
    ]:
        args = transformers.TrainingArguments(
            str(tmp_path),
            use_cpu=True,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=epochs,
            dataloader_drop_last=drop_last and rows > batch,
            remove_unused_columns=False,
        )
        data = Dataset.from_dict({"labels": list(range(rows))})
        trainer = transformers.Trainer(torch.nn.Linear(1, 1), args, train_dataset=data)
        *_, steps = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
        assert schedule.count_steps(trainer) == steps, (rows, batch, accumulation, epochs)


# -- contents ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("change", ["label", "order", "length", "boundary", None])
def test_training_tokens(change):
    rows = [{"input_ids": [1, 2, 3, i], "labels": [-100, 2, 3, i], "seq_lengths": [3, 1]} for i in range(2000)]
    before = fingerprints.hash_tokens(Dataset.from_list(rows))
    if change == "label":
        rows[1500]["labels"][1] = -100
    if change == "order":
        rows[1], rows[2] = rows[2], rows[1]
    if change == "length":
        rows[0]["seq_lengths"] = [2, 2]
    if change == "boundary":  # the same tokens in the same order
        for name in ("input_ids", "labels"):
            rows[0][name].append(rows[1][name].pop(0))
    assert (fingerprints.hash_tokens(Dataset.from_list(rows)) == before) == (change is None)


def test_tokenizers(demo):
    tokenizer = AutoTokenizer.from_pretrained(demo / "init")
    before = fingerprints.hash_tokenizer(tokenizer)
    assert fingerprints.hash_tokenizer(AutoTokenizer.from_pretrained(demo / "init")) == before
    tokenizer.add_special_tokens({"eos_token": "<new>"})
    assert fingerprints.hash_tokenizer(tokenizer) != before


def test_base_weights(tmp_path):
    """Every tensor's ends and middle count, names and types too, shards and metadata do not."""
    tensors = {"a": torch.arange(100_000.0), "b": torch.ones(3, 5), "c": torch.zeros(0)}
    one = tmp_path / "one"
    one.mkdir()
    save_file(tensors, one / "model.safetensors")
    before = fingerprints.hash_weights(one)

    two = tmp_path / "two"
    two.mkdir()
    save_file({"b": tensors["b"]}, two / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    save_file({"a": tensors["a"], "c": tensors["c"]}, two / "model-00002-of-00002.safetensors")
    index = {name: f"model-0000{number}-of-00002.safetensors" for name, number in (("a", 2), ("b", 1), ("c", 2))}
    (two / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    save_file({"other": tensors["a"]}, two / "consolidated.safetensors")  # from_pretrained does not read it
    assert fingerprints.hash_weights(two) == before

    for name, place in (("a", 0), ("a", 50_000), ("a", 99_999), ("b", 7)):
        changed = {key: value.clone() for key, value in tensors.items()}
        changed[name].view(-1)[place] += 1
        save_file(changed, one / "model.safetensors")
        assert fingerprints.hash_weights(one) != before, (name, place)
    save_file({**tensors, "b": tensors["b"].half()}, one / "model.safetensors")
    assert fingerprints.hash_weights(one) != before
    assert fingerprints.hash_weights(tmp_path) is None


def test_config_of_the_base(demo, tmp_path):
    config = json.loads((demo / "init" / "config.json").read_text())
    before = fingerprints.hash_config(demo / "init")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**config, "transformers_version": "6.0", "_name_or_path": "elsewhere"}))
    assert fingerprints.hash_config(tmp_path) == before
    path.write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    assert fingerprints.hash_config(tmp_path) != before


def test_code_counts_by_its_text(tmp_path):
    """A setting that names a Python file, as --optimizer does: its text counts, not where it lies."""
    path = tmp_path / "optimizer.py"
    path.write_text("a = 1")
    before = identity.value_or_code(str(path))
    (tmp_path / "moved").mkdir()
    moved = Path(shutil.copy(path, tmp_path / "moved"))
    assert identity.value_or_code(str(moved)) == before and before.startswith("optimizer.py ")
    path.write_text("a = 2")
    assert identity.value_or_code(str(path)) != before


def test_code_is_what_it_does(tmp_path):
    before = fingerprints.hash_code('"""Text."""\nDEFAULTS = dict(a=1)\ndef f():\n    """Text."""\n    return 1\n')
    same = "DEFAULTS = dict(a=2)  # comment\ndef f():\n    # why\n    return 1\n"
    assert fingerprints.hash_code(same) == before
    assert fingerprints.hash_code(same.replace("return 1", "return 2")) != before


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("recipe", "another recipe, or other code in it"),
        ("template", "another chat template"),
        ("base_config", "another config of the base model"),
        ("mixed_precision", "mixed_precision another, now no"),
        ("adapters", "bias another, now none"),
    ],
)
def test_other_contents(go_on, half, name, sentence):
    """A run whose run.json has another value."""
    for path in (half / "run.json", half / "checkpoint-2" / "run.json"):
        run = json.loads(path.read_text())
        if name == "adapters":
            run["contents"]["adapters"]["bias"] = "another"
        else:
            run["contents"][name] = "another"
        path.write_text(json.dumps(run))
    (half / "checkpoint-2" / "manifest.json").unlink()
    checkpoints.seal(half / "checkpoint-2")
    told, _ = go_on()
    assert f"with other values: {sentence}: take the old values" in told, told
    told, output = go_on("--allow", "bias" if name == "adapters" else name)
    assert not told and f"goes on with {sentence}" in output


def test_settings_of_the_data_allow_what_follows(go_on, half):
    sentence, output = go_on("--max_length", 480, "--allow", "max_length", "cut_answers")
    assert not sentence and "goes on with max_length 512, now 480" in output
    assert "goes on with other training tokens" in output


def test_flags_that_model_init_kwargs_override(half, demo):
    arguments = arguments_of(demo, half, "--model_init_kwargs", '{"dtype": "bfloat16"}')
    with pytest.raises(UsageError, match="dtype float32, now bfloat16"):
        identity.check_settings(*arguments)


@pytest.mark.parametrize("text", ["", "[]", '{"recipe": "a", "data": "b"}', '{"settings": {"seed'])
def test_a_run_json_that_cannot_be_read(go_on, half, text):
    (half / "checkpoint-2" / "run.json").unlink()
    (half / "checkpoint-2" / "manifest.json").unlink()
    checkpoints.seal(half / "checkpoint-2")
    (half / "run.json").write_text(text)
    sentence, output = go_on()
    assert not sentence and output.count("has no run.json that can be read: whether it is of the same run") == 1


def test_a_folder_of_another_run(go_on, half, whole):
    sentence, _ = go_on("--resume_from_checkpoint", whole / "checkpoint-2")
    assert "holds another run than " in sentence and f"--output_dir {whole} goes on there" in sentence
    args = SimpleNamespace(output_dir=str(half), resume_from_checkpoint=None)
    with pytest.raises(UsageError, match="is in use"):
        checkpoint.check_output_dir(args)


# -- the checkpoint ---------------------------------------------------------------------------------------------------
ENGINES = {"FSDP2": ["optimizer_0", "pytorch_model_fsdp_0"], "ZeRO-2": ["latest"], "one process": ["optimizer.pt"]}


@pytest.mark.parametrize("before", ENGINES)
@pytest.mark.parametrize("now", ["FSDP2", "ZeRO-2", "ZeRO-3", "one process", "DDP"])
@pytest.mark.parametrize("processes", [1, 2])
def test_engine_of_the_checkpoint(tmp_path, monkeypatch, before, now, processes):
    """Only one process and DDP read each other's files; shards need their engine and their number of processes."""
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    for name in ENGINES[before]:
        (folder / name).touch()
    monkeypatch.setattr(checkpoint, "name_engine", lambda _: now)
    args = SimpleNamespace(resume_from_checkpoint=str(folder), world_size=processes)
    plain = ("one process", "DDP")
    fits = before in plain and now in plain
    for run in ({}, {"engine": before, "settings": {"processes": 2}}):
        if run:
            fits = fits or (before == now and processes == 2)
        else:
            fits = fits or before[:4] == now[:4]
        sentence = ""
        try:
            checkpoint.check_engine_of_checkpoint(run, args)
        except UsageError as error:
            sentence = str(error)
        assert bool(sentence) != fits, sentence
        if run and not fits:
            assert "was saved by " in sentence and before in sentence and now in sentence, sentence
        fits = before in plain and now in plain


def test_weights_alone_are_no_checkpoint(go_on, half):
    for name in ("optimizer.pt", "scheduler.pt", "manifest.json", "run.json"):
        (half / "checkpoint-2" / name).unlink()
    (half / "run.json").unlink()  # as a run without hooks leaves it
    sentence, _ = go_on()
    assert "holds no optimizer state (--save_only_model true)" in sentence and "--allow save_only_model" in sentence
    sentence, output = go_on("--allow", "save_only_model")
    assert not sentence and "has no run.json that can be read" in output
    assert "goes on with a new optimizer and a schedule from its start" in output


# -- one run a folder -------------------------------------------------------------------------------------------------
WITHOUT_THE_REST = """
import sys, time, types
sys.modules["hooks"] = types.ModuleType("hooks")  # without what its __init__ imports, which takes seconds
sys.modules["hooks"].__path__ = [{hooks!r}]
""".format(hooks=str(REPO / "recipes" / "hooks"))
HOLD = f"""{WITHOUT_THE_REST}
from hooks import run_lock
run_lock.lock_folder(sys.argv[1])
print("held", flush=True)
if sys.stdin.readline() == "stopping\\n":
    run_lock.note_stopping(sys.argv[1])
    print("noted", flush=True)
    time.sleep(1)
"""


@pytest.fixture
def hold(tmp_path):
    """hold(folder) starts a process that holds a folder."""
    started = []

    def start(folder):
        command = [sys.executable, "-c", HOLD, str(folder)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        while process.stdout.readline() != "held\n":
            assert process.poll() is None
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_the_second_run_is_told_who_holds_the_folder(hold, tmp_path):
    folder = tmp_path / "a" / "run"
    process = hold(folder)
    with pytest.raises(UsageError, match=f"process {process.pid} on .*kill -INT {process.pid} has it save and end"):
        run_lock.lock_folder(str(folder))
    process.kill()  # the kernel lets the lock go
    process.wait()
    assert (folder / "_lock").exists()
    run_lock.lock_folder(str(folder))
    run_lock.lock_folder(str(folder))
    run_lock.release_folder(str(folder))
    assert not list(folder.iterdir())


def test_a_folder_in_which_nothing_was_written_goes(tmp_path):
    run_lock.lock_folder(str(tmp_path / "a" / "run"))
    run_lock.release_folder(str(tmp_path / "a" / "run"))
    assert not (tmp_path / "a" / "run").exists()


def test_a_run_that_ends_leaves_no_lock(hold, tmp_path):
    process = hold(tmp_path / "run")
    (tmp_path / "run" / "log.jsonl").touch()
    process.communicate("end\n", timeout=60)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["log.jsonl"]


def test_workers_do_not_hold_the_folder(tmp_path):
    """A forked worker that outlives its run: the folder is free all the same."""
    code = HOLD.partition("if sys.stdin")[0]
    code += "import os\npid = os.fork()\nif pid == 0:\n    time.sleep(60)\n"
    code += "print('forked', pid, sep='\\n', flush=True)\nos._exit(0)\n"
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    assert [process.stdout.readline() for _ in range(2)] == ["held\n", "forked\n"]
    worker = int(process.stdout.readline())
    process.wait()
    try:
        assert Path(f"/proc/{worker}").exists()
        run_lock.lock_folder(str(tmp_path / "run"))
        run_lock.release_folder(str(tmp_path / "run"))
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "lockf", refuse)
    run_lock.lock_folder(str(tmp_path / "run"))
    assert "no locks there (No locks available): two runs in this folder are not told apart" in capsys.readouterr().out
    assert not run_lock.held


def test_an_ended_run_takes_its_lock_away(tmp_path, monkeypatch):
    """A second run that opened the file before it was removed holds nothing: it looks again."""
    folder = tmp_path / "run"
    folder.mkdir()
    real_lockf = run_lock.fcntl.lockf
    calls = []

    def lockf(descriptor, *flags):
        calls.append(descriptor)
        if len(calls) == 1:
            (folder / "_lock").unlink()
        return real_lockf(descriptor, *flags)

    monkeypatch.setattr(run_lock.fcntl, "lockf", lockf)
    run_lock.lock_folder(str(folder))
    assert len(calls) == 2 and (folder / "_lock").exists()
    run_lock.release_folder(str(folder))
    assert folder.is_dir() and not (folder / "_lock").exists()  # the folder was there before


def test_an_output_dir_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="--output_dir .*file cannot be made"):
        run_lock.lock_folder(str(tmp_path / "file"))


def test_a_run_that_stops_is_waited_for(hold, tmp_path, capsys):
    process = hold(tmp_path / "run")
    process.stdin.write("stopping\n")
    process.stdin.flush()
    assert process.stdout.readline() == "noted\n"
    begin = time.monotonic()
    run_lock.lock_folder(str(tmp_path / "run"))
    assert time.monotonic() - begin > 0.4 and process.wait() == 0
    assert f"process {process.pid} still saves its last checkpoint in " in capsys.readouterr().out
    run_lock.release_folder(str(tmp_path / "run"))


def test_two_runs_at_once(demo, tmp_path):
    """Started together: one trains, the other is refused with the pid of the first; no file is of both."""
    folder = tmp_path / "run"
    command = [sys.executable, REPO / "recipes" / "qwen3_qlora.py", *recipe_flags(demo, folder), *ON]
    command = [str(word) for word in command]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    runs = [subprocess.Popen(command, **pipes) for _ in range(2)]
    told = [run.communicate(timeout=300)[0] for run in runs]
    first, second = (0, 1) if runs[0].returncode == 0 else (1, 0)
    assert runs[first].returncode == 0 and runs[second].returncode == 1, told
    assert "is in use: qwen3_qlora.py has trained there since" in told[second]
    assert f"process {runs[first].pid} on" in told[second]
    assert not (folder / "_lock").exists()


def test_a_folder_with_a_lock_alone_is_new(demo, tmp_path, run_recipe):
    """A run that was killed while it loaded."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "_lock").touch()
    assert (run_recipe("qwen3_qlora", "--max_steps", 1) / "log.jsonl").is_file()


@pytest.mark.long
def test_the_same_line_again_waits_for_the_first(demo, tmp_path):
    """Ctrl-C under `accelerate launch` with one process: the launcher is gone, the run saves, the second waits."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [REPO / "accelerate_configs" / "cpu.yaml", REPO / "recipes" / "qwen3_qlora.py"]
    command += [*recipe_flags(demo, folder), "--max_steps", 1000, "--save_steps", 1000, *ON]
    command = [str(word) for word in command]
    with open(tmp_path / "said", "w") as said:
        first = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
    while not (folder / "log.jsonl").is_file() and first.poll() is None:
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGINT)
    first.wait()
    pid = re.search(r"SIGINT: process (\d+) finishes this step", (tmp_path / "said").read_text())[1]
    assert f"kill -INT {pid} quits at once" in (tmp_path / "said").read_text()
    second = subprocess.run([*command, "--max_steps", "3", "--allow", "max_steps"], capture_output=True, text=True)
    assert second.returncode == 0 or "nothing is left" in second.stdout + second.stderr, second.stderr[-2000:]


# -- versions ---------------------------------------------------------------------------------------------------------
def install(folder, name, version):
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text("")
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text(f"{name}/__init__.py,,\n{name}-{version}.dist-info/METADATA,,\n")


@pytest.mark.parametrize("order", [["old", "new"], ["new", "old"]])
def test_versions_are_of_what_was_imported(tmp_path, order):
    """Two copies on the path, and a checkout that is not installed; what is not imported does not stand there."""
    install(tmp_path / "old", "twice", "1.0")
    install(tmp_path / "new", "twice", "2.0")
    install(tmp_path / "new", "never", "3.0")
    (tmp_path / "checkout").mkdir()
    (tmp_path / "checkout" / "bare.py").write_text("__version__ = '0.9'")
    code = (
        f"{WITHOUT_THE_REST}import json; sys.path[:0] = {[str(tmp_path / name) for name in order]!r}; import twice\n"
        f"sys.path[:0] = [{str(tmp_path / 'checkout')!r}, {str(tmp_path / order[1])!r}]\n"
        "import bare, numpy; from hooks import provenance; print(json.dumps(provenance.imported_versions()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    versions = json.loads(done.stdout.splitlines()[-1])
    assert versions["twice"] == {"old": "1.0", "new": "2.0"}[order[0]]
    assert versions["bare"] == "0.9" and "never" not in versions and "transformers" not in versions
    assert versions["numpy"] == np.__version__ and versions["PyYAML"] == yaml.__version__ and versions["python"]


def test_versions_in_a_run_folder(whole):
    versions = json.loads((whole / "versions.json").read_text())
    assert {"torch", "transformers", "trl", "peft", "bitsandbytes", "python"} <= set(versions)
    assert provenance.imported_versions()["transformers"] == transformers.__version__ == versions["transformers"]
