"""A score that is the mean over the reply's tokens, at any layer, in every way to compute it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import CHATML, tiny_model_dir

from cai_cli.common.errors import CaiError, RowError, UsageError
from cai_cli.data.schema import Message
from cai_cli.models.loading import load_reward_model, load_tokenizer, reading_of
from cai_cli.models.reading import RECORD, ReadAt, Reading, record_place, reply_header
from cai_cli.reward.packed_pairs import enable_packed_pairs, score_pairs
from cai_cli.reward.preference_model import encode_conversation, score_conversations, score_ids
from cai_cli.reward.preference_model_reward import PreferenceModelRewards
from cai_cli.reward.scorer import Scorer
from cai_cli.training.quiet import quiet_libraries

MEAN = ReadAt.MEAN_OVER_REPLY


def conversation(prompt: str, *turns: str) -> list[Message]:
    roles = ("assistant", "user")
    return [
        Message(role="user", content=prompt),
        *(Message(role=roles[i % 2], content=text) for i, text in enumerate(turns)),  # type: ignore[arg-type]
    ]


CHATS = [
    conversation("Name a fruit.", "A pear."),
    conversation("Name a fruit.", "A stone is what I would name if you asked me once more."),
    conversation("Hi", "Hello.", "Name a town, please.", "Bern, which is a town in the middle of a country."),
    conversation("Hi", "Hello.", "Name a town, please.", ""),
]


def saved_model(folder: Path, layer: int | None = None) -> Path:
    """A tiny preference model with a random head that is read as the mean over the reply."""
    base = tiny_model_dir(folder / "tiny")
    with quiet_libraries():
        load_reward_model(base, new_head_seed=0).save_pretrained(folder / "pm")
        load_tokenizer(base).save_pretrained(folder / "pm")
    record_place(folder / "pm", reading=Reading(MEAN, layer=layer))
    return folder / "pm"


def expected_scores(path: Path, chats: Sequence[Sequence[Message]], layer: int | None) -> list[float]:
    """The mean of the head's outputs at the tokens of the reply, by transformers' own hidden states."""
    import torch
    from transformers import AutoModelForSequenceClassification

    tokenizer, scores = load_tokenizer(path), []
    with quiet_libraries(), torch.inference_mode():
        model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
        for chat in chats:
            ids = encode_conversation(tokenizer, chat, Reading())
            start = ids.index(tokenizer.convert_tokens_to_ids("<|im_start|>"), 0)
            starts = [i for i, token in enumerate(ids) if token == ids[start]]
            begin = len(ids) - len(tokenizer(chat[-1].content, add_special_tokens=False)["input_ids"]) - 1
            assert starts[-1] < begin
            hidden = model.base_model(torch.tensor([ids]), output_hidden_states=True).hidden_states
            scores.append(float(model.score(hidden[layer or -1][0, begin : len(ids) - 1 or None][: max(1, len(ids))]).mean()
                          if begin < len(ids) - 1 else model.score(hidden[layer or -1][0, -1])))
    return scores


@pytest.mark.parametrize("layer", [None, 1])
def test_a_score_is_the_mean_of_the_head_over_the_reply(tmp_path: Path, layer: int | None) -> None:
    path = saved_model(tmp_path, layer)
    model, tokenizer = load_reward_model(path), load_tokenizer(path)
    expected = expected_scores(path, CHATS, layer)
    assert score_conversations(model, tokenizer, CHATS, batch_size=4) == pytest.approx(expected, abs=1e-4)
    assert score_conversations(model, tokenizer, CHATS, batch_size=1) == pytest.approx(expected, abs=1e-4)
    assert len(set(expected)) == len(expected)
