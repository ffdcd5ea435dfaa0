"""Row types of the evaluations (`cai eval`): published questions, answers to them, comparisons, harm scores."""

from typing import Literal, Self

from pydantic import Field, model_validator

from cai_cli.data.schema import Identified, Kind, Message, Row, Sample, Vote, content_hash, load_row


class EvaluationQuestion(Identified):
    """A multiple-choice question of the published evaluations (HHH and others).

    Attributes:
        prompt: The question as text; one of the options continues it.
        corrects: The correct options.
        incorrects: The incorrect options.
        text_correct: The conversation that ends with the correct answer, for a preference model.
        text_incorrect: The conversation that ends with the incorrect answer.
        source: The data set that the question comes from.
    """

    prompt: str = Field(min_length=1)
    corrects: list[str] = Field(min_length=1)
    incorrects: list[str] = Field(min_length=1)
    text_correct: str | None = None
    text_incorrect: str | None = None
    source: str | None = None

    @model_validator(mode="after")
    def _options_differ(self) -> Self:
        if not all(self.options) or len(set(self.options)) < len(self.options):
            raise ValueError("the options must differ, and none may be empty")
        return self

    @property
    def options(self) -> list[str]:
        """All options in alphabetical order, which is that of their letters in the prompt."""
        return sorted([*self.corrects, *self.incorrects])


def parse_question(value: object) -> EvaluationQuestion:
    """An EvaluationQuestion. Published questions have no id; they get the hash of their content.

    Raises:
        RowError: The value is not a valid EvaluationQuestion row.
    """
    if isinstance(value, dict) and value.get("id") is None:
        value = {**value, "id": content_hash(value)}
    return load_row(EvaluationQuestion, value)


class OptionScores(Row):
    """The model's answer to one form of a question.

    Attributes:
        options: The options as the prompt showed them.
        correct: Whether each option is correct.
        p: The probability of each option, normalised over the options.
    """

    options: list[str]
    correct: list[bool]
    p: list[float]


class EvaluationResult(Identified):
    """How a model answered one evaluation question.

    Attributes:
        askings: One entry for each form in which the question was put.
        p_correct: The probability of the correct options, averaged over `askings`.
        right: Whether the most probable option is correct; false on a tie with an incorrect one.
        tie: Whether a correct and an incorrect option are equally probable.
        source: The data set that the question comes from.
    """

    askings: list[OptionScores] = Field(min_length=1)
    p_correct: float = Field(ge=0, le=1)
    right: bool
    tie: bool
    source: str | None


class ModelComparison(Identified):
    """Replies of two models to one prompt, compared by a preference model or a judge.

    Attributes:
        prompt_id: The id of the prompt.
        sample_index: The number of the compared replies among those of their models, from 0.
        prompt: The conversation that both replies continue.
        kind: The kind of the prompt.
        model_a: The name of one model.
        model_b: The name of the other.
        a: The reply of `model_a`, as one assistant message.
        b: The reply of `model_b`.
        score_a: The score of `a` (a logit) if a preference model compared them, else null.
        score_b: The score of `b`.
        p_a: The probability that `a` is better. A tie is 0.5; equal replies are a tie and are not sent to the judge.
        votes: The judge's votes, in which order "ab" means that `a` was shown first; empty with a preference model.
    """

    prompt_id: str
    sample_index: int
    prompt: list[Message] = Field(min_length=1)
    kind: Kind | None
    model_a: str
    model_b: str
    a: list[Message] = Field(min_length=1, max_length=1)
    b: list[Message] = Field(min_length=1, max_length=1)
    score_a: float | None
    score_b: float | None
    p_a: float = Field(ge=0, le=1)
    votes: list[Vote]


class HarmScore(Sample):
    """A reply with a judge's rating of its harmfulness (paper section 4.5).

    Attributes:
        harm: The expected level, from 0 (none) to 4.
        levels: The probabilities of the levels 0, 1, 2, 3 and 4.
    """

    harm: float = Field(ge=0, le=4)
    levels: list[float] = Field(min_length=5, max_length=5)


class JudgedTurn(Row):
    """What the judge answered about one reply of a conversation.

    Attributes:
        finish_reason: How the reply ended, as in a Sample.
        log_odds: Of Yes to the two questions of `AdherenceResult.questions`, in nats; null where one was not answered.
        p_violation: The probability that the reply breaks the principle, from half the difference of the two.
        human: Whether a person says that it breaks the principle; null in what the command writes.
    """

    finish_reason: str | None
    log_odds: list[float] | None = Field(min_length=2, max_length=2)
    p_violation: float | None = Field(ge=0, le=1)
    human: bool | None = None

    @property
    def violation(self) -> float | None:
        """1 for a reply that breaks the principle, 0 for one that does not, 0.5 where the judge is undecided."""
        if self.p_violation is None:
            return None
        return 0.5 if self.p_violation == 0.5 else float(self.p_violation > 0.5)


class AdherenceResult(Identified):
    """A conversation of one model in a test of a principle; `id` is `MODEL SCENARIO/CONVERSATION`.

    Attributes:
        model: The name of the model.
        principle_id: The principle.
        scenario: The scenario, `PRINCIPLE/NUMBER`.
        conversation: The scenario and the number of this conversation in it, which two models have in common.
        questions: The questions about each reply that are answered with Yes where it breaks the principle, and where it
            follows it.
        messages: The conversation, without the system prompt: the user's messages and the model's replies by turns.
        pressure: Who wrote the user's messages after the first.
        turns: What the judge answered about each reply.
    """

    model: str
    principle_id: str
    scenario: str
    conversation: str
    questions: list[str] = Field(min_length=2, max_length=2)
    messages: list[Message] = Field(min_length=2)
    pressure: Literal["scripted", "attacker"]
    turns: list[JudgedTurn] = Field(min_length=1)

    @model_validator(mode="after")
    def _has_a_turn_for_each_reply(self) -> Self:
        if [m.role for m in self.messages] != ["user", "assistant"] * len(self.turns):
            raise ValueError("messages must alternate between the user and the assistant, with one turn a reply")
        return self

    @property
    def violations(self) -> list[float]:
        """`JudgedTurn.violation` of every reply that the judge answered about."""
        return [found for turn in self.turns if (found := turn.violation) is not None]


RefusalLabel = Literal["compliance", "full_refusal", "partial_refusal"]
Safety = Literal["safe", "unsafe"]


class LabelledReply(Sample):
    """A reply with whether it answers.

    Attributes:
        safety: Whether the prompt is safe to answer; null where the input does not say.
        label: What the wording shows.
        judged: The judge's most probable label; null without a judge.
        p_labels: The judge's probabilities of `compliance`, `full_refusal` and `partial_refusal`.
    """

    safety: Safety | None
    label: RefusalLabel
    judged: RefusalLabel | None = None
    p_labels: list[float] | None = None
