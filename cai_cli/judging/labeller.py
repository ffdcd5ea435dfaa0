"""Opens the labeller that the options of a command describe."""

from collections.abc import Mapping, Sequence
from typing import Any

from cai_cli.common.errors import UsageError
from cai_cli.constitution.draw import select
from cai_cli.constitution.schema import PreferenceConstitution, PreferencePrinciple, open_constitution
from cai_cli.engines import engine_of
from cai_cli.engines.base import Sampling
from cai_cli.judging.judge import METHODS, Judge, Order
from cai_cli.judging.votes import Labeller
from cai_cli.prompting.base import resolve_prompt_format
from cai_cli.runtime.manifest import settings_of


def pick_per_pair(wanted: str, principles: Sequence[PreferencePrinciple]) -> int:
    """`--principles-per-pair` as a number. Raises UsageError."""
    if wanted == "all":
        return len(principles)
    if not wanted.isdecimal() or not 1 <= int(wanted) <= len(principles):
        raise UsageError(
            f"--principles-per-pair must be all or a number from 1 to {len(principles)}, not {wanted!r}",
            hint=f"{len(principles)} principles are in use",
        )
    return int(wanted)


def pick_clamp(wanted: str | None, method: str) -> tuple[float, float]:
    """`--clamp LOW,HIGH`; by default 0.4,0.6 for cot (paper section 4.1), else none. Raises UsageError."""
    if wanted is None:
        return (0.4, 0.6) if method == "cot" else (0.0, 1.0)
    try:
        low, high = (float(part) for part in wanted.split(","))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low <= 0.5 <= high <= 1:
        raise UsageError(f"--clamp must be LOW,HIGH with 0 <= LOW <= 0.5 <= HIGH <= 1, not {wanted!r}")
    return low, high


def open_labeller(flags: Mapping[str, Any]) -> tuple[Labeller, PreferenceConstitution]:
    """The judge that the options of a command describe, and the constitution it goes by.

    Raises UsageError, CaiError.
    """
    method, calibrate, cot_samples = flags["method"], flags["calibrate"], flags["cot_samples"]
    if method not in METHODS:
        raise UsageError(f"--method must be one of {', '.join(METHODS)}, not {method!r}")
    if calibrate and method != "choice":
        raise UsageError(f"--calibrate needs --method choice, not {method}")
    if method == "contrast" and flags["few_shot"] not in (None, "none"):
        raise UsageError("--method contrast shows the judge no examples, so --few-shot would do nothing")
    if cot_samples > 1 and method != "cot":
        raise UsageError("--cot-samples needs --method cot")
    limits = pick_clamp(flags["clamp"], method)
    loaded = open_constitution(PreferenceConstitution, flags["constitution"], flags["few_shot"])
    chosen = select(loaded.principles, flags["principles"], flags["max_principles"])
    per_pair = pick_per_pair(flags["principles_per_pair"], chosen)
    engine = engine_of(flags)
    form = resolve_prompt_format(flags["prompt_format"], engine)
    # A verdict is read greedily: noise of sampling would be taken for the judge's doubt.
    temperature = 0.0 if method == "verdict" else flags["temperature"]
    sampling = Sampling(flags["max_new_tokens"], temperature, flags["top_p"])
    judge = Judge(engine, method, loaded.examples, form, flags["seed"], sampling, limits, calibrate)
    # The order in which replies are shown means nothing to a contrast: nobody is shown two.
    orders: tuple[Order, ...] = ("ab", "ba") if flags["both_orders"] and method != "contrast" else ("ab",)
    return Labeller(judge, chosen, per_pair, orders, cot_samples, flags["min_confidence"]), loaded


def labeller_settings(flags: Mapping[str, Any], labeller: Labeller) -> dict[str, Any]:
    """`flags` as a manifest records them."""
    judge = labeller.judge
    return settings_of(flags, prompt_format=judge.form, clamp=list(judge.clamp), principles_per_pair=labeller.per_pair)
