"""The expected calibration error (ECE), and its mean for a calibrated judge of the same pairs.

The error is a mean of absolute values, so chance alone makes it positive: with 50 human labels a perfectly calibrated
judge has an error of about 0.09. An error says little without that mean beside it.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cai_cli.metrics.intervals import Numbers

BINS = 5  # of a confidence, by tenths from one half to one
SIGN_FLIPS = 2000  # random choices of the signs of all gaps
BLOCKS = 2000  # more clusters share blocks, so that memory does not grow with them


def bin_of(confidence: float) -> int:
    """Return the bin of a confidence, from 0 to BINS - 1.

    Examples:
        >>> bin_of(0.5), bin_of(0.75), bin_of(1.0)
        (0, 2, 4)
    """
    return min(BINS - 1, int((confidence - 0.5) * 2 * BINS))


def bin_ends(k: int) -> dict[str, float]:
    """Return the ends of bin `k`, as a row of a calibration curve states them.

    Examples:
        >>> bin_ends(2)
        {'from': 0.7, 'to': 0.8}
    """
    return {"from": (BINS + k) / (2 * BINS), "to": (BINS + k + 1) / (2 * BINS)}


def calibration_error(gaps: "Numbers", n: float) -> float:
    """Return the mean over rows of the distance between mean confidence and mean label in the row's bin.

    Args:
        gaps: Sums of confidence less label over the rows of each cluster and bin, shape (clusters, bins).
        n: Number of rows.
    """
    return float(abs(gaps.sum(0)).sum()) / n


def error_if_calibrated(gaps: "Numbers", n: float) -> float:
    """Return the calibration error that a calibrated judge with the same confidences has on average.

    For a calibrated judge the gap of each cluster is as likely to be positive as negative, so the error is averaged
    over 2,000 random choices of their signs (seeded). That keeps the spread of the labels, soft or hard, and the
    dependence of rows of one cluster. It is too large for a judge whose error is large.

    Args:
        gaps: As for `calibration_error`.
        n: Number of rows.

    Examples:
        >>> import numpy as np
        >>> sure = np.array([[-0.1]] * 90 + [[0.9]] * 10)  # confidence 0.9, right in 90 of 100 cases
        >>> round(calibration_error(sure, 100), 3), round(error_if_calibrated(sure, 100), 3)
        (0.0, 0.024)
    """
    import numpy as np

    blocks = np.zeros((min(BLOCKS, len(gaps)), gaps.shape[1]))
    np.add.at(blocks, np.arange(len(gaps)) % BLOCKS, gaps)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(SIGN_FLIPS, len(blocks)))
    return float(abs(signs @ blocks).sum(1).mean()) / n
