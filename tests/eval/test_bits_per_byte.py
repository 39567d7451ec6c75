"""eval/bits_per_byte.py against a calculation by hand: float64, a text at a time, the full softmax, bytes of the text.

Breaks tried, each seen red: characters for bytes, nats for bits, the mean of the texts' own figures, tokens for bytes,
special tokens in the bits or in the bytes, no token before a text, a window without its context, a token between two
windows left out or counted twice, the interval in nats.
"""

import json
import math
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval import bits_per_byte, chat_eval
from tests.eval.test_compare import make_model, make_tokenizer, save, write_rows

TEXTS = [
    {"text": "The sea is wide.", "source": "plain"},
    {"text": "Größe: 7 Äpfel, 3 €", "source": "plain", "id": "german"},
    {"text": "海は広い。\n\n空も広い。", "source": "plain"},
    {"text": "a", "source": "short"},
    {"text": "One text, then another.<|endoftext|>The other one.", "source": "short"},
    {"text": "la " * 40, "source": "plain"},
    {"text": "🙂 and 🙃", "source": "plain"},
]
CHATS = [
    {"messages": [{"role": "user", "content": "Größe?"}, {"role": "assistant", "content": "7 Äpfel"}]},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, you."}]},
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("bits per byte home")
    save(home / "run", make_model(3))
    model, tokenizer = make_model(4), make_tokenizer("chatml")
    tokenizer.chat_template = None  # a base model
    tokenizer.bos_token = "<|im_start|>"
    model.save_pretrained(home / "base")
    tokenizer.save_pretrained(home / "base")
    write_rows(home / "texts.jsonl", TEXTS)
    write_rows(home / "chats.jsonl", CHATS)
    return home


def by_hand(folder, texts, start, length=10**6):
    """(nats, bytes) of each text: token after token, each with all that stands before it in its window."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    found = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if start is not None:
            ids = [tokenizer.convert_tokens_to_ids(start), *ids]
        nats = 0.0
        for place in range(1, len(ids)):
            token = tokenizer.convert_ids_to_tokens(ids[place])
            if token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
                continue
            begin = (place - 1) // (length - 1) * (length - 1)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids[begin:place]])).logits[0, -1]
            nats -= math.log(float(torch.softmax(logits, -1)[ids[place]]))
        plain = text
        for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
            plain = plain.replace(token, "")
        found.append((nats, len(plain.encode("utf-8"))))
    return found


def run(home, model, data, *flags):
    out = home / "out"
    command = [home / model, "--data", home / data, "--out", out, *flags]
    assert bits_per_byte.main([str(word) for word in command]) == 0
    lines = (out / "bits_per_byte.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    return json.loads((out / "bits_per_byte.json").read_text()), [json.loads(line) for line in lines]


@pytest.mark.parametrize("length", [None, 7])
@pytest.mark.parametrize(("model", "start"), [("base", "<|im_start|>"), ("run", "<|im_end|>")])
def test_the_figure_is_that_of_a_calculation_by_hand(home, model, start, length):
    """The base has a token to begin a text with, the other run only one that ends them."""
    expected = by_hand(home / model, [row["text"] for row in TEXTS], start, length or 10**6)
    report, lines = run(home, model, "texts.jsonl", *(["--max_length", length] if length else []))
    for line, (nats, size) in zip(lines, expected, strict=True):
        assert line["nats"] == pytest.approx(nats, rel=1e-5) and line["bytes"] == size
    nats, sizes = (sum(column) for column in zip(*expected, strict=True))
    figure = report["metrics"]["bits_per_byte"]
    assert figure["value"] == pytest.approx(nats / sizes / math.log(2), rel=1e-5)
    assert (figure["bytes"], figure["total"]) == (sizes, len(TEXTS))
    assert figure["low"] < figure["value"] < figure["high"] < 4 * figure["value"]
    groups = report["groups"]["source"]
    assert groups["short"]["bits_per_byte"]["total"] == 2 and "low" not in groups["short"]["bits_per_byte"]
    own = [expected[3], expected[4]]
    value = sum(nats for nats, _ in own) / sum(size for _, size in own) / math.log(2)
    assert groups["short"]["bits_per_byte"]["value"] == pytest.approx(value, rel=1e-5)


def test_conversations_are_measured_under_the_template(home):
    texts = [
        "<|im_start|>user\nGröße?<|im_end|>\n<|im_start|>assistant\n7 Äpfel<|im_end|>\n",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello, you.<|im_end|>\n",
    ]
    expected = by_hand(home / "run", texts, None)
    report, lines = run(home, "run", "chats.jsonl")
    assert [line["nats"] for line in lines] == pytest.approx([nats for nats, _ in expected], rel=1e-5)
    assert [line["bytes"] for line in lines] == [size for _, size in expected]
    assert report["metrics"]["bits_per_byte"]["total"] == 2 and "low" not in report["metrics"]["bits_per_byte"]


def test_a_model_that_knows_nothing_needs_the_bits_of_its_vocabulary(home):
    """Every token is as likely as any other: log2 of 264 a token, and a byte is a token here."""
    model = make_model(0)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    save(home / "nothing", model)
    write_rows(home / "bytes.jsonl", [{"text": f"text number {n}"} for n in range(8)])
    report, lines = run(home, "nothing", "bytes.jsonl")
    assert report["metrics"]["bits_per_byte"]["value"] == pytest.approx(math.log2(264), rel=1e-6)
    assert all(line["tokens"] == line["bytes"] for line in lines)


def test_batches_change_nothing_and_the_same_input_gives_the_same_bytes(home):
    first, lines = run(home, "run", "texts.jsonl", "--max_length", 9)
    again, _ = run(home, "run", "texts.jsonl", "--max_length", 9)
    other, more = run(home, "run", "texts.jsonl", "--max_length", 9, "--batch_size", 3)
    assert first == again and [line["tokens"] for line in lines] == [line["tokens"] for line in more]
    assert first["metrics"]["bits_per_byte"]["value"] == pytest.approx(other["metrics"]["bits_per_byte"]["value"])
    few, lines = run(home, "run", "texts.jsonl", "--rows", 2)
    assert few["metrics"]["bits_per_byte"]["total"] == 2 and [line["id"] for line in lines] == ["1", "german"]


def test_the_table_of_stages_shows_it(home, capsys):
    for model in ("base", "run"):
        bits_per_byte.main([str(home / model), "--data", str(home / "texts.jsonl")])
    (home / "run" / "eval" / "chat_eval.json").write_text(json.dumps({"metrics": {"gsm8k": {"value": 0.5}}}))
    values = [
        json.loads((home / model / "eval" / "bits_per_byte.json").read_text())["metrics"]["bits_per_byte"]["value"]
        for model in ("base", "run")
    ]
    capsys.readouterr()
    stages = ["--stages", str(home / "base"), str(home / "run")]
    assert chat_eval.main(stages) == 0
    table = capsys.readouterr().out
    assert "| GSM8K           | -        | 0.5000   |\n" in table
    assert f"| Bits per byte   | {values[0]:<8.4f} | {values[1]:<8.4f} |\n" in table
    assert "BASE: " not in table and "different texts" not in table
    bits_per_byte.main([str(home / "base"), "--data", str(home / "texts.jsonl"), "--rows", "3"])
    capsys.readouterr()
    assert chat_eval.main(stages) == 0 and "are of different texts" in capsys.readouterr().out


def test_bad_input_is_one_sentence_and_writes_nothing(home, capsys):
    write_rows(home / "empty.jsonl", [])
    write_rows(home / "blank.jsonl", [{"text": "a"}, {"text": ""}])
    write_rows(home / "special.jsonl", [{"text": "<|im_end|>"}])
    (home / "half.jsonl").write_text('{"text": "a \\ud83d b"}\n')
    write_rows(home / "torn.jsonl", [{"messages": [7]}])
    model = make_model(0)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    save(home / "nan", model)
    for model, data, flags, expected in (
        ("run", "gone.jsonl", [], "gone.jsonl does not exist"),
        ("run", "empty.jsonl", [], "empty.jsonl holds no rows"),
        ("run", "blank.jsonl", [], "row 2 of .* has neither text nor messages"),
        ("run", "half.jsonl", [], "row 1 of .* holds half a surrogate pair"),
        ("run", "torn.jsonl", [], "row 1 of .* is refused by the template"),
        ("run", "special.jsonl", [], "holds special tokens alone"),
        ("base", "chats.jsonl", [], "the run has no chat template"),
        ("gone", "texts.jsonl", [], "gone does not exist"),
        ("run", "texts.jsonl", ["--max_length", "2000"], "beyond the model's 1,024 positions"),
        ("run", "texts.jsonl", ["--max_length", "1"], "at least 2 tokens, .* pass --max_length"),
        ("nan", "texts.jsonl", [], "the loss on 1 is not a number"),
    ):
        command = [str(home / model), "--data", str(home / data), "--out", str(home / "never"), *flags]
        capsys.readouterr()
        assert bits_per_byte.main(command) == 2, expected
        error = capsys.readouterr().err.strip()
        assert "\n" not in error and re.search(expected, error), (expected, error)
    assert not (home / "never").exists()
