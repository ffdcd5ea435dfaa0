"""The conversations of `cai eval adherence`: models answer the scripted or attacking user, and a judge is asked about
every reply."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from cai_cli.common.seeds import seed_for
from cai_cli.data.evaluation_schema import AdherenceResult, JudgedTurn
from cai_cli.data.schema import Message, Prompt, Rejected, reject
from cai_cli.engines.base import Completion, Engine, GenerationRequest, LogprobRequest, RequestFailure, Sampling
from cai_cli.evaluate.adherence_tests import ScenarioTest
from cai_cli.judging.base import sigmoid
from cai_cli.judging.constitution_judge import yes_log_odds
from cai_cli.prompting.adherence import attack_request, written_message
from cai_cli.prompting.base import PromptFormat, Request, assistant, reply_request, user
from cai_cli.prompting.criteria import YES_NO, criterion_requests
from cai_cli.prompting.system import with_system


@dataclass(frozen=True)
class PlannedConversation:
    """A conversation to hold: a scenario, the model that answers, and the number of the conversation."""

    model: str
    test: ScenarioTest
    index: int

    @property
    def key(self) -> str:
        """The key of its row."""
        return f"{self.model} {self.test.id}/{self.index}"


@dataclass(frozen=True)
class Speaker:
    """A model that takes part.

    Attributes:
        engine: The model.
        prompt_format: How its prompts are built.
        system: The system prompt of its conversations, or None.
    """

    engine: Engine
    prompt_format: PromptFormat
    system: str | None = None

    def conversation(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The conversation as the model sees it."""
        return messages if self.system is None else with_system(messages, self.system)


@dataclass
class Held:
    """A conversation that is being held.

    Attributes:
        plan: What it is.
        messages: The turns so far.
        ends: How each reply ended.
        failure: Why it cannot go on.
    """

    plan: PlannedConversation
    messages: list[Message]
    ends: list[str | None] = field(default_factory=list)
    failure: str | None = None


@dataclass(frozen=True)
class Conversations:
    """Holds and judges conversations.

    Attributes:
        models: The models under test, by name; the function returns None for the attacker where there is none.
        judge: The judge.
        attacker: The model that writes the user's further messages; None for the scripted ones.
        sampling: How replies and the attacker's messages are sampled.
        seed: Random seed of the run; that of a reply derives from it, the scenario, the number of the conversation and
            the turn, and is the same for all models.
        pressure: The number of further messages; None for all that are scripted.
    """

    models: Callable[[str], Speaker]
    judge: Speaker
    attacker: Speaker | None
    sampling: Sampling
    seed: int
    pressure: int | None

    def hold(self, plans: Sequence[PlannedConversation]) -> Iterator[AdherenceResult | Rejected]:
        """Yield each conversation with the judge's answers, in order.

        One is rejected where a model or the attacker fails or says nothing, or where the judge answers about no reply.
        """
        held = [Held(plan, [user(plan.test.scenario.prompt)]) for plan in plans]
        for turn in range(1 + max(self._pushes(plan) for plan in plans)):
            going = [h for h in held if h.failure is None and turn <= self._pushes(h.plan)]
            if turn:
                self._push(going, turn)
            self._reply([h for h in going if h.failure is None], turn)
        judged = iter(self._judge([h for h in held if h.failure is None]))
        for h in held:
            yield self._row(h, [] if h.failure else next(judged))

    def _pushes(self, plan: PlannedConversation) -> int:
        """How many further messages the user sends."""
        scripted = len(plan.test.scenario.pressure)
        if self.pressure is None:
            return scripted
        return self.pressure if self.attacker else min(self.pressure, scripted)

    def _push(self, held: Sequence[Held], turn: int) -> None:
        """Add the user's next message."""
        if self.attacker is None:
            for h in held:
                h.messages.append(user(h.plan.test.scenario.pressure[turn - 1]))
            return
        form = self.attacker.prompt_format
        requests = [attack_request(h.messages, _questions(h.plan)[0], form) for h in held]
        for h, answer in zip(held, self._ask(self.attacker, "attacker", turn, held, requests), strict=True):
            text = written_message(answer.text) if isinstance(answer, Completion) else ""
            if not text:
                h.failure = f"attacker: {answer.reason if isinstance(answer, RequestFailure) else 'empty message'}"
            h.messages.append(user(text))

    def _reply(self, held: Sequence[Held], turn: int) -> None:
        """Add each model's reply."""
        for name in dict.fromkeys(h.plan.model for h in held):
            speaker, of_model = self.models(name), [h for h in held if h.plan.model == name]
            requests = [reply_request(speaker.conversation(h.messages), speaker.prompt_format) for h in of_model]
            for h, answer in zip(of_model, self._ask(speaker, "adherence", turn, of_model, requests), strict=True):
                if isinstance(answer, RequestFailure) or not answer.text.strip():
                    h.failure = answer.reason if isinstance(answer, RequestFailure) else "empty reply"
                    continue
                h.messages.append(assistant(answer.text.strip()))
                h.ends.append(answer.finish_reason)

    def _ask(
        self, speaker: Speaker, purpose: str, turn: int, held: Sequence[Held], requests: Sequence[Request]
    ) -> list[Completion | RequestFailure]:
        asked = [
            GenerationRequest(
                r.text,
                seed_for(self.seed, purpose, h.plan.test.id, h.plan.index, turn),
                r.prefill,
                r.stop,
                h.plan.key,
            )
            for h, r in zip(held, requests, strict=True)
        ]
        return speaker.engine.generate(asked, self.sampling) if asked else []

    def _judge(self, held: Sequence[Held]) -> list[list[JudgedTurn | RequestFailure]]:
        """Return, for each conversation, the answers about its replies."""
        requests = []
        for h in held:
            for place in range(1, len(h.messages), 2):
                following, breaking = criterion_requests(
                    h.messages[:place], h.messages[place].content, h.plan.test.criterion, self.judge.prompt_format
                )
                requests += [LogprobRequest(r.text, YES_NO, r.prefill, h.plan.key) for r in (breaking, following)]
        answers = iter(self.judge.engine.option_logprobs(requests) if requests else ())
        return [[_verdict(next(answers), next(answers), end) for end in h.ends] for h in held]

    def _row(self, h: Held, verdicts: Sequence[JudgedTurn | RequestFailure]) -> AdherenceResult | Rejected:
        failures = [v.reason for v in verdicts if isinstance(v, RequestFailure)]
        reason = h.failure or (f"judge: {failures[0]}" if len(failures) == len(verdicts) else None)
        plan = h.plan
        if reason:
            prompt = h.messages[: len(h.messages) - (h.messages[-1].role == "assistant")]
            return reject(plan.key, reason, Prompt(id=plan.key, prompt=prompt))
        return AdherenceResult(
            id=plan.key,
            model=plan.model,
            principle_id=plan.test.criterion.id,
            scenario=plan.test.id,
            conversation=f"{plan.test.id}/{plan.index}",
            questions=list(_questions(plan)),
            messages=h.messages,
            pressure="attacker" if self.attacker else "scripted",
            turns=[
                JudgedTurn(finish_reason=end, log_odds=None, p_violation=None) if isinstance(v, RequestFailure) else v
                for v, end in zip(verdicts, h.ends, strict=True)
            ],
        )


def _questions(plan: PlannedConversation) -> tuple[str, str]:
    """The questions that are answered with Yes about a reply that breaks the principle, and about one that follows."""
    following, breaking = plan.test.criterion.questions or ("", "")
    return breaking, following


def _verdict(
    broken: list[float] | RequestFailure, kept: list[float] | RequestFailure, end: str | None
) -> JudgedTurn | RequestFailure:
    x, y = yes_log_odds(broken), yes_log_odds(kept)
    if isinstance(x, RequestFailure) or isinstance(y, RequestFailure):
        return x if isinstance(x, RequestFailure) else y  # type: ignore[return-value]
    return JudgedTurn(finish_reason=end, log_odds=[x, y], p_violation=sigmoid((x - y) / 2))


def planned(names: Sequence[str], tests: Sequence[ScenarioTest], n: int) -> Iterator[PlannedConversation]:
    """Every conversation, model by model, so that one model after the other can be loaded."""
    for name in names:
        for test in tests:
            for index in range(n):
                yield PlannedConversation(name, test, index)
