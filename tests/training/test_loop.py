"""What the three training stages share, tested with `sft`, the fastest of them."""

import io
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import orjson
import pytest
from helpers import manifest_of, revision, stage, write_rows
from tiny import tiny_model_dir

from cai_cli.common.errors import CaiError
from cai_cli.training.batch_order import sampler_class
from cai_cli.training.loop import _steps_callback
from cai_cli.training.metrics_log import Metrics

command = stage("sft")

QUICK: dict[str, Any] = {"batch_size": 4, "gradient_accumulation": 1, "learning_rate": 1e-3, "eval_share": 0.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return write_rows(tmp_path / "rev.jsonl", [revision(i) for i in range(12)])


def test_an_input_without_trainable_rows_is_an_error_with_the_reasons(model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rev.jsonl", [revision(0, "long " * 300)])
    with pytest.raises(CaiError, match=r"no rows to train on \(1 in = 0 used \+ 1 rejected") as error:
        command(rows, tmp_path / "out", model=str(model), **QUICK)
    assert error.value.code == "no-rows"
    assert "out.rejected.jsonl" in str(error.value.hint)
    empty = write_rows(tmp_path / "empty.jsonl", [])
    with pytest.raises(CaiError) as error:
        command(empty, tmp_path / "empty", model=str(model), **QUICK)
    assert error.value.code == "no-rows"


def test_a_process_that_resumes_within_an_epoch_takes_the_order_of_that_epoch(tmp_path: Path) -> None:
    from accelerate.data_loader import prepare_data_loader, skip_first_batches
    from torch.utils.data import DataLoader
    from transformers import TrainerState

    def second_epoch(skipped: int) -> list[list[int]]:
        rows = DataLoader(range(32), batch_size=2, sampler=sampler_class()([1] * 32, 2, 0, "sft"))
        first_of_two = prepare_data_loader(rows, num_processes=2, process_index=0, use_seedable_sampler=True)
        with ExitStack() as stack:
            callback = _steps_callback(Metrics(tmp_path / "metrics.jsonl", []), {}, "sft", stack)
            callback.on_epoch_begin(None, TrainerState(epoch=1 + skipped / 8), None, train_dataloader=first_of_two)
        left = skip_first_batches(first_of_two, skipped) if skipped else first_of_two
        left.set_epoch(1)  # as the trainer does
        return [batch.tolist() for batch in left]

    assert second_epoch(3) == second_epoch(0)[3:]


def test_a_loss_that_is_not_finite_stops_the_run(model: Path, rows: str, tmp_path: Path) -> None:
    with pytest.raises(CaiError) as error:
        command(rows, tmp_path / "out", model=str(model), **QUICK | {"learning_rate": 1e30, "epochs": 4})
    assert error.value.code == "not-finite"
    assert not (tmp_path / "out").exists()


def test_stdin_is_read_and_another_stdin_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def feed(*numbers: int) -> None:
        data = b"".join(orjson.dumps(revision(n)) + b"\n" for n in numbers)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    feed(1, 2, 3, 4)
    command("-", tmp_path / "out", model=str(model), **QUICK)
    assert manifest_of(tmp_path / "out")["counts"]["in"] == 4
    feed(1, 2, 3, 5)
    with pytest.raises(CaiError) as error:
        command("-", tmp_path / "out", model=str(model), **QUICK)
    assert error.value.code == "other-run"
