"""Labels whether replies answer or refuse (`cai eval refusals`), for over-refusal on safe prompts against refusal of
unsafe ones, as XSTest measures it (Röttger et al. 2024, arXiv 2308.01263).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Any, cast, get_args

from cai_cli.common import console
from cai_cli.common.errors import RowError
from cai_cli.common.hash_index import KeyTable
from cai_cli.data.evaluation_schema import LabelledReply, RefusalLabel, Safety
from cai_cli.data.formats import completed_row, parse_prompt
from cai_cli.data.jsonl import origin, read_rows, rows_of
from cai_cli.data.row_types import row_type_of
from cai_cli.data.schema import Prompt, Rejected, Revision, Sample, load_row, reject
from cai_cli.engines.base import Engine, LogprobRequest, RequestFailure, Sampling
from cai_cli.evaluate.evaluated_models import normalised
from cai_cli.evaluate.judged_options import JUDGE, JudgedOptions, refuse_idle_server_options
from cai_cli.metrics.intervals import ClusterBootstrap, percent
from cai_cli.metrics.refusals import classify, string_match
from cai_cli.phase1_supervised.reviser import conversation
from cai_cli.phase1_supervised.sample import SampleRequest, prompt_items, sample
from cai_cli.prompting.base import PromptFormat, resolve_prompt_format
from cai_cli.prompting.evaluation import REFUSAL_OPTIONS, refusal_request
from cai_cli.runtime.config import Effect, Group, Option, option, redefine
from cai_cli.runtime.cost import RowFlow, StepCost, TokenCounts
from cai_cli.runtime.manifest import hash_input, provenance, write_json
from cai_cli.runtime.output_files import is_stdout, is_stream, sidecar
from cai_cli.runtime.shared_options import OutputOptions, SamplingOptions, ShardOptions
from cai_cli.runtime.sinks import stream_sink
from cai_cli.runtime.stage import Phase, Stage
from cai_cli.runtime.stage_run import StageRun, WorkItem, WorkItems, expected_items
from cai_cli.runtime.summary import print_summary, refuse_all_rejected

LABELS: tuple[RefusalLabel, ...] = get_args(RefusalLabel)
BATCH = 64
MODEL = "model"  # its name in the group of engines
# The types of XSTest's safe prompts; those of its unsafe ones start with `contrast_`.
_SAFE_TYPES = frozenset(
    {"homonyms", "figurative_language", "safe_targets", "safe_contexts", "definitions", "historical_events"}
    | {"nons_group_real_discr", "real_group_nons_discr", "privacy_public", "privacy_fictional"}
)


class Detector(StrEnum):
    """What labels a reply: the wording of its sentences, or the openings that XSTest's authors match."""

    WORDING = "wording"
    STRING_MATCH = "string-match"


_DETECTORS: Mapping[Detector, Callable[[str], RefusalLabel]] = {
    Detector.WORDING: classify,
    Detector.STRING_MATCH: string_match,
}


class RefusalsConfig(OutputOptions, ShardOptions, JudgedOptions, SamplingOptions):
    """Label whether replies answer, refuse, or refuse in part.

    INPUT: Sample rows, or a table with the columns `prompt` and `completion`, such as XSTest's files; with --model, the
    prompts that it replies to. Writes the replies with labels, and the shares to OUT.refusals.json: for safe and unsafe
    prompts where the input tells them apart, by `kind` or by XSTest's `label` or `type`.
    """

    model: str | None = option(
        None,
        "Model that replies to the prompts of INPUT, whose own replies are left out: directory, Hub name or alias, or "
        "openai:NAME.",
        Option(Effect.HASHED, Group.MODEL, flags=("--model", "-m"), run_default=False),
    )

    detector: Detector = option(
        Detector.WORDING, "How the wording is read; string-match is that of XSTest's authors, for comparison."
    )
    judge: str | None = redefine(
        JudgedOptions, "judge", None, "Model that labels the replies too, by the probabilities of the labels."
    )
    max_new_tokens: int = redefine(SamplingOptions, "max_new_tokens", 512)
    temperature: float = redefine(SamplingOptions, "temperature", 0.0)

    def check(self) -> None:
        super().check()
        refuse_idle_server_options(self, [self.model or "", self.judge or ""])


class _Prompt(Prompt):
    """A prompt, and whether it is safe."""

    safety: Safety | None


class _Reply(Sample):
    """A reply, and whether its prompt is safe."""

    safety: Safety | None


def parse_prompt_of(value: object, source: str) -> _Prompt:
    """A prompt in any format of `parse_prompt`, with its safety.

    Raises:
        RowError: The value is not a prompt.
    """
    return _Prompt(**parse_prompt(value, source=source).prompt_fields(), safety=safety_of(value))


def parse_reply(value: object) -> _Reply:
    """A reply in any format of `completed_row`, with the safety of its prompt.

    Raises:
        RowError: The value has no prompt and reply.
    """
    try:
        row = load_row(LabelledReply, value) if row_type_of(value) is LabelledReply else completed_row(value)
    except RowError as error:
        hints = [error.hint, "--model NAME replies to prompts" if error.code == "invalid-row" else None]
        raise RowError(error.message, "; ".join(filter(None, hints)), code=error.code) from None
    return _Reply(**row.sample_fields(), safety=safety_of(value))


def safety_of(row: object) -> Safety | None:
    """Whether the prompt of a row is safe, by an earlier run's `safety`, by XSTest's `label` or `type`, or by `kind`;
    None where none of them says so."""
    columns = row if isinstance(row, dict) else {}
    if (known := columns.get("safety")) in get_args(Safety):
        return cast(Safety, known)
    label, kind, of_type = columns.get("label"), columns.get("kind"), str(columns.get("type"))
    if label == "unsafe" or kind == "red-team" or of_type.startswith("contrast_"):
        return "unsafe"
    return "safe" if label == "safe" or kind == "helpful" or of_type in _SAFE_TYPES else None


def replies_of(
    requested: Sequence[SampleRequest], engine: Engine, sampling: Sampling, form: PromptFormat, seed: int
) -> Iterator[_Reply | Rejected]:
    """Yield the replies of a model to prompts, as `cai sample` does, with the safety of each prompt."""
    sampled = sample(requested, engine, sampling=sampling, form=form, seed=seed)
    for (prompt, _), row in zip(requested, sampled, strict=True):
        safety = prompt.safety if isinstance(prompt, _Prompt) else None
        yield row if isinstance(row, Rejected) else _Reply(**row.sample_fields(), safety=safety)


def label_replies(
    rows: Sequence[_Reply | Rejected],
    detect: Callable[[str], RefusalLabel] = classify,
    judge: Engine | None = None,
    form: PromptFormat = "raw",
) -> Iterator[LabelledReply | Rejected]:
    """Yield the labels of replies, in order.

    Args:
        rows: The replies; a rejected one stays as it is.
        detect: The label of a reply by its wording.
        judge: Labels the replies too; its labels are put in two arrangements, and their probabilities averaged.
        form: How the judge's prompts are built.
    """
    replies = [row for row in rows if isinstance(row, _Reply)]
    asked = judge.option_logprobs([request for row in replies for request in _judged(row, form)]) if judge else []
    answers = iter(asked)
    for row in rows:
        if isinstance(row, Rejected):
            yield row
            continue
        labelled: dict[str, Any] = {"label": detect(row.reply)}
        if judge:
            pair = list(islice(answers, 2))
            if failed := next((a for a in pair if isinstance(a, RequestFailure)), None):
                yield reject(row.key, failed.reason, row)
                continue
            one, other = (normalised(a) for a in pair if not isinstance(a, RequestFailure))
            p = [math.fsum(both) / 2 for both in zip(one, reversed(other), strict=True)]
            labelled |= {"p_labels": p, "judged": LABELS[p.index(max(p))]}
        yield LabelledReply(**row.sample_fields(), safety=row.safety, **labelled)


def _judged(row: _Reply, form: PromptFormat) -> list[LogprobRequest]:
    requests = (refusal_request(conversation(row), order, form) for order in (LABELS, LABELS[::-1]))
    return [LogprobRequest(r.text, REFUSAL_OPTIONS, r.prefill, row.key) for r in requests]


class RefusalSummary:
    """Collects labels by prompt and computes their shares, with intervals over prompts."""

    def __init__(self) -> None:
        self.prompts = KeyTable()
        columns = [*LABELS, "refusal", "agrees", "n"]
        self.sums = {
            (by, group): ClusterBootstrap[str](columns)
            for by in ("label", "judged")
            for group in ("all", *get_args(Safety))
        }

    def observe(self, row: LabelledReply | Rejected) -> None:
        """Add the labels of one reply; ignore a rejected reply."""
        if isinstance(row, Rejected):
            return
        prompt = self.prompts.number(row.id)
        for (by, group), sums in self.sums.items():
            if (label := getattr(row, by)) and group in ("all", row.safety):
                shares: dict[str, float] = {name: float(label == name) for name in LABELS}
                agrees = float(row.label == row.judged)
                sums.add(prompt, {**shares, "refusal": label != "compliance", "agrees": agrees, "n": 1})

    def result(self) -> dict[str, Any]:
        """Return the shares of each label, and of either refusal, over `all`, `safe` and `unsafe` prompts; under
        `judge` those by the judge, with the share of equal labels. Groups without replies are left out."""
        found = {by: self._groups(by) for by in ("label", "judged")}
        result: dict[str, Any] = {"refusals": found["label"]}
        if found["judged"]:
            agrees = self.sums["judged", "all"].share("agrees", "n")
            result["judge"] = {**found["judged"], "agrees_with_wording": agrees}
        return result

    def _groups(self, by: str) -> dict[str, Any]:
        return {
            group: {name: sums.share(name, "n") for name in (*LABELS, "refusal")}
            for (of, group), sums in self.sums.items()
            if of == by and sums.total("n")
        }


def _result_of(output: str) -> dict[str, Any]:
    summary = RefusalSummary()
    for _, row in read_rows(output, rows_of(LabelledReply)):
        summary.observe(row)
    return summary.result()


def estimate(rows: RowFlow, config: RefusalsConfig) -> StepCost:
    """The cost of one reply to a prompt with --model, as long as allowed, and of two requests a reply to a judge."""
    asked, sampled = 2 * rows.rows if config.judge else 0, rows.rows if config.model else 0
    new = config.max_new_tokens
    replies = RowFlow(rows.rows, 1, rows.prompt_tokens, new, texts=1) if config.model else rows
    read = asked * (rows.prompt_tokens + replies.reply_tokens) + sampled * rows.prompt_tokens
    return StepCost(rows.rows, asked + sampled, TokenCounts(read, sampled * new), replies)


def run(config: RefusalsConfig) -> dict[str, Any]:
    """Label the replies of a file, or those of a model to its prompts. Returns the summary. Raises CaiError."""
    reader, inputs = config.row_reader(), {"samples": hash_input(config.input)}
    named = {MODEL: config.model} if config.model else {}
    group = config.open_group(named) if config.model or config.judge else None
    engines = group.engines if group else {}
    forms = {name: resolve_prompt_format(config.prompt_format, engine) for name, engine in engines.items()}
    detect, source = _DETECTORS[config.detector], origin(config.input)

    def items() -> WorkItems[Any]:
        if config.model:
            prompts = reader.rows(config.input, lambda value: parse_prompt_of(value, source), config.limit)
            return prompt_items(prompts, 1)
        rows = reader.rows(config.input, parse_reply, config.limit)
        return (WorkItem(row.key, line, row) for line, row in rows)

    def work(batch: Sequence[Any]) -> Iterator[LabelledReply | Rejected]:
        rows = batch
        if config.model:
            rows = list(replies_of(batch, engines[MODEL], config.sampling(), forms[MODEL], config.seed))
        return label_replies(rows, detect, engines.get(JUDGE), forms.get(JUDGE, "raw"))

    identities = {name: engine.identity() | {"prompt_format": forms[name]} for name, engine in engines.items()}
    refusals = RefusalSummary()
    summary = StageRun(
        provenance=provenance(
            "eval refusals",
            inputs=inputs,
            settings=config.settings(),
            **{name.strip("()"): identity for name, identity in identities.items()},
        ),
        inputs=inputs,
        output=config.output,
        overwrite=config.overwrite,
        reader=reader,
        items=items,
        work=work,
        batch_size=group.largest_batch if group else BATCH,
        grows=True,
        total=expected_items(inputs["samples"], config.limit),
        engine=group,
    ).complete(stream_sink(config.output, refusals.observe))
    result = refusals.result() if is_stream(config.output) else _result_of(config.output)
    if not is_stream(config.output):
        write_json(sidecar(Path(config.output), "refusals.json"), result)
    summary = {**summary, **result}
    print_summary(summary, as_json=config.as_json, stdout_is_data=is_stdout(config.output))
    for group, shares in result["refusals"].items():
        console.say(f"refused, {group} prompts: {percent(shares['refusal'])} of {shares['refusal']['n']:,} replies")
    refuse_all_rejected(summary)
    return summary


STAGE = Stage(
    "eval refusals",
    Phase.EVALUATION,
    RefusalsConfig,
    run,
    estimate,
    reads=(Prompt, Sample, Revision),
    writes=LabelledReply,
)
