"""Every stage, listed once. The command line, run files, estimates and docs/cli.md read this list."""

from collections.abc import Iterable, Mapping

from cai_cli.evaluate import compare, harm, hhh
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
    )
)
