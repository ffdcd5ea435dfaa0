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
    write_rows,
)
from tiny import IM_END, tiny_model_dir

from cai_cli.common.errors import CaiError
from cai_cli.data.schema import JudgedPair, Preference, load_row
from cai_cli.data.splits import held_out_keys
from cai_cli.metrics.preference_model import held_out_metrics
from cai_cli.models.loading import load_causal_lm, load_tokenizer
from cai_cli.phase2_feedback import rl_monitor
from cai_cli.phase2_feedback.dpo import estimate
from cai_cli.phase2_feedback.dpo_config import DpoConfig
from cai_cli.phase2_feedback.dpo_pairs import PromptedPair, encode_replies
from cai_cli.phase2_feedback.rl_monitor import IMPLICIT_COLUMNS
from cai_cli.runtime.cost import RowFlow

command = stage("dpo")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("model") / "tiny")


QUICK = {"batch_size": 4, "gradient_accumulation": 1, "learning_rate": 1e-3, "eval_share": 0.0}
CHECKED = QUICK | {"eval_share": 0.25, "monitor_every": 4, "max_new_tokens": 6}


def log_probs(path: Path, pair: PromptedPair) -> list[float]:
    """The log-probabilities of both replies, by a plain forward pass."""
    import torch

    policy, found = load_causal_lm(path), []
    for whole in pair.ids:
        ids, start = torch.tensor([whole]), pair.prompt_length
        with torch.no_grad():
            at = policy(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1)
        found.append(float(at.gather(1, ids[0, start:, None]).sum()))
    return found


def margin(base: Path, policy: Path, row: dict[str, Any], beta: float = 0.1) -> float:
    """The implicit reward of `chosen` less that of `rejected`."""
    pair = encode_replies(load_tokenizer(base), load_row(Preference, row))
    ratios = [a - b for a, b in zip(log_probs(policy, pair), log_probs(base, pair), strict=True)]
    return beta * (ratios[0] - ratios[1])


@pytest.mark.parametrize("lora", [False, True])
def test_margins_converge_to_the_log_odds_of_the_labels(model: Path, tmp_path: Path, lora: bool) -> None:
    labels = {("dog", "cat"): 0.5, ("red", "blue"): 0.9, ("low", "high"): 0.7}
    rows = [preference(1, p, *pair) | {"id": str(pair)} for pair, p in labels.items()]
    file, out = write_rows(tmp_path / "prefs.jsonl", rows), tmp_path / "policy"
    rate = {"learning_rate": 1e-2 if lora else 3e-3}
    command(file, out, model=str(model), max_steps=120, lora=lora, **QUICK | rate)
    for row, p in zip(rows, labels.values(), strict=True):
        assert margin(model, out, row) == pytest.approx(math.log(p / (1 - p)), abs=0.02)
    metrics = rows_in(out / "metrics.jsonl")
    assert metrics[0]["loss"] == pytest.approx(math.log(2))
    # The reference is the model that training started from, also under adapters.
    assert (metrics[0]["margin"], metrics[0]["chosen_reward"]) == (0, 0)


def test_hard_labels_push_the_margins_on_and_leave_ties_out(model: Path, tmp_path: Path) -> None:
    rows = [preference(i, 0.7) for i in range(3)] + [preference(3, 0.5)]
    file, out = write_rows(tmp_path / "prefs.jsonl", rows), tmp_path / "policy"
    command(file, out, model=str(model), max_steps=60, targets="hard", **QUICK | {"learning_rate": 3e-3})
    assert margin(model, out, rows[0]) > 2 * math.log(0.7 / 0.3)
    assert manifest_of(out)["counts"]["skipped_reasons"] == {"a tie, which has no hard target": 1}


def test_the_likelihood_term_raises_the_probability_of_the_preferred_reply(model: Path, tmp_path: Path) -> None:
    rows = [preference(i, 1.0) for i in range(4)]
    file = write_rows(tmp_path / "prefs.jsonl", rows)
    for name, nll in (("without", 0.0), ("with", 1.0)):
        command(file, tmp_path / name, model=str(model), max_steps=15, nll=nll, **QUICK)
    last = {name: rows_in(tmp_path / name / "metrics.jsonl")[-1] for name in ("without", "with")}
    assert last["with"]["nll"] < last["without"]["nll"] - 0.5
    assert last["with"]["chosen_reward"] > last["without"]["chosen_reward"]


@pytest.mark.parametrize("lora", [False, True])
def test_an_interrupted_run_ends_with_the_parameters_of_one_that_was_not(
    model: Path, tmp_path: Path, lora: bool
) -> None:
    rows = write_rows(tmp_path / "prefs.jsonl", [preference(i, 0.5 + i / 60) for i in range(28)])
    run = {"model": str(model), "epochs": 2, "save_steps": 2, "lora": lora, "nll": 0.1, **CHECKED}
    command(rows, tmp_path / "whole", **run)
    for step in (7, 9):
        with interrupted_after(step):
            command(rows, tmp_path / "killed", **run)
    stored = sorted((tmp_path / "killed.partial").rglob("cache-*.arrow"))
    assert len(stored) == 2  # the reference log-probabilities of both sets, computed by the first run
    command(rows, tmp_path / "killed", **run)
    assert largest_difference(tmp_path / "whole", tmp_path / "killed") == 0
    for name in ("metrics.jsonl", "samples.jsonl", "held_out.jsonl"):
        assert rows_in(tmp_path / "whole" / name) == rows_in(tmp_path / "killed" / name)
    assert manifest_of(tmp_path / "whole")["metrics"] == manifest_of(tmp_path / "killed")["metrics"]
    assert not (tmp_path / "killed.partial").exists()


def test_long_and_identical_pairs_and_empty_replies_are_rejected_with_the_reason(model: Path, tmp_path: Path) -> None:
    rows = [preference(i) for i in range(4)]
    rows += [preference(4, rejected="long " * 200), preference(5, chosen="same", rejected="same \n")]
    rows += [preference(6, rejected=""), preference(7, chosen=" \n")]
    file, out = write_rows(tmp_path / "prefs.jsonl", rows), tmp_path / "policy"
    command(file, out, model=str(model), max_length=128, max_steps=1, **QUICK)
    rejected = {row["key"]: row["reason"] for row in rows_in(tmp_path / "policy.rejected.jsonl")}
    assert rejected == {
        "p4": "longer than --max-length", "p5": "identical replies", "p6": "empty reply", "p7": "empty reply",
    }  # fmt: skip
    counts = manifest_of(out)["counts"]
    assert counts["in"] == counts["used"] + counts["rejected"] == 8


def test_a_reply_that_was_cut_off_has_no_end_of_turn_and_is_counted(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = {"chosen_finish_reason": "stop", "rejected_finish_reason": "length"}
    row, tokenizer = preference(0, chosen=" helpful\n") | ends, load_tokenizer(model)
    columns = encode_replies(tokenizer, load_row(Preference, row)).columns()
    chosen, rejected = (tokenizer.decode(columns[name]) for name in ("chosen_ids", "rejected_ids"))
    assert (chosen, rejected) == (f"helpful{IM_END}\n", "harmful")
    assert tokenizer.decode(columns["prompt_ids"]).endswith("question number 0<|im_end|>\n<|im_start|>assistant\n")
    rows = [preference(i) | (ends if i < 3 else {}) for i in range(8)]
    command(write_rows(tmp_path / "prefs.jsonl", rows), tmp_path / "policy", model=str(model), max_steps=1, **QUICK)
    assert manifest_of(tmp_path / "policy")["reply_ends"] == {"replies": {"whole": 3, "cut_off": 3, "unknown": 10}}
    assert "3 of 6 replies (10 more unknown) cut off at the length limit" in capsys.readouterr().err


def hh(number: int, chosen: str = "helpful", rejected: str = "harmful") -> dict[str, Any]:
    start = f"\n\nHuman: question number {number}\n\nAssistant: "
    return {"chosen": start + chosen, "rejected": start + rejected}


def test_held_out_pairs_and_replies_are_checked_and_human_pairs_are_mixed_in(model: Path, tmp_path: Path) -> None:
    ai = write_rows(tmp_path / "prefs.jsonl", [preference(i, 0.8) | {"source": "ai"} for i in range(40)])
    human = write_rows(tmp_path / "human.jsonl", [hh(100 + i) for i in range(50)])
    out = tmp_path / "policy"
    run = CHECKED | {"eval_share": 0.4, "monitor_prompts": 10, "learning_rate": 3e-3}
    command(ai, out, model=str(model), mix=human, mix_ratio=0.5, max_steps=10, **run)
    manifest, metrics = manifest_of(out), rows_in(out / "metrics.jsonl")
    counts, results = manifest["counts"], manifest["metrics"]
    assert (counts["in"], counts["used"], counts["skipped_reasons"]) == (90, 60, {"beyond --mix-ratio": 30})
    assert all(row["accuracy"] is not None for row in metrics if row["step"])
    checks = [row for row in metrics if row["implicit_reward"] is not None]
    assert [row["step"] for row in checks] == [0, 4, 8, 10]
    assert all(row[name] is not None for row in checks for name in IMPLICIT_COLUMNS if name not in ("monitor_score", "goodhart"))  # fmt: skip
    assert (checks[0]["implicit_reward"], checks[0]["held_out_kl"]) == pytest.approx((0, 0), abs=1e-6)
    assert checks[-1]["held_out_kl"] > 0.01
    assert [row["held_out_accuracy"] for row in checks] == [None, 1, 1, 1]
    assert checks[-1]["held_out_margin"] == results["held_out_margin"] > 1
    assert set(results["accuracy_by_source"]) == {"ai", "human.jsonl"}
    held_out = rows_in(out / "held_out.jsonl")
    assert len(held_out) == counts["held_out"] == results["accuracy"]["n"] == 24
    measured = held_out_metrics([load_row(JudgedPair, row) for row in held_out], "The policy's implicit reward")
    assert measured.items() <= results.items()
    replies = rows_in(out / "samples.jsonl")
    assert len(replies) == 10 * len(checks)
    assert {row["id"] for row in replies} <= {row["prompt_id"] for row in held_out}
    assert "held_out_kl" in (out / "README.md").read_text()


def test_the_steps_are_known_before_training(model: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "prefs.jsonl", [preference(i) for i in range(27)])
    config = DpoConfig.build(
        {"input": str(file), "output": "x", "epochs": 1.5, "batch_size": 4, "gradient_accumulation": 2, "device": "cpu"}
    )
    run = QUICK | {"gradient_accumulation": 2}
    command(file, tmp_path / "policy", model=str(model), epochs=1.5, **run)
    assert manifest_of(tmp_path / "policy")["metrics"]["steps"] == config.training_config().steps(27) == 6


def test_the_policy_that_is_kept_is_the_one_of_the_best_check(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = write_rows(tmp_path / "prefs.jsonl", [preference(i) for i in range(40)])
    script = write_rows(tmp_path / "judge.jsonl", [{"scores": [-0.5, -1.5]}])
    run = {"model": str(model), "monitor_judge": f"scripted:{script}", "stop_on_goodhart": True, **CHECKED}
    for name, flagged_at, kept in (("later", 3, 4), ("start", 2, 0)):
        monkeypatch.setattr(
            rl_monitor,
            "goodhart",
            lambda checks, total, at=flagged_at, **_: "planted" if len(checks) == at else None,
        )
        # The judge scores the replies of the start model 0.5, as all others: the last check is kept, or an earlier one.
        monkeypatch.setattr(rl_monitor, "best_check", lambda checks: len(checks) - 1)
        command(pairs, tmp_path / name, max_steps=12, **run)
        results, metrics = manifest_of(tmp_path / name)["metrics"], rows_in(tmp_path / name / "metrics.jsonl")
        assert (results["kept_step"], results["goodhart"]) == (kept, "planted")
        (row,) = (row for row in metrics if row["step"] == kept)
        assert results["held_out_kl"] == row["held_out_kl"]
        assert results["held_out_margin"] == row["held_out_margin"]
        assert manifest_of(tmp_path / name)["provenance"]["monitor"]["engine"] == "scripted"
    assert largest_difference(tmp_path / "start", model) == 0
    assert "start model, which is kept" in manifest_of(tmp_path / "start")["metrics"]["note"]


@pytest.mark.parametrize(
    ("run", "code"),
    [
        ({"epochs": 0}, "option-conflict"),
        ({"loss": "hinge"}, "invalid-option"),
        ({"beta": 0}, "invalid-option"),
        ({"label_smoothing": 0.1}, "option-conflict"),
        ({"soft_from": "score", "targets": "hard"}, "option-conflict"),
        ({"monitor_judge": "scripted:none"}, "option-conflict"),  # eval_share is 0
        ({"monitor_pm": "tiny", "eval_share": 0.1}, "too-few-rows"),
        ({"base_url": ["http://localhost/v1"]}, "option-conflict"),
    ],
)
def test_options_that_cannot_be_trained_with_are_refused(
    model: Path, tmp_path: Path, run: dict[str, Any], code: str
) -> None:
    rows = write_rows(tmp_path / "prefs.jsonl", [preference(i) for i in range(4)])
    named = {name: str(model) if value == "tiny" else value for name, value in run.items()}
    with pytest.raises(CaiError) as error:
        command(rows, tmp_path / "policy", model=str(model), **QUICK | named)
    assert error.value.code == code


def test_a_run_with_another_loss_is_another_run_and_the_smoothing_that_is_used_is_recorded(
    model: Path, tmp_path: Path
) -> None:
    rows, out = write_rows(tmp_path / "prefs.jsonl", [preference(i) for i in range(4)]), tmp_path / "policy"
    command(rows, out, model=str(model), max_steps=1, loss="robust", **QUICK)
    assert manifest_of(out)["provenance"]["settings"]["label_smoothing"] == 0.1
    command(rows, out, model=str(model), max_steps=1, loss="robust", label_smoothing=0.1, **QUICK)  # finished already
    with pytest.raises(CaiError) as error:
        command(rows, out, model=str(model), max_steps=1, loss="ipo", **QUICK)
    assert error.value.code == "other-run"


def test_the_estimate_counts_training_the_reference_and_the_checks() -> None:
    rows = RowFlow(1000, 1, prompt_tokens=100, reply_tokens=50)
    values = {"input": "-", "output": "x", "batch_size": 8, "gradient_accumulation": 1, "monitor_every": 50}
    plain = estimate(rows, DpoConfig.build(values | {"eval_share": 0.2, "monitor_prompts": 0}))
    assert (plain.requests, plain.tokens.new_tokens, plain.tokens.trained_tokens) == (0, 0, 300 * 800)
    assert plain.tokens.prompt_tokens == 300 * (1000 + 2 * 200)  # 100 steps have two checks
    checked = estimate(rows, DpoConfig.build(values | {"eval_share": 0.2, "monitor_prompts": 10, "max_new_tokens": 20}))
    assert (checked.requests, checked.tokens.new_tokens) == (30, 600)
    assert len(held_out_keys([str(i) for i in range(1000)], 0.2, 0)) == 200
