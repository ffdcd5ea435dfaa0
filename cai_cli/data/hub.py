"""Reads data sets of the Hugging Face Hub: `hf://datasets/OWNER/NAME?config=C&split=S`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from cai_cli.common.errors import CaiError, UsageError
from cai_cli.common.library_errors import library_failure
from cai_cli.data.lines import Numbered

PREFIX = "hf://datasets/"
FORM = "hf://datasets/OWNER/NAME?config=C&split=S"
KEYS = ("config", "split", "revision")
DEFAULT_SPLIT = "train"


@dataclass(frozen=True)
class HubAddress:
    """The parts of an address.

    Attributes:
        name: OWNER/NAME.
        files: A file or a pattern in the repository, or None for the whole data set.
        config: The configuration (subset), or None where there is only one.
        split: The split, or None for `train` or the only one.
        revision: A branch, tag or commit, or None for the newest.
    """

    name: str
    files: str | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, source: str) -> "HubAddress":
        """Parse an address. Raises UsageError.

        >>> HubAddress.parse("hf://datasets/o/n?config=a&split=test").split
        'test'
        """
        path, _, query = source.partition("?")
        parts = path.removeprefix(PREFIX).strip("/").split("/")
        given = dict(parse_qsl(query, keep_blank_values=True))
        unknown = [key for key in given if key not in KEYS or not given[key]]
        if not path.startswith(PREFIX) or len(parts) < 2 or not all(parts) or unknown:
            what = f"unknown or empty {unknown[0]!r}" if unknown else "not the address of a data set"
            raise UsageError(f"{source}: {what}", hint=f"write {FORM}", code="invalid-option")
        return cls("/".join(parts[:2]), "/".join(parts[2:]) or None, **given)


def hub_rows(source: str) -> Iterator[Numbered[dict[str, Any]]]:
    """(number from 1, row without its nulls) of a data set, streamed.

    Raises:
        UsageError: The address is not valid.
        CaiError: The data set cannot be read; the hint names its configurations or splits.
    """
    address = HubAddress.parse(source)
    split = _open(source, address)
    try:
        for number, row in enumerate(split, start=1):
            yield number, {name: value for name, value in row.items() if value is not None}
    except Exception as error:  # `datasets` lets through the errors of many libraries; the user needs one line
        raise _cannot_read(source, error) from error


def _open(source: str, address: HubAddress) -> Any:
    """The rows of the split that the address names."""
    import datasets

    options: dict[str, Any] = {"streaming": True}
    for key, value in (("name", address.config), ("data_files", address.files), ("revision", address.revision)):
        options |= {} if value is None else {key: value}
    try:
        splits = datasets.load_dataset(address.name, **options)  # nosec B615
    except Exception as error:
        configs = _configs(address)
        if configs and address.config not in configs:
            raise _not_there(source, "configuration", address.config, configs) from error
        raise _cannot_read(source, error) from error
    if not isinstance(splits, Mapping):
        return splits
    wanted = address.split or (DEFAULT_SPLIT if DEFAULT_SPLIT in splits or len(splits) != 1 else next(iter(splits)))
    if wanted not in splits:
        raise _not_there(source, "split", address.split, list(splits))
    return splits[wanted]


def _configs(address: HubAddress) -> list[str]:
    """The configurations of a data set; empty where the Hub does not say."""
    import datasets

    try:
        return list(datasets.get_dataset_config_names(address.name, revision=address.revision))
    except Exception:
        return []


def _not_there(source: str, what: str, given: str | None, known: list[str]) -> CaiError:
    said = f"no {what} {given!r}" if given else f"several {what}s, of which the address names none"
    key = "config" if what == "configuration" else "split"
    return CaiError(
        f"{source}: {said}; it has {', '.join(known[:40])}", hint=f"write ?{key}={known[0]}", code="cannot-read"
    )


def _cannot_read(source: str, error: Exception) -> CaiError:
    message = f"cannot read {source}: {' '.join(str(error).split())}"
    known = library_failure(error, "datasets")
    hint = known.hint if known and known.code != "engine-failed" else "is the Hub reachable, and the name right?"
    return CaiError(message, hint, code="cannot-read")
