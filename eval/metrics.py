"""The numbers of this room as pure functions: no model, no files.

    python -c "import metrics; print(metrics.wilson(81, 263))"

A *record* is what one model did with one row:
    nll, tokens, turns            summed loss (nats) of the scored assistant outputs, their tokens, how many outputs
    all_nll, all_tokens, texts    the same over every predicted token of the whole conversation (texts: 0 or 1)
    exact, json_valid, stopped, empty    booleans about the generated answer, None where the metric does not apply
"""

import json
import math
import re
from decimal import Decimal

import numpy as np

Z95 = 1.959963984540054  # two-sided 95% quantile of the normal distribution
BOOTSTRAP_DRAWS = 1000


def wilson(count, total):
    """95% score interval (low, high) of a rate: count successes in total > 0 trials.

    Without continuity correction. Source: E. B. Wilson 1927; method 3 in R. G. Newcombe, Statistics in Medicine 17
    (1998). It stays inside [0, 1] and has a width at 0 and at 1, where the usual normal interval has none.
    """
    rate, shrink = count / total, 1 + Z95**2 / total
    centre = (rate + Z95**2 / (2 * total)) / shrink
    half = Z95 * math.sqrt(rate * (1 - rate) / total + Z95**2 / (4 * total**2)) / shrink
    # at 0 and 1 the formula gives the bound itself but for the last bits
    return (0.0 if count == 0 else centre - half), (1.0 if count == total else centre + half)


def perplexity(nll, tokens):
    """exp(sum of the negative log-likelihoods in nats / number of tokens); capped at e^700, the range of a float."""
    return math.exp(min(nll / tokens, 700.0))


def bootstrap_perplexity(nll, tokens, seed):
    """95% percentile interval (low, high) of the perplexity, resampling rows.

    nll, tokens: one number a row. Rows, not tokens, are drawn with replacement (1,000 draws from a generator seeded
    anew on every call), because the tokens of one row depend on each other. A single row's interval has no width.
    Source: B. Efron and R. Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    nll, tokens, draw = np.asarray(nll, float), np.asarray(tokens, float), np.random.default_rng(seed)
    values = []
    for _ in range(BOOTSTRAP_DRAWS // 100):  # a hundred draws at a time: fast, and small for large sets
        pick = draw.integers(len(nll), size=(100, len(nll)))
        values += map(perplexity, nll[pick].sum(axis=1), tokens[pick].sum(axis=1))
    return tuple(float(value) for value in np.percentile(values, [2.5, 97.5]))


def final_text(text):
    """What follows the last `</think>`, stripped; nothing where a `<think>` block was never closed."""
    if "</think>" in text:
        return text.rpartition("</think>")[2].strip()
    return "" if "<think>" in text else text.strip()


def plain_number(text):
    """text as a Decimal if it is a plain number (1,234.50 = 1234.5, 12.0 = 12), else the text itself, stripped."""
    text = text.strip()
    return Decimal(text.replace(",", "")) if re.fullmatch(r"-?\d[\d,]*(\.\d*)?", text, re.ASCII) else text


def exact_match(reference, answer):
    """Whether the answer is the reference, both after their think blocks; an empty answer never is.

    A reference whose last line is `#### x` (GSM8K's form) is met by an answer with the same x after its last `####`,
    numbers compared as numbers. Any other reference is met by its whole text, rendered tool calls included.
    """
    reference, answer = final_text(reference), final_text(answer)
    last_line = reference.rpartition("\n")[2]
    if answer and last_line.startswith("####"):
        given = answer.rpartition("####")
        return bool(given[1]) and plain_number(given[2]) == plain_number(last_line[4:])
    return bool(answer) and answer == reference


def strict_json(text):
    """Whether text, after its think block, is one JSON value as RFC 8259 has it: no NaN or Infinity (which Python's
    parser takes), no key twice in an object, nothing around it."""

    def constant(name):
        raise ValueError(name)

    def unique(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key twice")
        return dict(pairs)

    try:
        json.loads(final_text(text), parse_constant=constant, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        return False
    return True


def summarize(records, seed):
    """Every metric over records, as {metric: {"value", "low", "high", counts...}}; one without data is left out.

    assistant_perplexity, all_token_perplexity: nll (nats), tokens, and turns or texts; bootstrap interval over rows.
    exact_match, json_valid, stop_rate: count of total; interval by Wilson. empty: the answers with nothing in them,
    which count as failures of exact_match and json_valid.
    """
    out = {}
    for name, nll, tokens, parts in (
        ("assistant_perplexity", "nll", "tokens", "turns"),
        ("all_token_perplexity", "all_nll", "all_tokens", "texts"),
    ):
        if rows := [record for record in records if record[tokens]]:
            losses, counts = [row[nll] for row in rows], [row[tokens] for row in rows]
            low, high = bootstrap_perplexity(losses, counts, seed)
            sums = {"nll": sum(losses), "tokens": sum(counts), parts: sum(row[parts] for row in rows)}
            value = perplexity(sums["nll"], sums["tokens"])
            out[name] = {"value": value, "low": low, "high": high, **sums, "rows": len(rows)}
    flags = {"exact_match": "exact", "json_valid": "json_valid", "stop_rate": "stopped", "empty": "empty"}
    for name, key in flags.items():
        if values := [record[key] for record in records if record[key] is not None]:
            low, high = wilson(sum(values), len(values))
            out[name] = {"value": sum(values) / len(values), "low": low, "high": high}
            out[name] |= {"count": sum(values), "total": len(values)}
    return out
