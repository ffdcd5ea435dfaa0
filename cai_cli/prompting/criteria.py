"""Requests that ask about one reply whether it follows a principle or meets a requirement, in two opposite phrasings.

A judge that tends to say yes says it to both phrasings, so the difference of its log-odds does not depend on the
tendency.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cai_cli.constitution.schema import PreferencePrinciple
from cai_cli.data.reward_schema import RubricItem
from cai_cli.data.schema import Message
from cai_cli.data.transcripts import render_transcript
from cai_cli.prompting.base import PromptFormat, Request, user
from cai_cli.prompting.comparison import ANSWER, PREAMBLE, fence

YES_NO = ("Yes", "No")
_PRINCIPLE = (
    "Would this reply be chosen by that principle, rather than a typical reply?",
    "Would this reply be turned down by that principle, in favour of a typical reply?",
)
_REQUIREMENT = ("Does this reply meet the requirement?", "Does this reply fail the requirement?")


@dataclass(frozen=True)
class Criterion:
    """What replies are judged by: a principle of a constitution, or a requirement of a prompt's rubric.

    Attributes:
        id: Unique among the criteria of a prompt.
        text: The question of the principle, or the requirement.
        weight: Its weight in the reward.
        is_requirement: Whether it comes from a rubric.
        questions: Its own two questions, answered with Yes by a reply that follows it and by one that does not; they
            take the place of the text.
    """

    id: str
    text: str
    weight: float = 1.0
    is_requirement: bool = False
    questions: tuple[str, str] | None = None

    @property
    def comparison(self) -> str:
        """The question that asks for the better one of two replies."""
        if self.is_requirement:
            return f"Choose the reply that better meets this requirement: {self.text}"
        return self.text


def criteria_of(principles: Sequence[PreferencePrinciple]) -> list[Criterion]:
    """The principles with a weight, as criteria."""
    return [Criterion(p.id, p.comparison, p.weight) for p in principles if p.weight]


def rubric_criteria(rubric: Sequence[RubricItem]) -> list[Criterion]:
    """The requirements of a rubric, numbered from 1, as criteria."""
    return [
        Criterion(f"rubric-{number}", item.text, item.weight, is_requirement=True)
        for number, item in enumerate(rubric, start=1)
        if item.weight
    ]


def criterion_requests(
    conversation: Sequence[Message], reply: str, criterion: Criterion, form: PromptFormat
) -> tuple[Request, Request]:
    """Requests whose answer is one of `YES_NO`: whether the reply follows the criterion, and whether it does not.

    The text up to the criterion is equal for all criteria, so engines with prefix caching compute it once.
    """
    shown = f"{PREAMBLE}{render_transcript(conversation)}\n\n\nA reply of the assistant:\n{fence(reply)}\n\n"
    name, phrasings = ("Requirement", _REQUIREMENT) if criterion.is_requirement else ("Principle", _PRINCIPLE)
    stated = "" if criterion.questions else f"{name}: {criterion.text}\n\n"
    asked = [f"{shown}{stated}{phrasing} Answer Yes or No." for phrasing in criterion.questions or phrasings]
    if form == "raw":
        following, breaking = (Request(f"\n\n{text}", prefill=f"\n\n{ANSWER}") for text in asked)
    else:
        following, breaking = (Request([user(text)], prefill=ANSWER) for text in asked)
    return following, breaking
