"""eval/merge.py against PEFT's own merge, bitsandbytes' dequantisation and calculations by hand; its
proof against adapters whose answers are known, and against servers and merges that are wrong.

Adapters that speak: on a base that answers "ab" (test_compare.rigged), one that answers something else, by hand-set
weights on lm_head, so that a merge that does nothing, or half, says the wrong words.

Breaks tried, each seen red: alpha / r without rsLoRA's root; alpha_pattern not read; DoRA's norm of the base weight;
a delta cast before the sum; the transpose of embeddings left out; a tied head not untied; 4-bit weights only where
adapted; an offset into the file 8 bytes off; the base's eos kept; markers left in the template; findings without the
logits, or that look at text only; the part folder left behind after a refusal; log-probabilities taken for equal, a NaN
among them passed, logits in their place; histories asked of no server, sent with arguments that are objects, with the
last call's id for each reply, or changed in place.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, Qwen3ForCausalLM

import tests.eval.test_compare as small
from data_prep.common.errors import UsageError
from eval import endpoint, merge
from eval.common import lora_weights, round_trip
from eval.common.models import Output
from tests.eval.test_compare import make_model, make_tokenizer, rigged, write_rows
from tests.helpers.runs import REPO, SHARED

QUIET = ["--prompts", "0"]
ALL = "all-linear"


def adapter(folder, base, seed=3, markers=False, **config):
    """A LoRA adapter of random weights on the model in a folder, with its tokenizer."""
    torch.manual_seed(seed)
    defaults = {"r": 4, "target_modules": ALL, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**defaults | config))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad and "lora" not in name:  # modules_to_save begin as copies
                weight.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(folder)
    tokenizer = make_tokenizer("qwen3_instruct_2507")
    if markers:
        tokenizer.chat_template = (REPO / "chat_templates" / "qwen3_instruct_2507.jinja").read_text(encoding="utf-8")
    tokenizer.save_pretrained(folder)
    return folder


def speaker(folder, base, text):
    """An adapter on a rigged base that answers text: each character leads to the next, more than in the base."""
    chain = make_tokenizer("qwen3_instruct_2507")("\n" + text)["input_ids"]
    config = LoraConfig(r=len(chain), lora_alpha=len(chain), target_modules=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    a, b = (getattr(model.base_model.model.lm_head, name)["default"].weight for name in ("lora_A", "lora_B"))
    with torch.no_grad():
        a.zero_(), b.zero_()
        for row, (now, following) in enumerate(zip(chain, chain[1:] + [small.STOP], strict=True)):
            a[row, now], b[following, row] = 1.0, 2.0
    model.save_pretrained(folder)
    make_tokenizer("qwen3_instruct_2507").save_pretrained(folder)
    return folder


def tied(seed):
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        type(make_model(0).config)(**make_model(0).config.to_dict() | {"tie_word_embeddings": True})
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """base, tied, half (bf16), gpt2, sharded (base in small files), rigged with adapters cd; plain: LoRA on base"""
    home = tmp_path_factory.mktemp("merge home")
    small.save(home / "base", make_model(0))
    small.save(home / "tied", tied(1))
    small.save(home / "half", make_model(2).bfloat16())
    small.save(home / "rigged", rigged("ab"))
    torch.manual_seed(4)
    config = GPT2Config(vocab_size=264, n_embd=32, n_layer=1, n_head=2, n_positions=512)
    small.save(home / "gpt2", GPT2LMHeadModel(config))
    make_model(0).save_pretrained(home / "sharded", max_shard_size="60KB")
    adapter(home / "plain", home / "base")
    speaker(home / "cd", home / "rigged", "cd")
    return home


def run(*command):
    return merge.main([str(word) for word in command])


def report_of(out):
    return json.loads((out / "merge_report.json").read_text(encoding="utf-8"))


def weights(folder):
    return {k: v for path in sorted(folder.glob("model*.safetensors")) for k, v in load_file(path).items()}


def refused(capsys, *command):
    capsys.readouterr()
    assert run(*command) == 2
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if line.startswith("merge.py")]
    assert len(lines) == 1, lines
    return lines[0]


# -- the weights -------------------------------------------------------------------------------------------------------

KINDS = {
    "plain": ("base", {}),
    "rslora": ("base", {"use_rslora": True, "lora_alpha": 5}),
    "patterns": (
        "base",
        {
            "lora_alpha": 6,
            "alpha_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 1},
            "rank_pattern": {"v_proj": 2, "layers.0.self_attn.o_proj": 7},
        },
    ),
    "dora": ("base", {"use_dora": True, "lora_alpha": 3}),
    "modules_to_save": ("base", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "embeddings": ("base", {"target_modules": ["embed_tokens", "lm_head", "down_proj"]}),
    "tied left alone": ("tied", {}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_are_those_of_pefts_merge(kind, home, tmp_path):
    base, config = KINDS[kind]
    folder = adapter(tmp_path / "adapter", home / base, **config)
    assert run(folder, "--out", tmp_path / "out", *QUIET) == 0
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(home / base), folder).merge_and_unload()
    before = AutoModelForCausalLM.from_pretrained(home / base).state_dict()
    ours, changed = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict(), 0
    assert ours.keys() == theirs.state_dict().keys()
    for name, weight in theirs.state_dict().items():
        assert torch.allclose(ours[name], weight, rtol=1e-6, atol=1e-6), (name, (ours[name] - weight).abs().max())
        changed += not torch.equal(weight, before[name])
    counts = report_of(tmp_path / "out")["weights"]
    assert changed == counts["merged"] + counts["replaced"] > 0


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_tied_embeddings_that_the_adapter_sets_apart_are_untied(config, home, tmp_path):
    """PEFT's own merge would change both, as they are one tensor; the adapter's logits are the oracle."""
    folder = adapter(tmp_path / "adapter", home / "tied", **config)
    assert run(folder, "--out", tmp_path / "out", *QUIET) == 0
    ids = torch.arange(5, 60)[None]
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(home / "tied")
        plain = base(input_ids=ids).logits
        theirs = PeftModel.from_pretrained(base, folder).eval()(input_ids=ids).logits
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(input_ids=ids).logits
    assert (theirs - plain).abs().max() > 0.1
    assert (ours - theirs).abs().max() < 1e-4
    assert report_of(tmp_path / "out")["weights"]["untied"] == ["lm_head.weight"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert len(list((tmp_path / "out").glob("model-0000?-of-00002.safetensors"))) == 2


@pytest.fixture(scope="module")
def copies(home):
    """Bases that tie embeddings and head, in other files: both names stored, equal or parted; the head's name alone."""
    files = {}
    stored = weights(home / "tied")
    embeddings = stored.pop("model.embed_tokens.weight")
    torch.manual_seed(6)
    files["both"] = {"model.embed_tokens.weight": embeddings, "lm_head.weight": embeddings.clone()}
    parted = embeddings + 0.1 * torch.randn_like(embeddings)
    files["parted"] = {"model.embed_tokens.weight": embeddings, "lm_head.weight": parted}
    files["head"] = {"lm_head.weight": embeddings}
    for name, pair in files.items():
        shutil.copytree(home / "tied", home / name)
        save_file(stored | pair, home / name / "model.safetensors", metadata={"format": "pt"})
    return home


@pytest.mark.parametrize("base", ["both", "parted", "head"])
@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    ],
    ids=str,
)
def test_copies_of_tied_embeddings_stay_what_they_were_trained_as(base, config, copies, tmp_path):
    """The adapter's logits on its base, as PEFT and transformers compute them, are the oracle."""
    folder = adapter(tmp_path / "adapter", copies / base, **config)
    assert run(folder, "--out", tmp_path / "out", *QUIET) == 0
    ids = torch.arange(5, 60)[None]
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(copies / base)
        plain = model(input_ids=ids).logits
        theirs = PeftModel.from_pretrained(model, folder).eval()(input_ids=ids).logits
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(input_ids=ids).logits
    assert (theirs - plain).abs().max() > 0.1
    assert (ours - theirs).abs().max() < 1e-4 * max(1, theirs.abs().max())
    stays = base != "parted" and ("ensure_weight_tying" in config or config == {"target_modules": ["q_proj"]})
    assert report_of(tmp_path / "out")["weights"]["untied"] == ([] if stays else ["lm_head.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is stays


def test_known_causes_are_named_where_texts_differ(copies, tmp_path, capsys):
    """Loose bounds of 4 bits let other texts pass; the report says why they are others."""
    apart = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    flags = ["--load_in_4bit", "--dtype", "float32", "--no_serve", "--prompts", 6, "--max_new_tokens", 8]
    flags += ["--max_logit_diff", 100, "--min_top1", 0]
    found = {}
    for name, base, config in (("apart", "tied", apart), ("parted", "parted", {}), ("four", "tied", {})):
        folder = adapter(tmp_path / name, copies / base, **config)
        assert run(folder, "--out", tmp_path / f"{name} out", *flags) == 0
        report = report_of(tmp_path / f"{name} out")
        assert report["merged_against_adapter"]["same_text"]["value"] < 1 and report["verdict"] == "passed"
        found[name] = report["causes"]
    said = capsys.readouterr().out
    assert (
        "untied copies of tied embeddings: the base ties lm_head.weight to model.embed_tokens.weight"
        in found["apart"][0]
    )
    assert "stores an untied copy of it with other values" in found["parted"][0]
    assert [len(causes) for causes in found.values()] == [2, 2, 1]
    for causes in found.values():
        assert "--into dequantized keeps the weights of its training" in causes[-1]
        assert all(f"cause: {cause}" in said for cause in causes)
    flags = ["--no_serve", "--prompts", 6, "--max_new_tokens", 8]
    assert run(tmp_path / "apart", "--out", tmp_path / "same", *flags) == 0
    assert report_of(tmp_path / "same")["causes"] == []  # nothing differs


def test_the_sum_is_in_float32_and_cast_once(home, tmp_path):
    folder = adapter(tmp_path / "adapter", home / "half", lora_alpha=1)
    assert run(folder, "--out", tmp_path / "out", *QUIET) == 0
    before, after, parts = (
        weights(home / "half"),
        weights(tmp_path / "out"),
        load_file(folder / "adapter_model.safetensors"),
    )
    seen = 0
    for name, weight in before.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if key + "A.weight" in parts:
            a, b = (parts[f"{key}{part}.weight"].double() for part in "AB")
            weight, seen = (weight.double() + b @ a / 4).float().bfloat16(), seen + 1
            # float64 and float32 may round apart at a tie of bfloat16, seldom
            assert (after[name] == weight).float().mean() > 0.999
            sloppy = before[name] + (b @ a / 4).bfloat16()
            assert (after[name] == sloppy).float().mean() < 0.999
        else:
            assert torch.equal(after[name], weight)
        assert after[name].dtype == torch.bfloat16
    assert seen == 14


def test_shards_stay_shards(home, tmp_path):
    files = sorted(path.name for path in (home / "sharded").glob("*.safetensors"))
    assert len(files) > 3
    folder = adapter(tmp_path / "adapter", home / "base", target_modules=["model.layers.1.mlp.up_proj"])
    assert run(folder, "--out", tmp_path / "out", "--base", home / "sharded", *QUIET) == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == files
    same = [(home / "sharded" / name).read_bytes() == (tmp_path / "out" / name).read_bytes() for name in files]
    assert same.count(False) == 1  # one weight
    index = [json.loads((f / "model.safetensors.index.json").read_text()) for f in (home / "sharded", tmp_path / "out")]
    assert index[0]["weight_map"] == index[1]["weight_map"]
    assert run(folder, "--out", tmp_path / "whole", *QUIET) == 0
    whole = weights(tmp_path / "whole")
    assert all(torch.equal(weight, whole[name]) for name, weight in weights(tmp_path / "out").items())


def test_dequantized_is_what_bitsandbytes_dequantizes(home, tmp_path):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    four = AutoModelForCausalLM.from_pretrained(home / "base", quantization_config=quantization, dtype=torch.float32)
    folder = adapter(tmp_path / "adapter", home / "base", target_modules=["q_proj", "down_proj"])  # not all in 4 bits
    theirs = PeftModel.from_pretrained(four.dequantize(), folder).merge_and_unload().state_dict()
    command = [folder, "--into", "dequantized", "--load_in_4bit", "--dtype", "float32", *QUIET]
    assert run(*command, "--out", tmp_path / "out") == 0
    ours, base = weights(tmp_path / "out"), weights(home / "base")
    for name, weight in theirs.items():
        assert torch.allclose(ours[name], weight, rtol=1e-6, atol=1e-6), name
    k_proj, lm_head = "model.layers.0.self_attn.k_proj.weight", "lm_head.weight"
    assert not torch.equal(ours[k_proj], base[k_proj]) and torch.equal(ours[lm_head], base[lm_head])
    assert report_of(tmp_path / "out")["weights"] == {"merged": 4, "replaced": 0, "dequantized": 14, "untied": []}


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_memory_stays_within_two_shards(tmp_path):
    """A model of 400 MB in shards of 100: the peak is that of a merge of next to nothing, and two shards."""
    torch.manual_seed(0)
    change = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "layer_types": None}
    with torch.device("meta"):
        shapes = Qwen3ForCausalLM(type(make_model(0).config)(**make_model(0).config.to_dict() | change))
    folder, shards, size = tmp_path / "base", [{}], 0
    for name, weight in shapes.state_dict().items():
        if size + weight.nbytes > 100e6:
            shards, size = [*shards, {}], 0
        shards[-1][name], size = torch.full(weight.shape, 0.01), size + weight.nbytes
    shapes.config.save_pretrained(folder)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
    place = {weight: name for name, shard in zip(names, shards, strict=True) for weight in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    total = sum((folder / name).stat().st_size for name in names)
    assert total > 3.5e8 and len(names) >= 4
    del shards
    small.save(tmp_path / "little", make_model(0))
    lora = adapter(tmp_path / "lora", tmp_path / "little", target_modules=["q_proj"])
    wide = {
        f"base_model.model.model.layers.{i}.mlp.down_proj.lora_{part}.weight": torch.ones(shape)
        for i in range(8)
        for part, shape in (("A", (4, 4096)), ("B", (1024, 4)))
    }
    shutil.copytree(lora, tmp_path / "wide")
    save_file(wide, tmp_path / "wide" / "adapter_model.safetensors")

    def peak(name, base):
        code = "from eval import merge; assert merge.main() == 0; "
        # not getrusage, whose peak begins with that of this process
        code += "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"
        words = [tmp_path / name, "--base", base, "--out", tmp_path / f"{name} merged", *QUIET]
        command = [str(word) for word in (sys.executable, "-c", code, *words)]
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
        return int(done.stdout.split()[-1]) * 1024

    more = peak("wide", folder) - peak("lora", tmp_path / "little")
    assert more < 2e8, f"{more / 1e6:.0f} MB over a small merge"
    changed = load_file(tmp_path / "wide merged" / place["model.layers.5.mlp.down_proj.weight"])
    assert torch.allclose(changed["model.layers.5.mlp.down_proj.weight"], torch.tensor(0.01 + 8 / 4 * 4))


# -- what is written beside it -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "theirs, eos, pad",
    [
        (None, small.STOP, 257),
        ({"eos_token_id": 257, "pad_token_id": 257, "temperature": 0.7}, small.STOP, 257),
        ({"eos_token_id": [258, 257, small.STOP], "pad_token_id": small.STOP}, [258, small.STOP], 257),
    ],
)
def test_the_generation_config_stops_and_does_not_pad_with_the_stop(theirs, eos, pad, home, tmp_path):
    base = shutil.copytree(home / "base", tmp_path / "base")
    (base / "generation_config.json").unlink()
    if theirs:
        (base / "generation_config.json").write_text(json.dumps(theirs))
    assert run(home / "plain", "--base", base, "--out", tmp_path / "out", *QUIET) == 0
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert found == (theirs or {}) | {"eos_token_id": eos, "pad_token_id": pad}


def test_a_pad_token_that_is_the_stop_is_replaced_and_an_eos_that_is_not_the_stop_completed(home, tmp_path):
    folder = shutil.copytree(home / "plain", tmp_path / "adapter")
    tokenizer = make_tokenizer("qwen3_instruct_2507")
    tokenizer.pad_token = "<|im_end|>"
    tokenizer.eos_token = "<|im_start|>"
    tokenizer.save_pretrained(folder)
    assert run(folder, "--out", tmp_path / "out", *QUIET) == 0
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert found["eos_token_id"] == [258, small.STOP] and found["pad_token_id"] not in (258, small.STOP)
    report = report_of(tmp_path / "out")
    assert report["eos"] == ["<|im_start|>", "<|im_end|>"] and report["pad"] not in report["eos"]


def test_the_template_is_the_serving_form(home, tmp_path):
    folder = adapter(tmp_path / "adapter", home / "base", markers=True)
    assert "generation" in (folder / "chat_template.jinja").read_text(encoding="utf-8")
    assert run(folder, "--out", tmp_path / "out", *QUIET) == 0
    template = (tmp_path / "out" / "chat_template.jinja").read_text(encoding="utf-8")
    assert not re.search(r"{%-?\s*(end)?generation", template)
    messages = small.ROWS[1]["messages"]
    theirs = make_tokenizer("qwen3_instruct_2507").apply_chat_template(messages, tokenize=False)
    tokenizer = small.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template(messages, tokenize=False) == theirs


# -- the proof -------------------------------------------------------------------------------------------------------


def test_adapter_merged_and_served_say_the_same(home, tmp_path, capsys):
    """Through the real server."""
    out = tmp_path / "out"
    assert run(home / "cd", "--out", out, "--max_new_tokens", 8, "--prompts", 20) == 0, capsys.readouterr()
    report = report_of(out)
    merged, served = report["merged_against_adapter"], report["served_against_merged"]
    assert merged["max_logit_diff"] < 1e-5 and report["findings"] == []
    # "c", "d" and the stop of 20 answers; Wilson's interval of 20 of 20 by hand: n / (n + 1.96^2)
    assert (merged["top1"]["count"], merged["top1"]["total"]) == (60, 60)
    assert merged["same_stop"]["low"] == pytest.approx(20 / (20 + 1.959964**2))
    assert [merged["same_stop"]["count"], merged["same_text"]["count"]] == [20, 20]
    assert {key: served[key]["count"] for key in ("same_prompt", "same_text", "same_end")} == dict.fromkeys(
        ("same_prompt", "same_text", "same_end"), 20
    )
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), small.AutoTokenizer.from_pretrained(out)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    new = model.generate(**ids)[0, ids["input_ids"].shape[1] :]  # by the folder's own generation config
    assert tokenizer.decode(new) == "cd<|im_end|>"


@contextmanager
def replying(monkeypatch, reply):
    """No server: reply(body) is what the endpoint answers."""

    @contextmanager
    def serving(*_):
        yield "nowhere", "model"

    with monkeypatch.context() as patch:
        patch.setattr(round_trip, "serving", serving)
        patch.setattr(round_trip, "post", lambda url, body: reply(body))
        yield


def answer(body, text="cd", end="stop", more=0, **message):
    tokenizer = make_tokenizer("qwen3_instruct_2507")
    ids = tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, return_dict=False)
    usage = {"prompt_tokens": len(ids) + more, "completion_tokens": len(text) + 1}
    return {"choices": [{"message": {"content": text, **message}, "finish_reason": end}], "usage": usage}


@pytest.mark.parametrize(
    "wrong, key",
    [
        ({"more": 1}, "same_prompt"),
        ({"text": "ab"}, "same_text"),
        ({"end": "length"}, "same_end"),
        ({"reasoning_content": "hm"}, "same_text"),
    ],
)
def test_a_server_that_answers_otherwise_is_found(wrong, key, home, tmp_path, monkeypatch, capsys):
    flags = ["--max_new_tokens", 8, "--prompts", 3]
    with replying(monkeypatch, answer):
        assert run(home / "cd", "--out", tmp_path / "good", *flags) == 0
    with replying(monkeypatch, lambda body: answer(body, **wrong)):
        assert run(home / "cd", "--out", tmp_path / "bad", *flags) == 1
    report = report_of(tmp_path / "bad")
    # Wilson's upper bound of 0 of 3, by hand: 1.96^2 / (3 + 1.96^2) = 0.5615
    assert report["findings"] == [f"served: {key} in 0 of 3 (0.000–0.561), less than --min_top1 0.999"]
    assert f"FAILED served: {key}" in capsys.readouterr().out


def last_line(capsys):
    """Return the last line but for that with the next command."""
    lines = capsys.readouterr().out.strip().splitlines()
    return [line for line in lines if not line.startswith("next: ")][-1]


def test_every_proof_ends_with_its_verdict_and_bounds(home, tmp_path, monkeypatch, capsys):
    flags = ["--max_new_tokens", 8, "--prompts", 3]
    assert run(home / "cd", "--out", tmp_path / "quiet", *QUIET) == 0
    assert last_line(capsys) == "proof not run: --prompts 0"
    bounds = "--max_logit_diff 0.001 and --min_top1 0.999 (a share by its interval)"
    assert run(home / "cd", "--out", tmp_path / "merged", *flags, "--no_serve") == 0
    assert last_line(capsys) == f"proof passed: 4 of 4 figures within {bounds}; the server: not run: --no_serve"
    with replying(monkeypatch, answer):
        assert run(home / "cd", "--out", tmp_path / "good", *flags) == 0
        assert last_line(capsys) == f"proof passed: 7 of 7 figures within {bounds}"
    with replying(monkeypatch, lambda body: answer(body, text="ab")):
        assert run(home / "cd", "--out", tmp_path / "bad", *flags) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"proof failed: 6 of 7 figures within {bounds}"
    assert [line.split("│")[5].split() for line in lines if "│ same text  " in line] == [["–"], ["≥", "0.999"]]
    assert [line.split("│")[6].strip() for line in lines if "│ same text  " in line] == ["–", "failed"]
    verdicts = {name: report_of(tmp_path / name)["verdict"] for name in ("quiet", "merged", "good", "bad")}
    assert verdicts == {"quiet": "not run: --prompts 0", "merged": "passed", "good": "passed", "bad": "failed"}
    failed = [check["figure"] for check in report_of(tmp_path / "bad")["checks"] if not check["passed"]]
    assert failed == ["same_text"]


@pytest.mark.parametrize(
    ("count", "total", "least", "kept"),
    [
        (27, 28, 0.97, True),  # Wilson's interval by hand: 0.823 to 0.994
        (24, 28, 0.97, False),  # 0.685 to 0.943
        (27, 28, 0.999, False),
        (999, 1000, 0.999, True),
        (1, 1, 0.999, True),
        (0, 3, 0.57, False),  # 0 to 0.561
        (0, 3, 0.56, True),
    ],
)
def test_a_share_is_held_to_its_bound_by_its_interval(count, total, least, kept):
    figures = {"max_logit_diff": 0.0, "top1": round_trip.rate([True] * count + [False] * (total - count))}
    checks = round_trip.check_proof(figures, None, round_trip.Bounds(1.0, least))
    assert [check.figure for check in checks] == ["max_logit_diff", "top1"]
    assert bool(checks[1].finding) != kept
    if not kept:
        assert f"top1 in {count} of {total} (" in checks[1].finding


def test_a_text_that_only_the_settings_of_generation_change_is_found(home, tmp_path):
    """A base whose generation config stops on c: each token is as likely as it was, and every answer ends early."""
    base = shutil.copytree(home / "rigged", tmp_path / "base")
    stop = make_tokenizer("qwen3_instruct_2507")("c")["input_ids"]
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [*stop, small.STOP]}))
    flags = ["--max_new_tokens", 8, "--prompts", 3, "--no_serve"]
    assert run(home / "cd", "--base", base, "--out", tmp_path / "out", *flags) == 1
    report = report_of(tmp_path / "out")
    assert report["merged_against_adapter"]["top1"]["value"] == 1
    assert [sentence.split(" (")[0] for sentence in report["findings"]] == ["merged: same_text_where_top1 in 0 of 3"]


@pytest.mark.parametrize("told, gap", [([0.0, 0.0, 0.0], 0.0), ([0.0, -0.5, 0.0], 0.5), ([float("nan")] * 2, None)])
def test_log_probabilities_that_differ_are_found(told, gap, home, tmp_path, monkeypatch):
    """Those of "c" and "d" are 0 by hand, to 1e-6: each token's logit is 2 sqrt(264) = 32, the next one's half of it.
    The third of a server is the stop's, which is not compared."""

    def reply(body):
        found = answer(body)
        found["choices"][0]["logprobs"] = {"content": [{"token": "?", "logprob": value} for value in told]}
        return found

    monkeypatch.setattr(merge, "check_engine", lambda *_: None)
    flags = ["--max_new_tokens", 8, "--prompts", 3, "--engine", "vllm"]
    with replying(monkeypatch, reply):
        assert run(home / "cd", "--out", tmp_path / "out", *flags) == (gap != 0.0)
    report = report_of(tmp_path / "out")
    served = report["served_against_merged"]
    assert served["logprobs"] == 6
    if gap is not None:
        assert served["max_logprob_diff"] == pytest.approx(gap, abs=1e-6)
    said = [f"served: log-probabilities differ by {gap or float('nan'):.3g}, more than --max_logit_diff 0.001"]
    assert report["findings"] == (said if gap != 0.0 else [])


def test_a_history_with_calls_and_thoughts_is_asked_of_a_server_that_takes_it(monkeypatch):
    """In OpenAI's form, written out here; transformers serve, which drops them, is not asked."""
    call = {"function": {"name": "add", "arguments": {"a": "é"}}}
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [call, call | {"id": "mine"}]},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
    ]
    kept, bodies, tokenizer = json.dumps(messages), [], make_tokenizer("qwen3_instruct_2507")
    question = round_trip.Question("a", messages, small.TOOLS, {}, "", [1, 2])
    proof = round_trip.Proof([question], 0, "float32", "cpu", 8)
    merged = round_trip.Answers({}, [Output(tokenizer("ab")["input_ids"], True)], [[0.0]])

    def reply(body):
        bodies.append(body)
        return {"choices": [{"finish_reason": "stop", "message": {"content": "ab"}}], "usage": {"prompt_tokens": 2}}

    with replying(monkeypatch, reply):
        found = round_trip.ask_served("out", proof, merged, tokenizer, round_trip.Engine("vllm", "python"))
        assert found["left_out"] == 0 and found["same_text"]["count"] == 1 and "logprobs" not in found
        found = round_trip.ask_served("out", proof, merged, tokenizer, round_trip.Engine("transformers", "python"))
        assert found["left_out"] == 1 and found["same_text"] is None
    function = {"name": "add", "arguments": '{"a": "é"}'}
    calls = [{"function": function, "type": "function", "id": number} for number in ("call00000", "mine")]
    assert len(bodies) == 1 and bodies[0]["messages"] == [
        messages[0],
        {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": calls},
        {"role": "tool", "content": "1", "tool_call_id": "call00000"},
        {"role": "tool", "content": "2", "tool_call_id": "mine"},
    ]
    assert bodies[0]["tools"] == small.TOOLS and bodies[0]["tool_choice"] == "none" and bodies[0]["logprobs"] is True
    assert json.dumps(messages) == kept


def test_a_merge_that_is_wrong_is_found(home, tmp_path, monkeypatch):
    flags = ["--max_new_tokens", 8, "--prompts", 3, "--no_serve"]
    monkeypatch.setattr(lora_weights, "scaling_of", lambda *_: 0.0)  # the base itself, which says "ab"
    assert run(home / "cd", "--out", tmp_path / "zero", *flags) == 1
    report = report_of(tmp_path / "zero")
    assert report["merged_against_adapter"]["max_logit_diff"] == pytest.approx(2 * 264**0.5, rel=1e-3)  # by hand: below
    assert report["merged_against_adapter"]["same_text"]["count"] == 0
    assert report["served_against_merged"] == "not run: --no_serve"
    assert [sentence.split(" in ")[0].split(" differ")[0] for sentence in report["findings"]] == [
        "logits of merged and adapter",
        "merged: top1",
        "merged: same_stop",
    ]
    monkeypatch.setattr(lora_weights, "scaling_of", lambda *_: 1.01)  # the right words, but not the right weights
    assert run(home / "cd", "--out", tmp_path / "almost", *flags) == 1
    assert len(report_of(tmp_path / "almost")["findings"]) == 1
    assert run(home / "cd", "--out", tmp_path / "loose", *flags, "--max_logit_diff", 1) == 0


def test_four_bits_as_trained(home, tmp_path):
    """Beside the dequantised weights the adapter is where it was; beside the original ones it is not."""
    folder = shutil.copytree(home / "plain", tmp_path / "adapter")
    (folder / "config.yaml").write_text("load_in_4bit: true\nuse_bnb_nested_quant: true\ndtype: float32\n")
    write_rows(tmp_path / "rows.jsonl", small.ROWS)
    flags = ["--no_serve", "--max_new_tokens", 8, "--data", tmp_path / "rows.jsonl"]
    assert run(folder, "--out", tmp_path / "near", "--into", "dequantized", *flags) == 0
    run(folder, "--out", tmp_path / "far", *flags, "--max_logit_diff", 100, "--min_top1", 0)
    near, far = report_of(tmp_path / "near"), report_of(tmp_path / "far")
    assert near["settings"]["load_in_4bit"] and near["prompts"] == {"asked": len(small.ROWS), "refused": 0}
    near, far = (report["merged_against_adapter"]["mean_logit_diff"] for report in (near, far))
    assert near < 1e-4 and far > 100 * near


def test_the_same_input_gives_the_same_bytes(home, tmp_path):
    flags = ["--no_serve", "--max_new_tokens", 4, "--prompts", 2]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        assert run(home / "plain", "--out", tmp_path / name / "out", *flags) == 0
    files = [{path.name: path.read_bytes() for path in (tmp_path / name / "out").iterdir()} for name in ("one", "two")]
    assert files[0] == files[1] and "merge_report.json" in files[0]


# -- bad input -------------------------------------------------------------------------------------------------------


def edited(home, tmp_path, name, **change):
    folder = shutil.copytree(home / "plain", tmp_path / name)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    return folder


def test_bad_input_is_one_sentence(home, tmp_path, capsys, monkeypatch):
    half = make_model(0)
    half.save_pretrained(
        tmp_path / "half", state_dict={k: v for k, v in half.state_dict().items() if "k_proj" not in k}
    )
    lost = shutil.copytree(home / "sharded", tmp_path / "lost")
    next(lost.glob("model-00002*")).unlink()
    four = shutil.copytree(home / "base", tmp_path / "four")
    config = json.loads((four / "config.json").read_text())
    (four / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    config = make_model(0).config.to_dict()
    Qwen3ForCausalLM(type(make_model(0).config)(**config | {"intermediate_size": 32})).save_pretrained(
        tmp_path / "thin"
    )
    broken = edited(home, tmp_path, "broken")
    parts = load_file(broken / "adapter_model.safetensors")
    save_file({k: v * float("nan") for k, v in parts.items()}, broken / "adapter_model.safetensors")
    lacking = edited(home, tmp_path, "lacking")
    save_file(dict(list(parts.items())[:-1]), lacking / "adapter_model.safetensors")
    odd = edited(home, tmp_path, "odd")
    save_file(parts | {"base_model.model.x.lora_C": torch.ones(1)}, odd / "adapter_model.safetensors")
    experts = edited(home, tmp_path, "experts", target_parameters=["mlp.experts.gate_up_proj"])
    fp4 = edited(home, tmp_path, "fp4")
    (fp4 / "config.yaml").write_text("load_in_4bit: true\nbnb_4bit_quant_type: fp4\n")
    empty = write_rows(tmp_path / "empty.jsonl", [])
    (tmp_path / "there").mkdir()
    cases = [
        ([home / "base"], "base is no adapter"),
        ([tmp_path / "gone"], "gone is no adapter"),
        ([home / "plain", "--out", tmp_path / "there"], "there exists"),
        ([edited(home, tmp_path, "ia3", peft_type="IA3")], "IA3 adapter: only LoRA"),
        ([experts], r"target_parameters=\['mlp.experts.gate_up_proj'\], which cannot"),
        ([edited(home, tmp_path, "pissa", init_lora_weights="pissa")], "init_lora_weights='pissa'"),
        ([edited(home, tmp_path, "bias", bias="all")], "bias='all'"),
        ([edited(home, tmp_path, "tokens", trainable_token_indices=[1])], "trainable_token_indices"),
        ([odd], "holds base_model.model.x.lora_C"),
        ([lacking], "lacks half of"),
        ([broken], "is not finite"),
        ([home / "plain", "--base", tmp_path / "thin"], r"the base's weight .64, 32.: pass the base"),
        ([home / "plain", "--base", home / "gpt2"], "changes .*layers.* has not: pass the base"),
        ([home / "plain", "--base", tmp_path / "half"], "half lacks 2 weights, .*k_proj"),
        ([home / "plain", "--base", lost], "lost has no whole set of safetensors"),
        ([home / "plain", "--base", four], "four is stored quantised"),
        ([home / "plain", "--base", "some/model"], "some/model is neither a folder here nor"),
        ([home / "plain", "--into", "dequantized"], "was not trained in 4 bits"),
        ([fp4], "says fp4, nested True"),
        ([home / "plain", "--data", empty, "--prompts", 5], "none of 0 can be asked"),
    ]
    for words, expected in cases:
        words = [
            *words,
            *([] if "--prompts" in words else QUIET),
            *([] if "--out" in words else ["--out", tmp_path / "o"]),
        ]
        assert re.search(expected, refused(capsys, *words)), (words, expected)
        assert not (tmp_path / "o").exists() and not list(tmp_path.glob(".*.part"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lora_weights.shutil, "copyfile", full)
    assert "No space left on device" in refused(capsys, home / "plain", "--out", tmp_path / "o", *QUIET)
    assert not (tmp_path / "o").exists() and not list(tmp_path.glob(".*.part"))


def test_an_engine_that_is_not_there_is_one_sentence(home, tmp_path, capsys, monkeypatch):
    flags = ["--out", tmp_path / "o", "--prompts", 1, "--max_new_tokens", 4]
    assert "has no vllm" in refused(capsys, home / "cd", *flags, "--engine", "vllm")  # not in this environment
    assert "--converter" in refused(capsys, home / "cd", *flags, "--engine", "llamacpp")
    (tmp_path / "convert.py").write_text("import sys; sys.exit('no such architecture')")
    llama = ["--engine", "llamacpp", "--converter", tmp_path / "convert.py"]
    gone = ["--llama_server", tmp_path / "llama-server"]
    assert "pass llama.cpp's bin/llama-server" in refused(capsys, home / "cd", *flags, *llama, *gone)
    assert "has no llama.cpp" in refused(capsys, home / "cd", *flags, *llama, "--llama_server", "false")
    llama += ["--llama_server", "true"]  # answers --version, and ends at once where it is to serve
    assert "does not convert the merged model (no such arch" in refused(capsys, home / "cd", *flags, *llama)
    (tmp_path / "convert.py").write_text("import sys; open(sys.argv[3], 'w')")  # a file that is no model
    assert "server of llamacpp did not start" in refused(capsys, home / "cd", *flags, *llama)
    assert "does not run" in refused(capsys, home / "cd", *flags, "--engine_python", tmp_path / "no python")
    assert not (tmp_path / "o").exists()


# -- the other servers -------------------------------------------------------------------------------------------------

PROGRAMS = {"vllm": "VLLM_PYTHON", "llamacpp": "LLAMA_CPP"}  # eval/SERVING.md says what they are and how they are built


@pytest.fixture(params=PROGRAMS)
def engine(request):
    """The flags of merge.py for a server of this machine."""
    name, place = request.param, os.environ.get(PROGRAMS[request.param])
    if not place:
        pytest.skip(f"{PROGRAMS[name]} is not set: see eval/SERVING.md")
    flags = ["--engine", name]
    if name == "vllm":
        return [*flags, "--engine_python", place]
    if not (SHARED / "tokenizers" / "qwen3").is_dir():
        pytest.skip("no real tokenizer at hand: llama.cpp converts published ones only")
    converter, server = (Path(place) / name for name in ("convert_hf_to_gguf.py", "build/bin/llama-server"))
    python = os.environ.get("LLAMA_CPP_PYTHON", sys.executable)
    return [*flags, "--engine_python", python, "--converter", converter, "--llama_server", server]


@pytest.mark.serving
def test_another_server_answers_as_the_merged_model(engine, demo, tmp_path, monkeypatch, capsys):
    """A model by chance, whose answers hang on the whole prompt; the rows have tools, calls, thoughts and Chinese.

    The planted bad server is the same one over the base's weights, as if the merge had been lost on the way there."""
    source = demo / "init" if "vllm" in engine else SHARED / "tokenizers" / "qwen3"
    tokenizer = small.AutoTokenizer.from_pretrained(source)
    template = (REPO / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")
    tokenizer.chat_template = re.sub(r"{%(\W?)\s*(?:end)?generation\s*(\W?)%}", r"{#\1 \2#}", template)
    stop, size = tokenizer.convert_tokens_to_ids("<|im_end|>"), len(tokenizer)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        type(make_model(0).config)(
            **make_model(0).config.to_dict()
            | {"vocab_size": size, "eos_token_id": stop, "pad_token_id": tokenizer.pad_token_id}
        )
    )
    words = [stop] + [number for token, number in tokenizer.get_vocab().items() if re.fullmatch("Ġ?[a-z0-9]+", token)]
    with torch.no_grad():  # ASCII only: half a letter is no text, and each server shows it otherwise
        chosen = model.lm_head.weight[words[:400]].clone()
        model.lm_head.weight.zero_()[words[:400]] = chosen
    base = tmp_path / "base"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    lora = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 3, "b": "é"}}}
    # with all fields: both servers write out those that a tool lacks
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    tools = [{"type": "function", "function": {"name": "add", "description": "Adds", "parameters": schema}}]
    rows = [
        row
        | {"id": f"{row['id']}{n}", "chat_template_kwargs": {"enable_thinking": n == 0}}
        | ({"tools": tools} if "tools" in row else {})
        for n in range(2)
        for row in small.ROWS
    ]
    rows += [
        {
            "id": "call",
            "tools": tools,
            "messages": [
                {"role": "user", "content": "3 + 4?"},
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": "7"},
                {"role": "assistant", "content": "7"},
            ],
        }
    ]
    rows += [small.chat("用一句话", "好。", "And now?", "No.", id="zh")]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    flags = [*engine, "--base", base, "--data", data, "--dtype", "float32", "--max_new_tokens", 12]
    flags += ["--max_logit_diff", 0.01]  # measured on so sharp a model: vLLM 4e-6, llama.cpp 2e-3
    assert run(tmp_path / "adapter", "--out", tmp_path / "good", *flags) == 0, capsys.readouterr()
    served = report_of(tmp_path / "good")["served_against_merged"]
    assert served["left_out"] == 0 and served["errors"] == []
    for key in ("same_prompt", "same_text", "same_end"):
        assert served[key]["count"] == served[key]["total"] == len(rows), (key, served)
    assert served["logprobs"] > 5 * len(rows) and served["max_logprob_diff"] < 0.01

    def lost(out, *rest):
        shutil.copyfile(base / "model.safetensors", out / "model.safetensors")
        return round_trip.ask_served(out, *rest)

    monkeypatch.setattr(merge, "ask_served", lost)
    assert run(tmp_path / "adapter", "--out", tmp_path / "bad", *flags) == 1
    assert any(sentence.startswith("served: same_text") for sentence in report_of(tmp_path / "bad")["findings"])


def test_what_merge_follows_are_fields_of_peft():
    """Else a field that PEFT renames would be refused, or followed in name only."""
    followed = lora_weights.FOLLOWED | lora_weights.FOLLOWED_VALUES.keys()
    assert LoraConfig(r=1).to_dict().keys() >= followed - {"runtime_config"}


@pytest.mark.parametrize(("failing", "proven"), [([], True), ([7], True), ([3, 7], True), ([1, 2, 3], False)])
def test_a_server_that_fails_on_a_prompt_costs_that_prompt(monkeypatch, capsys, failing, proven):
    """Up to a tenth of 20 prompts are left out by name; above it the server is at fault."""
    tokenizer = make_tokenizer("qwen3_instruct_2507")
    ids = tokenizer("ab")["input_ids"]
    questions = []
    for n in range(20):
        messages = [{"role": "user", "content": str(n)}]
        questions.append(round_trip.Question(f"row-{n}", messages, None, {}, "", [1, 2, 3]))
    proof = round_trip.Proof(questions, 0, "float32", "cpu", 8)

    @contextmanager
    def serving(*_):
        yield "http://here", "mine"

    def post(url, body):
        if int(body["messages"][0]["content"]) in failing:
            raise endpoint.ServerError("http://here answers 500 (Internal Server Error): look at the server")
        return {"choices": [{"finish_reason": "stop", "message": {"content": "ab"}}], "usage": {"prompt_tokens": 3}}

    monkeypatch.setattr(round_trip, "serving", serving)
    monkeypatch.setattr(round_trip, "post", post)
    merged = round_trip.Answers({}, [Output(ids, True)] * 20, [[-0.5] * len(ids)] * 20)
    engine = round_trip.Engine("transformers", "python")
    if not proven:
        with pytest.raises(UsageError, match="answers 500.*first at prompt row-1, 3 times"):
            round_trip.ask_served("out", proof, merged, tokenizer, engine)
        return
    found = round_trip.ask_served("out", proof, merged, tokenizer, engine)
    assert found["errors"] == [f"row-{n}" for n in failing]
    assert found["same_text"]["count"] == found["same_text"]["total"] == 20 - len(failing)
    assert (", ".join(found["errors"]) in capsys.readouterr().out) == bool(failing) or not failing
