"""95% intervals of figures and of their changes: Wilson, Newcombe, and scipy's bootstrap (BCa).

A figure is {"value", "low", "high", …}. One that no interval can be given to, because too few rows stand behind it,
lacks low and high. tests/eval/test_metrics.py has the published values and the coverage by simulation.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

Z95 = 1.959963984540054  # two-sided 95% quantile of the normal distribution
FEWEST_ROWS = 6  # all of fewer pairs may go one way by chance more often than in 5%: 2 / 2**5 = 6%
MANY_ROWS = 5000
RESAMPLES = 1000
BATCH_VALUES = 1 << 21  # numbers that one step of the bootstrap holds: 16 MiB


class Interval(NamedTuple):
    """The ends of an interval."""

    low: float
    high: float


class Figure(NamedTuple):
    """A value and its interval."""

    value: float
    low: float
    high: float


# -- rates ------------------------------------------------------------------------------------------------------------
def wilson(count: float, total: float) -> Interval:
    """Return the 95% score interval of a rate: count successes in total > 0 trials.

    Without continuity correction. Source: E. B. Wilson 1927; method 3 in R. G. Newcombe, Statistics in Medicine 17
    (1998). It stays inside [0, 1] and has a width at 0 and at 1, where the usual normal interval has none.
    """
    rate = count / total
    shrink = 1 + Z95**2 / total
    centre = (rate + Z95**2 / (2 * total)) / shrink
    variance = rate * (1 - rate) / total + Z95**2 / (4 * total**2)
    half = Z95 * math.sqrt(variance) / shrink
    low = centre - half
    high = centre + half
    if count == 0:  # there the formula gives the bound itself but for the last bits
        low = 0.0
    if count == total:
        high = 1.0
    return Interval(low, high)


def rate(flags: Iterable[bool | None]) -> dict[str, float] | None:
    """Return {value, low, high, count, total} of booleans; None where none applies.

    flags: None does not apply and is not counted.
    """
    applying = [bool(flag) for flag in flags if flag is not None]
    if not applying:
        return None
    count = sum(applying)
    total = len(applying)
    low, high = wilson(count, total)
    return {"value": count / total, "low": low, "high": high, "count": count, "total": total}


def paired_difference(both: int, first: int, second: int, neither: int) -> Interval:
    """Return the 95% interval of p1 - p2, two rates of the same rows: both count, only the first, the second, neither.

    The rows that both get right or wrong, most of them, say nothing about the difference, and the interval of two
    independent rates would be far wider. Source: method 10 of R. G. Newcombe, Improved confidence intervals for the
    difference between binomial proportions based on paired data, Statistics in Medicine 17 (1998) 2635-2650: the
    Wilson intervals of the two rates, joined by the correlation phi of the pairs with its continuity correction.
    """
    n = both + first + second + neither
    product = both * neither - first * second
    margins = (both + first) * (second + neither) * (both + second) * (first + neither)
    phi = 0.0
    if margins:
        if product > 0:
            product = max(product - n / 2, 0)
        phi = product / math.sqrt(margins)
    figures = []
    for count in (both + first, both + second):
        figures.append(Figure(count / n, *wilson(count, n)))
    return unpaired_difference(*figures, phi)


def unpaired_difference(one: Figure, other: Figure, phi: float = 0.0) -> Interval:
    """Return the 95% interval of the difference of two figures that correlate by phi.

    With phi 0 that of rates over rows that are not paired: method 10 of Newcombe's other paper, Statistics in Medicine
    17 (1998) 873-890.
    """
    below = join_reaches(one.value - one.low, other.high - other.value, phi)
    above = join_reaches(one.high - one.value, other.value - other.low, phi)
    difference = one.value - other.value
    return Interval(difference - below, difference + above)


def join_reaches(one: float, other: float, phi: float) -> float:
    square = one**2 - 2 * phi * one * other + other**2
    return math.sqrt(max(square, 0))


def rate_change(tuned: Sequence[bool], base: Sequence[bool]) -> dict[str, float]:
    """Return {value, low, high, pairs} of the rate of tuned minus that of base, flags of the same rows in one order."""
    pairs = list(zip(map(bool, tuned), map(bool, base), strict=True))
    both = pairs.count((True, True))
    first = pairs.count((True, False))
    second = pairs.count((False, True))
    low, high = paired_difference(both, first, second, pairs.count((False, False)))
    return {"value": (first - second) / len(pairs), "low": low, "high": high, "pairs": len(pairs)}


# -- the bootstrap ----------------------------------------------------------------------------------------------------
def ratio_of_sums(top: np.ndarray, bottom: np.ndarray, axis: int = -1) -> np.ndarray:
    return top.sum(axis=axis) / bottom.sum(axis=axis)


def bootstrap_ratio(top: Sequence[float], bottom: Sequence[float], seed: int) -> Interval | None:
    """Return the 95% interval of sum(top) / sum(bottom), one number of each a row.

    None for fewer than FEWEST_ROWS, and where all rows say the same, which no resample tells from certainty.

    Rows, not tokens, are drawn with replacement, because the tokens of one row depend on each other; each brings both
    its numbers. The bias-corrected and accelerated interval of B. Efron, Better bootstrap confidence intervals, Journal
    of the American Statistical Association 82 (1987) 171-185, by scipy, at a level that makes up for the bootstrap's
    narrowness in small samples: the quantile of Student's t and sqrt(n / (n - 1)), as the expanded percentile interval
    of T. Hesterberg, The American Statistician 69 (2015) 371-386. The generator is seeded anew on every call. From
    MANY_ROWS on the percentile interval, which then is the same to the third digit: BCa takes rows² steps.
    """
    rows = len(top)
    if rows < FEWEST_ROWS:
        return None
    tops = np.asarray(top, float)
    bottoms = np.asarray(bottom, float)
    value = float(ratio_of_sums(tops, bottoms))
    if np.allclose(tops, value * bottoms, rtol=1e-12, atol=0):
        return None

    from scipy import stats  # half a second of imports

    quantile = math.sqrt(rows / (rows - 1)) * stats.t.ppf(0.975, rows - 1)
    result = stats.bootstrap(
        (tops, bottoms),
        ratio_of_sums,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, BATCH_VALUES // rows),
        method="BCa" if rows < MANY_ROWS else "percentile",
        confidence_level=1 - 2 * stats.norm.sf(quantile),
        rng=np.random.default_rng(seed),
    )
    low, high = (float(end) for end in result.confidence_interval)
    return Interval(low, high)


def bootstrap_share(parts: Sequence[float], wholes: Sequence[float], seed: int) -> Interval | None:
    """Return bootstrap_ratio's interval of a share between 0 and 1; at 0 and 1 Wilson's, a row as one trial.

    There every resample is the same, though the next row may well be another.
    """
    share = sum(parts) / sum(wholes)
    if share in (0, 1):
        return wilson(share * len(parts), len(parts))
    return bootstrap_ratio(parts, wholes, seed)
