"""The options of the trainers: the learning rate that is used where none is given."""

import json
from pathlib import Path

import pytest
import torch
from conftest import Cai
from helpers import largest_difference, manifest_of, revision, stage, write_rows
from safetensors.torch import load_file
from tiny import tiny_model_dir

from cai_cli.common.errors import CaiError
from cai_cli.models.names import resolve
from cai_cli.pipeline.registry import STAGES
from cai_cli.training.options import TrainerOptions

RATES = {"sft": (2e-5, 2e-4), "train-pm": (2e-5, 2e-4), "rl": (1e-6, 2e-5), "dpo": (1e-6, 2e-5)}  # full, LoRA
NEEDED = {"input": "in.jsonl", "output": "out", "pm": "pm"}


def config(name: str, **given: object) -> TrainerOptions:
    stage_config = STAGES[name].config
    needed = {option: value for option, value in NEEDED.items() if option in stage_config.model_fields}
    built = stage_config.build(needed | given)
    assert isinstance(built, TrainerOptions)
    return built


@pytest.mark.parametrize("name", RATES)
def test_adapters_have_a_default_rate_of_their_own_and_a_given_rate_wins(name: str) -> None:
    full, lora = RATES[name]
    for given, expected in (
        ({}, full),
        ({"lora": True}, lora),
        ({"lora": True, "learning_rate": full}, full),
        ({"lora": False, "learning_rate": lora}, lora),
        ({"lora": True, "learning_rate": 0.0}, 0.0),
    ):
        options = config(name, **given)
        assert options.peak_learning_rate == expected
        assert options.settings()["learning_rate"] == expected
        assert options.training_config().learning_rate == expected  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", RATES)
def test_the_help_names_both_default_rates(name: str, cai: Cai) -> None:
    text = " ".join(cai(name, "--help").stdout.split())
    full, lora = RATES[name]
    assert f"by default {full:g}, or {lora:g} with --lora" in text


def test_a_dry_run_shows_the_rate_of_every_training_step(cai: Cai, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [revision(i) for i in range(4)])
    steps = "\n".join(
        [
            "  full: {command: sft, input: rows.jsonl}",
            "  lora: {command: sft, input: rows.jsonl, lora: true}",
            "  given: {command: sft, input: rows.jsonl, lora: true, learning-rate: 3.0e-5}",
            "  samples: {command: sample, input: rows.jsonl}",
        ]
    )
    (tmp_path / "run.yaml").write_text(f"name: n\nsteps:\n{steps}\n")
    done = cai("run", "run.yaml", "--dry-run", "--json")
    assert done.code == 0, done.stderr
    assert [step["learning_rate"] for step in json.loads(done.stdout)] == [2e-5, 2e-4, 3e-5, None]
    text = cai("run", "run.yaml", "--dry-run").stdout
    assert [line.strip() for line in text.splitlines() if "learning rate" in line] == [
        "# learning rate 2e-05", "# learning rate 0.0002", "# learning rate 3e-05",
    ]  # fmt: skip


def test_the_rate_that_is_used_is_recorded_and_shown_on_the_card(tmp_path: Path) -> None:
    model = str(tiny_model_dir(tmp_path / "tiny"))
    rows = write_rows(tmp_path / "rows.jsonl", [revision(i) for i in range(4)])
    run = {"model": model, "eval_share": 0.0, "batch_size": 4, "gradient_accumulation": 1, "lora": True}
    stage("sft")(rows, tmp_path / "out", **run)
    assert manifest_of(tmp_path / "out")["provenance"]["settings"]["learning_rate"] == 2e-4
    assert "| learning_rate | 0.0002 |" in (tmp_path / "out/README.md").read_text()
    assert json.loads((tmp_path / "out/metrics.jsonl").read_text().splitlines()[1])["learning_rate"] == 2e-4
    assert largest_difference(Path(model), tmp_path / "out") > 0
    # An output of an earlier version, whose default was that of full training.
    with pytest.raises(CaiError, match=r"settings\.learning_rate: 0\.0002 -> 2e-05"):
        stage("sft")(rows, tmp_path / "out", **run, learning_rate=2e-5)
    stage("sft")(rows, tmp_path / "out", **run, learning_rate=2e-4)  # already finished


@pytest.mark.parametrize(
    ("stage", "row"),
    [
        ("sft", {"prompt": "Name a fruit.", "completion": "A pear."}),
        ("train-pm", {"prompt": "Name a fruit.", "chosen": "A pear.", "rejected": "A stone."}),
    ],
)
def test_a_kept_adapter_and_its_base_model_give_the_trained_model(
    cai: Cai, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, row: dict[str, str]
) -> None:
    monkeypatch.setenv("CAI_CACHE", str(tmp_path / "cache"))
    base, file = tiny_model_dir(tmp_path / "base"), tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    options = ["--max-steps", "2", "--eval-share", "0", "--learning-rate", "0.01"]
    done = cai(stage, str(file), "-o", "out", "--model", str(base), "--lora", "--keep-adapter", *options)
    assert done.code == 0, done.stderr
    merged, out = resolve(f"{base}+{tmp_path / 'out/adapter'}"), tmp_path / "out"
    assert (merged / "preference_model.json").is_file() is (stage == "train-pm")
    trained, again = (load_file(path / "model.safetensors") for path in (out, merged))
    assert trained.keys() == again.keys()
    for name, weight in trained.items():
        torch.testing.assert_close(again[name], weight)
    recorded = json.loads((out / "adapter/adapter_config.json").read_bytes())["base_model_name_or_path"]
    assert recorded == "base"  # not a folder of this machine
    assert cai(stage, str(file), "-o", "other", "--model", str(base), "--keep-adapter").error == "option-conflict"
