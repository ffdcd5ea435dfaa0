"""Labels whether replies answer or refuse (`cai eval refusals`), for over-refusal on safe prompts against refusal of
unsafe ones, as XSTest measures it (Röttger et al. 2024, arXiv 2308.01263).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, get_args

from cai_cli.common import console
from cai_cli.common.hash_index import KeyTable
from cai_cli.data.evaluation_schema import LabelledReply, RefusalLabel, Safety
from cai_cli.data.formats import completed_row
from cai_cli.data.jsonl import read_rows, rows_of
from cai_cli.data.row_types import row_type_of
from cai_cli.data.schema import Rejected, Revision, Sample, load_row, reject
from cai_cli.engines.base import Engine, LogprobRequest, RequestFailure
from cai_cli.evaluate.evaluated_models import normalised
from cai_cli.metrics.intervals import ClusterBootstrap, percent
from cai_cli.metrics.refusals import classify, string_match
from cai_cli.phase1_supervised.reviser import conversation
from cai_cli.prompting.base import PromptFormat, resolve_prompt_format
from cai_cli.prompting.evaluation import REFUSAL_OPTIONS, refusal_request
from cai_cli.runtime.config import Group, Option, option
from cai_cli.runtime.cost import RowFlow, StepCost, TokenCounts
from cai_cli.runtime.manifest import hash_input, provenance, write_json
from cai_cli.runtime.output_files import is_stdout, is_stream, sidecar
from cai_cli.runtime.shared_options import FormatOptions, OutputOptions, RequestOptions, ShardOptions
from cai_cli.runtime.sinks import stream_sink
from cai_cli.runtime.stage import Phase, Stage
from cai_cli.runtime.stage_run import StageRun, WorkItem, WorkItems, expected_items
from cai_cli.runtime.summary import print_summary, refuse_all_rejected

LABELS: tuple[RefusalLabel, ...] = get_args(RefusalLabel)
BATCH = 64
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


class RefusalsConfig(OutputOptions, ShardOptions, RequestOptions, FormatOptions):
    """Label whether replies answer, refuse, or refuse in part.

    INPUT: Sample rows, or a table with the columns `prompt` and `completion`, such as XSTest's files. Writes them with
    labels, and the shares to OUT.refusals.json: for safe and unsafe prompts where the input tells them apart, by `kind`
    or by XSTest's `label` or `type`.
    """

    detector: Detector = option(
        Detector.WORDING, "How the wording is read; string-match is that of XSTest's authors, for comparison."
    )
    judge: str | None = option(
        None, "Model that labels the replies too, by the probabilities of the labels.", Option(group=Group.MODEL)
    )


class _Reply(Sample):
    """A reply, and whether its prompt is safe."""

    safety: Safety | None


def parse_reply(value: object) -> _Reply:
    """A reply in any format of `completed_row`, with the safety of its prompt.

    Raises:
        RowError: The value has no prompt and reply.
    """
    if row_type_of(value) is LabelledReply:
        labelled = load_row(LabelledReply, value)
        return _Reply(**labelled.sample_fields(), safety=labelled.safety)
    row = completed_row(value)
    return _Reply(**row.sample_fields(), safety=safety_of(value if isinstance(value, dict) else {}))


def safety_of(columns: Mapping[str, Any]) -> Safety | None:
    """Whether a prompt is safe, by XSTest's `label` or `type`, or by `kind`; None where none of them says so."""
    label, kind, of_type = columns.get("label"), columns.get("kind"), str(columns.get("type"))
    if label == "unsafe" or kind == "red-team" or of_type.startswith("contrast_"):
        return "unsafe"
    return "safe" if label == "safe" or kind == "helpful" or of_type in _SAFE_TYPES else None


def label_replies(
    rows: Sequence[_Reply],
    detect: Callable[[str], RefusalLabel] = classify,
    judge: Engine | None = None,
    form: PromptFormat = "raw",
) -> Iterator[LabelledReply | Rejected]:
    """Yield the labels of replies, in order.

    Args:
        rows: The replies.
        detect: The label of a reply by its wording.
        judge: Labels the replies too; its labels are put in two arrangements, and their probabilities averaged.
        form: How the judge's prompts are built.
    """
    answers = [_judged(row, form) for row in rows] if judge else []
    asked = judge.option_logprobs([request for pair in answers for request in pair]) if judge else []
    for place, row in enumerate(rows):
        labelled: dict[str, Any] = {"label": detect(row.reply)}
        if judge:
            pair = asked[2 * place : 2 * place + 2]
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
    """The cost of two requests a reply to a judge; none without one."""
    asked = 2 * rows.rows if config.judge else 0
    return StepCost(rows.rows, asked, TokenCounts(asked * (rows.prompt_tokens + rows.reply_tokens)), rows)


def run(config: RefusalsConfig) -> dict[str, Any]:
    """Label the replies of a file. Returns the summary. Raises CaiError."""
    reader, engine = config.row_reader(), config.open_engine(config.judge) if config.judge else None
    inputs = {"samples": hash_input(config.input)}
    form = resolve_prompt_format(config.prompt_format, engine) if engine else "raw"
    detect = _DETECTORS[config.detector]

    def items() -> WorkItems[_Reply]:
        for line, row in reader.rows(config.input, parse_reply, config.limit):
            yield WorkItem(row.key, line, row)

    settings = config.settings(prompt_format=form) if engine else config.settings()
    models = {"judge": engine.identity()} if engine else {}
    refusals = RefusalSummary()
    summary = StageRun(
        provenance=provenance("eval refusals", inputs=inputs, settings=settings, **models),
        inputs=inputs,
        output=config.output,
        overwrite=config.overwrite,
        reader=reader,
        items=items,
        work=lambda rows: label_replies(rows, detect, engine, form),
        batch_size=engine.batch_size if engine else BATCH,
        grows=True,
        total=expected_items(inputs["samples"], config.limit),
        engine=engine,
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
    "eval refusals", Phase.EVALUATION, RefusalsConfig, run, estimate, reads=(Sample, Revision), writes=LabelledReply
)
