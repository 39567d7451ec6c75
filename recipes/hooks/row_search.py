"""Which rows of the training set stand in a batch: packing drops every column but the model's, ids of rows too."""

import copy

import numpy as np
from transformers import Trainer


def split_documents(batch: dict) -> list[bytes]:
    """Return the token ids of every document of a batch, as bytes of int64."""
    ids = batch["input_ids"].cpu().numpy()
    if "position_ids" in batch:  # packed: a document starts at position 0
        starts = np.flatnonzero(batch["position_ids"][0].cpu().numpy() == 0)
        documents = np.split(ids[0], starts[1:])
    else:
        masks = batch["attention_mask"].cpu().numpy()
        documents = [line[mask == 1] for line, mask in zip(ids, masks, strict=True)]
    return [document.astype(np.int64).tobytes() for document in documents]


def tokenize_again(trainer: Trainer) -> tuple[str, object]:
    """Return (packing strategy or "", the training rows as TRL tokenizes them, with their number as `_row`)."""
    rows = trainer.train_rows
    args = copy.copy(trainer.args)
    args.assistant_only_loss = False
    strategy = args.packing_strategy if args.packing else ""
    if strategy in ("bfd_split", "wrapped"):
        args.max_length = None
    columns = [name for name in rows.column_names if name not in ("id", "_row")]
    numbered = rows.select_columns(columns).add_column("_row", list(range(len(rows))))
    if "input_ids" not in columns:
        numbered = trainer._prepare_dataset(numbered, trainer.processing_class, args, False, None, "train")
    return strategy, numbered


def find_rows(trainer: Trainer, batches: list[dict]) -> list:
    """Return the ids (without an id column: the positions from 0) of the training rows in these batches.

    Tokenizes the rows once more as TRL did and compares; all ranks must call it together.
    """
    strategy, numbered = tokenize_again(trainer)
    documents = {document for batch in batches for document in split_documents(batch)}
    lines = [line.cpu().numpy().astype(np.int64).tobytes() for batch in batches for line in batch["input_ids"]]
    compiled = "input_ids" in trainer.train_rows.column_names
    numbers = []
    for row in numbered.select_columns(["_row", "input_ids"]).with_format("numpy"):
        ids = row["input_ids"].astype(np.int64)
        if compiled or strategy == "wrapped":  # no documents of their own, or split anywhere
            present = any(ids.tobytes() in line for line in lines)
        else:
            size = max(1, trainer.args.max_length or len(ids))
            parts = [ids[start : start + size].tobytes() for start in range(0, len(ids), size)]
            present = any(part in documents for part in parts)
        if present:
            numbers.append(int(row["_row"]))
    if "id" in trainer.train_rows.column_names:
        return [trainer.train_rows[number]["id"] for number in numbers]
    return numbers
