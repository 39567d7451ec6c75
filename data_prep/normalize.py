"""Turn raw rows of a known source into messages rows, the one row shape of this collection.

    python -m data_prep.normalize gsm8k raw/gsm8k/train.jsonl --out data/gsm8k
    python -m data_prep.normalize sharegpt "raw/chat/*.json*" --out data/chat.jsonl
    zcat rows.jsonl.gz | python -m data_prep.normalize messages - --out data/rows
    python -m data_prep.normalize gsm8k openai/gsm8k:main --out data/gsm8k
    python -m data_prep.normalize fields raw.jsonl --map prompt=question answer=response system=persona --out data/own
    python -m data_prep.normalize fields x.parquet --map messages=dialog role=who content=text --roles bot=assistant \\
        --out data/own
    python -m data_prep.normalize spelling --rows 1000 --eval_rows 200 --out data/spelling

INPUT is a file (JSON lines, one JSON array, parquet; .gz or .zst), a folder of them, a quoted glob, - for stdin, a hub
id owner/name:config@split, or hf://datasets/owner/name/path, a repository's files as they lie there. OUT ending in
.jsonl becomes that file, with NAME.report.json and NAME.rejected.jsonl beside it; any other OUT becomes a dataset
folder (for load_from_disk, with report.json, rejected.jsonl, card.md). A row that cannot be used is refused, listed in
rejected.jsonl (line = row number in a JSON array or parquet file) and counted by reason. Text is stripped at both ends,
because an answer that begins with a newline merges with the newline of the role header, and CRLF becomes LF; content in
parts (text, reasoning, tool_call) becomes one string with its reasoning and calls beside it; nulls that Arrow filled
into tool schemas and calls go; nothing else is rewritten. Where a JSON object names a key twice the last counts, as
Python's json has it.

Reasoning (reasoning_content, or a <think> block that begins an answer) by --reasoning:
  keep    in reasoning_content: the template writes it, or refuses it
  drop    left out; enable_thinking of such a row becomes false
  inline  at the head of the answer as plain text, a blank line between, for templates without a place for it. Without
          <think> tags: a template writes tokens, text never holds them

The sources, each with its published shape:
{sources}

Exit 0: done, some rows may be refused. 1: every row refused, nothing written. 2: bad input, one sentence.
"""

import inspect
import re
import sys
import textwrap
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path

from data_prep.common.chunks import ROWS, Chunk
from data_prep.common.command_line import add_num_proc, format_counts, make_parser, run_command
from data_prep.common.errors import InvalidRow, UsageError
from data_prep.common.json_text import dump_json
from data_prep.common.language import conversation_text, detect_language
from data_prep.common.nulls import drop_filled_nulls, drop_nulls, tool_schemas
from data_prep.common.parallel import parallel_map
from data_prep.common.readers import find_inputs, read_chunks
from data_prep.common.rows import MARKS, check_messages, find_control_token, read_columns, refuse_unkept
from data_prep.common.sources import MADE, MAPPED, SOURCES, messages, smoltalk
from data_prep.common.writer import ChunkResult, DatasetWriter, bundled, encoded


# -- one row ----------------------------------------------------------------------------------------------------------
def to_row(raw, source, row_id, reasoning="keep", **flags):
    """A checked row, keys in the order of the house; raises InvalidRow. flags: those of the source's function."""
    convert, lang = SOURCES[source]
    if isinstance(raw, list):  # a line that is a list of messages
        raw = {"messages": raw}
    if not isinstance(raw, dict):
        raise InvalidRow("row that is not an object", type(raw).__name__)
    try:
        found = convert(raw, **flags)
    except InvalidRow:
        raise
    except (KeyError, IndexError) as error:
        raise InvalidRow("missing field", str(error.args[0])) from None
    except (TypeError, AttributeError, ValueError) as error:  # a number where text belongs, a list for an object, …
        raise InvalidRow("field of another type", str(error)[:200]) from None
    turns = found["messages"]
    tools, kwargs, tags = read_columns(found)
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    if reasoning != "keep":
        without_reasoning(turns, kwargs, inline=reasoning == "inline")
    check_messages(turns)
    if tools:
        tools = drop_nulls(tools)
        without_filled(turns, tool_schemas(tools))
    for value in chain(*map(dict.values, turns), tools):
        if hit := find_control_token(value):
            raise InvalidRow("control token in text", hit)
    row = {"id": str(found.get("id") or row_id), "messages": turns}
    row |= {"tools": tools} if tools else {}
    row |= {
        "chat_template_kwargs": kwargs,
        "source": str(found.get("source") or source),
        "tags": tags,
        "lang": str(found.get("lang") or lang or detect_language(conversation_text(turns))),
    }
    refuse_unkept(row)
    return row


def without_reasoning(turns, kwargs, inline):
    """Take reasoning_content out of the messages, inline to the head of what they say."""
    for turn in turns:
        thought = turn.pop("reasoning_content", None)
        if thought and inline:
            turn["content"] = f"{thought}\n\n{turn['content']}".strip()
    if kwargs.get("enable_thinking"):
        kwargs["enable_thinking"] = False


def without_filled(turns, schemas):
    """Take the nulls that Arrow filled in out of the calls."""
    for turn in turns:
        for call in turn.get("tool_calls", ()):
            function = call["function"]
            function["arguments"] = drop_filled_nulls(function["arguments"], schemas.get(function["name"]))


def stem_of(file):
    """The name of a file without its folders and endings, which rows without an id are called after."""
    return re.sub(r"(\.(jsonl?|ndjson|parquet|gz|zst))+$", "", Path(file).name)


QUICK = {"id", "messages", "source"}
HEADS = {role: b'{"role":"%b","content":' % role.encode() for role in ("system", "user", "assistant")}


def quick(raw, source, row_id):
    """encoded(to_row(…)) of a row of messages that are text and nothing else, as most are, with no more work than they
    need. None where it is another row, or one that to_row may refuse."""
    if not isinstance(raw, dict) or not raw.keys() <= QUICK or not isinstance(raw.get("messages"), list):
        return None
    where = str(raw.get("source") or source)
    if not row_id.isascii() or not where.isascii():
        return None
    told, roles, said = [], [], []
    for turn in raw["messages"]:
        if not isinstance(turn, dict) or len(turn) != 2:
            return None
        role, content = turn.get("role"), turn.get("content")
        if not isinstance(role, str) or not isinstance(content, str) or role not in HEADS or "\r\n" in content:
            return None
        content = content.strip()
        if not content or "<" in content and any([mark in content for mark in MARKS]):
            return None
        told.append(HEADS[role] + dump_json(content) + b"}")
        roles.append(role)
        if role != "system":
            said.append(content)
    if not alternate(tuple(roles)):
        return None
    lang = SOURCES[source][1] or detect_language("".join(said))
    return row_id, told, None, b"{}", where, [], lang, False


@lru_cache(maxsize=1000)
def alternate(roles):
    """Whether check_messages takes messages of these roles."""
    try:
        check_messages([{"role": role, "content": "a"} for role in roles])
        return True
    except InvalidRow:
        return False


def work(block, source, lines=False, reasoning="keep", flags=None):
    """Result of a Block of raw rows."""
    rows, rejected, stem = [], [], stem_of(block.file)
    chats = SOURCES[source][0] in (messages, smoltalk)
    for line, raw in block.rows():
        row_id = str(raw["id"]) if isinstance(raw, dict) and raw.get("id") is not None else ""
        row_id = row_id or f"{stem}-{line}"
        try:
            if isinstance(raw, InvalidRow):
                raise raw
            if not (one := chats and quick(raw, source, row_id)):
                row = to_row(raw, source, row_id, reasoning, **(flags or {}))
                row_id = row["id"]
                one = encoded(row)
            rows.append(one)
            continue
        except InvalidRow as error:
            refusal = error
        except RecursionError:
            refusal = InvalidRow("row nested too deep")
        except TypeError as error:
            refusal = InvalidRow("value that is not JSON", str(error))
        told = {"reason": refusal.reason, "detail": str(refusal)}
        rejected.append({"file": block.file, "line": line, "id": row_id, **told})
    return ChunkResult({block.split: bundled(rows, lines)}, rejected, len(rows) + len(rejected))


# -- all of them ------------------------------------------------------------------------------------------------------
def made_blocks(source, rows, eval_rows, seed):
    """Blocks of rows that the source makes by their number: train, then validation."""
    for split, count in (("train", rows), ("validation", eval_rows)):
        for start in range(0, count, ROWS):
            numbers = range(start, min(start + ROWS, count))
            data = [{"id": f"{source}-{split}-{n + 1}", "number": n, "split": split, "seed": seed} for n in numbers]
            yield Chunk(source, split, start + 1, data)


def first_rows(blocks, count):
    """The blocks' first rows; the others are read, for the file's hash, and not parsed."""
    for block in blocks:
        if count > 0:
            rows = [row for row, _ in zip(block.rows(), range(count), strict=False)]
            count -= len(rows)
            if rows and isinstance(block.data, bytes):
                end = rows[-1][0] - block.first_line + 1
                yield Chunk(block.file, block.split, block.first_line, b"\n".join(block.data.split(b"\n")[:end]))
            elif rows:
                yield Chunk(block.file, block.split, block.first_line, block.data[: len(rows)])


def pairs(given, flag, known=None):
    """{name: value} of NAME=VALUE arguments. Raises UsageError."""
    for one in given:
        name, equals, _ = one.partition("=")
        if not equals or known and name not in known:
            said = f"one of {', '.join(known)}" if known else "a name"
            raise UsageError(f"{flag} {one}: pass NAME=VALUE with {said} before the =")
    return dict(one.split("=", 1) for one in given)


def flags_of(args, paths, inputs):
    """The flags of the source's function; their files go into `inputs`. Raises UsageError."""
    given = {
        "keep_disagreeing": args.keep_disagreeing,
        "fill": pairs(args.fill, "--fill"),
        "map": pairs(args.map, "--map", MAPPED),
        "roles": pairs(args.roles, "--roles"),
        "words": args.words,
        "answers": args.answers,
    }
    takes = inspect.getfullargspec(SOURCES[args.source][0]).kwonlyargs
    if wrong := [name for name, value in given.items() if value and name not in takes]:
        raise UsageError(f"--{wrong[0]}: {args.source} has no use for it: leave it out")
    if args.source == "fields" and not ("messages" in given["map"] or {"prompt", "answer"} <= {*given["map"]}):
        raise UsageError("fields: pass --map prompt=COLUMN answer=COLUMN, or --map messages=COLUMN")
    if args.words:
        inputs |= read_words(args.words)
    if args.source == "bfcl":
        local = [path for path in paths if isinstance(path, Path) and str(path) != "-"]
        beside = [path.with_name("possible_answer") / path.name for path in local]
        given["answers"] = read_answers(args.answers or [path for path in beside if path.is_file()], inputs)
    return {name: value for name, value in given.items() if value and name in takes}


def read_words(path):
    """{name: sha256} of a list of words. Raises UsageError."""
    import hashlib

    from data_prep.common.sources import held_out, word_list

    try:
        words = word_list(path)
        if not any(map(held_out, words)) or all(map(held_out, words)):
            raise UsageError(f"{path}: too few words to keep some for validation: pass a longer list, one word a line")
        return {Path(path).name: hashlib.sha256(Path(path).read_bytes()).hexdigest()}
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error}): pass a text file, one word a line") from None


def read_answers(paths, inputs):
    """{id: ground_truth} of BFCL's answer files. Raises UsageError."""
    out, hashes = {}, {}
    for block in read_chunks(find_inputs(paths), hashes):
        for line, row in block.rows():
            if not isinstance(row, dict) or not isinstance(row.get("id"), str) or "ground_truth" not in row:
                raise UsageError(f"{block.file}:{line}: no id and ground_truth: pass files of BFCL's possible_answer")
            out[row["id"]] = row["ground_truth"]
    inputs |= {f"answers: {name}": digest for name, digest in hashes.items()}
    return out


def main():
    sources = "\n".join(
        textwrap.fill(f"{name:18}{' '.join(function.__doc__.split())}", 118, initial_indent="  ",
                      subsequent_indent=" " * 20, break_on_hyphens=False)
        for name, (function, _) in SOURCES.items()
    )  # fmt: skip
    parser = make_parser(__doc__.replace("{sources}", sources))
    parser.add_argument("source", choices=SOURCES, metavar="SOURCE", help="one of those above")
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="file, folder, quoted glob, - or owner/name")
    parser.add_argument("--out", type=Path, required=True, help="NAME.jsonl, or a folder that does not exist yet")
    parser.add_argument("--reasoning", choices=("keep", "drop", "inline"), default="keep", help="see above")
    parser.add_argument("--rows", type=int, default=None, help="the first rows of the input; of spelling: how many")
    parser.add_argument(
        "--eval_rows",
        type=int,
        default=0,
        help="rows of a folder drawn by seed as its validation split;\nof spelling: as many more, of other words",
    )
    some = {"nargs": "+", "default": [], "metavar": "NAME=VALUE"}
    parser.add_argument("--map", **some, help="fields: our name of a field = its column there, a.b where it is nested")
    parser.add_argument("--roles", **some, help="fields: a speaker's name there = user, assistant, system or tool")
    parser.add_argument("--fill", **some, help="identity: what stands for {{NAME}}")
    parser.add_argument("--answers", nargs="+", default=[], help="bfcl: files with the reference calls")
    parser.add_argument("--words", default=None, help="spelling: a text file, one word a line")
    parser.add_argument("--keep_disagreeing", action="store_true", help="mawps: keep rows whose equation disagrees")
    parser.add_argument("--seed", type=int, default=42)
    add_num_proc(parser)
    return run_command(parser, normalize)


def normalize(args):
    """The exit code; raises UsageError."""
    made = args.source in MADE
    if made and (args.inputs or args.rows is None):
        raise UsageError(f"{args.source} makes its rows: pass --rows N and no INPUT")
    if not made and not args.inputs:
        raise UsageError(f"{args.source} needs an INPUT: pass files, a folder, a quoted glob, - or a hub id")
    if args.rows is not None and args.rows < 1:
        raise UsageError(f"--rows {args.rows}: pass a number above 0")
    if args.eval_rows < 0 or args.eval_rows and args.out.suffix == ".jsonl":
        raise UsageError("--eval_rows: needs a number above 0 and a folder as --out, a .jsonl file has no splits")
    paths = find_inputs(args.inputs)
    if args.source == "bfcl":  # a folder of it holds these too, which are no rows
        paths = [p for p in paths if not {"possible_answer", "multi_turn_func_doc"} & {*Path(p).parts[-2:-1]}]
    with DatasetWriter(args.out, f"normalize.py {args.source}", args.seed) as writer:
        flags = flags_of(args, paths, writer.input_hashes)
        job = partial(work, source=args.source, lines=writer.is_jsonl, reasoning=args.reasoning, flags=flags)
        if made:
            blocks = made_blocks(args.source, args.rows, args.eval_rows, args.seed)
        else:
            blocks = read_chunks(paths, writer.input_hashes)
            blocks = first_rows(blocks, args.rows) if args.rows else blocks
        first = None
        for result in parallel_map(job, blocks, args.num_proc):
            first = first or next(iter(result.rejected), None)
            writer.add(result)
        kept, refused = sum(writer.rows_out.values()), format_counts(writer.refused)
        if not writer.rows_in:
            raise UsageError(f"{', '.join(map(str, paths))}: no rows: pass files with JSON lines or a JSON array")
        if not kept:
            where = f"the first at {first['file']}:{first['line']}"
            print(f"all {writer.rows_in} rows refused ({refused}), {where}", file=sys.stderr)
            return 1
        if args.eval_rows and not made:
            if [*writer.rows_out] != ["train"]:
                raise UsageError(
                    f"--eval_rows: the input has splits already ({', '.join(writer.rows_out)}): leave it out"
                )
            if args.eval_rows >= kept:
                raise UsageError(f"--eval_rows {args.eval_rows}: only {kept} rows: keep some to train on")
            writer.hold_out(args.eval_rows)
        writer.close()
    out = writer.refused.total()
    print(f"{args.out}: {kept:,} rows kept, {out:,} refused" + (f" ({refused})" if refused else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
