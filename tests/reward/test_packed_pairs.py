from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model_dir

from cai_cli.common.errors import CaiError
from cai_cli.models.loading import load_reward_model
from cai_cli.reward.packed_pairs import collate, enable_packed_pairs, packed, score_pairs

IDS = st.lists(st.integers(0, 400), min_size=1, max_size=30)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    return load_reward_model(tiny_model_dir(tmp_path_factory.mktemp("model") / "tiny"), new_head_seed=0)


def alone(model, ids: list[int]) -> float:
    import torch

    with torch.inference_mode():
        return float(model.score(model.base_model(torch.tensor([ids])).last_hidden_state[0, -1]))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.lists(st.integers(0, 400), max_size=30), IDS, IDS), min_size=1, max_size=4))
def test_packed_pairs_score_as_their_conversations_alone(model, parts) -> None:
    # id 0 is the padding token: it may occur anywhere, also at the end
    pairs = [([1, *prompt, *a], [1, *prompt, *b]) for prompt, a, b in parts]
    assert enable_packed_pairs(model, pairs[0])
    first, second = score_pairs(model, pairs, batch_size=3)
    assert first == pytest.approx([alone(model, a) for a, _ in pairs], abs=1e-4)
    assert second == pytest.approx([alone(model, b) for _, b in pairs], abs=1e-4)


def test_a_shared_prompt_occurs_once_and_every_token_has_its_own_position() -> None:
    pair = packed([1, 2, 3, 4], [1, 2, 5])
    assert pair == {
        "input_ids": [1, 2, 3, 4, 5],
        "position_ids": [0, 1, 2, 3, 2],
        "branches": [0, 0, 1, 1, 2],
    }
    assert packed([1, 2], [1, 2, 3])["branches"] == [0, 1, 2, 2]  # each branch keeps a token of its own


def test_the_gradient_equals_that_of_the_two_conversations_alone(model) -> None:
    import torch

    pair = ([1, 7, 8, 9, 30], [1, 7, 8, 20])
    assert enable_packed_pairs(model, pair)
    gradients = []
    for packs in (True, False):
        model.zero_grad()
        if packs:
            a, b = model(**collate([packed(*pair)], 0)).logits[:, 0]
        else:
            a, b = (model(torch.tensor([ids])).logits[0, 0] for ids in pair)
        torch.nn.functional.logsigmoid(a - b).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert float((gradients[0] - gradients[1]).abs().max()) < 1e-5 * max(1.0, float(gradients[1].abs().max()))


def test_a_model_with_sliding_window_attention_is_left_unchanged(tmp_path: Path) -> None:
    import torch
    from transformers import MistralConfig, MistralForSequenceClassification

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_labels=1, pad_token_id=0, sliding_window=4, initializer_range=0.5,
    )  # fmt: skip
    model = MistralForSequenceClassification(config).eval()
    long = (list(range(1, 30)), [*range(1, 20), 40, 41])
    assert not enable_packed_pairs(model, long)
    assert "forward" not in vars(model)


def test_a_score_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    broken = load_reward_model(tiny_model_dir(tmp_path / "tiny"), new_head_seed=0)
    pair = ([1, 2, 3], [1, 2, 4])
    assert enable_packed_pairs(broken, pair)
    broken.score.weight.data.fill_(float("nan"))
    with pytest.raises(CaiError) as error:
        score_pairs(broken, [pair], 1)
    assert error.value.code == "not-finite"
