"""An engine whose answers come from the result files of a batch."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict
from hashlib import blake2b
from math import log
from typing import Any, TypeVar, cast

import orjson

from cai_cli.common.errors import RowError, UsageError
from cai_cli.engines.base import (
    ChatOptions,
    Completion,
    GenerationRequest,
    LogprobRequest,
    RequestFailure,
    Sampling,
    Server,
    Usage,
)
from cai_cli.engines.batch.forms import FORMS, Provider
from cai_cli.engines.batch.store import Store
from cai_cli.engines.openai import OpenAIEngine
from cai_cli.engines.openai_client import Client
from cai_cli.engines.openai_failures import Refused
from cai_cli.engines.openai_response import ServerResponse

A = TypeVar("A")
T = TypeVar("T")
BATCH_SIZE = 64
PRICES = ("price_in", "price_out")  # the options of a server that a batch has too


class BatchUsage(Usage):
    """What all answers of a batch folder have used; the store has counted those of earlier runs already."""

    def resume(self, recorded: Mapping[str, Any]) -> None:
        """Keep the counts of the store."""


class BatchClient:
    """Takes the place of `Client`: answers requests from the store, and records those that have no answer.

    Attributes:
        unanswered: How many requests had no answer.
    """

    def __init__(self, model: str, provider: Provider, store: Store, usage: Usage) -> None:
        self.model, self.provider, self.store, self.usage = model, provider, store, usage
        self.form, self.unanswered = FORMS[provider], 0
        self._changes = {**self.form.names, **store.changed_parameters}

    def run_all(self, answer: Callable[[A], Coroutine[Any, Any, T]], items: Sequence[A]) -> list[T]:
        """The results of `answer` on all items, in their order."""

        async def in_order() -> list[T]:
            return [await answer(item) for item in items]

        return asyncio.run(in_order())

    async def request(self, path: str, body: dict[str, Any]) -> ServerResponse:
        """The answer to a request.

        Raises:
            RowError: There is none yet, or the provider refused the request.
            UsageError: A batch cannot hold such a request.
        """
        if path != "chat/completions":
            raise UsageError("a batch holds chats", "use --prompt-format chat", code="option-conflict")
        body = {"model": self.model, **body}
        custom_id = blake2b(orjson.dumps(body, option=orjson.OPT_SORT_KEYS), digest_size=16).hexdigest()
        answer = self.store.answer(custom_id)
        if isinstance(answer, Refused):
            raise answer
        if answer is None:
            self.unanswered += 1
            characters = sum(len(turn["content"]) for turn in body["messages"])
            line = self.form.request(custom_id, body, self._changes)
            self.store.ask(custom_id, line, characters, body["max_tokens"])
            raise RowError("not answered yet", code="unanswered-requests")
        return answer

    async def reject(self, error: RowError) -> None:
        """A refusal concerns its row alone: `collect` has looked at all of them together."""

    def close(self) -> None:
        """Nothing is open."""


class BatchEngine(OpenAIEngine):
    """Implements `Engine` with the requests of `OpenAIEngine`, answered by a batch."""

    def __init__(self, model: str, client: BatchClient, chat: ChatOptions) -> None:
        self.name, self.chat = model, chat
        self.client = cast(Client, client)
        self.batch_size, self.workers, self.usage = BATCH_SIZE, 1, client.usage
        self._batch, self._prefill_form = client, client.form.prefill
        self._shows_logprobs = True  # all answers are paid for: to end early at answers without any saves nothing

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"batch": self._batch.provider.value}

    def generate(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> list[Completion | RequestFailure]:
        """As `Engine.generate`; a RequestFailure where there is no answer yet."""
        answers = super().generate(requests, sampling)
        self.unanswered = self._batch.unanswered
        return answers

    def option_logprobs(self, requests: Sequence[LogprobRequest]) -> list[list[float] | RequestFailure]:
        """As `Engine.option_logprobs`.

        As long as requests have no answer, missing scores are replaced by equal ones, so that a stage that needs every
        score goes on to its other requests. Outcomes are not written then.

        Raises:
            UsageError: A batch cannot return these log-probabilities.
        """
        if requests:
            self._check_logprobs(requests[0].options)
        answers = super().option_logprobs(requests)
        self.unanswered = self._batch.unanswered
        if not self.unanswered:
            return answers
        return [
            [-log(len(request.options))] * len(request.options) if isinstance(answer, RequestFailure) else answer
            for request, answer in zip(requests, answers, strict=True)
        ]

    def _check_logprobs(self, options: Sequence[str]) -> None:
        if not self._batch.form.logprobs:
            raise UsageError(
                "Anthropic's batches return no log-probabilities",
                hint="use --method verdict",
                code="option-conflict",
            )
        if any(len(option.split()) > 1 for option in options):
            raise UsageError(
                "a batch returns log-probabilities of a letter, not of a whole reply",
                hint="use --method choice, cot or verdict",
                code="option-conflict",
            )


class BatchSession:
    """Opens the engine of a stage that runs against a batch.

    Attributes:
        engine: The engine, once a stage has opened it.
    """

    def __init__(self, provider: Provider, store: Store) -> None:
        self.provider, self.store = provider, store
        self.engine: BatchEngine | None = None

    def open(self, model: str, server: Server, chat: ChatOptions) -> BatchEngine:
        """The engine for `model`.

        Raises:
            UsageError: The model or an option is not for a batch.
        """
        if not model.startswith("openai:"):
            raise UsageError(
                f"{model} is not answered by a batch",
                hint="--model openai:NAME, with the name of the provider's model",
                code="option-conflict",
            )
        if given := [name for name, value in asdict(server).items() if value is not None and name not in PRICES]:
            raise UsageError(f"a batch has no --{given[0].replace('_', '-')}", code="option-conflict")
        if chat.template or (chat.recorded() and not FORMS[self.provider].chat_template):
            raise UsageError(
                f"{self.provider} takes no arguments of a chat template",
                hint="leave out --thinking, --template-arg and --chat-template",
                code="option-conflict",
            )
        usage = BatchUsage(f"batch files for {self.provider}", server.price_in, server.price_out)
        self.store.count_usage(usage)
        usage.changed_parameters = self.store.changed_parameters
        name = model.removeprefix("openai:")
        self.engine = BatchEngine(name, BatchClient(name, self.provider, self.store, usage), chat)
        return self.engine
