"""YAML is read as plain data, of limited size, without aliases or repeated keys."""

from pathlib import Path

import pytest

from cai_cli.common.errors import CaiError
from cai_cli.common.yaml import MAX_YAML, load_yaml, parse_yaml


def test_plain_data_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: [1, two, null]\nb: {c: 0.5}\n")
    assert load_yaml(tmp_path / "a.yaml") == {"a": [1, "two", None], "b": {"c": 0.5}}


@pytest.mark.parametrize(
    "text",
    [
        "a: &x [1]\nb: *x",
        "a: 1\na: 2",
        "a: {b: 1, b: 2}",
        "!!python/name:os.system",
        "a: 2020-13-45",
        "[" * 5000,
        "a: [1",
    ],
)
def test_other_documents_are_invalid_and_the_file_is_named(text: str) -> None:
    with pytest.raises(CaiError) as error:
        parse_yaml(text, "x.yaml")
    assert error.value.code == "invalid-yaml"
    assert error.value.message.startswith("x.yaml: ")


def test_a_file_of_exactly_the_limit_is_read_and_a_longer_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "long.yaml"
    path.write_text("# " + "é" * (MAX_YAML - 2))
    assert load_yaml(path) is None
    path.write_text("# " + "é" * (MAX_YAML - 1))
    with pytest.raises(CaiError) as error:
        load_yaml(path)
    assert error.value.code == "invalid-yaml"


@pytest.mark.parametrize("content", [None, b"a: \xff"])
def test_a_missing_file_and_one_that_is_not_utf8_cannot_be_read(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(CaiError) as error:
        load_yaml(tmp_path / "a.yaml")
    assert error.value.code == "cannot-read"
