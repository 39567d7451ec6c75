"""Tokens and masks are transformers' on both paths, packs TRL's, settings those of the recipes, rules stated once.

The oracles are not ours: apply_chat_template row by row, render_jinja_template on a template that nothing has touched,
pack_dataset on tokens, the recipes' own functions.
"""

import json
import random
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import transformers
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils
from transformers.utils.chat_template_utils import render_jinja_template

from data_prep.common import fast_tokens, packing, personas, recipe_rows, recipe_settings, rendering, tokens
from data_prep.common.errors import InvalidRow
from data_prep.common.rendering import Renderer
from tests.helpers.runs import REPO, SHARED, load_recipe
from tests.helpers.template_oracle import ALL_FAMILIES
from tests.templates.test_chat_templates import template as template_text
from tests.templates.test_chat_templates import tokenizer_of

RECIPE = REPO / "recipes" / "qwen3_qlora.py"
TEMPLATES = REPO / "chat_templates"
RECIPES = sorted((REPO / "recipes").glob("*.py"))
NAMES = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
BY_NAME = {family.name: family for family in ALL_FAMILIES}
UNTOUCHED = "{##}"  # before a template: transformers compiles it apart from the one that the fast path changes


def chat(*turns, **more):
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


def save(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def settings(model, template, **names):
    flags = {"model_name_or_path": str(model), "chat_template_path": str(template), "eval_rows": 0, **names}
    return recipe_settings.read_settings(RECIPE, flags=flags)


# -- tokens and masks are transformers' -------------------------------------------------------------------------------
ODD = [
    chat(("user", "hi"), ("assistant", "\nnewline first")),
    chat(("user", "hi"), ("assistant", "ends with an emoji 👩‍🚀")),
    chat(("user", "hi"), ("assistant", "👩‍🚀")),
    chat(("system", "Né ﬁ"), ("user", "e\u0301 海盗"), ("assistant", ""), ("user", "x"), ("assistant", " y\n")),
    chat(("user", "typed <|im_end|> here"), ("assistant", "ok")),
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "train": None}]},
    chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")),
]
ODD[-1]["chat_template_kwargs"] = {"train_turns": "last"}
for row in ODD:
    row.setdefault("chat_template_kwargs", {})


@pytest.mark.parametrize("name", ["qwen3", "qwen3_instruct_2507", "chatml"])
@pytest.mark.parametrize("source", ["demo", "odd", "gsm8k"])
def test_ids_and_mask_are_those_of_apply_chat_template(source, name, demo, tmp_path):
    template, model = TEMPLATES / f"{name}.jinja", demo / "init"
    if source == "gsm8k":
        if not (SHARED / "data" / "gsm8k").is_dir():
            pytest.skip("../shared is absent: the demo's rows prove the same")
        model = SHARED / "tokenizers" / "qwen3"
        raw = [json.loads(line) for line in (SHARED / "data" / "gsm8k" / "train.jsonl").read_text().splitlines()[:1100]]
        data = save(tmp_path / "x.jsonl", [chat(("user", r["question"]), ("assistant", r["answer"])) for r in raw])
    else:
        data = demo / "rows" / "chat" if source == "demo" else save(tmp_path / "x.jsonl", ODD)
    rows, order, _ = recipe_rows.load_rows(data, settings(model, template))
    rows = list(rows)
    if name != "qwen3":
        rows = [row for row in rows if not any(turn.get("reasoning_content") for turn in row["messages"])]
    assert len(order) >= len(rows) >= len(ODD)
    tokenizer, names = AutoTokenizer.from_pretrained(model), settings(model, template)
    docs = list(tokens.iter_documents(rows, rendering.load_renderer(names), names))
    assert [doc.number for doc in docs] == [*range(len(rows))]
    trained = 0
    for doc, row in zip(docs, rows, strict=True):
        wanted = tokenizer.apply_chat_template(
            row["messages"],
            tools=row.get("tools"),
            chat_template=template.read_text(),
            return_dict=True,
            return_assistant_tokens_mask=True,
            **(row.get("chat_template_kwargs") or {}),
        )
        assert doc.ids == wanted["input_ids"] and doc.mask() == wanted["assistant_masks"]
        assert doc.trained() == sum(wanted["assistant_masks"])
        assert doc.trained(3, 9) == sum(wanted["assistant_masks"][3:9])
        trained += doc.trained()
    assert trained > len(rows)


CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "0.7 é 海", "n": [1, {"x": None}]}}}
PARAMETERS = {"type": "object", "properties": {"at": {"type": "string", "description": "place"}}, "required": ["at"]}
TOOL = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": PARAMETERS}}
PIECES = [
    "river",
    " stone",
    "\n",
    "\n\n",
    "  ",
    "海盗",
    "e\u0301",
    "ﬁ",
    "👩‍🚀",
    "\u0338",
    "1234",
    "a\u00a0b",
    "\t",
    "?!",
]


def many_rows():
    """Rows of many shapes: turns, scripts, thoughts, calls, template arguments, and some that no template takes."""
    draw = random.Random(5)
    rows = [json.loads(json.dumps(row)) for row in ODD]
    for number in range(60):
        turns = []
        if number % 3 == 0:
            turns.append({"role": "system", "content": "You are " + "".join(draw.choices(PIECES, k=4))})
        for _ in range(draw.randint(1, 4)):
            turns.append({"role": "user", "content": "".join(draw.choices(PIECES, k=draw.randint(1, 30)))})
            answer = {"role": "assistant", "content": "".join(draw.choices(PIECES, k=draw.randint(1, 30)))}
            if number % 5 == 0:
                answer["reasoning_content"] = "".join(draw.choices(PIECES, k=9))
            turns.append(answer)
        row = {"messages": turns, "chat_template_kwargs": {}}
        if number % 4 == 0:
            row["tools"] = [TOOL]
            turns[-1] = {"role": "assistant", "content": "", "tool_calls": [CALL]}
            turns.append({"role": "tool", "name": "look", "content": '{"a": 0.7}'})
            turns.append({"role": "assistant", "content": "seen"})
        if number % 7 == 0:
            row["chat_template_kwargs"] = {"enable_thinking": False, "train_turns": "last"}
        if number % 11 == 0:
            row["tools"] = json.dumps([TOOL])
        rows.append(row)
    rows.append(chat(("pirate", "q"), ("assistant", "a"), chat_template_kwargs={}))
    rows.append(chat(("user", "half \ud800"), ("assistant", "a"), chat_template_kwargs={}))
    rows.append(chat(("user", "q"), ("assistant", "a"), chat_template_kwargs=None))
    rows.append({"messages": [], "chat_template_kwargs": {}})
    return rows


def other_tokenizer():
    """Not byte-level: pieces of words behind a blank, text normalized by NFKC, as SentencePiece has it."""
    backend = Tokenizer(models.BPE(byte_fallback=False, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    corpus = [turn["content"] for row in many_rows()[:60] for turn in row["messages"]]
    special = [AddedToken(name, special=True, normalized=False) for name in ("<unk>", "<|im_start|>", "<|im_end|>")]
    backend.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", bos_token="<|im_start|>")


def without_compiled_template(monkeypatch):
    """As in a transformers that has renamed the function: its own code goes on working."""
    monkeypatch.setattr(transformers.utils, "chat_template_utils", SimpleNamespace())


def without_namespace_values(monkeypatch):
    """As in a jinja that keeps the values of a namespace elsewhere."""
    program = SimpleNamespace(environment=SimpleNamespace(globals={"namespace": dict}))
    stand_in = SimpleNamespace(_compile_jinja_template=lambda template: program)
    monkeypatch.setattr(transformers.utils, "chat_template_utils", stand_in)


def tokenize(rows, template, tokenizer, names, encodings=False):
    """Return ({row: (ids, mask)}, {row: reason})."""
    failed = []
    numbered = [tokens.NumberedRow(number, row) for number, row in enumerate(rows)]
    renderer = Renderer(template, tokenizer)
    documents = tokens.tokenize_rows(numbered, renderer, names, True, failed, encodings)
    return {one.number: (one.ids, one.mask()) for one in documents}, {one.number: one.reason for one in failed}


def compare_paths(rows, template, tokenizer, names, monkeypatch):
    """Hold the fast path, both plain ones and transformers equal; return the number of rows that render."""
    for encoding in (False, True):
        found, failed = tokenize(rows, template, tokenizer, names, encoding)
        for number, (ids, mask) in found.items():
            row = rows[number]
            tools = row.get("tools")
            if isinstance(tools, str):
                tools = json.loads(tools)
            wanted = tokenizer.apply_chat_template(
                row["messages"],
                tools=tools,
                chat_template=UNTOUCHED + template,
                return_dict=True,
                return_assistant_tokens_mask=True,
                **row["chat_template_kwargs"],
            )
            assert (ids, mask) == (wanted["input_ids"], wanted["assistant_masks"]), number
        assert found.keys() | failed.keys() == set(range(len(rows)))
    for take_away in (without_compiled_template, without_namespace_values):
        with monkeypatch.context() as patch:
            take_away(patch)
            apply = mock.Mock(side_effect=tokenizer.apply_chat_template)
            patch.setattr(tokenizer, "apply_chat_template", apply)
            assert fast_tokens.missing_name() is not None
            assert tokenize(rows, template, tokenizer, names) == (found, failed)
            assert apply.call_count == len(found)
    assert fast_tokens.missing_name() is None
    return len(found)


@pytest.mark.parametrize("name", NAMES)
def test_both_paths_are_transformers_on_every_template(name, monkeypatch):
    """On the family's tokenizer, with the rows that its template takes."""
    rows = many_rows()
    if name in BY_NAME:
        tokenizer = tokenizer_of(BY_NAME[name], "small")
    else:
        tokenizer = tokenizer_of(BY_NAME["qwen3"], "small")
    text = template_text(name)
    assert compare_paths(rows, text, tokenizer, recipe_settings.Settings(assistant_only_loss=True), monkeypatch) >= 5


@pytest.mark.parametrize("name", ["qwen3", "smollm3", "llama3.2", "gpt-oss", "other"])
def test_both_paths_are_transformers_on_other_tokenizers(name, monkeypatch):
    """Also where the fast path cannot tell where a token stands; trained without a mask too."""
    if name == "other":
        tokenizer = other_tokenizer()
    elif (SHARED / "tokenizers" / name).is_dir():
        tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / name)
    else:
        pytest.skip("../shared is absent: the families' small tokenizers prove the same")
    text = template_text("chatml")
    names = recipe_settings.Settings(assistant_only_loss=True)
    assert (fast_tokens.token_widths(tokenizer) is None) == (name == "other")
    assert compare_paths(many_rows(), text, tokenizer, names, monkeypatch) >= 50
    whole, _ = tokenize(many_rows(), text, tokenizer, recipe_settings.Settings(assistant_only_loss=False))
    masked, _ = tokenize(many_rows(), text, tokenizer, names)
    assert {number: ids for number, (ids, _) in whole.items()} == {number: ids for number, (ids, _) in masked.items()}
    assert all(all(mask) for _, mask in whole.values())


def test_the_paths_agree_on_prompts_and_on_text(monkeypatch):
    tokenizer = tokenizer_of(BY_NAME["qwen3"], "small")
    pairs = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in many_rows()[:60]]
    texts = [{"text": turn["content"]} for row in many_rows()[:60] for turn in row["messages"]]
    paired_texts = [{"prompt": "q" + row["text"], "completion": row["text"] + "z"} for row in texts]
    for rows, is_chat in ((pairs, True), (texts, False), (paired_texts, False)):
        names = recipe_settings.Settings()
        renderer = Renderer(template_text("qwen3"), tokenizer)
        numbered = [tokens.NumberedRow(number, row) for number, row in enumerate(rows)]
        found = []
        for encodings, take_away in ((False, None), (True, None), (False, without_compiled_template)):
            with monkeypatch.context() as patch:
                if take_away:
                    take_away(patch)
                    fast_tokens.open_fast_path.cache_clear()
                documents = tokens.tokenize_rows(numbered, renderer, names, is_chat, [], encodings)
                found.append([(one.ids, one.mask()) for one in documents])
        fast_tokens.open_fast_path.cache_clear()
        assert found[0] == found[1] == found[2] and len(found[0]) == len(rows)
        assert all(0 in mask for _, mask in found[0]) == (rows is not texts)


MARKED = "{% generation %}{{ messages[1].content }}{% endgeneration %}"


@pytest.mark.parametrize(
    "template",
    [
        MARKED + "{{ messages[0].content }}",  # a span that ends at token 0 trains all that follows
        MARKED + MARKED + "{{ messages[0].content }}",
        "{{ messages[0].content }}" + MARKED + MARKED,  # spans that touch
        "{{ messages[0].content }}" + MARKED + "{{ messages[0].content }}" + MARKED,
        "{{ messages[0].content }}{% generation %}{% endgeneration %}" + MARKED,  # an empty one
    ],
)
def test_the_quirks_of_a_mask_are_transformers(template, monkeypatch):
    rows = []
    for answer in ("a", "ab c", "e\u0301", "海", " ", "\n\n"):
        for question in ("q", "海盗", " "):
            rows.append(chat(("user", question), ("assistant", answer), chat_template_kwargs={}))
    names = recipe_settings.Settings(assistant_only_loss=True)
    assert compare_paths(rows, template, tokenizer_of(BY_NAME["qwen3"], "small"), names, monkeypatch) == len(rows)


def test_spans_lie_apart():
    characters = [rendering.Span(0, 3), rendering.Span(3, 5), rendering.Span(7, 8)]
    assert tokens.token_spans(lambda place: place, characters, 9) == [(0, 5), (7, 8)]
    assert tokens.mask_to_spans([1, 1, 0, 1]) == [(0, 2), (3, 4)] and tokens.mask_to_spans([]) == []


@pytest.mark.parametrize("name", BY_NAME)
def test_the_fast_path_finds_the_tokens_of_every_family(name):
    """By their bytes: else it would ask the tokenizer once more, which takes as long as TRL."""
    tokenizer = tokenizer_of(BY_NAME[name], "small")
    text = "".join(tokenizer.get_added_vocab()) + " e\u0301 海盗 👩‍🚀\n\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    fast_path = fast_tokens.open_fast_path(Renderer(template_text(name), tokenizer))
    assert fast_path.find_tokens(text, ids, [rendering.Span(0, len(text))])(0) == 0


def test_a_null_key_is_a_missing_key(demo):
    """Arrow fills nulls in; templates that ask whether a key is there must not see them."""
    tokenizer = AutoTokenizer.from_pretrained(demo / "init")
    template = "{{ messages[0].name is defined }}{{ eos_token }}"
    for name in (None, "x"):
        messages = [{"role": "user", "content": "q", "name": name}]
        wanted = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        assert Renderer(template, tokenizer).render({}, messages) == (wanted, [])


BODIES = [  # what the fast path reaches by a shorter way than jinja's sandbox, and what it must leave to it
    "{{ m.content.strip() }}|{{ m.content.split(',')[1].upper() }}|{{ m.content.replace('a', loop.index0 | string) }}",
    "{{ m.role.startswith('u') }}{{ m.role.endswith(('r', 't')) }}{{ m.content.rstrip().lstrip('a') }}",
    "{{ '-'.join(['a', m.role]) }}{{ m.role.title() }}{{ '%s {}'.format(m.role) }}{{ '{0.real}'.format(1) }}",
    "{{ m.absent is defined }}{{ m.absent or 'none' }}{{ m.absent }}{{ m.keys() | list }}{{ m.items() | length }}",
    "{% set ns = namespace(x=1, items=2) %}{% set ns.x = ns.x + 1 %}{{ ns.x }}{{ ns.items }}{{ ns.y is defined }}",
    "{{ loop.last }}{{ loop.previtem is defined }}{{ loop.cycle('a', 'b') }}{{ loop.changed(m.role) }}",
    "{{ m.absent.more }}",
    "{{ ns.absent.more }}",
    "{{ m.content.strip(1) }}",
    "{{ m.content.strip(chars='a') }}",
    "{{ m.content.__class__ }}",
    "{{ m.content.__class__.__mro__ }}",
    "{{ '{0.__class__.__mro__}'.format(m) }}",
    "{{ '{x.__class__}'.format_map({'x': m}) }}",
    "{{ m.content.strip.__self__ }}",
    "{{ m.pop('role') }}",
    "{{ m.update({'role': 'x'}) }}{{ m.role }}",
    "{{ messages.append(1) }}",
    "{% set ns = namespace(_x=1) %}{{ ns._x }}",
    "{% set ns = namespace(_x=1) %}{{ ns.__class__ }}{{ ns._Namespace__attrs }}",
    "{{ loop._iterable }}",
    "{{ raise_exception('no ' ~ m.role) }}",
    "{% set ns = namespace(obj=1, context=2, self=3) %}{{ ns.obj }}{{ ns.context }}{{ ns.self }}",
    "{% set ns = namespace(1) %}{{ ns.x }}",
    "{% set ns = namespace({'a': 1}, b=2) %}{% set ns.a = ns.b %}{{ ns.a }}{{ ns }}{{ namespace }}",
    "{% set ns = namespace({'_a': 1}) %}{{ ns._a }}",
    "{% set ns = namespace() %}{% set ns._a = 1 %}{{ ns._a }}",
    "{% set ns = namespace() %}{{ ns.a.b }}",
    "{% autoescape true %}{% generation %}{{ '<' }}{% endgeneration %}{% endautoescape %}{{ '<' }}",
    "{{ m.role }}{% generation %}{{ m.content }}{% endgeneration %}.",
    "{% generation %}{{ m.role }}{% generation %}{{ m.content.upper() }}{% endgeneration %}{% endgeneration %}",
    "{% generation %}{{ raise_exception('no ' ~ m.role) }}{% endgeneration %}",
    "{% macro said(m) %}{{ m.role }}{{ caller() }}{% endmacro %}{% call said(m) %}!{% endcall %}",
]


@pytest.mark.parametrize("body", BODIES)
def test_the_fast_path_renders_as_transformers_does(body):
    template = "{% for m in messages %}" + body + "{% endfor %}"
    messages = [{"role": "user", "content": " a,b ", "items": "a key of its own"}]
    messages.append({"role": "assistant", "content": "aca,d"})
    marked = "{% generation %}" in body
    fast_tokens.speed_up(template)
    environment = chat_template_utils._compile_jinja_template(template).environment
    assert "getattr" in vars(environment)
    untouched = chat_template_utils._compile_jinja_template(UNTOUCHED + template).environment
    assert "getattr" not in vars(untouched)
    outcomes = []
    for text in (UNTOUCHED + template, template):
        try:
            outcomes.append(render_jinja_template([messages], chat_template=text, return_assistant_tokens_mask=marked))
        except Exception as error:
            outcomes.append((type(error), str(error)))
    assert outcomes[0] == outcomes[1]


# -- a template of another family -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", BY_NAME)
def test_a_familys_template_belongs_to_its_tokenizer(name):
    for kind in ("real", "small"):
        assert Renderer(template_text(name), tokenizer_of(BY_NAME[name], kind)).mismatch is None


@pytest.mark.parametrize(
    ("template", "family", "words"),
    [
        ("gemma3", "qwen3", ["gemma3.jinja writes <start_of_turn>", "the tokenizer of Qwen/Qwen3-4B does not have"]),
        ("qwen3", "llama3", ["qwen3.jinja writes <|im_start|>", "pass --chat_template_path chat_templates/llama3"]),
        ("phi4", "gpt_oss", ["phi4.jinja writes <|im_start|>, <|im_sep|>, <|im_end|>"]),
        ("deepseek_v3", "qwen3", ["deepseek_v3.jinja writes bos_token", "it belongs to another family"]),
        # tokens that only rows with thoughts or tools need may be missing
        ("qwen3", "qwen2_5", None),
        ("llama3_1", "llama3", None),
    ],
)
def test_a_template_of_another_family_is_named(template, family, words):
    tokenizer = tokenizer_of(BY_NAME[family], "small")
    renderer = Renderer(template_text(template), tokenizer, f"{template}.jinja", "Qwen/Qwen3-4B")
    if words is None:
        assert renderer.mismatch is None
        return
    assert all(word in renderer.mismatch for word in words), renderer.mismatch
    try:
        renderer.render({}, [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])
    except InvalidRow as refusal:
        assert template == "deepseek_v3" and refusal.detail == renderer.mismatch


def test_another_undefined_name_is_the_templates_own():
    renderer = Renderer("{{ nothing.here }}", tokenizer_of(BY_NAME["qwen3"], "small"))
    with pytest.raises(InvalidRow) as refused:
        renderer.render({}, [{"role": "user", "content": "q"}])
    assert refused.value.detail == "UndefinedError: 'nothing' is undefined" and renderer.mismatch is None


def test_a_persona_that_takes_no_mark_is_looked_at_as_it_stands():
    """A template may refuse a persona that it does not know; one of these drops it."""
    refuses = (
        "{% for m in messages %}{% if m.role == 'system' and m.content != 'A pirate' %}{{ raise_exception('no') }}"
    )
    refuses += "{% endif %}{% if m.role != 'system' or SHOWN %}{{ m.content }}{% endif %}{% endfor %}"
    row = chat(("system", "A pirate"), ("user", "q"), ("assistant", "a"))
    for shown, lost in (("true", []), ("false", [("message 0", "A pirate")])):
        assert list(personas.find_lost_personas(row, Renderer(refuses.replace("SHOWN", shown)))) == lost
    row["messages"][0]["content"] = "A sailor"
    assert list(personas.find_lost_personas(row, Renderer(refuses))) == []


# -- rules that recipes repeat ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_serving_form_is_the_recipes(path):
    recipe = load_recipe(path)
    for name in NAMES:
        text = template_text(name)
        served = rendering.serving_template(text)
        assert served == recipe["serving_template"](text)
        assert rendering.has_markers(text) and not rendering.has_markers(served)


# -- packs are TRL's ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
@pytest.mark.parametrize("num_proc", [None, 2])
def test_packs_are_those_of_pack_dataset(strategy, num_proc):
    from trl import pack_dataset

    draw = random.Random(7)
    for count, longest, limit in ((2300, 90, 64), (1001, 300, 256), (7, 5, 3), (1, 9, 4)):
        lengths = [draw.choice((draw.randint(1, longest), draw.randint(1, 9), 0)) for _ in range(count)]
        lengths[0] = longest
        ids = [[row * 1000 + place for place in range(length)] for row, length in enumerate(lengths)]
        kwargs = {"num_proc": num_proc} if num_proc and count > 1000 else {}
        wanted = pack_dataset(Dataset.from_dict({"input_ids": ids}), limit, strategy, kwargs)["input_ids"]
        packs = packing.pack_lengths(lengths, limit, strategy, **kwargs)
        ours = [[token for row, start, end in one for token in ids[row][start:end]] for one in packs]
        assert ours == list(wanted)
    for one_stream in (False, True):
        assert packing.pack_lengths([], 4, strategy, one_stream=one_stream) == []
        assert packing.pack_lengths([0, 0], 4, strategy, one_stream=one_stream) == []


# -- settings and rows are the recipes' -------------------------------------------------------------------------------
def test_rows_are_held_out_as_the_recipe_draws_them():
    """With prompts of their own, with prompts of many rows, and where the recipe would stop."""
    draw_in_recipe = load_recipe("qwen3_full")["split_by_prompt"]
    draw = random.Random(0)
    for prompts, eval_rows in ((1000, 20), (30, 20), (3, 5), (3, 59), (1, 5), (30, 60)):
        numbers = [draw.randrange(prompts) for _ in range(60)]
        said = ["what is {}?", " what  is {}? /no_think", "what is\n{}? /think"]
        rows = []
        for number, prompt in enumerate(numbers):
            question = draw.choice(said).format(prompt)
            rows.append(chat(("user", question), ("assistant", f"a {number}"), number=number))
        rows = Dataset.from_list(rows)
        for seed in (42, 7):
            ours = recipe_rows.split_by_prompt(rows, eval_rows, seed)
            script_args = SimpleNamespace(dataset_name="rows.jsonl", eval_rows=eval_rows)
            try:
                theirs = draw_in_recipe(rows, script_args, seed)
            except ValueError:
                assert sorted(ours[0]) == [*range(60)] and ours[1] == []
                assert prompts in (1, 3) or eval_rows == 60
            else:
                assert [side["number"][:] for side in theirs] == [*ours] and ours[1]


def test_the_values_of_a_silent_recipe_are_trls(monkeypatch):
    from trl import SFTConfig

    args = [SFTConfig(use_cpu=True, bf16=False)]
    for recipe in (RECIPE.stem, "nanochat_midtrain", "nanochat_sft"):  # these have names of their own
        script = load_recipe(recipe)
        args.insert(0, script.get("NanochatArguments", script["RecipeArguments"])(dataset_name="x"))
    for name, value in recipe_settings.DEFAULTS.items():
        if name not in ("model_name_or_path", "model_revision", "chat_template_path"):
            assert {getattr(one, name) for one in args if hasattr(one, name)} == {value}, name


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_defaults_are_those_of_the_recipe_without_its_imports(path):
    assert len(RECIPES) >= 2 and recipe_settings.read_defaults(path) == load_recipe(path)["DEFAULTS"]
    code = f"import sys; from data_prep.common import recipe_settings; recipe_settings.read_defaults({str(path)!r})\n"
    code += "assert not {'torch', 'trl', 'transformers', 'datasets'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True)


def test_defaults_that_need_more_than_the_standard_library(tmp_path):
    (tmp_path / "mine.py").write_text("import numpy as np\nSIZE = int(np.int64(7))\nDEFAULTS = dict(max_length=SIZE)\n")
    assert recipe_settings.read_defaults(tmp_path / "mine.py") == {"max_length": 7}


def test_defaults_yaml_flags(tmp_path):
    (tmp_path / "run.yaml").write_text("max_length: 300\nseed: 1\nlearning_rate: 3.0e-4\nnum_train_epochs: 3\n")
    found = recipe_settings.read_settings(RECIPE, tmp_path / "run.yaml", {"seed": 2, "max_length": None})
    assert (found.max_length, found.seed, found.num_train_epochs, found.eval_rows) == (300, 2, 3, 200)
