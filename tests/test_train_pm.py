import math
from pathlib import Path

import pytest
from tiny import tiny_model_dir
from training_helpers import (
    interrupted_after,
    largest_difference,
    manifest_of,
    preference,
    rows_in,
    write_rows,
)

from cai_cli.errors import CaiError
from cai_cli.models import load_reward_model, load_tokenizer
from cai_cli.phase2_feedback.preference_model import judge_pairs, score_conversations, wilson
from cai_cli.phase2_feedback.train_pm import command, soft_reward_trainer
from cai_cli.records import Message, Preference, load_row


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("model") / "tiny")


QUICK = {"batch_size": 4, "gradient_accumulation": 1, "learning_rate": 1e-3, "eval_share": 0.0}


def conversation(prompt: str, reply: str) -> list[Message]:
    return [Message(role="user", content=prompt), Message(role="assistant", content=reply)]


def test_the_model_learns_the_probability_of_its_labels_and_not_just_their_side(model: Path, tmp_path: Path) -> None:
    # p = 0.1 stands as the pair the other way round: rows are oriented so that p_chosen >= 0.5.
    labels = {("dog", "cat"): 0.5, ("red", "blue"): 0.9, ("one", "two"): 0.7, ("low", "high"): 0.9}
    rows = [preference(1, p, *pair) | {"id": f"{k}{pair}"} for k in range(4) for pair, p in labels.items()]
    out = tmp_path / "pm"
    command(write_rows(tmp_path / "prefs.jsonl", rows), out, model=str(model), max_steps=200, **QUICK)
    pm, tokenizer = load_reward_model(out), load_tokenizer(out)
    for (first, second), p in {**labels, ("high", "low"): 0.1}.items():
        chats = [conversation("question number 1", reply) for reply in (first, second)]
        a, b = score_conversations(pm, tokenizer, chats)
        assert 1 / (1 + math.exp(b - a)) == pytest.approx(p, abs=0.05)


def test_the_loss_is_the_soft_cross_entropy(model: Path, tmp_path: Path) -> None:
    import torch
    from datasets import Dataset
    from trl import RewardConfig

    pm, tokenizer = load_reward_model(model, new_head_seed=3), load_tokenizer(model)
    row = {"chosen_ids": [5, 6, 7], "rejected_ids": [8, 9], "p_chosen": 0.8}
    config = RewardConfig(
        str(tmp_path), max_length=None, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = soft_reward_trainer()(
        model=pm, args=config, processing_class=tokenizer, train_dataset=Dataset.from_list([row])
    )
    (batch,) = trainer.get_train_dataloader()
    with torch.no_grad():
        chosen, rejected = (float(pm(input_ids=torch.tensor([row[k]])).logits) for k in ("chosen_ids", "rejected_ids"))
        loss = float(trainer.compute_loss(pm, batch))
    p = 1 / (1 + math.exp(rejected - chosen))
    assert abs(p - 0.5) > 0.01
    assert loss == pytest.approx(-0.8 * math.log(p) - 0.2 * math.log(1 - p), abs=1e-5)


def test_held_out_pairs_are_judged_before_and_after(model: Path, tmp_path: Path) -> None:
    rows = [preference(i, 0.95) for i in range(40)]
    out = tmp_path / "pm"
    command(write_rows(tmp_path / "prefs.jsonl", rows), out, model=str(model), epochs=2, **QUICK | {"eval_share": 0.1})
    manifest = manifest_of(out)
    assert (manifest["counts"]["train"], manifest["counts"]["held_out"]) == (36, 4)
    figures = manifest["figures"]
    assert figures["held_out_loss"] < figures["held_out_loss_before"]
    assert figures["accuracy"] == wilson(4, 4)
    metrics = rows_in(out / "metrics.jsonl")
    assert metrics[0]["held_out_loss"] == figures["held_out_loss_before"]
    assert metrics[-1]["held_out_accuracy"] == 1.0
    assert "accuracy" in (out / "README.md").read_text()


def test_pairs_of_one_prompt_are_all_held_out_or_none(model: Path, tmp_path: Path) -> None:
    rows = [preference(i // 4, 0.9) | {"id": f"p{i}"} for i in range(80)]
    command(
        write_rows(tmp_path / "prefs.jsonl", rows), tmp_path / "pm", model=str(model), max_steps=1,
        **QUICK | {"eval_share": 0.1},
    )  # fmt: skip
    assert manifest_of(tmp_path / "pm")["counts"]["held_out"] == 8


def test_ties_are_left_out_of_the_accuracy_and_equal_scores_are_wrong() -> None:
    pairs = [load_row(Preference, preference(i, p)) for i, p in enumerate([0.5, 0.9, 0.9, 0.9])]
    figures = judge_pairs(pairs, [1.0, 1.0, 0.0, 2.0], [0.0, 1.0, 1.0, 1.0])
    assert figures["accuracy"]["n"] == 3
    assert figures["accuracy"]["value"] == pytest.approx(1 / 3)
    assert figures["accuracy"]["low"] < 1 / 3 < figures["accuracy"]["high"]
    assert judge_pairs([], [], []) == {"loss": None, "accuracy": None}


def test_a_huge_margin_gives_a_finite_loss() -> None:
    (pair,) = [load_row(Preference, preference(0, 1.0))]
    assert judge_pairs([pair], [-2000.0], [2000.0])["loss"] == pytest.approx(4000.0)
    assert judge_pairs([pair], [2000.0], [-2000.0])["loss"] == pytest.approx(0.0)


def test_a_score_depends_on_neither_batch_nor_neighbours(model: Path) -> None:
    pm, tokenizer = load_reward_model(model, new_head_seed=0), load_tokenizer(model)
    chats = [conversation("question " * n, "helpful " * (9 - n)) for n in range(1, 9)]
    alone = [score_conversations(pm, tokenizer, [chat])[0] for chat in chats]
    assert score_conversations(pm, tokenizer, chats, batch_size=3) == pytest.approx(alone, abs=1e-4)
    assert len(set(alone)) == len(alone)


def test_a_conversation_beyond_the_window_is_an_error_with_both_numbers(model: Path) -> None:
    pm, tokenizer = load_reward_model(model, new_head_seed=0), load_tokenizer(model)
    with pytest.raises(CaiError, match=r"tokens does not fit .* window of 512"):
        score_conversations(pm, tokenizer, [conversation("hi", "word " * 600)])


def test_the_head_comes_from_the_seed(model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "prefs.jsonl", [preference(i) for i in range(4)])
    run = {"model": str(model), "max_steps": 1, **QUICK | {"learning_rate": 0.0}}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        command(rows, tmp_path / name, seed=seed, **run)
    assert largest_difference(tmp_path / "a", tmp_path / "b") == 0
    assert largest_difference(tmp_path / "a", tmp_path / "c") > 0


def test_long_and_identical_pairs_are_rejected_with_the_reason(model: Path, tmp_path: Path) -> None:
    rows = [preference(i) for i in range(4)]
    rows += [preference(4, rejected="long " * 200), preference(5, chosen="same", rejected="same")]
    command(write_rows(tmp_path / "prefs.jsonl", rows), tmp_path / "pm", model=str(model), max_length=128, **QUICK)
    rejected = {row["key"]: row["reason"] for row in rows_in(tmp_path / "pm.rejected.jsonl")}
    assert rejected == {"p4": "longer than --max-length", "p5": "chosen and rejected are the same"}
    counts = manifest_of(tmp_path / "pm")["counts"]
    assert counts["in"] == counts["used"] + counts["rejected"] == 6


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
    assert manifest_of(tmp_path / "whole")["figures"] == manifest_of(tmp_path / "killed")["figures"]


@pytest.mark.parametrize("trainer_name", ["RewardTrainer", "DPOTrainer"])
def test_preference_rows_feed_trls_trainers_unchanged(model: Path, tmp_path: Path, trainer_name: str) -> None:
    import datasets
    import trl

    rows = write_rows(tmp_path / "prefs.jsonl", [preference(i) for i in range(4)])
    data = datasets.load_dataset("json", data_files=rows, split="train", cache_dir=str(tmp_path / "cache"))
    config = getattr(trl, trainer_name.replace("Trainer", "Config"))(
        str(tmp_path / "trl"), max_steps=1, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
        save_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = getattr(trl, trainer_name)(str(model), args=config, train_dataset=data)
    assert trainer.train().training_loss > 0
