"""Calls of functions as messages that every family's template renders, and templates that can be asked for calls."""

import os

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from data_prep.common.answers import find_family, parse_answer
from data_prep.common.errors import UsageError
from eval.common.arguments import first_line
from eval.common.models import Prompt, mode_kwargs, render, render_text

KIMI = ("kimi_k2", "kimi_k2_thinking")


def call_message(calls: list[dict]) -> dict:
    """Return calls {name, arguments} as one message of the assistant, without ids."""
    tool_calls = [{"type": "function", "function": call} for call in calls]
    return {"role": "assistant", "content": "", "tool_calls": tool_calls}


def reply_message(call: dict, reply: str) -> dict:
    """Return the reply to a call as a message, without an id."""
    return {"role": "tool", "name": call["name"], "content": reply}


def add_call_ids(messages: list[dict], family: str) -> list[dict]:
    """Return messages whose calls have ids, and whose replies have those of the calls before them, in their order.

    Mistral's templates ask for nine letters or digits; Kimi's write an id alone, which holds the name and a number.
    """
    numbered = []
    unanswered: list[str] = []
    count = 0
    for message in messages:
        message = dict(message)
        calls = []
        for call in message.get("tool_calls") or []:
            call_id = f"{count:09d}"
            if family in KIMI:
                call_id = f"functions.{call['function']['name']}:{count}"
            calls.append({**call, "id": call_id})
            unanswered.append(call_id)
            count += 1
        if calls:
            message["tool_calls"] = calls
        if message["role"] == "tool" and unanswered:
            message["tool_call_id"] = unanswered.pop(0)
        numbered.append(message)
    return numbered


def find_calling_family(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the family of the tokenizer's template, for parse_answer.

    Raises UsageError for a template that renders no call, or one that is not read back as what it was.
    """
    family = find_family(tokenizer.chat_template)
    call = {"name": "look.up", "arguments": {"city": "Oslo", "days": 3}}
    properties = {"city": {"type": "string"}, "days": {"type": "integer"}}
    tools = [{"type": "function", "function": {"name": call["name"], "parameters": {"properties": properties}}}]
    messages = add_call_ids([{"role": "user", "content": "Hi"}, call_message([call])], family)
    try:
        prompt = render_text(tokenizer, messages[:1])
        text = render_text(tokenizer, messages, False)
    except (TemplateError, TypeError, ValueError) as error:
        raise UsageError(
            f"the model's template renders no tool call ({first_line(error)}): measure one that does"
        ) from None
    shared = os.path.commonprefix([prompt, text])
    answer = parse_answer(text[len(shared) :], family, shared, tools)
    if [tool_call["function"] for tool_call in answer.tool_calls] != [call]:
        raise UsageError(
            "the model's template writes tool calls in no known form: save the run with the template of its family in "
            "chat_templates/"
        )
    return family


def render_prompt(
    tokenizer: PreTrainedTokenizerBase,
    family: str,
    name: str,
    messages: list[dict],
    tools: list[dict],
    mode: str | None,
) -> Prompt:
    """Return a prompt that offers tools. name: what a message calls it. Raises UsageError."""
    try:
        prompt = render(tokenizer, add_call_ids(messages, family), True, tools, **mode_kwargs(mode))
    except (TemplateError, TypeError, ValueError) as error:
        raise UsageError(
            f"the model's template refuses {name} ({first_line(error)}): measure one that takes it"
        ) from None
    if tools[0]["function"]["name"] not in prompt.text:
        raise UsageError("the model's template shows no list of tools: measure one that does")
    return prompt
