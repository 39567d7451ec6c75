"""What readers make of files of every kind, against plain readings of the same bytes.

Each of these turns the suite red (tried): a byte order mark left in; the line without a newline at the end lost; lists
a line taken for an array; text behind an array, or half a character at the end, passed over; rows of the hub numbered
by chunk; the nulls of tool schemas left in parquet.
"""

import bz2
import gzip
import io
import json
import lzma
import random
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.common import readers, text_files
from data_prep.common.errors import InvalidRow, UsageError

ROWS = [
    {"n": n, "text": f'{"é你" * (n % 7)} "q\\" [{{,}}] \\\\ \u2028 {n}', "list": [{"a": [n, None]}, []]}
    for n in range(40)
]
LINES = "".join(json.dumps(row, ensure_ascii=n % 2 == 0) + "\n" for n, row in enumerate(ROWS)).encode()


def read(*paths):
    """[(line, row)] of files; a row that is refused as its reason."""
    blocks = readers.read_chunks(readers.find_inputs(paths), {})
    pairs = [pair for block in blocks for pair in block.rows()]
    return [(line, row.reason if isinstance(row, InvalidRow) else row) for line, row in pairs]


NUMBERED = [*enumerate(ROWS, 1)]


@pytest.fixture(params=[7, 64, 1000, text_files.BLOCK])
def block(request):
    with (
        mock.patch("data_prep.common.text_files.BLOCK", request.param),
        mock.patch("data_prep.common.text_files.HEAD", request.param + 3),
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
    want = [
        (n, json.loads(one))
        for n, one in enumerate((tmp_path / "a.jsonl").read_bytes().split(b"\n"), 1)
        if one and n not in cut_lines(tmp_path / "a.jsonl")
    ]
    (tmp_path / "b.json").write_text(json.dumps(ROWS[:5], indent=1))
    for size in range(1, 700):
        with (
            mock.patch("data_prep.common.text_files.BLOCK", size),
            mock.patch("data_prep.common.text_files.HEAD", size),
        ):
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
    data = b'[{"a": 1}, {"a": nan}, {"a": "x\ny"}, {"a" 1}, "\xff", [], 7, {"b": "\\"]"}, tru]'
    (tmp_path / "a.json").write_bytes(data)
    wanted = [{"a": 1}, "not JSON", "not JSON", "not JSON", "not UTF-8", [], 7, {"b": '"]'}, "not JSON"]
    assert read(tmp_path / "a.json") == [*enumerate(wanted, 1)]
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
        with mock.patch("data_prep.common.text_files.BLOCK", rng.randrange(1, 90)):
            assert read(tmp_path / "a.json") == [*enumerate(rows, 1)], number


def test_long_lines(tmp_path):
    long = [{"text": "é" * 5_500_000}, {"n": 1}, {"text": 'a" ' * 3_000_000}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in long))
    (tmp_path / "b.json").write_text(json.dumps(long))
    assert read(tmp_path / "a.jsonl") == read(tmp_path / "b.json") == [*enumerate(long, 1)]


def test_lines_that_are_not_json(tmp_path):
    data = [
        b'{"a": 1',
        b'{"a": nan}',
        b"\xff",
        b"\x00",
        b"[" * 99_999,
        b'{"a": 1}{"b": 2}',
        b'{"a": "\xed\xa0\x80"}',
        b" ",
    ]
    (tmp_path / "a.jsonl").write_bytes(b"{}\n" + b"\n".join(data) + b'\n\n{"a": 12345678901234567890123}\n')
    assert read(tmp_path / "a.jsonl") == [
        (1, {}),
        (2, "not JSON"),
        (3, "not JSON"),
        (4, "not UTF-8"),
        (5, "not JSON"),
        (6, "row nested too deep"),
        (7, "not JSON"),
        (8, {"a": "\ud800"}),  # half a pair is the row's fault, by name
        (11, {"a": 12345678901234567890123}),
    ]


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
    siblings = [
        mock.Mock(rfilename=name, size=2_000_000_000)
        for name in ("README.md", "json/chunk_10.json", "json/chunk_2.json", "jsonl/x.json")
    ]
    api = mock.Mock(dataset_info=lambda repo, **_: mock.Mock(sha="0123456789", siblings=siblings))
    asked = {}

    def fetch(repo, **given):
        asked.update(given, repo=repo)
        return str(tmp_path / "snapshot")

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
def test_cut_files_are_one_sentence(tmp_path, name):
    (tmp_path / name).write_bytes(CUT[name])
    with mock.patch("data_prep.common.text_files.BLOCK", 9000), pytest.raises(UsageError) as error:
        read(tmp_path / name)
    assert len(str(error.value).splitlines()) == 1 and f"{tmp_path / name}" in str(error.value)


@pytest.mark.parametrize(
    ("name", "data", "advice"),
    [
        ("a.jsonl", gzip.compress(LINES), "a.jsonl: is compressed by gzip: name it .gz, as with mv "),
        ("a.json", zstd(LINES), "a.json: is compressed by zstd: name it .zst, as with mv "),
        (
            "a.jsonl.gz",
            gzip.compress(gzip.compress(LINES)),
            "a.jsonl.gz: is compressed by gzip: unpack it, as with zcat",
        ),
        ("a.jsonl", bz2.compress(LINES), "a.jsonl: is compressed by bzip2: unpack it, as with bzcat "),
        ("a.jsonl.gz", LINES, "a.jsonl.gz: is not compressed by gzip: name it a.jsonl, or download it again"),
        ("a.jsonl", parquet_bytes(), "a.jsonl: is a parquet file: pass it as a file named .parquet"),
        ("a.csv", b"PK\x03\x04sheet", "a.csv: is a zip file or a sheet: unpack it, or save the sheet as .csv"),
        ("a.csv", "ticket,agent\n1,Grüße\n".encode("latin-1"), "a.csv: not utf-8 (byte 0xfc): save it as UTF-8"),
        ("a.csv", b"a,b,a\n1,2,3\n", "a.csv: its first line names no columns (a, b, a): write one name a column"),
    ],
)
def test_what_is_named_wrongly_is_named(tmp_path, name, data, advice):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError) as error:
        read(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path}/{advice}")


WIDE = {  # without a byte order mark; the table's first characters are no ASCII
    "lines.jsonl": LINES.decode(),
    "array.json": json.dumps(ROWS, indent=1, ensure_ascii=False),
    "texts.jsonl": '"你好"\n"你"\n',
    "table.csv": "问题,答案\n你好,好\n",
    "table.tsv": "question\tanswer\n你好\t好\n",
}


@pytest.mark.parametrize("encoding", ["UTF-16LE", "UTF-16BE", "UTF-32LE", "UTF-32BE"])
@pytest.mark.parametrize("name", WIDE)
def test_wide_text_without_a_byte_order_mark_is_named(tmp_path, name, encoding):
    (tmp_path / name).write_bytes(WIDE[name].encode(encoding))
    with pytest.raises(UsageError) as error:
        read(tmp_path / name)
    advice = f"is {encoding} without a byte order mark: save it as UTF-8, as with iconv -f {encoding} -t UTF-8"
    assert str(error.value) == f"{tmp_path / name}: {advice}"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gzip.compress(LINES), "stdin: is compressed by gzip: unpack it on the way, as with zcat FILE | python"),
        (zstd(LINES), "stdin: is compressed by zstd: unpack it on the way, as with zstdcat FILE | python"),
        (lzma.compress(LINES), "stdin: is compressed by xz: unpack it on the way, as with xzcat FILE | python"),
        (LINES.decode().encode("utf-16-le"), "stdin: is UTF-16LE without a byte order mark"),
        (b'{\n"a": 1\n}\n}', "stdin:4: not JSON (} where a value is expected)"),
    ],
)
def test_what_stdin_cannot_hold_is_named(monkeypatch, data, message):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    with pytest.raises(UsageError) as error:
        read("-")
    assert str(error.value).startswith(message)


def test_lines_of_another_encoding_are_named(tmp_path):
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in ("plain", "你好", "Grüße")]
    (tmp_path / "a.jsonl").write_bytes("\n".join(lines).encode("gb18030"))
    assert read(tmp_path / "a.jsonl") == [(1, {"text": "plain"}), (2, "not UTF-8"), (3, "not UTF-8")]
    (tmp_path / "a.json").write_bytes(f"[{','.join(lines)}]".encode("gb18030"))
    assert read(tmp_path / "a.json") == [(1, {"text": "plain"}), (2, "not UTF-8"), (3, "not UTF-8")]


# -- tables, wrapped and column-wise JSON -----------------------------------------------------------------------------
TABLE = [{"n": "1", "text": 'a "b", c'}, {"n": "2", "text": "two\nlines; \u2028"}, {"text": "0.70"}]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "semicolon.csv", "bom.csv", "utf16.tsv", "a.csv.gz", "crlf.csv"])
def test_tables(tmp_path, block, name):
    """Written by Python's csv; cells are text, and empty ones are no part of a row."""
    import csv

    text = io.StringIO(newline="")
    delimiter = "\t" if ".tsv" in name else ";" if "semicolon" in name else ","
    table = csv.DictWriter(text, ["n", "text"], delimiter=delimiter, lineterminator="\r\n" if "crlf" in name else "\n")
    table.writeheader()
    table.writerows(TABLE)
    data = text.getvalue().encode({"bom.csv": "utf-8-sig", "utf16.tsv": "utf-16"}.get(name, "utf-8"))
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert read(tmp_path / name) == [*enumerate(TABLE, 1)]


def test_records_of_another_width(tmp_path):
    (tmp_path / "a.csv").write_text("q,a\n1,2\n\n1\n1,2,3\n4,\n")
    wanted = [{"q": "1", "a": "2"}, "row of another width", "row of another width", {"q": "4"}]
    assert read(tmp_path / "a.csv") == [*enumerate(wanted, 1)]


PAIR = {"prompt": "Ping?", "answer": "Pong."}
ALONE = {  # text of a file: its rows
    json.dumps({"version": 1, "data": [PAIR, PAIR]}): [PAIR, PAIR],
    json.dumps({"version": 1, "data": [PAIR, PAIR]}, indent=1): [PAIR, PAIR],
    json.dumps({"features": [], "rows": [{"row_idx": 0, "row": PAIR}]}): [PAIR],
    json.dumps({"prompt": ["a", "b"], "answer": [1, None]}): [
        {"prompt": "a", "answer": 1},
        {"prompt": "b", "answer": None},
    ],
    json.dumps(PAIR): [PAIR],
    json.dumps(PAIR, indent=4): [PAIR],
    json.dumps(PAIR, indent=4) + "\n" + json.dumps(PAIR, indent=4) + "\n": [PAIR, PAIR],
    json.dumps(PAIR) + json.dumps(PAIR): [PAIR, PAIR],
    json.dumps({"messages": [PAIR]}): [{"messages": [PAIR]}],
    json.dumps({"prompt": [{"role": "user"}], "completion": [{"role": "x"}]}): [
        {"prompt": [{"role": "user"}], "completion": [{"role": "x"}]}
    ],
    json.dumps({"conversations": ["a", "b"]}): [{"conversations": ["a", "b"]}],
    json.dumps({"data": [PAIR]}) + "\n" + json.dumps(PAIR): [{"data": [PAIR]}, PAIR],
    '{"cut": \n' + json.dumps(PAIR) + "\n" + json.dumps(PAIR): ["not JSON", PAIR, PAIR],
    '{"cut": \n' + json.dumps(PAIR): ["not JSON", PAIR],
    '{"messages": [\n' + json.dumps(PAIR) + "\n" + json.dumps(PAIR): ["not JSON", PAIR, PAIR],
    '{"cut": "\n' + json.dumps(PAIR) + '\n{"cut": ': ["not JSON", PAIR, "not JSON"],
}


UNINDENTED = {  # pretty-printed, each line at the margin: a part that stands on a line of its own is no row
    '{\n"messages": [\n{"a": 1},\n{"b": 2}\n]\n}\n': [{"messages": [{"a": 1}, {"b": 2}]}],
    '{"messages": [\n{"a": 1},\n{"b": 2}\n]\n}\n{"messages": [\n{"c": 3}\n]\n}': [
        {"messages": [{"a": 1}, {"b": 2}]},
        {"messages": [{"c": 3}]},
    ],
    '{\r\n"a":\r\n{"b": 2}\r\n}\r\n': [{"a": {"b": 2}}],
    '{"a":\n{"b": 2}\n}': [{"a": {"b": 2}}],
    '{\n"data": [\n' + '{"a": "x"}\n,\n' * 9 + '{"a": "y"}\n]\n}': [*[{"a": "x"}] * 9, {"a": "y"}],
    '{\n"a": [\n{"b": 2}\n],\n}': ["not JSON"],  # one fault, not one a line
}


@pytest.mark.parametrize("text", UNINDENTED, ids=range(len(UNINDENTED)))
def test_objects_without_indentation(tmp_path, text):
    """Also where the first piece of the file ends within one."""
    (tmp_path / "a.json").write_bytes(text.encode())
    for size in (text_files.HEAD, 40, 33):
        with mock.patch("data_prep.common.text_files.HEAD", size):
            assert read(tmp_path / "a.json") == [*enumerate(UNINDENTED[text], 1)]


@pytest.mark.parametrize("text", ALONE, ids=range(len(ALONE)))
def test_objects_that_stand_alone(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    assert read(tmp_path / "a.json") == [*enumerate(ALONE[text], 1)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{\n"a": 1\n},\n{\n"a": 2\n}', "a.json:3: not JSON (, where a value is expected)"),
        ("a.json", '{\n"a": 1\n}\n}', "a.json:4: not JSON (} where a value is expected)"),
        ("a.json", json.dumps({"train": [PAIR], "test": [PAIR]}), "a.json: several lists of rows (train, test)"),
        ("a.csv", 'q,a\nq1,"a1\nq2,a2\n', "a.csv:3: not a table (unexpected end of data)"),
        ("a.tsv", 'q\ta\nq1\t"a1\nq2\ta2\nq3\t"a3\n', "a.tsv:4: not a table"),
        ("a.csv", "q,a\rb,c\r", "a.csv:1: not a table (new-line character seen in unquoted field"),
        ("a.csv", "q,,a\n1,2,3\n", "a.csv: its first line names no columns (q, , a)"),
    ],
)
def test_what_would_lose_rows_is_refused(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text.encode())
    with pytest.raises(UsageError) as error:
        read(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path}/{message}")


def test_one_line_of_jsonl_is_one_row(tmp_path):
    """Whatever lists it holds: a longer file would give the same row."""
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    rows = [{"conversations": turns, "tools": turns}, {"messages": turns, "examples": [{"x": 1}]}, {"data": [PAIR]}]
    rows.append({"input": ["q1", "q2"], "output": ["a1", "a2"]})
    for row in rows:
        (tmp_path / "a.jsonl").write_text(json.dumps(row))
        assert read(tmp_path / "a.jsonl") == [(1, row)]
    for row in rows[:2]:
        (tmp_path / "a.json").write_text(json.dumps(row))
        assert read(tmp_path / "a.json") == [(1, row)]


def test_numbers_of_too_many_digits_are_refused_by_row(tmp_path):
    (tmp_path / "a.json").write_text('[{"a": 1}, {"a": ' + "9" * 5000 + '}, {"a": 3}]')
    assert read(tmp_path / "a.json") == [(1, {"a": 1}), (2, "not JSON"), (3, {"a": 3})]


def test_common_headers_of_tables(tmp_path):
    (tmp_path / "a.csv").write_text('prompt, answer\na, "b, c"\n')
    assert read(tmp_path / "a.csv") == [(1, {"prompt": "a", "answer": "b, c"})]
    (tmp_path / "a.csv").write_text(",prompt,answer\n0,a,b\n")
    assert read(tmp_path / "a.csv") == [(1, {"index": "0", "prompt": "a", "answer": "b"})]


def test_a_missing_file_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("data/rows", "raw/rows.jsonl", "raw/train.parquet", "none.csv"):
        with pytest.raises(UsageError, match=f"{name}: no such file"):
            readers.find_inputs([name])
    assert readers.find_inputs(["openai/gsm8k:main@test"]) == ["openai/gsm8k:main@test"]


def test_the_line_where_an_array_breaks(tmp_path, block):
    behind = b'[\n\n{"a": 1}\n]\n\n' + b" " * 3000
    for data, line in ((b'[\n{"a": 1},\n{"b": [1, 2}\n', 3), (behind + b"x\n", 6)):
        (tmp_path / "a.json").write_bytes(data)
        with pytest.raises(UsageError, match=rf"a.json:{line}: not JSON"):
            read(tmp_path / "a.json")


@pytest.mark.parametrize("kind", ["array", "lines"])
def test_memory_does_not_grow_with_a_file(tmp_path, kind):
    """The first chunk leaves before the second is read."""
    rows = [json.dumps({"n": n, "text": "x" * 90}) for n in range(5000)]
    (tmp_path / "a.json").write_text("[" + ",\n".join(rows) + "]" if kind == "array" else "\n".join(rows))
    digest = mock.Mock(hexdigest=lambda: "")
    with (
        mock.patch("data_prep.common.text_files.BLOCK", 2000),
        mock.patch("data_prep.common.text_files.HEAD", 2000),
        mock.patch("data_prep.common.readers.ROWS", 20),
        mock.patch("hashlib.sha256", lambda: digest),
    ):
        seen = 0
        for chunk in readers.read_chunks([tmp_path / "a.json"], {}):
            seen += len([*chunk.rows()])
            assert digest.update.call_count * 2000 < seen * 115 + 8000
    assert seen == 5000
