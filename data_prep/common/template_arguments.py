"""The arguments of chat templates: which names a template reads, and which values it may be given.

A name that a template does not read changes nothing, and a value of another type is true or false as it falls: both
train something else than was asked for, without a word. The names are taken from the template's own syntax tree, the
values from ARGUMENTS, which chat_templates/README.md shows.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from enum import Enum
from functools import cache, lru_cache

from jinja2 import Environment, nodes

from .errors import InvalidRow
from .personas import PERSONA_ARGUMENTS
from .rendering import TEMPLATES, serving_template

REASON = "template refuses the row"
FLAGS = ("loss_mask", "train")  # of a message
HANDED_OVER = ("messages", "tools", "add_generation_prompt", "raise_exception", "strftime_now")  # by transformers
SWITCHES = {True: "on", False: "off"}  # YAML reads an unquoted on and off as booleans
SPECIAL_TOKENS = ("bos_token", "eos_token")  # handed over too; a row may name others than the tokenizer's
UNSET = (None, "", [])


class Kind(Enum):
    """What a value must be. The value: what a message says of it."""

    CHOICE = "one of"  # of its choices; true and false stand for on and off
    SWITCH = "true or false"
    TEXT = "a text"
    TEXTS = "a list of texts"
    LIST = "a list"


@dataclass(frozen=True)
class Argument:
    """A row of the README's table. choices: the default first; of a list, what it may hold.

    templates: the files of chat_templates/ that it holds for, where others read the name with other values.
    """

    name: str
    choices: tuple[str, ...]
    families: str
    meaning: str
    kind: Kind = Kind.CHOICE
    templates: tuple[str, ...] = ()

    def values(self) -> str:
        """Return what the README says of the values."""
        if self.kind is Kind.SWITCH:
            return "unset, true, false"
        if self.kind is Kind.CHOICE:
            return ", ".join(self.choices)
        return f"unset, {self.allowed()}"

    def allowed(self) -> str:
        """Return the values as a message names them."""
        if self.kind is Kind.TEXTS and self.choices:
            return "a list of " + ", ".join(self.choices)
        return " ".join([self.kind.value, ", ".join(self.choices)]).rstrip()

    def allows(self, value: object) -> bool:
        """Return whether a template may be given this value."""
        if self.kind is Kind.SWITCH:
            return isinstance(value, bool)
        if self.kind is Kind.TEXT:
            return isinstance(value, str)
        if self.kind is Kind.LIST:
            return isinstance(value, list)
        if self.kind is Kind.TEXTS:
            return isinstance(value, list) and all([self.is_choice(item) for item in value])
        if isinstance(value, bool):
            value = SWITCHES[value]
        return self.is_choice(value)

    def is_choice(self, value: object) -> bool:
        return isinstance(value, str) and (value in self.choices or not self.choices)

    def describe(self, value: object) -> str:
        """Return what is wrong with a value that is not allowed."""
        shown = value
        if self.kind is not Kind.CHOICE or not isinstance(value, str):
            shown = json.dumps(value, ensure_ascii=False, default=str)
        words = value if isinstance(value, list) else [value]
        return f"{self.name} is {shown}, it must be {self.allowed()}{suggest(words, self.choices)}"


ARGUMENTS = (
    Argument(
        "train_turns",
        ("all", "last", "flagged"),
        "all",
        "which answers are trained, of those that can be: every one, the last, or those whose `loss_mask` (or `train`) "
        "is 1 or missing (step3_qwen3: flagged where it is unset)",
    ),
    Argument(
        "train_tool_calls",
        ("on", "masked"),
        "with tools; nanochat",
        "masked: the calls are context; the text before them, with what opens the call behind it, and the stop token "
        "are trained",
    ),
    Argument(
        "train_header",
        ("off", "on"),
        "all",
        "on: what the prompt ends with is trained too (half of SmolLM3's published mask)",
    ),
    Argument(
        "train_thinking",
        ("on", "masked"),
        "with reasoning",
        "masked: the think block is context, the answer is trained",
    ),
    Argument(
        "preserve_thinking",
        (),
        "with reasoning, but gpt_oss, smollm3 and, always so, command_a, command_a_reasoning, ministral_3_reasoning",
        "true: every turn keeps its think block and is trained (qwen3_8: so where it is unset; gemma4: beside calls "
        "only, as upstream); a server must send the same argument",
        kind=Kind.SWITCH,
    ),
    Argument(
        "truncate_history_thinking",
        (),
        "nemotron_3, nemotron_3_5",
        "upstream's name for the opposite of `preserve_thinking`",
        kind=Kind.SWITCH,
    ),
    Argument(
        "train_newline",
        ("on", "off"),
        "step3_qwen3",
        "on: the newline after the stop is trained, as StepTron does",
        templates=("step3_qwen3",),
    ),
    Argument(
        "train_newline",
        ("off", "on"),
        "smollm3",
        "on: the newline after the stop is trained, as SmolLM3's published mask does",
        templates=("smollm3",),
    ),
    Argument(
        "keep_thinking",
        ("off", "on"),
        "chatml",
        "on: reasoning is a think block at the head of its answer, in every turn",
    ),
    Argument(
        "enable_thinking",
        (),
        "switchable",
        "as upstream: false puts an empty think block into the prompt; it may stand in rows for any family whose "
        "prompt opens no think block",
        kind=Kind.SWITCH,
    ),
    Argument(
        "reasoning_effort",
        ("medium", "low", "high"),
        "gpt_oss",
        "stated in the system turn",
        templates=("gpt_oss",),
    ),
    Argument(
        "reasoning_effort",
        ("xhigh", "medium", "low"),
        "qwen3_8",
        "stated in the system turn, but for medium",
        templates=("qwen3_8",),
    ),
    Argument(
        "custom_instructions",
        (),
        "smollm3",
        "the persona, where there is no system message; blank is unset",
        kind=Kind.TEXT,
    ),
    Argument("model_identity", (), "gpt_oss", "the first sentence of the system turn", kind=Kind.TEXT),
    Argument(
        "date_string", (), "dated", "the date that the prompt states; unset: one fixed in the file", kind=Kind.TEXT
    ),
    Argument(
        "builtin_tools",
        ("brave_search", "wolfram_alpha", "code_interpreter"),
        "llama3_1",
        "told in the system turn; calls of theirs are python, and calls stop on `<\\|eom_id\\|>`",
        kind=Kind.TEXTS,
        templates=("llama3_1",),
    ),
    Argument(
        "builtin_tools",
        ("browser", "python"),
        "gpt_oss",
        "told in the system turn",
        kind=Kind.TEXTS,
        templates=("gpt_oss",),
    ),
    Argument(
        "harmony",
        (),
        "gpt_oss",
        "true: the form of OpenAI's own encoder, which vLLM renders with instead of a template: calls are "
        "`<\\|constrain\\|>json`, tool replies are not quoted, text beside a call is a commentary",
        kind=Kind.SWITCH,
    ),
    Argument(
        "tools_in_user_message",
        (),
        "llama3_1, llama3_2, llama4",
        "false: the tools are told in the system turn, not in the first user message",
        kind=Kind.SWITCH,
    ),
    Argument(
        "model_name",
        ("Ministral-3-8B-Instruct-2512", "Ministral-3-3B-Instruct-2512", "Ministral-3-14B-Instruct-2512"),
        "ministral_3",
        "whose own system prompt stands where there is no system message",
        templates=("ministral_3",),
    ),
    Argument(
        "model_name",
        ("Olmo-3-7B-Instruct", "Olmo-3.1-32B-Instruct"),
        "olmo_3",
        "whose own system prompt stands where there is no system message",
        templates=("olmo_3",),
    ),
    Argument(
        "model_name",
        ("Olmo-3-7B-Think", "Olmo-3-32B-Think"),
        "olmo_3_think",
        "whose own system prompt stands where there is no system message",
        templates=("olmo_3_think",),
    ),
    Argument(
        "model_name",
        ("MiniMax-M2.7", "MiniMax-M2.5", "MiniMax-M2.1", "MiniMax-M2"),
        "minimax_m2",
        "whose own system prompt stands where there is no system message",
        templates=("minimax_m2",),
    ),
    Argument("documents", (), "granite_4, granite_4_1", "as upstream: told in the system turn", kind=Kind.LIST),
    Argument(
        "clear_thinking", (), "glm4_7", "upstream's name for the opposite of `preserve_thinking`", kind=Kind.SWITCH
    ),
    Argument(
        "thinking",
        (),
        "deepseek_v3_1",
        "as upstream: true lets the prompt open a think block; where it is unset, `enable_thinking` counts",
        kind=Kind.SWITCH,
    ),
    Argument("enable_citations", (), "command_a", "as upstream: tells how answers are grounded", kind=Kind.SWITCH),
    Argument("xml_tools", (), "smollm3", "told as `tools` are, where the row has none", kind=Kind.LIST),
    Argument("python_tools", (), "smollm3", "signatures that python code may call", kind=Kind.LIST),
)


# -- the check --------------------------------------------------------------------------------------------------------
class TemplateArguments:
    """What one template reads, and whether arguments fit it."""

    def __init__(self, template: str, template_name: str) -> None:
        tree = parse_template(template)
        self.template_name = template_name
        self.names = read_names(tree)
        self.known = choose_arguments(name_family(template))
        self.opens_thinking = opens_thinking(template)
        self.reads_flags = any([node.attr in FLAGS for node in tree.find_all(nodes.Getattr)])

    def check(self, template_kwargs: dict) -> None:
        """Raise InvalidRow for a name that the template does not read, and for a value that it may not be given.

        What is null or empty is unset.
        """
        if not isinstance(template_kwargs, dict):
            raise InvalidRow("field of another type", "chat_template_kwargs must be an object")
        for name, value in template_kwargs.items():
            if value in UNSET or name in SPECIAL_TOKENS and isinstance(value, str):
                continue
            argument = self.known.get(name)
            is_wrong = argument is not None and not argument.allows(value)
            if name not in self.names and (is_wrong or not self.may_be_unread(name, value)):
                raise InvalidRow(REASON, self.describe_unread(name))
            if is_wrong:
                raise InvalidRow(REASON, argument.describe(value))

    def may_be_unread(self, name: str, value: object) -> bool:
        """Return whether nothing is lost where the template does not read an argument.

        enable_thinking says what a row is, and only false may ask for a prompt that the template does not have; flagged
        asks for what a template does that reads the flags by itself; personas are looked for in the text, by a rule of
        their own.
        """
        if name == "enable_thinking":
            return value is True or not self.opens_thinking
        if name == "train_turns":
            return value == "flagged" and self.reads_flags
        return name in PERSONA_ARGUMENTS

    def describe_unread(self, name: str) -> str:
        """Return what to do about a name that the template does not read."""
        names = ", ".join(sorted(self.names)) or "no argument"
        return f"{self.template_name} does not read {name}{suggest([name], self.names)}: it reads {names}"


def check_without_template(template_kwargs: dict) -> None:
    """Raise InvalidRow for arguments that no template of chat_templates/ may be given, where none is at hand.

    A name that is nearly one of theirs is taken for a mistake, any other for one of a template of the user's own.
    """
    for name, value in template_kwargs.items():
        if value in UNSET:
            continue
        known = [argument for argument in ARGUMENTS if argument.name == name]
        if known and not any([argument.allows(value) for argument in known]):
            raise InvalidRow(REASON, known[0].describe(value))
        suggestion = suggest([name], {argument.name for argument in ARGUMENTS})
        if suggestion:
            raise InvalidRow(REASON, f"no template of chat_templates/ reads {name}{suggestion}")


@lru_cache(maxsize=16)
def read_arguments(template: str, template_name: str = "the template") -> TemplateArguments:
    """Return the arguments of a template. template_name: what messages call it."""
    return TemplateArguments(template, template_name)


def choose_arguments(family: str | None) -> dict[str, Argument]:
    """Return what is known of each name in a template of chat_templates/, or in another one (None)."""
    known = {}
    for argument in ARGUMENTS:
        if not argument.templates or family in argument.templates:
            known[argument.name] = argument
        elif argument.name not in known:
            known[argument.name] = loosen(argument)
    return known


def loosen(argument: Argument) -> Argument:
    """Return an argument with what all families agree on, where each has choices of its own: these, or the kind."""
    choices = [set(other.choices) for other in ARGUMENTS if other.name == argument.name]
    if all([choice == choices[0] for choice in choices]):
        return argument
    kind = Kind.TEXT if argument.kind is Kind.CHOICE else argument.kind
    return replace(argument, choices=(), kind=kind)


def suggest(words: Iterable[object], candidates: Iterable[str]) -> str:
    """Return a question about the candidate that is nearest to one of the words, which are none of them."""
    candidates = sorted(candidates)
    for word in words:
        if isinstance(word, str) and word not in candidates:
            for match in get_close_matches(word, candidates, n=1):
                return f" (did you mean {match}?)"
    return ""


@cache
def list_families() -> dict[str, str]:
    """Return the names of chat_templates/ by the text that a recipe saves of each."""
    texts = {}
    for path in sorted(TEMPLATES.glob("*.jinja")):
        texts[serving_template(path.read_text(encoding="utf-8"))] = path.stem
    return texts


def name_family(template: str) -> str | None:
    """Return which file of chat_templates/ a template is, in either form; None for another."""
    return list_families().get(serving_template(template))


def opens_thinking(template: str) -> bool:
    """Return whether the plain prompt of a template ends in a think block that it has opened."""
    from transformers.utils.chat_template_utils import render_jinja_template

    question = [{"role": "user", "content": "firstquestion"}]
    try:
        texts, _ = render_jinja_template(
            [question], chat_template=template, add_generation_prompt=True, bos_token="", eos_token=""
        )
    except Exception:  # a template that demands more than a plain question
        return False
    return texts[0].rstrip().endswith("<think>")


# -- the names in the syntax tree -------------------------------------------------------------------------------------
def parse_template(template: str) -> nodes.Template:
    """Return the syntax tree of a template, with the tags that transformers knows."""
    return Environment(extensions=["jinja2.ext.loopcontrols"]).parse(serving_template(template))


def read_names(tree: nodes.Template) -> set[str]:
    """Return the names that a template reads without having set them, but for what transformers hands over itself.

    jinja2.meta.find_undeclared_variables also takes names for such that a loop sets in one block and reads in another.
    """
    given = {*tree.environment.globals, *HANDED_OVER, *SPECIAL_TOKENS}
    macros = {macro.name for macro in tree.find_all(nodes.Macro)}  # they may call one that stands further down
    return set(find_reads(tree, macros)) - given


def find_reads(node: nodes.Node, assigned: set[str]) -> Iterator[str]:
    """Yield each name that is read in a node before it is set there. assigned: names set so far, which it adds to."""
    if isinstance(node, nodes.Name):
        if node.ctx != "load":
            assigned.add(node.name)
        elif node.name not in assigned:
            yield node.name
    elif isinstance(node, nodes.Assign):
        yield from find_reads(node.node, assigned)
        yield from find_reads(node.target, assigned)
    elif isinstance(node, nodes.AssignBlock):
        yield from find_reads_of_all(node.body, set(assigned))
        yield from find_reads(node.target, assigned)
    elif isinstance(node, nodes.If):
        yield from find_reads_of_branches(node, assigned)
    elif isinstance(node, nodes.For):
        yield from find_reads(node.iter, assigned)
        inner = {*assigned, "loop"}
        yield from find_reads(node.target, inner)
        yield from find_reads_of_all([*([node.test] if node.test else []), *node.body], inner)
        yield from find_reads_of_all(node.else_, set(assigned))
    elif isinstance(node, nodes.Macro | nodes.CallBlock):
        if isinstance(node, nodes.Macro):
            assigned.add(node.name)
        else:
            yield from find_reads(node.call, assigned)
        yield from find_reads_of_all(node.defaults, assigned)
        inner = {*assigned, "caller", "varargs", "kwargs"}
        yield from find_reads_of_all([*node.args, *node.body], inner)
    else:
        yield from find_reads_of_all(node.iter_child_nodes(), assigned)


def find_reads_of_all(parts: Iterable[nodes.Node], assigned: set[str]) -> Iterator[str]:
    """Yield the names that nodes in a row read before they are set."""
    for part in parts:
        yield from find_reads(part, assigned)


def find_reads_of_branches(node: nodes.If, assigned: set[str]) -> Iterator[str]:
    """Yield the names of an if and its branches; none of them sees what another one sets."""
    yield from find_reads(node.test, assigned)
    after = set(assigned)
    for branch in (node.body, node.elif_, node.else_):
        seen = set(assigned)
        yield from find_reads_of_all(branch, seen)
        after |= seen
    assigned |= after
