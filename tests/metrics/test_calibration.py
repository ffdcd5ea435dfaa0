"""The calibration error, and its value for a calibrated judge, against closed forms."""

import math

import numpy as np
import pytest

from cai_cli.metrics.calibration import BLOCKS, calibration_error, error_if_calibrated


def test_gaps_of_a_bin_cancel_and_those_of_two_bins_add_up() -> None:
    assert calibration_error(np.array([[0.4, 0.0], [-0.4, 0.0]]), 2) == 0
    assert calibration_error(np.array([[0.4, 0.0], [0.0, -0.4]]), 2) == pytest.approx(0.4)


@pytest.mark.parametrize("n", [50, 400, 3 * BLOCKS])
def test_the_error_of_a_calibrated_judge_is_the_mean_distance_of_a_binomial_share(n: int) -> None:
    gaps = np.array([[0.2]] * (8 * n // 10) + [[-0.8]] * (2 * n // 10))
    gaps = np.random.default_rng(0).permutation(gaps)
    assert error_if_calibrated(gaps, n) == pytest.approx(math.sqrt(2 / math.pi * 0.8 * 0.2 / n), rel=0.06)


def test_rows_of_one_prompt_do_not_average_out() -> None:
    alone = np.random.default_rng(1).choice([0.5, -0.5], size=(100, 1))
    assert error_if_calibrated(4 * alone, 400) == pytest.approx(error_if_calibrated(alone, 100))
    assert error_if_calibrated(np.repeat(alone, 4, axis=0), 400) == pytest.approx(
        error_if_calibrated(alone, 100) / 2, rel=0.05
    )
