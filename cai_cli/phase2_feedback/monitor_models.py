"""Monitor models: a second preference model or judge that is not used as the reward (paper section 4.3).

A monitor's scores have no effect on training. A monitor score that falls while the reward rises reveals that the policy
exploits the preference model (Goodhart's law).
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
from cai_cli.judging.by_kind import votes_by_kind
from cai_cli.judging.judge import Judge
from cai_cli.judging.votes import Labeller, PairVerdict
from cai_cli.models.source import ModelSource
from cai_cli.prompting.base import assistant, resolve_prompt_format
from cai_cli.reward.scorer import Scorer, required_score
from cai_cli.runtime.cost import CHARACTERS_PER_TOKEN

# Prompts and their replies -> one score each.
ReplyScorer = Callable[[Sequence[Prompt], Sequence[str]], list[float]]
# Prompts, their replies and the start model's replies -> one score each; None where the monitor gave none.
MonitorScorer = Callable[[Sequence[Prompt], Sequence[str], Sequence[str]], list[float | None]]


@dataclass(frozen=True)
class MonitorModel:
    """A monitor model that is not loaded yet.

    Attributes:
        identity: What identifies it, for the manifest.
        path: Directory of a preference model, whose context window limits the prompts; None for a judge.
        open: Loads it.
    """

    identity: dict[str, Any]
    path: Path | None
    open: Callable[[], MonitorScorer]


def pick_monitor_model(
    monitor_pm: str | None,
    monitor_judge: str | None,
    base_url: Sequence[str] | None,
    pm: ModelSource | None,
    *,
    device: str,
    seed: int,
    dtype: str = "float32",
) -> MonitorModel | None:
    """The monitor model that the options name.

    Args:
        monitor_pm: Name of a preference model.
        monitor_judge: Name of a judge, an instruct model.
        base_url: Addresses of the judge's servers.
        pm: The preference model of the reward; None where there is none here: in `dpo`, or where only a server has it.
        device: Where a preference model runs.
        dtype: The precision of a preference model, by its name in torch, or "auto".
        seed: Random seed of the judge's votes.

    Returns:
        The model, or None where the options name none.

    Raises:
        UsageError: The options exclude each other, or the monitor is the preference model of the reward.
        CaiError: There is no such model.
    """
    if base_url and not monitor_judge:
        raise UsageError(
            "--base-url is the address of the judge's server, and there is no judge",
            hint="--monitor-judge openai:NAME",
            code="option-conflict",
        )
    if monitor_pm and monitor_judge:
        raise UsageError(
            "--monitor-pm and --monitor-judge exclude each other", hint="leave one out", code="option-conflict"
        )
    if monitor_pm:
        scorer = Scorer(monitor_pm, None, device, dtype=dtype)
        if pm and scorer.fingerprint == pm.fingerprint:
            raise UsageError(
                "--monitor-pm and --pm are the same model: a monitor must not be used as the reward",
                code="option-conflict",
            )
        return MonitorModel(scorer.identity(), scorer.path, lambda: _as_monitor(preference_score(scorer)))
    return _judge_as_monitor(monitor_judge, base_url, seed) if monitor_judge else None


def _judge_as_monitor(name: str, base_url: Sequence[str] | None, seed: int) -> MonitorModel:
    """A judge that compares each reply with the start model's under the shipped principles. Raises as its caller."""
    engine = open_engine(name, batch_size=None, device="auto", dtype="auto", server=Server(base_url))
    loaded = open_constitution(PreferenceConstitution, None, None)
    form = resolve_prompt_format("auto", engine)
    judge = Judge(engine, "choice", loaded.examples, form, seed, Sampling(), principles=loaded.principles)
    labeller = Labeller(judge, loaded.principles, per_pair=1, orders=("ab", "ba"))
    identity = {**engine.identity(), "constitution": loaded.fingerprint()}
    return MonitorModel(identity, None, lambda: lambda *replies: win_probabilities(labeller, *replies))


def judged_tokens(prompt_tokens: float, reply_tokens: float) -> float:
    """The tokens that a judge reads to compare two replies once."""
    examples = open_constitution(PreferenceConstitution, None, None).examples
    few_shot = sum(len(example.model_dump_json()) for example in examples) / CHARACTERS_PER_TOKEN
    return few_shot + prompt_tokens + 2 * reply_tokens


def preference_score(scorer: Scorer) -> ReplyScorer:
    """A preference model as a function of prompts and replies. A score is a logit.

    The function raises CaiError where a reply gets no score.

    Args:
        scorer: The preference model; it is loaded here.
    """
    scores_of = scorer.conversation_scores

    def score(prompts: Sequence[Prompt], replies: Sequence[str]) -> list[float]:
        conversations = [[*p.prompt, assistant(reply)] for p, reply in zip(prompts, replies, strict=True)]
        return [required_score(one) for one in scores_of(conversations, [prompt.key for prompt in prompts])]

    return score


def _as_monitor(score: ReplyScorer) -> MonitorScorer:
    return lambda prompts, replies, _: list(score(prompts, replies))


def win_probabilities(
    labeller: Labeller, prompts: Sequence[Prompt], replies: Sequence[str], start_replies: Sequence[str]
) -> list[float | None]:
    """The probability that each reply is better than the start model's reply, according to a judge.

    Args:
        labeller: The judge. It compares a pair in both orders under one principle: helpfulness where the prompt's kind
            is helpful, else one of the labeller's principles.
        prompts: The prompts.
        replies: The replies to them.
        start_replies: The start model's replies to them.

    Returns:
        One probability for each reply; 0.5 where it equals the start model's, None where the judge did not answer.
    """
    pairs, kinds = [], []
    for prompt, reply, start in zip(prompts, replies, start_replies, strict=True):
        if reply != start:
            a, b = [assistant(reply)], [assistant(start)]
            pairs.append(Pair(id=prompt.id, prompt=prompt.prompt, a=a, b=b, human=None, source=None))
            kinds.append(prompt.kind)
    verdicts = votes_by_kind(pairs, kinds, labeller)
    probabilities = (verdict.p_a if isinstance(verdict, PairVerdict) else None for verdict in verdicts)
    return [0.5 if reply == start else next(probabilities) for reply, start in zip(replies, start_replies, strict=True)]
