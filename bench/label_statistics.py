"""Simulations of the statistics that `cai` prints: size (how often a claim is made where nothing is there) and power (how
often it is made where something is). Every simulation has a fixed seed.

    python bench/label_statistics.py            # all of them
    python bench/label_statistics.py audit      # one
"""

import random
import sys
from collections.abc import Callable, Iterator

import numpy as np

from cai_cli.data.schema import Preference, Vote
from cai_cli.judging.base import sigmoid
from cai_cli.metrics.intervals import ClusterBootstrap
from cai_cli.metrics.label_audit import LabelAudit
from cai_cli.metrics.order_agreement import ORDER_SUMS, between_orders, order_sums
from cai_cli.prompting.base import assistant, user

# --- the audit of labels ----------------------------------------------------------------------------------------------


def biased_votes(rng: random.Random, pairs: int, bias: float, preference: float, noise: float) -> Iterator[list[float]]:
    """Yield p_first in the orders a-b and b-a: a position bias, a normal preference and normal noise, in log-odds.

    `preference` and `noise` are standard deviations.
    """
    for _ in range(pairs):
        prefers = rng.gauss(0, preference)
        yield [sigmoid(bias + side * prefers + rng.gauss(0, noise)) for side in (1, -1)]


def audit() -> None:
    """Whether the audit finds that a judge reads the replies, and how often it says so of one that answers with noise.

    "said to read" is the share of runs whose interval lies above 0; its size, where the preference is 0, is
    nominally 2.5%, and that of an interval which excludes 0 on either side 5%.
    """
    print("noise has sd 1 except in the last rows; two pairs a prompt\n")
    print("| pairs | position bias | sd of the preference | said to read | interval excludes 0 |")
    print("|---|---|---|---|---|")
    for pairs in (50, 200, 500):
        for preference in (0.0, 0.25, 0.5, 1.0):
            for bias in (0.0, 1.0, 2.0, 4.0):
                _audit_row(pairs, bias, preference, 1.0, runs=400 if preference == 0 and bias in (0, 4) else 60)
    for preference in (0.25, 1.0):
        _audit_row(500, 4.0, preference, 0.0, runs=60)
    print("\na judge that does not read: sure answers, nine of ten for the first reply\n")
    print("| pairs | said to read, log-odds | said to read, in words |\n|---|---|---|")
    for pairs in (20, 50, 100, 200):
        print(f"| {pairs} | {' | '.join(_sure_cells(pairs, runs=60))} |", flush=True)


def _audit_row(pairs: int, bias: float, preference: float, noise: float, runs: int) -> None:
    above = either = 0
    for run in range(runs):
        rng = random.Random(f"audit {pairs} {bias} {preference} {noise} {run}")
        sums = ClusterBootstrap(ORDER_SUMS)
        for i, (first, second) in enumerate(biased_votes(rng, pairs, bias, preference, noise)):
            sums.add(i // 2, order_sums([[_vote("ab", first), _vote("ba", second)]]))
        correlation = between_orders(sums)
        assert correlation
        above += correlation["low"] > 0
        either += correlation["low"] > 0 or correlation["high"] < 0
    noted = "" if noise else ", no noise"
    print(f"| {pairs} | {bias:g} | {preference:g}{noted} | {above / runs:.1%} | {either / runs:.1%} |", flush=True)


def _sure_cells(pairs: int, runs: int) -> Iterator[str]:
    for method in ("cot", "verdict"):
        read = 0
        for run in range(runs):
            rng, rows = random.Random(f"sure {pairs} {run}"), LabelAudit()
            for i in range(pairs):
                votes = [_vote(order, 0.999 if rng.random() < 0.9 else 0.001, method) for order in ("ab", "ba")]
                prompt, reply = [user(f"prompt {i}")], [assistant("reply")]
                rows.add(
                    Preference(
                        id=str(i), prompt=prompt, chosen=reply, rejected=reply, p_chosen=0.5, votes=votes, human=None,
                        source=None,
                    )
                )  # fmt: skip
            read += rows.audit()["reads_replies"] is True
        yield f"{read / runs:.1%}"


def _vote(order: str, p_first: float, method: str = "choice") -> Vote:
    return Vote.model_construct(principle_id="p", method=method, order=order, p_first=p_first, rationale=None)


def clamp() -> None:
    """The share of pairs lost as ties where each vote is clamped before averaging, and where the mean is clamped."""
    print("2,000 pairs, noise of sd 1, limits 0.4 and 0.6\n")
    print(
        "| position bias | sd of the preference | ties, votes clamped | labels right | ties, mean clamped | labels right |"
    )
    print("|---|---|---|---|---|---|")
    for bias in (0.0, 1.0, 2.0, 4.0):
        for preference in (1.0, 3.0):
            print(f"| {bias:g} | {preference:g} | {' | '.join(_clamped_cells(bias, preference))} |")


def _clamped_cells(bias: float, preference: float) -> Iterator[str]:
    pairs, rng = 2000, random.Random(f"clamp {bias} {preference}")
    votes = []
    for _ in range(pairs):
        prefers = rng.gauss(0, preference)
        first, second = (sigmoid(bias + side * prefers + rng.gauss(0, 1)) for side in (1, -1))
        votes.append((prefers > 0, first, second))
    for clamp_each in (True, False):
        ties = right = 0.0
        for a_is_better, *both in votes:
            first, second = (min(0.6, max(0.4, p)) for p in both) if clamp_each else both
            p_a = (first + 1 - second) / 2
            tie = abs(p_a - 0.5) < 1e-12
            ties += tie
            right += 0.5 if tie else (p_a > 0.5) == a_is_better
        yield f"{ties / pairs:.1%}"
        yield f"{right / pairs:.1%}"


# --- the Goodhart alarm ---


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


# --- accuracy of preference models, and claims of comparisons ---


def accuracy() -> None:
    """How often a preference model is called better or worse than chance, by prompts and pairs a prompt.

    Every pair of a prompt shares one reply (its first), and labels and model each rank the replies, so that the pairs
    depend on each other. Quality is the correlation of the two rankings: 0 measures size, the others power.
    """
    from cai_cli.data.schema import JudgedPair
    from cai_cli.metrics.intervals import wilson
    from cai_cli.metrics.preference_model import accuracy as accuracy_of

    def pairs_of(rng: np.random.Generator, prompts: int, pairs: int, quality: float) -> list[JudgedPair]:
        judge = rng.normal(size=(prompts, pairs + 1))
        model = quality * judge + (1 - quality**2) ** 0.5 * rng.normal(size=judge.shape)
        better = judge[:, :1] > judge[:, 1:]
        first, other = np.broadcast_to(model[:, :1], better.shape), model[:, 1:]
        chosen, rejected = np.where(better, first, other), np.where(better, other, first)
        names = {"id": "p", "source": None, "p_chosen": 0.9, "chosen_tokens": 1, "rejected_tokens": 1}
        return [
            JudgedPair.model_construct(prompt_id=str(p), chosen_score=a, rejected_score=b, **names)
            for p in range(prompts)
            for a, b in zip(chosen[p].tolist(), rejected[p].tolist(), strict=True)
        ]

    print("| quality | prompts | pairs a prompt | Wilson over pairs | over prompts |\n|---|---|---|---|---|")
    for quality, prompts in ((0.0, 10), (0.0, 20), (0.0, 50), (0.0, 200), (0.3, 50), (0.3, 200)):
        for pairs in (1, 2, 4, 8):
            rng = np.random.default_rng(prompts + pairs)
            runs, found = 600 if prompts < 200 else 200, [0, 0]
            for _ in range(runs):
                scored = pairs_of(rng, prompts, pairs, quality)
                right = sum(pair.margin > 0 for pair in scored)
                for place, share in enumerate((wilson(right, len(scored)), accuracy_of(scored))):
                    found[place] += bool(share) and not share["low"] <= 0.5 <= share["high"]
            print(f"| {quality} | {prompts} | {pairs} |" + "".join(f" {count / runs:.1%} |" for count in found))


def claims() -> None:
    """How often `eval compare` claims that a model beats another: some claim in a run, and that of the best model.

    Each reply has a random quality and a judge sees it with noise; replies to two axes of prompts. `edge` is the share
    of comparisons that the last model wins against each of the others; 0.5 measures size, the others power.
    """
    from itertools import combinations
    from statistics import NormalDist

    from cai_cli.data.evaluation_schema import ModelComparison
    from cai_cli.metrics.elo import AXES, Tournament
    from cai_cli.metrics.intervals import wilson

    def run(rng: np.random.Generator, models: int, prompts: int, edge: float) -> tuple[list[bool], list[bool]]:
        """Return whether each win rate differs from one half: by its interval alone, and by simultaneous ones."""
        names = [str(m) for m in range(models)]
        tournament = Tournament(names)
        for kind in AXES.values():
            quality = rng.normal(size=(prompts, models))
            quality[:, -1] += 2**0.5 * NormalDist().inv_cdf(edge)
            for prompt, row in enumerate(quality.tolist()):
                for a, b in combinations(range(models), 2):
                    tournament.add(
                        ModelComparison.model_construct(
                            prompt_id=f"{kind} {prompt}", sample_index=0, kind=kind, model_a=names[a],
                            model_b=names[b], p_a=0.9 if row[a] > row[b] else 0.1, score_a=None, score_b=None,
                        )
                    )  # fmt: skip
        rates = [r for r in tournament.win_rates() if edge == 0.5 or r["b"] == names[-1]]
        alone = [wilson(r["value"] * r["n"], r["n"]) for r in rates]
        return tuple([not e["low"] <= 0.5 <= e["high"] for e in es] for es in (alone, rates))

    print("| edge | models | prompts an axis | claim | each alone | simultaneous |\n|---|---|---|---|---|---|")
    for edge, prompts in ((0.5, 20), (0.5, 50), (0.6, 200), (0.7, 50), (0.7, 100)):
        some = edge == 0.5
        for models, count in ((2, 200), (4, 100), (6, 100)) if some else ((2, 100), (4, 30), (6, 10)):
            rng = np.random.default_rng(models * prompts)
            runs = [run(rng, models, prompts, edge) for _ in range(count)]
            rates = [np.mean([any(r[k]) if some else np.mean(r[k]) for r in runs]) for k in (0, 1)]
            what = "some false claim" if some else "each true claim"
            print(f"| {edge} | {models} | {prompts} | {what} | {rates[0]:.1%} | {rates[1]:.1%} |")


SIMULATIONS: dict[str, Callable[[], None]] = {
    "audit": audit,
    "clamp": clamp,
    "alarm": alarm,
    "accuracy": accuracy,
    "claims": claims,
}


def main() -> None:
    for name in sys.argv[1:] or SIMULATIONS:
        print(f"## {name}")
        SIMULATIONS[name]()


if __name__ == "__main__":
    main()
