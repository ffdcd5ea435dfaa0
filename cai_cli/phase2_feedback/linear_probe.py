"""The scalar head of a preference model fitted to the labels before anything else is trained (`--fit-head`).

The score is linear in the hidden state it is read from, so on a model held still the best head is a logistic regression
on the difference of two hidden states: one forward pass over the pairs, then a convex problem. Fine-tuning from it
moves what the model knows less than fine-tuning from a random head does (Kumar et al. 2022, arXiv 2202.10054).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cai_cli.common.errors import CaiError
from cai_cli.metrics.intervals import wilson
from cai_cli.reward.packed_pairs import read_pairs

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

FOLDS = 5
STRENGTHS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # scikit-learn's C: the larger, the weaker the L2 penalty


def hidden_differences(
    model: "PreTrainedModel", pairs: Sequence[tuple[list[int], list[int]]], batch_size: int
) -> "NDArray[Any]":
    """What the head reads of the first conversation less what it reads of the second, shape (pairs, hidden)."""
    import torch

    head, model.score = model.score, torch.nn.Identity()
    try:
        first, second = read_pairs(model, pairs, batch_size)
    finally:
        model.score = head
    return (first - second).double().numpy()


def fit_head(
    model: "PreTrainedModel",
    pairs: Sequence[tuple[list[int], list[int]]],
    targets: Sequence[float],
    prompts: Sequence[str],
    batch_size: int,
) -> dict[str, Any]:
    """Give `model` the head that fits `targets` (the probability of the first of each pair) best.

    How strongly it is held back is chosen by cross-validation in which the pairs of one prompt stay together; returns
    the loss and accuracy of that cross-validation. Raises CaiError where there are too few prompts for it.
    """
    import numpy as np
    import torch
    from sklearn.model_selection import GroupKFold

    if len(set(prompts)) < 2 * FOLDS:
        raise CaiError(f"--fit-head needs pairs of {2 * FOLDS} prompts or more, these are of {len(set(prompts))}")
    x, p = hidden_differences(model, pairs, batch_size), np.array(targets)
    scale = x.std(axis=0) + 1e-6
    x /= scale
    margins = np.zeros((len(STRENGTHS), len(p)))
    for kept, apart in GroupKFold(FOLDS).split(x, groups=prompts):
        for k, strength in enumerate(STRENGTHS):
            margins[k, apart] = x[apart] @ regress(x[kept], p[kept], strength)
    losses = (np.logaddexp(0, -margins) + (1 - p) * margins).mean(axis=1)
    best = int(losses.argmin())
    weights = regress(x, p, STRENGTHS[best]) / scale
    with torch.no_grad():
        model.score.weight.copy_(torch.from_numpy(weights)[None])
    decided = p > 0.5
    right = int((margins[best][decided] > 0).sum())
    return {"head_loss": float(losses[best]), "head_accuracy": wilson(right, int(decided.sum()))}


def regress(x: "NDArray[Any]", p: "NDArray[Any]", strength: float) -> "NDArray[Any]":
    """The weights of the logistic regression of the probabilities `p` on `x`, without an intercept: a pair the other
    way round is the same pair."""
    import numpy as np
    from sklearn.linear_model import LogisticRegression

    labels = np.repeat([1, 0], len(p))
    regression = LogisticRegression(C=strength, fit_intercept=False, max_iter=1000)
    regression.fit(np.concatenate([x, x]), labels, sample_weight=np.concatenate([p, 1 - p]))
    weights: NDArray[Any] = regression.coef_[0]
    return weights
