"""The run file of `cai run`: its fields and how it is read."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cai_cli.common.errors import CaiError
from cai_cli.common.yaml import load_yaml
from cai_cli.pipeline.sweep import LONGEST_NAME, Value
from cai_cli.runtime.shared_options import DEFAULT_MODEL

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"  # of a run or a step, because it becomes a file name


class RunFile(BaseModel):
    """A run file.

    Attributes:
        name: Name of the run, and of its folder under runs/.
        model: Default model of the steps.
        seed: Default random seed of the steps.
        steps: Step name -> its command, its input and its options.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=NAME, max_length=LONGEST_NAME)
    model: str = DEFAULT_MODEL
    seed: int = 0
    steps: dict[Annotated[str, Field(pattern=NAME)], dict[str, Value | list[Value]]] = Field(min_length=1)


def load_run(path: Path) -> RunFile:
    """Read the run file at `path`.

    Raises:
        CaiError: It is not YAML, or a field is invalid; the message names the first one.
    """
    try:
        content = load_yaml(path)
        if not isinstance(content, dict):
            raise CaiError(f"{path}: not a run file: it has no `name` and `steps`", code="invalid-run-file")
        return RunFile.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CaiError(f"{path}: {where}: {first['msg']}", code="invalid-run-file") from None
