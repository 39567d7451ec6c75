"""nanochat's chat evaluation: three benchmarks by the letter, three by what the model writes, and ChatCORE over them.

    python -m eval.chat_eval runs/sft --task arc_easy=ARC-Easy_test.jsonl gsm8k=test.jsonl humaneval=humaneval.parquet
    python -m eval.chat_eval --stages runs/base runs/mid runs/sft

Definitions, from nanochat (scripts/chat_eval.py and tasks/, November 2025, commit d54c9cb):
    arc_easy, arc_challenge, mmlu    the answer is the letter with the highest logit right behind the generation prompt,
                                     among the letters that the question has
    gsm8k, spelling_bee              the answer is written greedily, in at most 512 tokens; the number behind its first
                                     `#### ` (commas dropped) must be that of the reference, as a string
    humaneval                        the first ``` block of the answer, or else all of it, behind the imports of the
                                     prompt and before the tests, runs to its end in sandbox.py: pass@1
    ChatCORE                         mean over the tasks of (accuracy - b) / (1 - b); b, what guessing gets, is 0.25 for
                                     the letter tasks and 0 for the others. Interval: MOVER (Zou and Donner, Statistics
                                     in Medicine 27, 2008), from the Wilson intervals of the tasks
What differs: the model's own chat template; `<think>` blocks are taken off answers; no Python calls are run while it
writes; a reference without `#### n` is refused where nanochat would count two missing numbers as equal.

Rows are those of the hub (ARC: question, choices, answerKey; MMLU: question, choices, answer; GSM8K: question, answer;
HumanEval: task_id, prompt, test, entry_point) or, but for HumanEval, the `messages` rows that data_prep makes of them.
Templates with both modes are asked in no_think, where the answer follows the prompt at once, or in --mode think.
Writes chat_eval.json and .jsonl (chat_eval_think in that mode) to the folder eval/ of the run. --stages reads those of
several runs and prints nanochat's table of them, also to stages.md in the last run's eval/.
"""

import argparse
import hashlib
import json
import math
import random
import re
import sys
from collections import Counter
from pathlib import Path

import torch

from data_prep.common.errors import UsageError
from eval import sandbox
from eval.common.measure import read_rows
from eval.common.metrics import final_text
from eval.common.models import LOGIT_ROWS, add_model_arguments, ask, batches, fill_of, open_model, pad, positive, render
from eval.common.scores import command, parser_of, rate, show, write_files, write_scores

CHANCE = {"arc_easy": 0.25, "arc_challenge": 0.25, "mmlu": 0.25, "gsm8k": 0.0, "humaneval": 0.0, "spelling_bee": 0.0}
TITLES = {"arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge", "mmlu": "MMLU", "gsm8k": "GSM8K",
          "humaneval": "HumanEval", "spelling_bee": "SpellingBee", "chatcore": "ChatCORE"}  # fmt: skip
NUMBER = re.compile(r"#### (-?[0-9.,]+)")
BLOCK = re.compile(r"```(?:python)?\s*\n(.*?)\n```", re.DOTALL)


# -- rows to problems: {id, prompt (messages), and letters and answer, or answer, or imports, test and entry_point} ---
def multiple_choice(question, letters, choices):
    """nanochat's form (tasks/common.py, render_mc): the letter behind its choice, bound to it by = without a blank."""
    lines = "".join(f"- {choice}={letter}\n" for letter, choice in zip(letters, choices, strict=True))
    return f"Multiple Choice question: {question}\n{lines}\nRespond only with the letter of the correct answer."


def spoken(content):
    """The text of a message's content, a string or nanochat's list of parts."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def letters_problem(row):
    if "messages" in row:
        prompt, answer = row["messages"][:-1], spoken(row["messages"][-1]["content"]).strip()
        choices = prompt[-1]["content"].partition("\n- ")[2]
        letters = re.findall(r"=([A-Z0-9])$", choices, re.MULTILINE)
    elif isinstance(row["choices"], dict):
        letters, answer = row["choices"]["label"], row["answerKey"]
        prompt = multiple_choice(row["question"], letters, row["choices"]["text"])
    else:
        letters = "ABCD"[: len(row["choices"])]
        prompt, answer = multiple_choice(row["question"], letters, row["choices"]), letters[row["answer"]]
    if answer not in letters:
        raise ValueError(f"the answer {answer!r} is none of its letters")
    return {"prompt": prompt, "letters": list(letters), "answer": answer}


def number_problem(row):
    if "messages" in row:
        prompt, reference = row["messages"][:-1], spoken(row["messages"][-1]["content"])
    else:
        prompt, reference = row["question"], row["answer"]
    if not (answer := number_of(reference)):
        raise ValueError("the reference has no `#### n`")
    return {"prompt": prompt, "answer": answer}


def code_problem(row):
    return {"prompt": row["prompt"], "test": row["test"], "entry_point": row["entry_point"]}


def number_of(text):
    """The number behind the first `#### ` of a text, without commas; None where there is none."""
    found = NUMBER.search(text)
    return found[1].strip().replace(",", "") if found else None


def program_of(problem, answer):
    """The program that a HumanEval answer is: imports of the prompt, code of the answer, tests, the call of them."""
    imports = []
    for line in map(str.strip, problem["prompt"][0]["content"].split("\n")):
        if line.startswith(("import ", "from ")):
            imports.append(line)
        elif line and not line.startswith("#"):
            break
    block = BLOCK.search(answer)
    code = (block[1] if block else answer).strip()
    return "\n\n".join(["\n".join(imports), code, f"{problem['test']}\ncheck({problem['entry_point']})"])


KINDS = {**dict.fromkeys(["arc_easy", "arc_challenge", "mmlu"], letters_problem), "humaneval": code_problem,
         **dict.fromkeys(["gsm8k", "spelling_bee"], number_problem)}  # fmt: skip


def read_problems(task, path, split, limit, seed):
    """The problems of a task's file; limit: as many drawn by seed, in their order. Raises UsageError."""
    problems = []
    for number, row in enumerate(read_rows(Path(path), split), 1):
        try:
            problem = KINDS[task](row)
            name = next((row[key] for key in ("id", "task_id") if row.get(key) is not None), number)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            what = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise UsageError(
                f"{task}: row {number} of {path} is not a row of this benchmark ({what}): pass its published rows, or "
                "messages rows that data_prep made of them"
            ) from None
        if isinstance(problem["prompt"], str):
            problem["prompt"] = [{"role": "user", "content": problem["prompt"]}]
        problems.append({"id": str(name), "task": task} | problem)
    if not problems:
        raise UsageError(f"{task}: {path} holds no rows: pass the benchmark's test rows")
    if limit and limit < len(problems):
        problems = [problems[i] for i in sorted(random.Random(seed).sample(range(len(problems)), limit))]
    return problems


# -- problems to lines: {id, task, mode, answer, reference, correct, stopped, failed, …} ------------------------------
def letter_ids(tokenizer, text, ids, letters):
    """The token of each letter behind a prompt. nanochat asserts that a letter alone is one token; here it must also
    leave the prompt's own tokens as they are, since a template may end in what merges with it."""
    found = []
    for letter in letters:
        whole = tokenizer(text + letter, add_special_tokens=False)["input_ids"]
        if whole[:-1] != ids:
            raise UsageError(
                f"the letter {letter!r} is not one token of its own behind the generation prompt of this tokenizer: "
                "its letter logits would compare other things; use another template or tokenizer"
            )
        found.append(whole[-1])
    return found


@torch.inference_mode()
def letter_answers(model, tokenizer, stops, problems, batch_size, kwargs, label):
    """The letter of each problem with the highest logit behind its prompt; a draw goes to the first."""
    rendered = [render(tokenizer, problem["prompt"], **kwargs) for problem in problems]
    answers = [None] * len(problems)
    for group in batches([ids for _, ids in rendered], batch_size, label, LOGIT_ROWS):
        ids, mask = pad([rendered[i][1] for i in group], fill_of(tokenizer, stops), False, model.device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for row, i in enumerate(group):
            text, own = rendered[i]
            focus = logits[row, len(own) - 1, letter_ids(tokenizer, text, own, problems[i]["letters"])].float()
            if not torch.isfinite(focus).all():
                raise UsageError(
                    f"the logits on {problems[i]['id']} are not numbers: repair the model's weights or dtype"
                )
            answers[i] = problems[i]["letters"][int(focus.argmax())]
    return answers


def judge(task, problem, answer, unsafe):
    """{correct, given, why} of a written answer; why: of a program that failed."""
    if task == "humaneval":
        result = sandbox.run(program_of(problem, answer), unsafe=unsafe)
        return {"correct": result.ok, "why": "" if result.ok else result.reason}
    given = number_of(answer)
    return {"correct": given == problem["answer"], "given": given, "reference": problem["answer"]}


def run_task(task, problems, model, tokenizer, stops, args, kwargs):
    """A line a problem."""
    if KINDS[task] is letters_problem:
        found = letter_answers(model, tokenizer, stops, problems, args.batch_size, kwargs, task)
        pairs = zip(problems, found, strict=True)
        return [
            {"id": p["id"], "task": task, "answer": a, "reference": p["answer"], "correct": a == p["answer"]}
            for p, a in pairs
        ]
    rendered = [render(tokenizer, problem["prompt"], **kwargs) for problem in problems]
    prompts = [ids for _, ids in rendered]
    answers = ask(model, tokenizer, stops, prompts, args.batch_size, args.max_new_tokens, task, args.timeout)
    lines = []
    for problem, (text, _), answer in zip(problems, rendered, answers, strict=True):
        opened = "<think>" if text.rstrip().endswith("<think>") else ""  # its end then stands alone in the answer
        line = {"id": problem["id"], "task": task, "answer": answer.text, "tokens": answer.tokens}
        line |= {"stopped": answer.stopped, "failed": answer.failed}
        if answer.failed:
            line |= {"correct": False, "why": answer.failed}
        else:
            line |= judge(task, problem, final_text(opened + answer.text), args.unsafe_sandbox)
        lines.append(line)
    return lines


# -- lines to numbers -------------------------------------------------------------------------------------------------
def chat_core(accuracies):
    """ChatCORE of {task: rate}: value and interval, count: of how many tasks, total: of the six."""
    parts = [(found, 1 - CHANCE[task]) for task, found in accuracies.items()]
    value = sum((found["value"] - (1 - room)) / room for found, room in parts) / len(parts)
    low = math.hypot(*((found["value"] - found["low"]) / room for found, room in parts)) / len(parts)
    high = math.hypot(*((found["high"] - found["value"]) / room for found, room in parts)) / len(parts)
    return {"value": value, "low": value - low, "high": value + high, "count": len(parts), "total": len(CHANCE)}


def summarize(lines, mode):
    """(metrics, groups) of lines: the accuracy of each task and ChatCORE; by task, what else befell its answers."""
    tasks = [task for task in CHANCE if any(line["task"] == task for line in lines)]
    metrics, groups = {}, {}
    for task in tasks:
        own = [line for line in lines if line["task"] == task]
        metrics[task] = rate([line["correct"] for line in own])
        if "stopped" in own[0]:
            groups[TITLES[task]] = {"accuracy": metrics[task], "stop_rate": rate([line["stopped"] for line in own])}
            for why, _ in sorted(Counter(line["why"] for line in own if line.get("why")).items()):
                groups[TITLES[task]][f"failed: {why.removeprefix('failed: ')}"] = rate(
                    [line.get("why") == why for line in own]
                )
    metrics["chatcore"] = chat_core(metrics)
    return metrics, ({"task": groups} if groups else {}) | ({"mode": {mode: metrics}} if mode else {})


def stage_table(runs):
    """nanochat's table (nanochat/report.py) of the chat_eval.json of several runs, as markdown. Raises UsageError."""
    stages = {}
    for run in runs:
        path = Path(run, "eval", "chat_eval.json")
        try:
            stages[run] = json.loads(path.read_text(encoding="utf-8"))["metrics"]
        except FileNotFoundError:
            raise UsageError(f"{path} does not exist: run `python -m eval.chat_eval {run} --task …` first") from None
        except (ValueError, KeyError):
            raise UsageError(f"{path} is not a report of chat_eval.py: run it again") from None
    names = [Path(run).name.upper() for run in runs]
    lines = [f"| {'Metric':<15} | " + " | ".join(f"{name:<8}" for name in names) + " |"]
    lines += ["|" + "-" * 17 + "|" + "|".join("-" * (max(8, len(name)) + 2) for name in names) + "|"]
    for task, title in TITLES.items():
        if any(task in metrics for metrics in stages.values()):
            cells = [f"{m[task]['value']:.4f}" if task in m else "-" for m in stages.values()]
            cells = [f"{cell:<{max(8, len(name))}}" for cell, name in zip(cells, names, strict=True)]
            lines.append(f"| {title:<15} | " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n"
    for name, metrics in zip(names, stages.values(), strict=True):
        text += f"\n{not_over_all(metrics, name)}\n" if metrics["chatcore"]["count"] < len(CHANCE) else ""
    return text


def not_over_all(metrics, whose=""):
    lacks = ", ".join(TITLES[task] for task in CHANCE if task not in metrics)
    of = f"{whose}: " if whose else ""
    return f"{of}ChatCORE is not over all six tasks: it lacks {lacks}, and is not comparable with one over all."


# -- the command ------------------------------------------------------------------------------------------------------
def task_and_file(text):
    """(task, file) of an argument TASK=FILE."""
    task, equals, path = text.partition("=")
    if task not in CHANCE or not equals or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not TASK=FILE with a task of {', '.join(CHANCE)}")
    return task, path


def evaluate(args):
    if args.stages:
        if args.run or args.task:
            raise UsageError("--stages reads saved results: leave out the run and --task")
        text, out = stage_table(args.stages), args.out or Path(args.stages[-1], "eval")
        write_files(Path(out), {"stages.md": text})
        print(text, end="")
        return
    if not args.run or not args.task:
        raise UsageError("pass a run folder and --task TASK=FILE …, or --stages with the runs to compare")
    tasks = dict(args.task)
    if len(tasks) < len(args.task):
        raise UsageError("--task names a benchmark twice: pass one file each")
    if "humaneval" in tasks and not args.unsafe_sandbox and not sandbox.way():
        raise UsageError("no sandbox works here for HumanEval: install bubblewrap, or pass --unsafe_sandbox")
    # every file is read before the model is: a missing benchmark is never a score
    problems = {
        task: read_problems(task, tasks[task], args.split, args.rows, args.seed) for task in CHANCE if task in tasks
    }
    model, tokenizer, stops = open_model(args.run, args.base, args.dtype, args.load_in_4bit)
    probe = [{"role": "user", "content": "?"}]
    both = len({render(tokenizer, probe, enable_thinking=flag)[0] for flag in (True, False)}) == 2
    if args.mode and not both:
        raise UsageError(f"the template of {args.run} has no two modes: leave out --mode")
    mode = (args.mode or "no_think") if both else None
    kwargs = {"enable_thinking": mode == "think"} if mode else {}
    lines = []
    for task, own in problems.items():
        lines += run_task(task, own, model, tokenizer, stops, args, kwargs)
    lines = [line | ({"mode": mode} if mode else {}) for line in lines]
    metrics, groups = summarize(lines, mode)
    settings = {"run": Path(args.run).name, "tasks": {task: Path(path).name for task, path in tasks.items()}}
    settings |= {"rows": args.rows, "seed": args.seed, "mode": mode, "max_new_tokens": args.max_new_tokens}
    settings |= {"dtype": str(model.dtype).removeprefix("torch."), "load_in_4bit": args.load_in_4bit}
    settings |= {"device": model.device.type, "batch_size": args.batch_size}
    if "humaneval" in tasks:
        settings["sandbox"] = sandbox.way() or "none: limits alone"
    text = json.dumps(problems, ensure_ascii=False, sort_keys=True)
    name = "chat_eval_think" if mode == "think" else "chat_eval"
    folder = args.out or Path(args.run, "eval")
    show(write_scores(folder, name, settings, metrics, groups, lines, hashlib.sha256(text.encode()).hexdigest()))
    if len(tasks) < len(CHANCE):
        print(not_over_all(metrics))


def main(argv=None):
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
