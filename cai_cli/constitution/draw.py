"""Selecting principles and drawing one of them by seed."""

from collections.abc import Sequence
from typing import TypeVar

from cai_cli.common.errors import CaiError
from cai_cli.common.seeds import seed_for
from cai_cli.constitution.schema import CritiquePrinciple, PreferencePrinciple

P = TypeVar("P", CritiquePrinciple, PreferencePrinciple)


def select(principles: Sequence[P], ids: str | None, maximum: int | None) -> list[P]:
    """The principles of `--principles id,id` or the first `--max-principles` (paper section 3.4). Raises CaiError."""
    chosen = list(principles)
    if ids is not None:
        known = {p.id: p for p in principles}
        wanted = [name.strip() for name in ids.split(",") if name.strip()]
        if not wanted:
            raise CaiError(f"--principles {ids!r} names no principle")
        for name in wanted:
            if wanted.count(name) > 1:
                raise CaiError(f"--principles names {name!r} twice")
            if name not in known:
                raise CaiError(f"no principle {name!r}", hint=f"known: {', '.join(known)}")
        chosen = [known[name] for name in wanted]
    return chosen[:maximum]


def draw(principles: Sequence[P], *seed_parts: str | int) -> P:
    """One principle, drawn anew for every row and round from what names that draw."""
    return principles[seed_for(*seed_parts) % len(principles)]
