"""Row types of a judge as the reward (`cai rl --judge`): rubrics of prompts, and the judge's answers."""

from typing import Self

from pydantic import Field, model_validator

from cai_cli.data.schema import Identified, Prompt, Row

MAX_WEIGHT = 1e6  # far beyond use, and sums of such weights stay finite


class RubricItem(Row):
    """One requirement on the replies to a prompt.

    Attributes:
        text: The requirement, a statement that a reply meets or fails.
        weight: Its weight in the reward; negative for what a reply should not do.
    """

    text: str = Field(pattern=r"\S")
    weight: float = Field(default=1.0, ge=-MAX_WEIGHT, le=MAX_WEIGHT, allow_inf_nan=False)


class RubricPrompt(Prompt):
    """A prompt whose replies are judged by requirements of its own (`cai rl --judge`)."""

    rubric: list[RubricItem] = Field(min_length=1)

    @model_validator(mode="after")
    def _has_a_weight(self) -> Self:
        if not any(item.weight for item in self.rubric):
            raise ValueError("the weight of every item of the rubric is 0")
        return self


class CriterionAnswer(Row):
    """The judge's answer about one principle or requirement.

    Attributes:
        criterion_id: The id of the principle, or `rubric-N`.
        log_odds: Of Yes in the positive and in the negated phrasing; for two replies, of the first one in both orders.
    """

    criterion_id: str
    log_odds: list[float] = Field(min_length=2, max_length=2)


class JudgedReplies(Identified):
    """What the judge answered about one reply to a prompt, or about two; `id` is the prompt's.

    Attributes:
        prompt_hash: The hash of the prompt's conversation.
        replies: The texts.
        answers: One for each criterion that was asked and answered.
        ends_batch: Whether it is the last one of the requests that were made together.
    """

    prompt_hash: str
    replies: list[str] = Field(min_length=1, max_length=2)
    answers: list[CriterionAnswer]
    ends_batch: bool
