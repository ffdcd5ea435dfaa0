"""Names and digests of version 0.1.0 are read under today's names."""

from pathlib import Path

import pytest
from helpers import sample_row

from cai_cli.common import legacy
from cai_cli.common.errors import CaiError
from cai_cli.data.schema import Message, Prompt, Revision, Sample, load_row
from cai_cli.evaluate.compare import ReplyPair
from cai_cli.judging.pairs import Pair
from cai_cli.phase1_supervised.red_team import Attempt
from cai_cli.pipeline.registry import STAGES
from cai_cli.runtime.manifest import differences, read_manifest
from cai_cli.runtime.output_files import refuse_other_run, refuse_to_resume_other_run
from cai_cli.runtime.work_items import item_digest

DATA = Path(__file__).parent.parent / "data/v0.1.0"


def test_the_table_of_old_options_is_that_of_the_configs() -> None:
    declared = {
        alias.replace("-", "_"): name
        for stage in STAGES.values()
        for name, (_, option) in stage.config.options().items()
        for alias in option.aliases
    }
    assert declared == legacy.OPTIONS


def test_a_setting_that_the_old_version_lacked_is_equal_at_its_old_behaviour_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorded = (read_manifest(DATA / "finished/sample.jsonl.manifest.json") or {})["provenance"]
    monkeypatch.setattr(legacy, "ADDED_SETTINGS", {"min_p": 0.0})
    for value, changed in ((0.0, []), (0.1, ["settings.min_p: nothing -> 0.1"])):
        current = {**recorded, "cai": "0.2.0", "settings": {**recorded["settings"], "min_p": value}}
        assert differences(recorded, current) == changed
    with pytest.raises(CaiError) as error:
        refuse_other_run(Path("out"), recorded, current)
    assert error.value.code == "other-run"


def test_a_stage_that_changed_its_rows_recognises_old_outputs_and_does_not_resume_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorded = (read_manifest(DATA / "finished/sample.jsonl.manifest.json") or {})["provenance"]
    current = {**recorded, "cai": "0.2.0"}
    monkeypatch.setattr(legacy, "CHANGED_STAGES", {})
    refuse_to_resume_other_run(Path("out"), recorded, current)
    monkeypatch.setattr(legacy, "CHANGED_STAGES", {"0.2.0": frozenset({"sample"})})
    assert differences(recorded, current) == []
    with pytest.raises(CaiError) as error:
        refuse_to_resume_other_run(Path("out"), recorded, current)
    assert error.value.code == "other-run"
    refuse_to_resume_other_run(Path("out"), current, current)


def test_the_stages_that_changed_exist() -> None:
    assert all(stages <= STAGES.keys() for stages in legacy.CHANGED_STAGES.values())


SAMPLE = sample_row(1)
ROUND = {"round": 1, "principle_id": "p", "critique": "c", "response": "r"}
REPLY = [Message(role="assistant", content="Match(")]


def sample(index: int = 0) -> Sample:
    return load_row(Sample, sample_row(1, index))


@pytest.mark.parametrize(
    ("value", "recorded"),
    [
        ((load_row(Prompt, {k: SAMPLE[k] for k in ("id", "prompt", "kind", "source")}), 1), 2233875975),
        (sample(), 3146155440),
        (load_row(Revision, {**SAMPLE, "history": [ROUND]}), 4277579023),
        (Pair(id="p", prompt=sample().prompt, a=sample(0).completion, b=REPLY, human=None, source=None), 511711949),
        (ReplyPair("p m:n", None, "m", "n", sample(0), sample(1)), 3605531083),
        (Attempt("id", 3, None, ("one", "two"), "How do"), 493182197),
    ],
    ids=lambda value: type(value).__name__,
)
def test_digests_are_those_that_the_old_version_recorded(value: object, recorded: int) -> None:
    assert legacy.repr_digest(value) == recorded
    assert item_digest(value) != recorded


def test_a_template_date_that_an_old_version_did_not_record_matters_only_to_an_unfinished_output(
    tmp_path: Path,
) -> None:
    old = {"stage": "sample", "cai": "0.1.0", "settings": {}, "model": {"fingerprint": "x"}}
    new = {**old, "cai": "0.2.0", "model": {"fingerprint": "x", "template_date": "2024-07-26"}}
    refuse_other_run(tmp_path, old, new)
    with pytest.raises(CaiError, match="template_date: not recorded -> 2024-07-26") as error:
        refuse_to_resume_other_run(tmp_path, old, new)
    assert error.value.code == "other-run"
    refuse_to_resume_other_run(tmp_path, new, new)
