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
"""

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from random import Random

import pytest
import torch
from conftest import EXACT, REPO
from jinja2 import TemplateError
from test_chat_templates import FAMILIES, expected, render, samples, serving, template, tool
from transformers import AutoModelForCausalLM, AutoTokenizer

FAMILY = {family.name: family for family in FAMILIES}
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
    left_out = () if family.reasoning else ("reasoning_content",)
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
