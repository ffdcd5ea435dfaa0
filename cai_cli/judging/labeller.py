"""The labeller that a stage's options describe: a judge, its principles, and how often each pair is judged."""

from typing import Any

from cai_cli.common.errors import UsageError
from cai_cli.constitution.draw import select
from cai_cli.constitution.options import ConstitutionOptions
from cai_cli.constitution.schema import PreferenceConstitution, open_constitution
from cai_cli.engines.base import Sampling
from cai_cli.judging.base import Order
from cai_cli.judging.judge import Judge
from cai_cli.judging.methods import Method
from cai_cli.judging.votes import Labeller
from cai_cli.prompting.base import resolve_prompt_format
from cai_cli.runtime.config import Option, option, redefine
from cai_cli.runtime.cost import CHARACTERS_PER_TOKEN, RowFlow, StepCost, TokenCounts
from cai_cli.runtime.shared_options import RequestOptions, SamplingOptions


class JudgeOptions(RequestOptions, SamplingOptions, ConstitutionOptions):
    """How pairs are judged."""

    method: Method = option(
        Method.CHOICE,
        "How the judge compares: by the log-probabilities of (A) and (B), after chain of thought, by contrast of two "
        "characters, or by a verdict in words.",
    )
    principles_per_pair: str = option(
        "1", "Principles drawn for each pair, whose votes are averaged: a number, or all."
    )
    calibrate: bool = option(
        False,
        "Subtract the judge's A/B bias, estimated on content-free pairs.",
        Option(flags=("--calibrate/--no-calibrate",)),
    )
    clamp: str | None = option(
        None,
        "Limits of a label's probability, after its votes are averaged; by default 0.4,0.6 for cot, else none.",
        Option(metavar="LOW,HIGH"),
    )
    cot_samples: int = option(1, "Chains of thought per comparison, averaged.", ge=1)
    max_new_tokens: int = redefine(SamplingOptions, "max_new_tokens", 128)

    @property
    def limits(self) -> tuple[float, float]:
        """The limits of `--clamp`; by default 0.4 and 0.6 for cot (paper section 4.1), else 0 and 1."""
        if self.clamp is None:
            return (0.4, 0.6) if self.method is Method.COT else (0.0, 1.0)
        try:
            low, high = (float(part) for part in self.clamp.split(","))
        except ValueError:
            low, high = 1.0, 0.0
        if not 0 <= low <= 0.5 <= high <= 1:
            raise UsageError(
                f"--clamp must be LOW,HIGH with 0 <= LOW <= 0.5 <= HIGH <= 1, not {self.clamp!r}",
                code="invalid-option",
            )
        return low, high

    def check(self) -> None:
        super().check()
        if self.calibrate and self.method is not Method.CHOICE:
            raise UsageError(f"--calibrate needs --method choice, not {self.method}", code="option-conflict")
        if self.method is Method.CONTRAST and self.few_shot not in (None, "none"):
            raise UsageError(
                "--method contrast uses no examples, so --few-shot would have no effect", code="option-conflict"
            )
        if self.cot_samples > 1 and self.method is not Method.COT:
            raise UsageError("--cot-samples needs --method cot", code="option-conflict")
        if self.clamp is not None:
            _ = self.limits

    def votes_per_pair(self, both_orders: bool) -> int:
        """How many votes each pair gets. Raises UsageError, CaiError."""
        requested = self.principles_per_pair
        in_use = len(self._principles()) if requested == "all" or not requested.isdecimal() else int(requested)
        orders = 2 if both_orders and self.method is not Method.CONTRAST else 1
        return in_use * orders * self.cot_samples

    def _principles(self) -> list[Any]:
        loaded = open_constitution(PreferenceConstitution, self.constitution, self.few_shot)
        return select(loaded.principles, self.principles, self.max_principles)


def principles_per_pair(requested: str, in_use: int) -> int:
    """`--principles-per-pair` as a number.

    Args:
        requested: A number, or `all`.
        in_use: How many principles there are to draw from.

    Raises:
        UsageError: It is neither, or more than there are.
    """
    if requested == "all":
        return in_use
    if not requested.isdecimal() or not 1 <= int(requested) <= in_use:
        raise UsageError(
            f"--principles-per-pair must be all or a number from 1 to {in_use}, not {requested!r}",
            hint=f"{in_use} principles are in use",
            code="invalid-option",
        )
    return int(requested)


def open_labeller(
    config: JudgeOptions, model: str, *, both_orders: bool, min_confidence: float = 0.5
) -> tuple[Labeller, PreferenceConstitution]:
    """The labeller that the options describe, and its constitution.

    Args:
        config: The options.
        model: Name of the model that judges.
        both_orders: Whether each pair is judged in both orders.
        min_confidence: Pairs with a lower `p_chosen` are rejected.

    Raises:
        UsageError: Options that exclude each other.
        CaiError: The constitution cannot be read.
    """
    loaded = open_constitution(PreferenceConstitution, config.constitution, config.few_shot)
    chosen = select(loaded.principles, config.principles, config.max_principles)
    per_pair = principles_per_pair(config.principles_per_pair, len(chosen))
    engine = config.open_engine(model)
    form = resolve_prompt_format(config.prompt_format, engine)
    # A verdict is decoded greedily: sampling noise would look like uncertainty of the judge.
    temperature = 0.0 if config.method is Method.VERDICT else config.temperature
    sampling = Sampling(config.max_new_tokens, temperature, config.top_p)
    judge = Judge(
        engine,
        config.method,
        loaded.examples,
        form,
        config.seed,
        sampling,
        config.limits,
        config.calibrate,
        principles=chosen,
    )
    # A contrast scores each reply alone, so there is no order to vary.
    orders: tuple[Order, ...] = ("ab", "ba") if both_orders and config.method is not Method.CONTRAST else ("ab",)
    return Labeller(judge, chosen, per_pair, orders, config.cot_samples, min_confidence), loaded


def labeller_settings(config: JudgeOptions, labeller: Labeller) -> dict[str, Any]:
    """The options as a manifest records them."""
    judge = labeller.judge
    return config.settings(
        prompt_format=judge.prompt_format, clamp=list(judge.clamp), principles_per_pair=labeller.per_pair
    )


def estimate_votes(pairs: int, rows: RowFlow, config: JudgeOptions, *, both_orders: bool) -> StepCost:
    """The cost of judging this many pairs of the replies in `rows`, every rationale as long as allowed."""
    votes = pairs * config.votes_per_pair(both_orders)
    each = rows.prompt_tokens + 2 * rows.reply_tokens
    if config.method is not Method.CONTRAST:
        examples = open_constitution(PreferenceConstitution, config.constitution, config.few_shot).examples
        each += sum(len(example.model_dump_json()) for example in examples) / CHARACTERS_PER_TOKEN
    new = config.max_new_tokens if config.method in (Method.COT, Method.VERDICT) else 0
    # A contrast scores each reply under both characters; a chain of thought is written, then its letter is scored.
    requests = 2 * votes if config.method in (Method.CONTRAST, Method.COT) else votes
    after = RowFlow(pairs, 1, rows.prompt_tokens, rows.reply_tokens, texts=2)
    return StepCost(pairs, requests, TokenCounts(requests * each, votes * new), after)
