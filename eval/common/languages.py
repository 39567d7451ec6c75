"""Which language a text is in, by lingua, which tells short texts apart better than langdetect and gives its margin.

Texts in scripts that one language writes (Thai, Korean, …) cost nothing; the first text of under 120 characters in
Latin letters loads models of all languages in LATIN: 3 s and 0.4 GB. A language that is not listed here is taken for
its nearest neighbour, which does no harm where two texts are compared.
"""

from functools import cache
from typing import TYPE_CHECKING

from data_prep.common.ngrams import FENCED, split_words

if TYPE_CHECKING:
    from lingua import LanguageDetector

LATIN = ("CZECH", "DUTCH", "ENGLISH", "FINNISH", "FRENCH", "GERMAN", "HUNGARIAN", "INDONESIAN", "ITALIAN", "POLISH")
LATIN += ("PORTUGUESE", "ROMANIAN", "SPANISH", "SWEDISH", "TURKISH", "VIETNAMESE")
OTHER_SCRIPTS = ("ARABIC", "ARMENIAN", "BENGALI", "CHINESE", "GEORGIAN", "GREEK", "GUJARATI", "HEBREW", "HINDI")
OTHER_SCRIPTS += ("JAPANESE", "KOREAN", "PERSIAN", "RUSSIAN", "TAMIL", "TELUGU", "THAI", "UKRAINIAN", "URDU")
MARGIN = 0.1  # of the best guess's confidence over the next one's; see tests/eval/test_metrics.py
FEWEST_WORDS = 3  # fewer ("OK", a name, a formula) are in no language


@cache
def load_detector() -> "LanguageDetector":
    from lingua import Language, LanguageDetectorBuilder

    languages = [getattr(Language, name) for name in (*LATIN, *OTHER_SCRIPTS)]
    return LanguageDetectorBuilder.from_languages(*languages).build()


def count_words(text: str) -> int:
    """Return how many words with letters stand in a text; in scripts without blanks a character is one."""
    return len([word for word in split_words(text) if any(map(str.isalpha, word))])


def rank_languages(text: str) -> dict[str, float]:
    """Return {code (ISO 639-1): confidence} of a text, the best first, each above 0 and at most 1.

    Code in ``` fences is left out. A text of fewer than FEWEST_WORDS words has no language.
    """
    prose = FENCED.sub("", text).encode("utf-8", "replace").decode()  # lingua takes no halves of surrogate pairs
    if count_words(prose) < FEWEST_WORDS:
        return {}
    values = load_detector().compute_language_confidence_values(prose)
    return {value.language.iso_code_639_1.name.lower(): value.value for value in values if value.value > 0}


def identify_language(text: str) -> str:
    """Return the code of the language that a text is clearly in, "" where it is in none."""
    ranked = rank_languages(text)
    if not ranked:
        return ""
    best, *others = ranked
    if others and ranked[best] - ranked[others[0]] < MARGIN:
        return ""
    return best


def is_in_language(text: str, language: str) -> bool:
    """Return whether a text is in a language, for all that its words say: no other one is clearly likelier."""
    ranked = rank_languages(text)
    return language in ranked and max(ranked.values()) - ranked[language] < MARGIN
