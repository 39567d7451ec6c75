"""Ask an OpenAI-compatible endpoint: replies are kept, failures tried again, limits of speed and cost held."""

import asyncio
import random
import re
from asyncio import sleep
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from email.utils import parsedate_to_datetime
from hashlib import sha256
from time import monotonic, time

import httpx2

from .answer_formats import GENERIC
from .answers import parse_answer
from .errors import InvalidRow, UsageError
from .json_text import dump_json, load_json
from .reply_cache import ReplyCache

MINUTE = 60  # seconds
BACKOFF = 1.0  # seconds before the second try, twice as long before each further one
RETRIED = (408, 409, 425, 429)  # besides 5xx
HALTS = {  # status: what to do about it; it is the same for every request
    401: "set the environment variable {env} to a valid key",
    402: "top up the account, then start again",
    403: "use a key in {env} that may use this model",
    404: "pass another --model or --base_url (it often ends in /v1)",
}


class OverBudget(Exception):
    """--max_cost would not pay for another request."""


class RetryableError(Exception):
    """A try that failed and may not the next time.

    wait: seconds that the server asks for; counts: whether it is one of --max_retries.
    """

    def __init__(self, reason: str, detail: str = "", wait: float = 0.0, counts: bool = True) -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail
        self.wait = wait
        self.counts = counts


@dataclass
class EndpointOptions:
    """Where to ask and within which limits, by the names of the flags."""

    base_url: str  # up to /v1
    api_key_env: str  # environment variable of the key, for messages
    max_concurrency: int  # requests at a time
    requests_per_minute: int | None
    tokens_per_minute: int | None
    timeout: float  # seconds for a whole reply
    max_retries: int  # of a request
    max_failures: int  # in a row, over all requests
    price_in: float  # dollars a million prompt tokens
    price_out: float  # dollars a million completion tokens
    max_cost: float | None  # dollars
    seed: int  # of the jitter


# -- replies ----------------------------------------------------------------------------------------------------------
@dataclass
class Reply:
    """What is kept of a reply; the cache holds these fields."""

    content: str
    reasoning_content: str
    finish_reason: object  # as the server has it
    tool_calls: bool  # whether it has some
    tokens: list[int]  # of the prompt and of the completion
    estimated: bool  # whether the tokens are: the server named none


def parse_reply(data: bytes, request: bytes) -> Reply:
    """Return what is kept of a response's body. Raises RetryableError."""
    try:
        body = load_json(data)
        dump_json(body)  # raises for text that no file can hold
    except (InvalidRow, RecursionError) as error:
        raise RetryableError("reply that is not JSON", str(error)) from None
    try:
        choice = body["choices"][0]
        message = choice["message"]
        finish_reason = choice.get("finish_reason")
        content = message.get("content") or ""
        reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
        if isinstance(content, list):
            content = "".join([part["text"] for part in content if part.get("type") == "text"])
        content = content.strip()
        reasoning = reasoning.strip()
        has_calls = bool(message.get("tool_calls"))
    except (KeyError, IndexError, TypeError, AttributeError):
        raise RetryableError("reply without an answer", data[:200].decode(errors="replace")) from None
    if not reasoning and "</think>" in content:  # no server parsed it; some prefill the tag that opens it
        answer = parse_answer(content, GENERIC, "")
        content = answer.content.strip()
        reasoning = (answer.reasoning or "").strip()
        has_calls = has_calls or bool(answer.tool_calls)
    tokens = read_usage(body)
    estimated = tokens is None
    if estimated:  # 4 bytes a token
        tokens = [len(request) // 4, len((content + reasoning).encode()) // 4]
    return Reply(content, reasoning, finish_reason, has_calls, tokens, estimated)


def read_usage(body: dict) -> list[int] | None:
    """Return the tokens of prompt and completion that a reply names, None where it does not."""
    usage = body.get("usage")
    if not isinstance(usage, dict):
        return None
    tokens = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
    if not all([type(number) is int and number >= 0 for number in tokens]):
        return None
    return tokens


def read_retry_after(response: httpx2.Response) -> float:
    """Return the seconds that a response asks to wait: its header has a number or a date."""
    value = response.headers.get("retry-after", "")
    try:
        if re.fullmatch(r"[\d.]+", value):
            return float(value)
        return max(0.0, parsedate_to_datetime(value).timestamp() - time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


# -- limits -----------------------------------------------------------------------------------------------------------
@dataclass
class Taken:
    """What one request took of a limit."""

    time: float
    amount: float  # may be corrected when it is known


class RateLimit:
    """At most so much in any minute; None: no limit."""

    def __init__(self, most: int | None) -> None:
        self.most = most
        self.taken: deque[Taken] = deque()
        self.turn = asyncio.Lock()

    async def take(self, amount: float) -> Taken:
        """Wait until the amount is within the limit, and take it."""
        if self.most is None:
            return Taken(0.0, amount)
        async with self.turn:
            while True:
                now = monotonic()
                while self.taken and self.taken[0].time <= now - MINUTE:
                    self.taken.popleft()
                # more than the limit alone goes when nothing else is in the minute
                if not self.taken or sum([taken.amount for taken in self.taken]) + amount <= self.most:
                    break
                await sleep(self.taken[0].time + MINUTE - now)
            taken = Taken(now, amount)
            self.taken.append(taken)
        return taken


@dataclass
class Usage:
    """Requests and tokens used so far, asked now or kept, and what they cost; the same request counts once."""

    price_in: float  # dollars a million tokens
    price_out: float
    max_cost: float | None
    asked: int = 0
    cached: int = 0
    estimated: int = 0
    prompt: int = 0  # tokens
    completion: int = 0
    keys: set[bytes] = field(default_factory=set)  # of the requests
    reserved: dict[bytes, float] = field(default_factory=dict)  # dollars of requests under way, at most
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    def add(self, key: bytes, reply: Reply, is_cached: bool) -> None:
        if key in self.keys:
            return
        self.keys.add(key)
        if is_cached:
            self.cached += 1
        else:
            self.asked += 1
        prompt, completion = reply.tokens
        self.prompt += prompt
        self.completion += completion
        self.estimated += reply.estimated

    def price(self, prompt: int, completion: int) -> float:
        """Return the dollars of so many tokens."""
        return (prompt * self.price_in + completion * self.price_out) / 1e6

    def cost(self) -> float:
        return self.price(self.prompt, self.completion)

    def can_pay(self, cost: float) -> bool:
        return self.cost() + sum(self.reserved.values()) + cost <= self.max_cost

    @asynccontextmanager
    async def reserve(self, key: bytes, cost: float) -> AsyncIterator[None]:
        """Set aside the dollars of a request while it is under way. Raises OverBudget where they are not left."""
        if self.max_cost is None:
            yield
            return
        async with self.changed:
            await self.changed.wait_for(lambda: not self.reserved or self.can_pay(cost))
            if not self.can_pay(cost):
                raise OverBudget
            self.reserved[key] = cost
        try:
            yield
        finally:
            del self.reserved[key]
            async with self.changed:
                self.changed.notify_all()

    def describe(self) -> str:
        text = (
            f"{self.asked:,} asked, {self.cached:,} from the cache, {self.prompt:,} tokens in, {self.completion:,} out"
        )
        if self.price_in or self.price_out:
            text += f", ${self.cost():.4f}"
        return text


# -- the client -------------------------------------------------------------------------------------------------------
class Endpoint:
    """Answers requests from the cache, and asks what it does not hold."""

    def __init__(self, options: EndpointOptions, api_key: str, cache: ReplyCache) -> None:
        self.options = options
        self.api_key = api_key
        self.cache = cache
        self.url = options.base_url.rstrip("/") + "/chat/completions"
        headers = {"Content-Type": "application/json"}
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        limits = httpx2.Limits(max_connections=options.max_concurrency)
        self.client = httpx2.AsyncClient(headers=headers, timeout=options.timeout, limits=limits)
        self.slots = asyncio.Semaphore(options.max_concurrency)
        self.requests = RateLimit(options.requests_per_minute)
        self.tokens = RateLimit(options.tokens_per_minute)
        self.usage = Usage(options.price_in, options.price_out, options.max_cost)
        self.under_way: dict[bytes, asyncio.Task[Reply]] = {}  # the same request twice at a time is asked once
        self.paused_until = 0.0  # by monotonic()
        self.failures = 0  # in a row
        # the UsageError that ends the run, whichever request met it
        self.halted: asyncio.Future[UsageError] = asyncio.get_running_loop().create_future()

    async def close(self) -> None:
        await self.client.aclose()

    async def complete(self, body: dict, attempt: int, max_tokens: int) -> Reply:
        """Return the reply to a request. Raises InvalidRow, OverBudget, UsageError.

        attempt: the same request is another sample under another number; max_tokens: of the completion, at most.
        """
        data = dump_json(body)
        key = sha256(data + b" %d" % attempt).digest()
        if key not in self.under_way:
            kept = self.cache.get(key)
            if kept:
                reply = Reply(**kept)
                self.usage.add(key, reply, is_cached=True)
                return reply
            self.under_way[key] = asyncio.ensure_future(self.fetch(key, data, max_tokens))
            self.under_way[key].add_done_callback(lambda _: self.under_way.pop(key))
        return await self.under_way[key]

    async def fetch(self, key: bytes, data: bytes, max_tokens: int) -> Reply:
        """Return the reply to a request that is not kept, and keep it."""
        prompt_tokens = len(data) // 2  # half of its bytes: more tokens than any text has in practice
        jitter = random.Random(f"{self.options.seed} {key.hex()}")
        try:
            async with self.usage.reserve(key, self.usage.price(prompt_tokens, max_tokens)):
                reply = await self.retry(data, prompt_tokens + max_tokens, jitter)
                self.cache.put(key, asdict(reply))
                self.usage.add(key, reply, is_cached=False)
                return reply
        except UsageError as error:
            if not self.halted.done():
                self.halted.set_result(error)
            raise

    async def retry(self, data: bytes, tokens: int, jitter: random.Random) -> Reply:
        """Return the reply of the first try that does not fail."""
        tries = 0
        retries = 0
        while True:
            try:
                reply = await self.post(data, tokens)
            except RetryableError as error:
                tries += 1
                retries += error.counts
                self.failures += 1
                self.check_failures(error, retries)
                backoff = BACKOFF * 2 ** min(tries - 1, 6) * (0.5 + jitter.random())
                await sleep(max(error.wait, backoff))
            else:
                self.failures = 0
                return reply

    def check_failures(self, error: RetryableError, retries: int) -> None:
        """Raise InvalidRow where a request is not to be tried again, UsageError where none is."""
        detail = self.hide_key(error.detail)
        is_last = retries > self.options.max_retries
        is_absent = is_last and error.reason == "no connection" and not self.usage.asked
        if is_absent or self.failures >= self.options.max_failures:
            raise UsageError(
                f"{self.url}: {error.reason} ({detail}), {self.failures} failures in a row: mend it, then start again: "
                "every reply so far is kept"
            ) from None
        if is_last:
            raise InvalidRow(f"server: {error.reason}", detail) from None

    async def post(self, data: bytes, tokens: int) -> Reply:
        """Return the reply of one try. tokens: as guessed. Raises RetryableError, InvalidRow, UsageError."""
        async with self.slots:
            while self.paused_until > monotonic():
                await sleep(self.paused_until - monotonic())
            await self.requests.take(1)
            taken = await self.tokens.take(tokens)
            response = await self.send(data)
        self.check_status(response)
        reply = parse_reply(response.content, data)
        if not reply.estimated:
            taken.amount = sum(reply.tokens)
        return reply

    async def send(self, data: bytes) -> httpx2.Response:
        try:
            # httpx2's own timeout is one of each read: a server that drips would never end
            return await asyncio.wait_for(self.client.post(self.url, content=data), self.options.timeout)
        except (TimeoutError, httpx2.TimeoutException):
            raise RetryableError("time-out", f"{self.options.timeout:g} s") from None
        except httpx2.RequestError as error:
            reason = "no connection" if isinstance(error, httpx2.ConnectError) else "connection cut"
            raise RetryableError(reason, f"{type(error).__name__} {error}") from None

    def check_status(self, response: httpx2.Response) -> None:
        """Raise RetryableError, InvalidRow or UsageError for a response that is none of success."""
        status = response.status_code
        detail = self.hide_key(f"{status} {response.text[:200]}")
        wait = read_retry_after(response)
        if status in (429, 503):  # it speaks of all requests, not of this one
            self.paused_until = max(self.paused_until, monotonic() + wait)
        if status == 429:
            raise RetryableError("rate limit", detail, wait, counts=False)
        if status in RETRIED or status >= 500:
            raise RetryableError("error", detail, wait)
        is_moderation = status == 403 and self.usage.keys  # in the midst of a run it is about the row
        if status in HALTS and not is_moderation:
            raise UsageError(f"{self.url}: {detail}: {HALTS[status].format(env=self.options.api_key_env)}")
        if 300 <= status < 400:
            raise UsageError(f"{self.url}: {detail}: pass the address that it redirects to")
        if status >= 400:
            raise InvalidRow("server: request not taken", detail)

    def hide_key(self, text: str) -> str:
        """Return words of a server on one line, without the key, which some repeat."""
        text = " ".join(text.split())
        return text.replace(self.api_key, "***") if self.api_key else text
