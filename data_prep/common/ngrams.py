"""Split text into words and n-grams, the same for filter, dedup and decontaminate.

A word is a run of letters and digits in lower case; in scripts that write no blanks between words (Chinese, Japanese,
Thai, …) and in Korean it is one character. Punctuation parts words and is dropped, full-width forms are narrow ones:
GPT-3's normalisation (appendix C: lower case, no punctuation), which parts words at blanks only.
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import xxhash

SINGLE = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
SINGLE += "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff\uac00-\ud7a3"  # kana, Han, Hangul
WORD = re.compile(rf"[{SINGLE}]|[^\W_{SINGLE}]+")
FENCED = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)  # code, which repeats itself as prose does not
NGRAM = 10  # words, of which a repeated text is made
ASCII_WORD = re.compile(r"[a-z0-9]+")
GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)


def split_words(text: str) -> list[str]:
    """Return the words of a text."""
    if text.isascii():
        return ASCII_WORD.findall(text.lower())
    return WORD.findall(unicodedata.normalize("NFKC", text).lower())


@lru_cache(1 << 20)
def hash_word(word: str) -> int:
    return xxhash.xxh3_64_intdigest(word.encode("utf-8", "surrogatepass"))


def hash_words(words: list[str]) -> np.ndarray:
    """Return 64-bit hashes of words, (words,), the same in every process."""
    return np.fromiter(map(hash_word, words), "u8", len(words))


def hash_ngrams(hashes: np.ndarray, n: int) -> np.ndarray:
    """Return a 64-bit hash of every n neighbours in hashed words, in their order; fewer than n words have none."""
    count = len(hashes) - n + 1
    if count <= 0:
        return np.zeros(0, "u8")
    ngrams = hashes[:count].copy()
    for shift in range(1, n):
        ngrams *= GOLDEN_RATIO
        ngrams += hashes[shift : count + shift]
    return scramble(ngrams)


def scramble(hashes: np.ndarray) -> np.ndarray:
    """Return hashes whose every bit depends on all bits of the given ones (splitmix64)."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))


# -- repetition -------------------------------------------------------------------------------------------------------
def ngram_size(words: Sequence[str]) -> int:
    """Return how many words make an n-gram: 10, or 20 where most are single characters (Chinese, Japanese, Korean)."""
    single = len([word for word in words if len(word) == 1 and not word.isascii()])
    return NGRAM * 2 if single * 2 > len(words) else NGRAM


def repeated_share(text: str) -> float:
    """Return the share of the n-grams of a text's words that stand in it more than once, code in ``` fences left out.

    data-juicer's word_repetition_filter.
    """
    words = split_words(FENCED.sub("", text))
    ngrams = hash_ngrams(hash_words(words), ngram_size(words))
    if not len(ngrams):
        return 0.0
    _, counts = np.unique(ngrams, return_counts=True)
    return float(counts[counts > 1].sum() / len(ngrams))
