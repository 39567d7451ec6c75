"""Whether a text says the same over and over."""

import json
import re
from collections.abc import Sequence

import numpy as np

from data_prep.common.ngrams import FENCED, ngram_size, repeated_share, split_words

LOOP_SHARE = 0.5  # of a text's n-grams or words
SCATTERED_SHARE = 0.9  # of the n-grams of a text that ended, where the repeats do not stand one behind the other
TAIL_TIMES = 8
TAIL_CHARACTERS = 64
TIMES = 4  # that a unit of words stands one behind the other
COUNTED_TIMES = 20  # the same of a text that ended, where numbers differ: a plan for twenty days may
LONGEST_UNIT = 500  # words
FEWEST_UNIT_WORDS = 2  # with letters, where numbers differ: rows of a table of numbers are no loop
NUMBER = re.compile(r"\d+")
NUMBER_ROW = re.compile(r"[\s\d.,;:|()\[\]+-]*")
DECODER = json.JSONDecoder()
FAILED_TRIES = 100  # brackets that begin no JSON, after which no more is looked for


def endless(text: str) -> bool:
    """Return whether a text ends in one unit over and over: 8 times and 64 characters, the last time perhaps cut.

    It sees what has no words (!!!!!!, one long word) and a loop too short for n-grams.
    """
    for size in range(1, len(text) // TAIL_TIMES + 1):
        tail = text[-max(TAIL_TIMES * size, TAIL_CHARACTERS) :]
        if len(tail) >= TAIL_CHARACTERS and tail[size:] == tail[:-size]:
            return True
    return False


def chained_share(words: Sequence[str], times: int, fewest_letters: int = 0) -> float:
    """Return the largest share of words that stand in one unit, repeated `times` times or more one behind the other.

    fewest_letters: how many words of the unit have letters. A text without a whole n-gram to repeat has none.
    """
    if len(words) <= ngram_size(words):
        return 0.0
    codes: dict[str, int] = {}
    numbers = np.array([codes.setdefault(word, len(codes)) for word in words])
    longest = 0
    longest_of_any = 0
    for size in range(1, min(len(words) // times, LONGEST_UNIT) + 1):
        breaks = np.flatnonzero(numbers[size:] != numbers[:-size])
        starts = np.append(0, breaks + 1)
        lengths = np.append(breaks, len(words) - size) - starts
        best = int(np.argmax(lengths))
        covered = int(lengths[best]) + size
        if covered <= longest_of_any or covered < times * size:
            continue  # as far as a smaller unit, of which this one is made
        longest_of_any = covered
        unit = words[starts[best] : starts[best] + size]
        if len([word for word in unit if any(map(str.isalpha, word))]) >= fewest_letters:
            longest = covered
    return longest / len(words)


def drop_structures(text: str) -> str:
    """Return a text without what may repeat itself where it is whole: JSON, rows of tables and of numbers."""
    lines = []
    for line in drop_json(text).split("\n"):
        cells = line.strip()
        is_table = len(cells) > 1 and cells.startswith("|") and cells.endswith("|")
        is_numbers = NUMBER_ROW.fullmatch(line) is not None and any(map(str.isdigit, line))
        if not is_table and not is_numbers:
            lines.append(line)
    return "\n".join(lines)


def drop_json(text: str) -> str:
    """Return a text without the JSON objects and lists that stand in it."""
    kept = []
    position = 0
    failures = 0
    for match in re.finditer(r"[{\[]", text):
        if match.start() < position:
            continue
        try:
            _, end = DECODER.raw_decode(text, match.start())
        except (ValueError, RecursionError):
            failures += 1
            if failures == FAILED_TRIES:
                break
            continue
        kept.append(text[position : match.start()])
        position = end
    return "".join([*kept, text[position:]])


def loops(text: str, stopped: bool = True) -> bool:
    """Return whether a text says the same over and over, its thought too.

    One that did not stop by itself: over half of its n-grams stand there again, its end is endless, or a unit of words
    fills half of it, four times or more, perhaps with another number each time (a loop with a counter). One that ended
    is looked at without tables, JSON, rows of numbers and code, and its units must stand one behind the other, so that
    a chorus is none; with another number each time it takes twenty, so that a plan by days is none.
    """
    if not stopped:
        if repeated_share(text) > LOOP_SHARE or endless(text.rstrip()):
            return True
        counted = split_words(NUMBER.sub("0", FENCED.sub("", text)))
        return chained_share(counted, TIMES, FEWEST_UNIT_WORDS) > LOOP_SHARE
    prose = drop_structures(text)
    if endless(prose.rstrip()) or repeated_share(prose) > SCATTERED_SHARE:
        return True
    prose = FENCED.sub("", prose)
    if chained_share(split_words(prose), TIMES) > LOOP_SHARE:
        return True
    return chained_share(split_words(NUMBER.sub("0", prose)), COUNTED_TIMES, FEWEST_UNIT_WORDS) > LOOP_SHARE
