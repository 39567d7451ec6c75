"""Render rows with a chat template, as TRL does, and what a template means: personas, markers, stop and pad tokens.

recipes/hooks imports these rules. A recipe repeats the ones it needs, so that a copy stands alone:
tests/data_prep/test_tokens.py holds both equal.
"""

import hashlib
import json
import re
import sys
from collections.abc import Container, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .errors import InvalidRow, UsageError
from .recipe_settings import Settings
from .rows import CONTROL, find_control_token, get_tools, get_turns, iter_strings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .template_arguments import TemplateArguments

TEMPLATES = Path(__file__).resolve().parents[2] / "chat_templates"
TEMPLATE_SUFFIXES = (".jinja", ".j2")  # TRL takes anything else for a tokenizer whose template it copies
COMMENTS = re.compile(r"{#.*?#}", re.DOTALL)
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers looks for it
SHOWN_TOKENS = 4
PROBE = ({"role": "user", "content": "firstquestion"}, {"role": "assistant", "content": "firstanswer"})


def find_call_without_function(messages: list[dict]) -> int | None:
    """Return the number of the first message with a tool call whose name stands beside no function, or None."""
    for number, turn in enumerate(messages):
        calls = turn.get("tool_calls")
        if isinstance(calls, list) and any([isinstance(call, dict) and "function" not in call for call in calls]):
            return number
    return None


# -- tokens that templates write --------------------------------------------------------------------------------------
CONTROL_TOKENS = re.compile(  # as templates write them
    r"<\|[^\s|<>]+\|>|<\|\w+>|<\w+\|>|<｜[^｜\s]+｜>|<(?:start|end)_of_turn>|</?s>|<[be]os>|\]~!?b[\]\[]|\[e~\[|\[/?[A-Z]{2}[A-Z_]*\]"
)
INNER_STOPS = ("<|python_end|>",)  # nanochat: generation stops there for python's output, and the answer goes on
FAMILY_STOPS = (  # of turns and of calls, as chat_templates/ write them and as each family's models stop
    *INNER_STOPS,
    "<|im_end|>",  # ChatML: Qwen, SmolLM3, Phi-4, LFM2, Nemotron 3, Step 3.5; Kimi
    "<|eot|>",  # Llama 4
    "[e~[",  # MiniMax
    "<|endoftext|>",  # Qwen, GLM, gpt-oss
    *("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),  # Llama 3
    *("<|return|>", "<|call|>", "<|end|>"),  # gpt-oss; the last one Phi-3 too
    "<end_of_turn>",  # Gemma 2 and 3
    *("<turn|>", "<|tool_response>"),  # Gemma 4
    *("<|user|>", "<|observation|>"),  # GLM-4
    "<|END_OF_TURN_TOKEN|>",  # Command
    "<｜end▁of▁sentence｜>",  # DeepSeek
    "</s>",  # Mistral
    "<|assistant_end|>",  # nanochat
)


def find_ids(tokenizer: "PreTrainedTokenizerBase", names: Iterable[str | None]) -> set[int]:
    """Return the ids of the names that are one token in this tokenizer."""
    vocabulary = tokenizer.get_vocab()
    return {vocabulary[name] for name in names if name in vocabulary}


def find_stop_ids(tokenizer: "PreTrainedTokenizerBase", eos_token: str | None, of_config: object) -> set[int]:
    """Return the ids that end a turn or a call: of the recipe, the tokenizer, the generation config and the families.

    of_config: eos_token_id of a generation config: an id, a list of them, or None.
    """
    stops = find_ids(tokenizer, (eos_token, *FAMILY_STOPS))
    stops.add(tokenizer.eos_token_id)
    stops.update(of_config if isinstance(of_config, list) else [of_config])
    return stops - {None}


def choose_pad_token(tokenizer: "PreTrainedTokenizerBase", eos_token: str | None) -> str | None:
    """Return the first added token that is no stop token, one with "pad" in its name before others."""
    stop_tokens = (eos_token, tokenizer.eos_token)
    candidates = [token for token in tokenizer.get_added_vocab() if token not in stop_tokens]
    for token in candidates:
        if "pad" in token:
            return token
    if not candidates:
        return None
    return candidates[0]


def find_template_tokens(template: str) -> list[str]:
    """Return the control tokens that a template writes, in its order."""
    return list(dict.fromkeys(CONTROL_TOKENS.findall(COMMENTS.sub("", template))))


def find_foreign_tokens(vocabulary: Container[str], template: str) -> list[str]:
    """Return the control tokens of a template that are not in the vocabulary, also those that few rows need."""
    return [token for token in find_template_tokens(template) if token not in vocabulary]


def find_fitting_template(tokenizer: "PreTrainedTokenizerBase") -> Path | None:
    """Return a template of chat_templates/ whose control tokens are all the tokenizer's; one with its stop first."""
    vocabulary = tokenizer.get_vocab()
    fitting = []
    for path in sorted(TEMPLATES.glob("*.jinja")):
        text = path.read_text(encoding="utf-8")
        tokens = find_template_tokens(text)
        if not tokens or find_foreign_tokens(vocabulary, text):
            continue
        if tokenizer.eos_token in tokens:
            return path
        fitting.append(path)
    return fitting[0] if fitting else None


# -- the two forms of a template --------------------------------------------------------------------------------------
def has_markers(template: str | None) -> bool:
    """Return whether a template says by {% generation %} what the assistant wrote."""
    return GENERATION.search(template or "") is not None


def serving_template(template: str) -> str:
    """Turn generation markers into empty comments, which render nothing and which every engine takes."""
    return re.sub(r"{%(\W?)\s*(?:end)?generation\s*(\W?)%}", r"{#\1 \2#}", template)


def check_syntax(template: str, place: str) -> None:
    """Raise UsageError where a template does not compile. place: what the sentence begins with, before the line."""
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        render_jinja_template([], chat_template=template)  # compiles it and renders nothing
    except TemplateSyntaxError as error:
        raise UsageError(f"{place}{error.lineno}: not a template ({error.message}): mend it") from None


# -- loading ----------------------------------------------------------------------------------------------------------
def load_tokenizer(settings: Settings) -> "PreTrainedTokenizerBase":
    """Return the recipe's tokenizer, as SFTTrainer sets it up. Raises UsageError."""
    import transformers

    transformers.utils.logging.set_verbosity_error()  # rows may be longer than the model's context
    name = settings.model_name_or_path
    if not name:
        raise UsageError("model_name_or_path: the recipe names none, pass --model_name_or_path")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, revision=settings.model_revision)
    except Exception as error:  # OSError, ValueError and what hub clients and parsers raise: all mean the same here
        text = " ".join(str(error).split())[:200].rstrip(".")
        raise UsageError(
            f"{name}: no tokenizer could be loaded ({type(error).__name__}: {text}): where the hub cannot be reached, "
            "pass a local folder as --model_name_or_path or set HF_ENDPOINT to a mirror"
        ) from None
    if not tokenizer.is_fast:
        raise UsageError(
            f"{name}: its tokenizer does not tell where tokens stand in the text: pass a model with a tokenizer.json"
        )
    if settings.eos_token is not None:
        if settings.eos_token not in tokenizer.get_vocab():
            raise UsageError(f"eos_token {settings.eos_token}: {name} has no such token, pass one of its own")
        tokenizer.eos_token = settings.eos_token
    return tokenizer


def hash_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the sha256 of what the tokenizer's file says, but for padding and truncation, which a use of it sets."""
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    definition |= {"padding": None, "truncation": None}
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()


def load_template(settings: Settings, tokenizer: "PreTrainedTokenizerBase | None" = None) -> str | None:
    """Return the text of the chat template: of the recipe's file, else of the tokenizer; None where there is neither.

    Raises UsageError.
    """
    path = settings.chat_template_path
    if path is None:
        template = getattr(tokenizer, "chat_template", None)
        place = f"the template of {settings.model_name_or_path}"
    else:
        if not Path(path).is_file() or not path.endswith(TEMPLATE_SUFFIXES):
            raise UsageError(f"{path}: no such template: pass a .jinja file of chat_templates/ as --chat_template_path")
        template = Path(path).read_text(encoding="utf-8")
        place = path
    if template is None:
        return None
    if not isinstance(template, str):
        raise UsageError(f"{place}: several templates by name: pass one .jinja file as --chat_template_path")
    check_syntax(template, f"{place}:")
    return template


def load_renderer(settings: Settings, lenient: bool = False, quiet: bool = False) -> "Renderer":
    """Return the Renderer of a recipe's settings. Raises UsageError.

    lenient: without a tokenizer where none can be loaded, which is printed unless quiet.
    """
    tokenizer = None
    if settings.model_name_or_path or not lenient:
        try:
            tokenizer = load_tokenizer(settings)
        except UsageError as error:
            if not lenient:
                raise
            if not quiet:
                print(f"known control tokens are looked for, not the tokenizer's own: {error}", file=sys.stderr)
    template_name = settings.chat_template_path or f"the template of {settings.model_name_or_path}"
    return Renderer(load_template(settings, tokenizer), tokenizer, template_name, settings.model_name_or_path)


# -- rendering --------------------------------------------------------------------------------------------------------
class Span(NamedTuple):
    """[start, end) of tokens, or of characters."""

    start: int
    end: int


class Rendered(NamedTuple):
    """The text of a conversation, and the characters of it that the template marks as the assistant's."""

    text: str
    spans: list[Span]


class Renderer:
    """A chat template and the tokenizer whose special tokens it writes; either may be None."""

    def __init__(
        self,
        template: str | None = None,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        template_name: str = "the template",
        model_name: str | None = None,
    ) -> None:
        self.template = template
        self.tokenizer = tokenizer
        self.template_name = template_name
        self.model_name = model_name
        self.marked = has_markers(template)
        self.special_tokens = {"bos_token": "", "eos_token": ""}
        self.control = None  # the tokenizer's own control tokens
        self.marks = ()  # one of these begins each of them: finding it is ten times as fast as the pattern
        if tokenizer is not None:
            self.special_tokens = tokenizer.special_tokens_map
            tokens = find_own_control_tokens(tokenizer, template or "")
            self.control = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")
            self.marks = tuple(sorted({token[0] for token in tokens}))

    def control_in(self, value: object) -> str | None:
        """Return the first control token in any string of a JSON value, or None: of the tokenizer, or of the known
        families where none is given."""
        if self.control is None:
            return find_control_token(value)
        for text in iter_strings(value):
            if any(mark in text for mark in self.marks):
                match = self.control.search(text)
                if match:
                    return match[0]
        return None

    def render(self, row: dict, messages: list[dict], prompt: bool = False) -> Rendered:
        """Render messages with the row's tools and template arguments, as apply_chat_template does for TRL.

        prompt: up to where the model is to answer. Raises InvalidRow with the template's words, and for arguments that
        it does not read.
        """
        template_kwargs = row.get("chat_template_kwargs")
        if template_kwargs:
            self.arguments.check(template_kwargs)
        return self.render_unchecked(row, messages, prompt)

    @cached_property
    def arguments(self) -> "TemplateArguments":
        """What the template may be told beside a row's messages and tools."""
        from .template_arguments import read_arguments

        return read_arguments(self.template, self.template_name)

    def render_unchecked(self, row: dict, messages: list[dict], prompt: bool = False) -> Rendered:
        """Render messages whatever the row's template arguments are. Raises InvalidRow with the template's words."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                [drop_nulls(messages)],
                tools=get_tools(row),
                chat_template=self.template,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=self.marked and not prompt,
                # what the row says wins over the special tokens
                **{**self.special_tokens, **(row.get("chat_template_kwargs") or {})},
            )
        except Exception as error:  # a template is a program: it may fail in any way
            raise InvalidRow("template refuses the row", self.describe_refusal(error, messages)) from None
        return Rendered(texts[0], [Span(*span) for span in spans[0]] if spans else [])

    @cached_property
    def empty_thought_remedy(self) -> str:
        """What to do about rows whose answers have no reasoning, where the prompt opens a think block."""
        remedy = "give them reasoning, or take a template whose prompt opens no think block"
        if "enable_thinking" in self.arguments.names:
            remedy = "pass enable_thinking=false in chat_template_kwargs for these rows, or give them reasoning"
        return (
            "an answer without reasoning closes the think block that its prompt opens, and begins with a token that no "
            f"request holds: {remedy}"
        )

    def describe_refusal(self, error: Exception, messages: list[dict]) -> str:
        """Return what a template failed on; that it is another family's, where it fails on what the tokenizer lacks."""
        if isinstance(error, (TypeError, AttributeError)) or type(error).__name__ == "UndefinedError":
            number = find_call_without_function(messages)
            if number is not None:
                return (
                    f"message {number}: a tool call without function, which this template reads: write it as "
                    '{"type": "function", "function": {"name": …, "arguments": …}}, as data_prep.normalize does'
                )
        if type(error).__name__ == "UndefinedError" and self.mismatch is not None:
            return self.mismatch
        return describe_error(error)

    @cached_property
    def mismatch(self) -> str | None:
        """Why the template does not belong to the tokenizer, or None: a plain chat needs tokens that it lacks.

        Tokens that few rows need, as those of tools, may be missing: a template serves more than one model.
        """
        from jinja2 import UndefinedError
        from transformers.utils.chat_template_utils import render_jinja_template

        if self.template is None or self.tokenizer is None:
            return None
        tokenizer_name = "the tokenizer"
        if self.model_name:
            tokenizer_name = f"the tokenizer of {self.model_name}"
        try:
            texts, _ = render_jinja_template([list(PROBE)], chat_template=self.template, **self.special_tokens)
        except UndefinedError as error:
            match = re.search(r"'(\w+_token)' is undefined", str(error))
            if match is None:
                return None
            return f"{self.template_name} writes {match[1]}, which {tokenizer_name} does not have: {self.remedy()}"
        except Exception:  # a template that demands more than a plain chat
            return None
        vocabulary = self.tokenizer.get_vocab()
        foreign = [token for token in dict.fromkeys(CONTROL_TOKENS.findall(texts[0])) if token not in vocabulary]
        if not foreign:
            return None
        return (
            f"{self.template_name} writes {', '.join(foreign[:SHOWN_TOKENS])}, which {tokenizer_name} does not have as "
            f"one token: {self.remedy()}"
        )

    def remedy(self) -> str:
        """Return what to do about a template of another family."""
        text = "it belongs to another family, pass a template whose tokens it has as --chat_template_path"
        fitting = find_fitting_template(self.tokenizer)
        if fitting is not None:
            text = f"it belongs to another family, pass --chat_template_path chat_templates/{fitting.name}"
        return text


def find_own_control_tokens(tokenizer: "PreTrainedTokenizerBase", template: str) -> list[str]:
    """Return the tokens that must not stand in text, the longest first.

    The tokenizer's special ones, the added ones that the template writes (as transformers' sanitize_control_tokens has
    it), and those that every row is checked for; not the HTML tags and newlines that Gemma adds.
    """
    tokens = set()
    for token in tokenizer.added_tokens_decoder.values():
        is_control = token.special or token.content in template or CONTROL.fullmatch(token.content)
        if is_control and token.content.strip():
            tokens.add(token.content)
    return sorted(tokens, key=len, reverse=True)


def drop_nulls(messages: list[dict]) -> list[dict]:
    """Return messages without the keys that are null, as apply_chat_template drops them."""
    return [{key: value for key, value in turn.items() if value is not None} for turn in messages]


def describe_error(error: Exception) -> str:
    """Return what a template, or a row that is no chat, failed on."""
    text = " ".join(str(getattr(error, "detail", error)).split()) or type(error).__name__
    if isinstance(error, KeyError):
        return f"it lacks {text}"
    has_words = isinstance(error, ValueError) and not isinstance(error, UnicodeError)
    if has_words or "Template" in type(error).__name__:
        return text
    return f"{type(error).__name__}: {text}"


# -- think blocks that the prompt opens -------------------------------------------------------------------------------
THINK_TAGS = {"<think>": "</think>", "<|channel>thought": "<channel|>"}


def find_empty_thoughts(rendered: Rendered) -> list[int]:
    """Return where trained answers begin by closing, empty, a think block that their prompt has opened.

    Such an answer has no reasoning. The newline that ends its prompt and the one that it begins with are one token,
    which no request ends in: what helps is said by Renderer.empty_thought_remedy, and stripping the answer does not.
    """
    starts = []
    for start, _ in rendered.spans:
        before = rendered.text[max(0, start - 32) : start]
        after = rendered.text[start : start + 32]
        if not before.endswith("\n") or not after.startswith("\n"):
            continue  # nothing merges
        for opening, closing in THINK_TAGS.items():
            if before.rstrip("\n").endswith(opening) and after.lstrip("\n").startswith(closing):
                starts.append(start)
    return starts


# -- control tokens in text -------------------------------------------------------------------------------------------
class ControlToken(NamedTuple):
    """A control token in the text of a row. place: message 0, tool 1 …"""

    place: str
    token: str


def find_control_tokens(row: dict, renderer: Renderer) -> Iterator[ControlToken]:
    """Yield the first control token that stands in the text of each message and tool."""
    for name, parts in (("message", get_turns(row)), ("tool", get_tools(row) or [])):
        for number, part in enumerate(parts):
            texts = [value for key, value in part.items() if key != "role"]
            token = renderer.control_in(texts)
            if token is not None:
                yield ControlToken(f"{name} {number}", token)
