"""Sends requests to an OpenAI-compatible server, and decides which failures concern one row and which end the run.

The openai client retries (connection errors, timeouts, 408, 409, 5xx). With several servers a request that would be
retried goes to the next one instead (`server_pool`). After a 429 no request is sent until the limit's window is over,
or the deadline of a request that waits. One deadline covers the whole request with its waits, so that a slow server
cannot exceed it. The remaining failures are of two kinds: a request that the server rejects (400, 413, 422) fails its
row, and a wrong key or address, or a used-up quota, ends the run. Equal rejections of the first requests end it too,
because a setting is at fault then, not a row. Any other failure fails only its row if the server has answered other
requests since this one began, else it ends the run.
"""

import asyncio
import os
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from pydantic import ValidationError

from cai_cli.common import console
from cai_cli.common.errors import CaiError, RowError, UsageError
from cai_cli.engines.base import Server, Usage
from cai_cli.engines.openai_failures import Failure, Refused, retry_after, says_no_credit, whole_reason
from cai_cli.engines.openai_parameters import Parameters, applied
from cai_cli.engines.openai_response import ServerResponse
from cai_cli.engines.server_address import KEY_VARIABLE, checked_url, same_model
from cai_cli.engines.server_pool import FIRST_REST, PooledServer, ServerPool, Turn

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

A = TypeVar("A")
T = TypeVar("T")
RETRIES = 6  # after the first attempt, about 20 s in all: long enough for a server to restart
REFUSALS = 8  # equal ones, before the first answer, that end the run
HOLD = 0.5  # seconds for which a refusal before the first answer waits for others, so that no row is rejected for them
ROW_STATUSES = (400, 413, 422)  # HTTP statuses that concern one request only
RESUME_HINT = "finished rows are kept; run the same command again to resume"
LOGPROBS_HINT = "use a server that returns log-probabilities; `cai label-prefs --method verdict --overwrite` needs none"
NO_CREDIT_HINT = "finished rows are kept; add credit or raise the limit of the account, then run the same command again"
HINTS = {
    401: f"set {KEY_VARIABLE} to a key of this server",
    403: f"the key in {KEY_VARIABLE} may not use this model",
    402: NO_CREDIT_HINT,
    404: "is the model's name right, and does --base-url end as the server expects (usually /v1)?",
    429: "finished rows are kept; run the same command again later, or with a longer --timeout",
}


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
        self._parameters = Parameters()
        self._refusals = Counter[str]()
        self._decided = asyncio.Event()  # set once a request is answered, or the run has ended
        self._limited: Failure | None = None  # the last 429, until a request is answered
        self._told_limit = False
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
                response = await self._adapted(path, {"model": self.model, **body})
            except Failure as failure:
                if failure.transient and self._answered > answered_before:
                    reason = f"no answer, though others have one: {failure.message}"
                    raise RowError(reason, code="request-failed") from failure
                message = f"{failure.url or self.base_url}: {failure.message}"
                raise self.end(CaiError(message, failure.hint, code=failure.code)) from failure
            self._count(response)
            self._decided.set()
            return response

    async def reject(self, error: RowError) -> None:
        """Return where a request that cannot be answered concerns its row alone.

        Raises:
            CaiError: The first requests were all refused with the same words, so a setting is at fault; every later
                request raises the same error.
        """
        if self._answered or not isinstance(error, Refused) or error.about_the_prompt:
            return
        self._refusals[error.kind] += 1
        if self._refusals[error.kind] >= REFUSALS:
            hint = LOGPROBS_HINT if "logprob" in error.reason else "no row was answered; check the options"
            message = f"{self.base_url}: the first {REFUSALS} requests were {error.message}"
            self.end(CaiError(message, hint, code="server-refused"))
        with suppress(TimeoutError):
            await asyncio.wait_for(self._decided.wait(), HOLD)
        if self._fatal:
            raise self._fatal

    def end(self, error: CaiError) -> CaiError:
        """The error that ends the run: the first one; every later request raises it."""
        self._fatal = self._fatal or error
        self._decided.set()
        return self._fatal

    async def _adapted(self, path: str, body: dict[str, Any]) -> ServerResponse:
        """The response to one request, without the parameters that the server refuses. Raises Failure and RowError."""
        changes = dict(self._parameters.changes)
        while True:
            try:
                response = await self._attempt(path, applied(body, changes))
            except Refused as refused:
                known = changes | self._parameters.changes  # another request may have learnt more since
                tried = known if known != changes else self._parameters.refused(refused.reason, body, changes)
                if tried is None:
                    raise
                changes = tried
            else:
                for message in self._parameters.learn(body, changes):
                    console.warn(f"{self.base_url}: {message}")
                self.usage.changed_parameters |= self._parameters.changes
                return response

    async def _attempt(self, path: str, body: dict[str, Any]) -> ServerResponse:
        """The response to one request with its retries. Raises Failure and RowError."""
        try:
            async with asyncio.timeout(self.timeout):
                if len(self.pool.servers) == 1:
                    return await self._ask_alone(self.pool.servers[0], path, body)
                return await self._ask_in_turn(path, body)
        except TimeoutError:
            if self._limited:
                raise self._limited from None
            reason = f"no complete answer in {self.timeout:g} s{self.timeout_option}"
            raise Failure(reason, code="server-unreachable", transient=True) from None

    async def _ask_alone(self, server: PooledServer, path: str, body: dict[str, Any]) -> ServerResponse:
        """The response of the only server. Raises as `_attempt`."""
        clock = asyncio.get_running_loop().time
        while True:
            while (wait := server.limited_until - clock()) > 0:
                await asyncio.sleep(wait)
            try:
                response = await self._ask(server.url, path, body)
            except Failure as failure:
                if not failure.limited:
                    raise
                self._slow_down(server, clock(), failure)
            else:
                server.limits, self._limited = 0, None
                return response

    async def _ask_in_turn(self, path: str, body: dict[str, Any]) -> ServerResponse:
        """The response of the first of several servers that gives one. Raises as `_attempt`."""
        clock, attempts = asyncio.get_running_loop().time, (RETRIES + 1) * len(self.pool.servers)
        while True:
            while (turn := self.pool.next(clock())) is None:
                await asyncio.sleep(FIRST_REST)
            try:
                response = await self._ask(turn.server.url, path, body)
            except Failure as failure:
                if failure.limited:
                    self._slow_down(turn.server, clock(), failure)
                    continue
                if not failure.elsewhere:
                    raise
                attempts -= 1
                self._leave(turn, clock(), failure)
                if not attempts or self.pool.fewest_failures > RETRIES:
                    raise
            except RowError:
                self.pool.answered(turn)
                raise
            else:
                self.pool.answered(turn)
                self._limited = None
                return response

    def _slow_down(self, server: PooledServer, now: float, failure: Failure) -> None:
        """Send a server nothing until the window of its limit is over. Raises the failure where no request can wait
        for that."""
        if not self._told_limit:
            self._told_limit = True
            console.say(f"{server.url}: {failure.message}; requests wait until the limit's window is over")
        server.limit(now, failure.wait)
        if min(one.limited_until for one in self.pool.servers) - now >= self.timeout:
            raise failure
        self._limited = failure

    def _leave(self, turn: Turn, now: float, failure: "Failure") -> None:
        """Let a server rest; a message says when it stops answering."""
        if turn.server.failures == turn.failures == 0:
            console.say(f"{turn.server.url}: {failure.message}; its requests go to the other servers")
        self.pool.failed(turn, now)

    async def _ask(self, url: str, path: str, body: dict[str, Any]) -> ServerResponse:
        """The response of one server. Raises Failure and RowError."""
        import openai

        client = self._clients[url]
        try:
            raw = await self._send(client, path, body)
            return self._read(raw.content)
        except openai.APIStatusError as error:
            failure = self._status_error(error)
        except openai.APIConnectionError as error:
            attempts = f" in {RETRIES + 1} attempts" if client.max_retries else ""
            failure = Failure(
                f"no answer{attempts} ({_cause(error)})",
                code="server-unreachable",
                transient=True,
                elsewhere=True,
            )
        except Failure as wrong:
            failure = wrong
        if isinstance(failure, Failure):
            failure.url = url
        raise failure from None

    async def _send(self, client: "AsyncOpenAI", path: str, body: dict[str, Any]) -> Any:
        """The raw response to one request, which the openai client retries."""
        route: Any = client.chat.completions if path == "chat/completions" else client.completions
        return await route.with_raw_response.create(**body)

    def _read(self, content: bytes) -> ServerResponse:
        """The response in the body of an answer. Raises Failure and RowError."""
        try:
            response = ServerResponse.model_validate_json(content)
        except ValidationError:
            hint = "does --base-url end as the server expects (usually /v1)?"
            raise self._malformed(content, "is not a completion", hint, transient=True) from None
        if len(self.key) >= console.SHORTEST_SECRET and self.key in response.model_dump_json():
            raise RowError(f"the reply contains the key in {KEY_VARIABLE}", code="wrong-answer")
        if not any(same_model(name, response.model) for name in (self.model, self.server.served_as) if name):
            answered = self._short(str(response.model))
            raise Failure(
                f"requested the model {self.model!r}, answered as {answered!r}",
                f"if that is the model, pass --served-as {answered}",
            )
        if not response.choices:
            raise Failure("the reply contains no choices", transient=True)
        return response

    def _malformed(self, content: bytes, problem: str, hint: str, *, transient: bool) -> "Failure":
        """The failure of an answer whose body has another form."""
        return Failure(
            f"the reply {problem}: {self._short(content.decode('utf-8', 'replace'))!r}", hint, transient=transient
        )

    def _status_error(self, error: "APIStatusError") -> Exception:
        """The RowError or Failure for a response with an error status."""
        message = error.body.get("message") if isinstance(error.body, dict) else error.body
        status, text = error.status_code, self._short(str(message or error.message))
        reason = whole_reason(error.body)
        if says_no_credit(reason):
            message = f"the account's quota is used up, HTTP {status}: {text}"
            return Failure(message, NO_CREDIT_HINT, code="server-refused")
        if status in ROW_STATUSES:
            return Refused(f"refused by the server, HTTP {status}: {text}", reason)
        hint = self.hints.get(status, RESUME_HINT)
        if (
            status in (401, 403, 404) and len(self.pool.servers) > 1
        ):  # a setting is at fault, so the run ends all the same
            hint = f"{hint}; all servers get the same key and model name: correct them, or leave this server out"
        transient = status in (408, 409) or status >= 500
        failure = Failure(
            f"HTTP {status}: {text}", hint, code="server-refused", transient=transient, elsewhere=transient
        )
        failure.limited = status == 429
        failure.wait = retry_after(error.response.headers) if failure.limited else None
        return failure

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


async def _no_retry_of_limits(response: Any) -> None:
    """Keep the openai client from repeating a request after a 429: all requests wait then, not this one alone."""
    if response.status_code == 429:
        response.headers["x-should-retry"] = "false"


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
        http_client=DefaultAsyncHttpxClient(follow_redirects=False, event_hooks={"response": [_no_retry_of_limits]}),
    )


def _cause(error: BaseException) -> str:
    """The class name of the innermost error. Its message is left out because it may quote a secret."""
    while error.__cause__ is not None:
        error = error.__cause__
    return type(error).__name__
