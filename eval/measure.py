"""From rows and a model to records: what the commands of this room share.

    python -c "from measure import *; print(len(read_rows(Path('test.jsonl'), 'test')))"

The order of use: read_rows, clean_row, load_tokenizer, prepare, load_model (add_adapter), measure. Whatever the user
can repair is raised as BadInput with one sentence; a command prints it and exits 2.
"""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet
import torch
from datasets import Dataset, DatasetDict, List, load_from_disk
from jinja2 import TemplateError
from metrics import exact_match, strict_json
from rich.console import Console
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

LOGIT_ROWS = 2048  # padded tokens a forward pass: 2,048 x 151,936 x 4 bytes = 1.2 GB of float32 logits for Qwen3
PROMPT_TAIL = 200  # characters of the prompt kept beside each answer
NO_RECORD = dict.fromkeys(("answer", "answer_tokens", "stopped", "empty", "exact", "json_valid"))


class BadInput(Exception):
    """One sentence: what, where, what to do."""


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")


def read_rows(path, split):
    """The rows of a JSONL, JSON or parquet file or of a save_to_disk folder (its split, where it has several) as a
    list of dicts, without the None that Arrow fills in."""
    if path.is_dir():
        try:
            table = load_from_disk(str(path))
        except FileNotFoundError:
            raise BadInput(
                f"{path} is not a dataset folder: pass one that save_to_disk wrote, or a .jsonl file"
            ) from None
        if isinstance(table, DatasetDict):
            if split not in table:
                raise BadInput(f"{path} has no split {split!r}: pass --split with one of {', '.join(table)}")
            table = table[split]
    elif not path.is_file():
        raise BadInput(f"the data {path} does not exist: pass a .jsonl, .json or .parquet file or a dataset folder")
    elif path.suffix == ".parquet":
        try:
            table = Dataset(pyarrow.parquet.read_table(path))
        except (OSError, ValueError) as error:
            raise BadInput(f"{path} is not a readable parquet file ({first_line(error)}): write it again") from None
    else:
        return read_json(path)
    return [without_fill(row, table.features) for row in table]


def read_json(path):
    number = 1
    try:
        text = path.read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            return json.loads(text)
        rows = []
        for line in text.split("\n"):  # splitlines would also split at U+2028, which JSON strings may hold
            rows += [json.loads(line)] if line.strip() else []
            number += 1
        return rows
    except ValueError as error:
        raise BadInput(f"{path}, line {number} is not JSON ({first_line(error)}): repair or remove it") from None


def without_fill(value, feature):
    """value without the None that Arrow adds where rows of one struct differ; Json features keep their own nulls."""
    if isinstance(feature, dict) and value is not None:
        return {key: without_fill(item, feature[key]) for key, item in value.items() if item is not None}
    if isinstance(feature, List) and value is not None:
        return [without_fill(item, feature.feature) for item in value]
    return value


def clean_row(row, number):
    """{id, messages, tools or None, kwargs, source, tags, mode: think, no_think or None} of the number-th row."""
    where = f"row {number}" + (f" ({row['id']})" if isinstance(row, dict) and row.get("id") else "")
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        raise BadInput(f"{where} of the data has no messages: run data_prep on the set first")
    if not all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages):
        raise BadInput(f"{where} of the data has a message without a role: write messages as {{role, content}}")
    tools = row.get("tools") or None
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
        if not isinstance(tools or [], list):
            raise ValueError("not a list")
    except ValueError as error:
        raise BadInput(
            f"{where} of the data has tools that are not a JSON list ({first_line(error)}): repair them"
        ) from None
    kwargs = {key: value for key, value in (row.get("chat_template_kwargs") or {}).items() if value is not None}
    return {
        "id": str(row["id"] if row.get("id") is not None else number),
        "messages": [{k: v for k, v in message.items() if v is not None} for message in messages],
        "tools": tools or None,
        "kwargs": kwargs,
        "source": str(row.get("source") or "no source"),
        "tags": list(row.get("tags") or []),
        "mode": {True: "think", False: "no_think"}.get(kwargs.get("enable_thinking")),
    }


def load_tokenizer(tuned):
    """The tokenizer of a run folder, and its stop tokens: its eos and those of the folder's generation_config."""
    if not (tuned / "tokenizer_config.json").is_file():  # transformers would make up an empty one from config.json
        raise BadInput(f"{tuned} has no tokenizer: save the tokenizer with the run")
    try:
        tokenizer = AutoTokenizer.from_pretrained(tuned)
    except Exception as error:  # one type for each missing file and each backend
        raise BadInput(f"{tuned} has no readable tokenizer ({first_line(error)}): save it again") from None
    if not tokenizer.chat_template:
        raise BadInput(f"{tuned} has no chat template: save the tokenizer with the template the run was trained on")
    stops = {tokenizer.eos_token_id} - {None}
    if (tuned / "generation_config.json").is_file():
        eos = json.loads((tuned / "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id")
        stops |= set(eos if isinstance(eos, list) else [eos]) - {None}
    if not stops:
        raise BadInput(f"{tuned} names no stop token: set the tokenizer's eos_token")
    return tokenizer, stops


def check_vocabulary(base, tokenizer):
    """Refuse a base whose own tokenizer gives a shared token another id: it would be measured on noise."""
    try:
        vocabulary = AutoTokenizer.from_pretrained(base).get_vocab()
    except Exception:  # a base need not have a tokenizer; load_model still compares the sizes
        return
    ours = tokenizer.get_vocab()
    if wrong := sorted(token for token, number in vocabulary.items() if ours.get(token, number) != number):
        raise BadInput(
            f"the vocabularies of {base} and of the tuned folder differ ({len(wrong)} tokens have another id, "
            f"the first is {wrong[0]!r}): pass the --base that the run started from"
        )


def prepare(row, tokenizer, stops, limit, skip):
    """Render and tokenise one row under serving conditions; False if it has no assistant turn. Adds to row:

    sequences: token lists to run; spans: (sequence, start, end) of every scored output; all: the same of the whole
    conversation or None; prompt (tokens), prompt_tail and reference (texts) of the last answer, prompt None if it is
    not scored. An output that stands in the whole conversation just as it was served shares its sequence, so that most
    rows cost one forward pass. limit: tokens; skip(reason, place) is called for whatever cannot be scored.
    """

    def render(upto, generation_prompt):
        text = tokenizer.apply_chat_template(
            row["messages"][:upto],
            tools=row["tools"],
            add_generation_prompt=generation_prompt,
            tokenize=False,
            **row["kwargs"],
        )
        return text, tokenizer(text, add_special_tokens=False)["input_ids"]

    row |= {"sequences": [], "spans": [], "all": None, "prompt": None}
    try:
        whole = render(len(row["messages"]), False)[1]
        if len(whole) <= limit:
            row["sequences"], row["all"] = [whole], (0, 1, len(whole))
        else:
            skip("conversation longer than the limit", row["id"])
    except (TemplateError, TypeError, ValueError) as error:
        skip("conversation refused by the template", f"{row['id']}: {first_line(error)}")
    answers = [k for k, message in enumerate(row["messages"]) if message["role"] == "assistant"]
    for k in answers:
        place = f"{row['id']}, message {k}"
        if row["messages"][k].get("loss_mask") == 0:
            skip("answer with loss_mask 0", place)
            continue
        try:
            (before, prompt), (text, ids) = render(k, True), render(k + 1, False)
        except (TemplateError, TypeError, ValueError) as error:
            skip("answer refused by the template", f"{place}: {first_line(error)}")
            continue
        end = next((i + 1 for i in range(len(prompt), len(ids)) if ids[i] in stops), None)
        if not text.startswith(before):
            skip("answer not rendered as a continuation of its prompt", place)
        elif ids[: len(prompt)] != prompt:
            skip("answer whose first token straddles the prompt's end", place)
        elif end is None:
            skip("answer rendered without a stop token", place)
        elif end > limit:
            skip("answer longer than the limit", place)
        else:
            shared = row["all"] and row["sequences"][0][:end] == ids[:end]
            if not shared:
                row["sequences"].append(ids[:end])
            row["spans"].append((0 if shared else len(row["sequences"]) - 1, len(prompt), end))
            if k == answers[-1]:
                row |= {"prompt": prompt, "prompt_tail": before[-PROMPT_TAIL:]}
                row["reference"] = tokenizer.decode(ids[len(prompt) : end - 1], clean_up_tokenization_spaces=False)
    return bool(answers)


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
            raise BadInput(f"{name} does not load as a causal language model: {first_line(error)}") from None
        raise BadInput(
            f"{name} is neither a folder here nor a model that the hub gives now ({first_line(error)}): pass a local "
            "folder, or set HF_ENDPOINT to a mirror"
        ) from None
    if missing := info["missing_keys"]:  # transformers would go on with random numbers in their place
        raise BadInput(f"{name} lacks {len(missing)} weights, the first is {min(missing)}: save the model whole")
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise BadInput(f"the tuned tokenizer has {len(tokenizer)} tokens but {name} embeds {rows}: they do not match")
    return model.eval()


def add_adapter(model, tuned):
    """The model with a run folder's adapter on it, which must fit it and be complete."""
    from peft import PeftModel  # here, since it imports bitsandbytes, which prints a line wherever it lacks a kernel

    try:
        with warnings.catch_warnings():
            # PEFT only warns when the file lacks a weight, and would measure the base once more
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            return PeftModel.from_pretrained(model, tuned).eval()
    except (OSError, ValueError, KeyError, RuntimeError, UserWarning) as error:
        raise BadInput(f"the adapter in {tuned} does not fit the base ({first_line(error)}): pass its base") from None


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
def token_losses(model, sequences, batch_size, fill, label="perplexity"):
    """Negative log-likelihood in nats of every token but the first: one float64 array (length - 1) a sequence."""
    losses = [None] * len(sequences)
    for group in batches(sequences, batch_size, label, LOGIT_ROWS):
        ids, mask = pad([sequences[i] for i in group], fill, False, model.device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for row, i in enumerate(group):
            end = len(sequences[i])
            # in float32, a row at a time: a float32 copy of the whole batch would be twice its bf16 logits
            loss = torch.nn.functional.cross_entropy(logits[row, : end - 1].float(), ids[row, 1:end], reduction="none")
            losses[i] = loss.double().cpu().numpy()
    return losses


@torch.inference_mode()
def generate(model, prompts, stops, batch_size, fill, max_new_tokens, label="answers"):
    """(tokens without the stop token, whether a stop token ended them in budget) of each prompt, greedily."""
    # not merely passed to generate(), which takes what is unset (penalties, minimum length) from the model's own
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=sorted(stops), pad_token_id=fill
    )
    outputs = [None] * len(prompts)
    for group in batches(prompts, batch_size, label):
        ids, mask = pad([prompts[i] for i in group], fill, True, model.device)
        new = model.generate(input_ids=ids, attention_mask=mask)[:, ids.shape[1] :].tolist()
        for i, tokens in zip(group, new, strict=True):
            end = next((n for n, token in enumerate(tokens) if token in stops), None)
            outputs[i] = (tokens[:end], end is not None)
    return outputs


def measure(model, rows, tokenizer, stops, batch_size, max_new_tokens, name="model"):
    """One record (metrics.py) with the answer a prepared row, in their order; name: of the model, for messages."""
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stops)
    sequences = [sequence for row in rows for sequence in row["sequences"]]
    losses = iter(token_losses(model, sequences, batch_size, fill, f"{name}: perplexity"))
    prompts = [row["prompt"] for row in rows if row["prompt"]]
    outputs = iter(generate(model, prompts, stops, batch_size, fill, max_new_tokens, f"{name}: answers"))
    records = []
    for row in rows:
        own = [next(losses) for _ in row["sequences"]]
        spans = [own[s][start - 1 : end - 1] for s, start, end in row["spans"]]
        whole = own[0] if row["all"] else np.zeros(0)
        nll, all_nll = float(sum(span.sum() for span in spans)), float(whole.sum())
        if not np.isfinite(nll + all_nll):
            raise BadInput(f"the {name} model's loss on row {row['id']} is not a number: repair its weights or dtype")
        record = {"nll": nll, "tokens": sum(map(len, spans)), "turns": len(spans)}
        record |= {"all_nll": all_nll, "all_tokens": len(whole), "texts": int(len(whole) > 0), **NO_RECORD}
        if row["prompt"]:
            tokens, stopped = next(outputs)
            answer = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
            record |= {"answer": answer, "answer_tokens": len(tokens), "stopped": stopped, "empty": not answer.strip()}
            # some templates open the think block in the prompt: its end then stands alone in the output
            opened = "<think>" if row["prompt_tail"].rstrip().endswith("<think>") else ""
            record["exact"] = exact_match(opened + row["reference"], opened + answer)
            record["json_valid"] = strict_json(opened + answer) if "json" in row["tags"] else None
        records.append(record)
    return records
