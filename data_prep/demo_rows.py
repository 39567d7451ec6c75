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
import sys
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from random import Random

from data_prep.common.command_line import make_parser, run_command
from data_prep.common.errors import UsageError
from data_prep.common.json_text import json_line
from data_prep.common.rows import Message
from data_prep.common.writer import format_json, staged_folder, write_rows, write_utf8


def words(text: str) -> list[str]:
    return text.split()


NAMES = words("Ada Ben Cleo Dan Eva Finn Gus Hana Ida Jon Kim Leo Mia Noa Olga Pia Rui Sam Tom Uma Vera Wim Yan Zoe")
CITIES = words("Bern Cairo Delhi Faro Graz Hanoi Kyoto Lima Lyon Malmo Oslo Paris Quito Rome Sofia Tunis Turin Zagreb")
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
SKIES = words("sun rain snow fog wind")
THINGS = words("pens cups hats books kites lamps rugs bells maps coins keys nuts")
COLORS = words("red blue green black white brown")
SHAPES = words("round flat long small old wet")
AGES = range(2, 10)
ONSETS = "bdfgklmnprstvz"
VOWELS = "aeiou"
CODAS = ("", "n", "r", "s", "l", "t", "m")
SPLITS = ("train", "validation", "test")


def make_tool(name: str, description: str, arguments: dict[str, str]) -> dict:
    properties = {key: {"type": kind} for key, kind in arguments.items()}
    parameters = {"type": "object", "properties": properties, "required": list(arguments)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = [
    make_tool("weather", "Weather of a city on a day", {"city": "string", "day": "string"}),
    make_tool("price", "Price of some things", {"thing": "string", "count": "integer"}),
]


@dataclass
class Items:
    """What the rows of one split are about. No other split has any of them."""

    words: list[str]
    changes: list[tuple[int, int]]  # a number and what it grows or shrinks by
    homes: list[tuple[str, str]]  # name, city
    ages: list[tuple[str, int]]  # name, age
    objects: list[tuple[str, str, str]]  # color, shape, thing
    forecasts: list[tuple[str, str]]  # city, day
    baskets: list[tuple[str, int]]  # thing, count


def deal_items(seed: int) -> dict[str, Items]:
    """Return {split: Items}: of every kind 8 parts go to train, 1 to validation, 1 to test."""
    rng = Random(f"{seed} items")
    syllables = [onset + vowel for onset in ONSETS for vowel in VOWELS]
    words = set()
    for _ in range(2400):
        words.add(rng.choice(syllables) + rng.choice(syllables) + rng.choice(CODAS))
    kinds = {
        "words": sorted(words),
        "changes": list(product(range(5, 21), range(1, 5))),
        "homes": list(product(NAMES, CITIES)),
        "ages": list(product(NAMES, AGES)),
        "objects": list(product(COLORS, SHAPES, THINGS)),
        "forecasts": list(product(CITIES, DAYS)),
        "baskets": list(product(THINGS, range(2, 10))),
    }
    parts: dict[str, dict[str, list]] = {split: {} for split in SPLITS}
    for kind, items in kinds.items():
        assert len(set(items)) == len(items), f"{kind}: an item twice, which two splits would share"
        rng.shuffle(items)
        tenth = len(items) // 10
        parts["test"][kind] = items[:tenth]
        parts["validation"][kind] = items[tenth : 2 * tenth]
        parts["train"][kind] = items[2 * tenth :]
    return {split: Items(**kinds) for split, kinds in parts.items()}


# -- what the tasks are about, in chats and in the plain text of pre-training -----------------------------------------
def spell(word: str) -> str:
    return ",".join(word)


def count_aloud(word: str, letter: str) -> tuple[str, int]:
    """Return ("b,a=1,d,a=2", 2): the spelling with a running count behind each hit, as in nanochat's SpellingBee."""
    parts = []
    hits = 0
    for char in word:
        if char == letter:
            hits += 1
            parts.append(f"{char}={hits}")
        else:
            parts.append(char)
    return ",".join(parts), hits


def pick_letter(rng: Random, word: str) -> str:
    """Draw mostly a letter of the word, a repeated one where there is one; sometimes one that the word lacks."""
    roll = rng.random()
    if roll < 0.2:
        return rng.choice([char for char in "aeiounrst" if char not in word])
    repeated = [char for char in word if word.count(char) > 1]
    if repeated and roll < 0.7:
        return rng.choice(repeated)
    return rng.choice(word)


def step_aloud(number: int, change: int) -> tuple[str, int]:
    """Return ("24=1,25=2", 25) for 23 and 2: counting up, or down where change is negative, with the steps counted."""
    direction = 1 if change > 0 else -1
    steps = [f"{number + direction * step}={step}" for step in range(1, abs(change) + 1)]
    return ",".join(steps), number + change


def describe_person(rng: Random, items: Items) -> tuple[str, dict]:
    """Return a sentence about a person and the facts in it, of which age or city may be missing."""
    missing = rng.choice([None, None, None, "age", "city"])
    if missing == "city":
        name, age = rng.choice(items.ages)
        text = rng.choice([f"{name} is {age} years old.", f"The age of {name} is {age}."])
        return text, {"name": name, "age": age}
    name, city = rng.choice(items.homes)
    if missing == "age":
        text = rng.choice([f"{name} lives in {city}.", f"The home of {name} is {city}."])
        return text, {"name": name, "city": city}
    age = rng.choice(AGES)
    text = rng.choice([f"{name} is {age} and lives in {city}.", f"{name} lives in {city} and is {age}."])
    return text, {"name": name, "age": age, "city": city}


# -- chats ------------------------------------------------------------------------------------------------------------
@dataclass
class Sample:
    """What a group draws: conversations, each of which ends with the answer to train, and tags of their rows."""

    conversations: list[list[Message]]
    tags: list[str] = field(default_factory=list)


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str, reasoning: str | None = None) -> Message:
    turn = {"role": "assistant", "content": content}
    if reasoning:
        turn["reasoning_content"] = reasoning
    return turn


def assistant_with_working(working: str, answer: str, think: bool) -> Message:
    """Return an answer with its working in the reasoning, or in front of it where there is none (GSM8K's form)."""
    if think:
        return assistant(answer, working)
    return assistant(f"{working}\n#### {answer}")


def draw_spelling(rng: Random, items: Items, think: bool) -> Sample:
    word = rng.choice(items.words)
    question = rng.choice(["Spell the word: {}", "Spell {}", "How is {} spelled?"]).format(word)
    reasoning = f"{len(word)} letters" if think else None
    return Sample([[user(question), assistant(spell(word), reasoning)]])


def draw_letters(rng: Random, items: Items, think: bool) -> Sample:
    word = rng.choice(items.words)
    letter = pick_letter(rng, word)
    question = rng.choice([f"How many {letter} are in the word {word}?", f"Count the {letter} in {word}"])
    working, hits = count_aloud(word, letter)
    return Sample([[user(question), assistant_with_working(working, str(hits), think)]])


def draw_sums(rng: Random, items: Items, think: bool) -> Sample:
    """Draw a word problem of one step over two numbers."""
    number, change = rng.choice(items.changes)
    name = rng.choice(NAMES)
    thing = rng.choice(THINGS)
    if rng.random() < 0.5:
        story = rng.choice(["gets {} more", "buys {} more", "finds {} more"]).format(change)
    else:
        story = rng.choice(["loses {}", "sells {}", "gives away {}"]).format(change)
        change = -change
    question = f"{name} has {number} {thing} and {story}. How many {thing} now?"
    working, answer = step_aloud(number, change)
    return Sample([[user(question), assistant_with_working(working, str(answer), think)]])


def draw_json(rng: Random, items: Items, think: bool) -> Sample:
    """Draw fields to read from a text: null for one that it does not state, an error where it is about no person."""
    fields = rng.sample(["name", "age", "city"], rng.choice([2, 3]))
    if rng.random() < 0.15:
        color, shape, thing = rng.choice(items.objects)
        text = f"The {thing} are {color} and {shape}."
        answer = {"error": "no person"}
        reasoning = "no person"
    else:
        text, facts = describe_person(rng, items)
        answer = {name: facts.get(name) for name in fields}
        missing = [name for name in fields if name not in facts]
        reasoning = ", ".join(missing) + " missing" if missing else "all there"
    listed = ", ".join(fields)
    question = rng.choice([f"{text} JSON with {listed}?", f"Give {listed} as JSON: {text}"])
    turns = [user(question), assistant(json.dumps(answer), reasoning if think else None)]
    return Sample([turns], [] if reasoning == "all there" else ["negative"])


def draw_tools(rng: Random, items: Items, think: bool) -> Sample:
    if rng.random() < 0.5:
        city, day = rng.choice(items.forecasts)
        sky = rng.choice(SKIES)
        degrees = rng.randrange(1, 10)
        question = rng.choice([f"What is the weather in {city} on {day}?", f"How will {day} be in {city}?"])
        function = {"name": "weather", "arguments": {"city": city, "day": day}}
        result = {"sky": sky, "degrees": degrees}
        answer = f"{sky}, {degrees} degrees."
    else:
        thing, count = rng.choice(items.baskets)
        cost = count * rng.randrange(2, 9)
        question = rng.choice([f"What do {count} {thing} cost?", f"How much are {count} {thing}?"])
        function = {"name": "price", "arguments": {"thing": thing, "count": count}}
        result = {"cost": cost}
        answer = f"They cost {cost}."
    name = function["name"]
    call = assistant("", f"use {name}" if think else None)
    call["tool_calls"] = [{"type": "function", "function": function}]
    reply = {"role": "tool", "name": name, "content": json.dumps(result)}
    first = [user(question), call]
    return Sample([first, [*first, reply, assistant(answer, "tell the reply" if think else None)]])


def draw_dialog(rng: Random, items: Items, think: bool) -> Sample:
    name, city = rng.choice(items.homes)
    hello = user(rng.choice([f"I am {name} from {city}.", f"My name is {name} and I live in {city}."]))
    greeting = f"Hello {name}, how is {city}?"
    question, answer = rng.choice(
        [("What is my name?", f"You are {name}."), ("Where do I live?", f"You live in {city}.")]
    )
    first = [hello, assistant(greeting, "greet" if think else None)]
    # a served model sees earlier answers without their reasoning, and so does this history
    second = [hello, assistant(greeting), user(question), assistant(answer, "look back" if think else None)]
    return Sample([first, second])


BUILDERS = {
    "spelling": draw_spelling,
    "letters": draw_letters,
    "sums": draw_sums,
    "json": draw_json,
    "tools": draw_tools,
    "dialog": draw_dialog,
}


def make_chats(split: str, items: Items, count: int, seed: int) -> list[dict]:
    """Return about count rows over all groups, none twice; a group that answers twice makes two rows of each draw."""
    rng = Random(f"{seed} {split}")
    rows = []
    seen = set()
    for group, draw in BUILDERS.items():
        # tools get half the rows of another group, because their prompts are ten times as long
        share = 1 if group == "tools" else 2
        wanted = -(-count * share // (2 * len(BUILDERS) - 1))  # rounded up
        made = 0
        tries = 0
        while made < wanted:
            tries += 1
            assert tries < 50 * count, f"{group}: too few different rows, lower --rows"
            think = rng.random() < 0.5
            sample = draw(rng, items, think)
            key = json.dumps([sample.conversations, think])
            if key in seen:
                continue
            seen.add(key)
            for turns in sample.conversations:
                made += 1
                row = {"id": f"{split}-{group}-{made}", "messages": turns}
                if group == "tools":
                    row["tools"] = rng.sample(TOOLS, len(TOOLS))
                row["chat_template_kwargs"] = {"enable_thinking": think}
                row["source"] = group
                row["tags"] = make_tags(group, turns, sample, think)
                row["lang"] = "en"
                rows.append(row)
    rng.shuffle(rows)
    return rows


def make_tags(group: str, turns: list[Message], sample: Sample, think: bool) -> list[str]:
    tags = []
    if group in ("json", "tools"):
        tags.append(group)
    if [turn["role"] for turn in turns].count("user") > 1:
        tags.append("multi_turn")
    return [*tags, *sample.tags, "think" if think else "no_think"]


# -- plain text -------------------------------------------------------------------------------------------------------
TITLES = {"user": "Q", "assistant": "A", "tool": "Reply"}


def as_text(turns: list[Message]) -> str:
    """Return a chat as questions and answers without markup: what it knows, not how a chat looks. Texts begin on their
    own line, as they do in a chat, so that they are the same tokens there."""
    parts = []
    for turn in turns:
        if turn.get("reasoning_content"):
            parts.append(f"Thought:\n{turn['reasoning_content']}")
        if turn.get("tool_calls"):
            call = turn["tool_calls"][0]["function"]
            parts.append(f"Call:\n{json.dumps(call)}")
        else:
            parts.append(f"{TITLES[turn['role']]}:\n{turn['content']}")
    return "\n".join(parts)


def make_plain_text(rng: Random, items: Items) -> str:
    """Return a document: questions and answers, or a list of spelled words, counted letters or steps of numbers."""
    kind = rng.choices(["questions", "words", "counts", "steps"], [10, 1, 1, 1])[0]
    lines = []
    if kind == "questions":
        draw = rng.choices(list(BUILDERS.values()), [2, 2, 2, 3, 2, 2])[0]  # copying names into JSON is learnt last
        sample = draw(rng, items, rng.random() < 0.5)
        return as_text(sample.conversations[-1])
    if kind == "steps":
        for number, change in rng.sample(items.changes, 4):
            change *= rng.choice((1, -1))
            lines.append(f"{number}{change:+}: {step_aloud(number, change)[0]}")
        return "\n".join(lines)
    for word in rng.sample(items.words, 4):
        if kind == "words":
            lines.append(f"{word}: {spell(word)}")
        else:
            letter = pick_letter(rng, word)
            lines.append(f"{letter} in {word}: {count_aloud(word, letter)[0]}")
    return "\n".join(lines)


def make_small_talk(rng: Random, items: Items) -> str:
    """Return a greeting, the only chat markup in pre-training: so that the embeddings of the control tokens, which
    QLoRA freezes, are not noise. Thinking and tools appear as gestures."""
    name, city = rng.choice(items.homes)
    hello, answer = rng.choice(
        [
            (f"Hello! It is {name}.", f"Hello {name}!"),
            (f"{name} from {city} is here.", f"Welcome {name} from {city}!"),
            (f"Bye from {city}!", f"Bye, {city}!"),
            ("How are you?", "Fine, thanks."),
        ]
    )
    turns = []
    if rng.random() < 0.2:
        turns.append(("system", "Be kind."))
    turns.append(("user", hello))
    if rng.random() < 0.25:
        call = json.dumps({"name": "wave", "arguments": {"to": name}})
        reply = json.dumps({"waved": name})
        turns.append(("assistant", f"<tool_call>\n{call}\n</tool_call>"))
        turns.append(("user", f"<tool_response>\n{reply}\n</tool_response>"))
    if rng.random() < 0.7:
        thought = rng.choice(["", "be kind"])
        answer = f"<think>\n{thought}\n</think>\n\n{answer}"
    turns.append(("assistant", answer))
    return "\n".join([f"<|im_start|>{role}\n{content}<|im_end|>" for role, content in turns])


def make_tool_sheet(rng: Random, items: Items) -> str:
    """Return the tools' descriptions as a document, so that the tokenizer has words for them."""
    return "# Tools\n\n" + "\n".join([json.dumps(tool) for tool in rng.sample(TOOLS, len(TOOLS))])


def make_texts(items: Items, count: int, seed: int) -> list[dict]:
    rng = Random(f"{seed} text")
    rows = []
    for _ in range(count):
        make_text = rng.choices([make_plain_text, make_small_talk, make_tool_sheet], [86, 13, 1])[0]
        rows.append({"text": make_text(rng, items)})
    return rows


# -- the command ------------------------------------------------------------------------------------------------------
def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder that does not exist yet")
    parser.add_argument("--rows", type=int, default=4500, help="chat rows to train on; other splits and text follow")
    parser.add_argument("--seed", type=int, default=42)
    return run_command(parser, run)


def run(args: argparse.Namespace) -> int:
    """Return the exit code. Raises UsageError."""
    if not 60 <= args.rows <= 20000:
        raise UsageError(f"--rows {args.rows}: the items are enough for 60 to 20000 rows, pass a number between")
    with staged_folder(args.out) as folder:
        items = deal_items(args.seed)
        counts = {"train": args.rows, "validation": max(30, args.rows // 30), "test": max(30, args.rows // 18)}
        splits = {split: make_chats(split, items[split], count, args.seed) for split, count in counts.items()}
        check_prompts(splits)
        texts = make_texts(items["train"], 9 * args.rows, args.seed)
        write_demo(folder, splits, texts, args.seed)
    sizes = ", ".join([f"{len(rows):,} {split}" for split, rows in splits.items()])
    print(f"{args.out}: {len(texts):,} texts, {sizes}")
    return 0


def check_prompts(splits: dict[str, list[dict]]) -> None:
    prompts = {split: {json.dumps(row["messages"][:-1]) for row in rows} for split, rows in splits.items()}
    for split in ("validation", "test"):
        assert not prompts["train"] & prompts[split], f"a conversation of {split} is in train"


def write_demo(folder: Path, splits: dict[str, list[dict]], texts: list[dict], seed: int) -> None:
    test = "".join([json_line(row) for row in splits["test"]])
    report = write_rows(folder / "chat", "demo_rows.py", splits, seed=seed, extra={"test.jsonl": test})
    text = "".join([json_line(row) for row in texts])
    write_utf8(folder / "pretrain.jsonl", text)
    report["output"]["pretrain"] = hashlib.sha256(text.encode()).hexdigest()
    report["out"]["pretrain"] = len(texts)
    write_utf8(folder / "report.json", format_json(report))


if __name__ == "__main__":
    sys.exit(main())
