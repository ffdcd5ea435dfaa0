"""The rows the page shows: revision chains, comparisons, and replies of several models to one prompt. Every list says
how many it shows of how many, and every text that is cut says so."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from markupsafe import escape

from cai_cli.common.console import safe
from cai_cli.data.schema import Message, Preference, Revision, Sample, Vote
from cai_cli.metrics.label_audit import flips
from cai_cli.report.collect import RunFiles, StepFiles
from cai_cli.report.word_diff import WordDiff, compare_words

T = TypeVar("T")
MAX_CHARACTERS = 6_000  # of one text; a longer one is cut, and says so
MAX_ROWS = 200


class Budget:
    """How much more of the page a list may take, in bytes of HTML."""

    def __init__(self, size: int) -> None:
        self.left, self.rows = size, MAX_ROWS

    def allows(self, *texts: str) -> bool:
        """Whether a row of these texts still fits; once one did not, none does, so that the first rows are shown."""
        needed = sum(len(str(escape(safe(text))).encode()) for text in texts) + 600
        fits = self.rows > 0 and needed <= self.left
        self.left, self.rows = (self.left - needed, self.rows - 1) if fits else (0, 0)
        return fits


@dataclass(frozen=True)
class Shown(Generic[T]):
    """The first rows of `total`, from the files `sources`."""

    rows: Sequence[T]
    total: int
    sources: Sequence[str]


@dataclass(frozen=True)
class ShownText:
    """A text as it is shown; `length` is that of the whole, in characters, when it was cut."""

    text: str
    length: int | None = None


def clip(text: str) -> ShownText:
    return ShownText(text) if len(text) <= MAX_CHARACTERS else ShownText(text[:MAX_CHARACTERS], len(text))


@dataclass(frozen=True)
class Round:
    number: int
    principle_id: str
    critique: ShownText | None
    words: WordDiff
    before: ShownText
    after: ShownText


@dataclass(frozen=True)
class Chain:
    """One reply and its revisions."""

    key: str
    kind: str | None
    prompt: Sequence[tuple[str, ShownText]]
    rounds: Sequence[Round]

    @property
    def principle_ids(self) -> list[str]:
        return list(dict.fromkeys(r.principle_id for r in self.rounds))

    @property
    def changed(self) -> float:
        """The largest share of words that a round changed."""
        return max(r.words.changed for r in self.rounds)


def chain(row: Revision) -> Chain:
    texts = [*(turn.response for turn in row.history), row.reply]
    rounds = []
    for turn, before, after in zip(row.history, texts[:-1], texts[1:], strict=True):
        shown, revised = clip(before), clip(after)
        rounds.append(
            Round(
                turn.round,
                turn.principle_id,
                None if turn.critique is None else clip(turn.critique),
                compare_words(shown.text, revised.text),
                shown,
                revised,
            )
        )
    return Chain(row.key, row.kind, turns(row.prompt), rounds)


def turns(messages: Sequence[Message]) -> list[tuple[str, ShownText]]:
    return [(message.role, clip(message.content)) for message in messages]


def chains(run: RunFiles, budget: Budget) -> Shown[Chain]:
    """The chains of the last revision steps: what a later one revised again is part of its rows."""
    steps = last_revisions(run)
    shown, total = [], 0
    for row in (row for step in steps for row in run.rows(step, Revision)):
        total += 1
        replies = [row.reply, *(turn.response for turn in row.history)]
        critiques = [turn.critique or "" for turn in row.history]
        if budget.allows(*_texts(row.prompt), *_cut(replies), *_cut(replies), *_cut(critiques)):
            shown.append(chain(row))
    return Shown(shown, total, [step.output.name for step in steps])


def last_revisions(run: RunFiles) -> list[StepFiles]:
    revised = run.of("revise", "critique-revise")
    read = {name for step in [*revised, *run.of("critique")] for name in step.reads}
    return [step for step in revised if step.output.name not in read]


def _texts(messages: Sequence[Message]) -> list[str]:
    return _cut([message.content for message in messages])


def _cut(texts: Sequence[str]) -> list[str]:
    return [text[:MAX_CHARACTERS] for text in texts]


@dataclass(frozen=True)
class ComparedReplies:
    """One comparison, the votes in the order asked."""

    key: str
    prompt: Sequence[tuple[str, ShownText]]
    chosen: ShownText
    rejected: ShownText
    p_chosen: float
    votes: Sequence[Vote]
    human: str | None

    @property
    def principle_ids(self) -> list[str]:
        return list(dict.fromkeys(vote.principle_id for vote in self.votes))

    @property
    def flipped(self) -> bool:
        """Whether under some principle another reply won in each order."""
        return any(flips(self.votes))


def compared(row: Preference) -> ComparedReplies:
    chosen, rejected = clip(row.chosen[0].content), clip(row.rejected[0].content)
    return ComparedReplies(row.id, turns(row.prompt), chosen, rejected, row.p_chosen, row.votes, row.human)


def comparisons(rows: Iterator[Preference], budget: Budget, sources: Sequence[str]) -> Shown[ComparedReplies]:
    shown, total = [], 0
    for row in rows:
        total += 1
        if budget.allows(*_texts([*row.prompt, *row.chosen, *row.rejected])):
            shown.append(compared(row))
    return Shown(shown, total, sources)


@dataclass(frozen=True)
class ShownReply:
    text: ShownText
    cut_off: bool


@dataclass(frozen=True)
class SideBySide:
    """The first reply of several models to one prompt; None where a model was not asked."""

    key: str
    prompt: Sequence[tuple[str, ShownText]]
    replies: Mapping[str, ShownReply | None]


def side_by_side(run: RunFiles, budget: Budget) -> Shown[SideBySide] | None:
    """Replies to the prompts that the last sampled model was asked and an earlier one too, by prompt id, models in
    the order of the road. None where no two models were asked the same."""
    steps = run.of("sample")
    for last in reversed(steps):
        rows = {row.id: row.prompt for row in run.rows(last, Sample)}
        asked, sources = _asked(run, steps, rows.keys())
        if len(asked) > 1:
            break
    else:
        return None
    common = [key for key in rows if sum(key in found for found in asked.values()) > 1]
    shown = []
    for key in common:
        found = {name: replies.get(key) for name, replies in asked.items()}
        if budget.allows(*_texts(rows[key]), *(text.text.text for text in found.values() if text)):
            shown.append(SideBySide(key, turns(rows[key]), found))
    return Shown(shown, len(common), sources)


def _asked(
    run: RunFiles, steps: Sequence[StepFiles], wanted: Collection[str]
) -> tuple[dict[str, dict[str, ShownReply]], list[str]]:
    """Model -> prompt id -> its first reply, for the prompts wanted, and the files they stand in; models and files
    without any are left out."""
    found: dict[str, dict[str, ShownReply]] = {}
    sources: dict[str, None] = {}
    for step in steps:
        rows = (row for row in run.rows(step, Sample) if row.sample_index == 0 and row.id in wanted)
        for row in rows:
            sources[step.output.name] = None
            replies = found.setdefault(model_label(run, step), {})
            replies.setdefault(row.id, ShownReply(clip(row.reply), row.finish_reason == "length"))
    return found, list(sources)


def model_label(run: RunFiles, step: StepFiles) -> str:
    """The step that made the model, or the model's own name."""
    name = step.model or "the default model"
    made = {s.output.name: s.name for s in run.steps if s.is_model}
    return made.get(Path(name).name, name)
