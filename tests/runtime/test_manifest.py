"""Manifests: runs that are resumed, refused and kept."""

from pathlib import Path

import pytest
from conftest import Cai
from helpers import Died, manifest_of, rows_in, write_rows
from stage_cases import ALL, WORDS


@pytest.mark.parametrize(
    "change", [("--batch-size", "3"), ("--device", "cpu"), ("--skip-invalid", "--max-invalid", "3")]
)
def test_a_partial_output_resumes_under_other_harmless_settings(
    change: tuple[str, ...], cai: Cai, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("cai_cli.runtime.sinks.FileSink.finish", lambda *_: (_ for _ in ()).throw(Died))
        with pytest.raises(Died):
            cai(*WORDS["sample"], "-o", "out.jsonl")
    again = cai(*WORDS["sample"], *change, "-o", "out.jsonl")
    assert again.code == 0
    assert "20 rows are finished" in again.stderr


def test_settings_of_speed_do_not_make_another_run(cai: Cai, inputs: Path) -> None:
    first = cai(*WORDS["sample"], "-o", "out.jsonl", "--batch-size", "3")
    again = cai(*WORDS["sample"], "-o", "out.jsonl", "--batch-size", "5", "--device", "cpu")
    assert (first.code, again.code) == (0, 0)
    assert "nothing to do" in again.stderr


@pytest.mark.parametrize(
    ("stage", "change", "named"),
    [
        ("sample", ("--seed", "9"), "settings.seed: 0 -> 9"),
        ("sample", ("-n", "3"), "settings.n: 2 -> 3"),
        ("sample", ("--kind", "helpful"), "settings.kind: nothing -> helpful"),
        ("critique", ("--temperature", "0.1"), "settings.temperature: 1.0 -> 0.1"),
        ("critique-revise", ("--no-critique",), "settings.critique: True -> False"),
        ("critique-revise", ("--few-shot", "none"), "constitution.fingerprint: "),
        ("critique-revise", ("--constitution", "mine.yaml"), "constitution.name: cai-critique-revision -> mine"),
        ("label-prefs", ("--both-orders",), "settings.both_orders: False -> True"),
        ("label-prefs", ("--model", "scripted:other.jsonl"), "model.fingerprint: "),
        ("label-prefs", ("--principles", "least-damage"), "settings.principles: nothing -> least-damage"),
    ],
)
def test_a_finished_output_of_another_run_is_refused_and_kept(
    stage: str, change: tuple[str, ...], named: str, cai: Cai, inputs: Path
) -> None:
    write_rows(inputs / "other.jsonl", [{"replies": ["else"], "scores": [-1.0, -2.0]}])
    mine = "kind: critique-revision\nname: mine\nprinciples:\n- {id: a, critique: Look., revision: Rewrite.}\n"
    (inputs / "mine.yaml").write_text(mine)
    assert cai(*WORDS[stage], "-o", "out.jsonl").code == 0
    before = (inputs / "out.jsonl").read_bytes()
    refused = cai(*WORDS[stage], *change, "-o", "out.jsonl")
    assert (refused.code, refused.error) == (1, "other-run")
    assert named in refused.stderr
    assert (inputs / "out.jsonl").read_bytes() == before
    assert cai(*WORDS[stage], *change, "-o", "out.jsonl", "--overwrite").code == 0
    assert manifest_of(inputs / "out.jsonl")["counts"]["in"] > 0


def test_a_file_that_cai_did_not_make_is_never_replaced_without_overwrite(cai: Cai, inputs: Path) -> None:
    for name in ("out.jsonl", "out.jsonl.partial"):
        (inputs / name).write_text("mine\n")
        refused = cai(*WORDS["sample"], "-o", "out.jsonl")
        assert (refused.code, refused.error) == (1, "not-made-by-cai")
        assert (inputs / name).read_text() == "mine\n"
        (inputs / name).unlink()


def test_overwrite_leaves_nothing_of_the_run_before(cai: Cai, inputs: Path) -> None:
    assert cai(*WORDS["sample"], "-o", "out.jsonl").code == 0
    assert (inputs / "out.jsonl.rejected.jsonl").exists()
    assert cai("sample", "prompts.jsonl", *ALL, "--limit", "1", "-o", "out.jsonl", "--overwrite").code == 0
    assert len(rows_in(inputs / "out.jsonl")) == 1
    assert not (inputs / "out.jsonl.rejected.jsonl").exists()
