"""data_prep/mix.py: every strategy against counts worked by hand, random.Random, datasets' own interleaving, and a
plain-Python reading of the tutorial's script; validation that never leaks; the shipped mixes; bytes and accounting.

Each of these turns the suite red (tried): validation drawn by row instead of by prompt; weights not normalised;
duplicates kept; the last pool winning instead of the first; passes not named in ids; card shares of rows for tokens;
context and response swapped; the rejected rows of one pool numbered on from the pool before.
"""

import hashlib
import io
import json
import random
import re
import shutil
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from unittest import mock

import numpy as np
import pytest
import yaml
from datasets import Dataset, DatasetDict, interleave_datasets, load_from_disk

from data_prep import mix
from data_prep.common import writer
from tests.helpers.runs import REPO

MIXES = REPO / "data_prep" / "mixes"


def run(*args):
    """Exit code, stdout, stderr of mix.py, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with mock.patch("sys.argv", ["mix.py", *map(str, args)]), redirect_stdout(out), redirect_stderr(err):
        try:
            code = mix.main()
        except SystemExit as error:
            code = error.code
    return code, out.getvalue(), err.getvalue()


def row(name, question=None, answer="yes", lang="en", tags=(), think=None, **more):
    turns = [{"role": "user", "content": question or f"Question {name}?"}, {"role": "assistant", "content": answer}]
    if think:
        turns[1]["reasoning_content"] = think
    kwargs = {} if think is None else {"enable_thinking": bool(think)}
    out = {"id": name, "messages": turns, "chat_template_kwargs": kwargs, "source": name.split("-")[0]}
    return out | {"tags": list(tags), "lang": lang} | more


def rows_of(name, count, **more):
    return [row(f"{name}-{number}", **more) for number in range(count)]


def make(folder, **pools):
    for name, rows in pools.items():
        writer.write_rows(folder / name, "own", {"train": rows})
    return folder


def mixed(folder, sources, out="out", code=0, flags=(), **settings):
    """(train rows, validation rows, report, stdout + stderr) of a mix."""
    (folder / "mix.yaml").write_text(yaml.safe_dump(settings | {"sources": sources}))
    given = folder / "mix.yaml", "--pools", folder, "--out", folder / out, "--num_proc", 1, *flags
    done, said, errors = run(*given)
    assert done == code, errors
    if code:
        return said + errors
    sets = load_from_disk(folder / out)
    report = json.loads((folder / out / "report.json").read_text())
    rejected = [json.loads(line) for line in (folder / out / "rejected.jsonl").read_text().splitlines()]
    assert report["in"] + report.get("added", 0) == sum(report["out"].values()) + len(rejected)
    assert report["refused"] == dict(sorted(Counter(entry["reason"] for entry in rejected).items()))
    parts = [sets[split].to_list() if split in sets else [] for split in ("train", "validation")]
    for split, part in zip(("train", "validation"), parts, strict=True):
        told = (folder / out / f"{split}.jsonl").read_text().splitlines() if part else []
        found = [{k: v for k, v in one.items() if v is not None} for one in part]
        assert [json.loads(line) for line in told] == found
    return *parts, report | {"rejected": rejected}, said + errors


def counts(rows):
    return Counter(one["source"] for one in rows)


NONE = {"validation": 0}


def test_interleave_shares_order_and_names(tmp_path):
    make(tmp_path, a=rows_of("a", 100), b=rows_of("b", 300))
    sources = [{"path": "a", "weight": 0.5}, {"path": "b", "weight": 0.5}]
    train, _, report, said = mixed(tmp_path, sources, **NONE)
    assert counts(train) == {"a": 100, "b": 100} and len({one["id"] for one in train}) == 200
    assert all(abs(counts(train[:cut])["a"] - cut / 2) <= 1 for cut in range(201))  # evenly spread, not in two halves
    assert report["refused"] == {"not drawn": 200} and "used up: raise epochs" not in said
    cause = (
        "its weight 0.5 asks for 100 rows until a is used up (raise weight, epochs of a, or write stop: all_exhausted)"
    )
    assert f"200 rows of b not drawn: {cause}" in said and report["sources"][1]["not_drawn_cause"] == cause
    # 1 : 3, where b is used up after 300; and a is repeated, where both are to be
    train, *_ = mixed(tmp_path, [sources[0] | {"weight": 1}, sources[1] | {"weight": 3}], out="two", **NONE)
    assert counts(train) == {"a": 100, "b": 300}
    train, _, report, _ = mixed(tmp_path, sources, out="three", stop="all_exhausted", **NONE)
    assert counts(train) == {"a": 300, "b": 300} and report["added"] == 200
    names = Counter(one["id"].partition("@")[2] for one in train if one["source"] == "a")
    assert names == {"": 100, "2": 100, "3": 100}
    # epochs allow passes before a pool counts as used up
    train, *_ = mixed(tmp_path, [sources[0] | {"epochs": 2}, sources[1]], out="four", **NONE)
    assert counts(train) == {"a": 200, "b": 200}


def test_weights_change_the_set(tmp_path):
    """Of the tutorial's own three pools: what its script makes equal for both weight vectors."""
    pools = {"cmath": rows_of("cmath", 60), "emoji": rows_of("emoji", 90), "mawps": rows_of("mawps", 120)}
    make(tmp_path, **pools)
    made = {}
    for literal in (False, True):
        for weights in ((0.2, 0.5, 0.3), (0.9, 0.05, 0.05)):
            sources = [{"path": name, "weight": weight} for name, weight in zip(pools, weights, strict=True)]
            out = f"{literal}{weights[0]}"
            train, validation, *_ = mixed(
                tmp_path, sources, out, literal=literal, stop="all_exhausted", validation={"min": 20, "share": 0.02}
            )
            made[literal, weights[0]] = {one["id"] for one in train + validation}
            share = counts(train)["cmath"] / len(train)
            assert literal or share == pytest.approx(weights[0], abs=0.01)
    assert made[True, 0.2] == made[True, 0.9] == {one["id"] for rows in pools.values() for one in rows}


@pytest.mark.parametrize("strategy", ["interleave", "resample"])
def test_literal_is_the_tutorials_script(tmp_path, strategy):
    """Against its steps in plain Python and datasets: interleave or draw, remove equal messages, shuffle, split."""
    pools = {"a": rows_of("a", 40), "b": rows_of("b", 70) + [row("b-again", "Question b-0?")]}
    make(tmp_path, **pools)
    sources = [{"path": "a", "weight": 0.7}, {"path": "b", "weight": 0.3}]
    settings = {"literal": True, "strategy": strategy, "validation": {"min": 10, "share": 0.02}}
    train, validation, *_ = mixed(tmp_path, sources, **settings)
    sets = [
        Dataset.from_list([{"id": one["id"], "text": json.dumps(one["messages"])} for one in rows])
        for rows in pools.values()
    ]
    if strategy == "interleave":
        both = interleave_datasets(
            [one.shuffle(seed=42) for one in sets], probabilities=[0.7, 0.3], seed=42, stopping_strategy="all_exhausted"
        ).to_list()
    else:
        rng, total = np.random.default_rng(42), int(0.9 * 111)
        both = [
            sets[n][int(place)]
            for n, share in enumerate((0.7, 0.3))
            for place in rng.integers(len(sets[n]), size=round(total * share))
        ]
    seen, unique = set(), []
    for one in both:
        digest = hashlib.md5(one["text"].encode()).hexdigest()
        if digest not in seen:
            seen.add(digest)
            unique.append(one)
    shuffled = Dataset.from_list(unique).shuffle(seed=42)["id"]
    assert [one["id"] for one in validation + train] == list(shuffled)
    assert len(validation) == 10


def test_resample_counts(tmp_path):
    make(tmp_path, a=rows_of("a", 50), b=rows_of("b", 150))
    sources = [{"path": "a", "weight": 0.9}, {"path": "b", "weight": 0.1}]
    train, _, report, _ = mixed(tmp_path, sources, strategy="resample", **NONE)
    assert counts(train) == {"a": 162, "b": 18}  # 0.9 of 200 rows
    assert report["added"] == 180 - len({one["id"].partition("@")[0] for one in train})
    assert 30 < len({one["id"].partition("@")[0] for one in train if one["source"] == "a"}) <= 50  # drawn, not dealt
    train, *_ = mixed(tmp_path, sources, out="ten", strategy="resample", size=10, **NONE)
    assert counts(train) == {"a": 9, "b": 1}


def test_subsample_is_a_share_of_each_pool(tmp_path):
    twins = [
        [row(f"{mode}-{n}", f"Question {n}?", think="hm" if mode == "t" else "") for n in range(200)] for mode in "tn"
    ]
    make(tmp_path, t=twins[0], n=twins[1], c=rows_of("c", 101))
    sources = [{"path": "t", "weight": 0.3}, {"path": "n", "weight": 0.3}, {"path": "c", "weight": 0.02}]
    train, *_ = mixed(tmp_path, sources, strategy="subsample", seed=0, **NONE)
    assert counts(train) == {"t": 60, "n": 60, "c": 2}
    prompts = [{one["id"].split("-")[1] for one in train if one["source"] == mode} for mode in "tn"]
    assert prompts[0] == prompts[1]  # the same prompts: think and no_think twins stay together
    order = [one["source"] for one in train]
    assert order != sorted(order) and order != sorted(order, reverse=True)
    other, *_ = mixed(tmp_path, sources, out="seed1", strategy="subsample", seed=1, **NONE)
    assert {one["id"] for one in other} != {one["id"] for one in train}


def test_concatenate_in_order_and_nanochats_shuffle(tmp_path):
    make(tmp_path, a=rows_of("a", 30), b=rows_of("b", 20), c=rows_of("c", 5))
    sources = [{"path": "a"}, {"path": "b", "rows": 7, "shuffle": 42}, {"path": "c", "epochs": 2}]
    order = [f"a-{n}" for n in range(30)]
    order += [f"b-{n}" for n in np.random.default_rng(42).permutation(20)[:7]]
    assert order[30:] == Dataset.from_dict({"id": [f"b-{n}" for n in range(20)]}).shuffle(seed=42)["id"][:7]
    order += [f"c-{n}" for n in range(5)] + [f"c-{n}@2" for n in range(5)]
    train, *_ = mixed(tmp_path, sources, strategy="concatenate", dedup=False, **NONE)
    assert [one["id"] for one in train] == order
    # TaskMixture: all (task, row) pairs, shuffled by random.Random(42)
    random.Random(42).shuffle(order)
    train, *_ = mixed(tmp_path, sources, out="n", strategy="concatenate", shuffle="python", dedup=False, **NONE)
    assert [one["id"] for one in train] == order


def test_negative_and_zero_weights(tmp_path):
    make(tmp_path, a=rows_of("a", 50), b=rows_of("b", 50))
    sources = [{"path": "a", "weight": -2}, {"path": "b", "weight": 0.4}]
    train, _, _, said = mixed(tmp_path, sources, **NONE)
    assert counts(train) == {"b": 50} and "the weight of a is -2, counted as 0" in said
    sources[1]["weight"] = 0
    train, *_ = mixed(tmp_path, sources, out="equal", **NONE)
    assert counts(train) == {"a": 50, "b": 50}


def test_duplicates_are_kept_once_and_listed(tmp_path):
    again = row("b-again", "Question  a-1?\n")  # a blank and a newline more: the same
    other = [
        row("b-call", "Question a-1?", chat_template_kwargs={"enable_thinking": False}),
        row("b-answer", "Question a-1?", "no"),
    ]
    make(tmp_path, a=[*rows_of("a", 10), row("a-twice", "Question a-3?")], b=[again, *other, *rows_of("b", 10)])
    sources = [{"path": "a"}, {"path": "b"}]
    train, _, report, _ = mixed(tmp_path, sources, strategy="concatenate", **NONE)
    refused = [(one["file"], one["line"], one["id"], one["reason"]) for one in report["rejected"]]
    assert refused == [("a", 11, "a-twice", "duplicate in its pool"), ("b", 1, "b-again", "duplicate of another pool")]
    assert {"b-call", "b-answer"} <= {one["id"] for one in train}


def test_validation_never_shares_a_prompt_with_train(tmp_path):
    rows = [row(f"a-{n}", f"Question {n % 60}?", f"answer {n}") for n in range(240)]  # every prompt four times
    twins = [row(f"t-{n}", f"Question {n}? /think", think="hm") for n in range(30)]
    make(tmp_path, a=rows, t=twins, b=rows_of("b", 200))
    sources = [{"path": "a"}, {"path": "t"}, {"path": "b"}]
    train, validation, report, _ = mixed(tmp_path, sources, validation={"share": 0.1, "min": 0}, strategy="concatenate")

    def prompt(one):
        return one["messages"][0]["content"].replace(" /think", "")

    assert not {*map(prompt, train)} & {*map(prompt, validation)} and len(train) + len(validation) == 470
    assert 47 <= len(validation) <= 47 + 4 * 24 and {*counts(validation)} == {"a", "t", "b"}
    few, held, *_ = mixed(
        tmp_path, [{"path": "b"}], out="min", strategy="concatenate", validation={"share": 0.02, "min": 100}
    )
    assert (len(few), len(held)) == (100, 100)  # max(100, 2%)
    said = mixed(tmp_path, [{"path": "t"}], out="all", code=2)
    assert "100 of 30 rows would be held out" in said


def test_where_and_the_exhausted_pool(tmp_path):
    rows = [row(f"a-{n}", lang="zh" if n % 4 else "en", tags=["x"] if n % 2 else []) for n in range(80)]
    make(tmp_path, a=rows, b=rows_of("b", 10))
    sources = [{"path": "a", "where": {"lang": "zh", "tags": ["x", "y"]}}, {"path": "b"}]
    train, _, report, said = mixed(tmp_path, sources, size=40, **NONE)
    assert counts(train) == {"a": 20, "b": 10}
    assert all(one["lang"] == "zh" and one["tags"] == ["x"] for one in train if one["source"] == "a")
    assert report["refused"] == {"not asked for": 40, "not drawn": 20}
    told = {one["name"]: one for one in report["sources"]}
    assert told["b"]["note"].startswith("used up") and told["b"]["share"] == pytest.approx(1 / 3, abs=1e-6)
    assert re.search(r"b .*33\.33% +50\.00% +used up", said)


def test_by_tokens_and_the_card(tmp_path, demo):
    """Tokens and mask against transformers' apply_chat_template on the rows that came out."""
    from transformers import AutoTokenizer

    long = [row(f"long-{n}", f"Question {n}?", "word " * (40 + n % 7)) for n in range(150)]
    short = [row(f"short-{n}", answer="ok", think="hm hm") for n in range(600)]
    make(tmp_path, long=long, short=short)
    template = REPO / "chat_templates" / "qwen3.jinja"
    flags = ["--model_name_or_path", demo / "init", "--chat_template_path", template]
    sources = [{"path": "long", "weight": 0.3}, {"path": "short", "weight": 0.7}]
    train, _, report, _ = mixed(tmp_path, sources, by="tokens", flags=flags, **NONE)
    tokenizer = AutoTokenizer.from_pretrained(demo / "init")
    found = {"long": [], "short": []}
    for one in train:
        how = {"chat_template": template.read_text(), "return_dict": True, "return_assistant_tokens_mask": True}
        out = tokenizer.apply_chat_template(one["messages"], **how, **one["chat_template_kwargs"])
        found[one["source"]].append((len(out["input_ids"]), sum(out["assistant_masks"])))
    sums = {name: np.array(pairs).sum(0) for name, pairs in found.items()}
    share = sums["long"][0] / (sums["long"][0] + sums["short"][0])
    assert share == pytest.approx(0.3, abs=0.01)
    told = {one["name"]: one for one in report["sources"]}
    assert told["long"]["share"] == pytest.approx(share, abs=1e-6) and told["long"]["tokens"] == sums["long"][0]
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in (tmp_path / "out" / "card.md").read_text().splitlines()
        if line.startswith("| ")
    ]
    table = {line[0]: dict(zip(cells[0], line, strict=True)) for line in cells[1:4]}
    for name, mode in (("long", "no_think"), ("short", "think")):
        total, trained, rows = *sums[name], len(found[name])
        assert table[name] == {
            "source": name,
            "mode": mode,
            "rows": f"{rows:,}",
            "% rows": f"{rows / len(train):.1%}",
            "tokens": f"{total:,}",
            "% tokens": f"{total / sum(s[0] for s in sums.values()):.1%}",
            "tokens/row": f"{total / rows:,.1f}",
            "in context": f"{(total - trained) / rows:,.1f}",
            "in response": f"{trained / rows:,.1f}",
            "turns": "2.0",
        }
    assert table["all"]["rows"] == f"{len(train):,}"
    mean = np.mean([sums[name][0] / len(found[name]) for name in found])
    assert f"{mean:,.1f} tokens a row" in (tmp_path / "out" / "card.md").read_text()


def test_template_arguments_of_the_mix(tmp_path):
    own = row("a-1", chat_template_kwargs={"train_turns": "all"})
    make(tmp_path, a=[row("a-0"), own, row("a-2", think="hm")])
    given = {"train_turns": "last", "x": 1}
    train, *_ = mixed(tmp_path, [{"path": "a"}], strategy="concatenate", chat_template_kwargs=given, **NONE)
    wanted = [given, {"train_turns": "all", "x": 1}, given | {"enable_thinking": True}]
    assert [one["chat_template_kwargs"] for one in train] == wanted


def test_rows_that_the_template_refuses_are_counted(tmp_path, demo):
    told = [row("b-1", think="hm") | {"chat_template_kwargs": {"enable_thinking": False}}]  # reasoning without thinking
    make(tmp_path, a=rows_of("a", 20), b=[*told, *rows_of("c", 20)])
    flags = ["--model_name_or_path", demo / "init", "--chat_template_path", REPO / "chat_templates" / "qwen3.jinja"]
    train, _, report, _ = mixed(tmp_path, [{"path": "a"}, {"path": "b"}], by="tokens", flags=flags, **NONE)
    refused = [(one["file"], one["line"], one["id"], one["reason"]) for one in report["rejected"]]
    assert ("b", 1, "b-1", "template refuses the row") in refused and len(train) >= 38


def test_the_same_bytes_with_any_number_of_processes(tmp_path):
    make(tmp_path, a=rows_of("a", 12000), b=rows_of("b", 3000))
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump({"sources": [{"path": "a"}, {"path": "b", "weight": 0.5}]}))
    for out, number in (("one/m", 1), ("two/m", 2)):
        assert run(tmp_path / "mix.yaml", "--pools", tmp_path, "--out", tmp_path / out, "--num_proc", number)[0] == 0
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) >= 10
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)
    assert (
        load_from_disk(tmp_path / "one" / "m")["train"]._fingerprint
        == load_from_disk(tmp_path / "two" / "m")["train"]._fingerprint
    )


def test_an_interrupted_mix_leaves_nothing(tmp_path):
    """Nor the folders that OUT was to lie in, unless others have written there meanwhile."""
    make(tmp_path, a=rows_of("a", 300))
    before = {*tmp_path.iterdir()} | {tmp_path / "mix.yaml"}
    for out in ("out", "new/deep/out"):
        with mock.patch.object(mix, "make_card", side_effect=KeyboardInterrupt):
            assert "interrupted: nothing was written" in mixed(tmp_path, [{"path": "a"}], out=out, code=130)
        assert {*tmp_path.iterdir()} == before
        mixed(tmp_path, [{"path": "a", "rows": 1, "where": {"lang": "xx"}}], out=out, code=1)
        mixed(tmp_path, [{"path": "a", "split": "none"}], out=out, code=2)
        mixed(tmp_path, [{"path": "a"}], out=f"{out}/{'x' * 250}", code=2)  # too long a name: it cannot be written
        assert {*tmp_path.iterdir()} == before

    def write_beside(*_):
        (tmp_path / "new" / "other").touch()
        raise KeyboardInterrupt

    with mock.patch.object(mix, "make_card", write_beside):
        mixed(tmp_path, [{"path": "a"}], out="new/deep/out", code=130)
    assert [*(tmp_path / "new").iterdir()] == [tmp_path / "new" / "other"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sources: []", ["names no sources"]),
        ("a: [", ["not YAML"]),
        ("sources: [{path: a, wieght: 1}]", ["source 1", "wieght", "weight"]),
        ("strategie: x\nsources: [{path: a}]", ["strategie", "strategy"]),
        ("strategy: blend\nsources: [{path: a}]", ["blend", "interleave, resample"]),
        ("sources: [{path: nowhere}]", ["nowhere", "no dataset folder", "--pools"]),
        ("sources: [{path: a, weight: much}]", ["source 1", "weight", "'much'"]),
        ("sources: [{path: a}, {path: a}]", ["two sources are called a"]),
        ("sources: [{path: a, split: test}]", ["no split test", "train"]),
        ("strategy: subsample\nsources: [{path: a, weight: 2}]", ["subsample", "at most 1"]),
        ("by: tokens\nsources: [{path: a}]", ["--recipe"]),
        ("literal: true\nstrategy: subsample\nsources: [{path: a}]", ["literal"]),
        ("validation: {rows: 3}\nsources: [{path: a}]", ["validation", "rows is no option", "share, min"]),
        ("sources: [{path: a, where: {color: red}}]", ["where", "color"]),
        ("seed: x\nsources: [{path: a}]", ["seed", "whole number"]),
    ],
)
def test_bad_mixes_get_one_sentence(tmp_path, text, words):
    make(tmp_path, a=rows_of("a", 10))
    (tmp_path / "mix.yaml").write_text(text)
    code, out, err = run(tmp_path / "mix.yaml", "--pools", tmp_path, "--out", tmp_path / "out")
    assert code == 2 and err.count("\n") == 1 and not out and all(word in err for word in words), err
    assert not (tmp_path / "out").exists() and not [*tmp_path.glob(".*")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1\nsize: 20\nseed: 2\nsources: [{path: a}]", ["mix.yaml:3: seed stands twice"]),
        ("sources:\n- path: a\n  weight: 1\n  weight: 2", ["mix.yaml:4: weight stands twice"]),
        ("chat_template_kwargs: {a: {b: 1, b: 2}}\nsources: [{path: a}]", ["mix.yaml:1: b stands twice"]),
        (
            "chat_template_kwargs: {today: 2024-01-02}\nsources: [{path: a}]",
            ["mix.yaml: chat_template_kwargs: today is 2024-01-02", "put it in quotes"],
        ),
        ("chat_template_kwargs: {at: [{x: 2024-01-02 10:00:00}]}\nsources: [{path: a}]", ["at: x is", "in quotes"]),
        ("chat_template_kwargs: {on: 1}\nsources: [{path: a}]", ["chat_template_kwargs: True is no text", "in quotes"]),
        ("chat_template_kwargs: {x: !!binary aGk=}\nsources: [{path: a}]", ["chat_template_kwargs: x is", "in quotes"]),
        ("chat_template_kwargs: {x: [.nan]}\nsources: [{path: a}]", ["chat_template_kwargs: x is nan", "no such"]),
        ("chat_template_kwargs: &a {x: *a}\nsources: [{path: a}]", ["mix.yaml: nested too deep"]),
        (
            "chat_template_kwargs: {train_turn: last}\nsources: [{path: a}]",
            ["mix.yaml: chat_template_kwargs: no template", "did you mean train_turns?"],
        ),
        (
            "chat_template_kwargs: {enable_thinking: 'false'}\nsources: [{path: a}]",
            ["mix.yaml: chat_template_kwargs: enable_thinking is", "true or false"],
        ),
        ("validation: {share: 1.2}\nsources: [{path: a}]", ["mix.yaml: validation: share is 1.2", "at most 1"]),
        ("validation: {share: -0.1}\nsources: [{path: a}]", ["mix.yaml: validation: share is -0.1", "at least 0"]),
        ("validation: {min: -1}\nsources: [{path: a}]", ["mix.yaml: validation: min is -1", "at least 0"]),
        ("validation: {share: .nan}\nsources: [{path: a}]", ["mix.yaml: validation: share is nan", "a number"]),
        ("validation: {min: 10}\nsources: [{path: a}]", ["mix.yaml: validation: 10 of 10 rows would be held out"]),
        ("validation: {share: 1}\nsources: [{path: a}]", ["mix.yaml: validation: 10 of 10 rows would be held out"]),
        ("validation: {min: 1}\nsources: [{path: twice}]", ["mix.yaml: validation: rows of one prompt would all be"]),
        ("validation: 5\nsources: [{path: a}]", ["mix.yaml: validation is 5", "{share: …, min: …} or 0"]),
        ("validation: {shares: 0.1}\nsources: [{path: a}]", ["validation: shares is no option", "nearest is share"]),
        ("sources: [{path: a, wieght: 1}]", ["source 1: wieght is no option", "the nearest is weight"]),
        ("source: [{path: a}]", ["source is no option", "the nearest is sources"]),
        ("strategy: interleaved\nsources: [{path: a}]", ["strategy is 'interleaved'", "the nearest is interleave"]),
        ("stop: all_exausted\nsources: [{path: a}]", ["stop is 'all_exausted'", "the nearest is all_exhausted"]),
        ("by: token\nsources: [{path: a}]", ["by is 'token'", "the nearest is tokens"]),
        ("sources: [{path: a, where: {tag: x}}]", ["where knows source, tags", "not tag, the nearest is tags"]),
        ("sources: [{path: a, where: {mode: nothink}}]", ["where mode is nothink", "the nearest is no_think"]),
        ("sources: [{path: a, where: {lang: []}}]", ["where lang names no value"]),
        ("sources: [{path: a, where: {lang: 2024-01-02}}]", ["where lang is", "in quotes"]),
        ("sources: [{path: 2024}]", ["source 1: path is 2024, it must be text, in quotes"]),
        ("sources: [{path: a, shuffle: -1, rows: 3}]", ["source 1: shuffle is -1", "at least 0"]),
    ],
)
def test_slips_in_the_yaml(tmp_path, text, words):
    """Each is named with its file, and with what was most likely meant."""
    make(tmp_path, a=rows_of("a", 10), twice=[row("b-1", "Question?", "yes"), row("b-2", "Question?", "no")])
    (tmp_path / "mix.yaml").write_text(text)
    code, out, err = run(tmp_path / "mix.yaml", "--pools", tmp_path, "--out", tmp_path / "out")
    assert code == 2 and err.count("\n") == 1 and not out and all(word in err for word in words), err
    assert err.startswith(f"{tmp_path / 'mix.yaml'}:") and not (tmp_path / "out").exists()


def test_what_yaml_repeats_by_itself_is_no_slip(tmp_path):
    """A merge key brings names that stand there again, to be replaced; names may stand again in another mapping."""
    make(tmp_path, a=rows_of("a", 10), b=rows_of("b", 10))
    text = "sources:\n- &first {path: a, weight: 1}\n- {<<: *first, path: b, name: b}\nvalidation: 0\n"
    (tmp_path / "mix.yaml").write_text(
        text + "chat_template_kwargs: {x: 1, y: {x: null}, z: [1.5, true, '2024-01-02']}"
    )
    code, _, err = run(tmp_path / "mix.yaml", "--pools", tmp_path, "--out", tmp_path / "out")
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [(one["name"], one["weight"]) for one in report["sources"]] == [("a", 1), ("b", 1)]


SMOLLM3 = {
    "smollm3_instruct": 66_227,
    "smollm3_thinking": 30_328,
    "smollm3_hybrid": 96_555,
    "smollm3_hybrid_ifthink": 124_772,
    "smollm3_mid": 4_779_894,
    "smollm3_mid_nvidia": 3_644_790,
    "smollm3_mid_openthoughts": 1_135_104,
}
SHIPPED = {
    "day2_4080",
    "smollm3_instruct",
    "smollm3_thinking",
    "smollm3_hybrid",
    "smollm3_hybrid_ifthink",
    "smollm3_mid",
    "smollm3_mid_nvidia",
    "smollm3_mid_openthoughts",
    "smollm3_final",
    "nanochat_mid",
    "nanochat_sft",
    "nanochat_current",
    "blossom_stage1",
    "blossom_stage2",
    "step35",
    "tool_calls",
    "json_output",
    "demo",
}


def test_shipped_mixes_are_all_here():
    assert {path.stem for path in MIXES.glob("*.yaml")} == SHIPPED


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_shipped_mix(tmp_path, name):
    """Each builds from small pools of its names, with the shares that its source publishes."""
    given = yaml.safe_load((MIXES / f"{name}.yaml").read_text())
    pools = {}
    for source in given["sources"]:
        where = source.get("where", {})
        more = {"lang": where.get("lang", "en")}
        prefix = f"{source['path'].split('/')[-1]}{len(pools.get(source['path'], []))}"
        made = rows_of(prefix, 200, **more)
        pools.setdefault(source["path"], []).extend(one | {"source": where.get("source", prefix)} for one in made)
    for path, rows in pools.items():
        writer.write_rows(tmp_path / path, "own", {"train": rows})
    code, out, err = run(MIXES / f"{name}.yaml", "--pools", tmp_path, "--out", tmp_path / "out", "--num_proc", 1)
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    found = {one["name"]: one for one in report["sources"]}
    if name == "day2_4080":
        assert [round(found[n]["share"], 2) for n in ("cmath", "emoji", "mawps")] == [0.2, 0.5, 0.3]
    if name == "smollm3_final":
        assert found["smoltalk2/OpenThoughts3_1.2M_think"]["train"] == 4 and len(found) == 25
        assert found["smoltalk2/OpenHermes_2.5_no_think"]["train"] == 100
    if name in SMOLLM3:  # rows of each split as the playbook publishes them, in the comments of the file
        text = (MIXES / f"{name}.yaml").read_text()
        told = [int(number.replace(",", "")) for number in re.findall(r"# ([\d,]+) rows$", text, re.MULTILINE)]
        assert sum(told) == SMOLLM3[name] and len(told) == len(given["sources"])
    if name == "nanochat_mid":
        assert found["identity"]["train"] == 400
    if name == "nanochat_current":
        assert [found[path]["train"] for path in ("smol_smoltalk", "mmlu_aux", "gsm8k")] == [200, 600, 800]
    if name == "tool_calls":
        assert sum(source["train"] for source in found.values()) == 3 * 200 - 100
    if name == "json_output":
        shares = [round(found[path]["share"], 1) for path in ("hermes_json", "nulls", "words")]
        assert shares == [0.7, 0.1, 0.2]
    if name == "step35":
        rows = [one["id"] for one in map(json.loads, (tmp_path / "out" / "train.jsonl").read_text().splitlines())]
        assert rows == [one["id"] for one in pools["step35"]]


def test_the_card_counts_the_sources_that_rows_name(tmp_path):
    """Blossom's balance: rows of one pool by their own source, worked by hand, those of validation left out."""
    made = rows_of("w", 60) + rows_of("r", 20)
    named = [row | {"source": "WildChat" if number < 60 else "Ruozhiba"} for number, row in enumerate(made)]
    writer.write_rows(tmp_path / "blossom", "own", {"train": named})
    (tmp_path / "mix.yaml").write_text("strategy: concatenate\nvalidation: 0\nsources: [{path: blossom}]\n")
    code, _, err = run(tmp_path / "mix.yaml", "--pools", tmp_path, "--out", tmp_path / "out", "--num_proc", 1)
    assert code == 0, err
    card = (tmp_path / "out" / "card.md").read_text()
    table = card.split("| source of the rows | rows | % rows |\n|---|---|---|\n")[1]
    assert table == "| WildChat | 60 | 75.0% |\n| Ruozhiba | 20 | 25.0% |\n"
    # many sources: the most frequent, and the rest in one line
    many = [row | {"source": f"s{min(number, 45):02}"} for number, row in enumerate(rows_of("m", 50))]
    writer.write_rows(tmp_path / "many", "own", {"train": many})
    (tmp_path / "mix.yaml").write_text("strategy: concatenate\nvalidation: 0\nsources: [{path: many}]\n")
    code, _, err = run(tmp_path / "mix.yaml", "--pools", tmp_path, "--out", tmp_path / "more", "--num_proc", 1)
    assert code == 0, err
    lines = (tmp_path / "more" / "card.md").read_text().split("% rows |\n|---|---|---|\n")[-1].splitlines()
    assert lines[0] == "| s45 | 5 | 10.0% |" and len(lines) == 41 and lines[-1] == "| 6 others | 6 | 12.0% |"


def test_interleave_goes_on_with_the_rest(tmp_path):
    """Worked by hand: 1 of a to 1 of b to 2 of c until c is used up, then one to one, then what a has left."""
    for name, count in (("a", 8), ("b", 5), ("c", 4)):
        writer.write_rows(tmp_path / name, "own", {"train": rows_of(name, count)})
    sources = [{"path": "a", "weight": 1}, {"path": "b", "weight": 1}, {"path": "c", "weight": 2}]
    options = {"strategy": "interleave", "stop": "each_exhausted", "validation": 0, "sources": sources}
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(options))
    code, _, err = run(tmp_path / "mix.yaml", "--pools", tmp_path, "--out", tmp_path / "out", "--num_proc", 1)
    assert code == 0, err
    train = load_from_disk(tmp_path / "out")["train"]
    order = "".join(row_id[0] for row_id in train["id"])
    # a row's time is its middle over its share: c at 1, 3, 5, 7, a and b at 2, 6, 10, …; of equal ones a is first
    assert order == "cabccabc" + "ab" * 3 + "aaa"
    assert len(set(train["id"])) == 8 + 5 + 4
    for more, words in (({"size": 9}, "size is not read by interleave"), ({"literal": True}, "stop is not read by")):
        (tmp_path / "mix.yaml").write_text(yaml.safe_dump(options | more))
        code, _, err = run(tmp_path / "mix.yaml", "--pools", tmp_path, "--out", tmp_path / "no", "--num_proc", 1)
        assert code == 2 and words in err


# -- every option of every strategy works or is refused ---------------------------------------------------------------
OPTIONS = {
    "size": 40,
    "stop": "all_exhausted",
    "shuffle": "python",
    "dedup": False,
    "seed": 7,
    "validation": {"share": 0.3, "min": 0},
    "pool_validation": "leave",
    "chat_template_kwargs": {"enable_thinking": True},
}
SOURCE_OPTIONS = {
    "weight": 0.3,
    "epochs": 1.5,
    "rows": 20,
    "shuffle": 3,
    "where": {"tags": "x"},
    "split": "other",
}
REFUSED = {  # what a strategy has no place for; everything else must change what comes out
    ("interleave", "literal"): {"size", "shuffle", "dedup", "pool_validation", "epochs"},
    ("resample", "literal"): {"size", "shuffle", "dedup", "pool_validation", "epochs", "stop"},
    ("interleave", ""): set(),
    ("resample", ""): {"stop", "epochs"},
    ("subsample", ""): {"size", "stop"},
    ("concatenate", ""): {"stop", "weight"},
}


@pytest.fixture(scope="module")
def two_sets(tmp_path_factory):
    """a and b, a with a validation split and another one, and with rows that b repeats."""
    folder = tmp_path_factory.mktemp("sets")
    a = rows_of("a", 60)
    for number, one in enumerate(a):
        one["tags"] = ["x"] if number % 2 else []
    same = [row(f"b-same-{number}", f"Question a-{number}?") for number in range(10)]
    splits = {"train": a, "validation": rows_of("a-held", 12), "other": rows_of("a-other", 30)}
    writer.write_rows(folder / "a", "own", splits)
    writer.write_rows(folder / "b", "own", {"train": rows_of("b", 90) + same})
    return folder


def result_of(folder, out, settings, **source):
    """(exit code, stderr, what came out) of a mix of a and b."""
    sources = [{"path": "a", "weight": 0.6} | source, {"path": "b", "weight": 0.4}]
    if settings["strategy"] == "concatenate":
        sources = [{"path": "a"} | source, {"path": "b"}]
    text = yaml.safe_dump(settings | {"sources": sources})
    (out.with_suffix(".yaml")).write_text(text)
    code, _, err = run(out.with_suffix(".yaml"), "--pools", folder, "--out", out, "--num_proc", 1)
    if code:
        return code, err, None
    lines = [(out / name).read_text() for name in ("train.jsonl", "validation.jsonl") if (out / name).is_file()]
    return code, err, lines


@pytest.mark.parametrize(("strategy", "kind"), REFUSED)
def test_every_option_works_or_is_refused(two_sets, tmp_path, strategy, kind):
    base = {"strategy": strategy, "validation": {"share": 0.1, "min": 0}}
    if kind:
        base["literal"] = True
    code, err, before = result_of(two_sets, tmp_path / "base", base)
    assert code == 0, err
    refused = set()
    for scope, options in (("mix", OPTIONS), ("source", SOURCE_OPTIONS)):
        for name, value in options.items():
            settings = base | ({name: value} if scope == "mix" else {})
            source = {name: value} if scope == "source" else {}
            if kind and name == "pool_validation":
                settings[name] = "use"
            if kind and name == "stop":  # the tutorial's script repeats until all are used up
                settings[name] = "first_exhausted"
            compared = before
            if scope == "source" and name == "shuffle":  # says which rows are the first ones
                source["rows"] = 20
                compared = result_of(two_sets, tmp_path / "first", base, rows=20)[2]
            code, err, after = result_of(two_sets, tmp_path / f"{scope}-{name}", settings, **source)
            if code:
                assert code == 2 and f"{name} is not read by" in err and err.count("\n") == 1, err
                refused.add(name)
            else:
                assert after != compared, f"{name} of {strategy} {kind} changes nothing"
    assert refused == REFUSED[strategy, kind]


def test_the_shared_mix_of_subsample_with_a_size(tmp_path):
    make(tmp_path, same_prompts=rows_of("s", 90))
    said = mixed(tmp_path, [{"path": "same_prompts", "weight": 1.0}], code=2, strategy="subsample", size=30)
    assert "size is not read by subsample" in said and "change the weights instead" in said
    said = mixed(tmp_path, [{"path": "same_prompts"}], code=2, out="zero", size=0)
    assert "size is 0, it must be at least 1" in said


@pytest.mark.parametrize(("strategy", "whole", "half"), [("subsample", 40, 20), ("concatenate", 80, 40)])
def test_a_fraction_of_an_epoch_is_drawn(tmp_path, strategy, whole, half):
    """80 rows, of which subsample keeps half; 1.5 epochs are a pass and half of another, by whole rows."""
    make(tmp_path, a=rows_of("a", 80))
    source = {"path": "a", "epochs": 1.5} | ({"weight": 0.5} if strategy == "subsample" else {})
    train, _, report, _ = mixed(tmp_path, [source], strategy=strategy, **NONE)
    passes = Counter(one["id"].partition("@")[2] for one in train)
    assert passes == {"": whole, "2": half} and report["added"] == half


def test_concatenate_by_tokens_ends_at_a_size_in_tokens(tmp_path):
    """Rows of 7 and of 70 words; the size is of tokens, met as closely as whole rows can."""
    model = REPO.parent / "shared" / "tokenizers" / "qwen3"
    if not model.is_dir():
        pytest.skip("no tokenizer: ../shared is not here")
    make(tmp_path, a=rows_of("a", 40, answer="word " * 7), b=rows_of("b", 40, answer="word " * 70))
    flags = ["--recipe", REPO / "recipes" / "qwen3_qlora.py", "--model_name_or_path", model]
    settings = {"strategy": "concatenate", "by": "tokens", "size": 1500, "shuffle": "none", **NONE}
    train, _, report, said = mixed(tmp_path, [{"path": "a"}, {"path": "b"}], flags=flags, **settings)
    tokens = sum(one["tokens"] for one in report["sources"])
    assert "is not reached" not in said  # as closely as whole rows can
    assert 1500 - 60 <= tokens < 0.99 * 1500 and counts(train)["a"] == 40 and 0 < counts(train)["b"] < 40


@pytest.mark.parametrize(
    ("text", "words"),
    [  # read by the strategy, but not beside the other options
        (
            "stop: all_exhausted\nsize: 9\nsources: [{path: a, epochs: 2}]",
            ["source 1: epochs is not read", "stop: first"],
        ),
        (
            "strategy: concatenate\nvalidation: 0\nseed: 3\nsources: [{path: a}]",
            ["seed is not read", "nothing is drawn"],
        ),
        ("strategy: concatenate\nby: tokens\nsources: [{path: a}]", ["by is not read", "write size"]),
        ("sources: [{path: a, shuffle: 3}]", ["source 1: shuffle is not read by interleave", "write rows"]),
        ("strategy: resample\nsources: [{path: a, shuffle: 3}]", ["shuffle is not read by resample", "write rows"]),
        ("sources: [{path: a, where: {lang: no}}]", ["where lang is False", "quotes"]),
        ("sources: [{path: a, where: {mode: thinking}}]", ["where mode is thinking", "think, no_think"]),
        ("sources: [{path: a, rows: true}]", ["rows is True", "whole number"]),
        ("sources: [{path: a, epochs: .inf}]", ["epochs is inf", "a number"]),
        ("seed: -1\nsources: [{path: a}]", ["seed is -1", "at least 0"]),
        ("strategy: subsample\nsize: 30\nsources:\n  same_prompts: 1.0", ["size is not read by subsample"]),
    ],
)
def test_options_that_others_leave_unread_are_refused(tmp_path, text, words):
    make(tmp_path, a=rows_of("a", 10))
    (tmp_path / "mix.yaml").write_text(text)
    code, out, err = run(tmp_path / "mix.yaml", "--pools", tmp_path, "--out", tmp_path / "out")
    assert code == 2 and err.count("\n") == 1 and not out and all(word in err for word in words), err


# -- the sources' own validation splits -------------------------------------------------------------------------------
def test_own_validation_rows_are_used_and_never_trained(tmp_path):
    """A prompt of theirs in train goes to validation with all of its rows; equal rows are kept on that side."""
    train = rows_of("a", 200)
    own = [row("v-0"), row("v-1"), row("v-2", "Question a-5?", "another answer"), row("v-3", "Question a-6?")]
    writer.write_rows(tmp_path / "a", "own", {"train": train, "validation": own})
    got, validation, report, said = mixed(tmp_path, [{"path": "a"}], validation={"share": 0.1, "min": 0})
    asked = [{one["messages"][0]["content"] for one in part} for part in (got, validation)]
    assert not asked[0] & asked[1] and {"Question v-0?", "Question a-5?", "Question a-6?"} <= asked[1]
    assert report["in"] == 204 and report["refused"] == {"duplicate in its pool": 1}  # a-6 in train equals v-3
    assert {"v-0", "v-1", "v-2", "v-3", "a-5"} <= {one["id"] for one in validation}
    assert 20 <= len(validation) <= 21 and "4 of the rows to validate are the sources' own" in said
    # left out, and counted
    got, validation, report, said = mixed(
        tmp_path, [{"path": "a"}], out="left", validation={"share": 0.1, "min": 0}, pool_validation="leave"
    )
    assert report["in"] == 204 and report["refused"] == {"validation split left out": 4}
    assert "4 rows of the sources' own validation splits left out (pool_validation: use takes them)" in said
    assert not {"v-0", "v-1"} & {one["id"] for one in got + validation}
    # as where the mix has no validation, or the tutorial's, unless it is asked for
    for number, settings in enumerate((NONE, {"literal": True, "validation": {"min": 9}})):
        got, _, report, _ = mixed(tmp_path, [{"path": "a"}], out=f"none{number}", **settings)
        assert report["refused"] == {"validation split left out": 4} and not {"v-0"} & {one["id"] for one in got}
    got, validation, *_ = mixed(tmp_path, [{"path": "a"}], out="own", pool_validation="use", **NONE)
    assert {one["id"] for one in validation} == {"v-0", "v-1", "v-2", "v-3", "a-5"} and len(got) == 198
    # a split that a source names is what its rows are, for every source of the folder
    sources = [{"path": "a"}, {"path": "a", "name": "b", "split": "validation"}]
    got, validation, report, _ = mixed(tmp_path, sources, out="named", strategy="concatenate", **NONE)
    assert len(got) == 203 and not validation and report["refused"] == {"duplicate of another pool": 1}


def test_a_folder_that_stands_twice_has_its_validation_split_used_once(tmp_path):
    """By whatever path, and whichever of its splits are trained; a row is that of the first source that asks for it."""
    tongues = [row(f"v-{n}", lang="zh" if n % 2 else "en") for n in range(6)] + [row("v-ja", lang="ja")]
    splits = {"train": rows_of("a", 30), "test": rows_of("t", 30), "validation": tongues}
    writer.write_rows(tmp_path / "a", "own", splits)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    settings = {"strategy": "concatenate", "dedup": False, "validation": 0, "pool_validation": "use"}
    held_out = sorted(one["id"] for one in tongues)
    for number, second in enumerate(
        ({"path": "a"}, {"path": "./a/"}, {"path": "link"}, {"path": "a", "split": "test"})
    ):
        sources = [{"path": "a"}, second | {"name": "again"}]
        train, validation, report, _ = mixed(tmp_path, sources, out=f"out{number}", **settings)
        assert sorted(one["id"] for one in validation) == held_out and len(train) == 60
        assert report["in"] == 67 and [one["own_validation"] for one in report["sources"]] == [7, 0]
    sources = [{"path": "a", "name": lang, "where": {"lang": lang}} for lang in ("zh", "en")]
    _, validation, report, _ = mixed(tmp_path, sources, out="langs", **settings)
    assert sorted(one["id"] for one in validation) == [f"v-{n}" for n in range(6)]
    assert [one["own_validation"] for one in report["sources"]] == [3, 3]
    assert ("zh/validation", 7, "v-ja") in [(one["file"], one["line"], one["id"]) for one in report["rejected"]]


def test_splits_that_are_not_read_are_named(tmp_path):
    writer.write_rows(tmp_path / "a", "own", {"train": rows_of("a", 20), "test": rows_of("t", 7)})
    *_, report, said = mixed(tmp_path, [{"path": "a"}], **NONE)
    assert "7 rows of a/test are not read (name the split as `split` of a source)" in said
    assert report["splits_not_read"] == {"a/test": 7} and report["in"] == 20


def test_the_lines_beside_the_folder_have_its_ids(tmp_path):
    """Two files of one name give rows of the same ids: `mixed` compares folder and .jsonl row by row."""
    make(tmp_path, a=[row("train-1", "A?"), row("train-2", "B?")], b=[row("train-1", "C?"), row("train-2", "D?")])
    train, *_ = mixed(tmp_path, [{"path": "a"}, {"path": "b"}], strategy="concatenate", **NONE)
    assert [one["id"] for one in train] == ["train-1", "train-2", "train-1-2", "train-2-2"]


# -- what is not drawn is explained -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "a", "b", "undrawn", "cause"),
    [
        ({"size": 20}, {}, {}, (30, 60), "its weight 1 asks for 10 rows of size 20 (raise weight or size)"),
        ({}, {"epochs": 0.5}, {}, (20, 50), "its epochs of 0.5 allow 20 rows (raise epochs)"),
        ({}, {"weight": 0}, {}, (40, 0), "its weight 0 asks for none (raise weight)"),
        (
            {"stop": "all_exhausted"},
            {"epochs": 0.5},
            {"epochs": 0.5},
            (5, 35),
            "its weight 1 asks for 35 rows until all are used up (raise weight or epochs)",
        ),
        ({"strategy": "subsample"}, {"weight": 0.2}, {}, (32, 0), "its weight 0.2 keeps 8 rows of 40 (raise weight)"),
        (
            {"strategy": "subsample"},
            {"weight": 0.5, "epochs": 0.5},
            {},
            (30, 0),
            "its weight 0.5 and epochs 0.5 keep 10 rows (raise weight or epochs)",
        ),
        ({"strategy": "concatenate"}, {"epochs": 0.5}, {}, (20, 0), "its epochs of 0.5 take 20 rows (raise epochs)"),
        (
            {"strategy": "concatenate", "size": 15},
            {"epochs": 0.5},
            {},
            (25, 70),
            "size 15 ends before them (raise size)",
        ),
    ],
)
def test_what_is_not_drawn_has_a_number_and_a_cause(tmp_path, settings, a, b, undrawn, cause):
    """40 rows of a and 70 of b, counted by hand."""
    make(tmp_path, a=rows_of("a", 40), b=rows_of("b", 70))
    sources = [{"path": "a"} | a, {"path": "b"} | b]
    *_, report, said = mixed(tmp_path, sources, **settings, **NONE)
    assert tuple(one["not_drawn"] for one in report["sources"]) == undrawn
    assert report["sources"][0]["not_drawn_cause"] == cause
    assert f"{undrawn[0]:,} rows of a not drawn: {cause}" in said
    assert report["refused"]["not drawn"] == sum(undrawn)


def test_a_size_that_is_not_reached_is_said(tmp_path):
    make(tmp_path, a=rows_of("a", 40))
    *_, report, said = mixed(tmp_path, [{"path": "a"}], size=100, **NONE)
    assert "size 100 is not reached, the sources give 40 rows (raise epochs, or lower size)" in said
    assert report["size"] == {"asked": 100, "drawn": 40}


def test_sources_without_a_row_leave_nothing_to_train_on(tmp_path):
    """The only source with a weight has no row that is asked for."""
    make(tmp_path, a=rows_of("a", 40), b=rows_of("b", 70))
    sources = [{"path": "a", "where": {"lang": "xx"}}, {"path": "b", "weight": 0}]
    for number, settings in enumerate(({}, {"strategy": "resample"}, {"strategy": "subsample"}, {"literal": True})):
        said = mixed(tmp_path, sources, out=f"out{number}", code=1, **settings, **NONE)
        assert "no rows are left to train on" in said and not (tmp_path / f"out{number}").exists()


def test_a_folder_that_was_made_again_is_read_again(tmp_path):
    """In one process, which keeps files open."""
    for number in range(2):
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        make(tmp_path, a=rows_of(f"run{number}", 20))
        train, *_ = mixed(tmp_path, [{"path": "a"}], **NONE)
        assert counts(train) == {f"run{number}": 20}


# -- odd mixes --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "a", "b"),
    [
        ({"size": 10**11, "stop": "all_exhausted"}, {}, {}),
        ({"size": 10**30, "stop": "all_exhausted"}, {}, {}),
        ({"size": 10**11, "strategy": "resample"}, {}, {}),
        ({"size": 10**30, "strategy": "resample"}, {}, {}),
        ({}, {"epochs": 1e10}, {"epochs": 1e10}),
        ({}, {"epochs": 1e300}, {"epochs": 1e300}),
        ({"strategy": "subsample"}, {"epochs": 1e9}, {}),
        ({"strategy": "concatenate"}, {"epochs": 1e300}, {}),
        ({"stop": "all_exhausted"}, {"weight": 1e-300}, {}),
    ],
)
def test_more_rows_than_memory_holds_are_one_sentence(tmp_path, settings, a, b):
    make(tmp_path, a=rows_of("a", 20), b=rows_of("b", 20))
    said = mixed(tmp_path, [{"path": "a"} | a, {"path": "b"} | b], code=2, **settings, **NONE)
    assert re.fullmatch(r".*mix.yaml: [ab]: \S+e\+\d+ rows would be drawn of it: write a smaller size, .*\n", said), (
        said
    )


@pytest.mark.parametrize("strategy", ["interleave", "resample", "concatenate"])
def test_a_size_beyond_what_the_sources_give(tmp_path, strategy):
    """Only resample draws rows again of itself."""
    make(tmp_path, a=rows_of("a", 20), b=rows_of("b", 30))
    sources = [{"path": "a"}, {"path": "b"}]
    train, _, report, said = mixed(tmp_path, sources, strategy=strategy, size=1000, **NONE)
    drawn = 1000 if strategy == "resample" else 50
    assert len(train) == drawn and report["size"] == {"asked": 1000, "drawn": drawn}
    assert ("size 1,000 is not reached, the sources give 50 rows" in said) == (strategy != "resample")


@pytest.mark.parametrize("strategy", ["interleave", "resample"])
def test_a_source_without_rows_leaves_its_share_to_the_others(tmp_path, strategy):
    make(tmp_path, a=rows_of("a", 40), b=rows_of("b", 60))
    sources = [{"path": "a", "weight": 3, "where": {"lang": "xx"}}, {"path": "b", "weight": 1}]
    train, _, report, said = mixed(tmp_path, sources, strategy=strategy, size=20, **NONE)
    assert counts(train) == {"b": 20} and report["size"] == {"asked": 20, "drawn": 20}
    assert report["sources"][0]["note"] == "none of its rows is left to train on"
    assert "is not reached" not in said and "used up" not in said


@pytest.mark.parametrize("weights", [(0, 0), (-1, 0), (1e308, 1e308), (1e-300, 1e-300)])
@pytest.mark.parametrize("strategy", ["interleave", "resample"])
def test_equal_weights_of_any_size(tmp_path, strategy, weights):
    make(tmp_path, a=rows_of("a", 40), b=rows_of("b", 60))
    sources = [{"path": name, "weight": weight} for name, weight in zip("ab", weights, strict=True)]
    train, _, report, said = mixed(tmp_path, sources, strategy=strategy, size=20, **NONE)
    assert counts(train) == {"a": 10, "b": 10} and "Warning" not in said
    assert [one["wanted"] for one in report["sources"]] == [0.5, 0.5]
    if strategy == "interleave":
        weight = weights[0] if weights[0] > 0 else 1  # as it is counted
        assert f"30 rows of a not drawn: its weight {weight:g} asks for 10 rows of size 20" in said


def test_the_smallest_mixes(tmp_path):
    """One row; one row of two sources: a share cannot be met by half a row, and nobody has to raise epochs."""
    make(tmp_path, a=rows_of("a", 1), b=rows_of("b", 9))
    for number, strategy in enumerate(("interleave", "resample", "subsample", "concatenate")):
        train, *_ = mixed(tmp_path, [{"path": "a"}], out=f"one{number}", strategy=strategy, **NONE)
        assert [one["id"] for one in train] == ["a-0"]
    for number, strategy in enumerate(("interleave", "resample")):
        out = f"two{number}"
        train, *_, said = mixed(tmp_path, [{"path": "a"}, {"path": "b"}], out=out, strategy=strategy, size=1, **NONE)
        assert len(train) == 1 and "used up" not in said
    assert (
        "9 rows of b not drawn: its weight 1 asks for 0 rows of size 1 (raise weight or size)"
        in mixed(tmp_path, [{"path": "a"}, {"path": "b"}], out="none", size=1, **NONE)[3]
    )
    said = mixed(tmp_path, [{"path": "b", "epochs": 0.01}], out="part", code=1, **NONE)
    assert "no rows are left to train on: see size, and where, rows, weight and epochs of its sources" in said


def test_a_folder_without_a_row_is_named(tmp_path):
    make(tmp_path, a=rows_of("a", 10))
    DatasetDict({"train": load_from_disk(tmp_path / "a")["train"].select([])}).save_to_disk(tmp_path / "none")
    said = mixed(tmp_path, [{"path": "a"}, {"path": "none"}], code=2, **NONE)
    assert (
        said == f"{tmp_path / 'none'}: holds no rows, or a split of it none, which datasets cannot load: leave it out\n"
    )
