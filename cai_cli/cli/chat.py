"""`cai chat MODEL [MODEL2]`: talk to one model, or to two that hear the same and answer beside each other."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from cai_cli.cli import options
from cai_cli.common import console
from cai_cli.common.seeds import seed_for
from cai_cli.data.schema import Message
from cai_cli.engines import open_engine
from cai_cli.engines.base import Completion, Engine, GenerationRequest, RequestFailure, Sampling, Server
from cai_cli.prompting.base import PromptFormat, assistant, reply_request, resolve_prompt_format, user

HELP = "/reset starts afresh, /quit (or the end of input) ends"


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


def command(
    model: Annotated[
        str, typer.Argument(help="Directory, Hub name, alias, openai:NAME or scripted:FILE.", show_default=False)
    ] = options.DEFAULT_MODEL,
    second: Annotated[
        str | None, typer.Argument(metavar="MODEL2", help="A second model to hear the same.", show_default=False)
    ] = None,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.7,
    top_p: options.TopP = 1.0,
    prompt_format: options.PromptFormatOption = "auto",
    seed: options.Seed = 0,
    base_url: options.BaseUrl = None,
    device: options.Device = "auto",
    dtype: options.DType = "auto",
    quiet: options.Quiet = False,
) -> None:
    """Talk to one model, or to two side by side.

    One line is one turn. /reset starts the conversation afresh, /quit ends it.
    """
    partners = []
    given = [model] if second is None else [model, second]
    served = [name for name in given if name.startswith("openai:")]
    for name, label in zip(given, labels(given), strict=True):
        server = Server(base_url) if name in served or not served else None
        size = None if name in served else 1
        engine = open_engine(name, batch_size=size, device=device, dtype=dtype, server=server)
        partners.append(ChatSession(label, engine, resolve_prompt_format(prompt_format, engine)))
    sampling = Sampling(max_new_tokens, temperature, top_p)
    console.say(f"chat with {' and '.join(p.name for p in partners)}: {HELP}")
    for line in lines():
        said = line.strip()
        if not is_utf8(said):
            console.warn("this line is not UTF-8; it is not part of the conversation")
        elif said == "/quit":
            return
        elif said == "/reset":
            for partner in partners:
                partner.history = []
            console.say("the conversation starts afresh")
        elif said.startswith("/"):
            console.warn(f"no command {said.split()[0]}: {HELP}")
        elif said:
            show_answers(partners, [partner.answer(said, sampling, seed) for partner in partners])
