"""The license that a model states."""

from pathlib import Path
from typing import Any

import orjson

from cai_cli.common.errors import CaiError
from cai_cli.common.yaml import parse_yaml


def stated_license(path: Path) -> str | None:
    """The license in a model's `source.json` or card, in lower case; None if neither states one."""
    source, card = path / "source.json", path / "README.md"
    head: Any = None
    try:
        if source.is_file():
            head = orjson.loads(source.read_bytes())
        elif card.is_file():
            parts = card.read_text(encoding="utf-8").split("---\n", 2)
            head = parse_yaml(parts[1], str(card)) if len(parts) == 3 and not parts[0] else None
    except (CaiError, ValueError):
        return None
    stated = head.get("license") if isinstance(head, dict) else None
    return stated.lower() if isinstance(stated, str) else None
