"""A run folder answers through `transformers serve` and its OpenAI endpoint as the training template says it must.

Two ways that meet only in the answer: the server reads what the recipe saved (weights, tokenizer, serving form of the
template) and the OpenAI messages; we render the training template of chat_templates/, encode it and generate.

What would fool these tests, and what stands against it:
- a model that says the same whatever it is asked: weights by chance, whose answer is another when one token of the
  prompt, drawn by lot, is another (asserted);
- a model that has learnt nothing, or a server that stops for other reasons: the run has learnt its rows by heart, and
  each answer must be the row's own, up to the stop token, at its exact length;
- the endpoint drops a part of the request: its count of prompt tokens must be ours. What transformers 5.23 does drop
  is written down in handed_on(), and some random histories must show it.

endpoint.py, which has evalscope measure a server under load, stands before a stand-in for evalscope that leaves what a
real run left, and before the real one (EVALSCOPE_PYTHON, -m serving) at a server of known speed. Breaks tried, each
seen red: milliseconds as seconds, another percentile, the fast end for the slow one, tokens of prompts counted in;
failed requests, none at all, answers without tokens or without speed let through; the tool's exit code, its missing
files, its error or its version not looked at; not streamed, the budget, the model, all prompts but one or the request
before not passed on, a concurrency twice, evalscope's own count of tokens.
"""

import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random

import pytest
import torch
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval import endpoint
from tests.helpers.runs import EXACT, REPO
from tests.helpers.template_oracle import ALL_FAMILIES
from tests.templates.test_chat_templates import expected, render, samples, serving, template, tool

FAMILY = {family.name: family for family in ALL_FAMILIES}
NAMES = ["qwen3_instruct_2507", "qwen3", "chatml"]
PROMPTS = 12  # a family
TOOLS = [tool("prime", n={"type": "integer"})]
CALL = {"id": "call00000", "type": "function", "function": {"name": "prime", "arguments": {"n": 97}}}
ROWS = [
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Is 91 prime?"},
        {"role": "assistant", "content": "No: 7 * 13."},
        {"role": "user", "content": "And 101?"},
        {"role": "assistant", "content": "Yes, it is."},
    ],
    [
        {"role": "user", "content": "用一句话: 89?"},
        {"role": "assistant", "content": "Prime.\n\n- surely", "reasoning_content": "No 2, 3, 5, 7."},
    ],
    [
        {"role": "user", "content": "Is 97 prime?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "true", "tool_call_id": "call00000", "name": "prime"},
        {"role": "assistant", "content": "97 is prime."},
    ],
]
STEPS = ["--max_steps", 25, "--learning_rate", 3e-3, "--lr_scheduler_type", "constant", "--packing", "false"]
STEPS += ["--per_device_train_batch_size", 3, "--global_batch_size", 3, "--activation_checkpointing", "false"]


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """ask(folder, messages, tools, ...) returns the endpoint's choice and usage; a folder loads when asked."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--device", "cpu"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    with log.open("w") as out:
        server, started = subprocess.Popen(command, env=environment, stdout=out, stderr=out), time.monotonic()

    def fetch(method, path, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        try:
            connection.request(method, path, body and json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            assert answer.status == 200, f"{answer.status} {answer.read()}\n{log.read_text()[-3000:]}"
            return json.load(answer)
        finally:
            connection.close()

    def post(folder, messages, tools, **settings):
        while True:  # it starts while the first recipe trains
            assert server.poll() is None, log.read_text()[-3000:]
            try:
                fetch("GET", "/health")  # /v1/models would ask the hub
                break
            except ConnectionError:
                assert time.monotonic() < started + 300, log.read_text()[-3000:]
                time.sleep(0.2)
        messages = json.loads(json.dumps(messages))
        for call in (call["function"] for message in messages for call in message.get("tool_calls", [])):
            call["arguments"] = json.dumps(call["arguments"])  # a string, as OpenAI has it
        body = {"model": str(folder), "messages": messages, "temperature": 0, **settings}
        answer = fetch("POST", "/v1/chat/completions", body | ({"tools": tools} if tools else {}))
        return answer["choices"][0], answer["usage"]

    yield post
    server.kill()
    server.wait()


def greedy(model, ids, **settings):
    return model.generate(torch.tensor([ids]), do_sample=False, **settings)[0, len(ids) :].tolist()


@pytest.mark.parametrize("name", [NAMES[0], *(pytest.param(name, marks=pytest.mark.long) for name in NAMES[1:])])
def test_a_run_answers_as_it_was_trained(name, ask, run_recipe, tmp_path):
    family, finished = FAMILY[name], []
    left_out = () if family.reasoning and "reasoning" not in family.drops else ("reasoning_content",)
    rows = [[{k: v for k, v in message.items() if k not in left_out} for message in row] for row in ROWS]
    told = [TOOLS if any("tool_calls" in message for message in row) else None for row in rows]
    lines = [{"messages": row} | ({"tools": tools} if tools else {}) for row, tools in zip(rows, told, strict=True)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ["--dataset_name", tmp_path / "rows.jsonl", "--eval_rows", 0, *STEPS, *EXACT]
    run = run_recipe("qwen3_full", "--chat_template_path", REPO / "chat_templates" / f"{name}.jinja", *flags)
    assert (run / "chat_template.jinja").read_text(encoding="utf-8") == serving(template(name)) != template(name)
    tokenizer, model = AutoTokenizer.from_pretrained(run), AutoModelForCausalLM.from_pretrained(run)

    for row, tools in zip(rows, told, strict=True):
        for k, _, output in expected(family, row, tools)[2]:
            ids = tokenizer.encode(render(template(name), row[:k], tools, True)[0])
            output = tokenizer.encode(output)
            assert greedy(model, ids, max_new_tokens=64) == output, "not learnt by heart: more steps are needed"
            choice, usage = ask(run, row[:k], tools, max_tokens=64)
            assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(ids), len(output))
            said, calls = choice["message"], row[k].get("tool_calls", [])
            assert said["content"] == row[k]["content"]
            assert said.get("reasoning_content", "").strip() == row[k].get("reasoning_content", "")
            assert [
                {**call["function"], "arguments": json.loads(call["function"]["arguments"])}
                for call in said.get("tool_calls", [])
            ] == [call["function"] for call in calls]
            finished.append(choice["finish_reason"])
    every = ["stop", "stop", "stop", "tool_calls", "stop"]
    assert finished == (["stop"] * 3 if name == "qwen3" else every)  # hybrid Qwen3 trains the last answer of a row


def handed_on(messages):
    """What the endpoint of transformers 5.23 gives the template: no reasoning, and no text beside calls."""
    kept = ("role", "content", "tool_calls", "tool_call_id")
    messages = [{key: value for key, value in message.items() if key in kept} for message in messages]
    return [message | ({"content": ""} if "tool_calls" in message else {}) for message in messages]


@pytest.fixture(scope="module")
def chance(demo, tmp_path_factory):
    """The demo's untrained model with sharp attention: one other token anywhere in the prompt, another answer."""
    folder = shutil.copytree(demo / "init", tmp_path_factory.mktemp("chance") / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(4 if "q_norm" in name or "k_norm" in name else 1)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_every_prompt_reaches_the_model(name, ask, chance, tmp_path):
    """Random histories, the longest of the samples."""
    folder, random, seen = shutil.copytree(chance, tmp_path / "model"), Random(0), Counter()
    (folder / "chat_template.jinja").write_text(serving(template(name)), encoding="utf-8")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    # without control tokens nothing ends the answer early, and the endpoint takes nothing in it for a call
    bias = dict.fromkeys(tokenizer.get_added_vocab().values(), -1e9)
    limits = {"max_new_tokens": 24, "sequence_bias": {(token,): value for token, value in bias.items()}}
    theirs = {"max_tokens": 24, "logit_bias": bias}

    for messages, tools, arguments in sorted(samples(FAMILY[name]), key=lambda sample: -len(sample[0]))[:PROMPTS]:
        history = messages[:-1]
        try:
            texts = [render(template(name), h, tools, True, **arguments)[0] for h in (history, handed_on(history))]
        except TemplateError:
            continue
        ids = tokenizer.encode(texts[1])
        answer = greedy(model, ids, **limits)
        choice, usage = ask(folder, history, tools, chat_template_kwargs=arguments, **theirs)
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(ids), len(answer))
        assert choice["message"]["content"] == tokenizer.decode(answer).strip()  # the endpoint strips
        ids[random.randrange(len(ids))] = 0
        seen["sharp"] += greedy(model, ids, **limits) != answer
        seen["whole" if texts[0] == texts[1] else "lost"] += 1
        seen["tools"] += bool(tools)
    assert seen["whole"] >= 4 and seen["lost"] >= 2 and seen["tools"] >= 4, seen
    assert seen["sharp"] >= 0.75 * (seen["whole"] + seen["lost"]), "answers that do not hang on the prompt"


# -- under load: eval/endpoint.py, which drives evalscope --------------------------------------------------------------

# what evalscope 1.14.1 left of a real run: the demo's merged model, 24 requests, four at a time, on a busy machine
SUMMARY = {
    "Test Duration (s)": 21.322,
    "Concurrency": 4,
    "Request Rate (req/s)": -1.0,
    "Total Requests": 24,
    "Success Requests": 24,
    "Failed Requests": 0,
    "Stream Requests": 24,
    "Non-Stream Requests": 0,
    "Req Throughput (req/s)": 1.1256,
    "Avg Latency (s)": 3.4528,
    "Avg Input Tokens": 30.6667,
    "Output Throughput (tok/s)": 21.105,
    "Total Throughput (tok/s)": 55.6234,
    "Avg TTFT (ms)": 2652.75,
    "Avg TPOT (ms)": 47.21,
    "Avg ITL (ms)": 58.0,
    "Avg Output Tokens": 18.75,
    "Input Throughput (tok/s)": 0.0,
    "Avg Decoded Tok/Iter": 1.3549,
    "Spec. Accept Rate": 0.262,
}
LOADED = [
    {
        "Percentiles": "min",
        "Latency (s)": 0.8271,
        "TTFT (ms)": 64.7328,
        "ITL (ms)": 0.0077,
        "TPOT (ms)": 4.3703,
        "Input tokens": 14.0,
        "Output tokens": 5.0,
        "Output (tok/s)": 0.7808,
        "Total (tok/s)": 4.8653,
        "Decode (tok/s)": 4.8144,
    },
    {
        "Percentiles": "5%",
        "Latency (s)": 0.8984,
        "TTFT (ms)": 618.2936,
        "ITL (ms)": 2.6009,
        "TPOT (ms)": 9.0632,
        "Input tokens": 14.0,
        "Output tokens": 5.0,
        "Output (tok/s)": 1.8508,
        "Total (tok/s)": 5.288,
        "Decode (tok/s)": 5.073,
    },
    {
        "Percentiles": "50%",
        "Latency (s)": 2.2942,
        "TTFT (ms)": 1779.1949,
        "ITL (ms)": 16.0934,
        "TPOT (ms)": 21.0257,
        "Input tokens": 32.0,
        "Output tokens": 17.0,
        "Output (tok/s)": 6.76,
        "Total (tok/s)": 15.812,
        "Decode (tok/s)": 46.9906,
    },
    {
        "Percentiles": "95%",
        "Latency (s)": 7.5642,
        "TTFT (ms)": 5818.6613,
        "ITL (ms)": 265.0194,
        "TPOT (ms)": 197.123,
        "Input tokens": 43.0,
        "Output tokens": 36.0,
        "Output (tok/s)": 16.1879,
        "Total (tok/s)": 57.8159,
        "Decode (tok/s)": 110.3363,
    },
    {
        "Percentiles": "max",
        "Latency (s)": 7.8105,
        "TTFT (ms)": 7348.2694,
        "ITL (ms)": 995.2757,
        "TPOT (ms)": 207.7108,
        "Input tokens": 47.0,
        "Output tokens": 39.0,
        "Output (tok/s)": 21.5585,
        "Total (tok/s)": 58.0309,
        "Decode (tok/s)": 228.8156,
    },
]
BENCH = f"""#!{sys.executable}
# acts as the Python that has evalscope: keeps what it is told, leaves what evalscope does
import json, sys
from pathlib import Path

here, words = Path(__file__).parent, sys.argv[1:]
does = json.loads((here / "does.json").read_text())
if "-c" in words:
    sys.exit(print(does["version"]) if does["version"] else 1)
flags = {{}}
for word in words[words.index("perf") + 1 :]:
    if word.startswith("--"):
        flags[word] = last = []
    else:
        last.append(word)
asked = Path(flags["--dataset-path"][0]).read_text(encoding="utf-8").splitlines()
(here / "told.json").write_text(json.dumps([words[: words.index("perf")], flags, list(map(json.loads, asked))]))
for parallel, number in zip(flags["--parallel"], flags["--number"], strict=True):
    out = Path(flags["--outputs-dir"][0], flags["--name"][0], f"parallel_{{parallel}}_number_{{number}}")
    out.mkdir(parents=True)
    (out / "benchmark_summary.json").write_text(json.dumps(does["summary"] | {{"Concurrency": int(parallel)}}))
    if does["rows"]:
        (out / "benchmark_percentile.json").write_text(json.dumps(does["rows"]))
print(does["says"], file=sys.stderr)
sys.exit(does["code"])
"""
MENDED = "V/bin/pip install 'evalscope[perf]==1.14.1', and pass --bench_python V/bin/python"


class Speaker(BaseHTTPRequestHandler):
    """Streams five pieces, the first after 0.2 s, then one each 0.1 s, and says that they were ten tokens at 0.7 s."""

    def do_POST(self):
        told, seen = self.server.told, self.server.seen
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            seen["bodies"].append(body)
            seen["now"] += 1
            seen["most"] = max(seen["most"], seen["now"])
            fails = len(seen["bodies"]) == told.get("fails")
        self.send_response(500 if fails else 200)
        self.send_header("Content-Type", "text/event-stream" if body.get("stream") else "application/json")
        self.end_headers()
        usage = {"usage": told["usage"]} if told["usage"] else {}
        if body.get("stream") and not fails:
            time.sleep(0.1)
            pieces = [{"choices": [{"index": 0, "delta": {"content": piece}}]} for piece in "abcde"]
            for piece in [*pieces, {"choices": []} | usage]:
                time.sleep(0.1)
                self.wfile.write(f"data: {json.dumps({'object': 'chat.completion.chunk'} | piece)}\n\n".encode())
            self.wfile.write(b"data: [DONE]\n\n")
        else:
            self.wfile.write(json.dumps({"choices": [{"index": 0, "message": {"content": "ab"}}]}).encode())
        with self.server.lock:
            seen["now"] -= 1

    def log_message(self, *_):
        pass


@pytest.fixture
def speaker():
    """A server of known speed; .told is what it does, .seen what it was asked, .url its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Speaker)
    server.lock, server.seen = threading.Lock(), {"bodies": [], "now": 0, "most": 0}
    server.told = {"usage": {"prompt_tokens": 7, "completion_tokens": 10, "total_tokens": 17}}
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def bench(folder, **does):
    """The Python of an evalscope that does as it is told."""
    does = {"version": "1.14.1", "summary": SUMMARY, "rows": LOADED, "says": "", "code": 0} | does
    (folder / "does.json").write_text(json.dumps(does))
    (folder / "python").write_text(BENCH)
    (folder / "python").chmod(0o755)
    return folder / "python"


def load(*words):
    return endpoint.main([str(word) for word in words])


def test_load_figures_are_those_that_evalscope_left(speaker, tmp_path, capsys):
    flags = ["--concurrency", 8, 4, 8, "--requests", 24, "--max_new_tokens", 9, "--out", tmp_path / "load.json"]
    assert load("--base_url", speaker.url + "/", "--model", "mine", "--bench_python", bench(tmp_path), *flags) == 0
    report = json.loads((tmp_path / "load.json").read_text())
    assert report["endpoint"] == "mine" and report["evalscope"] == "1.14.1"
    assert report["settings"] == {"requests": 24, "concurrency": [8, 4], "max_new_tokens": 9}
    assert [line.pop("concurrency") for line in report["load"]] == [8, 4]
    for line in report["load"]:
        assert {key: value for key, value in line.items() if not isinstance(value, dict)} == {
            "requests": 24,
            "tokens_of_one": 18.75,
            "seconds": 21.322,
            "tokens_per_second": 21.105,
            "requests_per_second": 1.1256,
        }
        assert line["time_to_first_token"] == pytest.approx({"p50": 1.7791949, "p95": 5.8186613})  # seconds
        assert line["latency"] == {"p50": 2.2942, "p95": 7.5642}
        assert line["tokens_per_second_of_one"] == {"p50": 46.9906, "p5": 5.073}  # the slow end
    table = capsys.readouterr().out
    for cell in ("mine, by evalscope 1.14.1", "18.8", "21.11 ", "1.78 (5.82)", "2.29 (7.56)", "47 (5.07)"):
        assert cell in table

    start, told, asked = json.loads((tmp_path / "told.json").read_text())
    assert start == ["-I", "-m", "evalscope.cli.cli"]  # nothing of this folder is in the way of its imports
    assert told == {
        "--api": ["openai"],
        "--url": [f"{speaker.url}/chat/completions"],
        "--model": ["mine"],
        "--parallel": ["8", "4"],
        "--number": ["24", "24"],
        "--sleep-interval": ["0"],
        "--no-test-connection": [],
        "--total-timeout": ["600"],
        "--stream": [],
        "--temperature": ["0"],
        "--max-tokens": ["9"],
        "--dataset": ["line_by_line"],
        "--no-timestamp": [],
        "--name": ["load"],
    } | {key: told[key] for key in ("--dataset-path", "--outputs-dir")}
    assert len({messages[0]["content"] for messages in asked}) == len(asked) == 50
    assert all([message["role"] for message in messages] == ["user"] for messages in asked)
    assert [(body["model"], body["messages"]) for body in speaker.seen["bodies"]] == [("mine", asked[0])]  # warms up
    assert not Path(told["--outputs-dir"][0]).exists()


def test_a_folder_is_served_and_measured(speaker, tmp_path, monkeypatch, capsys):
    served, folder = [], tmp_path / "model"

    @contextmanager
    def serving(*how):
        served.append(how)
        yield speaker.url, str(folder)

    monkeypatch.setattr(endpoint, "serving", serving)
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    flags = ["--bench_python", bench(tmp_path), "--device", "cpu", "--dtype", "float32"]
    assert load(folder, *flags, "--concurrency", 2) == 0
    assert served == [("transformers", sys.executable, folder, "cpu", "float32")]
    _, told, _ = json.loads((tmp_path / "told.json").read_text())
    assert told["--model"] == [str(folder)] == [speaker.seen["bodies"][0]["model"]]
    assert "model, by evalscope" in capsys.readouterr().out


def test_answers_of_one_token_have_no_speed(speaker, tmp_path, capsys):
    rows = [row | {"Decode (tok/s)": float("nan")} for row in LOADED]
    tool = bench(tmp_path, rows=rows, summary=SUMMARY | {"Avg Output Tokens": 1.0})
    out = tmp_path / "load.json"
    assert load("--base_url", speaker.url, "--model", "m", "--bench_python", tool, "--out", out) == 0
    report = json.loads(out.read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert [line["tokens_per_second_of_one"] for line in report["load"]] == [{}, {}, {}]
    assert capsys.readouterr().out.count(" – ") == 3


TRACEBACK = """  File "main.py", line 199, in run
ValueError: Error: Unable to retrieve usage information

If you continue to experience issues, please open an issue on our GitHub repository"""


@pytest.mark.parametrize(
    ("does", "why"),
    [
        ({"version": ""}, re.escape(f"has no evalscope, which measures: python3.11 -m venv V; {MENDED}")),
        (
            {"code": 1, "says": TRACEBACK},
            r"evalscope 1\.14\.1 gave no figures of http.* \(ValueError: Error: Unable to "
            r"retrieve usage information\): look at the server",
        ),
        ({"code": -9, "says": "Killed"}, r"gave no figures .* \(Killed\)"),
        ({"code": 1}, r"gave no figures .* \(no output\)"),
        ({"rows": []}, "gave no figures"),
        (
            {"summary": SUMMARY | {"Failed Requests": 2, "Success Requests": 22}},
            "2 of 24 requests failed with 1 at a time, so the figures mean nothing",
        ),
        ({"summary": SUMMARY | {"Total Requests": 0, "Success Requests": 0}}, "0 of 0 requests"),
        ({"summary": SUMMARY | {"Avg Output Tokens": 0.0}}, "counts no completion tokens in its `usage`"),
    ],
)
def test_no_figures_where_there_are_none(does, why, speaker, tmp_path, capsys):
    tool, out = bench(tmp_path, **does), tmp_path / "load.json"
    assert load("--base_url", speaker.url, "--model", "m", "--bench_python", tool, "--out", out) == 2
    error = capsys.readouterr().err.strip()
    assert re.search(why, error) and "\n" not in error and not out.exists()


def test_the_load_command_refuses_in_one_sentence(speaker, tmp_path, capsys):
    tool = ["--bench_python", bench(tmp_path)]
    here = ["--base_url", speaker.url, "--model", "m"]
    for words, why in (
        (tool, "not clear"),
        ([tmp_path, *here, *tool], "not clear"),
        ([*here[:2], *tool], "not clear"),
        ([tmp_path / "nothing", *tool], "no config.json"),
        ([*here, "--bench_python", tmp_path / "gone"], "gone does not run (No such file or directory)"),
        (["--base_url", "http://127.0.0.1:9/v1", "--model", "m", *tool], "does not answer"),
    ):
        assert load(*words) == 2
        error = capsys.readouterr().err.strip()
        assert why in error and "\n" not in error
    assert not speaker.seen["bodies"]
    speaker.told["fails"] = 1
    assert load(*here, *tool) == 2 and "answers 500" in capsys.readouterr().err
    assert not (tmp_path / "told.json").exists()  # evalscope was not asked


@pytest.mark.serving
def test_evalscope_measures_a_server_of_known_speed(speaker, tmp_path, capsys):
    """EVALSCOPE_PYTHON: the Python of its environment (eval/SERVING.md)."""
    if not os.environ.get("EVALSCOPE_PYTHON"):
        pytest.skip("no EVALSCOPE_PYTHON: the Python of an environment with evalscope")
    out = tmp_path / "load.json"
    words = ["--base_url", speaker.url, "--model", "mine", "--bench_python", os.environ["EVALSCOPE_PYTHON"]]
    words += ["--requests", 12, "--concurrency", 1, 4, "--out", out]
    assert load(*words) == 0
    assert len(speaker.seen["bodies"]) == 1 + 2 * 12 and speaker.seen["most"] == 4
    asked = [body["messages"] for body in speaker.seen["bodies"]]
    assert asked[1:13] == [[{"role": "user", "content": text}] for text in endpoint.NEUTRAL[:12]]
    assert sorted(map(str, asked[13:])) == sorted(map(str, asked[1:13]))
    for body in speaker.seen["bodies"][1:]:
        assert (body["model"], body["temperature"], body["max_tokens"], body["stream"]) == ("mine", 0, 64, True)
    for line, concurrency in zip(json.loads(out.read_text())["load"], (1, 4), strict=True):
        assert (line["concurrency"], line["requests"], line["tokens_of_one"]) == (concurrency, 12, 10)  # not 5 pieces
        assert 0.2 <= line["time_to_first_token"]["p50"] < 0.3
        assert 0.7 <= line["latency"]["p50"] < 0.9
        assert 9 / 0.7 < line["tokens_per_second_of_one"]["p50"] <= 9 / 0.5 * 1.02
        assert 0.75 * concurrency * 10 / 0.7 < line["tokens_per_second"] <= concurrency * 10 / 0.7

    capsys.readouterr()
    out.unlink()
    speaker.seen["bodies"].clear()
    speaker.told["fails"] = 20
    assert load(*words) == 2 and "1 of 12 requests failed with 4 at a time" in capsys.readouterr().err
    speaker.told.update(fails=0, usage=None)
    assert load(*words) == 2 and "Unable to retrieve usage information" in capsys.readouterr().err
    assert not out.exists()
