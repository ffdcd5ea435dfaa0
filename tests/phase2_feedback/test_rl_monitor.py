"""The checks of `cai rl`: held-out prompts, metrics, flags and the policy that is kept; a killed run ends the same."""

import os
import random
import signal
import subprocess
import sys
import time
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
from loopback import Loopback, Request, completion, http
from tiny import tiny_model_dir

from cai_cli.common.errors import CaiError, UsageError
from cai_cli.data.formats import parse_prompt
from cai_cli.data.schema import Message, PolicySample, Prompt, load_row
from cai_cli.models.loading import load_causal_lm, load_reward_model, load_tokenizer
from cai_cli.phase2_feedback import rl_monitor
from cai_cli.phase2_feedback.rl_monitor import REPLY_COLUMNS, Monitor, logits_of
from cai_cli.phase2_feedback.rl_rewards import preference_source
from cai_cli.reward.preference_model import score_conversations

command = stage("rl")
train_pm_stage = stage("train-pm")

PHRASE = " racist"  # one token of the tiny tokenizer
MEASURED = [name for name in ("pm_score", *REPLY_COLUMNS) if name not in ("monitor_score", "goodhart")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def models(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """`pm` prefers one phrase and `monitor` disprefers it; they are trained on different texts."""
    folder, tokenizer = tmp_path_factory.mktemp("pms"), load_tokenizer(model)
    for name, seed in (("pm", 1), ("monitor", 2)):
        rng, rows = random.Random(seed), []
        for i in range(64):
            plain = [tokenizer.decode([rng.randrange(3, len(tokenizer))]) for _ in range(7)]
            with_phrase = plain.copy()
            for _ in range(rng.randrange(1, 4)):
                with_phrase[rng.randrange(7)] = PHRASE
            pair = ["".join(with_phrase), "".join(plain)]
            rows.append(preference(i, 0.95, *(pair if name == "pm" else pair[::-1])))
        file = write_rows(folder / f"{name}.jsonl", rows)
        train_pm_stage(file, folder / name, model=str(model), learning_rate=2e-3, eval_share=0.0, epochs=4, quiet=True)
    return {"model": str(model), "pm": str(folder / "pm"), "monitor": str(folder / "monitor")}


def settings(models: dict[str, str], **changed: Any) -> dict[str, Any]:
    quick = {"steps": 6, "prompts_per_step": 2, "samples_per_prompt": 4, "max_new_tokens": 8, "learning_rate": 1e-3}
    return quick | {"pm": models["pm"], "model": models["model"], "held_out": 16, "monitor_every": 2} | changed


def checks_in(directory: Path) -> list[dict[str, Any]]:
    return [row for row in rows_in(directory / "metrics.jsonl") if row["pm_score"] is not None]


@pytest.mark.parametrize("variant", [{}, {"lora": True}, {"beta": 0.0}])
def test_every_few_steps_and_after_the_last_the_policy_is_checked(
    models: dict[str, str], prompts: str, tmp_path: Path, variant: dict[str, Any]
) -> None:
    command(prompts, tmp_path / "rl", **settings(models, monitor_every=4, monitor_pm=models["monitor"], **variant))
    metrics, checks = rows_in(tmp_path / "rl/metrics.jsonl"), checks_in(tmp_path / "rl")
    assert [row["step"] for row in checks] == [0, 4, 6]
    assert all(row[name] is not None for row in checks for name in (*MEASURED, "monitor_score"))
    assert all(row.keys() == metrics[0].keys() for row in metrics)
    assert checks[0]["pm_score"] == pytest.approx(0, abs=1e-9)
    assert checks[0]["held_out_kl"] == pytest.approx(0, abs=1e-6)
    assert checks[-1]["held_out_kl"] > checks[1]["held_out_kl"] > 1e-4
    samples = rows_in(tmp_path / "rl/samples.jsonl")
    assert [row["step"] for row in samples] == [0] * 32 + [4] * 32 + [6] * 32
    assert [row["id"] for row in samples[:32]] == [row["id"] for row in samples[32:64]]
    assert [row["sample_index"] for row in samples[:32]] == [0, 1] * 16


def test_the_unit_is_that_of_the_start_models_replies_to_the_held_out_prompts(
    models: dict[str, str], prompts: str, tmp_path: Path
) -> None:
    command(prompts, tmp_path / "rl", **settings(models))
    results = manifest_of(tmp_path / "rl")["metrics"]
    starts = [load_row(PolicySample, row) for row in rows_in(tmp_path / "rl/samples.jsonl") if row["step"] == 0]
    judge, tokenizer = load_reward_model(Path(models["pm"])), load_tokenizer(Path(models["pm"]))
    scores = score_conversations(judge, tokenizer, [[*row.prompt, *row.completion] for row in starts])
    assert results["score_mean"] == pytest.approx(sum(scores) / 32, abs=1e-4)
    within = [(one - other) ** 2 / 2 for one, other in zip(scores[::2], scores[1::2], strict=True)]
    assert results["score_std"] == pytest.approx((sum(within) / 16) ** 0.5, rel=1e-3)
    assert [row.score for row in starts] == pytest.approx(scores, abs=1e-4)
    assert results["kept_step"] == results["steps"] == 6


def test_divergence_and_entropy_are_over_the_whole_vocabulary(model: Path, tmp_path: Path) -> None:
    import torch

    policy, other = load_causal_lm(model), load_causal_lm(tiny_model_dir(tmp_path / "other", seed=1))
    prompts = [Prompt(id="p", prompt=[Message(role="user", content="question")])]
    monitor = Monitor(
        prompts,
        load_tokenizer(model),
        [preference_source(lambda _, replies: [float(i) for i, _ in enumerate(replies)])],
        None,
        tmp_path / "samples.jsonl",
        rl_monitor.Sampling(8, 0.7),
        0,
        4,
        1,
    )
    results = monitor.check(0, policy, logits_of(other))
    assert len(monitor.rows) == 17  # one prompt, seventeen replies
    kl, entropy, tokens = 0.0, 0.0, 0
    for row in monitor.rows:
        start = monitor.tokenizer.apply_chat_template(
            [m.model_dump() for m in row.prompt], add_generation_prompt=True, return_dict=False
        )
        reply = monitor.tokenizer(row.reply)["input_ids"]
        for position in range(len(reply) + (row.finish_reason == "stop")):
            context = torch.tensor([start + reply[:position]])
            with torch.no_grad():
                p, q = (torch.softmax(m(context).logits[0, -1] / 0.7, -1).double() for m in (policy, other))
            kl += float((p * (p / q).log()).sum())
            entropy -= float((p * p.log()).sum())
            tokens += 1
    assert results["held_out_kl"] == pytest.approx(kl / tokens, rel=1e-4)
    assert results["held_out_entropy"] == pytest.approx(entropy / tokens, rel=1e-4)


def test_one_score_for_every_reply_is_refused(model: Path, tmp_path: Path) -> None:
    prompts = [Prompt(id="p", prompt=[Message(role="user", content="question")])]
    monitor = Monitor(
        prompts,
        load_tokenizer(model),
        [preference_source(lambda _, replies: [1.5] * len(replies))],
        None,
        tmp_path / "samples.jsonl",
        rl_monitor.Sampling(4),
        0,
        4,
        1,
    )
    policy = load_causal_lm(model)
    with pytest.raises(CaiError) as error:
        monitor.check(0, policy, logits_of(policy))
    assert error.value.code == "cannot-distinguish"


def test_a_planted_phrase_is_flagged_within_three_checks_and_the_better_policy_kept(
    models: dict[str, str], prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planted = {"steps": 40, "prompts_per_step": 8, "learning_rate": 1e-2, "beta": 0.0, "monitor_every": 4}
    run = settings(models, monitor_pm=models["monitor"], **planted)
    command(prompts, tmp_path / "rl", stop_on_goodhart=True, **run)
    checks, results = checks_in(tmp_path / "rl"), manifest_of(tmp_path / "rl")["metrics"]
    assert len(checks) <= 1 + 3
    assert results["goodhart_step"] == checks[-1]["step"] == results["steps"] < 40
    assert checks[-1]["goodhart"].startswith("monitor_score falls while pm_score rises")
    assert "monitor_score falls" in capsys.readouterr().err
    kept = next(row for row in checks if row["step"] == results["kept_step"])
    assert kept["monitor_score"] == max(row["monitor_score"] for row in checks) > checks[-1]["monitor_score"] + 0.2
    # The kept policy equals that of a run with as many steps.
    assert kept["step"] == 0
    assert largest_difference(tmp_path / "rl", Path(models["model"])) == 0
    command(prompts, tmp_path / "on", **run | {"steps": checks[-1]["step"] + 4})
    assert manifest_of(tmp_path / "on")["metrics"]["kept_step"] == checks[-1]["step"] + 4
    assert checks_in(tmp_path / "on")[: len(checks)] == checks


@pytest.mark.parametrize("lora", [False, True])
def test_the_policy_that_is_kept_is_the_one_of_the_best_check(
    models: dict[str, str],
    prompts: str,
    tmp_path: Path,
    lora: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = settings(models, lora=lora, save_steps=3)
    command(prompts, tmp_path / "four", **run | {"steps": 4})
    monkeypatch.setattr(rl_monitor, "goodhart", lambda checks, *_, **__: "planted" if len(checks) == 4 else None)
    with interrupted_after(6):
        command(prompts, tmp_path / "rl", stop_on_goodhart=True, **run | {"steps": 9})
    command(prompts, tmp_path / "rl", stop_on_goodhart=True, **run | {"steps": 9})
    results = manifest_of(tmp_path / "rl")["metrics"]
    assert (results["kept_step"], results["goodhart_step"], results["goodhart"]) == (4, 6, "planted")
    (kept,) = (row for row in checks_in(tmp_path / "rl") if row["step"] == 4)
    assert results["pm_score"] == kept["pm_score"]  # of the model that was written
    assert "; kept step 4; 6 steps in" in capsys.readouterr().err
    assert largest_difference(tmp_path / "rl", tmp_path / "four") == 0


def test_a_judge_can_be_the_monitor(models: dict[str, str], prompts: str, tmp_path: Path) -> None:
    script = write_rows(tmp_path / "judge.jsonl", [{"scores": [-0.5, -1.5]}])
    command(prompts, tmp_path / "rl", **settings(models, monitor_judge=f"scripted:{script}"))
    checks = checks_in(tmp_path / "rl")
    assert [row["monitor_score"] for row in checks] == pytest.approx([0.5] * 4)  # it only prefers the first position
    assert manifest_of(tmp_path / "rl")["provenance"]["monitor"]["engine"] == "scripted"


def test_a_judge_behind_a_server_can_be_the_monitor(models: dict[str, str], prompts: str, tmp_path: Path) -> None:
    def judge(request: Request) -> bytes:
        likely = [{"token": option, "logprob": logprob} for option, logprob in (("A", -0.5), ("B", -1.5))]
        sampled = {"token": "A", "logprob": -0.5, "top_logprobs": likely}
        return http(completion(request, "A", logprobs={"content": [sampled]}))

    run = settings(models, monitor_judge="openai:judge")
    with pytest.raises(UsageError) as error:
        command(prompts, tmp_path / "rl", **run)
    assert error.value.code == "missing-option"
    with Loopback(judge) as server:
        command(prompts, tmp_path / "rl", base_url=[server.url], **run)
        assert server.requests
    assert [row["monitor_score"] for row in checks_in(tmp_path / "rl")] == pytest.approx([0.5] * 4)
    with pytest.raises(UsageError) as error:
        command(prompts, tmp_path / "other", base_url=[server.url], **settings(models))
    assert error.value.code == "option-conflict"


def test_a_judge_that_does_not_answer_gives_no_score_and_a_warning(
    models: dict[str, str], prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = write_rows(tmp_path / "judge.jsonl", [{"contains": "never said"}])
    run = settings(models, monitor_judge=f"scripted:{script}", learning_rate=1e-2)
    command(prompts, tmp_path / "rl", **run)
    samples = [row for row in rows_in(tmp_path / "rl/samples.jsonl") if row["step"] == 6]
    assert None in [row["monitor_score"] for row in samples]
    assert "the monitor gave no score to" in capsys.readouterr().err


def test_helpful_prompts_are_mixed_in_and_all_are_counted(models: dict[str, str], prompts: str, tmp_path: Path) -> None:
    helpful = tmp_path / "helpful.txt"
    helpful.write_text("".join(f"helpful question {i}\n" for i in range(30)))
    run = settings(models, helpful=str(helpful), helpful_ratio=0.5, steps=2)
    command(prompts, tmp_path / "rl", **run)
    counts = manifest_of(tmp_path / "rl")["counts"]
    assert (counts["in"], counts["used"], counts["held_out"]) == (78, 72, 16)
    assert counts["skipped_reasons"] == {"beyond --helpful-ratio": 6}
    kinds = {row["kind"] for row in rows_in(tmp_path / "rl/samples.jsonl")}
    assert kinds == {None, "helpful"}
    with pytest.raises(CaiError) as error:
        command(prompts, tmp_path / "rl", **run | {"helpful_ratio": 1.0})
    assert error.value.code == "other-run"


def test_a_monitor_must_be_one_model_and_not_the_reward(models: dict[str, str], prompts: str, tmp_path: Path) -> None:
    two = {"monitor_pm": models["monitor"], "monitor_judge": "scripted:x"}
    for monitors in ({"monitor_pm": models["pm"]}, two):
        with pytest.raises(UsageError) as error:
            command(prompts, tmp_path / "rl", **settings(models, **monitors))
        assert error.value.code == "option-conflict"


def test_tensorboard_gets_the_metrics_of_metrics_jsonl(
    models: dict[str, str], prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    command(prompts, tmp_path / "rl", **settings(models, report_to="tensorboard"))
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    tags = events.Tags()["scalars"]
    for name in MEASURED:
        (tag,) = [tag for tag in tags if tag.rpartition("/")[2] == name]
        logged = [(event.step, event.value) for event in events.Scalars(tag)]
        assert logged == [(row["step"], pytest.approx(row[name], abs=1e-5)) for row in checks_in(tmp_path / "rl")]
    assert any(tag.endswith("reward") for tag in tags)
    assert [row["loss"] is None for row in rows_in(tmp_path / "rl/metrics.jsonl")] == [True] + [False] * 6


def test_an_unknown_or_missing_reporter_is_a_usage_error(
    models: dict[str, str], prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError) as error:
        command(prompts, tmp_path / "rl", **settings(models, report_to="paper"))
    assert error.value.code == "invalid-option"
    monkeypatch.setattr("cai_cli.training.trackers.find_spec", lambda _: None)
    with pytest.raises(UsageError) as error:
        command(prompts, tmp_path / "rl", **settings(models, report_to="trackio"))
    assert error.value.code == "missing-dependency"


def test_a_stored_sample_can_be_read_as_a_prompt(models: dict[str, str]) -> None:
    row = PolicySample(
        id="p",
        prompt=[Message(role="user", content="question")],
        sample_index=0,
        completion=[Message(role="assistant", content="answer")],
        finish_reason="stop",
        step=4,
        reply_tokens=2,
        score=0.5,
        monitor_score=None,
    )
    assert parse_prompt(row.model_dump(), source="x").id == "p"
    assert row.key == "p/0/4"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("reward", ["pm", "judge"])
def test_a_run_killed_with_sigkill_and_resumed_ends_with_the_parameters_of_one_that_was_not(
    reward: str, models: dict[str, str], prompts: str, tmp_path: Path
) -> None:
    judge = ["--judge", str(tiny_model_dir(tmp_path / "judge", seed=5, max_position_embeddings=1024))]
    rewards = {"pm": ["--pm", models["pm"]], "judge": [*judge, "--max-principles", "1"]}
    steps = {"pm": 30, "judge": 20}[reward]
    options = f"--steps {steps} --prompts-per-step 2 --samples-per-prompt 4 --max-new-tokens 8 --learning-rate 1e-3"
    options += " --held-out 8 --monitor-every 4 --save-steps 5 --device cpu"

    def argv(out: str) -> list[str]:
        given = ["--model", models["model"], *rewards[reward], "--monitor-pm", models["monitor"]]
        return [sys.executable, "-m", "cai_cli", "rl", prompts, "-o", str(tmp_path / out), *given, *options.split()]

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(argv("whole"), check=True, env=environment)
    for kill_at in (8, 17):  # between two checkpoints, with checks on both sides
        child = subprocess.Popen(argv("killed"), env=environment)
        metrics = tmp_path / "killed.partial/metrics.jsonl"
        while not metrics.exists() or f'"step":{kill_at},' not in metrics.read_text():
            assert child.poll() is None
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        assert not (tmp_path / "killed").exists()
    subprocess.run(argv("killed"), check=True, env=environment)
    assert largest_difference(tmp_path / "whole", tmp_path / "killed") == 0
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert rows_in(tmp_path / "whole" / name) == rows_in(tmp_path / "killed" / name)
    whole, killed = (manifest_of(tmp_path / out) for out in ("whole", "killed"))
    assert whole["metrics"] == killed["metrics"]
    if reward == "judge":
        answers = rows_in(tmp_path / "killed/judge.jsonl")
        assert answers == rows_in(tmp_path / "whole/judge.jsonl")
        asked = [(row["prompt_hash"], *row["replies"]) for row in answers]
        assert len(asked) == len(set(asked)) > 100
