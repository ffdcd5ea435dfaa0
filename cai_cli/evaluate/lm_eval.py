"""Runs EleutherAI's lm-evaluation-harness on a model (`cai eval lm-eval`; not in the paper).

It measures whether training kept a model's abilities. The harness runs as it is, in a process of its own; its arguments
are passed through, and its JSON is kept.
"""

import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import orjson

from cai_cli.common.child_process import wait_for
from cai_cli.common.errors import CaiError, UsageError
from cai_cli.models.adapter_dirs import ADAPTER_FILES
from cai_cli.models.fetch import ADAPTER_CONFIG
from cai_cli.models.fingerprint import files_digest, fingerprint
from cai_cli.models.loading import is_classifier
from cai_cli.models.names import find_adapter, public_name, resolve, split_adapter

OURS = {  # arguments of the harness -> where they are given instead
    "--model": "MODEL is loaded by its `hf` backend",
    "-M": "MODEL is loaded by its `hf` backend",
    "--output_path": "-o FILE before the --",
    "-o": "-o FILE before the --",
}
MODEL_ARGS = ("--model_args", "-a")
ENDING = ".lm-eval.json"


def command_line(model: str, arguments: Sequence[str], results: Path) -> list[str]:
    """The command line of the harness after `lm_eval run`.

    Args:
        model: A model as other commands name it. With BASE+ADAPTER the harness applies the adapter itself.
        arguments: Arguments of the harness; `--model_args` are added to those that name the model.
        results: The file that it writes.

    Raises:
        UsageError: An argument is set by this command.
        CaiError: There is no such model, or it is a preference model.
    """
    for name in arguments:
        if hint := OURS.get(name.partition("=")[0]):
            raise UsageError(f"{name} is set by this command", hint=hint, code="option-conflict")
    if not any(name.partition("=")[0] in ("--tasks", "-t", "--config", "-C") for name in arguments):
        hint = "`cai eval lm-eval MODEL -- --tasks arc_easy --limit 100`"
        raise UsageError("the tasks are missing", hint, code="missing-option")
    rest, given = _without_model_args(arguments)
    return ["--model", "hf", "--model_args", *_model_args(model), *given, "--output_path", str(results), *rest]


def _model_args(model: str) -> list[str]:
    if with_adapter := split_adapter(model):
        base, adapter = resolve(with_adapter[0]), find_adapter(with_adapter[1], fetch=True)
        parts = {"pretrained": base, "peft": adapter}
    elif (Path(model) / ADAPTER_CONFIG).is_file() and not (Path(model) / "config.json").is_file():
        hint = "name its base model too: BASE+ADAPTER"
        raise UsageError(f"{model} is an adapter", hint, code="missing-option")
    else:
        parts = {"pretrained": resolve(model)}
    if is_classifier(parts["pretrained"]):
        hint = "`cai eval bench rewardbench FILE --pm MODEL` evaluates it"
        raise CaiError(
            f"{model}: a preference model, and lm-eval needs a language model", hint, code="wrong-model-kind"
        )
    for path in parts.values():
        if "," in str(path):
            hint = "move it: lm-eval separates its arguments by commas"
            raise UsageError(f"{path}: a comma in the name of a model", hint, code="invalid-option")
    return [f"{name}={path.resolve()}" for name, path in parts.items()]


def _without_model_args(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments apart from `--model_args`, and its values, which end at the next flag."""
    rest: list[str] = []
    given: list[str] = []
    target = rest
    for word in arguments:
        name, equals, value = word.partition("=")
        if name in MODEL_ARGS:
            target = rest if equals else given
            given += [value] if equals else []
        elif word.startswith("-"):
            target = rest
            rest.append(word)
        else:
            target.append(word)
    return rest, given


def run_lm_eval(model: str, arguments: Sequence[str], name: str | None = None) -> dict[str, Any]:
    """Evaluate a model with the harness and return its results.

    Args:
        model: As for `command_line`.
        arguments: As for `command_line`.
        name: The name of the model in the report; by default that of its folder, alias or on the Hub.

    Returns:
        The JSON that the harness writes, with `cai`: the name of the model and the hash of its content.

    Raises:
        UsageError: As `command_line`.
        CaiError: lm-eval is not installed, there is no such model, or the harness failed.
    """
    if find_spec("lm_eval") is None:
        raise CaiError("lm-eval is not installed", hint="pip install '.[bench]'", code="missing-dependency")
    with TemporaryDirectory() as folder:
        words = command_line(model, arguments, Path(folder) / "results.json")
        code = _run([sys.executable, "-m", "lm_eval", "run", *words])
        written = sorted(Path(folder).glob("results_*.json"))
        if code != 0 or not written:
            raise CaiError(
                f"lm-eval ended with exit code {code}" if code else "lm-eval wrote no results",
                hint="its own message is above",
                code="engine-failed",
            )
        results: dict[str, Any] = orjson.loads(written[-1].read_bytes())
    base, *adapters = split_adapter(model) or (model,)
    content = [
        fingerprint(resolve(base)),
        *(files_digest(find_adapter(a, fetch=False), ADAPTER_FILES) for a in adapters),
    ]
    return results | {"cai": {"model": name or public_name(model), "fingerprint": "+".join(content)}}


def _run(words: Sequence[str]) -> int:
    """Run a command and return its exit code; it ends with this process."""
    return wait_for(subprocess.Popen(words, stdout=2))  # noqa: S603 - its tables are messages
