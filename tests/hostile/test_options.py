"""Odd values, old names and failures with `--json`, on the command line and in run files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Cai

MODEL = ("--model", "scripted:script.jsonl")
RUN = "name: r\nmodel: scripted:script.jsonl\nsteps:\n  a: {{command: {}}}\n"


@pytest.fixture(autouse=True)
def files(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("hello\n")
    (tmp_path / "script.jsonl").write_text('{"replies": ["hi"], "scores": [-1.0, -2.0]}\n')


def test_an_old_flag_is_renamed_only_where_it_is_a_flag(cai: Cai, tmp_path: Path) -> None:
    assert cai("sample", "p.txt", *MODEL, "-o", "--skip-bad").code == 0
    assert (tmp_path / "--skip-bad").exists()
    assert cai("sample", *MODEL, "-o", "x.jsonl", "--", "--skip-bad").code == 0
    for spelling in (["--prompt-form=raw"], ["--prompt-form", "raw"]):
        assert cai("sample", "p.txt", *MODEL, "-o", "y.jsonl", *spelling).code == 0
    manifest = json.loads((tmp_path / "y.jsonl.manifest.json").read_text())
    assert manifest["provenance"]["settings"]["prompt_format"] == "raw"


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--temperature", "inf"], "invalid-option"),
        (["--temperature", "1e400"], "invalid-option"),
        (["--price-in", "inf"], "invalid-option"),
        (["--limit", "9" * 30], "invalid-option"),
        (["-n", "9" * 30], "invalid-option"),
    ],
)
def test_infinite_and_huge_numbers_are_refused(words: list[str], code: str, cai: Cai) -> None:
    done = cai("sample", "p.txt", *MODEL, *words)
    assert (done.code, done.error, done.stdout) == (2, code, "")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["sample", "p.txt", "--no-such"], "unknown-option"),
        (["sample", "p.txt", "-n", "x"], "invalid-option"),
        (["sample", "p.txt", "-n", "0"], "invalid-option"),
        (["sample"], "missing-option"),
        (["no-such"], "usage"),
        (["eval", "compare"], "missing-option"),
        (["run", "none.yaml"], "cannot-read"),
    ],
)
def test_json_prints_one_object_for_an_error_of_the_command_line(words: list[str], code: str, cai: Cai) -> None:
    done = cai(*words, "--json")
    assert done.code in (1, 2)
    assert json.loads(done.stdout)["error"]["code"] == code


def test_json_prints_one_object_for_a_bug_and_for_a_failing_system_call(
    cai: Cai, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cai_cli.engines.scripted import ScriptedEngine

    for error, code in ((RuntimeError("oops"), "bug"), (OSError(28, "No space left on device"), "failed")):

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(ScriptedEngine, "generate", fail)
        monkeypatch.setattr("cai_cli.cli.app._abandon_stdout", lambda: None)
        done = cai("sample", "p.txt", *MODEL, "-o", "o.jsonl", "--json")
        assert done.code == 1
        assert json.loads(done.stdout)["error"]["code"] == code


def test_an_invalid_option_leaves_stdout_to_the_rows(cai: Cai) -> None:
    done = cai("label-prefs", "p.txt", *MODEL, "--clamp", "2", "--json")
    assert (done.code, done.stdout) == (2, "")
    assert json.loads(done.stderr.splitlines()[-1])["error"]["code"] == "invalid-option"


@pytest.mark.parametrize(
    ("step", "code"),
    [
        ("sample, input: p.txt, prompt-form: raw, prompt-format: chat", "option-conflict"),
        ("sample, input: p.txt, skip-invalid: true, skip-bad: false", "option-conflict"),
        ("sample, input: p.txt, temperature: .inf", "invalid-option"),
        (f"sample, input: p.txt, limit: {'9' * 30}", "invalid-option"),
        ("sample, input: ''", "missing-option"),
        ("eval compare, input: [], judge: 'scripted:script.jsonl'", "missing-option"),
        ("label-prefs, input: p.txt, method: cot, clamp: [0.4, 0.6]", "invalid-option"),
    ],
)
def test_a_step_that_cannot_run_is_refused_by_name_before_the_run(
    step: str, code: str, cai: Cai, tmp_path: Path
) -> None:
    (tmp_path / "r.yaml").write_text(RUN.format(step))
    for words in (["--dry-run"], []):
        done = cai("run", "r.yaml", *words)
        assert (done.code, done.error) == (2, code)
        assert "step 'a" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_null_in_a_run_file_leaves_an_option_at_its_default(cai: Cai, tmp_path: Path) -> None:
    step = "sample, input: p.txt, n: null, temperature: null, skip-bad: null, seed: null, limit: null"
    (tmp_path / "r.yaml").write_text(RUN.format(step))
    assert cai("run", "r.yaml", "--dry-run").code == 0
    assert cai("run", "r.yaml").code == 0
    settings = json.loads((tmp_path / "runs/r/a.jsonl.manifest.json").read_text())["provenance"]["settings"]
    assert (settings["n"], settings["temperature"], settings["seed"]) == (1, 1.0, 0)


def test_stderr_is_a_stream_where_it_was_redirected_to_a_file(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        words = ["sample", "p.txt", *MODEL, "-o", "/dev/stderr", "--quiet"]
        subprocess.run([sys.executable, "-m", "cai_cli", *words], cwd=tmp_path, stderr=log, check=True)
    assert json.loads((tmp_path / "log").read_text())["completion"][0]["content"] == "hi"
