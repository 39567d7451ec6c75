"""nanochat, November 2025: what both recipes train on, their optimizer and schedules, and a run from raw rows.

Compared with what our code did not compute: render_conversation, TaskMixture's stream, the schedules, Muon, AdamW and
the mean of passes written here anew from the published description, in float64 where numbers are, and published counts.

Broken once, and seen red: BOS twice; notes of the calculator left as text; output of Python trained; TRL's own packing
(short rows in the stream); labels over all tokens in SFT and masked ones in mid-training; shuffled rows; the short last
step kept; the mean over tokens instead of over passes; decay over half of the steps; the momentum's warm-up left out;
Muon's scale by the longer side; embedding and unembedding exchanged; optimizer state that a load leaves behind;
clipping at 1; preview with TRL's packs, with a last step that is not trained, or without one that is; switches of
the recipes that switch nothing; matrices orthogonalised by the pieces that FSDP2's ranks hold, and a momentum whose
warm-up a resume begins anew.
"""

import json
import math
import random
import re
import runpy
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict, load_from_disk

from tests.helpers.engines import ENGINES, curve, gap, ranks
from tests.helpers.engines import PROBE as LOOK
from tests.helpers.engines import run as run_command
from tests.helpers.runs import REPO, SHARED, launch, parse, run_script

SPECIAL = (
    "bos",
    "user_start",
    "user_end",
    "assistant_start",
    "assistant_end",
    "python_start",
    "python_end",
    "output_start",
    "output_end",
)
SPECIAL = [f"<|{name}|>" for name in SPECIAL]
OPTIMIZER = REPO / "recipes" / "optimizers" / "nanochat.py"
CPU = ["--use_cpu", "true", "--bf16", "false", "--activation_checkpointing", "false", "--disable_tqdm", "true"]
CPU += ["--save_strategy", "no"]
needs_data = pytest.mark.skipif(
    not (SHARED / "data" / "gsm8k").is_dir(), reason="../shared is absent: own rows prove the same"
)


# -- raw rows, in the shapes of the hub -------------------------------------------------------------------------------
def sums(count, seed=0):
    """GSM8K's shape, with its calculator notes."""
    rng, rows = random.Random(seed), []
    for _ in range(count):
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        answer = f"There are {a}+{b}=<<{a}+{b}={a + b}>>{a + b} nuts.\n#### {a + b}"
        rows.append({"question": f"{a} nuts and {b} nuts: how many?", "answer": answer})
    return rows


def choices(count, seed=0):
    """ARC's shape."""
    rng, rows = random.Random(seed), []
    for number in range(count):
        texts = rng.sample(["red", "blue", "two", "six", "cat", "dog"], 4)
        found = {"text": texts, "label": list("ABCD")}
        rows.append({"id": f"q{number}", "question": f"Which is {texts[1]}?", "choices": found, "answerKey": "B"})
    return rows


def chats(count, seed=0):
    rng, rows = random.Random(seed), []
    for number in range(count):
        word = rng.choice(["tea", "rain", "a cat", "the sea"])
        turns = [("user", f"Say {word}."), ("assistant", f"{word}!")] * rng.randint(1, 2)
        turns = [("system", "Be short.")] * (number % 3 == 0) + turns
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns], "source": "chats"})
    return rows


RAW = {
    "arc_easy": ("arc", choices(60)),
    "arc_challenge": ("arc", choices(30, 1)),
    "gsm8k": ("gsm8k", sums(160)),
    "smol_smoltalk": ("smoltalk", chats(240)),
    "identity": ("identity", chats(20, 1)),
}
MADE = {"simple_spelling": 120, "spelling_bee": 24}


@pytest.fixture(scope="session")
def nano(tmp_path_factory):
    """A folder with data/, the pools that the mixes name, made of raw rows by normalize.py; data/nanochat_sft and
    data/nanochat_mid by mix.py; and base/, a random tiny NanoChat with a tokenizer of nanochat's special tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import NanoChatConfig, NanoChatForCausalLM, PreTrainedTokenizerFast

    from data_prep import mix, normalize

    folder = tmp_path_factory.mktemp("nanochat")
    for name, (source, rows) in RAW.items():
        raw = folder / f"{name}.jsonl"
        raw.write_text("".join(json.dumps(row) + "\n" for row in rows))
        done = run_script(normalize, source, raw, "--out", folder / "data" / name)
        assert done.returncode == 0, done.stderr
    for name, count in MADE.items():
        done = run_script(normalize, name, "--rows", count, "--out", folder / "data" / name)
        assert done.returncode == 0, done.stderr
    for name in ("nanochat_sft", "nanochat_mid"):
        settings = yaml.safe_load((REPO / "data_prep" / "mixes" / f"{name}.yaml").read_text())
        for source in settings["sources"]:  # what is as large as the pool that was made here is all of it
            source.pop("rows", None)
            source["path"] = {"mmlu_aux": "arc_easy"}.get(source["path"], source["path"])
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
        done = run_script(mix, folder / f"{name}.yaml", "--pools", folder / "data", "--out", folder / "data" / name)
        assert done.returncode == 0, done.stderr

    backend = Tokenizer(models.BPE())
    # nanochat's pattern, but that single digits stand alone
    pattern = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    texts = [
        turn["content"] for row in load_from_disk(folder / "data" / "nanochat_sft")["train"] for turn in row["messages"]
    ]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=380, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    bos = backend.token_to_id("<|bos|>")  # put before every text that is not a rendered chat: never twice in one
    backend.post_processor = processors.TemplateProcessing("<|bos|> $A", special_tokens=[("<|bos|>", bos)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|bos|>")
    tokenizer.save_pretrained(folder / "base")
    torch.manual_seed(0)
    config = NanoChatConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=2048,
        bos_token_id=bos,
        eos_token_id=bos,
        pad_token_id=bos,
        initializer_range=0.1,
    )
    NanoChatForCausalLM(config).save_pretrained(folder / "base")
    return folder


PROBE = """
import json
from pathlib import Path
from transformers import TrainerCallback


class Probe(TrainerCallback):
    def __init__(self, trainer):
        self.trainer = trainer
        self.steps = []
        self.seen = []  # the rows of each micro-batch, without padding
        self.training_step = trainer.training_step
        trainer.training_step = self.watch_step

    def watch_step(self, model, inputs, *rest, **kwargs):
        rows = []
        mask = inputs.get("attention_mask", inputs["input_ids"] >= 0)  # packs of whole rows come without
        for ids, mask in zip(inputs["input_ids"].tolist(), mask.tolist()):
            rows.append([token for token, real in zip(ids, mask) if real])
        self.seen.append(rows)
        return self.training_step(model, inputs, *rest, **kwargs)

    def on_step_begin(self, args, state, control, **_):
        self.optimizer = self.trainer.optimizer
        while hasattr(self.optimizer, "optimizer"):
            self.optimizer = self.optimizer.optimizer
        self.rates = [group["lr"] for group in self.optimizer.param_groups]

    def on_step_end(self, args, state, control, **_):
        momentum = self.optimizer.param_groups[0]["momentum"]
        self.steps.append({"rates": self.rates, "momentum": momentum})

    def on_train_end(self, args, state, control, **_):
        rows = self.trainer.train_dataset
        report = {
            "rows": [[list(ids), list(labels)] for ids, labels in zip(rows["input_ids"], rows["labels"])],
            "seen": self.seen,
            "steps": self.steps,
            "groups": [sum(weight.numel() for weight in group["params"]) for group in self.optimizer.param_groups],
            "config": type(self.trainer.model.config).__name__,
        }
        Path(args.output_dir, "probe.json").write_text(json.dumps(report))
"""


@pytest.fixture
def train(nano, run_recipe, hook, tmp_path):
    """train(recipe, *flags) runs nanochat_RECIPE on the tiny model and returns what the probe saw, and the folder."""

    def run(recipe, *flags, out="run", data=None):
        given = ["--model_name_or_path", nano / "base", "--dataset_name", data or nano / "data" / f"nanochat_{recipe}"]
        given = [*CPU, *given, "--output_dir", tmp_path / out, *hook(PROBE), *flags]
        run_recipe(f"nanochat_{'midtrain' if recipe == 'mid' else 'sft'}", *given, defaults=False)
        return json.loads((tmp_path / out / "probe.json").read_text()), tmp_path / out

    return run


def losses(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


# -- ids and mask: render_conversation, from its description ----------------------------------------------------------
def encode(tokenizer, text):
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def split_notes(answer):
    """GSM8K's answer in parts: what stands in << >> is a call and, behind its last =, what came out."""
    for piece in re.split(r"(<<[^>]+>>)", answer):
        if piece.startswith("<<") and piece.endswith(">>"):
            call, value = piece[2:-2].rsplit("=", 1)
            yield from (("python", call), ("python_output", value))
        else:
            yield "text", piece


def rendered(tokenizer, messages, parts=False, limit=None):
    """(ids, mask) of nanochat's render_conversation. parts: answers are GSM8K's."""
    of = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    ids, mask = [of["<|bos|>"]], [0]

    def add(tokens, trained):
        ids.extend(tokens)
        mask.extend([trained] * len(tokens))

    if messages[0]["role"] == "system":
        first = {"role": "user", "content": messages[0]["content"] + "\n\n" + messages[1]["content"]}
        messages = [first, *messages[2:]]
    for number, message in enumerate(messages):
        assert message["role"] == ("user", "assistant")[number % 2]
        if message["role"] == "user":
            text = encode(tokenizer, message["content"])
            add([of["<|user_start|>"], *text, of["<|user_end|>"]], 0)
            continue
        add([of["<|assistant_start|>"]], 0)
        for kind, text in split_notes(message["content"]) if parts else [("text", message["content"])]:
            start, end = {
                "text": ("", ""),
                "python": ("<|python_start|>", "<|python_end|>"),
                "python_output": ("<|output_start|>", "<|output_end|>"),
            }[kind]
            tokens = encode(tokenizer, text)
            add([of[start], *tokens, of[end]] if start else tokens, int(kind != "python_output"))
        add([of["<|assistant_end|>"]], 1)
    return ids[:limit], mask[:limit]


def with_notes(row):
    return row["source"] in ("gsm8k", "spelling_bee")


def real_rows():
    """About 1,000 messages rows of real data: GSM8K, ARC, English and Chinese chats that take turns."""
    data, rows = SHARED / "data", []
    for line in (data / "gsm8k" / "train.jsonl").read_text().splitlines()[:500]:
        row = json.loads(line)
        turns = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
        rows.append({"messages": turns, "source": "gsm8k"})
    for line in (data / "arc" / "ARC-Easy_train.jsonl").read_text().splitlines()[:250]:
        row = json.loads(line)
        listed = "".join(
            f"- {text}={label}\n" for label, text in zip(row["choices"]["label"], row["choices"]["text"], strict=True)
        )
        asked = f"Multiple Choice question: {row['question']}\n{listed}\n"
        asked += "Respond only with the letter of the correct answer."
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": row["answerKey"]}]
        rows.append({"messages": turns, "source": "arc"})
    names = {"human": "user", "gpt": "assistant"}
    for line in (data / "chat" / "sharegpt_zh_1K_format.jsonl").read_text().splitlines():
        turns = json.loads(line)["conversations"]
        turns = [{"role": names.get(turn["from"], turn["from"]), "content": turn["value"].strip()} for turn in turns]
        if [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2) and len(rows) < 1000:
            rows.append({"messages": turns, "source": "chat"})
    assert len(rows) == 1000
    return rows


def equal_to_nanochat(train, nano, tmp_path, rows):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(nano / "base")
    DatasetDict({"train": Dataset.from_list([{"messages": row["messages"]} for row in rows])}).save_to_disk(
        tmp_path / "rows"
    )
    flags = ["--max_steps", 2, "--global_batch_size", 4, "--per_device_train_batch_size", 2, "--allow", "cut_answers"]
    found, folder = train("sft", *flags, data=tmp_path / "rows")
    assert len(found["rows"]) == len(rows) // 4 * 4  # what does not fill a step is left out
    python = cut = 0
    for row, (ids, labels) in zip(rows, found["rows"], strict=False):
        wanted, mask = rendered(tokenizer, row["messages"], with_notes(row), 2048)
        assert ids == wanted and ids.count(tokenizer.bos_token_id) == 1
        assert labels == [token if trained else -100 for token, trained in zip(wanted, mask, strict=True)]
        python += tokenizer.convert_tokens_to_ids("<|python_start|>") in ids
        cut += len(ids) == 2048
    order = [row for batch in found["seen"] for row in batch]
    assert order == [ids for ids, _ in found["rows"][:8]]  # in their order, padded, four a step in passes of two
    return found, folder, python, cut


def test_ids_mask_order_and_the_mean_of_passes(train, nano, tmp_path):
    from transformers import NanoChatForCausalLM

    rows = load_from_disk(nano / "data" / "nanochat_sft")["train"].to_list()
    rows = [
        {
            "messages": [{k: v for k, v in turn.items() if v is not None} for turn in row["messages"]],
            "source": row["source"],
        }
        for row in rows
    ]
    rows = rows[: len(rows) // 4 * 4 + 2 - 4]
    found, folder, python, _ = equal_to_nanochat(train, nano, tmp_path, rows)
    assert python > 20 and {row["source"] for row in rows} > {"gsm8k", "spelling_bee"}
    model, means = NanoChatForCausalLM.from_pretrained(nano / "base"), []
    parts = []
    for start in (0, 2):  # the first step: two passes of two rows
        each = []
        for ids, labels in found["rows"][start : start + 2]:
            logits = model(torch.tensor([ids])).logits[0, :-1].double().detach()
            wanted = torch.tensor(labels[1:])
            kept = wanted != -100
            each.append(torch.nn.functional.cross_entropy(logits[kept], wanted[kept], reduction="none"))
        parts.append(torch.cat(each))
        means.append(parts[-1].mean())
    assert losses(folder)[0] == pytest.approx(float(sum(means) / 2), abs=2e-4)  # the log rounds to 4 digits
    assert abs(torch.cat(parts).mean() - sum(means) / 2) > 1e-3, "both means are the same here: choose other rows"


def test_preview_counts_the_steps_of_sft(train, nano, tmp_path):
    """22 rows of which 20 fill steps of 4; TRL then drops the one whose answer lies behind the cut."""
    rows = [{"messages": row["messages"][-2:]} for row in chats(22)]
    rows[3]["messages"] = [{"role": "user", "content": "tea " * 99}, rows[3]["messages"][1]]
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(tmp_path / "rows")
    flags = ["--global_batch_size", 4, "--per_device_train_batch_size", 2, "--max_length", 64]
    for whole, count in ((True, 19), (False, 21)):
        more = ["--whole_steps", whole, "--allow", "cut_answers"]
        found, _ = train("sft", *flags, *more, data=tmp_path / "rows", out=str(whole))
        assert len(found["rows"]) == count
        previewed(nano, tmp_path, "sft", found, *flags, whole_steps=whole)


@needs_data
def test_ids_and_mask_on_a_thousand_real_rows(train, nano, tmp_path):
    *_, python, cut = equal_to_nanochat(train, nano, tmp_path, real_rows())
    assert python > 450 and cut > 5


# -- mid-training: the stream, its schedule ---------------------------------------------------------------------------
def test_stream_and_schedules_of_mid_training(train, nano, tmp_path):
    """More than 1,000 documents, behind each of which TRL's own packing leaves a short row."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(nano / "base")
    rows = [{"messages": row["messages"][-2:]} for row in chats(1300)]
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(tmp_path / "rows")
    flags = ["--global_batch_size", 16, "--per_device_train_batch_size", 4, "--max_length", 64]
    found, folder = train("mid", *flags, data=tmp_path / "rows")
    stream = [token for row in rows for token in rendered(tokenizer, row["messages"])[0]]
    steps = len(stream) // 64 // 16
    assert len(found["rows"]) == steps * 16 > 200
    assert [token for ids, _ in found["rows"] for token in ids] == stream[: steps * 16 * 64]
    assert all(len(ids) == 64 and labels == ids for ids, labels in found["rows"])
    assert [row for batch in found["seen"] for row in batch] == [ids for ids, _ in found["rows"]]  # and in order
    assert len(found["steps"]) == steps
    scale = (96 / 768) ** -0.5
    for step, told in enumerate(found["steps"]):
        progress = step / steps
        share = 1 if progress < 0.8 else 1 - (progress - 0.8) / 0.2
        assert told["rates"] == pytest.approx([0.02 * share, 0.004 * scale * share, 0.2 * scale * share], rel=1e-9)
        frac = min(step / 300, 1)
        assert told["momentum"] == pytest.approx((1 - frac) * 0.85 + frac * 0.95, rel=1e-12)
    assert found["steps"][-1]["rates"][0] < 0.02 / 2
    previewed(nano, tmp_path, "midtrain", found, *flags)
    assert "of all rows in one stream" in previewed.said and "that fill no step left out" in previewed.said
    # where the packs fill their steps, the last step still goes, whose last pack is short
    length = next(length for length in range(63, 30, -1) if math.ceil(len(stream) / length) % 4 == 0)
    short = [*flags[2:-1], length, "--global_batch_size", 4, "--max_steps", 1]
    found, _ = train("mid", *short, data=tmp_path / "rows", out="short")
    assert len(found["rows"]) == math.ceil(len(stream) / length) - 4
    previewed(nano, tmp_path, "midtrain", found, *short)
    # TRL's own packs, with their short rows, where the switch says so
    found, _ = train("mid", *flags, "--one_stream", "false", data=tmp_path / "rows", out="plain")
    assert {len(ids) for ids, _ in found["rows"]} > {64} and len(found["rows"]) > steps * 16
    previewed(nano, tmp_path, "midtrain", found, *flags, one_stream=False)


def test_the_current_version_packs_whole_answers_and_decays_from_the_half(train, nano, tmp_path):
    """nanochat of July 2026 by its config: ids and mask of render_conversation, best-fit rows, its schedule."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(nano / "base")
    rows = chats(300)
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(tmp_path / "rows")
    config = REPO / "recipes" / "configs" / "nanochat_current.yaml"
    flags = ["--global_batch_size", 4, "--per_device_train_batch_size", 2, "--max_length", 96]
    found, _ = train("mid", "--config", config, *flags, "--allow", "packing", data=tmp_path / "rows")
    documents = []
    for row in rows:
        ids, mask = rendered(tokenizer, row["messages"])
        labels = [token if is_trained else -100 for token, is_trained in zip(ids, mask, strict=True)]
        documents.append((tuple(ids), tuple(labels[1:])))
    begin = tokenizer.convert_tokens_to_ids("<|bos|>")
    seen = []
    for ids, labels in found["rows"]:
        assert len(ids) <= 96 and ids[0] == begin  # every row begins a conversation, and none is cut
        starts = [place for place, token in enumerate(ids) if token == begin] + [len(ids)]
        for first, end in zip(starts, starts[1:], strict=False):
            seen.append((tuple(ids[first:end]), tuple(labels[first + 1 : end])))
    assert sorted(seen) == sorted(documents)
    steps = len(found["steps"])
    assert steps == math.ceil(len(found["rows"]) / 4) > 8
    for step, told in enumerate(found["steps"]):
        progress = step / steps
        share = 1 if progress <= 0.5 else 1 - (progress - 0.5) / 0.5
        assert told["rates"][0] == pytest.approx(0.02 * 0.8 * share, rel=0.02)
        assert told["momentum"] == pytest.approx(0.85 + 0.1 * step / 300, rel=1e-12)


def test_the_configs_launch_line_parses(monkeypatch):
    path = REPO / "recipes" / "configs" / "nanochat_current.yaml"
    line = re.search(r"^#   accelerate launch --config_file (\S+) (\S+) (.*)$", path.read_text(), re.M)
    assert (REPO / line[1]).is_file()
    monkeypatch.chdir(REPO)
    script, args, _ = parse(REPO / line[2], *line[3].split())
    assert script.global_batch_size * args.max_length == 524_288 and not script.one_stream
    assert (args.learning_rate, args.packing_strategy, args.assistant_only_loss) == (0.8, "bfd", True)


def test_only_wrapped_packs_are_one_stream(nano, run_recipe, hook, tmp_path):
    """Another strategy is TRL's own, and one_stream no reason to pack what is not to be packed."""
    probe = """
import json
from pathlib import Path
from transformers import TrainerCallback
class Packs(TrainerCallback):
    def __init__(self, trainer):
        found = {"padding_free": trainer.padding_free, "rows": trainer.train_dataset["input_ids"][:]}
        found["columns"] = trainer.train_dataset.column_names
        Path(trainer.args.output_dir).mkdir(exist_ok=True)
        Path(trainer.args.output_dir, "packs.json").write_text(json.dumps(found))
"""
    rows = [{"messages": row["messages"][-2:]} for row in chats(60)]
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(tmp_path / "rows")
    flags = [*CPU, "--model_name_or_path", nano / "base", "--dataset_name", tmp_path / "rows", *hook(probe)]
    flags += ["--global_batch_size", 2, "--per_device_train_batch_size", 1, "--max_length", 64, "--max_steps", 1]
    packs = {}
    for name, more in (("bfd", ["--packing_strategy", "bfd"]), ("none", ["--packing", "false"]), ("wrapped", [])):
        run_recipe("nanochat_midtrain", *flags, *more, "--output_dir", tmp_path / name, defaults=False)
        packs[name] = json.loads((tmp_path / name / "packs.json").read_text())
    assert [packs[name]["padding_free"] for name in packs] == [True, False, False]
    assert (
        "seq_lengths" in packs["bfd"]["columns"] and len(packs["none"]["rows"]) == 58
    )  # whole steps, but for the last
    bos = packs["none"]["rows"][0][0]
    assert all(row[0] == bos for name in ("bfd", "none") for row in packs[name]["rows"])  # no document is split
    assert any(row[0] != bos for row in packs["wrapped"]["rows"])


def previewed(nano, tmp_path, recipe, found, *flags, **names):
    """preview.py, asked before a run, tells what the run then trained."""
    from data_prep import preview

    (tmp_path / "names.yaml").write_text(yaml.safe_dump(names))
    flags = [*flags, "--config", tmp_path / "names.yaml", "--report", tmp_path / "preview.json"]
    done = run_script(
        preview,
        tmp_path / "rows",
        "--recipe",
        REPO / "recipes" / f"nanochat_{recipe}.py",
        "--model_name_or_path",
        nano / "base",
        "--max_cut",
        1,
        *flags,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told, previewed.said = json.loads((tmp_path / "preview.json").read_text())["totals"], " ".join(done.stdout.split())
    assert told["units"] == len(found["rows"])
    assert told["kept_tokens"] == sum(len(ids) for ids, _ in found["rows"])
    assert told["kept_trained"] == sum(label != -100 for _, labels in found["rows"] for label in labels)
    assert told["steps"] == len(found["steps"])


def test_published_values_of_both_recipes():
    for name, tokens, rate in (("midtrain", 524_288, 1.0), ("sft", 32 * 2048, 0.02)):
        script, args, model = parse(f"nanochat_{name}")
        assert script.global_batch_size * args.max_length == tokens and args.learning_rate == rate
        assert (args.max_grad_norm, args.weight_decay, args.num_train_epochs, args.warmup_steps) == (0, 0, 1, 0)
        assert args.packing is (name == "midtrain") is not args.assistant_only_loss
        assert args.train_sampling_strategy == "sequential" and model.dtype == "float32"
    assert script.micro_batch_mean and args.per_device_train_batch_size == 4 and script.global_batch_size == 4 * 8
    assert 22_439 // 32 == 701  # rows and steps of the run that the source reports
    mixed = yaml.safe_load((REPO / "data_prep" / "mixes" / "nanochat_sft.yaml").read_text())
    rows = {source["path"]: source.get("rows") for source in mixed["sources"]}
    assert [rows[name] for name in ("smol_smoltalk", "simple_spelling", "spelling_bee")] == [10_000, 300, 300]
    if (SHARED / "data" / "arc").is_dir():
        files = ("arc/ARC-Easy_train", "arc/ARC-Challenge_train", "gsm8k/train")
        counted = [len((SHARED / "data" / f"{one}.jsonl").read_text().splitlines()) for one in files]
        assert 990 <= 22_439 - sum(counted) - 10_600 <= 1_000  # what is left is identity, 1K in the source


def test_chat_core_of_the_published_accuracies():
    from eval import chat_eval

    published = {
        "arc_easy": 0.2546,
        "arc_challenge": 0.2278,
        "mmlu": 0.2686,
        "gsm8k": 0.0174,
        "humaneval": 0.0061,
        "spelling_bee": 0.8359,
    }
    chance = {"arc_easy": 0.25, "arc_challenge": 0.25, "mmlu": 0.25}
    mean = sum((a - chance.get(task, 0)) / (1 - chance.get(task, 0)) for task, a in published.items()) / 6
    assert mean == pytest.approx(0.1435, abs=5e-5)
    given = {task: {"value": value, "low": value, "high": value} for task, value in published.items()}
    assert chat_eval.chat_core(given)["value"] == pytest.approx(mean, abs=1e-12)


# -- the optimizer ----------------------------------------------------------------------------------------------------
def settings(rate=0.02, options=None):
    return SimpleNamespace(learning_rate=rate, weight_decay=0.0, optim_args=options, deepspeed_plugin=None)


def small_model(nano):
    from transformers import NanoChatForCausalLM

    torch.manual_seed(1)
    return NanoChatForCausalLM.from_pretrained(nano / "base")


def gradients(model, seed):
    torch.manual_seed(seed)
    for weight in model.parameters():
        weight.grad = torch.randn(weight.shape) * 0.1


def reference(weights, grads, rate, momentum):
    """Muon in float64: Nesterov momentum, five Newton-Schulz steps, the update times sqrt(max(1, rows / columns))."""
    weight, buffer = weights.double().clone(), torch.zeros_like(weights, dtype=torch.float64)
    for step, grad in enumerate(grads):
        beta = momentum(step)
        buffer = beta * buffer + (1 - beta) * grad.double()
        x = (1 - beta) * grad.double() + beta * buffer
        tall = x.shape[0] > x.shape[1]
        x = x.T if tall else x
        x = x / x.norm()
        for _ in range(5):
            square = x @ x.T
            x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
        x = x.T if tall else x
        weight -= rate * math.sqrt(max(1, weight.shape[0] / weight.shape[1])) * x
    return weight


@pytest.mark.parametrize(("exact", "tolerance"), [(True, 1e-5), (False, 2e-2)], ids=["fp32", "as_shipped"])
def test_muon_and_adamw_equal_float64_references(nano, monkeypatch, exact, tolerance):
    module, model = runpy.run_path(str(OPTIMIZER)), small_model(nano)
    if exact:  # torch's Muon orthogonalises in bf16 whatever it is given
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    optimizer = module["Factory"]()(model, settings(0.5, "momentum_warmup_steps=4"))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    grads = {name: [] for name in before}
    for seed in range(6):
        gradients(model, seed)
        for name, weight in model.named_parameters():
            grads[name].append(weight.grad.clone())
        optimizer.step()
    checked = set()
    for name, weight in model.named_parameters():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            rate = (0.2 if "embed" in name else 0.004) * (96 / 768) ** -0.5 * 0.5
            wanted, m, v = before[name].double().clone(), 0, 0
            for step, grad in enumerate(grads[name], 1):
                m, v = 0.8 * m + 0.2 * grad.double(), 0.95 * v + 0.05 * grad.double() ** 2
                wanted -= rate * (m / (1 - 0.8**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-10)
        else:
            wanted = reference(before[name], grads[name], 0.02 * 0.5, lambda step: 0.85 + 0.1 * min(step / 4, 1))
            checked.add(weight.shape)
        moved = (wanted - before[name]).norm()
        assert (weight.detach().double() - wanted).norm() <= tolerance * moved, name
    assert checked == {torch.Size(shape) for shape in ((96, 96), (384, 96), (96, 384))}  # square, tall and wide


def test_optimizer_groups_by_parameter_count(nano):
    model = small_model(nano)
    groups = runpy.run_path(str(OPTIMIZER))["Factory"]()(model, settings()).param_groups
    counts = [sum(weight.numel() for weight in group["params"]) for group in groups]
    words = model.config.vocab_size
    assert counts == [2 * (4 * 96 * 96 + 2 * 96 * 384), words * 96, words * 96]  # matrices, unembedding, embedding
    assert sum(counts) == sum(weight.numel() for weight in model.parameters())
    assert groups[1]["params"][0] is model.lm_head.weight and groups[2]["params"][0] is model.model.embed_tokens.weight
    scale = (96 / 768) ** -0.5
    assert [group["lr"] for group in groups] == pytest.approx([4e-4, 8e-5 * scale, 4e-3 * scale])
    assert all(group["betas"] == (0.8, 0.95) and group["eps"] == 1e-10 for group in groups[1:])
    assert groups[0]["momentum"] == 0.95 and all(group["weight_decay"] == 0 for group in groups)


def test_state_of_the_optimizer_resumes_bitwise(nano, tmp_path):
    build, plain = runpy.run_path(str(OPTIMIZER))["Factory"](), small_model(nano)
    options = settings(0.5, "momentum_warmup_steps=8")
    optimizer = build(plain, options)
    for seed in range(6):
        gradients(plain, seed)
        optimizer.step()
        if seed == 2:
            torch.save((plain.state_dict(), optimizer.state_dict()), tmp_path / "state.pt")
    resumed = small_model(nano)
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(weights)
    again = build(resumed, options)
    again.load_state_dict(state)
    for seed in range(3, 6):
        gradients(resumed, seed)
        again.step()
    assert again.param_groups[0]["momentum"] == optimizer.param_groups[0]["momentum"] < 0.95
    for one, other in zip(plain.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


# -- refusals ---------------------------------------------------------------------------------------------------------
def test_refusals(nano, run_recipe, tmp_path, capsys):
    module = runpy.run_path(str(OPTIMIZER))
    with pytest.raises(ValueError, match="whole matrices.*ddp_8gpu.yaml or fsdp2_8gpu.yaml"):
        module["check"](SimpleNamespace(optim_args=None, deepspeed_plugin=object()))
    for options in ("momentum=3", "momentum_warmup_steps=x"):
        with pytest.raises(ValueError, match="knows momentum_warmup_steps=NUMBER only"):
            module["check"](settings(options=options))
    with pytest.raises(SystemExit):
        run_recipe("nanochat_sft", "--optimizer", tmp_path / "gone.py")
    assert "gone.py: no such file: pass the path of optimizers/nanochat.py" in capsys.readouterr().err


# -- from raw rows to a trained model ---------------------------------------------------------------------------------
def held_out():
    """Rows that no stage trains on: other numbers of the generator than 0 and 1."""
    rows = [{"messages": row["messages"][-2:]} for row in chats(12, 9)]
    for row in sums(12, 9):
        turns = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
        rows.append({"messages": turns, "notes": True})
    return rows


def look(folder):
    """Of a stage, on held-out rows: (mean loss of the answers, of what the user says, share of greedy answers that stop
    by themselves and hold no marker of another turn)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    stop, marks = (
        tokenizer.convert_tokens_to_ids("<|assistant_end|>"),
        tokenizer.convert_tokens_to_ids(["<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>"]),
    )
    losses, fine = {0: [], 1: []}, []
    for row in held_out():
        ids, mask = rendered(tokenizer, row["messages"], row.get("notes"))
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1]
            each = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
            for trained in losses:
                losses[trained] += each[torch.tensor(mask[1:]) == trained].tolist()
            said = ids[: mask.index(1)]
            for _ in range(64):
                said.append(int(model(torch.tensor([said])).logits[0, -1].argmax()))
                if said[-1] == stop:
                    break
        answer = said[mask.index(1) :]
        fine.append(answer[-1] == stop and not {*answer} & {*marks})
    return sum(losses[1]) / len(losses[1]), sum(losses[0]) / len(losses[0]), sum(fine) / len(fine)


@pytest.mark.long
def test_two_stages_from_raw_rows(train, nano, tmp_path, capsys):
    """Held-out loss of the answers: at least 2 nats below its start after mid-training, at least 0.2 lower again after
    SFT, that of the user's text not; answers that end and stay the assistant's: at most 0.1 before, 0.9 after SFT."""
    from transformers import AutoTokenizer

    from eval import chat_eval

    short = ["--global_batch_size", 8, "--per_device_train_batch_size", 4, "--max_length", 320]
    found, mid = train("mid", *short[:-1], 128, out="mid")
    assert found["config"] == "NanoChatConfig" and len(found["groups"]) == 3
    told, sft = train("sft", "--model_name_or_path", mid, *short, "--learning_rate", 0.2, out="sft")
    assert told["config"] == "NanoChatConfig" and told["groups"] == found["groups"]
    base = shutil.copytree(nano / "base", tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(sft)
    assert "{% generation" not in tokenizer.chat_template and tokenizer.eos_token == "<|assistant_end|>"
    tokenizer.save_pretrained(base)
    stages = [look(folder) for folder in (base, mid, sft)]
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums(8, 9)))
    (tmp_path / "arc.jsonl").write_text("".join(json.dumps(row) + "\n" for row in choices(8, 9)))
    for folder in (base, mid, sft):
        tasks = [f"gsm8k={tmp_path / 'gsm8k.jsonl'}", f"arc_easy={tmp_path / 'arc.jsonl'}"]
        assert chat_eval.main([str(folder), "--task", *tasks, "--max_new_tokens", "64"]) == 0
    capsys.readouterr()
    assert chat_eval.main(["--stages", str(base), str(mid), str(sft)]) == 0
    table = capsys.readouterr().out
    assert re.search(r"\| Metric +\| BASE +\| MID +\| SFT", table) and "GSM8K" in table and "ARC-Easy" in table
    assert (sft / "eval" / "stages.md").read_text() == table
    (start, _, before), (between, user, some), (after, user_after, share) = stages
    assert between < start - 2 and after < between - 0.2, stages
    assert user_after > user - 0.2, stages  # the user's text is context in SFT: nothing is learnt of it
    assert before <= 0.1 and share >= max(0.9, some), stages


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["midtrain", "sft"])
def test_two_steps_on_two_processes(nano, tmp_path, recipe):
    """Same rows, order and losses as one process."""
    data = nano / "data" / f"nanochat_{'mid' if recipe == 'midtrain' else 'sft'}"
    found = []
    for config in ("cpu", "cpu_2proc"):
        flags = [*CPU, "--model_name_or_path", nano / "base", "--dataset_name", data, "--max_steps", 2, "--max_length"]
        flags += [320, "--global_batch_size", 8, "--per_device_train_batch_size", 2, "--output_dir", tmp_path / config]
        done = launch(REPO / "recipes" / f"nanochat_{recipe}.py", *flags, config=config)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(losses(tmp_path / config))
    assert len(found[0]) == 2 and found[1] == pytest.approx(found[0], abs=1e-4)


@pytest.mark.long
def test_a_short_last_step_on_two_processes(nano, tmp_path):
    """13 rows, 8 a step in passes of 2: the second step has passes of 2, 2 and 1, and one that only repeats rows."""
    rows, found = [{"messages": row["messages"][-2:]} for row in chats(13)], []
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(tmp_path / "rows")
    for config in ("cpu", "cpu_2proc"):
        flags = [*CPU, "--model_name_or_path", nano / "base", "--dataset_name", tmp_path / "rows", "--whole_steps"]
        flags += ["false", "--global_batch_size", 8, "--per_device_train_batch_size", 2]
        done = launch(REPO / "recipes" / "nanochat_sft.py", *flags, "--output_dir", tmp_path / config, config=config)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(losses(tmp_path / config))
    assert len(found[0]) == 2 and found[1] == pytest.approx(found[0], abs=1e-4)


@pytest.mark.long
def test_resumed_equals_uninterrupted(train, nano):
    from safetensors.torch import load_file

    short = ["--global_batch_size", 8, "--per_device_train_batch_size", 4, "--max_length", 128, "--max_steps", 6]
    short += ["--save_strategy", "steps", "--save_steps", 3, "--save_total_limit", 5]
    _, folder = train("mid", *short)
    whole = load_file(folder / "model.safetensors")
    for name in ("checkpoint-6", "model.safetensors"):
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    train("mid", *short, "--resume_from_checkpoint", "true")
    again = load_file(folder / "model.safetensors")
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)


# -- any engine gives the same ----------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def launched(nano, tmp_path_factory):
    """launched(recipe, engine, *flags) returns the run folder of nanochat_RECIPE; the same call is run once a session.
    Torch's Muon multiplies in bf16, where every engine rounds in its own places: in fp32 here, to tell them apart."""
    folder, done = tmp_path_factory.mktemp("launched"), {}
    exact = "\ntorch.Tensor.bfloat16 = torch.Tensor.float\n"
    (folder / "probe.py").write_text(LOOK.replace("state1", "momentum_buffer") + exact)

    def run(recipe, engine, *flags):
        key = (recipe, engine, *map(str, flags))
        if key not in done:
            out, data = folder / f"run{len(done)}", nano / "data" / f"nanochat_{recipe[:3]}"
            given = ["--model_name_or_path", nano / "base", "--dataset_name", data, "--output_dir", out, *CPU[2:]]
            given += ["--global_batch_size", 8, "--per_device_train_batch_size", 2, "--max_length", 320]
            given += ["--max_steps", 6, "--hooks", folder / "probe.py", *flags]
            run_command(ENGINES[engine].command(f"nanochat_{recipe}", *given))
            done[key] = out
        return done[key]

    return run


@pytest.mark.long
@pytest.mark.parametrize(("recipe", "engine"), [(a, b) for a in ("midtrain", "sft") for b in ("ddp", "fsdp2", "hsdp")])
def test_engines_give_what_one_process_gives(launched, recipe, engine):
    """Six steps: losses to 1e-5 and the trained model's logits to 1e-4 of their size, of weights and momenta that each
    rank of FSDP2 holds its share of."""
    one, other = launched(recipe, "one"), launched(recipe, engine)
    found, wanted = ranks(other), ENGINES[engine]
    assert [rank["world"] for rank in found] == [wanted.processes] * wanted.processes
    assert all(wanted.engine in rank["engine"] for rank in found)
    for name in ("weights", "states"):
        here, whole = [rank[name][0] for rank in found], found[0][name][1]
        assert max(here) < 0.6 * whole if wanted.sharded else here == [whole] * wanted.processes
    assert len(curve(one, "loss")) == 6 and curve(one, "loss")[0] - min(curve(one, "loss")) > 0.5
    assert gap(one, other, "loss") <= 1e-5 and gap(one, other, "grad_norm") <= 3e-4
    single, several = (torch.load(folder / "logits0.pt") for folder in (one, other))
    assert (single - several).abs().max() <= 1e-4 * single.abs().max()


@pytest.mark.long
def test_fsdp2_resumes_bitwise(launched):
    """Momenta, and where in its warm-up the momentum is: one step more or less moves every matrix."""
    from safetensors.torch import load_file

    flags = ["--save_strategy", "steps", "--save_steps", 3, "--save_total_limit", 5]
    folder = launched("midtrain", "fsdp2", *flags)
    whole = load_file(folder / "model.safetensors")
    shutil.rmtree(folder / "checkpoint-6")
    (folder / "model.safetensors").unlink()
    launched("midtrain", "fsdp2", *flags, "--output_dir", folder, "--resume_from_checkpoint", "true")
    again = load_file(folder / "model.safetensors")
    assert (folder / "checkpoint-6").is_dir() and whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
