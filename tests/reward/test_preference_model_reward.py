"""A preference model as the rewards of `cai serve-reward`."""

from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model_dir

from cai_cli.common.errors import RowError
from cai_cli.data.schema import Message
from cai_cli.models.loading import load_reward_model, load_tokenizer
from cai_cli.reward.preference_model import encode_conversation, score_conversations
from cai_cli.reward.preference_model_reward import PreferenceModelRewards


def test_served_rewards_are_the_scores_of_conversations_and_of_their_token_ids(tmp_path: Path) -> None:
    path = tiny_model_dir(tmp_path / "pm")
    load_reward_model(path, new_head_seed=0).save_pretrained(path)
    served: Any = PreferenceModelRewards(str(path), "cpu", 2)
    replies = ("Hello.", "<|im_end|> is text here", "x" * 50)
    chats = [[Message(role="user", content="Hi"), Message(role="assistant", content=text)] for text in replies]
    model, tokenizer = load_reward_model(path), load_tokenizer(path)
    expected = score_conversations(model, tokenizer, chats)
    ids = [encode_conversation(tokenizer, chat, model.reading) for chat in chats]
    for items in (chats, ids):
        rewards = served.rewards([served.prepare(item) for item in items])
        assert [reward.value for reward in rewards] == pytest.approx(expected, abs=1e-5)
    for wrong in ([1] * 513, [99_999], [-1]):
        with pytest.raises(RowError):
            served.prepare(wrong)
