"""Incomplete checkpoints are not used."""

import json
import warnings
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import preference, revision, stage, write_rows
from tiny import tiny_model_dir

from cai_cli.common.errors import CaiError
from cai_cli.training import checkpoints
from cai_cli.training.checkpoints import newest_checkpoint


def test_without_a_complete_checkpoint_there_is_none(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5/trainer_state.json").write_text("{}")
    assert newest_checkpoint(tmp_path) is None
    assert not (tmp_path / "checkpoint-5").exists()


def test_a_warning_of_a_library_that_merges_adapters_is_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def merging(_: Any) -> None:
        warnings.warn("deprecated", FutureWarning, stacklevel=1)

    monkeypatch.setattr(checkpoints, "finished_model", merging)
    monkeypatch.setattr(checkpoints, "save_model", lambda *_: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer = SimpleNamespace(model=None, accelerator=SimpleNamespace(unwrap_model=lambda model: model))
        checkpoints.save_finished(trainer, None, tmp_path)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["sft", "train-pm", "dpo"])
def test_what_cannot_be_saved_is_refused_before_the_first_step(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model_dir(tmp_path / "tiny")
    rows = write_rows(tmp_path / "rows.jsonl", [(revision if name == "sft" else preference)(i) for i in range(4)])
    Usage = namedtuple("Usage", "free")
    with monkeypatch.context() as patched:
        patched.setattr("shutil.disk_usage", lambda _: Usage(1000))
        with pytest.raises(CaiError, match="GB are free") as error:
            stage(name)(rows, tmp_path / "out", model=str(model), max_steps=1, eval_share=0.0)
    assert error.value.code == "cannot-write"

    def refuse(*_: object, **__: object) -> None:
        raise ValueError("a template\nwithout a name")

    with monkeypatch.context() as patched:
        patched.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", refuse)
        patched.setattr("transformers.Trainer.training_step", lambda *_: pytest.fail("a step was trained"))
        with pytest.raises(CaiError, match="could not be saved after training: a template without a name") as error:
            stage(name)(rows, tmp_path / "out", model=str(model), max_steps=1, eval_share=0.0)
    assert error.value.code == "invalid-model"
    stage(name)(rows, tmp_path / "out", model=str(model), max_steps=1, eval_share=0.0)
    assert (tmp_path / "out/config.json").exists()


def test_a_generation_config_that_transformers_would_not_save_is_mended(tmp_path: Path) -> None:
    model = tiny_model_dir(tmp_path / "tiny")
    config = json.loads((model / "generation_config.json").read_text()) | {"do_sample": False, "temperature": 0.6}
    (model / "generation_config.json").write_text(json.dumps(config))
    rows = write_rows(tmp_path / "rows.jsonl", [revision(i) for i in range(4)])
    stage("sft")(rows, tmp_path / "out", model=str(model), max_steps=1, eval_share=0.0)
    saved = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert (saved["do_sample"], saved["temperature"]) == (True, 0.6)


def test_a_start_model_that_is_kept_says_that_there_is_no_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from cai_cli.models.loading import load_tokenizer

    base = tiny_model_dir(tmp_path / "tiny")
    for keep in (False, True):
        checkpoints.save_start_model(base, load_tokenizer(base), tmp_path / f"model{keep}", keep_adapter=keep)
        assert ("--keep-adapter" in capsys.readouterr().err) is keep
        assert not (tmp_path / f"model{keep}/adapter").exists()
