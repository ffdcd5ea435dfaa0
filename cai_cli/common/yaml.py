"""Reads YAML documents safely: size-limited, without aliases or repeated keys."""

from pathlib import Path
from typing import Any

import yaml

from cai_cli.common.errors import CaiError

MAX_YAML = 1 << 20  # characters; the parser needs far more memory than the text


def load_yaml(source: str | Path) -> Any:
    """The YAML document in a file of at most `MAX_YAML` characters.

    Raises:
        CaiError: The file cannot be read (`cannot-read`), or is too long or not valid YAML (`invalid-yaml`).
    """
    try:
        with open(source, encoding="utf-8") as file:
            text = file.read(MAX_YAML + 1)
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or not a valid file name
        why = (isinstance(error, OSError) and error.strerror) or error
        raise CaiError(f"cannot read {source}: {why}", code="cannot-read") from error
    if len(text) > MAX_YAML:
        raise CaiError(
            f"{source}: longer than {MAX_YAML:,} characters",
            hint="is this a constitution or a run file?",
            code="invalid-yaml",
        )
    return parse_yaml(text, str(source))


def parse_yaml(text: str, name: str) -> Any:
    """One YAML document, read with `PlainLoader`; `name` names it in errors.

    Raises:
        CaiError: The text is not valid YAML (`invalid-yaml`).
    """
    try:
        return yaml.load(text, Loader=PlainLoader)  # noqa: S506 - a SafeLoader without aliases  # nosec B506
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date or number
        raise CaiError(f"{name}: not YAML: {' '.join(str(error).split())}", code="invalid-yaml") from error
    except RecursionError as error:
        raise CaiError(f"{name}: nested too deeply", code="invalid-yaml") from error


class PlainLoader(yaml.SafeLoader):
    """A SafeLoader that refuses aliases, which expand a few lines to gigabytes, and repeated keys in one mapping."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, "aliases are not allowed here")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if names.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} occurs twice", key.start_mark)
        return super().construct_mapping(node, deep)
