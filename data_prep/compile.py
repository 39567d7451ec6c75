"""Compile rows to tokens, labels and packs once, as a set that every recipe with this tokenizer and template loads.

    python -m data_prep.compile data/chats --recipe recipes/qwen3_qlora.py --out data/chats-compiled
    python -m data_prep.compile data/step --recipe recipes/qwen3_full.py --packing_strategy sequential --out data/packs
    accelerate launch recipes/qwen3_qlora.py --config recipes/configs/compiled.yaml --dataset_name data/chats-compiled

DATA is what the recipe would load, its DEFAULTS, --config and these flags say how; for a recipe of compiled sets, which
names neither mask nor length, --assistant_only_loss and --max_length do. OUT is a dataset folder (for
load_from_disk) with the splits that the recipe would train on and validate with, held-out rows drawn as it draws them:
  input_ids    int32; a row a pack, or a document without packing
  labels       int32; -100 where nothing is trained, which the first token of each document never is
  seq_lengths  tokens of each document in the pack, by which TRL's collator keeps the documents apart
  ids          the documents' row ids, which the trainer leaves out
Packs of bfd and bfd_split are TRL's own. sequential packs next-fit in the rows' order, as StepTron does: a row that is
longer than max_length is dropped and closes the open pack. Such packs are trained in order with
--train_sampling_strategy sequential: of N processes the first takes packs 0, N, 2N …, the second 1, N + 1 …

report.json holds the hashes of tokenizer and template; a recipe of another tokenizer or template refuses the set before
its weights load (recipes/hooks). rejected.jsonl lists the rows that cannot be rendered, those with nothing to
train and, in sequential packs, those too long (file = split, line = row from 1); cut ones are counted in report.json.

Exit 0: done, some rows may be refused. 1: nothing left, nothing written. 2: bad input, one sentence.
"""

import hashlib
import json
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa

from data_prep.common.chunks import Chunk
from data_prep.common.command_line import add_num_proc, format_counts, make_parser, run_command
from data_prep.common.errors import InvalidRow, UsageError
from data_prep.common.fast_tokens import missing_name
from data_prep.common.packing import batches, nest, pack_columns
from data_prep.common.parallel import parallel_map
from data_prep.common.personas import PERSONA_LOST, LostPersonas
from data_prep.common.readers import find_inputs, open_splits, relative_names
from data_prep.common.recipe_rows import load_rows, load_sets, shuffle, split_by_prompt
from data_prep.common.recipe_settings import (
    LENGTH_REMEDY,
    Settings,
    add_recipe_flags,
    read_settings,
    require_named_mask,
)
from data_prep.common.rendering import Renderer, hash_tokenizer, load_renderer
from data_prep.common.tokens import MASKED, Document, FailedRow, NumberedRow, check_chat, tokenize_rows
from data_prep.common.writer import ChunkResult, DatasetWriter, SplitFile, check_output_path, explain_os_errors

if TYPE_CHECKING:
    from datasets import Dataset

SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("seq_lengths", pa.list_(pa.int32())),
        ("ids", pa.list_(pa.string())),
    ]
)
NOT_RENDERED = "template refuses the row"  # reasons in rejected.jsonl
NOTHING_TO_TRAIN = "nothing to train"
TOO_LONG = "longer than max_length"
FLAGS = (
    "model_name_or_path",
    "chat_template_path",
    "assistant_only_loss",
    "dataset_train_split",
    "dataset_test_split",
    "max_length",
    "packing",
    "eval_rows",
    "seed",
)


# -- which rows, in the order in which the recipe packs them ----------------------------------------------------------
class OrderedRows(NamedTuple):
    """Rows, and the positions of those that are wanted, in their order."""

    rows: "Dataset"
    order: list[int]


def read_splits(data: Path, settings: Settings) -> dict[str, OrderedRows]:
    """Return the splits that the recipe would train on and validate with. Raises UsageError."""
    rows, order, note = load_rows(data, settings)
    check_not_compiled(data, rows)
    sets = load_sets(data, settings.dataset_train_split)
    splits = {settings.dataset_train_split: OrderedRows(rows, order)}
    name = settings.dataset_test_split
    if name in sets:
        if name == settings.dataset_train_split or not len(sets[name]):
            return splits
        validation = OrderedRows(sets[name], list(range(len(sets[name]))))
    elif settings.eval_rows:
        validation = OrderedRows(rows, split_by_prompt(rows, settings.eval_rows, settings.seed)[1])
        if not validation.order:
            raise UsageError(f"{data}: {note}")
    else:
        return splits
    if settings.shuffle_dataset:  # as TRL shuffles before it packs
        validation = OrderedRows(validation.rows, shuffle(validation.order, settings.seed))
    splits[name] = validation
    return splits


def check_not_compiled(data: Path, rows: "Dataset") -> None:
    if "input_ids" in rows.column_names:
        raise UsageError(f"{data}: its rows are tokens already: pass the rows of messages that they were made of")


def read_blocks(split: str, ordered: OrderedRows, num_proc: int | None) -> Iterator[Chunk]:
    """Yield chunks of NumberedRow: the batches within which TRL packs, with dataset_num_proc processes."""
    for batch in batches(len(ordered.order), num_proc):
        numbers = [ordered.order[position] for position in batch]
        rows = ordered.rows.select(numbers)
        numbered = [NumberedRow(number, row) for number, row in zip(numbers, rows, strict=True)]
        yield Chunk(split, split, batch.start, numbered)


# -- one block --------------------------------------------------------------------------------------------------------
@dataclass
class CompiledDocument:
    """The tokens of a row, and those of its labels that are trained, -100 elsewhere: (tokens,) int32."""

    name: str
    ids: np.ndarray
    labels: np.ndarray


@dataclass
class CompiledBlock:
    """What compile_block makes of a block: packs, or what sequential packs are made of."""

    documents: int = 0  # kept ones
    packs: pa.RecordBatch | None = None
    unpacked: list[CompiledDocument | None] = field(default_factory=list)  # None where a row is too long


@cache
def open_renderer(settings: str) -> Renderer:
    """Return the Renderer of settings in JSON: loaded once a process."""
    return load_renderer(Settings(**json.loads(settings)))


@cache
def open_lost_personas(settings: str) -> LostPersonas:
    return LostPersonas(open_renderer(settings))


def check_persona(row: dict, lost_personas: LostPersonas) -> None:
    """Raise InvalidRow for a row whose persona the template leaves out: in a compiled set no recipe can see it."""
    persona = lost_personas.find(row)
    if persona is not None:
        raise InvalidRow(PERSONA_LOST, f"{persona.place}: {persona.text[:60]!r} is not in the rendered text")


def dump_settings(settings: Settings) -> str:
    return json.dumps(vars(settings))


def compile_block(block: Chunk, settings: Settings, chat: bool) -> ChunkResult:
    """Tokenize and pack a block of NumberedRow; payload: a CompiledBlock, counts: what max_length cuts off."""
    renderer = open_renderer(dump_settings(settings))
    lost_personas = open_lost_personas(dump_settings(settings))
    failed: list[FailedRow] = []
    result = ChunkResult(rows_in=len(block.data), payload=CompiledBlock())
    documents = tokenize_rows(block.data, renderer, settings, chat, failed, encodings=False)
    for number, row, reason in failed:
        result.rejected.append(rejected_entry(block.split, number, row, NOT_RENDERED, reason))
    kept: list[CompiledDocument | None] = []
    for document in documents:
        try:
            if chat:
                check_persona(document.row, lost_personas)
            kept.append(compile_document(document, settings))
        except InvalidRow as refusal:
            result.rejected.append(
                rejected_entry(block.split, document.number, document.row, refusal.reason, refusal.detail)
            )
            if refusal.reason == TOO_LONG:
                kept.append(None)
        else:
            result.counts += count_truncated(document, settings)
    result.payload.documents = len(kept) - kept.count(None)
    if is_sequential(settings):
        result.payload.unpacked = kept
    elif settings.packing and kept:
        result.payload.packs = pack_documents(kept, settings)
    else:
        result.payload.packs = make_packs([[document] for document in kept])
    return result


def rejected_entry(split: str, number: int, row: dict, reason: str, detail: str) -> dict:
    """Return an entry of rejected.jsonl. number: of the row, from 0."""
    return {"file": split, "line": number + 1, "id": str(row.get("id") or ""), "reason": reason, "detail": detail}


def is_sequential(settings: Settings) -> bool:
    return settings.packing and settings.packing_strategy == "sequential"


def compile_document(document: Document, settings: Settings) -> CompiledDocument:
    """Return the ids and labels of a row, truncated where it is not packed. Raises InvalidRow where nothing is trained,
    and in sequential packs for a row that is too long."""
    limit = settings.max_length
    if is_sequential(settings) and len(document.ids) > limit:
        raise InvalidRow(TOO_LONG, f"{len(document.ids):,} tokens, {limit:,} fit")
    if not document.trained():
        raise InvalidRow(NOTHING_TO_TRAIN, "no token of the assistant")
    ids = np.array(document.ids, np.int32)
    labels = document.labels()
    if not settings.packing:
        kept = kept_tokens(len(ids), settings)
        ids = ids[kept]
        labels = labels[kept]
        if not (labels != MASKED).any():
            raise InvalidRow(NOTHING_TO_TRAIN, f"none within {limit} tokens")
    name = document.row.get("id")
    if name in (None, ""):
        name = document.number
    return CompiledDocument(str(name), ids, labels)


def kept_tokens(length: int, settings: Settings) -> slice:
    """Return the tokens of a row that truncation leaves."""
    if not settings.max_length:
        return slice(0, length)
    if settings.truncation_mode == "keep_end" and not settings.packing:
        return slice(max(0, length - settings.max_length), length)
    return slice(0, min(length, settings.max_length))


def count_truncated(document: Document, settings: Settings) -> Counter[str]:
    """Count what truncation takes of a row: rows, tokens, trained tokens."""
    kept = kept_tokens(len(document.ids), settings)
    lost = len(document.ids) - (kept.stop - kept.start)
    if not lost or settings.packing_strategy == "bfd_split":
        return Counter()
    return Counter(rows=1, tokens=lost, trained=document.trained() - document.trained(kept.start, kept.stop))


# -- packs ------------------------------------------------------------------------------------------------------------
def pack_documents(documents: list[CompiledDocument], settings: Settings) -> pa.RecordBatch:
    """Return TRL's packs of documents."""
    sizes = [len(document.ids) for document in documents]
    columns = {
        "input_ids": nest(sizes, pa.array(np.concatenate([document.ids for document in documents]))),
        "labels": nest(sizes, pa.array(np.concatenate([document.labels for document in documents]))),
        "document": nest(sizes, pa.array(np.repeat(np.arange(len(documents), dtype=np.int32), sizes))),
    }
    packs = pack_columns(columns, settings.max_length, settings.packing_strategy)
    ids, labels, numbers, lengths = (packs[name].chunk(0) for name in (*columns, "seq_lengths"))
    sizes = lengths.flatten().to_numpy()
    starts = np.cumsum(sizes) - sizes
    names = [documents[number].name for number in numbers.flatten().to_numpy()[starts].tolist()]
    return make_batch(ids.flatten().to_numpy(), labels.flatten().to_numpy(), sizes, names, lengths.value_lengths())


def make_packs(packs: list[list[CompiledDocument]]) -> pa.RecordBatch:
    """Return packs of these documents."""
    documents = [document for pack in packs for document in pack]
    if not documents:
        return pa.RecordBatch.from_pylist([], SCHEMA)
    ids = np.concatenate([document.ids for document in documents])
    labels = np.concatenate([document.labels for document in documents])
    sizes = np.array([len(document.ids) for document in documents], np.int32)
    names = [document.name for document in documents]
    return make_batch(ids, labels, sizes, names, [len(pack) for pack in packs])


def make_batch(
    ids: np.ndarray, labels: np.ndarray, sizes: np.ndarray, names: list[str], documents_of_packs: list[int] | pa.Array
) -> pa.RecordBatch:
    """Return packs of their tokens in a row: ids and labels (tokens,), sizes and names (documents,).

    The first token of a document is masked: nothing before it predicts it.
    """
    labels = labels.copy()
    labels[np.cumsum(sizes) - sizes] = MASKED
    last_documents = np.cumsum(documents_of_packs) - 1
    tokens_of_packs = np.diff(np.cumsum(sizes)[last_documents], prepend=0)
    columns = [
        nest(tokens_of_packs, pa.array(ids)),
        nest(tokens_of_packs, pa.array(labels)),
        nest(documents_of_packs, pa.array(sizes)),
        nest(documents_of_packs, pa.array(names, pa.string())),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


class NextFit:
    """Packs in the order of the documents: into the open pack where it fits, else into a new one."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.open: list[CompiledDocument] = []
        self.tokens = 0  # in the open pack

    def add(self, documents: list[CompiledDocument | None]) -> pa.RecordBatch:
        """Return the packs that these documents close; None stands for a row that is too long, which closes one too."""
        closed = []
        for document in documents:
            if self.open and (document is None or self.tokens + len(document.ids) > self.max_length):
                closed.append(self.open)
                self.open = []
                self.tokens = 0
            if document is not None:
                self.open.append(document)
                self.tokens += len(document.ids)
        return make_packs(closed)

    def close(self) -> pa.RecordBatch:
        """Return the open pack."""
        return make_packs([self.open] if self.open else [])


# -- the set ----------------------------------------------------------------------------------------------------------
class PackFile(SplitFile):
    """The packs of one split in the making."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.file = pa.OSFile(str(path), "wb")
        self.stream = pa.ipc.new_stream(self.file, SCHEMA)
        self.totals: Counter[str] = Counter()  # packs, tokens, trained

    def write(self, packs: pa.RecordBatch) -> None:
        self.stream.write_batch(packs)
        for number in range(len(packs)):  # a pack at a time: the same hash whatever the blocks
            for column in packs.columns:
                self.digest.update(digest_values(column[number].values))
        labels = packs.column("labels").flatten().to_numpy()
        self.totals.update(packs=len(packs), tokens=len(labels), trained=int((labels != MASKED).sum()))

    def close(self) -> None:
        self.stream.close()
        self.file.close()


def digest_values(values: pa.Array) -> bytes:
    """Return the sha256 of integers as 32-bit little-endian, of strings as a JSON list."""
    if pa.types.is_integer(values.type):
        return hashlib.sha256(values.to_numpy().astype("<i4").tobytes()).digest()
    return hashlib.sha256(json.dumps(values.to_pylist()).encode()).digest()


def describe_tokenizer(settings: Settings, renderer: Renderer) -> dict:
    """Return what the tokens depend on beside the rows, as report.json and recipes/hooks compare it: sha256 of what the
    tokenizer's file says and of the template's text, and the arguments."""
    return {
        "tokenizer": hash_tokenizer(renderer.tokenizer),
        "template": hashlib.sha256((renderer.template or "").encode()).hexdigest(),
        "kwargs": {
            "assistant_only_loss": settings.assistant_only_loss,
            "special_tokens": renderer.special_tokens,
        },
    }


def hash_inputs(data: Path) -> dict[str, str]:
    """Return {name: sha256} of the files of DATA."""
    path = find_inputs([data])[0]
    if not path.is_file():
        return {name: split.hash() for name, split in open_splits(path).items()}
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
    return {relative_names([path])[path]: hashlib.sha256(digest).hexdigest()}


# -- the command ------------------------------------------------------------------------------------------------------
def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("data", metavar="DATA", type=Path, help=".jsonl, .json or .parquet, or a save_to_disk folder")
    parser.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--packing_strategy", choices=("bfd", "bfd_split", "sequential"), help="as in the recipe, or")
    add_recipe_flags(parser, FLAGS)
    add_num_proc(parser)
    return run_command(parser, compile_set)


def read_compile_settings(args: Namespace) -> Settings:
    """Return the settings of the recipe, where packing_strategy may be sequential too. Raises UsageError."""
    flags = {name: getattr(args, name) for name in FLAGS}
    flags["packing_strategy"] = args.packing_strategy
    if args.packing_strategy == "sequential":
        flags["packing_strategy"] = "bfd"  # sequential is no strategy of TRL
        if args.packing is None:
            flags["packing"] = True
    settings = read_settings(args.recipe, args.config, flags)
    if settings.packing_strategy == "wrapped" and settings.packing:
        raise UsageError(
            "packing_strategy wrapped: joins documents, and this set keeps them apart: pass --packing_strategy "
            "bfd_split, or leave it to the recipe"
        )
    if args.packing_strategy == "sequential":
        settings.packing_strategy = "sequential"
    require_named_mask(settings, args.assistant_only_loss)
    return settings


def compile_set(args: Namespace) -> int:
    """Compile DATA and return the exit code. Raises UsageError."""
    check_output_path(args.out)
    settings = read_compile_settings(args)
    splits = read_splits(args.data, settings)
    renderer = open_renderer(dump_settings(settings))
    train = splits[settings.dataset_train_split]
    chat = bool(train.order) and check_chat(train.rows[train.order[0]], renderer, settings)
    totals = {split: Counter() for split in splits}
    with DatasetWriter(args.out, "compile.py", settings.seed) as writer:
        writer.input_hashes |= hash_inputs(args.data)
        process_block = partial(compile_block, settings=settings, chat=chat)
        for split, ordered in splits.items():
            blocks = read_blocks(split, ordered, settings.dataset_num_proc)
            results = parallel_map(process_block, blocks, args.num_proc)
            totals[split] = write_split(writer, split, results, settings)
        if not totals[settings.dataset_train_split]:
            print(f"{args.data}: nothing left to train ({format_counts(writer.refused)})", file=sys.stderr)
            return 1
        lines = format_table(totals, dict(writer.rows_out), settings)
        more = {
            "packing": settings.packing_strategy if settings.packing else "none",
            "max_length": settings.max_length,
            "cut": dict(sorted(writer.counts.items())),
            "splits": {split: dict(counts) for split, counts in totals.items()},
            **describe_tokenizer(settings, renderer),
        }
        writer.close(more, {"card.md": "\n".join([f"# {args.out.name}", "", *lines]) + "\n"})
    print(f"{args.out}: {writer.rows_out.total():,} rows, {writer.refused.total():,} refused", *lines, sep="\n")
    if writer.counts["trained"] or writer.refused[TOO_LONG]:
        longer = writer.counts["rows"] + writer.refused[TOO_LONG]
        print(f"{longer:,} rows are longer than max_length {settings.max_length:,}: {LENGTH_REMEDY}")
    print_notes(renderer)
    return 0


def print_notes(renderer: Renderer) -> None:
    """Print what is odd about tokens and template, to stderr."""
    if renderer.mismatch is not None:
        print(renderer.mismatch, file=sys.stderr)
    missing = missing_name()
    if missing is not None:
        print(f"tokens and mask took the plain path, which is slower ({missing})", file=sys.stderr)


def write_split(writer: DatasetWriter, split: str, results: Iterator[ChunkResult], settings: Settings) -> Counter[str]:
    """Write the packs of one split; return its packs, tokens and trained tokens, empty where there is no pack."""
    for packs in collect_packs(writer, split, results, settings):
        if not len(packs):
            continue
        with explain_os_errors(writer.out):
            if split not in writer.splits:
                writer.splits[split] = PackFile(writer.staging / f"{split}.rows")
            writer.splits[split].write(packs)
    if split not in writer.splits:
        return Counter()
    return writer.splits[split].totals


def collect_packs(
    writer: DatasetWriter, split: str, results: Iterator[ChunkResult], settings: Settings
) -> Iterator[pa.RecordBatch]:
    """Yield the packs of one split, and count its rows in the writer."""
    next_fit = NextFit(settings.max_length)
    for result in results:
        block = result.payload
        writer.add(result)
        writer.rows_out[split] += block.documents
        if is_sequential(settings):
            yield next_fit.add(block.unpacked)
        else:
            yield block.packs
    if is_sequential(settings):
        yield next_fit.close()


def format_table(totals: dict[str, Counter[str]], rows_out: dict[str, int], settings: Settings) -> list[str]:
    """Return the lines of a Markdown table: a split each."""
    lines = ["| split | rows | packs | tokens | trained | filled |", "|---|---|---|---|---|---|"]
    for split, counts in totals.items():
        filled = ""
        space = counts["packs"] * (settings.max_length or 0)
        if space and settings.packing:
            filled = f"{counts['tokens'] / space:.1%}"
        numbers = [rows_out[split], counts["packs"], counts["tokens"], counts["trained"]]
        lines.append("| " + " | ".join([split, *(f"{number:,}" for number in numbers), filled]) + " |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
