"""The strategies of a mix: which rows of each source are trained, how often, in which order."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .errors import UsageError
from .mix_options import Mix, Source
from .splitting import round_to_total

MOST_DRAWS = 1 << 30  # of a source's rows: their numbers lie in memory
MOST_WANTED = 1 << 50  # rows or tokens: more are counted as these, which no source can give


@dataclass
class Candidates:
    """The train rows of one source, in drawing order."""

    source: Source
    rows: np.ndarray  # (n,) numbers of rows
    sizes: np.ndarray  # (n,) 1, or the tokens of each
    cause: str = ""  # why some of them are not drawn, and the option that changes it

    def total(self) -> int:
        return int(self.sizes.sum())

    def available(self) -> float:
        """Return how many rows or tokens its epochs allow."""
        return self.total() * self.source.epochs


@dataclass
class Draw:
    """Rows in the order in which they are trained."""

    rows: np.ndarray  # (draws,) numbers of rows
    passes: np.ndarray  # (draws,) how often each was drawn before


def draw_rows(sources: list[Candidates], mix: Mix) -> Draw:
    """Return what the strategy of the mix draws of its sources, shuffled; their `cause` is filled in."""
    if not drawable_shares(sources).any():
        return Draw(np.zeros(0, int), np.zeros(0, int))
    draw = STRATEGIES[mix.strategy](sources, mix)
    shuffle = mix.shuffle
    if shuffle is None and mix.strategy in ("resample", "subsample"):
        shuffle = "numpy"
    order = np.arange(len(draw.rows))
    if shuffle == "numpy":
        order = np.random.default_rng(mix.seed).permutation(order)
    elif shuffle == "python":
        order = list(range(len(draw.rows)))
        random.Random(mix.seed).shuffle(order)
    return Draw(draw.rows[order], draw.passes[order])


# -- the strategies ---------------------------------------------------------------------------------------------------
def interleave(sources: list[Candidates], mix: Mix) -> Draw:
    """Draw each source's share, evenly spread, until the first or the last of them is used up."""
    shares = drawable_shares(sources)
    if mix.stop == "each_exhausted":
        return interleave_to_the_end(sources, shares, mix)
    used = np.flatnonzero(shares)
    repeats = mix.stop == "all_exhausted"
    ends = np.array([sources[number].available() / float(shares[number]) for number in used])
    place = np.argmax(ends) if repeats else np.argmin(ends)
    last = used[place]
    quotas = divide(mix.size or ends[place], shares, mix)  # the result ends where the source `last` is used up
    rows = []
    passes = []
    positions = []
    for candidates, quota in zip(sources, quotas, strict=True):
        candidates.cause = explain_quota(candidates, quota, mix, sources[last].source)
        if not repeats:
            quota = min(quota, candidates.available())
        count = count_repeated(candidates, quota)
        middles = middles_of(np.resize(candidates.sizes, count))
        rows.append(np.resize(candidates.rows, count))
        passes.append(np.arange(count) // max(1, len(candidates.rows)))
        positions.append(middles / max(1, np.resize(candidates.sizes, count).sum()))
    order = np.argsort(np.concatenate(positions), kind="stable")
    return Draw(np.concatenate(rows)[order], np.concatenate(passes)[order])


def interleave_to_the_end(sources: list[Candidates], shares: np.ndarray, mix: Mix) -> Draw:
    """Draw by shares until a source is used up, then by those of the rest, until all are, each after its epochs.

    Were each source drawn at a speed that is its share, its rows would come at these times; that some have ended
    changes no order among the others.
    """
    rows = [np.zeros(0, int)]
    passes = [np.zeros(0, int)]
    times = [np.zeros(0)]
    for candidates, share in zip(sources, shares, strict=True):
        candidates.cause = explain_quota(candidates, candidates.available(), mix, candidates.source)
        if not share:
            continue
        drawn = repeat(candidates.rows, candidates.source)
        rows.append(drawn)
        passes.append(np.arange(len(drawn)) // len(candidates.rows))
        times.append(middles_of(repeat(candidates.sizes, candidates.source)) / share)
    order = np.argsort(np.concatenate(times), kind="stable")
    return Draw(np.concatenate(rows)[order], np.concatenate(passes)[order])


def explain_quota(candidates: Candidates, quota: float, mix: Mix, last: Source) -> str:
    source = candidates.source
    if not source.weight:
        return f"its weight {source.weight:g} asks for none (raise weight)"
    asks = f"its weight {source.weight:g} asks for {quota:,.0f} {mix.by}"
    if mix.stop == "all_exhausted" and mix.size is None:
        return f"{asks} until all are used up (raise weight or epochs)"
    if mix.stop != "all_exhausted" and quota >= candidates.available():
        return f"its epochs of {source.epochs:g} allow {candidates.available():,.0f} {mix.by} (raise epochs)"
    if mix.size is not None:
        return f"{asks} of size {mix.size:,} (raise weight or size)"
    return f"{asks} until {last.name} is used up (raise weight, epochs of {last.name}, or write stop: all_exhausted)"


def resample(sources: list[Candidates], mix: Mix) -> Draw:
    """Draw each source's share with replacement."""
    total = mix.size or max(1, int(0.9 * sum([candidates.total() for candidates in sources])))
    quotas = divide(total, drawable_shares(sources), mix)
    rng = np.random.default_rng(mix.seed)
    drawn = []
    for candidates, quota in zip(sources, quotas, strict=True):
        if quota:
            check_draws(quota / candidates.sizes.mean(), candidates.source)
        places = draw_with_replacement(candidates.sizes, quota, rng)
        drawn.append(candidates.rows[places])
        candidates.cause = f"{len(places):,} draws with replacement at weight {candidates.source.weight:g} missed them"
        candidates.cause += " (raise weight or size, or write strategy: interleave)"
    rows = np.concatenate(drawn)
    return Draw(rows, count_passes(rows))


def draw_with_replacement(sizes: np.ndarray, quota: float, rng: np.random.Generator) -> np.ndarray:
    """Return places in sizes until the quota of rows or tokens is met."""
    drawn = [np.zeros(0, int)]
    missing = quota
    while missing > 0 and len(sizes):
        places = rng.integers(len(sizes), size=max(1, int(missing / sizes.mean())))
        ends = np.cumsum(sizes[places])
        places = places[: int(np.searchsorted(ends, missing, side="left")) + 1]
        drawn.append(places)
        missing -= sizes[places].sum()
    return np.concatenate(drawn)


def subsample(sources: list[Candidates], mix: Mix) -> Draw:
    """Keep the share of each source that its weight is, `epochs` times."""
    drawn = []
    for candidates in sources:
        weight = candidates.source.weight
        epochs = candidates.source.epochs
        kept = candidates.rows[: count_repeated(candidates, int(candidates.total() * weight + 1e-9))]
        drawn.append(repeat(kept, candidates.source))
        candidates.cause = f"its weight {weight:g} keeps {len(kept):,} rows of {len(candidates.rows):,} (raise weight)"
        if epochs < 1:
            candidates.cause = f"its weight {weight:g} and epochs {epochs:g} keep {len(drawn[-1]):,} rows"
            candidates.cause += " (raise weight or epochs)"
    rows = np.concatenate(drawn)
    return Draw(rows, count_passes(rows))


def concatenate(sources: list[Candidates], mix: Mix) -> Draw:
    """Take the sources one after the other, each `epochs` times, up to size."""
    drawn = []
    sizes = []
    for candidates in sources:
        drawn.append(repeat(candidates.rows, candidates.source))
        sizes.append(repeat(candidates.sizes, candidates.source))
    rows = np.concatenate(drawn)
    count = len(rows)
    if mix.size is not None:
        count = count_within(np.concatenate(sizes), mix.size)
    ends = np.cumsum([len(part) for part in drawn])
    for candidates, part, end in zip(sources, drawn, ends, strict=True):
        candidates.cause = f"its epochs of {candidates.source.epochs:g} take {len(part):,} rows (raise epochs)"
        if end > count:
            candidates.cause = f"size {mix.size:,} ends before them (raise size)"
    rows = rows[:count]
    return Draw(rows, count_passes(rows))


STRATEGIES: dict[str, Callable[[list[Candidates], Mix], Draw]] = {
    "interleave": interleave,
    "resample": resample,
    "subsample": subsample,
    "concatenate": concatenate,
}


def draw_literally(sources: list[Candidates], mix: Mix) -> np.ndarray:
    """Return rows as the tutorial's build_datasets.py mixes them, by datasets' own functions: interleave_datasets, or
    rows drawn with replacement."""
    from datasets import Dataset, interleave_datasets

    shares = shares_of(sources)
    used = []
    for candidates, share in zip(sources, shares, strict=True):
        candidates.cause = f"literal {mix.strategy} at weight {candidates.source.weight:g} misses them (raise weight)"
        if share and len(candidates.rows):
            used.append((candidates.rows, share))
    if not used:
        return np.zeros(0, int)
    if mix.strategy == "interleave":
        parts = [Dataset.from_dict({"row": rows}).shuffle(seed=mix.seed) for rows, _ in used]
        chances = np.array([share for _, share in used])
        stop = mix.stop or "all_exhausted"
        mixed = interleave_datasets(parts, list(chances / sum(chances)), seed=mix.seed, stopping_strategy=stop)
        return np.array(mixed["row"])
    total = int(0.9 * sum([len(candidates.rows) for candidates in sources]))
    rng = np.random.default_rng(mix.seed)
    return np.concatenate([rows[rng.integers(len(rows), size=round(total * share))] for rows, share in used])


# -- counting ---------------------------------------------------------------------------------------------------------
def shares_of(sources: list[Candidates]) -> np.ndarray:
    """Return the weights of the sources as shares of 1."""
    weights = np.array([candidates.source.weight for candidates in sources], float)
    weights /= weights.max()  # the sum of large ones is no number
    return weights / weights.sum()


def drawable_shares(sources: list[Candidates]) -> np.ndarray:
    """Return the shares among the sources that have a row, 0 of the others; all 0 where none with a weight has one."""
    shares = shares_of(sources)
    shares[[not len(candidates.rows) for candidates in sources]] = 0
    return shares / max(shares.sum(), np.finfo(float).tiny)


def divide(wanted: float, shares: np.ndarray, mix: Mix) -> np.ndarray:
    """Return the rows or tokens of each source; rows are whole and add up."""
    wanted = min(wanted, MOST_WANTED)
    if mix.by == "rows":
        return round_to_total(int(wanted + 1e-6), shares)
    return wanted * shares


def middles_of(sizes: np.ndarray) -> np.ndarray:
    """Return where the middle of each row lies, in rows or tokens from the start."""
    return np.cumsum(sizes) - sizes / 2


def count_within(sizes: np.ndarray, quota: float) -> int:
    """Return how many rows meet a quota of rows or tokens most closely: one whose middle lies within is taken."""
    return int(np.searchsorted(middles_of(sizes), quota, side="left"))


def count_repeated(candidates: Candidates, quota: float) -> int:
    """Return how many rows, taken over and over in drawing order, meet a quota of rows or tokens."""
    if quota <= 0 or not len(candidates.rows):
        return 0
    passes = int(quota // candidates.total()) + 1
    check_draws(passes * len(candidates.rows), candidates.source)
    return count_within(np.tile(candidates.sizes, passes), quota)


def repeat(values: np.ndarray, source: Source) -> np.ndarray:
    """Return values as often as the epochs of their source say, the last pass up to the nearest whole row."""
    check_draws(len(values) * source.epochs, source)
    return np.resize(values, round(len(values) * source.epochs))


def check_draws(count: float, source: Source) -> None:
    """Raise UsageError where a source would give more rows than memory holds the numbers of."""
    if count > MOST_DRAWS:
        raise UsageError(
            f"{source.name}: {count:.3g} rows would be drawn of it: write a smaller size, fewer epochs, or weights "
            "that are less far apart"
        )


def count_passes(rows: np.ndarray) -> np.ndarray:
    """Return how often each entry stood before, from 0."""
    order = np.argsort(rows, kind="stable")
    ordered = rows[order]
    is_first = np.ones(len(rows), bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    starts = np.flatnonzero(is_first)
    lengths = np.diff(np.append(starts, len(rows)))
    passes = np.empty(len(rows), int)
    passes[order] = np.arange(len(rows)) - np.repeat(starts, lengths)
    return passes
