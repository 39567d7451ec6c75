"""The numbers of this room as pure functions: no model, no files.

A *record* is what one model did with one row; its keys count nothing (None) where they do not apply:
    nll, tokens, turns              summed loss (nats) of the scored assistant outputs, their tokens, how many outputs
    all_nll, all_tokens, texts      the same over every predicted token of the whole conversation (texts: 0 or 1)
    answer_tokens, reference_tokens    lengths of the generated answer and of the data's own, without the stop token
    failed                          why there is no answer (out of memory, timeout), "" where there is one
    json_equal, json_fields         fields of the reference's JSON that the answer has, and all of them
    the keys of RATES               booleans about the generated answer

Mostly the answer's *final text* is looked at, what follows its think block (final_text).
"""

import json
import math
import re
import unicodedata
from collections import Counter
from decimal import Decimal

import numpy as np
from jsonschema import Draft202012Validator
from jsonschema.validators import validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

Z95 = 1.959963984540054  # two-sided 95% quantile of the normal distribution
BOOTSTRAP_DRAWS = 1000
RATES = {  # metric: the flag that it counts
    "exact_match": "exact",
    "usability": "usable",
    "stop_rate": "stopped",
    "loop_rate": "loops",
    "abrupt_end_rate": "abrupt",
    "control_token_rate": "control",
    "empty": "empty",
    "failed": "failed",
    "language_retention": "same_language",
    "json_valid": "json_valid",
    "json_schema_valid": "json_schema_valid",
    "json_exact_match": "json_exact",
    "json_negative": "json_negative",
}
HARM = {"loops", "abrupt", "control", "empty"}  # flags that are true of a bad answer

ALONE = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
ALONE += "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff\uac00-\ud7a3"  # kana, Han, Hangul
WORD = re.compile(rf"[{ALONE}]|[^\W_{ALONE}]+")
FENCED = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
LOOP_SHARE, NGRAM = 0.5, 10  # of the n-grams; words
TAIL_TIMES, TAIL_CHARACTERS = 8, 64
SCRIPTS = {
    "zh": re.compile("[\u3400-\u4dbf\u4e00-\u9fff]"),
    "ja": re.compile("[\u3041-\u30ff]"),
    "ko": re.compile("[\uac00-\ud7a3]"),
    "Latin": re.compile("[A-Za-z\u00c0-\u024f]"),
}
CLEAR = 2 / 3  # of the words are in one script
TERMINAL = ".!?…。！？｡．؟۔।॥።។။։"  # Unicode's Sentence_Terminal (UAX 29) of the scripts that chats are written in
CLOSING = "\"'>`|$"  # ends of a quotation, of a tag such as </tool_call>, of a fence, a table and a formula
MARKUP = "*_~ \t\n"  # closes an emphasis behind the end of a sentence
NAMED = re.compile(r"<\|[^\s<>|]{1,40}\|>")


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


def rate(flags):
    """{value, low, high, count, total} of booleans (None: does not apply, not counted); None where none applies."""
    flags = [bool(flag) for flag in flags if flag is not None]
    if not flags:
        return None
    low, high = wilson(sum(flags), len(flags))
    return {"value": sum(flags) / len(flags), "low": low, "high": high, "count": sum(flags), "total": len(flags)}


def ratio(top, bottom):
    return top / bottom


def perplexity(nll, tokens):
    """exp(sum of the negative log-likelihoods in nats / number of tokens); capped at e^700, the range of a float."""
    return math.exp(min(nll / tokens, 700.0))


def bootstrap(top, bottom, seed, statistic):
    """95% percentile interval (low, high) of statistic(sum of top, sum of bottom), resampling rows.

    top, bottom: one number a row. Rows, not tokens, are drawn with replacement (1,000 draws from a generator seeded
    anew on every call), because the tokens of one row depend on each other. A single row's interval has no width.
    Source: B. Efron and R. Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    top, bottom, draw = np.asarray(top, float), np.asarray(bottom, float), np.random.default_rng(seed)
    values = []
    for _ in range(BOOTSTRAP_DRAWS // 100):  # a hundred draws at a time: fast, and small for large sets
        pick = draw.integers(len(top), size=(100, len(top)))
        values += map(statistic, top[pick].sum(axis=1), bottom[pick].sum(axis=1))
    return tuple(float(value) for value in np.percentile(values, [2.5, 97.5]))


# -- one answer -------------------------------------------------------------------------------------------------------
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


def words(text):
    """Lower-case runs of letters and digits; in scripts without blanks between words, and in Korean, single characters.
    The rule of data_prep/ngrams.py."""
    return WORD.findall(unicodedata.normalize("NFKC", text).lower())


def repeated(text):
    """The share of the n-grams of a text's words that stand in it more than once, code in ``` fences left out.

    10 words, or 20 where most are single characters (Chinese, Japanese, Korean). The rule of data_prep/filter.py's
    --repetition, which is data-juicer's word_repetition_filter.
    """
    found = words(FENCED.sub("", text))
    single = sum(len(word) == 1 and not word.isascii() for word in found)
    size = NGRAM * 2 if single * 2 > len(found) else NGRAM
    counts = Counter(zip(*(found[shift:] for shift in range(size)), strict=False))
    return sum(count for count in counts.values() if count > 1) / counts.total() if counts else 0.0


def endless(text):
    """Whether a text ends in one unit over and over: at least 8 times and 64 characters, the last time perhaps cut.
    Catches what has no words (!!!!!!, one long word) and a loop too short for n-grams."""
    for size in range(1, len(text) // TAIL_TIMES + 1):
        tail = text[-max(TAIL_TIMES * size, TAIL_CHARACTERS) :]
        if len(tail) >= TAIL_CHARACTERS and tail[size:] == tail[:-size]:
            return True
    return False


def loops(text):
    """The n-gram loop: over half of the n-grams stand there again (repeated), or the end is endless; reasoning too."""
    return repeated(text) > LOOP_SHARE or endless(text.rstrip())


def ended(text):
    """Whether a text ends as a finished one: with a sentence's last mark, a closing bracket or quotation mark, a closed
    code fence, tag or table row; emoji and the stars of an emphasis behind it aside. Not so where a ``` is left open.

    In Latin script that is . ! ? …, in Chinese and Japanese 。！？ and 」』）】》, in others
    Unicode's Sentence_Terminal.
    """
    if text.count("```") % 2:
        return False
    text = text.rstrip(MARKUP)
    while text and text[-1] not in CLOSING and unicodedata.category(text[-1]) in ("So", "Sk", "Mn", "Cf"):
        text = text[:-1].rstrip(MARKUP)
    return bool(text) and (text[-1] in TERMINAL + CLOSING or unicodedata.category(text[-1]) in ("Pe", "Pf"))


def language(text):
    """zh, ja, ko or Latin where two thirds of at least two words are in that script, else None.

    By script as data_prep/rows.py tells languages (kana over a tenth of the Han characters makes both Japanese); a word
    is one of words(), so that a Chinese sentence with an English name in it stays Chinese. Code in fences is left out.
    """
    found = words(FENCED.sub("", text))
    counts = {name: sum(bool(script.search(word)) for word in found) for name, script in SCRIPTS.items()}
    if counts["ja"] > counts["zh"] / 10:
        counts["ja"] += counts.pop("zh")
    best = max(counts, key=counts.get)
    letters = sum(any(map(str.isalpha, word)) for word in found)
    return best if counts[best] >= max(2, CLEAR * letters) else None


def controls(text, special=()):
    """The control tokens in an output: any of special (the tokenizer's) and <|name|>, a think tag behind its think
    block. Source: what the clean_text of the day-2 tutorial takes out of data."""
    body = text.partition("</think>")[2] if text.lstrip().startswith("<think>") else text
    named = {token for token in special if token in text} - {"<think>", "</think>"}
    return named | set(NAMED.findall(text)) | set(re.findall("</?think>", body))


def strict_json(text):
    """Whether text, after its think block, is one JSON value as RFC 8259 has it: no NaN or Infinity (which Python's
    parser takes), no key twice in an object, nothing around it."""
    return bool(json_values(text))


def json_values(text):
    """[the value] of a text that strict_json takes, else []."""

    def constant(name):
        raise ValueError(name)

    def unique(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key twice")
        return dict(pairs)

    try:
        return [json.loads(final_text(text), parse_constant=constant, object_pairs_hook=unique)]
    except (ValueError, RecursionError):
        return []


def validator(schema):
    """A validator of a JSON schema, of the draft that it names (default 2020-12), which fetches nothing. Raises
    jsonschema's SchemaError."""
    kind = validator_for(schema, default=Draft202012Validator)
    kind.check_schema(schema)
    return kind(schema, registry=Registry())


def schema_valid(schema, text):
    """Whether text is strict JSON and meets a JSON schema."""
    try:
        return any(map(validator(schema).is_valid, json_values(text)))
    except (Unresolvable, RecursionError):  # a $ref to nowhere or to itself: nothing meets it
        return False


def leaves(value):
    """{path: value} of every field of a JSON value that holds no other: the paths of keys and places to its scalars."""
    found, waiting = {}, [((), value)]
    while waiting:
        path, one = waiting.pop()
        parts = one.items() if isinstance(one, dict) else enumerate(one) if isinstance(one, list) else ()
        inner = [((*path, key), part) for key, part in parts]
        waiting += inner
        found |= {} if inner else {path: one}
    return found


def json_fields(reference, answer):
    """(fields of the reference that the answer has with an equal value, fields of the reference, fields of the answer)
    of two texts; an answer that is no strict JSON has none. 1 equals 1.0, but not true or "1"."""
    wanted, [given] = leaves(*json_values(reference)), [leaves(value) for value in json_values(answer)] or [{}]
    equal = [
        path in given and given[path] == value and isinstance(given[path], bool) is isinstance(value, bool)
        for path, value in wanted.items()
    ]
    return sum(equal), len(wanted), len(given)


def offers_json(text):
    """Whether an answer is a JSON object or list, alone or in a ``` fence; an object also where it is not valid."""
    final = final_text(text)
    fence = re.search(r"```\w*\n(.*?)(?:```|\Z)", final, re.DOTALL)
    return any(part.startswith("{") or isinstance((json_values(part) or [0])[0], list)
               for part in (final, fence[1].strip() if fence else final))  # fmt: skip


def judge(reference, answer, stopped, failed="", question="", special=(), allowed=(), wants_json=False, schema=None):
    """The flags and counts of one answer, as a record has them; texts with their think blocks.

    usable         its final text is not empty, it stopped by itself, has no control token and no loop. Source: the
                   day-2 tutorial (QLoRA on one 16 GB card), whose evaluation says how many of 100 answers are usable
    loops, control, empty    loops(), controls() less those of `allowed` (which the data's own answers hold), no text
    abrupt         not ended(), where the reference is
    same_language  the language of its final text is the question's, where both are clear and the reference's is the
                   question's too (so not in a translation)
    json_valid     strict JSON; where the reference is none though JSON is the row's task (a negative example): not JSON
    json_negative  the same of negative examples alone: something said, and not as JSON
    json_schema_valid, json_exact    it meets the schema; its fields are the reference's, all of them and no other

    An answer that failed counts against every rate that applies to its row.
    """
    final, target = final_text(answer), final_text(reference)
    spoken, said = language(question), language(final)
    flags = {
        "exact": exact_match(reference, answer),
        "stopped": stopped,
        "loops": loops(answer),
        "control": bool(controls(answer, special) - set(allowed)),
        "empty": not answer.removeprefix("<think>").strip(),  # the prefix may be the prompt's
        "abrupt": not ended(final) if ended(target) else None,
        "same_language": said == spoken if spoken and spoken == language(target) and (said or failed) else None,
    }
    flags["usable"] = bool(final) and stopped and not flags["loops"] and not flags["control"]
    flags |= dict.fromkeys(("json_valid", "json_negative", "json_schema_valid", "json_exact"))
    counts = {"json_equal": 0, "json_fields": 0}
    if wants_json and strict_json(reference):
        equal, fields, given = json_fields(reference, answer)
        flags |= {"json_valid": strict_json(answer), "json_exact": equal == fields == given}
        flags["json_schema_valid"] = schema_valid(schema, answer) if schema is not None else None
        counts = {"json_equal": equal, "json_fields": fields}
    elif wants_json:
        flags["json_negative"] = flags["json_valid"] = bool(final) and not offers_json(answer)
    if failed:
        flags = {name: flag if flag is None else name in HARM for name, flag in flags.items()}
    return flags | counts | {"failed": failed}


def summarize(records, seed):
    """Every metric over records, as {metric: {"value", "low", "high", counts...}}; one without data is left out.

    assistant_perplexity, all_token_perplexity: nll (nats), tokens, and turns or texts; bootstrap interval over rows.
    The metrics of RATES: count of total; interval by Wilson.
    json_field_match: equal of fields, over all rows; bootstrap interval over rows.
    answer_tokens, reference_tokens: mean length of the answers that did not fail and of the data's own, over rows;
    bootstrap interval over rows.
    """
    out = {}
    for name, nll, tokens, parts in (
        ("assistant_perplexity", "nll", "tokens", "turns"),
        ("all_token_perplexity", "all_nll", "all_tokens", "texts"),
    ):
        if rows := [record for record in records if record[tokens]]:
            losses, counts = [row[nll] for row in rows], [row[tokens] for row in rows]
            low, high = bootstrap(losses, counts, seed, perplexity)
            sums = {"nll": sum(losses), "tokens": sum(counts), parts: sum(row[parts] for row in rows)}
            value = perplexity(sums["nll"], sums["tokens"])
            out[name] = {"value": value, "low": low, "high": high, **sums, "rows": len(rows)}
    for name, flag in RATES.items():
        if found := rate([record[flag] for record in records]):
            out[name] = found
    if rows := [record for record in records if record["json_fields"]]:
        equal, fields = [row["json_equal"] for row in rows], [row["json_fields"] for row in rows]
        low, high = bootstrap(equal, fields, seed, ratio)
        out["json_field_match"] = {"value": sum(equal) / sum(fields), "low": low, "high": high}
        out["json_field_match"] |= {"equal": sum(equal), "fields": sum(fields), "rows": len(rows)}
    answered = [record for record in records if record["failed"] == ""]
    for name in ("answer_tokens", "reference_tokens"):
        if answered:
            lengths = [record[name] for record in answered]
            low, high = bootstrap(lengths, [1] * len(lengths), seed, ratio)
            out[name] = {"value": sum(lengths) / len(lengths), "low": low, "high": high, "rows": len(lengths)}
    return out
