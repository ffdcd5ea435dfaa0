"""`cai serve-reward`: the protocols of `--pm-url` and OpenRLHF, and how the server ends."""

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from conftest import Cai
from helpers import Json

from cai_cli.common.errors import CaiError, RowError
from cai_cli.data.schema import Message
from cai_cli.engines.base import RequestFailure
from cai_cli.reward.server import Reward, openrlhf_conversations

ASKED = [{"role": "user", "content": "Hi"}]
CHAT = [*ASKED, {"role": "assistant", "content": "Hello."}]


class Lengths:
    """Rewards the length of a reply or of token ids; remembers how many it scored together."""

    name = "lengths"

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.entered, self.go = threading.Semaphore(0), threading.Event()
        self.go.set()

    def prepare(self, item: Any) -> Any:
        if isinstance(item[0], Message) and item[-1].content == "bad":
            raise RowError("a bad reply", code="invalid-row")
        return item

    def rewards(self, prepared: Any) -> list[Reward | RequestFailure]:
        self.entered.release()
        assert self.go.wait(30)
        self.sizes.append(len(prepared))
        return [self._reward(item) for item in prepared]

    def _reward(self, item: Any) -> Reward | RequestFailure:
        if not isinstance(item[0], Message):
            return Reward(float(len(item)))
        text = item[-1].content
        if text == "broken":
            raise CaiError("the weights are broken", code="not-finite")
        return (
            RequestFailure("no answer") if text == "fails" else Reward(float(len(text)), {"length": float(len(text))})
        )


def post(url: str, body: Any) -> tuple[int, Json]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urlopen(Request(url, data), timeout=30) as answer:  # noqa: S310
            return answer.status, json.load(answer)
    except HTTPError as error:
        return error.code, json.load(error)


def reply(text: str) -> list[Json]:
    return [*ASKED, {"role": "assistant", "content": text}]


def test_the_two_fields_of_pm_url_give_a_score_for_each_item(serve: Any) -> None:
    url = serve(Lengths())
    assert post(url, {"model": "pm", "input": [CHAT, reply("ok")]}) == (200, {"scores": [6.0, 2.0], "model": "lengths"})
    assert post(f"{url}/any/path", {"model": "pm", "input": [[1, 2, 3]], "use_activation": False})[1]["scores"] == [3.0]
    assert post(url, {"model": "pm", "input": []})[1]["scores"] == []


def test_a_request_of_openrlhf_gets_rewards_scores_and_logs(serve: Any) -> None:
    label = json.dumps(ASKED)
    body = {"query": ["<u>Hi<a>Hello.</s>", "<u>Hi<a>ok"], "prompts": ["<u>Hi<a>"] * 2, "labels": [label] * 2}
    expected = {"rewards": [6.0, 2.0], "scores": [6.0, 2.0], "extra_logs": {"length": [6.0, 2.0]}}
    assert post(f"{serve(Lengths())}/get_reward", body) == (200, expected)


@pytest.mark.parametrize("end", ["", "<|im_end|>", "<|im_end|>\n", "<|eot_id|>", "</s>", "<end_of_turn>\n", "<|im_end|>\n<|endoftext|>"])  # fmt: skip
def test_the_end_of_turn_is_not_part_of_the_reply(end: str) -> None:
    body = {"query": [f"P a <b> reply{end}"], "prompts": ["P "], "labels": [json.dumps(ASKED)]}
    ((*_, last),) = openrlhf_conversations(body)
    assert last.content == "a <b> reply"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "not JSON"),
        ([1], "not a JSON object"),
        ({"model": "pm"}, "`input` must be"),
        ({"input": [CHAT, ASKED]}, "item 1: the last message"),
        ({"input": [CHAT, reply("bad")]}, "item 1: a bad reply"),
        ({"input": [reply("fails")]}, "item 0: no answer"),
        ({"input": ["text"]}, "item 0: "),
        ({"query": ["a"], "prompts": ["a"], "labels": [""]}, "item 0: the label holds no messages"),
        ({"query": ["a"], "prompts": ["b"], "labels": [json.dumps(ASKED)]}, "item 0: `query` does not start"),
        ({"query": ["a"], "prompts": [], "labels": []}, "the same length"),
    ],
)
def test_a_request_at_fault_is_refused_in_one_line(serve: Any, body: Any, message: str) -> None:
    status, answer = post(serve(Lengths()), body)
    assert (status, message in answer["error"]["message"], "\n" in answer["error"]["message"]) == (400, True, False)


def test_an_error_of_the_model_is_an_answer_and_the_server_goes_on(serve: Any) -> None:
    url = serve(Lengths())
    assert post(url, {"input": [reply("broken")]}) == (500, {"error": {"message": "the weights are broken"}})
    assert post(url, {"input": [CHAT]})[0] == 200


def test_requests_that_arrive_while_others_are_scored_are_scored_together(serve: Any) -> None:
    model = Lengths()
    model.go.clear()
    url, answers = serve(model), []
    server = serve.servers[-1]
    threads = [
        threading.Thread(target=lambda n=n: answers.append((n, post(url, {"input": [reply("x" * n)]})[1]["scores"])))
        for n in range(1, 7)
    ]
    threads[0].start()
    assert model.entered.acquire(timeout=30)
    for thread in threads[1:]:
        thread.start()
    while server.batcher._waiting.qsize() < 5:
        threading.Event().wait(0.01)
    model.go.set()
    for thread in threads:
        thread.join()
    assert model.sizes == [1, 5]
    assert sorted(answers) == [(n, [float(n)]) for n in range(1, 7)]


def test_health(serve: Any) -> None:
    with urlopen(f"{serve(Lengths())}/health", timeout=30) as answer:  # noqa: S310
        assert json.load(answer) == {"status": "ok", "model": "lengths"}


CONSTITUTION = """\
kind: preference
name: two
principles:
  - {id: kind, comparison: "Which reply is kinder?"}
  - {id: brief, comparison: "Which reply is briefer?", weight: 3}
"""


def test_a_constitution_is_served_on_loopback_and_sigterm_ends_it_cleanly(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(CONSTITUTION)
    lines = ['{"contains": "turned down", "scores": [-3, -1]}', '{"contains": "kinder", "scores": [-1, -2]}',
             '{"scores": [-1, -4]}']  # fmt: skip
    (tmp_path / "script.jsonl").write_text("\n".join(lines))
    command = [
        sys.executable,
        "-m",
        "cai_cli",
        "serve-reward",
        "c.yaml",
        "--model",
        "scripted:script.jsonl",
        "--port",
        "0",
    ]
    server = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert server.stderr
    try:
        line = server.stderr.readline()
        url = line.split()[-1]
        assert url.startswith("http://127.0.0.1:")
        status, answer = post(url, {"query": ["Hi<a>Hello."], "prompts": ["Hi<a>"], "labels": [json.dumps(ASKED)]})
        # Half the difference of the log-odds of Yes in the two phrasings; the mean by the weights of 1 and 3.
        assert (status, answer["extra_logs"]) == (200, {"kind": [1.5], "brief": [2.5]})
        assert answer["rewards"] == [pytest.approx((1.5 + 3 * 2.5) / 4)]
        assert post(url, {"input": [[1, 2]]})[0] == 400
    finally:
        server.send_signal(signal.SIGTERM)
        _, rest = server.communicate(timeout=30)
    assert (server.returncode, rest.count("\n")) == (0, 1)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("c.yaml",), "missing-option"),
        (("pm", "--model", "m"), "option-conflict"),
        (("pm", "--concurrency", "4"), "option-conflict"),
        (("pm", "--dtype", "bfloat16"), "option-conflict"),
        (("pm", "--prompt-format", "raw"), "option-conflict"),
        (("no-such-model-here",), "unknown-model"),
    ],
)
def test_options_that_do_not_fit_the_source_are_usage_errors(cai: Cai, words: tuple[str, ...], code: str) -> None:
    assert cai("serve-reward", *words).error == code


def test_a_price_is_no_option_because_no_cost_is_reported(cai: Cai) -> None:
    assert cai("serve-reward", "c.yaml", "--model", "m", "--price-in", "1").code == 2
