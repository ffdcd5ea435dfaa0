"""Batches and loss of preference model training."""

import math
from pathlib import Path

import pytest
from tiny import tiny_model_dir

from cai_cli.models.loading import load_reward_model, load_tokenizer
from cai_cli.phase2_feedback.pm_trainer import soft_reward_trainer
from cai_cli.reward.packed_pairs import enable_packed_pairs
from cai_cli.reward.preference_model import score_ids
from cai_cli.training.quiet import quiet_libraries


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("model") / "tiny")


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


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("share_prompts", [False, True])
def test_training_reads_where_scoring_reads_and_sees_the_end_of_turn_that_is_also_the_padding(
    model: Path, tmp_path: Path, share_prompts: bool, lora: bool
) -> None:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from trl import RewardConfig

    pm, tokenizer = load_reward_model(model, new_head_seed=3), load_tokenizer(model)
    tokenizer.pad_token = tokenizer.eos_token
    closed = [[5, 6, *range(10, 10 + n), tokenizer.eos_token_id] for n in range(1, 5)]
    rows = [{"chosen_ids": ids, "rejected_ids": ids[:-1], "p_chosen": 1.0} for ids in closed]
    if share_prompts:
        assert enable_packed_pairs(pm, (closed[-1], closed[-1][:-1]))
    config = RewardConfig(
        str(tmp_path), max_length=None, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
        dataloader_pin_memory=False, per_device_train_batch_size=4, max_steps=20, learning_rate=1e-2,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    adapters = LoraConfig(r=4, target_modules="all-linear", exclude_modules=["score"], modules_to_save=["score"])
    with quiet_libraries():
        trainer = soft_reward_trainer(share_prompts=share_prompts)(
            model=pm, args=config, processing_class=tokenizer, train_dataset=Dataset.from_list(rows),
            peft_config=adapters if lora else None,
        )  # fmt: skip
        (batch,) = trainer.get_train_dataloader()
        trainer.train()
    chosen, rejected = (score_ids(pm, tokenizer, ids, 3) for ids in (closed, [ids[:-1] for ids in closed]))
    assert min(one - other for one, other in zip(chosen, rejected, strict=True)) > 1
    with torch.inference_mode():
        del batch["p_chosen"]
        trained = trainer.model.eval()(**batch).logits[:, 0].tolist()
    assert sorted(trained) == pytest.approx(sorted([*chosen, *rejected]), abs=1e-4)
