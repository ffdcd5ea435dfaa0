"""The license and the public name of the model that training starts from."""

from pathlib import Path

import pytest

from cai_cli.models.source import ModelSource


@pytest.mark.parametrize(
    ("files", "license"),
    [
        ({}, None),
        ({"README.md": "---\nlicense: Apache-2.0\n---\ntext"}, "apache-2.0"),
        ({"README.md": "license: mit\n"}, None),
        ({"README.md": "---\nlicense: [mit]\n---\n"}, None),
        ({"README.md": "---\nlicense: *x\n---\n"}, None),
        ({"source.json": '{"license": "MIT"}', "README.md": "---\nlicense: other\n---\n"}, "mit"),
        ({"source.json": "{"}, None),
    ],
)
def test_the_license_is_the_stated_one_or_none(files: dict[str, str], license: str | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert ModelSource("x", tmp_path, "f").license == license


def test_the_public_name_of_a_directory_has_no_folders(tmp_path: Path) -> None:
    (tmp_path / "private/model").mkdir(parents=True)
    assert ModelSource(str(tmp_path / "private/model"), tmp_path, "f").public_name == "model"
    assert ModelSource("org/name", tmp_path, "f").public_name == "org/name"
