"""A constitution as the reward of `cai serve-reward`, from a judge's log-probabilities of a single reply.

Departure: the paper's reward is a preference model. Here, for each principle, the reward is the log-probability of the
reply under "follow the principle" minus that under "break the principle" (the method `contrast`), averaged over the
principles. It grows with the length of a reply, so training needs a KL term and a limit on length.
"""

import math
from collections.abc import Sequence

from cai_cli.common.errors import RowError
from cai_cli.constitution.schema import PreferencePrinciple
from cai_cli.data.schema import Message
from cai_cli.engines.base import Engine, LogprobRequest, RequestFailure
from cai_cli.prompting.base import PromptFormat
from cai_cli.prompting.comparison import contrast_requests
from cai_cli.reward.server import Reward


class ConstitutionRewards:
    """A judge and its principles.

    Args:
        name: Name of the constitution, for messages.
        engine: The judge.
        principles: The principles.
        form: How prompts are built.
    """

    def __init__(
        self, name: str, engine: Engine, principles: Sequence[PreferencePrinciple], form: PromptFormat
    ) -> None:
        self.name, self.engine, self.principles, self.form = name, engine, principles, form

    def prepare(self, item: Sequence[Message] | list[int]) -> list[Message]:
        """The conversation. Raises RowError for token ids and an empty reply."""
        messages = [message for message in item if isinstance(message, Message)]
        if len(messages) < len(item):
            raise RowError("a judge takes conversations, not token ids", code="invalid-row")
        if len(messages) < 2 or not messages[-1].content.strip():
            raise RowError("a prompt and a reply with text are needed", code="invalid-row")
        return messages

    def rewards(self, prepared: Sequence[list[Message]]) -> list[Reward | RequestFailure]:
        """One reward for each conversation, in order; its parts are the log-odds under each principle."""
        requests = [
            LogprobRequest(prompt.text, (reply.content.strip(),), prompt.prefill)
            for *conversation, reply in prepared
            for principle in self.principles
            for prompt in contrast_requests(conversation, principle, self.form)
        ]
        answers = iter(self.engine.option_logprobs(requests))
        return [self._reward([(next(answers), next(answers)) for _ in self.principles]) for _ in prepared]

    def _reward(
        self, answers: Sequence[tuple[list[float] | RequestFailure, list[float] | RequestFailure]]
    ) -> Reward | RequestFailure:
        parts: dict[str, float] = {}
        for principle, (following, breaking) in zip(self.principles, answers, strict=True):
            if isinstance(following, RequestFailure):
                return following
            if isinstance(breaking, RequestFailure):
                return breaking
            parts[principle.id] = following[0] - breaking[0]
        return Reward(math.fsum(parts.values()) / len(parts), parts)
