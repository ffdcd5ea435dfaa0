"""A stage's input: shards, limits, invalid lines, and the digest of what was read."""

import json
from pathlib import Path

import pytest
from helpers import sample_row, write_rows

from cai_cli.common.errors import CaiError, InvalidRow, UsageError
from cai_cli.data.jsonl import rows_of
from cai_cli.data.row_reader import ChangedRows, RowReader
from cai_cli.data.schema import Sample

PARSE = rows_of(Sample)


@pytest.fixture
def file(tmp_path: Path) -> str:
    """Ten rows, with an invalid line after the third and one after the sixth."""
    path = write_rows(tmp_path / "in.jsonl", (sample_row(i) for i in range(10)))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:3], "{\n", *lines[3:6], "[]\n", *lines[6:]]))
    return str(path)


@pytest.mark.parametrize("skip", [False, None])
def test_the_first_invalid_line_stops_and_the_option_is_named_where_it_exists(skip: bool | None, file: str) -> None:
    with pytest.raises(InvalidRow) as error:
        list(RowReader(skip_invalid=skip).rows(file, PARSE))
    assert (error.value.code, error.value.file, error.value.line) == ("invalid-row", file, 4)
    assert ("--skip-invalid" in (error.value.hint or "")) == (skip is False)


def test_skipped_lines_become_rejected_rows_in_the_order_of_the_file(file: str) -> None:
    reader = RowReader(skip_invalid=True)
    rows = list(reader.rows(file, PARSE))
    assert [line for line, _ in rows] == [1, 2, 3, 5, 6, 7, 9, 10, 11, 12]
    assert [(line, row.key, row.row) for line, row in reader.invalid_before(8)] == [(4, "line 4", "{")]
    assert [(row.key, row.row) for row in reader.take_invalid()] == [("line 8", "[]")]
    assert reader.take_invalid() == []


def test_more_invalid_lines_than_allowed_stop_the_run(file: str) -> None:
    assert len(list(RowReader(skip_invalid=True, max_invalid=2).rows(file, PARSE))) == 10
    with pytest.raises(CaiError) as error:
        list(RowReader(skip_invalid=True, max_invalid=1).rows(file, PARSE))
    assert error.value.code == "invalid-row"
    with pytest.raises(UsageError) as usage:
        RowReader(max_invalid=1)
    assert usage.value.code == "option-conflict"


def test_shards_share_the_rows_and_the_invalid_lines_and_record_the_same_input(file: str) -> None:
    lines: list[int] = []
    read = []
    for shard in ("1/3", "2/3", "3/3"):
        reader = RowReader(shard, skip_invalid=True)
        lines += [line for line, _ in reader.rows(file, PARSE)]
        lines += [line for line, _ in reader.invalid_before()]
        read.append(reader.digest_so_far())
    assert sorted(lines) == list(range(1, 13))
    assert read[0]["count"] == 10
    assert read == [read[0]] * 3


def test_a_limit_counts_valid_rows_and_the_digest_changes_with_one_row(file: str, tmp_path: Path) -> None:
    reader = RowReader(skip_invalid=True)
    assert [line for line, _ in reader.rows(file, PARSE, limit=4)] == [1, 2, 3, 5]
    four = reader.digest_so_far()
    list(reader.rows(file, PARSE, limit=4))
    assert reader.digest_so_far() == four
    changed = write_rows(
        tmp_path / "changed.jsonl", (sample_row(i, reply="other" if i == 3 else None) for i in range(4))
    )
    plain = RowReader()
    list(plain.rows(str(changed), PARSE))
    assert plain.digest_so_far()["count"] == 4
    assert plain.digest_so_far()["sha256"] != four["sha256"]


TOOL = {"messages": [{"role": "user", "content": "q"}, {"role": "tool", "content": "x"}]}


def test_an_unusable_row_is_rejected_with_its_reason_and_needs_no_option(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [{"prompt": "one"}, TOOL, {"prompt": "two", "lang": "en"}])
    for skip in (False, True, None):
        reader = RowReader(skip_invalid=skip, max_invalid=0 if skip else None)
        rows = [row for _, row in reader.prompts(str(tmp_path / "in.jsonl"))]
        assert [row.prompt[0].content for row in rows] == ["one", "two"]
        (rejected,) = reader.take_invalid()
        assert (rejected.key, rejected.reason.partition(",")[0]) == ("line 2", "a tool call or its result")
        assert json.loads(rejected.row) == TOOL
        assert reader.dropped.as_json() == {"lang": 1}


def test_the_rows_that_are_expected_come_first_or_reading_stops(file: str) -> None:
    def reader(count: int | None) -> RowReader:
        made = RowReader(skip_invalid=True)
        list(made.rows(file, PARSE, count))
        digest = made.digest_so_far()
        again = RowReader(skip_invalid=True)
        again.expect(digest)
        return again

    for count in (1, 3, 6, 10, None):
        read = reader(count)
        assert len(list(read.rows(file, PARSE))) == 10
        assert read.met_expected
    whole = reader(None)
    Path(file).write_text(Path(file).read_text().replace("p7", "q7"))
    with pytest.raises(ChangedRows) as error:
        list(whole.rows(file, PARSE))
    assert error.value.code == "other-run"
    short = reader(9)
    with pytest.raises(ChangedRows):
        list(short.rows(file, PARSE, 8))
