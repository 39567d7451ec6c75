"""Turn raw rows of a known source into messages rows, the one row shape of this collection.

    python data_prep/normalize.py gsm8k raw/gsm8k/train.jsonl --out data/gsm8k
    python data_prep/normalize.py sharegpt "raw/chat/*.json*" --out data/chat.jsonl

INPUT is a file or a glob of JSON lines or of one JSON array. OUT ending in .jsonl becomes that file, with
NAME.report.json and NAME.rejected.jsonl beside it; any other OUT becomes a dataset folder (for load_from_disk, with
report.json, rejected.jsonl, card.md). A row that cannot be used is refused, listed in rejected.jsonl (line = row
number in a JSON array) and counted by reason. Text is stripped at both ends, because an answer that begins with a
newline merges with the newline of the role header, and CRLF becomes LF; content in parts (text, reasoning, tool_call)
becomes one string with its reasoning and calls beside it; nothing else is rewritten.

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
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm


class BadInput(Exception):
    """What cannot be worked on at all: one sentence that says what, where and what to do. Exit code 2."""


class Refused(ValueError):
    """A row that cannot be used. reason: the words it is counted under; detail: what was seen."""

    def __init__(self, reason, detail=""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


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


def text(value, where):
    """The string without blanks at its ends, CRLF as LF; raises Refused, which names `where`."""
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
    """The value where it is a list of objects; raises Refused."""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise Refused("field of another type", f"{where} must be a list of objects")
    return value


def parsed(value, reason):
    """A value that may be JSON text; raises Refused with this reason where it is text and not JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, parse_constant=not_json)
    except ValueError as error:
        raise Refused(reason, str(error)) from None


def not_json(constant):
    raise ValueError(f"{constant} is not JSON")


PARTS = ("reasoning", "text", "tool_call")  # in the order in which a message is rendered


def joined(turn):
    """A message whose content is a list of parts {"type": one of PARTS, "value" (or "text"): str}, as LLaMA-Factory and
    StepTron write it, with one string instead: texts and reasoning joined as they stand, calls (JSON) in tool_calls.
    Raises Refused for other parts, and for an order or a field beside them that one message cannot keep."""
    found, role = {kind: [] for kind in PARTS}, turn["role"]
    for part in listed(turn["content"], "content"):
        kind, value = part.get("type"), part.get("value", part.get("text"))
        if kind not in PARTS or kind != "text" and role != "assistant":
            raise Refused("content part of another kind", f"{kind} in a {role} message")
        if any(found[later] for later in PARTS[PARTS.index(kind) + 1 :]):
            raise Refused("content parts out of order", f"{kind} behind what follows it in a message")
        if kind != "tool_call" and not isinstance(value, str):
            raise Refused("text that is not a string", f"{kind} part of a {role} message is {type(value).__name__}")
        found[kind].append(parsed(value, "tool call that is not JSON") if kind == "tool_call" else value)
    more = {"reasoning_content": "".join(found["reasoning"]), "tool_calls": found["tool_call"]}
    if told := [name for name, value in more.items() if value and turn.get(name)]:
        raise Refused("content parts out of order", f"{told[0]} in the parts and beside them")
    return {**turn, "content": "".join(found["text"]), **{name: value for name, value in more.items() if value}}


def message(turn):
    """One message in the shape of transformers' chat API; a leading <think> block becomes reasoning_content. Raises
    Refused."""
    turn = joined(turn) if isinstance(turn.get("content"), list) else turn
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
    """{"type": "function", "function": {"name": str, "arguments": object}}, from any of the usual shapes. Raises
    Refused."""
    function = call.get("function", call) if isinstance(call, dict) else {}
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or "arguments" not in function:
        raise Refused("tool call without a name or arguments")
    arguments = parsed(function["arguments"], "tool arguments that are not JSON")
    if not isinstance(arguments, dict):
        raise Refused("tool arguments that are not an object", type(arguments).__name__)
    out = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": call["id"], **out} if call.get("id") else out


def tool_list(tools):
    """A list, or its JSON text, as the list of {"type": "function", "function": {"name": ...}} that transformers'
    templates read; raises Refused."""
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


def columns(row):
    """(tools, chat_template_kwargs, tags) of a row, empty where it has none; raises Refused."""
    tools, kwargs, tags = tool_list(row.get("tools")), row.get("chat_template_kwargs") or {}, row.get("tags") or []
    if not isinstance(kwargs, dict):
        raise Refused("field of another type", "chat_template_kwargs must be an object")
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise Refused("field of another type", "tags must be a list of strings")
    return tools, kwargs, tags


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
    refuse_half_pairs(row)
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
    """Yield (line, value) of a JSON lines file or a JSON array; value is a Refused where a line is not JSON. Raises
    BadInput where an array is not."""
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if data.lstrip()[:1] == b"[":
        try:
            yield from enumerate(json.loads(data, parse_constant=not_json), 1)
        except (ValueError, RecursionError) as error:
            line, said = f":{error.lineno}" if hasattr(error, "lineno") else "", getattr(error, "msg", error)
            raise BadInput(f"{path}{line}: not JSON ({said}): mend the array or pass JSON lines") from None
        return
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line, parse_constant=not_json)
            except UnicodeDecodeError:
                yield number, Refused("not JSON", "not UTF-8")
            except (ValueError, RecursionError) as error:
                yield number, Refused("not JSON", str(error))


def place(file, line, row):
    """Where a row comes from, as findings and rejected.jsonl name it."""
    return {"file": file, "line": line, "id": str(row.get("id", "")) if isinstance(row, dict) else ""}


def shown(rows, name):
    """The rows, with a bar where somebody looks."""
    return tqdm(rows, desc=name, unit=" rows", disable=not sys.stderr.isatty())


# -- files out --------------------------------------------------------------------------------------------------------
LINE_ENDS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}


def json_line(row):
    """One line of JSON, readable as it is; only what str.splitlines takes for a line end is escaped."""
    return json.dumps(row, ensure_ascii=False).translate(LINE_ENDS) + "\n"


def refuse_half_pairs(row):
    """Refuse a row that no file in UTF-8 can hold."""
    try:
        json_line(row).encode()
    except UnicodeEncodeError:
        raise Refused("text that is not Unicode", "half a surrogate pair") from None


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


def refuse_unkept(row, out=None):
    """Refuse a row that a dataset folder would not give back equal; a .jsonl file keeps any."""
    if (out is None or out.suffix != ".jsonl") and not kept_by_arrow(row):
        raise Refused("number that Arrow cannot keep", "over ten decimals or 64 bits; write it as a string")


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


def write_files(files):
    """Write {path: text} aside and rename all when all are written, the last one last: it vouches for the others."""
    asides = {path: path.with_name(f".{path.name}.{os.getpid()}.part") for path in files}
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            asides[path].write_text(content, encoding="utf-8", newline="\n")
        for path in files:
            asides[path].replace(path)
    finally:
        for aside in asides.values():
            with suppress(OSError):
                aside.unlink(missing_ok=True)


def write_jsonl(out, rows, report, rejected):
    """Write OUT, NAME.report.json and NAME.rejected.jsonl."""
    files = {
        out.with_suffix(".rejected.jsonl"): "".join(map(json_line, rejected)),
        out.with_suffix(".report.json"): json.dumps(report, indent=2, ensure_ascii=False) + "\n",
        out: "".join(map(json_line, rows)),
    }
    write_files(files)


def write_text(path, text):
    """Write a file that a flag names. Raises BadInput."""
    try:
        write_files({path: text})
    except OSError as error:
        raise BadInput(f"{path}: not written ({error}): make room or pass another file") from None


def check_out(out, splits=()):
    """Raises BadInput where OUT cannot be what these splits are written to, before the work is done."""
    if out.exists():
        raise BadInput(f"{out}: exists already: remove it or pass another --out")
    if out.suffix == ".jsonl" and len(splits) > 1:
        raise BadInput(f"{out}: a file has no splits, the data has {', '.join(splits)}: pass a folder as --out")


def write_out(out, splits, report, rejected):
    """Write the splits to OUT, a .jsonl file of the only one or a dataset folder. Raises BadInput."""
    try:
        if out.suffix == ".jsonl":
            write_jsonl(out, next(iter(splits.values())), report, rejected)
        else:
            write_folder(out, splits, report, rejected)
    except OSError as error:
        raise BadInput(f"{out}: not written ({error}): make room or pass another --out") from None


# -- scripts ----------------------------------------------------------------------------------------------------------
def parser_of(doc, **kwargs):
    """An argument parser as every script of this room has it: its docstring as help, no abbreviations."""
    form = argparse.RawTextHelpFormatter
    return argparse.ArgumentParser(description=doc, formatter_class=form, allow_abbrev=False, **kwargs)


def command(parser, run):
    """The exit code of a script: that of run(arguments), or 2 with BadInput's sentence."""
    args = parser.parse_args()
    try:
        return run(args)
    except BadInput as error:
        return stop(str(error))


def stop(sentence):
    """Print one sentence and return 2, the exit code for bad input."""
    print(sentence, file=sys.stderr)
    return 2


def main():
    parser = parser_of(__doc__)
    parser.add_argument("source", choices=SOURCES)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="file or glob, JSON lines or a JSON array")
    parser.add_argument("--out", type=Path, required=True, help="NAME.jsonl, or a folder that does not exist yet")
    parser.add_argument(
        "--eval_rows", type=int, default=0, help="rows of a folder drawn by seed as its validation split"
    )
    parser.add_argument("--seed", type=int, default=42)
    return command(parser, normalize)


def normalize(args):
    """The exit code; raises BadInput."""
    paths = []
    for pattern in args.inputs:
        found = [Path(pattern)] if Path(pattern).is_file() else map(Path, sorted(glob.glob(pattern, recursive=True)))
        if not (found := [path for path in found if path.is_file()]):
            raise BadInput(f"{pattern}: no such file: pass a .jsonl or .json file or a quoted glob")
        paths += [path for path in found if path not in paths]
    check_out(args.out)
    if args.eval_rows < 0 or args.eval_rows and args.out.suffix == ".jsonl":
        raise BadInput("--eval_rows: needs a number above 0 and a folder as --out, a .jsonl file has no splits")

    # names without the machine's folders: the same input gives the same bytes wherever it lies
    top = os.path.commonpath([path.resolve().parent for path in paths])
    names = {path: os.path.relpath(path.resolve(), top) for path in paths}
    rows, rejected, seen = [], [], set()
    for path in paths:
        for line, raw in shown(read_rows(path), names[path]):
            row_id = str(raw["id"]) if isinstance(raw, dict) and raw.get("id") is not None else f"{path.stem}-{line}"
            try:
                if isinstance(raw, Refused):
                    raise raw
                row = to_row(raw, args.source, unique(row_id, seen))
                refuse_unkept(row)
                rows.append(row)
            except Refused as refusal:
                entry = {"file": names[path], "line": line, "id": row_id, "reason": refusal.reason}
                rejected.append(entry | {"detail": str(refusal)})
    table = Counter(entry["reason"] for entry in rejected).most_common()
    counts = ", ".join(f"{count} {reason}" for reason, count in table)
    if not rows and not rejected:
        raise BadInput(f"{', '.join(map(str, paths))}: no rows: pass files with JSON lines or a JSON array")
    if not rows:
        first = f"{rejected[0]['file']}:{rejected[0]['line']}"
        print(f"all {len(rejected)} rows refused ({counts}), the first at {first}", file=sys.stderr)
        return 1
    if args.eval_rows >= len(rows):
        raise BadInput(f"--eval_rows {args.eval_rows}: only {len(rows)} rows: keep some to train on")

    splits = {"train": rows}
    if args.eval_rows:
        drawn = set(random.Random(args.seed).sample(range(len(rows)), args.eval_rows))
        splits = {
            "train": [r for i, r in enumerate(rows) if i not in drawn],
            "validation": [rows[i] for i in sorted(drawn)],
        }
    inputs = {names[path]: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    report = report_of(f"normalize.py {args.source}", splits, rejected, args.seed, inputs)
    write_out(args.out, splits, report, rejected)
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
