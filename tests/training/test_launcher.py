"""Which configs of accelerate are known, and how a command line is passed on."""

from pathlib import Path

import pytest

from cai_cli.common.errors import CaiError, UsageError
from cai_cli.training import launcher


def test_the_configs_that_trl_ships_have_names_and_others_are_refused(tmp_path: Path) -> None:
    for name in ("multi_gpu", "fsdp2", "zero3"):
        assert launcher.config_path(name).is_file()
    (tmp_path / "mine.yaml").write_text("num_processes: 2\n")
    assert launcher.config_path(str(tmp_path / "mine.yaml")) == tmp_path / "mine.yaml"
    with pytest.raises(UsageError) as error:
        launcher.config_path("fsdp9")
    assert error.value.code == "invalid-option"


def test_deepspeed_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = launcher.find_spec
    monkeypatch.setattr(launcher, "find_spec", lambda name: None if name == "deepspeed" else find(name))
    with pytest.raises(CaiError) as error:
        launcher.launch("zero3", None)
    assert error.value.code == "missing-dependency"


def test_options_are_removed_from_a_command_line_in_both_spellings() -> None:
    given = ["sft", "in", "--accelerate-config", "fsdp2", "--lora", "--num-processes=4", "-o", "out"]
    assert launcher.without(given, ("--accelerate-config", "--num-processes")) == ["sft", "in", "--lora", "-o", "out"]
