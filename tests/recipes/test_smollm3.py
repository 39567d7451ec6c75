"""SmolLM3's recipes: ids and mask against a reading of the published template in plain Python, row by row on raw rows
in smoltalk2's shape; every published value against a table; one option an ablation; the data table by hand; personas.

`published` below is written from the template of alignment-handbook's sft.yaml and of the released model, not from
ours; the golden renderings (../shared, upstream's own) hold it. Each of these turns the suite red (tried): the header
not trained; the newline after the stop not trained; custom_instructions not rendered; reasoning left out of earlier
turns; the mix's arguments not written to its rows; the persona check not called, or called without its mark; an
ablation with a second option; a published value changed; user turns masked in the mid-training; its reasoning dropped;
context and response swapped in the card.
"""

import json
import random
import re
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from datasets import load_from_disk
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, SmolLM3Config

from data_prep import mix, normalize
from tests.helpers.runs import REPO, SHARED, load_recipe, parse, run_script

RECIPES, MIXES, TEMPLATE = REPO / "recipes", REPO / "data_prep" / "mixes", REPO / "chat_templates" / "smollm3.jinja"
CONFIGS = sorted((RECIPES / "configs").glob("smollm3_*.yaml"))
HOUSE = ["--use_cpu", "true", "--bf16", "false", "--dtype", "float32", "--disable_tqdm", "true"]

# -- the published template in plain Python: (text, trained [start, end) spans) ---------------------------------------
PERSONA = "You are a helpful AI assistant named SmolLM, trained by Hugging Face."


def published(messages, kwargs, date, think_persona):
    """As upstream renders a row whose contents hold their <think> blocks and calls as text, its `generation` block
    around the assistant's header, text, <|im_end|> and newline."""
    own = messages[0]["content"] if messages[0]["role"] == "system" else None
    mode = "/think" if kwargs.get("enable_thinking", True) else "/no_think"
    if own is not None:
        mode = "/no_think" if "/no_think" in own else "/think" if "/think" in own else mode
        persona = own.replace("/no_think", "").replace("/think", "").rstrip()
    else:
        persona = kwargs.get("custom_instructions") or ""
    out, spans = "<|im_start|>system\n", []
    if own is not None and "/system_override" in own:
        out += persona.replace("/system_override", "").rstrip() + "<|im_end|>\n"
    else:
        out += f"## Metadata\n\nKnowledge Cutoff Date: June 2025\nToday Date: {date}\nReasoning Mode: {mode}\n\n"
        out += f"## Custom Instructions\n\n{persona or (think_persona if mode == '/think' else PERSONA)}\n\n"
        if kwargs.get("xml_tools"):
            out += "### Tools\n\nYou may call one or more functions to assist with the user query.\nYou are provided "
            out += "with function signatures within <tools></tools> XML tags:\n\n<tools>\n"
            out += "".join(f"{tool}\n" for tool in kwargs["xml_tools"]) + "</tools>\n\nFor each function call, return "
            out += "a json object with function name and arguments within <tool_call></tool_call> XML tags:\n"
            out += '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
            out += "\n\n<|im_end|>\n"
    for turn in messages:
        if turn["role"] in ("user", "tool"):
            out += f"<|im_start|>user\n{turn['content']}<|im_end|>\n"
        elif turn["role"] == "assistant":
            start = len(out)
            out += "<|im_start|>assistant\n" + ("<think>\n\n</think>\n" if mode == "/no_think" else "")
            out += turn["content"].lstrip("\n") + "<|im_end|>\n"
            spans.append((start, len(out)))
    return out, spans


def chatml(messages):
    """mid.yaml's template; every token is trained."""
    text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in messages)
    return text, [(0, len(text))]


def labelled(tokenizer, text, spans):
    """(ids, labels) of one tokenisation of the whole text: a token is trained where it begins within a span."""
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    trained = [any(a <= start < b for a, b in spans) for start, _ in out["offset_mapping"]]
    return out["input_ids"], [token if is_in else -100 for token, is_in in zip(out["input_ids"], trained, strict=True)]


@pytest.fixture(scope="module")
def think_persona():
    """The default persona of /think mode, which is too long to write down twice: as the template prints it."""
    text = TEMPLATE.read_text()
    return re.search(re.escape(PERSONA) + r" Your role as an assistant.*?reach the conclusion\.", text)[0]


@pytest.mark.skipif(not (SHARED / "golden").is_dir(), reason="../shared is absent: the case below stands for it")
def test_the_reading_renders_what_upstream_renders(think_persona):
    cases = [
        case
        for case in json.loads((SHARED / "golden" / "renderings.json").read_text())
        if case["family"] == "smollm3" and case["kind"] == "full"
    ]
    same = 0
    for case in cases:
        lost = any(m.get("tool_calls") or m.get("reasoning_content") for m in case["messages"])
        kwargs = case["kwargs"] | {"xml_tools": case["tools"] or []}
        text, _ = published(case["messages"], kwargs, "15 June 2025", think_persona)
        assert lost or text == case["text"], case["case"]
        same += not lost
    assert same >= 8


def test_one_case_by_hand(think_persona):
    """The published strings of the case no_think, and what its generation block holds."""
    turns = [{"role": "user", "content": "20 apples, 7 given away. How many are left?"}]
    turns += [{"role": "assistant", "content": "13"}]
    text, ((start, end),) = published(turns, {"enable_thinking": False}, "15 June 2025", think_persona)
    head = "<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\nToday Date: 15 June 2025\n"
    head += f"Reasoning Mode: /no_think\n\n## Custom Instructions\n\n{PERSONA}\n\n"
    head += "<|im_start|>user\n20 apples, 7 given away. How many are left?<|im_end|>\n"
    assert (text[:start], text[start:end]) == (head, "<|im_start|>assistant\n<think>\n\n</think>\n13<|im_end|>\n")


# -- raw rows in smoltalk2's shape ------------------------------------------------------------------------------------
def raw(number, turns, think, persona=None, tools=()):
    kwargs = {"custom_instructions": persona, "enable_thinking": think, "python_tools": [], "xml_tools": [*tools]}
    source = f"smoltalk2_{'think' if think else 'no_think'}"
    return {"id": f"{source}-{number}", "messages": turns, "source": source, "chat_template_kwargs": kwargs}


def said(role, content):
    return {"role": role, "content": content.replace("\r\n", "\n").strip()}


def thought(reasoning, answer):
    return f"<think>\n{reasoning.strip()}\n</think>\n{answer.strip()}"


def called(name, arguments):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments, ensure_ascii=False)}}}\n</tool_call>'


def lines(*path):
    return [json.loads(line) for line in SHARED.joinpath("data", *path).read_text().splitlines()]


PERSONAS = [None, "", "You are Ada, who answers in verse.", "回答要简短。", "Persona with blanks at its end. "]
SYSTEMS = {  # by mode
    False: ["/no_think", "You are a pirate.\n\n/no_think", "Only this. /system_override /no_think"],
    True: ["Be brief. /think", "Only this. /system_override"],
}


def real_rows():
    """1,000: GSM8K in both modes with its working as reasoning, Chinese ShareGPT in several turns, tool chats."""
    rows, draw = [], random.Random(0)
    for number, row in enumerate(lines("gsm8k", "train.jsonl")[:450]):
        working, answer = row["answer"].rsplit("####", 1)
        turns = [said("user", row["question"])]
        think = number % 2 == 0
        answer = f"The answer is {answer.strip()}."
        turns.append(said("assistant", thought(working, answer) if think else f"{working.strip()}\n{answer}"))
        if number % 7 == 0 and think:  # reasoning in an earlier turn
            turns += [said("user", "Sure?"), said("assistant", thought("I added again.", "Yes."))]
        persona = PERSONAS[number % len(PERSONAS)]
        if number % 5 == 1:
            turns, persona = [said("system", SYSTEMS[think][number % len(SYSTEMS[think])]), *turns], None
        rows.append(raw(f"gsm8k{number}", turns, think, persona))
    for number, row in enumerate(lines("chat", "sharegpt_zh_1K_format.jsonl")[:350]):
        names = {"human": "user", "gpt": "assistant"}
        turns = [said(names[turn["from"]], turn["value"]) for turn in row["conversations"][:4]]
        rows.append(raw(f"zh{number}", turns, False, PERSONAS[number % len(PERSONAS)]))
    for number, row in enumerate(json.loads(SHARED.joinpath("data/tools/glaive_toolcall_en_demo.json").read_text())):
        turns, names = [], {"human": "user", "gpt": "assistant", "observation": "tool"}
        for turn in row["conversations"]:
            if turn["from"] == "function_call":
                call = json.loads(turn["value"])
                before = draw.choice(["", "Let me look.\n"])
                turns.append({"role": "assistant", "content": before + called(call["name"], call["arguments"])})
            else:
                turns.append(said(names[turn["from"]], turn["value"]))
        tools = [json.dumps(tool) for tool in json.loads(row["tools"])]
        rows.append(raw(f"tools{number}", turns, False, tools=tools))
    return rows


def small_rows(count=160):
    rows = []
    for n in range(count):
        a, b = n % 9 + 1, n % 7 + 1
        turns = [said("user", f"{a} + {b}?")]
        think = n % 2 == 0
        turns.append(said("assistant", thought(f"{a} and {b} make {a + b}.", f"{a + b}") if think else f"{a + b}"))
        if n % 5 == 0:
            turns += [said("user", "Sure?"), said("assistant", thought("Yes.", "Yes.") if think else "Yes.")]
        if n % 11 == 3:
            turns[-1]["content"] += "\n" + called("add", {"a": a, "b": b})
            turns += [said("tool", f"{a + b}"), said("assistant", f"It is {a + b}.")]
        persona = PERSONAS[n % len(PERSONAS)]
        if n % 13 == 1:
            turns, persona = [said("system", SYSTEMS[think][n % len(SYSTEMS[think])]), *turns], None
        rows.append(raw(f"small{n}", turns, think, persona, ['{"name": "add"}'] if n % 11 == 3 else ()))
    return rows


def save_model(tokenizer, folder, **sizes):
    """A SmolLM3 of its architecture, NoPE in every fourth layer, as the base model of a recipe."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "max_position_embeddings": 16384,
    } | sizes
    config = SmolLM3Config(
        **sizes,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=None,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for path in Path(tokenizer.name_or_path).glob("tokenizer*.json"):  # saved anew, a real one takes seconds
        shutil.copy(path, folder)
    return folder


def of(model):
    """Flags of a tiny model on a CPU; the demo's tokenizer lacks the recipes' pad token."""
    flags = [*HOUSE, "--model_name_or_path", model]
    if "<|finetune_right_pad_id|>" not in AutoTokenizer.from_pretrained(model).get_vocab():
        flags += ["--pad_token", "<|endoftext|>"]
    return flags


@pytest.fixture(scope="module", params=["real", "small"])
def given(request, demo, tmp_path_factory):
    """(raw rows, model folder)"""
    if request.param == "real":
        if not (SHARED / "data" / "gsm8k").is_dir():
            pytest.skip("../shared is absent: the small rows prove the same path")
        tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "smollm3")
        return real_rows(), save_model(tokenizer, tmp_path_factory.mktemp("model") / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(demo / "init")
    return small_rows(), save_model(tokenizer, tmp_path_factory.mktemp("model") / "tiny")


def make_set(rows, folder, recipe="smollm3_hybrid", **more):
    """normalize and mix as the head of the shipped mix says, its strategy and arguments with our one pool."""
    (folder / "raw.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    done = run_script(normalize, "smoltalk2", folder / "raw.jsonl", "--out", folder / "pool", "--num_proc", 1)
    assert done.returncode == 0, done.stderr
    shipped = yaml.safe_load((MIXES / f"{recipe}.yaml").read_text())
    shipped |= {"sources": [{"path": "pool", "weight": 1.0}]} | more
    (folder / "mix.yaml").write_text(yaml.safe_dump(shipped))
    done = run_script(mix, folder / "mix.yaml", "--pools", folder, "--out", folder / "set", "--num_proc", 1)
    assert done.returncode == 0, done.stderr
    return folder / "set"


PROBE = """
import json
from pathlib import Path
from transformers import TrainerCallback


class Probe(TrainerCallback):
    def __init__(self, trainer):
        rows = trainer.train_dataset
        kept = [name for name in ("input_ids", "labels", "seq_lengths") if name in rows.column_names]
        rows.select_columns(kept).to_json(Path(trainer.args.output_dir, "train.jsonl"))
        trainer.args.max_steps = 1
"""


def prepared(run_recipe, hook, recipe, data, model, *flags):
    """What the recipe's trainer holds before its first step."""
    folder = run_recipe(
        recipe,
        *of(model),
        *hook(PROBE),
        "--dataset_name",
        data,
        "--output_dir",
        data.parent / "run",
        "--max_steps",
        1,
        "--global_batch_size",
        1,
        "--save_strategy",
        "no",
        *flags,
        defaults=False,
    )
    assert folder
    return [json.loads(line) for line in (data.parent / "run" / "train.jsonl").read_text().splitlines()]


def test_ids_and_mask_row_by_row(given, run_recipe, hook, tmp_path, think_persona, capsys):
    """Raw rows -> normalize -> mix -> the recipe's trainer, against the reading of the published template."""
    rows, model = given
    data = make_set(rows, tmp_path)
    refused = {json.loads(line)["id"] for line in (tmp_path / "pool" / "rejected.jsonl").read_text().splitlines()}
    kept = {row["id"]: row for row in rows if row["id"] not in refused}
    assert len(kept) >= min(1000, len(rows) - 3), sorted(refused)[:5]
    order = load_from_disk(data)["train"]["id"]
    longest = 3072
    found = prepared(run_recipe, hook, "smollm3_sft", data, model, "--max_length", longest, "--allow", "cut_answers")
    assert len(found) == len(order) == len(kept)
    tokenizer, seen = AutoTokenizer.from_pretrained(model), set()
    for name, got in zip(order, found, strict=True):
        row = kept[name]
        text, spans = published(row["messages"], row["chat_template_kwargs"], "08 July 2025", think_persona)
        ids, labels = labelled(tokenizer, text, spans)
        assert got["input_ids"] == ids[:longest], name
        assert got["labels"] == labels[:longest], name
        seen.add((text.count("<|im_start|>assistant") > 1, "<think>\n\n" in text, "<tool_call>" in text))
    assert len(seen) >= 5  # several turns, both modes and calls all occur


def test_midtraining_trains_every_token(demo, run_recipe, hook, tmp_path):
    model = save_model(AutoTokenizer.from_pretrained(demo / "init"), tmp_path / "tiny")
    rows = [
        row
        for row in small_rows()
        if not row["chat_template_kwargs"]["xml_tools"] and not row["chat_template_kwargs"]["custom_instructions"]
    ]
    data = make_set(rows, tmp_path, "smollm3_mid")
    order = load_from_disk(data)["train"]["id"]
    found = prepared(run_recipe, hook, "smollm3_midtrain", data, model, "--max_length", 2048)
    tokenizer, wanted = AutoTokenizer.from_pretrained(model), {}
    for row in rows:
        ids, _ = labelled(tokenizer, *chatml(row["messages"]))
        wanted[tuple(ids)] = wanted.get(tuple(ids), 0) + 1
    for pack in found:
        at = 0
        for size in pack["seq_lengths"]:
            document = pack["input_ids"][at : at + size]
            if "labels" in pack:
                assert pack["labels"][at + 1 : at + size] == document[1:]
            wanted[tuple(document)] -= 1
            at += size
    assert not any(wanted.values()) and sum(len(pack["seq_lengths"]) for pack in found) == len(order) > 30


# -- values -----------------------------------------------------------------------------------------------------------
def settings(name):
    """All options of a config as the recipe resolves them: DEFAULTS < YAML."""
    recipe = "smollm3_midtrain" if name.startswith("mid") else "smollm3_sft"
    defaults = load_recipe(recipe)["DEFAULTS"]
    path = RECIPES / "configs" / f"smollm3_{name}.yaml"
    return defaults | (yaml.safe_load(path.read_text()) if path.is_file() else {})


BASE = "HuggingFaceTB/SmolLM3-3B-Base"
BASELINE = {
    "model_name_or_path": BASE,
    "learning_rate": 1e-5,
    "global_batch_size": 128,
    "num_train_epochs": 1,
    "packing": False,
    "assistant_only_loss": True,
    "dtype": "float32",
}
RUN = {
    "learning_rate": 2e-5,
    "num_train_epochs": 5,
    "packing": True,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    "warmup_steps": 0.03,
    "max_grad_norm": 0.2,
    "seed": 42,
    "global_batch_size": 128,
    "per_device_train_batch_size": 1,
    "use_liger_kernel": True,
    "save_total_limit": 1,
    "activation_checkpointing": True,
    "eval_strategy": "no",
    "eos_token": "<|im_end|>",
}
PUBLISHED = {
    "instruct": BASELINE | {"max_length": 8192, "dataset_name": "data/smollm3_instruct"},
    "thinking": BASELINE | {"max_length": 32768, "dataset_name": "data/smollm3_thinking"},
    "hybrid": BASELINE | {"max_length": 32768, "dataset_name": "data/smollm3_hybrid"},
    "final": RUN
    | {
        "model_name_or_path": "HuggingFaceTB/SmolLM3-3B-checkpoints",
        "model_revision": "it-mid-training",
        "max_length": 65536,
        "packing_strategy": "bfd",
        "assistant_only_loss": True,
        "save_strategy": "epoch",
        "dataset_name": "data/smollm3_final",
    },
    "midtrain": RUN
    | {
        "model_name_or_path": "HuggingFaceTB/SmolLM3-3B-Base",
        "max_length": 32768,
        "save_steps": 0.05,
        "assistant_only_loss": False,
        "dataset_name": "data/smollm3_mid",
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values(name):
    found = settings(name)
    assert {key: found.get(key) for key in PUBLISHED[name]} == PUBLISHED[name]


ABLATIONS = {  # config: (its baseline, the one option)
    "hybrid_user_turns": ("hybrid", {"assistant_only_loss": (True, False)}),
    "hybrid_packing": ("hybrid", {"packing": (False, True)}),
    "hybrid_5_epochs": ("hybrid", {"num_train_epochs": (1, 5)}),
    "hybrid_ifthink": ("hybrid", {"dataset_name": ("data/smollm3_hybrid", "data/smollm3_hybrid_ifthink")}),
    "hybrid_mid": ("hybrid", {"model_name_or_path": (BASE, "runs/smollm3_midtrain")}),
    "hybrid_mid_nvidia": ("hybrid", {"model_name_or_path": (BASE, "runs/smollm3_mid_nvidia")}),
    "hybrid_mid_openthoughts": ("hybrid", {"model_name_or_path": (BASE, "runs/smollm3_mid_openthoughts")}),
    "hybrid_muon": ("hybrid", {"optimizer": (None, "recipes/optimizers/muon.py")}),
    "hybrid_packing_batch_32": ("hybrid_packing", {"global_batch_size": (128, 32)}),
    "mid_nvidia": ("midtrain", {"dataset_name": ("data/smollm3_mid", "data/smollm3_mid_nvidia")}),
    "mid_openthoughts": ("midtrain", {"dataset_name": ("data/smollm3_mid", "data/smollm3_mid_openthoughts")}),
    "hybrid_packing_lr_1e-6": ("hybrid_packing", {"learning_rate": (1e-5, 1e-6)}),
    "hybrid_packing_lr_3e-6": ("hybrid_packing", {"learning_rate": (1e-5, 3e-6)}),
    "hybrid_packing_lr_3e-5": ("hybrid_packing", {"learning_rate": (1e-5, 3e-5)}),
    "hybrid_packing_lr_1e-4": ("hybrid_packing", {"learning_rate": (1e-5, 1e-4)}),
}


def test_every_config_is_known():
    assert {path.stem for path in CONFIGS} == {f"smollm3_{name}" for name in {*PUBLISHED, *ABLATIONS} - {"midtrain"}}


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_differs_in_one_option(name):
    baseline, difference = ABLATIONS[name]
    before, after = settings(baseline), settings(name)
    assert before.pop("output_dir") != after.pop("output_dir")  # its own folder, no option of training
    found = {key: (before.get(key), after.get(key)) for key in before | after if before.get(key) != after.get(key)}
    assert found == difference


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_parse_by_their_launch_line(path, monkeypatch):
    line = re.search(r"^#   accelerate launch (?:--config_file (\S+) )?(\S+) (.*)$", path.read_text(), re.M)
    assert line[1] is None or (REPO / line[1]).is_file()
    monkeypatch.chdir(REPO)
    script, args, model = parse(REPO / line[2], *line[3].split())
    expected = settings(path.stem.removeprefix("smollm3_"))
    assert args.gradient_accumulation_steps == script.global_batch_size == expected["global_batch_size"]
    assert f"recipes/configs/{path.name}" in line[3]
    assert args.lr_scheduler_kwargs == {"min_lr_rate": 0.1} and model.dtype == "float32"
    assert args.learning_rate == expected["learning_rate"] and args.max_length == expected["max_length"]
    assert model.model_name_or_path == expected["model_name_or_path"]
    assert getattr(script, "optimizer", None) == expected.get("optimizer")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_set_has_a_mix_and_every_model_a_run(path):
    """What a config names is published, or is made by a mix or by another config of this folder."""
    found = yaml.safe_load(path.read_text())
    assert (MIXES / f"{Path(found['dataset_name']).name}.yaml").is_file()
    model = found.get("model_name_or_path", BASE)
    runs = {"runs/smollm3_midtrain", *[yaml.safe_load(other.read_text())["output_dir"] for other in CONFIGS]}
    assert model.startswith("HuggingFaceTB/") or model in runs - {found["output_dir"]}


# -- the playbook's data table ----------------------------------------------------------------------------------------
TABLE = {  # rows, % rows, tokens (M), % tokens, tokens/row, in context, in response
    "Everyday Conversations": (2260, 2.3, 0.6, 0.8, 260.2, 222.3, 94.0),
    "SystemChats 30k": (33997, 35.2, 21.5, 28.2, 631.9, 422.8, 267.7),
    "Tulu 3 SFT Personas IF": (29970, 31.0, 13.3, 17.5, 444.5, 119.8, 380.7),
    "Everyday Conversations (Qwen3-32B)": (2057, 2.1, 3.1, 4.1, 1522.4, 376.8, 1385.6),
    "SystemChats 30k (Qwen3-32B)": (27436, 28.4, 29.4, 38.6, 1070.8, 84.6, 1042.7),
    "s1k-1.1": (835, 0.9, 8.2, 10.8, 8859.3, 370.9, 9728.5),
}


def test_the_published_table():
    """Its sums and shares hold; its last line is the unweighted mean; two columns hold the system turn."""
    rows, tokens = sum(line[0] for line in TABLE.values()), sum(line[2] for line in TABLE.values())
    assert rows == 96_555 and tokens == pytest.approx(76.1, abs=0.05)
    for count, share, millions, part, mean, *_ in TABLE.values():
        assert 100 * count / rows == pytest.approx(share, abs=0.051)
        assert 100 * millions / tokens == pytest.approx(part, abs=0.15)
        assert count * mean / 1e6 == pytest.approx(millions, abs=0.9)  # s1k's own figures differ by 0.8M
    means = [sum(line[n] for line in TABLE.values()) / 6 for n in (4, 5, 6)]
    assert means == pytest.approx([2131.5, 266.2, 2149.9], abs=0.06)
    assert tokens * 1e6 / rows == pytest.approx(788, abs=0.5)
    twice = [line[5] + line[6] - line[4] for line in TABLE.values()]
    # the system turn of /no_think with the default persona has 56 tokens, that of /think 240 (recipes/README.md)
    assert [round(excess) for excess in twice[:5]] == [56, 59, 56, 240, 56]


def bytewise(folder):
    """A tokenizer of bytes and SmolLM3's special tokens, so that tokens can be counted by hand."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>", "<think>", "</think>")])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>").save_pretrained(folder)
    return folder


def test_the_table_of_the_card_by_hand(tmp_path):
    """Two sets, every token counted by hand: one a byte, one a special token."""
    bytewise(tmp_path / "model")
    override = {"role": "system", "content": "S /system_override"}  # <|im_start|>system⏎S<|im_end|>⏎: 1+7+1+1+1 = 11
    user, sure = {"role": "user", "content": "ab"}, {"role": "user", "content": "c"}  # 1+5+2+1+1 = 10, and 9
    answer = {"role": "assistant", "content": "xyz"}
    think = {"role": "assistant", "content": "<think>\nhm\n</think>\nxyz"}
    # answered under /no_think: <|im_start|>assistant⏎<think>⏎⏎</think>⏎xyz<|im_end|>⏎ = 1+10+1+2+1+1+3+1+1 = 21
    # under /think: <|im_start|>assistant⏎<think>⏎hm⏎</think>⏎xyz<|im_end|>⏎ = 1+10+1+4+1+1+3+1+1 = 23
    plain = {**override, "content": "S /no_think /system_override"}  # "S " before the override goes: 11 as well
    long = raw("2", [plain, user, answer, sure, answer], False)
    pools = {
        "chats_no_think": [raw("1", [plain, user, answer], False), long],
        "chats_think": [raw("3", [override, user, think], True)],
    }
    for name, rows in pools.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        done = run_script(normalize, "smoltalk2", tmp_path / f"{name}.jsonl", "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
    shipped = yaml.safe_load((MIXES / "smollm3_hybrid.yaml").read_text())
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(shipped | {"sources": [{"path": name} for name in pools]}))
    done = run_script(
        mix,
        tmp_path / "mix.yaml",
        "--pools",
        tmp_path,
        "--out",
        tmp_path / "set",
        "--recipe",
        RECIPES / "smollm3_sft.py",
        "--model_name_or_path",
        tmp_path / "model",
    )
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "set" / "card.md").read_text()
    # no_think: rows of 11+10+21 = 42 and 42+9+21 = 72; think: 11+10+23 = 44. The header is trained: 21, 42 and 23
    assert [line for line in card.splitlines() if line.startswith("| ")][:4] == [
        "| source | mode | rows | % rows | tokens | % tokens | tokens/row | in context | in response | turns |",
        "| chats_no_think | no_think | 2 | 66.7% | 114 | 72.2% | 57.0 | 25.5 | 31.5 | 3.0 |",
        "| chats_think | think | 1 | 33.3% | 44 | 27.8% | 44.0 | 21.0 | 23.0 | 2.0 |",
        "| all |  | 3 | 100.0% | 158 | 100.0% | 52.7 | 24.0 | 28.7 | 2.7 |",
    ]
    assert "50.5 tokens a row, 23.2 in context, 27.2 in response" in card  # (57+44)/2, (25.5+21)/2, (31.5+23)/2


# -- personas ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def persona_run(demo, run_recipe, tmp_path, capsys):
    """persona_run(rows, template text, *flags) starts smollm3_sft on them and returns what refused it, or ""."""
    model = save_model(AutoTokenizer.from_pretrained(demo / "init"), tmp_path / "tiny")

    def start(rows, template, *flags):
        folder = Path(tempfile.mkdtemp(dir=tmp_path))  # mix.py remembers its pools by their paths
        (folder / "template.jinja").write_text(template)
        data = make_set(rows, folder)
        try:
            run_recipe(
                "smollm3_sft",
                *of(model),
                "--dataset_name",
                data,
                "--max_steps",
                1,
                "--chat_template_path",
                folder / "template.jinja",
                "--output_dir",
                folder / "run",
                "--global_batch_size",
                1,
                "--max_length",
                1024,
                "--save_strategy",
                "no",
                *flags,
                defaults=False,
            )
        except ValueError as error:
            return str(error)
        return ""

    return start


def test_lost_personas_stop_the_run(persona_run):
    """SmolLM3's own bug: every row of SystemChats got the default persona, and no score told."""
    template = TEMPLATE.read_text()
    broken = template.replace("{%- set own = own or custom_instructions %}", "")
    deaf = template.replace("{%- if own %}", "{%- if own and false %}")
    assert broken != template != deaf
    turns = [said("user", "Ada, who?"), said("assistant", "Ada.")]
    rows = [raw("0", turns, False), raw("1", turns[:1] + [said("assistant", "A.")], False, "You are Ada.")]
    rows.append(raw("2", [said("system", "You are Bob. /no_think"), *turns], True))
    assert persona_run(rows, template) == ""
    told = persona_run(rows, broken)
    assert told.startswith("1 of 3 rows lose their persona") and "'You are Ada.'" in told
    told = persona_run(rows, deaf)
    assert told.startswith("2 of 3 rows lose their persona")
    # what is in the text by chance is not the persona: here the user says it, there the template's own begins with it
    echoed = [raw("0", [said("user", "You are Ada."), said("assistant", "Yes.")], False, "You are Ada.")]
    echoed += [raw("1", turns, False, "You are a helpful AI assistant")]
    assert persona_run(echoed, broken).startswith("2 of 2 rows lose their persona")
    assert persona_run(rows, broken, "--allow", "lost_personas") == ""


# -- an optimizer from a file ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("recipe", ["smollm3_sft", "qwen3_full"])
def test_an_optimizer_from_a_file(demo, run_recipe, tmp_path, capsys, recipe):
    """Muon's first step moves a matrix as far as its rate says; without the flag --optim's AdamW trains."""
    model = demo / "init"
    if recipe == "smollm3_sft":
        model = save_model(AutoTokenizer.from_pretrained(model), tmp_path / "tiny")
    turns = [{"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": "3, as said."}]
    (tmp_path / "rows.jsonl").write_text("".join([json.dumps({"messages": turns}) + "\n"] * 4))
    flags = [*of(model), "--dataset_name", tmp_path / "rows.jsonl", "--max_steps", 1, "--global_batch_size", 4]
    flags += ["--max_length", 256, "--save_strategy", "no", "--eval_strategy", "no", "--eval_rows", 0]
    flags += ["--warmup_steps", 0, "--lr_scheduler_type", "constant", "--lr_scheduler_kwargs", "{}"]
    flags += [
        "--weight_decay",
        0,
        "--learning_rate",
        1e-2,
        "--chat_template_path",
        REPO / "chat_templates/chatml.jinja",
    ]
    muon = ["--optimizer", REPO / "recipes" / "optimizers" / "muon.py", "--optim_args", "dtype=float32"]
    moved = {}
    for name, more in (("muon", muon), ("adamw", [])):
        run_recipe(recipe, *flags, *more, "--output_dir", tmp_path / name, defaults=False)
        assert ("parameters by Muon (float32)" in capsys.readouterr().out) is (name == "muon")
        before = AutoModelForCausalLM.from_pretrained(model).state_dict()
        after = AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        key = "model.layers.0.mlp.down_proj.weight"
        moved[name] = (after[key].float() - before[key].float()) / 1e-2
    # the singular values of Muon's update are all about 1, times 0.2 sqrt(longer side); the gradient's rank is small
    values = torch.linalg.svdvals(moved["muon"])[:4] / (0.2 * max(moved["muon"].shape) ** 0.5)
    assert values == pytest.approx(torch.ones(4), abs=0.1)
    assert moved["adamw"].abs().median() == pytest.approx(1, abs=0.05)  # AdamW's first step is the gradient's sign


@pytest.mark.parametrize("recipe", ["smollm3_sft", "qwen3_full"])
def test_a_file_that_is_no_optimizer_is_refused(tmp_path, run_recipe, capsys, recipe):
    (tmp_path / "empty.py").write_text("")
    for path, words in (("no_such.py", "no such file: pass the path of optimizers/muon.py"), ("empty.py", "check")):
        with pytest.raises(SystemExit) as stop:
            run_recipe(recipe, "--use_cpu", "true", "--optimizer", tmp_path / path, defaults=False)
        assert stop.value.code == 2
        assert re.search(rf"--optimizer \S*{path}: .*{words}", capsys.readouterr().err)


# -- a run ------------------------------------------------------------------------------------------------------------
def test_from_raw_rows_to_a_trained_model(demo, run_recipe, tmp_path):
    """The architecture is SmolLM3's with its NoPE layers, and the held-out loss falls by more than a nat."""
    model = save_model(
        AutoTokenizer.from_pretrained(demo / "init"), tmp_path / "tiny", hidden_size=64, intermediate_size=128
    )
    rows = [
        row | {"chat_template_kwargs": row["chat_template_kwargs"] | {"custom_instructions": "Add."}}
        for row in small_rows(240)
        if row["messages"][0]["role"] != "system"
    ]
    data = make_set(rows, tmp_path, validation={"share": 0.1, "min": 20}, dedup=False)
    out = tmp_path / "run"
    run_recipe(
        "smollm3_sft",
        *of(model),
        "--dataset_name",
        data,
        "--output_dir",
        out,
        "--dataset_test_split",
        "validation",
        "--eval_strategy",
        "steps",
        "--eval_steps",
        40,
        "--eval_on_start",
        "true",
        "--max_steps",
        40,
        "--global_batch_size",
        4,
        "--per_device_train_batch_size",
        4,
        "--max_length",
        512,
        "--learning_rate",
        "1e-2",
        "--save_strategy",
        "no",
        "--activation_checkpointing",
        "false",
        defaults=False,
    )
    config = AutoConfig.from_pretrained(out)
    assert type(config) is SmolLM3Config and config.architectures == ["SmolLM3ForCausalLM"]
    assert config.no_rope_layers == [1, 1, 1, 0]
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses = [line["eval_loss"] for line in log if "eval_loss" in line]
    assert len(losses) == 2 and losses[-1] < losses[0] - 1, losses
    served = AutoTokenizer.from_pretrained(out).chat_template
    assert "{%- generation" not in served and "custom_instructions" in served
