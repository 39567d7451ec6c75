"""What a server sends and what the model answers, written by hand from each family's published format.

The oracle never sees a template or a generation marker. A family is three functions and a few facts:

    history(messages, tools, **arguments)  the text of what has been said so far, as the server renders it
    prompt(messages, **arguments)          what the server appends so that the model speaks
    output(messages, **arguments)          what the model must then produce for the last message, as (text, kind) parts,
                                           kind = "think", "text", "call" or "stop"; the stop comes last

Everything else follows without knowing the family. The training text of a conversation that ends in an answer is
request + output + `after`. An earlier answer is trained exactly when the same text begins with that answer's own
request and its output; otherwise it is context.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field


class Refused(Exception):
    """The format has no place for what the conversation holds."""


@dataclass(frozen=True, eq=False)
class Family:
    name: str
    golden: tuple  # families of renderings.json
    history: Callable
    prompt: Callable
    output: Callable
    after: str = ""  # what follows the stop of a turn and is nobody's output
    upstream: str = ""  # the family's unmarked template inside the installed TRL, when there is one
    tokenizer: str = ""  # folder of shared/tokenizers
    special: tuple = ()  # the control tokens of the family, for the small tokenizer
    plain: tuple = ()  # tokens of their own that are not special
    bos: str = ""
    system: bool = True
    tools: bool = True
    reasoning: bool = True
    parallel: bool = True  # several calls in one turn
    consecutive_users: bool = True
    arguments: dict = field(default_factory=dict)  # argument -> values, what random conversations choose from
    drops: tuple = ()  # what upstream drops silently: "tools", "reasoning"; ours renders or refuses it
    differences: dict = field(default_factory=dict)  # (case, kind) of renderings.json -> reason
    upstream_arguments: tuple = ()  # arguments that the upstream template knows too
    golden_arguments: Callable = lambda case: {}  # what our template must be given to render a published case
    stop_probe: bool = True  # TRL's own probe (user, assistant, user) sees a trained stop
    eos: str = ""
    hard: tuple = ()  # one conversation and its rendering by hand, trained text between ⟦ and ⟧


def dump(value):
    return json.dumps(value, ensure_ascii=False)


def text_of(message):
    return message.get("content") or ""


def function(call):
    return call.get("function", call)


def refuse_reasoning(messages):
    if any(m["role"] == "assistant" and m.get("reasoning_content") for m in messages):
        raise Refused


CALL = {"type": "function", "function": {"name": "prime", "arguments": {"n": 97}}}
TWO_TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?", "tool_calls": [CALL]},
    {"role": "tool", "content": "true"},
    {"role": "assistant", "content": "Prime."},
]


# ---------------------------------------------------------------- ChatML with Hermes tools: ChatML, Qwen2.5, Qwen3

HERMES = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function "
    "signatures within <tools></tools> XML tags:\n<tools>{}\n</tools>\n\nFor each function call, return a json object "
    "with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{{"name": <function-name>, "arguments": <args-json-object>}}\n</tool_call>'
)


def im(role, text):
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def hermes_head(messages, tools):
    """The opening system turn and how many messages it used up."""
    own = messages[:1] if messages and messages[0]["role"] == "system" else []
    system = [text_of(own[0])] if own else []
    if tools:
        system.append(HERMES.format("".join("\n" + dump(tool) for tool in tools)))
    return im("system", "\n\n".join(system)) if system else "", len(own)


def hermes_calls(message, text):
    """The newline after a text that is not empty, and the calls."""
    calls = []
    for call in map(function, message.get("tool_calls") or []):
        arguments = call["arguments"] if isinstance(call["arguments"], str) else dump(call["arguments"])
        calls.append(f'<tool_call>\n{{"name": "{call["name"]}", "arguments": {arguments}}}\n</tool_call>')
    return "\n" if text and calls else "", "\n".join(calls)


def hermes_replies(messages, i):
    """Consecutive tool replies share one user turn; it is written where the run begins."""
    if i and messages[i - 1]["role"] == "tool":
        return ""
    run = []
    for message in messages[i:]:
        if message["role"] != "tool":
            break
        run.append(f"\n<tool_response>\n{text_of(message)}\n</tool_response>")
    return "<|im_start|>user" + "".join(run) + "<|im_end|>\n"


def chatml_prompt(messages, **_):
    return "<|im_start|>assistant\n"


def plain_output(messages, **_):
    refuse_reasoning(messages)
    text = text_of(messages[-1])
    glue, calls = hermes_calls(messages[-1], text)
    return [(text + glue, "text"), (calls, "call"), ("<|im_end|>", "stop")]


def chatml_history(messages, tools, *, grouped=False, **_):
    refuse_reasoning(messages)
    text, used = hermes_head(messages, tools)
    for i, message in enumerate(messages[used:], used):
        if message["role"] == "tool" and grouped:
            text += hermes_replies(messages, i)
        elif message["role"] == "assistant":
            text += im("assistant", text_of(message) + "".join(hermes_calls(message, text_of(message))))
        else:
            text += im(message["role"], text_of(message))
    return text


def instruct_history(messages, tools, **_):
    return chatml_history(messages, tools, grouped=True)


CHATML = Family(
    name="chatml",
    golden=("chatml",),
    history=chatml_history,
    prompt=chatml_prompt,
    output=plain_output,
    after="\n",
    tokenizer="qwen3",
    special=("<|im_start|>", "<|im_end|>"),
    plain=("<tool_call>", "</tool_call>"),
    drops=("tools", "reasoning"),
    differences={
        ("*", "full"): "upstream leaves the last answer without its <|im_end|> and newline",
        ("tool_one", "request"): "upstream drops the tool list and the calls, ours renders them",
        ("tool_unused", "request"): "upstream drops the tool list, ours renders it",
        ("tool_one", "full"): "upstream drops the tool list and the calls, ours renders them",
        ("tool_unused", "full"): "upstream drops the tool list, ours renders it",
        ("think_last", "full"): "upstream drops the reasoning, ours refuses",
        ("think_two_turns", "full"): "upstream drops the reasoning, ours refuses",
        ("think_two_turns", "request"): "upstream drops the reasoning, ours refuses",
    },
    hard=(
        TWO_TURNS,
        None,
        {},
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n⟦Yes?\n"
        '<tool_call>\n{"name": "prime", "arguments": {"n": 97}}\n</tool_call><|im_end|>⟧\n'
        "<|im_start|>tool\ntrue<|im_end|>\n"
        "<|im_start|>assistant\n⟦Prime.<|im_end|>⟧\n",
    ),
    reasoning=False,
)

QWEN3_INSTRUCT = Family(
    name="qwen3_instruct_2507",
    golden=("qwen3-instruct-2507",),
    history=instruct_history,
    prompt=chatml_prompt,
    output=plain_output,
    after="\n",
    upstream="qwen3_instruct_2507.jinja",
    tokenizer="qwen3",
    special=("<|im_start|>", "<|im_end|>"),
    plain=("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    drops=("reasoning",),
    differences={
        ("think_last", "full"): "upstream drops the reasoning, ours refuses",
        ("think_two_turns", "full"): "upstream drops the reasoning, ours refuses",
        ("think_two_turns", "request"): "upstream drops the reasoning, ours refuses",
    },
    hard=(
        TWO_TURNS,
        None,
        {},
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n⟦Yes?\n"
        '<tool_call>\n{"name": "prime", "arguments": {"n": 97}}\n</tool_call><|im_end|>⟧\n'
        "<|im_start|>user\n<tool_response>\ntrue\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n⟦Prime.<|im_end|>⟧\n",
    ),
    reasoning=False,
)

# ---------------------------------------------------------------- Qwen3, hybrid thinking


def inline_think(message):
    """Reasoning and answer of a message; reasoning may also stand inline, between think tags."""
    reasoning, text = message.get("reasoning_content"), text_of(message)
    if reasoning is not None:
        return reasoning, text
    if "</think>" not in text:
        return "", text
    before, _, _ = text.partition("</think>")
    return before.rstrip("\n").rpartition("<think>")[2].lstrip("\n"), text.rpartition("</think>")[2].lstrip("\n")


def last_question(messages):
    """Index of the last user turn that is no tool reply in disguise; with none, nothing counts as after it."""
    for i in range(len(messages) - 1, -1, -1):
        text = text_of(messages[i])
        if messages[i]["role"] == "user" and not (
            text.startswith("<tool_response>") and text.endswith("</tool_response>")
        ):
            return i
    return len(messages) - 1


def think_block(reasoning):
    return "<think>\n" + reasoning.strip("\n") + "\n</think>\n\n"


def qwen3_history(messages, tools, *, preserve_thinking=False, **_):
    text, used = hermes_head(messages, tools)
    question = last_question(messages)
    for i, message in enumerate(messages[used:], used):
        if message["role"] == "tool":
            text += hermes_replies(messages, i)
        elif message["role"] == "assistant":
            reasoning, answer = inline_think(message)
            if preserve_thinking or (i > question and (reasoning or i == len(messages) - 1)):
                said = think_block(reasoning) + answer.lstrip("\n")
            else:
                said = answer
            text += im("assistant", said + "".join(hermes_calls(message, answer)))
        else:
            text += im(message["role"], text_of(message))
    return text


def qwen3_prompt(messages, *, enable_thinking=None, **_):
    return "<|im_start|>assistant\n" + ("<think>\n\n</think>\n\n" if enable_thinking is False else "")


def qwen3_output(messages, *, enable_thinking=None, preserve_thinking=False, **_):
    last = messages[-1]
    reasoning, answer = inline_think(last)
    glue, calls = hermes_calls(last, answer)
    think = think_block(reasoning)
    nothing_asked = last_question(messages) == len(messages) - 1
    if reasoning.strip("\n") and (enable_thinking is False or nothing_asked and not preserve_thinking):
        raise Refused
    if enable_thinking is False:
        think = ""
    elif nothing_asked and not preserve_thinking:
        return [(answer + glue, "text"), (calls, "call"), ("<|im_end|>", "stop")]
    return [(think, "think"), (answer.lstrip("\n") + glue, "text"), (calls, "call"), ("<|im_end|>", "stop")]


QWEN3 = Family(
    name="qwen3",
    golden=("qwen3",),
    history=qwen3_history,
    prompt=qwen3_prompt,
    output=qwen3_output,
    after="\n",
    upstream="qwen3.jinja",
    stop_probe=False,
    tokenizer="qwen3",
    special=("<|im_start|>", "<|im_end|>"),
    plain=("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
    arguments={"enable_thinking": (True, False), "preserve_thinking": (True,), "train_thinking": ("on", "masked")},
    upstream_arguments=("enable_thinking",),
    hard=(
        [
            {"role": "user", "content": "Is 91 prime?"},
            {"role": "assistant", "content": "No.", "reasoning_content": "7 * 13."},
            {"role": "user", "content": "And 97?"},
            {"role": "assistant", "content": "I ask.", "reasoning_content": "A tool.", "tool_calls": [CALL]},
            {"role": "tool", "content": "yes"},
            {"role": "assistant", "content": "Yes.", "reasoning_content": "It says so."},
        ],
        None,
        {},
        "<|im_start|>user\nIs 91 prime?<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>\n"
        "<|im_start|>user\nAnd 97?<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\nA tool.\n</think>\n\nI ask.\n"
        '<tool_call>\n{"name": "prime", "arguments": {"n": 97}}\n</tool_call><|im_end|>⟧\n'
        "<|im_start|>user\n<tool_response>\nyes\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\nIt says so.\n</think>\n\nYes.<|im_end|>⟧\n",
    ),
)

FAMILIES = [CHATML, QWEN3, QWEN3_INSTRUCT]
