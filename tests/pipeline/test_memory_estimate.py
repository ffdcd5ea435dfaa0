"""The memory of the training steps of a run: on the page, and as `cai run --dry-run` says it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from conftest import Cai
from helpers import revision, write_rows
from tiny import tiny_model_dir

from cai_cli.pipeline import memory_estimate, memory_table
from cai_cli.pipeline.memory_table import CASES, REFUSED, Case, planned
from cai_cli.training.memory_check import H100, DeviceMemory

PAGE = (Path(__file__).parents[2] / "docs/scale.md").read_text(encoding="utf-8")
RUN = """name: n
model: model
steps:
  full: {command: sft, input: rows.jsonl}
  pm: {command: train-pm, input: pairs.jsonl, model: "@full"}
  policy: {command: rl, input: rows.jsonl, model: "@full", pm: "@pm", max-new-tokens: 8}
  elsewhere: {command: sft, input: rows.jsonl, model: org/not-here}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model_dir(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", [revision(i) for i in range(4)])
    (tmp_path / "pairs.jsonl").write_bytes((tmp_path / "rows.jsonl").read_bytes())
    (tmp_path / "run.yaml").write_text(RUN)
    return tmp_path


def test_a_dry_run_says_what_every_training_step_holds(folder: Path, cai: Cai) -> None:
    done = cai("run", "run.yaml", "--dry-run", "--json")
    assert done.code == 0, done.stderr
    found: dict[str, Any] = {step["step"]: step["memory"] for step in json.loads(done.stdout)}
    assert found["elsewhere"] is None
    for name in ("full", "pm", "policy"):
        memory = found[name]
        sizes = [value for key, value in memory.items() if key not in ("peak", "device", "free", "fits")]
        assert memory["fits"]
        assert sum(sizes) == pytest.approx(memory["peak"], abs=len(sizes))
    assert found["policy"]["preference_models"] > 0
    text = cai("run", "run.yaml", "--dry-run").stdout
    assert text.count("# memory") == 3


def test_a_dry_run_refuses_a_step_that_cannot_fit(folder: Path, cai: Cai, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_estimate, "H100", DeviceMemory("of a test", 1000.0))
    monkeypatch.setattr(memory_estimate, "this_device", lambda _: DeviceMemory("of RAM", 1000.0, on_cpu=True))
    done = cai("run", "run.yaml", "--dry-run")
    assert done.error == "not-enough-memory"
    assert "total" in done.stdout  # the plan is printed first


@pytest.mark.parametrize(("options", "expected"), [({}, True), ({"monitor-prompts": 0}, False)])
def test_the_start_model_that_checks_of_dpo_compare_with_is_counted(options: dict[str, Any], expected: bool) -> None:
    assert planned(Case("8B", "dpo", options)).work.reference is expected


# --- the page -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_page_holds_the_memory_that_is_counted_and_names_only_settings_that_fit() -> None:
    assert memory_table.memory_table() in PAGE, "paste what `python tests/scale_table.py` prints"
    assert memory_table.refusals() in PAGE, "paste what `python tests/scale_table.py` prints"
    for case in (case for cases in CASES.values() for case in cases):
        assert planned(case).recommended, case
    for case in REFUSED:
        assert planned(case).impossible, case
    for case in commands_of_the_page():
        assert planned(case).recommended, case


def commands_of_the_page() -> list[Case]:
    """The training commands for eight GPUs of the paper's own run, at 8B."""
    text = PAGE[PAGE.index("The commands, for a server") :].replace("\\\n", " ")
    cases = []
    for line in text[: text.index("## ")].splitlines():
        words = shlex.split(line.partition("#")[0])
        if words[:1] == ["cai"] and words[1] in ("sft", "train-pm", "rl"):
            options: dict[str, Any] = {}
            for word, after in zip(words, [*words[1:], "--"], strict=True):
                if word.startswith("--") and word not in ("--model", "--pm"):
                    options[word.removeprefix("--")] = True if after.startswith("--") else after
            cases.append(Case("8B", words[1], options))
    assert len(cases) == 3
    assert H100.free == 78 * 2**30
    return cases
