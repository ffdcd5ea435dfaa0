"""`cai batch`: submit, a provider that answers the files, and collect give the rows of a live run."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from batch_provider import (
    Json,
    anthropic_result,
    as_chat,
    judge,
    openai_result,
    provide,
    response,
    rows_of_requests,
)
from conftest import Cai, Done
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback import Behaviour, Loopback, good

from cai_cli.cli import app
from cai_cli.engines.batch.store import Store
from cai_cli.runtime.batch import STORE
from cai_cli.runtime.output_files import one_writer

PROMPTS = "Name a fruit.\nSay something forbidden.\nThis prompt is too long.\nName a bird.\n"
PAIRS = [
    {"id": f"p{n}", "prompt": "Which?", "chosen": f"A kind reply {n}.", "rejected": f"A rude reply {n}."}
    for n in range(3)
]


@pytest.fixture
def inputs(cai: Cai, tmp_path: Path, small: Path) -> Path:
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    samples = [
        {"id": f"s{n}", "prompt": [{"role": "user", "content": f"Why {n}?"}], "sample_index": 0,
         "completion": [{"role": "assistant", "content": f"Because {n}."}], "finish_reason": "stop"}
        for n in range(3)
    ]  # fmt: skip
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return tmp_path


def request_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("requests-*[0-9].json*"), key=lambda path: int(path.name.split("-")[1].split(".")[0]))


def through_batches(
    cai: Cai,
    words: tuple[str, ...],
    behaviour: Behaviour = judge,
    provider: str = "openai",
    result: Callable[[Json, int, Json], Json] = openai_result,
) -> tuple[Done, int]:
    """The result of the last command, and how many waves of request files there were."""
    done = cai("batch", "submit", "--for", provider, *words, "-o", "batch.jsonl", "--model", "openai:m")
    folder, seen, waves = Path("batch.jsonl.batch"), 0, 0
    while not Path("batch.jsonl").exists():
        files = request_files(folder)[seen:]
        assert files, done.stderr
        seen, waves = seen + len(files), waves + 1
        done = cai("batch", "collect", str(folder), provide(files, behaviour, result))
        assert done.error in (None, "all-rejected"), done.stderr
    return done, waves


def live(cai: Cai, words: tuple[str, ...], behaviour: Behaviour = judge) -> Done:
    with Loopback(behaviour) as server:
        return cai(*words, "-o", "live.jsonl", "--model", "openai:m", "--base-url", server.url)


def rows_of(name: str) -> tuple[str, str]:
    rejected = Path(f"{name}.jsonl.rejected.jsonl")
    return Path(f"{name}.jsonl").read_text(), rejected.read_text() if rejected.exists() else ""


def manifest_of(name: str) -> Any:
    return json.loads(Path(f"{name}.jsonl.manifest.json").read_text())


STAGES = {
    "sample": (("sample", "prompts.txt", "-n", "2", "--system", "Be brief."), 1),
    "critique-revise": (("critique-revise", "samples.jsonl", "--rounds", "2", "--constitution", "small.yaml"), 4),
    "choice": (("label-prefs", "pairs.jsonl", "--constitution", "compare.yaml"), 1),
    "calibrated": (("label-prefs", "pairs.jsonl", "--constitution", "compare.yaml", "--calibrate"), 1),
    "cot": (("label-prefs", "pairs.jsonl", "--constitution", "compare.yaml", "--method", "cot"), 2),
    "verdict": (("label-prefs", "pairs.jsonl", "--constitution", "compare.yaml", "--method", "verdict"), 1),
}


@pytest.mark.parametrize("stage", STAGES)
def test_batches_give_the_rows_counts_and_usage_of_a_live_run(stage: str, cai: Cai, inputs: Path) -> None:
    words, expected = STAGES[stage]
    assert live(cai, words).code == 0
    done, waves = through_batches(cai, words)
    assert (done.code, waves) == (0, expected), done.stderr
    assert rows_of("batch") == rows_of("live")
    batch, direct = manifest_of("batch"), manifest_of("live")
    assert batch["counts"] == direct["counts"]
    assert batch["provenance"] == direct["provenance"] | {"model": direct["provenance"]["model"] | {"batch": "openai"}}
    for name in ("requests", "prompt_tokens", "new_tokens"):
        used, used_live = (manifest["run"]["usage"][name] for manifest in (batch, direct))
        # A live run asks for the same calibration in several threads; a batch asks for it once.
        assert used < used_live if stage == "calibrated" else used == used_live


def test_anthropic_and_vllm_take_their_own_forms(cai: Cai, inputs: Path) -> None:
    words = ("sample", "prompts.txt", "--system", "Be brief.", "--temperature", "0.5", "--max-new-tokens", "9")
    assert cai("batch", "submit", "--for", "anthropic", *words, "-o", "a.jsonl", "--model", "openai:m").code == 0
    assert cai("batch", "submit", "--for", "vllm", *words, "-o", "v.jsonl", "--model", "openai:m").code == 0
    first, *_ = rows_of_requests(Path("a.jsonl.batch/requests-1.json"))
    turn = {"role": "user", "content": "Name a fruit."}
    assert first["params"] == {
        "model": "m", "max_tokens": 9, "system": "Be brief.", "messages": [turn], "temperature": 0.5,
    }  # fmt: skip
    first, *_ = rows_of_requests(Path("v.jsonl.batch/requests-1.jsonl"))
    assert (first["method"], first["url"]) == ("POST", "/v1/chat/completions")
    assert first["body"].pop("seed") >= 0
    system = {"role": "system", "content": "Be brief."}
    assert first["body"] == {
        "model": "m", "messages": [system, turn], "max_tokens": 9, "temperature": 0.5, "top_p": 1.0,
    }  # fmt: skip


def test_anthropic_answers_a_verdict(cai: Cai, inputs: Path) -> None:
    words = STAGES["verdict"][0]
    done, waves = through_batches(cai, words, judge, "anthropic", anthropic_result)
    assert (done.code, waves) == (0, 1)
    assert manifest_of("batch")["counts"]["out"] == len(PAIRS)
    (file,) = request_files(Path("batch.jsonl.batch"))
    for row in rows_of_requests(file):
        assert set(row) == {"custom_id", "params"}
        assert row["params"]["messages"][-1]["role"] == "user"


def test_a_prefill_is_continued_by_vllm_and_asked_for_elsewhere(cai: Cai, inputs: Path) -> None:
    last = {}
    for provider in ("openai", "vllm"):
        words = ("label-prefs", "pairs.jsonl", "--constitution", "compare.yaml", "-o", f"{provider}.jsonl")
        assert cai("batch", "submit", "--for", provider, *words, "--model", "openai:m").code == 0
        row, *_ = rows_of_requests(Path(f"{provider}.jsonl.batch/requests-1.jsonl"))
        last[provider] = (row["body"]["messages"][-1]["role"], row["body"].get("continue_final_message"))
    assert last == {"openai": ("user", None), "vllm": ("assistant", True)}


@pytest.mark.parametrize(
    ("provider", "words", "code"),
    [
        ("anthropic", ("label-prefs", "pairs.jsonl", "--constitution", "compare.yaml"), "option-conflict"),
        ("openai", ("label-prefs", "pairs.jsonl", "--constitution", "compare.yaml", "--method", "contrast", "--few-shot",
                    "none"), "option-conflict"),
        ("openai", ("sample", "prompts.txt", "--prompt-format", "raw"), "option-conflict"),
        ("openai", ("sample", "prompts.txt", "--thinking", "off"), "option-conflict"),
        ("openai", ("sample", "prompts.txt", "--budget-tokens", "9"), "option-conflict"),
        ("anthropic", ("sample", "prompts.txt", "--temperature", "1.5"), "invalid-option"),
        ("openai", ("dedup", "prompts.txt"), "invalid-option"),
        ("openai", ("sft", "samples.jsonl"), "invalid-option"),
    ],
)  # fmt: skip
def test_what_a_batch_cannot_do_is_refused(
    provider: str, words: tuple[str, ...], code: str, cai: Cai, inputs: Path
) -> None:
    model = () if words[0] in ("dedup",) else ("--model", "openai:m")
    done = cai("batch", "submit", "--for", provider, *words, "-o", "out.jsonl", *model)
    assert (done.code, done.error) == (2, code), done.stderr
    assert not list(inputs.glob("out.jsonl.batch/requests*"))


def test_a_model_of_this_machine_and_a_stream_are_refused(cai: Cai, inputs: Path) -> None:
    submit = ("batch", "submit", "--for", "openai", "sample", "prompts.txt")
    assert cai(*submit, "--model", "openai:m").error == "missing-option"
    assert cai(*submit, "-o", "out.jsonl", "--model", "smollm2-135m").error == "option-conflict"
    piped = ("batch", "submit", "--for", "openai", "sample", "-", "-o", "out.jsonl", "--model", "openai:m")
    assert cai(*piped, stdin=b"Name a fruit.\n").error == "invalid-option"


# --- results that are incomplete, failed or wrong -------------------------------------------------------------------


def submitted(cai: Cai, *words: str) -> list[Json]:
    """The requests of `sample prompts.txt`."""
    line = ("sample", "prompts.txt", "-o", "batch.jsonl", "--model", "openai:m")
    assert cai("batch", "submit", "--for", "openai", *line, *words).code == 0
    return rows_of_requests(Path("batch.jsonl.batch/requests-1.jsonl"))


def answered(rows: list[Json], behaviour: Behaviour = good) -> list[Json]:
    return [openai_result(row, *response(behaviour, as_chat(row))) for row in rows]


def collect(cai: Cai, *results: Json | str, again: bool = False) -> Done:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in results]
    Path("results.jsonl").write_text("\n".join(lines) + "\n")
    return cai("batch", "collect", "batch.jsonl.batch", "results.jsonl", *(["--again"] if again else []))


def test_parts_are_collected_and_the_rest_is_waited_for(cai: Cai, inputs: Path) -> None:
    results = answered(submitted(cai))
    done = collect(cai, *results[:2], results[0])
    assert done.code == 0
    assert "2 answers, 1 known already" in done.stderr
    assert "requests-1.jsonl have no results yet" in done.stderr
    assert len(request_files(Path("batch.jsonl.batch"))) == 1
    assert collect(cai, *results[2:]).code == 0
    assert len(rows_of("batch")[0].splitlines()) == 4


def test_expired_and_failed_requests_are_asked_again(cai: Cai, inputs: Path) -> None:
    rows = submitted(cai)
    expired = {"custom_id": rows[1]["custom_id"], "response": None, "error": {"code": "batch_expired", "message": "x"}}
    broken = openai_result(rows[2], 500, {"error": {"message": "no", "type": "server_error"}})
    done = collect(cai, *answered(rows[:1]), expired, broken)
    assert "1 to ask again (batch_expired), 1 to ask again (server_error)" in done.stderr
    assert rows_of_requests(Path("batch.jsonl.batch/requests-2.jsonl")) == rows[1:3]
    assert collect(cai, *answered(rows)).code == 0


def test_lost_requests_are_written_again_where_that_is_asked(cai: Cai, inputs: Path) -> None:
    rows = submitted(cai)
    assert collect(cai, *answered(rows[:1]), again=True).code == 0
    assert rows_of_requests(Path("batch.jsonl.batch/requests-2.jsonl")) == rows[1:]


def test_a_refused_parameter_is_left_out_of_the_next_file(cai: Cai, inputs: Path) -> None:
    rows = submitted(cai, "--temperature", "0.5")
    refusal = {"error": {"message": "Unsupported value: 'temperature' does not support 0.5 with this model."}}
    done = collect(cai, *(openai_result(row, 400, refusal) for row in rows))
    assert done.code == 0
    assert "openai refuses temperature; requests are sent without it" in done.stderr
    again = rows_of_requests(Path("batch.jsonl.batch/requests-2.jsonl"))
    assert [row["custom_id"] for row in again] == [row["custom_id"] for row in rows]
    assert all("temperature" not in row["body"] for row in again)
    assert collect(cai, *answered(again)).code == 0
    assert manifest_of("batch")["run"]["usage"]["changed_parameters"] == {"temperature": None}


def test_a_setting_that_refuses_every_request_rejects_no_row(cai: Cai, inputs: Path) -> None:
    (inputs / "prompts.txt").write_text("".join(f"Prompt {n}.\n" for n in range(9)))
    rows = submitted(cai)
    refusal = {"error": {"message": "the model m does not take this"}}
    assert collect(cai, *(openai_result(row, 400, refusal) for row in rows)).error == "server-refused"
    assert collect(cai, *answered(rows)).code == 0


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not a result of a batch"),
        ("[]", "not a result of a batch"),
        ('{"custom_id": "x"}', "neither a response nor an error"),
        ('{"response": {}}', "not a result of a batch: custom_id"),
        ('{"custom_id": "ID", "response": {"status_code": 200, "body": {}}}', "the response is not a completion"),
        ('{"custom_id": "ID", "result": {"type": "succeeded"}}', "without a message"),
    ],
)
def test_a_line_that_is_no_result_names_its_place_and_nothing_is_kept(
    line: str, reason: str, cai: Cai, inputs: Path
) -> None:
    rows = submitted(cai)
    done = collect(cai, *answered(rows[:2]), line.replace("ID", rows[2]["custom_id"]))
    assert (done.code, done.error) == (1, "invalid-row")
    assert "results.jsonl:3: " in done.stderr
    assert reason in done.stderr
    assert "4 requests" in cai("batch", "collect", "batch.jsonl.batch").stderr


def test_results_of_another_batch_are_refused(cai: Cai, inputs: Path) -> None:
    row = submitted(cai)[0]
    assert collect(cai, *answered([{**row, "custom_id": "another"}])).error == "other-run"
    assert cai("batch", "collect", "prompts.txt").error is not None


def test_a_nan_among_log_probabilities_is_no_error(cai: Cai, inputs: Path) -> None:
    words = ("label-prefs", "pairs.jsonl", "--constitution", "compare.yaml", "-o", "batch.jsonl")
    assert cai("batch", "submit", "--for", "openai", *words, "--model", "openai:m").code == 0
    rows = rows_of_requests(Path("batch.jsonl.batch/requests-1.jsonl"))
    lines = [json.dumps(result).replace('"logprob": 0.0', '"logprob": NaN') for result in answered(rows, judge)]
    assert "NaN" in lines[0]
    assert collect(cai, *lines).code == 0


def test_the_commands_of_the_page_run(cai: Cai, inputs: Path) -> None:
    root = Path(__file__).parents[2]
    (inputs / "examples").symlink_to(root / "examples")
    page = (root / "docs/batch.md").read_text().replace("\\\n", " ")
    submit, collected = (line.split()[1:] for line in page.splitlines() if line.startswith("cai batch "))
    assert cai(*submit).code == 0
    made = provide(request_files(Path("runs/docs/batch")), judge)
    assert cai(*(made if word == "results.jsonl" else word for word in collected)).code == 0
    assert len(Path("runs/docs/hosted.jsonl").read_text().splitlines()) == 6


# --- limits, growth and kills ---------------------------------------------------------------------------------------


def test_files_are_split_at_the_limits_of_the_provider(cai: Cai, inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from cai_cli.engines.batch import forms
    from cai_cli.runtime import batch

    small = replace(forms.FORMS[forms.Provider.OPENAI], most_requests=3)
    monkeypatch.setattr(batch, "FORMS", {**forms.FORMS, forms.Provider.OPENAI: small})
    submitted(cai)
    assert [len(rows_of_requests(file)) for file in request_files(Path("batch.jsonl.batch"))] == [3, 1]
    monkeypatch.setattr(batch, "FORMS", {forms.Provider.OPENAI: replace(small, most_bytes=300)})
    assert collect(cai, again=True).code == 0
    files = request_files(Path("batch.jsonl.batch"))[2:]
    assert all(file.stat().st_size <= 300 for file in files)
    assert sum(len(rows_of_requests(file)) for file in files) == 4


def test_a_finished_output_grows_by_the_new_rows_alone(cai: Cai, inputs: Path) -> None:
    rows = submitted(cai, "--limit", "2")
    assert collect(cai, *answered(rows)).code == 0
    line = ("sample", "prompts.txt", "-o", "batch.jsonl", "--model", "openai:m", "--limit", "3")
    assert cai("batch", "submit", "--for", "openai", *line).code == 0
    new = rows_of_requests(Path("batch.jsonl.batch/requests-2.jsonl"))
    assert len(new) == 1
    assert collect(cai, *answered(new)).code == 0
    assert manifest_of("batch")["run"]["usage"]["requests"] == 3


def test_requests_of_settings_that_were_given_up_are_not_written_again(cai: Cai, inputs: Path) -> None:
    old = submitted(cai, "--max-new-tokens", "9")
    line = ("sample", "prompts.txt", "-o", "batch.jsonl", "--model", "openai:m", "--max-new-tokens", "8")
    assert cai("batch", "submit", "--for", "openai", *line).code == 0
    new = rows_of_requests(Path("batch.jsonl.batch/requests-2.jsonl"))
    assert {row["custom_id"] for row in new}.isdisjoint(row["custom_id"] for row in old)
    assert collect(cai, again=True).code == 0
    assert rows_of_requests(Path("batch.jsonl.batch/requests-3.jsonl")) == new


@pytest.mark.parametrize("commit", range(1, 6))
def test_a_kill_at_any_commit_loses_nothing(
    commit: int, cai: Cai, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("critique-revise", "samples.jsonl", "--rounds", "1", "--constitution", "small.yaml")
    assert live(cai, words).code == 0
    submit = ("batch", "submit", "--for", "openai", *words, "-o", "batch.jsonl", "--model", "openai:m")
    killed_in_child(monkeypatch, commit, "cai", *submit)
    assert cai(*submit).code == 0
    for wave in (1, 2):
        line = ("batch", "collect", "batch.jsonl.batch", provide([request_files(Path("batch.jsonl.batch"))[-1]], judge))
        killed_in_child(monkeypatch, commit, "cai", *line)
        assert cai(*line).code == 0, wave
    assert rows_of("batch") == rows_of("live")
    assert manifest_of("batch")["run"]["usage"]["requests"] == manifest_of("live")["run"]["usage"]["requests"]


def killed_in_child(monkeypatch: pytest.MonkeyPatch, commit: int, *words: str) -> None:
    """Run a command in a process that ends, as by SIGKILL, at a commit of the store: odd before it, even after it."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    commits, real = 0, Store.commit

    def dying(store: Store) -> None:
        nonlocal commits
        commits += 1
        if commits * 2 - 1 >= commit and commit % 2:
            os._exit(9)
        real(store)
        if commits * 2 >= commit:
            os._exit(9)

    monkeypatch.setattr(Store, "commit", dying)
    monkeypatch.setattr("sys.argv", list(words))
    try:
        app.main()
    finally:
        os._exit(0)


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(8)), st.integers(0, 8), st.sets(st.integers(0, 7)))
def test_any_order_split_and_repetition_of_results_keeps_each_answer_once(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], cut: int, repeated: set[int]
) -> None:
    from cai_cli.engines.base import Usage
    from cai_cli.engines.batch.forms import Provider
    from cai_cli.runtime.batch import _read_results

    folder = tmp_path_factory.mktemp("results")
    store = Store(Path(":memory:"))
    requests = [{"custom_id": f"r{n}", "body": {"model": "m", "messages": [{"content": f"{n}"}]}} for n in range(8)]
    store.begin_run()
    for row in requests:
        store.ask(str(row["custom_id"]), row, 1, 1)
    store.commit()
    lines = [json.dumps(result) for result in answered(requests)]
    for part in (order[:cut], [*order[cut:], *repeated]):
        if part:
            (folder / "results.jsonl").write_text("".join(lines[n] + "\n" for n in part))
            _read_results("results.jsonl", str(folder / "results.jsonl"), store, Provider.OPENAI)
    usage = Usage("")
    store.count_usage(usage)
    assert (usage.requests, store.missing().requests) == (8, 0)
    for n in range(8):
        answer = store.answer(f"r{n}")
        assert json.loads(lines[n])["response"]["body"]["choices"][0]["message"]["content"] == answer.choices[0].content
    store.close()


def test_ids_of_requests_are_those_that_every_provider_takes(cai: Cai, inputs: Path) -> None:
    ids = [row["custom_id"] for row in submitted(cai, "-n", "3")]
    assert len(set(ids)) == len(ids) == 12
    assert all(len(name) <= 64 and name.isalnum() for name in ids)


def test_a_second_process_on_the_same_batch_is_refused_and_named(cai: Cai, inputs: Path) -> None:
    rows = answered(submitted(cai))
    with one_writer(inputs / "batch.jsonl.batch" / STORE):
        done = collect(cai, *rows)
    assert (done.code, done.error) == (1, "output-locked"), done.stderr
    assert "bug" not in done.stderr
    assert collect(cai, *rows).code == 0
