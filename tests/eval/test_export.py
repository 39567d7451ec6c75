"""eval/export.py: a GGUF file is read by the format's description, a Modelfile says what the model's config says, and a
file is held to the answers of the model that it was made from.

The quick tests have a llama.cpp of scripts, and a server whose replies are written down; `-m serving` the real one
(LLAMA_CPP, eval/SERVING.md).

Broken once, and seen red: strings and arrays of a GGUF file skipped by one byte; the template not compared; the default
penalty of Ollama kept; tokens behind the first other one counted; a question that the server failed on left out of what
is right; the bound on prompts taken bare; the verdict always passed; the file that the types are made of kept.
"""

import json
import os
import re
import shutil
import struct
import sys

import pytest
import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

import tests.eval.test_compare as small
from data_prep.common.rendering import serving_template
from eval import export
from eval.common import round_trip
from tests.eval.test_compare import make_model, make_tokenizer, write_rows
from tests.helpers.runs import REPO, SHARED

TEMPLATE = "{{ messages[0].content }} é\n"


# -- a GGUF file, by its description (ggml's docs/gguf.md) -------------------------------------------------------------
def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf(template: str | None) -> bytes:
    """A file of version 3 without tensors, with metadata of every kind before the template."""
    pairs = [
        ("general.architecture", 8, text("qwen3")),
        ("a.u8", 0, b"\x07"),
        ("a.i8", 1, b"\xff"),
        ("a.u16", 2, struct.pack("<H", 7)),
        ("a.i16", 3, struct.pack("<h", -7)),
        ("a.u32", 4, struct.pack("<I", 7)),
        ("a.i32", 5, struct.pack("<i", -7)),
        ("a.f32", 6, struct.pack("<f", 0.5)),
        ("a.bool", 7, b"\x01"),
        ("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 2) + text("a") + text("é")),
        ("a.nested", 9, struct.pack("<IQ", 9, 1) + struct.pack("<IQ", 5, 3) + struct.pack("<iii", 1, 2, 3)),
        ("a.u64", 10, struct.pack("<Q", 7)),
        ("a.i64", 11, struct.pack("<q", -7)),
        ("a.f64", 12, struct.pack("<d", 0.5)),
    ]
    if template is not None:
        pairs.append(("tokenizer.chat_template", 8, text(template)))
    pairs.append(("z.last", 8, text("")))
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs))
    return head + b"".join(text(key) + struct.pack("<I", kind) + value for key, kind, value in pairs)


@pytest.mark.parametrize("template", [TEMPLATE, "", None])
def test_the_template_is_read_from_a_file(tmp_path, template):
    (tmp_path / "a.gguf").write_bytes(gguf(template))
    assert export.read_template(tmp_path / "a.gguf") == template


def test_what_is_no_gguf_file_is_refused(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGML" + bytes(100))
    with pytest.raises(export.UsageError, match="a.gguf is no GGUF file"):
        export.read_template(tmp_path / "a.gguf")


# -- the Modelfile -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        (None, ["repeat_penalty 1"]),
        (
            {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": 3},
            ["repeat_penalty 1", "temperature 0.6", "top_k 20", "top_p 0.95"],
        ),
        ({"repetition_penalty": 1.05, "min_p": 0.0}, ["repeat_penalty 1.05", "min_p 0"]),
    ],
)
def test_a_modelfile_says_where_answers_end_and_how_the_model_samples(tmp_path, generation, expected):
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    lines = export.make_modelfile("mine.Q8_0.gguf", tmp_path, ["<|im_end|>", 'a "word"']).splitlines()
    assert lines[0].startswith("# ") and lines[1:3] == ["FROM ./mine.Q8_0.gguf", "REQUIRES 0.30.0"]
    assert lines[3:5] == ['PARAMETER stop "<|im_end|>"', 'PARAMETER stop "a \\"word\\""']
    assert sorted(lines[5:]) == sorted(f"PARAMETER {line}" for line in expected)
    assert not any(line.startswith("TEMPLATE") for line in lines)


# -- the command, with a llama.cpp of scripts --------------------------------------------------------------------------
@pytest.fixture
def llama_cpp(tmp_path, monkeypatch):
    """llama_cpp(template) makes a folder whose programs write GGUF files with that template."""

    def make(template):
        folder = tmp_path / "llama.cpp"
        (folder / "build" / "bin").mkdir(parents=True, exist_ok=True)
        (tmp_path / "source").write_bytes(gguf(template))
        programs = {
            "convert_hf_to_gguf.py": f"""
import shutil, sys
assert sys.argv[2] == "--outfile" and sys.argv[4:] == ["--outtype", "f32"], sys.argv
shutil.copyfile({str(tmp_path / "source")!r}, sys.argv[3])
""",
            "build/bin/llama-quantize": """
import shutil, sys
if sys.argv[3] == "Q9":
    sys.exit("unknown type")
shutil.copyfile(sys.argv[1], sys.argv[2])
""",
            "build/bin/llama-server": "print('version: 1234 (abcdef)')",
        }
        for name, source in programs.items():
            (folder / name).write_text(f"#!{sys.executable}\n{source}")
            (folder / name).chmod(0o755)
        return folder

    return make


@pytest.fixture
def model(tmp_path):
    """A model that answers "ab", and two rows: to one the data answers so too."""
    folder = tmp_path / "mine"
    small.save(folder, small.rigged("ab"))
    make_tokenizer("qwen3_instruct_2507").save_pretrained(folder)
    rows = [small.chat("?", "ab", id="right"), small.chat("!", "other", id="wrong")]
    write_rows(tmp_path / "rows.jsonl", rows)
    return folder


def own_template(model):
    return AutoTokenizer.from_pretrained(model).chat_template


def run(*words):
    return export.main([str(word) for word in words])


def serve(monkeypatch, replies):
    """The server of each type gives these replies in turn, a list a type; a number: more tokens in the prompt."""
    tokenizer = make_tokenizer("qwen3_instruct_2507")
    types = iter(replies)

    class Serving:
        def __init__(self, *how):
            self.replies = iter(next(types))

        def __enter__(self):
            Serving.now = self.replies
            return "nowhere", "model"

        def __exit__(self, *_):
            pass

    def post(url, body):
        said, more = next(Serving.now)
        ids = tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, return_dict=False)
        tokens = [{"id": token, "logprob": -0.25} for token in tokenizer(said)["input_ids"]]
        usage = {"prompt_tokens": len(ids) + more, "completion_tokens": len(tokens) + 1}
        choice = {"message": {"content": said}, "finish_reason": "stop", "logprobs": {"content": tokens}}
        return {"choices": [choice], "usage": usage}

    monkeypatch.setattr(round_trip, "serving", Serving)
    monkeypatch.setattr(round_trip, "post", post)


def test_each_type_is_held_to_the_models_own_answers(model, llama_cpp, tmp_path, monkeypatch, capsys):
    """Answers of two tokens: one type gives both, the other one half an answer and none."""
    serve(monkeypatch, [[("ab", 0), ("ab", 0)], [("ac", 0), ("other", 0)]])
    folder = llama_cpp(own_template(model))
    flags = ["--llama_cpp", folder, "--data", tmp_path / "rows.jsonl", "--max_new_tokens", 8]
    assert run(model, "--out", tmp_path / "out", *flags) == 0, capsys.readouterr()
    report = json.loads((tmp_path / "out" / "export_report.json").read_text())
    assert report["verdict"] == "passed" and report["versions"]["llama.cpp"] == "1234 (abcdef)"
    assert report["model"]["right"]["count"] == 1 and report["model"]["right"]["total"] == 2
    first, second = report["types"]["Q8_0"], report["types"]["Q4_K_M"]
    assert [first[name]["count"] for name in ("same_prompt", "same_text", "same_end", "right")] == [2, 2, 2, 1]
    assert [second[name]["count"] for name in ("same_prompt", "same_text", "same_end", "right")] == [2, 0, 2, 1]
    assert first["same_tokens"] == {"value": 1.0, "tokens": 4} and second["same_tokens"] == {"value": 0.25, "tokens": 4}
    # the model's own are 0, to 1e-4: each token's logit is twice the next one's (test_merge)
    for figures in (first, second):
        assert figures["max_logprob_diff"] == pytest.approx(0.25, abs=1e-4)
        assert figures["mean_logprob_diff"] == pytest.approx(0.25, abs=1e-4)
    assert first["right_change"]["value"] == 0 and second["right_change"]["value"] == 0  # one lost, one won
    assert second["right_change"]["low"] < -0.5 and second["right_change"]["high"] > 0.5
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"export_report.json"} | {
        f"mine.{kind}.{end}" for kind in export.TYPES for end in ("gguf", "Modelfile")
    }
    assert "FROM ./mine.Q4_K_M.gguf\n" in (tmp_path / "out" / "mine.Q4_K_M.Modelfile").read_text()
    assert 'PARAMETER stop "<|im_end|>"\n' in (tmp_path / "out" / "mine.Q4_K_M.Modelfile").read_text()
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[-1] == "export passed, by --min_same_prompt 0.999 and --min_same_text 0 (a share by its interval)"


@pytest.mark.parametrize(
    ("replies", "flags", "finding"),
    [
        ([("ab", 1), ("ab", 1)], [], "Q8_0: same_prompt in 0 of 2 (0.000–0.658), less than --min_same_prompt 0.999"),
        (
            [("x", 0), ("y", 0)],
            ["--min_same_text", 0.7],
            "Q8_0: same_text in 0 of 2 (0.000–0.658), less than --min_same_text 0.7",
        ),
        ([("x", 0), ("y", 0)], ["--min_same_text", 0.6], None),  # within the interval
        ([("ab", 0), ("x", 0)], ["--min_same_text", 0.9], None),
    ],
)
def test_an_export_fails_beyond_its_bounds(model, llama_cpp, tmp_path, monkeypatch, capsys, replies, flags, finding):
    """Wilson's upper bound of 0 of 2, by hand: 1.96^2 / (2 + 1.96^2) = 0.658."""
    serve(monkeypatch, [replies])
    flags = [*flags, "--types", "Q8_0", "--data", tmp_path / "rows.jsonl", "--max_new_tokens", 8]
    code = run(model, "--out", tmp_path / "out", "--llama_cpp", llama_cpp(own_template(model)), *flags)
    report = json.loads((tmp_path / "out" / "export_report.json").read_text())
    assert report["findings"] == ([finding] if finding else [])
    assert (code, report["verdict"]) == ((1, "failed") if finding else (0, "passed"))
    out = capsys.readouterr().out
    assert (f"FAILED {finding}" in out) == bool(finding) and f"export {report['verdict']}, by" in out


def test_without_prompts_nothing_is_measured(model, llama_cpp, tmp_path, capsys):
    folder = llama_cpp(own_template(model))
    assert run(model, "--out", tmp_path / "out", "--llama_cpp", folder, "--prompts", 0) == 0
    report = json.loads((tmp_path / "out" / "export_report.json").read_text())
    assert report["verdict"] == "not run: --prompts 0" and "right" not in report["types"]["Q8_0"]
    assert "export not run: --prompts 0" in capsys.readouterr().out


def test_bad_input_is_one_sentence(model, llama_cpp, tmp_path, capsys):
    folder = llama_cpp(own_template(model))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    bare = shutil.copytree(model, tmp_path / "bare")
    (bare / "tokenizer_config.json").unlink()
    cases = [
        ([tmp_path / "adapter"], "is an adapter: merge it first"),
        ([tmp_path / "gone"], "gone is no model"),
        ([bare], "bare has no tokenizer"),
        ([model, "--out", tmp_path], "exists: pass another --out"),
        ([model, "--types", "Q8_0", "Q8_0"], "names a type twice"),
        ([model, "--types", "Q9"], "llama-quantize makes no Q9 of source.gguf (unknown type)"),
        ([model, "--llama_cpp", tmp_path], "convert_hf_to_gguf.py does not exist: pass --llama_cpp with a built"),
    ]
    for words, expected in cases:
        words = [*words, *([] if "--out" in words else ["--out", tmp_path / "o"]), "--prompts", 0]
        assert run(*words, *([] if "--llama_cpp" in words else ["--llama_cpp", folder])) == 2, words
        lines = [line for line in capsys.readouterr().err.strip().splitlines() if line.startswith("export.py")]
        assert len(lines) == 1 and expected in lines[0], (words, lines)
    llama_cpp("{{ another }}")
    assert run(model, "--out", tmp_path / "o", "--llama_cpp", folder, "--prompts", 0) == 2
    assert "does not hold the template of" in capsys.readouterr().err
    assert not (tmp_path / "o").exists() and not list(tmp_path.glob(".*.part"))


# -- the real llama.cpp ------------------------------------------------------------------------------------------------
@pytest.mark.serving
def test_the_real_programs_make_files_that_answer(tmp_path, capsys):
    """A model by chance, whose answers hang on the whole prompt: 32 bits give them back, 4 bits do not."""
    place = os.environ.get("LLAMA_CPP")
    if not place or not (SHARED / "tokenizers" / "qwen3").is_dir():
        pytest.skip("LLAMA_CPP is not set, or the tokenizer of Qwen3 is not here: see eval/SERVING.md")
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "qwen3")
    template = (REPO / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")
    tokenizer.chat_template = serving_template(template)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    ends = {"eos_token_id": stop, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    config = make_model(0).config
    model = Qwen3ForCausalLM(type(config)(**config.to_dict() | sizes | ends))
    words = [stop] + [number for token, number in tokenizer.get_vocab().items() if re.fullmatch("Ġ?[a-z0-9]+", token)]
    with torch.no_grad():  # ASCII only: half a letter is no text
        chosen = model.lm_head.weight[words[:400]].clone()
        model.lm_head.weight.zero_()[words[:400]] = chosen
    folder = tmp_path / "chance"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    flags = ["--llama_cpp", place, "--engine_python", os.environ.get("LLAMA_CPP_PYTHON", sys.executable)]
    flags += ["--types", "F32", "Q8_0", "Q4_K_M", "--prompts", 8, "--max_new_tokens", 12]
    assert run(folder, "--out", tmp_path / "out", *flags) == 0, capsys.readouterr()
    report = json.loads((tmp_path / "out" / "export_report.json").read_text())
    types = report["types"]
    assert all(figures["same_prompt"]["count"] == 8 for figures in types.values())
    assert types["F32"]["same_text"]["count"] == 8 and types["F32"]["max_logprob_diff"] < 0.02
    assert types["F32"]["megabytes"] > types["Q8_0"]["megabytes"] > types["Q4_K_M"]["megabytes"]
    kept = [types[kind]["same_tokens"]["value"] for kind in ("F32", "Q8_0", "Q4_K_M")]
    assert kept[0] == 1 and kept[0] > kept[1] > kept[2]
    assert types["Q8_0"]["mean_logprob_diff"] > 5 * types["F32"]["mean_logprob_diff"]
