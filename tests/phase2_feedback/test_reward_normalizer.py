"""The unit of the reward: the spread of the start model's scores within a prompt."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import largest_difference, manifest_of, rows_in, stage
from tiny import tiny_model_dir

from cai_cli.common.errors import CaiError
from cai_cli.data.schema import Message, PolicySample, Prompt
from cai_cli.phase2_feedback import rl
from cai_cli.phase2_feedback.reward_normalizer import replies_per_prompt, reward_normalizer

command = stage("rl")


def replies(scores: Sequence[Sequence[float]]) -> list[PolicySample]:
    """Replies with these scores, one sequence for each prompt."""
    return [
        PolicySample(
            id=f"p{prompt}",
            prompt=[Message(role="user", content=f"question {prompt}")],
            sample_index=index,
            completion=[Message(role="assistant", content="answer")],
            finish_reason="stop",
            step=0,
            reply_tokens=1,
            score=score,
            monitor_score=None,
        )
        for prompt, of_prompt in enumerate(scores)
        for index, score in enumerate(of_prompt)
    ]


def test_the_unit_is_the_pooled_spread_within_a_prompt() -> None:
    normalizer = reward_normalizer(replies([[1.0, 3.0], [10.0, 14.0], [-5.0, -5.0]]))
    assert normalizer.std == pytest.approx(((2 + 8 + 0) / 3) ** 0.5)
    assert normalizer.mean == 3.0
    assert normalizer(3.0 + normalizer.std) == pytest.approx(1.0)


def test_what_prompts_differ_by_does_not_change_the_unit() -> None:
    rng = random.Random(0)
    scores = [[rng.gauss(0, 1) for _ in range(2)] for _ in range(32)]
    offsets = [rng.gauss(0, 4.3) for _ in scores]
    shifted = [[score + offset for score in of_prompt] for of_prompt, offset in zip(scores, offsets, strict=True)]
    assert reward_normalizer(replies(shifted)).std == pytest.approx(reward_normalizer(replies(scores)).std)


def test_replies_that_differ_only_between_prompts_cannot_be_told_apart() -> None:
    for scores in ([[1.0, 1.0], [2.0, 2.0]], [[1.0, 1.0 + 1e-7], [20.0, 20.0 - 1e-6]]):
        with pytest.raises(CaiError) as error:
            reward_normalizer(replies(scores))
        assert error.value.code == "cannot-distinguish"


@pytest.mark.parametrize(("prompts", "each"), [(1, 17), (2, 9), (16, 2), (32, 2), (100, 2)])
def test_every_prompt_gets_two_replies_or_more(prompts: int, each: int) -> None:
    assert replies_per_prompt(prompts) == each


def scorer(offset: float) -> Callable[..., Any]:
    """A preference model that prefers replies with many an "e", and likes some prompts more than others."""

    def score(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        liking = [offset * random.Random(prompt.prompt[0].content).gauss(0, 1) for prompt in prompts]
        return [liked + text.count("e") / 4 for liked, text in zip(liking, texts, strict=True)]

    return lambda *_: score


def test_models_with_the_same_preferences_train_the_same_policy(
    prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(tiny_model_dir(tmp_path / "tiny"))
    run: dict[str, Any] = {"steps": 4, "prompts_per_step": 2, "max_new_tokens": 8, "learning_rate": 1e-3, "beta": 1.0}
    for name, offset in (("alike", 0.0), ("offset", 5.0)):
        monkeypatch.setattr(rl, "preference_score", lambda *_, by=offset: scorer(by)())
        command(prompts, tmp_path / name, model=model, pm=model, **run)
    units = [manifest_of(tmp_path / name)["metrics"]["score_std"] for name in ("alike", "offset")]
    assert units[0] == pytest.approx(units[1])
    assert largest_difference(tmp_path / "alike", tmp_path / "offset") < 1e-5
    kl = [[row["kl"] for row in rows_in(tmp_path / name / "metrics.jsonl")[1:]] for name in ("alike", "offset")]
    assert kl[0] == pytest.approx(kl[1], rel=1e-3)
    assert max(kl[0]) > 1e-4
