"""What a step costs: operations by the kind of work, and the size of its rows."""

import pytest

from cai_cli.runtime.cost import H100_FLOPS, ROW_BYTES, RowFlow, TokenCounts, total


@pytest.mark.parametrize(
    ("tokens", "operations"),
    [
        (TokenCounts(prompt_tokens=4), 2 * 4 / 0.4),
        (TokenCounts(new_tokens=3), 2 * 3 / 0.06),
        (TokenCounts(trained_tokens=2), 6 * 2 / 0.4),
    ],
)
def test_reading_writing_and_training_have_their_own_share_of_the_peak(tokens: TokenCounts, operations: float) -> None:
    assert tokens.gpu_hours(8e9) == pytest.approx(operations * 8e9 / H100_FLOPS / 3600)
    assert tokens.gpu_hours(16e9) == pytest.approx(2 * tokens.gpu_hours(8e9))


def test_the_steps_of_a_run_add_up() -> None:
    steps = [TokenCounts(1, 2, 3), TokenCounts(10, 20, 30), TokenCounts()]
    assert total(steps) == TokenCounts(11, 22, 33)
    assert total(steps).gpu_hours(1e9) == pytest.approx(sum(step.gpu_hours(1e9) for step in steps))


def test_a_file_holds_the_prompt_and_every_text_of_a_row() -> None:
    flow = RowFlow(rows=10, per_prompt=1, prompt_tokens=100, reply_tokens=50, texts=3)
    assert flow.bytes == 10 * (ROW_BYTES + 4 * (100 + 3 * 50))
