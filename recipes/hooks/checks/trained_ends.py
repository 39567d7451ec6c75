"""The ends of trained answers, by ids: an answer that ends with no stop token teaches the model never to stop."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from os.path import commonprefix
from typing import TYPE_CHECKING

import numpy as np
from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from data_prep.common.rendering import (
    INNER_STOPS,
    find_fitting_template,
    find_foreign_tokens,
    find_ids,
    find_stop_ids,
)

from ..messages import UsageError, relative_path, say
from .allowed import ALLOWED
from .compiled import is_compiled
from .counts import MASKED, DocumentBatch, read_documents
from .rows import holds_conversations
from .template import read_training_template

if TYPE_CHECKING:
    from ..trainer import SFTTrainer

QUESTION = {"role": "user", "content": "firstquestion"}
CALL = {"id": "call00001", "type": "function", "function": {"name": "look", "arguments": {"at": "firstanswer"}}}
DOCUMENT_IDS = "ids"  # a column that data_prep/compile.py writes; labels of other token sets may be anything
HEADER_TOKENS = 64  # looked at behind an answer, where its template's control tokens may be spelled in pieces
MAX_DECODED = 2000  # places behind an answer that are read as text; headers met once are known by their ids
SHOWN_TOKENS = 4
EXPAND = "python -m data_prep.expand_turns makes a row of each"


@dataclass(frozen=True)
class Spans:
    """The trained spans of a stretch of rows or packs: [start, end) of each, and of the document that it lies in."""

    starts: np.ndarray
    ends: np.ndarray
    document_starts: np.ndarray
    document_ends: np.ndarray


@dataclass
class TrainedEnds:
    """How the trained answers of a prepared set end."""

    stopped: int = 0  # with a stop token
    masked: int = 0  # with text, and the stop token behind it is masked
    unstopped: Counter[int] = field(default_factory=Counter)  # with an id that stops nothing: that id
    full_documents: int = 0  # of max_length tokens, which may be truncated


@dataclass
class AssistantTurns:
    """The assistant turns that stand in rows of messages."""

    by_row: np.ndarray
    behind_another: int = 0  # right behind an assistant turn
    chosen: bool = False  # loss_mask, train or train_turns in the rows say which are trained


@dataclass(frozen=True)
class ContextTurns:
    """Assistant turns that stand in the rows and are not trained: their template, or the rows, leave them as context.

    Not `exact`: at least so many.
    """

    turns: int
    total: int
    exact: bool
    expandable: bool  # nothing in the rows says that it is meant

    def describe(self) -> str:
        amount = f"{self.turns:,}" if self.exact else f"at least {self.turns:,}"
        text = f"{amount} of {self.total:,} assistant turns are context, not trained"
        if self.expandable:
            text += f" ({EXPAND})"
        return text


def check_trained_ends(trainer: "SFTTrainer", allow: list[str]) -> None:
    """Raise UsageError where trained answers end with no stop token; count the answers that are context.

    Looked at are whole answers whose end is trained: no truncated ones, no masked ends, no all-token training.
    """
    if not trains_answers(trainer):
        return
    ends = read_trained_ends(trainer)
    unstopped = ends.unstopped.total()
    if unstopped:
        fault = describe_fault(trainer.processing_class, ends)
        if "untrained_stop" not in allow:
            remedy = suggest_remedy(trainer)
            raise UsageError(f"{fault}: {remedy}, or --allow untrained_stop ({ALLOWED['untrained_stop']})")
        say(fault)
    elif ends.masked and not ends.stopped:
        say(
            f"none of {ends.masked:,} trained answers trains its stop token, which the chat template leaves outside "
            "{% generation %}: the model may not learn to stop"
        )
    elif not ends.masked:
        trainer.context_turns = count_context_turns(trainer, ends)


def trains_answers(trainer: "SFTTrainer") -> bool:
    """Return whether labels are answers: assistant turns, completions of conversations, or a set of compile.py."""
    columns = trainer.train_rows.column_names
    if "labels" not in trainer.train_dataset.column_names:
        return False
    if is_compiled(columns):
        return DOCUMENT_IDS in columns
    if trainer.args.assistant_only_loss:
        return True
    if "completion" not in columns:
        return False
    return bool(trainer.completion_only_loss) and holds_conversations(trainer.train_rows.features)


# -- spans ------------------------------------------------------------------------------------------------------------
def find_spans(labels: DocumentBatch) -> Spans:
    """Return the maximal runs of trained labels; none crosses from a document into the next."""
    is_trained = labels.values != MASKED
    is_first = np.zeros(len(is_trained), bool)
    is_first[labels.starts] = True
    goes_on = is_trained[1:] & is_trained[:-1] & ~is_first[1:]  # position i + 1 with the span of position i
    starts = np.flatnonzero(is_trained & ~np.append(False, goes_on))
    ends = np.flatnonzero(is_trained & ~np.append(goes_on, False)) + 1
    document = np.searchsorted(labels.starts, starts, side="right") - 1
    return Spans(starts, ends, labels.starts[document], labels.ends[document])


def without_plain_text(spans: Spans) -> Spans:
    """Return the spans of a compiled set that are answers: text that is trained whole has nothing before it.

    The first label of a compiled document is masked whatever it is.
    """
    is_answer = spans.starts - spans.document_starts > 1
    return Spans(
        spans.starts[is_answer],
        spans.ends[is_answer],
        spans.document_starts[is_answer],
        spans.document_ends[is_answer],
    )


def longest_row(data: Dataset) -> int:
    """Return the tokens of the longest row or pack."""
    longest = 0
    for batch in read_documents(data, "input_ids"):
        longest = max(longest, int(np.diff(batch.row_ends, prepend=0).max(initial=0)))
    return longest


def read_trained_ends(trainer: "SFTTrainer") -> TrainedEnds:
    """Return how the trained answers of the prepared set end."""
    data = trainer.train_dataset
    compiled = is_compiled(trainer.train_rows.column_names)
    max_length = trainer.args.max_length
    if compiled:
        max_length = longest_row(data)  # compile.py's max_length, if that truncated a document
    tokenizer = trainer.processing_class
    of_config = getattr(trainer.model.generation_config, "eos_token_id", None)
    stops = find_stop_ids(tokenizer, trainer.args.eos_token, of_config)
    inner_stops = find_ids(tokenizer, INNER_STOPS)
    headers = TurnHeaders(tokenizer, read_training_template(trainer))
    reader = EndReader(stops, inner_stops, blank_token_test(tokenizer), headers)
    ends = TrainedEnds()
    batches = zip(read_documents(data, "labels"), read_documents(data, "input_ids"), strict=True)
    for labels, tokens in batches:
        if max_length:
            ends.full_documents += int((labels.ends - labels.starts == max_length).sum())
        spans = find_spans(labels)
        if compiled:
            spans = without_plain_text(spans)
        last_ids = tokens.values[spans.ends - 1]
        is_stop = np.isin(last_ids, list(stops))
        ends.stopped += int((is_stop & ~np.isin(last_ids, list(inner_stops))).sum())
        for index in np.flatnonzero(~is_stop):
            reader.read(ends, tokens.values, spans, index, max_length)
    return ends


@dataclass
class EndReader:
    """Reads the end of a span whose last token is no stop token: blanks, a masked end, a part of an answer, a fault."""

    stops: set[int]
    inner_stops: set[int]
    is_blank: Callable[[int], bool]
    headers: "TurnHeaders"

    def read(self, ends: TrainedEnds, values: np.ndarray, spans: Spans, index: int, max_length: int | None) -> None:
        """Add one span to `ends`; `values`: all tokens of the batch."""
        start = spans.starts[index]
        end = spans.ends[index]
        while end > start and self.is_blank(int(values[end - 1])):
            end -= 1
        if end == start:  # a newline alone, as behind a stop token that another piece of the row holds
            return
        last_id = int(values[end - 1])
        if last_id in self.inner_stops:
            return
        if last_id in self.stops:
            ends.stopped += 1
            return

        document_end = spans.document_ends[index]
        following = spans.ends[index]
        while following < document_end and self.is_blank(int(values[following])):
            following += 1
        if following == document_end:
            if document_end - spans.document_starts[index] != max_length:  # else it may be truncated
                ends.unstopped[last_id] += 1
        elif int(values[following]) in self.stops:
            ends.masked += 1
        elif self.headers.open_at(values[following : min(document_end, following + HEADER_TOKENS)]):
            ends.unstopped[last_id] += 1


def blank_token_test(tokenizer: PreTrainedTokenizerBase) -> Callable[[int], bool]:
    """Return a function that says whether a token is whitespace alone."""

    @cache
    def is_blank(token_id: int) -> bool:
        return not tokenizer.decode([token_id]).strip()

    return is_blank


# -- what opens the next turn -----------------------------------------------------------------------------------------
class TurnHeaders:
    """What a template writes before a user's and a tool's text: the answer before it is whole."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
        self.tokenizer = tokenizer
        self.texts = tuple(find_turn_headers(tokenizer, template))
        self.known: set[tuple[int, ...]] = set()
        self.decoded = 0

    def open_at(self, ids: np.ndarray) -> bool:
        """Return whether these tokens begin with a header."""
        ids = ids.tolist()
        for header in self.known:
            if tuple(ids[: len(header)]) == header:
                return True
        if not self.texts or self.decoded >= MAX_DECODED:
            return False
        self.decoded += 1
        if not self.begin_with_header(ids):
            return False
        length = 1
        while not self.begin_with_header(ids[:length]):
            length += 1
        self.known.add(tuple(ids[:length]))
        return True

    def begin_with_header(self, ids: list[int]) -> bool:
        return from_first_letter(self.tokenizer.decode(ids)).startswith(self.texts)


def find_turn_headers(tokenizer: PreTrainedTokenizerBase, template: str | None) -> Iterator[str]:
    """Yield what the template writes before a user's and a tool's text, from its first letter on.

    It is what stands between an answer and that text, less what ends the answer where nothing follows. A tokenizer that
    spells control tokens in pieces may merge the first marks with those that end the answer.
    """
    answer = {"role": "assistant", "content": "firstanswer"}
    question = {"role": "user", "content": "nextcontent"}
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    reply = {"role": "tool", "content": "nextcontent", "tool_call_id": CALL["id"], "name": "look"}
    for turn, following in ((answer, question), (call, reply)):
        try:
            ending = render(tokenizer, template, [QUESTION, turn]).rpartition("firstanswer")[2]
            text = render(tokenizer, template, [QUESTION, turn, following])
        except (TemplateError, TypeError, ValueError):  # no template, or one that has no place for such turns
            continue
        between = text.partition("nextcontent")[0].rpartition("firstanswer")[2]
        header = from_first_letter(between[len(commonprefix([between, ending])) :]).rstrip()
        if header:
            yield header


def from_first_letter(text: str) -> str:
    return re.sub(r"^\W+", "", text)


def render(tokenizer: PreTrainedTokenizerBase, template: str | None, turns: list[dict]) -> str:
    return tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)


# -- what is said -----------------------------------------------------------------------------------------------------
def describe_fault(tokenizer: PreTrainedTokenizerBase, ends: TrainedEnds) -> str:
    """Return how many answers end without a stop token, and with what most of them do."""
    unstopped = ends.unstopped.total()
    token_id, _ = ends.unstopped.most_common(1)[0]
    return (
        f"{unstopped:,} of {ends.stopped + unstopped:,} trained answers end with {tokenizer.decode([token_id])!r} "
        f"(id {token_id}), which stops nothing: the model would never learn to end them"
    )


def suggest_remedy(trainer: "SFTTrainer") -> str:
    """Return what to do about answers without a stop token; name a template that is not the tokenizer's."""
    tokenizer = trainer.processing_class
    if is_compiled(trainer.train_rows.column_names):
        return "compile the set anew (python -m data_prep.compile) with the model's own tokenizer and a template for it"
    path = trainer.args.chat_template_path
    name = "the tokenizer's own chat template"
    if path is not None:
        name = f"--chat_template_path {relative_path(path)}"
    foreign = find_foreign_tokens(tokenizer.get_vocab(), read_training_template(trainer))[:SHOWN_TOKENS]
    if not foreign:
        return (
            f"write a stop token at the end of the answers in {name}, or pass the token that ends them as --eos_token"
        )
    model = relative_path(trainer.model.name_or_path)
    text = f"{name} does not belong to the tokenizer of {model}, which has no token {', '.join(foreign)}"
    fitting = find_fitting_template(tokenizer)
    if fitting is None:
        return f"{text}: pass a template whose tokens it has"
    return f"{text}: pass one whose tokens it has, as --chat_template_path {relative_path(fitting)}"


# -- context ----------------------------------------------------------------------------------------------------------
def count_context_turns(trainer: "SFTTrainer", ends: TrainedEnds) -> ContextTurns | None:
    """Return the assistant turns of the rows less the trained answers of the prepared set; None where none is left.

    Where that cannot be told exactly it is the least that it can be: a truncated row may have lost as many answers as
    the longest conversations have, and an answer right behind another may stand in one span with it.
    """
    rows = trainer.train_rows
    if not trainer.args.assistant_only_loss:
        return None  # a compiled set holds no turns; in a completion everything is trained
    columns = ["messages"]
    if "messages" not in rows.column_names:
        columns = ["prompt", "completion"]
        if trainer.completion_only_loss:
            columns = ["completion"]
    turns = count_assistant_turns(rows, columns)
    most_by_row = np.sort(turns.by_row)[::-1]
    unsure = turns.behind_another + int(most_by_row[: count_truncated(trainer, ends)].sum())
    total = int(turns.by_row.sum())
    context = total - ends.stopped - unsure
    if context <= 0:
        return None
    expandable = columns == ["messages"] and not turns.chosen  # expand_turns.py reads messages
    return ContextTurns(context, total, exact=not unsure, expandable=expandable)


def count_assistant_turns(rows: Dataset, columns: list[str]) -> AssistantTurns:
    """Count the assistant turns in these columns of the rows."""
    turns = AssistantTurns(by_row=np.zeros(len(rows), int))
    names = list(columns)
    if "chat_template_kwargs" in rows.column_names:
        names.append("chat_template_kwargs")
    for number, row in enumerate(rows.select_columns(names)):
        before = None
        for turn in [turn for column in columns for turn in row[column] or []]:
            role = turn.get("role")
            if role == "assistant":
                turns.by_row[number] += 1
            if role == before == "assistant":
                turns.behind_another += 1
            if turn.get("loss_mask") is not None or turn.get("train") is not None:
                turns.chosen = True
            before = role
        template_kwargs = row.get("chat_template_kwargs") or {}
        if template_kwargs.get("train_turns") is not None:
            turns.chosen = True
    return turns


def count_truncated(trainer: "SFTTrainer", ends: TrainedEnds) -> int:
    """Return how many rows may have lost answers to max_length, dropped ones included."""
    if not trainer.args.max_length:
        return 0
    if not trainer.args.packing:
        return ends.full_documents + len(trainer.train_rows) - len(trainer.train_dataset)
    if trainer.args.packing_strategy == "bfd":
        return ends.full_documents
    return 0  # bfd_split and wrapped lose nothing
