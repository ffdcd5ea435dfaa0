import math
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    interrupted_after,
    largest_difference,
    manifest_of,
    preference,
    rows_in,
    stage,
    weights,
    write_rows,
)
from tiny import tiny_model_dir

from cai_cli.common.errors import CaiError
from cai_cli.data.schema import JudgedPair, Message, conversation_id, load_row
from cai_cli.data.splits import held_out_keys
from cai_cli.metrics.preference_model import held_out_metrics
from cai_cli.models.loading import load_reward_model, load_tokenizer
from cai_cli.reward.preference_model import score_conversations

command = stage("train-pm")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("model") / "tiny")


QUICK = {"batch_size": 4, "gradient_accumulation": 1, "learning_rate": 1e-3, "eval_share": 0.0}


def conversation(prompt: str, reply: str) -> list[Message]:
    return [Message(role="user", content=prompt), Message(role="assistant", content=reply)]


@pytest.mark.parametrize("targets", ["soft", "hard"])
def test_soft_targets_are_reproduced_and_hard_ones_are_not(model: Path, tmp_path: Path, targets: str) -> None:
    # A probability of 0.1 is stored as the exchanged pair, because p_chosen is at least 0.5 in every row.
    labels = {("dog", "cat"): 0.5, ("red", "blue"): 0.9, ("low", "high"): 0.9}
    rows = [preference(1, p, *pair) | {"id": f"{k}{pair}"} for k in range(4) for pair, p in labels.items()]
    file, out = write_rows(tmp_path / "prefs.jsonl", rows), tmp_path / "pm"
    command(file, out, model=str(model), max_steps=300, targets=targets, **QUICK)
    pm, tokenizer = load_reward_model(out), load_tokenizer(out)

    def probability(first: str, second: str) -> float:
        chats = [conversation("question number 1", reply) for reply in (first, second)]
        a, b = score_conversations(pm, tokenizer, chats)
        return 1 / (1 + math.exp(b - a))

    given = {("red", "blue"): 0.9, ("high", "low"): 0.1} | ({("dog", "cat"): 0.5} if targets == "soft" else {})
    for pair, p in given.items():
        assert (abs(probability(*pair) - p) < 0.02) == (targets == "soft"), (pair, probability(*pair))
    counts = manifest_of(out)["counts"]
    assert counts["skipped_reasons"] == ({} if targets == "soft" else {"a tie, which has no hard target": 4})


def hh(number: int, chosen: str = "helpful", rejected: str = "harmful") -> dict[str, Any]:
    start = f"\n\nHuman: question number {number}\n\nAssistant: "
    return {"chosen": start + chosen, "rejected": start + rejected}


def test_human_pairs_are_mixed_in_at_the_ratio_and_evaluated_by_source(model: Path, tmp_path: Path) -> None:
    ai = [preference(i, 0.8) | {"source": "ai"} for i in range(40)]
    files = (
        write_rows(tmp_path / "prefs.jsonl", ai),
        write_rows(tmp_path / "human.jsonl", [hh(100 + i) for i in range(50)]),
    )
    run = {"model": str(model), "mix": files[1], "mix_ratio": 0.5, **QUICK | {"eval_share": 0.5}}
    command(files[0], tmp_path / "pm", epochs=3, **run)
    manifest = manifest_of(tmp_path / "pm")
    counts, results = manifest["counts"], manifest["metrics"]
    assert (counts["in"], counts["used"], counts["skipped_reasons"]) == (90, 60, {"beyond --mix-ratio": 30})
    assert counts["used_by_input"] == {"preferences": 40, "mix": 20}
    assert sum(results["pairs_by_source"].values()) == counts["train"] == 30
    by_source = results["accuracy_by_source"]
    assert set(by_source) == {"ai", "human.jsonl"}
    assert sum(part["n"] for part in by_source.values()) == results["accuracy"]["n"] == 30
    held_out = rows_in(tmp_path / "pm/held_out.jsonl")
    assert {row["p_chosen"] for row in held_out if row["source"] == "human.jsonl"} == {1.0}
    assert held_out_metrics([load_row(JudgedPair, row) for row in held_out]).items() <= results.items()
    card = (tmp_path / "pm/README.md").read_text()
    for name in ("accuracy_by_source, ai", "label_entropy", "calibration_curve, bin 1", "length_correlation"):
        assert f"| {name} |" in card
    with pytest.raises(CaiError) as error:
        command(files[0], tmp_path / "pm", epochs=3, **run | {"mix_ratio": 0.25})
    assert error.value.code == "other-run"


def test_a_model_at_chance_is_reported_on_stderr_on_its_card_and_in_its_metrics(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("red", "blue")  # labels without a rule
    rows = [hh(i, *(words if i % 2 else words[::-1])) for i in range(40)]
    run = {"model": str(model), "max_steps": 1, **QUICK | {"eval_share": 0.5, "learning_rate": 0.0}}
    for _ in range(2):  # also of a model that is finished already
        command(write_rows(tmp_path / "in.jsonl", rows), tmp_path / "pm", quiet=True, **run)
        assert "cannot be distinguished from chance" in capsys.readouterr().err
    assert manifest_of(tmp_path / "pm")["metrics"]["at_chance"] is True
    assert "**The preference model cannot be distinguished from chance" in (tmp_path / "pm/README.md").read_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lora_trains_and_keeps_its_score_head(model: Path, tmp_path: Path, dtype: str) -> None:
    rows, out = write_rows(tmp_path / "prefs.jsonl", [preference(i, 0.95) for i in range(40)]), tmp_path / "pm"
    run = {"model": str(model), "lora": True, "dtype": dtype, **QUICK | {"learning_rate": 3e-3, "eval_share": 0.5}}
    command(rows, out, epochs=4, **run)
    head = load_reward_model(model, new_head_seed=0).score.weight.detach()
    assert float((weights(out)["score.weight"] - head).abs().max()) > 1e-3
    assert not [name for name in weights(out) if "lora" in name or "modules_to_save" in name]
    pm, tokenizer = load_reward_model(out), load_tokenizer(out)
    chats = [conversation("question number 1", reply) for reply in ("helpful", "harmful")]
    helpful, harmful = score_conversations(pm, tokenizer, chats)
    assert helpful - harmful > 1
    assert manifest_of(out)["metrics"]["accuracy"]["value"] == 1.0
    assert manifest_of(out)["provenance"]["settings"]["precision"] == dtype


def test_the_head_comes_from_the_seed(model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "prefs.jsonl", [preference(i) for i in range(4)])
    run = {"model": str(model), "max_steps": 1, **QUICK | {"learning_rate": 0.0}}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        command(rows, tmp_path / name, seed=seed, **run)
    assert largest_difference(tmp_path / "a", tmp_path / "b") == 0
    assert largest_difference(tmp_path / "a", tmp_path / "c") > 0


@pytest.mark.parametrize("lora", [False, True])
def test_an_interrupted_run_ends_with_the_parameters_of_one_that_was_not(
    model: Path, tmp_path: Path, lora: bool
) -> None:
    rows = write_rows(tmp_path / "prefs.jsonl", [preference(i, 0.5 + i / 50) for i in range(25)])
    run = {"model": str(model), "epochs": 2, "save_steps": 2, "lora": lora, **QUICK | {"eval_share": 0.1}}
    command(rows, tmp_path / "whole", **run)
    with interrupted_after(9):
        command(rows, tmp_path / "killed", **run)
    command(rows, tmp_path / "killed", **run)
    assert largest_difference(tmp_path / "whole", tmp_path / "killed") == 0
    assert rows_in(tmp_path / "whole/metrics.jsonl") == rows_in(tmp_path / "killed/metrics.jsonl")
    assert manifest_of(tmp_path / "whole")["metrics"] == manifest_of(tmp_path / "killed")["metrics"]


def test_a_model_worse_than_chance_and_one_without_held_out_pairs_give_a_warning(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = {"model": str(model), "fit_head": True, "epochs": 0, **QUICK | {"eval_share": 0.0}}
    command(write_rows(tmp_path / "prefs.jsonl", [preference(i) for i in range(60)]), tmp_path / "pm", **run)
    assert "it is unknown what the model learned" in capsys.readouterr().err
    # The hash of the prompt alone decides which pairs are held out; their labels are reversed here.
    prompts = [conversation_id([Message(role="user", content=f"question number {i}")]) for i in range(60)]
    apart = held_out_keys(prompts, 0.5, 0)
    rows = [preference(i, 0.9, *(("b", "a") if p in apart else ("a", "b"))) for i, p in enumerate(prompts)]
    command(write_rows(tmp_path / "turned.jsonl", rows), tmp_path / "worse", **run | {"eval_share": 0.5})
    messages = capsys.readouterr().err
    assert "warning: train-pm: The preference model is worse than chance" in messages
    assert ", held-out accuracy 0; " in messages  # without training there is no metric before it


@pytest.mark.parametrize("trainer_name", ["RewardTrainer", "DPOTrainer"])
def test_preference_rows_feed_trls_trainers_unchanged(model: Path, tmp_path: Path, trainer_name: str) -> None:
    import datasets
    import trl

    rows = write_rows(tmp_path / "prefs.jsonl", [preference(i) for i in range(4)])
    data = datasets.load_dataset("json", data_files=str(rows), split="train", cache_dir=str(tmp_path / "cache"))
    config = getattr(trl, trainer_name.replace("Trainer", "Config"))(
        str(tmp_path / "trl"), max_steps=1, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
        save_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = getattr(trl, trainer_name)(str(model), args=config, train_dataset=data)
    assert trainer.train().training_loss > 0


@pytest.mark.parametrize(
    ("run", "code"),
    [
        ({"epochs": 0}, "option-conflict"),
        ({"targets": "sharp"}, "invalid-option"),
        ({"fit_head": True}, "too-few-rows"),
    ],
)
def test_options_that_cannot_be_trained_with_are_refused(
    model: Path, tmp_path: Path, run: dict[str, Any], code: str
) -> None:
    rows = write_rows(tmp_path / "prefs.jsonl", [preference(i) for i in range(4)])
    with pytest.raises(CaiError) as error:
        command(rows, tmp_path / "pm", model=str(model), **QUICK | run)
    assert error.value.code == code
