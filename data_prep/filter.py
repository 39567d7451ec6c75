"""Leave out rows that repeat themselves, refuse, are too long, speak another language, or whose answers disagree.

    python -m data_prep.filter data/chats --repetition --refusals --lang zh en --out data/filtered
    python -m data_prep.filter data/chats --recipe recipes/qwen3_qlora.py --max_chars 20000 --out data/fits
    python -m data_prep.filter judged.jsonl --agreement --refusals --out data/agreed
    python -m data_prep.filter judged.jsonl --agreement --export preference --out pairs.jsonl

PATH is a dataset folder or a file of rows. Each flag is a rule; a row stays that falls to none:
  --repetition   over half (or the share given) of the 10-grams of an answer or its reasoning stand in it more than
                 once: data-juicer's word_repetition_filter. Where most words are single characters (Chinese,
                 Japanese, Korean) 20 make an n-gram, as a word there has about two. Code in ``` fences is not looked
                 at. (Gopher's thresholds, made for web pages, refuse 28% of GSM8K's longer answers.)
  --refusals     an answer begins (REFUSAL_WITHIN characters) with a phrase of REFUSALS, English or Chinese
  --min_chars    characters that every answer has at least; --max_chars that all messages have together at most
  --min_turns, --max_turns    messages of user and assistant
  --max_length   tokens, as the template renders the row; --recipe brings template, tokenizer and length, and the rows
                 that the template refuses, or of which nothing would be trained, are left out, too
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

OUT is a dataset folder or a .jsonl file; rejected.jsonl names the first rule that each row fell to. A flag that the
others leave unread is refused.

Exit 0: done. 1: no row is left. 2: bad input, one sentence.
"""

import re
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from data_prep.check import (
    CheckFlags,
    CheckOptions,
    Fault,
    check_language,
    check_template,
    load_options,
    read_flags,
    require_lengths,
)
from data_prep.common.chunks import Chunk
from data_prep.common.command_line import add_num_proc, make_parser, run_command
from data_prep.common.errors import InvalidRow, UsageError
from data_prep.common.json_text import dump_json
from data_prep.common.ngrams import repeated_share
from data_prep.common.parallel import parallel_map
from data_prep.common.readers import find_inputs, read_chunks
from data_prep.common.rendering import Renderer
from data_prep.common.row_keys import row_digest
from data_prep.common.rows import Message, Row
from data_prep.common.writer import ChunkResult, DatasetWriter, EncodedRows, Kind, encode_rows

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


MARKED = re.compile(r"####\s*(.+)")
BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
NUMBER = re.compile(r"(?<![A-Za-z0-9_.])-?\d[\d,]*(?:\.\d+)?")
BARE = re.compile(r"[^\w-]{0,3}(-?\d[\d,]*(?:\.\d+)?)\s*(?:[^\w\s]|[^\W\d_A-Za-z])?\W?")  # $1,200. 5% 12个, not 3 AM

PAIR_COLUMNS = ("id", "prompt", "chosen", "rejected", "tools", "source", "tags", "lang")


# -- what rows must be ------------------------------------------------------------------------------------------------
class FilterOptions(NamedTuple):
    """The flags: which rules rows must pass, None where one is not asked for, and what becomes of those that do."""

    repetition: float | None
    refusals: bool
    min_chars: int | None
    max_chars: int | None
    min_turns: int | None
    max_turns: int | None
    agreement: bool
    reference: str  # with agreement: the column of the right answer
    preference: bool  # with agreement: pairs are written
    is_jsonl: bool
    check: CheckFlags  # languages, and lengths in tokens

    def measures_tokens(self) -> bool:
        return self.check.recipe is not None or self.check.max_length is not None


Rule = Callable[[Row], Iterator[Fault]]


# -- agreement: which answer a row keeps ------------------------------------------------------------------------------
def bare_number(text: str) -> Fraction | None:
    """Return the number that a final answer is, None where it is none."""
    match = BARE.fullmatch(text.strip())
    return Fraction(match[1].replace(",", "")) if match else None


def stated_number(text: str) -> Fraction | None:
    """Return the number that a text states as its answer: in the last \\boxed{} or ####, or all of it; else None."""
    marked = BOXED.findall(text) or MARKED.findall(text) or [text]
    return bare_number(marked[-1])


def last_number(text: str) -> Fraction | None:
    numbers = NUMBER.findall(text)
    return Fraction(numbers[-1].replace(",", "")) if numbers else None


def numbers_agree(answer: str, other: str) -> bool | None:
    """Return whether two answers are the same number; None where neither states one."""
    number = stated_number(answer)
    other_number = stated_number(other)
    if number is None and other_number is None:
        return None
    if number is None:
        number = last_number(answer)
    if other_number is None:
        other_number = last_number(other)
    return number == other_number


def normalize_answer(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".。")


class Answers(NamedTuple):
    """What models answered to a prompt, by their letters."""

    prompt: list[Message]
    answers: dict[str, str]
    reasoning: dict[str, str]

    def message(self, letter: str) -> Message:
        message = {"role": "assistant", "content": self.answers[letter]}
        if letter in self.reasoning:
            message["reasoning_content"] = self.reasoning[letter]
        return message


def read_answers(row: dict) -> Answers:
    """Return the answers of a row; its own last message is A's where the row names no other. Raises InvalidRow."""
    answers = row.get("answers") or {}
    reasoning = row.get("answers_reasoning") or {}
    for name, value in (("answers", answers), ("answers_reasoning", reasoning)):
        if not isinstance(value, dict) or not all([isinstance(text, str) and text.strip() for text in value.values()]):
            raise InvalidRow("field of another type", f"{name} must hold a text for each letter")
    prompt = row["messages"]
    last = prompt[-1]
    if last["role"] == "assistant":
        prompt = prompt[:-1]
        own = last.get("content")
        if own and answers.get("A", own) == own:
            answers = {"A": own, **answers}
            if last.get("reasoning_content"):
                reasoning = {"A": last["reasoning_content"], **reasoning}
    if not prompt or prompt[-1]["role"] not in ("user", "tool"):
        raise InvalidRow("no question before the answer")
    return Answers(prompt, answers, reasoning)


def check_objective(row: dict, answers: dict[str, str], reference: str) -> None:
    """Raise InvalidRow where A's answer is not the right one. reference: the column of the right answer."""
    expected = row.get(reference)
    if expected is None or expected == "":
        expected = answers.get("C")
    if isinstance(expected, bool) or not isinstance(expected, (str, int, float)):
        raise InvalidRow("no reference and no answer C")
    if "A" not in answers:
        raise InvalidRow("no answer A")
    answer = answers["A"]
    expected = str(expected)
    verdict = row.get("verdict")
    if not isinstance(verdict, dict):
        verdict = {}
    agree = verdict.get("agree")
    if agree is not None and not isinstance(agree, bool):
        raise InvalidRow("field of another type", "agree of the verdict must be true or false")
    same = numbers_agree(answer, expected)
    if same is False:
        raise InvalidRow("answers disagree", f"{stated_number(answer) or last_number(answer)}, not {expected[-60:]!r}")
    if agree is False:
        raise InvalidRow("verifier disagrees", str(verdict.get("said") or "")[-120:])
    if same is None and agree is None and normalize_answer(answer) != normalize_answer(expected):
        raise InvalidRow("no verdict", "and the texts are not equal")


class Judged(NamedTuple):
    """The letters of the two answers that a model judged."""

    better: str
    worse: str


def read_judgement(judgement: object, answers: dict[str, str]) -> Judged:
    """Return the letters of both answers. Raises InvalidRow."""
    roles = judgement.get("roles") if isinstance(judgement, dict) else None
    judged = []
    if isinstance(roles, dict):
        judged = sorted([roles.get(name) or "" for name in "AB"])
    if len(set(judged)) != 2 or not all([letter in answers for letter in judged]):
        raise InvalidRow("judgement without its answers", f"roles {roles!r}, answers {', '.join(answers)}")
    winner = judgement.get("winner")
    if winner == "tie":
        raise InvalidRow("tie")
    if winner not in judged:
        raise InvalidRow("judgement without a winner", repr(winner))
    judged.remove(winner)
    return Judged(winner, judged[0])


def choose_answer(row: Row, options: FilterOptions) -> dict:
    """Return the row with the answer that the models agree on, or as a preference pair. Raises InvalidRow."""
    answers = read_answers(row)
    if not row.get("judgement"):
        if options.preference:
            raise InvalidRow("no judgement")
        check_objective(row, answers.answers, options.reference)
        return {**row, "messages": [*answers.prompt, answers.message("A")]}
    judged = read_judgement(row["judgement"], answers.answers)
    chosen = answers.message(judged.better)
    row = {**row, "messages": [*answers.prompt, chosen]}
    if options.preference:
        row |= {"prompt": answers.prompt, "chosen": [chosen], "rejected": [answers.message(judged.worse)]}
    return row


# -- the rules --------------------------------------------------------------------------------------------------------
def check_repetition(row: Row, options: FilterOptions) -> Iterator[Fault]:
    for number, turn in enumerate(row["messages"]):
        if turn["role"] != "assistant":
            continue
        for name in ("content", "reasoning_content"):
            share = repeated_share(turn.get(name) or "")
            if share > options.repetition:
                place = f"message {number}" if name == "content" else f"message {number}, reasoning"
                yield Fault("repetition", f"{place}: {share:.0%} of its n-grams stand there again")
                return


def check_refusals(row: Row) -> Iterator[Fault]:
    for number, turn in enumerate(row["messages"]):
        if turn["role"] != "assistant":
            continue
        start = (turn.get("content") or "")[: REFUSAL_WITHIN * 2].replace("’", "'")
        for sentence in SENTENCE.finditer(start[:REFUSAL_WITHIN]):
            match = REFUSAL.match(start, sentence.end())
            if match:
                yield Fault("refusal", f"message {number}: {match[0]!r}")
                return


def check_characters(row: Row, options: FilterOptions) -> Iterator[Fault]:
    size = 0
    for turn in row["messages"]:
        size += len(turn.get("content") or "") + len(turn.get("reasoning_content") or "")
    if options.max_chars is not None and size > options.max_chars:
        yield Fault("too long", f"{size} characters")
    if options.min_chars is None:
        return
    for number, turn in enumerate(row["messages"]):
        size = len(turn.get("content") or "")
        if turn["role"] == "assistant" and not turn.get("tool_calls") and size < options.min_chars:
            yield Fault("too short", f"message {number}: {size} characters")


def check_turns(row: Row, options: FilterOptions) -> Iterator[Fault]:
    count = sum([turn["role"] in ("user", "assistant") for turn in row["messages"]])
    if options.min_turns is not None and count < options.min_turns:
        yield Fault("too few turns", str(count))
    if options.max_turns is not None and count > options.max_turns:
        yield Fault("too many turns", str(count))


@cache
def load_rules(options: FilterOptions) -> list[Rule]:
    """Return the rules that the flags ask for, the cheapest first. Raises UsageError."""
    rules = []
    if options.min_chars is not None or options.max_chars is not None:
        rules.append(partial(check_characters, options=options))
    if options.min_turns is not None or options.max_turns is not None:
        rules.append(partial(check_turns, options=options))
    if options.refusals:
        rules.append(check_refusals)
    if options.repetition is not None:
        rules.append(partial(check_repetition, options=options))
    if options.check.languages:
        rules.append(partial(check_language, options=CheckOptions(Renderer(), options.check.languages)))
    if options.measures_tokens():
        rules.append(partial(check_template, options=load_lengths(options.check)))
    return rules


def load_lengths(flags: CheckFlags) -> CheckOptions:
    """Return what rows are measured by. Raises UsageError."""
    options = load_options(flags, quiet=True)
    require_lengths(options, flags.recipe or "--max_length")
    return options


# -- many rows --------------------------------------------------------------------------------------------------------
def filter_chunk(chunk: Chunk, options: FilterOptions) -> ChunkResult:
    """Return the rows of a chunk that pass all rules, and the first fault of each of the others."""
    result = ChunkResult()
    kept = []
    for location, row in result.usable_rows(chunk, Path(chunk.file).stem):
        try:
            if options.agreement:
                row = choose_answer(row, options)
            for rule in load_rules(options):
                for fault in rule(row):
                    raise InvalidRow(*fault)
            kept.append(row)
        except InvalidRow as error:
            result.reject(location, error)
    result.encoded = {chunk.split: encode_pairs(kept) if options.preference else encode_rows(kept, options.is_jsonl)}
    return result


def encode_pairs(rows: list[dict]) -> EncodedRows:
    """Encode preference pairs as JSON lines. TRL takes a row with messages beside them for no pair at all."""
    pairs = [{name: row[name] for name in PAIR_COLUMNS if row.get(name)} for row in rows]
    return EncodedRows(
        ids=[pair["id"] for pair in pairs],
        digests=b"".join([row_digest(pair) for pair in pairs]),
        kinds=Counter([Kind(row["source"], row["lang"], "preference") for row in rows]),
        lines=[dump_json(pair) for pair in pairs],
    )


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("path", metavar="PATH", help="rows: a file or a dataset folder")
    parser.add_argument("--out", type=Path, required=True, help="NAME.jsonl, or a folder that does not exist yet")
    parser.add_argument(
        "--repetition",
        type=float,
        nargs="?",
        const=0.5,
        metavar="SHARE",
        help="leave out answers that repeat themselves, over this share (default 0.5)",
    )
    parser.add_argument("--refusals", action="store_true", help="leave out answers that begin with a refusal")
    for name in ("min_chars", "max_chars", "min_turns", "max_turns"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--max_length", type=int, help="tokens; needs --recipe or --model_name_or_path")
    parser.add_argument("--recipe", help="takes template, tokenizer and max_length from its DEFAULTS; flags win")
    parser.add_argument("--chat_template_path", help="template, instead of the recipe's")
    parser.add_argument("--model_name_or_path", help="folder or hub id of the tokenizer, instead of the recipe's")
    parser.add_argument("--lang", nargs="+", help="languages that rows and answers may have: zh en ja ko")
    parser.add_argument("--agreement", action="store_true", help="Blossom's rules on answers, verdict and judgement")
    parser.add_argument("--reference", help="with --agreement: the column of the right answer, default reference")
    parser.add_argument(
        "--export",
        choices=("winner", "preference"),
        help="with --agreement: the better answer (default), or both as a pair",
    )
    add_num_proc(parser)
    return run_command(parser, run)


def read_options(args: Namespace) -> FilterOptions:
    """Return the rules that the flags ask for. Raises UsageError where one would not be read."""
    if args.export == "preference" and not (args.agreement and args.out.suffix == ".jsonl"):
        raise UsageError("--export preference: pass --agreement and a .jsonl file as --out, a folder keeps no pairs")
    for name in ("reference", "export"):
        if getattr(args, name) is not None and not args.agreement:
            raise UsageError(f"--{name}: read with --agreement only: pass both, or neither")
    if args.max_length is not None and not (args.recipe or args.model_name_or_path):
        raise UsageError("--max_length: needs a tokenizer: pass --recipe or --model_name_or_path")
    for name in ("chat_template_path", "model_name_or_path"):
        if getattr(args, name) is not None and args.recipe is None and args.max_length is None:
            raise UsageError(f"--{name}: read for lengths in tokens only: pass --max_length or --recipe as well")
    if args.repetition is not None and not 0 <= args.repetition < 1:
        raise UsageError(f"--repetition {args.repetition}: pass a share of at least 0, below 1")
    return FilterOptions(
        args.repetition,
        args.refusals,
        args.min_chars,
        args.max_chars,
        args.min_turns,
        args.max_turns,
        args.agreement,
        args.reference or "reference",
        args.export == "preference",
        args.out.suffix == ".jsonl",
        read_flags(args),
    )


def run(args: Namespace) -> int:
    """Return the exit code; raise UsageError."""
    options = read_options(args)
    if not load_rules(options) and not options.agreement:
        raise UsageError("no rule is asked for: pass --repetition, --refusals, --max_chars or another, see --help")
    paths = find_inputs([args.path])
    with DatasetWriter(args.out, "filter.py") as writer:
        chunks = read_chunks(paths, writer.input_hashes)
        for result in parallel_map(partial(filter_chunk, options=options), chunks, args.num_proc):
            writer.add(result)
        return writer.finish(args.path)


if __name__ == "__main__":
    sys.exit(main())
