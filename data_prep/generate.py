"""Ask a model for what rows lack: second answers, verdicts, judgements, think and no_think twins, multi-turn reasoning.

    python -m data_prep.generate answer rows.jsonl --model M2 --base_url http://localhost:8000/v1 --out answered.jsonl
    python -m data_prep.generate judge answered.jsonl --model M3 --out judged.jsonl --price_out 0.3 --max_cost 5

The model answers at any OpenAI-compatible endpoint (vLLM, SGLang, llama.cpp, transformers serve, a provider). The key
comes from the environment variable that --api_key_env names; without one none is sent. Tasks:
  answer   another model's answer to the row's last question: column {"answers": {"A": the row's own, "B": the new}};
           over rows that have A and B it adds C, and so on. Its reasoning stands in {"answers_reasoning": {"B": ...}}
  verify   does A agree with the row's reference (--reference COLUMN), else with C? Column {"verdict": {"agree": bool,
           "against": "reference" or "C", "said": the model's words}}
  judge    which of A and B is better? Column {"judgement": {"roles": {"A": "B", "B": "A"}, "winner": "A", "B" or "tie",
           "said"}}: roles, drawn by seed, say which answer was shown under which name, winner names the column's
  twins    two rows of one: with and without reasoning (chat_template_kwargs enable_thinking), with the tags think or
           no_think, and pair:ID. One is the row as it is, the other's answers are new, each after the new ones before
           it; --both asks for both
  ifthink  three turns with reasoning from a single-turn instruction. From SmolLM3's playbook: prompts of Tulu 3's
           instruction-following subset as turn 1; turns 2 and 3 written by a model (Qwen3-32B) from a set of
           instruction types, as in Multi-IF; a reasoning trace for each turn by the same model. Ours, as the playbook
           shows neither prompts nor types: the words of IFTHINK; the types of INSTRUCTIONS (ids of IFEval), two drawn
           by seed from different groups, in column "instructions". No answer is checked against its instructions
filter.py reads the columns of the first three, for Blossom's rules. They need a .jsonl file as OUT, as a folder keeps
no columns of its own; twins and ifthink may go to a folder, which counts what it does not keep. A flag that a task does
not read (--reference, --both, --think, --no_think) is refused.

Every reply is kept at once in NAME.cache.sqlite beside OUT, under the hash of its request: after a stop of any kind,
the same command asks only what has no reply yet, and ends in the same bytes. A connection that fails or times out, 429
and 5xx are tried again (Retry-After, else exponential backoff with jitter); a reply that cannot be used (empty, no
verdict, no reasoning, a control token) is asked anew with the next seed, --tries times; then, or where an answer is
cut by --max_tokens, the row is refused by reason. A refused key, an unknown model, --max_failures failures in a row or
--max_cost stop the run: nothing is written but the cache, which keeps no failures. Prices are per million tokens; a
request is sent only where its whole --max_tokens could still be paid. Usage that a reply does not name is estimated at
4 bytes a token.

Exit 0: done, some rows may be refused. 1: no row is left (rejected.jsonl says why), or --max_cost is reached. 2: bad
input, one sentence.
"""

import asyncio
import json
import os
import random
import re
import string
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

import httpx2
from tqdm import tqdm

from data_prep.common.command_line import format_counts, make_parser, run_command
from data_prep.common.endpoint import Endpoint, EndpointOptions, OverBudget, Reply
from data_prep.common.errors import InvalidRow, UsageError
from data_prep.common.json_text import dump_json, load_json
from data_prep.common.parsing import parse_tool_call, parse_tools
from data_prep.common.readers import find_inputs, is_dataset_folder, open_splits, read_chunks
from data_prep.common.reply_cache import ReplyCache
from data_prep.common.row_keys import SWITCH
from data_prep.common.rows import Message, Row, check_messages, check_shape, complete_row, find_control_token
from data_prep.common.writer import ChunkResult, DatasetWriter, check_output_path, encode_rows, row_location

Result = TypeVar("Result")

VERIFY = """Below are a question, a reference answer and an answer to check. Does the answer come to the same result \
as the reference? Only the result counts: working, wording and format may differ.

[Question]
{question}

[Reference]
{reference}

[Answer to check]
{answer}

Compare in a few sentences. Then end with one line, either
VERDICT: AGREE
or
VERDICT: DISAGREE"""

JUDGE = """Below are a conversation and two answers to its last message. Which answer is better: more correct, more \
helpful, closer to what was asked? Length alone is no merit, nor is the order.

[Conversation]
{question}

[Answer A]
{a}

[Answer B]
{b}

Compare in a few sentences. Then end with one line, one of
VERDICT: A
VERDICT: B
VERDICT: TIE"""

IFTHINK = """A user sent this instruction to an assistant:

[Instruction]
{prompt}

Write the user's next two messages, in the language of the instruction. Each asks the assistant to write its answer \
anew under one more requirement, stated so exactly that a program could check it. It must not contradict the \
instruction, and the earlier requirements stay in force.
Second message: {second}.
Third message: {third}.

Reply with JSON only: {{"second": "...", "third": "..."}}"""


@dataclass
class Instruction:
    """A requirement that a later message of ifthink adds."""

    id: str  # in IFEval: GROUP:NAME
    text: str
    numbers: range | None = None  # to draw {n} from

    @property
    def group(self) -> str:
        return self.id.split(":")[0]


INSTRUCTIONS = [
    Instruction("length_constraints:number_words", "at most {n} words", range(60, 241, 20)),
    Instruction("length_constraints:number_sentences", "at least {n} sentences", range(3, 11)),
    Instruction("length_constraints:number_paragraphs", "exactly {n} paragraphs", range(2, 6)),
    Instruction("detectable_format:number_bullet_lists", "exactly {n} bullet points in markdown", range(2, 7)),
    Instruction("detectable_format:title", "a title in double angular brackets, such as <<a title>>"),
    Instruction("detectable_format:json_format", "the whole answer as JSON"),
    Instruction("keywords:existence", "a keyword, which the message names, must appear"),
    Instruction("keywords:forbidden_words", "a word, which the message names, must not appear"),
    Instruction("keywords:frequency", "a word, which the message names, must appear at least {n} times", range(2, 5)),
    Instruction("startend:end_checker", "the answer ends with a phrase that the message quotes"),
    Instruction("startend:quotation", "the whole answer in double quotation marks"),
    Instruction("punctuation:no_comma", "no comma anywhere"),
    Instruction("detectable_content:postscript", "a postscript at the end that begins with P.S."),
    Instruction("detectable_content:number_placeholders", "at least {n} placeholders in square brackets", range(1, 4)),
]

VERDICT = re.compile(r"[*_`\s]*VERDICT:[*_`\s]*(\w+)[*_`.\s]*")
FINAL = ("cut by length", "content filter")  # another sample would cost as much and end the same
WITHOUT_TEMPLATE = ("enable_thinking", "custom_instructions", "train_turns")  # template arguments that are not sent
BATCH = 500  # rows written at a time


# -- options, by the names of the flags -------------------------------------------------------------------------------
@dataclass
class RequestOptions:
    """What every request holds."""

    model: str
    max_tokens: int
    temperature: float
    seed: int
    tries: int  # samples, where a reply cannot be used
    think: dict  # what asks for reasoning
    no_think: dict  # what asks for none
    extra_body: dict


@dataclass
class TaskOptions:
    """What a task reads besides the row."""

    seed: int
    reference: str  # column of the right answer
    both: bool  # both twins are asked for


def options_of(kind: type[Result], args: Namespace) -> Result:
    """Return a dataclass of options, filled with the flags of the same names."""
    return kind(**{field.name: getattr(args, field.name) for field in fields(kind)})


# -- requests ---------------------------------------------------------------------------------------------------------
class Model:
    """The model at the endpoint."""

    def __init__(self, endpoint: Endpoint, options: RequestOptions) -> None:
        self.endpoint = endpoint
        self.options = options

    async def ask(
        self,
        turns: list[Message],
        parse: Callable[[Reply], Result],
        row: Row | None = None,
        think: bool | None = None,
    ) -> Result:
        """Return parse(reply) of the first reply that is usable and that parse takes; raise InvalidRow as the last did.

        row: its tools and template arguments are sent; think: whether reasoning is asked for, None: the model's habit.
        """
        options = self.options
        body = {"model": options.model, **make_request(turns, row)}
        body |= {"max_tokens": options.max_tokens, "temperature": options.temperature}
        for attempt in range(options.tries):
            asked = body | {"seed": options.seed + attempt}
            if think is not None:
                asked = merge_bodies(asked, options.think if think else options.no_think)
            asked = merge_bodies(asked, options.extra_body)
            asked = {name: value for name, value in asked.items() if value is not None}
            max_tokens = asked.get("max_tokens") or asked.get("max_completion_tokens") or options.max_tokens
            try:
                reply = await self.endpoint.complete(asked, attempt, max_tokens)
                check_usable(reply)
                return parse(reply)
            except InvalidRow as refusal:
                last_refusal = refusal
                if refusal.reason in FINAL or refusal.reason.startswith("server"):
                    break
        raise last_refusal


def merge_bodies(body: dict, more: dict) -> dict:
    """Return a request with more in it, objects joined."""
    merged = body | more
    for name, value in more.items():
        if isinstance(value, dict) and isinstance(body.get(name), dict):
            merged[name] = body[name] | value
    return merged


def make_request(turns: list[Message], row: Row | None) -> dict:
    """Return messages, tools and template arguments as OpenAI's API has them.

    A persona in custom_instructions (SmolLM3's template) is sent as the system message that it becomes.
    """
    body = {"messages": [to_api_message(turn) for turn in turns]}
    if row is None:
        return body
    kwargs = row["chat_template_kwargs"]
    persona = kwargs.get("custom_instructions")
    if persona and turns[0]["role"] != "system":
        if not isinstance(persona, str):
            raise InvalidRow("field of another type", "custom_instructions must be a string")
        body["messages"].insert(0, {"role": "system", "content": persona})
    if row.get("tools"):
        body["tools"] = parse_tools(row["tools"])
    sent_kwargs = {name: value for name, value in kwargs.items() if name not in WITHOUT_TEMPLATE}
    if sent_kwargs:
        body["chat_template_kwargs"] = sent_kwargs
    return body


def to_api_message(turn: Message) -> dict:
    """Return a message as the API has it: without reasoning, arguments of calls as text."""
    message = {"role": turn["role"], "content": turn.get("content") or ""}
    if turn.get("tool_calls"):
        message["tool_calls"] = [to_api_call(call) for call in turn["tool_calls"]]
    for name in ("tool_call_id", "name"):
        if turn.get(name):
            message[name] = turn[name]
    return message


def to_api_call(call: dict) -> dict:
    call = parse_tool_call(call)
    arguments = dump_json(call["function"]["arguments"]).decode()
    return call | {"function": call["function"] | {"arguments": arguments}}


# -- replies ----------------------------------------------------------------------------------------------------------
def check_usable(reply: Reply) -> None:
    """Raise InvalidRow for a reply that no row may hold."""
    if reply.finish_reason == "length":
        raise InvalidRow("cut by length", "pass a higher --max_tokens")
    if reply.finish_reason == "content_filter":
        raise InvalidRow("content filter")
    if reply.tool_calls:
        raise InvalidRow("answer is a tool call")
    if not reply.content:
        raise InvalidRow("empty answer")
    token = find_control_token([reply.content, reply.reasoning_content])
    if token:
        raise InvalidRow("control token in text", token)


def parse_object(text: str) -> dict:
    """Return the JSON object that a reply is, in a code fence too; {} where it is none."""
    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text.strip(), re.DOTALL)
    try:
        value = load_json(fenced[1] if fenced else text)
    except InvalidRow:
        return {}
    return value if isinstance(value, dict) else {}


@dataclass
class Verdict:
    """What a judge answers."""

    choice: str
    words: str  # the whole reply


def verdict_parser(*choices: str) -> Callable[[Reply], Verdict]:
    """Return the parser of replies that end with the line VERDICT: X, or are a JSON object with `verdict`."""

    def parse(reply: Reply) -> Verdict:
        match = VERDICT.fullmatch(reply.content.rsplit("\n", 1)[-1])
        choice = match[1] if match else parse_object(reply.content).get("verdict")
        if choice not in choices:
            raise InvalidRow("no verdict", f"ends with {reply.content[-80:]!r}")
        return Verdict(choice, reply.content)

    return parse


def parse_follow_ups(reply: Reply) -> list[str]:
    """Return the second and the third message of a user."""
    follow_ups = parse_object(reply.content)
    prompts = [follow_ups.get("second"), follow_ups.get("third")]
    if not all([isinstance(prompt, str) and prompt.strip() for prompt in prompts]):
        raise InvalidRow("no follow-up prompts", f"the reply begins {reply.content[:80]!r}")
    return [prompt.strip() for prompt in prompts]


def parse_in_mode(reply: Reply, think: bool) -> Message:
    """Return the assistant's message that a reply is, with reasoning or without. Raises InvalidRow for the other."""
    if think and not reply.reasoning_content:
        raise InvalidRow("no reasoning")
    if not think and reply.reasoning_content:
        raise InvalidRow("reasoning in a no_think answer")
    message = {"role": "assistant", "content": reply.content}
    if think:
        message["reasoning_content"] = reply.reasoning_content
    return message


# -- what the tasks share ---------------------------------------------------------------------------------------------
def user_message(text: str) -> Message:
    return {"role": "user", "content": text}


def row_random(row: Row, options: TaskOptions) -> random.Random:
    return random.Random(f"{options.seed} {row['id']}")


def check_last_answer(row: Row) -> None:
    """Raise InvalidRow where a row does not end with an answer in text."""
    check_messages(row["messages"])
    if row["messages"][-1].get("tool_calls"):
        raise InvalidRow("last answer is a tool call")


def read_answers(row: Row) -> dict[str, str]:
    """Return the column answers; A is the row's own where it has none."""
    answers = row.get("answers") or {}
    if not isinstance(answers, dict) or not all([isinstance(text, str) for text in answers.values()]):
        raise InvalidRow("field of another type", "answers must be an object of strings")
    return {"A": row["messages"][-1]["content"], **answers}


def show_prompt(row: Row) -> str:
    """Return what stands before the last answer as a judge reads it."""
    prompt = row["messages"][:-1]
    if len(prompt) == 1:
        return prompt[0]["content"]
    lines = []
    for turn in prompt:
        lines.append(f"{turn['role']}: {turn.get('content') or json.dumps(to_api_message(turn))}")
    return "\n\n".join(lines)


async def answer_anew(turns: list[Message], row: Row, think: bool, model: Model) -> list[Message]:
    """Return the turns with every answer asked anew, each after the new ones before it."""
    renewed = []
    for turn in turns:
        if turn["role"] == "assistant":
            turn = await model.ask(renewed, lambda reply: parse_in_mode(reply, think), row, think)
        renewed.append(turn)
    return renewed


def set_mode(row: Row, think: bool, messages: list[Message], row_id: str, tags: list[str]) -> Row:
    """Return a row with these messages under a mode and its tags."""
    other_tags = [tag for tag in row["tags"] if tag not in ("think", "no_think")]
    return row | {
        "id": row_id,
        "messages": messages,
        "chat_template_kwargs": row["chat_template_kwargs"] | {"enable_thinking": think},
        "tags": other_tags + tags,
    }


# -- tasks: the rows out of a row; each raises InvalidRow -------------------------------------------------------------
async def answer(row: Row, model: Model, options: TaskOptions) -> list[Row]:
    check_last_answer(row)
    answers = read_answers(row)
    letter = next(letter for letter in string.ascii_uppercase if letter not in answers)
    think = row["chat_template_kwargs"].get("enable_thinking")
    if think not in (True, False):
        think = None
    reply = await model.ask(row["messages"][:-1], lambda reply: reply, row, think)
    row = row | {"answers": answers | {letter: reply.content}}
    if reply.reasoning_content:
        row["answers_reasoning"] = {**(row.get("answers_reasoning") or {}), letter: reply.reasoning_content}
    return [row]


async def verify(row: Row, model: Model, options: TaskOptions) -> list[Row]:
    check_last_answer(row)
    answers = read_answers(row)
    compared_with = "reference"
    reference = row.get(options.reference)
    if reference in (None, ""):
        compared_with = "C"
        reference = answers.get("C")
    if isinstance(reference, bool) or not isinstance(reference, (str, int, float)):
        kind = type(row.get(options.reference)).__name__
        raise InvalidRow("no reference and no answer C", f"{options.reference} is {kind}")
    text = VERIFY.format(question=show_prompt(row), reference=reference, answer=answers["A"])
    verdict = await model.ask([user_message(text)], verdict_parser("AGREE", "DISAGREE"))
    agree = verdict.choice == "AGREE"
    return [row | {"verdict": {"agree": agree, "against": compared_with, "said": verdict.words}}]


def count_verify(row: Row) -> list[str]:
    return ["agree" if row["verdict"]["agree"] else "disagree"]


async def judge(row: Row, model: Model, options: TaskOptions) -> list[Row]:
    check_last_answer(row)
    answers = read_answers(row)
    if "B" not in answers:
        raise InvalidRow("no answer B", "run the task answer first")
    # the judge's A is the row's A or, as often, its B: a judge who prefers a place favours neither model
    roles = {"A": "B", "B": "A"}
    if row_random(row, options).random() < 0.5:
        roles = {"A": "A", "B": "B"}
    text = JUDGE.format(question=show_prompt(row), a=answers[roles["A"]], b=answers[roles["B"]])
    verdict = await model.ask([user_message(text)], verdict_parser("A", "B", "TIE"))
    winner = roles.get(verdict.choice, "tie")
    return [row | {"judgement": {"roles": roles, "winner": winner, "said": verdict.words}}]


def count_judge(row: Row) -> list[str]:
    winner = row["judgement"]["winner"]
    if winner == "tie":
        return ["winner tie", "tie"]
    is_first = row["judgement"]["roles"]["A"] == winner
    return [f"winner {winner}", "first shown won" if is_first else "second shown won"]


async def twins(row: Row, model: Model, options: TaskOptions) -> list[Row]:
    check_last_answer(row)
    turns = row["messages"]
    if any([turn["role"] == "tool" or turn.get("tool_calls") for turn in turns]):
        raise InvalidRow("tool calls have no twin")
    if any([turn["role"] != "assistant" and SWITCH.search(turn["content"]) for turn in turns]):
        raise InvalidRow("switch in the prompt", "/think or /no_think would contradict one of the twins")
    modes = {bool(turn.get("reasoning_content")) for turn in turns if turn["role"] == "assistant"}
    if len(modes) > 1 and not options.both:
        raise InvalidRow("reasoning in some answers only", "neither twin; --both asks for both")
    rows = []
    for think, name in ((True, "think"), (False, "no_think")):
        messages = turns
        if options.both or modes != {think}:
            messages = await answer_anew(turns, row, think, model)
        rows.append(set_mode(row, think, messages, f"{row['id']}-{name}", [name, f"pair:{row['id']}"]))
    return rows


async def ifthink(row: Row, model: Model, options: TaskOptions) -> list[Row]:
    start = [turn for turn in row["messages"] if turn["role"] != "assistant"]
    roles = [turn["role"] for turn in start if turn["role"] != "system"]
    if roles != ["user"] or start[-1]["role"] != "user":
        raise InvalidRow("not a single turn", "ifthink starts from one instruction")
    prompt = start[-1].get("content")
    if not prompt:
        raise InvalidRow("empty text", "of the user")
    instructions = draw_instructions(row_random(row, options))
    text = IFTHINK.format(prompt=prompt, second=instructions[0]["text"], third=instructions[1]["text"])
    second, third = await model.ask([user_message(text)], parse_follow_ups)
    answer_turn = {"role": "assistant"}
    turns = [*start, answer_turn, user_message(second), answer_turn, user_message(third), answer_turn]
    messages = await answer_anew(turns, row, True, model)
    row = set_mode(row, True, messages, f"{row['id']}-ifthink", ["think", "ifthink"])
    return [row | {"instructions": instructions}]


def draw_instructions(rng: random.Random) -> list[dict]:
    """Return two instructions of different groups as rows hold them, their numbers drawn."""
    second = rng.choice(INSTRUCTIONS)
    third = rng.choice([other for other in INSTRUCTIONS if other.group != second.group])
    drawn = []
    for instruction in (second, third):
        text = instruction.text
        if instruction.numbers:
            text = text.format(n=rng.choice(instruction.numbers))
        drawn.append({"id": instruction.id, "text": text})
    return drawn


@dataclass
class Task:
    """What can be asked of a row."""

    process: Callable[[Row, Model, TaskOptions], Awaitable[list[Row]]]
    reads: tuple[str, ...]  # of TASK_FLAGS
    writes_column: bool = False
    count: Callable[[Row], list[str]] | None = None  # what report.json counts of a row out


THINK = {"chat_template_kwargs": {"enable_thinking": True}}
NO_THINK = {"chat_template_kwargs": {"enable_thinking": False}}
TASK_FLAGS = {"reference": "reference", "both": False, "think": THINK, "no_think": NO_THINK}  # with their defaults
TASKS = {
    "answer": Task(answer, ("think", "no_think"), writes_column=True),
    "verify": Task(verify, ("reference",), writes_column=True, count=count_verify),
    "judge": Task(judge, (), writes_column=True, count=count_judge),
    "twins": Task(twins, ("both", "think", "no_think")),
    "ifthink": Task(ifthink, ("think",)),
}


# -- many rows --------------------------------------------------------------------------------------------------------
@dataclass
class PendingRow:
    """A row under way."""

    location: dict
    rows: asyncio.Task[list[Row]]


class RowStream:
    """Works on every row in, in order out; so many are under way that a slow row does not hold up the others."""

    def __init__(self, args: Namespace, endpoint: Endpoint, writer: DatasetWriter) -> None:
        self.task = TASKS[args.task]
        self.name = args.path.stem
        self.options = options_of(TaskOptions, args)
        self.model = Model(endpoint, options_of(RequestOptions, args))
        self.endpoint = endpoint
        self.writer = writer
        self.window = 16 * args.max_concurrency  # rows under way
        self.pending: deque[PendingRow] = deque()
        self.rows: list[Row] = []
        self.result = ChunkResult()
        self.first_refusal: dict | None = None
        self.progress = tqdm(desc=args.task, unit=" rows", disable=not sys.stderr.isatty())

    async def run(self, paths: list[Path | str]) -> None:
        """Work on all rows. Raises OverBudget, UsageError."""
        split = ""
        try:
            with self.progress:
                for chunk in read_chunks(paths, self.writer.input_hashes):
                    if chunk.split != split:
                        await self.collect(0)
                        self.write(split)
                        split = chunk.split
                    for line, row in chunk.rows():
                        await self.collect(self.window - 1)
                        if self.result.rows_in >= BATCH:
                            self.write(split)
                        rows = asyncio.ensure_future(self.process(row, line))
                        self.pending.append(PendingRow(row_location(chunk.file, line, row), rows))
                await self.collect(0)
                self.write(split)
        finally:
            tasks = [pending.rows for pending in self.pending]
            for task in tasks:
                task.cancel()  # and with it the request that it waits for
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.endpoint.close()

    async def process(self, row: object, line: int) -> list[Row]:
        """Return the rows out of a row. Raises InvalidRow."""
        try:
            row = complete_row(check_shape(row), self.name, line)
            return await self.task.process(row, self.model, self.options)
        except RecursionError:
            raise InvalidRow("row nested too deep") from None

    async def collect(self, left: int) -> None:
        """Wait for the first rows under way until so many are left."""
        while len(self.pending) > left:
            first = self.pending[0]
            await asyncio.wait((first.rows, self.endpoint.halted), return_when=asyncio.FIRST_COMPLETED)
            if self.endpoint.halted.done():
                raise self.endpoint.halted.result()
            try:
                self.keep(await first.rows)
            except InvalidRow as refusal:
                self.refuse(first.location | {"reason": refusal.reason, "detail": refusal.detail})
            self.pending.popleft()
            self.result.rows_in += 1
            self.progress.update()
            if not self.progress.disable:
                self.progress.set_postfix_str(self.endpoint.usage.describe(), refresh=False)

    def keep(self, rows: list[Row]) -> None:
        self.rows += rows
        self.result.rows_added += len(rows) - 1
        if self.task.count:
            for row in rows:
                self.result.counts.update(self.task.count(row))

    def refuse(self, entry: dict) -> None:
        self.result.rejected.append(entry)
        if self.first_refusal is None:
            self.first_refusal = entry

    def write(self, split: str) -> None:
        if self.rows:
            self.result.encoded = {split: encode_rows(self.rows, self.writer.is_jsonl)}
        self.writer.add(self.result)
        self.result = ChunkResult()
        self.rows = []


# -- the command ------------------------------------------------------------------------------------------------------
def json_object(text: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("path", type=Path, metavar="PATH", help="rows: a file or a save_to_disk folder")
    parser.add_argument("--out", type=Path, required=True, help="NAME.jsonl; of twins and ifthink also a new folder")
    parser.add_argument("--model", required=True, help="name of the model at the endpoint")
    parser.add_argument("--base_url", default="http://localhost:8000/v1", help="of the endpoint, up to /v1")
    parser.add_argument("--api_key_env", default="OPENAI_API_KEY", help="environment variable that holds the key")
    parser.add_argument("--cache", type=Path, help="file of replies, default NAME.cache.sqlite beside OUT")
    add_request_flags(parser)
    add_limit_flags(parser)
    return run_command(parser, run)


def add_request_flags(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("requests")
    group.add_argument("--max_tokens", type=int, default=4096, help="of an answer, reasoning included")
    group.add_argument("--temperature", type=float, default=0.7)
    group.add_argument("--seed", type=int, default=42, help="of requests, roles and instructions")
    group.add_argument("--tries", type=int, default=3, help="samples, where a reply cannot be used")
    group.add_argument("--extra_body", type=json_object, default={}, help="JSON for every request; null removes")
    group = parser.add_argument_group("of some tasks")  # TASK_FLAGS holds the defaults
    group.add_argument("--reference", help="verify: column of the right answer, default reference")
    group.add_argument("--both", action="store_true", default=None, help="twins: ask for both, not the missing one")
    group.add_argument(
        "--think", type=json_object, help=f"answer, twins, ifthink: asks for reasoning, default {json.dumps(THINK)}"
    )
    group.add_argument(
        "--no_think", type=json_object, help=f"answer, twins: asks for none, default {json.dumps(NO_THINK)}"
    )


def add_limit_flags(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("limits")
    group.add_argument("--max_concurrency", type=int, default=16, help="requests at a time")
    group.add_argument("--requests_per_minute", type=int)
    group.add_argument("--tokens_per_minute", type=int, help="prompt and answer; estimated, then as the server counts")
    group.add_argument("--timeout", type=float, default=300, help="seconds for a whole reply")
    group.add_argument("--max_retries", type=int, default=5, help="of a request, after failures; 429 does not count")
    group.add_argument("--max_failures", type=int, default=100, help="in a row, over all requests: the run stops")
    group.add_argument("--price_in", type=float, default=0.0, help="dollars a million prompt tokens")
    group.add_argument("--price_out", type=float, default=0.0, help="dollars a million answer tokens")
    group.add_argument("--max_cost", type=float, help="dollars; what it cannot pay is not asked")


POSITIVE = ["max_tokens", "tries", "max_concurrency", "requests_per_minute", "tokens_per_minute", "timeout"]
POSITIVE += ["max_failures"]
NOT_NEGATIVE = ["max_retries", "price_in", "price_out", "max_cost"]


def check_arguments(args: Namespace) -> None:
    """Raise UsageError for arguments that cannot be meant."""
    if TASKS[args.task].writes_column and args.out.suffix != ".jsonl":
        raise UsageError(f"--out {args.out}: {args.task} writes a column, which a folder drops: pass NAME.jsonl")
    for name in POSITIVE:
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise UsageError(f"--{name} {value}: pass a number above 0")
    for name in NOT_NEGATIVE:
        value = getattr(args, name)
        if value is not None and not value >= 0:
            raise UsageError(f"--{name} {value}: pass 0 or a number above it")
    for name in ("max_tokens", "max_completion_tokens"):
        value = args.extra_body.get(name)
        if value is not None and not (type(value) is int and value > 0):
            raise UsageError(f"--extra_body: {name} is {value!r}: pass a number above 0")
    if args.max_cost is not None and not (args.price_in or args.price_out):
        raise UsageError("--max_cost: pass --price_in and --price_out too, dollars a million tokens")
    try:
        url = httpx2.URL(args.base_url)
    except httpx2.InvalidURL:
        url = None
    if url is None or url.scheme not in ("http", "https") or not url.host:
        raise UsageError(f"--base_url {args.base_url}: pass an address such as http://localhost:8000/v1")
    if url.userinfo or url.query:
        raise UsageError("--base_url: holds a password or a query: pass the key in an environment variable")


def fill_task_flags(args: Namespace) -> None:
    """Set the flags that only some tasks read to their defaults. Raises UsageError for one that this task does not."""
    for name, default in TASK_FLAGS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif name not in TASKS[args.task].reads:
            tasks = ", ".join([other for other, task in TASKS.items() if name in task.reads])
            raise UsageError(f"--{name}: {args.task} does not read it, only {tasks}: leave it out")


def read_api_key(name: str) -> str:
    """Return the key in an environment variable, "" where there is none. Raises UsageError."""
    key = os.environ.get(name, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UsageError(f"{name}: not a key (letters that no header may hold): set it anew")
    return key


def run(args: Namespace) -> int:
    """Return the exit code. Raises UsageError."""
    check_arguments(args)
    fill_task_flags(args)
    paths = find_inputs([args.path])
    if is_dataset_folder(args.path):
        check_output_path(args.out, open_splits(args.path))
    api_key = read_api_key(args.api_key_env)
    stem = args.out.stem if args.out.suffix == ".jsonl" else args.out.name
    cache_path = args.cache or args.out.with_name(f"{stem}.cache.sqlite")

    async def process_rows(writer: DatasetWriter, cache: ReplyCache) -> RowStream:
        stream = RowStream(args, Endpoint(options_of(EndpointOptions, args), api_key, cache), writer)
        await stream.run(paths)
        return stream

    with DatasetWriter(args.out, f"generate.py {args.task}", args.seed) as writer:
        try:
            with ReplyCache(cache_path) as cache:
                stream = asyncio.run(process_rows(writer, cache))
        except OverBudget:
            message = f"--max_cost {args.max_cost:g} is reached: nothing written, every reply is kept in {cache_path}"
            print(f"{message}: pass more and start again", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print(f"stopped: every reply is kept in {cache_path}: start again to go on", file=sys.stderr)
            return 130
        return finish_run(args, writer, stream)


def finish_run(args: Namespace, writer: DatasetWriter, stream: RowStream) -> int:
    """Write the report, print the summary and return the exit code."""
    if not writer.rows_in:
        raise UsageError(f"{args.path}: no rows: pass rows of messages (python -m data_prep.normalize makes them)")
    usage = stream.endpoint.usage
    summary = f"{args.out}: {writer.rows_out.total():,} rows of {writer.rows_in:,}"
    if writer.refused:
        summary += f"; refused: {format_counts(writer.refused)}"
    print(summary)
    estimated = f" ({usage.estimated:,} replies estimated)" if usage.estimated else ""
    print(f"  {usage.describe()}{estimated}")
    if writer.keys_not_kept:
        print(f"  keys not kept: {format_counts(writer.keys_not_kept)}")
    if not writer.rows_out:
        first = stream.first_refusal
        where = f"the first at {first['file']}:{first['line']}: {first['detail'] or first['reason']}"
        print(f"{args.out}: no row is left, {where}: see {writer.close_rejected()}", file=sys.stderr)
        return 1
    more = {
        "model": args.model,
        "requests": usage.asked + usage.cached,
        "tokens": {"prompt": usage.prompt, "completion": usage.completion, "estimated": usage.estimated},
    }
    if args.price_in or args.price_out:
        more["cost"] = round(usage.cost(), 6)
    if writer.counts:
        more["counts"] = dict(sorted(writer.counts.items()))
    writer.close(more)
    return 0


if __name__ == "__main__":
    sys.exit(main())
