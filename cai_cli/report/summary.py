"""The top of the page: what the run came to, what is missing from it, and where every row went."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cai_cli.constitution.usage import Drawn, drawn
from cai_cli.data.schema import Critique, Preference, Revision, Row
from cai_cli.report.collect import RunFiles, StepFiles, flat_figures, is_figure
from cai_cli.report.examples import last_revisions

# What a whole road has, and the command that adds what is not there.
ROAD = {
    ("sample",): "sampled replies (`cai sample`)",
    ("revise", "critique-revise"): "revisions (`cai critique-revise`)",
    ("sft",): "a fine-tuned model (`cai sft`)",
    ("label-prefs",): "AI preference labels (`cai label-prefs`)",
    ("train-pm",): "a preference model (`cai train-pm`)",
    ("rl",): "RL (`cai rl`)",
}


@dataclass(frozen=True)
class StageCounts:
    """Where the rows of one step went: in = out + rejected + skipped. `used` says that out are rows trained on."""

    step: StepFiles
    into: int
    out: int
    rejected: int
    skipped: int
    reasons: Sequence[tuple[str, int]]
    held_out: int | None


def flow(step: StepFiles) -> StageCounts | None:
    counts = step.counts
    if not counts:
        return None
    reasons = [*counts.get("rejected_reasons", {}).items(), *counts.get("skipped_reasons", {}).items()]
    out = counts["used"] if "used" in counts else counts["out"]
    return StageCounts(step, counts["in"], out, counts["rejected"], counts["skipped"], reasons, counts.get("held_out"))


def missing(run: RunFiles) -> list[str]:
    """What a whole road has and this run has not (or not finished)."""
    lacks = [text for stages, text in ROAD.items() if not any(s.status == "done" for s in run.of(*stages))]
    if not run.comparisons:
        lacks.append("models compared by Elo (`NAME.compare.json`)")
    return lacks


@dataclass(frozen=True)
class Headline:
    """One figure at the top. `value` is a number or a figure with its interval."""

    label: str
    value: Any
    note: str = ""


def headlines(run: RunFiles, labels: Mapping[str, Any] | None) -> list[Headline]:
    """`labels`: the audit of the one step that labelled; None where several did, or none."""
    found = []
    revised = [flow(step) for step in last_revisions(run) if step.status == "done"]
    if revised:
        found.append(Headline("replies revised", sum(f.out for f in revised if f)))
    compared = [flow(step) for step in run.of("label-prefs") if step.status == "done"]
    if compared:
        # Several steps may have labelled the same comparisons.
        what, note = ("labels", f"of {len(compared)} steps") if len(compared) > 1 else ("comparisons labelled", "")
        found.append(Headline(what, sum(f.out for f in compared if f), note))
    if labels and labels["flip_rate"]:
        found.append(Headline("labels that flip with the order", labels["flip_rate"]))
    for step in run.of("train-pm"):
        if is_figure(step.figures.get("accuracy")):
            found.append(Headline(f"held-out accuracy of {step.name}", step.figures["accuracy"]))
    for step in run.of("rl"):
        if step.figures.get("reward_before") is not None and step.figures.get("reward") is not None:
            change = f"from {step.figures['reward_before']:.3g} in the first step, in training"
            if step.figures.get("kept_step", step.figures["steps"]) != step.figures["steps"]:
                change += f"; of step {step.figures['kept_step']:,}, which is kept"
            found.append(Headline(f"preference score of {step.name}", step.figures["reward"], change))
    return found


def constitutions(run: RunFiles) -> list[tuple[StepFiles, Drawn]]:
    """Every constitution used, with its draws: by the last revisions (or critiques not revised yet), and by labels."""
    kinds: list[tuple[list[StepFiles], type[Row]]] = [
        (last_revisions(run), Revision),
        ([] if run.of("revise", "critique-revise") else run.of("critique"), Critique),
        (run.of("label-prefs"), Preference),
    ]
    found = [(step, drawn(run.rows(step, kind), step.manifest)) for steps, kind in kinds for step in steps]
    return [(step, d) for step, d in found if d]


def figure_rows(figures: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, value, value before training or None) of every number and interval of a manifest, by dotted name."""
    plain = dict(flat_figures(figures))
    return [
        (name, value, plain.get(f"{name}_before"))
        for name, value in plain.items()
        if name.removesuffix("_before") == name or name.removesuffix("_before") not in plain
    ]
