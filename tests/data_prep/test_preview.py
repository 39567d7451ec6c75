"""Preview tells what a run would do: tokens and masks are transformers', packs and steps TRL's, findings by exit code.

The oracles are not ours: apply_chat_template row by row, pack_dataset, and the trainer of a recipe that was started and
stopped before its first step.
"""

import importlib.metadata
import json
import random
import re
import resource
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
from datasets import Dataset, DatasetDict

from data_prep import preview
from data_prep.common import (
    packing,
    preview_rows,
    preview_text,
    recipe_rows,
    recipe_settings,
    rendering,
    tokens,
    writer,
)
from data_prep.common import rows as row_shape
from tests.helpers.runs import EXACT, MODULES, REPO, SHARED, TINY

SCRIPT = "-m", "data_prep.preview"
RECIPE = REPO / "recipes" / "qwen3_qlora.py"
TEMPLATES = REPO / "chat_templates"


def chat(*turns, **more):
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


def save(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A tokenizer folder in which every byte is one token, so that figures can be counted by hand."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {char: number for number, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
    tokenizer.add_tokens([AddedToken(name, special="|" in name, normalized=False) for name in names])
    folder = tmp_path_factory.mktemp("tiny")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def look(tiny, tmp_path, monkeypatch, capsys):
    """look(rows, *flags) runs preview here; returns (exit code, stdout, stderr, report or None).

    rows: a list of rows, or a path; the recipe is qwen3_qlora with the byte tokenizer, ChatML and no held-out rows."""

    def run(rows, *flags, recipe=RECIPE, model=tiny, template=TEMPLATES / "chatml.jinja"):
        data = save(tmp_path / "rows.jsonl", rows) if isinstance(rows, list) else rows
        report = tmp_path / "figures.json"
        report.unlink(missing_ok=True)
        given = [data, "--recipe", recipe, "--eval_rows", 0, "--report", report]
        given += ["--model_name_or_path", model] if model else []
        given += ["--chat_template_path", template] if template else []
        monkeypatch.setattr(sys, "argv", ["preview.py", *map(str, [*given, *flags])])
        capsys.readouterr()
        try:
            code = preview.main()
        except SystemExit as stop:  # argparse
            code = stop.code
        said = capsys.readouterr()
        return code, said.out, said.err, json.loads(report.read_text()) if report.is_file() else None

    return run


def settings(model, template, **names):
    flags = {"model_name_or_path": str(model), "chat_template_path": str(template), "eval_rows": 0, **names}
    return recipe_settings.read_settings(RECIPE, flags=flags)


# -- packs and steps are TRL's ----------------------------------------------------------------------------------------
STOPPED = """
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from transformers import TrainerCallback


class Stop(TrainerCallback):
    def __init__(self, trainer):
        rows = trainer.train_dataset
        steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
        trained = [sum(label != -100 for label in labels) for labels in rows["labels"]]
        report = {"ids": [*rows["input_ids"]], "trained": trained, "epoch": steps[1], "steps": steps[-1]}
        Path(trainer.args.output_dir, "found.json").write_text(json.dumps(report))
        sys.exit(77)
"""


def mixed(demo, count=120):
    """Rows of the demo, with some whose prompt fills the length and some whose answer is cut."""
    from datasets import load_from_disk

    rows = [row["messages"] for row in load_from_disk(demo / "rows" / "chat")["train"] if not row.get("tools")][:count]
    rows = [{"messages": [{k: v for k, v in turn.items() if v is not None} for turn in turns]} for turns in rows]
    rows[5:5] = [chat(("user", "one two " * 200), ("assistant", "three"))] * 3
    rows[50:50] = [chat(("user", "short"), ("assistant", "one two " * 200))] * 2
    return rows


LONG = [pytest.param(case, marks=pytest.mark.long) for case in ("shuffled", "pairs")]


@pytest.mark.parametrize("case", ["packed", "unpacked", "held_out", "text", *LONG])
def test_account_equals_the_trainer(case, demo, tmp_path, run_recipe, hook, look):
    flags = ["--max_length", 192, "--num_train_epochs", 2.5, "--max_steps", -1, "--global_batch_size", 6]
    flags += ["--per_device_train_batch_size", 2, "--eval_rows", 31 if case == "held_out" else 0]
    rows, recipe = mixed(demo), "qwen3_qlora"
    flags += ["--packing", "false"] if case == "unpacked" else []
    flags += ["--shuffle_dataset", "true"] if case == "shuffled" else []
    template = TEMPLATES / "qwen3.jinja"
    if case == "pairs":  # only the last answer is trained, though the template marks every one
        template = TEMPLATES / "qwen3_instruct_2507.jinja"
        rows = [row for row in rows if not any(turn.get("reasoning_content") for turn in row["messages"])]
        rows += [chat(*[("user", "one"), ("assistant", "two three")] * 3)] * 20
        rows = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows]
    if case == "text":
        rows = [{"text": turn["content"]} for row in rows for turn in row["messages"]]
        recipe, flags = "qwen3_full", [*flags, "--assistant_only_loss", "false"]
    data = save(tmp_path / "mixed.jsonl", rows)
    with pytest.raises(SystemExit) as stopped:
        allowed = ["--allow", "cut_answers", "masked_packs"]  # there are such on purpose
        run_recipe(
            recipe, *EXACT, *hook(STOPPED), "--dataset_name", data, *flags, "--chat_template_path", template, *allowed
        )
    assert stopped.value.code == 77
    found = json.loads((tmp_path / "run" / "found.json").read_text())
    if case == "shuffled":  # a name that only YAML gives preview
        (tmp_path / "run.yaml").write_text("shuffle_dataset: true\n")
        flags[-2:] = ["--config", tmp_path / "run.yaml"]
    code, out, _, report = look(
        data, *flags, model=demo / "init", template=template, recipe=REPO / "recipes" / f"{recipe}.py"
    )
    ours = report["totals"]
    assert ours["units"] == len(found["ids"]) > 15
    assert ours["kept_tokens"] == sum(map(len, found["ids"])) and ours["kept_trained"] == sum(found["trained"])
    assert ours["masked_packs"] == found["trained"].count(0)
    assert (ours["steps_per_epoch"], ours["steps"]) == (found["epoch"], found["steps"])
    assert ours["packs"] == (None if case == "unpacked" else len(found["ids"]))
    if case != "unpacked":
        assert ours["fill"] == pytest.approx(sum(map(len, found["ids"])) / len(found["ids"]) / 192)
    if case in ("packed", "held_out", "shuffled"):  # the very packs
        names = {"max_length": 192, "eval_rows": 31 if case == "held_out" else 0}
        names = settings(demo / "init", template, **names, shuffle_dataset=case == "shuffled")
        loaded, order, _ = recipe_rows.load_rows(data, names)
        docs = list(tokens.iter_documents(loaded, rendering.load_renderer(names), names))
        packs = packing.pack_lengths([len(docs[row].ids) for row in order], 192)
        packs = [[t for row, a, b in one for t in docs[order[row]].ids[a:b]] for one in packs]
        assert sorted(found["ids"]) == sorted(packs)
        assert (found["ids"] == packs) == (case != "shuffled")  # TRL shuffles the packs once more
    if case in ("packed", "held_out", "shuffled"):
        assert ours["masked_packs"] == 3 and ours["cut"] == 5
    assert ("held out" in out) == (case == "held_out")


def test_account_of_a_compiled_set_equals_the_trainer(demo, tmp_path, run_recipe, hook, look):
    """With the config that a run needs and without it: the rows are what they are."""
    draw = random.Random(1)
    ids = [[draw.randint(0, 90) for _ in range(draw.randint(4, 250))] for _ in range(50)]
    labels = [[token if draw.random() < 0.5 else -100 for token in row] for row in ids]
    labels[-1] = [-100] * len(ids[-1])
    rows = [{"input_ids": a, "labels": b, "seq_lengths": [len(a)]} for a, b in zip(ids, labels, strict=True)]
    data = save(tmp_path / "compiled.jsonl", rows)
    flags = ["--num_train_epochs", 2.5, "--max_steps", -1, "--global_batch_size", 6, "--eval_rows", 0]
    config = ["--config", REPO / "recipes" / "configs" / "compiled.yaml"]
    template, length = TEMPLATES / "qwen3.jinja", TINY.index("--max_length")
    with pytest.raises(SystemExit) as stopped:
        run_recipe(
            "qwen3_qlora",
            *TINY[:length],
            *TINY[length + 2 :],
            *EXACT,
            *hook(STOPPED),
            *config,
            *flags,
            "--allow",
            "masked_packs",
            "--model_name_or_path",
            demo / "init",
            "--chat_template_path",
            template,
            "--dataset_name",
            data,
            "--output_dir",
            tmp_path / "run",
            defaults=False,
        )
    assert stopped.value.code == 77
    found = json.loads((tmp_path / "run" / "found.json").read_text())
    for more, limit in ((config, max(map(len, ids))), ([], 2048), (["--max_length", 192], 192)):
        given = [*flags, "--per_device_train_batch_size", 1, *more]
        _, out, _, report = look(data, *given, model=demo / "init", template=template)
        ours = report["totals"]
        assert ours["units"] == ours["packs"] == len(found["ids"]) == 50 and ours["truncated"] == 0
        assert ours["kept_tokens"] == sum(map(len, found["ids"])) and ours["kept_trained"] == sum(found["trained"])
        assert ours["masked_packs"] == found["trained"].count(0) == 1
        assert (ours["steps_per_epoch"], ours["steps"]) == (found["epoch"], found["steps"])
        assert ours["fill"] == pytest.approx(sum(map(len, ids)) / len(ids) / limit)
        assert ("as compiled, " in " ".join(out.split())) == (more is not config)


def test_a_compiled_set_knows_its_length_and_messages_want_a_mask(demo, tmp_path, look):
    folder = tmp_path / "set"
    DatasetDict({"train": Dataset.from_list([{"input_ids": [5, 6], "labels": [5, 6]}])}).save_to_disk(folder)
    (folder / "report.json").write_text(json.dumps({"script": "compile.py", "max_length": 64}))
    config = ["--config", REPO / "recipes" / "configs" / "compiled.yaml"]
    for more in (config, []):
        _, out, _, report = look(folder, *more, model=demo / "init", template=TEMPLATES / "qwen3.jinja")
        assert report["totals"]["fill"] == pytest.approx(2 / 64) and "as compiled, 64 tokens" in " ".join(out.split())
    code, out, err, _ = look(FINE, *config)
    assert code == 2 and "name no mask: pass --assistant_only_loss true" in err and not out
    _, _, _, report = look(FINE, *config, "--assistant_only_loss", "true")
    assert 0 < report["totals"]["trained"] < report["totals"]["tokens"]


# -- figures by hand --------------------------------------------------------------------------------------------------
def test_figures_of_three_rows(look):
    """ChatML in bytes: a user turn is 1+5+n+1+1 tokens, an answer 1+10+n+1+1, of which n+1 are trained."""
    rows = [
        chat(("user", "ab"), ("assistant", "cde")),  # 10 + 16 = 26, 4 trained
        chat(("user", "f"), ("assistant", "ghijkl")),  # 9 + 19 = 28, 7 trained, the last of them token 27
        chat(("user", "m" * 30), ("assistant", "n")),
    ]  # 38 + 14 = 52, 2 trained, none before 27
    code, out, err, report = look(
        rows,
        "--max_length",
        26,
        "--max_cut",
        1,
        "--num_train_epochs",
        3,
        "--global_batch_size",
        2,
        "--per_device_train_batch_size",
        1,
    )
    assert (code, err) == (0, "")
    totals = report["totals"]
    assert [(row["tokens"], row["trained"], row["truncated"], row["cut"], row["empty"]) for row in report["rows"]] == [
        (26, 4, False, False, False),
        (28, 7, True, True, False),
        (52, 2, True, True, True),
    ]
    wanted = {
        "rows": 3,
        "tokens": 106,
        "trained": 13,
        "truncated": 2,
        "cut": 2,
        "empty": 1,
        "untrained": 0,
        "packs": 3,
        "fill": 1.0,
        "masked_packs": 1,
        "kept_tokens": 78,
        "kept_trained": 10,
        "steps_per_epoch": 2,
        "steps": 6,
        "tokens_per_step": 39.0,
        "trained_per_step": 5.0,
    }
    assert {name: totals[name] for name in wanted} == wanted
    assert totals["lengths"] == {"p0": 26, "p50": 28, "p90": 52, "p95": 52, "p99": 52, "p100": 52}
    for line in (
        "tokens +106",
        r"trained tokens +13 \(12.3%\)",
        r"truncated rows +2 \(66.7%\)",
        "optimizer steps +6 ",
        r"answers that break off +2 \(66.7%\)",
        r"rows without a trained token +1 \(33.3%\)",
        "packs +3 ",
        "fill rate +100.0%",
        r"packs without a trained token +1 \(33.3%\)",
        "tokens a step +39 ",
    ):
        assert re.search(rf"^{line}", out, re.M), line
    assert "row 1: 28 tokens, 7 trained (25%); truncated to 26 tokens, 2 lost; answer cut off" in out
    assert "1 of 3 packs without a trained token" in out
    _, _, _, report = look(rows, "--max_length", 27)
    assert [(row["truncated"], row["cut"]) for row in report["rows"]] == [(False, False), (True, False), (True, True)]
    assert sum(bar[2] for bar in totals["histogram"]) == 3 and sum(bar[3] for bar in totals["histogram"]) == 2


def test_terminal_reads_without_colour(look):
    rows = [chat(("user", "a\x1b[31m [bold]b"), ("assistant", "c\nd")), chat(("user", "e"), ("assistant", "f" * 40))]
    _, out, _, _ = look(rows, "--max_length", 30, "--rows", 9)
    assert "\x1b" not in out and "a␛[31m [bold]b" in out
    assert "⟦c⏎\nd<|im_end|>⟧⏎" in out and re.search(r"⟦f+⟧✂⟦f+<\|im_end\|>⟧", out)
    quiet = look(rows, "--max_length", 30, "--rows", 0)[1]
    assert "⟦" not in quiet and "trained tokens" in quiet


def test_long_rows_are_shortened_in_the_terminal_only(look, tmp_path):
    page = tmp_path / "p.html"
    _, out, _, _ = look([chat(("user", "a" * 3000), ("assistant", "b" * 2000))], "--max_length", 9000, "--html", page)
    assert "tokens, all in the --html page" in out and out.count("a") < 1000 and out.count("b") < 500
    assert out.count("⟦") == out.count("⟧") == 2  # legend and answer
    assert len(re.findall(r'<b class="c"', page.read_text())) > 3000


@pytest.mark.parametrize(
    ("trained", "shown"),
    [
        ("cccc tttttt cccc", "cccc … 6 tokens … cccc"),  # all of it is left out
        ("cccc tctctt cccc", "cccc … 6 tokens … cccc"),  # three answers are
        ("cctt tttttc cccc", "cc⟦tt⟧ … 6 tokens … cccc"),
        ("cctt tttttt ttcc", "cc⟦tt⟧ … 6 tokens … ⟦tt⟧cc"),
        ("cccc ctttxx xxxx", "cccc … 6 tokens … ✂xxxx"),
    ],
)
def test_what_is_left_out_leaves_no_empty_signs(trained, shown, monkeypatch):
    """Fourteen tokens of which four at each end are shown: t trained, c context, x cut off; blanks are no tokens."""
    monkeypatch.setattr(preview_text, "SHOWN_TOKENS", 8)
    row = []
    for number, letter in enumerate(trained.replace(" ", "")):
        row.append(preview_text.ShownToken(letter, [number], letter == "t", False, letter == "x"))
    text = preview_text.make_row_text(row, preview_text.UNICODE_SIGNS).plain
    assert text == shown.replace("6 tokens", "6 tokens, all in the --html page")


@pytest.mark.parametrize(
    ("lengths", "max_length", "bins"),
    [
        ([1, 2, 4, 8], 4, [(1, 2, 1, 0), (2, 3, 1, 0), (4, 5, 1, 0), (8, 9, 1, 1)]),
        ([7, 7, 7], None, [(7, 8, 3, 0)]),
        ([0, 0], None, [(0, 2, 2, 0)]),
        (
            [*range(10, 20)] * 10 + [30000],
            512,
            [(10, 14, 40, 0), (14, 19, 50, 0), (19, 27, 10, 0), (21491, 30001, 1, 1)],
        ),
    ],
)
def test_one_long_row_leaves_the_short_ones_apart(lengths, max_length, bins):
    """Worked by hand: 24 steps from 10 to 30,001 are a factor of 1.396 each: 10, 13.96, 19.49, 27.2, … 21,491.

    Tried, and red: even steps; a first edge that leaves empty rows out; a row of max_length counted as longer.
    """
    found = preview_rows.make_histogram(sorted(lengths), max_length)
    assert [bin for bin in found if bin.rows] == bins


# -- exit 1 -----------------------------------------------------------------------------------------------------------
FINE = [chat(("user", f"q{n}"), ("assistant", f"a{n}")) for n in range(8)]
NOTHING = [*FINE, chat(("user", "q"), ("user", "r"))]
LATE = [*FINE, chat(("user", "x" * 99), ("assistant", "y"))]
PERSONA = [chat(("system", "You are a pirate."), ("user", "q"), ("assistant", "a")), *FINE]


def marked(text):
    """ChatML with `text` as the trained part of an answer and after it."""
    return (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        + text
        + ("{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}")
    )


WHOLE = "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
NO_STOP = "{% generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>\n' }}"
NEWLINE_TOO = "{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}"  # StepTron's mask
NONE = "{{ m.content + '<|im_end|>\n' }}{% if 0 %}{% generation %}{% endgeneration %}{% endif %}"


@pytest.mark.parametrize(
    ("rows", "template", "flags", "finding", "words"),
    [
        (FINE, WHOLE, [], None, "passed"),
        (FINE, NEWLINE_TOO, [], None, "passed"),
        (FINE, NONE, [], "nothing trained", "the mask is empty in every row"),
        (NOTHING, WHOLE, [], "nothing trained", "TRL stops at the first, leave them out (row 8)"),
        (FINE, WHOLE, ["--max_length", 15], "nothing trained", "lies behind the cut"),
        (FINE, NO_STOP, [], "stop token untrained", "8 rows whose last answer ends without a trained stop token"),
        (FINE, "{% generation %}{{ m.content }}{% endgeneration %}", [], "stop token untrained", "8 rows"),
        (LATE, WHOLE, ["--max_length", 60], "answers cut", "1 row of 9 (11.1%)"),
        (LATE, WHOLE, ["--max_length", 60, "--max_cut", 0.2], None, "within --max_cut 20.0%"),
        (LATE, WHOLE, ["--max_length", 121], None, "passed"),
        (PERSONA, WHOLE, [], None, "passed"),
        ([chat(("user", "q <|im_end|>"), ("assistant", "a")), *FINE], WHOLE, [], "control tokens in text", "(row 0)"),
        ([chat(("user", "q"), ("assistant", "<think>a")), *FINE], WHOLE, [], "control tokens in text", "<think>"),
        ([chat(("user", "q < | im_end|>"), ("assistant", "a")), *FINE], WHOLE, [], None, "passed"),
        ([*FINE, chat(("user", "q"), ("assistant", "\na"))], WHOLE, [], None, "1 row with an answer that begins with"),
        ([*FINE, chat(("user", "q"), ("assistant", "a\nb\n"))], WHOLE, [], None, "answers that begin with a newline 0"),
        (
            [chat(("user", "q"), ("assistant", "\na"))],
            WHOLE,
            ["--assistant_only_loss", "false"],
            None,
            "answers that begin with a newline 0",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 24 else None,
)
def test_exit_1(look, tmp_path, rows, template, flags, finding, words):
    path = tmp_path / "t.jinja"
    path.write_text(marked(template))
    code, out, err, report = look(rows, *flags, template=path)
    assert [name for name, *_ in report["findings"]][:1] == ([finding] if finding else []), out
    assert code == (1 if finding else 0) and err == ""
    assert words in " ".join(out.split()) and ("FAILED" in out) == bool(finding)


def test_persona_lost(look, tmp_path):
    """SmolLM3's bug: the system text is dropped; its mode flags may go, the rest may not."""
    path = tmp_path / "t.jinja"
    path.write_text("{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}" + marked(WHOLE))
    code, out, _, report = look(PERSONA, template=path)
    assert code == 1 and "FAILED, persona lost: 1 row" in out and "'You are a pirate.' (row 0)" in out
    kept = "{% set shown = messages[0].content | replace('/no_think', '') | trim %}{{ shown }}" + path.read_text()
    path.write_text(kept)
    flagged = [chat(("system", " You are a pirate.\n /no_think"), ("user", "q"), ("assistant", "a"))]
    assert look(flagged, template=path)[0] == 0
    kwargs = {"custom_instructions": "Be brief as a telegram."}
    code, out, _, _ = look([chat(("user", "q"), ("assistant", "a"), chat_template_kwargs=kwargs)])
    assert code == 1 and "Be brief as a telegram." in out


def test_a_template_of_another_family_stands_at_the_top(look, tmp_path):
    page = tmp_path / "p.html"
    code, out, _, report = look(FINE, "--html", page, template=TEMPLATES / "llama3.jinja")
    (name, sentence, rows), *_ = report["findings"]
    assert code == 1 and name == "template of another family" and rows == []
    assert "llama3.jinja writes <|start_header_id|>, " in sentence and "chat_templates/chatml.jinja" in sentence
    assert out.startswith(f"FAILED, {name}: {sentence}\n") and out.count(sentence) == 2  # and among all, at the end
    tree = ET.fromstring(page.read_text().removeprefix("<!DOCTYPE html>"))
    assert "".join(tree.find(".//p[@class='say bad']").itertext()) == f"{name} {sentence}"
    texts = [{"text": "one"}, {"text": "two"}]  # which no template renders
    flags = ["--assistant_only_loss", "false"]
    assert look(texts, *flags, template=TEMPLATES / "llama3.jinja")[0] == 0


def test_our_templates_pass_on_the_demo(look, demo, tmp_path):
    from datasets import load_from_disk

    rows = load_from_disk(demo / "rows" / "chat")["train"]
    code, out, err, report = look(demo / "rows" / "chat", model=demo / "init", template=TEMPLATES / "qwen3.jinja")
    assert code == 0 and err == "" and report["totals"]["rows"] == len(rows), out
    plain = [row for row in rows if not any(turn.get("reasoning_content") for turn in row["messages"])]
    data = save(tmp_path / "plain.jsonl", [{k: v for k, v in row.items() if v is not None} for row in plain])
    for name in ("chatml", "qwen3_instruct_2507"):
        assert look(data, model=demo / "init", template=TEMPLATES / f"{name}.jinja")[0] == 0


def test_an_answer_without_reasoning_behind_an_opened_thought(look, demo):
    """The advice is the template's argument; nothing is said where the row has it, or the prompt opens no thought."""
    template = TEMPLATES / "qwen3_8.jinja"
    rows = []
    for kwargs in ({}, {"enable_thinking": False}):
        rows.append(chat(("user", "hi"), ("assistant", "a"), chat_template_kwargs=kwargs))
    code, out, err, report = look(rows, model=demo / "init", template=template)
    assert report, err
    assert [row["thought"] for row in report["rows"]] == [True, False] and code == 0
    assert "pass enable_thinking=false in chat_template_kwargs for these rows, or give them reasoning" in out
    assert "strip it" not in out and not any(row["newline"] or row["straddle"] for row in report["rows"])
    assert not look(rows[:1], model=demo / "init", template=TEMPLATES / "qwen3.jinja")[3]["rows"][0]["thought"]


def test_a_token_across_the_edge_is_seen(look, demo, tmp_path):
    """With 896 entries the demo's tokenizer has \\n\\n as one token, as Qwen3's has."""
    model = tmp_path / "larger"
    flags = ["--rows", demo / "rows", "--out", model, "--vocab_size", "896"]
    subprocess.run([sys.executable, "-m", "data_prep.demo_model", *flags], cwd=REPO, check=True, capture_output=True)
    code, out, _, report = look([chat(("user", "hi"), ("assistant", "\nnewline first")), *FINE], model=model)
    assert report["rows"][0]["straddle"] and report["rows"][0]["newline"] and code == 0
    assert "; answer begins with a newline" in out and "across the edge" not in out  # one cause, said once
    assert not any(row["straddle"] or row["newline"] for row in report["rows"][1:])


def test_answers_cut_names_what_helps(look):
    """And no length: it may be one that no card holds."""
    out = look(LATE, "--max_length", 60)[1]
    line = next(line for line in out.splitlines() if line.startswith("FAILED, answers cut"))
    for command in ("stats", "filter --max_length", "expand_turns"):
        assert f"python -m data_prep.{command} " in line
    assert not re.search(r"--max_length \d", line) and "(row 8)" in line


def test_the_other_packings_cut_nothing(look):
    """bfd truncates the long row to 60 tokens, as if it were not packed; bfd_split and wrapped pack all its tokens."""
    for strategy, cut in (("bfd", 1), ("bfd_split", 0), ("wrapped", 0)):
        code, _, _, report = look(LATE, "--max_length", 60, "--packing_strategy", strategy)
        totals = report["totals"]
        assert (code, totals["cut"], totals["truncated"]) == (cut, cut, cut)
        assert totals["kept_tokens"] == totals["tokens"] - cut * (report["rows"][8]["tokens"] - 60)


def test_the_end_of_a_text_is_no_control_token_in_it(look):
    flags = ["--assistant_only_loss", "false"]
    assert look([{"text": "one"}, {"text": "two<|im_end|>"}], *flags)[0] == 0
    code, out, _, _ = look([{"text": "one"}, {"text": "tw<|im_end|>o"}], *flags)
    assert code == 1 and "FAILED, control tokens in text: 1 row with <|im_end|>" in out and "(row 1)" in out


def test_ids_that_load_as_dates(look):
    rows = [chat(("user", "q"), ("assistant", "a"), id=f"2024-07-0{day}") for day in (1, 2)]
    code, out, _, report = look(rows)
    assert code == 0 and "2024-07-01" in out and "2024-07-02" in report["rows"][1]["id"]


# -- what loading changes ---------------------------------------------------------------------------------------------
def call(arguments, **kwargs):
    function = {"name": "f", "arguments": arguments}
    turns = [{"role": "user", "content": "q"}]
    turns.append({"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]})
    turns += [{"role": "tool", "content": "ok"}, {"role": "assistant", "content": "a"}]
    return {"messages": turns, "chat_template_kwargs": kwargs}


@pytest.mark.parametrize(("values", "changed"), [(["2024-07-01", "2024-07-02"], [0, 1]), ([0.5, 1], [1])])
def test_a_value_that_loading_changes(look, typed_loader, tmp_path, values, changed):
    """`datasets` takes a date in every row for a timestamp, and 1 beside 0.5 for 1.0; a folder keeps both."""
    rows = [chat(("user", "q"), ("assistant", "a"), chat_template_kwargs={"at": value}) for value in values]
    template = tmp_path / "t.jinja"
    template.write_text(marked(WHOLE) + "{% if at %}{% endif %}")
    path = save(tmp_path / "rows.jsonl", rows)
    loaded = Dataset.from_json(str(path), cache_dir=tmp_path / "cache")
    loaded = [row["at"] for row in loaded["chat_template_kwargs"]]
    assert [n for n in (0, 1) if repr(loaded[n]) != repr(values[n])] == changed
    code, out, _, report = look(path, "--rows", 0, template=template)
    assert code == 1 and [(name, numbers) for name, _, numbers in report["findings"]] == [("value changed", changed)]
    first = changed[0]
    assert f"chat_template_kwargs.at: {values[first]!r} in the file, {loaded[first]!r} as it is loaded" in out
    assert "python -m data_prep.check" in out and "python -m data_prep.normalize messages" in out
    rows = [row_shape.complete_row(row, "rows", number) for number, row in enumerate(rows)]
    writer.write_rows(tmp_path / "set", "test", {"train": rows})
    assert look(tmp_path / "set", "--rows", 0, template=template)[0] == 0


def test_numbers_of_calls_are_shown_as_they_stand(look, tmp_path):
    """In a file and in a folder, whose other split has other numbers at the same places."""
    rows = [call({"n": number}) | {"id": str(number)} for number in (0.7, 1e-12, 0.95, 3, 12345678901234567)]
    rows = [row_shape.complete_row(row, "rows", 1) for row in rows]
    others = [call({"n": number}) | {"id": f"other {number}"} for number in (0.1, 7, 0.2)]
    others = [row_shape.complete_row(row, "rows", 1) for row in others]
    writer.write_rows(tmp_path / "set", "test", {"test": others, "train": rows})
    for data in (save(tmp_path / "rows.jsonl", rows), tmp_path / "set"):
        code, out, _, report = look(data, "--rows", 9, template=TEMPLATES / "qwen3.jinja")
        assert code == 0 and report["findings"] == []
        assert re.findall(r'"arguments": {"n": (.*?)}', out) == ["0.7", "1e-12", "0.95", "3", "12345678901234567"]


# -- exit 2 -----------------------------------------------------------------------------------------------------------
def test_exit_2(look, tiny, tmp_path):
    files = {
        "broken.jsonl": '{"messages": []}\n{"messages": [\n',
        "empty.jsonl": "",
        "x.csv": "a,b\n",
        "bad.yaml": "a: [",
        "list.yaml": "- a\n",
        "typo.yaml": "max_lenght: 3\n",
        "word.yaml": "max_length: long\n",
        "null.yaml": "max_length: null\n",
        "none.py": "A = 1\n",
        "broken.py": "def",
        "text.py": "DEFAULTS = 'a'\n",
        "boom.py": "DEFAULTS = dict(a=boom)\n",
        "plain.jinja": "{{ messages }}",
        "broken.jinja": "{% if %}",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.jsonl").write_bytes('{"messages": "é"}\n'.encode("latin-1"))
    (tmp_path / "folder").mkdir()
    from datasets import Dataset, DatasetDict

    Dataset.from_list(FINE).save_to_disk(tmp_path / "single")
    DatasetDict({"dev": Dataset.from_list(FINE)}).save_to_disk(tmp_path / "dev")
    null = [chat(("user", "q"), ("assistant", "a"), chat_template_kwargs={"train_turns": "last"}), *FINE]
    reasons = chat(("user", "q"), ("assistant", "a"))
    reasons["messages"][1]["reasoning_content"] = "because"
    at = tmp_path.joinpath
    cases = [
        (at("no.jsonl"), [], {}, ["no.jsonl", "no such file", "pass"]),
        (at("x.csv"), [], {}, ["x.csv", "unknown kind"]),
        (at("folder"), [], {}, ["folder", "cannot be read"]),
        (at("single"), [], {}, ["single", "without splits"]),
        (at("dev"), [], {}, ["no split train", "only dev", "--dataset_train_split"]),
        (at("broken.jsonl"), [], {}, ["broken.jsonl:2", "not JSON"]),
        (at("latin.jsonl"), [], {}, ["latin.jsonl:1", "not UTF-8"]),
        (at("empty.jsonl"), [], {}, ["empty.jsonl", "no rows", "data_prep.normalize"]),
        ([{"question": "q", "answer": "a"}], [], {}, ["question, answer", "data_prep.normalize"]),
        (null, [], {}, ["rows.jsonl: row 1 ", "chat_template_kwargs is null", "write {}"]),
        ([*FINE, reasons, reasons], [], {}, ["row 8", "and 1 more", "reasoning_content"]),
        ([chat(("user", "\ud800"), ("assistant", "a"))], [], {}, ["rows.jsonl:1", "surrogate"]),
        ([{"messages": {"role": "user", "content": "q"}}], [], {}, ["rows.jsonl", "messages are no list"]),
        ([{"text": "a"}], [], {}, ["rows.jsonl: ", "no chats", "assistant_only_loss"]),
        ([{"input_ids": [1, 2], "labels": [1]}], [], {}, ["row 0", "labels"]),
        (FINE, [], {"recipe": at("no.py")}, ["no.py", "--recipe"]),
        (FINE, [], {"recipe": at("none.py")}, ["none.py", "no DEFAULTS"]),
        (FINE, [], {"recipe": at("broken.py")}, ["broken.py", "not a Python file"]),
        (FINE, [], {"recipe": at("text.py")}, ["text.py", "no dict"]),
        (FINE, [], {"recipe": at("boom.py")}, ["boom.py", "boom"]),
        (FINE, ["--config", at("no.yaml")], {}, ["no.yaml", "--config"]),
        (FINE, ["--config", at("bad.yaml")], {}, ["bad.yaml", "not YAML"]),
        (FINE, ["--config", at("list.yaml")], {}, ["list.yaml", "name: value"]),
        (FINE, ["--config", at("typo.yaml")], {}, ["typo.yaml", "max_lenght", "max_length"]),
        (FINE, ["--config", at("word.yaml")], {}, ["word.yaml", "max_length", "'long'", "whole number"]),
        (FINE, ["--config", at("null.yaml")], {}, ["max_length", "packing"]),
        (FINE, [], {"model": at("nowhere")}, ["nowhere", "--model_name_or_path"]),
        (FINE, [], {"template": at("no.jinja")}, ["no.jinja", "--chat_template_path"]),
        (FINE, [], {"template": at("plain.jinja")}, ["plain.jinja", "generation", "--chat_template_path"]),
        (FINE, [], {"template": at("broken.jinja")}, ["broken.jinja:1", "not a template"]),
        (FINE, ["--max_length", 0], {}, ["max_length", "at least 1"]),
        (FINE, ["--packing_strategy", "bdf"], {}, ["packing_strategy", "'bdf'", "bfd_split"]),
        (FINE, ["--per_device_train_batch_size", 3], {}, ["global_batch_size 16", "multiple", "3"]),
        (FINE, ["--num_train_epochs", 0], {}, ["num_train_epochs", "above 0"]),
        (FINE, ["--rows", -1], {}, ["--rows -1"]),
        (FINE, ["--max_cut", 2], {}, ["--max_cut 2", "share"]),
        (FINE, ["--html", at("x.csv") / "y.html"], {}, ["y.html", "not written"]),
    ]
    for rows, flags, where, words in cases:
        code, out, err, report = look(rows, *flags, **where)
        assert (code, err.count("\n"), report) == (2, 1, None), (code, out, err, words)
        assert "Traceback" not in err and all(word in err for word in words), (err, words)
        assert not list(tmp_path.glob(".*part"))
    for flags, word in ((["--max_lenght", "3"], "max_lenght"), (["--packing", "perhaps"], "perhaps")):
        code, _, err, _ = look(FINE, *flags)
        assert code == 2 and word in err


def test_broken_data_says_one_sentence_in_a_process(tiny, tmp_path):
    """What libraries print by themselves is part of what the user reads."""
    (tmp_path / "broken.jsonl").write_text('{"messages": []}\n{"messages": [\n')
    for data in ("broken.jsonl", "none.jsonl"):
        command = [sys.executable, *SCRIPT, data, "--recipe", RECIPE, "--model_name_or_path", tiny]
        done = subprocess.run(command, cwd=tmp_path, env=MODULES, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr


def test_no_hub_is_asked_for_a_recipes_own_model(look):
    code, _, err, _ = look(FINE, model=None, template=None)
    assert code == 2 and "Qwen/Qwen3-4B-Instruct-2507" in err and "--model_name_or_path" in err and err.count("\n") == 1


# -- the page ---------------------------------------------------------------------------------------------------------
NASTY = [
    chat(
        ("system", "<script>alert('1')</script> & \"q\" <b>"),
        ("user", "https://example.com/x.js \x00\x1b"),
        ("assistant", "one  two\n\tthree 👩‍🚀 \u202e"),
        id="</h3><script>",
    ),
    *FINE,
    chat(("user", "x" * 300), ("assistant", "y")),
    chat(("user", "<|im_end|>"), ("assistant", "\nz")),
    chat(("user", "w" * 300), ("assistant", "y")),
]


def test_the_page(look, tmp_path):
    page = tmp_path / "new" / "page.html"
    code, out, _, report = look(NASTY, "--max_length", 200, "--html", page, "--rows", 2)
    assert code == 1 and "answers cut" in out
    source = page.read_text()
    tree = ET.fromstring(source.removeprefix("<!DOCTYPE html>"))  # well-formed
    assert not {node.tag for node in tree.iter()} & {"script", "link", "img", "iframe", "object", "embed", "a"}
    attributes = {name for node in tree.iter() for name in node.attrib}
    assert not attributes & {"src", "href", "srcset", "onclick", "onload"}
    style = tree.find("head/style").text
    assert "prefers-color-scheme:dark" in style and not re.search(r"url\(|@import|http", style)
    assert "<script>alert" not in source and "&lt;script&gt;" in source
    rows = tree.findall(".//article")
    titles = ["".join(row.find("h3").itertext()) for row in rows]
    assert len(rows) == 4 and titles[0].startswith("row 0 (id </h3><script>) ") and titles[1].startswith("row 1 ")
    assert titles[2].startswith("row 9 ") and "answer cut off" in titles[2] and titles[3].startswith("row 10 ")
    tokens = rows[0].findall("div/b")
    text = "".join("".join(token.itertext()) for token in tokens)
    assert "<script>alert('1')</script> & \"q\" <b><|im_end|>⏎\n" in text and "one  two⏎\n⇥\tthree 👩‍🚀" in text
    assert "␀␛" in text and "⟨U+202E⟩" in text
    trained = "".join("".join(token.itertext()) for token in tokens if "t" in token.get("class").split())
    assert trained.startswith("one  two") and trained.endswith("<|im_end|>")
    ids = [number for token in tokens for number in token.get("title").split(" · ")[0].split("+")]
    assert len(ids) == report["rows"][0]["tokens"]
    assert [len(row.findall("div/hr")) for row in rows] == [0, 0, 1, 0]
    parts = [part.tag for part in rows[2].find("div")]
    assert parts.index("hr") == 200  # ahead of the first token that is cut
    cut = ["cut" in token.get("class").split() for token in rows[2].findall("div/b")]
    assert cut == [False] * 200 + [True] * (len(cut) - 200) and len(cut) == report["rows"][9]["tokens"]
    assert {"answers cut", "control tokens in text", "leading newline"} <= {b.text for b in tree.findall(".//p/b")}
    first = page.read_bytes(), (tmp_path / "figures.json").read_bytes()
    look(NASTY, "--max_length", 200, "--html", page, "--rows", 2)
    assert first == (page.read_bytes(), (tmp_path / "figures.json").read_bytes())


def test_compiled_rows_are_shown_from_their_ids(look, demo, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo / "init")
    text = "<|im_start|>user\nhi 👩‍🚀  é<|im_end|>\n<|im_start|>assistant\nyes 海<|im_end|>"
    ids = tokenizer(text)["input_ids"]
    rows = [{"input_ids": ids, "labels": [-100] * (len(ids) - 1) + ids[-1:]}]
    code, out, _, report = look(rows, "--html", tmp_path / "p.html", "--max_length", 12, model=demo / "init")
    assert code == 0 and text.replace("\n", "⏎\n").removesuffix("<|im_end|>") + "⟦<|im_end|>⟧" in out
    assert report["totals"]["truncated"] == 0 and report["totals"]["packs"] == 1 and report["rows"][0]["trained"] == 1


@pytest.mark.long
def test_ten_thousand_rows_in_fifteen_seconds(demo, tmp_path):
    model, raw = SHARED / "tokenizers" / "qwen3", []
    if model.is_dir():
        raw = (SHARED / "data" / "gsm8k" / "train.jsonl").read_text().splitlines()
        raw = [(row["question"], row["answer"]) for row in map(json.loads, raw)]
    else:  # rows of the same size
        model, raw = demo / "init", [("How many pens has she? " * 10, "She has three of them. " * 12)]
    rows = [chat(("user", q), ("assistant", a), id=str(n)) for n, (q, a) in enumerate((raw * 10000)[:10000])]
    data = save(tmp_path / "x.jsonl", rows)
    command = [sys.executable, *SCRIPT, data, "--recipe", RECIPE, "--model_name_or_path", model]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*command, "--html", tmp_path / "p.html"], cwd=REPO, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime <= 15


def test_oracles_are_the_pinned_ones():
    assert importlib.metadata.version("trl") == "1.16.0" and importlib.metadata.version("transformers") == "5.23.0"
