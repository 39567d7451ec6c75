"""report.html of compare.py: one page that needs no network and no script, with curves, table and changed answers."""

import html
import math
import re

from rapidfuzz.distance import Levenshtein

CHANGED = 24  # answers side by side
COLOURS = "#2f6fb3", "#c2571a", "#2e8b57", "#8a4fbf", "#b8352f", "#6b7280"
HIDDEN = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}
# marks that turn the direction of text, and blanks that do not show
HIDDEN |= {code: f"⟨U+{code:04X}⟩" for code in (0xAD, 0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F), 0x2060, 0xFEFF)}
STYLE = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--ink:#1a1d21;--soft:#5b6470;--line:#dfe3e8;--good:#0f7a3a;
--bad:#b3261e;--good-bg:#d9f3e2;--bad-bg:#fde7e5;--chip:#6d28d9;--chip-bg:#ede7fd;--head:#eef1f5}
@media (prefers-color-scheme:dark){:root{--page:#111418;--card:#1a1f25;--ink:#e6e9ed;--soft:#9aa4b0;--line:#313841;
--good:#6fdc96;--bad:#ff9a92;--good-bg:#143a23;--bad-bg:#451e1d;--chip:#cbb5ff;--chip-bg:#33265a;--head:#222830}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1180px;margin:0 auto;padding:20px 16px 60px}
h1{font-size:1.35rem;margin:0 0 4px;overflow-wrap:anywhere}h2{font-size:1.05rem;margin:30px 0 10px}
p{margin:0 0 4px}.soft{color:var(--soft);overflow-wrap:anywhere;font-size:.9rem}
.say{border-left:4px solid var(--bad);background:var(--bad-bg);border-radius:4px;padding:6px 12px;margin:8px 0;
overflow-wrap:anywhere}
.box{background:var(--card);border:1px solid var(--line);border-radius:8px;overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:4px 10px;text-align:right;vertical-align:top;border-top:1px solid var(--line)}
thead th{border-top:0;color:var(--soft);font-weight:600;vertical-align:bottom}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:var(--card)}
tr.group th{background:var(--head);font-weight:600}
td small{display:block;color:var(--soft);font-size:.78rem;line-height:1.2}
td{white-space:nowrap}td:first-child{white-space:normal}td.n{color:var(--soft)}.better{color:var(--good);font-weight:600}.worse{color:var(--bad);font-weight:600}
summary{cursor:pointer;padding:10px 0 8px}
.curves{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(420px,100%),1fr));gap:12px}
figure{margin:0;padding:10px 12px;overflow:visible}figcaption{font-size:.88rem;color:var(--soft)}
svg{display:block;width:100%;height:auto;overflow:visible}svg text{fill:var(--soft);font-size:11px}
@media (max-width:600px){svg text{font-size:15px}th,td{padding:4px 7px}}
svg .grid{stroke:var(--line)}svg path{fill:none;stroke-width:1.6}.key{display:flex;flex-wrap:wrap;gap:2px 14px}
.key i{display:inline-block;width:18px;height:0;border-top:3px solid;vertical-align:middle;margin-right:5px}
.key i.dashed{border-top-style:dotted}
article{margin:12px 0}article h3{font-size:.92rem;margin:0;padding:7px 12px;border-bottom:1px solid var(--line);
overflow-wrap:anywhere}article h3 span{font-weight:400;color:var(--soft)}
.text{font:13px/1.6 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;white-space:pre-wrap;
overflow-wrap:anywhere;unicode-bidi:plaintext;max-height:22em;overflow-y:auto}
.prompt{padding:8px 12px;color:var(--soft);border-bottom:1px solid var(--line)}
.sides{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(250px,100%),1fr));gap:1px;background:var(--line)}
.sides>div{background:var(--card);padding:8px 12px;min-width:0}
.sides h4{font-size:.8rem;margin:0 0 4px;color:var(--soft);font-weight:600}
.flag{font-weight:600;border-radius:4px;padding:0 5px;margin-left:5px;white-space:nowrap;display:inline-block}
.yes{background:var(--good-bg);color:var(--good)}.no{background:var(--bad-bg);color:var(--bad)}
b.chip{font-weight:600;color:var(--chip);background:var(--chip-bg);border-radius:4px;padding:0 4px;font-size:.92em}
"""


def changed(lines, names):
    """The lines of answers.jsonl whose answers changed most against the first model's, at most CHANGED.

    First by flips (of exact and of usable, the most of any model), where something was lost before where it was gained;
    then by the largest edit distance (Levenshtein), divided by the length of the longer answer. Equal answers are none.
    """
    base, *others = names
    found = []
    for number, line in enumerate(lines):
        flips, lost, distance = 0, False, 0.0
        for other in others:
            differ = [flag for flag in ("exact", "usable") if line[other][flag] != line[base][flag]]
            flips, lost = max(flips, len(differ)), lost or any(line[base][flag] for flag in differ)
            far = Levenshtein.normalized_distance(line[base]["answer"], line[other]["answer"])
            distance = max(distance, far)
        if flips or distance:
            found.append((-flips, not lost, -distance, number))
    return [lines[number] for *_, number in sorted(found)[:CHANGED]]


def text(value):
    return html.escape(str(value).translate(HIDDEN))


def tokens(value, chips):
    """Text with special tokens as chips."""
    if not chips:
        return text(value)
    parts = re.split("(" + "|".join(map(re.escape, sorted(chips, key=len, reverse=True))) + ")", value)
    return "".join(f'<b class="chip">{text(part)}</b>' if i % 2 else text(part) for i, part in enumerate(parts))


def side(name, found, chips):
    """An answer with what is right and wrong about it."""
    wrong = [
        word for flag, word in (("empty", "empty"), ("loops", "loops"), ("control", "control token")) if found[flag]
    ]
    wrong += [] if found["stopped"] or found["failed"] else ["did not stop"]
    wrong = [f"failed: {found['failed']}"] if found["failed"] else wrong
    wrong = wrong or ([] if found["usable"] else ["nothing behind its reasoning"])
    marks = [("yes", "exact")] if found["exact"] else []
    marks += [("no", word) for word in wrong]
    said = "".join(f'<span class="flag {kind}">{text(word)}</span>' for kind, word in marks)
    count = f"{found['answer_tokens']:,} tokens"
    return f'<div><h4>{text(name)} · {count}{said}</h4><div class="text">{tokens(found["answer"], chips)}</div></div>'


def article(line, names, chips):
    about = " · ".join(dict.fromkeys(part for part in (line["source"], line["mode"], *line["tags"]) if part))
    sides = f'<div><h4>reference</h4><div class="text">{tokens(line["reference"], chips)}</div></div>'
    sides += "".join(side(name, line[name], chips) for name in names)
    return (
        f'<article class="box"><h3>{text(line["id"])} <span>{text(about)}</span></h3>\n'
        f'<div class="text prompt">{tokens(line["prompt_tail"], chips)}</div>\n'
        f'<div class="sides">{sides}</div></article>\n'
    )


def table(header, groups):
    """The cells of every group; an interval stands below its value."""

    def cell(number, value, verdicts):
        if number == len(header) - 2:
            return f'<td class="n">{text(value)}</td>'
        value, _, interval = value.partition(" (") if number else (value, "", "")
        below = f"<small>{text(interval.rstrip(')'))}</small>" if interval else ""
        # metric, base, then for each model its value and its change
        verdict = verdicts[(number - 3) // 2] if number > 2 and number % 2 else ""
        return f"<td{f' class={verdict}' * bool(verdict)}>{text(value)}{below}</td>"

    head = "".join(f"<th>{text(name)}</th>" for name in header[1:])
    body = "".join(
        f'<tbody><tr class="group"><th colspan="{len(header) - 1}">{text(group)}</th></tr>\n'
        + "".join(
            f"<tr>{''.join(cell(number, value, verdicts) for number, value in enumerate(cells))}</tr>\n"
            for cells, verdicts in found
        )
        + "</tbody>"
        for group, found in groups
    )
    return f'<div class="box"><table><thead><tr>{head}</tr></thead>{body}</table></div>'


def ticks(low, high):
    """About four round numbers between two."""
    step = 10 ** math.floor(math.log10(high - low))
    step = next(step * part for part in (0.1, 0.2, 0.25, 0.5, 1, 2) if (high - low) / (step * part) <= 5)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def curve(title, lines):
    """A figure of {label: ({step: value}, dashed, colour)}."""
    points = [point for values, *_ in lines.values() for point in values.items()]
    left, right = min(step for step, _ in points), max(step for step, _ in points)
    low, high = min(value for _, value in points), max(value for _, value in points)
    low = 0 if 0 < low < high / 2 else low  # the axis starts at 0 where that costs little
    low, high = (low, high) if high > low else (low - 1, high + 1)
    right = right if right > left else left + 1

    def place(step, value):
        return f"{44 + 430 * (step - left) / (right - left):.1f},{192 - 180 * (value - low) / (high - low):.1f}"

    parts = []
    for value in ticks(low, high):
        y = place(left, value).split(",")[1]
        parts.append(f'<line class="grid" x1="44" x2="474" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="38" y="{y}" dy="4" text-anchor="end">{value:g}</text>')
    for step in ticks(left, right):
        x = place(step, low).split(",")[0]
        parts.append(f'<text x="{x}" y="208" text-anchor="middle">{step:g}</text>' if step % 1 == 0 else "")
    keys = []
    for label, (values, dashed, colour) in lines.items():
        drawn = " ".join(place(*point) for point in values.items())
        dash = ' stroke-dasharray="2 3"' * dashed
        parts.append(f'<path d="M{drawn}" stroke="{colour}"{dash}/>')
        if len(values) < 30:  # a line through few points hides where they are
            dots = (place(*point).split(",") for point in values.items())
            parts += [f'<circle cx="{x}" cy="{y}" r="2.4" fill="{colour}"/>' for x, y in dots]
        kind = ' class="dashed"' * dashed
        keys.append(f'<span><i{kind} style="border-color:{colour}"></i>{text(label)}</span>')
    return (
        f'<figure class="box"><figcaption>{text(title)}</figcaption><svg viewBox="0 0 480 214" role="img" '
        f'aria-label="{text(title)}">{"".join(parts)}</svg>\n'
        f'<figcaption class="key">{"".join(keys)}</figcaption></figure>\n'
    )


def curves(series):
    """The losses and the learning rates of every run that has a log."""
    figures = []
    for title, kinds in (
        ("loss (nats per token) by optimizer step", (("loss", "training", False), ("eval_loss", "validation", True))),
        ("learning rate by optimizer step", (("learning_rate", "", False),)),
    ):
        lines = {}
        for number, (name, found) in enumerate(series.items()):
            for key, label, dashed in kinds:
                values = {step: value for step, value in found.get(key, {}).items() if math.isfinite(value)}
                if values:
                    lines[f"{name} {label}".strip()] = values, dashed, COLOURS[number % len(COLOURS)]
        figures += [curve(title, lines)] if lines else []
    return f'<h2>Training</h2>\n<div class="curves">{"".join(figures)}</div>\n' if figures else ""


def page(title, notes, findings, header, groups, lines, names, series, chips):
    """The page. notes, findings: sentences; header, groups: of the table; lines: of answers.jsonl; series: {model: what
    compare.read_log found}; chips: the tokenizer's special and added tokens."""
    said = "".join(f'<p class="soft">{text(note)}</p>\n' for note in notes)
    said += "".join(f'<p class="say">{text(line)}</p>\n' for line in findings)
    kinds = [*dict.fromkeys(group.partition(":")[0] for group, _ in groups[1:])]
    most = changed(lines, names)
    different = sum(any(line[name]["answer"] != line[names[0]]["answer"] for name in names[1:]) for line in lines)
    articles = "".join(article(line, names, chips) for line in most)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"/><meta name="viewport" content="width=device-width,initial-scale=1"/>
<meta name="color-scheme" content="light dark"/><title>{text(title)}</title><style>{STYLE}</style></head>
<body><main>
<h1>{text(title)}</h1>
{said}{curves(series)}<h2>Before and after</h2>
{table(header, groups[:1])}
{f"<details><summary>by {', '.join(kinds)}</summary>{table(header, groups[1:])}</details>" if kinds else ""}
<h2>Answers that changed most</h2>
<p class="soft">{len(most)} of {different:,} that differ from the base's, out of {len(lines):,}: first where
exact or usable flipped, lost before gained, then by edit distance over length.</p>
{articles}</main></body></html>
"""
