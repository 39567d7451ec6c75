"""The round trip of a merge: does the merged model, and the server of it, answer as the adapter did?

    python eval/merge.py runs/qwen3_qlora --out models/mine

No command of its own; merge.py's docstring defines what is compared. One model is in memory at a time: the adapter's
logits wait on the disk (positions x vocabulary x 4 bytes; 50 answers of 32 tokens, 151,936 entries of Qwen3: 1 GB).
"""

import subprocess

import numpy as np
import torch
from endpoint import NEUTRAL, ServerError, post, serving
from jinja2 import TemplateError
from measure import clean_row, read_rows
from metrics import final_text
from models import BadInput, fill_of, generate, load_model, load_tokenizer, render
from scores import rate

# (float32?, 4-bit base, --into): largest logit difference, least top-1 agreement. Measured on the demo's QLoRA adapter,
# 50 held-out prompts, float32: 1.5e-5 and 1.000 dequantized; 2.55 and 0.993 original (5.3 and 0.858 on the neutral
# prompts, which that model of 0.87M parameters never saw the like of: it fails there, as it should)
BOUNDS = {
    (True, False, "original"): (1e-3, 0.999),
    (False, False, "original"): (1.0, 0.97),
    (True, True, "dequantized"): (1e-3, 0.999),
    (False, True, "dequantized"): (1.0, 0.97),
    (True, True, "original"): (5.0, 0.9),
    (False, True, "original"): (5.0, 0.9),
}
PLAIN = {"transformers": {"frequency_penalty": 0}, "vllm": {"repetition_penalty": 1.0}, "llamacpp": {}}  # no penalty


def rendered(tokenizer, row):
    return render(tokenizer, row["messages"], True, row["tools"], **row["kwargs"])


def questions(data, split, count, tokenizer, room):
    """(rows to ask, how many cannot be): the prompts of the data's last answers, at most room tokens, else neutral
    ones; each {id, messages, tools, kwargs, text, prompt (ids)}. Raises BadInput."""
    rows = [
        {"id": f"neutral {i + 1}", "messages": [{"role": "user", "content": text}]} for i, text in enumerate(NEUTRAL)
    ]
    asked, refused = [], 0
    for number, row in enumerate(read_rows(data, split) if data else rows, 1):
        if len(asked) == count:
            break
        row = clean_row(row, number)
        last = max((k for k, message in enumerate(row["messages"]) if message["role"] == "assistant"), default=None)
        row["messages"] = row["messages"][:last]
        try:
            row["text"], row["prompt"] = rendered(tokenizer, row)
        except (TemplateError, TypeError, ValueError):
            row["prompt"] = []
        if 0 < len(row["prompt"]) <= room:
            asked.append(row)
        else:
            refused += 1
    if count and not asked:
        raise BadInput(f"{data or 'the neutral prompts'}: none of {refused} can be asked: pass other --data")
    return asked, refused


def answers(model, tokenizer, stops, asked, max_new_tokens, label):
    """The models.Output of each question, one at a time as a server has them: no padding in the numbers."""
    prompts = [row["prompt"] for row in asked]
    outputs = generate(model, prompts, stops, 1, fill_of(tokenizer, stops), max_new_tokens, label)
    if failed := [(row["id"], output.failed) for row, output in zip(asked, outputs, strict=True) if output.failed]:
        raise BadInput(f"the {label} model failed on {len(failed)} prompts (the first is {failed[0][0]}: "
                       f"{failed[0][1]}): pass shorter --data or a smaller --max_new_tokens")  # fmt: skip
    return outputs


@torch.inference_mode()
def forced(model, prompt, answer):
    """float32 logits (answer + 1, vocabulary) at the position of each token of an answer and of what follows it."""
    ids = torch.tensor([prompt + answer], device=model.device)
    return model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :].float().cpu().numpy()


def ask_adapter(model, tokenizer, stops, asked, max_new_tokens, folder):
    """The adapter's Outputs; its logits go to a folder, a file a question."""
    outputs = answers(model, tokenizer, stops, asked, max_new_tokens, "adapter")
    for number, (row, output) in enumerate(zip(asked, outputs, strict=True)):
        np.save(folder / f"{number}.npy", forced(model, row["prompt"], output.tokens))
    return outputs


def ask_merged(out, asked, outputs, stops, folder, args):
    """(what merged - adapter is, merged's Outputs): of the model in a folder, loaded anew."""
    tokenizer, own_stops = load_tokenizer(out)
    if other := [row["id"] for row in asked if rendered(tokenizer, row)[1] != row["prompt"]]:
        raise BadInput(f"the template in {out} renders {other[0]} otherwise than the adapter's: save the adapter again")
    model = load_model(str(out), tokenizer, getattr(torch, args.dtype), args.device)
    again = answers(model, tokenizer, own_stops, asked, args.max_new_tokens, "merged")
    largest, total, values, same, ends = 0.0, 0.0, 0, [], []
    for number, (row, output) in enumerate(zip(asked, outputs, strict=True)):
        first, second = np.load(folder / f"{number}.npy"), forced(model, row["prompt"], output.tokens)
        gap = np.abs(first - second)
        # a NaN would be lost in max()
        largest = float(np.maximum(largest, gap.max()))
        total, values = total + float(gap.sum(dtype=np.float64)), values + gap.size
        likely = first.argmax(1), second.argmax(1)
        same += (likely[0] == likely[1]).tolist()
        ends.append(bool(likely[0][-1] == likely[1][-1]) if int(likely[0][-1]) in stops else None)
    texts = [one.tokens == two.tokens and one.stopped == two.stopped for one, two in zip(outputs, again, strict=True)]
    found = {"max_logit_diff": largest, "mean_logit_diff": total / values}
    return found | {"top1": rate(same), "same_stop": rate(ends), "same_text": rate(texts)}, again


def split(text):
    """(reasoning, answer) of what a model wrote, as an endpoint reports them."""
    thought = text.partition("</think>")[0] if "<think>" in text else ""
    return thought.replace("<think>", "", 1).strip(), final_text(text)


def gguf(folder, args):
    """The GGUF file of a model, made in its folder by llama.cpp's converter, in the proof's type. Raises BadInput."""
    path, kind = folder / "model.gguf", {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[args.dtype]
    words = [args.engine_python, args.converter, folder, "--outfile", path, "--outtype", kind]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if done.returncode or not path.is_file():
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise BadInput(f"{args.converter} does not convert the merged model ({last}): see what it supports")
    return path


def ask_served(out, asked, again, tokenizer, args):
    """How the server of a folder compares with the merged model's own Outputs."""
    same, left_out, errors = {"same_prompt": [], "same_text": [], "same_end": []}, 0, []
    model = gguf(out, args) if args.engine == "llamacpp" else out
    with serving(args.engine, args.engine_python, model, args.device, args.dtype) as (url, name):
        for row, output in zip(asked, again, strict=True):
            if any(message.get("reasoning_content") or message.get("tool_calls") for message in row["messages"]):
                left_out += 1  # transformers serve drops reasoning, and text beside calls, from the history
                continue
            body = {"model": name, "messages": row["messages"], "temperature": 0, "max_tokens": args.max_new_tokens}
            body |= PLAIN[args.engine] | ({"tools": row["tools"]} if row["tools"] else {})
            try:
                reply = post(url, body | ({"chat_template_kwargs": row["kwargs"]} if row["kwargs"] else {}))
            except ServerError as error:  # transformers serve ends so where an answer's tool call does not parse
                errors.append(row["id"])
                if len(errors) > len(asked) // 10:
                    raise BadInput(f"{error}; first at prompt {errors[0]}, {len(errors)} times") from None
                continue
            choice, usage = reply["choices"][0], reply["usage"]
            said = choice["message"]
            same["same_prompt"].append(usage["prompt_tokens"] == len(row["prompt"]))
            if said.get("tool_calls"):  # taken apart by the server: their length is left to compare
                text = usage["completion_tokens"] == len(output.tokens) + output.stopped
            else:
                whole = tokenizer.decode(output.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                whole = "<think>" * row["text"].rstrip().endswith("<think>") + whole
                reasoning = said.get("reasoning_content") or ""
                for (
                    token
                ) in tokenizer.all_special_tokens:  # transformers serve leaves the stop in an unclosed think block
                    reasoning = reasoning.replace(token, "")
                given = reasoning.strip(), (said.get("content") or "").strip()
                text = given in (split(whole), ("", whole.strip()))  # the second: a server without a reasoning parser
            same["same_text"].append(text)
            stopped = output.stopped and len(output.tokens) + 1 < args.max_new_tokens  # on the last token: "length"
            same["same_end"].append((choice["finish_reason"] != "length") == stopped)
    if errors:
        print(f"the server failed on {len(errors)} of {len(asked)} prompts, which are left out: {', '.join(errors)}")
    counts = {"engine": args.engine, "left_out": left_out, "errors": errors}
    return counts | {key: rate(flags) for key, flags in same.items()}


def findings(merged, served, max_logit_diff, min_top1):
    """A sentence for each bound that is not kept."""
    found = []
    if merged and not merged["max_logit_diff"] <= max_logit_diff:  # a NaN is not
        found.append(f"logits of merged and adapter differ by {merged['max_logit_diff']:.3g}, more than "
                     f"--max_logit_diff {max_logit_diff:g}")  # fmt: skip
    keys = [("merged", merged, "top1"), ("merged", merged, "same_stop")]
    keys += [("served", served, key) for key in ("same_prompt", "same_text", "same_end")]
    for name, figures, key in keys:
        value = (figures or {}).get(key)
        if value and value["value"] < min_top1:
            found.append(f"{name}: {key} in {value['count']} of {value['total']}, less than --min_top1 {min_top1:g}")
    return found
