"""How often `cai eval adherence` claims a difference between two models, where there is none and where there is one.

    python bench/adherence_statistics.py

Each scenario has its own rate, and each conversation its own deviation from it, so that its replies depend on each
other.
"""

import random

from cai_cli.metrics.adherence import difference

PRINCIPLES, TURNS, RUNS = 32, 3, 60


def claims(scenarios: int, conversations: int, principles: int, shift: float) -> list[bool]:
    """Whether each principle's difference is claimed; the other model's rates are lower by `shift`."""
    found = []
    for _ in range(principles):
        first: dict[str, list[float]] = {}
        other: dict[str, list[float]] = {}
        for scenario in range(scenarios):
            rate = random.betavariate(0.6, 0.6)
            for number in range(conversations):
                for of_model, of_scenario in ((first, rate), (other, max(0.0, rate - shift))):
                    p = min(1.0, max(0.0, of_scenario + random.uniform(-0.3, 0.3)))
                    of_model[f"p/{scenario}/{number}"] = [float(random.random() < p) for _ in range(TURNS)]
        estimate = difference(first, other, PRINCIPLES)
        found.append(bool(estimate and (estimate["low"] > 0 or estimate["high"] < 0)))
    return found


def main() -> None:
    """Print one line for each number of scenarios and conversations."""
    random.seed(1)
    for scenarios, conversations in ((2, 1), (2, 4), (2, 8), (5, 4), (10, 4)):
        false = sum(any(claims(scenarios, conversations, PRINCIPLES, 0.0)) for _ in range(RUNS)) / RUNS
        shown = [claim for _ in range(20) for claim in claims(scenarios, conversations, 8, 0.5)]
        power = sum(shown) / len(shown)
        print(
            f"{scenarios} x {conversations}: any of {PRINCIPLES} claimed {false:.0%}, a drop of 50 points {power:.0%}"
        )


if __name__ == "__main__":
    main()
