"""The plan of a run: keys, requests and inputs of each step."""

import os
from pathlib import Path
from typing import Any

import pytest
from helpers import preference, revision, sample_row, write_rows
from pipeline_cases import planned

from cai_cli.constitution.schema import PreferenceConstitution, open_constitution
from cai_cli.pipeline.estimate import StepEstimate, estimate


def test_a_key_changes_with_settings_files_and_earlier_steps(folder: Path) -> None:
    def keys(steps: str) -> list[str]:
        return [step.key for step in planned(folder, steps)]

    two = "  a: {command: sample, input: prompts.jsonl}\n  b: {command: critique, input: '@a'}\n"
    before = keys(two)
    assert keys(two) == before
    other: list[Any] = keys(two.replace("prompts.jsonl", "prompts.jsonl, n: 2"))
    assert all(a != b for a, b in zip(before, other, strict=True))
    os.truncate(folder / "prompts.jsonl", 0)
    assert all(a != b for a, b in zip(before, keys(two), strict=True))


@pytest.mark.parametrize(
    ("settings", "requests", "new_tokens"),
    [
        ("both-orders: false", 18, 0),
        ("principles-per-pair: 2", 18 * 2 * 2, 0),
        ("principles-per-pair: all, max-principles: 3", 18 * 3 * 2, 0),
        ("pairs: random, both-orders: false", 9, 0),
        ("method: contrast", 18 * 2, 0),
        ("method: cot, cot-samples: 3, max-new-tokens: 10", 18 * 2 * 3 * 2, 18 * 2 * 3 * 10),
        ("method: verdict, max-new-tokens: 10", 18 * 2, 18 * 2 * 10),
    ],
)
def test_the_plan_counts_the_requests_of_each_judging_method(
    settings: str, requests: int, new_tokens: int, folder: Path
) -> None:
    (folder / "six.txt").write_text("".join(f"question {i}\n" for i in range(6)))
    steps = f"  a: {{command: sample, input: six.txt, n: 3}}\n  b: {{command: label-prefs, input: '@a', {settings}}}\n"
    found = estimate(planned(folder, steps))[1]
    assert (found.requests, found.tokens.new_tokens) == (requests, new_tokens)


def test_the_plan_reads_a_named_input_as_the_command_does(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    rows = [sample_row(i) for i in range(4)]
    for name in ("old.jsonl", "a=b.jsonl"):
        write_rows(folder / name, rows)
    steps = "  a: {command: sample, input: prompts.jsonl}\n"
    steps += "  b: {command: eval compare, input: ['x=@a', y=old.jsonl, a=b.jsonl], judge: 'scripted:script.jsonl'}\n"
    found = estimate(planned(folder, steps))[1]
    assert (found.rows, found.requests) == (4 * 3, 4 * 3 * 2)


def test_the_plan_of_rl_counts_the_requests_to_its_monitor(folder: Path) -> None:
    def planned_rl(monitor_model: str) -> StepEstimate:
        settings = f"pm: pm, steps: 20, max-new-tokens: 10{monitor_model}"
        return estimate(planned(folder, f"  a: {{command: rl, input: prompts.jsonl, {settings}}}\n"))[0]

    alone, judge, pm = (planned_rl(w) for w in ("", ", monitor-judge: judge", ", monitor-pm: other"))
    prompt, replies = len("\n\nHuman: question 0") / 4, 21  # of one check, 7 to each of 3 prompts
    requests = judge.requests - alone.requests
    assert (requests, pm.requests) == (2 * 2 * replies, alone.requests)
    examples = open_constitution(PreferenceConstitution, None, None).examples
    few_shot = sum(len(example.model_dump_json()) for example in examples) / 4
    read = judge.tokens.prompt_tokens - alone.tokens.prompt_tokens
    assert read == pytest.approx(requests * (few_shot + prompt + 2 * 10))
    assert pm.tokens.prompt_tokens - alone.tokens.prompt_tokens == pytest.approx(3 * replies * (prompt + 10))
    assert judge.tokens.new_tokens == pm.tokens.new_tokens == alone.tokens.new_tokens


def test_the_replies_of_files_and_the_rows_that_a_trainer_mixes_in_are_counted(folder: Path) -> None:
    write_rows(folder / "revised.jsonl", [revision(i, reply="x" * 400, rounds=2) for i in range(4)])
    write_rows(folder / "helpful.jsonl", [sample_row(i, reply="x" * 400) for i in range(9)])
    write_rows(folder / "pairs.jsonl", [preference(i) for i in range(8)])
    steps = planned(
        folder,
        "  sl: {command: sft, input: revised.jsonl, helpful: helpful.jsonl, helpful-ratio: 0.5, eval-share: 0}\n"
        "  few: {command: sft, input: revised.jsonl, max-steps: 3, batch-size: 2, gradient-accumulation: 1}\n"
        "  pm: {command: train-pm, input: pairs.jsonl, mix: pairs.jsonl, mix-ratio: 0.5}\n"
        "  head: {command: train-pm, input: pairs.jsonl, fit-head: true, epochs: 0}\n",
    )
    sl, few, pm, head = estimate(steps)
    assert (sl.rows, few.rows, pm.rows, head.rows) == (4 * 2 + 4, 8, 12, 8)  # two revisions a row
    assert sl.tokens.trained_tokens > sl.rows * 100
    assert few.tokens.trained_tokens == pytest.approx(6 * sl.tokens.trained_tokens / 12, rel=0.05)
    assert head.tokens.trained_tokens == 0
    assert head.tokens.prompt_tokens == head.alone.prompt_tokens == pytest.approx(pm.tokens.trained_tokens * 8 / 12)


def test_a_character_that_is_added_to_a_prompt_is_counted(folder: Path) -> None:
    plain = estimate(planned(folder, "  a: {command: sample, input: prompts.jsonl}\n"))[0]
    told = estimate(planned(folder, f"  a: {{command: sample, input: prompts.jsonl, system: {'x' * 80}}}\n"))[0]
    assert told.tokens.prompt_tokens - plain.tokens.prompt_tokens == pytest.approx(6 * 80 / 4)


def test_what_one_process_does_alone_is_a_part_of_what_a_step_does(folder: Path) -> None:
    settings = "input: prompts.jsonl, judge: judge, max-principles: 1, steps: 4, max-new-tokens: 8"
    (rl,) = estimate(planned(folder, f"  a: {{command: rl, {settings}}}\n"))
    assert 0 < rl.alone.prompt_tokens < rl.tokens.prompt_tokens
    assert 0 < rl.alone.new_tokens < rl.tokens.new_tokens
    assert rl.alone.trained_tokens == 0
