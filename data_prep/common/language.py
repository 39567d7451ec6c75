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


def conversation_text(turns):
    """What user, assistant and tools say, by which a row's language is told."""
    return "".join([turn.get("content") or "" for turn in turns if turn["role"] != "system"])


@cache
def scripts():
    """(65536,): the place in SCRIPTS, from 1, of every character below U+10000; 5 for other letters, else 0."""
    chars = "".join(map(chr, range(1 << 16)))
    found = np.array([len(SCRIPTS) + 1 if char.isalpha() else 0 for char in chars], np.uint8)
    for number, pattern in enumerate(SCRIPTS.values(), 1):
        for run in pattern.finditer(chars):
            found[run.start() : run.end()] = number
    return found


def detect_language(value):
    """zh, ja or ko by script, en for text in Latin letters (a guess: no language is told apart there), else und."""
    if value.isascii():
        return "en" if re.search(r"[A-Za-z]", value) else "und"
    codes = np.frombuffer(value.encode("utf-32-le", "surrogatepass"), "<u4")
    counts = np.bincount(scripts()[np.minimum(codes, 0xFFFF)], minlength=len(SCRIPTS) + 2).tolist()
    letters = dict(zip([*SCRIPTS, "und"], counts[1:], strict=True))
    letters["und"] += sum(chr(code).isalpha() for code in codes[codes > 0xFFFF].tolist())
    if letters["ja"] > letters["zh"] / 10:
        letters["ja"] += letters.pop("zh")
    return max(letters, key=letters.get) if any(letters.values()) else "und"
