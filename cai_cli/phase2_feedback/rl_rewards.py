"""The reward of `cai rl`: the score of a preference model (paper section 4.1), of a judge (`rl_judge`), or of both.

Each is standardised by its own scores of the start model's replies (`reward_normalizer`), and their weighted sum is the
reward. A reply for which one of them is missing, because a request to the judge failed, has no reward: TRL leaves it
out of the baseline of its prompt and sets its advantage to 0, so a failed request never becomes a number.

A judge runs in rank 0, so that its answers are in one file and the replies to a prompt are together. A server is asked
as soon as the replies are sampled, while the trainer computes their log-probabilities and the preference model scores
them. TRL's async reward functions would start only after both, and run beside one another alone.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

from cai_cli.common.errors import CaiError
from cai_cli.data.reply_ends import CUT_OFF
from cai_cli.data.schema import Message, PolicySample, Prompt, conversation_id
from cai_cli.engines.thoughts import reply_of
from cai_cli.engines.tokenization import PromptEncoder, decode_reply
from cai_cli.judging.constitution_judge import ConstitutionJudge, JudgeCounts
from cai_cli.phase2_feedback.monitor_models import ReplyScorer
from cai_cli.phase2_feedback.reward_normalizer import RewardNormalizer, judge_normalizer, reward_normalizer, spread_of
from cai_cli.training import distributed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Chat = list[dict[str, str]]
Scores = Sequence[float | None]
# Prompts, their replies and the start model's replies -> one raw score each; None where there is none.
CheckScorer = Callable[[Sequence[Prompt], Sequence[str], Sequence[str]], Scores]


@dataclass(frozen=True)
class RewardSource:
    """One part of the reward.

    Attributes:
        name: "pm" or "judge".
        check: Scores the replies of a check.
        weight: Its weight in the reward.
    """

    name: str
    check: CheckScorer
    weight: float = 1.0

    def raw(self, row: PolicySample) -> float | None:
        """The score that a row of a check stores."""
        return row.judge_score if self.name == "judge" else row.score

    def normalizer(self, rows: Sequence[PolicySample]) -> RewardNormalizer:
        """The normalizer that the start model's replies determine.

        Raises:
            CaiError: A preference model scores the replies to each prompt alike (`cannot-distinguish`).
        """
        return (judge_normalizer if self.name == "judge" else reward_normalizer)(rows, self.raw)


def preference_source(score: ReplyScorer) -> RewardSource:
    """A preference model as a part of the reward."""
    return RewardSource("pm", lambda prompts, replies, _: score(prompts, replies))


def judge_source(judge: ConstitutionJudge, weight: float) -> RewardSource:
    """A judge as a part of the reward. Raises CaiError at a check where every request fails."""

    def check(prompts: Sequence[Prompt], replies: Sequence[str], starts: Sequence[str]) -> Scores:
        found = judge.rewards(prompts, [reply.strip() for reply in replies], [start.strip() for start in starts])
        raise_if_all_failed(judge.counts)
        return found

    return RewardSource("judge", check, weight)


def raise_if_all_failed(counts: JudgeCounts) -> None:
    """Raise CaiError where every request to the judge failed."""
    if counts.requests and counts.failed == counts.requests:
        raise CaiError(
            f"rl: all {counts.requests:,} requests to the judge failed: {counts.reason}",
            hint="its answers so far are kept; run the same command again to resume",
            code="request-failed",
        )


def weighted_sum(
    values: Mapping[str, float | None], sources: Sequence[RewardSource], normalizers: Mapping[str, RewardNormalizer]
) -> float | None:
    """The reward of a reply from its raw scores by source; None where one is missing."""
    total = 0.0
    for source in sources:
        value = values[source.name]
        if value is None:
            return None
        total += source.weight * normalizers[source.name](value)
    return total


def reward_of(
    row: PolicySample, sources: Sequence[RewardSource], normalizers: Mapping[str, RewardNormalizer]
) -> float | None:
    """The reward of a stored reply, without the penalty of a cut; None where a part of it is missing."""
    return weighted_sum({source.name: source.raw(row) for source in sources}, sources, normalizers)


def mean_rewards(
    rows: Sequence[PolicySample], sources: Sequence[RewardSource], normalizers: Mapping[str, RewardNormalizer]
) -> dict[str, float | None]:
    """The metrics of a check: the mean of each part of the reward over the replies that have it, standardised, and the
    share of replies to which the judge gave none."""
    means: dict[str, float | None] = {}
    for source in sources:
        known = [raw for row in rows if (raw := source.raw(row)) is not None]
        means[f"{source.name}_score"] = normalizers[source.name](fmean(known)) if known else None
        if source.name == "judge":
            means["held_out_no_reward_share"] = 1 - len(known) / len(rows)
    return means


@dataclass
class RewardFunction:
    """The reward function for TRL's trainers. Thoughts are trained, but not scored.

    Attributes:
        sources: The parts of the reward.
        normalizers: Returns the normalizers by source, which are known when training begins.
        tokenizer: The policy's tokenizer.
        ends: Token ids that end a reply; a reply that ends otherwise was cut off.
        cutoff_penalty: Subtracted from the reward of a reply that was cut off.
        score: The preference model, or None. Every rank scores its own replies.
        judge: The judge, or None. Rank 0 asks it about the replies of all ranks.
        prompts: The prompts of the run, which the judge needs with their kind and rubric.
    """

    sources: Sequence[RewardSource]
    normalizers: Callable[[], Mapping[str, RewardNormalizer]]
    tokenizer: "PreTrainedTokenizerBase"
    ends: frozenset[int]
    cutoff_penalty: float
    score: ReplyScorer | None = None
    judge: ConstitutionJudge | None = None
    prompts: Sequence[Prompt] = ()
    __name__ = "reward"  # TRL names its metrics by it
    _started: "Future[tuple[list[float | None], JudgeCounts]] | None" = field(default=None, init=False)

    def __call__(
        self,
        prompts: list[Chat],
        completion_ids: list[list[int]],
        log_metric: Callable[[str, float], None],
        **_: Any,
    ) -> list[float | None]:
        texts, cut = self._texts(completion_ids)
        raw: dict[str, Scores] = {}
        if self.score:
            raw["pm"] = self.score([Prompt(id="-", prompt=messages_of(prompt)) for prompt in prompts], texts)
        judged, counts = self._judged(prompts, completion_ids) if self.judge else ([], None)
        first = distributed.rank() * len(prompts)
        if self.judge:
            raw["judge"] = judged[first : first + len(prompts)]
        normalizers = self.normalizers()
        scores = [
            weighted_sum({name: values[i] for name, values in raw.items()}, self.sources, normalizers)
            for i in range(len(prompts))
        ]
        if counts:
            self._log_judge(distributed.gathered(prompts), judged, counts, log_metric)
        if len(self.sources) > 1:
            for name, values in raw.items():
                standardised = [normalizers[name](value) for value in distributed.gathered(values) if value is not None]
                if standardised:
                    log_metric(f"{name}_reward", fmean(standardised))
        _log_scores(distributed.gathered(list(zip(scores, cut, strict=True))), log_metric)
        return [
            None if score is None else score - self.cutoff_penalty * was_cut
            for score, was_cut in zip(scores, cut, strict=True)
        ]

    def start(self, prompts: list[Chat], completion_ids: list[list[int]]) -> None:
        """Ask a judge on a server about replies that were just sampled, while the trainer works. Called on every rank;
        the next call of the reward is about these replies."""
        if self.judge is None or self.judge.model.engine.usage is None:  # a local judge would compete with the trainer
            return
        everything = distributed.gathered(list(zip(prompts, completion_ids, strict=True)))
        if distributed.is_rank_zero():
            self._started = self._pool.submit(self._ask, everything)

    def close(self) -> None:
        """Cancel the requests in flight, and close the judge."""
        if self.judge:
            self.judge.close()
            self._pool.shutdown(cancel_futures=True)

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1)

    @cached_property
    def _known_prompts(self) -> Mapping[str, Prompt]:
        return {conversation_id(prompt.prompt): prompt for prompt in self.prompts}

    @cached_property
    def _opened(self) -> str:
        return PromptEncoder(self.tokenizer).opened

    def _texts(self, completion_ids: list[list[int]]) -> tuple[list[str], list[bool]]:
        """The replies without thoughts, and whether each was cut off."""
        # Decoded as in `cai sample`; TRL's own texts keep an end of turn that is not a special token.
        replies = [decode_reply(self.tokenizer, ids, self.ends) for ids in completion_ids]
        return [reply_of(text, self._opened) for text, _ in replies], [reason == CUT_OFF for _, reason in replies]

    def _judged(self, prompts: list[Chat], completion_ids: list[list[int]]) -> tuple[list[float | None], JudgeCounts]:
        """The judge's scores of the replies of all ranks, in the order of ranks."""
        started, self._started = self._started, None
        everything = [] if started else distributed.gathered(list(zip(prompts, completion_ids, strict=True)))
        found = distributed.from_rank_zero(lambda: started.result() if started else self._ask(everything))
        raise_if_all_failed(found[1])
        return found

    def _ask(self, replies: list[tuple[Chat, list[int]]]) -> tuple[list[float | None], JudgeCounts]:
        assert self.judge  # noqa: S101
        texts, _ = self._texts([ids for _, ids in replies])
        asked = [self._known_prompts[conversation_id(messages_of(chat))] for chat, _ in replies]
        return self.judge.rewards(asked, [text.strip() for text in texts]), self.judge.counts

    def _log_judge(
        self, prompts: Sequence[Chat], judged: Scores, counts: JudgeCounts, log_metric: Callable[[str, float], None]
    ) -> None:
        # `pairs` asks nothing where the replies to each prompt are equal.
        log_metric("judge_failed_share", counts.failed / max(1, counts.requests))
        if counts.answers:
            log_metric("judge_alike_share", counts.alike / counts.answers)
        of_prompts = groupby(zip(prompts, judged, strict=True), key=lambda judged: judged[0])
        groups = [[score for _, score in group if score is not None] for _, group in of_prompts]
        if (spread := spread_of(groups)) is not None:
            log_metric("judge_spread", spread)


def _log_scores(replies: Sequence[tuple[float | None, bool]], log_metric: Callable[[str, float], None]) -> None:
    """Log the mean and the standard deviation of the scores of all ranks, before penalties, and two shares."""
    if known := [score for score, _ in replies if score is not None]:
        log_metric("score", fmean(known))
        log_metric("score_std", pstdev(known))
    log_metric("no_reward_share", 1 - len(known) / len(replies))
    log_metric("cut_off_share", fmean(was_cut for _, was_cut in replies))


def messages_of(chat: Chat) -> list[Message]:
    """The messages of a chat as TRL passes it."""
    return [Message.model_validate(message) for message in chat]


def with_early_rewards(trainer_class: Any, start: Callable[[list[Chat], list[list[int]]], None]) -> Any:
    """A subclass of the trainer that calls `start` with the prompts and the replies as soon as these are sampled."""

    class EarlyRewards(trainer_class):  # type: ignore[misc]
        def _tokenize_prompts(self, prompts: list[Chat]) -> Any:
            self._chats = prompts
            return super()._tokenize_prompts(prompts)

        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            generated = super()._generate_single_turn(*args, **kwargs)
            start(self._chats, generated[0] if isinstance(generated, tuple) else generated)
            return generated

    return EarlyRewards
