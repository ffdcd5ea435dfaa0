"""The judge of `cai rl --judge`: its options, how it is opened, and what it costs."""

from pathlib import Path
from typing import Any

from cai_cli.common.errors import CaiError, UsageError
from cai_cli.constitution.draw import select
from cai_cli.constitution.options import ConstitutionOptions
from cai_cli.constitution.schema import PreferenceConstitution, open_constitution
from cai_cli.engines import open_engine
from cai_cli.engines.base import Sampling, Server
from cai_cli.engines.choice import PREFIXES
from cai_cli.judging.base import FeedbackModel
from cai_cli.judging.constitution_judge import ConstitutionJudge, JudgeMethod
from cai_cli.phase2_feedback.monitor_models import MonitorModel
from cai_cli.prompting.base import resolve_prompt_format
from cai_cli.prompting.criteria import criteria_of
from cai_cli.runtime.config import Effect, Group, Option, StageConfig, option, redefine
from cai_cli.runtime.cost import CHARACTERS_PER_TOKEN

JUDGE_SETTINGS = ("judge_method", "judge_weight", "principles", "max_principles")


class JudgeRewardOptions(StageConfig):
    """The judge of the reward, and the principles it judges by."""

    judge: str | None = option(
        None,
        "Judge that rewards replies by a constitution, instead of --pm or beside it: directory, Hub name or alias, or "
        "openai:NAME with --judge-url.",
        Option(Effect.HASHED, Group.MODEL),
    )
    judge_url: list[str] | None = option(
        None,
        "Address of the OpenAI-compatible server of --judge; repeat it for several servers of the same model.",
        Option(Effect.HARMLESS, Group.SERVER, metavar="URL"),
    )
    judge_method: JudgeMethod = option(
        JudgeMethod.QUESTIONS,
        "How the judge is asked: about each reply by each principle, in two opposite phrasings (questions), or which "
        "of two replies to a prompt is better, in both orders (pairs).",
    )
    judge_weight: float = option(
        1.0, "Weight of the judge's standardised reward beside that of --pm, which is 1.", ge=0.0
    )
    constitution: str | None = redefine(
        ConstitutionOptions, "constitution", None, "YAML file of principles for --judge; by default the shipped one."
    )
    few_shot: str | None = redefine(
        ConstitutionOptions,
        "few_shot",
        None,
        "YAML file of few-shot examples for --judge-method pairs, or none; by default those of the constitution.",
    )
    principles: str | None = redefine(ConstitutionOptions, "principles", None)
    max_principles: int | None = redefine(ConstitutionOptions, "max_principles", None)

    def check(self) -> None:
        super().check()
        given = [name for name in ("judge_url", "constitution", "few_shot", "principles", "max_principles")
                 if getattr(self, name)]  # fmt: skip
        if self.judge_method is not JudgeMethod.QUESTIONS:
            given.append("judge_method")
        if given and not self.judge:
            flag = f"--{given[0].replace('_', '-')}"
            raise UsageError(f"{flag} is for --judge, and there is none", hint="--judge MODEL", code="option-conflict")
        if self.few_shot and self.judge_method is JudgeMethod.QUESTIONS:
            raise UsageError("--few-shot is for --judge-method pairs", code="option-conflict")

    def open_judge(self, seed: int) -> ConstitutionJudge | None:
        """The judge that the options name, or None; no model is loaded yet. Raises UsageError, CaiError."""
        if not self.judge:
            return None
        loaded = open_constitution(PreferenceConstitution, self.constitution, self.few_shot)
        principles = select(loaded.principles, self.principles, self.max_principles)
        if not criteria_of(principles):
            raise CaiError(
                f"{self.constitution}: the weight of every principle is 0",
                hint="give one of them a weight",
                code="invalid-constitution",
            )
        try:
            server = Server(self.judge_url)
            engine = open_engine(self.judge, batch_size=None, device="auto", dtype="auto", server=server)
        except UsageError as error:  # the address has another name here
            message = error.message.replace("--base-url", "--judge-url")
            raise UsageError(message, error.hint, code=error.code) from error
        form = resolve_prompt_format("auto", engine)
        model = FeedbackModel(engine, self.judge_method, loaded.examples, form, seed, Sampling(), principles=principles)
        return ConstitutionJudge(model, principles, self.judge_method)

    def judge_identity(self, judge: ConstitutionJudge | None) -> dict[str, Any] | None:
        """What identifies the judge and its constitution in a manifest."""
        if judge is None:
            return None
        loaded = open_constitution(PreferenceConstitution, self.constitution, self.few_shot)
        return {**judge.model.engine.identity(), "constitution": loaded.fingerprint()}

    @property
    def local_judge(self) -> str | None:
        """The name of a judge that runs on the device of training, or None."""
        if not self.judge or self.judge.startswith(("openai:", "scripted:")):
            return None
        return self.judge.removeprefix("local:").removeprefix("vllm:")

    def judge_cost(
        self, prompts: int, replies: int, tokens: tuple[float, float], *, with_start: bool = False
    ) -> tuple[int, float]:
        """The requests to the judge, and the tokens that it reads.

        Args:
            prompts: Number of prompts.
            replies: Replies to each.
            tokens: Tokens of a prompt and of a reply.
            with_start: Whether `pairs` compares the replies with those of the start model, not with one another.
        """
        if not self.judge:
            return 0, 0.0
        loaded = open_constitution(PreferenceConstitution, self.constitution, self.few_shot)
        criteria = criteria_of(select(loaded.principles, self.principles, self.max_principles))
        asked, (prompt, reply) = len(criteria) * 2 * prompts, tokens
        text = sum(len(c.text) for c in criteria) / len(criteria) / CHARACTERS_PER_TOKEN
        if self.judge_method is JudgeMethod.QUESTIONS:
            requests = asked * replies
            return requests, requests * (prompt + reply + text)
        few_shot = sum(len(example.model_dump_json()) for example in loaded.examples) / CHARACTERS_PER_TOKEN
        requests = asked * replies * (replies - 1) // (1 if with_start else 2)
        return requests, requests * (few_shot + prompt + 2 * reply + text)


def judge_file(work: Path) -> Path:
    """The file of the judge's answers in a run's directory."""
    return work / "judge.jsonl"


def refuse_judge_as_monitor(config_judge: str | None, config_monitor: str | None) -> None:
    """Raise UsageError where the monitor has the name of the judge of the reward."""
    if config_judge and config_monitor and _plain_name(config_judge) == _plain_name(config_monitor):
        raise _same_model()


def refuse_same_model(judge: ConstitutionJudge | None, monitor: MonitorModel | None) -> None:
    """Raise UsageError where the monitor is the judge of the reward under another name."""
    if judge and monitor:
        identity = judge.model.engine.identity()
        if (mark := identity.get("fingerprint")) and mark == monitor.identity.get("fingerprint"):
            raise _same_model()


def _plain_name(name: str) -> str:
    return next((name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)), name)


def _same_model() -> UsageError:
    return UsageError(
        "--monitor-judge and --judge are the same model: a monitor must not be used as the reward",
        hint="another model as --monitor-judge, or --monitor-pm",
        code="option-conflict",
    )
