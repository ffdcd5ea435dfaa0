"""Selects principles, and draws one of them at random by seed (paper sections 3.1 and 4.1)."""

from collections.abc import Sequence
from typing import TypeVar

from cai_cli.common.errors import CaiError
from cai_cli.common.seeds import seed_for
from cai_cli.constitution.schema import CritiquePrinciple, PreferencePrinciple

P = TypeVar("P", CritiquePrinciple, PreferencePrinciple)


def select(principles: Sequence[P], ids: str | None, maximum: int | None) -> list[P]:
    """The principles that `--principles` and `--max-principles` select (paper section 3.4 varies their number).

    Args:
        principles: All principles of the constitution.
        ids: The ids of `--principles`, separated by commas; None selects all.
        maximum: `--max-principles`: keep only this many, from the first on; None for no limit.

    Raises:
        CaiError: `ids` is empty or repeats an id (`invalid-option`), or an id is unknown (`unknown-principle`).
    """
    chosen = list(principles)
    if ids is not None:
        known = {p.id: p for p in principles}
        selected = [name.strip() for name in ids.split(",") if name.strip()]
        if not selected:
            raise CaiError(f"--principles {ids!r} names no principle", code="invalid-option")
        for name in selected:
            if selected.count(name) > 1:
                raise CaiError(f"--principles names {name!r} twice", code="invalid-option")
            if name not in known:
                raise CaiError(f"no principle {name!r}", hint=f"known: {', '.join(known)}", code="unknown-principle")
        chosen = [known[name] for name in selected]
    return chosen[:maximum]


def draw(principles: Sequence[P], *seed_parts: str | int) -> P:
    """One principle, drawn uniformly with the seed of these parts (`seed_for`): one draw for each row and round."""
    return principles[seed_for(*seed_parts) % len(principles)]
