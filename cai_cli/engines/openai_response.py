"""The parts of a server's response that are read, in the spellings that servers use.

OpenAI-compatible servers agree on the outline of a response and differ in its details: how the end of a reply is named,
whether its text is a string or a list of parts, where the thoughts of a reasoning model are, and whether numbers that
JSON lacks appear among the log-probabilities.
"""

import math
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator

_ENDS = {
    "stop": "stop eos eos_token end end_turn end_of_turn stop_sequence stop_token finish_reason_stop",
    "length": "length max_tokens max_length max_new_tokens max_output_tokens model_length finish_reason_max_tokens",
}
_FINISH_REASONS = {spelling: reason for reason, spellings in _ENDS.items() for spelling in spellings.split()}


def _finite(value: Any) -> Any:
    """None for NaN and the infinities, which some servers write for tokens that cannot occur."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _zero_if_missing(value: Any) -> Any:
    return 0 if value is None else value


def _empty_if_missing(value: Any) -> Any:
    return [] if value is None else value


Logprob = Annotated[float | None, BeforeValidator(_finite)]
Count = Annotated[int, BeforeValidator(_zero_if_missing)]


class TopLogprob(BaseModel):
    """A token and its log-probability (natural logarithm); None where that is not a finite number."""

    token: str
    logprob: Logprob = None


class TokenLogprob(TopLogprob):
    """A generated token with the most likely tokens at its position."""

    top_logprobs: Annotated[list[TopLogprob], BeforeValidator(_empty_if_missing)] = []

    def likeliest(self) -> Iterator[tuple[str, float]]:
        """The most likely tokens that have a log-probability."""
        return ((one.token, one.logprob) for one in self.top_logprobs if one.logprob is not None)


class Logprobs(BaseModel):
    """Log-probabilities of a response: chat completions fill `content`, completions the other fields."""

    content: list[TokenLogprob] | None = None
    tokens: Annotated[list[str], BeforeValidator(_empty_if_missing)] = []
    token_logprobs: Annotated[list[Logprob], BeforeValidator(_empty_if_missing)] = []
    top_logprobs: list[dict[str, Logprob] | None] | None = None
    text_offset: Annotated[list[int], BeforeValidator(_empty_if_missing)] = []

    def likeliest(self) -> Iterator[tuple[str, float]]:
        """The most likely first tokens of a completion that have a log-probability."""
        first = (self.top_logprobs or [None])[0] or {}
        return ((token, value) for token, value in first.items() if value is not None)


class ChatMessage(BaseModel):
    """The message of a chat completion.

    Attributes:
        content: The text, or a list of parts: text, and the thoughts of a reasoning model.
        reasoning_content: The thoughts (vLLM, SGLang, llama.cpp, DeepSeek).
        reasoning: The thoughts (OpenRouter, LM Studio).
        refusal: The words in which the model declined, where the server sets them apart from the content.
    """

    content: str | list[Any] | None = None
    reasoning_content: Any = None
    reasoning: Any = None
    refusal: str | None = None

    @property
    def text(self) -> str | None:
        """The reply without thoughts; a refusal is a reply."""
        if isinstance(self.content, list):
            texts = [part for part in map(_text_of_part, self.content) if part is not None]
            return "".join(texts) if texts else self.refusal
        return self.refusal if self.refusal and not self.content else self.content

    @property
    def thoughts(self) -> str:
        """The thoughts that the server set apart; empty where there are none."""
        parts = self.content if isinstance(self.content, list) else []
        apart = [text for text in (self.reasoning_content, self.reasoning) if isinstance(text, str) and text]
        return apart[0] if apart else "".join(filter(None, map(_thoughts_of_part, parts)))


def _text_of_part(part: Any) -> str | None:
    if isinstance(part, dict) and part.get("type", "text") in ("text", "output_text"):
        part = part.get("text")
    return part if isinstance(part, str) else None


def _thoughts_of_part(part: Any) -> str | None:
    if not isinstance(part, dict) or part.get("type") not in ("thinking", "reasoning"):
        return None
    inner = part.get("thinking") or part.get("reasoning") or part.get("text")
    parts = inner if isinstance(inner, list) else [inner]
    return "".join(filter(None, map(_text_of_part, parts)))


class Choice(BaseModel):
    """One answer of a response: a chat completion's has `message`, a completion's `text`."""

    text: str | None = None
    message: ChatMessage | None = None
    finish_reason: str | None = None
    logprobs: Logprobs | None = None

    @property
    def content(self) -> str | None:
        """The generated text without thoughts, if any."""
        return self.message.text if self.message else self.text

    @property
    def thoughts(self) -> str:
        """The thoughts that the server set apart; empty where there are none."""
        return self.message.thoughts if self.message else ""

    def end(self, new_tokens: int, max_new_tokens: int) -> str | None:
        """Why the reply ended, "stop" or "length"; None where the server gives another reason.

        Args:
            new_tokens: The tokens of the reply, which decide where the server gives no reason; 0 if unknown.
            max_new_tokens: The most tokens that were requested.

        >>> [Choice(finish_reason=reason).end(9, 9) for reason in ("STOP", "eos_token", "model_length", None)]
        ['stop', 'stop', 'length', 'length']
        """
        if not self.finish_reason:
            return "length" if new_tokens >= max_new_tokens else "stop"
        return _FINISH_REASONS.get(self.finish_reason.lower())


class TokenUsage(BaseModel):
    """The token counts of a response."""

    prompt_tokens: Count = 0
    completion_tokens: Count = 0

    @property
    def total(self) -> int:
        """Prompt and generated tokens together."""
        return self.prompt_tokens + self.completion_tokens


class ServerResponse(BaseModel):
    """The body of a response."""

    model: str | None = None
    choices: list[Choice]
    usage: TokenUsage | None = None

    @property
    def tokens(self) -> TokenUsage:
        """The token counts; zeros if the server gives none."""
        return self.usage or TokenUsage()
