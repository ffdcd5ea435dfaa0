"""An input is read for what it is: lines, an array, printed objects, a table or plain text; and never held whole."""

import csv
import io
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from helpers import peak_memory
from hypothesis import given
from hypothesis import strategies as st

from cai_cli.common.errors import CaiError, InvalidRow, RowError, UsageError
from cai_cli.data import lines
from cai_cli.data.json_stream import JsonSplitter
from cai_cli.data.jsonl import read_prompts, read_values
from cai_cli.data.sources import Columns, ending_of
from cai_cli.data.tables import table_rows

ROWS = [{"prompt": "one [\n{", "n": [1, {"a": '"'}]}, {"prompt": 'two "\\" }'}, {"prompt": "é\u2028"}]


def texts(path: Path, columns: str | None = None) -> list[str]:
    chosen = Columns.parse(columns) if columns else None
    return [prompt.prompt[-1].content for _, prompt in read_prompts(str(path), columns=chosen)]


LAYOUTS = {
    "lines": "\n".join(json.dumps(row) for row in ROWS),
    "an array on one line": json.dumps(ROWS),
    "an array of lines": "[" + ",\n".join(json.dumps(row) for row in ROWS) + "]\n",
    "a printed array": json.dumps(ROWS, indent=2, ensure_ascii=False),
    "a printed array after blank lines": "\n \n" + json.dumps(ROWS, indent="\t"),
    "printed objects": "\n".join(json.dumps(row, indent=4) for row in ROWS),
    "objects with their first field on the first line": "\n".join(
        json.dumps(row).replace('{"prompt": ', '{"id": null,\n"prompt": ', 1) for row in ROWS
    ),
}


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".txt"])
@pytest.mark.parametrize("content", LAYOUTS.values(), ids=LAYOUTS)
def test_rows_are_the_same_in_every_layout_of_json(content: str, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"in{ending}"
    path.write_text(content, encoding="utf-8")
    assert texts(path) == [row["prompt"] for row in ROWS]


def test_one_printed_object_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "in.json"
    path.write_text(json.dumps(ROWS[0], indent=2))
    assert [value for _, value in read_values(str(path))] == ROWS[:1]


PLAIN = [
    "[INST] Tell me. [/INST]\nmore",
    "[1] What is it?\nmore",
    '["Hi" she said] and went\nmore',
    '"Be brief" she said.\n{not json}',
    '"Be brief."\nName a fruit.',
    "{name} asks\n{{user}}",
    "{{user}}: hello\n[x]",
    "a,b\nc,d",
]


@pytest.mark.parametrize("content", PLAIN)
def test_plain_text_may_begin_like_json(content: str, tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_text(content)
    assert texts(path) == content.split("\n")


@pytest.mark.parametrize(
    "content",
    [
        '{\n{"prompt": "r"}\n',
        "{'prompt': 'q'}\n",
        '{"prompt": "q\n{"prompt": "r"}\n',
        '[{"prompt": "q"}',
        "['a', 'b']\n",
        '{"prompt": "q",}\n',
    ],
)
def test_broken_json_in_the_first_line_is_an_error_and_no_prompt(content: str, tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_text(content)
    with pytest.raises(InvalidRow) as error:
        texts(path)
    assert (error.value.code, error.value.line) == ("invalid-row", 1)


def test_a_plain_text_file_says_how_many_prompts_it_makes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "in.txt"
    path.write_text("one\n\n  \ntwo\nthree")
    assert len(texts(path)) == 3
    assert "plain text, one prompt a line: 3 prompts of 5 lines" in capsys.readouterr().err


def test_a_line_with_an_array_of_messages_is_a_row(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('[{"role": "user", "content": "one"}]\n[{"role": "user", "content": "two"}]\n')
    assert texts(path) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c.yaml", "a: b"),
        ("c.yml", "a: b"),
        ("r.md", "# a"),
        ("x.xlsx", "a"),
        ("cells.txt", '"goal","target"\n"a","b"'),
    ],
)
def test_other_files_are_not_taken_for_prompts(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CaiError) as error:
        texts(tmp_path / name)
    assert error.value.code == "cannot-read"


# --- JSON over several lines --------------------------------------------------------------------------------------


@given(st.lists(st.dictionaries(st.text(max_size=3), st.recursive(
    st.text(max_size=6) | st.integers(), lambda inner: st.lists(inner, max_size=2), max_leaves=3), max_size=3), min_size=1, max_size=4),
    st.integers(1, 7), st.sampled_from([None, 1]), st.booleans())  # fmt: skip
def test_rows_are_cut_alike_whatever_the_size_of_the_blocks(
    rows: list[dict[str, Any]], size: int, indent: int | None, in_array: bool
) -> None:
    text = json.dumps(rows, indent=indent) if in_array else "\n".join(json.dumps(row, indent=indent) for row in rows)
    data = text.encode()
    blocks = [data[i : i + size] for i in range(0, len(data), size)]
    cut = list(JsonSplitter("x", in_array=in_array).rows(blocks, 1))
    assert [json.loads(row) for _, row in cut] == rows
    where = [number for number, _ in cut]
    assert all(data.split(b"\n")[number - 1].lstrip(b" [,").startswith(b"{") for number in where)


@given(st.text('[]{}",:\\ \na1', max_size=30), st.integers(1, 5), st.booleans())
def test_whatever_is_cut_never_fails_but_as_an_invalid_row(text: str, size: int, in_array: bool) -> None:
    data = ("[" if in_array else "").encode() + text.encode()
    with suppress(InvalidRow):
        list(JsonSplitter("x", in_array=in_array).rows([data[i : i + size] for i in range(0, len(data), size)], 1))


@pytest.mark.parametrize(
    "content", ['[{"a": 1},, {"b": 2}]', '[{"a": 1},]', '[{"a": 1}] {"b": 2}', "[\n{}\n", '[{"a": 1}]]', '[{"a": 1}]x']
)
def test_an_array_with_something_wrong_between_its_rows_is_invalid(content: str, tmp_path: Path) -> None:
    path = tmp_path / "in.json"
    path.write_text(content)
    with pytest.raises(InvalidRow):
        list(read_values(str(path)))


def test_an_invalid_element_has_its_line_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "in.json"
    path.write_text('[\n{"prompt": "one"},\n{"prompt": NaN},\n{"prompt": "three"}\n]')
    bad: list[InvalidRow] = []
    rows = [row.prompt[0].content for _, row in read_prompts(str(path), on_invalid=lambda error, _: bad.append(error))]
    assert (rows, [error.line for error in bad]) == (["one", "three"], [3])


def test_an_element_without_end_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 10_000)
    path = tmp_path / "in.json"
    path.write_text('[\n{"prompt": "' + "x" * 3_000_000)
    with pytest.raises(InvalidRow) as error:
        list(read_values(str(path)))
    assert error.value.line == 2


def test_an_array_is_never_held_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cai_cli.data.sources.BLOCK", 1 << 14)
    monkeypatch.setattr("cai_cli.data.sources.HEAD_BYTES", 1 << 14)
    path = tmp_path / "in.json"
    path.write_text(json.dumps([{"prompt": "x" * 1000}] * 5_000))
    next(read_values(str(path)))  # imports are not what is measured

    def read_all() -> None:
        assert sum(1 for _ in read_values(str(path))) == 5_000

    assert peak_memory(read_all) < 500_000


# --- tables -------------------------------------------------------------------------------------------------------


def test_a_csv_file_is_read_by_the_column_that_is_named(tmp_path: Path) -> None:
    path = tmp_path / "adv.csv"
    path.write_text('\ufeffrequest,target\r\n"a poem, with rhymes",Sure\nplain,Sure\n"over\ntwo lines",Sure\n')
    assert texts(path, "request") == ["a poem, with rhymes", "plain", "over\ntwo lines"]
    with pytest.raises(InvalidRow) as error:
        texts(path)
    assert "its fields are request, target" in error.value.reason
    with pytest.raises(InvalidRow) as error:
        texts(path, "reqest")
    assert "no column 'reqest'; its columns are request, target" in error.value.reason


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("b.csv", ";"), ("c.tsv", "\t")])
def test_a_table_with_known_columns_needs_no_option(name: str, separator: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(f"id{separator}prompt{separator}note\n7{separator}one{separator}x\n{separator}two{separator}\n")
    rows = [row for _, row in read_prompts(str(path))]
    assert [row.prompt[0].content for row in rows] == ["one", "two"]
    assert rows[0].id == "7"


def test_a_row_of_a_table_that_is_broken_is_invalid_and_the_next_is_read(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_bytes(b'prompt,n\none,1\ntwo\ncaf\xe9,3\n"x"y,4\nfive,5\n')
    bad: list[InvalidRow] = []
    rows = [row.prompt[0].content for _, row in read_prompts(str(path), on_invalid=lambda error, _: bad.append(error))]
    assert (rows, [error.line for error in bad]) == (["one", "five"], [3, 4, 5])


def test_a_header_must_name_each_column_once(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    for header in ("a,a\n1,2\n", ",,\n1,2,3\n"):
        path.write_text(header)
        with pytest.raises(CaiError) as error:
            texts(path)
        assert error.value.code == "cannot-read"
    path.write_text("")
    assert texts(path) == []


def test_a_quote_without_end_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 1_000)
    path = tmp_path / "in.csv"
    path.write_text('prompt\n"' + "x\n" * 2_000)
    with pytest.raises(InvalidRow):
        texts(path)


cells = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6)


@given(st.lists(st.tuples(cells, cells).filter(any), max_size=4))
def test_what_python_writes_as_csv_is_read_back(rows: list[tuple[str, str]]) -> None:
    file = io.StringIO(newline="")
    csv.writer(file).writerows([("prompt", "n"), *rows])
    stream = io.BytesIO(file.getvalue().encode())
    read = [tuple(row.values()) for _, row in table_rows(stream, "x", ".csv", pytest.fail)]
    assert read == rows


def test_columns_are_named_one_by_one_or_by_what_they_hold() -> None:
    columns = Columns.parse("prompt=q,completion=a")
    assert columns.pick({"q": "1", "a": "2", "n": "3", "messages": []}) == {"n": "3", "prompt": "1", "completion": "2"}
    for bad in ("x=y", "prompt=", "prompt=a,prompt=b", "prompt=a,b", ""):
        with pytest.raises(UsageError):
            Columns.parse(bad)
    for row in ("text", {"other": 1}):
        with pytest.raises(RowError):
            Columns.parse("q").pick(row)


def test_the_ending_is_that_before_the_compression() -> None:
    assert [ending_of(name) for name in ("a.CSV", "a.tsv.gz", "-", "a.jsonl.zst")] == [".csv", ".tsv", "", ".jsonl"]
