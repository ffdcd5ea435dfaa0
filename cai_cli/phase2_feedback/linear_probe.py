"""Fits the scalar head of a preference model to the labels before training (`cai train-pm --fit-head`).

The score is linear in the hidden state at the last token, or in the mean over the reply (`--read-at`), so with the
model frozen the best head is a logistic regression on the difference of two such states: one forward pass over the
pairs and a convex problem. Departure: the paper does not describe it. Fine-tuning from such a head distorts the
features less than from a random head (Kumar et al. 2022, arXiv 2202.10054).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_cli.common.errors import CaiError
from cai_cli.metrics.intervals import clustered_share
from cai_cli.models.adapters import save_adapter
from cai_cli.models.fingerprint import weights_digest
from cai_cli.models.reading import record_place
from cai_cli.reward.packed_pairs import head_outputs
from cai_cli.training.quiet import quiet_libraries

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

FOLDS = 5
STRENGTHS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # scikit-learn's C: a larger value is a weaker L2 penalty


def hidden_differences(
    model: "PreTrainedModel", pairs: Sequence[tuple[list[int], list[int]]], batch_size: int
) -> "NDArray[Any]":
    """Return the hidden state that is read of the first conversation less that of the second, shape (pairs, hidden)."""
    import torch

    head, model.score = model.score, torch.nn.Identity()
    try:
        first, second = head_outputs(model, pairs, batch_size)
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
    """Replace the head of `model` by the logistic regression that fits the targets best.

    Cross-validation, in which the pairs of one prompt stay together, chooses the strength of the L2 penalty.

    Args:
        model: A preference model that accepts packed pairs.
        pairs: Token ids of the two conversations of each pair.
        targets: Probability that the first conversation of each pair is preferred.
        prompts: Prompt of each pair.
        batch_size: Number of pairs in one forward pass.

    Returns:
        `head_loss` (nats) and `head_accuracy` of the cross-validation.

    Raises:
        CaiError: There are too few prompts for the cross-validation.
    """
    import numpy as np
    import torch
    from sklearn.model_selection import GroupKFold

    if len(set(prompts)) < 2 * FOLDS:
        raise CaiError(
            f"--fit-head needs pairs of at least {2 * FOLDS} prompts, there are {len(set(prompts))}",
            code="too-few-rows",
        )
    x, p = hidden_differences(model, pairs, batch_size), np.array(targets)
    scale = x.std(axis=0) + 1e-6
    x /= scale
    margins = np.zeros((len(STRENGTHS), len(p)))
    for fitted, held_out in GroupKFold(FOLDS).split(x, groups=prompts):
        for k, strength in enumerate(STRENGTHS):
            margins[k, held_out] = x[held_out] @ regress(x[fitted], p[fitted], strength)
    losses = (np.logaddexp(0, -margins) + (1 - p) * margins).mean(axis=1)
    best = int(losses.argmin())
    weights = regress(x, p, STRENGTHS[best]) / scale
    with torch.no_grad():
        model.score.weight.copy_(torch.from_numpy(weights)[None])
    decided = p > 0.5
    _, of_prompt = np.unique(prompts, return_inverse=True)
    right = np.bincount(of_prompt, weights=decided & (margins[best] > 0)).astype(np.float64)
    of_pairs = np.bincount(of_prompt, weights=decided).astype(np.float64)
    return {"head_loss": float(losses[best]), "head_accuracy": clustered_share(right, of_pairs)}


@quiet_libraries()  # PEFT reads a deprecated name of transformers
def save_head(model: "PreTrainedModel", base: Path, directory: Path) -> None:
    """Write the head of a preference model alone, as an adapter of PEFT that `BASE+ADAPTER` names.

    Args:
        model: The preference model; its other weights are those of `base`.
        base: The directory of the model that the head was fitted to, whose weights are recorded by their hash.
        directory: Where the files are written.
    """
    from peft import LoraConfig, get_peft_model
    from peft.utils.constants import DUMMY_TARGET_MODULES

    config = LoraConfig(target_modules=DUMMY_TARGET_MODULES, task_type="SEQ_CLS")  # which saves the head
    save_adapter(get_peft_model(model, config), directory)
    record_place(directory, weights_digest(base), model.reading)


def regress(x: "NDArray[Any]", p: "NDArray[Any]", strength: float) -> "NDArray[Any]":
    """Return the weights of the logistic regression of the probabilities `p` on `x`, shape (hidden,).

    It has no intercept, because exchanging the two conversations of a pair must only change the sign of the score.
    """
    import numpy as np
    from sklearn.linear_model import LogisticRegression

    labels = np.repeat([1, 0], len(p))
    regression = LogisticRegression(C=strength, fit_intercept=False, max_iter=1000)
    regression.fit(np.concatenate([x, x]), labels, sample_weight=np.concatenate([p, 1 - p]))
    weights: NDArray[Any] = regression.coef_[0]
    return weights
