"""The tokens of one option of a request for log-probabilities, and their log-probability."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cai_cli.engines.local.sampling import check_finite

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class OptionTokens:
    """One option of a request.

    Attributes:
        request: The index of the request.
        index: The index of the option in the request.
        tokens: The token ids to score. All but the last are also the end of the context that the model is run on.
        row: The key of the request's row, for messages.
    """

    request: int
    index: int
    tokens: tuple[int, ...]
    row: str


def log_probability(logits: "Tensor", option: OptionTokens) -> float:
    """The summed log-probability of the option's tokens under the last rows of `logits` (positions, vocabulary)."""
    import torch

    tokens = option.tokens
    if not tokens:
        return 0.0
    logp = logits[-len(tokens) :].float().log_softmax(-1)
    total = logp.gather(1, torch.tensor(tokens, device=logp.device)[:, None]).sum()
    check_finite(total[None], [option.row])
    return float(total)
