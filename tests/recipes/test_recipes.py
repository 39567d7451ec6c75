"""The recipe contract: copyable, equal where it must be, the same weights alone, and what it writes can be taken back.

Breaks tried, each seen red: a shared function changed in one recipe; a recipe that imports a package of ours; hooks
that cast a weight; a package `hooks` from elsewhere; an adapter left in bf16; a serving template with its markers.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict, load_from_disk
from safetensors.torch import load_file
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template
from trl import get_peft_config, get_quantization_config

from data_prep.common.row_keys import prompt_key
from tests.helpers.runs import EXACT, REPO, SHARED, TINY, launch, load_recipe, parse
from tests.recipes.test_same_weights import hash_tensors

PREFERENCE = REPO / "recipes" / "qwen3_apo.py"  # pairs of TRL's DPOTrainer: tests/recipes/test_apo.py
RECIPES = sorted(path for path in (REPO / "recipes").glob("*.py") if path != PREFERENCE)
SHARED_NAMES = (
    "find_template",
    "RecipeArguments",
    "load_json",
    "load_splits",
    "read_prompt",
    "split_by_prompt",
    "choose_attention",
    "choose_checkpoint",
    "serving_template",
    "parse_args",
    "prepare_weights",
)
OPTIMIZERS = {"step35_sft": "muon.py", "nanochat_sft": "nanochat.py", "nanochat_midtrain": "nanochat.py"}
every_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def definitions(path):
    """{name: source} of a file's top-level functions and classes."""
    source = path.read_text()
    nodes = [node for node in ast.parse(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return {node.name: ast.get_source_segment(source, node) for node in nodes}


# -- the file ---------------------------------------------------------------------------------------------------------
def test_the_shared_part_is_equal():
    assert len(RECIPES) >= 21
    parts = {"\n".join(definitions(path)[name] for name in SHARED_NAMES) for path in RECIPES}
    assert len(parts) == 1
    blocks = {
        re.search(r"(?s)# -- the same in every recipe.*?(?=\n# -- this recipe)", path.read_text())[0]
        for path in RECIPES
    }
    assert len(blocks) == 1


def test_the_preference_recipe_repeats_what_it_shares():
    """With DPOTrainer's names, all but how pairs are loaded; its JSON has two more columns of turns."""
    theirs = definitions(REPO / "recipes" / "qwen3_lora.py")
    own = definitions(PREFERENCE)
    for name in (*SHARED_NAMES, "make_parser"):
        expected = theirs[name].replace("SFTConfig", "DPOConfig").replace("SFTTrainer", "DPOTrainer")
        if name == "load_json":
            expected = expected.replace('"completion", ', '"completion", "chosen", "rejected", ')
        elif name == "make_parser":
            expected = expected.replace("RecipeArguments", "PreferenceArguments")
        assert (own[name] == expected) is (name != "load_splits"), name


@pytest.mark.parametrize(
    ("one", "other"),
    [("qwen3_qlora", "qwen3_moe_lora"), ("qwen3_full", "smollm3_sft"), ("blossom_stage1", "blossom_stage2")],
)
def test_a_diff_shows_settings_and_little_else(one, other):
    """Outside the docstring, what differs are lines of DEFAULTS."""
    trees = [ast.parse((REPO / "recipes" / f"{name}.py").read_text()) for name in (one, other)]
    for tree in trees:
        del tree.body[0]  # the docstring
        tree.body = [node for node in tree.body if getattr(getattr(node, "targets", [0])[0], "id", "") != "DEFAULTS"]
    assert ast.dump(trees[0]) == ast.dump(trees[1])


@every_recipe
def test_a_recipe_imports_published_packages_alone(path):
    tree = ast.parse(path.read_text())
    allowed = {"torch", "accelerate", "datasets", "pandas", "transformers", "trl", "hooks"} | sys.stdlib_module_names
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert len(modules) > 5 and {module.split(".")[0] for module in modules} <= allowed
    marks = ('"""', "DEFAULTS = dict(", "def to_messages", "def parse_args", "def main()", "SFTTrainer(\n")
    places = [path.read_text().index(mark) for mark in marks]
    assert places == sorted(places)
    to_messages = re.search(r"def to_messages.*?\n((?:    # .*\n)+)", path.read_text())
    assert len(to_messages[1].splitlines()) == 2  # how one's own columns go in


@every_recipe
def test_launch_lines_of_the_docstring_parse(path, monkeypatch):
    lines = re.findall(r"^ +accelerate launch (.*)$", ast.get_docstring(ast.parse(path.read_text()), clean=False), re.M)
    assert len(lines) >= 2
    monkeypatch.chdir(REPO)
    for line in lines:
        words = line.split()
        if words[0] == "--config_file":
            assert (REPO / words[1]).is_file()
            words = words[2:]
        assert (REPO / words[0]).resolve() == path
        script_args, training_args, model_args = parse(path, *words[1:])
        assert script_args.global_batch_size == load_recipe(path)["DEFAULTS"]["global_batch_size"] >= 8
        rows = training_args.gradient_accumulation_steps * training_args.per_device_train_batch_size
        assert rows == script_args.global_batch_size
        attention = load_recipe(path)["DEFAULTS"].get("attn_implementation")  # of a family that bars some
        assert training_args.model_init_kwargs["attn_implementation"] == (attention or "sdpa")
        assert model_args.attn_implementation == attention and training_args.use_liger_kernel is False


def test_published_values():
    """The values that the tutorial behind it names (Day-2 QLoRA on a 4080), but its dropout and its seven names."""
    script_args, training_args, model_args = parse("qwen3_qlora")
    bits, lora = get_quantization_config(model_args), get_peft_config(model_args)
    assert (bits.bnb_4bit_quant_type, bits.bnb_4bit_use_double_quant) == ("nf4", True)
    assert str(bits.bnb_4bit_compute_dtype) == "torch.bfloat16"
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.target_modules) == (16, 32, 0.0, "all-linear")
    args = training_args
    assert (args.max_length, args.packing, args.packing_strategy, args.assistant_only_loss) == (2048, True, "bfd", True)
    assert (args.learning_rate, str(args.lr_scheduler_type.value), args.warmup_steps) == (2e-4, "cosine", 0.03)
    assert (args.weight_decay, args.max_grad_norm, args.seed, args.optim) == (0.01, 1.0, 42, "paged_adamw_8bit")
    assert args.activation_checkpointing and script_args.global_batch_size == 16 and args.bf16


def test_defaults_yaml_flags(tmp_path):
    (tmp_path / "run.yaml").write_text("learning_rate: 3e-4\nlora_r: 4\nhooks: [a.py]\n")
    flags = ["--config", tmp_path / "run.yaml", "--lora_r", "2"]
    script_args, training_args, model_args = parse("qwen3_qlora", *flags)
    assert (training_args.learning_rate, model_args.lora_r, model_args.lora_alpha) == (3e-4, 2, 32)
    assert script_args.hooks == ["a.py"]


# -- alone and with hooks ---------------------------------------------------------------------------------------------
@every_recipe
def test_a_lone_copy_runs(path, demo, tmp_path, run_recipe, monkeypatch, capsys):
    """In an empty folder elsewhere, without hooks and repository; its template lies beside it."""
    copy = Path(shutil.copy(path, tmp_path / "my recipe.py"))
    name = re.search(r'find_template\("(.*?)"\)', path.read_text())[1]
    own = "qwen3.jinja"  # of the demo's tokenizer, under the name that the recipe asks for
    shutil.copy(REPO / "chat_templates" / own, tmp_path / name)
    data = demo / "rows" / "chat"
    flags = [*TINY, "--max_steps", "2", "--per_device_train_batch_size", "1"]
    if path.stem == "step35_sft":
        data = tmp_path / "packs.jsonl"
        row = {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, 7, -100, 9], "seq_lengths": [3, 2]}
        Dataset.from_list([row] * 8).to_json(data)
        place = flags.index("--max_length")
        del flags[place : place + 2]
    flags += ["--model_name_or_path", demo / "init", "--dataset_name", data]
    flags += ["--eos_token", "<|im_end|>", "--pad_token", "<|endoftext|>", "--router_aux_loss_coef", "0"]
    monkeypatch.chdir(tmp_path)
    if path.stem in OPTIMIZERS:  # a file that a copy cannot do without
        with pytest.raises(SystemExit):
            run_recipe(copy, *flags, defaults=False)
        assert re.search(r"--optimizer \S.*: no such file: pass", capsys.readouterr().err)
        flags += ["--optimizer", shutil.copy(REPO / "recipes" / "optimizers" / OPTIMIZERS[path.stem], tmp_path)]
    if path.stem == "qwen3_qlora":  # as a user would
        done = subprocess.run([sys.executable, copy, *map(str, flags)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        printed = done.stdout
    else:
        run_recipe(copy, *flags, defaults=False)
        printed = capsys.readouterr().out
    assert printed.count("recipes/hooks is not beside it") == 1 and "loading torch" not in printed
    assert (tmp_path / "runs" / "my recipe" / "tokenizer_config.json").is_file()


def test_a_lone_copy_ignores_no_flag(tmp_path, run_recipe, capsys):
    copy = Path(shutil.copy(REPO / "recipes" / "qwen3_qlora.py", tmp_path))
    for flags, words in (
        (["--hooks", "mine.py"], "--hooks: needs the folder recipes/hooks"),
        (["--gradient_accumulation_steps", "2"], "--gradient_accumulation_steps is derived"),
        (["--output_dir", str(tmp_path)], "is in use: --resume_from_checkpoint true goes on there"),
    ):
        with pytest.raises(SystemExit) as stop:
            run_recipe(copy, "--use_cpu", "true", *flags, defaults=False)
        assert stop.value.code == 2 and words in capsys.readouterr().err


def test_a_lone_copy_resumes_from_a_checkpoint_that_was_saved_to_its_end(tmp_path):
    for step, state in ((9, '{\n "step": 9\n}\n'), (20, '{\n "step": 20'), (10, '{\n "step": 10\n}\n')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-30").mkdir()
    choose_checkpoint = load_recipe("qwen3_full")["choose_checkpoint"]
    _, training_args, _ = parse("qwen3_full", "--resume_from_checkpoint", "true")
    assert choose_checkpoint(training_args) is None
    training_args.output_dir = str(tmp_path)
    assert choose_checkpoint(training_args) == str(tmp_path / "checkpoint-10")
    training_args.resume_from_checkpoint = "elsewhere/checkpoint-3"
    assert choose_checkpoint(training_args) == "elsewhere/checkpoint-3"


def test_text_needs_no_template(run_recipe, demo, tmp_path):
    (tmp_path / "none.yaml").write_text("chat_template_path: null\nassistant_only_loss: false\n")
    flags = [*TINY, "--max_steps", 1, "--model_name_or_path", demo / "init", "--output_dir", tmp_path / "run"]
    flags += ["--dataset_name", demo / "rows" / "pretrain.jsonl", "--config", tmp_path / "none.yaml"]
    run_recipe("qwen3_full", *flags, defaults=False)
    assert (tmp_path / "run" / "model.safetensors").is_file()


def weights(folder):
    return load_file(next(folder.glob("*model.safetensors")))


@pytest.mark.parametrize(
    ("recipe", "flags"),
    [
        ("qwen3_qlora", []),  # bf16
        pytest.param("qwen3_qlora", EXACT, marks=pytest.mark.long),
        ("qwen3_full", EXACT),
        ("qwen3_lora", [*EXACT, "--packing", "false", "--per_device_train_batch_size", "2"]),
    ],
)
def test_hooks_change_no_byte(recipe, flags, demo, tmp_path, run_recipe):
    """With an evaluation and a checkpoint on the way. What is saved is the same too: tokenizer, template, configs."""
    given = [*TINY, *flags, "--model_name_or_path", demo / "init", "--dataset_name", demo / "rows" / "chat"]
    given += ["--chat_template_path", REPO / "chat_templates" / "qwen3.jinja", "--max_steps", 4]
    given += ["--eval_strategy", "steps", "--eval_steps", 2, "--save_strategy", "steps", "--save_steps", 2]
    copy = Path(shutil.copy(REPO / "recipes" / f"{recipe}.py", tmp_path))
    folders = []
    for name, script in (("with", REPO / "recipes" / f"{recipe}.py"), ("without", copy)):
        folders.append(tmp_path / name)
        run_recipe(script, *given, "--output_dir", folders[-1], defaults=False)
    assert hash_tensors(weights(folders[0])) == hash_tensors(weights(folders[1]))
    assert not list(folders[1].glob("*.jsonl")) and (folders[0] / "log.jsonl").is_file()
    saved = weights(folders[0])
    trained = {str(tensor.dtype) for name, tensor in saved.items() if "lora" in name or recipe == "qwen3_full"}
    assert trained == {"torch.float32"}
    same = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    if recipe == "qwen3_full":
        same += ["config.json", "generation_config.json"]
    for name in same:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
    limits = [torch.load(folder / "checkpoint-4/training_args.bin", weights_only=False) for folder in folders]
    assert [args.save_total_limit for args in limits] == [2, 2]  # which hooks take away while a checkpoint is sealed


BESIDE = """
import sys, json
from pathlib import Path
Path({path!r}).write_text("the wrong package was imported")
"""


def test_hooks_are_found_by_their_file(demo, tmp_path):
    """From another folder, with PYTHONSAFEPATH=1, beside installed packages that are named `hooks` and `data_prep`."""
    marks = []
    for name in ("hooks", "data_prep"):
        marks.append(tmp_path / f"{name}.imported")
        (tmp_path / "site" / name).mkdir(parents=True)
        (tmp_path / "site" / name / "__init__.py").write_text(BESIDE.format(path=str(marks[-1])))
    flags = [*TINY, "--max_steps", 1, "--model_name_or_path", demo / "init", "--dataset_name", demo / "rows" / "chat"]
    flags += ["--chat_template_path", REPO / "chat_templates" / "qwen3.jinja", "--output_dir", tmp_path / "run"]
    environment = os.environ | {"PYTHONSAFEPATH": "1", "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, REPO / "recipes" / "qwen3_full.py", *flags]
    done = subprocess.run([*map(str, command)], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("qwen3_full.py: loading ") and "tokens trained" in done.stdout
    assert (tmp_path / "run" / "loss.png").is_file() and not any(mark.exists() for mark in marks)
    copy = shutil.copy(REPO / "recipes" / "qwen3_full.py", tmp_path)  # a lone copy takes none of them either
    command = [sys.executable, copy, *flags[:-1], tmp_path / "lone"]
    done = subprocess.run([*map(str, command)], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and not any(mark.exists() for mark in marks), done.stderr[-2000:]


def test_messages_come_once_a_run(demo, tmp_path):
    """Two processes, from another working directory."""
    flags = [*TINY, "--max_steps", 2, "--model_name_or_path", demo / "init", "--dataset_name", demo / "rows" / "chat"]
    flags += ["--chat_template_path", REPO / "chat_templates" / "qwen3.jinja", "--output_dir", tmp_path / "run"]
    done = launch(REPO / "recipes" / "qwen3_qlora.py", *flags, config="cpu_2proc", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    own = [line for line in done.stdout.splitlines() if line.startswith("qwen3_qlora.py: ")]
    assert len(own) == len(set(own)) >= 2 and own[0].endswith("loading torch, transformers and TRL")
    assert done.stdout.count("  engine ") == 1 and len(re.findall(r"^\d/2  loss", done.stdout, re.M)) == 2


def test_the_first_line_comes_before_the_imports(tmp_path):
    """What it needs for that is the standard library."""
    code = "import sys; sys.argv = [sys.argv[1]]; import hooks.startup; print(sorted(sys.modules))"
    (tmp_path / "hooks").mkdir()
    for name in ("startup", "quiet"):
        shutil.copy(REPO / "recipes" / "hooks" / f"{name}.py", tmp_path / "hooks")
    (tmp_path / "hooks" / "__init__.py").touch()
    for name in ("__init__.py", "common/__init__.py", "common/quiet.py"):
        (tmp_path / "data_prep" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPO / "data_prep" / name, tmp_path / "data_prep" / name)
    command = [sys.executable, "-c", code, tmp_path / "my.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    first, modules = done.stdout.splitlines()
    assert first == "my.py: loading torch, transformers and TRL"
    assert not {"torch", "transformers", "trl", "datasets", "numpy"} & set(ast.literal_eval(modules))


# -- what it reads and writes -----------------------------------------------------------------------------------------
def test_config_yaml_is_taken_back(run_recipe, tmp_path):
    flags = ["--learning_rate", "3e-3", "--lora_target_modules", "q_proj", "v_proj", "--allow", "low_coverage"]
    first = run_recipe("qwen3_qlora", *EXACT, *flags, out="first")
    saved = yaml.safe_load((first / "config.yaml").read_text())
    assert saved["learning_rate"] == 3e-3 and saved["lora_target_modules"] == ["q_proj", "v_proj"]
    assert not {"gradient_accumulation_steps", "model_init_kwargs", "config"} & saved.keys()
    assert json.loads((first / "versions.json").read_text())["trl"]
    machine = json.loads((first / "machine.json").read_text())
    memory = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    assert machine["ram_gib"] == pytest.approx(int(memory.split()[1]) / 2**20, abs=0.1)
    assert machine["cuda"] == torch.version.cuda and len(machine["gpus"]) == torch.cuda.device_count()
    assert (first / "qwen3_qlora.py").read_text() == (REPO / "recipes" / "qwen3_qlora.py").read_text()
    second = tmp_path / "second"
    run_recipe("qwen3_qlora", "--config", first / "config.yaml", "--output_dir", second, defaults=False)
    assert (second / "adapter_model.safetensors").read_bytes() == (first / "adapter_model.safetensors").read_bytes()
    again = yaml.safe_load((second / "config.yaml").read_text())
    assert again | {"output_dir": saved["output_dir"]} == saved


def test_all_linear_trains_what_the_seven_names_train(run_recipe):
    seven = ["--lora_target_modules", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapters = [weights(run_recipe("qwen3_qlora", *EXACT, *flags, out=f"run{len(flags)}")) for flags in ([], seven)]
    assert hash_tensors(adapters[0]) == hash_tensors(adapters[1])


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
from transformers import TrainerCallback
class Sets(TrainerCallback):
    def __init__(self, trainer):
        sets = [[row["input_ids"] for row in rows] for rows in (trainer.train_dataset, trainer.eval_dataset)]
        Path(trainer.args.output_dir).mkdir(exist_ok=True)
        Path(trainer.args.output_dir, "sets.json").write_text(json.dumps(sets))
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


def chat(question, answer="a", system=None):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if system is not None:
        turns = [{"role": "system", "content": system}, *turns]
    return {"messages": turns}


@pytest.fixture(scope="module")
def split():
    """split(rows, eval_rows, seed) is a recipe's split_by_prompt."""
    split_by_prompt = load_recipe("qwen3_full")["split_by_prompt"]

    def draw(rows, eval_rows, seed=42):
        script_args = SimpleNamespace(dataset_name="rows.jsonl", eval_rows=eval_rows)
        return split_by_prompt(Dataset.from_list(rows), script_args, seed)

    return draw


@pytest.mark.parametrize("seed", [42, 7])
def test_rows_with_prompts_of_their_own_are_drawn_as_datasets_draws(split, seed):
    rows = [chat(f"question {number}") for number in range(50)]
    train, validation = split(rows, 9, seed)
    drawn = Dataset.from_list(rows).train_test_split(9, seed=seed)
    assert train.to_list() == drawn["train"].to_list() and validation.to_list() == drawn["test"].to_list()


@pytest.mark.parametrize("eval_rows", [1, 10, 30])
def test_a_prompt_stands_on_one_side(split, eval_rows):
    """By the rule of data_prep/mix.py: blanks, /think, /no_think and a system turn of these alone do not count."""
    rows = []
    for number in range(40):
        variants = [
            chat(f"what is {number}?"),
            chat(f" what  is\n{number}? /no_think", answer="b"),
            chat(f"what is {number}?", answer="c", system="/think"),
        ]
        rows += variants[: 1 + number % 3]
        rows += [chat(f"what is {number}?", answer=f"long {number}", system="You are a pirate.")]
    for seed in (42, 7):
        train, validation = split(rows, eval_rows, seed)
        sides = [{prompt_key(row) for row in side} for side in (train, validation)]
        assert sides[0].isdisjoint(sides[1]) and len(sides[0] | sides[1]) == 80
        assert len(validation) == eval_rows  # there are prompts of one row to fill up with
        answers = sorted(json.dumps(row) for row in [*train, *validation])
        assert answers == sorted(json.dumps(row) for row in Dataset.from_list(rows))
        again = split(rows, eval_rows, seed)
        assert [side.to_list() for side in again] == [train.to_list(), validation.to_list()]


@pytest.mark.parametrize(
    ("sizes", "eval_rows", "drawn"),
    [
        ({"a": 4, "b": 3}, 3, {"b": 3}),
        ({"a": 9, "b": 1, "c": 1}, 5, {"b": 1, "c": 1}),  # fewer
        ({"a": 9, "b": 4, "c": 4}, 8, {"b": 4, "c": 4}),
    ],
)
def test_prompts_are_drawn_whole(split, sizes, eval_rows, drawn):
    rows = [chat(prompt, answer=f"{number}") for prompt, size in sizes.items() for number in range(size)]
    for seed in range(5):
        train, validation = split(rows, eval_rows, seed)
        assert Counter(row["messages"][0]["content"] for row in validation) == drawn
        assert len(train) == sum(sizes.values()) - sum(drawn.values())


@pytest.mark.parametrize(
    "make_row",
    [
        lambda prompt, number: {"prompt": prompt, "completion": f"{number}"},
        lambda prompt, number: {
            "prompt": chat(prompt)["messages"][:1],
            "completion": chat("", f"{number}")["messages"][1:],
        },
        lambda prompt, number: {"text": prompt, "note": number},
        lambda prompt, number: {"input_ids": [ord(letter) for letter in prompt], "labels": [number]},
    ],
    ids=["text pairs", "pairs of turns", "text", "token ids"],
)
def test_other_rows_with_the_same_prompt(split, make_row):
    rows = [make_row(prompt, number) for prompt in ("aa", "bb", "cc", "dd", "ee") for number in range(3)]
    train, validation = split(rows, 7)
    column = next(iter(rows[0]))
    prompts = [{json.dumps(row[column]) for row in side} for side in (train, validation)]
    assert [len(train), len(validation)] == [9, 6]
    assert [len(side) for side in prompts] == [3, 2] and prompts[0].isdisjoint(prompts[1])


@pytest.mark.parametrize("eval_rows", [5, 9, -1])
def test_too_few_rows_are_said_by_the_flag(split, eval_rows):
    rows = [chat("a"), chat("a"), chat("b"), chat("c"), chat("d")]
    with pytest.raises(ValueError) as error:
        split(rows, eval_rows)
    assert str(error.value) == (
        f"--eval_rows {eval_rows}: dataset rows.jsonl has 5 rows of 4 prompts, which stay whole: pass another number, "
        "or 0 for no validation"
    )
    with pytest.raises(ValueError, match="has 3 rows of 1 prompts, which stay whole"):
        split([chat("a")] * 3, 1)


def test_question_and_answer_become_messages_in_both_splits(tmp_path):
    rows = Dataset.from_list([{"question": f"q{number}", "answer": f"a{number}"} for number in range(6)])
    splits = {"train": rows.select(range(4)), "validation": rows.select([4, 5])}
    DatasetDict(splits).save_to_disk(tmp_path / "set")
    script_args, *_ = parse("qwen3_qlora", "--dataset_name", tmp_path / "set")
    train, validation = load_recipe("qwen3_qlora")["load_splits"](script_args, 42)
    assert train.column_names == validation.column_names == ["messages"]
    turns = [{"role": "user", "content": "q5"}, {"role": "assistant", "content": "a5"}]
    assert validation[1]["messages"] == turns and len(train) == 4


COMPILED = ["--config", str(REPO / "recipes" / "configs" / "compiled.yaml")]


def test_compiled_rows_stay_apart(run_recipe, hook, demo, tmp_path):
    """By settings that one can read: not packed again, and every document of a pack sees itself alone."""
    probe = hook("""
import json
from pathlib import Path
from transformers import TrainerCallback
class Batch(TrainerCallback):
    def __init__(self, trainer):
        plain = trainer.training_step
        def training_step(model, inputs, *rest, **kwargs):
            found = {name: inputs[name].tolist() for name in ("input_ids", "labels", "position_ids")}
            found["mask"] = "attention_mask" in inputs
            Path(trainer.args.output_dir, "batch.json").write_text(json.dumps(found))
            return plain(model, inputs, *rest, **kwargs)
        trainer.training_step = training_step
""")
    row = {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, 7, -100, 9], "seq_lengths": [3, 2]}
    sets = {"train": Dataset.from_list([row] * 4), "validation": Dataset.from_list([row])}
    DatasetDict(sets).save_to_disk(tmp_path / "set")
    flags = ["--use_cpu", "true", "--model_name_or_path", demo / "init", "--dataset_name", tmp_path / "set"]
    flags += ["--chat_template_path", REPO / "chat_templates" / "qwen3.jinja", "--output_dir", tmp_path / "run"]
    flags += ["--global_batch_size", 4, "--max_steps", 1, "--save_strategy", "no", "--eval_strategy", "no"]
    run_recipe("qwen3_full", *COMPILED, *probe, *flags, defaults=False)
    batch = json.loads((tmp_path / "run" / "batch.json").read_text())
    assert batch["input_ids"] == [[5, 6, 7, 8, 9]] and batch["position_ids"] == [[0, 1, 2, 0, 1]]
    assert batch["labels"] == [[-100, 6, 7, -100, 9]] and not batch["mask"]
    flags[flags.index(tmp_path / "run")] = tmp_path / "refused"
    chats = [tmp_path / "set", demo / "rows" / "chat"]
    with pytest.raises(ValueError, match="rows are not compiled.*would train every token"):
        run_recipe("qwen3_full", *COMPILED, *[chats[1] if flag == chats[0] else flag for flag in flags], defaults=False)
    with pytest.raises(ValueError, match="compiled set.*--config recipes/configs/compiled.yaml"):
        run_recipe("qwen3_full", *flags, defaults=False)


@pytest.mark.parametrize("recipe", [path.stem for path in RECIPES])
def test_a_family_whose_pad_token_means_stop_has_a_setting(recipe):
    """SmolLM3's published tokenizer pads with its stop token; the setting is another token of its vocabulary."""
    defaults = load_recipe(recipe)["DEFAULTS"]
    pad, eos = defaults.get("pad_token"), defaults.get("eos_token")
    assert pad is None or pad != eos
    if recipe.startswith("smollm3"):
        folder = SHARED / "tokenizers" / "smollm3"
        if not folder.is_dir():
            pytest.skip("../shared is absent: the published tokenizer cannot be asked")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.pad_token == eos and pad in tokenizer.get_vocab()


# -- hooks of one's own -----------------------------------------------------------------------------------------------
def test_a_users_file_defines_callbacks(run_recipe, hook, capsys):
    source = """
from transformers import EarlyStoppingCallback, TrainerCallback
class _Base(TrainerCallback):
    pass
class First(_Base):
    def __init__(self, trainer):
        print("HOOK first", type(trainer).__mro__[1].__module__, len(trainer.train_rows) > 300)
    def on_train_end(self, args, state, control, **kwargs):
        print("HOOK end", state.global_step)
class Second(TrainerCallback):
    def __init__(self, trainer):
        print("HOOK second", trainer.args.output_dir.endswith("run"))
"""
    run_recipe("qwen3_full", *hook(source), "--max_steps", 1)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("HOOK")]
    assert said == ["HOOK first trl.trainer.sft_trainer True", "HOOK second True", "HOOK end 1"]


def test_a_file_without_callbacks_is_refused(run_recipe, hook):
    """Before anything is loaded: the model that is named here does not exist."""
    with pytest.raises(ValueError, match="defines no TrainerCallback"):
        run_recipe("qwen3_full", *hook("def callback(trainer):\n    pass\n"), "--model_name_or_path", "no/such")
    with pytest.raises(ValueError, match="--hooks no_such.py: no such file"):
        run_recipe("qwen3_full", "--hooks", "no_such.py", "--model_name_or_path", "no/such")
