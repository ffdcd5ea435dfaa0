"""The model that training starts from, as a training stage records it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from cai_cli.common.errors import CaiError
from cai_cli.common.yaml import parse_yaml
from cai_cli.models.chat_template import recorded_template, use_chat_template
from cai_cli.models.template_date import recorded_date


@dataclass(frozen=True)
class ModelSource:
    """The model that training starts from.

    Attributes:
        name: Its name as given on the command line.
        path: Its directory.
        fingerprint: The hash of its content.
    """

    name: str
    path: Path
    fingerprint: str

    @classmethod
    def resolve(cls, name: str, chat_template: str | None = None) -> "ModelSource":
        """The model of this name, which is fetched first if necessary.

        Args:
            name: Its name.
            chat_template: The file of a chat template for it (`use_chat_template`).

        Raises:
            CaiError: As `names.resolve`.
            UsageError: The template cannot be read.
        """
        from cai_cli.models.fingerprint import fingerprint
        from cai_cli.models.names import resolve

        path = use_chat_template(resolve(name), chat_template)
        return cls(name, path, fingerprint(path))

    def identity(self) -> dict[str, str]:
        """What a manifest records of the model: what decides its weights and its prompts."""
        return {"fingerprint": self.fingerprint, **recorded_date(self.path), **recorded_template(self.path)}

    @property
    def public_name(self) -> str:
        """The name without folders, fit for publication."""
        from cai_cli.models.names import public_name

        return public_name(self.name)

    @property
    def license(self) -> str | None:
        """As `stated_license`."""
        return stated_license(self.path)


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
