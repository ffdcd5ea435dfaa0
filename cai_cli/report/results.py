"""The results that the report reads: comparisons, sweeps, and the rounds and the outcome in `run.json`."""

from pydantic import BaseModel, ConfigDict


class Result(BaseModel):
    """A file of results that another command wrote to the run folder."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


class ReportedEstimate(Result):
    """A value with its 95% interval, counted over `n`."""

    value: float
    low: float
    high: float
    n: int


class Rating(ReportedEstimate):
    """The Elo rating of a model."""

    model: str


class Ratings(Result):
    """Elo ratings on the paper's two axes."""

    harmless: list[Rating] = []
    helpful: list[Rating] = []


class WinRate(ReportedEstimate):
    """How often `a` wins against `b` over prompts of one kind."""

    a: str
    b: str
    kind: str | None


class Simultaneous(Result):
    """Number of simultaneous intervals in a comparison; 1 where they are not adjusted, as before version 0.2."""

    win_rates: int = 1
    ratings: int = 1


class ComparisonResult(Result):
    """`NAME.compare.json`: Elo ratings with intervals on the paper's two axes, and win rates."""

    models: list[str]
    ratings: Ratings
    win_rates: list[WinRate] = []
    simultaneous: Simultaneous = Simultaneous()


class Point(ReportedEstimate):
    """The metric for the value `at` of the setting."""

    at: float


class Sweep(Result):
    """`NAME.sweep.json`: how one metric, `figure`, changes with one setting; `simultaneous` as in a comparison."""

    setting: str
    figure: str
    points: list[Point]
    simultaneous: int = 1


class RoundResult(Result):
    """One round: the monitor's mean score and its rise, None without a monitor, and what the round used."""

    round: int
    monitor: ReportedEstimate | None = None
    rise: ReportedEstimate | None = None
    tokens: int
    money: float
    hours: float


class RoundsResult(Result):
    """A block of rounds: how many were run, the round of the result, and why they ended early."""

    repeat: int
    ran: int
    result: int
    reason: str | None
    rounds: list[RoundResult]


class BeforeAfter(Result):
    """A share before and after, and its change; None where there is nothing to count."""

    before: ReportedEstimate | None = None
    after: ReportedEstimate | None = None
    change: ReportedEstimate | None = None


class RecordedStep(Result):
    """What `run.json` records of a step, as far as the report reads it."""

    argv: list[str] = []
    seconds: float | None = None
    status: str | None = None


class MeanWords(Result):
    """The mean number of words of a reply, before and after."""

    before: float | None = None
    after: float | None = None


class OutcomeResult(Result):
    """What the run changed.

    Attributes:
        start: The name of the start model.
        final: The name of the final model.
        replies: Model -> the file of its replies, relative to the run folder.
        judge: What decided the comparisons.
        win_rate: Of the final model over the start model.
        win_rate_red_team: The same on red-team prompts.
        win_rate_helpful: The same on helpful prompts.
        refusals_red_team: Refusals of red-team prompts.
        refusals_helpful: Refusals of helpful prompts.
        cut_off: Replies that were cut off at the length limit.
        words: The mean length of a reply, before and after.
        seen_in_training: The number of prompts that the run trained on, which are left out.
        seen_prompts: Their ids.
    """

    start: str
    final: str
    replies: dict[str, str]
    judge: str | None = None
    win_rate: ReportedEstimate | None = None
    win_rate_red_team: ReportedEstimate | None = None
    win_rate_helpful: ReportedEstimate | None = None
    refusals_red_team: BeforeAfter | None = None
    refusals_helpful: BeforeAfter | None = None
    cut_off: BeforeAfter | None = None
    words: MeanWords = MeanWords()
    seen_in_training: int = 0
    seen_prompts: list[str] = []
