"""Render rows with a chat template, as apply_chat_template does for TRL."""

import re
import sys
from contextlib import nullcontext
from itertools import accumulate, pairwise
from pathlib import Path
from unicodedata import is_normalized

from .errors import InvalidRow, UsageError
from .fast_tokens import PLAIN_ONLY, quick_program, widths_of
from .rows import CONTROL, MARKS, get_tools, get_turns, iter_strings

PERSONAS = ("custom_instructions", "system_prompt", "model_identity")  # template arguments that say who speaks


def load_tokenizer(settings):
    """The recipe's tokenizer, as SFTTrainer sets it up. Raises UsageError."""
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
        raise UsageError(f"{name}: its tokenizer does not tell where tokens stand in the text: pass a model with a "
                       "tokenizer.json")  # fmt: skip
    if settings.eos_token is not None:
        if settings.eos_token not in tokenizer.get_vocab():
            raise UsageError(f"eos_token {settings.eos_token}: {name} has no such token, pass one of its own")
        tokenizer.eos_token = settings.eos_token
    return tokenizer


def load_template(settings, tokenizer=None):
    """The text of the chat template: that of the recipe's file, else of the tokenizer; None where there is neither.
    Raises UsageError."""
    path = settings.chat_template_path
    template, where = getattr(tokenizer, "chat_template", None), f"the template of {settings.model_name_or_path}"
    if path is not None:
        where = path
        if not Path(path).is_file() or not path.endswith((".jinja", ".j2")):
            raise UsageError(f"{path}: no such template: pass a .jinja file of chat_templates/ as --chat_template_path")
        template = Path(path).read_text(encoding="utf-8")
    if template is None:
        return None
    if not isinstance(template, str):
        raise UsageError(f"{where}: several templates by name: pass one .jinja file as --chat_template_path")
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        render_jinja_template([], chat_template=template)  # compiles it and renders nothing
    except TemplateSyntaxError as error:
        raise UsageError(f"{where}:{error.lineno}: not a template ({error.message}): mend it") from None
    return template


class Renderer:
    """What rows are rendered with, either of it None where there is none: template, tokenizer. marked: whether the
    template has {% generation %} markers; control: pattern of the tokens that must not stand in text, which are those
    of the tokenizer or, without one, those of the known families."""

    def __init__(self, template=None, tokenizer=None):
        self.template, self.tokenizer, self.control = template, tokenizer, CONTROL
        self.lang, self.max_length = (), None  # what check.py is asked to hold rows against
        self.marked = bool(re.search(r"\{%-?\s*generation\s*-?%\}", template or ""))
        self.names, self.program, self.widths, self.prepared = {"bos_token": "", "eos_token": ""}, None, None, None
        if tokenizer is not None:
            self.names = tokenizer.special_tokens_map
            # as transformers' sanitize_control_tokens sees it (special tokens, and the added ones that the template
            # writes), and what every row of this house is checked for; not the HTML tags and newlines that Gemma adds
            added, told = tokenizer.added_tokens_decoder.values(), template or ""
            tokens = {t.content for t in added if t.special or t.content in told or CONTROL.fullmatch(t.content)}
            tokens = sorted((token for token in tokens if token.strip()), key=len, reverse=True)
            self.control = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")
        # one of these stands in every control token: finding it is ten times as fast as the pattern
        self.firsts = MARKS if tokenizer is None else sorted({token[0] for token in tokens})

    def control_in(self, value):
        """The first control token in any string of a JSON value, or None."""
        if isinstance(value, str):
            hit = any(first in value for first in self.firsts) and self.control.search(value)
            return hit[0] if hit else None
        return next(filter(None, map(self.control_in, iter_strings(value))), None)

    def render(self, row, messages, prompt=False):
        """(text, trained [start, end) spans of its characters) of messages with the row's tools and template arguments,
        as apply_chat_template renders them for TRL. Raises InvalidRow with the template's words."""
        from transformers.utils.chat_template_utils import _alias_reasoning_fields, render_jinja_template

        try:
            # what is null in a message is dropped, and what the row says wins over the special tokens
            messages = [{key: value for key, value in turn.items() if value is not None} for turn in messages]
            names, tools = {**self.names, **(row.get("chat_template_kwargs") or {})}, get_tools(row)
            if PLAIN_ONLY & {*names} or not all(isinstance(tool, dict) for tool in tools or ()):
                texts, spans = render_jinja_template(
                    [messages],
                    tools=tools,
                    chat_template=self.template,
                    add_generation_prompt=prompt,
                    return_assistant_tokens_mask=self.marked and not prompt,
                    **names,
                )
                return texts[0], spans[0] if spans else []
            # a row is JSON, which render_jinja_template copies part by part to be sure that it is; the rest is the same
            self.program = self.program or quick_program(self.template)
            pieces, spans = [], []
            track = self.program.environment.activate_tracker(pieces, spans)
            with track if self.marked and not prompt else nullcontext():
                shown = {"messages": _alias_reasoning_fields(messages), "tools": tools, "documents": None}
                for piece in self.program.generate(**shown, add_generation_prompt=prompt, **names):
                    pieces.append(piece)
            return "".join(pieces), spans
        except Exception as error:  # a template is a program: it may fail in any way
            raise InvalidRow("template refuses the row", describe_error(error)) from None

    def encode(self, texts, chat):
        """The ids of texts, as the tokenizer's own call gives them, without where they stand in the text."""
        backend = self.tokenizer.backend_tokenizer
        if backend is not self.prepared:
            backend.no_padding()
            backend.no_truncation()
            self.prepared = backend
        backend.encode_special_tokens = self.tokenizer.split_special_tokens
        normalizer = backend.normalizer
        composed = type(normalizer).__name__ == "NFC" and all(is_normalized("NFC", text) for text in texts)
        if composed:
            backend.normalizer = None  # it would change nothing, in a twentieth of the time
        try:
            return [one.ids for one in backend.encode_batch_fast(texts, add_special_tokens=not chat)]
        finally:
            if composed:
                backend.normalizer = normalizer

    def char_to_token(self, text, ids, chars):
        """Encoding.char_to_token of a text's ids, for the edges of these spans, from the bytes that each token stands
        for; None where these do not add up to the text's."""
        self.widths = widths_of(self.tokenizer) if self.widths is None else self.widths
        ends = self.widths.take(ids).cumsum() if len(self.widths) and ids else [-1]
        edges = sorted({char for start, end in chars for char in (start, end - 1) if 0 <= char < len(text)})
        if text.isascii():
            places, size = edges, len(text)
        else:
            steps = [len(text[a:b].encode()) for a, b in pairwise([0, *edges, len(text)])]
            *places, size = accumulate(steps)
        if ends[-1] != size:
            return None
        return dict(zip(edges, ends.searchsorted(places, "right").tolist(), strict=True)).get


def describe_error(error):
    """What a template, or a row that is no chat, failed on."""
    said = " ".join(str(getattr(error, "detail", error)).split()) or type(error).__name__
    if isinstance(error, KeyError):
        return f"it lacks {said}"
    known = isinstance(error, ValueError) and not isinstance(error, UnicodeError)
    return said if known or "Template" in type(error).__name__ else f"{type(error).__name__}: {said}"


def load_renderer(settings, lenient=False, told=True):
    """Against of a recipe's settings. lenient: without a tokenizer where none is at hand, which is told. Raises
    UsageError."""
    tokenizer = None
    if settings.model_name_or_path or not lenient:
        try:
            tokenizer = load_tokenizer(settings)
        except UsageError as error:
            if not lenient:
                raise
            if told:
                print(f"known control tokens are looked for, not the tokenizer's own: {error}", file=sys.stderr)
    return Renderer(load_template(settings, tokenizer), tokenizer)


def find_control_tokens(row, against):
    """Yield (place, token): the first control token that stands in the text of each message and tool."""
    for name, parts in (("message", get_turns(row)), ("tool", get_tools(row) or [])):
        for number, part in enumerate(parts):
            for key, value in part.items():
                if key != "role" and (hit := against.control_in(value)):
                    yield f"{name} {number}", hit
                    break


def find_lost_personas(row, against):
    """Yield (place, text) of each persona (system message, or argument of the template) that the rendered text leaves
    out, as SmolLM3's own did for custom_instructions=None. Each is rendered with a mark behind it: its text alone might
    stand in the default persona, or in what the user says, and the row would pass though the template drops it."""
    turns, kwargs = get_turns(row), row.get("chat_template_kwargs") or {}
    given = {name: kwargs.get(name) for name in PERSONAS}
    given |= {f"message {n}": t.get("content") for n, t in enumerate(turns) if t.get("role") in ("system", "developer")}
    given = {place: text for place, text in given.items() if isinstance(text, str) and text.strip()}
    if not given:
        return
    marked = {place: f"{text} persona{number}mark" for number, (place, text) in enumerate(given.items())}
    turns = [{**turn, "content": marked.get(f"message {n}", turn.get("content"))} for n, turn in enumerate(turns)]
    names = {place: text for place, text in marked.items() if place in kwargs}
    try:
        text, _ = against.render({**row, "chat_template_kwargs": kwargs | names}, turns)
    except InvalidRow:
        return  # told where the row itself is rendered
    for place, expected in marked.items():
        if normalize_persona(expected) not in normalize_persona(text):
            yield place, given[place]


def normalize_persona(text):
    """Text without the switches that a template takes out of a persona and without a difference of blanks."""
    return " ".join(re.sub(r"/(?:no_think|think|system_override)\b", " ", text).split())
