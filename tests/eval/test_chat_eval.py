"""eval/chat_eval.py against the published ChatCORE, its own arithmetic by hand, rigged models and scripted answers.

Breaks tried, each seen red: chance 0.25 left out or given to all, argmax over the whole vocabulary, the logits one
position early or at the batch's end, the last `####` for the first, commas kept, a failed answer left out of the total,
imports of the prompt or the tests left out, the verdict on text with its think block, two modes in one file, the MOVER
interval with its sides exchanged; letters read before what the template writes before an answer, a template that does
not continue its prompt taken; an open thought judged, the prompt's own opening or the family not looked at; the first
block for the longest, one of another name, indented ones as they stand; n of six tasks where two ran.
"""

import json
import re
import subprocess
import sys
from functools import partial

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from data_prep.common import sources
from data_prep.common.errors import UsageError
from data_prep.common.rendering import CONTROL_TOKENS
from eval import chat_eval, sandbox
from eval.common import chat_tasks, intervals, letters, models, problems
from eval.common.models import Answer
from tests.eval.test_compare import SPECIAL, make_model, make_tokenizer, rigged, save, write_rows
from tests.helpers.runs import MODULES, REPO, SHARED

# rows in the published schemas, of our own text
ARC = [
    {
        "id": "E1",
        "question": "Which is hot?",
        "answerKey": "B",
        "choices": {"text": ["ice", "fire", "snow", "rain"], "label": list("ABCD")},
    },
    {
        "id": "E2",
        "question": "Which is wet?",
        "choices": {"text": ["sand", "dust", "water"], "label": list("123")},
        "answerKey": "3",
    },
    {
        "id": "E3",
        "question": "Solve:\nx=5",
        "choices": {"text": ["a=b", "c", "d", "e", "f"], "label": list("ABCDE")},
        "answerKey": "A",
    },
]
MMLU = [
    {"question": f"{n} + 1?", "subject": "sums", "choices": [str(n), str(n + 1), str(n + 2), "none"], "answer": n % 4}
    for n in range(12)
]
GSM8K = [
    {"question": "Two pens at 600 each?", "answer": "2 x 600 = <<2*600=1200>>1200\n#### 1,200"},
    {"question": "Three less than one?", "answer": "1 - 3 = -2\n#### -2"},
    {"question": "Half of seven?", "answer": "3.5\n#### 3.5"},
]
PARTS = ("text", "o,x: "), ("python", "'ox'.count('x')"), ("python_output", "1"), ("text", "\n\n#### 1")
BEE = [  # the second as nanochat writes it, in parts
    {
        "id": "s1",
        "messages": [
            {"role": "user", "content": "How many e in tree"},
            {"role": "assistant", "content": "t,r,e,e\n\n#### 2"},
        ],
    },
    {
        "id": "s2",
        "messages": [
            {"role": "user", "content": "How many x in ox"},
            {"role": "assistant", "content": [{"type": k, "text": text} for k, text in PARTS]},
        ],
    },
]
HUMANEVAL = [
    {
        "task_id": "HumanEval/0",
        "prompt": 'from typing import List\n\n\ndef largest(xs: List[int]) -> int:\n    """The largest."""\n',
        "canonical_solution": "    return max(xs)\n",
        "test": "METADATA = {}\n\n\ndef check(candidate):\n    assert candidate([1, 3, 2]) == 3\n"
        "    assert candidate([-1]) == -1\n",
        "entry_point": "largest",
    }
]


def family_tokenizer(template):
    """A tokenizer with the control tokens that a template writes as tokens of their own."""
    tokenizer = make_tokenizer(template)
    tokens = dict.fromkeys(CONTROL_TOKENS.findall(tokenizer.chat_template))
    tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIAL[:2], *tokens]})
    tokenizer.bos_token = tokenizer.eos_token
    return tokenizer


def table(tokenizer, following):
    """A model that gives each next token its logit behind a token, whatever stands before: {token: {next: logit}}."""
    size = len(tokenizer)
    model = Qwen3ForCausalLM(Qwen3Config(**{**make_model(0, size).config.to_dict(), "hidden_size": size}))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "norm" in name else 0.0)
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        for now, nexts in following.items():
            column = tokenizer.convert_tokens_to_ids(now)
            for text, logit in nexts.items():
                model.lm_head.weight[tokenizer.convert_tokens_to_ids(text), column] = logit
    return model


def save_family(folder, template, following):
    tokenizer = family_tokenizer(template)
    table(tokenizer, following).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("chat eval home")
    save(home / "random", make_model(11))
    save(home / "A", rigged("A"))
    save(home / "endless", rigged("a", stops=False))
    # behind a header's newline: C before A; behind the empty think block: x first of all, B before D
    hybrid = table(make_tokenizer("qwen3"), {"Ċ": {"C": 5, "A": 4}, "ĊĊ": {"x": 9, "B": 5, "D": 4}})
    save(home / "hybrid", hybrid, "qwen3")
    for template in ("gpt_oss", "qwq"):
        save(home / template, make_model(0), template)
    for name, rows in {"arc": ARC, "mmlu": MMLU, "gsm8k": GSM8K, "bee": BEE, "humaneval": HUMANEVAL}.items():
        write_rows(home / f"{name}.jsonl", rows)
    return home


def run(home, model, *tasks, flags=(), code=0):
    """(report, {id: line}) of an in-process run."""
    files = {"arc_easy": "arc", "arc_challenge": "arc", "spelling_bee": "bee"}
    tasks = [task if "=" in task else f"{task}={home / files.get(task, task)}.jsonl" for task in tasks]
    out = home / "out" / model
    command = [home / model, "--task", *tasks, "--out", out, "--max_new_tokens", 24, *flags]
    assert chat_eval.main([str(word) for word in command]) == code
    name = "chat_eval_think" if "think" in flags else "chat_eval"
    lines = map(json.loads, (out / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")[:-1])
    return json.loads((out / f"{name}.json").read_text()), {(line["task"], line["id"]): line for line in lines}


def scripted(monkeypatch, answers):
    """Let any model write these answers, in order."""
    told = [one if isinstance(one, Answer) else Answer(one, len(one), True) for one in answers]
    monkeypatch.setattr(chat_tasks, "ask", lambda *_, **__: told)


# -- ChatCORE ----------------------------------------------------------------------------------------------------------


def test_chatcore_is_the_published_one():
    """nanochat d10: 14.35% from its six accuracies (the source's table)."""
    published = {"arc_easy": 0.2546, "arc_challenge": 0.2278, "mmlu": 0.2686, "gsm8k": 0.0174, "humaneval": 0.0061}
    published["spelling_bee"] = 0.8359
    found = chat_eval.chat_core({task: {"value": v, "low": v, "high": v} for task, v in published.items()})
    assert found["value"] == pytest.approx(0.1435, abs=5e-5)
    assert found["low"] == found["high"] == found["value"] and found["total"] == 6


def test_the_interval_of_chatcore():
    """One task: Newcombe's published interval of 81/263, stretched by 1/(1 - b). Two: Zou and Donner's formula."""
    one = {"value": 81 / 263, "low": 0.2553, "high": 0.3662}
    found = chat_eval.chat_core({"gsm8k": one})
    assert (found["low"], found["high"]) == pytest.approx((0.2553, 0.3662))
    found = chat_eval.chat_core({"mmlu": one})
    assert (found["low"], found["high"]) == pytest.approx(((0.2553 - 0.25) / 0.75, (0.3662 - 0.25) / 0.75))
    other = {"value": 0.5, "low": 0.4, "high": 0.7}
    found = chat_eval.chat_core({"gsm8k": one, "humaneval": other})
    assert found["value"] == pytest.approx((81 / 263 + 0.5) / 2)
    assert found["value"] - found["low"] == pytest.approx(((81 / 263 - 0.2553) ** 2 + 0.1**2) ** 0.5 / 2)
    assert found["high"] - found["value"] == pytest.approx(((0.3662 - 81 / 263) ** 2 + 0.2**2) ** 0.5 / 2)


def test_chatcore_covers_as_it_says():
    """Drawn from known accuracies, the interval holds the true ChatCORE about 95 times in 100."""
    generator, truth = torch.Generator().manual_seed(0), {"mmlu": 0.4, "gsm8k": 0.1, "spelling_bee": 0.8}
    core, held = ((0.4 - 0.25) / 0.75 + 0.1 + 0.8) / 3, 0
    for _ in range(1000):
        drawn = {}
        for task, chance in truth.items():
            count = int((torch.rand(100, generator=generator) < chance).sum())
            low, high = intervals.wilson(count, 100)
            drawn[task] = {"value": count / 100, "low": low, "high": high}
        found = chat_eval.chat_core(drawn)
        held += found["low"] <= core <= found["high"]
    assert 930 <= held <= 970


# -- letters -----------------------------------------------------------------------------------------------------------


def test_prompts_are_nanochats():
    text = "Multiple Choice question: Which is hot?\n- ice=A\n- fire=B\n- snow=C\n- rain=D\n\n"
    text += "Respond only with the letter of the correct answer."  # tasks/common.py, render_mc, by hand
    expected = problems.LetterProblem("E1", "arc_easy", [{"role": "user", "content": text}], list("ABCD"), "B")
    assert problems.letter_problem(ARC[0], "E1", "arc_easy") == expected
    for row, other in [*((row, sources.arc(row)) for row in ARC), *((row, sources.mmlu(row)) for row in MMLU)]:
        raw = problems.letter_problem(row, "1", "mmlu")
        assert raw == problems.letter_problem(other, "1", "mmlu")
        assert raw.prompt[0]["content"] == other["messages"][0]["content"]


def test_always_a_scores_the_share_of_a(home):
    report, lines = run(home, "A", "arc_easy", "mmlu")
    assert {line["answer"] for line in lines.values()} == {"A", "1"}  # without an A, a draw: the first
    found = report["metrics"]
    assert (found["arc_easy"]["count"], found["arc_easy"]["total"]) == (1, 3)
    assert (found["mmlu"]["count"], found["mmlu"]["total"]) == (3, 12)
    assert found["chatcore"]["value"] == pytest.approx(((1 / 3 - 0.25) / 0.75 + 0) / 2)
    assert found["chatcore"]["total"] == 2  # tasks, which is what the table shows as n
    assert "high" in found["mmlu"] and found["mmlu"]["low"] < 0.25 < found["mmlu"]["high"]


def test_letters_are_those_of_an_own_calculation(home):
    """A row at a time without padding, in float64, the letters' ids found in the vocabulary."""
    folder = home / "random"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).double()
    expected = {}
    for row in MMLU:
        text = sources.mmlu(row)["messages"][0]["content"]
        text = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, -1]
        expected[row["question"]] = max("ABCD", key=lambda letter: float(logits[tokenizer.get_vocab()[letter]]))
    assert len(set(expected.values())) > 1
    for size in (1, 5, 12):
        report, lines = run(home, "random", "mmlu", flags=["--batch_size", size])
        assert [line["answer"] for line in lines.values()] == list(expected.values())
        right = sum("ABCD"[row["answer"]] == expected[row["question"]] for row in MMLU)
        assert report["metrics"]["mmlu"]["count"] == right


def test_only_the_letters_of_the_question_count_and_each_mode_has_its_file(home):
    report, lines = run(home, "hybrid", "arc_easy")
    assert report["settings"]["mode"] == "no_think" and report["groups"]["mode"]["no_think"] == report["metrics"]
    assert [line["answer"] for line in lines.values()] == ["B", "1", "B"]  # not the x, which is likelier
    report, lines = run(home, "hybrid", "arc_easy", flags=["--mode", "think"])
    assert report["settings"]["mode"] == "think" and list(report["groups"]["mode"]) == ["think"]
    assert [line["answer"] for line in lines.values()] == ["B", "1", "B"]  # behind the empty thought, here too
    assert {path.name for path in (home / "out" / "hybrid").glob("*.json")} == {
        "chat_eval.json",
        "chat_eval_think.json",
    }


TEMPLATES = sorted(path.stem for path in (REPO / "chat_templates").glob("*.jinja"))


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_letter_stands_where_the_template_writes_an_answer(template):
    """Against the rendering of a conversation whose answer is the letter, as the model was trained on it."""
    tokenizer = family_tokenizer(template)
    problem = problems.letter_problem(ARC[0], "E1", "arc_easy")
    answered = [*problem.prompt, {"role": "assistant", "content": "B"}]
    for kwargs in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
        [(text, ids)] = letters.letter_prompts(tokenizer, [problem], **kwargs)
        trained = tokenizer.apply_chat_template(answered, tokenize=False, **kwargs)
        tokens = tokenizer(trained, add_special_tokens=False)["input_ids"]
        assert trained.startswith(text + "B") and tokens[: len(ids)] == ids, kwargs
        assert tokens[len(ids)] == tokenizer.convert_tokens_to_ids("B")


@pytest.mark.parametrize(
    ("template", "mode", "prompt_end", "answer_begins"),
    [
        ("gpt_oss", None, "t", "<|message|>"),  # … assistant, then the final channel
        ("command_a_reasoning", None, "<|CHATBOT_TOKEN|>", "<|START_RESPONSE|>"),
        ("deepseek_v3", None, "Ċ", "ĊĊ"),  # inside an open thought, then behind its end
        ("qwq", None, "Ċ", "ĊĊ"),
        ("glm4_6", "think", "<|assistant|>", "Ċ"),
        ("qwen3", "think", "Ċ", "ĊĊ"),
        ("nanochat", None, "", "<|assistant_start|>"),  # its answers follow its prompt at once
    ],
)
def test_a_model_is_right_where_its_answer_begins(home, template, mode, prompt_end, answer_begins):
    """It knows B where an answer begins; where the prompt alone ends it says C."""
    folder = f"letters {template}"
    following = {answer_begins: {"B": 5.0, "C": 1.0}}
    if prompt_end:
        following[prompt_end] = {"C": 5.0, "B": 1.0}
    save_family(home / folder, template, following)
    report, lines = run(home, folder, "arc_easy", flags=["--mode", mode] if mode else [])
    assert lines["arc_easy", "E1"]["answer"] == lines["arc_easy", "E3"]["answer"] == "B"
    assert report["metrics"]["arc_easy"]["count"] == 1
    assert report["settings"]["family"] == template and ("letters_behind" in report["settings"]) is True
    assert (report["settings"]["letters_behind"] == "") is (template == "nanochat")


def test_a_template_whose_answers_do_not_follow_its_prompt_is_refused(home, capsys):
    """As DeepSeek-R1's own: its prompt opens a thought that no answer of the history has."""
    save(home / "other", make_model(0))
    tokenizer = AutoTokenizer.from_pretrained(home / "other")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    tokenizer.save_pretrained(home / "other")
    with pytest.raises(UsageError, match="does not write an answer behind its own generation prompt"):
        models.answer_prefix(tokenizer, [{"role": "user", "content": "Which?"}])
    command = [home / "other", "--task", f"arc_easy={home / 'arc.jsonl'}", "--out", home / "never"]
    assert chat_eval.main([str(word) for word in command]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and "chat_templates/" in error and not (home / "never").exists()


def test_the_accuracy_that_a_run_logs_is_that_of_the_command(home):
    found = problems.read_problems("mmlu", home / "mmlu.jsonl", "test", None, 42)
    model, tokenizer, stops = models.open_model(home / "random")
    report, _ = run(home, "random", "mmlu")
    assert (
        letters.count_right_letters(model, tokenizer, stops, found, 5) / len(found)
        == report["metrics"]["mmlu"]["value"]
    )


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared is absent: small fixtures prove the same")
def test_real_rows_are_read(home):
    arc, gsm8k = SHARED / "data" / "arc" / "ARC-Challenge_test.jsonl", SHARED / "data" / "gsm8k" / "test.jsonl"
    found = problems.read_problems("arc_challenge", arc, "test", None, 42)
    assert len(found) == 1172
    text = arc.read_text(encoding="utf-8").strip().split("\n")
    keys = [json.loads(line)["answerKey"] for line in text]
    assert [problem.answer for problem in found] == keys
    assert len(problems.read_problems("gsm8k", gsm8k, "test", None, 42)) == 1319
    report, lines = run(home, "A", f"arc_challenge={arc}", flags=["--rows", 24, "--seed", 7])
    own = {json.loads(line)["id"]: key for line, key in zip(text, keys, strict=True)}
    drawn = [own[number] for _, number in lines]
    assert len(drawn) == 24 and report["metrics"]["arc_challenge"]["count"] == drawn.count("A") + drawn.count("1")


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_written_numbers_must_be_the_references(home, monkeypatch):
    scripted(monkeypatch, ["2 x 600\n#### 1200", "#### 2", "<think>#### 9</think>#### 3.5"])
    report, lines = run(home, "A", "gsm8k")
    assert [line["correct"] for line in lines.values()] == [True, False, True]
    assert report["metrics"]["gsm8k"]["count"] == 2
    scripted(monkeypatch, ["t,r,e,e\n#### 3", "#### 1"])  # the first: prints the mark with another number
    report, lines = run(home, "A", "spelling_bee")
    assert [line["correct"] for line in lines.values()] == [False, True]
    assert lines["spelling_bee", "s1"]["given"] == "3" and lines["spelling_bee", "s1"]["reference"] == "2"


@pytest.mark.parametrize(
    ("model", "answer", "correct", "cut"),
    [
        ("hybrid", "<think> maybe #### 1200 …", False, True),
        ("hybrid", "<think>\nmaybe #### 9\n</think>\n\n#### 1,200", True, False),
        ("hybrid", "#### 1200", True, False),
        ("qwq", "maybe #### 1200, or", False, True),  # its prompt opens the thought
        ("qwq", "maybe #### 9\n</think>\n\n#### 1200", True, False),
        ("gpt_oss", "<|channel|>analysis<|message|>maybe #### 1200", False, True),
        (
            "gpt_oss",
            "<|channel|>analysis<|message|>#### 9<|end|><|start|>assistant<|channel|>final<|message|>#### 1200",
            True,
            False,
        ),
    ],
)
def test_a_thought_that_never_ends_is_an_empty_answer(home, monkeypatch, model, answer, correct, cut):
    """Though it stopped, and though it says the number."""
    scripted(monkeypatch, [answer, Answer("#### 9", 4, False), "</think>\n#### 9"])  # the second is cut by its budget
    report, lines = run(home, model, "gsm8k")
    line = lines["gsm8k", "1"]
    assert (line["correct"], line["cut"], line["answer"]) == (correct, cut, answer)
    assert [line["cut"] for line in lines.values()][1:] == [True, False]
    figure = report["groups"]["task"]["GSM8K"]["cut"]
    assert (figure["count"], figure["total"]) == (1 + cut, 3)


def test_a_model_that_never_stops_scores_nothing_in_its_budget(home):
    report, lines = run(home, "endless", "gsm8k")
    assert {line["answer"] for line in lines.values()} == {"a" * 24}
    assert report["metrics"]["gsm8k"]["count"] == 0 and report["metrics"]["gsm8k"]["total"] == 3
    assert report["groups"]["task"]["GSM8K"]["stop_rate"]["count"] == 0


def test_a_failed_answer_is_a_wrong_one_and_counted_by_reason(home, monkeypatch):
    answers = [Answer("", 0, False, "timeout"), Answer("", 0, False, "out of memory"), Answer("#### 3.5", 4, True)]
    scripted(monkeypatch, answers)
    report, lines = run(home, "A", "gsm8k")
    assert (report["metrics"]["gsm8k"]["count"], report["metrics"]["gsm8k"]["total"]) == (1, 3)
    found = report["groups"]["task"]["GSM8K"]
    assert found["failed: timeout"]["count"] == found["failed: out of memory"]["count"] == 1
    assert found["failed: timeout"]["total"] == 3 and lines["gsm8k", "1"]["failed"] == "timeout"


# -- programs ----------------------------------------------------------------------------------------------------------

NO_SANDBOX = pytest.mark.skipif(not sandbox.way(), reason="neither bubblewrap nor namespaces work on this machine")
WHOLE = HUMANEVAL[0]["prompt"] + HUMANEVAL[0]["canonical_solution"]


@NO_SANDBOX
@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (f"Here it is:\n```python\n{WHOLE}\n```\nDone.", ""),
        (WHOLE, ""),
        # List is the prompt's: its imports stand before the answer
        ("```\ndef largest(xs: List[int]) -> int:\n    return max(xs)\n```", ""),
        (f"```python\n{WHOLE}\n```\n```python\nraise ValueError\n```", ""),  # the first block
        ("```python\ndef largest(xs):\n    return xs[0]\n```", "failed: AssertionError"),
        ("```python\ndef smallest(xs):\n    return xs[0]\n```", "failed: NameError"),
        ("I can not.", "failed: SyntaxError"),
        ("```python\nimport sys\nsys.exit(0)\n```", "failed: SystemExit"),
        ("```python\nimport os\nos._exit(0)\n```", "exited early"),
        ("```python\ndef largest(xs):\n    while True: pass\n```", "timeout"),
    ],
)
def test_programs_pass_their_tests_or_fail_by_reason(home, monkeypatch, answer, why):
    monkeypatch.setattr(sandbox, "run", partial(sandbox.run, seconds=1))
    scripted(monkeypatch, [answer])
    report, lines = run(home, "A", "humaneval")
    assert lines["humaneval", "HumanEval/0"]["why"] == why
    assert report["metrics"]["humaneval"]["count"] == (not why)
    if why:
        assert report["groups"]["task"]["HumanEval"][f"failed: {why.removeprefix('failed: ')}"]["count"] == 1


SHORT = "def largest(xs):\n    return max(xs)"


@NO_SANDBOX
@pytest.mark.parametrize(
    ("answer", "literal", "lenient"),
    [
        (f"```python\n{WHOLE}\n```", True, True),
        (f"```py\n{WHOLE}\n```", False, True),  # nanochat takes "py" for code
        (f"Here:\n```Python3\n{WHOLE}\n```\nDone.", False, True),
        (f"~~~python\n{WHOLE}\n~~~", False, True),
        (f"First:\n```python\nimport math\n```\nthen\n```python\n{WHOLE}\n```", False, True),
        (f"```python\n{WHOLE}", False, True),  # never closed
        ("1. So:\n\n   ```python\n   import math\n   def largest(xs):\n       return max(xs)\n   ```", False, True),
        (f"```\n{SHORT}\n```\nshorter:\n```\ndef largest(x): return 0\n```", True, True),  # the longest
        (f"```\n{SHORT}\n```\nor\n```\n{SHORT.replace('max', 'min')}  # the smallest\n```", True, False),
        ("```py\ndef largest(xs):\n    return xs[0]\n```", False, False),
        (f"```py\n{SHORT}\n```\n```\ndef largest_of(xs):\n    return sorted(xs)[-1]\n```", False, True),  # its name
        ("I can not.", False, False),
    ],
)
def test_the_lenient_figure_beside_nanochats_rule(home, monkeypatch, answer, literal, lenient):
    scripted(monkeypatch, [answer])
    report, lines = run(home, "A", "humaneval")
    line = lines["humaneval", "HumanEval/0"]
    assert (line["correct"], line["lenient"]) == (literal, lenient)
    group = report["groups"]["task"]["HumanEval"]
    assert (group["lenient"]["count"], group["accuracy"]["count"]) == (lenient, literal)
    assert report["metrics"]["humaneval"]["count"] == literal  # ChatCORE keeps nanochat's


def test_a_failed_program_is_not_run(home, monkeypatch):
    scripted(monkeypatch, [Answer("", 0, False, "timeout")])
    report, lines = run(home, "A", "humaneval", flags=["--unsafe_sandbox"])
    assert lines["humaneval", "HumanEval/0"]["lenient"] is False
    assert report["groups"]["task"]["HumanEval"]["lenient"]["total"] == 1


def test_without_a_sandbox_nothing_runs(home, monkeypatch, capsys):
    monkeypatch.setattr(sandbox, "way", lambda: None)
    command = [home / "A", "--task", f"humaneval={home / 'humaneval.jsonl'}", "--out", home / "never"]
    assert chat_eval.main([str(word) for word in command]) == 2
    assert "no sandbox works here" in capsys.readouterr().err and not (home / "never").exists()
    scripted(monkeypatch, [WHOLE])
    report, _ = run(home, "A", "humaneval", flags=["--unsafe_sandbox"])
    assert report["metrics"]["humaneval"]["count"] == 1 and report["settings"]["sandbox"] == "none: limits alone"


# -- the command -------------------------------------------------------------------------------------------------------


def test_every_form_of_the_data_gives_the_same_lines(home):
    Dataset.from_list(MMLU).to_parquet(home / "mmlu.parquet")
    Dataset.from_list(MMLU).save_to_disk(home / "mmlu folder")
    write_rows(home / "mmlu_rows.jsonl", [{"id": str(n), **sources.mmlu(row)} for n, row in enumerate(MMLU, 1)])
    _, first = run(home, "random", "mmlu")
    for name in ("mmlu.parquet", "mmlu folder", "mmlu_rows.jsonl"):
        assert run(home, "random", f"mmlu={home / name}")[1] == first


def test_the_same_input_gives_the_same_bytes(home):
    def once():
        run(home, "random", "mmlu", "gsm8k", flags=["--rows", 2, "--seed", 3])
        return {path.name: path.read_bytes() for path in (home / "out" / "random").iterdir()}

    first = once()
    assert once() == first and str(home) not in first["chat_eval.json"].decode()
    assert run(home, "random", "mmlu", "gsm8k", flags=["--rows", 2, "--seed", 4])[1].keys() != json.loads(
        "[" + ",".join(first["chat_eval.jsonl"].decode().split("\n")[:-1]) + "]"
    )


def test_the_table_of_stages(home, capsys):
    """nanochat's report: rows tasks, columns stages, four decimals, - for what a stage lacks."""
    values = {
        "base": {"arc_easy": 0.25, "chatcore": 0.0},
        "sft": {"arc_easy": 0.4, "gsm8k": 0.0174, "chatcore": 0.1087},
    }
    for stage, found in values.items():
        (home / "stages" / stage / "eval").mkdir(parents=True)
        found = {task: {"value": value, "count": 1, "total": 6} for task, value in found.items()}
        (home / "stages" / stage / "eval" / "chat_eval.json").write_text(json.dumps({"metrics": found}))
    runs = [str(home / "stages" / stage) for stage in values]
    assert chat_eval.main(["--stages", *runs]) == 0
    table = capsys.readouterr().out
    assert table.startswith(
        "| Metric          | BASE     | SFT      |\n"
        "|-----------------|----------|----------|\n"
        "| ARC-Easy        | 0.2500   | 0.4000   |\n"
        "| GSM8K           | -        | 0.0174   |\n"
        "| ChatCORE        | 0.0000   | 0.1087   |\n"
    )
    assert "SFT: ChatCORE is not over all six tasks: it lacks ARC-Challenge, MMLU, HumanEval, SpellingBee" in table
    assert (home / "stages" / "sft" / "eval" / "stages.md").read_text() == table
    assert chat_eval.main(["--stages", *runs, str(home / "stages" / "gone")]) == 2
    assert "gone/eval/chat_eval.json does not exist" in capsys.readouterr().err


def test_reports_are_read_and_help_is_shown_without_torch():
    """In a process of its own, since this one has it."""
    script = "import sys; from eval import chat_eval; print(chat_eval.stage_table([]) and 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], env=MODULES, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_ctrl_c_ends_a_command_with_its_exit_code(home, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(chat_eval, "read_problems", interrupt)
    command = [home / "A", "--task", f"mmlu={home / 'mmlu.jsonl'}", "--out", home / "never"]
    assert chat_eval.main([str(word) for word in command]) == 130
    assert capsys.readouterr().err == "chat_eval.py: interrupted\n" and not (home / "never").exists()


def test_what_is_not_over_all_says_so(home, capsys):
    run(home, "A", "mmlu")
    out = capsys.readouterr().out
    assert "lacks ARC-Easy, ARC-Challenge, GSM8K, HumanEval, SpellingBee, and is not comparable" in out


def test_bad_input_is_one_sentence_and_writes_nothing(home, capsys):
    def data(name, *rows):
        return write_rows(home / f"{name}.jsonl", rows)

    merged = home / "merged letters"
    save(merged, rigged("A"))
    text = (merged / "tokenizer.json").read_text(encoding="utf-8")
    broken = re.sub(r'("Ċ",\s+)"Ċ"', r'\1"A"', text.replace("ĊĊ", "ĊA"))  # a newline before an A merges with it
    (merged / "tokenizer.json").write_text(broken, encoding="utf-8")
    cases = [
        (["mmlu", home / "gone.jsonl"], "gone.jsonl does not exist"),
        (["mmlu", data("empty")], "holds no rows"),
        (["mmlu", home / "gsm8k.jsonl"], "row 1 of .*no field 'choices'"),
        (["gsm8k", home / "mmlu.jsonl"], "row 1 of "),
        (["arc_easy", data("key", {**ARC[0], "answerKey": "E"})], "the answer 'E' is none of its letters"),
        (["mmlu", data("index", {**MMLU[0], "answer": 7})], "row 1 of "),
        (["gsm8k", data("mark", GSM8K[0], {"question": "?", "answer": "7"})], "row 2 of .*no `#### n`"),
        (["humaneval", home / "gsm8k.jsonl"], "no field 'prompt'"),
        (["mmlu", home / "mmlu.jsonl", "--mode", "think"], "no two modes"),
    ]
    for (task, path, *more), expected in cases:
        command = [home / "A", "--task", f"{task}={path}", "--out", home / "never", *more]
        capsys.readouterr()
        assert chat_eval.main([str(word) for word in command]) == 2, expected
        error = capsys.readouterr().err.strip()
        assert "\n" not in error and re.search(expected, error), (expected, error)
    one = f"mmlu={home / 'mmlu.jsonl'}"
    for command, expected in (
        ([merged, "--task", one], "the letter 'A' is not one token of its own"),
        ([home / "gone", "--task", one], "gone does not exist"),
        ([home / "A", "--task", one, one], "names a benchmark twice"),
        ([home / "A"], "pass a run folder and --task"),
        ([home / "A", "--stages", home / "A"], "leave out the run"),
    ):
        assert chat_eval.main([*map(str, command), "--out", str(home / "never")]) == 2, expected
        assert expected in capsys.readouterr().err
    assert not (home / "never").exists()
    for wrong in (["--task", "nothing=x"], ["--task", "mmlu"], ["--rows", "0"]):
        with pytest.raises(SystemExit, match="2"):
            chat_eval.main([str(home / "A"), *wrong])
