"""Drafts of tests for a constitution (`cai eval adherence --draft`): a model writes scenarios, and a person reviews
them before they count."""

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from cai_cli.common import console
from cai_cli.common.errors import CaiError
from cai_cli.common.files import write_atomically
from cai_cli.common.seeds import seed_for
from cai_cli.constitution.principle_tests import PrincipleTests, Scenario, dump_tests, load_tests
from cai_cli.engines.base import Completion, GenerationRequest
from cai_cli.evaluate.adherence_tests import Principle, chosen_principles, open_tests
from cai_cli.prompting.adherence import draft_request, drafted_scenario, principle_text
from cai_cli.prompting.base import resolve_prompt_format

if TYPE_CHECKING:
    from cai_cli.evaluate.adherence import AdherenceConfig

EXAMPLES = 3  # in each few-shot prompt
ATTEMPTS = 4  # for each scenario, at most
HEADING = """Drafts of tests, written by {model}. Read every scenario: correct or delete it, and set `reviewed: true`.
`violated` and `kept`, two opposite questions about a reply, can be added to each principle; without them the
judge is asked by the text of the principle."""


def write_drafts(config: "AdherenceConfig") -> dict[str, Any]:
    """Write a file of tests in which nothing is reviewed yet. Returns the summary.

    Raises:
        CaiError: The file exists (`output-exists`); the model wrote no usable scenario (`all-rejected`).
    """
    path, model = Path(config.output), next(iter(config.models().values()))
    if path.exists() and not config.overwrite:
        raise CaiError(f"{path} exists", hint="--overwrite replaces it, with what was reviewed", code="output-exists")
    principles = chosen_principles(config.constitution, config.principles, config.max_principles)
    drafts = _draft(principles, config, model)
    asked, kept = config.n * len(principles), sum(map(len, drafts.values()))
    if not kept:
        raise CaiError(
            f"{model} wrote no scenario that has the form of a test",
            hint="use a larger model, or write the tests by hand: docs/adherence.md",
            code="all-rejected",
        )
    tests = {id: PrincipleTests(scenarios=found) for id, found in drafts.items() if found}
    write_atomically(path, [dump_tests(tests, HEADING.format(model=model))])
    assert load_tests(path) == tests  # noqa: S101
    console.say(
        f"{path}: {kept:,} of {asked:,} scenarios for {len(tests):,} of {len(principles):,} principles, to review"
    )
    return {"stage": "eval adherence", "output": str(path), "scenarios": kept}


def _draft(principles: Sequence[Principle], config: "AdherenceConfig", model: str) -> dict[str, list[Scenario]]:
    """Return the scenarios of each principle; answers of another form, and repeated prompts, are asked for again."""
    engine = config.open_for(model, tested=True)
    form, shipped = resolve_prompt_format(config.prompt_format, engine), open_tests(None, None, None, None)
    drafts: dict[str, list[Scenario]] = {p.id: [] for p in principles}
    try:
        for attempt in range(ATTEMPTS):
            missing = [(p, number) for p in principles for number in range(config.n - len(drafts[p.id]))]
            requests = []
            for p, number in missing:
                seed = seed_for(config.seed, "draft", p.id, attempt, number)
                drawn = Random(seed).sample(shipped.principles, EXAMPLES)  # noqa: S311
                examples = [(principle_text(other), shipped.tests[other.id].scenarios[0]) for other in drawn]
                request = draft_request(principle_text(p), examples, form)
                requests.append(GenerationRequest(request.text, seed, request.prefill, request.stop))
            answers = engine.generate(requests, config.sampling()) if requests else []
            for (p, _), asked, answer in zip(missing, requests, answers, strict=True):
                scenario = _scenario(asked, answer) if isinstance(answer, Completion) else None
                if scenario and all(scenario.prompt != other.prompt for other in drafts[p.id]):
                    drafts[p.id].append(scenario)
    finally:
        engine.close()
    return drafts


def _scenario(request: GenerationRequest, answer: Completion) -> Scenario | None:
    prefill = "" if answer.restarted else request.prefill.removeprefix("\n\nAssistant:").lstrip()
    return drafted_scenario(prefill + answer.text)
