"""The order of prompts, and held-out prompts."""

import pytest

from cai_cli.common.errors import CaiError
from cai_cli.data.schema import Message, Prompt
from cai_cli.phase2_feedback.rl_prompts import hold_out, prompt_order


def test_every_prompt_is_used_once_before_any_is_repeated() -> None:
    order = prompt_order(5, steps=4, per_step=3, seed=0)
    assert len(order) == 12
    assert sorted(order[:5]) == sorted(order[5:10]) == [0, 1, 2, 3, 4]
    assert order == prompt_order(5, 4, 3, 0)
    assert order != prompt_order(5, 4, 3, 1)


def test_held_out_prompts_depend_on_seed_and_prompt_alone_and_are_at_most_half() -> None:
    prompts = [Prompt(id=str(i), prompt=[Message(role="user", content=f"question {i}")]) for i in range(20)]
    train, held = hold_out(prompts, 4, seed=0)
    assert len(held) == 4
    assert {p.id for p in train} | {p.id for p in held} == {p.id for p in prompts}
    assert {p.id for p in hold_out(prompts[::-1], 4, seed=0)[1]} == {p.id for p in held}
    assert {p.id for p in hold_out(prompts, 4, seed=1)[1]} != {p.id for p in held}
    assert [len(part) for part in hold_out(prompts[:5], 32, seed=0)] == [3, 2]
    with pytest.raises(CaiError) as error:
        hold_out(prompts[:1], 4, seed=0)
    assert error.value.code == "too-few-rows"
