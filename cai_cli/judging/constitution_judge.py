"""A constitution as the reward: a judge is asked about every reply by every principle (RLAIF without a preference
model; Lee et al. 2023, arXiv 2309.00267).

The reward of a reply is a mean over the principles, by their weights, of log-odds in nats:

- `questions`: the judge is asked about one reply whether the principle would choose it, and whether it would turn it
  down. The log-odds are half the difference of its log-odds of Yes, in which a tendency to say yes cancels.
- `pairs`: the judge compares the replies to a prompt with one another, each pair in both orders. The log-odds of a pair
  are half the difference of those of the first reply, in which a position bias cancels; a reply gets the mean over its
  pairs.

A prompt's rubric (Gunjal et al. 2025, arXiv 2507.17746) takes the place of the constitution. Replies to prompts of the
kind "helpful" are judged by helpfulness, as in `cai eval compare`.
"""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import groupby

from cai_cli.constitution.schema import PreferencePrinciple
from cai_cli.data.reward_schema import CriterionAnswer, JudgedReplies, RubricPrompt
from cai_cli.data.schema import Pair, Prompt, conversation_id
from cai_cli.engines.base import LogprobRequest, RequestFailure
from cai_cli.judging.answer_cache import AnswerCache, LogOddsPair
from cai_cli.judging.base import FeedbackModel
from cai_cli.prompting.base import assistant
from cai_cli.prompting.criteria import YES_NO, Criterion, criteria_of, criterion_requests, rubric_criteria
from cai_cli.prompting.evaluation import HELPFULNESS


class JudgeMethod(StrEnum):
    """How the judge of the reward is asked."""

    QUESTIONS = "questions"
    PAIRS = "pairs"


@dataclass(frozen=True)
class JudgedItem:
    """One reply to a prompt, or two to compare."""

    prompt: Prompt
    replies: tuple[str, ...]


@dataclass
class JudgeCounts:
    """What the judge was asked for one set of replies, including what it had answered before.

    Attributes:
        requests: Number of requests, two for each criterion.
        failed: Those that got no answer.
        answers: Criteria with an answer to both requests.
        alike: Those where the judge said the same to both phrasings, or chose the same position in both orders.
        reason: Why the first of the failed requests got no answer.
    """

    requests: int = 0
    failed: int = 0
    answers: int = 0
    alike: int = 0
    reason: str = ""


@dataclass
class ConstitutionJudge:
    """A judge with its criteria.

    Attributes:
        model: The judge, and how comparisons are shown to it.
        principles: The constitution.
        method: How it is asked.
        cache: Its answers so far.
        counts: Those of the last call of `rewards`.
    """

    model: FeedbackModel
    principles: Sequence[PreferencePrinciple]
    method: JudgeMethod = JudgeMethod.QUESTIONS
    cache: AnswerCache = field(default_factory=AnswerCache)
    counts: JudgeCounts = field(default_factory=JudgeCounts)

    def criteria(self, prompt: Prompt) -> list[Criterion]:
        """What the replies to a prompt are judged by."""
        if isinstance(prompt, RubricPrompt):
            return rubric_criteria(prompt.rubric)
        return criteria_of([HELPFULNESS] if prompt.kind == "helpful" else self.principles)

    def rewards(
        self, prompts: Sequence[Prompt], replies: Sequence[str], others: Sequence[str] | None = None
    ) -> list[float | None]:
        """The reward of each reply in nats; None where a request that it depends on failed.

        Args:
            prompts: The prompts; equal ones in succession form a group.
            replies: The replies to them.
            others: The replies that `pairs` compares with, in the same order and groups; by default `replies`. A reply
                is not compared with the one in its own place.
        """
        self.counts = JudgeCounts()
        if self.method is JudgeMethod.QUESTIONS:
            asked = [JudgedItem(prompt, (reply,)) for prompt, reply in zip(prompts, replies, strict=True)]
            return [None if isinstance(found, RequestFailure) else found for found in self.log_odds(asked)]
        return self._paired(prompts, replies, replies if others is None else others)

    def log_odds(self, asked: Sequence[JudgedItem]) -> list[float | RequestFailure]:
        """The weighted mean of the log-odds over the criteria of each item; the first failure where one is missing."""
        return [
            parts if isinstance(parts, RequestFailure) else self.mean(item.prompt, parts)
            for item, parts in zip(asked, self.parts(asked), strict=True)
        ]

    def mean(self, prompt: Prompt, parts: Mapping[str, float]) -> float:
        """The mean of the log-odds by criterion of a reply to the prompt, by weight."""
        criteria = self.criteria(prompt)
        weights = math.fsum(abs(criterion.weight) for criterion in criteria)
        return math.fsum(criterion.weight * parts[criterion.id] for criterion in criteria) / weights

    def parts(self, asked: Sequence[JudgedItem]) -> list[dict[str, float] | RequestFailure]:
        """The log-odds of each item by criterion; the first failure where one is missing. Known answers are reused."""
        unknown = list(dict.fromkeys(_identity(item) for item in asked if self._missing(item)))
        by_identity = {_identity(item): item for item in asked}
        failures = self._ask_all([by_identity[identity] for identity in unknown])
        return [self._parts(item, failures.get(_identity(item), {})) for item in asked]

    def close(self) -> None:
        """Cancel requests in flight and close the cache. The judge cannot be used afterwards."""
        self.model.engine.close()
        self.cache.close()

    def _parts(self, item: JudgedItem, failures: dict[str, list[RequestFailure]]) -> dict[str, float] | RequestFailure:
        parts, failed = {}, None
        for criterion in self.criteria(item.prompt):
            self.counts.requests += 2
            if (sides := self._known(criterion, item)) is None:
                self.counts.failed += len(failures[criterion.id])
                failed = failed or failures[criterion.id][0]
                self.counts.reason = self.counts.reason or failed.reason
                continue
            self.counts.answers += 1
            self.counts.alike += sides[0] * sides[1] > 0
            parts[criterion.id] = (sides[0] - sides[1]) / 2
        return failed or parts

    def _known(self, criterion: Criterion, item: JudgedItem) -> LogOddsPair | None:
        return self.cache.answer(criterion.id, conversation_id(item.prompt.prompt), item.replies)

    def _missing(self, item: JudgedItem) -> list[Criterion]:
        return [criterion for criterion in self.criteria(item.prompt) if self._known(criterion, item) is None]

    def _ask_all(self, items: Sequence[JudgedItem]) -> dict[tuple[str, ...], dict[str, list[RequestFailure]]]:
        """Ask what is missing, and keep the answers; returns the failures of each item by criterion."""
        engine = self.model.engine
        size = engine.batch_size
        batches = [items[start : start + size] for start in range(0, len(items), size)]
        if engine.workers == 1:
            failures = [self._ask(batch) for batch in batches]
        else:  # of a server: an answer is kept as soon as it is there
            with ThreadPoolExecutor(engine.workers) as pool:
                failures = list(pool.map(self._ask, batches))
        found = [failed for of_batch in failures for failed in of_batch]
        return {_identity(item): failed for item, failed in zip(items, found, strict=True)}

    def _ask(self, items: Sequence[JudgedItem]) -> list[dict[str, list[RequestFailure]]]:
        missing = [self._missing(item) for item in items]
        requests = [
            request
            for item, of_item in zip(items, missing, strict=True)
            for criterion in of_item
            for request in self._requests(item, criterion)
        ]
        answers = iter(self.model.engine.option_logprobs(requests))
        rows, failures = [], []
        for item, of_item in zip(items, missing, strict=True):
            found, failed = [], {}
            for criterion in of_item:
                sides = [yes_log_odds(next(answers)) for _ in range(2)]
                log_odds = [side for side in sides if not isinstance(side, RequestFailure)]
                if len(log_odds) == 2:
                    found.append(CriterionAnswer(criterion_id=criterion.id, log_odds=log_odds))
                else:
                    failed[criterion.id] = [side for side in sides if isinstance(side, RequestFailure)]
            failures.append(failed)
            if found:
                rows.append((item, found))
        self.cache.add(
            [
                JudgedReplies(
                    id=item.prompt.id,
                    prompt_hash=conversation_id(item.prompt.prompt),
                    replies=list(item.replies),
                    answers=found,
                    ends_batch=number == len(rows),
                )
                for number, (item, found) in enumerate(rows, start=1)
            ]
        )
        return failures

    def _requests(self, item: JudgedItem, criterion: Criterion) -> list[LogprobRequest]:
        """The two requests about an item: in both phrasings, or in both orders."""
        prompt = item.prompt
        if len(item.replies) == 1:
            asked = criterion_requests(prompt.prompt, item.replies[0], criterion, self.model.prompt_format)
            return [LogprobRequest(request.text, YES_NO, request.prefill, prompt.key) for request in asked]
        first, second = item.replies
        a, b = [assistant(first)], [assistant(second)]
        pair = Pair(id=prompt.id, prompt=prompt.prompt, a=a, b=b, human=None, source=None)
        principle = PreferencePrinciple(id=criterion.id, comparison=criterion.comparison)
        return [self.model.multiple_choice(pair, principle, order) for order in ((first, second), (second, first))]

    def _paired(self, prompts: Sequence[Prompt], replies: Sequence[str], others: Sequence[str]) -> list[float | None]:
        groups = [
            [index for index, _ in group]
            for _, group in groupby(enumerate(prompts), key=lambda numbered: conversation_id(numbered[1].prompt))
        ]
        # Sorted, so that a pair is asked once whichever of its replies comes first.
        pairs = [(i, j) for group in groups for i in group for j in group if i != j]
        sides = {(i, j): tuple(sorted((replies[i], others[j]))) for i, j in pairs}
        asked = {
            (conversation_id(prompts[i].prompt), texts): JudgedItem(prompts[i], texts)
            for (i, _), texts in sides.items()
            if texts[0] != texts[1]
        }
        found = dict(zip(asked, self.log_odds(list(asked.values())), strict=True))
        of_reply: dict[int, list[float | None]] = {i: [] for i in range(len(replies))}
        for (i, _), texts in sides.items():
            pair = found.get((conversation_id(prompts[i].prompt), texts), 0.0)
            of_reply[i].append(_oriented(pair, replies[i], texts))
        return [_mean(values) for values in of_reply.values()]


def _oriented(found: float | RequestFailure, reply: str, sides: tuple[str, ...]) -> float | None:
    """The log-odds that `reply` is the better one of the pair; 0 for two equal replies."""
    if isinstance(found, RequestFailure):
        return None
    return found if reply == sides[0] else -found


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean; None where there is no value, or one is missing."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else None


def _identity(item: JudgedItem) -> tuple[str, ...]:
    return (conversation_id(item.prompt.prompt), *item.replies)


def yes_log_odds(answer: list[float] | RequestFailure) -> float | RequestFailure:
    """The log-odds of the first of two options; a failure where they are not numbers."""
    if isinstance(answer, RequestFailure):
        return answer
    odds = answer[0] - answer[1]
    return odds if math.isfinite(odds) else RequestFailure("the judge's log-probabilities are not numbers")
