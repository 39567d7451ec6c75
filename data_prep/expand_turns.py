"""Turn a conversation into as many rows as its template needs to train every answer under its true prompt.

    python -m data_prep.expand_turns data/chats --chat_template_path chat_templates/qwen3.jinja --out data/turns

Some templates strip the reasoning of earlier answers, or close them in another way than the model does: as they stand
in the middle of a conversation, no server would expect them, so the template trains the last ones only. Here each of
the others gets a row that ends with it, and no answer is trained twice: the rows are marked with those that are theirs
(`train_turns: last` in chat_template_kwargs, or `flagged` and each answer's `loss_mask`). What stands in a rendering as
its own request + output stays together, so a conversation that the template trains whole stays one row, as it is, and
so does one that was expanded before. The template itself decides, by what it renders.

To reproduce StepTron (step3_qwen3.jinja), leave this script out: published is one row a conversation, which trains the
answers after the last user turn whose loss_mask is 1, a call without reasoning as history shows it, without its think
block. Expanded rows train the earlier answers too, and such a call with the empty block that its prompt asks for.

PATH is a .jsonl, .json or .parquet file, or a save_to_disk folder, of which every split is expanded; OUT is a .jsonl
file, or a folder with report.json, rejected.jsonl, card.md. An expanded row is ID#k: it ends with message k of row ID.
Rows and answers that cannot be trained are listed in rejected.jsonl and counted by reason. The cost is counted in
tokens with --model_name_or_path, else in characters.

Exit 0: done. 1: no row is left, nothing written. 2: bad input, one sentence.
"""

import hashlib
import sys
from bisect import bisect_left, bisect_right
from collections import Counter, namedtuple
from functools import cache, partial
from pathlib import Path

from data_prep.common.command_line import add_num_proc, format_counts, make_parser, run_command
from data_prep.common.errors import InvalidRow, UsageError
from data_prep.common.parallel import parallel_map
from data_prep.common.readers import find_inputs, is_dataset_folder, list_splits, read_chunks
from data_prep.common.recipe_settings import read_settings
from data_prep.common.rendering import load_renderer
from data_prep.common.rows import check_shape, complete_row, refuse_unkept
from data_prep.common.writer import ChunkResult, DatasetWriter, check_output_path, encode_rows, row_location

# an answer's request + output, what of it is trained, and (text, spans) of the row that ends with it
Answer = namedtuple("Answer", "text spans rendered")


def true_answers(row, render):
    """({k: Answer}, [(k, InvalidRow)]): what each answer that the row asks to train looks like where it is the last."""
    turns, asked = row["messages"], (row.get("chat_template_kwargs") or {}).get("train_turns")
    numbers = [k for k, turn in enumerate(turns) if turn["role"] == "assistant"]
    found, refused = {}, []
    for k in numbers[-1:] if asked == "last" else numbers:
        try:
            request, _ = render(row, turns[:k], prompt=True)
            text, whole = render(row, turns[: k + 1])
            spans = [span for span in whole if span[1] > len(request)]
            if not text.startswith(request):
                raise InvalidRow("answer that the template does not render behind its request", f"message {k}")
            if spans:  # none: the row's own flags make it context
                found[k] = Answer(text[: spans[-1][1]], spans, (text, whole))
        except InvalidRow as refusal:
            refused.append((k, refusal))
    return found, refused


def covered(found, text, spans):
    """The answers that this rendering trains as request + output."""
    return {k for k, one in found.items() if text.startswith(one.text) and set(one.spans) <= set(spans)}


def expanded(row, render):
    """([(row, text, spans)], {k: Answer}, [(k, InvalidRow)]): each answer is trained in one of the rows, from the longest
    row down: what a row covers, no shorter one trains again."""
    found, refused = true_answers(row, render)
    out, left, end = [], set(found), len(row["messages"]) - 1
    while left:
        cut = {**row, "messages": row["messages"][: end + 1]}
        try:
            as_is = found[end].rendered if end in found else render(cut, cut["messages"])
        except InvalidRow:  # because of a last answer that cannot be trained
            as_is = "", []
        wanted = covered({k: found[k] for k in left}, *as_is)
        if wanted:
            out.append((cut, as_is, wanted))
        left -= wanted
        end = max(left, default=end)
    return [marked(*one, found, render, alone=len(out) == 1) for one in out[::-1]], found, refused


def marked(row, as_is, wanted, found, render, alone):
    """(row, text, spans) of a row that trains the wanted answers and nothing else, by its own rendering; as_is is that
    without marks. A row beside others says which answers are its own even where the template would train no more: so
    another template, or a second run of this script, does not take them for its own again."""
    turns, kwargs = row["messages"], row.get("chat_template_kwargs") or {}
    answers = [k for k, turn in enumerate(turns) if turn["role"] == "assistant"]
    flags = [turn | ({"loss_mask": int(k in wanted)} if k in answers else {}) for k, turn in enumerate(turns)]
    last = {**row, "chat_template_kwargs": kwargs | {"train_turns": "last"}}
    flagged = {**row, "messages": flags, "chat_template_kwargs": kwargs | {"train_turns": "flagged"}}
    variants = [last, flagged] if wanted == {answers[-1]} else [flagged]
    variants.insert(0 if alone or wanted == {*answers} else len(variants), row)
    spans = sorted(span for k in wanted for span in found[k].spans)
    for variant in variants:
        try:
            text, here = as_is if variant is row else render(variant, variant["messages"])
        except InvalidRow:
            continue  # a template that does not know the argument
        if sorted(here) == spans and text == as_is[0]:
            return variant, text, here
    raise UsageError(
        f"row {row.get('id', '')!r}: the template honours neither train_turns nor loss_mask, an answer would be "
        "trained twice or under a prompt that no server sends: use a template of chat_templates/"
    )


def cost(text, spans, tokenizer):
    """(all, trained) in tokens, one that lies across the edge of a span counted as trained; else in characters."""
    if tokenizer is None:
        return len(text), sum(end - start for start, end in spans)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    return len(offsets), sum(bisect_left(starts, end) - bisect_right(ends, start) for start, end in spans)


def expand(row, against):
    """(rows, Counter of what it cost, [(k, InvalidRow)] of its refused answers) of one row; raises InvalidRow where no answer
    is left. Counted before and after: answers, and tokens, all and trained ones (without a tokenizer, characters)."""

    def render(row, turns, prompt=False):
        text, spans = against.render(row, turns, prompt)
        return text, [span for span in spans if span[0] < span[1]]

    rows, found, refused = expanded(row, render)
    answers = sum(turn["role"] == "assistant" for turn in row["messages"])
    if not answers:
        raise InvalidRow("no assistant turn")
    if not rows:
        raise refused[0][1] if refused else InvalidRow("no answer that its flags let train")
    after = [cost(text, spans, against.tokenizer) for _, text, spans in rows]
    before, trained = after[0], len(found)
    if len(rows) > 1 or rows[0][0] != row:
        try:
            text, spans = render(row, row["messages"])
            before, trained = cost(text, spans, against.tokenizer), len(covered(found, text, spans))
        except InvalidRow:
            before, trained = (0, 0), 0  # the trainer would have stopped at it
    counts = {"total_before": before[0], "trained_before": before[1]}
    counts |= {"total_after": sum(n for n, _ in after), "trained_after": sum(n for _, n in after)}
    counts |= {"answers": answers, "answers_before": trained, "answers_after": len(found)}
    return [variant for variant, *_ in rows], Counter(counts), refused


def main():
    parser = make_parser(__doc__)
    parser.add_argument("path", type=Path, metavar="PATH", help="rows: a file or a save_to_disk folder")
    parser.add_argument("--chat_template_path", required=True, help="the template to train with")
    parser.add_argument("--out", type=Path, required=True, help="NAME.jsonl, or a folder that does not exist yet")
    parser.add_argument("--model_name_or_path", help="folder or hub id of the tokenizer, to count tokens")
    add_num_proc(parser)
    return run_command(parser, run)


def run(args):
    """The exit code; raises UsageError."""
    paths = find_inputs([args.path])
    if is_dataset_folder(args.path):
        check_output_path(args.out, list_splits(args.path))
    given = args.chat_template_path, args.model_name_or_path
    against = against_of(*given)
    against_of.cache_clear()
    if not against.marked:
        raise UsageError(f"{args.chat_template_path}: no {{% generation %}} markers: pass one of chat_templates/")
    job, first = partial(work, given=given, name=args.path.stem, out=args.out), None
    with DatasetWriter(args.out, "expand_turns.py") as writer:
        for result in parallel_map(job, read_chunks(paths, writer.input_hashes), args.num_proc):
            first = first or next(iter(result.rejected), None)
            writer.add(result)
        rows_in, rows_out = writer.rows_in, sum(writer.rows_out.values())
        counts, said = writer.counts, format_counts(writer.refused)
        if not rows_in:
            raise UsageError(f"{args.path}: no rows: pass rows of messages (python -m data_prep.normalize makes them)")
        if not rows_out:
            where = f"the first at {first['file']}:{first['line']}"
            print(f"{args.path}: no row is left ({said}), {where}", file=sys.stderr)
            return 1
        unit = "tokens" if against.tokenizer is not None else "characters"
        more = {  # an answer beyond a row's first is an added row, kept or refused
            "added": writer.rows_added,
            "rows_expanded": counts["expanded"],
            "answers": {"in": counts["answers"], "before": counts["answers_before"], "after": counts["answers_after"]},
            unit: {name: counts[name] for name in ("total_before", "total_after", "trained_before", "trained_after")},
            "template": hashlib.sha256(against.template.encode()).hexdigest(),
        }
        writer.close(more)
    print(f"{args.out}: {rows_out:,} rows of {rows_in:,}, {counts['expanded']:,} of them expanded"
          + (f"; refused: {said}" if said else ""))  # fmt: skip
    print(f"  {'':10}  {'before':>12}  {'after':>12}")
    for name, key in (("answers", "answers"), (unit, "total"), ("trained", "trained")):
        before, after = counts[f"{key}_before"], counts[f"{key}_after"]
        print(f"  {name:10}  {before:>12,}  {after:>12,}" + (f"  x{after / before:.2f}" if before else ""))
    return 0


@cache
def against_of(template_path, model, told=True):
    """Against of the template and the tokenizer; told: whether it is said that there is none. Raises UsageError."""
    settings = read_settings(flags={"chat_template_path": template_path, "model_name_or_path": model})
    return load_renderer(settings, lenient=model is None, told=told)


def work(block, given, name, out):
    """Result of a Block."""
    against, result, rows = against_of(*given, told=False), ChunkResult(), []
    for line, row in block.rows():
        result.rows_in += 1
        where = row_location(block.file, line, row)
        try:
            row = complete_row(check_shape(row), name, line)
            refuse_unkept(row, out)
            found, spent, refused = expand(row, against)
            result.counts.update(spent)
        except RecursionError:
            found, refused = [], [(None, InvalidRow("row nested too deep"))]
        except InvalidRow as refusal:
            found, refused = [], [(None, refusal)]
        same = found == [row]
        result.rows_added += len(found) + len(refused) - 1
        result.counts["expanded"] += bool(found) and not same
        for one in found:
            rows.append(one | {"id": row["id"] if same else f"{row['id']}#{len(one['messages']) - 1}"})
        for k, refusal in refused:
            row_id = where["id"] if k is None else f"{row['id']}#{k}"
            result.rejected.append(where | {"id": row_id, "reason": refusal.reason, "detail": refusal.detail})
    result.encoded = {block.split: encode_rows(rows, out.suffix == ".jsonl")}
    return result


if __name__ == "__main__":
    sys.exit(main())
