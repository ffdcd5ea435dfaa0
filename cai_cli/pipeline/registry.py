"""Every stage, listed once. The command line, run files, estimates and docs/cli.md read this list."""

from collections.abc import Iterable, Mapping
from typing import Any, get_args, get_origin

from cai_cli.evaluate import adherence, bench, compare, harm, hhh, refusals
from cai_cli.phase1_supervised import critique, critique_revise, red_team, revise, sample, sft
from cai_cli.phase2_feedback import dpo, label_prefs, pairs, rl, score, train_pm
from cai_cli.runtime.stage import Stage


def by_name(stages: Iterable[Stage]) -> Mapping[str, Stage]:
    """The stages by the names of their commands."""
    return {stage.name: stage for stage in stages}


STAGES = by_name(
    (
        red_team.STAGE,
        sample.STAGE,
        critique.STAGE,
        revise.STAGE,
        critique_revise.STAGE,
        sft.STAGE,
        label_prefs.STAGE,
        pairs.STAGE,
        train_pm.STAGE,
        score.STAGE,
        rl.STAGE,
        dpo.STAGE,
        hhh.STAGE,
        compare.STAGE,
        harm.STAGE,
        refusals.STAGE,
        adherence.STAGE,
        bench.STAGE,
    )
)


def takes_many(command: object) -> frozenset[str]:
    """The options of a command that take several values, so that a list for them is not a sweep."""
    stage = STAGES.get(str(command))
    if stage is None:
        return frozenset()
    options = stage.config.options()
    lists = {name for name, (field, _) in options.items() if list in _origins(field.annotation)}
    return frozenset(option for option, name in stage.config.option_names().items() if name in lists)


def _origins(annotation: Any) -> set[Any]:
    """The types that an annotation names, without their parameters: {list, NoneType} for `list[str] | None`."""
    return {get_origin(one) or one for one in (annotation, *get_args(annotation))}
