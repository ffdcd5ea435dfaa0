"""Rows on the page: replies side by side, chains of revisions, and the size of the page."""

import json
import re
from hashlib import sha256
from pathlib import Path

from report_page import drawn, squeezed
from report_run import make_run, revision

from cai_cli.data.schema import Revision, load_row
from cai_cli.report import examples
from cai_cli.report.collect import read_run


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


def test_replies_of_characters_are_not_among_those_of_the_models(tmp_path: Path) -> None:
    made = make_run(tmp_path / "made")
    manifest = made / "after.jsonl.manifest.json"
    written = json.loads(manifest.read_text())
    written["provenance"]["settings"]["contrast"] = "following"
    manifest.write_text(json.dumps(written))
    rows = [json.loads(line) for line in (made / "after.jsonl").read_text().splitlines()]
    row = {"principle_id": "kind", "contrast": "following", "own_system": None}
    (made / "after.jsonl").write_text("".join(json.dumps(old | row) + "\n" for old in rows))
    run = read_run(made)
    assert examples.side_by_side(run, examples.Budget(10**6)) is None
    assert run.problems == []


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


def test_a_chain_compares_each_round_with_the_one_before(tmp_path: Path) -> None:
    import random

    row = load_row(Revision, revision(0, ["a"], random.Random(1), []))
    chain = examples.chain(row)
    assert [r.before.text for r in chain.rounds] == [one.response for one in row.history]
    assert [r.after.text for r in chain.rounds] == [row.history[1].response, row.reply]


def test_revisions_that_the_run_mixed_in_are_shown_with_its_own_while_their_file_is_the_same(tmp_path: Path) -> None:
    import random

    folder = make_run(tmp_path / "made", rows=10)
    mixed = tmp_path / "shipped.jsonl"
    rng = random.Random(2)
    mixed.write_text("".join(json.dumps(revision(100 + i, ["a"], rng, [])) + "\n" for i in range(12)))
    path = folder / "sl-cai.manifest.json"
    manifest = json.loads(path.read_text())
    manifest["run"]["inputs"] = {"revisions": str(folder / "revisions.jsonl"), "also 1": str(mixed)}
    manifest["provenance"]["input"] = {"also 1": sha256(mixed.read_bytes()).hexdigest()}
    path.write_text(json.dumps(manifest))
    shown = examples.chains(read_run(folder), examples.Budget(10**6))
    assert (shown.total, list(shown.sources)) == (22, [str(mixed), "revisions.jsonl"])
    assert [shown.rows[0].source, shown.rows[-1].source] == [str(mixed), "revisions.jsonl"]
    mixed.write_text("changed\n")
    shown = examples.chains(read_run(folder), examples.Budget(10**6))
    assert (shown.total, shown.rows[0].groups) == (10, ["red-team"])
