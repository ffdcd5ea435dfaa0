"""The files of an output: names beside it, one writer at a time, refusals, and how it appears whole.

Shared by the data stages and the training stages.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
from filelock import FileLock, Timeout

from cai_cli.common import console
from cai_cli.common.errors import CaiError, UsageError
from cai_cli.data.jsonl import sync_directory
from cai_cli.data.schema import reason_kind
from cai_cli.runtime.manifest import InputFile, differences, read_manifest


def sidecar(path: Path, ending: str) -> Path:
    """`OUT.ending`, beside OUT. Raises UsageError where OUT is no name of a file (`.`, `/`)."""
    if not path.name:
        raise UsageError(f"{path} names no output", hint="-o FILE")
    return path.with_name(f"{path.name}.{ending}")


@contextmanager
def one_writer(path: Path) -> Iterator[None]:
    """Hold `OUT.lock` while writing OUT; a second writer is refused at once, a killed holder frees it.

    Raises CaiError.
    """
    lock = FileLock(sidecar(path, "lock"), timeout=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Path(lock.lock_file).touch()  # where no file can be made, FileLock would wait for one
        lock.acquire()
    except Timeout:
        raise CaiError(f"another cai is writing {path}", hint="wait for it, or choose another output") from None
    except OSError as error:
        raise CaiError(f"cannot write {path}: {error.strerror}", hint="choose another -o") from error
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def refuse_input_as_output(path: Path, inputs: Mapping[str, InputFile]) -> None:
    """Raises CaiError when the output is one of the inputs, by whatever name or link."""
    for file in inputs.values():
        if file.name != "-" and path.exists() and Path(file.name).exists() and path.samefile(file.name):
            raise CaiError(f"{path} is both input and output", hint="choose another -o")


def refuse_other_run(path: Path, recorded: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises CaiError naming each difference when `path` was made by another run than the one wanted."""
    if changed := differences(recorded, wanted):
        raise CaiError(
            f"{path} was made by another run: {'; '.join(changed)}",
            hint="--overwrite starts afresh; or choose another -o",
        )


def finished_summary(path: Path, provenance: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The summary of an output that is already whole, or None when there is work to do.

    Raises CaiError when it was made by another run, or by something other than cai.
    """
    if overwrite or not path.exists():
        return None
    manifest = read_manifest(sidecar(path, "manifest.json"))
    if manifest is None:
        raise CaiError(
            f"{path} is there, but no manifest says that cai made it",
            hint="--overwrite replaces it; or choose another -o",
        )
    refuse_other_run(path, manifest["provenance"], provenance)
    console.say(f"{path} is already finished; nothing to do (--overwrite makes it anew)")
    return {
        "stage": provenance["stage"],
        "status": "already finished",
        "output": str(path),
        **manifest["counts"],
        "seconds": manifest["run"]["seconds"],
    }


def rejected_reasons(path: Path) -> Counter[str]:
    """Reason -> how many, of a rejected file (empty where there is none)."""
    if not path.exists():
        return Counter()
    with path.open("rb") as file:
        return Counter(reason_kind(orjson.loads(line)["reason"]) for line in file)


def set_aside(path: Path) -> None:
    """Keep a finished output as `OUT.old` with its sidecars while another is made in its place."""
    if not path.exists():
        return
    for file in reversed(_finished_files(path)):  # OUT last: as long as it stands, a killed run has this still to do
        if file.exists():
            os.replace(file, sidecar(file, "old"))
    console.say(f"{path} is kept as {sidecar(path, 'old')} until the new one is whole")


def _finished_files(path: Path) -> tuple[Path, Path, Path]:
    return path, sidecar(path, "manifest.json"), sidecar(path, "rejected.jsonl")


def publish(path: Path) -> None:
    """Make a data output whose draft manifest says that it is finished appear as OUT: compressed where it is named
    .zst, its manifest last. Killed between any two steps, the next run does the rest."""
    draft, partial = sidecar(path, "partial.manifest.json"), sidecar(path, "partial")
    manifest = read_manifest(draft)
    if manifest is None or manifest["status"] != "finished":
        return
    if partial.exists():
        if path.suffix == ".zst":
            _compress(partial, path)
            partial.unlink()
        else:
            os.replace(partial, path)
    if manifest["provenance"]["settings"].get("shard") is None:
        sidecar(path, "units.jsonl").unlink(missing_ok=True)
    os.replace(draft, sidecar(path, "manifest.json"))
    for file in _finished_files(path):
        sidecar(file, "old").unlink(missing_ok=True)
    sync_directory(path.parent)


def _compress(plain: Path, path: Path) -> None:
    import zstandard

    temporary = sidecar(path, "tmp")
    try:
        with plain.open("rb") as source, temporary.open("wb") as target:
            zstandard.ZstdCompressor(write_checksum=True).copy_stream(source, target, read_size=1 << 20)
            target.flush()
            os.fsync(target.fileno())
    except OSError as error:
        raise CaiError(f"cannot write {temporary}: {error.strerror}", hint="run again to go on") from error
    os.replace(temporary, path)
