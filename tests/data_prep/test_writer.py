"""What DatasetWriter leaves: every row counted, a folder that datasets reads, or nothing.

Each of these turns the suite red (tried): ids not made unique; counts not compared; the folder aside left.
"""

import json
from unittest import mock

import pytest
from datasets import load_from_disk

from data_prep.common import readers, writer
from data_prep.common.errors import InvalidRow, UsageError
from data_prep.common.rows import check_encodable, check_shape


# -- Writer -----------------------------------------------------------------------------------------------------------
def complete(row_id, answer="b", **more):
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
    return {"id": row_id, "messages": said, "chat_template_kwargs": {}, "source": "s", "tags": [], "lang": "en", **more}


def result(rows, jsonl, rejected=(), split="train"):
    return writer.ChunkResult({split: writer.encode_rows(rows, jsonl)}, [*rejected], len(rows) + len(rejected))


@pytest.mark.parametrize("name", ["out", "out.jsonl"])
def test_writer_counts_what_goes_in_and_out(tmp_path, name):
    entry = {"file": "f", "line": 2, "id": "x", "reason": "r", "detail": "half \ud800"}
    with writer.DatasetWriter(tmp_path / name, "step.py", 3) as out_writer:
        out_writer.add(result([complete("a"), complete("a", "c")], out_writer.is_jsonl, [entry]))
        out_writer.add(result([complete("a", "d")], out_writer.is_jsonl))
        report = out_writer.close({"more": 1})
    assert (report["in"], report["out"], report["refused"], report["more"]) == (4, {"train": 3}, {"r": 1}, 1)
    out = tmp_path / name
    beside = (lambda end: out.with_suffix(end)) if out_writer.is_jsonl else (lambda end: out / end.removeprefix("."))
    assert json.loads(beside(".report.json").read_text()) == report
    assert [json.loads(line) for line in beside(".rejected.jsonl").read_text().splitlines()] == [entry]
    got = [row for _, row in readers.read_rows(out)]
    assert [(row["id"], row["messages"][1]["content"]) for row in got] == [("a", "b"), ("a-2", "c"), ("a-3", "d")]
    with pytest.raises(UsageError, match="exists already"):
        writer.DatasetWriter(out, "step.py")


@pytest.mark.parametrize("name", ["out", "out.jsonl"])
def test_writer_leaves_nothing_of_an_unfinished_step(tmp_path, name):
    with pytest.raises(KeyboardInterrupt), writer.DatasetWriter(tmp_path / name, "step.py") as out_writer:
        out_writer.add(result([complete("a")], out_writer.is_jsonl))
        raise KeyboardInterrupt
    with pytest.raises(AssertionError, match="are not"), writer.DatasetWriter(tmp_path / name, "step.py") as out_writer:
        out_writer.add(
            writer.ChunkResult({"train": writer.encode_rows([complete("a")], out_writer.is_jsonl)}, rows_in=2)
        )
        out_writer.close()
    with pytest.raises(TypeError), writer.DatasetWriter(tmp_path / name, "step.py") as out_writer:
        out_writer.close({"x": object()})
    full = mock.Mock(side_effect=OSError(28, "No space left on device"))
    with (
        mock.patch("data_prep.common.writer.ArrowFile.write", full),
        mock.patch("data_prep.common.writer.LinesFile.write", full),
        pytest.raises(UsageError, match="not written .*No space left.*: make room"),
        writer.DatasetWriter(tmp_path / name, "step.py") as out_writer,
    ):
        out_writer.add(result([complete("a")], out_writer.is_jsonl))
    assert not [*tmp_path.iterdir()]


def test_a_folder_is_what_datasets_reads(tmp_path):
    rows = []
    for number in range(50):
        row = complete(f"r{number}", tools=[{"type": "function", "function": {"name": "f"}}])
        row["messages"][0]["content"] = f"question {number}"
        if number % 3 == 0:
            del row["tools"]
        rows.append(row)
    with writer.DatasetWriter(tmp_path / "o", "step.py", 1) as out_writer:
        for start in range(0, 50, 10):
            out_writer.add(result(rows[start : start + 10], False))
        assert out_writer.hold_out(7) == 7
        report = out_writer.close()
    out = load_from_disk(str(tmp_path / "o"))
    both = [row for split in out for row in out[split].to_list()]
    assert len(out["validation"]) == 7 and report["out"] == {"train": 43, "validation": 7}
    by_id = {row["id"]: {key: value for key, value in row.items() if value is not None} for row in both}
    assert by_id == {row["id"]: row for row in rows} and len(both) == 50
    card = (tmp_path / "o" / "card.md").read_text()
    assert "| train | s | en | no_think | 43 |" in card and "| validation | s | en | no_think | 7 |" in card


def test_a_prompt_is_held_out_whole(tmp_path):
    """Answers to one question, and its /think twin, stand on one side."""
    rows = []
    for number in range(60):
        row = complete(str(number), f"answer {number}")
        row["messages"][0]["content"] = f"question {number // 3}" + " /think" * (number % 3 == 1)
        rows.append(row)
    with writer.DatasetWriter(tmp_path / "o", "step.py", 1) as out_writer:
        out_writer.add(result(rows, False))
        moved = out_writer.hold_out(12)
        out_writer.close()
    out = load_from_disk(str(tmp_path / "o"))
    asked = {}
    for split in out:
        asked[split] = {row["messages"][0]["content"].removesuffix(" /think") for row in out[split]}
    assert not asked["train"] & asked["validation"] and 0 < moved == len(out["validation"]) <= 12
    assert len(out["train"]) + len(out["validation"]) == 60


def test_the_same_rows_give_the_same_bytes(tmp_path):
    """However they come in: in one piece, or in ten."""
    rows = [complete(str(n), str(n)) for n in range(100)]
    for name, size in (("a", 100), ("b", 10)):
        with writer.DatasetWriter(tmp_path / name / "o", "step.py") as out_writer:
            for start in range(0, 100, size):
                out_writer.add(result(rows[start : start + size], False))
            out_writer.close()
    trees = []
    for name in "ab":
        folder = tmp_path / name
        trees.append({path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()})
    assert trees[0] == trees[1] and len(trees[0]) >= 7


def test_a_step_that_leaves_no_row_lists_what_it_refused(tmp_path):
    entry = {"file": "f", "line": 2, "id": "", "reason": "empty text", "detail": "message 1"}
    for name, where in (("o", "o/rejected.jsonl"), ("o.jsonl", "o.rejected.jsonl")):
        with writer.DatasetWriter(tmp_path / name, "step.py") as out_writer:
            out_writer.add(writer.ChunkResult(rejected=[entry], rows_in=1))
            assert out_writer.close_rejected() == tmp_path / where
        assert json.loads((tmp_path / where).read_text()) == entry
    assert json.loads((tmp_path / "o.report.json").read_text())["refused"] == {"empty text": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o", "o.rejected.jsonl", "o.report.json"]


def test_keys_that_a_folder_does_not_keep_are_counted(tmp_path):
    rows = [complete("a", score=1), complete("b", score=None), complete("c", score=2, meta={})]
    with writer.DatasetWriter(tmp_path / "o", "step.py") as out_writer:
        out_writer.add(result(rows, False))
        assert out_writer.close()["keys_not_kept"] == {"meta": 1, "score": 2}
    with writer.DatasetWriter(tmp_path / "o.jsonl", "step.py") as out_writer:
        out_writer.add(result(rows, True))
        assert "keys_not_kept" not in out_writer.close()
    assert json.loads((tmp_path / "o.jsonl").read_text().splitlines()[0])["score"] == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_json_lacks_are_refused(value):
    row = complete("a", chat_template_kwargs={"limit": [value]})
    with pytest.raises(InvalidRow, match="number that is not JSON"):
        check_encodable(row)


def test_columns_that_are_no_json_do_not_harm(tmp_path):
    """A date in a column that a folder does not keep; in what is rendered it is refused."""
    import datetime

    row = complete("a", created=datetime.datetime(2024, 5, 1), data=b"x")
    assert check_shape(row) is row
    for name in ("o", "o.jsonl"):
        with writer.DatasetWriter(tmp_path / name, "step.py") as out_writer:
            out_writer.add(result([row], out_writer.is_jsonl))
            out_writer.close()
    assert json.loads((tmp_path / "o.jsonl").read_text())["created"].startswith("2024-05-01")
    with pytest.raises(InvalidRow, match="value that is not JSON"):
        check_shape(complete("a", chat_template_kwargs={"today": {1: b"x"}}))


def test_many_rows_of_one_id(tmp_path):
    """In time that grows with the rows, not with their square."""
    with writer.DatasetWriter(tmp_path / "o", "step.py") as out_writer:
        for _ in range(3):
            assert out_writer.unique_ids(["0"] * 20_000)[-1].startswith("0-")
        assert len(out_writer.ids) == 60_000 and "0-60000" in out_writer.ids
        assert out_writer.unique_ids(["0-7", "new", "new"]) == ["0-7-2", "new", "new-2"]


def test_validation_that_takes_all_is_refused(tmp_path):
    with (
        pytest.raises(UsageError, match="--eval_rows 1: 3 rows of 1 prompts, which stay whole, leave none"),
        writer.DatasetWriter(tmp_path / "o", "step.py", 1) as out_writer,
    ):
        out_writer.add(result([complete(str(n), str(n)) for n in range(3)], False))
        out_writer.hold_out(1)
    assert not [*tmp_path.iterdir()]


def test_half_a_surrogate_pair_beside_what_is_kept(tmp_path):
    """A .jsonl file keeps every key, this one in ASCII as it stood."""
    row = complete("a", note="\ud83d")
    with writer.DatasetWriter(tmp_path / "o.jsonl", "step.py") as out_writer:
        out_writer.add(result([check_shape(row)], True))
        out_writer.close()
    assert json.loads((tmp_path / "o.jsonl").read_text()) == row
