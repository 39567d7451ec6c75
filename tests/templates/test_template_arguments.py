"""Arguments of chat templates cannot be misspelt: names and values that a template does not take are refused by name.

What would fool these tests, and what stands against it:
- the table agrees with itself alone: its names are compared with the oracle of the templates, written by hand, its
  values with the lists that the templates hold themselves to, and with values that the oracle renders;
- the names of a syntax tree are those of jinja2's own analysis with its mistakes: small templates whose names were
  found by eye, and TRL's;
- a refusal that only one command has: check, the tokens of preview, compile, mix and stats, and the start of a run.
"""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import trl
from datasets import Dataset
from hooks.checks import rows as row_checks
from hooks.messages import UsageError
from jinja2 import nodes
from transformers import AutoTokenizer

from data_prep import check
from data_prep.common import template_arguments
from data_prep.common.errors import InvalidRow
from data_prep.common.recipe_settings import Settings
from data_prep.common.rendering import Renderer
from data_prep.common.template_arguments import ARGUMENTS, Kind, check_without_template, read_arguments
from data_prep.common.tokens import NumberedRow, tokenize_rows
from tests.helpers.runs import REPO
from tests.helpers.template_oracle import ALL_FAMILIES
from tests.templates.test_chat_templates import choices, template

UPSTREAM = Path(trl.__file__).parent / "chat_templates"
CHAT = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "First."}]
QWEN3 = REPO / "chat_templates" / "qwen3.jinja"
families = pytest.mark.parametrize("family", ALL_FAMILIES, ids=lambda family: family.name)


def refusal(template_kwargs, text):
    """The detail that a template's arguments are refused with, or None."""
    try:
        read_arguments(text, "t.jinja").check(template_kwargs)
    except InvalidRow as error:
        assert error.reason == "template refuses the row"
        return error.detail
    return None


# -- the names --------------------------------------------------------------------------------------------------------
@families
def test_names_are_those_of_the_oracle(family):
    names = set(choices(family))
    if family.name == "step3_qwen3":  # of its published mask, which the oracle holds to StepTron's own arguments
        names |= {"enable_thinking", "train_thinking"}
    if family.name == "deepseek_v3_1":  # it counts where `thinking` is unset
        names |= {"enable_thinking"}
    assert read_arguments(template(family.name)).names == names


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("qwen3", {"enable_thinking"}),
        ("qwen3_instruct_2507", set()),
        ("llama3_1", {"builtin_tools", "custom_tools", "date_string", "tools_in_user_message"}),
        ("nemotron_3_nano", {"enable_thinking", "truncate_history_thinking"}),
        ("gemma4_v5", {"enable_thinking", "preserve_thinking"}),
        ("gptoss", {"builtin_tools", "model_identity", "reasoning_effort"}),
    ],
)
def test_names_of_published_templates(name, names):
    assert read_arguments((UPSTREAM / f"{name}.jinja").read_text()).names == names


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("{{ a }}{% set b = 1 %}{{ b }}", {"a"}),
        ("{% set a = a | default(1) %}{{ a }}", {"a"}),
        ("{% if a is not defined %}{% set a = 1 %}{% endif %}{{ a }}", {"a"}),
        ("{% if tools %}{% set a = 1 %}{% else %}{{ a }}{% endif %}", {"a"}),
        ("{% for m in messages %}{% set a = m %}{% for b in a %}{{ a ~ loop.index }}{% endfor %}{% endfor %}", set()),
        ("{% for m in messages if c %}{{ m }}{% else %}{{ m }}{% endfor %}", {"c", "m"}),
        ("{% macro f(x, y=z) %}{{ x ~ y ~ g(x) }}{% endmacro %}{% macro g(x) %}{{ w }}{% endmacro %}", {"z", "w"}),
        ("{% set a %}{{ b }}{% endset %}{{ a }}", {"b"}),
        ("{% set ns = namespace(a=b) %}{% set ns.a = c %}{{ ns.a }}", {"b", "c"}),
        ("{% for m in messages %}{% generation %}{{ a }}{% set b = 1 %}{{ b }}{% endgeneration %}{% endfor %}", {"a"}),
        ("{{ bos_token + raise_exception(strftime_now(range(3))) + tools }}{{ add_generation_prompt }}", set()),
        ("{% for d in documents %}{{ d }}{% break %}{% endfor %}", {"documents"}),
    ],
)
def test_names_found_by_eye(text, names):
    assert read_arguments(text).names == names


# -- the values -------------------------------------------------------------------------------------------------------
@families
def test_a_template_holds_itself_to_the_table(family):
    """Its own list of values, by which a recipe without hooks and a server refuse, is the table's."""
    arguments = read_arguments(template(family.name))
    tree = template_arguments.parse_template(template(family.name))
    listed = {}
    for row in tree.find_all(nodes.List):
        if len(row.items) == 3 and isinstance(row.items[1], nodes.Name):
            name, _, allowed = row.items
            assert name.value == row.items[1].name
            listed[name.value] = allowed.as_const()
    for name in arguments.names:
        argument = arguments.known[name]
        words = [value for value in (*argument.choices, True, False) if argument.allows(value)]
        if argument.kind in (Kind.CHOICE, Kind.SWITCH):
            assert sorted(map(repr, listed.pop(name))) == sorted(map(repr, words)), name
        elif argument.choices:
            assert f"if tool not in {list(argument.choices)}" in template(family.name)
    assert not listed


@families
def test_values_of_the_oracle_are_allowed(family):
    text = template(family.name)
    for name, values in choices(family).items():
        for value in (*values, None):
            assert refusal({name: value}, text) is None, (name, value)


WRONG = {
    Kind.CHOICE: ["nonsense", 1, 0, 1.5, ["on"], {"a": 1}],
    Kind.SWITCH: ["true", "false", 0, 1, 0.0, [True], "on"],
    Kind.TEXT: [5, True, ["a"], {"a": "b"}],
    Kind.TEXTS: ["browser", [5], [None], True, {"browser": 1}],
    Kind.LIST: ["browser", True, 5, {"a": 1}],
}


@families
def test_values_of_other_types_are_refused(family):
    text = template(family.name)
    arguments = read_arguments(text)
    seen = 0
    for name in arguments.names:
        for value in WRONG[arguments.known[name].kind]:
            detail = refusal({name: value}, text)
            assert detail and re.match(rf"{name} is .*, it must be ", detail), (name, value, detail)
            seen += 1
    assert seen > 10


def test_sentences():
    """One of each, and the nearest name or value with it."""
    gpt_oss = template("gpt_oss")
    assert refusal({"train_turn": "last"}, template("chatml")) == (
        "t.jinja does not read train_turn (did you mean train_turns?): it reads keep_thinking, train_header, "
        "train_tool_calls, train_turns"
    )
    assert refusal({"x": 1}, "{{ messages }}") == "t.jinja does not read x: it reads no argument"
    assert refusal({"reasoning_effort": "hihg"}, gpt_oss) == (
        "reasoning_effort is hihg, it must be one of medium, low, high (did you mean high?)"
    )
    assert refusal({"enable_thinking": "false"}, template("gemma4")) == (
        'enable_thinking is "false", it must be true or false'
    )
    assert refusal({"train_turns": True}, gpt_oss) == "train_turns is true, it must be one of all, last, flagged"
    assert refusal({"builtin_tools": ["pyhton"]}, gpt_oss) == (
        'builtin_tools is ["pyhton"], it must be a list of browser, python (did you mean python?)'
    )
    assert refusal({"date_string": 20250101}, gpt_oss) == "date_string is 20250101, it must be a text"


@families
def test_what_is_null_or_empty_is_unset(family):
    text = template(family.name)
    names = {argument.name for argument in ARGUMENTS} | {"of_another", "train_turn"}
    for empty in (None, "", []):
        assert refusal(dict.fromkeys(names, empty), text) is None
    assert refusal({}, text) is None


@families
@pytest.mark.parametrize("name", ["documents", "tools", "messages", "add_generation_prompt", "continue_final_message"])
def test_what_transformers_hands_over_is_no_argument(family, name):
    if name in choices(family):
        pytest.skip("not in this family: an argument that it does not read")
    assert f"does not read {name}" in refusal({name: True}, template(family.name))


def test_special_tokens_may_be_named():
    assert refusal({"bos_token": "<s>", "eos_token": "</s>"}, template("gemma4")) is None
    assert "does not read bos_token" in refusal({"bos_token": 5}, template("gemma4"))


def test_enable_thinking_says_what_a_row_is():
    """It may stand where nothing reads it, but for false where the prompt opens a think block all the same."""
    for name in ("chatml", "llama3_1", "gpt_oss", "deepseek_r1"):
        for value in (True, False):
            assert refusal({"enable_thinking": value}, template(name)) is None
        assert "does not read enable_thinking" in refusal({"enable_thinking": "false"}, template(name))
    for name in ("qwq", "step3_5", "qwen3_thinking_2507", "deepseek_r1_distill", "deepseek_v3"):
        assert refusal({"enable_thinking": True}, template(name)) is None
        assert "does not read enable_thinking" in refusal({"enable_thinking": False}, template(name))


def test_flagged_asks_for_what_a_template_may_do_by_itself():
    honours = (
        "{% for m in messages %}{% generation %}{{ m.content if m.loss_mask else '' }}{% endgeneration %}{% endfor %}"
    )
    assert refusal({"train_turns": "flagged"}, honours) is None
    assert "does not read train_turns" in refusal({"train_turns": "last"}, honours)
    assert "does not read train_turns" in refusal({"train_turns": "flagged"}, honours.replace("loss_mask", "content"))


def test_other_templates_are_held_to_what_families_agree_on():
    text = "{{ reasoning_effort }}{{ train_newline }}{{ builtin_tools }}{{ enable_thinking }}{{ own }}"
    for fine in ("none", "max"):
        assert refusal({"reasoning_effort": fine, "own": {"any": 1}, "builtin_tools": ["shell"]}, text) is None
    assert refusal({"reasoning_effort": 3}, text) == "reasoning_effort is 3, it must be a text"
    assert refusal({"builtin_tools": "shell"}, text) == 'builtin_tools is "shell", it must be a list of texts'
    for value in ("on", "off", True, False):
        assert refusal({"train_newline": value}, text) is None
    assert refusal({"train_newline": "onn"}, text).startswith("train_newline is onn, it must be one of on, off")
    assert "did you mean own?" in refusal({"owm": 1}, text)


def test_the_saved_form_is_the_family_too():
    from data_prep.common.rendering import serving_template

    text = serving_template(template("gpt_oss"))
    assert text != template("gpt_oss") and "one of medium, low, high" in refusal({"reasoning_effort": "xhigh"}, text)


def test_without_a_template():
    for fine in ({}, {"train_turns": "last"}, {"own_flag": 5}, {"reasoning_effort": "xhigh"}, {"keep_thinking": None}):
        check_without_template(fine)
    for bad, words in (
        ({"train_turn": "last"}, "reads train_turn (did you mean train_turns?)"),
        ({"enable_thinking": "false"}, 'enable_thinking is "false", it must be true or false'),
        ({"train_turns": "lats"}, "train_turns is lats"),
    ):
        with pytest.raises(InvalidRow) as caught:
            check_without_template(bad)
        assert words in caught.value.detail


# -- the table of the README ------------------------------------------------------------------------------------------
def test_the_readme_shows_the_table():
    text = (REPO / "chat_templates" / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| `\w+` \|.*$", text, re.M)
    rows = [f"| `{one.name}` | {one.values()} | {one.families} | {one.meaning} |" for one in ARGUMENTS]
    assert shown == rows
    for argument in ARGUMENTS:
        names = [read_arguments(template(family.name)).names for family in ALL_FAMILIES]
        readers = {one.name for one, read in zip(ALL_FAMILIES, names, strict=True) if argument.name in read}
        assert readers and set(argument.templates) <= readers
        if argument.families == "all":
            assert len(readers) == len(ALL_FAMILIES)


# -- check, the tokens of preview, compile, mix and stats, and the start of a run -------------------------------------
BAD = [
    {"train_turn": "last"},
    {"preserve_thinking": "false"},
    {"enable_thinking": "false"},
    {"reasoning_effort": "hihg"},
]


@pytest.mark.parametrize("template_kwargs", BAD, ids=str)
@families
def test_check_names_it(family, template_kwargs):
    """Each is refused in every family: the name is not read, or the value is of another kind."""
    (name,) = template_kwargs
    row = {"messages": CHAT, "chat_template_kwargs": template_kwargs}
    options = check.CheckOptions(Renderer(template(family.name), template_name="t.jinja"))
    refused = [fault for fault in check.find_faults(row, options) if fault.reason == "template refuses the row"]
    assert len(refused) == 1 and name in refused[0].detail


def test_tokens_name_it(demo):
    tokenizer = AutoTokenizer.from_pretrained(demo / "init")
    renderer = Renderer(QWEN3.read_text(), tokenizer, "qwen3.jinja")
    rows = [NumberedRow(n, {"messages": CHAT, "chat_template_kwargs": kwargs}) for n, kwargs in enumerate([{}, *BAD])]
    for encodings in (True, False):
        failed = []
        documents = tokenize_rows(rows, renderer, Settings(assistant_only_loss=True), True, failed, encodings)
        assert [document.number for document in documents] == [0] and [one.number for one in failed] == [1, 2, 3, 4]
        assert failed[0].reason.startswith("qwen3.jinja does not read train_turn (did you mean train_turns?)")


def test_a_run_names_it_before_it_loads_a_model():
    def start(*kwargs):
        rows = Dataset.from_list([{"messages": CHAT, "chat_template_kwargs": one} for one in kwargs])
        row_checks.check_template_arguments(rows, "train", "o/n", read_arguments(QWEN3.read_text(), "qwen3.jinja"))

    start({}, {"train_turns": "last"})
    start({"enable_thinking": True}, {"enable_thinking": None})
    with pytest.raises(UsageError) as caught:
        start({"train_turn": None}, {"train_turn": "last"}, {"train_turn": "all"})
    assert str(caught.value).startswith(
        "dataset o/n: 2 of 3 rows of train have chat_template_kwargs that do not fit the template (rows 1, 2 from 0): "
    )
    assert "qwen3.jinja does not read train_turn (did you mean train_turns?)" in str(caught.value)
    rows = Dataset.from_list([{"messages": CHAT}])
    row_checks.check_template_arguments(rows, "train", "o/n", read_arguments(QWEN3.read_text(), "qwen3.jinja"))


def test_a_run_with_the_tokenizer_s_own_template_names_it(demo):
    """It is known once the tokenizer is there; both splits are looked at, and a template file is left to check_rows."""
    tokenizer = AutoTokenizer.from_pretrained(demo / "init")
    tokenizer.chat_template = QWEN3.read_text()
    sound = Dataset.from_list([{"messages": CHAT, "chat_template_kwargs": {"train_turns": "last"}}])
    misspelt = Dataset.from_list([{"messages": CHAT, "chat_template_kwargs": {"train_turn": "last"}}])
    script_args = SimpleNamespace(dataset_name="o/n", dataset_train_split="train")

    def start(train, validation, path=None):
        args = SimpleNamespace(chat_template_path=path)
        trainer = SimpleNamespace(args=args, processing_class=tokenizer, train_rows=train, validation_rows=validation)
        row_checks.check_own_template_arguments(trainer, script_args)

    start(sound, None)
    start(sound, sound)
    start(misspelt, misspelt, path="x.jinja")
    for train, validation, split in ((misspelt, sound, "train"), (sound, misspelt, "validation")):
        with pytest.raises(UsageError, match=f"1 of 1 rows of {split} have .*own template does not read train_turn "):
            start(train, validation)


@pytest.mark.parametrize("name", ["smollm3", "chatml"])
def test_a_blank_persona_is_none_for_check_and_run(name):
    row = {"messages": CHAT, "chat_template_kwargs": {"custom_instructions": " \n"}}
    renderer = Renderer(template(name), template_name="t.jinja")
    assert check.find_faults(row, check.CheckOptions(renderer)) == []
    row_checks.check_template_arguments(Dataset.from_list([row]), "train", "o/n", renderer.arguments)
    assert renderer.render(row, CHAT) == renderer.render({"messages": CHAT}, CHAT)


def test_a_recipe_is_refused_by_it(run_recipe, tmp_path):
    row = {"messages": CHAT, "chat_template_kwargs": {"enable_thinking": "false"}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UsageError, match='enable_thinking is "false", it must be true or false'):
        run_recipe("qwen3_full", "--dataset_name", tmp_path / "rows.jsonl", "--eval_rows", 0)
