"""`cai rl --judge` in planted worlds: the start model answers "yes" or "no" with equal probability, and the judge's
opinion of both is known."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from threading import Event
from typing import Any

import pytest
from helpers import interrupted_after, largest_difference, manifest_of, preference, rows_in, stage, write_rows
from pydantic import ValidationError
from tiny import tiny_model_dir

from cai_cli.common.errors import CaiError, UsageError
from cai_cli.constitution.schema import PreferencePrinciple
from cai_cli.data.reward_schema import RubricItem
from cai_cli.data.schema import Message, Prompt
from cai_cli.data.transcripts import render_transcript
from cai_cli.engines import open_engine
from cai_cli.engines.base import LogprobRequest, RequestFailure, Sampling, Usage
from cai_cli.engines.scripted import ScriptedEngine
from cai_cli.judging.base import FeedbackModel, sigmoid
from cai_cli.judging.constitution_judge import ConstitutionJudge, JudgeCounts
from cai_cli.models.loading import load_tokenizer
from cai_cli.phase2_feedback.reward_normalizer import RewardNormalizer
from cai_cli.phase2_feedback.rl import estimate
from cai_cli.phase2_feedback.rl_config import RlConfig
from cai_cli.phase2_feedback.rl_rewards import RewardFunction, judge_source
from cai_cli.runtime.cost import RowFlow

command = stage("rl")
QUICK: dict[str, Any] = {"steps": 4, "prompts_per_step": 2, "samples_per_prompt": 4, "max_new_tokens": 4,
                         "learning_rate": 1e-3, "device": "cpu", "held_out": 4}  # fmt: skip
ONE_PRINCIPLE = """\
kind: preference
name: planted
principles: [{id: planted, comparison: "Choose the reply that says yes."}]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers every question with "yes" or "no", about half of the time each."""
    folder = tmp_path_factory.mktemp("coin")
    rows = [{"prompt": f"question number {i}", "completion": reply} for i in range(8) for reply in ("yes", "no")]
    start = tiny_model_dir(folder / "tiny")
    options = {"max_steps": 80, "learning_rate": 3e-3, "batch_size": 16, "gradient_accumulation": 1, "eval_share": 0.0}
    stage("sft")(write_rows(folder / "rows.jsonl", rows), folder / "coin", model=str(start), quiet=True, **options)
    return folder / "coin"


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    return str(write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"question number {i}"} for i in range(8)]))


@pytest.fixture
def constitution(tmp_path: Path) -> str:
    (tmp_path / "planted.yaml").write_text(ONE_PRINCIPLE)
    return str(tmp_path / "planted.yaml")


class Judge:
    """Replaces the scripted engine: `opinion` gives the log-odds of the first option of a request."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, opinion: Any) -> None:
        self.requests: Counter[str] = Counter()
        self.name = f"scripted:{write_rows(tmp_path / 'judge.jsonl', [{'scores': [0.0, 0.0]}])}"

        def option_logprobs(
            _: ScriptedEngine, requests: Sequence[LogprobRequest]
        ) -> Iterator[list[float] | RequestFailure]:
            texts = [r.text if isinstance(r.text, str) else render_transcript(r.text) for r in requests]
            self.requests.update(texts)
            answers = [opinion(text) for text in texts]
            return [RequestFailure("busy") if odds is None else [odds, 0.0] for odds in answers]  # type: ignore[return-value]

        monkeypatch.setattr(ScriptedEngine, "option_logprobs", option_logprobs)


def likes_yes(text: str) -> float:
    """A judge that likes "yes" by 1 nat, and says yes to every question by 3 nats more than it should."""
    liked = 1.0 if "[[[yes]]]" in text else -1.0
    return 3.0 + (-liked if "turned down" in text else liked)


def likes_yes_first(text: str) -> float:
    """A judge of pairs that likes "yes" by 1 nat and the first position by 2."""
    return 2.0 + ("(A) [[[yes]]]" in text) - ("(B) [[[yes]]]" in text)


OPINIONS = {"questions": likes_yes, "pairs": likes_yes_first}


def log_odds_of_yes(directory: Path) -> float:
    """The mean of log p(yes) - log p(no) over the prompts."""
    engine = open_engine(str(directory), batch_size=None, device="cpu", dtype="float32")
    questions = [[Message(role="user", content=f"question number {i}")] for i in range(8)]
    answers = engine.option_logprobs([LogprobRequest(question, ("yes", "no")) for question in questions])
    return fmean(answer[0] - answer[1] for answer in answers if isinstance(answer, list))


@pytest.mark.parametrize(
    ("method", "worth", "beta"),
    [("questions", 2.0, 0.5), ("pairs", 8 / 7, 0.5), pytest.param("questions", 2.0, 2.0, marks=pytest.mark.slow)],
)
def test_the_planted_reply_rises_to_the_share_that_its_reward_is_worth_in_kl_divergence(
    method: str, worth: float, beta: float, model: Path, prompts: str, constitution: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    judge, out = Judge(monkeypatch, tmp_path, OPINIONS[method]), tmp_path / "rl"
    run = QUICK | {"steps": 60, "prompts_per_step": 4, "samples_per_prompt": 8, "learning_rate": 3e-3}
    command(prompts, out, model=model, judge=judge.name, judge_method=method, constitution=constitution, beta=beta,
            cutoff_penalty=0.0, monitor_every=30, **run)  # fmt: skip
    metrics, checks = manifest_of(out)["metrics"], rows_in(out / "metrics.jsonl")[::30]
    start, end = log_odds_of_yes(model), log_odds_of_yes(out)
    # The policy of the highest reward less beta * KL. `worth` is the reward of "yes" less that of "no", in nats.
    best = start + worth / metrics["judge_score_std"] / beta
    assert sigmoid(start) == pytest.approx(0.5, abs=0.1)
    assert sigmoid(end) == pytest.approx(sigmoid(best), abs=0.1)
    assert (sigmoid(end) > 0.9) == (beta == 0.5)
    p, q = sigmoid(end), sigmoid(start)
    yes, no = math.log(p / q), math.log((1 - p) / (1 - q))
    checked = [row for row in rows_in(out / "samples.jsonl") if row["step"] == checks[-1]["step"]]
    error = abs(yes - no) * math.sqrt(p * (1 - p) / len(checked))  # of a mean over sampled replies
    kl = checks[-1]["held_out_kl"] * checks[-1]["held_out_reply_tokens"]
    assert kl == pytest.approx(p * yes + (1 - p) * no, abs=0.1 + 3 * error)
    assert metrics["judge_alike_share"] == 1.0  # the bias is larger than the opinion, and still cancels


def always_yes(text: str) -> float:
    return 3.0


@pytest.mark.parametrize("method", ["questions", "pairs"])
def test_a_judge_that_says_yes_to_everything_or_prefers_a_position_gives_no_reward_and_is_said_to(
    method: str, model: Path, prompts: str, constitution: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    judge, out = Judge(monkeypatch, tmp_path, always_yes), tmp_path / "rl"
    command(prompts, out, model=model, judge=judge.name, judge_method=method, constitution=constitution, beta=0.0,
            cutoff_penalty=0.0, **QUICK)  # fmt: skip
    assert "the judge gives no reward signal" in (said := capsys.readouterr().err)
    assert "standard deviation of 0.0000 nats" in said
    assert largest_difference(model, out) == 0
    metrics = manifest_of(out)["metrics"]
    assert (metrics["judge_spread"], metrics["judge_alike_share"]) == (0, 1)
    assert all(row["reward_std"] == 0 for row in rows_in(out / "metrics.jsonl")[1:])


@pytest.mark.parametrize("method", ["questions", "pairs"])
def test_an_interrupted_run_asks_nothing_twice_and_ends_with_the_same_parameters(
    method: str, model: Path, prompts: str, constitution: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = Judge(monkeypatch, tmp_path, OPINIONS[method])
    run = QUICK | {"model": model, "judge": judge.name, "judge_method": method, "constitution": constitution,
                   "steps": 6, "save_steps": 2, "monitor_every": 3, "temperature": 2.0}  # fmt: skip
    command(prompts, tmp_path / "whole", **run)
    once = Counter(judge.requests)
    judge.requests.clear()
    with interrupted_after(6):
        command(prompts, tmp_path / "killed", **run)
    assert rows_in(tmp_path / "killed.partial/judge.jsonl")
    command(prompts, tmp_path / "killed", **run)
    assert judge.requests == once
    assert set(once.values()) == {1}
    assert largest_difference(tmp_path / "whole", tmp_path / "killed") == 0
    assert rows_in(tmp_path / "whole/metrics.jsonl") == rows_in(tmp_path / "killed/metrics.jsonl")
    assert rows_in(tmp_path / "whole/judge.jsonl") == rows_in(tmp_path / "killed/judge.jsonl")


def test_a_failed_request_gives_no_reward_and_is_counted(
    model: Path, prompts: str, constitution: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    # "no" is never judged, so no reply is ever compared with another one.
    judge = Judge(monkeypatch, tmp_path, lambda text: None if "[[[no]]]" in text else likes_yes(text))
    out = tmp_path / "rl"
    command(
        prompts, out, model=model, judge=judge.name, constitution=constitution, beta=0.0, cutoff_penalty=0.0, **QUICK
    )
    rows, metrics = rows_in(out / "metrics.jsonl"), manifest_of(out)["metrics"]
    assert 0 < metrics["no_reward_share"] < 1
    assert metrics["no_reward_share"] == pytest.approx(fmean(row["no_reward_share"] for row in rows[1:]))
    assert 0 < rows[0]["held_out_no_reward_share"] < 1
    replies = rows_in(out / "samples.jsonl")
    assert {row["judge_score"] is None for row in replies if row["completion"][0]["content"] == "no"} == {True}
    assert f"without a reward {metrics['no_reward_share']:.4g}" in capsys.readouterr().err
    assert all(row["score"] is None for row in replies)


def test_a_judge_that_answers_nothing_stops_the_run(
    model: Path, prompts: str, constitution: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = Judge(monkeypatch, tmp_path, lambda text: None)
    with pytest.raises(CaiError, match="requests to the judge failed") as error:
        command(prompts, tmp_path / "rl", model=model, judge=judge.name, constitution=constitution, **QUICK)
    assert error.value.code == "request-failed"


def test_a_judge_that_refuses_a_part_of_every_reply_is_no_reward(
    model: Path, prompts: str, constitution: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = Judge(monkeypatch, tmp_path, lambda text: None if "turned down" in text else 1.0)
    with pytest.raises(CaiError, match="none has a reward") as error:
        command(prompts, tmp_path / "rl", model=model, judge=judge.name, constitution=constitution, **QUICK)
    assert error.value.code == "request-failed"


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_steps_without_any_reward_are_counted_and_end_no_run(
    model: Path, prompts: str, constitution: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    pairs = write_rows(tmp_path / "prefs.jsonl", [preference(i, 0.9, "no", "yes") for i in range(16)])
    stage("train-pm")(pairs, tmp_path / "pm", model=model, fit_head=True, epochs=0.0, eval_share=0.0, quiet=True)
    judge = Judge(monkeypatch, tmp_path, likes_yes)
    monkeypatch.setattr(  # the checks have rewards, the steps none
        RewardFunction, "_ask", lambda self, replies: ([None] * len(replies), JudgeCounts(requests=9, failed=5))
    )
    options = {"constitution": constitution, "algorithm": algorithm, "pm": str(tmp_path / "pm")}
    command(prompts, tmp_path / "rl", model=model, judge=judge.name, **options, **QUICK)
    metrics = manifest_of(tmp_path / "rl")["metrics"]
    assert (metrics["no_reward_share"], metrics["reward"], metrics["reward_before"]) == (1.0, None, None)


def test_two_rewards_are_standardised_apart_and_logged_apart(
    model: Path, prompts: str, constitution: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = write_rows(tmp_path / "prefs.jsonl", [preference(i, 0.9, "no", "yes") for i in range(16)])
    stage("train-pm")(pairs, tmp_path / "pm", model=model, learning_rate=1e-3, eval_share=0.0, quiet=True)
    judge = Judge(monkeypatch, tmp_path, likes_yes)
    command(prompts, tmp_path / "rl", model=model, pm=str(tmp_path / "pm"), judge=judge.name, judge_weight=3.0,
            constitution=constitution, cutoff_penalty=0.0, **QUICK)  # fmt: skip
    rows, metrics = rows_in(tmp_path / "rl/metrics.jsonl"), manifest_of(tmp_path / "rl")["metrics"]
    for row in rows[1:]:
        assert row["reward"] == pytest.approx(row["pm_reward"] + 3 * row["judge_reward"], abs=1e-5)
    assert rows[0]["pm_score"] == pytest.approx(0, abs=1e-6)
    assert rows[0]["judge_score"] == pytest.approx(0, abs=1e-6)
    assert metrics["score_std"] != metrics["judge_score_std"]
    provenance = manifest_of(tmp_path / "rl")["provenance"]
    assert (provenance["judge"]["engine"], provenance["settings"]["judge_weight"]) == ("scripted", 3.0)


def test_a_rubric_takes_the_place_of_the_constitution_for_its_prompt(
    model: Path, constitution: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def opinion(text: str) -> float:
        asked.append(text)
        return likes_yes(text)

    judge = Judge(monkeypatch, tmp_path, opinion)
    rubric = [{"text": "Says yes.", "weight": 2}, {"text": "Is long.", "weight": -1.0}]
    rows = [{"prompt": f"question number {i}", "rubric": rubric if i % 2 else None} for i in range(8)]
    command(write_rows(tmp_path / "rubrics.jsonl", rows), tmp_path / "rl", model=model, judge=judge.name,
            constitution=constitution, **QUICK)  # fmt: skip
    for text in asked:
        assert ("Requirement: " in text) == any(f"question number {i}" in text for i in (1, 3, 5, 7))
    judged = rows_in(tmp_path / "rl/judge.jsonl")
    assert {tuple(a["criterion_id"] for a in row["answers"]) for row in judged} == {
        ("planted",),
        ("rubric-1", "rubric-2"),
    }
    assert "rubric" not in manifest_of(tmp_path / "rl")["counts"].get("dropped", {})


OTHER = {"judge": "openai:m", "judge_url": ["http://h/v1"]}


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({}, "missing-option"),
        ({"pm": "pm", "constitution": "c.yaml"}, "option-conflict"),
        ({"pm": "pm", "judge_method": "pairs"}, "option-conflict"),
        (OTHER | {"few_shot": "none"}, "option-conflict"),
        (OTHER | {"monitor_judge": "openai:m"}, "option-conflict"),
        ({"judge": "smollm2-135m", "monitor_judge": "local:smollm2-135m"}, "option-conflict"),
        (OTHER | {"pm_url": "http://h/v1"}, "option-conflict"),
        (OTHER | {"judge_weight": 2.0}, "option-conflict"),
        ({"pm": "pm", "judge_weight": 2.0}, "option-conflict"),
    ],
)
def test_options_of_the_judge_that_do_not_fit_are_usage_errors(options: dict[str, Any], code: str) -> None:
    with pytest.raises(UsageError) as error:
        RlConfig.build({"input": "p", "output": "o"} | options)
    assert error.value.code == code


def test_the_judge_is_refused_as_the_monitor_under_another_name(model: Path, prompts: str, tmp_path: Path) -> None:
    (tmp_path / "twin").symlink_to(model)
    with pytest.raises(UsageError) as error:
        command(prompts, tmp_path / "rl", model=model, judge=str(model), monitor_judge=str(tmp_path / "twin"), **QUICK)
    assert error.value.code == "option-conflict"


@pytest.mark.parametrize(("method", "requests"), [("questions", 40 + 25 + 25), ("pairs", 60 + 50 + 100)])
def test_the_estimate_counts_the_requests_to_the_judge(method: str, requests: int) -> None:
    # 10 prompts with 4 replies; and 5 held-out prompts with 5 replies each, of the start model and of one check.
    given = {"input": "p", "output": "o", "steps": 5, "prompts_per_step": 2, "held_out": 5, "monitor_every": 5}
    flow = RowFlow(20, 1, 10, 0)
    without = estimate(flow, RlConfig.build(given | {"pm": "pm"}))
    judged = estimate(
        flow, RlConfig.build(given | {"judge": "scripted:j", "judge_method": method, "max_principles": 2})
    )
    assert judged.requests - without.requests == requests * 2 * 2  # two principles, both phrasings or orders
    assert judged.tokens.prompt_tokens > without.tokens.prompt_tokens


class Server(ScriptedEngine):
    """A scripted engine that looks like a server."""

    usage = Usage("http://h")
    workers = 3


def test_a_server_is_asked_before_the_trainer_asks_for_the_rewards(model: Path, tmp_path: Path) -> None:
    tokenizer, asked = load_tokenizer(model), Event()

    class Listening(Server):
        def option_logprobs(self, requests: Sequence[LogprobRequest]) -> list[list[float] | RequestFailure]:
            asked.set()
            return super().option_logprobs(requests)

    engine = Listening(str(write_rows(tmp_path / "judge.jsonl", [{"scores": [-1.0, -2.0]}])))
    principle = PreferencePrinciple(id="p", comparison="Choose the reply that says yes.")
    judge = ConstitutionJudge(FeedbackModel(engine, "questions", [], "chat", 0, Sampling()), [principle])
    prompt = Prompt(id="q", prompt=[Message(role="user", content="question")])
    source, unit = judge_source(judge, 1.0), {"judge": RewardNormalizer(0.0, 1.0, 1.0)}
    ends = frozenset({tokenizer.eos_token_id})
    reward = RewardFunction([source], lambda: unit, tokenizer, ends, 0.0, None, judge, [prompt])
    chats = [[{"role": "user", "content": "question"}]] * 2
    ids = [tokenizer(text)["input_ids"] for text in ("yes<|im_end|>", "no<|im_end|>")]
    reward.start(chats, ids)
    assert asked.wait(30)
    assert reward(chats, ids, log_metric=lambda *_: None) == [0.0, 0.0]
    reward.close()


@pytest.mark.parametrize(("name", "url"), [("openai:m", None), ("openai:m", ["ftp://h"]), ("here", ["http://h/v1"])])
def test_the_address_of_the_judge_is_called_as_its_option_is(
    name: str, url: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    config = RlConfig.build({"input": "p", "output": "o", "judge": name, "judge_url": url})
    with pytest.raises(UsageError, match="--judge-url"):
        config.open_judge(0)


@pytest.mark.parametrize("item", [{"text": " "}, {"text": "a", "weight": 1e308}, {"text": "a", "weight": -1e7}])
def test_a_requirement_without_text_or_with_a_weight_beyond_use_is_refused(item: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        RubricItem.model_validate(item)
