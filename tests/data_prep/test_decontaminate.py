"""data_prep/decontaminate.py: planted overlaps with both rules at their edges, every shape of eval file, the report and
its counts, and GSM8K's train set against its test set by an independent search where the real files are.

Each of these turns the suite red (tried): 12 words taken for 13; half covered taken for over half; coverage that counts
overlapping n-grams twice; the 8-grams' or the 13-grams' rule left out; common n-grams kept, counted by occurrence or
over all files; runs joined over a gap; system messages searched, in rows or in eval rows; reasoning not searched; only
the first field of an eval row read; hits of a row counted once for all eval files; hits not in order; short texts
equal without their signs, in answers, in fields of any name or in none, by 8 words where 13 are looked for, or however
common.
"""

import json
import random
import re
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import decontaminate
from data_prep.common import text_files, writer
from tests.helpers.runs import SHARED, run_script

real = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="../shared is absent: small fixtures prove the same")


run = partial(run_script, decontaminate)


def row(row_id, *said, **more):
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]
    return {"id": row_id, "messages": turns, **more}


def write(path, rows):
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def cleaned(tmp_path, rows, evals, *flags):
    """(rejected entries by id, report) of rows against eval rows."""
    out, number = tmp_path / "out.jsonl", 0
    while out.exists():
        number += 1
        out = tmp_path / f"out{number}.jsonl"
    path = write(tmp_path / "rows.jsonl", [*rows, row("other", "nothing", "of it")])
    done = run(path, "--against", write(tmp_path / "e.jsonl", evals), "--out", out, *flags)
    assert done.returncode == 0, done.stderr
    rejected = {entry["id"]: entry for entry in lines(out.with_suffix(".rejected.jsonl"))}
    return rejected, json.loads(out.with_suffix(".report.json").read_text())


def text(start, count, name="w"):
    return " ".join(f"{name}{number}" for number in range(start, start + count))


def test_thirteen_words_in_a_row(tmp_path):
    evals = [{"question": text(0, 60)}]
    rows = [
        row("13", "Hi", f"as they say: {text(20, 13)}, don't they"),
        row("12", "Hi", f"as they say: {text(20, 12)}, don't they"),
        row("12+12", "Hi", f"{text(0, 12)} and {text(30, 12)} and so on"),  # 24 of 60 words, no 13 in a row
        row("case", "Hi", text(20, 13).upper().replace(" ", ", ")),
        row("two messages", text(20, 7), text(27, 7)),  # a match lies in one message
        row("order", "Hi", " ".join(reversed(text(20, 20).split()))),
    ]
    rejected, report = cleaned(tmp_path, rows, evals)
    assert {*rejected} == {"13", "case"}
    assert rejected["13"]["reason"] == "eval text"
    (hit,) = rejected["13"]["hits"]
    assert (hit["against"], hit["line"], hit["field"], hit["words"]) == ("e.jsonl", 1, "question", 13)
    assert hit["share"] == round(13 / 60, 4)
    assert (hit["text"], hit["row_text"]) == (text(0, 60), rows[0]["messages"][1]["content"])
    assert report["against"]["e.jsonl"] == {
        "rows": 1,
        "texts": 1,
        "too_short": 0,
        "equal_short_texts": 0,
        "rows_hit": 1,
        "refused": 2,
    }
    assert {*cleaned(tmp_path, rows, evals, "--ngram_sizes", "8")[0]} == set()


def test_eight_grams_over_half_of_the_text(tmp_path):
    evals = [{"q": text(0, 20)}, {"q": text(100, 40)}]
    rows = [
        row("10 of 20", "Hi", f"so {text(5, 10)} so"),
        row("11 of 20", "Hi", f"so {text(5, 11)} so"),
        row("7 and 7 of 20", "Hi", f"{text(0, 7)} so {text(10, 7)}"),  # no 8-gram
        row("10 and 10 of 20", "Hi", f"{text(0, 10)} so {text(9, 10)}"),  # 19 in all
        row("10 and 11 of 40", "Hi", f"{text(100, 10)} so {text(120, 11)} so"),
        row("10 and 10 of 40", "Hi", f"{text(100, 10)} so {text(120, 10)} so"),
    ]
    rejected, _ = cleaned(tmp_path, rows, evals)
    assert {name: (entry["hits"][0]["words"], entry["hits"][0]["share"]) for name, entry in rejected.items()} == {
        "11 of 20": (11, 0.55),
        "10 and 10 of 20": (10, 0.95),
        "10 and 11 of 40": (11, 0.525),
    }
    less = cleaned(tmp_path, rows, evals, "--match_threshold", "0.49")[0]
    assert {*less} == {*rejected, "10 of 20", "10 and 10 of 40"}
    assert {*cleaned(tmp_path, rows, evals, "--ngram_sizes", "13")[0]} == set()


def test_chinese_by_characters(tmp_path):
    question = "小明有十二个苹果，他给了小红五个，请问小明现在还剩下多少个苹果？"  # 29 characters
    rows = [
        row("a", "题目：小明有十二个苹果,他给了小红五个", "七"),  # 15 in a row
        row("b", "小明有十二个苹果，他给小红五个", "七"),  # 8 in a row, 14 in all
        row("c", "全角：小明有十二个苹果，他给了小红五个".replace("，", " "), "七"),
    ]
    rejected, _ = cleaned(tmp_path, rows, [{"input": question, "golden": "7"}])
    assert {name: entry["hits"][0]["words"] for name, entry in rejected.items()} == {"a": 15, "c": 15}


def test_which_texts_are_searched(tmp_path):
    found = text(0, 15)
    thinks = row("reasoning", "Hi", "Ho")
    thinks["messages"][1]["reasoning_content"] = f"I recall {found}"
    system = row("system", "Hi", "Ho")
    system["messages"].insert(0, {"role": "system", "content": found})
    rows = [thinks, system, row("user", found, "Ho")]
    nested = {"id": "x", "choices": {"text": ["short", {"deep": [found]}], "label": [1, None, True]}}
    assert {*cleaned(tmp_path, rows, [nested])[0]} == {"reasoning", "user"}
    assert cleaned(tmp_path, rows, [nested])[0]["user"]["hits"][0]["field"] == "choices.text.deep"
    chat = {"messages": [{"role": "system", "content": text(50, 15)}, {"role": "user", "content": found}]}
    rows.append(row("their system", text(50, 15), "Ho"))
    assert {*cleaned(tmp_path, rows, [chat])[0]} == {"reasoning", "user"}
    two = {"question": text(70, 20), "answer": found}
    assert {*cleaned(tmp_path, rows, [two], "--fields", "question")[0]} == set()
    assert {*cleaned(tmp_path, rows, [two], "--fields", "question", "answer")[0]} == {"reasoning", "user"}


def test_short_texts_are_counted(tmp_path):
    evals = [{"q": text(0, 7), "a": "no"}, {"q": text(9, 8)}]
    rejected, report = cleaned(tmp_path, [row("a", f"So {text(0, 7)}", "Ho")], evals)
    assert not rejected
    assert report["against"]["e.jsonl"] == {
        "rows": 2,
        "texts": 3,
        "too_short": 2,
        "equal_short_texts": 0,
        "rows_hit": 0,
        "refused": 0,
    }


def test_short_texts_that_a_prompt_is_equal_to(tmp_path):
    evals = [
        {"question": "What is 3 * 4?", "answer": "12"},
        {"question": "Capital of France", "answer": "the city of Paris"},
        {"question": "你好吗？", "answer": "很好"},
        {"question": "1+1=?"},
        {"prompt": "Hello"},
        {"choices": {"text": ["yes", "in the sea"]}},
    ]
    rows = [
        row("equal", "what IS  3 * 4", "Twelve."),
        row("another sign", "What is 3 + 4?", "7"),
        row("contains", "What is 3 * 4 in words?", "Twelve."),
        row("answer", "How many?", "Capital of France"),  # only prompts are compared
        row("zh", "Hi", "Ho", "你好吗", "很好"),  # a later prompt, too
        row("signs", "1 + 1 =", "2"),
        row("other signs", "1 - 1 =", "0"),
        row("one word of a prompt", "hello!", "Hi."),
        row("one word of an answer", "12", "A dozen."),
        row("a word of a choice", "Yes", "Good."),
        row("a choice of three words", "In the sea.", "Good."),
    ]
    rejected, report = cleaned(tmp_path, rows, evals)
    assert {*rejected} == {"equal", "zh", "signs", "one word of a prompt", "a choice of three words"}
    assert report["refused"] == {"short eval text": 5}
    (hit,) = rejected["zh"]["hits"]
    assert (hit["line"], hit["field"], hit["words"], hit["share"]) == (3, "question", 3, 1.0)
    assert (hit["text"], hit["row_text"]) == ("你好吗？", "你好吗")
    assert report["against"]["e.jsonl"] == {
        "rows": 6,
        "texts": 10,
        "too_short": 10,
        "equal_short_texts": 5,
        "rows_hit": 5,
        "refused": 5,
    }
    # with 13-grams alone, twelve words are short, too
    twelve = [{"question": text(0, 12)}]
    rows = [row("12", text(0, 12), "Ho"), row("more", f"{text(0, 12)} so", "Ho")]
    assert {*cleaned(tmp_path, rows, twelve, "--ngram_sizes", "13")[0]} == {"12"}


def test_short_texts_that_are_common_are_no_hits(tmp_path):
    evals = [{"question": f"{text(9 * n, 9)}", "prompt": "True or false?"} for n in range(11)]
    rows = [row("a", "true or false", "True")]
    assert not cleaned(tmp_path, rows, evals)[0]
    assert {*cleaned(tmp_path, rows, evals[1:])[0]} == {"a"}


def test_what_is_common_is_no_hit(tmp_path):
    form = "Answer the following multiple choice question and give only the letter of the right answer please:"
    evals = [{"q": f"{form} {text(100 * n, 9, 'q')} {form}"} for n in range(11)]
    rows = [row("form", f"{form} mine", "B"), row("question", f"{form} {text(300, 9, 'q')}", "B")]
    # 11 texts have it: left out; 9 words and 7 of the form on either side make 8-grams of their own
    rejected, report = cleaned(tmp_path, rows, evals)
    assert {*rejected} == {"question"} and report["common_left_out"] == (16 - 8 + 1) + (16 - 13 + 1)
    assert {*cleaned(tmp_path, rows, evals[:10])[0]} == {"form", "question"}  # 10 texts, 20 times
    assert {*cleaned(tmp_path, rows, evals, "--common", "11")[0]} == {"form", "question"}
    flags = "--against", write(tmp_path / "a.jsonl", evals[:6]), write(tmp_path / "b.jsonl", evals[6:])
    assert run(tmp_path / "rows.jsonl", *flags, "--out", tmp_path / "two").returncode == 0  # 6 and 5 texts of a file
    assert {one["id"] for one in lines(tmp_path / "two" / "rejected.jsonl")} == {"form", "question"}


def test_folder_with_hits_to_read(tmp_path):
    rows = [row("a", text(0, 20), "Ho"), row("b", text(5, 30), "Ho"), row("c", "Hi", "Ho")]
    one = write(tmp_path / "one.jsonl", [{"q": text(0, 30)}, {"q": text(40, 30)}, {"q": text(3, 28)}])
    (tmp_path / "two.json").write_text(json.dumps([{"q": text(200, 9)}, {"q": text(0, 18)}]))
    pq.write_table(pa.table({"q": [text(10, 20), None]}), tmp_path / "three.parquet")
    writer.write_rows(
        tmp_path / "four",
        "test",
        {"test": [row("p", text(1, 19), "Ho", chat_template_kwargs={}, source="s", tags=[], lang="en")]},
    )
    evals = [one, tmp_path / "two.json", tmp_path / "three.parquet", tmp_path / "four"]
    done = run(write(tmp_path / "rows.jsonl", rows), "--against", *evals, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["in"] == 3 and report["out"] == {"train": 1} and report["refused"] == {"eval text": 2}
    counts = {name: (one["rows"], one["rows_hit"], one["refused"]) for name, one in report["against"].items()}
    # b starts at word 5: with one it shares 25 and 26 words, with two 13, with three all, with four 15
    assert counts == {"one.jsonl": (3, 2, 2), "two.json": (2, 1, 2), "three.parquet": (1, 1, 1), "four": (1, 1, 2)}
    assert len(report["input"]) == 5
    read = (tmp_path / "out" / "hits.md").read_text()
    assert "| one.jsonl | 3 | 2 | 2 |" in read and f"> {text(0, 20)}\n" in read and f"> {text(1, 19)}\n" in read
    rejected = lines(tmp_path / "out" / "rejected.jsonl")
    assert [(one["line"], one["hits"][0]["share"], len(one["hits"])) for one in rejected] == [(1, 1.0, 4), (2, 1.0, 5)]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        ["card.md", "dataset_dict.json", "hits.md", "rejected.jsonl", "report.json", "train"]
    )


def test_processes_change_no_byte_and_rows_are_accounted_for(tmp_path, monkeypatch):
    for size in ("HEAD", "BLOCK"):
        monkeypatch.setattr(text_files, size, 3000)  # bytes: many chunks of a small file
    rng = random.Random(3)
    raw = [json.dumps(row(f"r{n}", text(rng.randrange(300), rng.randrange(3, 40)), "Ho")) for n in range(100)]
    raw[10], raw[20], raw[30] = "{cut", "[]", '{"messages": null}'
    (tmp_path / "rows.jsonl").write_text("\n".join(raw))
    evals = write(tmp_path / "e.jsonl", [{"q": text(n, 20)} for n in range(0, 300, 30)])
    for name, processes in (("one", "1"), ("two", "2")):
        flags = "--out", tmp_path / name / "out", "--num_proc", processes
        done = run(tmp_path / "rows.jsonl", "--against", evals, *flags)
        assert done.returncode == 0, done.stderr
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert files and all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)
    report = json.loads((tmp_path / "one/out/report.json").read_text())
    assert report["in"] == 100 == report["out"]["train"] + sum(report["refused"].values())
    assert report["refused"]["not JSON"] == 1 and len(report["refused"]) == 4


@pytest.mark.parametrize(
    ("evals", "flags", "said"),
    [
        ('{"q": "a text"}\n', ["--fields", "question"], "no row has the field question"),
        ('{"q": "a text"}\n{cut\n', [], "e.jsonl:2: not JSON"),
        ('{"q": 3}\n', [], "no text"),
        ('{"q": "a text"}\n', ["--match_threshold", "50"], "--match_threshold 50.0: pass a share"),
        ('{"q": "a text"}\n', ["--common", "0"], "--common 0: pass a number"),
        ('{"q": "a text"}\n', ["--ngram_sizes", "13", "--match_threshold", "0.4"], "--match_threshold: it is of"),
    ],
)
def test_bad_input(tmp_path, evals, flags, said):
    (tmp_path / "e.jsonl").write_text(evals)
    rows = write(tmp_path / "rows.jsonl", [row("a", "Hi", "Ho")])
    done = run(rows, "--against", tmp_path / "e.jsonl", "--out", tmp_path / "out", *flags)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_nothing_left(tmp_path):
    rows, evals = write(tmp_path / "r.jsonl", [row("a", text(0, 20), "Ho")]), write(tmp_path / "e.jsonl", [text(0, 20)])
    done = run(rows, "--against", evals, "--out", tmp_path / "out")
    assert done.returncode == 1 and "all 1 rows refused (1 eval text)" in done.stderr
    assert run(write(tmp_path / "n.jsonl", []), "--against", evals, "--out", tmp_path / "out").returncode == 2


@real
def test_gsm8k_train_against_test(tmp_path):
    """The rows that share 13 words with a test question, found by a search of our own over the text."""

    def plain(value):
        return " " + " ".join(re.findall("[a-z0-9]+", value.encode("ascii", "ignore").decode().lower())) + " "

    train = lines(SHARED / "data/gsm8k/train.jsonl")
    test = [plain(one["question"]) for one in lines(SHARED / "data/gsm8k/test.jsonl")]
    grams = {tuple(one.split()[n : n + 13]) for one in test for n in range(len(one.split()) - 12)}
    wanted = set()
    for number, one in enumerate(train):
        for said in (one["question"], one["answer"]):
            found = plain(said).split()
            if any(tuple(found[n : n + 13]) in grams for n in range(len(found) - 12)):
                wanted.add(f"r{number}")
    rows = write(tmp_path / "rows.jsonl", [row(f"r{n}", one["question"], one["answer"]) for n, one in enumerate(train)])
    flags = "--ngram_sizes", "13", "--fields", "question", "--out", tmp_path / "out"
    assert run(rows, "--against", SHARED / "data/gsm8k/test.jsonl", *flags).returncode == 0
    assert wanted and {entry["id"] for entry in lines(tmp_path / "out" / "rejected.jsonl")} == wanted
