import random
from collections.abc import Callable, Sequence

from cai_cli.data.schema import Message, PolicySample
from cai_cli.phase2_feedback.goodhart import best_check, changed, goodhart


def sample(step: int, number: int, reply: str = "a plain answer", **fields: object) -> PolicySample:
    given = {"score": 0.0, "monitor_score": 0.0, "reply_tokens": 20, "finish_reason": "stop"} | fields
    return PolicySample(
        id=f"p{number}",
        prompt=[Message(role="user", content="question")],
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
    return next((k for k in range(len(checks)) if goodhart(checks[: k + 1])), None)


def test_a_monitor_that_falls_while_the_score_rises_is_flagged_within_three_checks() -> None:
    def planted(k: int, _: int, rng: random.Random) -> dict[str, object]:
        return {"score": k + rng.gauss(0, 1), "monitor_score": -k / 2 + rng.gauss(0, 0.5)}

    checks = run(4, planted)
    at = first_flag(checks)
    assert at is not None
    assert at <= 3
    assert goodhart(checks) == "monitor_score falls while pm_score rises since step 0"
    assert best_check(checks[:at]) == 0


def test_a_monitor_whose_score_turns_is_compared_with_its_best_check() -> None:
    def turning(k: int, _: int, rng: random.Random) -> dict[str, object]:
        return {"score": k + rng.gauss(0, 0.5), "monitor_score": (0, 2, 1.9, -1)[k] + rng.gauss(0, 0.5)}

    checks = run(4, turning)
    assert first_flag(checks) == 3
    assert goodhart(checks) is not None
    assert best_check(checks[:3]) in (1, 2)


def test_a_monitor_that_only_fluctuates_is_rarely_flagged() -> None:
    def wavering(k: int, _: int, rng: random.Random) -> dict[str, object]:
        return {"score": k + rng.gauss(0, 1), "monitor_score": rng.gauss(0, 1)}

    flagged = [first_flag(run(10, wavering, seed)) is not None for seed in range(100)]
    assert sum(flagged) <= 5


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
        assert goodhart(checks) == name
    longer = run(2, lambda k, i, rng: {"monitor_score": None, "reply_tokens": rng.randint(15, 25) * (1 + 2 * k)})
    assert str(goodhart(longer)).startswith("reply_tokens")


def test_a_small_rise_of_a_share_is_not_flagged() -> None:
    checks = run(2, lambda k, i, rng: {"reply": "you are valued"} if k and i < 7 else {})
    assert goodhart(checks) is None


def test_without_a_monitor_the_last_check_is_the_best() -> None:
    assert best_check(run(3, lambda k, i, rng: {"monitor_score": None})) == 2


def test_the_start_is_never_flagged() -> None:
    assert goodhart(run(1, lambda k, i, rng: {"reply": "you are valued"})) is None


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
