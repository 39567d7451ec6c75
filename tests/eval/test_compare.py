"""eval/compare.py against calculations of its own: tiny models, some of them rigged, and TRL's loss as an oracle.

Each of these turns the suite red (tried): kept results found whatever the weights are, or the settings; a half-written
line kept; the second adapter put on the first; failed answers not reported; text of the page not escaped; flips not
before distances; failed answers found again in the cache, or none kept; a time limit that does not reach generation, in
any command. What broke by itself while this was written, and has its test: groups by tag left out, and an adapter
without a task type that answered with the library's generation settings (20 tokens) where the base had not run before.
"""

import errno
import gc
import importlib
import json
import math
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from data_prep.common import terminal
from data_prep.common.answers import parse_answer
from eval import compare
from eval.common import before_after, measure, metrics, page
from eval.common import models as models_
from tests.helpers.runs import MODULES, REPO

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PLAIN = ["<think>", "</think>", "<tool_call>", "</tool_call>"]  # as in Qwen3: tokens of their own, but not special
STOP = 256 + 1 + 2  # the bytes, one merge, then SPECIAL
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


def chat(*turns, **more):
    roles = ["user", "assistant"] * len(turns)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)], **more}


ROWS = [
    chat("How much is 3 + 4?", "3 + 4 = 7\n#### 7", id="a", source="sums", tags=[]),
    chat("Größe?", "Größe: 7 Äpfel", "Und nun?", "Ja.", id="b", source="talk", tags=[]),
    chat("Give JSON", '{"k": 1}', id="c", source="json", tags=["json"], tools=TOOLS),
    chat("Hi", "A much longer answer, so that it pads the others: " + "la " * 30, id="d", source="talk", tags=[]),
    chat("No", "7", id="e", source="sums", tags=[], chat_template_kwargs={"enable_thinking": False}),
    chat("Yes", "7", id="f", source="sums", tags=[], chat_template_kwargs={"enable_thinking": True}),
]


def make_tokenizer(template):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)} | {"ĊĊ": 256}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=SPECIAL[2], pad_token=SPECIAL[0])
    text = (REPO / "chat_templates" / f"{template}.jinja").read_text(encoding="utf-8")
    tokenizer.chat_template = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", text)  # the serving form
    return tokenizer


def make_model(seed, size=264):
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=size,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.3,  # far from uniform, so that a wrong position or mask shows
        tie_word_embeddings=False,
    )
    return Qwen3ForCausalLM(config)


def save(folder, model, template="qwen3_instruct_2507"):
    model.save_pretrained(folder)
    make_tokenizer(template).save_pretrained(folder)
    return folder


def rigged(text, stops=True):
    """A model that answers text (no character twice) to any chat prompt, then stops or repeats its last character."""
    tokenizer = make_tokenizer("qwen3_instruct_2507")
    model = Qwen3ForCausalLM(Qwen3Config(**{**make_model(0).config.to_dict(), "hidden_size": 264}))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "norm" in name else 0.0)  # the layers add nothing: a table of the next token remains
        model.model.embed_tokens.weight.copy_(torch.eye(264))
        chain = tokenizer("\n" + text)["input_ids"]
        for now, following in zip(chain, chain[1:] + [STOP if stops else chain[-1]], strict=True):
            model.lm_head.weight[following, now] = 1.0
    return model


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """base, full (another model), adapter (on base), merged (the same as a full model), rows.jsonl"""
    gc.freeze()  # compare.py collects before it loads; what the libraries brought would be looked through every time
    home = tmp_path_factory.mktemp("compare home")
    save(home / "base", make_model(0))
    save(home / "full", make_model(1))
    torch.manual_seed(2)
    lora = get_peft_model(make_model(0), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    save(home / "adapter", lora)
    save(home / "merged", lora.merge_and_unload())
    write_rows(home / "rows.jsonl", ROWS)
    return home


def run(home, base, tuned, *more, data="rows.jsonl", out="out"):
    """(report, {id: answers}) of an in-process run."""
    command = ["--base", home / base, "--tuned", home / tuned, "--data", home / data, "--out", home / out]
    assert compare.main([str(word) for word in (*command, "--max_new_tokens", 8, *more)]) == 0
    lines = (home / out / "answers.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    return json.loads((home / out / "report.json").read_text()), {line["id"]: line for line in map(json.loads, lines)}


def overall(report, model="tuned"):
    return report["results"]["overall"]["all"][model]


def refused(capsys, *command):
    """The one sentence on stderr of a run that must exit with 2."""
    capsys.readouterr()
    assert compare.main([str(word) for word in command]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


# -- perplexity ----------------------------------------------------------------------------------------


def by_hand(folder, rows):
    """(assistant, all-token) perplexity: float64, a row at a time, full softmax, answers found in the text."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).double()
    spoken, every = [], []
    for row in rows:
        options = row.get("chat_template_kwargs") or {}
        text = tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"), tokenize=False, **options)
        found = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        with torch.no_grad():
            chances = torch.softmax(model(input_ids=torch.tensor([found["input_ids"]])).logits[0], -1)
        losses = [-math.log(chances[i, token]) for i, token in enumerate(found["input_ids"][1:])]
        every += losses
        answers = [match.span(1) for match in re.finditer(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", text, re.S)]
        for loss, (start, end) in zip(losses, found["offset_mapping"][1:], strict=True):
            spoken += [loss] if any(first <= start and end <= last for first, last in answers) else []
    return math.exp(sum(spoken) / len(spoken)), math.exp(sum(every) / len(every)), len(spoken), len(every)


def test_perplexity_is_the_hand_computed_value(home):
    report, _ = run(home, "base", "full")
    for model, folder in (("base", "base"), ("tuned", "full")):
        found, (spoken, every, tokens, all_tokens) = overall(report, model), by_hand(home / folder, ROWS)
        assert found["assistant_perplexity"]["value"] == pytest.approx(spoken, rel=1e-4)
        assert found["all_token_perplexity"]["value"] == pytest.approx(every, rel=1e-4)
        assert found["assistant_perplexity"]["tokens"] == tokens
        assert found["all_token_perplexity"]["tokens"] == all_tokens
        assert found["assistant_perplexity"]["turns"] == 7
    assert overall(report, "base") != overall(report, "tuned")


def test_batch_size_and_padding_change_nothing(home):
    one, answers = run(home, "base", "full", "--batch_size", 1)
    assert any(line["tuned"]["answer"] for line in answers.values())
    for size in (2, 6):
        many, again = run(home, "base", "full", "--batch_size", size)
        for metric in ("assistant_perplexity", "all_token_perplexity"):
            assert overall(many)[metric]["value"] == pytest.approx(overall(one)[metric]["value"], rel=1e-5)
        assert again == answers


def test_single_turns_equal_the_evaluation_loss_of_trl(home):
    from trl import SFTConfig, SFTTrainer

    rows = [chat(*(m["content"] for m in row["messages"][:2]), id=row["id"], source="one") for row in ROWS]
    write_rows(home / "single.jsonl", rows)
    report, _ = run(home, "base", "full", data="single.jsonl")
    config = SFTConfig(
        output_dir=str(home / "trl"),
        use_cpu=True,
        bf16=False,
        report_to=[],
        assistant_only_loss=True,
        chat_template_path=str(REPO / "chat_templates" / "qwen3_instruct_2507.jinja"),
        per_device_eval_batch_size=len(rows),  # one batch: Trainer averages batches, not tokens
        max_length=None,
    )
    dataset = Dataset.from_list([{"messages": row["messages"]} for row in rows])
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(home / "full"),
        args=config,
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=make_tokenizer("qwen3_instruct_2507"),
    )
    loss = trainer.evaluate()["eval_loss"]
    assert overall(report)["assistant_perplexity"]["value"] == pytest.approx(math.exp(loss), rel=1e-4)


def prepared(row, template="qwen3_instruct_2507", limit=10_000, serving=True):
    """(row after prepare, reasons) and the texts of each scored output with its prompt."""
    tokenizer, reasons = make_tokenizer(template), []
    if not serving:
        tokenizer.chat_template = (REPO / "chat_templates" / f"{template}.jinja").read_text(encoding="utf-8")
    row = measure.clean_row(row, 1)
    row = measure.prepare(row, tokenizer, {STOP}, limit, lambda reason, place: reasons.append((reason, place)))
    texts = []
    for span in row.spans:
        ids = row.sequences[span.sequence]
        texts.append((tokenizer.decode(ids[: span.start]), tokenizer.decode(ids[span.start : span.end])))
    return row, reasons, texts


def test_every_answer_is_scored_under_its_own_prompt():
    """qwen3 strips the think block of earlier answers from the conversation, but each was served with its own."""
    row = chat("1?", "one", "2?", "two", id="t")
    row["messages"][1]["reasoning_content"] = row["messages"][3]["reasoning_content"] = "hm"
    first = "<|im_start|>user\n1?<|im_end|>\n<|im_start|>assistant\n"
    second = first + "one<|im_end|>\n<|im_start|>user\n2?<|im_end|>\n<|im_start|>assistant\n"
    row, reasons, texts = prepared(row, "qwen3")
    assert not reasons
    assert texts == [
        (first, "<think>\nhm\n</think>\n\none<|im_end|>"),
        (second, "<think>\nhm\n</think>\n\ntwo<|im_end|>"),
    ]
    assert len(row.sequences) == 2  # the second answer shares the conversation's forward pass
    assert row.asked.reference == "<think>\nhm\n</think>\n\ntwo"


def test_no_think_prompts_hold_the_empty_block():
    _, _, [(prompt, output)] = prepared(chat("1?", "one", chat_template_kwargs={"enable_thinking": False}), "qwen3")
    assert prompt.endswith("assistant\n<think>\n\n</think>\n\n") and output == "one<|im_end|>"


def test_generation_markers_do_no_harm():
    assert prepared(ROWS[1])[2] == prepared(ROWS[1], serving=False)[2]


def test_what_cannot_be_scored_is_counted_by_reason():
    masked = chat("a", "b", "c", "d", id="m")
    masked["messages"][1]["loss_mask"] = 0
    refused = chat("a", "b", id="r")
    refused["messages"][1]["reasoning_content"] = "no place for it in this template"
    assert prepared(chat("a", "\nb", id="s"))[1:] == (
        [("answer whose first token straddles the prompt's end", "s, message 1")],
        [],
    )
    assert prepared(masked)[1] == [("answer with loss_mask 0", "m, message 1")] and len(prepared(masked)[2]) == 1
    reasons = ["conversation refused by the template", "answer refused by the template"]
    assert [reason for reason, _ in prepared(refused)[1]] == reasons
    reasons = ["conversation longer than the limit", "answer longer than the limit"]
    assert [reason for reason, _ in prepared(chat("a", "b" * 50), limit=60)[1]] == reasons


# -- answers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("", True, {"stop_rate": 6, "empty": 6, "exact_match": 0, "json_valid": 0}),
        ("7", True, {"stop_rate": 6, "empty": 0, "exact_match": 2, "json_valid": 1}),
        ("#### 7", True, {"stop_rate": 0, "empty": 0, "exact_match": 0, "json_valid": 0}),  # # leads to # for ever
        ("# 7", True, {"stop_rate": 6, "empty": 0, "exact_match": 0, "json_valid": 0}),
        ('{"k', False, {"stop_rate": 0, "empty": 0, "exact_match": 0, "json_valid": 0}),
        ("{}", True, {"stop_rate": 6, "empty": 0, "exact_match": 0, "json_valid": 1}),
    ],
)
def test_rigged_models_are_counted(home, text, stops, expected):
    save(home / "rigged", rigged(text, stops))
    report, answers = run(home, "base", "rigged", out="rigged out")
    found = overall(report)
    assert {metric: found[metric]["count"] for metric in expected} == expected
    assert found["exact_match"]["total"] == len(ROWS) and found["json_valid"]["total"] == 1
    assert len({line["tuned"]["answer"] for line in answers.values()}) == 1


def test_an_answer_that_never_leaves_an_opened_think_block_is_none(home):
    """Thinking-only templates open the block in the prompt; a model that says the answer inside has not answered."""
    model, tokenizer = rigged("yes"), make_tokenizer("chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{- '<|im_start|>assistant\\n' }}\n{%- endif %}", "{{- '<|im_start|>assistant\\n<think>\\n' }}\n{%- endif %}"
    )
    model.save_pretrained(home / "opened")
    tokenizer.save_pretrained(home / "opened")
    write_rows(home / "opened.jsonl", [chat("?", "<think>\nhm\n</think>\n\nyes", id="o")])
    report, answers = run(home, "base", "opened", data="opened.jsonl")
    assert answers["o"]["prompt_tail"].endswith("<think>\n")
    assert answers["o"]["reference"] == "hm\n</think>\n\nyes" and answers["o"]["tuned"]["answer"] == "yes"
    assert overall(report)["exact_match"]["count"] == 0


def test_the_stop_token_may_be_the_last_of_the_budget(home):
    save(home / "rigged", rigged("7"))
    for budget, count in ((1, 0), (2, len(ROWS))):
        report, _ = run(home, "base", "rigged", "--max_new_tokens", budget, out="rigged out")
        assert overall(report)["stop_rate"]["count"] == count


def test_stop_tokens_of_the_generation_config_count(home):
    model = rigged("7a", stops=False)
    model.generation_config.eos_token_id = [STOP, make_tokenizer("chatml").convert_tokens_to_ids("a")]
    save(home / "two stops", model)
    report, answers = run(home, "base", "two stops", out="two out")
    assert overall(report)["stop_rate"]["count"] == len(ROWS) and answers["e"]["tuned"]["answer"] == "7"
    assert report["settings"]["stop_tokens"] == ["a", "<|im_end|>"]


def test_the_models_own_sampling_and_penalties_are_not_used(home):
    model = rigged("a", stops=False)  # a penalty would make it leave the a
    save(home / "penalty", model)
    config = {"do_sample": True, "temperature": 9.0, "repetition_penalty": 9.0, "min_new_tokens": 3}
    (home / "penalty" / "generation_config.json").write_text(json.dumps({"eos_token_id": STOP, **config}))
    _, answers = run(home, "base", "penalty", out="penalty out")
    assert {line["tuned"]["answer"] for line in answers.values()} == {"a" * 8}


# -- whole runs ----------------------------------------------------------------------------------------


def test_an_adapter_equals_the_merged_model_and_leaves_the_base_alone(home):
    full, full_answers = run(home, "base", "merged")
    adapter, answers = run(home, "base", "adapter")
    assert adapter["settings"]["adapter"] and not full["settings"]["adapter"]
    assert overall(adapter, "base") == overall(full, "base") != overall(adapter)
    for metric in ("assistant_perplexity", "all_token_perplexity"):
        assert overall(adapter)[metric]["value"] == pytest.approx(overall(full)[metric]["value"], rel=1e-4)
    assert {k: v["tuned"] for k, v in answers.items()} == {k: v["tuned"] for k, v in full_answers.items()}


def test_four_bits_are_measured(home):
    exact, quantised = (overall(run(home, "base", "adapter", *more)[0]) for more in ([], ["--load_in_4bit"]))
    ratio = quantised["assistant_perplexity"]["value"] / exact["assistant_perplexity"]["value"]
    assert ratio != 1 and 0.5 < ratio < 2


def test_groups_add_up(home):
    report, _ = run(home, "base", "full")
    assert set(report["results"]["source"]) == {"sums", "talk", "json"}
    assert set(report["results"]["mode"]) == {"think", "no_think"}
    assert set(report["results"]["tag"]) == {"json"} and not report["results"]["persona"]
    for model in ("base", "tuned"):
        for metric, whole in overall(report, model).items():
            if metric in ("distinct_answers", "most_common_answer"):  # of a set, no sums over rows
                continue
            parts = [group[model][metric] for group in report["results"]["source"].values() if metric in group[model]]
            for key in whole.keys() & {"nll", "tokens", "turns", "texts", "rows", "count", "total"}:
                assert sum(part[key] for part in parts) == pytest.approx(whole[key]), (metric, key)
        for mode in report["results"]["mode"].values():
            assert mode[model]["exact_match"]["total"] == 1


def test_the_same_input_gives_the_same_bytes(home):
    log = [{"step": n, "loss": 3 / n, "learning_rate": 1e-3 / n} for n in range(1, 9)]
    write_rows(home / "full" / "log.jsonl", [*log, {"step": 8, "eval_loss": 0.5}])
    for out in ("one", "two"):
        run(home, "base", "full", out=out)
    names = {"report.json", "report.md", "report.html", "answers.jsonl", "loss.png"}
    assert {path.name for path in (home / "one").iterdir()} == names | {".cache"}
    for name in names:
        assert (home / "one" / name).read_bytes() == (home / "two" / name).read_bytes(), name
    assert str(home) not in (home / "one" / "report.json").read_text()
    assert (home / "one" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    report = (home / "one" / "report.md").read_text(encoding="utf-8")
    assert "| all | assistant perplexity |" in report and "loss.png" in report
    few = "Groups of fewer than 10 rows, in report.json and report.html: source: json (1), source: sums (3), "
    assert few in report and "| source: sums |" not in report
    (home / "full" / "log.jsonl").unlink()


def test_every_form_of_the_data_gives_the_same_rows(home):
    """Arrow fills tools, kwargs and unequal message fields with None; a folder, a parquet and a JSON file agree."""
    rows = [*ROWS, chat("Add", "", id="g", source="tools", tags=[], tools=TOOLS)]
    rows[-1]["messages"][1]["tool_calls"] = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    rows.append(chat("Add", "", id="h", source="tools", tags=[]))  # Arrow joins both calls' arguments in one struct
    rows[-1]["messages"][1]["tool_calls"] = [{"type": "function", "function": {"name": "f", "arguments": {"b": "z"}}}]
    rows[0] = chat("How much?", "7", id="a", source="sums", tags=[])
    rows[0]["messages"][0]["name"] = None  # and a null that stands in the JSON file itself
    rows = [{**row, "tools": json.dumps(row["tools"]) if row.get("tools") else None} for row in rows]
    write_rows(home / "all.jsonl", rows)
    (home / "all.json").write_text(json.dumps(rows))
    table = Dataset.from_list([{"chat_template_kwargs": None, **row} for row in rows])
    assert table[0]["chat_template_kwargs"] is None and table[0]["messages"][1]["tool_calls"] is None  # filled
    table.to_parquet(home / "all.parquet")
    DatasetDict({"train": table.select([0]), "test": table}).save_to_disk(home / "folder")
    reports = [run(home, "base", "full", data=name)[0] for name in ("all.jsonl", "all.json", "all.parquet", "folder")]
    for report in reports[1:]:
        assert report["data_sha256"] == reports[0]["data_sha256"]
        assert report["results"] == reports[0]["results"]
    assert reports[0]["results"]["source"]["tools"]["base"]["assistant_perplexity"]["tokens"] > 10


def test_rows_are_drawn_by_seed_and_the_unanswered_are_counted(home):
    write_rows(home / "mixed.jsonl", [*ROWS, chat("nobody answers", id="x")])
    report, answers = run(home, "base", "full", data="mixed.jsonl")
    assert report["not_scored"] == {"row without an assistant turn": {"count": 1, "first": "x"}}
    assert report["rows"] == {"read": 7, "measured": 6} and list(answers) == list("abcdef")
    drawn = [list(run(home, "base", "full", "--rows", 3, "--seed", seed)[1]) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] == sorted(drawn[0]) and len(drawn[0]) == 3 and drawn[0] != drawn[2]


def test_the_curve_is_read_from_the_log_or_the_newest_checkpoint(tmp_path):
    assert compare.read_log(tmp_path) == {}
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        state = {"log_history": [{"step": step, "loss": 1.0}]}
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    assert compare.read_log(tmp_path) == {"loss": {10: 1.0}}
    log = [{"step": 1, "loss": 3.0, "learning_rate": 0.1}, {"step": 2, "loss": 9.0}, {"step": 2, "loss": 2.0}]
    write_rows(tmp_path / "log.jsonl", [*log, {"step": 2, "eval_loss": 2.5}])
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # killed while writing
    expected = {"loss": {1: 3.0, 2: 2.0}, "eval_loss": {2: 2.5}, "learning_rate": {1: 0.1}}
    assert compare.read_log(tmp_path) == expected


def test_the_command_line(home):
    command = [sys.executable, "-m", "eval.compare", "--base", "base", "--tuned", "adapter"]
    command += ["--data", "rows.jsonl", "--max_new_tokens", "4", "--rows", "2"]
    environment = {**MODULES, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    shutil.copytree(home / "adapter", home / "cli" / "adapter")
    shutil.copytree(home / "base", home / "cli" / "base")
    shutil.copy(home / "rows.jsonl", home / "cli")
    done = subprocess.run(command, cwd=home / "cli", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "assistant perplexity" in done.stdout and "no loss curve: adapter has neither" in done.stdout
    assert "\r" not in done.stderr and "%|" not in done.stderr  # no progress bar where there is no terminal
    assert (home / "cli" / "adapter" / "report.md").is_file()


# -- planted bad models --------------------------------------------------------------------------------


def row_of(question, answer, number, system=None, **more):
    row = chat(question, answer, id=f"r{number}", source="planted", tags=[], **more)
    row["messages"][:0] = [{"role": "system", "content": system}] if system else []
    return row


def planted(home, text, rows, *more, stops=True, budget=8):
    """({metric: count} over all, the report) of a model that gives one answer to every prompt."""
    save(home / "planted", rigged(text, stops))
    write_rows(home / "planted.jsonl", rows)
    report, _ = run(home, "base", "planted", "--max_new_tokens", budget, *more, data="planted.jsonl", out="planted out")
    return {name: (m["count"], m["total"]) for name, m in overall(report).items() if "count" in m}, report


ZH = ("首都是哪里？", "首都是北京。")
EN = ("What is the capital of this country?", "The capital of this country is Bern.")


def test_a_model_that_never_stops_loops(home):
    counts, _ = planted(home, "7a", [row_of(*EN, 1), row_of(*EN, 2)], stops=False, budget=80)
    assert counts["stop_rate"] == counts["usability"] == (0, 2)
    assert counts["loop_rate"] == counts["abrupt_end_rate"] == (2, 2)
    counts, _ = planted(home, "7a.", [row_of(*EN, 1), row_of(*EN, 2)])
    assert counts["stop_rate"] == counts["usability"] == (2, 2)
    assert counts["loop_rate"] == counts["abrupt_end_rate"] == (0, 2)


def test_a_model_that_forgets_chinese(home):
    rows = [row_of(*ZH, 1), row_of(*ZH, 2), row_of(*EN, 3)]
    rows.append(row_of("2 + 2?", "4", 4))
    counts, report = planted(home, "my dog", rows, budget=16)
    assert counts["language_retention"] == (0, 3)  # two words are no language
    assert planted(home, "你是在。", rows, budget=16)[0]["language_retention"] == (2, 3)
    assert overall(report)["language_retention"]["not_measured"] == 1
    text = (home / "planted out" / "report.md").read_text(encoding="utf-8")
    assert "- language retention: 1 rows not measured, whose question and reference are not both clearly in one" in text


CALL = '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'


def test_a_model_that_writes_control_tokens(home):
    counts, report = planted(home, "a<|im_start|>b.", [row_of(*EN, 1), row_of("Call", CALL, 2)])
    assert counts["control_token_rate"] == (2, 2) and counts["usability"] == (0, 2) and counts["stop_rate"] == (2, 2)
    assert overall(report, "base")["control_token_rate"]["total"] == 2


def test_a_model_that_drops_the_persona(home):
    rows = [
        row_of("Name?", "Arr!", 1, system="You are a pirate."),
        row_of("Name?", "Ada", 2),
        row_of("Your name?", "Ada", 3),
    ]
    _, report = planted(home, "Ada", rows)
    groups = {group: models["tuned"]["exact_match"] for group, models in report["results"]["persona"].items()}
    assert {group: (m["count"], m["total"]) for group, m in groups.items()} == {"persona": (0, 1), "no persona": (2, 2)}
    assert "persona: no persona (2), persona: persona (1)." in (home / "planted out" / "report.md").read_text()
    assert "persona: persona" in "".join(Page((home / "planted out" / "report.html").read_text()).text)


SCHEMA = {"type": "object", "properties": {"k": {"type": "integer"}}, "required": ["k"]}


def json_rows():
    rows = [row_of("Give JSON", '{"k": 1}', 1), row_of("Give JSON", '{"k": 2}', 2), row_of("Give JSON", "No.", 3)]
    rows.append(row_of("k?", '{"k": 1}', 4, system=f"Answer in JSON:\n<schema>\n{json.dumps(SCHEMA)}\n</schema>"))
    rows[0] |= {"tags": ["json"], "json_schema": json.dumps(SCHEMA)}
    rows[1] |= {"tags": ["json"]}
    rows[2] |= {"tags": ["json_negative"]}
    return rows


@pytest.mark.parametrize(
    ("text", "expected"),
    [  # json_valid, json_negative, json_schema_valid, json_exact_match, fields equal
        ('{"k": 1}', ((3, 4), (0, 1), (2, 2), (2, 3), (2, 3))),  # " stands in it twice: see below
        ("{}", ((3, 4), (0, 1), (0, 2), (0, 3), (0, 3))),
        ('{"k', ((0, 4), (0, 1), (0, 2), (0, 3), (0, 3))),  # invalid JSON
        ("No.", ((1, 4), (1, 1), (0, 2), (0, 3), (0, 3))),
    ],
)
def test_json_models(home, monkeypatch, text, expected):
    if text.count('"') > 1:  # no table of next tokens says that: scripted
        ids = make_tokenizer("chatml")(text)["input_ids"]
        output = compare.models.Output(ids, True)
        monkeypatch.setattr(compare.models, "answered", lambda model, prompts, *rest: [output] * len(prompts))
    counts, report = planted(home, "~" if text.count('"') > 1 else text, json_rows())
    fields = overall(report)["json_field_match"]
    names = ("json_valid", "json_negative", "json_schema_valid", "json_exact_match")
    assert (*(counts[name] for name in names), (fields["equal"], fields["fields"])) == expected


@pytest.mark.parametrize("tag", ["json", "json-only", "json_only", "strict", "JSON"])
def test_tags_that_ask_for_json(tag):
    row, reasons, _ = prepared(chat("Give JSON", '{"k": 1}', id="j", tags=[tag]))
    assert row.asked.question.json is True and not reasons
    row, reasons, _ = prepared(chat("Give JSON", "No.", id="j", tags=[tag]))
    assert row.asked.question.json is None and reasons == [("JSON row whose own answer is not JSON", "j")]
    row, reasons, _ = prepared(chat("Give JSON", "No.", id="j", tags=[tag, "json_negative"]))
    assert row.asked.question.json is False and not reasons
    row, reasons, _ = prepared(chat("Give JSON", "{}", id="j", tags=[tag, "json_negative"]))
    assert row.asked.question.json is None and reasons == [("negative JSON example whose own answer is JSON", "j")]


FAMILIES = {  # template: (its special tokens, those that end an answer)
    "gpt_oss": (["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"], ["<|return|>"]),
    "gemma4": (["<bos>", "<|turn>", "<turn|>", "<|channel>", "<channel|>"], ["<turn|>"]),
    "command_a_reasoning": (
        [
            f"<|{name}|>"
            for name in (
                "START_OF_TURN_TOKEN",
                "END_OF_TURN_TOKEN",
                "START_THINKING",
                "END_THINKING",
                "START_RESPONSE",
                "END_RESPONSE",
                "SYSTEM_TOKEN",
                "USER_TOKEN",
                "CHATBOT_TOKEN",
            )
        ],
        ["<|END_OF_TURN_TOKEN|>"],
    ),
    "qwen3": (["<|im_start|>"], ["<|im_end|>"]),
}


@pytest.mark.parametrize("template", FAMILIES)
def test_the_data_of_every_family_is_read_as_its_template_writes_it(template):
    """A JSON row with a thought asks for JSON; a refusal, a cut object and an empty answer are none of it."""
    special, ends = FAMILIES[template]
    tokenizer = make_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": [*special, *ends]})
    tokenizer.bos_token = "<bos>" if "<bos>" in special else None
    stops = set(tokenizer.convert_tokens_to_ids(ends))
    row = chat("Give JSON", '{"k": 1}', id="j", tags=["json"], chat_template_kwargs={"enable_thinking": True})
    row["messages"][1]["reasoning_content"] = "hm"
    reasons = []
    row = measure.prepare(measure.clean_row(row, 1), tokenizer, stops, 9999, lambda *why: reasons.append(why))
    assert not reasons
    question = row.asked.question
    assert (question.json, question.reference.content, question.reference.reasoning) == (True, '{"k": 1}', "hm")
    whole = row.asked.reference
    measure.allow_own_tokens([row.asked], tokenizer)
    for text, is_valid in (
        (whole, True),
        (whole.replace('{"k": 1}', "I can not do that."), False),
        (whole.replace('{"k": 1}', '{"k": 1'), False),
        (whole.replace('{"k": 1}', ""), False),
        (whole[: whole.index("hm") + 2], False),
        ("", False),
    ):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        found = measure.judge_output(row, tokenizer, models_.Output(ids, True), languages=False)
        assert (found["json_valid"], found["json_negative"]) == (is_valid, None), text
        assert not found["control"]


def test_a_family_that_is_not_known_is_said(home):
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}assistant: "
    shutil.copytree(home / "full", home / "unknown")
    (home / "unknown" / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(home / "unknown")
    for tuned, said in (("unknown", True), ("full", False)):
        report, _ = run(home, "base", tuned, out=f"family {tuned}")
        assert report["settings"]["family"] == ("generic" if said else "qwen3_instruct_2507")
        text = (home / f"family {tuned}" / "report.md").read_text(encoding="utf-8")
        assert ("- the template's family is not known" in text) is said


def test_an_answer_of_the_data_that_does_not_parse_is_counted_and_not_asked():
    for text, why in (
        ("<think>\nhm", "its thought does not end"),
        ("<tool_call>\n{}\n</tool_call>", "tool call without a"),
    ):
        row, [(reason, place)], texts = prepared(chat("a", text, id="p"), "chatml")
        assert reason == "answer of the data that does not parse" and place.startswith(f"p, message 1: {why}")
        assert row.asked is None and len(texts) == 1  # its perplexity is measured


def test_a_schema_that_the_data_contradicts_is_counted(home):
    rows = json_rows()
    rows[0]["json_schema"] = {"type": "array"}
    counts, report = planted(home, "{}", rows)
    assert report["not_scored"] == {"JSON schema that the data's own answer does not meet": {"count": 1, "first": "r1"}}
    assert counts["json_schema_valid"] == (0, 1) and counts["json_valid"] == (3, 4)


def test_a_prompt_that_hangs_and_one_that_takes_all_memory_cost_themselves(home, monkeypatch):
    real = Qwen3ForCausalLM.forward
    slow, huge = (torch.tensor(make_tokenizer("chatml")(word)["input_ids"]) for word in ("SLOW", "HUGE"))

    def forward(self, input_ids=None, **kwargs):
        if kwargs.get("use_cache") is not False and input_ids.shape[1] > 4:  # the prompts of generation
            if (input_ids.unfold(1, 4, 1) == slow).all(-1).any():
                time.sleep(30)
            if (input_ids.unfold(1, 4, 1) == huge).all(-1).any():
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 TiB")
        return real(self, input_ids=input_ids, **kwargs)

    rows = [row_of(word, "Ada.", n) for n, word in enumerate(("a", "b", "I am SLOW", "c", "so HUGE a thing", "d"))]
    plain, _ = planted(home, "Ad.", rows, "--batch_size", 2)
    monkeypatch.setattr(Qwen3ForCausalLM, "forward", forward)
    shutil.rmtree(home / "planted out")
    counts, report = planted(home, "Ad.", rows, "--batch_size", 2, "--timeout", 1)
    for name in ("base", "tuned"):
        failed = {"timeout": {"count": 1, "first": "r2"}, "out of memory": {"count": 1, "first": "r4"}}
        assert report["failed"][name] == failed
    assert plain["stop_rate"] == plain["usability"] == (6, 6) and "failed" not in report["not_scored"]
    assert counts["failed"] == (2, 6) and plain["failed"] == (0, 6)
    assert counts["stop_rate"] == counts["usability"] == (4, 6)
    assert counts["loop_rate"] == counts["abrupt_end_rate"] == counts["empty"] == (2, 6)
    assert overall(report)["answer_tokens"]["rows"] == 4 and overall(report)["answer_tokens"]["value"] == 3
    for name in ("report.md", "report.html"):
        text = (home / "planted out" / name).read_text(encoding="utf-8")
        assert "tuned: 1 answers failed: timeout (first: r2)" in text
    # what failed is not kept: without the cause, the same command has all answers, by one batch of each model
    count = Counter(monkeypatch)
    monkeypatch.setattr(Qwen3ForCausalLM, "forward", real)
    again, report = planted(home, "Ad.", rows, "--batch_size", 2, "--timeout", 1)
    assert count() == {"load_model": 2, "add_adapter": 0, "answered": 2} and again == plain
    assert report["failed"] == {"base": {}, "tuned": {}}
    again, _ = planted(home, "Ad.", rows, "--batch_size", 2, "--timeout", 2)  # the limit is no setting of what was said
    assert count()["answered"] == 0 and again == plain


@pytest.mark.parametrize("name", ["chat_eval", "think_follow", "tool_calls"])
def test_the_time_limit_reaches_every_command(home, tmp_path, monkeypatch, name):
    """--timeout is what generation is limited to; without the flag, ten minutes."""
    question = {"role": "user", "content": "A?"}
    files = {
        "gsm8k.jsonl": [{"question": "A?", "answer": "#### 1"}],
        "questions.jsonl": [{"question_id": 1, "turns": ["A?"]}],
        "BFCL_v4_irrelevance.json": [
            {
                "id": "irrelevance_0",
                "question": [[question]],
                "function": [
                    {"name": "f", "description": "x", "parameters": {"type": "dict", "properties": {}, "required": []}}
                ],
            }
        ],
    }
    data = dict(
        zip(
            ["chat_eval", "think_follow", "tool_calls"],
            [write_rows(tmp_path / file, rows) for file, rows in files.items()],
            strict=True,
        )
    )
    words = ["--task", f"gsm8k={data[name]}"] if name == "chat_eval" else ["--data", data[name]]
    seen, limited = [], compare.models.limited
    monkeypatch.setattr(compare.models, "limited", lambda seconds: seen.append(seconds) or limited(seconds))
    save(tmp_path / "hybrid", make_model(0), "qwen3")
    module = importlib.import_module(f"eval.{name}")
    for flags, seconds in ((["--timeout", 7], 7), ([], 600)):
        command = [tmp_path / "hybrid", *words, "--max_new_tokens", 2, "--out", tmp_path / "out", *flags]
        assert module.main([str(word) for word in command]) == 0
        assert set(seen) == {seconds}
        seen.clear()


# -- many models, and what is kept ---------------------------------------------------------------------


class Counter:
    """What of a run goes through a model."""

    def __init__(self, monkeypatch):
        self.found = []
        for name in ("load_model", "add_adapter"):
            monkeypatch.setattr(compare, name, self.counted(name, getattr(compare, name)))
        for name in ("answered", "pad"):
            monkeypatch.setattr(compare.models, name, self.counted(name, getattr(compare.models, name)))

    def counted(self, name, function):
        def call(*args):
            self.found.append(name)
            return function(*args)

        return call

    def __call__(self):
        found = {name: self.found.count(name) for name in ("load_model", "add_adapter", "answered")}
        self.found.clear()
        return found


def many(home, tuned, *more, out="many"):
    command = ["--base", home / "base", "--tuned", *(home / name for name in tuned), "--data", home / "rows.jsonl"]
    command += ["--out", home / out, "--max_new_tokens", 8, *more]
    assert compare.main([str(word) for word in command]) == 0
    return json.loads((home / out / "report.json").read_text())


def test_one_more_model_measures_only_that_one(home, monkeypatch):
    alone = {name: run(home, "base", name, out=f"alone {name}")[0] for name in ("full", "adapter", "merged")}
    count = Counter(monkeypatch)
    report = many(home, ["full"])
    batches = count()["answered"]
    assert batches == 2 and report["results"] == alone["full"]["results"]  # one for each model
    report = many(home, ["full", "adapter"])
    assert count() == {"load_model": 1, "add_adapter": 1, "answered": 1}
    report = many(home, ["merged", "full", "adapter"])
    assert count() == {"load_model": 2, "add_adapter": 0, "answered": 1}
    assert list(overall_of(report)) == ["base", "merged", "full", "adapter"]
    for name, one in alone.items():
        assert overall_of(report)[name] == overall(one) and overall_of(report)["base"] == overall(one, "base")
    assert report["settings"]["adapter"] == {"merged": False, "full": False, "adapter": True}
    text = (home / "many" / "report.md").read_text(encoding="utf-8")
    assert (
        "| base (95%) | merged (95%) | change (95%) | full (95%) | change (95%) | adapter (95%) | change (95%) | n |"
        in text
    )
    assert text.count("|") == text.count("\n|") * 11  # every line has every column
    many(home, ["merged", "full", "adapter"])
    assert count() == {"load_model": 1, "add_adapter": 0, "answered": 0}
    for change in (["--batch_size", 2], ["--max_new_tokens", 7], ["--max_length", 90]):
        many(home, ["full"], *change)
        assert count()["answered"] >= 2, change  # other settings are other results
    shutil.copytree(home / "full", home / "copy")
    many(home, ["copy"])
    assert count()["answered"] == 0  # the name does not count …
    weights = home / "copy" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    many(home, ["copy"])
    assert count()["answered"] == 1  # … every byte of the weights does


def overall_of(report):
    return report["results"]["overall"]["all"]


def test_several_adapters_are_each_put_on_a_clean_base(home):
    torch.manual_seed(3)
    save(
        home / "second",
        get_peft_model(make_model(0), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)),
    )
    alone = overall(run(home, "base", "second", out="alone second")[0])
    report = many(home, ["adapter", "second"], out="adapters")
    assert overall_of(report)["second"] == alone != overall_of(report)["adapter"]


def test_a_killed_run_goes_on_where_it_stopped(home, monkeypatch):
    """Killed with the second model's second batch of answers half done, and with a line half written."""
    whole = many(home, ["full"], "--batch_size", 2, out="whole")
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(REPO)!r})
from eval import compare
real, calls = compare.models.answered, []
def answered(*args):
    calls.append(1)
    return real(*args) if len(calls) < 5 else os.kill(os.getpid(), signal.SIGKILL)
compare.models.answered = answered
compare.main(sys.argv[1:])
"""
    command = ["--base", home / "base", "--tuned", home / "full", "--data", home / "rows.jsonl", "--batch_size", 2]
    command += ["--out", home / "killed", "--max_new_tokens", 8]
    done = subprocess.run([sys.executable, "-c", script, *map(str, command)], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert [path.name for path in (home / "killed").iterdir()] == [".cache"]
    kept = sorted((home / "killed" / ".cache").glob("*.answers"), key=lambda path: path.stat().st_size)
    assert [len(path.read_text().splitlines()) for path in kept] == [1, 3]
    with kept[0].open("a") as file:
        file.write("[[2, [[1, 2")
    count = Counter(monkeypatch)
    assert many(home, ["full"], "--batch_size", 2, out="killed") == whole
    assert count() == {"load_model": 2, "add_adapter": 0, "answered": 2}
    for name in ("report.md", "report.html", "answers.jsonl"):
        assert (home / "killed" / name).read_bytes() == (home / "whole" / name).read_bytes()
    kept[0].write_bytes(b"\0" * 100)  # as a machine that lost power leaves it
    assert many(home, ["full"], "--batch_size", 2, out="killed") == whole
    assert count()["answered"] == 3


def test_names_of_many_models():
    assert compare.names_of([Path("runs/x")]) == ["tuned"]
    assert compare.names_of([Path("runs/x"), Path("runs/y")]) == ["x", "y"]
    assert compare.names_of([Path("runs/a/last"), Path("runs/b/last")]) == ["a/last", "b/last"]
    assert compare.names_of([Path("runs/base"), Path("runs/b")]) == ["runs/base", "runs/b"]


# -- the page ------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Checks that tags are closed in their order, and gathers text, class names and addresses."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.classes, self.links, self.tags = [], [], [], [], set()
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.open.append(tag)
        given = dict(attributes)
        self.classes += given.get("class", "").split()
        self.links += [value for key, value in given.items() if key in ("src", "href", "srcset", "data", "action")]

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_needs_nothing_and_shows_text_as_text(home):
    evil = '<script>alert(1)</script><img src="http://x.y/z">&amp;\x00\u202e'
    rows = [row_of(evil, "<b>7</b>", 1), row_of("a" * 300, "7", 2)]
    rows[0] |= {"id": "<i>1</i>", "source": "</td>", "tags": ['"><u>']}
    log = [{"step": n, "loss": 3 / n, "learning_rate": 1e-3 / n} for n in range(1, 9)]
    save(home / "planted", rigged("7"))
    write_rows(home / "planted" / "log.jsonl", [*log, {"step": 9, "loss": math.inf}, {"step": 8, "eval_loss": 0.5}])
    write_rows(home / "evil.jsonl", rows)
    run(home, "base", "planted", data="evil.jsonl", out="evil")
    (home / "planted" / "log.jsonl").unlink()
    text = (home / "evil" / "report.html").read_text(encoding="utf-8")
    found = Page(text)
    assert not found.links and "url(" not in text and "@import" not in text
    assert not {"script", "img", "iframe", "link", "i" * 2, "u"} & found.tags
    shown = "".join(found.text)
    assert "<script>alert(1)</script>" in shown and "<i>1</i>" in shown and "&amp;␀⟨U+202E⟩" in shown
    assert found.classes.count("chip") >= 4 and "<|im_start|>" in shown
    assert "svg" in found.tags and "loss (nats per token) by optimizer step" in shown and "tuned validation" in shown
    assert not re.search("nan|inf[^o]", "".join(re.findall("<svg.*?</svg>", text)))
    assert "exact match" in shown and "yes" in found.classes  # row 2 is answered right


def answer_line(name, base, tuned):
    """A line of answers.jsonl; an answer is (text, exact, usable)."""
    keys = ("answer", "exact", "usable")
    return {"id": name, "base": dict(zip(keys, base, strict=True)), "tuned": dict(zip(keys, tuned, strict=True))}


def test_the_answers_that_changed_most_come_first():
    lines = [
        answer_line("same", ("abcd", True, True), ("abcd", True, True)),
        answer_line("one letter", ("abcd", False, True), ("abcx", False, True)),
        answer_line("all letters", ("abcd", False, True), ("wxyz", False, True)),
        answer_line("gained", ("abcd", False, True), ("wxyz", True, True)),
        answer_line("lost", ("abcd", True, True), ("abcx", False, True)),
        answer_line("lost both", ("abcd", True, True), ("", False, False)),
    ]
    order = [line["id"] for line in page.list_changed(lines, ["base", "tuned"])]
    assert order == ["lost both", "lost", "gained", "all letters", "one letter"]
    more = [answer_line(str(n), ("a", False, True), ("b", False, True)) for n in range(50)]
    assert [line["id"] for line in page.list_changed(more, ["base", "tuned"])] == [str(n) for n in range(page.CHANGED)]


def side_flags(answer, reference="7", compared="text", **more):
    flags = (
        dict.fromkeys((*page.WRONG, "exact", "cut"), False) | {"stopped": True, "failed": "", "answer": answer} | more
    )
    return [(flag.kind, flag.text) for flag in page.list_flags(flags, reference, compared)]


def test_exact_on_the_page_means_equal_texts_or_says_what_was_compared():
    assert side_flags("7", exact=True) == [("yes", "exact")]
    assert side_flags("4 + 3\n#### 7", "#### 7", "number behind ####", exact=True) == [
        ("yes", "same number behind ####")
    ]
    assert side_flags("<think>\nhm\n</think>\n\n7", exact=True) == [("yes", "same text")]
    assert side_flags("8") == []
    assert side_flags("7", stopped=False, cut=True, loops=True) == [("no", "loops"), ("no", "did not stop")]
    assert side_flags("7", cut=True) == [("no", "breaks off")]
    assert side_flags("", failed="timeout", empty=True) == [("no", "failed: timeout")]


# -- the table -----------------------------------------------------------------------------------------


SETTINGS = ("base", "tuned", "data", "max_new_tokens", "dtype", "device", "family")


def scripted_results(sources):
    """Results over rows of these sources: the tuned model is right, the base is not."""
    rows = []
    for number, source in enumerate(sources):
        row = measure.clean_row(chat("Give it.", "7", id=str(number), source=source), number + 1)
        rows.append(measure.PreparedRow(row))
    records = {name: scripted_records(name, len(rows)) for name in ("base", "tuned")}
    return before_after.compute_results(rows, records, 0)


def scripted_records(name, count):
    """Records of so many answers to "Give it." (7): the tuned model says 7, the base its number, and fails at first."""
    records = []
    for number in range(count):
        answer = parse_answer("7" if name == "tuned" else f"{number}", "generic", "")
        question = metrics.Question(parse_answer("7", "generic", ""), "7", "Give it.")
        failed = "timeout" if name == "base" and not number else ""
        found = metrics.judge(question, answer, answer.content, True, failed)
        sizes = {"answer_tokens": 1, "reference_tokens": 1, "tokens": 10, "turns": 1, "texts": 1, "all_tokens": 10}
        records.append(found | sizes | {"nll": 1.0 + number % 3, "all_nll": 2.0})
    return records


def test_groups_of_few_rows_are_folded_and_n_is_rows(capsys):
    results = scripted_results(["many"] * 12 + ["few"] * 9)
    groups = list(before_after.list_groups(results))
    assert [(group.title, group.size, group.is_few) for group in groups] == [
        ("all", 21, False),
        ("source: few", 9, True),
        ("source: many", 12, False),
    ]
    n = {line.label: line.n for line in groups[0].lines}
    assert n["assistant perplexity"] == n["exact match"] == "21"
    assert n["answer length (tokens)"] == "20, 21"  # one of the base's answers failed
    report = {
        "results": results,
        "settings": dict.fromkeys(SETTINGS, "x"),
    }
    report |= {"not_scored": {}, "failed": {}, "rows": {"measured": 21}, "data_sha256": "0"}
    text = compare.make_markdown(report, False)
    assert "| source: many |" in text and "| source: few |" not in text
    assert "Groups of fewer than 10 rows, in report.json and report.html: source: few (9)." in text
    found = Page(render(report))
    assert "1 groups of fewer than 10 rows" in "".join(found.text) and "details" in found.tags


def test_a_question_asked_in_both_modes_is_one_in_n():
    """Worked by hand: questions 0 to 9 in both modes, 10 to 12 in one, and 0 a second time with thinking.

    That is 10 + 10 + 3 + 1 = 24 rows. Questions: 10 + 3, and the second 0, which has no row without thinking, is a row
    of its own: 14. The first answer of the base failed (question 0 with thinking): its lengths are over 23 rows, of
    which question 0 still has its row without thinking: 14.
    """
    asked = [(number, True) for number in range(10)] + [(number, False) for number in range(10)]
    asked += [(10, True), (11, False), (12, False), (0, True)]
    rows = []
    for place, (question, thinks) in enumerate(asked):
        messages = [{"role": "user", "content": f"Number {question}?"}, {"role": "assistant", "content": "7"}]
        kwargs = {"enable_thinking": thinks}
        row = {"id": str(place), "messages": messages, "source": "both", "chat_template_kwargs": kwargs}
        rows.append(measure.PreparedRow(measure.clean_row(row, place + 1)))
    records = {name: scripted_records(name, len(rows)) for name in ("base", "tuned")}
    results = before_after.compute_results(rows, records, 0)
    groups = {group.title: group for group in before_after.list_groups(results)}
    n = {line.label: line.n for line in groups["all"].lines}
    assert groups["all"].size == 14
    assert n["exact match"] == n["assistant perplexity"] == n["answer length (tokens)"] == "14"
    assert (groups["mode: think"].size, groups["mode: no_think"].size) == (
        12,
        12,
    )  # no question twice: 10 + 1 + 1, 10 + 2
    figure = results["overall"]["all"]["tuned"]["exact_match"]
    assert (figure["questions"], figure["total"], figure["change"]["pairs"]) == (14, 24, 24)


def render(report):
    return compare.make_page(report, [], {}, make_tokenizer("chatml"))


def test_the_terminal_is_coloured_as_the_page(capsys, monkeypatch):
    coloured = partial(terminal.Console, force_terminal=True, color_system="standard", no_color=False)
    monkeypatch.setattr(terminal, "Console", coloured)
    results = scripted_results(["many"] * 30)
    report = {
        "results": results,
        "settings": dict.fromkeys(SETTINGS, "x"),
    }
    report |= {"not_scored": {}, "failed": {}, "rows": {"measured": 30}, "data_sha256": "0"}
    [line] = [line for line in next(before_after.list_groups(results)).lines if line.label == "exact match"]
    assert [cell.verdict for cell in line.cells] == ["", "better", "better"]
    compare.print_table(report)
    out = capsys.readouterr().out
    for cell in line.cells[1:]:
        assert re.search(rf"\x1b\[32m{re.escape(str(cell))} *\x1b\[0m", out)
    assert "\x1b[31m" not in out
    assert f'<td class="better">{line.cells[1].text}<small>{line.cells[1].interval}</small></td>' in render(report)


@pytest.mark.parametrize(("low", "high"), [(0, 3.4), (0, 0.003), (1, 354), (2.31, 2.32), (5, 6), (0, 1e5)])
def test_ticks_are_few_and_round(low, high):
    found = page.ticks(low, high)
    assert 2 <= len(found) <= 6 and all(low <= tick <= high for tick in found)
    assert all(len(f"{tick:g}".replace(".", "").strip("0")) <= 4 for tick in found)


# -- bad input -----------------------------------------------------------------------------------------


def without(folder, name, home):
    """A copy of a run folder without the files that match name."""
    copy = home / f"{folder} without {name.replace('*', '')}"
    shutil.copytree(home / folder, copy, dirs_exist_ok=True)
    for path in copy.glob(name):
        path.unlink()
    return copy


def test_bad_input_is_one_sentence_and_writes_nothing(home, capsys, monkeypatch):
    good = {"--base": home / "base", "--tuned": home / "full", "--data": home / "rows.jsonl", "--out": home / "never"}
    Dataset.from_list(ROWS[:1]).save_to_disk(home / "plain")
    DatasetDict({"train": Dataset.from_list(ROWS[:1])}).save_to_disk(home / "train only")
    (home / "empty.jsonl").write_text("\n")
    (home / "broken.jsonl").write_text('{"messages": []}\n{"messages')
    (home / "broken.parquet").write_text("no")
    (home / "nothing").mkdir()
    save(home / "small", make_model(0, size=200))
    save(home / "broken", make_model(0).apply(lambda part: [p.data.fill_(math.nan) for p in part.parameters()]))
    half = make_model(0)
    half.save_pretrained(home / "half", state_dict={k: v for k, v in half.state_dict().items() if "norm" not in k})
    make_tokenizer("chatml").save_pretrained(home / "half")
    shuffled = home / "shuffled"
    shutil.copytree(home / "base", shuffled)
    text = (shuffled / "tokenizer.json").read_text(encoding="utf-8")
    (shuffled / "tokenizer.json").write_text(text.replace('"A": 32', '"A": 33').replace('"B": 33', '"B": 32'))
    other = get_peft_model(make_model(0), LoraConfig(r=4, target_modules=["q_proj"]))
    save(home / "misfit", other)
    config = json.loads((home / "misfit" / "adapter_config.json").read_text()) | {"r": 8}
    (home / "misfit" / "adapter_config.json").write_text(json.dumps(config))
    lacking = without("adapter", "nothing*", home)
    shutil.copy(home / "misfit" / "adapter_model.safetensors", lacking)

    def data(name, row):
        return {"--data": write_rows(home / f"{name}.jsonl", [row])}

    cases = [
        ({"--tuned": home / "gone"}, "tuned folder .*gone does not exist"),
        ({"--tuned": home / "nothing"}, "is not a model: it has neither"),
        ({"--tuned": without("full", "*.safetensors", home)}, "has no model.*safetensors"),
        ({"--tuned": without("adapter", "*.safetensors", home)}, "has no adapter_model.safetensors"),
        ({"--tuned": without("full", "chat_template*", home)}, "no chat template"),
        ({"--tuned": without("full", "tokenizer*", home)}, "full without tokenizer has no tokenizer"),
        ({"--tuned": home / "half"}, "half lacks .* weights"),
        ({"--tuned": home / "broken"}, "loss on row a is not a number"),
        ({"--tuned": home / "misfit"}, "adapter in .*misfit does not fit"),
        ({"--tuned": lacking}, "adapter in .* does not fit.*missing"),
        ({"--base": home / "gone"}, "base folder .*gone does not exist"),
        ({"--base": home / "nothing"}, "nothing is not a model"),
        ({"--base": home / "small"}, "tokenizer has 264 tokens but .*small embeds 200"),
        ({"--base": shuffled}, "vocabularies .* differ .2 tokens"),
        ({"--base": "some/model"}, "some/model is neither a folder here nor .*hub.*local"),
        ({"--data": home / "gone.jsonl"}, "gone.jsonl does not exist"),
        ({"--data": home / "nothing"}, "nothing is not a dataset folder"),
        ({"--data": home / "train only"}, "no split test, only train"),
        ({"--data": home / "empty.jsonl"}, "holds no rows"),
        ({"--data": home / "broken.jsonl"}, "broken.jsonl, line 2 is not JSON"),
        ({"--data": home / "broken.parquet"}, "broken.parquet: cannot be read"),
        (data("text", {"id": "q", "text": "x"}), r"row 1 \(q\) of the data has no messages"),
        (data("strings", {"messages": ["x"]}), "row 1 of the data has a message without a role"),
        (data("tools", {**ROWS[0], "tools": "{"}), "tools that are not a JSON list"),
        (data("object", {**ROWS[0], "tools": '{"a": 1}'}), "tools that are not a JSON list"),
        (data("question", chat("only a question", id="q")), "no answer .*1 x row without an assistant turn .first: q"),
        ({"--out": home / "rows.jsonl"}, "rows.jsonl is a file"),
    ]
    for change, expected in cases:
        command = [word for pair in (good | change).items() for word in pair]
        assert re.search(expected, refused(capsys, *command)), (change, expected)
        assert not (home / "never").exists() or [path.name for path in (home / "never").iterdir()] == [".cache"]

    def full(path, data, write=Path.write_bytes):
        write(path, data[: len(data) // 2])
        if path.name == ".loss.png.part":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    (home / "kept").mkdir()
    (home / "kept" / "report.md").write_text("the last good one")
    write_rows(home / "full" / "log.jsonl", [{"step": 1, "loss": 1.0}])
    monkeypatch.setattr(Path, "write_bytes", full)
    command = [word for pair in (good | {"--out": home / "kept"}).items() for word in pair]
    assert "No space left on device" in refused(capsys, *command)
    assert {path.name for path in (home / "kept").iterdir()} == {"report.md", ".cache"}
    assert (home / "kept" / "report.md").read_text() == "the last good one"
    for wrong in (["--rows", "0"], ["--dtype", "int8"], ["--row", "3"]):
        with pytest.raises(SystemExit, match="2"):
            compare.main([str(word) for pair in good.items() for word in pair] + wrong)
