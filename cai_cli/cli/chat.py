"""`cai chat MODEL [MODEL2]`: talk to one model, or to two that hear the same and answer beside each other."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from cai_cli.common import console
from cai_cli.common.seeds import seed_for
from cai_cli.data.schema import Message
from cai_cli.engines import open_engine
from cai_cli.engines.base import Completion, Engine, GenerationRequest, RequestFailure, Sampling, Server
from cai_cli.prompting.base import PromptFormat, assistant, reply_request, resolve_prompt_format, user
from cai_cli.runtime.config import Effect, Group, Option, option, redefine
from cai_cli.runtime.shared_options import DEFAULT_MODEL, Device, DType, EngineOptions, RunOptions, SamplingOptions

HELP = "/reset starts a new conversation, /quit (or the end of input) ends"


@dataclass
class ChatSession:
    """A model and its side of the conversation."""

    name: str
    engine: Engine
    form: PromptFormat
    history: list[Message] = field(default_factory=list)

    def answer(self, said: str, sampling: Sampling, seed: int) -> Completion | RequestFailure:
        """The model's reply to `said`; both are then part of the history. After a refusal neither is."""
        heard = [*self.history, user(said)]
        request = reply_request(heard, self.form)
        turn = seed_for(seed, "chat", len(heard))
        (reply,) = self.engine.generate(
            [GenerationRequest(request.text, turn, request.prefill, request.stop)], sampling
        )
        if isinstance(reply, Completion):
            self.history = [*heard, assistant(reply.text.strip())]
        return reply


def lines() -> Iterator[str]:
    """What the user says: one line a turn, with a prompt and line editing on a terminal. Bytes that are not UTF-8
    become lone surrogates."""
    if not sys.stdin.isatty():
        yield from (line.decode(errors="surrogateescape") for line in sys.stdin.buffer)
        return
    with suppress(ImportError):  # not built into every Python
        import readline  # noqa: F401 - gives input() history and editing
    while True:
        try:
            yield input("you> ")
        except EOFError:
            print()
            return


def is_utf8(said: str) -> bool:
    try:
        said.encode()
    except UnicodeEncodeError:
        return False
    return True


def labels(given: Sequence[str]) -> list[str]:
    """What the speakers are called: directories by their last name where that tells them apart, equal ones numbered."""
    short = [Path(name).name if Path(name).is_dir() else name for name in given]
    if len(set(short)) == len(given):
        return short
    if len(set(given)) == len(given):
        return list(given)
    return [f"{name} {number}" for number, name in enumerate(short, start=1)]


def show_answers(partners: Sequence[ChatSession], answers: Sequence[Completion | RequestFailure]) -> None:
    """Beside each other on a terminal, one after the other elsewhere. A refusal goes to stderr."""
    replies = []
    for partner, answer in zip(partners, answers, strict=True):
        if isinstance(answer, RequestFailure):
            console.warn(f"{partner.name}: {answer.reason}; this turn is not part of its conversation")
        else:
            cut = " [cut at --max-new-tokens]" if answer.finish_reason == "length" else ""
            replies.append((console.safe(partner.name), console.safe(answer.text.strip()) + cut))
    if sys.stdout.isatty() and len(replies) > 1:
        out = Console(highlight=False)
        width = out.width // 2 - 1
        out.print(Columns([Panel(Text(said), title=Text(name), width=width) for name, said in replies]))
        return
    for name, said in replies:
        print(f"{name}> {said}", flush=True)


class ChatConfig(SamplingOptions):
    """Chat with one model, or with two side by side.

    One line is one turn. /reset starts a new conversation, /quit ends it.
    """

    model: str = option(
        DEFAULT_MODEL,
        "Directory, Hub name, alias, openai:NAME or scripted:FILE.",
        Option(Effect.HASHED, Group.MODEL, argument=True),
    )
    second: str | None = option(
        None,
        "A second model that gets the same messages.",
        Option(Effect.HASHED, Group.MODEL, metavar="MODEL2", argument=True),
    )
    temperature: float = redefine(SamplingOptions, "temperature", 0.7)
    base_url: str | None = redefine(EngineOptions, "base_url", None)
    device: Device = redefine(EngineOptions, "device", Device.AUTO)
    dtype: DType = redefine(EngineOptions, "dtype", DType.AUTO)
    quiet: bool = redefine(RunOptions, "quiet", False)


def open_sessions(config: ChatConfig) -> list[ChatSession]:
    """A conversation with each model. Raises UsageError, CaiError."""
    sessions = []
    given = [config.model] if config.second is None else [config.model, config.second]
    served = [name for name in given if name.startswith("openai:")]
    for name, label in zip(given, labels(given), strict=True):
        server = Server(config.base_url) if name in served or not served else None
        size = None if name in served else 1
        engine = open_engine(name, batch_size=size, device=config.device, dtype=config.dtype, server=server)
        sessions.append(ChatSession(label, engine, resolve_prompt_format(config.prompt_format, engine)))
    return sessions


def run(config: ChatConfig) -> None:
    """Chat until `/quit` or the end of stdin. Raises UsageError, CaiError."""
    sessions = open_sessions(config)
    console.say(f"chat with {' and '.join(session.name for session in sessions)}: {HELP}")
    for line in lines():
        text = line.strip()
        if not is_utf8(text):
            console.warn("this line is not UTF-8; it is not part of the conversation")
        elif text == "/quit":
            return
        elif text == "/reset":
            for session in sessions:
                session.history = []
            console.say("a new conversation starts")
        elif text.startswith("/"):
            console.warn(f"no command {text.split()[0]}: {HELP}")
        elif text:
            show_answers(sessions, [session.answer(text, config.sampling(), config.seed) for session in sessions])
