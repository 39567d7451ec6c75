"""Take a model's answer apart as its chat template's family writes it: thought, text, tool calls.

What a family's model must write for a message is read back as that message, but for these:

- line breaks at the edges of a thought and of a text belong to the format and are stripped; a blank thought is none;
- what a format strips, encodes or has no word for comes back as it was written: texts trimmed by their template; the
  text beside a call of gpt_oss, which its format makes a thought; the parts of a nanochat answer, with their markers;
- families that write arguments between tags (XML, GLM) write 7 and "7" alike: with the function among the tools its
  schema tells them apart, without they are texts;
- a string with a quotation mark or a backslash in a call of LFM2.5 or of Llama's builtin tools, which write them
  unescaped, is an invalid call or another string;
- control tokens in a text mean what they mean: <think> opens a thought, a lone </think> closes one that the text did
  not open, <tool_call> begins a call. In Llama, whose calls have no tokens, a JSON object of name and parameters is a
  call, and one that is cut before its parameters is text;
- Command's call ids are numbers in the conversation, not those of the message.

transformers' parse_response with TRL's response templates reads whole answers alike;
tests/templates/test_answers.py compares the two. It is not used, because what models also write comes out wrong: a call
cut between its tags is a call with fewer arguments, text behind a call replaces the text before it, a thought that
never ends looks like one that does.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

from .answer_formats import CUT, FORMATS, GENERIC, SHOWN_TEXT, SIGNATURES, AnswerFormat, Call, Tools
from .errors import InvalidRow
from .parsing import parse_tools
from .rendering import COMMENTS, TEMPLATES


@dataclass
class Answer:
    """What an answer says.

    reasoning: of closed thoughts that are not blank, else None; where one never ends all of it, and nothing else.
    content: the text beside thoughts and calls; where a call does not parse, the calls stand in it as written.
    tool_calls: [{"type": "function", "function": {"name", "arguments"}}], with the id where the format writes one;
    none where one of them does not parse.
    is_complete: no thought and no call is cut off. A call without its closing tag is whole where its arguments are.
    error: why the calls do not parse, "" where they do. A thought that never ends is no error.
    """

    reasoning: str | None = None
    content: str = ""
    tool_calls: list[dict] = field(default_factory=list)
    is_complete: bool = True
    error: str = ""


THOUGHT = "thought"
OPEN_THOUGHT = "thought that never ends"
TEXT = "text"
CALLS = "calls"


class Part(NamedTuple):
    """A piece of an answer as it is written, a thought without its tags, and where what follows begins."""

    kind: str
    text: str
    end: int
    calls: list[dict]


def parse_answer(text: str, family: str, prompt: str, tools: list[dict] | str | None = None) -> Answer:
    """Return what a model's answer says; whatever the model wrote, nothing is raised.

    text: with its control tokens; the stop token may be there or not. family: as find_family names it. prompt: what the
    answer goes on from; its end may open the thought. Pass "" where a server delivers the thought apart.
    tools: those of the request. Raises KeyError for an unknown family, InvalidRow for tools that are none.
    """
    answer_format = FORMATS[family]
    parameters = list_parameters(tools)
    text = strip_stops(text, answer_format.stops)
    parts = []
    failure = None
    try:
        for part in iter_parts(text, answer_format, parameters, begins_in_thought(text, answer_format, prompt)):
            parts.append(part)
    except InvalidRow as error:
        failure = error
    reasoning = join_thoughts([part.text for part in parts if part.kind in (THOUGHT, OPEN_THOUGHT)])
    if any([part.kind == OPEN_THOUGHT for part in parts]):
        return Answer(reasoning, is_complete=False)
    if failure is not None:
        written = [part.text for part in parts if part.kind != THOUGHT]
        written.append(text[parts[-1].end :])
        content = "".join(written).strip("\n")
        return Answer(reasoning or None, content, [], failure.reason != CUT, str(failure))
    content = "".join([part.text for part in parts if part.kind == TEXT])
    calls = []
    for part in parts:
        calls.extend(part.calls)
    return Answer(reasoning or None, re.sub(answer_format.envelope, "", content).strip("\n"), calls)


def iter_parts(text: str, answer_format: AnswerFormat, tools: Tools, is_thinking: bool) -> Iterator[Part]:
    """Yield the parts of an answer in their order. Raises InvalidRow at a call that does not parse.

    is_thinking: the text begins in a thought.
    """
    openings = re.compile(f"(?P<thought>{answer_format.thought_start})|{answer_format.call_start}")
    thought_end = re.compile(answer_format.thought_end)
    position = 0
    while True:
        if is_thinking:
            end = thought_end.search(text, position)
            if end is None:
                yield Part(OPEN_THOUGHT, text[position:], len(text), [])
                return
            yield Part(THOUGHT, text[position : end.start()], end.end(), [])
            position = end.end()
        opening = openings.search(text, position)
        if opening is None:
            yield Part(TEXT, text[position:], len(text), [])
            return
        yield Part(TEXT, text[position : opening.start()], opening.start(), [])
        position = opening.end()
        is_thinking = opening["thought"] is not None
        if not is_thinking:
            found = answer_format.calls.read(text, position, tools)
            calls = [clean_call(call) for call in found.calls]
            yield Part(CALLS, text[opening.start() : found.end], found.end, calls)
            position = found.end


def list_parameters(tools: list[dict] | str | None) -> Tools:
    """Return the parameters of each tool and their schemas. Raises InvalidRow."""
    parameters = {}
    for tool in parse_tools(tools):
        schema = tool["function"].get("parameters") or {}
        properties = schema.get("properties")
        parameters[tool["function"]["name"]] = properties if isinstance(properties, dict) else {}
    return parameters


def strip_stops(text: str, stops: tuple[str, ...]) -> str:
    """Return a text without the stop tokens at its end, and without the blanks behind them."""
    before = text.rstrip()
    while before.endswith(stops):
        stop = next(stop for stop in stops if before.endswith(stop))
        text = before.removesuffix(stop)
        before = text.rstrip()
    return text


def begins_in_thought(text: str, answer_format: AnswerFormat, prompt: str) -> bool:
    """Return whether a text goes on from a thought that its prompt opens, or that it ends without having begun it."""
    if re.match(rf"\s*{answer_format.thought_start}", text):  # it opens its own
        return False
    if re.search(rf"{answer_format.thought_start}\s*\Z", prompt):
        return True
    end = re.search(answer_format.thought_end, text)
    if end is None or not answer_format.lone_end:
        return False
    return re.search(answer_format.thought_start, text[: end.start()]) is None


def join_thoughts(thoughts: list[str]) -> str:
    """Return the thoughts that are not blank, without the line breaks at their edges."""
    return "\n\n".join([thought.strip("\n") for thought in thoughts if thought.strip()])


def clean_call(call: Call) -> dict:
    """Return a call in the shape of messages, its values JSON's alone. Raises InvalidRow."""
    try:
        text = json.dumps({"name": call["name"], "arguments": call["arguments"]}, allow_nan=False, ensure_ascii=False)
        text.encode()  # half a surrogate pair is no text
        function = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidRow("tool arguments that are not JSON", str(error)[:SHOWN_TEXT]) from None
    if not isinstance(function["name"], str) or not function["name"].strip():
        raise InvalidRow("tool call without a name", text[:SHOWN_TEXT])
    if not isinstance(function["arguments"], dict):
        raise InvalidRow("tool arguments that are not an object", text[:SHOWN_TEXT])
    cleaned = {"type": "function", "function": function}
    if call.get("id"):
        return {"id": str(call["id"]), **cleaned}
    return cleaned


# -- which family -----------------------------------------------------------------------------------------------------
@cache
def list_first_lines() -> dict[str, str]:
    """Return the family of each first line in chat_templates/: a comment, which names the models."""
    first_lines = {}
    for path in sorted(TEMPLATES.glob("*.jinja")):
        if path.stem in FORMATS:
            first_lines[path.read_text(encoding="utf-8").partition("\n")[0]] = path.stem
    return first_lines


def find_family(template: str | dict[str, str] | None) -> str:
    """Return the family whose answers a chat template writes, for parse_answer.

    One of chat_templates/ is known by its first line, which its serving form keeps in a saved model. Any other, such as
    a published one, is known by the tokens that it writes, and gets a family that writes answers alike. Where there are
    none of these it is "generic", to be named in a report: thoughts in <think>, calls in JSON between <tool_call> tags.
    """
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        return GENERIC
    first_line = template.partition("\n")[0]
    if first_line in list_first_lines():
        return list_first_lines()[first_line]
    written = COMMENTS.sub("", template)
    for signature, family in SIGNATURES.items():
        if signature in written:
            return family
    return GENERIC
