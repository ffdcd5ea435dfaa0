"""The scores of models on a benchmark: intervals over prompts, RewardBench's weights, and differences on shared prompts."""

from collections.abc import Sequence

import pytest

from cai_cli.data.benchmark_schema import BenchmarkReply
from cai_cli.evaluate.benchmark_results import SECTIONS, BenchmarkResults, Outcome, mean_of_sections
from cai_cli.metrics.intervals import Estimate, wilson
from cai_cli.prompting.base import assistant, user


def reply(model: str, prompt: str, value: float, groups: Sequence[str] = (), index: int = 0) -> BenchmarkReply:
    return BenchmarkReply(
        id=f"{prompt} {model}", prompt=[user("q")], sample_index=index, completion=[assistant("a")], finish_reason=None,
        prompt_id=prompt, benchmark="harmbench", model=model, groups=list(groups), value=value, answers={"refused": 1 - value},
    )  # fmt: skip


def test_a_model_is_compared_with_the_first_one_on_the_prompts_that_both_have() -> None:
    results = BenchmarkResults(["before", "after", "absent"])
    for place in range(20):
        results.observe(reply("before", f"p{place}", 1.0, ["a" if place % 2 else "b"]))
        if place:  # one prompt has no judged reply of the second model
            results.observe(reply("after", f"p{place}", float(place > 15), ["a" if place % 2 else "b"]))
    found = results.result()
    assert [(one["model"], one["score"]["value"], one["score"]["n"]) for one in found["models"]] == [
        ("before", 1.0, 20), ("after", pytest.approx(4 / 19), 19),
    ]  # fmt: skip
    (difference,) = found["differences"]
    assert (difference["model"], difference["baseline"], difference["n"]) == ("after", "before", 19)
    assert difference["value"] == pytest.approx(4 / 19 - 1)
    assert -1 < difference["low"] < difference["value"] < difference["high"] < 0
    assert found["models"][1]["groups"]["a"]["value"] == pytest.approx(2 / 10)
    assert found["models"][1]["refused"]["value"] == pytest.approx(15 / 19)
    assert found["simultaneous"] == {"models": 2, "groups": 4, "differences": 1}


def test_several_replies_to_a_prompt_are_one_cluster() -> None:
    results = BenchmarkResults(["m"])
    for place in range(8):
        for index in range(5):
            results.observe(reply("m", f"p{place}", float(place % 2), index=index))
    score = results.result()["models"][0]["score"]
    assert (score["value"], score["n"]) == (0.5, 40)
    one_each = wilson(4, 8)
    assert one_each is not None
    assert score["high"] - score["low"] > one_each["high"] - one_each["low"]


def test_the_score_of_rewardbench_is_the_mean_of_its_weighted_sections() -> None:
    def exact(value: float) -> Estimate:
        return {"value": value, "low": value, "high": value, "n": 1}

    by_subset = {name: exact(float(name == "math-prm")) for subsets in SECTIONS.values() for name in subsets}
    whole = mean_of_sections(by_subset)
    assert whole is not None
    assert whole["value"] == pytest.approx(0.5 / 4)  # math-prm is half of one section of four
    only_chat = mean_of_sections({"alpacaeval-easy": exact(1.0), "mt-bench-med": exact(0.0)})
    assert only_chat is not None
    assert only_chat["value"] == pytest.approx(100 / 140)
    assert mean_of_sections({}) is None
    assert sum(map(len, SECTIONS.values())) == 23


def test_rows_of_other_types_and_models_without_replies_count_nothing() -> None:
    results = BenchmarkResults(["m"])
    results.observe(Outcome("p", [], 1.0))
    assert results.result() == {
        "models": [], "differences": [], "without_scores": ["m"], "simultaneous": {"models": 0, "groups": 0, "differences": 0},
    }  # fmt: skip


def test_a_baseline_without_replies_stays_the_baseline_and_is_named() -> None:
    results = BenchmarkResults(["base", "b", "c"])
    for model in ("b", "c"):
        results.outcomes[model] += [Outcome(f"p{i}", [], 1.0) for i in range(9)]
    found = results.result()
    assert ([one["model"] for one in found["models"]], found["differences"]) == (["b", "c"], [])
    assert found["without_scores"] == ["base"]
    results.outcomes["base"] += [Outcome(f"p{i}", [], 0.0) for i in range(9)]
    assert {each["baseline"] for each in results.result()["differences"]} == {"base"}
