"""lm-eval's models of a run folder, which answer as every command does: asked by models.py, read by the one parser.

lm-eval alone takes what stands in a thought that never ends for the answer, drops the tokens that mark a channel, and
compares choices where gpt-oss has not opened its final channel. Importing this file needs lm-eval.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from transformers import PreTrainedTokenizerBase

from data_prep.common.answers import find_family, parse_answer
from eval.common.models import Answer, answer_prefix, ask, cut_at_stop, decode, mode_kwargs, render_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE_MARK = "firstquestion"
PROBE = [{"role": "user", "content": PROBE_MARK}]


@dataclass
class Befallen:
    """What befell the answers to one row. cut: no stop token or stop text ended one of them, or its thought never
    ends; failed: why there is none, "" where there is."""

    cut: bool = False
    failed: str = ""


@dataclass
class Reader:
    """Takes answers apart as the family of a tokenizer's template writes them. rows: by lm-eval's number of the row."""

    tokenizer: PreTrainedTokenizerBase
    stops: set[int]
    mode: str | None
    rows: dict[int, Befallen] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.family = find_family(self.tokenizer.chat_template)
        tokens = self.tokenizer.added_tokens_decoder.values()
        self.special = [token.content for token in tokens if token.special]

    def read(self, request: Instance, answer: Answer, until: Sequence[str]) -> str:
        """Return the text that a task judges, and note what befell the answer.

        It stands behind the thought, without special tokens and before the first of the task's stop texts, which may
        stand in a thought.
        """
        said = parse_answer(answer.text, self.family, request.args[0])
        whole = said.content.lstrip()
        for token in self.special:
            whole = whole.replace(token, "")
        text = whole
        for stop_text in until:
            if stop_text:
                text = text.partition(stop_text)[0]
        row = self.rows.setdefault(request.doc_id, Befallen())
        if not said.is_complete or not (answer.stopped or text != whole):
            row.cut = True
        row.failed = row.failed or answer.failed
        return text

    def behind_prefix(self, requests: Sequence[Instance]) -> list[Instance]:
        """Return requests to compare continuations whose contexts end where an answer's first word stands.

        A context that does not end in the template's generation prompt, as where a task begins the answer itself, is
        left as it is. Raises UsageError, as answer_prefix.
        """
        kwargs = mode_kwargs(self.mode)
        prefix = answer_prefix(self.tokenizer, PROBE, **kwargs)
        generation_prompt = render_text(self.tokenizer, PROBE, **kwargs).rpartition(PROBE_MARK)[2]
        placed = []
        for request in requests:
            context, continuation = request.args
            if context.endswith(generation_prompt):
                request = replace(request, arguments=(context + prefix, continuation))
            placed.append(request)
        return placed


class RunModel:
    """What both engines have in common. A class with it before lm-eval's own has ask_prompts besides."""

    reader: Reader

    def ask_prompts(self, prompts: list[list[int]], budget: int, settings: dict[str, Any]) -> list[Answer]:
        """Return an Answer of each prompt. settings: of lm-eval for generation, but for the budget and stop texts."""
        raise NotImplementedError

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the text of each request that its task judges; those with the same settings are asked together."""
        by_settings: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            by_settings.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        texts = [""] * len(requests)
        for numbers in by_settings.values():
            settings = normalize_gen_kwargs(requests[numbers[0]].args[1])
            until = settings.pop("until")
            budget = settings.pop("max_gen_toks")
            prompts = []
            for number in numbers:
                context = requests[number].args[0]
                prompts.append(self.reader.tokenizer(context, add_special_tokens=False)["input_ids"])
            answers = self.ask_prompts(prompts, budget, settings)
            for number, answer in zip(numbers, answers, strict=True):
                texts[number] = self.reader.read(requests[number], answer, until)
        return texts

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return lm-eval's (log-probability, is greedy) of each continuation, where an answer's first word stands."""
        return super().loglikelihood(self.reader.behind_prefix(requests), disable_tqdm=disable_tqdm)


class TransformersRun(RunModel, HFLM):
    """A run's model in transformers. One answer that takes all memory fails by itself."""

    def __init__(
        self, model: "PreTrainedModel", tokenizer: PreTrainedTokenizerBase, reader: Reader, seed: int, **options: Any
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, **options)
        self.reader = reader
        self.seed = seed

    def ask_prompts(self, prompts: list[list[int]], budget: int, settings: dict[str, Any]) -> list[Answer]:
        torch.manual_seed(self.seed)  # for tasks that draw their answers
        if not settings["do_sample"]:
            del settings["temperature"]  # transformers would warn that it has no use for it
        return ask(
            self.model,
            self.tokenizer,
            self.reader.stops,
            prompts,
            self.batch_size,
            budget,
            timeout=0,
            sampling=settings,
        )


def open_vllm_run(reader: Reader, **options: Any) -> RunModel:
    """Return a run's model in vLLM. options: of lm-eval's VLLM. Raises PackageNotFoundError, as lm-eval does."""
    from lm_eval.models.vllm_causallms import VLLM

    class VllmRun(RunModel, VLLM):
        def ask_prompts(self, prompts: list[list[int]], budget: int, settings: dict[str, Any]) -> list[Answer]:
            from vllm import SamplingParams

            own, _, _ = self.modify_gen_kwargs({**settings, "max_gen_toks": budget})
            sampling = SamplingParams(max_tokens=budget, detokenize=False, **own)
            fitting = [prompt for prompt in prompts if len(prompt) < self.max_length]
            remaining = iter(self._model_generate(fitting, generate=True, sampling_params=sampling))
            answers = []
            for prompt in prompts:
                if len(prompt) >= self.max_length:
                    answers.append(Answer("", 0, False, "longer than the context"))
                    continue
                completion = next(remaining).outputs[0]
                output = cut_at_stop(completion.token_ids, self.reader.stops)
                answers.append(decode(self.reader.tokenizer, output))
            return answers

    model = VllmRun(**options)
    model.reader = reader
    return model
