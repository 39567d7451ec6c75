"""Mix dataset folders into one training set by a YAML of sources and weights, validation chosen before rows are drawn.

    python -m data_prep.mix data_prep/mixes/day2_4080.yaml --pools data --out data/day2
    python -m data_prep.mix my.yaml --out data/mine --recipe recipes/qwen3_qlora.py

    strategy: interleave   # interleave, resample, subsample, concatenate
    by: rows               # what weights and size count: rows or tokens of the train split (tokens need --recipe)
    seed: 42
    size: 20000            # rows or tokens of the train split; left out: as many as the sources give
    validation: {share: 0.02, min: 100}    # max(min, share of all rows); 0 for none
    pool_validation: use   # the sources' own validation splits: use (default where there is validation) or leave
    chat_template_kwargs: {train_turns: last}  # template arguments of every row; those that a row has win
    sources:
      - {path: cmath, weight: 0.2}         # a dataset folder, under --pools
      - {path: chats, weight: 0.8, epochs: 2, where: {tags: think, lang: zh}}
      - {path: talk, weight: 0.8, shuffle: 42, rows: 5000}     # the first 5,000 after datasets' shuffle(seed=42)

The steps: rows that are equal (same turns but for blanks, same tools and template arguments) are kept once, the first
source wins (dedup: false keeps all); validation is chosen by prompt, so that a prompt stands on one side only, and the
think and no_think twins of a prompt stay together; then the train side is mixed, so that oversampling survives:
  interleave   weights are shares of the result, evenly spread; it ends where the first source is used up (stop:
               first_exhausted) or, repeating sources, where the last is (all_exhausted), or goes on with the rest
               until each is, none repeated (each_exhausted: all rows, weights are shares as long as all last);
               `epochs` passes over a source are allowed before it counts as used up, 1.5 is a pass and half of another
  resample     weights are shares; rows are drawn with replacement, 0.9 of all where no size is given
  subsample    a weight is the share of that source which is kept (SmolLM3's), the same prompts in every source,
               `epochs` times
  concatenate  sources one after the other, each `epochs` times, up to size
An option that the strategy does not read is refused. A negative weight counts as 0 with a warning, all of them 0 or
less means equal. `shuffle: numpy` (default of resample and subsample), `python` (random.Random(seed), as nanochat) or
`none`. `literal: true` mixes as the 4080 tutorial's script does: mixed first, duplicates removed after that, validation
split off at the end; its weights then change nothing where sources are used up (tests show it), hence the option.

A source's own validation split is not trained on. `use` makes it part of the validation split, towards its share,
with every row of its prompts, and once, however many sources name its folder; `leave` (default under `validation: 0`
and `literal`) leaves it out. Any other split is named with its rows. What a strategy draws nowhere is named with the
option that changes it.

OUT is a dataset folder with train and validation, the same as .jsonl, report.json (realised shares by source),
rejected.jsonl (duplicates, rows not drawn) and card.md. in + added = out + refused; added rows are repeats.

Exit 0: done. 1: nothing is left to train on. 2: bad input, one sentence.
"""

import argparse
import io
import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_prep.common.arrow_rows import SCHEMA, batch_to_rows
from data_prep.common.chunks import ROWS
from data_prep.common.command_line import add_num_proc, format_counts, make_parser, run_command
from data_prep.common.errors import UsageError
from data_prep.common.json_text import dump_json
from data_prep.common.mix_options import Mix, read_mix
from data_prep.common.mix_strategies import Candidates, Draw, count_passes, draw_literally, draw_rows, shares_of
from data_prep.common.parallel import parallel_map
from data_prep.common.readers import Split, open_splits
from data_prep.common.row_keys import compared_turns, prompt_key, row_key
from data_prep.common.rows import Row
from data_prep.common.splitting import choose_validation, order_by_prompt
from data_prep.common.writer import ChunkResult, DatasetWriter, EncodedRows, LinesFile, encode_rows, explain_os_errors

VALIDATION = "validation"
MOST_VALUES = 40  # lines of a table of the card
LEFT_OUT = "validation split left out"
REFUSALS = ("", "not asked for", "template refuses the row", LEFT_OUT)


# -- what is known of each row ----------------------------------------------------------------------------------------
FACTS = np.dtype(
    [
        ("source", np.int32),  # number of the source
        ("is_validation", bool),  # from the source's own validation split
        ("key", "S16"),  # row_key
        ("prompt", np.uint64),  # prompt_key
        ("tokens", np.int64),  # of the rendered row, 0 where they are not counted
        ("trained", np.int64),  # those of them that are trained
        ("turns", np.int32),  # messages of user and assistant
        ("think", bool),  # whether a message shows reasoning
        ("refusal", np.int8),  # why the row cannot be mixed, a place in REFUSALS
        ("bytes", np.int64),  # of the row as a JSON line
    ]
)


@dataclass
class Part:
    """One split of a folder."""

    name: str  # as reports name it
    folder: Path
    data: Split
    wheres: dict[int, dict]  # {number of a source: its `where`}: a row is that of the first source that asks for it
    is_validation: bool  # the sources' own validation split


@dataclass
class PartChunk:
    """Neighbouring rows of a part: their place, as every process maps the files of the part."""

    files: tuple[str, ...]
    first: int
    wheres: dict[int, dict]  # of the part
    is_validation: bool


@dataclass
class KnownRows:
    """What is known of the rows of a chunk, and the rows as JSON lines."""

    facts: np.ndarray  # (rows,) FACTS
    lines: bytes


@dataclass
class Rows:
    """All rows of all parts, in their order."""

    parts: list[Part]
    facts: np.ndarray  # (rows,) FACTS
    sizes: np.ndarray  # (rows,) int, what weights count: 1, or the row's tokens
    reasons: np.ndarray  # (rows,) str, why a row is not in the result, "" where it may be
    lines: Path  # all rows as JSON lines, of which any is found at once

    def column(self, name: str) -> pa.Array:
        return pa.concat_arrays([chunk for part in self.parts for chunk in part.data.table.column(name).chunks])

    def location(self, number: int) -> dict:
        """Return where a row stands: name of its part, and its line there, from 1."""
        for part in self.parts:
            if number < len(part.data.table):
                break
            number -= len(part.data.table)
        return {"file": part.name, "line": number + 1}


@dataclass(frozen=True)
class RendererFlags:
    """The flags that say how tokens are counted."""

    recipe: str | None
    model_name_or_path: str | None
    chat_template_path: str | None


def open_parts(mix: Mix, pools: Path) -> tuple[list[Part], dict[str, int]]:
    """Return the splits that are read (of each source its split, and of each folder its own validation split, once),
    and {split: rows} of those that are not. Raises UsageError."""
    chosen = {((pools / source.path).resolve(), source.split) for source in mix.sources}
    parts = []
    validations = {}  # {folder: its own validation split}
    not_read = {}
    for number, source in enumerate(mix.sources):
        path = pools / source.path
        splits = open_splits(path)
        if source.split not in splits:
            raise UsageError(f"{path}: no split {source.split}, only {', '.join(splits)}: name one as `split`")
        parts.append(Part(source.name, path, splits[source.split], {number: source.where}, False))
        folder = path.resolve()
        for split, data in splits.items():
            if (folder, split) in chosen:
                continue
            if split != VALIDATION:
                not_read[f"{source.path}/{split}"] = len(data.table)
            elif folder in validations:
                validations[folder].wheres[number] = source.where
            else:
                validations[folder] = Part(f"{source.name}/{split}", path, data, {number: source.where}, True)
                parts.append(validations[folder])
    for part in parts:
        if not part.data.table.schema.equals(SCHEMA):
            raise UsageError(f"{part.folder}: other columns than a mix needs: python -m data_prep.normalize messages")
    return parts, not_read


def read_parts(mix: Mix, parts: list[Part], flags: RendererFlags | None, writer: DatasetWriter, num_proc: int) -> Rows:
    """Return what is known of all rows of the parts, and write them as lines: Arrow copies much to find few rows."""
    read_chunk = partial(read_rows, flags=flags, kwargs=mix.chat_template_kwargs)
    lines = writer.staging / "rows"
    facts = [np.zeros(0, FACTS)]
    with explain_os_errors(writer.out), open(lines, "wb") as file:
        for known in parallel_map(read_chunk, part_chunks(parts), num_proc, "read"):
            facts.append(known.facts)
            file.write(known.lines)
    for part in parts:
        writer.input_hashes[part.name] = part.data.hash()
    facts = np.concatenate(facts)
    if not mix.uses_pool_validation():
        facts["refusal"][facts["is_validation"]] = REFUSALS.index(LEFT_OUT)
    sizes = facts["tokens"] if mix.by == "tokens" else np.ones(len(facts), int)
    return Rows(parts, facts, sizes, np.array(REFUSALS, object)[facts["refusal"]], lines)


def part_chunks(parts: list[Part]) -> Iterator[PartChunk]:
    """Yield the chunks of all parts, in order."""
    for part in parts:
        for first in range(0, len(part.data.table), ROWS):
            yield PartChunk(tuple(part.data.files), first, part.wheres, part.is_validation)


@cache
def open_table(files: tuple[str, ...]) -> pa.Table:
    return pa.concat_tables([pa.ipc.open_stream(pa.memory_map(file)).read_all() for file in files])


def read_rows(chunk: PartChunk, flags: RendererFlags | None, kwargs: dict) -> KnownRows:
    """Return what is known of the rows of a chunk. kwargs: template arguments of the mix."""
    rows = []
    for batch in open_table(chunk.files).slice(chunk.first, ROWS).to_batches():
        rows += batch_to_rows(batch)
    lines = [dump_json(row) for row in rows]
    facts = np.zeros(len(rows), FACTS)
    facts["is_validation"] = chunk.is_validation
    for number, row in enumerate(rows):
        turns = compared_turns(row)
        facts["key"][number] = row_key(row, turns)
        facts["prompt"][number] = prompt_key(row, turns)
    facts["turns"] = [count_turns(row) for row in rows]
    facts["think"] = [shows_reasoning(row) for row in rows]
    for number, row in enumerate(rows):
        asking = [source for source, where in chunk.wheres.items() if matches(row, where)]
        if asking:
            facts["source"][number] = asking[0]
        else:
            facts["source"][number] = min(chunk.wheres)
            facts["refusal"][number] = REFUSALS.index("not asked for")
    if flags is not None:
        count_tokens(rows, facts, flags, kwargs)
    facts["bytes"] = [len(line) for line in lines]
    return KnownRows(facts, b"".join(lines))


def count_turns(row: Row) -> int:
    return len([turn for turn in row["messages"] if turn["role"] in ("user", "assistant")])


def shows_reasoning(row: Row) -> bool:
    return any([turn.get("reasoning_content") for turn in row["messages"]])


def matches(row: Row, where: dict) -> bool:
    """Return whether a row is what `where` asks for; a list names alternatives."""
    if not where:
        return True
    values = {"source": [row["source"]], "lang": [row["lang"]], "tags": row["tags"]}
    values["mode"] = ["think" if shows_reasoning(row) else "no_think"]
    for name, wanted in where.items():
        if not isinstance(wanted, list):
            wanted = [wanted]
        if not set(values[name]) & set(map(str, wanted)):
            return False
    return True


def count_tokens(rows: list[Row], facts: np.ndarray, flags: RendererFlags, kwargs: dict) -> None:
    """Fill in the tokens of rows, and the refusal of those that the template does not render."""
    from data_prep.common.tokens import tokenize_rows

    renderer, settings = load_renderer_of(flags)
    numbered = []
    for number, row in enumerate(rows):
        numbered.append((number, row | {"chat_template_kwargs": kwargs | row["chat_template_kwargs"]}))
    failed = []
    for document in tokenize_rows(numbered, renderer, settings, True, failed, False):
        facts["tokens"][document.number] = len(document.ids)
        facts["trained"][document.number] = document.trained()
    for number, *_ in failed:
        if not facts["refusal"][number]:
            facts["refusal"][number] = REFUSALS.index("template refuses the row")


@cache
def load_renderer_of(flags: RendererFlags) -> tuple:
    """Return the renderer and the settings of the recipe. Raises UsageError."""
    from data_prep.common.recipe_settings import read_settings
    from data_prep.common.rendering import load_renderer

    names = {"model_name_or_path": flags.model_name_or_path, "chat_template_path": flags.chat_template_path}
    settings = read_settings(flags.recipe, flags=names)
    settings.assistant_only_loss = True  # the card counts tokens of responses, whatever the recipe trains
    return load_renderer(settings), settings


# -- which rows -------------------------------------------------------------------------------------------------------
@dataclass
class Plan:
    """What becomes of the rows, and what the sources could have given."""

    train: Draw
    validation: np.ndarray  # numbers of rows
    candidates: list[Candidates]  # one a source


def make_plan(mix: Mix, rows: Rows) -> Plan:
    """Return which rows are trained and which are held out; the others get their reason. Raises UsageError."""
    chosen = choose_rows(mix, rows)
    if mix.literal:
        plan = make_literal_plan(mix, rows, chosen)
    else:
        if mix.dedup:
            chosen = drop_duplicates(chosen, rows)
        held_out = split_off_validation(mix, rows, chosen)
        candidates = divide_by_source(mix, rows, chosen[~held_out])
        if mix.strategy != "concatenate":
            for one in candidates:
                one.rows = order_by_prompt(one.rows, rows.facts["prompt"], mix.seed)
                one.sizes = rows.sizes[one.rows]
        plan = Plan(draw_rows(candidates, mix), chosen[held_out], candidates)
    not_drawn = rows.reasons == ""
    not_drawn[plan.train.rows] = False
    not_drawn[plan.validation] = False
    rows.reasons[not_drawn] = "not drawn"
    return plan


def choose_rows(mix: Mix, rows: Rows) -> np.ndarray:
    """Return the rows that `where` and `rows` leave, the sources' own validation rows first: of equal rows the first is
    kept, and that is the one which must not be trained."""
    is_usable = rows.reasons == ""
    is_validation = rows.facts["is_validation"]
    chosen = [np.flatnonzero(is_validation & is_usable)]
    for number, source in enumerate(mix.sources):
        numbers = np.flatnonzero((rows.facts["source"] == number) & ~is_validation)
        if source.shuffle is not None:
            numbers = np.random.default_rng(source.shuffle).permutation(numbers)
        numbers = numbers[is_usable[numbers]]
        if source.rows is not None:
            rows.reasons[numbers[source.rows :]] = "not asked for"
            numbers = numbers[: source.rows]
        chosen.append(numbers)
    return np.concatenate(chosen)


def drop_duplicates(chosen: np.ndarray, rows: Rows) -> np.ndarray:
    """Return the rows without those that equal an earlier one, which get their reason."""
    _, first, inverse = np.unique(rows.facts["key"][chosen], return_index=True, return_inverse=True)
    original = chosen[first[inverse]]
    is_copy = chosen != original
    same_source = rows.facts["source"][chosen] == rows.facts["source"][original]
    rows.reasons[chosen[is_copy & same_source]] = "duplicate in its pool"
    rows.reasons[chosen[is_copy & ~same_source]] = "duplicate of another pool"
    return chosen[~is_copy]


def split_off_validation(mix: Mix, rows: Rows, chosen: np.ndarray) -> np.ndarray:
    """Return a mask (chosen,) of the rows for validation. Raises UsageError where none would be left to train on."""
    facts = rows.facts[chosen]
    count = mix.validation.count(len(chosen))
    check_validation_size(count, len(chosen))
    # another seed than the draw's: the prompts that come first there are not those that went to validation
    mask = choose_validation(facts["prompt"], count, mix.seed + 1, facts["source"], facts["is_validation"])
    if len(mask) and mask.all():
        raise UsageError("validation: rows of one prompt would all be held out: write a smaller min and share")
    return mask


def check_validation_size(count: int, rows: int) -> None:
    if 0 < rows <= count:
        raise UsageError(f"validation: {count} of {rows} rows would be held out: write a smaller min and share")


def divide_by_source(mix: Mix, rows: Rows, numbers: np.ndarray) -> list[Candidates]:
    candidates = []
    for number, source in enumerate(mix.sources):
        mine = numbers[rows.facts["source"][numbers] == number]
        candidates.append(Candidates(source, mine, rows.sizes[mine]))
    return candidates


def make_literal_plan(mix: Mix, rows: Rows, chosen: np.ndarray) -> Plan:
    """Return the plan that the tutorial's script makes: mixed, equal rows removed, shuffled, split."""
    candidates = divide_by_source(mix, rows, chosen)
    mixed = drop_duplicates(draw_literally(candidates, mix), rows)
    unique = mixed[count_passes(mixed) == 0]
    unique = np.random.default_rng(mix.seed).permutation(unique)
    count = mix.validation.count(len(unique))
    check_validation_size(count, len(unique))
    train = unique[count:]
    return Plan(Draw(train, np.zeros(len(train), int)), unique[:count], candidates)


# -- rows out ---------------------------------------------------------------------------------------------------------
@dataclass
class OutputChunk:
    """Neighbouring rows of the result."""

    split: str
    starts: np.ndarray  # where the line of each row begins in the file of lines
    ends: np.ndarray
    passes: np.ndarray  # how often each row was drawn before


def output_chunks(plan: Plan, rows: Rows) -> Iterator[OutputChunk]:
    ends = np.cumsum(rows.facts["bytes"])
    starts = ends - rows.facts["bytes"]
    validation = Draw(plan.validation, np.zeros(len(plan.validation), int))
    for split, draw in (("train", plan.train), (VALIDATION, validation)):
        for first in range(0, len(draw.rows), ROWS):
            numbers = draw.rows[first : first + ROWS]
            yield OutputChunk(split, starts[numbers], ends[numbers], draw.passes[first : first + ROWS])


@cache
def open_lines(path: Path) -> io.FileIO:
    return open(path, "rb", buffering=0)  # read here and there: what a buffer holds is not asked for


def encode_output(chunk: OutputChunk, path: Path, kwargs: dict) -> ChunkResult:
    """Return the rows of a chunk for the folder and, as payload, for the .jsonl beside it; those of a second pass have
    @2 behind their ids.

    path: the file of lines; kwargs: template arguments of the mix.
    """
    file = open_lines(path)
    rows = []
    lines = []
    for start, end, number in zip(chunk.starts, chunk.ends, chunk.passes, strict=True):
        file.seek(start)
        line = file.read(end - start)
        row = json.loads(line.decode())  # bytes would be searched for their encoding first
        if number:
            row["id"] = f"{row['id']}@{number + 1}"
        if kwargs:
            row["chat_template_kwargs"] = kwargs | row["chat_template_kwargs"]
        if number or kwargs:
            line = dump_json(row)
        rows.append(row)
        lines.append(line)
    encoded = encode_rows(rows)
    return ChunkResult({chunk.split: encoded}, payload=EncodedRows(list(encoded.ids), b"", Counter(), lines=lines))


def write_plan(plan: Plan, rows: Rows, mix: Mix, writer: DatasetWriter, num_proc: int) -> None:
    """Write the rows of a plan, and list those that are in none."""
    encode = partial(encode_output, path=rows.lines, kwargs=mix.chat_template_kwargs)
    texts = {}
    with ExitStack() as stack:
        for result in parallel_map(encode, output_chunks(plan, rows), num_proc, "write"):
            writer.add(result)
            for split, encoded in result.encoded.items():
                if split not in texts:
                    texts[split] = stack.enter_context(closing(LinesFile(writer.staging / f"{split}.jsonl")))
                texts[split].write(result.payload, encoded.ids)
    ids = rows.column("id")
    for number in np.flatnonzero(rows.reasons != "").tolist():
        writer.reject(rows.location(number) | {"id": ids[number].as_py(), "reason": rows.reasons[number]})
    writer.rows_in = len(rows.facts)
    writer.rows_added = writer.rows_out.total() + writer.refused.total() - writer.rows_in


# -- what came of it --------------------------------------------------------------------------------------------------
@dataclass
class SourceReport:
    """What became of the rows of one source, as report.json and the terminal show it."""

    name: str
    weight: float
    rows_in: int
    train: int
    validation: int
    repeats: int
    share: float  # of the train split
    wanted: float | None  # what its weight asks for
    note: str
    tokens: int | None  # of the train split, where they are counted
    own_validation: int  # rows of its own validation split among those for validation
    not_drawn: int
    not_drawn_cause: str

    def to_json(self) -> dict:
        values = {}
        for name, value in vars(self).items():
            if name == "tokens" and value is None:
                continue
            values["in" if name == "rows_in" else name] = value
        return values


def report_sources(mix: Mix, rows: Rows, plan: Plan) -> list[SourceReport]:
    """Return what became of each source, with a note where its share is more than 1% off."""
    owners = rows.facts["source"]
    has_tokens = rows.facts["tokens"].any()
    total = max(1, rows.sizes[plan.train.rows].sum())
    shares = shares_of(plan.candidates)
    reports = []
    for number, candidates in enumerate(plan.candidates):
        train = plan.train.rows[owners[plan.train.rows] == number]
        validation = plan.validation[owners[plan.validation] == number]
        not_drawn = int((rows.reasons[owners == number] == "not drawn").sum())
        report = SourceReport(
            name=candidates.source.name,
            weight=candidates.source.weight,
            rows_in=int((owners == number).sum()),
            train=len(train),
            validation=len(validation),
            repeats=len(train) - len(np.unique(train)),
            share=round(float(rows.sizes[train].sum() / total), 6),
            wanted=None,
            note="",
            tokens=int(rows.facts["tokens"][train].sum()) if has_tokens else None,
            own_validation=int(rows.facts["is_validation"][validation].sum()),
            not_drawn=not_drawn,
            not_drawn_cause=candidates.cause if not_drawn else "",
        )
        if mix.strategy in ("interleave", "resample"):
            report.wanted = round(float(shares[number]), 6)
            report.note = explain_share(report, mix, len(candidates.rows), len(plan.train.rows))
        reports.append(report)
    return reports


def explain_share(report: SourceReport, mix: Mix, candidates: int, drawn: int) -> str:
    """Return why the share of a source is not the one that its weight asks for.

    candidates: rows that could have been drawn of the source; drawn: rows that were, of all sources.
    """
    if abs(report.share - report.wanted) <= max(0.01, 1 / drawn):  # rows are whole
        return ""
    if not candidates:
        return "none of its rows is left to train on"
    if mix.literal:
        return "literal: duplicates are removed after mixing, which undoes weights"
    if report.share < report.wanted:
        return "used up: raise epochs, or stop: all_exhausted"
    return "more, as others give less"


def print_reports(reports: list[SourceReport]) -> None:
    width = max([len(report.name) for report in reports])
    columns = f"  {{:{width}}}  {{:>9}}  {{:>9}}  {{:>8}}  {{:>7}}  {{:>7}}  {{}}"
    print(columns.format("source", "rows", "train", "repeats", "share", "wanted", "").rstrip())
    for report in reports:
        counts = [f"{count:,}" for count in (report.rows_in, report.train, report.repeats)]
        wanted = "" if report.wanted is None else f"{report.wanted:.2%}"
        line = columns.format(report.name, *counts, f"{report.share:.2%}", wanted, report.note)
        print(line.rstrip())
    for report in reports:
        if report.not_drawn:
            print(f"{report.not_drawn:,} rows of {report.name} not drawn: {report.not_drawn_cause}")


def make_card(name: str, mix: Mix, rows: Rows, plan: Plan) -> str:
    """Return Markdown: the train split by source of the mix and mode (SmolLM3's table), by language, and by the source
    that each row names, as Blossom's WildChat to Ruozhiba."""
    facts = rows.facts[plan.train.rows]
    has_tokens = bool(rows.facts["tokens"].any())
    heads = ["source", "mode", "rows", "% rows"]
    if has_tokens:
        heads += ["tokens", "% tokens", "tokens/row", "in context", "in response"]
    heads.append("turns")
    lines = [f"# {name}", ""]
    lines += [f"{mix.strategy} by {mix.by}, seed {mix.seed}{', literal' * mix.literal}. The train split:", ""]
    lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    groups = []
    for number, source in enumerate(mix.sources):
        for mode in ("no_think", "think"):
            group = facts[(facts["source"] == number) & (facts["think"] == (mode == "think"))]
            if len(group):
                groups.append(group)
                lines.append(card_line(source.name, mode, group, facts, has_tokens))
    lines += [card_line("all", "", facts, facts, has_tokens), ""]
    if has_tokens:
        tokens = np.mean([group["tokens"].mean() for group in groups])
        trained = np.mean([group["trained"].mean() for group in groups])
        lines.append(
            "Tokens are those of the rendered row, response those that are trained, context the others; turns are "
            "messages of user and assistant. The last line holds means over rows; the mean of the lines above it, as "
            f"the SmolLM3 playbook prints it, is {tokens:,.1f} tokens a row, {tokens - trained:,.1f} in context, "
            f"{trained:,.1f} in response."
        )
    else:
        lines.append("Tokens are not counted: `--recipe` counts them.")
    lines += count_values("language", rows.column("lang"), plan)
    lines += count_values("source of the rows", rows.column("source"), plan)
    return "\n".join(lines) + "\n"


def count_values(title: str, column: pa.Array, plan: Plan) -> list[str]:
    """Return the lines of a table of the train rows by the values of a column, the most frequent first."""
    lines = ["", f"| {title} | rows | % rows |", "|---|---|---|"]
    counts = Counter(column.take(pa.array(plan.train.rows)).to_pylist())
    total = max(1, counts.total())
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    for value, count in ordered[:MOST_VALUES]:
        lines.append(f"| {value} | {count:,} | {count / total:.1%} |")
    rest = ordered[MOST_VALUES:]
    if rest:
        count = sum([count for _, count in rest])
        lines.append(f"| {len(rest):,} others | {count:,} | {count / total:.1%} |")
    return lines


def card_line(title: str, mode: str, group: np.ndarray, facts: np.ndarray, has_tokens: bool) -> str:
    """Return one line of the card's table, of the FACTS of a group of the train rows and of all of them."""
    cells = [title, mode, f"{len(group):,}", f"{len(group) / len(facts):.1%}"]
    if has_tokens:
        tokens = group["tokens"].sum()
        trained = group["trained"].sum()
        all_tokens = max(1, facts["tokens"].sum())
        cells += [f"{tokens:,}", f"{tokens / all_tokens:.1%}", f"{tokens / len(group):,.1f}"]
        cells += [f"{(tokens - trained) / len(group):,.1f}", f"{trained / len(group):,.1f}"]
    cells.append(f"{group['turns'].mean():.1f}")
    return "| " + " | ".join(cells) + " |"


# -- the command ------------------------------------------------------------------------------------------------------
def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("mix", metavar="MIX.yaml")
    parser.add_argument("--out", type=Path, required=True, help="folder that does not exist yet")
    parser.add_argument("--pools", help="folder that the paths of the mix are under")
    parser.add_argument("--recipe", help="counts tokens as this recipe trains them")
    parser.add_argument("--model_name_or_path", help="tokenizer, instead of the recipe's")
    parser.add_argument("--chat_template_path", help="template, instead of the recipe's")
    parser.add_argument("--seed", type=int, help="instead of the mix's")
    add_num_proc(parser)
    return run_command(parser, run)


def run(args: argparse.Namespace) -> int:
    """Return the exit code. Raises UsageError."""
    if args.out.suffix == ".jsonl":
        raise UsageError(f"{args.out}: a mix has splits: pass a folder as --out")
    mix = read_mix(args.mix, args.pools, args.seed)
    flags = None
    if args.recipe or args.model_name_or_path or args.chat_template_path:
        flags = RendererFlags(args.recipe, args.model_name_or_path, args.chat_template_path)
        load_renderer_of(flags)  # a fault in it is reported before the rows are read
    elif mix.by == "tokens":
        raise UsageError(f"{args.mix}: weights by tokens: pass --recipe, whose tokenizer and template count them")
    with DatasetWriter(args.out, "mix.py", mix.seed) as writer:
        open_table.cache_clear()  # a folder may have been made again since, in this process
        open_lines.cache_clear()
        parts, not_read = open_parts(mix, Path(args.pools or "."))
        rows = read_parts(mix, parts, flags, writer, args.num_proc)
        try:
            plan = make_plan(mix, rows)
        except UsageError as error:
            raise UsageError(f"{args.mix}: {error}") from None
        if not len(plan.train.rows):
            advice = "see size, and where, rows, weight and epochs of its sources"
            print(f"{args.mix}: no rows are left to train on: {advice}", file=sys.stderr)
            return 1
        write_plan(plan, rows, mix, writer, args.num_proc)
        reports = report_sources(mix, rows, plan)
        more = {"strategy": mix.strategy, "by": mix.by, "literal": mix.literal}
        more["sources"] = [report.to_json() for report in reports]
        if not_read:
            more["splits_not_read"] = not_read
        drawn = int(rows.sizes[plan.train.rows].sum())
        if mix.size is not None:
            more["size"] = {"asked": mix.size, "drawn": drawn}
        writer.close(more, {"card.md": make_card(args.out.name, mix, rows, plan)})
    trained = len(plan.train.rows)
    print(f"{args.out}: {trained:,} rows to train, {len(plan.validation):,} to validate, of {len(rows.facts):,}")
    print_reports(reports)
    # rows are whole: a source may give half a row less than it was asked for
    if mix.size is not None and mix.size - drawn > max(0.01 * mix.size, len(mix.sources) * rows.sizes.max() / 2):
        print(f"size {mix.size:,} is not reached, the sources give {drawn:,} {mix.by} (raise epochs, or lower size)")
    print_left_out(reports, writer, not_read)
    return 0


def print_left_out(reports: list[SourceReport], writer: DatasetWriter, not_read: dict[str, int]) -> None:
    """Print what the table does not show."""
    own_validation = sum([report.own_validation for report in reports])
    if own_validation:
        print(
            f"{own_validation:,} of the rows to validate are the sources' own (pool_validation: leave leaves them out)"
        )
    if writer.refused[LEFT_OUT]:
        count = writer.refused[LEFT_OUT]
        print(f"{count:,} rows of the sources' own validation splits left out (pool_validation: use takes them)")
    for split, count in not_read.items():
        print(f"{count:,} rows of {split} are not read (name the split as `split` of a source)")
    if writer.refused:
        print(f"refused: {format_counts(writer.refused)}")


if __name__ == "__main__":
    sys.exit(main())
