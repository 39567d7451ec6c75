"""Produce the demo's rows: plain text to pre-train a tiny base on, and chats in six task groups to fine-tune it on.

    python -m data_prep.demo_rows --out runs/demo/rows

Writes OUT/pretrain.jsonl ({"text": str}), OUT/chat (dataset folder with train, validation, test), OUT/chat/test.jsonl
(the test split for eval) and OUT/report.json. Everything is made up here: words, people, prices, weather. Each group
draws from items (a word, two numbers, a person with a home, …) that are dealt to one split only, and text to pre-train
on uses the items of train alone.

The groups, after nanochat's SimpleSpelling and SpellingBee and the sample kinds of common SFT guides:
  spelling  letters of a word                         letters  how often a letter stands in a word, counted aloud
  sums      word problems of one step                 json     strict JSON, null for what the text does not say
  tools     call, tool reply, answer                  dialog   two turns, the second needs the first
One row is emitted for each answer, because chat_templates/qwen3.jinja trains the last answer of a row.

Exit 0: done. 2: bad input, one sentence.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import sys
from pathlib import Path

from data_prep.common.command_line import print_error
from data_prep.common.errors import UsageError
from data_prep.common.json_text import json_line
from data_prep.common.writer import write_rows

NAMES, CITIES, DAYS, SKIES, THINGS, COLORS, SHAPES, ONSETS = map(
    str.split,
    (
        "Ada Ben Cleo Dan Eva Finn Gus Hana Ida Jon Kim Leo Mia Noa Olga Pia Rui Sam Tom Uma Vera Wim Yan Zoe",
        "Bern Cairo Delhi Faro Graz Hanoi Kyoto Lima Lyon Malmo Oslo Paris Quito Rome Sofia Tunis Turin Zagreb",
        "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
        "sun rain snow fog wind",
        "pens cups hats books kites lamps rugs bells maps coins keys nuts",
        "red blue green black white brown",
        "round flat long small old wet",
        "b d f g k l m n p r s t v z",
    ),
)
AGES = range(2, 10)
CODAS = ("", "n", "r", "s", "l", "t", "m")
GROUPS = ("spelling", "letters", "sums", "json", "tools", "dialog")
SPLITS = ("train", "validation", "test")

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {key: {"type": kind} for key, kind in arguments.items()},
                "required": list(arguments),
            },
        },
    }
    for name, description, arguments in (
        ("weather", "Weather of a city on a day", {"city": "string", "day": "string"}),
        ("price", "Price of some things", {"thing": "string", "count": "integer"}),
    )
]


def deal(seed):
    """{kind: {split: [items]}}: every item of a kind goes to one split, 8 parts train to 1 validation and 1 test."""
    rng = random.Random(f"{seed} items")
    syllables = [onset + vowel for onset in ONSETS for vowel in "aeiou"]
    words = {rng.choice(syllables) + rng.choice(syllables) + rng.choice(CODAS) for _ in range(2400)}
    kinds = {
        "word": sorted(words),
        "pair": [(have, change) for have in range(5, 21) for change in range(1, 5)],
        "person": [(name, city) for name in NAMES for city in CITIES],
        "aged": [(name, age) for name in NAMES for age in AGES],
        "object": [(color, shape, thing) for color in COLORS for shape in SHAPES for thing in THINGS],
        "forecast": [(city, day) for city in CITIES for day in DAYS],
        "basket": [(thing, count) for thing in THINGS for count in range(2, 10)],
    }
    dealt = {}
    for kind, items in kinds.items():
        rng.shuffle(items)
        tenth = len(items) // 10
        dealt[kind] = {"test": items[:tenth], "validation": items[tenth : 2 * tenth], "train": items[2 * tenth :]}
        for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
            assert not set(dealt[kind][one]) & set(dealt[kind][other]), f"{kind}: {one} and {other} share an item"
    return dealt


# -- what the tasks are about; every function also serves the plain text of pre-training ------------------------------
def spelled(word):
    return ",".join(word)


def counted(word, letter):
    """("b,a=1,d,a=2", 2): the spelling with a running count behind each hit, as in nanochat's SpellingBee."""
    out, hits = [], 0
    for char in word:
        hits += char == letter
        out.append(f"{char}={hits}" if char == letter else char)
    return ",".join(out), hits


def pick_letter(rng, word):
    """Mostly a letter of the word, a repeated one where there is one; sometimes one that the word lacks."""
    roll = rng.random()
    if roll < 0.2:
        return rng.choice([char for char in "aeiounrst" if char not in word])
    repeated = [char for char in word if word.count(char) > 1]
    return rng.choice(repeated if repeated and roll < 0.7 else word)


def stepped(have, change):
    """("24=1,25=2", 25) for 23 and 2: counting up, or down where change is negative, with a count of the steps."""
    sign = 1 if change > 0 else -1
    return ",".join(f"{have + sign * step}={step}" for step in range(1, abs(change) + 1)), have + change


def problem(rng, pair):
    """A question of one step over two numbers, its working and its answer."""
    have, change = pair
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    if rng.random() < 0.5:
        story = rng.choice(["gets {} more", "buys {} more", "finds {} more"]).format(change)
    else:
        story, change = rng.choice(["loses {}", "sells {}", "gives away {}"]).format(change), -change
    working, answer = stepped(have, change)
    return f"{name} has {have} {thing} and {story}. How many {thing} now?", working, str(answer)


def passage(rng, split):
    """A sentence about a person and the facts in it, of which age or city may be missing."""
    left_out = rng.choice([None, None, None, "age", "city"])
    if left_out == "city":
        name, age = rng.choice(split["aged"])
        return rng.choice([f"{name} is {age} years old.", f"The age of {name} is {age}."]), {"name": name, "age": age}
    name, city = rng.choice(split["person"])
    if left_out == "age":
        return rng.choice([f"{name} lives in {city}.", f"The home of {name} is {city}."]), {"name": name, "city": city}
    age = rng.choice(AGES)
    text = rng.choice([f"{name} is {age} and lives in {city}.", f"{name} lives in {city} and is {age}."])
    return text, {"name": name, "age": age, "city": city}


def extraction(rng, split):
    """(text, fields, answer): the answer is strict JSON with null for a field that the text does not give, and an
    error object where the text is about no person at all."""
    fields = rng.sample(["name", "age", "city"], rng.choice([2, 3]))
    if rng.random() < 0.15:
        color, shape, thing = rng.choice(split["object"])
        return f"The {thing} are {color} and {shape}.", fields, {"error": "no person"}
    text, facts = passage(rng, split)
    return text, fields, {field: facts.get(field) for field in fields}


def tool_use(rng, split):
    """(question, call, reply, answer) of one of the two tools."""
    if rng.random() < 0.5:
        city, day = rng.choice(split["forecast"])
        sky, degrees = rng.choice(SKIES), rng.randrange(1, 10)
        question = rng.choice([f"What is the weather in {city} on {day}?", f"How will {day} be in {city}?"])
        call = {"name": "weather", "arguments": {"city": city, "day": day}}
        return question, call, {"sky": sky, "degrees": degrees}, f"{sky}, {degrees} degrees."
    thing, count = rng.choice(split["basket"])
    cost = count * rng.randrange(2, 9)
    question = rng.choice([f"What do {count} {thing} cost?", f"How much are {count} {thing}?"])
    call = {"name": "price", "arguments": {"thing": thing, "count": count}}
    return question, call, {"cost": cost}, f"They cost {cost}."


# -- chats ------------------------------------------------------------------------------------------------------------
def user(content):
    return {"role": "user", "content": content}


def assistant(content, reasoning=None, **more):
    return {"role": "assistant", "content": content, **({"reasoning_content": reasoning} if reasoning else {}), **more}


def worked(think, working, answer):
    """The working goes into the reasoning, or in front of the answer where there is none (GSM8K's #### form)."""
    return assistant(answer, working) if think else assistant(f"{working}\n#### {answer}")


def spelling(rng, split, think):
    word = rng.choice(split["word"])
    ask = rng.choice(["Spell the word: {}", "Spell {}", "How is {} spelled?"]).format(word)
    return [[user(ask), assistant(spelled(word), f"{len(word)} letters" if think else None)]], []


def letters(rng, split, think):
    word = rng.choice(split["word"])
    letter = pick_letter(rng, word)
    ask = rng.choice(["How many {l} are in the word {w}?", "Count the {l} in {w}"]).format(l=letter, w=word)
    working, hits = counted(word, letter)
    return [[user(ask), worked(think, working, str(hits))]], []


def sums(rng, split, think):
    question, working, answer = problem(rng, rng.choice(split["pair"]))
    return [[user(question), worked(think, working, answer)]], []


def strict_json(rng, split, think):
    text, fields, answer = extraction(rng, split)
    lacking = [field for field, value in answer.items() if value is None]
    found = "no person" if "error" in answer else f"{', '.join(lacking)} missing" if lacking else "all there"
    ask = rng.choice(["{t} JSON with {f}?", "Give {f} as JSON: {t}"]).format(t=text, f=", ".join(fields))
    tags = ["negative"] if "error" in answer or lacking else []
    return [[user(ask), assistant(json.dumps(answer), found if think else None)]], tags


def tools(rng, split, think):
    question, call, reply, answer = tool_use(rng, split)
    calling = assistant(
        "", f"use {call['name']}" if think else None, tool_calls=[{"type": "function", "function": call}]
    )
    turns = [user(question), calling, {"role": "tool", "name": call["name"], "content": json.dumps(reply)}]
    return [turns[:2], [*turns, assistant(answer, "tell the reply" if think else None)]], []


def dialog(rng, split, think):
    name, city = rng.choice(split["person"])
    hello = rng.choice(["I am {n} from {c}.", "My name is {n} and I live in {c}."]).format(n=name, c=city)
    ask, answer = rng.choice([("What is my name?", f"You are {name}."), ("Where do I live?", f"You live in {city}.")])
    first = [user(hello), assistant(f"Hello {name}, how is {city}?", "greet" if think else None)]
    # a served model sees earlier answers without their reasoning, and so does this history
    history = [first[0], assistant(first[1]["content"])]
    return [first, [*history, user(ask), assistant(answer, "look back" if think else None)]], []


BUILDERS = dict(zip(GROUPS, (spelling, letters, sums, strict_json, tools, dialog), strict=True))


def chats(rng, split, count):
    """About count rows over all groups, none twice; groups that answer twice give two rows for each draw."""
    rows, seen = [], set()
    for group, build in BUILDERS.items():
        made, tries = 0, 0
        # tools get half the rows of another group, because their prompts are ten times as long
        wanted = -(-count * (1 if group == "tools" else 2) // (2 * len(GROUPS) - 1))
        while made < wanted:
            tries += 1
            assert tries < 50 * count, f"{group}: too few different rows, lower --rows"
            think = rng.random() < 0.5
            answers, tags = build(rng, split, think)
            key = json.dumps([answers, think])
            if key in seen:
                continue
            seen.add(key)
            for turns in answers:
                kind = [group] if group in ("json", "tools") else []
                several = ["multi_turn"] if sum(turn["role"] == "user" for turn in turns) > 1 else []
                made += 1
                row = {"id": f"{group}-{made}", "messages": turns}
                row |= {"tools": rng.sample(TOOLS, len(TOOLS))} if group == "tools" else {}
                row |= {"chat_template_kwargs": {"enable_thinking": think}, "source": group}
                rows.append(row | {"tags": [*kind, *several, *tags, "think" if think else "no_think"], "lang": "en"})
    rng.shuffle(rows)
    return rows


# -- plain text -------------------------------------------------------------------------------------------------------
def as_text(turns):
    """A chat as questions and answers without markup: what it knows, not how a chat looks. Texts begin on their own
    line, as they do in a chat, so that they are the same tokens there."""
    out = []
    for turn in turns:
        out += [f"Thought:\n{turn['reasoning_content']}"] if turn.get("reasoning_content") else []
        if calls := turn.get("tool_calls"):
            out.append(f"Call:\n{json.dumps(calls[0]['function'])}")
        else:
            out.append({"user": "Q", "assistant": "A", "tool": "Reply"}[turn["role"]] + f":\n{turn['content']}")
    return "\n".join(out)


def plain(rng, split):
    """One document: questions and answers, or a list of spelled words, counted letters or steps between numbers."""
    kind = rng.choices(["questions", "words", "counts", "steps"], [10, 1, 1, 1])[0]
    if kind == "questions":
        build = rng.choices(list(BUILDERS.values()), [2, 2, 2, 3, 2, 2])[0]  # copying names into JSON is learnt last
        return as_text(build(rng, split, rng.random() < 0.5)[0][-1])
    if kind == "words":
        return "\n".join(f"{word}: {spelled(word)}" for word in rng.sample(split["word"], 4))
    if kind == "counts":
        drawn = [(word, pick_letter(rng, word)) for word in rng.sample(split["word"], 4)]
        return "\n".join(f"{letter} in {word}: {counted(word, letter)[0]}" for word, letter in drawn)
    drawn = [(have, change * rng.choice((1, -1))) for have, change in rng.sample(split["pair"], 4)]
    return "\n".join(f"{have}{change:+}: {stepped(have, change)[0]}" for have, change in drawn)


def small_talk(rng, split):
    """The only chat markup in pre-training: greetings, so that the embeddings of the control tokens, which QLoRA
    freezes, are not noise. Thinking and tools appear as gestures."""
    name, city = rng.choice(split["person"])
    hello, answer = rng.choice(
        [
            (f"Hello! It is {name}.", f"Hello {name}!"),
            (f"{name} from {city} is here.", f"Welcome {name} from {city}!"),
            (f"Bye from {city}!", f"Bye, {city}!"),
            ("How are you?", "Fine, thanks."),
        ]
    )
    turns = [("system", "Be kind.")] if rng.random() < 0.2 else []
    turns.append(("user", hello))
    if rng.random() < 0.25:
        call = json.dumps({"name": "wave", "arguments": {"to": name}})
        turns += [
            ("assistant", f"<tool_call>\n{call}\n</tool_call>"),
            ("user", f"<tool_response>\n{json.dumps({'waved': name})}\n</tool_response>"),
        ]
    if rng.random() < 0.7:
        answer = f"<think>\n{rng.choice(['', 'be kind'])}\n</think>\n\n{answer}"
    turns.append(("assistant", answer))
    return "\n".join(f"<|im_start|>{role}\n{content}<|im_end|>" for role, content in turns)


def tool_sheet(rng):
    """The tools' descriptions as a document, so that the tokenizer has words for them."""
    return "# Tools\n\n" + "\n".join(json.dumps(tool) for tool in rng.sample(TOOLS, len(TOOLS)))


def pretrain(rng, split, count):
    makers = [lambda: plain(rng, split), lambda: small_talk(rng, split), lambda: tool_sheet(rng)]
    return [{"text": rng.choices(makers, [86, 13, 1])[0]()} for _ in range(count)]


# -- main -------------------------------------------------------------------------------------------------------------
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, help="folder that does not exist yet")
    parser.add_argument(
        "--rows", type=int, default=4500, help="chat rows to train on; validation, test and text follow"
    )
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    if args.out.exists():
        return print_error(f"{args.out}: exists already: remove it or pass another --out")
    if not 60 <= args.rows <= 20000:
        return print_error(f"--rows {args.rows}: the items are enough for 60 to 20000 rows, pass a number between")

    dealt = deal(args.seed)
    pools = {split: {kind: parts[split] for kind, parts in dealt.items()} for split in SPLITS}
    counts = {"train": args.rows, "validation": max(30, args.rows // 30), "test": max(30, args.rows // 18)}
    splits = {
        split: [
            row | {"id": f"{split}-{row['id']}"}
            for row in chats(random.Random(f"{args.seed} {split}"), pools[split], counts[split])
        ]
        for split in SPLITS
    }
    texts = pretrain(random.Random(f"{args.seed} text"), pools["train"], 9 * args.rows)
    prompts = {split: {json.dumps(row["messages"][:-1]) for row in splits[split]} for split in SPLITS}
    held_out = prompts["validation"] | prompts["test"]
    assert not prompts["train"] & held_out, "a held-out conversation is in train"

    text = "".join(map(json_line, texts))
    aside = args.out.with_name(f".{args.out.name}.{os.getpid()}.part")
    try:
        aside.mkdir(parents=True)
        test = "".join(map(json_line, splits["test"]))
        report = write_rows(aside / "chat", "demo_rows.py", splits, seed=args.seed, extra={"test.jsonl": test})
        (aside / "pretrain.jsonl").write_text(text, encoding="utf-8", newline="\n")
        report["output"]["pretrain"] = hashlib.sha256(text.encode()).hexdigest()
        report["out"]["pretrain"] = len(texts)
        (aside / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8", newline="\n")
        aside.rename(args.out)
    except (OSError, UsageError) as error:
        return print_error(f"{args.out}: not written ({error}): make room or pass another --out")
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(f"{args.out}: {len(texts):,} texts, " + ", ".join(f"{len(rows):,} {split}" for split, rows in splits.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
