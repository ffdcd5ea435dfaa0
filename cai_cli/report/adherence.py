"""The matrix of `cai eval adherence`: how often each model breaks each principle, with the conversations behind it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cai_cli.data.evaluation_schema import AdherenceResult
from cai_cli.metrics.adherence_table import significant
from cai_cli.report.collect import RunFiles, read_results
from cai_cli.report.examples import Budget, ClippedText, clip
from cai_cli.report.results import ReportedEstimate, Result

ENDING = ".adherence.json"
CONVERSATIONS = 2  # of each model and principle, on the page


class PrincipleRates(Result):
    """The rates of one principle by model, and the differences of the other models from the first."""

    id: str = ""
    scenarios: int = 0
    rates: dict[str, ReportedEstimate | None]
    differences: dict[str, ReportedEstimate | None]


class AuditOfJudge(Result):
    """Whether the judge can be trusted, and why."""

    trusted: bool | None
    reason: str
    replies: int
    failed: int
    opposite_answers: ReportedEstimate | None
    yes_share: ReportedEstimate | None
    between_phrasings: ReportedEstimate | None
    balanced_agreement: ReportedEstimate | None


class AdherenceFile(Result):
    """`OUT.adherence.json`."""

    models: list[str]
    principles: list[PrincipleRates]
    overall: PrincipleRates
    by_turn: dict[str, list[ReportedEstimate | None]]
    simultaneous: dict[str, int]
    judge: AuditOfJudge
    judge_model: str
    attacker: str | None


@dataclass(frozen=True)
class Cell:
    """One model under one principle: its rate, and 1 or -1 where it differs from the first model, else 0."""

    rate: Mapping[str, Any] | None
    sign: int


@dataclass(frozen=True)
class JudgedReplyText:
    """One message of a conversation; `yes` are the probabilities of Yes to the two questions, of a reply."""

    role: str
    text: ClippedText
    yes: Sequence[float] | None
    p_violation: float | None


@dataclass(frozen=True)
class JudgedConversation:
    """One conversation behind a cell."""

    key: str
    model: str
    questions: Sequence[str]
    messages: Sequence[JudgedReplyText]


@dataclass(frozen=True)
class MatrixRow:
    """One principle: a cell for each model, and the first conversations behind them."""

    id: str
    cells: Sequence[Cell]
    conversations: Sequence[JudgedConversation]


@dataclass(frozen=True)
class AdherenceMatrix:
    """One evaluation: its matrix, and the file that holds all conversations."""

    name: str
    file: str
    found: AdherenceFile
    rows: Sequence[MatrixRow]
    overall: Sequence[Cell]

    @property
    def numbers(self) -> tuple[list[str], list[list[Any]]]:
        """The matrix as a table of numbers."""
        columns = ["principle", "model", "rate", "low", "high", "replies"]
        of_all = [*((row.id, row.cells) for row in self.rows), ("all principles", self.overall)]
        table = [
            [id, model, *(cell.rate[name] for name in ("value", "low", "high", "n"))]
            for id, cells in of_all
            for model, cell in zip(self.found.models, cells, strict=True)
            if cell.rate
        ]
        return columns, table


def matrices(run: RunFiles, budget: Budget) -> list[AdherenceMatrix]:
    """Return the matrix of every evaluation in the run folder; the conversations fit `budget`."""
    found_matrices = []
    for result, found in read_results(run.folder, ENDING, AdherenceFile, run.problems).items():
        file = result.removesuffix(ENDING)
        conversations = _conversations(run, file, budget)
        rows = [MatrixRow(p.id, _cells(p, found), conversations.get(p.id, [])) for p in found.principles]
        name = file.removesuffix(".zst").removesuffix(".jsonl")
        found_matrices.append(AdherenceMatrix(name, file, found, rows, _cells(found.overall, found)))
    return found_matrices


def _cells(rates: PrincipleRates, found: AdherenceFile) -> list[Cell]:
    """The rates of the models. None is marked as changed where the judge is not to be trusted."""
    cells = []
    for model in found.models:
        rate, difference = rates.rates.get(model), rates.differences.get(model)
        claimed = difference if found.judge.trusted is not False else None
        sign = significant(claimed.model_dump() if claimed else None)  # type: ignore[arg-type]
        cells.append(Cell(rate.model_dump() if rate else None, sign))
    return cells


def _conversations(run: RunFiles, file: str, budget: Budget) -> dict[str, list[JudgedConversation]]:
    """Return the first conversations of each principle, those of all models together."""
    step = next((step for step in run.steps if step.output.name == file), None)
    kept: dict[tuple[str, str], list[AdherenceResult]] = {}
    for row in run.rows(step, AdherenceResult) if step else ():
        of_model = kept.setdefault((row.principle_id, row.model), [])
        if len(of_model) < CONVERSATIONS:
            of_model.append(row)
    by_principle: dict[str, list[AdherenceResult]] = {}
    for (principle, _), rows in kept.items():
        by_principle.setdefault(principle, []).extend(rows)
    return {
        principle: [
            _shown(row)
            for row in sorted(rows, key=lambda row: row.conversation)
            if budget.allows(*(message.content for message in row.messages), *row.questions)
        ]
        for principle, rows in by_principle.items()
    }


def _shown(row: AdherenceResult) -> JudgedConversation:
    from cai_cli.judging.base import sigmoid

    messages = []
    for place, message in enumerate(row.messages):
        turn = row.turns[place // 2] if message.role == "assistant" else None
        yes = [sigmoid(value) for value in turn.log_odds] if turn and turn.log_odds else None
        messages.append(JudgedReplyText(message.role, clip(message.content), yes, turn.p_violation if turn else None))
    return JudgedConversation(row.key, row.model, row.questions, messages)
