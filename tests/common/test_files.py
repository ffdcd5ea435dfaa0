"""A file that is replaced holds the old content or the new one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cai_cli.common.errors import CaiError
from cai_cli.common.files import write_atomically


def test_the_new_content_replaces_the_old_and_no_temporary_file_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old and longer")
    write_atomically(path, iter([b"new", b" content"]))
    assert path.read_bytes() == b"new content"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interruption_leaves_the_old_content(tmp_path: Path) -> None:
    def blocks() -> Iterator[bytes]:
        yield b"new"
        raise KeyboardInterrupt

    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, blocks())
    assert path.read_bytes() == b"old"


def test_a_missing_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CaiError) as error:
        write_atomically(tmp_path / "none/a", [b"new"])
    assert error.value.code == "cannot-write"
