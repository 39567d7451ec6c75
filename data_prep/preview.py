"""See what a run would train on, before you pay for it: coloured tokens, figures, and an exit code.

    python -m data_prep.preview data/chats --recipe recipes/qwen3_qlora.py --html preview.html
    python -m data_prep.preview rows.jsonl --recipe recipes/qwen3_qlora.py --max_length 1024 --rows 5

DATA is what recipes take: a .jsonl, .json or .parquet file or a save_to_disk folder, of chats or compiled rows. Model,
template, length, packing, batch and epochs are the recipe's: DEFAULTS < --config run.yaml < flags. Compiled rows are
shown as they are, with --config recipes/configs/compiled.yaml, which a run on them needs, or without. Every row is
rendered, tokenised, masked, cut and packed as TRL would; the first --rows are shown, in the HTML page also the first
row of every finding. Trained text stands in brackets, and is green and underlined where there is colour.

Exit 0: fine. 1: a run on this would go wrong: nothing trained, stop token untrained, answers cut in more than --max_cut
of the rows, persona lost, control tokens in text. 2: bad input, one sentence.
"""

import argparse
import html
import json
import os
import re
import sys
from functools import cache
from pathlib import Path

from tqdm import tqdm

from data_prep.common.command_line import make_parser, run_command
from data_prep.common.errors import InvalidRow, UsageError
from data_prep.common.packing import count_steps, pack_lengths
from data_prep.common.recipe_rows import load_rows
from data_prep.common.recipe_settings import read_settings, require_named_mask
from data_prep.common.rendering import find_control_tokens, find_lost_personas, load_renderer
from data_prep.common.rows import get_turns
from data_prep.common.tokens import count_within, iter_documents, row_name
from data_prep.common.writer import write_text

SHOWN_TOKENS = 600  # of a row in the terminal; the page shows all
TROUBLE = "untrained", "cut", "no_stop", "persona", "control", "newline", "straddle"  # of a row
PROBE = ("Wherefore", "Xylophone")  # a question and an answer that no template holds


# -- what each row says -----------------------------------------------------------------------------------------------
class Checks:
    """The checks of one row, and what they need to know about tokenizer and template."""

    def __init__(self, against, settings):
        self.against, self.tokenizer, self.settings = against, against.tokenizer, settings
        self.special = set(self.tokenizer.added_tokens_decoder)
        self.stops = stop_tokens(against, settings)
        self.is_blank = cache(lambda token: not self.tokenizer.decode([token]).strip())

    def stop_is_trained(self, doc):
        """Whether the last trained span ends with a stop token; a published mask may train the blanks after it."""
        start, end = doc.spans[-1]
        while end > start and self.is_blank(doc.ids[end - 1]):
            end -= 1
        return end > start and doc.ids[end - 1] in self.stops

    def control_token(self, doc):
        """The first control token that stands in the row's own text, else None."""
        if get_turns(doc.row):
            return next((token for _, token in find_control_tokens(doc.row, self.against)), None)
        hit = self.against.control.search(doc.text.removesuffix(self.tokenizer.eos_token or ""))  # which TRL adds
        return hit and hit[0]

    def lost_persona(self, doc):
        """The first system text that the template leaves out, else None."""
        return next((text for _, text in find_lost_personas(doc.row, self.against)), None)

    def of(self, doc):
        """What is to be said about a row: {name: value}, its figures first."""
        total, trained = len(doc.ids), doc.trained()
        start, end = kept(doc, self.settings)
        left = doc.trained(start, end)
        return {
            "row": doc.number,
            "id": doc.row.get("id"),
            "tokens": total,
            "trained": trained,
            "truncated": end - start < total,
            "cut": left < trained,
            "untrained": not trained,
            "empty": not left,
            "no_stop": bool(trained) and not self.stop_is_trained(doc),
            "persona": self.lost_persona(doc) if doc.text is not None and get_turns(doc.row) else None,
            "control": self.control_token(doc) if doc.text is not None else None,
            "newline": any(re.match(r"[^\S\n]*\n", doc.text[a:b]) for a, b in doc.chars),
            "straddle": straddles(doc),
            "kept": (start, end),
        }


def straddles(doc):
    """Whether a token lies across an edge of the trained text."""
    for start, end in doc.chars:
        first, last = doc.encoding.char_to_token(start), doc.encoding.char_to_token(end - 1)
        if first is not None and doc.encoding.token_to_chars(first)[0] < start:
            return True
        if last is not None and doc.encoding.token_to_chars(last)[1] > end:
            return True
    return False


def kept(doc, settings):
    """[start, end) of the tokens that stay; bfd_split and wrapped packing lose none."""
    total, limit = len(doc.ids), settings.max_length
    if limit is None or total <= limit or settings.packing and settings.packing_strategy != "bfd":
        return 0, total
    return (total - limit, total) if settings.truncation_mode == "keep_end" and not settings.packing else (0, limit)


def stop_tokens(against, settings):
    """Ids that end an assistant turn: the eos token, those of generation_config.json, and what the template writes
    after an answer and after a tool call."""
    tokenizer = against.tokenizer
    stops = {tokenizer.eos_token_id} - {None}
    path = Path(settings.model_name_or_path) / "generation_config.json"
    if path.is_file():
        try:
            ids = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except ValueError:
            ids = None
        stops |= {*ids} if isinstance(ids, list) else {ids} - {None}
    question, answer = PROBE
    call = {"type": "function", "function": {"name": "look", "arguments": {"it": answer}}}
    asked = {"role": "user", "content": question}
    for turn in ({"content": answer}, {"content": "", "tool_calls": [call]}):
        try:
            text, _ = against.render({}, [asked, {"role": "assistant", **turn}])
        except InvalidRow:  # a template that demands more than the probe has: the eos token must do
            continue
        tail = tokenizer(text[text.rfind(answer) + len(answer) :], add_special_tokens=False)["input_ids"]
        tail = [token for token in tail if token in tokenizer.added_tokens_decoder]
        stops |= {tail[0] if "tool_calls" not in turn else tail[-1]} if tail else set()
    return stops


# -- what all rows say ------------------------------------------------------------------------------------------------
def figures(marks, trained, order, settings, compiled):
    """The totals of all rows, and packs and steps of those in `order`. trained: {row: its trained spans}."""
    total, tokens = len(marks), sum(mark["tokens"] for mark in marks)
    lengths = sorted(mark["tokens"] for mark in marks)
    found = {
        "rows": total,
        "tokens": tokens,
        "trained": sum(mark["trained"] for mark in marks),
        **{name: sum(bool(mark[name]) for mark in marks) for name in (*TROUBLE, "truncated", "empty")},
        "lengths": {f"p{p}": lengths[max(0, -(-p * total // 100) - 1)] for p in (0, 50, 90, 95, 99, 100)},
        "histogram": histogram(lengths, settings.max_length),
    }
    limit = settings.pack_length or max(lengths)
    if compiled:
        units = [[(row, 0, marks[row]["tokens"])] for row in order]
    elif settings.packing:
        sizes = [marks[row]["tokens"] for row in order]
        packs = pack_lengths(sizes, limit, settings.packing_strategy, settings.dataset_num_proc, settings.one_stream)
        units = [[(order[row], start, end) for row, start, end in one] for one in packs]
    else:  # TRL drops rows that the cut leaves without a trained token
        whole = settings.max_length is None
        units = [[(row, *marks[row]["kept"])] for row in order if whole or not marks[row]["empty"]]
    made = len(units)
    if settings.one_stream:  # as nanochat_midtrain.py: the last pack, which may be short, never
        units = units[: whole_steps(made - 1, settings) or made]
    sizes = [sum(end - start for _, start, end in one) for one in units]
    learnt = [sum(count_within(trained[row], start, end) for row, start, end in one) for one in units]
    epoch, run = count_steps(len(units), settings)
    return found | {
        "training_rows": len(order),
        "packs": len(units) if settings.packing or compiled else None,
        "left_out": made - len(units),
        "fill": sum(sizes) / (len(units) * limit) if units and (settings.packing or compiled) else None,
        "longest": lengths[-1],
        "masked_packs": learnt.count(0),
        "units": len(units),
        "kept_tokens": sum(sizes),
        "kept_trained": sum(learnt),
        "steps_per_epoch": epoch,
        "steps": run,
        "tokens_per_step": sum(sizes) / epoch,
        "trained_per_step": sum(learnt) / epoch,
    }


def compiled_length(data: Path) -> int | None:
    """Return the tokens of a full pack by the report.json that compile.py writes, None where it is not known."""
    report = data / "report.json"
    if not report.is_file():
        return None
    try:
        return json.loads(report.read_text(encoding="utf-8")).get("max_length")
    except ValueError:
        return None


def whole_steps(count, settings):
    """How many of `count` rows or packs fill optimizer steps."""
    return count // settings.global_batch_size * settings.global_batch_size


def histogram(lengths, limit):
    """[(from, to, rows, rows longer than the limit)] in at most 24 even bins of a round width."""
    longest = max(lengths) or 1
    width = next(n * 10**e for e in range(12) for n in (1, 2, 5) if n * 10**e * 24 > longest)
    bins = [[start, start + width, 0, 0] for start in range(0, longest + 1, width)]
    for length in lengths:
        bins[length // width][2] += 1
        bins[length // width][3] += limit is not None and length > limit
    return bins


def judge(marks, found, settings, max_cut, chat):
    """(findings, warnings): lists of (name, sentence, rows); findings make the exit code 1."""
    where = {name: [mark["row"] for mark in marks if mark[name]] for name in TROUBLE}
    no_stop = where["no_stop"]
    findings, warnings = [], []

    def tell(name, sentence, numbers=(), to=findings):
        shown = ", ".join(map(str, numbers[:9])) + (", …" if numbers[9:] else "")
        to.append((name, f"{sentence} ({many(numbers[:2], 'row', '')} {shown})" if numbers else sentence, numbers[:9]))

    if found["kept_trained"] == 0:
        why = "what is trained lies behind the cut" if found["trained"] else "the mask is empty in every row"
        tell("nothing trained", f"nothing is trained: {why}")
    elif where["untrained"] and chat and settings.assistant_only_loss:
        text = f"{many(where['untrained'])} without a trained token: TRL stops at the first, leave them out"
        tell("nothing trained", text, where["untrained"])
    elif where["untrained"]:
        tell("nothing to train", f"{many(where['untrained'])} without a trained token", where["untrained"], warnings)
    if no_stop and (chat or len(no_stop) == found["rows"]):
        text = f"{many(no_stop)} whose last answer ends without a trained stop token: the model would not stop"
        tell("stop token untrained", text, no_stop)
    elif no_stop:
        tell("no stop at the end", f"{many(no_stop)} without a trained stop token at the end", no_stop, warnings)
    share = len(where["cut"]) / found["rows"]
    text = f"{many(where['cut'])} of {found['rows']:,} ({share:.1%}) with an answer cut off, "
    if share > max_cut:
        text += f"--max_cut allows {max_cut:.1%}: --max_length {found['longest']} would keep them whole"
        tell("answers cut", text, where["cut"])
    elif where["cut"]:
        tell("answers cut", f"{text}within --max_cut {max_cut:.1%}", where["cut"], warnings)
    if where["persona"]:
        lost = marks[where["persona"][0]]["persona"]
        text = f"{many(where['persona'])} whose system text the template does not render: {lost[:60]!r}"
        tell("persona lost", text, where["persona"])
    if where["control"]:
        seen = sorted({mark["control"] for mark in marks if mark["control"]})
        text = f"{many(where['control'])} with {', '.join(seen[:5])} in the text, which becomes a real control token"
        tell("control tokens in text", text, where["control"])
    if where["newline"]:
        text = f"{many(where['newline'])} with an answer that begins with a newline, which merges with the header's"
        tell("leading newline", f"{text}: strip it", where["newline"], warnings)
    if odd := [number for number in where["straddle"] if number not in {*where["newline"]}]:
        tell("edge", f"{many(odd)} with a token across the edge of the trained text", odd, warnings)
    if found["masked_packs"] and found["kept_trained"]:
        kind = "packs" if found["packs"] is not None else "rows"
        text = f"{found['masked_packs']:,} of {found['units']:,} {kind} without a trained token: they cost time and "
        tell("masked packs", f"{text}teach nothing", to=warnings)
    return findings, warnings


def many(numbers, noun="row", form="{:,} "):
    return form.format(len(numbers)) + noun + ("s" if len(numbers) != 1 else "")


def table(found, settings, compiled):
    """[(what, figure, remark)] for terminal and page."""
    rows, tokens = found["rows"], found["tokens"]
    lengths = found["lengths"]

    def of(part, whole=rows):
        return f"{part:,}" + (f" ({part / whole:.1%})" if part else "")

    over = "none is cut: compiled" if compiled else "no max_length"
    over = f"over {settings.max_length:,} tokens" if settings.max_length else over
    lost = found["empty"] - found["untrained"]
    remark = f"{found['untrained']:,} have no trained token, {lost:,} lose theirs to the cut" if found["empty"] else ""
    spread = ", ".join(f"{name} {lengths[key]:,}" for name, key in
                       (("min", "p0"), ("median", "p50"), ("p90", "p90"), ("p99", "p99"), ("max", "p100")))  # fmt: skip
    lines = [
        ("rows", f"{rows:,}", "" if found["training_rows"] == rows else f"{found['training_rows']:,} of them trained"),
        ("tokens", f"{tokens:,}", ""),
        ("tokens a row", f"{tokens / rows:,.0f}", spread),
        ("trained tokens", of(found["trained"], tokens or 1), ""),
        ("truncated rows", of(found["truncated"]), over),
        ("answers cut off", of(found["cut"]), "a trained token lies behind the cut" if found["cut"] else ""),
        ("nothing to train", of(found["empty"]), remark),
        ("newline first", of(found["newline"]), "answers that begin with a newline" if found["newline"] else ""),
    ]
    if found["packs"] is not None:
        kind = "as compiled" if compiled else settings.packing_strategy
        kind += f", {settings.pack_length:,} tokens" if settings.pack_length else ""
        kind += ", of all rows in one stream" if settings.one_stream and not compiled else ""
        lines += [
            ("packs", f"{found['packs']:,}", kind),
            ("fill rate", f"{found['fill']:.1%}" if found["fill"] is not None else "-", ""),
            ("all-masked packs", of(found["masked_packs"], found["units"] or 1), ""),
        ]
    else:
        lines.append(("packs", "none", f"no packing: {found['units']:,} rows one by one"))
    epochs = f"{settings.num_train_epochs:g} epoch" + "s" * (settings.num_train_epochs != 1)
    epochs = f"{found['steps_per_epoch']:,} an epoch, {epochs}"
    epochs = "max_steps" if settings.max_steps > 0 else epochs
    unit = "packs" if found["packs"] is not None else "rows"
    epochs += f", {found['left_out']:,} that fill no step left out" if found["left_out"] else ""
    lines += [
        ("optimizer steps", f"{found['steps']:,}", f"{epochs}, {settings.global_batch_size} {unit} a step"),
        ("tokens a step", f"{found['tokens_per_step']:,.0f}", f"{found['trained_per_step']:,.0f} of them trained"),
    ]
    return lines


# -- how a row looks --------------------------------------------------------------------------------------------------
HIDDEN = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}
HIDDEN |= {code: f"⟨U+{code:04X}⟩" for code in [*range(0x80, 0xA0), 0xA0, 0xAD, 0x200B, 0x200E, 0x200F, 0x2028, 0x2029,
                                               *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xFEFF]}  # fmt: skip


def pieces(doc, checks, settings):
    """[(text, [ids], trained, special, cut)] of a row's tokens in order; tokens that share a character (bytes of an
    emoji) are one piece."""
    start, end = kept(doc, settings)
    out, mask = [], doc.mask()
    texts = in_text(doc) if doc.encoding is not None else decoded(doc.ids, checks.tokenizer)
    for text, first, last in texts:
        ids = doc.ids[first:last]
        text = text or checks.tokenizer.convert_ids_to_tokens(ids[0])  # one that the tokenizer puts in of itself
        out.append((text, ids, bool(mask[first]), ids[0] in checks.special, not start <= first < end))
    return out


def in_text(doc):
    """(text, first token, last token) by the places of the tokens in the rendered text."""
    out, place = [], 0
    for index, (start, end) in enumerate(doc.encoding.offsets):
        if out and end <= place and end > start:  # more bytes of the character before
            out[-1][2] = index + 1
        else:
            out.append([doc.text[place:end], index, index + 1])
            place = max(place, end)
    return out


def decoded(ids, tokenizer):
    """The same from ids alone. An anchor ahead keeps decoders from dropping a first blank."""
    out, first = [], 0
    anchor = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    lead = len(tokenizer.decode(anchor))
    while first < len(ids):
        last = first + 1
        # bytes of one character
        while (text := tokenizer.decode(anchor + ids[first:last])[lead:]).endswith("\ufffd") and last < len(ids):
            if last == first + 8:  # no character at all
                break
            last += 1
        out.append((text, first, last))
        first = last
    return out


def facts(mark):
    """(the figures of a row in words, what is wrong with it)."""
    share = f"{mark['trained'] / mark['tokens']:.0%}" if mark["tokens"] else "0%"
    left = mark["kept"][1] - mark["kept"][0]
    said = {
        "untrained": "nothing to train",
        "truncated": f"truncated to {left:,} tokens, {mark['tokens'] - left:,} lost",
        "cut": "answer cut off" + (", all of it" if mark["empty"] else ""),
        "no_stop": "stop token untrained",
        "persona": "persona lost",
        "control": f"control token {mark['control']} in text",
        "newline": "answer begins with a newline",
        "straddle": "" if mark["newline"] else "token across the edge of the trained text",
    }
    wrong = [words for name, words in said.items() if mark[name] and words]
    return f"{mark['tokens']:,} tokens, {mark['trained']:,} trained ({share})", wrong


def show(console, shown, lines, findings, warnings, head, note):
    """The terminal: coloured rows, one table, the findings."""
    from rich.table import Table
    from rich.text import Text

    def say(*parts):
        console.print(Text.assemble(*parts), soft_wrap=True)

    utf8 = "utf" in (console.encoding or "").lower()
    left, right, line_end, scissors = ("⟦", "⟧", "⏎", "✂") if utf8 else ("[[", "]]", "\\n", "8<")
    # fmt: off
    if shown:
        say(("legend: ", "bold"), (f"{left}trained{right}", "green underline"), "  ", ("context", "dim"), "  ",
            ("special token", "bold magenta"), "  ", (f"{scissors}cut off", "red strike"), "  ", f"{line_end}newline")
    # fmt: on
    for mark, parts in shown:
        words, wrong = facts(mark)
        title = row_name(mark["row"], mark).translate(HIDDEN)
        say("\n", (title, "bold"), f": {words}", *[("; " + text.translate(HIDDEN), "red") for text in wrong])
        text, before, skipped = Text(), (False, False), max(0, len(parts) - SHOWN_TOKENS)
        half = SHOWN_TOKENS // 2
        for index, (piece, _, trained, special, cut) in enumerate(parts):
            if skipped and half <= index < half + skipped:
                if index == half:
                    text.append(f" … {skipped:,} tokens, all in the --html page … ", "bold yellow")
                if cut == before[1] and trained == before[0]:
                    continue
            if before[0] and (not trained or cut != before[1]):
                text.append(right, "green")
            if cut and not before[1]:
                text.append(f"{scissors}", "bold red")
            if trained and (not before[0] or cut != before[1]):
                text.append(left, "green")
            before = trained, cut
            if skipped and half <= index < half + skipped:
                continue
            style = "red strike" if cut else "green underline" if trained else "dim"
            style = style.replace("dim", "magenta") + " bold" if special else style
            text.append(piece.translate(HIDDEN).replace("\n", line_end + "\n"), style)
        if before[0]:
            text.append(right, "green")
        console.print(text, soft_wrap=True)
    say("\n", (head, "bold"))
    grid = Table.grid(padding=(0, 2))
    grid.add_column()
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(style="dim")
    for line in lines:
        grid.add_row(*map(Text, line))
    console.print(grid)
    if note:
        say(note)
    for name, sentence, _ in warnings:
        say((f"note, {name}: ", "yellow"), sentence.translate(HIDDEN))
    for name, sentence, _ in findings:
        say((f"FAILED, {name}: ", "bold red"), sentence.translate(HIDDEN))
    if not findings:
        say(("passed", "bold green"))


# -- the page ---------------------------------------------------------------------------------------------------------
STYLE = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--ink:#1a1d21;--soft:#5b6470;--line:#dfe3e8;--hair:#0000001f;
--on:#d3f2dc;--on-ink:#0c4a22;--on-line:#1a8f45;--sp:#6d28d9;--sp-bg:#ede7fd;--cut:#b3261e;--cut-bg:#fdeaea;
--warn:#8a5a00;--warn-bg:#fff4d6;--bar:#7a9cc6}
@media (prefers-color-scheme:dark){:root{--page:#111418;--card:#1a1f25;--ink:#e6e9ed;--soft:#9aa4b0;--line:#313841;
--hair:#ffffff2b;--on:#123d24;--on-ink:#b9f3cb;--on-line:#3fc66f;--sp:#cbb5ff;--sp-bg:#33265a;--cut:#ff9a92;
--cut-bg:#451e1d;--warn:#f1c761;--warn-bg:#3a2f10;--bar:#5f83b3}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1120px;margin:0 auto;padding:20px 16px 60px}
h1{font-size:1.35rem;margin:0 0 2px}h2{font-size:1.05rem;margin:28px 0 10px}
p{margin:0 0 8px}.soft{color:var(--soft);overflow-wrap:anywhere}
.say{border-left:4px solid;border-radius:4px;padding:8px 12px;margin:8px 0;overflow-wrap:anywhere}
.bad{border-color:var(--cut);background:var(--cut-bg)}.bad b{color:var(--cut)}
.note{border-color:var(--warn);background:var(--warn-bg)}.note b{color:var(--warn)}
.good{border-color:var(--on-line);background:var(--on)}.good b{color:var(--on-ink)}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(146px,46%),1fr));gap:8px;margin:14px 0}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:8px 12px}
.card dt{color:var(--soft);font-size:.8rem}.card dd{margin:0;font-size:1.15rem;font-weight:600}
.card small{color:var(--soft);font-weight:400;font-size:.78rem;display:block;line-height:1.35}
.bars{display:flex;align-items:flex-end;gap:2px;height:120px;border-bottom:1px solid var(--line)}
.bars div{flex:1;background:var(--bar);border-radius:2px 2px 0 0;min-height:1px}
.bars .long{background:var(--cut)}.axis{display:flex;justify-content:space-between;color:var(--soft);font-size:.8rem}
article{background:var(--card);border:1px solid var(--line);border-radius:8px;margin:12px 0;overflow:hidden}
article h3{font-size:.95rem;margin:0;padding:8px 12px;border-bottom:1px solid var(--line);overflow-wrap:anywhere}
article h3 span{font-weight:400;color:var(--soft)}article h3 em{font-style:normal;font-weight:600;color:var(--cut)}
.text,.key{font:13px/1.95 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
.text{padding:10px 12px;white-space:pre-wrap;overflow-wrap:anywhere;color:var(--soft)}
.key{position:sticky;top:0;background:var(--page);padding:6px 0;z-index:1;border-bottom:1px solid var(--line);
display:flex;flex-wrap:wrap;gap:2px 16px;color:var(--soft)}
b.t,b.c{font-weight:400;text-decoration:none;box-shadow:inset 1px 0 var(--hair);padding:1px 0}
.t{background:var(--on);color:var(--on-ink);border-bottom:2px solid var(--on-line)}
.x{color:var(--sp)!important;font-weight:600!important}.x:not(.t):not(.cut){background:var(--sp-bg)}
.cut{background:var(--cut-bg);color:var(--cut);text-decoration:line-through!important;border-bottom-color:var(--cut)}
.x.cut{color:var(--cut)!important}
.text b:hover{outline:1px solid var(--ink)}
i{background:radial-gradient(circle,var(--soft) .7px,transparent 1px) center/100% 100%;opacity:.9}
u{text-decoration:none;opacity:.8;font-weight:400}.key b{white-space:pre}
hr{border:0;border-top:2px dashed var(--cut);margin:6px 0 0}
"""


def token_html(piece):
    text, ids, trained, special, cut = piece
    kinds = ["t" if trained else "c"] + ["x"] * special + ["cut"] * cut
    words = ["trained" if trained else "context"] + ["special"] * special + ["cut off"] * cut
    inside = html.escape(text.translate(HIDDEN)).replace(" ", "<i> </i>").replace("\t", "<u>⇥</u>\t")
    inside = inside.replace("\n", "<u>⏎</u>\n")
    title = f"{'+'.join(map(str, ids))} · {', '.join(words)}"
    return f'<b class="{" ".join(kinds)}" title="{title}">{inside}</b>'


def row_html(mark, parts):
    words, wrong = facts(mark)
    body, cut = [], False
    for part in parts:
        if part[4] != cut:
            body.append("<hr/>")
            cut = part[4]
        body.append(token_html(part))
    said = "".join(f" · <em>{html.escape(text.translate(HIDDEN))}</em>" for text in wrong)
    title = html.escape(row_name(mark["row"], mark).translate(HIDDEN))
    return f'<article><h3>{title} <span>{words}</span>{said}</h3><div class="text">{"".join(body)}</div></article>\n'


def page(shown, also, lines, found, findings, warnings, head, note, settings):
    """One self-contained page that needs no network and no script."""

    def text(value):
        return html.escape(str(value).translate(HIDDEN))

    top = max(count for *_, count, _ in found["histogram"])
    bars = "".join(
        f'<div class="{"long" if over else "fits"}" style="height:{100 * count / top:.1f}%" '
        f'title="{start:,} to {end - 1:,} tokens: {count:,} rows"></div>'
        for start, end, count, over in found["histogram"]
    )
    said = "".join(f'<p class="say bad"><b>{text(name)}</b> {text(line)}</p>\n' for name, line, _ in findings)
    said = said or '<p class="say good"><b>passed</b> no finding</p>\n'
    said += "".join(f'<p class="say note"><b>{text(name)}</b> {text(line)}</p>\n' for name, line, _ in warnings)
    said += f'<p class="say note"><b>held out</b> {text(note)}</p>\n' if note else ""
    cards = "".join(
        f'<div class="card"><dt>{text(what)}</dt><dd>{text(value)}<small>{text(remark)}</small></dd></div>\n'
        for what, value, remark in lines
    )
    limit = f", red: longer than max_length {settings.max_length:,}" if settings.max_length else ""
    rest = f"<h2>First rows of each finding</h2>\n{''.join(also)}" if also else ""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"/><meta name="viewport" content="width=device-width,initial-scale=1"/>
<meta name="color-scheme" content="light dark"/><title>{text(head)}</title><style>{STYLE}</style></head>
<body><main>
<h1>What will be trained</h1>
<p class="soft">{text(head)}</p>
{said}<dl class="cards">
{cards}</dl>
<h2>Length of rows</h2>
<div class="bars">{bars}</div>
<div class="axis"><span>0</span><span>rows by tokens{limit}</span><span>{found["histogram"][-1][1]:,}</span></div>
<h2>First rows, counted from 0</h2>
<div class="key"><span><b class="t">trained</b></span><span><b class="c">context</b></span>
<span><b class="c x">special</b></span><span><b class="t x">special, trained</b></span>
<span><b class="c cut">cut off</b></span><span><b class="c"><u>⏎</u></b> newline</span>
<span><b class="c"><i> </i></b> space</span><span>hairline: token edge, hover: id</span></div>
{"".join(shown)}{rest}</main></body></html>
"""


# -- the command ------------------------------------------------------------------------------------------------------
def boolean(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text} is neither true nor false")
    return text.lower() == "true"


FLAGS = {  # of the recipe: name: type
    "model_name_or_path": str, "chat_template_path": str, "assistant_only_loss": boolean, "dataset_train_split": str,
    "max_length": int, "packing": boolean, "packing_strategy": str, "global_batch_size": int,
    "per_device_train_batch_size": int, "num_train_epochs": float, "max_steps": int, "eval_rows": int, "seed": int,
}  # fmt: skip


def main():
    parser = make_parser(__doc__, usage="preview.py DATA --recipe FILE [--rows N] [--html FILE] [--name value]")
    parser.add_argument("data", metavar="DATA", help=".jsonl, .json or .parquet file, or a save_to_disk folder")
    parser.add_argument("--recipe", required=True, help="a recipes/NAME.py, whose DEFAULTS hold")
    parser.add_argument("--config", help="YAML file of a recipe's names: DEFAULTS < YAML < flags")
    parser.add_argument("--rows", type=int, default=3, help="rows to show (3)")
    parser.add_argument("--html", type=Path, help="write the page here")
    parser.add_argument("--report", type=Path, help="write the figures here, all rows too, as JSON")
    parser.add_argument("--max_cut", type=float, default=0.01, help="share of rows whose answer may be cut off (0.01)")
    for name, kind in FLAGS.items():
        parser.add_argument(f"--{name}", type=kind, help="as in the recipe")
    return run_command(parser, preview)


def preview(args):
    """The exit code; raises UsageError."""
    if args.rows < 0:
        raise UsageError(f"--rows {args.rows}: must be 0 or more")
    if not 0 <= args.max_cut <= 1:
        raise UsageError(f"--max_cut {args.max_cut}: must be a share between 0 and 1")
    settings = read_settings(args.recipe, args.config, {name: getattr(args, name) for name in FLAGS})
    rows, order, note = load_rows(args.data, settings)
    if settings.whole_steps:  # as nanochat_sft.py
        order = order[: whole_steps(len(order), settings) or len(order)]
    against = load_renderer(settings)
    compiled = "input_ids" in rows.column_names
    settings.pack_length = settings.max_length
    if compiled:
        settings.pack_length = compiled_length(Path(args.data)) or settings.max_length
        settings.max_length, settings.packing = None, False
    else:
        require_named_mask(settings, args.assistant_only_loss)
    checks, marks, trained, shown, first = Checks(against, settings), [], {}, [], {}
    with tqdm(total=len(rows), unit=" rows", disable=not sys.stderr.isatty()) as bar:
        for doc in iter_documents(rows, against, settings, bar.update):
            mark = checks.of(doc)
            marks.append(mark)
            trained[doc.number] = doc.spans
            if doc.number < args.rows:
                shown.append((mark, pieces(doc, checks, settings)))
            # the first row of each kind of trouble is worth a look, wherever it stands
            for name in TROUBLE:
                if args.html and mark[name] and name not in first:
                    first[name] = mark, pieces(doc, checks, settings)
    chat = bool(get_turns(rows[0])) and not compiled
    found = figures(marks, trained, order, settings, compiled)
    findings, warnings = judge(marks, found, settings, args.max_cut, chat)
    lines = table(found, settings, compiled)
    source = Path(settings.chat_template_path or "the model's own template").name
    head = f"{args.data} · {args.recipe} · {settings.model_name_or_path} · {source}"

    if args.html:
        others = {mark["row"]: row_html(mark, parts) for mark, parts in first.values() if mark["row"] >= args.rows}
        also = [others[number] for number in sorted(others)]
        parts = [row_html(mark, parts) for mark, parts in shown]
        write_text(args.html, page(parts, also, lines, found, findings, warnings, head, note, settings))
    if args.report:
        report = {"totals": found, "findings": [*map(list, findings)], "warnings": [*map(list, warnings)], "note": note}
        report |= {"settings": vars(settings), "rows": marks}
        write_text(args.report, json.dumps(report, ensure_ascii=False) + "\n")
    from rich.console import Console

    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # text that this terminal cannot write
    try:
        show(Console(highlight=False, markup=False, emoji=False), shown, lines, findings, warnings, head, note)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
