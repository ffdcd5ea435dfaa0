"""A transformed file never replaces its input."""

from pathlib import Path

from conftest import Cai
from helpers import rows_in, write_rows


def test_an_output_that_is_an_input_is_refused(cai: Cai, tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}])
    for command in ("sort", "dedup"):
        refused = cai(command, "in.jsonl", "-o", "in.jsonl", "--overwrite")
        assert (refused.code, refused.error) == (1, "input-is-output")
    assert rows_in(tmp_path / "in.jsonl") == [{"prompt": "a"}]
