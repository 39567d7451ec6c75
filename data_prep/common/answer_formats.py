"""How each family of chat_templates/ writes an answer: its thought, its tool calls, the tokens that it stops on.

A new family is one row of FORMATS; one whose calls look like no other's is a class with `start` and `read` besides.
"""

import ast
import json
import re
import warnings
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from .errors import InvalidRow
from .rendering import FAMILY_STOPS

CUT = "tool call that does not end"
BROKEN = "tool call that is not as its family writes it"
SHOWN_TEXT = 80  # characters of a call in an error

Tools = dict[str, dict[str, object]]  # of each function by its name: parameters and their schemas, in their order
Call = dict[str, object]  # name, arguments, and id where the format writes one


class ReadCalls(NamedTuple):
    """The calls that one opening holds, and where the text behind them begins."""

    calls: list[Call]
    end: int


class CallSyntax(Protocol):
    """How a family writes calls. read: those that begin at a position, behind a match of start; raises InvalidRow."""

    start: str

    def read(self, text: str, position: int, tools: Tools) -> ReadCalls: ...


def describe_failure(text: str, position: int, mark: str) -> InvalidRow:
    """Return why a call that begins at a position cannot be read: cut off, where what must stand in it never comes."""
    call = text[position:]
    return InvalidRow(BROKEN if mark in call else CUT, repr(call[:SHOWN_TEXT]))


def match_at(pattern: str, text: str, position: int, start: int, mark: str) -> re.Match:
    """Return the match of a pattern at a position of a call that begins at start. Raises InvalidRow."""
    match = re.compile(pattern, re.DOTALL).match(text, position)
    if match is None:
        raise describe_failure(text, start, mark)
    return match


# -- JSON -------------------------------------------------------------------------------------------------------------
DECODER = json.JSONDecoder()
BLANKS = re.compile(r"\s*")
BEGUN_VALUE = re.compile(r"[a-zE.+-]{0,5}")  # nothing, or what may be left of a literal or a number that is cut off


class ReadValue(NamedTuple):
    value: object
    end: int


def read_json(text: str, position: int) -> ReadValue:
    """Return the JSON value that begins at a position, blanks before it skipped. Raises InvalidRow."""
    start = BLANKS.match(text, position).end()
    try:
        return ReadValue(*DECODER.raw_decode(text, start))
    except json.JSONDecodeError as error:
        rest = text[error.pos :].strip()
        is_cut = error.msg.startswith(("Unterminated", "Invalid \\u")) or BEGUN_VALUE.fullmatch(rest)
        raise InvalidRow(CUT if is_cut else BROKEN, f"{error.msg} in {text[start:][:SHOWN_TEXT]!r}") from None
    except (ValueError, RecursionError) as error:  # a number of too many digits, too many brackets
        raise InvalidRow(BROKEN, str(error)) from None


@dataclass(frozen=True)
class JsonCalls:
    """A JSON object that is a call, or a list of them. end: a pattern; mark: what stands in every whole one."""

    start: str
    end: str
    mark: str
    name: str = "name"
    arguments: str = "arguments"
    id: str | None = None  # the key of it, where there is one

    def read(self, text: str, position: int, tools: Tools) -> ReadCalls:
        found = read_json(text, position)
        end = match_at(self.end, text, found.end, position, self.mark)
        items = found.value
        if not isinstance(items, list):
            items = [items]
        calls = []
        for item in items:
            if not isinstance(item, dict):
                raise InvalidRow(BROKEN, repr(text[position:][:SHOWN_TEXT]))
            call = {"name": item.get(self.name), "arguments": item.get(self.arguments, {})}
            if self.id in item:
                call["id"] = item[self.id]
            calls.append(call)
        return ReadCalls(calls, end.end())


@dataclass(frozen=True)
class NamedCalls:
    """A name in a header, a pattern with the groups name and perhaps id, and a JSON object of arguments behind it."""

    start: str
    header: str
    end: str
    mark: str

    def read(self, text: str, position: int, tools: Tools) -> ReadCalls:
        header = match_at(self.header, text, position, position, self.mark)
        found = read_json(text, header.end())
        end = match_at(self.end, text, found.end, position, self.mark)
        call = {"name": header["name"], "arguments": found.value}
        if header.groupdict().get("id"):
            call["id"] = header["id"]
        return ReadCalls([call], end.end())


# -- tags, between which a string and a number look alike -------------------------------------------------------------
VALUE = r"(?:(?!</?tool_call>).)*?"
BOOLEANS = {"true": True, "True": True, "false": False, "False": False}
JSON_TYPES = {"integer": int, "number": (int, float), "object": dict, "array": list}


def list_types(schema: object) -> list[str]:
    """Return the types that a JSON schema allows, those of its alternatives too."""
    if not isinstance(schema, dict):
        return []
    named = schema.get("type")
    if not isinstance(named, list):
        named = [named]
    types = [name for name in named if isinstance(name, str)]
    for key in ("anyOf", "oneOf"):
        for choice in schema.get(key) or []:
            types.extend(list_types(choice))
    if schema.get("nullable"):
        types.append("null")
    return types


def read_typed(text: str, schema: object) -> object:
    """Return the value of an argument's text: of the first type of its schema that reads it, else the text itself."""
    for name in list_types(schema):
        if name == "null" and text.strip() in ("null", "None"):
            return None
        if name == "boolean" and text.strip() in BOOLEANS:
            return BOOLEANS[text.strip()]
        if name not in JSON_TYPES:
            continue
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if name == "integer" and isinstance(value, float) and value.is_integer():  # 3.0 is an integer of JSON schema
            return int(value)
        if isinstance(value, JSON_TYPES[name]) and not isinstance(value, bool):
            return value
    return text


@dataclass(frozen=True)
class TaggedCalls:
    """A name and arguments in tags of their own; argument: a pattern with the groups key and value.

    A value may hold anything but the tags of a call: what never ends is not looked for in the next one.
    """

    start: str
    header: str
    argument: str
    end: str
    mark: str

    def read(self, text: str, position: int, tools: Tools) -> ReadCalls:
        header = match_at(self.header, text, position, position, self.mark)
        pattern = re.compile(self.argument, re.DOTALL)
        schemas = tools.get(header["name"], {})
        arguments = {}
        behind = header.end()
        argument = pattern.match(text, behind)
        while argument is not None:
            arguments[argument["key"]] = read_typed(argument["value"], schemas.get(argument["key"]))
            behind = argument.end()
            argument = pattern.match(text, behind)
        end = match_at(self.end, text, behind, position, self.mark)
        return ReadCalls([{"name": header["name"], "arguments": arguments}], end.end())


# -- forms of one family alone ----------------------------------------------------------------------------------------
def find_region(text: str, position: int, mark: str) -> ReadValue:
    """Return the text from a position to a mark, or to the end, and where the text behind it begins."""
    end = text.find(mark, position)
    if end == -1:
        return ReadValue(text[position:], len(text))
    return ReadValue(text[position:end], end + len(mark))


class GemmaCalls:
    """Gemma 4's call:name{key:value,key:<|"|>a text<|"|>}."""

    start = r"<\|tool_call>"
    header = re.compile(r"\s*call:(?P<name>[^{\s]+)")
    bare_key = re.compile(r'(?<=[{,])\s*([^\s{}\[\],:"]+)\s*(?=:)')

    def read(self, text: str, position: int, tools: Tools) -> ReadCalls:
        region = find_region(text, position, "<tool_call|>")
        header = self.header.match(region.value)
        if header is None:
            raise describe_failure(text, position, "<tool_call|>")
        pieces = region.value[header.end() :].split('<|"|>')
        for number, piece in enumerate(pieces):
            if number % 2:  # between two quotation marks
                pieces[number] = json.dumps(piece)
            else:
                pieces[number] = self.bare_key.sub(r'"\1"', piece)
        try:
            arguments = json.loads("".join(pieces))
        except (ValueError, RecursionError):
            raise describe_failure(text, position, "<tool_call|>") from None
        return ReadCalls([{"name": header["name"], "arguments": arguments}], region.end)


class Constants(ast.NodeTransformer):
    """JSON's true, false and null, which stand in python calls beside python's own."""

    names = {"true": True, "false": False, "null": None}

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(self.names[node.id]) if node.id in self.names else node


PYTHON_ERRORS = (ValueError, TypeError, SyntaxError, RecursionError, MemoryError)  # the last two: too many brackets
QUOTED = re.compile(r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"", re.DOTALL)


def escape_line_ends(quoted: re.Match) -> str:
    """Return a string of python with its line ends escaped, which templates write as they are."""
    return quoted[0].replace("\r", "\\r").replace("\n", "\\n")


def python_calls(text: str, tools: Tools) -> list[Call]:
    """Return the calls of a python call, or of a list of them, with literal arguments.

    An argument without a name takes that of the function's parameter in its place. Raises PYTHON_ERRORS.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of backslashes that escape nothing
        tree = ast.parse(QUOTED.sub(escape_line_ends, text.strip()), mode="eval")
    body = Constants().visit(tree.body)
    calls = []
    for node in body.elts if isinstance(body, ast.List) else [body]:
        if not isinstance(node, ast.Call):
            raise ValueError(f"{ast.unparse(node)} is not a call")
        name = ast.unparse(node.func)
        parameters = list(tools.get(name, {}))
        if len(node.args) > len(parameters):
            raise ValueError(f"{name} has more arguments than parameters")
        arguments = {}
        for parameter, value in zip(parameters, node.args, strict=False):
            arguments[parameter] = ast.literal_eval(value)
        for keyword in node.keywords:
            if keyword.arg is None or keyword.arg in arguments:
                raise ValueError(f"{name} has an argument without a name of its own")
            arguments[keyword.arg] = ast.literal_eval(keyword.value)
        calls.append({"name": name, "arguments": arguments})
    return calls


@dataclass(frozen=True)
class PythonCalls:
    """A list of python calls."""

    start: str
    mark: str  # what ends it

    def read(self, text: str, position: int, tools: Tools) -> ReadCalls:
        region = find_region(text, position, self.mark)
        try:
            return ReadCalls(python_calls(region.value, tools), region.end)
        except PYTHON_ERRORS:
            raise describe_failure(text, position, self.mark) from None


class MinimaxCalls:
    """MiniMax's block of invokes."""

    start = "<minimax:tool_call>"
    closed = re.compile(r"\s*(?:</minimax:tool_call>|\Z)")
    one = TaggedCalls(
        start="",
        header=r'\s*<invoke name="(?P<name>[^"<>]+)">',
        argument=r'\s*<parameter name="(?P<key>[^"]+)">'
        r"(?P<value>(?:(?!</?minimax:tool_call>|</invoke>\n).)*?)</parameter>"
        r"(?=\s*(?:<parameter name=|</invoke>))",
        end=r"\s*</invoke>",
        mark="</invoke>",
    )

    def read(self, text: str, position: int, tools: Tools) -> ReadCalls:
        calls = []
        end = position
        while not calls or self.closed.match(text, end) is None:
            found = self.one.read(text, end, tools)
            calls.extend(found.calls)
            end = found.end
        return ReadCalls(calls, self.closed.match(text, end).end())


class OlmoCalls:
    """OLMo 3's python calls, one a line."""

    start = "<function_calls>"

    def read(self, text: str, position: int, tools: Tools) -> ReadCalls:
        region = find_region(text, position, "</function_calls>")
        calls = []
        try:
            for line in region.value.strip().split("\n"):
                calls.extend(python_calls(line, tools))
        except PYTHON_ERRORS:
            raise describe_failure(text, position, "</function_calls>") from None
        return ReadCalls(calls, region.end)


class LlamaCalls:
    """Llama's JSON object, which is the whole rest of an answer, or one python call of a builtin tool."""

    json_calls = JsonCalls(start="", end=r'[\s;]*(?=\{\s*"name"|\Z)', mark="}", arguments="parameters")
    start = r'<\|python_tag\|>|(?=\{\s*"name"\s*:\s*"[^"]*"\s*,\s*"parameters"\s*:)'

    def read(self, text: str, position: int, tools: Tools) -> ReadCalls:
        if text[position:].lstrip().startswith("{"):
            return self.json_calls.read(text, position, tools)
        try:
            calls = python_calls(text[position:], tools)
        except PYTHON_ERRORS:
            raise describe_failure(text, position, ")") from None
        for call in calls:
            call["name"] = call["name"].removesuffix(".call")
        return ReadCalls(calls, len(text))


class Llama4Calls:
    """Llama 4's objects, which stand behind a python block."""

    one = JsonCalls(start="", end=r"\s*(?=\{|\Z)", mark="}", arguments="parameters")
    start = r"<\|python_end\|>\s*(?=\{)|" + LlamaCalls.start

    def read(self, text: str, position: int, tools: Tools) -> ReadCalls:
        calls = []
        while text.startswith("{", position):
            found = self.one.read(text, position, tools)
            calls.extend(found.calls)
            position = found.end
        return ReadCalls(calls, position)


# -- the table --------------------------------------------------------------------------------------------------------
NOTHING = r"(?!)"  # a pattern that matches nowhere


@dataclass(frozen=True)
class AnswerFormat:
    """What stands around and in an answer; all but the stops are patterns."""

    stops: tuple[str, ...]  # tokens that may end it
    calls: CallSyntax | None = None
    thought_start: str = "<think>"
    thought_end: str = "</think>"
    lone_end: bool = True  # an end without a start closes a thought that the prompt has opened
    envelope: str = NOTHING  # what stands around a text and is no part of it

    @property
    def call_start(self) -> str:
        """What begins a call."""
        return NOTHING if self.calls is None else self.calls.start


CHATML_STOPS = ("<|im_end|>", "<|endoftext|>")
HERMES_CALLS = JsonCalls(start="<tool_call>", end=r"\s*(?:</tool_call>|\Z)", mark="</tool_call>")
HERMES = AnswerFormat(CHATML_STOPS, HERMES_CALLS)
XML = AnswerFormat(
    CHATML_STOPS,
    TaggedCalls(
        start="<tool_call>",
        header=r"\s*<function=(?P<name>[^>\n]+)>",
        argument=rf"\s*<parameter=(?P<key>[^>\n]+)>\n?(?P<value>{VALUE})\n?</parameter>"
        r"(?=\s*(?:<parameter=|</function>))",
        end=r"\s*</function>(?:\s*</tool_call>)?",
        mark="</tool_call>",
    ),
)
GLM = AnswerFormat(
    ("<|user|>", "<|observation|>", "<|endoftext|>"),
    TaggedCalls(
        start="<tool_call>",
        header=r"\s*(?P<name>[^\s<]+)",
        argument=r"\s*<arg_key>(?P<key>[^<]+)</arg_key>\s*"
        rf"<arg_value>(?P<value>{VALUE})</arg_value>(?=\s*(?:<arg_key>|</tool_call>))",
        end=r"\s*</tool_call>",
        mark="</tool_call>",
    ),
)
LLAMA = AnswerFormat(("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"), LlamaCalls())
LLAMA4 = AnswerFormat(("<|eot|>", "<|eom|>"), Llama4Calls(), envelope=r"<\|python_(?:start|end)\|>")
GEMMA = AnswerFormat(("<end_of_turn>", "<eos>"))
GEMMA4 = AnswerFormat(
    ("<turn|>", "<|tool_response>", "<eos>"),
    GemmaCalls(),
    thought_start=r"<\|channel>\w*",
    thought_end=r"<channel\|>",
)
DEEPSEEK = AnswerFormat(
    ("<｜end▁of▁sentence｜>",),
    NamedCalls(
        start="<｜tool▁call▁begin｜>",
        header=r"\w+<｜tool▁sep｜>(?P<name>[^\n]+)\n```json\n",
        end=r"\s*(?:```\s*(?:<｜tool▁call▁end｜>|\Z)|\Z)",
        mark="<｜tool▁call▁end｜>",
    ),
    envelope="<｜tool▁calls▁(?:begin|end)｜>",
)
DEEPSEEK_V3_1 = AnswerFormat(
    ("<｜end▁of▁sentence｜>",),
    NamedCalls(
        start="<｜tool▁call▁begin｜>",
        header="(?P<name>[^<]+)<｜tool▁sep｜>",
        end=r"\s*(?:<｜tool▁call▁end｜>|\Z)",
        mark="<｜tool▁call▁end｜>",
    ),
    envelope="<｜tool▁calls▁(?:begin|end)｜>",
)
KIMI = AnswerFormat(  # the name stands in the id: functions.NAME:N
    ("<|im_end|>", "[EOS]"),
    NamedCalls(
        start=r"<\|tool_call_begin\|>",
        header=r"\s*(?P<id>(?:functions\.)?(?P<name>[^<:]+?)(?::\d+)?)\s*<\|tool_call_argument_begin\|>",
        end=r"\s*(?:<\|tool_call_end\|>|\Z)",
        mark="<|tool_call_end|>",
    ),
    envelope=r"<\|tool_calls_section_(?:begin|end)\|>",
)
MINIMAX = AnswerFormat(("[e~[",), MinimaxCalls())
MISTRAL_LIST = AnswerFormat(("</s>",), JsonCalls(start=r"\[TOOL_CALLS\]", end=r"\s*\Z", mark="]", id="id"))
MISTRAL_NAMED = AnswerFormat(
    ("</s>",),
    NamedCalls(
        start=r"\[TOOL_CALLS\]",
        header=r"(?P<name>[^\[{\s]+)(?:\[CALL_ID\](?P<id>[^\[]*))?\[ARGS\]",
        end=r"\s*(?=\[TOOL_CALLS\]|\Z)",
        mark="[ARGS]",
    ),
)
MISTRAL_THINKS = AnswerFormat(
    ("</s>",), MISTRAL_NAMED.calls, thought_start=r"\[THINK\]", thought_end=r"\[/THINK\]", lone_end=False
)
HARMONY = AnswerFormat(  # gpt-oss itself also names the channel before the function, and constrains to json
    ("<|return|>", "<|call|>"),
    NamedCalls(
        start=r"(?:\A|<\|start\|>assistant|<\|channel\|>(?:commentary|analysis))\s*to=",
        header=r"functions\.(?P<name>[^\s<]+)\s*(?:<\|(?:channel|constrain)\|>\s*)?[^<]*"
        r"(?:<\|constrain\|>[^<]*)?<\|message\|>",
        end=r"\s*(?:<\|call\|>|\Z)",
        mark="<|message|>",
    ),
    thought_start=r"(?:<\|start\|>assistant)?<\|channel\|>analysis<\|message\|>",
    thought_end=r"<\|end\|>",
    lone_end=False,
    # headers, also those that are cut off
    envelope=r"<\|end\|>|<\|start\|>(?:assistant(?: to\Z)?|\w*\Z)|"
    r"<\|channel\|>(?:(?:final|commentary)<\|message\|>|\w*\Z)",
)
COMMAND = AnswerFormat(
    ("<|END_OF_TURN_TOKEN|>",),
    JsonCalls(
        start=r"<\|START_ACTION\|>",
        end=r"\s*(?:<\|END_ACTION\|>|\Z)",
        mark="<|END_ACTION|>",
        name="tool_name",
        arguments="parameters",
        id="tool_call_id",
    ),
    thought_start=r"<\|START_THINKING\|>",
    thought_end=r"<\|END_THINKING\|>",
    envelope=r"<\|(?:START|END)_RESPONSE\|>",
)
GRANITE = AnswerFormat(("<|end_of_text|>",), HERMES_CALLS)
OLMO = AnswerFormat(("<|endoftext|>", "<|im_end|>"), OlmoCalls())
LFM = AnswerFormat(CHATML_STOPS, PythonCalls(start=r"<\|tool_call_start\|>", mark="<|tool_call_end|>"))

GENERIC = "generic"
FORMATS = {
    "chatml": HERMES,
    "command_a": COMMAND,
    "command_a_reasoning": COMMAND,
    "deepseek_r1": DEEPSEEK,
    "deepseek_r1_distill": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "deepseek_v3_1": DEEPSEEK_V3_1,
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "gemma4": GEMMA4,
    "glm4_6": GLM,
    "glm4_7": GLM,
    "gpt_oss": HARMONY,
    "granite_4": GRANITE,
    "granite_4_1": GRANITE,
    "kimi_k2": KIMI,
    "kimi_k2_thinking": KIMI,
    "lfm2_5": LFM,
    "llama3": LLAMA,
    "llama3_1": LLAMA,
    "llama3_2": LLAMA,
    "llama4": LLAMA4,
    "minimax_m2": MINIMAX,
    "ministral_3": MISTRAL_NAMED,
    "ministral_3_reasoning": MISTRAL_THINKS,
    "mistral_7b_v0_3": MISTRAL_LIST,
    "mistral_nemo": MISTRAL_LIST,
    "mistral_small_3_2": MISTRAL_NAMED,
    "nanochat": AnswerFormat(("<|assistant_end|>",)),
    "nemotron_3": XML,
    "nemotron_3_5": XML,
    "olmo_3": OLMO,
    "olmo_3_think": OLMO,
    "phi4": AnswerFormat(CHATML_STOPS),
    "phi4_mini": AnswerFormat(("<|end|>", "<|endoftext|>")),
    "qwen2_5": HERMES,
    "qwen3": HERMES,
    "qwen3_5": XML,
    "qwen3_6": XML,
    "qwen3_8": XML,
    "qwen3_coder": XML,
    "qwen3_coder_next": XML,
    "qwen3_instruct_2507": HERMES,
    "qwen3_thinking_2507": HERMES,
    "qwq": HERMES,
    "smollm3": HERMES,
    "step3_5": XML,
    "step3_qwen3": HERMES,
    "tiny_aya": COMMAND,
    GENERIC: AnswerFormat(FAMILY_STOPS, HERMES_CALLS),
}
SIGNATURES = {  # what only templates of one format write: a family of that format; the first one counts
    "<|START_ACTION|>": "command_a_reasoning",
    "<|START_RESPONSE|>": "tiny_aya",
    "<|tool_calls_section_begin|>": "kimi_k2",
    "<minimax:tool_call>": "minimax_m2",
    "<function_calls>": "olmo_3",
    "<functions>": "olmo_3",
    "<|start_of_role|>": "granite_4",
    "<|header_start|>": "llama4",
    "<|channel|>analysis": "gpt_oss",
    "<|end|>": "phi4_mini",
    "<|tool_call>call:": "gemma4",
    "<|tool_call_start|>": "lfm2_5",
    "<arg_key>": "glm4_6",
    "tool_call_name<｜tool▁sep｜>": "deepseek_v3_1",
    "<｜Assistant｜></think>": "deepseek_v3_1",
    "<｜Assistant｜>": "deepseek_v3",
    "[THINK]": "ministral_3_reasoning",
    "[ARGS]": "mistral_small_3_2",
    "[TOOL_CALLS]": "mistral_nemo",
    "<parameter=": "qwen3_5",
    "<|start_header_id|>": "llama3_1",
    "<start_of_turn>": "gemma3",
    "<|assistant_start|>": "nanochat",
    "<|im_sep|>": "phi4",
    "<tool_call>": "chatml",
    "<|im_start|>": "chatml",
}
