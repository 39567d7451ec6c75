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
from contextlib import contextmanager, redirect_stdout, suppress
from decimal import localcontext
from functools import partial

from bfcl_eval.eval_checker.multi_turn_eval import multi_turn_checker, multi_turn_utils

MEGABYTES = 2048
UNKNOWN = "unknown_function()"  # what the checker runs in place of a call that is none: an error in BFCL too


@contextmanager
def new_objects():
    """BFCL keeps the objects of a conversation in the globals of a module, and its MathAPI sets decimal's precision."""
    try:
        with localcontext():
            yield
    finally:
        kept = vars(multi_turn_utils)
        for name in [name for name in kept if name.endswith("_instance")]:
            del kept[name]


def text_of(call, methods):
    """(Python text of a call, why it is none)."""
    name, arguments = call["name"], call["arguments"]
    if name not in methods:
        return UNKNOWN, f"name '{name}' is not defined"
    if not all(key.isidentifier() for key in arguments):
        return UNKNOWN, "invalid syntax"
    return f"{name}({','.join(f'{key}={value!r}' for key, value in arguments.items())})", ""


def play(entry):
    """What a line of input says, as the dict of a line of output."""
    name, config, classes = entry["id"], entry["config"], entry["classes"]
    run = partial(
        multi_turn_utils.execute_multi_turn_func_call,
        initial_config=config,
        involved_classes=classes,
        model_name="model",
        test_entry_id=name,
        long_context="long_context" in name,
    )
    with new_objects():
        _, objects = run([])
        members = [inspect.getmembers(one, inspect.ismethod) for one in objects.values()]
        methods = {method for found in members for method, _ in found if not method.startswith("_")}
        turns = [[[text_of(call, methods) for call in step] for step in turn if step] for turn in entry["turns"]]
        if "truth" not in entry:
            for step in [step for turn in turns for step in turn]:
                replies, _ = run([text for text, _ in step])
            said = [
                f"Error during execution: {why}" if why else one for one, (_, why) in zip(replies, step, strict=True)
            ]
            return {"replies": said}
        row = {"id": name, "initial_config": config, "involved_classes": classes}
        texts = [[[text for text, _ in step] for step in turn] for turn in turns]
        return verdict(multi_turn_checker.multi_turn_checker(texts, entry["truth"], row, name, "model"))


def verdict(found):
    """{"error", "turn"} of what the checker says, turns counted from 1; it names one in its words or by what it ran."""
    if found["valid"]:
        return {"error": "", "turn": None}
    said = re.search(r"for turn (\d+)", found["error_message"])
    return {"error": found["error_type"], "turn": int(said[1]) + 1 if said else len(found["execution_result"])}


def main():
    with suppress(ImportError, OSError, ValueError):  # Windows has no limits, and one that stands may be lower
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEGABYTES << 20, MEGABYTES << 20))
    out = sys.stdout
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # what the classes print
        for line in sys.stdin:
            try:
                found = play(json.loads(line))
            except Exception as error:
                found = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
            print(json.dumps(found), file=out, flush=True)


if __name__ == "__main__":
    sys.exit(main())
