"""`cai chat MODEL [MODEL2]`: a chat with one model, or with two that receive the same messages, side by side."""

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
from cai_cli.data.reply_ends import CUT_OFF
from cai_cli.data.schema import Message
from cai_cli.engines import open_engine
from cai_cli.engines.base import (
    ChatOptions,
    Completion,
    Engine,
    GenerationRequest,
    RequestFailure,
    Sampling,
    Server,
)
from cai_cli.prompting.base import PromptFormat, assistant, reply_request, resolve_prompt_format, user
from cai_cli.prompting.system import SystemOptions
from cai_cli.runtime.config import Effect, Group, Option, option, redefine
from cai_cli.runtime.shared_options import (
    DEFAULT_MODEL,
    ChatTemplateOptions,
    Device,
    EngineDType,
    EngineOptions,
    RunOptions,
    SamplingOptions,
    Thinking,
    named_values,
)

HELP = "/reset starts a new conversation, /quit (or end of input) ends the chat"


@dataclass
class ChatSession:
    """A model and its conversation.

    Attributes:
        name: The name of the model in the output.
        engine: The model.
        form: Whether prompts are written in the chat template or as raw text.
        opening: What every conversation begins with: a system prompt, or nothing.
        history: The messages so far.
    """

    name: str
    engine: Engine
    form: PromptFormat
    opening: Sequence[Message] = ()
    history: list[Message] = field(default_factory=list)

    def answer(self, message: str, sampling: Sampling, seed: int) -> Completion | RequestFailure:
        """Reply to a message. Both are added to the history, unless the request fails."""
        messages = [*self.history, user(message)]
        request = reply_request([*self.opening, *messages], self.form)
        turn_seed = seed_for(seed, "chat", len(messages))
        (reply,) = self.engine.generate(
            [GenerationRequest(request.text, turn_seed, request.prefill, request.stop)], sampling
        )
        if isinstance(reply, Completion):
            self.history = [*messages, assistant(reply.text.strip())]
        return reply


def lines() -> Iterator[str]:
    """The lines that the user types, with a prompt and line editing on a terminal. Bytes that are not UTF-8 become lone
    surrogates."""
    if not sys.stdin.isatty():
        yield from (line.decode(errors="surrogateescape") for line in sys.stdin.buffer)
        return
    with suppress(ImportError):  # some builds of Python lack it
        import readline  # noqa: F401 - gives input() history and editing
    while True:
        try:
            yield input("you> ")
        except EOFError:
            print()
            return


def is_utf8(text: str) -> bool:
    """Whether a line was UTF-8, which means that it has no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def labels(given: Sequence[str]) -> list[str]:
    """The names of the models in the output: the last part of a directory where unique; equal names are numbered."""
    short = [Path(name).name if Path(name).is_dir() else name for name in given]
    if len(set(short)) == len(given):
        return short
    if len(set(given)) == len(given):
        return list(given)
    return [f"{name} {number}" for number, name in enumerate(short, start=1)]


def show_answers(sessions: Sequence[ChatSession], answers: Sequence[Completion | RequestFailure]) -> None:
    """Print the answers, side by side on a terminal and one after the other elsewhere. Failures go to stderr."""
    replies = []
    for session, answer in zip(sessions, answers, strict=True):
        if isinstance(answer, RequestFailure):
            console.warn(f"{session.name}: {answer.reason}; this turn is not part of its conversation")
        else:
            cut = " [cut off at --max-new-tokens]" if answer.finish_reason == CUT_OFF else ""
            replies.append((console.safe(session.name), console.safe(answer.text.strip()) + cut))
    if sys.stdout.isatty() and len(replies) > 1:
        out = Console(highlight=False)
        width = out.width // 2 - 1
        out.print(Columns([Panel(Text(text), title=Text(name), width=width) for name, text in replies]))
        return
    for name, text in replies:
        print(f"{name}> {text}", flush=True)


class ChatConfig(SystemOptions, SamplingOptions, ChatTemplateOptions):
    """Chat with one model, or with two side by side.

    Each line is one turn. /reset starts a new conversation, /quit ends the chat.
    """

    model: str = option(
        DEFAULT_MODEL,
        "Directory, Hub name, alias, openai:NAME or scripted:FILE.",
        Option(Effect.HASHED, Group.MODEL, argument=True),
    )
    second: str | None = option(
        None,
        "A second model that receives the same messages.",
        Option(Effect.HASHED, Group.MODEL, metavar="MODEL2", argument=True),
    )
    temperature: float = redefine(SamplingOptions, "temperature", 0.7)
    base_url: list[str] | None = redefine(EngineOptions, "base_url", None)
    device: Device = redefine(EngineOptions, "device", Device.AUTO)
    dtype: EngineDType = redefine(EngineOptions, "dtype", EngineDType.AUTO)
    thinking: Thinking = redefine(EngineOptions, "thinking", Thinking.AUTO)
    template_arg: list[str] | None = redefine(EngineOptions, "template_arg", None)
    quiet: bool = redefine(RunOptions, "quiet", False)


def open_sessions(config: ChatConfig) -> list[ChatSession]:
    """Open the models, each with an empty conversation. Raises UsageError, CaiError."""
    sessions = []
    arguments = named_values(config.template_arg, "--template-arg")
    chat = ChatOptions(config.thinking.value, arguments, config.chat_template)
    system = config.system_prompt()
    opening = [] if system is None else [Message(role="system", content=system)]
    names = [config.model] if config.second is None else [config.model, config.second]
    server_models = [name for name in names if name.startswith("openai:")]
    for name, label in zip(names, labels(names), strict=True):
        server = Server(config.base_url) if name in server_models or not server_models else None
        size = None if name in server_models else 1
        engine = open_engine(name, batch_size=size, device=config.device, dtype=config.dtype, server=server, chat=chat)
        sessions.append(ChatSession(label, engine, resolve_prompt_format(config.prompt_format, engine), opening))
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
            console.warn(f"unknown command {text.split()[0]}: {HELP}")
        elif text:
            show_answers(sessions, [session.answer(text, config.sampling(), config.seed) for session in sessions])
