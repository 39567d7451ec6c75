"""Models in this room: weights and tokenizer of a run folder, losses and greedy answers of token sequences.

What the user can repair is raised as UsageError with one sentence; a command prints it and exits 2.
"""

import argparse
import gc
import json
import signal
import sys
import threading
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

from data_prep.common.errors import UsageError

LOGIT_ROWS = 2048  # padded tokens a forward pass: 2,048 x 151,936 x 4 bytes = 1.2 GB of float32 logits for Qwen3
TIMEOUT = 600  # seconds that the answers of one batch may take, unless --timeout says otherwise


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")


def load_tokenizer(tuned):
    """The tokenizer of a run folder, and its stop tokens: its eos and those of the folder's generation_config."""
    tuned = Path(tuned)
    if not (tuned / "tokenizer_config.json").is_file():  # transformers would make up an empty one from config.json
        raise UsageError(f"{tuned} has no tokenizer: save the tokenizer with the run")
    try:
        tokenizer = AutoTokenizer.from_pretrained(tuned)
    except Exception as error:  # one type for each missing file and each backend
        raise UsageError(f"{tuned} has no readable tokenizer ({first_line(error)}): save it again") from None
    if not tokenizer.chat_template:
        raise UsageError(f"{tuned} has no chat template: save the tokenizer with the template the run was trained on")
    stops = {tokenizer.eos_token_id} - {None}
    if (tuned / "generation_config.json").is_file():
        eos = json.loads((tuned / "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id")
        stops |= set(eos if isinstance(eos, list) else [eos]) - {None}
    if not stops:
        raise UsageError(f"{tuned} names no stop token: set the tokenizer's eos_token")
    return tokenizer, stops


def check_vocabulary(base, tokenizer):
    """Refuse a base whose own tokenizer gives a shared token another id: it would be measured on noise."""
    if Path(base).is_dir() and not Path(base, "tokenizer_config.json").is_file():
        return  # a base need not have a tokenizer (transformers would make one up); load_model still compares the sizes
    try:
        vocabulary = AutoTokenizer.from_pretrained(base).get_vocab()
    except Exception:
        return
    ours = tokenizer.get_vocab()
    if wrong := sorted(token for token, number in vocabulary.items() if ours.get(token, number) != number):
        raise UsageError(
            f"the vocabularies of {base} and of the tuned folder differ ({len(wrong)} tokens have another id, "
            f"the first is {wrong[0]!r}): pass the --base that the run started from"
        )


def load_model(name, tokenizer, dtype, device, load_in_4bit=False):
    """The causal language model of a folder or hub id, from safetensors, without remote code, nothing made up."""
    quantization = BitsAndBytesConfig(
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
            quantization_config=quantization if load_in_4bit else None,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if Path(name).is_dir():
            raise UsageError(f"{name} does not load as a causal language model: {first_line(error)}") from None
        raise UsageError(
            f"{name} is neither a folder here nor a model that the hub gives now ({first_line(error)}): pass a local "
            "folder, or set HF_ENDPOINT to a mirror"
        ) from None
    if missing := info["missing_keys"]:  # transformers would go on with random numbers in their place
        raise UsageError(f"{name} lacks {len(missing)} weights, the first is {min(missing)}: save the model whole")
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise UsageError(f"the tuned tokenizer has {len(tokenizer)} tokens but {name} embeds {rows}: they do not match")
    # bitsandbytes computes 4-bit layers in bfloat16 on a CPU with AVX-512-BF16, whatever was asked for
    [vars(layer).update(support_avx512bf16_for_cpu=False) for layer in model.modules()]
    return model.eval()


def add_adapter(model, tuned, name="default"):
    """The model with a run folder's adapter on it, which must fit it and be complete; one that has adapters already
    gets it beside them, under `name`, and not switched on."""
    from peft import PeftModel  # here, since it imports bitsandbytes, which prints a line wherever it lacks a kernel

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


def adapter_base(folder):
    """The base that an adapter names, None of a folder that holds a whole model. Raises UsageError."""
    config = Path(folder, "adapter_config.json")
    if not config.is_file():
        return None
    base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise UsageError(f"{config} names no base: pass --base")
    return base


def open_model(name, base=None, dtype="auto", load_in_4bit=False):
    """(model, tokenizer, ids of its stop tokens) of a run folder: a model, or an adapter on `base` (default: the one
    that it names). dtype: auto is bfloat16 on CUDA, float32 elsewhere. Raises UsageError."""
    if not Path(name).is_dir():
        raise UsageError(f"{name} does not exist: pass a run folder, a model with its tokenizer or an adapter")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"auto": "bfloat16" if device == "cuda" else "float32"}.get(dtype, dtype)
    base = (base or adapter_base(name)) if adapter_base(name) else None
    tokenizer, stops = load_tokenizer(name)
    model = load_model(base or str(name), tokenizer, getattr(torch, dtype), device, load_in_4bit)
    if base:
        check_vocabulary(base, tokenizer)
        model = add_adapter(model, name)
    return model, tokenizer, stops


def add_model_arguments(parser, max_new_tokens=256, batched=True, timeout=True):
    """The flags that every command of this room has which runs a model, batched: many sequences at a time; timeout:
    their answers by generate() below, which has a limit."""
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: bf16 on CUDA")
    parser.add_argument("--load_in_4bit", action="store_true", help="nf4 with double quantisation, as in QLoRA")
    if batched:
        parser.add_argument("--batch_size", type=positive, default=16, help="sequences at a time")
    parser.add_argument("--max_new_tokens", type=positive, default=max_new_tokens, help="budget of each answer")
    if batched and timeout:
        parser.add_argument(
            "--timeout",
            type=positive,
            default=TIMEOUT,
            help=f"seconds for the answers of a batch (default: {TIMEOUT}); more for answers of many thousand tokens",
        )


def positive(text):
    """A whole number above 0, as the type of an argument."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def fill_of(tokenizer, stops):
    """The id that pads a batch."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stops)


def batches(sequences, size, label, tokens=sys.maxsize):
    """Lists of indices, longest first (a lack of memory shows at once), of at most size sequences and tokens each."""
    groups, room = [], 0
    for i in sorted(range(len(sequences)), key=lambda i: -len(sequences[i])):
        if room == 0:
            groups.append([])
            room = min(size, max(1, tokens // len(sequences[i])))
        groups[-1].append(i)
        room -= 1
    return track(groups, label, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


def pad(sequences, fill, left, device):
    """(ids, mask), both (rows, longest) on device."""
    width = max(map(len, sequences))
    ids, mask = torch.full((len(sequences), width), fill), torch.zeros(len(sequences), width, dtype=torch.long)
    for i, sequence in enumerate(sequences):
        place = slice(width - len(sequence), width) if left else slice(len(sequence))
        ids[i, place], mask[i, place] = torch.tensor(sequence), 1
    return ids.to(device), mask.to(device)


@torch.inference_mode()
def token_losses(model, sequences, batch_size, fill, label="perplexity", kept=None):
    """Negative log-likelihood in nats of every token but the first: one float64 array (length - 1) a sequence.

    kept: {index: array} of earlier, which is not computed again and is updated after every batch."""
    kept = {} if kept is None else kept
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


class Output(NamedTuple):
    """What a model said to a prompt: ids without the stop token; whether one ended them in budget; why there are
    none (out of memory, timeout)."""

    tokens: list
    stopped: bool
    failed: str = ""


def generate(model, prompts, stops, batch_size, fill, max_new_tokens, label="answers", timeout=TIMEOUT, kept=None):
    """An Output of each prompt (lists of ids), greedily. A prompt that takes all memory, or over `timeout` seconds by
    itself, costs itself alone. kept: {index: Output}, as in token_losses."""
    kept = {} if kept is None else kept
    for group in batches(prompts, batch_size, label):
        if not all(i in kept for i in group):
            found = answered(model, [prompts[i] for i in group], stops, fill, max_new_tokens, timeout)
            kept.update(zip(group, found, strict=True))
    return [kept[i] for i in range(len(prompts))]


def answered(model, prompts, stops, fill, max_new_tokens, timeout):
    """An Output of each prompt of a batch, which is halved where it fails."""
    # not merely passed to generate(), which takes what is unset (penalties, minimum length) from the model's own
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT runs the model's own generate
    model.generation_config = inner.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=sorted(stops), pad_token_id=fill
    )
    try:
        with torch.inference_mode(), limited(timeout):
            ids, mask = pad(prompts, fill, True, model.device)
            new = model.generate(input_ids=ids, attention_mask=mask)[:, ids.shape[1] :].tolist()
    except (MemoryError, RuntimeError, TimeoutError) as error:
        if not isinstance(error, (MemoryError, TimeoutError)) and "memory" not in str(error):
            raise
        failed = "timeout" if isinstance(error, TimeoutError) else "out of memory"
        new = None
    if new is None:  # past the handler, whose traceback would hold the batch's memory
        gc.collect()
        torch.cuda.empty_cache()
        if len(prompts) == 1:
            return [Output([], False, failed)]
        half = len(prompts) // 2
        parts = (prompts[:half], prompts[half:])
        return [one for part in parts for one in answered(model, part, stops, fill, max_new_tokens, timeout)]
    ends = [next((n for n, token in enumerate(tokens) if token in stops), None) for tokens in new]
    return [Output(tokens[:end], end is not None) for tokens, end in zip(new, ends, strict=True)]


@contextmanager
def limited(seconds):
    """Raises TimeoutError in what takes longer, between two steps of Python; only in the main thread of a system with
    SIGALRM, elsewhere there is no limit."""
    if not seconds or not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Answer(NamedTuple):
    """An Output as text, special tokens and all but the stop token shown."""

    text: str
    tokens: int
    stopped: bool
    failed: str = ""


def render(tokenizer, messages, generation_prompt=True, tools=None, **kwargs):
    """(text, ids) of a conversation under the tokenizer's template."""
    text = tokenizer.apply_chat_template(
        messages, tools=tools or None, add_generation_prompt=generation_prompt, tokenize=False, **kwargs
    )
    return text, tokenizer(text, add_special_tokens=False)["input_ids"]


def ask(model, tokenizer, stops, prompts, batch_size, max_new_tokens, label="answers", timeout=TIMEOUT):
    """An Answer of each prompt (ids), greedily; a prompt that fills the model's context fails unasked."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    fits = [prompt for prompt in prompts if len(prompt) < context]
    outputs = iter(generate(model, fits, stops, batch_size, fill_of(tokenizer, stops), max_new_tokens, label, timeout))
    long = Output([], False, "longer than the context")
    outputs = [next(outputs) if len(prompt) < context else long for prompt in prompts]
    texts = [tokenizer.decode(output.tokens, clean_up_tokenization_spaces=False) for output in outputs]
    return [Answer(text, len(output.tokens), *output[1:]) for text, output in zip(texts, outputs, strict=True)]
