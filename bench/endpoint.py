"""Measures the throughput of `cai sample` through a loopback server as a share of the server's maximum.

    python bench/endpoint.py [--rows 640] [--slots 32] [--seconds 1.0] [--repeats 3]

The server has `--slots` slots. An answer takes `--seconds`, varied by up to a half with the number of the request, so
that both sides get the same. A plain socket client with as many connections as slots measures the maximum. Then the
command runs as a separate process over the same prompts, with `--concurrency` equal to the slots. Its startup (imports,
hashing) is excluded: the time runs from the first request that the server receives to the last answer. Prints one line
per paired run, then `ratio endpoint VALUE`: the median over the pairs of the rows a second of `cai` over the maximum.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median


class Server:
    """Serves `slots` requests at a time, while the others wait. A connection may send any number of requests."""

    def __init__(self, slots: int, seconds: float) -> None:
        self.slots, self.seconds = asyncio.Semaphore(slots), seconds
        self.reset()

    def reset(self) -> None:
        self.first, self.last, self.begun, self.answered = 0.0, 0.0, 0, 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await _head(reader):
            self.first = self.first or time.perf_counter()
            length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(length)
            async with self.slots:
                self.begun += 1
                await asyncio.sleep(self.seconds * (0.5 + self.begun * 0.618034 % 1))
            self.last, self.answered = time.perf_counter(), self.answered + 1
            writer.write(ANSWER)
            await writer.drain()
        writer.close()


async def _head(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        return b""


def _http(body: dict[str, object]) -> bytes:
    data = json.dumps(body).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(data) + data


ANSWER = _http(
    {
        "model": "m",
        "choices": [{"message": {"role": "assistant", "content": "A reply. " * 20}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 40, "completion_tokens": 60},
    }
)


async def bare(port: int, prompts: list[str], connections: int) -> None:
    """Sends every prompt once over `connections` connections that are never idle."""
    waiting = iter(prompts)

    async def ask() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for prompt in waiting:
            body = json.dumps({"model": "m", "messages": [{"role": "user", "content": prompt}], "seed": 1}).encode()
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.rpartition(b": ")[2]))
        writer.close()
        await writer.wait_closed()

    await asyncio.gather(*(ask() for _ in range(connections)))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rows", type=int, default=640)
    arguments.add_argument("--slots", type=int, default=32)
    arguments.add_argument("--seconds", type=float, default=1.0)
    arguments.add_argument("--repeats", type=int, default=3)
    options = arguments.parse_args()
    prompts = [f"Question {i}: what would you do?" for i in range(options.rows)]
    server, loop = Server(options.slots, options.seconds), asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    listening = asyncio.run_coroutine_threadsafe(asyncio.start_server(server.serve, "127.0.0.1", 0), loop).result()
    port = listening.sockets[0].getsockname()[1]
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "prompts.jsonl"
        source.write_text("".join(json.dumps({"id": str(i), "prompt": p}) + "\n" for i, p in enumerate(prompts)))
        words = [
            sys.executable,
            "-m",
            "cai_cli",
            "sample",
            str(source),
            "--quiet",
            "--overwrite",
            "-o",
            f"{folder}/out",
        ]
        words += [
            "--model",
            "openai:m",
            "--base-url",
            f"http://127.0.0.1:{port}/v1",
            "--concurrency",
            str(options.slots),
        ]
        for _ in range(options.repeats):
            rates = []
            for run in (
                lambda: asyncio.run(bare(port, prompts, options.slots)),
                lambda: subprocess.run(words, check=True),
            ):
                server.reset()
                run()
                assert server.answered == options.rows
                rates.append(options.rows / (server.last - server.first))
            print(f"cai {rates[1]:.1f} rows/s, bare client {rates[0]:.1f} rows/s")
            ratios.append(rates[1] / rates[0])
    print(f"ratio endpoint {median(ratios):.3f}")


if __name__ == "__main__":
    main()
