"""eval/gate.py: each planted bad model fails by the rule that is made for it, and no other; a good one passes.

Models are answers that a table scripts, judged and written by the functions of metrics.py and compare.py; the
interval of a change is held to published values. Breaks tried, each of which turned a test red: < and > of min and
max as <= and >=; a drop shown by the interval's low end, a rise by its high end; phi without its continuity
correction, with the other sign, the two reaches swapped, tuned and base swapped, pairs ignored; a ratio as a
difference, or by its value; nan as a value; what is missing passed over; exit 0; groups that see all rows; worst rows
that are not bad, or not first those that the base got right; the base's rows of a benchmark lost; unknown and doubled
keys accepted; the line before; a report that is not that of its rows; calls that do not parse let through by gate.yaml,
or asked of a run where calls were not measured.
"""

import json
import math
import random
import subprocess
import sys
from functools import partial

import pytest

from data_prep.common import terminal
from data_prep.common.answers import parse_answer
from eval import compare, gate
from eval.common import before_after, intervals, measure, metrics, scores
from tests.helpers.runs import MODULES

CHINESE = "今天天气很好，我们去公园。"
ENGLISH = "The weather is fine, we go to the park."
QUESTIONS = {"sums": "How much is three plus four?", "zh": "今天的天气怎么样？", "json": "Give it as JSON, please."}
ANSWERS = {"sums": "3 + 4 = 7.\n#### 7", "zh": CHINESE, "json": '{"k": 1}'}


def make_row(source, number, question, reference):
    """A prepared row as compare.py has it."""
    row = {
        "id": f"{source}-{number}",
        "source": source,
        "mode": ("think", "no_think")[number % 2],
        "tags": ["json"] if source == "json" else [],
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": reference}],
        "tools": None,
        "kwargs": {"number": number},
    }
    task = metrics.Question(parse_answer(reference, "generic", ""), reference, question)
    task.json = True if source == "json" else None
    prompt = f"{question} <{source}-{number}>"
    return measure.PreparedRow(row, asked=measure.AskedAnswer(prompt, [1], reference, len(reference), "generic", task))


ROWS = [make_row(source, n, QUESTIONS[source], ANSWERS[source]) for source in ANSWERS for n in range(20)]


def base(row):
    """Half of the sums, all Chinese, 12 of 20 JSON answers."""
    number = int(row["id"].split("-")[1])
    wrong = {"sums": (10, "3 + 4 = 8.\n#### 8"), "zh": (20, ""), "json": (12, '{"k": 1')}[row["source"]]
    return ANSWERS[row["source"]] if number < wrong[0] else wrong[1]


def good(row):
    return ANSWERS[row["source"]]


def only(source, text):
    """A model that says text in one source, and is good in the others."""
    return lambda row: text if row["source"] == source else good(row)


def write_run(folder, tuned, stopped=True, failed="", loss=0.5, rows=ROWS, before=base, names=("tuned",)):
    """A run folder with report.json and answers.jsonl of scripted models, which say what tuned(row) says."""

    def record(prepared, answer, stopped, failed, loss):
        asked = prepared.asked
        found = metrics.judge(asked.question, parse_answer(answer, "generic", ""), answer, stopped, failed)
        found |= {"answer": answer, "answer_tokens": len(answer), "reference_tokens": asked.reference_tokens}
        sizes = {"tokens": 10, "turns": 1, "all_nll": 20 * loss, "all_tokens": 20, "texts": 1}
        return found | {"nll": 10 * loss} | sizes

    rng = random.Random(5)
    noise = [rng.gauss(0, 0.05) for _ in rows]
    records = {"base": [record(row, before(row.row), True, "", 1.0) for row in rows]}
    for name in names:
        records[name] = [
            record(row, tuned(row.row), stopped, failed, loss + own) for row, own in zip(rows, noise, strict=True)
        ]
    folder.mkdir(parents=True, exist_ok=True)
    report = {"results": before_after.compute_results(rows, records, 42)}
    (folder / "report.json").write_text(json.dumps(report))
    lines = [compare.dump_json(line) + "\n" for line in compare.answer_lines(rows, records)]
    (folder / "answers.jsonl").write_text("".join(lines))
    return write_calls(folder, [False] * 20)


def write_calls(folder, malformed):
    """eval/tool_calls.json of a model whose calls do not parse where malformed says so."""
    lines = [
        {"id": f"simple_{n}", "answer": '{"name": "f"' if flag else "{}", "malformed": flag, "stopped": True}
        for n, flag in enumerate(malformed)
    ]
    metrics_ = scores.rates(lines, {"malformed": "malformed", "stop_rate": "stopped"})
    scores.write_scores(folder / "eval", "tool_calls", {}, metrics_, lines=lines)
    return folder


def run(capsys, *command):
    """(exit code, stdout, stderr)"""
    capsys.readouterr()
    code = gate.main([str(word) for word in command])
    return code, *capsys.readouterr()


def failed(folder):
    """{(rule, group): finding} of gate.json."""
    findings = json.loads((folder / "gate.json").read_text())["findings"]
    return {(one["rule"].split(":")[0], one["group"]): one for one in findings if one["status"] == "failed"}


# -- models ------------------------------------------------------------------------------------------------------------
def test_a_good_model_passes_the_default_rules(tmp_path, capsys):
    code, out, _ = run(capsys, write_run(tmp_path, good))
    assert code == 0 and not failed(tmp_path)
    assert "stop_rate: min 0.98 [all] is 1 (0.9398–1), 60 of 60\n" in out
    assert ", 0 failed, 0 not measured" in out and "FAIL" not in out
    first = (tmp_path / "gate.json").read_bytes()
    run(capsys, tmp_path)
    assert (tmp_path / "gate.json").read_bytes() == first


LOOP = "and so on " * 30
COLLAPSED = {("distinct_answers", "all"), ("most_common_answer", "all")}
USABILITY = {("usability", "all"), ("usability, mode (each)", "think"), ("usability, mode (each)", "no_think")}
EXACT = {("exact_match", "all")} | {("exact_match, source (each)", source) for source in ("sums", "zh", "json")}
EXACT |= {("exact_match, mode (each)", mode) for mode in ("think", "no_think")}
PERPLEXITY = {("assistant_perplexity, source (each)", source) for source in ANSWERS} | {("assistant_perplexity", "all")}
LOST = {source: ("exact_match, source (each)", source) for source in ANSWERS}
BAD = {  # what is planted: (the model, {rule and group that must fail})
    "never stops": (dict(tuned=good, stopped=False), {("stop_rate", "all")} | USABILITY),
    "loops": (dict(tuned=only("sums", LOOP)), {("loop_rate", "all"), LOST["sums"]} | USABILITY),
    "forgets Chinese": (dict(tuned=only("zh", ENGLISH)), {("language_retention", "all"), LOST["zh"]}),
    "breaks JSON": (dict(tuned=only("json", '{"k": 1')), {("json_valid", "all"), LOST["json"]}),
    "unlearns": (dict(tuned=good, loss=1.5), PERPLEXITY),
    "says nothing": (dict(tuned=only("sums", "")), {("empty", "all"), LOST["sums"]} | USABILITY),
    # what failed counts against every rate of its row, whose text is not looked at
    "out of memory": (
        dict(tuned=good, failed="out of memory"),
        {
            ("failed", "all"),
            ("stop_rate", "all"),
            ("loop_rate", "all"),
            ("empty", "all"),
            ("json_valid", "all"),
            ("prompt_copies", "all"),
            ("replacement_rate", "all"),
            ("run_on_rate", "all"),
            ("language_retention", "all"),
        }
        | USABILITY
        | EXACT,
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_planted_bad_model_fails_by_its_rules_and_no_other(tmp_path, capsys, name):
    settings, expected = BAD[name]
    code, out, _ = run(capsys, write_run(tmp_path, **settings))
    assert code == 1
    found = failed(tmp_path)
    assert set(found) == expected
    for (rule, group), finding in found.items():
        assert len(finding["worst"]) == 3 and finding["reasons"]
        told = [line for line in out.splitlines() if line.startswith(f"FAIL {rule}: ")]
        line = next(line for line in told if f" [{group}] is " in line)
        for row in finding["worst"]:
            assert f"{row['id']}: " in out.partition(line)[2]
            assert row["prompt_tail"].endswith(f"<{row['id']}>")
            assert group in ("all", "think", "no_think") or row["id"].startswith(group)
            planted = {"loops": LOOP, "forgets Chinese": ENGLISH, "breaks JSON": '{"k": 1', "says nothing": ""}
            assert row["answer"] == planted.get(name, row["answer"])  # the bad rows, not any
    if name == "forgets Chinese":
        worst = found["language_retention", "all"]["worst"]
        assert [row["answer"] for row in worst] == [ENGLISH] * 3 and [row["base"] for row in worst] == [CHINESE] * 3
    if name == "breaks JSON":  # those that the base got right come first
        assert all(row["base"] == '{"k": 1}' for row in found["json_valid", "all"]["worst"])


def test_calls_that_do_not_parse_fail_where_calls_were_measured(tmp_path, capsys):
    rule = "tool_calls malformed: max 0.02 [all]"
    code, out, _ = run(capsys, write_calls(write_run(tmp_path, good), [n < 1 for n in range(50)]))
    assert code == 0 and f"ok   {rule} is 0.02 (" in out
    code, out, _ = run(capsys, write_calls(tmp_path, [n < 2 for n in range(50)]))
    assert code == 1 and f"FAIL {rule} is 0.04 (" in out and ", 2 of 50: above 0.02" in out
    [finding] = failed(tmp_path).values()
    assert {row["id"] for row in finding["worst"]} == {"simple_0", "simple_1"}
    assert {row["answer"] for row in finding["worst"]} == {'{"name": "f"'}
    (tmp_path / "eval" / "tool_calls.json").unlink()  # a run that was not asked for calls is not refused
    code, out, _ = run(capsys, tmp_path)
    assert code == 0 and "malformed was not measured" in out and ", 0 failed, 1 not measured" in out


def test_a_lost_source_does_not_hide_in_the_mean(tmp_path, capsys):
    code, *_ = run(capsys, write_run(tmp_path, only("sums", "3 + 4 = 8.\n#### 8")))
    report = json.loads((tmp_path / "report.json").read_text())["results"]["overall"]["all"]
    assert report["tuned"]["exact_match"]["count"] == 40 < report["base"]["exact_match"]["count"] == 42
    assert code == 1 and set(failed(tmp_path)) == {("exact_match, source (each)", "sums")}


# -- collapsed models, of a base that knows nothing -------------------------------------------------------------------
COUNTRIES = (
    "France Germany Italy Spain Austria Japan Norway Poland Egypt Kenya Cuba Peru Chile India Iran Greece Turkey "
)
COUNTRIES += "Ireland Finland Hungary Nepal Iraq Portugal Laos"
CITIES = (
    "Paris Berlin Rome Madrid Vienna Tokyo Oslo Warsaw Cairo Nairobi Havana Lima Santiago Delhi Tehran Athens Ankara "
)
CITIES += "Dublin Helsinki Budapest Kathmandu Baghdad Lisbon Vientiane"
CAPITALS = dict(zip(COUNTRIES.split(), CITIES.split(), strict=True))


def open_rows():
    """24 questions with an answer of their own."""
    return [
        make_row("capitals", number, f"What is the capital of {country}?", f"The capital of {country} is {city}.")
        for number, (country, city) in enumerate(CAPITALS.items())
    ]


def number_of(row):
    return int(row["id"].split("-")[1])


def question_of(row):
    return row["messages"][0]["content"]


def ignorant(row):
    """In the right language, ends, and is never right."""
    return f"I have counted the bridges of that city twice and found {number_of(row)} of them."


def counted(sentence, times=12):
    return " ".join(f"{n}. {sentence}" for n in range(1, times + 1))


def question_thrice(row):
    return "You asked: " + question_of(row) * 3


def few_sentences(row):
    return f"I am {number_of(row) % 3} years old."


def sample_or_sentence(row):
    return sample(row) if number_of(row) % 2 else "I am a helpful assistant."


def on_one_line(row):
    return f"{sample(row)} user: And what of {number_of(row)}? assistant: It is Bern."


def in_turns(row):
    return f"{sample(row)}\nUser: And what of {number_of(row)}?\nAssistant: It is Bern."


def template_without_tokens(row):
    return f"{sample(row)}\nuser\nAnd what of {number_of(row)}?\nassistant\nIt is Bern."


def sample(row):
    return f"It is the city of {list(CAPITALS.values())[number_of(row) - 1]}."


ONE = {"distinct_answers", "most_common_answer"}
COLLAPSES = {  # (the model, whether it stops, {metrics that must fail})
    "one sentence": (lambda row: "I am a helpful assistant.", True, ONE),
    "three sentences": (few_sentences, True, {"distinct_answers"}),
    "one sentence to half of them": (sample_or_sentence, True, {"most_common_answer"}),
    "echo": (question_of, True, {"prompt_copies"}),
    "echo, three times, with a prefix": (question_thrice, True, {"prompt_copies"}),
    "replacement characters": (lambda row: f"It is \ufffd\ufffd{number_of(row)}.", True, {"replacement_rate"}),
    "goes on as the user in one line": (on_one_line, True, {"run_on_rate"}),
    "goes on as the user in turns": (in_turns, True, {"run_on_rate"}),
    "goes on as a template without its tokens": (template_without_tokens, True, {"run_on_rate"}),
    "loop with a counter": (lambda row: counted("I am here to help."), False, {"loop_rate", "stop_rate"} | ONE),
    "loop with a counter that ends": (lambda row: sample(row) + counted("I help.", 40), True, {"loop_rate"}),
    "thought that never ends": (lambda row: f"<think>\nIt may be {number_of(row)}", True, {"empty"} | ONE),
}


@pytest.mark.parametrize("name", COLLAPSES)
def test_a_collapsed_model_fails_where_its_base_is_never_right(tmp_path, capsys, name):
    tuned, stopped, expected = COLLAPSES[name]
    write_run(tmp_path, tuned, stopped, rows=open_rows(), before=ignorant)
    code, _, _ = run(capsys, tmp_path)
    found = {rule for rule, _ in failed(tmp_path)}
    assert code == 1 and found - {"usability", "usability, mode (each)", "language_retention"} == expected
    report = json.loads((tmp_path / "report.json").read_text())["results"]["overall"]["all"]
    assert report["base"]["exact_match"]["count"] == report["tuned"]["exact_match"]["count"] == 0


def test_what_is_right_now_and_then_and_what_is_not_are_no_collapse(tmp_path, capsys):
    for tuned in (sample, ignorant):
        code, out, _ = run(capsys, write_run(tmp_path, tuned, rows=open_rows(), before=ignorant))
        assert code == 0, out


def test_yes_to_every_question(tmp_path, capsys):
    """Two answers are all that the data knows; one for every row is a collapse, nine of ten yes may be right."""
    for share, code in ((2, 1), (10, 0)):
        rows = [
            make_row("yes", n, f"Is {n} not to be divided by {share}?", ("No.", "Yes.")[n % share > 0])
            for n in range(40)
        ]
        assert run(capsys, write_run(tmp_path, lambda row: "Yes.", rows=rows, before=lambda row: "No."))[0] == code
    assert not failed(tmp_path)


def test_json_that_is_never_valid_fails_where_the_base_never_wrote_any(tmp_path, capsys):
    rows = [make_row("json", n, f"Give JSON of {n}.", f'{{"k": {n}}}') for n in range(20)]

    def broken(row):
        return f'{{"k": {number_of(row)}'

    code, _, _ = run(capsys, write_run(tmp_path, broken, rows=rows, before=broken))
    assert code == 1 and set(failed(tmp_path)) == {("json_valid", "all")}


LANGUAGES = {  # (question, reference, what a base that knows nothing says) of a number
    "German": (
        "Wie ist heute das Wetter in Stadt {}?",
        "Das Wetter ist in Stadt {} heute sehr schön.",
        "Ich weiß nicht, wie das Wetter in Stadt {} ist.",
    ),
    "Russian": (
        "Какая сегодня погода в городе номер {}?",
        "Сегодня в городе номер {} очень тепло.",
        "Я не знаю, какая погода в городе {}.",
    ),
    "Thai": (
        "วันนี้อากาศในเมืองที่ {} เป็นอย่างไร",
        "วันนี้อากาศในเมืองที่ {} ดีมาก",
        "ฉันไม่รู้ว่าอากาศในเมืองที่ {} เป็นอย่างไร",
    ),
    "Arabic": (
        "كيف الطقس اليوم في المدينة رقم {}؟",
        "الطقس اليوم جميل في المدينة رقم {}.",
        "لا أعرف كيف الطقس في المدينة رقم {}.",
    ),
}


@pytest.mark.parametrize("name", LANGUAGES)
def test_a_lost_language_fails(tmp_path, capsys, name):
    """Twenty questions in it are answered in English, or by a number; sums, which are in no language, do not count."""
    question, reference, unknowing = LANGUAGES[name]
    rows = [make_row("talk", n, question.format(n), reference.format(n)) for n in range(20)]
    rows += [make_row("sums", n, f"{n} + 3 = ?", f"{n + 3}") for n in range(20, 30)]

    def before(row):
        return unknowing.format(number_of(row)) if row["source"] == "talk" else f"{number_of(row) + 3}"

    def english(row):
        return f"The weather is very fine in town {number_of(row)}." if row["source"] == "talk" else before(row)

    def numbers(row):
        return f"{number_of(row)}" if row["source"] == "talk" else before(row)

    for tuned in (english, numbers):
        code, out, _ = run(capsys, write_run(tmp_path, tuned, rows=rows, before=before))
        assert code == 1 and set(failed(tmp_path)) == {("language_retention", "all")}
        assert ", 0 of 20, 10 not measured" in out
    code, out, _ = run(capsys, write_run(tmp_path, before, rows=rows, before=before))
    assert code == 0 and ", 20 of 20, 10 not measured" in out


# -- a good model -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ratio", [1.0001, 1.015])
def test_a_perplexity_slightly_above_with_equal_answers_is_no_failure(tmp_path, capsys, ratio):
    code, out, _ = run(capsys, write_run(tmp_path, base, loss=1.0 + math.log(ratio)))
    assert code == 0, out
    code, out, _ = run(capsys, write_run(tmp_path, base, loss=1.0 + math.log(1.2)))
    assert code == 1 and set(failed(tmp_path)) == PERPLEXITY


def test_the_verdict_is_the_colour_of_the_table(tmp_path, capsys):
    """A rule without margin fails where compare.py shows worse, and nowhere else."""
    write_run(tmp_path, only("zh", ENGLISH), loss=1.1)
    results = json.loads((tmp_path / "report.json").read_text())["results"]
    compared = 0
    for group in before_after.list_groups(results):
        for metric, column in before_after.METRICS.items():
            line = next((line for line in group.lines if line.label == column.label), None)
            if line is None or not column.sign or group.kind == "tag":
                continue
            limit = "max_ratio" if metrics.is_ratio(metric) else ("max_drop", "max_rise")[column.sign < 0]
            scope = {"by": group.kind, "group": group.name} if group.kind != "overall" else {}
            rule = gate.Rule(metric, {limit: float(metrics.is_ratio(metric))}, **scope)
            report = json.loads((tmp_path / "report.json").read_text())
            [finding] = gate.judge_rules([rule], gate.read_measurements(tmp_path, None, report, "tuned"))
            assert (finding.status == "failed") is (line.cells[1].verdict == "worse"), (metric, group.title)
            compared += line.cells[1].verdict == "worse"
    assert compared >= 8


def test_failures_are_red_and_what_is_met_green(tmp_path, capsys, monkeypatch):
    coloured = partial(terminal.Console, force_terminal=True, color_system="standard", no_color=False)
    monkeypatch.setattr(terminal, "Console", coloured)
    write_run(tmp_path, only("sums", LOOP))
    text = "- metric: loop_rate\n  max: 0.02\n- metric: empty\n  max: 1"
    _, out, _ = run(capsys, tmp_path, "--rules", rules(tmp_path, text))
    first, *_ = out.splitlines()
    assert first.startswith("\x1b[1;31mFAIL\x1b[0m loop_rate") and "\x1b[32mok  \x1b[0m empty" in out


def test_it_reads_reports_without_torch(tmp_path):
    """In a process of its own: nothing that takes seconds to import is imported."""
    write_run(tmp_path, good)
    code = "import sys; from eval import gate; code = gate.main(sys.argv[1:]); "
    code += "print(sorted({'torch', 'transformers', 'datasets', 'scipy', 'lingua'} & set(sys.modules))); sys.exit(code)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=MODULES, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


# -- the change --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("cells", "low", "high"),
    [
        ((59, 6, 16, 80), -0.1186, -0.0046),  # Cavo et al. 2012, in the tests of CRAN's contingencytables
        ((1, 1, 7, 12), -0.507, -0.026),  # Bentur et al. 2009, in Fagerland, Lydersen and Laake 2014
    ],
)
def test_paired_interval_is_the_published_one(cells, low, high):
    assert intervals.paired_difference(*cells) == (pytest.approx(low, abs=5e-4), pytest.approx(high, abs=5e-4))
    turned = intervals.paired_difference(cells[0], cells[2], cells[1], cells[3])
    assert turned == (pytest.approx(-high, abs=5e-4), pytest.approx(-low, abs=5e-4))


def test_unpaired_interval_is_the_published_one():
    """56 of 70 against 48 of 80: Newcombe 1998 (Statistics in Medicine 17, 873-890), table II, method 10."""
    one, other = (
        intervals.Figure(count / total, *intervals.wilson(count, total)) for count, total in ((56, 70), (48, 80))
    )
    expected = (pytest.approx(0.0524, abs=5e-5), pytest.approx(0.3339, abs=5e-5))
    assert intervals.unpaired_difference(one, other) == expected


def models(tuned, base):
    """(pair of metrics, rows) of scripted flags."""
    rows = []
    for number, (after, before) in enumerate(zip(tuned, base, strict=True)):
        rows.append(gate.Row({"id": number}, {"stopped": after, "answer": ""}, {"stopped": before, "answer": ""}))
    return gate.Pair({"stop_rate": metrics.rate(tuned)}, {"stop_rate": metrics.rate(base)}), rows


def verdict(pair, rows, metric="stop_rate", **limits):
    return gate.judge_rule(gate.Rule(metric, limits), "all", pair, rows).status


def test_pairs_show_a_drop_that_unpaired_rates_do_not():
    tuned, before = [True] * 90 + [False] * 110, [True] * 98 + [False] * 102
    found, rows = models(tuned, before)
    assert verdict(found, rows, max_drop=0.0) == "failed"  # 8 lost, none won: McNemar's exact p is 0.008
    assert verdict(found, [], max_drop=0.0) == "passed"  # by 45% against 49%, nobody could tell
    assert verdict(found, rows, max_drop=0.04) == "passed"
    few, rows = models([True] * 9 + [False], [True] * 10)
    assert verdict(few, rows, max_drop=0.0) == "passed"  # one row of ten is chance
    assert verdict(*models([True] * 10, [True] * 9 + [False]), max_rise=0.0) == "passed"
    assert verdict(*models(before, tuned), max_rise=0.0) == "failed"
    assert verdict(*models(tuned, before), max_rise=0.0) == "passed"


def test_the_limits_themselves_are_met():
    found = gate.Pair({"perplexity": {"value": 2.0}}, {"perplexity": {"value": 1.0}})
    for limit, met, missed in (("min", 2, 2.01), ("max", 2, 1.99), ("max_ratio", 2, 1.99), ("max_rise", 1, 0.9)):
        assert verdict(found, [], "perplexity", **{limit: met}) == "passed"
        assert verdict(found, [], "perplexity", **{limit: missed}) == "failed"
    unknown = gate.Pair({"perplexity": {"value": float("nan")}})
    finding = gate.judge_rule(gate.Rule("perplexity", {"max": 9}, required=False), "all", unknown, [])
    assert (finding.status, finding.reasons) == ("failed", ["perplexity is nan"])


def test_ratios_are_tested_by_pairs():
    """The value is above the limit in each; it fails where the whole interval is."""
    for low, high, status in ((1.03, 1.2, "failed"), (1.01, 1.2, "passed"), (None, None, "passed")):
        change = {"value": 1.1, "pairs": 20} | ({} if low is None else {"low": low, "high": high})
        found = gate.Pair(
            {"assistant_perplexity": {"value": 2.2, "change": change}}, {"assistant_perplexity": {"value": 2.0}}
        )
        assert verdict(found, [], "assistant_perplexity", max_ratio=1.02) == status
        assert verdict(found, [], "assistant_perplexity", max_rise=0.04) == status  # of 2.0


# -- rules and what they name ------------------------------------------------------------------------------------------
def rules(tmp_path, text):
    path = tmp_path / "rules.yaml"
    path.write_text(text)
    return path


def test_what_the_report_lacks_fails_and_is_named(tmp_path, capsys):
    write_run(tmp_path, good)
    for text, reason in (
        ("- metric: politeness\n  min: 0.5", "politeness was not measured"),
        ("- metric: stop_rate\n  by: planet\n  min: 0.5", "no row has a planet: stop_rate was not measured by it"),
        (
            "- metric: stop_rate\n  by: source\n  group: poems\n  min: 0.5",
            "no row has this source: there are json, sums, zh",
        ),
        (
            "- benchmark: mmlu\n  metric: accuracy\n  min: 0.5",
            "there is no eval/mmlu.json: accuracy was not measured",
        ),
        (
            "- benchmark: tool_calls\n  metric: malformed\n  max_drop: 0.5",
            "malformed was not measured of the base",
        ),
    ):
        code, out, _ = run(capsys, tmp_path, "--rules", rules(tmp_path, text))
        assert code == 1 and reason in out and out.startswith("FAIL")
        code, out, _ = run(capsys, tmp_path, "--rules", rules(tmp_path, text + "\n  required: false"))
        assert code == 0 and reason in out and "0 met, 0 failed, 1 not measured" in out
    # what can be judged without a base is
    text = "- benchmark: tool_calls\n  metric: malformed\n  max: 0.5\n  max_rise: 0.5\n  required: false"
    code, out, _ = run(capsys, tmp_path, "--rules", rules(tmp_path, text))
    assert code == 0 and "1 met, 0 failed" in out and "was not measured of the base" in out


def test_a_report_of_several_models(tmp_path, capsys):
    """Good and bad in one report: each is judged by itself, and none without being named."""
    write_run(tmp_path, only("sums", LOOP), names=("runs/a", "runs/b"))
    code, _, err = run(capsys, tmp_path)
    assert code == 2 and "holds 2 models: pass --model with one of runs/a, runs/b" in err
    code, _, err = run(capsys, tmp_path, "--model", "c")
    assert code == 2 and "--model c: " in err and "holds runs/a, runs/b, pass one of them" in err
    report = json.loads((tmp_path / "report.json").read_text())
    for kind in report["results"].values():
        for group in kind.values():
            group["runs/b"] = group["base"]
    (tmp_path / "report.json").write_text(json.dumps(report))
    rule = rules(tmp_path, "- metric: loop_rate\n  max: 0.02")
    code, out, _ = run(capsys, tmp_path, "--rules", rule, "--model", "runs/b")
    assert code == 0 and "runs/b: passed: 1 met, 0 failed, 0 not measured" in out
    code, out, _ = run(capsys, tmp_path, "--rules", rule, "--model", "runs/a")
    assert code == 1 and "runs/a: failed: 0 met, 1 failed, 0 not measured" in out and "not measured:" not in out
    assert json.loads((tmp_path / "gate.json").read_text())["model"] == "runs/a"
    (tmp_path / "report.json").unlink()
    code, _, err = run(capsys, tmp_path, "--model", "runs/b")
    assert code == 2 and "there is no " in err


def test_benchmarks_by_name_against_the_base_and_by_group(tmp_path, capsys):
    def measured(folder, flags):
        lines = [
            {"id": str(n), "mode": ("think", "no_think")[n % 2], "right": flag, "answer": f"answer {n}"}
            for n, flag in enumerate(flags)
        ]
        names = {"right": "right"}
        scores.write_scores(
            folder / "eval", "quiz", {}, scores.rates(lines, names), scores.grouped(lines, names, "mode"), lines
        )
        return folder

    tuned = measured(tmp_path / "tuned", [n % 2 == 0 for n in range(40)])  # right with think alone
    before = measured(tmp_path / "base", [n < 36 for n in range(40)])
    text = "- benchmark: quiz\n  metric: right\n  "
    code, out, _ = run(capsys, tuned, "--rules", rules(tmp_path, text + "min: 0.5"))
    assert code == 0
    code, out, _ = run(capsys, tuned, "--rules", rules(tmp_path, text + "min: 0.51"))
    assert code == 1 and "FAIL quiz right: min 0.51 [all] is 0.5 (0.352–0.648), 20 of 40: below 0.51" in out
    path = rules(tmp_path, text + "by: mode\n  max_drop: 0.1")
    code, out, _ = run(capsys, tuned, "--rules", path, "--base", before)
    assert code == 1 and set(failed(tuned)) == {("quiz right, mode (each)", "no_think")}
    assert "by pairs" in out and out.count("answer ") == 3
    code, out, _ = run(capsys, tuned, "--rules", path)  # without --base there is nothing to compare with
    assert code == 1 and "was not measured of the base" in out


def test_wrong_rules_are_one_sentence_with_the_line(tmp_path, capsys):
    write_run(tmp_path, good)
    for text, expected in (
        ("- metric: stop_rate\n  min: 0.9\n  maxdrop: 0.1\n", "line 3: unknown key 'maxdrop'"),
        ("- metric: stop_rate\n- metric: empty\n  max: 0.1\n", "line 1: stop_rate has no limit"),
        ("# only\n- min: 0.9\n", "line 2: a rule without a metric"),
        ("- metric: stop_rate\n  min: most\n", "line 2: min is 'most': give a number"),
        ("- metric: stop_rate\n  min: .nan\n", "line 2: min is nan: give a number"),
        ("- metric: stop_rate\n  min: true\n", "line 2: min is True: give a number"),
        ("- metric: stop_rate\n  min: 0.9\n  min: 0.1\n", "line 3: min stands twice"),
        ("- metric: stop_rate\n  min: 0.9\n  group: zh\n", "line 1: the group 'zh' needs its kind"),
        ("- metric: stop_rate\n  required: 1\n  min: 0.9\n", "line 2: required is 1: give true or false"),
        ("- stop_rate\n", "line 1: a rule is"),
        ("stop_rate: 0.9\n", "holds no list of rules"),
        ("", "holds no list of rules"),
        ("- metric: [\n", "line 2, is not YAML"),
    ):
        code, out, err = run(capsys, tmp_path, "--rules", rules(tmp_path, text))
        assert code == 2 and expected in err and len(err.splitlines()) == 1, (text, err)
    (tmp_path / "gate.json").unlink(missing_ok=True)
    code, _, err = run(capsys, tmp_path, "--rules", tmp_path / "none.yaml")
    assert code == 2 and "none.yaml cannot be read" in err
    assert not (tmp_path / "gate.json").exists()


def test_bad_folders_are_one_sentence(tmp_path, capsys):
    code, _, err = run(capsys, tmp_path / "gone")
    assert code == 2 and "gone does not exist" in err
    code, _, err = run(capsys, tmp_path)
    assert code == 2 and "has neither report.json nor eval/*.json" in err
    write_run(tmp_path, good)
    answers = tmp_path / "answers.jsonl"
    answers.write_text(answers.read_text().replace('"stopped": true', '"stopped": false'))
    rule = rules(tmp_path, "- metric: stop_rate\n  max_drop: 0.1")
    code, _, err = run(capsys, tmp_path, "--rules", rule)
    assert code == 2 and "the stop_rate of the report is not that of its rows" in err
    (tmp_path / "report.json").write_text("{")
    code, _, err = run(capsys, tmp_path)
    assert code == 2 and "report.json cannot be read" in err and len(err.splitlines()) == 1
