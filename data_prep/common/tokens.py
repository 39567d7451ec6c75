"""Tokens and mask of rows, as TRL's SFTTrainer makes them.

The plain path is `apply_chat_template` with the assistant mask, as TRL 1.16 calls it. fast_tokens.py gives the same
sooner and is taken where it can be.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .errors import UsageError
from .fast_tokens import open_fast_path
from .packing import MAP_BATCH
from .recipe_settings import Settings
from .rendering import Rendered, Renderer, Span, describe_error
from .rows import get_tools

if TYPE_CHECKING:
    from tokenizers import Encoding

MASKED = -100  # a label that is not trained


class NumberedRow(NamedTuple):
    number: int  # from 0
    row: dict


class FailedRow(NamedTuple):
    """A row that cannot be rendered, and why."""

    number: int
    row: dict
    reason: str


@dataclass(slots=True)
class Document:
    """One row as the trainer gets it, before anything is truncated."""

    number: int  # from 0
    row: dict
    ids: list[int]
    spans: list[Span]  # trained tokens, in order, apart from each other
    text: str | None = None  # what was rendered; None in a compiled row
    chars: list[Span] = field(default_factory=list)  # trained characters of the text, a {% generation %} block each
    encoding: "Encoding | None" = None  # knows where the tokens stand in the text, where asked for

    def mask(self) -> list[int]:
        """Return 0 or 1 a token, as transformers gives assistant_masks."""
        mask = [0] * len(self.ids)
        for start, end in self.spans:
            mask[start:end] = [1] * (end - start)
        return mask

    def labels(self) -> np.ndarray:
        """Return the ids that are trained, -100 where nothing is: (tokens,) int32."""
        return np.where(np.array(self.mask(), bool), np.array(self.ids, np.int32), np.int32(MASKED))

    def trained(self, start: int = 0, end: float = math.inf) -> int:
        """Return the number of trained tokens within [start, end)."""
        return count_within(self.spans, start, end)


# -- spans ------------------------------------------------------------------------------------------------------------
def count_within(spans: Iterable[Span], start: float, end: float) -> int:
    """Return the tokens of the spans within [start, end)."""
    return sum(max(0, min(span_end, end) - max(span_start, start)) for span_start, span_end in spans)


def mask_to_spans(mask: list[bool] | list[int] | np.ndarray) -> list[Span]:
    """Return every run of true values."""
    padded = np.concatenate([[0], np.asarray(mask, bool).astype(np.int8), [0]])
    edges = np.flatnonzero(np.diff(padded)).tolist()
    return [Span(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True)]


def token_spans(char_to_token: Callable[[int], int | None], chars: list[Span], length: int) -> list[Span]:
    """Return the token spans of character spans, by transformers' own rules, their quirks included.

    As apply_chat_template has it for return_assistant_tokens_mask: a token across an edge is trained whole, a span that
    starts nowhere ends the search, and one that ends nowhere, or at token 0, trains all that follows. length: of the
    row in tokens.
    """
    spans = []
    for start_char, end_char in chars:
        start = char_to_token(start_char)
        if start is None:
            break
        last = char_to_token(end_char - 1)
        end = last + 1 if last else length
        if spans and start <= spans[-1].end:
            spans[-1] = Span(spans[-1].start, max(end, spans[-1].end))
        elif end > start:
            spans.append(Span(start, end))
    return spans


def common_prefix(ids: list[int], other_ids: list[int]) -> int:
    """Return the number of leading tokens that both have."""
    for index, (one, other) in enumerate(zip(ids, other_ids, strict=False)):
        if one != other:
            return index
    return min(len(ids), len(other_ids))


# -- what kind of rows ------------------------------------------------------------------------------------------------
def is_conversation(value: object) -> bool:
    """Return whether TRL takes the value for messages."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "role" in value[0]


def check_chat(first: dict, renderer: Renderer, settings: Settings) -> bool:
    """Return whether the rows are chats, by the first of them. Raises UsageError where the template does not fit."""
    chat = is_conversation(first.get("messages", first.get("prompt")))
    if settings.assistant_only_loss and "input_ids" not in first:
        if not chat:
            raise UsageError(
                f"{settings.data}the rows are no chats, and assistant_only_loss needs chats: pass rows of messages, or "
                "--assistant_only_loss false"
            )
        if not renderer.marked:
            raise UsageError(
                f"{renderer.template_name}: has no {{% generation %}} markers, so nothing would be trained: pass one "
                "of chat_templates/ as --chat_template_path"
            )
    if chat and renderer.template is None:
        raise UsageError(f"{settings.model_name_or_path}: has no chat template: pass one as --chat_template_path")
    return chat


def row_name(number: int, row: dict) -> str:
    """Return what messages call a row: its position, and its id where it has one."""
    if row.get("id") in (None, ""):
        return f"row {number}"
    return f"row {number} (id {row['id']})"


# -- documents --------------------------------------------------------------------------------------------------------
def iter_documents(
    rows: Iterable[dict],
    renderer: Renderer,
    settings: Settings,
    progress: Callable[[int], object] | None = None,
    encodings: bool = True,
) -> Iterator[Document]:
    """Yield a Document a row, in order. Raises UsageError at the end where rows cannot be rendered, with their number.

    progress: is called with the number of rows done. encodings: whether the Documents have their encoding, which takes
    more time.
    """
    first = next(iter(rows), None)
    if first is None:
        return
    chat = check_chat(first, renderer, settings)
    failed = []
    numbered = (NumberedRow(number, row) for number, row in enumerate(rows))
    while True:
        batch = list(islice(numbered, MAP_BATCH))
        if not batch:
            break
        if "input_ids" in first:
            yield from [read_compiled(number, row, settings) for number, row in batch]
        else:
            yield from tokenize_rows(batch, renderer, settings, chat, failed, encodings)
        if progress:
            progress(len(batch))
    if failed:
        number, row, reason = failed[0]
        more = f" and {len(failed) - 1:,} more" if len(failed) > 1 else ""
        raise UsageError(f"{settings.data}{row_name(number, row)}{more} cannot be rendered: {reason}")


def read_compiled(number: int, row: dict, settings: Settings) -> Document:
    """Return the Document of a row that has its ids, trained where TRL builds labels: by labels, else masks, else all.

    Raises UsageError.
    """
    ids = row["input_ids"]
    place = settings.data + row_name(number, row)
    if not isinstance(ids, list):
        raise UsageError(f"{place}: input_ids is no list: compile the set anew")
    masks = [row["assistant_masks"]] if "assistant_masks" in row else []
    if settings.completion_only_loss and "completion_mask" in row:
        masks.append(row["completion_mask"])
    if "labels" in row:
        masks = [[label != MASKED for label in row["labels"]]]
    trained = np.ones(len(ids), bool)
    for mask in masks:
        if len(mask) != len(ids):
            raise UsageError(f"{place}: as many labels as input_ids are needed: compile the set anew")
        trained &= np.asarray(mask, bool)
    return Document(number, row, ids, mask_to_spans(trained))


@dataclass(slots=True)
class RenderedRow:
    """A row as text. A prompt, where the row is a pair, is rendered by itself too: the completion follows it."""

    number: int
    row: dict
    text: str
    chars: list[Span]  # trained characters
    prompt: str | None = None


def tokenize_rows(
    batch: Iterable[NumberedRow],
    renderer: Renderer,
    settings: Settings,
    chat: bool,
    failed: list[FailedRow],
    encodings: bool = True,
) -> list[Document]:
    """Return the Documents of a batch; rows that cannot be rendered are added to `failed`.

    chat: whether the rows are chats (check_chat). encodings: whether the Documents have their encoding.
    """
    rendered = []
    for number, row in batch:
        try:
            rendered.append(render_row(number, row, renderer, settings, chat))
        except Exception as error:
            failed.append(FailedRow(number, row, describe_error(error)))
    if not rendered:
        return []
    fast_path = open_fast_path(renderer)
    if encodings:
        documents = encode(rendered, renderer, chat)
    elif fast_path is None:
        documents = [tokenize_plainly(one, renderer, settings, chat) for one in rendered]
    else:
        documents = []
        ids_of_rows = fast_path.encode([one.text for one in rendered], add_special_tokens=not chat)
        for one, ids in zip(rendered, ids_of_rows, strict=True):
            find_token = fast_path.find_tokens(one.text, ids, one.chars)
            if find_token is None and one.chars:
                documents += encode([one], renderer, chat)
            else:
                spans = token_spans(find_token, one.chars, len(ids))
                documents.append(Document(one.number, one.row, ids, spans, one.text, one.chars))
    for document, one in zip(documents, rendered, strict=True):
        if not settings.assistant_only_loss:
            document.spans = [Span(0, len(document.ids))]
        if one.prompt is not None:
            keep_completion(document, one, renderer, settings, chat)
        document.spans = [span for span in document.spans if span.end > span.start]
    return documents


def render_row(number: int, row: dict, renderer: Renderer, settings: Settings, chat: bool) -> RenderedRow:
    """Return a row as text. Raises InvalidRow, and what a row of another shape makes Python raise."""
    if row.get("chat_template_kwargs", {}) is None:
        raise ValueError("chat_template_kwargs is null, and TRL stops at that: write {} in every row")
    prompt = None
    if chat:
        turns = read_turns(row)
        if not turns:
            raise ValueError("it has no messages: leave it out")
        rendered = renderer.render(row, turns)
        if "prompt" in row:
            prompt = renderer.render(row, row["prompt"], prompt=True).text
    else:
        text = row["completion" if "prompt" in row else settings.dataset_text_field]
        if not text.endswith(renderer.tokenizer.eos_token or ""):
            text += renderer.tokenizer.eos_token
        if "prompt" in row:
            prompt = row["prompt"]
            text = prompt + text
        rendered = Rendered(text, [])
    rendered.text.encode()  # half a surrogate pair is no text
    chars = rendered.spans if settings.assistant_only_loss else []
    return RenderedRow(number, row, rendered.text, chars, prompt)


def read_turns(row: dict) -> list[dict]:
    """Return the messages of a row as TRL takes them, of a pair both parts."""
    if "prompt" in row:
        return row["prompt"] + row["completion"]
    return row["messages"]


def keep_completion(
    document: Document, rendered: RenderedRow, renderer: Renderer, settings: Settings, chat: bool
) -> None:
    """Leave of a document's spans what stands in the completion, where that alone is trained.

    It starts where the prompt's tokens and the whole's diverge.
    """
    completion_only = settings.completion_only_loss
    if completion_only is None:
        completion_only = "completion" in document.row
    if not completion_only:
        return
    prompt_ids = renderer.tokenizer(rendered.prompt, add_special_tokens=not chat)["input_ids"]
    start = common_prefix(prompt_ids, document.ids)
    document.spans = [Span(max(start, span.start), span.end) for span in document.spans if span.end > start]


def encode(rendered: list[RenderedRow], renderer: Renderer, chat: bool) -> list[Document]:
    """Return Documents with their encodings: where each token stands in the text."""
    texts = [one.text for one in rendered]
    encoded = renderer.tokenizer(texts, add_special_tokens=not chat, return_attention_mask=False)
    documents = []
    for one, ids, encoding in zip(rendered, encoded["input_ids"], encoded.encodings, strict=True):
        spans = token_spans(encoding.char_to_token, one.chars, len(ids))
        documents.append(Document(one.number, one.row, ids, spans, one.text, one.chars, encoding))
    return documents


def tokenize_plainly(rendered: RenderedRow, renderer: Renderer, settings: Settings, chat: bool) -> Document:
    """Return the Document of a row as TRL tokenizes it: THE PLAIN PATH."""
    row = rendered.row
    if not chat:
        ids = renderer.tokenizer(rendered.text, return_attention_mask=False)["input_ids"]
        return Document(rendered.number, row, ids, [], rendered.text)
    processed = renderer.tokenizer.apply_chat_template(
        read_turns(row),
        chat_template=renderer.template,
        tools=get_tools(row),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=settings.assistant_only_loss,
        **row.get("chat_template_kwargs", {}),
    )
    spans = mask_to_spans(processed.get("assistant_masks", []))
    return Document(rendered.number, row, processed["input_ids"], spans, rendered.text, rendered.chars)
