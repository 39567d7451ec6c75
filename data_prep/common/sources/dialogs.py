"""Dialogs of two people and exercises on them, in Chinese and English."""

import re

from ..errors import InvalidRow
from ..parsing import clean_text, is_empty, require_objects
from .chats import TURN_COLUMNS, first_turn, read_turns
from .exchange import exchange
from .exercises import choose

SPEAKERS = ("user", "assistant")  # the first to speak asks
NO_REPLY = "a last question without an answer"
OPTION_LETTERS = "abcdefghijklmnopqrstuvwxyz"
OPTIONS = tuple(f"({letter})" for letter in OPTION_LETTERS)


def alternate(texts: list[str]) -> dict:
    """Return the row of a dialog whose speakers take turns; a last question that nobody answered goes."""
    not_kept = []
    if len(texts) % 2:
        texts = texts[:-1]
        not_kept.append(NO_REPLY)
    turns = [{"role": SPEAKERS[number % 2], "content": text} for number, text in enumerate(texts)]
    return {"messages": turns, "not_kept": not_kept}


def kdconv(row: dict) -> dict:
    """thu-coai/KdConv (README of the repository): a JSON array of {"messages": [{message, attrs}], "name"} in
    data/film, data/music and data/travel. The first speaker is the user. attrs, the facts of a knowledge graph that an
    utterance refers to, and name, the topic, are not kept; nor is a last utterance without a reply."""
    turns = require_objects(row["messages"], "messages")
    return alternate([clean_text(turn["message"], "message") for turn in turns])


def lccc(row: dict) -> dict:
    """thu-coai/CDial-GPT's LCCC (card of the hub's lccc): a dialog is a list of strings, or {"dialog": [...]}, with
    blanks between words. The first speaker is the user; a last utterance without a reply goes. So do blanks, but
    those between two words of Latin letters or digits."""
    return alternate([join_words(text) for text in read_turns(row)])


WORD_GAP = re.compile(r"(?<![A-Za-z0-9]) +| +(?![A-Za-z0-9])")


def join_words(text: object) -> str:
    """Return a text without the blanks that a word segmenter put between Chinese words and signs."""
    return WORD_GAP.sub("", clean_text(text, "utterance"))


def corecode(row: dict) -> dict:
    """danshi777/CORECODE (README of the repository): data/{easy,hard}/TASK/SPLIT/*.jsonl of dialogue ["A: …", "B: …"],
    question and answer, a text; or options "(a)", "(b)" … and answer ["(a)", text of that option]. The dialog, the
    question and its options are the user's, the answer is "(a) text" or the text. Its domains and slots are what it
    asks for; they are no columns."""
    lines = row["dialogue"]
    if not isinstance(lines, list) or not all([isinstance(line, str) for line in lines]):
        raise InvalidRow("field of another type", "dialogue must be a list of strings")
    question = [*lines, "", clean_text(row["question"], "question")]
    options = {name: row[name] for name in OPTIONS if not is_empty(row.get(name))}
    for name, text in options.items():
        question.append(f"{name} {clean_text(text, name)}")
    answer = row["answer"]
    if options:
        if not isinstance(answer, list) or len(answer) != 2 or options.get(str(answer[0])) != answer[1]:
            raise InvalidRow("answer that is no choice", f"{answer} of {', '.join(options)}"[:80])
        answer = " ".join(answer)
    return {"messages": exchange("\n".join(question), answer)}


SPEAKER = re.compile(r" (?=[mf] : )")


def mutual(row: dict) -> dict:
    """Nealcly/MuTual (README of the repository): a .txt with a JSON object a dialog, {article, options, answers, id}:
    which of four replies goes on with it. In nanochat's form of a choice, answered by the letter, as arc and mmlu. The
    article has one utterance a line, m and f its speakers; words stay in small letters and apart from signs, as
    published. The test split has no answers."""
    article = SPEAKER.sub("\n", clean_text(row["article"], "article"))
    return {"messages": choose(article, list("ABCD"), row["options"], row["answers"])}


# -- by what a row is known -------------------------------------------------------------------------------------------
SEGMENTED = re.compile(r"[\u4e00-\u9fff] [\u4e00-\u9fff]")


def holds_utterances(row: dict) -> bool:
    turn = first_turn(row)
    return isinstance(turn, dict) and "message" in turn


def holds_segments(row: dict) -> bool:
    """Return whether the turns are strings whose Chinese words stand apart."""
    for name in TURN_COLUMNS:
        if isinstance(row.get(name), list):
            return any([isinstance(text, str) and SEGMENTED.search(text) for text in row[name]])
    return False
