"""The figures of a set against figures worked out by hand, TRL's own packs and transformers' own tokens.

A tokenizer in which every byte is one token makes lengths that can be counted. Breaks tried, each seen red: a token too
many counted as cut, the share of answer tokens left out of the recommendation.
"""

import argparse
import json
import struct
import sys
from dataclasses import replace

import pytest
from transformers import Qwen3Config

from data_prep import compile, stats
from data_prep.common import gpu_cards, gpu_configs, gpu_engines, gpu_lengths, gpu_memory, recipe_settings
from data_prep.common.errors import UsageError
from eval import fit
from tests.helpers.runs import REPO

RECIPE, TEMPLATE = REPO / "recipes" / "qwen3_full.py", REPO / "chat_templates" / "chatml.jinja"
AROUND = len("user\n" + "\n" + "assistant\n" + "\n") + 4  # of a row of two turns, a control token counted as one


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tokenizer folder in which every byte is one token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {char: number for number, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    folder = tmp_path_factory.mktemp("tiny")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def look(tiny, tmp_path, monkeypatch, capsys):
    """look(lengths, *flags) measures rows whose question has one letter and whose answers have so many; returns (exit
    code, stdout, stderr, report). Or look(file, *flags)."""

    def run(data, *flags):
        if isinstance(data, list):
            rows = [
                {
                    "id": str(n),
                    "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a" * length}],
                    "chat_template_kwargs": {},
                }
                for n, length in enumerate(data)
            ]
            data = tmp_path / "rows.jsonl"
            data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        report = tmp_path / "stats.json"
        given = [data, "--recipe", RECIPE, "--json", report, "--num_proc", 1, "--eval_rows", 0]
        given += ["--model_name_or_path", tiny, "--chat_template_path", TEMPLATE, *flags]
        monkeypatch.setattr(sys, "argv", ["stats.py", *map(str, given)])
        compile.open_renderer.cache_clear()
        capsys.readouterr()
        code = stats.main()
        said = capsys.readouterr()
        return code, said.out, said.err, json.loads(report.read_text()) if report.is_file() else None

    return run


def test_figures_are_those_worked_out_by_hand(look):
    """Answers of 10, 100, 1,010 and 10,000 letters, each with its <|im_end|>; the rest of a row is 22 tokens."""
    code, out, err, report = look([10, 100, 1010, 10000])
    context = AROUND - 1 + 1  # without the <|im_end|> that is trained, with the question's letter
    assert code == 0 and report["rows"] == 4, err
    assert report["response_tokens"] == 11 + 101 + 1011 + 10001
    assert report["context_tokens"] == 4 * context
    assert report["spread"]["response"] == {
        "min": 11,
        "mean": 2781.0,
        "p50": 101,
        "p90": 10001,
        "p95": 10001,
        "p99": 10001,
        "max": 10001,
    }
    lengths = [context + n for n in (11, 101, 1011, 10001)]
    assert report["histogram"] == {"32": 1, "64": 1, "1024": 1, "8192": 1} and lengths[0] < 64 and lengths[2] >= 1024
    by_limit = {one["max_length"]: one for one in report["max_lengths"]}
    assert [*by_limit] == [512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072]
    assert by_limit[512] == {
        "max_length": 512,
        "rows_cut": 2,
        "answers_cut": 2,
        "tokens_cut": lengths[2] + lengths[3] - 1024,
        # what is left of an answer is what stands before the cut, behind the context but for the closing newline
        "response_tokens_cut": 1011 + 10001 - 2 * (512 - (context - 1)),
        "packs": 3,
        "filled": round((1024 + lengths[0] + lengths[1]) / 1536, 4),
    }
    assert by_limit[16384]["rows_cut"] == 0 and by_limit[16384]["packs"] == 1
    assert by_limit[16384]["filled"] == round(sum(lengths) / 16384, 4)


def test_a_row_of_max_length_loses_nothing(look):
    fits = 512 - AROUND - 1
    _, _, _, report = look([fits, fits + 1])
    (at_512,) = [one for one in report["max_lengths"] if one["max_length"] == 512]
    assert (at_512["rows_cut"], at_512["tokens_cut"], at_512["packs"]) == (1, 1, 2)


def test_packs_are_as_many_and_as_full_as_trls(look):
    from datasets import Dataset
    from trl.data_utils import pack_dataset

    answers = [(n * 37) % 900 + 1 for n in range(1200)]
    _, _, _, report = look(answers)
    data = Dataset.from_dict({"input_ids": [[0] * (length + AROUND + 1) for length in answers]})
    for one in report["max_lengths"][:3]:
        packs = pack_dataset(data, one["max_length"], "bfd")
        assert one["packs"] == len(packs)
        assert one["filled"] == round(sum(map(len, packs["input_ids"])) / len(packs) / one["max_length"], 4)


@pytest.mark.parametrize(
    ("lengths", "flags", "wanted"),
    [
        ([100] * 200 + [8000], [], 8192),  # 1 of 201 rows, but a quarter of the answer tokens
        ([1010] * 200 + [10], [], 2048),
        ([300] * 200 + [700], [], 512),  # 1 of 201 rows is cut, by 1% of the tokens
        ([300] * 200 + [700], ["--max_cut", 0], 1024),
        ([300] * 200 + [700], ["--keep", 1], 1024),
        ([200000], [], 131072),
    ],
)
def test_the_recommended_length_is_the_smallest_that_fits(look, lengths, flags, wanted):
    code, out, _, report = look(lengths, *flags)
    assert code == 0 and report["recommended_max_length"] == wanted
    assert report["reason"] in out and report["reason"].startswith(f"max_length {wanted:,}: ")
    assert ("too short" in report["reason"]) == (lengths == [200000])


def test_what_helps_where_the_recipe_is_too_short(look):
    """Never a --max_length that its card does not hold."""
    code, out, _, report = look([300] * 200 + [31000], "--max_length", 512, "--keep", 1, "--max_cut", 0)
    assert code == 0 and report["recommended_max_length"] == 32768
    assert "qwen3_full.py trains at max_length 512: python -m data_prep.filter --max_length" in out
    assert "python -m data_prep.expand_turns" in out and "--max_length 3" not in out
    assert "data_prep.filter" not in look([300] * 200 + [700], "--max_length", 1024)[1]


@pytest.mark.parametrize(
    ("card", "longest", "recommended", "sentence"),
    [
        (True, 3000, 2048, "a toy holds at most 3,000 tokens"),
        (True, 256, None, "a toy holds at most 256 tokens"),
        (True, 32768, 32768, "a toy holds packs of 32,768 tokens"),
        (True, "no config", 32768, "cannot be predicted: no config"),
        (False, 0, 32768, "names no single card: python -m eval.fit"),
    ],
)
def test_a_length_that_the_card_does_not_hold_is_not_recommended(
    look, monkeypatch, card, longest, recommended, sentence
):
    def predicted(*_):
        if isinstance(longest, str):
            raise UsageError(longest)
        return longest

    toy = gpu_cards.Card("toy", "toy", 1.0, 1.0, 1.0, "")
    monkeypatch.setattr(gpu_lengths, "find_recipe_card", lambda recipe: toy if card else None)
    monkeypatch.setattr(gpu_lengths, "find_longest_length", predicted)
    _, out, _, report = look([300] * 200 + [31000], "--keep", 1, "--max_cut", 0)
    assert report["recommended_max_length"] == recommended
    assert sentence in out


def test_the_card_of_a_recipe_and_what_it_runs_are_evals():
    """The oracle is eval.fit, which runs the recipe and reads TRL's dataclasses."""
    cards = {"qwen3_qlora": "RTX 4080", "qwen3_lora": "RTX 4090", "gpt_oss_lora": "H100 SXM", "qwen3_full": None}
    for name, card in cards.items():
        found = gpu_lengths.find_recipe_card(REPO / "recipes" / f"{name}.py")
        assert (found and found.name) == card
    args = argparse.Namespace(trained_share=1.0, tokens_per_row=None)
    for name in ("qwen3_qlora", "qwen3_full", "qwen3_lora"):
        recipe = str(REPO / "recipes" / f"{name}.py")
        wanted = fit.read_run(recipe, [], gpu_engines.Engine(), args).settings
        settings = recipe_settings.read_settings(recipe)
        assert gpu_lengths.make_run_settings(recipe_settings.read_defaults(recipe), settings) == wanted


@pytest.mark.long
def test_the_longest_length_fits_its_card_and_no_longer_one_does(tmp_path):
    """A model of four layers at a width of 64 on a card of 1 GiB, of which 0.8 stay for what torch does not count."""
    sizes = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 512, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1 << 20}
    Qwen3Config(**sizes, **heads).save_pretrained(tmp_path)
    recipe = str(REPO / "recipes" / "qwen3_full.py")
    settings = recipe_settings.read_settings(recipe, flags={"model_name_or_path": str(tmp_path)})
    card = gpu_cards.Card("toy", "toy", 1.0, 1.0, 1.0, "")
    longest = gpu_lengths.find_longest_length(recipe, None, settings, 1 << 20, card)
    run = gpu_lengths.make_run_settings(recipe_settings.read_defaults(recipe), settings)
    shapes = gpu_configs.load_config(str(tmp_path)).config
    for length, fits in ((longest, True), (longest * 2, False)):
        prediction = gpu_memory.predict(replace(run, max_length=length), shapes, gpu_engines.Engine())
        assert prediction.fits(card.gib) is fits
    assert gpu_lengths.find_longest_length(recipe, None, settings, longest, card) == longest


def test_a_template_of_another_family_is_named(look):
    code, _, err, report = look([5], "--chat_template_path", TEMPLATE.with_name("gemma3.jinja"))
    assert code == 0 and report["rows"] == 1
    assert "gemma3.jinja writes <start_of_turn>" in err and "it belongs to another family, pass --chat_template" in err
    code, _, err, _ = look([5], "--chat_template_path", TEMPLATE.with_name("deepseek_v3.jinja"))
    assert code == 1 and "deepseek_v3.jinja writes bos_token, which the tokenizer of" in err and "Undefined" not in err


def test_the_same_figures_on_any_number_of_processes(look, tmp_path):
    lengths = [(n * 37) % 90 + 1 for n in range(1100)]
    one, two = (look(lengths, "--num_proc", number, "--out", tmp_path / f"of{number}") for number in (1, 2))
    assert one[:2] == two[:2] and one[3] == two[3]
    for name in ("report.json", "rejected.jsonl", "lengths.png"):
        assert (tmp_path / "of1" / name).read_bytes() == (tmp_path / "of2" / name).read_bytes(), name
    head = (tmp_path / "of1" / "lengths.png").read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", head[16:]) == (900, 1000)


def test_rows_that_cannot_be_rendered_are_counted(look, tmp_path):
    rows = [
        {
            "messages": [{"role": role, "content": "x"}, {"role": "assistant", "content": "y"}],
            "chat_template_kwargs": {},
        }
        for role in ("user", "pirate", "user")
    ]
    data = tmp_path / "odd.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    picky = ["--chat_template_path", TEMPLATE.with_name("qwen3_instruct_2507.jinja")]
    code, _, err, report = look(data, *picky, "--out", tmp_path / "out")
    assert code == 0 and report["in"] == 3 and report["out"] == {"train": 2}
    assert report["refused"] == {"template refuses the row": 1} and "pirate" in err
    assert json.loads((tmp_path / "out" / "rejected.jsonl").read_text())["line"] == 2
    data.write_text(json.dumps(rows[1]) + "\n")
    code, _, err, _ = look(data, *picky)
    assert code == 1 and "no row can be rendered" in err


def test_bad_input_is_one_sentence(look, tmp_path):
    code, _, err, _ = look(tmp_path / "no.jsonl")
    assert code == 2 and err.count("\n") == 1 and "no such file" in err
    (tmp_path / "taken").mkdir()
    assert look([5], "--out", tmp_path / "taken")[0] == 2
    code, _, err, _ = look([5], "--keep", 2)
    assert code == 2 and "--keep" in err


def test_the_histogram_shows_every_row(tmp_path):
    """Answers are shorter than the shortest row; red with the edges begun at that (tried)."""
    from collections import Counter
    from unittest import mock

    from matplotlib.axes import Axes

    found = stats.Lengths()
    found.rows["length"] = Counter({23: 4, 470: 6})
    found.rows["response"] = Counter({5: 7, 60: 3})
    seen, hist = [], Axes.hist

    def counted(self, *args, **kwargs):
        out = hist(self, *args, **kwargs)
        seen.append(out[0].sum())
        return out

    with mock.patch.object(Axes, "hist", counted):
        stats.draw(found, 512, tmp_path / "lengths.png")
    assert seen == [10, 10]
