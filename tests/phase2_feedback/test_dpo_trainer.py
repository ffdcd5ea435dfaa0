"""The loss of DPO on soft labels, against formulas and against TRL's own on hard ones."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model_dir

from cai_cli.models.loading import load_causal_lm, load_tokenizer
from cai_cli.phase2_feedback.dpo_trainer import soft_dpo_trainer
from cai_cli.training.quiet import quiet_libraries

BETA = 0.5
ROW = {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9, 10, 2], "rejected_ids": [11, 12]}
OTHER = {"prompt_ids": [5, 9], "chosen_ids": [30, 31], "rejected_ids": [32, 33, 34, 35, 36]}
CONFIG = {
    "max_length": None, "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": [],
    "dataloader_pin_memory": False, "per_device_train_batch_size": 2, "beta": BETA, "disable_tqdm": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model, as the policy after training: its log-ratios are not zero."""
    return tiny_model_dir(tmp_path_factory.mktemp("model") / "moved", seed=1)


def log_probs(path: Path, row: Mapping[str, Sequence[int]]) -> list[float]:
    """The log-probabilities of both replies, by a plain forward pass."""
    import torch

    model, found = load_causal_lm(path), []
    for side in ("chosen_ids", "rejected_ids"):
        ids, start = torch.tensor([[*row["prompt_ids"], *row[side]]]), len(row["prompt_ids"])
        with torch.no_grad():
            at = model(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1)
        found.append(float(at.gather(1, ids[0, start:, None]).sum()))
    return found


def loss_and_gradient(
    base: Path, policy: Path, rows: Sequence[dict[str, Any]], work: Path, *, nll: float = 0.0, **config: Any
) -> tuple[float, Any]:
    """The loss of one batch of the rows, and its gradient, where the reference is `base`."""
    import torch
    from datasets import Dataset
    from safetensors.torch import load_file
    from trl import DPOConfig

    Dataset.from_list(list(rows)).save_to_disk(work / "rows")
    with quiet_libraries():
        trainer = soft_dpo_trainer(nll)(
            model=load_causal_lm(base),
            args=DPOConfig(str(work), **CONFIG | config, precompute_ref_log_probs=True),
            processing_class=load_tokenizer(base),
            train_dataset=Dataset.load_from_disk(str(work / "rows")),
        )
    trainer.model.load_state_dict(load_file(policy / "model.safetensors"), strict=False)
    (batch,) = trainer.get_train_dataloader()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return float(loss.detach()), torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


def trls(base: Path, policy: Path, rows: Sequence[dict[str, Any]], work: Path, **config: Any) -> float:
    """The loss of TRL's DPOTrainer, without soft labels and with its own reference."""
    from datasets import Dataset
    from safetensors.torch import load_file
    from trl import DPOConfig, DPOTrainer

    class Encoded(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    with quiet_libraries():
        trainer = Encoded(
            model=load_causal_lm(base), args=DPOConfig(str(work), **CONFIG | config),
            processing_class=load_tokenizer(base), train_dataset=Dataset.from_list(list(rows)),
        )  # fmt: skip
    trainer.model.load_state_dict(load_file(policy / "model.safetensors"), strict=False)
    (batch,) = trainer.get_train_dataloader()
    return float(trainer.compute_loss(trainer.model, batch).detach())


def softly(row: dict[str, Any], p: float) -> dict[str, Any]:
    return {**row, "p_chosen": p}


def exchanged(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "chosen_ids": row["rejected_ids"], "rejected_ids": row["chosen_ids"]}


LOSSES = [
    {"loss_type": ["sigmoid"]},
    {"loss_type": ["ipo"]},
    {"loss_type": ["robust"], "label_smoothing": 0.2},
]


@pytest.mark.parametrize("config", LOSSES, ids=lambda config: config["loss_type"][0])
def test_the_loss_is_p_times_that_of_trl_plus_one_minus_p_times_that_of_the_exchanged_pair(
    base: Path, moved: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    pairs = {0.8: ROW, 0.6: OTHER}
    expected = sum(
        p * trls(base, moved, [row], tmp_path / "trl", **config)
        + (1 - p) * trls(base, moved, [exchanged(row)], tmp_path / "trl", **config)
        for p, row in pairs.items()
    ) / len(pairs)
    rows = [softly(row, p) for p, row in pairs.items()]
    loss, _ = loss_and_gradient(base, moved, rows, tmp_path / "soft", **config)
    assert loss == pytest.approx(expected, rel=1e-5)
    hard, _ = loss_and_gradient(base, moved, [softly(row, 1.0) for row in pairs.values()], tmp_path / "hard", **config)
    assert hard == pytest.approx(trls(base, moved, list(pairs.values()), tmp_path / "trl", **config), rel=1e-5)
    assert abs(hard - loss) > 1e-2


def test_each_loss_is_that_of_its_formula(base: Path, moved: Path, tmp_path: Path) -> None:
    p = 0.8
    policy, reference = log_probs(moved, ROW), log_probs(base, ROW)
    chosen, rejected = (a - b for a, b in zip(policy, reference, strict=True))
    assert abs(chosen - rejected) > 0.1

    def log_sigmoid(x: float) -> float:
        return -math.log1p(math.exp(-x))

    d, h, e = BETA * (chosen - rejected), chosen / 4 - rejected / 2, 0.2
    sigmoid = -p * log_sigmoid(d) - (1 - p) * log_sigmoid(-d)
    flipped = -p * log_sigmoid(-d) - (1 - p) * log_sigmoid(d)
    nll = -p * policy[0] / 4 - (1 - p) * policy[1] / 2
    by_formula = {
        "sigmoid": sigmoid,
        "ipo": p * (h - 1 / (2 * BETA)) ** 2 + (1 - p) * (h + 1 / (2 * BETA)) ** 2,
        "robust": ((1 - e) * sigmoid - e * flipped) / (1 - 2 * e),
    }
    for config in LOSSES:
        name = config["loss_type"][0]
        loss, _ = loss_and_gradient(base, moved, [softly(ROW, p)], tmp_path / name, nll=0.3, **config)
        assert loss == pytest.approx(by_formula[name] + 0.3 * nll, rel=1e-4), name


@pytest.mark.parametrize("config", LOSSES, ids=lambda config: config["loss_type"][0])
def test_a_tie_has_no_gradient_at_the_start_and_only_that_of_the_likelihood_with_nll(
    base: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    rows = [softly(ROW, 0.5), softly(OTHER, 0.5)]
    _, gradient = loss_and_gradient(base, base, rows, tmp_path / "tie", **config)
    assert float(gradient.abs().max()) < 1e-5
    _, hard = loss_and_gradient(base, base, [softly(ROW, 1.0)], tmp_path / "hard", **config)
    assert float(hard.abs().max()) > 1e-2
    _, with_nll = loss_and_gradient(base, base, rows, tmp_path / "nll", nll=1.0, **config)
    _, reversed_rows = loss_and_gradient(
        base, base, [exchanged(row) for row in rows], tmp_path / "reversed", nll=1.0, **config
    )
    assert float((with_nll - reversed_rows).abs().max()) < 1e-5 < float(with_nll.abs().max())


def test_the_likelihood_term_of_one_hard_pair_is_that_of_trl(base: Path, moved: Path, tmp_path: Path) -> None:
    config = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]}
    loss, _ = loss_and_gradient(base, moved, [softly(ROW, 1.0)], tmp_path / "soft", nll=0.7)
    assert loss == pytest.approx(trls(base, moved, [ROW], tmp_path / "trl", **config), rel=1e-5)
