"""The top of the page: counts, draws of principles, metrics and flags."""

import json
from pathlib import Path

from report_page import Page, drawn, squeezed
from report_run import make_run

from cai_cli.report.collect import read_run


def test_every_count_of_the_funnel_is_on_the_page(plain: tuple[str, Page]) -> None:
    text = squeezed(plain[1].text)
    assert "32 in = 30 out + 2 rejected + 0 skipped 2 × empty reply" in text
    assert "33 in = 30 out + 3 rejected + 0 skipped 3 × tie" in text
    assert text.count("30 in = 30 used (2 of them held out) + 0 rejected + 0 skipped") == 3
    assert "7 of 7 steps done" in text


def test_draws_are_counted_over_all_rounds_and_principles_never_drawn_are_listed(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "made"))
    from cai_cli.report.summary import constitutions

    (_, critique), (_, compare) = constitutions(run)
    rows = [json.loads(line) for line in (tmp_path / "made/revisions.jsonl").read_text().splitlines()]
    ids = [turn["principle_id"] for row in rows for turn in row["history"]]
    assert critique.counts == {name: ids.count(name) for name in critique.counts}
    assert sum(critique.counts.values()) == 60
    assert set(critique.principles) == set(critique.counts)
    assert 0 in critique.counts.values()
    assert sum(compare.counts.values()) == 30  # one a comparison, though it is judged in both orders


def test_a_constitution_changed_since_is_named_without_its_texts(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "made")
    path = folder / "revisions.jsonl.manifest.json"
    value = json.loads(path.read_text())
    value["provenance"]["constitution"]["fingerprint"] = "0" * 64
    path.write_text(json.dumps(value))
    _, page = drawn(folder)
    assert "The texts of the principles are not available" in page.text


def test_metrics_costs_and_notes_of_the_manifests_are_on_the_page(plain: tuple[str, Page]) -> None:
    text = squeezed(plain[1].text)
    assert "accuracy 0.5 (95%: 0.55 to 0.82, n = 40) → 0.7 (95%: 0.55 to 0.82, n = 40)" in text
    assert "accuracy by source.made 0.7 (95%: 0.55 to 0.82, n = 40)" in text
    assert "A note on the model." in text
    assert "Calibration on held-out pairs" in text
    assert "step command seconds requests prompt tokens new tokens cost" in text
    assert "preferences label-prefs 12.5 66 12,345 66 –" in text


def test_a_goodhart_flag_is_at_the_top_with_its_step(plain: tuple[str, Page]) -> None:
    assert "Flags during the training of rl-cai step 50: goodhart: monitor_score falls" in squeezed(plain[1].text)
