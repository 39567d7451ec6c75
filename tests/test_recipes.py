"""The recipe contract: copyable, readable, identical where it must be, and what it writes can be taken back."""

import ast
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import EXACT, REPO, TINY
from datasets import Dataset, DatasetDict, load_from_disk
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

RECIPES = sorted((REPO / "recipes").glob("*.py"))
SHARED_BLOCK = ("RecipeArguments", "parse_args", "load_data", "begin")
names = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def definitions(path):
    lines, found = path.read_text().splitlines(), {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min(part.lineno for part in (node, *node.decorator_list))
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


def test_shared_block_is_identical_and_short():
    assert len(RECIPES) >= 2
    blocks = {"\n".join(definitions(path)[name] for name in SHARED_BLOCK) for path in RECIPES}
    assert len(blocks) == 1
    code = [line for line in blocks.pop().splitlines() if line.strip() and not line.strip().startswith("#")]
    assert 40 < len(code) <= 70


@names
def test_a_recipe_is_one_short_file(path):
    source = path.read_text()
    assert 110 <= len(source.splitlines()) <= 160
    tree = ast.parse(source)
    allowed = {"torch", "yaml", "accelerate", "datasets", "transformers", "trl", "peft"} | sys.stdlib_module_names
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert len(modules) > 5 and {module.split(".")[0] for module in modules} <= allowed
    order = [path.read_text().index(mark) for mark in ('"""', "DEFAULTS = dict(", "def parse_args", "def main()")]
    assert order == sorted(order)


@names
def test_launch_lines_of_the_docstring_parse(path, monkeypatch, tmp_path):
    lines = re.findall(r"^ +accelerate launch (.*)$", ast.get_docstring(ast.parse(path.read_text()), clean=False), re.M)
    assert len(lines) >= 2
    for line in lines:
        words = line.split()
        if words[0] == "--config_file":
            assert (REPO / words[1]).is_file()
            words = words[2:]
        assert (REPO / words[0]).resolve() == path
        flags = [*words[1:], "--use_cpu", "true", "--output_dir", str(tmp_path / "none")]
        monkeypatch.setattr(sys, "argv", [str(path), *flags])
        module = runpy.run_path(str(path))
        script, args, model = module["parse_args"]()
        assert script.global_batch_size == module["DEFAULTS"]["global_batch_size"] >= 8
        assert args.gradient_accumulation_steps * args.per_device_train_batch_size == script.global_batch_size
        assert model.attn_implementation is None and args.model_init_kwargs["attn_implementation"] == "sdpa"
        assert args.use_liger_kernel is False and args.resume_from_checkpoint is None


def test_published_values(monkeypatch, tmp_path):
    """The values that the issue of this recipe and the tutorial behind it name (Day-2 QLoRA on a 4080)."""
    monkeypatch.setattr(sys, "argv", ["x", "--use_cpu", "true", "--output_dir", str(tmp_path / "none")])
    module = runpy.run_path(str(REPO / "recipes" / "qwen3_qlora.py"))
    script, args, model = module["parse_args"]()
    from trl import get_peft_config, get_quantization_config

    bits, lora = get_quantization_config(model), get_peft_config(model)
    assert (bits.bnb_4bit_quant_type, bits.bnb_4bit_use_double_quant) == ("nf4", True)
    assert str(bits.bnb_4bit_compute_dtype) == "torch.bfloat16"
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, len(lora.target_modules)) == (16, 32, 0.05, 7)
    assert (args.max_length, args.packing, args.packing_strategy, args.assistant_only_loss) == (2048, True, "bfd", True)
    assert (args.learning_rate, str(args.lr_scheduler_type.value), args.warmup_steps) == (2e-4, "cosine", 0.03)
    assert (args.weight_decay, args.max_grad_norm, args.seed, args.optim) == (0.01, 1.0, 42, "paged_adamw_8bit")
    assert args.activation_checkpointing and script.global_batch_size == 16 and args.bf16


def test_defaults_yaml_flags(monkeypatch, tmp_path, run_recipe):
    (tmp_path / "run.yaml").write_text("learning_rate: 3e-4\nlora_r: 4\n")
    flags = ["--config", str(tmp_path / "run.yaml"), "--lora_r", "2", "--hooks", "c.py", "--use_cpu", "true"]
    monkeypatch.setattr(sys, "argv", ["x", *flags, "--output_dir", str(tmp_path / "none")])
    module = runpy.run_path(str(REPO / "recipes" / "qwen3_qlora.py"))
    script, args, model = module["parse_args"]()
    assert (args.learning_rate, model.lora_r, model.lora_alpha) == (3e-4, 2, 32)
    assert script.hooks[-1] == "c.py"


@names
def test_a_lone_copy_runs(path, demo, tmp_path):
    """In an empty folder elsewhere, without templates, hooks and repository; named by nothing but a flag."""
    copy = Path(shutil.copy(path, tmp_path / "my recipe.py"))
    template = Path(shutil.copy(REPO / "chat_templates" / "qwen3.jinja", tmp_path))
    command = [sys.executable, copy, *TINY, "--max_steps", "2", "--model_name_or_path", demo / "init", "--dataset_name",
               demo / "rows" / "chat", "--chat_template_path", template.name, "--eos_token", "<|im_end|>",
               "--per_device_train_batch_size", "1"]  # fmt: skip
    if own := re.search(r"optimizers\W+(\w+\.py)", path.read_text()):  # a file that a copy cannot do without
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode and re.search(r"--optimizer \S+: no such file: pass", done.stderr), done.stderr[-2000:]
        command += ["--optimizer", shutil.copy(REPO / "recipes" / "optimizers" / own[1], tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("runs on without its hooks") == 1
    run = tmp_path / "runs" / "my recipe"
    assert (run / "my recipe.py").read_text() == path.read_text()
    assert json.loads((run / "versions.json").read_text())["trl"]


def test_config_yaml_is_taken_back(run_recipe, tmp_path):
    flags = ["--learning_rate", "3e-3", "--lora_target_modules", "q_proj", "v_proj"]
    first = run_recipe("qwen3_qlora", *EXACT, *flags, out="first")
    saved = yaml.safe_load((first / "config.yaml").read_text())
    assert saved["learning_rate"] == 3e-3 and saved["lora_target_modules"] == ["q_proj", "v_proj"]
    assert not {"gradient_accumulation_steps", "model_init_kwargs", "config"} & saved.keys()
    second = tmp_path / "second"
    run_recipe("qwen3_qlora", "--config", first / "config.yaml", "--output_dir", second, defaults=False)
    assert (second / "adapter_model.safetensors").read_bytes() == (first / "adapter_model.safetensors").read_bytes()
    again = yaml.safe_load((second / "config.yaml").read_text())
    assert again | {"output_dir": saved["output_dir"]} == saved


def test_saved_template_is_the_serving_form(run_recipe, demo):
    folder = run_recipe("qwen3_qlora", "--max_steps", 1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ours = (REPO / "chat_templates" / "qwen3.jinja").read_text()
    assert "{% generation" not in tokenizer.chat_template and "{%- generation" not in tokenizer.chat_template
    rows = load_from_disk(demo / "rows" / "chat")["train"]
    assert len(rows) > 300
    for row in rows:
        for prompt in (False, True):
            given = {"tools": row.get("tools"), "add_generation_prompt": prompt, **row["chat_template_kwargs"]}
            marked = render_jinja_template([row["messages"]], chat_template=ours, **given)[0][0]
            assert tokenizer.apply_chat_template(row["messages"], tokenize=False, **given) == marked


def test_validation_rows(run_recipe, hook, demo, tmp_path):
    """The set's own split where it has one, else eval_rows drawn by seed: none of them trained, none lost."""
    probe = hook("""
import json
from pathlib import Path
def callback(trainer):
    sets = [[row["input_ids"] for row in rows] for rows in (trainer.train_dataset, trainer.eval_dataset)]
    Path(trainer.args.output_dir, "sets.json").write_text(json.dumps(sets))
    from transformers import TrainerCallback
    return TrainerCallback()
""")
    flags = [*probe, "--packing", "false", "--max_steps", 1, "--eval_rows", 30]
    own = json.loads((run_recipe("qwen3_full", *flags, out="own") / "sets.json").read_text())
    chat = load_from_disk(demo / "rows" / "chat")
    assert len(own[0]) == len(chat["train"]) and len(own[1]) == len(chat["validation"])
    path = tmp_path / "rows.jsonl"
    chat["train"].to_json(path)
    drawn = []
    for name, more in (("a", []), ("b", []), ("c", ["--seed", 7])):
        folder = run_recipe("qwen3_full", *flags, "--dataset_name", path, *more, out=name)
        drawn.append(json.loads((folder / "sets.json").read_text()))
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0][1]) == 30 and sorted(drawn[0][0] + drawn[0][1]) == sorted(own[0])


def test_compiled_rows_stay_apart(run_recipe, hook, tmp_path):
    """Rows that carry input_ids are packs: not packed again, and every document of a pack sees itself alone."""
    probe = hook("""
import json
from pathlib import Path
from transformers import TrainerCallback
def callback(trainer):
    plain = trainer.training_step
    def training_step(model, inputs, *rest, **kwargs):
        found = {name: inputs[name].tolist() for name in ("input_ids", "labels", "position_ids")}
        Path(trainer.args.output_dir, "batch.json").write_text(json.dumps(found | {"mask": "attention_mask" in inputs}))
        return plain(model, inputs, *rest, **kwargs)
    trainer.training_step = training_step
    return TrainerCallback()
""")
    row = {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, 7, -100, 9], "seq_lengths": [3, 2]}
    sets = {"train": Dataset.from_list([row] * 4), "validation": Dataset.from_list([row])}
    DatasetDict(sets).save_to_disk(tmp_path / "set")
    folder = run_recipe("qwen3_full", *probe, "--dataset_name", tmp_path / "set", "--max_steps", 1)
    batch = json.loads((folder / "batch.json").read_text())
    assert batch["input_ids"] == [[5, 6, 7, 8, 9]] and batch["position_ids"] == [[0, 1, 2, 0, 1]]
    assert batch["labels"] == [[-100, 6, 7, -100, 9]] and not batch["mask"]


@pytest.mark.parametrize(
    ("tokens", "eos", "pad", "wanted"),
    [
        (["<eos>", "<a>", "<my_pad>"], "<eos>", None, "<my_pad>"),
        (["<eos>", "<pad>", "<a>"], "<eos>", "<eos>", "<pad>"),
        (["<eos>", "<b>", "<a>"], "<eos>", None, "<b>"),
        (["<eos>", "<b>", "<a>"], "<eos>", "<a>", "<a>"),
    ],
)
def test_pad_is_never_the_stop_token(tokens, eos, pad, wanted, tmp_path, demo, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(demo / "init")
    shutil.copytree(demo / "init", tmp_path / "model")
    raw = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    start = len(tokenizer)
    raw["added_tokens"] = [
        {"id": start + i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True} for i, token in enumerate(tokens)
    ]  # fmt: skip
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(raw))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos} | ({"pad_token": pad} if pad else {})
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    flags = ["--use_cpu", "true", "--model_name_or_path", str(tmp_path / "model")]
    flags += ["--output_dir", str(tmp_path / "none"), "--dataset_name", str(demo / "rows" / "chat")]
    monkeypatch.setattr(sys, "argv", ["x", *flags])
    module = runpy.run_path(str(REPO / "recipes" / "qwen3_qlora.py"))
    tokenizer, _, _ = module["load_data"](*module["parse_args"]())
    assert tokenizer.pad_token == wanted != tokenizer.eos_token


def test_hooks_run_in_order(run_recipe, hook, capsys):
    source = """
def prepare(script, args, model):
    print("HOOK prepare", script.global_batch_size, args.max_length, model.dtype)
def callback(trainer):
    print("HOOK callback", type(trainer).__name__)
    from transformers import TrainerCallback
    return TrainerCallback()
def after(trainer):
    print("HOOK after", trainer.state.global_step)
"""
    run_recipe("qwen3_full", *hook(source), "--max_steps", 1)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("HOOK")]
    assert said == ["HOOK prepare 4 512 float32", "HOOK callback SFTTrainer", "HOOK after 1"]
