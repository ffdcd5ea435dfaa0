"""Preference rows made from votes."""

from typing import Any

from cai_cli.data.schema import Preference
from cai_cli.prompting.base import assistant, user


def pref(
    number: int,
    *votes: tuple[str, str, float],
    p_chosen: float | None = None,
    human: str | None = None,
    prompt: int | None = None,
    replies: tuple[str, str] = ("aaaa", "bbbb"),
) -> Preference:
    """`votes`: (principle, order, p_first)."""
    shares = [p if order == "ab" else 1 - p for _, order, p in votes]
    return Preference.model_validate(
        {
            "id": f"p{number}",
            "prompt": [user(f"question {number if prompt is None else prompt}").model_dump()],
            "chosen": [assistant(replies[0]).model_dump()],
            "rejected": [assistant(replies[1]).model_dump()],
            "p_chosen": p_chosen or sum(shares) / len(shares),
            "votes": [
                {"principle_id": k, "method": "choice", "order": order, "p_first": p, "rationale": None}
                for k, order, p in votes
            ],
            "human": human,
            "source": None,
        }
    )


def steady(number: int, human: str | None = None, **more: Any) -> Preference:
    """A pair whose winner is the same in both orders."""
    return pref(number, ("kind", "ab", 0.9), ("kind", "ba", 0.2), human=human, **more)


def flipped(number: int, human: str | None = None, **more: Any) -> Preference:
    """A pair of which the first reply wins in either order."""
    return pref(number, ("kind", "ab", 0.9), ("kind", "ba", 0.8), human=human, **more)
