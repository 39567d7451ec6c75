"""Models: weights and tokenizer of a run folder, losses and greedy answers of token sequences.

What the user can repair is raised as UsageError with one sentence; a command prints it and exits 2.
"""

import gc
import json
import signal
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from data_prep.common.errors import UsageError
from data_prep.common.quiet import hide_progress_bars
from eval.common.arguments import TIMEOUT, first_line

if TYPE_CHECKING:
    from peft import PeftModel

SHOWN_PROMPT = 40  # characters of a prompt in a message
LOGIT_ROWS = 2048  # padded tokens a forward pass: 2,048 x 151,936 x 4 bytes = 1.2 GB of float32 logits for Qwen3

hide_progress_bars()


# -- a run folder -----------------------------------------------------------------------------------------------------
class OpenedTokenizer(NamedTuple):
    """A tokenizer and the ids of its stop tokens."""

    tokenizer: PreTrainedTokenizerBase
    stops: set[int]


class OpenedModel(NamedTuple):
    """A model, its tokenizer and the ids of its stop tokens."""

    model: "PreTrainedModel | PeftModel"
    tokenizer: PreTrainedTokenizerBase
    stops: set[int]


def load_tokenizer(tuned: str | Path, chat: bool = True) -> OpenedTokenizer:
    """Return the tokenizer of a run folder, and its stop tokens: its eos and those of the folder's generation_config.

    chat: it must have a chat template and a stop token. Raises UsageError.
    """
    tuned = Path(tuned)
    if not (tuned / "tokenizer_config.json").is_file():  # transformers would make up an empty one from config.json
        raise UsageError(f"{tuned} has no tokenizer: save the tokenizer with the run")
    try:
        tokenizer = AutoTokenizer.from_pretrained(tuned)
    except Exception as error:  # one type for each missing file and each backend
        raise UsageError(f"{tuned} has no readable tokenizer ({first_line(error)}): save it again") from None
    if chat and not tokenizer.chat_template:
        raise UsageError(f"{tuned} has no chat template: save the tokenizer with the template the run was trained on")
    stops = {tokenizer.eos_token_id}
    config = tuned / "generation_config.json"
    if config.is_file():
        eos = json.loads(config.read_text(encoding="utf-8")).get("eos_token_id")
        stops.update(eos if isinstance(eos, list) else [eos])
    stops.discard(None)
    if chat and not stops:
        raise UsageError(f"{tuned} names no stop token: set the tokenizer's eos_token")
    return OpenedTokenizer(tokenizer, stops)


def check_vocabulary(base: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UsageError for a base whose own tokenizer gives a shared token another id: it would be measured on noise.

    A base need not have a tokenizer; load_model still compares the sizes.
    """
    if Path(base).is_dir() and not Path(base, "tokenizer_config.json").is_file():
        return  # transformers would make one up
    try:
        vocabulary = AutoTokenizer.from_pretrained(base).get_vocab()
    except Exception:
        return
    ours = tokenizer.get_vocab()
    wrong = sorted(token for token, number in vocabulary.items() if ours.get(token, number) != number)
    if wrong:
        raise UsageError(
            f"the vocabularies of {base} and of the tuned folder differ ({len(wrong)} tokens have another id, "
            f"the first is {wrong[0]!r}): pass the --base that the run started from"
        )


def load_model(
    name: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    device: str | torch.device,
    load_in_4bit: bool = False,
) -> PreTrainedModel:
    """Return the causal language model of a folder or hub id, from safetensors, without remote code, nothing made up.

    Raises UsageError.
    """
    kwargs = {}  # AutoModel takes quantization_config=None for "not quantized", whatever the folder's config says
    if load_in_4bit:
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            device_map={"": device},
            use_safetensors=True,
            output_loading_info=True,
            **kwargs,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        if Path(name).is_dir():
            raise UsageError(f"{name} does not load as a causal language model: {first_line(error)}") from None
        raise UsageError(
            f"{name} is neither a folder here nor a model that the hub gives now ({first_line(error)}): pass a local "
            "folder, or set HF_ENDPOINT to a mirror"
        ) from None
    missing = info["missing_keys"]
    if missing:  # transformers would go on with random numbers in their place
        raise UsageError(f"{name} lacks {len(missing)} weights, the first is {min(missing)}: save the model whole")
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise UsageError(f"the tuned tokenizer has {len(tokenizer)} tokens but {name} embeds {rows}: they do not match")
    for layer in model.modules():
        # bitsandbytes computes 4-bit layers in bfloat16 on a CPU with AVX-512-BF16, whatever was asked for
        layer.support_avx512bf16_for_cpu = False
    return model.eval()


def add_adapter(model: "PreTrainedModel | PeftModel", tuned: str | Path, name: str = "default") -> "PeftModel":
    """Return the model with a run folder's adapter on it, which must fit it and be complete. Raises UsageError.

    A model that has adapters already gets it beside them, under `name`, and not switched on.
    """
    from peft import PeftModel  # here, since it imports bitsandbytes, which takes seconds

    try:
        with warnings.catch_warnings():
            # PEFT only warns when the file lacks a weight, and would measure the base once more
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            if not isinstance(model, PeftModel):
                return PeftModel.from_pretrained(model, tuned, adapter_name=name).eval()
            model.load_adapter(tuned, name)
            return model.eval()
    except (OSError, ValueError, KeyError, RuntimeError, UserWarning) as error:
        raise UsageError(f"the adapter in {tuned} does not fit the base ({first_line(error)}): pass its base") from None


def adapter_base(folder: str | Path) -> str | None:
    """Return the base that an adapter names, None for a folder that holds a whole model. Raises UsageError."""
    config = Path(folder, "adapter_config.json")
    if not config.is_file():
        return None
    base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise UsageError(f"{config} names no base: pass --base")
    return base


def open_model(
    name: str | Path, base: str | None = None, dtype: str = "auto", load_in_4bit: bool = False, chat: bool = True
) -> OpenedModel:
    """Return the model of a run folder: a whole one, or an adapter on its base. Raises UsageError.

    base: of an adapter; default: the one that it names. dtype: auto is bfloat16 on CUDA, float32 elsewhere. chat: as
    in load_tokenizer.
    """
    if not Path(name).is_dir():
        raise UsageError(f"{name} does not exist: pass a run folder, a model with its tokenizer or an adapter")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    own_base = adapter_base(name)
    tokenizer, stops = load_tokenizer(name, chat)
    if own_base is None:
        model = load_model(str(name), tokenizer, getattr(torch, dtype), device, load_in_4bit)
        return OpenedModel(model, tokenizer, stops)
    base = base or own_base
    model = load_model(base, tokenizer, getattr(torch, dtype), device, load_in_4bit)
    check_vocabulary(base, tokenizer)
    return OpenedModel(add_adapter(model, name), tokenizer, stops)


# -- prompts ----------------------------------------------------------------------------------------------------------
class Prompt(NamedTuple):
    """A conversation as its template writes it, and its tokens."""

    text: str
    ids: list[int]


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict],
    generation_prompt: bool = True,
    tools: list[dict] | None = None,
    **kwargs: Any,
) -> Prompt:
    """Return a conversation under the tokenizer's template. kwargs: what the template is given besides."""
    text = render_text(tokenizer, messages, generation_prompt, tools, **kwargs)
    return Prompt(text, tokenizer(text, add_special_tokens=False)["input_ids"])


def render_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict],
    generation_prompt: bool = True,
    tools: list[dict] | None = None,
    **kwargs: Any,
) -> str:
    """Return the text of render alone."""
    return tokenizer.apply_chat_template(
        messages, tools=tools or None, add_generation_prompt=generation_prompt, tokenize=False, **kwargs
    )


ANSWER_MARK = "firstword"


def answer_prefix(tokenizer: PreTrainedTokenizerBase, messages: list[dict], **kwargs: Any) -> str:
    """Return what the template writes between its generation prompt and the first word of an answer.

    "" for most templates; gpt-oss opens its final channel, Qwen3 an empty thought. A letter that is looked for without
    it would be looked for where the model's answer has not begun. Raises UsageError for a template whose answers do not
    go on from its generation prompt, as those of DeepSeek-R1's own, which opens a thought that no past answer has.
    """
    prompt = render_text(tokenizer, messages, **kwargs)
    answered_text = render_text(tokenizer, [*messages, {"role": "assistant", "content": ANSWER_MARK}], False, **kwargs)
    prefix, mark, _ = answered_text.removeprefix(prompt).partition(ANSWER_MARK)
    if not answered_text.startswith(prompt) or not mark:
        raise UsageError(
            "the chat template does not write an answer behind its own generation prompt, which ends in "
            f"{prompt[-SHOWN_PROMPT:]!r}: a letter there would be none of the answer; save the run with the template "
            "of its family in chat_templates/"
        )
    return prefix


def mode_kwargs(mode: str | None) -> dict[str, bool]:
    """Return what a template is given for a mode, think or no_think; {} where it has no two modes."""
    if mode is None:
        return {}
    return {"enable_thinking": mode == "think"}


def choose_mode(tokenizer: PreTrainedTokenizerBase, mode: str | None, run: str | Path) -> str | None:
    """Return the mode to ask in: the given one, by default no_think; None for a template without two modes.

    Raises UsageError for a mode that the template does not have. run: what the message names.
    """
    probe = [{"role": "user", "content": "?"}]
    if render_text(tokenizer, probe, enable_thinking=True) != render_text(tokenizer, probe, enable_thinking=False):
        return mode or "no_think"
    if mode:
        raise UsageError(f"the template of {run} has no two modes: leave out --mode")
    return None


# -- batches ----------------------------------------------------------------------------------------------------------
def fill_of(tokenizer: PreTrainedTokenizerBase, stops: set[int]) -> int:
    """Return the id that pads a batch."""
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    return min(stops)


def batches(
    sequences: Sequence[Sequence[int]], size: int, label: str, tokens: int = sys.maxsize
) -> Iterable[list[int]]:
    """Return lists of indices, longest first (a lack of memory shows at once), of at most size sequences and tokens."""
    groups: list[list[int]] = []
    left = 0  # sequences that the last group still takes
    for i in sorted(range(len(sequences)), key=lambda i: -len(sequences[i])):
        if left == 0:
            groups.append([])
            left = min(size, max(1, tokens // len(sequences[i])))
        groups[-1].append(i)
        left -= 1
    return track(groups, label, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


class Padded(NamedTuple):
    """ids and mask, both (rows, longest)."""

    ids: torch.Tensor
    mask: torch.Tensor


def pad(sequences: Sequence[Sequence[int]], fill: int, left: bool, device: str | torch.device) -> Padded:
    """Return sequences as one batch on a device, filled on the left or on the right."""
    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), fill)
    mask = torch.zeros(len(sequences), width, dtype=torch.long)
    for i, sequence in enumerate(sequences):
        start = width - len(sequence) if left else 0
        ids[i, start : start + len(sequence)] = torch.tensor(sequence)
        mask[i, start : start + len(sequence)] = 1
    return Padded(ids.to(device), mask.to(device))


# -- losses -----------------------------------------------------------------------------------------------------------
@torch.inference_mode()
def token_losses(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int]],
    batch_size: int,
    fill: int,
    label: str = "perplexity",
    kept: dict[int, np.ndarray] | None = None,
) -> list[np.ndarray]:
    """Return the negative log-likelihood in nats of every token but the first: a float64 array (length - 1) a sequence.

    fill: the token for padding. label: of the progress bar. kept: {index: array} of earlier, which is not computed
    again and is updated after every batch.
    """
    if kept is None:
        kept = {}
    for group in batches(sequences, batch_size, label, LOGIT_ROWS):
        if all(i in kept for i in group):
            continue
        losses = {}
        ids, mask = pad([sequences[i] for i in group], fill, False, model.device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for row, i in enumerate(group):
            end = len(sequences[i])
            # in float32, a row at a time: a float32 copy of the whole batch would be twice its bf16 logits
            loss = torch.nn.functional.cross_entropy(logits[row, : end - 1].float(), ids[row, 1:end], reduction="none")
            losses[i] = loss.double().cpu().numpy()
        kept.update(losses)
    return [kept[i] for i in range(len(sequences))]


# -- answers ----------------------------------------------------------------------------------------------------------
class Output(NamedTuple):
    """What a model said to a prompt.

    tokens: ids without the stop token. stopped: whether one ended them in budget. failed: why there are none (out of
    memory, timeout), "" where there are.
    """

    tokens: list[int]
    stopped: bool
    failed: str = ""


class Answer(NamedTuple):
    """An Output as text, special tokens and all but the stop token shown. tokens: how many."""

    text: str
    tokens: int
    stopped: bool
    failed: str = ""


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    stops: set[int],
    batch_size: int,
    fill: int,
    max_new_tokens: int,
    label: str = "answers",
    timeout: float = TIMEOUT,
    kept: dict[int, Output] | None = None,
    sampling: dict[str, Any] | None = None,
) -> list[Output]:
    """Return an Output of each prompt (lists of ids), greedily. One that takes all memory, or over `timeout` seconds
    by itself, costs itself alone.

    timeout: 0 is none. kept: {index: Output}, as in token_losses. sampling: settings of transformers' GenerationConfig
    that draw the answers instead.
    """
    if kept is None:
        kept = {}
    for group in batches(prompts, batch_size, label):
        if all(i in kept for i in group):
            continue
        outputs = answered(model, [prompts[i] for i in group], stops, fill, max_new_tokens, timeout, sampling)
        kept.update(zip(group, outputs, strict=True))
    return [kept[i] for i in range(len(prompts))]


def answered(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    stops: set[int],
    fill: int,
    max_new_tokens: int,
    timeout: float,
    sampling: dict[str, Any] | None = None,
) -> list[Output]:
    """Return an Output of each prompt of a batch, which is halved where it fails."""
    settings = {"do_sample": False, **(sampling or {})}
    # not merely passed to generate(), which takes what is unset (penalties, minimum length) from the model's own
    model.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=sorted(stops), pad_token_id=fill, **settings
    )
    if hasattr(model, "get_base_model"):  # PEFT runs the model's own generate
        model.get_base_model().generation_config = model.generation_config
    new = None
    failed = ""
    try:
        with torch.inference_mode(), limited(timeout):
            ids, mask = pad(prompts, fill, True, model.device)
            new = model.generate(input_ids=ids, attention_mask=mask)[:, ids.shape[1] :].tolist()
    except TimeoutError:
        failed = "timeout"
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        failed = "out of memory"
    if new is not None:
        return [cut_at_stop(tokens, stops) for tokens in new]
    # past the handler, whose traceback would hold the batch's memory
    gc.collect()
    torch.cuda.empty_cache()
    if len(prompts) == 1:
        return [Output([], False, failed)]
    half = len(prompts) // 2
    outputs = []
    for part in (prompts[:half], prompts[half:]):
        outputs.extend(answered(model, part, stops, fill, max_new_tokens, timeout, sampling))
    return outputs


def cut_at_stop(tokens: Sequence[int], stops: set[int]) -> Output:
    """Return the Output of generated tokens: what stands before the first stop token."""
    for number, token in enumerate(tokens):
        if token in stops:
            return Output(list(tokens[:number]), True)
    return Output(list(tokens), False)


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in what takes longer, between two steps of Python.

    Only in the main thread of a system with SIGALRM; elsewhere, and for 0 seconds, there is no limit.
    """
    if not seconds or not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stops: set[int],
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    max_new_tokens: int,
    label: str = "answers",
    timeout: float = TIMEOUT,
    sampling: dict[str, Any] | None = None,
) -> list[Answer]:
    """Return an Answer of each prompt (ids), greedily; a prompt that fills the model's context fails unasked.

    timeout, sampling: as in generate.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    fill = fill_of(tokenizer, stops)
    fitting = [prompt for prompt in prompts if len(prompt) < context]
    outputs = generate(
        model, fitting, stops, batch_size, fill, max_new_tokens, label, timeout=timeout, sampling=sampling
    )
    remaining = iter(outputs)
    answers = []
    for prompt in prompts:
        if len(prompt) < context:
            answers.append(decode(tokenizer, next(remaining)))
        else:
            answers.append(Answer("", 0, False, "longer than the context"))
    return answers


def decode(tokenizer: PreTrainedTokenizerBase, output: Output) -> Answer:
    """Return an Output as text."""
    text = tokenizer.decode(output.tokens, clean_up_tokenization_spaces=False)
    return Answer(text, len(output.tokens), output.stopped, output.failed)


def remove_tokens(text: str, tokens: Iterable[str]) -> str:
    """Return a text without these tokens, such as a stop token that an open thought keeps, and stripped."""
    for token in tokens:
        text = text.replace(token, "")
    return text.strip()
