"""The recipes and configs of the table "Which recipe": each on a tiny model of its own architecture, for two steps.

Each keeps its own template, stop and padding token, attention, adapter targets and bits; only sizes are smaller. The
oracle of the coverage line multiplies the shapes of the adapters that were saved, and counts the matrices of the plain
model by name: it knows neither PEFT's modules nor the hooks. A recipe alone in a folder: test_recipes.py.

Breaks tried, each seen red: a stop token left to the tokenizer (gemma4, phi4_mini); a pattern of layers that takes
the tower for images (gemma3), the class with images (qwen3_5), all-linear on a router (qwen3_moe), the seven usual
names (phi4); packs where the probe says leak, the config's balance loss, experts left in MXFP4 (gpt_oss); a base that
is not in 4 bits (llama3_1); another family's template (qwen2_5, tool_calling); twins without their reasoning.
"""

import copy
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import torch
import transformers
import yaml
from hooks.checks.packing import PackedRowsFail, probe_packing
from hooks.messages import UsageError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils.import_utils import is_causal_conv1d_available

from data_prep import check
from eval import tool_calls
from eval.common.bfcl import list_tools
from tests.helpers.runs import REPO, load_recipe, parse, run_script
from tests.helpers.template_oracle import ALL_FAMILIES
from tests.recipes.test_coverage import VISION, matrices, small_config
from tests.templates.test_chat_templates import small_tokenizer

BY_NAME = {family.name: family for family in ALL_FAMILIES}
PADS = ("<|endoftext|>", "<|finetune_right_pad_id|>", "<pad>", "<|pad|>")  # what the published tokenizers call padding
CONFIGS = REPO / "recipes" / "configs"
LOOK = {
    "name": "look",
    "description": "Look a word up.",
    "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
}


@dataclass(frozen=True)
class Shelf:
    """A recipe or a config of one, and what its architecture is in small."""

    kind: str  # model type of the text model
    template: str
    pad: str = "<|endoftext|>"  # of the published tokenizer; None: it has none
    own_stop: str | None = None  # of the published tokenizer, where it is not the oracle's
    composite: str | None = None  # model type of a checkpoint with images around the text model
    recipe: str | None = None  # of a config


SHELF = {
    "qwen3_5_lora": Shelf("qwen3_5_text", "qwen3_5", own_stop="<|im_end|>", composite="qwen3_5"),
    "gemma4_lora": Shelf("gemma4_text", "gemma4", pad="<pad>", composite="gemma4"),
    "gemma3_qlora": Shelf("gemma3_text", "gemma3", pad="<pad>", composite="gemma3"),
    "llama3_1_qlora": Shelf("llama", "llama3_1", pad=None),
    "qwen2_5_qlora": Shelf("qwen2", "qwen2_5", own_stop="<|im_end|>"),
    "gpt_oss_lora": Shelf("gpt_oss", "gpt_oss", own_stop="<|return|>"),
    "qwen3_moe_lora": Shelf("qwen3_moe", "qwen3_instruct_2507", own_stop="<|im_end|>"),
    "tool_calling_qlora": Shelf("qwen3", "qwen3_instruct_2507", own_stop="<|im_end|>"),
    "reasoning_distill": Shelf("qwen3", "qwen3", own_stop="<|endoftext|>"),
    "qwen3_thinking_qlora": Shelf("qwen3", "qwen3", own_stop="<|im_end|>"),
    "json_output_qlora": Shelf("qwen3", "qwen3_instruct_2507", own_stop="<|im_end|>"),
    "qwen3_14b_qlora": Shelf("qwen3", "qwen3", own_stop="<|im_end|>", recipe="qwen3_lora"),
    "ministral3_lora": Shelf("ministral3", "ministral_3", pad=None, composite="mistral3", recipe="gemma4_lora"),
    "phi4_lora": Shelf("phi3", "phi4", own_stop="<|im_end|>", recipe="qwen3_lora"),
    "phi4_mini_lora": Shelf("phi3", "phi4_mini", recipe="qwen3_lora"),
    "smollm3-3b_qlora": Shelf("smollm3", "smollm3", pad="<|im_end|>", own_stop="<|im_end|>", recipe="qwen3_lora"),
    "lfm2_5_lora": Shelf("lfm2", "lfm2_5", pad="<|pad|>", own_stop="<|im_end|>", recipe="qwen3_lora"),
}
every = pytest.mark.parametrize("name", SHELF)


def read_flags(name):
    """The recipe's name and the flags of a config."""
    shelf = SHELF[name]
    if shelf.recipe is None:
        return name, []
    return shelf.recipe, ["--config", CONFIGS / f"{name}.yaml"]


# -- tiny models ------------------------------------------------------------------------------------------------------
def build_tokenizer(shelf):
    """A small tokenizer with the family's special tokens, stop and padding as the published one has them."""
    family = BY_NAME[shelf.template]
    tokens = dict.fromkeys((*family.special, *PADS, *([shelf.own_stop] if shelf.own_stop else [])))
    tokenizer = copy.deepcopy(small_tokenizer(tuple(tokens), family.plain, family.bos, shelf.own_stop or family.eos))
    if shelf.pad is not None:
        tokenizer.pad_token = shelf.pad
    return tokenizer


def build_config(shelf, vocabulary=99):
    sizes = {"vocab_size": vocabulary, "max_position_embeddings": 1024, "initializer_range": 0.1}
    if shelf.kind == "gemma4_text":
        sizes["vocab_size_per_layer_input"] = vocabulary
    if shelf.kind == "gpt_oss":
        sizes["intermediate_size"] = 64  # MXFP4 has blocks of 32
    text = small_config(shelf.kind, bos_token_id=None, eos_token_id=1, **sizes)
    if shelf.composite is None:
        return text
    parts = {"vision_config": VISION}
    if shelf.composite == "qwen3_5":
        parts["vision_config"] = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
        parts["vision_config"] |= {"out_hidden_size": 64, "num_position_embeddings": 16}
    if shelf.composite == "gemma3":
        parts["mm_tokens_per_image"] = 4
    if shelf.composite == "gemma4":
        parts["vision_config"] = {name: VISION[name] for name in VISION if name.startswith(("hid", "int", "num"))}
        parts |= {"audio_config": None}
    config = CONFIG_MAPPING[shelf.composite](text_config=text.to_dict(), **parts)
    config.architectures = [MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[shelf.composite]]
    return config


def build_model(shelf, config):
    """The class that the published checkpoint names."""
    if shelf.composite is None:
        return transformers.AutoModelForCausalLM.from_config(config)
    return transformers.AutoModelForImageTextToText.from_config(config)


@pytest.fixture
def checkpoint(tmp_path):
    """checkpoint(shelf): the folder of a tiny model with its tokenizer."""

    def save(shelf):
        tokenizer = build_tokenizer(shelf)
        torch.manual_seed(0)
        model = build_model(shelf, build_config(shelf, len(tokenizer)))
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


# -- rows -------------------------------------------------------------------------------------------------------------
def chat(question, answer, **more):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def call(word):
    return {"type": "function", "function": {"name": "look", "arguments": {"word": word}}}


def calling(*words):
    return {"role": "assistant", "content": "", "tool_calls": [call(word) for word in words]}


def tool_rows():
    """A complete triple, two calls in one turn, and a question that no tool fits."""
    question = {"role": "user", "content": "What is x?"}
    reply = {"role": "tool", "content": "a letter"}
    answer = {"role": "assistant", "content": "A letter."}
    triple = [question, calling("x"), reply, answer]
    parallel = [{**question, "content": "And both x and y?"}, calling("x", "y"), reply, reply, answer]
    none = chat("How are you?", "Well, thank you.")["messages"]
    tools = [{"type": "function", "function": LOOK}]
    return [{"messages": messages, "tools": tools} for messages in (triple, parallel, none)]


def thinking_rows():
    plain = chat("What is 2 + 2?", "4.", chat_template_kwargs={"enable_thinking": False})
    thought = chat("What is 2 + 2?", "4.", chat_template_kwargs={"enable_thinking": True})
    thought["messages"][1]["reasoning_content"] = "2 and 2 more."
    return [plain, thought]


def json_rows():
    """A field that the text does not state is null; a question for words has no JSON."""
    to_messages = load_recipe("json_output_qlora")["to_messages"]
    schema = '{"type": "object", "properties": {"age": {"type": ["integer", "null"]}}}'
    stated = {"schema": schema, "question": "Ann is 7.", "answer": '{"age": 7}'}
    silent = {"schema": schema, "question": "Ann is here.", "answer": '{"age": null}'}
    return [to_messages(stated), to_messages(silent), chat("Who is here?", "Ann.")]


def make_rows(name):
    if name == "tool_calling_qlora":
        return tool_rows()
    if name == "json_output_qlora":
        return json_rows()
    if name in ("reasoning_distill", "qwen3_thinking_qlora"):
        return thinking_rows()
    if name in ("qwen3_5_lora", "qwen3_14b_qlora", "smollm3-3b_qlora"):
        return [chat("What is 2 + 2?", "4.", chat_template_kwargs={"enable_thinking": False})]
    row = chat("What is 2 + 2?", "4.")
    if name == "ministral3_lora":  # its own system prompt is longer than a tiny model's rows
        row["messages"].insert(0, {"role": "system", "content": "Be brief."})
    return [row]


@pytest.fixture
def train(checkpoint, run_recipe, tmp_path, monkeypatch, capsys):
    """train(name, *flags): two steps with the settings of the shelf; returns (run folder, model folder, output)."""

    def run(name, *more):
        recipe, flags = read_flags(name)
        model = checkpoint(SHELF[name])
        rows = tmp_path / "rows.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in make_rows(name) * 8))
        flags += ["--use_cpu", "true", "--disable_tqdm", "true", "--max_steps", 2, "--global_batch_size", 4]
        flags += ["--per_device_train_batch_size", 1, "--learning_rate", 1e-2, "--max_length", 512, "--eval_rows", 0]
        flags += ["--eval_strategy", "no", "--save_strategy", "no", "--report_to", "none"]
        flags += ["--model_name_or_path", model, "--dataset_name", rows, "--output_dir", tmp_path / "run"]
        monkeypatch.chdir(REPO)  # configs name templates from there
        capsys.readouterr()
        run_recipe(recipe, *flags, *more, defaults=False)
        return tmp_path / "run", model, capsys.readouterr().out

    return run


# -- what is trained --------------------------------------------------------------------------------------------------
CALL_X = '<tool_call>\n{"name": "look", "arguments": {"word": "x"}}\n</tool_call>'
CALL_Y = CALL_X.replace('"x"', '"y"')
TRAINED = {  # of the rows above, by hand; else "4." and the stop token
    "tool_calling_qlora": [
        f"{CALL_X}<|im_end|>A letter.<|im_end|>",
        f"{CALL_X}\n{CALL_Y}<|im_end|>A letter.<|im_end|>",
        "Well, thank you.<|im_end|>",
    ],
    "json_output_qlora": ['{"age": 7}<|im_end|>', '{"age": null}<|im_end|>', "Ann.<|im_end|>"],
    "reasoning_distill": ["4.<|im_end|>", "<think>\n2 and 2 more.\n</think>\n\n4.<|im_end|>"],
    "qwen3_thinking_qlora": ["4.<|im_end|>", "<think>\n2 and 2 more.\n</think>\n\n4.<|im_end|>"],
    "gpt_oss_lora": ["<|channel|>final<|message|>4.<|return|>"],
}


@every
def test_what_is_trained(name, monkeypatch):
    """With the template that the recipe names, and up to the stop token that it gives the tokenizer."""
    monkeypatch.chdir(REPO)
    recipe, flags = read_flags(name)
    _, training_args, _ = parse(recipe, *flags)
    tokenizer = build_tokenizer(SHELF[name])
    stop = training_args.eos_token or tokenizer.eos_token
    tokenizer.chat_template = Path(training_args.chat_template_path).read_text()
    texts = []
    for row in make_rows(name):
        arguments = {"tools": row.get("tools"), **row.get("chat_template_kwargs", {})}
        rendered = tokenizer.apply_chat_template(
            row["messages"], return_dict=True, return_assistant_tokens_mask=True, **arguments
        )
        pairs = zip(rendered["input_ids"], rendered["assistant_masks"], strict=True)
        texts.append(tokenizer.decode([token for token, trained in pairs if trained]))
    assert texts == TRAINED.get(name, [f"4.{stop}"])
    assert all(text.endswith(stop) for text in texts)


def test_own_columns_become_twins():
    to_messages = load_recipe("reasoning_distill")["to_messages"]
    row = {"question": "What is 2 + 2?", "reasoning": "2 and 2 more.", "answer": "4."}
    assert [to_messages({**row, "reasoning": None}), to_messages(row)] == thinking_rows()


def test_an_open_tool_call_is_found(tmp_path):
    """The check that the recipe's docstring names, on its rows, and on the triple without its reply and answer."""
    rows = tool_rows()
    done = run_check(tmp_path / "whole.jsonl", rows)
    assert done.returncode == 0, done.stdout
    rows[0]["messages"] = rows[0]["messages"][:2] + rows[0]["messages"][:1] + rows[0]["messages"][3:]
    done = run_check(tmp_path / "open.jsonl", rows)
    assert done.returncode == 1, done.stdout


def run_check(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_script(check, path, "--recipe", REPO / "recipes" / "tool_calling_qlora.py")


# -- two steps --------------------------------------------------------------------------------------------------------
def adapted_weights(folder, rank):
    """{layer: weights that its adapter stands for}, of the shapes that were saved; of experts for all of a stack."""
    saved = load_file(folder / "adapter_model.safetensors")
    sizes = {}
    for name, lora_a in saved.items():
        if ".lora_A." in name:
            lora_b = saved[name.replace(".lora_A.", ".lora_B.")]
            assert lora_b.abs().max() > 0, f"{name}: nothing was trained"
            experts = lora_a.shape[0] // rank
            sizes[name] = experts * lora_a.shape[1] * lora_b.shape[0]
    return sizes


def plain_matrices(shelf, folder):
    """(decoder's matrices, those of them in linear layers) by name and size, of the model before any adapter."""
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        found = matrices(build_model(shelf, config))
    sizes = {name: size for name, (_, size) in found.items()}
    return sizes, {name for name, (module, _) in found.items() if isinstance(module, nn.Linear)}


@every
def test_two_steps(name, train):
    shelf = SHELF[name]
    folder, model, printed = train(name)
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    assert len(losses) == 2 and all(0 < loss < 100 for loss in losses)
    recipe, flags = read_flags(name)
    _, training_args, model_args = parse(recipe, *flags)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    template = (REPO / "chat_templates" / f"{shelf.template}.jinja").read_text()
    assert load_recipe(recipe)["serving_template"](template) == tokenizer.chat_template
    assert tokenizer.eos_token == (training_args.eos_token or build_tokenizer(shelf).eos_token)
    assert tokenizer.pad_token not in (None, tokenizer.eos_token)
    with_aux_loss = {"aux_loss" in entry for entry in entries if "loss" in entry}
    assert with_aux_loss == {name == "qwen3_moe_lora"}
    if not model_args.use_peft:
        before, after = load_file(model / "model.safetensors"), load_file(folder / "model.safetensors")
        assert all(not torch.equal(before[key], after[key]) for key in before if before[key].dim() > 1)
        return
    sizes, linear = plain_matrices(shelf, model)
    total = sum(sizes.values())
    adapted = adapted_weights(folder, model_args.lora_r)
    assert not [layer for layer in adapted if re.search("vision|visual|audio|projector|router|\\.gate\\.", layer)]
    reached = sum(adapted.values())
    line = f"adapters on {reached / total:.1%} of the decoder's weights"
    assert reached / total > 0.9
    if model_args.load_in_4bit:
        line += f", {sum(sizes[layer] for layer in linear) / total:.1%} of the frozen ones in 4 bits"
    assert re.search(re.escape(line) + "[\n;]", printed), printed
    check_that_eval_loads(shelf, model, folder)


def check_that_eval_loads(shelf, model, folder):
    """eval/ takes AutoModelForCausalLM: the adapters must fit its layers by name."""
    if shelf.composite == "mistral3":
        with pytest.raises(ValueError, match="Unrecognized configuration class .*Mistral3Config"):
            transformers.AutoModelForCausalLM.from_pretrained(model)
        return
    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    loaded = peft.get_peft_model_state_dict(peft.PeftModel.from_pretrained(base, folder))
    saved = load_file(folder / "adapter_model.safetensors")
    assert saved.keys() == loaded.keys() and all(torch.equal(saved[key], loaded[key]) for key in saved)


# -- scores -----------------------------------------------------------------------------------------------------------
def write_bfcl(folder):
    """The questions of tool_rows() as the Berkeley Function Calling Leaderboard writes its own."""
    function = copy.deepcopy(LOOK)
    function["parameters"]["type"] = "dict"
    x, y = ({"look": {"word": [word]}} for word in ("x", "y"))
    files = []
    (folder / "possible_answer").mkdir()
    truths = {"simple_python": [x], "parallel": [x, y], "irrelevance": None}
    for row, (category, truth) in zip(tool_rows(), truths.items(), strict=True):
        name = f"{category}_0"
        question = {"id": name, "question": [row["messages"][:1]], "function": [function]}
        files.append(folder / f"BFCL_v4_{category}.json")
        files[-1].write_text(json.dumps(question) + "\n")
        if truth is not None:
            answer = {"id": name, "ground_truth": truth}
            (folder / "possible_answer" / files[-1].name).write_text(json.dumps(answer) + "\n")
    return files


def score_calls(run, files, folder):
    """Return {category: rows scored} of eval.tool_calls."""
    done = run_script(tool_calls, run, "--data", *files, "--out", folder, "--max_new_tokens", 8)
    assert done.returncode == 0, done.stderr
    groups = json.loads((folder / "tool_calls.json").read_text())["groups"]["category"]
    return {category: metrics["malformed"]["total"] for category, metrics in groups.items()}


@pytest.mark.long
def test_calls_can_be_scored_before_and_after(train, tmp_path):
    """The base and its adapter, through the command that the recipe's docstring names."""
    files = write_bfcl(tmp_path)
    folder, model, _ = train("tool_calling_qlora")
    shutil.copy(folder / "chat_template.jinja", model)
    scored = {"simple_python": 1, "parallel": 1, "irrelevance": 1}
    assert score_calls(model, files, tmp_path / "before") == scored
    assert score_calls(folder, files, tmp_path / "after") == scored


@pytest.mark.long
def test_training_raises_the_score_of_calls(train, tmp_path):
    """The recipe's adapters on a base of random weights learn its rows, which show the function as eval does."""
    files = write_bfcl(tmp_path)
    function = json.loads(files[0].read_text())["function"]
    rows = [row | {"tools": list_tools(function)} for row in tool_rows()] * 8
    (tmp_path / "shown.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--dataset_name", tmp_path / "shown.jsonl", "--max_steps", 90, "--lora_r", 32, "--lora_alpha", 64]
    flags += ["--packing", "false", "--per_device_train_batch_size", 4, "--max_length", 640]
    folder, model, _ = train("tool_calling_qlora", *flags)
    shutil.copy(folder / "chat_template.jinja", model)
    before = rate_calls(model, files, tmp_path / "before")
    after = rate_calls(folder, files, tmp_path / "after")
    assert before["ast"] == 0 and before["stop_rate"] < 1
    assert after == {"ast": 1, "irrelevance": 1, "malformed": 0, "stop_rate": 1}


def rate_calls(run, files, folder):
    """Return {metric: value} of eval.tool_calls over all files."""
    done = run_script(tool_calls, run, "--data", *files, "--out", folder, "--max_new_tokens", 120)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((folder / "tool_calls.json").read_text())["metrics"]
    return {name: metrics[name]["value"] for name in ("ast", "irrelevance", "malformed", "stop_rate")}


# -- packing ----------------------------------------------------------------------------------------------------------
PACKS_LEAK = {"gpt_oss_lora"}  # its masks are built without the positions
PACKS_FAIL = {"qwen3_5_lora", "lfm2_5_lora"}  # without causal-conv1d, which this machine need not have
ROWS_BY_CHOICE = {"reasoning_distill"}  # sequence parallelism takes no packs


@every
def test_packing_is_what_the_probe_says(name):
    """On the attention that the recipe takes: packed rows are as alone, or the recipe does not pack."""
    recipe, flags = read_flags(name)
    _, training_args, _ = parse(recipe, *flags)
    attention = training_args.model_init_kwargs["attn_implementation"]
    verdict = "alone"
    try:
        probe = probe_packing(build_config(SHELF[name]), attention, torch.device("cpu"))
    except PackedRowsFail:
        verdict = "fail"
    else:
        assert probe.joined_gap > 1  # two documents as one see each other, so that a leak would show
        if probe.leaks:
            verdict = "leak"
    assert (verdict == "leak") == (name in PACKS_LEAK)
    if is_causal_conv1d_available():
        pytest.skip("causal-conv1d is installed: PACKS_FAIL is what happens without it")
    assert (verdict == "fail") == (name in PACKS_FAIL)
    assert training_args.packing == (verdict == "alone" and name not in ROWS_BY_CHOICE)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt_oss_lora", "lets documents in one pack see each other"),
        ("qwen3_5_lora", "cannot take packed rows .*causal_conv1d"),
        ("lfm2_5_lora", "cannot take packed rows .*causal_conv1d"),
    ],
)
def test_packs_are_refused(name, words, train):
    with pytest.raises(UsageError, match=f"packing: .*{words}"):
        train(name, "--packing", "true")


# -- experts ----------------------------------------------------------------------------------------------------------
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # e2m1, and the same below zero


def pack_experts(folder):
    """Put MXFP4 experts, drawn by chance, in place of a checkpoint's; return {name: the values they stand for}.

    OCP's format: 32 values of 4 bits share a scale of 8 bits, 2^(scale - 127); a byte holds the lower value first.
    """
    weights = load_file(folder / "model.safetensors")
    values = torch.tensor([*FP4, *(-value for value in FP4)])
    wanted = {}
    for name in [name for name in weights if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = weights.pop(name).shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 124, (experts, outputs, inputs // 32), dtype=torch.uint8)
        pairs = torch.stack([values[(blocks & 15).long()], values[(blocks >> 4).long()]], dim=-1)
        scaled = pairs.flatten(-2) * torch.exp2(scales.float() - 127).unsqueeze(-1)
        wanted[name] = scaled.flatten(-2).transpose(1, 2)
        weights[f"{name}_blocks"] = blocks
        weights[f"{name}_scales"] = scales
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    return wanted


def test_mxfp4_experts_are_unpacked(checkpoint, run_recipe, tmp_path):
    """To the values that the format gives them, and trained on."""
    shelf = SHELF["gpt_oss_lora"]
    model = checkpoint(shelf)
    wanted = pack_experts(model)
    recipe = load_recipe("gpt_oss_lora")
    _, _, model_args = parse("gpt_oss_lora", "--model_name_or_path", model)
    quantization = recipe["choose_quantization"](model_args)
    assert quantization.dequantize
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.bfloat16, quantization_config=quantization
    )
    weights = dict(loaded.named_parameters())
    assert len(wanted) == 8 and all(torch.equal(weights[name].float(), wanted[name]) for name in wanted)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in make_rows("gpt_oss_lora") * 8))
    flags = ["--use_cpu", "true", "--max_steps", 2, "--max_length", 512, "--eval_rows", 0, "--eval_strategy", "no"]
    flags += ["--global_batch_size", 4, "--learning_rate", 1e-2, "--save_strategy", "no", "--disable_tqdm", "true"]
    flags += ["--model_name_or_path", model, "--dataset_name", rows, "--output_dir", tmp_path / "run"]
    run_recipe("gpt_oss_lora", *flags, defaults=False)
    assert adapted_weights(tmp_path / "run", model_args.lora_r)


# -- configs ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [name for name, shelf in SHELF.items() if shelf.recipe])
def test_a_config_says_how_it_is_launched(name, monkeypatch):
    monkeypatch.chdir(REPO)
    text = (CONFIGS / f"{name}.yaml").read_text()
    script, flags = re.search(r"^#   accelerate launch (\S+) (.*)$", text, re.M).groups()
    assert script == f"recipes/{SHELF[name].recipe}.py" and flags == f"--config recipes/configs/{name}.yaml"
    _, training_args, model_args = parse(REPO / script, *flags.split())
    settings = yaml.safe_load(text)
    assert model_args.model_name_or_path == settings["model_name_or_path"]
    template = SHELF[name].template
    assert Path(training_args.chat_template_path).resolve() == REPO / "chat_templates" / f"{template}.jinja"


def test_every_row_of_the_table_is_on_the_shelf():
    """recipes/README.md, "Which recipe": the same names and templates as here, and the models that they load."""
    page = (REPO / "recipes" / "README.md").read_text().split("## Which recipe")[1].split("\n## ")[0]
    rows = [[cell.strip().strip("`") for cell in line.split("|")[1:-1]] for line in page.splitlines() if "|" in line]
    found = {cells[1].removesuffix(".yaml"): cells for cells in rows[2:]}
    assert SHELF.keys() <= found.keys()
    for name, shelf in SHELF.items():
        recipe, flags = read_flags(name)
        _, _, model_args = parse(recipe, *flags)
        assert found[name][2] == shelf.template
        assert model_args.model_name_or_path.partition("/")[2] in found[name][0]
        targets = found[name][3]
        assert ("4 bits" in targets) == bool(model_args.load_in_4bit)


# -- going on ---------------------------------------------------------------------------------------------------------
@pytest.mark.long
@pytest.mark.parametrize("name", ["qwen3_5_lora", "gpt_oss_lora", "gemma3_qlora"])
def test_a_resumed_run_ends_in_the_same_weights(name, train, tmp_path):
    flags = ["--save_strategy", "steps", "--save_steps", 1, "--bf16", "false", "--dtype", "float32"]
    whole = train(name, *flags)[0]
    expected = load_file(whole / "adapter_model.safetensors")
    again = ["--output_dir", tmp_path / "again", "--resume_from_checkpoint", whole / "checkpoint-1"]
    train(name, *flags, *again)
    resumed = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert all(torch.equal(expected[key], resumed[key]) for key in expected)
