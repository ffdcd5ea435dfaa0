"""The `outcome` of a run file: which steps tell what the run changed.

    outcome:
      win_rate: "@compare"                                # of the last model of this `eval compare` over the first
      refusals: {before: "@start-replies", after: "@final-replies"}

`win_rate` names a step of `eval compare`, `refusals` two steps that write replies to the same prompts. At the end of
the run the figures are computed (`evaluate.outcome`), recorded in `run.json` under `outcome`, and printed.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cai_cli.common import console
from cai_cli.common.errors import CaiError, InvalidRow, UsageError
from cai_cli.data.evaluation_schema import ModelComparison
from cai_cli.data.formats import sample_or_revision
from cai_cli.data.jsonl import read_prompts, read_rows, rows_of
from cai_cli.data.schema import Revision, Sample
from cai_cli.evaluate import outcome as figures
from cai_cli.evaluate.compare import name_files
from cai_cli.pipeline.plan import Step
from cai_cli.pipeline.run_file import Outcome
from cai_cli.runtime.manifest import read_manifest, write_json
from cai_cli.runtime.output_files import one_writer, sidecar


def check_outcome(outcome: Outcome | None, steps: Sequence[Step]) -> None:
    """Raises UsageError where an outcome names a step that the plan lacks, or one that does not fit."""
    if outcome:
        _steps_of(outcome, steps)


def _steps_of(outcome: Outcome, steps: Sequence[Step]) -> tuple[Step | None, Step | None, Step | None]:
    """The comparison, and the steps with the replies before and after. Raises UsageError."""
    by_name = {step.name: step for step in steps}

    def find(key: str, reference: str) -> Step:
        step = by_name.get(reference.removeprefix("@")) if reference.startswith("@") else None
        if step is None:
            variants = [name for name in by_name if name.startswith(f"{reference.removeprefix('@')}@")]
            hint = f"name one of @{', @'.join(variants)}" if variants else "it is written '@STEP'"
            raise UsageError(f"outcome: {key}: no step {reference!r}", hint=hint, code="unknown-step")
        return step

    compared = find("win_rate", outcome.win_rate) if outcome.win_rate else None
    if compared and compared.command != "eval compare":
        raise UsageError(f"outcome: win_rate: step {compared.name!r} is not of `eval compare`", code="invalid-run-file")
    if outcome.refusals is None:
        return compared, None, None
    both = [find(f"refusals: {key}", getattr(outcome.refusals, key)) for key in ("before", "after")]
    for step in both:
        if step.stage.writes not in (Sample, Revision):
            raise UsageError(f"outcome: refusals: step {step.name!r} writes no samples", code="invalid-run-file")
    if compared:
        _check_models(compared, both, steps)
    return compared, both[0], both[1]


def _check_models(compared: Step, both: Sequence[Step], steps: Sequence[Step]) -> None:
    """Raises UsageError where the refusals are those of other models than the first and the last of the comparison."""
    by_output = {str(step.output): step for step in steps}
    first, *_, last = name_files(compared.config.input).items()
    for key, of_refusals, (name, file) in zip(("before", "after"), both, (first, last), strict=True):
        step = by_output.get(file)
        if step and step.stage.writes in (Sample, Revision) and step.config.model != of_refusals.config.model:
            raise UsageError(
                f"outcome: refusals: {key}: the model of step {of_refusals.name!r} is not {name!r} of win_rate",
                hint="`before` belongs to the first model of the comparison, `after` to its last",
                code="invalid-run-file",
            )


def record_outcome(outcome: Outcome | None, steps: Sequence[Step], folder: Path) -> dict[str, Any] | None:
    """Compute the outcome of a finished run, record it at the end of `run.json`, and return it.

    Returns None where the run file has no outcome, and where it cannot be computed, which is printed: it must not fail
    a finished run.
    """
    if outcome is None:
        return None
    try:
        found = measure(outcome, steps, folder)
        with one_writer(folder / "run.json", f"the run in {folder}"):
            record = read_manifest(folder / "run.json") or {}
            write_json(folder / "run.json", {**{k: v for k, v in record.items() if k != "outcome"}, "outcome": found})
    except CaiError as error:
        console.error(f"the run finished, but not its outcome: {error.message}", error.hint)
        return None
    return found


def measure(outcome: Outcome, steps: Sequence[Step], folder: Path) -> dict[str, Any]:
    """The outcome as `run.json` records it. Raises CaiError where a file cannot be read."""
    compared, before, after = _steps_of(outcome, steps)
    trained, unchecked = _trained_on(steps)
    seen: set[str] = set()
    rows_left_out: set[str] = set()
    found: dict[str, Any] = {}
    if compared:
        replies = name_files(compared.config.input)
        start, *_, final = replies
        rows = [row for _, row in read_rows(str(compared.output), rows_of(ModelComparison))]
        seen |= {figures.prompt_id(row.prompt) for row in rows} & trained
        rows_left_out |= {row.prompt_id for row in rows if figures.prompt_id(row.prompt) in seen}
        found |= {
            "start": start,
            "final": final,
            "replies": {name: os.path.relpath(file, folder) for name, file in replies.items()},
            "judge": compared.config.pm or compared.config.judge,
            **figures.win_rates(rows, start, final, seen),
        }
    if before and after:
        tables = [_replies(step) for step in (before, after)]
        every = [row for table in tables for row in table.values()]
        seen |= {figures.prompt_id(row.prompt) for row in every} & trained
        rows_left_out |= {row.id for row in every if figures.prompt_id(row.prompt) in seen}
        unseen = [{k: row for k, row in t.items() if figures.prompt_id(row.prompt) not in seen} for t in tables]
        own = {step.name: os.path.relpath(step.output, folder) for step in (before, after)}
        found = {"start": before.name, "final": after.name, "replies": own, **found}
        found |= figures.of_replies(unseen[0], unseen[1])
    left_out = {"seen_in_training": len(seen), "seen_prompts": sorted(rows_left_out)}
    return {**found, **left_out, **({"unchecked": unchecked} if unchecked else {})}


def _replies(step: Step) -> Mapping[str, Sample]:
    return {row.key: row for _, row in read_rows(str(step.output), sample_or_revision)}


def _trained_on(steps: Sequence[Step]) -> tuple[set[str], list[str]]:
    """The ids of the prompts in the files that the training steps of a run read, and the files that cannot be read."""
    found: set[str] = set()
    unchecked: set[str] = set()
    for step in (step for step in steps if step.stage.trains):
        manifest = read_manifest(sidecar(step.output, "manifest.json")) or {}
        for file in map(str, (manifest.get("run", {}).get("inputs") or {}).values()):
            prompts, is_whole = _prompt_ids(file, step)
            found |= prompts
            if not is_whole:
                unchecked.add(file)
    return found, sorted(unchecked)


def _prompt_ids(file: str, step: Step) -> tuple[set[str], bool]:
    """The ids of the prompts in a file that a step read, and whether they are those of all its rows."""
    if not Path(file).is_file():
        return set(), False
    invalid: list[InvalidRow] = []
    columns = step.config.row_reader(of_input=file == step.config.input).columns
    rows = read_prompts(file, on_invalid=lambda error, _raw: invalid.append(error), columns=columns)
    return {figures.prompt_id(row.prompt) for _, row in rows}, not invalid or step.config.skip_invalid
