"""GPU-hours and sizes: the arithmetic, and that the page and `cai run --dry-run` say what it says."""

import json
from pathlib import Path

import pytest
from conftest import Cai

from cai_cli.pipeline.paper_run import GENERATED, HELPFUL, RED_TEAM, RL_HELPFUL, RL_RED_TEAM, paper_run, paper_table
from cai_cli.runtime import cost
from cai_cli.runtime.cost import TokenCounts

PAGE = (Path(__file__).parents[2] / "docs/scale.md").read_text(encoding="utf-8")


def test_a_million_tokens_take_what_the_operations_take() -> None:
    second = 0.4 * 989e12
    assert TokenCounts(prompt_tokens=1e6).gpu_hours(8e9) == pytest.approx(1e6 * 2 * 8e9 / second / 3600)
    assert TokenCounts(trained_tokens=1e6).gpu_hours(8e9) == pytest.approx(
        3 * TokenCounts(prompt_tokens=1e6).gpu_hours(8e9)
    )
    assert 1e6 / TokenCounts(new_tokens=1e6).gpu_hours(8e9) / 3600 == pytest.approx(3709, rel=1e-3)  # tokens a second
    both = cost.total([TokenCounts(prompt_tokens=3.0), TokenCounts(1.0, 2.0, 4.0)])
    assert both == TokenCounts(4.0, 2.0, 4.0)


def test_the_page_holds_the_table_that_is_counted() -> None:
    assert paper_table() in PAGE, "paste what `python tests/scale_table.py` prints"
    assert f"{cost.ASSUMPTIONS}." in " ".join(PAGE.split())
    for number in (RED_TEAM, GENERATED, HELPFUL, RL_RED_TEAM, RL_HELPFUL):
        assert f"{number:,}" in PAGE


def test_a_dry_run_counts_a_step_as_the_page_does(cai: Cai, tmp_path: Path) -> None:
    prompts = [{"prompt": "x" * (4 * 60 - len("\n\nHuman: "))}] * 10
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    steps = "a: {command: sample, input: p.jsonl, max-new-tokens: 120}\n  b: {command: critique-revise, input: '@a', max-new-tokens: 120}"
    (tmp_path / "run.yaml").write_text(f"name: n\nsteps:\n  {steps}\n")
    done = cai("run", "run.yaml", "--dry-run", "--json")
    assert done.code == 0, done.stderr
    found = {e["step"]: e for e in json.loads(done.stdout)}
    of_paper = {e.step: e.as_json() for e in paper_run()}
    twins = {"a": "replies to red-team prompts", "b": "four rounds of critique and revision"}
    for step, twin in twins.items():
        for name in ("prompt_tokens", "new_tokens", "bytes"):
            assert found[step][name] / 10 == pytest.approx(of_paper[twin][name] / RED_TEAM, rel=1e-3)
        for size, hours in found[step]["gpu_hours"].items():
            assert hours / 10 == pytest.approx(of_paper[twin]["gpu_hours"][size] / RED_TEAM, rel=1e-3)
