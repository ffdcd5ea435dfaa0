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


def test_torchrun_starts_the_processes_of_one_machine_of_a_group() -> None:
    words = ["sft", "rows.jsonl", "-o", "out", "--num-processes", "4"]
    command = launcher.group_command(words, None, 4, launcher.Node(1, 2, "10.0.0.1", 29500))
    assert command[:2] == ["-m", "torch.distributed.run"]
    options = set(command[2 : command.index("cai_cli") - 1])
    assert options == {
        "--nnodes=2", "--node_rank=1", "--nproc_per_node=2", "--master_addr=10.0.0.1", "--master_port=29500"
    }  # fmt: skip
    assert command[command.index("cai_cli") :] == ["cai_cli", "sft", "rows.jsonl", "-o", "out", "--num-processes", "4"]


def test_accelerate_starts_the_processes_of_one_machine_and_reads_its_own_options() -> None:
    from accelerate.commands.launch import launch_command_parser

    words = ["sft", "rows.jsonl", "-o", "out", "--accelerate-config", "fsdp2"]
    command = launcher.group_command(words, "fsdp2", 16, launcher.Node(1, 2, "10.0.0.1", 29500))
    assert command[:2] == ["-m", "accelerate.commands.launch"]
    read = launch_command_parser().parse_args(command[2:])
    assert (read.num_processes, read.num_machines, read.machine_rank) == (16, 2, 1)
    assert (read.main_process_ip, read.main_process_port, read.module) == ("10.0.0.1", 29500, True)
    assert [read.training_script, *read.training_script_args] == [
        "cai_cli", "sft", "rows.jsonl", "-o", "out", "--num-processes", "16"
    ]  # fmt: skip


def test_the_number_of_processes_comes_from_the_option_or_the_config() -> None:
    assert launcher.group_size(None, None) == 1
    assert launcher.group_size("fsdp2", None) == 8
    assert launcher.group_size("fsdp2", 16) == 16
