"""Words and n-grams, the same for every step that tells texts by them (filter.py, dedup.py, decontaminate.py).

A word is a run of letters and digits in lower case; in scripts that write no blanks between words (Chinese, Japanese,
Thai, …) and in Korean it is one character. Punctuation parts words and is dropped, full-width forms are narrow ones:
GPT-3's normalisation (appendix C: lower case, no punctuation), which parts words at blanks only. No script.
"""

import re
import unicodedata
from functools import lru_cache

import numpy as np
import xxhash

ALONE = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
ALONE += "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff\uac00-\ud7a3"  # kana, Han, Hangul
WORD = re.compile(rf"[{ALONE}]|[^\W_{ALONE}]+")
ASCII_WORD = re.compile(r"[a-z0-9]+")


def words(text):
    """The words of a text."""
    if text.isascii():
        return ASCII_WORD.findall(text.lower())
    return WORD.findall(unicodedata.normalize("NFKC", text).lower())


@lru_cache(1 << 20)
def word_hash(word):
    return xxhash.xxh3_64_intdigest(word.encode("utf-8", "surrogatepass"))


def hashed(found):
    """Words as an array of 64-bit hashes, which are the same in every process."""
    return np.fromiter(map(word_hash, found), "u8", len(found))


def ngrams(hashes, n):
    """A 64-bit hash of every n neighbours in hashed words, in their order; fewer than n words have none."""
    count = len(hashes) - n + 1
    if count <= 0:
        return np.zeros(0, "u8")
    out = hashes[:count].copy()
    for shift in range(1, n):
        out *= np.uint64(0x9E3779B97F4A7C15)
        out += hashes[shift : count + shift]
    return mixed(out)


def mixed(x):
    """Hashes whose every bit depends on all bits (splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
