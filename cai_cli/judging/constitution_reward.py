"""A constitution as the reward of `cai serve-reward`: the questions of `constitution_judge` about a single reply."""

from collections.abc import Sequence

from cai_cli.common.errors import RowError
from cai_cli.data.schema import Message, Prompt, conversation_id
from cai_cli.engines.base import RequestFailure
from cai_cli.judging.answer_cache import AnswerCache
from cai_cli.judging.constitution_judge import ConstitutionJudge, JudgedItem
from cai_cli.reward.server import Reward


class ConstitutionRewards:
    """A judge and its principles.

    Args:
        name: Name of the constitution, for messages.
        judge: The judge.
    """

    def __init__(self, name: str, judge: ConstitutionJudge) -> None:
        self.name, self.judge = name, judge

    def prepare(self, item: Sequence[Message] | list[int]) -> JudgedItem:
        """The prompt and the reply.

        Raises:
            RowError: Token ids, an empty reply, or a prompt that does not end with a user turn.
        """
        messages = [message for message in item if isinstance(message, Message)]
        if len(messages) < len(item):
            raise RowError("a judge takes conversations, not token ids", code="invalid-row")
        if len(messages) < 2 or not messages[-1].content.strip() or messages[-2].role != "user":
            raise RowError("a prompt and a reply with text are needed", code="invalid-row")
        *conversation, reply = messages
        prompt = Prompt(id=conversation_id(conversation), prompt=conversation)
        return JudgedItem(prompt, (reply.content.strip(),))

    def rewards(self, prepared: Sequence[JudgedItem]) -> list[Reward | RequestFailure]:
        """One reward for each conversation, in order; its parts are the log-odds under each principle."""
        self.judge.cache = AnswerCache()  # a server runs on, and seldom gets the same reply again
        return [
            parts if isinstance(parts, RequestFailure) else Reward(self.judge.mean(item.prompt, parts), parts)
            for item, parts in zip(prepared, self.judge.parts(prepared), strict=True)
        ]
