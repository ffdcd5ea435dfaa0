from cai_cli.report.refusals import plane


def estimate(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 20}


def test_each_model_with_safe_and_unsafe_prompts_is_a_point_of_the_plane() -> None:
    both = {"refusals.safe.refusal": estimate(0.2), "refusals.unsafe.refusal": estimate(0.8)}
    files = {"start.jsonl.refusals.json": both, "one.refusals.json": {"refusals.safe.refusal": estimate(0.1)}}
    (chart,) = plane({**files, "other.json": both})
    assert [row[0] for row in chart.rows] == ["start"]
    assert chart.rows[0][1:4] == [0.2, 0.1, 0.30000000000000004]
    assert plane({}) == []
