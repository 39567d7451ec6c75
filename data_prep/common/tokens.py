"""Tokens and mask of rows, as TRL's SFTTrainer makes them."""

import math
from dataclasses import dataclass, field
from itertools import islice

from .errors import UsageError
from .packing import MAP_BATCH
from .rendering import describe_error


@dataclass(slots=True)
class Document:
    """One row as the trainer gets it, before anything is cut."""

    number: int  # from 0
    row: dict
    ids: list
    spans: list  # trained tokens as [start, end), in order, apart from each other
    text: str | None = None  # what was rendered; None in a compiled row
    chars: list = field(default_factory=list)  # trained characters of the text, one span a {% generation %} block
    encoding: object = None  # tokenizers.Encoding, which knows where the tokens stand in the text, where asked for

    def mask(self):
        """0 or 1 a token, as transformers gives assistant_masks."""
        mask = [0] * len(self.ids)
        for start, end in self.spans:
            mask[start:end] = [1] * (end - start)
        return mask

    def trained(self, start=0, end=math.inf):
        """Trained tokens within [start, end)."""
        return count_within(self.spans, start, end)


def count_within(spans, start, end):
    """Tokens of the spans within [start, end)."""
    return sum(max(0, min(b, end) - max(a, start)) for a, b in spans)


def mask_to_spans(mask):
    """[start, end) of every run of true values."""
    spans = []
    for index, value in enumerate(mask):
        if value and spans and spans[-1][1] == index:
            spans[-1][1] = index + 1
        elif value:
            spans.append([index, index + 1])
    return spans


def token_spans(char_to_token, chars, length):
    """Token spans of character spans, by transformers' own rules (apply_chat_template with
    return_assistant_tokens_mask), its quirks included: a token across an edge is trained whole, a span that starts
    nowhere ends the search, and one that ends nowhere, or at token 0, trains all that follows."""
    spans = []
    for start_char, end_char in chars:
        start, end = char_to_token(start_char), char_to_token(end_char - 1)
        if start is None:
            break
        end = end + 1 if end else length
        if spans and start <= spans[-1][1]:
            spans[-1][1] = max(end, spans[-1][1])
        elif end > start:
            spans.append([start, end])
    return spans


def conversational(value):
    """Whether TRL takes the value for messages."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "role" in value[0]


def check_chat(first, against, settings):
    """Whether the rows are chats, by the first of them. Raises UsageError where they, or the template, do not fit."""
    chat = conversational(first.get("messages", first.get("prompt")))
    if settings.assistant_only_loss and "input_ids" not in first:
        if not chat:
            raise UsageError(f"{settings.data}the rows are no chats, and assistant_only_loss needs chats: pass rows of "
                           "messages, or --assistant_only_loss false")  # fmt: skip
        if not against.marked:
            where = settings.chat_template_path or f"the template of {settings.model_name_or_path}"
            raise UsageError(f"{where}: has no {{% generation %}} markers, so nothing would be trained: pass one of "
                           "chat_templates/ as --chat_template_path")  # fmt: skip
    if chat and against.template is None:
        raise UsageError(f"{settings.model_name_or_path}: has no chat template: pass one as --chat_template_path")
    return chat


def iter_documents(rows, against, settings, progress=None, encodings=True):
    """Yield a Document a row, in order; progress(count) is told of rows done; encodings=False: without encoding, which
    is faster. Rows that cannot be rendered end it with a UsageError that counts them."""
    first = next(iter(rows), None)
    if first is None:
        return
    chat = check_chat(first, against, settings)
    failed, numbered = [], enumerate(rows)
    while batch := list(islice(numbered, MAP_BATCH)):
        if "input_ids" in first:
            docs = [read_compiled(number, row, settings) for number, row in batch]
        else:
            docs = tokenize_rows(batch, against, settings, chat, failed, encodings)
        yield from docs
        if progress:
            progress(len(batch))
    if failed:
        number, row, reason = failed[0]
        where = settings.data + row_name(number, row) + (f" and {len(failed) - 1:,} more" if failed[1:] else "")
        raise UsageError(f"{where} cannot be rendered: {reason}")


def row_name(number, row):
    return f"row {number}" + (f" (id {row['id']})" if row.get("id") not in (None, "") else "")


def read_compiled(number, row, settings):
    """Document of a row that has its ids: trained is what TRL builds labels of, from labels, else masks, else all.
    Raises UsageError."""
    ids, here = row["input_ids"], settings.data + row_name(number, row)
    if not isinstance(ids, list):
        raise UsageError(f"{here}: input_ids is no list: compile the set anew")
    names = ["completion_mask"] * bool(settings.completion_only_loss) + ["assistant_masks"]
    masks = [row[name] for name in names if name in row]
    if "labels" in row:
        masks = [[label != -100 for label in row["labels"]]]
    if any(len(mask) != len(ids) for mask in masks):
        raise UsageError(f"{here}: as many labels as input_ids are needed: compile the set anew")
    return Document(
        number, row, ids, mask_to_spans(map(all, zip(*masks, strict=True))) if masks else mask_to_spans([1] * len(ids))
    )


def tokenize_rows(batch, against, settings, chat, failed, encodings=True):
    """Documents of a batch of (number, row), tokenised in one call; rows that fail are added to failed."""
    tokenizer, paired = against.tokenizer, "prompt" in batch[0][1]
    completion_only = settings.completion_only_loss
    if completion_only is None:
        completion_only = paired and "completion" in batch[0][1]
    done, texts, prompts = [], [], []
    for number, row in batch:
        try:
            if row.get("chat_template_kwargs", {}) is None:
                raise ValueError("chat_template_kwargs is null, and TRL stops at that: write {} in every row")
            if chat:
                turns = row["prompt"] + row["completion"] if paired else row["messages"]
                if not turns:
                    raise ValueError("it has no messages: leave it out")
                text, chars = against.render(row, turns)
                prompt = against.render(row, row["prompt"], prompt=True)[0] if paired else ""
            else:
                key = "completion" if paired else settings.dataset_text_field
                ending = "" if row[key].endswith(tokenizer.eos_token or "") else tokenizer.eos_token
                text, chars, prompt = (row["prompt"] if paired else "") + row[key] + ending, [], row.get("prompt", "")
            text.encode()  # half a surrogate pair is no text
        except Exception as error:
            failed.append((number, row, describe_error(error)))
            continue
        done.append((number, row, text, chars if settings.assistant_only_loss else []))
        texts.append(text)
        prompts.append(prompt)
    if not texts:
        return []
    plain = {"add_special_tokens": not chat, "return_attention_mask": False}
    found, whole, starts = [None] * len(texts), None, [0] * len(texts)
    if encodings:
        encoded = tokenizer(texts, **plain)
        whole, found = encoded["input_ids"], encoded.encodings
    else:
        whole = against.encode(texts, chat)
    if paired:  # the completion starts where the prompt's tokens and the whole's diverge
        starts = list(map(common_prefix, tokenizer(prompts, **plain)["input_ids"], whole))
    out = []
    for (number, row, text, chars), ids, encoding, start in zip(done, whole, found, starts, strict=True):
        spans = [[0, len(ids)]]
        if settings.assistant_only_loss:
            place = encoding.char_to_token if encoding else against.char_to_token(text, ids, chars)
            spans = token_spans(place or tokenizer(text, **plain).encodings[0].char_to_token, chars, len(ids))
        if completion_only:
            spans = [[max(a, start), b] for a, b in spans if b > start]
        spans = [span for span in spans if span[1] > span[0]]
        out.append(Document(number, row, ids, spans, text, chars, encoding))
    return out


def common_prefix(ids, other_ids):
    """Number of leading tokens that both have."""
    pairs = enumerate(zip(ids, other_ids, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(ids), len(other_ids)))
