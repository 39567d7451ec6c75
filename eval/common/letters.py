"""Multiple choice by the letter, as nanochat asks it: the letter with the highest logit where an answer begins."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_prep.common.errors import UsageError
from eval.common.models import LOGIT_ROWS, answer_prefix, batches, fill_of, pad, render
from eval.common.problems import LetterProblem


def letter_prompts(
    tokenizer: PreTrainedTokenizerBase, problems: Sequence[LetterProblem], **kwargs: Any
) -> list[tuple[str, list[int]]]:
    """Return the prompt of each problem, up to where the answer's first word stands, as text and tokens.

    kwargs: what the template is given besides. Raises UsageError, as answer_prefix.
    """
    prompts = []
    for problem in problems:
        text, ids = render(tokenizer, problem.prompt, **kwargs)
        prefix = answer_prefix(tokenizer, problem.prompt, **kwargs)
        if prefix:
            text += prefix
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        prompts.append((text, ids))
    return prompts


def letter_ids(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], letters: Sequence[str]) -> list[int]:
    """Return the token of each letter behind a prompt of this text and these tokens. Raises UsageError.

    nanochat asserts that a letter alone is one token; here it must also leave the prompt's own tokens as they are,
    since a template may end in what merges with it.
    """
    found = []
    for letter in letters:
        whole = tokenizer(text + letter, add_special_tokens=False)["input_ids"]
        if whole[:-1] != ids:
            raise UsageError(
                f"the letter {letter!r} is not one token of its own behind the generation prompt of this tokenizer: "
                "its letter logits would compare other things; use another template or tokenizer"
            )
        found.append(whole[-1])
    return found


@torch.inference_mode()
def answer_letters(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stops: set[int],
    problems: Sequence[LetterProblem],
    batch_size: int,
    label: str = "letters",
    **kwargs: Any,
) -> list[str]:
    """Return the letter of each problem with the highest logit where its answer begins; a draw goes to the first.

    label: of the progress bar. kwargs: what the template is given besides. Raises UsageError.
    """
    prompts = letter_prompts(tokenizer, problems, **kwargs)
    fill = fill_of(tokenizer, stops)
    answers = [""] * len(problems)
    for group in batches([ids for _, ids in prompts], batch_size, label, LOGIT_ROWS):
        ids, mask = pad([prompts[i][1] for i in group], fill, False, model.device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for row, i in enumerate(group):
            text, own_ids = prompts[i]
            candidates = letter_ids(tokenizer, text, own_ids, problems[i].letters)
            focus = logits[row, len(own_ids) - 1, candidates].float()
            if not torch.isfinite(focus).all():
                raise UsageError(f"the logits on {problems[i].id} are not numbers: repair the model's weights or dtype")
            answers[i] = problems[i].letters[int(focus.argmax())]
    return answers


def count_right_letters(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stops: set[int],
    problems: Sequence[LetterProblem],
    batch_size: int,
) -> int:
    """Return how many problems have the right letter. Raises UsageError."""
    answers = answer_letters(model, tokenizer, stops, problems, batch_size)
    return len([answer for answer, problem in zip(answers, problems, strict=True) if answer == problem.answer])
