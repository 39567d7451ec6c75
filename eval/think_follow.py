"""ThinkFollow: does a model think when a turn says /think, and not when it says /no_think?

    python -m eval.think_follow runs/qwen3_full --data mt_bench_question.jsonl

Follows the description in the playbook of SmolLM3 (no code is published): conversations of several turns (Multi-IF's
there), each turn told /think or /no_think at random, the model's own answers as history. A think turn is followed by an
answer with a think block that is not empty, a no_think turn by one with an empty block or none. The draw depends on
--seed and the conversation's id alone. A model that never heeds the flag gets about one half: look at both modes.

    follow      turns that did as told; an answer that failed (memory, time, context, refused history) did not
    follow_all  conversations whose every turn did
    unfinished  turns whose think block was opened and never closed: what is there counts for follow
    empty       turns with nothing after the think block, or nothing at all
    stop_rate   turns ended by a stop token within the budget

Where the flag stands (--flag_in): `system`, at the end of the system message, which holds that of the turn to be
answered; `kwargs`, the template's enable_thinking; `user`, at the end of the turn's message. The default is what the
model's own template reacts to, in this order (SmolLM3's to the first, most hybrids' to the second), else `user`, which
is also the switch in the text that Qwen3 of April 2025 was trained on. Where the prompt itself holds the empty block of
no_think, follow says whether the model leaves it at that. Earlier answers stand in the history without their think
block, as the clients of a server send them.

--data: rows with `turns` (MT-Bench), with `turn_1_prompt` … (Multi-IF) or with `messages`, whose user turns are taken.
Groups: mode and turn. Writes think_follow.json and think_follow.jsonl to --out.
"""

import hashlib
import json
import random
import re
import sys
from contextlib import suppress
from pathlib import Path

from jinja2 import TemplateError

from data_prep.common.errors import UsageError
from eval.common.measure import clean_row, read_rows
from eval.common.models import Answer, add_model_arguments, ask, first_line, open_model, positive, render
from eval.common.scores import command, grouped, parser_of, rate, rates, show, write_scores

METRICS = {name: name for name in ("follow", "unfinished", "empty")} | {"stop_rate": "stopped"}
BLOCKS = (  # how families open and close a think block
    ("<think>", "</think>"),
    ("<|channel>thought", "<channel|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
FLAG = re.compile(r"\s*/(?:no_think|think)\b")


# -- think blocks -----------------------------------------------------------------------------------------------------


def thoughts(prompt, answer):
    """(thought, rest, unfinished) of an answer: what stands in its think blocks, what beside them, whether the last was
    never closed. A block that the prompt opens, or that is closed without having been opened, begins the answer."""
    for start, end in BLOCKS:
        opened = prompt.rstrip().endswith(start)
        before, found, _ = answer.partition(end)
        if opened or (found and start not in before):
            answer = start + answer
        if start in answer:
            parts = re.split(f"{re.escape(start)}(.*?)(?:{re.escape(end)}|$)", answer, flags=re.DOTALL)
            rest = "".join(parts[::2]).replace(end, "").strip()  # without ends that close nothing
            return "".join(parts[1::2]).strip(), rest, answer.rfind(start) > answer.rfind(end)
    return "", answer.strip(), False


# -- conversations ----------------------------------------------------------------------------------------------------


def conversation(row, number):
    """{id, system, turns} of a row: texts without flags of their own. Raises UsageError."""
    where, system = f"row {number} of the data", ""
    if not isinstance(row, dict):
        raise UsageError(f"{where} is not an object: pass rows with turns, turn_1_prompt or messages")
    if "turn_1_prompt" in row:  # before `turns`, where Multi-IF has room for a history
        told = [row.get(f"turn_{turn}_prompt") for turn in (1, 2, 3)]
        try:
            turns = [json.loads(text)["content"] for text in told if text not in (None, "", "None")]
        except (ValueError, TypeError, KeyError) as error:
            raise UsageError(
                f"{where} has a turn that is no message in JSON ({first_line(error)}): repair it"
            ) from None
    elif "turns" in row:
        turns = row["turns"]
    else:
        messages = clean_row(row, number)["messages"]
        system = messages[0].get("content", "") if messages[0]["role"] == "system" else ""
        turns = [message.get("content") for message in messages if message["role"] == "user"]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise UsageError(f"{where} has no turns, or one that is not text: pass the user's messages as strings")
    name = next((row[key] for key in ("id", "question_id", "key") if row.get(key) is not None), number)
    return {"id": str(name), "system": FLAG.sub("", system), "turns": [FLAG.sub("", turn) for turn in turns]}


def drawn(one, seed):
    """The mode of each turn of a conversation, whatever else is measured with it."""
    rng = random.Random(f"{seed} {one['id']}")
    return [rng.choice(("think", "no_think")) for _ in one["turns"]]


def place_of(tokenizer):
    """Where the tokenizer's template itself reads a flag: system, kwargs, or user where it reads none."""
    user = {"role": "user", "content": "Hi"}

    def after_system(flag):
        try:
            return render(tokenizer, [{"role": "system", "content": flag}, user])[0].rpartition("Hi")[2]
        except (TemplateError, TypeError, ValueError):
            return None

    if after_system("/think") != after_system("/no_think"):
        return "system"
    on, off = (render(tokenizer, [user], enable_thinking=think)[0] for think in (True, False))
    return "user" if on == off else "kwargs"


def prompt_of(tokenizer, one, answers, modes, place):
    """(text, ids) that ask for the turn after the given answers. Raises UsageError."""
    mode = modes[len(answers)]
    system = f"{one['system']} /{mode}".strip() if place == "system" else one["system"]
    messages = [{"role": "system", "content": system}] if system else []
    for k, turn in enumerate(one["turns"][: len(answers) + 1]):
        messages.append({"role": "user", "content": f"{turn} /{modes[k]}" if place == "user" else turn})
        messages += [{"role": "assistant", "content": answer} for answer in answers[k : k + 1]]
    try:
        return render(tokenizer, messages, **({"enable_thinking": mode == "think"} if place == "kwargs" else {}))
    except (TemplateError, TypeError, ValueError) as error:
        raise UsageError(
            f"the model's template refuses conversation {one['id']} ({first_line(error)}): leave it out, or pass "
            "another --flag_in"
        ) from None


# -- the command ------------------------------------------------------------------------------------------------------


def talk(model, tokenizer, stops, conversations, place, args):
    """Of each conversation a list of lines of think_follow.jsonl, one a turn. All conversations go on together."""
    modes = [drawn(one, args.seed) for one in conversations]
    said, lines = [[] for _ in conversations], [[] for _ in conversations]
    for turn in range(max(map(len, modes))):
        here = [i for i, one in enumerate(conversations) if turn < len(one["turns"])]
        prompts = {}
        for i in here:
            with suppress(*[UsageError] if turn else []):  # an earlier answer may hold what the template refuses
                prompts[i] = prompt_of(tokenizer, conversations[i], said[i], modes[i], place)
        ids, label = [ids for _, ids in prompts.values()], f"turn {turn + 1}"
        answers = ask(model, tokenizer, stops, ids, args.batch_size, args.max_new_tokens, label, args.timeout)
        answers = dict(zip(prompts, answers, strict=True))
        for i in here:
            prompt, answer = prompts.get(i, [""])[0], answers.get(i, Answer("", 0, False, "refused by the template"))
            thought, rest, unfinished = thoughts(prompt, answer.text)
            said[i].append(rest)
            line = {"id": conversations[i]["id"], "turn": turn + 1, "mode": modes[i][turn], "answer": answer.text}
            line |= {"failed": answer.failed, "thought": len(thought), "stopped": answer.stopped}
            line["follow"] = not answer.failed and bool(thought) == (modes[i][turn] == "think")
            lines[i].append(line | {"unfinished": unfinished, "empty": not rest})
    return lines


def measure_follow(args):
    rows = read_rows(args.data, args.split)
    conversations = [conversation(row, number) for number, row in enumerate(rows, 1)]
    if not conversations:
        raise UsageError(f"{args.data} holds no rows: pass a set with at least one conversation")
    if args.rows and args.rows < len(conversations):
        chosen = sorted(random.Random(args.seed).sample(range(len(conversations)), args.rows))
        conversations = [conversations[i] for i in chosen]
    digest = hashlib.sha256(json.dumps(conversations, sort_keys=True).encode()).hexdigest()
    model, tokenizer, stops = open_model(args.run, args.base, args.dtype, args.load_in_4bit)
    place = args.flag_in or place_of(tokenizer)
    talks = talk(model, tokenizer, stops, conversations, place, args)
    lines = [line for turns in talks for line in turns]
    metrics = rates(lines, METRICS)
    metrics["follow_all"] = rate([all(line["follow"] for line in turns) for turns in talks])
    settings = {"model": args.run.resolve().name, "data": args.data.resolve().name, "flag_in": place}
    settings |= {key: getattr(args, key) for key in ("rows", "seed", "max_new_tokens", "batch_size", "load_in_4bit")}
    out, groups = args.out or args.run / "eval", grouped(lines, METRICS, "mode", "turn")
    show(write_scores(out, "think_follow", settings, metrics, groups, lines, digest))
    print(f"the flag stood in: {place}")


def main(argv=None):
    parser = parser_of(__doc__)
    parser.add_argument("run", type=Path, help="run folder: a model with its tokenizer, or an adapter")
    parser.add_argument("--base", help="of an adapter (default: the one that it names)")
    parser.add_argument("--data", type=Path, required=True, help=".jsonl, .json or .parquet file, or dataset folder")
    parser.add_argument("--split", default="test", help="split of a dataset folder that has several")
    parser.add_argument("--flag_in", choices=["user", "system", "kwargs"], help="default: what the template reads")
    parser.add_argument("--rows", type=positive, help="so many conversations, drawn by --seed (default: all)")
    parser.add_argument("--seed", type=int, default=42, help="of the flags and of --rows")
    parser.add_argument("--out", type=Path, help="folder of the scores (default: eval/ in the run)")
    add_model_arguments(parser, max_new_tokens=1024)
    return command("think_follow.py", measure_follow, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
