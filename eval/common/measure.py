"""From rows and a model to records: what the commands of this room share.

The order of use: read_rows, clean_row, prepare, measure, with a model and tokenizer of models.py. Whatever the user can
repair is raised as UsageError with one sentence; a command prints it and exits 2.
"""

import json
import re

import numpy as np
import pandas
import pyarrow.parquet
from datasets import Dataset, DatasetDict, List, load_from_disk
from jinja2 import TemplateError
from jsonschema import SchemaError

from data_prep.common.errors import UsageError
from eval.common.metrics import RATES, controls, judge, schema_valid, strict_json, validator
from eval.common.models import fill_of, first_line, generate, render, token_losses

PROMPT_TAIL = 200  # characters of the prompt kept beside each answer
ANSWER = ("answer", "answer_tokens", "reference_tokens", "json_equal", "json_fields", *RATES.values())  # of a record
SCHEMA_IN_TEXT = re.compile(r"<schema>\s*(.*?)\s*</schema>", re.DOTALL)

# datasets reads JSON by pandas' function, which bends numbers: 0.7 becomes 0.7000000000000001 (data_prep/common)
pandas.io.json.ujson_loads = json.loads


def read_rows(path, split):
    """The rows of a JSONL, JSON or parquet file or of a save_to_disk folder (its split, where it has several) as a
    list of dicts, without the None that Arrow fills in."""
    if path.is_dir():
        try:
            table = load_from_disk(str(path))
        except FileNotFoundError:
            raise UsageError(
                f"{path} is not a dataset folder: pass one that save_to_disk wrote, or a .jsonl file"
            ) from None
        if isinstance(table, DatasetDict):
            if split not in table:
                raise UsageError(f"{path} has no split {split!r}: pass --split with one of {', '.join(table)}")
            table = table[split]
    elif not path.is_file():
        raise UsageError(f"the data {path} does not exist: pass a .jsonl, .json or .parquet file or a dataset folder")
    elif path.suffix == ".parquet":
        try:
            table = Dataset(pyarrow.parquet.read_table(path))
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} is not a readable parquet file ({first_line(error)}): write it again") from None
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
        raise UsageError(f"{path}, line {number} is not JSON ({first_line(error)}): repair or remove it") from None


def without_fill(value, feature):
    """value without the None that Arrow adds where rows of one struct differ; Json features keep their own nulls."""
    if isinstance(feature, dict) and value is not None:
        return {key: without_fill(item, feature[key]) for key, item in value.items() if item is not None}
    if isinstance(feature, List) and value is not None:
        return [without_fill(item, feature.feature) for item in value]
    return value


def clean_row(row, number):
    """{id, messages, tools or None, kwargs, source, tags, mode: think, no_think or None} of the number-th row, and its
    json_schema where it has one."""
    where = f"row {number}" + (f" ({row['id']})" if isinstance(row, dict) and row.get("id") else "")
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        raise UsageError(f"{where} of the data has no messages: run data_prep on the set first")
    if not all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages):
        raise UsageError(f"{where} of the data has a message without a role: write messages as {{role, content}}")
    tools = row.get("tools") or None
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
        if not isinstance(tools or [], list):
            raise ValueError("not a list")
    except ValueError as error:
        raise UsageError(
            f"{where} of the data has tools that are not a JSON list ({first_line(error)}): repair them"
        ) from None
    schema = row.get("json_schema")
    try:
        schema = json.loads(schema) if isinstance(schema, str) else schema
        validator(True if schema is None else schema)
    except (ValueError, SchemaError) as error:
        raise UsageError(
            f"{where} of the data has a json_schema that is no JSON schema ({first_line(error)}): repair it"
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
        **({} if schema is None else {"json_schema": schema}),
    }


def prepare(row, tokenizer, stops, limit, skip):
    """Render and tokenise one row under serving conditions; False if it has no assistant turn. Adds to row:

    sequences: token lists to run; spans: (sequence, start, end) of every scored output; all: the same of the whole
    conversation or None; and of the last answer: prompt (tokens, None if it is not scored), prompt_tail, question and
    reference (texts), reference_tokens (how many), opened (<think> where the prompt ends in it), schema. An output that
    stands in the whole conversation just as it was served shares its sequence, so that most rows cost one forward pass.
    limit: tokens; skip(reason, place) is called for whatever cannot be scored.
    """

    def rendered(upto, generation_prompt):
        return render(tokenizer, row["messages"][:upto], generation_prompt, row["tools"], **row["kwargs"])

    row |= {"sequences": [], "spans": [], "all": None, "prompt": None}
    try:
        whole = rendered(len(row["messages"]), False)[1]
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
            (before, prompt), (text, ids) = rendered(k, True), rendered(k + 1, False)
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
                asked = [message for message in row["messages"][:k] if message["role"] == "user"]
                row |= {
                    "prompt": prompt,
                    "prompt_tail": before[-PROMPT_TAIL:],
                    "reference_tokens": end - 1 - len(prompt),
                }
                row["question"] = str(asked[-1].get("content") or "") if asked else ""
                row["reference"] = tokenizer.decode(ids[len(prompt) : end - 1], clean_up_tokenization_spaces=False)
                # some templates open the think block in the prompt: its end then stands alone in the output
                row["opened"] = "<think>" if before.rstrip().endswith("<think>") else ""
                row["schema"] = schema_of(row, k, skip)
    return bool(answers)


def schema_of(row, k, skip):
    """The JSON schema of a row's k-th message, None where it has none: its column json_schema, else the last <schema>
    block of the messages before, as NousResearch's json-mode-eval has it. One that the reference itself does not meet
    is left out: the data contradicts itself."""
    schema, reference = row.get("json_schema"), row["opened"] + row["reference"]
    texts = [message["content"] for message in row["messages"][:k] if isinstance(message.get("content"), str)]
    for text in SCHEMA_IN_TEXT.findall("\n".join(texts)) if schema is None else ():
        try:
            validator(found := json.loads(text))
            schema = found if isinstance(found, dict) else schema
        except (ValueError, SchemaError):  # a text that only looks so
            continue
    if schema is None or not strict_json(reference):
        return None
    if schema_valid(schema, reference):
        return schema
    return skip("JSON schema that the data's own answer does not meet", row["id"])


def measure(
    model, rows, tokenizer, stops, batch_size, max_new_tokens, name="model", losses=token_losses, answers=generate
):
    """One record (metrics.py) with the answer a prepared row, in their order; name: of the model, for messages; losses
    and answers: what computes them, token_losses and generate or the like."""
    fill = fill_of(tokenizer, stops)
    sequences = [sequence for row in rows for sequence in row["sequences"]]
    losses = iter(losses(model, sequences, batch_size, fill, f"{name}: perplexity"))
    asked = [row for row in rows if row["prompt"]]
    prompts = [row["prompt"] for row in asked]
    outputs = iter(answers(model, prompts, stops, batch_size, fill, max_new_tokens, f"{name}: answers"))
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    # what the data's own answers hold is a template's way to write calls or reasoning
    allowed = set().union(*(controls(row["opened"] + row["reference"], special) for row in asked))
    records = []
    for row in rows:
        own = [next(losses) for _ in row["sequences"]]
        spans = [own[s][start - 1 : end - 1] for s, start, end in row["spans"]]
        whole = own[0] if row["all"] else np.zeros(0)
        nll, all_nll = float(sum(span.sum() for span in spans)), float(whole.sum())
        if not np.isfinite(nll + all_nll):
            raise UsageError(f"the {name} model's loss on row {row['id']} is not a number: repair its weights or dtype")
        record = {"nll": nll, "tokens": sum(map(len, spans)), "turns": len(spans)}
        record |= {"all_nll": all_nll, "all_tokens": len(whole), "texts": int(len(whole) > 0), **dict.fromkeys(ANSWER)}
        if row["prompt"]:
            output = next(outputs)
            answer = tokenizer.decode(output.tokens, clean_up_tokenization_spaces=False)
            record |= {
                "answer": answer,
                "answer_tokens": len(output.tokens),
                "reference_tokens": row["reference_tokens"],
            }
            record |= judge(
                row["opened"] + row["reference"],
                row["opened"] + answer,
                output.stopped,
                output.failed,
                question=row["question"],
                special=special,
                allowed=allowed,
                wants_json=bool({"json", "json_negative"}.intersection(row["tags"])) or row["schema"] is not None,
                schema=row["schema"],
            )
        records.append(record)
    return records
