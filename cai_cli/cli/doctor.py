"""`cai doctor`: checks this machine, and names what is missing and the command that fixes it."""

import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import orjson
import typer

from cai_cli import __version__
from cai_cli.cli import options
from cai_cli.common import threads
from cai_cli.common.errors import CaiError
from cai_cli.constitution.schema import SHIPPED, load, shipped_directory
from cai_cli.models.aliases import ALIASES, cached_alias
from cai_cli.models.fetch import cache_dir

PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "jsonlines", "typer", "rich", "pydantic", "orjson")
Check = dict[str, str | bool | None]


def _check(name: str, ok: bool, found: str, fix: str | None = None) -> Check:
    fix = None if ok else fix
    return {"name": name, "ok": ok, "found": found, "fix": fix, "mend": fix}  # "mend" is its name in version 0.1.0


def checks() -> list[Check]:
    """All checks: what was found and, where something is missing, the command that fixes it."""
    return [
        _check("python", sys.version_info >= (3, 11), sys.version.split()[0], "install Python 3.11 or newer"),
        *(_package(name) for name in PACKAGES),
        *_devices(),
        _vllm(),
        _cache(),
        *(_model(name) for name in ALIASES),
        *(_principles(file) for file in SHIPPED.values()),
    ]


def _package(name: str) -> Check:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return _check(name, True, version(name))
    except PackageNotFoundError:
        return _check(name, False, "missing", f"pip install -c constraints.txt {name}")


def _vllm() -> Check:
    from importlib.metadata import packages_distributions, requires, version

    name, install = "engine vllm (optional)", "pip install '.[vllm]'  (needs a GPU)"
    if importlib.util.find_spec("vllm") is None:
        return _check(name, False, "not installed", install)
    package = packages_distributions()["vllm"][0]  # its CPU build has another name
    versions = {"vllm": version(package), **{other: version(other) for other in ("torch", "transformers")}}
    requirements = [*(requires(package) or ()), *(requires("trl") or ())]
    if conflicts := unmet(requirements, versions):
        return _check(name, False, f"{versions['vllm']}, but {'; '.join(conflicts)}", install)
    return _check(name, True, f"{versions['vllm']}, with torch {versions['torch']}")


def unmet(requirements: Sequence[str], versions: Mapping[str, str]) -> list[str]:
    """The requirements that these versions do not meet, in words. Those of other packages are left out.

    Args:
        requirements: Requirements as in the metadata of a package, that of the extra `vllm` included.
        versions: The version of each package.
    """
    from packaging.requirements import Requirement

    found = []
    for requirement in map(Requirement, requirements):
        installed = versions.get(requirement.name)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": "vllm"})
        if installed and applies and not requirement.specifier.contains(installed, prereleases=True):
            found.append(f"{requirement.name} must be {requirement.specifier}, not {installed}")
    return found


def _devices() -> list[Check]:
    import torch

    found = f"{len(threads.cores())} cores, torch uses {torch.get_num_threads()} threads{_load()}"
    devices = [_check("cpu", True, found)]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(_check(f"cuda:{index}", True, f"{properties.name}, {properties.total_memory >> 30} GiB"))
    if len(devices) == 1:
        devices.append(_check("gpu", True, "none; local models run on the CPU"))
    return devices


def _load() -> str:
    """How many cores other processes keep busy, where the system tells."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return ""
    before = stat.read_text()
    time.sleep(0.2)
    return f", other processes keep {threads.busy_cores(before, stat.read_text(), threads.cores()):.1f} cores busy"


def _cache() -> Check:
    directory = cache_dir()
    existing = next(p for p in (directory, *directory.parents) if p.exists())
    free = shutil.disk_usage(existing).free >> 30
    writable = os.access(existing, os.W_OK)
    found = f"{directory}, {free} GiB free" + ("" if writable else ", not writable")
    return _check("cache", writable and free >= 2, found, "set CAI_CACHE to a writable directory with 2 GiB free")


def _model(alias: str) -> Check:
    path = cached_alias(ALIASES[alias])
    return _check(f"model {alias}", path is not None, str(path or "not fetched"), f"cai models fetch {alias}")


def _principles(file: str) -> Check:
    try:
        loaded = load(shipped_directory() / file)
    except CaiError as error:
        return _check(f"principles/{file}", False, error.message, "reinstall cai")
    return _check(f"principles/{file}", True, f"{len(loaded.principles)} principles, {len(loaded.examples)} examples")


def model_checks(name: str) -> list[Check]:
    """What a model is and does, without loading its weights: its size, its chat template, its thoughts and its tokens.

    Raises:
        CaiError: There is no such model, or it cannot be read.
    """
    from cai_cli.engines import thoughts
    from cai_cli.engines.tokenization import (
        SWITCHES,
        end_of_turn_ids,
        generation_prompt,
        reply_header,
        template_variables,
    )
    from cai_cli.models.loading import context_window, load_config, load_generation_config, load_tokenizer
    from cai_cli.models.names import resolve

    path = resolve(name)
    tokenizer, config = load_tokenizer(path), load_config(path)
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    dtype = str(config.dtype or "dtype not stated").removeprefix("torch.")
    kind = f"{config.model_type}, {dtype}, {size / 1e6:,.0f} MB of weights"
    template = tokenizer.chat_template is not None
    found = "none: prompts are raw text"
    if template:
        switches = sorted(template_variables(tokenizer).intersection(SWITCHES))
        opened = thoughts.unclosed(generation_prompt(tokenizer))
        form = opened.strip() or thoughts.form_in(tokenizer.get_chat_template(), tokenizer.added_tokens_encoder)
        found = _thinking(form, switches, bool(opened), bool(reply_header(tokenizer)))
    ends = sorted(end_of_turn_ids(tokenizer, load_generation_config(path)))
    return [
        _check("model", True, f"{path}: {kind}"),
        _check("context window", True, f"{context_window(config, tokenizer):,} tokens"),
        _check("chat template", template, "yes" if template else "none", "train and sample with --chat-template FILE"),
        _check("thoughts", True, found),
        _check("end of turn", True, ", ".join(f"{tokenizer.decode([i])} ({i})" for i in ends)),
        _check("padding", True, f"{tokenizer.pad_token} ({tokenizer.pad_token_id})"),
    ]


def _thinking(form: str | None, switches: Sequence[str], opens: bool, heads: bool) -> str:
    """What `cai doctor` says of the thoughts of a model with a chat template.

    Args:
        form: What opens the thoughts, if known.
        switches: The arguments of the template that switch them.
        opens: Whether the template opens the thoughts itself.
        heads: Whether the template writes a header before the reply.
    """
    if form is None and not switches:
        return "none found in the chat template or the tokens"
    how = (
        f"the chat template opens them with {form}"
        if opens
        else f"{f'written as {form}' if form else 'written in an unknown form'}"
    )
    if switches:
        return f"{how}; --thinking on|off sets {' and '.join(switches)}"
    if opens:
        return f"{how}; there is no switch, --thinking off closes them at once"
    if heads:
        return f"{how}; there is no switch, --thinking off starts with the reply"
    return f"{how}; there is no switch, they are set apart from the reply"


def command(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Check this model instead of the machine: size, context window, chat template, thoughts, end of turn.",
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """Check versions, devices, engines and the model cache, or a model.

    Names what is missing and the command that fixes it.
    """
    results = [_check("cai", True, __version__), *(checks() if model is None else model_checks(model))]
    if json:
        print(orjson.dumps({"ok": all(c["ok"] for c in results), "checks": results}).decode())
        return
    for c in results:
        print(f"{'ok ' if c['ok'] else '-- '} {c['name']:<36} {c['found']}")
        if c["fix"]:
            print(f"    {'':<36} fix: {c['fix']}")
