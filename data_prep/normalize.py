"""Turn raw rows of a known source into messages rows, the one row shape of this collection.

    python -m data_prep.normalize auto "raw/chat/*.json*" --out data/chat
    python -m data_prep.normalize gsm8k raw/gsm8k/train.jsonl --out data/gsm8k
    zcat rows.jsonl.gz | python -m data_prep.normalize messages - --out data/rows.jsonl
    python -m data_prep.normalize gsm8k openai/gsm8k:main --out data/gsm8k
    python -m data_prep.normalize fields table.csv --map "prompt={subject}: {customer}" answer=agent --out data/own
    python -m data_prep.normalize fields x.parquet --map messages=dialog role=who content=text --roles bot=assistant \\
        --out data/own
    python -m data_prep.normalize spelling --rows 1000 --eval_rows 200 --out data/spelling

INPUT is a file (JSON lines, a JSON array, an object that wraps rows or holds columns, CSV, TSV, parquet; .gz or .zst),
a folder of them, a quoted glob, - for stdin, a hub id owner/name:config@split, or hf://datasets/owner/name/path, a
repository's files as they lie there; several are read in order. OUT ending in .jsonl becomes that file, with
NAME.report.json and NAME.rejected.jsonl beside it; any other OUT becomes a dataset folder (for load_from_disk, with
report.json, rejected.jsonl, card.md).

A row that cannot be used is refused, listed in rejected.jsonl (line = row number where the input has no lines) and
counted by reason: pictures and sound, an answer labelled as bad, a weight other than 0 and 1, one thing under two names
that differ (content and text, tools and functions, …). Keys that are not kept are counted on the terminal and in
report.json (keys_not_kept; messages.KEY: of a message). Text is stripped at both ends, because an answer that begins
with a newline merges with the newline of the role header, and CRLF becomes LF; content in parts (text, reasoning,
tool_call) becomes one string with its reasoning and calls beside it; nulls that Arrow filled into tool schemas and
calls go where the input is parquet or a folder, in JSON a null stays; nothing else is rewritten. Where a JSON object
names a key twice the last counts, as Python's json has it.

Reasoning (reasoning_content, or a <think> block that begins an answer) by --reasoning:
  keep    in reasoning_content: the template writes it, or refuses it
  drop    left out; enable_thinking of such a row becomes false
  inline  at the head of the answer as plain text, a blank line between, for templates without a place for it. Without
          <think> tags: a template writes tokens, text never holds them

auto looks at the first rows, says which of the sources it takes them for and why, and goes on. The sources, each with
its published shape:
{sources}

Exit 0: done, some rows may be refused. 1: every row refused, which OUT lists. 2: bad input, one sentence.
"""

import argparse
import hashlib
import inspect
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from types import NoneType

from data_prep.common.chunks import ROWS, Chunk
from data_prep.common.command_line import add_num_proc, format_counts, make_parser, run_command
from data_prep.common.errors import InvalidRow, UsageError
from data_prep.common.language import conversation_text, detect_language
from data_prep.common.media import find_media_token, refuse_media
from data_prep.common.parallel import parallel_map
from data_prep.common.parsing import (
    LOSS_FLAGS,
    TOOL_COLUMNS,
    is_deleted,
    is_empty,
    parse_json,
    parse_list,
    read_flag,
    read_tools,
    unread_message_keys,
)
from data_prep.common.readers import find_inputs, read_chunks
from data_prep.common.rows import Row, check_encodable, check_messages, find_control_token, read_columns
from data_prep.common.sources import MADE, SOURCES
from data_prep.common.sources.chats import TURN_COLUMNS, holds_list
from data_prep.common.sources.detect import FIRST_ROWS, MAP_ANYTHING, as_object, detect_source, suggest_source
from data_prep.common.sources.exchange import LABEL_COLUMNS, SYSTEM_KEYS, scalar_text
from data_prep.common.sources.fields import MAPPED, lacking_columns, mapped_columns, read_mapped, replaced_keys
from data_prep.common.sources.spelling import is_validation_word, read_word_list
from data_prep.common.writer import ChunkResult, DatasetWriter, encode_rows, row_location

AUTO = "auto"
BFCL_FOLDERS = ("possible_answer", "multi_turn_func_doc")  # in a folder of BFCL, which hold no rows
LABELS = ("label", "kto_tag")  # of KTO: whether the answer is one to learn
ROW_WEIGHTS = (*LOSS_FLAGS, "sample_weight")  # of a whole row
CONTEXT = (*SYSTEM_KEYS, *TOOL_COLUMNS, "history")  # in which the answer of a row is right
SHOWN_KEYS = 20


# -- one row ----------------------------------------------------------------------------------------------------------
def to_row(
    raw: object,
    source: str,
    row_id: str,
    reasoning: str = "keep",
    keys_not_kept: Counter[str] | None = None,
    **flags: object,
) -> Row:
    """Return a checked, complete row; raise InvalidRow.

    row_id: of a row without one. keys_not_kept: what of the row has no place is counted there. flags: those of the
    source's function.
    """
    raw = as_object(raw)
    if not isinstance(raw, dict):
        raise InvalidRow("row that is not an object", type(raw).__name__)
    unread = unread_columns(raw, source, flags)
    if unread:
        refuse_meaning(raw, unread, source)
    found = convert(raw, source, flags)
    turns = found["messages"]
    found["tools"] = read_tools(found)
    if isinstance(found.get("tags"), str):
        found["tags"] = [found["tags"]]
    found["chat_template_kwargs"] = read_template_kwargs(found)
    tools, kwargs, tags = read_columns(found)
    if any(["loss_mask" in turn and turn["role"] == "assistant" for turn in turns]):
        kwargs.setdefault("train_turns", "flagged")
    if reasoning != "keep":
        take_reasoning(turns, kwargs, inline=reasoning == "inline")
    check_messages(turns)
    refuse_control_tokens(turns, tools)
    refuse_media_tokens(turns, () if source == "fields" else raw)
    row = {"id": str(found.get("id") or row_id), "messages": turns}
    if tools:
        row["tools"] = tools
    row["chat_template_kwargs"] = kwargs
    row["source"] = str(found.get("source") or source)
    row["tags"] = [*tags, *label_tags(found)]
    lang = found.get("lang") or SOURCES[source].language
    row["lang"] = str(lang or detect_language(conversation_text(turns)))
    check_encodable(row)
    if keys_not_kept is not None:
        count_keys(keys_not_kept, raw, source, unread, found.get("not_kept", ()), flags)
    return row


def label_tags(found: dict) -> list[str]:
    """Return the tags of a row's columns domain and difficulty: "domain: math". Raises InvalidRow."""
    tags = []
    for name in LABEL_COLUMNS:
        value = found.get(name)
        for label in value if isinstance(value, list) else [value]:
            if isinstance(label, bool) or not isinstance(label, (str, int, float, NoneType)):
                raise InvalidRow("field of another type", f"{name} must be text or a number")
            if not is_empty(label):
                tags.append(f"{name}: {scalar_text(label)}")
    return tags


def read_template_kwargs(found: dict) -> object:
    """Return the template arguments of a row, which may be JSON text, with those that stand in columns of their own.

    Null is none. Raises InvalidRow, also for an argument that stands in both and differs.
    """
    kwargs = found.get("chat_template_kwargs")
    if isinstance(kwargs, str) and kwargs.lstrip().startswith("{"):
        kwargs = parse_json(kwargs, "chat_template_kwargs that are not JSON")
    columns = {}
    if not is_empty(found.get("enable_thinking")):  # verl
        columns["enable_thinking"] = read_switch(found, "enable_thinking")
    if not is_empty(found.get("only_last")) and read_switch(found, "only_last"):  # mistral-finetune
        columns["train_turns"] = "last"
    if not isinstance(kwargs, dict):
        return kwargs or columns
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    for name, value in columns.items():
        if kwargs.setdefault(name, value) != value:
            raise InvalidRow(f"{name} under two names", f"{value} in the row, {kwargs[name]} in chat_template_kwargs")
    return kwargs


def read_switch(found: dict, name: str) -> bool:
    """Return a column that is true or false. Raises InvalidRow."""
    flag = read_flag(found[name])
    if flag not in (0, 1):
        raise InvalidRow(f"{name} that is not true or false", str(found[name])[:80])
    return bool(flag)


def convert(raw: dict, source: str, flags: dict) -> dict:
    """Return what the source's function makes of a row. Raises InvalidRow."""
    try:
        return SOURCES[source].convert(raw, **flags)
    except InvalidRow:
        raise
    except KeyError as error:
        raise InvalidRow("missing field", explain_missing(str(error.args[0]), raw, source)) from None
    except IndexError:
        raise InvalidRow("missing field", "a list is empty") from None
    except (TypeError, AttributeError, ValueError) as error:  # a number where text belongs, a list for an object, …
        raise InvalidRow("field of another type", str(error)[:200]) from None


def explain_missing(field: str, raw: dict, source: str) -> str:
    """Return which field a row lacks, what it has, and the source that reads it."""
    if not raw:
        return f"{field}: the row is empty"
    columns = ", ".join(map(str, raw))[:200]
    fitting = suggest_source(raw)
    if fitting is None:
        return f"{field}: the row has {columns}; map its columns by {MAP_ANYTHING}"
    if fitting == source:
        return f"{field}: the row has {columns}"
    return f"{field}: the row has {columns}, which the source {fitting} reads"


def unread_columns(raw: dict, source: str, flags: dict) -> list[str]:
    """Return the columns of a row that its source does not read, where they hold something."""
    read = SOURCES[source].columns
    if raw.keys() <= read:
        return []
    mapped = {column.split(".")[0] for column in mapped_columns(flags.get("map") or {})}
    return [key for key, value in raw.items() if key not in read and key not in mapped and not is_empty(value)]


def refuse_meaning(raw: dict, unread: list[str], source: str) -> None:
    """Raise InvalidRow where a column that is not read says that the row is not to be trained like any other."""
    for key in LABELS:
        if key not in unread:
            continue
        is_bad = read_flag(raw[key]) == 0
        if source == "fields":
            is_bad = str(raw[key]).lower() == "false"  # a number may be any class
        if is_bad:
            raise InvalidRow(f"{key} false", "the row is labelled as an answer not to learn")
    if source == "fields":
        return  # its columns may be of any table
    refuse_media({key: raw[key] for key in unread}, "row")
    if "mask" in unread and "assistant" in str(raw["mask"]).lower():
        raise InvalidRow("mask of the assistant", f"mask {raw['mask']}: NeMo trains the user's turns of such a row")
    if "deleted" in unread and is_deleted(raw):
        raise InvalidRow("deleted row", str(raw["deleted"])[:80])
    for key in ROW_WEIGHTS:
        if key in unread:
            refuse_weight(key, raw[key])
    for key in CONTEXT:
        if key in unread:
            detail = f"{source} does not read it, and without it the answer means another thing"
            raise InvalidRow(f"{key} that would be lost", detail)


def refuse_weight(key: str, value: object) -> None:
    """Raise InvalidRow for the weight, or flag, of a whole row that does not train it like any other."""
    flag = read_flag(value)
    if flag is None and not isinstance(value, list):  # a word, or an object: no weight
        return
    if key == "loss" and isinstance(flag, float) and flag not in (0, 1):  # one that somebody measured
        return
    sound = 0 if key == "masked" else 1
    if flag != sound:
        raise InvalidRow(f"{key} of a row that is not {sound}", str(value)[:80])


def take_reasoning(turns: list[dict], kwargs: dict, inline: bool) -> None:
    """Take reasoning_content out of the messages, inline to the head of their content."""
    for turn in turns:
        thought = turn.pop("reasoning_content", None)
        if thought and inline:
            turn["content"] = f"{thought}\n\n{turn['content']}".strip()
    if kwargs.get("enable_thinking"):
        kwargs["enable_thinking"] = False


def refuse_control_tokens(turns: list[dict], tools: list[dict]) -> None:
    """Raise InvalidRow for text that a tokenizer would turn into a control token."""
    for value in chain.from_iterable([turn.values() for turn in turns]):
        token = find_control_token(value)
        if token:
            raise InvalidRow("control token in text", token)
    token = find_control_token(tools)
    if token:
        raise InvalidRow("control token in text", token)


def refuse_media_tokens(turns: list[dict], columns: Iterable[str]) -> None:
    """Raise InvalidRow for text in which a token stands for a picture, sound or film."""
    for number, turn in enumerate(turns):
        token = find_media_token(turn["content"], columns)
        if token:
            raise InvalidRow("token of media in text", f"{token} in message {number}: text alone is trained here")


def count_keys(
    keys_not_kept: Counter[str], raw: dict, source: str, unread: list[str], left_out: Iterable[str], flags: dict
) -> None:
    """Count the columns and the keys of messages that a row lost."""
    lost = [*unread, *left_out]
    mapped = flags.get("map") or {}
    read = SOURCES[source].columns
    turn_keys = SOURCES[source].turn_keys.split()
    if "messages" in mapped:
        lost += unread_message_keys(read_mapped(raw, mapped["messages"]), mapped.values(), replaced_keys(mapped))
    for column, value in raw.items():
        if column not in read:
            continue
        if column in TURN_COLUMNS:
            if not holds_list(value) and not is_empty(value):  # the name of something else
                lost.append(column)
                continue
            value = parse_list(value, column)
        if isinstance(value, list):
            lost += unread_message_keys(value, turn_keys)
    for key in lost:
        keys_not_kept[str(key)[:80].encode(errors="backslashreplace").decode()] += 1


# -- a chunk ----------------------------------------------------------------------------------------------------------
def name_stem(file: str) -> str:
    """Return the name of a file without its folders and endings, which rows without an id are called after."""
    return re.sub(r"(\.(jsonl?|ndjson|csv|tsv|parquet|gz|zst))+$", "", Path(file).name)


def normalize_chunk(
    chunk: Chunk, source: str, jsonl: bool = False, reasoning: str = "keep", flags: dict | None = None
) -> ChunkResult:
    """Return the result of a chunk of raw rows; its payload counts the rows that lack a column of --map."""
    flags = flags or {}
    stem = name_stem(chunk.file)
    rows = []
    rejected = []
    keys_not_kept = Counter()
    lacking = Counter()
    mapped = flags.get("map") or {}
    for line, raw in chunk.rows():
        row_id = name_row(raw, f"{stem}-{line}")
        try:
            if isinstance(raw, InvalidRow):
                raise raw
            row = to_row(raw, source, row_id, reasoning, keys_not_kept, **flags)
        except InvalidRow as error:
            refusal = error
        except RecursionError:
            refusal = InvalidRow("row nested too deep")
        else:
            rows.append(row)
            lacking.update(lacking_columns(as_object(raw), mapped))
            continue
        location = row_location(chunk.file, line, {"id": row_id})
        rejected.append({**location, "reason": refusal.reason, "detail": str(refusal)})
    encoded = encode_rows(rows, jsonl)
    encoded.keys_not_kept += keys_not_kept
    return ChunkResult({chunk.split: encoded}, rejected, len(rows) + len(rejected), payload=lacking)


def name_row(raw: object, name: str) -> str:
    """Return the id of a row, or the name where it has none."""
    if isinstance(raw, dict) and raw.get("id") is not None and raw["id"] != "":
        return str(raw["id"])
    return name


# -- all of them ------------------------------------------------------------------------------------------------------
def make_chunks(source: str, rows: int, validation_rows: int, seed: int) -> Iterator[Chunk]:
    """Yield chunks of rows that the source makes by their number: train, then validation."""
    for split, count in (("train", rows), ("validation", validation_rows)):
        for start in range(0, count, ROWS):
            data = []
            for number in range(start, min(start + ROWS, count)):
                row_id = f"{source}-{split}-{number + 1}"
                data.append({"id": row_id, "number": number, "split": split, "seed": seed})
            yield Chunk(source, split, start + 1, data)


@dataclass
class ChunkHead(Chunk):
    """The first rows of a chunk."""

    count: int

    def rows(self) -> Iterator[tuple[int, object]]:
        yield from islice(super().rows(), self.count)


def first_rows(chunks: Iterable[Chunk], count: int) -> Iterator[Chunk]:
    """Yield the chunks' first rows; the others are read, for the file's hash, and not parsed."""
    for chunk in chunks:
        if count > 0:
            yield ChunkHead(**vars(chunk), count=count)
            count -= sum([1 for _ in islice(chunk.rows(), count)])


def look_at_first(args: argparse.Namespace, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """Choose the source that fits the first rows, say which, and return the chunks, of which none is lost."""
    if args.map:
        args.source = "fields"
        return chunks
    seen = []
    rows = []
    for chunk in chunks:
        seen.append(chunk)
        rows += [row for _, row in islice(chunk.rows(), FIRST_ROWS)]
        if rows:
            break
    if not rows:
        args.source = "messages"  # which then finds that there are no rows
        return iter(seen)
    detected = detect_source(rows[:FIRST_ROWS], seen[-1].file)
    args.source = detected.source
    args.map = [f"{ours}={theirs}" for ours, theirs in detected.map.items()]
    print(f"auto: taken for {detected.source}: {detected.reason}")
    return chain(seen, chunks)


# -- flags ------------------------------------------------------------------------------------------------------------
def split_pairs(arguments: list[str], flag: str, names: Iterable[str] = ()) -> dict[str, str]:
    """Return {name: value} of NAME=VALUE arguments. Raises UsageError for another name, where names are passed."""
    values = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or (names and name not in names):
            allowed = f"one of {', '.join(names)}" if names else "a name"
            raise UsageError(f"{flag} {argument}: pass NAME=VALUE with {allowed} before the =")
        values[name] = value
    return values


def read_flags(args: argparse.Namespace, paths: list[Path | str], input_hashes: dict[str, str]) -> dict[str, object]:
    """Return the flags of the source's function; the hashes of their files go into input_hashes. Raises UsageError."""
    values = {
        "keep_disagreeing": args.keep_disagreeing,
        "fill": split_pairs(args.fill, "--fill"),
        "map": split_pairs(args.map, "--map", MAPPED),
        "roles": split_pairs(args.roles, "--roles"),
        "words": args.words,
        "answers": args.answers,
    }
    known = inspect.getfullargspec(SOURCES[args.source].convert).kwonlyargs
    for name, value in values.items():
        if value and name not in known:
            raise UsageError(f"--{name}: {args.source} has no use for it: leave it out")
    if args.source == "fields":
        check_map(values["map"])
    if args.words:
        input_hashes[Path(args.words).name] = hash_word_list(args.words)
    if args.source == "bfcl":
        values["answers"] = read_answers(args.answers or find_answers(paths), input_hashes)
    return {name: value for name, value in values.items() if value and name in known}


def check_map(mapped: dict[str, str]) -> None:
    """Raise UsageError for a --map by which no row can be read."""
    mapped_columns(mapped)
    if "messages" not in mapped and not {"prompt", "answer"} <= mapped.keys():
        raise UsageError("fields: pass --map prompt=COLUMN answer=COLUMN, or --map messages=COLUMN")


def hash_word_list(path: str) -> str:
    """Return the sha256 of a list of words. Raises UsageError where it leaves a split without any."""
    try:
        words = read_word_list(path)
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error}): pass a text file, one word a line") from None
    if len({is_validation_word(word) for word in words}) < 2:
        raise UsageError(f"{path}: too few words to keep some for validation: pass a longer list, one word a line")
    return digest


def find_answers(paths: list[Path | str]) -> list[Path]:
    """Return BFCL's answer files that lie beside its questions."""
    local = [path for path in paths if isinstance(path, Path) and str(path) != "-"]
    beside = [path.with_name("possible_answer") / path.name for path in local]
    return [path for path in beside if path.is_file()]


def read_answers(paths: list[Path | str], input_hashes: dict[str, str]) -> dict[str, list]:
    """Return {id: ground_truth} of BFCL's answer files. Raises UsageError."""
    answers = {}
    hashes = {}
    for chunk in read_chunks(find_inputs(paths), hashes):
        for line, row in chunk.rows():
            if not isinstance(row, dict) or not isinstance(row.get("id"), str) or "ground_truth" not in row:
                raise UsageError(f"{chunk.file}:{line}: no id and ground_truth: pass files of BFCL's possible_answer")
            answers[row["id"]] = row["ground_truth"]
    for name, digest in hashes.items():
        input_hashes[f"answers: {name}"] = digest
    return answers


# -- the command ------------------------------------------------------------------------------------------------------
def describe_sources() -> str:
    """Return the table of sources for --help."""
    entries = []
    for name, source in SOURCES.items():
        text = f"{name:20}{' '.join(source.convert.__doc__.split())}"
        lines = textwrap.wrap(
            text, 118, initial_indent="  ", subsequent_indent=" " * 22, break_on_hyphens=False, break_long_words=False
        )
        entries.append("\n".join(lines))
    return "\n".join(entries)


def main() -> int:
    parser = make_parser(__doc__.replace("{sources}", describe_sources()))
    parser.add_argument("source", choices=[AUTO, *SOURCES], metavar="SOURCE", help="auto, or one of those above")
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="file, folder, quoted glob, - or owner/name")
    parser.add_argument("--out", type=Path, required=True, help="NAME.jsonl, or a folder that does not exist yet")
    parser.add_argument("--reasoning", choices=("keep", "drop", "inline"), default="keep", help="see above")
    parser.add_argument("--rows", type=int, default=None, help="the first rows of the input; of spelling: how many")
    parser.add_argument(
        "--eval_rows",
        type=int,
        default=0,
        help="rows of a folder drawn by seed, by whole prompts, as its validation split;\n"
        "of spelling: as many more, of other words",
    )
    pairs = {"nargs": "+", "action": "extend", "default": [], "metavar": "NAME=VALUE"}
    parser.add_argument("--map", **pairs, help="fields: our name of a field = its column there, a.b where it is nested")
    parser.add_argument("--roles", **pairs, help="fields: a speaker's name there = user, assistant, system or tool")
    parser.add_argument("--fill", **pairs, help="identity: what stands for {{NAME}}")
    parser.add_argument("--answers", nargs="+", default=[], help="bfcl: files with the reference calls")
    parser.add_argument("--words", default=None, help="spelling: a text file, one word a line")
    parser.add_argument("--keep_disagreeing", action="store_true", help="mawps: keep rows whose equation disagrees")
    parser.add_argument("--seed", type=int, default=42)
    add_num_proc(parser)
    return run_command(parser, normalize)


def check_args(args: argparse.Namespace) -> None:
    """Raise UsageError for arguments that do not go together."""
    is_made = args.source in MADE
    if is_made and (args.inputs or args.rows is None):
        raise UsageError(f"{args.source} makes its rows: pass --rows N and no INPUT")
    if not is_made and not args.inputs:
        raise UsageError(f"{args.source} needs an INPUT: pass files, a folder, a quoted glob, - or a hub id")
    if args.rows is not None and args.rows < 1:
        raise UsageError(f"--rows {args.rows}: pass a number above 0")
    if args.eval_rows < 0 or (args.eval_rows and args.out.suffix == ".jsonl"):
        raise UsageError("--eval_rows: needs a number above 0 and a folder as --out, a .jsonl file has no splits")


def open_input(args: argparse.Namespace, paths: list[Path | str], input_hashes: dict[str, str]) -> Iterator[Chunk]:
    """Return the chunks to work on; auto becomes the source that fits them."""
    if args.source in MADE:
        return make_chunks(args.source, args.rows, args.eval_rows, args.seed)
    chunks = read_chunks(paths, input_hashes)
    if args.source == AUTO:
        chunks = look_at_first(args, chunks)
    if args.rows:
        return first_rows(chunks, args.rows)
    return chunks


def normalize(args: argparse.Namespace) -> int:
    """Return the exit code; raises UsageError."""
    check_args(args)
    paths = find_inputs(args.inputs)
    if args.source in ("bfcl", AUTO):
        paths = [path for path in paths if Path(path).parent.name not in BFCL_FOLDERS]
    with DatasetWriter(args.out, f"normalize.py {args.source}", args.seed) as writer:
        chunks = open_input(args, paths, writer.input_hashes)
        writer.script = f"normalize.py {args.source}"
        flags = read_flags(args, paths, writer.input_hashes)
        work = partial(
            normalize_chunk, source=args.source, jsonl=writer.is_jsonl, reasoning=args.reasoning, flags=flags
        )
        first = None
        lacking = Counter()
        for result in parallel_map(work, chunks, args.num_proc):
            if first is None and result.rejected:
                first = result.rejected[0]
            lacking += result.payload
            writer.add(result)
        kept = writer.rows_out.total()
        if not writer.rows_in:
            raise UsageError(f"{', '.join(map(str, paths))}: no rows: pass files with JSON lines or a JSON array")
        if not kept:
            return refuse_all(writer, first)
        for path, count in lacking.items():
            if count == kept:
                raise UsageError(f"--map {path}: no row has it: name a column of the rows, or leave it out")
        if args.eval_rows and args.source not in MADE:
            hold_out(writer, args.eval_rows)
        report = writer.close()
    print(describe_result(args.out, writer, report))
    return 0


def refuse_all(writer: DatasetWriter, first: dict) -> int:
    """List the rows, all of which were refused, say so and return the exit code."""
    rejected = writer.close_rejected()
    print(
        f"all {writer.rows_in:,} rows refused ({format_counts(writer.refused)}), listed in {rejected}; the first, "
        f"{first['file']}:{first['line']}: {first['detail']}",
        file=sys.stderr,
    )
    return 1


def hold_out(writer: DatasetWriter, count: int) -> None:
    """Move whole prompts from train to validation. Raises UsageError where none are left to train on."""
    if set(writer.rows_out) != {"train"}:
        splits = ", ".join(writer.rows_out)
        raise UsageError(f"--eval_rows: the input has splits already ({splits}): leave it out")
    kept = writer.rows_out.total()
    if count >= kept:
        raise UsageError(f"--eval_rows {count}: only {kept} rows: keep some to train on")
    writer.hold_out(count)


def describe_result(out: Path, writer: DatasetWriter, report: dict) -> str:
    """Return what was kept, refused, left out and split."""
    sentence = f"{out}: {writer.rows_out.total():,} rows kept, {writer.refused.total():,} refused"
    if writer.refused:
        sentence += f" ({format_counts(writer.refused)})"
    if len(writer.rows_out) > 1:
        sentence += f"\nsplits: {', '.join([f'{split} {count:,}' for split, count in writer.rows_out.items()])}"
    if report.get("keys_not_kept"):
        counts = Counter(report["keys_not_kept"])
        keys = [f"{key} {count:,}" for key, count in counts.most_common(SHOWN_KEYS)]
        if len(counts) > SHOWN_KEYS:
            keys.append(f"and {len(counts) - SHOWN_KEYS} others, see report.json")
        sentence += f"\nkeys not kept: {', '.join(keys)}"
    return sentence


if __name__ == "__main__":
    sys.exit(main())
