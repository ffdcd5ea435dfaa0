"""The endpoint engine: any OpenAI-compatible server, `--model openai:NAME --base-url URL`.

Chat texts go to chat completions, raw texts to completions. What such a server cannot do, and what is done instead:

- Its seed is best effort: the same ask may get another text after the server changed or under another load.
- A chat cannot everywhere be continued inside the assistant's turn. The cue is sent as the start of that turn with
  the switches that vLLM and SGLang know, without them where the server refuses those, and cut off where it comes back.
- Options are scored from the likeliest tokens. In chat form the answer is looked for where the model stands after the
  cue, whether the server put it there or the model wrote it (few-shot examples show it): a letter that starts a
  sentence is no answer. An option that is not among the likeliest is asked for again (chat: without the cue;
  completions: as part of the prompt, `echo`), and then there is no vote. It is never a default.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cai_cli.common.errors import RowError
from cai_cli.data.schema import Message
from cai_cli.engines.base import (
    Completion,
    Engine,
    GenerationRequest,
    LogprobRequest,
    RequestFailure,
    Sampling,
    Server,
    Text,
)
from cai_cli.engines.openai_client import Answer, Client, Token

LIKELIEST = 20  # log-probabilities a token; the most that OpenAI and, by default, vLLM give
ANSWER_TOKENS = 16  # room for a cue that the model writes itself, and the option
_AROUND = " \t\n()[]*\"'.:"  # what may stand around an option in a token
CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}


class EndpointEngine(Engine):
    """Implements `Engine`. Each window is one row and many are in work at once: rows wait for nothing but a slot."""

    def __init__(self, model: str, server: Server) -> None:
        """Raises: UsageError."""
        self.name = model
        self.client = Client(model, server)
        self.batch_size = 1
        self.workers = self.client.concurrency
        self.usage = self.client.usage
        self._continues: bool | None = None  # not known yet

    def identity(self) -> dict[str, Any]:
        return {"engine": "openai", "name": self.name}

    def speaks_chat(self) -> bool:
        return True

    def close(self) -> None:
        self.client.close()

    # --- text -------------------------------------------------------------------------------------------------

    def generate(self, asks: Sequence[GenerationRequest], sampling: Sampling) -> list[Completion | RequestFailure]:
        """One answer per ask, in order. Raises: CaiError when the server is gone or will not have us."""
        return self.client.run_all(lambda ask: self._reply(ask, sampling), asks)

    async def _reply(self, ask: GenerationRequest, sampling: Sampling) -> Completion | RequestFailure:
        body: dict[str, Any] = {
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": ask.seed & 0x7FFFFFFF,  # servers hold 32 bits
        }
        if ask.stop:
            body["stop"] = list(ask.stop)
        try:
            answer = await self._complete(ask.text, ask.prefill, body)
        except RowError as error:
            return RequestFailure(error.message)
        choice = answer.choices[0]
        if choice.finish_reason not in ("stop", "length"):
            return RequestFailure(f"the server ended the reply with {choice.finish_reason!r}")
        if choice.said is None:
            return RequestFailure("the reply holds no text")
        text = choice.said
        if ask.prefill.strip() and text.lstrip().startswith(ask.prefill.strip()):
            text = text.lstrip()[len(ask.prefill.strip()) :]
        return Completion(text, choice.finish_reason, answer.tokens.prompt_tokens, answer.tokens.completion_tokens)

    async def _complete(self, text: Text, prefill: str, body: dict[str, Any]) -> Answer:
        """Raises: RowError, CaiError."""
        if isinstance(text, str):
            return await self.client.ask("completions", {"prompt": text + prefill, **body})
        body = {"messages": _as_json(text), **body}
        if not prefill:
            return await self.client.ask("chat/completions", body)
        body["messages"].append({"role": "assistant", "content": prefill})
        if self._continues is not False:
            try:
                answer = await self.client.ask("chat/completions", body | {"extra_body": CONTINUE})
            except RowError:
                if self._continues:
                    raise
            else:
                self._continues = True
                return answer
        answer = await self.client.ask("chat/completions", body)
        self._continues = False  # it was the switches that were refused, not the row
        return answer

    # --- option log-probabilities -----------------------------------------------------------------------------

    def option_logprobs(self, requests: Sequence[LogprobRequest]) -> list[list[float] | RequestFailure]:
        """For each request the natural log-probability of each option, or a Refusal where the server does not show
        it. Raises: CaiError as `generate`."""
        return self.client.run_all(self._scores, requests)

    async def _scores(self, request: LogprobRequest) -> list[float] | RequestFailure:
        ways = [self._likeliest, self._echoed] if isinstance(request.text, str) else [self._spoken, self._spoken_anew]
        try:
            for way in ways:
                if (scores := await way(request)) is not None:
                    return scores
        except RowError as error:
            return RequestFailure(error.message)
        return RequestFailure("no vote: the server does not show the log-probability of every option")

    async def _likeliest(self, request: LogprobRequest) -> list[float] | None:
        """From the tokens most likely to follow the raw text."""
        body = {"max_tokens": 1, "temperature": 0, "logprobs": LIKELIEST}
        answer = await self._complete(request.text, request.prefill, body)
        found = answer.choices[0].logprobs
        if found is None or not found.top_logprobs:
            return None
        return _masses(request.options, (found.top_logprobs[0] or {}).items())

    async def _echoed(self, request: LogprobRequest) -> list[float] | None:
        """From each option as the end of a raw prompt that is echoed."""
        prompt = f"{request.text}{request.prefill}"
        scores = []
        for option in request.options:
            body = {"max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
            answer = await self._complete(prompt, option, body)
            found = answer.choices[0].logprobs
            # llama-cpp-python leaves out the last token, and gives each the value of the one before it, where the
            # model has no start token.
            if found is None or len(found.tokens) != answer.tokens.total:
                return None
            read = [
                (token, value)
                for token, value, at in zip(found.tokens, found.token_logprobs, found.text_offset, strict=False)
                if len(prompt) <= at < len(prompt) + len(option)
            ]
            if "".join(token for token, _ in read) != option or any(value is None for _, value in read):
                return None  # the option does not start and end where tokens do
            scores.append(math.fsum(value for _, value in read if value is not None))
        return scores

    async def _spoken(self, request: LogprobRequest) -> list[float] | None:
        """From the answer to a chat whose last turn starts with the cue."""
        return await self._voted(request, request.prefill)

    async def _spoken_anew(self, request: LogprobRequest) -> list[float] | None:
        """From the answer to the chat alone: the model writes the cue, or nothing before the option."""
        return await self._voted(request, "") if request.prefill else None

    async def _voted(self, request: LogprobRequest, prefill: str) -> list[float] | None:
        body = {"max_tokens": ANSWER_TOKENS, "temperature": 0, "logprobs": True, "top_logprobs": LIKELIEST}
        answer = await self._complete(request.text, prefill, body)
        found = answer.choices[0].logprobs
        return None if found is None else _vote(found.content or [], request.options, request.prefill)


def _as_json(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _bare(text: str) -> str:
    return text.strip(_AROUND)


def _vote(tokens: Sequence[Token], options: Sequence[str], prefill: str) -> list[float] | None:
    """The options' log-probabilities at the token where the answer names one: right at its start or right after the
    cue, and not as the first word of a sentence."""
    said = ""
    for index, token in enumerate(tokens):
        if _bare(token.token) in map(_bare, options):
            rest = token.token.rstrip()[-1:] + "".join(t.token for t in tokens[index + 1 :])
            alone = re.match(r"\w(\w|\s+\w)", rest) is None
            placed = _bare(said).lower() in ("", _bare(prefill).lower())
            return _masses(options, ((t.token, t.logprob) for t in token.top_logprobs)) if alone and placed else None
        said += token.token
    return None


def _masses(options: Sequence[str], likeliest: Iterable[tuple[str, float]]) -> list[float] | None:
    """For each option the log of the summed probability of the tokens that spell it, with or without a space or a
    bracket; None when one has none."""
    found: Mapping[str, list[float]] = {_bare(option): [] for option in options}
    for token, logprob in likeliest:
        if _bare(token) in found:
            found[_bare(token)].append(logprob)
    if "" in found or len(found) < len(options) or not all(found.values()):
        return None
    sums = [found[_bare(option)] for option in options]
    return [max(part) + math.log(math.fsum(math.exp(value - max(part)) for value in part)) for part in sums]
