"""Turn a conversation into as many rows as its template needs to train every answer under its true prompt.

    python -m data_prep.expand_turns data/chats --chat_template_path chat_templates/qwen3.jinja --out data/turns

Some templates strip the reasoning of earlier answers, or close them in another way than the model does: as they stand
in the middle of a conversation, no server would expect them, so the template trains the last ones only. Here each of
the others gets a row that ends with it, and no answer is trained twice: the rows are marked with those that are theirs
(`train_turns: last` in chat_template_kwargs, or `flagged` and each answer's `loss_mask`). What stands in a rendering as
its own request + output stays together, so a conversation that the template trains whole stays one row, as it is, and
so does one that was expanded before. The template itself decides, by what it renders.

To reproduce StepTron (step3_qwen3.jinja), leave this command out: published is one row a conversation, which trains the
answers after the last user turn whose loss_mask is 1, a call without reasoning as history shows it, without its think
block. Expanded rows train the earlier answers too, and such a call with the empty block that its prompt asks for.

PATH is a .jsonl, .json or .parquet file, or a save_to_disk folder, of which every split is expanded; OUT is a .jsonl
file, or a folder with report.json, rejected.jsonl, card.md. An expanded row is ID#k: it ends with message k of row ID.
Rows and answers that cannot be trained are listed in rejected.jsonl and counted by reason. The cost is counted in
tokens with --model_name_or_path, else in characters.

Exit 0: done. 1: no row is left, only the refused ones are listed. 2: bad input, one sentence.
"""

import hashlib
import sys
from argparse import Namespace
from bisect import bisect_left, bisect_right
from collections import Counter
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from data_prep.common.chunks import Chunk
from data_prep.common.command_line import add_num_proc, make_parser, run_command
from data_prep.common.errors import InvalidRow, UsageError
from data_prep.common.parallel import parallel_map
from data_prep.common.readers import find_inputs, is_dataset_folder, open_splits, read_chunks
from data_prep.common.recipe_settings import read_settings
from data_prep.common.rendering import Rendered, Renderer, Span, load_renderer
from data_prep.common.rows import Message, Row
from data_prep.common.writer import ChunkResult, DatasetWriter, check_output_path, encode_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Answer:
    """An answer that its row asks to train, as it looks where it is the last."""

    text: str  # its request and output
    spans: list[Span]  # what is trained of that text
    rendered: Rendered  # the row that ends with it


class RefusedAnswer(NamedTuple):
    number: int  # its message
    error: InvalidRow


@dataclass
class Part:
    """The beginning of a row, which trains some of its answers."""

    row: Row
    rendered: Rendered
    answers: set[int]  # the messages that it is to train


class Size(NamedTuple):
    """Tokens of a rendered row; without a tokenizer, characters."""

    total: int
    trained: int


@dataclass
class Expansion:
    """The rows that train every answer of one row once, and what they cost."""

    rows: list[Row]
    refused: list[RefusedAnswer]
    counts: Counter  # answers, tokens and trained tokens, before and after


# -- one row ----------------------------------------------------------------------------------------------------------
def render(renderer: Renderer, row: Row, turns: list[Message], prompt: bool = False) -> Rendered:
    """Render messages with what else the row holds, without spans that train nothing. Raises InvalidRow."""
    text, spans = renderer.render(row, turns, prompt)
    return Rendered(text, [span for span in spans if span.start < span.end])


def find_answers(row: Row, renderer: Renderer) -> tuple[dict[int, Answer], list[RefusedAnswer]]:
    """Return the answers that the row asks to train, by their message, and those that cannot be trained."""
    turns = row["messages"]
    numbers = assistant_turns(row)
    if row["chat_template_kwargs"].get("train_turns") == "last":
        numbers = numbers[-1:]
    answers = {}
    refused = []
    for number in numbers:
        try:
            request = render(renderer, row, turns[:number], prompt=True).text
            rendered = render(renderer, row, turns[: number + 1])
            spans = [span for span in rendered.spans if span.end > len(request)]
            if not rendered.text.startswith(request):
                raise InvalidRow("answer that the template does not render behind its request", f"message {number}")
        except InvalidRow as error:
            refused.append(RefusedAnswer(number, error))
            continue
        if spans:  # none: the row's own flags make it context
            answers[number] = Answer(rendered.text[: spans[-1].end], spans, rendered)
    return answers, refused


def assistant_turns(row: Row) -> list[int]:
    return [number for number, turn in enumerate(row["messages"]) if turn["role"] == "assistant"]


def find_trained(answers: dict[int, Answer], rendered: Rendered) -> set[int]:
    """Return the answers that a rendered row trains, each whole and behind its own request."""
    trained = set()
    for number, answer in answers.items():
        if rendered.text.startswith(answer.text) and set(answer.spans) <= set(rendered.spans):
            trained.add(number)
    return trained


def split_row(row: Row, answers: dict[int, Answer], renderer: Renderer) -> list[Part]:
    """Return the parts of a row that train each answer once, the longest first: what it trains, no shorter one does."""
    parts = []
    left = dict(answers)
    end = len(row["messages"]) - 1
    while left:
        part = {**row, "messages": row["messages"][: end + 1]}
        try:
            rendered = answers[end].rendered if end in answers else render(renderer, part, part["messages"])
        except InvalidRow:  # because of a last answer that cannot be trained
            rendered = Rendered("", [])
        trained = find_trained(left, rendered)
        if trained:
            parts.append(Part(part, rendered, trained))
        left = {number: answer for number, answer in left.items() if number not in trained}
        end = max(left, default=end)
    return parts


def mark(part: Part, answers: dict[int, Answer], renderer: Renderer, alone: bool) -> tuple[Row, Rendered]:
    """Return the row that trains a part's answers and nothing else, by its own rendering, and that rendering.

    A row beside others says which answers are its own even where the template would train no more: so another template,
    or a second run of this command, does not take them for its own again. Raises UsageError where the template honours
    no such mark.
    """
    row = part.row
    numbers = assistant_turns(row)
    turns = list(row["messages"])
    for number in numbers:
        turns[number] = turns[number] | {"loss_mask": int(number in part.answers)}
    kwargs = row["chat_template_kwargs"]
    variants = [{**row, "messages": turns, "chat_template_kwargs": kwargs | {"train_turns": "flagged"}}]
    if part.answers == {numbers[-1]}:
        variants.insert(0, {**row, "chat_template_kwargs": kwargs | {"train_turns": "last"}})
    if alone or part.answers == set(numbers):
        variants.insert(0, row)
    else:
        variants.append(row)
    wanted = sorted([span for number in part.answers for span in answers[number].spans])
    for variant in variants:
        try:
            rendered = part.rendered if variant is row else render(renderer, variant, variant["messages"])
        except InvalidRow:
            continue  # a template that does not know the argument
        if sorted(rendered.spans) == wanted and rendered.text == part.rendered.text:
            return variant, rendered
    raise UsageError(
        f"row {row.get('id', '')!r}: the template honours neither train_turns nor loss_mask, an answer would be "
        "trained twice or under a prompt that no server sends: use a template of chat_templates/"
    )


def measure(rendered: Rendered, tokenizer: "PreTrainedTokenizerBase | None") -> Size:
    """Return the size in tokens, one that lies across the edge of a span counted as trained; else in characters."""
    if tokenizer is None:
        return Size(len(rendered.text), sum([end - start for start, end in rendered.spans]))
    encoded = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
    starts = [start for start, _ in encoded["offset_mapping"]]
    ends = [end for _, end in encoded["offset_mapping"]]
    trained = 0
    for start, end in rendered.spans:
        trained += bisect_left(starts, end) - bisect_right(ends, start)
    return Size(len(starts), trained)


def expand(row: Row, renderer: Renderer) -> Expansion:
    """Return the rows that train every answer of a row once. Raises InvalidRow where no answer is left."""
    numbers = assistant_turns(row)
    if not numbers:
        raise InvalidRow("no assistant turn")
    answers, refused = find_answers(row, renderer)
    if refused and not answers:
        raise refused[0].error
    if not answers:
        raise InvalidRow("no answer that its flags let train")
    parts = split_row(row, answers, renderer)
    marked = [mark(part, answers, renderer, alone=len(parts) == 1) for part in reversed(parts)]
    rows = [one for one, _ in marked]
    sizes = [measure(rendered, renderer.tokenizer) for _, rendered in marked]
    size_before = sizes[0]
    trained_before = len(answers)
    if rows != [row]:
        try:
            rendered = render(renderer, row, row["messages"])
            size_before = measure(rendered, renderer.tokenizer)
            trained_before = len(find_trained(answers, rendered))
        except InvalidRow:  # the trainer would have stopped at it
            size_before = Size(0, 0)
            trained_before = 0
    counts = Counter(
        answers=len(numbers),
        answers_before=trained_before,
        answers_after=len(answers),
        total_before=size_before.total,
        total_after=sum([size.total for size in sizes]),
        trained_before=size_before.trained,
        trained_after=sum([size.trained for size in sizes]),
    )
    return Expansion(rows, refused, counts)


# -- all rows ---------------------------------------------------------------------------------------------------------
@cache
def load_template(template_path: str, model: str | None, quiet: bool = True) -> Renderer:
    """Return the renderer of a template and, where a model is named, its tokenizer. Raises UsageError.

    quiet: whether it is left unsaid that there is no tokenizer.
    """
    settings = read_settings(flags={"chat_template_path": template_path, "model_name_or_path": model})
    renderer = load_renderer(settings, lenient=model is None, quiet=quiet)
    if not renderer.marked:
        raise UsageError(f"{template_path}: no {{% generation %}} markers: pass one of chat_templates/")
    return renderer


def process_chunk(chunk: Chunk, template_path: str, model: str | None, name: str, jsonl: bool) -> ChunkResult:
    """Return the rows of a chunk, expanded. name: what a row without an id and a source is called by."""
    renderer = load_template(template_path, model)
    result = ChunkResult()
    rows = []
    for location, row in result.usable_rows(chunk, name):
        try:
            expansion = expand(row, renderer)
        except InvalidRow as error:
            result.reject(location, error)
            continue
        result.counts += expansion.counts
        result.rows_added += len(expansion.rows) + len(expansion.refused) - 1
        if expansion.rows == [row]:
            rows.append(row)
        else:
            result.counts["expanded"] += 1
            for expanded in expansion.rows:
                rows.append(expanded | {"id": answer_id(row, len(expanded["messages"]) - 1)})
        for number, error in expansion.refused:
            result.reject(location | {"id": answer_id(row, number)}, error)
    result.encoded = {chunk.split: encode_rows(rows, jsonl)}
    return result


def answer_id(row: Row, number: int) -> str:
    return f"{row['id']}#{number}"


# -- the command ------------------------------------------------------------------------------------------------------
def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("path", type=Path, metavar="PATH", help="rows: a file or a save_to_disk folder")
    parser.add_argument("--chat_template_path", required=True, help="the template to train with")
    parser.add_argument("--out", type=Path, required=True, help="NAME.jsonl, or a folder that does not exist yet")
    parser.add_argument("--model_name_or_path", help="folder or hub id of the tokenizer, to count tokens")
    add_num_proc(parser)
    return run_command(parser, run)


def run(args: Namespace) -> int:
    """Return the exit code. Raises UsageError."""
    paths = find_inputs([args.path])
    if is_dataset_folder(args.path):
        check_output_path(args.out, open_splits(args.path))
    load_template.cache_clear()
    renderer = load_template(args.chat_template_path, args.model_name_or_path, quiet=False)
    function = partial(
        process_chunk,
        template_path=args.chat_template_path,
        model=args.model_name_or_path,
        name=args.path.stem,
        jsonl=args.out.suffix == ".jsonl",
    )
    with DatasetWriter(args.out, "expand_turns.py") as writer:
        for result in parallel_map(function, read_chunks(paths, writer.input_hashes), args.num_proc):
            writer.add(result)
        unit = "characters" if renderer.tokenizer is None else "tokens"
        code = writer.finish(args.path, make_report(writer, unit, renderer.template))
    if code == 0:
        print_summary(writer.counts, unit)
    return code


def make_report(writer: DatasetWriter, unit: str, template: str) -> dict:
    counts = writer.counts
    return {
        "added": writer.rows_added,  # an answer beyond a row's first is an added row, kept or refused
        "rows_expanded": counts["expanded"],
        "answers": {"in": counts["answers"], "before": counts["answers_before"], "after": counts["answers_after"]},
        unit: {name: counts[name] for name in ("total_before", "total_after", "trained_before", "trained_after")},
        "template": hashlib.sha256(template.encode()).hexdigest(),
    }


def print_summary(counts: Counter, unit: str) -> None:
    print(f"  {counts['expanded']:,} rows were expanded")
    print(f"  {'':10}  {'before':>12}  {'after':>12}")
    for title, name in (("answers", "answers"), (unit, "total"), ("trained", "trained")):
        before = counts[f"{name}_before"]
        after = counts[f"{name}_after"]
        line = f"  {title:10}  {before:>12,}  {after:>12,}"
        if before:
            line += f"  x{after / before:.2f}"
        print(line)


if __name__ == "__main__":
    sys.exit(main())
