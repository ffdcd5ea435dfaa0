"""The matrix of adherence on the page: every cell with its interval, and the conversations behind it."""

import json
from pathlib import Path

from conftest import Cai
from helpers import write_rows

from cai_cli.report.adherence import matrices
from cai_cli.report.collect import read_run
from cai_cli.report.examples import Budget


def _run(cai: Cai, folder: Path) -> None:
    tests = {"scenarios": [{"prompt": f"number {n} <script>", "pressure": ["go on"]} for n in range(10)]}
    principles = [{"id": id, "comparison": f"Which is {id}?", "tests": tests} for id in ("kind", "true")]
    (folder / "own.yaml").write_text(json.dumps({"kind": "preference", "name": "own", "principles": principles}))
    write_rows(folder / "bad.jsonl", [{"replies": ["no <b>"]}])
    write_rows(folder / "good.jsonl", [{"replies": ["yes"]}])
    judge = [{"contains": "break this principle", "scores": [0.0, -1.0]}, {"scores": [-1.0, 0.0]}]
    write_rows(folder / "judge.jsonl", [{"contains": "[[[yes", "scores": [-1.0, -1.0]}, *judge])
    (folder / "run").mkdir()
    words = ("bad=scripted:bad.jsonl", "good=scripted:good.jsonl", "--judge", "scripted:judge.jsonl")
    done = cai("eval", "adherence", *words, "--constitution", "own.yaml", "-o", "run/adherence.jsonl")
    assert done.code == 0, done.stderr


def test_the_matrix_has_a_cell_for_each_principle_and_model_and_links_to_conversations(
    cai: Cai, tmp_path: Path
) -> None:
    _run(cai, tmp_path)
    (matrix,) = matrices(read_run(tmp_path / "run"), Budget(600_000))
    assert [row.id for row in matrix.rows] == ["kind", "true"]
    result = json.loads((tmp_path / "run" / "adherence.jsonl.adherence.json").read_text())
    for row, principle in zip(matrix.rows, result["principles"], strict=True):
        assert [cell.rate for cell in row.cells] == [principle["rates"]["bad"], principle["rates"]["good"]]
        assert [cell.sign for cell in row.cells] == [0, -1]  # the judge is undecided about every reply of `good`
        assert {c.model for c in row.conversations} == {"bad", "good"}
    assert cai("report", "run").code == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert 'href="#adherence-1-2">true</a>' in page
    assert 'id="adherence-1-2"' in page
    assert page.count("▼ less") == 3  # of both principles and of all
    assert "no &lt;b&gt;" in page
    assert "number 0 <script>" not in page


def test_a_judge_that_is_not_to_be_trusted_marks_no_change(cai: Cai, tmp_path: Path) -> None:
    _run(cai, tmp_path)
    file = tmp_path / "run" / "adherence.jsonl.adherence.json"
    result = json.loads(file.read_text())
    result["judge"]["trusted"] = False
    result["simultaneous"] = {}
    file.write_text(json.dumps(result))
    (matrix,) = matrices(read_run(tmp_path / "run"), Budget(600_000))
    assert {cell.sign for row in matrix.rows for cell in row.cells} == {0}
    assert cai("report", "run").code == 0
    assert "▼" not in (tmp_path / "run" / "report.html").read_text()


def test_a_damaged_file_is_a_problem_that_the_page_lists(cai: Cai, tmp_path: Path) -> None:
    _run(cai, tmp_path)
    (tmp_path / "run" / "adherence.jsonl.adherence.json").write_text('{"models": 3}')
    run = read_run(tmp_path / "run")
    assert matrices(run, Budget(1000)) == []
    assert "models" in run.problems[0]


def test_conversations_stop_at_the_size_limit_and_the_matrix_stays_whole(cai: Cai, tmp_path: Path) -> None:
    _run(cai, tmp_path)
    (matrix,) = matrices(read_run(tmp_path / "run"), Budget(2000))
    assert len(matrix.rows) == 2
    assert 1 <= sum(len(row.conversations) for row in matrix.rows) <= 3
