"""Second opinions on a policy in training: a preference model or judge that the reward never asks (paper section 4.3).

A watcher's scores decide nothing in training; that they fall while the reward rises is how Goodharting is seen.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cai_cli.common.errors import UsageError
from cai_cli.constitution.schema import PreferenceConstitution, open_constitution
from cai_cli.data.schema import Pair, Prompt
from cai_cli.engines import open_engine
from cai_cli.engines.base import Sampling, Server
from cai_cli.judging.judge import Judge
from cai_cli.judging.votes import Labeller, PairVerdict, aggregate_votes
from cai_cli.models.source import ModelSource
from cai_cli.prompting.base import assistant, resolve_prompt_format
from cai_cli.reward.preference_model import open_for_scores, score_conversations

Score = Callable[[Sequence[Prompt], Sequence[str]], list[float]]
# Prompts, their replies and the start model's replies -> one score each; None where the watcher gave none.
MonitorScore = Callable[[Sequence[Prompt], Sequence[str], Sequence[str]], list[float | None]]


@dataclass(frozen=True)
class MonitorModel:
    """`identity` is for the manifest, `path` a preference model's (its context window counts), `open` loads it."""

    identity: dict[str, Any]
    path: Path | None
    open: Callable[[], MonitorScore]


def pick_monitor_model(
    monitor_pm: str | None, monitor_judge: str | None, base_url: str | None, pm: ModelSource, *, device: str, seed: int
) -> MonitorModel | None:
    """The watcher that the options name. Raises UsageError, and CaiError when there is no such model."""
    if base_url and not monitor_judge:
        raise UsageError("--base-url is where the judge is asked", hint="--monitor-judge openai:NAME")
    if monitor_pm and monitor_judge:
        raise UsageError("--monitor-pm and --monitor-judge are two watchers; one is watched", hint="leave one out")
    if monitor_pm:
        base = ModelSource.resolve(monitor_pm)
        if base.fingerprint == pm.fingerprint:
            raise UsageError("--monitor-pm is the model that --pm trains against: a watcher must be another")
        return MonitorModel(
            {"fingerprint": base.fingerprint}, base.path, lambda: _watching(preference_score(base.path, device))
        )
    if monitor_judge:
        engine = open_engine(monitor_judge, batch_size=None, device="auto", dtype="auto", server=Server(base_url))
        loaded = open_constitution(PreferenceConstitution, None, None)
        judge = Judge(engine, "choice", loaded.examples, resolve_prompt_format("auto", engine), seed, Sampling())
        labeller = Labeller(judge, loaded.principles, per_pair=1, orders=("ab", "ba"))
        identity = {**engine.identity(), "constitution": loaded.fingerprint()}
        return MonitorModel(identity, None, lambda: lambda *given: judged(labeller, *given))
    return None


def preference_score(path: Path, device: str, batch_size: int = 16) -> Score:
    """A preference model as a function of prompts and replies; a score is a logit."""
    model, tokenizer = open_for_scores(path, device)

    def score(prompts: Sequence[Prompt], replies: Sequence[str]) -> list[float]:
        conversations = [[*p.prompt, assistant(reply)] for p, reply in zip(prompts, replies, strict=True)]
        return score_conversations(model, tokenizer, conversations, batch_size)

    return score


def _watching(score: Score) -> MonitorScore:
    return lambda prompts, replies, _: list(score(prompts, replies))


def judged(
    labeller: Labeller, prompts: Sequence[Prompt], replies: Sequence[str], starts: Sequence[str]
) -> list[float | None]:
    """The probability that each reply is better than the start model's, the mean of both orders under one principle; a
    reply that is the start model's is as good as it. None where the judge did not answer."""
    pairs = []
    for prompt, reply, start in zip(prompts, replies, starts, strict=True):
        if reply != start:
            sides = {"a": [assistant(reply)], "b": [assistant(start)]}
            pairs.append(Pair(id=prompt.id, prompt=prompt.prompt, **sides, human=None, source=None))
    opinions = (
        opinion.p_a if isinstance(opinion, PairVerdict) else None for opinion in aggregate_votes(pairs, labeller)
    )
    return [0.5 if reply == start else next(opinions) for reply, start in zip(replies, starts, strict=True)]
