"""The published shapes that normalize.py reads, one function each and one table, SOURCES.

A function takes a raw row (dict) and returns {"messages": [...]} and what else the row has: tools, source, tags, lang,
chat_template_kwargs, id. A field that is missing raises KeyError, a value of another type TypeError or AttributeError,
a row that cannot be used InvalidRow; normalize.py counts them. What stands after * in a function's arguments is a flag of
normalize.py. No script. A new source = one function and one line in SOURCES.
"""

import random
import re
from fractions import Fraction
from functools import cache
from hashlib import blake2b
from pathlib import Path

from .errors import InvalidRow
from .parsing import clean_text, parse_json, parse_message, parse_tool_call, parse_tools, require_objects
from .rows import FOLLOWS

ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "tool_response": "tool"}  # others are ours already


# -- pieces that sources share ----------------------------------------------------------------------------------------
def exchange(question, answer, system=None, reasoning=None):
    """One question and its answer."""
    turns = [{"role": "system", "content": clean_text(system, "system")}] if system else []
    turns += [{"role": "user", "content": clean_text(question, "question")}, {"role": "assistant", "content": answer}]
    turns[-1] = parse_message({**turns[-1], "reasoning_content": reasoning})
    return turns


def spoken(turn):
    """A turn of role and content, or of from and value, under our names of the roles."""
    role = role_of(turn["role"] if "role" in turn else turn["from"])
    return parse_message({**turn, "role": role, "content": turn.get("content", turn.get("value"))})


def role_of(speaker, roles=ROLES):
    role = roles.get(speaker, speaker) if isinstance(speaker, str) else None
    if role not in FOLLOWS:
        raise InvalidRow("unknown role", str(speaker)[:80])
    return role


def plain_number(value):
    """ "12.0" -> "12"; every other number keeps the digits of its source."""
    try:
        number = float(value)
        int(number)  # inf and nan are floats too
    except (TypeError, ValueError, OverflowError):
        raise InvalidRow("number that is not a number", repr(value)[:80]) from None
    return str(int(number)) if number.is_integer() else str(value)


# -- chats ------------------------------------------------------------------------------------------------------------
def messages(row):
    """Chats already: messages, or conversations of role/content; tools as a list or as JSON; content as a string or in
    parts (LLaMA-Factory's reason_tool_use_demo_50)."""
    turns = row["messages"] if "messages" in row else row["conversations"]
    return {**row, "messages": [parse_message(turn) for turn in require_objects(turns, "messages")]}


def sharegpt(row):
    """ShareGPT (FastChat, LLaMA-Factory): conversations of from/value with human, gpt, system, function_call (JSON) and
    observation turns, an optional `system` text and `tools`, JSON text. Neighbouring function_call turns are one."""
    turns = [parse_message({"role": "system", "content": row["system"]})] if row.get("system") else []
    for turn in require_objects(row["conversations"], "conversations"):
        speaker, value = turn["from"], turn["value"]
        if speaker == "function_call":
            calls = parse_json(value, "tool call that is not JSON")
            calls = [parse_tool_call(call) for call in (calls if isinstance(calls, list) else [calls])]
            if turns and turns[-1].get("tool_calls"):
                turns[-1]["tool_calls"] += calls
            else:
                turns.append({"role": "assistant", "content": "", "tool_calls": calls})
        else:
            turns.append(parse_message({"role": role_of(speaker), "content": value}))
    return {**row, "messages": turns}


def alpaca(row):
    """Alpaca (tatsu-lab/alpaca, LLaMA-Factory): instruction, input (may be empty; stands on a line of its own behind
    the instruction), output, optional system and history [[question, answer], …]."""
    turns = [{"role": "system", "content": clean_text(row["system"], "system")}] if row.get("system") else []
    for question, answer in row.get("history") or []:
        turns += exchange(question, answer)
    asked = clean_text(row["instruction"], "instruction")
    asked = f"{asked}\n{clean_text(row['input'], 'input')}".strip() if row.get("input") else asked
    return {**row, "messages": [*turns, *exchange(asked, row["output"])]}


def prompt_completion(row):
    """TRL's prompt-completion rows: prompt and completion, both text or both messages."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return {**row, "messages": exchange(prompt, completion)}
    turns = [*require_objects(prompt, "prompt"), *require_objects(completion, "completion")]
    return {**row, "messages": [parse_message(turn) for turn in turns]}


def step35(row):
    """stepfun-ai/Step-3.5-Flash-SFT: JSON arrays of {"conversations": [{role, content, loss_mask, name, meta,
    reasoning_content?, tool_calls?}]}, tools in the first message as tools or tool_schemas; content may come in parts.
    meta is left out. StepTron refuses: a last message that is not the assistant's, an assistant with neither content
    nor tool_calls, a row without a user turn (stepchat_dataset.py)."""
    raw = require_objects(row["conversations"], "conversations")
    if not raw or raw[-1]["role"] != "assistant":
        raise InvalidRow("last message is not the assistant's")
    for number, turn in enumerate(raw):
        if turn["role"] == "assistant" and not turn.get("content") and not turn.get("tool_calls"):
            raise InvalidRow("assistant with neither content nor tool_calls", f"message {number}")
        if turn.get("loss_mask") not in (None, 0, 1):
            raise InvalidRow("loss_mask that is not 0 or 1", f"message {number}: {turn['loss_mask']!r}"[:80])
    if not any(turn["role"] == "user" for turn in raw):
        raise InvalidRow("no user turn")
    turns = [spoken(turn) for turn in raw]
    for turn in turns:
        if not turn.get("name", True):
            del turn["name"]
        if "loss_mask" in turn:
            turn["loss_mask"] = int(turn["loss_mask"])
    return {**row, "messages": turns, "tools": raw[0].get("tools") or raw[0].get("tool_schemas")}


def blossom(row):
    """Azure99/blossom-v6.3-sft-stage1 and its like: id, type, metadata {source}, messages. An id is unique only
    together with the source, so both make ours."""
    turns, where = (
        [parse_message(turn) for turn in require_objects(row["messages"], "messages")],
        row["metadata"]["source"],
    )
    return {"messages": turns, "source": where, "id": f"{where}/{row['id']}"}


def smoltalk(row):
    """HuggingFaceTB/smoltalk and smol-smoltalk: messages, source."""
    return messages(row)


def smoltalk2(row):
    """HuggingFaceTB/smoltalk2: messages, source, chat_template_kwargs {custom_instructions, enable_thinking,
    python_tools, xml_tools}, which all stay: custom_instructions is the persona, and null would bring the template's
    own. <tool_call> blocks that end an answer become tool_calls. The think and no_think rows of a prompt share it;
    mix.py keeps them together by it."""
    kwargs = row.get("chat_template_kwargs")
    if kwargs and not isinstance(kwargs, dict):
        raise InvalidRow("field of another type", "chat_template_kwargs must be an object")
    turns = [with_calls(turn) for turn in require_objects(row["messages"], "messages")]
    kwargs = {name: value for name, value in (kwargs or {}).items() if value is not None}
    return messages({**row, "messages": turns}) | {"chat_template_kwargs": kwargs}


CALL = re.compile(r"\s*<tool_call>(.*?)</tool_call>", re.S)


def with_calls(turn):
    """A message whose text ends in <tool_call> blocks of JSON with tool_calls instead."""
    said, mark, _ = turn["content"].partition("<tool_call>") if isinstance(turn.get("content"), str) else ("", "", "")
    if not mark or turn["role"] != "assistant":
        return turn
    told = turn["content"][len(said) :]
    if CALL.sub("", told).strip():
        raise InvalidRow("text behind a tool call", CALL.sub("", told).strip()[:80])
    calls = [parse_json(found, "tool call that is not JSON") for found in CALL.findall(told)]
    return {**turn, "content": said, "tool_calls": [parse_tool_call(call) for call in calls]}


def nemotron(row):
    """nvidia/Llama-Nemotron-Post-Training-Dataset: input (messages or text), output, reasoning (on or off), generator,
    category, system_prompt. Answers of DeepSeek-R1 only. `reasoning` becomes enable_thinking, and so does the system
    prompt "detailed thinking on" or off, which is that model's switch and no persona."""
    if row["generator"] != "DeepSeek-R1":
        raise InvalidRow("answer not of DeepSeek-R1", str(row["generator"])[:80])
    asked = row["input"] if isinstance(row["input"], list) else [{"role": "user", "content": row["input"]}]
    turns = [parse_message(turn) for turn in require_objects(asked, "input")]
    if row.get("system_prompt") and not (turns and turns[0]["role"] == "system"):
        turns.insert(0, {"role": "system", "content": clean_text(row["system_prompt"], "system_prompt")})
    if turns and turns[0]["role"] == "system" and re.fullmatch(r"detailed thinking (on|off)", turns[0]["content"]):
        del turns[0]
    turns.append(parse_message({"role": "assistant", "content": row["output"]}))
    on = row["reasoning"] == "on"
    if on and not turns[-1].get("reasoning_content"):
        raise InvalidRow("no reasoning where the row says on")
    tags = [row["category"]] if row.get("category") else []
    return {"messages": turns, "chat_template_kwargs": {"enable_thinking": on}, "tags": tags, "id": row.get("id")}


THOUGHT = re.compile(
    r"\s*<\|begin_of_thought\|>(.*?)<\|end_of_thought\|>\s*<\|begin_of_solution\|>(.*?)<\|end_of_solution\|>\s*", re.S
)


def openthoughts(row):
    """open-thoughts/OpenThoughts-114k, Bespoke-Stratos-17k: system, conversations of from/value (user, assistant) whose
    answers hold <|begin_of_thought|> … <|begin_of_solution|> …; OpenThoughts2/3: <think> blocks. A system text that
    only explains these marks goes with them."""
    turns = []
    for raw in require_objects(row["conversations"], "conversations"):
        if match := THOUGHT.fullmatch(raw["value"]):
            raw = {**raw, "value": match[2], "reasoning_content": match[1]}
        turns.append(spoken(raw))
    if row.get("system") and "<|begin_of_thought|>" not in row["system"]:
        turns.insert(0, {"role": "system", "content": clean_text(row["system"], "system")})
    return {**row, "messages": turns}


def s1k(row):
    """simplescaling/s1K-1.1: question, deepseek_thinking_trajectory and deepseek_attempt, and the same of gemini; s1K:
    question, thinking_trajectories (a list), attempt. DeepSeek's answer comes before Gemini's."""
    for whose in ("deepseek_", "gemini_", ""):
        if row.get(f"{whose}attempt"):
            thought = row[f"{whose}thinking_trajectory" if whose else "thinking_trajectories"]
            thought = thought[0] if isinstance(thought, list) and thought else thought
            return {"messages": exchange(row["question"], row[f"{whose}attempt"], reasoning=thought)}
    raise KeyError("deepseek_attempt")


MARK = re.compile(r"\{\{\s*(\w+)\s*\}\}")


def identity(row, *, fill=None):
    """Who the model is: messages (nanochat's identity_conversations.jsonl, a list a line) or Alpaca's columns
    (LLaMA-Factory's identity.json), with {{name}} and {{author}} to be filled in: --fill name=Ada author="our lab"."""
    found = alpaca(row) if "instruction" in row else messages(row)

    def put(match):
        if match[1] not in (fill or {}):
            raise InvalidRow("placeholder not filled in", f"{match[0]}: pass --fill {match[1]}=…")
        return fill[match[1]]

    for turn in found["messages"]:
        turn["content"] = MARK.sub(put, turn["content"])
    return found


EMOJI_CHARS = 3000


def emoji_preference(row):
    """Preference rows as shareAI/DPO-zh-en-emoji and LLaMA-Factory's dpo_zh_demo: the prompt (prompt, question or
    conversations), answered by the first assistant turn of chosen, else answer_zh, else answer_en. As in the tutorial
    each text is cut at 3,000 characters; such a row has the tag `cut`, since its answer ends too early."""
    asked = row.get("prompt") or row.get("question") or row["conversations"]
    turns = [{"role": "user", "content": asked}] if isinstance(asked, str) else require_objects(asked, "prompt")
    chosen = row.get("chosen")
    chosen = chosen if isinstance(chosen, list) else [chosen]
    chosen = [{"role": "assistant", "content": one} if isinstance(one, str) else one for one in chosen if one]
    said = [turn["content"] for turn in map(spoken, require_objects(chosen, "chosen")) if turn["role"] == "assistant"]
    said += [row[name] for name in ("answer_zh", "answer_en") if row.get(name)]
    answer = next((one for one in said if one), None)
    turns = [spoken(turn) for turn in [*turns, {"role": "assistant", "content": answer or ""}]]
    cut = any(len(turn["content"]) > EMOJI_CHARS for turn in turns)
    turns = [{**turn, "content": turn["content"][:EMOJI_CHARS].strip()} for turn in turns]
    return {"messages": turns, "tags": ["cut"] if cut else [], "id": row.get("id")}


# -- sums and choices -------------------------------------------------------------------------------------------------
def gsm8k(row):
    """openai/gsm8k: question, answer (working with <<a*b=c>> notes and a last line `#### n`), kept as it stands."""
    return {"messages": exchange(row["question"], row["answer"])}


def cmath(row):
    """XiaoMi/cmath: `input` in the repository, `question` on the hub; golden is the bare number."""
    return {"messages": exchange(row["input"] if "input" in row else row["question"], row["golden"])}


def mawps(row, *, keep_disagreeing=False):
    """MAWPS as in SVAMP's cv_mawps: N_00 in Question stands for the first of Numbers ("56.0 9.0"), Equation ("* N_00
    N_01") for the way to Answer. Rows whose Equation gives another number by over 1% (less is rounding: 3.33333) are
    refused; --keep_disagreeing keeps them, with their Answer, under the tag `equation disagrees`."""
    numbers = [plain_number(number) for number in str(row["Numbers"]).split()]

    def put_back(match):
        index = int(match[1])
        if index >= len(numbers):
            raise InvalidRow("number index without a number", f"{match[0]} with {len(numbers)} numbers")
        return numbers[index]

    asked, answer, tags = re.sub(r"N_(\d{1,9})", put_back, row["Question"]), plain_number(row["Answer"]), []
    if row.get("Equation"):
        worked = worked_out(re.sub(r"N_(\d{1,9})", put_back, row["Equation"]).split())
        if worked is None or abs(worked - float(answer)) > 0.01 * abs(worked):
            if not keep_disagreeing:
                raise InvalidRow("equation disagrees with answer", f"{row['Equation']}, Answer {answer}"[:80])
            tags = ["equation disagrees"]
    return {"messages": exchange(asked, answer), "tags": tags}


def worked_out(words):
    """The value of an equation in prefix form, or None where it has none."""
    stack = []
    try:
        for word in reversed(words):
            if word in ("+", "-", "*", "/"):
                a, b = stack.pop(), stack.pop()
                stack.append(a + b if word == "+" else a - b if word == "-" else a * b if word == "*" else a / b)
            else:
                stack.append(Fraction(word))
        (value,) = stack
        return float(value)
    except (ValueError, ZeroDivisionError, IndexError, OverflowError):
        return None


def multiple_choice(question, letters, choices):
    """nanochat's form (tasks/common.py): the letter behind its choice, bound to it by = without a blank, so that it is
    the very token of the answer."""
    lines = "".join([f"- {choice}={letter}\n" for letter, choice in zip(letters, choices, strict=True)])
    return f"Multiple Choice question: {question}\n{lines}\nRespond only with the letter of the correct answer."


def arc(row):
    """allenai/ai2_arc: question, choices {text, label}, answerKey; in nanochat's form, answered by the letter."""
    letters, choices = row["choices"]["label"], row["choices"]["text"]
    return {"messages": choice(row["question"], letters, choices, row["answerKey"])}


def mmlu(row):
    """cais/mmlu: question, subject, choices (four), answer (0 to 3); auxiliary_train wraps them in `train`."""
    row = row["train"] if isinstance(row.get("train"), dict) else row
    if type(row["answer"]) is not int or not 0 <= row["answer"] < 4:
        raise InvalidRow("answer that is no choice", str(row["answer"])[:80])
    subject = row.get("subject")
    return {
        "messages": choice(row["question"], list("ABCD"), row["choices"], "ABCD"[row["answer"]]),
        "tags": [subject] if subject else [],
    }


def choice(question, letters, choices, answer):
    strings = [question, answer, *letters, *choices]
    if not all(isinstance(one, str) for one in strings) or len(letters) != len(choices):
        raise InvalidRow("field of another type", "question, labels and choices must be strings, a label a choice")
    if answer not in letters:
        raise InvalidRow("answer that is no choice", f"{answer} of {', '.join(letters)}"[:80])
    if not question.strip() or not all(one.strip() for one in choices):
        raise InvalidRow("empty text", "question or choice")
    return exchange(multiple_choice(question, letters, choices), answer)


# -- spelling: rows made here -----------------------------------------------------------------------------------------
ONSETS, VOWELS, CODAS = map(
    str.split,
    (
        "b c d f g h j k l m n p r s t v w z br ch cl cr dr fl gl gr pl pr sh sk sl sp st str th tr",
        "a e i o u ai ea ee oa oo ou",
        "l m n r s t ck ll nd ng nk nt rn rt sh st",
    ),
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
ASKED = (
    "How many {letter} are in {word}",
    "How many times does {letter} appear in the word {word}",
    "Count the {letter} in {word}",
    "In the word {word}, how many {letter} are there",
    "What is the number of {letter} in {word}",
    "{word} has how many {letter}",
    "Can you count the letter {letter} in {word}",
    "Wie viele {letter} sind in {word}",
    "Combien de {letter} dans {word}",
    "¿Cuántas {letter} hay en {word}?",
    "{word}里有几个{letter}",
)


@cache
def word_list(path):
    """The words of a file, one a line; they may be any."""
    return [word for word in Path(path).read_text(encoding="utf-8").split() if word.isalpha()]


def held_out(word):
    """Whether a word belongs to test, and then never to train: by its letters alone, whatever seed, list and rows."""
    return blake2b(word.lower().encode(), digest_size=1).digest()[0] < 26


def drawn(row, words):
    """A word of the row's side, drawn by the row's own generator."""
    rng = random.Random(f"{row['seed']}/{row['split']}/{row['number']}")
    while True:
        if words:
            word = rng.choice(word_list(words))
        else:
            kinds = [kind for _ in range(rng.randint(1, 3)) for kind in (ONSETS, VOWELS)] + [CODAS]
            word = "".join(map(rng.choice, kinds))
        if held_out(word) == (row["split"] != "train"):
            return rng, word


def simple_spelling(row, *, words=None):
    """nanochat's SimpleSpelling, made here: `Spell the word: tree` -> `tree:t,r,e,e`. Words are made of syllables, or
    drawn from --words FILE (nanochat: dwyl/english-words, words_alpha.txt). A word is in train or in validation for
    good, by its own hash: nanochat drew both from one list and its seeds met."""
    _, word = drawn(row, words)
    return {"messages": exchange(f"Spell the word: {word}", f"{word}:{','.join(word)}")}


def spelling_bee(row, *, words=None):
    """nanochat's SpellingBee, made here: how often a letter stands in a word, counted by hand, then by Python, then
    `#### n`. The Python call stands in the text as GSM8K's notes do, <<'tree'.count('e')=2>>, so that templates without
    tools can render it."""
    rng, word = drawn(row, words)
    letter = rng.choice(word) if rng.random() < 0.9 else rng.choice(LETTERS)
    asked, quote = rng.choice(ASKED), rng.choice(["", "'", '"'])
    asked = asked.format(letter=f"{quote}{letter}{quote}", word=f"{quote}{word}{quote}")
    asked += "" if asked.endswith("?") or rng.random() < 0.5 else "?"
    lines, count = [], 0
    for number, char in enumerate(word, 1):
        count += char == letter
        lines.append(f"{number}:{char} hit! count={count}" if char == letter else f"{number}:{char}")
    answer = (
        f"We count the letter '{letter}' in the word '{word}', first by hand.\n\nSpell it:\n{word}:{','.join(word)}\n\n"
        "Count:\n" + "\n".join(lines) + f"\n\nThis gives us {count}.\n\nLet me check it with Python:\n\n"
        f"<<'{word}'.count('{letter}')={count}>>\n\nPython gives us {count}.\n\n#### {count}"
    )
    return {"messages": exchange(asked, answer)}


def spelling(row, *, words=None):
    """simple_spelling and spelling_bee in turn, a row each, named as the row's source."""
    make = (simple_spelling, spelling_bee)[row["number"] % 2]
    return make(row, words=words) | {"source": make.__name__}


# -- tools ------------------------------------------------------------------------------------------------------------
JSON_TYPES = {  # BFCL's names of types, Python's and Java's, in JSON schema
    "dict": "object", "HashMap": "object", "Hashtable": "object", "tuple": "array", "list": "array", "Array": "array",
    "ArrayList": "array", "Queue": "array", "Stack": "array", "float": "number", "double": "number", "bool": "boolean",
    "String": "string", "char": "string", "byte": "integer", "short": "integer", "long": "integer",
    "Bigint": "integer",
}  # fmt: skip


def bfcl(row, *, answers=None):
    """BFCL v4 (ShishirPatil/gorilla): question [[turn, …]], function [{name, description, parameters}], whose reference
    stands in a file of its own, {id, ground_truth: [{name: {argument: [what is right, …]}}]}: --answers FILE, without
    it possible_answer/NAME beside the input. The last turn is the assistant's call with the first right value of each
    argument, without those that may be left out. Rows without reference calls (irrelevance) and of several user turns
    (their replies need the tools run) are refused. It is an evaluation set: train on it to test a pipeline only."""
    turns = [parse_message(turn) for turn in require_objects(row["question"][0], "question")]
    truth = row.get("ground_truth") or (answers or {}).get(row["id"])
    if len(row["question"]) != 1:
        raise InvalidRow("several user turns without the tools' replies")
    if not truth:
        raise InvalidRow("no reference answer", "pass --answers FILE" if not answers else str(row["id"])[:80])
    tools = parse_tools([{**tool, "parameters": json_schema(tool["parameters"])} for tool in row["function"]])
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    calls = []
    for call in require_objects(truth, "ground_truth"):
        ((name, arguments),) = call.items()
        if name not in schemas:
            raise InvalidRow("call of a tool that is not offered", name)
        calls.append(parse_tool_call({"name": name, "arguments": right_values(arguments, schemas[name])}))
    turns.append({"role": "assistant", "content": "", "tool_calls": calls})
    return {"messages": turns, "tools": tools}


def json_schema(schema):
    """A schema in BFCL's types as JSON schema; `any` is no constraint."""
    out = {key: value for key, value in schema.items() if key != "type"}
    kind = JSON_TYPES.get(schema.get("type"), schema.get("type"))
    if kind not in (None, "any", "Any"):
        out = {"type": kind, **out}
    if isinstance(schema.get("properties"), dict):
        out["properties"] = {name: json_schema(one) for name, one in schema["properties"].items()}
    if isinstance(schema.get("items"), dict):
        out["items"] = json_schema(schema["items"])
    return out


def right_values(arguments, schema):
    """{argument: its first right value}; "" among the right ones says that the argument may be left out."""
    known, needed = schema.get("properties") or {}, schema.get("required") or []
    out = {}
    for name, values in arguments.items():
        if "" in values and name not in needed:
            continue
        value = next((one for one in values if one != ""), "")
        out[name] = nested_value(value, known.get(name) or {})
    return out


def nested_value(value, schema):
    """Objects in a right value hold lists of right values again."""
    if isinstance(value, dict):
        return right_values({k: v if isinstance(v, list) else [v] for k, v in value.items()}, schema)
    if isinstance(value, list):
        return [nested_value(one, schema.get("items") or {}) for one in value]
    return value


# -- any other --------------------------------------------------------------------------------------------------------
KEPT = ("tools", "chat_template_kwargs", "id", "source", "lang", "tags")
MAPPED = ("prompt", "answer", "system", "reasoning", "messages", "role", "content", *KEPT)


def fields(row, *, map=None, roles=None):
    """Any other rows, by --map OURS=THEIRS …: prompt and answer, or messages with the keys role and content of a turn;
    system, reasoning, tools, chat_template_kwargs, id, source, lang and tags as well. THEIRS is a column, or a path
    like data.question. --roles THEIRS=OURS … names the speakers."""
    mapped, roles = map or {}, {**ROLES, **(roles or {})}
    out = {name: column(row, mapped[name]) for name in KEPT if name in mapped}
    system = column(row, mapped["system"]) if "system" in mapped else None
    if "messages" not in mapped:
        thought = column(row, mapped["reasoning"]) if "reasoning" in mapped else None
        asked, answer = column(row, mapped["prompt"]), column(row, mapped["answer"])
        return out | {"messages": exchange(asked, answer, system, thought)}
    role, content = mapped.get("role", "role"), mapped.get("content", "content")
    turns = [{"role": "system", "content": clean_text(system, "system")}] if system else []
    for raw in require_objects(column(row, mapped["messages"]), mapped["messages"]):
        who, thought = raw[role], raw.get(mapped.get("reasoning", "reasoning_content"))
        turns.append(parse_message({**raw, "role": role_of(who, roles), "content": raw.get(content),
                              "reasoning_content": thought}))  # fmt: skip
    return out | {"messages": turns}


def column(row, path):
    """What stands at a column, or at a path of names joined by dots; KeyError where nothing does."""
    if path in row:
        return row[path]
    for name in path.split("."):
        if not isinstance(row, dict) or name not in row:
            raise KeyError(path)
        row = row[name]
    return row


SOURCES = {  # name: (function, language or None to tell by the script of the text)
    "messages": (messages, None),
    "sharegpt": (sharegpt, None),
    "alpaca": (alpaca, None),
    "prompt_completion": (prompt_completion, None),
    "fields": (fields, None),
    "step35": (step35, None),
    "blossom": (blossom, None),
    "smoltalk": (smoltalk, None),
    "smoltalk2": (smoltalk2, None),
    "nemotron": (nemotron, None),
    "openthoughts": (openthoughts, None),
    "s1k": (s1k, None),
    "identity": (identity, None),
    "emoji_preference": (emoji_preference, None),
    "gsm8k": (gsm8k, "en"),
    "cmath": (cmath, "zh"),
    "mawps": (mawps, "en"),
    "arc": (arc, "en"),
    "mmlu": (mmlu, "en"),
    "simple_spelling": (simple_spelling, "en"),
    "spelling_bee": (spelling_bee, "en"),
    "spelling": (spelling, "en"),
    "bfcl": (bfcl, "en"),
}
MADE = ("simple_spelling", "spelling_bee", "spelling")  # of no input
