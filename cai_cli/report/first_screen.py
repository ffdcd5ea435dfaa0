"""The top of the page: what the run changed, in one sentence, in figures with intervals, and in three prompts.

The figures are the `outcome` of `run.json`. A run without one shows the prompts and the time of each step alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from cai_cli.common.errors import CaiError
from cai_cli.data.formats import sample_or_revision
from cai_cli.data.jsonl import read_rows
from cai_cli.data.reply_ends import CUT_OFF
from cai_cli.data.schema import Sample
from cai_cli.evaluate.outcome import REFUSALS, headline, is_refusal, kind_of_all
from cai_cli.report.collect import RunFiles, StepFiles
from cai_cli.report.examples import Budget, ModelReply, SideBySide, clip, messages_of, side_by_side
from cai_cli.report.results import OutcomeResult

SHOWN = 3
SHOWN_BYTES = 60_000
RULE = (
    "For each kind of prompt, the first that the final model refuses and the first that it does not, in the order of "
    "their file; the more common case comes first."
)
T = TypeVar("T")


@dataclass(frozen=True)
class Refusals:
    """Refusals of prompts of one kind, before and after, and the change."""

    kind: str
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    change: Mapping[str, Any]


@dataclass(frozen=True)
class StepTime:
    """What a step took. `share`: of the time of the longest step."""

    name: str
    command: str
    seconds: float
    share: float


@dataclass(frozen=True)
class FirstScreen:
    """What the top of the page shows.

    Attributes:
        headline: One sentence; empty without an outcome.
        outcome: The figures; None without an outcome.
        refusals: Refusals by kind of prompt.
        prompts: Prompts with the reply of each model.
        cut_off: Model -> (replies that were cut off, replies).
        times: The steps in order.
    """

    headline: str
    outcome: OutcomeResult | None
    refusals: Sequence[Refusals]
    prompts: Sequence[SideBySide]
    cut_off: Mapping[str, tuple[int, int]]
    times: Sequence[StepTime]

    @property
    def judge(self) -> str:
        """What decided the comparisons, with directories by their names alone."""
        parts = str((self.outcome and self.outcome.judge) or "").split("+")
        return "+".join(part.rstrip("/").rpartition("/")[2] for part in parts)

    @property
    def kind(self) -> str | None:
        """The kind of all prompts that were compared; None where there are several."""
        return kind_of_all(self.outcome.model_dump()) if self.outcome else None

    @property
    def rule(self) -> str:
        """How the prompts were chosen."""
        return RULE


def first_screen(run: RunFiles) -> FirstScreen:
    """Return the top of the page."""
    times = step_times(run)
    if run.outcome is None:
        compared = side_by_side(run, Budget(SHOWN_BYTES))
        return FirstScreen("", None, [], compared.rows[:SHOWN] if compared else [], {}, times)
    tables = {name: _replies(run, file) for name, file in run.outcome.replies.items()}
    return FirstScreen(
        headline(run.outcome.model_dump()),
        run.outcome,
        list(_refusals(run.outcome)),
        _prompts(tables, run.outcome.final),
        {name: _cut_off(table) for name, table in tables.items() if table},
        times,
    )


def _refusals(outcome: OutcomeResult) -> Iterable[Refusals]:
    for name, kind in REFUSALS.items():
        found = getattr(outcome, name)
        if found and found.before and found.after and found.change:
            yield Refusals(kind, *(part.model_dump() for part in (found.before, found.after, found.change)))


def _replies(run: RunFiles, file: str) -> list[Sample]:
    """The replies in a file, which is given relative to the run folder, to prompts that the run did not train on."""
    left_out = set(run.outcome.seen_prompts) if run.outcome else set()
    try:
        return [row for _, row in read_rows(str(run.folder / file), sample_or_revision) if row.id not in left_out]
    except CaiError as error:
        run.problems.append(f"{error.message}; the report leaves out its replies")
    except (OSError, ValueError) as error:  # a name that is not that of a file
        run.problems.append(f"the outcome names {file!r:.80}: {error}; the report leaves out its replies")
    return []


def _cut_off(rows: Sequence[Sample]) -> tuple[int, int]:
    return sum(row.finish_reason == CUT_OFF for row in rows), len(rows)


def _prompts(tables: Mapping[str, Sequence[Sample]], final: str) -> list[SideBySide]:
    """The prompts to show, which every model has answered, with the first reply of each model."""
    replies: dict[str, dict[str, Sample]] = {name: {} for name in tables}
    for name, rows in tables.items():
        for row in rows:
            replies[name].setdefault(row.id, row)
    first = next(iter(replies.values()), {})
    common = [id for id in first if all(id in of for of in replies.values())]
    of_final = replies.get(final, {})
    groups: list[list[SideBySide]] = []
    for kind in dict.fromkeys(first[id].kind for id in common):
        ids = [id for id in common if first[id].kind == kind]
        refuses = {id: id in of_final and is_refusal(of_final[id]) for id in ids}
        parts = (
            ([id for id in ids if refuses[id]], "refuses"),
            ([id for id in ids if not refuses[id]], "does not refuse"),
        )
        for part, does in sorted(parts, key=lambda pair: -len(pair[0])):
            caption = f"One of {len(part):,} {f'{kind} ' if kind else ''}prompts that {final} {does}"
            groups.append([_side_by_side(id, replies, caption) for id in part[:SHOWN]])
    return in_turn(groups)[:SHOWN]


def _side_by_side(id: str, of: Mapping[str, Mapping[str, Sample]], caption: str) -> SideBySide:
    replies = {
        name: ModelReply(clip(table[id].reply), table[id].finish_reason == CUT_OFF) for name, table in of.items()
    }
    return SideBySide(id, messages_of(next(iter(of.values()))[id].prompt), replies, caption)


def in_turn(groups: Sequence[Sequence[T]]) -> list[T]:
    """The first of each group, then the second of each, and so on.

    >>> in_turn([["a", "b", "c"], ["x"]])
    ['a', 'x', 'b', 'c']
    """
    longest = max(map(len, groups), default=0)
    return [group[place] for place in range(longest) for group in groups if place < len(group)]


def elapsed(step: StepFiles) -> float | None:
    """The seconds of a step from start to end, where `cai run` measured them; else those of its command's own work."""
    seconds = step.recorded.get("seconds")
    return step.seconds if seconds is None else float(seconds)


def step_times(run: RunFiles) -> list[StepTime]:
    """What each step took, in order; steps without a time are left out."""
    timed = [(step, seconds) for step in run.steps if (seconds := elapsed(step)) is not None]
    longest = max((seconds for _, seconds in timed), default=0.0) or 1.0
    return [StepTime(step.name, step.stage, seconds, seconds / longest) for step, seconds in timed]
