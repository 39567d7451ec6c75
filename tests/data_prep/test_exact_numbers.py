"""Numbers reach training as they stand in the file: by every recipe's loader, in a lone copy, from a raw .jsonl file
and from a dataset folder. The oracle is Python's json on the lines of the file.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import trl
from datasets import load_dataset
from transformers import AutoTokenizer

from tests.helpers.runs import MODULES, REPO, load_recipe, parse

RECIPES = sorted(path for path in (REPO / "recipes").glob("*.py") if path.stem != "qwen3_apo")  # it loads pairs
VALUES = [0.7, 0.3, 0.95, 3.141592653589793, 1e-12, 1.7976931348623157e308, 5e-324, 2**53 + 1, 2**63 - 1, -(2**63)]
VALUES += [
    12345678901234567890123,
    1,
    1.0,
    0.5,
    -0.1,
    "low",
    True,
    None,
    [0.1, 2],
    {"deep": [{"x": 0.7}, {"y": "0.7"}]},
]
TOOL = {"type": "function", "function": {"name": "dim", "description": "Set it.", "parameters": {"type": "object"}}}


def chat(value):
    call = {"type": "function", "function": {"name": "dim", "arguments": {"level": value}}}
    turns = [{"role": "user", "content": "Dim it."}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    turns += [{"role": "tool", "content": "ok"}, {"role": "assistant", "content": "Done."}]
    level = {"minimum": 0.05}
    if value is not None:  # normalize takes nulls out of tools: Arrow fills them in
        level["default"] = value
    limits = {"type": "object", "properties": {"level": level}}
    tool = {"type": "function", "function": {**TOOL["function"], "parameters": limits}}
    return {"messages": turns, "tools": [tool]}


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    path = tmp_path_factory.mktemp("raw") / "rows.jsonl"
    path.write_text("".join(json.dumps(chat(value)) + "\n" for value in VALUES))
    return path


@pytest.fixture(scope="module")
def sources(raw):
    """The raw file, and the folder and the file that normalize makes of it."""
    paths = [raw]
    for name in ("set", "set.jsonl"):
        command = [sys.executable, "-m", "data_prep.normalize", "messages", raw, "--out", raw.parent / name]
        done = subprocess.run(command, env=MODULES, capture_output=True, text=True)
        assert done.returncode == 0 and "0 refused" in done.stdout, done.stderr
        paths.append(raw.parent / name)
    return paths


def parts(row):
    return [row["messages"][1]["tool_calls"][0]["function"]["arguments"], row["tools"][0]["function"]["parameters"]]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_the_numbers_of_the_file(path, sources):
    wanted = [parts(json.loads(line)) for line in sources[0].read_text().splitlines()]
    recipe = load_recipe(path)
    for source in sources:
        flags = ["--dataset_name", source, "--eval_rows", 0]
        script_args, training_args, _ = parse(path.stem, *flags)
        train, _ = recipe["load_splits"](script_args, training_args.seed)
        assert repr([parts(row) for row in train]) == repr(wanted), source


def test_an_older_cache_is_not_taken(raw, tmp_path):
    """datasets without the patch stores bent numbers in the cache of the file."""
    code = (
        "import sys; from datasets import load_dataset; print(load_dataset('json', data_files=sys.argv[1])['train'][0])"
    )
    copy = tmp_path / "again.jsonl"
    lines = raw.read_text().splitlines(keepends=True)
    copy.write_text("".join(lines[:5]))  # datasets alone cannot read the larger ones
    done = subprocess.run([sys.executable, "-c", code, copy], capture_output=True, text=True, check=True)
    assert "0.7000000000000001" in done.stdout  # else the patch is no longer needed
    script_args, training_args, _ = parse("qwen3_full", "--dataset_name", copy, "--eval_rows", 0)
    train, _ = load_recipe("qwen3_full")["load_splits"](script_args, training_args.seed)
    assert parts(train[0])[0] == {"level": 0.7} and parts(train[4])[0] == {"level": 1e-12}


class Prepared(Exception):
    pass


@pytest.mark.parametrize("num_proc", [None, 2])
def test_a_lone_copy_trains_the_tokens_of_the_file(demo, raw, tmp_path, monkeypatch, num_proc):
    """The ids are those of apply_chat_template on the file's own lines."""
    template = REPO / "chat_templates" / "qwen3.jinja"
    copy = shutil.copy(REPO / "recipes" / "qwen3_full.py", tmp_path)
    shutil.copy(template, tmp_path)
    flags = ["--use_cpu", "true", "--model_name_or_path", demo / "init", "--dataset_name", raw, "--eval_rows", 0]
    flags += ["--chat_template_path", template, "--output_dir", tmp_path / "run", "--packing", "false"]
    flags += ["--max_length", 4096, "--report_to", "none", "--eval_strategy", "no"]
    flags += ["--dataset_num_proc", num_proc] if num_proc else []
    monkeypatch.setattr(sys, "argv", [copy, *map(str, flags)])
    monkeypatch.chdir(tmp_path)
    kept = {}

    def train(trainer, **_):
        kept["ids"] = trainer.train_dataset["input_ids"][:]
        raise Prepared

    with mock.patch.object(trl.SFTTrainer, "train", train), pytest.raises(Prepared):
        load_recipe(Path(copy))["main"]()
    tokenizer = AutoTokenizer.from_pretrained(demo / "init")
    tokenizer.chat_template = template.read_text()
    wanted = []
    for line in raw.read_text().splitlines():
        row = json.loads(line)
        ids = tokenizer.apply_chat_template(row["messages"], tools=row["tools"], return_dict=True)["input_ids"]
        wanted.append(ids)
    assert [list(ids) for ids in kept["ids"]] == wanted
    assert "0.7000000000000001" not in tokenizer.decode(kept["ids"][0]) and "0.7" in tokenizer.decode(kept["ids"][0])


CASES = {  # what typed columns would change
    "a whole number beside another": [0.5, 1],
    "dates": ["2024-05-01 10:00:00", "2024-05-01T10:00:00Z"],
    "null beside true": [None, True],
}


@pytest.mark.parametrize("name", CASES)
def test_values_stay_where_all_rows_are_alike(name, tmp_path):
    """All messages, tools and template arguments have the same keys, so that datasets would give them types."""
    path = tmp_path / "alike.jsonl"
    rows = []
    for value in CASES[name]:
        row = chat(value)
        call = row["messages"][1]["tool_calls"]
        row["messages"] = [{"role": role, "content": "a", "tool_calls": call} for role in ("user", "assistant")]
        row["tools"][0]["function"]["parameters"] = {"type": "object", "properties": {"level": {"enum": [value]}}}
        row["chat_template_kwargs"] = {"at": value}
        rows.append(row)
    for text in ("".join(json.dumps(row) + "\n" for row in rows), json.dumps(rows), json.dumps(rows, indent=1)):
        path.write_text(text)
        script_args, training_args, _ = parse("qwen3_full", "--dataset_name", path, "--eval_rows", 0)
        train, _ = load_recipe("qwen3_full")["load_splits"](script_args, training_args.seed)
        assert repr(list(train)) == repr(rows)
    typed = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert name == "null beside true" or repr(list(typed)) != repr(rows)  # else JSON is no longer needed
