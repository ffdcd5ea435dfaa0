"""Charts: colours, numbers as CSV, hostile and long names."""

import html
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_page import Page, drawn
from report_run import HOSTILE, make_run

from cai_cli.report import charts
from cai_cli.report.page import csv_link


def test_unknown_columns_are_drawn_under_their_own_name(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "made")
    path = folder / "rl-cai/metrics.jsonl"
    rows = [
        json.loads(line) | {"new_monitor": 0.5, "text": "x", "all_null": None} for line in path.read_text().splitlines()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text, _ = drawn(folder)
    assert 'id="chart-rl-cai-new_monitor"' in text
    assert "chart-rl-cai-text" not in text
    assert "chart-rl-cai-all_null" not in text


def test_charts_use_the_colours_of_the_page_so_that_dark_mode_reaches_them(plain: tuple[str, Page]) -> None:
    charts_found = re.findall(r"<svg .*?</svg>", plain[0], re.DOTALL)
    assert len(charts_found) > 15
    for chart in charts_found:
        assert not re.findall(r"#[0-9a-f]{6}\b", chart)
        assert "var(--series-1)" in chart


@given(st.lists(st.lists(st.one_of(st.text(), st.integers(), st.floats(allow_nan=False)), min_size=1, max_size=3)))
def test_no_cell_of_a_csv_is_a_formula(rows: list[list[Any]]) -> None:
    import csv
    import io

    text = unquote(csv_link(["a"], rows).partition(",")[2])
    for row in csv.reader(io.StringIO(text, newline="")):
        for cell in row:
            assert (
                not cell.startswith(("=", "+", "@", "\t"))
                or cell.replace("+", "").replace(".", "").replace("e", "").isdigit()
            )


def test_a_chart_with_hostile_names_is_drawn() -> None:
    figures = {name: {"value": 0.5, "low": 0.2, "high": 0.7, "n": 9} for name in HOSTILE}
    svg = charts.forest("x", "x", figures, x_label="a").svg
    assert "<script" not in svg
    assert html.escape("<script>window.pwned = 1</script>", quote=False) in svg
    assert "\x00" not in svg


def test_points_close_together_are_distinguished_by_their_numbers() -> None:
    points = [charts.ScatterPoint(f"a long name of a model {i}", (1.0, 0.5, 1.5), (1.0, 0.5, 1.5)) for i in range(5)]
    chart = charts.scatter("x", "x", points, x_label="a", y_label="b")
    assert list(chart.legend) == [f"{i + 1} a long name of a model {i}" for i in range(5)]
    assert list(chart.legend.values()) == [1, 2, 3, 4, 1]
    assert [f">{i}<" in chart.svg for i in range(1, 6)] == [True] * 5


def test_long_names_leave_a_forest_the_width_of_its_axes() -> None:
    def drawn_width(name: str) -> float:
        svg = charts.forest("x", "x", {name: {"value": 0.5, "low": 0.2, "high": 0.7, "n": 9}}, x_label="a").svg
        interval = next(m for m in re.finditer(r"M ([\d.]+) ([\d.]+) \nL ([\d.]+) \2", svg) if m[1] != m[3])
        return abs(float(interval[3]) - float(interval[1]))

    long = " over ".join(["revisions@critique=true@rounds=1"] * 6)
    assert drawn_width(long) == pytest.approx(drawn_width("a"), rel=0.02)
    assert drawn_width("a") > 100
