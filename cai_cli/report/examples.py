"""The rows on the page: revision chains, comparisons, and replies of several models to one prompt.

Every list states how many of its rows it shows, and every text that is cut says so.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from markupsafe import escape

from cai_cli.common.console import safe
from cai_cli.common.errors import CaiError
from cai_cli.data.jsonl import read_rows, rows_of
from cai_cli.data.reply_ends import CUT_OFF
from cai_cli.data.schema import Message, Preference, Revision, Sample, Vote
from cai_cli.metrics.label_audit import flips
from cai_cli.report.collect import RunFiles, StepFiles
from cai_cli.report.word_diff import WordDiff, compare_words
from cai_cli.runtime.manifest import hash_input

T = TypeVar("T")
MAX_CHARACTERS = 6_000  # of one text; a longer one is cut, and the page says so
MAX_ROWS = 200


class Budget:
    """The space on the page that is left for a list.

    Args:
        size: Size in bytes of HTML.
    """

    def __init__(self, size: int) -> None:
        self.left, self.rows = size, MAX_ROWS

    def parts(self, count: int) -> list["Budget"]:
        """The budget in equal parts, for lists that share it."""
        parts = [Budget(self.left // count) for _ in range(count)]
        for part in parts:
            part.rows = self.rows // count
        return parts

    def allows(self, *texts: str) -> bool:
        """Return whether a row of these texts still fits; after one that does not, no row fits.

        So the page shows the first rows, not the shortest ones.
        """
        needed = sum(len(str(escape(safe(text))).encode()) for text in texts) + 600
        fits = self.rows > 0 and needed <= self.left
        self.left, self.rows = (self.left - needed, self.rows - 1) if fits else (0, 0)
        return fits


@dataclass(frozen=True)
class Excerpt(Generic[T]):
    """The first `rows` of `total`, from the files `sources`."""

    rows: Sequence[T]
    total: int
    sources: Sequence[str]


@dataclass(frozen=True)
class ClippedText:
    """A text on the page. `length`: length in characters of the whole text, if it was cut."""

    text: str
    length: int | None = None


def clip(text: str) -> ClippedText:
    """Return `text`, cut to MAX_CHARACTERS."""
    return ClippedText(text) if len(text) <= MAX_CHARACTERS else ClippedText(text[:MAX_CHARACTERS], len(text))


@dataclass(frozen=True)
class Round:
    """One round of a chain: the critique, and the text before and after the revision."""

    number: int
    principle_id: str
    critique: ClippedText | None
    words: WordDiff
    before: ClippedText
    after: ClippedText


@dataclass(frozen=True)
class Chain:
    """One reply and its revisions. `source`: the file, where the list has chains of several."""

    key: str
    kind: str | None
    prompt: Sequence[tuple[str, ClippedText]]
    rounds: Sequence[Round]
    source: str | None = None

    @property
    def groups(self) -> list[str]:
        """What the list can be filtered by: the kind of the prompt and the file."""
        return [group for group in (self.kind, self.source) if group]

    @property
    def principle_ids(self) -> list[str]:
        """The principles of its rounds, each once."""
        return list(dict.fromkeys(r.principle_id for r in self.rounds))

    @property
    def changed(self) -> float:
        """The largest share of words that one round changed (0 to 1)."""
        return max(r.words.changed for r in self.rounds)


def chain(row: Revision, source: str | None = None) -> Chain:
    """Return the chain of a revision, which is from the file `source`."""
    texts = [*(one.response for one in row.history), row.reply]
    rounds = []
    for one, before, after in zip(row.history, map(clip, texts[:-1]), map(clip, texts[1:]), strict=True):
        critique = None if one.critique is None else clip(one.critique)
        words = compare_words(before.text, after.text)
        rounds.append(Round(one.round, one.principle_id, critique, words, before, after))
    return Chain(row.key, row.kind, messages_of(row.prompt), rounds, source)


def messages_of(messages: Sequence[Message]) -> list[tuple[str, ClippedText]]:
    """Return (role, text) of each message."""
    return [(message.role, clip(message.content)) for message in messages]


def chains(run: RunFiles, budget: Budget) -> Excerpt[Chain]:
    """Return the chains of the last revision steps, whose rows hold the earlier rounds too, and those of files that the
    run trained on beside them. The file with the most rows comes first; each has an equal part of the budget."""
    files = [(step.output.name, run.rows(step, Revision)) for step in last_revisions(run)]
    files += list(_mixed_in(run))
    lists: list[tuple[int, str, list[Chain]]] = []
    for (name, rows), part in zip(files, budget.parts(max(1, len(files))), strict=False):
        fitting, total = [], 0
        for row in rows:
            total += 1
            replies = [row.reply, *(one.response for one in row.history)]
            critiques = [one.critique or "" for one in row.history]
            if part.allows(*_texts(row.prompt), *_cut(replies), *_cut(replies), *_cut(critiques)):
                fitting.append(chain(row, name if len(files) > 1 else None))
        lists.append((total, name, fitting))
    lists.sort(key=lambda one: -one[0])
    shown = [one for _, _, fitting in lists for one in fitting]
    return Excerpt(shown, sum(total for total, _, _ in lists), [name for _, name, _ in lists])


def _mixed_in(run: RunFiles) -> Iterator[tuple[str, Iterator[Revision]]]:
    """The files of revisions outside the run that its `sft` steps mixed in (`--also`) and that are still the same."""
    for step in run.steps_of("sft"):
        hashes = step.provenance.get("input") or {}
        for role, name in (step.facts.get("inputs") or {}).items():
            path = Path(str(name))
            outside = path.is_file() and path.resolve().parent != run.folder.resolve()
            revisions = role.startswith("also ") and "helpful" not in role
            if revisions and outside and hash_input(str(path)).sha256 == hashes.get(role):
                yield str(name), _revisions(path)


def _revisions(path: Path) -> Iterator[Revision]:
    """The Revision rows of a file, up to a row of another type."""
    with suppress(CaiError):
        for _, row in read_rows(str(path), rows_of(Revision)):
            yield row


def last_revisions(run: RunFiles) -> list[StepFiles]:
    """Return the revision steps whose output no other revision step reads."""
    revised = run.steps_of("revise", "critique-revise")
    read = {name for step in [*revised, *run.steps_of("critique")] for name in step.reads}
    return [step for step in revised if step.output.name not in read]


def _texts(messages: Sequence[Message]) -> list[str]:
    return _cut([message.content for message in messages])


def _cut(texts: Sequence[str]) -> list[str]:
    return [text[:MAX_CHARACTERS] for text in texts]


@dataclass(frozen=True)
class ComparedReplies:
    """One labelled pair, with its votes in the order of the row."""

    key: str
    prompt: Sequence[tuple[str, ClippedText]]
    chosen: ClippedText
    rejected: ClippedText
    p_chosen: float
    votes: Sequence[Vote]
    human: str | None

    @property
    def principle_ids(self) -> list[str]:
        """The principles of its votes, each once."""
        return list(dict.fromkeys(vote.principle_id for vote in self.votes))

    @property
    def flipped(self) -> bool:
        """Whether, under some principle, the winner changed with the order."""
        return any(flips(self.votes))


def compared_replies(row: Preference) -> ComparedReplies:
    """Return the comparison of a label."""
    chosen, rejected = clip(row.chosen[0].content), clip(row.rejected[0].content)
    return ComparedReplies(row.id, messages_of(row.prompt), chosen, rejected, row.p_chosen, row.votes, row.human)


def comparisons(rows: Iterator[Preference], budget: Budget, sources: Sequence[str]) -> Excerpt[ComparedReplies]:
    """Return the first labels that fit the page; all `rows` are read."""
    fitting, total = [], 0
    for row in rows:
        total += 1
        if budget.allows(*_texts([*row.prompt, *row.chosen, *row.rejected])):
            fitting.append(compared_replies(row))
    return Excerpt(fitting, total, sources)


@dataclass(frozen=True)
class ModelReply:
    """The reply of one model. `cut_off`: whether it ended at the length limit."""

    text: ClippedText
    cut_off: bool


@dataclass(frozen=True)
class SideBySide:
    """The first reply of several models to one prompt; None where a model has no reply to it. `caption`: what the
    prompt stands for."""

    key: str
    prompt: Sequence[tuple[str, ClippedText]]
    replies: Mapping[str, ModelReply | None]
    caption: str = ""


def side_by_side(run: RunFiles, budget: Budget) -> Excerpt[SideBySide] | None:
    """Return the replies to the prompts of the last `sample` step that shares prompts with an earlier one.

    Returns:
        One entry for each prompt, with the models in the order of the run; None where no two models share a prompt.
    """
    # A character's replies, from `--contrast`, are not the model's own.
    steps = [s for s in run.steps_of("sample") if not (s.provenance.get("settings") or {}).get("contrast")]
    for last in reversed(steps):
        prompts = {row.id: row.prompt for row in run.rows(last, Sample)}
        replies, sources = _replies(run, steps, prompts.keys())
        if len(replies) > 1:
            break
    else:
        return None
    common = [key for key in prompts if sum(key in of_model for of_model in replies.values()) > 1]
    fitting = []
    for key in common:
        by_model = {name: of_model.get(key) for name, of_model in replies.items()}
        if budget.allows(*_texts(prompts[key]), *(reply.text.text for reply in by_model.values() if reply)):
            fitting.append(SideBySide(key, messages_of(prompts[key]), by_model))
    return Excerpt(fitting, len(common), sources)


def _replies(
    run: RunFiles, steps: Sequence[StepFiles], prompts: Collection[str]
) -> tuple[dict[str, dict[str, ModelReply]], list[str]]:
    """Return model -> prompt id -> first reply, for these prompts, and the files that hold the replies."""
    replies: dict[str, dict[str, ModelReply]] = {}
    sources: dict[str, None] = {}
    for step in steps:
        rows = (row for row in run.rows(step, Sample) if row.sample_index == 0 and row.id in prompts)
        for row in rows:
            sources[step.output.name] = None
            of_model = replies.setdefault(model_label(run, step), {})
            of_model.setdefault(row.id, ModelReply(clip(row.reply), row.finish_reason == CUT_OFF))
    return replies, list(sources)


def model_label(run: RunFiles, step: StepFiles) -> str:
    """Return the name of the step that made the model, or the model's own name."""
    name = step.model or "the default model"
    made = {s.output.name: s.name for s in run.steps if s.is_model}
    return made.get(Path(name).name, name)
