"""Batches and loss of preference model training."""

import math
from pathlib import Path

import pytest
from tiny import tiny_model_dir

from cai_cli.models.loading import load_reward_model, load_tokenizer
from cai_cli.phase2_feedback.pm_trainer import by_length, soft_reward_trainer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("model") / "tiny")


def test_every_epoch_has_every_pair_once_in_a_new_order_with_similar_lengths() -> None:
    lengths = [(i * 37) % 101 for i in range(203)]
    orders = [by_length(lengths, 4, seed=0, epoch=epoch) for epoch in (0, 1)]
    assert [sorted(order) for order in orders] == [list(range(203))] * 2
    assert orders[0] != orders[1]
    assert orders[0] == by_length(lengths, 4, seed=0, epoch=0) != by_length(lengths, 4, seed=1, epoch=0)
    batches = [orders[0][i : i + 4] for i in range(0, 200, 4)]
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches]
    assert sum(spread) / len(spread) < 10  # of 60 where they are drawn at random
    means = [sum(lengths[i] for i in batch) / 4 for batch in batches]
    assert abs(sum(means[:25]) - sum(means[25:])) / 25 < 30  # of 50 where the long ones come first


def test_the_loss_is_the_soft_cross_entropy(model: Path, tmp_path: Path) -> None:
    import torch
    from datasets import Dataset
    from trl import RewardConfig

    pm, tokenizer = load_reward_model(model, new_head_seed=3), load_tokenizer(model)
    row = {"chosen_ids": [5, 6, 7], "rejected_ids": [8, 9], "p_chosen": 0.8}
    config = RewardConfig(
        str(tmp_path), max_length=None, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = soft_reward_trainer(share_prompts=False)(
        model=pm, args=config, processing_class=tokenizer, train_dataset=Dataset.from_list([row])
    )
    (batch,) = trainer.get_train_dataloader()
    with torch.no_grad():
        chosen, rejected = (float(pm(input_ids=torch.tensor([row[k]])).logits) for k in ("chosen_ids", "rejected_ids"))
        loss = float(trainer.compute_loss(pm, batch))
    p = 1 / (1 + math.exp(rejected - chosen))
    assert abs(p - 0.5) > 0.01
    assert loss == pytest.approx(-0.8 * math.log(p) - 0.2 * math.log(1 - p), abs=1e-5)
