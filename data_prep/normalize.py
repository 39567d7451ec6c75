"""Turn raw rows of a known source into messages rows, the one row shape of this collection.

    python data_prep/normalize.py gsm8k raw/gsm8k/train.jsonl --out data/gsm8k
    python data_prep/normalize.py sharegpt "raw/chat/*.json*" --out data/chat.jsonl
    zcat rows.jsonl.gz | python data_prep/normalize.py messages - --out data/rows
    python data_prep/normalize.py gsm8k openai/gsm8k:main --out data/gsm8k

INPUT is a file (JSON lines, one JSON array, parquet; .gz or .zst), a folder of them, a quoted glob, - for stdin, or a
hub id owner/name:config@split. OUT ending in .jsonl becomes that file, with NAME.report.json and NAME.rejected.jsonl
beside it; any other OUT becomes a dataset folder (for load_from_disk, with report.json, rejected.jsonl, card.md). A row
that cannot be used is refused, listed in rejected.jsonl (line = row number in a JSON array or parquet file) and counted
by reason. Text is stripped at both ends, because an answer that begins with a newline merges with the newline of the
role header, and CRLF becomes LF; content in parts (text, reasoning, tool_call) becomes one string with its reasoning
and calls beside it; nothing else is rewritten.

Exit 0: done, some rows may be refused. 1: every row refused, nothing written. 2: bad input, one sentence.
"""

import re
import sys
from functools import partial
from pathlib import Path

from pool import Result, Writer, add_num_proc, command, find_inputs, packed, parser_of, read_blocks, spread, summary
from rows import (
    CONTROL,
    BadInput,
    Refused,
    check_messages,
    columns,
    language,
    listed,
    message,
    parsed,
    refuse_unkept,
    strings,
    text,
    tool_call,
)


# -- sources: a raw row (dict) -> {"messages": [...]} and what else the row has; missing fields raise KeyError --------
def gsm8k(row):
    """openai/gsm8k: question, answer (working with <<a*b=c>> notes and a last line `#### n`), kept as it stands."""
    return {"messages": exchange(row["question"], row["answer"])}


def cmath(row):
    """XiaoMi/cmath: `input` in the repository, `question` on the hub; golden is the bare number."""
    return {"messages": exchange(row["input"] if "input" in row else row["question"], row["golden"])}


def mawps(row):
    """MAWPS as in SVAMP's cv_mawps: N_00 in Question stands for the first of Numbers ("56.0 9.0"). Answer is taken as
    the source states it, even in the few rows where its Equation gives another number."""
    numbers = [plain_number(number) for number in str(row["Numbers"]).split()]

    def put_back(match):
        index = int(match[1])
        if index >= len(numbers):
            raise Refused("number index without a number", f"{match[0]} with {len(numbers)} numbers")
        return numbers[index]

    return {"messages": exchange(re.sub(r"N_(\d+)", put_back, row["Question"]), plain_number(row["Answer"]))}


def messages(row):
    """Rows that are already chats, with messages, or conversations of role/content, and tools as a list or as JSON;
    content may come in parts (LLaMA-Factory's reason_tool_use_demo_50, StepTron)."""
    turns = row["messages"] if "messages" in row else row["conversations"]
    return {**row, "messages": [message(turn) for turn in listed(turns, "messages")]}


def sharegpt(row):
    """ShareGPT: conversations of from/value with human, gpt, system, function_call (JSON) and observation turns, an
    optional `system` text and a `tools` column that holds JSON. Neighbouring function_call turns are one turn."""
    roles = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
    turns = [message({"role": "system", "content": row["system"]})] if row.get("system") else []
    for turn in listed(row["conversations"], "conversations"):
        speaker, value = turn["from"], turn["value"]
        if speaker == "function_call":
            calls = parsed(value, "tool call that is not JSON")
            calls = [tool_call(call) for call in (calls if isinstance(calls, list) else [calls])]
            if turns and turns[-1].get("tool_calls"):
                turns[-1]["tool_calls"] += calls
            else:
                turns.append({"role": "assistant", "content": "", "tool_calls": calls})
        elif speaker == "observation":
            turns.append({"role": "tool", "content": text(value, "observation")})
        elif speaker in roles:
            turns.append(message({"role": roles[speaker], "content": value}))
        else:
            raise Refused("unknown role", str(speaker))
    return {**row, "messages": turns}


SOURCES = {  # name: (function, language or None to tell by the script of the text)
    "gsm8k": (gsm8k, "en"),
    "cmath": (cmath, "zh"),
    "mawps": (mawps, "en"),
    "messages": (messages, None),
    "sharegpt": (sharegpt, None),
}


# -- pieces the sources share -----------------------------------------------------------------------------------------
def exchange(question, answer):
    return [
        {"role": "user", "content": text(question, "question")},
        {"role": "assistant", "content": text(answer, "answer")},
    ]


def plain_number(value):
    """ "12.0" -> "12"; every other number keeps the digits of its source."""
    try:
        number = float(value)
        int(number)  # inf and nan are floats too
    except (TypeError, ValueError, OverflowError):
        raise Refused("number that is not a number", repr(value)) from None
    return str(int(number)) if number.is_integer() else str(value)


# -- one row ----------------------------------------------------------------------------------------------------------
def to_row(raw, source, row_id):
    """A checked row, keys in the order of the house; raises Refused."""
    if not isinstance(raw, dict):
        raise Refused("row that is not an object", type(raw).__name__)
    convert, lang = SOURCES[source]
    try:
        found = convert(raw)
    except KeyError as error:
        raise Refused("missing field", str(error.args[0])) from None
    except (TypeError, AttributeError) as error:  # a number where text belongs, a list where an object belongs, …
        raise Refused("field of another type", str(error)) from None
    check_messages(found["messages"])
    tools, kwargs, tags = columns(found)
    if hit := next(filter(None, map(CONTROL.search, strings([found["messages"], tools]))), None):
        raise Refused("control token in text", hit[0])
    row = {"id": row_id, "messages": found["messages"]}
    row |= {"tools": tools} if tools else {}
    row |= {
        "chat_template_kwargs": kwargs,
        "source": str(found.get("source") or source),
        "tags": tags,
        "lang": str(found.get("lang") or lang or language(found["messages"])),
    }
    return row


def stem_of(file):
    """The name of a file without its folders and endings, which rows without an id are called after."""
    return re.sub(r"(\.(jsonl?|ndjson|parquet|gz|zst))+$", "", Path(file).name)


def work(block, source, lines=False):
    """Result of a Block of raw rows."""
    rows, result = [], Result()
    for line, raw in block.rows():
        row_id = str(raw["id"]) if isinstance(raw, dict) and raw.get("id") is not None else ""
        row_id = row_id or f"{stem_of(block.file)}-{line}"
        result.total += 1
        try:
            if isinstance(raw, Refused):
                raise raw
            row = to_row(raw, source, row_id)
            refuse_unkept(row)
            rows.append(row)
        except Refused as refusal:
            entry = {"file": block.file, "line": line, "id": row_id, "reason": refusal.reason}
            result.rejected.append(entry | {"detail": str(refusal)})
        except RecursionError:
            entry = {"file": block.file, "line": line, "id": row_id, "reason": "row nested too deep"}
            result.rejected.append(entry | {"detail": "row nested too deep"})
    result.packed = {"train": packed(rows, lines)}
    return result


def main():
    parser = parser_of(__doc__)
    parser.add_argument("source", choices=SOURCES)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="file, folder, quoted glob, - or owner/name")
    parser.add_argument("--out", type=Path, required=True, help="NAME.jsonl, or a folder that does not exist yet")
    parser.add_argument(
        "--eval_rows", type=int, default=0, help="rows of a folder drawn by seed as its validation split"
    )
    parser.add_argument("--seed", type=int, default=42)
    add_num_proc(parser)
    return command(parser, normalize)


def normalize(args):
    """The exit code; raises BadInput."""
    paths = find_inputs(args.inputs)
    if args.eval_rows < 0 or args.eval_rows and args.out.suffix == ".jsonl":
        raise BadInput("--eval_rows: needs a number above 0 and a folder as --out, a .jsonl file has no splits")
    with Writer(args.out, f"normalize.py {args.source}", args.seed) as writer:
        todo = partial(work, source=args.source, lines=writer.lines)
        first = None
        for result in spread(todo, read_blocks(paths, writer.inputs), args.num_proc):
            first = first or next(iter(result.rejected), None)
            writer.add(result)
        kept, refused = sum(writer.rows.values()), summary(writer.refused)
        if not writer.total:
            raise BadInput(f"{', '.join(map(str, paths))}: no rows: pass files with JSON lines or a JSON array")
        if not kept:
            where = f"the first at {first['file']}:{first['line']}"
            print(f"all {writer.total} rows refused ({refused}), {where}", file=sys.stderr)
            return 1
        if args.eval_rows >= kept:
            raise BadInput(f"--eval_rows {args.eval_rows}: only {kept} rows: keep some to train on")
        if args.eval_rows:
            writer.hold_out(args.eval_rows)
        writer.close()
    out = writer.refused.total()
    print(f"{args.out}: {kept:,} rows kept, {out:,} refused" + (f" ({refused})" if refused else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
