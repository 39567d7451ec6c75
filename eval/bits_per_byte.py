"""Bits per byte of texts, nanochat's figure for its base and mid stages: comparable between tokenizers.

    python -m eval.bits_per_byte runs/nanochat_base --data validation.jsonl
    python -m eval.bits_per_byte runs/nanochat_midtrain --data data/nanochat_mid --split validation

Negative log-likelihood of all tokens in bits, over the bytes of the texts in UTF-8, as nanochat's loss_eval.py has it
(November 2025). Rows have a `text`, which is taken as it stands, or `messages`, which the run's chat template renders.
Special tokens are context: neither their bits nor their bytes count. A text that does not begin with one has the
tokenizer's beginning-of-text token before it, or its end-of-text token where it has no other, so that every byte is
predicted. What is longer than --max_length tokens (default: the model's positions) goes on in a window that begins with
the last token of the one before, without more context.

Writes bits_per_byte.json and .jsonl (a line a text) to the folder eval/ of the run. Interval: bootstrap (BCa) over
texts, which six of them are needed for. `chat_eval --stages` shows it in its table.
"""

import argparse
import hashlib
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_prep.common.errors import UsageError
from data_prep.common.rows import get_tools
from eval.common.arguments import add_dtype_arguments, first_line, positive
from eval.common.intervals import bootstrap_ratio
from eval.common.measure import read_rows
from eval.common.models import OpenedModel, fill_of, open_model, render_text, token_losses
from eval.common.problems import row_name
from eval.common.scores import Figure, Groups, command, parser_of, show, write_scores

SURROGATE = re.compile("[\ud800-\udfff]")  # UTF-8 has no bytes for it


@dataclass
class TextLoss:
    """What a model makes of a text. nats: summed loss of its tokens; bytes: of the text in UTF-8. Special tokens aside.

    source: of the row, "" where it names none.
    """

    id: str
    source: str
    nats: float
    bytes: int
    tokens: int = 0


def read_texts(rows: Sequence[dict], path: Path, opened: OpenedModel) -> list[str]:
    """Return the text of each row. Raises UsageError. path: what the message names."""
    texts = []
    for number, row in enumerate(rows, 1):
        text = row.get("text") if isinstance(row, dict) else None
        if isinstance(row, dict) and row.get("messages"):
            if not opened.tokenizer.chat_template:
                raise UsageError(
                    f"{path} has rows of messages, but the run has no chat template: pass rows with a text"
                )
            try:
                kwargs = row.get("chat_template_kwargs") or {}
                text = render_text(opened.tokenizer, row["messages"], False, get_tools(row), **kwargs)
            except Exception as error:  # a template is a program: it may fail in any way
                raise UsageError(
                    f"row {number} of {path} is refused by the template ({first_line(error)}): repair or remove it"
                ) from None
        if not isinstance(text, str) or not text:
            raise UsageError(f"row {number} of {path} has neither text nor messages: repair or remove it")
        if not text.isascii() and SURROGATE.search(text):
            raise UsageError(
                f"row {number} of {path} holds half a surrogate pair, which is no text: repair or remove it"
            )
        texts.append(text)
    if not texts:
        raise UsageError(f"{path} holds no rows: pass texts that the model was not trained on")
    return texts


@dataclass
class EncodedText:
    """The tokens of a text in windows, and its bytes in UTF-8 without those of special tokens."""

    windows: list[list[int]]
    bytes: int


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase, special: dict[int, str], size: int) -> EncodedText:
    """Return a text in windows of at most size tokens. special: the texts of special tokens, by id. Raises UsageError.

    Each window begins with the last token of the one before: all but the first token are predicted, once each.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    counted = len(text.encode()) - sum(len(special[token].encode()) for token in ids if token in special)
    if ids and ids[0] not in special:
        start = tokenizer.bos_token_id
        if start is None:
            start = tokenizer.eos_token_id
        if start is None:
            raise UsageError("the tokenizer has no token to begin a text with: set its bos_token or eos_token")
        ids = [start, *ids]
    windows = []
    for begin in range(0, len(ids) - 1, size - 1):
        windows.append(ids[begin : begin + size])
    return EncodedText(windows, counted)


def measure_texts(
    opened: OpenedModel, rows: Sequence[dict], texts: Sequence[str], max_length: int, batch_size: int
) -> list[TextLoss]:
    """Return the loss of each text. Raises UsageError.

    rows: what the texts are of, for their names. max_length: tokens of a window; batch_size: windows at a time.
    """
    tokens = opened.tokenizer.added_tokens_decoder.items()
    special = {number: token.content for number, token in tokens if token.special}
    encoded = [encode_text(text, opened.tokenizer, special, max_length) for text in texts]
    windows = []
    for text in encoded:
        windows.extend(text.windows)
    fill = fill_of(opened.tokenizer, opened.stops | {0})
    losses = iter(token_losses(opened.model, windows, batch_size, fill, "bits per byte"))
    measured = []
    for number, (row, text) in enumerate(zip(rows, encoded, strict=True), 1):
        found = TextLoss(id=row_name(row, number), source=str(row.get("source") or ""), nats=0.0, bytes=text.bytes)
        for window in text.windows:
            for token, loss in zip(window[1:], next(losses), strict=True):
                if token not in special:
                    found.nats += float(loss)
                    found.tokens += 1
        if not math.isfinite(found.nats):
            raise UsageError(f"the loss on {found.id} is not a number: repair the model's weights or dtype")
        measured.append(found)
    return measured


def bits_per_byte(losses: Sequence[TextLoss], seed: int) -> Figure:
    """Return {value, low, high, nats, bytes, total} of texts; without an interval where there are too few.

    total: how many texts.
    """
    nats = [loss.nats for loss in losses]
    sizes = [loss.bytes for loss in losses]
    figure: Figure = {"value": sum(nats) / sum(sizes) / math.log(2)}
    interval = bootstrap_ratio(nats, sizes, seed)
    if interval is not None:
        figure["low"] = interval.low / math.log(2)
        figure["high"] = interval.high / math.log(2)
    return figure | {"nats": sum(nats), "bytes": sum(sizes), "total": len(losses)}


def by_source(losses: Sequence[TextLoss], seed: int) -> Groups:
    """Return the figure of each source, where the rows name several."""
    sources: dict[str, list[TextLoss]] = {}
    for loss in losses:
        if loss.source:
            sources.setdefault(loss.source, []).append(loss)
    if len(sources) < 2:
        return {}
    figures = {}
    for source in sorted(sources):
        figures[source] = {"bits_per_byte": bits_per_byte(sources[source], seed)}
    return {"source": figures}


def choose_length(asked: int | None, model: PreTrainedModel) -> int:
    """Return the tokens of a window: as many as asked for, else the model's positions. Raises UsageError."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    length = asked or positions
    if not length or length < 2:
        raise UsageError("a window needs at least 2 tokens, and the model says no number of its own: pass --max_length")
    if positions and length > positions:
        raise UsageError(f"--max_length {length:,} is beyond the model's {positions:,} positions: pass fewer")
    return length


def evaluate(args: argparse.Namespace) -> None:
    """Run the command. Raises UsageError."""
    rows = read_rows(args.data, args.split)
    if args.rows:
        rows = rows[: args.rows]
    opened = open_model(args.run, args.base, args.dtype, args.load_in_4bit, chat=False)
    texts = read_texts(rows, args.data, opened)
    max_length = choose_length(args.max_length, opened.model)
    losses = measure_texts(opened, rows, texts, max_length, args.batch_size)
    if not sum(loss.bytes for loss in losses):
        raise UsageError(f"{args.data} holds special tokens alone: pass texts")
    settings = {
        "run": Path(args.run).name,
        "data": args.data.name,
        "split": args.split,
        "rows": args.rows,
        "seed": args.seed,
        "max_length": max_length,
        "dtype": str(opened.model.dtype).removeprefix("torch."),
        "load_in_4bit": args.load_in_4bit,
        "device": opened.model.device.type,
        "batch_size": args.batch_size,
    }
    sha256 = hashlib.sha256(json.dumps(texts, ensure_ascii=False).encode()).hexdigest()
    lines = [asdict(loss) for loss in losses]
    metrics = {"bits_per_byte": bits_per_byte(losses, args.seed)}
    out = args.out or Path(args.run, "eval")
    show(write_scores(out, "bits_per_byte", settings, metrics, by_source(losses, args.seed), lines, sha256))


def main(argv: list[str] | None = None) -> int:
    """Return the exit code of the command."""
    parser = parser_of(__doc__)
    parser.add_argument("run", help="a run folder: a model, or an adapter; a base model needs no chat template")
    parser.add_argument("--data", type=Path, required=True, help=".jsonl, .json, .parquet or a save_to_disk folder")
    parser.add_argument("--split", default="validation", help="of save_to_disk folders")
    parser.add_argument("--base", help="of an adapter; default: the one that it names")
    parser.add_argument("--rows", type=positive, help="the first rows, to try it out")
    parser.add_argument("--max_length", type=positive, help="tokens of a window; default: the model's positions")
    parser.add_argument("--seed", type=int, default=42, help="of the interval")
    parser.add_argument("--out", type=Path, help="default: the folder eval/ of the run")
    add_dtype_arguments(parser)
    parser.add_argument("--batch_size", type=positive, default=16, help="windows at a time")
    return command("bits_per_byte.py", evaluate, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
