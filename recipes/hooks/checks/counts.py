"""Counts of the prepared rows: trained tokens, fully masked packs, truncated rows, validation rows seen in training."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from data_prep.common.recipe_settings import LENGTH_REMEDY

from ..messages import UsageError, say
from .allowed import MAX_FAULTY_SHARE
from .template import read_training_template

if TYPE_CHECKING:
    from ..trainer import SFTTrainer

MASKED = -100  # label of a token that is not trained
BATCH_ROWS = 1000  # rows or packs read at a time
EXTRA_CANDIDATES = 64  # rows tokenized again beyond twice those wanted


@dataclass(frozen=True)
class DocumentBatch:
    """A stretch of rows or packs: values of all their tokens, and where documents and rows lie in them."""

    values: np.ndarray
    starts: np.ndarray  # of documents
    ends: np.ndarray  # of documents
    row_ends: np.ndarray


@dataclass
class TokenCounts:
    """Of the prepared train set. A unit is a pack, or a row where there is no packing."""

    units: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    masked_units: int = 0  # nothing in them is trained
    full_documents: int = 0  # documents of max_length tokens

    @property
    def trained_share(self) -> float:
        return self.trained_tokens / max(1, self.tokens)


@dataclass
class Truncation:
    rows: int = 0  # that lose trained tokens to max_length
    longest: int = 0  # tokens of the longest row looked at


def check_counts(trainer: "SFTTrainer", allow: list[str]) -> None:
    """Say what is trained; raise UsageError for too many truncated rows or fully masked packs."""
    rows = trainer.train_rows
    counts = count_tokens(trainer.train_dataset, trainer.args.max_length)
    truncation = find_truncated_rows(trainer, rows, counts.full_documents)
    kind = "rows"
    if trainer.padding_free or trainer.args.packing:
        kind = "packs"
    truncated = f"{truncation.rows:,} of {len(rows):,} rows truncated by max_length within what is trained"
    masked = f"{counts.masked_units:,} of {counts.units:,} {kind} fully masked"
    line = (
        f"{counts.trained_tokens:,} of {counts.tokens:,} tokens trained ({counts.trained_share:.1%}), {truncated}, "
        f"{masked}"
    )
    shared = count_shared_validation_rows(trainer)
    if shared:
        line += f", {shared:,} validation rows stand in train too"
    say(line)
    if truncation.rows > MAX_FAULTY_SHARE * len(rows) and "cut_answers" not in allow:
        raise UsageError(
            f"{truncated}, the longest has {truncation.longest:,} tokens: {LENGTH_REMEDY}; --allow cut_answers trains "
            "them truncated"
        )
    if counts.masked_units > MAX_FAULTY_SHARE * counts.units and "masked_packs" not in allow:
        raise UsageError(
            f"{masked}: they cost time at loss 0: leave out the rows that hold no answer or lose it to max_length; "
            "--allow masked_packs goes on with them"
        )


def read_documents(data: Dataset, column: str) -> Iterator[DocumentBatch]:
    """Yield the documents of a prepared set, BATCH_ROWS rows or packs at a time."""
    for table in data.with_format("arrow").iter(BATCH_ROWS):
        row_lengths = pc.list_value_length(table[column]).to_numpy()
        lengths = row_lengths
        if "seq_lengths" in data.column_names:
            lengths = pc.list_flatten(table["seq_lengths"]).to_numpy()
        ends = lengths.cumsum()
        starts = ends - lengths
        values = pc.list_flatten(table[column]).to_numpy()
        yield DocumentBatch(values, starts[lengths > 0], ends[lengths > 0], row_lengths.cumsum())


def count_tokens(data: Dataset, max_length: int | None) -> TokenCounts:
    """Return the counts of a prepared set. Nothing predicts a document's first token, so it is not trained."""
    column = "input_ids"
    if "labels" in data.column_names:
        column = "labels"
    counts = TokenCounts()
    for batch in read_documents(data, column):
        is_trained = batch.values != MASKED
        is_trained[batch.starts] = False
        trained_before = np.append(0, is_trained.cumsum())
        trained_by_row = np.diff(trained_before[np.append(0, batch.row_ends)])
        counts.units += len(batch.row_ends)
        counts.tokens += len(batch.values)
        counts.trained_tokens += int(trained_by_row.sum())
        counts.masked_units += int((trained_by_row == 0).sum())
        if max_length:
            counts.full_documents += int((batch.ends - batch.starts == max_length).sum())
    return counts


# -- truncated rows ---------------------------------------------------------------------------------------------------
def find_truncated_rows(trainer: "SFTTrainer", rows: Dataset, full_documents: int) -> Truncation:
    """Return exactly how many rows lose trained tokens to max_length.

    A document of max_length tokens is all that is ever left of a longer row. So their number, and that of the rows
    that TRL dropped because nothing to train was left, say how many rows to look for; they are looked for among those
    with most text first, tokenized again without a limit.
    """
    args = trainer.args
    wanted = full_documents
    if not args.packing:
        wanted += len(rows) - len(trainer.train_dataset)
    loses_tokens = not args.packing or args.packing_strategy == "bfd"  # bfd_split and wrapped lose none
    truncation = Truncation()
    if not args.max_length or not wanted or not loses_tokens:
        return truncation
    order = np.argsort(-count_row_bytes(rows), kind="stable")
    start = 0
    candidates = 0
    with whole_rows(trainer) as prepare_rows:
        while candidates < wanted and start < len(order):
            chosen = order[start : start + 2 * wanted + EXTRA_CANDIDATES]
            start += len(chosen)
            for labels in prepare_rows(rows.select(chosen))["labels"]:
                if len(labels) >= args.max_length or set(labels) == {MASKED}:
                    candidates += 1
                if loses_answer(labels, args.max_length, from_start=keeps_end(trainer)):
                    truncation.rows += 1
                truncation.longest = max(truncation.longest, len(labels))
    return truncation


def keeps_end(trainer: "SFTTrainer") -> bool:
    return trainer.args.truncation_mode == "keep_end" and not trainer.args.packing


def loses_answer(labels: list[int], max_length: int, from_start: bool) -> bool:
    """Return whether what is beyond max_length tokens holds a trained one."""
    lost = labels[max_length:]
    if from_start:
        lost = labels[: max(0, len(labels) - max_length)]
    return any(label != MASKED for label in lost)


@contextmanager
def whole_rows(trainer: "SFTTrainer") -> Iterator[Callable[[Dataset], Dataset]]:
    """Yield prepare(rows): rows as TRL tokenizes and masks them, not truncated or packed; no bars, no cache files."""
    args = copy.copy(trainer.args)
    args.max_length = None
    args.shuffle_dataset = False
    args.dataset_num_proc = None
    template = trainer.chat_template
    had_bars = not datasets.are_progress_bars_disabled()
    had_caching = datasets.is_caching_enabled()

    def prepare(rows: Dataset) -> Dataset:
        return trainer._prepare_dataset(rows, trainer.processing_class, args, False, None, "long")

    datasets.disable_progress_bars()
    datasets.disable_caching()
    try:
        trainer.chat_template = read_training_template(trainer)
        yield prepare
    finally:
        trainer.chat_template = template
        if had_bars:
            datasets.enable_progress_bars()
        if had_caching:
            datasets.enable_caching()


def count_row_bytes(rows: Dataset) -> np.ndarray:
    """Return the bytes of all text of each row, (rows,)."""
    table = rows.with_format("arrow")[:]
    total = np.zeros(len(rows), int)
    for column in table.columns:
        total += count_text_bytes(column.combine_chunks())
    return total


def count_text_bytes(array: pa.Array) -> np.ndarray:
    """Return the bytes of all text below each element of an Arrow array, (elements,)."""
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    if isinstance(array, pa.ExtensionArray):  # JSON, as data_prep writes turns
        return count_text_bytes(array.storage)
    if isinstance(array, pa.StructArray):
        total = np.zeros(len(array), int)
        for child in array.flatten():
            total += count_text_bytes(child)
        return total
    if isinstance(array, pa.ListArray | pa.LargeListArray):
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy()
        bytes_before = np.append(0, count_text_bytes(array.flatten()).cumsum())
        return np.diff(bytes_before[np.append(0, lengths.cumsum())])
    if isinstance(array, pa.StringArray | pa.LargeStringArray):
        return pc.fill_null(pc.binary_length(array), 0).to_numpy()
    return np.zeros(len(array), int)


# -- validation -------------------------------------------------------------------------------------------------------
def count_shared_validation_rows(trainer: "SFTTrainer") -> int:
    """Return how many validation rows are training rows too, token by token; truncated ones are left out."""
    if not isinstance(trainer.eval_dataset, Dataset):
        return 0
    max_length = trainer.args.max_length
    validation = list(hash_documents(trainer.eval_dataset, max_length))
    if not validation:
        return 0
    shared = set(validation) & set(hash_documents(trainer.train_dataset, max_length))
    return sum(document in shared for document in validation)


def hash_documents(data: Dataset, max_length: int | None) -> Iterator[int]:
    """Yield a hash of each document's tokens, but for those of max_length tokens, which may be truncated."""
    for batch in read_documents(data, "input_ids"):
        for start, end in zip(batch.starts, batch.ends, strict=True):
            if end - start != max_length:
                yield hash(batch.values[start:end].tobytes())
