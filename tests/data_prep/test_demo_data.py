"""data_prep/demo_rows.py and demo_model.py: every answer recomputed by other code from the text that the model reads,
held-out items searched for in all that is trained on, tool triples, strict JSON, same bytes twice, tokenizer rules."""

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter

import pytest
from datasets import load_from_disk

from tests.helpers.runs import REPO, SHARED

GROUPS = {"spelling", "letters", "sums", "json", "tools", "dialog"}


def run(script, *args, ok=True):
    command = [sys.executable, "-m", f"data_prep.{script}", *map(str, args)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert not ok or done.returncode == 0, done.stderr
    return done


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder with rows/ and init/ as small as the tests of the recipes use them."""
    folder = tmp_path_factory.mktemp("demo data")  # a path with a space
    run("demo_rows", "--out", folder / "rows", "--rows", 400)
    run("demo_model", "--rows", folder / "rows", "--out", folder / "init")
    return folder


@pytest.fixture(scope="module")
def splits(demo):
    chat = load_from_disk(str(demo / "rows" / "chat"))
    return {split: without_null_tools(chat[split].to_list()) for split in chat}


@pytest.fixture(scope="module")
def texts(demo):
    return [row["text"] for row in lines(demo / "rows" / "pretrain.jsonl")]


@pytest.fixture(scope="module")
def tokenizer(demo):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo / "init")


def without_null_tools(rows):
    return [{key: value for key, value in row.items() if not (key == "tools" and value is None)} for row in rows]


def asked(row):
    return [turn["content"] for turn in row["messages"] if turn["role"] == "user"]


def final(row):
    return row["messages"][-1]


def answer_number(row):
    """The number after #### where the working is in the answer, the whole answer where it is in the reasoning."""
    return int(final(row)["content"].split("####")[-1])


def test_rows_have_the_shape_of_the_house(splits, demo):
    assert set(splits) == {"train", "validation", "test"}
    ids = [row["id"] for rows in splits.values() for row in rows]
    assert len(ids) == len(set(ids))
    assert 400 <= len(splits["train"]) <= 412
    assert lines(demo / "rows" / "chat" / "rejected.jsonl") == []
    for split, rows in splits.items():
        groups = Counter(row["source"] for row in rows)
        assert set(groups) == GROUPS, split
        assert len(rows) >= 30
        for row in rows:
            think = row["chat_template_kwargs"]["enable_thinking"]
            assert ("think" in row["tags"], "no_think" in row["tags"]) == (think, not think)
            assert ("json" in row["tags"], "tools" in row["tags"]) == (
                row["source"] == "json",
                row["source"] == "tools",
            )
            assert ("tools" in row) == (row["source"] == "tools")
            assert ("multi_turn" in row["tags"]) == (len(asked(row)) > 1)
            assert final(row)["role"] == "assistant"
            assert bool(final(row).get("reasoning_content")) == think
            assert row["lang"] == "en"
            assert not re.search(r"<\|", json.dumps(row["messages"]))
    tags = Counter(tag for row in splits["train"] for tag in row["tags"])
    assert min(tags[tag] for tag in ("json", "tools", "think", "no_think", "multi_turn", "negative")) >= 15
    assert lines(demo / "rows" / "chat" / "test.jsonl") == splits["test"]


def test_spelling_and_counts_are_right(splits):
    seen = Counter()
    for row in (row for rows in splits.values() for row in rows):
        question = asked(row)[0]
        if row["source"] == "spelling":
            word = re.search(r"(?:Spell(?: the word:)?|How is) ([a-z]+)", question)[1]
            assert final(row)["content"] == re.sub(r"(?<=.)(?=.)", ",", word)
            seen["spelling"] += 1
        elif row["source"] == "letters":
            letter = re.search(r"(?:many|the) ([a-z]) (?:are )?in", question)[1]
            word = question.rstrip("?").split()[-1]
            assert answer_number(row) == len(word) - len(word.replace(letter, "")), question
            working = final(row).get("reasoning_content") or final(row)["content"].split("\n")[0]
            marks = [f"{c}={word[: i + 1].count(letter)}" if c == letter else c for i, c in enumerate(word)]
            assert working == ",".join(marks)
            seen[answer_number(row)] += 1
    assert seen["spelling"] > 60
    assert min(seen[0], seen[1], seen[2]) > 5  # not one answer for all


def test_word_problems_are_right(splits):
    signs = Counter()
    for row in (row for rows in splits.values() for row in rows if row["source"] == "sums"):
        have, change = map(int, re.findall(r"\d+", asked(row)[0]))
        less = re.search(r"\b(loses|sells|gives away)\b", asked(row)[0])
        more = re.search(r"\b(gets|buys|finds) \d+ more\b", asked(row)[0])
        assert bool(less) != bool(more)
        assert answer_number(row) == (have - change if less else have + change), asked(row)[0]
        working = final(row).get("reasoning_content") or final(row)["content"].split("\n")[0]
        numbers = range(have - 1, have - change - 1, -1) if less else range(have + 1, have + change + 1)
        assert working == ",".join(f"{number}={step}" for step, number in enumerate(numbers, 1))
        signs["less" if less else "more"] += 1
    assert min(signs.values()) > 15


def strict(text):
    def refuse(name):
        raise ValueError(name)

    def pairs(items):
        assert len({key for key, _ in items}) == len(items), "a key twice"
        return dict(items)

    return json.loads(text, parse_constant=refuse, object_pairs_hook=pairs)


def test_json_is_strict_and_says_what_the_text_says(splits):
    seen = Counter()
    for row in (row for rows in splits.values() for row in rows if row["source"] == "json"):
        question, answer = asked(row)[0], strict(final(row)["content"])
        found = re.match(r"(?P<t>.*\.) JSON with (?P<f>.*)\?$|Give (?P<f2>.*) as JSON: (?P<t2>.*)$", question)
        text, fields = found["t"] or found["t2"], (found["f"] or found["f2"]).split(", ")
        if "error" in answer:
            assert answer == {"error": "no person"}
            assert not re.search(r"live|home|age|\d", text)
            seen["error"] += 1
        else:
            assert list(answer) == fields
            capitals = re.findall(r"[A-Z][a-z]+", text.removeprefix("The "))
            numbers = [int(number) for number in re.findall(r"\d+", text)]
            says = {"name": capitals[0], "age": numbers[0] if numbers else None}
            says["city"] = capitals[1] if len(capitals) > 1 else None
            assert answer == {field: says[field] for field in fields}, question
            seen["null" if None in answer.values() else "full"] += 1
        assert ("negative" in row["tags"]) == ("error" in answer or None in answer.values())
    assert min(seen["error"], seen["null"], seen["full"]) > 3, seen


def test_tools_are_complete_triples_and_calls_are_trained(splits):
    shapes = Counter()
    for split, rows in splits.items():
        rows = [row for row in rows if row["source"] == "tools"]
        whole = [row for row in rows if len(row["messages"]) == 4]
        for row in whole:
            question, call, reply, answer = row["messages"]
            assert [turn["role"] for turn in row["messages"]] == ["user", "assistant", "tool", "assistant"]
            (function,) = (entry["function"] for entry in call["tool_calls"])
            declared = {tool["function"]["name"]: tool["function"]["parameters"] for tool in row["tools"]}
            assert set(function["arguments"]) == set(declared[function["name"]]["required"])
            for key, value in function["arguments"].items():
                kind = declared[function["name"]]["properties"][key]["type"]
                assert isinstance(value, {"string": str, "integer": int}[kind])
                assert str(value) in question["content"]  # nothing is made up
            assert reply["name"] == function["name"]
            for value in strict(reply["content"]).values():
                assert str(value) in answer["content"]
            shapes[function["name"]] += 1
        # each triple has its row that ends in the call, so that the call is trained too; nothing else is there
        calls = [json.dumps(row["messages"]) for row in rows if len(row["messages"]) == 2]
        assert sorted(calls) == sorted(json.dumps(row["messages"][:2]) for row in whole), split
        assert len(rows) == 2 * len(whole)
    assert set(shapes) == {"weather", "price"}


def test_dialogs_need_their_first_turn(splits):
    several = [row for rows in splits.values() for row in rows if "multi_turn" in row["tags"]]
    assert len(several) > 15
    for row in several:
        hello, question = asked(row)
        name, city = re.search(r"(?:am|is) ([A-Z][a-z]+) (?:from|and I live in) ([A-Z][a-z]+)", hello).groups()
        assert final(row)["content"] == (f"You are {name}." if "name" in question else f"You live in {city}.")
        assert name not in question
        assert city not in question
        assert not any(turn.get("reasoning_content") for turn in row["messages"][:-1])


def items(row):
    """What a row is about, read from its text alone: one or more keys that no other split may share."""
    text = asked(row)[0]
    if row["source"] == "spelling":
        return {("word", re.search(r"(?:Spell(?: the word:)?|How is) ([a-z]+)", text)[1])}
    if row["source"] == "letters":
        return {("word", text.rstrip("?").split()[-1])}
    if row["source"] == "sums":
        return {("numbers", *sorted(re.findall(r"\d+", text)))}
    if row["source"] == "tools":
        arguments = row["messages"][1]["tool_calls"][0]["function"]["arguments"]
        return {("call", json.dumps(arguments, sort_keys=True))}
    capitals = re.findall(r"\b[A-Z][a-z]+\b", re.sub(r"Give|JSON|The|My|Hello|What|Where", "", text))
    facts = capitals if len(capitals) == 2 else capitals + re.findall(r"\d+", text)
    people = {("person", *sorted(facts))} if len(facts) == 2 else set()
    thing = re.search(r"The (\w+) are (\w+) and (\w+)\.", text)
    return {("object", *thing.groups())} if thing else people


def test_held_out_items_are_in_nothing_that_is_trained_on(splits, texts):
    assert all(items(row) for rows in splits.values() for row in rows)
    kinds = {split: set().union(*map(items, rows)) for split, rows in splits.items()}
    assert not kinds["train"] & kinds["test"]
    assert not kinds["train"] & kinds["validation"]
    assert not kinds["validation"] & kinds["test"]
    held_out = kinds["validation"] | kinds["test"]
    assert {kind for kind, *_ in held_out} >= {"word", "numbers", "call", "person", "object"}
    everything = "\n".join(texts)
    words = set(re.findall(r"[a-z]+", everything))
    spelled = {found.replace(",", "") for found in re.findall(r"\b[a-z](?:,[a-z])+\b", re.sub(r"=\d", "", everything))}
    pairs = {tuple(sorted(pair)) for pair in re.findall(r"\b(\d+)[+-](\d+):", everything)}
    stories = {tuple(sorted(pair)) for pair in re.findall(r"has (\d+) \w+ and \D*(\d+)", everything)}
    calls = {json.dumps(json.loads(call), sort_keys=True) for call in re.findall(r'"arguments": ({.*?})', everything)}
    people = {tuple(sorted(pair)) for pair in re.findall(r"(\w+) (?:is \d+ and )?lives in (\w+)", everything)}
    for form in (
        r"The home of (\w+) is (\w+)",
        r"([A-Z]\w+) from ([A-Z]\w+)",
        r"name is (\w+) and I live in (\w+)",
        r"(\w+) is (\d+) years old",
        r"The age of (\w+) is (\d+)",
    ):
        found = re.findall(form, everything)
        assert len(found) > 30, form
        people |= {tuple(sorted(pair)) for pair in found}
    objects = set(re.findall(r"The (\w+) are (\w+) and (\w+)\.", everything))
    assert min(map(len, (words, spelled, pairs, stories, calls, people, objects))) > 30
    for kind, *key in held_out:
        if kind == "word":
            assert key[0] not in words | spelled
        else:
            seen = {"numbers": pairs | stories, "call": calls, "person": people, "object": objects}[kind]
            assert (tuple(key) if kind != "call" else key[0]) not in seen, key


def test_pretraining_text_has_chat_markup_on_small_talk_only(texts):
    marked = [text for text in texts if "<|" in text or "<think>" in text or "tool_call>" in text]
    assert 0.1 < len(marked) / len(texts) < 0.16
    tasks = r"[Ss]pell|How many|JSON|weather|price|cost|,[a-z],|\d"
    assert not [text for text in marked if re.search(tasks, text)]
    used = set(re.findall(r"<[|/a-z_]+>", "".join(marked)))
    # every control token that the chat template writes, because QLoRA freezes the embeddings
    tags = ("think", "tool_call", "tool_response")
    assert used == {"<|im_start|>", "<|im_end|>", *(f"<{tag}>" for tag in tags), *(f"</{tag}>" for tag in tags)}


def test_reports_carry_the_hashes_of_what_lies_there(demo, splits):
    report = json.loads((demo / "rows" / "report.json").read_text())
    text = (demo / "rows" / "pretrain.jsonl").read_bytes()
    test = (demo / "rows" / "chat" / "test.jsonl").read_bytes()
    assert report["output"]["pretrain"] == hashlib.sha256(text).hexdigest()
    assert [json.loads(line) for line in test.splitlines()] == splits["test"]
    assert report["out"] == {**{split: len(rows) for split, rows in splits.items()}, "pretrain": text.count(b"\n")}
    assert report["seed"] == 42
    for split, rows in splits.items():
        lines = [{key: value for key, value in row.items() if key != "id"} for row in rows]
        lines = [json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode() for line in lines]
        digests = b"".join(hashlib.sha256(line).digest() for line in lines)
        chats = json.loads((demo / "rows" / "chat" / "report.json").read_text())
        assert report["output"][split] == chats["output"][split] == hashlib.sha256(digests).hexdigest()


def test_same_bytes_twice_other_bytes_by_seed(demo, tmp_path):
    run("demo_rows", "--out", tmp_path / "rows", "--rows", 400)
    run("demo_model", "--rows", tmp_path / "rows", "--out", tmp_path / "init")
    again, first = tree(tmp_path), tree(demo)
    assert set(again) == set(first)
    assert [name for name in again if again[name] != first[name]] == []
    assert not [name for name in again if str(tmp_path).encode() in again[name] or str(REPO).encode() in again[name]]
    run("demo_rows", "--out", tmp_path / "other", "--rows", 400, "--seed", 43)
    assert (tmp_path / "other" / "chat" / "test.jsonl").read_bytes() != (tmp_path / "rows/chat/test.jsonl").read_bytes()


def test_tokenizer_follows_qwen3(tokenizer):
    from transformers import AutoTokenizer

    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|im_end|>", "<|endoftext|>", None)
    assert tokenizer.chat_template is None
    for text in ("a 123\n\nb", "x" * 9, "日本 é 😀", "<|im_start|>user\n12,3<|im_end|>", "  two  spaces\r\n"):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.tokenize("2024") == ["2", "0", "2", "4"]
    for token in ("<think>", "</think>", "<tool_call>", "</tool_response>", "<|im_end|>"):
        assert len(tokenizer(f"a{token}b").input_ids) == 3
    assert tokenizer.decode(tokenizer("<think>\na<|im_end|>").input_ids, skip_special_tokens=True) == "<think>\na"
    if not SHARED.is_dir():
        pytest.skip("../shared is absent: the rules above were checked")
    real = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "qwen3")
    mine, theirs = (
        [(token.content, token.special) for _, token in sorted(each.added_tokens_decoder.items())]
        for each in (tokenizer, real)
    )
    assert mine == theirs
    assert tokenizer.all_special_tokens == real.all_special_tokens
    samples = ["It's 12,345.6 (m/s)…\n\n  x = y+1;\tz", '{"a": [1, null]}', "don't WON'T 你好123", "a\r\n\r\nb   "]
    for text in samples:
        split = [each.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text) for each in (tokenizer, real)]
        assert split[0] == split[1]


def test_model_loads_and_has_the_size_it_says(demo, tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(demo / "init")
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert model.dtype == torch.float32
    assert 0.8e6 < model.num_parameters() < 0.95e6
    assert model.lm_head.weight is model.model.embed_tokens.weight
    config = model.config
    assert (config.vocab_size, config.eos_token_id, config.pad_token_id) == (
        len(tokenizer),
        tokenizer.convert_tokens_to_ids("<|im_end|>"),
        tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    )
    with torch.no_grad():
        loss = model(**(batch := tokenizer("Q: 12+3=15", return_tensors="pt")), labels=batch["input_ids"]).loss
    # untrained: the loss of a uniform guess, and about half the variance of its logits (0.8) above that
    assert abs(loss.item() - torch.tensor(float(config.vocab_size)).log().item()) < 1


def test_rows_render_and_end_as_the_template_trains(splits, tokenizer):
    """Under the demo's template every row has a trained span, and it ends in the stop token of the last answer."""
    from transformers.utils.chat_template_utils import render_jinja_template

    template = (REPO / "chat_templates" / "qwen3.jinja").read_text()
    for row in splits["test"]:
        (text,), (spans,) = render_jinja_template(
            conversations=[row["messages"]],
            tools=row.get("tools"),
            chat_template=template,
            return_assistant_tokens_mask=True,
            **row["chat_template_kwargs"],
        )
        trained = [text[start:end] for start, end in spans]
        assert trained[-1].endswith("<|im_end|>")
        assert final(row)["content"] in trained[-1]
        if row["source"] == "tools" and len(row["messages"]) == 2:
            (call,) = (entry["function"] for entry in final(row)["tool_calls"])
            assert json.dumps(call) in trained[-1]
        # a closed empty think block is the prompt's, a filled one is the answer's
        assert ("<think>" in trained[-1]) == row["chat_template_kwargs"]["enable_thinking"]
        assert len(tokenizer(text).input_ids) <= 512


def test_bad_input_is_one_sentence_and_leaves_nothing(demo, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "pretrain.jsonl").write_text('{"text": 1')
    before = sorted(tmp_path.rglob("*"))
    rows, out = demo / "rows", tmp_path / "o"
    for script, args, words in (
        ("demo_rows", ("--out", tmp_path / "used"), "used: exists already"),
        ("demo_rows", ("--out", out, "--rows", 10), "--rows 10: "),
        ("demo_model", ("--rows", rows, "--out", tmp_path / "used"), "used: exists already"),
        ("demo_model", ("--rows", tmp_path / "none", "--out", out), "pretrain.jsonl: no such file"),
        ("demo_model", ("--rows", tmp_path / "bad", "--out", out), "pretrain.jsonl: not rows of text"),
        ("demo_model", ("--rows", rows, "--out", out, "--vocab_size", 200), "--vocab_size 200: "),
    ):
        done = run(script, *args, ok=False)
        assert (done.returncode, words in done.stderr, len(done.stderr.splitlines())) == (2, True, 1), done.stderr
        assert sorted(tmp_path.rglob("*")) == before
    assert run("demo_rows", "--ou", out, ok=False).returncode == 2
