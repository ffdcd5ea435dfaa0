"""Incomplete checkpoints are not used."""

from pathlib import Path

from cai_cli.training.checkpoints import newest_checkpoint


def test_without_a_complete_checkpoint_there_is_none(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5/trainer_state.json").write_text("{}")
    assert newest_checkpoint(tmp_path) is None
    assert not (tmp_path / "checkpoint-5").exists()
