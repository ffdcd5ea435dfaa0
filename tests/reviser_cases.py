"""Principles, and an engine that records requests, for the tests of critique and revision."""

from collections.abc import Sequence

from helpers import sample_row

from cai_cli.constitution.schema import CritiqueExample, CritiquePrinciple
from cai_cli.data.schema import Sample, load_row
from cai_cli.engines.base import Completion, GenerationRequest, LogprobRequest, RequestFailure, Sampling
from cai_cli.phase1_supervised.reviser import Reviser

PRINCIPLES = [CritiquePrinciple(id=i, critique=f"Critique by {i}.", revision=f"Revise by {i}.") for i in "abcd"]


class Recorder:
    """Answers with the next of its texts and records its requests."""

    batch_size = 64

    def __init__(self, *texts: str | RequestFailure) -> None:
        self.texts, self.requests = list(texts), list[GenerationRequest]()

    def identity(self) -> dict[str, object]:
        return {}

    def supports_chat(self) -> bool:
        return True

    def generate(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> list[Completion | RequestFailure]:
        self.requests += requests
        texts = [self.texts.pop(0) for _ in requests]
        return [t if isinstance(t, RequestFailure) else Completion(t, "stop") for t in texts]

    def option_logprobs(self, requests: Sequence[LogprobRequest]) -> list[list[float] | RequestFailure]:
        raise NotImplementedError


def reviser(engine: Recorder, temperature: float = 1.0, examples: Sequence[CritiqueExample] = ()) -> Reviser:
    return Reviser(engine, PRINCIPLES, examples, "chat", Sampling(temperature=temperature), seed=5)


def row(number: int = 1, index: int = 0) -> Sample:
    return load_row(Sample, sample_row(number, index))
