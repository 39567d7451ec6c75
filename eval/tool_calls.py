"""Tool calls against BFCL's answers: name, arguments and types; no call where none fits; several calls; several turns.

    python -m eval.tool_calls runs/qwen3_qlora --data bfcl/BFCL_v4_simple_python.json bfcl/BFCL_v4_irrelevance.json

The files are those of the Berkeley Function Calling Leaderboard, version 4 (S. G. Patil et al., ICML 2025;
github.com/ShishirPatil/gorilla, berkeley-function-call-leaderboard/bfcl_eval/data); answers are found in
possible_answer/ beside them, the functions of multi_turn_base in multi_turn_func_doc/. The functions go through the
model's own chat template, and its calls are read back in the form in which that template writes them. By default a
model with the switch enable_thinking is asked in both modes.

    ast                    right calls, as BFCL's abstract-syntax check has them (mismatch() below says when)
    irrelevance, relevance no call was parsed where no function fits; some call where one does
    multi_turn_ast         a turn of multi_turn_base whose calls are the ground truth's, in any order, with the ground
                           truth as history. Not BFCL's multi-turn score, which runs the calls and compares states
                           (multi_turn.py): here a detour that ends well is wrong, replies are null, and all calls
                           stand in one answer
    multi_turn_first_call  the same for the first call alone: what a format of one call a turn can reach
    malformed              answers that begin a call which does not parse; they hold no call, as in BFCL, which makes
                           irrelevance right: look at both
    stop_rate              answers ended by a stop token within the budget

Writes tool_calls.json and tool_calls.jsonl to --out. Java and JavaScript categories are refused: other type rules.
"""

import ast
import hashlib
import json
import os
import random
import re
import sys
from pathlib import Path

from jinja2 import TemplateError
from trl.chat_template_utils import gemma4_template, glm4moe_template, qwen3_5_template, qwen3_template

from data_prep.common.errors import UsageError
from eval.common.measure import read_rows
from eval.common.models import add_model_arguments, ask, first_line, open_model, positive, render
from eval.common.scores import command, grouped, parser_of, rates, show, write_scores

METRICS = {
    **{name: name for name in ("ast", "irrelevance", "relevance", "multi_turn_ast", "multi_turn_first_call")},
    "malformed": "malformed",
    "stop_rate": "stopped",
}

# -- calls in the text of an answer -----------------------------------------------------------------------------------

CALL = {"function": {"name": "{name}", "arguments": "{content}"}}
LISTED = {"function": {"name": "{name}", "arguments": "{arguments}"}}


def form(anchor, think=None, said=None, **calls):
    """A response template of transformers: what stands before an answer (a pattern; the last such in a prompt counts),
    how its think block and its text open and close (said None: text is what is left), its calls."""
    pairs = {"reasoning_content": think, "content": said}
    fields = {name: {"open": pair[0], "close": pair[1]} for name, pair in pairs.items() if pair}
    calls = {"content": "json", "transform": CALL} | calls
    return {"start_anchor_pattern": anchor, "fields": {"content": {}, **fields, "tool_calls": calls}}


def dotted(template, pattern):
    """TRL's response template with names that may hold a dot, as BFCL's do."""
    calls = template["fields"]["tool_calls"] | {"open_pattern": pattern}
    return template | {"fields": template["fields"] | {"tool_calls": calls}}


MISTRAL = r"\[/(?:INST|TOOL_RESULTS)\]"

# fmt: off
FORMS = {  # how families write calls: TRL's response templates where they read what ours write, else our own
    "hermes": qwen3_template,
    "xml": qwen3_5_template,
    "glm": glm4moe_template,
    "gemma4": dotted(gemma4_template, r"<\|tool_call>call:(?P<name>[^{]+)"),
    "llama3": form(r"<\|end_header_id\|>\n\n", repeats=True, close_pattern=r"\}\s*(?:<\|eo[tm]_id\|>)?\s*$",
                   open_pattern=r'\{"name":\s*"(?P<name>[^"]+)",\s*"parameters":\s*'),
    # gpt-oss itself also names the channel before the function and constrains to json, as its own parser allows
    "harmony": form(r"<\|start\|>assistant", ("<|channel|>analysis<|message|>", "<|end|>"),
                    ("<|channel|>final<|message|>", "<|return|>"), repeats=True, close="<|call|>",
                    open_pattern=r"to=functions\.(?P<name>[^\s<]+)(?:<\|channel\|>commentary)?\s*"
                                 r"(?:<\|constrain\|>)?\s*json<\|message\|>"),
    "mistral_list": form(MISTRAL, open="[TOOL_CALLS]", close_pattern="</s>|$", transform=LISTED, transform_each=True),
    "mistral_named": form(MISTRAL, repeats=True, close_pattern=r"(?=\[TOOL_CALLS\])|</s>|$",
                          open_pattern=r"\[TOOL_CALLS\](?P<name>[^\[{]+)(?:\[CALL_ID\][^\[]*)?\[ARGS\]"),
    "deepseek": form("<｜Assistant｜>", ("<think>", "</think>"), repeats=True, close="```<｜tool▁call▁end｜>",
                     open_pattern=r"<｜tool▁call▁begin｜>\w+<｜tool▁sep｜>(?P<name>[^\n]+)\n```json\n"),
    "cohere": form(r"<\|CHATBOT_TOKEN\|>", ("<|START_THINKING|>", "<|END_THINKING|>"),
                   ("<|START_RESPONSE|>", "<|END_RESPONSE|>"), open="<|START_ACTION|>", close="<|END_ACTION|>",
                   transform_each=True,
                   transform={"function": {"name": "{tool_name}", "arguments": "{parameters}"}}),
    "python": form(r"<\|im_start\|>assistant\n", ("<think>", "</think>"), open="<|tool_call_start|>",
                   close="<|tool_call_end|>", content="text", transform=None),
}
# fmt: on
UNTYPED = ("xml", "glm")  # they write a string and a number alike: the function's schema tells which it is


def read_calls(tokenizer, kind, prompt, text, tools):
    """(calls, malformed) of an answer to a prompt (texts) in a form of FORMS; a call is {name, arguments}.

    One call that does not parse leaves none. A call that was never closed counts where what it holds is whole. What
    stands inside a think block, closed or not, is no call."""
    return read_answer(tokenizer, kind, prompt, text, tools)[:2]


def read_answer(tokenizer, kind, prompt, text, tools):
    """(calls, malformed, {"content", "reasoning_content"}) of an answer: read_calls, and what was said beside them; of
    a malformed one, its whole text."""
    try:
        known = tools if kind in UNTYPED else None
        answer = tokenizer.parse_response(text, FORMS[kind], prefix=prompt, tools=known)
        said = {name: answer.get(name) or "" for name in ("content", "reasoning_content")}
        found = answer.get("tool_calls") or []
        if isinstance(found, str):
            calls = python_calls(found, [tool["function"] for tool in tools or []])
        else:
            calls = [{"arguments": {}} | call["function"] for call in found]  # as TRL reads a call without any
        if not all(isinstance(call["name"], str) and isinstance(call["arguments"], dict) for call in calls):
            raise ValueError("a name that is no string, or arguments that are no object")
        calls = [{"name": call["name"], "arguments": call["arguments"]} for call in calls]
        json.dumps(calls, ensure_ascii=False).encode()  # python's sets are no JSON, lone surrogates no text
        return calls, False, said if calls or any(said.values()) else said | {"content": text}
    except (ValueError, TypeError, LookupError, AttributeError, SyntaxError, RecursionError, MemoryError):
        # MemoryError: what ast says to brackets nested too deep
        return [], True, {"content": text, "reasoning_content": ""}


class Constants(ast.NodeTransformer):
    """JSON's true, false and null, which stand in python calls beside python's own."""

    names = {"true": True, "false": False, "null": None}

    def visit_Name(self, node):
        return ast.Constant(self.names[node.id]) if node.id in self.names else node


def python_calls(text, functions=()):
    """The calls of a python call, or of a list of them, with literal arguments; those without a name take that of the
    function's parameter in their place. Raises ValueError or SyntaxError."""
    body = Constants().visit(ast.parse(text.strip(), mode="eval").body)
    calls = []
    for node in body.elts if isinstance(body, ast.List) else [body]:
        if not isinstance(node, ast.Call):
            raise ValueError(f"{ast.unparse(node)} is not a call")
        name = ast.unparse(node.func)
        names = next((list(one["parameters"]["properties"]) for one in functions if one["name"] == name), [])
        given = [*zip(names, node.args, strict=False), *((word.arg, word.value) for word in node.keywords)]
        if len(given) < len(node.args) + len(node.keywords):
            raise ValueError(f"{name} has more arguments than parameters")
        calls.append({"name": name, "arguments": {key: ast.literal_eval(value) for key, value in given}})
    return calls


def form_of(tokenizer):
    """The form of FORMS in which the tokenizer's template writes a call. Raises UsageError."""
    call = {"name": "look.up", "arguments": {"city": "Oslo", "days": 3}}
    properties = {"city": {"type": "string"}, "days": {"type": "integer"}}
    tools = [{"type": "function", "function": {"name": call["name"], "parameters": {"properties": properties}}}]
    messages = [{"role": "user", "content": "Hi"}, assistant(call, 0)]
    try:
        prompt, text = render(tokenizer, messages[:1])[0], render(tokenizer, messages, False)[0]
    except (TemplateError, TypeError, ValueError) as error:
        raise UsageError(
            f"the model's template renders no tool call ({first_line(error)}): measure one that does"
        ) from None
    shared = os.path.commonprefix([prompt, text])
    for kind in FORMS:
        if read_calls(tokenizer, kind, shared, text[len(shared) :], tools) == ([call], False):
            return kind
    raise UsageError("the model's template writes tool calls in no known form: add it to FORMS in eval/tool_calls.py")


def assistant(call, number):
    """A call as a message; ids of nine digits, which Mistral's templates ask for."""
    calls = [{"id": f"{number:09d}", "type": "function", "function": call}]
    return {"role": "assistant", "content": "", "tool_calls": calls}


# -- right or wrong ---------------------------------------------------------------------------------------------------

TYPES = {"string": str, "integer": int, "float": float, "boolean": bool, "array": list, "tuple": list, "dict": dict,
         "any": str}  # fmt: skip


def mismatch(calls, functions, answers):
    """Why calls are none of the answers, "" where they are: BFCL's abstract-syntax check (ast_checker.py).

    answers: [{function: {parameter: [allowed values]}}], one a call, in any order; "" among the values: it may be left
    out. A call is right if its function is the answer's, every required parameter and every one that may not be left
    out is there, none is there that function or answer does not know, and each value has the schema's type (a whole
    number is a float too; never the reverse) or else that of the allowed values, and is one of them. Strings are
    compared without case, blanks and the signs , . / - _ * ^, with ' as "; so are those directly in a list or in an
    object, whose keys hold lists of allowed values of their own; the order of a list counts.
    """
    if len(calls) != len(answers):
        return "wrong number of calls" if calls else "no call"
    rest = list(calls)
    for answer in answers:
        [(name, allowed)] = answer.items()
        function = next(one for one in functions if one["name"] == name)
        reasons = [call_mismatch(call, function, allowed) for call in rest]
        if all(reasons):
            return reasons[0]
        del rest[reasons.index("")]
    return ""


def call_mismatch(call, function, allowed):
    given, schema = call["arguments"], function["parameters"]
    if call["name"] != function["name"]:
        return "wrong function"
    if set(schema.get("required", [])) - set(given):
        return "missing parameter"
    for name, value in given.items():
        if name not in schema["properties"] or name not in allowed:
            return "unknown parameter"
        if reason := value_mismatch(value, schema["properties"][name], allowed[name]):
            return reason
    return "missing parameter" if any("" not in allowed[name] for name in set(allowed) - set(given)) else ""


def value_mismatch(value, schema, allowed):
    kind = TYPES[schema["type"]]
    inner = TYPES[schema["items"]["type"]] if kind is list else None
    value = float(value) if schema["type"] == "float" and type(value) is int else value
    other = type_of(allowed)
    if type(value) is not kind and type(value) is not other:
        return "wrong type"
    if type(value) is kind and inner and not any(typed(value, option, inner) for option in allowed):
        return "wrong type"
    if other not in (kind, None) or type(value) is not kind:
        right = value in allowed  # such as a variable's name where the schema wants a number: compared as it stands
    elif kind is dict:
        right = any(same_object(value, option) for option in allowed)
    elif inner is dict:
        right = any(len(value) == len(option) and all(map(same_object, value, option)) for option in allowed)
    elif kind is list:
        right = standards(value) in map(standards, allowed)
    else:
        right = standard(value) in map(standard, allowed)
    return "" if right else "wrong value"


def type_of(allowed):
    return next((type(option) for option in allowed if option != ""), None)


def typed(value, option, inner):
    return not isinstance(option, list) or all(type(item) in (inner, type_of(option)) for item in value)


def same_object(value, option):
    """Whether an object has the keys of another, whose values are lists of allowed ones."""
    if not isinstance(option, dict) or set(value) - set(option):
        return False
    fits = all(standard(item) in standards(option[key]) for key, item in value.items())
    return fits and all("" in option[key] for key in set(option) - set(value))


def standards(values):
    return [standard(value) for value in values]


def standard(value):
    """A string without what the comparison ignores, anything else as it is."""
    return re.sub(r"[ ,./\-_*^]", "", value).lower().replace("'", '"') if isinstance(value, str) else value


def same_calls(message, calls):
    """Whether calls are those of a reference message of our rows, in any order: names, and arguments as JSON values (1
    is 1.0 and not true; strings to the letter). A message without calls is met by none."""

    def whole(value):
        if isinstance(value, dict):
            return {key: whole(item) for key, item in value.items()}
        if isinstance(value, list):
            return [whole(item) for item in value]
        return int(value) if isinstance(value, float) and value.is_integer() else value

    def key(call):
        arguments = call["arguments"]  # some rows hold them as text
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        return json.dumps([call["name"], whole(arguments)], sort_keys=True)

    reference = [call.get("function", call) for call in message.get("tool_calls") or []]
    return sorted(map(key, reference)) == sorted(map(key, calls))


# -- BFCL's files -----------------------------------------------------------------------------------------------------

DOCS = {  # the class that a conversation involves: the file of its functions
    "GorillaFileSystem": "gorilla_file_system", "MathAPI": "math_api", "MessageAPI": "message_api",
    "TwitterAPI": "posting_api", "TicketAPI": "ticket_api", "TradingBot": "trading_bot", "TravelAPI": "travel_booking",
    "VehicleControlAPI": "vehicle_control",
}  # fmt: skip
JSON_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string", None: "string"}


def tool_of(function):
    """A function of BFCL as a tool of the chat API, its words and types as BFCL itself shows them to models."""
    note = " Note that the provided function is in Python 3 syntax."
    shown = function | {
        "description": function.get("description", "") + note,
        "parameters": schema_of(function["parameters"]),
    }
    return {"type": "function", "function": shown}


def schema_of(schema):
    """JSON schema of a schema in BFCL's words."""
    out = schema | {"type": JSON_TYPES.get(schema.get("type"), schema.get("type"))}
    if "properties" in schema:
        out["properties"] = {name: schema_of(one) | marked(one) for name, one in schema["properties"].items()}
    if "items" in schema:
        out["items"] = schema_of(schema["items"])
    return out


def marked(schema):
    text = schema.get("description", "") + " This is a float type value."
    return {"format": "float", "description": text} if schema.get("type") == "float" else {}


def category_of(row):
    return re.sub(r"_\d.*", "", row["id"])


def tasks_of(row, where, answers, docs):
    """What a row asks: dicts of id, category, turn, messages, functions, answers (of mismatch()). Raises UsageError,
    and other errors where the row is not as BFCL writes it."""
    category, truth = category_of(row), answers.get(row["id"])
    if "java" in category or category.startswith("multi_turn") and category != "multi_turn_base":
        other = ": python -m eval.multi_turn does" if "multi_turn" in category else ": leave that file out"
        raise UsageError(f"{where} is of {category}, which is not measured here{other}")
    if truth is None and "relevance" not in category:
        raise UsageError(f"{where} ({row['id']}) has no answer: pass the file of its answers with --answers")
    one = {"id": row["id"], "category": category}
    if category != "multi_turn_base":
        check(row["function"], truth or [], where)
        return [one | {"turn": 1, "messages": row["question"][0], "functions": row["function"], "answers": truth}]
    left_out, messages, tasks = row.get("excluded_function", []), [], []
    functions = [one for name in row["involved_classes"] for one in docs(name, where) if one["name"] not in left_out]
    for turn, (said, texts) in enumerate(zip(row["question"], truth, strict=True), 1):
        calls = [call for text in texts for call in python_calls(text, functions)]
        allowed = [{call["name"]: alternatives(call, functions)} for call in calls]
        check(functions, allowed, where)
        messages = messages + said
        tasks.append(one | {"turn": turn, "messages": messages, "functions": functions, "answers": allowed})
        for number, call in enumerate(calls, len(messages)):
            asked = assistant(call, number)
            reply = {"role": "tool", "tool_call_id": asked["tool_calls"][0]["id"], "name": call["name"]}
            messages = messages + [asked, reply | {"content": "null"}]
        messages = messages + [{"role": "assistant", "content": "Done."}]  # some templates let no user follow a reply
    return tasks


def check(functions, answers, where):
    """Raise UsageError for types that mismatch() does not know, ValueError for an answer with an unknown function."""
    for function in functions:
        for name, schema in function["parameters"]["properties"].items():
            kinds = [schema["type"], *([schema["items"]["type"]] if schema["type"] in ("array", "tuple") else [])]
            if unknown := [kind for kind in kinds if kind not in TYPES]:
                raise UsageError(
                    f"{where}: {name} of {function['name']} is of type {unknown[0]}, which BFCL's python categories do "
                    "not have: leave that file out"
                )
    if unknown := {name for answer in answers for name in answer} - {function["name"] for function in functions}:
        raise ValueError(f"no function {min(unknown)}")


def alternatives(call, functions):
    """What mismatch() may allow for a ground-truth call: its own values, and defaults for what may be left out."""
    [parameters] = [one["parameters"]["properties"] for one in functions if one["name"] == call["name"]]
    allowed = {name: [schema["default"], ""] for name, schema in parameters.items() if "default" in schema}
    for name, value in call["arguments"].items():
        value = {key: [item] for key, item in value.items()} if isinstance(value, dict) else value
        allowed[name] = [value] + [""] * (parameters[name].get("default", ...) == value)
    return allowed


# -- the command ------------------------------------------------------------------------------------------------------


def read_tasks(args, tasks_of=tasks_of):
    """(tasks, sha256 of every file read) of the data in the order of the files; tasks_of(row, where, answers, docs)
    makes those of a row. Raises UsageError."""
    digest, folders = hashlib.sha256(), {}

    def rows(path):
        if path.is_dir():
            raise UsageError(f"{path} is a folder: pass BFCL's files")
        found = read_rows(path, "test")
        digest.update(path.read_bytes())
        return found

    given = args.answers or [path.parent / "possible_answer" / path.name for path in args.data]
    files = given if args.answers else [path for path in given if path.is_file()]
    try:
        answers = {row["id"]: row["ground_truth"] for path in files for row in rows(path)}
    except (KeyError, TypeError):
        raise UsageError(
            "the answers are not rows of id and ground_truth: pass BFCL's files of possible_answer"
        ) from None
    tasks = []
    for path in args.data:

        def docs(name, where, folder=path.parent / "multi_turn_func_doc"):
            if name not in DOCS:
                raise UsageError(f"{where} involves {name}, whose functions are not known here: leave the row out")
            file = folder / f"{DOCS[name]}.json"
            if file not in folders:
                folders[file] = rows(file)
            return folders[file]

        found = list(enumerate(rows(path), 1))
        if args.rows and args.rows < len(found):
            found = sorted(random.Random(args.seed).sample(found, args.rows))
        for number, row in found:
            where = f"{path}, row {number}"
            try:
                tasks += tasks_of(row, where, answers, docs)
            except (ValueError, LookupError, TypeError, AttributeError, SyntaxError) as error:
                raise UsageError(
                    f"{where} is not as BFCL 4 writes it ({first_line(error)}): pass its own files"
                ) from None
    if not tasks:
        raise UsageError("the data holds no rows: pass files of BFCL")
    return tasks, digest.hexdigest()


def modes_of(tokenizer, wanted):
    """{mode: arguments of the template}: the wanted ones, by default both where its prompt has the switch. Raises
    UsageError."""
    both = {"think": {"enable_thinking": True}, "no_think": {"enable_thinking": False}}
    ask_for = [render(tokenizer, [{"role": "user", "content": "Hi"}], **one)[0] for one in both.values()]
    if ask_for[0] != ask_for[1]:
        return {mode: both[mode] for mode in wanted or both}
    if wanted:
        raise UsageError("the model's template has no enable_thinking: leave --mode out")
    return {None: {}}


def prompt_of(tokenizer, task, tools, kwargs):
    try:
        text, ids = render(tokenizer, task["messages"], True, tools, **kwargs)
    except (TemplateError, TypeError, ValueError) as error:
        raise UsageError(
            f"the model's template refuses {task['id']} ({first_line(error)}): measure one that takes it"
        ) from None
    if tools[0]["function"]["name"] not in text:
        raise UsageError("the model's template shows no list of tools: measure one that does")
    return text, ids


def line_of(task, mode, answer, calls, malformed):
    """What NAME.jsonl keeps of an answer: the flags that METRICS counts, and why it is wrong."""
    category, several = task["category"], task["category"] == "multi_turn_base"
    line = {"id": task["id"], "category": category, "turn": task["turn"], "mode": mode, "answer": answer.text}
    line |= {"failed": answer.failed, "calls": calls, "malformed": malformed, "stopped": answer.stopped}
    if "irrelevance" in category:
        return line | {"irrelevance": not calls and not answer.failed}
    if "relevance" in category:
        return line | {"relevance": bool(calls)}
    wrong = answer.failed or mismatch(calls, task["functions"], task["answers"])
    line |= {"wrong": wrong, "multi_turn_ast" if several else "ast": not wrong}
    if several:
        first = mismatch(calls[:1], task["functions"], task["answers"][:1])
        line["multi_turn_first_call"] = not (answer.failed or first)
    return line


def measure_calls(args):
    tasks, digest = read_tasks(args)
    model, tokenizer, stops = open_model(args.run, args.base, args.dtype, args.load_in_4bit)
    kind, modes = form_of(tokenizer), modes_of(tokenizer, args.mode)
    asked = []
    for mode, kwargs in modes.items():
        for task in tasks:
            tools = [tool_of(function) for function in task["functions"]]
            asked.append((task, mode, tools, *prompt_of(tokenizer, task, tools, kwargs)))
    prompts, most = [one[-1] for one in asked], args.max_new_tokens
    answers = ask(model, tokenizer, stops, prompts, args.batch_size, most, timeout=args.timeout)
    lines = []
    for (task, mode, tools, prompt, _), answer in zip(asked, answers, strict=True):
        lines.append(line_of(task, mode, answer, *read_calls(tokenizer, kind, prompt, answer.text, tools)))
    report(args, "tool_calls", METRICS, kind, lines, digest)


def report(args, name, metrics, kind, lines, digest, **more):
    """Write and show the scores of a command on BFCL's files, by category and mode."""
    settings = {"model": args.run.resolve().name, "data": [path.name for path in args.data], "form": kind}
    settings |= {key: getattr(args, key) for key in ("rows", "seed", "max_new_tokens", "batch_size", "load_in_4bit")}
    groups = grouped(lines, metrics, "category", "mode")
    out = args.out or args.run / "eval"
    show(write_scores(out, name, settings | more, rates(lines, metrics), groups, lines, digest))


def bfcl_parser(doc):
    """The arguments of a command on BFCL's files."""
    parser = parser_of(doc)
    parser.add_argument("run", type=Path, help="run folder: a model with its tokenizer, or an adapter")
    parser.add_argument("--base", help="of an adapter (default: the one that it names)")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="BFCL_v4_*.json")
    parser.add_argument("--answers", type=Path, nargs="+", help="their answers (default: possible_answer/ beside them)")
    parser.add_argument("--mode", choices=["think", "no_think"], nargs="+", help="enable_thinking (default: both)")
    parser.add_argument("--rows", type=positive, help="so many rows of each file, drawn by --seed (default: all)")
    parser.add_argument("--seed", type=int, default=42, help="of --rows")
    parser.add_argument("--out", type=Path, help="folder of the scores (default: eval/ in the run)")
    add_model_arguments(parser, max_new_tokens=512)
    return parser


def main(argv=None):
    return command("tool_calls.py", measure_calls, bfcl_parser(__doc__).parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
