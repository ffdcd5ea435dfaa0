"""Compares several models on the same prompts, two at a time (`cai eval compare`; paper section 4.3).

In the paper, crowdworkers decide which of two models' replies is better, for harmlessness and for helpfulness
separately. Departure: here a preference model decides (`--pm`: the difference of two scores is the log-odds) or a judge
(`--judge`: prompted as by `label-prefs`, in both orders, under principles). A judge compares replies to helpful prompts
by their helpfulness, and all others under the principles. Sampling is a separate stage: the inputs are outputs of
`cai sample`.
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
from cai_cli.data.evaluation_schema import ModelComparison
from cai_cli.data.formats import sample_or_revision
from cai_cli.data.jsonl import display_name, read_rows, rows_of
from cai_cli.data.schema import Kind, Pair, Rejected, Revision, Sample, Vote, reject
from cai_cli.engines.base import Engine, RequestFailure
from cai_cli.judging.base import sigmoid
from cai_cli.judging.by_kind import votes_by_kind
from cai_cli.judging.labeller import JudgeOptions, estimate_votes, labeller_settings, open_labeller
from cai_cli.judging.votes import Labeller
from cai_cli.metrics.elo import Tournament
from cai_cli.metrics.intervals import fewest_clusters, with_interval
from cai_cli.reward.scorer import Scorer, refuse_int8
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
    kind: Kind | None = option(None, "Kind of the prompts that have no `kind`.")
    only: Kind | None = option(
        None, "Compare only replies to prompts of this kind, as where --pm was trained on one kind alone."
    )

    def check(self) -> None:
        super().check()
        if (self.pm is None) == (self.judge is None):
            raise UsageError("give either --pm or --judge", code="option-conflict")
        if self.pm:
            refuse_int8(self)


@dataclass(frozen=True)
class ReplyPair:
    """The replies of two models to one prompt, to be compared."""

    id: str
    kind: Kind | None
    model_a: str
    model_b: str
    a: Sample
    b: Sample

    @property
    def pair(self) -> Pair:
        """The two replies, as a judge compares them."""
        a, b = self.a.completion, self.b.completion
        return Pair(id=self.id, prompt=self.a.prompt, a=a, b=b, human=None, source=self.a.source)

    def comparison(
        self, p_a: float, scores: tuple[float | None, float | None] = (None, None), votes: Sequence[Vote] = ()
    ) -> ModelComparison:
        """Return the row of this comparison.

        Args:
            p_a: Probability that the reply of `model_a` is better.
            scores: Scores of the two replies (logits), where a preference model decided.
            votes: The judge's votes, where a judge decided.
        """
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


# --- pairing the replies ------------------------------------------------------------------------------------------


def name_files(given: Sequence[str]) -> dict[str, str]:
    """Return model name -> file.

    Args:
        given: FILE, which is named by its file name, or NAME=FILE.

    Raises:
        UsageError: Two models have the same name, or there are fewer than two.

    Examples:
        >>> name_files(["start.jsonl", "better=runs/sl.jsonl"])
        {'start': 'start.jsonl', 'better': 'runs/sl.jsonl'}
    """
    files = by_model_name(given, "FILE")
    if len(files) < 2:
        raise UsageError("a comparison needs the samples of two or more models", code="missing-option")
    return files


def by_model_name(given: Sequence[str], what: str) -> dict[str, str]:
    """Return model name -> file or model, for each X or NAME=X; `what` is X in the error.

    Raises:
        UsageError: Two have the same name.
    """
    found: dict[str, str] = {}
    for text in given:
        named = None if Path(text).exists() else NAMED.fullmatch(text)
        name, value = (named[1], named[2]) if named else (_name_of(text), text)
        if name in found:
            hint = f"name them: NAME={what}"
            raise UsageError(f"two models have the name {name!r}", hint=hint, code="option-conflict")
        found[name] = value
    return found


def _name_of(file: str) -> str:
    """Return the name of a file without its endings; characters with a special meaning (space, colon) become dashes."""
    return re.sub(r"[^\w.,@=+-]+", "-", re.sub(r"\.jsonl(\.zst|\.gz)?$", "", Path(display_name(file)).name))


def reply_pairs(
    files: Mapping[str, str], kind: Kind | None, limit: int | None, only: Kind | None = None
) -> WorkItems[ReplyPair]:
    """Yield the replies of every two models to every prompt, and for each sample of it; all samples are in memory.

    A prompt to which one of two models has no reply is skipped. So is one of another kind than `only`, before `limit`.

    Args:
        files: Model name -> file of samples.
        kind: The kind of prompts whose rows have none.
        limit: Largest number of prompts and samples, or None.
        only: The kind of prompts to compare; None for all.

    Raises:
        InvalidRow: A row is not valid, a reply is repeated, or an id has another prompt or kind in another file.
    """
    tables = {name: _samples(file) for name, file in files.items()}
    kinds = _kinds(tables, files, kind)
    for of_another_kind in (k for k in kinds.values() if only not in (None, k)):
        yield Skipped(f"the prompt is {of_another_kind or 'of no kind'}, not {only}", 0)
    for key in islice((key for key, of_key in kinds.items() if only in (None, of_key)), limit):
        replies = {name: table[key] for name, table in tables.items() if key in table}
        _, first = next(iter(replies.values()))
        for name, (line, sample) in replies.items():
            if sample.prompt != first.prompt:
                reason = f"id {sample.id!r} has a different prompt in another file"
                raise InvalidRow(display_name(files[name]), line, reason, code="invalid-row")
        for a, b in combinations(tables, 2):
            if without_reply := [name for name in (a, b) if name not in replies]:
                yield Skipped(f"no reply of {' or '.join(without_reply)}", 0)
                continue
            (line, one), (_, other) = replies[a], replies[b]
            yield WorkItem(f"{key} {a}:{b}", line, ReplyPair(f"{key} {a}:{b}", kinds[key], a, b, one, other))


def _kinds(
    tables: Mapping[str, Mapping[str, tuple[int, Sample]]], files: Mapping[str, str], kind: Kind | None
) -> dict[str, Kind | None]:
    """The kind of each prompt in the first file that has one, else `kind`. Raises InvalidRow where two files differ."""
    kinds: dict[str, Kind | None] = {}
    for name, table in tables.items():
        for key, (line, sample) in table.items():
            known = kinds.setdefault(key, sample.kind)
            if known and sample.kind and known != sample.kind:
                reason = f"id {sample.id!r} is {sample.kind} here and {known} in another file"
                raise InvalidRow(display_name(files[name]), line, reason, code="invalid-row")
            kinds[key] = known or sample.kind
    return {key: found or kind for key, found in kinds.items()}


def _samples(file: str) -> dict[str, tuple[int, Sample]]:
    """Return the replies in `file` with their lines, by prompt id and sample index."""
    table: dict[str, tuple[int, Sample]] = {}
    for line, row in read_rows(file, sample_or_revision):
        if row.key in table:
            reason = f"{row.key!r} repeats line {table[row.key][0]}"
            raise InvalidRow(display_name(file), line, reason, code="duplicate-id")
        table[row.key] = (line, row)
    return table


# --- comparing them -----------------------------------------------------------------------------------------------


def compare_by_scores(pairs: Sequence[ReplyPair], scorer: Scorer) -> list[ModelComparison | Rejected]:
    """Return one comparison for each pair, in order, by the difference of two scores (paper section 4.1).

    Args:
        pairs: The replies to compare; a reply in several pairs is scored once.
        scorer: The preference model.
    """
    replies = {(model, sample.key): sample for pair in pairs for model, sample in _sides(pair)}
    scores = dict(zip(replies, scorer.score(list(replies.values())), strict=True))
    outcomes: list[ModelComparison | Rejected] = []
    for pair in pairs:
        a, b = (scores[model, sample.key] for model, sample in _sides(pair))
        if isinstance(a, Rejected) or isinstance(b, Rejected):
            why = next(scored.reason for scored in (a, b) if isinstance(scored, Rejected))
            outcomes.append(reject(pair.id, why, pair.pair))
        else:
            outcomes.append(pair.comparison(sigmoid(a.score - b.score), (a.score, b.score)))
    return outcomes


def _sides(pair: ReplyPair) -> tuple[tuple[str, Sample], tuple[str, Sample]]:
    return (pair.model_a, pair.a), (pair.model_b, pair.b)


def compare_by_votes(pairs: Sequence[ReplyPair], labeller: Labeller) -> list[ModelComparison | Rejected]:
    """Return one comparison for each pair, in order, by the mean of a judge's votes; equal replies tie without a vote.

    Args:
        pairs: The replies to compare.
        labeller: The judge and its principles, which are replaced by helpfulness for prompts of that kind.
    """
    different = [pair for pair in pairs if pair.a.completion != pair.b.completion]
    judged = votes_by_kind([pair.pair for pair in different], [pair.kind for pair in different], labeller)
    verdicts = {pair.id: verdict for pair, verdict in zip(different, judged, strict=True)}
    outcomes: list[ModelComparison | Rejected] = []
    for pair in pairs:
        verdict = verdicts.get(pair.id)
        if verdict is None:
            outcomes.append(pair.comparison(0.5))
        elif isinstance(verdict, RequestFailure):
            outcomes.append(reject(pair.id, verdict.reason, pair.pair))
        else:
            outcomes.append(pair.comparison(verdict.p_a, votes=verdict.as_rows(labeller.judge.method)))
    return outcomes


# --- the command --------------------------------------------------------------------------------------------------


def print_result(result: Mapping[str, Any]) -> None:
    """Print the result of a `Tournament` on stderr; a model is called better only where the interval shows it."""
    for rate in result["win_rates"]:
        console.say(_sentence(rate, len(result["win_rates"])))
    for axis, ratings in result["ratings"].items():
        for r in ratings:
            console.say(f"Elo, {axis}: {r['model']} {with_interval(r, '.0f')}")
    counts = [f"{n:,} {name.replace('_', ' ')}" for name, n in result["simultaneous"].items() if n > 1]
    if counts:
        console.say(f"the 95% intervals are simultaneous over {', over '.join(counts)}")


def _sentence(rate: Mapping[str, Any], among: int) -> str:
    """Return a win rate, one of `among` simultaneous ones, in words."""
    a, b, kind = rate["a"], rate["b"], rate["kind"] or "other"
    value, low, high = rate["value"], rate["low"], rate["high"]
    if high < 0.5:
        a, b, value, low, high = b, a, 1 - value, 1 - high, 1 - low
    verdict = f"no significant difference between {a} and {b}"
    if low > 0.5:
        verdict = f"{a} is better than {b}"
    elif rate["prompts"] < fewest_clusters(among):
        prompts = "1 prompt is" if rate["prompts"] == 1 else f"{rate['prompts']} prompts are"
        verdict = f"{prompts} too few to compare {a} and {b} ({fewest_clusters(among)} are needed)"
    won = f"{a} wins {value:.0%} ({low:.0%} to {high:.0%}) of {rate['n']:,}, with {rate['ties']:,} ties counted half"
    return f"{kind} prompts: {verdict}: {won}"


def _result_of(output: str, models: Sequence[str]) -> dict[str, Any]:
    tournament = Tournament(models)
    for _, row in read_rows(output, rows_of(ModelComparison)):
        tournament.add(row)
    return tournament.result()


def estimate(rows: RowFlow, config: CompareConfig) -> StepCost:
    """Return the cost of comparing every two models on every prompt."""
    models = len(config.input)
    pairs = replace(rows, rows=rows.rows * models * (models - 1) // 2, per_prompt=1)
    if config.judge:
        return estimate_votes(pairs.rows, pairs, config, both_orders=True)
    tokens = rows.rows * models * (rows.prompt_tokens + rows.reply_tokens)
    return StepCost(pairs.rows, 0, TokenCounts(tokens), pairs)


@dataclass(frozen=True)
class Comparer:
    """How replies are compared, and the parts of the provenance that describe it."""

    work: Callable[[Sequence[ReplyPair]], list[ModelComparison | Rejected]]
    batch_size: int
    engine: Engine | None
    provenance: Mapping[str, Any]


def open_comparer(config: CompareConfig, models: Sequence[str]) -> Comparer:
    """The comparer that the options describe. Raises UsageError, CaiError."""
    named = {"models": list(models)} | ({"only": config.only} if config.only else {})  # earlier versions had no `only`
    if config.judge is None:
        scorer = Scorer.of_evaluation(str(config.pm), config)
        settings = {"kind": config.kind, "limit": config.limit} | named | scorer.precision()
        work = partial(compare_by_scores, scorer=scorer)
        recorded = {"settings": settings, "pm": scorer.identity()}
        return Comparer(work, 4 * scorer.batch_size, None, recorded)
    labeller, loaded = open_labeller(config, config.judge, both_orders=True)
    engine = labeller.judge.engine
    recorded = {
        "settings": labeller_settings(config, labeller) | named,
        "constitution": {"name": loaded.name, "fingerprint": loaded.fingerprint()},
        "model": engine.identity(),
    }
    return Comparer(partial(compare_by_votes, labeller=labeller), engine.batch_size, engine, recorded)


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
        items=lambda: reply_pairs(files, config.kind, config.limit, config.only),
        work=comparer.work,
        batch_size=comparer.batch_size,
        engine=comparer.engine,
    ).complete(stream_sink(config.output, tournament.observe))
    result = tournament.result() if is_stream(config.output) else _result_of(config.output, list(files))
    if not is_stream(config.output):
        write_json(sidecar(Path(config.output), "compare.json"), result)
    summary = {**summary, **result}
    print_summary(summary, as_json=config.as_json, stdout_is_data=is_stdout(config.output))
    print_result(result)
    refuse_all_rejected(summary)
    return summary


STAGE = Stage(
    "eval compare", Phase.EVALUATION, CompareConfig, run, estimate, reads=(Sample, Revision), writes=ModelComparison
)
