"""Messages go to stderr without secrets and without characters that control a terminal."""

import json
from collections.abc import Iterator

import pytest

from cai_cli.common import console


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    console.set_quiet(False)
    console.set_rows_on_stdout(False)
    console.mute_errors(False)


def test_control_characters_are_escaped_and_other_text_is_kept() -> None:
    assert console.safe("é ☃\tשלום\n") == "é ☃\tשלום\n"
    assert console.safe("\x1b[31m \x9b \u202e \x00") == "\\x1b[31m \\x9b \\u202e \\x00"


def test_escaped_json_has_the_same_value() -> None:
    value = {"a": "é\u202e\x7f\u0085", "b": ["\n"]}
    line = json.dumps(value, ensure_ascii=False).encode()
    safe = console.safe_json(line)
    assert json.loads(safe) == value
    assert "\u202e" not in safe.decode()


def test_secrets_are_replaced_by_their_names_but_short_placeholders_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789")
    monkeypatch.setenv("HF_TOKEN", "none")
    assert console.redacted("Bearer sk-0123456789, none") == "Bearer [OPENAI_API_KEY], none"


def test_quiet_leaves_warnings_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    console.set_quiet(True)
    console.say("a message")
    console.warn("[bold]a warning")
    console.error("an error", "a hint")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "warning: [bold]a warning\nerror: an error\nhint: a hint\n")


def test_muted_errors_are_printed_by_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    console.mute_errors(True)
    console.error("an error")
    console.error_json({"code": "failed"})
    assert capsys.readouterr() == ("", "")


def test_an_error_in_json_goes_where_no_rows_go(capsys: pytest.CaptureFixture[str]) -> None:
    console.error_json({"code": "failed"})
    assert json.loads(capsys.readouterr().out) == {"error": {"code": "failed"}}
    console.set_rows_on_stdout(True)
    console.error_json({"code": "failed"})
    captured = capsys.readouterr()
    assert (captured.out, json.loads(captured.err)) == ("", {"error": {"code": "failed"}})
