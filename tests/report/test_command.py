"""Folders and outputs that `cai report` refuses."""

import json
from pathlib import Path

from conftest import Cai
from report_run import make_run


def test_a_folder_without_a_run_is_refused(cai: Cai, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, code in (("empty", "not-made-by-cai"), ("none", "cannot-read")):
        done = cai("report", name)
        assert (done.code, done.error) == (1, code)


def test_the_output_is_an_html_file_and_never_a_file_of_rows(cai: Cai, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "made")
    before = (folder / "samples.jsonl").read_bytes()
    done = cai("report", "made", "-o", "made/samples.jsonl")
    assert (done.code, done.error) == (2, "invalid-option")
    assert (folder / "samples.jsonl").read_bytes() == before
    done = cai("report", "made", "-o", "here/page.html", "--json")
    assert json.loads(done.stdout) == {"run": "made", "output": "here/page.html", "bytes": (tmp_path / "here/page.html").stat().st_size}  # fmt: skip
