"""Reading names the file and the line of what is wrong; what reading keeps in memory stays small."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
import zstandard
from helpers import peak_memory, write_rows

from cai_cli.common.errors import CaiError, InvalidRow
from cai_cli.common.hash_index import KeyTable
from cai_cli.data import lines
from cai_cli.data.jsonl import cut_torn_tail, read_prompts, read_rows, read_values


def texts(path: Path) -> list[str]:
    return [p.prompt[-1].content for _, p in read_prompts(str(path))]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "caf\xe9"}', "utf-8"),
        (b'{"prompt": NaN}', "not JSON"),
        (b'{"prompt": "q", "n": Infinity}', "not JSON"),
        (b'{"prompt": "cut', "not JSON"),
        (b'{"prompt": "q"} {"prompt": "r"}', "not JSON"),
        (b'{"prompt": "\\ud800"}', "not JSON"),
        (b"{'prompt': 'q'}", "not JSON"),
        (b"[" * 2000 + b"]" * 2000, "not JSON"),
        (b"3", "a number"),
        (b"null", "null"),
    ],
)
def test_an_invalid_line_is_an_error_with_its_file_and_line(line: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"prompt": "fine"}\n\n' + line + b'\n{"prompt": "never read"}\n')
    read = read_prompts(str(path))
    assert next(read)[0] == 1
    with pytest.raises(CaiError) as error:
        next(read)
    assert error.value.message.startswith(f"{path}:3: ")
    assert reason in error.value.message
    assert "\n" not in error.value.message


def test_plain_text_that_is_not_utf8_is_an_error_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_bytes(b"one\ncaf\xe9\n")
    with pytest.raises(InvalidRow) as error:
        texts(path)
    assert (error.value.file, error.value.line) == (str(path), 2)
    assert error.value.reason == "not UTF-8: unexpected end of data at byte 3"


def test_plain_text_with_a_nul_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_bytes(b"one\ntw\0o\n")
    with pytest.raises(CaiError) as error:
        texts(path)
    assert error.value.message == f"{path}:2: a NUL byte, which does not occur in plain text"
    assert error.value.hint == "is this UTF-16 or a binary file?"


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (gzip.compress(b'{"prompt": "q"}\n', mtime=0), "gzip"),
        (b"\x28\xb5\x2f\xfd....", "zstd"),
        (b"PK\x03\x04....", "zip"),
        (b"PAR1....", "parquet"),
    ],
)
def test_compressed_data_is_named_for_what_it_is(start: bytes, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(start)
    with pytest.raises(CaiError) as error:
        texts(path)
    assert error.value.code == "cannot-read"


def test_a_directory_and_a_missing_file_are_one_line_each(tmp_path: Path) -> None:
    with pytest.raises(CaiError) as error:
        texts(tmp_path)
    assert error.value.code == "cannot-read"
    with pytest.raises(CaiError) as error:
        texts(tmp_path / "none.jsonl")
    assert error.value.code == "cannot-read"
    with pytest.raises(CaiError) as error:
        texts(tmp_path / "none.parquet")
    assert error.value.code == "cannot-read"


def test_a_line_without_end_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 100)
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"prompt": "q"}\n' + b"x" * 101)
    with pytest.raises(InvalidRow) as error:
        list(read_values(str(path)))
    assert (error.value.file, error.value.line) == (str(path), 2)


def test_byte_order_marks_and_line_ends_of_other_systems_are_not_content(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "one"}\r\n\r\n{"prompt": "two"}')
    assert [(n, p.prompt[0].content) for n, p in read_prompts(str(path))] == [(1, "one"), (3, "two")]
    path.write_bytes(b"\xef\xbb\xbfone\r\n  \r\ntwo \u2028\x0b!\r\n".replace(b"\\u2028", b"\xe2\x80\xa8"))
    assert texts(path) == ["one", "two \u2028\x0b!"]


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_holds_no_prompts(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(content)
    assert texts(tmp_path / "in.jsonl") == []


def test_the_first_line_decides_so_that_a_broken_row_never_becomes_a_prompt(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "one"}\nplain words\n')
    with pytest.raises(InvalidRow) as error:
        texts(path)
    assert (error.value.file, error.value.line) == (str(path), 2)
    path.write_text('plain words\n{"prompt": "one"}\n')
    assert texts(path) == ["plain words", '{"prompt": "one"}']


def test_parquet_gives_the_same_prompts_as_json_lines(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = [
        {"id": "a", "prompt": [{"role": "user", "content": "é\u2028"}], "kind": "helpful", "source": "s"},
        {"id": None, "prompt": [{"role": "user", "content": "two"}], "kind": None, "source": "s"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    write_rows(tmp_path / "in.jsonl", rows)
    parquet, lines = (list(read_prompts(str(tmp_path / name))) for name in ("in.parquet", "in.jsonl"))
    assert parquet == lines


def test_an_invalid_parquet_row_is_an_error_with_its_number(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"prompt": ["one", " "]}), tmp_path / "in.parquet")
    with pytest.raises(InvalidRow) as invalid:
        texts(tmp_path / "in.parquet")
    assert (invalid.value.file, invalid.value.line) == (str(tmp_path / "in.parquet"), 2)
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    with pytest.raises(CaiError) as error:
        texts(tmp_path / "bad.parquet")
    assert error.value.code == "cannot-read"


@pytest.mark.parametrize("size", [0, 10, 65_535, 65_536, 65_537, 200_000])
def test_cutting_a_torn_tail_keeps_every_whole_line(size: int, tmp_path: Path) -> None:
    path = tmp_path / "rows"
    for start in (b"", b"whole\n"):
        path.write_bytes(start + b"x" * size)
        assert cut_torn_tail(path) == size
        assert path.read_bytes() == start
        assert cut_torn_tail(path) == 0


def test_reading_many_rows_keeps_none_of_them(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"".join(b'{"prompt": "%06d%s"}\n' % (i, b"x" * 1000) for i in range(5_000)))
    next(read_prompts(str(path)))  # imports and caches are not what is measured

    def read_all() -> None:
        assert sum(1 for _ in read_prompts(str(path))) == 5_000

    assert peak_memory(read_all) < 500_000 < os.path.getsize(path)


@pytest.mark.parametrize("number", ["1" * 5_000, "0." + "1" * 5_000, "1e400", "-" + "9" * 5_000])
def test_a_number_of_any_length_next_to_text_like_a_key_is_read_or_invalid(number: str, tmp_path: Path) -> None:
    """The parser that looks for repeated keys is Python's, which refuses to convert so many digits."""
    path = tmp_path / "in.jsonl"
    path.write_text(f'{{"a": "\\": ", "n": {number}}}\n')
    bad: list[InvalidRow] = []
    rows = list(read_rows(str(path), lambda value: value, lambda error, _: bad.append(error)))
    assert len(rows) + len(bad) == 1
    path.write_text(f'{{"a": "\\": ", "a": {number if "." in number else 7}}}\n')
    with pytest.raises(InvalidRow, match="field 'a' occurs twice"):
        list(read_values(str(path)))


def test_a_key_keeps_the_number_it_was_given_first() -> None:
    table = KeyTable()
    assert [table.number(key) for key in ("a", "b", "a", "c", "b", "a")] == [0, 1, 0, 2, 1, 0]


def test_a_hub_dataset_is_streamed_and_its_rows_are_read_as_any_others(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls = []

    def load(name: str, **options: object) -> list[dict[str, object]]:
        calls.append((name, options))
        return [{"prompt": "one?", "source": None}, {"messages": [{"role": "user", "content": "two?"}]}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = [row for _, row in read_prompts("hf://datasets/owner/name/data/part.parquet")]
    assert [row.prompt[0].content for row in rows] == ["one?", "two?"]
    assert calls == [("owner/name", {"data_files": "data/part.parquet", "streaming": True})]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('  {"prompt": "q"}\n', ["q"]),
        ('"one"\n"two"\n', ["one", "two"]),
        ("one\n[two\n", ["one", "[two"]),
    ],
)
def test_the_first_line_decides_whether_prompts_are_json(lines: str, said: list[str], tmp_path: Path) -> None:
    path = tmp_path / "named.txt"
    path.write_text(lines)
    rows = [prompt for _, prompt in read_prompts(str(path), "helpful")]
    assert [row.prompt[0].content for row in rows] == said
    assert {(row.source, row.kind) for row in rows} == {("named.txt", "helpful")}


def test_a_file_that_starts_with_a_list_is_json_and_no_prompt(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('["a"]\n')
    with pytest.raises(InvalidRow) as error:
        list(read_prompts(str(path)))
    assert (error.value.code, error.value.file, error.value.line) == ("invalid-row", str(path), 1)


PACK = {".gz": gzip.compress, ".zst": zstandard.compress}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(
        tmp_path / "in.jsonl", ({"id": f"p{i}", "prompt": f"question {i}\u2028", "source": "s"} for i in range(50))
    )
    write_rows(tmp_path / "script.jsonl", [{"contains": "question 7", "replies": [""]}, {"replies": ["one.", "two."]}])
    return tmp_path


@pytest.mark.parametrize("ending", PACK)
def test_an_ending_that_promises_compression_must_hold_it(ending: str, folder: Path) -> None:
    path = folder / f"plain.jsonl{ending}"
    path.write_bytes((folder / "in.jsonl").read_bytes())
    with pytest.raises(CaiError) as error:
        list(read_values(str(path)))
    assert error.value.code == "cannot-read"


def test_a_compressed_file_is_never_held_whole(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl.zst"
    line = json.dumps({"prompt": "q" * 1000}).encode() + b"\n"
    path.write_bytes(zstandard.compress(line * 20_000))
    next(read_values(str(path)))  # imports are not what is measured

    def read_all() -> None:
        assert sum(1 for _ in read_values(str(path))) == 20_000

    assert peak_memory(read_all) < 500_000
