"""Simulations of the statistics that `cai` prints: size (how often a claim is made where nothing is there) and power (how
often it is made where something is). Every simulation has a fixed seed.

    python bench/label_statistics.py            # all of them
    python bench/label_statistics.py audit      # one
"""

import sys
from collections.abc import Callable

import numpy as np


def alarm() -> None:
    """The Goodhart alarm of `cai rl`: runs that it flags where the monitor does not fall, and where it does.

    A run has 32 held-out prompts with two replies each; the unit is the standard deviation of a reply's score. The
    training preference model's score always rises, by 4. "drift" adds a random walk to each prompt, so that checks are
    correlated; "judge" is a monitor whose scores are mostly near 0 or 1; "rising" improves by 0.5.
    """
    from cai_cli.phase2_feedback.goodhart import falling_monitor

    prompts, rng = 32, np.random.default_rng(0)

    def flagged_at(monitor: np.ndarray) -> int | None:
        total = len(monitor) - 1
        pm = rng.normal(0, 0.5**0.5, monitor.shape) + np.linspace(0, 4, total + 1)[:, None]
        return next((k for k in range(1, total + 1) if falling_monitor(monitor[: k + 1], pm[: k + 1], total)), None)

    def noise(total: int) -> np.ndarray:
        return rng.normal(0, 0.5**0.5, (total + 1, prompts))  # the mean of two replies

    def drift(total: int) -> np.ndarray:
        return noise(total) + rng.normal(0, 1 / total**0.5, (total + 1, prompts)).cumsum(axis=0)

    def judge(total: int) -> np.ndarray:
        return (rng.beta(0.2, 0.2, (2, total + 1, prompts)) / 0.42).mean(axis=0)

    def rising(total: int) -> np.ndarray:
        return noise(total) + np.linspace(0, 0.5, total + 1)[:, None]

    print("no fall: share of runs that are flagged\n checks   runs  noise  drift  judge rising")
    for total, runs in ((10, 400), (50, 100), (200, 60)):
        shares = [
            sum(flagged_at(kind(total)) is not None for _ in range(runs)) / runs
            for kind in (noise, drift, judge, rising)
        ]
        print(f"{total:7} {runs:6} " + " ".join(f"{share:6.3f}" for share in shares))
    print("a fall from check `from` on: share of runs flagged, and the median check where they are")
    print(" checks  from   sudden, 0.5     sudden, 1  gradual, 0.5    gradual, 1")
    for total in (10, 50, 200):
        for begin in (total // 10, total // 2, total * 4 // 5):
            cells = []
            for ramp in (False, True):
                for size in (0.5, 1.0):
                    at = np.arange(total + 1)
                    shape = np.clip((at - begin) / (total - begin), 0, 1) if ramp else at >= begin
                    found = [flagged_at(noise(total) - size * shape[:, None]) for _ in range(20)]
                    caught = [k for k in found if k is not None]
                    cells.append(f"{len(caught) / 20:5.2f} at {np.median(caught) if caught else np.nan:5.0f}")
            print(f"{total:7} {begin:5} " + " ".join(cells))


SIMULATIONS: dict[str, Callable[[], None]] = {"alarm": alarm}


def main() -> None:
    for name in sys.argv[1:] or SIMULATIONS:
        print(f"## {name}")
        SIMULATIONS[name]()


if __name__ == "__main__":
    main()
