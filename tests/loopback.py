"""A raw OpenAI-compatible server on loopback: every byte of an answer, and the socket itself, is the test's."""

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self
from zlib import crc32

from cai_cli.engines import open_engine
from cai_cli.engines.base import Engine, Server

Json = dict[str, Any]
# What to send, or None where the socket has been dealt with.
Behaviour = Callable[["Request"], bytes | None]


@dataclass(frozen=True)
class Request:
    number: int  # from 1, in order of arrival
    path: str
    headers: dict[str, str]
    body: Json
    connection: socket.socket

    @property
    def asked(self) -> str:
        """The last message of the prompt."""
        return str(self.body["messages"][-1]["content"] if "messages" in self.body else self.body["prompt"])


def http(body: bytes | Json, status: int = 200, *, length: int | None = None, **headers: str) -> bytes:
    """One whole HTTP response; `length` lies about the size of the body."""
    if isinstance(body, dict):
        body, headers = json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
    size = len(body) if length is None else length
    lines = [f"HTTP/1.1 {status} Status", f"Content-Length: {size}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def completion(request: Request, text: str | None = None, *, logprobs: Json | None = None, **changes: Any) -> Json:
    """A well-formed answer that says `text` (by default something that the prompt and the seed decide)."""
    said = f"Words {crc32(request.asked.encode())} {request.body.get('seed')}." if text is None else text
    choice: Json = {"index": 0, "finish_reason": "stop", "logprobs": logprobs}
    choice |= {"message": {"role": "assistant", "content": said}} if "messages" in request.body else {"text": said}
    answer = {
        "model": request.body["model"],
        "choices": [choice],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5},
    }
    return answer | changes


def good(request: Request) -> bytes:
    return http(completion(request))


def error(status: int, message: str = "no", **headers: str) -> bytes:
    return http({"error": {"message": message}}, status, **headers)


def reset(request: Request) -> None:
    """End the connection the hard way."""
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.connection.close()


def hang(request: Request) -> None:
    """Say nothing until the other side gives up."""
    request.connection.settimeout(30)
    request.connection.recv(1)


def trickle(request: Request) -> None:
    """One byte each fifth of a second."""
    for byte in good(request):
        request.connection.sendall(bytes([byte]))
        time.sleep(0.2)


def cut(request: Request) -> bytes:
    whole = json.dumps(completion(request)).encode()
    return http(whole[: len(whole) // 2], length=len(whole), Content_Type="application/json")


@dataclass
class Loopback:
    """Answers each request on its own connection with `behaviour`; keeps the requests."""

    behaviour: Behaviour = good
    port: int = 0
    requests: list[Request] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=256)
        self.port = self._listener.getsockname()[1]
        self._lock, self._open = threading.Lock(), set[socket.socket]()
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        """Gone, and every connection with it; a second time nothing."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in list(self._open):
            with suppress(OSError):  # closed already
                connection.shutdown(socket.SHUT_RDWR)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            self._open.add(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):  # the other side gives up where a test wants it to
            request = self._read(connection)
            if request and (answer := self.behaviour(request)):
                connection.sendall(answer)
        self._open.discard(connection)

    def _read(self, connection: socket.socket) -> Request | None:
        data = b""
        while b"\r\n\r\n" not in data:
            if not (piece := connection.recv(65536)):
                return None
            data += piece
        head, _, body = data.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        while len(body) < int(headers.get("content-length", "0")):
            body += connection.recv(65536)
        with self._lock:
            number = len(self.requests) + 1
            request = Request(number, first.split()[1], headers, json.loads(body or b"{}"), connection)
            self.requests.append(request)
        return request


@contextmanager
def engine(behaviour: Behaviour, **more: float | str) -> Iterator[tuple[Engine, list[Request]]]:
    """An engine whose server answers with `behaviour`, and the requests that it sent."""
    with Loopback(behaviour) as loopback:
        opened = open_engine(
            "openai:m",
            batch_size=None,
            device="auto",
            dtype="auto",
            server=Server(loopback.url, **more),  # type: ignore[arg-type]
        )
        try:
            yield opened, loopback.requests
        finally:
            opened.close()
