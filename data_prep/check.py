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
The last two need a template, which is that of --chat_template_path, else the tokenizer's own; --recipe takes both from
the recipe's DEFAULTS.

--fix strips the newlines, which has one right answer, and writes OUT (a .jsonl file, or a folder with report.json,
rejected.jsonl, card.md): the mended rows and the clean ones as they are; rows that it cannot mend go to rejected.jsonl.

Exit 0: nothing found, or all of it mended. 1: something is left. 2: bad input, one sentence.
"""

import hashlib
import json
import platform
import re
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from normalize import (
    BadInput,
    Refused,
    check_messages,
    check_out,
    command,
    parser_of,
    place,
    refuse_unkept,
    shown,
    write_text,
)
from render import (
    completed,
    control_tokens,
    load_against,
    lost_personas,
    read_pool,
    read_settings,
    well_formed,
    write_pool,
)

NEWLINE = re.compile(r"\s*[\r\n]")  # blanks before the newline are no help: one token takes them all


# -- the checks: a well-formed row -> (reason, detail) of each fault; a new one = a function and its name in CHECKS ----
def roles(row, against):
    try:
        check_messages([{**turn, "content": turn.get("content") or ""} for turn in row["messages"]])
    except Refused as refusal:
        yield refusal.reason, refusal.detail


def control(row, against):
    for where, token in control_tokens(row, against):
        yield "control token in text", f"{where}: {token}"


def leading_newline(row, against):
    for number, field in begins_with_newline(row):
        name = "reasoning" if field == "reasoning_content" else "answer"
        yield f"{name} begins with a newline", f"message {number}: {row['messages'][number][field][:20]!r}"


def template(row, against):
    if against.template is not None:
        try:
            against.render(row, row["messages"])
        except Refused as refusal:
            yield refusal.reason, refusal.detail


def persona(row, against):
    for where, text in lost_personas(row, against):
        yield "persona lost", f"{where}: {text[:60]!r} is not in the rendered text"


CHECKS = [roles, control, leading_newline, template, persona]


# -- a row ------------------------------------------------------------------------------------------------------------
def begins_with_newline(row):
    for number, turn in enumerate(row["messages"]):
        for field in ("content", "reasoning_content"):
            if turn["role"] == "assistant" and NEWLINE.match(turn.get(field) or ""):
                yield number, field


def faults(row, against):
    """[(reason, detail)] of a row, empty where it is sound."""
    try:
        well_formed(row)
        return [fault for check in CHECKS for fault in check(row, against)]
    except Refused as refusal:
        return [(refusal.reason, refusal.detail)]
    except RecursionError:
        return [("row nested too deep", "")]


def mended(row):
    """The row with its answers beginning where they begin; indentation after the newlines stays."""
    turns = [dict(turn) for turn in row["messages"]]
    for number, field in begins_with_newline(row):
        turns[number][field] = NEWLINE.sub("", turns[number][field], count=1)
    return {**row, "messages": turns}


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
    parser = parser_of(__doc__)
    parser.add_argument("path", type=Path, metavar="PATH", help="rows: a file or a save_to_disk folder")
    parser.add_argument("--chat_template_path", help="the template that the rows will be trained with")
    parser.add_argument("--model_name_or_path", help="folder or hub id of the tokenizer")
    parser.add_argument("--recipe", help="takes both from its DEFAULTS; flags win")
    parser.add_argument("--fix", action="store_true", help="mend what has one right answer and write --out")
    parser.add_argument("--out", type=Path, help="NAME.jsonl, or a folder that does not exist yet; with --fix")
    parser.add_argument("--json", type=Path, help="file for every finding, machine-readable; written anew")
    return command(parser, run)


def run(args):
    """The exit code; raises BadInput."""
    if args.fix != (args.out is not None):
        raise BadInput("--fix and --out go together: pass both, or neither to look only")
    splits, inputs = read_pool(args.path)
    if args.fix:
        check_out(args.out, splits)
    flags = {name: getattr(args, name) for name in ("chat_template_path", "model_name_or_path")}
    against = load_against(read_settings(args.recipe, flags=flags), lenient=args.model_name_or_path is None)
    kept, rejected, findings = {split: [] for split in splits}, [], []
    for split, rows in splits.items():
        for file, line, row in shown(rows, split):
            found = left = faults(row, against)
            where = place(file, line, row)
            if args.fix and any("newline" in reason for reason, _ in found):
                row = mended(row)
                left = faults(row, against)
                found = found + [fault for fault in left if fault not in found]  # nothing but newlines: now it is empty
            if args.fix and not left:
                try:
                    row = completed(row, args.path.stem, line)
                    refuse_unkept(row, args.out)
                    kept[split].append(row)
                except Refused as refusal:
                    left = [(refusal.reason, refusal.detail)]
                    found = found + left
            findings += [
                where | {"reason": reason, "detail": detail, "mended": args.fix and not left}
                for reason, detail in found
            ]
            if left:
                details = {"reason": left[0][0], "detail": "; ".join(detail or reason for reason, detail in left)}
                rejected.append(where | details)

    show(args.path, sum(map(len, splits.values())), findings)
    used = {"mended": counted([f for f in findings if f["mended"]])}
    used |= {"template": hashlib.sha256(against.template.encode()).hexdigest()} if against.template else {}
    if args.json:
        report = {"script": "check.py", "in": sum(map(len, splits.values())), "found": counted(findings), **used}
        report |= {"versions": {"python": platform.python_version(), "datasets": version("datasets")}}
        report |= {"input": inputs, "findings": findings}
        # in ASCII: a refused row may hold half a surrogate pair
        write_text(args.json, json.dumps(report, indent=2) + "\n")
    if args.fix and not any(kept.values()):
        print(f"{args.out}: not written, no row of {args.path} is sound", file=sys.stderr)
    elif args.fix:
        write_pool(args.out, "check.py", kept, rejected, inputs, used)
        print(f"{args.out}: {sum(map(len, kept.values())):,} rows, {len(rejected):,} left out")
    return 1 if rejected else 0


if __name__ == "__main__":
    sys.exit(main())
