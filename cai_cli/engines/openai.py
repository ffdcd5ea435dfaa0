"""The engine for any OpenAI-compatible server: `--model openai:NAME --base-url URL`.

Chats go to chat completions, raw texts to completions. Such servers have limits:

- Seeds are best effort: the same request may get another text after the server changed or under another load.
- Not every server continues a chat inside the assistant's turn. The prefill is sent as the start of that turn, with the
  switches that vLLM and SGLang support, or without them if the server refuses them. If it refuses a started turn too,
  the question asks for an answer that begins with the prefill. The first form that the server accepts is used from
  then on. The prefill is removed from a completion that repeats it.
- Options are scored from the most likely tokens. In a chat, the token that follows the prefill counts, whether the
  server continued the prefill or the model wrote it itself, as few-shot examples show it; a letter that starts a
  sentence is not an answer. If an option is not among the most likely tokens, there is a second request (chats: without
  the prefill; raw texts: with each option in the prompt, by `echo`). If that fails too, the request fails; a
  log-probability is never guessed.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from cai_cli.common.errors import CaiError, RowError
from cai_cli.data.schema import Message
from cai_cli.engines.base import (
    ChatOptions,
    Completion,
    Engine,
    GenerationRequest,
    LogprobRequest,
    RequestFailure,
    Sampling,
    Server,
    Text,
    drop_broken_end,
)
from cai_cli.engines.openai_client import LOGPROBS_HINT, REFUSALS, Client
from cai_cli.engines.openai_response import ServerResponse, TokenLogprob
from cai_cli.engines.thoughts import never_left, without_thoughts

TOP_LOGPROBS = 20  # per token; the most that OpenAI and, by default, vLLM return
ANSWER_TOKENS = 16  # enough for a prefill that the model writes itself, and the option
_AROUND = " \t\n()[]*\"'.:"  # characters that may surround an option in its token
CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}
BEGIN = "Begin your answer with exactly these words: "

# How a chat's prefill is sent: as the start of the assistant's turn with or without `CONTINUE`, or in the question.
PrefillForm = Literal["continued", "started", "in the question"]
PREFILL_FORMS: Sequence[PrefillForm] = ("continued", "started", "in the question")


class OpenAIEngine(Engine):
    """Implements `Engine`. Each batch is one row and many threads call at once, so a row waits only for a free slot."""

    def __init__(self, model: str, server: Server, chat: ChatOptions | None = None) -> None:
        """Prepare the client; no request is sent.

        Raises:
            UsageError: The address or the key is not valid.
        """
        self.name, self.chat = model, chat or ChatOptions()
        self.client = Client(model, server)
        self.batch_size = 1
        self.workers = self.client.concurrency
        self.usage = self.client.usage
        self._prefill_form: PrefillForm | None = None  # the form that the server accepts; None before the first answer
        self._shows_logprobs = False  # whether an answer has held any
        self._without_logprobs = 0  # requests for them without any in the answers

    def identity(self) -> dict[str, Any]:
        return {"engine": "openai", "name": self.name, **self.chat.recorded()}

    def supports_chat(self) -> bool:
        return True

    def close(self) -> None:
        self.client.close()

    # --- text -------------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> list[Completion | RequestFailure]:
        """As `Engine.generate`.

        Raises:
            CaiError: The server is unreachable, or refuses every request.
        """
        return self.client.run_all(lambda request: self._completion(request, sampling), requests)

    async def _completion(self, request: GenerationRequest, sampling: Sampling) -> Completion | RequestFailure:
        body: dict[str, Any] = {
            "max_tokens": sampling.max_new_tokens,
            # Also where they are 1: vLLM and llama.cpp use the model's own values instead where they are missing.
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": request.seed & 0x7FFFFFFF,  # servers take 32 bits
        }
        if request.stop:
            body["stop"] = list(request.stop)
        try:
            response = await self._complete(request.text, request.prefill, body)
        except RowError as error:
            await self.client.reject(error)
            return RequestFailure(error.message)
        choice, tokens = response.choices[0], response.tokens
        end = choice.end(tokens.completion_tokens, sampling.max_new_tokens)
        if end is None:
            return RequestFailure(f"the server ended the reply with {choice.finish_reason!r}")
        thoughts = choice.thoughts.strip() or None
        if (text := choice.content) is None or (thoughts and not text.strip()):
            return RequestFailure(never_left(end) if thoughts else "the reply holds no text")
        prefill = request.prefill.strip()
        repeated = bool(prefill) and text.lstrip().startswith(prefill)
        if repeated:
            text = text.lstrip()[len(prefill) :]
        restarted = self._asks_for_prefill(request) and not repeated
        text, reason = drop_broken_end(text, end)
        counts = tokens.prompt_tokens, tokens.completion_tokens
        reply = without_thoughts(Completion(text, reason, *counts, restarted, thoughts))
        return reply if isinstance(reply, RequestFailure) else _cut_at(request.stop, reply)

    def _asks_for_prefill(self, request: GenerationRequest) -> bool:
        chat = not isinstance(request.text, str)
        return chat and bool(request.prefill) and self._prefill_form == "in the question"

    def _template_arguments(self) -> dict[str, Any]:
        """The arguments of the server's chat template, as vLLM, SGLang and llama.cpp take them, where any are given."""
        switch = {} if self.chat.thinking == "auto" else {"enable_thinking": self.chat.thinking == "on"}
        arguments = switch | dict(self.chat.template_args)
        return {"chat_template_kwargs": arguments} if arguments else {}

    async def _complete(self, text: Text, prefill: str, body: dict[str, Any]) -> ServerResponse:
        """The response to `text` and the start of its answer. Raises RowError and CaiError as `Client.request`."""
        if isinstance(text, str):
            return await self.client.request("completions", {"prompt": text + prefill, **body})
        if not prefill:
            return await self._chat(_as_json(text), body)
        *forms, last = [self._prefill_form] if self._prefill_form else PREFILL_FORMS
        for form in forms:
            try:
                return await self._prefilled(text, prefill, body, form)
            except RowError:
                if self._prefill_form == form:  # another request has shown that the server accepts it
                    raise
        return await self._prefilled(text, prefill, body, last)

    async def _prefilled(
        self, text: Sequence[Message], prefill: str, body: dict[str, Any], form: PrefillForm
    ) -> ServerResponse:
        """The response to a chat whose prefill is sent in one form, which is kept if the server accepts it."""
        messages = _as_json(text)
        if form == "in the question":
            messages = _asking_for(messages, prefill)
        else:
            messages.append({"role": "assistant", "content": prefill})
        response = await self._chat(messages, body, CONTINUE if form == "continued" else None)
        self._prefill_form = self._prefill_form or form
        return response

    async def _chat(
        self, messages: list[dict[str, str]], body: dict[str, Any], switches: dict[str, Any] | None = None
    ) -> ServerResponse:
        more = self._template_arguments() | (switches or {})
        body = {"messages": messages, **body} | ({"extra_body": more} if more else {})
        return await self.client.request("chat/completions", body)

    # --- option log-probabilities -----------------------------------------------------------------------------

    def option_logprobs(self, requests: Sequence[LogprobRequest]) -> list[list[float] | RequestFailure]:
        """As `Engine.option_logprobs`; a RequestFailure where the server does not return an option's log-probability.

        Raises:
            CaiError: As `generate`.
        """
        return self.client.run_all(self._scores, requests)

    async def _scores(self, request: LogprobRequest) -> list[float] | RequestFailure:
        raw = isinstance(request.text, str)
        methods = [self._from_next_token, self._from_echo] if raw else [self._from_prefilled_chat, self._from_chat]
        try:
            for method in methods:
                if (scores := await method(request)) is not None:
                    return scores
        except RowError as error:
            await self.client.reject(error)
            return RequestFailure(error.message)
        if not self._shows_logprobs:
            self._without_logprobs += 1
            if self._without_logprobs >= REFUSALS:
                raise self.client.end(self._no_logprobs())
        return RequestFailure("no vote: the server does not show the log-probability of every option")

    def _no_logprobs(self) -> CaiError:
        return CaiError(
            f"{self.client.base_url}: the answers hold no log-probabilities, in {REFUSALS} of {REFUSALS} requests",
            hint=LOGPROBS_HINT,
            code="wrong-answer",
        )

    async def _from_next_token(self, request: LogprobRequest) -> list[float] | None:
        """The scores from the tokens most likely to follow the raw text."""
        body = {"max_tokens": 1, "temperature": 0, "logprobs": TOP_LOGPROBS}
        response = await self._complete(request.text, request.prefill, body)
        logprobs = response.choices[0].logprobs
        self._shows_logprobs |= logprobs is not None
        return None if logprobs is None else _option_sums(request.options, logprobs.likeliest())

    async def _from_echo(self, request: LogprobRequest) -> list[float] | None:
        """The scores of the options as the ends of raw prompts that the server echoes, one request each."""
        prompt = f"{request.text}{request.prefill}"
        scores = []
        for option in request.options:
            body = {"max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
            response = await self._complete(prompt, option, body)
            logprobs = response.choices[0].logprobs
            self._shows_logprobs |= logprobs is not None
            # For a model without a start token llama-cpp-python omits the last token, and gives each token the value of
            # the one before it.
            if logprobs is None or len(logprobs.tokens) != response.tokens.total:
                return None
            offsets = zip(logprobs.tokens, logprobs.token_logprobs, logprobs.text_offset, strict=False)
            end = len(prompt) + len(option)
            own = [(token, value) for token, value, offset in offsets if len(prompt) <= offset < end]
            if "".join(token for token, _ in own) != option or any(value is None for _, value in own):
                return None  # a token lies across the start or the end of the option
            scores.append(math.fsum(value for _, value in own if value is not None))
        return scores

    async def _from_prefilled_chat(self, request: LogprobRequest) -> list[float] | None:
        """The scores from the answer to a chat whose last turn starts with the prefill."""
        return await self._from_answer(request, request.prefill)

    async def _from_chat(self, request: LogprobRequest) -> list[float] | None:
        """The scores from the answer to the chat alone: the model writes the prefill itself, or only the option."""
        return await self._from_answer(request, "") if request.prefill else None

    async def _from_answer(self, request: LogprobRequest, prefill: str) -> list[float] | None:
        body = {"max_tokens": ANSWER_TOKENS, "temperature": 0, "logprobs": True, "top_logprobs": TOP_LOGPROBS}
        response = await self._complete(request.text, prefill, body)
        logprobs = response.choices[0].logprobs
        self._shows_logprobs |= logprobs is not None and bool(logprobs.content)
        return None if logprobs is None else _answer_scores(logprobs.content or [], request.options, request.prefill)


def _as_json(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _asking_for(messages: list[dict[str, str]], prefill: str) -> list[dict[str, str]]:
    """The chat with a question that asks for the last paragraph of the prefill; earlier ones are a turn before it."""
    written, _, last = prefill.rpartition("\n\n")
    if written:
        return [*messages, {"role": "assistant", "content": written}, {"role": "user", "content": BEGIN + last}]
    *earlier, question = messages
    return [*earlier, question | {"content": f"{question['content']}\n\n{BEGIN}{last}"}]


def _cut_at(stops: Sequence[str], reply: Completion) -> Completion:
    """A reply up to the first stop string, for servers that take none."""
    end = min((reply.text.find(stop) for stop in stops if stop in reply.text), default=-1)
    return reply if end < 0 else replace(reply, text=reply.text[:end], finish_reason="stop")


def _bare(text: str) -> str:
    return text.strip(_AROUND)


def _answer_scores(tokens: Sequence[TokenLogprob], options: Sequence[str], prefill: str) -> list[float] | None:
    """The log-probabilities of the options at the token where the answer names one.

    The token must come first or directly after the prefill, and must not be the first word of a sentence.
    """
    before = ""
    for index, token in enumerate(tokens):
        if _bare(token.token) in map(_bare, options):
            rest = token.token.rstrip()[-1:] + "".join(t.token for t in tokens[index + 1 :])
            alone = re.match(r"\w(\w|\s+\w)", rest) is None
            repeated = ("", prefill, prefill.rpartition("\n\n")[2])
            if not alone or _bare(before).lower() not in (_bare(text).lower() for text in repeated):
                return None
            return _option_sums(options, token.likeliest())
        before += token.token
    return None


def _option_sums(options: Sequence[str], top_logprobs: Iterable[tuple[str, float]]) -> list[float] | None:
    """For each option the log of the summed probability of the tokens that spell it, with or without a space or a
    bracket; None if an option has no such token."""
    by_option: Mapping[str, list[float]] = {_bare(option): [] for option in options}
    for token, logprob in top_logprobs:
        if _bare(token) in by_option:
            by_option[_bare(token)].append(logprob)
    if "" in by_option or len(by_option) < len(options) or not all(by_option.values()):
        return None
    parts = [by_option[_bare(option)] for option in options]
    return [max(part) + math.log(math.fsum(math.exp(value - max(part)) for value in part)) for part in parts]
