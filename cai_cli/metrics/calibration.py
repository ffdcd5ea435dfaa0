"""The expected calibration error, and its value for a calibrated judge of the same pairs.

The error is a mean of absolute values, so chance alone makes it positive: with 50 human labels a perfectly calibrated
judge has an error of about 0.09. An error says nothing without that value beside it.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cai_cli.metrics.intervals import Numbers

FLIPS = 2000
BLOCKS = 2000  # more clusters share blocks, so that memory does not grow with them


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
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(FLIPS, len(blocks)))
    return float(abs(signs @ blocks).sum(1).mean()) / n
