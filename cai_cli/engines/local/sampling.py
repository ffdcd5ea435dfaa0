"""Samples tokens. Each row has its own noise, so its text does not depend on the batch it is in."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cai_cli.common.errors import CaiError
from cai_cli.engines.base import Completion, GenerationRequest, Sampling, drop_broken_end
from cai_cli.engines.thoughts import separate
from cai_cli.engines.tokenization import decode, decode_reply

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK = 256  # vocabulary entries; the cumulative sum runs over chunks first, then within one


def uniforms(seed: int, count: int) -> Any:
    """`count` uniform random numbers in [0, 1), float64, from `seed` alone; the i-th one draws a row's i-th token."""
    import numpy as np

    return np.random.Generator(np.random.Philox(key=seed)).random(count)


def draw(logits: "Tensor", noise: "Tensor", sampling: Sampling, names: Sequence[str] = ()) -> "Tensor":
    """One token id for each row, by inverting the cumulative distribution at the row's noise.

    Args:
        logits: (rows, vocabulary).
        noise: (rows,), uniform in [0, 1), float64. Not used at temperature 0.
        sampling: The temperature and top-p.
        names: The names of the rows, for messages.

    Returns:
        (rows,) token ids; the most likely ones at temperature 0.

    Raises:
        CaiError: The logits of a row contain NaN or infinity (`not-finite`).
    """
    if sampling.temperature == 0:
        check_finite(logits.amax(-1), names)
        return logits.argmax(-1)
    scaled = logits if sampling.temperature == 1 else logits.float() / sampling.temperature
    weights = scaled.float().softmax(-1)
    check_finite(weights[:, 0], names)  # one NaN or infinity among a row's logits makes all of its weights NaN
    if sampling.top_p < 1:
        weights *= weights >= _smallest_kept_weight(weights, sampling.top_p)[:, None]
    return _inverse_cdf(weights, noise)


def check_finite(values: "Tensor", names: Sequence[str] = ()) -> None:
    """Check that every value (one for each row) is finite.

    Raises:
        CaiError: A value is NaN or infinite (`not-finite`); the message names its row.
    """
    finite = values.isfinite()
    if not bool(finite.all()):
        name = names[finite.tolist().index(False)] if names else ""
        at = f" at row {name!r}" if name else ""
        raise CaiError(
            f"the model's logits contain NaN or infinity{at}: its weights are damaged or overflow in this dtype",
            hint="use --dtype float32, or train with a smaller learning rate",
            code="not-finite",
        )


def _inverse_cdf(weights: "Tensor", noise: "Tensor") -> "Tensor":
    """The first index at which the cumulative sum of `weights` (rows, vocabulary; not normalised) exceeds the share
    `noise` (rows,) of its total."""
    import torch

    rows, vocabulary = weights.shape
    if vocabulary % _CHUNK:
        weights = torch.nn.functional.pad(weights, (0, -vocabulary % _CHUNK))
    padded = weights.view(rows, -1, _CHUNK)
    sums = padded.sum(-1).double().cumsum(-1)
    target = noise[:, None] * sums[:, -1:]
    chunk = torch.searchsorted(sums, target, right=True).clamp_(max=sums.shape[1] - 1)
    before = torch.where(chunk > 0, sums.gather(1, (chunk - 1).clamp(min=0)), 0.0)
    inside = padded.gather(1, chunk[:, :, None].expand(-1, -1, _CHUNK))[:, 0].double()
    index = torch.searchsorted(inside.cumsum(-1), target - before, right=True)
    # Rounding may push the target past the end of the chunk. Then the chunk's last token with any weight is drawn.
    last = _CHUNK - 1 - (inside.flip(-1) > 0).int().argmax(-1, keepdim=True)
    return (chunk * _CHUNK + index.minimum(last))[:, 0]


def _smallest_kept_weight(weights: "Tensor", top_p: float) -> "Tensor":
    """For each row the least weight that top-p keeps: that of the last of the most likely tokens that together reach
    `top_p` of the total. Tokens of equal weight are all kept."""
    count = 256
    total = weights.sum(-1, dtype=weights.double().dtype)
    while True:
        largest = weights.topk(min(count, weights.shape[-1])).values
        reached = largest.double().cumsum(-1) >= (top_p * total)[:, None]
        if count >= weights.shape[-1] or bool(reached[:, -1].all()):
            break
        count *= 8  # a flat distribution: look at more of it
    reached[:, -1] = True
    return largest.gather(1, reached.int().argmax(-1, keepdim=True))[:, 0]


@dataclass
class ActiveSequence:
    """One row in generation.

    Attributes:
        index: The index of its request.
        request: The request.
        prompt: The token ids of the prompt.
        noise: Uniform random numbers; `noise[i]` draws `new[i]`.
        new: The token ids generated so far.
        completion: The result, once the row has ended; its text holds the thoughts.
        logprobs: The log-probability with which each token of `new` was drawn; None where it is not wanted.
        opened: The opening of thoughts at the end of the prompt.
    """

    index: int
    request: GenerationRequest
    prompt: tuple[int, ...]
    noise: Sequence[float]
    new: list[int] = field(default_factory=list)
    completion: Completion | None = None
    logprobs: list[float] | None = None
    opened: str = ""

    @property
    def tokens(self) -> tuple[int, ...]:
        """The token ids of the prompt and of the answer so far."""
        return (*self.prompt, *self.new)

    def fits(self, limit: int | None) -> bool:
        """Whether the row has not ended and has at most `limit` tokens, if there is a limit."""
        return self.completion is None and (limit is None or len(self.prompt) + len(self.new) <= limit)


def record_logprobs(rows: Sequence[ActiveSequence], logits: "Tensor", tokens: "Tensor", sampling: Sampling) -> None:
    """Append to the rows that want it the log-probability of the token drawn for each from `logits` (rows,
    vocabulary), at the temperature."""
    if all(row.logprobs is None for row in rows):
        return
    logp = (logits.float() / (sampling.temperature or 1)).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    for row, value in zip(rows, logp.tolist(), strict=True):
        if row.logprobs is not None:
            row.logprobs.append(value)


class CompletionBuilder:
    """Appends tokens to rows, and ends a row at its end of turn, at a stop string or at the token limit."""

    def __init__(self, tokenizer: Any, end_ids: Iterable[int], max_new_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.end_ids = frozenset(end_ids)
        self.max_new_tokens = max_new_tokens

    def add(self, row: ActiveSequence, token: int) -> None:
        """Append one token id to `row`. If that ends the row, set its completion."""
        row.new.append(token)
        if token not in self.end_ids and (text := self._text_before_stop(row)) is not None:
            self._finish(row, *drop_broken_end(text, "stop"))
        elif token in self.end_ids or len(row.new) == self.max_new_tokens:
            self._finish(row, *decode_reply(self.tokenizer, row.new, self.end_ids))

    def _finish(self, row: ActiveSequence, text: str, reason: str) -> None:
        row.completion = Completion(text, reason, prompt_tokens=len(row.prompt), new_tokens=len(row.new))

    def _text_before_stop(self, row: ActiveSequence) -> str | None:
        """The text before the first stop string, if the newest token completed one."""
        stops = row.request.stop
        if not stops:
            return None
        # A token is at least one byte, so a stop string lies within this many last tokens (and one split character).
        tail = decode(self.tokenizer, row.new[-max(len(stop.encode()) for stop in stops) - 4 :])
        if not any(stop in tail for stop in stops):
            return None
        text = decode(self.tokenizer, row.new)
        reply = separate(text, row.opened)[1]
        if reply is None:  # stop strings do not end thoughts
            return None
        after = len(text) - len(reply)
        starts = [start for stop in stops if (start := text.find(stop, after)) >= 0]
        return text[: min(starts)] if starts else None
