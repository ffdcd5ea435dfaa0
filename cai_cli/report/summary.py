"""The top of the page: the main results, the missing parts of the run, and the row counts of every step."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cai_cli.constitution.usage import PrincipleDraws, count_draws
from cai_cli.data.schema import Critique, Preference, Revision, Row
from cai_cli.report.collect import RunFiles, StepFiles, flat_metrics, is_estimate
from cai_cli.report.examples import last_revisions

# The parts of a complete run, and the command that adds each.
COMPLETE_RUN = {
    ("sample",): "sampled replies (`cai sample`)",
    ("revise", "critique-revise"): "revisions (`cai critique-revise`)",
    ("sft",): "a fine-tuned model (`cai sft`)",
    ("label-prefs", "pairs"): "AI preference labels (`cai label-prefs`)",
    ("train-pm",): "a preference model (`cai train-pm`)",
    ("rl", "dpo"): "RL (`cai rl`) or DPO (`cai dpo`)",
}


@dataclass(frozen=True)
class StageCounts:
    """The row counts of one step: into = out + rejected + skipped. For a training step, `out` are the rows used."""

    step: StepFiles
    into: int
    out: int
    rejected: int
    skipped: int
    reasons: Sequence[tuple[str, int]]
    held_out: int | None


def row_counts(step: StepFiles) -> StageCounts | None:
    """Return the row counts of a step, or None where its manifest has none."""
    counts = step.counts
    if not counts:
        return None
    reasons = [*counts.get("rejected_reasons", {}).items(), *counts.get("skipped_reasons", {}).items()]
    out = counts["used"] if "used" in counts else counts["out"]
    return StageCounts(step, counts["in"], out, counts["rejected"], counts["skipped"], reasons, counts.get("held_out"))


def missing(run: RunFiles) -> list[str]:
    """Return the parts of a complete run that this run lacks or has not finished."""
    absent = [
        text for stages, text in COMPLETE_RUN.items() if not any(s.status == "done" for s in run.steps_of(*stages))
    ]
    if not run.comparisons:
        absent.append("models compared by Elo (`NAME.compare.json`)")
    return absent


@dataclass(frozen=True)
class KeyMetric:
    """One main result. `value` is a number or an estimate."""

    label: str
    value: Any
    note: str = ""


def key_metrics(run: RunFiles, audit: Mapping[str, Any] | None) -> list[KeyMetric]:
    """Return the main results of a run.

    Args:
        run: The run.
        audit: The audit of its labels; None where the run has no labels, or several steps with labels.
    """
    return [*_row_metrics(run), *_label_metrics(audit), *_model_metrics(run)]


def _row_metrics(run: RunFiles) -> Iterator[KeyMetric]:
    revised = [row_counts(step) for step in last_revisions(run) if step.status == "done"]
    if revised:
        yield KeyMetric("replies revised", sum(counts.out for counts in revised if counts))
    labelled = [row_counts(step) for step in run.steps_of("label-prefs", "pairs") if step.status == "done"]
    if labelled:
        # Several steps may have labelled the same pairs.
        several = len(labelled) > 1
        name, note = ("labels", f"from {len(labelled)} steps") if several else ("pairs labelled", "")
        yield KeyMetric(name, sum(counts.out for counts in labelled if counts), note)


def _label_metrics(audit: Mapping[str, Any] | None) -> Iterator[KeyMetric]:
    if audit and (correlation := audit.get("between_orders")):
        ends = f"{correlation['low']:.2f} to {correlation['high']:.2f}; a judge that does not read the replies has 0"
        yield KeyMetric(
            "correlation of the judge's preferences in the two orders", round(correlation["value"], 2), ends
        )
    elif audit and audit["flip_rate"]:
        yield KeyMetric("judgements that flip with the order of the replies", audit["flip_rate"])


def _model_metrics(run: RunFiles) -> Iterator[KeyMetric]:
    for step in run.steps_of("train-pm", "dpo"):
        if is_estimate(step.metrics.get("accuracy")):
            yield KeyMetric(f"held-out accuracy of {step.name}", step.metrics["accuracy"])
    for step in run.steps_of("rl"):
        metrics = step.metrics
        for name, of in (("pm_score", "preference model"), ("judge_score", "judge's")):
            if metrics.get(f"{name}_before") is None or metrics.get(name) is None:
                continue
            change = f"{metrics[f'{name}_before']:.3g} before training, on held-out prompts"
            if metrics.get("kept_step", metrics["steps"]) != metrics["steps"]:
                change += f"; measured at step {metrics['kept_step']:,}, the step that was kept"
            yield KeyMetric(f"{of} score of {step.name}", metrics[name], change)


def constitutions(run: RunFiles) -> list[tuple[StepFiles, PrincipleDraws]]:
    """Return every constitution used, with its draws: by the last revisions (or unrevised critiques) and by labels."""
    kinds: list[tuple[list[StepFiles], type[Row]]] = [
        (last_revisions(run), Revision),
        ([] if run.steps_of("revise", "critique-revise") else run.steps_of("critique"), Critique),
        (run.steps_of("label-prefs", "pairs"), Preference),
    ]
    used = [(step, count_draws(run.rows(step, kind), step.manifest)) for steps, kind in kinds for step in steps]
    return [(step, d) for step, d in used if d]


def metric_rows(metrics: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (dotted name, value, value before training or None) of every number and estimate of a manifest."""
    by_name = dict(flat_metrics(metrics))
    return [
        (name, value, by_name.get(f"{name}_before"))
        for name, value in by_name.items()
        if name.removesuffix("_before") == name or name.removesuffix("_before") not in by_name
    ]
