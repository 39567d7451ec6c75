"""Tell a text's language by its script."""

import re
from functools import cache

import numpy as np

SCRIPTS = {
    "zh": re.compile("[\u4e00-\u9fff]+"),
    "en": re.compile("[A-Za-z\u00aa\u00b5\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f]+"),
    "ja": re.compile("[\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff]+"),
    "ko": re.compile("[\uac00-\ud7a3]+"),
}
UNKNOWN = "und"  # ISO 639: undetermined
CODES = ("no letter", *SCRIPTS, UNKNOWN)
LETTER = re.compile("[A-Za-z]")


def conversation_text(turns: list[dict]) -> str:
    """Return what user, assistant and tools say, from which a row's language is detected."""
    return "".join([turn.get("content") or "" for turn in turns if turn["role"] != "system"])


@cache
def script_codes() -> np.ndarray:
    """Return for every character below U+10000 the place of its script in CODES, uint8 (65536,)."""
    characters = "".join(map(chr, range(1 << 16)))
    codes = np.zeros(len(characters), np.uint8)
    for place, character in enumerate(characters):
        if character.isalpha():
            codes[place] = CODES.index(UNKNOWN)
    for code, pattern in enumerate(SCRIPTS.values(), 1):
        for run in pattern.finditer(characters):
            codes[run.start() : run.end()] = code
    return codes


def detect_language(text: str) -> str:
    """Return zh, ja or ko by script, en for Latin letters (a guess: no language is told apart there), else und."""
    if text.isascii():
        return "en" if LETTER.search(text) else UNKNOWN
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    codes = script_codes()[np.minimum(points, 0xFFFF)]
    letters = dict(zip(CODES, np.bincount(codes, minlength=len(CODES)).tolist(), strict=True))
    del letters["no letter"]
    letters[UNKNOWN] += sum([chr(point).isalpha() for point in points[points > 0xFFFF].tolist()])
    if letters["ja"] > letters["zh"] / 10:  # Japanese writes Chinese characters, too
        letters["ja"] += letters.pop("zh")
    if not any(letters.values()):
        return UNKNOWN
    return max(letters, key=letters.get)
