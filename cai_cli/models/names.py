"""Resolves model names: a local directory, an alias (`ALIASES`) or a Hub name `org/name`."""

import re
from pathlib import Path

from cai_cli.common.errors import CaiError
from cai_cli.models.aliases import ALIASES, cached_alias, fetch_alias
from cai_cli.models.fetch import check_model_dir, hub_snapshot

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
    if alias := ALIASES.get(name):
        cached = fetch_alias(alias) if fetch else cached_alias(alias)
        if cached is None:
            raise CaiError(f"{name}: not fetched yet", hint=f"cai models fetch {name}", code="unknown-model")
        return cached
    if not HUB_NAME.fullmatch(name) or path.exists():
        known = ", ".join(ALIASES)
        hint = f"use a directory with config.json and *.safetensors, {known}, or a Hub name org/name"
        raise CaiError(f"{name}: no such model", hint, code="unknown-model")
    snapshot = hub_snapshot(name, cached_only=not fetch)
    check_model_dir(snapshot)
    return snapshot
