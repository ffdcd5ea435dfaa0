"""The names of the steps of a run: `policy@2` is the step `policy` of round 2."""

import re

_ROUND = re.compile(r"([^@]+)@(\d+)(@.*)?")


def round_of(step: str) -> tuple[str, int] | None:
    """The name of a step without its round, with the suffix of its variant, and its round; None outside rounds.

    Examples:
        >>> round_of("policy@2"), round_of("policy@2@beta=0.1"), round_of("policy@beta=0.1")
        (('policy', 2), ('policy@beta=0.1', 2), None)
    """
    found = _ROUND.fullmatch(step)
    return (found[1] + (found[3] or ""), int(found[2])) if found else None
