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
    systems: tuple = ()  # system messages with a meaning of their own
    tools: bool = True
    reasoning: bool = True
    tool_list: bool = True  # a list of tools can be told, or only calls and replies
    string_arguments: bool = False  # upstream takes the arguments of a call as a string only
    late_system: bool = False  # system messages after the first place
    parallel: bool = True  # several calls in one turn
    text_before_calls: bool = True
    consecutive_users: bool = True
    arguments: dict = field(default_factory=dict)  # argument -> values, what random conversations choose from
    drops: tuple = ()  # what upstream drops silently: "tools", "reasoning"; ours renders or refuses it
    differences: dict = field(default_factory=dict)  # (case, kind) of renderings.json -> reason
    upstream_arguments: tuple = ()  # arguments that the upstream template knows too
    golden_arguments: Callable = lambda case: {}  # what our template must be given to render a published case
    writes_names: bool = False  # a message's name stands in the text
    earlier_stop: str = ""  # what an answer that is not the last message stops on, where a server stops on both
    stop_probe: bool = True  # TRL's own probe (user, assistant, user) sees a trained stop
    eos: str = ""
    upstream_needs: dict = field(default_factory=dict)  # arguments that upstream must be given to stand still
    upstream_date: str = ""  # how upstream writes today's date, which it always prints
    more: tuple = ()  # further conversations like `hard`
    published: Callable | None = None  # a published mask instead of our rule: (messages, tools) -> index, start, end
    parts: bool = False  # content may come in parts of text, python and python_output
    hard: tuple = ()  # one conversation and its rendering by hand, trained text between ⟦ and ⟧


def dump(value):
    return json.dumps(value, ensure_ascii=False)


def text_of(message):
    return message.get("content") or ""


def function(call):
    return call.get("function", call)


def behind_text(text, calls, opening):
    """Text and calls: what opens a call stands with the text before it, or half a character of that would be masked."""
    if text and calls:
        return text + opening, calls.removeprefix(opening)
    return text, calls


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


def kept_think(message, keep_thinking):
    reasoning = message.get("reasoning_content")
    if reasoning and keep_thinking != "on":
        raise Refused
    return "<think>\n" + reasoning.strip("\n") + "\n</think>\n" if reasoning else ""


def plain_output(messages, *, keep_thinking="off", **_):
    [kept_think(message, keep_thinking) for message in messages]
    text, think = text_of(messages[-1]), kept_think(messages[-1], keep_thinking)
    glue, calls = hermes_calls(messages[-1], text)
    return [(think + text + glue, "text"), (calls, "call"), ("<|im_end|>", "stop")]


def chatml_history(messages, tools, *, grouped=False, keep_thinking="off", **_):
    [kept_think(message, keep_thinking) for message in messages]
    text, used = hermes_head(messages, tools)
    for i, message in enumerate(messages[used:], used):
        if message["role"] == "tool" and grouped:
            text += hermes_replies(messages, i)
        elif message["role"] == "assistant":
            said = kept_think(message, keep_thinking) + text_of(message)
            text += im("assistant", said + "".join(hermes_calls(message, text_of(message))))
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
    arguments={"keep_thinking": ("on", "off")},
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
    more=(
        (
            [{"role": "user", "content": "Is 91 prime?"}]
            + [{"role": "assistant", "content": "No.", "reasoning_content": "7 * 13."}],
            None,
            {"keep_thinking": "on"},
            "<|im_start|>user\nIs 91 prime?<|im_end|>\n"
            "<|im_start|>assistant\n⟦<think>\n7 * 13.\n</think>\nNo.<|im_end|>⟧\n",
        ),
    ),
    late_system=True,
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
    late_system=True,
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


def qwen3_turns(messages, tools, *, preserve_thinking=False, **_):
    """The text of each message; the first also holds what opens the conversation."""
    head, used = hermes_head(messages, tools)
    question, turns = last_question(messages), [""] * used
    for i, message in enumerate(messages[used:], used):
        if message["role"] == "tool":
            turns.append(hermes_replies(messages, i))
        elif message["role"] == "assistant":
            reasoning, answer = inline_think(message)
            if preserve_thinking or (i > question and (reasoning or i == len(messages) - 1)):
                said = think_block(reasoning) + answer.lstrip("\n")
            else:
                said = answer
            turns.append(im("assistant", said + "".join(hermes_calls(message, answer))))
        else:
            turns.append(im(message["role"], text_of(message)))
    return [head + turns[0], *turns[1:]]


def qwen3_history(messages, tools, **arguments):
    return "".join(qwen3_turns(messages, tools, **arguments))


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
    late_system=True,
)


# ---------------------------------------------------------------- Qwen2.5, QwQ, Qwen3-Thinking-2507


def encoded_calls(message, text):
    """As hermes_calls, but arguments that come as a string are encoded once more."""
    calls = [{**c, "arguments": dump(c["arguments"])} for c in map(function, message.get("tool_calls") or [])]
    return hermes_calls({**message, "tool_calls": calls}, text)


def qwen2_5_history(messages, tools, **_):
    refuse_reasoning(messages)
    own = messages[0]["role"] == "system"
    persona = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    system = {"role": "system", "content": text_of(messages[0]) if own else persona}
    text, _ = hermes_head([system], tools)
    for i, message in enumerate(messages[own:], own):
        if message["role"] == "tool":
            text += hermes_replies(messages, i)
        elif message["role"] == "assistant":
            text += im("assistant", text_of(message) + "".join(encoded_calls(message, text_of(message))))
        else:
            text += im(message["role"], text_of(message))
    return text


def qwen2_5_output(messages, **_):
    refuse_reasoning(messages)
    text = text_of(messages[-1])
    glue, calls = encoded_calls(messages[-1], text)
    return [(text + glue, "text"), (calls, "call"), ("<|im_end|>", "stop")]


def opened_prompt(messages, **_):
    return "<|im_start|>assistant\n<think>\n"


def opened_think(reasoning):
    return think_block(reasoning).removeprefix("<think>\n")


def thinking_output(messages, **_):
    reasoning, answer = inline_think(messages[-1])
    glue, calls = hermes_calls(messages[-1], answer)
    said = answer.lstrip("\n") + glue
    return [(opened_think(reasoning), "think"), (said, "text"), (calls, "call"), ("<|im_end|>", "stop")]


def qwq_parts(message):
    reasoning, _ = inline_think(message)
    glue, calls = encoded_calls(message, text_of(message))
    return reasoning, text_of(message).rpartition("</think>")[2].lstrip("\n") + glue, calls


def qwq_history(messages, tools, *, preserve_thinking=False, **_):
    text, used = hermes_head(messages, tools)
    if tools and not used:
        text = text.replace("<|im_start|>system\n", "<|im_start|>system\n\n\n", 1)
    for i, message in enumerate(messages[used:], used):
        if message["role"] == "tool":
            text += hermes_replies(messages, i)
        elif message["role"] == "assistant":
            reasoning, said, calls = qwq_parts(message)
            text += im("assistant", (think_block(reasoning) if preserve_thinking else "") + said + calls)
        else:
            text += im(message["role"], text_of(message))
    return text


def qwq_output(messages, **_):
    reasoning, said, calls = qwq_parts(messages[-1])
    return [(opened_think(reasoning), "think"), (said, "text"), (calls, "call"), ("<|im_end|>", "stop")]


THOUGHT = [
    {"role": "user", "content": "Is 91 prime?"},
    {"role": "assistant", "content": "No.", "reasoning_content": "7 * 13."},
    {"role": "user", "content": "And 97?"},
    {"role": "assistant", "content": "I ask.", "reasoning_content": "A tool.", "tool_calls": [CALL]},
    {"role": "tool", "content": "yes"},
    {"role": "assistant", "content": "Yes.", "reasoning_content": "It says so."},
]
HERMES_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
THINK_TOKENS = ("<think>", "</think>")
REASONING_REFUSED = {
    ("think_last", "full"): "upstream drops the reasoning, ours refuses",
    ("think_two_turns", "full"): "upstream drops the reasoning, ours refuses",
    ("think_two_turns", "request"): "upstream drops the reasoning, ours refuses",
}
PRIME = '<tool_call>\n{"name": "prime", "arguments": {"n": 97}}\n</tool_call>'

QWEN2_5 = Family(
    name="qwen2_5",
    golden=("qwen2.5-instruct",),
    history=qwen2_5_history,
    prompt=chatml_prompt,
    output=qwen2_5_output,
    after="\n",
    upstream="qwen2_5.jinja",
    tokenizer="qwen2.5",
    special=("<|im_start|>", "<|im_end|>"),
    plain=HERMES_TOKENS,
    reasoning=False,
    drops=("reasoning",),
    differences=REASONING_REFUSED,
    hard=(
        TWO_TURNS,
        None,
        {},
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        f"<|im_start|>assistant\n⟦Yes?\n{PRIME}<|im_end|>⟧\n"
        "<|im_start|>user\n<tool_response>\ntrue\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n⟦Prime.<|im_end|>⟧\n",
    ),
    late_system=True,
)
QWEN3_THINKING = Family(
    name="qwen3_thinking_2507",
    golden=("qwen3-thinking-2507.UNVERIFIED",),
    history=qwen3_history,
    prompt=opened_prompt,
    output=thinking_output,
    after="\n",
    stop_probe=False,
    tokenizer="qwen3",
    special=("<|im_start|>", "<|im_end|>"),
    plain=HERMES_TOKENS + THINK_TOKENS,
    arguments={"preserve_thinking": (True,), "train_thinking": ("on", "masked")},
    hard=(
        THOUGHT,
        None,
        {},
        "<|im_start|>user\nIs 91 prime?<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>\n"
        "<|im_start|>user\nAnd 97?<|im_end|>\n"
        f"<|im_start|>assistant\n<think>\n⟦A tool.\n</think>\n\nI ask.\n{PRIME}<|im_end|>⟧\n"
        "<|im_start|>user\n<tool_response>\nyes\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n⟦It says so.\n</think>\n\nYes.<|im_end|>⟧\n",
    ),
    late_system=True,
)
LAST_REOPENED = "upstream renders the last answer without the think block that its own prompt opens"
QWQ = Family(
    name="qwq",
    golden=("qwq-32b",),
    history=qwq_history,
    prompt=opened_prompt,
    output=qwq_output,
    after="\n",
    stop_probe=False,
    tokenizer="qwen2.5",
    special=("<|im_start|>", "<|im_end|>"),
    plain=HERMES_TOKENS + THINK_TOKENS,
    arguments={"preserve_thinking": (True,), "train_thinking": ("on", "masked")},
    differences={("*", "full"): LAST_REOPENED},
    hard=(
        THOUGHT,
        None,
        {},
        "<|im_start|>user\nIs 91 prime?<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>\n"
        "<|im_start|>user\nAnd 97?<|im_end|>\n"
        f"<|im_start|>assistant\nI ask.\n{PRIME}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nyes\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n⟦It says so.\n</think>\n\nYes.<|im_end|>⟧\n",
    ),
    late_system=True,
)

# ---------------------------------------------------------------- Qwen3.5, 3.6, 3.8: tools in XML

XML_FORMAT = (
    "If you choose to call a function ONLY reply in the following format with NO suffix:\n\n<tool_call>\n"
    "<function=example_function_name>\n<parameter=example_parameter_1>\nvalue_1\n</parameter>\n"
    "<parameter=example_parameter_2>\nThis is the value for the second parameter\nthat can span\nmultiple lines\n"
    "</parameter>\n</function>\n</tool_call>\n\n<IMPORTANT>\nReminder:\n- Function calls MUST follow the specified "
    "format: an inner <function=...></function> block must be nested within <tool_call></tool_call> XML tags\n"
    "- Required parameters MUST be specified\n- You may provide optional reasoning for your function call in natural "
    "language BEFORE the function call, but NOT after\n- If there is no function call available, answer the question "
    "like normal with your current knowledge and do not tell the user about function calls\n</IMPORTANT>"
)


def xml_tools(tools):
    listed = "".join("\n" + dump(tool) for tool in tools)
    return f"# Tools\n\nYou have access to the following functions:\n\n<tools>{listed}\n</tools>\n\n{XML_FORMAT}"


def python_value(value):
    return dump(value) if isinstance(value, (dict, list)) else str(value)


def json_value(value):
    return value if isinstance(value, str) else dump(value)


def xml_call(call, value_text):
    if not isinstance(call["arguments"], dict):
        raise Refused
    values = "".join(f"<parameter={k}>\n{value_text(v)}\n</parameter>\n" for k, v in call["arguments"].items())
    return f"<tool_call>\n<function={call['name']}>\n{values}</function>\n</tool_call>"


def trimmed(messages):
    return [{**m, "content": text_of(m).strip()} for m in messages]


def asked(messages):
    """Index of the last question; a conversation without one is refused."""
    question = last_question(messages)
    if not messages or messages[question]["role"] != "user":
        raise Refused
    return question


def xml_parts(message, value_text, inline):
    """Reasoning, text with the gap that a call needs, and calls of a trimmed message."""
    if inline:
        reasoning, text = inline_think(message)
    elif "</think>" in text_of(message):
        raise Refused
    else:
        reasoning, text = message.get("reasoning_content") or "", text_of(message)
    calls = "\n".join(xml_call(call, value_text) for call in map(function, message.get("tool_calls") or []))
    return reasoning.strip(), text + ("\n\n" if calls and text.strip() else ""), calls


def xml_system(messages, tools, **_):
    own = [text_of(messages[0])] if messages[0]["role"] == "system" else []
    if not tools:
        return im("system", own[0]) if own else ""
    return im("system", "\n\n".join([xml_tools(tools), *filter(None, own)]))


EFFORTS = {
    "xhigh": "Reasoning effort is set to xhigh. Please think carefully through the task, validate key assumptions, "
    "consider plausible alternatives, and prioritize correctness, consistency, and clarity in the final answer.",
    "medium": "",
    "low": "Reasoning effort is set to low. Keep your thinking brief and focused, moving directly to the conclusion "
    "without unnecessary elaboration.",
}


def effort_system(messages, tools, *, enable_thinking=None, reasoning_effort="xhigh", **_):
    said = [] if enable_thinking is False else [EFFORTS[reasoning_effort]]
    said += [xml_tools(tools)] if tools else []
    said += [text_of(messages[0])] if messages[0]["role"] == "system" else []
    said = "\n\n".join(filter(None, said))
    return im("system", said) if said else ""


def xml_family(value_text, system=xml_system, inline=True, keep=False):
    def history(messages, tools, *, preserve_thinking=keep, **arguments):
        messages = trimmed(messages)
        question, text = asked(messages), system(messages, tools, **arguments)
        for i, message in enumerate(messages):
            if message["role"] == "tool":
                text += hermes_replies(messages, i)
            elif message["role"] == "assistant":
                reasoning, said, calls = xml_parts(message, value_text, inline)
                shown = preserve_thinking or i > question
                text += im("assistant", (f"<think>\n{reasoning}\n</think>\n\n" if shown else "") + said + calls)
            elif message["role"] == "user":
                text += im("user", text_of(message))
        return text

    def prompt(messages, *, enable_thinking=None, **_):
        return "<|im_start|>assistant\n<think>\n" + ("\n</think>\n\n" if enable_thinking is False else "")

    def output(messages, *, enable_thinking=None, **_):
        messages = trimmed(messages)
        asked(messages)
        reasoning, said, calls = xml_parts(messages[-1], value_text, inline)
        if reasoning and enable_thinking is False:
            raise Refused
        think = "" if enable_thinking is False else f"{reasoning}\n</think>\n\n"
        return [(think, "think"), (said, "text"), (calls, "call"), ("<|im_end|>", "stop")]

    return {"history": history, "prompt": prompt, "output": output}


XML_PRIME = "<tool_call>\n<function=prime>\n<parameter=n>\n97\n</parameter>\n</function>\n</tool_call>"
XML_HARD = (
    "<|im_start|>user\nIs 91 prime?<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>\n"
    "<|im_start|>user\nAnd 97?<|im_end|>\n"
    f"<|im_start|>assistant\n<think>\n⟦A tool.\n</think>\n\nI ask.\n\n{XML_PRIME}<|im_end|>⟧\n"
    "<|im_start|>user\n<tool_response>\nyes\n</tool_response><|im_end|>\n"
    "<|im_start|>assistant\n<think>\n⟦It says so.\n</think>\n\nYes.<|im_end|>⟧\n"
)
XML_TOKENS = {
    "after": "\n",
    "tokenizer": "qwen3",
    "special": ("<|im_start|>", "<|im_end|>"),
    "plain": HERMES_TOKENS + THINK_TOKENS,
}


def no_think_by_default(case):
    nothink = case["family"].endswith("-nothink") and case["kind"] == "request" and not case["kwargs"]
    return {"enable_thinking": False} if nothink else {}


QWEN3_5 = Family(
    name="qwen3_5",
    golden=("qwen3.5-think", "qwen3.5-nothink"),
    golden_arguments=no_think_by_default,
    **xml_family(python_value),
    **XML_TOKENS,
    upstream="qwen3_5_think.jinja",
    stop_probe=False,
    arguments={"enable_thinking": (True, False), "preserve_thinking": (True,), "train_thinking": ("on", "masked")},
    upstream_arguments=("enable_thinking",),
    hard=(THOUGHT, None, {}, XML_HARD),
)
QWEN3_6 = Family(
    name="qwen3_6",
    golden=("qwen3.6",),
    **xml_family(json_value),
    **XML_TOKENS,
    upstream="qwen3_6.jinja",
    stop_probe=False,
    arguments={
        "enable_thinking": (True, False),
        "preserve_thinking": (True, False),
        "train_thinking": ("on", "masked"),
    },
    upstream_arguments=("enable_thinking", "preserve_thinking"),
    hard=(THOUGHT, None, {}, XML_HARD),
)
QWEN3_8 = Family(
    name="qwen3_8",
    golden=("qwen3.8",),
    **xml_family(json_value, effort_system, inline=False, keep=True),
    **XML_TOKENS,
    upstream="qwen3_8.jinja",
    arguments={
        "enable_thinking": (True, False),
        "preserve_thinking": (True, False),
        "train_thinking": ("on", "masked"),
        "reasoning_effort": ("xhigh", "medium", "low"),
    },
    upstream_arguments=("enable_thinking", "preserve_thinking", "reasoning_effort"),
    hard=(
        THOUGHT,
        None,
        {},
        im("system", EFFORTS["xhigh"])
        + XML_HARD.replace("\nNo.<|im_end|>", "\n<think>\n⟦7 * 13.\n</think>\n\nNo.<|im_end|>⟧"),
    ),
)

# ---------------------------------------------------------------- Llama 3, 3.1, 3.2


def turn(role, text, stop="<|eot_id|>"):
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}{stop}"


LLAMA_ASK = (
    "Given the following functions, please respond with a JSON for a function call with its proper arguments that best "
    'answers the given prompt.\n\nRespond in the format {"name": function name, "parameters": dictionary of argument '
    "name and its value}.Do not use variables.\n\n"
)
LLAMA_ACCESS = (
    "You have access to the following functions. To call a function, please respond with JSON for a function call."
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.Do not use '
    "variables.\n\n"
)


def pretty(tools):
    return "".join(json.dumps(tool, ensure_ascii=False, indent=4) + "\n\n" for tool in tools)


def llama_said(message, builtin=None):
    """Text, call and stop: one call a turn, and none beside text."""
    calls, text = [*map(function, message.get("tool_calls") or [])], text_of(message).strip()
    if len(calls) > 1 or calls and text or message.get("reasoning_content"):
        raise Refused
    if not calls:
        return text, "", "<|eot_id|>"
    name, arguments = calls[0]["name"], calls[0]["arguments"]
    if name in (builtin or ()):
        values = ", ".join(f'{key}="{value}"' for key, value in arguments.items())
        return "", f"<|python_tag|>{name}.call({values})", "<|eom_id|>"
    return "", f'{{"name": "{name}", "parameters": {dump(arguments)}}}', "<|eom_id|>" if builtin else "<|eot_id|>"


def llama_family(version):
    def history(messages, tools, *, date_string="26 Jul 2024", tools_in_user_message=True, builtin_tools=None, **_):
        own = messages[0]["role"] == "system"
        text = "<|begin_of_text|>"
        if version:
            system = "Environment: ipython\n" if tools or builtin_tools else ""
            if builtin_tools:
                system += "Tools: " + ", ".join(t for t in builtin_tools if t != "code_interpreter") + "\n\n"
            system += f"Cutting Knowledge Date: December 2023\nToday Date: {date_string}\n\n"
            system += LLAMA_ACCESS + pretty(tools) if tools and not tools_in_user_message else ""
            text += turn("system", system + (text_of(messages[0]).strip() if own else ""))
        elif own:
            text += turn("system", text_of(messages[0]).strip())
        for i, message in enumerate(messages[own:], own):
            if message["role"] == "assistant":
                said, call, stop = llama_said(message, builtin_tools)
                text += turn("assistant", said + call, stop)
            elif message["role"] == "tool":
                text += turn("ipython", dump(text_of(message))) if version else turn("tool", text_of(message).strip())
            else:
                asks = LLAMA_ASK + pretty(tools) if tools and tools_in_user_message and i == own else ""
                text += turn(message["role"], asks + text_of(message).strip())
        return text

    def prompt(messages, **_):
        return "<|start_header_id|>assistant<|end_header_id|>\n\n"

    def output(messages, *, builtin_tools=None, **_):
        text, call, stop = llama_said(messages[-1], builtin_tools)
        return [(text, "text"), (call, "call"), (stop, "stop")]

    return {"history": history, "prompt": prompt, "output": output}


LLAMA_TOKENS = {
    "late_system": True,
    "tokenizer": "llama3.2",
    "bos": "<|begin_of_text|>",
    "eos": "<|eot_id|>",
    "special": (
        "<|begin_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|python_tag|>",
    ),
    "reasoning": False,
    "parallel": False,
    "text_before_calls": False,
    "drops": ("reasoning",),
}
ONE_CALL = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Is 97 prime? "},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "yes"},
    {"role": "assistant", "content": "Prime."},
]
LLAMA_BODY = (
    "<|start_header_id|>user<|end_header_id|>\n\nIs 97 prime?<|eot_id|>"
    '<|start_header_id|>assistant<|end_header_id|>\n\n⟦{"name": "prime", "parameters": {"n": 97}}<|eot_id|>⟧'
    '<|start_header_id|>ipython<|end_header_id|>\n\n"yes"<|eot_id|>'
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Prime.<|eot_id|>⟧"
)
LLAMA_DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
SEARCH = [
    {"role": "user", "content": "Who won?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "brave_search", "arguments": {"query": "who won"}}}],
    },
]


def published_date(case):
    return {"date_string": "15 Jun 2025"}  # the clock stood still there


def published_date_long(case):
    return {"date_string": "15 June 2025"}


LLAMA3 = Family(
    name="llama3",
    golden=("llama3",),
    **llama_family(version=0),
    **{**LLAMA_TOKENS, "drops": ("reasoning", "tools")},
    upstream="llama3.jinja",
    differences={
        **REASONING_REFUSED,
        ("tool_one", "full"): "upstream drops the tool list and the call, ours renders them",
        ("tool_one", "request"): "upstream drops the tool list and the call, ours renders them",
        ("tool_unused", "full"): "upstream drops the tool list, ours renders it",
        ("tool_unused", "request"): "upstream drops the tool list, ours renders it",
    },
    hard=(
        ONE_CALL,
        None,
        {},
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        + LLAMA_BODY.replace('ipython<|end_header_id|>\n\n"yes"', "tool<|end_header_id|>\n\nyes"),
    ),
)
LLAMA3_1 = Family(
    name="llama3_1",
    golden=("llama3.1",),
    **llama_family(version=1),
    **LLAMA_TOKENS,
    upstream="llama3_1.jinja",
    arguments={
        "date_string": ("1 Jan 2025",),
        "tools_in_user_message": (True, False),
        "builtin_tools": (["brave_search"], ["code_interpreter", "brave_search", "wolfram_alpha"]),
    },
    upstream_arguments=("date_string", "tools_in_user_message", "builtin_tools"),
    differences=REASONING_REFUSED,
    hard=(
        ONE_CALL,
        None,
        {},
        f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{LLAMA_DATES}Be brief.<|eot_id|>{LLAMA_BODY}",
    ),
    more=(
        (
            SEARCH,
            None,
            {"builtin_tools": ["brave_search", "code_interpreter"]},
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n"
            f"Tools: brave_search\n\n{LLAMA_DATES}<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nWho won?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
            '⟦<|python_tag|>brave_search.call(query="who won")<|eom_id|>⟧',
        ),
    ),
)
LLAMA3_2 = Family(
    name="llama3_2",
    golden=("llama3.2",),
    golden_arguments=published_date,
    **llama_family(version=2),
    **LLAMA_TOKENS,
    upstream="llama3_2.jinja",
    arguments={"date_string": ("26 Jul 2024",), "tools_in_user_message": (True, False)},
    upstream_arguments=("date_string", "tools_in_user_message"),
    upstream_needs={"date_string": "26 Jul 2024"},
    differences=REASONING_REFUSED,
    hard=LLAMA3_1.hard,
)

# ---------------------------------------------------------------- Gemma 2 and 3


def gemma_family(system_role):
    def history(messages, tools, **_):
        own = system_role and messages[0]["role"] == "system"
        prefix, text = text_of(messages[0]) + "\n\n" if own else "", "<bos>"
        for i, message in enumerate(messages[own:]):
            if tools or message["role"] != ["user", "assistant"][i % 2] or message.get("tool_calls"):
                raise Refused
            if message.get("reasoning_content"):
                raise Refused
            role = "model" if message["role"] == "assistant" else "user"
            text += f"<start_of_turn>{role}\n{prefix * (i == 0)}{text_of(message).strip()}<end_of_turn>\n"
        return text

    def prompt(messages, **_):
        return "<start_of_turn>model\n"

    def output(messages, **_):
        if messages[-1].get("reasoning_content") or messages[-1].get("tool_calls"):
            raise Refused
        return [(text_of(messages[-1]).strip(), "text"), ("<end_of_turn>", "stop")]

    return {"history": history, "prompt": prompt, "output": output}


GEMMA_TOKENS = {
    "after": "\n",
    "bos": "<bos>",
    "eos": "<eos>",
    "special": ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    "tools": False,
    "reasoning": False,
    "consecutive_users": False,
    "drops": ("reasoning", "tools"),
}
GEMMA_DIFFERENCES = {
    **REASONING_REFUSED,
    ("tool_unused", "full"): "upstream drops the tool list, ours refuses",
    ("tool_unused", "request"): "upstream drops the tool list, ours refuses",
}
GEMMA_HARD = (
    "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n⟦Yes?<end_of_turn>⟧\n"
    "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n⟦Bye.<end_of_turn>⟧\n"
)
SHORT = [
    {"role": "user", "content": "Hi "},
    {"role": "assistant", "content": " Yes?\n"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Bye."},
]
GEMMA2 = Family(
    name="gemma2",
    golden=("gemma2",),
    **gemma_family(system_role=False),
    **GEMMA_TOKENS,
    upstream="gemma.jinja",
    system=False,
    differences=GEMMA_DIFFERENCES,
    hard=(SHORT, None, {}, GEMMA_HARD),
)
GEMMA3 = Family(
    name="gemma3",
    golden=("gemma3",),
    **gemma_family(system_role=True),
    **GEMMA_TOKENS,
    upstream="gemma3.jinja",
    differences=GEMMA_DIFFERENCES,
    hard=(
        [{"role": "system", "content": "Be brief. "}, *SHORT],
        None,
        {},
        GEMMA_HARD.replace("user\nHi", "user\nBe brief. \n\nHi"),
    ),
)

# ---------------------------------------------------------------- DeepSeek-R1, its distills, DeepSeek-V3


def answer_of(message):
    """Reasoning and answer; inline reasoning ends at its closing tag and the answer begins at its first word."""
    reasoning, text = message.get("reasoning_content"), text_of(message)
    if reasoning is None and "</think>" in text:
        reasoning = text.partition("</think>")[0].rpartition("<think>")[2].strip("\n")
        return reasoning, text.rpartition("</think>")[2].lstrip("\n")
    return (reasoning or "").strip("\n"), text


def deepseek_call(call):
    arguments = call["function"]["arguments"]
    arguments = arguments if isinstance(arguments, str) else dump(arguments)
    kind, name = call.get("type", "function"), call["function"]["name"]
    return f"<｜tool▁call▁begin｜>{kind}<｜tool▁sep｜>{name}\n```json\n{arguments}\n```<｜tool▁call▁end｜>"


def deepseek_calls(message):
    calls = "\n".join(map(deepseek_call, message.get("tool_calls") or []))
    return f"<｜tool▁calls▁begin｜>{calls}<｜tool▁calls▁end｜>" if calls else ""


def deepseek_family(opened, tool_use=False, first_system=False):
    """opened: the prompt opens the think block."""

    def history(messages, tools, *, preserve_thinking=False, **_):
        if tools:
            raise Refused
        systems = [text_of(m) for m in messages if m["role"] == "system"]
        text = "<｜begin▁of▁sentence｜>" + ("\n\n".join(systems) if first_system else "".join(systems[-1:]))
        called = replied = replying = False
        for i, message in enumerate(messages):
            role, calls = message["role"], message.get("tool_calls")
            if not tool_use and (calls or role == "tool"):
                raise Refused
            if role == "user":
                text, replying = text + "<｜User｜>" + text_of(message), False
            elif role == "tool":
                text += "" if replied else "<｜tool▁outputs▁begin｜>"
                text += f"<｜tool▁output▁begin｜>{text_of(message)}<｜tool▁output▁end｜>"
                replied = replying = True
            elif role == "assistant":
                if preserve_thinking:
                    said = "".join(part for part, _ in output(messages[: i + 1]))
                    text += ("<｜tool▁outputs▁end｜>" if replying else prompt([])) + said
                elif calls and called:
                    text += "".join("\n" + deepseek_call(call) for call in calls)
                    text += "<｜tool▁calls▁end｜><｜end▁of▁sentence｜>"
                elif calls:
                    text += "<｜Assistant｜>" + text_of(message) + deepseek_calls(message) + "<｜end▁of▁sentence｜>"
                elif replying:
                    text += "<｜tool▁outputs▁end｜>" + text_of(message) + "<｜end▁of▁sentence｜>"
                else:
                    text += "<｜Assistant｜>" + text_of(message).rpartition("</think>")[2] + "<｜end▁of▁sentence｜>"
                called, replying = called or bool(calls), False
        return text + ("<｜tool▁outputs▁end｜>" if replying else "")

    def prompt(messages, **_):
        if [m["role"] for m in messages if m["role"] != "system"][-1:] == ["tool"]:
            return ""
        return "<｜Assistant｜><think>\n" if opened else "<｜Assistant｜>"

    def output(messages, **_):
        last, after_tool = messages[-1], messages[-2:-1] and messages[-2]["role"] == "tool"
        if not tool_use and last.get("tool_calls"):
            raise Refused
        reasoning, answer = answer_of(last)
        think = f"{reasoning}\n</think>\n\n"
        if after_tool and not reasoning:
            think, answer = "", text_of(last)
        elif after_tool or not opened:
            think = "<think>\n" + think if reasoning else ""
        answer, calls = behind_text(answer, deepseek_calls(last), "<｜tool▁calls▁begin｜>")
        return [(think, "think"), (answer, "text"), (calls, "call"), ("<｜end▁of▁sentence｜>", "stop")]

    return {"history": history, "prompt": prompt, "output": output}


DEEPSEEK_TOKENS = {
    "late_system": True,
    "bos": "<｜begin▁of▁sentence｜>",
    "eos": "<｜end▁of▁sentence｜>",
    "special": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "plain": (
        "<｜User｜>",
        "<｜Assistant｜>",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁sep｜>",
        "<｜tool▁outputs▁begin｜>",
        "<｜tool▁outputs▁end｜>",
        "<｜tool▁output▁begin｜>",
        "<｜tool▁output▁end｜>",
        "<think>",
        "</think>",
    ),
    "arguments": {"preserve_thinking": (True,), "train_thinking": ("on", "masked")},
    "drops": ("tools",),
}
NO_TOOL_LIST = {
    ("tool_unused", "full"): "upstream drops the tool list, ours refuses",
    ("tool_unused", "request"): "upstream drops the tool list, ours refuses",
}
THOUGHT_ONLY = [m for m in THOUGHT if m["role"] != "tool" and not m.get("tool_calls")]
R1_DISTILL = Family(
    name="deepseek_r1_distill",
    golden=("deepseek-r1-distill",),
    **deepseek_family(opened=True),
    **DEEPSEEK_TOKENS,
    upstream="deepseek_r1_distill.jinja",
    stop_probe=False,
    tools=False,
    differences={
        ("*", "full"): LAST_REOPENED,
        **NO_TOOL_LIST,
        ("tool_one", "request"): "upstream drops the tool list and the call, ours refuses",
        ("tool_one", "full"): "upstream drops the tool list and the call, ours refuses",
    },
    hard=(
        THOUGHT_ONLY,
        None,
        {},
        "<｜begin▁of▁sentence｜><｜User｜>Is 91 prime?<｜Assistant｜>No.<｜end▁of▁sentence｜><｜User｜>And 97?"
        "<｜Assistant｜><think>\n⟦It says so.\n</think>\n\nYes.<｜end▁of▁sentence｜>⟧",
    ),
)
R1 = Family(
    name="deepseek_r1",
    golden=("deepseek-r1",),
    **deepseek_family(opened=False, first_system=True),
    **DEEPSEEK_TOKENS,
    tools=False,
    differences={
        **NO_TOOL_LIST,
        ("think_last", "full"): "upstream drops the reasoning of the last answer, ours renders it",
        ("think_two_turns", "full"): "upstream drops the reasoning of the last answer, ours renders it",
    },
    hard=(
        THOUGHT_ONLY,
        None,
        {},
        "<｜begin▁of▁sentence｜><｜User｜>Is 91 prime?<｜Assistant｜>No.<｜end▁of▁sentence｜><｜User｜>And 97?"
        "<｜Assistant｜>⟦<think>\nIt says so.\n</think>\n\nYes.<｜end▁of▁sentence｜>⟧",
    ),
)
DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    golden=("deepseek-v3.trl",),
    **deepseek_family(opened=True, tool_use=True, first_system=True),
    **DEEPSEEK_TOKENS,
    upstream="deepseekv3.jinja",
    stop_probe=False,
    tool_list=False,
    string_arguments=True,
    differences={("*", "full"): LAST_REOPENED, **NO_TOOL_LIST},
    hard=(
        THOUGHT,
        None,
        {},
        "<｜begin▁of▁sentence｜><｜User｜>Is 91 prime?<｜Assistant｜>No.<｜end▁of▁sentence｜><｜User｜>And 97?"
        "<｜Assistant｜>I ask.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>prime\n```json\n"
        '{"n": 97}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>'
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>yes<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
        "⟦<think>\nIt says so.\n</think>\n\nYes.<｜end▁of▁sentence｜>⟧",
    ),
)

# ---------------------------------------------------------------- Phi-4, GLM-4.6, LFM2.5


def refuse_calls(messages, tools=None):
    if tools or any(m.get("tool_calls") or m["role"] == "tool" for m in messages):
        raise Refused


def phi4_history(messages, tools, **_):
    refuse_calls(messages, tools)
    refuse_reasoning(messages)
    text = ""
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            text += text_of(message) + "<|im_end|>"
        else:
            text += f"<|im_start|>{message['role']}<|im_sep|>{text_of(message)}<|im_end|>"
            if message["role"] == "user" and i < len(messages) - 1:  # after the last one it is the prompt
                text += phi4_prompt([message])
    return text


def phi4_prompt(messages, **_):
    return "<|im_start|>assistant<|im_sep|>" if messages[-1]["role"] == "user" else ""


def phi4_output(messages, **_):
    refuse_calls(messages)
    refuse_reasoning(messages[-1:])
    return [(text_of(messages[-1]), "text"), ("<|im_end|>", "stop")]


PHI4 = Family(
    name="phi4",
    golden=("phi-4",),
    history=phi4_history,
    prompt=phi4_prompt,
    output=phi4_output,
    special=("<|im_start|>", "<|im_end|>", "<|im_sep|>"),
    tools=False,
    reasoning=False,
    drops=("tools", "reasoning"),
    differences={
        **REASONING_REFUSED,
        **NO_TOOL_LIST,
        ("tool_one", "full"): "upstream drops the tool list, the call and the reply, ours refuses",
        ("tool_one", "request"): "upstream drops the tool list, the call and the reply, ours refuses",
    },
    hard=(
        SHORT,
        None,
        {},
        "<|im_start|>user<|im_sep|>Hi <|im_end|><|im_start|>assistant<|im_sep|>⟦ Yes?\n<|im_end|>⟧"
        "<|im_start|>user<|im_sep|>Bye<|im_end|><|im_start|>assistant<|im_sep|>⟦Bye.<|im_end|>⟧",
    ),
)

GLM_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function "
    "signatures within <tools></tools> XML tags:\n<tools>\n{}</tools>\n\nFor each function call, output the function "
    "name and arguments within the following XML format:\n<tool_call>{{function-name}}\n"
    "<arg_key>{{arg-key-1}}</arg_key>\n<arg_value>{{arg-value-1}}</arg_value>\n<arg_key>{{arg-key-2}}</arg_key>\n<arg_value>{{arg-value-2}}</arg_value>"
    "\n...\n</tool_call>"
)


def glm_parts(message):
    reasoning, text = inline_think(message)
    calls = ""
    for call in map(function, message.get("tool_calls") or []):
        if not isinstance(call["arguments"], dict):
            raise Refused
        pairs = call["arguments"].items()
        values = "".join(f"<arg_key>{k}</arg_key>\n<arg_value>{json_value(v)}</arg_value>\n" for k, v in pairs)
        calls += f"\n<tool_call>{call['name']}\n{values}</tool_call>"
    said = "\n" + text.strip() if text.strip() else ""
    return reasoning.strip(), *behind_text(said, calls, "\n")


def glm_history(messages, tools, *, enable_thinking=None, preserve_thinking=False, **_):
    text = "[gMASK]<sop>"
    if tools:
        text += "<|system|>\n" + GLM_TOOLS.format("".join(dump(tool) + "\n" for tool in tools))
    last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            reasoning, said, calls = glm_parts(message)
            shown = reasoning if preserve_thinking or i > last_user else ""
            text += f"<|assistant|>\n<think>{shown}</think>{said}{calls}"
        elif message["role"] == "tool":
            first = messages[i - 1]["role"] != "tool"
            text += "<|observation|>" * first + f"\n<tool_response>\n{text_of(message)}\n</tool_response>"
        else:
            text += f"<|{message['role']}|>\n{text_of(message)}"
            if message["role"] == "user" and enable_thinking is False and not text.endswith("/nothink"):
                text += "/nothink"
    return text


def glm_prompt(messages, *, enable_thinking=None, **_):
    return "<|assistant|>" + ("\n<think></think>" if enable_thinking is False else "")


def glm_output(messages, *, enable_thinking=None, **_):
    reasoning, said, calls = glm_parts(messages[-1])
    if reasoning and enable_thinking is False:
        raise Refused
    think = "" if enable_thinking is False else f"\n<think>{reasoning}</think>"
    return [(think, "think"), (said, "text"), (calls, "call"), ("<|observation|>" if calls else "<|user|>", "stop")]


GLM4_6 = Family(
    name="glm4_6",
    golden=("glm-4.6",),
    history=glm_history,
    prompt=glm_prompt,
    output=glm_output,
    special=("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    plain=(*THINK_TOKENS, *HERMES_TOKENS, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    late_system=True,
    arguments={
        "enable_thinking": (True, False),
        "preserve_thinking": (True,),
        "train_thinking": ("on", "masked"),
    },
    differences={("*", "full"): "upstream leaves the last answer without the token it stops on"},
    hard=(
        THOUGHT,
        None,
        {},
        "[gMASK]<sop><|user|>\nIs 91 prime?<|assistant|>\n<think></think>\nNo.<|user|>\nAnd 97?"
        "<|assistant|>⟦\n<think>A tool.</think>\nI ask.\n"
        "<tool_call>prime\n<arg_key>n</arg_key>\n<arg_value>97</arg_value>\n</tool_call><|observation|>⟧"
        "\n<tool_response>\nyes\n</tool_response><|assistant|>⟦\n<think>It says so.</think>\nYes.<|user|>⟧",
    ),
)


def lfm_parts(message):
    calls = []
    for call in map(function, message.get("tool_calls") or []):
        if not isinstance(call["arguments"], dict):
            raise Refused
        values = []
        for key, value in call["arguments"].items():
            shown = f"'{value}'" if isinstance(value, str) else dump(value) if isinstance(value, dict) else str(value)
            values.append(f"{key}={shown}")
        calls.append(f"{call['name']}({', '.join(values)})")
    reasoning = message.get("reasoning_content") or ""
    called = f"<|tool_call_start|>[{', '.join(calls)}]<|tool_call_end|>" if calls else ""
    return f"<think>{reasoning}</think>" if reasoning else "", text_of(message), called


def lfm_history(messages, tools, *, preserve_thinking=False, **_):
    own = messages[0]["role"] == "system"
    system = [text_of(messages[0])] if own and text_of(messages[0]) else []
    system += [f"List of tools: [{', '.join(map(dump, tools))}]"] if tools else []
    text = "<|startoftext|>" + (im("system", "\n".join(system)) if system else "")
    last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    for i, message in enumerate(messages[own:], own):
        if message["role"] == "assistant":
            think, said, calls = lfm_parts(message)
            if not preserve_thinking and i <= last_user:
                think, said = "", said.rpartition("</think>")[2].strip() if "</think>" in said else said
            text += im("assistant", think + said + calls)
        else:
            text += im(message["role"], text_of(message))
    return text


def lfm_output(messages, **_):
    think, said, calls = lfm_parts(messages[-1])
    said, calls = behind_text(said, calls, "<|tool_call_start|>")
    return [(think, "think"), (said, "text"), (calls, "call"), ("<|im_end|>", "stop")]


LFM2_5 = Family(
    name="lfm2_5",
    golden=("lfm2.5",),
    history=lfm_history,
    prompt=chatml_prompt,
    output=lfm_output,
    after="\n",
    upstream="lfm2_2_5_v2.jinja",
    stop_probe=True,
    bos="<|startoftext|>",
    special=("<|startoftext|>", "<|im_start|>", "<|im_end|>", "<|tool_call_start|>", "<|tool_call_end|>"),
    plain=THINK_TOKENS,
    late_system=True,
    arguments={"preserve_thinking": (True,), "train_thinking": ("on", "masked")},
    upstream_arguments=("preserve_thinking",),
    hard=(
        THOUGHT,
        None,
        {},
        "<|startoftext|><|im_start|>user\nIs 91 prime?<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>\n"
        "<|im_start|>user\nAnd 97?<|im_end|>\n<|im_start|>assistant\n⟦<think>A tool.</think>I ask."
        "<|tool_call_start|>[prime(n=97)]<|tool_call_end|><|im_end|>⟧\n<|im_start|>tool\nyes<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>It says so.</think>Yes.<|im_end|>⟧\n",
    ),
)

# ---------------------------------------------------------------- Mistral Nemo and Small 3.2


def mistral_messages(messages):
    """Refuse what the format refuses; the messages after the system message."""
    refuse_reasoning(messages)
    own, turns = messages[0]["role"] == "system", 0
    for message in messages[own:]:
        calls, role = message.get("tool_calls"), message["role"]
        if calls and text_of(message):
            raise Refused
        if not calls and role != "tool":
            if role != ["user", "assistant"][turns % 2]:
                raise Refused
            turns += 1
    return messages[own:]


def nemo_history(messages, tools, **_):
    system = text_of(messages[0]) + "\n\n" if messages[0]["role"] == "system" else ""
    messages = mistral_messages(messages)
    text, last_question = "<s>", [m for m in messages if m["role"] == "user"][-1]
    for i, message in enumerate(messages):
        if message["role"] == "user":
            if tools and message == last_question:
                text += f"[AVAILABLE_TOOLS]{dump(tools)}[/AVAILABLE_TOOLS]"
            text += f"[INST]{system if i == len(messages) - 1 else ''}{text_of(message)}[/INST]"
        elif message["role"] == "tool":
            text += f'[TOOL_RESULTS]{{"content": {text_of(message)}, "call_id": "{message["tool_call_id"]}"}}'
            text += "[/TOOL_RESULTS]"
        else:
            text += "".join(part for part, _ in nemo_output([message]))
    return text


def nemo_output(messages, **_):
    refuse_reasoning(messages)
    calls = [
        f'{{"name": "{c["function"]["name"]}", "arguments": {dump(c["function"]["arguments"])}, "id": "{c["id"]}"}}'
        for c in messages[-1].get("tool_calls") or []
    ]
    if calls and text_of(messages[-1]):
        raise Refused
    called = f"[TOOL_CALLS][{', '.join(calls)}]" if calls else ""
    return [(text_of(messages[-1]), "text"), (called, "call"), ("</s>", "stop")]


def small_history(messages, tools, *, date_string="2025-06-20", **_):
    own = messages[0]["role"] == "system"
    system = text_of(messages[0]) if own else SMALL_PERSONA.format(date_string)
    messages = mistral_messages(messages)
    text, last_question = (
        f"<s>[SYSTEM_PROMPT]{system}[/SYSTEM_PROMPT]",
        [m for m in messages if m["role"] == "user"][-1],
    )
    for message in messages:
        if message["role"] == "user":
            if tools and message == last_question:
                text += f"[AVAILABLE_TOOLS]{dump(tools)}[/AVAILABLE_TOOLS]"
            text += f"[INST]{text_of(message)}[/INST]"
        elif message["role"] == "tool":
            text += f"[TOOL_RESULTS]{message['tool_call_id']}[TOOL_CONTENT]{text_of(message)}[/TOOL_RESULTS]"
        else:
            text += "".join(part for part, _ in small_output([message]))
    return text


def small_output(messages, **_):
    refuse_reasoning(messages)
    calls = ""
    for call in messages[-1].get("tool_calls") or []:
        name, arguments = call["function"]["name"], dump(call["function"]["arguments"])
        calls += f"[TOOL_CALLS]{name}[CALL_ID]{call['id']}[ARGS]{arguments}"
    if calls and text_of(messages[-1]):
        raise Refused
    return [(text_of(messages[-1]), "text"), (calls, "call"), ("</s>", "stop")]


def no_prompt(messages, **_):
    return ""


MISTRAL_TOKENS = {
    "prompt": no_prompt,
    "bos": "<s>",
    "eos": "</s>",
    "special": (
        "<s>",
        "</s>",
        "[INST]",
        "[/INST]",
        "[AVAILABLE_TOOLS]",
        "[/AVAILABLE_TOOLS]",
        "[TOOL_CALLS]",
        "[TOOL_RESULTS]",
        "[/TOOL_RESULTS]",
        "[SYSTEM_PROMPT]",
        "[/SYSTEM_PROMPT]",
        "[CALL_ID]",
        "[ARGS]",
        "[TOOL_CONTENT]",
    ),
    "reasoning": False,
    "consecutive_users": False,
    "text_before_calls": False,
    "drops": ("reasoning",),
}
NINE = [
    {"role": "user", "content": "Is 97 prime?"},
    {"role": "assistant", "content": "", "tool_calls": [{**CALL, "id": "call00001"}]},
    {"role": "tool", "content": "yes", "tool_call_id": "call00001"},
    {"role": "assistant", "content": "Prime."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]
SMALL_PERSONA = (
    "You are Mistral Small 3, a Large Language Model (LLM) created by Mistral AI, a French startup headquartered in "
    "Paris.\nYour knowledge base was last updated on 2023-10-01. The current date is {}.\n\nWhen you're not sure about "
    "some information or when the user's request requires up-to-date or specific data, you must use the "
    "available tools "
    "to fetch the information. Do not hesitate to use tools whenever they can provide a more accurate or complete "
    "response. If no relevant tools are available, then clearly state that you don't have the information and avoid "
    "making up anything.\n\nIf the user's question is not clear, ambiguous, or does not provide enough context for you "
    "to accurately answer the question, you do not try to answer it right away and you rather ask the user to clarify "
    'their request (e.g. "What are some good restaurants around me?" => "Where are you?" or "When is the next '
    "flight to "
    'Tokyo" => "Where do you travel from?").\nYou are always very attentive to dates, and when asked about information '
    "at specific dates, you discard information that is at another date.\nYou follow these instructions in all "
    "languages, and always respond to the user in the language they use or request.\nNext sections describe the "
    "capabilities that you have.\n\n# WEB BROWSING INSTRUCTIONS\n\nYou cannot perform any web search or access "
    "internet "
    "to open URLs, links etc. If it seems like the user is expecting you to do so, you clarify the situation and "
    "ask the "
    "user to copy paste the text directly in the chat.\n\n# MULTI-MODAL INSTRUCTIONS\n\nYou have the ability to read "
    "images, but you cannot generate images. You also cannot transcribe audio files or videos.\nYou cannot read nor "
    "transcribe audio files or videos.\n\n# TOOL CALLING INSTRUCTIONS\n\nYou may have access to tools that you can use "
    "to fetch information or perform actions. You must use these tools in the following situations:\n\n1. When the "
    "request requires up-to-date information.\n2. When the request requires specific data that you do not have in your "
    "knowledge base.\n3. When the request involves actions that you cannot perform without tools.\n\nAlways prioritize "
    "using tools to provide the most accurate and helpful response. If tools are not available, inform the user "
    "that you "
    "cannot perform the requested action at the moment."
)
NEMO_SYSTEM = "upstream shows the system message only while a user message is the last; ours trains under that request"
MISTRAL_NEMO = Family(
    name="mistral_nemo",
    golden=("mistral-nemo",),
    history=nemo_history,
    output=nemo_output,
    **MISTRAL_TOKENS,
    differences={
        **REASONING_REFUSED,
        ("system", "full"): NEMO_SYSTEM,
        ("system_three_turns", "full"): NEMO_SYSTEM,
    },
    hard=(
        [{"role": "system", "content": "Be brief."}, *NINE],
        None,
        {},
        '<s>[INST]Is 97 prime?[/INST][TOOL_CALLS][{"name": "prime", "arguments": {"n": 97}, "id": "call00001"}]</s>'
        '[TOOL_RESULTS]{"content": yes, "call_id": "call00001"}[/TOOL_RESULTS]⟦Prime.</s>⟧'
        "[INST]Be brief.\n\nSure?[/INST]⟦Yes.</s>⟧",
    ),
)
MISTRAL_SMALL = Family(
    name="mistral_small_3_2",
    golden=("mistral-small-3.2",),
    golden_arguments=lambda case: {"date_string": case["date"]},
    history=small_history,
    output=small_output,
    **MISTRAL_TOKENS,
    arguments={"date_string": ("2025-01-31",)},
    differences=REASONING_REFUSED,
    hard=(
        [{"role": "system", "content": "Be brief."}, *NINE],
        None,
        {},
        "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]Is 97 prime?[/INST]"
        '⟦[TOOL_CALLS]prime[CALL_ID]call00001[ARGS]{"n": 97}</s>⟧'
        "[TOOL_RESULTS]call00001[TOOL_CONTENT]yes[/TOOL_RESULTS]⟦Prime.</s>⟧[INST]Sure?[/INST]⟦Yes.</s>⟧",
    ),
)

# ---------------------------------------------------------------- Step-3.5-Flash

STEP_TOOLS = (
    "# Tools\n\nYou have access to the following functions in JSONSchema format:\n\n<tools>{}\n</tools>\n\nIf you "
    "choose to call a function ONLY reply in the following format with NO suffix:\n\n<tool_call>\n"
    "<function=example_function_name>\n<parameter=example_parameter_1>\nvalue_1\n</parameter>\n"
    "<parameter=example_parameter_2>\nThis is the value for the second parameter\nthat can span\nmultiple lines\n"
    "</parameter>\n</function>\n</tool_call>\n\n<IMPORTANT>\nReminder:\n- Function calls MUST follow the specified "
    "format: an inner <function=...>\n...\n</function> block must be nested within <tool_call>\n...\n</tool_call> XML "
    "tags\n- Required parameters MUST be specified\n</IMPORTANT>"
)


def step_parts(message):
    reasoning, text = inline_think(message)
    return reasoning, text, "".join(xml_call(c, python_value) for c in map(function, message.get("tool_calls") or []))


def step_history(messages, tools, *, preserve_thinking=False, **_):
    own, text = messages[0]["role"] == "system", "<｜begin▁of▁sentence｜>"
    if tools:
        listed = STEP_TOOLS.format("".join("\n" + dump(tool) for tool in tools))
        text += im("system", (text_of(messages[0]) + "\n\n" if own else "") + listed)
    elif own:
        text += im("system", text_of(messages[0]))
    question = last_question(messages)
    for i, message in enumerate(messages[own:], own):
        if message["role"] == "assistant":
            reasoning, said, calls = step_parts(message)
            shown = preserve_thinking or i > question
            text += im("assistant", (f"<think>\n{reasoning}\n</think>\n" if shown else "") + said + calls)
        elif message["role"] == "tool":
            text += "" if messages[i - 1]["role"] == "tool" else "<|im_start|>tool_response\n"
            text += f"<tool_response>{text_of(message)}</tool_response>"
            text += "" if messages[i + 1 :] and messages[i + 1]["role"] == "tool" else "<|im_end|>\n"
        else:
            text += im(message["role"], text_of(message))
    return text


def step_output(messages, **_):
    reasoning, said, calls = step_parts(messages[-1])
    said, calls = behind_text(said, calls, "<tool_call>")
    return [(f"{reasoning}\n</think>\n", "think"), (said, "text"), (calls, "call"), ("<|im_end|>", "stop")]


STEP3_5 = Family(
    name="step3_5",
    golden=("step-3.5-flash",),
    history=step_history,
    prompt=opened_prompt,
    output=step_output,
    after="\n",
    stop_probe=False,
    late_system=True,
    bos="<｜begin▁of▁sentence｜>",
    special=("<｜begin▁of▁sentence｜>", "<|im_start|>", "<|im_end|>"),
    plain=THINK_TOKENS + HERMES_TOKENS,
    arguments={"preserve_thinking": (True,), "train_thinking": ("on", "masked")},
    hard=(
        THOUGHT,
        None,
        {},
        "<｜begin▁of▁sentence｜><|im_start|>user\nIs 91 prime?<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>\n"
        "<|im_start|>user\nAnd 97?<|im_end|>\n"
        f"<|im_start|>assistant\n<think>\n⟦A tool.\n</think>\nI ask.{XML_PRIME}<|im_end|>⟧\n"
        "<|im_start|>tool_response\n<tool_response>yes</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n⟦It says so.\n</think>\nYes.<|im_end|>⟧\n",
    ),
)


# ---------------------------------------------------------------- StepTron's mask on Qwen3


def steptron_mask(messages, tools, *, train_turns="flagged", train_newline="on", **arguments):
    last_user = max(i for i, m in enumerate(messages) if m["role"] == "user")
    spans, position = [], 0
    for i, (message, text) in enumerate(zip(messages, qwen3_turns(messages, tools, **arguments), strict=True)):
        start, position = position, position + len(text)
        flags = [message[name] for name in ("loss_mask", "train") if message.get(name) is not None]
        chosen = {"flagged": flags[:1] != [0], "all": True, "last": i == len(messages) - 1}[train_turns]
        if message["role"] == "assistant" and i > last_user and chosen:
            spans.append((i, start + len("<|im_start|>assistant\n"), position - (train_newline == "off")))
    return spans


STEP3_QWEN3 = Family(
    name="step3_qwen3",
    golden=("qwen3",),
    history=qwen3_history,
    prompt=qwen3_prompt,
    output=qwen3_output,
    after="\n",
    published=steptron_mask,
    upstream="qwen3.jinja",
    stop_probe=False,
    late_system=True,
    tokenizer="qwen3",
    special=("<|im_start|>", "<|im_end|>"),
    plain=HERMES_TOKENS + THINK_TOKENS,
    arguments={
        "preserve_thinking": (True,),
        "train_turns": ("flagged", "all", "last"),
        "train_newline": ("on", "off"),
        "train_tool_calls": ("on",),
        "train_header": ("off",),
    },
    hard=(
        [{**m, "loss_mask": int(m.get("content") != "I ask.")} for m in THOUGHT],
        None,
        {},
        "<|im_start|>user\nIs 91 prime?<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>\n"
        "<|im_start|>user\nAnd 97?<|im_end|>\n"
        f"<|im_start|>assistant\n<think>\nA tool.\n</think>\n\nI ask.\n{PRIME}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nyes\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\nIt says so.\n</think>\n\nYes.<|im_end|>\n⟧",
    ),
)

# ---------------------------------------------------------------- nanochat


def nano_parts(message):
    content = message.get("content") or ""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def nano_history(messages, tools, **_):
    refuse_calls(messages, tools)
    refuse_reasoning(messages)
    own = messages[0]["role"] == "system"
    system, text = text_of(messages[0]) + "\n\n" if own else "", "<|bos|>"
    for i, message in enumerate(messages[own:]):
        if message["role"] != ["user", "assistant"][i % 2]:
            raise Refused
        if message["role"] == "assistant":
            text += "<|assistant_start|>" + "".join(part for part, _ in nano_output([message]))
        else:
            said = "".join(part["text"] for part in nano_parts(message))
            text += f"<|user_start|>{system * (i == 0)}{said}<|user_end|>"
    return text


def nano_prompt(messages, **_):
    return "<|assistant_start|>"


def nano_output(messages, **_):
    refuse_calls(messages)
    refuse_reasoning(messages)
    kinds = {"text": ("", "text", ""), "python": ("<|python_start|>", "call", "<|python_end|>")}
    kinds["python_output"] = ("<|output_start|>", "environment", "<|output_end|>")
    said, before = [], None
    for part in nano_parts(messages[-1]):
        if part["type"] == "python_output" and before != "python":
            raise Refused
        before = part["type"]
        start, kind, end = kinds[part["type"]]
        text = start + part["text"] + end
        if kind == "call" and "".join(one for one, _ in said[-1:]) and said[-1][1] == "text":
            said[-1], text = (said[-1][0] + start, "text"), text.removeprefix(start)
        if text:
            said.append((text, kind))
    return [*said, ("<|assistant_end|>", "stop")]


NANOCHAT = Family(
    name="nanochat",
    golden=(),
    history=nano_history,
    prompt=nano_prompt,
    output=nano_output,
    parts=True,
    tools=False,
    reasoning=False,
    consecutive_users=False,
    arguments={"train_tool_calls": ("on", "masked")},
    bos="<|bos|>",
    special=(
        "<|bos|>",
        "<|user_start|>",
        "<|user_end|>",
        "<|assistant_start|>",
        "<|assistant_end|>",
        "<|python_start|>",
        "<|python_end|>",
        "<|output_start|>",
        "<|output_end|>",
    ),
    hard=(
        [
            {"role": "system", "content": "Use python."},
            {"role": "user", "content": "3 * 4?"},
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "Let me see: "},
                    {"type": "python", "text": "3 * 4"},
                    {"type": "python_output", "text": "12"},
                    {"type": "text", "text": " It is 12."},
                ],
            },
        ],
        None,
        {},
        "<|bos|><|user_start|>Use python.\n\n3 * 4?<|user_end|><|assistant_start|>"
        "⟦Let me see: <|python_start|>3 * 4<|python_end|>⟧<|output_start|>12<|output_end|>⟦ It is "
        "12.<|assistant_end|>⟧",
    ),
)

# ---------------------------------------------------------------- SmolLM3

SMOL = "You are a helpful AI assistant named SmolLM, trained by Hugging Face."
SMOL_THINK = (
    " Your role as an assistant involves thoroughly exploring questions through a systematic thinking process before "
    "providing the final precise and accurate solutions. This requires engaging in a comprehensive cycle of analysis, "
    "summarizing, exploration, reassessment, reflection, backtracking, and iteration to develop well-considered "
    "thinking process. Please structure your response into two main sections: Thought and Solution using the specified "
    "format: <think> Thought section </think> Solution section. In the Thought section, detail your reasoning process "
    "in steps. Each step should include detailed considerations such as analysing questions, summarizing relevant "
    "findings, brainstorming new ideas, verifying the accuracy of the current steps, refining any errors, and "
    "revisiting "
    "previous steps. In the Solution section, based on various attempts, explorations, and reflections from the "
    "Thought "
    "section, systematically present the final solution that you deem correct. The Solution section should be logical, "
    "accurate, and concise and detail necessary steps needed to reach the conclusion."
)
SMOL_XML = (
    "You may call one or more functions to assist with the user query.\nYou are provided with function "
    "signatures within "
    "<tools></tools> XML tags:\n\n<tools>\n{}</tools>\n\nFor each function call, return a json object with function "
    "name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{{"name": <function-name>, "arguments": <args-json-object>}}\n</tool_call>'
)
SMOL_PYTHON = (
    "When you send a message containing Python code between '<code>' and '</code>' tags, it will be executed in a "
    "stateful Jupyter notebook environment, and you will then be given the output to continued reasoning in an agentic "
    "loop.\n\nYou can use the following tools in your python code like regular functions:\n<code>\n{}</code>\n\nThe "
    "state persists between code executions: so variables that you define in one step are still available thereafter."
)


def smol_mode(messages, enable_thinking):
    own = text_of(messages[0]) if messages[0]["role"] == "system" else ""
    if "/no_think" in own or "/think" in own:
        return "/no_think" if "/no_think" in own else "/think"
    return "/no_think" if enable_thinking is False else "/think"


def smol_parts(message, mode):
    reasoning, said = (message.get("reasoning_content") or "").strip("\n"), text_of(message).lstrip("\n")
    if reasoning and mode == "/no_think":
        raise Refused
    glue, calls = hermes_calls(message, said)
    return f"<think>\n{reasoning}\n</think>\n" if reasoning else "", said + glue, calls


def smol_history(
    messages,
    tools,
    *,
    enable_thinking=None,
    date_string="08 July 2025",
    xml_tools=None,
    python_tools=None,
    custom_instructions="",
    **_,
):
    mode, tools = smol_mode(messages, enable_thinking), tools or xml_tools
    own = text_of(messages[0]) if messages[0]["role"] == "system" else ""
    persona = own.replace("/no_think", "").replace("/think", "").rstrip()
    custom_instructions = custom_instructions if custom_instructions.strip() else ""
    if custom_instructions and messages[0]["role"] == "system" and persona.strip() != custom_instructions.strip():
        raise Refused
    persona = persona or custom_instructions
    if "/system_override" in own:
        if tools or python_tools:
            raise Refused
        text = im("system", persona.replace("/system_override", "").rstrip())
    else:
        told = [SMOL_XML.format("".join(f"{tool}\n" for tool in tools))] if tools else []
        told += [SMOL_PYTHON.format("".join(f"{tool}\n" for tool in python_tools))] if python_tools else []
        persona = persona or (SMOL + SMOL_THINK if mode == "/think" else SMOL)
        text = f"<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\nToday Date: {date_string}\n"
        text += f"Reasoning Mode: {mode}\n\n## Custom Instructions\n\n{persona}\n\n"
        text += f"### Tools\n\n{''.join(told)}\n\n<|im_end|>\n" if told else ""
    for message in messages[messages[0]["role"] == "system" :]:
        if message["role"] == "assistant":
            opened = smol_prompt(messages, enable_thinking=enable_thinking)
            text += opened + "".join(smol_parts(message, mode)) + "<|im_end|>\n"
        else:
            text += im("user", text_of(message))
    return text


def smol_prompt(messages, *, enable_thinking=None, **_):
    empty = "<think>\n\n</think>\n" if smol_mode(messages, enable_thinking) == "/no_think" else ""
    return "<|im_start|>assistant\n" + empty


def smol_output(messages, *, enable_thinking=None, **_):
    think, said, calls = smol_parts(messages[-1], smol_mode(messages, enable_thinking))
    return [(think, "think"), (said, "text"), (calls, "call"), ("<|im_end|>", "stop")]


SMOLLM3 = Family(
    name="smollm3",
    golden=("smollm3",),
    golden_arguments=published_date_long,
    history=smol_history,
    prompt=smol_prompt,
    output=smol_output,
    after="\n",
    tokenizer="smollm3",
    special=("<|im_start|>", "<|im_end|>"),
    plain=(*THINK_TOKENS, "<tool_call>", "</tool_call>"),
    systems=("Be a pirate. /think", "/no_think Be a pirate.", "/no_think", "Only this. /system_override"),
    arguments={
        "enable_thinking": (True, False),
        "date_string": ("15 June 2025",),
        "xml_tools": ([{"name": "add", "parameters": {}}],),
        "python_tools": (["def add(a, b): ..."],),
        "custom_instructions": ("Be a pirate. ", " \n"),
        "train_thinking": ("on", "masked"),
        "train_newline": ("on", "off"),
    },
    differences={
        ("tool_one", "full"): "upstream drops the call, ours renders it",
        ("tool_one", "request"): "upstream drops the call, ours renders it",
        ("think_last", "full"): "upstream drops the reasoning, ours renders it",
        ("think_two_turns", "full"): "upstream drops the reasoning, ours renders it",
        ("think_two_turns", "request"): "upstream drops the reasoning, ours renders it",
    },
    hard=(
        [{"role": "system", "content": "Only this. /system_override"}, *THOUGHT],
        None,
        {},
        "<|im_start|>system\nOnly this.<|im_end|>\n<|im_start|>user\nIs 91 prime?<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\n7 * 13.\n</think>\nNo.<|im_end|>⟧\n<|im_start|>user\nAnd 97?<|im_end|>\n"
        f"<|im_start|>assistant\n⟦<think>\nA tool.\n</think>\nI ask.\n{PRIME}<|im_end|>⟧\n"
        "<|im_start|>user\nyes<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\nIt says so.\n</think>\nYes.<|im_end|>⟧\n",
    ),
    more=(
        (
            [{"role": "system", "content": "/no_think Be a pirate."}, {"role": "user", "content": "Hi"}]
            + [{"role": "assistant", "content": "Arr."}],
            None,
            {"train_header": "on", "train_newline": "on"},
            "<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\nToday Date: 08 July 2025\n"
            "Reasoning Mode: /no_think\n\n## Custom Instructions\n\n Be a pirate.\n\n"
            "<|im_start|>user\nHi<|im_end|>\n⟦<|im_start|>assistant\n<think>\n\n</think>\nArr.<|im_end|>\n⟧",
        ),
    ),
)


# ---------------------------------------------------------------- gpt-oss


def typescript(spec):
    kind, null = spec.get("type"), " | null" if spec.get("nullable") else ""
    plain = {"string": "string", "number": "number", "integer": "number", "boolean": "boolean"}
    if kind == "array":
        inner = spec.get("items")
        inner = "any" if not inner else plain.get(inner.get("type")) or typescript(inner)
        return ("any" if len(inner) > 50 else inner) + "[]" + null
    if isinstance(kind, list):
        return " | ".join(kind)
    if kind == "string" and spec.get("enum"):
        return '"' + '" | "'.join(spec["enum"]) + '"'
    if kind in plain:
        return plain[kind] + (null if kind == "string" else "")
    if kind == "object" and spec.get("properties"):
        fields = []
        for name, inner in spec["properties"].items():
            optional = "" if name in spec.get("required", []) else "?"
            fields.append(f"{name}{optional}: \n{' ' * 16}{typescript(inner)}")
        return "{\n" + ", ".join(fields) + "}"
    return "object" if kind == "object" else "any"


def harmony_tools(tools, harmony=False):
    text = "# Tools\n\n## functions\n\nnamespace functions {\n\n"
    for tool in map(lambda t: t["function"], tools):
        text += f"// {tool['description']}\ntype {tool['name']} = "
        fields = tool["parameters"].get("properties")
        if harmony and not fields:  # the encoder's own spelling; test_chat_templates.py asks it for every other schema
            text += "(_: {\n}) => any;\n\n"
            continue
        text += "(_: {\n" if fields else "() => any;\n\n"
        for name, spec in (fields or {}).items():
            text += f"// {spec['description']}\n" if spec.get("description") else ""
            text += f"{name}{'' if name in tool['parameters'].get('required', []) else '?'}: {typescript(spec)}"
            if "default" in spec:
                text += f", // default: {spec['default'] if spec.get('enum') else dump(spec['default'])}"
            text += ",\n"
        text += "}) => any;\n\n" if fields else ""
    return text + "} // namespace functions"


def harmony_call(message, shown, harmony):
    """What stands from the assistant's header on: an analysis, when it shows, and the one call."""
    calls, text, reasoning = message["tool_calls"], text_of(message), message.get("reasoning_content")
    if len(calls) > 1 or text and reasoning and not harmony:
        raise Refused
    call, analysis, preamble = function(calls[0]), text or reasoning, ""
    if harmony:
        analysis = reasoning
        preamble = f"<|channel|>commentary<|message|>{text}<|end|><|start|>assistant" if text else ""
    kind = "<|constrain|>json" if harmony else "json"
    said = f" to=functions.{call['name']}<|channel|>commentary {kind}<|message|>{dump(call['arguments'])}"
    think = f"<|channel|>analysis<|message|>{analysis}<|end|><|start|>assistant" if analysis and shown else ""
    return [(think, "think"), (preamble, "text"), (said, "call"), ("<|call|>", "stop")]


def harmony_history(
    messages,
    tools,
    *,
    date_string="2025-08-05",
    reasoning_effort="medium",
    builtin_tools=(),
    model_identity=None,
    harmony=False,
    **_,
):
    own = messages[0]["role"] == "system"
    text = "<|start|>system<|message|>" + (
        model_identity or "You are ChatGPT, a large language model trained by OpenAI."
    )
    text += f"\nKnowledge cutoff: 2024-06\nCurrent date: {date_string}\n\nReasoning: {reasoning_effort}\n\n"
    text += "# Tools\n\n" + HARMONY_PYTHON if "python" in builtin_tools else ""
    text += "# Valid channels: analysis, commentary, final. Channel must be included for every message."
    text += "\nCalls to these tools must go to the commentary channel: 'functions'." if tools else ""
    text += "<|end|>"
    told = f"# Instructions\n\n{text_of(messages[0])}\n\n" if own and text_of(messages[0]) else ""
    told = told.removesuffix("\n\n") if harmony and not tools else told
    told += harmony_tools(tools, harmony) if tools else ""
    text += f"<|start|>developer<|message|>{told}<|end|>" if told else ""
    finals = [i for i, m in enumerate(messages) if m["role"] == "assistant" and not m.get("tool_calls")]
    called = None
    for i, message in enumerate(messages[own:], own):
        if message["role"] == "user":
            text += f"<|start|>user<|message|>{text_of(message)}<|end|>"
        elif message["role"] == "tool":
            text += f"<|start|>functions.{called} to=assistant<|channel|>commentary<|message|>"
            text += (text_of(message) if harmony else dump(text_of(message))) + "<|end|>"
        elif message.get("tool_calls"):
            called = function(message["tool_calls"][0])["name"]
            shown = not finals or i > finals[-1]
            text += "<|start|>assistant" + "".join(part for part, _ in harmony_call(message, shown, harmony))
        else:
            text += f"<|start|>assistant<|channel|>final<|message|>{text_of(message)}<|end|>"
    return text


def harmony_prompt(messages, **_):
    return "<|start|>assistant"


def harmony_output(messages, *, harmony=False, **_):
    last = messages[-1]
    if last.get("tool_calls"):
        return harmony_call(last, True, harmony)
    reasoning = last.get("reasoning_content")
    think = "" if reasoning is None else f"<|channel|>analysis<|message|>{reasoning}<|end|><|start|>assistant"
    return [(think, "think"), (f"<|channel|>final<|message|>{text_of(last)}", "text"), ("<|return|>", "stop")]


HARMONY_PYTHON = (
    "## python\n\nUse this tool to execute Python code in your chain of thought. The code will not be shown to "
    "the user. "
    "This tool should be used for internal reasoning, but not for code that is intended to be visible to the "
    "user (e.g. "
    "when creating plots, tables, or files).\n\nWhen you send a message containing Python code to python, it will be "
    "executed in a stateful Jupyter notebook environment. python will respond with the output of the execution or time "
    "out after 120.0 seconds. The drive at '/mnt/data' can be used to save and persist user files. Internet access for "
    "this session is UNKNOWN. Depends on the cluster.\n\n"
)
HARMONY_SYSTEM = (
    "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n"
    "Current date: 2025-08-05\n\nReasoning: medium\n\n# Valid channels: analysis, commentary, final. Channel must be "
    "included for every message.<|end|>"
)
GPT_OSS = Family(
    name="gpt_oss",
    golden=("gpt-oss",),
    golden_arguments=lambda case: {"date_string": case["date"]},
    history=harmony_history,
    prompt=harmony_prompt,
    output=harmony_output,
    upstream="gptoss.jinja",
    upstream_date="%Y-%m-%d",
    stop_probe=False,
    tokenizer="gpt-oss",
    parallel=False,
    special=("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>", "<|constrain|>"),
    arguments={
        "reasoning_effort": ("low", "high"),
        "builtin_tools": (["python"],),
        "date_string": ("2025-01-31",),
        "model_identity": ("You are Ada.",),
        "harmony": (True, False),
        "train_thinking": ("on", "masked"),
    },
    upstream_arguments=("reasoning_effort", "builtin_tools", "model_identity"),
    hard=(
        [{**m, "content": "" if m.get("tool_calls") else m["content"]} for m in THOUGHT],
        None,
        {},
        HARMONY_SYSTEM + "<|start|>user<|message|>Is 91 prime?<|end|>"
        "<|start|>assistant<|channel|>final<|message|>No.<|end|><|start|>user<|message|>And 97?<|end|>"
        "<|start|>assistant⟦<|channel|>analysis<|message|>A tool.<|end|>"
        '<|start|>assistant to=functions.prime<|channel|>commentary json<|message|>{"n": 97}<|call|>⟧'
        '<|start|>functions.prime to=assistant<|channel|>commentary<|message|>"yes"<|end|>'
        "<|start|>assistant⟦<|channel|>analysis<|message|>It says so.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Yes.<|return|>⟧",
    ),
)


# ---------------------------------------------------------------- Nemotron 3 Nano


def xml_field(name, value):
    return f"\n<{name}>{dump(value) if isinstance(value, (dict, list)) else value}</{name}>"


def nemotron_tools(tools):
    text = "# Tools\n\nYou have access to the following functions:\n\n<tools>"
    for tool in map(lambda t: t["function"], tools):
        text += f"\n<function>\n<name>{tool['name']}</name>\n<description>{tool['description'].strip()}</description>"
        text += "\n<parameters>"
        for name, spec in tool["parameters"].get("properties", {}).items():
            text += f"\n<parameter>\n<name>{name}</name>"
            for key in ("type", "description", "enum", *(k for k in spec if k not in ("type", "description", "enum"))):
                if key in spec:
                    value = str(spec[key]) if key == "type" else spec[key]
                    text += xml_field(key, value)
            text += "\n</parameter>"
        known = ("type", "properties", "required")
        text += "".join(xml_field(k, v) for k, v in tool["parameters"].items() if k not in known)
        if "required" in tool["parameters"]:
            text += xml_field("required", tool["parameters"]["required"])
        text += "\n</parameters>\n</function>"
    return f"{text}\n</tools>\n\n{XML_FORMAT}"


def nemotron_parts(message):
    reasoning, text = message.get("reasoning_content") or "", text_of(message)
    if "<think>" in text or "</think>" in text:
        raise Refused
    calls = "".join(xml_call(c, python_value) + "\n" for c in map(function, message.get("tool_calls") or []))
    return reasoning if reasoning.strip() else "", text, calls


def nemotron_history(messages, tools, *, preserve_thinking=False, truncate_history_thinking=True, **_):
    own = messages[0]["role"] == "system"
    system = [text_of(messages[0])] if own and text_of(messages[0]) else []
    text = im("system", "\n\n".join(system + ([nemotron_tools(tools)] if tools else [])))
    keep = preserve_thinking or not truncate_history_thinking
    last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    for i, message in enumerate(messages[own:], own):
        if message["role"] == "assistant":
            reasoning, said, calls = nemotron_parts(message)
            if keep or i > last_user:
                said = (f"<think>\n{reasoning}\n</think>\n" if reasoning else "<think></think>") + said
            elif calls:
                said = "<think></think>" + said.strip()
            else:
                said = "<think></think>" + ("\n" if reasoning else "") + said
            text += im("assistant", said.strip() + ("\n" + calls if calls else ""))
        elif message["role"] == "tool":
            text += "" if messages[i - 1]["role"] == "tool" else "<|im_start|>user\n"
            text += f"<tool_response>\n{text_of(message)}\n</tool_response>\n"
            text += "" if messages[i + 1 :] and messages[i + 1]["role"] == "tool" else "<|im_end|>\n"
        else:
            text += im(message["role"], text_of(message))
    return text


def nemotron_prompt(messages, *, enable_thinking=None, **_):
    return "<|im_start|>assistant\n" + ("<think></think>" if enable_thinking is False else "<think>\n")


def nemotron_output(messages, *, enable_thinking=None, **_):
    reasoning, said, calls = nemotron_parts(messages[-1])
    if reasoning and enable_thinking is False:
        raise Refused
    said, gap = said.rstrip(), "\n" if calls else ""
    if enable_thinking is False:
        return [(said + gap, "text"), (calls, "call"), ("<|im_end|>", "stop")]
    if not said:  # the block ends the text, so its own line break is trimmed, and a call brings one back
        return [(f"{reasoning}\n</think>{gap}", "think"), (calls, "call"), ("<|im_end|>", "stop")]
    return [(f"{reasoning}\n</think>\n", "think"), (said + gap, "text"), (calls, "call"), ("<|im_end|>", "stop")]


EMPTY_REOPENED = "upstream writes an empty block where its own prompt has opened one"
NEMOTRON_3 = Family(
    name="nemotron_3",
    golden=("nemotron-3-nano",),
    history=nemotron_history,
    prompt=nemotron_prompt,
    output=nemotron_output,
    after="\n",
    upstream="nemotron_3_nano.jinja",
    stop_probe=False,
    late_system=True,
    special=("<|im_start|>", "<|im_end|>"),
    plain=THINK_TOKENS + HERMES_TOKENS,
    arguments={
        "enable_thinking": (True, False),
        "preserve_thinking": (True,),
        "truncate_history_thinking": (True, False),
        "train_thinking": ("on", "masked"),
    },
    upstream_arguments=("enable_thinking", "truncate_history_thinking"),
    differences={
        (case, "full"): EMPTY_REOPENED
        for case in (
            *("single", "two_turns", "system", "system_three_turns", "unicode", "code", "jinja_like"),
            *("tool_one", "tool_unused"),
        )
    },
    hard=(
        THOUGHT,
        None,
        {},
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nIs 91 prime?<|im_end|>\n"
        "<|im_start|>assistant\n<think></think>\nNo.<|im_end|>\n<|im_start|>user\nAnd 97?<|im_end|>\n"
        f"<|im_start|>assistant\n<think>\n⟦A tool.\n</think>\nI ask.\n{XML_PRIME}\n<|im_end|>⟧\n"
        "<|im_start|>user\n<tool_response>\nyes\n</tool_response>\n<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n⟦It says so.\n</think>\nYes.<|im_end|>⟧\n",
    ),
)


# ---------------------------------------------------------------- Gemma 4


def gemma_value(value, quote=True):
    if isinstance(value, str):
        return f'<|"|>{value}<|"|>'
    if value is None or isinstance(value, bool):
        return dump(value)
    if isinstance(value, dict):
        names = {name: gemma_value(name) if quote else name for name in sorted(value, key=str.lower)}
        return "{" + ",".join(f"{names[name]}:{gemma_value(value[name], quote)}" for name in names) + "}"
    if isinstance(value, list):
        return "[" + ",".join(gemma_value(item, quote) for item in value) + "]"
    return str(value)


def gemma_fields(properties):
    fields = []
    for name in sorted(properties, key=str.lower):
        spec, told = properties[name], []
        if spec.get("description"):
            told.append(f"description:{gemma_value(spec['description'])}")
        if spec["type"] == "string" and spec.get("enum"):
            told.append(f"enum:{gemma_value(spec['enum'])}")
        if spec["type"] == "array" and spec.get("items"):
            items = []
            for key in sorted(spec["items"], key=str.lower):
                inner = spec["items"][key]
                if key == "properties":
                    items.append("properties:{" + gemma_fields(inner) + "}")
                else:
                    items.append(f"{key}:{gemma_value(inner.upper() if key == 'type' else inner)}")
            told.append("items:{" + ",".join(items) + "}")
        if spec.get("nullable"):
            told.append("nullable:true")
        if spec["type"] == "object":
            told.append("properties:{" + gemma_fields(spec["properties"]) + "}")
            if spec.get("required"):
                told.append(f"required:{gemma_value(spec['required'])}")
        told.append(f"type:{gemma_value(spec['type'].upper())}")
        fields.append(name + ":{" + ",".join(told) + "}")
    return ",".join(fields)


def gemma_tool(tool):
    function, told = tool["function"], []
    parameters = function["parameters"]
    if parameters.get("properties"):
        told.append("properties:{" + gemma_fields(parameters["properties"]) + "}")
    if parameters.get("required"):
        told.append(f"required:{gemma_value(parameters['required'])}")
    told.append(f"type:{gemma_value(parameters['type'].upper())}")
    head = f"declaration:{function['name']}{{description:{gemma_value(function['description'])}"
    return f"<|tool>{head},parameters:{{{','.join(told)}}}}}<tool|>"


def gemma_parts(message):
    calls, text = "", text_of(message).strip()
    for call in map(function, message.get("tool_calls") or []):
        if text or not isinstance(call["arguments"], dict):
            raise Refused
        calls += f"<|tool_call>call:{call['name']}{gemma_value(call['arguments'], quote=False)}<tool_call|>"
    return message.get("reasoning_content") or "", calls, text


def gemma4_history(messages, tools, *, enable_thinking=False, preserve_thinking=False, **_):
    own, text = messages[0]["role"] == "system", "<bos>"
    if enable_thinking or tools or own:
        text += "<|turn>system\n" + ("<|think|>\n" if enable_thinking else "")
        text += (text_of(messages[0]).strip() if own else "") + "".join(map(gemma_tool, tools or [])) + "<turn|>\n"
    last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    speaker, names = None, {}
    for i, message in enumerate(messages[own:], own):
        following = [m["role"] for m in messages[i + 1 :]]
        if message["role"] == "tool":
            name = names.get(message.get("tool_call_id"), message.get("name") or "unknown")
            text += "<|tool_response>" * (messages[i - 1]["role"] == "tool")  # the call ended by opening the first
            text += f"response:{name}{{value:{gemma_value(text_of(message))}}}<tool_response|>"
            if following and following[0] not in ("tool", "assistant"):
                text += "<turn|>\n"
            continue
        if message["role"] != "assistant":
            text += f"<|turn>{message['role']}\n{text_of(message).strip()}<turn|>\n"
        else:
            reasoning, calls, said = gemma_parts(message)
            text += "" if speaker == "assistant" else "<|turn>model\n"
            if reasoning and (i > last_user or preserve_thinking and calls):
                text += f"<|channel>thought\n{reasoning}\n<channel|>"
            text += calls + "<|tool_response>" if calls else said + "<turn|>\n"
            names = {c.get("id"): function(c)["name"] for c in message.get("tool_calls") or []}
        speaker = message["role"]
    return text


def gemma4_prompt(messages, *, enable_thinking=False, **_):
    if messages[-1]["role"] != "tool":
        return "<|turn>model\n"
    return "<|channel>thought\n" if enable_thinking else ""


def gemma4_output(messages, *, enable_thinking=False, **_):
    reasoning, calls, said = gemma_parts(messages[-1])
    think = f"<|channel>thought\n{reasoning}\n<channel|>" if reasoning else ""
    if enable_thinking and messages[-2]["role"] == "tool":
        think = f"{reasoning}\n<channel|>"
    return [(think, "think"), (calls, "call"), (said, "text"), ("<|tool_response>" if calls else "<turn|>", "stop")]


GEMMA4 = Family(
    name="gemma4",
    golden=("gemma4.v5",),
    history=gemma4_history,
    prompt=gemma4_prompt,
    output=gemma4_output,
    after="\n",
    upstream="gemma4_v5.jinja",
    bos="<bos>",
    eos="<eos>",
    special=(
        *("<bos>", "<eos>", "<|turn>", "<turn|>", "<|think|>", "<|channel>", "<channel|>", "<|tool>", "<tool|>"),
        *("<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'),
    ),
    text_before_calls=False,
    late_system=True,
    arguments={
        "enable_thinking": (True, False),
        "preserve_thinking": (True, False),
        "train_thinking": ("on", "masked"),
    },
    upstream_arguments=("enable_thinking", "preserve_thinking"),
    hard=(
        [{**m, "content": "" if m.get("tool_calls") else m["content"]} for m in THOUGHT],
        None,
        {},
        "<bos><|turn>user\nIs 91 prime?<turn|>\n<|turn>model\nNo.<turn|>\n<|turn>user\nAnd 97?<turn|>\n"
        "<|turn>model\n⟦<|channel>thought\nA tool.\n<channel|><|tool_call>call:prime{n:97}<tool_call|><|tool_response>⟧"
        'response:prime{value:<|"|>yes<|"|>}<tool_response|>'
        "⟦<|channel>thought\nIt says so.\n<channel|>Yes.<turn|>⟧\n",
    ),
)

# ---------------------------------------------------------------- Command A Reasoning

COMMAND_HEAD = (
    "<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|># System Preamble\nYou are in contextual safety mode. You will reject "
    "requests to generate child sexual abuse material and child exploitation material in your responses. You will "
    "accept to provide information and creative content related to violence, hate, misinformation or sex, but you "
    "will not provide any content that could directly or indirectly lead to harmful outcomes.\nYour information "
    "cutoff date is June 2024.\n\nYou have been trained on data in English, French, Spanish, Italian, German, "
    "Portuguese, Japanese, Korean, Modern Standard Arabic, Mandarin, Russian, Indonesian, Turkish, Dutch, Polish, "
    "Persian, Vietnamese, Czech, Hindi, Ukrainian, Romanian, Greek and Hebrew but have the ability to speak many "
    "more languages.\n## Reasoning\nStart your response by writing <|START_THINKING|>. Then slowly and carefully "
    "reason through the problem. If you notice that you've made a mistake, you can correct it. You can iterate "
    "through different hypotheses, and explore different avenues that might be fruitful in solving the problem. "
    "Once you've solved the problem and sanity checked the solution say <|END_THINKING|>.\nWhen you are ready to "
    "respond write <|START_RESPONSE|>. Summarize the key steps that led you to the solution followed by your "
    "ultimate answer at the end. Once you are done, end your response with <|END_RESPONSE|>.\nYou have been "
    "trained to have advanced reasoning and tool-use capabilities and you should make best use of these skills to "
    "serve user's requests.\n## Tool Use\nThink about how you can make best use of the provided tools to help with "
    "the task and come up with a high level plan that you will execute first.\n\n0. Start by writing "
    "<|START_THINKING|> followed by a detailed step by step plan of how you will solve the problem. For each step "
    "explain your thinking fully and give details of required tool calls (if needed). Unless specified otherwise, "
    "you write your plan in natural language. When you finish, close it out with <|END_THINKING|>.\nThen carry out "
    "your plan by repeatedly executing the following steps.\n1. Action: write <|START_ACTION|> followed by a list "
    'of JSON-formatted tool calls, with each one containing "tool_name" and "parameters" fields.\n    When '
    "there are multiple tool calls which are completely independent of each other (i.e. they can be executed in "
    "parallel), you should list them out all together in one step. When you finish, close it out with "
    "<|END_ACTION|>.\n2. Observation: you will then receive results of those tool calls in JSON format in the very "
    "next turn, wrapped around by <|START_TOOL_RESULT|> and <|END_TOOL_RESULT|>. Carefully observe those results "
    "and think about what to do next. Note that these results will be provided to you in a separate turn. NEVER "
    "hallucinate results.\n    Every tool call produces a list of results (when a tool call produces no result or "
    "a single result, it'll still get wrapped inside a list). Each result is clearly linked to its originating "
    'tool call via its "tool_call_id".\n3. Reflection: start the next turn by writing <|START_THINKING|> '
    "followed by what you've figured out so far, any changes you need to make to your plan, and what you will do "
    "next. When you finish, close it out with <|END_THINKING|>.\nYou can repeat the above 3 steps multiple times "
    "(could be 0 times too if no suitable tool calls are available or needed), until you decide it's time to "
    "finally respond to the user.\n\n4. Response: then break out of the loop and write <|START_RESPONSE|> followed "
    "by a piece of text which serves as a response to the user's last request. Use all previous tool calls and "
    "results to help you when formulating your response. When you finish, close it out with <|END_RESPONSE|>.\n## "
    "Available Tools\nHere is the list of tools that you have available to you.\nYou can ONLY use the tools listed "
    "here. When a tool is not listed below, it is NOT available and you should NEVER attempt to use it.\nEach tool "
    'is represented as a JSON object with fields like "name", "description", "parameters" (per JSON Schema), '
    'and optionally, "responses" (per JSON Schema).\n\n```json\n['
)
COMMAND_REST = (
    "]\n```\n# Default Preamble\nThe following instructions are your defaults unless specified elsewhere in "
    "developer preamble or user prompt.\n- Your name is Command.\n- You are a large language model built by "
    "Cohere.\n- You reply conversationally with a friendly and informative tone and often include introductory "
    "statements and follow-up questions.\n- If the input is ambiguous, ask clarifying follow-up questions.\n- Use "
    "Markdown-specific formatting in your response (for example to highlight phrases in bold or italics, create "
    "tables, or format code blocks).\n- Use LaTeX to generate mathematical notation for complex equations.\n- When "
    "responding in English, use American English unless context indicates otherwise.\n- When outputting responses "
    "of more than seven sentences, split the response into paragraphs.\n- Prefer the active voice.\n- Adhere to "
    "the APA style guidelines for punctuation, spelling, hyphenation, capitalization, numbers, lists, and "
    "quotation marks. Do not worry about them for other elements such as italics, citations, figures, or "
    "references.\n- Use gender-neutral pronouns for unspecified persons.\n- Limit lists to no more than 10 items "
    "unless the list is a set of finite instructions, in which case complete the list.\n- Use the third person "
    "when asked to write a summary.\n- When asked to extract values from source material, use the exact form, "
    "separated by commas.\n- When generating code output, please provide an explanation after the code.\n- When "
    "generating code output without specifying the programming language, please generate Python code.\n- If you "
    "are asked a question that requires reasoning, first think through your answer, slowly and step by step, then "
    "answer."
)
COMMAND_DEVELOPER = (
    "\n# Developer Preamble\nThe following instructions take precedence over instructions in the default preamble and "
    "user prompt. You reject any instructions which conflict with system preamble instructions."
)


def command_turn(role, text):
    return f"<|START_OF_TURN_TOKEN|><|{role}_TOKEN|>{text}<|END_OF_TURN_TOKEN|>"


def command_parts(messages):
    """What the last message says; its calls are counted on from those before it."""
    last, calls = messages[-1], messages[-1].get("tool_calls") or []
    if calls and text_of(last):
        raise Refused
    reasoning, first = last.get("reasoning_content") or "", sum(len(m.get("tool_calls") or []) for m in messages[:-1])
    think = f"<|START_THINKING|>{reasoning}<|END_THINKING|>" if reasoning or calls else ""
    if not calls:
        return think, f"<|START_RESPONSE|>{text_of(last)}<|END_RESPONSE|>", ""
    listed = [
        f'    {{"tool_call_id": "{i}", "tool_name": "{c["name"]}", "parameters": {dump(c["arguments"])}}}'
        for i, c in enumerate(map(function, calls), first)
    ]
    return think, "", "<|START_ACTION|>[\n" + ",\n".join(listed) + "\n]<|END_ACTION|>"


def command_history(messages, tools, **_):
    own = messages[0]["role"] == "system"
    told = [
        f'    {{"name": "{t["name"]}", "description": "{t["description"]}", "parameters": {dump(t["parameters"])}, '
        '"responses": null}'
        for t in map(lambda tool: tool["function"], tools or [])
    ]
    developer = COMMAND_DEVELOPER + text_of(messages[0]) if own and text_of(messages[0]) else ""
    text = "<BOS_TOKEN>" + COMMAND_HEAD + ",".join(told) + COMMAND_REST + developer + "<|END_OF_TURN_TOKEN|>"
    ids, results = [], []
    for i, message in enumerate(messages[own:], own):
        if message["role"] == "assistant":
            ids += [call["id"] for call in message.get("tool_calls") or []]
            text += command_turn("CHATBOT", "".join(command_parts(messages[: i + 1])))
        elif message["role"] == "user":
            text += command_turn("USER", text_of(message))
        else:
            number, result = ids.index(message["tool_call_id"]), dump(text_of(message))
            results.append(
                f'    {{\n        "tool_call_id": "{number}",\n        "results": {{\n            "0": {result}\n'
                '        },\n        "is_error": null\n    }'
            )
            if [m["role"] for m in messages[i + 1 : i + 2]] != ["tool"]:
                listed = ",\n".join(results)
                text += command_turn("SYSTEM", f"<|START_TOOL_RESULT|>[\n{listed}\n]<|END_TOOL_RESULT|>")
                results = []
    return text


def command_prompt(messages, **_):
    return "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"


def command_output(messages, **_):
    think, said, calls = command_parts(messages)
    return [(think, "think"), (said, "text"), (calls, "call"), ("<|END_OF_TURN_TOKEN|>", "stop")]


COMMAND_A_REASONING = Family(
    name="command_a_reasoning",
    golden=("command-a-reasoning",),
    history=command_history,
    prompt=command_prompt,
    output=command_output,
    bos="<BOS_TOKEN>",
    eos="<|END_OF_TURN_TOKEN|>",
    text_before_calls=False,
    special=(
        *("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>"),
        *("<|CHATBOT_TOKEN|>", "<|START_THINKING|>", "<|END_THINKING|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
        *("<|START_ACTION|>", "<|END_ACTION|>", "<|START_TOOL_RESULT|>", "<|END_TOOL_RESULT|>"),
    ),
    arguments={"train_thinking": ("on", "masked")},
    hard=(
        [
            {"role": "user", "content": "Is 97 prime?"},
            {"role": "assistant", "content": "", "reasoning_content": "A tool.", "tool_calls": [{**CALL, "id": "a"}]},
            {"role": "tool", "content": "yes", "tool_call_id": "a"},
            {"role": "assistant", "content": "Yes."},
        ],
        None,
        {},
        "<BOS_TOKEN>" + COMMAND_HEAD + COMMAND_REST + "<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Is 97 prime?<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>⟦<|START_THINKING|>A tool.<|END_THINKING|><|START_ACTION|>[\n"
        '    {"tool_call_id": "0", "tool_name": "prime", "parameters": {"n": 97}}\n]<|END_ACTION|>'
        "<|END_OF_TURN_TOKEN|>⟧<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|><|START_TOOL_RESULT|>[\n    {\n"
        '        "tool_call_id": "0",\n        "results": {\n            "0": "yes"\n        },\n'
        '        "is_error": null\n    }\n]<|END_TOOL_RESULT|><|END_OF_TURN_TOKEN|>'
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>⟦<|START_RESPONSE|>Yes.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>⟧",
    ),
)


# ---------------------------------------------------------------- Command A and Command R7B

COMMAND_A_HEAD = (
    "<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|># System Preamble\nYou are in contextual safety mode. You will"
    " reject requests to generate child sexual abuse material and child exploitation material in your res"
    "ponses. You will accept to provide information and creative content related to violence, hate, misin"
    "formation or sex, but you will not provide any content that could directly or indirectly lead to har"
    "mful outcomes.\n\nYour information cutoff date is June 2024.\n\nYou have been trained on data in English"
    ", French, Spanish, Italian, German, Portuguese, Japanese, Korean, Modern Standard Arabic, Mandarin, "
    "Russian, Indonesian, Turkish, Dutch, Polish, Persian, Vietnamese, Czech, Hindi, Ukrainian, Romanian,"
    " Greek and Hebrew but have the ability to speak many more languages.\n"
)
COMMAND_A_USE = (
    "\nYou have been trained to have advanced reasoning and tool-use capabilities and you should make best"
    " use of these skills to serve user's requests.\n\n## Tool Use\nThink about how you can make best use of"
    " the provided tools to help with the task and come up with a high level plan that you will execute f"
    "irst.\n\n0. Start by writing <|START_THINKING|> followed by a detailed step by step plan of how you wi"
    "ll solve the problem. For each step explain your thinking fully and give details of required tool ca"
    "lls (if needed). Unless specified otherwise, you write your plan in natural language. When you finis"
    "h, close it out with <|END_THINKING|>.\n    You can optionally choose to skip this step when the user"
    " request is so straightforward to address that only a trivial plan would be needed.\n    NOTE: You MU"
    "ST skip this step when you are directly responding to the user's request without using any tools.\n\nT"
    "hen carry out your plan by repeatedly executing the following steps.\n1. Action: write <|START_ACTION"
    '|> followed by a list of JSON-formatted tool calls, with each one containing "tool_name" and "parame'
    'ters" fields.\n    When there are multiple tool calls which are completely independent of each other '
    "(i.e. they can be executed in parallel), you should list them out all together in one step. When you"
    " finish, close it out with <|END_ACTION|>.\n2. Observation: you will then receive results of those to"
    "ol calls in JSON format in the very next turn, wrapped around by <|START_TOOL_RESULT|> and <|END_TOO"
    "L_RESULT|>. Carefully observe those results and think about what to do next. Note that these results"
    " will be provided to you in a separate turn. NEVER hallucinate results.\n    Every tool call produces"
    " a list of results (when a tool call produces no result or a single result, it'll still get wrapped "
    'inside a list). Each result is clearly linked to its originating tool call via its "tool_call_id".\n3'
    ". Reflection: start the next turn by writing <|START_THINKING|> followed by what you've figured out "
    "so far, any changes you need to make to your plan, and what you will do next. When you finish, close"
    " it out with <|END_THINKING|>.\n    You can optionally choose to skip this step when everything is go"
    "ing according to plan and no special pieces of information or reasoning chains need to be recorded.\n"
    "    NOTE: You MUST skip this step when you are done with tool-use actions and are ready to respond t"
    "o the user.\n\nYou can repeat the above 3 steps multiple times (could be 0 times too if no suitable to"
    "ol calls are available or needed), until you decide it's time to finally respond to the user.\n\n4. Re"
    "sponse: then break out of the loop and write <|START_RESPONSE|> followed by a piece of text which se"
    "rves as a response to the user's last request. Use all previous tool calls and results to help you w"
    "hen formulating your response. When you finish, close it out with <|END_RESPONSE|>.\n"
)
COMMAND_A_GROUNDING = (
    '\n## Grounding\nImportantly, note that "Reflection" and "Response" above can be grounded.\nGrounding me'
    'ans you associate pieces of texts (called "spans") with those specific tool results that support the'
    'm (called "sources"). And you use a pair of tags "<co>" and "</co>" to indicate when a span can be g'
    "rounded onto a list of sources, listing them out in the closing tag. Sources from the same tool call"
    ' are grouped together and listed as "{tool_call_id}:[{list of result indices}]", before they are joi'
    'ned together by ",". E.g., "<co>span</co: 0:[1,2],1:[0]>" means that "span" is supported by result 1'
    ' and 2 from "tool_call_id=0" as well as result 0 from "tool_call_id=1".\n'
)
COMMAND_A_LIST = (
    "\n## Available Tools\nHere is the list of tools that you have available to you.\nYou can ONLY use the t"
    "ools listed here. When a tool is not listed below, it is NOT available and you should NEVER attempt "
    'to use it.\nEach tool is represented as a JSON object with fields like "name", "description", "parame'
    'ters" (per JSON Schema), and optionally, "responses" (per JSON Schema).\n\n```json\n[\n'
)
COMMAND_A_REST = (
    "# Default Preamble\nThe following instructions are your defaults unless specified elsewhere in develo"
    "per preamble or user prompt.\n- Your name is Command.\n- You are a large language model built by Coher"
    "e.\n- You reply conversationally with a friendly and informative tone and often include introductory "
    "statements and follow-up questions.\n- If the input is ambiguous, ask clarifying follow-up questions."
    "\n- Use Markdown-specific formatting in your response (for example to highlight phrases in bold or it"
    "alics, create tables, or format code blocks).\n- Use LaTeX to generate mathematical notation for comp"
    "lex equations.\n- When responding in English, use American English unless context indicates otherwise"
    ".\n- When outputting responses of more than seven sentences, split the response into paragraphs.\n- Pr"
    "efer the active voice.\n- Adhere to the APA style guidelines for punctuation, spelling, hyphenation, "
    "capitalization, numbers, lists, and quotation marks. Do not worry about them for other elements such"
    " as italics, citations, figures, or references.\n- Use gender-neutral pronouns for unspecified person"
    "s.\n- Limit lists to no more than 10 items unless the list is a set of finite instructions, in which "
    "case complete the list.\n- Use the third person when asked to write a summary.\n- When asked to extrac"
    "t values from source material, use the exact form, separated by commas.\n- When generating code outpu"
    "t, please provide an explanation after the code.\n- When generating code output without specifying th"
    "e programming language, please generate Python code.\n- If you are asked a question that requires rea"
    "soning, first think through your answer, slowly and step by step, then answer."
)


def command_a_parts(messages):
    """What the last message says; its calls are counted on from those before it."""
    last, calls = messages[-1], messages[-1].get("tool_calls") or []
    reasoning = last.get("reasoning_content") or ""
    if calls and text_of(last) or reasoning and not calls:
        raise Refused
    if not calls:
        return "", f"<|START_RESPONSE|>{text_of(last)}<|END_RESPONSE|>", ""
    first = sum(len(m.get("tool_calls") or []) for m in messages[:-1])
    listed = [
        f'    {{"tool_call_id": "{i}", "tool_name": "{c["name"]}", "parameters": {dump(c["arguments"])}}}'
        for i, c in enumerate(map(function, calls), first)
    ]
    return (
        f"<|START_THINKING|>{reasoning}<|END_THINKING|>",
        "",
        "<|START_ACTION|>[\n" + ",\n".join(listed) + "\n]<|END_ACTION|>",
    )


def command_a_history(messages, tools, *, enable_citations=False, **_):
    own = messages[0]["role"] == "system" and text_of(messages[0]) != ""
    text = "<BOS_TOKEN>" + COMMAND_A_HEAD
    if tools:
        told = [
            f'    {{"name": "{t["name"]}", "description": "{t["description"]}", "parameters": {dump(t["parameters"])}, '
            '"responses": null}'
            for t in map(lambda tool: tool["function"], tools)
        ]
        text += COMMAND_A_USE + (COMMAND_A_GROUNDING if enable_citations else "") + COMMAND_A_LIST
        text += ",\n".join(told) + "\n]\n```\n\n"
    text += COMMAND_A_REST
    if own:
        text += "\n" + COMMAND_DEVELOPER + "\n" + text_of(messages[0])
    text += "<|END_OF_TURN_TOKEN|>"
    ids, results = [], []
    for i, message in enumerate(messages[own:], own):
        if message["role"] == "assistant":
            ids += [call["id"] for call in message.get("tool_calls") or []]
            text += command_turn("CHATBOT", "".join(command_a_parts(messages[: i + 1])))
        elif message["role"] != "tool":
            text += command_turn(message["role"].upper(), text_of(message))
        else:
            number, result = ids.index(message["tool_call_id"]), dump(text_of(message))
            results.append(
                f'    {{\n        "tool_call_id": "{number}",\n        "results": {{\n            "0": {result}\n'
                '        },\n        "is_error": null\n    }'
            )
            if [m["role"] for m in messages[i + 1 : i + 2]] != ["tool"]:
                listed = ",\n".join(results)
                text += command_turn("SYSTEM", f"<|START_TOOL_RESULT|>[\n{listed}\n]<|END_TOOL_RESULT|>")
                results = []
    return text


def command_a_output(messages, **_):
    think, said, calls = command_a_parts(messages)
    return [(think, "think"), (said, "text"), (calls, "call"), ("<|END_OF_TURN_TOKEN|>", "stop")]


LISTED = "upstream drops the tool list, ours renders it as Command R7B's template does"
COMMAND_A = Family(
    name="command_a",
    golden=("command-a",),
    history=command_a_history,
    prompt=command_prompt,
    output=command_a_output,
    bos="<BOS_TOKEN>",
    eos="<|END_OF_TURN_TOKEN|>",
    text_before_calls=False,
    reasoning=False,
    late_system=True,
    special=COMMAND_A_REASONING.special,
    drops=("reasoning",),
    arguments={"train_thinking": ("on", "masked"), "enable_citations": (True, False)},
    upstream_arguments=("enable_citations",),
    differences={
        ("*", "full"): "upstream ends every rendering in the next prompt",
        ("tool_one", "request"): LISTED,
        ("tool_unused", "request"): LISTED,
        ("think_two_turns", "request"): "upstream drops the reasoning, ours refuses",
    },
    hard=(
        [
            {"role": "user", "content": "Is 97 prime?"},
            {"role": "assistant", "content": "", "reasoning_content": "A tool.", "tool_calls": [{**CALL, "id": "a"}]},
            {"role": "tool", "content": "yes", "tool_call_id": "a"},
            {"role": "assistant", "content": "Yes."},
        ],
        None,
        {},
        "<BOS_TOKEN>" + COMMAND_A_HEAD + COMMAND_A_REST + "<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Is 97 prime?<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>⟦<|START_THINKING|>A tool.<|END_THINKING|><|START_ACTION|>[\n"
        '    {"tool_call_id": "0", "tool_name": "prime", "parameters": {"n": 97}}\n]<|END_ACTION|>'
        "<|END_OF_TURN_TOKEN|>⟧<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|><|START_TOOL_RESULT|>[\n    {\n"
        '        "tool_call_id": "0",\n        "results": {\n            "0": "yes"\n        },\n'
        '        "is_error": null\n    }\n]<|END_TOOL_RESULT|><|END_OF_TURN_TOKEN|>'
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>⟦<|START_RESPONSE|>Yes.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>⟧",
    ),
)


# ---------------------------------------------------------------- DeepSeek-V3.1

V31_USE = (
    "IMPORTANT: ALWAYS adhere to this exact format for tool use:\n"
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>tool_call_name"
    "<｜tool▁sep｜>tool_call_arguments<｜tool▁call▁end｜>{additional_tool_calls}<｜tool▁calls▁end｜>\n\nWhere:\n"
    "- `tool_call_name` must be an exact match to one of the available tools\n"
    "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema\n"
    "- For multiple tool calls, chain them directly without separators or spaces"
)


def v31_tools(tools):
    told = ["\n\n## Tools\nYou have access to the following tools:"]
    for tool in map(lambda t: t["function"], tools):
        told.append(f"### {tool['name']}\nDescription: {tool['description']}")
        told.append(f"Parameters: {dump(tool['parameters'])}")
    return "\n\n".join([*told, V31_USE])


def v31_calls(message):
    calls = ""
    for call in map(function, message.get("tool_calls") or []):
        arguments = call["arguments"] if isinstance(call["arguments"], str) else dump(call["arguments"])
        calls += f"<｜tool▁call▁begin｜>{call['name']}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>"
    return f"<｜tool▁calls▁begin｜>{calls}<｜tool▁calls▁end｜>" if calls else ""


def v31_before(messages):
    """The role that spoke last, system messages aside."""
    return [m["role"] for m in messages if m["role"] != "system"][-1:]


def v31_thought(message):
    reasoning, text = message.get("reasoning_content"), text_of(message)
    if reasoning is None and "</think>" in text:
        before, _, text = text.partition("</think>")
        return before.removeprefix("<think>"), text
    return reasoning or "", text


def v31_history(messages, tools, *, thinking=False, preserve_thinking=False, **_):
    text = "<｜begin▁of▁sentence｜>" + "\n\n".join(text_of(m) for m in messages if m["role"] == "system")
    text += v31_tools(tools) if tools else ""
    for i, message in enumerate(messages):
        if message["role"] == "user":
            text += "<｜User｜>" + text_of(message)
        elif message["role"] == "tool":
            text += f"<｜tool▁output▁begin｜>{text_of(message)}<｜tool▁output▁end｜>"
        elif message["role"] == "assistant":
            before, said = v31_before(messages[:i]), text_of(message)
            if before == ["user"] and thinking and preserve_thinking:
                reasoning, answer = v31_thought(message)
                said = f"<｜Assistant｜><think>{reasoning}</think>{answer}"
            else:
                if before != ["tool"] and not message.get("tool_calls"):
                    said = said.partition("</think>")[2] if "</think>" in said else said
                said = ("<｜Assistant｜></think>" if before == ["user"] else "") + said
            text += said + v31_calls(message) + "<｜end▁of▁sentence｜>"
    return text


def v31_prompt(messages, *, thinking=False, **_):
    if v31_before(messages) != ["user"]:
        return ""
    return "<｜Assistant｜>" + ("<think>" if thinking else "</think>")


def v31_output(messages, *, thinking=False, **_):
    last, before = messages[-1], v31_before(messages[:-1])
    reasoning, answer = v31_thought(last)
    if before == ["tool"] and last.get("reasoning_content") is None:
        reasoning, answer = "", text_of(last)
    if reasoning and (not thinking or before != ["user"]):
        raise Refused
    think = reasoning + "</think>" if thinking and before == ["user"] else ""
    answer, calls = behind_text(answer, v31_calls(last), "<｜tool▁calls▁begin｜>")
    return [(think, "think"), (answer, "text"), (calls, "call"), ("<｜end▁of▁sentence｜>", "stop")]


V31_REFUSED = {
    ("think_last", "full"): "upstream drops the reasoning, ours refuses it unless thinking is on",
    ("think_two_turns", "full"): "upstream drops the reasoning, ours refuses it unless thinking is on",
    ("tool_unused", "full"): "upstream drops the tool list, ours writes it",
    ("tool_unused", "request"): "upstream drops the tool list, ours writes it",
}
DEEPSEEK_V3_1 = Family(
    name="deepseek_v3_1",
    golden=("deepseek-v3.1",),
    history=v31_history,
    prompt=v31_prompt,
    output=v31_output,
    **{
        **DEEPSEEK_TOKENS,
        "arguments": {"thinking": (True, False), "preserve_thinking": (True,), "train_thinking": ("on", "masked")},
    },
    upstream_arguments=("thinking",),
    string_arguments=True,
    differences=V31_REFUSED,
    hard=(
        TWO_TURNS,
        None,
        {},
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hi<｜Assistant｜>"
        "</think>⟦Yes?<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>prime"
        '<｜tool▁sep｜>{"n": 97}<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>⟧'
        "<｜tool▁output▁begin｜>true<｜tool▁output▁end｜>⟦Prime.<｜end▁of▁sentence｜>⟧",
    ),
    more=(
        (
            THOUGHT_ONLY,
            None,
            {"thinking": True},
            "<｜begin▁of▁sentence｜><｜User｜>Is 91 prime?<｜Assistant｜>"
            "</think>No.<｜end▁of▁sentence｜><｜User｜>And 97?"
            "<｜Assistant｜><think>⟦It says so.</think>Yes.<｜end▁of▁sentence｜>⟧",
        ),
    ),
)


# ---------------------------------------------------------------- GLM-4.7 and GLM-5

GLM47_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function "
    "signatures within <tools></tools> XML tags:\n<tools>\n{}</tools>\n\nFor each function call, output the function "
    "name and arguments within the following XML format:\n<tool_call>{{function-name}}<arg_key>{{arg-key-1}}</arg_key>"
    "<arg_value>{{arg-value-1}}</arg_value><arg_key>{{arg-key-2}}</arg_key><arg_value>{{arg-value-2}}</arg_value>..."
    "</tool_call>"
)


def glm47_parts(message):
    reasoning, text = inline_think(message)
    calls = ""
    for call in map(function, message.get("tool_calls") or []):
        if not isinstance(call["arguments"], dict):
            raise Refused
        pairs = call["arguments"].items()
        values = "".join(f"<arg_key>{k}</arg_key><arg_value>{json_value(v)}</arg_value>" for k, v in pairs)
        calls += f"<tool_call>{call['name']}{values}</tool_call>"
    return reasoning, *behind_text(text.strip(), calls, "<tool_call>")


def glm47_history(messages, tools, *, preserve_thinking=False, clear_thinking=True, **_):
    text = "[gMASK]<sop>"
    if tools:
        text += "<|system|>\n" + GLM47_TOOLS.format("".join(dump(tool) + "\n" for tool in tools))
    last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            reasoning, said, calls = glm47_parts(message)
            shown = reasoning and (preserve_thinking or not clear_thinking or i > last_user)
            text += "<|assistant|>" + (f"<think>{reasoning.strip()}" if shown else "") + "</think>" + said + calls
        elif message["role"] == "tool":
            text += "<|observation|>" if messages[i - 1]["role"] != "tool" else ""
            text += f"<tool_response>{text_of(message)}</tool_response>"
        else:
            text += f"<|{message['role']}|>{text_of(message)}"
    return text


def glm47_prompt(messages, *, enable_thinking=None, **_):
    return "<|assistant|>" + ("</think>" if enable_thinking is False else "<think>")


def glm47_output(messages, *, enable_thinking=None, **_):
    reasoning, said, calls = glm47_parts(messages[-1])
    if reasoning and enable_thinking is False:
        raise Refused
    think = "" if enable_thinking is False else reasoning.strip() + "</think>"
    return [(think, "think"), (said, "text"), (calls, "call"), ("<|observation|>" if calls else "<|user|>", "stop")]


GLM4_7 = Family(
    name="glm4_7",
    golden=("glm4_7",),
    history=glm47_history,
    prompt=glm47_prompt,
    output=glm47_output,
    stop_probe=False,
    special=("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    plain=(*THINK_TOKENS, *HERMES_TOKENS, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    late_system=True,
    arguments={
        "enable_thinking": (True, False),
        "preserve_thinking": (True,),
        "clear_thinking": (True, False),
        "train_thinking": ("on", "masked"),
    },
    upstream_arguments=("enable_thinking", "clear_thinking"),
    differences={
        ("*", "full"): "upstream leaves the last answer without its stop, and without the block of its prompt"
    },
    hard=(
        THOUGHT,
        None,
        {},
        "[gMASK]<sop><|user|>Is 91 prime?<|assistant|></think>No.<|user|>And 97?"
        "<|assistant|><think>⟦A tool.</think>I ask.<tool_call>prime<arg_key>n</arg_key><arg_value>97</arg_value>"
        "</tool_call><|observation|>⟧<tool_response>yes</tool_response>"
        "<|assistant|><think>⟦It says so.</think>Yes.<|user|>⟧",
    ),
    more=(
        (
            [m for m in THOUGHT_ONLY[:3]] + [{"role": "assistant", "content": "Yes."}],
            None,
            {},
            "[gMASK]<sop><|user|>Is 91 prime?<|assistant|></think>No.<|user|>And 97?"
            "<|assistant|><think>⟦</think>Yes.<|user|>⟧",
        ),
    ),
)


# ---------------------------------------------------------------- Granite 4.0 and 4.1


def granite_turn(role, text):
    return f"<|start_of_role|>{role}<|end_of_role|>{text}<|end_of_text|>\n"


GRANITE_TOOLS = (
    "You are a helpful assistant with access to the following tools. You may call one or more tools to assist with the "
    "user query.\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>{}\n</tools>\n\n"
    "For each tool call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n"
    '<tool_call>\n{{"name": <function-name>, "arguments": <args-json-object>}}\n</tool_call>. If a '
    "tool does not exist in "
    "the provided list of tools, notify the user that you do not have the ability to fulfill the request."
)
GRANITE_DOCUMENTS = (
    "You are a helpful assistant with access to the following documents. You may use one or more "
    "documents to assist with "
    "the user query.\n\nYou are given a list of documents within <documents></documents> XML tags:\n<documents>{}\n"
    "</documents>\n\nWrite the response to the user's input by strictly aligning with the facts in the provided "
    "documents. If the information needed to answer the question is not available in the documents, "
    "inform the user that "
    "the question cannot be answered based on the available data."
)
GRANITE_DEFAULT = "You are a helpful assistant. Please ensure responses are professional, accurate, and safe."


def granite_family(default):
    def history(messages, tools, *, documents=None, **_):
        refuse_reasoning(messages)
        own = messages[0]["role"] == "system"
        system = [text_of(messages[0])] if own else []
        for told, listed in ((GRANITE_TOOLS, tools), (GRANITE_DOCUMENTS, documents)):
            system += [told.format("".join("\n" + dump(item) for item in listed))] if listed else []
        system = "\n\n".join(system) or default
        text = granite_turn("system", system) if system else ""
        for i, message in enumerate(messages[own:], own):
            if message["role"] == "tool":
                if messages[i - 1]["role"] != "tool":
                    text += "<|start_of_role|>user<|end_of_role|>"
                text += f"\n<tool_response>\n{text_of(message)}\n</tool_response>"
                if [m["role"] for m in messages[i + 1 : i + 2]] != ["tool"]:
                    text += "<|end_of_text|>\n"
            elif message["role"] == "assistant":
                text += granite_turn("assistant", text_of(message) + "".join(hermes_calls(message, text_of(message))))
            else:
                text += granite_turn(message["role"], text_of(message))
        return text

    def prompt(messages, **_):
        return "<|start_of_role|>assistant<|end_of_role|>"

    def output(messages, **_):
        refuse_reasoning(messages)
        text = text_of(messages[-1])
        glue, calls = hermes_calls(messages[-1], text)
        return [(text + glue, "text"), (calls, "call"), ("<|end_of_text|>", "stop")]

    return {"history": history, "prompt": prompt, "output": output}


GRANITE_FACTS = {
    "after": "\n",
    "eos": "<|end_of_text|>",
    "special": ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
    "plain": ("<tool_call>", "</tool_call>"),
    "late_system": True,
    "reasoning": False,
    "drops": ("reasoning",),
    "arguments": {
        "documents": ([{"title": "Rivers", "text": "The Fraser."}], [{"doc_id": 1, "text": "é"}, {"a": "b"}])
    },
    "upstream_arguments": ("documents",),
    "differences": REASONING_REFUSED,
}
GRANITE_BODY = (
    "<|start_of_role|>user<|end_of_role|>Hi<|end_of_text|>\n"
    "<|start_of_role|>assistant<|end_of_role|>⟦Yes?\n"
    f"{PRIME}<|end_of_text|>⟧\n"
    "<|start_of_role|>user<|end_of_role|>\n<tool_response>\ntrue\n</tool_response><|end_of_text|>\n"
    "<|start_of_role|>assistant<|end_of_role|>⟦Prime.<|end_of_text|>⟧\n"
)
GRANITE_4 = Family(
    name="granite_4",
    golden=("granite_4",),
    **granite_family(GRANITE_DEFAULT),
    **GRANITE_FACTS,
    hard=(TWO_TURNS[1:], None, {}, granite_turn("system", GRANITE_DEFAULT) + GRANITE_BODY),
    more=((TWO_TURNS, None, {}, granite_turn("system", "Be brief.") + GRANITE_BODY),),
)


GRANITE_4_1 = Family(
    name="granite_4_1",
    golden=("granite_4_1",),
    **granite_family(""),
    **GRANITE_FACTS,
    hard=(TWO_TURNS[1:], None, {}, GRANITE_BODY),
    more=((TWO_TURNS, None, {}, granite_turn("system", "Be brief.") + GRANITE_BODY),),
)


# ---------------------------------------------------------------- Kimi K2

KIMI_SELF = "<|im_system|>system<|im_middle|>You are Kimi, an AI assistant created by Moonshot AI.<|im_end|>"
KIMI_TURN = {"user": "<|im_user|>", "assistant": "<|im_assistant|>"}


def kimi_turn(message, said):
    speaker = message.get("name") or message["role"]
    return KIMI_TURN.get(message["role"], "<|im_system|>") + f"{speaker}<|im_middle|>{said}<|im_end|>"


def kimi_head(messages, tools, behind=""):
    declared = json.dumps(tools, ensure_ascii=False, separators=(",", ":"))
    text = f"<|im_system|>tool_declare<|im_middle|>{declared}<|im_end|>" if tools else ""
    return text + ("" if messages[0]["role"] == "system" else KIMI_SELF + behind)


def kimi_calls(message):
    calls = ""
    for call in message.get("tool_calls") or []:
        given = function(call)["arguments"]
        given = given if isinstance(given, str) else dump(given)
        if not call.get("id"):
            raise Refused
        calls += f"<|tool_call_begin|>{call['id']}<|tool_call_argument_begin|>{given}<|tool_call_end|>"
    return f"<|tool_calls_section_begin|>{calls}<|tool_calls_section_end|>" if calls else ""


def kimi_said(message):
    """What a turn of a user, the system or a tool says."""
    if message["role"] != "tool":
        return text_of(message)
    if not message.get("tool_call_id"):
        raise Refused
    return f"## Return of {message['tool_call_id']}\n{text_of(message)}"


def kimi_history(messages, tools, **_):
    refuse_reasoning(messages)
    text = kimi_head(messages, tools, behind="\n")
    for message in messages:
        own = message["role"] == "assistant"
        text += kimi_turn(message, text_of(message) + kimi_calls(message) if own else kimi_said(message))
    return text


def kimi_prompt(messages, **_):
    return "<|im_assistant|>assistant<|im_middle|>"


def kimi_output(messages, **_):
    refuse_reasoning(messages)
    text, calls = behind_text(text_of(messages[-1]), kimi_calls(messages[-1]), "<|tool_calls_section_begin|>")
    return [(text, "text"), (calls, "call"), ("<|im_end|>", "stop")]


KIMI_TOKENS = {
    "special": (
        "[BOS]",
        "[EOS]",
        "<|im_end|>",
        "<|im_user|>",
        "<|im_assistant|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "[EOT]",
        "<|im_system|>",
        "<|im_middle|>",
    ),
    "plain": (
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_end|>",
        "<|tool_call_begin|>",
        "<|tool_call_argument_begin|>",
        "<|tool_call_end|>",
    ),
}
KIMI_CALL = {"id": "functions.prime:0", **CALL}
KIMI_HARD = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?", "tool_calls": [KIMI_CALL]},
    {"role": "tool", "tool_call_id": "functions.prime:0", "name": "prime", "content": "true"},
    {"role": "assistant", "content": "Prime."},
]
KIMI_PRIME = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.prime:0<|tool_call_argument_begin|>"
    '{"n": 97}<|tool_call_end|><|tool_calls_section_end|>'
)
KIMI_K2 = Family(
    name="kimi_k2",
    writes_names=True,
    golden=("kimi_k2",),
    history=kimi_history,
    prompt=kimi_prompt,
    output=kimi_output,
    reasoning=False,
    drops=("reasoning",),
    late_system=True,
    differences=REASONING_REFUSED,
    **KIMI_TOKENS,
    hard=(
        KIMI_HARD,
        [{"type": "function", "function": {"name": "prime"}}],
        {},
        '<|im_system|>tool_declare<|im_middle|>[{"type":"function","function":{"name":"prime"}}]<|im_end|>'
        "<|im_system|>system<|im_middle|>You are Kimi, an AI assistant created by Moonshot AI.<|im_end|>\n"
        f"<|im_user|>user<|im_middle|>Hi<|im_end|><|im_assistant|>assistant<|im_middle|>⟦Yes?{KIMI_PRIME}<|im_end|>⟧"
        "<|im_system|>prime<|im_middle|>## Return of functions.prime:0\ntrue<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>⟦Prime.<|im_end|>⟧",
    ),
)


def kimi_thought(message):
    reasoning, text = message.get("reasoning_content"), text_of(message)
    if reasoning is None and "</think>" in text:
        reasoning, _, text = text.partition("</think>")
        return reasoning.removeprefix("<think>"), text
    return reasoning or "", text


def kimi_thinking_history(messages, tools, *, preserve_thinking=False, **_):
    text = kimi_head(messages, tools)
    finals = [i for i, m in enumerate(messages) if m["role"] == "assistant" and not m.get("tool_calls")]
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            text += kimi_turn(message, kimi_said(message))
            continue
        reasoning, said = kimi_thought(message)
        stripped = finals and i <= finals[-1] and not preserve_thinking
        text += kimi_turn(message, f"<think>{'' if stripped else reasoning}</think>{said}{kimi_calls(message)}")
    return text


def kimi_thinking_output(messages, **_):
    last = messages[-1]
    reasoning, said = kimi_thought(last)
    said, calls = behind_text(said, kimi_calls(last), "<|tool_calls_section_begin|>")
    return [
        (f"<think>{reasoning}</think>", "think"),
        (said, "text"),
        (calls, "call"),
        ("<|im_end|>", "stop"),
    ]


KIMI_CHAIN = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is 91 prime?"},
    {"role": "assistant", "content": "No.", "reasoning_content": "7 * 13."},
    {"role": "user", "content": "And 97?"},
    {"role": "assistant", "content": "", "tool_calls": [KIMI_CALL], "reasoning_content": "A tool."},
    {"role": "tool", "tool_call_id": "functions.prime:0", "content": "yes"},
    {"role": "assistant", "content": "Yes.", "reasoning_content": "It says so."},
]
KIMI_K2_THINKING = Family(
    name="kimi_k2_thinking",
    writes_names=True,
    golden=("kimi_k2_thinking",),
    history=kimi_thinking_history,
    prompt=kimi_prompt,
    output=kimi_thinking_output,
    late_system=True,
    differences={
        ("think_last", "full"): "upstream strips the reasoning of the last answer, too",
        ("think_two_turns", "full"): "upstream strips the reasoning of the last answer, too",
    },
    **{**KIMI_TOKENS, "plain": (*KIMI_TOKENS["plain"], *THINK_TOKENS)},
    arguments={"preserve_thinking": (True,), "train_thinking": ("on", "masked")},
    hard=(
        KIMI_CHAIN,
        None,
        {},
        "<|im_system|>system<|im_middle|>Be brief.<|im_end|><|im_user|>user<|im_middle|>Is 91 prime?<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|><think></think>No.<|im_end|>"
        "<|im_user|>user<|im_middle|>And 97?<|im_end|>"
        f"<|im_assistant|>assistant<|im_middle|>⟦<think>A tool.</think>{KIMI_PRIME}<|im_end|>⟧"
        "<|im_system|>tool<|im_middle|>## Return of functions.prime:0\nyes<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>⟦<think>It says so.</think>Yes.<|im_end|>⟧",
    ),
    more=(
        (
            [
                {"role": "user", "content": "Is 91 prime?"},
                {"role": "assistant", "content": "<think>7 * 13.</think>No."},
                {"role": "user", "content": "And 97?"},
                {"role": "assistant", "content": "Yes."},
            ],
            None,
            {"preserve_thinking": True},
            "<|im_system|>system<|im_middle|>You are Kimi, an AI assistant created by Moonshot AI.<|im_end|>"
            "<|im_user|>user<|im_middle|>Is 91 prime?<|im_end|>"
            "<|im_assistant|>assistant<|im_middle|>⟦<think>7 * 13.</think>No.<|im_end|>⟧"
            "<|im_user|>user<|im_middle|>And 97?<|im_end|>"
            "<|im_assistant|>assistant<|im_middle|>⟦<think></think>Yes.<|im_end|>⟧",
        ),
    ),
)


# ---------------------------------------------------------------- Llama 4


def header_turn(role, text):
    return f"<|header_start|>{role}<|header_end|>\n\n{text}<|eot|>"


def llama4_parts(message):
    calls = [*map(function, message.get("tool_calls") or [])]
    if not calls:
        return text_of(message), ""
    listed = "".join(f'{{"name": "{c["name"]}", "parameters": {dump(c["arguments"])}}}' for c in calls)
    return f"<|python_start|>{text_of(message)}<|python_end|>", listed


def llama4_history(messages, tools, *, tools_in_user_message=True, **_):
    refuse_reasoning(messages)
    own, text = messages[0]["role"] == "system", "<|begin_of_text|>"
    if tools and not tools_in_user_message and not own:
        raise Refused
    if own:
        system = "Environment: ipython\n" if tools else ""
        system += LLAMA_ACCESS + pretty(tools) if tools and not tools_in_user_message else ""
        text += header_turn("system", system + text_of(messages[0]).strip())
    for i, message in enumerate(messages[own:], own):
        if message["role"] == "assistant":
            text += header_turn("assistant", "".join(llama4_parts(message)))
        elif message["role"] == "tool":
            text += header_turn("ipython", dump(text_of(message)))
        elif i == own and tools and tools_in_user_message:
            text += header_turn("user", LLAMA_ASK + pretty(tools) + text_of(message).strip())
        else:
            text += header_turn(message["role"], text_of(message))
    return text


def llama4_prompt(messages, **_):
    return "<|header_start|>assistant<|header_end|>\n\n"


def llama4_output(messages, **_):
    refuse_reasoning(messages)
    text, calls = llama4_parts(messages[-1])
    return [(text, "text"), (calls, "call"), ("<|eot|>", "stop")]


LLAMA4 = Family(
    name="llama4",
    golden=("llama4",),
    history=llama4_history,
    prompt=llama4_prompt,
    output=llama4_output,
    bos="<|begin_of_text|>",
    eos="<|eot|>",
    special=(
        *("<|begin_of_text|>", "<|header_start|>", "<|header_end|>", "<|eot|>", "<|eom|>", "<|python_start|>"),
        "<|python_end|>",
    ),
    late_system=True,
    reasoning=False,
    drops=("reasoning",),
    arguments={"tools_in_user_message": (True, False)},
    differences=REASONING_REFUSED,
    hard=(
        [{"role": "system", "content": " Be brief. "}, *TWO_TURNS[1:]],
        None,
        {},
        "<|begin_of_text|><|header_start|>system<|header_end|>\n\nBe brief.<|eot|>"
        "<|header_start|>user<|header_end|>\n\nHi<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n"
        '⟦<|python_start|>Yes?<|python_end|>{"name": "prime", "parameters": {"n": 97}}<|eot|>⟧'
        '<|header_start|>ipython<|header_end|>\n\n"true"<|eot|>'
        "<|header_start|>assistant<|header_end|>\n\n⟦Prime.<|eot|>⟧",
    ),
)


# ---------------------------------------------------------------- MiniMax M2

MINIMAX_SELF = {
    "MiniMax-M2": "You are MiniMax-M2, a helpful AI assistant built by MiniMax. Knowledge cutoff: 2025-06.",
    "MiniMax-M2.1": "You are a helpful assistant. Your name is MiniMax-M2.1 and is built by MiniMax.",
    "MiniMax-M2.5": "You are a helpful assistant. Your name is MiniMax-M2.5 and is built by MiniMax.",
    "MiniMax-M2.7": "You are a helpful assistant. Your name is MiniMax-M2.7 and is built by MiniMax.",
}
MINIMAX_TOOLS = (
    "\n\n# Tools\nYou may call one or more tools to assist with the user query.\n"
    "Here are the tools available in JSONSchema format:\n\n<tools>\n{}</tools>\n\n"
    "When making tool calls, use XML format to invoke tools and pass parameters:\n\n"
    '<minimax:tool_call>\n<invoke name="tool-name-1">\n<parameter name="param-key-1">param-value-1</parameter>\n'
    '<parameter name="param-key-2">param-value-2</parameter>\n...\n</invoke>\n</minimax:tool_call>'
)


def minimax_parts(message):
    reasoning, text, calls = message.get("reasoning_content"), text_of(message), ""
    if reasoning is None and "</think>" in text:
        reasoning, _, text = text.partition("</think>")
        reasoning, text = reasoning.removeprefix("<think>").strip("\n"), text.strip("\n")
    for call in map(function, message.get("tool_calls") or []):
        calls += f'<invoke name="{call["name"]}">\n'
        for name, value in call["arguments"].items():
            calls += f'<parameter name="{name}">{value if isinstance(value, str) else dump(value)}</parameter>\n'
        calls += "</invoke>\n"
    calls = f"\n<minimax:tool_call>\n{calls}</minimax:tool_call>" if calls else ""
    return reasoning or "", *(behind_text(text, calls, "\n") if text else (calls[:1], calls[1:]))


def minimax_history(messages, tools, *, model_name="MiniMax-M2.7", preserve_thinking=False, **_):
    own = text_of(messages[0]) if messages[0]["role"] == "system" else ""
    told = MINIMAX_TOOLS.format("".join(f"<tool>{dump(tool['function'])}</tool>\n" for tool in tools)) if tools else ""
    text = f"]~!b[]~b]system\n{own or MINIMAX_SELF[model_name]}{told}[e~[\n"
    last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    for i, message in enumerate(messages):
        if message["role"] == "user":
            text += f"]~b]user\n{text_of(message)}[e~[\n"
        elif message["role"] == "tool":
            text += "" if messages[i - 1]["role"] == "tool" else "]~b]tool"
            text += f"\n<response>{text_of(message)}</response>"
            text += "" if messages[i + 1 :] and messages[i + 1]["role"] == "tool" else "[e~[\n"
        elif message["role"] == "assistant":
            reasoning, said, calls = minimax_parts(message)
            if reasoning and (i > last_user or preserve_thinking):
                said = f"<think>\n{reasoning}\n</think>\n\n{said}"
            text += f"]~b]ai\n{said}{calls}[e~[\n"
        elif i:
            raise Refused
    return text


def minimax_prompt(messages, **_):
    return "]~b]ai\n<think>\n"


def minimax_output(messages, **_):
    reasoning, said, calls = minimax_parts(messages[-1])
    return [(f"{reasoning}\n</think>\n\n", "think"), (said, "text"), (calls, "call"), ("[e~[", "stop")]


MINIMAX_PRIME = (
    '\n<minimax:tool_call>\n<invoke name="prime">\n<parameter name="n">97</parameter>\n</invoke>\n</minimax:tool_call>'
)
MINIMAX_EMPTY = "upstream's last answer lacks the block that its own prompt opens"
MINIMAX_M2 = Family(
    name="minimax_m2",
    golden=("minimax_m2",),
    history=minimax_history,
    prompt=minimax_prompt,
    output=minimax_output,
    after="\n",
    stop_probe=False,
    special=("]~!b[", "]~b]", "[e~[", "]!p~[", "]!d~["),
    plain=(*THINK_TOKENS, "<minimax:tool_call>", "</minimax:tool_call>"),
    arguments={
        "model_name": tuple(MINIMAX_SELF),
        "preserve_thinking": (True,),
        "train_thinking": ("on", "masked"),
    },
    differences={
        (case, "full"): MINIMAX_EMPTY
        for case in (
            *("single", "two_turns", "system", "system_three_turns", "unicode", "code", "jinja_like"),
            *("tool_one", "tool_unused", "no_think"),
        )
    },
    hard=(
        THOUGHT,
        None,
        {"model_name": "MiniMax-M2"},
        "]~!b[]~b]system\nYou are MiniMax-M2, a helpful AI assistant built by MiniMax. Knowledge cutoff: 2025-06.[e~[\n"
        "]~b]user\nIs 91 prime?[e~[\n]~b]ai\nNo.[e~[\n]~b]user\nAnd 97?[e~[\n"
        f"]~b]ai\n<think>\n⟦A tool.\n</think>\n\nI ask.{MINIMAX_PRIME}[e~[⟧\n"
        "]~b]tool\n<response>yes</response>[e~[\n"
        "]~b]ai\n<think>\n⟦It says so.\n</think>\n\nYes.[e~[⟧\n",
    ),
    more=(
        (
            [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "<think>\nThink.\n</think>\n\nYes?\n"},
                {"role": "user", "content": "Ho"},
                {"role": "assistant", "content": "So."},
                {"role": "user", "content": "Hu"},
                {"role": "assistant", "content": "No.", "reasoning_content": "It is."},
            ],
            None,
            {"preserve_thinking": True},
            "]~!b[]~b]system\nBe brief.[e~[\n]~b]user\nHi[e~[\n]~b]ai\n<think>\n⟦Think.\n</think>\n\nYes?[e~[⟧\n"
            "]~b]user\nHo[e~[\n]~b]ai\nSo.[e~[\n"
            "]~b]user\nHu[e~[\n]~b]ai\n<think>\n⟦It is.\n</think>\n\nNo.[e~[⟧\n",
        ),
    ),
)


# ---------------------------------------------------------------- Ministral 3 Instruct and Reasoning

MINISTRAL_PERSONA = (
    "You are {}, a Large Language Model (LLM) created by Mistral AI, a French startup headquartered "
    "in Paris.\nYou power "
    "an AI assistant called Le Chat.\nYour knowledge base was last updated on 2023-10-01.\nThe current date is "
    "{{today}}.\n\nWhen you're not sure about some information or when the user's request requires up-to-date or "
    "specific data, you must use the available tools to fetch the information. Do not hesitate to use tools whenever "
    "they can provide a more accurate or complete response. If no relevant tools are available, "
    "then clearly state that "
    "you don't have the information and avoid making up anything.\nIf the user's question is not clear, ambiguous, or "
    "does not provide enough context for you to accurately answer the question, you do not try to answer it right away "
    'and you rather ask the user to clarify their request (e.g. "What are some good restaurants around me?" => '
    '"Where are you?" or "When is the next flight to Tokyo" => "Where do you travel from?").\nYou are always very '
    'attentive to dates, in particular you try to resolve dates (e.g. "yesterday" is {{yesterday}}) and when asked '
    "about information at specific dates, you discard information that is at another date.\nYou follow these "
    "instructions in all languages, and always respond to the user in the language they use or request.\nNext sections "
    "describe the capabilities that you have.\n\n# WEB BROWSING INSTRUCTIONS\n\nYou cannot perform any web search or "
    "access internet to open URLs, links etc. If it seems like the user is expecting you to do so, you clarify the "
    "situation and ask the user to copy paste the text directly in the chat.\n\n# MULTI-MODAL INSTRUCTIONS\n\nYou have "
    "the ability to read images, but you cannot generate images. You also cannot transcribe audio "
    "files or videos.\nYou "
    "cannot read nor transcribe audio files or videos.\n\n# TOOL CALLING INSTRUCTIONS\n\nYou may have access to tools "
    "that you can use to fetch information or perform actions. You must use these tools in the "
    "following situations:\n\n"
    "1. When the request requires up-to-date information.\n2. When the request requires specific data that you do not "
    "have in your knowledge base.\n3. When the request involves actions that you cannot perform "
    "without tools.\n\nAlways "
    "prioritize using tools to provide the most accurate and helpful response. If tools are not available, inform the "
    "user that you cannot perform the requested action at the moment."
)
MINISTRAL_THINKS = (
    "# HOW YOU SHOULD THINK AND ANSWER\n\nFirst draft your thinking process (inner monologue) until you arrive at a "
    "response. Format your response using Markdown, and use LaTeX for any mathematical equations. Write both your "
    "thoughts and the response in the same language as the input.\n\nYour thinking process must follow the template "
    "below:[THINK]Your thoughts or/and draft, like working through an exercise on scratch paper. Be as casual and as "
    "long as you want until you are confident to generate the response to the user.[/THINK]Here, provide a "
    "self-contained response."
)


def ministral_parts(message, thinks):
    reasoning, text = message.get("reasoning_content") or "", text_of(message)
    if reasoning and not thinks:
        raise Refused
    calls = ""
    for call in map(function, message.get("tool_calls") or []):
        arguments = call["arguments"]
        arguments = (arguments or "{}") if isinstance(arguments, str) else dump(arguments)
        calls += f"[TOOL_CALLS]{call['name']}[ARGS]{arguments}"
    think = f"[THINK]{reasoning}[/THINK]" if reasoning else ""
    if not think + text + calls:
        raise Refused
    text, calls = behind_text(text, calls, "[TOOL_CALLS]")
    return [(think, "think"), (text, "text"), (calls, "call"), ("</s>", "stop")]


def ministral_family(thinks):
    def history(messages, tools, *, model_name="Ministral-3-8B-Instruct-2512", **_):
        own, turns = messages[0]["role"] == "system", 0
        persona = MINISTRAL_THINKS if thinks else MINISTRAL_PERSONA.format(model_name)
        text = f"<s>[SYSTEM_PROMPT]{text_of(messages[0]) if own else persona}[/SYSTEM_PROMPT]"
        text += f"[AVAILABLE_TOOLS]{dump(tools)}[/AVAILABLE_TOOLS]" if tools else ""
        for message in messages[own:]:
            if message["role"] == "tool":
                text += f"[TOOL_RESULTS]{text_of(message)}[/TOOL_RESULTS]"
                continue
            if not message.get("tool_calls"):
                if message["role"] != ["user", "assistant"][turns % 2]:
                    raise Refused
                turns += 1
            if message["role"] == "user":
                text += f"[INST]{text_of(message)}[/INST]"
            else:
                text += "".join(part for part, _ in ministral_parts(message, thinks))
        return text

    def output(messages, **_):
        return ministral_parts(messages[-1], thinks)

    return {"history": history, "output": output}


MINISTRAL_FACTS = {
    **MISTRAL_TOKENS,
    "special": (*MISTRAL_TOKENS["special"], "[THINK]", "[/THINK]"),
    "text_before_calls": True,
}
NINE_SAID = [{**m, "content": "I ask." if m.get("tool_calls") else m["content"]} for m in NINE]
MINISTRAL_3 = Family(
    name="ministral_3",
    golden=("ministral_3",),
    **ministral_family(thinks=False),
    **MINISTRAL_FACTS,
    arguments={
        "model_name": (
            *("Ministral-3-3B-Instruct-2512", "Ministral-3-8B-Instruct-2512"),
            "Ministral-3-14B-Instruct-2512",
        )
    },
    differences=REASONING_REFUSED,
    hard=(
        [{"role": "system", "content": "Be brief."}, *NINE_SAID],
        None,
        {},
        "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]Is 97 prime?[/INST]"
        '⟦I ask.[TOOL_CALLS]prime[ARGS]{"n": 97}</s>⟧[TOOL_RESULTS]yes[/TOOL_RESULTS]⟦Prime.</s>⟧'
        "[INST]Sure?[/INST]⟦Yes.</s>⟧",
    ),
)


MINISTRAL_WRITES = "upstream drops reasoning_content, ours writes it as upstream writes a part of type thinking"
MINISTRAL_3_REASONING = Family(
    name="ministral_3_reasoning",
    golden=("ministral-3-reasoning",),
    **ministral_family(thinks=True),
    **{**MINISTRAL_FACTS, "reasoning": True},
    arguments={"train_thinking": ("on", "masked")},
    differences={
        ("think_last", "full"): MINISTRAL_WRITES,
        ("think_two_turns", "full"): MINISTRAL_WRITES,
        ("think_two_turns", "request"): MINISTRAL_WRITES,
    },
    hard=(
        [{"role": "system", "content": "Be brief."}, *THOUGHT],
        None,
        {},
        "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]Is 91 prime?[/INST]⟦[THINK]7 * 13.[/THINK]No.</s>⟧"
        '[INST]And 97?[/INST]⟦[THINK]A tool.[/THINK]I ask.[TOOL_CALLS]prime[ARGS]{"n": 97}</s>⟧'
        "[TOOL_RESULTS]yes[/TOOL_RESULTS]⟦[THINK]It says so.[/THINK]Yes.</s>⟧",
    ),
)


# ---------------------------------------------------------------- Mistral 7B Instruct v0.3


def seven_b_tools(tools):
    told = []
    for tool in tools:
        fields = []
        for name, value in tool["function"].items():
            if name != "return":
                fields.append(f'"{name}": ' + (f'"{value}"' if isinstance(value, str) else dump(value)))
        told.append('{"type": "function", "function": {' + ", ".join(fields) + "}}")
    return f"[AVAILABLE_TOOLS] [{', '.join(told)}][/AVAILABLE_TOOLS]"


def seven_b_history(messages, tools, **_):
    system = text_of(messages[0]) + "\n\n" if messages[0]["role"] == "system" else ""
    messages = mistral_messages(messages)
    text, last_question = "<s>", [m for m in messages if m["role"] == "user"][-1]
    for i, message in enumerate(messages):
        if message["role"] == "user":
            if tools and message == last_question:
                text += seven_b_tools(tools)
            text += f"[INST] {system if i == len(messages) - 1 else ''}{text_of(message)}[/INST]"
        elif message["role"] == "tool":
            text += f'[TOOL_RESULTS] {{"content": {text_of(message)}, "call_id": "{message["tool_call_id"]}"}}'
            text += "[/TOOL_RESULTS]"
        else:
            text += "".join(part for part, _ in seven_b_output([message]))
    return text


def seven_b_output(messages, **_):
    refuse_reasoning(messages)
    calls = [
        f'{{"name": "{c["function"]["name"]}", "arguments": {dump(c["function"]["arguments"])}, "id": "{c["id"]}"}}'
        for c in messages[-1].get("tool_calls") or []
    ]
    if calls and text_of(messages[-1]):
        raise Refused
    if calls:
        return [(f"[TOOL_CALLS] [{', '.join(calls)}]", "call"), ("</s>", "stop")]
    return [(" " + text_of(messages[-1]).strip(), "text"), ("</s>", "stop")]


MISTRAL_7B = Family(
    name="mistral_7b_v0_3",
    golden=("mistral_7b_v0_3",),
    history=seven_b_history,
    output=seven_b_output,
    **MISTRAL_TOKENS,
    differences={
        **REASONING_REFUSED,
        ("system", "full"): NEMO_SYSTEM,
        ("system_three_turns", "full"): NEMO_SYSTEM,
    },
    hard=(
        [{"role": "system", "content": "Be brief."}, *NINE],
        None,
        {},
        '<s>[INST] Is 97 prime?[/INST][TOOL_CALLS] [{"name": "prime", "arguments": {"n": 97}, "id": "call00001"}]</s>'
        '[TOOL_RESULTS] {"content": yes, "call_id": "call00001"}[/TOOL_RESULTS]⟦ Prime.</s>⟧'
        "[INST] Be brief.\n\nSure?[/INST]⟦ Yes.</s>⟧",
    ),
)


# ---------------------------------------------------------------- Nemotron 3.5: the thought glued to the answer


def glued_parts(message):
    reasoning, text = message.get("reasoning_content"), text_of(message)
    if reasoning and "</think>" in text or "<think>" in text and "</think>" not in text:
        raise Refused
    if reasoning is None and "</think>" in text:
        reasoning, _, text = text.partition("</think>")
        reasoning = reasoning.removeprefix("<think>").removeprefix("\n")
    calls = "".join(xml_call(c, python_value) + "\n" for c in map(function, message.get("tool_calls") or []))
    return reasoning if (reasoning or "").strip() else "", text, calls


def glued_history(messages, tools, *, preserve_thinking=False, truncate_history_thinking=True, **_):
    own = messages[0]["role"] == "system"
    system = [text_of(messages[0])] if own and text_of(messages[0]) else []
    text = im("system", "\n\n".join(system + ([nemotron_tools(tools)] if tools else [])))
    keep = preserve_thinking or not truncate_history_thinking
    last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    for i, message in enumerate(messages[own:], own):
        if message["role"] == "assistant":
            reasoning, said, calls = glued_parts(message)
            recent = keep or i > last_user
            said = (f"<think>\n{reasoning}</think>" if reasoning and recent else "<think></think>") + said
            said = said if calls and not recent else said.strip()
            text += im("assistant", said + ("\n" + calls if calls else ""))
        elif message["role"] == "tool":
            text += "" if messages[i - 1]["role"] == "tool" else "<|im_start|>user\n"
            text += f"<tool_response>\n{text_of(message)}\n</tool_response>\n"
            text += "" if messages[i + 1 :] and messages[i + 1]["role"] == "tool" else "<|im_end|>\n"
        else:
            text += im(message["role"], text_of(message))
    return text


def glued_output(messages, *, enable_thinking=None, **_):
    reasoning, said, calls = glued_parts(messages[-1])
    if reasoning and enable_thinking is False:
        raise Refused
    think = "" if enable_thinking is False else f"{reasoning}</think>"
    said = said.rstrip() + ("\n" if calls else "")
    return [(think, "think"), (said, "text"), (calls, "call"), ("<|im_end|>", "stop")]


NEMOTRON_3_5 = Family(
    name="nemotron_3_5",
    golden=("nemotron-3.5-lightning",),
    history=glued_history,
    prompt=nemotron_prompt,
    output=glued_output,
    after="\n",
    upstream="nemotron_3_5_lightning.jinja",
    stop_probe=False,
    late_system=True,
    special=("<|im_start|>", "<|im_end|>"),
    plain=THINK_TOKENS + HERMES_TOKENS,
    arguments=NEMOTRON_3.arguments,
    upstream_arguments=NEMOTRON_3.upstream_arguments,
    differences=NEMOTRON_3.differences,
    hard=(
        THOUGHT,
        None,
        {},
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nIs 91 prime?<|im_end|>\n"
        "<|im_start|>assistant\n<think></think>No.<|im_end|>\n<|im_start|>user\nAnd 97?<|im_end|>\n"
        f"<|im_start|>assistant\n<think>\n⟦A tool.</think>I ask.\n{XML_PRIME}\n<|im_end|>⟧\n"
        "<|im_start|>user\n<tool_response>\nyes\n</tool_response>\n<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n⟦It says so.</think>Yes.<|im_end|>⟧\n",
    ),
    more=(
        (
            [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "<think>\nThink.\n</think>\n\nYes?\n"},
                {"role": "user", "content": "Ho"},
                {"role": "assistant", "content": "No."},
            ],
            None,
            {"preserve_thinking": True},
            "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\n<think>\n⟦Think.\n</think>\n\nYes?<|im_end|>⟧\n"
            "<|im_start|>user\nHo<|im_end|>\n<|im_start|>assistant\n<think>\n⟦</think>No.<|im_end|>⟧\n",
        ),
        (
            THOUGHT_ONLY[:1] + [{"role": "assistant", "content": "No."}],
            None,
            {"enable_thinking": False},
            "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nIs 91 prime?<|im_end|>\n"
            "<|im_start|>assistant\n<think></think>⟦No.<|im_end|>⟧\n",
        ),
    ),
)


# ---------------------------------------------------------------- OLMo 3 Instruct

OLMO_SIGNED = (
    "You are provided with function signatures within <functions></functions> XML tags. You may "
    "call one or more functions "
    "to assist with the user query. Output any function calls within "
    "<function_calls></function_calls> XML tags. Do not "
    "make assumptions about what values to plug into functions."
)
OLMO_NONE = "You do not currently have access to any functions. <functions></functions>"


def olmo_parts(message):
    calls = []
    for call in map(function, message.get("tool_calls") or []):
        if not isinstance(call["arguments"], dict):
            raise Refused
        calls.append(f"{call['name']}({', '.join(f'{k}={dump(v)}' for k, v in call['arguments'].items())})")
    return text_of(message), "<function_calls>" + "\n".join(calls) + "</function_calls>" if calls else ""


OLMO_PERSONAS = {
    "Olmo-3-7B-Instruct": "You are a helpful function-calling AI assistant. ",
    "Olmo-3.1-32B-Instruct": "You are Olmo, a helpful AI assistant built by Ai2. Your date cutoff "
    "is December 2024, and your "
    "model weights are available at https://huggingface.co/allenai. ",
}


def olmo_history(messages, tools, *, model_name="Olmo-3-7B-Instruct", **_):
    refuse_reasoning(messages)
    listed = f"<functions>{dump(tools)}</functions>" if tools else ""
    text = ""
    if not any(m["role"] == "system" for m in messages):
        text = OLMO_PERSONAS[model_name] + (OLMO_SIGNED + listed if tools else OLMO_NONE)
        text = im("system", text)
    for message in messages:
        said = "".join(olmo_parts(message)) if message["role"] == "assistant" else text_of(message)
        role = {"tool": "environment"}.get(message["role"], message["role"])
        text += im(role, said + (listed if role == "system" else ""))
    return text


def olmo_output(messages, **_):
    refuse_reasoning(messages)
    text, calls = behind_text(*olmo_parts(messages[-1]), "<function_calls>")
    return [(text, "text"), (calls, "call"), ("<|endoftext|>", "stop")]


OLMO_3 = Family(
    name="olmo_3",
    golden=("olmo_3",),
    history=olmo_history,
    prompt=chatml_prompt,
    output=olmo_output,
    eos="<|endoftext|>",
    earlier_stop="<|im_end|>",
    arguments={"model_name": ("Olmo-3-7B-Instruct", "Olmo-3.1-32B-Instruct")},
    special=("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    plain=("<functions>", "</functions>", "<function_calls>", "</function_calls>"),
    late_system=True,
    reasoning=False,
    drops=("reasoning",),
    differences=REASONING_REFUSED,
    hard=(
        TWO_TURNS,
        None,
        {},
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n⟦Yes?<function_calls>prime(n=97)</function_calls><|im_end|>⟧\n"
        "<|im_start|>environment\ntrue<|im_end|>\n"
        "<|im_start|>assistant\n⟦Prime.<|endoftext|>⟧",
    ),
)


OLMO_THINKERS = {
    "Olmo-3-7B-Think": "You are OLMo, a helpful function-calling AI assistant built by Ai2. Your "
    "date cutoff is November "
    f"2024, and your model weights are available at https://huggingface.co/allenai. {OLMO_NONE}",
    "Olmo-3-32B-Think": "You are a helpful AI assistant.",
}


def olmo_thought(message):
    """What the whole answer is, block and text: content that holds the block, or the two parts put together."""
    reasoning, text = message.get("reasoning_content"), text_of(message)
    if text.startswith("<think>"):
        if reasoning:
            raise Refused
        return text
    if "<think>" in text or "</think>" in text:
        raise Refused
    return f"<think>{reasoning or ''}</think>{text}"


def olmo_think_history(messages, tools, *, model_name="Olmo-3-7B-Think", preserve_thinking=False, **_):
    refuse_calls(messages, tools)
    text = "" if any(m["role"] == "system" for m in messages) else im("system", OLMO_THINKERS[model_name])
    for message in messages:
        said = text_of(message)
        if message["role"] == "assistant":
            whole = olmo_thought(message)
            said = whole if preserve_thinking else said
        text += im(message["role"], said + (f" {OLMO_NONE}" if message["role"] == "system" else ""))
    return text


def olmo_think_prompt(messages, **_):
    return "<|im_start|>assistant\n<think>"


def olmo_think_output(messages, **_):
    refuse_calls(messages)
    whole = olmo_thought(messages[-1]).removeprefix("<think>")
    think, closed, text = whole.partition("</think>")
    if not closed:
        return [(whole, "text"), ("<|endoftext|>", "stop")]
    return [(think + closed, "think"), (text, "text"), ("<|endoftext|>", "stop")]


INLINE_FIRST = [
    {"role": "user", "content": "Is 91 prime?"},
    {"role": "assistant", "content": "<think>7 * 13.</think>\n\nNo."},
    {"role": "user", "content": "And 97?"},
    {"role": "assistant", "content": "Yes.", "reasoning_content": "No divisor."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Quite.", "reasoning_content": "Again."},
]
OLMO_3_THINK = Family(
    name="olmo_3_think",
    golden=("olmo_3_think",),
    history=olmo_think_history,
    prompt=olmo_think_prompt,
    output=olmo_think_output,
    eos="<|endoftext|>",
    earlier_stop="<|im_end|>",
    stop_probe=False,
    special=("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    plain=(*THINK_TOKENS, "<functions>", "</functions>"),
    late_system=True,
    tools=False,
    drops=("tools",),
    arguments={
        "model_name": ("Olmo-3-7B-Think", "Olmo-3-32B-Think"),
        "preserve_thinking": (True,),
        "train_thinking": ("on", "masked"),
    },
    differences={
        ("*", "full"): LAST_REOPENED,
        **NO_TOOL_LIST,
        ("tool_one", "request"): "upstream drops the tool list and the call, ours refuses",
        ("tool_one", "full"): "upstream drops the tool list and the call, ours refuses",
    },
    hard=(
        INLINE_FIRST,
        None,
        {"model_name": "Olmo-3-32B-Think"},
        "<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n<|im_start|>user\nIs 91 prime?<|im_end|>\n"
        "<|im_start|>assistant\n<think>⟦7 * 13.</think>\n\nNo.<|im_end|>⟧\n<|im_start|>user\nAnd 97?<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\n<think>⟦Again.</think>Quite.<|endoftext|>⟧",
    ),
)


# ---------------------------------------------------------------- Phi-4-mini


def phi4_mini_history(messages, tools, **_):
    refuse_calls(messages, tools)
    refuse_reasoning(messages)
    text = ""
    for message in messages:
        told = f"<|tool|>{message['tools']}<|/tool|>" if message.get("tools") else ""
        text += f"<|{message['role']}|>{text_of(message)}{told}<|end|>"
    return text


def phi4_mini_prompt(messages, **_):
    return "<|assistant|>"


def phi4_mini_output(messages, **_):
    refuse_calls(messages)
    refuse_reasoning(messages)
    return [(text_of(messages[-1]), "text"), ("<|end|>", "stop")]


PHI4_MINI_HARD = (
    "<|system|>Be brief.<|tool|>[{}]<|/tool|><|end|><|user|>Hi <|end|><|assistant|>⟦ Yes?\n<|end|>⟧"
    "<|user|>Bye<|end|><|assistant|>⟦Bye.<|end|>⟧<|endoftext|>"
)
PHI4_MINI = Family(
    name="phi4_mini",
    golden=("phi4_mini",),
    history=phi4_mini_history,
    prompt=phi4_mini_prompt,
    output=phi4_mini_output,
    after="<|endoftext|>",
    eos="<|endoftext|>",
    special=(
        *("<|endoftext|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|/tool|>"),
        *("<|tool_call|>", "<|/tool_call|>", "<|tool_response|>"),
    ),
    late_system=True,
    tools=False,
    reasoning=False,
    drops=("tools", "reasoning"),
    differences={
        **REASONING_REFUSED,
        **NO_TOOL_LIST,
        ("tool_one", "full"): "upstream drops the tool list and the call, ours refuses",
        ("tool_one", "request"): "upstream drops the tool list and the call, ours refuses",
    },
    hard=([{"role": "system", "content": "Be brief.", "tools": "[{}]"}, *SHORT], None, {}, PHI4_MINI_HARD),
)


# ---------------------------------------------------------------- Qwen3-Coder and Qwen3-Coder-Next


def coder_field(name, value, value_text):
    return f"\n<{name}>{value_text(value)}</{name}>"


def coder_tools(tools, value_text):
    text = "\n\n# Tools\n\nYou have access to the following functions:\n\n<tools>"
    for tool in map(lambda t: t["function"], tools):
        text += f"\n<function>\n<name>{tool['name']}</name>\n<description>{tool['description'].strip()}</description>"
        text += "\n<parameters>"
        for name, spec in tool["parameters"].get("properties", {}).items():
            text += f"\n<parameter>\n<name>{name}</name>"
            text += f"\n<type>{spec['type']}</type>" if "type" in spec else ""
            text += f"\n<description>{spec['description'].strip()}</description>" if "description" in spec else ""
            for key, value in spec.items():
                if key not in ("name", "type", "description"):
                    text += coder_field(key, value, value_text)
            text += "\n</parameter>"
        for key, value in tool["parameters"].items():
            if key not in ("type", "properties"):
                text += coder_field(key, value, value_text)
        text += "\n</parameters>\n</function>"
    return f"{text}\n</tools>\n\n{XML_FORMAT}"


def coder_family(value_text, own_line):
    """own_line: each tool reply ends its own line, or begins it."""

    def parts(message):
        text = text_of(message)
        calls = "\n".join(xml_call(call, value_text) for call in map(function, message.get("tool_calls") or []))
        if calls:
            text = text.strip() + "\n\n" if text.strip() else ""
        return text, calls

    def history(messages, tools, **_):
        refuse_reasoning(messages)
        own, text = messages[0]["role"] == "system", ""
        if own or tools:
            default = "You are Qwen, a helpful AI assistant that can interact with a computer to solve tasks."
            text = im(
                "system", (text_of(messages[0]) if own else default) + (coder_tools(tools, value_text) if tools else "")
            )
        for i, message in enumerate(messages[own:], own):
            if message["role"] == "tool":
                text += "" if messages[i - 1]["role"] == "tool" else "<|im_start|>user" + "\n" * own_line
                reply = f"<tool_response>\n{text_of(message)}\n</tool_response>"
                text += reply + "\n" if own_line else "\n" + reply
                text += "" if [m["role"] for m in messages[i + 1 : i + 2]] == ["tool"] else "<|im_end|>\n"
            elif message["role"] == "assistant":
                text += im("assistant", "".join(parts(message)))
            else:
                text += im(message["role"], text_of(message))
        return text

    def output(messages, **_):
        refuse_reasoning(messages)
        text, calls = parts(messages[-1])
        return [(text, "text"), (calls, "call"), ("<|im_end|>", "stop")]

    return {"history": history, "prompt": chatml_prompt, "output": output}


CODER_FACTS = {
    "after": "\n",
    "tokenizer": "qwen3",
    "special": ("<|im_start|>", "<|im_end|>"),
    "plain": HERMES_TOKENS,
    "late_system": True,
    "reasoning": False,
    "drops": ("reasoning",),
    "differences": REASONING_REFUSED,
}
CODER_HARD = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    f"<|im_start|>assistant\n⟦Yes?\n\n{XML_PRIME}<|im_end|>⟧\n"
    "<|im_start|>user\n<tool_response>\ntrue\n</tool_response>\n<|im_end|>\n"
    "<|im_start|>assistant\n⟦Prime.<|im_end|>⟧\n"
)
QWEN3_CODER = Family(
    name="qwen3_coder",
    golden=("qwen3_coder",),
    **coder_family(python_value, own_line=True),
    **CODER_FACTS,
    hard=(TWO_TURNS, None, {}, CODER_HARD),
)


QWEN3_CODER_NEXT = Family(
    name="qwen3_coder_next",
    golden=("qwen3_coder_next",),
    **coder_family(json_value, own_line=False),
    **CODER_FACTS,
    hard=(TWO_TURNS, None, {}, CODER_HARD.replace("</tool_response>\n<", "</tool_response><")),
)


# ---------------------------------------------------------------- Tiny Aya

AYA_HEAD = (
    "<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|># System Preamble\nYou are in contextual safety mode. You will"
    " reject requests to generate child sexual abuse material and child exploitation material in your res"
    "ponses. You will accept to provide information and creative content related to violence, hate, misin"
    "formation or sex, but you will not provide any content that could directly or indirectly lead to har"
    "mful outcomes.\n\nYour information cutoff date is June 2024.\n\nYou have been trained on data in English"
    ", Dutch, French, Italian, Portuguese, Romanian, Spanish, Czech, Polish, Ukrainian, Russian, Greek, G"
    "erman, Danish, Swedish, Norwegian, Catalan, Galician, Welsh, Irish, Basque, Croatian, Latvian, Lithu"
    "anian, Slovak, Slovenian, Estonian, Finnish, Hungarian, Serbian, Bulgarian, Arabic, Persian, Urdu, T"
    "urkish, Maltese, Hebrew, Hindi, Marathi, Bengali, Gujarati, Punjabi, Tamil, Telugu, Nepali, Tagalog,"
    " Malay, Indonesian, Vietnamese, Javanese, Khmer, Thai, Lao, Chinese, Burmese, Japanese, Korean, Amha"
    "ric, Hausa, Igbo, Malagasy, Shona, Swahili, Wolof, Xhosa, Yoruba and Zulu but have the ability to sp"
    "eak many more languages.\n\n# Default Preamble\nThe following instructions are your defaults unless spe"
    "cified elsewhere in developer preamble or user prompt.\n- Your name is Aya.\n- You are a large languag"
    "e model built by Cohere.\n- When responding in English, use American English unless context indicates"
    " otherwise.\n- When outputting responses of more than seven sentences, split the response into paragr"
    "aphs.\n- Prefer the active voice.\n- Use gender-neutral pronouns for unspecified persons.\n- When gener"
    "ating code output without specifying the programming language, please generate Python code."
)


def aya_history(messages, tools, **_):
    refuse_calls(messages, tools)
    refuse_reasoning(messages)
    said = [text_of(m) for m in messages if m["role"] == "system"]
    preamble, turns = said[0] if said else "", 0
    text = "<BOS_TOKEN>" + AYA_HEAD
    text += COMMAND_DEVELOPER + "\n" + preamble if preamble else ""
    text += "<|END_OF_TURN_TOKEN|>"
    for message in messages:
        if message["role"] == "system":
            text += command_turn("SYSTEM", text_of(message)) if not preamble or text_of(message) != preamble else ""
            continue
        if message["role"] != ["user", "assistant"][turns % 2]:
            raise Refused
        turns += 1
        if message["role"] == "user":
            text += command_turn("USER", text_of(message))
        else:
            text += command_turn("CHATBOT", f"<|START_RESPONSE|>{text_of(message)}<|END_RESPONSE|>")
    return text


def aya_prompt(messages, **_):
    return "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>"


def aya_output(messages, **_):
    refuse_calls(messages)
    refuse_reasoning(messages)
    return [(text_of(messages[-1]), "text"), ("<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", "stop")]


TINY_AYA = Family(
    name="tiny_aya",
    golden=("cohere2",),
    history=aya_history,
    prompt=aya_prompt,
    output=aya_output,
    upstream="cohere2.jinja",
    bos="<BOS_TOKEN>",
    eos="<|END_OF_TURN_TOKEN|>",
    special=COMMAND_A_REASONING.special,
    tools=False,
    reasoning=False,
    late_system=True,
    consecutive_users=False,
    drops=("tools", "reasoning"),
    differences={
        **REASONING_REFUSED,
        **NO_TOOL_LIST,
        ("tool_one", "request"): "upstream drops the tool list and the call, ours refuses",
    },
    hard=(
        SHORT,
        None,
        {},
        "<BOS_TOKEN>" + AYA_HEAD + "<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi <|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>⟦ Yes?\n<|END_RESPONSE|><|END_OF_TURN_TOKEN|>⟧"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Bye<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>⟦Bye.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>⟧",
    ),
)

ALL_FAMILIES = [family for family in globals().values() if isinstance(family, Family)]
