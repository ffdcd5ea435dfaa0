"""`cai batch`: runs a data stage on a provider's batch files.

The stage runs as always, with an engine that answers from the results collected so far. Where answers are missing, its
requests are written to files, and the rows before the first missing answer to the unfinished output. The same run after
the next results resumes that output. A stage whose later requests quote earlier answers takes several such waves.
"""

import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from cai_cli.common import console
from cai_cli.common.errors import CaiError, InvalidRow, RowError, UsageError
from cai_cli.common.files import write_error
from cai_cli.data.lines import lines_of, open_input, raise_invalid
from cai_cli.engines import batch
from cai_cli.engines.base import UnansweredRequests, Usage
from cai_cli.engines.batch.engine import BatchSession
from cai_cli.engines.batch.forms import FORMS, Provider, Unanswered, read_result
from cai_cli.engines.batch.store import Missing, Store
from cai_cli.engines.openai_client import REFUSALS
from cai_cli.engines.openai_failures import Refused
from cai_cli.engines.openai_parameters import Parameters
from cai_cli.runtime.config import StageConfig
from cai_cli.runtime.cost import CHARACTERS_PER_TOKEN
from cai_cli.runtime.manifest import write_json
from cai_cli.runtime.output_files import is_stream, one_writer, sidecar
from cai_cli.runtime.stage import Stage

SETTINGS = "batch.json"
STORE = "answers.sqlite"


@dataclass(frozen=True)
class Batch:
    """A stage that runs on batch files.

    Attributes:
        stage: The stage.
        config: Its options.
        provider: Who answers.
        folder: Where the request files and the answers are.
    """

    stage: Stage
    config: StageConfig
    provider: Provider
    folder: Path

    @property
    def as_json(self) -> bool:
        """Whether the summary is one JSON object."""
        return bool(self.config.as_json)  # type: ignore[attr-defined]


def submit(stage: Stage, config: StageConfig, provider: Provider, folder: Path | None) -> None:
    """Write the requests of a stage to files.

    Args:
        stage: The stage.
        config: Its options.
        provider: Who will answer.
        folder: Where the files go; by default OUT.batch.

    Raises:
        UsageError: The stage sends no requests, or an option is not for a batch.
        CaiError: As the stage; `other-run` if the folder is of another provider.
    """
    output = getattr(config, "output", None)
    if stage.trains or not hasattr(config, "open_engine"):
        raise UsageError(f"{stage.name} sends no requests to a model", code="invalid-option")
    if not output or is_stream(output):
        raise UsageError("a batch needs a file to write to", hint="-o FILE", code="missing-option")
    given = getattr(config, "input", None)
    for name in map(str, given if isinstance(given, list) else [given]):
        if name == "-" or Path(name).is_fifo() or Path(name).is_char_device():
            raise UsageError(
                f"{name} is a stream; each `cai batch collect` reads the input again", code="invalid-option"
            )
    folder = folder or sidecar(Path(output), "batch")
    if (folder / SETTINGS).exists() and (other := _read_settings(folder)["for"]) != provider:
        hint = "--batch-dir names another folder"
        raise CaiError(f"{folder} holds requests for {other}, not for {provider}", hint, code="other-run")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error
    # The run that collects must not start from scratch.
    options = config.model_dump(mode="json") | {"overwrite": False}
    recorded = {"stage": stage.name, "for": provider.value, "directory": str(Path.cwd()), "options": options}
    write_json(folder / SETTINGS, recorded)
    with _open_store(folder) as store:
        _run(Batch(stage, config, provider, folder), store)


def collect(folder: Path, files: Sequence[str], stages: Mapping[str, Stage], *, again: bool) -> None:
    """Read result files, and complete the output of the stage or write its next requests.

    Args:
        folder: The folder of the batch.
        files: The result files, in any order.
        stages: The stages by name.
        again: Whether to write requests again that are in files whose results are missing.

    Raises:
        InvalidRow: A line is not a result; nothing of its file is kept.
        CaiError: As the stage; `server-refused` if the provider refused every request.
    """
    recorded = _read_settings(folder)
    named = {file: file if file == "-" else str(Path(file).absolute()) for file in files}
    folder = folder.absolute()
    with suppress(OSError):  # a folder that was moved: the paths of the options are those of this directory then
        os.chdir(recorded["directory"])
    stage = stages[recorded["stage"]]
    config = stage.config.build(recorded["options"], f"{folder / SETTINGS}: ")
    console.set_quiet(bool(recorded["options"]["quiet"]))
    found = Batch(stage, config, Provider(recorded["for"]), folder)
    with _open_store(folder) as store:
        for name, path in named.items():
            _read_results(name, path, store, found.provider)
        if again:
            store.write_again()
        _run(found, store)


@contextmanager
def _open_store(folder: Path) -> Iterator[Store]:
    """The requests and answers of a batch, which one process at a time works on. Raises CaiError `output-locked`."""
    with one_writer(folder / STORE, f"the batch in {folder}"), closing(Store(folder / STORE)) as store:
        yield store


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS
    try:
        value: dict[str, Any] = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        raise CaiError(f"{folder} is not the folder of a batch", "cai batch submit", code="not-made-by-cai") from None
    except (OSError, orjson.JSONDecodeError) as error:
        raise CaiError(f"{path}: not readable ({error})", code="invalid-manifest") from error
    return value


# --- the run of the stage -----------------------------------------------------------------------------------------


def _run(found: Batch, store: Store) -> None:
    """Run the stage; where answers are missing, write the next request files and say what to do with them."""
    session = BatchSession(found.provider, store)
    try:
        with _session(session):
            store.begin_run()
            found.stage.run(found.config)
    except UnansweredRequests:
        store.commit()
        usage = session.engine.usage if session.engine else None
        missing = store.missing()
        files = store.write_files(found.folder, FORMS[found.provider])
        _report(found, missing, files, store.waiting_files(), usage)
    except CaiError as error:
        if error.in_summary:  # the output is complete, though empty
            store.commit()
        raise
    else:
        store.commit()


@contextmanager
def _session(session: BatchSession) -> Iterator[None]:
    token = batch.active.set(session)
    try:
        yield
    finally:
        batch.active.reset(token)


def _report(
    found: Batch, missing: Missing, files: list[tuple[Path, int]], waiting: list[str], usage: Usage | None
) -> None:
    """Print what was written, what it costs at most, and the provider's commands."""
    prompt_tokens = missing.characters // CHARACTERS_PER_TOKEN
    cost = None
    if usage:
        cost = Usage("", usage.price_in, usage.price_out, 0, prompt_tokens, missing.max_tokens).cost
    new = {str(path) for path, _ in files}
    earlier = [name for name in waiting if str(found.folder / name) not in new]
    if found.as_json:
        summary = {"stage": found.stage.name, "status": "waiting for results", "folder": str(found.folder),
                   "unanswered": missing.requests, "files": {str(path): count for path, count in files},
                   "earlier_files": earlier, "prompt_tokens": prompt_tokens, "most_new_tokens": missing.max_tokens,
                   "most_cost": cost}  # fmt: skip
        print(orjson.dumps(summary).decode(), file=sys.stdout)
        return
    for path, count in files:
        console.say(f"{path}: {count:,} requests")
    if files:
        price = "" if cost is None else f", at most {cost:,.2f} at the given prices"
        console.say(
            f"{found.stage.name}: about {prompt_tokens:,} prompt tokens and at most {missing.max_tokens:,} new tokens"
            f"{price}"
        )
        console.say("for each file:")
        for number, step in enumerate(FORMS[found.provider].next_steps, 1):
            model = str(getattr(found.config, "model", None) or getattr(found.config, "judge", "")).removeprefix(
                "openai:"
            )
            text = step.replace("MODEL", model).replace("FOLDER", str(found.folder))
            console.say(f"  {number}. {text}")
    if earlier:
        console.say(
            f"{missing.waiting:,} requests of {', '.join(earlier)} have no results yet: pass all result and error "
            "files to `cai batch collect`, or --again to write these requests to a new file"
        )


# --- results ------------------------------------------------------------------------------------------------------


@dataclass
class _Read:
    """What a result file held."""

    answered: int = 0
    known: int = 0
    other: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    again: Counter[str] = field(default_factory=Counter)


def _read_results(file: str, path: str, store: Store, provider: Provider) -> None:
    """Keep the answers in `path`, which messages call `file`: all or none of them. Raises InvalidRow, CaiError."""
    read, parameters = _Read(), Parameters({**FORMS[provider].names, **store.changed_parameters})
    store.begin()
    with open_input(path) as stream:
        for number, line in lines_of(stream, file, raise_invalid):
            try:
                _add(line, store, parameters, read)
            except RowError as error:
                raise InvalidRow(file, number, error.message, error.hint, code=error.code) from None
    _check(file, read, store)
    learned = {name: other for name, other in parameters.changes.items() if name not in FORMS[provider].names}
    for name in learned.keys() - store.changed_parameters.keys():
        console.warn(f"{provider} refuses {name}; requests are sent without it")
    store.change_parameters(learned)
    store.commit()
    parts = [f"{read.answered:,} answers"]
    parts += [f"{count:,} refused" for count in [read.refused.total()] if count]
    parts += [f"{count:,} to ask again ({reason})" for reason, count in read.again.items()]
    parts += [f"{read.known:,} known already"] * bool(read.known) + [f"{read.other:,} of other requests"] * bool(
        read.other
    )
    console.say(f"{file}: {', '.join(parts)}")


def _add(line: bytes, store: Store, parameters: Parameters, read: _Read) -> None:
    """Keep the result in one line. Raises RowError."""
    result = read_result(line)
    if store.is_answered(result.custom_id):
        read.known += 1
        return
    request = store.line_of(result.custom_id)
    if request is None:
        read.other += 1
        return
    sent = request.get("body") or request["params"]
    if isinstance(result.outcome, Unanswered):
        read.again[result.outcome.reason] += 1
        store.ask_again(result.custom_id)
    elif isinstance(result.outcome, Refused):
        named = sent | ({"stop": sent["stop_sequences"]} if "stop_sequences" in sent else {})
        known = any(other is None and name in named for name, other in parameters.changes.items())
        changes = parameters.refused(result.outcome.reason, named, dict(parameters.changes))
        if changes or known:  # the next request goes without the parameter
            parameters.changes |= changes or {}
            read.again["a refused parameter"] += 1
            store.ask_again(result.custom_id)
        else:
            read.refused[result.outcome.kind] += not result.outcome.about_the_prompt
            store.add_answer(result.custom_id, result.outcome, sent["model"])
    else:
        read.answered += 1
        store.add_answer(result.custom_id, result.outcome, sent["model"])


def _check(file: str, read: _Read, store: Store) -> None:
    """Raises CaiError where no result is of use: those of another batch, or a setting that every request has."""
    if read.other and not (read.answered or read.known or read.refused or read.again):
        raise CaiError(f"{file} holds the results of other requests", "is it of this batch?", code="other-run")
    if len(read.refused) == 1 and read.refused.total() >= REFUSALS and not read.answered and not store.has_answers:
        (reason,) = read.refused
        hint = "nothing of this file is kept; check the options, and submit again"
        raise CaiError(f"{file}: all {read.refused.total():,} requests were {reason}", hint, code="server-refused")
