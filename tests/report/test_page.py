"""`cai report`: the page shows the contents of the run, states what it leaves out, and no row can run as code."""

import base64
import json
import re
from hashlib import sha256
from pathlib import Path
from urllib.parse import unquote

import pytest
from report_page import Page, drawn, squeezed
from report_run import HOSTILE, make_run


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    return drawn(make_run(tmp_path_factory.mktemp("r") / "hostile", hostile=True))


def test_every_tag_is_closed_and_every_id_is_unique(plain: tuple[str, Page], hostile: tuple[str, Page]) -> None:
    for _, page in (plain, hostile):
        assert page.open == []
        ids = [a["id"] for _, a in page.tags if "id" in a]
        assert len(ids) == len(set(ids))


def test_the_page_refers_to_nothing_outside_itself(plain: tuple[str, Page], hostile: tuple[str, Page]) -> None:
    for text, page in (plain, hostile):
        links = [v or "" for _, a in page.tags for k, v in a.items() if k in ("href", "src", "xlink:href", "action")]
        assert links
        assert {link.split(",")[0] if link.startswith("data:") else link[0] for link in links} <= {
            "#", "data:text/csv;charset=utf-8",
        }  # fmt: skip
        assert not page.named("link")
        assert not page.named("img")
        assert "@import" not in text


def test_the_policy_allows_the_one_script_by_its_hash_and_no_request(hostile: tuple[str, Page]) -> None:
    text, page = hostile
    (policy,) = (a["content"] or "" for a in page.named("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert len(page.named("script")) == 1
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(sha256(script.encode()).digest()).decode()
    assert policy.split("; ") == [
        "default-src 'none'", "style-src 'unsafe-inline'", f"script-src 'sha256-{digest}'", "base-uri 'none'",
        "form-action 'none'",
    ]  # fmt: skip


def test_hostile_rows_are_text(hostile: tuple[str, Page]) -> None:
    text, page = hostile
    assert len(page.named("style")) == 1
    assert not [a for _, a in page.tags for k in a if k.startswith("on")]
    for steering in "\x00\x1b\x07\u202e\u2066":
        assert steering not in text
    for shown in (HOSTILE[0], HOSTILE[2], HOSTILE[7], r"nul \x00 esc \x1b[31mred", r"right to left \u202egnp.exe"):
        assert squeezed(shown) in squeezed(page.text)


def test_the_numbers_of_every_chart_can_be_read_and_downloaded(plain: tuple[str, Page]) -> None:
    _, page = plain
    charts_found = [a for a in page.named("figure") if a.get("class") == "chart"]
    downloads = {
        a["download"]: unquote((a["href"] or "").partition(",")[2]) for a in page.named("a") if "download" in a
    }
    for chart in charts_found:
        assert f"{(chart['id'] or '').removeprefix('chart-')}.csv" in downloads
    header, first, *rest = downloads["rl-cai-kl.csv"].splitlines()
    assert header == "step,kl"
    assert first.startswith("1,")
    assert len(rest) == 59
    assert downloads["models.compare.json.csv"].splitlines()[1].startswith("start,1500.0,1470.0,1530.0,")


# --- what is left out is stated --------------------------------------------------------------------------------------


def test_simultaneous_intervals_are_named_with_their_number(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "made")
    compared = json.loads((folder / "models.compare.json").read_text())
    compared["simultaneous"] = {"win_rates": 12, "ratings": 8, "scores": 0}
    (folder / "models.compare.json").write_text(json.dumps(compared))
    _, page = drawn(folder)
    text = squeezed(page.text)
    assert "no significant difference. The intervals are 95% intervals, simultaneous over 12." in text
    assert "The bars are 95% intervals, simultaneous over 8. Win rates tell which model is better." in text
    assert "The band shows 95% intervals, not adjusted for multiple comparisons." in text


def test_a_comparison_on_one_axis_alone_shows_who_wins(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "made")
    for other in (*folder.glob("*.sweep.json"), folder / "hhh.json"):
        other.unlink(missing_ok=True)
    compared = json.loads((folder / "models.compare.json").read_text())
    compared["ratings"]["helpful"] = []
    (folder / "models.compare.json").write_text(json.dumps(compared))
    _, page = drawn(folder)
    assert "Win rates (models)" in squeezed(page.text)
    assert "The intervals are 95% intervals, not adjusted for multiple comparisons." in squeezed(
        page.text
    )  # a comparison by version 0.1
    assert ("a", {"href": "#comparison"}) in page.tags
