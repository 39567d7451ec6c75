"""The numbers of eval/ as pure functions: no model, no files.

A *record* is what one model did with one row; its keys count nothing (None) where they do not apply:
    nll, tokens, turns              summed loss (nats) of the scored assistant outputs, their tokens, how many outputs
    all_nll, all_tokens, texts      the same over every predicted token of the whole conversation (texts: 0 or 1)
    answer_tokens, reference_tokens    lengths of the generated answer and of the data's own, without the stop token
    failed                          why there is no answer (out of memory, timeout), "" where there is one
    said, wanted                    the answer and the data's own without their thoughts, calls as JSON
    compared                        what `exact` compared of these two
    json_equal, json_fields         fields of the reference's JSON that the answer has, and all of them
    the keys of RATES               booleans about the generated answer

Answers are taken apart by their template's family (data_prep/common/answers.py): mostly the *final text* is looked at,
without the thought. A thought that never ends has none: nothing was answered.
"""

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from rapidfuzz.distance import Levenshtein

from data_prep.common.answers import Answer
from data_prep.common.ngrams import FENCED, split_words
from eval.common.gsm8k import official_answer
from eval.common.intervals import (
    FEWEST_ROWS,
    Interval,
    bootstrap_ratio,
    bootstrap_share,
    rate,
    rate_change,
)
from eval.common.intervals import Z95 as Z95  # as names of this module too
from eval.common.intervals import wilson as wilson
from eval.common.languages import identify_language, is_in_language
from eval.common.repetition import loops
from eval.common.strict_json import json_fields, offers_json, schema_valid, strict_json

RATES = {  # metric: the flag that it counts
    "exact_match": "exact",
    "usability": "usable",
    "stop_rate": "stopped",
    "cut_rate": "cut",
    "loop_rate": "loops",
    "abrupt_end_rate": "abrupt",
    "control_token_rate": "control",
    "empty": "empty",
    "failed": "failed",
    "prompt_copies": "copied",
    "replacement_rate": "garbled",
    "run_on_rate": "runs_on",
    "language_retention": "same_language",
    "json_valid": "json_valid",
    "json_schema_valid": "json_schema_valid",
    "json_exact_match": "json_exact",
    "json_negative": "json_negative",
}
HARM = {"cut", "loops", "abrupt", "control", "empty", "copied", "garbled", "runs_on"}  # true of a bad answer


@dataclass(frozen=True)
class Ratio:
    """A metric that is the ratio of two sums over rows, keys of their records."""

    top: str
    bottom: str = ""  # "": how many rows
    also: str = ""  # a key whose sum stands beside
    perplexity: bool = False  # e to the power of the ratio
    share: bool = False  # never above 1


RATIOS = {
    "assistant_perplexity": Ratio("nll", "tokens", "turns", perplexity=True),
    "all_token_perplexity": Ratio("all_nll", "all_tokens", "texts", perplexity=True),
    "json_field_match": Ratio("json_equal", "json_fields", share=True),
    "answer_tokens": Ratio("answer_tokens"),
    "reference_tokens": Ratio("reference_tokens"),
}
LARGEST_NLL = 700.0  # nats a token: e to the power of more is no float


def is_ratio(metric: str) -> bool:
    """Return whether the change of a metric is a ratio, as of perplexities."""
    return metric in RATIOS and RATIOS[metric].perplexity


def perplexity(nll: float, tokens: float) -> float:
    """Return exp(sum of the negative log-likelihoods in nats / number of tokens), capped at the range of a float."""
    return math.exp(min(nll / tokens, LARGEST_NLL))


# -- ends -------------------------------------------------------------------------------------------------------------
TERMINAL = ".!?…。！？｡．؟۔।॥።။។։"  # Unicode's Sentence_Terminal (UAX 29) of the scripts that chats are written in
CLOSING = "\"'>`|$"  # ends of a quotation, of a tag such as </tool_call>, of a fence, a table and a formula
MARKUP = "*_~ \t\n"  # closes an emphasis behind the end of a sentence


def ended(text: str) -> bool:
    """Return whether a text ends as a finished one.

    With a sentence's last mark, a closing bracket or quotation mark, a closed code fence, tag or table row; emoji and
    the stars of an emphasis behind it aside. Not so where a ``` is left open. In Latin script that is . ! ? …, in
    Chinese and Japanese 。！？ and 」』）】》, in others Unicode's Sentence_Terminal.
    """
    if text.count("```") % 2:
        return False
    text = text.rstrip(MARKUP)
    while text and text[-1] not in CLOSING and unicodedata.category(text[-1]) in ("So", "Sk", "Mn", "Cf"):
        text = text[:-1].rstrip(MARKUP)
    if not text:
        return False
    return text[-1] in TERMINAL + CLOSING or unicodedata.category(text[-1]) in ("Pe", "Pf")


# -- what is none of an answer ----------------------------------------------------------------------------------------
NAMED = re.compile(r"<\|[^\s<>|]{1,40}\|>")
THINK_TAG = re.compile(r"</?think>")
REPLACEMENT = "\ufffd"  # what bytes that are no UTF-8 are decoded to
COPY_SHARE = 0.8  # of the words of the longer one of two texts that are alike
COPY_WORDS = 3  # a question of fewer words may well be answered by itself
CUT_COPY_WORDS = 10  # of an answer that is only the beginning of its question
USER_TURN = re.compile(r"^\W{0,4}(?:user|human|用户)\W{0,3}(?:[:：]|$)", re.IGNORECASE | re.MULTILINE)
BOTH_TURNS = re.compile(
    r"\b(?:user|human|用户)[*\]]{0,3}[ \t]*[:：].*?\b(?:assistant|ai|bot|助手)[*\]]{0,3}[ \t]*[:：]",
    re.IGNORECASE | re.DOTALL,
)


def controls(text: str, special: Collection[str] = ()) -> set[str]:
    """Return the control tokens in a text: any of special (the tokenizer's), <|name|> and think tags.

    text: without what the family of the template writes around thought, text and calls. Source: what the clean_text
    of the day-2 tutorial takes out of data.
    """
    tokens = {token for token in special if token in text}
    tokens.update(NAMED.findall(text))
    tokens.update(THINK_TAG.findall(text))
    return tokens


def is_garbled(text: str, stopped: bool) -> bool:
    """Return whether replacement characters stand in a text; at the end of one that was cut they are half a letter."""
    if not stopped:
        text = text.rstrip(REPLACEMENT)
    return REPLACEMENT in text


def pad_words(words: Sequence[str]) -> str:
    """Return words as a text in which a search finds whole words, one behind the other too."""
    return "".join([f" {word} " for word in words])


def copies(text: str, question: str) -> bool:
    """Return whether a text is its question again, but for a fifth of the words: once, often, or a long beginning."""
    asked = split_words(question)
    said = split_words(text)
    if len(asked) < COPY_WORDS or not said:
        return False
    times = pad_words(said).count(pad_words(asked))
    if times * len(asked) >= COPY_SHARE * len(said):
        return True
    if Levenshtein.normalized_similarity(said, asked) >= COPY_SHARE:
        return True
    beginning = asked[: len(said)]
    return len(said) >= CUT_COPY_WORDS and Levenshtein.normalized_similarity(said, beginning) >= COPY_SHARE


def runs_on(text: str) -> bool:
    """Return whether a text goes on as the user: a turn of the user's in it, or turns of both in one line.

    Code in ``` fences is left out.
    """
    prose = FENCED.sub("", text)
    return USER_TURN.search(prose) is not None or BOTH_TURNS.search(prose) is not None


# -- one answer -------------------------------------------------------------------------------------------------------
@dataclass
class Question:
    """What the answer to a prompt is held against.

    reference: the data's own answer, taken apart, and its text as the template writes it. question: the last message
    of the user. special: the tokenizer's special tokens; allowed: those that the data's own answers hold.
    json: whether JSON is wanted, False where its row is a negative example (no JSON is right), None of other rows.
    schema: a JSON schema, where has_schema.
    """

    reference: Answer
    reference_text: str = ""
    question: str = ""
    special: Collection[str] = ()
    allowed: Collection[str] = ()
    json: bool | None = None
    schema: object = None
    has_schema: bool = False


def join_parts(answer: Answer) -> str:
    """Return all that an answer says: thought, text and calls."""
    parts = [answer.reasoning or "", answer.content]
    if answer.tool_calls:
        parts.append(json.dumps(answer.tool_calls, ensure_ascii=False))
    return "\n".join(parts)


def said_text(answer: Answer) -> str:
    """Return an answer without its thought, calls as JSON; "" where nothing was answered."""
    text = answer.content.strip()
    if answer.tool_calls:
        functions = [call["function"] for call in answer.tool_calls]
        text = f"{text}\n{json.dumps(functions, ensure_ascii=False, sort_keys=True)}".strip()
    return text


def has_gsm8k_form(text: str) -> bool:
    """Return whether the last line of a text is `#### number`."""
    last_line = text.rpartition("\n")[2]
    return last_line.startswith("####") and official_answer(last_line) is not None


def name_comparison(question: Question) -> str:
    """Return what exact_match compares of an answer and its reference, in words."""
    reference = question.reference
    if has_gsm8k_form(reference.content.strip()):
        return "number behind ####"
    if reference.tool_calls and reference.content.strip():
        return "text and calls"
    if reference.tool_calls:
        return "calls"
    if reference.reasoning:
        return "text behind the thought"
    return "text"


def exact_match(reference: Answer, answer: Answer) -> bool:
    """Return whether an answer is the reference, both without their thoughts; an empty answer never is.

    A reference whose last line is `#### x` is met by an answer with the same x, by GSM8K's official rule. Any other
    reference is met by its whole text and the same calls.
    """
    wanted = reference.content.strip()
    given = answer.content.strip()
    if has_gsm8k_form(wanted):
        return official_answer(given) == official_answer(wanted)
    said = said_text(answer)
    return bool(said) and said == said_text(reference)


def keeps_language(question: str, reference: str, answer: str, failed: str) -> bool | None:
    """Return whether an answer is in the language that question and reference are both clearly in.

    None where one of these is in none, or they differ (a translation). An answer without a language has lost it.
    """
    language = identify_language(reference)
    if not language or identify_language(question) != language:
        return None
    return not failed and is_in_language(answer, language)


def judge(
    question: Question,
    answer: Answer,
    text: str,
    stopped: bool,
    failed: str = "",
    languages: bool = True,
) -> dict[str, bool | int | str | None]:
    """Return the flags, counts and texts of one answer, as a record has them.

    text: the answer as it stands, with its thought. languages: whether same_language is looked at.

    usable         not empty, it stopped by itself, has no control token and no loop. Source: the day-2 tutorial (QLoRA
                   on one 16 GB card), whose evaluation says how many of 100 answers are usable
    empty          neither text nor calls; a thought that never ends is followed by neither
    cut            it did not stop by itself, or its thought or a call does not end
    loops          loops(), where the reference does not repeat itself too
    control        controls() less those of `allowed`
    abrupt         not ended(), where the reference is
    copied         copies(), where the reference does not
    garbled, runs_on    is_garbled(), runs_on(), where the reference is not and does not
    same_language  keeps_language()
    json_valid     strict JSON; of a negative example: something said, and not as JSON
    json_negative  the same of negative examples alone
    json_schema_valid, json_exact    it meets the schema; its fields are the reference's, all of them and no other

    An answer that failed counts against every rate that applies to its row.
    """
    said = said_text(answer)
    wanted = said_text(question.reference)
    final = answer.content.strip()
    target = question.reference.content.strip()
    tokens = controls(join_parts(answer), question.special) - set(question.allowed)
    flags = {
        "exact": exact_match(question.reference, answer),
        "stopped": stopped,
        "cut": not stopped or not answer.is_complete,
        "loops": loops(text, stopped) and not loops(question.reference_text, False),
        "control": bool(tokens),
        "empty": not said,
        "abrupt": None,
        "copied": None,
        "garbled": is_garbled(text, stopped) and REPLACEMENT not in question.reference_text,
        "runs_on": runs_on(final) and not runs_on(target),
        "same_language": None,
    }
    if ended(target):
        flags["abrupt"] = not ended(final)
    if not copies(target, question.question):
        flags["copied"] = copies(final, question.question)
    if languages:
        flags["same_language"] = keeps_language(question.question, target, final, failed)
    flags["usable"] = bool(said) and stopped and not flags["loops"] and not flags["control"]
    counts = judge_json(question, final, target, flags)
    if failed:
        for name, flag in flags.items():
            if flag is not None:
                flags[name] = name in HARM
    texts = {"said": said, "wanted": wanted, "compared": name_comparison(question), "failed": failed}
    return {**flags, **counts, **texts}


def judge_json(question: Question, final: str, target: str, flags: dict[str, bool | None]) -> dict[str, int]:
    """Return the fields of one answer, equal and all; its flags about JSON are added to `flags`."""
    for name in ("json_valid", "json_negative", "json_schema_valid", "json_exact"):
        flags[name] = None
    if question.json is None:
        return {"json_equal": 0, "json_fields": 0}
    if not question.json:
        flags["json_negative"] = bool(final) and not offers_json(final)
        flags["json_valid"] = flags["json_negative"]
        return {"json_equal": 0, "json_fields": 0}
    counts = json_fields(target, final)
    flags["json_valid"] = strict_json(final)
    flags["json_exact"] = counts.equal == counts.wanted == counts.given
    if question.has_schema:
        flags["json_schema_valid"] = schema_valid(question.schema, final)
    return {"json_equal": counts.equal, "json_fields": counts.wanted}


# -- sums -------------------------------------------------------------------------------------------------------------
Record = dict[str, object]
Metrics = dict[str, dict[str, float]]


def rows_of(metric: str, records: Sequence[Record]) -> list[Record]:
    """Return the records that a metric of RATIOS is taken over."""
    ratio = RATIOS[metric]
    if ratio.bottom:
        return [record for record in records if record[ratio.bottom]]
    return [record for record in records if record["failed"] == ""]


def bottom_of(ratio: Ratio, record: Record) -> float:
    return record[ratio.bottom] if ratio.bottom else 1


def sum_ratio(metric: str, records: Sequence[Record], seed: int) -> dict[str, float] | None:
    """Return the figure of a metric of RATIOS, with its sums and rows; None where it has no rows."""
    ratio = RATIOS[metric]
    rows = rows_of(metric, records)
    if not rows:
        return None
    tops = [row[ratio.top] for row in rows]
    bottoms = [bottom_of(ratio, row) for row in rows]
    bootstrap = bootstrap_share if ratio.share else bootstrap_ratio
    interval = bootstrap(tops, bottoms, seed)
    value = sum(tops) / sum(bottoms)
    if ratio.perplexity:
        value = perplexity(sum(tops), sum(bottoms))
    figure = {"value": value}
    if interval is not None:
        figure |= scale_interval(interval, ratio)
    if ratio.bottom:
        figure |= {ratio.top.removeprefix("json_").removeprefix("all_"): sum(tops)}
        figure |= {ratio.bottom.removeprefix("json_").removeprefix("all_"): sum(bottoms)}
    if ratio.also:
        figure[ratio.also] = sum([row[ratio.also] for row in rows])
    return figure | {"rows": len(rows)}


def scale_interval(interval: Interval, ratio: Ratio) -> dict[str, float]:
    """Return {low, high}, of a perplexity from those of its nats."""
    if not ratio.perplexity:
        return {"low": interval.low, "high": interval.high}
    return {"low": perplexity(interval.low, 1), "high": perplexity(interval.high, 1)}


def answered_rows(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if record["failed"] == ""]


def distinct_answers(records: Sequence[Record]) -> dict[str, float] | None:
    """Return {value, distinct, references, rows}: how many answers differ, for each reference that does.

    A model that says one sentence to every question has 1 / references. None for fewer than FEWEST_ROWS answers, and
    where the data itself has one answer only.
    """
    rows = answered_rows(records)
    said = {row["said"] for row in rows}
    wanted = {row["wanted"] for row in rows}
    if len(rows) < FEWEST_ROWS or len(wanted) < 2:
        return None
    return {"value": len(said) / len(wanted), "distinct": len(said), "references": len(wanted), "rows": len(rows)}


def most_common_answer(records: Sequence[Record]) -> dict[str, float] | None:
    """Return {value, low, high, rows}: the share of the answer that is given most, less that of such a reference.

    It sees one answer for every question also where the data knows but two (yes and no).
    """
    rows = answered_rows(records)
    if len(rows) < FEWEST_ROWS:
        return None
    [(said, _)] = Counter([row["said"] for row in rows]).most_common(1)
    [(wanted, _)] = Counter([row["wanted"] for row in rows]).most_common(1)
    is_said = [row["said"] == said for row in rows]
    is_wanted = [row["wanted"] == wanted for row in rows]
    difference = rate_change(is_said, is_wanted)
    difference["rows"] = difference.pop("pairs")
    return difference


def is_measured(metric: str, record: Record) -> bool:
    """Return whether a metric of summarize() is taken over a record."""
    if metric in RATES:
        return record[RATES[metric]] is not None
    if metric in RATIOS:
        return bool(rows_of(metric, [record]))
    return record["failed"] == ""


def summarize(records: Sequence[Record], seed: int) -> Metrics:
    """Return every metric over records, as {metric: {value, low, high, counts…}}; one without data is left out.

    assistant_perplexity, all_token_perplexity: nll (nats), tokens, and turns or texts; bootstrap interval over rows.
    The metrics of RATES: count of total; interval by Wilson. language_retention: how many answers were not measured.
    json_field_match: equal of fields, over all rows; bootstrap interval over rows.
    answer_tokens, reference_tokens: mean length of the answers that did not fail and of the data's own, over rows;
    bootstrap interval over rows.
    distinct_answers, most_common_answer: see there.
    """
    metrics = {}
    for name in ("assistant_perplexity", "all_token_perplexity"):
        metrics[name] = sum_ratio(name, records, seed)
    for name, flag in RATES.items():
        metrics[name] = rate([record[flag] for record in records])
    if metrics["language_retention"]:
        answers = len([record for record in records if record["failed"] is not None])
        metrics["language_retention"]["not_measured"] = answers - metrics["language_retention"]["total"]
    for name in ("json_field_match", "answer_tokens", "reference_tokens"):
        metrics[name] = sum_ratio(name, records, seed)
    metrics["distinct_answers"] = distinct_answers(records)
    metrics["most_common_answer"] = most_common_answer(records)
    return {name: figure for name, figure in metrics.items() if figure}


def change(metric: str, tuned: Sequence[Record], base: Sequence[Record], seed: int) -> dict[str, float] | None:
    """Return {value, low, high, pairs} of a metric's change from base to tuned, records of the same rows in one order.

    A ratio for perplexities, a difference for the rest. Only rows that the metric applies to in both count; None where
    there are none, without low and high where they are too few to tell.
    """
    if metric in RATES:
        return change_of_rate(RATES[metric], tuned, base)
    if metric not in RATIOS or metric == "reference_tokens":  # the same of both
        return None
    ratio = RATIOS[metric]
    tops = []
    bottoms = []
    for after, before in zip(tuned, base, strict=True):
        if rows_of(metric, [after]) and rows_of(metric, [before]):
            tops.append(after[ratio.top] - before[ratio.top])  # what is below is the same of both: tokens, fields, rows
            bottoms.append(bottom_of(ratio, after))
    if not tops:
        return None
    value = sum(tops) / sum(bottoms)
    figure = {"value": perplexity(value, 1) if ratio.perplexity else value}
    interval = bootstrap_ratio(tops, bottoms, seed)
    if interval is None and value and len(tops) >= FEWEST_ROWS:
        interval = Interval(value, value)  # all pairs go the same way, as far
    if interval is not None:
        figure |= scale_interval(interval, ratio)
    return figure | {"pairs": len(tops)}


def change_of_rate(flag: str, tuned: Sequence[Record], base: Sequence[Record]) -> dict[str, float] | None:
    after = []
    before = []
    for one, other in zip(tuned, base, strict=True):
        if one[flag] is not None and other[flag] is not None:
            after.append(bool(one[flag]))
            before.append(bool(other[flag]))
    if not after:
        return None
    return rate_change(after, before)
