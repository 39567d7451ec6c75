"""Tool calls against BFCL's answers: name, arguments and types; no call where none fits; several calls; several turns.

    python -m eval.tool_calls runs/qwen3_qlora --data bfcl/BFCL_v4_simple_python.json bfcl/BFCL_v4_irrelevance.json

The files are those of the Berkeley Function Calling Leaderboard, version 4 (S. G. Patil et al., ICML 2025;
github.com/ShishirPatil/gorilla, berkeley-function-call-leaderboard/bfcl_eval/data); answers are found in
possible_answer/ beside them, the functions of multi_turn_base in multi_turn_func_doc/. The functions go through the
model's own chat template, and its calls are read as its family writes them (data_prep/common/answers.py). By default a
model with the switch enable_thinking is asked in both modes.

    ast                    right calls, as BFCL's abstract-syntax check has them (mismatch() of common/call_match.py)
    irrelevance, relevance no call was parsed where no function fits; some call where one does
    multi_turn_ast         a turn of multi_turn_base whose calls are the ground truth's, in any order, with the ground
                           truth as history. Not BFCL's multi-turn score, which runs the calls and compares states
                           (multi_turn.py): here a detour that ends well is wrong, replies are null, and all calls
                           stand in one answer
    multi_turn_first_call  the same for the first call alone: what a format of one call a turn can reach
    malformed              answers that begin a call which does not parse; they hold no call, as in BFCL, which makes
                           irrelevance right: look at both
    stop_rate              answers ended by a stop token within the budget

A thought that never ends is an empty answer, and what stands inside a thought is no call. One call that does not parse
leaves none of its answer's. Writes tool_calls.json and tool_calls.jsonl to --out. Java and JavaScript categories are
refused: other type rules.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from data_prep.common.answer_formats import python_calls
from data_prep.common.answers import Answer as ParsedAnswer
from data_prep.common.answers import parse_answer
from data_prep.common.errors import UsageError
from eval.common.bfcl import (
    BfclFiles,
    BfclRow,
    bfcl_parser,
    list_modes,
    list_properties,
    list_tools,
    read_tasks,
    report,
)
from eval.common.call_match import TYPES, find_function, mismatch
from eval.common.models import Answer, Prompt, ask, open_model
from eval.common.scores import command
from eval.common.tool_messages import call_message, find_calling_family, render_prompt, reply_message

METRICS = {  # metric: its flag in the lines
    "ast": "ast",
    "irrelevance": "irrelevance",
    "relevance": "relevance",
    "multi_turn_ast": "multi_turn_ast",
    "multi_turn_first_call": "multi_turn_first_call",
    "malformed": "malformed",
    "stop_rate": "stopped",
}
TURNS = "multi_turn_base"  # the category of several turns that is measured here


# -- tasks ------------------------------------------------------------------------------------------------------------
@dataclass
class Task:
    """What is asked once. turn: from 1; functions: BFCL's; answers: those of mismatch(), None where no call is right
    or any is."""

    id: str
    category: str
    turn: int
    messages: list[dict]
    functions: list[dict]
    answers: list[dict] | None


def list_tasks(row: BfclRow) -> list[Task]:
    """Return what a row asks. Raises UsageError, and other errors where the row is not as BFCL writes it."""
    category = row.category
    if category.startswith("multi_turn") and category != TURNS:
        raise UsageError(f"{row.place} is of {category}, which is not measured here: python -m eval.multi_turn does")
    if "java" in category:
        raise UsageError(f"{row.place} is of {category}, which is not measured here: leave that file out")
    if category == TURNS:
        return list_turns(row)
    functions = row.row["function"]
    answers = row.truth if "relevance" in category else row.require_truth()
    check_functions(functions, row.place)
    check_answers(answers or [], functions)
    return [Task(row.row["id"], category, 1, row.row["question"][0], functions, answers)]


def list_turns(row: BfclRow) -> list[Task]:
    """Return the turns of a conversation, each behind the ground truth of those before it, one call a message."""
    truth = row.require_truth()
    excluded = row.row.get("excluded_function", [])
    functions = [function for function in row.list_functions() if function["name"] not in excluded]
    check_functions(functions, row.place)
    messages = []
    tasks = []
    for turn, (asked, texts) in enumerate(zip(row.row["question"], truth, strict=True), 1):
        calls = []
        for text in texts:
            calls.extend(python_calls(text, list_properties(functions)))
        answers = []
        for call in calls:
            answers.append({call["name"]: list_allowed(call, find_function(call["name"], functions))})
        messages = messages + asked
        tasks.append(Task(row.row["id"], row.category, turn, messages, functions, answers))
        for call in calls:
            messages = messages + [call_message([call]), reply_message(call, "null")]
        messages = messages + [{"role": "assistant", "content": "Done."}]  # some templates let no user follow a reply
    return tasks


def check_functions(functions: list[dict], place: str) -> None:
    """Raise UsageError for types that mismatch() does not know, ValueError for what is no list of functions."""
    if not list_tools(functions):
        raise ValueError("no functions")
    for function in functions:
        for name, schema in function["parameters"]["properties"].items():
            kinds = [schema["type"]]
            if schema["type"] in ("array", "tuple"):
                kinds.append(schema["items"]["type"])
            for kind in kinds:
                if kind not in TYPES:
                    raise UsageError(
                        f"{place}: {name} of {function['name']} is of type {kind}, which BFCL's python categories do "
                        "not have: leave that file out"
                    )


def check_answers(answers: list[dict], functions: list[dict]) -> None:
    """Raise ValueError for an answer with an unknown function."""
    for answer in answers:
        for name in answer:
            find_function(name, functions)


def list_allowed(call: dict, function: dict) -> dict[str, list]:
    """Return what mismatch() may allow for a call of the ground truth: {parameter: values}.

    They are its own values, and defaults for what may be left out.
    """
    parameters = function["parameters"]["properties"]
    allowed = {}
    for name, schema in parameters.items():
        if "default" in schema:
            allowed[name] = [schema["default"], ""]
    for name, value in call["arguments"].items():
        schema = parameters[name]
        is_default = "default" in schema and schema["default"] == value
        if isinstance(value, dict):
            value = {key: [item] for key, item in value.items()}
        allowed[name] = [value]
        if is_default:
            allowed[name].append("")
    return allowed


# -- answers ----------------------------------------------------------------------------------------------------------
@dataclass
class AskedTask:
    """A task as it is asked in one mode."""

    task: Task
    mode: str | None
    tools: list[dict]
    prompt: Prompt


def judge(asked: AskedTask, answer: Answer, said: ParsedAnswer) -> dict:
    """Return the line of an answer: the flags that METRICS counts, and why it is wrong. said: the answer, parsed."""
    task = asked.task
    calls = [call["function"] for call in said.tool_calls]
    line = {
        "id": task.id,
        "category": task.category,
        "turn": task.turn,
        "mode": asked.mode,
        "answer": answer.text,
        "failed": answer.failed,
        "calls": calls,
        "malformed": bool(said.error),
        "stopped": answer.stopped,
    }
    if "irrelevance" in task.category:
        line["irrelevance"] = not calls and not answer.failed
    elif "relevance" in task.category:
        line["relevance"] = bool(calls)
    else:
        line |= judge_calls(task, calls, answer.failed)
    return line


def judge_calls(task: Task, calls: Sequence[dict], failed: str) -> dict:
    """Return {wrong: why, and the flags} of calls that have a ground truth. failed: why there is no answer."""
    wrong = failed or mismatch(calls, task.functions, task.answers)
    if task.category != TURNS:
        return {"wrong": wrong, "ast": not wrong}
    first = failed or mismatch(calls[:1], task.functions, task.answers[:1])
    return {"wrong": wrong, "multi_turn_ast": not wrong, "multi_turn_first_call": not first}


# -- the command ------------------------------------------------------------------------------------------------------
def measure_calls(args: argparse.Namespace) -> None:
    """Run the command. Raises UsageError."""
    files = BfclFiles()
    tasks = read_tasks(args, files, list_tasks)
    model, tokenizer, stops = open_model(args.run, args.base, args.dtype, args.load_in_4bit)
    family = find_calling_family(tokenizer)
    asked = []
    for mode in list_modes(tokenizer, args.mode, args.run):
        for task in tasks:
            tools = list_tools(task.functions)
            prompt = render_prompt(tokenizer, family, task.id, task.messages, tools, mode)
            asked.append(AskedTask(task, mode, tools, prompt))
    answers = ask(
        model,
        tokenizer,
        stops,
        [one.prompt.ids for one in asked],
        args.batch_size,
        args.max_new_tokens,
        timeout=args.timeout,
    )
    lines = []
    for one, answer in zip(asked, answers, strict=True):
        said = parse_answer(answer.text, family, one.prompt.text, one.tools)
        lines.append(judge(one, answer, said))
    report(args, "tool_calls", METRICS, family, lines, files)


def main(argv: list[str] | None = None) -> int:
    """Return the exit code of the command."""
    return command("tool_calls.py", measure_calls, bfcl_parser(__doc__).parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
