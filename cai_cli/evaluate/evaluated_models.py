"""The models that `cai eval hhh` evaluates, and how each answers a question (paper sections 2 and 4.1)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Protocol

from cai_cli.common.errors import RowError
from cai_cli.data.evaluation_schema import EvaluationQuestion, OptionScores
from cai_cli.data.schema import Message
from cai_cli.data.transcripts import joined_turns, parse_transcript
from cai_cli.engines.base import Engine, LogprobRequest, RequestFailure
from cai_cli.models.loading import context_window
from cai_cli.prompting.base import PromptFormat
from cai_cli.prompting.evaluation import evaluation_request, parse_published_comparison, published_comparison
from cai_cli.reward.preference_model import encode_conversation, score_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class EvaluatedModel(Protocol):
    """The model under evaluation: a language model or a preference model."""

    def check(self, question: EvaluationQuestion) -> None:
        """Raise RowError if the model cannot answer this kind of question."""
        ...

    def answer(self, questions: Sequence[EvaluationQuestion]) -> list[list[OptionScores] | RequestFailure]:
        """Return the probabilities of the options of each question, in order; one entry for each order of them."""
        ...


@dataclass(frozen=True)
class LanguageModel:
    """Answers by the log-probability of each option as the continuation of the prompt.

    Attributes:
        engine: The model.
        prompt_format: How prompts are built.
        both_orders: Whether each comparison is put in both orders of its replies.
    """

    engine: Engine
    prompt_format: PromptFormat
    both_orders: bool

    def check(self, question: EvaluationQuestion) -> None:
        if self.both_orders:
            exchanged(question)

    def answer(self, questions: Sequence[EvaluationQuestion]) -> list[list[OptionScores] | RequestFailure]:
        groups = [[q, exchanged(q)] if self.both_orders else [q] for q in questions]
        answers = iter(self.engine.option_logprobs([self._request(q) for group in groups for q in group]))
        return [_option_scores(group, list(islice(answers, len(group)))) for group in groups]

    def _request(self, question: EvaluationQuestion) -> LogprobRequest:
        request = evaluation_request(question.prompt, self.prompt_format)
        return LogprobRequest(request.text, tuple(question.options), request.prefill, question.id)


def _option_scores(
    questions: Sequence[EvaluationQuestion], answers: Sequence[list[float] | RequestFailure]
) -> list[OptionScores] | RequestFailure:
    scores = []
    for question, answer in zip(questions, answers, strict=True):
        if isinstance(answer, RequestFailure):
            return answer
        if any(map(math.isnan, answer)):
            return RequestFailure("the log-probabilities of the options are not numbers")
        correct = [option in question.corrects for option in question.options]
        scores.append(OptionScores(options=question.options, correct=correct, p=normalised(answer)))
    return scores


def normalised(logprobs: Sequence[float]) -> list[float]:
    """Return probabilities that sum to 1 over the options (paper section 4.1).

    Args:
        logprobs: Natural log-probabilities of the options.

    Examples:
        >>> [round(p, 2) for p in normalised([-1.0, -1.0, -1000.0])]
        [0.5, 0.5, 0.0]
    """
    top = max(logprobs)
    weights = [math.exp(value - top) for value in logprobs]
    return [weight / math.fsum(weights) for weight in weights]


def exchanged(question: EvaluationQuestion) -> EvaluationQuestion:
    """Return the same comparison with its two replies exchanged.

    Raises:
        RowError: The question does not compare exactly two replies.
    """
    hint = "leave out --both-orders"
    if len(question.corrects) != 1 or len(question.incorrects) != 1:
        count = len(question.options)
        raise RowError(f"--both-orders needs two options, this question has {count}", hint, code="option-conflict")
    try:
        conversation, comparison, replies = parse_published_comparison(question.prompt)
    except RowError as error:
        raise RowError(error.message, hint, code=error.code) from None
    prompt = published_comparison(conversation, comparison, replies[::-1])
    changed = {"prompt": prompt, "corrects": question.incorrects, "incorrects": question.corrects}
    return question.model_copy(update=changed)


@dataclass(frozen=True)
class PreferenceModel:
    """Answers by the scores of the two conversations."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    batch_size: int

    def check(self, question: EvaluationQuestion) -> None:
        _conversations(question)

    def answer(self, questions: Sequence[EvaluationQuestion]) -> list[list[OptionScores] | RequestFailure]:
        encoded = [self._encode(question) for question in questions]
        fitting = [ids for pair in encoded if not isinstance(pair, RequestFailure) for ids in pair]
        scores = iter(score_ids(self.model, self.tokenizer, fitting, self.batch_size))
        return [
            e if isinstance(e, RequestFailure) else [_scores_as_options(next(scores), next(scores))] for e in encoded
        ]

    def _encode(self, question: EvaluationQuestion) -> list[list[int]] | RequestFailure:
        try:
            pair = [encode_conversation(self.tokenizer, c, self.model.reading) for c in _conversations(question)]
        except RowError as error:
            return RequestFailure(error.message)
        longest, window = max(map(len, pair)), context_window(self.model.config, self.tokenizer)
        if longest > window:
            return RequestFailure(f"does not fit the context window of {window}: {longest} tokens")
        return pair


def _conversations(question: EvaluationQuestion) -> list[list[Message]]:
    texts = (question.text_correct, question.text_incorrect)
    if None in texts:
        raise RowError("a preference model needs text_correct and text_incorrect", code="invalid-row")
    return [joined_turns(parse_transcript(text)) for text in texts if text is not None]


def _scores_as_options(correct: float, incorrect: float) -> OptionScores:
    return OptionScores(
        options=["text_correct", "text_incorrect"], correct=[True, False], p=normalised([correct, incorrect])
    )
