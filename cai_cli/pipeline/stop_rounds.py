"""When rounds end early: the monitor's score has not risen, or another round would exceed a budget.

The score of a round is the mean of what the monitor of `rl` or `dpo` gives the policy's replies to its held-out
prompts. Its rise is the mean change, prompt by prompt, from the model that the round started from; where a round starts
from another model than the one that the last round made, from the replies of the last round. The rounds go on only
where the 95% interval of the rise lies above 0, and the result is the model of the last round of which that is true.
Replies and scores are read from files, so a resumed run decides as one that was never interrupted.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

from cai_cli.common import console
from cai_cli.common.errors import UsageError
from cai_cli.data.jsonl import read_rows, rows_of
from cai_cli.data.schema import PolicySample
from cai_cli.metrics.intervals import Estimate, mean_estimate
from cai_cli.pipeline.estimate import estimate
from cai_cli.pipeline.plan import Step
from cai_cli.pipeline.rounds import Ending, Repeat
from cai_cli.pipeline.run_file import RunFile
from cai_cli.runtime.manifest import read_manifest
from cai_cli.runtime.output_files import sidecar
from cai_cli.runtime.step_names import round_of

MONITORS = ("monitor-pm", "monitor-judge")
Scores = Mapping[tuple[str, int], float]  # (prompt id, sample index) -> the monitor's score


def check_stops(run: RunFile, steps: Sequence[Step]) -> None:
    """Check the `stop` of every block of rounds.

    Args:
        run: The run file.
        steps: The steps of its plan.

    Raises:
        UsageError: A block cannot be stopped as its `stop` says.
    """
    for name, block in run.blocks.items():
        rounds = [
            (step, at[0]) for step in steps if (at := round_of(step.name)) and at[0].partition("@")[0] in block.steps
        ]
        if monitor := block.stop.monitor:
            _check_monitor(name, monitor, [step for step, base in rounds if base.partition("@")[0] == monitor], rounds)
        if block.stop.money and not any(step.settings.get(p) for step, _ in rounds for p in ("price-in", "price-out")):
            raise _cannot_stop(name, "no step has a price", "set price-in and price-out of the steps that ask a server")


def _check_monitor(name: str, monitor: str, policies: Sequence[Step], rounds: Sequence[tuple[Step, str]]) -> None:
    if not policies or not any(policies[0].settings.get(option) for option in MONITORS):
        why = f"{monitor!r} is not a step of the block that has a monitor"
        raise _cannot_stop(name, why, "`monitor` names a step of rl or dpo with monitor-pm or monitor-judge")
    if any("@" in base for _, base in rounds):
        raise _cannot_stop(name, "a list makes several policies", "remove the list, or `monitor` of `stop`")
    inside = {str(step.output) for step, _ in rounds}
    if any(str(policy.settings.get(option)) in inside for policy in policies for option in MONITORS):
        raise _cannot_stop(name, "the monitor is trained in the block", "a monitor is the same model in every round")


def _cannot_stop(block: str, why: str, hint: str) -> UsageError:
    return UsageError(f"rounds {block!r}: stop: {why}", hint=hint, code="invalid-run-file")


def round_ends(run: RunFile, steps: Sequence[Step]) -> dict[str, tuple[str, int]]:
    """The last step of each round -> its block and round."""
    blocks = {step: name for name, block in run.blocks.items() for step in block.steps}
    last: dict[tuple[str, int], str] = {}
    for step in steps:
        if at := round_of(step.name):
            last[blocks[at[0].partition("@")[0]], at[1]] = step.name
    return {step: at for at, step in last.items()}


def early_ends(run: RunFile, steps: Sequence[Step]) -> dict[str, str]:
    """The steps after which the rounds may end early -> why."""
    why = {}
    for step, (name, number) in round_ends(run, steps).items():
        stop = run.blocks[name].stop
        reasons = [f"the monitor's score of {stop.monitor} does not rise in round {number}"] if stop.monitor else []
        reasons += [f"another round would exceed {value:,g} {budget}" for budget, value in stop.budgets.items()]
        if reasons and number < run.blocks[name].repeat:
            why[step] = " or ".join(f"if {reason}" for reason in reasons)
    return why


class Rounds:
    """Decides after each round whether another one begins.

    Args:
        run: The run file.
        steps: The steps of its plan.
        replan: Makes the plan in which blocks end earlier.

    Attributes:
        reports: What is known about each block, as `run.json` records it.
    """

    def __init__(
        self, run: RunFile, steps: Sequence[Step], replan: Callable[[Mapping[str, Ending]], Sequence[Step]]
    ) -> None:
        self.run, self.steps, self.replan = run, steps, replan
        self.endings: dict[str, Ending] = {}
        self.reports: dict[str, dict[str, Any]] = {}
        self._ends = round_ends(run, steps)

    def after(self, step: Step, record: dict[str, Any]) -> Sequence[Step] | None:
        """Record the round that ends with `step`; returns the steps of the run where that changes them."""
        if step.name not in self._ends:
            return None
        name, number = self._ends[step.name]
        block = self.run.blocks[name]
        if number == 1:
            self.reports[name] = {"repeat": block.repeat, "ran": 0, "result": 1, "reason": None, "rounds": []}
        report = self.reports[name]
        entry: dict[str, Any] = {"round": number, **self._used(name, number, record)}
        if block.stop.monitor:
            entry |= monitor_of_round(self._policy(block, number), self._policy(block, number - 1))
        report["rounds"].append(entry)
        report["ran"] = number
        rose = not block.stop.monitor or bool(entry["rise"] and entry["rise"]["low"] > 0)
        report["result"] = number if rose else report["result"]
        report["reason"] = _why_not_risen(entry, number) if not rose else _exceeded(block, report["rounds"])
        record["rounds"] = {**record.get("rounds", {}), name: report}
        if number == block.repeat and report["result"] == number:
            report["reason"] = None
            return None
        if report["reason"] is None:
            return None
        console.say(
            f"rounds {name}: ended after round {number} of {block.repeat}: {report['reason']}; the result is that of "
            f"round {report['result']}"
        )
        self.endings[name] = Ending(number, report["result"])
        self.steps = self.replan(self.endings)
        return self.steps

    def _policy(self, block: Repeat, number: int) -> Step | None:
        return next((step for step in self.steps if step.name == f"{block.stop.monitor}@{number}"), None)

    def _used(self, name: str, number: int, record: Mapping[str, Any]) -> dict[str, float]:
        """Tokens, money and hours of a round. Tokens are counted where an engine counts them, and else estimated."""
        block = self.run.blocks[name]
        tokens = money = seconds = 0.0
        estimates = {e.step: e.tokens for e in estimate(self.steps)}
        for step in self.steps:
            at = round_of(step.name)
            if at is None or at[1] != number or at[0].partition("@")[0] not in block.steps:
                continue
            manifest = read_manifest(sidecar(step.output, "manifest.json")) or {}
            usage = (manifest.get("run") or {}).get("usage") or {}
            money += usage.get("cost") or 0.0
            seconds += record["steps"][step.name]["seconds"] or 0.0
            counted = (usage.get("prompt_tokens") or 0) + (usage.get("new_tokens") or 0)
            new = estimates[step.name]
            tokens += counted or new.prompt_tokens + new.new_tokens + new.trained_tokens
        return {"tokens": round(tokens), "money": money, "hours": seconds / 3600}


def _exceeded(block: Repeat, rounds: Sequence[Mapping[str, Any]]) -> str | None:
    """The budget that another round like the last one would exceed, as a reason; None where there is none."""
    for budget, limit in block.stop.budgets.items():
        used = sum(entry[budget] for entry in rounds)
        if used + rounds[-1][budget] > limit:
            return f"{used:,.3g} of {limit:,g} {budget} are used, and another round would exceed them"
    return None


def _why_not_risen(entry: Mapping[str, Any], number: int) -> str:
    if entry["rise"] is None:
        return f"the monitor gave no scores in round {number}"
    rise = entry["rise"]
    return (
        f"the monitor's score does not rise in round {number} "
        f"({rise['value']:+.3g}, 95%: {rise['low']:+.3g} to {rise['high']:+.3g}, n = {rise['n']:,})"
    )


def monitor_of_round(policy: Step | None, before: Step | None) -> dict[str, Estimate | None]:
    """The monitor's mean score of a policy and its rise, each with its interval over prompts.

    Args:
        policy: The step that trained the policy.
        before: The same step of the round before; None in the first round.
    """
    if policy is None:
        raise AssertionError("the block has been checked for its policy")
    start, end = _checked(policy)
    if before is not None and str(policy.settings.get("model")) != str(before.output):
        start = _checked(before)[1]
    both = [key for key in end if key in start]
    return {"monitor": _mean(end, list(end)), "rise": _mean({key: end[key] - start[key] for key in both}, both)}


def _checked(policy: Step) -> tuple[Scores, Scores]:
    """The scores of the start model's replies, and of those of the model that was kept."""
    rows = (row for _, row in read_rows(str(policy.output / "samples.jsonl"), rows_of(PolicySample)))
    checks = {step: list(group) for step, group in groupby(rows, key=lambda row: row.step)}
    manifest = read_manifest(sidecar(policy.output, "manifest.json")) or {}
    kept = (manifest.get("metrics") or {}).get("kept_step", max(checks))
    start, end = checks[0], checks.get(kept) or checks[max(checks)]
    return _scores(start), _scores(end)


def _scores(rows: Sequence[PolicySample]) -> Scores:
    return {(row.id, row.sample_index): row.monitor_score for row in rows if row.monitor_score is not None}


def _mean(scores: Scores, keys: Sequence[tuple[str, int]]) -> Estimate | None:
    """The mean over `keys`; None where there are fewer than two prompts, which determine no interval."""
    found = mean_estimate([scores[key] for key in keys], (-math.inf, math.inf), [prompt for prompt, _ in keys])
    return found if found and math.isfinite(found["low"]) else None
