"""The section on rounds, and the matrix of several constitutions."""

import json
from pathlib import Path

from cai_cli.report.by_round import matrices, steps_by_round
from cai_cli.report.collect import read_run
from cai_cli.report.command import write_report


def estimate(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 12}


def write_run(folder: Path) -> None:
    """Two rounds of a policy, and a comparison under the judges of two constitutions."""
    for number in (1, 2):
        (folder / f"rl@{number}").mkdir()
        metrics = {"steps": 6, "monitor_score": 0.1 * number, "accuracy": estimate(0.3 * number)}
        manifest = {"provenance": {"stage": "rl"}, "metrics": metrics, "run": {"seconds": 2.0}}
        (folder / f"rl@{number}.manifest.json").write_text(json.dumps(manifest))
    rounds = [
        {"round": n, "monitor": estimate(0.1 * n), "rise": None, "tokens": 9, "money": 0.0, "hours": 0.1}
        for n in (1, 2)
    ]
    block = {"repeat": 3, "ran": 2, "result": 1, "reason": "the score <fell>", "rounds": rounds}
    (folder / "run.json").write_text(json.dumps({"steps": {}, "rounds": {"loop": block}}))
    for judge, better in (("a.yaml", 40.0), ("b.yaml", -40.0)):
        ratings = [{"model": name, **estimate(value)} for name, value in (("one", better), ("two", -better))]
        compared = {"models": ["one", "two"], "ratings": {"harmless": ratings, "helpful": []}}
        (folder / f"compare@constitution={judge}.jsonl.compare.json").write_text(json.dumps(compared))


def test_a_metric_is_drawn_by_round_with_its_interval_unless_it_never_changes(tmp_path: Path) -> None:
    write_run(tmp_path)
    (step,) = steps_by_round(read_run(tmp_path), {})
    charts = {chart.id: chart.rows for chart in step.charts}
    assert step.name == "rl"
    assert charts["rl-monitor_score-by-round"] == [[1, 0.1], [2, 0.2]]
    assert [row[:2] for row in charts["rl-accuracy-by-round"]] == [[1, 0.3], [2, 0.6]]
    assert [len(row) for row in charts["rl-accuracy-by-round"]] == [4, 4]
    assert charts.keys() == {"rl-monitor_score-by-round", "rl-accuracy-by-round"}  # steps and seconds are equal


def test_models_under_each_constitutions_judge_form_a_matrix(tmp_path: Path) -> None:
    write_run(tmp_path)
    (matrix,) = matrices(read_run(tmp_path).comparisons)
    assert (matrix.name, list(matrix.judges)) == ("compare", ["a.yaml", "b.yaml"])
    values = {model: [rating["value"] for rating in ratings] for model, ratings in matrix.rows}
    assert values == {"one": [40.0, -40.0], "two": [-40.0, 40.0]}


def test_the_page_states_where_and_why_rounds_ended(tmp_path: Path) -> None:
    write_run(tmp_path)
    page = write_report(tmp_path).read_text()
    assert "2 of 3 rounds were run: the score &lt;fell&gt;. The result is that of round 1." in page
    assert "each model under each constitution" in page
    assert "40 (95%: 39.9 to 40.1, n = 12)" in page


def test_rounds_that_cannot_be_read_become_a_problem(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"steps": {}, "rounds": {"loop": {"repeat": "many"}}}))
    run = read_run(tmp_path)
    assert not run.rounds
    assert "`rounds`" in run.problems[0]
