"""Check messages rows before they cost a training run: every fault is counted by reason and named by file and line.

    python data_prep/check.py data/chats --recipe recipes/qwen3_qlora.py
    python data_prep/check.py rows.jsonl --chat_template_path chat_templates/qwen3.jinja --fix --out data/checked

PATH is a .jsonl, .json or .parquet file, or a save_to_disk folder, of which every split is read. What is found:
  roles           unknown ones, turns that do not alternate, a tool reply without a call, a last message not the
                  assistant's, text or calls of another type
  control tokens  in text: those of the tokenizer (--model_name_or_path) or, without one, those of the known families
  newline         an answer or its reasoning begins with one: it would merge with the newline that ends the header
  persona         a system message (or custom_instructions) that the template leaves out of the text it renders
  template        a row that the template refuses, with its words
The last two need a template; --recipe takes template and tokenizer from the recipe's DEFAULTS.

--fix strips the newlines, which has one right answer, and writes OUT (a .jsonl file, or a folder with report.json,
rejected.jsonl, card.md): the mended rows and the clean ones as they are; rows that it cannot mend go to rejected.jsonl.

Exit 0: nothing found, or all of it mended. 1: something is left. 2: bad input, one sentence.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import runpy
import sys
from collections import Counter
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from normalize import (
    CONTROL,
    Refused,
    check_messages,
    content_hash,
    json_line,
    kept_by_arrow,
    language,
    listed,
    read_rows,
    report_of,
    stop,
    strings,
    tool_call,
    tool_list,
    write_folder,
    write_jsonl,
)
from tqdm import tqdm

COLUMNS = ("id", "messages", "tools", "chat_template_kwargs", "source", "tags", "lang")  # what a folder keeps
NEWLINE = re.compile(r"\s*[\r\n]")  # blanks before the newline are no help: one token takes them all


class BadInput(Exception):
    """What cannot be worked on at all: one sentence, exit code 2."""


def words(refusal):
    """What was seen, without the reason it is counted under."""
    return str(refusal).removeprefix(refusal.reason).removeprefix(": ")


# -- the checks: a well-formed row -> (reason, detail) of each fault; a new one = a function and its name in CHECKS ----
def roles(row, against):
    try:
        check_messages([{**turn, "content": turn.get("content") or ""} for turn in row["messages"]])
    except Refused as refusal:
        yield refusal.reason, words(refusal)


def control_tokens(row, against):
    for where, parts in (("message", row["messages"]), ("tool", tools_of(row))):
        for number, part in enumerate(parts):
            if hit := next(filter(None, map(against.control.search, strings(part))), None):
                yield "control token in text", f"{where} {number}: {hit[0]}"


def leading_newline(row, against):
    for number, field in begins_with_newline(row):
        name = "reasoning" if field == "reasoning_content" else "answer"
        yield f"{name} begins with a newline", f"message {number}: {row['messages'][number][field][:20]!r}"


def template(row, against):
    if against.render:
        try:
            against.render(row, row["messages"])
        except Refused as refusal:
            yield refusal.reason, words(refusal)


def persona(row, against):
    """Each persona is rendered with a mark behind it: its text alone might stand in the default persona, or in what
    the user says, and the row would pass though the template drops it."""
    kwargs = row.get("chat_template_kwargs") or {}
    given = {
        f"message {number}": turn["content"]
        for number, turn in enumerate(row["messages"])
        if turn["role"] == "system" and (turn.get("content") or "").strip()
    }
    given |= {name: kwargs[name] for name in ["custom_instructions"] if isinstance(kwargs.get(name), str)}
    if not given or not against.render:
        return
    marked = {name: f"{text} persona{number}mark" for number, (name, text) in enumerate(given.items())}
    turns = [{**t, "content": marked.get(f"message {n}", t.get("content"))} for n, t in enumerate(row["messages"])]
    names = {name: text for name, text in marked.items() if name in kwargs}
    try:
        text, _ = against.render({**row, "chat_template_kwargs": kwargs | names}, turns)
    except Refused:
        return  # told by the check of the template
    for name, expected in marked.items():
        if spoken(expected) not in spoken(text):
            yield "persona lost", f"{name}: {given[name][:60]!r} is not in the rendered text"


CHECKS = [roles, control_tokens, leading_newline, template, persona]


# -- pieces the checks share ------------------------------------------------------------------------------------------
def spoken(text):
    """Text without the switches that a template takes out of a persona and without a difference of blanks."""
    return " ".join(re.sub(r"/(?:no_think|think|system_override)\b", " ", text).split())


def begins_with_newline(row):
    for number, turn in enumerate(row["messages"]):
        for field in ("content", "reasoning_content"):
            if turn["role"] == "assistant" and NEWLINE.match(turn.get(field) or ""):
                yield number, field


def well_formed(row):
    """Refuse what no check could read."""
    if not isinstance(row, dict):
        raise Refused("row that is not an object", type(row).__name__)
    if not row.get("messages"):
        raise Refused("row without messages", f"it has {', '.join(map(str, row)) or 'nothing'}: see normalize.py")
    for number, turn in enumerate(listed(row["messages"], "messages")):
        if not isinstance(turn.get("role"), str):
            raise Refused("unknown role", f"message {number}: {turn.get('role')!r}")
        for field in ("content", "reasoning_content"):
            if not isinstance(turn.get(field), (str, type(None))):
                raise Refused("text that is not a string", f"message {number}: {field} is {type(turn[field]).__name__}")
        for call in listed(turn.get("tool_calls") or [], f"tool_calls of message {number}"):
            tool_call(call)
    tool_list(row.get("tools"))
    if not isinstance(row.get("chat_template_kwargs") or {}, dict):
        raise Refused("field of another type", "chat_template_kwargs must be an object")
    if not isinstance(row.get("tags") or [], list) or not all(isinstance(tag, str) for tag in row.get("tags") or []):
        raise Refused("field of another type", "tags must be a list of strings")
    try:
        json_line(row).encode()
    except UnicodeEncodeError:
        raise Refused("text that is not Unicode", "half a surrogate pair") from None


def tools_of(row):
    """A list, also where the column holds JSON text, as the trainer reads it."""
    tools = row.get("tools") or []
    return json.loads(tools) if isinstance(tools, str) else tools


def faults(row, against):
    """[(reason, detail)] of a row, empty where it is sound."""
    try:
        if isinstance(row, Refused):
            raise row
        well_formed(row)
        return [fault for check in CHECKS for fault in check(row, against)]
    except Refused as refusal:
        return [(refusal.reason, words(refusal))]
    except RecursionError:
        return [("row nested too deep", "")]


def mended(row):
    """The row with its answers beginning where they begin; indentation after the newlines stays."""
    turns = [dict(turn) for turn in row["messages"]]
    for number, field in begins_with_newline(row):
        turns[number][field] = NEWLINE.sub("", turns[number][field], count=1)
    return {**row, "messages": turns}


def completed(row, name, line):
    """The house's row: what is missing is filled in, what is there stays as it is and where it is."""
    row = {key: value for key, value in row.items() if value is not None}
    said = [{**turn, "content": turn.get("content") or ""} for turn in row["messages"]]
    filled = {"id": f"{name}-{line}", "chat_template_kwargs": {}, "source": name, "tags": [], "lang": language(said)}
    row |= {key: value for key, value in filled.items() if key not in row}
    row |= {"tools": tools_of(row)} if isinstance(row.get("tools"), str) else {}
    return row | {key: str(row[key]) for key in ("id", "source", "lang")}


# -- the template and the tokenizer -----------------------------------------------------------------------------------
class Against:
    """What rows are checked against. render(row, messages, prompt=False) -> (text, trained spans), as the trainer
    renders a row; it raises Refused with the template's words. None without a template."""

    def __init__(self, template=None, tokenizer=None):
        self.template, self.tokenizer = template, tokenizer
        self.control, self.render, self.marked = CONTROL, None, False
        if tokenizer is not None:
            added = tokenizer.added_tokens_decoder.values()
            # of the tokens that are not special, only those that steer a chat: Gemma adds HTML tags and newlines
            tokens = {token.content for token in added if token.special or CONTROL.fullmatch(token.content)}
            escaped = map(re.escape, sorted(tokens | set(tokenizer.all_special_tokens), key=len, reverse=True))
            self.control = re.compile("|".join(escaped) or r"(?!)")
        if template is not None:
            self.marked = bool(re.search(r"{%-?\s*generation\s*-?%}", template))
            self.render = self._renderer(template, tokenizer.special_tokens_map if tokenizer is not None else {})

    def _renderer(self, template, names):
        from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

        _compile_jinja_template(template)
        names = {"bos_token": "", "eos_token": ""} | names

        def render(row, messages, prompt=False):
            kwargs = names | (row.get("chat_template_kwargs") or {})
            # as apply_chat_template does: a key that is null is a key that is missing
            messages = [{key: value for key, value in turn.items() if value is not None} for turn in messages]
            try:
                texts, spans = render_jinja_template(
                    conversations=[messages],
                    tools=tools_of(row) or None,
                    chat_template=template,
                    add_generation_prompt=prompt,
                    return_assistant_tokens_mask=self.marked and not prompt,
                    **kwargs,
                )
            except Exception as error:  # a template is a program: it may fail in any way
                said = " ".join(str(error).split()) or type(error).__name__
                raise Refused("template refuses the row", said) from None
            return texts[0], [tuple(span) for span in (spans[0] if spans else []) if span[0] < span[1]]

        return render


def load_against(template_path=None, model=None, recipe=None):
    """Against of the flags; what they leave open comes from the recipe's DEFAULTS. Raises BadInput."""
    given = model
    if recipe is not None:
        if not recipe.is_file():
            raise BadInput(f"--recipe {recipe}: no such file: pass one of recipes/")
        try:
            defaults = runpy.run_path(str(recipe))["DEFAULTS"]
        except Exception as error:
            raise BadInput(f"--recipe {recipe}: no DEFAULTS to read ({type(error).__name__}: {error})") from None
        if template_path is None and defaults.get("chat_template_path"):
            template_path = Path(defaults["chat_template_path"])
        model = model or defaults.get("model_name_or_path")
    text = tokenizer = None
    if template_path is not None:
        if not template_path.is_file():
            raise BadInput(f"--chat_template_path {template_path}: no such file: pass one of chat_templates/")
        text = template_path.read_text(encoding="utf-8")
    if model:
        import transformers

        transformers.utils.logging.set_verbosity_error()  # rows may be longer than the model's context
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        except Exception:
            if given:
                raise BadInput(
                    f"--model_name_or_path {model}: no tokenizer there: pass a folder that has one, or a "
                    "hub id, HF_ENDPOINT set to a mirror where the hub is out of reach"
                ) from None
            print(f"no tokenizer of {model} at hand: known control tokens are looked for", file=sys.stderr)
    try:
        return Against(text, tokenizer)
    except Exception as error:
        raise BadInput(f"--chat_template_path {template_path}: not a template ({error}): mend it") from None


# -- rows in ----------------------------------------------------------------------------------------------------------
def read_pool(path):
    """({split: [(file, line, row)]}, {file: sha256}); row is a Refused where a line is not JSON. A folder's file is
    its split and its line the row's number, from 1. Raises BadInput."""
    if path.is_dir():
        from datasets import Dataset, load_from_disk

        try:
            pool = load_from_disk(str(path))
            pool = {"train": pool} if isinstance(pool, Dataset) else dict(pool)
            # tools that a row does not have are null in Arrow
            rows = {name: [{k: v for k, v in row.items() if v is not None} for row in pool[name]] for name in pool}
        except Exception as error:
            raise BadInput(f"{path}: not a dataset folder ({error}): pass one that save_to_disk wrote") from None
        splits = {name: [(name, line, row) for line, row in enumerate(rows[name], 1)] for name in rows}
        hashes = {name: content_hash(rows[name]) for name in rows}
    elif not path.is_file() or path.suffix not in (".jsonl", ".json", ".parquet"):
        raise BadInput(f"{path}: no such data: pass a .jsonl, .json or .parquet file, or a save_to_disk folder")
    else:
        found = read_parquet(path) if path.suffix == ".parquet" else read_rows(path)
        splits = {"train": [(path.name, line, row) for line, row in found]}
        hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}
    if not any(splits.values()):
        raise BadInput(f"{path}: no rows: pass data that has some")
    return splits, hashes


def read_parquet(path):
    import pyarrow.parquet
    from datasets import Dataset

    try:
        rows = list(Dataset(pyarrow.parquet.read_table(path)))
    except Exception as error:
        raise BadInput(f"{path}: not a parquet file ({error}): write it again") from None
    return [(line, {k: v for k, v in row.items() if v is not None}) for line, row in enumerate(rows, 1)]


def check_out(out, splits):
    """Raises BadInput before the work is done."""
    if out.exists():
        raise BadInput(f"{out}: exists already: remove it or pass another --out")
    if out.suffix == ".jsonl" and len(splits) > 1:
        raise BadInput(f"{out}: a file has no splits, the data has {', '.join(splits)}: pass a folder as --out")


def write_text(path, text):
    """Aside, then renamed: never half a file."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text + "\n", encoding="utf-8", newline="\n")
        aside.replace(path)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        raise BadInput(f"{path}: not written ({error}): make room or pass another file") from None


def write_pool(out, script, splits, rejected, inputs, more):
    """OUT as a .jsonl file, or as a folder, where columns that the house does not know are left out and counted."""
    extra = Counter()
    if out.suffix != ".jsonl":
        extra.update(name for rows in splits.values() for row in rows for name in row if name not in COLUMNS)
        # in one order: the hash in the report is that of the rows as they will be read
        splits = {split: [{k: row[k] for k in COLUMNS if k in row} for row in rows] for split, rows in splits.items()}
    report = report_of(script, splits, rejected, None, inputs) | more
    report |= {"columns_left_out": dict(sorted(extra.items()))} if extra else {}
    try:
        if out.suffix == ".jsonl":
            write_jsonl(out, next(iter(splits.values())), report, rejected)
        else:
            write_folder(out, splits, report, rejected)
    except OSError as error:
        raise BadInput(f"{out}: not written ({error}): make room or pass another --out") from None


# -- main -------------------------------------------------------------------------------------------------------------
def show(path, total, findings):
    """The table: a line a reason, with the first three places and the first words."""
    rows = {(f["file"], f["line"]) for f in findings}
    print(f"{path}: {total:,} rows, {len(rows):,} with findings")
    by_reason = {}
    for finding in findings:
        by_reason.setdefault(finding["reason"], {}).setdefault((finding["file"], finding["line"]), finding)
    if by_reason:
        width = max(map(len, by_reason))
        print(f"  {'reason':{width}}  {'rows':>7}  {'mended':>7}  first")
    for reason, places in sorted(by_reason.items(), key=lambda item: (-len(item[1]), item[0])):
        firsts = list(places.values())[:3]
        where = ", ".join(f"{f['file']}:{f['line']}" + (f" ({f['id']})" if f["id"] else "") for f in firsts)
        fixed = sum(f["mended"] for f in places.values())
        print(f"  {reason:{width}}  {len(places):>7,}  {fixed:>7,}  {where}")
        if firsts[0]["detail"]:
            print(f"      {firsts[0]['detail'][:200]}")


def counted(findings):
    """Rows by reason."""
    seen = {(f["reason"], f["file"], f["line"]) for f in findings}
    return dict(sorted(Counter(reason for reason, *_ in seen).items()))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="rows: a file or a save_to_disk folder")
    parser.add_argument("--chat_template_path", type=Path, help="the template that the rows will be trained with")
    parser.add_argument("--model_name_or_path", help="folder or hub id of the tokenizer")
    parser.add_argument("--recipe", type=Path, help="takes both from its DEFAULTS; flags win")
    parser.add_argument("--fix", action="store_true", help="mend what has one right answer and write --out")
    parser.add_argument("--out", type=Path, help="NAME.jsonl, or a folder that does not exist yet; with --fix")
    parser.add_argument("--json", type=Path, help="file for every finding, machine-readable; written anew")
    args = parser.parse_args()
    if args.fix != (args.out is not None):
        return stop("--fix and --out go together: pass both, or neither to look only")
    try:
        return run(args)
    except BadInput as error:
        return stop(str(error))


def run(args):
    """The exit code; raises BadInput."""
    splits, inputs = read_pool(args.path)
    if args.fix:
        check_out(args.out, splits)
    against = load_against(args.chat_template_path, args.model_name_or_path, args.recipe)
    kept, rejected, findings = {split: [] for split in splits}, [], []
    for split, rows in splits.items():
        for file, line, row in tqdm(rows, desc=split, unit=" rows", disable=not sys.stderr.isatty()):
            found = left = faults(row, against)
            row_id = str(row.get("id", "")) if isinstance(row, dict) else ""
            if args.fix and any("newline" in reason for reason, _ in found):
                row = mended(row)
                left = faults(row, against)
                found = found + [fault for fault in left if fault not in found]  # nothing but newlines: now it is empty
            if args.fix and not left:
                row = completed(row, args.path.stem, line)
                if args.out.suffix != ".jsonl" and not kept_by_arrow(row):
                    left = [("number that Arrow cannot keep", "over ten decimals or 64 bits; write it as a string")]
                    found = found + left
                else:
                    kept[split].append(row)
            place = {"file": file, "line": line, "id": row_id}
            findings += [
                place | {"reason": reason, "detail": detail, "mended": args.fix and not left}
                for reason, detail in found
            ]
            if left:
                details = {"reason": left[0][0], "detail": "; ".join(detail or reason for reason, detail in left)}
                rejected.append(place | details)

    show(args.path, sum(map(len, splits.values())), findings)
    used = {"mended": counted([f for f in findings if f["mended"]])}
    used |= {"template": hashlib.sha256(against.template.encode()).hexdigest()} if against.template else {}
    if args.json:
        report = {"script": "check.py", "in": sum(map(len, splits.values())), "found": counted(findings), **used}
        report |= {"versions": {"python": platform.python_version(), "datasets": version("datasets")}}
        report |= {"input": inputs, "findings": findings}
        write_text(args.json, json.dumps(report, indent=2))  # ASCII: a refused row may hold half a surrogate pair
    if args.fix and not any(kept.values()):
        print(f"{args.out}: not written, no row of {args.path} is sound", file=sys.stderr)
    elif args.fix:
        write_pool(args.out, "check.py", kept, rejected, inputs, used)
        print(f"{args.out}: {sum(map(len, kept.values())):,} rows, {len(rejected):,} left out")
    return 1 if rejected else 0


if __name__ == "__main__":
    sys.exit(main())
