"""Every chat template against the published renderings, a hand-written oracle, and itself as a server would use it.

What would fool these tests, and what stands against it:
- oracle and template share a mistake: both are compared with the published renderings, and the requests also with the
  unmarked templates that TRL carries, on random conversations;
- nothing is compared (all skipped, all refused, nothing trained): the random run counts what it saw and asserts it;
- the list of exceptions hides a fault: an exception that does not differ fails;
- the oracle would accept anything: every template is mutated (a marker moved, the stop untrained, the
  header trained, the newline after the stop trained, ...) and each mutant must be found out.
"""

import base64
import json
import re
from collections import Counter
from datetime import datetime
from functools import cache, lru_cache
from pathlib import Path
from random import Random

import pytest
import trl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2 import Environment, TemplateError, meta, nodes
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import has_generation_markers, is_chat_template_stop_token_trained

from data_prep.common.errors import InvalidRow
from data_prep.common.rendering import Renderer, find_empty_thoughts
from tests.helpers.runs import REPO, SHARED
from tests.helpers.template_oracle import ALL_FAMILIES, CALL, Refused

UPSTREAM = Path(trl.__file__).parent / "chat_templates"
EXAMPLES, LONG_EXAMPLES, SAMPLES = 200, 2000, 40
QUESTION = [{"role": "user", "content": "?"}]
ANSWERED = [*QUESTION, {"role": "assistant", "content": "13"}]
CHOICES = {  # the arguments every template takes
    "train_turns": ("all", "last", "flagged"),
    "train_tool_calls": ("on", "masked"),
    "train_header": ("on", "off"),
}


def choices(family):
    """The arguments that a family takes, and their values."""
    return {**{k: v for k, v in CHOICES.items() if family.tools or k != "train_tool_calls"}, **family.arguments}


families = pytest.mark.parametrize("family", ALL_FAMILIES, ids=lambda family: family.name)


# ---------------------------------------------------------------- templates and tokenizers


@cache
def template(name):
    return (REPO / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def serving(source):
    """The line by which every recipe saves its template: markers become empty comments that trim the same way."""
    return re.sub(r"{%(\W?)\s*(?:end)?generation\s*(\W?)%}", r"{#\1 \2#}", source)


def render(source, messages, tools=None, prompt=False, bos="", eos="", **arguments):
    """The text, rendered as transformers renders it, and the marked spans."""
    texts, spans = render_jinja_template(
        conversations=[messages],
        tools=tools or None,
        chat_template=source,
        add_generation_prompt=prompt,
        return_assistant_tokens_mask=not prompt and has_generation_markers(source),
        bos_token=bos,
        eos_token=eos,
        **arguments,
    )
    return texts[0], spans[0] if spans else []


def render_elsewhere(source, messages, **arguments):
    """The text as a server renders it that does not know the other names of reasoning, as transformers does."""
    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])

    def raise_exception(words):
        raise TemplateError(words)

    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(serving(source)).render(messages=messages, bos_token="", eos_token="", **arguments)


CORPUS = [
    "What is 17 * 3? And doubled? The weather in Oslo tomorrow is rain, about 4 degrees.\n\nThat is all.\n",
    'def f(x):\n    return {"name": "get_weather", "arguments": {"city": "Oslo"}}\n\n\n',
    "x\n\n\ny\n\n\n\nz\n\n\n\n\n" * 3 + "\n",
    "user\nassistant\nsystem\ntool\n  \n \n\t\n\r\n 用一句话解释梯度 café naïve\n",
] * 4


@cache
def small_tokenizer(special, plain, bos, eos):
    """Byte-level BPE with real merges (newlines too), split as Qwen splits, with a family's own tokens."""
    backend = Tokenizer(models.BPE())
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    pattern = words + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos or None, eos_token=eos or None)


@cache
def real_tokenizer(name):
    return AutoTokenizer.from_pretrained(SHARED / "tokenizers" / name)


def tokenizer_of(family, kind="real"):
    if kind == "real" and family.tokenizer and (SHARED / "tokenizers" / family.tokenizer).is_dir():
        return real_tokenizer(family.tokenizer)
    return small_tokenizer(family.special, family.plain, family.bos, family.eos)


def encode(tokenizer, text):
    """The ids of a text. A token of its own (special or added) always stands apart, so the pieces between are encoded
    once and remembered; every training text is compared with the tokenizer's own encoding of the whole."""
    return [token for piece in apart(tokenizer).split(text) for token in encode_piece(tokenizer, piece)]


@cache
def apart(tokenizer):
    return re.compile("(" + "|".join(sorted(map(re.escape, tokenizer.get_added_vocab()), key=len, reverse=True)) + ")")


@lru_cache(maxsize=100_000)
def encode_piece(tokenizer, piece):
    return tokenizer.backend_tokenizer.encode(piece, add_special_tokens=False).ids


# ---------------------------------------------------------------- what the oracle expects


def flag(message):
    return next((message[name] for name in ("loss_mask", "train") if message.get(name) is not None), 1) == 1


def expected(family, messages, tools, train_turns=None, **arguments):
    """Training text, its trained spans, and for each trained answer (index, request, output)."""
    convention = {
        name: arguments.pop(name)
        for name in ("train_thinking", "train_tool_calls", "train_header", "train_newline")
        if name in arguments and not (name == "train_newline" and family.published)
    }
    text = family.history(messages, tools, **arguments)
    last_answer = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=-1)

    def request(k):
        return family.history(messages[:k], tools, **arguments) + family.prompt(messages[:k], **arguments)

    if messages[-1]["role"] == "assistant":
        parts = family.output(messages, **arguments)
        text = request(len(messages) - 1) + "".join(part for part, _ in parts) + family.after
    if family.published:
        answers = family.published(
            messages, tools, **arguments, **({"train_turns": train_turns} if train_turns else {})
        )
        return text, merged([(start, end) for _, start, end in answers]), [(k, None, text[a:b]) for k, a, b in answers]
    spans, answers = [], []
    for k, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if train_turns == "last" and k != last_answer or train_turns == "flagged" and not flag(message):
            continue
        try:
            before, parts = request(k), family.output(messages[: k + 1], **arguments)
        except Refused:
            continue
        if family.earlier_stop and k != len(messages) - 1:
            parts = [*parts[:-1], (family.earlier_stop, "stop")]
        output = "".join(part for part, _ in parts)
        if not text.startswith(before + output):
            continue
        answers.append((k, before, output))
        if convention.get("train_header") == "on":
            prompt = family.prompt(messages[:k], **arguments)
            spans.append((len(before) - len(prompt), len(before)))
        end = len(before)
        for part, kind in parts:
            start, end = end, end + len(part)
            masked = (
                kind == "environment"
                or (kind == "think" and convention.get("train_thinking") == "masked")
                or (kind == "call" and convention.get("train_tool_calls") == "masked")
            )
            if part and not masked:
                spans.append((start, end))
        if convention.get("train_newline") == "on":
            spans.append((end, end + len(family.after)))
    return text, merged(spans), answers


def merged(spans):
    out = []
    for start, end in spans:
        if out and out[-1][1] == start:
            out[-1] = (out[-1][0], end)
        else:
            out.append((start, end))
    return out


def token_mask(tokenizer, text, spans):
    """Trained tokens counted by encoding prefixes; None for a token that lies across an edge."""
    ids = encode(tokenizer, text)
    mask = [0] * len(ids)

    def edge(position):
        prefix = encode(tokenizer, text[:position])
        return prefix == ids[: len(prefix)], len(common(prefix, ids))

    for start, end in spans:
        (clean_start, first), (clean_end, last) = edge(start), edge(end)
        mask[first:last] = [1] * (last - first)
        if not clean_start:
            mask[first] = None
        if not clean_end:
            mask[last] = None
    return mask


def common(left, right):
    """The longest common beginning of two lists of ids."""
    return left[
        : next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
    ]


def disagreement(family, source, tokenizer, conversation, seen=None):
    """Everything rules 1, 2 and 4 say about one conversation; the first thing found wrong, or None."""
    seen, served = Counter() if seen is None else seen, serving(template(family.name))
    messages, tools, arguments = conversation
    try:
        text, spans, answers = expected(family, messages, tools, **arguments)
    except Refused:
        seen["refused"] += 1
        try:
            render(source, messages, tools, False, family.bos, family.eos, **arguments)
        except TemplateError as error:
            return None if re.match(r"message \d+: ", str(error)) else f"a refusal that names no message: {error}"
        return "rendered what the format has no place for"
    ours = tokenizer.apply_chat_template(
        messages,
        tools=tools or None,
        chat_template=source,
        return_dict=True,
        return_assistant_tokens_mask=True,
        **arguments,
    )
    ids = encode(tokenizer, text)
    if ours["input_ids"] != ids:
        return f"training text: {tokenizer.decode(ours['input_ids'])!r} instead of {text!r}"
    mask = token_mask(tokenizer, text, spans)
    seen["straddling"] += None in mask
    if any(want is not None and have != want for have, want in zip(ours["assistant_masks"], mask, strict=True)):
        return f"mask: {marked(tokenizer, ids, ours['assistant_masks'])!r} instead of {marked(tokenizer, ids, mask)!r}"
    for k, before, output in answers:
        seen["trained"] += 1
        if before is None:  # a published mask, proven by its own test
            continue
        request = render(served, messages[:k], tools, True, family.bos, family.eos, **arguments)[0]
        if request != before:
            return f"request {k}: {request!r} instead of {before!r}"
        whole = encode(tokenizer, request) + encode(tokenizer, output)
        if merges(tokenizer, before, output) != (whole != ids[: len(whole)]):
            return f"answer {k}: request + output is not the training text, {before + output!r}"
    seen["context"] += sum(m["role"] == "assistant" for m in messages) - len(answers)
    seen["calls"] += sum(bool(messages[k].get("tool_calls")) for k, _, _ in answers)
    seen["parallel"] += sum(len(messages[k].get("tool_calls") or []) > 1 for k, _, _ in answers)
    seen["reasoning"] += sum(bool(messages[k].get("reasoning_content")) for k, _, _ in answers)
    return None


def merges(tokenizer, before, output):
    """Rule 4, the whole set: a header that ends in a newline and an answer whose leading blanks hold one more, where
    this tokenizer has a token for the two together."""
    if not before.endswith("\n") or not re.match(r"\s*[\r\n]", output):
        return False
    return encode(tokenizer, before + output)[: len(encode(tokenizer, before))] != encode(tokenizer, before)


def marked(tokenizer, ids, mask):
    out, on = "", False
    for token, trained in zip(ids, mask, strict=True):
        out += ("⟦" if trained and not on else "⟧" if on and not trained else "") + tokenizer.decode([token])
        on = bool(trained)
    return out + ("⟧" if on else "")


# ---------------------------------------------------------------- conversations

WORDS = [
    "Name three rivers.",
    "13",
    "Да, 97.",
    "用一句话解释梯度。😀➡️",
    "cafe\u0301 naïve\u00a0x\u2028y",
    "{{ x }} {% if y %}",
    "a\r\nb\tc",
]
CODE = [
    '```python\nd = {"a": [1, 2]}\nprint(f"{d!r}")\n```\nThat is all.',
    "def f():\n    return '\\n'\n\n\n",
    "<b>&amp;</b> \"q\" \\ 'z'",
]
BLANKS = ["", " ", "\n", "\n\n", " \n x", "  lead", "trail  ", "trail\n\n", "\nlead", "\r\nlead", "\t"]
CALLS = [
    {"city": "Oslo", "day": "tomorrow"},
    {},
    {"expression": "2 < 3 & 'x'", "n": 1.5, "deep": {"a": [1, None, True]}},
    {"t": "é\n😀"},
]
LETTERS = "aZ 9.,-'\"{}%\n\t\r\u00e9\u0301\u200d\u00a0\u2028\ufffd\u4f60\u0394\U0001f600\U0001f468\x85\x7f"


def some_text(random):
    kind = random.randrange(10)
    if kind < 7:
        return random.choice([WORDS, WORDS, CODE, BLANKS][kind % 4])
    return "".join(random.choice(LETTERS) for _ in range(random.randrange(12)))


def tool(name, **properties):
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    described = {"name": name, "description": f"What {name} does: <x> & 'y' → é.", "parameters": parameters}
    return {"type": "function", "function": described}


TOOLS = [
    tool(
        "get_weather",
        city={"type": "string", "description": "City name"},
        day={"type": "string", "enum": ["today", "tomorrow"]},
    ),
    tool("calculate", expression={"type": "string"}),
    tool("now"),
]


@st.composite
def conversations(draw, family):
    """(messages, tools, arguments): any shape the family can hold, and now and then one that it must refuse.
    Hypothesis chooses the shape, a seed of its choice the texts."""
    random = Random(draw(st.integers(0, 2**32 - 1)))
    wanted = draw(st.booleans()) and (family.tools or random.random() < 0.05)
    tools = TOOLS[: random.randint(1, 3)] if wanted else None
    thinks = draw(st.sampled_from(["none", "none", "last", "every", "earlier", "some"]))
    if not family.reasoning and random.random() < 0.95:
        thinks = "none"
    system = random.choice(family.systems) if family.systems and random.random() < 0.5 else some_text(random)
    messages = [{"role": "system", "content": system}] if family.system and draw(st.booleans()) else []
    ids = (f"call{i:05d}" for i in range(100))
    for chain in draw(st.lists(st.integers(0, 2), min_size=1, max_size=4)):
        for _ in range(random.choice([1, 1, 1, 2]) if family.consecutive_users else 1):
            quoted = "<tool_response>\nI only quote this.\n</tool_response>"
            messages.append({"role": "user", "content": quoted if random.random() < 0.1 else some_text(random)})
        if family.late_system and random.random() < 0.05:
            messages.append({"role": "system", "content": some_text(random)})
        for _ in range(chain if tools else 0):
            calls = []
            for _ in range(random.randint(1, 3) if family.parallel else 1 + (random.random() < 0.05)):
                called = {"name": random.choice(TOOLS)["function"]["name"], "arguments": random.choice(CALLS)}
                if family.string_arguments and random.random() < 0.7:
                    called["arguments"] = json.dumps(called["arguments"])
                calls.append({"id": next(ids), "type": "function", "function": called})
            said = some_text(random) if random.random() < (0.5 if family.text_before_calls else 0.05) else ""
            messages.append({"role": "assistant", "content": said, "tool_calls": calls})
            for call in calls:
                reply = {"role": "tool", "tool_call_id": call["id"], "name": call["function"]["name"]}
                messages.append({**reply, "content": some_text(random)})
        messages.append({"role": "assistant", "content": some_text(random)})
        if family.parts and random.random() < 0.7:
            kinds = []
            for _ in range(random.randint(1, 3)):
                kinds.append(random.choice(["text", "python"]))
                if random.random() < (0.7 if kinds[-1] == "python" else 0.02):
                    kinds.append("python_output")
            messages[-1]["content"] = [{"type": kind, "text": some_text(random)} for kind in kinds]
    spoken = [m for m in messages if m["role"] == "assistant"]
    for m in spoken:
        last = m is spoken[-1]
        if thinks == "every" or thinks == ("last" if last else "earlier") or thinks == "some" and random.random() < 0.5:
            m["reasoning_content"] = some_text(random)
    arguments = {}
    for name, values in choices(family).items():
        if random.random() < 0.5:
            arguments[name] = random.choice(values)
    if arguments.get("train_turns") == "flagged":
        for m in random.sample(spoken, random.randint(1, len(spoken))):
            m[random.choice(["loss_mask", "train"])] = random.randint(0, 1)
    return messages, tools if family.tool_list or random.random() < 0.05 else None, arguments


def random_run(family, kind, examples):
    tokenizer, source, seen = tokenizer_of(family, kind), template(family.name), Counter()

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(conversations(family))
    def run(conversation):
        wrong = disagreement(family, source, tokenizer, conversation, seen)
        assert wrong is None, wrong

    run()
    for what in [
        "trained",
        *["calls", "parallel"][: family.tools + family.parallel * family.tools],
        *["reasoning"] * family.reasoning,
    ]:
        assert seen[what] >= examples // 40, f"the random conversations held too little: {seen}"
    return seen


@families
def test_random_conversations(family):
    random_run(family, "real", EXAMPLES)


@families
def test_random_conversations_on_the_small_tokenizer(family):
    if tokenizer_of(family) is tokenizer_of(family, "small"):
        pytest.skip("no real tokenizer at hand: the test above already ran on the small one")
    random_run(family, "small", EXAMPLES // 8)


@pytest.mark.long
@families
def test_many_random_conversations(family):
    random_run(family, "real", LONG_EXAMPLES)


# ---------------------------------------------------------------- mutants: the suite must see red


def begins(source, parts):
    """Where the prompt ends with the user's own turn (Mistral), the end of that turn stands for the header."""
    if "{%- set header = '' %}" in source and "[/INST]" in source:
        return source.replace(" + '[/INST]' }}", " }}{%- generation %}{{- '[/INST]' }}{%- endgeneration %}")
    return re.sub(HEADER, parts, source)


EMIT = "{%- generation %}{{- out.text }}{%- endgeneration %}"
HEADER = r"\[\[header, \(train_header or ''\) in \['on', true\]\],"
MUTANTS = {
    "starts late": lambda s: s.replace(EMIT, "{{- out.text[:24] }}" + EMIT.replace("text", "text[24:]")),
    "starts a character early": lambda s: begins(s, "[[header[:-1], false], [header[-1:], true],"),
    "header trained": lambda s: begins(s, "[[header, true],"),
    "stop not trained": lambda s: re.sub(
        r", true\](, \[('\\n'|rest), \w+\])?\] if text %}", r", false]\1] if text %}", s
    ),
    "newline after the stop": lambda s: re.sub(r"\[('\\n'|rest), (\w+)\]\] if", r"[\1, not \2]] if", s),
    "nothing trained": lambda s: s.replace(
        EMIT, "{%- if false %}{%- generation %}{%- endgeneration %}{%- endif %}{{- out.text }}"
    ),
    "context trained": lambda s: re.sub(r"{%- set wanted = [^%]*%}", "{%- set wanted = true %}", s),
}


@cache
def samples(family):
    found = []

    @settings(
        max_examples=SAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(conversations(family))
    def run(conversation):
        found.append(conversation)

    run()
    return found


@pytest.mark.parametrize("mutant", MUTANTS)
@families
def test_every_mutant_is_found_out(family, mutant):
    source = template(family.name)
    assert source.count("generation %}") == 2, "one pair of markers, in the form that the mutants know"
    mutated = MUTANTS[mutant](source)
    if mutant == "newline after the stop" and not family.after:
        assert mutated == source
        pytest.skip("not in this family: text behind the stop token")
    assert mutated != source, "the template is not written in the form that the mutants know"
    tokenizer = tokenizer_of(family, "small")
    assert any(disagreement(family, mutated, tokenizer, conversation) for conversation in samples(family))


# ---------------------------------------------------------------- fixed shapes, written out


def test_every_template_is_proven_and_has_its_row():
    files = {path.stem for path in (REPO / "chat_templates").glob("*.jinja")}
    table = (REPO / "chat_templates" / "README.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| (\w+) \|", table, re.M)) - {"template", "argument"}
    assert files == {family.name for family in ALL_FAMILIES} == rows and len(files) >= 3


@families
def test_a_rendering_marked_by_hand(family):
    """One conversation whose trained text is marked by a reader's eye, not by any program."""
    for messages, tools, arguments, text in (family.hard, *family.more):
        check_by_hand(family, messages, tools, arguments, text)


def check_by_hand(family, messages, tools, arguments, text):
    tokenizer, plain = tokenizer_of(family), text.replace("⟦", "").replace("⟧", "")
    ours = tokenizer.apply_chat_template(
        messages,
        tools=tools,
        chat_template=template(family.name),
        return_dict=True,
        return_assistant_tokens_mask=True,
        **arguments,
    )
    assert ours["input_ids"] == encode(tokenizer, plain)
    assert marked(tokenizer, ours["input_ids"], ours["assistant_masks"]) == text


SAID = ["13", "", "Yes, 97.", "用一句话解释梯度。😀", "def f():\n    return 1\n", "No.\n\n", "  x"]


@families
def test_twenty_turns(family):
    messages = []
    for i in range(20):
        messages += [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": SAID[i % len(SAID)]}]
    for arguments in [{}, *({name: value} for name, values in choices(family).items() for value in values)]:
        conversation = (messages[: 8 if arguments else None], None, arguments)
        wrong = disagreement(family, template(family.name), tokenizer_of(family), conversation)
        assert wrong is None, f"{arguments}: {wrong}"


@families
def test_leading_newlines_are_the_only_answers_that_merge(family):
    """Rule 4: with a header that ends in a newline, an answer that begins with one shares a token with it."""
    tokenizer, question = tokenizer_of(family), [{"role": "user", "content": "?"}]
    for arguments in [{}, *({"enable_thinking": value} for value in family.arguments.get("enable_thinking", ()))]:
        before = family.history(question, None, **arguments) + family.prompt(question, **arguments)
        for answer in [*SAID, *BLANKS, *WORDS, *CODE, "\n\n\n", "\n "]:
            try:
                answered = [*question, {"role": "assistant", "content": answer}]
                output = "".join(part for part, _ in family.output(answered, **arguments))
            except Refused:
                continue
            together = encode(tokenizer, before + output)
            merged = together != encode(tokenizer, before) + encode(tokenizer, output)
            if output.startswith("\n") or not re.match(r"\s*[\r\n]", output):  # between the two the vocabulary decides
                assert merged == (before.endswith("\n") and output.startswith("\n")), repr(output)


@families
def test_misspelt_arguments_are_refused_and_none_means_unset(family):
    conversation = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "13"}]
    source = template(family.name)
    default = render(source, conversation)
    for name in (name for name in choices(family) if name.startswith("train_")):
        assert render(source, conversation, **{name: None}) == default
        with pytest.raises(TemplateError, match=f"{name} is nonsense, it must be one of "):
            render(source, conversation, **{name: "nonsense"})


@families
def test_true_and_false_are_on_and_off(family):
    """YAML reads an unquoted on and off as booleans."""
    conversation = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "13"}]
    source, seen = template(family.name), 0
    for name, values in choices(family).items():
        for word, value in (("on", True), ("off", False)):
            if name.startswith("train_") and word in values:
                by_word, by_value = (render(source, conversation, **{name: given}) for given in (word, value))
                assert by_value == by_word
                seen += 1
    assert seen >= 2


@families
def test_flags_count_only_where_they_are_asked_for(family):
    source, spans = template(family.name), {}
    for turns in ("all", "last", "flagged"):
        for flags in ({}, {"loss_mask": 0}, {"train": 0}):
            conversation = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "13", **flags}]
            spans[(turns, *flags)] = render(source, conversation, train_turns=turns)[1]
    trained = spans["flagged",]
    assert trained and not spans["flagged", "loss_mask"] and not spans["flagged", "train"]
    assert all(found == trained for (turns, *_), found in spans.items() if turns != "flagged")


@families
def test_values_of_another_type_are_refused(family):
    """By the template itself, as a server and a recipe without hooks have it: "false" is true wherever it is asked."""
    source = template(family.name)
    for name in (name for name, values in choices(family).items() if True in values):
        for value in ("false", "true", "False", 0, 1, 0.0, [False]):
            for prompt in (False, True):
                with pytest.raises(TemplateError, match=f"^{name} is .*, it must be one of .*true, false"):
                    render(source, QUESTION if prompt else ANSWERED, prompt=prompt, **{name: value})
    with pytest.raises(TemplateError, match="^train_header is 1, it must be one of off, on"):
        render(source, ANSWERED, train_header=1)


@families
def test_flags_are_zero_or_one(family):
    source = template(family.name)
    for name in ("loss_mask", "train"):
        for value in ("0", "1", "", "true", 2, -1, 0.5, [], [0], {"a": 1}):
            for arguments in ({}, {"train_turns": "flagged"}):
                flagged = [QUESTION[0], {**ANSWERED[1], name: value}]
                with pytest.raises(TemplateError, match=f"^message 1: {name} is .*, it must be 0 or 1"):
                    render(source, flagged, **arguments)
        spans = {}
        for value in (0, 1, False, True, 0.0, 1.0):
            spans[repr(value)] = render(source, [QUESTION[0], {**ANSWERED[1], name: value}], train_turns="flagged")[1]
        assert not spans["0"] and not spans["False"] and not spans["0.0"]
        assert spans["1"] and spans["1"] == spans["True"] == spans["1.0"]


TEXTS = {  # of a turn, by names that other formats have for them
    "reasoning_details": [{"type": "text", "text": "6 times 7"}],
    "thinking_blocks": [{"type": "thinking", "thinking": "6 times 7"}],
    "tool_plan": "I look it up.",
    "function_call": {"name": "prime", "arguments": "{}"},
    "refusal": "I will not.",
    "thought": "6 times 7",
    "reasoning_content": ["6 times 7"],
    "any_other": "text",
}


@families
def test_no_key_that_holds_text_is_dropped(family):
    source = template(family.name)
    for number in range(2):
        for key, value in TEXTS.items():
            said = [dict(message) for message in ANSWERED]
            said[number][key] = value
            with pytest.raises(TemplateError, match=f"^message {number}: .*{key}"):
                render(source, said)
            with pytest.raises(TemplateError, match=f"^message {number}: .*{key}"):
                render(source, [*said, QUESTION[0]], prompt=True)
            said[number][key] = None
            assert render(source, said) == render(source, ANSWERED)
    kept = {"name": "Ada", "id": 5, "refusal": "", "annotations": [], "audio": None, "weight": 0.5, "function_call": {}}
    if family.writes_names:
        del kept["name"]
    assert render(source, [QUESTION[0], ANSWERED[1] | kept]) == render(source, ANSWERED)
    asked = [{**QUESTION[0], "reasoning_content": "hm"}, ANSWERED[1]]
    with pytest.raises(TemplateError, match=r"^message 0: .*(reasoning_content|thinking)"):
        render(source, asked)


REASONING_NEEDS = {"chatml": {"keep_thinking": "on"}, "deepseek_v3_1": {"thinking": True}}


@families
def test_reasoning_by_its_other_names(family):
    """transformers hands it over under all of them; a server that does not, and two that differ, are refused."""
    source = template(family.name)
    arguments = REASONING_NEEDS.get(family.name, {})
    if not family.reasoning and not arguments:
        pytest.skip("not in this family: a place for reasoning")
    wanted = render(source, [QUESTION[0], ANSWERED[1] | {"reasoning_content": "6 times 7"}], **arguments)
    assert "6 times 7" in wanted[0]
    for name in ("reasoning", "thinking"):
        assert render(source, [QUESTION[0], ANSWERED[1] | {name: "6 times 7"}], **arguments) == wanted
        both = {"reasoning_content": "6 times 7", name: "6 times 7"}
        assert render(source, [QUESTION[0], ANSWERED[1] | both], **arguments) == wanted
        with pytest.raises(TemplateError, match=f"^message 1: .*{name}"):
            render(source, [QUESTION[0], ANSWERED[1] | both | {name: "6 times 8"}], **arguments)
        with pytest.raises(TemplateError, match=f"^message 1: .*{name}"):
            render_elsewhere(source, [QUESTION[0], ANSWERED[1] | {name: "6 times 7"}], **arguments)


SPLIT = "qwen3 qwen3_5 qwen3_6 qwen3_8 qwen3_thinking_2507 qwq step3_5 step3_qwen3 glm4_6 nemotron_3 deepseek_r1"
SPLIT = (SPLIT + " deepseek_r1_distill deepseek_v3").split()


@pytest.mark.parametrize("name", SPLIT)
def test_a_think_block_in_content_is_the_reasoning(name):
    family, source = next(family for family in ALL_FAMILIES if family.name == name), template(name)
    inline = "<think>\n6 times 7\n</think>\n\n42"
    for thinking in ("on", "masked"):
        apart = [QUESTION[0], {"role": "assistant", "content": "42", "reasoning_content": "6 times 7"}]
        wanted = render(source, apart, train_thinking=thinking)
        assert "6 times 7" in wanted[0] and "42" in wanted[0]
        for said in (inline, inline.removeprefix("<think>\n"), "<think>6 times 7</think>42"):
            block = [QUESTION[0], {"role": "assistant", "content": said}]
            assert render(source, block, train_thinking=thinking) == wanted, said
    lossy = ["before " + inline, inline + "<think>more</think>", "a</think>b</think>c", "<think>a<think>b</think>c"]
    for said in lossy:
        with pytest.raises(TemplateError, match="^message 1: think tags inside content"):
            render(source, [QUESTION[0], {"role": "assistant", "content": said}])
    with pytest.raises(TemplateError, match="^message 1: think tags inside content"):
        render(source, [QUESTION[0], {"role": "assistant", "content": inline, "reasoning_content": "b"}])
    if "enable_thinking" in family.arguments:
        with pytest.raises(TemplateError, match="^message 1: "):
            render(source, [QUESTION[0], {"role": "assistant", "content": inline}], enable_thinking=False)


@pytest.mark.parametrize(("name", "block"), [("lfm2_5", "<think>a</think>"), ("smollm3", "<think>\na\n</think>\n")])
def test_a_think_block_that_stays_in_content_is_masked_with_it(name, block):
    source, said = template(name), [QUESTION[0], {"role": "assistant", "content": block + "42"}]
    text, spans = render(source, said, train_thinking="masked")
    assert text == render(source, said)[0] and block + "42" in text
    assert [text[start:end] for start, end in spans][0].lstrip("\n").startswith("42")


@families
def test_a_trained_span_ends_on_a_whole_character(family):
    """transformers ends a span on the first token of its last character, and most tokenizers have several for these."""
    tokenizer, seen = tokenizer_of(family, "small"), 0
    for said in ("Let me look \U0001f979", "\U00020000", "查一下。", "café"):
        calls = [{**CALL, "id": "call00000"}]
        message = {"role": "assistant", "content": said, "tool_calls": calls}
        reply = {"role": "tool", "content": "yes", "tool_call_id": "call00000", "name": "prime"}
        if family.parts:
            parts = [{"type": "text", "text": said}, {"type": "python", "text": "1"}]
            message = {"role": "assistant", "content": [*parts, {"type": "python_output", "text": "1"}]}
        messages = [QUESTION[0], message, *([] if family.parts else [reply])]
        for arguments in ({"train_tool_calls": "masked"}, {"train_tool_calls": "masked", "train_thinking": "masked"}):
            try:
                ours = tokenizer.apply_chat_template(
                    messages[:2],
                    chat_template=template(family.name),
                    return_dict=True,
                    return_assistant_tokens_mask=True,
                    **arguments,
                )
            except TemplateError:  # no place for text beside a call
                continue
            trained = [i for i, on in zip(ours["input_ids"], ours["assistant_masks"], strict=True) if on]
            text = tokenizer.decode(trained)
            assert said in text or family.name == "gpt_oss" and "train_thinking" in arguments  # its analysis
            assert "\ufffd" not in text and "97" not in text and "1" not in text.partition(said)[2]
            seen += 1
    assert seen or not (family.tools and family.text_before_calls or family.parts)


@families
def test_an_answer_that_closes_an_opened_thought_is_found(family):
    """And no other: its first token, the newlines of prompt and answer in one, stands in no request."""
    tokenizer, source = tokenizer_of(family), template(family.name)
    remedy = Renderer(source).empty_thought_remedy
    for think in [None, *family.arguments.get("enable_thinking", ())]:
        for said in (ANSWERED, [QUESTION[0], ANSWERED[1] | {"reasoning_content": "because"}]):
            arguments = {} if think is None else {"enable_thinking": think}
            try:
                rendered = Renderer(source).render({"chat_template_kwargs": arguments}, said)
            except InvalidRow:
                continue
            before = family.prompt(QUESTION, **arguments)
            output = "".join(part for part, _ in family.output(said, **arguments))
            merged = merges(tokenizer, before, output)
            assert bool(find_empty_thoughts(rendered)) == merged
            if merged:
                switch = "enable_thinking" in family.arguments
                assert ("pass enable_thinking=false in chat_template_kwargs for these rows" in remedy) == switch
                assert "strip" not in remedy and "give them reasoning" in remedy


def test_every_template_begins_with_the_same_checks():
    """One text in all, so that a mended one is mended everywhere; nanochat alone takes content in parts, and Phi-4-mini
    the tools of a message."""
    texts = set()
    for family in ALL_FAMILIES:
        text = template(family.name).partition("{#- what a message holds is rendered or refused, never dropped -#}")[2]
        text = text.partition("\n{%- endfor %}\n")[0]
        if family.name == "nanochat":
            text = text.replace("{%- if message.role == 'system' and ", "{%- if ").replace(
                "only other turns may have parts", "this template has no place for content parts"
            )
        if family.name == "phi4_mini":
            text = text.replace(" and not (message.role in ('system', 'user') and key == 'tools')", "")
        texts.add(text)
    assert len(texts) == 1 and texts.pop().count("raise_exception") == 3


def steptron_spans(messages, tools):
    """StepTron's own way: a turn is what its prefix adds to the prefix before it, on the published Qwen3 template."""
    source = (UPSTREAM / "qwen3.jinja").read_text(encoding="utf-8")
    full, spans, stable = render(source, messages, tools)[0], [], True
    last_user = max(i for i, m in enumerate(messages) if m["role"] == "user")
    for k, message in enumerate(messages):
        if k > last_user and message["role"] == "assistant" and message.get("loss_mask", 1) == 1:
            before = render(source, messages[:k], tools, True)[0]
            after = render(source, messages[: k + 1], tools)[0]
            stable = stable and full.startswith(before) and full.startswith(after)
            spans.append((len(before), len(after)))
    return full, spans, stable


def test_step3_qwen3_has_the_mask_of_steptron():
    family, source, seen = next(f for f in ALL_FAMILIES if f.name == "step3_qwen3"), template("step3_qwen3"), Counter()

    @settings(
        max_examples=1500, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(conversations(family), st.integers(0, 2**32 - 1))
    def run(conversation, seed):
        messages, tools, _ = conversation
        random = Random(seed)
        messages = [{k: v for k, v in m.items() if k not in ("loss_mask", "train")} for m in messages]
        for message in (m for m in messages if m["role"] == "assistant"):
            if random.random() < 0.5:
                message["loss_mask"] = random.randint(0, 1)
            if random.random() < 0.6:  # most turns reason: only then is every prefix a true one
                message["reasoning_content"] = random.choice(["20 - 7 = 13.", "用", "a\n\nb"])
        try:
            text, ours = render(source, messages, tools)
        except TemplateError:  # nothing was asked, so the format shows no reasoning
            seen["refused"] += 1
            return
        full, theirs, stable = steptron_spans(messages, tools)
        assert text == full
        assert not stable or ours == theirs
        seen[stable] += 1
        seen["spans"] += len(ours)

    run()
    assert seen[True] > 500 and seen[False] > 50 and seen["spans"] > 500, seen


# ---------------------------------------------------------------- rule 1: the published renderings


@cache
def renderings():
    """Published templates' renderings: those of ../shared where it is, and our own files, one a family."""
    found = []
    if (SHARED / "golden").is_dir():
        found = json.loads((SHARED / "golden" / "renderings.json").read_text(encoding="utf-8"))
    for path in sorted((REPO / "tests" / "templates" / "published_renderings").glob("*.jsonl")):
        found += [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return found


def published(family):
    return [r for r in renderings() if r["family"] in family.golden]


@families
def test_published_renderings(family):
    if not family.golden:
        pytest.skip("not in this family: a published rendering at hand")
    cases = published(family)
    if not cases:
        pytest.skip("no ../shared/golden: renderings not at hand")
    assert len(cases) >= 18 * len(family.golden)
    used, source = set(), serving(template(family.name))
    for case in cases:
        key = (case["case"], case["kind"])
        reason = family.differences.get(key) or family.differences.get(("*", case["kind"]))
        used.add(key if key in family.differences else ("*", case["kind"]))
        arguments = {**case["kwargs"], **family.golden_arguments(case)}
        prompt = case["kind"] == "request"
        try:
            text, _ = render(
                source, case["messages"], case["tools"], prompt, case["bos_token"], case["eos_token"], **arguments
            )
        except TemplateError as error:
            assert reason and re.match(r"message \d+: ", str(error)), f"{key}: {error}"
            text = None
        assert (text == case["text"]) == (reason is None), f"{key}: {reason}\n{text}\n{case['text']}"
        try:
            hand = family.history(case["messages"], case["tools"], **arguments) + (
                family.prompt(case["messages"], **arguments) if prompt else ""
            )
            if not prompt and case["messages"][-1]["role"] == "assistant":
                hand = expected(family, case["messages"], case["tools"], **arguments)[0]
        except Refused:
            hand = None
        if hand and family.bos:
            hand = case["bos_token"] + hand.removeprefix(family.bos)
        assert hand == text, f"{key}: the oracle disagrees"
    assert set(family.differences) <= used, f"differences that no case shows: {set(family.differences) - used}"


def drops(family, message, tools):
    """Does upstream silently drop something of this message or its tools?"""
    calls = message.get("tool_calls")
    return (
        ("reasoning" in family.drops and message.get("reasoning_content"))
        or ("tools" in family.drops and (tools or calls and family.tool_list))
        or (calls and not family.text_before_calls and message["content"].strip())
    )


@families
def test_requests_equal_upstreams_on_random_conversations(family):
    """The unmarked templates inside TRL are the published ones: the same request for every random history."""
    if not family.upstream:
        pytest.skip("not in this family: a template that TRL carries")
    theirs, ours, seen = (
        (UPSTREAM / family.upstream).read_text(encoding="utf-8"),
        serving(template(family.name)),
        Counter(),
    )

    for messages, tools, arguments in samples(family):
        arguments = {name: value for name, value in arguments.items() if name in family.upstream_arguments}
        dated = {"date_string": datetime.now().strftime(family.upstream_date)} if family.upstream_date else {}
        for k, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if any(drops(family, m, tools) for m in messages[:k]):
                continue
            try:
                request = render(
                    theirs, messages[:k], tools, True, family.bos, family.eos, **{**family.upstream_needs, **arguments}
                )[0]
            except (TemplateError, TypeError):  # what upstream refuses or breaks on, we refuse
                if family.string_arguments:
                    continue
                with pytest.raises(TemplateError):
                    render(ours, messages[:k], tools, True, family.bos, family.eos, **arguments, **dated)
                continue
            assert render(ours, messages[:k], tools, True, family.bos, family.eos, **arguments, **dated)[0] == request
            seen["requests"] += 1

    assert seen["requests"] > SAMPLES // 2


STRING = {"type": "string"}
SCHEMAS = [
    {
        "text": {**STRING, "description": "A text", "default": "x"},
        "unit": {**STRING, "enum": ["C", "F"], "default": "C", "description": "Unit"},
        "maybe": {**STRING, "nullable": True},
        "n": {"type": "integer", "default": 3},
        "x": {"type": "number", "nullable": True},
        "flag": {"type": "boolean", "default": False},
        "tags": {"type": "array", "items": STRING, "description": "Tags"},
        "ids": {"type": "array", "items": {"type": "integer"}, "nullable": True},
        "any": {"type": "array"},
        "rows": {"type": "array", "items": {"type": "object", "properties": {"b": STRING, "A": {"type": "number"}}}},
        "place": {"type": "object", "properties": {"city": STRING, "zip": {"type": "integer"}}, "required": ["city"]},
        "bag": {"type": "object"},
    },
    {
        "q": {"type": ["string", "null"]},
        "o": {"oneOf": [{**STRING, "description": "s"}, {"type": "number", "default": 1}]},
        "u": {"oneOf": [{"type": "object"}, STRING]},
        "z": {},
    },
    {},
]


@families
def test_tool_lists_equal_upstreams(family):
    """Every kind of schema, as the families that rewrite schemas (gpt-oss, Gemma 4, Nemotron 3) spell it out."""
    if not family.upstream or not family.tool_list or "tools" in family.drops or not family.tools:
        pytest.skip("not in this family: a published tool list")
    theirs, ours = (UPSTREAM / family.upstream).read_text(encoding="utf-8"), serving(template(family.name))
    dated = {"date_string": datetime.now().strftime(family.upstream_date)} if family.upstream_date else {}
    rich = [tool(f"t{i}", **properties) for i, properties in enumerate(SCHEMAS)]
    for tools in (*([one] for one in rich), rich):
        question = [{"role": "user", "content": "?"}]
        request = render(theirs, question, tools, True, family.bos, family.eos, **family.upstream_needs)[0]
        assert (
            render(ours, question, tools, True, family.bos, family.eos, **family.upstream_needs, **dated)[0] == request
        )


POOR = {  # tools that schemas of others leave out parts of
    "no description": {"name": "ping", "parameters": {"type": "object", "properties": {}}},
    "none at a parameter": {"name": "ping", "parameters": {"type": "object", "properties": {"q": {"type": "string"}}}},
    "no type": {"name": "ping", "description": "d", "parameters": {"type": "object", "properties": {"q": {}}}},
    "no parameters": {"name": "ping", "description": "d"},
    "empty parameters": {"name": "ping", "description": "d", "parameters": {}},
    "a name alone": {"name": "ping"},
}


@pytest.mark.parametrize("case", [*POOR, "bare"])
@families
def test_poor_tools_are_as_upstream_has_them_or_refused(family, case):
    """Never a Python error: what upstream renders is rendered so, and what it breaks on is one sentence."""
    if not family.tools or not family.tool_list:
        pytest.skip("not in this family: a place for a tool list")
    tools = [POOR["no type"] if case == "bare" else {"type": "function", "function": POOR[case]}]
    dated = {"date_string": datetime.now().strftime(family.upstream_date)} if family.upstream_date else {}
    given = (QUESTION, tools, True, family.bos, family.eos)
    try:
        ours = render(serving(template(family.name)), *given, **family.upstream_needs, **dated)[0]
    except TemplateError as error:
        assert type(error) is TemplateError and re.match(r"tool 0: ", str(error)), error
        ours = None
    assert ours is None or "ping" in ours
    if family.upstream and "tools" not in family.drops:
        try:
            theirs = render((UPSTREAM / family.upstream).read_text(), *given, **family.upstream_needs)[0]
        except (TemplateError, TypeError):
            theirs = None
        assert ours == theirs


MORE_SCHEMAS = [  # what the encoder of gpt-oss spells otherwise than the template
    *SCHEMAS,
    {
        "titled": {**STRING, "title": "T", "description": "D", "examples": ["a", 1, "b"]},
        "either": {"description": "D", "default": "x", "oneOf": [{**STRING, "description": "D"}, {"type": "number"}]},
        "other": {"description": "D", "oneOf": [{**STRING, "description": "s", "default": "x", "nullable": True}]},
        "kinds": {"type": ["integer", "string"]},
        "deep": {
            "type": "object",
            "description": "O",
            "properties": {
                "a": {
                    "type": "array",
                    "items": {"type": "object", "properties": {"b": {**STRING, "enum": ["x", "y"], "default": "x"}}},
                }
            },
        },
        "bag": {"type": "array", "items": {"oneOf": [STRING, {"type": "integer", "default": [1], "description": "n"}]}},
        "list": {"type": "array", "items": STRING, "default": ["a", {"b": 1.5}]},
        "null": {"type": "null"},
        "words": {**STRING, "enum": ["a", None]},
        "never": {**STRING, "enum": []},
    },
]


@pytest.fixture(scope="module")
def harmony(tmp_path_factory):
    """OpenAI's encoder; its vocabulary, which it would download, is that of gpt-oss's tokenizer in its own form."""
    package = pytest.importorskip("openai_harmony", reason="openai-harmony is not installed: requirements-dev.txt")
    path = SHARED / "tokenizers" / "gpt-oss" / "tokenizer.json"
    if not path.is_file():
        pytest.skip("no ../shared/tokenizers/gpt-oss: the encoder would download its vocabulary")
    definition, letters = json.loads(path.read_text(encoding="utf-8")), bytes_to_unicode()
    added, numbers = {token["content"] for token in definition["added_tokens"]}, {c: b for b, c in letters.items()}
    folder, lines = tmp_path_factory.mktemp("harmony"), []
    for token, rank in sorted(definition["model"]["vocab"].items(), key=lambda item: item[1]):
        if token not in added:
            lines.append(base64.b64encode(bytes(numbers[letter] for letter in token)) + b" %d\n" % rank)
    (folder / "o200k_base.tiktoken").write_bytes(b"".join(lines))  # the encoder compares its hash
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_ENCODINGS_BASE", str(folder))
        return package, package.load_harmony_encoding(package.HarmonyEncodingName.HARMONY_GPT_OSS)


def as_openai(package, messages, tools, effort="Medium"):
    """The conversation as vLLM hands it to the encoder: no analysis from before the last final answer."""
    message, text = package.Message, package.Message.from_role_and_content
    system = package.SystemContent.new().with_conversation_start_date("2025-08-05")
    said = [text(package.Role.SYSTEM, system.with_reasoning_effort(package.ReasoningEffort(effort)))]
    own = messages[0]["role"] == "system"
    if own and messages[0]["content"] or tools:
        developer = package.DeveloperContent.new()
        if own and messages[0]["content"]:
            developer = developer.with_instructions(messages[0]["content"])
        if tools:
            of = [tool["function"] for tool in tools]
            described = [(one["name"], one.get("description") or "", one.get("parameters")) for one in of]
            new = package.ToolDescription.new
            developer = developer.with_function_tools([new(a, b, parameters=c) for a, b, c in described])
        said.append(text(package.Role.DEVELOPER, developer))
    finals = [i for i, one in enumerate(messages) if one["role"] == "assistant" and not one.get("tool_calls")]
    for i, one in enumerate(messages[own:], own):
        if one["role"] == "user":
            said.append(text(package.Role.USER, one["content"]))
        elif one["role"] == "tool":
            author = package.Author.new(package.Role.TOOL, "functions." + one["name"])
            reply = message.from_author_and_content(author, one["content"])
            said.append(reply.with_channel("commentary").with_recipient("assistant"))
        else:
            if one.get("reasoning_content") and i > max(finals, default=-1):
                said.append(text(package.Role.ASSISTANT, one["reasoning_content"]).with_channel("analysis"))
            channel = "commentary" if one.get("tool_calls") else "final"
            if one["content"] or channel == "final":
                said.append(text(package.Role.ASSISTANT, one["content"]).with_channel(channel))
            for call in one.get("tool_calls") or []:
                called = text(package.Role.ASSISTANT, json.dumps(call["function"]["arguments"], ensure_ascii=False))
                called = called.with_channel("commentary").with_recipient("functions." + call["function"]["name"])
                said.append(called.with_content_type("<|constrain|>json"))
    return package.Conversation.from_messages(said)


def test_gpt_oss_with_harmony_is_openais_encoder(harmony):
    """Requests token by token, for every schema and random conversations; and what the encoder reads of our answers."""
    package, encoding = harmony
    family = next(family for family in ALL_FAMILIES if family.name == "gpt_oss")
    tokenizer, source, seen = tokenizer_of(family), template("gpt_oss"), Counter()

    def same_request(messages, tools):
        ours = render(serving(source), messages, tools, True, harmony=True)[0]
        theirs = encoding.render_conversation_for_completion(
            as_openai(package, messages, tools), package.Role.ASSISTANT
        )
        assert ours == encoding.decode_utf8(theirs)
        assert encode(tokenizer, ours) == theirs
        seen["requests"] += 1

    poor = [{"type": "function", "function": one} for one in POOR.values()]
    rich = [tool(f"t{i}", **properties) for i, properties in enumerate(MORE_SCHEMAS)]
    lined = [
        {"type": "function", "function": {"name": "a", "description": text}} for text in ("", "a\nb\n", "a\r\n\nb")
    ]
    for tools in (*([one] for one in [*poor, *rich, *lined]), [*poor, *rich]):
        same_request(QUESTION, tools)
    for messages, tools, _ in samples(family):
        if any(len(message.get("tool_calls") or []) > 1 for message in messages):
            continue
        for k, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            same_request(messages[:k], tools)
            output = "".join(part for part, _ in family.output(messages[: k + 1], harmony=True))
            read = encoding.parse_messages_from_completion_tokens(encode(tokenizer, output), package.Role.ASSISTANT)
            wanted = as_openai(package, messages[k : k + 1], None).messages[1:]
            if not message.get("tool_calls") and message.get("reasoning_content") is not None:
                thought = package.Message.from_role_and_content(package.Role.ASSISTANT, message["reasoning_content"])
                wanted.insert(0, thought.with_channel("analysis"))
            assert read == wanted
            seen["calls" if message.get("tool_calls") else "finals"] += 1
    assert seen["requests"] > 2 * SAMPLES and seen["calls"] >= SAMPLES // 5 and seen["finals"] > SAMPLES, seen


# ---------------------------------------------------------------- the serving form


@families
def test_serving_form_renders_the_same(family):
    source = template(family.name)
    plain = serving(source)
    assert has_generation_markers(source) and not re.search(r"{%\W?\s*(end)?generation", plain)
    seen = Counter()

    for messages, tools, arguments in samples(family):
        for prompt in (False, True):
            results, said = [], messages[:-1] if prompt else messages
            for form in (source, plain):
                try:
                    results.append(render(form, said, tools, prompt, family.bos, family.eos, **arguments)[0])
                except TemplateError as error:
                    results.append(f"refused: {error}")
            assert results[0] == results[1]
            seen[prompt] += not results[0].startswith("refused: ")
    assert min(seen.values()) > SAMPLES // 2


@families
def test_no_membership_is_asked_of_an_argument_that_may_be_missing(family):
    """jinja2 says no; llama.cpp ends with "Cannot perform operation in on undefined values", and no prompt is built."""
    tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(serving(template(family.name)))
    arguments, asked = meta.find_undeclared_variables(tree) - {"value"}, []  # that one is asked for first
    for node in tree.find_all(nodes.Compare):
        if isinstance(node.expr, nodes.Name) and {operand.op for operand in node.ops} & {"in", "notin"}:
            asked.append(node.expr.name)
    assert {"messages", "train_turns"} <= arguments and not arguments & {*asked}


@families
def test_trl_takes_the_template_as_it_is(family):
    tokenizer = tokenizer_of(family)
    assert is_chat_template_stop_token_trained(tokenizer, template(family.name)) == family.stop_probe
