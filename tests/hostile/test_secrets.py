"""A canary key through every failure of a server, the Hub or `cai`: it never appears in a file or on a stream."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import Cai, Done
from helpers import rows_in, sample_row, write_rows
from loopback import Behaviour, Loopback, Request, completion, cut, error, good, hang, http, reset
from report_run import make_run

from cai_cli.cards.export import export
from cai_cli.cli.app import build_app
from cai_cli.common import console
from cai_cli.engines import openai_client

KEY = "sk-canary-4242424242-abcdefghij-0123456789"


@pytest.fixture(autouse=True)
def canaries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inputs, keys in every variable that holds one, and waits of hundredths of a second."""
    write_rows(tmp_path / "prompts.jsonl", ({"id": f"p{i}", "prompt": f"question {i}"} for i in range(4)))
    write_rows(tmp_path / "samples.jsonl", (sample_row(i, k) for i in range(4) for k in range(2)))
    write_rows(tmp_path / "other.jsonl", (sample_row(i, k, f"other {i} {k}") for i in range(4) for k in range(2)))
    for name in console.SECRETS:
        monkeypatch.setenv(name, KEY)
    monkeypatch.setattr(openai_client, "RETRIES", 1)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    return


def leaks(done: Done, folder: Path) -> list[str]:
    """The files and streams that contain the key or a recognisable part of it."""
    texts = {"stdout": done.stdout.encode(), "stderr": done.stderr.encode()}
    texts |= {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    parts = [KEY[start : start + 14].encode() for start in (0, 14, len(KEY) - 14)]
    return [name for name, text in texts.items() if any(part in text for part in parts)]


def echo(request: Request) -> str:
    return request.headers["authorization"]


def replies(request: Request, **changes: Any) -> bytes:
    return http(completion(request, **changes))


def escaped(request: Request) -> bytes:
    """A reply that spells the key in JSON escapes."""
    spelled = "".join(f"\\u{ord(c):04x}" for c in KEY)
    return http(json.dumps(completion(request, text="HERE")).replace("HERE", spelled).encode())


def nested(request: Request) -> bytes:
    return http({"error": {"message": {"headers": {"Authorization": [echo(request)]}}}}, 500)


ECHOES: dict[str, Behaviour] = {
    **{f"HTTP {status}": lambda r, status=status: error(status, f"bad key {echo(r)}")  # type: ignore[misc]
       for status in (400, 401, 403, 404, 409, 422, 429, 500, 503)},
    "a message that is not text": nested,
    "a body of text": lambda r: http(f"Request: {r.headers}".encode(), 502),
    "a page": lambda r: http(f"<html>{echo(r)}</html>".encode(), Content_Type="text/html"),
    "a body cut within the key": lambda r: http(b"x" * 175 + echo(r).encode()),
    "half of a JSON object": lambda r: http(json.dumps({"choices": [], "key": echo(r)})[:-9].encode()),
    "another model": lambda r: replies(r, model=echo(r)),
    "a version of the model": lambda r: replies(r, model=f"m-{echo(r)}"),
    "the reply": lambda r: replies(r, text=f"You sent {echo(r)}."),
    "the reply in escapes": escaped,
    "why it ended": lambda r: replies(r, choices=[{"finish_reason": echo(r), "message": {"content": "x"}, "text": "x"}]),
    "a redirect": lambda r: http(b"", 302, Location=f"http://127.0.0.1:1/{echo(r).split()[-1]}"),
    "a header": lambda r: http(completion(r), X_Request_Id=echo(r)),
    "choices that are none": lambda r: http({"choices": [echo(r)]}),
    "no choices": lambda r: http({"choices": [], "id": echo(r)}),
}  # fmt: skip
SILENT: dict[str, Behaviour] = {"hang": hang, "reset": reset, "cut": cut, "good": good}


@pytest.mark.parametrize("how", [*ECHOES, *SILENT])
def test_the_key_is_never_written_whatever_a_server_does(how: str, cai: Cai, tmp_path: Path) -> None:
    with Loopback((ECHOES | SILENT)[how]) as server:
        words = ("sample", "prompts.jsonl", "-o", "run/out.jsonl", "--model", "openai:m", "--base-url", server.url)
        done = cai(*words, "--json", "--timeout", "1", "--concurrency", "1")
        assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"
    assert not leaks(done, tmp_path)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("how", ["HTTP 400", "HTTP 401", "a page", "the reply"])
@pytest.mark.parametrize(
    "words",
    [
        ("critique", "samples.jsonl"),
        ("critique-revise", "samples.jsonl", "--rounds", "1"),
        ("label-prefs", "samples.jsonl"),
        ("label-prefs", "samples.jsonl", "--method", "verdict"),
        ("label-prefs", "samples.jsonl", "--method", "cot"),
        ("eval harm", "samples.jsonl"),
        ("eval compare", "samples.jsonl", "other.jsonl", "--judge"),
    ],
    ids=" ".join,
)
def test_no_stage_that_uses_a_server_writes_the_key(words: tuple[str, ...], how: str, cai: Cai, tmp_path: Path) -> None:
    stage, *rest = words
    model = ["openai:m"] if rest[-1] == "--judge" else ["--model", "openai:m"]
    with Loopback(ECHOES[how]) as server:
        done = cai(*stage.split(), *rest, *model, "-o", "run/out.jsonl", "--base-url", server.url, "--json")
        assert server.requests
    assert not leaks(done, tmp_path)
    assert "Traceback" not in done.stderr


def test_a_reply_that_holds_the_key_is_rejected_for_that_reason(cai: Cai, tmp_path: Path) -> None:
    with Loopback(lambda r: ECHOES["the reply"](r) if "question 1" in r.asked else good(r)) as server:
        cai("sample", "prompts.jsonl", "-o", "out.jsonl", "--model", "openai:m", "--base-url", server.url)
    assert [row["id"] for row in rows_in(tmp_path / "out.jsonl")] == ["p0", "p2", "p3"]
    (rejected,) = rows_in(tmp_path / "out.jsonl.rejected.jsonl")
    assert rejected["reason"] == "the reply contains the key in OPENAI_API_KEY"


@pytest.mark.parametrize("word", ["none", "EMPTY", "token"])
def test_a_placeholder_key_is_not_a_secret(word: str, cai: Cai, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", word)
    with Loopback(lambda r: replies(r, text=f"There are {word} left.")) as server:
        assert (
            cai("sample", "prompts.jsonl", "-o", "out.jsonl", "--model", "openai:m", "--base-url", server.url).code == 0
        )
    assert rows_in(Path("out.jsonl"))[0]["completion"][0]["content"] == f"There are {word} left."


def test_an_unexpected_error_prints_its_traceback_without_the_key(
    cai: Cai, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError(f"headers {{'Authorization': 'Bearer {os.environ['OPENAI_API_KEY']}'}} \x1b[31m")

    monkeypatch.setattr(openai_client.CompletionClient, "_parsed", broken)
    with Loopback(good) as server:
        done = cai("sample", "prompts.jsonl", "-o", "run/out.jsonl", "--model", "openai:m", "--base-url", server.url)
    assert done.code == 1
    assert "Traceback" in done.stderr
    assert "Bearer [OPENAI_API_KEY]" in done.stderr
    assert "this is a bug in cai" in done.stderr
    assert "\x1b" not in done.stderr
    assert not leaks(done, tmp_path)


def test_a_key_in_the_address_is_refused_before_anything_is_written(cai: Cai, tmp_path: Path) -> None:
    for address in (f"http://me:{KEY}@127.0.0.1:1/v1", f"http://127.0.0.1:1/v1?key={KEY}"):
        (tmp_path / "run/run.yaml").unlink(missing_ok=True)
        done = cai("sample", "prompts.jsonl", "-o", "out.jsonl", "--model", "openai:m", "--base-url", address)
        assert done.code == 2
        assert not leaks(done, tmp_path)
        (tmp_path / "run").mkdir(exist_ok=True)
        run_file = {
            "name": "r",
            "steps": {
                "s": {"command": "sample", "input": "../prompts.jsonl", "model": "openai:m", "base-url": address}
            },
        }
        (tmp_path / "run/run.yaml").write_text(json.dumps(run_file))
        for more in ((), ("--dry-run",)):
            done = cai("run", "run/run.yaml", "--out", "runs/r", *more)
            assert done.code == 2
            assert leaks(done, tmp_path) == ["run/run.yaml"]  # where the user put it


def test_no_option_takes_a_key() -> None:
    def names(command: Any) -> Iterator[str]:
        yield from (parameter.name for parameter in command.params)
        for inner in getattr(command, "commands", {}).values():
            yield from names(inner)

    found = set(names(typer.main.get_command(build_app())))
    assert {"base_url", "input", "model"} <= found
    assert not {n for n in found if n.rpartition("_")[2] in ("key", "token", "secret", "password", "auth", "header")}


def test_doctor_a_run_and_its_report_name_no_key(cai: Cai, tmp_path: Path) -> None:
    write_rows(tmp_path / "script.jsonl", [{"replies": ["fine."]}])
    (tmp_path / "r.yaml").write_text(
        "name: r\nmodel: scripted:script.jsonl\nsteps: {s: {command: sample, input: prompts.jsonl}}\n"
    )
    for words in (("doctor",), ("doctor", "--json"), ("run", "r.yaml", "--out", "runs/r"), ("report", "runs/r")):
        done = cai(*words)
        assert done.code == 0, done.stderr
        assert not leaks(done, tmp_path)


# --- in a process of its own, with every library as loud as it gets ---------------------------------------------------

LOUD = {
    "OPENAI_LOG": "debug", "HF_DEBUG": "1", "HF_HUB_VERBOSITY": "debug", "TRANSFORMERS_VERBOSITY": "debug",
    "DATASETS_VERBOSITY": "debug", "PYTHONDEVMODE": "1", "PYTHONASYNCIODEBUG": "1", "LOGLEVEL": "DEBUG",
}  # fmt: skip


def loud(folder: Path, *words: str, **environment: str) -> Done:
    command = [sys.executable, "-W", "ignore", "-m", "cai_cli", *words]
    env = {**os.environ, **LOUD, **environment}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("how", ["HTTP 401", "the reply", "a body of text", "hang", "refused"])
def test_libraries_at_their_loudest_do_not_print_the_key(how: str, tmp_path: Path) -> None:
    with Loopback((ECHOES | SILENT).get(how, good)) as server:
        url = "http://127.0.0.1:1/v1" if how == "refused" else server.url
        words = ("sample", "prompts.jsonl", "-o", "run/out.jsonl", "--model", "openai:m", "--base-url", url)
        done = loud(tmp_path, *words, "--timeout", "2", "--limit", "1")
    assert done.code == 1, done.stderr
    assert not leaks(done, tmp_path)


@pytest.mark.parametrize("status", [401, 403, 404, 409, 500])
def test_a_push_that_fails_does_not_print_the_token(status: int, tmp_path: Path) -> None:
    run = make_run(tmp_path / "made")
    export(str(run / "samples.jsonl"), tmp_path / "ds")
    with Loopback(lambda r: http({"error": f"bad token {echo(r)}"}, status, X_Error_Message=echo(r))) as server:
        done = loud(tmp_path, "push", "ds", "me/data", HF_ENDPOINT=server.url.removesuffix("/v1"))
        assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"
    assert done.code == 1
    assert "cannot push to me/data" in done.stderr
    assert not leaks(done, tmp_path)


def test_a_model_that_the_hub_refuses_is_named_without_the_token(tmp_path: Path) -> None:
    with Loopback(lambda r: http({"error": f"bad token {echo(r)}"}, 401, X_Error_Message=echo(r))) as server:
        environment = {
            "HF_ENDPOINT": server.url.removesuffix("/v1"),
            "HF_HOME": str(tmp_path / "hub"),
            "HF_HUB_OFFLINE": "0",
        }
        done = loud(tmp_path, "models", "fetch", "some/model", **environment)
        assert server.requests
    assert done.code == 1
    assert not leaks(done, tmp_path)
