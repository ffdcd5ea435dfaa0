"""The options and engines of an evaluation in which models reply and a judge is asked about the replies."""

from collections.abc import Mapping, Sequence
from typing import Any

from cai_cli.common.errors import UsageError
from cai_cli.engines import open_engine
from cai_cli.engines.base import Engine, Server
from cai_cli.engines.choice import with_engine
from cai_cli.engines.group import EngineGroup
from cai_cli.runtime.config import Effect, Group, Option, option
from cai_cli.runtime.shared_options import RequestOptions, named_values

JUDGE = "(judge)"  # its name in the group of engines; no model is named so
SERVER_OPTIONS = tuple(Server.__dataclass_fields__)


class JudgedOptions(RequestOptions):
    """The judge of the replies, which may run elsewhere than the models that reply."""

    judge: str | None = option(
        None,
        "Model that judges the replies: directory, Hub name or alias, or openai:NAME.",
        Option(Effect.HASHED, Group.MODEL),
    )
    judge_url: list[str] | None = option(
        None,
        "Address of the server of --judge, where it is not --base-url; can be repeated.",
        Option(Effect.HARMLESS, Group.SERVER, metavar="URL"),
    )

    def open_group(self, models: Mapping[str, str]) -> EngineGroup:
        """The engines of models by their names, and of the judge, if any, by the name `JUDGE`. A model that judges
        itself is loaded once. Raises UsageError, CaiError."""
        engines = {name: self._open(model, self.base_url) for name, model in models.items()}
        if self.judge:
            same = next((engines[name] for name, model in models.items() if model == self.judge), None)
            url = self.judge_url or self.base_url
            engines[JUDGE] = same if same and not self.judge_url else self._open(self.judge, url)
        return EngineGroup(engines)

    def _open(self, model: str, url: Sequence[str] | None) -> Engine:
        """As `open_engine` of other stages; options that only the other model can have are left out."""
        fits: dict[str, Any] = {"batch_size": None, "device": "auto", "dtype": "auto"}
        server = Server(url, self.concurrency, self.timeout, self.budget_tokens, self.price_in, self.price_out,
                        self.served_as)  # fmt: skip
        if not model.startswith("openai:"):
            fits = {"batch_size": self.batch_size, "device": self.device.value, "dtype": self.dtype.value}
            server = Server()
        chosen = with_engine(model, self.device.value)
        if chosen.startswith("vllm:"):
            fits["device"] = "auto" if chosen != model else self.device.value
            fits["engine_args"] = named_values(self.engine_arg)
        return open_engine(chosen, **fits, server=server, chat=self.chat_options())


def refuse_idle_server_options(config: RequestOptions, models: Sequence[str]) -> None:
    """Raise UsageError where an option is for a server, and none of the models runs on one."""
    given = [name for name in (*SERVER_OPTIONS, "judge_url") if getattr(config, name) is not None]
    if given and not any(model.startswith("openai:") for model in models):
        flag = given[0].replace("_", "-")
        raise UsageError(f"--{flag} is for a server", hint="use an openai:NAME model", code="option-conflict")
