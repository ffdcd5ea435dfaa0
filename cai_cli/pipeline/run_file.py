"""The run file of `cai run`: its fields and how it is read."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cai_cli.cli import options
from cai_cli.common.errors import CaiError
from cai_cli.common.yaml import load_yaml
from cai_cli.pipeline.sweep import LONGEST_NAME, Value

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"  # of a run or a step: it becomes a file name


class RunFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=NAME, max_length=LONGEST_NAME)
    model: str = options.DEFAULT_MODEL
    seed: int = 0
    steps: dict[Annotated[str, Field(pattern=NAME)], dict[str, Value | list[Value]]] = Field(min_length=1)


def load_run(path: Path) -> RunFile:
    """Read and check a run file. Raises CaiError naming the file and the first thing that is wrong."""
    try:
        return RunFile.model_validate(load_yaml(path))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise CaiError(f"{path}: {'.'.join(str(p) for p in first['loc'])}: {first['msg']}") from None
