"""Run files: settings become a command line, and files that cannot be run are refused."""

from pathlib import Path
from typing import Any

import pytest
import typer
from pipeline_cases import planned

from cai_cli.cli.app import build_app
from cai_cli.common.errors import CaiError
from cai_cli.pipeline.registry import STAGES
from cai_cli.pipeline.run_file import load_run


def test_settings_become_the_command_line_and_shared_ones_fill_in(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    head = "name: n\nmodel: m\nseed: 7\n"
    (first, second, third) = planned(
        folder,
        "  a: {command: sample, input: prompts.jsonl, n: 2, seed: 1, kind: null}\n"
        '  b: {command: critique-revise, input: "@a", critique: false, few-shot: none, constitution: pipeline.yaml}\n'
        '  c: {command: sft, input: "@b", helpful: helpful.txt, lora: false}\n',
        head,
    )
    name = folder.name
    assert first.shell == f"cai sample {name}/prompts.jsonl -o out/a.jsonl --n 2 --seed 1 --model m"
    assert second.shell == (
        f"cai critique-revise out/a.jsonl -o out/b.jsonl --no-critique --few-shot none --constitution {name}/pipeline.yaml"
        " --model m --seed 7"
    )
    assert third.shell == f"cai sft out/b.jsonl -o out/c --helpful {name}/helpful.txt --full --model m --seed 7"
    assert (second.needs, third.needs) == ([first], [second])
    assert set(second.files) == {"constitution"}


def test_a_dataset_on_the_hub_is_not_a_relative_path(folder: Path) -> None:
    (step,) = planned(folder, "  a: {command: sample, input: 'hf://datasets/owner/name'}\n")
    assert step.settings["input"] == "hf://datasets/owner/name"


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ("  a: {command: smaple, input: x}\n", "step 'a': unknown command 'smaple'"),
        ("  a: {input: x}\n", "step 'a': unknown command None"),
        ("  a: {command: sample}\n", "step 'a': `input` is missing"),
        ("  a: {command: sample, input: prompts.jsonl, tempreture: 1}\n", "`cai sample` has no option 'tempreture'"),
        ("  a: {command: sample, input: prompts.jsonl, output: x}\n", "has no option 'output'"),
        ("  a: {command: sample, input: prompts.jsonl, overwrite: true}\n", "has no option 'overwrite'"),
        ("  a: {command: sample, input: '@b'}\n  b: {command: sample, input: prompts.jsonl}\n", "no earlier step 'b'"),
        ("  a: {command: sample, input: '@a'}\n", "no earlier step 'a'"),
        (
            "  a: {command: sft, input: prompts.jsonl}\n  b: {command: sample, input: prompts.jsonl, model: 'm+@a'}\n",
            "step 'b': model: 'm+@a': a step is referred to by the whole value",
        ),
        ("  a: {command: sample, input: prompts.jsonl, template-arg: [3]}\n", "step 'a': --template-arg 3: not NAME"),
        ("  a: {command: train-pm, input: prompts.jsonl, keep-adapter: true}\n", "or --fit-head with --epochs 0"),
        ("  a: {command: sample, input: none.jsonl}\n", "step 'a': cannot read"),
        ("  a: {command: sample, input: prompts.jsonl, base-url: 'ftp://x'}\n", "step 'a': --base-url must be http"),
        ("  a: {command: sample, input: prompts.jsonl, n: [1, 1]}\n", "step 'a': n: a list needs one or more distinct"),
        ("  a: {command: score, input: prompts.jsonl, pm-url: 'http://x/classify'}\n", "step 'a': pm is missing: Pref"),
        ("  a: {command: sample, input: prompts.jsonl, n: banana}\n", "step 'a': n: must be a valid integer"),
        ("  a: {command: sample, input: prompts.jsonl, n: 0}\n", "step 'a': n: must be greater than or equal"),
        (
            "  a: {command: sample, input: prompts.jsonl, skip-invalid: 7}\n",
            "skip-invalid: must be true or false, not 7",
        ),
        ("  ../a: {command: sample, input: prompts.jsonl}\n", "../a"),
        (
            "  a: {command: sample, input: prompts.jsonl}\n  a: {command: sample, input: prompts.jsonl}\n",
            "'a' occurs twice",
        ),
        ("  a: &x {command: sample, input: prompts.jsonl}\n  b: *x\n", "aliases are not allowed"),
        ("  a: {command: sample, input: [[x]]}\n", "steps.a.input"),
        ("  {}\n", "steps"),
    ],
)
def test_a_file_that_cannot_be_run_is_refused_before_anything_runs(steps: str, reason: str, folder: Path) -> None:
    with pytest.raises(CaiError) as error:
        planned(folder, steps)
    assert reason in error.value.message
    assert error.value.message.startswith(str(folder / "run.yaml"))
    assert "\n" not in error.value.message


@pytest.mark.parametrize(("word", "value"), [("off", "off"), ("on", "on"), ("'off'", "off"), ("auto", "auto")])
def test_words_that_yaml_reads_as_truth_values_are_values_of_an_option_that_has_them(
    word: str, value: str, folder: Path
) -> None:
    (step,) = planned(folder, f"  a: {{command: sample, input: prompts.jsonl, thinking: {word}}}\n")
    assert step.settings["thinking"] == value


@pytest.mark.parametrize("content", ["", "[]", "3", "text"])
def test_a_file_without_fields_is_not_a_run_file(content: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(CaiError, match="not a run file") as error:
        load_run(tmp_path / "run.yaml")
    assert error.value.code == "invalid-run-file"


@pytest.mark.parametrize("head", ["name: n\nmore: 1\n", "name: ../n\n", "", "name: n\nseed: x\n"])
def test_an_invalid_head_is_refused(head: str, folder: Path) -> None:
    with pytest.raises(CaiError) as error:
        planned(folder, "  a: {command: sample, input: prompts.jsonl}\n", head)
    assert error.value.code == "invalid-run-file"
    assert error.value.message.startswith(str(folder / "run.yaml"))


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_an_option_has_one_name_in_the_shell_and_in_a_run_file(stage: str) -> None:
    names, options = STAGES[stage].config.option_names(), STAGES[stage].config.options()
    command: Any = typer.main.get_command(build_app())
    for word in stage.split():
        command = command.commands[word]
    flags = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    for name, field in names.items():
        _, declared = options[field]
        assert declared.argument or name in declared.aliases or f"--{name}" in flags, name


def test_settings_of_the_command_line_replace_those_of_the_file(folder: Path) -> None:
    path = folder / "run.yaml"
    path.write_text(
        "name: n\nsteps:\n  a: {command: sample, input: prompts.jsonl}\n  r:\n    repeat: 2\n    steps:\n"
        '      b: {command: sft, input: "@a", model: "@b@last"}\n'
    )
    run = load_run(path, ["model=m", "a.n=3", "r.repeat=3", "*.limit=2", "b.lora=true", "a.template-arg=[x=1, y=2]"])
    assert run.model == "m"
    assert run.steps["a"] == {
        "command": "sample", "input": "prompts.jsonl", "n": 3, "limit": 2, "template-arg": ["x=1", "y=2"]
    }  # fmt: skip
    block = run.blocks["r"]
    assert (block.repeat, block.steps["b"]["lora"], block.steps["b"]["limit"]) == (3, True, 2)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ("c.n=1", "unknown-step"),
        ("*.tempreture=1", "unknown-option"),
        ("limit=1", "invalid-option"),
        ("a.n", "invalid-option"),
        (".n=1", "invalid-option"),
        ("a.n=[", "invalid-yaml"),
        ("name=../x", "invalid-run-file"),
    ],
)
def test_a_setting_of_the_command_line_that_changes_nothing_is_refused(folder: Path, change: str, code: str) -> None:
    path = folder / "run.yaml"
    path.write_text("name: n\nsteps:\n  a: {command: sample, input: prompts.jsonl}\n")
    with pytest.raises(CaiError) as error:
        load_run(path, [change])
    assert error.value.code == code
