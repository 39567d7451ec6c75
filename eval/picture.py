"""Draw a run in one picture: the tokens of a row, those that are trained coloured, beside the curve of its losses.

    python -m eval.picture runs/demo/qlora --data runs/demo/rows/chat --row 2 --out docs/picture.png

The row is rendered, tokenized and masked as the run did it, by its config.yaml and the recipe's source in its folder.
--row: its number in the train split, from 0. What does not fit into the picture is left out, and an ellipsis says so.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.common.errors import UsageError
from data_prep.common.preview_rows import RowChecks
from data_prep.common.preview_text import ShownToken, show_row
from data_prep.common.recipe_rows import load_rows
from data_prep.common.recipe_settings import Settings, read_settings
from data_prep.common.rendering import load_renderer
from data_prep.common.run_folder import FEW_POINTS, read_log
from data_prep.common.tokens import iter_documents
from eval.common.scores import command, parser_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 58  # characters a line
LINES = 19
TRAINED = "#bfe3c6"
SPECIAL = "#7a7f87"  # of control tokens
TEXT = "#1f2328"
CURVES = (("loss", "training loss", "#1f77b4"), ("eval_loss", "validation loss", "#d1495b"))
SIZE = (10, 4)  # inches, at 110 dots each


@dataclass
class Piece:
    """A token, or a part of one, on a line of the picture."""

    line: int
    column: int
    text: str
    is_trained: bool
    is_special: bool


def read_run_settings(run: Path) -> Settings:
    """Return what decides the tokens of a run's rows. Raises UsageError."""
    recipes = sorted(run.glob("*.py"))
    if not recipes or not (run / "config.yaml").is_file():
        raise UsageError(f"{run} is no run folder: it has no recipe and config.yaml of recipes/hooks")
    settings = read_settings(str(recipes[0]), str(run / "config.yaml"), {})
    return replace(settings, eval_rows=0, max_length=None, packing=False)


def read_tokens(data: str, number: int, settings: Settings) -> list[ShownToken]:
    """Return the tokens of a row of the train split. Raises UsageError."""
    rows = load_rows(data, settings).rows
    if not 0 <= number < len(rows):
        raise UsageError(f"--row {number}: {data} has {len(rows):,} rows, from 0")
    renderer = load_renderer(settings)
    [document] = iter_documents(rows.select([number]), renderer, settings)
    return show_row(document, RowChecks(renderer, settings).measure(document), renderer.tokenizer).tokens


def lay_out(tokens: list[ShownToken]) -> Iterator[Piece]:
    """Yield the tokens in lines of COLUMNS characters; the last line is an ellipsis where more would follow."""
    line = 0
    column = 0
    for token in tokens:
        text = token.text
        while text:
            if line == LINES - 1:
                yield Piece(line, 0, "…", False, True)
                return
            head, newline, tail = text[: COLUMNS - column].partition("\n")
            if head or newline:
                shown = f"{head}⏎" if newline else head
                yield Piece(line, column, shown, token.trained, token.special)
            text = tail + text[COLUMNS - column :]
            column += len(head)
            if newline or column >= COLUMNS:
                line += 1
                column = 0


def draw_tokens(axis: "Axes", tokens: list[ShownToken]) -> None:
    """Draw tokens as text, the trained ones on a ground of their own."""
    from matplotlib.patches import Rectangle

    axis.set_xlim(0, COLUMNS + 1)
    axis.set_ylim(LINES, -1)
    axis.axis("off")
    for piece in lay_out(tokens):
        if piece.is_trained:
            width = len(piece.text)
            axis.add_patch(Rectangle((piece.column, piece.line - 0.5), width, 1, facecolor=TRAINED, linewidth=0))
        colour = SPECIAL if piece.is_special else TEXT
        for number, character in enumerate(piece.text):  # one by one: a font's widths would add up to another place
            axis.text(
                piece.column + number + 0.5,
                piece.line,
                character,
                family="DejaVu Sans Mono",
                fontsize=9,
                color=colour,
                ha="center",
                va="center",
                parse_math=False,
            )
    trained = len([token for token in tokens if token.trained])
    axis.set_title(f"one row: {trained} of {len(tokens)} tokens are trained (green)", loc="left", fontsize=10)


def draw_curves(axis: "Axes", series: dict[str, dict[int, float]]) -> None:
    """Draw the losses of a run over its steps."""
    for name, label, colour in CURVES:
        values = series.get(name, {})
        if values:
            marker = "o" if len(values) < FEW_POINTS else None
            axis.plot(list(values), list(values.values()), label=label, color=colour, linewidth=1.5, marker=marker)
    axis.set_xlabel("optimizer step", fontsize=9)
    axis.set_ylabel("loss a trained token, nats", fontsize=9)
    axis.set_yscale("log")
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    axis.legend(frameon=False, fontsize=9)
    axis.set_title("its run", loc="left", fontsize=10)


def draw(args: argparse.Namespace) -> int:
    from matplotlib.figure import Figure

    series = read_log(args.run)
    if not series:
        raise UsageError(f"{args.run} has no log.jsonl: pass a run folder")
    settings = read_run_settings(args.run)
    tokens = read_tokens(args.data, args.row, settings)
    figure = Figure(figsize=SIZE, dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[5, 4])
    draw_tokens(left, tokens)
    draw_curves(right, series)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, metadata={"Software": None})
    print(f"wrote {args.out}")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--data", required=True, help="rows, as the run's --dataset_name")
    parser.add_argument("--row", type=int, default=0, help="number of the row, from 0 (0)")
    parser.add_argument("--out", type=Path, required=True, help="PNG file")
    return command("picture.py", draw, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
