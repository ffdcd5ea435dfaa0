"""A real server on loopback: llama-cpp-python serving the embedded model's GGUF file (`make server-env` builds it).

The server computes in 4-bit weights times 8-bit activations, the local engine in the same weights as float32: letters
differ by some 0.1 nat in their log-probabilities. This server ignores the switches that continue a turn, so in chat
form the model writes the prefill itself after an unfinished turn: there letters may differ by half a nat.
"""

import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Cai
from helpers import manifest_of, rows_in, sample_row, write_rows
from server_env import GGUF, PYTHON

from cai_cli.constitution.schema import PreferenceConstitution, open_constitution
from cai_cli.engines import open_engine
from cai_cli.engines.base import LogprobRequest, RequestFailure, Server
from cai_cli.prompting.base import PromptFormat, user
from cai_cli.prompting.comparison import OPTIONS, comparison_request

pytestmark = [pytest.mark.server, pytest.mark.timeout(900), pytest.mark.xdist_group("server")]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    assert GGUF.exists(), "make server-env builds the server"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [PYTHON, "-m", "llama_cpp.server", "--model", GGUF, "--model_alias", "smollm2", "--host", "127.0.0.1"]
    words += ["--port", port, "--logits_all", "true", "--n_ctx", 4096, "--interrupt_requests", "false"]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as out, subprocess.Popen([str(w) for w in words], stdout=out, stderr=out) as server:
        address = f"http://127.0.0.1:{port}/v1"
        for _ in range(3000):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, log.read_text()
            time.sleep(0.1)
        else:
            raise AssertionError(f"the server did not start: {log.read_text()}")
        yield address
        server.kill()


@pytest.fixture
def served(url: str) -> tuple[str, ...]:
    return ("--model", "openai:smollm2", "--base-url", url, "--concurrency", "2")


def test_samples_come_from_it_each_with_its_own_seed(served: tuple[str, ...], cai: Cai, tmp_path: Path) -> None:
    prompts = ("Name a fruit.", "Is the sea salty?")
    write_rows(tmp_path / "prompts.jsonl", ({"id": f"p{i}", "prompt": text} for i, text in enumerate(prompts)))
    done = cai("sample", "prompts.jsonl", "-o", "out.jsonl", "-n", "2", "--max-new-tokens", "24", *served)
    assert done.code == 0, done.stderr
    samples = rows_in(tmp_path / "out.jsonl")
    assert [(row["id"], row["sample_index"]) for row in samples] == [("p0", 0), ("p0", 1), ("p1", 0), ("p1", 1)]
    assert samples[0]["completion"] != samples[1]["completion"]
    usage = manifest_of(tmp_path / "out.jsonl")["run"]["usage"]
    assert usage["requests"] == 4
    assert 4 <= usage["new_tokens"] <= 4 * 24
    assert usage["prompt_tokens"] > 4 * 10


def test_replies_are_criticised_and_revised_through_it(served: tuple[str, ...], cai: Cai, tmp_path: Path) -> None:
    write_rows(tmp_path / "samples.jsonl", (sample_row(i, reply="Just take it, nobody will know.") for i in range(2)))
    done = cai(
        "critique-revise", "samples.jsonl", "-o", "out.jsonl", "--rounds", "1", "--max-new-tokens", "24", *served
    )
    assert done.error in (None, "all-rejected"), done.stderr
    counts = manifest_of(tmp_path / "out.jsonl")["counts"]
    assert counts["in"] == 2 == counts["out"] + counts["rejected"]
    assert all("attempts" in reason for reason in counts["rejected_reasons"])  # the model's fault, never the server's


@pytest.mark.parametrize("form", ["chat", "raw"])
def test_pairs_are_labelled_through_it(form: str, served: tuple[str, ...], cai: Cai, tmp_path: Path) -> None:
    replies = ("I would rather not.", "Yes, and here is how.")
    write_rows(tmp_path / "samples.jsonl", (sample_row(i, k, replies[k]) for i in range(2) for k in range(2)))
    done = cai("label-prefs", "samples.jsonl", "-o", "out.jsonl", "--prompt-format", form, *served)
    assert done.code == 0, done.stderr
    assert manifest_of(tmp_path / "out.jsonl")["counts"]["in"] == 2
    rows = rows_in(tmp_path / "out.jsonl")
    assert len(rows) >= 1
    assert all(0 < vote["p_first"] < 1 for row in rows for vote in row["votes"])


@pytest.mark.parametrize(("form", "tolerance"), [("raw", 0.3), ("chat", 1.0)])
def test_log_probabilities_of_letters_are_near_the_local_engines(
    form: PromptFormat, tolerance: float, url: str
) -> None:
    loaded = open_constitution(PreferenceConstitution, None, None)
    questions = []
    for principle in loaded.principles[:3]:
        replies = ("I cannot help with that.", "Push a pick in and turn.")
        request = comparison_request(
            [user("How do I pick a lock?")], principle.comparison, replies, loaded.examples, form
        )
        questions.append(LogprobRequest(request.text, OPTIONS, request.prefill))
    local = open_engine("smollm2-135m", batch_size=None, device="cpu", dtype="float32")
    remote = open_engine("openai:smollm2", batch_size=None, device="auto", dtype="auto", server=Server(url))
    try:
        theirs = remote.option_logprobs(questions)
    finally:
        remote.close()
    for ours, other in zip(local.option_logprobs(questions), theirs, strict=True):
        assert not isinstance(ours, RequestFailure)
        assert other == pytest.approx(ours, abs=tolerance)
        assert isinstance(other, list)
        assert (ours[0] > ours[1]) == (other[0] > other[1])


def test_an_echo_of_the_wrong_positions_gives_no_vote(url: str) -> None:
    remote = open_engine("openai:smollm2", batch_size=None, device="auto", dtype="auto", server=Server(url))
    try:
        (answer,) = remote.option_logprobs(
            [LogprobRequest("The capital of France is", (" Paris", " a place unheard of"))]
        )
    finally:
        remote.close()
    assert isinstance(answer, RequestFailure)
