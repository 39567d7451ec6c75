"""Run the calls of a conversation on BFCL's own Python classes; with the ground truth too, give BFCL's verdict on them.

    echo '{"id": "multi_turn_base_0", "classes": ["MathAPI"], "config": {}, "turns": [[[{"name": "power",
        "arguments": {"base": 2, "exponent": 5}}]]]}' | tr -d '\n' | python -m eval.common.execute_calls

A line of standard input is a conversation up to now: its turns, lists of steps, lists of calls {name, arguments}. A
line of output is {"replies": [text]} of the last step; where the line has truth (turns of BFCL's own texts), {"error",
"turn"} as multi_turn_checker.py of bfcl-eval 2026.3.23 finds them, error "" where the conversation is right; or
{"failed"}. Every line is played from its start on new objects, so that none knows of another. multi_turn.py keeps this
as a process of its own and ends it where a call hangs: arithmetic on huge numbers in C hears no alarm.

BFCL runs a call as Python text, by eval. The texts here hold a public method of the classes in question and literals;
any other name, and what is no name of an argument, gets the reply that eval would give to an unknown one.
"""

import inspect
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from decimal import localcontext
from functools import partial

from bfcl_eval.eval_checker.multi_turn_eval import multi_turn_checker, multi_turn_utils

MEGABYTES = 2048
UNKNOWN = "unknown_function()"  # what the checker runs in place of a call that is none: an error in BFCL too
SHOWN_ERROR = 200  # characters


@contextmanager
def new_objects() -> Iterator[None]:
    """Leave nothing of a conversation behind.

    BFCL keeps its objects in the globals of a module, and its MathAPI sets decimal's precision.
    """
    try:
        with localcontext():
            yield
    finally:
        kept = vars(multi_turn_utils)
        for name in [name for name in kept if name.endswith("_instance")]:
            del kept[name]


@dataclass
class PythonText:
    """A call as Python text; error: why it is none, "" where it is one."""

    text: str
    error: str = ""


def to_python(call: dict, methods: set[str]) -> PythonText:
    """Return the text of a call {name, arguments}. methods: those that may be called."""
    name = call["name"]
    arguments = call["arguments"]
    if name not in methods:
        return PythonText(UNKNOWN, f"name '{name}' is not defined")
    if not all([key.isidentifier() for key in arguments]):
        return PythonText(UNKNOWN, "invalid syntax")
    written = ",".join([f"{key}={value!r}" for key, value in arguments.items()])
    return PythonText(f"{name}({written})")


def list_methods(objects: dict[str, object]) -> set[str]:
    """Return the public methods of objects by their names."""
    methods = set()
    for one in objects.values():
        for name, _ in inspect.getmembers(one, inspect.ismethod):
            if not name.startswith("_"):
                methods.add(name)
    return methods


def play(entry: dict) -> dict:
    """Return the line of output to a line of input."""
    name = entry["id"]
    run = partial(
        multi_turn_utils.execute_multi_turn_func_call,
        initial_config=entry["config"],
        involved_classes=entry["classes"],
        model_name="model",
        test_entry_id=name,
        long_context="long_context" in name,
    )
    with new_objects():
        _, objects = run([])
        methods = list_methods(objects)
        turns = []
        for turn in entry["turns"]:
            steps = [step for step in turn if step]
            turns.append([[to_python(call, methods) for call in step] for step in steps])
        if "truth" not in entry:
            steps = [step for turn in turns for step in turn]
            for step in steps:
                replies, _ = run([call.text for call in step])
            for number, call in enumerate(steps[-1]):
                if call.error:
                    replies[number] = f"Error during execution: {call.error}"
            return {"replies": replies}
        texts = [[[call.text for call in step] for step in turn] for turn in turns]
        row = {"id": name, "initial_config": entry["config"], "involved_classes": entry["classes"]}
        return to_verdict(multi_turn_checker.multi_turn_checker(texts, entry["truth"], row, name, "model"))


def to_verdict(found: dict) -> dict:
    """Return {"error", "turn"} of what the checker says; turns count from 1.

    It names a turn in its words, or by what it ran.
    """
    if found["valid"]:
        return {"error": "", "turn": None}
    named = re.search(r"for turn (\d+)", found["error_message"])
    if named:
        turn = int(named[1]) + 1
    else:
        turn = len(found["execution_result"])
    return {"error": found["error_type"], "turn": turn}


def limit_memory() -> None:
    with suppress(ImportError, OSError, ValueError):  # Windows has no limits, and one that stands may be lower
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEGABYTES << 20, MEGABYTES << 20))


def main() -> None:
    limit_memory()
    out = sys.stdout
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # what the classes print
        for line in sys.stdin:
            try:
                output = play(json.loads(line))
            except Exception as error:
                output = {"failed": f"{type(error).__name__}: {str(error)[:SHOWN_ERROR]}"}
            print(json.dumps(output), file=out, flush=True)


if __name__ == "__main__":
    sys.exit(main())
