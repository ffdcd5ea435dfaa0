"""A score that is the mean over the reply's tokens, at any layer, in every way to compute it."""

from pathlib import Path

import pytest
from tiny import tiny_model_dir

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


def expected_scores(path: Path, layer: int | None) -> list[float]:
    """The mean of the head's outputs at the tokens of each reply of CHATS, by transformers' own hidden states."""
    import torch
    from transformers import AutoModelForSequenceClassification

    tokenizer, scores = load_tokenizer(path), []
    with quiet_libraries(), torch.inference_mode():
        model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
        for chat in CHATS:
            ids = encode_conversation(tokenizer, chat, Reading())
            size = len(tokenizer(chat[-1].content, add_special_tokens=False)["input_ids"])
            hidden = model.base_model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer or -1][0]
            scores.append(float(model.score(hidden[-1 - size : -1] if size else hidden[-1:]).mean()))
    return scores


@pytest.mark.parametrize("layer", [None, 1])
def test_a_score_is_the_mean_of_the_head_over_the_reply(tmp_path: Path, layer: int | None) -> None:
    path = saved_model(tmp_path, layer)
    model, tokenizer = load_reward_model(path), load_tokenizer(path)
    expected = expected_scores(path, layer)
    for batch_size in (1, 4):
        assert score_conversations(model, tokenizer, CHATS, batch_size) == pytest.approx(expected, abs=1e-4)
    assert len(set(expected)) == len(expected)
    ids = [encode_conversation(tokenizer, chat, model.reading) for chat in CHATS]
    pairs = [(ids[0], ids[1]), (ids[3], ids[2])]  # the replies of the first begin with the same token, one is empty
    assert enable_packed_pairs(model, pairs[0])
    first, second = score_pairs(model, pairs, 2)
    assert [*first, *second] == pytest.approx([expected[i] for i in (0, 3, 1, 2)], abs=1e-4)
    assert score_ids(model, tokenizer, ids, 4) == pytest.approx(expected, abs=1e-4)


def test_the_layers_above_the_one_that_is_read_do_not_run(tmp_path: Path) -> None:
    path, ran = saved_model(tmp_path, 1), list[int]()
    model, tokenizer = load_reward_model(path), load_tokenizer(path)
    for number, layer in enumerate(model.base_model.layers, 1):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    score_conversations(model, tokenizer, CHATS, batch_size=4)
    assert ran == [1]
    assert len(model.base_model.layers) > 1


def test_a_server_of_rewards_finds_the_reply_in_messages_and_token_ids_and_refuses_others(tmp_path: Path) -> None:
    path = saved_model(tmp_path)
    rewards = PreferenceModelRewards(str(path), "cpu", 4)
    prepared = [rewards.prepare(chat) for chat in CHATS]
    assert [rewards.prepare(ids) for ids in prepared] == prepared
    values = [reward.value for reward in rewards.rewards(prepared)]  # type: ignore[union-attr]
    assert values == pytest.approx(expected_scores(path, None), abs=1e-4)
    with pytest.raises(RowError, match="where the reply begins"):
        rewards.prepare(prepared[0][-3:])


@pytest.mark.parametrize("reading", [Reading(MEAN), Reading(layer=1)])
def test_the_address_of_a_server_of_classifiers_is_refused(tmp_path: Path, reading: Reading) -> None:
    path = saved_model(tmp_path)
    record_place(path, reading=reading)
    with pytest.raises(UsageError, match="--pm-url") as refused:
        Scorer(str(path), None, "cpu", url="http://localhost:1/classify")
    assert refused.value.code == "option-conflict"
    Scorer("server:pm", None, "cpu", url="http://localhost:1/classify").close()


def test_a_reply_begins_after_the_header_of_its_turn_and_before_its_thoughts(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_model_dir(tmp_path / "tiny"))
    assert tokenizer.decode(reply_header(tokenizer)) == "<|im_start|>assistant\n"
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n<think>\n\n</think>\n\n' + m['content'] }}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
    )
    assert tokenizer.decode(reply_header(tokenizer)) == "<|im_start|>assistant\n"
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n\n' }}{% endfor %}"
    plain = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] }}{% endfor %}<|im_end|>"
    for template in (tokenizer.chat_template, None, "{{ raise_exception('no') }}", f"<|im_start|>{plain}"):
        tokenizer.chat_template = template
        with pytest.raises(CaiError) as refused:
            reply_header(tokenizer)
        assert refused.value.code == "no-reply-start"


@pytest.mark.parametrize(
    "record", ['{"read_at": "mean-over-reply", "layer": 0}', '{"read_at": "mean-over-reply", "layer": "2"}']
)
def test_a_record_with_an_invalid_layer_is_an_error(tmp_path: Path, record: str) -> None:
    path = saved_model(tmp_path)
    (path / RECORD).write_text(record)
    with pytest.raises(CaiError) as refused:
        reading_of(path)
    assert refused.value.code == "invalid-model"


def test_a_layer_that_the_model_does_not_have_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CaiError) as refused:
        load_reward_model(saved_model(tmp_path, layer=99))
    assert refused.value.code == "invalid-layer"
