"""`cai export`: datasets load and train as they are."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Cai
from helpers import preference, rows_in, sample_row, write_rows
from tiny import tiny_model_dir

from cai_cli.training.quiet import quiet_libraries


def loaded(directory: Path, cache: Path) -> Any:
    from datasets import load_dataset

    return load_dataset(str(directory), split="train", cache_dir=str(cache))


@pytest.mark.parametrize("file", ["samples.jsonl", "revisions.jsonl", "preferences.jsonl"])
def test_an_exported_dataset_loads_as_the_rows_it_was_made_of(cai: Cai, tmp_path: Path, run: Path, file: str) -> None:
    done = cai("export", str(run / file), "-o", "ds", "--json")
    assert done.code == 0, done.stderr
    rows = [json.loads(line) for line in (run / file).read_text().splitlines()]
    assert json.loads(done.stdout)["rows"] == len(rows)
    data = loaded(tmp_path / "ds", tmp_path / "cache")
    assert data.to_list() == rows
    assert sorted(p.name for p in (tmp_path / "ds").iterdir()) == ["README.md", "data"]


def test_columns_are_typed_where_every_value_is_null_or_every_list_empty(cai: Cai, tmp_path: Path) -> None:
    from datasets import List, Value

    pair = {"chosen": "\n\nHuman: hi\n\nAssistant: hello", "rejected": "\n\nHuman: hi\n\nAssistant: go away"}
    write_rows(tmp_path / "hh.jsonl", [pair])
    assert cai("export", "hh.jsonl", "-o", "ds").code == 0
    data = loaded(tmp_path / "ds", tmp_path / "cache")
    assert data.features["votes"] == List({
        "principle_id": Value("string"), "method": Value("string"), "order": Value("string"), "p_first": Value("float64"),
        "rationale": Value("string"),
    })  # fmt: skip
    assert data[0]["human"] == "chosen"
    assert data[0]["prompt"] == [{"role": "user", "content": "hi"}]


def test_rows_that_a_trainer_must_not_learn_from_are_left_out_and_kept_with_their_reasons(
    cai: Cai, tmp_path: Path
) -> None:
    rows = [preference(1), preference(2, rejected=" \n"), preference(3, chosen="well", rejected="well\n")]
    write_rows(tmp_path / "prefs.jsonl", rows)
    done = cai("export", "prefs.jsonl", "-o", "ds", "--json")
    summary = json.loads(done.stdout)
    assert summary["rejected_reasons"] == {"empty reply": 1, "identical replies": 1}
    assert (summary["rows"], summary["rejected"]) == (1, 2)
    assert "1 left out (empty reply), 1 left out (identical replies)" in done.stderr
    assert loaded(tmp_path / "ds", tmp_path / "cache").to_list() == rows[:1]
    assert sorted(p.name for p in (tmp_path / "ds").iterdir()) == ["README.md", "data"]
    assert "| left out: identical replies | 1 |" in (tmp_path / "ds/README.md").read_text()
    rejected = rows_in(tmp_path / "ds.rejected.jsonl")
    assert [(row["key"], row["reason"], json.loads(row["row"])) for row in rejected] == [
        ("p2", "empty reply", rows[1]), ("p3", "identical replies", rows[2]),
    ]  # fmt: skip
    write_rows(tmp_path / "prefs.jsonl", rows[:1])
    assert cai("export", "prefs.jsonl", "-o", "ds", "--overwrite").code == 0
    assert not (tmp_path / "ds.rejected.jsonl").exists()
    write_rows(tmp_path / "samples.jsonl", [sample_row(1), sample_row(2, reply=" ")])
    assert cai("export", "samples.jsonl", "-o", "samples").code == 0
    assert [row["key"] for row in rows_in(tmp_path / "samples.rejected.jsonl")] == ["p2/0"]


def test_a_file_without_data_rows_is_refused_and_leaves_nothing(cai: Cai, tmp_path: Path) -> None:
    write_rows(tmp_path / "rejected.jsonl", [{"key": "1", "reason": "tie", "row": "{}"}])
    write_rows(tmp_path / "bad.jsonl", [sample_row(1), {**sample_row(2), "more": 1}])
    write_rows(tmp_path / "same.jsonl", [preference(1, chosen="x", rejected="x")])
    (tmp_path / "empty.jsonl").write_text("")
    for file, code in (
        ("rejected.jsonl", "wrong-row-type"),
        ("bad.jsonl", "invalid-row"),
        ("empty.jsonl", "no-rows"),
        ("same.jsonl", "all-rejected"),
        ("none.jsonl", "cannot-read"),
    ):
        done = cai("export", file, "-o", "ds")
        assert (done.code, done.error) == (1, code)
        assert not [p for p in tmp_path.iterdir() if p.name in ("ds", "ds.partial")]
    assert cai("export", "none.jsonl", "-o", "ds").code == 1
    assert cai("export", "-", "-o", "ds").code == 2


def test_only_a_dataset_of_cai_is_ever_replaced(cai: Cai, tmp_path: Path, run: Path) -> None:
    source = str(run / "samples.jsonl")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years")
    assert cai("export", source, "-o", "mine", "--overwrite").code == 1
    assert (tmp_path / "mine/thesis.txt").exists()
    assert cai("export", source, "-o", "ds").code == 0
    assert cai("export", source, "-o", "ds").error == "output-exists"
    assert cai("export", source, "-o", "ds", "--overwrite").code == 0


@pytest.mark.parametrize("trainer", ["SFT", "Reward", "DPO"])
def test_trl_trains_on_an_exported_dataset_as_it_is(cai: Cai, tmp_path: Path, run: Path, trainer: str) -> None:
    import trl
    from transformers import AutoModelForSequenceClassification

    from cai_cli.models.loading import load_causal_lm, load_tokenizer

    file = "revisions.jsonl" if trainer == "SFT" else "preferences.jsonl"
    assert cai("export", str(run / file), "-o", "ds").code == 0
    data = loaded(tmp_path / "ds", tmp_path / "cache")
    model_dir = tiny_model_dir(tmp_path / "tiny")
    model: Any = load_causal_lm(model_dir)
    if trainer == "Reward":
        model = AutoModelForSequenceClassification.from_pretrained(model_dir, num_labels=1)
        model.config.pad_token_id = 0
    arguments = {"output_dir": str(tmp_path / "out"), "max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no"}  # fmt: skip
    with quiet_libraries():
        config = getattr(trl, f"{trainer}Config")(**arguments)
        made = getattr(trl, f"{trainer}Trainer")(
            model=model, args=config, train_dataset=data, processing_class=load_tokenizer(model_dir)
        )
        assert made.train().global_step == 1
