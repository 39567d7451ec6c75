"""data_prep/filter.py: each rule at its edges with values worked by hand, Blossom's agreement rules case by case, pairs
as TRL reads them, and what the rules do to real chats where they are.

Each of these turns the suite red (tried): n-grams counted from the second time on; Chinese 10-grams of single
characters; code fences not cut; refusals found anywhere in an answer, in a question or only at its very start;
min_chars asked of tool calls; turns that count the system's; C's answer preferred to the reference; the last number
taken before the marked one; numbers compared as text; the verdict ignored, or taken over the numbers; the winner read
through the roles; ties kept; the loser chosen; messages left in a pair.
"""

import json
from functools import partial
from unittest import mock

import pytest

from data_prep import filter
from data_prep.common import text_files
from tests.helpers.runs import REPO, SHARED, run_script

real = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="../shared is absent: small fixtures prove the same")


run = partial(run_script, filter)


def row(row_id, *said, **more):
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]
    return {"id": row_id, "messages": turns, **more}


def write(path, rows):
    text = (one if isinstance(one, str) else json.dumps(one) for one in rows)
    path.write_text("".join(line + "\n" for line in text), encoding="utf-8")
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def filtered(tmp_path, rows, *flags):
    """({id: row} that stay, {id: (reason, detail)} of the others)"""
    out, number = tmp_path / "out.jsonl", 0
    while out.exists():
        number += 1
        out = tmp_path / f"out{number}.jsonl"
    done = run(write(tmp_path / "rows.jsonl", [*rows, OTHER]), "--out", out, *flags)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.with_suffix(".report.json").read_text())
    kept, rejected = lines(out), lines(out.with_suffix(".rejected.jsonl"))
    assert report["in"] == len(rows) + 1 == len(kept) + len(rejected)
    left = {one["id"]: one for one in kept if one["id"] != "other"}
    return left, {one["id"]: (one["reason"], one["detail"]) for one in rejected if one["id"] != "other"}


OTHER = row(
    "other",
    "How are you today?",
    "Very well.",
    answers={"A": "Very well.", "B": "Ill."},
    judgement={"roles": {"A": "A", "B": "B"}, "winner": "A"},
)
TEXT = [f"word{number}" for number in range(60)]


def test_repetition(tmp_path):
    """30 words said twice have 51 10-grams, 21 of them twice: 42 of 51. 40 words and 15 of them again have 46,
    of which 6 stand twice: 12 of 46."""
    part = " ".join([*TEXT[:40], *TEXT[:15]])
    chinese = "从前有座山山里有座庙庙里有个老和尚讲故事给小和尚听完便睡"
    item = "每组八到十二次，共三组，中间休息两分钟整，再"  # 19 characters again and again, but no 20
    rows = [
        row("twice", "q", " ".join(TEXT[:30] * 2)),
        row("part", "q", part),
        row("once", "q", " ".join(TEXT)),
        row("ha", "q", "ha " * 40),
        row("short", "q", "ha " * 9),
        row("code", "q", "```\n" + "x = 1\n" * 50 + "```\nThat is all."),
        row("user", " ".join(TEXT[:30] * 2), "Yes."),
        row("zh", "q", chinese * 3),
        row("zh list", "q", "".join(f"{chr(0x4E00 + n)}：{item}" for n in range(9))),
    ]
    thinks = row("thinks", "q", "Done.")
    thinks["messages"][1]["reasoning_content"] = "Wait, " + "let me think again about it, " * 9
    kept, rejected = filtered(tmp_path, [*rows, thinks], "--repetition")
    assert {*rejected} == {"twice", "ha", "zh", "thinks"}
    assert rejected["twice"] == ("repetition", "message 1: 82% of its n-grams stand there again")
    assert rejected["thinks"][1].startswith("message 1, reasoning: ")
    assert filtered(tmp_path, rows, "--repetition", "0.25")[1]["part"][1].startswith("message 1: 26%")
    assert "part" in filtered(tmp_path, rows, "--repetition", "0.27")[0]


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't assist with that request.",
        "I’m sorry, but as an AI language model, I cannot browse the web.",
        "Sorry, I am unable to help with this.",
        "I apologize, but I cannot provide that.",
        "As an AI language model, I am not able to feel.",
        "Unfortunately, I can't open links.",
        "Thanks for asking! I can't help with that.",
        "I won't write that.",
        "很抱歉，我无法回答这个问题。",
        "抱歉，作为一个AI语言模型，我无法访问外部网站。",
        "作为人工智能助手，我不能提供医疗建议。",
        "对不起，但我不能协助您。",
        "我无法提供这类信息。",
    ],
)
def test_refusals(tmp_path, answer):
    kept, rejected = filtered(tmp_path, [row("a", "q", answer), row("b", "q", "Sure.", "more", answer)], "--refusals")
    assert not kept and {reason for reason, _ in rejected.values()} == {"refusal"}
    assert rejected["b"][1].startswith("message 3: ")


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry to hear that. Here is what you can do.",
        "I can't wait to see it!",
        'You can say: "I\'m sorry I am late."',
        "As an AI language model, I have no opinion, but here are both sides.",
        "Here is a letter of refusal. " + "It is polite and short. " * 6 + "I'm sorry, but I cannot accept the offer.",
        "She said that I cannot help falling in love is a song.",
        "很抱歉给您带来不便，请按以下步骤操作。",
        "作为一个AI语言模型，我没有个人观点，但可以介绍双方的看法。",
        "我们无法预测未来，但可以准备。",
        "如果您无法登录，请重置密码。",
    ],
)
def test_no_refusals(tmp_path, answer):
    rows = [row("a", "q", answer), row("b", "I'm sorry, but I can't help you.", "No harm done.")]
    assert {*filtered(tmp_path, rows, "--refusals")[0]} == {"a", "b"}


def test_lengths(tmp_path):
    call = row("call", "Weather?", "")
    call["messages"][1]["tool_calls"] = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    system = row("system", "123", "12345")
    system["messages"].insert(0, {"role": "system", "content": "1"})
    rows = [row("5", "123", "12345"), row("4", "123", "1234"), row("two", "1", "12345", "1", "12345"), call, system]
    kept, rejected = filtered(tmp_path, rows, "--min_chars", "5")
    assert rejected == {"4": ("too short", "message 1: 4 characters")} and "call" in kept
    kept, rejected = filtered(tmp_path, rows, "--max_chars", "8")
    assert rejected == {"two": ("too long", "12 characters"), "system": ("too long", "9 characters")}
    kept, rejected = filtered(tmp_path, rows, "--max_turns", "2")
    assert rejected == {"two": ("too many turns", "4")}
    assert {*filtered(tmp_path, rows, "--min_turns", "4")[0]} == {"two"}


def test_language(tmp_path):
    rows = [row("zh", "你好", "你好，请问有什么事？"), row("en", "Hi", "Hello there")]
    rows.append(row("mixed", "你好，请问这是什么地方，怎么去车站？", "Hello there"))
    assert {*filtered(tmp_path, rows, "--lang", "en")[0]} == {"en"}
    assert {*filtered(tmp_path, rows, "--lang", "zh", "en")[0]} == {"zh", "en", "mixed"}


def test_tokens(tmp_path):
    """As many tokens as transformers' own call gives, by a tokenizer of one token a character."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    small = Tokenizer(models.WordLevel({chr(code): code for code in range(128)}, unk_token="?"))
    small.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=small, eos_token="!")
    tokenizer.chat_template = (REPO / "chat_templates" / "chatml.jinja").read_text()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = [row(f"{n}", "q", "x" * n) for n in (5, 20, 21, 60)]
    sizes = {one["id"]: len(tokenizer.apply_chat_template(one["messages"])["input_ids"]) for one in rows}
    flags = "--model_name_or_path", tmp_path / "tokenizer", "--max_length", sizes["20"]
    kept, rejected = filtered(tmp_path, rows, *flags)
    assert {*kept} == {"5", "20"} and sizes["21"] == sizes["20"] + 1
    assert rejected["60"] == ("too long", f"{sizes['60']} tokens, max_length {sizes['20']}")


def asked(row_id, **columns):
    return {"id": row_id, "messages": [{"role": "user", "content": "How many?"}], **columns}


AGREE, DISAGREE = {"verdict": {"agree": True}}, {"verdict": {"agree": False, "said": "It is not."}}


@pytest.mark.parametrize(
    ("answer", "reference", "more", "reason"),
    [
        ("5 + 7 = 12\n#### 12", "12", {}, None),
        ("5 + 7 = 12\n#### 12", 12, {}, None),
        ("5 + 7 = 12\n#### 12", 12.0, {}, None),
        ("so \\boxed{1,200} in all 3 cases", "#### 1200", {}, None),
        ("so \\boxed{1,200} in all 3 cases", "3", {}, "answers disagree"),
        ("It costs $12.50.", "12.5", {}, None),
        ("There are 12 of them", "12 apples", {}, "no verdict"),  # a word of the reference may be the answer
        ("There are 12 of them", "12 apples", AGREE, None),
        ("At 3 PM", "3 AM", {}, "no verdict"),
        ("So 12 of 15", "12", {}, "answers disagree"),
        ("#### 12", "12", AGREE, None),
        ("#### 12", "12", DISAGREE, "verifier disagrees"),
        ("#### 12", "13", AGREE, "answers disagree"),
        ("-3", "3", AGREE, "answers disagree"),
        ("Paris.", " paris", {}, None),
        ("It is Paris", "Paris", {}, "no verdict"),
        ("It is Paris", "Paris", AGREE, None),
        ("Paris", "Paris", DISAGREE, "verifier disagrees"),
        ("It is \\boxed{\\frac{1}{2}}", "1/2", AGREE, None),
        ("答案是12个", "12", {}, None),
        ("Yes", "Yes", {"verdict": {"agree": "yes"}}, "field of another type"),
    ],
)
def test_against_the_reference(tmp_path, answer, reference, more, reason):
    answers = {"A": answer, "C": "something else"}
    kept, rejected = filtered(tmp_path, [asked("a", answers=answers, reference=reference, **more)], "--agreement")
    assert rejected.get("a", (None,))[0] == reason
    if not reason:
        assert kept["a"]["messages"][1:] == [{"role": "assistant", "content": answer}]


def test_against_the_third_model(tmp_path):
    rows = [
        asked("same", answers={"A": "I get 7.\n#### 7", "C": "We have 3 + 4.\n#### 7"}),
        asked("other", answers={"A": "I get 7.\n#### 7", "C": "We have 3 + 5.\n#### 8"}),
        asked("null", answers={"A": "#### 7", "C": "#### 7"}, reference=None),
        asked("prose", answers={"A": "In 1990 it was 7", "C": "In 1991 it was 7"}),  # nothing marks 7 as the answer
        asked("no C", answers={"A": "#### 7", "B": "#### 7"}),
        asked("no A", answers={"B": "#### 7", "C": "#### 7"}),
        row("own A", "How many?", "#### 7", answers={"C": "#### 7"}),
        row("own", "How many?", "#### 7", gold="7"),
        asked("types", answers={"A": 7, "C": "7"}),
        {"id": "no question", "messages": [{"role": "assistant", "content": "#### 7"}], "answers": {"C": "7"}},
    ]
    rows[1]["id"] = "differ"
    kept, rejected = filtered(tmp_path, rows, "--agreement")
    assert {*kept} == {"same", "null", "own A"}
    assert {name: reason for name, (reason, _) in rejected.items()} == {
        "differ": "answers disagree",
        "prose": "no verdict",
        "no C": "no reference and no answer C",
        "no A": "no answer A",
        "own": "no reference and no answer C",
        "types": "field of another type",
        "no question": "no question before the answer",
    }
    assert "own" in filtered(tmp_path, rows, "--agreement", "--reference", "gold")[0]


def judged(row_id, winner, roles=None, **more):
    roles = {"A": "B", "B": "A"} if roles is None else roles  # the judge saw B's answer as A
    answers, judgement = {"A": "Short.", "B": "Long.", "C": "Odd."}, {"roles": roles, "winner": winner}
    return asked(row_id, answers=answers, judgement=judgement, answers_reasoning={"B": "I think."}, **more)


def test_the_judges_winner(tmp_path):
    rows = [
        judged("a", "A"),
        judged("b", "B"),
        judged("c", "C", {"A": "C", "B": "A"}),
        judged("tie", "tie"),
        judged("none", "C"),
        judged("roles", "A", {"A": "A", "B": "A"}),
        judged("gone", "A", {"A": "A", "B": "D"}),
        judged("empty", "A", {}),
        judged("refuses", "B") | {"answers": {"A": "Yes.", "B": "I'm sorry, but I can't."}},
    ]
    kept, rejected = filtered(tmp_path, rows, "--agreement", "--refusals")
    answers = {name: one["messages"][1:] for name, one in kept.items()}
    assert answers == {
        "a": [{"role": "assistant", "content": "Short."}],
        "b": [{"role": "assistant", "content": "Long.", "reasoning_content": "I think."}],
        "c": [{"role": "assistant", "content": "Odd."}],
    }
    assert {name: reason for name, (reason, _) in rejected.items()} == {
        "tie": "tie",
        "none": "judgement without a winner",
        "roles": "judgement without its answers",
        "gone": "judgement without its answers",
        "empty": "judgement without its answers",
        "refuses": "refusal",
    }


def test_pairs_for_preference_training(tmp_path):
    rows = [judged("a", "A", tags=["x"]), judged("b", "B"), judged("tie", "tie")]
    rows += [asked("objective", answers={"A": "#### 7", "C": "#### 7"}), row("last", "q", "Old.")]
    rows[-1] |= {key: rows[0][key] for key in ("answers", "judgement")}
    flags = "--agreement", "--export", "preference"
    kept, rejected = filtered(tmp_path, rows, *flags)
    assert {*kept} == {"a", "b", "last"}
    assert {name: reason for name, (reason, _) in rejected.items()} == {"tie": "tie", "objective": "no judgement"}
    assert kept["a"] == {
        "id": "a",
        "prompt": [{"role": "user", "content": "How many?"}],
        "chosen": [{"role": "assistant", "content": "Short."}],
        "rejected": [{"role": "assistant", "content": "Long.", "reasoning_content": "I think."}],
        "source": "rows",
        "tags": ["x"],
        "lang": "en",
    }
    assert kept["b"]["chosen"] == kept["a"]["rejected"] and kept["b"]["rejected"] == kept["a"]["chosen"]
    assert kept["last"]["prompt"] == [{"role": "user", "content": "q"}]
    assert kept["last"]["chosen"] == kept["a"]["chosen"] and "messages" not in kept["last"]
    done = run(tmp_path / "rows.jsonl", "--out", tmp_path / "folder", *flags)
    assert done.returncode == 2 and "--export preference: pass --agreement and a .jsonl file" in done.stderr


@pytest.mark.long  # TRL takes eight seconds to import
def test_trl_takes_the_pairs(tmp_path):
    from trl.data_utils import apply_chat_template, is_conversational

    tokenizer = mock.Mock()
    tokenizer.apply_chat_template = lambda messages, **_: "".join(f"<{turn['content']}>" for turn in messages)
    kept, _ = filtered(tmp_path, [judged("a", "A")], "--agreement", "--export", "preference")
    assert is_conversational(kept["a"])
    told = apply_chat_template({key: kept["a"][key] for key in ("prompt", "chosen", "rejected")}, tokenizer)
    assert told == {"prompt": "<How many?>", "chosen": "<Short.>", "rejected": "<Long.>"}


def test_processes_change_no_byte_and_rows_are_accounted_for(tmp_path, monkeypatch):
    for size in ("HEAD", "BLOCK"):
        monkeypatch.setattr(text_files, size, 2000)  # bytes: many chunks of a small file
    raw = [json.dumps(row(f"r{n}", "q", ("ha " * n, "Sorry, I can't do it.", f"answer {n}")[n % 3])) for n in range(99)]
    raw[3], raw[33], raw[43], raw[53] = "{cut", "[]", '{"messages": [{"role": "user", "content": 3}]}', "\x00"
    (tmp_path / "rows.jsonl").write_text("\n".join(raw))
    for name, processes in (("one", "1"), ("two", "2")):
        flags = "--repetition", "--refusals", "--lang", "en", "--num_proc", processes
        done = run(tmp_path / "rows.jsonl", "--out", tmp_path / name / "out", *flags)
        assert done.returncode == 0, done.stderr
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert files and all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)
    report = json.loads((tmp_path / "one/out/report.json").read_text())
    assert report["in"] == 99 == report["out"]["train"] + sum(report["refused"].values())
    assert report["refused"]["not JSON"] == 2 and report["refused"]["refusal"] > 20


def test_bad_input(tmp_path):
    rows = write(tmp_path / "rows.jsonl", [row("a", "Hi", "I can't help with that.")])
    recipe = tmp_path / "recipe.py"
    recipe.write_text("DEFAULTS = dict(model_name_or_path='no/such', max_length=100)\n")
    for flags, said in (
        ([], "no rule is asked for"),
        (["--max_length", "100"], "--max_length: needs a tokenizer"),
        (["--export", "preference"], "--export preference: pass --agreement"),
        (["--refusals", "--export", "winner"], "--export: read with --agreement only"),
        (["--refusals", "--reference", "gold"], "--reference: read with --agreement only"),
        (["--refusals", "--chat_template_path", "x.jinja"], "--chat_template_path: read for lengths in tokens only"),
        (["--refusals", "--model_name_or_path", "x"], "--model_name_or_path: read for lengths in tokens only"),
        (["--max_length", "9", "--model_name_or_path", "no/such"], "no/such: no tokenizer could be loaded"),
        (["--max_length", "9", "--recipe", recipe], "no/such: no tokenizer could be loaded"),
        (["--recipe", recipe], "its tokenizer cannot be loaded"),
        (["--repetition", "1"], "--repetition 1.0: pass a share"),
    ):
        done = run(rows, "--out", tmp_path / "out", *flags)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, flags
    assert run(write(tmp_path / "none.jsonl", []), "--out", tmp_path / "out", "--refusals").returncode == 2
    assert not (tmp_path / "out").exists()
    done = run(rows, "--out", tmp_path / "out", "--refusals")
    assert done.returncode == 1 and "all 1 rows refused (1 refusal)" in done.stderr
    assert [entry["reason"] for entry in lines(tmp_path / "out" / "rejected.jsonl")] == ["refusal"]
    assert not (tmp_path / "out" / "train").exists()


@real
@pytest.mark.parametrize(
    ("name", "most"),
    [("chat/sharegpt_zh_1K_format.jsonl", 5), ("chat/fastchat_dummy_conversation.json", 0), ("gsm8k/train.jsonl", 0)],
)
def test_real_chats_stay(name, most):
    """Sane chats hardly ever repeat themselves; read by hand, these files hold one answer that does."""
    text = (SHARED / "data" / name).read_text(encoding="utf-8")
    raw = json.loads(text) if name.endswith(".json") else map(json.loads, text.splitlines())
    options = mock.Mock(repetition=0.5)
    found = looked = 0
    for one in raw:
        said = [turn["value"] for turn in one["conversations"]] if "conversations" in one else ["q", one["answer"]]
        looked += 1
        found += bool([*filter.check_repetition(row("x", *said), options)])
    assert looked >= 500 and found <= most
