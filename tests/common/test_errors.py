"""Errors have a code, an exit code and a form for `--json`."""

from cai_cli.common.errors import CaiError, InvalidRow, RowError, UsageError


def test_an_error_as_json_has_code_message_and_hint() -> None:
    assert CaiError("full", code="cannot-write").as_json() == {"code": "cannot-write", "message": "full", "hint": None}
    assert UsageError("no", "do", code="invalid-option").as_json()["hint"] == "do"


def test_an_invalid_row_has_its_file_line_and_reason() -> None:
    error = InvalidRow("in.jsonl", 7, "not JSON")
    assert str(error) == "in.jsonl:7: not JSON"
    assert error.as_json() == {
        "code": "invalid-row", "message": "in.jsonl:7: not JSON", "hint": None,
        "file": "in.jsonl", "line": 7, "reason": "not JSON",
    }  # fmt: skip


def test_only_a_wrong_command_line_exits_with_two() -> None:
    assert [kind("x").exit_code for kind in (CaiError, RowError, UsageError)] == [1, 1, 2]
