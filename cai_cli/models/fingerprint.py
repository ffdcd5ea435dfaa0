"""The content hash of a model directory."""

import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from hashlib import file_digest, sha256
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from cai_cli.common.errors import CaiError
from cai_cli.models.fetch import cache_dir, check_model_dir
from cai_cli.models.reading import RECORD

# The files that determine a model's answers. Cards, licenses and trainer states do not.
FINGERPRINTED = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.*",
    "additional_chat_templates/*",
    "additional_chat_templates/*.jinja",
    RECORD,  # where the score of a preference model is read
)


def fingerprint(path: Path) -> str:
    """The SHA-256 (hex) of the names and contents of a model's config, tokenizer, chat template and weights.

    The digests of single files are cached by (real path, size, mtime, inode), so that a second call reads no weights.

    Raises:
        CaiError: `path` is not a model directory (`invalid-model`), or a file cannot be read (`cannot-read`).
    """
    check_model_dir(path)
    return files_digest(path, FINGERPRINTED)


def weights_digest(path: Path) -> str:
    """The SHA-256 (hex) of a model's weights alone, which another version of transformers writes alike.

    Raises:
        CaiError: As for `files_digest`.
    """
    return files_digest(path, ("*.safetensors", "*.safetensors.index.json"))


def files_digest(path: Path, patterns: Iterable[str]) -> str:
    """The SHA-256 (hex) of the names and contents of the files in a directory that match one of the patterns.

    Raises:
        CaiError: A file cannot be read (`cannot-read`).
    """
    digests = _Digests(cache_dir() / "digests.json")
    whole = sha256()
    found = {file for pattern in patterns for file in path.glob(pattern)}
    if gone := sorted(file for file in found if not file.exists()):
        raise CaiError(
            f"{gone[0]} links to a file that does not exist",
            hint="download the model again",
            code="cannot-read",
        )
    files = sorted(file for file in found if file.is_file())
    try:
        with ThreadPoolExecutor() as threads:  # one alone hashes about 1 GB a second, less than a disk reads
            for file, digest in zip(files, threads.map(digests.of, files), strict=True):
                whole.update(f"{file.relative_to(path).as_posix()}\0{digest}\n".encode())
    except OSError as error:
        raise CaiError(f"{path}: cannot be read: {error}", code="cannot-read") from error
    digests.save()
    return whole.hexdigest()


class _Digests:
    """The SHA-256 of files, cached in one JSON file: real path -> [size, mtime_ns, inode, sha256]."""

    # A file written this recently can change again within one clock tick, which its mtime would not show.
    SETTLED_S = 2.0

    def __init__(self, store: Path) -> None:
        self.store = store
        self.new: dict[str, list[int | str]] = {}
        self.known = self._read()

    def _read(self) -> dict[str, Any]:
        try:
            known = json.loads(self.store.read_bytes())
        except (OSError, ValueError):  # missing or damaged: all digests can be computed again
            return {}
        return known if isinstance(known, dict) else {}

    def of(self, file: Path) -> str:
        """The digest of a file, computed if it is not cached. Raises OSError."""
        real = os.path.realpath(file)
        with open(real, "rb") as content:
            stat = os.fstat(content.fileno())
            key: list[int | str] = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
            known = self.known.get(real)
            if isinstance(known, list) and known[:-1] == key and isinstance(known[-1], str):
                return known[-1]
            digest = file_digest(content, "sha256").hexdigest()
            after = os.fstat(content.fileno())
        unchanged = key == [after.st_size, after.st_mtime_ns, after.st_ino]
        if unchanged and time.time() - stat.st_mtime > self.SETTLED_S:
            self.new[real] = [*key, digest]
        return digest

    def save(self) -> None:
        """Add the new digests to the file. Two writers at once may lose an entry, but never damage the file."""
        if not self.new:
            return
        text = json.dumps(self._read() | self.new, indent=0)
        try:
            self.store.parent.mkdir(parents=True, exist_ok=True)
            with NamedTemporaryFile("w", dir=self.store.parent, prefix="digests.", delete=False) as file:
                file.write(text)
            os.replace(file.name, self.store)
        except OSError:
            pass  # a read-only or full cache only makes the next call slower
