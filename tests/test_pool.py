"""data_prep/pool.py: what its readers make of files of every kind, against plain readings of the same bytes, and what
its Writer leaves.

Each of these turns the suite red (tried): a byte order mark left in; escaped backslashes not seen in an array; the line
without a newline at the end lost; line breaks in an array's strings made blanks; lists a line taken for an array; text
behind an array, or half a character at the end, passed over; long numbers looked for at every eighth byte only; rows
of the hub numbered by block; ids not made unique; counts not compared; the folder aside left; rows held out by their
place in a batch; kana not counted with han; the nulls of tool schemas left in parquet; processes that outlive a killed
script, or that Ctrl-C cuts; no end by SIGTERM.
"""

import gzip
import io
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import MODULES, REPO

from data_prep.common import json_text, parallel, readers, writer
from data_prep.common.errors import InvalidRow, UsageError
from data_prep.common.json_text import load_json
from data_prep.common.language import detect_language

ROWS = [{"n": n, "text": f'{"é你" * (n % 7)} "q\\" [{{,}}] \\\\ \u2028 {n}', "list": [{"a": [n, None]}, []]}
        for n in range(40)]  # fmt: skip
LINES = "".join(json.dumps(row, ensure_ascii=n % 2 == 0) + "\n" for n, row in enumerate(ROWS)).encode()


def read(*paths):
    """[(line, row)] of files; a row that is refused as its reason."""
    blocks = readers.read_chunks(readers.find_inputs(paths), {})
    pairs = [pair for block in blocks for pair in block.rows()]
    return [(line, row.reason if isinstance(row, InvalidRow) else row) for line, row in pairs]


NUMBERED = [*enumerate(ROWS, 1)]


@pytest.fixture(params=[7, 64, 1000, readers.BLOCK])
def block(request):
    with (
        mock.patch("data_prep.common.readers.BLOCK", request.param),
        mock.patch("data_prep.common.readers.HEAD", request.param + 3),
    ):
        yield request.param


def zstd(data):
    return pa.compress(data, "zstd", asbytes=True)


ENDINGS = {
    "lines.jsonl": LINES,
    "lines.ndjson": LINES,
    "no_newline.jsonl": LINES[:-1],
    "crlf.jsonl": LINES.replace(b"\n", b"\r\n"),
    "bom.jsonl": b"\xef\xbb\xbf" + LINES,
    "utf16.jsonl": LINES.decode().encode("utf-16"),
    "utf16be.jsonl": b"\xfe\xff" + LINES.decode().encode("utf-16-be"),
    "utf32.jsonl": LINES.decode().encode("utf-32"),
    "array.json": json.dumps(ROWS).encode(),
    "array.jsonl": json.dumps(ROWS).encode(),
    "pretty.json": json.dumps(ROWS, indent=2, ensure_ascii=False).encode(),
    "pretty_crlf.json": b"\r\n " + json.dumps(ROWS, indent=1).replace("\n", "\r\n").encode() + b"\r\n\r\n",
    "bom_array.json": b"\xef\xbb\xbf\n" + json.dumps(ROWS).encode(),
    "utf16_array.json": json.dumps(ROWS, indent=1, ensure_ascii=False).encode("utf-16"),
    "a.jsonl.gz": gzip.compress(LINES),
    "a.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "members.jsonl.gz": gzip.compress(LINES[:1111]) + gzip.compress(LINES[1111:]),
    "a.jsonl.zst": zstd(LINES),
    "frames.jsonl.zst": zstd(LINES[:1111]) + zstd(LINES[1111:]),
    "a.json.zst": zstd(json.dumps(ROWS, indent=3).encode()),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_files_of_every_kind(tmp_path, block, name):
    (tmp_path / name).write_bytes(ENDINGS[name])
    assert read(tmp_path / name) == NUMBERED


def test_blocks_are_cut_at_any_byte(tmp_path):
    """Every size of block, for lines and for an array."""
    (tmp_path / "a.jsonl").write_bytes(LINES[:600] + b"\n\n" + LINES[600:][: LINES[600:].find(b"\n") + 1])
    want = [(n, json.loads(one)) for n, one in enumerate((tmp_path / "a.jsonl").read_bytes().split(b"\n"), 1)
            if one and n not in cut_lines(tmp_path / "a.jsonl")]  # fmt: skip
    (tmp_path / "b.json").write_text(json.dumps(ROWS[:5], indent=1))
    for size in range(1, 700):
        with mock.patch("data_prep.common.readers.BLOCK", size), mock.patch("data_prep.common.readers.HEAD", size):
            got = read(tmp_path / "a.jsonl")
            assert [pair for pair in got if pair[1] != "not JSON"] == want
            assert size % 7 or read(tmp_path / "b.json") == NUMBERED[:5]


def cut_lines(path):
    """Numbers of the lines that are not JSON."""
    out = set()
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            json.loads(line)
        except ValueError:
            out.add(number)
    return out


def test_lists_a_line_are_lines_and_an_array_is_not(tmp_path, block):
    """nanochat's identity_conversations.jsonl begins with [ as an array does."""
    chats = [[{"role": "user", "content": "[a]"}, {"role": "assistant", "content": str(n)}] for n in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, chats)))
    (tmp_path / "b.json").write_text(json.dumps(chats))
    (tmp_path / "c.json").write_text(json.dumps(chats, indent=1))
    if block > 100:  # what tells them stands in the first line and the byte behind it
        assert read(tmp_path / "a.jsonl") == [*enumerate(chats, 1)]
    for name in ("b.json", "c.json"):
        assert read(tmp_path / name) == [*enumerate(chats, 1)]


def test_faults_within_an_array_are_refused_by_element(tmp_path, block):
    (tmp_path / "a.json").write_bytes(b'[{"a": 1}, {"a": NaN}, {"a": "x\ny"}, {"a" 1}, "\xff", [], 7, {"b": "\\"]"}]')
    assert read(tmp_path / "a.json") == [
        (1, {"a": 1}), (2, "not JSON"), (3, "not JSON"), (4, "not JSON"), (5, "not JSON"), (6, []), (7, 7),
        (8, {"b": '"]'}),
    ]  # fmt: skip
    for data in (b"[]", b" [ ] \n"):
        (tmp_path / "b.json").write_bytes(data)
        assert read(tmp_path / "b.json") == []


def test_random_json_in_arrays(tmp_path):
    """Strings of brackets, quotes and backslashes, nested anyhow: the same as json reads."""
    rng = random.Random(7)

    def value(depth):
        kind = rng.randrange(6 if depth else 3)
        if kind < 3:
            return rng.choice([None, 1.5, "".join(rng.choices('[]{},"\\\n ab', k=rng.randrange(9)))])
        if kind == 3:
            return {value(0) if rng.random() < 0 else str(value(0)): value(depth - 1) for _ in range(rng.randrange(3))}
        return [value(depth - 1) for _ in range(rng.randrange(4))]

    for number in range(150):
        rows = [value(4) for _ in range(rng.randrange(1, 6))]
        (tmp_path / "a.json").write_text("[\n" + json.dumps(rows, indent=rng.choice([None, 1]))[1:])
        with mock.patch("data_prep.common.readers.BLOCK", rng.randrange(1, 90)):
            assert read(tmp_path / "a.json") == [*enumerate(rows, 1)], number


def test_long_lines(tmp_path):
    long = [{"text": "é" * 5_500_000}, {"n": 1}, {"text": 'a" ' * 3_000_000}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in long))
    (tmp_path / "b.json").write_text(json.dumps(long))
    assert read(tmp_path / "a.jsonl") == read(tmp_path / "b.json") == [*enumerate(long, 1)]


def test_lines_that_are_not_json(tmp_path):
    data = [
        b'{"a": 1',
        b'{"a": NaN}',
        b"\xff",
        b"\x00",
        b"[" * 99_999,
        b'{"a": 1}{"b": 2}',
        b'{"a": "\xed\xa0\x80"}',
        b" ",
    ]
    (tmp_path / "a.jsonl").write_bytes(b"{}\n" + b"\n".join(data) + b'\n\n{"a": 12345678901234567890123}\n')
    assert read(tmp_path / "a.jsonl") == [
        (1, {}), *[(n, "not JSON") for n in range(2, 8)],
        (8, {"a": "\ud800"}),  # half a pair is the row's fault, by name
        (11, {"a": 12345678901234567890123}),
    ]  # fmt: skip


def test_long_numbers_are_seen_wherever_they_stand():
    """A run of 19 digits at any place of a block: orjson would make a float of one over 64 bits."""
    for start in range(9):
        for width in range(15, 24):
            data = b"a" * start + b"9" * width + b"b" * 5
            assert json_text.holds_long_number(data) == (width >= 19)
        assert not json_text.holds_long_number(b"a" * start + b"12345 678901" * 9)
    assert not json_text.holds_long_number(b"") and not json_text.holds_long_number(b"1")
    assert load_json(b'{"a": 99999999999999999999}') == {"a": 99999999999999999999}


def test_folders_globs_and_stdin(tmp_path, monkeypatch):
    for name in ("b/chunk_10.jsonl", "b/chunk_2.jsonl.gz", "b/notes.txt", "a.json"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        data = json.dumps([{"from": name}]).encode() if name == "a.json" else json.dumps({"from": name}).encode()
        path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    named = ["a.json", "b/chunk_2.jsonl.gz", "b/chunk_10.jsonl"]
    assert [row["from"] for _, row in read(tmp_path)] == named
    assert [row["from"] for _, row in read(tmp_path / "b" / "*.jsonl*", tmp_path / "b")] == named[1:]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbf" + LINES)))
    assert read("-") == NUMBERED
    done = subprocess.run([sys.executable, "-m", "data_prep.normalize", "fields", "-", "--map", "prompt=text",
                           "answer=text", "--out", tmp_path / "o.jsonl"], cwd=REPO, input=LINES, capture_output=True)  # fmt: skip
    assert (done.returncode, b"40 rows kept" in done.stdout) == (0, True), done.stderr
    assert list(json.loads((tmp_path / "o.report.json").read_text())["input"]) == ["stdin"]
    for missing in (tmp_path / "c", tmp_path / "*.parquet"):
        with pytest.raises(UsageError, match="no such file"):
            readers.find_inputs([missing])


def test_parquet(tmp_path):
    """Row groups and batches of other sizes; keys that only other rows have are no part of a row."""
    given = [{"n": n, **({"deep": {"a": [{"b": n} if n % 2 else {"c": "x"}]}} if n % 3 < 2 else {})} for n in range(40)]
    pq.write_table(pa.Table.from_pylist(given), tmp_path / "a.parquet", row_group_size=7)
    with mock.patch("data_prep.common.readers.ROWS", 3):
        assert read(tmp_path / "a.parquet") == [*enumerate(given, 1)]


def test_nulls_of_a_tool_call_in_parquet(tmp_path):
    """Filled in where the tool's schema, freed of its own nulls, does not know the name."""
    known, other = {"x": {"type": "string"}, "y": None}, {"x": None, "y": {"type": "string"}}
    tools = [{"name": name, "parameters": {"properties": one}} for name, one in (("f", known), ("g", other))]
    calls = [{"name": name, "arguments": {"x": None, "y": None}} for name in ("f", "g")]
    pq.write_table(pa.Table.from_pylist([{"tools": tools, "calls": calls, "none": None}]), tmp_path / "a.parquet")
    ((_, row),) = read(tmp_path / "a.parquet")
    assert [call["arguments"] for call in row["calls"]] == [{"x": None}, {"y": None}]
    assert [list(tool["parameters"]["properties"]) for tool in row["tools"]] == [["x"], ["y"]] and "none" not in row


class Hub:
    """What the readers ask the hub for, answered from a table, as datasets' load_dataset does from its cache."""

    sha, siblings = "abcdef0123456789", [type("File", (), {"size": 5})()]

    def __init__(self, rows):
        self.asked, self.rows = [], rows

    def dataset_info(self, repo, files_metadata):
        self.asked.append(repo)
        return self

    def load_dataset(self, repo, config, split, revision):
        from datasets import Dataset, concatenate_datasets

        self.asked.append((repo, config, split, revision))
        if repo == "no/such":
            raise FileNotFoundError("no\nsuch repo.")
        half = len(self.rows) // 2
        return concatenate_datasets([Dataset.from_list(self.rows[:half]), Dataset.from_list(self.rows[half:])])


def test_hub_ids(capsys):
    hub = Hub([{"a": 1, "b": None}, {"a": 2, "b": "x"}, {"a": 3, "b": None}])
    with mock.patch("huggingface_hub.HfApi", lambda: hub), mock.patch("datasets.load_dataset", hub.load_dataset):
        assert read("owner/name:main@test") == [(1, {"a": 1}), (2, {"a": 2, "b": "x"}), (3, {"a": 3})]
        inputs = {}
        assert len([*readers.read_chunks(["owner/name"], inputs)]) == 2
        assert inputs == {"owner/name": hub.sha}
        with pytest.raises(UsageError) as error:
            read("no/such")
    assert hub.asked[:2] == ["owner/name", ("owner/name", "main", "test", hub.sha)]
    assert hub.asked[3] == ("owner/name", None, "train", hub.sha)
    assert "no/such: could not be loaded from the hub (FileNotFoundError: no such repo): pass" in str(error.value)
    assert "owner/name: up to 0.00 GB to download (abcdef01)" in capsys.readouterr().err


def test_files_of_a_repository(tmp_path, capsys):
    """Its own files by their own names, in order, though the hub's cache holds them as links to blobs."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot" / "json").mkdir(parents=True)
    for number in (10, 2):
        (tmp_path / "blobs" / f"{number}f").write_text(json.dumps([{"a": number}]))
        (tmp_path / "snapshot" / "json" / f"chunk_{number}.json").symlink_to(tmp_path / "blobs" / f"{number}f")
    siblings = [mock.Mock(rfilename=name, size=2_000_000_000) for name in
                ("README.md", "json/chunk_10.json", "json/chunk_2.json", "jsonl/x.json")]  # fmt: skip
    api = mock.Mock(dataset_info=lambda repo, **_: mock.Mock(sha="0123456789", siblings=siblings))
    asked = {}
    fetch = lambda repo, **given: asked.update(given, repo=repo) or str(tmp_path / "snapshot")  # noqa: E731
    with mock.patch("huggingface_hub.HfApi", lambda: api), mock.patch("huggingface_hub.snapshot_download", fetch):
        paths = readers.find_inputs(["hf://datasets/owner/name/json/"])
        with pytest.raises(UsageError, match="owner/name has no such file or folder"):
            readers.find_inputs(["hf://datasets/owner/name/csv"])
        with pytest.raises(UsageError, match="write hf://datasets/owner/name/path"):
            readers.find_inputs(["hf://owner/name"])
    blocks = [*readers.read_chunks(paths)]
    assert [(block.file, [*block.rows()]) for block in blocks] == [
        ("chunk_2.json", [(1, {"a": 2})]),
        ("chunk_10.json", [(1, {"a": 10})]),
    ]
    assert asked["repo"] == "owner/name" and asked["allow_patterns"] == ["json/chunk_10.json", "json/chunk_2.json"]
    assert asked["revision"] == "0123456789" and asked["repo_type"] == "dataset"
    assert "owner/name: 2 files, 4.00 GB (01234567)" in capsys.readouterr().err


@pytest.mark.parametrize(("worth", "num_proc"), [(1e9, None), (-1, 1), (1e9, 2)])
def test_other_processes_start_when_there_is_work_enough(worth, num_proc):
    """In order whoever works; where nobody named a number, here until there is enough of it."""
    blocks = [f"({n}, __import__('os').getpid())" for n in range(9)]
    with mock.patch("data_prep.common.parallel.WORTH", worth), mock.patch("data_prep.common.parallel.cores", lambda: 2):
        found = [*parallel.parallel_map(eval, blocks, num_proc)]
    assert [number for number, _ in found] == [*range(9)]
    assert [process == os.getpid() for _, process in found] == [num_proc != 2] * 9


def test_the_work_goes_on_here_until_other_processes_have_started():
    found = []

    def blocks():
        while len({pid for _, pid in found}) < 2 and len(found) < 3000:  # a minute at most
            yield f"({len(given)}, __import__('time').sleep(0.02) or __import__('os').getpid())"
            given.append(1)

    given = []
    with mock.patch("data_prep.common.parallel.WORTH", 0.1), mock.patch("data_prep.common.parallel.cores", lambda: 2):
        for result in parallel.parallel_map(eval, blocks()):
            found.append(result)
    assert [number for number, _ in found] == [*range(len(found))]
    here = [pid == os.getpid() for _, pid in found]
    # a tenth of a second is five blocks; a process takes longer to start than the sixth
    assert here.count(True) > 6 and not here[-1] and here == sorted(here, reverse=True)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no /proc: processes of a session cannot be told")
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGKILL", -9)])
def test_a_script_that_is_stopped_leaves_no_process_behind(name, code, tmp_path):
    """Nor a half pool, where it can still remove one."""
    command = [sys.executable, "-m", "data_prep.normalize", "messages", "-", "--out", "set", "--num_proc", "2"]
    row = {"messages": [{"role": "user", "content": "a" * 900}, {"role": "assistant", "content": "b"}]}
    with open(tmp_path / "said", "wb") as said:
        script = subprocess.Popen(
            command, cwd=tmp_path, env=MODULES, stdin=subprocess.PIPE, stderr=said, start_new_session=True
        )
        script.stdin.write(json.dumps(row).encode().join([b"\n"] * 5000))  # and no end: it waits for more
        script.stdin.flush()
        until(lambda: len(session(script.pid)) > 3)  # with what starts the others, and what counts semaphores
        time.sleep(1)
        (os.kill if name == "SIGKILL" else os.killpg)(script.pid, getattr(signal, name))
        assert script.wait(60) == code
        script.stdin.close()
    until(lambda: not session(script.pid))
    if name != "SIGKILL":
        assert not [*tmp_path.glob(".set*")]
    if name == "SIGINT":
        assert (tmp_path / "said").read_text() == "interrupted: nothing was written\n"


def test_processes_start_where_the_path_for_temporary_files_is_long(tmp_path):
    """A socket's path has 107 characters at most."""
    folder = tmp_path / ("long" * 25)
    folder.mkdir()
    row = {"messages": [{"role": "user", "content": "a" * 900}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps(row)] * 3000))
    script = [sys.executable, "-m", "data_prep.normalize", "messages", "rows.jsonl", "--out", "set"]
    env = MODULES | {"TMPDIR": str(folder)}
    done = subprocess.run([*script, "--num_proc", "2"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "3,000 rows kept" in done.stdout, done.stderr


def session(pid):
    """The processes that a process started, it and theirs too."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, leader = path.read_text().rpartition(") ")[2].split()[:4]
            found += [path.parent.name] * (int(leader) == pid and state != "Z")
    return found


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.05)


def test_rows_of_a_folder_are_sent_as_their_place(tmp_path):
    """A Block of an Arrow file, pickled, is a hundred bytes and comes back equal."""
    with writer.DatasetWriter(tmp_path / "set", "test") as out_writer:
        rows = [house(str(n), "b" * 5000) for n in range(900)]
        out_writer.add(writer.ChunkResult({"train": writer.encode_rows(rows)}, rows_in=len(rows)))
        out_writer.close()
    blocks = [*readers.read_chunks([tmp_path / "set"])]
    assert len(blocks) > 2 and [block.first_line for block in blocks] == [1, 401, 801]
    sent = [pickle.dumps(block) for block in blocks]
    assert max(map(len, sent)) < 500
    back = [row for one in map(pickle.loads, sent) for row in one.rows()]
    assert back == [*enumerate(rows, 1)]


def parquet_bytes():
    out = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([{"question": "a" * n, "answer": "b"} for n in range(900)]), out)
    return out.getvalue().to_pybytes()


MANY = "".join(
    json.dumps({"question": str(random.Random(n).random()), "answer": "b"}) + "\n" for n in range(999)
).encode()
CUT = {
    "a.jsonl.gz": gzip.compress(MANY)[:-900],
    "end.jsonl.gz": gzip.compress(MANY)[:-5],
    "a.jsonl.zst": zstd(MANY)[:-900],
    "b.jsonl.gz": b"no gzip at all",
    "b.jsonl.zst": b"no zstd at all",
    "a.parquet": parquet_bytes()[:-300],
    "damaged.parquet": parquet_bytes()[:200] + b"\x00" * 400 + parquet_bytes()[600:],
    "a.json": b"[" + b",".join(MANY.splitlines()),
    "b.json": b"[" + b",".join(MANY.splitlines())[:-9],
    "two.json": b'[{"question": "a", "answer": "b"}] [{}]',
    "utf16.jsonl": MANY.decode().encode("utf-16")[:-1],
}


@pytest.mark.parametrize("name", CUT)
def test_cut_files_are_one_sentence_and_leave_nothing(tmp_path, name, capsys):
    from data_prep import normalize

    (tmp_path / name).write_bytes(CUT[name])
    flags = ["gsm8k", tmp_path / name, "--out", tmp_path / "out", "--num_proc", 1]
    with mock.patch("sys.argv", ["normalize.py", *map(str, flags)]), mock.patch("data_prep.common.readers.BLOCK", 9000):
        assert normalize.main() == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and f"{tmp_path / name}" in said, said
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_line_where_an_array_breaks(tmp_path, block):
    behind = b'[\n\n{"a": 1}\n]\n\n' + b" " * 3000
    for data, line in ((b'[\n{"a": 1},\n{"b": [1, 2}\n', 3), (behind + b"x\n", 6)):
        (tmp_path / "a.json").write_bytes(data)
        with pytest.raises(UsageError, match=rf"a.json:{line}: not JSON"):
            read(tmp_path / "a.json")


def test_memory_of_an_array_does_not_grow_with_it(tmp_path):
    """A block at a time leaves the reader: the first one before the second is read."""
    with open(tmp_path / "a.json", "w") as file:
        file.write("[" + ",\n".join(json.dumps({"n": n, "text": "x" * 90}) for n in range(2000)) + "]")
    with mock.patch("data_prep.common.readers.BLOCK", 2000), mock.patch("data_prep.common.readers.HEAD", 2000):
        blocks = [*readers.read_chunks([tmp_path / "a.json"], {})]
    assert max(len(block.data) for block in blocks) < 6000 and sum(len(b.data) for b in blocks) > 200_000
    assert [block.first_line for block in blocks[1:]] == [b.first + b.data.count(b"\n") for b in blocks[:-1]]


# -- Writer -----------------------------------------------------------------------------------------------------------
def house(row_id, answer="b", **more):
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
    return {"id": row_id, "messages": said, "chat_template_kwargs": {}, "source": "s", "tags": [], "lang": "en", **more}


def result(rows, lines, rejected=(), split="train"):
    return writer.ChunkResult({split: writer.encode_rows(rows, lines)}, [*rejected], len(rows) + len(rejected))


@pytest.mark.parametrize("name", ["out", "out.jsonl"])
def test_writer_counts_what_goes_in_and_out(tmp_path, name):
    entry = {"file": "f", "line": 2, "id": "x", "reason": "r", "detail": "half \ud800"}
    with writer.DatasetWriter(tmp_path / name, "step.py", 3) as out_writer:
        out_writer.add(result([house("a"), house("a", "c")], out_writer.is_jsonl, [entry]))
        out_writer.add(result([house("a", "d")], out_writer.is_jsonl))
        report = out_writer.close({"more": 1})
    assert (report["in"], report["out"], report["refused"], report["more"]) == (4, {"train": 3}, {"r": 1}, 1)
    out = tmp_path / name
    beside = (lambda end: out.with_suffix(end)) if out_writer.is_jsonl else (lambda end: out / end.removeprefix("."))
    assert json.loads(beside(".report.json").read_text()) == report
    assert [json.loads(line) for line in beside(".rejected.jsonl").read_text().splitlines()] == [entry]
    got = [row for _, row in read(out)]
    assert [(row["id"], row["messages"][1]["content"]) for row in got] == [("a", "b"), ("a-2", "c"), ("a-3", "d")]
    with pytest.raises(UsageError, match="exists already"):
        writer.DatasetWriter(out, "step.py")


@pytest.mark.parametrize("name", ["out", "out.jsonl"])
def test_writer_leaves_nothing_of_an_unfinished_step(tmp_path, name):
    with pytest.raises(KeyboardInterrupt), writer.DatasetWriter(tmp_path / name, "step.py") as out_writer:
        out_writer.add(result([house("a")], out_writer.is_jsonl))
        raise KeyboardInterrupt
    with pytest.raises(AssertionError, match="are not"), writer.DatasetWriter(tmp_path / name, "step.py") as out_writer:
        out_writer.add(
            writer.ChunkResult({"train": writer.encode_rows([house("a")], out_writer.is_jsonl)}, rows_in=2)
        )  # one row is lost
        out_writer.close()
    with pytest.raises(TypeError), writer.DatasetWriter(tmp_path / name, "step.py") as out_writer:
        out_writer.close({"x": object()})
    full = mock.Mock(side_effect=OSError(28, "No space left on device"))
    with (
        mock.patch("data_prep.common.writer.Stream.write_batch", full),
        mock.patch("data_prep.common.writer.DatasetWriter.with_own_ids", full),
        pytest.raises(UsageError, match="not written .*No space left.*: make room"),
        writer.DatasetWriter(tmp_path / name, "step.py") as out_writer,
    ):
        out_writer.add(result([house("a")], out_writer.is_jsonl))
    assert not [*tmp_path.iterdir()]


def test_a_folder_is_what_datasets_reads(tmp_path):
    from datasets import load_from_disk

    rows = [house(f"r{n}", tools=[{"type": "function", "function": {"name": "f"}}]) if n % 3 else house(f"r{n}")
            for n in range(50)]  # fmt: skip
    with (
        mock.patch("data_prep.common.writer.SHARD", 500),
        writer.DatasetWriter(tmp_path / "o", "step.py", 1) as out_writer,
    ):
        for start in range(0, 50, 10):
            out_writer.add(result(rows[start : start + 10], False))
        out_writer.hold_out(7)
        out_writer.close()
    out = load_from_disk(str(tmp_path / "o"))
    both = [row for split in out for row in out[split].to_list()]
    assert len(out["validation"]) == 7
    by_id = {row["id"]: {key: value for key, value in row.items() if value is not None} for row in both}
    assert by_id == {row["id"]: row for row in rows} and len(both) == 50
    assert len([*(tmp_path / "o" / "train").glob("*.arrow")]) > 1
    card = (tmp_path / "o" / "card.md").read_text()
    assert "| train | s | en | no_think | 43 |" in card and "| validation | s | en | no_think | 7 |" in card


def test_languages_by_script():
    """Against Unicode's own names of the letters."""
    import unicodedata

    def named(text):
        words = {"CJK": "zh", "HIRAGANA": "ja", "KATAKANA": "ja", "HANGUL": "ko", "LATIN": "en"}
        found = [words.get(unicodedata.name(char, "").split()[0], "und") for char in text if char.isalpha()]
        counts = {lang: found.count(lang) for lang in {*found}}
        if counts.get("ja", 0) > counts.get("zh", 0) / 10:
            counts["ja"] += counts.pop("zh", 0)
        return max(counts, key=counts.get) if counts else "und"

    rng = random.Random(3)
    letters = ["你好吗世界", "abcéß", "これはカタ", "안녕하세", "Приве𐍈", "12 ,。！😀"]
    for _ in range(500):
        text = "".join(rng.choice(rng.choice(letters)) for _ in range(rng.choice([1, 4, 31])))
        zh, en, ja, ko, other = [sum(char in kind for char in text) for kind in letters[:5]]
        totals = sorted([zh if ja <= zh / 10 else 0, en, ja + (zh if ja > zh / 10 else 0), ko, other])
        if totals[-1] == totals[-2] > 0:
            continue  # a draw
        assert detect_language(text) == named(text), text
