"""Reads YAML documents safely: size-limited, without aliases or repeated keys."""

from pathlib import Path
from typing import Any

import yaml

from cai_cli.common.errors import CaiError

MAX_YAML = 1 << 20  # characters; their parser takes far more memory than they do


def load_yaml(source: str | Path) -> Any:
    """The YAML document in a file of at most `MAX_YAML` characters. Raises CaiError."""
    try:
        with open(source, encoding="utf-8") as file:
            text = file.read(MAX_YAML + 1)
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a name that no file has
        raise CaiError(f"cannot read {source}: {error}") from error
    if len(text) > MAX_YAML:
        raise CaiError(f"{source}: longer than {MAX_YAML:,} characters", hint="is this a file of principles or a run?")
    return parse_yaml(text, str(source))


def parse_yaml(text: str, name: str) -> Any:
    """One YAML document, read with `PlainLoader`. Raises CaiError."""
    try:
        return yaml.load(text, Loader=PlainLoader)  # noqa: S506 - a SafeLoader without aliases  # nosec B506
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or a number that cannot be
        raise CaiError(f"{name}: not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise CaiError(f"{name}: nested too deeply") from error


class PlainLoader(yaml.SafeLoader):
    """Safe, and without aliases (nested ones grow to gigabytes from a few lines) or keys that stand twice (the first
    would be lost)."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, "aliases are not allowed here")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if names.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands twice", key.start_mark)
        return super().construct_mapping(node, deep)
