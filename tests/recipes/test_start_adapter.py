"""--adapter: a run that trains on from an adapter is PEFT's own adapter, trained by TRL; what does not fit is refused.

Breaks tried, each seen red: the weights not loaded; the settings' alpha kept; the base compared by name alone; the
start left out of run.json; signals taken in any thread.
"""

import json
import runpy
import shutil
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import load_from_disk
from hooks.messages import UsageError
from hooks.start_adapter import take_start_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from tests.helpers.engines import ENGINES, run
from tests.helpers.runs import EXACT, REPO, TINY
from tests.recipes.test_same_weights import hash_tensors

WEIGHTS = "adapter_model.safetensors"
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_adapter(demo, folder, base=None, **values):
    """An adapter that PEFT wrote, whose B is no zeros; r, alpha and layers are not the recipe's."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base or demo / "init", dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 12, "target_modules": SEVEN, "task_type": "CAUSAL_LM"}
    model = get_peft_model(model, LoraConfig(**settings | values))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.02)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(demo, tmp_path_factory):
    return make_adapter(demo, tmp_path_factory.mktemp("start") / "adapter")


# -- what is trained --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("recipe", ["qwen3_lora", "qwen3_qlora"])
def test_without_an_update_it_is_the_same_adapter(recipe, adapter, run_recipe, capsys):
    """A step at a rate of 0; in 4 bits too, and with the recipe's dropout, dtype and layers."""
    folder = run_recipe(recipe, "--adapter", adapter, "--learning_rate", 0, "--max_steps", 1)
    assert hash_tensors(load_file(folder / WEIGHTS)) == hash_tensors(load_file(adapter / WEIGHTS))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], sorted(config["target_modules"])) == (4, 12, sorted(SEVEN))
    said = capsys.readouterr().out
    assert "takes its lora_r 4 (the settings: 16), lora_alpha 12 (the settings: 32), lora_target_modules" in said
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert (saved["lora_r"], saved["lora_alpha"], saved["adapter"]) == (4, 12, str(adapter))


def train_by_peft_and_trl(demo, adapter, folder):
    """What our recipe's settings are, by hand: PEFT loads the adapter, TRL trains it. No code of ours."""
    model = AutoModelForCausalLM.from_pretrained(demo / "init", dtype=torch.float32, attn_implementation="sdpa")
    model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    args = SFTConfig(
        str(folder),
        use_cpu=True,
        bf16=False,
        max_length=512,
        packing=True,
        padding_free=True,
        assistant_only_loss=True,
        chat_template_path=str(REPO / "chat_templates" / "qwen3.jinja"),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        max_steps=4,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        weight_decay=0.01,
        activation_checkpointing=True,
        optim="adamw_torch_fused",
        seed=42,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(model, args, train_dataset=load_from_disk(demo / "rows" / "chat")["train"])
    trainer.train()
    trainer.save_model()
    return load_file(folder / WEIGHTS)


def test_it_trains_what_peft_loads_and_trl_trains_and_is_merged_as_any_other(demo, adapter, run_recipe, tmp_path):
    folder = run_recipe("qwen3_lora", *EXACT, "--adapter", adapter)
    own = load_file(folder / WEIGHTS)
    expected = train_by_peft_and_trl(demo, adapter, tmp_path / "by hand")
    start = load_file(adapter / WEIGHTS)
    assert hash_tensors(own) == hash_tensors(expected) != hash_tensors(start)
    command = [sys.executable, "-m", "eval.merge", folder, "--out", tmp_path / "merged", "--prompts", "0"]
    run([*map(str, command)], cwd=REPO)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    a, b = (own[f"base_model.model.{name}.lora_{letter}.weight"].double() for letter in "AB")
    base = load_file(demo / "init" / "model.safetensors")[f"{name}.weight"].double()
    assert torch.allclose(merged[f"{name}.weight"].double(), base + 12 / 4 * b @ a, atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2"])
def test_several_processes_train_what_one_does(engine, demo, adapter, tmp_path):
    found = []
    for name in ("one", engine):
        data = ["--model_name_or_path", demo / "init", "--dataset_name", demo / "rows" / "chat"]
        data += ["--chat_template_path", REPO / "chat_templates" / "qwen3.jinja", "--output_dir", tmp_path / name]
        flags = ["--max_steps", 4, "--global_batch_size", 4, "--max_length", 512, "--learning_rate", "1e-3"]
        flags += ["--save_strategy", "no", "--eval_strategy", "no", "--adapter", adapter, *EXACT]
        run(ENGINES[name].command("qwen3_lora", *data, *flags))
        found.append(load_file(tmp_path / name / WEIGHTS))
    for name, weight in found[0].items():
        assert (weight - found[1][name]).abs().max() < 1e-4, name


def test_the_base_of_kl_is_the_model_without_adapters(adapter, run_recipe):
    """It moves from there, not from where this run began."""
    flags = [*EXACT, "--learning_rate", 0, "--max_steps", 1, "--kl_weight", 1, "--lora_r", 4]
    folder = run_recipe("qwen3_lora", *flags, "--adapter", adapter)
    first = json.loads((folder / "log.jsonl").read_text().splitlines()[0])
    assert first["kl"] > 1e-4  # a new adapter's is 0


# -- a resume ---------------------------------------------------------------------------------------------------------
def test_a_resume_is_held_against_its_start(demo, adapter, run_recipe, tmp_path):
    other = make_adapter(demo, tmp_path / "other", r=4)
    weights = load_file(other / WEIGHTS)
    save_file({name: weight * 2 for name, weight in weights.items()}, other / WEIGHTS, {"format": "pt"})
    flags = [*EXACT, "--max_steps", 2, "--save_strategy", "steps", "--save_steps", 1]
    whole = run_recipe("qwen3_lora", *flags, "--adapter", adapter, out="whole")
    shutil.copytree(whole, tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoint-2")
    for more, now in ((["--adapter", other], "another adapter to start from"), ([], "another adapter to start from")):
        with pytest.raises(UsageError, match=now):
            run_recipe(
                "qwen3_lora",
                *flags,
                "--lora_r",
                4,
                "--lora_alpha",
                12,
                "--lora_target_modules",
                *SEVEN,
                *more,
                "--resume_from_checkpoint",
                "true",
                out="half",
            )
    moved = shutil.copytree(adapter, tmp_path / "moved")
    half = run_recipe("qwen3_lora", *flags, "--adapter", moved, "--resume_from_checkpoint", "true", out="half")
    assert hash_tensors(load_file(half / WEIGHTS)) == hash_tensors(load_file(whole / WEIGHTS))
    assert take(whole / "checkpoint-1", demo / "init") == {}  # a checkpoint is one too


# -- what is refused --------------------------------------------------------------------------------------------------
def take(adapter, base, zero_stage=None, **values):
    script_args = SimpleNamespace(adapter=str(adapter))
    plugin = None if zero_stage is None else SimpleNamespace(zero_stage=zero_stage)
    training_args = SimpleNamespace(deepspeed_plugin=plugin)
    settings = {"use_peft": True, "lora_r": 4, "lora_alpha": 12, "lora_target_modules": SEVEN, "use_dora": False}
    settings |= {"lora_target_parameters": None, "lora_modules_to_save": None, "use_rslora": False}
    model_args = SimpleNamespace(model_name_or_path=str(base), model_revision="main", **settings | values)
    return take_start_adapter(script_args, training_args, model_args)


def test_settings_that_agree_are_not_spoken_of(demo, adapter, capsys):
    assert take(adapter, demo / "init", lora_target_modules=SEVEN[::-1]) == {} and not capsys.readouterr().out
    assert take(adapter, demo / "init", lora_target_modules="all-linear") == {"lora_target_modules": sorted(SEVEN)}
    assert take(adapter, demo / "init", use_rslora=True) == {"use_rslora": False}


def test_a_base_is_known_by_its_weights(demo, adapter, tmp_path):
    moved = shutil.copytree(demo / "init", tmp_path / "moved")
    assert take(adapter, moved) == {}
    weights = load_file(moved / "model.safetensors")
    changed = next(iter(weights))
    save_file(weights | {changed: weights[changed] + 1}, moved / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError) as error:
        take(adapter, moved)
    assert f"was trained on {demo / 'init'}, and --model_name_or_path is {moved}" in str(error.value)
    of_a_run = shutil.copytree(adapter, tmp_path / "run")  # its run knows the weights by their hash
    contents = {"engine": "", "settings": {}, "contents": {"base_weights": "of another revision"}}
    (of_a_run / "run.json").write_text(json.dumps(contents))
    with pytest.raises(UsageError, match="was trained on other weights of"):
        take(of_a_run, demo / "init")
    with pytest.raises(UsageError, match="was trained on .*init, and --model_name_or_path is Qwen/Qwen3-8B"):
        take(adapter, "Qwen/Qwen3-8B")  # not on this machine: by name


def test_what_cannot_be_trained_on_is_refused(demo, adapter, tmp_path):
    base = demo / "init"
    with pytest.raises(UsageError, match="--adapter: full fine-tuning trains no adapter"):
        take(adapter, base, use_peft=False)
    with pytest.raises(UsageError, match="--adapter: ZeRO-3"):
        take(adapter, base, zero_stage=3)
    assert take(adapter, base, zero_stage=2) == {}
    with pytest.raises(UsageError, match="no adapter_config.json there"):
        take(base, base)
    for values, words in (
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"bias": "lora_only"}, "bias lora_only"),
    ):
        odd = make_adapter(demo, tmp_path / words.split()[0], **values)
        with pytest.raises(UsageError, match=f"has what no setting of a recipe says \\({words}"):
            take(odd, base)
    bent = shutil.copytree(adapter, tmp_path / "bent")
    config = json.loads((bent / "adapter_config.json").read_text())
    (bent / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
    with pytest.raises(UsageError, match="init_lora_weights pissa"):
        take(bent, base)
    (bent / "adapter_config.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        take(bent, base)
    (bent / WEIGHTS).unlink()
    with pytest.raises(UsageError, match=f"no {WEIGHTS} there"):
        take(bent, base)


def test_weights_that_do_not_fit_are_refused(adapter, run_recipe, tmp_path):
    odd = shutil.copytree(adapter, tmp_path / "odd")
    weights = load_file(odd / WEIGHTS)
    first = next(iter(weights))
    save_file({name: weight for name, weight in weights.items() if name != first}, odd / WEIGHTS, {"format": "pt"})
    with pytest.raises(UsageError, match="1 weights of it and of this model do not match"):
        run_recipe("qwen3_lora", "--adapter", odd)
    save_file(weights | {first: weights[first][:2]}, odd / WEIGHTS, {"format": "pt"})
    with pytest.raises(UsageError, match="does not fit this model: size mismatch"):
        run_recipe("qwen3_lora", "--adapter", odd, out="second")


def test_a_lone_copy_knows_no_such_flag(adapter, run_recipe, tmp_path, capsys):
    copy = Path(shutil.copy(REPO / "recipes" / "qwen3_lora.py", tmp_path))
    with pytest.raises((SystemExit, ValueError)) as error:
        run_recipe(copy, "--use_cpu", "true", "--adapter", adapter, defaults=False)
    assert "--adapter" in f"{error.value}{capsys.readouterr().err}"


# -- in a thread, as Ray Train runs it --------------------------------------------------------------------------------
def test_a_recipe_runs_in_a_thread(demo, monkeypatch, tmp_path, capsys):
    """Python takes signal handlers in its main thread alone: such a run says that no signal saves it, and trains."""
    flags = [*TINY, "--max_steps", 1, "--save_strategy", "steps", "--save_steps", 1, "--output_dir", tmp_path / "run"]
    flags += ["--model_name_or_path", demo / "init", "--dataset_name", demo / "rows" / "chat"]
    recipe = REPO / "recipes" / "qwen3_lora.py"
    flags += ["--chat_template_path", REPO / "chat_templates" / "qwen3.jinja"]
    monkeypatch.setattr(sys, "argv", [str(recipe), *map(str, flags)])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "path", list(sys.path))
    errors = []

    def run_main():
        try:
            runpy.run_path(str(recipe))["main"]()
        except BaseException as error:
            errors.append(error)

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    thread = threading.Thread(target=run_main)
    thread.start()
    thread.join()
    assert not errors and (tmp_path / "run" / "checkpoint-1" / "run.json").is_file()
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert capsys.readouterr().out.count("no signal saves it") == 1
