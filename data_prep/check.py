"""Check messages rows before they cost a training run: every fault is counted by reason and named by file and line.

    python -m data_prep.check data/chats --recipe recipes/qwen3_qlora.py
    python -m data_prep.check rows.jsonl --chat_template_path chat_templates/qwen3.jinja --fix --out data/checked

PATH is a .jsonl, .json or .parquet file (.gz, .zst), or a save_to_disk folder, of which every split is read. What is
found:
  roles           unknown ones, turns that do not alternate, empty answers, a tool reply without a call, a last message
                  not the assistant's, text or calls of another type
  tools           a call of a tool that the row does not offer, arguments that its JSON schema forbids, as many replies
                  as calls, ids that fit
  control tokens  in text: those of the tokenizer (--model_name_or_path) or, without one, those of the known families
  mojibake        text that was decoded by the wrong table and reverses (ftfy), and U+FFFD, which a decoder writes for
                  what it lost
  newline         an answer or its reasoning begins with one: it would merge with the newline that ends the header
  language        with --lang: the answer's or the row's is none of these
  persona         a system message (or custom_instructions) that the template leaves out of the text it renders
  template        a row that the template refuses, with its words
  too long        more tokens than --max_length, which a recipe would cut
The last three need a template, which is that of --chat_template_path, else the tokenizer's own, too long a tokenizer as
well; --recipe takes all from the recipe's DEFAULTS.

--fix mends what has one right answer (newlines at an answer's start, mojibake that reverses) and writes OUT (a .jsonl
file, or a folder with report.json, rejected.jsonl, card.md): the mended rows and the clean ones as they are; rows that
it cannot mend go to rejected.jsonl.

Exit 0: nothing found, or all of it mended. 1: something is left. 2: bad input, one sentence.
"""

import hashlib
import json
import platform
import re
import sys
from collections import Counter
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path

from data_prep.common.batches import sound
from data_prep.common.command_line import add_num_proc, make_parser, run_command
from data_prep.common.errors import InvalidRow, UsageError
from data_prep.common.language import conversation_text, detect_language
from data_prep.common.parallel import parallel_map
from data_prep.common.readers import find_inputs, list_splits, read_chunks
from data_prep.common.recipe_settings import read_settings
from data_prep.common.rendering import find_control_tokens, find_lost_personas, load_renderer
from data_prep.common.rows import check_messages, check_shape, complete_row, get_tools, refuse_unkept
from data_prep.common.writer import ChunkResult, DatasetWriter, check_output_path, encode_rows, row_location, write_text

NEWLINE = re.compile(r"\s*[\r\n]")  # blanks before the newline are no help: one token takes them all


# -- the checks: a well-formed row -> (reason, detail) of each fault; a new one = a function and its name in CHECKS ----
def roles(row, against):
    try:
        turns = row["messages"]
        if any(turn.get("content") is None for turn in turns):
            turns = [{**turn, "content": turn.get("content") or ""} for turn in turns]
        check_messages(turns)
    except InvalidRow as refusal:
        yield refusal.reason, refusal.detail
    else:
        if any("tool_calls" in turn for turn in turns):
            yield from tools(row)


def tools(row):
    """Calls and replies, in turn: each reply has its call, by id where ids are given; arguments fit the schema."""
    offered = {tool.get("function", tool).get("name"): tool.get("function", tool) for tool in get_tools(row) or []}
    waiting = []
    for number, turn in enumerate(row["messages"]):
        if waiting and turn["role"] != "tool":
            yield "tool call without a reply", f"message {number}: {len(waiting)} calls are open"
            waiting = []
        for call in turn.get("tool_calls") or []:
            function = call.get("function", call)
            name, arguments = function["name"], function["arguments"]
            waiting.append(call.get("id"))
            if not offered:
                continue
            if name not in offered:
                yield "call of a tool that is not offered", f"message {number}: {name}"
            elif fault := against_schema(json.dumps(offered[name].get("parameters") or {}), arguments):
                yield "arguments against the tool's schema", f"message {number}: {name}: {fault}"
        ids = [call.get("id") for call in turn.get("tool_calls") or [] if call.get("id")]
        if len(ids) != len({*ids}):
            yield "tool call ids that repeat", f"message {number}: {', '.join(map(str, ids))}"
        if turn["role"] == "tool":
            told = turn.get("tool_call_id")
            if told is not None and any(waiting) and told not in waiting:
                yield "tool reply to another call", f"message {number}: {told}"
            elif not waiting:
                yield "more tool replies than calls", f"message {number}"
            if waiting:
                waiting.remove(told if told in waiting else waiting[0])
    # a row may end with its calls: they are what it trains


@cache
def validator(schema):
    """A jsonschema validator of a tool's parameters (JSON text), or None where they are no JSON schema."""
    import jsonschema

    schema = json.loads(schema)
    try:
        kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        kind.check_schema(schema)
    except jsonschema.SchemaError:
        return None
    return kind(schema)


def against_schema(schema, arguments):
    """What a schema forbids about arguments, or None."""
    import jsonschema

    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    found = validator(schema)
    if found is None:
        return None
    try:
        error = next(iter(sorted(found.iter_errors(arguments), key=lambda error: list(map(str, error.path)))), None)
    except (jsonschema.exceptions._WrappedReferencingError, RecursionError):  # a $ref to nowhere
        return None
    return error and f"{'.'.join(map(str, error.path)) or 'arguments'}: {error.message[:120]}"


def control(row, against):
    for where, token in find_control_tokens(row, against):
        yield "control token in text", f"{where}: {token}"


def mojibake(row, against):
    for number, field, value in texts(row):
        if "\ufffd" in value:
            yield "text that a decoder lost", f"message {number}: U+FFFD in its {field}"
        elif not value.isascii() and garbled(value):
            yield "mojibake", f"message {number}: {value[:60]!r}"


# every table that bytes are wrongly read by has letters there, Chinese text has none: ftfy is slow on it
SINGLE_BYTE = re.compile("[\x80-\u05ff]")


def garbled(value):
    """Whether the text is mojibake that reverses; what merely looks odd to ftfy is let pass."""
    if not SINGLE_BYTE.search(value):
        return False
    from ftfy import fix_encoding
    from ftfy.badness import is_bad

    return is_bad(value) and fix_encoding(value) != value


def leading_newline(row, against):
    for number, field in begins_with_newline(row):
        name = "reasoning" if field == "reasoning_content" else "answer"
        yield f"{name} begins with a newline", f"message {number}: {row['messages'][number][field][:20]!r}"


def wrong_language(row, against):
    if not against.lang:
        return
    told = row.get("lang") or detect_language(conversation_text(row["messages"]))
    answers = [turn for turn in row["messages"] if turn["role"] == "assistant" and turn.get("content")]
    spoken = detect_language(conversation_text(answers)) if answers else told
    for what, found in (("row", told), ("answers", spoken)):
        if found not in against.lang and found != "und":
            yield "another language", f"the {what}: {found}"
            return


def template(row, against):
    if against.template is not None:
        try:
            text, _ = against.render(row, row["messages"])
        except InvalidRow as refusal:
            yield refusal.reason, refusal.detail
            return
        # no tokenizer makes more tokens than bytes
        if against.max_length and against.tokenizer is not None and len(text.encode()) > against.max_length:
            length = len(against.tokenizer(text, add_special_tokens=False)["input_ids"])
            if length > against.max_length:
                yield "too long", f"{length} tokens, max_length {against.max_length}"


def persona(row, against):
    for where, text in find_lost_personas(row, against):
        yield "persona lost", f"{where}: {text[:60]!r} is not in the rendered text"


CHECKS = [roles, control, mojibake, leading_newline, wrong_language, template, persona]


# -- a row ------------------------------------------------------------------------------------------------------------
def texts(row):
    """(number, field, text) of every message's content and reasoning."""
    turns = row["messages"]
    return [(number, field, turn[field]) for number, turn in enumerate(turns)
            for field in ("content", "reasoning_content") if turn.get(field)]  # fmt: skip


def begins_with_newline(row):
    for number, field, value in texts(row):
        if value[0].isspace() and row["messages"][number]["role"] == "assistant" and NEWLINE.match(value):
            yield number, field


def faults(row, against):
    """[(reason, detail)] of a row, empty where it is sound."""
    try:
        check_shape(row)
        return [fault for check in CHECKS for fault in check(row, against)]
    except InvalidRow as refusal:
        return [(refusal.reason, refusal.detail)]
    except RecursionError:
        return [("row nested too deep", "")]


def mended(row):
    """The row with its answers beginning where they begin (indentation after the newlines stays), and with the text
    that mojibake stood for."""
    turns = [dict(turn) for turn in row["messages"]]
    for number, field, value in texts(row):
        if "\ufffd" not in value and not value.isascii() and garbled(value):
            import ftfy

            turns[number][field] = ftfy.fix_encoding(value)
    for number, field in begins_with_newline({"messages": turns}):
        turns[number][field] = NEWLINE.sub("", turns[number][field], count=1)
    return {**row, "messages": turns}


FIXED = ("answer begins with a newline", "reasoning begins with a newline", "mojibake")


# -- many rows --------------------------------------------------------------------------------------------------------
@cache
def against_of(recipe, template_path, model, max_length, lang, told=True):
    """What rows are checked against; told: whether it is said that there is no tokenizer. Raises UsageError."""
    flags = {"chat_template_path": template_path, "model_name_or_path": model, "max_length": max_length}
    settings = read_settings(recipe, flags=flags)
    against = load_renderer(settings, lenient=model is None, told=told)
    against.lang = lang
    against.max_length = settings.max_length if recipe or max_length else None
    return against


def work(block, given, name, fix=False, out=None):
    """Result of a Block; more: the findings. given: arguments of against_of."""
    against, result, rows, findings, left = against_of(*given, told=False), ChunkResult(), [], [], None
    if block.own() and not (fix or against.template or against.tokenizer or against.lang):
        left = ~sound(block.data)
        result.rows_in = len(left) - int(left.sum())
    for line, row in block.rows(left):
        result.rows_in += 1
        found = left = faults(row, against)
        if not found and not fix:
            continue
        where = row_location(block.file, line, row)
        if fix and any(reason in FIXED for reason, _ in found):
            row = mended(row)
            left = faults(row, against)
            found = found + [fault for fault in left if fault not in found]  # nothing but newlines: now it is empty
        if fix and not left:
            try:
                row = complete_row(row, name, line)
                refuse_unkept(row, out)
                rows.append(row)
            except InvalidRow as refusal:
                left = [(refusal.reason, refusal.detail)]
                found = found + left
        findings += [
            where | {"reason": reason, "detail": detail, "mended": fix and not left} for reason, detail in found
        ]
        if left:
            details = {"reason": left[0][0], "detail": "; ".join(detail or reason for reason, detail in left)}
            result.rejected.append(where | details)
    if fix:
        result.encoded = {block.split: encode_rows(rows, out.suffix == ".jsonl")}
    result.payload = findings
    return result


class Seen:
    """What was found, by reason: rows, mended rows, the first three places. Findings themselves are kept only where
    --json wants them."""

    def __init__(self, keep):
        self.rows = self.found = 0
        self.reasons, self.mended, self.first, self.kept = Counter(), Counter(), {}, [] if keep else None

    def add(self, total, findings):
        self.rows += total
        by_row = {}
        for finding in findings:
            by_row.setdefault(finding["line"], {}).setdefault(finding["reason"], finding)
        self.found += len(by_row)
        for reasons in by_row.values():
            for reason, finding in reasons.items():
                self.reasons[reason] += 1
                self.mended[reason] += finding["mended"]
                if len(first := self.first.setdefault(reason, [])) < 3:
                    first.append(finding)
        if self.kept is not None:
            self.kept += findings

    def show(self, path):
        """The table: a line a reason, with the first three places and the first words."""
        print(f"{path}: {self.rows:,} rows, {self.found:,} with findings")
        if self.reasons:
            width = max(map(len, self.reasons))
            print(f"  {'reason':{width}}  {'rows':>7}  {'mended':>7}  first")
        for reason, count in sorted(self.reasons.items(), key=lambda item: (-item[1], item[0])):
            firsts = self.first[reason]
            where = ", ".join(f"{f['file']}:{f['line']}" + (f" ({f['id']})" if f["id"] else "") for f in firsts)
            print(f"  {reason:{width}}  {count:>7,}  {self.mended[reason]:>7,}  {where}")
            if firsts[0]["detail"]:
                print(f"      {firsts[0]['detail'][:200]}")


def main():
    parser = make_parser(__doc__)
    parser.add_argument("path", type=Path, metavar="PATH", help="rows: a file or a save_to_disk folder")
    parser.add_argument("--chat_template_path", help="the template that the rows will be trained with")
    parser.add_argument("--model_name_or_path", help="folder or hub id of the tokenizer")
    parser.add_argument("--max_length", type=int, help="tokens; longer rows are found")
    parser.add_argument("--lang", nargs="+", default=(), help="languages that rows and answers may have: zh en ja ko")
    parser.add_argument("--recipe", help="takes template, tokenizer and max_length from its DEFAULTS; flags win")
    parser.add_argument("--fix", action="store_true", help="mend what has one right answer and write --out")
    parser.add_argument("--out", type=Path, help="NAME.jsonl, or a folder that does not exist yet; with --fix")
    parser.add_argument("--json", type=Path, help="file for every finding, machine-readable; written anew")
    add_num_proc(parser)
    return run_command(parser, run)


def run(args):
    """The exit code; raises UsageError."""
    if args.fix != (args.out is not None):
        raise UsageError("--fix and --out go together: pass both, or neither to look only")
    paths = find_inputs([args.path])
    if args.fix and args.path.is_dir() and (args.path / "dataset_dict.json").is_file():
        check_output_path(args.out, list_splits(args.path))
    given = args.recipe, args.chat_template_path, args.model_name_or_path, args.max_length, tuple(args.lang)
    against, seen, inputs = against_of(*given), Seen(args.json), {}
    against_of.cache_clear()  # one block is worked on here, told or not
    used = {"template": hashlib.sha256(against.template.encode()).hexdigest()} if against.template else {}
    job = partial(work, given=given, name=args.path.stem, fix=args.fix, out=args.out)

    def looked():
        for result in parallel_map(job, read_chunks(paths, inputs), args.num_proc):
            seen.add(result.rows_in, result.payload)
            yield result

    refused = 0
    if args.fix:
        with DatasetWriter(args.out, "check.py") as writer:
            writer.input_hashes = inputs
            for result in looked():
                writer.add(result)
            refused, kept = writer.refused.total(), sum(writer.rows_out.values())
            if kept:
                writer.close({"mended": dict(sorted((+seen.mended).items())), **used})
    else:
        refused = sum(len(result.rejected) for result in looked())
    if not seen.rows:
        raise UsageError(f"{args.path}: no rows: pass rows of messages (python -m data_prep.normalize makes them)")
    seen.show(args.path)
    if args.json:
        report = {"script": "check.py", "in": seen.rows, "found": dict(sorted(seen.reasons.items())), **used}
        report |= {"mended": dict(sorted((+seen.mended).items()))}
        report |= {"versions": {"python": platform.python_version(), "pyarrow": version("pyarrow")}}
        report |= {"input": inputs, "findings": seen.kept}
        # in ASCII: a refused row may hold half a surrogate pair
        write_text(args.json, json.dumps(report, indent=2) + "\n")
    if args.fix and not kept:
        print(f"{args.out}: not written, no row of {args.path} is sound", file=sys.stderr)
    elif args.fix:
        print(f"{args.out}: {kept:,} rows, {refused:,} left out")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
