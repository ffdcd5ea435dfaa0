"""Makes preferences of replies that were sampled under different system prompts (`cai pairs`).

The label of a pair comes from how its replies were sampled: those of the first file are preferred. With replies of
`cai sample --contrast following` and `--contrast breaking` this is RLCD (Yang et al. 2023, arXiv 2307.12950), for
models that are too small to judge. With those of a teacher that reads a constitution (`sample --system-from`) and of
the model itself it is the preference data of character training. Departure: the paper has neither; its labels come
from a judge (`cai label-prefs`).

No judge compared the replies, so nothing but human labels can show that the labels are right, and the audit says so.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from cai_cli.common.errors import InvalidRow, UsageError
from cai_cli.common.near_duplicates import similarity
from cai_cli.constitution.usage import provenance_of
from cai_cli.data.formats import completed_row
from cai_cli.data.jsonl import Numbered, display_name, read_rows
from cai_cli.data.reply_ends import CUT_OFF
from cai_cli.data.schema import ContrastSample, Message, Preference, Sample, Vote
from cai_cli.data.splits import pair_problem
from cai_cli.metrics.label_audit import LabelAudit, audit_file
from cai_cli.metrics.label_verdict import print_verdict
from cai_cli.prompting.system import with_system, without_system
from cai_cli.runtime.config import Effect, Group, Option, option, redefine
from cai_cli.runtime.cost import RowFlow, StepCost, TokenCounts
from cai_cli.runtime.manifest import hash_input, provenance
from cai_cli.runtime.output_files import is_stdout, is_stream
from cai_cli.runtime.shared_options import InputOptions, OutputOptions
from cai_cli.runtime.sinks import stream_sink
from cai_cli.runtime.stage import Phase, Stage
from cai_cli.runtime.stage_run import Skipped, StageRun, WorkItem, WorkItems
from cai_cli.runtime.summary import print_summary, refuse_all_rejected

BATCH = 64
ROLES = ("preferred", "other")
PREFERRED = "constitution"  # the principle of a vote for replies that no single principle was drawn for


class PairsConfig(OutputOptions):
    """Make preference pairs from replies that were sampled under different system prompts.

    SAMPLES: two files of Sample rows, joined by id and sample index: the preferred replies, then the others, such as
    those of `cai sample --contrast following` and `--contrast breaking`. Writes Preference rows, without the system
    prompts that the replies were sampled with.
    """

    input: list[str] = option(
        ...,
        "The preferred replies, then the others.",
        Option(Effect.HASHED, Group.INPUT, metavar="SAMPLES...", reads_file=True, argument=True),
    )
    limit: int | None = redefine(InputOptions, "limit", None, "Read only the first N rows of each file.")
    p_chosen: float = option(1.0, "The label: the probability that the preferred reply is better.", ge=0.5, le=1.0)
    max_similarity: float = option(
        1.0,
        "Skip pairs whose replies are more alike than this: the Jaccard similarity of their sets of character 5-grams.",
        ge=0.0,
        le=1.0,
    )
    skip_cut_off: bool = option(
        False, "Skip pairs with a reply that was cut off at the length limit.", Option(flags=("--skip-cut-off",))
    )

    def check(self) -> None:
        super().check()
        if len(self.input) != 2:
            raise UsageError("give two files: the preferred replies and the others", code="missing-option")


def reply_problem(chosen: Sample, rejected: Sample, config: PairsConfig) -> str | None:
    """Why two replies make no pair; None where they do."""
    if problem := pair_problem(chosen.completion, rejected.completion):
        return problem
    if config.skip_cut_off and CUT_OFF in (chosen.finish_reason, rejected.finish_reason):
        return "cut off at the length limit"
    if config.max_similarity < 1 and similarity(chosen.reply, rejected.reply) > config.max_similarity:
        return "nearly identical replies"
    return None


def preference(chosen: Sample, rejected: Sample, p_chosen: float) -> Preference:
    """The preference of `chosen` over `rejected`, under the prompt without the system prompt of a character."""
    drawn = chosen.principle_id if isinstance(chosen, ContrastSample) else PREFERRED
    return Preference(
        id=chosen.key,
        prompt=_prompt(rejected),
        chosen=chosen.completion,
        rejected=rejected.completion,
        p_chosen=p_chosen,
        votes=[Vote(principle_id=drawn, method="unjudged", order="ab", p_first=p_chosen, rationale=None)],
        human=None,
        source=chosen.source,
        chosen_finish_reason=chosen.finish_reason,
        rejected_finish_reason=rejected.finish_reason,
    )


def _prompt(rejected: Sample) -> list[Message]:
    if not isinstance(rejected, ContrastSample):
        return rejected.prompt
    prompt = without_system(rejected.prompt)
    return with_system(prompt, rejected.own_system) if rejected.own_system else prompt


def pair_items(config: PairsConfig) -> WorkItems[Preference]:
    """Yield a preference for each reply of the first file that has a partner in the second, which is in memory.

    Raises:
        InvalidRow: A row is not valid, a reply is repeated, or the replies do not belong together.
    """
    preferred, other = config.input
    partners = {row.key: (line, row) for line, row in _distinct(other, config.limit)}
    for line, chosen in _distinct(preferred, config.limit):
        _, rejected = partners.pop(chosen.key, (0, None))
        if rejected is None:
            yield Skipped("no other reply", line)
            continue
        if reason := _mismatch(chosen, rejected):
            raise InvalidRow(display_name(preferred), line, reason, code="invalid-row")
        if problem := reply_problem(chosen, rejected, config):
            yield Skipped(problem, line)
        else:
            yield WorkItem(chosen.key, line, preference(chosen, rejected, config.p_chosen))
    yield from (Skipped("no preferred reply", line) for line, _ in partners.values())


def _mismatch(chosen: Sample, rejected: Sample) -> str | None:
    if without_system(chosen.prompt) != without_system(rejected.prompt):
        return f"id {chosen.id!r} has a different prompt in the other file"
    if not isinstance(chosen, ContrastSample) and not isinstance(rejected, ContrastSample):
        return None
    if getattr(chosen, "own_system", None) != getattr(rejected, "own_system", None):
        return f"id {chosen.id!r} has a different system prompt in the other file"
    sides = [getattr(row, "contrast", "no contrast") for row in (chosen, rejected)]
    if sides != ["following", "breaking"]:
        return f"the files must hold replies of following and breaking, not of {' and '.join(sides)}"
    if getattr(chosen, "principle_id", None) != getattr(rejected, "principle_id", None):
        return f"the two replies {chosen.key!r} have different principles: sample both with the same --seed"
    return None


def _distinct(file: str, limit: int | None) -> Iterator[Numbered[Sample]]:
    lines: dict[str, int] = {}
    for line, row in islice(read_rows(file, completed_row), limit):
        if lines.setdefault(row.key, line) != line:
            raise InvalidRow(
                display_name(file), line, f"{row.key!r} repeats line {lines[row.key]}", code="duplicate-id"
            )
        yield line, row


def _as_they_are(pairs: Sequence[Preference]) -> Sequence[Preference]:
    return pairs


def estimate(rows: RowFlow, config: PairsConfig) -> StepCost:
    """Return the rows; pairing costs no tokens."""
    after = RowFlow(rows.rows, 1, rows.prompt_tokens, rows.reply_tokens, texts=2)
    return StepCost(rows.rows, 0, TokenCounts(), after)


def run(config: PairsConfig) -> dict[str, Any]:
    """Pair the replies of two files, and audit the labels. Returns the summary. Raises CaiError."""
    inputs = {role: hash_input(file) for role, file in zip(ROLES, config.input, strict=True)}
    if piped := [display_name(file.name) for file in inputs.values() if file.is_pipe]:
        raise UsageError(f"{piped[0]} is a pipe; replies are paired from files", code="invalid-option")
    audit = LabelAudit()
    summary = StageRun(
        provenance=provenance(
            "pairs", inputs=inputs, settings=config.settings(), **provenance_of(config.input[0], "constitution")
        ),
        inputs=inputs,
        output=config.output,
        overwrite=config.overwrite,
        items=lambda: pair_items(config),
        work=_as_they_are,
        batch_size=BATCH,
    ).complete(stream_sink(config.output, audit.add))
    summary = {**summary, "audit": audit.audit() if is_stream(config.output) else audit_file(config.output)}
    print_summary(summary, as_json=config.as_json, stdout_is_data=is_stdout(config.output))
    if summary["out"]:
        print_verdict(summary["audit"])
    refuse_all_rejected(summary)
    return summary


STAGE = Stage("pairs", Phase.FEEDBACK, PairsConfig, run, estimate, reads=(Sample, ContrastSample), writes=Preference)
