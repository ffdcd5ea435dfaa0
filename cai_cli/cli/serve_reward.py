"""`cai serve-reward`: serves a preference model or a constitution to RL trainers."""

from pathlib import Path
from typing import ClassVar

from cai_cli.common import console
from cai_cli.common.errors import CaiError, UsageError
from cai_cli.constitution.draw import select
from cai_cli.constitution.options import ConstitutionOptions
from cai_cli.constitution.schema import PreferenceConstitution, open_constitution
from cai_cli.engines.base import Sampling
from cai_cli.judging.base import FeedbackModel
from cai_cli.judging.constitution_judge import ConstitutionJudge, JudgeMethod
from cai_cli.judging.constitution_reward import ConstitutionRewards
from cai_cli.prompting.base import resolve_prompt_format
from cai_cli.reward.preference_model_reward import PreferenceModelRewards
from cai_cli.reward.server import RewardModel, RewardServer
from cai_cli.runtime.config import Effect, Group, Option, option, redefine
from cai_cli.runtime.shared_options import FormatOptions, RequestOptions, RunOptions

FOR_PREFERENCE_MODELS = ("source", "host", "port", "quiet", "batch_size", "device")


class ServeRewardConfig(RequestOptions, FormatOptions):
    """Serve rewards over HTTP to `cai rl --pm-url`, OpenRLHF or verl, until SIGTERM or Ctrl-C.

    With a preference model a reward is its score. With a constitution and a judge it is that of `cai rl --judge`: the
    judge's log-odds, in nats, that the principles would choose the reply, averaged by their weights.
    """

    source: str = option(
        ...,
        "Preference model (directory, alias or Hub name), or YAML file of preference principles.",
        Option(Effect.HASHED, metavar="PM|CONSTITUTION", argument=True),
    )
    model: str | None = option(
        None,
        "The judge, for a constitution: directory, Hub name, alias, vllm:NAME, or openai:NAME with --base-url.",
        Option(Effect.HASHED, Group.MODEL, flags=("--model", "-m")),
    )
    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 lets other machines connect.")
    port: int = option(8009, "Port to listen on; 0 takes a free one.", ge=0, le=65535)
    principles: str | None = redefine(ConstitutionOptions, "principles", None)
    max_principles: int | None = redefine(ConstitutionOptions, "max_principles", None)
    quiet: bool = redefine(RunOptions, "quiet", False)
    # No options here: the server reports no cost.
    price_in: ClassVar[None] = None  # type: ignore[misc]
    price_out: ClassVar[None] = None  # type: ignore[misc]

    @property
    def is_constitution(self) -> bool:
        """Whether the source is a constitution rather than a preference model."""
        return Path(self.source).suffix in (".yaml", ".yml")

    def check(self) -> None:
        super().check()
        for_judges = [
            name
            for name, (field, _) in self.options().items()
            if name not in FOR_PREFERENCE_MODELS and getattr(self, name) != field.default
        ]
        if for_judges and not self.is_constitution:
            raise UsageError(
                f"--{for_judges[0].replace('_', '-')} is for a constitution, and {self.source} is a preference model",
                hint="leave it out, or give a YAML file of principles",
                code="option-conflict",
            )
        if self.is_constitution and not self.model:
            raise UsageError("a constitution needs a judge", hint="--model NAME", code="missing-option")


def open_model(config: ServeRewardConfig) -> RewardModel:
    """Open the preference model, or the constitution with its judge. Raises UsageError, CaiError."""
    if not config.is_constitution:
        return PreferenceModelRewards(config.source, config.device.value, config.batch_size or 16)
    loaded = open_constitution(PreferenceConstitution, config.source, "none")
    engine = config.open_engine(str(config.model))
    principles = select(loaded.principles, config.principles, config.max_principles)
    form = resolve_prompt_format(config.prompt_format, engine)
    model = FeedbackModel(engine, JudgeMethod.QUESTIONS, [], form, 0, Sampling())
    return ConstitutionRewards(Path(config.source).stem, ConstitutionJudge(model, principles))


def run(config: ServeRewardConfig) -> None:
    """Serve until SIGTERM or Ctrl-C, then answer the requests in progress and end. Raises UsageError, CaiError."""
    model = open_model(config)
    try:
        server = RewardServer(model, config.host, config.port)
    except OSError as error:
        raise CaiError(
            f"cannot listen on {config.host}:{config.port}: {error.strerror}", hint="--port N", code="failed"
        ) from None
    console.say(f"serve-reward: {model.name} at http://{config.host}:{server.server_port}")
    try:
        server.serve_forever()
    except (KeyboardInterrupt, SystemExit):  # how a server is meant to end
        console.say("serve-reward: stopped")
    finally:
        server.server_close()
