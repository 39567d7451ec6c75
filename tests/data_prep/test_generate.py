"""data_prep/generate.py: every row in is a row out or refused by reason, whatever the endpoint does, and no answered
request is asked twice.

The endpoint is the test's own, over a real socket: it keeps every request and does what the test's function of it says,
so what should come out is written by hand here. Waiting is done on a clock that the tests turn, so a minute costs
nothing. One test asks `transformers serve` with the demo's model and compares with what the model generates here.

Each of these turns the suite red (tried): the row's own answer sent with its prompt; C in B's place; roles never
drawn, told the other way round, or the winner as the judge names it; a verdict read anywhere in a reply; C before the
reference; an unusable reply not asked anew, or with the same seed; cut answers kept, or asked again; control tokens
kept; the field `reasoning` or a think block not read; replies kept late or never read from the cache; a hash without
the model, or of the messages alone; the same request twice at a time; Retry-After ignored, holding its own request
only, or 429 counted as a failure; a backoff that does not grow or is not drawn by seed; no retries; requests or
tokens a minute unchecked, a window of half a minute, guessed tokens left in it; a budget without what is under way,
or without kept replies; a repeated request paid twice; the key in a server's words, or not sent; 401 refusing rows; a
dead or an absent server refusing rows; a stop that waits for the first row; no limit to a whole reply; concurrency
unchecked (twice: the client has its own), or one at a time; rows in the order of arrival; added rows not counted; a
twin in the wrong mode, or after the old answers; switches in a twin's prompt; reasoning sent, persona or tools not;
two instructions of one group; two runs on one cache; rows not checked; a flag that a task does not read taken without
a word, or one that it reads without an effect; another hash or other fields in the cache; refused rows not listed; rows
in another's split; a column that a folder drops not counted.
"""

import asyncio
import hashlib
import io
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

from data_prep import generate
from data_prep.common import endpoint as endpoint_module
from data_prep.common.reply_cache import ReplyCache
from tests.helpers.runs import MODULES, REPO

KEY = "sk-very-secret-key"


# -- an endpoint of the test's own ------------------------------------------------------------------------------------
def make_reply(
    content: object = "fine", usage: tuple[int, int] | None = (10, 5), end: str = "stop", **message: object
) -> tuple[int, dict, bytes]:
    """Return what an endpoint answers: (status, headers, body)."""
    reply = {"choices": [{"message": {"role": "assistant", "content": content, **message}, "finish_reason": end}]}
    reply |= {"usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1]}} if usage else {}
    return 200, {}, json.dumps(reply).encode()


def make_error(status: int, words: str = "no", **headers: str) -> tuple[int, dict, bytes]:
    """Return how an endpoint fails."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, headers, json.dumps({"error": words}).encode()


CUT, HANG, DRIP = "cut", "hang", "drip"  # the head and some of the body; nothing; a blank every 50 ms, then an answer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet

    def log_message(self, *_):
        pass

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.bodies.append(body)
            server.heads.append((self.path, dict(self.headers)))
            server.now += 1
            server.most = max(server.most, server.now)
        try:
            done = server.does(body)
            if done == HANG:
                server.free.wait(30)
                self.close_connection = True
                return
            if done == CUT:
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b'{"choices": [{"mess')
                self.close_connection = True
                return
            if done == DRIP:
                data = make_reply()[2]
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (30 + len(data)))
                for _ in range(30):
                    self.wfile.write(b" ")
                    self.wfile.flush()
                    time.sleep(0.05)
                self.wfile.write(data)
                return
            status, headers, data = done
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:  # the client is gone
            self.close_connection = True
        finally:
            with server.lock:
                server.now -= 1


class Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 64

    def handle_error(self, *_):  # a client that left
        pass


@pytest.fixture
def endpoint():
    """A server; .does is the test's function of a request's body, .bodies what was asked."""
    server = Server(("127.0.0.1", 0), Handler)
    server.lock, server.free, server.bodies, server.heads = threading.Lock(), threading.Event(), [], []
    server.now = server.most = 0
    server.does = lambda body: make_reply()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.free.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def clock(monkeypatch):
    """A clock that only sleep() turns; .slept lists for how long."""
    now = SimpleNamespace(time=1000.0, slept=[])

    async def sleep(seconds):
        now.slept.append(seconds)
        now.time += seconds
        await asyncio.sleep(0)

    monkeypatch.setattr(endpoint_module, "sleep", sleep)
    monkeypatch.setattr(endpoint_module, "monotonic", lambda: now.time)
    return now


# -- running it -------------------------------------------------------------------------------------------------------
@pytest.fixture
def run(endpoint, clock, tmp_path, monkeypatch):
    """run(task, rows, *flags): main() in this process; its code, stdout, stderr, and what it wrote, read."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def go(
        task: str, rows: list | Path, *flags: object, out: str = "out.jsonl", url: str = endpoint.url
    ) -> SimpleNamespace:
        path = write(tmp_path / "rows.jsonl", rows) if isinstance(rows, list) else rows
        arguments = ["x.py", task, path, "--out", tmp_path / out, "--model", "m", "--base_url", url, *flags]
        stdout = io.StringIO()
        stderr = io.StringIO()
        with mock.patch("sys.argv", [*map(str, arguments)]), redirect_stdout(stdout), redirect_stderr(stderr):
            try:
                code = generate.main()
            except SystemExit as error:
                code = error.code
        done = SimpleNamespace(code=code, out=stdout.getvalue(), err=stderr.getvalue(), rows=[], rejected=[], report={})
        if (tmp_path / "out.report.json").exists():
            done.rows, done.rejected = lines(tmp_path / "out.jsonl"), lines(tmp_path / "out.rejected.jsonl")
            done.report = json.loads((tmp_path / "out.report.json").read_text())
            out_counts = done.report["out"].values()
            refused = sum(done.report["refused"].values())
            assert done.report["in"] + done.report.get("added", 0) == sum(out_counts) + refused
            assert (sum(out_counts), refused) == (len(done.rows), len(done.rejected))
        return done

    return go


def write(path: Path, rows: list) -> Path:
    """Write rows, or lines as they stand, to a file."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def lines(path: Path) -> list[dict]:
    """Return the rows of a file, none where it is missing."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def row(number: int, *turns: str, **more: object) -> dict:
    """Return a row of a user's and an assistant's turns in alternation."""
    turns = turns or (f"question {number}", f"own {number}")
    roles = ("user", "assistant") * len(turns)
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    return {"id": f"r{number}", "messages": messages, **more}


def last(body: dict) -> str:
    return body["messages"][-1]["content"]


def fresh(tmp_path: Path) -> None:
    """Remove what was written but the cache."""
    for name in ("out.jsonl", "out.report.json", "out.rejected.jsonl"):
        (tmp_path / name).unlink(missing_ok=True)


# -- answer -----------------------------------------------------------------------------------------------------------
def test_second_and_third_answers(run, endpoint, tmp_path):
    """B over plain rows, C over rows with B: the same prompt, without the row's own answer."""

    def does(body):
        reasoning = "hm" if body["temperature"] == 0 else None
        return make_reply(last(body)[::-1], reasoning_content=reasoning)

    endpoint.does = does
    system = {"role": "system", "content": "Be brief."}
    rows = [row(n) for n in range(40)]
    rows[3]["messages"] = [system, *row(3, "one", "two", "three", "four")["messages"]]
    done = run("answer", rows, "--temperature", 0.7)
    assert done.code == 0, done.err
    assert [one["id"] for one in done.rows] == [f"r{n}" for n in range(40)]  # in order, whoever came first
    assert done.rows[0]["answers"] == {"A": "own 0", "B": "0 noitseuq"}
    assert done.rows[3]["answers"] == {"A": "four", "B": "eerht"}
    assert done.rows[3]["messages"] == rows[3]["messages"] and "answers_reasoning" not in done.rows[3]
    asked = next(body for body in endpoint.bodies if last(body) == "three")
    assert asked["messages"] == [system, *row(3, "one", "two", "three")["messages"]]
    assert (asked["model"], asked["max_tokens"], asked["temperature"]) == ("m", 4096, 0.7)
    assert {path for path, _ in endpoint.heads} == {"/v1/chat/completions"}
    (tmp_path / "out.jsonl").rename(tmp_path / "b.jsonl")
    fresh(tmp_path)
    done = run("answer", tmp_path / "b.jsonl", "--temperature", 0)
    assert done.rows[0]["answers"] == {"A": "own 0", "B": "0 noitseuq", "C": "0 noitseuq"}
    assert done.rows[0]["answers_reasoning"] == {"C": "hm"}


def test_what_a_row_holds_reaches_the_model(run, endpoint):
    """Persona, mode and other template arguments, tools, calls with text arguments; no reasoning, no loss_mask."""
    call = {"type": "function", "id": "c1", "function": {"name": "f", "arguments": {"x": 1}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "secret", "loss_mask": 0},
        {"role": "tool", "content": "2", "tool_call_id": "c1", "name": "f"},
        {"role": "assistant", "content": "two", "reasoning_content": "secret"},
    ]
    kwargs = {"custom_instructions": "You are Ada.", "enable_thinking": False, "train_turns": "last", "x": 1}
    flags = ["--no_think", '{"reasoning": {"enabled": false}}', "--extra_body"]
    flags += ['{"top_p": 0.9, "seed": null, "chat_template_kwargs": {"y": 2}}']
    done = run("answer", [{"id": "a", "messages": messages, "tools": [tool], "chat_template_kwargs": kwargs}], *flags)
    assert done.code == 0, done.err
    (body,) = endpoint.bodies
    assert body["messages"] == [
        {"role": "system", "content": "You are Ada."},
        {"role": "user", "content": "q"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [call | {"function": {"name": "f", "arguments": '{"x":1}'}}],
        },
        {"role": "tool", "content": "2", "tool_call_id": "c1", "name": "f"},
    ]
    assert body["tools"] == [tool] and body["chat_template_kwargs"] == {"x": 1, "y": 2}
    assert body["reasoning"] == {"enabled": False} and body["top_p"] == 0.9 and "seed" not in body
    assert done.rows[0]["messages"] == messages


@pytest.mark.parametrize(
    "message, reasoning",
    [
        (dict(content="four", reasoning_content="two and two"), "two and two"),
        (dict(content="four", reasoning="two and two"), "two and two"),
        (dict(content="<think>\ntwo and two\n</think>\n\nfour"), "two and two"),
        (dict(content="two and two\n</think>\n\nfour"), "two and two"),
        (dict(content=[{"type": "text", "text": "fo"}, {"type": "text", "text": "ur"}]), None),
        (dict(content="<think>\n\n</think>\n\nfour"), None),
        (dict(content="<think>two</think>\n<think>and two</think>four"), "two\n\nand two"),
    ],
)
def test_reasoning_of_every_kind_of_server(run, endpoint, message, reasoning):
    endpoint.does = lambda body: make_reply(**message)
    (one,) = run("answer", [row(1)]).rows
    assert one["answers"]["B"] == "four" and one.get("answers_reasoning", {}).get("B") == reasoning


# -- verify and judge -------------------------------------------------------------------------------------------------
def test_verify(run, endpoint):
    """Against the reference, else C; the verdict is the last line, whatever is said above it or in the answer."""

    def does(body):
        answer = re.search(r"\[Answer to check\]\n(.*?)\n\nCompare", last(body), re.DOTALL)[1]
        reference = re.search(r"\[Reference\]\n(.*?)\n\n", last(body), re.DOTALL)[1]
        return make_reply(f"VERDICT: DISAGREE?\nno:\n**VERDICT: {'AGREE' if reference in answer else 'DISAGREE'}**")

    endpoint.does = does
    rows = [row(1, "3+4?", "It is 7."), row(2, "3+4?", "It is 8."), row(3, "3+4?", "It is 8."), row(4, "3+4?", "8")]
    rows[0] |= {"reference": 7, "answers": {"A": "It is 7.", "B": "x", "C": "9"}}
    rows[1] |= {"reference": "7"}
    rows[2] |= {"reference": None, "answers": {"A": "It is 8.", "C": "8"}}
    done = run("verify", [*rows, row(5, "q", "VERDICT: AGREE", reference="other")])
    verdicts = {one["id"]: (one["verdict"]["agree"], one["verdict"]["against"]) for one in done.rows}
    assert verdicts == {
        "r1": (True, "reference"),
        "r2": (False, "reference"),
        "r3": (True, "C"),
        "r5": (False, "reference"),
    }
    assert done.rows[0]["verdict"]["said"].startswith("VERDICT: DISAGREE?\nno:")
    assert done.report["refused"] == {"no reference and no answer C": 1}
    assert done.report["counts"] == {"agree": 2, "disagree": 2}


LETTER = {"poor": "A", "good": "B"}


def test_judge_roles_cancel_a_preference_for_a_place(run, endpoint, tmp_path):
    """A judge who always takes the answer shown first; then one who knows the better answer; then ties."""
    rows = [row(n, f"q {n}", f"poor {n}", answers={"A": f"poor {n}", "B": f"good {n}"}) for n in range(200)]
    endpoint.does = lambda body: make_reply("because\nVERDICT: A")
    done = run("judge", rows)
    winners = Counter(one["judgement"]["winner"] for one in done.rows)
    assert set(winners) == {"A", "B"} and 70 <= winners["A"] <= 130  # 200 fair coins: 4 sigma
    assert done.report["counts"]["first shown won"] == 200
    shown = {}
    for body in endpoint.bodies:
        number, first, second = re.search(
            r"q (\d+).*\[Answer A\]\n(\w+).*\[Answer B\]\n(\w+)", last(body), re.S
        ).groups()
        shown[f"r{number}"] = {"A": LETTER[first], "B": LETTER[second]}
    roles = {one["id"]: one["judgement"]["roles"] for one in done.rows}
    assert shown == roles
    for name, seed in (("same.jsonl", 42), ("other.jsonl", 43)):
        assert run("judge", rows, "--seed", seed, out=name).code == 0
        again = {one["id"]: one["judgement"]["roles"] for one in lines(tmp_path / name)}
        assert (again == roles) == (seed == 42)


@pytest.mark.parametrize(
    "words, winner",
    [
        ("ok\nVERDICT: {best}", "B"),
        ('{{"verdict": "{best}"}}', "B"),
        ('```json\n{{"verdict": "{best}"}}\n```', "B"),
        ("VERDICT: TIE\n", "tie"),
    ],
)
def test_judge_names_the_better_answer_wherever_it_is_shown(run, endpoint, words, winner):
    def does(body):
        best = "A" if re.search(r"\[Answer A\]\n(\w+)", last(body))[1] == "good" else "B"
        return make_reply(words.format(best=best))

    endpoint.does = does
    done = run("judge", [row(n, f"q {n}", "poor", answers={"A": "poor", "B": "good"}) for n in range(12)])
    assert [one["judgement"]["winner"] for one in done.rows] == [winner] * 12
    assert len({json.dumps(one["judgement"]["roles"]) for one in done.rows}) == 2


@pytest.mark.parametrize(
    "words",
    [
        "A",
        "I prefer A.",
        "VERDICT: A\nbut B is fine",
        "VERDICT: C",
        "VERDICT: a",
        "VERDICT:",
        "VERDICT: A or B",
        '{"verdict": ["A"]}',
        "[1]",
        '{"verdict": "A"',
    ],
)
def test_a_verdict_is_read_strictly(run, endpoint, words):
    endpoint.does = lambda body: make_reply(words)
    done = run("judge", [row(1, answers={"A": "x", "B": "y"})], "--tries", 2)
    assert done.code == 1 and "no verdict" in done.out
    assert [body["seed"] for body in endpoint.bodies] == [42, 43]


def test_garbage_once_is_asked_anew(run, endpoint):
    endpoint.does = lambda body: make_reply("VERDICT: B" if body["seed"] == 9 else "hm")
    done = run("judge", [row(1, answers={"A": "x", "B": "y"})], "--seed", 7)
    assert done.code == 0 and done.report["requests"] == 3 and done.report["tokens"]["prompt"] == 30


def test_judge_needs_two_answers(run):
    assert "no answer B" in run("judge", [row(1)]).out


# -- twins and ifthink ------------------------------------------------------------------------------------------------
def thinker(body):
    """Counts its answers; reasons where the request says so."""
    reasons = body["chat_template_kwargs"]["enable_thinking"]
    text = f"{last(body)} -> {len(body['messages'])}"
    return make_reply(text, reasoning_content=f"about {last(body)}" if reasons else None)


def test_twins_of_a_plain_row(run, endpoint):
    endpoint.does = thinker
    one = row(1, "q1", "a1", "q2", "a2", tags=["chat", "no_think"], lang="en", source="s")
    think, plain = run("twins", [one]).rows
    assert plain["messages"] == one["messages"]
    assert think["messages"] == [
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "q1 -> 1", "reasoning_content": "about q1"},
        {"role": "user", "content": "q2"},
        {"role": "assistant", "content": "q2 -> 3", "reasoning_content": "about q2"},
    ]
    assert [body["messages"] for body in endpoint.bodies] == [
        [{"role": "user", "content": "q1"}],
        [
            {"role": "user", "content": "q1"},
            {"role": "assistant", "content": "q1 -> 1"},
            {"role": "user", "content": "q2"},
        ],
    ]
    assert (think["id"], plain["id"]) == ("r1-think", "r1-no_think")
    assert think["tags"] == ["chat", "think", "pair:r1"] and plain["tags"] == ["chat", "no_think", "pair:r1"]
    assert think["chat_template_kwargs"] == {"enable_thinking": True}
    assert plain["chat_template_kwargs"] == {"enable_thinking": False}


def test_twins_of_a_reasoning_row_and_of_both(run, endpoint, tmp_path):
    endpoint.does = thinker
    one = row(1, "q1", "a1")
    one["messages"][1]["reasoning_content"] = "hm"
    think, plain = run("twins", [one]).rows
    assert think["messages"] == one["messages"]
    assert plain["messages"][1] == {"role": "assistant", "content": "q1 -> 1"}
    fresh(tmp_path)
    think, plain = run("twins", [one], "--both").rows
    assert think["messages"][1] == {"role": "assistant", "content": "q1 -> 1", "reasoning_content": "about q1"}
    assert plain["messages"][1] == {"role": "assistant", "content": "q1 -> 1"}


def test_twins_go_to_a_folder_and_are_accounted_for(run, endpoint, tmp_path):
    from datasets import load_from_disk

    endpoint.does = thinker
    rows = [row(n) for n in range(5)] + [row(9, "be /no_think", "x")]
    run("twins", rows, out="folder")
    data = load_from_disk(str(tmp_path / "folder"))["train"]
    assert len(data) == 10 and sorted(Counter(data["id"])) == sorted(
        f"r{n}-{m}" for n in range(5) for m in ("think", "no_think")
    )
    report = json.loads((tmp_path / "folder" / "report.json").read_text())
    assert (report["in"], report["added"], report["out"], report["refused"]) == (
        6,
        5,
        {"train": 10},
        {"switch in the prompt": 1},
    )
    assert (tmp_path / "folder.cache.sqlite").is_file()


def test_splits_of_a_folder(run, endpoint, tmp_path, monkeypatch):
    """Each row stays in its split; a file, which has no splits, is refused before anything is asked."""
    from datasets import Dataset, DatasetDict, load_from_disk

    monkeypatch.setattr(generate, "BATCH", 2)
    endpoint.does = thinker
    splits = {"train": [row(n) for n in range(7)], "validation": [row(n) for n in range(7, 10)]}
    DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()}).save_to_disk(str(tmp_path / "in"))
    assert run("twins", tmp_path / "in", out="folder").code == 0
    made = load_from_disk(str(tmp_path / "folder"))
    for name, rows in splits.items():
        assert made[name]["id"][:] == [f"{one['id']}-{mode}" for one in rows for mode in ("think", "no_think")]
    endpoint.bodies.clear()
    done = run("answer", tmp_path / "in")
    assert done.code == 2 and "train, validation" in done.err and not endpoint.bodies


def test_a_twin_in_the_wrong_mode_is_refused(run, endpoint):
    endpoint.does = lambda body: make_reply("x", reasoning_content=None)
    assert "no reasoning" in run("twins", [row(1)]).out
    endpoint.does = lambda body: make_reply("x", reasoning_content="always")
    assert "reasoning in a no_think answer" in run("twins", [row(2)], "--both").out


def test_ifthink(run, endpoint):
    """Turn 1 is the instruction; the model writes 2 and 3 from two types of instruction; each turn has reasoning."""

    def does(body):
        if "Reply with JSON only" in last(body):
            wanted = re.findall(r"(?:Second|Third) message: (.*)\.\n", last(body))
            return make_reply(json.dumps({"second": f"now with {wanted[0]}", "third": f"now with {wanted[1]}"}))
        return thinker(body)

    endpoint.does = does
    system = {"role": "system", "content": "Be kind."}
    rows = [row(n, f"write {n}", "old") for n in range(30)]
    rows[0]["messages"].insert(0, system)
    done = run("ifthink", [*rows, row(99, "a", "b", "c", "d")])
    assert done.report["refused"] == {"not a single turn": 1}
    assert [turn["role"] for turn in done.rows[0]["messages"]] == ["system"] + ["user", "assistant"] * 3
    for number, one in enumerate(done.rows):
        turns = [turn for turn in one["messages"] if turn["role"] != "system"]
        texts = [drawn["text"] for drawn in one["instructions"]]
        assert [turn["content"] for turn in turns[::2]] == [f"write {number}", *(f"now with {text}" for text in texts)]
        assert all(
            turn["reasoning_content"] == f"about {turns[2 * k]['content']}" for k, turn in enumerate(turns[1::2])
        )
        groups = [drawn["id"].split(":")[0] for drawn in one["instructions"]]
        assert len(set(groups)) == 2 and "{" not in "".join(texts)
        assert one["tags"] == ["think", "ifthink"] and one["chat_template_kwargs"] == {"enable_thinking": True}
    assert len({drawn["id"] for one in done.rows for drawn in one["instructions"]}) > 8
    dropped = run("ifthink", rows, out="folder")  # a folder has no such column
    assert dropped.code == 0 and "keys not kept: 30 instructions" in dropped.out
    ids = {instruction.id for instruction in generate.INSTRUCTIONS}
    assert ids >= {drawn["id"] for one in done.rows for drawn in one["instructions"]}


@pytest.mark.parametrize(
    "words", ["no", '{"second": "x"}', '{"second": "x", "third": ""}', '{"second": "x", "third": 3}']
)
def test_follow_ups_are_read_strictly(run, endpoint, words):
    endpoint.does = lambda body: make_reply(words)
    assert "no follow-up prompts" in run("ifthink", [row(1)]).out and len(endpoint.bodies) == 3


# -- an endpoint that fails -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "fault, reason",
    [
        (lambda: make_error(500), "server: error"),
        (lambda: make_error(503, Retry_After="2"), "server: error"),
        (lambda: CUT, "server: connection cut"),
        (lambda: HANG, "server: time-out"),
        (lambda: DRIP, "server: time-out"),
        (lambda: (200, {}, b'{"choices": [{"mess'), "server: reply that is not JSON"),
        (lambda: (200, {}, b"\xff\xfe"), "server: reply that is not JSON"),
        (lambda: (200, {}, b'{"choices": [{"message": {"content": "\\ud800"}}]}'), "server: reply that is not JSON"),
        (lambda: (200, {"Content-Encoding": "gzip"}, b"no gzip"), "server: connection cut"),
        (lambda: (200, {}, b'{"error": "busy"}'), "server: reply without an answer"),
        (lambda: (200, {}, b"[]"), "server: reply without an answer"),
        (lambda: (200, {}, b'{"choices": []}'), "server: reply without an answer"),
        (lambda: (200, {}, b'{"choices": [{"message": {"content": 5}}]}'), "server: reply without an answer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "fault",
)
def test_failures_pass_or_refuse_the_row(run, endpoint, fault, reason):
    """Row 1 fails twice and is answered then, row 2 fails for ever: refused after --max_retries, the others stand."""
    tries = Counter()

    def does(body):
        tries[last(body)] += 1
        if last(body) == "question 2" or last(body) == "question 1" and tries["question 1"] <= 2:
            return fault()
        return make_reply()

    endpoint.does = does
    done = run("answer", [row(n) for n in range(4)], "--timeout", 0.3, "--max_retries", 2)
    assert done.code == 0, done.err
    assert [one["id"] for one in done.rows] == ["r0", "r1", "r3"]
    assert done.report["refused"] == {reason: 1}
    assert (done.rejected[0]["line"], done.rejected[0]["id"], done.rejected[0]["file"]) == (3, "r2", "rows.jsonl")
    assert tries == {"question 0": 1, "question 1": 3, "question 2": 3, "question 3": 1}


CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


@pytest.mark.parametrize(
    "reply, reason, times",
    [
        (dict(content="half an", end="length"), "cut by length", 1),
        (dict(content="", end="content_filter"), "content filter", 1),
        (dict(content=""), "empty answer", 3),
        (dict(content=None), "empty answer", 3),
        (dict(content="<think>no end"), "control token in text", 3),
        (dict(content="<think>hm</think>half <think>no end"), "empty answer", 3),
        (dict(content=f"<think>hm</think>{CALL}"), "answer is a tool call", 3),
        (dict(content=f"<think>hm</think>{CALL[:-20]}"), "control token in text", 3),
        (dict(content="x<|im_end|>"), "control token in text", 3),
        (dict(content="x", reasoning_content="<|im_end|>"), "control token in text", 3),
        (dict(content=None, tool_calls=[{"id": "x"}]), "answer is a tool call", 3),
    ],
    ids=str,
)
def test_replies_that_no_row_may_hold(run, endpoint, reply, reason, times):
    endpoint.does = lambda body: make_reply(**reply)
    done = run("answer", [row(1)])
    assert done.code == 1 and f"1 {reason}" in done.out and len(endpoint.bodies) == times


def test_a_request_that_is_not_taken(run, endpoint):
    """400 is about the row: not tried again, its words are kept. As is 403, once another row was answered."""
    endpoint.does = lambda body: make_error(400, f"too long {KEY}") if "2" in last(body) else make_reply()
    with mock.patch.dict(os.environ, {"OPENAI_API_KEY": KEY}):
        done = run("answer", [row(n) for n in range(4)], "--max_concurrency", 1)
    assert done.report["refused"] == {"server: request not taken": 1} and len(endpoint.bodies) == 4
    assert done.rejected[0]["detail"] == '400 {"error": "too long ***"}'


@pytest.mark.parametrize(
    "status, words", [(401, "MY_KEY"), (402, "top up"), (403, "MY_KEY"), (404, "--model"), (308, "redirects")]
)
def test_what_no_row_can_help_stops_the_run(run, endpoint, tmp_path, status, words):
    endpoint.does = lambda body: make_error(status, f"wrong key {KEY}")
    with mock.patch.dict(os.environ, {"MY_KEY": KEY}):
        done = run("answer", [row(n) for n in range(40)], "--api_key_env", "MY_KEY", "--max_concurrency", 2)
    assert done.code == 2 and done.err.count("\n") == 1 and words in done.err and str(status) in done.err
    assert KEY not in done.err and len(endpoint.bodies) <= 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.cache.sqlite", "rows.jsonl"]


def test_a_stop_does_not_wait_for_the_first_row(run, endpoint, tmp_path):
    """Row 0 would be answered after three seconds, row 1 is refused for a wrong key: row 0's answer never comes."""

    def does(body):
        if "1" in last(body):
            return make_error(401)
        endpoint.free.wait(3)
        return make_reply()

    endpoint.does = does
    assert run("answer", [row(0), row(1)]).code == 2
    kept = sqlite3.connect(tmp_path / "out.cache.sqlite").execute("SELECT count(*) FROM replies").fetchone()
    assert kept == (0,)


def test_moderation_in_the_midst_is_about_the_row(run, endpoint):
    endpoint.does = lambda body: make_error(403) if "2" in last(body) else make_reply()
    assert run("answer", [row(n) for n in range(4)], "--max_concurrency", 1).report["refused"] == {
        "server: request not taken": 1
    }


def test_nobody_listens(run, clock):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    done = run("answer", [row(n) for n in range(3)], url=url)
    assert done.code == 2 and "no connection" in done.err and done.err.count("\n") == 1


def test_a_server_that_dies_stops_the_run(run, endpoint, tmp_path):
    """Not a file of refused rows; what it answered before is not asked again."""
    tickets = iter(range(1000))
    endpoint.does = lambda body: make_reply() if next(tickets) < 10 else make_error(502)
    done = run("answer", [row(n) for n in range(50)], "--max_failures", 20, "--max_concurrency", 4)
    assert done.code == 2 and "20 failures in a row" in done.err and not (tmp_path / "out.jsonl").exists()
    seen = Counter(map(last, endpoint.bodies))
    endpoint.bodies.clear()
    endpoint.does = lambda body: make_reply()
    assert run("answer", [row(n) for n in range(50)]).code == 0
    assert len(endpoint.bodies) == 40 and len(seen) < 50


def test_failures_that_are_not_in_a_row_do_not_stop_the_run(run, endpoint):
    """Each row fails once and is answered then: 30 failures, but no more in a row than the 16 rows under way."""
    tries = Counter()

    def does(body):
        tries[last(body)] += 1
        return make_error(500) if tries[last(body)] == 1 else make_reply()

    endpoint.does = does
    done = run("answer", [row(n) for n in range(30)], "--max_failures", 2, "--max_concurrency", 1)
    assert done.code == 2 and "2 failures in a row" in done.err
    tries.clear()
    done = run("answer", [row(n) for n in range(30)], "--max_failures", 17, "--max_concurrency", 1)
    assert done.code == 0 and len(done.rows) == 30


# -- pace -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("retry_after, least, most", [("7", 7, 7), ("date", 28, 30), ("soon", 0, 1.5), (None, 0, 1.5)])
def test_429_waits_for_retry_after_and_does_not_count(run, endpoint, clock, retry_after, least, most):
    """Twelve refusals are more than --max_retries; each wait is Retry-After's, or the backoff where it says nothing."""
    left = [12 if retry_after == "7" else 1]

    def does(body):
        if left[0]:
            left[0] -= 1
            value = formatdate(time.time() + 30, usegmt=True) if retry_after == "date" else retry_after
            return make_error(429, **({"Retry_After": value} if retry_after else {}))
        return make_reply()

    endpoint.does = does
    assert run("answer", [row(1)], "--max_retries", 1).code == 0
    assert least <= clock.slept[0] <= most
    assert len(clock.slept) >= (12 if retry_after == "7" else 1)


def test_429_holds_all_requests(run, endpoint, monkeypatch):
    """After one 429, no request goes before its time, whoever asks. On a clock that runs 500 times as fast."""
    monkeypatch.setattr(endpoint_module, "sleep", lambda seconds: asyncio.sleep(seconds / 500))
    monkeypatch.setattr(endpoint_module, "monotonic", lambda: time.monotonic() * 500)
    times = []

    def does(body):
        times.append(time.monotonic() * 500)
        return make_error(429, Retry_After="100") if len(times) == 1 else make_reply()

    endpoint.does = does
    assert run("answer", [row(n) for n in range(5)], "--max_concurrency", 1).code == 0
    assert len(times) == 6 and times[1] - times[0] >= 100


def test_backoff_doubles_with_jitter_by_seed(run, endpoint, clock, tmp_path):
    def waits(seed):
        clock.slept.clear()
        endpoint.does = lambda body: make_error(500)
        assert run("answer", [row(1)], "--max_retries", 6, "--seed", seed).code == 1
        return list(clock.slept)

    one = waits(1)
    assert len(one) == 6 and all(0.5 * 2**k <= wait <= 1.5 * 2**k for k, wait in enumerate(one))
    assert waits(1) == one != waits(2)


@pytest.mark.parametrize("name, amount, most, whole", [("requests", 1, 7, 330), ("tokens", 90, 900, 280)])
def test_no_minute_holds_more_than_its_limit(run, endpoint, clock, name, amount, most, whole):
    """40 requests, the first ones slow, counted by the endpoint: what starts within any 60 seconds of the clock. Tokens
    are guessed at first, over 120 for 90: were the guess not mended, a minute would hold 7 requests, not 9."""
    starts = []

    def does(body):
        starts.append(clock.time)
        clock.time += 5 if len(starts) <= 6 else 0
        return make_reply(usage=(60, 30))

    endpoint.does = does
    flags = [f"--{name}_per_minute", most, "--max_tokens", 64, "--max_concurrency", 1]
    assert run("answer", [row(n) for n in range(40)], *flags).code == 0
    assert max(sum(start <= other < start + 60 for other in starts) for start in starts) * amount <= most
    assert starts[-1] - starts[0] <= whole


def test_limits_hold_for_many_at_once(clock):
    """50 takers of 1 to 9 at a time, 20 a minute; one of 30, more than the limit, goes alone."""

    async def take():
        limit = endpoint_module.RateLimit(20)
        return await asyncio.gather(*(limit.take(n % 9 + 1) for n in range(50)), limit.take(30))

    *taken, alone = asyncio.run(take())
    for first in taken:
        assert sum(one.amount for one in taken if first.time <= one.time < first.time + 60) <= 20
        assert abs(first.time - alone.time) >= 60
    total = sum(n % 9 + 1 for n in range(50))
    assert 60 * (total / 20 - 1) <= max(one.time for one in taken) - 1000 <= 60 * (total / 12 + 1)  # over half full


def test_concurrency_is_reached_and_not_exceeded(run, endpoint):
    wall = threading.Barrier(5)

    def does(body):
        wall.wait(10)  # five must be here together
        time.sleep(0.1)  # and a sixth could come
        return make_reply()

    endpoint.does = does
    assert run("answer", [row(n) for n in range(20)], "--max_concurrency", 5).code == 0
    assert endpoint.most == 5


# -- cost -------------------------------------------------------------------------------------------------------------
def test_cost_and_tokens_are_reported(run, endpoint, tmp_path):
    endpoint.does = lambda body: make_reply(usage=(1000, 200))
    flags = ["--price_in", 0.5, "--price_out", 2]
    done = run("answer", [row(n) for n in range(30)] + [row(0)], *flags)
    assert done.report["requests"] == 30  # the same request is one
    assert done.report["tokens"] == {"prompt": 30_000, "completion": 6_000, "estimated": 0}
    assert done.report["cost"] == 0.027 and "$0.0270" in done.out and "30 asked" in done.out
    fresh(tmp_path)
    again = run("answer", [row(n) for n in range(30)] + [row(0)], *flags)
    assert again.report == done.report and "0 asked, 30 from the cache" in again.out


def test_usage_that_is_not_named_is_estimated(run, endpoint):
    endpoint.does = lambda body: make_reply("abcd" * 50, usage=None)
    done = run("answer", [row(1)])
    sent = len(json.dumps(endpoint.bodies[0], separators=(",", ":")))
    assert done.report["tokens"] == {"prompt": sent // 4, "completion": 50, "estimated": 1}


@pytest.mark.parametrize("concurrency", [1, 8])
def test_max_cost_is_not_exceeded_and_more_goes_on(run, endpoint, tmp_path, concurrency):
    """100 answers of $0.01; a budget of 0.255 pays 25, and the next run, with more, asks the other 75 only."""
    endpoint.does = lambda body: make_reply(usage=(0, 100))
    rows = [row(n) for n in range(100)]
    flags = ["--price_out", 100, "--max_tokens", 100, "--max_concurrency", concurrency]
    done = run("answer", rows, *flags, "--max_cost", 0.255)
    assert done.code == 1 and "--max_cost" in done.err and not (tmp_path / "out.jsonl").exists()
    assert len(endpoint.bodies) == 25
    done = run("answer", rows, *flags, "--max_cost", 1)
    assert done.code == 0 and len(endpoint.bodies) == 100 and done.report["cost"] == 1
    assert len({json.dumps(body) for body in endpoint.bodies}) == 100


# -- cache and restart ------------------------------------------------------------------------------------------------
def test_the_same_request_under_way_is_asked_once(run, endpoint):
    done = run("answer", [row(0, "same", f"own {n}") for n in range(20)])
    assert len(done.rows) == 20 and len(endpoint.bodies) == 1


def test_any_change_of_the_request_is_another(run, endpoint, tmp_path):
    for flags in (
        (),
        ("--model", "n"),
        ("--temperature", 0),
        ("--max_tokens", 7),
        ("--seed", 1),
        ("--extra_body", '{"n": 1}'),
    ):
        fresh(tmp_path)
        assert run("answer", [row(1)], *flags).code == 0
    fresh(tmp_path)
    run("answer", [row(1)])
    assert len(endpoint.bodies) == 6


def start(endpoint: Server, tmp_path: Path, *flags: object) -> subprocess.Popen:
    """Start the command on rows.jsonl."""
    paths = ["answer", tmp_path / "rows.jsonl", "--out", tmp_path / "out.jsonl"]
    arguments = [sys.executable, "-m", "data_prep.generate", *paths, "--model", "m", "--base_url", endpoint.url, *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*map(str, arguments)], env=MODULES | {"OPENAI_API_KEY": KEY}, **pipes)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_kill_in_the_middle_and_start_again(run, endpoint, tmp_path, how):
    """Row 20 hangs, the run is killed: the rows answered by then are not asked again, and the bytes are those of a run
    that nobody stopped."""
    rows, stuck = [row(n) for n in range(40)], threading.Event()

    def does(body):
        if last(body) in ("question 20", "question 21", "question 22") and not stuck.is_set():
            if sum(last(one) in ("question 20", "question 21", "question 22") for one in endpoint.bodies) == 3:
                stuck.set()
            return HANG
        return make_reply(last(body)[::-1])

    endpoint.does = does
    write(tmp_path / "rows.jsonl", rows)
    process = start(endpoint, tmp_path, "--max_concurrency", 3)
    assert stuck.wait(60)
    os.kill(process.pid, how)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (-9 if how == signal.SIGKILL else 130), err
    assert how == signal.SIGKILL or (b"start again" in err and err.count(b"\n") == 1)
    assert not (tmp_path / "out.jsonl").exists()
    before = Counter(map(last, endpoint.bodies))
    assert before == Counter(f"question {n}" for n in range(23))
    endpoint.bodies.clear()
    done = run("answer", tmp_path / "rows.jsonl", "--max_concurrency", 3)
    assert done.code == 0 and "20 asked, 20 from the cache" in done.out
    assert sorted(map(last, endpoint.bodies)) == sorted(f"question {n}" for n in range(20, 40))
    assert [one["answers"]["B"] for one in done.rows] == [f"question {n}"[::-1] for n in range(40)]
    files = {
        path.name: path.read_bytes()
        for path in tmp_path.iterdir()
        if path.name.startswith("out.") and "cache" not in path.name
    }
    assert {*files} == {"out.jsonl", "out.report.json", "out.rejected.jsonl"}
    fresh(tmp_path)
    (tmp_path / "out.cache.sqlite").unlink()
    assert run("answer", tmp_path / "rows.jsonl", "--max_concurrency", 16).code == 0
    assert files == {name: (tmp_path / name).read_bytes() for name in files}


def test_the_key_is_sent_and_stands_nowhere(run, endpoint, tmp_path):
    endpoint.does = lambda body: make_error(400, f"bad key {KEY}") if "2" in last(body) else make_reply()
    write(tmp_path / "rows.jsonl", [row(n) for n in range(4)])
    process = start(endpoint, tmp_path)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert {head["authorization"] for head in [{k.lower(): v for k, v in h.items()} for _, h in endpoint.heads]} == {
        f"Bearer {KEY}"
    }
    held = [out, err, *(path.read_bytes() for path in tmp_path.iterdir())]
    assert len(held) == 7 and not any(KEY.encode() in data for data in held)


def test_a_cache_that_is_in_use_or_is_none(run, tmp_path):
    with ReplyCache(tmp_path / "out.cache.sqlite"):
        done = run("answer", [row(1)])
        assert done.code == 2 and "out.cache.sqlite" in done.err and done.err.count("\n") == 1
    (tmp_path / "none").write_text("this is no database, and long enough to be known as none" * 20)
    done = run("answer", [row(1)], "--cache", tmp_path / "none")
    assert done.code == 2 and "none: the cache cannot be used" in done.err
    done = run("answer", [row(1)], "--cache", tmp_path / "new" / "one.sqlite")
    assert done.code == 0
    assert sqlite3.connect(tmp_path / "new" / "one.sqlite").execute("SELECT count(*) FROM replies").fetchone() == (1,)


def test_a_cache_of_earlier_versions_is_read(run, endpoint, tmp_path):
    """The request's bytes, their hash and the reply's fields as they have always stood in the file."""
    request = (
        '{"model":"m","messages":[{"role":"user","content":"question 1 é\\u2028"}],"max_tokens":4096,"temperature":0.7,'
        '"seed":42,"chat_template_kwargs":{"enable_thinking":true}}'
    )
    key = hashlib.sha256(f"{request} 0".encode()).digest()
    reply = {"content": "kept", "reasoning_content": "hm", "finish_reason": "stop", "tool_calls": False}
    reply |= {"tokens": [3, 4], "estimated": False}
    cache = sqlite3.connect(tmp_path / "out.cache.sqlite")
    cache.execute("CREATE TABLE replies (request BLOB PRIMARY KEY, reply BLOB) WITHOUT ROWID")
    cache.execute("INSERT INTO replies VALUES (?, ?)", (key, json.dumps(reply).encode()))
    cache.commit()
    cache.close()
    one = row(1, "question 1 é\u2028", "own 1", chat_template_kwargs={"enable_thinking": True})
    done = run("answer", [one])
    assert not endpoint.bodies and done.report["tokens"] == {"prompt": 3, "completion": 4, "estimated": 0}
    assert done.rows[0]["answers"] == {"A": "own 1", "B": "kept"} and done.rows[0]["answers_reasoning"] == {"B": "hm"}
    fresh(tmp_path)
    (tmp_path / "out.cache.sqlite").unlink()
    assert run("answer", [one]).code == 0  # what is asked and kept now is the same
    cache = sqlite3.connect(tmp_path / "out.cache.sqlite")
    ((kept_key, kept_reply),) = cache.execute("SELECT request, reply FROM replies").fetchall()
    cache.close()
    assert kept_key == key and list(json.loads(kept_reply)) == list(reply)


# -- which flags a task reads -----------------------------------------------------------------------------------------
READERS = {  # flag: (values, the tasks that read it)
    "--reference": (["other"], {"verify"}),
    "--both": ([], {"twins"}),
    "--think": (['{"reasoning": 1}'], {"answer", "twins", "ifthink"}),
    "--no_think": (['{"reasoning": 0}'], {"answer", "twins"}),
    "--model": (["n"], {*generate.TASKS}),
    "--max_tokens": ([77], {*generate.TASKS}),
    "--temperature": ([0.1], {*generate.TASKS}),
    "--seed": ([9], {*generate.TASKS}),
    "--extra_body": (['{"top_p": 0.5}'], {*generate.TASKS}),
}
OF_THE_ENDPOINT = """--out --base_url --api_key_env --cache --tries --max_concurrency --requests_per_minute --timeout
    --tokens_per_minute --max_retries --max_failures --price_in --price_out --max_cost"""  # whatever the task is


def does_all(body):
    """Return any task's answer, with reasoning where the request asks for it in either way."""
    replies = {"VERDICT: AGREE": "VERDICT: AGREE", "VERDICT: TIE": "VERDICT: TIE"}
    replies["Reply with JSON only"] = '{"second": "x", "third": "y"}'
    for words, reply in replies.items():
        if words in last(body):
            return make_reply(reply)
    thinks = body.get("chat_template_kwargs", {}).get("enable_thinking") or body.get("reasoning")
    return make_reply("new", reasoning_content="hm" if thinks else None)


@pytest.mark.parametrize("task", generate.TASKS)
@pytest.mark.parametrize("flag", READERS)
def test_a_flag_has_an_effect_or_is_refused(run, endpoint, tmp_path, task, flag):
    """What is asked with and without a flag, over rows of both modes that have all that any task needs."""
    endpoint.does = does_all
    values, readers = READERS[flag]
    columns = {"answers": {"A": "a", "B": "b", "C": "c"}, "reference": "7", "other": "8"}
    rows = [row(n, chat_template_kwargs={"enable_thinking": n == 1}, **columns) for n in (1, 2)]
    rows[0]["messages"][1]["reasoning_content"] = "old"

    def ask(*flags):
        fresh(tmp_path)
        (tmp_path / "out.cache.sqlite").unlink(missing_ok=True)
        endpoint.bodies.clear()
        done = run(task, rows, *flags)
        return done, sorted(json.dumps(body) for body in endpoint.bodies)

    plain, before = ask()
    assert plain.code == 0 and len(plain.rows) == (4 if task == "twins" else 2) and before
    done, after = ask(flag, *values)
    if task in readers:
        assert done.code == 0 and after != before
    else:
        assert done.code == 2 and f"{flag}: {task} does not read it" in done.err and done.err.count("\n") == 1
        assert not after and all(reader in done.err for reader in readers)


def test_every_flag_is_in_the_matrix(run):
    flags = re.findall(r"^ +(--\w+)", run("answer", [], "--help").out, re.MULTILINE)
    assert sorted(flags) == sorted([*READERS, *OF_THE_ENDPOINT.split()])


# -- bad input --------------------------------------------------------------------------------------------------------
BAD = [
    "{",
    "[]",
    "5",
    '{"messages": 5}',
    '{"messages": []}',
    '{"messages": [{"role": "user"}]}',
    '{"id": 3}',
    "null",
    '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "\\ud800"}]}',
    {"messages": [{"role": "user", "content": "q"}]},
    {"messages": [{"role": "assistant", "content": "a"}]},
    row(1) | {"answers": []},
    row(1) | {"answers": {"A": 1}},
    row(1) | {"tags": "x"},
    row(1) | {"tools": "no"},
    row(1) | {"chat_template_kwargs": []},
    row(1) | {"chat_template_kwargs": {"custom_instructions": 5}},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [{"x": 1}]}]},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}]},
    json.dumps(row(1))[:-1] + ', "x": ' + "[" * 3000 + "]" * 3000 + "}",
]


@pytest.mark.parametrize("task", generate.TASKS)
def test_rows_of_any_kind_are_accounted_for(run, endpoint, task):
    endpoint.does = lambda body: make_reply('{"second": "x", "third": "y", "verdict": "A"}', reasoning_content="z")
    good = row(77, answers={"A": "a", "B": "b"}, reference="AGREE")
    done = run(task, [*BAD, good])
    if task == "verify":  # no verdict that it takes: nothing is left
        assert done.code == 1 and "no row is left" in done.err
        return
    assert done.code == 0 and done.report["in"] == len(BAD) + 1, done.err
    assert {one["id"].split("-")[0] for one in done.rows} >= {"r77"}
    where = [entry["line"] for entry in done.rejected]
    assert where == sorted(where) and all(entry["reason"] and entry["file"] == "rows.jsonl" for entry in done.rejected)
    assert len({*where}) + len(
        {one["id"].rsplit("-", 1)[0] if task in ("twins", "ifthink") else one["id"] for one in done.rows}
    ) >= len(BAD)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--out", "folder"], "pass NAME.jsonl"),
        (["--max_cost", 1], "--price_in"),
        (["--tries", 0], "--tries"),
        (["--timeout", "nan"], "--timeout"),
        (["--base_url", "localhost:8000"], "--base_url"),
        (["--base_url", f"http://me:{KEY}@localhost/v1"], "password"),
        (["--extra_body", "[]"], "--extra_body"),
        (["--extra_body", '{"max_tokens": "7"}'], "max_tokens"),
        (["--max_retries", -1], "--max_retries"),
        (["--price_in", "nan"], "--price_in"),
    ],
)
def test_arguments_that_cannot_be_meant(run, endpoint, flags, words):
    done = run("answer", [row(1)], *flags)
    assert done.code == 2 and words in done.err and KEY not in done.err and not endpoint.bodies


def test_rows_that_are_all_refused_are_listed(run, tmp_path):
    """Beside a .jsonl file, and in the folder that twins would be in."""
    done = run("answer", ["{", '{"messages": 5}'])
    assert done.code == 1 and "out.rejected.jsonl" in done.err and not (tmp_path / "out.jsonl").exists()
    assert [entry["line"] for entry in done.rejected] == [1, 2] and done.report["in"] == 2
    done = run("twins", ["{", '{"messages": 5}'], out="folder")
    refused = lines(tmp_path / "folder" / "rejected.jsonl")
    assert done.code == 1 and [entry["line"] for entry in refused] == [1, 2]


def test_no_rows_and_a_taken_name(run, tmp_path):
    assert run("answer", write(tmp_path / "none.jsonl", [])).code == 2
    (tmp_path / "out.jsonl").write_text("mine")
    assert run("answer", [row(1)]).code == 2 and (tmp_path / "out.jsonl").read_text() == "mine"


# -- a real endpoint --------------------------------------------------------------------------------------------------
@pytest.mark.long
def test_transformers_serve(demo, run, tmp_path):
    """The demo's untrained model, greedy: its answer here and at the endpoint, and the endpoint's own tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = demo / "init"
    template = (REPO / "chat_templates" / "chatml.jinja").read_text(encoding="utf-8")
    template = re.sub(r"{%-? *(end)?generation *-?%}", "", template)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    bias = {str(token): -100.0 for token in tokenizer.get_added_vocab().values()}  # no control tokens: plain text only
    line = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--device", "cpu", "--port", str(port)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(line, env=environment, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 200
        while server.poll() is None and time.monotonic() < end:
            with socket.socket() as probe:
                if not probe.connect_ex(("127.0.0.1", port)):
                    break
            time.sleep(0.2)
        rows = [row(n, f"spell word {n}", "own") for n in range(3)]
        url = f"http://127.0.0.1:{port}/v1"
        flags = ["--model", tmp_path / "model", "--temperature", 0, "--max_tokens", 12, "--max_concurrency", 1]
        done = run("answer", rows, *flags, "--extra_body", json.dumps({"logit_bias": bias}), url=url)
        # an untrained model never ends: each answer is cut, and says so
        assert done.code == 1 and "3 cut by length" in done.out, done.err + (tmp_path / "log").read_text()[-2000:]
        kept = [
            json.loads(reply)
            for (reply,) in sqlite3.connect(tmp_path / "out.cache.sqlite").execute("SELECT reply FROM replies")
        ]
        expected = []
        for one in rows:
            ids = tokenizer.apply_chat_template(one["messages"][:1], add_generation_prompt=True, return_dict=False)
            bans = {(int(token),): -100.0 for token in bias}
            output = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12, sequence_bias=bans)[
                0, len(ids) :
            ]
            expected.append((tokenizer.decode(output).strip(), len(ids), 12))
        assert sorted((reply["content"], *reply["tokens"]) for reply in kept) == sorted(expected)
        # and one that ends, where we say so
        text = expected[0][0]
        end = next(char for char in text[3:] if text.count(char) == 1)
        body = json.dumps({"logit_bias": bias, "stop": [end]})
        (one,) = run("answer", rows[:1], *flags, "--extra_body", body, url=url).rows
        assert one["answers"]["B"] == text[: text.index(end) + 1]
    finally:
        server.kill()
        server.wait()
