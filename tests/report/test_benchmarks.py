"""The section on published benchmarks: scores before and after, differences in words, and the harness's errors."""

import json
from pathlib import Path
from typing import Any

from report_page import drawn, squeezed
from report_run import make_run

from cai_cli.report.benchmarks import published
from cai_cli.report.collect import read_run


def estimate(value: float) -> dict[str, float]:
    return {"value": value, "low": max(0.0, value - 0.1), "high": min(1.0, value + 0.1), "n": 12}


def bench(**more: Any) -> dict[str, Any]:
    models = [
        {"model": name, "score": estimate(value), "groups": {"illegal": estimate(value), "<b>": estimate(value)}}
        for name, value in (("start", 0.8), ("final", 0.3))
    ]
    return {
        "benchmark": "harmbench", "title": "HarmBench", "metric": "attack success rate", "better": "lower",
        "judge": "a judge", "models": models, "simultaneous": {"models": 2, "groups": 4, "differences": 1},
        "differences": [{"model": "final", "baseline": "start", "value": -0.5, "low": -0.7, "high": -0.3, "n": 12}],
    } | more  # fmt: skip


def harness(model: str, value: float, date: float) -> dict[str, Any]:
    scores = {"alias": "arc", "acc,none": value, "acc_stderr,none": 0.03, "acc_norm,none": value, "sample_len": 9,
              "acc_norm_stderr,none": "N/A"}  # fmt: skip
    return {"results": {"arc": scores}, "date": date, "n-samples": {"arc": {"original": 90, "effective": 50}},
            "cai": {"model": model, "fingerprint": "f"}, "config": {}}  # fmt: skip


def write_run(folder: Path) -> None:
    (folder / "harm.jsonl.bench.json").write_text(json.dumps(bench()))
    (folder / "a.lm-eval.json").write_text(json.dumps(harness("final", 0.5, 2.0)))
    (folder / "b.lm-eval.json").write_text(json.dumps(harness("start", 0.6, 1.0)))


def test_scores_and_differences_are_drawn_before_and_after(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rows=4)
    write_run(folder)
    run = read_run(folder)
    assert not [name for name in run.evaluations if name.endswith((".bench.json", ".lm-eval.json"))]
    found, abilities = published(run)
    assert found.columns == ["category", "start", "final"]
    assert [row[0] for row in found.rows] == ["all", "illegal", "<b>"]
    assert [row[:2] for row in found.charts[0].rows] == [["start", 0.8], ["final", 0.3]]
    assert found.findings == [
        "final against start: better, -50.0 points (95%: -70.0 to -30.0, n = 12).",
    ]
    assert abilities.columns == ["task and metric", "start", "final", "final - start"]
    assert abilities.rows == [
        ["arc acc", "0.6 ± 0.03", "0.5 ± 0.03", "-0.1 ± 0.042"], ["arc acc_norm", "0.6", "0.5", "-0.1"],
    ]  # fmt: skip
    assert [row[0] for row in abilities.charts[0].rows] == ["arc acc: start", "arc acc: final"]
    assert abilities.charts[0].rows[0][-1] == 50
    text, page = drawn(folder)
    assert page.open == []
    assert "<b>" not in text.partition("<main")[2].partition('id="benchmarks"')[2].partition("</section>")[0]
    for shown in ("judged by a judge", "better, -50.0 points", "0.6 ± 0.03", "Abilities kept"):
        assert squeezed(shown) in squeezed(page.text)


def test_a_change_is_stated_only_where_its_interval_excludes_zero(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rows=4)
    unclear = {"model": "final", "baseline": "start", "value": 0.1, "low": -0.1, "high": 0.3, "n": 12}
    worse = {**unclear, "low": 0.05}
    (folder / "x.bench.json").write_text(json.dumps(bench(differences=[unclear, worse])))
    (found,) = published(read_run(folder))
    assert [sentence.split(",")[0] for sentence in found.findings] == [
        "final against start: no significant difference", "final against start: worse",
    ]  # fmt: skip


def test_a_file_of_another_form_becomes_a_problem(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rows=4)
    (folder / "x.bench.json").write_text('{"title": "HarmBench"}')
    run = read_run(folder)
    assert published(run) == []
    assert any("x.bench.json" in problem for problem in run.problems)
