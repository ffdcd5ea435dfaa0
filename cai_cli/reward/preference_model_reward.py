"""A preference model as the reward of `cai serve-reward`."""

from collections.abc import Sequence

from cai_cli.common.errors import RowError
from cai_cli.data.schema import Message
from cai_cli.engines.base import RequestFailure
from cai_cli.models.loading import context_window, pick_device
from cai_cli.models.source import ModelSource
from cai_cli.reward.preference_model import NO_REPLY_START, encode_conversation, open_for_scores, score_ids
from cai_cli.reward.server import Reward


class PreferenceModelRewards:
    """A preference model, loaded at once. A reward is its score (a logit).

    Args:
        name: Name or path of the model.
        device: Device, or "auto".
        batch_size: Conversations in one forward pass.
    """

    def __init__(self, name: str, device: str, batch_size: int) -> None:
        self.name, self.batch_size = name, batch_size
        self.model, self.tokenizer = open_for_scores(ModelSource.resolve(name).path, pick_device(device))
        self.window = context_window(self.model.config, self.tokenizer)

    def prepare(self, item: Sequence[Message] | list[int]) -> list[int]:
        """The token ids of a conversation, or the given ones. Raises RowError where they do not fit the model."""
        if isinstance(item[0], Message):
            ids = encode_conversation(self.tokenizer, [m for m in item if isinstance(m, Message)], self.model.reading)
        else:
            ids = [token for token in item if isinstance(token, int)]
            vocabulary = self.model.get_input_embeddings().weight.shape[0]
            if not all(0 <= token < vocabulary for token in ids):
                raise RowError(f"a token id is not in the vocabulary of {vocabulary:,}", code="invalid-row")
            if not self.model.reading.finds_reply(ids):
                raise RowError(NO_REPLY_START, code="invalid-row")
        if len(ids) > self.window:
            raise RowError(f"longer than the preference model's window of {self.window:,} tokens", code="too-long")
        return ids

    def rewards(self, prepared: Sequence[list[int]]) -> list[Reward | RequestFailure]:
        """One reward for each conversation, in order. Raises CaiError where a score is not finite."""
        return [Reward(score) for score in score_ids(self.model, self.tokenizer, prepared, self.batch_size)]
