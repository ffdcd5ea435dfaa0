"""`cai report`: the page shows the contents of the run, states what it leaves out, and no row can run as code."""

import base64
import html
import json
import re
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from conftest import Cai
from hypothesis import given
from hypothesis import strategies as st
from report_run import HOSTILE, make_run, revision, write

from cai_cli.data.schema import Preference, Revision, load_row
from cai_cli.metrics.label_audit import audit_file
from cai_cli.report import charts, examples, labels
from cai_cli.report.collect import read_run
from cai_cli.report.command import write_report
from cai_cli.report.page import csv_link
from cai_cli.report.word_diff import compare_words

VOID = {"meta", "input", "br", "img", "link", "hr", "source", "path", "use"}


class Page(HTMLParser):
    """Tags, attributes and visible text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.text += " "
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self.text += " "
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def drawn(folder: Path) -> tuple[str, Page]:
    text = write_report(folder).read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    return drawn(make_run(tmp_path_factory.mktemp("r") / "made"))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    return drawn(make_run(tmp_path_factory.mktemp("r") / "hostile", hostile=True))


def squeezed(text: str) -> str:
    return " ".join(text.split())


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


def test_metrics_costs_and_notes_of_the_manifests_are_on_the_page(plain: tuple[str, Page]) -> None:
    text = squeezed(plain[1].text)
    assert "accuracy 0.5 (95%: 0.55 to 0.82, n = 40) → 0.7 (95%: 0.55 to 0.82, n = 40)" in text
    assert "accuracy by source.made 0.7 (95%: 0.55 to 0.82, n = 40)" in text
    assert "A note on the model." in text
    assert "Calibration on held-out pairs" in text
    assert "step command seconds requests prompt tokens new tokens cost" in text
    assert "preferences label-prefs 12.5 66 12,345 66 –" in text


def test_metrics_of_a_manifest_of_version_0_1_are_read(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "made")
    path = folder / "pm.manifest.json"
    value = json.loads(path.read_text())
    path.write_text(json.dumps({**value, "figures": value.pop("metrics")}))
    assert "held-out accuracy of pm 70%" in squeezed(drawn(folder)[1].text)


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


def test_a_goodhart_flag_is_at_the_top_with_its_step(plain: tuple[str, Page]) -> None:
    assert "Flags during the training of rl-cai step 50: goodhart: monitor_score falls" in squeezed(plain[1].text)


def test_charts_use_the_colours_of_the_page_so_that_dark_mode_reaches_them(plain: tuple[str, Page]) -> None:
    charts_found = re.findall(r"<svg .*?</svg>", plain[0], re.DOTALL)
    assert len(charts_found) > 15
    for chart in charts_found:
        assert not re.findall(r"#[0-9a-f]{6}\b", chart)
        assert "var(--series-1)" in chart


def test_replies_of_the_models_are_side_by_side_by_prompt(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "made"))
    excerpt = examples.side_by_side(run, examples.Budget(10**6))
    assert excerpt
    assert (len(excerpt.rows), excerpt.total) == (30, 30)
    assert list(excerpt.rows[3].replies) == ["start", "rl-cai"]
    after = json.loads((tmp_path / "made/after.jsonl").read_text().splitlines()[3])
    reply = excerpt.rows[3].replies["rl-cai"]
    assert reply
    assert reply.text.text == after["completion"][0]["content"]


# --- what is left out is stated --------------------------------------------------------------------------------------


def test_a_large_run_stays_under_5_mb_and_states_how_much_it_shows(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "big", rows=700, hostile=True, long=50_000)
    text, page = drawn(folder)
    assert len(text.encode()) < 5_000_000
    page_text = squeezed(page.text)
    (shown,) = re.findall(r"The first (\d+) of 700 chains from revisions.jsonl; use cai show for the rest", page_text)
    assert 0 < int(shown) <= examples.MAX_ROWS
    assert text.count("data-item data-principles") == int(shown) + int(
        re.findall(r"The first (\d+) of 700 comp", page_text)[0]
    )
    assert "The text is cut: 6,000 of 50,000 characters are shown." in page_text


def test_the_budget_of_a_list_counts_what_escaping_adds() -> None:
    budget = examples.Budget(10_000)
    assert budget.allows("<" * 1000)
    assert not budget.allows("<" * 1600)
    assert not budget.allows("small")  # the first rows are shown, not the short ones


def test_an_unfinished_run_is_reported_with_what_is_there(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "made")
    for name in ("pm", "rl-cai"):
        (folder / f"{name}.manifest.json").unlink()
    (folder / "pm").rename(folder / "pm.partial")
    (folder / "pm.partial.manifest.json").write_text(
        json.dumps(
            {"status": "running", "provenance": {"stage": "train-pm", "cai": "0.1.0", "input": {}, "settings": {}}}
        )
    )
    (folder / "rl-cai/metrics.jsonl").unlink()
    (folder / "rl-cai").rmdir()
    (folder / "preferences.jsonl").rename(folder / "preferences.jsonl.partial")
    (folder / "preferences.jsonl.manifest.json").rename(folder / "preferences.jsonl.partial.manifest.json")
    with (folder / "preferences.jsonl.partial").open("a") as file:
        file.write('{"id": "torn')
    (folder / "models.compare.json").unlink()
    _, page = drawn(folder)
    text = squeezed(page.text)
    assert "4 of 7 steps done" in text
    assert "Training has not finished; the last recorded step is 9." in text
    assert "rl-cai rl · 13 s · no output" in text
    assert "All 30 comparisons" in text
    assert "Not in this run: AI preference labels (cai label-prefs), a preference model (cai train-pm), RL (cai rl), models compared" in text  # fmt: skip
    assert "could not be read" not in text


def test_a_comparison_on_one_axis_alone_shows_who_wins(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "made")
    for other in (*folder.glob("*.sweep.json"), folder / "hhh.json"):
        other.unlink(missing_ok=True)
    compared = json.loads((folder / "models.compare.json").read_text())
    compared["ratings"]["helpful"] = []
    (folder / "models.compare.json").write_text(json.dumps(compared))
    _, page = drawn(folder)
    assert "Win rates (models)" in squeezed(page.text)
    assert ("a", {"href": "#comparison"}) in page.tags


def test_commands_run_by_hand_leave_no_run_file_and_are_reported_too(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "made")
    (folder / "run.json").unlink()
    _, page = drawn(folder)
    assert "7 of 7 steps done" in page.text
    assert "60 draws" in page.text


def test_a_compressed_output_is_read_as_it_is(tmp_path: Path) -> None:
    import zstandard

    folder = make_run(tmp_path / "made")
    (folder / "run.json").unlink()
    plain = folder / "revisions.jsonl"
    (folder / "revisions.jsonl.zst").write_bytes(zstandard.compress(plain.read_bytes()))
    plain.unlink()
    (folder / "revisions.jsonl.manifest.json").rename(folder / "revisions.jsonl.zst.manifest.json")
    text, page = drawn(folder)
    assert "All 30 chains from revisions.jsonl.zst" in squeezed(page.text)
    assert ">revisions<" in text


def test_an_unreadable_file_is_named_with_its_line_and_the_rest_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "made")
    lines = (folder / "revisions.jsonl").read_text().splitlines(keepends=True)
    (folder / "revisions.jsonl").write_text("".join([*lines[:4], '{"id": 3}\n', *lines[5:]]))
    (folder / "models.compare.json").write_text('{"models": [1]}')
    (folder / "hhh.json").write_text("{nonsense")
    _, page = drawn(folder)
    text = squeezed(page.text)
    assert "Files that could not be read" in text
    assert "All 4 chains" in text
    assert f"{folder / 'revisions.jsonl'}:5: not a Revision row" in text
    assert "models.compare.json: models.0: Input should be a valid string" in text
    assert "hhh.json: not a readable manifest" in text
    assert squeezed(capsys.readouterr().err).count("revisions.jsonl:5") == 1


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


# --- its parts -----------------------------------------------------------------------------------------------------


@given(st.text(), st.text())
def test_the_pieces_of_a_difference_join_to_both_texts(before: str, after: str) -> None:
    found = compare_words(before, after)
    assert "".join(piece.text for piece in found.before) == before
    assert "".join(piece.text for piece in found.after) == after
    assert {piece.kind for piece in found.before} <= {"same", "del"}
    assert {piece.kind for piece in found.after} <= {"same", "ins"}
    assert 0 <= found.changed <= 1
    assert compare_words(before, before).changed == 0


def test_a_difference_is_one_of_words() -> None:
    found = compare_words("I will not help you.", "I will gladly help you.")
    assert found.before == [("same", "I will "), ("del", "not "), ("same", "help you.")]
    assert found.after == [("same", "I will "), ("ins", "gladly "), ("same", "help you.")]
    assert found.changed == pytest.approx(0.2)


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
        verdict = "These labels can be trusted" if found["trusted"] else "Do not trust these labels"
        assert f" {file} {verdict}: {found['reason']}." in text
    assert text.count("flip rate: preferences that change with the order of the replies") == 2
    assert "Confidence of the labels (positional)" in text
    assert "labels that flip with the order of the replies" not in text
    assert "pairs labelled" not in text

    alone = squeezed(plain[1].text)
    assert "labels that flip with the order of the replies" in alone
    assert "Confidence of the labels (" not in alone
    assert "chart-labels-first" in [a.get("id") for _, a in plain[1].tags]


def test_a_chain_compares_each_round_with_the_one_before(tmp_path: Path) -> None:
    import random

    row = load_row(Revision, revision(0, ["a"], random.Random(1), []))
    chain = examples.chain(row)
    assert [r.before.text for r in chain.rounds] == [one.response for one in row.history]
    assert [r.after.text for r in chain.rounds] == [row.history[1].response, row.reply]


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


def test_points_close_together_are_told_apart_by_their_numbers() -> None:
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
