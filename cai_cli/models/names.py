"""Resolves model names: a local directory, an alias (`ALIASES`), a Hub name `org/name`, or a model and an adapter,
`BASE+ADAPTER`."""

import re
from pathlib import Path

from cai_cli.common.errors import CaiError
from cai_cli.models.adapter_dirs import merged_model
from cai_cli.models.aliases import ALIASES, cached_alias, fetch_alias
from cai_cli.models.fetch import ADAPTER_CONFIG, check_model_dir, hub_snapshot

ENGINES = ("openai", "vllm", "local", "scripted")  # before a colon, in the names that `open_engine` takes
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def resolve(name: str) -> Path:
    """The directory of a model, which is fetched first if necessary.

    Raises:
        CaiError: There is no such model (`unknown-model`), it cannot be downloaded (`download-failed`), or it is not a
            complete safetensors model (`invalid-model`, `unsafe-model`).
    """
    return find_model(name, fetch=True)


def find_model(name: str, fetch: bool) -> Path:
    """As `resolve`; without `fetch` only models that are already on this machine."""
    path = Path(name).expanduser()
    if path.is_dir():
        check_model_dir(path)
        return path
    if with_adapter := split_adapter(name):
        base, adapter = with_adapter
        return merged_model(find_model(base, fetch), find_adapter(adapter, fetch))
    if alias := ALIASES.get(name):
        cached = fetch_alias(alias) if fetch else cached_alias(alias)
        if cached is None:
            raise CaiError(f"{name}: not fetched yet", hint=f"cai models fetch {name}", code="unknown-model")
        return cached
    engine, colon, _ = name.partition(":")
    if colon and engine in ENGINES:
        raise CaiError(
            f"{name}: the name of an engine, where the files of a model are needed",
            hint=f"name a directory, {', '.join(ALIASES)} or a Hub name org/name, without {engine}:",
            code="unknown-model",
        )
    if not HUB_NAME.fullmatch(name) or path.exists():
        known = ", ".join(ALIASES)
        hint = f"use a directory with config.json and *.safetensors, {known}, or a Hub name org/name"
        raise CaiError(f"{name}: no such model", hint, code="unknown-model")
    snapshot = hub_snapshot(name, cached_only=not fetch)
    check_model_dir(snapshot)
    return snapshot


def split_adapter(name: str) -> tuple[str, str] | None:
    """The base model and the adapter of a name `BASE+ADAPTER`, or None for another name.

    >>> split_adapter("org/model+runs/adapter")
    ('org/model', 'runs/adapter')
    >>> split_adapter("org/model")
    """
    base, plus, adapter = name.rpartition("+")
    return (base, adapter) if base and plus and adapter and not Path(name).expanduser().is_dir() else None


def public_name(name: str) -> str:
    """A model's name without the folders of this machine, fit for publication."""
    if parts := split_adapter(name):
        return "+".join(public_name(part) for part in parts)
    return Path(name).resolve().name if Path(name).is_dir() else name


def hub_base(name: str) -> str | None:
    """The name of a model, or of the base model under an adapter, that is not a directory of this machine."""
    if parts := split_adapter(name):
        return hub_base(parts[0])
    return None if Path(name).is_dir() else name


def find_adapter(name: str, fetch: bool) -> Path:
    """The directory of an adapter, as `find_model` finds that of a model."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if not HUB_NAME.fullmatch(name) or path.exists():
        raise CaiError(
            f"{name}: no such adapter",
            hint=f"use a directory with {ADAPTER_CONFIG}, or a Hub name",
            code="unknown-model",
        )
    return hub_snapshot(name, cached_only=not fetch)
