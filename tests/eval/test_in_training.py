"""eval/in_training.py: its figures are compare.py's, and the run trains as if it were not there.

The rigged models say one text whatever they are asked. Breaks tried, each seen red: a measurement between evaluations
that clears the trainer's should_log, after which the steps' own losses are missing from log.jsonl; training mode kept
or not restored, all modules left training, generation configs not restored, logged in training mode; gradients on;
losses off by one, or of whole logits; steps off by one, once per set, at evaluations too where `every` is set, outside
the run, or not handed on to the trainer; rows by another seed, of another split, all of them, with what Arrow fills in,
or without their template's arguments; max_length, the budget (also by one) or the generation config's stop tokens
ignored; figures of an earlier step where measuring failed; every process measuring the same rows, or the first one's
alone told; letters read at the end of the padded batch, or all questions by every process; a wrong share of
time; parallelism within a row taken. Two change no figure and stay green: labels on the
padding (the mask saves its head) and the seed of a bootstrap that is not logged.
"""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, load_from_disk
from safetensors.torch import load_file
from transformers import GenerationConfig
from trl.trainer import add_fused_lm_head

from data_prep.common.errors import UsageError
from eval import compare, in_training
from eval.common import models
from tests.eval.test_compare import STOP, chat, make_model, make_tokenizer, rigged, save, write_rows
from tests.helpers.engines import ENGINES, PROBE, ranks, run
from tests.helpers.runs import EXACT, REPO

EVALUATED = ["--eval_strategy", "steps", "--eval_steps", "2"]
SETTINGS = {"every": 0, "rows": 8, "data": None, "split": "validation", "max_new_tokens": 64, "batch_size": 3}


def watching(hook, name="watch.py", **settings):
    """Flags for a hook of a user's own with these settings, written as the docstring says."""
    lines = ["import sys", f"sys.path.insert(0, {str(REPO)!r})", "from eval.in_training import InTraining"]
    lines += ["class Mine(InTraining):", *(f"    {key} = {value!r}" for key, value in (SETTINGS | settings).items())]
    return hook("\n".join(lines), name)


def logged(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def measurements(folder):
    return [line for line in logged(folder) if "eval_assistant_perplexity" in line]


def weights(folder):
    return load_file(next(folder.glob("*model.safetensors")))


LOOSE = {  # recipe: flags under which it draws random numbers, checkpoints activations or casts; the hook's settings
    # dropout of the adapters, 4-bit weights, packs; measured in training mode, between evaluations
    "qwen3_qlora": (["--activation_checkpointing", "true"], {"every": 1, "rows": 3, "max_new_tokens": 24}),
    # fp32 masters under autocast, checkpointed activations; measured with the evaluations
    "qwen3_full": (["--bf16", "true", "--packing", "false"], {}),
}


@pytest.mark.parametrize("recipe", LOOSE)
def test_a_run_with_it_trains_the_same_weights_to_the_bit(run_recipe, hook, recipe, capsys):
    flags, settings = [*EVALUATED, "--logging_steps", "1", *LOOSE[recipe][0]], LOOSE[recipe][1]
    plain = run_recipe(recipe, *flags, out="plain")
    capsys.readouterr()
    watched = run_recipe(recipe, *flags, *watching(hook, **settings), out="watched")
    said = capsys.readouterr().out
    assert [line["step"] for line in measurements(watched)] == ([1, 2, 3, 4] if settings else [2, 4])
    before, after = weights(plain), weights(watched)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    for name in ("loss", "grad_norm", "entropy", "mean_token_accuracy", "eval_loss", "eval_entropy"):
        curves = [[line[name] for line in logged(folder) if name in line] for folder in (plain, watched)]
        assert curves[0] == curves[1] and curves[0], name
    assert f"in_training.py: perplexity of {settings.get('rows', 8)} rows, answers to " in said
    assert "% of the run" in said


# -- the figures -------------------------------------------------------------------------------------------------------
FIGURES = ("assistant_perplexity", "usability", "stop_rate", "loop_rate", "json_valid")


def test_its_last_figures_are_those_of_compare_on_the_saved_model(run_recipe, hook, demo, tmp_path):
    flags = ["--packing", "false", *EXACT, "--bf16", "false", "--learning_rate", "3e-2", "--save_strategy", "best"]
    flags += ["--metric_for_best_model", "eval_assistant_perplexity", "--greater_is_better", "false"]
    out = run_recipe("qwen3_full", *EVALUATED, *flags, *watching(hook))
    held_out = load_from_disk(str(demo / "rows" / "chat"))["validation"]
    chosen = held_out.select(sorted(random.Random(42).sample(range(len(held_out)), 8)))
    write_rows(tmp_path / "rows.jsonl", [*chosen])
    words = ["--base", demo / "init", "--tuned", out, "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "report"]
    assert compare.main([str(word) for word in [*words, "--max_new_tokens", 64]]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())["results"]["overall"]["all"]["tuned"]
    last = measurements(out)[-1]
    assert last["step"] == 4 and report["stop_rate"]["total"] == 8
    assert last["eval_assistant_perplexity"] == pytest.approx(report["assistant_perplexity"]["value"], rel=1e-4)
    assert last["eval_assistant_perplexity"] < measurements(out)[0]["eval_assistant_perplexity"] / 1.2
    for name in FIGURES[1:]:
        assert last[f"eval_{name}"] == report[name]["value"], name
    state = json.loads((out / "checkpoint-4" / "trainer_state.json").read_text())  # the trainer chose by the figure
    assert state["best_metric"] == pytest.approx(last["eval_assistant_perplexity"])


CHATS = [chat(f"Question {n}?", "[1,2]", id=str(n), source="json", tags=["json"]) for n in range(16)]
RIGGED = {  # what the model says: (the figures of it)
    "good": (rigged, ("[1,2]", True), (1, 1, 0, 1)),
    "never stops": (rigged, ("[1,2]", False), (0, 0, 1, 0)),  # its last character for ever
    "breaks JSON": (rigged, ("[1,2", True), (1, 1, 0, 0)),
}


@pytest.mark.parametrize("name", RIGGED)
def test_a_planted_model_has_its_figures_in_the_log(run_recipe, hook, tmp_path, name):
    make, words, expected = RIGGED[name]
    save(tmp_path / "model", make(*words))
    write_rows(tmp_path / "rows.jsonl", CHATS)
    flags = ["--model_name_or_path", tmp_path / "model", "--dataset_name", tmp_path / "rows.jsonl", "--eval_rows", "8"]
    flags += ["--chat_template_path", REPO / "chat_templates" / "qwen3_instruct_2507.jinja", "--learning_rate", "0"]
    flags += ["--packing", "false", "--bf16", "false", "--max_steps", "1", *EVALUATED[:3], "1"]
    # an end over and over is seen from 64 characters on
    [line] = measurements(run_recipe("qwen3_full", *flags, *watching(hook, max_new_tokens=80)))
    assert tuple(line[f"eval_{name}"] for name in FIGURES[1:]) == expected
    assert 0 < line["eval_answers_time_share"] < 1


def test_losses_by_the_fused_head_are_those_of_compare():
    torch.manual_seed(0)
    model = make_model(0).eval()
    sequences = [torch.randint(0, 256, (length,)).tolist() for length in (3, 17, 1, 40, 2, 9)]
    expected = models.token_losses(model, sequences, 1, 0)
    add_fused_lm_head(model)
    for size in (1, 4, 6):
        for ours, theirs in zip(in_training.fused_losses(model, sequences, size, 0, ""), expected, strict=True):
            assert ours.shape == theirs.shape and np.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_reference_above_the_budget_asks_for_no_answer(run_recipe, hook, tmp_path, capsys):
    """Else the stop rate would count what no model could do: the rigged one stops after 5 tokens."""
    save(tmp_path / "model", rigged("[1,2]"))
    long = [chat(f"Long {n}?", "word " * 40, id=f"long-{n}", source="long") for n in range(8)]
    write_rows(tmp_path / "rows.jsonl", CHATS)
    data = write_rows(tmp_path / "held_out.jsonl", CHATS[:2] + long)
    flags = ["--model_name_or_path", tmp_path / "model", "--dataset_name", tmp_path / "rows.jsonl", "--eval_rows", "0"]
    flags += ["--chat_template_path", REPO / "chat_templates" / "qwen3_instruct_2507.jinja", "--learning_rate", "0"]
    flags += ["--packing", "false", "--bf16", "false", "--max_steps", "1"]
    settings = {"every": 1, "data": str(data), "max_new_tokens": 6, "rows": 10}  # five characters and the stop token
    [line] = measurements(run_recipe("qwen3_full", *flags, *watching(hook, **settings)))
    assert "perplexity of 10 rows, answers to 2 (the others need more than 6 tokens)" in capsys.readouterr().out
    assert (line["eval_stop_rate"], line["eval_json_valid"]) == (1, 1)


def letter_questions(path):
    """12 questions with four choices, whose right letters are A, B, C, D in turn."""
    rows = []
    for number in range(12):
        choices = [f"{number + place}" for place in range(4)]
        rows.append(
            {
                "question": "so " * (number * 7 % 12) + f"which is {choices[number % 4]}?",
                "choices": choices,
                "answer": number % 4,
            }
        )
    return write_rows(path, rows)


def by_hand(model, tokenizer, row):
    """The letter with the highest logit where the answer stands in the whole conversation, as nanochat writes it."""
    lines = "".join(f"- {choice}={letter}\n" for letter, choice in zip("ABCD", row["choices"], strict=True))
    question = (
        f"Multiple Choice question: {row['question']}\n{lines}\nRespond only with the letter of the correct answer."
    )
    whole = [{"role": "user", "content": question}, {"role": "assistant", "content": "§"}]
    text = tokenizer.apply_chat_template(whole, tokenize=False)
    ids = tokenizer(text[: text.index("§")], add_special_tokens=False)["input_ids"]
    letters = [tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "ABCD"]
    with torch.no_grad():
        return "ABCD"[int(model(torch.tensor([ids])).logits[0, -1, letters].argmax())]


def test_letters_are_those_of_the_logits_where_the_answer_stands(tmp_path):
    path = letter_questions(tmp_path / "mmlu.jsonl")
    model = make_model(3).eval()
    hook, trainer, log = hooked(CHATS[:2], model, letters={"mmlu": str(path)}, batch_size=5)
    [metrics] = step(hook, trainer, 2, evaluations=1)
    model.eval()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    answers = [by_hand(model, trainer.processing_class, row) for row in rows]
    right = sum(answer == "ABCD"[row["answer"]] for answer, row in zip(answers, rows, strict=True))
    assert metrics["eval_mmlu"] == right / 12 and log[0]["eval_mmlu"] == right / 12 and len(set(answers)) > 1


def test_processes_share_the_questions_and_the_sum(tmp_path, monkeypatch):
    path = letter_questions(tmp_path / "mmlu.jsonl")
    model = make_model(3)
    alone = step(*hooked(CHATS[:2], model, letters={"mmlu": str(path)})[:2], 2, evaluations=1)[0]["eval_mmlu"]
    asked = []
    count = in_training.count_right_letters

    def counted(model, tokenizer, stops, problems, batch_size):
        asked.append([problem.id for problem in problems])
        return count(model, tokenizer, stops, problems, batch_size)

    monkeypatch.setattr(in_training, "count_right_letters", counted)
    shares = []
    for rank in (0, 1):
        hook, trainer, _ = hooked(CHATS[:2], make_model(3), letters={"mmlu": str(path)})
        trainer.args.world_size, trainer.args.process_index = 2, rank
        monkeypatch.setattr(in_training, "gather_object", lambda own: own)
        shares.append(hook.measure_letters()["eval_mmlu"])
    assert sum(shares) == pytest.approx(alone) and len(asked[0]) == len(asked[1]) == 6
    assert not set(asked[0]) & set(asked[1])


def test_letters_name_tasks_and_files(tmp_path):
    with pytest.raises(ValueError, match="letters names mmul: it may name arc_easy, arc_challenge, mmlu$"):
        hooked(CHATS[:2], letters={"mmul": "x.jsonl"})
    with pytest.raises(ValueError, match="gsm8k"):
        hooked(CHATS[:2], letters={"gsm8k": "x.jsonl"})
    with pytest.raises(ValueError, match=r"no.jsonl"):
        hooked(CHATS[:2], letters={"mmlu": str(tmp_path / "no.jsonl")})


# -- when, and of which rows -------------------------------------------------------------------------------------------
class Wrapped:
    """What the trainer wraps around a model whose weights are sharded: counts the passes, all of the fused head."""

    def __init__(self, model):
        self.model, self.device, self.passes = model, model.device, 0

    def __call__(self, **named):
        assert named["fused_lm_head"] and not self.model.training
        self.passes += 1
        return self.model(**named)


def hooked(messages, model=None, sizes=(1, 1, 1), max_length=None, sharded=False, evaluates="steps", **settings):
    """(the hook on a trainer that does nothing else, that trainer, what it logs) after the run began."""
    model = model or rigged("[1,2]")
    add_fused_lm_head(model)
    log, control = [], SimpleNamespace(should_log=True)

    def written(line):
        assert not model.training  # else TRL would log, and forget, its means of the training steps
        log.append(line)
        control.should_log = False  # as the trainer's own log() leaves it

    trainer = SimpleNamespace(
        args=SimpleNamespace(seed=42, max_length=max_length, world_size=1, process_index=0, eval_strategy=evaluates),
        validation_rows=Dataset.from_list(messages),
        model=model.train(),
        model_wrapped=Wrapped(model),
        processing_class=make_tokenizer("qwen3"),
        log=written,
        control=control,
        state=SimpleNamespace(global_step=0),
        is_in_train=True,
        is_fsdp_enabled=sharded,
        is_world_process_zero=lambda: True,
        **{f"get_{kind}_size": lambda size=size: size for kind, size in zip(("sp", "cp", "tp"), sizes, strict=True)},
    )
    hook = type("Mine", (in_training.InTraining,), SETTINGS | settings)(trainer)
    hook.on_train_begin(trainer.args, trainer.state, None)
    return hook, trainer, log


def drawn(hook, key):
    """One key of each row that is measured."""
    return [prepared.row[key] for prepared in hook.prepared]


def step(hook, trainer, number, evaluations=0):
    """The dicts of the evaluations after the number-th step, as a trainer calls its hooks."""
    control, found = trainer.control, [{"eval_loss": 1.0} for _ in range(evaluations)]
    trainer.state.global_step, control.should_log = number, True
    hook.on_step_end(trainer.args, trainer.state, control)
    assert control.should_log
    for metrics in found:
        hook.on_evaluate(trainer.args, trainer.state, control, metrics=metrics)
    return found


def test_it_measures_with_each_evaluation_or_every_so_many_steps():
    hook, trainer, log = hooked(CHATS[:2])
    assert step(hook, trainer, 1) == [] and not log
    for number in (2, 4):  # two sets are evaluated: measured once, known to both
        for metrics in step(hook, trainer, number, evaluations=2):
            assert metrics["eval_stop_rate"] == metrics["eval_json_valid"] == metrics["eval_loss"] == 1
    assert len(log) == 2 and "eval_answers_time_share" in log[0] and trainer.model.training
    trainer.is_in_train = False  # evaluate() after the run
    assert step(hook, trainer, 5, evaluations=1) == [{"eval_loss": 1.0}] and len(log) == 2
    hook, trainer, log = hooked(CHATS[:2], every=3)
    seen = []
    for number in range(1, 8):
        assert step(hook, trainer, number, evaluations=number == 4) in ([], [{"eval_loss": 1.0}])
        seen.append(len(log))
    assert seen == [0, 0, 1, 1, 1, 2, 2]
    hooked(CHATS[:2], every=3, evaluates="no")  # needs no evaluations
    with pytest.raises(ValueError, match="measures with evaluations"):
        hooked(CHATS[:2], evaluates="no")


def test_a_failed_measurement_gives_no_figures_of_another_step(capsys):
    hook, trainer, log = hooked(CHATS[:2])
    assert all("eval_stop_rate" in metrics for metrics in step(hook, trainer, 2, 2))
    with torch.no_grad():
        trainer.model.lm_head.weight[0, 0] = float("nan")
    assert step(hook, trainer, 4, 2) == [{"eval_loss": 1.0}] * 2 and len(log) == 1
    assert "in_training.py: not measured: the model model's loss on row 0 is not a number" in capsys.readouterr().out


def test_answers_have_a_budget_and_rows_a_seed(monkeypatch, tmp_path):
    """The rigged model never stops: what it says is as long as the budget."""
    said, judge = [], in_training.measure
    monkeypatch.setattr(in_training, "measure", lambda *a, **k: said.append(judge(*a, **k)) or said[-1])
    rows = [
        chat("A?", "abcd", id="fits"),
        chat("B?", "abcde", id="long"),
    ]  # an empty think block before, four tokens, and a stop token
    hook, trainer, _ = hooked(rows, rigged("xy", stops=False), max_new_tokens=9)
    step(hook, trainer, 2, 1)
    assert [record["answer_tokens"] for record in said[0]] == [9, None] and said[0][0]["answer"] == "xyyyyyyyy"
    hook, *_ = hooked(CHATS, rows=4)
    assert [int(name) for name in drawn(hook, "id")] == sorted(random.Random(42).sample(range(16), 4))
    DatasetDict({"test": Dataset.from_list(CHATS), "other": Dataset.from_list(rows)}).save_to_disk(tmp_path / "set")
    hook, *_ = hooked(CHATS, data=str(tmp_path / "set"), split="other")
    assert drawn(hook, "id") == ["fits", "long"]


def test_its_share_of_the_time(monkeypatch, capsys):
    clock = iter([100.0, 110.0, 113.0, 120.0, 125.0, 160.0])  # began; twice since and now; the end
    monkeypatch.setattr(in_training, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    hook, trainer, log = hooked(CHATS[:1])
    step(hook, trainer, 2, 1), step(hook, trainer, 4, 1)
    assert [line["eval_answers_time_share"] for line in log] == [round(3 / 13, 4), 8 / 25]
    hook.on_train_end(trainer.args, trainer.state, None)
    assert "measuring took 8.0 s, 13.3% of the run" in capsys.readouterr().out


def test_the_rows_are_what_the_recipe_was_given(capsys):
    """Without what Arrow fills in, with their template's arguments; what cannot be scored is told and left out."""

    def call(**arguments):
        return {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments}}],
        }

    rows = [
        chat("A?", "7", id="a", chat_template_kwargs={"enable_thinking": False}),
        {"id": "b", "messages": [{"role": "user", "content": "B?"}, call(city="Oslo")]},
        {"id": "c", "messages": [{"role": "user", "content": "C?"}, call(days=2)]},
        chat("D?", "word " * 60, id="d"),
        chat("E?", "7", id="e") | {"messages": [{"role": "user", "content": "E?"}]},
    ]
    hook, trainer, _ = hooked(rows, max_length=150)
    assert drawn(hook, "id") == ["a", "b", "c"]
    assert drawn(hook, "messages") == [row["messages"] for row in rows[:3]]
    assert drawn(hook, "kwargs") == [{"enable_thinking": False}, {}, {}]
    tail = "; 2 turns are not scored (first: conversation longer than the limit)"
    assert f"perplexity of 3 rows, answers to 3{tail}" in capsys.readouterr().out
    hook, *_ = hooked(rows)  # without --max_length, what the model has room for
    assert drawn(hook, "id") == ["a", "b", "c", "d"]


def test_stop_tokens_of_the_generation_config_count():
    model, [b] = rigged("ab", stops=False), make_tokenizer("qwen3")("b")["input_ids"]
    for eos in (b, [b]):
        model.generation_config.eos_token_id = eos
        hook, trainer, _ = hooked([chat("A?", "a", id="a")], model)
        assert step(hook, trainer, 2, 1)[0]["eval_stop_rate"] == 1 and hook.stops == {STOP, b}
        model.generation_config.eos_token_id = None
        hook, trainer, _ = hooked([chat("A?", "a", id="a")], model)
        assert step(hook, trainer, 2, 1)[0]["eval_stop_rate"] == 0  # "abbb…"


def test_sharded_weights_are_asked_for_no_answers(monkeypatch, capsys):
    hook, trainer, _ = hooked(CHATS[:5], sharded=True, batch_size=2)
    trainer.args.world_size, trainer.args.process_index = 2, 1  # gathered weights: every process passes all rows
    monkeypatch.setattr(in_training, "gather_object", lambda found: found * 2)
    assert "perplexity of 5 rows, answers to 0 (the weights are sharded)" in capsys.readouterr().out
    [metrics] = step(hook, trainer, 2, 1)
    assert set(metrics) == {"eval_loss", "eval_assistant_perplexity"} and trainer.model_wrapped.passes == 3


@pytest.mark.parametrize(("sizes", "kind"), [((2, 1, 1), "sequence"), ((1, 2, 1), "context"), ((1, 1, 2), "tensor")])
def test_parallelism_within_a_row_is_refused(sizes, kind):
    with pytest.raises(ValueError, match=f"does not measure under {kind} parallelism: run without it"):
        hooked(CHATS, sizes=sizes)


def test_a_trainer_of_trl_alone_needs_a_file_of_rows(demo, tmp_path):
    """Without a recipe and its hooks: the rows come from `data`, and the run trains what it trains without it."""
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    rows = [*load_from_disk(str(demo / "rows" / "chat"))["validation"].select(range(12))]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    template = (REPO / "chat_templates" / "qwen3.jinja").read_text()

    def train(out, **settings):
        tokenizer = AutoTokenizer.from_pretrained(demo / "init")
        tokenizer.chat_template = template
        args = SFTConfig(
            str(tmp_path / out),
            use_cpu=True,
            bf16=False,
            max_steps=2,
            max_length=512,
            assistant_only_loss=True,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            model_init_kwargs={"dtype": "float32"},
            learning_rate=1e-2,
        )
        messages = [{"messages": row["messages"]} for row in rows if not row.get("tools")]
        trainer = SFTTrainer(
            str(demo / "init"),
            args,
            train_dataset=Dataset.from_list(messages),
            eval_dataset=Dataset.from_list(messages[:4]),
            processing_class=tokenizer,
        )
        if settings:
            trainer.add_callback(type("Mine", (in_training.InTraining,), SETTINGS | settings)(trainer))
        trainer.train()
        return trainer

    with pytest.raises(ValueError, match="SFTTrainer keeps no rows of messages.*set data of InTraining"):
        train("refused", rows=4)
    watched, plain = train("watched", rows=4, data=str(data)), train("plain")
    found = [line["eval_stop_rate"] for line in watched.state.log_history if "eval_stop_rate" in line]
    assert len(found) == 2
    pairs = zip(watched.model.parameters(), plain.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


# -- nothing is left behind --------------------------------------------------------------------------------------------
def test_everything_is_put_back():
    model = make_model(0).train()
    model.model.layers[0].eval()  # a part that was frozen by hand
    model.generation_config = GenerationConfig(temperature=0.3, do_sample=True)
    modes, config = [module.training for module in model.modules()], model.generation_config
    settings, state = model.config.to_dict(), torch.get_rng_state()
    with pytest.raises(KeyError), in_training.unchanged(model):
        assert not any(module.training for module in model.modules())
        torch.rand(3)
        models.generate(model, [[1, 2, 3]], {5}, 1, 0, 4)
        model.lm_head.generation_config = GenerationConfig()  # as PEFT hands it down
        assert model.generation_config is not config
        raise KeyError
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config is config and "generation_config" not in vars(model.lm_head)
    assert model.config.to_dict() == settings and torch.equal(torch.get_rng_state(), state)
    assert not any(weight.is_inference() for weight in [*model.parameters(), *model.buffers()])


def test_what_cannot_be_measured_does_not_end_the_run(run_recipe, hook, monkeypatch, capsys):
    def broken(*_, **__):
        raise UsageError("the loss on row 7 is not a number")

    monkeypatch.setattr(in_training, "measure", broken)
    out = run_recipe("qwen3_qlora", *EVALUATED, *watching(hook))
    assert not measurements(out) and logged(out)[-1]["step"] == 4
    assert capsys.readouterr().out.count("in_training.py: not measured: the loss on row 7 is not a number") == 2


def test_runs_that_have_nothing_to_measure_are_refused(run_recipe, hook, demo, tmp_path):
    with pytest.raises(ValueError, match="measures with evaluations: --eval_strategy steps"):
        run_recipe("qwen3_qlora", "--eval_strategy", "no", *watching(hook))
    write_rows(tmp_path / "rows.jsonl", [*load_from_disk(str(demo / "rows" / "chat"))["train"].select(range(40))])
    rows = ["--dataset_name", tmp_path / "rows.jsonl", "--eval_rows", "0"]
    with pytest.raises(ValueError, match="needs validation rows of messages.*--eval_rows"):
        run_recipe("qwen3_qlora", *rows, *watching(hook, every=1), out="second")


# -- several processes -------------------------------------------------------------------------------------------------
def start(demo, tmp_path, engine, out, *flags, hooks=()):
    (tmp_path / "probe.py").write_text(PROBE)
    data = ["--model_name_or_path", demo / "init", "--dataset_name", demo / "rows" / "chat", *EVALUATED, *EXACT]
    data += ["--chat_template_path", REPO / "chat_templates" / "qwen3.jinja", "--hooks", tmp_path / "probe.py", *hooks]
    data += ["--max_steps", 4, "--global_batch_size", 4, "--max_length", 512, "--learning_rate", "1e-2"]
    data += ["--save_strategy", "no", "--disable_tqdm", "true", "--output_dir", tmp_path / out]
    run(ENGINES[engine].command("qwen3_full", *data, *flags))
    return tmp_path / out


@pytest.mark.long
def test_two_processes_measure_what_one_measures(demo, run_recipe, hook, tmp_path):
    """13 rows, so that the ranks have unequal parts and another number of passes."""
    flags = watching(hook, rows=13)
    one = run_recipe("qwen3_full", *EVALUATED, *EXACT, *flags)
    two = start(demo, tmp_path, "ddp", "two", hooks=flags[1:])
    assert [rank["world"] for rank in ranks(two)] == [2, 2]
    pairs = list(zip(measurements(one), measurements(two), strict=True))
    assert [line["step"] for line, _ in pairs] == [2, 4]
    for single, split in pairs:
        assert split["eval_assistant_perplexity"] == pytest.approx(single["eval_assistant_perplexity"], rel=1e-4)
        assert all(split[f"eval_{name}"] == single[f"eval_{name}"] for name in FIGURES[1:])


@pytest.mark.long
@pytest.mark.parametrize("engine", ["zero3", "fsdp2", "zero2"])
def test_sharded_weights_are_measured_by_perplexity_and_train_the_same(demo, hook, tmp_path, run_recipe, engine):
    flags = watching(hook, rows=13)
    plain, watched = start(demo, tmp_path, engine, "plain"), start(demo, tmp_path, engine, "watched", hooks=flags[1:])
    found = ranks(watched)
    assert [rank["world"] for rank in found] == [2, 2]
    for name in ("loss", "eval_loss"):
        curves = [[line[name] for line in logged(folder) if name in line] for folder in (plain, watched)]
        assert curves[0] == curves[1] and curves[0]
    before, after = weights(plain), weights(watched)
    assert all(torch.equal(before[name], after[name]) for name in before)
    one = run_recipe("qwen3_full", *EVALUATED, *EXACT, *flags)
    for single, split in zip(measurements(one), measurements(watched), strict=True):
        assert split["eval_assistant_perplexity"] == pytest.approx(single["eval_assistant_perplexity"], rel=1e-4)
        assert ("eval_stop_rate" in split) is (engine == "zero2")
    if engine != "zero2":
        assert all(rank["weights"][0] < 0.6 * rank["weights"][1] for rank in found)


@pytest.mark.long
def test_sequence_parallelism_is_refused_in_a_sentence(demo, hook, tmp_path):
    with pytest.raises(AssertionError, match="does not measure under sequence parallelism: run without it"):
        start(demo, tmp_path, "sp", "sp", *ENGINES["sp"].flags, hooks=watching(hook)[1:])
