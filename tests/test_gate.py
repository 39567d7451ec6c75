"""eval/gate.py: each planted bad model fails by the rule that is made for it, and no other; a good one passes.

Models are answers that a table scripts, judged and written by the functions of metrics.py and compare.py; the
interval of a change is held to published values. Breaks tried, each of which turned a test red: < and > of min and
max as <= and >=; a drop shown by the interval's low end, a rise by its high end; phi without its continuity
correction, with the other sign, the two reaches swapped, tuned and base swapped, pairs ignored; a ratio as a
difference; nan as a value; what is missing passed over; exit 0; groups that see all rows; worst rows that are not
bad, or not first those that the base got right; the base's rows of a benchmark lost; unknown and doubled keys
accepted; the line before; a report that is not that of its rows; calls that do not parse let through by gate.yaml, or
asked of a run where calls were not measured.
"""

import json

import pytest

from eval import compare, gate
from eval.common import metrics, scores

CHINESE, ENGLISH = "今天天气很好，我们去公园。", "The weather is fine, we go to the park."
QUESTIONS = {"sums": "How much is three plus four?", "zh": "今天的天气怎么样？", "json": "Give it as JSON, please."}
ANSWERS = {"sums": "3 + 4 = 7.\n#### 7", "zh": CHINESE, "json": '{"k": 1}'}
ROWS = [{"id": f"{source}-{n}", "source": source, "mode": ("think", "no_think")[n % 2], "prompt": [1],
         "tags": ["json"] if source == "json" else [], "messages": [{"role": "user", "content": QUESTIONS[source]}],
         "prompt_tail": f"{QUESTIONS[source]} <{source}-{n}>", "reference": ANSWERS[source]}
        for source in ANSWERS for n in range(20)]  # fmt: skip


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


def write_run(folder, tuned, stopped=True, failed="", loss=0.5):
    """A run folder with report.json and answers.jsonl of scripted models."""

    def record(row, answer, stopped, failed, loss):
        found = metrics.judge(row["reference"], answer, stopped, failed, question=QUESTIONS[row["source"]],
                              wants_json="json" in row["tags"])  # fmt: skip
        found |= {"answer": answer, "answer_tokens": len(answer), "reference_tokens": len(row["reference"])}
        sizes = {"tokens": 10, "turns": 1, "all_nll": 20 * loss, "all_tokens": 20, "texts": 1}
        return found | {"nll": 10 * loss} | sizes

    records = {
        "base": [record(row, base(row), True, "", 1.0) for row in ROWS],
        "tuned": [record(row, tuned(row), stopped, failed, loss) for row in ROWS],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps({"results": compare.results(ROWS, records, 42)}))
    lines = [compare.dumps(line) + "\n" for line in compare.answer_lines(ROWS, records)]
    (folder / "answers.jsonl").write_text("".join(lines))
    return write_calls(folder, [False] * 20)


def write_calls(folder, malformed):
    """eval/tool_calls.json of a model whose calls do not parse where malformed says so."""
    lines = [{"id": f"simple_{n}", "answer": '{"name": "f"' if flag else "{}", "malformed": flag, "stopped": True}
             for n, flag in enumerate(malformed)]  # fmt: skip
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
    "out of memory": (dict(tuned=good, failed="out of memory"), {
        ("failed", "all"), ("stop_rate", "all"), ("loop_rate", "all"), ("empty", "all"), ("json_valid", "all"),
        ("language_retention", "all")} | USABILITY | EXACT),
}  # fmt: skip


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


# -- the change --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("cells", "low", "high"),
    [
        ((59, 6, 16, 80), -0.1186, -0.0046),  # Cavo et al. 2012, in the tests of CRAN's contingencytables
        ((1, 1, 7, 12), -0.507, -0.026),  # Bentur et al. 2009, in Fagerland, Lydersen and Laake 2014
    ],
)
def test_paired_interval_is_the_published_one(cells, low, high):
    assert gate.difference(*cells) == (pytest.approx(low, abs=5e-4), pytest.approx(high, abs=5e-4))
    turned = gate.difference(cells[0], cells[2], cells[1], cells[3])
    assert turned == (pytest.approx(-high, abs=5e-4), pytest.approx(-low, abs=5e-4))


def test_unpaired_interval_is_the_published_one():
    """56 of 70 against 48 of 80: Newcombe 1998 (Statistics in Medicine 17, 873-890), table II, method 10."""
    one, other = ((count / total, *metrics.wilson(count, total)) for count, total in ((56, 70), (48, 80)))
    assert gate.joined(one, other) == (pytest.approx(0.0524, abs=5e-5), pytest.approx(0.3339, abs=5e-5))


def models(tuned, base):
    """(models, rows) of scripted flags."""
    rows = [{"id": n, "tuned": {"stopped": a, "answer": ""}, "base": {"stopped": b, "answer": ""}}
            for n, (a, b) in enumerate(zip(tuned, base, strict=True))]  # fmt: skip
    return {"tuned": {"stop_rate": metrics.rate(tuned)}, "base": {"stop_rate": metrics.rate(base)}}, rows


def test_pairs_show_a_drop_that_unpaired_rates_do_not():
    tuned, before = [True] * 90 + [False] * 110, [True] * 98 + [False] * 102
    found, rows = models(tuned, before)
    rule = {"metric": "stop_rate", "max_drop": 0.0}
    assert gate.judge(rule, "all", found, rows)["status"] == "failed"  # 8 lost, none won: McNemar's exact p is 0.008
    assert gate.judge(rule, "all", found, [])["status"] == "passed"  # by 45% against 49%, nobody could tell
    assert gate.judge(rule | {"max_drop": 0.04}, "all", found, rows)["status"] == "passed"
    few, rows = models([True] * 9 + [False], [True] * 10)
    assert gate.judge(rule, "all", few, rows)["status"] == "passed"  # one row of ten is chance
    rise = {"metric": "stop_rate", "max_rise": 0.0}
    assert gate.judge(rise, "all", *models([True] * 10, [True] * 9 + [False]))["status"] == "passed"
    assert gate.judge(rise, "all", *models(before, tuned))["status"] == "failed"
    assert gate.judge(rise, "all", *models(tuned, before))["status"] == "passed"


def test_the_limits_themselves_are_met():
    found = {"tuned": {"perplexity": {"value": 2.0}}, "base": {"perplexity": {"value": 1.0}}}
    for limit, met, missed in (("min", 2, 2.01), ("max", 2, 1.99), ("max_ratio", 2, 1.99), ("max_rise", 1, 0.9)):
        assert gate.judge({"metric": "perplexity", limit: met}, "all", found, [])["status"] == "passed"
        assert gate.judge({"metric": "perplexity", limit: missed}, "all", found, [])["status"] == "failed"
    unknown = {"tuned": {"perplexity": {"value": float("nan")}}}
    assert gate.judge({"metric": "perplexity", "max": 9}, "all", unknown, [])["status"] == "failed"


# -- rules and what they name ------------------------------------------------------------------------------------------
def rules(tmp_path, text):
    path = tmp_path / "rules.yaml"
    path.write_text(text)
    return path


def test_what_the_report_lacks_fails(tmp_path, capsys):
    write_run(tmp_path, good)
    for text in (
        "- metric: politeness\n  min: 0.5",
        "- metric: stop_rate\n  by: planet\n  min: 0.5",
        "- metric: stop_rate\n  by: source\n  group: poems\n  min: 0.5",
        "- benchmark: mmlu\n  metric: accuracy\n  min: 0.5",
    ):
        code, out, _ = run(capsys, tmp_path, "--rules", rules(tmp_path, text))
        assert code == 1 and "was not measured" in out and out.startswith("FAIL")
        code, out, _ = run(capsys, tmp_path, "--rules", rules(tmp_path, text + "\n  required: false"))
        assert code == 0 and "was not measured" in out and "0 met, 0 failed, 1 not measured" in out


def test_benchmarks_by_name_against_the_base_and_by_group(tmp_path, capsys):
    def measured(folder, flags):
        lines = [{"id": str(n), "mode": ("think", "no_think")[n % 2], "right": flag, "answer": f"answer {n}"}
                 for n, flag in enumerate(flags)]  # fmt: skip
        names = {"right": "right"}
        scores.write_scores(folder / "eval", "quiz", {}, scores.rates(lines, names),
                            scores.grouped(lines, names, "mode"), lines)  # fmt: skip
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
