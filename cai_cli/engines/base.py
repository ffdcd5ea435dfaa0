"""What a stage may ask of whoever answers: text (`generate`) and option log-probabilities (`score`).

A second engine is one new file with a class of this shape and one line in `open_engine`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from cai_cli.data.schema import Message

# A chat, or raw text for base models. `GenerationRequest.prefill` is put at the start of the answer in both forms.
Text = str | Sequence[Message]


@dataclass(frozen=True)
class Sampling:
    """How to draw tokens. `temperature` 0 is greedy; `top_p` 1 keeps the whole distribution."""

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True)
class GenerationRequest:
    """One text to complete. `seed` alone decides its sampling noise; `stop` strings end the text and are cut off.
    `row` is the key of the row that it is asked for, for messages."""

    text: Text
    seed: int
    prefill: str = ""
    stop: tuple[str, ...] = ()
    row: str = ""


@dataclass(frozen=True)
class Completion:
    """`finish_reason`: "stop" (end of turn or a stop string) or "length" (cut at max_new_tokens).

    The cue is no part of `text`.
    """

    text: str
    finish_reason: str
    prompt_tokens: int = 0
    new_tokens: int = 0


@dataclass(frozen=True)
class LogprobRequest:
    """Options whose log-probabilities as continuations of `text` + `prefill` are wanted. `row` as of an Ask."""

    text: Text
    options: tuple[str, ...]
    prefill: str = ""
    row: str = ""


@dataclass(frozen=True)
class RequestFailure:
    """The engine could not answer one request, and why. Never turned into data."""

    reason: str


@dataclass(frozen=True)
class Server:
    """Where an OpenAI-compatible server is and what it may be asked. None takes the default.

    `timeout`: seconds for one request with its retries. `price_in`, `price_out`: per million tokens, any currency.
    """

    base_url: str | None = None
    concurrency: int | None = None
    timeout: float | None = None
    budget_tokens: int | None = None
    price_in: float | None = None
    price_out: float | None = None


@dataclass
class Usage:
    """What a server was asked for one output, over all runs that made it. Prices: per million tokens."""

    base_url: str
    price_in: float | None = None
    price_out: float | None = None
    requests: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    models: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.new_tokens

    @property
    def cost(self) -> float | None:
        """None unless a price was given."""
        if self.price_in is None and self.price_out is None:
            return None
        return (self.prompt_tokens * (self.price_in or 0) + self.new_tokens * (self.price_out or 0)) / 1e6

    def add(self, model: str, prompt_tokens: int, new_tokens: int) -> bool:
        """Count one answer; whether it is the first from another model than the answers before."""
        self.requests += 1
        self.prompt_tokens += prompt_tokens
        self.new_tokens += new_tokens
        if model in self.models:
            return False
        self.models.append(model)
        return len(self.models) > 1

    def resume(self, recorded: Mapping[str, Any]) -> None:
        """Start from what an earlier run had used."""
        self.requests, self.prompt_tokens = recorded["requests"], recorded["prompt_tokens"]
        self.new_tokens, self.models = recorded["new_tokens"], list(recorded["models"])

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"cost": self.cost}


class Engine(Protocol):
    batch_size: int
    """How many rows a stage should hand over at once."""

    workers: int = 1
    """From how many threads it may be handed rows at the same time."""

    usage: Usage | None = None
    """What has been asked, where that is counted."""

    def close(self) -> None:
        """Give up what is in flight, for good."""
        return

    def identity(self) -> dict[str, Any]:
        """What decides this engine's answers: names and content hashes. Loads no weights."""
        ...

    def speaks_chat(self) -> bool:
        """Whether it has a chat template (else texts must be raw)."""
        ...

    def generate(self, asks: Sequence[GenerationRequest], sampling: Sampling) -> list[Completion | RequestFailure]:
        """One answer per ask, in order. The answer to an ask does not depend on the other asks."""
        ...

    def option_logprobs(self, requests: Sequence[LogprobRequest]) -> list[list[float] | RequestFailure]:
        """For each request the log-probability of each option, natural log, summed over the option's tokens."""
        ...
