"""data_prep/dedup.py and ngrams.py: which rows are the same, against brute force over all pairs, values worked by hand,
and pools, splits and processes.

Each of these turns the suite red (tried): pools read in reverse; the last of equal rows kept; tools and template
arguments left out of what is near; Chinese in words; a threshold of 0.9 of itself; one band only; rows compared with
the first of a cluster only; n-grams without order; /think kept in a prompt; by prompt taken for by whole, in keys or in
n-grams; reasoning not compared; every duplicate said to be of its own pool.
"""

import json
import random
import re
from functools import partial
from itertools import combinations

import pytest

from data_prep import dedup
from data_prep.common import text_files, writer
from data_prep.common.ngrams import split_words
from tests.helpers.runs import run_script

run = partial(run_script, dedup)


def row(row_id, *said, **more):
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]
    return {"id": row_id, "messages": turns, **more}


def write(path, rows):
    text = (one if isinstance(one, str) else json.dumps(one) for one in rows)
    path.write_text("".join(line + "\n" for line in text), encoding="utf-8")
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def deduped(tmp_path, rows, *flags):
    """(ids that stay, rejected entries, report) of rows in one file."""
    done = run(write(tmp_path / "rows.jsonl", rows), "--out", tmp_path / "out.jsonl", *flags)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.report.json").read_text())
    return [one["id"] for one in lines(tmp_path / "out.jsonl")], lines(tmp_path / "out.rejected.jsonl"), report


TEXT = [f"word{number}" for number in range(20)]
CALLS = [{"type": "function", "function": {"name": "f"}}]


def test_words():
    assert split_words("Don't — 3.5 kg, ＡＢＣ１２!") == ["don", "t", "3", "5", "kg", "abc12"]
    assert split_words("用GPT4写诗，好 吗？") == ["用", "gpt4", "写", "诗", "好", "吗"]
    assert split_words("かな 한글 ไทย snake_case Ünïcode") == [*"かな한글ไทย", "snake", "case", "ünïcode"]


@pytest.mark.parametrize(("threshold", "bands"), [(0.8, (21, 6)), (0.5, (42, 3)), (0.95, (8, 16)), (1.0, (1, 128))])
def test_bands_catch_99_of_100(threshold, bands):
    """1 - (1 - t^r)^b, worked by hand: 0.8: r=6 catches 99.8%, r=7 98.5%."""
    assert dedup.choose_bands(threshold) == bands


def test_equal_rows(tmp_path):
    rows = [
        row("a", "Hi  there", "Café"),
        row("b", "Hi there\n", "Cafe\u0301"),  # blanks, another normal form
        row("c", "Hi there", "Café", tools=CALLS),
        row("d", "Hi there", "Café", chat_template_kwargs={"enable_thinking": False}),
        row("e", "hi there", "Café"),  # equal to near comparison only
        row("f", "Hi there", "Café", tools=CALLS),
    ]
    kept, rejected, report = deduped(tmp_path, rows, "--exact")
    assert kept == ["a", "c", "d", "e"]
    assert [(one["id"], one["repeats"], one["similarity"]) for one in rejected] == [
        ("b", {"file": "rows.jsonl", "line": 1, "id": "a"}, 1.0),
        ("f", {"file": "rows.jsonl", "line": 3, "id": "c"}, 1.0),
    ]
    assert report["refused"] == {"duplicate in its pool": 2} and report["in"] == 6
    (tmp_path / "out.jsonl").unlink()
    kept, rejected, report = deduped(tmp_path, rows)
    assert kept == ["a", "c", "d"]
    assert report["refused"] == {"duplicate in its pool": 2, "near duplicate in its pool": 1}


def test_similarity_by_hand(tmp_path):
    """20 words have 16 5-grams; a changed last word leaves 15 of 17 in common, a changed middle one 11 of 21."""
    middle = [*TEXT[:10], "other", *TEXT[11:]]
    chinese = "从前有座山山里有座庙庙里有个老和尚讲故事"  # 20 characters, 16 different 5-grams
    rows = [
        row("a", "q", " ".join(TEXT[1:])),
        row("b", "q", " ".join([*TEXT[1:-1], "end"])),
        row("c", "q", " ".join(middle[1:])),
        row("zh", "问", chinese[1:]),
        row("zh2", "问", chinese[1:-1] + "书"),
    ]
    kept, rejected, report = deduped(tmp_path, rows)
    assert kept == ["a", "c", "zh"]
    assert [(one["id"], one["repeats"]["id"], one["similarity"]) for one in rejected] == [
        ("b", "a", round(15 / 17, 4)),
        ("zh2", "zh", round(15 / 17, 4)),
    ]
    (tmp_path / "out.jsonl").unlink()
    kept, rejected, _ = deduped(tmp_path, rows, "--threshold", "0.5")
    assert kept == ["a", "zh"]
    assert next(one["similarity"] for one in rejected if one["id"] == "c") == round(11 / 21, 4)
    (tmp_path / "out.jsonl").unlink()
    assert deduped(tmp_path, rows, "--threshold", "0.89")[0] == ["a", "b", "c", "zh", "zh2"]


def test_a_chain_is_one_cluster(tmp_path):
    """Each row shares 15 of 17 with the next; the last 12 of 20 with the first, which stays."""
    text = [f"w{n}" for n in range(23)]
    rows = [row(f"r{shift}", "q", " ".join(text[shift : shift + 20])) for shift in (0, 1, 2, 3)]
    kept, rejected, _ = deduped(tmp_path, rows, "--threshold", "0.75")
    assert kept == ["r0"]
    assert {one["repeats"]["id"] for one in rejected} == {"r0"}
    # the question is the first word: one 5-gram of 17 begins with it and is each row's own
    assert [one["similarity"] for one in rejected] == [round(15 / 19, 4), round(14 / 20, 4), round(13 / 21, 4)]


def brute(texts, threshold):
    """Places of the rows that stay: every pair compared by sets of 5-word tuples, clusters by flooding, first kept."""

    def grams(text):
        found = re.findall(r"[\u4e00-\u9fff]|[a-z0-9]+", text.lower())
        return {tuple(found[n : n + 5]) for n in range(max(1, len(found) - 4))}

    sets = [grams(text) for text in texts]
    near = {n: set() for n in range(len(texts))}
    for a, b in combinations(range(len(texts)), 2):
        if len(sets[a] & sets[b]) / len(sets[a] | sets[b]) >= threshold:
            near[a].add(b)
            near[b].add(a)
    kept, seen = [], set()
    for start in range(len(texts)):
        if start not in seen:
            kept.append(start)
            open_ones = [start]
            while open_ones:
                if (at := open_ones.pop()) not in seen:
                    seen.add(at)
                    open_ones += near[at]
    return kept


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_against_every_pair(tmp_path, threshold):
    rng, texts = random.Random(7), []
    zh = [chr(code) for code in rng.sample(range(0x4E00, 0x9FA5), 400)]
    for number in range(400):
        if texts and rng.random() < 0.6:  # an earlier one with words changed, dropped or added
            found = rng.choice(texts).split()
            for _ in range(rng.choice((0, 1, 2, 4, 8))):
                found[rng.randrange(len(found))] = rng.choice(("", f"new{rng.randrange(50)}", "two words"))
            texts.append(" ".join(found))
        elif number % 2:
            texts.append(" ".join(f"w{rng.randrange(300)}" for _ in range(rng.randrange(8, 90))))
        else:
            texts.append(" ".join(rng.choices(zh, k=rng.randrange(8, 90))))
    rows = [row(f"r{number}", *text.split(" ", 1)) for number, text in enumerate(texts)]
    kept, *_ = deduped(tmp_path, rows, "--threshold", threshold)
    wanted = {f"r{number}" for number in brute(texts, threshold)}
    assert 20 < len(wanted) < 380
    assert wanted <= {*kept}, "rows that are no duplicates were removed"
    assert len({*kept} - wanted) <= 0.01 * (400 - len(wanted)), "duplicates were missed"


def test_by_prompt(tmp_path):
    long = " ".join(TEXT)
    rows = [
        row("a", "Say hello /think", "Hello"),
        row("b", "Say hello /no_think", "Good day to you"),
        row("c", "Say hello, moon", "Hello"),
        row("d", f"{long} /think", long),
        row("e", f"{long.replace('word19', 'end')} /no_think", "No answer of many words"),  # 15 of 17 5-grams
    ]
    kept, _, report = deduped(tmp_path, rows, "--by", "prompt")
    assert kept == ["a", "c", "d"]
    assert report["refused"] == {"duplicate in its pool": 1, "near duplicate in its pool": 1}
    (tmp_path / "out.jsonl").unlink()
    assert deduped(tmp_path, rows)[0] == ["a", "b", "c", "d", "e"]


def test_reasoning_and_calls_count(tmp_path):
    long = " ".join(TEXT)
    thought = row("b", "q", long)
    thought["messages"][1]["reasoning_content"] = " ".join(f"thought{n}" for n in range(20))
    assert deduped(tmp_path, [row("a", "q", long), thought])[0] == ["a", "b"]


def test_pools_in_the_order_given(tmp_path):
    one = write(tmp_path / "one.jsonl", [row("x", "Hi", "One"), row("y", "Hi", "Two")])
    two = write(tmp_path / "two.jsonl", [row("x", "Hi", "Two"), row("z", "Hi", "Three"), row("w", "Hi", "Three")])
    assert run(two, one, "--out", tmp_path / "out").returncode == 0
    rejected = lines(tmp_path / "out" / "rejected.jsonl")
    assert [(e["file"], e["id"], e["repeats"]["file"], e["repeats"]["id"], e["reason"]) for e in rejected] == [
        ("two.jsonl", "w", "two.jsonl", "z", "duplicate in its pool"),
        ("one.jsonl", "y", "two.jsonl", "x", "duplicate of another pool"),
    ]
    # a folder is a pool as well, its train split before its validation split
    writer.write_rows(tmp_path / "made", "test", {"train": [full("a", "One")], "validation": [full("b", "One")]})
    done = run(tmp_path / "made", one, "--out", tmp_path / "again")
    assert "2 left out (1 duplicate in its pool, 1 duplicate of another pool)" in done.stdout
    assert json.loads((tmp_path / "again" / "report.json").read_text())["out"] == {"train": 2}
    assert {e["repeats"]["file"] for e in lines(tmp_path / "again" / "rejected.jsonl")} == {"made/train"}


def full(row_id, answer):
    return row(row_id, "Hi", answer, chat_template_kwargs={}, source="s", tags=[], lang="en")


def test_every_row_is_accounted_for(tmp_path):
    good = row("a", "Hi", " ".join(TEXT))
    raw = [
        "{cut",
        "[1]",
        json.dumps({"messages": []}),
        json.dumps(good),
        "null",
        json.dumps(good | {"id": "b"}),
        json.dumps(row("c", "Hi", "")),
        json.dumps(row("d", "Hi", "")),
        '{"messages": [{"role": 3}]}',
        json.dumps(row("e", "Hi", "\ud800")),
    ]
    kept, rejected, report = deduped(tmp_path, raw)
    assert kept == ["a", "c"]
    assert [(one["line"], one["repeats"]["id"]) for one in rejected if "repeats" in one] == [(6, "a"), (8, "c")]
    assert report["in"] == 10 == sum(report["out"].values()) + sum(report["refused"].values())
    assert len(rejected) == 8 and all(one["reason"] for one in rejected)


def test_processes_change_no_byte(tmp_path, monkeypatch):
    for size in ("HEAD", "BLOCK"):
        monkeypatch.setattr(text_files, size, 2000)  # bytes: many chunks of a small file
    rng = random.Random(1)
    rows = [row(f"r{n}", f"q{n}", " ".join([*TEXT[n % 9 :], f"{n % 50}"])) for n in range(100)]
    rows += rng.choices(rows, k=20)
    path = write(tmp_path / "rows.jsonl", rows)
    for name, processes in (("one", "1"), ("two", "2")):
        done = run(path, "--out", tmp_path / name / "out", "--num_proc", processes)
        assert done.returncode == 0, done.stderr
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert files and all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)
    assert "near duplicate in its pool" in json.loads((tmp_path / "one/out/report.json").read_text())["refused"]
    assert not [*tmp_path.rglob("ngrams")] and not [*tmp_path.rglob(".*.part")]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--threshold", "0"], "--threshold 0.0: pass a similarity above 0, at most 1"),
        (["--ngram_size", "0"], "--ngram_size 0: pass a number of words of at least 1"),
        (["--exact", "--threshold", "0.9"], "--threshold: --exact looks for equal rows only: leave one of the two out"),
        (["--exact", "--ngram_size", "5"], "--ngram_size: --exact looks for equal rows only: leave one of the two out"),
    ],
)
def test_bad_flags(tmp_path, flags, sentence):
    done = run(write(tmp_path / "rows.jsonl", [row("a", "Hi", "Ho")]), "--out", tmp_path / "out", *flags)
    assert (done.returncode, done.stderr) == (2, sentence + "\n")


def test_bad_input(tmp_path):
    assert run("-", "--out", tmp_path / "out").returncode == 2
    done = run(write(tmp_path / "empty.jsonl", []), "--out", tmp_path / "out")
    assert done.returncode == 2 and "no rows" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
    done = run(write(tmp_path / "bad.jsonl", ["[1]", "{cut"]), "--out", tmp_path / "out")
    assert done.returncode == 1 and "all 2 rows refused" in done.stderr and "1 not JSON" in done.stderr
    assert [entry["line"] for entry in lines(tmp_path / "out" / "rejected.jsonl")] == [1, 2]
