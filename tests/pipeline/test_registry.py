"""One declaration a stage: a new stage needs its module and one line in the registry."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from cli_docs import render
from conftest import Cai
from helpers import rows_in, write_rows

from cai_cli.data.schema import Prompt, Sample
from cai_cli.pipeline import registry
from cai_cli.runtime.config import Effect, Option, option
from cai_cli.runtime.cost import RowFlow, StepCost, TokenCounts
from cai_cli.runtime.manifest import hash_input, provenance
from cai_cli.runtime.shared_options import OutputOptions, ShardOptions
from cai_cli.runtime.stage import Phase, Stage
from cai_cli.runtime.stage_run import StageRun, WorkItem, WorkItems


class EchoConfig(OutputOptions, ShardOptions):
    """Answer each prompt with the prompt.

    INPUT: Prompt rows. Writes Sample rows.
    """

    times: int = option(1, "How often the prompt is repeated.", Option(aliases=("repeat",)), ge=1)
    note: str = option("", "A remark for the log.", Option(Effect.HARMLESS))


def echo(prompts: Sequence[Prompt], times: int) -> list[Sample]:
    return [
        Sample(
            **dict(prompt),
            sample_index=0,
            completion=[{"role": "assistant", "content": " ".join([prompt.prompt[-1].content] * times)}],
            finish_reason="stop",
        )
        for prompt in prompts
    ]


def estimate(rows: RowFlow, config: EchoConfig) -> StepCost:
    after = RowFlow(rows.rows, 1, rows.prompt_tokens, config.times * rows.prompt_tokens, texts=1)
    return StepCost(rows.rows, rows.rows, TokenCounts(new_tokens=rows.rows * after.reply_tokens), after)


def run(config: EchoConfig) -> dict[str, Any]:
    reader, inputs = config.row_reader(), {"prompts": hash_input(config.input)}

    def units() -> WorkItems[Prompt]:
        for line, row in reader.prompts(config.input, None, config.limit):
            yield WorkItem(row.id, line, row)

    return StageRun(
        provenance=provenance("echo", inputs=inputs, settings=config.settings()),
        inputs=inputs,
        output=config.output,
        overwrite=config.overwrite,
        reader=reader,
        items=units,
        work=lambda prompts: echo(prompts, config.times),
        batch_size=8,
    ).run(as_json=config.as_json)


STAGE = Stage("echo", Phase.SUPERVISED, EchoConfig, run, estimate, reads=(Prompt,), writes=Sample)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "STAGES", registry.by_name([*registry.STAGES.values(), STAGE]))


def test_a_registered_stage_is_a_command_with_help_and_in_the_docs(cai: Cai) -> None:
    listed = cai("--help").stdout
    assert "  echo             Answer each prompt with the prompt." in listed.splitlines()
    assert "--times <int range>" in cai("echo", "--help").stdout
    assert "## `cai echo`" in render()


def test_it_runs_records_its_settings_and_reads_old_names(cai: Cai, tmp_path: Path) -> None:
    write_rows(tmp_path / "p.jsonl", [{"id": "a", "prompt": "hello"}])
    assert cai("echo", "p.jsonl", "-o", "out.jsonl", "--repeat", "2", "--note", "first").code == 0
    assert rows_in(tmp_path / "out.jsonl")[0]["completion"][0]["content"] == "hello hello"
    assert "already finished" in cai("echo", "p.jsonl", "-o", "out.jsonl", "--repeat=2", "--note", "second").stderr
    assert cai("echo", "p.jsonl", "-o", "out.jsonl", "--times", "3").error == "other-run"
    assert cai("echo", "p.jsonl", "-o", "new.jsonl", "--times", "0").code == 2


def test_it_is_planned_estimated_and_checked_in_a_run_file(cai: Cai, tmp_path: Path) -> None:
    write_rows(tmp_path / "p.jsonl", [{"id": "a", "prompt": "x" * 40}])
    file = tmp_path / "run.yaml"
    file.write_text("name: r\nsteps:\n  echoed: {command: echo, input: p.jsonl, repeat: 2}\n")
    planned = cai("run", "run.yaml", "--dry-run")
    assert planned.code == 0, planned.stderr
    assert "cai echo p.jsonl -o runs/r/echoed.jsonl --times 2" in planned.stdout
    file.write_text("name: r\nsteps:\n  echoed: {command: echo, input: p.jsonl, times: 0}\n")
    assert cai("run", "run.yaml", "--dry-run").error == "invalid-option"
    file.write_text("name: r\nsteps:\n  echoed: {command: echo, input: p.jsonl, model: m}\n")
    assert cai("run", "run.yaml", "--dry-run").error == "unknown-option"
