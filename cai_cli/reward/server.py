"""The HTTP server of `cai serve-reward`: answers the protocols of `--pm-url`, OpenRLHF and verl.

Any POST path takes both requests; the fields tell them apart. Requests that arrive while others are scored are scored
together. The protocols are described in docs/preference_models.md and docs/scale.md.
"""

import math
import re
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import SimpleQueue
from typing import Any, Protocol

import orjson
from pydantic import TypeAdapter, ValidationError

from cai_cli.common import console
from cai_cli.common.errors import CaiError, RowError
from cai_cli.common.library_errors import library_failure
from cai_cli.data.schema import Message
from cai_cli.engines.base import RequestFailure

MOST_ITEMS = 256  # scored together
LARGEST_BODY = 64 << 20  # bytes
# What templates write after a reply: <|im_end|>, <|eot_id|>, </s>, <end_of_turn>, <eos> and others of their kind.
_END_OF_TURN = re.compile(r"(\s*(<[|｜][^<>|｜]{1,40}[|｜]>|</s>|<eos>|<end_of_turn>))+\s*\Z")
_CONVERSATION: TypeAdapter[list[Message]] = TypeAdapter(list[Message])


@dataclass(frozen=True)
class Reward:
    """The reward of one reply.

    Attributes:
        value: The reward.
        parts: What it consists of, by name.
    """

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)


class RewardModel(Protocol):
    """A source of rewards: a preference model, or a constitution with a judge."""

    name: str

    def prepare(self, item: Sequence[Message] | list[int]) -> Any:
        """Convert an item, whose last message is the reply, to what `rewards` takes. Raises RowError."""
        ...

    def rewards(self, prepared: Sequence[Any]) -> list[Reward | RequestFailure]:
        """One reward for each prepared item, in order. Raises CaiError."""
        ...


class Batcher:
    """Scores the items of all requests that wait, together, in one thread.

    Args:
        model: The source of the rewards.
    """

    def __init__(self, model: RewardModel) -> None:
        self.model = model
        self._waiting: SimpleQueue[tuple[list[Any], Future[list[Reward | RequestFailure]]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def rewards(self, items: Sequence[Sequence[Message] | list[int]]) -> list[Reward]:
        """The rewards of the items of one request. Raises RowError for an invalid item, CaiError."""
        prepared = [self._prepared(number, item) for number, item in enumerate(items)]
        result: Future[list[Reward | RequestFailure]] = Future()
        self._waiting.put((prepared, result))
        found: list[Reward] = []
        for number, reward in enumerate(result.result()):
            if isinstance(reward, RequestFailure):
                raise RowError(f"item {number}: {reward.reason}", code="request-failed")
            if not math.isfinite(reward.value):
                raise CaiError(f"item {number}: the reward is {reward.value}", code="not-finite")
            found.append(reward)
        return found

    def _prepared(self, number: int, item: Sequence[Message] | list[int]) -> Any:
        try:
            return self.model.prepare(item)
        except RowError as error:
            raise RowError(f"item {number}: {error.message}", code=error.code) from None

    def close(self) -> None:
        """Score what waits, and end."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (first := self._waiting.get()) is not None:
            requests, size, more = [first], len(first[0]), True
            while more and size < MOST_ITEMS and not self._waiting.empty():
                if (request := self._waiting.get()) is None:
                    self._waiting.put(None)
                    more = False
                else:
                    requests.append(request)
                    size += len(request[0])
            try:
                rewards = iter(self.model.rewards([item for items, _ in requests for item in items]))
                for items, result in requests:
                    result.set_result([next(rewards) for _ in items])
            except Exception as error:  # its requests report it, and the next ones may work
                for _, result in requests:
                    if not result.done():
                        result.set_exception(error)


class RewardServer(ThreadingHTTPServer):
    """A server of rewards. `server_close` waits for the requests in progress.

    Args:
        model: The source of the rewards.
        host: The address to listen on.
        port: The port; 0 takes a free one.
    """

    daemon_threads = False
    request_queue_size = 1024

    def __init__(self, model: RewardModel, host: str, port: int) -> None:
        self.model, self.batcher = model, Batcher(model)
        super().__init__((host, port), _Handler)

    def server_close(self) -> None:
        super().server_close()
        self.batcher.close()


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    timeout = 60  # seconds for a request that does not arrive

    def do_GET(self) -> None:
        if self.path == "/health":
            self._send(200, {"status": "ok", "model": self.server.model.name})
        else:
            self._send(404, _error("POST a request for rewards, or GET /health"))

    def do_POST(self) -> None:
        try:
            self._send(200, self._answer(self._body()))
        except RowError as error:
            self._send(400, _error(error.message))
        except CaiError as error:
            console.warn(f"a request was not answered: {error.message}")
            self._send(500, _error(error.message))
        except OSError:
            return  # the sender is gone
        except Exception as error:
            failure = library_failure(error)
            what = failure.message if failure else f"a bug in cai: {type(error).__name__}: {error}"
            console.warn(f"a request was not answered: {what}" + (f" ({failure.hint})" if failure else ""))
            self._send(500, _error(failure.message if failure else type(error).__name__))

    def _body(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > LARGEST_BODY:
            raise RowError(f"Content-Length must be a number up to {LARGEST_BODY:,}", code="invalid-row")
        try:
            body = orjson.loads(self.rfile.read(int(length)))
        except orjson.JSONDecodeError as error:
            raise RowError(f"not JSON: {error}", code="invalid-row") from None
        if not isinstance(body, dict):
            raise RowError("not a JSON object", code="invalid-row")
        return body

    def _answer(self, body: Mapping[str, Any]) -> dict[str, Any]:
        batcher = self.server.batcher
        if "query" in body:
            rewards = batcher.rewards(openrlhf_conversations(body))
            values = [reward.value for reward in rewards]
            names = rewards[0].parts if rewards else ()
            parts = {name: [reward.parts[name] for reward in rewards] for name in names}
            return {"rewards": values, "scores": values, "extra_logs": parts}
        if not isinstance(body.get("input"), list):
            raise RowError("`input` must be a list of conversations or token ids", code="invalid-row")
        items = [_item(number, item) for number, item in enumerate(body["input"])]
        return {"scores": [reward.value for reward in batcher.rewards(items)], "model": self.server.model.name}

    def _send(self, status: int, answer: Mapping[str, Any]) -> None:
        data = orjson.dumps(answer)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing for each request."""


def openrlhf_conversations(body: Mapping[str, Any]) -> list[list[Message]]:
    """The conversations of a request of OpenRLHF (`--reward.remote_url`).

    `query` holds prompts and replies and `prompts` the prompts, both in the text of the policy's chat template, and
    `labels` what `cai export --for openrlhf` wrote: the messages of the prompts. The reply is what `query` adds to the
    prompt, without the end of turn.

    Raises:
        RowError: The fields are not as described.
    """
    queries, prompts, labels = (body.get(name) for name in ("query", "prompts", "labels"))
    if not (isinstance(queries, list) and isinstance(prompts, list) and isinstance(labels, list)):
        raise RowError("`query`, `prompts` and `labels` must be lists", code="invalid-row")
    if not len(queries) == len(prompts) == len(labels):
        raise RowError("`query`, `prompts` and `labels` must have the same length", code="invalid-row")
    conversations = []
    for number, (query, prompt, label) in enumerate(zip(queries, prompts, labels, strict=True)):
        if not (isinstance(query, str) and isinstance(prompt, str) and query.startswith(prompt)):
            raise RowError(f"item {number}: `query` does not start with its prompt", code="invalid-row")
        try:
            messages = _CONVERSATION.validate_json(label)
        except (ValidationError, TypeError):
            raise RowError(
                f"item {number}: the label holds no messages: `cai export --for openrlhf` writes them, and "
                "--data.label_key label sends them",
                code="invalid-row",
            ) from None
        reply = _END_OF_TURN.sub("", query[len(prompt) :])
        conversations.append([*messages, Message(role="assistant", content=reply)])
    return conversations


def _item(number: int, item: object) -> list[Message] | list[int]:
    if isinstance(item, list) and item and all(type(token) is int for token in item):
        return item
    try:
        messages = _CONVERSATION.validate_python(item)
    except ValidationError as error:
        raise RowError(f"item {number}: {error.errors()[0]['msg']}", code="invalid-row") from None
    if not messages or messages[-1].role != "assistant":
        raise RowError(f"item {number}: the last message must be the assistant's reply", code="invalid-row")
    return messages


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message}}
