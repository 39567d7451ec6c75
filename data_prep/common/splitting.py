"""Choose validation rows by prompt, so that no prompt stands on both sides: the one way in which rows are split."""

import numpy as np


def choose_validation(
    prompts: np.ndarray,
    count: int,
    seed: int,
    groups: np.ndarray | None = None,
    chosen: np.ndarray | None = None,
) -> np.ndarray:
    """Return a mask (rows,) of the rows for validation: at least `count`, and all rows of every prompt among them.

    The last prompt that is drawn may bring more rows than were missing; never fewer, as long as there are as many. The
    same prompts and seed give the same prompts, whatever the order of the rows.

    prompts: (rows,) uint64, prompt_key of each row
    groups: (rows,) int, the source of each row; each gives its share of `count`
    chosen: (rows,) bool, rows that are validation already; they and the rows of their prompts count
    """
    if groups is None:
        groups = np.zeros(len(prompts), int)
    mask = np.zeros(len(prompts), bool)
    if chosen is not None:
        mask = np.isin(prompts, prompts[chosen])
    if not len(prompts):
        return mask
    names, sizes = np.unique(groups, return_counts=True)
    quotas = round_to_total(count, sizes / len(prompts))
    drawn = [prompts[mask]]
    for name, quota in zip(names, quotas, strict=True):
        in_group = groups == name
        missing = max(0, quota - np.count_nonzero(mask & in_group))
        rows = order_by_prompt(np.flatnonzero(in_group & ~mask), prompts, seed)
        drawn.append(prompts[rows[:missing]])
    return np.isin(prompts, np.concatenate(drawn))


def order_by_prompt(rows: np.ndarray, prompts: np.ndarray, seed: int) -> np.ndarray:
    """Return rows (indices into prompts) in random order: rows of one prompt stay together, in their order."""
    return rows[np.argsort(hash_prompts(prompts[rows], seed), kind="stable")]


def hash_prompts(prompts: np.ndarray, seed: int) -> np.ndarray:
    """Return 64-bit hashes of prompts and seed (splitmix64): sorted by them, two sources draw the same prompts."""
    golden = 0x9E3779B97F4A7C15
    with np.errstate(over="ignore"):
        x = prompts.astype(np.uint64) + np.uint64((seed * golden + golden) % 2**64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def round_to_total(total: int, shares: np.ndarray) -> np.ndarray:
    """Return whole numbers that sum to total, as near to total * shares as can be (largest remainder)."""
    exact = total * np.asarray(shares)
    rounded = np.floor(exact + 1e-9).astype(int)
    missing = total - rounded.sum()
    largest = np.argsort(rounded - exact, kind="stable")[:missing]
    rounded[largest] += 1
    return rounded
