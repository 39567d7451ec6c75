"""The round trip of a merge: does the merged model, and the server of it, answer as the adapter did?

    python -m eval.merge runs/qwen3_qlora --out models/mine

No command of its own; merge.py's docstring defines what is compared. One model is in memory at a time: the adapter's
logits wait on the disk (positions x vocabulary x 4 bytes; 50 answers of 32 tokens, 151,936 entries of Qwen3: 1 GB).
"""

import json
import re
import subprocess

import numpy as np
import torch
from jinja2 import TemplateError

from data_prep.common.errors import UsageError
from eval.common.measure import clean_row, read_rows
from eval.common.metrics import final_text
from eval.common.models import fill_of, generate, load_model, load_tokenizer, render
from eval.common.scores import rate
from eval.endpoint import NEUTRAL, ServerError, post, serving

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
# what an engine is asked besides: no penalty; the log-probability of each token, which transformers serve does not
# give; calls and thoughts left in the text as the model wrote them (of vLLM they are, without its parsers)
PLAIN = {
    "transformers": {"frequency_penalty": 0},
    "vllm": {"repetition_penalty": 1.0, "logprobs": True, "tool_choice": "none"},
    "llamacpp": {"repeat_penalty": 1.0, "logprobs": True, "tool_choice": "none", "reasoning_format": "none"},
}


def rendered(tokenizer, row):
    return render(tokenizer, row["messages"], True, row["tools"], **row["kwargs"])


def questions(data, split, count, tokenizer, room):
    """(rows to ask, how many cannot be): the prompts of the data's last answers, at most room tokens, else neutral
    ones; each {id, messages, tools, kwargs, text, prompt (ids)}. Raises UsageError."""
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
        raise UsageError(f"{data or 'the neutral prompts'}: none of {refused} can be asked: pass other --data")
    return asked, refused


def answers(model, tokenizer, stops, asked, max_new_tokens, label):
    """The models.Output of each question, one at a time as a server has them: no padding in the numbers."""
    prompts = [row["prompt"] for row in asked]
    outputs = generate(model, prompts, stops, 1, fill_of(tokenizer, stops), max_new_tokens, label)
    if failed := [(row["id"], output.failed) for row, output in zip(asked, outputs, strict=True) if output.failed]:
        raise UsageError(f"the {label} model failed on {len(failed)} prompts (the first is {failed[0][0]}: "
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
    """(what merged - adapter is, merged's Outputs, the log-probability of each of their tokens): of the model in a
    folder, loaded anew."""
    tokenizer, own_stops = load_tokenizer(out)
    if other := [row["id"] for row in asked if rendered(tokenizer, row)[1] != row["prompt"]]:
        raise UsageError(
            f"the template in {out} renders {other[0]} otherwise than the adapter's: save the adapter again"
        )
    model = load_model(str(out), tokenizer, getattr(torch, args.dtype), args.device)
    again = answers(model, tokenizer, own_stops, asked, args.max_new_tokens, "merged")
    largest, total, values, same, ends, chosen = 0.0, 0.0, 0, [], [], []
    for number, (row, output, own) in enumerate(zip(asked, outputs, again, strict=True)):
        first, second = np.load(folder / f"{number}.npy"), forced(model, row["prompt"], output.tokens)
        gap = np.abs(first - second)
        # a NaN would be lost in max()
        largest = float(np.maximum(largest, gap.max()))
        total, values = total + float(gap.sum(dtype=np.float64)), values + gap.size
        likely = first.argmax(1), second.argmax(1)
        same += (likely[0] == likely[1]).tolist()
        ends.append(bool(likely[0][-1] == likely[1][-1]) if int(likely[0][-1]) in stops else None)
        logits = second if own.tokens == output.tokens else forced(model, row["prompt"], own.tokens)
        said = torch.tensor(logits[: len(own.tokens)]).log_softmax(1)
        chosen.append(said.gather(1, torch.tensor(own.tokens, dtype=torch.long)[:, None])[:, 0].tolist())
    texts = [one.tokens == two.tokens and one.stopped == two.stopped for one, two in zip(outputs, again, strict=True)]
    found = {"max_logit_diff": largest, "mean_logit_diff": total / values}
    return found | {"top1": rate(same), "same_stop": rate(ends), "same_text": rate(texts)}, again, chosen


def split(text):
    """(reasoning, answer) of what a model wrote, as an endpoint reports them."""
    thought = text.partition("</think>")[0] if "<think>" in text else ""
    return thought.replace("<think>", "", 1).strip(), final_text(text)


def gguf(folder, args):
    """The GGUF file of a model, made in its folder by llama.cpp's converter, in the proof's type. Raises UsageError."""
    path, kind = folder / "model.gguf", {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[args.dtype]
    words = [args.engine_python, args.converter, folder, "--outfile", path, "--outtype", kind]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if done.returncode or not path.is_file():
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UsageError(f"{args.converter} does not convert the merged model ({last}): see what it supports")
    return path


def sent(messages):
    """Messages as OpenAI's form has them: a call's arguments are a string of JSON, and calls and replies have ids."""
    messages, open_calls, count = json.loads(json.dumps(messages)), [], 0
    for message in messages:
        for call in message.get("tool_calls") or []:
            call |= {"type": "function", "id": call.get("id") or f"call{count:05}"}  # nine letters, as Mistral has them
            if not isinstance(call["function"]["arguments"], str):
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
            open_calls, count = [*open_calls, call["id"]], count + 1
        if message["role"] == "tool" and open_calls:
            message["tool_call_id"] = message.get("tool_call_id") or open_calls[0]
            open_calls.pop(0)
    return messages


def ask_served(out, asked, again, chosen, tokenizer, args):
    """How the server of a folder compares with the merged model's own Outputs and their log-probabilities."""
    same, left_out, errors, gaps = {"same_prompt": [], "same_text": [], "same_end": []}, 0, [], []
    llama = args.engine == "llamacpp"
    model, program = (gguf(out, args), args.llama_server) if llama else (out, args.engine_python)
    with serving(args.engine, program, model, args.device, args.dtype) as (url, name):
        for row, output, logprobs in zip(asked, again, chosen, strict=True):
            history = any(message.get("reasoning_content") or message.get("tool_calls") for message in row["messages"])
            if history and args.engine == "transformers":  # which drops reasoning, and text beside calls
                left_out += 1
                continue
            body = {"model": name, "messages": sent(row["messages"]), "temperature": 0}
            body |= {"max_tokens": args.max_new_tokens} | PLAIN[args.engine]
            if row["tools"]:
                body["tools"] = row["tools"]
            try:
                reply = post(url, body | ({"chat_template_kwargs": row["kwargs"]} if row["kwargs"] else {}))
            except ServerError as error:  # transformers serve ends so where an answer's tool call does not parse
                errors.append(row["id"])
                if len(errors) > len(asked) // 10:
                    raise UsageError(f"{error}; first at prompt {errors[0]}, {len(errors)} times") from None
                continue
            choice, usage = reply["choices"][0], reply["usage"]
            said = choice["message"]
            same["same_prompt"].append(usage["prompt_tokens"] == len(row["prompt"]))
            if said.get("tool_calls"):  # taken apart by the server: their length is left to compare
                text = usage["completion_tokens"] == len(output.tokens) + output.stopped
            else:
                text = same_words(said, row, output, tokenizer)
            same["same_text"].append(text)
            if text:  # else the tokens are others
                theirs = [token["logprob"] for token in (choice.get("logprobs") or {}).get("content") or []]
                gaps += [abs(one - two) for one, two in zip(theirs, logprobs, strict=False)]  # the stop may be there
            stopped = output.stopped and len(output.tokens) + 1 < args.max_new_tokens  # on the last token: "length"
            same["same_end"].append((choice["finish_reason"] != "length") == stopped)
    if errors:
        print(f"the server failed on {len(errors)} of {len(asked)} prompts, which are left out: {', '.join(errors)}")
    figures = {"engine": args.engine, "left_out": left_out, "errors": errors}
    figures |= {key: rate(flags) for key, flags in same.items()}
    return figures | ({"max_logprob_diff": float(np.max(gaps)), "logprobs": len(gaps)} if gaps else {})


def same_words(said, row, output, tokenizer):
    """Whether a message of the server is the text of an Output, its thoughts apart or not."""
    plain = tokenizer.decode(output.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    whole = "<think>" * row["text"].rstrip().endswith("<think>") + plain
    reasoning = said.get("reasoning_content") or ""
    for token in tokenizer.all_special_tokens:  # transformers serve leaves the stop in an unclosed think block
        reasoning = reasoning.replace(token, "")
    given = reasoning.strip(), (said.get("content") or "").strip()
    # the others: a server without a reasoning parser, which may take a <think> of the prompt for the answer's own;
    # llama.cpp, told to leave thoughts in the text, begins it with the empty block that ends a prompt
    closed = re.search(r"<think>\s*</think>\s*$", row["text"])
    begun = [("", (closed[0] + plain).strip())] if closed else []
    return given in (split(whole), ("", whole.strip()), ("", plain.strip()), *begun)


def findings(merged, served, max_logit_diff, min_top1):
    """A sentence for each bound that is not kept."""
    found = []
    if merged and not merged["max_logit_diff"] <= max_logit_diff:  # a NaN is not
        found.append(f"logits of merged and adapter differ by {merged['max_logit_diff']:.3g}, more than "
                     f"--max_logit_diff {max_logit_diff:g}")  # fmt: skip
    gap = (served or {}).get("max_logprob_diff")
    if gap is not None and not gap <= max_logit_diff:
        found.append(f"served: log-probabilities differ by {gap:.3g}, more than --max_logit_diff {max_logit_diff:g}")
    keys = [("merged", merged, "top1"), ("merged", merged, "same_stop")]
    keys += [("served", served, key) for key in ("same_prompt", "same_text", "same_end")]
    for name, figures, key in keys:
        value = (figures or {}).get(key)
        if value and value["value"] < min_top1:
            found.append(f"{name}: {key} in {value['count']} of {value['total']}, less than --min_top1 {min_top1:g}")
    return found
