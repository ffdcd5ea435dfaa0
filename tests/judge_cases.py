"""Comparisons, and an engine that records requests, for the tests of judges."""

from collections.abc import Sequence

from cai_cli.constitution.schema import ComparisonExample, PreferencePrinciple
from cai_cli.data.schema import Pair
from cai_cli.engines.base import Completion, GenerationRequest, LogprobRequest, RequestFailure, Sampling
from cai_cli.engines.scripted import ScriptedEngine
from cai_cli.judging.base import PairComparison
from cai_cli.judging.judge import Judge
from cai_cli.prompting.base import PromptFormat, assistant, user

KIND = PreferencePrinciple(id="kind", comparison="Which is kinder?", following="Be kind.", breaking="Be rude.")
TRUE = PreferencePrinciple(id="true", comparison="Which is truer?", following="Be true.", breaking="Lie.")
EXAMPLE = ComparisonExample(
    messages=[user("1 + 1?")],
    comparison=None,
    options=["two", "three"],
    answer="A",
    rationale="Sums are known.",
)
SAMPLING = Sampling(max_new_tokens=7)


class Recorder(ScriptedEngine):
    """Gives the planned answers in order, and records the requests."""

    def __init__(
        self, scores: Sequence[list[float] | RequestFailure] = (), replies: Sequence[Completion | RequestFailure] = ()
    ) -> None:
        self.scores, self.replies = list(scores), list(replies)
        self.questions: list[LogprobRequest] = []
        self.asks: list[GenerationRequest] = []
        self.samplings: list[Sampling] = []

    def option_logprobs(self, requests: Sequence[LogprobRequest]) -> list[list[float] | RequestFailure]:
        self.questions += requests
        taken, self.scores = self.scores[: len(requests)], self.scores[len(requests) :]
        return taken

    def generate(self, asks: Sequence[GenerationRequest], sampling: Sampling) -> list[Completion | RequestFailure]:
        self.asks += asks
        self.samplings.append(sampling)
        return self.replies


def pair(number: int) -> Pair:
    return Pair(
        id=f"p{number}", prompt=[user(f"question {number}")], a=[assistant(f"left {number}")],
        b=[assistant(f"right {number}")], human=None, source=None,
    )  # fmt: skip


# Both orders, two principles, two pairs and two rationales: no two alike in anything that counts.
COMPARISONS = [
    PairComparison(pair(0), KIND, "ab"),
    PairComparison(pair(0), KIND, "ba", 1),
    PairComparison(pair(1), TRUE, "ab", 2),
]
ORDERED_REPLIES = [("left 0", "right 0"), ("right 0", "left 0"), ("left 1", "right 1")]


def judge(engine: Recorder, method: str, form: PromptFormat = "chat", **settings: bool) -> Judge:
    return Judge(engine, method, [EXAMPLE], form, 3, SAMPLING, **settings)
