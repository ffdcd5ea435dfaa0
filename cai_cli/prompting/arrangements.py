"""Arrangements of the few-shot comparisons: their order, their letters, and the principles they are asked under.

A fixed order of examples and letters biases every answer in the same way. So they are drawn: each pair uses one of
`ARRANGEMENTS` arrangements, which depend on the run's seed alone. Of every two arrangements one is the other with all
letters exchanged, so that over all of them each place holds (A) as often as (B).

Departure: the paper samples a principle for each example and does not say how examples are ordered. Here that is drawn
once for each arrangement, because comparisons with the same examples share them as a cached prefix: with the shipped
examples and batches of 32, a comparison costs 155 tokens with one arrangement, 232 with four and 851 with one of its
own. An example that states its own question keeps it: its answer is right under that question.
"""

import random
import re
from collections.abc import Sequence

from cai_cli.common.seeds import seed_for
from cai_cli.constitution.schema import ComparisonExample, PreferencePrinciple

ARRANGEMENTS = 4
_NAMES_A_LETTER = re.compile(r"\([AB]\)|\b[Oo]ption [AB]\b")


def arrangements(
    examples: Sequence[ComparisonExample], principles: Sequence[PreferencePrinciple], seed: int
) -> list[list[ComparisonExample]]:
    """The arrangements of a run; a single one where there is nothing to arrange.

    Args:
        examples: The few-shot examples.
        principles: Principles to draw from for examples without a question; where there are none, such an example is
            asked under the principle in use.
        seed: Random seed of the run.
    """
    if not examples:
        return [[]]
    arranged: list[list[ComparisonExample]] = []
    for number in range(ARRANGEMENTS // 2):
        draw = random.Random(seed_for(seed, "arrangement", number))  # noqa: S311
        ordered = [_asked(e, draw, principles) for e in draw.sample(list(examples), len(examples))]
        lettered = [exchanged(e) if draw.random() < 1 / 2 else e for e in ordered]
        arranged += [lettered, [exchanged(e) for e in lettered]]
    return arranged


def exchanged(example: ComparisonExample) -> ComparisonExample:
    """The example with its options exchanged; unchanged where its rationale names a letter."""
    if example.rationale and _NAMES_A_LETTER.search(example.rationale):
        return example
    first, second = example.options
    return example.model_copy(update={"options": [second, first], "answer": "B" if example.answer == "A" else "A"})


def _asked(
    example: ComparisonExample, draw: random.Random, principles: Sequence[PreferencePrinciple]
) -> ComparisonExample:
    if example.comparison or not principles:
        return example
    return example.model_copy(update={"comparison": draw.choice(list(principles)).comparison})
