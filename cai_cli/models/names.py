"""Resolves a model name to a directory."""

import re
from pathlib import Path

from cai_cli.common.errors import CaiError
from cai_cli.models.fetch import ALIASES, cached_alias, check_model_dir, fetch_alias, hub_snapshot

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def resolve(name: str) -> Path:
    """The directory of the model `name`, fetched first where that is needed.

    Raises: CaiError when it is no whole safetensors model, or cannot be had.
    """
    return find_model(name, fetch=True)


def find_model(name: str, fetch: bool) -> Path:
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
