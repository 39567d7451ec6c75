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
import os
import shutil
import sys
from collections import Counter
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa

from data_prep.common.arrow_rows import schema_of
from data_prep.common.chunks import Chunk
from data_prep.common.command_line import add_num_proc, format_counts, make_parser, run_command
from data_prep.common.errors import UsageError
from data_prep.common.json_text import dump_json_lenient
from data_prep.common.packing import MAP_BATCH, pack_lengths
from data_prep.common.parallel import parallel_map
from data_prep.common.readers import find_inputs, list_splits, relative_names
from data_prep.common.recipe_rows import load_rows, load_sets, split_by_prompt
from data_prep.common.recipe_settings import read_settings, require_named_mask
from data_prep.common.rendering import load_renderer
from data_prep.common.tokens import check_chat, tokenize_rows
from data_prep.common.writer import SHARD, ChunkResult, check_output_path, explain_os_errors, make_report, write_utf8

INTEGERS = {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "List"}
FEATURES = {
    "input_ids": INTEGERS,
    "labels": INTEGERS,
    "seq_lengths": INTEGERS,
    "ids": {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"},
}
SCHEMA = schema_of(FEATURES)
MASKED, TOO_LONG = "nothing to train", "longer than max_length"


def boolean(word):
    if word.lower() not in ("true", "false"):
        raise ValueError(word)
    return word.lower() == "true"


FLAGS = {  # of the recipe: name: type
    "model_name_or_path": str, "chat_template_path": str, "assistant_only_loss": boolean, "dataset_train_split": str,
    "dataset_test_split": str, "max_length": int, "packing": boolean, "eval_rows": int, "seed": int,
}  # fmt: skip


# -- which rows, in the order in which the recipe packs them ----------------------------------------------------------
def splits_of(data, settings):
    """{split: (rows, order)}. Raises UsageError."""
    rows, order, note = load_rows(data, settings)
    if "input_ids" in rows.column_names:
        raise UsageError(f"{data}: its rows are tokens already: pass the rows of messages that they were made of")
    name, sets = settings.dataset_test_split, load_sets(Path(data), settings.dataset_train_split)
    splits = {settings.dataset_train_split: (rows, order)}
    if name in sets:
        if name != settings.dataset_train_split and len(sets[name]):
            splits[name] = sets[name], shuffled([*range(len(sets[name]))], settings)
    elif settings.eval_rows:
        _, validation = split_by_prompt(rows, settings.eval_rows, settings.seed)
        if not validation:
            raise UsageError(f"{data}: {note}")
        splits[name] = rows, shuffled(validation, settings)
    return splits


def shuffled(order, settings):
    """As datasets shuffles before TRL packs, where it is asked to."""
    if not settings.shuffle_dataset:
        return order
    return [order[i] for i in np.random.default_rng(settings.seed).permutation(len(order)).tolist()]


def blocks_of(splits, settings):
    """Blocks of (number, row): the batches of datasets' map(), within which TRL packs, each process its own stretch."""
    for split, (rows, order) in splits.items():
        shares = min(settings.dataset_num_proc or 1, len(order)) or 1
        size, rest = divmod(len(order), shares)
        start = 0
        for share in range(shares):
            stop = start + size + (share < rest)
            for first in range(start, stop, MAP_BATCH):
                chosen = order[first : min(first + MAP_BATCH, stop)]
                yield Chunk(split, split, first, [*zip(chosen, rows.select(chosen), strict=True)])
            start = stop


# -- one block --------------------------------------------------------------------------------------------------------
@cache
def prepared(given):
    """(settings, Against) of settings as JSON: one load a process."""
    settings = SimpleNamespace(**json.loads(given))
    return settings, load_renderer(settings)


def work(block, given, chat):
    """Result of a Block of (number, row); packed: {split: RecordBatch of packs}, more: tokens in it that are trained. A
    sequential pack may span blocks: there the packs are single documents, and more than max_length tokens are none."""
    settings, against = prepared(given)
    failed, result, kept = [], ChunkResult(rows_in=len(block.data)), []
    docs = tokenize_rows(block.data, against, settings, chat, failed, encodings=False)
    for number, row, reason in failed:
        result.rejected.append(rejected(block.split, number, row, "template refuses the row", reason))
    sequential = settings.packing and settings.packing_strategy == "sequential"
    for doc in docs:
        ids, limit = np.array(doc.ids, np.int32), settings.max_length
        labels = np.full(len(ids), -100, np.int32)
        for start, end in doc.spans:
            labels[start:end] = ids[start:end]
        name = doc.row.get("id")
        name = str(doc.number if name in (None, "") else name)
        live = int((labels != -100).sum())
        if sequential and len(ids) > limit:
            said = f"{len(ids):,} tokens, {limit:,} fit"
            result.rejected.append(rejected(block.split, doc.number, doc.row, TOO_LONG, said))
            kept.append((ids[:0], labels[:0], name))
            continue
        if not settings.packing and limit:
            end = settings.truncation_mode == "keep_end"
            ids, labels = (part[-limit:] if end else part[:limit] for part in (ids, labels))
        if not live or not (settings.packing or (labels != -100).any()):
            said = "no token of the assistant" if not live else f"none within {limit} tokens"
            result.rejected.append(rejected(block.split, doc.number, doc.row, MASKED, said))
            continue
        if limit and len(doc.ids) > limit and settings.packing_strategy != "bfd_split":
            lost = live - int(((labels if not settings.packing else labels[:limit]) != -100).sum())
            result.counts += Counter(rows=1, tokens=len(doc.ids) - limit, trained=lost)
        kept.append((ids, labels, name))
    packs = [[(index, 0, len(ids))] for index, (ids, _, _) in enumerate(kept)]
    if settings.packing and not sequential:
        packs = pack_lengths([len(ids) for ids, _, _ in kept], settings.max_length, settings.packing_strategy)
    result.encoded = {block.split: batch_of([[(*kept[index], a, b) for index, a, b in one] for one in packs])}
    result.payload = {"documents": len(kept) - sum(entry["reason"] == TOO_LONG for entry in result.rejected)}
    return result


def rejected(split, number, row, reason, detail):
    return {"file": split, "line": number + 1, "id": str(row.get("id") or ""), "reason": reason, "detail": detail}


def batch_of(packs):
    """A RecordBatch of packs: lists of (ids, labels, name, start, end)."""
    tokens = [[ids[a:b] for ids, _, _, a, b in one] for one in packs]
    labels = [[part[a:b].copy() for _, part, _, a, b in one] for one in packs]
    for part in (part for one in labels for part in one if len(part)):
        part[0] = -100
    lengths = [[len(part) for part in one] for one in tokens]
    columns = [nested([sum(one) for one in lengths], flat(parts)) for parts in (tokens, labels)]
    sizes = [len(one) for one in packs]
    columns.append(nested(sizes, np.array([n for one in lengths for n in one], np.int32)))
    columns.append(nested(sizes, [name for one in packs for _, _, name, _, _ in one], pa.string()))
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def flat(parts):
    parts = [part for one in parts for part in one]
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def nested(sizes, values, kind=None):
    offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, kind))


def documents_of(batch):
    """(ids, labels, name) of each row of a RecordBatch whose packs are single documents."""
    tokens, labels, _, names = (column.flatten() for column in batch.columns)
    ends = batch.column(0).offsets.to_numpy()
    for start, end, name in zip(ends, ends[1:], names.to_pylist(), strict=False):
        yield tokens.slice(start, end - start).to_numpy(), labels.slice(start, end - start).to_numpy(), name


class NextFit:
    """Packs in the order of the documents: into the open pack where there is room, else into a new one."""

    def __init__(self, max_length):
        self.room = self.max_length = max_length
        self.open = []

    def add(self, batch):
        """A RecordBatch of the packs that these documents close."""
        closed = []
        for ids, labels, name in documents_of(batch):
            if self.open and (len(ids) > self.room or not len(ids)):  # an empty one stands for a row too long
                closed.append(self.open)
                self.open, self.room = [], self.max_length
            if len(ids):
                self.open.append((ids, labels, name, 0, len(ids)))
                self.room -= len(ids)
        return batch_of(closed)

    def close(self):
        last, self.open, self.room = [self.open] if self.open else [], [], self.max_length
        return batch_of(last)


# -- the set ----------------------------------------------------------------------------------------------------------
class SetWriter:
    """Writes OUT, a dataset folder, aside and renames it in close(); without close() nothing is left."""

    def __init__(self, out):
        check_output_path(out)
        self.out, self.aside = out, out.with_name(f".{out.name}.{os.getpid()}.part")
        self.refused, self.found, self.digests, self.names, self.open = Counter(), {}, {}, {}, None

    def __enter__(self):
        with explain_os_errors(self.out):
            self.aside.mkdir(parents=True)
            self.rejected = open(self.aside / "rejected.jsonl", "wb")
        return self

    def __exit__(self, *_):
        with suppress(OSError, pa.ArrowInvalid):
            self.rejected.close()
            self.shut()
        shutil.rmtree(self.aside, ignore_errors=True)

    def reject(self, entry):
        with explain_os_errors(self.out):
            self.refused[entry["reason"]] += 1
            self.rejected.write(dump_json_lenient(entry) + b"\n")

    def write(self, split, batch):
        with explain_os_errors(self.out):
            found = self.found.setdefault(split, Counter())
            if not len(batch):
                return
            if self.open is None or self.open[0] != split or self.open[3] >= SHARD:
                self.next_shard(split)
            _, file, stream, _ = self.open
            stream.write_batch(batch)
            self.open[3] += batch.nbytes
            digest = self.digests.setdefault(split, hashlib.sha256())
            for number in range(len(batch)):  # a pack at a time: the same whatever the blocks
                for column in batch.columns:
                    digest.update(digest_of(column[number].values))
            labels = batch.column(1).flatten().to_numpy()
            found["packs"] += len(batch)
            found["tokens"] += len(labels)
            found["trained"] += int((labels != -100).sum())

    def next_shard(self, split):
        self.shut()
        folder, names = self.aside / split, self.names.setdefault(split, [])
        folder.mkdir(exist_ok=True)
        names.append(f"{len(names):05d}.arrow")
        file = pa.OSFile(str(folder / names[-1]), "wb")
        self.open = [split, file, pa.ipc.new_stream(file, SCHEMA), 0]

    def shut(self):
        if self.open:
            self.open[2].close()
            self.open[1].close()
            self.open = None

    def close(self, report, card):
        with explain_os_errors(self.out):
            self.shut()
            self.rejected.close()
            for split, names in self.names.items():
                folder = self.aside / split
                final = [f"data-{number:05d}-of-{len(names):05d}.arrow" for number in range(len(names))]
                for name, last in zip(names, final, strict=True):
                    (folder / name).rename(folder / last)
                state = {"_data_files": [{"filename": name} for name in final], "_split": split}
                state |= {"_fingerprint": self.digests[split].hexdigest()[:16], "_output_all_columns": False}
                state |= {"_format_columns": None, "_format_kwargs": {}, "_format_type": None}
                info = {"citation": "", "description": "", "features": FEATURES, "homepage": "", "license": ""}
                write_utf8(folder / "state.json", json.dumps(state, indent=2, sort_keys=True))
                write_utf8(folder / "dataset_info.json", json.dumps(info, indent=2))
            write_utf8(self.aside / "dataset_dict.json", json.dumps({"splits": [*self.names]}))
            write_utf8(self.aside / "card.md", card)
            write_utf8(self.aside / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
            self.aside.rename(self.out)


def digest_of(values):
    if pa.types.is_integer(values.type):
        return hashlib.sha256(values.to_numpy().astype("<i4").tobytes()).digest()
    return hashlib.sha256(json.dumps(values.to_pylist()).encode()).digest()


def made_with(settings, against):
    """What the tokens depend on beside the rows, as report.json and recipes/hooks compare it: sha256 of what the
    tokenizer's file says, of the template's text, and the arguments."""
    said = json.loads(against.tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    return {
        "tokenizer": hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest(),
        "template": hashlib.sha256((against.template or "").encode()).hexdigest(),
        "kwargs": {"assistant_only_loss": settings.assistant_only_loss, "special_tokens": against.names},
    }


def hashes_of(data):
    """{name: sha256} of the files of DATA."""
    path = find_inputs([data])[0]
    files = {relative_names([path])[path]: [path]} if path.is_file() else list_splits(path)
    hashes = {}
    for name, parts in files.items():
        digest = hashlib.sha256()
        for part in parts:
            with open(part, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        hashes[name] = digest.hexdigest()
    return hashes


def main():
    parser = make_parser(__doc__)
    parser.add_argument("data", metavar="DATA", help=".jsonl, .json or .parquet file, or a save_to_disk folder")
    parser.add_argument("--recipe", required=True, help="a recipes/NAME.py, whose DEFAULTS hold")
    parser.add_argument("--config", help="YAML file of a recipe's names: DEFAULTS < YAML < flags")
    parser.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--packing_strategy", choices=("bfd", "bfd_split", "sequential"), help="as in the recipe, or")
    for name, kind in FLAGS.items():
        parser.add_argument(f"--{name}", type=kind, help="as in the recipe")
    add_num_proc(parser)
    return run_command(parser, compile_set)


def compile_set(args):
    """The exit code; raises UsageError."""
    check_output_path(args.out)
    sequential = args.packing_strategy == "sequential"
    flags = {name: getattr(args, name) for name in FLAGS}
    flags |= {"packing_strategy": "bfd" if sequential else args.packing_strategy}
    flags |= {"packing": True} if sequential and args.packing is None else {}
    settings = read_settings(args.recipe, args.config, flags)
    if settings.packing_strategy == "wrapped" and settings.packing:
        raise UsageError("packing_strategy wrapped: joins documents, and this set keeps them apart: pass "
                       "--packing_strategy bfd_split, or leave it to the recipe")  # fmt: skip
    settings.packing_strategy = "sequential" if sequential else settings.packing_strategy
    require_named_mask(settings, args.assistant_only_loss)
    splits = splits_of(args.data, settings)
    given = json.dumps(vars(settings))
    against = prepared(given)[1]
    train, order = splits[settings.dataset_train_split]
    chat = check_chat(train[order[0]], against, settings) if order else False
    with SetWriter(args.out) as writer:
        report, lines = compiled(writer, splits, partial(work, given=given, chat=chat), settings, args)
        if not writer.found or not writer.found[settings.dataset_train_split]["packs"]:
            print(f"{args.data}: nothing left to train ({format_counts(writer.refused)})", file=sys.stderr)
            return 1
        report |= made_with(settings, against)
        writer.close(report, "\n".join([f"# {args.out.name}", "", *lines]) + "\n")
    print("\n".join([f"{args.out}: {sum(report['out'].values()):,} rows, {writer.refused.total():,} refused", *lines]))
    return 0


def compiled(writer, splits, job, settings, args):
    """Fill the writer; (report, lines of a table)."""
    rows, cut, total, fit, last = Counter(), Counter(), 0, NextFit(settings.max_length), None
    sequential = settings.packing and settings.packing_strategy == "sequential"
    for result in parallel_map(job, blocks_of(splits, settings), args.num_proc):
        total += result.rows_in
        cut += result.counts
        for entry in result.rejected:
            writer.reject(entry)
        for split, batch in result.encoded.items():
            if sequential and last not in (None, split):
                writer.write(last, fit.close())
            rows[split], last = rows[split] + result.payload["documents"], split
            writer.write(split, fit.add(batch) if sequential else batch)
    if sequential and last is not None:
        writer.write(last, fit.close())
    if total != sum(rows.values()) + writer.refused.total():
        raise AssertionError(f"compile.py: {total} rows in are not {rows} out + {writer.refused.total()} refused")
    hashes = {split: digest.hexdigest() for split, digest in writer.digests.items()}
    report = make_report("compile.py", total, dict(rows), writer.refused, settings.seed, hashes_of(args.data), hashes)
    strategy = settings.packing_strategy if settings.packing else "none"
    report |= {"packing": strategy, "max_length": settings.max_length, "cut": dict(sorted(cut.items()))}
    report |= {"splits": {split: dict(found) for split, found in writer.found.items()}}
    lines = ["| split | rows | packs | tokens | trained | filled |", "|---|---|---|---|---|---|"]
    for split, found in writer.found.items():
        room = found["packs"] * (settings.max_length or 0)
        filled = f"{found['tokens'] / room:.1%}" if room and settings.packing else ""
        numbers = [rows[split], found["packs"], found["tokens"], found["trained"]]
        lines.append("| " + " | ".join([split, *(f"{number:,}" for number in numbers), filled]) + " |")
    return report, lines


if __name__ == "__main__":
    sys.exit(main())
