"""What a run changed, from the replies of its start model and of its final model to the same prompts.

`cai run` computes it where the run file has an `outcome`, and records it in `run.json`. Every figure is an estimate
with its 95% interval over prompts. A prompt that the run trained on is left out of all of them and counted.

A refusal is a full or partial one by its wording (`metrics.refusals`).
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from cai_cli.data.evaluation_schema import ModelComparison
from cai_cli.data.reply_ends import CUT_OFF
from cai_cli.data.schema import Kind, Message, Sample, conversation_id
from cai_cli.metrics.intervals import SHARE, Estimate, mean_estimate, paired_difference, with_interval
from cai_cli.metrics.label_audit import win_or_half
from cai_cli.metrics.refusals import classify
from cai_cli.prompting.system import without_system

Replies = Mapping[str, Sample]  # key of the reply -> its row
REFUSALS: Mapping[str, Kind] = {"refusals_red_team": "red-team", "refusals_helpful": "helpful"}
LEFT_OUT = {
    "seen_in_training": "prompts that were trained on and are left out",
    "unpaired": "replies to prompts without a reply of the other model, which are left out",
    "without_kind": "replies to prompts without a kind, which are in no share of refusals",
}
WIN_RATES: Mapping[str, Kind] = {"win_rate_red_team": "red-team", "win_rate_helpful": "helpful"}


def prompt_id(prompt: Sequence[Message]) -> str:
    """The id by which a prompt is found among those that were trained on: that of the conversation without its system
    prompt."""
    return conversation_id(without_system(prompt))


def win_rates(
    rows: Iterable[ModelComparison], start: str, final: str, seen: Collection[str]
) -> dict[str, Estimate | None]:
    """The share of comparisons that `final` wins against `start`, a tie counted half.

    Args:
        rows: Comparisons of any models.
        start: The name of one model.
        final: The name of the other.
        seen: The `prompt_id` of each prompt to leave out.

    Returns:
        `win_rate` over all prompts, and one of `WIN_RATES` for each kind of prompt; None without comparisons of the
        two.
    """
    wins: list[tuple[float, str, Kind | None]] = []
    for row in rows:
        if {row.model_a, row.model_b} == {start, final} and prompt_id(row.prompt) not in seen:
            won_by_a = win_or_half(row.p_a)
            wins.append((won_by_a if row.model_a == final else 1 - won_by_a, row.prompt_id, row.kind))
    parts = {"win_rate": wins} | {name: [win for win in wins if win[2] == kind] for name, kind in WIN_RATES.items()}
    return {
        name: mean_estimate([won for won, _, _ in part], SHARE, [prompt for _, prompt, _ in part])
        for name, part in parts.items()
    }


def is_refusal(row: Sample) -> bool:
    """Whether a reply is a full or partial refusal."""
    return classify(row.reply) != "compliance"


def refusals(before: Replies, after: Replies, kind: Kind) -> dict[str, Estimate | None]:
    """The share of refusals among the replies to prompts of one kind, before and after, and how much it changed.

    Args:
        before: Replies of the start model.
        after: Replies of the final model, with the same keys.
        kind: The kind of prompts.

    Returns:
        `before`, `after` and `change`, the mean difference; None without replies.
    """
    keys = [key for key, row in before.items() if row.kind == kind]
    prompts = _prompts(before, keys)
    refused_before, refused_after = ([float(is_refusal(of[key])) for key in keys] for of in (before, after))
    return {
        "before": mean_estimate(refused_before, SHARE, prompts),
        "after": mean_estimate(refused_after, SHARE, prompts),
        "change": paired_difference(refused_after, refused_before, clusters=prompts),
    }


def cut_off(replies: Replies) -> Estimate | None:
    """The share of replies that were cut off at the length limit, of those whose end is known."""
    known = [key for key, row in replies.items() if row.finish_reason is not None]
    return mean_estimate(
        [float(replies[key].finish_reason == CUT_OFF) for key in known], SHARE, _prompts(replies, known)
    )


def mean_words(replies: Replies) -> float | None:
    """The mean number of words of a reply; None without replies."""
    words = [len(row.reply.split()) for row in replies.values()]
    return round(sum(words) / len(words), 1) if words else None


def of_replies(before: Replies, after: Replies) -> dict[str, Any]:
    """Refusals by kind of prompt, cut-off replies and lengths, before and after, over the replies that both have.

    `unpaired` counts the replies of one side alone, and `without_kind` those of both whose prompts have no kind, which
    are in no share of refusals.
    """
    keys = [key for key in before if key in after]
    both = {"before": {key: before[key] for key in keys}, "after": {key: after[key] for key in keys}}
    return {
        **{name: refusals(both["before"], both["after"], kind) for name, kind in REFUSALS.items()},
        "cut_off": {name: cut_off(replies) for name, replies in both.items()},
        "words": {name: mean_words(replies) for name, replies in both.items()},
        "unpaired": len(before) + len(after) - 2 * len(keys),
        "without_kind": sum(row.kind is None for row in both["before"].values()),
    }


def _prompts(replies: Replies, keys: Iterable[str]) -> list[str]:
    return [replies[key].id for key in keys]


# --- in words -----------------------------------------------------------------------------------------------------


def headline(outcome: Mapping[str, Any]) -> str:
    """One sentence about an outcome, which claims only what an interval shows.

    Args:
        outcome: As `run.json` records it.
    """
    clauses = [*_win_clause(outcome), *_refusal_clauses(outcome)]
    if not clauses:
        return "The outcome has no figures."
    joined = clauses[0] if len(clauses) == 1 else f"{', '.join(clauses[:-1])}, and {clauses[-1]}"
    seen = "were not found in what the run trained on" if outcome.get("unchecked") else "the run did not train on"
    return f"On prompts that {seen}, {joined}."


def _win_clause(outcome: Mapping[str, Any]) -> list[str]:
    rate = outcome.get("win_rate")
    if rate is None:
        return []
    start, final, value = outcome["start"], outcome["final"], rate["value"]
    kind = kind_of_all(outcome)
    where = f" on {kind} prompts" if kind else ""
    if rate["low"] > 0.5:
        return [f"the replies of {final} win {value:.0%} of comparisons with those of {start}{where}"]
    if rate["high"] < 0.5:
        return [f"the replies of {start} win {1 - value:.0%} of comparisons with those of {final}{where}"]
    return [f"no difference in quality between {final} and {start}{where} is shown"]


def kind_of_all(outcome: Mapping[str, Any]) -> Kind | None:
    """The kind of all prompts that were compared, or None where there are several."""
    compared = outcome["win_rate"]["n"] if outcome.get("win_rate") else None
    counts = {kind: outcome[name]["n"] for name, kind in WIN_RATES.items() if outcome.get(name)}
    return next((kind for kind, count in counts.items() if count == compared), None)


def _refusal_clauses(outcome: Mapping[str, Any]) -> list[str]:
    changed, unchanged = [], []
    for name, kind in REFUSALS.items():
        found = outcome.get(name) or {}
        before, after, change = (found.get(part) for part in ("before", "after", "change"))
        if not (before and after and change):
            continue
        if change["low"] > 0 or change["high"] < 0:
            changed.append(f"{after['value']:.0%} of {kind} prompts are refused instead of {before['value']:.0%}")
        else:
            unchanged.append(kind)
    return [*changed, *([f"no change in refusals of {' or '.join(unchanged)} prompts is shown"] if unchanged else [])]


def points(change: Mapping[str, float]) -> str:
    """The interval of a change of a share in percentage points.

    >>> points({"value": 0.4, "low": -0.001, "high": 0.85})
    '0 to +85 points'
    """
    low, high = (round(100 * change[end]) for end in ("low", "high"))
    return f"{low and f'{low:+d}'} to {high and f'{high:+d}'} points"


def lines(outcome: Mapping[str, Any]) -> list[str]:
    """The figures of an outcome with their intervals, one line each."""
    found = []
    total = {} if kind_of_all(outcome) else {"win_rate": ""}
    for name, kind in {**total, **{name: f" {kind} prompts" for name, kind in WIN_RATES.items()}}.items():
        if rate := outcome.get(name):
            wins = f"{outcome['final']} wins {with_interval(rate, '.0%')}"
            found.append(f"{wins} of {rate['n']:,}{kind} against {outcome['start']}")
    for name, kind in REFUSALS.items():
        parts = outcome.get(name) or {}
        shares = [with_interval(e, ".0%") for e in (parts.get("before"), parts.get("after")) if e]
        if change := parts.get("change"):
            moved = points(change)
            found.append(
                f"refusals of {kind} prompts: {' -> '.join(shares)}, a change of {moved} on {change['n']:,} replies"
            )
    for name, what in LEFT_OUT.items():
        if count := outcome.get(name):
            found.append(f"{what}: {count:,}")
    if unchecked := outcome.get("unchecked"):
        found.append(f"training files that could not be searched for these prompts: {', '.join(unchecked)}")
    together = "those of eval compare hold for all its comparisons together and are wider"
    return [*found, f"95% intervals, each for itself; {together}"] if found else []
