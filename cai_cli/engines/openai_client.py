"""Requests to an OpenAI-compatible server, for the endpoint engine: one answer each, or why there is none.

The openai client retries (connection errors, timeouts, 408, 409, 429, 5xx) and honours Retry-After up to two minutes;
on top of it stands one deadline for the whole request, waits included, which no slow server can stretch. What is left
after that is sorted: a request that the server will not have (400, 413, 422) is its row's fault, a wrong key or address
ends the run, and a failure is its row's fault only if the server has answered others since the request began.
"""

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, FiniteFloat, ValidationError

from cai_cli.common import console
from cai_cli.common.errors import CaiError, RowError, UsageError
from cai_cli.engines.base import Server, Usage

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

A = TypeVar("A")
T = TypeVar("T")
RETRIES = 6  # after the first attempt, some 20 s apart in all: a server that restarts is waited for
KEY_VARIABLE = "OPENAI_API_KEY"
ROWS_FAULT = (400, 413, 422)
HINTS = {
    401: f"set {KEY_VARIABLE} to a key of this server",
    403: f"the key in {KEY_VARIABLE} may not use this model",
    404: "is the model's name right, and does --base-url end as the server wants it (usually /v1)?",
    429: "what is finished is kept; lower --concurrency, or run the same again later",
}


# --- an answer, as far as it is read ----------------------------------------------------------------------------


class Likely(BaseModel):
    token: str
    logprob: FiniteFloat


class Token(Likely):
    top_logprobs: list[Likely] = []


class Logprobs(BaseModel):
    """`content`: of chat completions; the rest: of completions."""

    content: list[Token] | None = None
    tokens: list[str] = []
    token_logprobs: list[FiniteFloat | None] = []
    top_logprobs: list[dict[str, FiniteFloat] | None] | None = None
    text_offset: list[int] = []


class ChatMessage(BaseModel):
    content: str | None = None


class Choice(BaseModel):
    text: str | None = None
    message: ChatMessage | None = None
    finish_reason: str | None = None
    logprobs: Logprobs | None = None

    @property
    def said(self) -> str | None:
        return self.message.content if self.message else self.text


class Tokens(BaseModel):
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def total(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Answer(BaseModel):
    model: str | None = None
    choices: list[Choice]
    usage: Tokens | None = None

    @property
    def tokens(self) -> Tokens:
        return self.usage or Tokens()


# --- asking -------------------------------------------------------------------------------------------------------


class Client:
    """Asks one model of one server, at most `concurrency` requests at once, from any number of threads."""

    def __init__(self, model: str, server: Server) -> None:
        """Raises: UsageError for an address that is none, or that would write a secret into manifests."""
        self.model, self.server = model, server
        self.base_url = checked_url(server.base_url or os.environ.get("OPENAI_BASE_URL"))
        self.key = os.environ.get(KEY_VARIABLE, "")
        if not (self.key.isascii() and self.key.isprintable()):
            raise UsageError(f"{KEY_VARIABLE} holds characters that no key has")
        self.concurrency = server.concurrency or 16
        self.timeout = server.timeout or 600.0
        self.usage = Usage(self.base_url, price_in=server.price_in, price_out=server.price_out)
        self._slots = asyncio.Semaphore(self.concurrency)
        self._stopped: CaiError | None = None
        self._answered = 0
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False

    def run_all(self, answer: Callable[[A], Coroutine[Any, Any, T]], items: Sequence[A]) -> list[T]:
        """`answer` of each item, in order, once all are done. Raises: the first CaiError among them."""
        loop = self._loop()
        results = asyncio.run_coroutine_threadsafe(_gathered(answer, items), loop).result()
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return [result for result in results if not isinstance(result, BaseException)]

    async def ask(self, path: str, body: dict[str, Any]) -> Answer:
        """The answer to `body` from "chat/completions" or "completions".

        Raises: RowError when this request cannot be answered; CaiError when the run has to stop, as has every later
        request.
        """
        async with self._slots:
            if self._stopped:
                raise self._stopped
            self._check_budget()
            before = self._answered
            try:
                answer = await self._attempt(path, {"model": self.model, **body})
            except _Failure as failure:
                if failure.retried and self._answered > before:
                    raise RowError(f"no answer, though others have one: {failure.message}") from failure
                self._stopped = self._stopped or CaiError(f"{self.base_url}: {failure.message}", failure.hint)
                raise self._stopped from failure
            self._count(answer)
            return answer

    async def _attempt(self, path: str, body: dict[str, Any]) -> Answer:
        """Raises: _Failure, RowError."""
        import openai

        route: Any = self._openai.chat.completions if path == "chat/completions" else self._openai.completions
        try:
            async with asyncio.timeout(self.timeout):
                raw = await route.with_raw_response.create(**body)
        except openai.APIStatusError as error:
            raise self._refused(error) from None
        except openai.APIConnectionError as error:
            raise _Failure(f"no answer in {RETRIES + 1} attempts ({_cause(error)})", retried=True) from None
        except TimeoutError:
            raise _Failure(f"no whole answer in {self.timeout:g} s (--timeout)", retried=True) from None
        return self._read(raw.content)

    def _read(self, content: bytes) -> Answer:
        try:
            answer = Answer.model_validate_json(content)
        except ValidationError:
            start = self._short(content.decode("utf-8", "replace"))
            hint = "does --base-url end as the server wants it (usually /v1)?"
            raise _Failure(f"the reply is no completion: {start!r}", hint, retried=True) from None
        if len(self.key) >= console.SHORTEST_SECRET and self.key in answer.model_dump_json():
            raise RowError(f"the reply holds the key in {KEY_VARIABLE}")
        if not _same_model(self.model, answer.model):
            raise _Failure(
                f"asked for the model {self.model!r}, answered as {self._short(str(answer.model))!r}",
                "name the model in --model openai:NAME as the server does (GET /models)",
            )
        if not answer.choices:
            raise _Failure("the reply holds no choices", retried=True)
        return answer

    def _refused(self, error: "APIStatusError") -> Exception:
        said = error.body.get("message") if isinstance(error.body, dict) else error.body
        status, text = error.status_code, self._short(str(said or "no reason given"))
        if status in ROWS_FAULT:
            return RowError(f"refused by the server, HTTP {status}: {text}")
        hint = HINTS.get(status, "what is finished is kept; run the same again to go on")
        return _Failure(f"HTTP {status}: {text}", hint, retried=status in (408, 409) or status >= 500)

    def _short(self, text: str) -> str:
        """One line of what a server said, up to the key that it may have echoed, be it in part."""
        line = " ".join(text.split())
        if len(self.key) >= console.SHORTEST_SECRET:
            said, echoed, _ = line.partition(self.key[: console.SHORTEST_SECRET])
            line = f"{said}[key]..." if echoed else said
        return line[:200]

    # --- accounting -----------------------------------------------------------------------------------------

    def _check_budget(self) -> None:
        budget = self.server.budget_tokens
        if budget is not None and self.usage.tokens >= budget:
            self._stopped = CaiError(
                f"the budget is spent: {self.usage.tokens:,} of {budget:,} tokens (--budget-tokens)",
                hint="what is finished is kept; the same command with a larger budget goes on",
            )
            raise self._stopped

    def _count(self, answer: Answer) -> None:
        self._answered += 1
        if answer.usage is None and self.server.budget_tokens is not None:
            self._stopped = CaiError(
                "the server does not say how many tokens an answer took", hint="run without --budget-tokens"
            )
        if self.usage.add(answer.model or self.model, answer.tokens.prompt_tokens, answer.tokens.completion_tokens):
            console.warn(f"the server answers as more than one model: {', '.join(self.usage.models)}")

    # --- the thread that all requests run in ------------------------------------------------------------------

    def _loop(self) -> asyncio.AbstractEventLoop:
        with self._starting:
            if self._closed:
                raise CaiError(f"{self.base_url}: given up")
            if self._thread is None:
                ready: Future[asyncio.AbstractEventLoop] = Future()
                self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(ready)), daemon=True)
                self._thread.start()
                self._running = ready.result()
        return self._running

    async def _serve(self, ready: "Future[asyncio.AbstractEventLoop]") -> None:
        self._end = asyncio.Event()
        try:
            async with _openai_client(self.base_url, self.key, self.timeout) as self._openai:
                ready.set_result(asyncio.get_running_loop())
                await self._end.wait()
                waiting = asyncio.all_tasks() - {asyncio.current_task()}
                for task in waiting:
                    task.cancel()
                await asyncio.gather(*waiting, return_exceptions=True)
        except Exception as error:
            if ready.done():
                raise
            ready.set_exception(error)

    def close(self) -> None:
        """Give up what is in flight, for good, and end the thread."""
        with self._starting:
            self._closed = True
            thread, self._thread = self._thread, None
            if thread is not None:
                self._running.call_soon_threadsafe(self._end.set)
                thread.join()


class _Failure(Exception):
    """No answer. `retried`: it may be only this request that fails."""

    def __init__(self, message: str, hint: str | None = None, *, retried: bool = False) -> None:
        super().__init__(message)
        self.message, self.retried = message, retried
        self.hint = hint or "what is finished is kept; when the server is back, run the same again to go on"


async def _gathered(answer: Callable[[A], Coroutine[Any, Any, T]], items: Sequence[A]) -> list[T | BaseException]:
    return await asyncio.gather(*map(answer, items), return_exceptions=True)


def _openai_client(base_url: str, key: str, timeout: float) -> "AsyncOpenAI":
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient, Timeout

    return AsyncOpenAI(
        base_url=base_url,
        api_key=key or "none",
        max_retries=RETRIES,
        # Half of silence, so that there is time for another attempt.
        timeout=Timeout(timeout / 2, connect=min(timeout / 2, 10.0)),
        http_client=DefaultAsyncHttpxClient(follow_redirects=False),
    )


def checked_url(url: str | None) -> str:
    """`url` without a closing slash. Raises UsageError when it is no address of a server, or holds a secret."""
    if not url:
        raise UsageError(
            "an openai: model needs --base-url (or OPENAI_BASE_URL)",
            hint="such as http://localhost:8000/v1; OpenAI's own is https://api.openai.com/v1",
        )
    parts = urlsplit(url)
    with suppress(ValueError):
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            if parts.username or parts.password or parts.query or parts.fragment:
                raise UsageError(
                    "--base-url must hold no user, password or query: manifests record it",
                    hint=f"the key comes from {KEY_VARIABLE}",
                )
            return url.rstrip("/")
    raise UsageError("--base-url must be http://HOST[:PORT]/PATH or https://...")


def _same_model(asked: str, answered: str | None) -> bool:
    """Whether `answered` names the model asked for: itself, a dated version of it, or it without its owner."""
    return not answered or answered == asked or answered.startswith(f"{asked}-") or asked.endswith(f"/{answered}")


def _cause(error: BaseException) -> str:
    """The kind of the innermost error: what the network said, without what a message may quote."""
    while error.__cause__ is not None:
        error = error.__cause__
    return type(error).__name__
