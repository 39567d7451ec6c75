"""Leave out rows that repeat themselves, refuse, are too long, speak another language, or whose answers disagree.

    python -m data_prep.filter data/chats --repetition --refusals --lang zh en --out data/filtered
    python -m data_prep.filter data/chats --recipe recipes/qwen3_qlora.py --max_chars 20000 --out data/fits
    python -m data_prep.filter judged.jsonl --agreement --refusals --out data/agreed
    python -m data_prep.filter judged.jsonl --agreement --export preference --out pairs.jsonl

PATH is a dataset folder or a file of rows. Each flag is a rule; a row stays where none is against it:
  --repetition   over half (or the share given) of the 10-grams of an answer or its reasoning stand in it more than
                 once: data-juicer's word_repetition_filter. Words are ngrams.py's; where most are single characters
                 (Chinese, Japanese, Korean) 20 make an n-gram, as a word there has about two. Code in ``` fences is
                 not looked at. (Gopher's thresholds, made for web pages, refuse 28% of GSM8K's longer answers.)
  --refusals     an answer begins (REFUSAL_WITHIN characters) with a phrase of REFUSALS, English or Chinese
  --min_chars    characters that every answer has at least; --max_chars that all messages have together at most
  --min_turns, --max_turns    messages of user and assistant
  --max_length   tokens, as the template renders the row; --recipe brings template, tokenizer and length
  --lang         the row's and its answers' language is one of these
  --agreement    Blossom's rules on columns that data_prep/generate.py writes to .jsonl rows, one letter a model:
    {"answers": {"A": str, "B": str, "C": str}, "answers_reasoning"?: {"B": str}, "reference"?: str or number,
     "verdict"?: {"agree": bool}, "judgement"?: {"roles": {"A": letter, "B": letter}, "winner": letter or "tie"}}
    Without an answer A the row's own last message is it.
    objective (no judgement): A's answer must agree with the reference or, where there is none, with C's answer. Numbers
    decide where the final answers are some (#### n, \\boxed{n}, a bare number; against one of these the last number of
    the other text), and the verdict of B must not speak against them; without numbers the verdict decides, without a
    verdict the texts must be equal but for case, blanks and full stops. The row gets A's answer.
    subjective (judgement): two models answered, a third judged them under names drawn by seed (roles); winner is one of
    the two. The row gets the winner's answer; a tie is left out. --export preference writes rows {"id", "prompt",
    "chosen", "rejected", …} for preference training (TRL's DPOTrainer) instead, and leaves objective rows out.

OUT is a dataset folder or a .jsonl file; rejected.jsonl names the first rule that each row fell to.

Exit 0: done. 1: no row is left. 2: bad input, one sentence.
"""

import re
import sys
from collections import Counter
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np

from data_prep.check import against_of, template, wrong_language
from data_prep.common.command_line import add_num_proc, format_counts, make_parser, run_command
from data_prep.common.errors import InvalidRow, UsageError
from data_prep.common.json_text import dump_json
from data_prep.common.ngrams import hashed, ngrams, words
from data_prep.common.parallel import parallel_map
from data_prep.common.readers import find_inputs, read_chunks
from data_prep.common.row_keys import row_digest
from data_prep.common.rows import check_shape, complete_row, refuse_unkept
from data_prep.common.writer import ChunkResult, DatasetWriter, EncodedRows, encode_rows, row_location

REFUSAL_WITHIN = 120  # characters; further on the same words are mostly advice or a quotation
CANNOT = r"(?:i\ (?:can'?t|cannot|can\ not|won'?t|am\ unable|am\ not\ able)|i'm\ (?:unable|not\ able))"
WHAT = r"(?:assist|help|comply|fulfil|provide|do\ that|engage|create|generate|support|answer|write|discuss)"
AN_AI = r"(?:as\ an\ (?:ai|artificial\ intelligence)\b[^,.]{0,30},?\ )"
REFUSALS = {  # each stands at the start of a sentence; "as an AI, I have no opinion" is none: the answer mostly follows
    "en": rf"""
        (?:(?:i'?m|i\ am)\ (?:very\ |really\ |so\ )?)?sorry,?\ (?:but\ )?{AN_AI}?
            (?:{CANNOT}|i\ do\ not\ have|i\ don'?t\ have)\b
        |i\ (?:deeply\ |sincerely\ )?apologi[sz]e,?\ but\ {AN_AI}?{CANNOT}\b
        |(?:unfortunately,?\ )?{AN_AI}{CANNOT}\b
        |unfortunately,?\ {CANNOT}\b
        |{CANNOT}\ (?:to\ )?{WHAT}\b
    """,
    "zh": r"""
        (?:很|非常|十分)?(?:抱歉|对不起|遗憾)[，,。！!\ ]*(?:但是?|可是|不过)?[，,]?(?:作为[^，,。]{0,16}[，,]\ ?)?
            (?:我|本人)?(?:目前|暂时)?(?:无法|不能|没有办法|没办法|不可以|拒绝)
        |作为(?:一个|一名|一种)?(?:AI|人工智能)[^，,。]{0,10}[，,]\ ?(?:我|本人)?(?:目前|暂时)?(?:无法|不能)
        |我(?:无法|不能)(?:提供|回答|协助|帮助|满足|完成|执行|生成|讨论|参与|支持)
    """,
}
REFUSAL = re.compile("|".join(REFUSALS.values()), re.VERBOSE | re.IGNORECASE)
SENTENCE = re.compile(r"(?:^|[.!?。！？\n])[\s\"'“‘*]*")  # a refusal begins a sentence

NGRAM = 10  # words
FENCED = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)

MARKED = re.compile(r"####\s*(.+)")
BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
NUMBER = re.compile(r"(?<![A-Za-z0-9_.])-?\d[\d,]*(?:\.\d+)?")
BARE = re.compile(r"[^\w-]{0,3}(-?\d[\d,]*(?:\.\d+)?)\s*(?:[^\w\s]|[^\W\d_A-Za-z])?\W?")  # $1,200. 5% 12个, not 3 AM


# -- agreement: which answer a row keeps ------------------------------------------------------------------------------
def number_in(text):
    """The number that a final answer is, as a Fraction; None where it is none."""
    found = BARE.fullmatch(text.strip())
    return Fraction(found[1].replace(",", "")) if found else None


def stated(text):
    """The number that a text states as its answer: in the last \\boxed{} or ####, or all of it; else None."""
    marked = BOXED.findall(text) or MARKED.findall(text)
    return number_in(marked[-1] if marked else text)


def last_number(text):
    found = NUMBER.findall(text)
    return Fraction(found[-1].replace(",", "")) if found else None


def numbers_agree(one, other):
    """Whether two answers are the same number; None where neither states one."""
    a, b = stated(one), stated(other)
    if a is None and b is None:
        return None
    return (last_number(one) if a is None else a) == (last_number(other) if b is None else b)


def simple(text):
    return " ".join(text.casefold().split()).rstrip(".。")


def answers_of(row):
    """({letter: answer}, {letter: reasoning}, the row's messages before the answer); raises InvalidRow."""
    answers, reasoning = row.get("answers") or {}, row.get("answers_reasoning") or {}
    for name, value in (("answers", answers), ("answers_reasoning", reasoning)):
        if not isinstance(value, dict) or not all(isinstance(text, str) and text.strip() for text in value.values()):
            raise InvalidRow("field of another type", f"{name} must hold a text for each letter")
    turns, last = row["messages"], row["messages"][-1]
    if last["role"] == "assistant":
        own = {name: last[key] for name, key in (("answer", "content"), ("reasoning", "reasoning_content"))
               if last.get(key)}  # fmt: skip
        turns = turns[:-1]
        if "answer" in own and answers.get("A", own["answer"]) == own["answer"]:
            answers = {"A": own["answer"], **answers}
            reasoning = {"A": own["reasoning"], **reasoning} if "reasoning" in own else reasoning
    return answers, reasoning, turns


def objective(row, answers, reference):
    """The letter of the answer that is right, A; raises InvalidRow."""
    other = row.get(reference)
    other = answers.get("C") if other in (None, "") else other
    if isinstance(other, bool) or not isinstance(other, (str, int, float)):
        raise InvalidRow("no reference and no answer C")
    if "A" not in answers:
        raise InvalidRow("no answer A")
    verdict, answer, other = row.get("verdict"), answers["A"], str(other)
    agree = verdict.get("agree") if isinstance(verdict, dict) else None
    if agree is not None and not isinstance(agree, bool):
        raise InvalidRow("field of another type", "agree of the verdict must be true or false")
    same = numbers_agree(answer, other)
    if same is False:
        raise InvalidRow("answers disagree", f"{stated(answer) or last_number(answer)}, not {other[-60:]!r}")
    if agree is False:
        raise InvalidRow("verifier disagrees", str(verdict.get("said") or "")[-120:])
    if same is None and agree is None and simple(answer) != simple(other):
        raise InvalidRow("no verdict", "and the texts are not equal")
    return "A"


def subjective(row, answers):
    """(letter of the better answer, of the other); raises InvalidRow."""
    judgement = row["judgement"]
    roles = judgement.get("roles") if isinstance(judgement, dict) else None
    shown = sorted(roles.get(name) or "" for name in "AB") if isinstance(roles, dict) else []
    if not all(letter in answers for letter in shown) or len({*shown}) != 2:
        raise InvalidRow("judgement without its answers", f"roles {roles!r}, answers {', '.join(answers)}")
    winner = judgement.get("winner")
    if winner == "tie":
        raise InvalidRow("tie")
    if winner not in shown:
        raise InvalidRow("judgement without a winner", repr(winner))
    return winner, shown[shown[0] == winner]


def agreed(row, reference, preference):
    """The row with the answer that the models agree on, or as a preference pair; raises InvalidRow."""
    answers, reasoning, turns = answers_of(row)
    if not turns or turns[-1]["role"] not in ("user", "tool"):
        raise InvalidRow("no question before the answer")

    def message(letter):
        told = {"reasoning_content": reasoning[letter]} if letter in reasoning else {}
        return {"role": "assistant", "content": answers[letter]} | told

    if not row.get("judgement"):
        if preference:
            raise InvalidRow("no judgement")
        return row | {"messages": [*turns, message(objective(row, answers, reference))]}
    better, other = subjective(row, answers)
    row = row | {"messages": [*turns, message(better)]}
    return row | {"prompt": turns, "chosen": [message(better)], "rejected": [message(other)]} if preference else row


# -- the rules: a row -> (reason, detail) of what is against it -------------------------------------------------------
def answers_in(row):
    """Yield (where, text) of every answer and its reasoning."""
    for number, turn in enumerate(row["messages"]):
        for field in ("content", "reasoning_content") if turn["role"] == "assistant" else ():
            if turn.get(field):
                yield f"message {number}" + (", reasoning" if field != "content" else ""), turn[field]


def repetition(row, given):
    for where, text in answers_in(row):
        share = repeated(words(FENCED.sub("", text) if "```" in text else text))
        if share > given.repetition:
            yield "repetition", f"{where}: {share:.0%} of its n-grams stand there again"
            return


def repeated(found):
    """The share of the n-grams of these words that stand among them more than once."""
    single = sum(len(word) == 1 and not word.isascii() for word in found)
    grams = ngrams(hashed(found), NGRAM * 2 if single * 2 > len(found) else NGRAM)
    if not len(grams):
        return 0.0
    _, counts = np.unique(grams, return_counts=True)
    return counts[counts > 1].sum() / len(grams)


def refusals(row, given):
    for where, text in answers_in(row):
        begin = text[: REFUSAL_WITHIN * 2].replace("’", "'")
        for start in SENTENCE.finditer(begin[:REFUSAL_WITHIN]):
            if (hit := REFUSAL.match(begin, start.end())) and "reasoning" not in where:
                yield "refusal", f"{where}: {hit[0]!r}"
                return


def characters(row, given):
    sizes = [len(turn.get(field) or "") for turn in row["messages"] for field in ("content", "reasoning_content")]
    if given.max_chars is not None and sum(sizes) > given.max_chars:
        yield "too long", f"{sum(sizes)} characters"
    for number, turn in enumerate(row["messages"]):
        short = given.min_chars is not None and len(turn.get("content") or "") < given.min_chars
        if short and turn["role"] == "assistant" and not turn.get("tool_calls"):
            yield "too short", f"message {number}: {len(turn.get('content') or '')} characters"


def turns(row, given):
    count = sum(turn["role"] in ("user", "assistant") for turn in row["messages"])
    if given.min_turns is not None and count < given.min_turns:
        yield "too few turns", str(count)
    if given.max_turns is not None and count > given.max_turns:
        yield "too many turns", str(count)


def rules_of(given):
    """The rules that the flags ask for, the cheapest first."""
    sized = {characters: (given.min_chars, given.max_chars), turns: (given.min_turns, given.max_turns)}
    rules = [rule for rule, flags in sized.items() if any(flag is not None for flag in flags)]
    rules += [refusals] * given.refusals + [repetition] * (given.repetition is not None)
    against = against_of(given.recipe, given.chat_template_path, given.model_name_or_path, given.max_length,
                         tuple(given.lang), told=False)  # fmt: skip
    checks = [wrong_language] * bool(given.lang) + [template] * bool(against.max_length)
    return rules + [partial(check_rule, check=check, against=against) for check in checks]


def check_rule(row, given, check, against):
    yield from check(row, against)


# -- many rows --------------------------------------------------------------------------------------------------------
def work(block, given):
    """Result of a Block."""
    result, rows, rules = ChunkResult(), [], rules_of(given)
    preference = given.export == "preference"
    for line, row in block.rows():
        result.rows_in += 1
        where = row_location(block.file, line, row)
        try:
            row = complete_row(check_shape(row), Path(block.file).stem, line)
            if given.agreement:
                row = agreed(row, given.reference, preference)
            refuse_unkept(row, given.out)
            fault = next((fault for rule in rules for fault in rule(row, given)), None)
            if fault:
                raise InvalidRow(*fault)
            rows.append(row)
        except InvalidRow as refusal:
            result.rejected.append(where | {"reason": refusal.reason, "detail": refusal.detail})
    made = pairs(rows) if preference else encode_rows(rows, given.out.suffix == ".jsonl")
    result.encoded = {block.split: made}
    return result


def pairs(rows):
    """Packed JSON lines of preference pairs. TRL takes a row with messages beside them for no pair at all."""
    names = ("id", "prompt", "chosen", "rejected", "tools", "source", "tags", "lang")
    counts = Counter((row["source"], row["lang"], "preference") for row in rows)
    rows = [{name: row[name] for name in names if row.get(name)} for row in rows]
    data, digests = b"".join([dump_json(row) + b"\n" for row in rows]), b"".join(map(row_digest, rows))
    return EncodedRows(data, [row["id"] for row in rows], digests, counts, Counter())


def main():
    parser = make_parser(__doc__)
    parser.add_argument("path", metavar="PATH", help="rows: a file or a dataset folder")
    parser.add_argument("--out", type=Path, required=True, help="NAME.jsonl, or a folder that does not exist yet")
    parser.add_argument("--repetition", type=float, nargs="?", const=0.5, metavar="SHARE",
                        help="leave out answers that repeat themselves, over this share (default 0.5)")  # fmt: skip
    parser.add_argument("--refusals", action="store_true", help="leave out answers that begin with a refusal")
    for name in ("min_chars", "max_chars", "min_turns", "max_turns"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--max_length", type=int, help="tokens; needs --recipe or --model_name_or_path")
    parser.add_argument("--recipe", help="takes template, tokenizer and max_length from its DEFAULTS; flags win")
    parser.add_argument("--chat_template_path", help="template, instead of the recipe's")
    parser.add_argument("--model_name_or_path", help="folder or hub id of the tokenizer, instead of the recipe's")
    parser.add_argument("--lang", nargs="+", default=(), help="languages that rows and answers may have: zh en ja ko")
    parser.add_argument("--agreement", action="store_true", help="Blossom's rules on answers, verdict and judgement")
    parser.add_argument("--reference", default="reference", help="with --agreement: the column of the right answer")
    parser.add_argument("--export", choices=("winner", "preference"), default="winner",
                        help="with --agreement: the better answer (default), or both as a pair")  # fmt: skip
    add_num_proc(parser)
    return run_command(parser, run)


def run(args):
    """The exit code; raises UsageError."""
    if args.export == "preference" and not (args.agreement and args.out.suffix == ".jsonl"):
        raise UsageError("--export preference: pass --agreement and a .jsonl file as --out, a folder keeps no pairs")
    if args.max_length and not (args.recipe or args.model_name_or_path):
        raise UsageError("--max_length: needs a tokenizer: pass --recipe or --model_name_or_path")
    if not rules_of(args) and not args.agreement:
        raise UsageError("no rule is asked for: pass --repetition, --refusals, --max_chars or another, see --help")
    paths = find_inputs([args.path])
    with DatasetWriter(args.out, "filter.py") as writer:
        for result in parallel_map(partial(work, given=args), read_chunks(paths, writer.input_hashes), args.num_proc):
            writer.add(result)
        if not writer.rows_in:
            raise UsageError(f"{args.path}: no rows: pass rows of messages (python -m data_prep.normalize makes them)")
        kept, refused = sum(writer.rows_out.values()), format_counts(writer.refused)
        if not kept:
            print(f"all {writer.rows_in} rows refused ({refused})", file=sys.stderr)
            return 1
        writer.close()
    out = writer.refused.total()
    print(f"{args.out}: {kept:,} rows kept, {out:,} left out" + (f" ({refused})" if refused else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
