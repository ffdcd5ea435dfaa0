"""System prompts: one that states a constitution, and conversations that begin with one.

A model that reads the constitution with every prompt is a teacher; fine-tuning on its replies without the system prompt
is context distillation (Askell et al. 2021, arXiv 2112.00861).
"""

from collections.abc import Sequence

from cai_cli.common.errors import UsageError
from cai_cli.common.files import text_or_file
from cai_cli.constitution.schema import AnyConstitution, CritiquePrinciple, load
from cai_cli.data.schema import Message
from cai_cli.runtime.config import Effect, Group, Option, StageConfig, option

_CRITIQUE_OPENING = "Before you answer, check your reply by these questions. Give only a reply that needs no change."
_PREFERENCE_OPENING = "You follow these principles. Each says which of two replies is better; give the better reply."


def system_from(constitution: AnyConstitution) -> str:
    """The system prompt that states every principle of a constitution, in its order.

    Args:
        constitution: Of either kind: critique principles become questions to check a reply by, preference principles
            are stated as they are.
    """
    critique = constitution.kind == "critique-revision"
    texts = [p.critique if isinstance(p, CritiquePrinciple) else p.comparison for p in constitution.principles]
    numbered = "\n".join(f"{number}. {text.strip()}" for number, text in enumerate(texts, start=1))
    return f"{_CRITIQUE_OPENING if critique else _PREFERENCE_OPENING}\n\n{numbered}"


def with_system(conversation: Sequence[Message], system: str) -> list[Message]:
    """The conversation with a system prompt, which comes before the text of one that it has already."""
    if conversation and conversation[0].role == "system":
        system, conversation = f"{system}\n\n{conversation[0].content}", conversation[1:]
    return [Message(role="system", content=system), *conversation]


def own_system(conversation: Sequence[Message], added: str) -> str | None:
    """The system prompt that a conversation had before `with_system` added one; None where it had none."""
    return conversation[0].content.removeprefix(added).removeprefix("\n\n") or None


def without_system(conversation: Sequence[Message]) -> list[Message]:
    """The conversation without its system prompt, if it has one."""
    return [message for message in conversation if message.role != "system"]


class SystemOptions(StageConfig):
    """The system prompt that every conversation begins with."""

    system: str | None = option(
        None,
        "System prompt of every conversation: a text, or a file that holds one.",
        Option(group=Group.SAMPLING, metavar="TEXT|FILE", text_or_file=True),
    )
    system_from: str | None = option(
        None,
        "YAML file of principles, which become the system prompt of every conversation.",
        Option(Effect.HASHED, Group.SAMPLING, metavar="CONSTITUTION", reads_file=True),
    )

    def check(self) -> None:
        super().check()
        if self.system is not None and self.system_from is not None:
            raise UsageError("--system and --system-from exclude each other", code="option-conflict")

    def system_prompt(self) -> str | None:
        """The system prompt, or None where none is requested.

        Raises:
            UsageError: It is empty.
            CaiError: A file cannot be read.
        """
        if self.system_from is not None:
            return system_from(load(self.system_from))
        if self.system is None:
            return None
        text = text_or_file(self.system)
        if not text.strip():
            raise UsageError("--system is empty", code="invalid-option")
        return text
