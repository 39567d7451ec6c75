"""Turn raw rows of a known source into messages rows, the one row shape of this collection.

    python data_prep/normalize.py gsm8k raw/gsm8k/train.jsonl --out data/gsm8k
    python data_prep/normalize.py sharegpt "raw/chat/*.json*" --out data/chat.jsonl

INPUT is a file or a glob of JSON lines or of one JSON array. OUT ending in .jsonl becomes that file, with
NAME.report.json and NAME.rejected.jsonl beside it; any other OUT becomes a dataset folder (for load_from_disk, with
report.json, rejected.jsonl, card.md). A row that cannot be used is refused, listed in rejected.jsonl (line = row
number in a JSON array) and counted by reason. Text is stripped at both ends, because an answer that begins with a
newline merges with the newline of the role header, and CRLF becomes LF; nothing else is rewritten.

Exit 0: done, some rows may be refused. 1: every row refused, nothing written. 2: bad input, one sentence.
"""

import argparse
import glob
import hashlib
import json
import os
import platform
import random
import re
import shutil
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm


class Refused(ValueError):
    """A row that cannot be used. reason: the words it is counted under; detail: what was seen."""

    def __init__(self, reason, detail=""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


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
    """Rows that are already chats, with messages, or conversations of role/content, and tools as a list or as JSON."""
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


def text(value, where):
    if not isinstance(value, str):
        raise Refused("text that is not a string", f"{where} is {type(value).__name__}")
    return value.replace("\r\n", "\n").strip()


def plain_number(value):
    """ "12.0" -> "12"; every other number keeps the digits of its source."""
    try:
        number = float(value)
        int(number)  # inf and nan are floats too
    except (TypeError, ValueError, OverflowError):
        raise Refused("number that is not a number", repr(value)) from None
    return str(int(number)) if number.is_integer() else str(value)


def listed(value, where):
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise Refused("field of another type", f"{where} must be a list of objects")
    return value


def parsed(value, reason):
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, parse_constant=not_json)
    except ValueError as error:
        raise Refused(reason, str(error)) from None


def not_json(constant):
    raise ValueError(f"{constant} is not JSON")


def message(turn):
    """One message in the shape of transformers' chat API; a leading <think> block becomes reasoning_content."""
    role, content = turn["role"], turn.get("content")
    if content is None and turn.get("tool_calls"):
        content = ""
    out = {"role": role, "content": text(content, f"content of a {role} message")}
    if turn.get("reasoning_content"):
        out["reasoning_content"] = text(turn["reasoning_content"], "reasoning_content")
    elif role == "assistant" and (block := re.match(r"<think>(.*?)</think>", out["content"], re.DOTALL)):
        out["content"] = out["content"][block.end() :].strip()
        if block[1].strip():
            out["reasoning_content"] = block[1].strip()
    if turn.get("tool_calls"):
        out["tool_calls"] = [tool_call(call) for call in listed(turn["tool_calls"], "tool_calls")]
    return out | {key: turn[key] for key in ("tool_call_id", "name", "loss_mask") if turn.get(key) is not None}


def tool_call(call):
    """{"type": "function", "function": {"name": str, "arguments": object}}, whatever of the usual shapes came in."""
    function = call.get("function", call) if isinstance(call, dict) else {}
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or "arguments" not in function:
        raise Refused("tool call without a name or arguments")
    arguments = parsed(function["arguments"], "tool arguments that are not JSON")
    if not isinstance(arguments, dict):
        raise Refused("tool arguments that are not an object", type(arguments).__name__)
    out = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": call["id"], **out} if call.get("id") else out


def tool_list(tools):
    tools = parsed(tools or [], "tools that are not JSON")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Refused("tools that are not a list of objects")
    tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    if not all(isinstance(tool["function"], dict) and tool["function"].get("name") for tool in tools):
        raise Refused("tool without a name")
    return tools


# -- one row ----------------------------------------------------------------------------------------------------------
CONTROL = re.compile(  # what some tokenizer turns into a control token when it stands in text
    r"<\|[\w ]{1,40}\|>|<｜[^｜<>]{1,40}｜>|</?(?:think|tool_call|tool_response)>|<(?:start|end)_of_turn>"
)


def check_messages(turns):
    """Refuse a conversation that a template would render wrongly or a trainer could not learn from."""
    if not any(turn["role"] == "assistant" for turn in turns):
        raise Refused("no assistant turn")
    for number, turn in enumerate(turns):
        role, before = turn["role"], turns[number - 1] if number else None
        if role not in ("system", "user", "assistant", "tool"):
            raise Refused("unknown role", str(role))
        if not turn["content"] and role != "tool" and not turn.get("tool_calls"):
            raise Refused("empty text", f"message {number} of the {role}")
        if turn.get("tool_calls") and role != "assistant":
            raise Refused("roles that do not alternate", f"message {number}: tool calls of the {role}")
        after = (before["role"] if not before.get("tool_calls") else "call") if before else "start"
        allowed = {
            "system": ("start",),
            "user": ("start", "system", "assistant"),
            "assistant": ("user", "tool"),
            "tool": ("call", "tool"),
        }[role]
        if after not in allowed:
            raise Refused("roles that do not alternate", f"message {number}: {role} after {after}")
    if turns[-1]["role"] != "assistant":
        raise Refused("last message is not the assistant's")


def language(turns):
    """zh, ja or ko by script, en for text in Latin letters (a guess: no language is told apart there), else und."""
    letters = Counter()
    for char in "".join(turn["content"] for turn in turns if turn["role"] != "system"):
        if char.isalpha():
            code = ord(char)
            kana, hangul, han = 0x3040 <= code <= 0x30FF, 0xAC00 <= code <= 0xD7A3, 0x4E00 <= code <= 0x9FFF
            letters["ja" if kana else "ko" if hangul else "zh" if han else "en" if code < 0x250 else "und"] += 1
    if letters["ja"] and letters["ja"] > letters["zh"] / 10:
        letters["ja"] += letters.pop("zh", 0)
    return max(letters, key=letters.get) if letters else "und"


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
    tools, kwargs = tool_list(found.get("tools")), found.get("chat_template_kwargs") or {}
    tags = found.get("tags") or []
    if not isinstance(kwargs, dict) or not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise Refused("field of another type", "chat_template_kwargs must be an object, tags a list of strings")
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
    try:
        json_line(row).encode()
    except UnicodeEncodeError:
        raise Refused("text that is not Unicode", "half a surrogate pair") from None
    return row


def strings(value):
    """Every string in a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value:
            yield from strings(item)
            if isinstance(value, dict):
                yield from strings(value[item])


# -- files in ---------------------------------------------------------------------------------------------------------
def read_rows(path):
    """Yield (line, value) of a JSON lines file or a JSON array; value is a Refused where a line is not JSON."""
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if data.lstrip()[:1] == b"[":
        try:
            yield from enumerate(json.loads(data, parse_constant=not_json), 1)
        except json.JSONDecodeError as error:
            sys.exit(stop(f"{path}:{error.lineno}: not JSON ({error.msg}): mend the array or pass JSON lines"))
        except ValueError as error:
            sys.exit(stop(f"{path}: not JSON ({error}): mend the array or pass JSON lines"))
        return
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line, parse_constant=not_json)
            except (ValueError, RecursionError) as error:
                yield number, Refused("not JSON", str(error))


def stop(sentence):
    """Print one sentence and return 2, the exit code for bad input."""
    print(sentence, file=sys.stderr)
    return 2


# -- files out --------------------------------------------------------------------------------------------------------
LINE_ENDS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}


def json_line(row):
    """One line of JSON, readable as it is; only what str.splitlines takes for a line end is escaped."""
    return json.dumps(row, ensure_ascii=False).translate(LINE_ENDS) + "\n"


def content_hash(rows):
    """sha256 of the rows as JSON lines: of the .jsonl file byte for byte, and of a folder whose null `tools` are left
    out. It does not depend on paths, versions or time."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json_line({key: value for key, value in row.items() if value is not None}).encode())
    return digest.hexdigest()


def as_dataset(rows):
    """A Dataset with one fixed schema: messages, tools and template arguments are JSON to Arrow, so no row is filled
    with the null columns of another, and neither paths nor times enter the files."""
    from datasets import Dataset, Features, Json, List, Value

    string = Value("string")
    features = {"id": string, "messages": List(Json()), "tools": List(Json()), "chat_template_kwargs": Json()}
    features |= {"source": string, "tags": List(string), "lang": string}
    # every key in one order, which is also that of json_line: the hash of a loaded folder is the hash of its rows
    return Dataset.from_list([{key: row.get(key) for key in features} for row in rows], features=Features(features))


def kept_by_arrow(row):
    """Whether datasets gives the row back equal: its JSON columns round to ten decimals and hold 64-bit integers."""
    from datasets.utils.json import ujson_dumps, ujson_loads

    parts = [row["messages"], row.get("tools"), row["chat_template_kwargs"]]
    try:
        return ujson_loads(ujson_dumps(parts)) == parts
    except (OverflowError, ValueError):
        return False


def card(name, splits):
    """Markdown: rows by split, source, language and mode (think where a message shows reasoning)."""
    counts = Counter()
    for split, rows in splits.items():
        for row in rows:
            think = any(turn.get("reasoning_content") for turn in row["messages"])
            counts[split, row["source"], row["lang"], "think" if think else "no_think"] += 1
    lines = [f"# {name}", "", "| split | source | language | mode | rows |", "|---|---|---|---|---|"]
    lines += ["| " + " | ".join(map(str, (*key, f"{count:,}"))) + " |" for key, count in sorted(counts.items())]
    return "\n".join(lines) + "\n"


def report_of(script, splits, rejected, seed, inputs):
    """What report.json holds. inputs: {file: sha256}; `hash` is what later steps and resume checks compare."""
    hashes = {split: content_hash(rows) for split, rows in splits.items()}
    return {
        "script": script,
        "in": sum(map(len, splits.values())) + len(rejected),
        "out": {split: len(rows) for split, rows in splits.items()},
        "refused": dict(sorted(Counter(entry["reason"] for entry in rejected).items())),
        "seed": seed,
        "versions": {"python": platform.python_version(), "datasets": version("datasets")},
        "input": inputs,
        "output": hashes,
        "hash": hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest(),
    }


def write_folder(out, splits, report, rejected=(), extra=()):
    """Write a dataset folder aside, rename it when complete. splits: {name: rows}; extra: (file name, text) pairs."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    aside = out.with_name(f".{out.name}.{os.getpid()}.part")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        datasets.DatasetDict({split: as_dataset(rows) for split, rows in splits.items()}).save_to_disk(str(aside))
        files = [("report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")]
        files += [("rejected.jsonl", "".join(map(json_line, rejected))), ("card.md", card(out.name, splits)), *extra]
        for name, content in files:
            (aside / name).write_text(content, encoding="utf-8", newline="\n")
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_jsonl(out, rows, report, rejected):
    """Write OUT, NAME.report.json and NAME.rejected.jsonl aside; OUT is renamed last, so it vouches for the others."""
    out.parent.mkdir(parents=True, exist_ok=True)
    files = {
        out.with_suffix(".rejected.jsonl"): "".join(map(json_line, rejected)),
        out.with_suffix(".report.json"): json.dumps(report, indent=2, ensure_ascii=False) + "\n",
        out: "".join(map(json_line, rows)),
    }
    asides = {path: path.with_name(f".{path.name}.{os.getpid()}.part") for path in files}
    try:
        for path, content in files.items():
            asides[path].write_text(content, encoding="utf-8", newline="\n")
        for path in files:
            asides[path].replace(path)
    finally:
        for aside in asides.values():
            aside.unlink(missing_ok=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("source", choices=SOURCES)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="file or glob, JSON lines or a JSON array")
    parser.add_argument("--out", type=Path, required=True, help="NAME.jsonl, or a folder that does not exist yet")
    parser.add_argument(
        "--eval_rows", type=int, default=0, help="rows of a folder drawn by seed as its validation split"
    )
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()

    paths = []
    for pattern in args.inputs:
        found = (
            [Path(pattern)]
            if Path(pattern).is_file()
            else [Path(p) for p in sorted(glob.glob(pattern, recursive=True))]
        )
        if not (found := [path for path in found if path.is_file()]):
            return stop(f"{pattern}: no such file: pass a .jsonl or .json file or a quoted glob")
        paths += [path for path in found if path not in paths]
    if args.out.exists():
        return stop(f"{args.out}: exists already: remove it or pass another --out")
    if args.eval_rows < 0 or args.eval_rows and args.out.suffix == ".jsonl":
        return stop("--eval_rows: needs a number above 0 and a folder as --out, a .jsonl file has no splits")

    # names without the machine's folders: the same input gives the same bytes wherever it lies
    top = os.path.commonpath([path.resolve().parent for path in paths])
    names = {path: os.path.relpath(path.resolve(), top) for path in paths}
    rows, rejected, seen = [], [], set()
    for path in paths:
        for line, raw in tqdm(read_rows(path), desc=names[path], unit=" rows", disable=not sys.stderr.isatty()):
            row_id = str(raw["id"]) if isinstance(raw, dict) and raw.get("id") is not None else f"{path.stem}-{line}"
            try:
                if isinstance(raw, Refused):
                    raise raw
                row = to_row(raw, args.source, unique(row_id, seen))
                if not kept_by_arrow(row):
                    raise Refused(
                        "number that Arrow cannot keep", "over ten decimals or 64 bits; write it as a string"
                    )
                rows.append(row)
            except Refused as refusal:
                entry = {"file": names[path], "line": line, "id": row_id, "reason": refusal.reason}
                rejected.append(entry | {"detail": str(refusal)})
    table = Counter(entry["reason"] for entry in rejected).most_common()
    counts = ", ".join(f"{count} {reason}" for reason, count in table)
    if not rows and not rejected:
        return stop(f"{', '.join(map(str, paths))}: no rows: pass files with JSON lines or a JSON array")
    if not rows:
        first = rejected[0]
        print(
            f"all {len(rejected)} rows refused ({counts}), the first at {first['file']}:{first['line']}",
            file=sys.stderr,
        )
        return 1
    if args.eval_rows >= len(rows):
        return stop(f"--eval_rows {args.eval_rows}: only {len(rows)} rows: keep some to train on")

    splits = {"train": rows}
    if args.eval_rows:
        drawn = set(random.Random(args.seed).sample(range(len(rows)), args.eval_rows))
        splits = {
            "train": [r for i, r in enumerate(rows) if i not in drawn],
            "validation": [rows[i] for i in sorted(drawn)],
        }
    inputs = {names[path]: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    report = report_of(f"normalize.py {args.source}", splits, rejected, args.seed, inputs)
    try:
        if args.out.suffix == ".jsonl":
            write_jsonl(args.out, rows, report, rejected)
        else:
            write_folder(args.out, splits, report, rejected)
    except OSError as error:
        return stop(f"{args.out}: not written ({error}): make room or pass another --out")
    print(f"{args.out}: {len(rows):,} rows kept, {len(rejected):,} refused" + (f" ({counts})" if counts else ""))
    return 0


def unique(row_id, seen):
    """row_id, or row_id-2, row_id-3 … where it is taken; adds it to seen."""
    name, number = row_id, 1
    while name in seen:
        number += 1
        name = f"{row_id}-{number}"
    seen.add(name)
    return name


if __name__ == "__main__":
    sys.exit(main())
