"""eval/think_follow.py: think blocks told apart by hand, flags where each template reads them, planted models.

The models are scripted behind the real generation (test_tool_calls.Scripted): they see the prompt's text only, as a
server would send it.

Breaks tried, each seen here: every answer that thinks follows; a failed turn follows; thoughts that the prompt opens
are missed; unfinished is never counted; empty counts the thought, or a call; thoughts stay in the history; the first
turn's flag for all; the same flags for all conversations; the rows' own flags stay; one followed turn is enough for
follow_all; enable_thinking not passed on; a refused history stops the run.
"""

import json
import re
from pathlib import Path

import pytest

from data_prep.common.answer_formats import FORMATS
from data_prep.common.answers import find_family
from eval import think_follow
from eval.common import models
from tests.eval.test_tool_calls import Scripted, counts, last_message, rows_of, scripted, tokenizer_of, write_rows
from tests.helpers.runs import SHARED
from tests.helpers.template_oracle import ALL_FAMILIES

BENCH = SHARED / "data" / "chat" / "mt_bench_question.jsonl"
real = pytest.mark.skipif(not BENCH.is_file(), reason="../shared is absent: MT-Bench's questions")


# -- think blocks --------------------------------------------------------------------------------------


def judged(name, prompt, answer, mode="think"):
    """(length of the thought, what stands in the history, whether the thought is unfinished) as the command has it."""
    talk = think_follow.Talk(think_follow.Conversation("a", "", ["A?"]), 0)
    talk.modes = [mode]
    talk.add_answer(name, models.Prompt(prompt, []), models.Answer(answer, 1, True))
    [line] = talk.lines
    assert line["follow"] == (bool(line["thought"]) == (mode == "think"))
    assert line["empty"] == (talk.answers == [""])
    return line["thought"], talk.answers[0], line["unfinished"]


@pytest.mark.parametrize(
    ("prompt", "answer", "thought", "rest", "unfinished"),
    [
        ("", "Yes.", "", "Yes.", False),
        ("", "", "", "", False),
        ("", "<think>\nhm\n</think>\n\nYes.", "hm", "Yes.", False),
        ("", "<think>\n \n</think>\n\nYes.", "", "Yes.", False),
        ("", "<think></think>Yes.", "", "Yes.", False),
        ("", "<think>\nhm", "hm", "", True),
        ("", "<think>\n", "", "", True),
        ("", "Well <think>hm</think> yes.", "hm", "Well  yes.", False),
        ("", "<think></think>a<think>hm</think>b", "hm", "ab", False),  # the second counts too
        ("", "<think>a</think>b<think>c", "a\n\nc", "", True),  # it went on to think and never came to an answer
        ("", "hm</think>\n\nYes.", "hm", "Yes.", False),  # closed though never opened
        ("", "<think>a</think>b</think>c", "a", "b</think>c", False),  # an end that closes nothing is text
        ("<think>\n", "hm\n</think>\n\nYes.", "hm", "Yes.", False),  # the prompt opens it
        ("<think>\n", "\n</think>\n\nYes.", "", "Yes.", False),
        ("<think>\n", "hm", "hm", "", True),
        ("<think>\n\n</think>\n\n", "Yes.", "", "Yes.", False),  # the prompt holds the empty block
        ("<think>\n\n</think>\n\n", "<think>hm</think>Yes.", "hm", "Yes.", False),  # and the model thinks all the same
        ("gemma4", "<|channel>thought\nhm<channel|>Yes.", "hm", "Yes.", False),
        ("command_a_reasoning", "<|START_THINKING|>hm<|END_THINKING|><|START_RESPONSE|>Yes.", "hm", "Yes.", False),
        ("ministral_3_reasoning", "[THINK]hm[/THINK]Yes.", "hm", "Yes.", False),
        (
            "gpt_oss",
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Yes.",
            "hm",
            "Yes.",
            False,
        ),
    ],
)
def test_what_is_thought_and_what_is_said(prompt, answer, thought, rest, unfinished):
    name = prompt if prompt.isidentifier() else "qwen3"
    prompt = "" if prompt.isidentifier() else prompt
    for mode in ("think", "no_think"):
        assert judged(name, prompt, answer, mode) == (len(thought), rest, unfinished)


def test_a_call_is_an_answer_and_no_part_of_the_history():
    talk = think_follow.Talk(think_follow.Conversation("a", "", ["A?"]), 0)
    answer = '<think>\nhm\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    talk.add_answer("qwen3", models.Prompt("", []), models.Answer(answer, 1, True))
    assert talk.answers == [""] and not talk.lines[0]["empty"] and not talk.lines[0]["unfinished"]


THINKERS = [family for family in ALL_FAMILIES if family.reasoning and family.name != "nanochat"]
ARGUMENTS = {  # what a template is given to write a thought behind its own prompt
    "gemma4": {"enable_thinking": True},
    "chatml": {"keep_thinking": "on"},
    "deepseek_v3_1": {"thinking": True},
}


@pytest.mark.parametrize("family", THINKERS, ids=lambda family: family.name)
def test_thoughts_are_found_as_the_template_writes_them(family):
    """The template is the oracle: reasoning and text that it renders come back, in every family that thinks."""
    tokenizer = tokenizer_of(family.name)
    assert find_family(tokenizer.chat_template) == family.name
    said = {"role": "assistant", "content": "Yes.", "reasoning_content": "because"}
    messages = [{"role": "user", "content": "Hi"}, said]
    kwargs = ARGUMENTS.get(family.name, {})
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False, **kwargs)
    text = tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
    assert text.startswith(prompt) and "because" in text[len(prompt) :]
    assert judged(family.name, prompt, text[len(prompt) :]) == (len("because"), "Yes.", False)
    cut = text[len(prompt) :].partition("because")[0] + "because"
    assert judged(family.name, prompt, cut) == (len("because"), "", True)


# -- where the flag stands -----------------------------------------------------------------------------


def test_the_default_is_what_the_template_reads():
    found = {}
    for family in ALL_FAMILIES:
        found[family.name] = think_follow.find_flag_place(tokenizer_of(family.name), Path("run"))
    assert [name for name, place in found.items() if place == "system"] == ["smollm3"]
    switchable = {"qwen3", "qwen3_5", "qwen3_6", "qwen3_8", "glm4_6", "glm4_7", "gemma4", "nemotron_3", "nemotron_3_5"}
    switchable |= {"step3_qwen3", "deepseek_v3_1"}
    assert {name for name, place in found.items() if place == "kwargs"} == switchable
    assert found["qwen3_instruct_2507"] == found["gemma2"] == "user"


ONE = think_follow.Conversation("a", "Be brief.", ["A?", "B?"])


def asked(name, place, answers=("Yes.",), modes=("think", "no_think"), one=ONE):
    return think_follow.render_turn(tokenizer_of(name), one, list(answers), list(modes), place).text


def test_prompts_by_hand():
    start = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    said = "<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\n"
    end = "<|im_end|>\n<|im_start|>assistant\n"
    assert asked("qwen3", "user") == f"{start}A? /think{said}B? /no_think{end}"
    assert asked("qwen3", "kwargs") == f"{start}A?{said}B?{end}<think>\n\n</think>\n\n"
    assert asked("qwen3", "kwargs", modes=("no_think", "think")) == f"{start}A?{said}B?{end}"
    assert asked("qwen3", "user", answers=()) == f"{start}A? /think{end}"
    system = asked("qwen3", "system", one=think_follow.Conversation("a", "", ONE.turns))
    assert system == f"<|im_start|>system\n/no_think<|im_end|>\n<|im_start|>user\nA?{said}B?{end}"
    for modes, mode in ((("think", "no_think"), "/no_think"), (("no_think", "think"), "/think")):
        prompt = asked("smollm3", "system", modes=modes)  # one flag for the whole conversation, that of the last turn
        assert f"Reasoning Mode: {mode}\n" in prompt and "Be brief." in prompt and "think Be" not in prompt
        assert prompt.endswith("<think>\n\n</think>\n") == (mode == "/no_think")


def test_flags_are_drawn_by_seed_and_conversation_alone():
    many = [think_follow.Conversation(str(number), "", ["x"] * 3) for number in range(2000)]
    first, again, other = ([think_follow.draw_modes(one, seed) for one in many] for seed in (1, 1, 2))
    assert first == again != other
    assert [think_follow.draw_modes(one, 1) for one in many[::-1]] == first[::-1]
    for turn in range(3):
        share = sum(modes[turn] == "think" for modes in first) / len(many)
        assert abs(share - 0.5) < 0.045  # four standard errors
    both = sum(modes[0] == modes[1] for modes in first) / len(many)
    assert abs(both - 0.5) < 0.045


# -- rows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question_id": 81, "category": "writing", "turns": ["A?", "B?"]}, ("81", "", ["A?", "B?"])),
        ({"id": "x", "turns": ["A? /no_think", "/think B?"]}, ("x", "", ["A?", " B?"])),
        (  # Multi-IF's own columns: its `turns` is a place for the history, its last turn may be missing
            {
                "turns": [],
                "responses": [],
                "key": "7:1:en",
                "language": "English",
                "turn_1_prompt": '{"role": "user", "content": "A?"}',
                "turn_1_instruction_id_list": ["x"],
                "turn_2_prompt": '{"role": "user", "content": "B?"}',
                "turn_3_prompt": "None",
            },
            ("7:1:en", "", ["A?", "B?"]),
        ),
        (
            {
                "id": "m",
                "messages": [
                    {"role": "system", "content": "S /think"},
                    {"role": "user", "content": "A?"},
                    {"role": "assistant", "content": "a"},
                    {"role": "user", "content": "B?"},
                ],
            },
            ("m", "S", ["A?", "B?"]),
        ),
        ({"messages": [{"role": "user", "content": "A?"}]}, ("5", "", ["A?"])),
    ],
)
def test_rows_of_three_shapes(row, expected):
    assert think_follow.read_conversation(row, 5) == think_follow.Conversation(*expected)


# -- planted models ------------------------------------------------------------------------------------


def think(prompt, text="Yes."):
    """An answer that thinks, whatever the prompt has opened or closed."""
    return ("" if prompt.endswith("<think>\n") else "<think>\n") + f"hm\n</think>\n\n{text}"


def heeds(prompt, otherwise="No."):
    return otherwise if told(prompt) == "no_think" else think(prompt)


PLANTED = {  # a model, whether it follows (think turn, no_think turn), and shares of unfinished, empty, stopped
    "follows": (heeds, (1, 1), (0, 0, 1)),
    "follows with empty blocks": (lambda prompt: heeds(prompt, "<think>\n\n</think>\n\nNo."), (1, 1), (0, 0, 1)),
    "does the opposite": (lambda prompt: "No." if told(prompt) == "think" else think(prompt), (0, 0), (0, 0, 1)),
    "always thinks": (think, (1, 0), (0, 0, 1)),
    "never thinks": (lambda prompt: "Yes.", (0, 1), (0, 0, 1)),
    "always an empty block": (lambda prompt: "<think>\n\n</think>\n\nYes.", (0, 1), (0, 0, 1)),
    "says nothing": (lambda prompt: "", (0, 1), (0, 1, 1)),
    "never comes to an answer": (lambda prompt: "<think>\n" + "hm " * 500, (1, 0), (1, 1, 0)),
    "thinks nothing for ever": (lambda prompt: "<think>" + "\n " * 500, (0, 1), (1, 1, 0)),
}


def told(prompt):
    """The mode that a prompt asks for by its text."""
    return re.findall(r"/(no_think|think)\b", last_message(prompt))[-1]


@pytest.fixture
def data(tmp_path):
    """20 conversations of two turns, 10 of three."""
    rows = [{"question_id": number, "turns": ["A?", "B?", "C?"][: 2 + number % 3 // 2]} for number in range(30)]
    return write_rows(tmp_path / "questions.jsonl", rows)


def run(tmp_path, data, *more):
    command = [tmp_path / "m", "--data", data, "--out", tmp_path / "out", "--max_new_tokens", 300, *more]
    assert think_follow.main([str(word) for word in command]) == 0
    lines = rows_of(tmp_path / "out" / "think_follow.jsonl")
    return json.loads((tmp_path / "out" / "think_follow.json").read_text()), lines


@pytest.mark.parametrize("planted", PLANTED)
def test_planted_models(tmp_path, data, monkeypatch, planted):
    say, follows, shares = PLANTED[planted]
    scripted(monkeypatch, think_follow, "qwen3", say)
    report, lines = run(tmp_path, data, "--flag_in", "user")
    turns = {mode: sum(line["mode"] == mode for line in lines) for mode in ("think", "no_think")}
    assert len(lines) == 70 == sum(turns.values()) and min(turns.values()) > 20
    modes = {mode: counts(found)["follow"] for mode, found in report["groups"]["mode"].items()}
    expected = dict(zip(("think", "no_think"), follows, strict=True))
    assert modes == {mode: (expected[mode] * count, count) for mode, count in turns.items()}
    found = counts(report["metrics"])
    assert found["follow"] == (sum(expected[mode] * count for mode, count in turns.items()), 70)
    assert [found[name] for name in ("unfinished", "empty", "stop_rate")] == [(share * 70, 70) for share in shares]
    wholes = [{line["mode"] for line in lines if line["id"] == str(number)} for number in range(30)]
    assert found["follow_all"] == (sum(all(expected[mode] for mode in whole) for whole in wholes), 30)
    assert {turn: one["follow"]["total"] for turn, one in report["groups"]["turn"].items()} == {
        "1": 30,
        "2": 30,
        "3": 10,
    }
    assert [line["turn"] for line in lines[:5]] == [1, 2, 1, 2, 1]


SWITCHES = ["qwen3", "qwen3_5", "qwen3_6", "qwen3_8", "glm4_6", "glm4_7", "gemma4", "nemotron_3", "nemotron_3_5"]
SWITCHES += ["step3_qwen3", "deepseek_v3_1", "smollm3"]


@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch_is_followed_by_what_its_template_writes(tmp_path, monkeypatch, name):
    """The model writes what the template writes for a message with reasoning, or without, behind each prompt."""
    tokenizer = tokenizer_of(name)
    user = {"role": "user", "content": "A?"}
    answers = {}
    for thinks, said in ((True, {"content": "Yes.", "reasoning_content": "because"}), (False, {"content": "No."})):
        both = [user, {"role": "assistant", **said}]
        prompt = tokenizer.apply_chat_template(
            both[:1], add_generation_prompt=True, tokenize=False, enable_thinking=thinks
        )
        text = tokenizer.apply_chat_template(both, tokenize=False, enable_thinking=thinks)
        assert text.startswith(prompt)
        answers[prompt] = text[len(prompt) :]
    assert len(answers) == 2
    stop = next(token for token in FORMATS[name].stops if token in tokenizer.get_vocab())
    data = write_rows(tmp_path / "a.jsonl", [{"question_id": number, "turns": ["A?"]} for number in range(20)])
    for obeys in (True, False):
        told = answers if obeys else dict(zip(answers, reversed(answers.values()), strict=True))
        model = Scripted(tokenizer, lambda prompt, told=told: told[prompt].partition(stop)[0])
        opened = models.OpenedModel(model, tokenizer, {tokenizer.convert_tokens_to_ids(stop)})
        monkeypatch.setattr(think_follow, "open_model", lambda *_, opened=opened: opened)
        report, lines = run(tmp_path, data, "--flag_in", "kwargs")
        assert {line["mode"] for line in lines} == {"think", "no_think"}
        if obeys:
            assert counts(report["metrics"])["follow"] == (20, 20) and counts(report["metrics"])["empty"] == (0, 20)
        elif "<think>" not in "".join(answers):  # else what is swapped stands behind a thought that the prompt opens
            assert counts(report["metrics"])["follow"] == (0, 20)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_instruct_2507"])  # which strips thoughts itself, and which does not
def test_own_answers_are_the_history_without_their_thoughts(tmp_path, data, monkeypatch, name):
    prompts = []

    def say(prompt):
        prompts.append(prompt)
        return think(prompt, text=f"It is {len(prompts)}.")

    scripted(monkeypatch, think_follow, name, say)
    _, lines = run(tmp_path, data, "--flag_in", "user")
    second = [prompt for prompt in prompts if last_message(prompt).startswith("B?")]
    assert len(prompts) == 70 and len(second) == 30
    for prompt in second:
        [answer] = re.findall(r"<\|im_start\|>assistant\n(.*?)<\|im_end\|>", prompt, re.DOTALL)
        assert re.fullmatch(r"It is \d+\.", answer)
    assert len({re.search(r"It is \d+", prompt)[0] for prompt in second}) == 30  # each its own


def test_kwargs_leave_the_empty_block_to_the_prompt(tmp_path, data, monkeypatch):
    scripted(monkeypatch, think_follow, "qwen3", lambda prompt: "Yes.")
    report, _ = run(tmp_path, data)
    assert report["settings"]["flag_in"] == "kwargs"
    assert [found["follow"]["value"] for found in report["groups"]["mode"].values()] == [1.0, 0.0]  # no_think, think
    scripted(monkeypatch, think_follow, "qwen3", think)  # thinks behind the closed block
    report, _ = run(tmp_path, data)
    assert [found["follow"]["value"] for found in report["groups"]["mode"].values()] == [0.0, 1.0]


def test_the_flag_of_the_system_message_is_that_of_the_turn(tmp_path, data, monkeypatch):
    def say(prompt):
        return "No." if "Reasoning Mode: /no_think" in prompt else think(prompt)

    scripted(monkeypatch, think_follow, "smollm3", say)
    report, _ = run(tmp_path, data)
    assert report["settings"]["flag_in"] == "system" and counts(report["metrics"])["follow"] == (70, 70)


def test_a_turn_beyond_the_context_is_not_followed(tmp_path, data, monkeypatch):
    scripted(monkeypatch, think_follow, "qwen3", lambda prompt: "Yes.", context=5)
    report, lines = run(tmp_path, data, "--flag_in", "user")
    assert counts(report["metrics"])["follow"] == (0, 70)
    assert {line["failed"] for line in lines} == {"longer than the context"}


def test_an_answer_that_the_template_refuses_costs_its_conversation_only(tmp_path, data, monkeypatch):
    """A server would refuse the history too: the turns behind it failed, the others are asked."""
    tokenizer = scripted(monkeypatch, think_follow, "qwen3", lambda prompt: f"It is {len(prompt) % 2}.")
    refuse = (
        "{%- for m in messages if m.role == 'assistant' and '1' in m.content %}{{ raise_exception('x') }}{%- endfor %}"
    )
    tokenizer.chat_template = refuse + tokenizer.chat_template
    _, lines = run(tmp_path, data, "--flag_in", "user")
    assert not any(line["failed"] for line in lines if line["turn"] == 1) and len(lines) == 70
    first = {line["id"]: line["answer"] for line in lines if line["turn"] == 1}
    failed = {line["id"] for line in lines if line["turn"] == 2 and line["failed"] == "refused by the template"}
    assert failed == {name for name, answer in first.items() if "1" in answer} and 5 < len(failed) < 25
    assert not any(line["follow"] for line in lines if line["failed"])


@real
def test_mt_bench_and_the_same_bytes_twice(tmp_path, monkeypatch, capsys):
    scripted(monkeypatch, think_follow, "qwen3", heeds)
    saved = []
    for size in (16, 16, 5):
        report, lines = run(tmp_path, BENCH, "--flag_in", "user", "--batch_size", size)
        saved.append((tmp_path / "out" / "think_follow.jsonl").read_bytes())
    assert "the flag stood in: user" in capsys.readouterr().out
    assert saved[0] == saved[1] == saved[2] and len(lines) == 160
    assert counts(report["metrics"])["follow"] == (160, 160) and counts(report["metrics"])["follow_all"] == (80, 80)
    modes = {(line["id"], line["turn"]): line["mode"] for line in lines}
    _, fewer = run(tmp_path, BENCH, "--flag_in", "user", "--rows", 10)
    assert len(fewer) == 20 and all(modes[line["id"], line["turn"]] == line["mode"] for line in fewer)


def test_bad_input_is_one_sentence_and_writes_nothing(tmp_path, data, monkeypatch, capsys):
    cases = [
        ("qwen3", [tmp_path / "gone.jsonl"], "gone.jsonl does not exist"),
        ("qwen3", [write_rows(tmp_path / "a.jsonl", [])], "holds no rows"),
        (
            "qwen3",
            [write_rows(tmp_path / "b.jsonl", [{"id": "q", "text": "x"}])],
            "row 1 .q. of the data has no messages",
        ),
        (
            "qwen3",
            [write_rows(tmp_path / "c.jsonl", [{"turns": ["A?", ""]}])],
            "row 1 of the data has no turns, or one",
        ),
        ("qwen3", [write_rows(tmp_path / "d.jsonl", [{"turns": []}])], "row 1 of the data has no turns"),
        ("qwen3", [write_rows(tmp_path / "e.jsonl", ["x"])], "row 1 of the data is not an object"),
        ("qwen3", [write_rows(tmp_path / "f.jsonl", [{"turn_1_prompt": "A?"}])], "row 1 .* is no message in JSON"),
        ("gemma2", [data, "--flag_in", "system"], "template refuses conversation 0 .*--flag_in"),
    ]
    for name, words, expected in cases:
        scripted(monkeypatch, think_follow, name, lambda prompt: "No.")
        capsys.readouterr()
        command = [tmp_path, "--data", *words, "--out", tmp_path / "never"]
        assert think_follow.main([str(word) for word in command]) == 2
        [line] = capsys.readouterr().err.strip().splitlines()
        assert re.search(expected, line), (expected, line)
        assert not (tmp_path / "never").exists()
