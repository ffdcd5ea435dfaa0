"""`--accelerate-config` and `--num-processes` of the training stages: start anew through accelerate, and check that as
many processes run as were asked for."""

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from cai_cli.common.errors import CaiError, UsageError
from cai_cli.common.yaml import load_yaml
from cai_cli.training import distributed

AccelerateConfig = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE",
        help="Train in several processes through `accelerate launch`: a config that TRL ships (multi_gpu, fsdp2, zero3 "
        "...) or a file.",
    ),
]
NumProcesses = Annotated[
    int | None,
    typer.Option(
        min=1, help="How many processes train together, in place of the config's; any other number is refused."
    ),
]


def as_asked(accelerate_config: str | None, num_processes: int | None) -> None:
    """Returns in a process that is one of as many as were asked for; with a config not yet launched, does not return.

    Raises UsageError, CaiError.
    """
    if accelerate_config and distributed.launched():
        raise UsageError("--accelerate-config under a launcher: the processes are running already", hint="leave it out")
    if accelerate_config:
        _launch(accelerate_config, num_processes)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and os.environ.get("FSDP_STATE_DICT_TYPE") != "FULL_STATE_DICT":
        raise UsageError("FSDP must save whole weights", hint="fsdp_state_dict_type: FULL_STATE_DICT in the config")
    if num_processes not in (None, distributed.world_size()):
        raise CaiError(
            f"{num_processes} processes were asked for, {distributed.world_size()} are running",
            hint="on CPU accelerate starts one whatever it is told: torchrun --nproc_per_node N -m cai_cli ...",
        )


def _launch(config: str, num_processes: int | None) -> NoReturn:
    """Become `accelerate launch` of this very command line."""
    path = config_path(config)
    given: Any = load_yaml(path)
    if not isinstance(given, dict):
        raise UsageError(f"{path}: not a config of accelerate")
    if given.get("distributed_type") == "DEEPSPEED" and find_spec("deepspeed") is None:
        raise CaiError(f"--accelerate-config {config} needs DeepSpeed, which is not installed", "pip install deepspeed")
    count = num_processes or int(given.get("num_processes", 1))
    # The precision is ours (--dtype): a config's would be another than the manifest says.
    words = ["--config_file", str(path), "--num_processes", str(count), "--mixed_precision", "no", "--module"]
    own = [*without(sys.argv[1:], ("--accelerate-config", "--num-processes")), "--num-processes", str(count)]
    sys.stderr.flush()
    command = [sys.executable, "-m", "accelerate.commands.launch", *words, "cai_cli", *own]
    os.execv(sys.executable, command)  # noqa: S606 - words of our own, no shell  # nosec B606


def config_path(config: str) -> Path:
    """The file of an accelerate config: a file, or the name of one that TRL ships. Raises UsageError."""
    if Path(config).is_file():
        return Path(config)
    spec = find_spec("trl")
    shipped = Path(str(spec.origin)).parent / "accelerate_configs" if spec else Path()
    names = sorted(path.stem for path in shipped.glob("*.yaml"))
    if config not in names:
        raise UsageError(f"--accelerate-config {config}: no such file, nor a name", hint=f"known: {', '.join(names)}")
    return shipped / f"{config}.yaml"


def without(words: Sequence[str], options: Sequence[str]) -> list[str]:
    """A command line without these options (`--option VALUE`, `--option=VALUE`)."""
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        if word in options:
            next(rest, None)
        elif word.partition("=")[0] not in options:
            kept.append(word)
    return kept
