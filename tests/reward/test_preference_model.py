"""Scores depend on the conversation alone."""

from pathlib import Path

import pytest
from local_models import ROPE_LIMIT, model_dir
from tiny import tiny_model_dir

from cai_cli.common.errors import CaiError
from cai_cli.data.schema import Message
from cai_cli.models.loading import load_reward_model, load_tokenizer
from cai_cli.reward.packed_pairs import enable_packed_pairs
from cai_cli.reward.preference_model import encode_conversation, score_conversations


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("model") / "tiny")


def conversation(prompt: str, reply: str) -> list[Message]:
    return [Message(role="user", content=prompt), Message(role="assistant", content=reply)]


def test_white_space_around_a_reply_is_not_scored(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    plain, padded = (encode_conversation(tokenizer, conversation("hi", reply)) for reply in ("well", " \n well\n\n"))
    assert plain == padded


def test_a_score_depends_on_neither_batch_nor_neighbours(model: Path) -> None:
    pm, tokenizer = load_reward_model(model, new_head_seed=0), load_tokenizer(model)
    chats = [conversation("question " * n, "helpful " * (9 - n)) for n in range(1, 9)]
    alone = [score_conversations(pm, tokenizer, [chat])[0] for chat in chats]
    assert score_conversations(pm, tokenizer, chats, batch_size=3) == pytest.approx(alone, abs=1e-4)
    assert len(set(alone)) == len(alone)


def test_a_score_does_not_depend_on_neighbours_with_other_positions() -> None:
    path = model_dir("longrope")
    pm, tokenizer = load_reward_model(path, new_head_seed=0), load_tokenizer(path)
    chats = [conversation("question " * n, "helpful") for n in range(1, 12)]
    lengths = [len(encode_conversation(tokenizer, chat)) for chat in chats]
    assert min(lengths) < ROPE_LIMIT < max(lengths)
    alone = [score_conversations(pm, tokenizer, [chat])[0] for chat in chats]
    assert score_conversations(pm, tokenizer, chats, batch_size=11) == pytest.approx(alone, abs=1e-4)
    longest = ([*range(3, 3 + ROPE_LIMIT + 1)], [3, 4, 5])
    assert not enable_packed_pairs(pm, longest)
    assert enable_packed_pairs(pm, (longest[0][:ROPE_LIMIT], [3, 4, 5]))


def test_a_conversation_beyond_the_window_is_an_error_with_both_numbers(model: Path) -> None:
    pm, tokenizer = load_reward_model(model, new_head_seed=0), load_tokenizer(model)
    with pytest.raises(CaiError, match=r"tokens does not fit .* window of 512") as error:
        score_conversations(pm, tokenizer, [conversation("hi", "word " * 600)])
    assert error.value.code == "too-long"
