"""Measures how often each judging method agrees with humans: method x few-shot x calibration x orders, with 95% intervals.

    python bench/labels.py FILE [--model smollm2-135m] [--rows 200] [--methods choice,contrast,verdict,cot] [--skip 0]

FILE contains HH-RLHF pairs, or published evaluation questions with two options (`prompt`, `corrects`). Calibration and
the number of orders need no further requests, so each method runs once per few-shot setting. Prints a Markdown table; a
tie counts as half, a pair without a vote as wrong.
"""

import argparse
import math
import re
import time
from collections.abc import Iterator, Sequence

import orjson

from cai_cli.constitution.schema import PreferenceConstitution, open_constitution
from cai_cli.data.row_reader import RowReader
from cai_cli.data.schema import Pair
from cai_cli.data.transcripts import parse_transcript
from cai_cli.engines import open_engine
from cai_cli.engines.base import RequestFailure, Sampling
from cai_cli.judging.base import Judgement, PairComparison, sigmoid
from cai_cli.judging.judge import Judge
from cai_cli.judging.methods import Method
from cai_cli.judging.methods.choice import estimate_letter_bias
from cai_cli.judging.pairs import pair_items
from cai_cli.judging.votes import Labeller
from cai_cli.metrics.intervals import wilson
from cai_cli.prompting.base import assistant
from cai_cli.prompting.comparison import options_of
from cai_cli.runtime.stage_run import WorkItem

_QUESTION = re.compile(r"\A\n\nConsider [^\n]+:(\n\nHuman:.+?)\n\n\n([^\n]+) Options:\n \(A\) ", re.DOTALL)


def pairs_in(file: str) -> Iterator[Pair]:
    with open(file, "rb") as lines:
        first = orjson.loads(next(lines))
    if "corrects" not in first:
        yield from (unit.value for unit in pair_items(RowReader(), file, "all", 0, None) if isinstance(unit, WorkItem))
        return
    for number, line in enumerate(open(file, "rb")):  # noqa: SIM115
        row = orjson.loads(line)
        found = _QUESTION.match(row["prompt"])
        assert found, row["prompt"]
        a, b = options_of(row["prompt"].removesuffix("\n\nThe answer is:"))
        yield Pair(
            id=str(number),
            prompt=parse_transcript(found[1]),
            a=[assistant(a)],
            b=[assistant(b)],
            human="a" if row["corrects"] == [" (A)"] else "b",
            source=None,
        )


def agreement(pairs: Sequence[Pair], p_a: Sequence[float | None]) -> str:
    """A table cell: the share of pairs in which the judge agrees with humans, with ties as half."""
    right = 0.0
    for pair, p in zip(pairs, p_a, strict=True):
        if p is not None:
            right += 0.5 if p == 0.5 else float((p > 0.5) == (pair.human == "a"))
    figure = wilson(right, len(pairs))
    assert figure
    mark = " *" if figure["low"] > 0.5 or figure["high"] < 0.5 else ""
    return f"{right / len(pairs):.3f} ({figure['low']:.3f} to {figure['high']:.3f}){mark}"


def p_of(c: PairComparison, j: Judgement | RequestFailure, prior: float) -> float | None:
    if isinstance(j, RequestFailure):
        return None
    p = j.p_first
    if prior and 0 < p < 1:
        p = sigmoid(math.log(p / (1 - p)) - prior)
    return p if c.order == "ab" else 1 - p


def rows_of_table(
    method: str, few_shot: str, labeller: Labeller, pairs: Sequence[Pair], label: str
) -> Iterator[list[str]]:
    started = time.perf_counter()
    comparisons: list[PairComparison] = []
    answers: list[Judgement | RequestFailure] = []
    for start in range(0, len(pairs), 64):
        batch = [c for pair in pairs[start : start + 64] for c in labeller.comparisons(pair)]
        comparisons += batch
        answers += labeller.judge.judge(batch)
    seconds = time.perf_counter() - started
    firsts = [j.p_first for j in answers if isinstance(j, Judgement)]
    picks = sum(p > 0.5 for p in firsts) / max(1, len(firsts))
    for calibrated in (False, True) if method == "choice" else (False,):
        priors = estimate_letter_bias(labeller.judge, comparisons) if calibrated else {}
        by_order = {
            order: [
                p_of(c, j, priors.get((c.principle.id, labeller.judge.arrangement(c.pair)), 0.0))
                for c, j in zip(comparisons, answers, strict=True)
                if c.order == order
            ]
            for order in labeller.orders
        }
        one = by_order["ab"]
        both = [None if None in two else sum(two) / len(two) for two in zip(*by_order.values(), strict=True)]  # type: ignore[arg-type]
        yield [
            label,
            method,
            few_shot,
            "yes" if calibrated else "no",
            "one",
            agreement(pairs, one),
            f"{picks:.2f}",
            f"{seconds:.0f}",
        ]
        if len(labeller.orders) == 2:
            yield [
                label,
                method,
                few_shot,
                "yes" if calibrated else "no",
                "both",
                agreement(pairs, both),
                f"{picks:.2f}",
                f"{seconds:.0f}",
            ]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("file")
    arguments.add_argument("--model", default="smollm2-135m")
    arguments.add_argument("--rows", type=int, default=200)
    arguments.add_argument("--skip", type=int, default=0)
    arguments.add_argument("--methods", default=",".join(Method))
    arguments.add_argument("--few-shot", default="none,shipped")
    arguments.add_argument("--constitution")
    arguments.add_argument("--dtype", default="float32")
    arguments.add_argument("--max-new-tokens", type=int, default=64)
    arguments.add_argument("--principles-per-pair", type=int, default=1)
    options = arguments.parse_args()
    engine = open_engine(options.model, batch_size=64, device="cpu", dtype=options.dtype)
    pairs = list(pairs_in(options.file))[options.skip :][: options.rows]
    label = f"{options.file.rsplit('/')[-1].split('.')[0]}, n = {len(pairs)}"
    print("| pairs | method | few-shot | calibrated | orders | agreement with humans (95%) | picks first | seconds |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for method in options.methods.split(","):
        for few_shot in options.few_shot.split(",") if method != "contrast" else ["none"]:
            loaded = open_constitution(
                PreferenceConstitution, options.constitution, None if few_shot == "shipped" else few_shot
            )
            greedy = method == "verdict"
            sampling = Sampling(8 if greedy else options.max_new_tokens, 0.0 if greedy else 1.0)
            judge = Judge(engine, method, loaded.examples, "chat", 0, sampling)
            orders = ("ab",) if method == "contrast" else ("ab", "ba")
            labeller = Labeller(judge, loaded.principles, options.principles_per_pair, orders)
            for row in rows_of_table(method, few_shot, labeller, pairs, label):
                print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
