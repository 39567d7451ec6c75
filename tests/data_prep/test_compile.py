"""A compiled set is what the recipe itself would make of the rows: batches, losses, packs and masks.

The oracles are not ours: the trainer of a recipe on the messages rows, TRL's pack_dataset, transformers'
apply_chat_template, a next-fit written here, accelerate's own shards of a loader. Breaks tried,
each seen red: labels of a piece's first token kept, a row too long that does not close its pack, the id of the row
before, batches of 999 rows, the token before the one that holds a character, no look whether a text is composed (NFC),
tokens whose bytes are not the text's, held-out rows of another seed.
"""

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers

from data_prep import compile
from data_prep.common import recipe_rows, recipe_settings, rendering, tokens
from data_prep.common.fast_tokens import open_fast_path
from tests.helpers.runs import EXACT, REPO, SHARED, TINY

RECIPE, TEMPLATES = REPO / "recipes" / "qwen3_full.py", REPO / "chat_templates"
PROBE = """
import json
from pathlib import Path
from transformers import TrainerCallback

NAMES = "input_ids", "labels", "position_ids", "cu_seq_lens_q"


class Probe(TrainerCallback):
    def __init__(self, trainer):
        self.out = Path(trainer.args.output_dir, "batches.jsonl")
        self.out.write_text(json.dumps({"eval": trainer.eval_dataset["input_ids"][:]}) + chr(10))
        self.compute_loss = trainer.compute_loss
        trainer.compute_loss = self.write_batch

    def write_batch(self, model, inputs, *args, **kwargs):
        with self.out.open("a") as file:
            file.write(json.dumps({name: inputs[name].tolist() for name in NAMES}) + chr(10))
        return self.compute_loss(model, inputs, *args, **kwargs)
"""


@pytest.fixture
def make(demo, tmp_path, monkeypatch, capsys):
    """make(data, *flags) compiles in this process; (exit code, output folder, stdout + stderr)."""
    count = iter(range(100))

    def run(data, *flags, out=None, template="qwen3", model=None, recipe=RECIPE):
        out = out or tmp_path / f"compiled{next(count)}"
        given = [
            data,
            "--recipe",
            recipe,
            "--out",
            out,
            "--num_proc",
            1,
            "--model_name_or_path",
            model or demo / "init",
        ]
        given += ["--chat_template_path", TEMPLATES / f"{template}.jinja", *flags]
        monkeypatch.setattr(sys, "argv", ["compile.py", *map(str, given)])
        compile.open_renderer.cache_clear()
        capsys.readouterr()
        code = compile.main()
        said = capsys.readouterr()
        return code, out, said.out + said.err

    return run


@pytest.fixture
def train_compiled(run_recipe, demo, tmp_path):
    """train_compiled(folder, *flags) trains a compiled set with recipes/configs/compiled.yaml, as conftest's TINY."""

    def run(folder, *flags, out="run"):
        length = TINY.index("--max_length")
        tiny = TINY[:length] + TINY[length + 2 :]  # the config says null, which no flag can
        config = REPO / "recipes" / "configs" / "compiled.yaml"
        given = ["--config", config, "--dataset_name", folder, "--output_dir", tmp_path / out]
        given += ["--model_name_or_path", demo / "init", "--chat_template_path", TEMPLATES / "qwen3.jinja"]
        run_recipe("qwen3_full", *tiny, *given, *flags, defaults=False)
        return tmp_path / out

    return run


def load(folder):
    from datasets import load_from_disk

    return load_from_disk(str(folder))


def chats(count, longest=40, seed=0):
    draw = random.Random(seed)
    words = ["river", "stone", "seven", "apple", "cloud", "海盗", "e\u0301"]

    def say():
        return " ".join(draw.choices(words, k=draw.randint(1, longest)))

    turns = [[("user", say()), ("assistant", say())] * draw.randint(1, 3) for _ in range(count)]
    return [
        {"id": f"r{n}", "messages": [{"role": r, "content": c} for r, c in one], "chat_template_kwargs": {}}
        for n, one in enumerate(turns)
    ]


def save(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def by_transformers(rows, demo, template="qwen3", model=None):
    """(ids, mask) of each row by apply_chat_template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model or demo / "init")
    text = (TEMPLATES / f"{template}.jinja").read_text()
    for row in rows:
        out = tokenizer.apply_chat_template(
            row["messages"],
            tools=row.get("tools"),
            chat_template=text,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **row["chat_template_kwargs"],
        )
        yield out["input_ids"], out["assistant_masks"]


def masked(ids, mask):
    return [one if live and place else -100 for place, (one, live) in enumerate(zip(ids, mask, strict=True))]


# -- the same run -----------------------------------------------------------------------------------------------------
def test_a_run_on_the_compiled_set_is_the_run_on_the_messages(run_recipe, train_compiled, hook, demo, make):
    code, out, said = make(demo / "rows" / "chat", "--max_length", 512)
    assert code == 0, said
    flags = [*EXACT, *hook(PROBE), "--max_steps", 3]
    one = run_recipe("qwen3_full", *flags, "--packing_strategy", "bfd", "--max_length", 512, out="messages")
    other = train_compiled(out, *flags, out="compiled")
    batches = [(folder / "batches.jsonl").read_text() for folder in (one, other)]
    assert batches[0].count("\n") == 13 and batches[0] == batches[1]
    assert any(len(json.loads(line)["cu_seq_lens_q"]) > 3 for line in batches[0].splitlines()[1:]), "nothing was packed"
    logs = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (one, other)]
    losses = [[line["loss"] for line in log if "loss" in line] for log in logs]
    assert len(losses[0]) == 3 and losses[0] == losses[1]


@pytest.mark.parametrize(
    ("change", "named"),
    [({"template": "0"}, "template"), ({"tokenizer": "0"}, "tokenizer"), ({"kwargs": {}}, "special tokens")],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_a_recipe_refuses_a_set_made_with_another(train_compiled, demo, make, change, named):
    """Before weights load: the model's folder holds none here."""
    _, out, _ = make(demo / "rows" / "chat", "--max_length", 512)
    report = json.loads((out / "report.json").read_text())
    (out / "report.json").write_text(json.dumps(report | change))
    with pytest.raises(ValueError, match=f"compiled with another {named} than this recipe's.*other_tokenizer"):
        train_compiled(out)


def test_another_template_is_really_seen(train_compiled, demo, make):
    _, out, _ = make(demo / "rows" / "chat", "--max_length", 512)
    flags = ["--chat_template_path", TEMPLATES / "chatml.jinja"]
    with pytest.raises(ValueError, match="compiled with another template than"):
        train_compiled(out, *flags)
    train_compiled(out, *flags, "--allow", "other_tokenizer", "--max_steps", 1)


def test_a_recipe_without_the_settings_of_compiled_sets_refuses_one(run_recipe, demo, make):
    _, out, _ = make(demo / "rows" / "chat", "--max_length", 512)
    with pytest.raises(ValueError, match="is a compiled set: --config recipes/configs/compiled.yaml"):
        run_recipe("qwen3_full", "--dataset_name", out)


def test_a_recipe_of_compiled_sets_names_no_mask_and_no_length(tmp_path, demo, make):
    """Left to its DEFAULTS, every token would be trained."""
    data = save(tmp_path / "x.jsonl", chats(20))
    recipe = REPO / "recipes" / "step35_sft.py"
    sequential = ["--packing_strategy", "sequential"]
    code, out, said = make(data, *sequential, "--max_length", 64, recipe=recipe)
    assert code == 2 and "pass --assistant_only_loss true" in said and said.count("\n") == 1 and not out.exists()
    code, out, said = make(data, *sequential, "--assistant_only_loss", "true", recipe=recipe)
    assert code == 2 and "pass --max_length" in said and said.count("\n") == 1 and not out.exists()
    code, out, said = make(data, *sequential, "--assistant_only_loss", "true", "--max_length", 512, recipe=recipe)
    assert code == 0 and any(-100 in labels[1:] for labels in load(out)["train"]["labels"]), said


# -- packs and masks --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
def test_packs_and_labels_are_those_of_trl(strategy, demo, tmp_path, make):
    from datasets import Dataset
    from trl.data_utils import pack_dataset

    rows = chats(1100)
    flags = ["--packing_strategy", strategy, "--max_length", 64, "--eval_rows", 0]
    code, out, said = make(save(tmp_path / "x.jsonl", rows), *flags)
    assert code == 0, said
    docs = [*by_transformers(rows, demo)]
    theirs = Dataset.from_dict(
        {
            "input_ids": [ids for ids, _ in docs],
            "labels": [[i if live else -100 for i, live in zip(ids, mask, strict=True)] for ids, mask in docs],
            "row": [[row] * len(ids) for row, (ids, _) in enumerate(docs)],
        }
    )
    theirs, ours = pack_dataset(theirs, 64, strategy), load(out)["train"]
    assert ours["input_ids"][:] == theirs["input_ids"][:] and ours["seq_lengths"][:] == theirs["seq_lengths"][:]
    packs = zip(ours["labels"], ours["ids"], theirs["labels"], theirs["row"], theirs["seq_lengths"], strict=True)
    for labels, names, expected, numbers, lengths in packs:
        start = 0
        for name, length in zip(names, lengths, strict=True):
            assert name == f"r{numbers[start]}"
            expected[start] = -100  # as the collator masks it
            start += length
        assert labels == expected
    report = json.loads((out / "report.json").read_text())
    long = [len(ids) - 64 for ids, _ in docs if len(ids) > 64]
    cut = {"rows": len(long), "tokens": sum(long), "trained": sum(sum(mask[64:]) for _, mask in docs)}
    assert report["cut"] == (cut if strategy == "bfd" else {}) and long
    assert (report["in"], report["out"], report["refused"]) == (1100, {"train": 1100}, {})


def test_sequential_packs_are_next_fit_in_order(demo, tmp_path, make):
    limit = 128
    rows = [row for pair in zip(chats(40), chats(1240, longest=4)[::31], strict=True) for row in pair]
    rows = [*rows, *chats(1240, longest=4)]
    for number, row in enumerate(rows):
        row["id"] = f"r{number}"
    flags = ["--packing_strategy", "sequential", "--max_length", limit, "--eval_rows", 0]
    code, out, said = make(save(tmp_path / "x.jsonl", rows), *flags)
    assert code == 0, said
    packs, pack, long = [], [], []
    for row, (ids, mask) in zip(rows, by_transformers(rows, demo), strict=True):
        if len(ids) > limit:
            long.append(row["id"])
            if pack:
                packs.append(pack)
            pack = []
            continue
        if sum(len(one[1]) for one in pack) + len(ids) > limit:
            packs.append(pack)
            pack = []
        pack.append((row["id"], ids, masked(ids, mask)))
    assert pack and max(len(one) for one in packs) > 2
    packs.append(pack)
    ours = load(out)["train"]
    assert ours["ids"][:] == [[name for name, _, _ in one] for one in packs]
    assert ours["input_ids"][:] == [sum((ids for _, ids, _ in one), []) for one in packs]
    assert ours["labels"][:] == [sum((labels for _, _, labels in one), []) for one in packs]
    assert ours["seq_lengths"][:] == [[len(ids) for _, ids, _ in one] for one in packs]
    entries = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert [entry["id"] for entry in entries] == long and len(long) > 10
    assert {entry["reason"] for entry in entries} == {"longer than max_length"}
    report = json.loads((out / "report.json").read_text())
    assert report["in"] == 1320 == report["out"]["train"] + report["refused"]["longer than max_length"]


def test_masks_are_those_of_transformers_on_odd_rows(demo, tmp_path, make):
    """Marks that compose, emoji of several tokens, newlines that merge, blanks, answers of tools; not packed."""
    said = [
        "\nnewline first",
        "👩‍🚀",
        "e\u0301 ﬁ Né",
        " ",
        "ends 👩‍🚀",
        "\n\n\nx  \n",
        "海盗 \u0338",
        "a\u0338<b>\u0338",
        "\u0338 might compose with what stands before it",
    ]
    rows = [
        {
            "id": str(n),
            "messages": [
                {"role": "user", "content": "q" + one},
                {"role": "assistant", "content": one},
                {"role": "user", "content": one},
                {"role": "assistant", "content": one + "z"},
            ],
            "chat_template_kwargs": {},
        }
        for n, one in enumerate(said)
    ]
    for template in ("chatml", "qwen3", "qwen3_instruct_2507"):
        data, flags = save(tmp_path / "x.jsonl", rows), ["--packing", "false", "--eval_rows", 0]
        code, out, words = make(data, *flags, template=template)
        assert code == 0, words
        ours = load(out)["train"]
        expected = [*by_transformers(rows, demo, template)]
        assert ours["input_ids"][:] == [ids for ids, _ in expected]
        assert ours["labels"][:] == [masked(*one) for one in expected]


@pytest.mark.parametrize("name", ["qwen3", "llama3.2", "gpt-oss"])
def test_masks_are_those_of_transformers_with_real_tokenizers(name, demo, tmp_path, make):
    model = SHARED / "tokenizers" / name
    if not model.is_dir():
        pytest.skip("../shared is absent: the demo's tokenizer proves the same")
    rows = chats(40)
    flags = ["--packing", "false", "--eval_rows", 0]
    recipe = REPO / "recipes" / "qwen3_qlora.py"  # names no stop token of its own
    code, out, said = make(save(tmp_path / "x.jsonl", rows), *flags, model=model, template="chatml", recipe=recipe)
    assert code == 0, said
    ours, expected = load(out)["train"], [*by_transformers(rows, demo, "chatml", model)]
    assert ours["input_ids"][:] == [ids for ids, _ in expected]
    assert ours["labels"][:] == [masked(*one) for one in expected]


# -- the set ----------------------------------------------------------------------------------------------------------
def test_the_same_bytes_on_any_number_of_processes(demo, tmp_path, make):
    data = save(tmp_path / "x.jsonl", chats(2300, longest=8))
    for strategy in ("bfd", "sequential"):
        flags = ["--packing_strategy", strategy, "--max_length", 64, "--eval_rows", 100]
        folders = [make(data, *flags, "--num_proc", number)[1] for number in (1, 2)]
        names = sorted(str(p.relative_to(folders[0])) for p in folders[0].rglob("*") if p.is_file())
        assert names == sorted(str(p.relative_to(folders[1])) for p in folders[1].rglob("*") if p.is_file())
        for name in names:
            both = [(folder / name).read_bytes().replace(folder.name.encode(), b"") for folder in folders]
            assert both[0] == both[1], name
        assert load(folders[0])["train"]._fingerprint == load(folders[1])["train"]._fingerprint


def test_held_out_rows_are_those_that_the_recipe_draws(tmp_path, make):
    from datasets import load_dataset

    data = save(tmp_path / "x.jsonl", chats(200))
    _, out, _ = make(data, "--eval_rows", 20, "--seed", 7, "--packing", "false", "--max_length", 100000)
    parts = load_dataset("json", data_files=str(data))["train"].train_test_split(20, seed=7)
    sets = load(out)
    assert [name for (name,) in sets["train"]["ids"]] == parts["train"]["id"][:]
    assert [name for (name,) in sets["validation"]["ids"]] == parts["test"]["id"][:]


def test_every_row_is_accounted_for(tmp_path, make):
    rows = chats(50)
    rows[3]["messages"] = [{"role": "user", "content": "no answer"}]
    rows[9]["messages"][0]["role"] = "pirate"
    code, out, said = make(save(tmp_path / "x.jsonl", rows), "--eval_rows", 0, "--max_length", 512)
    report = json.loads((out / "report.json").read_text())
    entries = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert code == 0 and report["in"] == 50 and report["out"] == {"train": 48}, said
    assert sorted((e["line"], e["id"], e["reason"]) for e in entries) == [
        (4, "r3", "nothing to train"),
        (10, "r9", "template refuses the row"),
    ]
    assert report["refused"] == {"nothing to train": 1, "template refuses the row": 1}


def test_rows_that_lose_their_persona_are_refused(tmp_path, make):
    """As check and the recipes refuse them: a recipe sees only the tokens of a compiled set. A word in braces that the
    user's text repeats is no persona."""
    rows = chats(20)
    for number, persona in ((2, "A pirate"), (5, "A pirate"), (7, " ")):
        rows[number]["messages"].insert(0, {"role": "system", "content": persona})
    template = (TEMPLATES / "chatml.jinja").read_text()
    lossy = tmp_path / "lossy.jinja"
    lossy.write_text("{%- set messages = messages | rejectattr('role', 'equalto', 'system') | list %}" + template)
    data = save(tmp_path / "x.jsonl", rows)
    code, out, said = make(data, "--eval_rows", 0, "--max_length", 512, "--chat_template_path", lossy)
    report = json.loads((out / "report.json").read_text())
    assert code == 0 and report["out"] == {"train": 18} and report["refused"] == {"persona lost": 2}, said
    entries = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert [(one["line"], one["detail"]) for one in entries] == [
        (number, "message 0: 'A pirate' is not in the rendered text") for number in (3, 6)
    ]
    code, kept, said = make(data, "--eval_rows", 0, "--max_length", 512)
    assert code == 0 and json.loads((kept / "report.json").read_text())["refused"] == {}


def test_the_plain_path_is_named_and_gives_the_same_set(tmp_path, make, monkeypatch):
    data = save(tmp_path / "x.jsonl", chats(60))
    _, fast, said = make(data, "--eval_rows", 0, "--max_length", 64)
    assert "plain path" not in said
    monkeypatch.setattr(transformers.utils, "chat_template_utils", SimpleNamespace())
    _, plain, said = make(data, "--eval_rows", 0, "--max_length", 64)
    assert "took the plain path, which is slower (AttributeError: " in said and "_compile_jinja_template" in said
    assert load(fast)["train"].to_dict() == load(plain)["train"].to_dict()
    assert (fast / "report.json").read_bytes() == (plain / "report.json").read_bytes()


def test_what_helps_longer_rows_is_said(tmp_path, make):
    """By name, and with the number of them; never a longer --max_length."""
    data = save(tmp_path / "x.jsonl", chats(60, longest=6))
    for strategy in ("bfd", "sequential"):
        code, out, said = make(data, "--eval_rows", 0, "--packing_strategy", strategy, "--max_length", 64)
        report = json.loads((out / "report.json").read_text())
        longer = report["cut"].get("rows", 0) + report["refused"].get("longer than max_length", 0)
        assert code == 0 and longer
        assert f"{longer:,} rows are longer than max_length 64: python -m data_prep.filter" in said
    code, out, said = make(data, "--eval_rows", 0, "--packing_strategy", "bfd_split", "--max_length", 64)
    assert code == 0 and "data_prep.filter" not in said


def test_bad_input_is_one_sentence(tmp_path, make, demo):
    code, out, said = make(tmp_path / "no.jsonl")
    assert code == 2 and "no such file" in said and said.count("\n") == 1
    data = save(tmp_path / "x.jsonl", chats(5))
    code, out, said = make(data, "--eval_rows", 0)
    assert code == 0
    assert make(data, "--eval_rows", 0, out=out)[0] == 2
    code, _, said = make(out, "--eval_rows", 0)
    assert code == 2 and "tokens already" in said
    code, new, said = make(
        save(tmp_path / "y.jsonl", chats(5)), "--eval_rows", 0, "--max_length", 1, "--packing", "false"
    )
    assert code == 1 and "nothing left to train" in said and not new.exists()
    assert not [*Path(tmp_path).glob(".*.part")], "half a set is left"


def test_several_ranks_read_the_packs_in_order(demo, tmp_path, make):
    """What accelerate makes of a sequential loader: rank k of N gets packs k, k + N …"""
    from accelerate.data_loader import prepare_data_loader
    from torch.utils.data import DataLoader, SequentialSampler

    flags = ["--packing_strategy", "sequential", "--max_length", 64, "--eval_rows", 0]
    packs = load(make(save(tmp_path / "x.jsonl", chats(200, longest=6)), *flags)[1])["train"]
    names = packs["ids"][:]
    seen = []
    for rank in range(2):
        loader = DataLoader(packs, batch_size=1, sampler=SequentialSampler(packs), collate_fn=lambda rows: rows)
        shard = prepare_data_loader(loader, num_processes=2, process_index=rank, put_on_device=False)
        seen.append([rows[0]["ids"] for rows in shard])
    half = len(names) // 2
    assert [one for pair in zip(*seen, strict=True) for one in pair][: 2 * half] == names[: 2 * half]


def test_the_quick_way_is_the_careful_way(demo, tmp_path):
    """documents() with and without encodings, on the demo's rows: tools, reasoning, several turns."""
    flags = {"model_name_or_path": str(demo / "init"), "chat_template_path": str(TEMPLATES / "qwen3.jinja")}
    settings = recipe_settings.read_settings(RECIPE, flags=flags | {"eval_rows": 0})
    rows = [*recipe_rows.load_rows(demo / "rows" / "chat", settings)[0]]
    careful = [(doc.ids, doc.spans) for doc in tokens.iter_documents(rows, rendering.load_renderer(settings), settings)]
    against = rendering.load_renderer(settings)
    quick = [(d.ids, d.spans) for d in tokens.iter_documents(rows, against, settings, encodings=False)]
    assert quick == careful and open_fast_path(against).widths is not None
