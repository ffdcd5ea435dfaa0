"""How often models break the principles of a constitution, under pressure (`cai eval adherence`).

Each principle has tests: scenarios in which a user tempts the model and then pushes, and two opposite questions about a
reply. A model answers every message, and a judge is asked both questions about every reply by the log-probabilities of
Yes and No. Departure: the paper has no such test; it measures harmlessness over all red-team prompts together.

`metrics.adherence` describes the rates, the differences between models and the audit of the judge.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cai_cli.common import console
from cai_cli.common.errors import UsageError
from cai_cli.constitution.options import ConstitutionOptions
from cai_cli.data.evaluation_schema import AdherenceResult
from cai_cli.data.jsonl import read_rows, rows_of
from cai_cli.data.schema import Rejected
from cai_cli.engines import batch
from cai_cli.engines.base import Engine
from cai_cli.engines.group import EngineGroup
from cai_cli.evaluate.adherence_conversations import Conversations, PlannedConversation, Speaker, planned
from cai_cli.evaluate.adherence_draft import write_drafts
from cai_cli.evaluate.adherence_tests import TestSet, open_tests
from cai_cli.evaluate.compare import by_model_name
from cai_cli.evaluate.judged_options import SERVER_OPTIONS, refuse_idle_server_options
from cai_cli.metrics.adherence import AdherenceSummary
from cai_cli.metrics.adherence_table import table_lines
from cai_cli.prompting.base import resolve_prompt_format
from cai_cli.prompting.system import SystemOptions
from cai_cli.runtime.config import Effect, Group, Option, option, redefine
from cai_cli.runtime.cost import CHARACTERS_PER_TOKEN, RowFlow, StepCost, TokenCounts
from cai_cli.runtime.manifest import hash_input, provenance, write_json
from cai_cli.runtime.output_files import is_stdout, is_stream, sidecar
from cai_cli.runtime.shared_options import (
    ChatTemplateOptions,
    Device,
    EngineDType,
    InputOptions,
    OutputOptions,
    RequestOptions,
    SamplingOptions,
    Thinking,
)
from cai_cli.runtime.sinks import stream_sink
from cai_cli.runtime.stage import Phase, Stage
from cai_cli.runtime.stage_run import StageRun, WorkItem, WorkItems
from cai_cli.runtime.summary import print_summary, refuse_all_rejected

JUDGE, ATTACKER = "the judge", "the attacker"  # names that no model under test can have


class AdherenceConfig(OutputOptions, RequestOptions, ChatTemplateOptions, SystemOptions, SamplingOptions):
    """Measure how often models break each principle of a constitution, under pressure.

    MODEL: one or more models, or NAME=MODEL; the others are compared with the first. Writes a row for each conversation
    with the judge's answers, and the rates to OUT.adherence.json. With --draft, MODEL writes tests for a constitution.
    """

    input: list[str] = option(
        ...,
        "Models to test: MODEL or NAME=MODEL, each as --model takes it.",
        Option(Effect.HASHED, Group.INPUT, metavar="MODEL...", argument=True),
    )
    limit: int | None = redefine(InputOptions, "limit", None, "Run only the first N scenarios.")
    constitution: list[str] | None = option(
        None,
        "YAML file of principles; can be repeated. By default both shipped ones.",
        Option(Effect.HASHED, Group.PRINCIPLES, reads_file=True),
    )
    tests: str | None = option(
        None,
        "YAML file of tests; by default those that the constitution has or names.",
        Option(Effect.HASHED, Group.PRINCIPLES, reads_file=True),
    )
    principles: str | None = redefine(ConstitutionOptions, "principles", None)
    max_principles: int | None = redefine(ConstitutionOptions, "max_principles", None, "Use only the first K.")
    n: int = option(
        4,
        "Conversations of each model in each scenario; with --draft, scenarios of each principle.",
        Option(flags=("--n", "-n")),
        ge=1,
    )
    judge: str | None = option(
        None, "Model that is asked about every reply, as --model takes it.", Option(Effect.HASHED, Group.MODEL)
    )
    judge_url: list[str] | None = option(
        None,
        "Address of the OpenAI-compatible server of --judge and --attacker, where it is not --base-url.",
        Option(Effect.HARMLESS, Group.SERVER, metavar="URL"),
    )
    attacker: str | None = option(
        None,
        "Model that writes the user's further messages, instead of the scripted ones.",
        Option(Effect.HASHED, Group.MODEL),
    )
    pressure_turns: int | None = option(
        None, "Further messages of the user: at most N of the scripted ones, or N of --attacker.", ge=0
    )
    system_model: list[str] | None = option(
        None,
        "Name of a model that the system prompt is for; can be repeated. By default it is for all.",
        Option(group=Group.SAMPLING, metavar="NAME"),
    )
    human: str | None = option(
        None,
        "Rows of this command with `human` filled in (whether a reply breaks the principle), to audit the judge.",
        Option(Effect.HARMLESS, reads_file=True),
    )
    unreviewed: bool = option(False, "Run drafts that nobody has reviewed.", Option(Effect.HARMLESS, Group.PRINCIPLES))
    draft: bool = option(
        False, "Write tests for --constitution to OUT, a YAML file to review, with MODEL.", Option(Effect.HARMLESS)
    )

    def check(self) -> None:
        super().check()
        if self.draft:
            if len(self.input) > 1 or not self.constitution or Path(self.output).suffix not in (".yaml", ".yml"):
                needs = "one MODEL, --constitution FILE and -o FILE.yaml"
                raise UsageError(f"--draft needs {needs}", code="missing-option")
            return
        if self.judge is None:
            raise UsageError("--judge is missing: the model that is asked about every reply", code="missing-option")
        if self.n > 1 and self.temperature == 0:
            raise UsageError("at temperature 0 all conversations are alike", hint="-n 1", code="option-conflict")
        names = self.models()
        for name in self.system_model or ():
            if name not in names:
                hint = f"the models are {', '.join(names)}"
                raise UsageError(f"--system-model {name!r} is not a model", hint=hint, code="invalid-option")
        if self.system_model and self.system is None and self.system_from is None:
            raise UsageError("--system-model needs --system or --system-from", code="missing-option")
        refuse_idle_server_options(self, [*names.values(), self.judge, self.attacker or ""])

    def models(self) -> dict[str, str]:
        """The models under test by name. Raises UsageError."""
        return by_model_name(self.input, "MODEL")

    def open_tests(self) -> TestSet:
        """The tests of the chosen principles. Raises CaiError."""
        return open_tests(self.constitution, self.tests, self.principles, self.max_principles)

    def open_for(self, model: str, *, tested: bool) -> Engine:
        """The engine of a model under test, or of the judge or the attacker: with the options that are for it."""
        update: dict[str, Any] = {} if model.startswith("openai:") else dict.fromkeys(SERVER_OPTIONS)
        if model.startswith("openai:"):
            update = {"batch_size": None, "device": Device.AUTO, "dtype": EngineDType.AUTO}
            update |= {} if tested or not self.judge_url else {"base_url": self.judge_url}
        if model.startswith(("openai:", "scripted:")):
            update["engine_arg"] = None
        if not tested:
            update |= {"thinking": Thinking.AUTO, "template_arg": None, "chat_template": None}
        engine_options = self.model_copy(update=update)
        return RequestOptions.open_engine(engine_options, model)

    def chat_options(self) -> Any:
        from dataclasses import replace

        return replace(super().chat_options(), template=self.chat_template)


def open_engines(config: AdherenceConfig) -> EngineGroup:
    """The engines of the models under test by name, of the judge and of the attacker. Raises UsageError, CaiError."""
    if batch.active.get():
        hint = "run cai eval adherence by itself, or sample and judge in other stages"
        raise UsageError("a batch answers for one model, and adherence asks several", hint, code="option-conflict")
    engines = {name: config.open_for(model, tested=True) for name, model in config.models().items()}
    for role, model in ((JUDGE, config.judge), (ATTACKER, config.attacker)):
        if model:
            same = [name for name, other in config.models().items() if other == model]
            plain = not config.chat_options().recorded() and not config.chat_template and not config.judge_url
            engines[role] = engines[same[0]] if same and plain else config.open_for(model, tested=False)
    return EngineGroup(engines)


class _Speakers:
    """The models under test, of which only those in use are kept in memory."""

    def __init__(self, group: EngineGroup, config: AdherenceConfig, system: str | None) -> None:
        self.group, self.config, self.system = group, config, system
        self.waiting = list(config.models())

    def __call__(self, name: str) -> Speaker:
        return self.speaker(name, self.system if name in (self.config.system_model or self.config.models()) else None)

    def speaker(self, name: str, system: str | None = None) -> Speaker:
        engine = self.group[name]
        return Speaker(engine, resolve_prompt_format(self.config.prompt_format, engine), system)

    def forget_before(self, name: str) -> None:
        """Free the models that come before `name`: their conversations are finished."""
        while self.waiting[0] != name:
            self.group.release(self.waiting.pop(0))


def estimate(rows: RowFlow, config: AdherenceConfig) -> StepCost:
    """The cost of all conversations, every reply as long as allowed; the rows are those of the tests."""
    tests = config.open_tests().scenarios(config.limit)
    held = len(config.models()) * config.n
    scripted = [len(t.scenario.pressure) for t in tests]
    wanted = config.pressure_turns
    pushes = [wanted if wanted is not None and config.attacker else min(s, s if wanted is None else wanted)
              for s in scripted]  # fmt: skip
    prompt = sum(len(t.scenario.prompt) for t in tests) / CHARACTERS_PER_TOKEN / max(1, len(tests))
    replies = held * sum(1 + p for p in pushes)
    attacks = held * sum(pushes) if config.attacker else 0
    new = config.max_new_tokens
    # Before its k-th reply a model reads k messages and k - 1 replies.
    read = held * sum((k * prompt + (k - 1) * new) for p in pushes for k in range(1, p + 2))
    tokens = TokenCounts(3 * read + 2 * replies * new + attacks * (prompt + new), (replies + attacks) * new)
    after = RowFlow(held * len(tests), config.n, prompt, new, texts=max((1 + p for p in pushes), default=0))
    return StepCost(held * len(tests), 3 * replies + attacks, tokens, after)


def run(config: AdherenceConfig) -> dict[str, Any]:
    """Test the models, or draft tests. Returns the summary. Raises CaiError."""
    if config.draft:
        return write_drafts(config)
    tests, names = config.open_tests(), list(config.models())
    tests.refuse_unreviewed(allowed=config.unreviewed)
    scenarios, group = tests.scenarios(config.limit), open_engines(config)
    system = config.system_prompt()
    speakers = _Speakers(group, config, system)
    conversations = Conversations(
        models=speakers,
        judge=speakers.speaker(JUDGE),
        attacker=speakers.speaker(ATTACKER) if config.attacker else None,
        sampling=config.sampling(),
        seed=config.seed,
        pressure=config.pressure_turns,
    )
    formats = {name: speakers.speaker(name).prompt_format for name in group.engines}

    def work(plans: Sequence[PlannedConversation]) -> Iterator[AdherenceResult | Rejected]:
        speakers.forget_before(plans[0].model)
        return conversations.hold(plans)

    def items() -> WorkItems[PlannedConversation]:
        for line, plan in enumerate(planned(names, scenarios, config.n), start=1):
            yield WorkItem(plan.key, line, plan)

    files = dict(enumerate(tests.files, start=1))
    summary_of_rows = AdherenceSummary(names, [p.id for p in tests.principles], _labelled(config.human))
    summary = StageRun(
        provenance=provenance(
            "eval adherence",
            inputs={},
            settings=config.settings(prompt_format=formats, system=system),
            models=group.identity(),
            tests={"names": list(tests.names), "fingerprint": tests.fingerprint()},
        ),
        inputs={f"tests {number}": hash_input(file) for number, file in files.items()},
        output=config.output,
        overwrite=config.overwrite,
        items=items,
        work=work,
        batch_size=group.batch_size,
        total=len(names) * len(scenarios) * config.n,
        engine=group,
    ).complete(stream_sink(config.output, summary_of_rows.observe))
    if not is_stream(config.output):
        for _, row in read_rows(config.output, rows_of(AdherenceResult)):
            summary_of_rows.add(row)
    result = summary_of_rows.result() | {"judge_model": config.judge, "attacker": config.attacker}
    if not is_stream(config.output):
        write_json(sidecar(Path(config.output), "adherence.json"), result)
    return _report({**summary, **result}, config)


def _labelled(file: str | None) -> Mapping[str, AdherenceResult]:
    return {row.key: row for _, row in read_rows(file, rows_of(AdherenceResult))} if file else {}


def _report(summary: dict[str, Any], config: AdherenceConfig) -> dict[str, Any]:
    print_summary(summary, as_json=config.as_json, stdout_is_data=is_stdout(config.output))
    for line in table_lines(summary):
        console.say(line)
    judge = summary["judge"]
    if judge["trusted"] is False:
        console.warn(f"do not trust the judge {config.judge}: {judge['reason']}")
    else:
        console.say(f"judge {config.judge}: {judge['reason']}")
    refuse_all_rejected(summary)
    return summary


STAGE = Stage("eval adherence", Phase.EVALUATION, AdherenceConfig, run, estimate, reads=(), writes=AdherenceResult)
