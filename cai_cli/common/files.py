"""Files that are replaced whole: a reader, or the next run after a kill, finds the old content or the new one."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from cai_cli.common.errors import CaiError

_FILE_NAME = re.compile(r"\.(?:txt|md|yaml|yml|json|jsonl)$", re.IGNORECASE)


def text_or_file(given: str) -> str:
    """The content of the file that `given` names, without the line break at its end, or `given` where it is a text.

    Raises:
        CaiError: The file cannot be read or is not UTF-8, or `given` looks like the name of a file that does not exist
            (`cannot-read`).
    """
    if not os.path.isfile(given):
        if len(given.split()) == 1 and ("/" in given or _FILE_NAME.search(given)):
            raise CaiError(f"cannot read {given}: no such file", hint="a text has several words", code="cannot-read")
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
        raise CaiError(
            f"cannot write {path}: {error.strerror}", hint="free disk space or choose another path", code="cannot-write"
        ) from error
