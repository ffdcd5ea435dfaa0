"""Writes rows as a log of Inspect (`cai export FILE -o DIR --for inspect`), which `inspect view` shows.

The log is in the .eval format: a zip archive with one JSON file a sample, their summaries, and a header. The samples
are written one by one, so a large file needs little memory, and inspect-ai need not be installed. The tests read the
logs with inspect-ai 0.3.285.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, cast, get_args
from zipfile import ZIP_DEFLATED, ZipFile

import orjson

from cai_cli import __version__
from cai_cli.cards.dataset_card import DatasetStats
from cai_cli.cards.export import REJECTED, first_type, usable_rows
from cai_cli.common.errors import CaiError
from cai_cli.data.evaluation_schema import AdherenceResult, LabelledReply, ModelComparison, RefusalLabel
from cai_cli.data.formats import completed_row, parse_preference
from cai_cli.data.jsonl import AppendFile, display_name, origin, rows_of
from cai_cli.data.reply_ends import CUT_OFF
from cai_cli.data.schema import Critique, Message, Preference, Row, Sample, Vote
from cai_cli.runtime.manifest import hash_input, read_manifest
from cai_cli.runtime.output_files import sidecar

Json = dict[str, Any]
LOG_VERSION = 2
SUMMARY_LENGTH = 1000  # characters of a prompt in the list of samples
MODEL_FLAGS = ("--model", "-m")
MADE_REPLIES = frozenset({"sample", "critique-revise", "critique", "revise", "rl", "dpo"})


# --- one sample -----------------------------------------------------------------------------------------------------


def logged(row: Sample | Preference | ModelComparison | AdherenceResult, model: str) -> Json:
    """Return an `EvalSample` of inspect-ai, without its epoch.

    Args:
        row: The row.
        model: The name of the model that wrote the replies, for rows that do not name it.
    """
    if isinstance(row, LabelledReply):
        return _labelled(row, model)
    if isinstance(row, AdherenceResult):
        return _conversation(row)
    if isinstance(row, Preference):
        return _preference(row, model)
    if isinstance(row, ModelComparison):
        return _comparison(row)
    return _sample(row, model)


def _sample(row: Sample, model: str) -> Json:
    fields = {name: info for name, info in type(row).model_fields.items() if name not in Sample.model_fields}
    values = row.model_dump(include=set(fields))
    scores = {
        name: _score(values[name])
        for name, info in fields.items()
        if info.annotation in (float, float | None) and values[name] is not None
    }
    if levels := getattr(row, "levels", None):
        scores["harm"] |= {
            "explanation": "Probabilities of the levels: " + ", ".join(f"{n}: {p:.3f}" for n, p in enumerate(levels)),
            "metadata": {"levels": levels, "logprobs": [_log(p) for p in levels]},
        }
    metadata = {"kind": row.kind, "source": row.source, "sample_index": row.sample_index}
    metadata |= {name: value for name, value in values.items() if name not in scores and name != "levels"}
    model = getattr(row, "model", model)
    return _logged(row.id, row.prompt, [(row.reply, row.thoughts, row.finish_reason)], model, scores, metadata)


def _labelled(row: LabelledReply, model: str) -> Json:
    scores = {"refusal": _refusal(row.label)}
    if row.judged and row.p_labels:
        p_labels = dict(zip(get_args(RefusalLabel), row.p_labels, strict=True))
        scores["judged_refusal"] = _refusal(row.judged) | {
            "explanation": "Probabilities: " + ", ".join(f"{label}: {p:.3f}" for label, p in p_labels.items()),
            "metadata": {"p_labels": p_labels, "logprobs": {label: _log(p) for label, p in p_labels.items()}},
        }
    metadata = row.model_dump(include={"kind", "source", "sample_index", "safety"})
    return _logged(row.id, row.prompt, [(row.reply, row.thoughts, row.finish_reason)], model, scores, metadata)


def _refusal(label: RefusalLabel) -> Json:
    return _score(float(label != "compliance")) | {"answer": label}


def _conversation(row: AdherenceResult) -> Json:
    lines = ["| reply | log-odds of Yes: breaks | log-odds of Yes: follows | p(breaks) |", "|---|---|---|---|"]
    for number, turn in enumerate(row.turns, 1):
        if turn.log_odds is not None and turn.p_violation is not None:
            breaks, follows = turn.log_odds
            lines.append(f"| {number} | {breaks:.3f} | {follows:.3f} | {turn.p_violation:.3f} |")
    answers = {"questions": row.questions, "turns": [turn.model_dump() for turn in row.turns]}
    broken = row.violations
    scores = {}
    if broken:
        scores["violation"] = _score(sum(broken) / len(broken)) | {
            "explanation": "\n".join(lines), "metadata": answers
        }  # fmt: skip
    metadata = row.model_dump(include={"model", "principle_id", "scenario", "conversation", "pressure"})
    first, *between, last = row.messages
    replies = [(last.content, None, row.turns[-1].finish_reason)]
    return _logged(row.id, [first], replies, row.model, scores, metadata, between)


def _preference(row: Preference, model: str) -> Json:
    replies = [
        (row.chosen[0].content, None, row.chosen_finish_reason),
        (row.rejected[0].content, None, row.rejected_finish_reason),
    ]
    score = _score(row.p_chosen) | _votes(row.votes, "chosen", "rejected")
    scores = {"p_chosen": score}
    if row.human:
        scores["agrees_with_human"] = _score("C" if row.human == "chosen" else "I")
    metadata = {"source": row.source, "human": row.human, "rejected": row.rejected[0].content}
    return _logged(row.id, row.prompt, replies, model, scores, metadata)


def _comparison(row: ModelComparison) -> Json:
    replies = [(row.a[0].content, None, None), (row.b[0].content, None, None)]
    winner = "tie" if row.p_a == 0.5 else row.model_a if row.p_a > 0.5 else row.model_b
    score = _score(row.p_a) | {"answer": winner} | _votes(row.votes, row.model_a, row.model_b)
    metadata = row.model_dump(include={"kind", "model_a", "model_b", "sample_index", "score_a", "score_b"})
    metadata |= {"b": row.b[0].content}
    return _logged(row.id, row.prompt, replies, row.model_a, {"p_a": score}, metadata)


def _logged(
    id: str,
    prompt: Sequence[Message],
    replies: Sequence[tuple[str, str | None, str | None]],
    model: str,
    scores: Json,
    metadata: Json,
    between: Sequence[Message] = (),
) -> Json:
    """Return a sample whose conversation ends with the first of `replies`: texts, thoughts, and how they ended.
    `between` are the turns between the prompt and that reply."""
    id = id.replace("/", ":").replace("\\", ":")  # Inspect names the file in the archive by it
    asked = [message.model_dump() for message in prompt]
    choices = [
        {
            "message": {"role": "assistant", "content": _content(text, thoughts), "model": model},
            "stop_reason": "max_tokens" if end == CUT_OFF else "stop" if end else "unknown",
        }
        for text, thoughts, end in replies
    ]
    return {
        "id": id,
        "input": asked,
        "target": "",
        "messages": [*asked, *(message.model_dump() for message in between), choices[0]["message"]],
        "output": {"model": model, "choices": choices, "completion": replies[0][0]},
        "scores": scores,
        "metadata": {name: value for name, value in metadata.items() if value is not None},
    }


def _content(text: str, thoughts: str | None) -> Any:
    if thoughts is None:
        return text
    return [{"type": "reasoning", "reasoning": thoughts}, {"type": "text", "text": text}]


def _score(value: float | str) -> Json:
    return {"value": value}


def _votes(votes: Sequence[Vote], first: str, second: str) -> Json:
    """Return the parts of a score that show the votes; `first` was shown first in the order "ab"."""
    if not votes:
        return {}
    lines = ["| principle | shown first | p(first) | rationale |", "|---|---|---|---|"]
    answers = []
    for vote in votes:
        shown = first if vote.order == "ab" else second
        rationale = " ".join((vote.rationale or "").split()).replace("|", "\\|")
        lines.append(f"| {vote.principle_id} | {shown} | {vote.p_first:.3f} | {rationale} |")
        logprobs = {"first": _log(vote.p_first), "second": _log(1 - vote.p_first)}
        answers.append(vote.model_dump() | {"shown_first": shown, "logprobs": logprobs})
    return {"explanation": "\n".join(lines), "metadata": {"votes": answers}}


def _log(p: float) -> float | None:
    return math.log(p) if p > 0 else None


# --- the log --------------------------------------------------------------------------------------------------------


@dataclass
class LogFile:
    """The samples of a log: their number, models, summaries and mean scores."""

    archive: ZipFile
    epochs: Counter[str] = field(default_factory=Counter)
    summaries: list[Json] = field(default_factory=list)
    sums: dict[str, tuple[float, int]] = field(default_factory=dict)
    scored: Counter[str] = field(default_factory=Counter)
    models: dict[str, None] = field(default_factory=dict)

    def add(self, sample: Json) -> None:
        """Write one sample; a further one with the same id is its next epoch."""
        self.epochs[sample["id"]] += 1
        self.models.setdefault(sample["output"]["model"])
        sample["epoch"] = self.epochs[sample["id"]]
        self.archive.writestr(f"samples/{sample['id']}_epoch_{sample['epoch']}.json", orjson.dumps(sample))
        shown = ("value", "answer")
        scores = {name: {k: score[k] for k in shown if k in score} for name, score in sample["scores"].items()}
        for name, score in scores.items():
            self.scored[name] += 1
            value = {"C": 1.0, "I": 0.0}.get(score["value"], score["value"])
            if isinstance(value, float):
                total, count = self.sums.get(name, (0.0, 0))
                self.sums[name] = total + value, count + 1
        summary = {"id": sample["id"], "epoch": sample["epoch"], "target": "", "scores": scores, "completed": True}
        self.summaries.append(summary | {"input": sample["input"][-1]["content"][:SUMMARY_LENGTH]})

    def results(self) -> Json:
        """Return the `EvalResults` of inspect-ai."""
        samples = len(self.summaries)
        scores = []
        for name, count in self.scored.items():
            total, numbers = self.sums.get(name, (0.0, 0))
            metrics = {"mean": {"name": "mean", "value": total / numbers}} if numbers else {}
            scored = {"scored_samples": count, "unscored_samples": samples - count, "metrics": metrics}
            scores.append({"name": name, "scorer": name, **scored})
        return {"total_samples": samples, "completed_samples": samples, "scores": scores}

    def finish(self, header: Json) -> None:
        """Write the summaries and the header."""
        self.archive.writestr("summaries.json", orjson.dumps(self.summaries))
        self.archive.writestr("header.json", orjson.dumps(header))


def export_inspect(source: str, work: Path) -> Json:
    """Write the log of `source` into the new directory `work`.

    Returns:
        The summary, as `export`.

    Raises:
        CaiError: As `export`; or the rows have no replies (`wrong-row-type`).
    """
    file = hash_input(source)
    row_type, parse = _parser(source)
    manifest = read_manifest(sidecar(Path(source), "manifest.json")) or {}
    model, judge = _models(source, manifest)
    created = _finished_at(source, manifest)
    task = f"cai-{manifest['provenance']['stage'].replace(' ', '-')}" if manifest else row_type.__name__
    name = f"{created.replace(':', '-')}_{task}_{str(file.sha256)[:22]}.eval"
    (work / "data").mkdir(parents=True)
    stats, rejected = DatasetStats(), AppendFile(work / REJECTED)
    with closing(rejected), ZipFile(work / "data" / name, "w", ZIP_DEFLATED) as archive:
        log = LogFile(archive)
        for row in usable_rows(source, parse, stats, rejected, problem=lambda _: None):
            log.add(logged(cast(Any, row), model))
        spec = _spec(source, manifest, task, created, file.sha256)
        replied = " vs ".join(log.models) if model == "unknown" else model  # rows of several models name them
        spec |= {"model": replied, "scorers": [{"name": scorer} for scorer in log.scored]}
        spec["dataset"]["samples"] = len(log.epochs)
        if judge:
            spec["model_roles"] = {"grader": {"model": judge}}
        stats_of_run = {"started_at": created, "completed_at": created, "model_usage": _usage(judge or model, manifest)}
        header = {"version": LOG_VERSION, "status": "success", "eval": spec}
        log.finish(header | {"results": log.results(), "stats": stats_of_run})
    (work / "README.md").write_text(_README.format(file=Path(source).name, rows=stats.rows), encoding="utf-8")
    counts = {"rejected": stats.rejected.total(), "rejected_reasons": dict(sorted(stats.rejected.items()))}
    return {"rows": stats.rows, "type": row_type.__name__, "scores": list(log.scored), **counts}


def _parser(source: str) -> tuple[type[Row], Callable[[object], Row]]:
    row_type = first_type(source)
    if row_type is Preference:
        return row_type, lambda value: parse_preference(value, source=origin(source))
    if row_type in (ModelComparison, AdherenceResult):
        return row_type, rows_of(row_type)
    if row_type is Sample:
        return row_type, lambda value: completed_row(value, source=origin(source))
    if issubclass(row_type, Sample) and row_type is not Critique:
        return row_type, rows_of(row_type)
    raise CaiError(
        f"{display_name(source)} holds {row_type.__name__} rows, which have no finished replies to show",
        hint="export samples, revisions, preferences, or the rows of cai score or of an evaluation of replies",
        code="wrong-row-type",
    )


def _spec(source: str, manifest: Json, task: str, created: str, sha256: str | None) -> Json:
    """Return the `EvalSpec` of inspect-ai, without models and scorers."""
    made = manifest.get("provenance", {})
    id = str(sha256)[:22]
    metadata = {"file": Path(source).name, "sha256": sha256, "provenance": made, "counts": manifest.get("counts")}
    metrics = sidecar(Path(source), f"{made.get('stage', '').rpartition(' ')[2]}.json")
    if made and metrics.is_file():
        metadata["metrics"] = orjson.loads(metrics.read_bytes())
    return {
        "created": created,
        "task": task,
        "task_id": id,
        "eval_id": id,
        "run_id": id,
        "task_args": made.get("settings", {}),
        "dataset": {"name": Path(source).name},
        "config": {},
        "packages": {"cai": made.get("cai", __version__)},
        "metadata": metadata,
    }


def _finished_at(source: str, manifest: Json) -> str:
    if finished := manifest.get("run", {}).get("finished_at"):
        return str(finished)
    return datetime.fromtimestamp(int(Path(source).stat().st_mtime), UTC).isoformat()


def _usage(model: str, manifest: Json) -> Json:
    """Return the tokens that a server counted, by model."""
    if not (usage := manifest.get("run", {}).get("usage")):
        return {}
    sent, made = usage["prompt_tokens"], usage["new_tokens"]
    return {model: {"input_tokens": sent, "output_tokens": made, "total_tokens": sent + made}}


def _models(source: str, manifest: Json) -> tuple[str, str | None]:
    """Return the names of the model that wrote the replies, and of the one that judged or scored them, if known."""
    if not manifest:
        return "unknown", None
    judge = _named(manifest, ("--judge", "--pm"), "judge")
    if not _made_replies(manifest):  # then --model is the judge, unless there is one beside it
        judge = judge or _named(manifest, MODEL_FLAGS, "model")
    if compared := manifest["provenance"].get("settings", {}).get("models"):
        return " vs ".join(compared), judge
    made = next((found for found in _lineage(source, manifest) if _made_replies(found)), None)
    return (made and _named(made, MODEL_FLAGS, "model")) or "unknown", judge


def _made_replies(manifest: Json) -> bool:
    provenance = manifest["provenance"]
    return provenance["stage"] in MADE_REPLIES or (provenance["stage"] == "eval refusals" and "model" in provenance)


def _lineage(source: str, manifest: Json) -> Iterator[Json]:
    """Yield the manifest of a file, and those of the files that it was made from, as far as they are found."""
    seen: set[Path] = set()
    waiting = [(Path(source), manifest)]
    while waiting:
        path, found = waiting.pop(0)
        if not found or path in seen:
            continue
        seen.add(path)
        yield found
        for given in found.get("run", {}).get("inputs", {}).values():
            if isinstance(given, str) and sidecar(Path(given), "manifest.json").is_file():
                waiting.append((Path(given), read_manifest(sidecar(Path(given), "manifest.json")) or {}))


def _named(manifest: Json, flags: Sequence[str], role: str) -> str | None:
    """Return the model that a command line names under one of `flags`, without the directories of an absolute path;
    else the engine that the provenance has for the role."""
    words = [part for word in manifest.get("run", {}).get("argv", []) for part in word.split("=", 1)]
    for flag, value in pairwise(words):
        if flag in flags:
            return Path(value).name if Path(value).is_absolute() else value
    model = manifest["provenance"].get(role) or {}
    return model.get("name") or model.get("engine")


_README = """\
# {file}

{rows:,} rows of `{file}` as a log of [Inspect](https://inspect.aisi.org.uk), written by `cai export`:

```sh
pip install inspect-ai
inspect view --log-dir DIR
```
"""
