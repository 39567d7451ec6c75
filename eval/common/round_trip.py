"""The round trip of a merge: does the merged model, and the server of it, answer as the adapter did?

    python -m eval.merge runs/qwen3_qlora --out models/mine

No command of its own; merge.py's docstring defines what is compared. One model is in memory at a time: the adapter's
logits wait on the disk (positions x vocabulary x 4 bytes; 50 answers of 32 tokens, 151,936 entries of Qwen3: 1 GB).
"""

import json
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_prep.common.answer_formats import FORMATS
from data_prep.common.answers import find_family, parse_answer
from data_prep.common.errors import UsageError
from eval.common.intervals import rate
from eval.common.measure import clean_row, read_rows
from eval.common.models import Output, fill_of, generate, load_model, load_tokenizer, remove_tokens, render
from eval.endpoint import NEUTRAL, ServerError, post, serving

GGUF_TYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
FAILED_SHARE = 0.1  # of the prompts may fail on a server
# what an engine is asked besides: no penalty; the log-probability of each token, which transformers serve does not
# give; calls and thoughts left in the text as the model wrote them (of vLLM they are, without its parsers)
REQUESTS = {
    "transformers": {"frequency_penalty": 0},
    "vllm": {"repetition_penalty": 1.0, "logprobs": True, "tool_choice": "none"},
    "llamacpp": {"repeat_penalty": 1.0, "logprobs": True, "tool_choice": "none", "reasoning_format": "none"},
}


@dataclass(frozen=True)
class Bounds:
    """The largest difference of a logit or log-probability, and the least share of what is counted."""

    max_logit_diff: float
    min_top1: float


# Measured on the demo's QLoRA adapter, 50 held-out prompts, float32: 1.5e-5 and 1.000 dequantized; 2.55 and 0.993
# original (5.3 and 0.858 on the neutral prompts, which that model of 0.87M parameters never saw the like of: it fails
# there, as it should)
EXACT = Bounds(1e-3, 0.999)
ROUNDED = Bounds(1.0, 0.97)
OTHER_WEIGHTS = Bounds(5.0, 0.9)


def find_bounds(dtype: str, four_bit: bool, into: str) -> Bounds:
    """Return the bounds of a proof in a type, of an adapter trained on 4 bits or not, by the base that it goes into."""
    if four_bit and into == "original":
        return OTHER_WEIGHTS
    if dtype == "float32":
        return EXACT
    return ROUNDED


@dataclass
class Question:
    """A prompt: what a request holds, its text and tokens as the template renders them; reference: the message that
    answers it in the data, None of a neutral one."""

    id: str
    messages: list[dict]
    tools: list[dict] | None
    kwargs: dict
    text: str
    prompt: list[int]
    reference: dict | None = None


@dataclass
class Proof:
    """What is asked (refused: how many rows cannot be), and how: the type and device of the models, the budget of an
    answer in tokens."""

    questions: list[Question]
    refused: int
    dtype: str
    device: str
    max_new_tokens: int


@dataclass
class Engine:
    """What serves: a name of ENGINES, the Python whose environment has it; llama.cpp's converter and llama-server."""

    name: str
    python: str
    converter: Path | None = None
    llama_server: str = "llama-server"


@dataclass
class Answers:
    """What a model answers, the log-probability of each of its tokens, and how it compares with an adapter."""

    figures: dict
    outputs: list[Output]
    log_probs: list[list[float]]


# -- the questions ----------------------------------------------------------------------------------------------------
def list_questions(
    data: Path | None, split: str, count: int, tokenizer: PreTrainedTokenizerBase, longest: int
) -> tuple[list[Question], int]:
    """Return the first `count` questions, and how many rows before the last of them cannot be asked.

    They are the prompts of the data's last answers, without data neutral ones; longest: of a prompt, in tokens. Raises
    UsageError where there are none.
    """
    if data:
        rows = read_rows(data, split)
    else:
        rows = []
        for number, text in enumerate(NEUTRAL, 1):
            rows.append({"id": f"neutral {number}", "messages": [{"role": "user", "content": text}]})
    questions = []
    refused = 0
    for number, raw in enumerate(rows, 1):
        if len(questions) == count:
            break
        row = clean_row(raw, number)
        last = find_last_answer(row["messages"])
        reference = None if last is None else row["messages"][last]
        row["messages"] = row["messages"][:last]
        try:
            text, prompt = render(tokenizer, row["messages"], True, row["tools"], **row["kwargs"])
        except (TemplateError, TypeError, ValueError):
            prompt = []
        if 0 < len(prompt) <= longest:
            parts = (row["messages"], row["tools"], row["kwargs"])
            questions.append(Question(row["id"], *parts, text, prompt, reference))
        else:
            refused += 1
    if count and not questions:
        raise UsageError(f"{data or 'the neutral prompts'}: none of {refused} can be asked: pass other --data")
    return questions, refused


def find_last_answer(messages: list[dict]) -> int | None:
    """Return the index of the last assistant message, None without one."""
    for index in range(len(messages) - 1, -1, -1):
        if messages[index]["role"] == "assistant":
            return index
    return None


# -- merged against adapter -------------------------------------------------------------------------------------------
def answer_all(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stops: set[int], proof: Proof, label: str
) -> list[Output]:
    """Return the answer to each question, asked one at a time as a server does: no padding in the numbers."""
    prompts = [question.prompt for question in proof.questions]
    outputs = generate(model, prompts, stops, 1, fill_of(tokenizer, stops), proof.max_new_tokens, label)
    failed = []
    for question, output in zip(proof.questions, outputs, strict=True):
        if output.failed:
            failed.append(f"{question.id}: {output.failed}")
    if failed:
        raise UsageError(
            f"the {label} model failed on {len(failed)} prompts (the first is {failed[0]}): pass shorter --data or a "
            "smaller --max_new_tokens"
        )
    return outputs


@torch.inference_mode()
def force_logits(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> np.ndarray:
    """Return the logits (answer + 1, vocabulary), float32, of each token of an answer and of what follows it."""
    ids = torch.tensor([prompt + answer], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0]
    return logits[len(prompt) - 1 :].float().cpu().numpy()


def ask_adapter(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stops: set[int], proof: Proof, folder: Path
) -> list[Output]:
    """Return the adapter's answers; its logits go to a folder, a file a question."""
    outputs = answer_all(model, tokenizer, stops, proof, "adapter")
    for number, (question, output) in enumerate(zip(proof.questions, outputs, strict=True)):
        np.save(folder / f"{number}.npy", force_logits(model, question.prompt, output.tokens))
    return outputs


@dataclass
class LogitTotals:
    """What two models' logits of the same tokens differ by, summed over answers."""

    largest: float = 0.0
    total: float = 0.0
    count: int = 0
    same_top: list[bool] = field(default_factory=list)  # a flag for each position
    same_stop: list[bool | None] = field(default_factory=list)  # one for each answer; None: it does not end by itself
    same_answer: list[bool] = field(default_factory=list)  # whether every position of an answer has the same top token

    def add(self, adapter: np.ndarray, merged: np.ndarray, stops: set[int]) -> None:
        """Add an answer's logits, (answer + 1, vocabulary) each; the last row is of what follows it."""
        difference = np.abs(adapter - merged)
        self.largest = float(np.maximum(self.largest, difference.max()))  # a NaN would be lost in max()
        self.total += float(difference.sum(dtype=np.float64))
        self.count += difference.size
        adapter_top = adapter.argmax(1)
        same = adapter_top == merged.argmax(1)
        self.same_top += same.tolist()
        self.same_answer.append(bool(same.all()))
        if int(adapter_top[-1]) in stops:
            self.same_stop.append(bool(same[-1]))
        else:
            self.same_stop.append(None)


def pick_log_probs(logits: np.ndarray, tokens: list[int]) -> list[float]:
    """Return the log-probability of each token of an answer, by its logits."""
    every = torch.tensor(logits[: len(tokens)]).log_softmax(1)
    chosen = torch.tensor(tokens, dtype=torch.long)
    return every.gather(1, chosen[:, None])[:, 0].tolist()


def ask_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stops: set[int], proof: Proof) -> Answers:
    """Return what a model answers, with nothing to compare it to."""
    outputs = answer_all(model, tokenizer, stops, proof, "model")
    log_probs = []
    for question, output in zip(proof.questions, outputs, strict=True):
        log_probs.append(pick_log_probs(force_logits(model, question.prompt, output.tokens), output.tokens))
    return Answers({}, outputs, log_probs)


def ask_merged(out: Path, proof: Proof, outputs: list[Output], stops: set[int], folder: Path) -> Answers:
    """Return how the model in `out`, loaded anew, compares with the adapter, whose logits are in a folder."""
    tokenizer, own_stops = load_tokenizer(out)
    for question in proof.questions:
        _, prompt = render(tokenizer, question.messages, True, question.tools, **question.kwargs)
        if prompt != question.prompt:
            raise UsageError(
                f"the template in {out} renders {question.id} otherwise than the adapter's: save the adapter again"
            )
    model = load_model(str(out), tokenizer, getattr(torch, proof.dtype), proof.device)
    own_outputs = answer_all(model, tokenizer, own_stops, proof, "merged")
    totals = LogitTotals()
    log_probs = []
    same_text = []
    for number, (question, output, own) in enumerate(zip(proof.questions, outputs, own_outputs, strict=True)):
        logits = force_logits(model, question.prompt, output.tokens)
        totals.add(np.load(folder / f"{number}.npy"), logits, stops)
        same_text.append(own.tokens == output.tokens and own.stopped == output.stopped)
        if own.tokens != output.tokens:
            logits = force_logits(model, question.prompt, own.tokens)
        log_probs.append(pick_log_probs(logits, own.tokens))
    explained = []  # where every token is as likely as it was, nothing but the settings of generation changes a text
    for is_same, same_answer in zip(same_text, totals.same_answer, strict=True):
        explained.append(is_same if same_answer else None)
    figures = {
        "max_logit_diff": totals.largest,
        "mean_logit_diff": totals.total / totals.count,
        "top1": rate(totals.same_top),
        "same_stop": rate(totals.same_stop),
        "same_text": rate(same_text),
        "same_text_where_top1": rate(explained),
    }
    return Answers(figures, own_outputs, log_probs)


# -- served against merged --------------------------------------------------------------------------------------------
def convert_to_gguf(folder: Path, engine: Engine, dtype: str, path: Path) -> Path:
    """Return the GGUF file of a model's folder, made at a path by llama.cpp's converter. Raises UsageError."""
    words = [engine.python, engine.converter, folder, "--outfile", path, "--outtype", GGUF_TYPES[dtype]]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if done.returncode or not path.is_file():
        lines = done.stderr.strip().splitlines() or ["no output"]
        raise UsageError(f"{engine.converter} does not convert the merged model ({lines[-1]}): see what it supports")
    return path


def to_openai(messages: list[dict]) -> list[dict]:
    """Return messages as OpenAI's form has them: a call's arguments are a string, and calls and replies have ids."""
    messages = json.loads(json.dumps(messages))
    open_calls = []
    count = 0
    for message in messages:
        for call in message.get("tool_calls") or []:
            call["type"] = "function"
            call["id"] = call.get("id") or f"call{count:05}"  # nine letters, as Mistral has them
            arguments = call["function"]["arguments"]
            if not isinstance(arguments, str):
                call["function"]["arguments"] = json.dumps(arguments, ensure_ascii=False)
            open_calls.append(call["id"])
            count += 1
        if message["role"] == "tool" and open_calls:
            message["tool_call_id"] = message.get("tool_call_id") or open_calls[0]
            open_calls.pop(0)
    return messages


@dataclass
class Comparer:
    """Compares what a server says with tokens: the tokenizer and family of the answers, their budget in tokens."""

    tokenizer: PreTrainedTokenizerBase
    family: str
    max_new_tokens: int

    def is_same_text(self, message: dict, prompt: str, output: Output) -> bool:
        """Return whether a server's message is the text of an output, its thought apart or not."""
        special = self.tokenizer.all_special_tokens
        answer_format = FORMATS[self.family]
        reasoning = remove_tokens(message.get("reasoning_content") or "", special)  # an open thought keeps the stop
        said = (reasoning, (message.get("content") or "").strip())
        text = self.tokenizer.decode(output.tokens, clean_up_tokenization_spaces=False)
        answer = parse_answer(text, self.family, prompt)
        thought = remove_tokens(answer.reasoning or "", special)
        expected = [(thought, remove_tokens(answer.content, special))]
        if answer.tool_calls:  # a server that leaves them in the text
            behind_thought = re.split(answer_format.thought_end, text)[-1]
            expected.append((thought, remove_tokens(behind_thought, special)))
        # the others: a server without a reasoning parser, which may take what opens a thought in the prompt for the
        # answer's own; llama.cpp, asked to leave thoughts in the text, begins it with the empty one that ends a prompt
        shown = self.tokenizer.decode(output.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        start = answer_format.thought_start
        for pattern in (r"\Z", rf"{start}\s*\Z", rf"{start}\s*{answer_format.thought_end}\s*\Z"):
            begun = re.search(pattern, prompt)
            if begun is not None:
                expected.append(("", (begun[0].rstrip() + shown).strip()))
                expected.append(("", (begun[0] + shown).strip()))
        return said in expected


@dataclass
class ServedTotals:
    """How a server compares with the merged model: a flag for each prompt, and differences of log-probabilities."""

    same_prompt: list[bool] = field(default_factory=list)
    same_text: list[bool] = field(default_factory=list)
    same_end: list[bool] = field(default_factory=list)
    left_out: int = 0
    errors: list[str] = field(default_factory=list)
    differences: list[float] = field(default_factory=list)
    choices: dict[str, dict] = field(default_factory=dict)  # what the server replied, by question

    def add(self, reply: dict, question: Question, output: Output, log_probs: list[float], comparer: Comparer) -> None:
        """Add a server's reply to a question, which the merged model answers with an output."""
        choice = reply["choices"][0]
        message = choice["message"]
        self.choices[question.id] = choice
        self.same_prompt.append(reply["usage"]["prompt_tokens"] == len(question.prompt))
        if message.get("tool_calls"):  # taken apart by the server: their length is left to compare
            is_same = reply["usage"]["completion_tokens"] == len(output.tokens) + output.stopped
        else:
            is_same = comparer.is_same_text(message, question.text, output)
        self.same_text.append(is_same)
        if is_same:  # else the tokens are others
            content = (choice.get("logprobs") or {}).get("content") or []
            for token, log_prob in zip(content, log_probs, strict=False):  # the stop may be there
                self.differences.append(abs(token["logprob"] - log_prob))
        stopped = output.stopped and len(output.tokens) + 1 < comparer.max_new_tokens  # on the last token: "length"
        self.same_end.append((choice["finish_reason"] != "length") == stopped)

    def figures(self, engine: str) -> dict:
        found = {"engine": engine, "left_out": self.left_out, "errors": self.errors}
        for name in ("same_prompt", "same_text", "same_end"):
            found[name] = rate(getattr(self, name))
        if self.differences:
            found["max_logprob_diff"] = float(np.max(self.differences))
            found["logprobs"] = len(self.differences)
        return found


def ask_served(out: Path, proof: Proof, merged: Answers, tokenizer: PreTrainedTokenizerBase, engine: Engine) -> dict:
    """Return how the server of a folder compares with the merged model's own answers, as merge_report.json has it."""
    model = out
    program = engine.python
    if engine.name == "llamacpp":
        model = convert_to_gguf(out, engine, proof.dtype, out / "model.gguf")
        program = engine.llama_server
    totals = ask_engine(engine.name, program, model, proof, merged, tokenizer)
    return totals.figures(engine.name)


def ask_engine(
    engine: str, program: str, model: Path, proof: Proof, answers: Answers, tokenizer: PreTrainedTokenizerBase
) -> ServedTotals:
    """Return how an engine that serves a model compares with the answers of the model that it was made from."""
    totals = ServedTotals()
    comparer = Comparer(tokenizer, find_family(tokenizer.chat_template), proof.max_new_tokens)
    with serving(engine, program, model, proof.device, proof.dtype) as (url, name):
        for question, output, log_probs in zip(proof.questions, answers.outputs, answers.log_probs, strict=True):
            if engine == "transformers" and has_history(question.messages):
                totals.left_out += 1
                continue
            try:
                reply = post(url, build_request(question, name, engine, proof.max_new_tokens))
            except ServerError as error:  # transformers serve ends so where an answer's tool call does not parse
                totals.errors.append(question.id)
                count = len(totals.errors)
                if count > len(proof.questions) * FAILED_SHARE:
                    raise UsageError(f"{error}; first at prompt {totals.errors[0]}, {count} times") from None
                continue
            totals.add(reply, question, output, log_probs, comparer)
    if totals.errors:
        count = f"{len(totals.errors)} of {len(proof.questions)} prompts"
        print(f"the server failed on {count}, which are left out: {', '.join(totals.errors)}")
    return totals


def build_request(question: Question, model: str, engine: str, max_new_tokens: int) -> dict:
    """Return the body of a chat completion that answers greedily, as the model wrote it."""
    body = {
        "model": model,
        "messages": to_openai(question.messages),
        "temperature": 0,
        "max_tokens": max_new_tokens,
        **REQUESTS[engine],
    }
    if question.tools:
        body["tools"] = question.tools
    if question.kwargs:
        body["chat_template_kwargs"] = question.kwargs
    return body


def has_history(messages: list[dict]) -> bool:
    """Return whether messages hold what transformers serve drops: reasoning, and text beside calls."""
    return any(message.get("reasoning_content") or message.get("tool_calls") for message in messages)


# -- the verdict ------------------------------------------------------------------------------------------------------
@dataclass
class Check:
    """A figure of a comparison, merged or served, and its bound; finding: how it lies beyond that, "" where it does
    not."""

    comparison: str
    figure: str
    bound: str
    finding: str = ""


def check_difference(comparison: str, name: str, words: str, value: float, bounds: Bounds) -> Check:
    most = bounds.max_logit_diff
    check = Check(comparison, name, f"≤ {most:g}")
    if not value <= most:  # a NaN is not
        check.finding = f"{words} differ by {value:.3g}, more than --max_logit_diff {most:g}"
    return check


def check_share(comparison: str, name: str, share: dict, bounds: Bounds) -> Check:
    """Return the check of a share by its interval: a bound that lies within that is not shown to be broken."""
    least = bounds.min_top1
    check = Check(comparison, name, f"≥ {least:g}")
    if share["high"] < least:
        check.finding = f"{comparison}: {name} in {describe_count(share)}, less than --min_top1 {least:g}"
    return check


def describe_count(share: dict) -> str:
    """Return "27 of 28 (0.823–0.994)"."""
    interval = f"{share['low']:.3f}–{share['high']:.3f}"
    return f"{share['count']} of {share['total']} ({interval})"


def format_share(share: dict | None) -> str:
    """Return "0.964 (0.823–0.994)"."""
    if share is None:
        return "–"
    interval = f"{share['low']:.3f}–{share['high']:.3f}"
    return f"{share['value']:.3f} ({interval})"


def check_proof(merged: dict | None, served: dict | None, bounds: Bounds) -> list[Check]:
    """Return a check for each figure that has a bound, and a value here.

    The share of all texts has none: one token in many may differ within its bound, and makes another text.
    """
    checks = []
    if merged:
        words = "logits of merged and adapter"
        checks.append(check_difference("merged", "max_logit_diff", words, merged["max_logit_diff"], bounds))
    if served and "max_logprob_diff" in served:
        words = "served: log-probabilities"
        checks.append(check_difference("served", "max_logprob_diff", words, served["max_logprob_diff"], bounds))
    shares = [("merged", merged, name) for name in ("top1", "same_stop", "same_text_where_top1")]
    shares += [("served", served, name) for name in ("same_prompt", "same_text", "same_end")]
    for comparison, figures, name in shares:
        if figures and figures.get(name):
            checks.append(check_share(comparison, name, figures[name], bounds))
    return checks
