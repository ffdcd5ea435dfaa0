"""Simulations of the statistics that `cai` prints: size (how often a claim is made where nothing is there) and power (how
often it is made where something is). Every simulation has a fixed seed.

    python bench/label_statistics.py            # all of them
    python bench/label_statistics.py audit      # one
"""

import sys
from collections.abc import Callable


def accuracy() -> None:
    """How often a preference model is called better or worse than chance, by prompts and pairs a prompt.

    Every pair of a prompt shares one reply (its first), and labels and model each rank the replies, so that the pairs
    depend on each other. Quality is the correlation of the two rankings: 0 measures size, the others power.
    """
    import numpy as np

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

    import numpy as np

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


SIMULATIONS: dict[str, Callable[[], None]] = {"accuracy": accuracy, "claims": claims}


def main() -> None:
    for name in sys.argv[1:] or SIMULATIONS:
        print(f"## {name}")
        SIMULATIONS[name]()


if __name__ == "__main__":
    main()
