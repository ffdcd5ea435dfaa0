"""Packing: examples in one row do not attend to each other, and the loss is that of examples with padding."""

from pathlib import Path
from typing import Any

import pytest
from helpers import manifest_of, revision, rows_in, stage, write_rows
from local_models import model_dir
from tiny import tiny_model_dir

from cai_cli.common.errors import UsageError
from cai_cli.models.loading import load_causal_lm
from cai_cli.phase1_supervised.packing import keeps_examples_apart, pack
from cai_cli.training.config import TrainingConfig

command = stage("sft")
CONFIG = TrainingConfig(batch_size=4, gradient_accumulation=1, learning_rate=1e-3, save_steps=5, seed=0, device="cpu")
ROWS = [{"input_ids": [*range(5, 5 + n)], "labels": [-100, *range(6, 5 + n)]} for n in (7, 3, 9, 20, 4, 12, 11)]


def test_a_packed_row_is_filled_and_no_example_is_cut() -> None:
    packed = pack(ROWS, 24)
    lengths = sorted(length for row in packed for length in row["seq_lengths"])
    assert lengths == sorted(len(row["input_ids"]) for row in ROWS)
    assert [sum(row["seq_lengths"]) for row in packed] == [24, 23, 19]  # 66 tokens in three rows of 24 at most


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt2"])
def test_examples_of_a_row_do_not_attend_to_each_other(family: str) -> None:
    assert keeps_examples_apart(load_causal_lm(model_dir(family)), ROWS[:2], CONFIG)


def test_a_model_that_mixes_the_examples_of_a_row_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model_dir(tmp_path / "tiny")
    load = load_causal_lm

    def without_positions(*arguments: Any, **options: Any) -> Any:
        loaded = load(*arguments, **options)
        plain = loaded.model.forward

        def forward(*inputs: Any, position_ids: Any = None, **more: Any) -> Any:
            return plain(*inputs, **more)  # the whole row is one sequence, as for layers that know no boundaries

        loaded.model.forward = forward
        return loaded

    monkeypatch.setattr("cai_cli.models.loading.load_causal_lm", without_positions)
    rows = write_rows(tmp_path / "rev.jsonl", [revision(i) for i in range(4)])
    with pytest.raises(UsageError) as error:
        command(rows, tmp_path / "out", model=str(model), packing=True, eval_share=0.0)
    assert error.value.code == "option-conflict"


def test_packing_gives_the_losses_of_examples_with_padding(tmp_path: Path) -> None:
    model = str(tiny_model_dir(tmp_path / "tiny"))
    rows = write_rows(tmp_path / "rev.jsonl", [revision(i, f"answer {'very ' * (i % 5)}{i}") for i in range(16)])
    # All examples are in one step, so that both runs take the same steps.
    run: dict[str, Any] = {"model": model, "epochs": 3, "learning_rate": 1e-3, "eval_share": 0.2}
    command(rows, tmp_path / "padded", batch_size=16, gradient_accumulation=1, **run)
    command(rows, tmp_path / "packed", batch_size=2, gradient_accumulation=4, packing=True, **run)
    padded, packed = (rows_in(tmp_path / name / "metrics.jsonl") for name in ("padded", "packed"))
    for name in ("loss", "held_out_loss", "grad_norm"):
        assert [row[name] for row in packed] == pytest.approx([row[name] for row in padded], abs=2e-4), name
    throughputs = [manifest_of(tmp_path / name)["run"]["training"]["tokens"] for name in ("packed", "padded")]
    assert throughputs[0] == throughputs[1] > 0  # the same tokens, none of them padding
    assert manifest_of(tmp_path / "packed")["provenance"]["settings"]["packing"] is True
