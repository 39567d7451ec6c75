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
no columns of its own; twins and ifthink may go to a folder.

Every reply is kept at once in NAME.cache.sqlite beside OUT, under the hash of its request: after a stop of any kind,
the same command asks only what has no reply yet, and ends in the same bytes. A connection that fails or times out, 429
and 5xx are tried again (Retry-After, else exponential backoff with jitter); a reply that cannot be used (empty, no
verdict, no reasoning, a control token) is asked anew with the next seed, --tries times; then, or where an answer is
cut by --max_tokens, the row is refused by reason. A refused key, an unknown model, --max_failures failures in a row or
--max_cost stop the run: nothing is written but the cache, which keeps no failures. Prices are per million tokens; a
request is sent only where its whole --max_tokens could still be paid. Usage that a reply does not name is estimated at
4 bytes a token.

Exit 0: done, some rows may be refused. 1: no row is left, or --max_cost is reached. 2: bad input, one sentence.
"""

import argparse
import asyncio
import hashlib
import json
import os
import random
import re
import sqlite3
import string
import sys
from asyncio import sleep
from collections import Counter, deque
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from time import monotonic, time

import httpx2
from tqdm import tqdm

from data_prep.common.command_line import format_counts, make_parser, run_command
from data_prep.common.errors import InvalidRow, UsageError
from data_prep.common.json_text import dump_json, load_json
from data_prep.common.parsing import parse_tool_call, parse_tools
from data_prep.common.readers import find_inputs, is_dataset_folder, list_splits, read_chunks
from data_prep.common.row_keys import SWITCH
from data_prep.common.rows import CONTROL, check_messages, check_shape, complete_row, refuse_unkept
from data_prep.common.writer import ChunkResult, DatasetWriter, check_output_path, encode_rows, row_location

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

INSTRUCTIONS = [  # id in IFEval, requirement, numbers to draw {n} from
    ("length_constraints:number_words", "at most {n} words", range(60, 241, 20)),
    ("length_constraints:number_sentences", "at least {n} sentences", range(3, 11)),
    ("length_constraints:number_paragraphs", "exactly {n} paragraphs", range(2, 6)),
    ("detectable_format:number_bullet_lists", "exactly {n} bullet points in markdown", range(2, 7)),
    ("detectable_format:title", "a title in double angular brackets, such as <<a title>>", None),
    ("detectable_format:json_format", "the whole answer as JSON", None),
    ("keywords:existence", "a keyword, which the message names, must appear", None),
    ("keywords:forbidden_words", "a word, which the message names, must not appear", None),
    ("keywords:frequency", "a word, which the message names, must appear at least {n} times", range(2, 5)),
    ("startend:end_checker", "the answer ends with a phrase that the message quotes", None),
    ("startend:quotation", "the whole answer in double quotation marks", None),
    ("punctuation:no_comma", "no comma anywhere", None),
    ("detectable_content:postscript", "a postscript at the end that begins with P.S.", None),
    ("detectable_content:number_placeholders", "at least {n} placeholders in square brackets", range(1, 4)),
]

MINUTE = 60  # seconds
BACKOFF = 1.0  # seconds before the second try, twice as long before each further one
FINAL = ("cut by length", "content filter")  # another sample would cost as much and end the same
HALTS = {  # status: what to do about it; it is the same for every row
    401: "set the environment variable {env} to a valid key",
    402: "top up the account, then start again",
    403: "use a key in {env} that may use this model",
    404: "pass another --model or --base_url (it often ends in /v1)",
}


class OverBudget(Exception):
    """--max_cost would not pay for another request."""


class Again(Exception):
    """A try that failed and may not the next time. wait: seconds that the server asks for; counts: as one of
    --max_retries."""

    def __init__(self, reason, detail="", wait=0.0, counts=True):
        self.reason, self.detail, self.wait, self.counts = reason, detail, wait, counts


# -- tasks: a row -> the rows out; each raises InvalidRow ----------------------------------------------------------------
async def answer(row, endpoint, args):
    prompt, own = parted(row)
    answers = {"A": own, **answers_of(row)}
    letter = next(letter for letter in string.ascii_uppercase if letter not in answers)
    reply = await endpoint.ask(prompt, row, thinking(row["chat_template_kwargs"].get("enable_thinking"), args))
    row = row | {"answers": answers | {letter: reply["content"]}}
    if reply["reasoning_content"]:
        row["answers_reasoning"] = {**(row.get("answers_reasoning") or {}), letter: reply["reasoning_content"]}
    return [row]


async def verify(row, endpoint, args):
    prompt, own = parted(row)
    answers, reference, against = answers_of(row), row.get(args.reference), "reference"
    if reference in (None, ""):
        reference, against = answers.get("C"), "C"
    if isinstance(reference, bool) or not isinstance(reference, (str, int, float)):
        raise InvalidRow(
            "no reference and no answer C", f"{args.reference} is {type(row.get(args.reference)).__name__}"
        )
    text = VERIFY.format(question=shown(prompt), reference=reference, answer=answers.get("A", own))
    said, agree = await endpoint.ask([user(text)], parse=lambda reply: verdict(reply, ("AGREE", "DISAGREE")))
    return [row | {"verdict": {"agree": agree == "AGREE", "against": against, "said": said}}]


async def judge(row, endpoint, args):
    prompt, own = parted(row)
    answers = {"A": own, **answers_of(row)}
    if "B" not in answers:
        raise InvalidRow("no answer B", "run the task answer first")
    # the judge's A is the row's A or, as often, its B: a judge who prefers a place favours neither model
    roles = {"A": "A", "B": "B"} if drawn(args, row).random() < 0.5 else {"A": "B", "B": "A"}
    text = JUDGE.format(question=shown(prompt), a=answers[roles["A"]], b=answers[roles["B"]])
    said, best = await endpoint.ask([user(text)], parse=lambda reply: verdict(reply, ("A", "B", "TIE")))
    return [row | {"judgement": {"roles": roles, "winner": roles.get(best, "tie"), "said": said}}]


async def twins(row, endpoint, args):
    turns = row["messages"]
    parted(row)
    if any(turn["role"] == "tool" or turn.get("tool_calls") for turn in turns):
        raise InvalidRow("tool calls have no twin")
    if any(SWITCH.search(turn.get("content") or "") for turn in turns if turn["role"] != "assistant"):
        raise InvalidRow("switch in the prompt", "/think or /no_think would contradict one of the twins")
    thinks = {bool(turn.get("reasoning_content")) for turn in turns if turn["role"] == "assistant"}
    if len(thinks) > 1 and not args.both:
        raise InvalidRow("reasoning in some answers only", "neither twin; --both asks for both")
    rows = []
    for think in (True, False):
        mode, same = "think" if think else "no_think", thinks == {think} and not args.both
        said = turns if same else await spoken(turns, row, think, endpoint, args)
        rows.append(row | {
            "id": f"{row['id']}-{mode}",
            "messages": said,
            "chat_template_kwargs": row["chat_template_kwargs"] | {"enable_thinking": think},
            "tags": [*(tag for tag in row["tags"] if tag not in ("think", "no_think")), mode, f"pair:{row['id']}"],
        })  # fmt: skip
    return rows


async def ifthink(row, endpoint, args):
    start = [turn for turn in row["messages"] if turn["role"] != "assistant"]
    if [turn["role"] for turn in start if turn["role"] != "system"] != ["user"] or start[-1]["role"] != "user":
        raise InvalidRow("not a single turn", "ifthink starts from one instruction")
    if not start[-1].get("content"):
        raise InvalidRow("empty text", "of the user")
    lot = drawn(args, row)
    first = lot.choice(INSTRUCTIONS)
    group = first[0].split(":")[0]
    asked = [first, lot.choice([one for one in INSTRUCTIONS if not one[0].startswith(group)])]
    told = [(name, text.format(n=lot.choice(numbers)) if numbers else text) for name, text, numbers in asked]
    text = IFTHINK.format(prompt=start[-1]["content"], second=told[0][1], third=told[1][1])
    more = await endpoint.ask([user(text)], parse=follow_ups)
    answer = {"role": "assistant"}
    turns = [*start, answer, user(more[0]), answer, user(more[1]), answer]
    return [row | {
        "id": f"{row['id']}-ifthink",
        "messages": await spoken(turns, row, True, endpoint, args),
        "chat_template_kwargs": row["chat_template_kwargs"] | {"enable_thinking": True},
        "tags": [*(tag for tag in row["tags"] if tag not in ("think", "no_think")), "think", "ifthink"],
        "instructions": [{"id": name, "text": text} for name, text in told],
    }]  # fmt: skip


TASKS = {"answer": answer, "verify": verify, "judge": judge, "twins": twins, "ifthink": ifthink}
COLUMNED = ("answer", "verify", "judge")  # their results are columns


# -- pieces the tasks share -------------------------------------------------------------------------------------------
def user(text):
    return {"role": "user", "content": text}


def drawn(args, row):
    return random.Random(f"{args.seed} {row['id']}")


def parted(row):
    """(the messages before the row's last answer, its text)."""
    check_messages([{**turn, "content": turn.get("content") or ""} for turn in row["messages"]])
    *prompt, last = row["messages"]
    if last.get("tool_calls"):
        raise InvalidRow("last answer is a tool call")
    return prompt, last["content"]


def answers_of(row):
    answers = row.get("answers") or {}
    if not isinstance(answers, dict) or not all(isinstance(text, str) for text in answers.values()):
        raise InvalidRow("field of another type", "answers must be an object of strings")
    return answers


def thinking(think, args):
    """What a request holds that asks for reasoning, or for none (think None: the model's own habit)."""
    return {True: args.think, False: args.no_think}.get(think, {})


def shown(turns):
    """A conversation as a judge reads it."""
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n\n".join(f"{turn['role']}: {turn.get('content') or json.dumps(sent(turn))}" for turn in turns)


async def spoken(turns, row, think, endpoint, args):
    """The turns with every answer asked anew, each after the new ones before it."""

    def in_mode(reply):
        if bool(reply["reasoning_content"]) != think:
            raise InvalidRow("no reasoning" if think else "reasoning in a no_think answer")
        return reply

    out = []
    for turn in turns:
        if turn["role"] == "assistant":
            reply = await endpoint.ask(out, row, thinking(think, args), in_mode)
            turn = {"role": "assistant", "content": reply["content"]}
            turn |= {"reasoning_content": reply["reasoning_content"]} if think else {}
        out.append(turn)
    return out


VERDICT = re.compile(r"[*_`\s]*VERDICT:[*_`\s]*(\w+)[*_`.\s]*")


def verdict(reply, allowed):
    """(the model's words, its verdict): the last line, VERDICT: X, or a JSON object with `verdict`."""
    said = reply["content"]
    match = VERDICT.fullmatch(said.rsplit("\n", 1)[-1])
    found = match[1] if match else (object_in(said) or {}).get("verdict")
    if found not in allowed:
        raise InvalidRow("no verdict", f"ends with {said[-80:]!r}")
    return said, found


def follow_ups(reply):
    found = object_in(reply["content"]) or {}
    prompts = [found.get(name) for name in ("second", "third")]
    if not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise InvalidRow("no follow-up prompts", f"said {reply['content'][:80]!r}")
    return [prompt.strip() for prompt in prompts]


def object_in(said):
    """The JSON object that a reply is, in a code fence too, or None."""
    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", said.strip(), re.DOTALL)
    try:
        found = load_json((fenced[1] if fenced else said).encode())
    except InvalidRow:
        return None
    return found if isinstance(found, dict) else None


# -- a request and its reply ------------------------------------------------------------------------------------------
LOCAL = ("enable_thinking", "custom_instructions", "train_turns")  # what a request says in another way, or not at all


def request(turns, row=None):
    """Messages, tools and template arguments as OpenAI's API has them. A persona in custom_instructions (SmolLM3's
    template) is sent as the system message that it becomes."""
    body, kwargs = {"messages": [sent(turn) for turn in turns]}, row["chat_template_kwargs"] if row else {}
    if (persona := kwargs.get("custom_instructions")) and turns[0]["role"] != "system":
        if not isinstance(persona, str):
            raise InvalidRow("field of another type", "custom_instructions must be a string")
        body["messages"].insert(0, {"role": "system", "content": persona})
    if row and row.get("tools"):
        body["tools"] = parse_tools(row["tools"])
    if more := {name: value for name, value in kwargs.items() if name not in LOCAL}:
        body["chat_template_kwargs"] = more
    return body


def sent(turn):
    """A message as the API has it: without reasoning, arguments of calls as text."""
    out = {"role": turn["role"], "content": turn.get("content") or ""}
    for call in map(parse_tool_call, turn.get("tool_calls") or []):
        function = call["function"] | {"arguments": dump_json(call["function"]["arguments"]).decode()}
        out.setdefault("tool_calls", []).append(call | {"function": function})
    return out | {name: turn[name] for name in ("tool_call_id", "name") if turn.get(name)}


def received(data):
    """What is kept of a reply (bytes): content, reasoning, how it ended, tokens. Raises Again."""
    try:
        reply = load_json(data)
        dump_json(reply)
    except (InvalidRow, RecursionError) as refusal:
        raise Again("reply that is not JSON", str(refusal)) from None
    try:
        choice = reply["choices"][0]
        told, end = choice["message"], choice.get("finish_reason")
        content, reasoning = told.get("content") or "", told.get("reasoning_content") or told.get("reasoning") or ""
        if isinstance(content, list):
            content = "".join(part["text"] for part in content if part.get("type") == "text")
        content, reasoning = content.strip(), reasoning.strip()
        calls = bool(told.get("tool_calls"))
    except (KeyError, IndexError, TypeError, AttributeError):
        raise Again("reply without an answer", data[:200].decode(errors="replace")) from None
    if not reasoning and "</think>" in content:  # no server parsed it; some prefill the tag that opens it
        before, _, after = content.partition("</think>")
        if "<think>" not in before.removeprefix("<think>"):
            content, reasoning = after.strip(), before.removeprefix("<think>").strip()
    usage = reply.get("usage") if isinstance(reply.get("usage"), dict) else {}
    tokens = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    if not all(type(number) is int and number >= 0 for number in tokens):
        tokens = None
    kept = {"content": content, "reasoning_content": reasoning, "finish_reason": end, "tool_calls": calls}
    return kept | {"tokens": tokens}


def usable(reply):
    """The reply, where it is one that a row may hold; raises InvalidRow."""
    if reply["finish_reason"] == "length":
        raise InvalidRow("cut by length", "pass a higher --max_tokens")
    if reply["finish_reason"] == "content_filter":
        raise InvalidRow("content filter")
    if reply["tool_calls"]:
        raise InvalidRow("answer is a tool call")
    if not reply["content"]:
        raise InvalidRow("empty answer")
    for text in (reply["content"], reply["reasoning_content"]):
        if hit := CONTROL.search(text):
            raise InvalidRow("control token in text", hit[0])
    return reply


def retry_after(response):
    """Seconds that a response asks to wait: its header has a number or a date."""
    told = response.headers.get("retry-after", "")
    try:
        if re.fullmatch(r"[\d.]+", told):
            return float(told)
        return max(0.0, parsedate_to_datetime(told).timestamp() - time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


class Cache:
    """Replies by the hash of their request, in one SQLite file; each is on disk when put() returns. Raises UsageError."""

    def __init__(self, path):
        self.path = path
        with self.told():
            path.parent.mkdir(parents=True, exist_ok=True)
            self.base = sqlite3.connect(path, isolation_level=None, timeout=1)
            # exclusive: of two runs that share a file, the second stops
            for line in ("PRAGMA locking_mode = EXCLUSIVE", "PRAGMA journal_mode = WAL", "PRAGMA synchronous = NORMAL",
                         "CREATE TABLE IF NOT EXISTS replies (request BLOB PRIMARY KEY, reply BLOB) WITHOUT ROWID",
                         "BEGIN IMMEDIATE", "COMMIT"):  # fmt: skip
                self.base.execute(line)

    @contextmanager
    def told(self):
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            said = f"{self.path}: the cache cannot be used ({error})"
            raise UsageError(f"{said}: wait for the run that has it, make room or pass another --cache") from None

    def get(self, key):
        with self.told():
            found = self.base.execute("SELECT reply FROM replies WHERE request = ?", (key,)).fetchone()
        return found and json.loads(found[0])

    def put(self, key, reply):
        with self.told():
            self.base.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (key, dump_json(reply)))

    def close(self):
        self.base.close()


class Limit:
    """At most so much in any minute; None: no limit."""

    def __init__(self, most):
        self.most, self.taken, self.turn = most, deque(), asyncio.Lock()

    async def take(self, amount):
        """Waits for room. The entry, whose amount may be mended when it is known."""
        entry = [0.0, amount]
        if self.most is None:
            return entry
        async with self.turn:
            while True:
                now = monotonic()
                while self.taken and self.taken[0][0] <= now - MINUTE:
                    self.taken.popleft()
                # more than the limit alone goes when nothing else is under way
                if not self.taken or sum(amount for _, amount in self.taken) + amount <= self.most:
                    break
                await sleep(self.taken[0][0] + MINUTE - now)
            entry[0] = now
            self.taken.append(entry)
        return entry


class Endpoint:
    """Asks, within limits of speed and cost, whatever the cache does not know."""

    def __init__(self, args, cache, key):
        self.args, self.cache, self.key = args, cache, key
        self.url = args.base_url.rstrip("/") + "/chat/completions"
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        limits = httpx2.Limits(max_connections=args.max_concurrency)
        self.client = httpx2.AsyncClient(headers=headers, timeout=args.timeout, limits=limits)
        self.slots = asyncio.Semaphore(args.max_concurrency)
        self.requests, self.tokens = Limit(args.requests_per_minute), Limit(args.tokens_per_minute)
        self.flying, self.used, self.count, self.purse = {}, set(), Counter(), asyncio.Condition()
        self.reserved, self.paused, self.failures = {}, 0.0, 0
        self.halted = asyncio.get_running_loop().create_future()  # UsageError that ends the run, whoever met it

    # what is asked, at what cost
    async def ask(self, turns, row=None, more=None, parse=lambda reply: reply):
        """parse(reply) of the first reply that is usable and that parse takes; raises InvalidRow as the last one did."""
        args = self.args
        body = {"model": args.model} | request(turns, row)
        body |= {"max_tokens": args.max_tokens, "temperature": args.temperature}
        for attempt in range(args.tries):
            asked = merged(merged(body | {"seed": args.seed + attempt}, more or {}), args.extra_body)
            asked = {name: value for name, value in asked.items() if value is not None}
            try:
                return parse(usable(await self.reply(asked, attempt)))
            except InvalidRow as refusal:
                last = refusal
                if refusal.reason in FINAL or refusal.reason.startswith("server"):
                    break
        raise last

    async def reply(self, body, attempt):
        data = dump_json(body)
        key = hashlib.sha256(data + b" %d" % attempt).digest()
        if key not in self.flying:
            if found := self.cache.get(key):
                self.counted(key, found, "cached")
                return found
            self.flying[key] = asyncio.ensure_future(self.fetched(key, data, body))
            self.flying[key].add_done_callback(lambda _: self.flying.pop(key))
        return await self.flying[key]

    def counted(self, key, reply, how):
        self.count[how] += key not in self.used
        if key not in self.used:
            self.used.add(key)
            self.count.update(dict(zip(("prompt", "completion"), reply["tokens"], strict=True)))
            self.count["estimated"] += reply["estimated"]

    def cost(self, prompt=None, completion=None):
        """Dollars of so many tokens, by default of all replies used so far, asked now or kept."""
        if prompt is None:
            prompt, completion = self.count["prompt"], self.count["completion"]
        return (prompt * self.args.price_in + completion * self.args.price_out) / 1e6

    def worst_case(self):
        return self.cost() + sum(self.reserved.values())

    async def fetched(self, key, data, body):
        """The reply to a request, kept; raises InvalidRow, OverBudget, UsageError."""
        most = body.get("max_tokens") or body.get("max_completion_tokens") or self.args.max_tokens
        # half of its bytes: more tokens than any text has in practice
        guess = (len(data) // 2, most)
        worst, limit = self.cost(*guess), self.args.max_cost
        if limit is not None:
            async with self.purse:
                await self.purse.wait_for(lambda: not self.reserved or self.worst_case() + worst <= limit)
                if self.worst_case() + worst > limit:
                    raise OverBudget
                self.reserved[key] = worst
        try:
            reply = await self.tried(data, sum(guess), random.Random(f"{self.args.seed} {key.hex()}"))
            reply["estimated"] = reply["tokens"] is None
            said = reply["content"] + reply["reasoning_content"]
            reply["tokens"] = reply["tokens"] or [len(data) // 4, len(said.encode()) // 4]
            self.cache.put(key, reply)
            self.counted(key, reply, "asked")
            return reply
        except UsageError as error:
            if not self.halted.done():
                self.halted.set_result(error)
            raise
        finally:
            if self.reserved.pop(key, None) is not None:
                async with self.purse:
                    self.purse.notify_all()

    # how it is asked
    async def tried(self, data, guess, jitter):
        tries = failed = 0
        while True:
            try:
                reply = await self.once(data, guess)
                self.failures = 0
                return reply
            except Again as again:
                self.failures, tries, failed = self.failures + 1, tries + 1, failed + again.counts
                told = f"{again.reason} ({self.hidden(again.detail)})"
                never = again.reason == "no connection" and not self.count["asked"] and failed > self.args.max_retries
                if never or self.failures >= self.args.max_failures:
                    raise UsageError(f"{self.url}: {told}, {self.failures} failures in a row: mend it, then start again: "
                                   "every reply so far is kept") from None  # fmt: skip
                if failed > self.args.max_retries:
                    raise InvalidRow(f"server: {again.reason}", self.hidden(again.detail)) from None
                await sleep(max(again.wait, BACKOFF * 2 ** min(tries - 1, 6) * (0.5 + jitter.random())))

    async def once(self, data, guess):
        """What is kept of one try's reply; raises Again, InvalidRow, UsageError."""
        async with self.slots:
            while (wait := self.paused - monotonic()) > 0:
                await sleep(wait)
            await self.requests.take(1)
            entry = await self.tokens.take(guess)
            try:
                response = await asyncio.wait_for(self.client.post(self.url, content=data), self.args.timeout)
            except (TimeoutError, httpx2.TimeoutException):
                raise Again("time-out", f"{self.args.timeout:g} s") from None
            except httpx2.RequestError as error:
                lost = "no connection" if isinstance(error, httpx2.ConnectError) else "connection cut"
                raise Again(lost, f"{type(error).__name__} {error}") from None
        status, said = response.status_code, self.hidden(f"{response.status_code} {response.text[:200]}")
        wait = retry_after(response)
        if status in (429, 503):
            self.paused = max(self.paused, monotonic() + wait)  # it speaks of all requests, not of this one
        if status in (408, 409, 425, 429) or status >= 500:
            raise Again("rate limit" if status == 429 else "error", said, wait, counts=status != 429)
        # 403 in the midst of a run is about the row: a provider's moderation
        if (status in HALTS or 300 <= status < 400) and not (status == 403 and self.used):
            job = HALTS.get(status, "pass the address that it redirects to").format(env=self.args.api_key_env)
            raise UsageError(f"{self.url}: {said}: {job}")
        if status >= 400:
            raise InvalidRow("server: request not taken", said)
        reply = received(response.content)
        entry[1] = sum(reply["tokens"] or [guess])
        return reply

    def hidden(self, text):
        """Words of a server on one line, without the key, which some repeat."""
        text = " ".join(text.split())
        return text.replace(self.key, "***") if self.key else text


def merged(body, more):
    """A request with more in it, objects joined; null removes what was there."""
    both = {name: merged(body[name], value) for name, value in more.items()
            if isinstance(value, dict) and isinstance(body.get(name), dict)}  # fmt: skip
    return body | more | both


# -- many rows --------------------------------------------------------------------------------------------------------
async def worked(row, line, split, endpoint, args):
    """The rows out; raises InvalidRow."""
    try:
        row = complete_row(check_shape(row), args.path.stem, line)
        row["chat_template_kwargs"] = row["chat_template_kwargs"] or {}
        out = await TASKS[args.task](row, endpoint, args)
        for one in out:
            refuse_unkept(one, args.out)
        return out
    except RecursionError:
        raise InvalidRow("row nested too deep") from None


async def stream(args, paths, writer, endpoint, first):
    """Every row in, in order out; so many are under way that a slow row does not hold up the others. first: a list that
    gets the first refusal."""
    under_way, result, rows = deque(), ChunkResult(), []
    bar = tqdm(desc=args.task, unit=" rows", disable=not sys.stderr.isatty())

    def flush():
        nonlocal result, rows
        if result.rows_in:
            result.encoded = {split: encode_rows(rows, writer.is_jsonl)}
            writer.add(result)
        result, rows = ChunkResult(), []

    async def finish(left):
        while len(under_way) > left:
            where, task = under_way[0]
            await asyncio.wait((task, endpoint.halted), return_when=asyncio.FIRST_COMPLETED)
            if endpoint.halted.done():
                raise endpoint.halted.result()
            try:
                found = await task
                rows.extend(found)
                result.rows_added += len(found) - 1
                result.counts.update(outcomes(args.task, found))
            except InvalidRow as refusal:
                result.rejected.append(where | {"reason": refusal.reason, "detail": refusal.detail})
                first[:] = first or result.rejected
            under_way.popleft()
            result.rows_in += 1
            bar.update()
            if not bar.disable:
                bar.set_postfix_str(spent(endpoint), refresh=False)

    split = None
    try:
        with bar:
            for block in read_chunks(paths, writer.input_hashes):
                if block.split != split:
                    await finish(0)
                    flush()
                    split = block.split
                for line, row in block.rows():
                    await finish(16 * args.max_concurrency - 1)
                    if len(rows) >= 500:
                        flush()
                    task = asyncio.ensure_future(worked(row, line, split, endpoint, args))
                    under_way.append((row_location(block.file, line, row), task))
            await finish(0)
            flush()
    finally:
        tasks = [task for _, task in under_way] + [*endpoint.flying.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await endpoint.client.aclose()


def outcomes(task, rows):
    """What report.json counts of a task's rows."""
    for row in rows:
        if task == "verify":
            yield "agree" if row["verdict"]["agree"] else "disagree"
        if task == "judge":
            roles, winner = row["judgement"]["roles"], row["judgement"]["winner"]
            yield f"winner {winner}"
            yield "tie" if winner == "tie" else "first shown won" if roles["A"] == winner else "second shown won"


def spent(endpoint):
    count, priced = endpoint.count, endpoint.args.price_in or endpoint.args.price_out
    return (f"{count['asked']:,} asked, {count['cached']:,} from the cache, {count['prompt']:,} tokens in, "
            f"{count['completion']:,} out" + (f", ${endpoint.cost():.4f}" if priced else ""))  # fmt: skip


# -- the script -------------------------------------------------------------------------------------------------------
def json_object(text):
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return found


def main():
    parser = make_parser(__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("path", type=Path, metavar="PATH", help="rows: a file or a save_to_disk folder")
    parser.add_argument("--out", type=Path, required=True, help="NAME.jsonl; of twins and ifthink also a new folder")
    parser.add_argument("--model", required=True, help="name of the model at the endpoint")
    parser.add_argument("--base_url", default="http://localhost:8000/v1", help="of the endpoint, up to /v1")
    parser.add_argument("--api_key_env", default="OPENAI_API_KEY", help="environment variable that holds the key")
    parser.add_argument("--cache", type=Path, help="file of replies, default NAME.cache.sqlite beside OUT")
    parser.add_argument("--reference", default="reference", help="column of verify that holds the right answer")
    parser.add_argument("--both", action="store_true", help="twins: ask for both, not for the missing one only")
    group = parser.add_argument_group("requests")
    group.add_argument("--max_tokens", type=int, default=4096, help="of an answer, reasoning included")
    group.add_argument("--temperature", type=float, default=0.7)
    group.add_argument("--seed", type=int, default=42, help="of requests, roles and instructions")
    form = '{"chat_template_kwargs": {"enable_thinking": %s}}'
    group.add_argument("--think", type=json_object, default=form % "true", help="JSON that asks for reasoning")
    group.add_argument("--no_think", type=json_object, default=form % "false", help="JSON that asks for none")
    group.add_argument("--extra_body", type=json_object, default={}, help="JSON for every request; null removes")
    group = parser.add_argument_group("limits")
    group.add_argument("--max_concurrency", type=int, default=16, help="requests at a time")
    group.add_argument("--requests_per_minute", type=int)
    group.add_argument("--tokens_per_minute", type=int, help="prompt and answer; estimated, then as the server counts")
    group.add_argument("--timeout", type=float, default=300, help="seconds for a whole reply")
    group.add_argument("--max_retries", type=int, default=5, help="of a request, after failures; 429 does not count")
    group.add_argument("--tries", type=int, default=3, help="samples, where a reply cannot be used")
    group.add_argument("--max_failures", type=int, default=100, help="in a row, over all requests: the run stops")
    group.add_argument("--price_in", type=float, default=0.0, help="dollars a million prompt tokens")
    group.add_argument("--price_out", type=float, default=0.0, help="dollars a million answer tokens")
    group.add_argument("--max_cost", type=float, help="dollars; what it cannot pay is not asked")
    return run_command(parser, run)


def checked(args):
    """Raises UsageError for arguments that cannot be meant."""
    if args.task in COLUMNED and args.out.suffix != ".jsonl":
        raise UsageError(f"--out {args.out}: {args.task} writes a column, which a folder drops: pass NAME.jsonl")
    for name in ("max_tokens", "max_concurrency", "requests_per_minute", "tokens_per_minute", "timeout", "tries",
                 "max_failures"):  # fmt: skip
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise UsageError(f"--{name} {getattr(args, name)}: pass a number above 0")
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


def run(args):
    """The exit code; raises UsageError."""
    checked(args)
    paths = find_inputs([args.path])
    if is_dataset_folder(args.path):
        check_output_path(args.out, list_splits(args.path))
    key = os.environ.get(args.api_key_env, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UsageError(f"{args.api_key_env}: not a key (letters that no header may hold): set it anew")
    stem = args.out.stem if args.out.suffix == ".jsonl" else args.out.name
    path = args.cache or args.out.with_name(f"{stem}.cache.sqlite")
    first = []
    with DatasetWriter(args.out, f"generate.py {args.task}", args.seed) as writer:
        cache = Cache(path)

        async def work():
            endpoint = Endpoint(args, cache, key)
            await stream(args, paths, writer, endpoint, first)
            return endpoint

        try:
            endpoint = asyncio.run(work())
        except OverBudget:
            print(f"--max_cost {args.max_cost:g} is reached: nothing written, every reply is kept in {path}: pass more "
                  "and start again", file=sys.stderr)  # fmt: skip
            return 1
        except KeyboardInterrupt:
            print(f"stopped: every reply is kept in {path}: start again to go on", file=sys.stderr)
            return 130
        finally:
            cache.close()
        kept, said, count = sum(writer.rows_out.values()), format_counts(writer.refused), endpoint.count
        if not writer.rows_in:
            raise UsageError(f"{args.path}: no rows: pass rows of messages (python -m data_prep.normalize makes them)")
        print(f"{args.out}: {kept:,} rows of {writer.rows_in:,}" + (f"; refused: {said}" if said else ""))
        print(f"  {spent(endpoint)}" + (f" ({count['estimated']:,} replies estimated)" if count["estimated"] else ""))
        if not kept:
            where = f"the first at {first[0]['file']}:{first[0]['line']}: {first[0]['detail'] or first[0]['reason']}"
            print(f"{args.out}: not written, no row is left, {where}", file=sys.stderr)
            return 1
        more = {"model": args.model, "requests": count["asked"] + count["cached"]}
        more |= {"tokens": {name: count[name] for name in ("prompt", "completion", "estimated")}}
        more |= {"cost": round(endpoint.cost(), 6)} if args.price_in or args.price_out else {}
        more |= {"counts": dict(sorted(writer.counts.items()))} if writer.counts else {}
        writer.close(more)
    return 0


if __name__ == "__main__":
    sys.exit(main())
