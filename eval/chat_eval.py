"""nanochat's chat evaluation: three benchmarks by the letter, three by what the model writes, and ChatCORE over them.

    python -m eval.chat_eval runs/sft --task arc_easy=ARC-Easy_test.jsonl gsm8k=test.jsonl humaneval=humaneval.parquet
    python -m eval.chat_eval --stages runs/base runs/mid runs/sft

Definitions, from nanochat (scripts/chat_eval.py and tasks/, November 2025, commit d54c9cb):
    arc_easy, arc_challenge, mmlu    the answer is the letter with the highest logit where an answer begins, among the
                                     letters that the question has
    gsm8k, spelling_bee              the answer is written greedily, in at most 512 tokens; the number behind its first
                                     `#### ` (commas dropped) must be that of the reference, as a string
    humaneval                        the first ``` block of the answer, or else all of it, behind the imports of the
                                     prompt and before the tests, runs to its end in sandbox.py: pass@1
    ChatCORE                         mean over the tasks of (accuracy - b) / (1 - b); b, what guessing gets, is 0.25 for
                                     the letter tasks and 0 for the others. Interval: MOVER (Zou and Donner, Statistics
                                     in Medicine 27, 2008), from the Wilson intervals of the tasks
What differs: the model's own chat template; the letter is read behind what the template writes before an answer's first
word (letters_behind in the report: a final channel, an empty thought), and a template whose answers do not go on from
its prompt is refused; thoughts are taken off answers, and one that never ends is an empty answer; no Python calls are
run while it writes; a reference without `#### n` is refused where nanochat would count two missing numbers as equal.
Beside the tasks that are written stand stop_rate; cut, the share of answers that no stop token ended or whose thought
never ends; and for HumanEval lenient: pass@1 of the longest block that defines the function, however it is marked
(nanochat's rule reads ```py as code of its own and fails it).

Rows are those of the hub (ARC: question, choices, answerKey; MMLU: question, choices, answer; GSM8K: question, answer;
HumanEval: task_id, prompt, test, entry_point) or, but for HumanEval, the `messages` rows that data_prep makes of them.
Templates with both modes are asked in no_think, where the answer follows the prompt at once, or in --mode think.
Writes chat_eval.json and .jsonl (chat_eval_think in that mode) to the folder eval/ of the run. --stages reads those of
several runs and prints nanochat's table of them, also to stages.md in the last run's eval/; a base model may have its
bits_per_byte.json alone.
"""

import argparse
import hashlib
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from data_prep.common.answers import find_family
from data_prep.common.errors import UsageError
from eval import sandbox
from eval.common.arguments import add_model_arguments, positive
from eval.common.intervals import rate
from eval.common.problems import TASKS, LetterProblem, Problem, read_problems
from eval.common.scores import Figure, Groups, Metrics, command, parser_of, show, write_files, write_scores

TITLES = {name: task.title for name, task in TASKS.items()} | {"chatcore": "ChatCORE"}


# -- lines to numbers -------------------------------------------------------------------------------------------------
def chat_core(accuracies: Metrics) -> dict[str, float]:
    """Return ChatCORE of the accuracies of tasks: its value and interval; total: of how many tasks."""
    values = []
    below = []
    above = []
    for task, accuracy in accuracies.items():
        chance = TASKS[task].chance
        value = accuracy["value"]
        values.append((value - chance) / (1 - chance))
        below.append((value - accuracy["low"]) / (1 - chance))
        above.append((accuracy["high"] - value) / (1 - chance))
    total = len(values)
    value = sum(values) / total
    low = value - math.hypot(*below) / total
    high = value + math.hypot(*above) / total
    return {"value": value, "low": low, "high": high, "total": total}


def summarize(lines: Sequence[dict], mode: str | None) -> tuple[Metrics, Groups]:
    """Return the accuracy of each task and ChatCORE; and by task, what else befell its answers."""
    metrics: Metrics = {}
    by_task: dict[str, Metrics] = {}
    for task in TASKS:
        own = [line for line in lines if line["task"] == task]
        if not own:
            continue
        metrics[task] = rate([line["correct"] for line in own])
        if "stopped" in own[0]:
            by_task[TITLES[task]] = {"accuracy": metrics[task], **describe_answers(own)}
    metrics["chatcore"] = chat_core(metrics)
    groups: Groups = {}
    if by_task:
        groups["task"] = by_task
    if mode:
        groups["mode"] = {mode: metrics}
    return metrics, groups


def describe_answers(lines: Sequence[dict]) -> Metrics:
    """Return what befell the written answers of one task: how many stopped, were cut, failed and why."""
    metrics = {
        "stop_rate": rate([line["stopped"] for line in lines]),
        "cut": rate([line["cut"] for line in lines]),
    }
    if "lenient" in lines[0]:
        metrics["lenient"] = rate([line["lenient"] for line in lines])
    reasons = Counter(line["why"] for line in lines if line.get("why"))
    for reason in sorted(reasons):
        metrics[f"failed: {reason.removeprefix('failed: ')}"] = rate([line.get("why") == reason for line in lines])
    return metrics


# -- stages -----------------------------------------------------------------------------------------------------------
@dataclass
class Stage:
    """What a run's eval/ says. metrics: of chat_eval.json, {} where there is none; bits_per_byte: the figure of
    bits_per_byte.json, and texts_sha256 of what it was measured on, None where there is none."""

    name: str
    metrics: Metrics
    bits_per_byte: Figure | None
    texts_sha256: str | None


def read_report(path: Path) -> dict | None:
    """Return a report, None where there is none. Raises UsageError."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        return report if report["metrics"] else None
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{path} is not a report of {path.stem}.py: run it again") from None


def read_stage(run: str) -> Stage:
    """Return what the reports of a run say. Raises UsageError where it has none."""
    path = Path(run, "eval", "chat_eval.json")
    report = read_report(path)
    texts = read_report(path.with_name("bits_per_byte.json"))
    if report is None and texts is None:
        raise UsageError(f"{path} does not exist: run `python -m eval.chat_eval {run} --task …` first")
    stage = Stage(Path(run).name.upper(), {}, None, None)
    if report is not None:
        stage.metrics = report["metrics"]
    if texts is not None:
        stage.bits_per_byte = texts["metrics"]["bits_per_byte"]
        stage.texts_sha256 = texts["data_sha256"]
    return stage


def stage_table(runs: Sequence[str]) -> str:
    """Return nanochat's table (nanochat/report.py) of the reports of several runs, as markdown. Raises UsageError.

    Bits per byte stand below it where a run has them.
    """
    stages = [read_stage(run) for run in runs]
    widths = [max(8, len(stage.name)) for stage in stages]
    header = " | ".join(f"{stage.name:<8}" for stage in stages)
    rule = "|".join("-" * (width + 2) for width in widths)
    lines = [f"| {'Metric':<15} | {header} |", f"|{'-' * 17}|{rule}|"]
    for task, title in TITLES.items():
        lines.extend(table_line(title, [stage.metrics.get(task) for stage in stages], widths))
    lines.extend(table_line("Bits per byte", [stage.bits_per_byte for stage in stages], widths))
    for stage in stages:
        note = describe_missing(stage.metrics)
        if note and stage.metrics:
            lines.extend(["", f"{stage.name}: {note}"])
    if len({stage.texts_sha256 for stage in stages} - {None}) > 1:
        lines.extend(["", "The bits per byte are of different texts, and are not comparable."])
    return "\n".join(lines) + "\n"


def table_line(title: str, figures: Sequence[Figure | None], widths: Sequence[int]) -> list[str]:
    """Return the line of one metric, a cell a stage; no line where no stage has it."""
    if not any(figures):
        return []
    cells = []
    for figure, width in zip(figures, widths, strict=True):
        value = f"{figure['value']:.4f}" if figure else "-"
        cells.append(f"{value:<{width}}")
    return [f"| {title:<15} | {' | '.join(cells)} |"]


def describe_missing(metrics: Metrics) -> str:
    """Return that ChatCORE is not over the six tasks of November 2025, "" where it is."""
    missing = [task.title for name, task in TASKS.items() if name not in metrics]
    if not missing:
        return ""
    text = (
        f"ChatCORE is not over all six tasks: it lacks {', '.join(missing)}, and is not comparable with one over all."
    )
    if missing == [TASKS["spelling_bee"].title]:
        text += " nanochat's own is over these five since 2026."
    return text


# -- the command ------------------------------------------------------------------------------------------------------
def evaluate(args: argparse.Namespace) -> None:
    """Run the command. Raises UsageError."""
    if args.stages:
        if args.run or args.task:
            raise UsageError("--stages reads saved results: leave out the run and --task")
        text = stage_table(args.stages)
        write_files(Path(args.out or Path(args.stages[-1], "eval")), {"stages.md": text})
        print(text, end="")
        return
    if not args.run or not args.task:
        raise UsageError("pass a run folder and --task TASK=FILE …, or --stages with the runs to compare")
    files = dict(args.task)
    if len(files) < len(args.task):
        raise UsageError("--task names a benchmark twice: pass one file each")
    if "humaneval" in files and not args.unsafe_sandbox and not sandbox.way():
        raise UsageError("no sandbox works here for HumanEval: install bubblewrap, or pass --unsafe_sandbox")
    # every file is read before the model is: a missing benchmark is never a score
    problems = {}
    for task in TASKS:
        if task in files:
            problems[task] = read_problems(task, files[task], args.split, args.rows, args.seed)
    ask_run(args, files, problems)


def ask_run(args: argparse.Namespace, files: dict[str, str], problems: dict[str, list[Problem]]) -> None:
    """Ask the model of a run the problems of every task, and write and show what comes of it. Raises UsageError."""
    # here, since they import torch, which --stages and --help do without
    from eval.common.chat_tasks import Asking, ask_task
    from eval.common.models import answer_prefix, choose_mode, mode_kwargs, open_model

    model, tokenizer, stops = open_model(args.run, args.base, args.dtype, args.load_in_4bit)
    mode = choose_mode(tokenizer, args.mode, args.run)
    asking = Asking(
        model=model,
        tokenizer=tokenizer,
        stops=stops,
        mode=mode,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        timeout=args.timeout,
        unsafe_sandbox=args.unsafe_sandbox,
    )
    lines = []
    for task, own in problems.items():
        lines.extend(ask_task(task, own, asking))
    if mode:
        for line in lines:
            line["mode"] = mode
    metrics, groups = summarize(lines, mode)
    settings = {
        "run": Path(args.run).name,
        "tasks": {task: Path(path).name for task, path in files.items()},
        "rows": args.rows,
        "seed": args.seed,
        "mode": mode,
        "max_new_tokens": args.max_new_tokens,
        "dtype": str(model.dtype).removeprefix("torch."),
        "load_in_4bit": args.load_in_4bit,
        "device": model.device.type,
        "batch_size": args.batch_size,
        "family": find_family(tokenizer.chat_template),
    }
    for own in problems.values():
        if isinstance(own[0], LetterProblem):
            settings["letters_behind"] = answer_prefix(tokenizer, own[0].prompt, **mode_kwargs(mode))
    if "humaneval" in files:
        settings["sandbox"] = sandbox.way() or "none: limits alone"
    asked = {task: [asdict(problem) for problem in own] for task, own in problems.items()}
    sha256 = hashlib.sha256(json.dumps(asked, ensure_ascii=False, sort_keys=True).encode()).hexdigest()
    name = "chat_eval_think" if mode == "think" else "chat_eval"
    show(write_scores(args.out or Path(args.run, "eval"), name, settings, metrics, groups, lines, sha256))
    note = describe_missing(metrics)
    if note:
        print(note)


def task_and_file(text: str) -> tuple[str, str]:
    """Return the task and the file of an argument TASK=FILE."""
    task, equals, path = text.partition("=")
    if task not in TASKS or not equals or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not TASK=FILE with a task of {', '.join(TASKS)}")
    return task, path


def main(argv: list[str] | None = None) -> int:
    """Return the exit code of the command."""
    parser = parser_of(__doc__)
    parser.add_argument("run", nargs="?", help="a run folder: a model, or an adapter")
    parser.add_argument("--task", nargs="+", type=task_and_file, default=[], metavar="TASK=FILE", help="what to run")
    parser.add_argument("--stages", nargs="+", metavar="RUN", help="print the table of saved results of these runs")
    parser.add_argument("--base", help="of an adapter; default: the one that it names")
    parser.add_argument("--split", default="test", help="of save_to_disk folders")
    parser.add_argument("--rows", type=positive, help="as many problems of each task, drawn by --seed")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--mode", choices=["think", "no_think"], help="of hybrid models; default: no_think")
    parser.add_argument("--out", type=Path, help="default: the folder eval/ of the run")
    parser.add_argument("--unsafe_sandbox", action="store_true", help="run HumanEval's programs without isolation")
    add_model_arguments(parser, max_new_tokens=512)
    return command("chat_eval.py", evaluate, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
