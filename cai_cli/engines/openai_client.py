"""Sends requests to an OpenAI-compatible server, and decides which failures concern one row and which end the run.

The openai client retries (connection errors, timeouts, 408, 409, 429, 5xx) and honours Retry-After up to two minutes.
With several servers a request that would be retried goes to the next one instead (`server_pool`). One deadline covers
the whole request with its waits, so that a slow server cannot exceed it. The remaining failures are of two kinds: a
request that the server rejects (400, 413, 422) fails its row, and a wrong key or address ends the run. Any other
failure fails only its row if the server has answered other requests since this one began, else it ends the run.
"""

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, FiniteFloat, ValidationError

from cai_cli.common import console
from cai_cli.common.errors import CaiError, RowError, UsageError
from cai_cli.engines.base import Server, Usage
from cai_cli.engines.server_pool import FIRST_REST, ServerPool, Turn

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

A = TypeVar("A")
T = TypeVar("T")
RETRIES = 6  # after the first attempt, about 20 s in all: long enough for a server to restart
KEY_VARIABLE = "OPENAI_API_KEY"
ROW_STATUSES = (400, 413, 422)  # HTTP statuses that concern one request only
RESUME_HINT = "finished rows are kept; run the same command again to resume"
HINTS = {
    401: f"set {KEY_VARIABLE} to a key of this server",
    403: f"the key in {KEY_VARIABLE} may not use this model",
    404: "is the model's name right, and does --base-url end as the server expects (usually /v1)?",
    429: "finished rows are kept; lower --concurrency, or run the same command again later",
}


# --- the parts of a response that are read ------------------------------------------------------------------------


class TopLogprob(BaseModel):
    """A token and its log-probability (natural logarithm)."""

    token: str
    logprob: FiniteFloat


class TokenLogprob(TopLogprob):
    """A generated token with the most likely tokens at its position."""

    top_logprobs: list[TopLogprob] = []


class Logprobs(BaseModel):
    """Log-probabilities of a response: chat completions fill `content`, completions the other fields."""

    content: list[TokenLogprob] | None = None
    tokens: list[str] = []
    token_logprobs: list[FiniteFloat | None] = []
    top_logprobs: list[dict[str, FiniteFloat] | None] | None = None
    text_offset: list[int] = []


class ChatMessage(BaseModel):
    """The message of a chat completion."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # its other name

    @property
    def thoughts(self) -> str | None:
        """What the server returned as the model's thoughts."""
        return (self.reasoning_content or self.reasoning or "").strip() or None


class Choice(BaseModel):
    """One answer of a response: a chat completion's has `message`, a completion's `text`."""

    text: str | None = None
    message: ChatMessage | None = None
    finish_reason: str | None = None
    logprobs: Logprobs | None = None

    @property
    def content(self) -> str | None:
        """The generated text, if any."""
        return self.message.content if self.message else self.text


class TokenUsage(BaseModel):
    """The token counts of a response."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def total(self) -> int:
        """Prompt and generated tokens together."""
        return self.prompt_tokens + self.completion_tokens


class ServerResponse(BaseModel):
    """The body of a response."""

    model: str | None = None
    choices: list[Choice]
    usage: TokenUsage | None = None

    @property
    def tokens(self) -> TokenUsage:
        """The token counts; zeros if the server gives none."""
        return self.usage or TokenUsage()


# --- requests -----------------------------------------------------------------------------------------------------


class Client:
    """Sends requests to one model on one or more servers, at most `concurrency` at once, from any number of threads.

    A client of another protocol is a subclass with its own `_send`, `_read` and `_count`.
    """

    key_variable: ClassVar[str] = KEY_VARIABLE
    address_option: ClassVar[str] = "--base-url"
    timeout_option: ClassVar[str] = " (--timeout)"
    hints: ClassVar[Mapping[int, str]] = HINTS

    def __init__(self, model: str, server: Server) -> None:
        """Check the address and the key; no request is sent.

        Raises:
            UsageError: The address or the key is not valid, or the address contains a secret, which manifests would
                record.
        """
        self.model, self.server = model, server
        given = server.base_url or os.environ.get("OPENAI_BASE_URL")
        urls = [given] if given is None or isinstance(given, str) else given
        checked = [checked_url(url, self.address_option, self.key_variable) for url in urls]
        self.pool = ServerPool(list(dict.fromkeys(checked)))
        self.base_url = ",".join(one.url for one in self.pool.servers)
        self.key = os.environ.get(self.key_variable, "")
        if not (self.key.isascii() and self.key.isprintable()):
            raise UsageError(f"{self.key_variable} contains characters that a key cannot have", code="invalid-option")
        self.concurrency = server.concurrency or 16
        self.timeout = server.timeout or 600.0
        self.usage = Usage(self.base_url, price_in=server.price_in, price_out=server.price_out)
        self._slots = asyncio.Semaphore(self.concurrency)
        self._fatal: CaiError | None = None  # what ended the run; every later request raises it
        self._answered = 0
        self._thread_lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False

    def run_all(self, answer: Callable[[A], Coroutine[Any, Any, T]], items: Sequence[A]) -> list[T]:
        """Run `answer` on all items at once, in the client's thread.

        Returns:
            The results in the order of the items, once all are done.

        Raises:
            CaiError: The first error among the results.
        """
        loop = self._loop()
        results = asyncio.run_coroutine_threadsafe(_gathered(answer, items), loop).result()
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return [result for result in results if not isinstance(result, BaseException)]

    async def request(self, path: str, body: dict[str, Any]) -> ServerResponse:
        """The response to one request.

        Args:
            path: "chat/completions" or "completions".
            body: The request without the model's name.

        Raises:
            RowError: This request cannot be answered.
            CaiError: The run has to stop; every later request raises the same error.
        """
        async with self._slots:
            if self._fatal:
                raise self._fatal
            self._check_budget()
            answered_before = self._answered
            try:
                response = await self._attempt(path, {"model": self.model, **body})
            except _Failure as failure:
                if failure.transient and self._answered > answered_before:
                    reason = f"no answer, though others have one: {failure.message}"
                    raise RowError(reason, code="request-failed") from failure
                message = f"{failure.url or self.base_url}: {failure.message}"
                self._fatal = self._fatal or CaiError(message, failure.hint, code=failure.code)
                raise self._fatal from failure
            self._count(response)
            return response

    async def _attempt(self, path: str, body: dict[str, Any]) -> ServerResponse:
        """The response to one request with its retries. Raises _Failure and RowError."""
        try:
            async with asyncio.timeout(self.timeout):
                if len(self.pool.servers) == 1:
                    return await self._ask(self.pool.servers[0].url, path, body)
                return await self._ask_in_turn(path, body)
        except TimeoutError:
            reason = f"no complete answer in {self.timeout:g} s{self.timeout_option}"
            raise _Failure(reason, code="server-unreachable", transient=True) from None

    async def _ask_in_turn(self, path: str, body: dict[str, Any]) -> ServerResponse:
        """The response of the first of several servers that gives one. Raises as `_attempt`."""
        clock, attempts = asyncio.get_running_loop().time, (RETRIES + 1) * len(self.pool.servers)
        while True:
            while (turn := self.pool.next(clock())) is None:
                await asyncio.sleep(FIRST_REST)
            attempts -= 1
            try:
                response = await self._ask(turn.server.url, path, body)
            except _Failure as failure:
                if not failure.elsewhere:
                    raise
                self._leave(turn, clock(), failure)
                if not attempts or self.pool.fewest_failures > RETRIES:
                    raise
            except RowError:
                self.pool.answered(turn)
                raise
            else:
                self.pool.answered(turn)
                return response

    def _leave(self, turn: Turn, now: float, failure: "_Failure") -> None:
        """Let a server rest; a message says when it stops answering."""
        if turn.server.failures == turn.failures == 0:
            console.say(f"{turn.server.url}: {failure.message}; its requests go to the other servers")
        self.pool.failed(turn, now)

    async def _ask(self, url: str, path: str, body: dict[str, Any]) -> ServerResponse:
        """The response of one server. Raises _Failure and RowError."""
        import openai

        client = self._clients[url]
        try:
            raw = await self._send(client, path, body)
            return self._read(raw.content)
        except openai.APIStatusError as error:
            failure = self._status_error(error)
        except openai.APIConnectionError as error:
            attempts = f" in {RETRIES + 1} attempts" if client.max_retries else ""
            failure = _Failure(
                f"no answer{attempts} ({_cause(error)})",
                code="server-unreachable",
                transient=True,
                elsewhere=True,
            )
        except _Failure as wrong:
            failure = wrong
        if isinstance(failure, _Failure):
            failure.url = url
        raise failure from None

    async def _send(self, client: "AsyncOpenAI", path: str, body: dict[str, Any]) -> Any:
        """The raw response to one request, which the openai client retries."""
        route: Any = client.chat.completions if path == "chat/completions" else client.completions
        return await route.with_raw_response.create(**body)

    def _read(self, content: bytes) -> ServerResponse:
        """The response in the body of an answer. Raises _Failure and RowError."""
        try:
            response = ServerResponse.model_validate_json(content)
        except ValidationError:
            hint = "does --base-url end as the server expects (usually /v1)?"
            raise self._malformed(content, "is not a completion", hint, transient=True) from None
        if len(self.key) >= console.SHORTEST_SECRET and self.key in response.model_dump_json():
            raise RowError(f"the reply contains the key in {KEY_VARIABLE}", code="wrong-answer")
        if not _same_model(self.model, response.model):
            raise _Failure(
                f"requested the model {self.model!r}, answered as {self._short(str(response.model))!r}",
                "name the model in --model openai:NAME as the server does (GET /models)",
            )
        if not response.choices:
            raise _Failure("the reply contains no choices", transient=True)
        return response

    def _malformed(self, content: bytes, problem: str, hint: str, *, transient: bool) -> "_Failure":
        """The failure of an answer whose body has another form."""
        return _Failure(
            f"the reply {problem}: {self._short(content.decode('utf-8', 'replace'))!r}", hint, transient=transient
        )

    def _status_error(self, error: "APIStatusError") -> Exception:
        """The RowError or _Failure for a response with an error status."""
        message = error.body.get("message") if isinstance(error.body, dict) else error.body
        status, text = error.status_code, self._short(str(message or "no reason given"))
        if status in ROW_STATUSES:
            return RowError(f"refused by the server, HTTP {status}: {text}", code="request-failed")
        hint = self.hints.get(status, RESUME_HINT)
        transient = status in (408, 409) or status >= 500
        elsewhere = transient or status == 429
        return _Failure(f"HTTP {status}: {text}", hint, code="server-refused", transient=transient, elsewhere=elsewhere)

    def _short(self, text: str) -> str:
        """One line of a server's text, cut off before the key if the server repeats it, even in part."""
        line = " ".join(text.split())
        if len(self.key) >= console.SHORTEST_SECRET:
            before, key, _ = line.partition(self.key[: console.SHORTEST_SECRET])
            line = f"{before}[key]..." if key else before
        return line[:200]

    # --- accounting -----------------------------------------------------------------------------------------

    def _check_budget(self) -> None:
        budget = self.server.budget_tokens
        if budget is not None and self.usage.tokens >= budget:
            self._fatal = CaiError(
                f"the budget is spent: {self.usage.tokens:,} of {budget:,} tokens (--budget-tokens)",
                hint="finished rows are kept; run the same command with a larger budget to resume",
                code="budget-spent",
            )
            raise self._fatal

    def _count(self, response: ServerResponse) -> None:
        self._answered += 1
        if response.usage is None and self.server.budget_tokens is not None:
            self._fatal = CaiError(
                "the server does not return the number of tokens used",
                hint="run without --budget-tokens",
                code="wrong-answer",
            )
        tokens = response.tokens
        if self.usage.add(response.model or self.model, tokens.prompt_tokens, tokens.completion_tokens):
            console.warn(f"the server answers as more than one model: {', '.join(self.usage.models)}")

    # --- the thread that all requests run in ------------------------------------------------------------------

    def _loop(self) -> asyncio.AbstractEventLoop:
        """The event loop of the thread that sends all requests, started at first use."""
        with self._thread_lock:
            if self._closed:
                raise CaiError(f"{self.base_url}: the requests were cancelled", code="request-failed")
            if self._thread is None:
                ready: Future[asyncio.AbstractEventLoop] = Future()
                self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(ready)), daemon=True)
                self._thread.start()
                self._running = ready.result()
        return self._running

    async def _serve(self, ready: "Future[asyncio.AbstractEventLoop]") -> None:
        self._end = asyncio.Event()
        try:
            retries = RETRIES if len(self.pool.servers) == 1 else 0
            async with AsyncExitStack() as stack:
                self._clients = {
                    one.url: await stack.enter_async_context(_openai_client(one.url, self.key, self.timeout, retries))
                    for one in self.pool.servers
                }
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
        """Cancel the requests in flight and end the thread. The client cannot be used afterwards."""
        with self._thread_lock:
            self._closed = True
            thread, self._thread = self._thread, None
            if thread is not None:
                self._running.call_soon_threadsafe(self._end.set)
                thread.join()


class _Failure(Exception):
    """A request without an answer.

    `transient`: other requests may still be answered; `elsewhere`: another server may answer this one; `url`: the
    server, once known.
    """

    def __init__(
        self,
        message: str,
        hint: str | None = None,
        *,
        code: str = "wrong-answer",
        transient: bool = False,
        elsewhere: bool = False,
    ) -> None:
        super().__init__(message)
        self.message, self.code, self.transient, self.elsewhere = message, code, transient, elsewhere
        self.url: str | None = None
        self.hint = hint or "finished rows are kept; when the server is back, run the same command again to resume"


async def _gathered(answer: Callable[[A], Coroutine[Any, Any, T]], items: Sequence[A]) -> list[T | BaseException]:
    return await asyncio.gather(*map(answer, items), return_exceptions=True)


def _openai_client(base_url: str, key: str, timeout: float, retries: int) -> "AsyncOpenAI":
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient, Timeout

    return AsyncOpenAI(
        base_url=base_url,
        api_key=key or "none",
        max_retries=retries,
        # A silent connection times out at half of the deadline, which leaves time for another attempt.
        timeout=Timeout(timeout / 2, connect=min(timeout / 2, 10.0)),
        http_client=DefaultAsyncHttpxClient(follow_redirects=False),
    )


def checked_url(url: str | None, option: str = "--base-url", key_variable: str = KEY_VARIABLE) -> str:
    """The address of a server's API without a trailing slash.

    Args:
        url: The address.
        option: The option that gives it, for messages.
        key_variable: The environment variable that gives the key, for messages.

    Raises:
        UsageError: There is no address (`missing-option`), or it is not a server's address or contains a secret
            (`invalid-option`).

    >>> checked_url("http://localhost:8000/v1/")
    'http://localhost:8000/v1'
    """
    if not url:
        raise UsageError(
            "an openai: model needs --base-url (or OPENAI_BASE_URL)",
            hint="for example http://localhost:8000/v1; OpenAI's own is https://api.openai.com/v1",
            code="missing-option",
        )
    parts = urlsplit(url)
    with suppress(ValueError):
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            if parts.username or parts.password or parts.query or parts.fragment:
                raise UsageError(
                    f"{option} must not contain a user, password or query: manifests record it",
                    hint=f"the key comes from {key_variable}",
                    code="invalid-option",
                )
            return url.rstrip("/")
    raise UsageError(f"{option} must be http://HOST[:PORT]/PATH or https://...", code="invalid-option")


def _same_model(requested: str, answered: str | None) -> bool:
    """Whether `answered` names the requested model: under its name, a dated version of it, or without its owner."""
    if not answered or answered == requested:
        return True
    return answered.startswith(f"{requested}-") or requested.endswith(f"/{answered}")


def _cause(error: BaseException) -> str:
    """The class name of the innermost error. Its message is left out because it may quote a secret."""
    while error.__cause__ is not None:
        error = error.__cause__
    return type(error).__name__
