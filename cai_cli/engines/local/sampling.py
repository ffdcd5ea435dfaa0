"""Drawing tokens: each row's noise is its own, so its text does not depend on the batch it is in."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cai_cli.common.errors import CaiError
from cai_cli.engines.base import Completion, GenerationRequest, Sampling

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK = 256  # of the vocabulary; the cumulative sum runs over chunks first, then within one


def uniforms(seed: int, count: int) -> Any:
    """`count` numbers in [0, 1), float64, decided by `seed` alone: the i-th decides the i-th token of a row."""
    import numpy as np

    return np.random.Generator(np.random.Philox(key=seed)).random(count)


def draw(logits: "Tensor", noise: "Tensor", sampling: Sampling, names: Sequence[str] = ()) -> "Tensor":
    """One token id per row of `logits` (rows, vocabulary): the inverse of the cumulative distribution at `noise`
    (rows,), or the most likely token at temperature 0.

    Raises: CaiError when a row holds NaN or infinity, by its name: a broken model is never sampled from.
    """
    if sampling.temperature == 0:
        check_finite(logits.amax(-1), names)
        return logits.argmax(-1)
    scaled = logits if sampling.temperature == 1 else logits.float() / sampling.temperature
    weights = scaled.float().softmax(-1)
    check_finite(weights[:, 0], names)  # one NaN or infinity among a row's logits makes all of its weights NaN
    if sampling.top_p < 1:
        weights *= weights >= _smallest_kept(weights, sampling.top_p)[:, None]
    return _inverse_cdf(weights, noise)


def check_finite(values: "Tensor", names: Sequence[str] = ()) -> None:
    """Raises: CaiError unless every value is a finite number; it names the first row that has another."""
    finite = values.isfinite()
    if not bool(finite.all()):
        name = names[finite.tolist().index(False)] if names else ""
        at = f" at row {name!r}" if name else ""
        raise CaiError(
            f"the model's logits hold NaN or infinity{at}: its weights are broken or overflow in this dtype",
            hint="--dtype float32, or train with a smaller learning rate",
        )


def _inverse_cdf(weights: "Tensor", noise: "Tensor") -> "Tensor":
    """The first index at which the cumulative sum of `weights` (not normalised) exceeds `noise` of the total."""
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
    # Rounding may push the target past the chunk's end: then its last token that has any weight.
    last = _CHUNK - 1 - (inside.flip(-1) > 0).int().argmax(-1, keepdim=True)
    return (chunk * _CHUNK + index.minimum(last))[:, 0]


def _smallest_kept(weights: "Tensor", top_p: float) -> "Tensor":
    """Per row the least weight among the likeliest tokens that together first reach `top_p` of the total (its equals
    are all kept)."""
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
    """One reply as it grows. `index` is its place among the asks; `prompt` its ids; `noise[i]` draws `new[i]`."""

    index: int
    ask: GenerationRequest
    prompt: tuple[int, ...]
    noise: Sequence[float]
    new: list[int] = field(default_factory=list)
    reply: Completion | None = None


class Writer:
    """Turns drawn ids into replies: notices the end of turn, stop strings and the limit."""

    def __init__(self, tokenizer: Any, end_ids: Iterable[int], max_new_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.end_ids = frozenset(end_ids)
        self.max_new_tokens = max_new_tokens

    def add(self, row: ActiveSequence, token: int) -> None:
        """Append one id to `row` and, when that ends it, set its reply."""
        row.new.append(token)
        if token in self.end_ids:
            self._finish(row, self._text(row.new[:-1]), "stop")
        elif (text := self._stopped(row)) is not None:
            self._finish(row, text, "stop")
        elif len(row.new) == self.max_new_tokens:
            self._finish(row, self._text(row.new), "length")

    def _finish(self, row: ActiveSequence, text: str, reason: str) -> None:
        row.reply = Completion(text, reason, prompt_tokens=len(row.prompt), new_tokens=len(row.new))

    def _stopped(self, row: ActiveSequence) -> str | None:
        """The text before the first stop string, if the newest token completed one."""
        if not row.ask.stop:
            return None
        # Every token holds at least one byte, so the string lies within this many last ones (and one split character).
        tail = self._text(row.new[-max(len(stop.encode()) for stop in row.ask.stop) - 4 :])
        if not any(stop in tail for stop in row.ask.stop):
            return None
        text = self._text(row.new)
        found = [at for stop in row.ask.stop if (at := text.find(stop)) >= 0]
        return text[: min(found)] if found else None

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def end_of_turn_ids(tokenizer: Any, generation_config: Any) -> set[int]:
    """Every id that ends an answer: those the model and the tokenizer name, and the control token that follows an
    assistant's turn in the chat template (a model tuned from a base model often names only the base's end)."""
    named = generation_config.eos_token_id
    ends = {named} if isinstance(named, int) else set(named or ())
    if tokenizer.eos_token_id is not None:
        ends.add(tokenizer.eos_token_id)
    return ends | _template_end(tokenizer)


def _template_end(tokenizer: Any) -> set[int]:
    if tokenizer.chat_template is None:
        return set()
    marker = "cai-end-of-turn-marker"
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": marker}]
    try:
        rendered: str = tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception:  # as in `encode_chat`, which says so of each row
        return set()
    after = rendered.partition(marker)[2]
    control = set(tokenizer.added_tokens_decoder)
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    return set(next(([i] for i in ids if i in control), []))
