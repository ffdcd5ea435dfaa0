"""Scores from a server: what is requested, which answers are read, and what becomes of every failure."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import Cai
from helpers import manifest_of, rows_in, stage, write_rows
from loopback import Behaviour, Loopback, Request, error, http, reset
from tiny import tiny_model_dir

from cai_cli.common.errors import CaiError, RowError, UsageError
from cai_cli.engines import openai_client
from cai_cli.models.loading import load_reward_model, load_tokenizer
from cai_cli.reward.preference_model import score_ids
from cai_cli.reward.score_client import ScoreClient
from cai_cli.reward.scorer import Scorer

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
score = stage("score")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A language model and a preference model."""
    folder = tmp_path_factory.mktemp("models")
    model = tiny_model_dir(folder / "tiny")
    load_reward_model(model, new_head_seed=0).save_pretrained(folder / "pm")
    load_tokenizer(model).save_pretrained(folder / "pm")
    return str(model), str(folder / "pm")


def serving(pm: str, form: Callable[[list[float]], dict[str, Any]]) -> Behaviour:
    """A server that scores token ids with the preference model, and answers in one of the two forms."""
    path = Path(pm)
    model, tokenizer = load_reward_model(path), load_tokenizer(path)
    return lambda request: http(form(score_ids(model, tokenizer, request.body["input"], 4)))


def plainly(scores: list[float]) -> dict[str, Any]:
    return {"model": "a name of its own", "scores": scores}


def as_vllm(scores: list[float]) -> dict[str, Any]:
    items = [{"index": i, "label": "LABEL_0", "probs": [s], "num_classes": 1} for i, s in enumerate(scores)]
    return {"object": "list", "data": items[::-1], "usage": {"prompt_tokens": 3}}


@contextmanager
def client(behaviour: Behaviour, batch_size: int = 4) -> Iterator[tuple[ScoreClient, list[Request]]]:
    with Loopback(behaviour) as server:
        opened = ScoreClient("pm", server.url.replace("/v1", "/classify"), batch_size)
        try:
            yield opened, server.requests
        finally:
            opened.close()


@pytest.mark.parametrize("form", [plainly, as_vllm])
def test_the_scores_of_a_server_with_the_same_model_are_those_of_this_process(
    models: tuple[str, str], tmp_path: Path, form: Callable[[list[float]], dict[str, Any]]
) -> None:
    pm = models[1]
    rows = [{"prompt": f"question {i} <|im_end|>", "completion": f" answer {'word ' * i}\n"} for i in range(9)]
    rows.append({"id": "long", "prompt": "hi", "completion": "long " * 600})
    file = write_rows(tmp_path / "in.jsonl", rows)
    score(file, tmp_path / "here.jsonl", pm=pm)
    with Loopback(serving(pm, form)) as server:
        score(file, tmp_path / "there.jsonl", pm=pm, pm_url=f"{server.url}/classify", batch_size=4)
        assert {request.path for request in server.requests} == {"/v1/classify"}
        assert {request.body["model"] for request in server.requests} == {pm}
        assert sorted(len(request.body["input"]) for request in server.requests) == [1, 4, 4]
    here, there = rows_in(tmp_path / "here.jsonl"), rows_in(tmp_path / "there.jsonl")
    assert [row["score"] for row in there] == pytest.approx([row["score"] for row in here], abs=1e-4)
    reasons = [rows_in(tmp_path / f"{name}.jsonl.rejected.jsonl")[0]["reason"] for name in ("here", "there")]
    assert reasons[0] == reasons[1]  # the one that does not fit is not sent
    recorded = manifest_of(tmp_path / "there.jsonl")["provenance"]
    assert recorded["pm"]["scored_by"] == "server"
    assert recorded["settings"]["pm_dtype"] is None


def test_rl_with_a_server_trains_the_policy_that_it_trains_with_the_model_in_this_process(
    models: tuple[str, str], tmp_path: Path
) -> None:
    model, pm = models
    file = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"question {i}"} for i in range(8)])
    run: dict[str, Any] = {"model": model, "pm": pm, "steps": 3, "prompts_per_step": 2, "max_new_tokens": 6}
    run |= {"held_out": 2, "learning_rate": 1e-2}
    stage("rl")(file, tmp_path / "here", **run)
    with Loopback(serving(pm, as_vllm)) as server:
        stage("rl")(file, tmp_path / "there", **run, pm_url=f"{server.url}/classify")
    here, there = (rows_in(tmp_path / name / "metrics.jsonl") for name in ("here", "there"))
    for name in ("reward", "loss", "pm_score"):
        assert [row[name] for row in there] == [
            value if value is None else pytest.approx(value, abs=1e-3) for value in (row[name] for row in here)
        ]
    replies = [[row["completion"] for row in rows_in(tmp_path / name / "samples.jsonl")] for name in ("here", "there")]
    assert replies[0] == replies[1]


def test_a_model_that_only_the_server_has_gets_the_conversations(tmp_path: Path) -> None:
    def behaviour(request: Request) -> bytes:
        return http({"scores": [float(len(chat[-1]["content"])) for chat in request.body["input"]]})

    rows = [{"prompt": "hi", "completion": f" {'a' * n} "} for n in (3, 5)]
    file = write_rows(tmp_path / "in.jsonl", rows)
    with Loopback(behaviour) as server:
        score(file, tmp_path / "out.jsonl", pm="server:judge", pm_url=server.url)
        (request,) = server.requests
    assert request.body["model"] == "judge"
    assert request.body["input"][0] == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "aaa"}]
    assert [row["score"] for row in rows_in(tmp_path / "out.jsonl")] == [3.0, 5.0]
    assert manifest_of(tmp_path / "out.jsonl")["provenance"]["pm"] == {"engine": "server", "name": "judge"}


def test_of_a_refused_request_only_the_item_at_fault_has_no_score() -> None:
    def behaviour(request: Request) -> bytes:
        items = request.body["input"]
        return error(422, "too long") if [9] in items else http({"scores": [float(ids[0]) for ids in items]})

    with client(behaviour) as (opened, requests):
        scores = opened.scores([[1], [2], [9], [4], [5]])
    assert [s if isinstance(s, float) else s.code for s in scores] == [1.0, 2.0, "request-failed", 4.0, 5.0]
    assert isinstance(scores[2], RowError)
    assert "too long" in scores[2].message
    assert sorted(len(request.body["input"]) for request in requests) == [1, 1, 1, 1, 1, 4]


BROKEN = {
    "too few": {"scores": [1.0]},
    "none": {"scores": [1.0, None]},
    "no numbers": {"scores": [True, "0.1"]},
    "beyond float32": {"scores": [1e308, 1e308]},
    "no field": {"choices": []},
    "the same index": {"data": [{"index": 0, "probs": [0.5]} for _ in range(2)]},
}


@pytest.mark.parametrize("body", [*BROKEN.values(), b'{"scores": [NaN, 1]}', b"<html>"], ids=[*BROKEN, "nan", "html"])
def test_an_answer_without_one_finite_score_for_each_item_ends_the_run(body: Any) -> None:
    with client(lambda _: http(body)) as (opened, _), pytest.raises(CaiError) as failure:
        opened.scores([[1], [2]])
    assert failure.value.code == "wrong-answer"
    assert "\n" not in failure.value.message


def test_a_server_of_a_classifier_with_two_labels_is_named_as_what_it_is() -> None:
    body = {"data": [{"index": i, "probs": [0.5, -0.5], "num_classes": 2} for i in range(2)]}
    with client(lambda _: http(body)) as (opened, _), pytest.raises(CaiError) as failure:
        opened.scores([[1], [2]])
    assert failure.value.code == "wrong-model-kind"
    assert "a classifier of 2 labels" in failure.value.message


@pytest.mark.parametrize(
    ("behaviour", "code"),
    [(lambda _: error(401, "who?"), "server-refused"), (lambda _: error(404, "no"), "server-refused"),
     (lambda _: error(503, "busy"), "server-refused"), (reset, "server-unreachable")],
)  # fmt: skip
def test_a_server_that_does_not_score_ends_the_run_with_one_line(
    behaviour: Behaviour, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_client, "RETRIES", 0)
    with client(behaviour) as (opened, _), pytest.raises(CaiError) as failure:
        opened.scores([[1], [2]])
    assert failure.value.code == code
    assert "--base-url" not in f"{failure.value.message} {failure.value.hint}"


def test_a_request_is_repeated_while_a_server_restarts() -> None:
    def behaviour(request: Request) -> bytes:
        return error(503, "starting", Retry_After="0") if request.number < 3 else http({"scores": [1.5]})

    with client(behaviour) as (opened, requests):
        assert opened.scores([[1]]) == [1.5]
        assert len(requests) == 3


def test_the_key_is_sent_and_never_shown(tmp_path: Path, cai: Cai, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PM_API_KEY", "sk-of-the-reward-server")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-somebody-else")
    write_rows(tmp_path / "in.jsonl", [{"messages": CHAT}])

    def behaviour(request: Request) -> bytes:
        return error(401, f"wrong key {request.headers['authorization']}")

    with Loopback(behaviour) as server:
        done = cai("score", "in.jsonl", "-o", "out.jsonl", "--pm", "server:pm", "--pm-url", server.url)
        assert server.requests[0].headers["authorization"] == "Bearer sk-of-the-reward-server"
    assert (done.code, done.error) == (1, "server-refused")
    assert "sk-of" not in done.stderr + done.stdout
    assert "PM_API_KEY" in done.stderr


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({"pm": "server:pm"}, "missing-option"),
        ({"pm": "server:pm", "pm_url": "ftp://x"}, "invalid-option"),
        ({"pm": "server:pm", "pm_url": "http://me:secret@x/classify"}, "invalid-option"),
        ({"pm": "server:pm", "pm_url": "http://x/classify", "pm_dtype": "bfloat16"}, "option-conflict"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(tmp_path: Path, given: dict[str, Any], code: str) -> None:
    with pytest.raises(UsageError) as failure:
        score(write_rows(tmp_path / "in.jsonl", [{"messages": CHAT}]), tmp_path / "out.jsonl", **given)
    assert failure.value.code == code


def test_a_missing_score_never_becomes_a_reward(models: tuple[str, str], tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"question {i}"} for i in range(4)])
    with Loopback(lambda _: error(422, "no")) as server, pytest.raises(CaiError) as failure:
        stage("rl")(file, tmp_path / "out", model=models[0], pm=models[1], pm_url=server.url, steps=1, held_out=2)
    assert failure.value.code == "request-failed"
    assert not (tmp_path / "out").exists()


def test_a_model_in_this_process_has_the_precision_of_its_device(models: tuple[str, str]) -> None:
    assert Scorer(models[1], None, "cpu", dtype="auto").dtype == "float32"
    assert Scorer(models[1], None, "cuda:1", dtype="auto").dtype == "bfloat16"
    rounded = Scorer(models[1], None, "cpu", dtype="bfloat16")
    assert rounded.dtype == "bfloat16"
    assert json.dumps(rounded.identity()) == json.dumps(Scorer(models[1], None, "cpu").identity())
