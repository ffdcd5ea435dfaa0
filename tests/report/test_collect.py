"""What is read from a run folder, finished or not, and what could not be read."""

import json
from pathlib import Path

import pytest
from report_page import drawn, squeezed
from report_run import make_run


def test_metrics_of_a_manifest_of_version_0_1_are_read(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "made")
    path = folder / "pm.manifest.json"
    value = json.loads(path.read_text())
    path.write_text(json.dumps({**value, "figures": value.pop("metrics")}))
    assert "held-out accuracy of pm 70%" in squeezed(drawn(folder)[1].text)


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
    assert "Not in this run: AI preference labels (cai label-prefs), a preference model (cai train-pm), RL (cai rl) or DPO (cai dpo), models compared" in text  # fmt: skip
    assert "could not be read" not in text


def test_the_steps_that_a_run_has_not_begun_are_counted(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "made")
    record = json.loads((folder / "run.json").read_text())
    planned = {name: step["argv"] for name, step in record["steps"].items()}
    planned["better"] = ["dpo", "x", "-o", str(folder / "better")]
    (folder / "run.json").write_text(json.dumps(record | {"planned": planned}))
    text = squeezed(drawn(folder)[1].text)
    assert "7 of 8 steps done" in text
    assert "better dpo · not started" in text


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
