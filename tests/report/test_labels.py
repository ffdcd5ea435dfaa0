"""The audit of labels on the page."""

import json
from pathlib import Path
from typing import Any

from report_page import Page, drawn, squeezed
from report_run import make_run, write

from cai_cli.data.schema import Preference, load_row
from cai_cli.metrics.label_audit import audit_file
from cai_cli.report import charts, labels


def vote(order: str, p_first: float) -> dict[str, Any]:
    return {"principle_id": "p", "method": "choice", "order": order, "p_first": p_first, "rationale": None}


def pair(p_chosen: float, votes: list[dict[str, Any]], human: str | None = None) -> Preference:
    said = [{"role": "assistant", "content": "x"}]
    return load_row(Preference, {
        "id": "1", "prompt": [{"role": "user", "content": "q"}], "chosen": said, "rejected": said, "p_chosen": p_chosen,
        "votes": votes, "human": human, "source": None,
    })  # fmt: skip


def audited(rows: list[Preference]) -> tuple[dict[str, Any], list[charts.Chart]]:
    label_charts = labels.LabelCharts()
    for row in rows:
        label_charts.add(row)
    metrics = label_charts.label_audit.audit()
    return metrics, label_charts.charts(metrics)


def test_the_audit_distinguishes_position_bias_from_reading_the_replies() -> None:
    positional, its_charts = audited([pair(0.52, [vote("ab", 0.9), vote("ba", 0.86)])] * 8)
    honest, honest_charts = audited([pair(0.9, [vote("ab", 0.9), vote("ba", 0.1)], "chosen")] * 8)
    for figures, flip, first in ((positional, 1.0, 1.0), (honest, 0.0, 0.5)):
        assert figures["flip_rate"]["value"] == flip
        assert figures["first_picks"]["value"] == first
    assert (positional["agreement"], len(its_charts)) == (None, 2)
    assert [chart.id for chart in honest_charts] == ["labels-first", "labels-p-chosen", "labels-reliability"]


def test_every_step_with_labels_has_its_own_audit(plain: tuple[str, Page], tmp_path: Path) -> None:
    folder = make_run(tmp_path / "made")
    row = json.loads((folder / "preferences.jsonl").read_text().splitlines()[0])
    beside = json.loads((folder / "preferences.jsonl.manifest.json").read_text())
    votes = [vote("ab", 0.9), vote("ba", 0.86)]  # for the first position
    rows = [row | {"id": f"p{i}/0-1", "p_chosen": 0.52, "human": None, "votes": votes} for i in range(20)]
    write(folder / "positional.jsonl", rows, beside)
    write(folder / "ties.jsonl", [], beside)
    tie = {"key": "p1/0-1", "reason": "tie", "row": json.dumps(row)}
    write(folder / "ties.jsonl.rejected.jsonl", [tie], None)
    page = drawn(folder)[1]
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    text = squeezed(page.text)
    for file in ("preferences", "positional", "ties"):
        found = audit_file(str(folder / f"{file}.jsonl"))
        verdict = {
            True: "These labels can be trusted",
            False: "Do not trust these labels",
            None: "Whether these labels can be trusted is unknown",
        }
        assert f" {file} {verdict[found['trusted']]}: {found['reason']}." in text
    assert text.count("flip rate: preferences that change with the order of the replies") == 2
    assert "Confidence of the labels (positional)" in text
    assert "judgements that flip with the order of the replies" not in text
    assert "pairs labelled" not in text

    alone = squeezed(plain[1].text)
    assert "correlation of the judge's preferences in the two orders" in alone
    assert "Confidence of the labels (" not in alone
    assert "chart-labels-first" in [a.get("id") for _, a in plain[1].tags]
