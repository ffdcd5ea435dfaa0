"""A judge as the monitor of `cai rl`: which principles it applies to which prompts."""

from collections.abc import Sequence
from unittest.mock import patch

from cai_cli.data.schema import Kind, Message, Prompt
from cai_cli.engines.base import LogprobRequest, RequestFailure
from cai_cli.engines.scripted import ScriptedEngine
from cai_cli.models.source import ModelSource
from cai_cli.phase2_feedback import monitor_models
from cai_cli.phase2_feedback.monitor_models import pick_monitor_model
from cai_cli.prompting.evaluation import HELPFULNESS

ANSWER, REFUSAL = "Boil it for six minutes.", "I can't help with that."


class Cautious(ScriptedEngine):
    """Prefers a refusal, except where it is asked for the more helpful reply; it does not read the prompt."""

    def __init__(self) -> None:
        self.batch_size = 8

    def option_logprobs(self, requests: Sequence[LogprobRequest]) -> list[list[float] | RequestFailure]:
        return [self._judged(str(request.text)) for request in requests]

    def _judged(self, question: str) -> list[float]:
        wanted = ANSWER if HELPFULNESS.comparison in question else REFUSAL
        return (
            [-0.1, -3.0] if question.rindex("(A)") < question.rindex(wanted) < question.rindex("(B)") else [-3.0, -0.1]
        )

    def identity(self) -> dict[str, str]:
        return {"engine": "cautious"}


def monitor_scores(kinds: Sequence[Kind | None], replies: Sequence[str], starts: Sequence[str]) -> list[float | None]:
    """The scores of the monitor that `--monitor-judge` opens."""
    with patch.object(monitor_models, "open_engine", lambda *_, **__: Cautious()):
        monitor = pick_monitor_model(None, "cautious", None, ModelSource.__new__(ModelSource), device="cpu", seed=0)
    assert monitor
    question = [Message(role="user", content="How long do I boil an egg?")]
    prompts = [Prompt(id=str(i), prompt=question, kind=kind, source=None) for i, kind in enumerate(kinds)]
    return monitor.open()(prompts, replies, starts)


def test_a_needless_refusal_of_a_helpful_prompt_lowers_the_monitors_score() -> None:
    refused, answered = monitor_scores(["helpful", "helpful"], [REFUSAL, ANSWER], [ANSWER, REFUSAL])
    assert refused is not None
    assert answered is not None
    assert refused < 0.1
    assert answered > 0.9


def test_red_team_prompts_and_prompts_without_a_kind_are_judged_by_the_constitution() -> None:
    scores = monitor_scores(["red-team", None, "helpful", None], [REFUSAL] * 4, [ANSWER, ANSWER, ANSWER, REFUSAL])
    assert [score is not None and score > 0.5 for score in scores] == [True, True, False, False]
    assert scores[3] == 0.5  # equal to the start model's reply
