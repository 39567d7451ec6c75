"""Rows that are made here: words to spell and letters to count."""

import random
from functools import cache
from hashlib import blake2b
from pathlib import Path

from .exchange import exchange

ONSETS = "b c d f g h j k l m n p r s t v w z br ch cl cr dr fl gl gr pl pr sh sk sl sp st str th tr"
VOWELS = "a e i o u ai ea ee oa oo ou"
CODAS = "l m n r s t ck ll nd ng nk nt rn rt sh st"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
QUESTIONS = (
    "How many {letter} are in {word}",
    "How many times does {letter} appear in the word {word}",
    "Count the {letter} in {word}",
    "In the word {word}, how many {letter} are there",
    "What is the number of {letter} in {word}",
    "{word} has how many {letter}",
    "Can you count the letter {letter} in {word}",
    "Wie viele {letter} sind in {word}",
    "Combien de {letter} dans {word}",
    "¿Cuántas {letter} hay en {word}?",
    "{word}里有几个{letter}",
)


@cache
def read_word_list(path: str) -> list[str]:
    """Return the words of a file, one a line; they may be any."""
    return [word for word in Path(path).read_text(encoding="utf-8").split() if word.isalpha()]


def is_validation_word(word: str) -> bool:
    """Return whether a word is never trained: by its letters alone, whatever seed, list and rows."""
    return blake2b(word.lower().encode(), digest_size=1).digest()[0] < 26


def draw_word(row: dict, words: str | None) -> tuple[random.Random, str]:
    """Return (the row's own generator, a word of the row's split that it drew)."""
    rng = random.Random(f"{row['seed']}/{row['split']}/{row['number']}")
    while True:
        if words:
            word = rng.choice(read_word_list(words))
        else:
            pieces = []
            for _ in range(rng.randint(1, 3)):
                pieces += [ONSETS, VOWELS]
            word = "".join([rng.choice(piece.split()) for piece in [*pieces, CODAS]])
        if is_validation_word(word) == (row["split"] != "train"):
            return rng, word


def simple_spelling(row: dict, *, words: str | None = None) -> dict:
    """nanochat's SimpleSpelling, made here: `Spell the word: tree` -> `tree:t,r,e,e`. Words are made of syllables, or
    drawn from --words FILE (nanochat: dwyl/english-words, words_alpha.txt). A word is in train or in validation for
    good, by its own hash: nanochat drew both from one list and its seeds met."""
    _, word = draw_word(row, words)
    return {"messages": exchange(f"Spell the word: {word}", f"{word}:{','.join(word)}")}


def spelling_bee(row: dict, *, words: str | None = None) -> dict:
    """nanochat's SpellingBee, made here: how often a letter stands in a word, counted by hand, then by Python, then
    `#### n`. The Python call stands in the text as GSM8K's notes do, <<'tree'.count('e')=2>>, so that templates without
    tools can render it."""
    rng, word = draw_word(row, words)
    letter = rng.choice(word) if rng.random() < 0.9 else rng.choice(LETTERS)
    question = rng.choice(QUESTIONS)
    quote = rng.choice(["", "'", '"'])
    question = question.format(letter=f"{quote}{letter}{quote}", word=f"{quote}{word}{quote}")
    if not question.endswith("?") and rng.random() >= 0.5:
        question += "?"
    lines = []
    count = 0
    for number, char in enumerate(word, 1):
        if char == letter:
            count += 1
            lines.append(f"{number}:{char} hit! count={count}")
        else:
            lines.append(f"{number}:{char}")
    answer = (
        f"We count the letter '{letter}' in the word '{word}', first by hand.\n\nSpell it:\n{word}:{','.join(word)}\n\n"
        "Count:\n" + "\n".join(lines) + f"\n\nThis gives us {count}.\n\nLet me check it with Python:\n\n"
        f"<<'{word}'.count('{letter}')={count}>>\n\nPython gives us {count}.\n\n#### {count}"
    )
    return {"messages": exchange(question, answer)}


def spelling(row: dict, *, words: str | None = None) -> dict:
    """simple_spelling and spelling_bee in turn, a row each, named as the row's source."""
    make = spelling_bee if row["number"] % 2 else simple_spelling
    return make(row, words=words) | {"source": make.__name__}
