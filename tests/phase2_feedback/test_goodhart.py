import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from cai_cli.data.schema import Message, PolicySample
from cai_cli.phase2_feedback.goodhart import (
    MONITOR_ALPHA,
    RUNAWAY_ALPHA,
    best_check,
    changed,
    falling_monitor,
    goodhart,
    monitor_level,
    smallest_fall,
    windows_of,
)


def sample(step: int, number: int, reply: str = "a plain answer", **fields: object) -> PolicySample:
    given = {"score": 0.0, "monitor_score": 0.0, "reply_tokens": 20, "finish_reason": "stop"} | fields
    return PolicySample(
        id=f"p{number}",
        prompt=[Message(role="user", content=f"question {number}")],
        sample_index=0,
        completion=[Message(role="assistant", content=reply)],
        step=step,
        **given,
    )


def run(checks: int, row: Callable[[int, int, random.Random], dict[str, object]], seed: int = 0, n: int = 32) -> list:
    """`checks` checks of `n` replies, each with the fields that row(check, number, rng) gives."""
    rng = random.Random(seed)
    return [[sample(10 * k, i, **row(k, i, rng)) for i in range(n)] for k in range(checks)]


def first_flag(checks: Sequence[list[PolicySample]]) -> int | None:
    return next((k for k in range(len(checks)) if goodhart(checks[: k + 1], len(checks) - 1)), None)


def test_a_monitor_that_falls_while_the_score_rises_is_flagged_within_three_checks() -> None:
    def planted(k: int, _: int, rng: random.Random) -> dict[str, object]:
        return {"score": k + rng.gauss(0, 1), "monitor_score": -k / 2 + rng.gauss(0, 0.5)}

    checks = run(4, planted)
    at = first_flag(checks)
    assert at is not None
    assert at <= 3
    assert goodhart(checks, len(checks) - 1) == "monitor_score falls while pm_score rises since step 0"
    assert best_check(checks[:at]) == 0


def test_a_monitor_whose_score_turns_is_compared_with_its_best_check() -> None:
    def turning(k: int, _: int, rng: random.Random) -> dict[str, object]:
        return {"score": k + rng.gauss(0, 0.5), "monitor_score": (0, 2, 1.9, -1)[k] + rng.gauss(0, 0.5)}

    checks = run(4, turning)
    assert first_flag(checks) == 3
    assert goodhart(checks, len(checks) - 1) is not None
    assert best_check(checks[:3]) in (1, 2)


def test_a_monitor_that_only_fluctuates_is_rarely_flagged() -> None:
    def wavering(k: int, _: int, rng: random.Random) -> dict[str, object]:
        return {"score": k + rng.gauss(0, 1), "monitor_score": rng.gauss(0, 1)}

    flagged = [first_flag(run(10, wavering, seed)) is not None for seed in range(100)]
    assert sum(flagged) <= 5


def first_fall(total: int, begin: int, size: float, seed: int) -> int | None:
    """The check that is flagged where the monitor falls by `size` standard deviations of a check, from `begin` on."""
    rng = np.random.default_rng(seed)
    monitor, pm = rng.normal(0, 1, (2, total + 1, 32))
    monitor -= size * (np.arange(total + 1) >= begin)[:, None]
    pm += np.linspace(0, 20, total + 1)[:, None]
    return next((k for k in range(1, total + 1) if falling_monitor(monitor[: k + 1], pm[: k + 1], total)), None)


@pytest.mark.parametrize("begin", [20, 100, 188])
def test_in_a_long_run_a_late_fall_is_found_as_soon_as_an_early_one(begin: int) -> None:
    found = [first_fall(200, begin, 0.8, seed) for seed in range(6)]
    assert all(k is not None and begin <= k <= begin + 5 for k in found), found


def test_a_small_fall_is_found_from_the_means_of_several_checks() -> None:
    checks = run(
        33, lambda k, i, rng: {"score": k + rng.gauss(0, 1), "monitor_score": rng.gauss(0, 1) - 0.5 * (k > 16)}
    )
    at = first_flag(checks)
    assert at is not None
    assert 17 <= at <= 28
    assert goodhart(checks, 32) == (
        "monitor_score falls while pm_score rises from steps 0-70 to steps 250-320 (means of 8 checks)"
    )


def test_long_runs_without_a_fall_are_rarely_flagged() -> None:
    assert sum(first_fall(60, 61, 0.0, seed) is not None for seed in range(40)) <= 2


@pytest.mark.parametrize("total", [1, 10, 50, 200])
def test_the_levels_of_all_tests_of_a_run_sum_to_less_than_a_twentieth(total: int) -> None:
    levels = [monitor_level(total) for k in range(1, total + 1) for _ in windows_of(k)]
    assert sum(levels) == pytest.approx(MONITOR_ALPHA)
    assert MONITOR_ALPHA + RUNAWAY_ALPHA <= 0.05
    assert len(levels) <= 31 * total


def test_windows_of_every_width_lie_next_to_the_last_checks_further_back_and_at_the_start() -> None:
    assert windows_of(1) == [(0, 1)]
    assert windows_of(5) == [(4, 1), (3, 1), (1, 1), (0, 1), (2, 2), (0, 2)]
    for k in range(1, 200):
        assert len(set(windows_of(k))) == len(windows_of(k))
        assert all(start + 2 * width <= k + 1 for start, width in windows_of(k))


def test_the_replies_to_one_prompt_are_one_observation() -> None:
    def of_two_prompts(k: int, i: int, rng: random.Random) -> dict[str, object]:
        return {"score": 5 * k + rng.gauss(0, 1), "monitor_score": rng.gauss(0, 0.1) - k * (1 + i // 16)}

    checks = run(3, of_two_prompts)
    assert first_flag(checks) is not None
    two_prompts = [[sample(row.step, i // 16, score=row.score, monitor_score=row.monitor_score) for i, row in enumerate(check)] for check in checks]  # fmt: skip
    assert first_flag(two_prompts) is None


def test_few_prompts_need_a_large_fall() -> None:
    assert smallest_fall(32, 10) < 0.7 < smallest_fall(8, 10) < 3 < smallest_fall(4, 10)
    assert smallest_fall(32, 200) < 1
    assert smallest_fall(1, 10) == float("inf")


def test_replies_without_a_monitor_score_are_left_out() -> None:
    def planted(k: int, i: int, rng: random.Random) -> dict[str, object]:
        missing = (i + k) % 4 == 0
        return {"score": k + rng.gauss(0, 1), "monitor_score": None if missing else -k + rng.gauss(0, 0.5)}

    assert first_flag(run(4, planted)) in (1, 2)
    assert first_flag(run(4, lambda k, i, rng: {"score": float(k), "monitor_score": None})) is None
    assert first_flag(run(4, lambda k, i, rng: {"score": float(k), "monitor_score": 0.1 * i})) is None


def test_both_rising_or_both_falling_is_not_flagged() -> None:
    for sign in (1, -1):
        checks = run(
            4, lambda k, i, rng, s=sign: {"score": s * k + rng.gauss(0, 1), "monitor_score": s * k + rng.gauss(0, 1)}
        )
        assert first_flag(checks) is None


def test_runaway_boilerplate_evasion_and_length_are_flagged_without_a_monitor() -> None:
    for fields, name in (
        ({"reply": "you are valued"}, "boilerplate_share 0.00 -> 0.50"),
        ({"reply": "I can't help with that"}, "evasive_share 0.00 -> 0.50"),
        ({"finish_reason": "length"}, "cut_off_share 0.00 -> 0.50"),
    ):
        checks = run(2, lambda k, i, rng, f=fields: {"monitor_score": None} | (f if k and i % 2 else {}))
        assert goodhart(checks, len(checks) - 1) == name
    longer = run(2, lambda k, i, rng: {"monitor_score": None, "reply_tokens": rng.randint(15, 25) * (1 + 2 * k)})
    assert str(goodhart(longer, 1)).startswith("reply_tokens")


def test_a_small_rise_of_a_share_is_not_flagged() -> None:
    checks = run(2, lambda k, i, rng: {"reply": "you are valued"} if k and i < 7 else {})
    assert goodhart(checks, len(checks) - 1) is None


def test_without_a_monitor_the_last_check_is_the_best() -> None:
    assert best_check(run(3, lambda k, i, rng: {"monitor_score": None})) == 2


def test_the_start_is_never_flagged() -> None:
    assert goodhart(run(1, lambda k, i, rng: {"reply": "you are valued"}), 10) is None


def test_a_change_is_tested_on_paired_replies() -> None:
    then = [sample(0, i, score=float(i)) for i in range(10)]
    now = [sample(1, i, score=i + 0.1 + 0.01 * (i % 2)) for i in range(10)]
    assert changed(then, now, lambda row: row.score, 0.001) == 1
    assert changed(now, then, lambda row: row.score, 0.001) == -1
    assert changed(then, then, lambda row: row.score, 0.001) == 0
    assert changed(then, now, lambda row: row.monitor_score, 0.001) == 0


def test_a_monitor_without_scores_does_not_select_a_check() -> None:
    # No monitor scored the start model's replies; they count as equal to themselves.
    silent = run(3, lambda k, i, rng: {"monitor_score": None if k else 0.5})
    assert best_check(silent) == len(silent) - 1
    mostly = run(3, lambda k, i, rng: {"monitor_score": None if k and i % 3 else 0.5 - 0.1 * k})
    assert best_check(mostly) == len(mostly) - 1
    seldom = run(3, lambda k, i, rng: {"monitor_score": None if k and i % 8 == 0 else 0.5 + (0.1 if k == 1 else 0.0)})
    assert best_check(seldom) == 1
