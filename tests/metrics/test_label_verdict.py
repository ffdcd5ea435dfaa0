"""Whether the labels of a judge can be trusted, and why."""

from collections.abc import Iterable
from typing import Any

from label_rows import flipped, pref, steady

from cai_cli.data.schema import Preference, Rejected, reject
from cai_cli.metrics.label_audit import audit
from cai_cli.prompting.base import user

# --- metrics of votes given by hand -----------------------------------------------------------------------------------


def values(found: dict[str, Any], *names: str) -> list[tuple[float, int]]:
    return [(round(found[name]["value"], 6), found[name]["n"]) for name in names]


def verdict(rows: Iterable[Preference], rejected: Iterable[Rejected] = ()) -> tuple[bool | None, str]:
    found = audit(rows, rejected)
    return found["trusted"], found["reason"]


def test_labels_are_trusted_where_agreement_is_above_chance_and_not_where_it_may_be_chance() -> None:
    trusted, why = verdict(steady(i, "chosen" if i % 4 else "rejected") for i in range(100))
    assert trusted is True
    assert why.startswith("the judge agrees with humans on 75.0% (")
    trusted, why = verdict(steady(i, "chosen" if i % 2 else "rejected") for i in range(100))
    assert trusted is False
    assert why.endswith("of 100 labelled pairs, which cannot be distinguished from chance")
    trusted, why = verdict(steady(i, "rejected" if i % 4 else "chosen") for i in range(100))
    assert trusted is False
    assert why.endswith("is worse than chance")


def test_three_pairs_that_agree_do_not_make_a_judge() -> None:
    assert verdict(steady(i, "chosen") for i in range(3))[0] is None
    assert verdict(steady(i, "chosen", prompt=0) for i in range(50))[0] is None  # nor do fifty of one prompt
    assert verdict(steady(i, "chosen") for i in range(10))[0] is True


def in_words(row: Preference) -> Preference:
    """The same votes as verdicts in words."""
    votes = [v.model_copy(update={"method": "verdict", "p_first": float(v.p_first > 0.5)}) for v in row.votes]
    return row.model_copy(update={"votes": votes})


def test_without_humans_a_steady_judge_is_not_known_and_one_that_answers_like_a_coin_is_not_trusted() -> None:
    trusted, why = verdict(steady(i) for i in range(50))
    assert trusted is None
    assert "agreement is unknown without human labels" in why
    backward = [pref(50 + i, ("kind", "ab", 0.3), ("kind", "ba", 0.1)) for i in range(12)]
    coin = [*backward, *(flipped(i) for i in range(13)), *(steady(i) for i in range(25, 50))]
    trusted, why = verdict(coin)
    assert trusted is False
    assert "in the two orders have a correlation of 0.11 (" in why
    assert "like a judge that does not read them" in why


def test_verdicts_in_words_are_judged_by_their_flips() -> None:
    trusted, why = verdict(in_words(steady(i)) for i in range(50))
    assert trusted is None
    assert "flips with the order of the replies on 0.0% (" in why
    trusted, why = verdict(in_words(flipped(i)) for i in range(50))
    assert trusted is False
    assert "like a judge that does not read them (100%)" in why
    assert audit(in_words(flipped(i)) for i in range(50))["between_orders"] is None


def test_a_position_bias_that_differs_from_pair_to_pair_is_named_where_it_hides_the_preference() -> None:
    rows = [pref(i, ("kind", "ab", 0.9 if i % 2 else 0.2), ("kind", "ba", 0.85 if i % 2 else 0.1)) for i in range(60)]
    trusted, why = verdict(rows)
    assert trusted is False
    assert why.startswith("nothing shows that the judge reads the replies: its position bias differs from pair to pair")


def test_a_few_prompts_give_no_verdict() -> None:
    rows = [steady(i, prompt=i % 3) for i in range(30)]
    expected = "agreement is unknown: there are no human labels, and 3 prompts are too few to show whether the judge "
    assert verdict(rows) == (None, f"{expected}reads the replies")
    assert audit(rows)["reads_replies"] is None


def test_with_one_order_a_position_bias_is_in_the_labels() -> None:
    first = [pref(i, ("kind", "ab", 0.8)) for i in range(45)]
    second = [pref(100 + i, ("kind", "ba", 0.3)) for i in range(45)]
    trusted, why = verdict(first)
    assert trusted is False
    assert why.startswith("the judge saw one order only, and picks the first reply in 100.0%")
    assert verdict([*first, *second]) == (
        None,
        "agreement is unknown: there are no human labels, and the judge saw one order only",
    )


def test_the_contrast_method_has_no_position_bias() -> None:
    rows = [pref(i, ("kind", "ab", 0.8)) for i in range(45)]
    contrasts = [r.model_copy(update={"votes": [r.votes[0].model_copy(update={"method": "contrast"})]}) for r in rows]
    found = audit(contrasts)
    assert found["first_picks"] is found["position"] is None
    assert (found["trusted"], found["reason"]) == (
        None,
        "agreement is unknown: there are no human labels, and the judge saw one order only",
    )


def test_only_ties_are_not_trusted_and_without_votes_trust_is_unknown() -> None:
    tie = reject("p1", "tie", pref(1, ("kind", "ab", 0.8), ("kind", "ba", 0.8)))
    assert verdict([], [tie]) == (False, "no pair got a preference: 1 tie")
    half = [pref(i, ("kind", "ab", 0.8), ("kind", "ba", 0.8)) for i in range(2)]
    assert verdict(half, [tie]) == (False, "no pair got a preference: 3 ties")
    assert verdict([]) == (None, "there are no votes to audit")
    assert verdict([pref(1, p_chosen=1.0, human="chosen")])[0] is None


def test_ties_count_as_flips_of_the_judge_and_failures_are_counted_by_reason() -> None:
    """A judge that only says A or B ties on every pair it flips on: without the ties it would look steady."""
    ties = [reject(f"t{i}", "tie", pref(i, ("kind", "ab", 1.0), ("kind", "ba", 1.0))) for i in range(30)]
    failures = [reject("f", "too long", user("x")), reject("g", "too long", user("y"))]
    found = audit([steady(100 + i) for i in range(10)], [*ties, *failures])
    assert values(found, "flip_rate") == [(0.75, 40)]
    assert (found["pairs"], found["ties"], found["rejected"]) == (10, 30, {"too long": 2})
    assert "2 pairs besides the 30 ties have no label; see their reasons" in found["notes"]


def test_ties_that_are_labels_are_counted_and_choose_no_length() -> None:
    half = [pref(i, ("kind", "ab", 0.8), ("kind", "ba", 0.8), replies=("long " * 9, "short")) for i in range(30)]
    found = audit([*half, *(steady(100 + i, replies=("brief", "longer")) for i in range(10))])
    assert (found["pairs"], found["ties"]) == (40, 30)
    assert values(found, "longer_chosen") == [(0.0, 10)]
    assert "30 of 40 labels are ties, in which neither reply is preferred" in found["notes"]
