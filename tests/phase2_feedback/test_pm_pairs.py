"""Pairs are held out by prompt, scored before and after training, and rejected where they do not fit."""

from collections import Counter
from pathlib import Path

import pytest
from helpers import (
    manifest_of,
    preference,
    rows_in,
    stage,
    write_rows,
)
from tiny import tiny_model_dir

from cai_cli.common.errors import UsageError
from cai_cli.metrics.intervals import SHARE, mean_estimate

command = stage("train-pm")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("model") / "tiny")


QUICK = {"batch_size": 4, "gradient_accumulation": 1, "learning_rate": 1e-3, "eval_share": 0.0}


def test_held_out_pairs_are_scored_before_and_after(model: Path, tmp_path: Path) -> None:
    rows = [preference(i, 0.95) for i in range(40)]
    out = tmp_path / "pm"
    command(write_rows(tmp_path / "prefs.jsonl", rows), out, model=str(model), epochs=2, **QUICK | {"eval_share": 0.1})
    manifest = manifest_of(out)
    assert (manifest["counts"]["train"], manifest["counts"]["held_out"]) == (36, 4)
    results = manifest["metrics"]
    assert results["held_out_loss"] < results["held_out_loss_before"]
    assert results["accuracy"] == mean_estimate([1.0] * 4, SHARE)
    metrics = rows_in(out / "metrics.jsonl")
    assert metrics[0]["held_out_loss"] == results["held_out_loss_before"]
    assert metrics[-1]["held_out_accuracy"] == 1.0
    assert "accuracy" in (out / "README.md").read_text()


def test_pairs_of_one_prompt_are_all_held_out_or_none(model: Path, tmp_path: Path) -> None:
    rows = [preference(i // 4, 0.9) | {"id": f"p{i}"} for i in range(80)]
    command(
        write_rows(tmp_path / "prefs.jsonl", rows), tmp_path / "pm", model=str(model), max_steps=1,
        **QUICK | {"eval_share": 0.1},
    )  # fmt: skip
    manifest, held_out = manifest_of(tmp_path / "pm"), rows_in(tmp_path / "pm/held_out.jsonl")
    assert (manifest["counts"]["held_out"], manifest["metrics"]["held_out_prompts"]) == (8, 2)
    assert sorted(Counter(row["prompt_id"] for row in held_out).values()) == [4, 4]
    # Eight pairs of two prompts are no eight independent pairs.
    assert (manifest["metrics"]["accuracy"]["n"], manifest["metrics"]["at_chance"]) == (8, True)


def test_long_and_identical_pairs_and_empty_replies_are_rejected_with_the_reason(model: Path, tmp_path: Path) -> None:
    rows = [preference(i) for i in range(4)]
    rows += [preference(4, rejected="long " * 200), preference(5, chosen="same", rejected="same \n")]
    rows += [preference(6, rejected=""), preference(7, chosen=" \n")]
    command(write_rows(tmp_path / "prefs.jsonl", rows), tmp_path / "pm", model=str(model), max_length=128, **QUICK)
    rejected = {row["key"]: row["reason"] for row in rows_in(tmp_path / "pm.rejected.jsonl")}
    assert rejected == {
        "p4": "longer than --max-length", "p5": "identical replies", "p6": "empty reply", "p7": "empty reply",
    }  # fmt: skip
    counts = manifest_of(tmp_path / "pm")["counts"]
    assert counts["in"] == counts["used"] + counts["rejected"] == 8


def test_pairs_beyond_the_models_window_are_rejected_with_any_max_length(model: Path, tmp_path: Path) -> None:
    rows = [preference(0), preference(1, rejected="long " * 600)]
    command(write_rows(tmp_path / "prefs.jsonl", rows), tmp_path / "pm", model=str(model), max_length=5000, **QUICK)
    (rejected,) = rows_in(tmp_path / "pm.rejected.jsonl")
    assert rejected["reason"] == "longer than the model's window of 512"


def test_published_pairs_are_read_with_soft_labels_and_what_parts_early_is_rejected(
    model: Path, tmp_path: Path
) -> None:
    def conversation(*texts: str) -> list[dict[str, str]]:
        return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]

    rows = [
        {"prompt": f"q{i}", "prompt_id": "x", "chosen": conversation(f"q{i}", "good"), "score_chosen": 2.0,
         "rejected": conversation(f"q{i}", "bad"), "score_rejected": 1.0}
        for i in range(4)
    ]  # fmt: skip
    rows.append({"chosen": conversation("q", "a", "r", "s"), "rejected": conversation("q", "b", "r", "t"),
                 "score_chosen": 1.0, "score_rejected": 0.0})  # fmt: skip
    out = tmp_path / "pm"
    file = write_rows(tmp_path / "pairs.jsonl", rows)
    command(file, out, model=str(model), soft_from="score", max_steps=1, **QUICK | {"eval_share": 0.5})
    counts = manifest_of(out)["counts"]
    assert counts["rejected_reasons"] == {"chosen and rejected part before the last turn": 1}
    assert counts["dropped"] == {"prompt_id": 4}
    assert {round(row["p_chosen"], 4) for row in rows_in(out / "held_out.jsonl")} == {0.7311}


def test_soft_labels_from_scores_exclude_hard_targets(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        command(tmp_path / "none.jsonl", tmp_path / "pm", model=str(model), soft_from="score", targets="hard")
    assert error.value.code == "option-conflict"


def test_replies_that_were_cut_off_are_counted_where_the_pairs_say_so(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = {"chosen_finish_reason": "stop", "rejected_finish_reason": "length"}
    rows = [preference(i) | (ends if i < 3 else {}) for i in range(8)]
    command(write_rows(tmp_path / "prefs.jsonl", rows), tmp_path / "pm", model=str(model), max_steps=1, **QUICK)
    assert manifest_of(tmp_path / "pm")["reply_ends"] == {"replies": {"whole": 3, "cut_off": 3, "unknown": 10}}
    assert "3 of 6 replies (10 more unknown) cut off at the length limit" in capsys.readouterr().err
