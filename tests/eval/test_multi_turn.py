"""eval/multi_turn.py: calls are run on BFCL's own classes in BFCL's own loop, and judged by BFCL's own checker.

The oracles: BFCL's ground truth, played through the whole command in the form of two families, is right in 200 of 200
conversations; BFCL's checker and its execution, called here by hand on lists of texts, agree on conversations with
changed calls; cases worked by hand. The data are the wheel's own (bfcl_eval/data).

Breaks tried, each seen here. Of the conversation: one step less before the limit; several calls a message where the
template holds one, and the reverse; thoughts dropped; later functions told at once; malformed calls unseen. Of the
verdict: a conversation that was ended judged by what it did; turns counted from 0. Of the classes: objects kept from
line to line; any name or argument's name run; ground truth never tried.
"""

import itertools
import json
import random
import re
from collections import Counter
from decimal import getcontext
from functools import cache
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from data_prep.common.answer_formats import python_calls
from eval import multi_turn, tool_calls
from eval.common import bfcl, execute_calls, models
from eval.common.call_match import mismatch
from tests.eval.test_tool_calls import (
    Scripted,
    call,
    callers,
    counts,
    last_message,
    rendered,
    rows_of,
    said,
    tokenizer_of,
    write_rows,
)
from tests.helpers.runs import REPO

bfcl_eval = pytest.importorskip("bfcl_eval", reason="bfcl-eval is not installed (make test installs it)")
multi_turn_checker = pytest.importorskip("bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker")
multi_turn_utils = pytest.importorskip("bfcl_eval.eval_checker.multi_turn_eval.multi_turn_utils")

DATA = Path(bfcl_eval.__file__).parent / "data"
long = pytest.mark.long
IM_USER = r"<\|im_start\|>user\n(?!<tool_response>)(.*?)<\|im_end\|>"
TEMPLATES = {  # template: stop token, whether it holds one call a message, its user messages, where answers begin
    "qwen3_instruct_2507": ("<|im_end|>", False, IM_USER, "<|im_start|>assistant"),
    "qwen3": ("<|im_end|>", False, IM_USER, "<|im_start|>assistant"),
    "llama3_1": ("<|eot_id|>", True, r"user<\|end_header_id\|>\n\n(.*?)<\|eot_id\|>", "|>assistant<|end_"),
}


def file_of(category):
    return DATA / f"BFCL_v4_multi_turn_{category}.json"


@cache
def docs_of(name):
    return rows_of(DATA / "multi_turn_func_doc" / f"{bfcl.CLASS_FILES[name]}.json")


@cache
def truth_of(category):
    """{id: (row, truth, its calls: turns of calls)} of a category."""
    answers = {row["id"]: row["ground_truth"] for row in rows_of(DATA / "possible_answer" / file_of(category).name)}
    found = {}
    for row in rows_of(file_of(category)):
        functions = [one for name in row["involved_classes"] for one in docs_of(name)]
        truth = answers[row["id"]]
        properties = bfcl.list_properties(functions)
        calls = [[one for text in texts for one in python_calls(text, properties)] for texts in truth]
        found[row["id"]] = (row, truth, calls)
    return found


# -- models that follow a script -----------------------------------------------------------------------


def written(tokenizer, calls, name=""):
    """Calls, or a text, as the template of that name writes an answer."""
    return calls if isinstance(calls, str) else rendered(tokenizer, said(calls, name))[1]


def follow(monkeypatch, name, script, **more):
    """A model behind the real generation that reads in its prompt which user messages came and how many answers it has
    given to the last one, and says script(user messages, answers): calls or a text."""
    stop, _, user, begin = TEMPLATES[name]
    tokenizer = tokenizer_of(name)
    seen = []

    def say(prompt):
        users = list(re.finditer(user, prompt, re.S))
        given = prompt[users[-1].end() :].count(begin) - 1
        seen.append(prompt)
        answer = written(tokenizer, script([user[1].rpartition("\n}\n\n")[2] for user in users], given))
        return answer.strip().removesuffix(stop)

    opened = models.OpenedModel(Scripted(tokenizer, say, **more), tokenizer, {tokenizer.convert_tokens_to_ids(stop)})
    monkeypatch.setattr(multi_turn, "open_model", lambda *_: opened)
    return seen


def follow_by_id(monkeypatch, script, name=""):
    """The same without generation, which takes nearly all of the time, and without a template unless one is named:
    script(id, turn, step)."""
    tokenizer, render_prompt = tokenizer_of(name or "qwen3_instruct_2507"), multi_turn.render_prompt

    def place(tokenizer, family, task, messages, *more):
        roles = [message["role"] for message in messages]
        last = len(roles) - roles[::-1].index("user")
        text = render_prompt(tokenizer, family, task, messages, *more).text if name else "<|im_start|>assistant\n"
        thinks = text.rstrip().endswith("<think>")
        return models.Prompt(text, (task, roles.count("user") - 1, roles[last:].count("assistant"), thinks))

    def ask(model, tokenizer, stops, prompts, *_):
        answers = []
        for *turn, thinks in prompts:
            text = written(tokenizer, script(*turn), name)
            if thinks and "</think>" not in text:  # the template wrote it without the thought that this prompt opens
                text = "hm</think>" + text
            answers.append(models.Answer(text, 1, True))
        return answers

    monkeypatch.setattr(multi_turn, "open_model", lambda *_: models.OpenedModel(None, tokenizer, None))
    monkeypatch.setattr(multi_turn, "render_prompt", place)
    monkeypatch.setattr(multi_turn, "ask", ask)


def command(tmp_path, *words, code=0):
    given = [tmp_path, "--out", tmp_path / "out", *words]
    assert multi_turn.main([str(word) for word in given]) == code
    if code == 0:
        report = json.loads((tmp_path / "out" / "multi_turn.json").read_text())
        return report, rows_of(tmp_path / "out" / "multi_turn.jsonl")


# -- the ground truth ----------------------------------------------------------------------------------


def by_heart(category, apart):
    """The script that plays the ground truth, {user messages up to now: steps}: a step a call, or a step a turn."""
    steps, added = {}, multi_turn.import_bfcl_prompts().DEFAULT_USER_PROMPT_FOR_ADDITIONAL_FUNCTION_FC
    for row, _, turns in truth_of(category).values():
        users = ()
        for asked, calls in zip(row["question"], turns, strict=True):
            users += (asked[0]["content"].strip() if asked else added,)  # as Llama's template has it
            found = [[one] for one in calls] if apart else [calls] * bool(calls)
            assert steps.setdefault(users, found) == found  # no two conversations begin alike and go on otherwise
    return lambda users, given: [*steps[tuple(map(str.strip, users))], "Done."][given]


@pytest.mark.parametrize("name", ["qwen3_instruct_2507", "llama3_1"])
@pytest.mark.parametrize("rows", [4, pytest.param(200, marks=long)])
def test_the_ground_truth_is_right_through_the_whole_command(tmp_path, monkeypatch, name, rows):
    _, apart, *_ = TEMPLATES[name]
    seen = follow(monkeypatch, name, by_heart("base", apart))
    report, lines = command(tmp_path, "--data", file_of("base"), "--rows", rows, "--max_new_tokens", 4000)
    assert counts(report["metrics"]) == {
        "multi_turn": (rows, rows),
        "step_limit": (0, rows),
        "malformed": (0, rows),
        "stop_rate": (rows, rows),
    }
    assert report["settings"]["family"] == name and report["settings"]["bfcl_eval"] == "2026.3.23"
    calls = [[call for step in turn for call in step["calls"]] for line in lines for turn in line["turns"]]
    assert calls == [turn for line in lines for turn in truth_of("base")[line["id"]][2]]
    assert len(seen) == sum(len(turn) for line in lines for turn in line["turns"])


@pytest.mark.parametrize("rows", [40, pytest.param(200, marks=long)])
@pytest.mark.parametrize("category", ["base", "miss_func", "miss_param", "long_context"])
def test_the_ground_truth_of_every_category_is_right(tmp_path, monkeypatch, category, rows):
    turns = {}
    for name, (*_, found) in truth_of(category).items():  # two of long_context need more than 20 calls in a turn
        turns[name] = [[*([[one] for one in calls] if len(calls) <= 20 else [calls]), "Done."] for calls in found]
    follow_by_id(monkeypatch, lambda name, turn, step: turns[name][turn][step])
    report, lines = command(tmp_path, "--data", file_of(category), "--rows", rows)
    assert counts(report["metrics"])["multi_turn"] == (rows, rows) and len(truth_of(category)) == 200
    assert set(report["groups"]["category"]) == {f"multi_turn_{category}"}
    assert {(line["error"], line["turn"], line["failed"]) for line in lines} == {("", None, "")}


# -- planted models ------------------------------------------------------------------------------------


def files(**contents):
    return {name: {"type": "file", "content": text} for name, text in contents.items()}


ROW = {
    "id": "multi_turn_base_0",
    "question": [[{"role": "user", "content": text}] for text in ("Sort my files.", "What is in b?", "Bye.")],
    "initial_config": {"GorillaFileSystem": {"root": {"home": {"type": "directory", "contents": files(a="1", b="2")}}}},
    "involved_classes": ["GorillaFileSystem"],
    "excluded_function": ["ls"],
}
TRUTH = [["mkdir(dir_name='old')", "mv(source='a', destination='old')", "touch('c')"], ["cat('b')"], []]
MKDIR, MV, TOUCH = (
    call("mkdir", dir_name="old"),
    call("mv", source="a", destination="old"),
    call("touch", file_name="c"),
)
CAT, LS = call("cat", file_name="b"), call("ls")
FIRST, EMPTY = [[MKDIR, MV, TOUCH]], "multi_turn:empty_turn_model_response"
STATE, REPLY = "multi_turn:instance_state_mismatch", "multi_turn:execution_response_mismatch"
ENDED, BROKEN = "multi_turn:force_terminated", "multi_turn:inference_error"
HARM = "x'); __import__('os').system('touch harm') #"
PLANTED = {  # a model: its steps of each turn (the last one for ever, then silence); BFCL's error, the turn
    "by heart": ([FIRST, [[CAT]], []], "", None),
    "a call a step": ([[[MKDIR], [MV], [TOUCH]], [[CAT]], []], "", None),
    "another order, the same end": ([[[TOUCH, MKDIR], [MV]], [[CAT]], []], "", None),
    "a detour that ends well": (
        [[[LS], [MKDIR, MV, call("touch", file_name="d")], [call("rm", file_name="d"), TOUCH]], [[CAT, LS]], []],
        "",
        None,
    ),
    "asked before": ([[[MKDIR, MV, TOUCH, CAT]], [[LS]], []], "", None),
    "a needless call at the end": ([FIRST, [[CAT]], [[LS]]], "", None),
    "an unknown function first": ([[[call("rmdir_all")], *FIRST], [[CAT]], []], "", None),
    "talks of a call that does not parse": ([FIRST, [[CAT]], ["<tool_call>\n{"]], "", None),
    "no call": ([[], [], []], EMPTY, 1),
    "no call in the second turn": ([FIRST, [], []], EMPTY, 2),
    "asked before, silent now": ([[[MKDIR, MV, TOUCH, CAT]], [], []], EMPTY, 2),
    "malformed in the second turn": ([FIRST, ["<tool_call>\n{"], []], EMPTY, 2),
    "one call missing": ([[[MKDIR, MV]], [[CAT]], []], STATE, 1),
    "a wrong argument that changes the state": ([[[MKDIR, MV, call("touch", file_name="C")]], [[CAT]], []], STATE, 1),
    "a wrong argument that changes the reply": ([FIRST, [[call("cat", file_name="c")]], []], REPLY, 2),
    "another order, another end": ([[[MV, MKDIR, TOUCH]], [[CAT]], []], STATE, 1),
    "only an unknown function": ([FIRST, [[call("see", file_name="b")]], []], REPLY, 2),
    "breaks it again": ([FIRST, [[CAT, call("rm", file_name="c")]], []], STATE, 2),
    "breaks it when nobody looks": ([FIRST, [[CAT]], [[call("rm", file_name="c")]]], "", None),  # as in BFCL
    "calls for ever": ([[[LS]] * 99, [], []], ENDED, 1),
    "calls for ever in the second turn": ([FIRST, [[CAT]] * 99, []], ENDED, 2),
    "calls for ever in the last turn": ([FIRST, [[CAT]], [[LS]] * 99], "", None),  # BFCL only counts turns
    "20 steps": ([FIRST, [[CAT]] * 20, []], "", None),
    "an injected argument": ([[[call("touch", file_name=HARM)], *FIRST], [[CAT]], []], STATE, 1),
    "an injected name": (
        [[[call(f"touch(file_name='{HARM}"), call("__import__", name="antigravity")], *FIRST], [[CAT]], []],
        "",
        None,
    ),
    "an injected argument's name": (
        [[[call("touch", **{"file_name=open('harm', 'w'), **dict": {}})], *FIRST], [[CAT]], []],
        "",
        None,
    ),
}


def written_rows(folder, rows, truths, category="base"):
    """A file of rows with their answers and the functions of all classes, as BFCL lays them out."""
    name = f"BFCL_v4_multi_turn_{category}.json"
    found = [{"id": row["id"], "ground_truth": truth} for row, truth in zip(rows, truths, strict=True)]
    write_rows(folder / "possible_answer" / name, found)
    for one in ("GorillaFileSystem", "MathAPI"):
        write_rows(folder / "multi_turn_func_doc" / f"{bfcl.CLASS_FILES[one]}.json", docs_of(one))
    return write_rows(folder / name, rows)


@pytest.fixture
def data(tmp_path):
    return written_rows(tmp_path, [ROW], [TRUTH])


def planted(turns):
    return lambda users, given: [*turns[len(users) - 1], "Done."][given]


@pytest.mark.parametrize("name", PLANTED)
def test_planted_models(tmp_path, data, monkeypatch, name):
    turns, error, turn = PLANTED[name]
    monkeypatch.chdir(tmp_path)
    follow(monkeypatch, "qwen3_instruct_2507", planted(turns))
    report, [line] = command(tmp_path, "--data", data)
    assert (line["error"], line["turn"], line["failed"]) == (error, turn, "")
    assert counts(report["metrics"])["multi_turn"] == (not error, 1)
    assert counts(report["metrics"])["step_limit"] == ("for ever" in name, 1)
    assert counts(report["metrics"])["malformed"] == ("<tool_call>" in str(turns), 1)
    assert counts(report["metrics"])["stop_rate"] == (1, 1)
    assert max(len(steps) for steps in line["turns"]) == (
        21 if "for ever" in name or name == "20 steps" else max(map(len, turns)) + 1
    )
    assert not (tmp_path / "harm").exists()


def test_a_detour_is_right_here_and_wrong_to_the_letter():
    """What tool_calls.py's multi_turn_ast refuses in the planted models that BFCL takes."""
    row = bfcl.BfclRow(ROW | {"excluded_function": []}, "", TRUTH, DATA, bfcl.BfclFiles())
    [task, *_] = tool_calls.list_tasks(row)
    verdicts = {}
    for name, (turns, error, _) in PLANTED.items():
        calls = [one for step in turns[0] if not isinstance(step, str) for one in step]
        verdicts[name] = error == "", mismatch(calls, task.functions, task.answers) == ""
    assert verdicts["by heart"] == verdicts["another order, the same end"] == (True, True)
    assert verdicts["a detour that ends well"] == verdicts["asked before"] == (True, False)
    assert verdicts["another order, another end"] == (False, True)


# -- BFCL's own code as an oracle ----------------------------------------------------------------------


def as_text(one):
    """As bfcl_eval.model_handler.utils.convert_to_function_call has it."""
    return f"{one['name']}({','.join([f'{key}={value!r}' for key, value in one['arguments'].items()])})"


def theirs(row, truth, steps):
    """(error, turn, replies of each step) by BFCL's functions on lists of texts; the turn is that of the shortest
    beginning of the conversation that is wrong."""
    texts = [[[as_text(one) for one in step] for step in turn] for turn in steps]
    how = {"initial_config": row["initial_config"], "involved_classes": row["involved_classes"]}
    how |= {"long_context": "long_context" in row["id"]}
    replies, error, end = [], "", None
    for turn in texts:
        ran = [
            multi_turn_utils.execute_multi_turn_func_call(step, model_name="a", test_entry_id="1", **how)
            for step in turn
        ]
        replies.append([found for found, _ in ran])
    for end in range(1, len(truth) + 1):
        entry = row | {"id": row["id"].rpartition("_")[0] + f"_{end}"}
        found = multi_turn_checker.multi_turn_checker(texts[:end], truth[:end], entry, "", "b")
        if not found["valid"]:
            error = found["error_type"]
            break
    for name in [name for name in vars(multi_turn_utils) if name.endswith("_instance")]:
        del vars(multi_turn_utils)[name]
    return error, end if error else None, replies


def sets_in_order(replies):
    """Some errors show a set of words, whose order is that of this process's hashes."""
    return re.sub(r"\{('\w+'(?:, '\w+')*)\}", lambda found: str(sorted(found[1].split(", "))), json.dumps(replies))


def other(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return value + "x" if isinstance(value, str) else [value]


def mutant(calls, rng):
    """Turns of steps of calls with up to three changes, in steps of any size."""
    turns = json.loads(json.dumps(calls))
    for _ in range(rng.randrange(4)):
        turn = rng.choice([turn for turn in turns if turn] or [[LS]])
        one = rng.choice(turn or [LS])
        kind, number = rng.randrange(9), turn.index(one)
        key = rng.choice(sorted(one["arguments"]) or [""])
        if kind == 0:
            del turn[number]
        elif kind == 1:
            turn.insert(rng.randrange(len(turn) + 1), json.loads(json.dumps(one)))
        elif kind == 2:
            rng.shuffle(turn)
        elif kind == 3 and key:
            one["arguments"][key] = other(one["arguments"][key])
        elif kind == 4:
            one["arguments"].pop(key, None)
        elif kind == 5:
            one["name"] = rng.choice(["ls", "cat", "get_user_id", "no_such_function"])
        elif kind == 6:
            rng.choice(turns).append(turn.pop(number))
        elif kind == 7:
            turn.clear()
        else:
            turn.insert(
                number, call(rng.choice(["pwd", "ls", "displayCarStatus", "get_account_info", "ticket_status"]))
            )
    steps = []
    for turn in turns:
        ends = sorted(rng.sample(range(1, len(turn)), rng.randrange(len(turn)))) if turn else []
        steps.append([turn[start:end] for start, end in itertools.pairwise([0, *ends, len(turn)]) if end > start])
    return steps


@pytest.mark.parametrize("times", [1, pytest.param(20, marks=long)])
def test_bfcls_own_checker_gives_the_same_verdicts(tmp_path, monkeypatch, times):
    """Through the whole loop, on 30 conversations of each category with calls changed at random: verdict, turn, and
    every reply that went back to the model."""
    rng, seen = random.Random(times), Counter()
    for category, _ in itertools.product(["base", "miss_func", "miss_param", "long_context"], range(times)):
        steps = {name: mutant(calls, rng) for name, (*_, calls) in truth_of(category).items()}
        script = {name: [[*turn, "Done."] for turn in turns] for name, turns in steps.items()}
        with monkeypatch.context() as patch:
            follow_by_id(patch, lambda name, turn, step, script=script: script[name][turn][step])
            _, lines = command(tmp_path, "--data", file_of(category), "--rows", 30, "--seed", rng.randrange(99))
        for line in lines:
            row, truth, _ = truth_of(category)[line["id"]]
            error, turn, replies = theirs(row, truth, steps[line["id"]])
            ours = [[step["replies"] for step in turn if step["calls"]] for turn in line["turns"]]
            if not line["step_limit"]:
                assert (line["error"], line["turn"]) == (error, turn), line["id"]
                assert sets_in_order(ours) == sets_in_order(replies), line["id"]
            seen[line["error"]] += 1
    assert (
        set(seen) - {ENDED} == {"", EMPTY, STATE, REPLY}
        and min(seen[one] for one in ("", EMPTY, STATE, REPLY)) >= 8 * times
    ), seen


# -- the conversation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [one for one in callers if one.tool_list], ids=lambda family: family.name)
def test_every_family_holds_a_conversation_to_its_end(tmp_path, data, monkeypatch, family):
    """By heart, with an answer in words after the calls: right, in the form of the template and in its own history."""
    steps = [FIRST if family.parallel else [[one] for one in FIRST[0]], [[CAT]], []]
    follow_by_id(monkeypatch, lambda name, turn, step: [*steps[turn], "Done."][step], family.name)
    _, lines = command(tmp_path, "--data", data)
    assert [line["error"] for line in lines] == [""] * len(lines) and lines


def test_the_history_by_hand(tmp_path, data, monkeypatch):
    """What the model is shown before its last answer: its own words, calls and their replies as they came."""
    script = planted([[[MKDIR, MV], "Hm.\n<tool_call>\n{"], [[CAT], [call("nothing")], "It is 2."], []])
    seen = follow(monkeypatch, "qwen3_instruct_2507", script)
    command(tmp_path, "--data", data)
    begin, end = "<|im_start|>", "<|im_end|>\n"
    assert seen[-1].partition("user\n")[2] == (
        f"Sort my files.{end}{begin}assistant\n"
        '<tool_call>\n{"name": "mkdir", "arguments": {"dir_name": "old"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "mv", "arguments": {"source": "a", "destination": "old"}}\n</tool_call>'
        f"{end}{begin}user\n<tool_response>\nNone\n</tool_response>\n"
        "<tool_response>\n{\"result\": \"'a' moved to 'old/a'\"}\n</tool_response>"
        f"{end}{begin}assistant\nHm.\n<tool_call>\n{{{end}{begin}user\nWhat is in b?{end}{begin}assistant\n"
        f'<tool_call>\n{{"name": "cat", "arguments": {{"file_name": "b"}}}}\n</tool_call>{end}'
        f'{begin}user\n<tool_response>\n{{"file_content": "2"}}\n</tool_response>{end}{begin}assistant\n'
        f'<tool_call>\n{{"name": "nothing", "arguments": {{}}}}\n</tool_call>{end}{begin}user\n<tool_response>\n'
        f"Error during execution: name 'nothing' is not defined\n</tool_response>{end}"
        f"{begin}assistant\nIt is 2.{end}{begin}user\nBye.{end}{begin}assistant\n"
    )
    # two calls in one answer of a family whose template holds one a message
    to = "<|channel|>commentary to=functions.{} <|constrain|>json<|message|>{}<|call|>"
    both = to.format("mkdir", '{"dir_name": "old"}') + "<|start|>assistant" + to.format("pwd", "{}")
    follow_by_id(monkeypatch, lambda name, turn, step: "Done." if turn or step else both, "gpt_oss")
    shown, prompts = multi_turn.render_prompt, []
    monkeypatch.setattr(multi_turn, "render_prompt", lambda *words: prompts.append(shown(*words)[0]) or shown(*words))
    _, [line] = command(tmp_path, "--data", data)
    assert line["turns"][0][0]["calls"] == [MKDIR, call("pwd")]
    assert prompts[1].rpartition("Sort my files.")[2] == (
        '<|end|><|start|>assistant to=functions.mkdir<|channel|>commentary json<|message|>{"dir_name": "old"}<|call|>'
        '<|start|>functions.mkdir to=assistant<|channel|>commentary<|message|>"None"<|end|>'
        "<|start|>assistant to=functions.pwd<|channel|>commentary json<|message|>{}<|call|>"
        "<|start|>functions.pwd to=assistant<|channel|>commentary<|message|>"
        '"{\\"current_working_directory\\": \\"/home\\"}"<|end|><|start|>assistant'
    )


def test_thoughts_go_back_as_the_template_has_them(tmp_path, data, monkeypatch):
    """Both modes in one run; in the turn they stand in, thoughts are shown to the model again, afterwards not."""
    tokenizer = tokenizer_of("qwen3_instruct_2507")  # it writes calls the same, without an empty think block
    script = PLANTED["a call a step"][0]

    def say(users, given):
        step = [*script[len(users) - 1], "Done."][given]
        return f"<think>\nthought {len(users)}{given}\n</think>\n\n" + written(tokenizer, step).removesuffix(
            "<|im_end|>\n"
        )

    seen = follow(monkeypatch, "qwen3", say)
    report, lines = command(tmp_path, "--data", data, "--mode", "think")
    assert [line["error"] for line in lines] == [""]
    thoughts = [re.findall(r"thought (\d+)", prompt) for prompt in seen]
    assert thoughts == [[], ["10"], ["10", "11"], ["10", "11", "12"], [], ["20"], []]
    follow(monkeypatch, "qwen3", planted(script))
    report, lines = command(tmp_path, "--data", data)
    assert {mode: counts(found)["multi_turn"] for mode, found in report["groups"]["mode"].items()} == {
        "think": (1, 1),
        "no_think": (1, 1),
    }
    assert [line["mode"] for line in lines] == ["think", "no_think"]


def test_functions_that_come_later_are_told_and_announced(tmp_path, monkeypatch):
    """multi_turn_miss_func by hand: shown from their turn on, which begins with BFCL's own words; the class can do what
    the model was not told of, as in BFCL. excluded_function takes nothing away."""
    row = ROW | {"id": "multi_turn_miss_func_7", "missed_function": {"1": ["mv", "cat"]}}
    row["question"] = [ROW["question"][0], [], *ROW["question"][1:]]
    data = written_rows(tmp_path, [row], [[TRUTH[0][::2], TRUTH[0][1:2], *TRUTH[1:]]], "miss_func")
    turns = [[[MKDIR, TOUCH]], [[MV]], [[CAT]], []]
    seen = follow(monkeypatch, "qwen3_instruct_2507", planted(turns))
    _, [line] = command(tmp_path, "--data", data)
    assert line["error"] == "" and line["category"] == "multi_turn_miss_func"
    shown = [re.findall(r'"function": {"name": "(\w+)"', prompt) for prompt in seen]
    names = [one["name"] for one in docs_of("GorillaFileSystem")]
    rest = [name for name in names if name not in ("mv", "cat")]
    assert len(rest) == len(names) - 2 and "ls" in rest
    assert shown == [rest] * 2 + [[*rest, "mv", "cat"]] * 5
    words = "I have updated some more functions you can choose from. What about now?"
    assert [last_message(prompt) for prompt in (seen[1], seen[2], seen[4])][1:] == [words, "What is in b?"]
    turns[0], turns[1] = [[MKDIR, TOUCH, MV]], [[LS]]
    follow(monkeypatch, "qwen3_instruct_2507", planted(turns))
    _, [line] = command(tmp_path, "--data", data)
    assert (line["error"], line["turn"], line["turns"][0][0]["replies"][2][:11]) == (STATE, 1, '{"result": ')


# -- what must not happen ------------------------------------------------------------------------------


def test_a_call_that_hangs_costs_its_conversation_alone(tmp_path, monkeypatch):
    """Arithmetic in C, which hears no signal."""
    both = {"involved_classes": ["GorillaFileSystem", "MathAPI"]}
    data = written_rows(tmp_path, [ROW | both | {"id": f"multi_turn_base_{n}"} for n in range(3)], [TRUTH] * 3)

    def script(name, turn, step):
        steps = [*PLANTED["a call a step"][0][turn], "Done."]
        hangs = name == "multi_turn_base_1" and (turn, step) == (0, 1)
        return [call("power", base=9, exponent=10**9)] if hangs else steps[step]

    monkeypatch.setattr(multi_turn, "SECONDS", 4)
    follow_by_id(monkeypatch, script)
    _, lines = command(tmp_path, "--data", data)
    assert [line["error"] for line in lines] == ["", BROKEN, ""]
    assert "its calls ran longer than 4 s" in lines[1]["failed"] and lines[1]["turn"] == 1
    assert [len(turn) for turn in lines[1]["turns"]] == [2]


def test_conversations_do_not_see_each_other(tmp_path, data, monkeypatch):
    """The same row many times at once, in both modes, in batches of any size: right each time, to the same bytes."""
    written_rows(tmp_path, [ROW | {"id": f"multi_turn_base_{number}"} for number in range(3)], [TRUTH] * 3)
    saved = []
    for size in (1, 4, 4):
        follow(monkeypatch, "qwen3", planted(PLANTED["a call a step"][0]))
        report, lines = command(tmp_path, "--data", data, "--batch_size", size)
        assert counts(report["metrics"])["multi_turn"] == (6, 6)
        saved.append([(tmp_path / "out" / f"multi_turn.{end}").read_bytes() for end in ("json", "jsonl")])
    assert saved[1] == saved[2] and saved[0][1] == saved[1][1]


def test_nothing_is_left_of_a_line():
    """In this process: the globals of BFCL's module and decimal's precision are as before, after a line that fails too;
    the same line says the same, whatever came between."""
    line = {"id": "multi_turn_base_0", "classes": ["GorillaFileSystem", "MathAPI"], "config": ROW["initial_config"]}
    square = [[[call("square_root", number=2, precision=50), MKDIR]]]
    before = set(vars(multi_turn_utils)), getcontext().prec
    replies = execute_calls.play(line | {"turns": square})
    assert len(str(replies)) > 60 and replies["replies"][1] == "None"
    for wrong in ({"config": {"GorillaFileSystem": {"root": 3}}}, {"classes": ["GorillaFileSystem", "NoSuchClass"]}):
        with pytest.raises((KeyError, AttributeError, TypeError)):
            execute_calls.play(line | {"turns": square} | wrong)
    assert (set(vars(multi_turn_utils)), getcontext().prec) == before
    assert execute_calls.play(line | {"turns": square}) == replies


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("__import__", {"name": "os"}),
        ("print", {}),
        ("exit", {}),
        ("open", {"file": "harm", "mode": "w"}),
        ("eval", {}),
        ("multi_turn_utils", {}),
        ("ls()", {}),
        ("ls", {"a=open('harm','w')": 1}),
        ("ls", {"*": 1}),
        ("ls", {"": 1}),
        ("GorillaFileSystem.ls", {}),
        ("_load_scenario", {"scenario": {}}),
        ("", {}),
        ("ls\n", {}),
        ("__init__", {}),
    ],
)
def test_what_is_no_call_of_the_classes_is_never_run(monkeypatch, name, arguments):
    """Only texts of a method with literals reach BFCL's eval; the rest gets a reply in BFCL's form."""
    line = {"id": "multi_turn_base_0", "classes": ["GorillaFileSystem"], "config": ROW["initial_config"]}
    run, ran = multi_turn_utils.execute_multi_turn_func_call, []

    def spy(calls, **more):
        ran.extend(calls)
        return run(calls, **more)

    monkeypatch.setattr(multi_turn_utils, "execute_multi_turn_func_call", spy)
    step = [call("touch", file_name=HARM), {"name": name, "arguments": arguments}, LS]
    found = execute_calls.play(line | {"turns": [[step]]})["replies"]
    assert ran == [as_text(step[0]), execute_calls.UNKNOWN, "ls()"]
    assert re.fullmatch(r"Error during execution: (name '.*' is not defined|invalid syntax)", found[1], re.S)
    assert json.loads(found[2])["current_directory_content"] == ["a", "b", HARM]


def test_replies_do_not_hang_on_the_hashes_of_a_process():
    """An error of BFCL's shows a set of words: in the same order by each process."""
    config = {"TravelAPI": {"access_token": "1", "credit_card_list": {"2": {"balance": 3}}}}
    line = {"id": "multi_turn_base_0", "classes": ["TravelAPI"], "config": config}
    booking = {
        "access_token": "1",
        "card_id": "2",
        "travel_date": "2026-11-22",
        "travel_from": "SFO",
        "travel_to": "LAX",
    }
    line |= {"turns": [[[call("book_flight", **booking, travel_class="third")]]]}
    replies = []
    for _ in range(4):
        with multi_turn.Classes() as classes:
            replies += classes.ask(line)["replies"]
    assert len(set(replies)) == 1 and "Must be one of {" in replies[0]


def test_prompts_beyond_the_context_are_wrong(tmp_path, data, monkeypatch):
    follow(monkeypatch, "qwen3_instruct_2507", planted(PLANTED["by heart"][0]), context=100)
    report, [line] = command(tmp_path, "--data", data)
    assert (line["error"], line["failed"], line["turn"]) == (BROKEN, "longer than the context", 1)
    assert counts(report["metrics"])["multi_turn"] == (0, 1)


def test_answers_that_are_cut_off(tmp_path, data, monkeypatch):
    """Malformed where the budget ends inside a call; then the turn is over without one."""
    follow(monkeypatch, "qwen3_instruct_2507", planted(PLANTED["by heart"][0]))
    report, [line] = command(tmp_path, "--data", data, "--max_new_tokens", 20)
    assert {name: found["count"] for name, found in report["metrics"].items()} == {
        "multi_turn": 0,
        "step_limit": 0,
        "malformed": 1,
        "stop_rate": 0,
    }
    assert (line["error"], line["turn"]) == (EMPTY, 1)


def test_a_template_that_refuses_later_costs_the_conversation(tmp_path, data, monkeypatch):
    follow(monkeypatch, "qwen3_instruct_2507", planted([[[MKDIR], "STOP"], [[CAT]], []]))
    _, tokenizer, _ = multi_turn.open_model()
    refuse = (
        "{%- if messages | selectattr('content', 'equalto', 'STOP') | list %}{{ raise_exception('no') }}{%- endif %}"
    )
    tokenizer.chat_template = refuse + tokenizer.chat_template
    _, [line] = command(tmp_path, "--data", data)
    assert (line["error"], line["turn"], line["answer"]) == (BROKEN, 2, "STOP") and "refuses" in line["failed"]


def test_bad_input_is_one_sentence_and_writes_nothing(tmp_path, monkeypatch, capsys):
    def version(found):
        def says(name):
            if not found:
                raise PackageNotFoundError
            return found

        return says

    cases = [
        (ROW | {"id": "multi_turn_miss_all_0"}, TRUTH, "row 1 is of multi_turn_miss_all, .* python -m eval.tool_calls"),
        (ROW | {"id": "simple_python_0"}, TRUTH, "row 1 is of simple_python, .* python -m eval.tool_calls"),
        (ROW | {"involved_classes": ["MemoryAPI_kv"]}, TRUTH, "row 1 involves MemoryAPI_kv"),
        (ROW | {"initial_config": {"GorillaFileSystem": {"root": 3}}}, TRUTH, "row 1 is not as BFCL 4 writes it"),
        ({key: ROW[key] for key in ROW if key != "initial_config"}, TRUTH, "row 1 is not as BFCL 4 writes it"),
        (ROW, TRUTH[:2], "row 1 is not as BFCL 4 writes it"),
        (ROW, [["mkdir('old')"], ["cat('b')"], ["__import__(name='os')"]], "__import__.* is no call of its functions"),
        (ROW, [["mkdir(dir_name=open('harm', 'w'))"], ["cat('b')"], []], "row 1 is not as BFCL 4 writes it"),
        (ROW, [["ls() + ls()"], ["cat('b')"], []], "row 1 is not as BFCL 4 writes it"),
    ]
    monkeypatch.chdir(tmp_path)
    follow_by_id(monkeypatch, lambda name, turn, step: "No.")
    for row, truth, expected in cases:
        data = written_rows(tmp_path, [row], [truth])
        command(tmp_path, "--data", data, code=2)
        [line] = capsys.readouterr().err.strip().splitlines()
        assert re.search(expected, line), (expected, line)
    data = written_rows(tmp_path, [ROW], [TRUTH])
    for found, expected in (("", "are not installed"), ("2025.1.1", "are those of bfcl-eval 2025.1.1")):
        monkeypatch.setattr(multi_turn, "version", version(found))
        command(tmp_path, "--data", data, code=2)
        [line] = capsys.readouterr().err.strip().splitlines()
        assert expected in line and line.endswith("pip install --no-deps bfcl-eval==2026.3.23")
    monkeypatch.undo()
    follow_by_id(monkeypatch, lambda name, turn, step: "No.", "deepseek_v3")
    command(tmp_path, "--data", data, code=2)
    assert "the model's template takes no replies to calls: measure one that does" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (tmp_path / "harm").exists()


def test_the_version_is_one():
    pins = {
        name: re.findall(r"bfcl-eval==([\d.]+)", (REPO / name).read_text())
        for name in ("Makefile", "requirements-eval.txt")
    }
    assert pins == {"Makefile": [multi_turn.BFCL], "requirements-eval.txt": [multi_turn.BFCL]}
    assert multi_turn.BFCL in multi_turn.__doc__ and multi_turn.BFCL in execute_calls.__doc__
