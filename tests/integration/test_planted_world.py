"""A world whose truth is known, and the whole pipeline in it: every step must recover what was planted.

The world: a policy that answers every question with "Yes" or "No", each half of the time. "Yes" is the better reply. The
judge knows it, but it has a position bias towards the first, and it is noisy: its log-odds for the first reply are

    PLACE + CONTENT * (+1 if the first reply is "Yes", -1 if it is "No") + NOISE * a standard normal draw.

Then it follows that

1. the labels prefer "Yes" on nearly every pair, because the place cancels over both orders;
2. the audit finds the rates of first picks and of flips that these three numbers imply, and that the judge reads;
3. the preference model scores "Yes" above "No" by the log-odds that these three numbers put into the labels;
4. RL moves the policy from half "Yes" to nearly always "Yes", at the KL divergence that this change has;
5. the report states all of it;

and in a world without content, the audit says so.
"""

import json
import math
import random
from pathlib import Path
from statistics import NormalDist, fmean

import pytest
from conftest import Cai
from helpers import Json, assistant, manifest_of, rows_in, user, write_rows
from report_page import drawn, squeezed
from tiny import tiny_model_dir

GOOD, BAD = "Yes", "No"
PLACE, CONTENT, NOISE = 0.6, 1.6, 1.2
PROMPTS = 400
QUESTION = "Which is kinder?"
CONSTITUTION = f"kind: preference\nname: planted\nprinciples: [{{id: kind, comparison: '{QUESTION}'}}]\n"
TRAIN = "--batch-size 8 --gradient-accumulation 1"


def done(cai: Cai, command: str) -> None:
    result = cai(*command.split(), "--quiet")
    assert result.code == 0, result.stderr


# --- what is planted ----------------------------------------------------------------------------------------------


def plant_a_policy_that_says_either_word(cai: Cai, world: Path) -> None:
    tiny_model_dir(world / "tiny")
    prompts = [f"question number {n}" for n in range(PROMPTS)]
    (world / "prompts.txt").write_text("\n".join(prompts) + "\n")
    rows = [
        {"prompt": user(prompt), "completion": assistant(reply)} for prompt in prompts[:100] for reply in (GOOD, BAD)
    ]
    write_rows(world / "either.jsonl", rows)
    # Steps of many rows: with few, the share of either word depends on which rows came last.
    steps = "--max-steps 100 --epochs 32 --learning-rate 1e-2 --eval-share 0 --batch-size 8 --gradient-accumulation 8"
    done(cai, f"sft either.jsonl -o policy --model tiny {steps}")


def plant_a_judge(world: Path, name: str, content: float) -> None:
    """A script with the judge's log-odds for every question in either order."""
    draw = random.Random(0)
    (world / "planted.yaml").write_text(CONSTITUTION)
    lines = []
    for n in range(PROMPTS):
        for first, second, sign in ((GOOD, BAD, 1), (BAD, GOOD, -1)):
            log_odds = PLACE + sign * content + NOISE * draw.gauss(0, 1)
            options = f"\n\n\n{QUESTION} Options:\n (A) [[[{first}]]]\n (B) [[[{second}]]]"
            scores = [-math.log1p(math.exp(-log_odds)), -math.log1p(math.exp(log_odds))]
            lines.append({"contains": f"question number {n}{options}", "scores": scores})
    write_rows(world / name, lines)


# --- the pipeline -------------------------------------------------------------------------------------------------


def sample_two_replies_to_each_prompt(cai: Cai) -> None:
    done(cai, "sample prompts.txt -o run/samples.jsonl --model policy --n 2 --max-new-tokens 4")


def label_the_pairs(cai: Cai, judge: str, output: str) -> None:
    done(cai, f"label-prefs run/samples.jsonl -o {output} --model scripted:{judge} --constitution planted.yaml")


def audit_the_labels(cai: Cai, labels: str) -> Json:
    return json.loads(cai("eval", "agreement", labels, "--json").stdout)  # type: ignore[no-any-return]


def train_a_preference_model(cai: Cai) -> None:
    steps = "--max-steps 60 --learning-rate 3e-3 --eval-share 0.3"
    done(cai, f"train-pm run/labels.jsonl -o run/pm --model policy {steps} {TRAIN}")


def score_both_replies(cai: Cai, world: Path) -> list[float]:
    """How much higher the preference model scores "Yes" than "No", by prompt."""
    prompts = [f"question number {n}" for n in range(0, PROMPTS, 10)]
    rows = [{"prompt": user(prompt), "completion": assistant(reply)} for prompt in prompts for reply in (GOOD, BAD)]
    write_rows(world / "both.jsonl", rows)
    done(cai, "score both.jsonl -o scores.jsonl --pm run/pm")
    scores = [row["score"] for row in rows_in(world / "scores.jsonl")]
    return [good - bad for good, bad in zip(scores[::2], scores[1::2], strict=True)]


def train_the_policy_against_it(cai: Cai) -> None:
    steps = "--steps 30 --prompts-per-step 8 --learning-rate 1e-3 --max-new-tokens 4"
    checks = "--held-out 200 --monitor-every 30"
    done(cai, f"rl prompts.txt -o run/rl --model policy --pm run/pm {steps} {checks}")


# --- what must be recovered ---------------------------------------------------------------------------------------


def share_of_good(replies: list[str]) -> float:
    return sum(reply == GOOD for reply in replies) / len(replies)


def first_picks_and_flips(content: float) -> tuple[float, float]:
    """The share of votes for the first reply, and of pairs whose winner changes with the order, that the world implies."""
    good_first, bad_first = (NormalDist(PLACE + sign * content, NOISE).cdf(0) for sign in (1, -1))
    picks = [1 - good_first, 1 - bad_first]
    return sum(picks) / 2, picks[0] * picks[1] + (1 - picks[0]) * (1 - picks[1])


def log_odds_in_the_labels() -> float:
    """The log-odds of the mean label for "Yes": a mean of probabilities over orders and noise, so a little below CONTENT."""
    draws = [NormalDist(CONTENT, NOISE).inv_cdf((k + 0.5) / 1000) for k in range(1000)]
    p = fmean(1 / (1 + math.exp(-log_odds - place)) for log_odds in draws for place in (PLACE, -PLACE))
    return math.log(p / (1 - p))


def holds(estimate: Json, planted: float) -> bool:
    """Whether the estimate and its interval are where the planted value is, within three of its half-widths."""
    return abs(estimate["value"] - planted) < 1.5 * (estimate["high"] - estimate["low"])


def check_the_labels(world: Path) -> None:
    labels = rows_in(world / "run/labels.jsonl")
    assert len(labels) > PROMPTS / 3  # half of the pairs have two different replies
    right = share_of_good([row["chosen"][0]["content"] for row in labels])
    both_orders = NormalDist(2 * CONTENT, NOISE * math.sqrt(2)).cdf(0)  # the noise of both orders against the content
    assert right == pytest.approx(1 - both_orders, abs=0.04)


def check_the_audit(audit: Json) -> None:
    first_picks, flips = first_picks_and_flips(CONTENT)
    assert holds(audit["first_picks"], first_picks)
    assert holds(audit["flip_rate"], flips)
    assert holds(audit["position_log_odds"], PLACE)
    # The share of the content in what the judge prefers: its variance against that of the noise in either order.
    assert holds(audit["between_orders"], CONTENT**2 / (CONTENT**2 + NOISE**2))
    assert audit["reads_replies"] is True
    assert audit["trusted"] is not False


def check_the_preference_model(cai: Cai, world: Path) -> None:
    assert manifest_of(world / "run/pm")["metrics"]["accuracy"]["low"] > 0.7
    differences = score_both_replies(cai, world)
    assert min(differences) > 0
    assert fmean(differences) == pytest.approx(log_odds_in_the_labels(), abs=0.3)


def check_the_policy(world: Path) -> None:
    checks, metrics = rows_in(world / "run/rl/samples.jsonl"), rows_in(world / "run/rl/metrics.jsonl")
    first, last = metrics[0], metrics[-1]
    before, after = (
        share_of_good([row["completion"][0]["content"] for row in checks if row["step"] == check["step"]])
        for check in (first, last)
    )
    assert before == pytest.approx(0.5, abs=0.15)
    assert after > 0.9
    assert last["reward"] > metrics[1]["reward"] + 0.5
    # The divergence of two policies that say "Yes" with these shares; it is logged by token.
    divergence = sum(p * math.log(p / q) for p, q in ((after, before), (1 - after, 1 - before)) if p)
    assert first["held_out_kl"] == pytest.approx(0, abs=1e-6)
    assert last["held_out_kl"] * last["held_out_reply_tokens"] == pytest.approx(divergence, abs=0.25)


def check_the_report(world: Path, audit: Json) -> None:
    _, page = drawn(world / "run")
    text = squeezed(page.text)
    accuracy, rl = manifest_of(world / "run/pm")["metrics"]["accuracy"], manifest_of(world / "run/rl")["metrics"]
    for words in (f"{audit['between_orders']['value']:.2f}", f"{accuracy['value']:.1%}", f"{rl['reward']:.3g}"):
        assert words in text, words


def test_the_pipeline_recovers_the_planted_world(cai: Cai, tmp_path: Path) -> None:
    plant_a_policy_that_says_either_word(cai, tmp_path)
    plant_a_judge(tmp_path, "judge.jsonl", CONTENT)

    (tmp_path / "run").mkdir()
    sample_two_replies_to_each_prompt(cai)
    replies = [row["completion"][0]["content"] for row in rows_in(tmp_path / "run/samples.jsonl")]
    assert sum(reply in (GOOD, BAD) for reply in replies) > 0.97 * len(replies)
    assert share_of_good(replies) == pytest.approx(0.5, abs=0.1)

    label_the_pairs(cai, "judge.jsonl", "run/labels.jsonl")
    check_the_labels(tmp_path)
    audit = audit_the_labels(cai, "run/labels.jsonl")
    check_the_audit(audit)

    train_a_preference_model(cai)
    check_the_preference_model(cai, tmp_path)

    train_the_policy_against_it(cai)
    check_the_policy(tmp_path)

    check_the_report(tmp_path, audit)

    plant_a_judge(tmp_path, "blind.jsonl", 0.0)
    label_the_pairs(cai, "blind.jsonl", "blind_labels.jsonl")
    assert audit_the_labels(cai, "blind_labels.jsonl")["trusted"] is False
