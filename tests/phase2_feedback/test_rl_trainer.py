"""Replies are sampled with the logits that training computes for them."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import rows_in
from thinking_models import OPENED, thinking_model_dir
from tiny import tiny_model_dir

from cai_cli.data.schema import Message, Prompt
from cai_cli.engines.local import engine
from cai_cli.models.loading import load_reward_model, load_tokenizer
from cai_cli.phase2_feedback.reward_normalizer import RewardNormalizer
from cai_cli.phase2_feedback.rl import RlInputs, rl
from cai_cli.phase2_feedback.rl_config import RlConfig
from cai_cli.phase2_feedback.rl_rewards import RewardFunction, preference_source
from cai_cli.phase2_feedback.rl_trainer import SamplingDifference
from cai_cli.reward.scorer import Scorer


def policy_and_pm(folder: Path) -> tuple[Path, Path]:
    model = tiny_model_dir(folder / "tiny")
    load_reward_model(model, new_head_seed=0).save_pretrained(folder / "pm")
    load_tokenizer(model).save_pretrained(folder / "pm")
    return model, folder / "pm"


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
@pytest.mark.parametrize("lora", [False, True])
def test_in_bfloat16_replies_are_sampled_with_the_dtype_and_the_values_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: bool, algorithm: str
) -> None:
    model, pm = policy_and_pm(tmp_path)
    prompts = [Prompt(id=f"p{i}", prompt=[Message(role="user", content=f"question number {i}")]) for i in range(6)]
    config = RlConfig(
        input="-", output=str(tmp_path / "out"), model=str(model), pm=str(pm), lora=lora, algorithm=algorithm,
        steps=2, prompts_per_step=2, samples_per_prompt=4, batch_size=4, max_new_tokens=12, device="cpu", learning_rate=1e-3,
    )  # fmt: skip
    products: list[torch.dtype] = []
    draw = engine.draw

    def watched(logits: torch.Tensor, *rest: Any) -> torch.Tensor:
        products.append(torch.mm(torch.ones(1, 1), torch.ones(1, 1)).dtype)
        return draw(logits, *rest)

    monkeypatch.setattr(engine, "draw", watched)
    (tmp_path / "work").mkdir()
    inputs = RlInputs(model, Scorer(str(pm), None, "cpu"), prompts[:4], prompts[4:], None)
    rl(inputs, config, replace(config.training_config(), dtype="bfloat16"), tmp_path / "work")
    assert set(products) == {torch.bfloat16}  # of every step: in the checks, and of the replies that are trained on
    for row in rows_in(tmp_path / "work/metrics.jsonl")[1:]:
        # Sampled in float32 and trained in bfloat16, as adapters once were, the maximum is 1.04 to 1.06.
        assert row["sampling_logp_difference"] < 1e-3
        assert row["importance_ratio_max"] == pytest.approx(1, abs=1e-2)


def test_the_difference_is_over_the_tokens_of_replies_since_the_last_log() -> None:
    difference = SamplingDifference()
    assert difference.take() == {}
    sampled = torch.tensor([[-1.0, -2.0, 0.0]])
    difference.add(sampled + torch.tensor([[0.5, 0.0, 9.0]]), sampled, torch.tensor([[1, 1, 0]]))
    difference.add(sampled - 0.25, sampled, torch.tensor([[1, 0, 0]]))
    logged = difference.take()
    assert logged["sampling_logp_difference"] == pytest.approx(0.25)
    assert logged["importance_ratio_max"] == pytest.approx(math.exp(0.5))
    assert difference.take() == {}


def test_the_difference_shows_what_the_mean_of_the_ratios_hides() -> None:
    torch.manual_seed(0)
    sampling, training = torch.randn(2, 50).log_softmax(-1)
    tokens = torch.multinomial(sampling.exp(), 20_000, replacement=True)
    sampled, trained = sampling[tokens][None], training[tokens][None]
    assert (trained - sampled).exp().mean() == pytest.approx(1, abs=0.05)
    difference = SamplingDifference()
    difference.add(trained, sampled, torch.ones_like(sampled))
    assert difference.take()["sampling_logp_difference"] > 0.5


@pytest.mark.parametrize(("answer", "scored"), [("Hm.\n</think>\n\nA pear.<|im_end|>", "A pear."), ("Hm.", "")])
def test_the_reward_is_that_of_the_reply_without_its_thoughts(tmp_path: Path, answer: str, scored: str) -> None:
    tokenizer = load_tokenizer(thinking_model_dir(tmp_path / "m", OPENED))
    seen: list[str] = []

    def score(prompts: Any, replies: list[str], *_: Any) -> list[float]:
        seen.extend(replies)
        return [0.0] * len(replies)

    ends = frozenset({tokenizer.eos_token_id})
    unit = {"pm": RewardNormalizer(0.0, 1.0, 1.0)}
    reward = RewardFunction([preference_source(score)], lambda: unit, tokenizer, ends, 0.0, score)
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    reward([[{"role": "user", "content": "Name a fruit."}]], [ids], log_metric=lambda *_: None)
    assert [text.strip() for text in seen] == [scored]
