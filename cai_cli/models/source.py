"""The model that training starts from, as a training stage records it."""

from dataclasses import dataclass
from pathlib import Path

from cai_cli.models.chat_template import recorded_template, use_chat_template
from cai_cli.models.fingerprint import fingerprint
from cai_cli.models.license import stated_license
from cai_cli.models.names import public_name, resolve
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
        path = use_chat_template(resolve(name), chat_template)
        return cls(name, path, fingerprint(path))

    def identity(self) -> dict[str, str]:
        """What a manifest records of the model: what decides its weights and its prompts."""
        return {"fingerprint": self.fingerprint, **recorded_date(self.path), **recorded_template(self.path)}

    @property
    def public_name(self) -> str:
        """The name without folders, fit for publication."""
        return public_name(self.name)

    @property
    def license(self) -> str | None:
        """As `stated_license`."""
        return stated_license(self.path)
