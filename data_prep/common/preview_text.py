"""How preview looks, on the terminal and as a page."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jinja2 import Environment
from markupsafe import Markup, escape
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .preview_rows import OTHER_FAMILY, Bin, Finding, RowFigures, Verdict
from .terminal import STYLES
from .tokens import Document, row_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAGE = Path(__file__).with_name("preview_page.html")
SHOWN_TOKENS = 600  # of a row in the terminal; the page shows all


class Line(NamedTuple):
    title: str
    figure: str
    remark: str = ""


# -- how a row looks --------------------------------------------------------------------------------------------------
CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}
INVISIBLE = [*range(0x80, 0xA1), 0xAD, 0x200B, 0x200E, 0x200F, 0x2028, 0x2029, *range(0x202A, 0x202F)]
INVISIBLE += [*range(0x2066, 0x206A), 0xFEFF]
HIDDEN = CONTROL_PICTURES | {code: f"⟨U+{code:04X}⟩" for code in INVISIBLE}


class ShownToken(NamedTuple):
    """A token, or those that share a character (bytes of an emoji)."""

    text: str
    ids: list[int]
    trained: bool
    special: bool
    cut: bool


@dataclass
class ShownRow:
    figures: RowFigures
    tokens: list[ShownToken]

    @property
    def title(self) -> str:
        return row_name(self.figures.row, vars(self.figures))

    def describe(self) -> str:
        figures = self.figures
        share = figures.trained / (figures.tokens or 1)
        return f"{figures.tokens:,} tokens, {figures.trained:,} trained ({share:.0%})"

    def list_faults(self) -> list[str]:
        figures = self.figures
        left = figures.kept.end - figures.kept.start
        faults = []
        if figures.untrained:
            faults.append("nothing to train")
        if figures.truncated:
            faults.append(f"truncated to {left:,} tokens, {figures.tokens - left:,} lost")
        if figures.cut:
            faults.append("answer cut off, all of it" if figures.empty else "answer cut off")
        if figures.no_stop:
            faults.append("stop token untrained")
        if figures.persona:
            faults.append("persona lost")
        if figures.control:
            faults.append(f"control token {figures.control} in text")
        if figures.thought:
            faults.append("no reasoning behind an opened thought")
        if figures.newline:
            faults.append("answer begins with a newline")
        elif figures.straddle:
            faults.append("token across the edge of the trained text")
        return faults


@dataclass
class Preview:
    """All that terminal and page show."""

    head: str
    note: str
    table: list[Line]
    histogram: list[Bin]
    max_length: int | None
    verdict: Verdict
    rows: list[ShownRow]  # the first ones
    faulty: list[ShownRow]  # the first row with each fault, where it is not among those


class TokenText(NamedTuple):
    """The text of the tokens [start, end)."""

    text: str
    start: int
    end: int


def show_row(document: Document, figures: RowFigures, tokenizer: "PreTrainedTokenizerBase") -> ShownRow:
    mask = document.mask()
    special_ids = set(tokenizer.added_tokens_decoder)
    start, end = figures.kept
    tokens = []
    if document.encoding is not None:
        texts = split_text(document)
    else:
        texts = decode_tokens(document.ids, tokenizer)
    for text, first, last in texts:
        ids = document.ids[first:last]
        if not text:  # one that the tokenizer puts in of itself
            text = tokenizer.convert_ids_to_tokens(ids[0])
        is_cut = not start <= first < end
        tokens.append(ShownToken(text, ids, bool(mask[first]), ids[0] in special_ids, is_cut))
    return ShownRow(figures, tokens)


def split_text(document: Document) -> list[TokenText]:
    """Return the rendered text token by token, by where each stands in it."""
    texts = []
    position = 0
    for index, (start, end) in enumerate(document.encoding.offsets):
        if texts and end <= position and end > start:  # more bytes of the character before
            texts[-1] = texts[-1]._replace(end=index + 1)
        else:
            texts.append(TokenText(document.text[position:end], index, index + 1))
            position = max(position, end)
    return texts


def decode_tokens(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> Iterator[TokenText]:
    """Yield the text of ids token by token, without knowing the whole. An anchor ahead keeps decoders from dropping a
    first blank."""
    anchor = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    anchor_length = len(tokenizer.decode(anchor))
    start = 0
    while start < len(ids):
        for end in range(start + 1, min(start + 8, len(ids)) + 1):
            text = tokenizer.decode(anchor + ids[start:end])[anchor_length:]
            if not text.endswith("\ufffd"):  # all bytes of the character
                break
        yield TokenText(text, start, end)
        start = end


# -- the terminal -----------------------------------------------------------------------------------------------------
class Signs(NamedTuple):
    left: str
    right: str
    newline: str
    cut: str


PLAIN_SIGNS = Signs("[[", "]]", "\\n", "8<")
UNICODE_SIGNS = Signs("⟦", "⟧", "⏎", "✂")


def print_preview(console: Console, preview: Preview) -> None:
    """Print coloured rows, one table, and the findings."""
    is_unicode = "utf" in (console.encoding or "").lower()
    signs = UNICODE_SIGNS if is_unicode else PLAIN_SIGNS
    for finding in preview.verdict.findings:
        if finding.name == OTHER_FAMILY:  # whatever stands below is no run's
            print_finding(console, "FAILED", STYLES["failed"], finding)
    if preview.rows:
        console.print(make_legend(signs), soft_wrap=True)
    for row in preview.rows:
        faults = [(f"; {fault}".translate(HIDDEN), "red") for fault in row.list_faults()]
        title = Text.assemble("\n", (row.title.translate(HIDDEN), "bold"), f": {row.describe()}", *faults)
        console.print(title, soft_wrap=True)
        console.print(make_row_text(row.tokens, signs), soft_wrap=True)
    console.print(Text.assemble("\n", (preview.head, "bold")), soft_wrap=True)
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(style="dim")
    for line in preview.table:
        grid.add_row(Text(line.title), Text(line.figure), Text(line.remark))
    console.print(grid)
    if preview.note:
        console.print(Text(preview.note), soft_wrap=True)
    for warning in preview.verdict.warnings:
        print_finding(console, "note", STYLES["note"], warning)
    for finding in preview.verdict.findings:
        print_finding(console, "FAILED", STYLES["failed"], finding)
    if not preview.verdict.findings:
        console.print(Text("passed", STYLES["passed"]))


def print_finding(console: Console, kind: str, style: str, finding: Finding) -> None:
    sentence = finding.sentence.translate(HIDDEN)
    console.print(Text.assemble((f"{kind}, {finding.name}: ", style), sentence), soft_wrap=True)


def make_legend(signs: Signs) -> Text:
    return Text.assemble(
        ("legend: ", "bold"),
        (f"{signs.left}trained{signs.right}", "green underline"),
        "  ",
        ("context", "dim"),
        "  ",
        ("special token", "bold magenta"),
        "  ",
        (f"{signs.cut}cut off", "red strike"),
        f"  {signs.newline}newline",
    )


class Stretch(NamedTuple):
    """What neighbouring tokens have in common: whether they are left out, trained, cut off."""

    left_out: bool
    trained: bool
    cut: bool


def make_row_text(tokens: list[ShownToken], signs: Signs) -> Text:
    """Return a row with signs around what is trained and where it is cut; the middle of a long one is left out.

    The signs stand around tokens that are shown: what is trained on both sides of the middle has them on both.
    """
    middle = range(SHOWN_TOKENS // 2, len(tokens) - SHOWN_TOKENS // 2)
    text = Text()
    was_cut = False

    def find_stretch(item: tuple[int, ShownToken]) -> Stretch:
        index, token = item
        if index in middle:
            return Stretch(True, False, False)
        return Stretch(False, token.trained, token.cut)

    for stretch, items in groupby(enumerate(tokens), find_stretch):
        if stretch.left_out:
            text.append(f" … {len(middle):,} tokens, all in the --html page … ", "bold yellow")
            continue
        if stretch.cut and not was_cut:
            text.append(signs.cut, "bold red")
        was_cut = stretch.cut
        if stretch.trained:
            text.append(signs.left, "green")
        for _, token in items:
            shown = token.text.translate(HIDDEN).replace("\n", signs.newline + "\n")
            text.append(shown, choose_style(token))
        if stretch.trained:
            text.append(signs.right, "green")
    return text


def choose_style(token: ShownToken) -> str:
    if token.cut:
        style = "red strike"
    elif token.trained:
        style = "green underline"
    elif token.special:
        style = "magenta"
    else:
        style = "dim"
    if token.special:
        style += " bold"
    return style


# -- the page ---------------------------------------------------------------------------------------------------------
def make_page(preview: Preview) -> str:
    """Return a self-contained page that needs no network and no script."""
    environment = Environment(autoescape=True, finalize=reveal, keep_trailing_newline=True)
    environment.filters |= {"classes": token_classes, "title": token_title, "visible": make_visible}
    return environment.from_string(PAGE.read_text(encoding="utf-8")).render(vars(preview))


def reveal(value: object) -> object:
    """Return a text with pictures of the characters that cannot be seen, or that turn the direction of a line."""
    return value.translate(HIDDEN) if isinstance(value, str) else value


def token_classes(token: ShownToken) -> str:
    classes = "t" if token.trained else "c"
    if token.special:
        classes += " x"
    if token.cut:
        classes += " cut"
    return classes


def token_title(token: ShownToken) -> str:
    words = ["trained" if token.trained else "context"]
    if token.special:
        words.append("special")
    if token.cut:
        words.append("cut off")
    return "+".join([str(number) for number in token.ids]) + " · " + ", ".join(words)


def make_visible(text: str) -> Markup:
    """Return a token's text as HTML in which blanks, tabs and newlines can be seen."""
    visible = escape(text).replace(" ", Markup("<i> </i>"))
    visible = visible.replace("\t", Markup("<u>⇥</u>\t"))
    return visible.replace("\n", Markup("<u>⏎</u>\n"))
