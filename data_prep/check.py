"""Check messages rows before they cost a training run: every fault is counted by reason and named by file and line.

    python -m data_prep.check data/chats --recipe recipes/qwen3_qlora.py
    python -m data_prep.check rows.jsonl --chat_template_path chat_templates/qwen3.jinja --fix --out data/checked

PATH is a .jsonl, .json or .parquet file (.gz, .zst), or a save_to_disk folder, of which every split is read. What is
looked for:
  roles           unknown ones, turns that do not alternate, empty answers, a tool reply without a call, a last message
                  not the assistant's, text or calls of another type
  tools           a call of a tool that the row does not offer, arguments that its JSON schema forbids, as many replies
                  as calls, ids that fit
  control tokens  in text: those of the tokenizer (--model_name_or_path) or, without one, those of the known families
  mojibake        text that was decoded by the wrong table and reverses (ftfy), and U+FFFD, which a decoder writes for
                  what it lost
  newline         an answer or its reasoning begins with one: it would merge with the newline that ends the header
  placeholder     {{name}}, {{ author }}: a template that nobody filled in; not in code, and not in a chat about
                  templates, which shows other tags of theirs, or one in code, or speaks of them
  loader          a value that datasets, as recipes load the file, changes: 1 beside 0.5 becomes 1.0, a date that every
                  row has becomes a timestamp, "7" beside an object becomes 7. Of rows without another fault; not with
                  --fix, which writes what stands in the file; not for packed files and stdin, which no recipe loads
  language        with --lang: the answer's or the row's is none of these
  persona         a system message (or custom_instructions) that the template leaves out of the text it renders
  template        a row that the template refuses, with its words
  untrained       a row of which no token is trained: loss_mask or train_turns leaves no answer; not with a recipe that
                  trains every token, nor with a template without {% generation %}
  too long        more tokens than --max_length, which a recipe would truncate
The last four need a template, which is that of --chat_template_path, else the tokenizer's own, too long a tokenizer as
well; --recipe takes all from the recipe's DEFAULTS. A template of another family than the tokenizer's is a finding of
its own, not one a row.

--fix mends what has one right answer (newlines at an answer's start, mojibake that reverses) and writes OUT (a .jsonl
file, or a folder with report.json, rejected.jsonl, card.md): the mended rows and the clean ones as they are; rows that
it cannot mend go to rejected.jsonl.

Exit 0: nothing found, or all of it mended. 1: something is left, or the template does not fit. 2: bad input, one
sentence.
"""

import hashlib
import json
import platform
import re
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from data_prep.common.chunks import Chunk
from data_prep.common.command_line import add_num_proc, make_parser, run_command
from data_prep.common.errors import InvalidRow, UsageError
from data_prep.common.json_text import dump_json
from data_prep.common.language import UNKNOWN, conversation_text, detect_language
from data_prep.common.loader_changes import JSON_FILES, Loader, can_be_loaded, may_change
from data_prep.common.parallel import parallel_map
from data_prep.common.personas import PERSONA_LOST, find_lost_personas
from data_prep.common.readers import find_inputs, is_dataset_folder, open_splits, read_chunks
from data_prep.common.recipe_settings import LENGTH_REMEDY, read_settings
from data_prep.common.rendering import (
    Renderer,
    find_control_tokens,
    find_empty_thoughts,
    load_renderer,
)
from data_prep.common.rows import COLUMNS, Message, check_messages, check_shape, complete_row, get_tools
from data_prep.common.terminal import colour
from data_prep.common.writer import ChunkResult, DatasetWriter, check_output_path, encode_rows, row_location, write_text

if TYPE_CHECKING:
    from jsonschema.protocols import Validator

ANSWER_NEWLINE = "answer begins with a newline"
REASONING_NEWLINE = "reasoning begins with a newline"
MOJIBAKE = "mojibake"
FIXABLE = (ANSWER_NEWLINE, REASONING_NEWLINE, MOJIBAKE)
CHANGED = "value that the loader changes"
UNTRAINED = "no trained token"
REMEDIES = {  # what helps, said below the reason
    "row without messages": "python -m data_prep.normalize auto finds the source that reads these rows",
    "unknown role": "python -m data_prep.normalize messages reads developer and other names of the roles (--roles)",
    "text that is not a string": "python -m data_prep.normalize messages reads content in parts",
    CHANGED: "python -m data_prep.normalize messages FILE --out data/NAME writes a folder that keeps every value",
    UNTRAINED: "TRL stops at such a row: leave it out (--fix does), or change its loss_mask or train_turns",
    "too long": LENGTH_REMEDY,
}
SHOWN_ROWS = 3  # of a reason, in the table


# -- what rows are checked for ----------------------------------------------------------------------------------------
class Fault(NamedTuple):
    """What is wrong with a row. reason: the words it is counted under."""

    reason: str
    detail: str = ""


class CheckFlags(NamedTuple):
    """The flags that say what rows are checked for."""

    recipe: str | None = None
    chat_template_path: str | None = None
    model_name_or_path: str | None = None
    max_length: int | None = None
    languages: tuple[str, ...] = ()


@dataclass
class CheckOptions:
    """What rows are checked for."""

    renderer: Renderer
    languages: tuple[str, ...] = ()  # any, where there are none
    max_length: int | None = None  # tokens
    answers_only: bool = True  # what the template marks is trained, and nothing else


@cache
def load_options(flags: CheckFlags, quiet: bool = False) -> CheckOptions:
    """Load what the flags name, without a recipe's tokenizer where it is not at hand, which is printed unless quiet.

    Raises UsageError.
    """
    model = flags.model_name_or_path
    if flags.max_length is not None and not (flags.recipe or model):
        raise UsageError("--max_length: needs a tokenizer: pass --recipe or --model_name_or_path")
    named = {"chat_template_path": flags.chat_template_path, "model_name_or_path": model}
    settings = read_settings(flags.recipe, flags={**named, "max_length": flags.max_length})
    renderer = load_renderer(settings, lenient=model is None and flags.max_length is None, quiet=quiet)
    options = CheckOptions(renderer, flags.languages)
    if flags.recipe:
        options.answers_only = settings.assistant_only_loss
    if flags.recipe or flags.max_length is not None:
        options.max_length = settings.max_length
    if flags.max_length is not None:
        require_lengths(options, "--max_length")
    elif options.max_length and renderer.tokenizer is None and not quiet:
        print(f"max_length {options.max_length} of {flags.recipe}: not checked without the tokenizer", file=sys.stderr)
    return options


def require_lengths(options: CheckOptions, name: str) -> None:
    """Raise UsageError where rows cannot be measured in tokens. name: of the flag that asks for it."""
    if options.renderer.tokenizer is None:
        raise UsageError(f"{name}: its tokenizer cannot be loaded: pass a local folder as --model_name_or_path")
    if options.renderer.template is None:
        raise UsageError(f"{name}: the tokenizer has no chat template: pass one as --chat_template_path")
    if not options.max_length:
        raise UsageError(f"{name}: it has no max_length: pass --max_length")


def read_flags(args: Namespace) -> CheckFlags:
    return CheckFlags(
        args.recipe, args.chat_template_path, args.model_name_or_path, args.max_length, tuple(args.lang or ())
    )


# -- the rules: a row that has its shape -> its faults; a new one = a function and its name in RULES -------------------
TEXT_FIELDS = ("content", "reasoning_content")


class Text(NamedTuple):
    """A text of a message."""

    number: int  # of its message
    field: str  # one of TEXT_FIELDS
    text: str


def list_texts(turns: list[Message]) -> list[Text]:
    """Return the texts of messages that hold any."""
    texts = []
    for number, turn in enumerate(turns):
        for name in TEXT_FIELDS:
            text = turn.get(name)
            if text:
                texts.append(Text(number, name, text))
    return texts


def check_roles(row: dict, options: CheckOptions) -> Iterator[Fault]:
    try:
        check_messages(row["messages"])
    except InvalidRow as error:
        yield Fault(error.reason, error.detail)
        return
    if any(["tool_calls" in turn for turn in row["messages"]]):
        yield from check_tools(row)


def check_tools(row: dict) -> Iterator[Fault]:
    """Yield calls without their reply and replies without their call, by id where ids are there, and calls that do not
    fit the tools. A row may end with its calls: they are what it trains."""
    functions = {}
    for tool in get_tools(row) or []:
        function = tool.get("function", tool)
        functions[function.get("name")] = function
    open_calls = []
    for number, turn in enumerate(row["messages"]):
        if open_calls and turn["role"] != "tool":
            yield Fault("tool call without a reply", f"message {number}: {len(open_calls)} calls are open")
            open_calls = []
        calls = turn.get("tool_calls") or []
        for call in calls:
            open_calls.append(call.get("id"))
            if functions:
                yield from check_call(call.get("function", call), functions, number)
        ids = [call["id"] for call in calls if call.get("id")]
        if len(ids) != len(set(ids)):
            yield Fault("tool call ids that repeat", f"message {number}: {', '.join(map(str, ids))}")
        if turn["role"] == "tool":
            yield from close_call(turn.get("tool_call_id"), open_calls, number)


def check_call(call: dict, functions: dict[str, dict], number: int) -> Iterator[Fault]:
    """Yield what is wrong with a call of message `number`. functions: {name: function} that the row offers."""
    name = call["name"]
    if name not in functions:
        yield Fault("call of a tool that is not offered", f"message {number}: {name}")
        return
    schema = json.dumps(functions[name].get("parameters") or {})
    violation = find_violation(schema, call["arguments"])
    if violation is not None:
        yield Fault("arguments against the tool's schema", f"message {number}: {name}: {violation}")


def close_call(call_id: object, open_calls: list, number: int) -> Iterator[Fault]:
    """Take the call that a tool reply answers from the ids of the open ones; yield what is wrong with the reply."""
    if not open_calls:
        yield Fault("more tool replies than calls", f"message {number}")
        return
    if call_id is not None and any(open_calls) and call_id not in open_calls:
        yield Fault("tool reply to another call", f"message {number}: {call_id}")
    answered = call_id if call_id in open_calls else open_calls[0]
    open_calls.remove(answered)


@cache
def load_validator(schema: str) -> "Validator | None":
    """Return the validator of a tool's parameters (JSON text), or None where they are no JSON schema."""
    import jsonschema

    parameters = json.loads(schema)
    try:
        kind = jsonschema.validators.validator_for(parameters, default=jsonschema.Draft202012Validator)
        kind.check_schema(parameters)
    except jsonschema.SchemaError:
        return None
    return kind(parameters)


def find_violation(schema: str, arguments: object) -> str | None:
    """Return what a schema (JSON text) forbids about arguments, or None."""
    from referencing.exceptions import Unresolvable

    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    validator = load_validator(schema)
    if validator is None:
        return None
    try:
        errors = sorted(validator.iter_errors(arguments), key=lambda error: list(map(str, error.path)))
    except (Unresolvable, RecursionError):  # a $ref to nowhere
        return None
    if not errors:
        return None
    place = ".".join(map(str, errors[0].path)) or "arguments"
    return f"{place}: {errors[0].message[:120]}"


def check_control_tokens(row: dict, options: CheckOptions) -> Iterator[Fault]:
    for place, token in find_control_tokens(row, options.renderer):
        yield Fault("control token in text", f"{place}: {token}")


# every table that bytes are wrongly read by has letters there, Chinese text has none: ftfy is slow on it
SINGLE_BYTE = re.compile("[\x80-\u05ff]")


def check_mojibake(row: dict, options: CheckOptions) -> Iterator[Fault]:
    for number, name, text in list_texts(row["messages"]):
        if "\ufffd" in text:
            yield Fault("text that a decoder lost", f"message {number}: U+FFFD in its {name}")
        elif is_mojibake(text):
            yield Fault(MOJIBAKE, f"message {number}: {text[:60]!r}")


def is_mojibake(text: str) -> bool:
    """Return whether a text is mojibake that reverses; what merely looks odd to ftfy passes."""
    if text.isascii() or not SINGLE_BYTE.search(text):
        return False
    from ftfy import fix_encoding
    from ftfy.badness import is_bad

    return is_bad(text) and fix_encoding(text) != text


LEADING_NEWLINE = re.compile(r"\s*[\r\n]")  # blanks before the newline are no help: one token takes them all


def check_newlines(row: dict, options: CheckOptions) -> Iterator[Fault]:
    for number, name, text in find_leading_newlines(row["messages"]):
        reason = REASONING_NEWLINE if name == "reasoning_content" else ANSWER_NEWLINE
        yield Fault(reason, f"message {number}: {text[:20]!r}")


def find_leading_newlines(turns: list[Message]) -> Iterator[Text]:
    for number, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        for name in TEXT_FIELDS:
            text = turn.get(name)
            if text and text[0].isspace() and LEADING_NEWLINE.match(text):
                yield Text(number, name, text)


# a name in double braces; LaTeX and code have letters, backslashes or more braces before them
PLACEHOLDER = re.compile(r"(?<![A-Za-z0-9\\^_{}$%])\{\{\s*([^\W\d]\w{1,40})\s*\}\}(?!\})")
CODE = re.compile(r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|`[^`\n]+`", re.DOTALL)
# of Jinja, Mustache, Vue: {% if %}, {{#each}}, {{ user.name }}, {{ x | upper }}, <p>{{name}}
TEMPLATE_TAG = re.compile(r"\{%|\{\{[#/>^!&-]|\{\{[^{}]*[|.(\[][^{}]*\}\}|<\w[^<>]*>?\s*\{\{")
ABOUT_TEMPLATES = re.compile(
    r"jinja|handlebars|mustache|liquid|templat|placeholder|django|flask|vue|angular|svelte|helm|ansible|模板|占位|变量",
    re.IGNORECASE,
)


def check_placeholders(row: dict, options: CheckOptions) -> Iterator[Fault]:
    turns = row["messages"]
    if not any(["{{" in (turn.get("content") or "") for turn in turns]):
        return
    text = "\n".join([turn.get("content") or "" for turn in turns])
    if TEMPLATE_TAG.search(text) or ABOUT_TEMPLATES.search(text):
        return
    if any([PLACEHOLDER.search(code.strip("`~")) for code in CODE.findall(text)]):
        return
    for number, turn in enumerate(turns):
        match = PLACEHOLDER.search(turn.get("content") or "")
        if match and turn["role"] != "tool":
            yield Fault("placeholder that is not filled in", f"message {number}: {match[0]}")


def check_language(row: dict, options: CheckOptions) -> Iterator[Fault]:
    if not options.languages:
        return
    language = row.get("lang") or detect_language(conversation_text(row["messages"]))
    accepted = (*options.languages, UNKNOWN)
    if language not in accepted:
        yield Fault("another language", f"the row: {language}")
        return
    answers = [turn for turn in row["messages"] if turn["role"] == "assistant" and turn.get("content")]
    if answers:
        language = detect_language(conversation_text(answers))
        if language not in accepted:
            yield Fault("another language", f"the answers: {language}")


def check_template(row: dict, options: CheckOptions) -> Iterator[Fault]:
    renderer = options.renderer
    if renderer.template is None:
        return
    try:
        text, spans = renderer.render(row, row["messages"])
    except InvalidRow as error:
        yield Fault(error.reason, error.detail)
        return
    if options.answers_only and renderer.marked and not any([span.end > span.start for span in spans]):
        yield Fault(UNTRAINED, "the template marks no answer")
    if not options.max_length or renderer.tokenizer is None:
        return
    if len(text.encode()) <= options.max_length:  # no tokenizer makes more tokens than bytes
        return
    length = len(renderer.tokenizer(text, add_special_tokens=False)["input_ids"])
    if length > options.max_length:
        yield Fault("too long", f"{length} tokens, max_length {options.max_length}")


def check_thoughts(row: dict, options: CheckOptions) -> Iterator[Fault]:
    renderer = options.renderer
    if not renderer.marked or not renderer.arguments.opens_thinking:
        return
    try:
        rendered = renderer.render(row, row["messages"])
    except InvalidRow:  # check_template says so
        return
    if find_empty_thoughts(rendered):
        yield Fault("answer without reasoning behind an opened thought", renderer.empty_thought_remedy)


def check_personas(row: dict, options: CheckOptions) -> Iterator[Fault]:
    if options.renderer.template is None:
        return
    for place, text in find_lost_personas(row, options.renderer):
        yield Fault(PERSONA_LOST, f"{place}: {text[:60]!r} is not in the rendered text")


def check_other_columns(row: dict, options: CheckOptions) -> Iterator[Fault]:
    """Nothing reads them, but a recipe loads the whole file: of one row that holds half a surrogate pair it makes
    rows of messages, of more it loads none."""
    for name, value in row.items():
        if name not in COLUMNS:
            try:
                dump_json({name: value}, default=str)
            except InvalidRow as error:
                yield Fault(error.reason, f"{name}: {error.detail}, and no recipe loads the file")


RULES = (
    check_roles,
    check_control_tokens,
    check_mojibake,
    check_newlines,
    check_placeholders,
    check_language,
    check_template,
    check_thoughts,
    check_personas,
    check_other_columns,
)


def find_faults(row: object, options: CheckOptions) -> list[Fault]:
    """Return the faults of a row, none where it is sound."""
    faults = []
    try:
        check_shape(row)
        for rule in RULES:
            faults.extend(rule(row, options))
    except InvalidRow as error:
        return [Fault(error.reason, name_source(row, error.detail))]
    except RecursionError:
        return [Fault("row nested too deep")]
    return faults


def name_source(row: object, detail: str) -> str:
    """Return a detail that ends with the source of normalize for a row without messages, where one stands out."""
    if not isinstance(row, dict) or row.get("messages"):
        return detail
    source = "auto"
    turns = row.get("conversations")
    if isinstance(turns, list) and turns and isinstance(turns[0], dict):
        source = "sharegpt" if "from" in turns[0] else "messages"
    elif {"instruction", "output"} <= row.keys():
        source = "alpaca"
    elif {"prompt", "completion"} <= row.keys():
        source = "prompt_completion"
    return detail.removesuffix("auto") + source


# -- mending ----------------------------------------------------------------------------------------------------------
def mend_row(row: dict) -> dict:
    """Return a row whose answers begin with their text (indentation after the newlines stays), and with the text that
    mojibake stood for."""
    turns = [dict(turn) for turn in row["messages"]]
    for number, name, text in list_texts(turns):
        if "\ufffd" not in text and is_mojibake(text):
            import ftfy

            turns[number][name] = ftfy.fix_encoding(text)
    for number, name, text in list(find_leading_newlines(turns)):
        turns[number][name] = LEADING_NEWLINE.sub("", text, count=1)
    return {**row, "messages": turns}


class Mended(NamedTuple):
    """What mending made of a row: the complete row, what was wrong with it, and what still is."""

    row: object
    faults: list[Fault]
    left: list[Fault]


def fix_row(row: object, faults: list[Fault], options: CheckOptions, name: str, line: int) -> Mended:
    """Mend a row with these faults, and complete it where nothing is left. name, line: of its file."""
    left = faults
    if any([fault.reason in FIXABLE for fault in faults]):
        row = mend_row(row)
        left = find_faults(row, options)
        faults = faults + [fault for fault in left if fault not in faults]  # nothing but newlines: now it is empty
    if not left:
        row = complete_row(row, name, line)
    return Mended(row, faults, left)


# -- many rows --------------------------------------------------------------------------------------------------------
@dataclass
class Finding:
    """A fault of a row, where it stands, and whether --fix mended the row."""

    file: str
    line: int
    id: str
    reason: str
    detail: str
    mended: bool = False


class Suspect(NamedTuple):
    """A row that the loader may change. location: as findings name it."""

    position: int  # in its chunk
    location: dict
    row: dict


@dataclass
class ChunkFindings:
    """What was found in a chunk, and the rows that are still to be compared with what the loader makes of them."""

    split: str
    findings: list[Finding] = field(default_factory=list)
    suspects: list[Suspect] = field(default_factory=list)


@dataclass
class CheckJob:
    """What is done with every chunk."""

    flags: CheckFlags
    name: str  # of the file, by which rows without an id are called
    fix: bool
    is_jsonl: bool  # what --fix writes
    compare: bool  # look for rows that the loader may change
    is_json: bool  # the file, to the loader


def check_chunk(chunk: Chunk, job: CheckJob) -> ChunkResult:
    """Return the ChunkFindings of a chunk as payload; with --fix its sound rows, too."""
    options = load_options(job.flags, quiet=True)
    found = ChunkFindings(chunk.split)
    result = ChunkResult(payload=found)
    sound = []
    for position, (line, row) in enumerate(chunk.rows()):
        result.rows_in += 1
        location = row_location(chunk.file, line, row)
        faults = find_faults(row, options)
        left = faults
        if job.fix:
            row, faults, left = fix_row(row, faults, options, job.name, line)
        elif job.compare and not faults and may_change(row, job.is_json):
            found.suspects.append(Suspect(position, location, row))
        for reason, detail in faults:
            found.findings.append(Finding(**location, reason=reason, detail=detail, mended=not left))
        if left:
            details = "; ".join([fault.detail or fault.reason for fault in left])
            result.rejected.append(location | {"reason": left[0].reason, "detail": details})
        elif job.fix:
            sound.append(row)
    if job.fix:
        result.encoded = {chunk.split: encode_rows(sound, job.is_jsonl)}
    return result


class Summary:
    """What was found, by reason: rows, mended rows, the first places. All findings are kept only where --json wants
    them."""

    def __init__(self, keep: bool) -> None:
        self.keep = keep
        self.rows = 0
        self.rows_found = 0
        self.reasons: Counter[str] = Counter()
        self.mended: Counter[str] = Counter()
        self.first: dict[str, list[Finding]] = {}
        self.findings: list[Finding] = []

    def add(self, rows: int, findings: list[Finding]) -> None:
        """Count the findings of a chunk of rows."""
        self.rows += rows
        self.rows_found += len({finding.line for finding in findings})
        counted = {}
        for finding in findings:
            counted.setdefault((finding.line, finding.reason), finding)
        for finding in counted.values():
            self.reasons[finding.reason] += 1
            self.mended[finding.reason] += finding.mended
            first = self.first.setdefault(finding.reason, [])
            if len(first) < SHOWN_ROWS:
                first.append(finding)
        if self.keep:
            self.findings += findings

    def print_table(self, path: Path) -> None:
        """Print a line a reason, with the first places and words, and what helps."""
        verdict = "failed" if self.rows_found else "passed"
        found = colour(f"{self.rows_found:,} with findings", verdict)
        print(f"{path}: {self.rows:,} rows, {found}")
        if not self.reasons:
            return
        width = max(map(len, self.reasons))
        print(f"  {'reason':{width}}  {'rows':>7}  {'mended':>7}  first")
        for reason, count in sorted(self.reasons.items(), key=lambda item: (-item[1], item[0])):
            places = ", ".join(map(format_place, self.first[reason]))
            verdict = "note" if self.mended[reason] == count else "failed"
            name = colour(f"{reason:{width}}", verdict)
            print(f"  {name}  {count:>7,}  {self.mended[reason]:>7,}  {places}")
            detail = self.first[reason][0].detail
            if detail:
                print(f"      {detail[:200]}")
            if reason in REMEDIES:
                print(f"      what helps: {REMEDIES[reason]}")

    def mended_counts(self) -> dict[str, int]:
        return dict(sorted((+self.mended).items()))


def format_place(finding: Finding) -> str:
    name = f" ({finding.id})" if finding.id else ""
    return f"{finding.file}:{finding.line}{name}"


class Check:
    """One run over the rows of a path."""

    def __init__(self, args: Namespace, paths: list) -> None:
        self.args = args
        self.paths = paths
        self.flags = read_flags(args)
        self.renderer = load_options(self.flags).renderer
        load_options.cache_clear()  # one of the chunks may be worked on in this process
        if self.renderer.mismatch is not None:
            print(f"the template does not fit: {self.renderer.mismatch}")
        self.summary = Summary(args.json is not None)
        self.input_hashes: dict[str, str] = {}
        self.loader = None
        if len(paths) == 1 and can_be_loaded(paths[0]):
            self.loader = Loader(paths[0])

    def check_chunks(self) -> Iterator[ChunkResult]:
        """Check all rows; yield the results, whose findings are in the summary then. Raises UsageError."""
        args = self.args
        job = CheckJob(
            self.flags,
            name=args.path.stem,
            fix=args.fix,
            is_jsonl=args.fix and args.out.suffix == ".jsonl",
            compare=self.loader is not None,
            is_json=args.path.suffix in JSON_FILES,
        )
        chunks = read_chunks(self.paths, self.input_hashes)
        starts = Counter()  # of the next chunk, by split
        for result in parallel_map(partial(check_chunk, job=job), chunks, args.num_proc):
            split = result.payload.split
            findings = result.payload.findings
            for position, location, row in result.payload.suspects:
                change = self.loader.find_change(split, starts[split] + position, row)
                if change:
                    findings.append(Finding(**location, reason=CHANGED, detail=change))
            starts[split] += result.rows_in
            findings.sort(key=lambda finding: finding.line)
            self.summary.add(result.rows_in, findings)
            yield result
        if not self.summary.rows:
            raise UsageError(f"{args.path}: no rows: pass rows of messages (python -m data_prep.normalize makes them)")
        if self.loader is not None and self.loader.failure and not self.summary.rows_found:
            raise UsageError(f"a recipe cannot load the rows, though each is sound: {self.loader.failure}")

    def describe_template(self) -> dict[str, str]:
        """Return what the reports say of the template: its hash, and why it does not fit the tokenizer."""
        facts = {}
        if self.renderer.template:
            facts["template"] = hashlib.sha256(self.renderer.template.encode()).hexdigest()
        if self.renderer.mismatch is not None:
            facts["template_mismatch"] = self.renderer.mismatch
        return facts

    def write_fixed(self) -> int:
        """Write the sound rows; return the number of those that are not. Raises UsageError."""
        args = self.args
        with DatasetWriter(args.out, "check.py") as writer:
            writer.input_hashes = self.input_hashes
            for result in self.check_chunks():
                writer.add(result)
            refused = writer.refused.total()
            kept = writer.rows_out.total()
            self.summary.print_table(args.path)
            if kept:
                writer.close({"mended": self.summary.mended_counts(), **self.describe_template()})
                print(f"{args.out}: {kept:,} rows, {refused:,} left out")
            else:
                print(f"no row of {args.path} is sound: see {writer.close_rejected()}", file=sys.stderr)
        return refused

    def write_findings(self, path: Path) -> None:
        """Write --json, in ASCII: a refused row may hold half a surrogate pair. Raises UsageError."""
        report = {
            "script": "check.py",
            "in": self.summary.rows,
            "found": dict(sorted(self.summary.reasons.items())),
            **self.describe_template(),
            "mended": self.summary.mended_counts(),
            "versions": {"python": platform.python_version(), "pyarrow": version("pyarrow")},
            "input": self.input_hashes,
            "findings": [asdict(finding) for finding in self.summary.findings],
        }
        write_text(path, json.dumps(report, indent=2) + "\n")


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("path", type=Path, metavar="PATH", help="rows: a file or a save_to_disk folder")
    parser.add_argument("--chat_template_path", help="the template that the rows will be trained with")
    parser.add_argument("--model_name_or_path", help="folder or hub id of the tokenizer")
    parser.add_argument("--max_length", type=int, help="tokens; longer rows are found")
    parser.add_argument("--lang", nargs="+", help="languages that rows and answers may have: zh en ja ko")
    parser.add_argument("--recipe", help="takes template, tokenizer and max_length from its DEFAULTS; flags win")
    parser.add_argument("--fix", action="store_true", help="mend what has one right answer and write --out")
    parser.add_argument("--out", type=Path, help="NAME.jsonl, or a folder that does not exist yet; with --fix")
    parser.add_argument("--json", type=Path, help="file for every finding, machine-readable; written anew")
    add_num_proc(parser)
    return run_command(parser, run)


def run(args: Namespace) -> int:
    """Return the exit code; raise UsageError."""
    if args.fix != (args.out is not None):
        raise UsageError("--fix and --out go together: pass both, or neither to look only")
    paths = find_inputs([args.path])
    if args.fix and is_dataset_folder(args.path):
        check_output_path(args.out, open_splits(args.path))
    check = Check(args, paths)
    if args.fix:
        left = check.write_fixed()
    else:
        for _ in check.check_chunks():
            pass
        check.summary.print_table(args.path)
        left = check.summary.rows_found
    args.rows_left = left  # what next_step.py asks: a template that does not fit is no row's fault
    if args.json is not None:
        check.write_findings(args.json)
    return 1 if left or check.renderer.mismatch is not None else 0


if __name__ == "__main__":
    sys.exit(main())
