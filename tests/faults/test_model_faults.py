"""A model that says nothing, says it badly or is broken: asked again a bounded number of times, then the row is rejected
with the reason; no vote stands for a missing one; logits that are no numbers stop the run and name the row."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Cai
from helpers import Json, manifest_of, rows_in, sample_row, write_rows
from loopback import Behaviour, Loopback, Request, completion, http
from tiny import tiny_model_dir

from cai_cli.phase1_supervised.format_checks import ATTEMPTS

ROWS = 5
EMPTY = ["", " ", "\n\n", "\t \n", "\u3000"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.02)
    write_rows(tmp_path / "prompts.jsonl", ({"id": f"p{i}", "prompt": f"question {i}"} for i in range(ROWS)))
    write_rows(tmp_path / "samples.jsonl", (sample_row(i, k) for i in range(ROWS) for k in range(2)))
    return tmp_path


def saying(text: str | None, finish_reason: str | None = "stop") -> Behaviour:
    """Of question 3; the others get a good answer."""

    def behave(request: Request) -> bytes:
        answer = completion(request)
        if any("question 3" in message["content"] for message in request.body["messages"]):
            answer["choices"][0] |= {
                "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason,
            }  # fmt: skip
        return http(answer)

    return behave


def run(cai: Cai, server: Loopback, stage: str, *more: str) -> Json:
    source = "prompts.jsonl" if stage == "sample" else "samples.jsonl"
    words = (stage, source, "--model", "openai:m", "--base-url", server.url, "-o", "out.jsonl", "--overwrite", *more)
    done = cai(*words, "--json")
    summary: Json = json.loads(done.stdout)
    assert done.code == (summary["out"] == 0), done.stderr
    return summary


@pytest.mark.parametrize("text", EMPTY)
@pytest.mark.parametrize("stage", ["sample", "critique", "critique-revise"])
def test_an_empty_answer_is_generated_again_a_few_times_and_then_its_row_is_rejected(
    stage: str, text: str, cai: Cai, folder: Path
) -> None:
    with Loopback(saying(text)) as server:
        counts = run(cai, server, stage, *(("--rounds", "1") if stage == "critique-revise" else ()))
    rows = 1 if stage == "sample" else 2
    attempts = 1 if stage == "sample" else ATTEMPTS  # a reply is what the model says, a critique has to be one
    asked = [r for r in server.requests if any("question 3" in m["content"] for m in r.body["messages"])]
    assert len(asked) == rows * attempts
    assert len({r.body["seed"] for r in asked}) == len(asked)
    assert counts["rejected"] == rows
    assert (counts["in"], counts["out"]) == (rows * ROWS, rows * (ROWS - 1))
    for row in rows_in(folder / "out.jsonl.rejected.jsonl"):
        assert row["reason"].startswith("empty ")
        assert json.loads(row["row"])["id"] == "p3"


@pytest.mark.parametrize(
    ("text", "finish_reason", "reason"),
    [
        ("Sorry", "content_filter", "the server ended the reply with 'content_filter'"),
        ("", "content_filter", "the server ended the reply with 'content_filter'"),
        (None, "content_filter", "the server ended the reply with 'content_filter'"),
        (None, "stop", "the reply holds no text"),
        ("x", "tool_calls", "the server ended the reply with 'tool_calls'"),
    ],
)
@pytest.mark.parametrize("stage", ["sample", "critique"])
def test_an_answer_that_was_filtered_or_is_none_rejects_its_row_at_once(
    stage: str, text: str | None, finish_reason: str | None, reason: str, cai: Cai, folder: Path
) -> None:
    with Loopback(saying(text, finish_reason)) as server:
        counts = run(cai, server, stage)
    assert set(counts["rejected_reasons"]) == {reason}
    assert len(server.requests) == counts["in"]


def test_a_reply_that_was_cut_off_is_kept_and_marked(cai: Cai, folder: Path) -> None:
    with Loopback(saying("and then the", "length")) as server:
        counts = run(cai, server, "sample")
    assert counts["rejected"] == 0
    assert [row["id"] for row in rows_in(folder / "out.jsonl") if row["finish_reason"] == "length"] == ["p3"]


# --- a judge ------------------------------------------------------------------------------------------------------

UNDECIDED = [
    "Neither.",
    "Both are equally good.",
    "",
    "I cannot choose between them.",
    "Option C",
    "A and B",
    "(A) or (B)?",
]


@pytest.mark.parametrize("said", UNDECIDED)
def test_a_judge_that_answers_neither_gives_no_vote(said: str, cai: Cai, folder: Path) -> None:
    with Loopback(lambda request: http(completion(request, said))) as server:
        counts = run(cai, server, "label-prefs", "--method", "verdict")
    assert (counts["out"], counts["rejected"]) == (0, ROWS)
    assert counts["audit"]["trusted"] is not True
    for row in rows_in(folder / "out.jsonl.rejected.jsonl"):
        assert "votes" not in json.loads(row["row"]) or json.loads(row["row"])["votes"] == []


def test_a_judge_that_is_undecided_in_one_order_only_gives_no_vote_at_all(cai: Cai, folder: Path) -> None:
    def behave(request: Request) -> bytes:
        text = " ".join(m["content"] for m in request.body["messages"])
        return http(completion(request, "Neither." if "(A) [[[reply 1" in text or "(A) reply 1" in text else "(A)"))

    with Loopback(behave) as server:
        counts = run(cai, server, "label-prefs", "--method", "verdict")
    assert len(server.requests) == 2 * ROWS
    assert counts["out"] + counts["rejected"] == ROWS
    said = [request for request in server.requests if b"Neither" in behave(request)]
    assert (counts["out"], counts["rejected"]) == ((0, ROWS) if said else (ROWS, 0))
    assert said


@pytest.mark.parametrize(
    "logprobs", [None, {"content": []}, {"content": [{"token": "C", "logprob": -0.1, "top_logprobs": []}]}]
)
def test_a_judge_whose_letters_are_not_among_the_likeliest_gives_no_vote(
    logprobs: Json | None, cai: Cai, folder: Path
) -> None:
    with Loopback(lambda request: http(completion(request, "C", logprobs=logprobs))) as server:
        counts = run(cai, server, "label-prefs", "--one-order")
    assert set(counts["rejected_reasons"]) == {"no vote"}
    assert counts["out"] == 0


# --- broken weights -----------------------------------------------------------------------------------------------


def broken(folder: Path, change: Callable[[Json], None], head: bool = False) -> Path:
    """A tiny model some of whose weights are NaN or infinite."""
    import torch
    from safetensors.torch import load_file, save_file

    path = tiny_model_dir(folder / "broken", max_position_embeddings=4096)
    weights = load_file(path / "model.safetensors")
    change(weights)
    if head:
        weights["score.weight"] = torch.ones(1, 32)
        config = json.loads((path / "config.json").read_text())
        config |= {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1, "id2label": {"0": "LABEL_0"}}
        (path / "config.json").write_text(json.dumps(config))
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.mark.parametrize("value", [float("nan"), pytest.param(float("inf"), marks=pytest.mark.faults)])
def test_logits_that_are_not_finite_stop_the_run_and_name_the_row(value: float, cai: Cai, folder: Path) -> None:
    def poison(weights: Json) -> None:
        weights["model.norm.weight"][0] = value

    broken(folder, poison)
    words = ("sample", "prompts.jsonl", "--model", "broken", "-o", "out.jsonl", "--max-new-tokens", "4")
    for more in ((), ("--temperature", "0")):
        stopped = cai(*words, *more, "--overwrite")
        assert (stopped.code, stopped.error) == (1, "not-finite")
        assert "at row 'p" in stopped.stderr
        assert len(stopped.stderr.splitlines()) <= 2
        assert not (folder / "out.jsonl").exists()
    stopped = cai(
        "label-prefs", "samples.jsonl", "--model", "broken", "-o", "prefs.jsonl", "--limit", "2", "--one-order"
    )
    assert (stopped.code, stopped.error) == (1, "not-finite")
    assert "at row 'p" in stopped.stderr


def test_the_row_that_is_named_is_the_one_whose_logits_are_not_finite() -> None:
    import torch

    from cai_cli.common.errors import CaiError
    from cai_cli.engines.base import Sampling
    from cai_cli.engines.local.sampling import draw

    logits = torch.zeros(3, 7)
    logits[1, 4] = float("nan")
    for temperature in (0.0, 1.0):
        with pytest.raises(CaiError, match="at row 'b/0'"):
            draw(logits, torch.zeros(3), Sampling(temperature=temperature), ["a/0", "b/0", "c/0"])


def test_a_preference_model_that_gives_no_number_stops_the_run_and_names_the_row(cai: Cai, folder: Path) -> None:
    def poison(weights: Json) -> None:
        weights["model.norm.weight"][0] = float("nan")

    broken(folder, poison, head=True)
    stopped = cai("score", "samples.jsonl", "--pm", "broken", "-o", "scores.jsonl")
    assert (stopped.code, stopped.error) == (1, "not-finite")
    assert "row 'p0/0'" in stopped.stderr
    assert not (folder / "scores.jsonl").exists()


@pytest.mark.faults
@pytest.mark.parametrize("stage", ["sft", "train-pm"])
def test_training_on_broken_weights_stops_at_its_first_metrics(stage: str, cai: Cai, folder: Path) -> None:
    from helpers import preference
    from helpers import write_rows as write

    def poison(weights: Json) -> None:
        weights["model.norm.weight"][0] = float("nan")

    broken(folder, poison)
    write(folder / "prefs.jsonl", [preference(i) for i in range(8)])
    source = "samples.jsonl" if stage == "sft" else "prefs.jsonl"
    stopped = cai(stage, source, "--model", "broken", "-o", "out", "--device", "cpu", "--max-steps", "2")
    assert (stopped.code, stopped.error) == (1, "not-finite")
    assert not (folder / "out").exists()
    assert not (folder / "out.manifest.json").exists()
    assert manifest_of(folder / "out.partial")["status"] == "running"
