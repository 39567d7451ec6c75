"""BFCL's multi-turn score: the model's calls are run, turn by turn, and what they leave behind is compared.

    python -m eval.multi_turn runs/qwen3_qlora --data bfcl/BFCL_v4_multi_turn_base.json

The files are those of the Berkeley Function Calling Leaderboard, version 4 (S. G. Patil et al., ICML 2025), laid out as
tool_calls.py has them: multi_turn_base, multi_turn_miss_func, multi_turn_miss_param, multi_turn_long_context. Calls
run on BFCL's own classes (a file system, a broker, a car …) and are judged by its own checker, which have to be
installed without what they pin (numpy 1.26 and 30 more): pip install --no-deps bfcl-eval==2026.3.23

In a turn the model is asked, its calls are run, their replies follow as tool messages and it is asked again, until it
makes no call (or one that does not parse); then the next user message comes (base_handler.py of bfcl-eval). More than
20 steps of calls in a turn end the conversation. Where functions are missing at first, the turn that adds them says so
in BFCL's words. All conversations go on together, a batch of answers at a time.

    multi_turn             conversations that are right: after each turn the objects are in the state of the ground
                           truth's and its replies are among those that the model got up to then (multi_turn_checker.py;
                           what was called, and in which order, is free), and a turn that needs calls has some
    step_limit             conversations that were ended or came to their end by the limit of steps
    malformed, stop_rate   conversations with an answer that begins a call which does not parse; with none that had to
                           be cut off

Writes multi_turn.json and multi_turn.jsonl to --out: a line a conversation with BFCL's type of error, its turn, and all
answers, calls and replies. multi_turn:inference_error is also BFCL's word where the prompt outgrew the context, memory
ran out, or calls ran longer than 20 seconds. Functions that Python has and BFCL's classes have not are not run.
"""

import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from jinja2 import TemplateError

from data_prep.common.errors import UsageError
from eval.common.models import ask, open_model, render
from eval.common.scores import command
from eval.tool_calls import (
    assistant,
    bfcl_parser,
    category_of,
    form_of,
    modes_of,
    prompt_of,
    python_calls,
    read_answer,
    read_tasks,
    report,
    tool_of,
)

BFCL = "2026.3.23"  # of bfcl-eval, as in the Makefile
METRICS = {"multi_turn": "multi_turn", "step_limit": "step_limit", "malformed": "malformed", "stop_rate": "stopped"}
CATEGORIES = [f"multi_turn_{name}" for name in ("base", "miss_func", "miss_param", "long_context")]
SECONDS = 20  # for all calls of a conversation up to a step, which take milliseconds


def prompts_of_bfcl():
    """BFCL's module of the limit of steps and of the words that add functions. Raises UsageError."""
    try:
        found = version("bfcl-eval")
    except PackageNotFoundError:
        found = ""
    if found != BFCL:
        state = f"are those of bfcl-eval {found}" if found else "are not installed"
        raise UsageError(f"the classes that calls run on {state}: pip install --no-deps bfcl-eval=={BFCL}")
    from bfcl_eval.constants import default_prompts

    return default_prompts


class Classes:
    """BFCL's classes, in a process of their own (execute_calls.py), which is begun anew where calls hang or end it."""

    process = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def ask(self, line):
        """What the process answers to a line."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", Path(__file__).with_name("common") / "execute_calls.py"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"PYTHONHASHSEED": "0"},
            )
        alarm = threading.Timer(SECONDS, self.process.kill)
        alarm.start()
        try:
            print(json.dumps(line), file=self.process.stdin, flush=True)
            found = self.process.stdout.readline()
        except BrokenPipeError:
            found = ""
        finally:
            alarm.cancel()
        if not found.endswith("\n"):
            self.close()
            return {"failed": f"its calls ran longer than {SECONDS} s or ended their process"}
        return json.loads(found)

    def close(self):
        if self.process:
            self.process.kill()
            with suppress(BrokenPipeError):
                self.process.communicate()
        self.process = None


class Conversation:
    """A row of BFCL in one mode: messages up to now; turns, lists of steps {answer, calls, replies}; flags."""

    def __init__(self, task, mode, kwargs):
        self.task, self.mode, self.kwargs = task, mode, kwargs
        self.messages, self.turns, self.calls = [], [], 0
        self.tools = [tool_of(function) for function in task["functions"]]
        self.failed, self.step_limit, self.malformed, self.stopped, self.over = "", False, False, True, False
        self.next_turn()

    def next_turn(self):
        turn = len(self.turns)
        self.over = turn == len(self.task["question"])
        if not self.over:
            self.tools = self.tools + [tool_of(function) for function in self.task["added"][turn]]
            self.messages = self.messages + self.task["question"][turn]
            self.turns.append([])

    def fail(self, reason):
        self.failed, self.over = reason, True

    def take(self, answer, calls, malformed, said):
        """An answer; without calls it ends the turn."""
        self.turns[-1].append({"answer": answer.text, "calls": calls, "replies": []})
        self.malformed, self.stopped = self.malformed or malformed, self.stopped and answer.stopped
        if answer.failed:
            self.fail(answer.failed)
        elif not calls:
            self.messages = self.messages + [{"role": "assistant"} | said]
            self.next_turn()

    def run(self, classes, said, apart, limit):
        """Run the calls of the last answer and take their replies; apart: the template holds one call a message."""
        found = classes.ask(line_of(self.task, self.turns))
        if "failed" in found:
            return self.fail(found["failed"])
        step, messages = self.turns[-1][-1], []
        step["replies"] = found["replies"]
        for call, reply in zip(step["calls"], step["replies"], strict=True):
            asked = assistant(call, self.calls)
            if messages and not apart:
                messages[0]["tool_calls"] += asked["tool_calls"]
            else:
                messages.append(asked | (said if not messages else {}))
            replied = {"role": "tool", "tool_call_id": asked["tool_calls"][0]["id"], "name": call["name"]}
            messages.append(replied | {"content": reply})
            self.calls += 1
        self.messages = self.messages + messages
        self.step_limit = self.over = len(self.turns[-1]) > limit  # as BFCL counts: one step more than its limit


def line_of(task, turns):
    """What execute_calls.py is told of a conversation; its own id would make no difference and might be any text."""
    calls = [[step["calls"] for step in turn] for turn in turns]
    return {"id": task["category"] + "_0", "classes": task["classes"], "config": task["config"], "turns": calls}


def judged(one, classes):
    """{"error", "turn"} of a conversation that is over, as eval_runner.py of bfcl-eval gives them."""
    found, turns = {}, len(one.turns)
    if not one.failed and turns == len(one.task["truth"]):
        found = classes.ask(line_of(one.task, one.turns) | {"truth": one.task["truth"]})
        one.failed = found.get("failed", "")
    if one.failed:
        return {"error": "multi_turn:inference_error", "turn": turns}
    return found or {"error": "multi_turn:force_terminated", "turn": turns}


# -- the command ------------------------------------------------------------------------------------------------------


def conversations_of(row, where, answers, docs, classes, words):
    """[what a row asks], with tool_calls.tasks_of's errors. As in BFCL, excluded_function takes nothing away."""
    category, truth, question = category_of(row), answers.get(row["id"]), row["question"]
    if category not in CATEGORIES:
        raise UsageError(
            f"{where} is of {category}, which is not of several turns: python -m eval.tool_calls measures it"
        )
    if truth is None:
        raise UsageError(f"{where} ({row['id']}) has no answer: pass the file of its answers with --answers")
    functions = [one for name in row["involved_classes"] for one in docs(name, where)]
    missed = row.get("missed_function", {})  # {turn, as a string: names that are told from then on}
    held_back = {name for names in missed.values() for name in names}
    task = {"id": row["id"], "category": category, "classes": row["involved_classes"], "config": row["initial_config"]}
    task["functions"] = [one for one in functions if one["name"] not in held_back]
    task |= {"truth": truth, "question": [], "added": []}
    for turn, said in enumerate(question):
        names = missed.get(str(turn), [])
        task["added"].append([one for name in names for one in functions if one["name"] == name])
        task["question"].append([{"role": "user", "content": words}] if names else said)
    steps = [[{"calls": true_calls(text, functions)} for text in texts] for texts in truth]
    found = classes.ask(line_of(task, steps) | {"truth": truth})
    if found.get("error") or "failed" in found or len(truth) != len(question):
        raise ValueError(f"its ground truth is wrong on BFCL's classes, {found.get('failed') or found.get('error')}")
    return [task]


def true_calls(text, functions):
    """The call of a text of the ground truth, which BFCL evaluates as it stands: it may be nothing else."""
    calls = python_calls(text, functions)
    if len(calls) != 1 or calls[0]["name"] not in {one["name"] for one in functions}:
        raise ValueError(f"{text} is no call of its functions")
    return calls


def shape_of(tokenizer, task):
    """(whether the template holds one call a message only, whether it takes reasoning). Raises UsageError."""
    tools = [tool_of(function) for function in task["functions"]]
    name = tools[0]["function"]["name"]
    asked = [assistant({"name": name, "arguments": {}}, number) for number in range(2)]
    calls = [call for message in asked for call in message["tool_calls"]]
    replies = [{"role": "tool", "tool_call_id": call["id"], "name": name, "content": "{}"} for call in calls]

    def holds(*messages):
        user = {"role": "user", "content": "Hi"}
        messages = [user, *messages, {"role": "assistant", "content": "Done."}, user]
        try:
            return bool(render(tokenizer, messages, True, tools)[0])
        except (TemplateError, TypeError, ValueError):
            return False

    if not holds(asked[0], replies[0]):
        raise UsageError("the model's template takes no replies to calls: measure one that does")
    return not holds(asked[0] | {"tool_calls": calls}, *replies), holds(
        asked[0] | {"reasoning_content": "Hm."}, replies[0]
    )


def hold(conversations, opened, kind, classes, limit, args):
    """Hold all conversations to their ends, a step of each at a time."""
    model, tokenizer, stops = opened
    apart, thinks = shape_of(tokenizer, conversations[0].task)
    while open_ones := [one for one in conversations if not one.over]:
        asked = []
        for one in open_ones:
            try:
                task = {"id": one.task["id"], "messages": one.messages}
                asked.append((one, *prompt_of(tokenizer, task, one.tools, one.kwargs)))
            except UsageError as error:
                if one.turns == [[]]:
                    raise
                one.fail(str(error))
        prompts = [ids for _, _, ids in asked]
        label = f"answers of {len(asked)} conversations"
        answers = ask(model, tokenizer, stops, prompts, args.batch_size, args.max_new_tokens, label, args.timeout)
        for (one, prompt, _), answer in zip(asked, answers, strict=True):
            calls, malformed, said = read_answer(tokenizer, kind, prompt, answer.text, one.tools)
            thought = {"reasoning_content": said["reasoning_content"]} if thinks and said["reasoning_content"] else {}
            one.take(answer, calls, malformed, thought | {"content": said["content"]})
            if calls and not one.over:
                one.run(classes, thought, apart, limit)


def measure_turns(args):
    bfcl = prompts_of_bfcl()
    words = bfcl.DEFAULT_USER_PROMPT_FOR_ADDITIONAL_FUNCTION_FC
    with Classes() as classes:
        tasks, digest = read_tasks(args, partial(conversations_of, classes=classes, words=words))
        opened = open_model(args.run, args.base, args.dtype, args.load_in_4bit)
        kind, modes = form_of(opened[1]), modes_of(opened[1], args.mode)
        conversations = [Conversation(task, mode, kwargs) for mode, kwargs in modes.items() for task in tasks]
        hold(conversations, opened, kind, classes, bfcl.MAXIMUM_STEP_LIMIT, args)
        lines = []
        for one in conversations:
            found = judged(one, classes)
            line = {"id": one.task["id"], "category": one.task["category"], "mode": one.mode}
            line |= {
                "answer": [step["answer"] for turn in one.turns for step in turn][-1],
                "failed": one.failed,
                "multi_turn": not found["error"],
            } | found
            lines.append(line | {key: getattr(one, key) for key in ("step_limit", "malformed", "stopped", "turns")})
    report(args, "multi_turn", METRICS, kind, lines, digest, bfcl_eval=BFCL)


def main(argv=None):
    return command("multi_turn.py", measure_turns, bfcl_parser(__doc__).parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
