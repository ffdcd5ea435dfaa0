"""Learns principles from pairs with known preferences (`cai principles learn`).

Inverse constitutional AI (Findeis et al. 2024, arXiv 2406.06560) in four steps: a model proposes principles that
explain single preferences; near-duplicates are merged; the model votes on pairs under each candidate; the candidates
whose votes agree with the known preferences are kept. Departures: the paper clusters embeddings and keeps the
candidates with the most votes in their favour on the same pairs. Here candidates are merged by their wording
(`near_duplicates`), and a candidate is kept only where its agreement is shown to be above chance, corrected for the
number of candidates, on pairs of prompts that nothing was proposed from: of many candidates some always fit the pairs
that they come from.

The known preference is the human label of a pair, and the label of a judge where there is none. DIR holds each step as
a file, and the same command resumes an interrupted run.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from cai_cli.common import console
from cai_cli.common.errors import CaiError, UsageError
from cai_cli.common.files import write_atomically
from cai_cli.common.near_duplicates import NearDuplicates
from cai_cli.common.seeds import seed_for
from cai_cli.constitution.options import ConstitutionOptions
from cai_cli.constitution.schema import PreferenceConstitution, PreferencePrinciple, dump, open_constitution
from cai_cli.constitution.usage import CANDIDATES
from cai_cli.data.formats import parse_preference
from cai_cli.data.jsonl import display_name, origin, read_rows, rows_of
from cai_cli.data.reply_ends import CUT_OFF
from cai_cli.data.schema import Preference, ProposedPrinciple, Rejected, conversation_id, dump_row, reject
from cai_cli.data.splits import held_out_keys, pair_problem
from cai_cli.engines.base import Completion, Engine, GenerationRequest, RequestFailure, Sampling
from cai_cli.judging.labeller import JudgeOptions
from cai_cli.judging.methods import Method
from cai_cli.metrics.principle_ranking import rank_files
from cai_cli.metrics.ranking_table import ranking_lines
from cai_cli.phase2_feedback import label_prefs
from cai_cli.prompting.base import PromptFormat, resolve_prompt_format
from cai_cli.prompting.proposals import START, proposal_request, proposed_principle
from cai_cli.runtime.config import Effect, Group, Option, option, redefine
from cai_cli.runtime.manifest import hash_input, provenance, write_json
from cai_cli.runtime.output_files import is_stream, reuse_recorded_date
from cai_cli.runtime.shared_options import EngineOptions, InputOptions, RunOptions, SamplingOptions
from cai_cli.runtime.stage_run import StageRun, WorkItem, WorkItems
from cai_cli.runtime.summary import print_summary, refuse_all_rejected

PROPOSALS, PAIRS, VOTES = "proposals.jsonl", "test_pairs.jsonl", "votes.jsonl"
RANKING, LEARNED = "ranking.json", "constitution.yaml"
PROPOSAL_SETTINGS = ("limit", "seed", "max_new_tokens", "temperature", "top_p", "per_pair", "test_share")


class LearnConfig(RunOptions, InputOptions, EngineOptions, SamplingOptions):
    """Learn principles from pairs with known preferences (inverse constitutional AI).

    PAIRS: pairs with human labels, in any format that `cai label-prefs` reads, or Preference rows. Writes the directory
    DIR: `constitution.yaml` with the principles that are shown to agree with the preferences on held-out pairs,
    `votes.jsonl` with the votes of all candidates (`cai principles rank` reads them), and each step before.
    """

    input: str = option(
        ...,
        "Pairs with known preferences.",
        Option(Effect.HASHED, Group.INPUT, metavar="PAIRS", reads_file=True, argument=True),
    )
    output: str = option(
        ..., "Directory to write.", Option(Effect.HARMLESS, Group.OUTPUT, flags=("--output", "-o"), metavar="DIR")
    )
    per_pair: int = option(1, "Principles proposed for each pair.", ge=1)
    test_share: float = option(
        0.5, "Share of the prompts whose pairs test the candidates; nothing is proposed from them.", ge=0.05, le=0.95
    )
    similarity: float = option(
        0.6, "Jaccard similarity at or above which two proposals are one candidate.", ge=0.1, le=1.0
    )
    max_candidates: int = option(12, "Candidates to test, those proposed most often.", ge=1)
    method: Method = redefine(JudgeOptions, "method", Method.CHOICE)
    few_shot: str | None = redefine(ConstitutionOptions, "few_shot", None)
    max_new_tokens: int = redefine(SamplingOptions, "max_new_tokens", 48, "Longest proposal, in tokens.")

    def check(self) -> None:
        super().check()
        if self.input == "-" or is_stream(self.output):
            raise UsageError(
                "principles learn reads PAIRS several times and writes a directory, so neither can be a stream",
                code="invalid-option",
            )


@dataclass(frozen=True)
class Proposal:
    """One principle to propose: the pair that it explains, and its number among the proposals for the pair."""

    pair: Preference
    index: int


# --- pairs --------------------------------------------------------------------------------------------------------


def known_preference(row: Preference) -> tuple[str, str] | None:
    """The texts of the preferred reply and of the other one; None where neither is preferred."""
    chosen, rejected = row.chosen[0].content, row.rejected[0].content
    if pair_problem(row.chosen, row.rejected) or (row.human is None and row.p_chosen == 0.5):
        return None
    return (rejected, chosen) if row.human == "rejected" else (chosen, rejected)


def read_pairs(source: str, limit: int | None) -> list[Preference]:
    """The pairs of a file whose preference is known, without their votes.

    Raises:
        CaiError: There is none (`no-rows`), or the file cannot be read.
    """
    rows = [row for _, row in read_rows(source, lambda value: parse_preference(value, source=origin(source)))]
    pairs = [row.model_copy(update={"votes": []}) for row in rows[:limit] if known_preference(row)]
    if not pairs:
        raise CaiError(f"{display_name(source)} holds no pair with a known preference", code="no-rows")
    return pairs


def split(pairs: Sequence[Preference], share: float, seed: int) -> tuple[list[Preference], list[Preference]]:
    """The pairs to propose from, and those to test on, which are of other prompts.

    Raises:
        CaiError: One of the two is empty (`no-rows`).
    """
    prompts = [conversation_id(pair.prompt) for pair in pairs]
    held_out = held_out_keys(prompts, share, seed)
    to_test = [pair for pair, prompt in zip(pairs, prompts, strict=True) if prompt in held_out]
    to_explain = [pair for pair, prompt in zip(pairs, prompts, strict=True) if prompt not in held_out]
    if not to_test or not to_explain:
        hint = "give pairs of more prompts, or another --test-share"
        raise CaiError(f"{len(held_out)} of {len(set(prompts))} prompts are held out for testing", hint, code="no-rows")
    return to_explain, to_test


# --- proposals ----------------------------------------------------------------------------------------------------


def propose(
    proposals: Sequence[Proposal], engine: Engine, *, sampling: Sampling, form: PromptFormat, seed: int
) -> Iterator[ProposedPrinciple | Rejected]:
    """Yield one principle for each proposal, in order, or the pair rejected with the reason."""
    requests = []
    for proposal in proposals:
        preferred, other = known_preference(proposal.pair) or ("", "")
        first = bool(seed_for(seed, "proposal order", proposal.pair.id, proposal.index) & 1)
        request = proposal_request(proposal.pair.prompt, preferred, other, preferred_first=first, form=form)
        drawn = seed_for(seed, "proposal", proposal.pair.id, proposal.index)
        requests.append(GenerationRequest(request.text, drawn, request.prefill, request.stop, proposal.pair.key))
    for proposal, answer in zip(proposals, engine.generate(requests, sampling), strict=True):
        yield _proposed(proposal, answer)


def _proposed(proposal: Proposal, answer: Completion | RequestFailure) -> ProposedPrinciple | Rejected:
    key = f"{proposal.pair.id}/{proposal.index}"
    if isinstance(answer, RequestFailure):
        return reject(key, answer.reason, proposal.pair)
    text = proposed_principle(answer.text)
    ended = answer.finish_reason != CUT_OFF or re.search(r"[.!?]\s", answer.text.strip())
    if text is None or not ended:
        return reject(key, "no principle" if text is None else "cut at --max-new-tokens", proposal.pair)
    return ProposedPrinciple(id=proposal.pair.id, sample_index=proposal.index, comparison=text)


def proposal_items(pairs: Sequence[Preference], per_pair: int) -> WorkItems[Proposal]:
    """Yield the proposals to make."""
    for number, pair in enumerate(pairs, 1):
        for index in range(per_pair):
            yield WorkItem(f"{pair.id}/{index}", number, Proposal(pair, index))


# --- candidates ---------------------------------------------------------------------------------------------------


def candidates(proposed: Sequence[str], similarity: float, most: int) -> list[PreferencePrinciple]:
    """The distinct principles among the proposals, those proposed most often first.

    Args:
        proposed: The proposals, in order; the first wording of a candidate is kept.
        similarity: The least Jaccard similarity of two wordings of one candidate.
        most: The largest number of candidates.

    Examples:
        >>> kind, long = "Choose the reply that is kind.", "Choose the reply that is long."
        >>> [c.id for c in candidates([long, kind, kind], 0.9, 5)]
        ['01-is-kind', '02-is-long']
    """
    known, counts = NearDuplicates(similarity), dict[str, int]()
    for text in proposed:
        words = text.removeprefix(START)  # the words that all proposals share would make them similar
        same = known.find(words)
        if same is None:
            known.add(text, words)
        counts[same[0] if same else text] = counts.get(same[0] if same else text, 0) + 1
    kept = sorted(counts, key=lambda text: -counts[text])[:most]
    return [PreferencePrinciple(id=f"{n:02d}-{_slug(text)}", comparison=text) for n, text in enumerate(kept, 1)]


def _slug(text: str) -> str:
    return "-".join(re.findall(r"\w+", text.removeprefix(START).lower())[:5])


def _constitution(
    principles: Sequence[PreferencePrinciple], like: PreferenceConstitution, name: str, description: str
) -> bytes:
    learned = like.model_copy(
        update={"name": name, "license": None, "description": description, "principles": list(principles)}
    )
    return dump(learned).encode()


# --- the command --------------------------------------------------------------------------------------------------


def run(config: LearnConfig) -> dict[str, Any]:
    """Learn principles from a file of pairs. Returns the summary. Raises CaiError."""
    folder = Path(config.output)
    if not config.overwrite:
        reuse_recorded_date(str(folder / PROPOSALS))
    to_explain, to_test = split(read_pairs(config.input, config.limit), config.test_share, config.seed)
    console.say(
        f"principles learn: proposing from {len(to_explain):,} pairs, testing on {len(to_test):,} of other prompts"
    )
    proposed = _propose_all(config, folder / PROPOSALS, to_explain)
    tested = candidates(proposed, config.similarity, config.max_candidates)
    like = open_constitution(PreferenceConstitution, None, config.few_shot)
    about = f"{len(tested):,} candidates of {len(proposed):,} proposals from {len(to_explain):,} pairs"
    write_atomically(folder / CANDIDATES, [_constitution(tested, like, "candidates", about)])
    write_atomically(folder / PAIRS, (dump_row(pair) + b"\n" for pair in to_test))
    if not config.overwrite:
        reuse_recorded_date(str(folder / VOTES))
    print_summary(label_prefs.label_file(_label_config(config, folder)), as_json=False)
    ranking = rank_files(str(folder / VOTES), panel=[str(folder / PAIRS)])
    write_json(folder / RANKING, ranking)
    kept = _kept(tested, ranking)
    about += f"; each agrees with the known preferences on {len(to_test):,} held-out pairs more often than chance"
    (folder / LEARNED).unlink(missing_ok=True)
    if kept:
        write_atomically(folder / LEARNED, [_constitution(kept, like, "learned", about)])
    summary = {
        "stage": "principles learn",
        "output": str(folder),
        "proposals": len(proposed),
        "candidates": len(tested),
        "kept": [principle.id for principle in kept],
        "ranking": ranking,
    }
    _print(summary, folder, config.as_json)
    return summary


def _propose_all(config: LearnConfig, output: Path, pairs: Sequence[Preference]) -> list[str]:
    """Complete the file of proposals and return their texts. Raises CaiError."""
    engine = config.open_engine(config.model)
    form = resolve_prompt_format(config.prompt_format, engine)
    inputs = {"pairs": hash_input(config.input)}
    settings = {name: getattr(config, name) for name in PROPOSAL_SETTINGS} | {"prompt_format": form}
    summary = StageRun(
        provenance=provenance("principles learn", inputs=inputs, settings=settings, model=engine.identity()),
        inputs=inputs,
        output=str(output),
        overwrite=config.overwrite,
        items=lambda: proposal_items(pairs, config.per_pair),
        work=lambda items: propose(items, engine, sampling=config.sampling(), form=form, seed=config.seed),
        batch_size=engine.batch_size,
        total=len(pairs) * config.per_pair,
        engine=engine,
    ).complete()
    print_summary(summary, as_json=False)
    refuse_all_rejected(summary)
    return [row.comparison for _, row in read_rows(str(output), rows_of(ProposedPrinciple))]


def _label_config(config: LearnConfig, folder: Path) -> label_prefs.LabelPrefsConfig:
    """The labelling of the held-out pairs under all candidates, in both orders."""
    fields = label_prefs.LabelPrefsConfig.model_fields
    shared = {name: getattr(config, name) for name in EngineOptions.model_fields if name in fields}
    files = {"input": folder / PAIRS, "output": folder / VOTES, "constitution": folder / CANDIDATES}
    return label_prefs.LabelPrefsConfig.build(
        shared
        | {name: str(path) for name, path in files.items()}
        | {name: getattr(config, name) for name in ("overwrite", "quiet", "method", "seed", "prompt_format")}
        | {"principles_per_pair": "all"}
    )


def _kept(tested: Sequence[PreferencePrinciple], ranking: Mapping[str, Any]) -> list[PreferencePrinciple]:
    """The candidates that are shown to agree with the known preferences, the best first."""
    by_id = {principle.id: principle for principle in tested}
    return [by_id[found["id"]] for found in ranking["principles"] if found["finding"] == "agrees"]


def _print(summary: Mapping[str, Any], folder: Path, as_json: bool) -> None:
    if as_json:
        print(orjson.dumps(summary).decode())
        return
    print("\n".join(ranking_lines(summary["ranking"])))
    if kept := summary["kept"]:
        console.say(
            f"principles learn: {len(kept):,} of {summary['candidates']:,} candidates kept -> {folder / LEARNED}"
        )
    else:
        console.warn(
            "principles learn: no candidate is shown to agree with the preferences, so there is no "
            f"{folder / LEARNED}; use more pairs or fewer candidates"
        )
