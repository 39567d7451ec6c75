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

import argparse
import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType, TracebackType

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

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
from eval.common.models import Answer, OpenedModel, Prompt, ask, open_model, render_text
from eval.common.scores import command
from eval.common.tool_messages import (
    add_call_ids,
    call_message,
    find_calling_family,
    render_prompt,
    reply_message,
)

BFCL = "2026.3.23"  # of bfcl-eval, as in the Makefile
METRICS = {"multi_turn": "multi_turn", "step_limit": "step_limit", "malformed": "malformed", "stop_rate": "stopped"}
CATEGORIES = [f"multi_turn_{name}" for name in ("base", "miss_func", "miss_param", "long_context")]
SECONDS = 20  # for all calls of a conversation up to a step, which take milliseconds
EXECUTE_CALLS = Path(__file__).with_name("common") / "execute_calls.py"


def import_bfcl_prompts() -> ModuleType:
    """Return BFCL's module of the limit of steps and of the words that add functions. Raises UsageError."""
    try:
        installed = version("bfcl-eval")
    except PackageNotFoundError:
        installed = ""
    if installed != BFCL:
        state = f"are those of bfcl-eval {installed}" if installed else "are not installed"
        raise UsageError(f"the classes that calls run on {state}: pip install --no-deps bfcl-eval=={BFCL}")
    from bfcl_eval.constants import default_prompts

    return default_prompts


class Classes:
    """BFCL's classes, in a process of their own (execute_calls.py), which is begun anew where calls hang or end it."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> "Classes":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def ask(self, line: dict) -> dict:
        """Return what the process answers to a line, as execute_calls.py has both."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", EXECUTE_CALLS],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"PYTHONHASHSEED": "0"},
            )
        alarm = threading.Timer(SECONDS, self.process.kill)
        alarm.start()
        try:
            print(json.dumps(line), file=self.process.stdin, flush=True)
            output = self.process.stdout.readline()
        except BrokenPipeError:
            output = ""
        finally:
            alarm.cancel()
        if not output.endswith("\n"):
            self.close()
            return {"failed": f"its calls ran longer than {SECONDS} s or ended their process"}
        return json.loads(output)

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            with suppress(BrokenPipeError):
                self.process.communicate()
        self.process = None


# -- conversations ----------------------------------------------------------------------------------------------------
@dataclass
class Task:
    """A row of BFCL. functions: known from the start; added: those of each turn; question: its user messages; truth:
    the texts of its calls."""

    id: str
    category: str
    classes: list[str]
    config: dict
    functions: list[dict]
    added: list[list[dict]]
    question: list[list[dict]]
    truth: list[list[str]]


@dataclass
class Step:
    """An answer, its calls and their replies."""

    answer: str
    calls: list[dict]
    replies: list[str] = field(default_factory=list)


@dataclass
class Verdict:
    """BFCL's type of error, "" where the conversation is right, and its turn."""

    error: str
    turn: int | None


class Conversation:
    """A task in one mode: messages up to now; turns, lists of steps; flags. failed: why it could not go on."""

    def __init__(self, task: Task, mode: str | None) -> None:
        self.task = task
        self.mode = mode
        self.tools = list_tools(task.functions)
        self.messages: list[dict] = []
        self.turns: list[list[Step]] = []
        self.failed = ""
        self.step_limit = False
        self.malformed = False
        self.stopped = True
        self.is_over = False
        self.begin_turn()

    @property
    def last_step(self) -> Step:
        return self.turns[-1][-1]

    def begin_turn(self) -> None:
        turn = len(self.turns)
        self.is_over = turn == len(self.task.question)
        if not self.is_over:
            self.tools = self.tools + list_tools(self.task.added[turn])
            self.messages = self.messages + self.task.question[turn]
            self.turns.append([])

    def fail(self, reason: str) -> None:
        self.failed = reason
        self.is_over = True

    def add_answer(self, answer: Answer, said: ParsedAnswer, takes_reasoning: bool) -> None:
        """Take an answer; without calls it ends the turn. said: the answer, parsed."""
        calls = [call["function"] for call in said.tool_calls]
        self.turns[-1].append(Step(answer.text, calls))
        self.malformed = self.malformed or bool(said.error)
        self.stopped = self.stopped and answer.stopped
        if answer.failed:
            self.fail(answer.failed)
        elif not calls:
            message = {"role": "assistant", "content": said.content}
            if takes_reasoning and said.reasoning:
                message["reasoning_content"] = said.reasoning
            self.messages = self.messages + [message]
            self.begin_turn()

    def run_calls(self, classes: Classes, said: ParsedAnswer, shape: "HistoryShape", limit: int) -> None:
        """Run the calls of the last answer and take their replies. limit: of steps in a turn."""
        output = classes.ask(to_line(self.task, self.turns))
        if "failed" in output:
            self.fail(output["failed"])
            return
        step = self.last_step
        step.replies = output["replies"]
        groups = [[call] for call in step.calls] if shape.one_call else [step.calls]
        replies = iter(step.replies)
        messages = []
        for calls in groups:
            messages.append(call_message(calls))
            for call in calls:
                messages.append(reply_message(call, next(replies)))
        if shape.takes_reasoning and said.reasoning:
            messages[0]["reasoning_content"] = said.reasoning
        self.messages = self.messages + messages
        # as BFCL counts: one step more than its limit
        self.step_limit = len(self.turns[-1]) > limit
        self.is_over = self.step_limit


def to_line(task: Task, turns: list[list[Step]]) -> dict:
    """Return what execute_calls.py is told of a conversation. Its own id would make no difference and might be any
    text."""
    calls = [[step.calls for step in turn] for turn in turns]
    return {"id": f"{task.category}_0", "classes": task.classes, "config": task.config, "turns": calls}


def judge(conversation: Conversation, classes: Classes) -> Verdict:
    """Return the verdict on a conversation that is over, as eval_runner.py of bfcl-eval gives it."""
    task = conversation.task
    turn = len(conversation.turns)
    verdict = Verdict("multi_turn:force_terminated", turn)
    if not conversation.failed and turn == len(task.truth):
        output = classes.ask(to_line(task, conversation.turns) | {"truth": task.truth})
        if "failed" in output:
            conversation.failed = output["failed"]
        else:
            verdict = Verdict(output["error"], output["turn"])
    if conversation.failed:
        return Verdict("multi_turn:inference_error", turn)
    return verdict


# -- rows -------------------------------------------------------------------------------------------------------------
def list_tasks(row: BfclRow, classes: Classes, words: str) -> list[Task]:
    """Return the conversation of a row. words: BFCL's where functions are added.

    As in BFCL, excluded_function takes nothing away. Raises UsageError, and other errors where the row is not as BFCL
    writes it.
    """
    category = row.category
    if category not in CATEGORIES:
        raise UsageError(
            f"{row.place} is of {category}, which is not of several turns: python -m eval.tool_calls measures it"
        )
    truth = row.require_truth()
    functions = row.list_functions()
    missed = row.row.get("missed_function", {})  # {turn, as a string: names that are told from then on}
    held_back = set()
    for names in missed.values():
        held_back.update(names)
    known = [function for function in functions if function["name"] not in held_back]
    task = Task(
        id=row.row["id"],
        category=category,
        classes=row.row["involved_classes"],
        config=row.row["initial_config"],
        functions=known,
        added=[],
        question=[],
        truth=truth,
    )
    for turn, messages in enumerate(row.row["question"]):
        names = missed.get(str(turn), [])
        added = []
        for name in names:
            added.extend([function for function in functions if function["name"] == name])
        task.added.append(added)
        task.question.append([{"role": "user", "content": words}] if names else messages)
    check_tools(task)
    check_truth(task, functions, classes)
    return [task]


def check_tools(task: Task) -> None:
    """Raise ValueError where a task shows no functions, or what is none."""
    if not list_tools(task.functions):
        raise ValueError("no functions")
    for added in task.added:
        list_tools(added)


def check_truth(task: Task, functions: list[dict], classes: Classes) -> None:
    """Raise ValueError where the ground truth is not right by BFCL's own classes."""
    turns = []
    for texts in task.truth:
        turns.append([Step("", read_true_calls(text, functions)) for text in texts])
    output = classes.ask(to_line(task, turns) | {"truth": task.truth})
    reason = output.get("failed") or output.get("error")
    if not reason and len(task.truth) != len(task.question):
        reason = f"{len(task.truth)} turns of {len(task.question)}"
    if reason:
        raise ValueError(f"its ground truth is wrong on BFCL's classes, {reason}")


def read_true_calls(text: str, functions: list[dict]) -> list[dict]:
    """Return the call of a text of the ground truth, which BFCL evaluates as it stands: it may be nothing else."""
    calls = python_calls(text, list_properties(functions))
    names = [function["name"] for function in functions]
    if len(calls) != 1 or calls[0]["name"] not in names:
        raise ValueError(f"{text} is no call of its functions")
    return calls


# -- templates --------------------------------------------------------------------------------------------------------
@dataclass
class HistoryShape:
    """What a template takes of an earlier answer: one call a message only; its reasoning."""

    one_call: bool
    takes_reasoning: bool


def find_history_shape(tokenizer: PreTrainedTokenizerBase, family: str, task: Task) -> HistoryShape:
    """Return what a template takes of earlier answers. Raises UsageError for one that takes no replies to calls."""
    tools = list_tools(task.functions)
    call = {"name": tools[0]["function"]["name"], "arguments": {}}
    reply = reply_message(call, "{}")
    user = {"role": "user", "content": "Hi"}

    def takes(*messages: dict) -> bool:
        conversation = [user, *messages, {"role": "assistant", "content": "Done."}, user]
        try:
            return bool(render_text(tokenizer, add_call_ids(conversation, family), True, tools))
        except (TemplateError, TypeError, ValueError):
            return False

    if not takes(call_message([call]), reply):
        raise UsageError("the model's template takes no replies to calls: measure one that does")
    return HistoryShape(
        one_call=not takes(call_message([call, call]), reply, reply),
        takes_reasoning=takes(call_message([call]) | {"reasoning_content": "Hm."}, reply),
    )


# -- the command ------------------------------------------------------------------------------------------------------
@dataclass
class Asked:
    """A conversation and the prompt of its next answer."""

    conversation: Conversation
    prompt: Prompt


def list_asked(conversations: list[Conversation], tokenizer: PreTrainedTokenizerBase, family: str) -> list[Asked]:
    """Return the prompts of the conversations that are not over. Raises UsageError for a first one that is refused."""
    asked = []
    for one in conversations:
        if one.is_over:
            continue
        try:
            prompt = render_prompt(tokenizer, family, one.task.id, one.messages, one.tools, one.mode)
        except UsageError as error:
            if one.turns == [[]]:
                raise
            one.fail(str(error))
        else:
            asked.append(Asked(one, prompt))
    return asked


def hold_conversations(
    conversations: list[Conversation],
    opened: OpenedModel,
    family: str,
    classes: Classes,
    limit: int,
    args: argparse.Namespace,
) -> None:
    """Hold all conversations to their ends, a step of each at a time. limit: of steps in a turn."""
    model, tokenizer, stops = opened
    shape = find_history_shape(tokenizer, family, conversations[0].task)
    while not all([one.is_over for one in conversations]):
        asked = list_asked(conversations, tokenizer, family)
        prompts = [one.prompt.ids for one in asked]
        label = f"answers of {len(asked)} conversations"
        answers = ask(model, tokenizer, stops, prompts, args.batch_size, args.max_new_tokens, label, args.timeout)
        for one, answer in zip(asked, answers, strict=True):
            conversation = one.conversation
            said = parse_answer(answer.text, family, one.prompt.text, conversation.tools)
            conversation.add_answer(answer, said, shape.takes_reasoning)
            if said.tool_calls and not conversation.is_over:
                conversation.run_calls(classes, said, shape, limit)


def to_output(conversation: Conversation, verdict: Verdict) -> dict:
    """Return the line of a conversation in multi_turn.jsonl."""
    steps = [step for turn in conversation.turns for step in turn]
    return {
        "id": conversation.task.id,
        "category": conversation.task.category,
        "mode": conversation.mode,
        "answer": steps[-1].answer,
        "failed": conversation.failed,
        "multi_turn": not verdict.error,
        "error": verdict.error,
        "turn": verdict.turn,
        "step_limit": conversation.step_limit,
        "malformed": conversation.malformed,
        "stopped": conversation.stopped,
        "turns": [[asdict(step) for step in turn] for turn in conversation.turns],
    }


def measure_turns(args: argparse.Namespace) -> None:
    """Run the command. Raises UsageError."""
    bfcl = import_bfcl_prompts()
    words = bfcl.DEFAULT_USER_PROMPT_FOR_ADDITIONAL_FUNCTION_FC
    files = BfclFiles()
    with Classes() as classes:
        tasks = read_tasks(args, files, partial(list_tasks, classes=classes, words=words))
        opened = open_model(args.run, args.base, args.dtype, args.load_in_4bit)
        family = find_calling_family(opened.tokenizer)
        conversations = []
        for mode in list_modes(opened.tokenizer, args.mode, args.run):
            conversations.extend([Conversation(task, mode) for task in tasks])
        hold_conversations(conversations, opened, family, classes, bfcl.MAXIMUM_STEP_LIMIT, args)
        lines = [to_output(one, judge(one, classes)) for one in conversations]
    report(args, "multi_turn", METRICS, family, lines, files, bfcl_eval=BFCL)


def main(argv: list[str] | None = None) -> int:
    """Return the exit code of the command."""
    return command("multi_turn.py", measure_turns, bfcl_parser(__doc__).parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
