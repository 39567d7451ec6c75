"""eval.first_contact: tables, comparisons and failure rows against values worked by hand, its rows against the real
tokenizer, its predictions against the stored ones, and docs against docs/first_contact.json, where there is one.

Tried by hand and seen red: the error of a peak taken of the measured one; warm-up steps counted; what a process started
left alive; NaN written to JSON; a failure that ends the whole; losses compared where one is missing; weights compared
by their size; a gradient that is not looked at; rows with their answer and question of swapped lengths; a flag that no
recipe takes; layers of weights left out.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from eval import first_contact
from eval.common import contact_child, contact_plan, contact_tables
from eval.common.contact_plan import Part, Predicted, Result, Survey
from eval.first_contact import Contact, Ending, PartFails
from tests.eval.test_fit import STORED
from tests.helpers.runs import MODULES, REPO

DOCS = REPO / "docs" / "first_contact.json"
KEYS = {"schema", "kind", "date", "is_tiny", "card", "versions", "attention", "parts"}
PART_KEYS = {"name", "kind", "state", "why", "seconds", "recipe", "flags", "figures", "predicted"}
CARD = {"name": "NVIDIA GeForce RTX 4080", "gib": 15.6, "driver": "590.1"}
FIGURES = {
    "steps": 6,
    "peak_gib": 3.41,
    "reserved_gib": 3.9,
    "tokens_per_second": 1930.4,
    "slowest_tokens_per_second": 1900.0,
    "mfu": 0.3124,
    "trained_share": 0.72,
    "losses": [12.0, 11.5],
}
SLEEPER = """
import os, subprocess, sys, time
if len(sys.argv) == 2:
    subprocess.run([sys.executable, "-c", sys.argv[1], sys.argv[1], "pid"])
open("pid.part", "w").write(str(os.getpid()))
os.rename("pid.part", "pid")
time.sleep(60)
"""


def make_survey(**changes):
    versions = {"torch": "2.13.0", "liger-kernel": "none"}
    values = dict(gpu=CARD["name"], gib=15.6, driver="590.1", attention="flex_attention", versions=versions)
    values |= dict(attentions={"flash_attention_2": "flash-attn is not installed"}, predicted={})
    return Survey(**{**values, **changes})


def make_result(**changes):
    values = dict(name="qwen3_qlora", kind="run", state="done", recipe="qwen3_qlora", figures=dict(FIGURES))
    return Result(**{**values, **changes})


def make_contact(folder, *results, **changes):
    contact = Contact(folder, False, 10, 1, make_survey(**changes), list(results))
    folder.mkdir(exist_ok=True)
    return contact


# -- tables -----------------------------------------------------------------------------------------------------------
def test_readme_rows(tmp_path):
    predicted = Predicted(3.1, 3.4, True, (1133.6, 2140.2))
    failed = make_result(name="qwen3_full", state="failed", why="CUDA out of memory", figures={})
    report = first_contact.make_report(make_contact(tmp_path, make_result(predicted=predicted), failed))
    assert contact_tables.readme_rows(report) == [
        "| GPU | run | peak GiB | reserved GiB | tokens/s | MFU |",
        "|---|---|---|---|---|---|",
        "| RTX 4080 (15.6 GiB) | qwen3_qlora | 3.41 (3.10 predicted, +10.0%) | 3.9 "
        "| 1,930 (1,100 to 2,100 predicted, within) | 31.2% |",
    ]


@pytest.mark.parametrize(
    ("speed", "expected"),
    [
        (900, "900 (1,000 to 2,000 predicted, 10% below)"),
        (1500, "1,500 (1,000 to 2,000 predicted, within)"),
        (2500, "2,500 (1,000 to 2,000 predicted, 25% above)"),
    ],
)
def test_a_speed_is_placed_in_its_predicted_range(speed, expected):
    predicted = Predicted(3.0, 3.3, True, (1000.0, 2000.0))
    assert contact_tables.compare_speed({"tokens_per_second": speed}, predicted) == expected


def test_cards_without_a_prediction_have_rows_too():
    figures = FIGURES | {"mfu": None, "reserved_gib": None}
    report = {"card": {"name": None, "gib": 0.0}, "parts": [vars(make_result(figures=figures))]}
    assert contact_tables.readme_rows(report)[2] == "| CPU | qwen3_qlora | 3.41 | – | 1,930 | – |"


def test_variations_stand_beside_the_first_run():
    sdpa = FIGURES | {"losses": [12.0, 11.25], "tokens_per_second": 965.2, "peak_gib": 4.0}
    results = [make_result(), make_result(name="qwen3_qlora --attn_implementation sdpa", figures=sdpa)]
    results.append(make_result(name="qwen3_qlora --max_length 8192"))  # other packs: no losses to compare
    assert contact_tables.loss_rows(results)[2:] == [
        "| qwen3_qlora | 11.5000 | 0 | x 1.00 | +0.00 GiB |",
        "| qwen3_qlora --attn_implementation sdpa | 11.2500 | 0.25 | x 0.50 | +0.59 GiB |",
    ]


def test_losses_are_compared_step_by_step():
    assert contact_tables.largest_difference([1.0, 2.0, 3.0], [1.0, 2.5, 2.75]) == 0.5
    assert contact_tables.largest_difference([1.0, 2.0], [1.0]) is None
    assert contact_tables.largest_difference([1.0], [float("nan")]) is None


def test_what_is_not_done_is_a_row_with_its_reason(tmp_path):
    contact = make_contact(tmp_path, make_result(name="qwen3_full", state="failed", why="a | b", figures={}))
    contact.results.append(make_result(name="packed rows: sdpa", kind="packed", state="left out", why="no", figures={}))
    text = contact_tables.make_markdown(first_contact.make_report(contact))
    assert "| qwen3_full | failed | a / b |" in text
    assert "| sdpa | – | – | – | left out: no |" in text


# -- figures of a run -------------------------------------------------------------------------------------------------
def test_figures_of_a_log():
    entries = []
    for step, (speed, memory) in enumerate([(10, 3.0), (20, 3.5), (300, 3.25), (100, 3.25), (200, 3.25)], start=1):
        entry = {
            "step": step,
            "loss": 12.0 - step,
            "tokens_per_second": speed,
            "memory_gib": memory,
            "mfu": speed / 1000,
        }
        entries.append(entry | {"trained_tokens": 30 * step, "num_tokens": 40 * step})
    entries.append({"step": 5, "train_runtime": 1.0})
    text = "  done       5 steps, loss 7, 3.5 GiB at most (4.2 reserved, 0.06 more of paged optimizer states)\n"
    assert first_contact.read_figures(entries, text) == {
        "steps": 5,
        "peak_gib": 3.5,
        "reserved_gib": 4.2,
        "tokens_per_second": 200,  # of the steps after the first two
        "slowest_tokens_per_second": 100,
        "mfu": 0.2,
        "trained_share": 0.75,
        "losses": [11.0, 10.0, 9.0, 8.0, 7.0],
    }
    with pytest.raises(PartFails, match="no step"):
        first_contact.read_figures([], "")


@pytest.mark.parametrize("changed", [False, True])
def test_resumed_weights_are_compared_byte_for_byte(changed, tmp_path):
    for name, content in (("whole", b"weights"), ("resumed", b"Weights" if changed else b"weights")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").write_bytes(content)
        (tmp_path / name / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    found = first_contact.compare_runs(tmp_path / "whole", tmp_path / "resumed")
    assert found == {"is_same": not changed, "loss_difference": 0.0}


# -- processes and parts ----------------------------------------------------------------------------------------------
def test_a_failed_process_says_why(tmp_path):
    words = [sys.executable, "-c", "raise ValueError('no room')"]
    assert first_contact.run_process(words, tmp_path / "log", 60) == Ending("ValueError: no room")
    words = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    assert first_contact.run_process(words, tmp_path / "log", 60).why.startswith("killed by signal 9")
    assert first_contact.run_process([sys.executable, "-c", ""], tmp_path / "log", 60) == Ending("")


def test_the_reason_is_the_last_line_that_says_so():
    text = "torch.OutOfMemoryError: CUDA out of memory\nqwen3_full.py: memory ran out: pass --max_length 1024\n  hint\n"
    assert first_contact.find_reason(text, 1) == "qwen3_full.py: memory ran out: pass --max_length 1024"
    assert first_contact.find_reason("", 3) == "exit code 3"


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_process_beyond_its_time_is_ended(tmp_path):
    words = [sys.executable, "-c", "import time; time.sleep(60)"]
    ending = first_contact.run_process(words, tmp_path / "log", 0.3)
    assert ending == Ending("not done within 0.005 minutes (--part_minutes)")


def test_what_a_process_started_is_killed_with_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [sys.executable, "-c", SLEEPER, SLEEPER]
    ending = first_contact.run_process(words, tmp_path / "log", 60, is_over=Path("pid").exists)
    assert ending == Ending("", was_killed=True)
    pid = int(Path("pid").read_text())
    ends = time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < ends:
        time.sleep(0.02)
    assert not is_alive(pid)


def test_parts_go_on_after_a_failure_and_stop_at_an_interrupt(monkeypatch, tmp_path, capsys):
    seen = []

    def do_part(contact, part):
        seen.append(part.name)
        if part.name == "first":
            raise PartFails("it broke")
        if part.name == "third":
            raise KeyboardInterrupt
        return FIGURES | {"losses": [float("nan")]}

    monkeypatch.setattr(first_contact, "do_part", do_part)
    contact = make_contact(tmp_path)
    parts = [Part(name, "run", contact_plan.QLORA) for name in ("first", "second", "third", "fourth")]
    with pytest.raises(KeyboardInterrupt):
        first_contact.do_parts(contact, parts)
    assert seen == ["first", "second", "third"]
    text = (tmp_path / "first_contact.json").read_text()
    assert "NaN" not in text
    report = json.loads(text)
    assert set(report) == KEYS and report["card"] == CARD
    assert [part["state"] for part in report["parts"]] == ["failed", "done", "interrupted"]
    assert all(set(part) == PART_KEYS for part in report["parts"])
    assert report["parts"][1]["figures"]["losses"] == [None]
    assert contact_tables.make_markdown(report).count("| second |") == 1  # what is stored can be read back
    assert "it broke" in capsys.readouterr().out
    assert not first_contact.is_good(contact.results)


def test_what_cannot_be_tried_is_left_out_with_a_reason(monkeypatch, tmp_path, capsys):
    predicted = {"qwen3_full": Predicted(67.8, 68.1, False)}
    survey = make_survey(predicted=predicted)
    reasons = {}
    for part in contact_plan.list_parts(contact_plan.list_runs(False), survey):
        reasons[part.name] = first_contact.why_left_out(part, survey)
    assert reasons["qwen3_qlora"] == ""
    assert reasons["qwen3_full"] == "does not fit: 68.1 GiB needed as predicted, the card has 15.6"
    assert reasons["packed rows: flash_attention_2"] == "flash-attn is not installed"
    assert reasons["qwen3_qlora --attn_implementation flash_attention_2"] == "flash-attn is not installed"
    assert reasons["qwen3_qlora --use_liger_kernel false"].startswith("Liger is not installed")
    contact = make_contact(tmp_path)
    contact.minutes = -1
    first_contact.do_parts(contact, [Part("late", "run", contact_plan.QLORA)])
    assert contact.results[0].state == "left out"
    assert "no time left" in contact.results[0].why


def test_bad_input(tmp_path, capsys):
    (tmp_path / "mine").write_text("kept")
    assert first_contact.main(["--out", str(tmp_path)]) == 2
    assert "is in use" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "kept"
    parts = [Part("one", "run", contact_plan.QLORA)]
    with pytest.raises(first_contact.UsageError, match="no such part, they are: one"):
        first_contact.choose_parts(parts, ["two"])


# -- what the processes do --------------------------------------------------------------------------------------------
def test_rows_are_as_long_as_the_prediction_assumes(tmp_path):
    tokenizer = contact_child.make_tokenizer()
    path = tmp_path / "rows.jsonl"
    contact_child.write_rows(path, 200, contact_child.ROW_TOKENS)
    answers = 0
    tokens = 0
    for line in path.read_text().splitlines():
        user, assistant = json.loads(line)["messages"]
        answers += len(tokenizer(assistant["content"])["input_ids"])
        tokens += len(tokenizer(user["content"])["input_ids"]) + len(tokenizer(assistant["content"])["input_ids"])
    assert tokens / 200 == pytest.approx(contact_child.ROW_TOKENS, rel=0.05)
    assert answers / tokens == pytest.approx(contact_child.TRAINED_SHARE, abs=0.01)


def test_a_run_is_predicted_as_eval_fit_predicts_its_recipe(tmp_path):
    run = contact_plan.QLORA
    contact_child.write_config(
        contact_plan.model_folder(tmp_path, run.model), run.model, contact_child.make_tokenizer()
    )
    predicted = contact_child.predict_run(run, tmp_path, "flash_attention_2")
    described = contact_child.describe_prediction(predicted, "NVIDIA GeForce RTX 4080", 15.6)
    assert described.fits
    # no Liger here, and three quarters of the tokens in the head
    assert described.peak_gib == pytest.approx(STORED["qwen3_qlora"], rel=0.1)
    slow, fast = described.tokens_per_second
    assert 500 < slow < fast < 5000  # eval/README.md: 1,100 to 2,100 with Liger


@pytest.fixture
def tiny_model(tmp_path):
    folder = contact_plan.model_folder(tmp_path, contact_plan.TINY)
    contact_child.write_config(folder, contact_plan.TINY, contact_child.make_tokenizer())
    return folder


def test_weights_are_those_of_the_whole_model(tiny_model):
    found = contact_child.write_weights(tiny_model)
    model, loading = AutoModelForCausalLM.from_pretrained(tiny_model, output_loading_info=True)
    assert not any(loading.values())
    assert model.config.architectures == ["Qwen3ForCausalLM"]  # by which TRL chooses the class
    assert sum(weight.numel() for weight in model.parameters()) == found["parameters"]
    for name, weight in model.named_parameters():
        spread = 0.08 if weight.dim() > 1 else 0  # demo_model's initializer_range; norms are ones
        assert weight.std().item() == pytest.approx(spread, rel=0.05), name


@pytest.mark.parametrize("leak", ["none", "forward", "backward"])
def test_packed_rows_are_measured_forward_and_backward(leak, tiny_model, monkeypatch):
    from hooks.checks import packing

    gradient = contact_child.gradient

    def scaled_gradient(model, device, **inputs):
        value = gradient(model, device, **inputs)
        return 1.1 * value if "position_ids" in inputs else value

    if leak == "forward":
        monkeypatch.setattr(packing, "pack_documents", lambda documents: {"input_ids": documents.view(1, -1)})
    elif leak == "backward":
        monkeypatch.setattr(contact_child, "gradient", scaled_gradient)
    found = contact_child.measure_packing(tiny_model, "sdpa")
    assert found["is_same"] is (leak == "none")
    assert (found["gap"] < 1e-4) is (leak != "forward")
    assert (found["gradient_gap"] < 1e-5) is (leak == "none")
    assert found["gradient_joined_gap"] > 0.1


# -- docs -------------------------------------------------------------------------------------------------------------
def test_docs_quote_what_was_measured():
    if not DOCS.is_file():
        pytest.skip("no GPU has been measured yet: docs/first_contact.json")
    report = json.loads(DOCS.read_text(encoding="utf-8"))
    assert report["schema"] == first_contact.SCHEMA and not report["is_tiny"]
    quoted = []
    for path in (REPO / "README.md", REPO / "docs" / "measured.md", REPO / "eval" / "README.md"):
        quoted += path.read_text(encoding="utf-8").splitlines()
    for row in contact_tables.readme_rows(report)[2:]:
        assert row in quoted, f"no line of README.md, docs/measured.md or eval/README.md is {row}"


@pytest.mark.long
def test_all_of_it_with_tiny_shapes(tmp_path):
    words = [sys.executable, "-m", "eval.first_contact", "--out", "out", "--tiny", "--part_minutes", "8"]
    done = subprocess.run(words, cwd=tmp_path, env=MODULES, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out" / "first_contact.json").read_text())
    assert {part["name"]: part["state"] for part in report["parts"]} == {
        "packed rows: sdpa": "done",
        "qwen3_qlora": "done",
        "qwen3_qlora --full_determinism true": "done",
        "killed and resumed: qwen3_qlora": "done",
        "killed and resumed: qwen3_qlora --full_determinism true": "done",
    }
    assert (tmp_path / "out" / "first_contact.md").read_text() in done.stdout
    assert not (tmp_path / "out" / "models").exists() and not (tmp_path / "out" / "runs").exists()
