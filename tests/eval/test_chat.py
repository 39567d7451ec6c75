"""eval/chat.py with models that say known words, in this process and in a real terminal (tmux).

The models are test_compare.rigged and test_merge.speaker: a base that answers "ab", adapters that answer "cd" and "ef",
one that never stops. What a model was asked is read from the rendered prompt (/raw, --out).

Breaks tried, each of which turned a test red. Conversation: /reset that loses the system prompt, /system that keeps the
turns, /think TEXT that stays, a refused turn that stays, /save that overwrites or has another mode key, an empty line
as a turn, an unknown adapter taken. Models: an adapter not switched, or under the first one's template; the base with
an adapter on; --base, --dtype, --load_in_4bit not passed on; different bases or vocabularies taken; two folders of one
name. Prompts: --system, tools, think or the seed of each not heeded; Ctrl-C goes on; a refusal ends all; the file read
after the model. Answers: stop tokens of the tokenizer alone, --top_p ignored or alone resetting the temperature, the
think block that a prompt opens lost, any error taken for memory, what was held back not shown. Reading: the prompt not
given to the parser; control tokens kept in a message; a call dropped from it; tools of prompts unread.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from transformers.generation import utils as generation

import tests.eval.test_compare as small
from data_prep.common.errors import UsageError
from eval import chat
from tests.eval.test_compare import make_tokenizer, rigged, write_rows
from tests.eval.test_merge import speaker
from tests.helpers.runs import REPO


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """rigged: "ab"; cd, ef: adapters on it; qwen3: "ab" where the template switches thinking; endless: "ab b b b …"."""
    home = tmp_path_factory.mktemp("chat home")
    small.save(home / "rigged", rigged("ab"))
    a, b, space = make_tokenizer("chatml")("ab ")["input_ids"]
    switched, endless = rigged("ab"), rigged("ab", stops=False)
    with torch.no_grad():
        switched.lm_head.weight[a, 256] = 1.0  # after the empty think block too, which ends in two newlines
        endless.lm_head.weight[:, [b, space]] = 0.0
        endless.lm_head.weight[space, b] = endless.lm_head.weight[b, space] = 1.0
    small.save(home / "qwen3", switched, "qwen3")
    small.save(home / "endless", endless)
    speaker(home / "cd", home / "rigged", "cd")
    speaker(home / "ef", home / "rigged", "ef")
    return home


def opened(*words):
    args = chat.parse_args([*map(str, words), "--max_new_tokens", "16"])
    talker = chat.Talker(args)
    return chat.Chat(talker, args.system, args.raw)


def said(chat_, capsys, *lines):
    """What each line prints."""
    capsys.readouterr()
    out = []
    for line in lines:
        chat_.read_line(line)
        out.append(capsys.readouterr().out.strip())
    return out


def test_a_conversation_and_its_commands(home, tmp_path, capsys):
    it = opened(home / "rigged")
    assert said(it, capsys, "/raw", "Hello", "", "Again") == ["nothing was said yet", "ab", "", "ab"]
    user, assistant = "<|im_start|>user\n{}<|im_end|>\n", "<|im_start|>assistant\nab<|im_end|>"
    whole = user.format("Hello") + assistant + "\n" + user.format("Again") + assistant
    assert said(it, capsys, "/raw") == [whole]
    path = tmp_path / "kept.jsonl"
    assert said(it, capsys, f"/save {path}", "/reset", f"/save {path}", "/save") == [
        f"added 4 messages to {path}",
        "a new conversation",
        "nothing to save yet",
        "/save needs a FILE",
    ]
    turn = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "ab"}]
    again = [{"role": "user", "content": "Again"}, {"role": "assistant", "content": "ab"}]
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"id": "chat with rigged", "messages": turn + again}
    ]
    assert said(it, capsys, "/system Be brief.", "Hello")[0] == "system prompt: Be brief.; a new conversation"
    assert it.last.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>")
    assert said(it, capsys, "Again", "/reset", "Anew")[1:] == ["a new conversation", "ab"]  # the system prompt stays
    assert it.last == "<|im_start|>system\nBe brief.<|im_end|>\n" + user.format("Anew") + assistant
    assert said(it, capsys, f"/save {path}") == [f"added 3 messages to {path}"]  # below what is there
    assert [len(json.loads(line)["messages"]) for line in path.read_text().splitlines()] == [4, 3]
    assert said(it, capsys, "/system", "Hello") and "Be brief" not in it.last
    assert said(it, capsys, "/thinks") == ["unknown command /thinks: /help lists them"]
    assert "cannot write /" in said(it, capsys, "/save /")[0]
    listed = said(it, capsys, "/help")[0]
    assert all(name in listed for name in chat.COMMANDS)
    assert said(it, capsys, "/adapter", "/adapter x")[1] == "no adapter x: there is rigged"


def test_thinking_goes_through_the_template(home, tmp_path, capsys):
    it, empty = opened(home / "qwen3"), "<think>\n\n</think>\n\n"
    said(it, capsys, "one")
    assert empty not in it.last
    said(it, capsys, "/no_think two")
    assert it.last.endswith(f"two<|im_end|>\n<|im_start|>assistant\n{empty}ab<|im_end|>")
    said(it, capsys, "three")  # that turn only
    assert not it.last.partition("three")[2].count(empty)
    assert said(it, capsys, "/no_think", "four")[0] == "does not think from now on"
    assert said(it, capsys, "five") and empty in it.last.partition("five")[2]
    said(it, capsys, f"/save {tmp_path / 'row'}", "/think", "six")
    assert json.loads((tmp_path / "row").read_text())["chat_template_kwargs"] == {"enable_thinking": False}
    assert empty not in it.last.partition("six")[2]
    plain = opened(home / "rigged")
    assert (
        said(plain, capsys, "/think", "/no_think x")
        == ["this chat template knows no thinking: leave /think and /no_think out"] * 2
    )
    assert plain.messages == []
    # a template that reads the words in the system message
    plain.talker.tokenizer.chat_template += "{# /no_think #}"
    assert plain.talker.switch_thinking([{"role": "user", "content": "x"}], False) == (
        [{"role": "system", "content": "/no_think"}, {"role": "user", "content": "x"}],
        {},
    )
    told = [{"role": "system", "content": "S"}, {"role": "user", "content": "x"}]
    assert plain.talker.switch_thinking(told, True) == ([{"role": "system", "content": "S /think"}, told[1]], {})


@pytest.mark.parametrize(
    ("family", "prompt", "text", "content", "reasoning"),
    [
        ("qwen3", "", "<think>\nhm\n</think>\n\nYes.", "Yes.", "hm"),
        ("qwen3", "", "<think>\n\n</think>\n\nYes.", "Yes.", None),
        ("qwen3", "", "<think>\nnot done", "", "not done"),
        ("qwen3", "<think>\n", "hm\n</think>\n\nYes.", "Yes.", "hm"),
        ("qwen3", "", "Yes.<|fim_pad|>", "Yes.", None),  # a control token is no part of a message
        (
            "gpt_oss",
            "",
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Yes.",
            "Yes.",
            "hm",
        ),
        ("ministral_3_reasoning", "", "[THINK]hm[/THINK]Yes.", "Yes.", "hm"),
        ("gemma4", "", "<|channel>thought\nhm<channel|>Yes.", "Yes.", "hm"),
    ],
)
def test_reasoning_is_kept_apart(family, prompt, text, content, reasoning):
    expected = {"role": "assistant", "content": content}
    if reasoning:
        expected["reasoning_content"] = reasoning
    assert chat.to_message(text, family, prompt, special=("<|fim_pad|>",)) == expected


def test_a_call_is_kept_as_a_call(home, capsys, tmp_path):
    """Shown as it was written; in the history and in a saved row it is a call, which the template writes again."""
    written = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    function = {"name": "f", "arguments": {"x": 1}}
    message = {"role": "assistant", "content": "So.", "tool_calls": [{"type": "function", "function": function}]}
    assert chat.to_message(f"So.\n{written}", "chatml", "") == message
    assert chat.to_message(written[:30], "chatml", "") == {"role": "assistant", "content": written[:30]}
    it = opened(home / "rigged")
    it.messages = [{"role": "user", "content": "Hello"}, message]
    assert said(it, capsys, "Again") == ["ab"]
    assert f"assistant\nSo.\n{written}<|im_end|>" in it.last
    said(it, capsys, f"/save {tmp_path / 'row'}")
    assert json.loads((tmp_path / "row").read_text())["messages"][1] == message


def test_adapters_switch_on_one_base(home, capsys):
    it = opened(home / "cd", home / "ef")
    lines = ["x", "/adapter ef", "x", "/adapter base", "x", "/adapter cd", "x", "/adapter"]
    assert said(it, capsys, *lines)[::2] == ["cd", "ef", "ab", "cd"]
    assert said(it, capsys, "/adapter")[0] == "answers with cd (of cd, ef, base)"


def altered(folder, out, **values):
    """A copy of an adapter's folder with other values in its files: {file: {key: value}}."""
    shutil.copytree(folder, out)
    for name, more in values.items():
        path = out / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
    return out


def test_each_adapter_has_its_own_template_and_name(home, tmp_path, capsys):
    other = altered(home / "ef", tmp_path / "cd")  # a second folder of that name
    (other / "chat_template.jinja").write_text("OTHER {{ messages[-1].content ~ '\\n' }}")
    it = opened(home / "cd", other)
    assert said(it, capsys, "x", "/adapter")[1] == f"answers with cd (of cd, {other}, base)"
    assert it.last.startswith("<|im_start|>user")
    it.reset()
    assert said(it, capsys, f"/adapter {other}", "x")[1] == "ef" and it.last == "OTHER x\nef<|im_end|>"
    it.reset()
    assert said(it, capsys, "/adapter cd", "x")[1] == "cd" and it.last.startswith("<|im_start|>user")


def test_the_base_may_be_told(home, tmp_path, capsys):
    moved = altered(home / "cd", tmp_path / "moved", adapter_config={"base_model_name_or_path": str(tmp_path / "gone")})
    it = opened(moved, home / "ef", "--base", home / "rigged", "--dtype", "bfloat16")
    assert said(it, capsys, "x", "/adapter ef", "x")[::2] == ["cd", "ef"] and it.talker.model.dtype == torch.bfloat16
    assert opened(home / "rigged").talker.model.dtype == torch.float32
    assert opened(home / "rigged", "--load_in_4bit").talker.model.is_loaded_in_4bit
    with pytest.raises(UsageError, match="name different bases: pass --base"):
        opened(home / "cd", moved)
    tokenizer = json.loads((home / "ef" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["e"], vocabulary["f"] = vocabulary["f"], vocabulary["e"]
    swapped = altered(home / "ef", tmp_path / "swapped", tokenizer=tokenizer)
    with pytest.raises(UsageError, match="2 tokens have another id"):
        opened(home / "cd", swapped)


def test_stop_tokens_of_the_generation_config_count(home, tmp_path, capsys):
    model = rigged("ab")
    model.generation_config.eos_token_id = make_tokenizer("chatml")("b")["input_ids"]
    it = opened(small.save(tmp_path / "stops at b", model))
    assert said(it, capsys, "x") == ["ab"]  # the screen shows what came
    assert it.messages[-1]["content"] == "a" and it.last.endswith("assistant\nab")


def test_a_think_block_that_the_prompt_opens_is_shown_and_kept_apart(tmp_path, capsys):
    it = opened(small.save(tmp_path / "thinks", rigged("a</think>b"), "qwen3_thinking_2507"))
    assert said(it, capsys, "x") == ["<think>\na</think>b"] and it.last.count("<think>") == 1
    assert it.messages[-1] == {"role": "assistant", "content": "b", "reasoning_content": "a"}
    it = opened(small.save(tmp_path / "never ends", rigged("ab"), "qwen3_thinking_2507"))
    assert said(it, capsys, "x") == ["<think>\nab"]
    assert it.messages[-1] == {"role": "assistant", "content": "", "reasoning_content": "ab"}  # no answer


def test_an_answer_that_does_not_end_says_so(home, capsys):
    it = opened(home / "endless")
    assert said(it, capsys, "x") == ["a" + "b " * 7 + "b\n[not ended by itself: 16 tokens, --max_new_tokens]"]


def test_a_template_that_refuses_takes_the_turn_back(home, capsys):
    it = opened(home / "rigged")
    it.talker.tokenizer.chat_template = "{{ raise_exception('no ' ~ messages[0].content) }}"
    assert said(it, capsys, "x") == ["the chat template refuses this (no x)"]
    assert it.messages == []


def test_out_of_memory_and_ctrl_c_cost_the_answer_only(home, capsys, monkeypatch):
    it = opened(home / "rigged")
    real, held = it.talker.model.generate, it.talker.tokenizer.decode([66])
    for error, words in (
        (MemoryError(), "out of memory"),
        (RuntimeError("out of memory"), "out of memory"),
        (KeyboardInterrupt(), "stopped"),
    ):

        def fails(error=error, streamer=None, **_):
            streamer.put(torch.tensor([[1, 2]]))  # the prompt
            streamer.put(torch.tensor([66]))
            raise error

        monkeypatch.setattr(it.talker.model, "generate", fails)
        assert said(it, capsys, "x") == [
            f"{held}\n[{words} after 1 tokens]"
        ]  # what was held back until a word is whole

    def wrong(**_):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(it.talker.model, "generate", wrong)
    with pytest.raises(RuntimeError, match="shapes differ"):  # a defect is no lack of memory
        it.read_line("x")
    it.reset()
    monkeypatch.setattr(it.talker.model, "generate", real)
    assert said(it, capsys, "x") == ["ab"]


def test_ctrl_c_ends_the_prepared_prompts_and_keeps_what_was_said(home, tmp_path, monkeypatch):
    path = tmp_path / "three.yaml"
    path.write_text(json.dumps([{"name": name, "turns": ["x", "y"]} for name in "pqr"]))
    talker = chat.Talker(args := chat.parse_args([str(home / "rigged"), "--prompts", str(path)]))
    real, calls = talker.model.generate, []

    def generate(**named):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(**named)

    monkeypatch.setattr(talker.model, "generate", generate)
    lines = chat.run_prompts(talker, args)
    assert [(line["name"], line["turn"], line["answer"], line["failed"]) for line in lines] == [
        ("p", 1, "ab", ""),
        ("p", 2, "ab", ""),
        ("q", 1, "ab", ""),
        ("q", 2, "", "stopped"),
    ]


def flat(home, folder, **sampling):
    """The rigged model with every next token about as likely as any other, so that sampling shows."""
    model = rigged("ab")
    model.generation_config.update(**sampling)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.05)
    return small.save(home / folder, model)


def test_the_models_own_max_length_says_nothing(home, tmp_path, monkeypatch, capsys):
    seen = []
    for name in ("warning", "warning_once"):
        monkeypatch.setattr(generation.logger, name, lambda text, *_: seen.append(text))
    model = rigged("ab")
    model.generation_config.max_length = 20
    assert said(opened(small.save(tmp_path / "short", model)), capsys, "x" * 40) == ["ab"]
    moved = altered(home / "cd", tmp_path / "cd", adapter_config={"base_model_name_or_path": str(tmp_path / "short")})
    assert said(opened(moved), capsys, "x" * 40) == ["cd"] and seen == []


def test_sampling_is_by_seed_and_temperature_0_is_greedy(home, tmp_path, capsys):
    folder = flat(tmp_path, "flat")

    def answers(*flags):
        path = write_rows(tmp_path / "two.yaml", [])
        path.write_text(json.dumps([{"name": name, "turns": ["x"]} for name in "pq"]))
        words = [folder, "--prompts", path, "--out", tmp_path / "o.jsonl", "--max_new_tokens", 12, *flags]
        assert chat.main([str(word) for word in words]) == 0
        return [json.loads(line)["raw"] for line in (tmp_path / "o.jsonl").read_text().splitlines()]

    one = answers("--temperature", 1, "--seed", 1)
    assert one == answers("--temperature", 1, "--seed", 1) != answers("--temperature", 1, "--seed", 2)
    assert one[0] == one[1]  # each prompt starts anew
    assert answers("--temperature", 0, "--seed", 1) == answers() == ["ab<|im_end|>"] * 2  # the model's own: greedy
    assert answers("--temperature", 1, "--top_p", 1e-6) == ["ab<|im_end|>"] * 2
    folder = flat(tmp_path, "cold", do_sample=True, temperature=1e-3)
    assert answers() == answers("--top_p", 1) == ["ab<|im_end|>"] * 2  # one flag leaves the other setting as it is
    assert answers("--temperature", 1) != answers()


def test_prepared_prompts(home, tmp_path, capsys):
    """All of vibe.yaml; markdown with special tokens, JSON lines without loss."""
    prompts = chat.read_prompts(REPO / "eval" / "vibe.yaml")
    names = {prompt["name"] for prompt in prompts}
    assert names >= {"persona", "pirate", "greeting", "math", "code", "multilingual", "tools"}
    words = [str(home / "qwen3"), "--prompts", str(REPO / "eval" / "vibe.yaml"), "--max_new_tokens", "4"]
    assert chat.main([*words, "--raw", "--out", str(tmp_path / "v.md")]) == 0
    printed = capsys.readouterr().out
    assert "## pirate" in printed and "ab<|im_end|>" in printed
    text = (tmp_path / "v.md").read_text(encoding="utf-8")
    assert text.count("ab<|im_end|>\n````") == sum(len(prompt["turns"]) for prompt in prompts)
    assert '<tools>\n{"type": "function", "function": {"name": "get_weather"' in text
    assert chat.main([*words, "--out", str(tmp_path / "v.jsonl")]) == 0
    assert "<|im_end|>" not in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {line["answer"] for line in lines} == {"ab"} and all(line["stopped"] for line in lines)
    pirate = next(line for line in lines if line["name"] == "pirate")
    assert pirate["prompt"].startswith("<|im_start|>system\nYou are a pirate.")
    no_think = next(line for line in lines if line["name"] == "no_think")
    assert no_think["prompt"].endswith("<think>\n\n</think>\n\n")
    second = next(line for line in lines if line["name"] == "persona" and line["turn"] == 2)
    assert "<|im_start|>assistant\nab<|im_end|>" in second["prompt"]  # after the model's own answer
    # a model without thinking leaves those two out, and says why
    assert chat.main([str(home / "rigged"), *words[1:], "--out", str(tmp_path / "w.jsonl")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "w.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {line["name"] for line in lines if "knows no thinking" in line["failed"]} == {"think", "no_think"}


def test_a_system_prompt_of_the_command_holds_where_a_prompt_has_none(home, tmp_path):
    path = tmp_path / "two.yaml"
    path.write_text(json.dumps([{"turns": ["x"]}, {"turns": ["x"], "system": "Own."}]))
    words = [home / "rigged", "--prompts", path, "--system", "Given.", "--out", tmp_path / "o.jsonl"]
    assert chat.main([str(word) for word in words]) == 0
    lines = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [line["prompt"].partition("<|im_end|>")[0] for line in lines] == [
        "<|im_start|>system\nGiven.",
        "<|im_start|>system\nOwn.",
    ]


def test_bad_input_is_one_sentence(home, tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("- {name: x, turn: [y]}")
    (tmp_path / "b.yaml").write_text("- [")
    (tmp_path / "d.yaml").write_text("- {name: x, turns: [y], tools: [{parameters: {}}]}")
    good = home / "rigged"
    for words, expected in (
        ([tmp_path / "gone"], "gone does not exist"),
        ([tmp_path / "gone", "--prompts", tmp_path / "d.yaml"], "d.yaml, prompt 1 has tool without a name: repair it"),
        ([good, home / "cd"], "rigged is not an adapter"),
        ([home / "cd", good], "rigged is not an adapter"),
        ([good, "--prompts", tmp_path / "a.yaml"], "a.yaml, prompt 1 is not"),
        ([good, "--prompts", tmp_path / "b.yaml"], "b.yaml is not a readable YAML"),
        ([tmp_path / "gone", "--prompts", tmp_path / "b.yaml"], "b.yaml is not"),  # before a model is loaded
        ([good, "--prompts", tmp_path / "c.yaml"], "c.yaml is not a readable YAML"),
        ([good, "--out", "x.md"], "--out goes with --prompts"),
    ):
        capsys.readouterr()
        assert chat.main([str(word) for word in words]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert expected in lines[-1], (words, lines)


# -- a real terminal ---------------------------------------------------------------------------------------------------


class Terminal:
    """A command in a tmux of its own."""

    def __init__(self, folder, command):
        self.tmux = ["tmux", "-S", str(folder / "tmux"), "-f", "/dev/null"]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TERM": "xterm", "PYTHONWARNINGS": "ignore"}
        subprocess.run(
            [*self.tmux, "new-session", "-d", "-x", "200", "-y", "50", *command],
            check=True,
            env=environment,
            cwd=folder,
        )

    def keys(self, *keys):
        subprocess.run([*self.tmux, "send-keys", *keys], check=True)

    def type(self, line):
        subprocess.run([*self.tmux, "send-keys", "-l", line], check=True)
        self.keys("Enter")

    def screen(self):
        done = subprocess.run([*self.tmux, "capture-pane", "-p", "-J", "-S", "-"], capture_output=True, text=True)
        return done.stdout

    def wait(self, pattern, seconds=120):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := re.search(pattern, self.screen(), re.S):
                return found
            time.sleep(0.1)
        raise AssertionError(f"{pattern!r} never came:\n{self.screen()}")

    def alive(self):
        return subprocess.run([*self.tmux, "has-session"], capture_output=True).returncode == 0

    def close(self):
        subprocess.run([*self.tmux, "kill-server"], capture_output=True)


@pytest.mark.skipif(not shutil.which("tmux"), reason="tmux is not installed: apt-get install tmux")
def test_in_a_terminal(home, tmp_path):
    """Streams, stops at Ctrl-C and goes on, knows its commands, ends at Ctrl-D."""
    command = [
        "env",
        f"PYTHONPATH={REPO}",
        sys.executable,
        "-m",
        "eval.chat",
        home / "endless",
        "--max_new_tokens",
        "5000",
    ]
    terminal = Terminal(tmp_path, [str(word) for word in command])
    try:
        terminal.wait(r"endless: /help lists the commands.*\n> ")
        terminal.type("Hello")
        first = len(terminal.wait(r"\n(a(b ){10,})")[1])
        later = len(terminal.wait(rf"\n(a(b ){{{first // 2 + 10},}})")[1])  # more of the same answer, which is not done
        assert later > first and "[" not in terminal.screen().rpartition("> Hello")[2]
        terminal.keys("C-c")
        tokens = int(terminal.wait(r"\[stopped after (\d+) tokens\]\s*\n> ")[1])
        assert later <= tokens < 5000
        terminal.keys("C-c")
        terminal.wait(r"Ctrl-D ends\s*\n> $|Ctrl-D ends\s*\n>\s*$")
        terminal.type("/save kept.jsonl")
        terminal.wait("added 2 messages to kept.jsonl")
        row = json.loads((tmp_path / "kept.jsonl").read_text())
        assert row["messages"] == [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": ("a" + "b " * 5000)[:tokens].strip()},
        ]
        terminal.type("/think")
        terminal.wait("knows no thinking")
        terminal.type("/reset")
        terminal.wait(r"a new conversation\s*\n> ")
        terminal.type("/save more.jsonl")
        terminal.wait("nothing to save yet")
        assert terminal.alive()
        terminal.keys("C-d")
        end = time.monotonic() + 60
        while terminal.alive() and time.monotonic() < end:
            time.sleep(0.1)
        assert not terminal.alive()
    finally:
        terminal.close()
