"""`cai eval compare`: several models over the same prompts, compared two by two (paper section 4.3).

The paper asks crowdworkers which of two models' replies is better, on harmlessness and on helpfulness apart. Departure:
here a preference model (`--pm`: the difference of two scores is the log-odds) or a judge (`--judge`: as `label-prefs`
asks it, in both orders, under principles) is asked. A judge compares replies to helpful prompts by their helpfulness,
all others under the principles. Sampling is a stage of its own: what is compared are files of `cai sample`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, islice
from pathlib import Path
from typing import Any

from cai_cli.common import console
from cai_cli.common.errors import InvalidRow, UsageError
from cai_cli.data.formats import sample_or_revision
from cai_cli.data.jsonl import display_name, read_rows, rows_of
from cai_cli.data.schema import Kind, ModelComparison, Rejected, Revision, Sample, Vote, reject
from cai_cli.engines.base import Engine, RequestFailure
from cai_cli.judging.judge import sigmoid
from cai_cli.judging.labeller import JudgeOptions, estimate_votes, labeller_settings, open_labeller
from cai_cli.judging.pairs import Pair
from cai_cli.judging.votes import Labeller, PairVerdict, aggregate_votes
from cai_cli.metrics.elo import Tournament
from cai_cli.prompting.evaluation import HELPFULNESS
from cai_cli.reward.scorer import Scorer
from cai_cli.runtime.config import Effect, Group, Option, option, redefine
from cai_cli.runtime.cost import RowFlow, StepCost, TokenCounts
from cai_cli.runtime.manifest import hash_input, provenance, write_json
from cai_cli.runtime.output_files import is_stdout, is_stream, sidecar
from cai_cli.runtime.shared_options import (
    InputOptions,
    OutputOptions,
)
from cai_cli.runtime.sinks import stream_sink
from cai_cli.runtime.stage import Phase, Stage
from cai_cli.runtime.stage_run import Skipped, StageRun, WorkItem, WorkItems
from cai_cli.runtime.summary import print_summary, refuse_all_rejected

NAMED = re.compile(r"([A-Za-z0-9][\w.-]*)=(.+)", re.ASCII | re.DOTALL)


class CompareConfig(OutputOptions, JudgeOptions):
    """Compare models by win rates and Elo ratings.

    SAMPLES: Sample (or Revision) rows of each model, joined by id. Writes one row for each prompt and pair of models,
    and the metrics to OUT.compare.json, for harmlessness (red-team prompts) and helpfulness.
    """

    input: list[str] = option(
        ...,
        "Sample files, one for each model: FILE or NAME=FILE, two or more.",
        Option(Effect.HASHED, Group.INPUT, metavar="SAMPLES...", reads_file=True, argument=True),
    )
    limit: int | None = redefine(InputOptions, "limit", None)
    pm: str | None = option(None, "Preference model that scores the replies.", Option(Effect.HASHED, Group.MODEL))
    judge: str | None = option(
        None,
        "Model that judges which reply is better.",
        Option(Effect.HASHED, Group.MODEL, flags=("--judge", "--model", "-m")),
    )
    kind: Kind | None = option(None, "Kind of the prompts that do not say.")

    def check(self) -> None:
        super().check()
        if (self.pm is None) == (self.judge is None):
            raise UsageError("give either --pm or --judge", code="option-conflict")


@dataclass(frozen=True)
class ReplyPair:
    """Two models' replies to one prompt, to be compared."""

    id: str
    kind: Kind | None
    model_a: str
    model_b: str
    a: Sample
    b: Sample

    @property
    def pair(self) -> Pair:
        sides = {"a": self.a.completion, "b": self.b.completion}
        return Pair(id=self.id, prompt=self.a.prompt, **sides, human=None, source=self.a.source)

    def duel(
        self, p_a: float, scores: tuple[float | None, float | None] = (None, None), votes: Sequence[Vote] = ()
    ) -> ModelComparison:
        return ModelComparison(
            id=self.id,
            prompt_id=self.a.id,
            sample_index=self.a.sample_index,
            prompt=self.a.prompt,
            kind=self.kind,
            model_a=self.model_a,
            model_b=self.model_b,
            a=self.a.completion,
            b=self.b.completion,
            score_a=scores[0],
            score_b=scores[1],
            p_a=p_a,
            votes=list(votes),
        )


# --- what is compared with what ----------------------------------------------------------------------------------


def name_files(given: Sequence[str]) -> dict[str, str]:
    """Model name -> file, of FILE (named by its file name) and NAME=FILE. Raises UsageError."""
    files: dict[str, str] = {}
    for text in given:
        named = None if Path(text).exists() else NAMED.fullmatch(text)
        name, file = (named[1], named[2]) if named else (_name_of(text), text)
        if name in files:
            raise UsageError(f"two models are called {name!r}", hint="give them names: NAME=FILE")
        files[name] = file
    if len(files) < 2:
        raise UsageError("a comparison needs the samples of two models or more")
    return files


def _name_of(file: str) -> str:
    """`sl-cai.jsonl` is called sl-cai; what could be taken apart elsewhere (spaces, colons) becomes a dash."""
    return re.sub(r"[^\w.,@=+-]+", "-", re.sub(r"\.jsonl(\.zst|\.gz)?$", "", Path(display_name(file)).name))


def match_units(files: Mapping[str, str], kind: Kind | None, limit: int | None) -> WorkItems[ReplyPair]:
    """Every two models on every prompt of any of them (and every sample of it); a prompt that one of two lacks is
    skipped. All samples are held in memory.

    Raises InvalidRow where a file holds a reply twice, or an id that means another prompt in another file.
    """
    tables = {name: _samples(file) for name, file in files.items()}
    for key in islice(dict.fromkeys(key for table in tables.values() for key in table), limit):
        found = {name: table[key] for name, table in tables.items() if key in table}
        _, first = next(iter(found.values()))
        for name, (line, sample) in found.items():
            if sample.prompt != first.prompt:
                raise InvalidRow(display_name(files[name]), line, f"id {sample.id!r} is another prompt in another file")
        for a, b in combinations(tables, 2):
            if lacking := [name for name in (a, b) if name not in found]:
                yield Skipped(f"no reply of {' or '.join(lacking)}", 0)
                continue
            (line, one), (_, other) = found[a], found[b]
            yield WorkItem(f"{key} {a}:{b}", line, ReplyPair(f"{key} {a}:{b}", first.kind or kind, a, b, one, other))


def _samples(file: str) -> dict[str, tuple[int, Sample]]:
    """The replies in `file` by prompt id and number, with their lines."""
    table: dict[str, tuple[int, Sample]] = {}
    for line, row in read_rows(file, sample_or_revision):
        if row.key in table:
            raise InvalidRow(display_name(file), line, f"{row.key!r} stands on line {table[row.key][0]} already")
        table[row.key] = (line, row)
    return table


# --- who compares --------------------------------------------------------------------------------------------------


def compare_by_scores(matches: Sequence[ReplyPair], scorer: Scorer) -> list[ModelComparison | Rejected]:
    """One comparison per match, in order, by the difference of two scores; every reply is scored once."""
    replies = {(m, s.key): s for match in matches for m, s in _sides(match)}
    scores = dict(zip(replies, scorer.score(list(replies.values())), strict=True))
    outcomes: list[ModelComparison | Rejected] = []
    for match in matches:
        a, b = (scores[model, sample.key] for model, sample in _sides(match))
        if isinstance(a, Rejected) or isinstance(b, Rejected):
            why = next(scored.reason for scored in (a, b) if isinstance(scored, Rejected))
            outcomes.append(reject(match.id, why, match.pair))
        else:
            outcomes.append(match.duel(sigmoid(a.score - b.score), (a.score, b.score)))
    return outcomes


def _sides(match: ReplyPair) -> tuple[tuple[str, Sample], tuple[str, Sample]]:
    return (match.model_a, match.a), (match.model_b, match.b)


def compare_by_votes(matches: Sequence[ReplyPair], labeller: Labeller) -> list[ModelComparison | Rejected]:
    """One comparison per match, in order, by the mean of a judge's votes. Equal replies are a tie without a vote."""
    helpful = replace(labeller, principles=[HELPFULNESS], per_pair=1)
    asked = [match for match in matches if match.a.completion != match.b.completion]
    opinions: dict[str, PairVerdict | RequestFailure] = {}
    for judge, mine in (
        (labeller, [m for m in asked if m.kind != "helpful"]),
        (helpful, [m for m in asked if m.kind == "helpful"]),
    ):
        opinions |= dict(zip([m.id for m in mine], aggregate_votes([m.pair for m in mine], judge), strict=True))
    outcomes: list[ModelComparison | Rejected] = []
    for match in matches:
        opinion = opinions.get(match.id)
        if opinion is None:
            outcomes.append(match.duel(0.5))
        elif isinstance(opinion, RequestFailure):
            outcomes.append(reject(match.id, opinion.reason, match.pair))
        else:
            outcomes.append(match.duel(opinion.p_a, votes=opinion.as_rows(labeller.judge.method)))
    return outcomes


# --- the shell -----------------------------------------------------------------------------------------------------


def say_result(found: Mapping[str, Any]) -> None:
    """Who wins, in words: better only where the interval says so."""
    for rate in found["win_rates"]:
        a, b, kind = rate["a"], rate["b"], rate["kind"] or "other"
        value, low, high = rate["value"], rate["low"], rate["high"]
        if high < 0.5:
            a, b, value, low, high = b, a, 1 - value, 1 - high, 1 - low
        verdict = f"{a} beats {b}" if low > 0.5 else f"no difference shown between {a} and {b}"
        won = f"{a} wins {value:.0%} ({low:.0%} to {high:.0%}) of {rate['n']:,}, {rate['ties']:,} ties counted half"
        console.say(f"{kind} prompts: {verdict}: {won}")
    for axis, ratings in found["ratings"].items():
        for r in ratings:
            console.say(f"Elo, {axis}: {r['model']} {r['value']:.0f} ({r['low']:.0f} to {r['high']:.0f})")


def _result_of(output: str, models: Sequence[str]) -> dict[str, Any]:
    tournament = Tournament(models)
    for _, row in read_rows(output, rows_of(ModelComparison)):
        tournament.add(row)
    return tournament.result()


def estimate(rows: RowFlow, config: CompareConfig) -> StepCost:
    """The cost of comparing every two models on every prompt."""
    models = len(config.input)
    pairs = replace(rows, rows=rows.rows * models * (models - 1) // 2, per_prompt=1)
    if config.judge:
        return estimate_votes(pairs.rows, pairs, config, both_orders=True)
    tokens = rows.rows * models * (rows.prompt_tokens + rows.reply_tokens)
    return StepCost(pairs.rows, 0, TokenCounts(tokens), pairs)


@dataclass(frozen=True)
class Comparer:
    """How replies are compared, and what of it decides the output."""

    work: Callable[[Sequence[ReplyPair]], list[ModelComparison | Rejected]]
    window: int
    engine: Engine | None
    provenance: Mapping[str, Any]


def open_comparer(config: CompareConfig, models: Sequence[str]) -> Comparer:
    """The comparer that the options describe. Raises UsageError, CaiError."""
    named = {"models": list(models)}
    if config.judge is None:
        scorer = Scorer(str(config.pm), config.batch_size, config.device)
        settings = {"kind": config.kind, "limit": config.limit} | named
        fingerprint = {"fingerprint": scorer.base.fingerprint}
        work = partial(compare_by_scores, scorer=scorer)
        return Comparer(work, 4 * scorer.batch_size, None, {"settings": settings, "pm": fingerprint})
    labeller, loaded = open_labeller(config, config.judge, both_orders=True)
    engine = labeller.judge.engine
    decided = {
        "settings": labeller_settings(config, labeller) | named,
        "constitution": {"name": loaded.name, "fingerprint": loaded.fingerprint()},
        "model": engine.identity(),
    }
    return Comparer(partial(compare_by_votes, labeller=labeller), engine.batch_size, engine, decided)


def run(config: CompareConfig) -> dict[str, Any]:
    """Compare the models of several files. Returns the summary. Raises CaiError."""
    files = name_files(config.input)
    comparer = open_comparer(config, list(files))
    inputs = {name: hash_input(file) for name, file in files.items()}
    if piped := [display_name(file.name) for file in inputs.values() if file.is_pipe]:
        raise UsageError(f"{piped[0]} is a pipe; samples are compared from files", code="invalid-option")
    tournament = Tournament(list(files))
    summary = StageRun(
        provenance=provenance("eval compare", inputs=inputs, **comparer.provenance),
        inputs=inputs,
        output=config.output,
        overwrite=config.overwrite,
        items=lambda: match_units(files, config.kind, config.limit),
        work=comparer.work,
        batch_size=comparer.window,
        engine=comparer.engine,
    ).complete(stream_sink(config.output, tournament.observe))
    found = tournament.result() if is_stream(config.output) else _result_of(config.output, list(files))
    if not is_stream(config.output):
        write_json(sidecar(Path(config.output), "compare.json"), found)
    summary = {**summary, **found}
    print_summary(summary, as_json=config.as_json, stdout_is_data=is_stdout(config.output))
    say_result(found)
    refuse_all_rejected(summary)
    return summary


STAGE = Stage(
    "eval compare", Phase.EVALUATION, CompareConfig, run, estimate, reads=(Sample, Revision), writes=ModelComparison
)
