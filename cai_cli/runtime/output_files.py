"""The files of an output: their names, the lock, checks before writing, and publishing the complete output.

Shared by the data stages and the training stages.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import orjson
from filelock import FileLock, Timeout

from cai_cli.common import console
from cai_cli.common.errors import CaiError, UsageError
from cai_cli.common.files import write_atomically, write_error
from cai_cli.data.jsonl import sync_directory
from cai_cli.data.schema import reason_kind
from cai_cli.models.template_date import reuse_template_date
from cai_cli.runtime.manifest import InputFile, differences, read_manifest, template_dates, unfinished_differences

STDOUT = frozenset({"-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"})


def is_stdout(output: str) -> bool:
    """Whether an `--output` is stdout."""
    return output in STDOUT


def is_stream(output: str) -> bool:
    """Whether an `--output` is stdout, a character device such as /dev/null, or a named pipe. These have no sidecars,
    and cannot be read again or resumed."""
    if is_stdout(output) or output == "/dev/stderr" or output.startswith(("/dev/fd/", "/proc/self/fd/")):
        return True  # also where the shell redirected it to a file
    return Path(output).is_char_device() or Path(output).is_fifo()


def sidecar(path: Path, ending: str) -> Path:
    """`OUT.ending`, beside OUT. Raises UsageError where OUT cannot be the name of a file (`.`, `/`)."""
    if not path.name:
        raise UsageError(f"{path} is not the name of a file", hint="-o FILE", code="invalid-option")
    return path.with_name(f"{path.name}.{ending}")


@contextmanager
def one_writer(path: Path, name: str | None = None) -> Iterator[None]:
    """Hold `OUT.lock` while writing OUT. A second writer is refused at once; a killed writer releases the lock.

    An interrupted writer (Ctrl-C, SIGTERM) says that the same command completes OUT, or what `name` says.

    Raises:
        CaiError: `output-locked` or `cannot-write`.
    """
    lock = FileLock(sidecar(path, "lock"), timeout=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Path(lock.lock_file).touch()  # FileLock would wait forever in a directory where no file can be created
        lock.acquire()
    except Timeout:
        raise CaiError(
            f"another cai is writing {path}", hint="wait for it, or choose another output", code="output-locked"
        ) from None
    except OSError as error:
        raise write_error(path, error, hint="choose another -o") from error
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        with suppress(OSError):  # a terminal that is gone must not change the exit code
            console.say(f"interrupted: run the same command again to complete {name or path}")
        raise
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def wait_for_writer(path: Path, seconds: float) -> None:
    """Wait until no process writes OUT, or for that long: the process of a lost node may still write for a while."""
    lock = FileLock(sidecar(path, "lock"))
    if path.parent.exists():
        with suppress(Timeout), lock.acquire(timeout=seconds):
            Path(lock.lock_file).unlink(missing_ok=True)


def refuse_input_as_output(path: Path, inputs: Mapping[str, InputFile]) -> None:
    """Raises CaiError `input-is-output` when the output is one of the inputs, by any name or link."""
    for file in inputs.values():
        if file.name != "-" and path.exists() and Path(file.name).exists() and path.samefile(file.name):
            raise CaiError(f"{path} is both input and output", hint="choose another -o", code="input-is-output")


def refuse_other_run(path: Path, recorded: dict[str, Any], current: dict[str, Any]) -> None:
    """Raises CaiError `other-run`, which names each difference, when another run than the current one made `path`."""
    _refuse(path, differences(recorded, current))


def refuse_to_resume_other_run(path: Path, recorded: dict[str, Any], current: dict[str, Any]) -> None:
    """The same for an unfinished output. A version whose stage writes other rows must not resume it."""
    _refuse(path, unfinished_differences(recorded, current))


def _refuse(path: Path, changed: list[str]) -> None:
    if changed:
        raise CaiError(
            f"{path} was made by another run: {'; '.join(changed)}",
            hint="--overwrite starts from scratch; or choose another -o",
            code="other-run",
        )


def finished_summary(path: Path, provenance: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The summary of an output that is already finished, or None when there is work to do.

    Raises:
        CaiError: `other-run` or `not-made-by-cai`, when it was made by another run, or by something other than cai.
    """
    if overwrite or not path.exists():
        return None
    manifest = read_manifest(sidecar(path, "manifest.json"))
    if manifest is None:
        raise CaiError(
            f"{path} exists, but has no manifest, so it was not made by cai",
            hint="--overwrite replaces it; or choose another -o",
            code="not-made-by-cai",
        )
    refuse_other_run(path, manifest["provenance"], provenance)
    console.say(f"{path} is already finished; nothing to do (--overwrite creates it again)")
    return {
        "stage": provenance["stage"],
        "status": "already finished",
        "output": str(path),
        **manifest["counts"],
        **{name: value for name, value in manifest.items() if name == "reply_ends"},
        "seconds": manifest["run"]["seconds"],
    }


def resumed_provenance(output: str, provenance: dict[str, Any], overwrite: bool) -> dict[str, Any]:
    """The provenance that an unfinished run of `output` recorded, if this run resumes it; else `provenance`.

    The two may differ in names and version (`common.legacy`), which matters where rows are derived from a hash of the
    provenance.
    """
    if overwrite or is_stream(output):
        return provenance
    recorded = (read_manifest(sidecar(Path(output), "partial.manifest.json")) or {}).get("provenance")
    return recorded if recorded and not unfinished_differences(recorded, provenance) else provenance


def reuse_recorded_date(output: str) -> None:
    """Let chat templates write the date that an earlier run of `output` recorded, finished or not."""
    if is_stream(output) or not Path(output).name:
        return
    for ending in ("partial.manifest.json", "manifest.json"):
        manifest: dict[str, Any] = {}
        with suppress(CaiError):  # a damaged manifest is reported where it is needed
            manifest = read_manifest(sidecar(Path(output), ending)) or {}
        if days := template_dates(manifest.get("provenance", {})):
            reuse_template_date(min(days.values()))
            return


def rejected_reasons(path: Path) -> Counter[str]:
    """How many rows of a rejected file have each kind of reason; empty where there is no file."""
    if not path.exists():
        return Counter()
    with path.open("rb") as file:
        return Counter(reason_kind(orjson.loads(line)["reason"]) for line in file)


def set_aside(path: Path) -> None:
    """Rename a finished output and its sidecars to `OUT.old` until its replacement is complete."""
    if not path.exists():
        return
    for file in reversed(_finished_files(path)):  # OUT last: as long as it exists, a killed run repeats this
        if file.exists():
            os.replace(file, sidecar(file, "old"))
    console.say(f"{path} is kept as {sidecar(path, 'old')} until the new one is complete")


def _finished_files(path: Path) -> tuple[Path, Path, Path]:
    return path, sidecar(path, "manifest.json"), sidecar(path, "rejected.jsonl")


def publish(path: Path) -> None:
    """Rename a data output whose draft manifest is finished to OUT, compressed if its name ends with .zst, and then
    its manifest. After a kill between any two steps the next run completes them."""
    draft, partial = sidecar(path, "partial.manifest.json"), sidecar(path, "partial")
    manifest = read_manifest(draft)
    if manifest is None or manifest["status"] != "finished":
        return
    if partial.exists():
        if path.suffix == ".zst":
            write_atomically(path, _compressed(partial))
            partial.unlink()
        else:
            os.replace(partial, path)
    if manifest["provenance"]["settings"].get("shard") is None:
        sidecar(path, "units.jsonl").unlink(missing_ok=True)
    os.replace(draft, sidecar(path, "manifest.json"))
    for file in _finished_files(path):
        sidecar(file, "old").unlink(missing_ok=True)
    sync_directory(path.parent)


def _compressed(plain: Path) -> Iterator[bytes]:
    import zstandard

    with plain.open("rb") as source:
        yield from zstandard.ZstdCompressor(write_checksum=True).read_to_iter(source, read_size=1 << 20)
