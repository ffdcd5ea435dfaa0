"""Files that are replaced whole: a reader, or the next run after a kill, finds the old content or the new one."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from cai_cli.common.errors import CaiError

_FILE_NAME = re.compile(r"\S+\.(txt|md|json|ya?ml)", re.IGNORECASE)


def text_or_file(given: str) -> str:
    """The content of the file that `given` names, without the line break at its end, or `given` where there is none.

    Raises:
        CaiError: The file cannot be read or is not UTF-8, or `given` can only be meant as a file, such as `kind.txt`,
            and there is none (`cannot-read`).
    """
    if not os.path.isfile(given):
        if _FILE_NAME.fullmatch(given) or (os.sep in given and os.path.isdir(given)):
            raise CaiError(f"cannot read {given}: not a file", code="cannot-read")
        return given
    try:
        return Path(given).read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CaiError(f"cannot read {given}: {error}", code="cannot-read") from error


def write_atomically(path: Path, blocks: Iterable[bytes]) -> None:
    """Replace the content of `path` by `blocks`, written to `PATH.tmp` and synced to disk before the rename.

    Args:
        path: The file, which may not exist yet. Its directory must exist.
        blocks: The new content in order, in pieces of any size.

    Raises:
        CaiError: `cannot-write`, when the disk is full or the directory is not writable. `path` is unchanged.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.writelines(blocks)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise write_error(path, error, hint="free disk space or choose another path") from error


def write_error(path: Path | str, error: OSError, hint: str | None = None) -> CaiError:
    """The error `cannot-write` of a file or directory."""
    return CaiError(f"cannot write {path}: {error.strerror or error}", hint, code="cannot-write")
