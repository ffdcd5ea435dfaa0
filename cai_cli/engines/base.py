"""The engine protocol: what stages may request from a model, which is text (`generate`) and `option_logprobs`.

An engine is a model backend. Engines do not depend on stages. A new engine is one module with a class of this protocol
and one line in `open_engine`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from cai_cli.common.errors import CaiError
from cai_cli.data.schema import Message

# A chat, or raw text for base models. In both forms `prefill` is the start of the answer.
Text = str | Sequence[Message]


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled.

    Attributes:
        max_new_tokens: The most tokens to generate.
        temperature: 0 is greedy decoding.
        top_p: Nucleus sampling; 1 samples from the whole distribution.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True)
class GenerationRequest:
    """One text to complete.

    Attributes:
        text: A chat, whose next assistant turn is generated, or raw text.
        seed: Decides the sampling noise of this request, and nothing else does.
        prefill: The start of the answer. The model continues it.
        stop: Strings that end the answer; they are cut off.
        row: The key of the row that the request is for, used in messages only.
    """

    text: Text
    seed: int
    prefill: str = ""
    stop: tuple[str, ...] = ()
    row: str = ""


@dataclass(frozen=True)
class Completion:
    """The text generated for one request.

    Attributes:
        text: The generated text, without the request's prefill and stop string.
        finish_reason: "stop" (end of turn or a stop string) or "length" (cut off at `max_new_tokens`, or inside a
            character).
        prompt_tokens: The length of the prompt with its prefill, in tokens; 0 if unknown.
        new_tokens: The number of generated tokens, those of thoughts included; 0 if unknown.
        restarted: Whether the text is a whole answer that does not continue the request's prefill.
        thoughts: What a reasoning model wrote before its answer, which is not part of `text`; None without thoughts.
    """

    text: str
    finish_reason: str
    prompt_tokens: int = 0
    new_tokens: int = 0
    restarted: bool = False
    thoughts: str | None = None


def drop_broken_end(text: str, finish_reason: str) -> tuple[str, str]:
    """A generated text without the part of a character at its end, and its finish reason: "length" if there was one.

    A character may take several tokens (Chinese, emoji). Where the answer ends between them, decoding gives U+FFFD.

    >>> drop_broken_end("梨\ufffd", "length"), drop_broken_end("梨", "stop")
    (('梨', 'length'), ('梨', 'stop'))
    """
    whole = text.rstrip("\ufffd")
    return whole, finish_reason if whole == text else "length"


@dataclass(frozen=True)
class LogprobRequest:
    """Options whose log-probabilities as continuations of `text` and `prefill` are requested.

    Attributes:
        text: A chat, whose next assistant turn is scored, or raw text.
        options: The continuations, such as `("A", "B")`.
        prefill: The start of the answer, before the option.
        row: The key of the row that the request is for, used in messages only.
    """

    text: Text
    options: tuple[str, ...]
    prefill: str = ""
    row: str = ""


@dataclass(frozen=True)
class RequestFailure:
    """One request that the engine could not answer, and why. A failure never becomes data."""

    reason: str


@dataclass(frozen=True)
class ChatOptions:
    """How chats are rendered.

    Attributes:
        thinking: "on" or "off" where thoughts are switched, else "auto".
        template_args: Arguments of the chat template by name.
        template: The file of a chat template that replaces the model's, or None.
    """

    thinking: str = "auto"
    template_args: Mapping[str, Any] = field(default_factory=dict)
    template: str | None = None

    def recorded(self) -> dict[str, Any]:
        """What an engine's identity records of them; empty for the defaults. The template's hash is recorded apart."""
        thinking = {} if self.thinking == "auto" else {"thinking": self.thinking}
        return thinking | ({"template_args": dict(self.template_args)} if self.template_args else {})


@dataclass(frozen=True)
class Server:
    """The options of an OpenAI-compatible server. None means the default.

    Attributes:
        base_url: The address of its API, such as `http://localhost:8000/v1`, or those of several servers of one model.
        concurrency: The most requests in flight at once.
        timeout: Seconds for one request with its retries.
        budget_tokens: The number of prompt and generated tokens after which the run stops.
        price_in: The price of a million prompt tokens, in any currency.
        price_out: The price of a million generated tokens.
        served_as: The model's name in the answers, where it is not the name in the requests.
    """

    base_url: str | Sequence[str] | None = None
    concurrency: int | None = None
    timeout: float | None = None
    budget_tokens: int | None = None
    price_in: float | None = None
    price_out: float | None = None
    served_as: str | None = None


@dataclass
class Usage:
    """What one output has used on a server, over all runs that contributed to it.

    Attributes:
        base_url: The address of the server; of several, joined by commas.
        price_in: The price of a million prompt tokens, if given.
        price_out: The price of a million generated tokens, if given.
        requests: The number of answered requests.
        prompt_tokens: The number of prompt tokens.
        new_tokens: The number of generated tokens.
        models: The names under which the server answered, in order of appearance.
        changed_parameters: The parameters of requests that the server refuses, with the name under which it takes them,
            or None where they are left out.
    """

    base_url: str
    price_in: float | None = None
    price_out: float | None = None
    requests: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    models: list[str] = field(default_factory=list)
    changed_parameters: dict[str, str | None] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Prompt and generated tokens together."""
        return self.prompt_tokens + self.new_tokens

    @property
    def cost(self) -> float | None:
        """The cost in the currency of the prices; None if no price was given."""
        if self.price_in is None and self.price_out is None:
            return None
        return (self.prompt_tokens * (self.price_in or 0) + self.new_tokens * (self.price_out or 0)) / 1e6

    def add(self, model: str, prompt_tokens: int, new_tokens: int) -> bool:
        """Count one answer.

        Returns:
            Whether it is the first answer under a model name other than those before.
        """
        self.requests += 1
        self.prompt_tokens += prompt_tokens
        self.new_tokens += new_tokens
        if model in self.models:
            return False
        self.models.append(model)
        return len(self.models) > 1

    def resume(self, recorded: Mapping[str, Any]) -> None:
        """Start from the usage that an earlier run recorded (`as_json`)."""
        self.requests, self.prompt_tokens = recorded["requests"], recorded["prompt_tokens"]
        self.new_tokens, self.models = recorded["new_tokens"], list(recorded["models"])
        self.changed_parameters = recorded.get("changed_parameters", {})

    def as_json(self) -> dict[str, Any]:
        """The usage as manifests record it."""
        return asdict(self) | {"cost": self.cost}


class UnansweredRequests(CaiError):
    """A stage that needs answers which are not in the results of its batch yet; what precedes them is written."""

    def __init__(self, count: int) -> None:
        super().__init__(f"{count:,} requests have no answer yet", hint="cai batch collect", code="unanswered-requests")


class EngineResources(Protocol):
    """What the run of a stage needs to know of its engine, or of several engines that it uses."""

    workers: int = 1
    """The number of threads that may call the engine at the same time."""

    usage: Usage | None = None
    """What a server has used so far; None for engines without a server."""

    unanswered: int = 0
    """How many requests wait for a batch's results. While there are any, the outcomes of a stage are not final."""

    def close(self) -> None:
        """Cancel the requests in flight and release the engine's resources. The engine cannot be used afterwards."""
        return


class Engine(EngineResources, Protocol):
    """A model backend.

    Engines load nothing heavy before the first request. A request that cannot be answered becomes a RequestFailure in
    its place; a CaiError means that no request can be answered, and ends the run.
    """

    batch_size: int
    """The number of rows that a stage should pass in one call."""

    def identity(self) -> dict[str, Any]:
        """What determines this engine's answers, without loading weights.

        Returns:
            Names and content hashes for the manifest. Two engines with equal identities give the same answers, as far
            as the backend can promise that.

        Raises:
            CaiError: The model cannot be found or read.
        """
        ...

    def supports_chat(self) -> bool:
        """Whether the model takes chats. Without a chat template, every `text` must be raw text.

        Raises:
            CaiError: The model cannot be found or read.
        """
        ...

    def generate(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> list[Completion | RequestFailure]:
        """Generate one completion for each request.

        Args:
            requests: The requests. The answer to one does not depend on the others.
            sampling: How tokens are sampled, for all of them.

        Returns:
            As many results as requests, in their order.

        Raises:
            CaiError: No request can be answered: the model's logits are not finite, it has no chat template for a chat,
                or the server is gone.
        """
        ...

    def option_logprobs(self, requests: Sequence[LogprobRequest]) -> list[list[float] | RequestFailure]:
        """Score the options of each request.

        Args:
            requests: The requests. The scores of one do not depend on the others.

        Returns:
            As many results as requests, in their order. Each is a list with the log-probability of every option, in the
            order of the options: natural logarithm, summed over the option's tokens, not normalised over the options.

        Raises:
            CaiError: As `generate`.
        """
        ...
