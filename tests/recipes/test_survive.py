"""A run survives what happens to it: kills, broken checkpoints, bad rows, full disks, lost ranks, Ctrl-C."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trl
from datasets import load_from_disk
from hooks.checkpoints import choose_checkpoint, find_fault
from hooks.early_stopping import EarlyStopping
from hooks.step_watch import Explosion
from safetensors.torch import load_file
from transformers import AutoTokenizer
from transformers.trainer_utils import IntervalStrategy

from tests.helpers.runs import REPO, TINY

EARLY = ["--hooks", str(REPO / "recipes" / "hooks" / "early_stopping.py")]
SAVES = ["--max_steps", "6", "--save_strategy", "steps", "--save_steps", "2", "--eval_strategy", "no"]
ON = ["--resume_from_checkpoint", "true"]


@pytest.fixture
def run(run_recipe, demo, tmp_path, capfd, monkeypatch):
    """run(*flags, out=, probe=) runs qwen3_qlora here with the hooks; returns its folder, exit code and what it said.

    probe is the source of one more hook. An exception is told as the recipe itself would tell it.
    """

    def start(*flags, out="run", probe=None, recipe="qwen3_qlora"):
        if probe:
            path = tmp_path / f"probe{abs(hash(probe))}.py"
            path.write_text(probe)
        capfd.readouterr()
        monkeypatch.setattr(trl.SFTTrainer, "compute_loss", trl.SFTTrainer.compute_loss)  # POISON replaces it
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        code = 0
        try:
            flags = [str(flag) for flag in flags]
            if probe and "--hooks" in flags:
                flags.insert(flags.index("--hooks") + 1, str(path))
            elif probe:
                flags += ["--hooks", str(path)]
            run_recipe(recipe, *SAVES, *flags, out=out)
        except SystemExit as stop:
            code = stop.code
        except Exception:
            code = 1
            sys.excepthook(*sys.exc_info())
        finally:
            for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
                signal.signal(number, handler)
        said = "".join(capfd.readouterr())
        assert "Traceback" not in said, said
        return tmp_path / out, code, said

    return start


@pytest.fixture(scope="session")
def whole(demo, tmp_path_factory):
    """The uninterrupted run, in a process of its own: what every interrupted one must equal."""
    folder = tmp_path_factory.mktemp("survive") / "whole"
    done = subprocess.run(command(demo, folder), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def command(demo, folder, *flags, recipe="qwen3_qlora", config=None):
    launcher = ["-m", "accelerate.commands.launch", "--config_file", REPO / "accelerate_configs" / f"{config}.yaml"]
    given = [sys.executable, *(launcher if config else []), REPO / "recipes" / f"{recipe}.py", *TINY]
    given += ["--model_name_or_path", demo / "init", "--dataset_name", demo / "rows" / "chat", "--output_dir", folder]
    given += ["--chat_template_path", REPO / "chat_templates" / "qwen3.jinja", *SAVES, *flags]
    return [str(word) for word in given]


def copy_of(whole, tmp_path, final=False):
    """A copy of the finished run as it was before its final save."""
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    if not final:
        [path.unlink() for path in folder.glob("*.safetensors")]
    return folder


def losses(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["num_tokens"]) for line in lines if "loss" in line]


def assert_same(one, two, steps=6):
    assert losses(one) == losses(two) and [step for step, *_ in losses(one)] == list(range(1, steps + 1))
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def steps_of(folder):
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


# -- 1: checksums ------------------------------------------------------------------------------------------------------
def truncate(folder):
    path = folder / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:-1000])


def half_delete(folder):
    for path in sorted(folder.iterdir())[::2]:
        if path.name not in ("trainer_state.json", "manifest.json"):
            path.unlink()


def flip(folder):
    path = folder / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_short(folder):
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (truncate, ["optimizer.pt has", "bytes"]),
        (half_delete, ["is missing"]),
        (flip, ["adapter_model.safetensors is not what was written"]),
        (cut_short, ["manifest.json", "cut short"]),
    ],
)
def test_broken_checkpoint_is_named_and_the_one_before_taken(whole, tmp_path, capfd, monkeypatch, harm, words):
    """Nothing has been loaded when it is chosen."""
    folder = copy_of(whole, tmp_path)
    harm(folder / "checkpoint-6")
    assert choose_checkpoint(asked("true", folder)) == str(folder / "checkpoint-4")
    said = capfd.readouterr().out
    assert all(word in said for word in ["checkpoint-6", "broken-checkpoint-6", *words]), said
    assert steps_of(folder) == [4] and (folder / "broken-checkpoint-6").is_dir()
    harm(folder / "checkpoint-4")
    with pytest.raises(ValueError, match="checkpoint-4 is broken"):
        choose_checkpoint(asked(folder / "checkpoint-4", folder))
    assert choose_checkpoint(asked("true", folder)) is None and "starts afresh" in capfd.readouterr().out


def asked(value, out):
    return SimpleNamespace(output_dir=str(out), resume_from_checkpoint=str(value))


def test_lone_checkpoints_are_taken_unverified(whole, tmp_path, capfd):
    folder = copy_of(whole, tmp_path)
    (folder / "run.json").unlink()
    for path in folder.glob("*/manifest.json"):
        path.unlink()
    for said in ("checkpoint-6 was saved without checksums: taken unverified", ""):
        assert choose_checkpoint(asked("true", folder)) == str(folder / "checkpoint-6")
        assert said in capfd.readouterr().out


def test_sealed_before_the_old_one_goes(run, whole):
    """With --save_total_limit 1, a kill between the save and its seal must not leave the run without a checkpoint."""
    probe = """
import os, shutil
from transformers import TrainerCallback
class Deletions(TrainerCallback):
    def __init__(self, trainer):
        self.remove = shutil.rmtree
        def remove(path, *rest, **kwargs):
            folder = os.path.dirname(str(path))
            names = [name for name in sorted(os.listdir(folder)) if "checkpoint" in name]
            if names:
                print("DELETES", [os.path.exists(f"{folder}/{name}/manifest.json") for name in names])
            self.remove(path, *rest, **kwargs)
        shutil.rmtree = remove
    def on_train_end(self, *_, **__):
        shutil.rmtree = self.remove
"""
    folder, code, said = run("--save_total_limit", 1, probe=probe)
    assert code == 0 and steps_of(folder) == [6]
    assert said.count("DELETES [True, True]") == 2 == said.count("DELETES")
    assert_same(folder, whole)


# -- 3: nan and explosions ---------------------------------------------------------------------------------------------
POISON = """
import json
from pathlib import Path
import trl
from transformers import TrainerCallback
PLAIN = trl.SFTTrainer.compute_loss  # below what the hooks see of a loss
def poison(trainer):
    seen = []
    def compute_loss(self, model, inputs, *rest, **kwargs):
        loss = PLAIN(self, model, inputs, *rest, **kwargs)
        seen.append(1)
        if len(seen) == CALL and trainer.args.process_index == RANK:
            ids, places = inputs["input_ids"][0].tolist(), inputs["position_ids"][0].tolist()
            starts = [i for i, place in enumerate(places) if place == 0] + [len(ids)]
            texts = [trainer.processing_class.decode(ids[a:b]) for a, b in zip(starts, starts[1:])]
            Path(trainer.args.output_dir, "texts.json").write_text(json.dumps(texts))
            loss = loss * VALUE
        return loss
    trl.SFTTrainer.compute_loss = compute_loss
class Count(TrainerCallback):
    def __init__(self, trainer):
        poison(trainer)
    def on_train_begin(self, *_, optimizer, **__):
        real = optimizer.step
        def step(*args, **kwargs):
            print("STEPPED")
            return real(*args, **kwargs)
        optimizer.step = step
"""


def poison(call, value, rank=0):
    return POISON.replace("CALL", str(call)).replace("VALUE", value).replace("RANK", str(rank))


def rows_of(texts, demo):
    """By another way than the hook: the rendered text of every row against the decoded text of the documents."""
    tokenizer = AutoTokenizer.from_pretrained(demo / "init")
    tokenizer.chat_template = (REPO / "chat_templates" / "qwen3.jinja").read_text()
    found = []
    for row in load_from_disk(demo / "rows" / "chat")["train"]:
        given = {"tools": row["tools"], "tokenize": False, **row["chat_template_kwargs"]}
        if tokenizer.apply_chat_template(row["messages"], **given) in texts:
            found.append(row["id"])
    return found


@pytest.mark.parametrize(
    ("value", "words"),
    [("float('nan')", "the loss is nan"), ("1e4", "for a uniform guess")],
    ids=["nan", "explosion"],
)
def test_a_bad_batch_stops_the_run(run, demo, value, words):
    """In the fourth step, by its second of four batches: three steps taken, checkpoint-2 whole, nothing after it."""
    folder, code, said = run("--learning_rate", "1e-3", probe=poison(14, value))
    assert code == 1 and said.count("STEPPED") == 3
    texts = json.loads((folder / "texts.json").read_text())
    wanted = rows_of(texts, demo)
    assert len(wanted) >= 2 and len(wanted) == len(texts)
    line = next(line for line in said.splitlines() if "stopped before the weights changed" in line)
    assert "step 4, rank 0" in line and words in line and "checkpoint-2" in line
    named = re.findall(r"train-[\w-]+", line)
    assert named == wanted
    assert steps_of(folder) == [2] and find_fault(folder / "checkpoint-2") is None
    assert not list(folder.glob("*.safetensors"))


def test_the_rule_lets_healthy_runs_pass():
    rule, noise = Explosion, random.Random(0)
    healthy = {
        "fine-tuning": [1.5 * 0.99**i + 0.4 + noise.gauss(0, 0.2) for i in range(400)],
        "from scratch": [12.3 * 0.995**i + 1 for i in range(400)],
        "memorised, then a hard batch": [0.01] * 100 + [3.0, 0.02, 8.0, 0.01, 11.0, 0.01, 6.0, 6.0, 6.0, 6.0],
        "one-word answers": [0.05 if i % 7 else 9.0 for i in range(200)],
    }
    for name, losses in healthy.items():
        watch = rule(151_669)
        norms = [noise.lognormvariate(0, 2) for _ in losses]
        assert [watch.check(*pair) for pair in zip(losses, norms, strict=True)] == [None] * len(losses), name
    for losses, norms, at in (
        ([1.0] * 20 + [30.0], [1.0] * 21, 20),
        ([1.0] * 20 + [13.0, 14.0, 15.0], [1.0] * 23, 22),
        ([1.0] * 21, [1.0] * 20 + [2000.0], 20),
    ):
        watch = rule(151_669)
        told = [watch.check(*pair) for pair in zip(losses, norms, strict=True)]
        assert [i for i, wrong in enumerate(told) if wrong] == [at]


# -- 5: Ctrl-C ---------------------------------------------------------------------------------------------------------
SIGNAL = """
import os, signal
from transformers import TrainerCallback
class Signal(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.NAME)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_saves_and_says_how_to_go_on(run, whole, name):
    folder, code, said = run("--save_steps", 4, probe=SIGNAL.replace("NAME", name))
    assert code == 128 + getattr(signal, name) and steps_of(folder) == [3]
    assert "checkpoint-3 is saved and verified" in said and "--resume_from_checkpoint true" in said.splitlines()[-1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if name == "SIGINT":
        _, code, _ = run("--save_steps", 4, *ON)
        assert code == 0
        assert_same(folder, whole)


# -- 4: a rank is lost -------------------------------------------------------------------------------------------------
LOST = """
import os, signal, subprocess, time
from transformers import TrainerCallback
class Lost(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 2 and args.process_index == 1:
            print("LOST AT", time.time(), flush=True)
            if AFTER:
                subprocess.Popen(["sh", "-c", f"sleep AFTER; kill -9 {os.getpid()}"])
            os.kill(os.getpid(), signal.NAME)
"""
SLOW = """
import time
from transformers import TrainerCallback
class Slow(TrainerCallback):
    def __init__(self, trainer):
        plain = trainer.save_model
        def save_model(*args, **kwargs):
            if not kwargs:
                time.sleep(10 * trainer.args.process_index)
            plain(*args, **kwargs)
        trainer.save_model = save_model
    def on_save(self, args, state, control, **_):
        if state.global_step == 2 and args.process_index == 0:
            time.sleep(10)
"""


def two(demo, tmp_path, source, *flags, beat="4"):
    """A run of two processes that has ended; beat in seconds."""
    (tmp_path / "probe.py").write_text(source)
    words = command(demo, tmp_path / "run", "--hooks", tmp_path / "probe.py", *flags, config="cpu_2proc")
    environment = os.environ | {"SFT_HEARTBEAT_S": beat}
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=600)


STOPPED, ENDED = "rank 0 ends: nothing heard of rank 1 for", "another rank has ended or cannot be reached"


@pytest.mark.parametrize(
    ("name", "words", "beat", "after"),
    [
        # ended after 12 s: torchrun would wait for 30 s
        pytest.param("SIGSTOP", f"{STOPPED} 4 s", "4", 12, marks=pytest.mark.long),
        pytest.param("SIGSTOP", f"{STOPPED} 20 s", "20", 0, marks=pytest.mark.long),
        pytest.param("SIGKILL", ENDED, "20", 0, marks=pytest.mark.long),
    ],
)
def test_a_lost_rank_ends_the_other(demo, tmp_path, name, words, beat, after):
    """The launcher with all its ranks ends within a minute. A save of 10 s before it is no silence."""
    done = two(demo, tmp_path, LOST.replace("NAME", name).replace("AFTER", str(after)) + SLOW, beat=beat)
    assert done.returncode != 0 and time.time() - float(re.search(r"LOST AT ([\d.]+)", done.stdout)[1]) < 60
    line = next(line for line in done.stderr.splitlines() if words in line)
    assert "qwen3_qlora.py: " in line and "--resume_from_checkpoint true" in line
    assert steps_of(tmp_path / "run") == [2] and find_fault(tmp_path / "run" / "checkpoint-2") is None


@pytest.mark.long
def test_slow_is_not_lost(demo, tmp_path):
    """A save of 10 s on one rank and an end 10 s later on the other, with a limit of 4 s."""
    done = two(demo, tmp_path, SLOW)
    assert done.returncode == 0 and steps_of(tmp_path / "run") == [4, 6], done.stderr[-3000:]


def test_a_bad_batch_of_one_rank_ends_both(demo, tmp_path):
    done = two(demo, tmp_path, poison(5, "float('inf')", rank=1), "--save_steps", 1)
    said = [line for line in done.stderr.splitlines() if line.startswith("qwen3_qlora.py: ")]
    assert done.returncode != 0 and len(said) == 1 and "step 3, rank 1: the loss is inf" in said[0], done.stderr[-3000:]
    texts = json.loads((tmp_path / "run" / "texts.json").read_text())
    assert re.findall(r"train-[\w-]+", said[0]) == rows_of(texts, demo) and done.stdout.count("STEPPED") == 4


@pytest.mark.long
@pytest.mark.parametrize("who", ["getpid", "getppid"])
def test_sigterm_stops_all_ranks_at_one_step(demo, tmp_path, who):
    """To rank 1 alone; and to the launcher, which hands it to both."""
    probe = SIGNAL.replace("os.getpid(), signal.NAME", f"os.{who}(), signal.SIGTERM")
    probe = probe.replace("global_step == 2", "global_step == 2 and args.process_index == 1")
    done = two(demo, tmp_path, probe, "--save_steps", 6, "--max_steps", 40)
    said = [line for line in done.stderr.splitlines() if "is saved and verified" in line]
    assert done.returncode != 0 and len(said) == 1, done.stderr[-3000:]
    step = int(re.search(r"checkpoint-(\d+) is saved", said[0])[1])
    assert 3 <= step <= 5 and steps_of(tmp_path / "run") == [step]
    again = done.stderr.split(said[0])[1].strip().splitlines()[0]
    assert "accelerate" in again and "--num_processes" not in again and again.endswith("--resume_from_checkpoint true")
    assert find_fault(tmp_path / "run" / f"checkpoint-{step}") is None
    assert len(list((tmp_path / "run").glob("checkpoint-*/rng_state_?.pth"))) == 2


@pytest.mark.long
@pytest.mark.parametrize(("name", "who"), [("SIGINT", "group"), ("SIGTERM", "launcher")])
def test_accelerate_launch_with_one_process(demo, tmp_path, name, who):
    """The launcher dies of the signal; the run, which gets Ctrl-C from the terminal or learns of the death, saves."""
    words = command(demo, tmp_path / "run", "--max_steps", 1000, "--save_steps", 1000, config="cpu")
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen(words, stdout=said, stderr=said, start_new_session=True)
    while not (tmp_path / "run" / "log.jsonl").is_file() and process.poll() is None:
        time.sleep(0.1)
    (child,) = children(process)
    (os.killpg if who == "group" else os.kill)(process.pid, getattr(signal, name))
    assert process.wait() == -getattr(signal, name)
    while Path(f"/proc/{child}").exists():
        time.sleep(0.1)
    (step,) = steps_of(tmp_path / "run")
    told = (tmp_path / "said").read_text()
    assert find_fault(tmp_path / "run" / f"checkpoint-{step}") is None
    assert f"checkpoint-{step} is saved and verified" in told and told.strip().endswith("--resume_from_checkpoint true")
    assert "accelerate" in told.strip().splitlines()[-1]


# -- 6: disks ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB: room for one checkpoint of the tiny model. Mounting takes root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("this machine does not let the tests mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_disk_full_then_read_only(run, small_disk):
    folder = small_disk / "run"
    _, code, said = run("--output_dir", folder, "--max_steps", 40, "--save_steps", 1, "--save_total_limit", 40)
    told = [line for line in said.splitlines() if line.startswith("qwen3_qlora.py: ")]
    assert code == 1 and "the disk is full" in told[-1] and sum("the disk" in line for line in told) == 1, said
    kept = max(step for step in steps_of(folder) if (folder / f"checkpoint-{step}" / "manifest.json").is_file())
    assert find_fault(folder / f"checkpoint-{kept}") is None
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    _, code, said = run("--output_dir", folder, *ON)
    told = [line for line in said.splitlines() if line.startswith("qwen3_qlora.py: ")]
    assert code == 1 and "read-only" in told[-1], said
    assert find_fault(folder / f"checkpoint-{kept}") is None


def test_file_size_limit(run):
    """ulimit -f: the model does not fit, so the first checkpoint cannot be sealed."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        folder, code, said = run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 1 and ("larger than allowed" in said or "disk is full" in said), said
    assert not list(folder.glob("*/manifest.json"))


# -- 7: code and weights from elsewhere --------------------------------------------------------------------------------
def test_pickled_weights_are_refused(run, demo, tmp_path):
    model = Path(shutil.copytree(demo / "init", tmp_path / "model"))
    weights = model / "model.safetensors"
    torch.save(load_file(weights), model / "pytorch_model.bin")
    weights.unlink()
    _, code, said = run("--model_name_or_path", model)
    assert code == 1 and "no model.safetensors" in said and "save_pretrained('converted')" in said


def test_remote_code_is_refused_unless_asked_for(run, demo, tmp_path):
    model = Path(shutil.copytree(demo / "init", tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    names = {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"}
    (model / "config.json").write_text(json.dumps(config | {"model_type": "mine", "auto_map": names}))
    (model / "mine.py").write_text(f"""
from pathlib import Path
Path({str(tmp_path / "ran")!r}).touch()
from transformers import Qwen3Config, Qwen3ForCausalLM
class MyConfig(Qwen3Config):
    model_type = "mine"
class MyModel(Qwen3ForCausalLM):
    config_class = MyConfig
""")
    _, code, said = run("--model_name_or_path", model)
    assert code == 1 and "runs Python code of its own" in said and "--trust_remote_code true" in said
    assert not (tmp_path / "ran").exists()
    run("--model_name_or_path", model, "--trust_remote_code", "true", "--max_steps", 1, out="asked")
    assert (tmp_path / "ran").exists()


# -- 8: early stopping -------------------------------------------------------------------------------------------------
WORSE = """
import torch
from transformers import TrainerCallback
class Worse(TrainerCallback):
    def on_step_end(self, args, state, control, model, **_):
        if state.global_step > 2:
            for weight in (weight for weight in model.parameters() if weight.requires_grad):
                weight.data += state.global_step * 0.05
"""


def test_early_stopping(run):
    flags = [*EARLY, "--eval_strategy", "steps", "--eval_steps", 1, "--max_steps", 20, "--learning_rate", "1e-3"]
    folder, code, _ = run(*flags, probe=WORSE)
    state = json.loads((folder / "checkpoint-5" / "trainer_state.json").read_text())
    losses = [line["eval_loss"] for line in state["log_history"] if "eval_loss" in line]
    assert code == 0 and len(losses) == 5 and state["best_global_step"] == 2 == losses.index(min(losses)) + 1
    before, after = (load_file(path / "adapter_model.safetensors") for path in (folder / "checkpoint-2", folder))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_early_stopping_counts_on_over_a_resume():
    history = [{"eval_loss": loss} for loss in (3.0, 2.0, 2.5, 2.1)] + [{"loss": 1.0}]
    args = SimpleNamespace(eval_strategy=IntervalStrategy("steps"), eval_steps=1, save_steps=1, save_only_model=False)
    early = EarlyStopping(SimpleNamespace(args=args))
    early.on_train_begin(args, SimpleNamespace(log_history=history), None)
    assert early.early_stopping_patience_counter == 2


def test_early_stopping_needs_an_evaluation(run):
    _, code, said = run(*EARLY)
    assert code == 1 and "early stopping needs an evaluation" in said


# -- 9: the hub --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "strategy",
    [None, "all_checkpoints"]
    + [pytest.param(name, marks=pytest.mark.long) for name in ("end", "every_save", "checkpoint")],
)
def test_checkpoints_go_to_the_hub_when_asked(run, monkeypatch, strategy):
    from concurrent.futures import Future

    import huggingface_hub

    calls = []

    class Api:
        def create_repo(self, name, private=None, **_):
            calls.append(("create", name, private))
            return SimpleNamespace(repo_id=name)

        def upload_folder(self, folder_path, path_in_repo=None, **_):
            sealed = Path(folder_path, "manifest.json").is_file()
            calls.append(("upload", Path(folder_path).name, path_in_repo, sealed))
            done = Future()
            done.set_result(None)
            return done

        def __getattr__(self, name):
            raise AssertionError(f"the hub was asked for {name}")

    monkeypatch.setattr("transformers.trainer.hf_api", Api)
    monkeypatch.setattr(huggingface_hub, "metadata_update", None)
    asked = ["--push_to_hub", "true", "--hub_model_id", "me/tuned", "--hub_private_repo", "true"]
    _, code, said = run(*(asked + ["--hub_strategy", strategy] if strategy else []))
    assert code == 0, said
    if not strategy:
        assert not calls
        return
    assert {call for call in calls if call[0] == "create"} == {("create", "me/tuned", True)}
    uploads = [call[1:] for call in calls if call[0] == "upload"]
    whole = [name for name, *_ in uploads if not name.startswith("checkpoint")]
    assert len(whole) == (1 if strategy == "end" else 4)  # three saves and the end
    pushed = [upload for upload in uploads if upload[0].startswith("checkpoint")]
    wanted = {"checkpoint": ["last-checkpoint"] * 3, "all_checkpoints": [f"checkpoint-{step}" for step in (2, 4, 6)]}
    assert [path for _, path, _ in pushed] == wanted.get(strategy, []) and all(sealed for *_, sealed in pushed)


# -- kill -9 -----------------------------------------------------------------------------------------------------------
KILL = """
import os, signal, torch
from transformers import TrainerCallback
class Kill(TrainerCallback):
    def __init__(self, trainer):
        plain = torch.save
        def save(value, path, *rest, **kwargs):
            plain(value, path, *rest, **kwargs)
            if os.environ.get("KILL") == "save" and str(path).endswith("checkpoint-4/optimizer.pt"):
                os.truncate(path, os.path.getsize(path) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
        torch.save = save
    def on_substep_end(self, args, state, control, **_):
        if state.global_step == 5 and os.environ.get("KILL") == "step":
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_twice_equals_uninterrupted(run, whole, demo, tmp_path):
    """kill -9 in the middle of the save of step 4, then within step 6; the same command every time."""
    (tmp_path / "kill.py").write_text(KILL)
    words = command(demo, tmp_path / "run", *ON, "--hooks", tmp_path / "kill.py")
    for moment, left in (("save", [2, 4]), ("step", [2, 4])):
        done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"KILL": moment})
        assert done.returncode == -signal.SIGKILL and steps_of(tmp_path / "run") == left, done.stderr[-3000:]
    assert "broken-checkpoint-4" in done.stdout and "/checkpoint-2" in done.stdout
    folder, code, said = run(*ON)
    assert code == 0 and "/checkpoint-4" in said
    assert_same(folder, whole)


def test_killed_before_the_final_save(run, whole, tmp_path):
    """The last checkpoint is there and nothing is left to train: not one step more, and the same adapter."""
    copy_of(whole, tmp_path)
    folder, code, said = run(*ON)
    assert code == 0 and "/checkpoint-6" in said
    assert_same(folder, whole)


def children(process):
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


@pytest.mark.long
@pytest.mark.parametrize(("config", "kills"), [("cpu", 14), ("cpu_2proc", 6)])
def test_twenty_random_kills(demo, tmp_path, config, kills):
    """Real kills at random moments, half of them while a checkpoint is written; of two ranks one is killed."""
    seed = random.randrange(10**6)
    print("seed", seed)
    chance, flags = random.Random(seed), ["--max_steps", 12, "--save_steps", 1, "--eval_strategy", "steps"]
    flags += ["--eval_steps", 3, *ON]
    reference = command(demo, tmp_path / "whole", *flags, config=config)
    assert subprocess.run(reference, capture_output=True).returncode == 0
    killed = saves = finished = starts = 0
    while killed < kills or not saves:
        folder = tmp_path / f"run{finished}"
        words = command(demo, folder, *flags, config=config)
        while True:
            before = {path.name for path in folder.glob("checkpoint-*")}
            started = folder / "run.json"
            stamp = started.stat().st_mtime_ns if started.is_file() else 0
            process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
            while process.poll() is None and not (started.is_file() and started.stat().st_mtime_ns > stamp):
                time.sleep(0.01)  # loading is no moment: nothing is at stake
            if chance.random() < 0.5:
                skip = chance.randrange(4)
                while process.poll() is None:
                    new = {path.name for path in folder.glob("checkpoint-*")} - before
                    if len(new) > skip:
                        break
                    time.sleep(0.001)
                time.sleep(chance.uniform(0, 0.03))
            else:
                time.sleep(chance.uniform(0, 8))
            cut = [path for path in folder.glob("checkpoint-*") if not (path / "manifest.json").is_file()]
            running = children(process)  # none where it has ended by now
            for pid in chance.sample(running, min(1, len(running))):
                os.kill(pid, signal.SIGKILL)
                killed, saves = killed + 1, saves + bool(cut)
            said = process.communicate(timeout=300)[0].decode()
            if process.returncode == 0:
                break
            starts += 1
            assert starts < 3 * kills, said
        assert_same(folder, tmp_path / "whole", steps=12)
        evaluations = [
            [json.loads(line)["step"] for line in (path / "log.jsonl").read_text().splitlines() if "eval_loss" in line]
            for path in (folder, tmp_path / "whole")
        ]
        assert evaluations[0] == evaluations[1] == [3, 6, 9, 12]
        finished += 1
    print(f"{killed} kills, {saves} within a save, {finished} runs")
