"""From rows and a model to records: what the commands of eval/ share.

The order of use: read_rows, clean_row, prepare, measure, with a model and tokenizer of models.py. Whatever the user can
repair is raised as UsageError with one sentence; a command prints it and exits 2.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jinja2 import TemplateError
from jsonschema import SchemaError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_prep.common.answers import Answer, find_family, parse_answer
from data_prep.common.chunks import Chunk
from data_prep.common.errors import InvalidRow, UsageError
from data_prep.common.readers import chunk_table, is_dataset_folder, open_split, read_chunks
from data_prep.common.rows import get_tools
from eval.common.arguments import first_line
from eval.common.metrics import RATES, Question, Record, controls, join_parts, judge
from eval.common.models import Output, Prompt, fill_of, generate, render, token_losses
from eval.common.strict_json import schema_valid, strict_json, validator

PROMPT_TAIL = 200  # characters of the prompt kept beside each answer
ANSWER = (  # keys of a record that a row without an answer has None of
    *("answer", "answer_tokens", "reference_tokens", "json_equal", "json_fields", "said", "wanted", "compared"),
    *RATES.values(),
)
SCHEMA_IN_TEXT = re.compile(r"<schema>\s*(.*?)\s*</schema>", re.DOTALL)
JSON_TAGS = {"json", "json-only", "strict"}  # of rows that ask for JSON; the last two are the day-2 tutorial's
NEGATIVE_TAG = "json-negative"  # of rows that look so, but whose right answer is none

Skip = Callable[[str, str], None]  # takes the reason why something is not scored, and the place


# -- rows -------------------------------------------------------------------------------------------------------------
def read_rows(path: Path, split: str) -> list[dict]:
    """Return the rows of a file or of a save_to_disk folder, without what Arrow fills in. Raises UsageError.

    split: of a folder that has several.
    """
    if not path.exists():
        raise UsageError(f"the data {path} does not exist: pass a .jsonl, .json or .parquet file or a dataset folder")
    if path.is_dir() and not is_dataset_folder(path):
        raise UsageError(f"{path} is not a dataset folder: pass one that save_to_disk wrote, or a .jsonl file")
    rows = []
    for chunk in open_chunks(path, split):
        for line, row in chunk.rows():
            if isinstance(row, InvalidRow):
                raise UsageError(f"{path}, line {line} is {row.reason} ({row.detail}): repair or remove it")
            rows.append(row)
    return rows


def open_chunks(path: Path, split: str) -> Iterable[Chunk]:
    if (path / "dataset_dict.json").is_file():
        return chunk_table(open_split(path, split).table, split, split)
    return read_chunks(path)


def clean_row(row: object, number: int) -> dict:
    """Return the number-th row of the data as {id, messages, tools, kwargs, source, tags, mode}. Raises UsageError.

    tools: None where it has none. mode: think, no_think or None. Its json_schema stands there where it has one.
    """
    where = f"row {number}"
    if isinstance(row, dict) and row.get("id"):
        where += f" ({row['id']})"
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        raise UsageError(f"{where} of the data has no messages: run data_prep on the set first")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UsageError(f"{where} of the data has a message without a role: write messages as {{role, content}}")
    kwargs = {key: value for key, value in (row.get("chat_template_kwargs") or {}).items() if value is not None}
    modes = {True: "think", False: "no_think"}
    cleaned = {
        "id": str(row["id"] if row.get("id") is not None else number),
        "messages": [{key: value for key, value in message.items() if value is not None} for message in messages],
        "tools": read_tools(row, where),
        "kwargs": kwargs,
        "source": str(row.get("source") or "no source"),
        "tags": list(row.get("tags") or []),
        "mode": modes.get(kwargs.get("enable_thinking")),
    }
    if row.get("json_schema") is not None:
        cleaned["json_schema"] = read_schema(row["json_schema"], where)
    return cleaned


def read_tools(row: dict, where: str) -> list[dict] | None:
    """Return the tools of a row, None where it has none. Raises UsageError."""
    try:
        tools = get_tools(row) if row.get("tools") else None
        if not isinstance(tools or [], list):
            raise ValueError("not a list")
    except ValueError as error:
        raise UsageError(
            f"{where} of the data has tools that are not a JSON list ({first_line(error)}): repair them"
        ) from None
    return tools or None


def read_schema(schema: object, where: str) -> object:
    """Return a JSON schema, or that of a text. Raises UsageError."""
    try:
        if isinstance(schema, str):
            schema = json.loads(schema)
        validator(schema)
    except (ValueError, SchemaError) as error:
        raise UsageError(
            f"{where} of the data has a json_schema that is no JSON schema ({first_line(error)}): repair it"
        ) from None
    return schema


# -- what is run ------------------------------------------------------------------------------------------------------
@dataclass
class Span:
    """The tokens [start, end) of one of a row's sequences."""

    sequence: int
    start: int
    end: int


@dataclass
class AskedAnswer:
    """The last answer of a row: what the model is asked, and what it is held against.

    prompt: the text, and its tokens in prompt_ids. reference: the data's own answer as the template writes it, without
    the stop token; reference_tokens: how many.
    """

    prompt: str
    prompt_ids: list[int]
    reference: str
    reference_tokens: int
    family: str
    question: Question

    @property
    def prompt_tail(self) -> str:
        return self.prompt[-PROMPT_TAIL:]


@dataclass
class PreparedRow:
    """A row rendered and tokenised under serving conditions.

    sequences: token lists to run. spans: every scored output in them. has_whole: whether the first sequence is the
    whole conversation. asked: None where the last answer is not asked for.
    """

    row: dict
    sequences: list[list[int]] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    has_whole: bool = False
    asked: AskedAnswer | None = None


def prepare(
    row: dict, tokenizer: PreTrainedTokenizerBase, stops: set[int], limit: int, skip: Skip
) -> PreparedRow | None:
    """Return a row of clean_row rendered and tokenised; None if it has no assistant turn.

    An output that stands in the whole conversation just as it was served shares its sequence, so that most rows cost
    one forward pass. limit: tokens. skip is called for whatever cannot be scored.
    """
    answers = [number for number, message in enumerate(row["messages"]) if message["role"] == "assistant"]
    prepared = PreparedRow(row)
    add_whole(prepared, tokenizer, limit, skip)
    for number in answers:
        place = f"{row['id']}, message {number}"
        if row["messages"][number].get("loss_mask") == 0:
            skip("answer with loss_mask 0", place)
            continue
        try:
            before = render_row(row, tokenizer, number, True)
            after = render_row(row, tokenizer, number + 1, False)
        except (TemplateError, TypeError, ValueError) as error:
            skip("answer refused by the template", f"{place}: {first_line(error)}")
            continue
        end = find_stop(after.ids, len(before.ids), stops)
        if not after.text.startswith(before.text):
            skip("answer not rendered as a continuation of its prompt", place)
        elif after.ids[: len(before.ids)] != before.ids:
            skip("answer whose first token straddles the prompt's end", place)
        elif end is None:
            skip("answer rendered without a stop token", place)
        elif end > limit:
            skip("answer longer than the limit", place)
        else:
            add_span(prepared, after.ids[:end], len(before.ids))
            if number == answers[-1]:
                reference = after.ids[len(before.ids) : end - 1]
                prepared.asked = ask_last(row, number, tokenizer, before, reference, skip)
    if not answers:
        return None
    return prepared


def render_row(row: dict, tokenizer: PreTrainedTokenizerBase, upto: int, generation_prompt: bool) -> Prompt:
    return render(tokenizer, row["messages"][:upto], generation_prompt, row["tools"], **row["kwargs"])


def add_whole(prepared: PreparedRow, tokenizer: PreTrainedTokenizerBase, limit: int, skip: Skip) -> None:
    """Add the whole conversation to the sequences, where it can be run."""
    row = prepared.row
    try:
        whole = render_row(row, tokenizer, len(row["messages"]), False).ids
    except (TemplateError, TypeError, ValueError) as error:
        skip("conversation refused by the template", f"{row['id']}: {first_line(error)}")
        return
    if len(whole) > limit:
        skip("conversation longer than the limit", row["id"])
        return
    prepared.sequences = [whole]
    prepared.has_whole = True


def find_stop(ids: Sequence[int], start: int, stops: set[int]) -> int | None:
    """Return where the first stop token from a position on ends, None where there is none."""
    for position in range(start, len(ids)):
        if ids[position] in stops:
            return position + 1
    return None


def add_span(prepared: PreparedRow, ids: list[int], start: int) -> None:
    """Add the output that begins at `start` of a conversation so far."""
    if prepared.has_whole and prepared.sequences[0][: len(ids)] == ids:
        prepared.spans.append(Span(0, start, len(ids)))
        return
    prepared.sequences.append(ids)
    prepared.spans.append(Span(len(prepared.sequences) - 1, start, len(ids)))


def ask_last(
    row: dict, number: int, tokenizer: PreTrainedTokenizerBase, before: Prompt, reference_ids: list[int], skip: Skip
) -> AskedAnswer | None:
    """Return what the number-th message of a row is asked for with; None where it does not parse itself."""
    family = find_family(tokenizer.chat_template)
    text = tokenizer.decode(reference_ids, clean_up_tokenization_spaces=False)
    place = f"{row['id']}, message {number}"
    try:
        reference = parse_answer(text, family, before.text, row["tools"])
    except InvalidRow as error:
        skip("tools that cannot be read", f"{place}: {error}")
        return None
    if reference.error or not reference.is_complete:
        skip("answer of the data that does not parse", f"{place}: {reference.error or 'its thought does not end'}")
        return None
    question = Question(reference, text, last_question(row["messages"][:number]))
    add_json_task(question, row, number, skip)
    return AskedAnswer(before.text, before.ids, text, len(reference_ids), family, question)


def last_question(messages: list[dict]) -> str:
    """Return the last message of the user, "" where there is none."""
    for message in reversed(messages):
        if message["role"] == "user":
            return str(message.get("content") or "")
    return ""


def add_json_task(question: Question, row: dict, number: int, skip: Skip) -> None:
    """Say in a Question whether JSON is wanted, and of what schema.

    A row asks for JSON by a tag of JSON_TAGS or a schema. Where the data's own answer contradicts that, the data is
    wrong: it is skipped as a JSON row.
    """
    tags = {tag.lower().replace("_", "-") for tag in row["tags"]}
    target = question.reference.content.strip()
    is_json = strict_json(target)
    if NEGATIVE_TAG in tags:
        if is_json:
            skip("negative JSON example whose own answer is JSON", row["id"])
        else:
            question.json = False
        return
    schemas = list_schemas(row, number)
    if not tags & JSON_TAGS and "json_schema" not in row and not (schemas and is_json):
        return
    if not is_json:
        skip("JSON row whose own answer is not JSON", row["id"])
        return
    question.json = True
    if schemas and schema_valid(schemas[-1], target):
        question.schema = schemas[-1]
        question.has_schema = True
    elif schemas:
        skip("JSON schema that the data's own answer does not meet", row["id"])


def list_schemas(row: dict, number: int) -> list[object]:
    """Return the JSON schemas of a row's number-th message, the one that counts last.

    Its column json_schema, else the <schema> blocks of the messages before, as NousResearch's json-mode-eval has them.
    """
    if "json_schema" in row:
        return [row["json_schema"]]
    texts = [message["content"] for message in row["messages"][:number] if isinstance(message.get("content"), str)]
    schemas = []
    for text in SCHEMA_IN_TEXT.findall("\n".join(texts)):
        try:
            schema = json.loads(text)
            validator(schema)
        except (ValueError, SchemaError):  # a text that only looks so
            continue
        if isinstance(schema, dict):
            schemas.append(schema)
    return schemas


# -- what comes out ---------------------------------------------------------------------------------------------------
def measure(
    model: PreTrainedModel | None,
    rows: Sequence[PreparedRow],
    tokenizer: PreTrainedTokenizerBase,
    stops: set[int],
    batch_size: int,
    max_new_tokens: int,
    name: str = "model",
    losses: Callable[..., list[np.ndarray]] = token_losses,
    answers: Callable[..., list[Output]] = generate,
    languages: bool = True,
) -> list[Record]:
    """Return one record (metrics.py) a prepared row, in their order. Raises UsageError.

    name: of the model, for messages. losses, answers: what computes them, token_losses and generate or the like; the
    model may be None where neither runs it. languages: whether the language of answers is looked at.
    """
    fill = fill_of(tokenizer, stops)
    sequences = [sequence for row in rows for sequence in row.sequences]
    all_losses = iter(losses(model, sequences, batch_size, fill, f"{name}: perplexity"))
    asked = [row.asked for row in rows if row.asked]
    prompts = [one.prompt_ids for one in asked]
    outputs = iter(answers(model, prompts, stops, batch_size, fill, max_new_tokens, f"{name}: answers"))
    allow_own_tokens(asked, tokenizer)
    records = []
    for row in rows:
        own = [next(all_losses) for _ in row.sequences]
        record = sum_losses(row, own)
        if not np.isfinite(record["nll"] + record["all_nll"]):
            raise UsageError(
                f"the {name} model's loss on row {row.row['id']} is not a number: repair its weights or dtype"
            )
        if row.asked:
            record |= judge_output(row, tokenizer, next(outputs), languages)
        records.append(record)
    return records


def allow_own_tokens(asked: Sequence[AskedAnswer], tokenizer: PreTrainedTokenizerBase) -> None:
    """Allow the control tokens that the data's own answers hold: they are its way to write."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    allowed: set[str] = set()
    for one in asked:
        allowed |= controls(join_parts(one.question.reference), special)
    for one in asked:
        one.question.special = special
        one.question.allowed = allowed


def sum_losses(row: PreparedRow, losses: Sequence[np.ndarray]) -> Record:
    """Return the record of a row without an answer. losses: of its sequences."""
    spans = [losses[span.sequence][span.start - 1 : span.end - 1] for span in row.spans]
    whole = losses[0] if row.has_whole else np.zeros(0)
    return {
        "nll": float(sum([span.sum() for span in spans])),
        "tokens": sum([len(span) for span in spans]),
        "turns": len(spans),
        "all_nll": float(whole.sum()),
        "all_tokens": len(whole),
        "texts": int(len(whole) > 0),
        **dict.fromkeys(ANSWER),
    }


def judge_output(row: PreparedRow, tokenizer: PreTrainedTokenizerBase, output: Output, languages: bool) -> Record:
    """Return the keys of a record that tell of an answer."""
    asked = row.asked
    text = tokenizer.decode(output.tokens, clean_up_tokenization_spaces=False)
    answer: Answer = parse_answer(text, asked.family, asked.prompt, row.row["tools"])
    return {
        "answer": text,
        "answer_tokens": len(output.tokens),
        "reference_tokens": asked.reference_tokens,
        **judge(asked.question, answer, text, output.stopped, output.failed, languages),
    }
