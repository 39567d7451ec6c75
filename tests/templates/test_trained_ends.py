"""The ends of trained answers, on every family's tokenizer and on wrong ones; what is expected is counted by hand, or
by template_oracle.py, which knows the families' formats and neither templates nor tokens.
"""

import io
import json
import logging
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset
from hooks.checks import stop_token, trained_ends
from hooks.messages import UsageError
from trl import SFTConfig, pack_dataset

from data_prep.common import rendering
from tests.helpers.runs import REPO, SHARED
from tests.helpers.template_oracle import ALL_FAMILIES, Refused
from tests.recipes.test_checks import refusal
from tests.templates.test_chat_templates import expected, samples, small_tokenizer, template, tokenizer_of

TEMPLATES = REPO / "chat_templates"
BY_NAME = {family.name: family for family in ALL_FAMILIES}
SETTINGS = {
    "assistant_only_loss": True,
    "max_length": None,
    "packing": False,
    "packing_strategy": "bfd",
    "eos_token": None,
    "chat_template_path": str(TEMPLATES / "qwen3.jinja"),
}


def trainer_of(tokenizer, rows, prepared, eos_token_id=None, completion_only_loss=False, **settings):
    """What the check reads of a trainer."""
    generation_config = SimpleNamespace(eos_token_id=eos_token_id)
    return SimpleNamespace(
        args=SimpleNamespace(**SETTINGS | settings),
        processing_class=tokenizer,
        chat_template=None,
        train_rows=rows,
        train_dataset=prepared,
        completion_only_loss=completion_only_loss,
        model=SimpleNamespace(generation_config=generation_config, name_or_path="the/model"),
        context_turns=None,
    )


def prepare(tokenizer, source, messages, tools=None, arguments=None):
    """A conversation as TRL prepares it."""
    done = tokenizer.apply_chat_template(
        messages,
        tools=tools or None,
        chat_template=source,
        return_dict=True,
        return_assistant_tokens_mask=True,
        **arguments or {},
    )
    labels = [token if bit else -100 for token, bit in zip(done["input_ids"], done["assistant_masks"], strict=True)]
    return {"input_ids": done["input_ids"], "labels": labels}


def bare(messages, arguments=None):
    """A row with what the count reads of it; tools' arguments have no common type."""
    turns = [{name: turn.get(name) for name in ("role", "loss_mask", "train")} for turn in messages]
    return {"messages": turns, "chat_template_kwargs": {"train_turns": (arguments or {}).get("train_turns")}}


def said(role, content, **more):
    return {"role": role, "content": content, **more}


def talk(turns, **more):
    messages = []
    for number in range(turns):
        messages += [said("user", f"How many is {number}?"), said("assistant", f"It is {number}.", **more)]
    return messages


def tokenizer_or_skip(name, kind):
    family = BY_NAME[name]
    if kind == "real" and not (family.tokenizer and (SHARED / "tokenizers" / family.tokenizer).is_dir()):
        pytest.skip(f"no real tokenizer at hand: {name}")
    return tokenizer_of(family, kind)


kinds = pytest.mark.parametrize("kind", ["real", "small"])


# -- every family -----------------------------------------------------------------------------------------------------
@kinds
@pytest.mark.parametrize("name", BY_NAME)
def test_every_family_on_its_own_tokenizer(name, kind):
    """Random conversations: turns, tool calls, thoughts, and the templates' arguments for what is trained."""
    tokenizer = tokenizer_or_skip(name, kind)
    rows, prepared = [], []
    turns = trained = calls = thoughts = 0
    for messages, tools, arguments in samples(BY_NAME[name]):
        try:
            answers = expected(BY_NAME[name], messages, tools, **arguments)[2]
        except Refused:
            continue
        rows.append(bare(messages, arguments))
        prepared.append(prepare(tokenizer, template(name), messages, tools, arguments))
        trained += len(answers)
        turns += sum(turn["role"] == "assistant" for turn in messages)
        calls += sum(bool(turn.get("tool_calls")) for turn in messages)
        thoughts += sum(bool(turn.get("reasoning_content")) for turn in messages)
    path = str(TEMPLATES / f"{name}.jinja")
    trainer = trainer_of(tokenizer, Dataset.from_list(rows), Dataset.from_list(prepared), chat_template_path=path)
    assert refusal(trained_ends.check_trained_ends, trainer, []) is None
    context = trainer.context_turns
    assert turns > 30 and trained > 20
    assert calls > 5 or not BY_NAME[name].tools
    assert thoughts > 5 or not BY_NAME[name].reasoning
    if turns == trained:
        assert context is None
    else:
        assert (context.turns, context.total, context.exact) == (turns - trained, turns, True)
        assert not context.expandable  # some of these rows say themselves what is trained


@kinds
@pytest.mark.parametrize("name", BY_NAME)
def test_no_family_lacks_its_own_control_tokens(name, kind):
    tokenizer = tokenizer_or_skip(name, kind)
    assert rendering.find_template_tokens(template(name))
    assert rendering.find_foreign_tokens(tokenizer.get_vocab(), template(name)) == []
    assert rendering.find_fitting_template(tokenizer) is not None


@pytest.mark.parametrize(
    ("name", "headers"),
    [
        ("qwen3", ["im_start|>user", "im_start|>user\n<tool_response>"]),
        ("llama3", ["start_header_id|>user<|end_header_id|>", "start_header_id|>tool<|end_header_id|>"]),
        ("gemma3", ["start_of_turn>user"]),
        ("phi4", ["im_start|>user<|im_sep|>"]),
        ("mistral_nemo", ["INST]", 'TOOL_RESULTS]{"content":']),
        ("nanochat", ["user_start|>"]),
    ],
)
def test_what_opens_the_next_turn(name, headers, monkeypatch):
    tokenizer = tokenizer_of(BY_NAME[name], "small")
    monkeypatch.setattr(tokenizer, "chat_template", None)  # other files share it, and may give it one
    assert list(trained_ends.find_turn_headers(tokenizer, template(name))) == headers
    assert list(trained_ends.find_turn_headers(tokenizer, None)) == []


# -- wrong pairs ------------------------------------------------------------------------------------------------------
@kinds
@pytest.mark.parametrize(
    ("name", "wrong", "faults", "foreign", "fitting"),
    [
        ("llama3", "qwen3", "5 of 5", ["<|im_start|>", "<|im_end|>"], "llama3"),  # this template trains the last answer
        ("qwen3", "gemma3", "10 of 10", ["<start_of_turn>", "<end_of_turn>"], "chatml"),
        ("gpt_oss", "phi4", "10 of 10", ["<|im_start|>", "<|im_sep|>", "<|im_end|>"], "gpt_oss"),
    ],
)
def test_a_template_of_another_tokenizer(name, wrong, faults, foreign, fitting, kind, capsys):
    tokenizer = tokenizer_or_skip(name, kind)
    rows = Dataset.from_list([bare(talk(2))] * 5)
    prepared = Dataset.from_list([prepare(tokenizer, template(wrong), talk(2))] * 5)
    path = TEMPLATES / f"{wrong}.jinja"
    trainer = trainer_of(tokenizer, rows, prepared, chat_template_path=str(path))
    sentence = refusal(trained_ends.check_trained_ends, trainer, [])
    match = re.fullmatch(
        r"(\d+ of \d+) trained answers end with '(.+)' \(id (\d+)\), which stops nothing: the model would never learn "
        r"to end them: --chat_template_path (\S+) does not belong to the tokenizer of the/model, which has no token "
        r"(.+?): pass one whose tokens it has, as --chat_template_path (\S+), or --allow untrained_stop \(.+\)",
        sentence,
    )
    assert match, sentence
    assert match[1] == faults
    assert repr(tokenizer.decode([int(match[3])])) == f"'{match[2]}'" and ">" in match[2] and len(match[2]) < 12
    assert match[4] == str(path.relative_to(Path.cwd()))
    assert set(match[5].split(", ")) == set(foreign)
    assert match[6] == str((TEMPLATES / f"{fitting}.jinja").relative_to(Path.cwd()))
    assert refusal(trained_ends.check_trained_ends, trainer, ["untrained_stop"]) is None
    assert f"{faults} trained answers end with" in capsys.readouterr().out
    assert trainer.context_turns is None


@pytest.fixture
def sentence_of_run(run_recipe, monkeypatch, capsys):
    """sentence_of_run(recipe, *flags): what a run is refused with; nothing else is said about stop tokens."""

    def run(recipe, *flags):
        with pytest.raises(UsageError) as refused:
            run_recipe(recipe, *flags, "--max_steps", 1, "--eval_rows", 0)
        monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
        captured = capsys.readouterr()
        assert "trained answers" not in captured.out + captured.err
        assert "end-of-turn" not in captured.out + captured.err
        return str(refused.value)

    return run


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_wrong_pair_in_a_run(sentence_of_run, tmp_path):
    """The demo's tokenizer has Qwen3's tokens; Gemma's are pieces of text to it."""
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": talk(3)}] * 8)
    flags = ["--dataset_name", rows, "--chat_template_path", TEMPLATES / "gemma3.jinja"]
    sentence = sentence_of_run("qwen3_full", *flags)
    assert sentence.startswith("24 of 24 trained answers end with ") and "<end_of_turn>" in sentence
    assert "--chat_template_path chat_templates/chatml.jinja" in sentence


# -- ends, piece by piece ---------------------------------------------------------------------------------------------
USER = "<|im_start|>user\nhi<|im_end|>\n"
HEADER = "<|im_start|>assistant\n"
STOP = "<|im_end|>"
CALL = '<tool_call>\n{"name": "a"}\n</tool_call>'
ANSWERED = [(USER, 0), (HEADER, 0)]


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of(BY_NAME["qwen3"], "small")


def document(tokenizer, *parts):
    """(ids, labels) of pieces of text, each encoded by itself."""
    ids, labels = [], []
    for text, is_trained in parts:
        piece = tokenizer.encode(text, add_special_tokens=False)
        ids += piece
        labels += piece if is_trained else [-100] * len(piece)
    return ids, labels


def ends_of(tokenizer, *documents, rows=None, **settings):
    """(stopped, masked, unstopped) of documents, each a row; `seq_lengths` makes one pack of them."""
    packed = settings.pop("packed", False)
    columns = {"input_ids": [ids for ids, _ in documents], "labels": [labels for _, labels in documents]}
    if packed:
        lengths = [[len(ids) for ids in columns["input_ids"]]]
        columns = {name: [sum(values, [])] for name, values in columns.items()} | {"seq_lengths": lengths}
    rows = rows or Dataset.from_list([bare(talk(1))])
    ends = trained_ends.read_trained_ends(trainer_of(tokenizer, rows, Dataset.from_dict(columns), **settings))
    return ends.stopped, ends.masked, ends.unstopped.total()


@pytest.mark.parametrize(
    ("parts", "counts"),
    [
        ([("yes" + STOP, 1), ("\n", 0)], (1, 0, 0)),
        ([("yes" + STOP + "\n", 1)], (1, 0, 0)),
        ([("yes" + STOP, 1)], (1, 0, 0)),
        ([(STOP, 1), ("\n", 0)], (1, 0, 0)),  # an empty answer
        ([("yes", 1)], (0, 0, 1)),
        ([("yes\n", 1), ("\n \n", 0)], (0, 0, 1)),
        ([("yes", 1), ("\n" + USER, 0)], (0, 0, 1)),
        ([("yes", 1), (USER + HEADER, 0), ("yes" + STOP, 1)], (1, 0, 1)),
        ([("yes", 1), ("<|im_start|>user\n<tool_response>\nno", 0)], (0, 0, 1)),
        ([("yes", 1), ("\n" + STOP + "\n", 0)], (0, 1, 0)),
        ([("yes", 1), (CALL, 0), (STOP, 1)], (1, 0, 0)),  # train_tool_calls: masked
        ([("yes\n", 1), ("\n" + CALL + STOP, 0)], (0, 0, 0)),
        ([("yes", 1), ("no", 0), ("yes" + STOP, 1), ("\n", 0)], (1, 0, 0)),  # a stretch inside it is masked
        ([("<think>a</think>", 0), ("yes" + STOP, 1)], (1, 0, 0)),
        ([("no", 0)], (0, 0, 0)),
        ([("\n", 1), (USER, 0)], (0, 0, 0)),  # blanks are no answer
    ],
)
def test_the_end_of_a_span(tokenizer, parts, counts):
    assert ends_of(tokenizer, document(tokenizer, *ANSWERED, *parts)) == counts


def test_truncated_answers_are_not_meant(tokenizer):
    ids, labels = document(tokenizer, *ANSWERED, ("yes and no", 1))
    assert ends_of(tokenizer, (ids, labels), max_length=len(ids)) == (0, 0, 0)
    assert ends_of(tokenizer, (ids, labels), max_length=len(ids) + 1) == (0, 0, 1)
    # cut within a call that is masked
    cut = document(tokenizer, *ANSWERED, ("yes", 1), ("\n", 0))
    assert ends_of(tokenizer, cut, max_length=len(cut[0])) == (0, 0, 0)


def test_documents_of_a_pack_are_apart(tokenizer):
    """The second one begins with what would end the first."""
    first = document(tokenizer, *ANSWERED, ("yes", 1))
    second = document(tokenizer, (STOP, 1), (USER, 0))
    third = document(tokenizer, *ANSWERED, ("yes" + STOP, 1), ("\n", 0))
    assert ends_of(tokenizer, first, second, third, packed=True) == (2, 0, 1)
    assert ends_of(tokenizer, first, second, third, packed=True, max_length=len(first[0])) == (2, 0, 0)


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_packs_of_trl(tokenizer, strategy):
    """Twenty answers, each trained to its stop, in packs shorter than the longest row."""
    documents = [document(tokenizer, *ANSWERED, ("yes " * size + STOP, 1), ("\n", 0)) for size in range(1, 21)]
    lengths = [len(ids) for ids, _ in documents]
    limit = lengths[14]
    rows = Dataset.from_dict({"input_ids": [one for one, _ in documents], "labels": [one for _, one in documents]})
    packs = pack_dataset(rows, limit, strategy)
    trainer = trainer_of(
        tokenizer,
        Dataset.from_list([bare(talk(1))] * 20),
        packs,
        max_length=limit,
        packing_strategy=strategy,
        packing=True,
    )
    assert refusal(trained_ends.check_trained_ends, trainer, []) is None
    ends = trained_ends.read_trained_ends(trainer)
    if strategy == "bfd":
        assert ends.stopped == sum(length - 1 <= limit for length in lengths) < 20  # the newline behind it may go
    else:
        assert ends.stopped == 20
    assert trainer.context_turns is None


def test_every_token_is_trained(tokenizer):
    """Plain text in a compiled set has no answers, nor have labels of sets that compile.py did not write."""
    text = document(tokenizer, ("yes and no " * 9, 1))
    text[1][0] = -100  # as compile.py writes it
    answer = document(tokenizer, *ANSWERED, ("yes", 1))
    longest = document(tokenizer, *ANSWERED, ("yes " * 50 + STOP, 1))
    compiled = Dataset.from_list([{"input_ids": [1], "ids": ["a"]}])
    assert ends_of(tokenizer, text, longest, rows=compiled, assistant_only_loss=False) == (1, 0, 0)
    assert ends_of(tokenizer, text, longest, answer, rows=compiled, assistant_only_loss=False) == (1, 0, 1)
    # as long as the longest of all: it may have been truncated when it was compiled
    assert ends_of(tokenizer, text, answer, rows=compiled, assistant_only_loss=False, packed=True)[2] == 1
    assert ends_of(tokenizer, answer, rows=compiled, assistant_only_loss=False) == (0, 0, 0)


@pytest.mark.parametrize(
    ("row", "settings", "looked_at"),
    [
        (bare(talk(1)), {}, True),
        (bare(talk(1)), {"assistant_only_loss": False}, False),
        ({"text": "a"}, {"assistant_only_loss": False}, False),
        ({"prompt": talk(1)[:1], "completion": talk(1)[1:]}, {"completion_only_loss": True}, True),
        ({"prompt": talk(1)[:1], "completion": talk(1)[1:]}, {"completion_only_loss": False}, False),
        ({"prompt": "a", "completion": "b"}, {"completion_only_loss": True}, False),
        ({"input_ids": [1], "labels": [1], "ids": ["a"]}, {}, True),
        ({"input_ids": [1], "labels": [1]}, {}, False),
    ],
)
def test_what_is_looked_at(tokenizer, row, settings, looked_at):
    settings = {"assistant_only_loss": "messages" in row} | settings
    short = document(tokenizer, *ANSWERED, ("yes", 1))
    longest = document(tokenizer, *ANSWERED, ("yes " * 50 + STOP, 1))
    columns = {"input_ids": [short[0], longest[0]], "labels": [short[1], longest[1]]}
    trainer = trainer_of(tokenizer, Dataset.from_list([row]), Dataset.from_dict(columns), **settings)
    sentence = refusal(trained_ends.check_trained_ends, trainer, [])
    assert (sentence is not None) == looked_at
    if looked_at:
        assert sentence.startswith("1 of 2 trained answers end with 's' (id ")
        remedy = "compile the set anew" if "input_ids" in row else "write a stop token at the end of the answers in"
        assert remedy in sentence
    del columns["labels"]
    trainer.train_dataset = Dataset.from_dict(columns)
    assert refusal(trained_ends.check_trained_ends, trainer, []) is None


def test_stops_of_tokenizer_config_and_flag():
    """A token that no family has, as each of them names it."""
    own = small_tokenizer(("<x>", "<y>"), (), "", "<x>")
    answer = document(own, ("hi", 0), ("yes<y>", 1))
    assert ends_of(own, answer) == (0, 0, 1)
    assert ends_of(own, answer, eos_token="<y>") == (1, 0, 0)
    number = own.convert_tokens_to_ids("<y>")
    assert ends_of(own, answer, eos_token_id=number) == (1, 0, 0)
    assert ends_of(own, answer, eos_token_id=[0, number]) == (1, 0, 0)
    assert ends_of(own, document(own, ("hi", 0), ("yes<x>", 1))) == (1, 0, 0)
    # a name counts only where it is one token
    assert ends_of(own, document(own, ("hi", 0), ("yes<|im_end|>", 1))) == (0, 0, 1)


def test_most_places_are_not_decoded(tokenizer, monkeypatch):
    """Headers met once are known by their ids; of other places no more than MAX_DECODED are read."""
    monkeypatch.setattr(trained_ends, "MAX_DECODED", 3)
    stopless = document(tokenizer, *ANSWERED, *[("yes", 1), (USER, 0)] * 20)
    assert ends_of(tokenizer, stopless) == (0, 0, 20)
    calls = document(tokenizer, *ANSWERED, *[("yes", 1), (CALL, 0)] * 20)
    decoded = []
    headers = trained_ends.TurnHeaders
    monkeypatch.setattr(headers, "begin_with_header", lambda self, ids: bool(decoded.append(ids)))
    assert ends_of(tokenizer, calls) == (0, 0, 0)
    assert len(decoded) == 3


# -- TRL's warning, and ends that the template masks ------------------------------------------------------------------
@pytest.mark.parametrize("assistant_only_loss", [True, False])
def test_trls_warning_is_left_to_the_check(assistant_only_loss, tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, assistant_only_loss=assistant_only_loss)
    stop_token.silence_stop_warning(args)
    logger = logging.getLogger(stop_token.TRL_LOGGER)
    stream = io.StringIO()
    monitor = logging.StreamHandler(stream)
    logger.addHandler(monitor)
    logger.warning(stop_token.STOP_WARNING + " in the loss mask;")
    logger.warning("another warning")
    logger.removeHandler(monitor)
    logger.removeFilter(stop_token.is_no_stop_warning)
    lines = stream.getvalue().splitlines()
    assert lines[-1] == "another warning" and len(lines) == 2 - assistant_only_loss


def test_the_warning_is_trls_own_words():
    source = Path(find_spec("trl.trainer.sft_trainer").origin).read_text()
    assert stop_token.STOP_WARNING in source and stop_token.TRL_LOGGER == "trl.trainer.sft_trainer"


MASKS_STOP = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
MASKS_STOP += "{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"


def test_a_template_that_masks_every_end_says_so(tokenizer, tmp_path, capsys):
    """The run goes on: TRL's warning, which it answers, is silenced."""
    (tmp_path / "x.jinja").write_text(MASKS_STOP)
    prepared = Dataset.from_list([prepare(tokenizer, MASKS_STOP, talk(2))] * 3)
    rows = Dataset.from_list([bare(talk(2))] * 3)
    trainer = trainer_of(tokenizer, rows, prepared, chat_template_path=str(tmp_path / "x.jinja"))
    assert refusal(trained_ends.check_trained_ends, trainer, []) is None
    assert "none of 6 trained answers trains its stop token" in capsys.readouterr().out
    assert trainer.context_turns is None


# -- answers that are context -----------------------------------------------------------------------------------------
def chain(**more):
    call = {"id": "call00001", "type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
    return [
        said("user", "Look."),
        said("assistant", "", tool_calls=[call], **more),
        said("tool", "seen", tool_call_id="call00001", name="look"),
        said("assistant", "Seen."),
    ]


def test_context_in_the_start_block(run_recipe, tmp_path, capsys):
    """By hand, of qwen3.jinja: of three answers the last is trained, with thoughts and without; of a tool chain its
    answer, and the call if its thought is shown. So 2 + 2 + 1 + 0 + 0 of 3 + 3 + 2 + 2 + 1 turns, twice."""
    rows = [talk(3), talk(3, reasoning_content="I see."), chain(), chain(reasoning_content="I look."), talk(1)]
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": messages} for messages in rows * 2])
    run_recipe("qwen3_full", "--dataset_name", path, "--eval_rows", 0, "--max_steps", 1, "--global_batch_size", 1)
    (line,) = re.findall(r"^  context +(.*)$", capsys.readouterr().out, re.M)
    assert line == (
        "10 of 22 assistant turns are context, not trained (python -m data_prep.expand_turns makes a row of each)"
    )


def test_no_line_where_every_answer_is_trained(run_recipe, tmp_path, capsys):
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": talk(3)}] * 8)
    flags = ["--dataset_name", path, "--eval_rows", 0, "--chat_template_path", TEMPLATES / "chatml.jinja"]
    run_recipe("qwen3_full", *flags, "--max_steps", 1, "--global_batch_size", 1)
    said_lines = capsys.readouterr().out
    assert "  template " in said_lines and "  context " not in said_lines


def context_of(rows, stopped, full_documents=0, dropped=0, completion_only_loss=False, **settings):
    """What the start block says of these rows and so many trained answers; None where it says nothing."""
    prepared = Dataset.from_dict({"input_ids": [[1]] * (len(rows) - dropped)})
    trainer = trainer_of(None, Dataset.from_list(rows), prepared, completion_only_loss=completion_only_loss, **settings)
    ends = trained_ends.TrainedEnds(stopped=stopped, full_documents=full_documents)
    context = trained_ends.count_context_turns(trainer, ends)
    return context and context.describe()


def test_context_is_never_too_much():
    """Rows of 3, 1, 1 and 2 answers."""
    expand = " (python -m data_prep.expand_turns makes a row of each)"
    rows = [bare(talk(turns)) for turns in (3, 1, 1, 2)]
    assert context_of(rows, 4) == f"3 of 7 assistant turns are context, not trained{expand}"
    assert context_of(rows, 7) is None
    # a document as long as the limit may have lost up to the three answers of the longest conversation
    assert context_of(rows, 3, full_documents=1) == f"4 of 7 assistant turns are context, not trained{expand}"
    limited = {"max_length": 64, "full_documents": 1}
    assert context_of(rows, 3, **limited) == f"at least 1 of 7 assistant turns are context, not trained{expand}"
    assert context_of(rows, 4, **limited) is None
    assert context_of(rows, 1, dropped=1, **limited).startswith("at least 1 of 7 ")
    assert context_of(rows, 2, dropped=1, **limited) is None
    assert context_of(rows, 3, packing=True, **limited).startswith("at least 1 of 7 ")
    assert context_of(rows, 3, packing=True, packing_strategy="bfd_split", **limited).startswith("4 of 7 ")


def test_consecutive_answers_may_stand_in_one_span():
    pair = [said("user", "a"), said("assistant", "b"), said("assistant", "c")]
    assert context_of([bare(pair)] * 2, 2) is None
    assert context_of([bare(pair), bare(talk(3))], 2).startswith("at least 2 of 5 ")


def test_rows_that_choose_their_answers_get_no_advice():
    flagged = talk(2)
    flagged[1]["loss_mask"] = 0
    plain = "1 of 3 assistant turns are context, not trained"
    assert context_of([bare(flagged), bare(talk(1))], 2) == plain
    flagged[1] = said("assistant", "a", train=1)
    assert context_of([bare(flagged), bare(talk(1))], 2) == plain
    assert context_of([bare(talk(2), {"train_turns": "last"}), bare(talk(1))], 2) == plain


def test_turns_of_a_prompt_are_no_answers():
    row = {"prompt": talk(2)[:3], "completion": talk(1)[1:]}
    assert context_of([row] * 2, 2, completion_only_loss=True) is None
    assert context_of([row] * 2, 2, completion_only_loss=False) == "2 of 4 assistant turns are context, not trained"
    assert context_of([row] * 2, 2, completion_only_loss=True, assistant_only_loss=False) is None
