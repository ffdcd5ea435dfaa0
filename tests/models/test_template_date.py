"""A date in a chat template is fixed for a run, recorded, and the same for sampling, training and scoring."""

from pathlib import Path
from typing import Any

import pytest
from helpers import interrupted_after, manifest_of, rows_in, stage
from tiny import CHATML, tiny_model_dir

from cai_cli.common.errors import CaiError, UsageError
from cai_cli.data.schema import Message
from cai_cli.engines.local.engine import LocalEngine
from cai_cli.engines.tokenization import encode_chat
from cai_cli.engines.vllm import VllmEngine
from cai_cli.models import template_date
from cai_cli.models.loading import load_tokenizer
from cai_cli.models.source import ModelSource

DATED = "{{ '<|im_start|>system\nToday is ' + strftime_now('%d %b %Y %H:%M') + '.<|im_end|>\n' }}" + CHATML
CHAT = [Message(role="user", content="hi")]
sample = stage("sample")


@pytest.fixture(autouse=True)
def _no_date_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(template_date.REQUESTED, raising=False)
    monkeypatch.setenv(template_date._HELD, "2024-07-26")


@pytest.fixture(scope="module")
def dated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("dated") / "tiny", chat_template=DATED)


@pytest.fixture(scope="module")
def undated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("undated") / "tiny")


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    (tmp_path / "prompts.txt").write_text("".join(f"question number {i}\n" for i in range(8)))
    return str(tmp_path / "prompts.txt")


def rendered(model: Path) -> str:
    tokenizer = load_tokenizer(model)
    text: str = tokenizer.decode(encode_chat(tokenizer, CHAT, add_generation_prompt=True))
    return text


def next_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(template_date._HELD, "2024-07-27")


def test_a_template_sees_the_held_date_at_midnight_and_not_the_clock(
    dated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "Today is 26 Jul 2024 00:00." in rendered(dated)
    monkeypatch.setenv(template_date.REQUESTED, "2025-01-02")
    assert "Today is 02 Jan 2025 00:00." in rendered(dated)


def test_the_date_is_recorded_only_for_templates_that_write_it(dated: Path, undated: Path) -> None:
    def identities(path: Path) -> list[dict[str, Any]]:
        options: Any = {"batch_size": None, "device": "auto", "dtype": "auto"}
        engines = LocalEngine(str(path), **options), VllmEngine(str(path), **options, engine_args={})
        return [*(engine.identity() for engine in engines), ModelSource.resolve(str(path)).identity()]

    assert all(identity["template_date"] == "2024-07-26" for identity in identities(dated))
    assert all("template_date" not in identity for identity in identities(undated))


def test_a_resume_on_the_next_day_gives_the_rows_of_a_run_that_was_not_interrupted(
    dated: Path, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: dict[str, Any] = {"model": str(dated), "max_new_tokens": 8, "batch_size": 2}
    sample(prompts, tmp_path / "whole.jsonl", **run)
    generate, calls = LocalEngine.generate, 0

    def stopped(self: LocalEngine, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise CaiError("stopped", code="server")
        return generate(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(LocalEngine, "generate", stopped)
        with pytest.raises(CaiError):
            sample(prompts, tmp_path / "cut.jsonl", **run)
    next_day(monkeypatch)
    sample(prompts, tmp_path / "cut.jsonl", **run)
    assert rows_in(tmp_path / "cut.jsonl") == rows_in(tmp_path / "whole.jsonl")
    assert manifest_of(tmp_path / "cut.jsonl")["provenance"]["model"]["template_date"] == "2024-07-26"
    assert sample(prompts, tmp_path / "whole.jsonl", **run)["status"] == "already finished"
    next_day(monkeypatch)
    sample(prompts, tmp_path / "whole.jsonl", overwrite=True, **run)
    assert manifest_of(tmp_path / "whole.jsonl")["provenance"]["model"]["template_date"] == "2024-07-27"


def test_another_date_on_request_is_refused_for_an_output_of_the_first(
    dated: Path, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: dict[str, Any] = {"model": str(dated), "max_new_tokens": 2}
    sample(prompts, tmp_path / "s.jsonl", **run)
    monkeypatch.setenv(template_date.REQUESTED, "2025-01-02")
    with pytest.raises(CaiError, match="template_date: 2024-07-26 -> 2025-01-02") as error:
        sample(prompts, tmp_path / "s.jsonl", **run)
    assert error.value.code == "other-run"
    monkeypatch.setenv(template_date.REQUESTED, "2 January")
    with pytest.raises(UsageError):
        sample(prompts, tmp_path / "s.jsonl", **run)


def test_training_resumed_on_the_next_day_takes_the_recorded_date(
    dated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = tmp_path / "samples.jsonl"
    (tmp_path / "p.txt").write_text("".join(f"question number {i}\n" for i in range(4)))
    sample(tmp_path / "p.txt", samples, model=str(dated), max_new_tokens=4)
    samples.write_text(samples.read_text().replace('"length"', '"stop"'))  # whole replies
    run: dict[str, Any] = {"model": str(dated), "max_steps": 3, "save_steps": 1, "eval_share": 0.0, "batch_size": 1}
    with interrupted_after(1):
        stage("sft")(samples, tmp_path / "sl", **run)
    next_day(monkeypatch)
    stage("sft")(samples, tmp_path / "sl", **run)
    assert manifest_of(tmp_path / "sl")["provenance"]["model"]["template_date"] == "2024-07-26"


@pytest.mark.parametrize("drawing", ["{{ ['a', 'b'] | random }}", "{{ lipsum(1) }}"])
def test_a_template_that_draws_at_random_is_refused(drawing: str, tmp_path: Path) -> None:
    with pytest.raises(CaiError) as error:
        load_tokenizer(tiny_model_dir(tmp_path / "tiny", chat_template=CHATML + drawing))
    assert error.value.code == "invalid-model"
    load_tokenizer(tiny_model_dir(tmp_path / "word", chat_template=CHATML + "a random lipsum"))
