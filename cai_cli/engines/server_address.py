"""Addresses of servers, and the names under which they serve models."""

from contextlib import suppress
from urllib.parse import urlsplit

from cai_cli.common.errors import UsageError

KEY_VARIABLE = "OPENAI_API_KEY"


def checked_url(url: str | None, option: str = "--base-url", key_variable: str = KEY_VARIABLE) -> str:
    """The address of a server's API without a trailing slash.

    Args:
        url: The address.
        option: The option that gives it, for messages.
        key_variable: The environment variable that gives the key, for messages.

    Raises:
        UsageError: There is no address (`missing-option`), or it is not a server's address or contains a secret
            (`invalid-option`).

    >>> checked_url("http://localhost:8000/v1/")
    'http://localhost:8000/v1'
    """
    if not url:
        raise UsageError(
            "an openai: model needs --base-url (or OPENAI_BASE_URL)",
            hint="for example http://localhost:8000/v1; OpenAI's own is https://api.openai.com/v1",
            code="missing-option",
        )
    parts = urlsplit(url)
    with suppress(ValueError):
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            if parts.username or parts.password or parts.query or parts.fragment:
                raise UsageError(
                    f"{option} must not contain a user, password or query: manifests record it",
                    hint=f"the key comes from {key_variable}",
                    code="invalid-option",
                )
            return url.rstrip("/")
    raise UsageError(f"{option} must be http://HOST[:PORT]/PATH or https://...", code="invalid-option")


def same_model(requested: str, answered: str | None) -> bool:
    """Whether `answered` names the requested model: under its name, a dated version of it or of its alias for the
    latest one, without its owner, or without the variant after a colon.

    >>> [same_model("claude-x-latest", "claude-x-20260101"), same_model("org/m:fast", "org/m"), same_model("m", "n")]
    [True, True, False]
    """
    if not answered or answered == requested:
        return True
    name = requested.removesuffix("-latest")
    return answered.startswith(f"{name}-") or requested.endswith(f"/{answered}") or answered == name.partition(":")[0]
