"""data_prep/common/answers.py: a model's answer taken apart as its family writes it.

The oracles: template_oracle.py, which says what a model must write for a message (what is read back is that message);
answers written by hand from each family's published format; TRL's response templates, read by transformers.

What would fool these tests, and what stands against it:
- nothing is read (all refused, no calls, no thoughts): what the random conversations held is counted and asserted;
- an exception hides a fault: each of the module's list has a case of its own;
- only whole answers are read: every call and thought is cut at every token, and arbitrary texts are thrown at it.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

import pytest
import trl.chat_template_utils as trl_templates
from hypothesis import HealthCheck, given, settings
from transformers.utils.chat_parsing import parse_response

from data_prep.common.answer_formats import FORMATS, GENERIC
from data_prep.common.answers import Answer, find_family, parse_answer
from data_prep.common.errors import InvalidRow
from tests.helpers.template_oracle import ALL_FAMILIES, Family, Refused
from tests.templates.test_chat_templates import CALLS, TOOLS, conversations, encode, serving, template, tokenizer_of
from tests.templates.test_chat_templates import families as every_family

EXAMPLES = 60
TEXTS = 200
CUTS = 12  # answers of each family with a thought, and as many with a call, that are cut at each of their tokens
BY_NAME = {family.name: family for family in ALL_FAMILIES}
TRIMMED = ("qwen3_5", "qwen3_6", "qwen3_8", "llama3", "llama3_1", "llama3_2", "gemma2", "gemma3", "gemma4", "glm4_6")
TRIMMED = (*TRIMMED, "glm4_7")
BESIDE_TRIMMED = ("qwen3_coder", "qwen3_coder_next")
UNESCAPED = ("lfm2_5",)  # strings of calls are written between quotes as they are
UPSTREAM = Path(trl_templates.__file__).parent / "chat_templates"
SCHEMAS = {
    "city": {"type": "string"},
    "day": {"type": "string", "enum": ["today", "tomorrow"]},
    "expression": {"type": "string"},
    "n": {"type": "number"},
    "deep": {"type": "object"},
    "t": {"type": "string"},
}
assert {name for call in CALLS for name in call} <= set(SCHEMAS)


def with_schemas(tools: list[dict]) -> list[dict]:
    """The tools with a type for every argument that the random calls use."""
    typed = []
    for tool in tools:
        function = {**tool["function"], "parameters": {"type": "object", "properties": SCHEMAS}}
        typed.append({"type": "function", "function": function})
    return typed


TYPED = with_schemas(TOOLS)


# ---------------------------------------------------------------- what the oracle writes for a message


@dataclass
class Written:
    """An answer as the oracle has it: what it goes on from, its parts, the messages up to its own, the arguments."""

    prompt: str
    parts: list[tuple[str, str]]
    messages: list[dict]
    arguments: dict

    @property
    def text(self) -> str:
        return "".join(part for part, kind in self.parts if kind != "stop")

    @property
    def stop(self) -> str:
        return self.parts[-1][0]


def written_answers(family: Family, conversation: tuple) -> Iterator[Written]:
    messages, tools, arguments = conversation
    arguments = {name: value for name, value in arguments.items() if not name.startswith("train_")}
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = messages[:number]
        try:
            prompt = family.history(before, tools, **arguments) + family.prompt(before, **arguments)
            parts = family.output(messages[: number + 1], **arguments)
        except Refused:
            continue
        yield Written(prompt, parts, messages[: number + 1], arguments)


def expected_answer(family: Family, written: Written) -> Answer:
    """The message itself, but for what the module says a format loses."""
    message = written.messages[-1]
    content = message["content"]
    reasoning = message.get("reasoning_content") or ""
    if isinstance(content, list):  # nanochat
        content = written.text
    if family.name == "gpt_oss" and message.get("tool_calls") and not written.arguments.get("harmony"):
        reasoning = reasoning or content
        content = ""
    if family.name in TRIMMED:
        content = content.strip()
    if family.name in TRIMMED and family.name != "gemma4":
        reasoning = reasoning.strip()
    if family.name == "mistral_7b_v0_3" and not message.get("tool_calls"):
        content = " " + content.strip()
    if family.name in BESIDE_TRIMMED and message.get("tool_calls"):
        content = content.strip()
    if family.name in ("nemotron_3", "nemotron_3_5"):
        content = content.rstrip()
    calls = []
    earlier = sum(len(one.get("tool_calls") or []) for one in written.messages[:-1])
    for number, call in enumerate(message.get("tool_calls") or [], earlier):
        arguments = call["function"]["arguments"]
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        expected = {"type": "function", "function": {"name": call["function"]["name"], "arguments": arguments}}
        if family.name.startswith("mistral"):
            expected["id"] = call["id"]
        if family.name.startswith("kimi"):
            expected["function"]["name"] = expected["id"] = call["id"]  # the id holds the name, and these ids hold none
        if family.name in ("command_a", "command_a_reasoning"):
            expected["id"] = str(number)
        calls.append(expected)
    reasoning = reasoning.strip("\n") if reasoning.strip() else None
    return Answer(reasoning, content.strip("\n"), calls)


def is_unescaped(family: Family, written: Written) -> bool:
    """Whether a call holds a string that its family cannot write: the module's exception, tested by hand below."""
    if family.name not in UNESCAPED:
        return False
    values = []
    for call in written.messages[-1].get("tool_calls") or []:
        values.extend(call["function"]["arguments"].values())
    return any(isinstance(value, str) and re.search(r"['\\]", value) for value in values)


@cache
def samples(family: Family) -> list[Written]:
    found = []

    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(conversations(family))
    def run(conversation: tuple) -> None:
        found.extend(written_answers(family, conversation))

    run()
    return found


@every_family
def test_an_answer_is_read_back_as_its_message(family: Family):
    seen = Counter()
    for written in samples(family):
        if is_unescaped(family, written):
            continue
        expected = expected_answer(family, written)
        for text in (written.text, written.text + written.stop, written.text + written.stop + family.after):
            assert parse_answer(text, family.name, written.prompt, TYPED) == expected, text
        seen["answers"] += 1
        seen["calls"] += bool(expected.tool_calls)
        seen["parallel"] += len(expected.tool_calls) > 1
        seen["reasoning"] += expected.reasoning is not None
        seen["beside"] += bool(expected.tool_calls and expected.content.strip())
    assert seen["answers"] > EXAMPLES // 2, seen
    if family.tools:
        assert seen["calls"] > 5, seen
    if family.tools and family.parallel:
        assert seen["parallel"] > 2, seen
    if family.tools and family.text_before_calls and family.name != "gpt_oss":
        assert seen["beside"] > 2, seen
    if family.reasoning:
        assert seen["reasoning"] > 5, seen


def is_begun_tag(family: Family, content: str) -> bool:
    """Whether a text is, or ends as, what begins a call or a thought in more than one token."""
    if family.name.startswith("llama3"):
        return content.startswith("{")
    if family.name == "minimax_m2":
        return re.search(r"<[a-z:_]*\Z", content) is not None
    if family.name == "gpt_oss":
        return content == " to"
    return family.name == "chatml" and re.search(r"</?[a-z_]*\Z", content) is not None


@every_family
def test_a_cut_answer_says_less_and_never_something_else(family: Family):
    """At every token: a thought without its end is no answer, a call without its end is an error or whole."""
    tokenizer = tokenizer_of(family, "small")
    seen = Counter()
    readable = [one for one in samples(family) if not is_unescaped(family, one)]
    thinking = [one for one in readable if (one.messages[-1].get("reasoning_content") or "").strip()]
    calling = [one for one in readable if one.messages[-1].get("tool_calls")]
    for written in thinking[:CUTS] + calling[:CUTS]:
        whole = expected_answer(family, written)
        ids = encode(tokenizer, written.text)
        for size in range(len(ids)):
            text = tokenizer.decode(ids[:size], clean_up_tokenization_spaces=False)
            if not written.text.startswith(text):  # half a character
                continue
            cut = parse_answer(text, family.name, written.prompt, TYPED)
            if cut.error:
                assert not cut.is_complete and not cut.tool_calls, (text, cut)
                seen["calls"] += 1
            elif not cut.is_complete:
                assert cut.content == "" and cut.reasoning in text, (text, cut)
                seen["thoughts"] += 1
            else:
                assert cut.tool_calls == whole.tool_calls[: len(cut.tool_calls)], (text, cut)
                assert whole.content.startswith(cut.content) or is_begun_tag(family, cut.content), (text, cut)
                assert cut.reasoning in (None, whole.reasoning)
    assert seen["calls"] >= 10 * family.tools, seen
    assert seen["thoughts"] >= 10 * family.reasoning, seen


# ---------------------------------------------------------------- answers written by hand


@dataclass
class Form:
    """How families write the call prime(n=97), two calls in one answer, and a call that is closed and no call."""

    call: str
    two: str | None
    broken: str
    closed: bool = True  # the call has an end of its own: text may stand behind it
    closing: str = ""  # what may be missing at its end


HERMES = Form(
    '<tool_call>\n{"name": "prime", "arguments": {"n": 97}}\n</tool_call>',
    '<tool_call>\n{"name": "prime", "arguments": {"n": 97}}\n</tool_call>\n'
    '<tool_call>\n{"name": "prime", "arguments": {"n": 97}}\n</tool_call>',
    '<tool_call>\n{"name": "prime", "arguments": {"n": 97}\n</tool_call>',
    closing="\n</tool_call>",
)
XML_CALL = "<tool_call>\n<function=prime>\n<parameter=n>\n97\n</parameter>\n</function>\n</tool_call>"
XML = Form(
    XML_CALL,
    f"{XML_CALL}\n{XML_CALL}",
    "<tool_call>\n<function=prime>\n<parameter=n>\n97\n</function>\n</tool_call>",
    closing="\n</tool_call>",
)
GLM_CALL = "\n<tool_call>prime\n<arg_key>n</arg_key>\n<arg_value>97</arg_value>\n</tool_call>"
GLM = Form(GLM_CALL, GLM_CALL + GLM_CALL, "\n<tool_call>prime\n<arg_key>n</arg_key>\n<arg_value>97\n</tool_call>")
LLAMA = Form(
    '{"name": "prime", "parameters": {"n": 97}}',
    '{"name": "prime", "parameters": {"n": 97}}; {"name": "prime", "parameters": {"n": 97}}',
    '{"name": "prime", "parameters": {"n": 97,}}',
    closed=False,
)
GEMMA4 = Form(
    "<|tool_call>call:prime{n:97}<tool_call|>",
    "<|tool_call>call:prime{n:97}<tool_call|><|tool_call>call:prime{n:97}<tool_call|>",
    "<|tool_call>call:prime{n:97<tool_call|>",
    closing="<tool_call|>",
)
DEEPSEEK_CALL = '<｜tool▁call▁begin｜>function<｜tool▁sep｜>prime\n```json\n{"n": 97}\n```<｜tool▁call▁end｜>'
DEEPSEEK = Form(
    f"<｜tool▁calls▁begin｜>{DEEPSEEK_CALL}<｜tool▁calls▁end｜>",
    f"<｜tool▁calls▁begin｜>{DEEPSEEK_CALL}\n{DEEPSEEK_CALL}<｜tool▁calls▁end｜>",
    f"<｜tool▁calls▁begin｜>{DEEPSEEK_CALL}<｜tool▁calls▁end｜>".replace("97}", "97}}"),
    closing="<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
)
MISTRAL_LIST = Form(
    '[TOOL_CALLS][{"name": "prime", "arguments": {"n": 97}}]',
    '[TOOL_CALLS][{"name": "prime", "arguments": {"n": 97}}, {"name": "prime", "arguments": {"n": 97}}]',
    '[TOOL_CALLS][{"name": "prime", "arguments": {"n": 97,}}]',
    closed=False,
)
MISTRAL_NAMED = Form(
    '[TOOL_CALLS]prime[ARGS]{"n": 97}',
    '[TOOL_CALLS]prime[ARGS]{"n": 97}[TOOL_CALLS]prime[ARGS]{"n": 97}',
    '[TOOL_CALLS]prime[ARGS]{"n": 97}}',
    closed=False,
)
V3_1_CALL = '<｜tool▁call▁begin｜>prime<｜tool▁sep｜>{"n": 97}<｜tool▁call▁end｜>'
DEEPSEEK_V3_1 = Form(
    f"<｜tool▁calls▁begin｜>{V3_1_CALL}<｜tool▁calls▁end｜>",
    f"<｜tool▁calls▁begin｜>{V3_1_CALL}{V3_1_CALL}<｜tool▁calls▁end｜>",
    f"<｜tool▁calls▁begin｜>{V3_1_CALL}<｜tool▁calls▁end｜>".replace("97}", "97}}"),
    closing="<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
)
KIMI_CALL = '<|tool_call_begin|>functions.prime:0<|tool_call_argument_begin|>{"n": 97}<|tool_call_end|>'
KIMI = Form(
    f"<|tool_calls_section_begin|>{KIMI_CALL}<|tool_calls_section_end|>",
    None,
    f"<|tool_calls_section_begin|>{KIMI_CALL}<|tool_calls_section_end|>".replace("97}", "97}}"),
    closing="<|tool_call_end|><|tool_calls_section_end|>",
)
INVOKE = '<invoke name="prime">\n<parameter name="n">97</parameter>\n</invoke>\n'
MINIMAX = Form(
    f"<minimax:tool_call>\n{INVOKE}</minimax:tool_call>",
    f"<minimax:tool_call>\n{INVOKE}{INVOKE}</minimax:tool_call>",
    f"<minimax:tool_call>\n{INVOKE}</minimax:tool_call>".replace("</parameter>", ""),
    closing="</minimax:tool_call>",
)
GLM4_7_CALL = "<tool_call>prime<arg_key>n</arg_key><arg_value>97</arg_value></tool_call>"
GLM4_7 = Form(GLM4_7_CALL, GLM4_7_CALL + GLM4_7_CALL, GLM4_7_CALL.replace("</arg_value>", ""))
OLMO = Form(
    "<function_calls>prime(n=97)</function_calls>",
    "<function_calls>prime(n=97)\nprime(n=97)</function_calls>",
    "<function_calls>prime(n=97</function_calls>",
    closing="</function_calls>",
)
LLAMA4 = Form(
    '<|python_start|><|python_end|>{"name": "prime", "parameters": {"n": 97}}',
    '<|python_start|><|python_end|>{"name": "prime", "parameters": {"n": 97}}'
    '{"name": "prime", "parameters": {"n": 97}}',
    '<|python_start|><|python_end|>{"name": "prime", "parameters": {"n": 97,}}',
    closed=False,
)
HARMONY = Form(
    ' to=functions.prime<|channel|>commentary json<|message|>{"n": 97}<|call|>',
    None,
    ' to=functions.prime<|channel|>commentary json<|message|>{"n": 97}}<|call|>',
    closing="<|call|>",
)
COMMAND = Form(
    '<|START_ACTION|>[\n    {"tool_name": "prime", "parameters": {"n": 97}}\n]<|END_ACTION|>',
    '<|START_ACTION|>[\n    {"tool_name": "prime", "parameters": {"n": 97}},\n'
    '    {"tool_name": "prime", "parameters": {"n": 97}}\n]<|END_ACTION|>',
    '<|START_ACTION|>[\n    {"tool_name": "prime", "parameters": {"n": 97}\n]<|END_ACTION|>',
    closing="<|END_ACTION|>",
)
LFM = Form(
    "<|tool_call_start|>[prime(n=97)]<|tool_call_end|>",
    "<|tool_call_start|>[prime(n=97), prime(n=97)]<|tool_call_end|>",
    "<|tool_call_start|>[prime(n=97]<|tool_call_end|>",
    closing="<|tool_call_end|>",
)
FORMS = {
    **dict.fromkeys(("chatml", "qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_thinking_2507"), HERMES),
    **dict.fromkeys(("qwq", "smollm3", "step3_qwen3", GENERIC), HERMES),
    **dict.fromkeys(("qwen3_5", "qwen3_6", "qwen3_8", "step3_5", "nemotron_3"), XML),
    **dict.fromkeys(("llama3", "llama3_1", "llama3_2"), LLAMA),
    "glm4_6": GLM,
    "gemma4": GEMMA4,
    **dict.fromkeys(("qwen3_coder", "qwen3_coder_next", "nemotron_3_5"), XML),
    **dict.fromkeys(("granite_4", "granite_4_1"), HERMES),
    **dict.fromkeys(("ministral_3", "ministral_3_reasoning"), MISTRAL_NAMED),
    **dict.fromkeys(("kimi_k2", "kimi_k2_thinking"), KIMI),
    "mistral_7b_v0_3": MISTRAL_LIST,
    "glm4_7": GLM4_7,
    "deepseek_v3_1": DEEPSEEK_V3_1,
    "minimax_m2": MINIMAX,
    "olmo_3": OLMO,
    "llama4": LLAMA4,
    "command_a": COMMAND,
    "deepseek_v3": DEEPSEEK,
    "mistral_nemo": MISTRAL_LIST,
    "mistral_small_3_2": MISTRAL_NAMED,
    "gpt_oss": HARMONY,
    "command_a_reasoning": COMMAND,
    "lfm2_5": LFM,
}
THOUGHTS = {  # how a thought stands in an answer, its end and its beginning apart
    "gemma4": ("<|channel>thought\n", "hm\n", "<channel|>"),
    "command_a_reasoning": ("<|START_THINKING|>", "hm", "<|END_THINKING|>"),
    "gpt_oss": ("<|channel|>analysis<|message|>", "hm", "<|end|><|start|>assistant"),
    "command_a": ("<|START_THINKING|>", "hm", "<|END_THINKING|>"),
    "ministral_3_reasoning": ("[THINK]", "hm", "[/THINK]"),
}
PRIME = {"type": "function", "function": {"name": "prime", "arguments": {"n": 97}}}
PRIME_TOOL = {"name": "prime", "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}}}
PRIME_TOOLS = [{"type": "function", "function": PRIME_TOOL}]
with_calls = pytest.mark.parametrize("name", FORMS)
with_thoughts = pytest.mark.parametrize("name", [family.name for family in ALL_FAMILIES if family.reasoning])


def parse(text: str, name: str, prompt: str = "") -> Answer:
    answer = parse_answer(text, name, prompt, PRIME_TOOLS)
    if name.startswith("kimi"):  # its calls always have an id, which a test of its own reads
        for call in answer.tool_calls:
            del call["id"]
    return answer


def test_every_family_with_tools_has_a_form_here_and_every_template_a_row_there():
    assert set(FORMS) == {family.name for family in ALL_FAMILIES if family.tools} | {GENERIC}
    assert set(FORMATS) == {family.name for family in ALL_FAMILIES} | {GENERIC}


@with_calls
def test_calls_written_by_hand(name: str):
    form = FORMS[name]
    stops = FORMATS[name].stops
    for stop in ("", *stops, stops[0] + "\n", stops[0] * 3):
        assert parse(form.call + stop, name) == Answer(tool_calls=[PRIME])
        if form.two:
            assert parse(form.two + stop, name) == Answer(tool_calls=[PRIME, PRIME])
    whole = form.call.removesuffix(form.closing)
    assert parse(whole, name) == Answer(tool_calls=[PRIME])
    for spaced in (form.call.replace(": {", ":{"), form.call.replace("{", "{ ").replace("97}", "97 }")):
        assert parse(spaced, name) == Answer(tool_calls=[PRIME])


@with_calls
def test_text_beside_a_call(name: str):
    form = FORMS[name]
    if name != "gpt_oss":  # a message of its own there
        assert parse("Sure.\n\n" + form.call, name) == Answer(content="Sure.", tool_calls=[PRIME])
        assert parse("    x = 1\n" + form.call, name) == Answer(content="    x = 1", tool_calls=[PRIME])
    if form.closed:
        assert parse(form.call + "\n\nDone.", name) == Answer(content="Done.", tool_calls=[PRIME])
    if form.closed and name != "gpt_oss":
        behind = parse("Sure.\n" + form.call + "\n\nDone.", name)
        assert behind.tool_calls == [PRIME] and behind.is_complete and not behind.error
        assert behind.content.split() == ["Sure.", "Done."]
    if not form.closed:
        behind = parse(form.call + " Done.", name)
        assert behind == Answer(content=form.call + " Done.", error=behind.error)
        assert behind.error.startswith("tool call that is not as its family writes it: ")


@with_calls
def test_a_call_that_is_none_leaves_no_call_and_all_of_the_text(name: str):
    form = FORMS[name]
    texts = [form.broken]
    if form.closed and form.two:
        texts += [form.broken + "\n" + form.call, form.call + "\n" + form.broken]
    for broken in texts:
        answer = parse(broken + FORMATS[name].stops[0], name)
        assert answer == Answer(content=broken.removesuffix("<|call|>").strip("\n"), error=answer.error)
        assert answer.error.startswith("tool call that is not as its family writes it: ")


@with_calls
def test_a_cut_call_leaves_no_call_and_all_of_the_text(name: str):
    form = FORMS[name]
    for end in ("97", "prime"):
        text = form.call.partition(end)[0]
        answer = parse(text, name)
        if name.startswith("llama3") and end == "prime":  # no token says that this begins a call
            assert answer == Answer(content=text)
            continue
        assert answer == Answer(content=text.strip("\n"), is_complete=False, error=answer.error)
        assert answer.error.startswith("tool call that does not end: ")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("[1]", "tool arguments that are not an object"),
        ("null", "tool arguments that are not an object"),
        ('"{}"', "tool arguments that are not an object"),
        ('{"n": NaN}', "tool arguments that are not JSON"),
        ('{"n": 1e999}', "tool arguments that are not JSON"),
        ('{"n": "\\ud800"}', "tool arguments that are not JSON"),  # half a character, which no file can hold
        ('{"n": ' + "[" * 5000 + "]" * 5000 + "}", "tool call that is not as its family writes it"),
        ('{"n": ' + "1" * 5000 + "}", "tool call that is not as its family writes it"),
    ],
)
def test_arguments_that_are_none(arguments: str, reason: str):
    for name in ("qwen3", "llama3_1", "mistral_nemo", "mistral_small_3_2", "deepseek_v3", "gpt_oss"):
        text = FORMS[name].call.replace('{"n": 97}', arguments)
        answer = parse(text, name)
        assert answer.error.startswith(reason) and not answer.tool_calls and answer.is_complete


@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "mistral_nemo", "command_a_reasoning"])
def test_names_that_are_none(name: str):
    for other in ("3", "null", '" "', "[]"):
        answer = parse(FORMS[name].call.replace('"prime"', other), name)
        if name == "llama3_1" and other != '" "':
            assert answer.content and not answer.error  # JSON like any other
        else:
            assert answer.error.startswith("tool call without a name: ") and not answer.tool_calls


def test_a_call_in_json():
    call = FORMS["qwen3"].call
    no_arguments = {"type": "function", "function": {"name": "prime", "arguments": {}}}
    assert parse(call.replace(', "arguments": {"n": 97}', ""), "qwen3").tool_calls == [no_arguments]
    tagged = call.replace("97", '"</tool_call><think>\\n"')  # what stands in a string ends nothing
    assert parse(tagged, "qwen3").tool_calls[0]["function"]["arguments"] == {"n": "</tool_call><think>\n"}
    for text in ("<tool_call>\n[1]\n</tool_call>", XML_CALL):
        assert parse(text, "qwen3").error.startswith("tool call that is not as its family writes it: ")
    assert parse(call, "qwen3_5").error.startswith("tool call that is not as its family writes it: ")


def test_ids_that_a_format_writes():
    nemo = FORMS["mistral_nemo"].call.replace("}}", '}, "id": "call00001"}')
    named = FORMS["mistral_small_3_2"].call.replace("[ARGS]", "[CALL_ID]call00001[ARGS]")
    command = FORMS["command_a_reasoning"].call.replace('{"tool_name"', '{"tool_call_id": "0", "tool_name"')
    [call] = parse_answer(KIMI.call, "kimi_k2", "", PRIME_TOOLS).tool_calls
    assert call == {**PRIME, "id": "functions.prime:0"}
    assert parse(nemo, "mistral_nemo").tool_calls == [{**PRIME, "id": "call00001"}]
    assert parse(named, "mistral_small_3_2").tool_calls == [{**PRIME, "id": "call00001"}]
    assert parse(command, "command_a_reasoning").tool_calls == [{**PRIME, "id": "0"}]
    assert parse(HERMES.call.replace("}}", '}, "id": "x"}'), "qwen3").tool_calls == [PRIME]  # whose format has none


@pytest.mark.parametrize(
    "header",
    [
        "<|channel|>commentary to=functions.prime <|constrain|>json<|message|>",
        " to=functions.prime<|channel|>commentary <|constrain|>json<|message|>",
        "<|channel|>commentary to=functions.prime<|message|>",
        "<|channel|>analysis to=functions.prime code<|message|>",
    ],
)
def test_calls_as_gpt_oss_itself_writes_them(header: str):
    for before in ("", "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"):
        answer = parse(before + header + '{"n": 97}<|call|>', "gpt_oss")
        assert answer == Answer("hm" if before else None, tool_calls=[PRIME])
    preamble = "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant"
    assert parse(preamble + header + '{"n": 97}', "gpt_oss") == Answer(content="I look.", tool_calls=[PRIME])
    assert parse("<|channel|>final<|message|>to=functions.prime", "gpt_oss") == Answer(content="to=functions.prime")


def test_llamas_builtin_tools():
    call = '<|python_tag|>brave_search.call(query="who won")'
    expected = {"type": "function", "function": {"name": "brave_search", "arguments": {"query": "who won"}}}
    assert parse(call + "<|eom_id|>", "llama3_1") == Answer(tool_calls=[expected])
    assert parse("<|python_tag|>" + LLAMA.call, "llama3_1") == Answer(tool_calls=[PRIME])
    for text in ("<|python_tag|>print(1)", "<|python_tag|>1 + 1", "<|python_tag|>"):
        assert parse(text, "llama3_1") == Answer(
            None, text, error=parse(text, "llama3_1").error, is_complete=")" in text
        )
    assert not parse(call[:-3], "llama3_1").is_complete


def test_python_calls_of_lfm():
    def arguments(text: str) -> dict | None:
        answer = parse(f"<|tool_call_start|>[prime({text})]<|tool_call_end|>", "lfm2_5")
        return answer.tool_calls[0]["function"]["arguments"] if answer.tool_calls else None

    assert arguments("97") == {"n": 97}  # by its place among the tool's parameters
    assert arguments("n='a\nb', x=True, y=null, z={\"a\": [1, false]}") == {
        **{"n": "a\nb", "x": True, "y": None},
        "z": {"a": [1, False]},
    }
    assert arguments("n=(1, 2)") == {"n": [1, 2]}
    for text in ("1, 2", "n=now()", "n={1, 2}", "**{'n': 1}", "97, n=97", "n=b'x'", "n=1j", "n={[1]: 2}"):
        assert arguments(text) is None
    for text in ("prime", "[prime]", "[prime(n=97), 3]", "(" * 300, "\0"):
        assert parse(f"<|tool_call_start|>{text}<|tool_call_end|>", "lfm2_5").error


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("97", {"type": "integer"}, 97),
        ("97", {"type": "string"}, "97"),
        ("97", {}, "97"),
        ("97", {"type": "number"}, 97),
        ("97.0", {"type": "integer"}, 97),
        ("97.5", {"type": "integer"}, "97.5"),
        ("97.5", {"type": "number"}, 97.5),
        ("true", {"type": "integer"}, "true"),
        ("true", {"type": "boolean"}, True),
        ("False", {"type": "boolean"}, False),
        ("maybe", {"type": "boolean"}, "maybe"),
        ("None", {"type": ["string", "null"]}, None),
        ("null", {"type": "string", "nullable": True}, None),
        ("None", {"type": "string"}, "None"),
        ("7", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, 7),
        ("7", {"oneOf": [{"type": "integer"}, {"type": "string"}]}, 7),
        ("x", {"oneOf": [{"type": "integer"}, {"type": "string"}]}, "x"),
        ("7", {"type": {"description": "no type"}}, "7"),
        ('{"a": [1, null]}', {"type": "object"}, {"a": [1, None]}),
        ("[1]", {"type": "object"}, "[1]"),
        ("[1]", {"type": "array"}, [1]),
        ("[1", {"type": "array"}, "[1"),
        ("\n a\n\n b ", {"type": "string"}, "\n a\n\n b "),  # a string is what stands between its line breaks
        ("a </parameter> b </arg_value> c", {"type": "string"}, "a </parameter> b </arg_value> c"),
        ("", {"type": "string"}, ""),
    ],
)
def test_a_schema_types_what_stands_between_tags(text: str, schema: dict, value: object):
    tools = [{"name": "prime", "parameters": {"properties": {"n": schema}}}]
    for name in ("qwen3_5", "step3_5", "nemotron_3", "glm4_6"):
        [call] = parse_answer(FORMS[name].call.replace("97", text), name, "", tools).tool_calls
        assert call["function"]["arguments"] == {"n": value}
        assert type(call["function"]["arguments"]["n"]) is type(value)


def test_a_value_in_gemmas_words():
    text = (
        '<|tool_call>call:a.b{x:<|"|>1, {y:2} "q"<|"|>,on:true,l:[1.5,null,<|"|><|"|>],o:{k:<|"|>v<|"|>}}<tool_call|>'
    )
    arguments = {"x": '1, {y:2} "q"', "on": True, "l": [1.5, None, ""], "o": {"k": "v"}}
    assert parse(text, "gemma4") == Answer(
        tool_calls=[{"type": "function", "function": {"name": "a.b", "arguments": arguments}}]
    )


# ---------------------------------------------------------------- thoughts


@with_thoughts
def test_thoughts_written_by_hand(name: str):
    start, thought, end = THOUGHTS.get(name, ("<think>\n", "hm\n", "</think>\n\n"))
    assert parse(f"{start}{thought}{end}Yes.", name) == Answer("hm", "Yes.")
    assert parse(f"{start}{thought}", name) == Answer("hm", is_complete=False)
    assert parse(start, name) == Answer("", is_complete=False)
    assert parse(f"{start}{thought}{end}", name) == Answer("hm")
    assert parse(f"{start}\n{end}Yes.", name) == Answer(None, "Yes.")
    assert parse(f"{start}\n{end}{start}{thought}{end}Yes.", name) == Answer("hm", "Yes.")
    assert parse(f"{start}{thought}{end}{start}more", name) == Answer("hm\n\nmore", is_complete=False)
    assert parse("Yes.", name) == Answer(None, "Yes.")
    for stop in FORMATS[name].stops:
        assert parse(f"{start}{thought}{stop}", name) == Answer("hm", is_complete=False)
        assert parse(stop, name) == parse("", name) == Answer()
    if name in FORMS:
        call = FORMS[name].call
        assert parse(f"{start}{thought}{call}", name).tool_calls == []
        if name != "gpt_oss":
            assert parse(f"{start}{thought}{call}{end}No.", name).tool_calls == []
        assert parse(f"{start}{thought}{end}{call}", name) == Answer("hm", "", [PRIME])
        broken = parse(f"{start}{thought}{end}{FORMS[name].broken}", name)
        assert broken.reasoning == "hm" and "hm" not in broken.content and broken.error


OPENED = ("qwen3_thinking_2507", "qwq", "qwen3_5", "qwen3_6", "qwen3_8", "deepseek_r1_distill", "deepseek_v3")
OPENED = (*OPENED, "nemotron_3", "step3_5", "nemotron_3_5", "minimax_m2", "glm4_7", "olmo_3_think")
QUESTION = [{"role": "user", "content": "Is <think> a tag?"}]


@every_family
def test_a_thought_that_the_prompt_opens(family: Family):
    prompt = family.history(QUESTION, None) + family.prompt(QUESTION)
    for text in ("", "hm"):
        answer = parse_answer(text, family.name, prompt)
        assert answer == (Answer(text, is_complete=False) if family.name in OPENED else Answer(None, text))
    if family.name in OPENED:
        assert parse_answer("hm\n</think>\n\nYes.", family.name, prompt) == Answer("hm", "Yes.")
        assert parse_answer("\n</think>\n\nYes.", family.name, prompt) == Answer(None, "Yes.")
        assert parse_answer("<think>\nhm\n</think>\n\nYes.", family.name, prompt) == Answer("hm", "Yes.")
    if "enable_thinking" in family.arguments and family.name != "gemma4":
        closed = family.history(QUESTION, None, enable_thinking=False) + family.prompt(QUESTION, enable_thinking=False)
        assert parse_answer("Yes.", family.name, closed) == Answer(None, "Yes.")
        assert parse_answer("<think>\nhm\n</think>\n\nYes.", family.name, closed) == Answer("hm", "Yes.")


def test_a_gemma4_prompt_after_a_tool_reply_opens_the_thought():
    prompt = "<bos>…<tool_response|><|channel>thought\n"
    assert parse_answer("hm\n<channel|>Yes.<turn|>", "gemma4", prompt) == Answer("hm", "Yes.")
    assert parse_answer("hm", "gemma4", prompt) == Answer("hm", is_complete=False)


def test_what_a_server_delivers_apart_is_no_open_thought():
    """It takes the thought out, or shows the end alone of one that its prompt opened; control tokens may be gone."""
    for family in ALL_FAMILIES:
        assert parse_answer("Yes.", family.name, "") == Answer(None, "Yes.")
    assert parse_answer("hm\n</think>\n\nYes.", "qwen3", "") == Answer("hm", "Yes.")
    assert parse_answer("hm<channel|>Yes.", "gemma4", "") == Answer("hm", "Yes.")
    assert parse_answer("Yes.<|END_RESPONSE|>", "command_a_reasoning", "") == Answer(None, "Yes.")
    assert parse_answer("finalYes.", "gpt_oss", "") == Answer(None, "finalYes.")
    assert parse_answer("<|channel|>final<|message|>Yes.<|end|>", "gpt_oss", "") == Answer(None, "Yes.")
    assert parse_answer('[{"name": "prime", "arguments": {}}]', "mistral_nemo", "").tool_calls == []


# ---------------------------------------------------------------- the exceptions that the module names


def test_line_breaks_at_edges_are_the_formats():
    assert parse("<think>\n\n\nhm\n\n\n</think>\n\n\n\nYes.\n\n", "qwen3") == Answer("hm", "Yes.")
    assert parse("<think>\n  hm\n</think>\n\n    return 1  ", "qwen3") == Answer("  hm", "    return 1  ")
    assert parse("<think>\n \t\n</think>\n\n  ", "qwen3") == Answer(None, "  ")


def test_the_parts_of_a_nanochat_answer_keep_their_markers():
    text = "Let me see: <|python_start|>3 * 4<|python_end|><|output_start|>12<|output_end|> It is 12."
    assert parse(text + "<|assistant_end|>", "nanochat") == Answer(None, text)
    assert parse("3 * 4 <|python_end|>", "nanochat") == Answer(None, "3 * 4 <|python_end|>")


def test_the_text_beside_a_call_of_gpt_oss_is_a_thought():
    message = {"role": "assistant", "content": "I look.", "tool_calls": [PRIME]}
    text = "".join(part for part, _ in BY_NAME["gpt_oss"].output([*QUESTION, message]))
    assert parse(text, "gpt_oss") == Answer("I look.", "", [PRIME])


def test_without_the_tool_what_stands_between_tags_is_text():
    text_call = {"type": "function", "function": {"name": "prime", "arguments": {"n": "97"}}}
    other = [{"name": "other", "parameters": {"properties": {"n": {"type": "integer"}}}}]
    for name in ("qwen3_5", "step3_5", "nemotron_3", "glm4_6"):
        for tools in (None, [], other, [{"name": "prime"}], [{"name": "prime", "parameters": {"properties": None}}]):
            assert parse_answer(FORMS[name].call, name, "", tools) == Answer(tool_calls=[text_call])
    assert parse_answer(XML_CALL, "qwen3_5", "", json.dumps(PRIME_TOOLS)).tool_calls == [PRIME]
    with pytest.raises(InvalidRow):
        parse_answer(XML_CALL, "qwen3_5", "", [{"parameters": {}}])
    with pytest.raises(KeyError):
        parse_answer("Yes.", "qwen17", "")


def test_strings_that_are_written_unescaped():
    def read(value: str) -> Answer:
        call = {"type": "function", "function": {"name": "prime", "arguments": {"n": value}}}
        message = {"role": "assistant", "content": "", "tool_calls": [call]}
        return parse("".join(part for part, _ in BY_NAME["lfm2_5"].output([*QUESTION, message])), "lfm2_5")

    assert read("it's").error and not read("it's").tool_calls
    assert read("a\\nb").tool_calls[0]["function"]["arguments"] == {"n": "a\nb"}
    assert read('é\r\n😀"').tool_calls[0]["function"]["arguments"] == {"n": 'é\r\n😀"'}
    assert parse('<|python_tag|>brave_search.call(query="a "b"")', "llama3_1").error


def test_control_tokens_in_a_text_mean_what_they_mean():
    assert parse("<think> opens a thought.", "qwen3") == Answer(" opens a thought.", is_complete=False)
    assert parse("A thought ends in </think>, yes.", "qwen3") == Answer("A thought ends in ", ", yes.")
    assert parse("A <think>hm</think> or two.", "qwen3") == Answer("hm", "A  or two.")
    assert parse("A <think> is a tag.", "qwen3") == Answer(" is a tag.", is_complete=False)
    assert parse("<think>a</think>b</think>c", "qwen3") == Answer("a", "b</think>c")
    assert parse("Write <tool_call> first.", "qwen3").error
    assert parse("Write <tool_call> first.", "gemma3") == Answer(None, "Write <tool_call> first.")
    assert parse('Such as {"name": "x", "parameters": {}}', "llama3_1").tool_calls
    for text in ('{"name": "Bob", "age": 3}', '{"name": "Bob"', "{}", '{"name": "x", "param'):
        assert parse(text, "llama3_1") == Answer(None, text)
    assert parse("Strike <s>this</s> out.</s>", "mistral_nemo") == Answer(None, "Strike <s>this</s> out.")
    assert parse("Strike <s>this</s>", "qwen3") == Answer(None, "Strike <s>this</s>")


# ---------------------------------------------------------------- nothing that a model writes stops the parser

FRAGMENTS = sorted({token for family in ALL_FAMILIES for token in (*family.special, *family.plain)})
FRAGMENTS += ['{"name": "x", "parameters": {', '<|"|>', "\\", "'", '"', "\0", "\ud800", "1e999", "é", "x", "\n", " "]


@pytest.mark.parametrize("name", FORMATS)
def test_any_text_is_an_answer(name: str):
    random = Random(name)
    own = []
    if name in FORMS:
        call = FORMS[name].call
        own = [call, call, call, call[: len(call) // 2], *re.split(r"(?<=[>{}\]\[(),])", call)]
    seen = Counter()
    for _ in range(TEXTS):
        text = "".join(random.choices([*FRAGMENTS, *own * 5], k=random.randrange(6)))
        answer = parse(text, name, random.choice(["", "<think>\n"]))
        assert not (answer.error and answer.tool_calls)
        assert answer.is_complete or not answer.tool_calls
        json.dumps(answer.tool_calls, allow_nan=False, ensure_ascii=False).encode()
        for call in answer.tool_calls:
            assert call["type"] == "function" and call["function"].keys() == {"name", "arguments"}
            assert isinstance(call["function"]["name"], str) and isinstance(call["function"]["arguments"], dict)
        seen["error"] += bool(answer.error)
        seen["cut"] += not answer.is_complete
        seen["calls"] += bool(answer.tool_calls)
    assert seen["cut"]
    if name in FORMS:
        assert seen["error"] and seen["calls"], seen


# ---------------------------------------------------------------- another reader: TRL's response templates
TRL_TEMPLATES = {
    **{
        name: trl_templates.qwen3_template
        for name, form in FORMS.items()
        if form is HERMES and name != GENERIC and "granite" not in name
    },
    **{name: trl_templates.qwen3_5_template for name in ("qwen3_5", "qwen3_6", "qwen3_8", "step3_5")},
    "nemotron_3": trl_templates.nemotron_3_template,
    "llama3_1": trl_templates.llama3_template,
    "gpt_oss": trl_templates.gptoss_template,
    "gemma4": trl_templates.gemma4_template,
    "lfm2_5": trl_templates.lfm2_2_5_template,
    "deepseek_r1_distill": trl_templates.deepseek_r1_distill_template,
}


@pytest.mark.parametrize("name", TRL_TEMPLATES)
def test_trls_response_templates_read_the_same(name: str):
    """Of whole answers, but for their edges. GLM's leaves the stop of a call in the text, and is left out."""
    family, seen = BY_NAME[name], Counter()
    for written in samples(family):
        unknown = "<|eom_id|>" in written.stop or "<|constrain|>" in written.text  # to TRL's templates
        if unknown or is_unescaped(family, written):
            continue
        text = written.text + written.stop
        theirs = parse_response(text, TRL_TEMPLATES[name], prefix=written.prompt, tools=TYPED)
        ours = parse_answer(text, name, written.prompt, TYPED)
        reasoning = theirs.get("reasoning_content") or theirs.get("thinking") or ""
        assert (ours.reasoning or "").strip() == reasoning.strip()
        assert ours.content.strip() == (theirs.get("content") or "").strip()
        assert ours.tool_calls == theirs.get("tool_calls", [])
        seen["answers"] += 1
        seen["calls"] += bool(ours.tool_calls)
    assert seen["answers"] > EXAMPLES // 2 and seen["calls"] >= 5 * family.tools, seen


# ---------------------------------------------------------------- which family a template is of


@every_family
def test_a_template_of_ours_is_known_in_both_forms(family: Family):
    source = template(family.name)
    assert find_family(source) == find_family(serving(source)) == family.name
    assert find_family({"default": source, "tool_use": ""}) == family.name
    unnamed = re.sub(r"{#.*?#}", "", source, flags=re.DOTALL)
    assert FORMATS[find_family(unnamed)] == FORMATS[family.name], "another format is seen where its name is gone"


@every_family
def test_a_published_template_is_of_a_family_that_answers_alike(family: Family):
    if not family.upstream:
        pytest.skip("not in this family: a template that TRL carries")
    found = find_family((UPSTREAM / family.upstream).read_text(encoding="utf-8"))
    assert FORMATS[found] == FORMATS[family.name]


def test_a_template_of_no_family_is_generic():
    foreign = "{% for m in messages %}### {{ m.role }}: {{ m.content }}\n{% endfor %}{# <|im_start|> [TOOL_CALLS] #}"
    assert find_family(foreign.replace("###", "<|im_start|>")) == "chatml"
    for unknown in (None, "", {}, {"tool_use": "x"}, foreign):
        assert find_family(unknown) == GENERIC
    assert parse("<think>\nhm\n</think>\n\n" + HERMES.call + "<end_of_turn>", GENERIC) == Answer("hm", "", [PRIME])
